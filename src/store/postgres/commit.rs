//! One batch, one transaction.
//!
//! ```text
//! ──► BEGIN ─ the batch's id (a known one waits for its first sending) ─ mutexes of names ─ run rows FOR UPDATE, in order ─ leases ─ numbers
//!  ◄── heads                                                                                                                    (1)
//! ──► nodes and headers that somebody else may have changed                                                  only if there are any (2)
//!     decide
//! ──► coverage of deleted runs                                                                               only if there is any (3)
//! ──► one statement for every table and kind of change ─ the answer ─ COMMIT                                                      (4)
//! ```
//!
//! Where this opening alone seems to write to the runs of a batch, all of it goes down [at once](super::at_once) instead. Otherwise
//! each step is one way there and back. Until (4) nothing is decided: whatever fails, the transaction never happened, and what may pass is tried again.
//! From (4) on only an error of the server in a statement before COMMIT is certain (its transaction can do nothing but roll back); everything else is
//! unknown, and settled by the same batch under the same id: its transaction either meets the answer, or has the id to itself, and with that the proof that no
//! earlier one committed (but for one that went at once: what is not begun holds no id).
//!
//! The server takes a transaction back in which it hears nothing for some seconds, and counts until a statement has arrived as a whole: (4) raises that limit
//! first, in a statement of its own, where much is sent.
//!
//! All transactions take their locks in one order: ids of batches, mutexes by number, runs by id, leases by key, coverage. READ COMMITTED is enough then:
//! every row that decides is locked when it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::Shared;
use super::connection::{Conn, Failed, IDLE_IN_TRANSACTION_MS, Param, STATEMENT_MS, Sql};
use super::error::{corrupt, is_of_standby, is_passing};
use super::groups::Filled;
use super::rows::{Fields, counter};
use super::sql::{on_the_way, weight};
use super::write::Moved;
use super::{at_once, lock, outlive, write};
use crate::model::{Batch, BatchAnswer, Outcome, RunId, Version};
use crate::store::decide::{self, Decision, Head, NodesWanted, Rows, Wanted};
use crate::store::{StoreError, StoreErrorKind, short_answer};

/// How long a commit may take, with everything that is tried again.
const TOTAL: Duration = Duration::from_secs(10);

/// The first pause before something is tried again; it doubles.
const PAUSE: Duration = Duration::from_millis(5);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The longest limit of time that the server takes.
const LONGEST_MS: u64 = i32::MAX.unsigned_abs() as u64;

/// What is heavier is given more time, bytes.
pub(super) const HEAVY: usize = 64 << 10;

/// For this transaction: the server's patience runs until a statement has arrived as a whole.
const MORE_TIME: &str =
    "SELECT set_config('idle_in_transaction_session_timeout', $1, true), set_config('statement_timeout', $2, true)";
const COMMIT: &str = "COMMIT";
const ANSWER: &str = "UPDATE batches SET answers = $2 WHERE id = $1";
/// Applies a batch.
pub(super) async fn commit(shared: &Shared, batch: &Batch) -> Result<BatchAnswer, StoreError> {
    let began = Instant::now();
    let mut pause = PAUSE;
    let mut looked_elsewhere = false;
    let pace = Pace::default();
    loop {
        pace.undecided();
        let done = in_total(began, &pace, attempt(shared, batch, &pace)).await;
        let total = pace.total();
        let error = match done {
            Ok(Ok(answer)) => {
                shared.pool.own.note(&answer);
                return Ok(answer);
            }
            Ok(Err(error)) => error,
            Err(Late) => {
                // Perhaps the way there is silent, and the others with it.
                shared.pool.forget_idle();
                let slow = |error: fn(StoreErrorKind, String) -> StoreError| {
                    error(
                        StoreErrorKind::Busy,
                        format!(
                            "{}: a commit took longer than {} s; see who works there with `seeknal state locks`",
                            shared.pool.place.name,
                            total.as_secs()
                        ),
                    )
                };
                let decided = pace.decided.load(Ordering::Acquire);
                return Err(slow(if decided { StoreError::unknown } else { StoreError::not_applied }));
            }
        };
        if error.kind() == StoreErrorKind::Unavailable {
            shared.pool.forget_idle();
        }
        // Connections of before say nothing of where is written now; new ones do: once, and of several hosts until one of them is written to.
        let elsewhere = is_of_standby(&error) && (shared.pool.place.moves || !std::mem::replace(&mut looked_elsewhere, true));
        if elsewhere {
            shared.pool.forget_idle();
            shared.pool.forget_reached();
        }
        let again = (elsewhere || is_passing(&error)) && !error.is_unknown_outcome() && !pace.is_over();
        if !again || began.elapsed() + pause >= total {
            return Err(error);
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

/// How far an attempt has come.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Whether what it wants written may have been sent.
    decided: AtomicBool,
    /// How much longer than others it may take, milliseconds: it sends much.
    more: AtomicU64,
    /// Whether the batch's id was taken for good: it is not tried again.
    over: AtomicBool,
}

impl Pace {
    pub(super) fn decided(&self) {
        self.decided.store(true, Ordering::Release);
    }

    pub(super) fn undecided(&self) {
        self.decided.store(false, Ordering::Release);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn total(&self) -> Duration {
        TOTAL + Duration::from_millis(self.more.load(Ordering::Acquire))
    }
}

/// It took too long.
struct Late;

/// What is done in time; how much that is may be found out meanwhile.
async fn in_total<T>(began: Instant, pace: &Pace, work: impl Future<Output = T>) -> Result<T, Late> {
    let mut work = pin!(work);
    loop {
        let total = pace.total();
        match tokio::time::timeout_at(began + total, work.as_mut()).await {
            Ok(done) => return Ok(done),
            Err(_) if pace.total() > total => {}
            Err(_) => return Err(Late),
        }
    }
}

/// Draws no token that is not higher.
pub(super) async fn raise_tokens(shared: &Shared, beyond: u64) -> Result<(), StoreError> {
    let mut conn = shared.pool.get().await?;
    // Who moves state keeps others from drawing by his lease; nothing is altered, which takes more than the right to write.
    conn.ask(Sql::new(
        "the fencing tokens",
        "SELECT setval('fencing_token', $1::bigint) FROM fencing_token WHERE last_value < $1::bigint",
        vec![Box::new(counter(beyond))],
    ))
    .await?;
    shared.pool.put(conn);
    Ok(())
}

/// Prepares what every commit needs: the first one is not slower than the others.
pub(super) async fn warm_up(conn: &mut Conn) -> Result<(), StoreError> {
    let texts = lock::TEXTS.into_iter().chain([at_once::statement(Filled::default())]).chain([MORE_TIME, ANSWER, COMMIT]);
    let statements: Vec<Sql<'_>> = texts.map(Sql::plain).collect();
    conn.prepare(&statements).await.map_err(|failed| failed.error)
}

/// Half of it to all of it, so that those who met do not meet again.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    let half = pause / 2;
    half + half.mul_f64(f64::from(u32::try_from(random % 1024).unwrap_or(0)) / 1024.0)
}

/// The batch's transaction, once. An error that is not unknown says that nothing happened.
async fn attempt(shared: &Shared, batch: &Batch, pace: &Pace) -> Result<BatchAnswer, StoreError> {
    let mut conn = shared.pool.get().await?;
    let id = Uuid::from_bytes(*batch.id.as_bytes());
    let wanted = Wanted::of(batch);
    if let Some(answer) = at_once::commit(shared, &mut conn, batch, &wanted, pace).await? {
        shared.pool.put(conn);
        return Ok(answer);
    }
    let locked = match lock::lock(shared, &mut conn, id, &wanted).await {
        Ok(locked) => locked,
        // Who waits for others' locks may have to for long, and the batches behind this one with it.
        Err(error) if error.kind() == StoreErrorKind::Busy && shared.unanswered.holds(batch.id) => {
            if conn.ask(Sql::plain("ROLLBACK")).await.is_ok() {
                // It goes on at once, on the same connection.
                shared.pool.put(conn);
            }
            return Err(kept_out(shared, batch, error, pace).await);
        }
        Err(error) => return Err(error),
    };
    let Some(locked) = locked else {
        let answer = known(shared, &mut conn, batch, id).await?;
        conn.ask(Sql::plain("ROLLBACK")).await?;
        shared.pool.put(conn);
        if let Some(follower) = shared.follower() {
            // Who committed it did not get so far as to tell.
            follower.committed(changed_runs(&answer), true);
        }
        return Ok(answer);
    };
    let error = match locked {
        Ok(rows) => match apply(shared, conn, batch, id, &wanted, rows, pace).await {
            Err(error) if !error.is_unknown_outcome() => error,
            done => return done,
        },
        Err(error) => {
            drop(conn);
            error
        }
    };
    // The batch's id was free: whoever sent it before has not committed, and is not going to. Then what is certain of this transaction is so of all; but for what
    // went down at once, and may not have begun yet: that is kept out first.
    Err(if shared.unanswered.holds(batch.id) { kept_out(shared, batch, error, pace).await } else { error.never_applied() })
}

/// What is certain of one sending is so of all of them, once what is still on its way is kept out.
async fn kept_out(shared: &Shared, batch: &Batch, error: StoreError, pace: &Pace) -> StoreError {
    if at_once::keep_out(shared, batch.id).await {
        pace.over.store(true, Ordering::Release);
        error.never_applied()
    } else {
        error
    }
}

/// Steps 2 to 4: the locks are taken, and the batch is not known.
async fn apply(
    shared: &Shared,
    mut conn: Conn,
    batch: &Batch,
    id: Uuid,
    wanted: &Wanted,
    mut rows: Rows,
    pace: &Pace,
) -> Result<BatchAnswer, StoreError> {
    let more = NodesWanted::of(batch, &rows.heads, &rows.own);
    if !more.is_empty() {
        lock::read(&mut conn, more, &mut rows).await?;
    }
    let moved = moved(wanted, &rows.heads);
    let Decision { answer, writes, assumed, .. } = decide::decide(batch, rows)?;
    let kept = if writes.retained.is_empty() { Vec::new() } else { outlive::join(&mut conn, &writes.retained).await? };
    let stored = match short_answer::write(&answer) {
        Some(short) => short,
        None => serde_json::to_vec(&answer).map_err(|error| corrupt("the answer to a batch", error))?,
    };
    let mut plan = write::plan(&writes, &moved)?;
    plan.extend(kept);
    plan.push(Sql::new("table batches", ANSWER, vec![Box::new(id), Box::new(stored)]));
    plan.push(Sql::plain(COMMIT));
    let bytes = weight(&plan);
    if bytes > HEAVY {
        let more = u64::try_from(on_the_way(bytes).as_millis()).unwrap_or(u64::MAX);
        pace.more.store(more, Ordering::Release);
        let limit = |ms: u64| -> Param<'_> { Box::new(ms.saturating_add(more).min(LONGEST_MS).to_string()) };
        plan.insert(0, Sql::new("the transaction", MORE_TIME, vec![limit(IDLE_IN_TRANSACTION_MS), limit(STATEMENT_MS)]));
    }
    conn.prepare(&plan).await.map_err(|failed| failed.error)?;
    let commit = plan.len().saturating_sub(1);
    pace.decided();
    if let Err(Failed { index, error, by_server }) = conn.send(&plan).await {
        shared.pool.heads.forget(&wanted.runs);
        return Err(if by_server && index < commit { error } else { error.into_unknown() });
    }
    shared.pool.put(conn);
    if let Some(follower) = shared.follower() {
        follower.committed(changed_runs(&answer), !writes.leases.is_empty());
    }
    drop(plan);
    shared.pool.heads.note(&assumed, writes);
    Ok(answer)
}

/// The runs whose rows were moved on when they were locked, as they were and where they are.
fn moved(wanted: &Wanted, heads: &BTreeMap<RunId, Option<Head>>) -> BTreeMap<RunId, Moved> {
    let Some(steps) = &wanted.steps else { return BTreeMap::new() };
    let of_run = |(run, steps): (&RunId, &u64)| {
        let before = heads.get(run)?.clone()?;
        let now = Version(before.version.0.saturating_add(*steps));
        Some((run.clone(), Moved { before, now }))
    };
    steps.iter().filter_map(of_run).collect()
}

pub(super) fn changed_runs(answer: &BatchAnswer) -> BTreeSet<RunId> {
    let applied = answer.outcomes.iter().filter_map(|outcome| match outcome {
        Outcome::Applied(receipt) => Some(receipt),
        Outcome::Refused(_) => None,
    });
    applied.flat_map(|receipt| &receipt.runs).map(|run| run.run.clone()).collect()
}

/// The answer that a batch was given before.
async fn known(shared: &Shared, conn: &mut Conn, batch: &Batch, id: Uuid) -> Result<BatchAnswer, StoreError> {
    let found = conn.ask(Sql::new("table batches", "SELECT answers FROM batches WHERE id = $1", vec![Box::new(id)])).await?;
    let place = || format!("table batches, batch {}", batch.id);
    let stored: Option<Vec<u8>> = match found.first() {
        Some(row) => Fields::new(row, place()).get(0)?,
        None => None,
    };
    if stored.as_ref().is_some_and(Vec::is_empty) {
        shared.unanswered.forget(batch.id);
        return Err(at_once::was_kept_out(place()));
    }
    let answer = stored.and_then(|bytes| short_answer::read(batch, &bytes).or_else(|| serde_json::from_slice(&bytes).ok()));
    match answer {
        Some(answer) if answer.outcomes.len() == batch.entries.len() => Ok(answer),
        _ => Err(corrupt(place(), "what is stored there is no answer to these entries")),
    }
}
