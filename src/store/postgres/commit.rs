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
//! Each step is one way there and back. Until (4) nothing is decided: whatever fails, the transaction never happened, and what may pass is tried again.
//! From (4) on only an error of the server in a statement before COMMIT is certain (its transaction can do nothing but roll back); everything else is
//! unknown, and settled by the same batch under the same id: its transaction either meets the answer, or has the id to itself, and with that the proof that no
//! earlier one committed.
//!
//! The server takes a transaction back in which it hears nothing for some seconds, and counts until a statement has arrived as a whole: (4) raises that limit
//! first, in a statement of its own, where much is sent.
//!
//! All transactions take their locks in one order: ids of batches, mutexes by number, runs by id, leases by key, coverage. READ COMMITTED is enough then:
//! every row that decides is locked when it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Row;
use uuid::Uuid;

use super::Shared;
use super::connection::{Conn, Failed, IDLE_IN_TRANSACTION_MS, Param, STATEMENT_MS, Sql};
use super::error::{corrupt, is_of_standby, is_passing};
use super::rows::{Fields, counter, head_columns, header_columns, lease_columns, node_columns};
use super::sql::{on_the_way, weight};
use super::write::Moved;
use super::{outlive, schema, write};
use crate::model::{Batch, BatchAnswer, Interval, LeaseKey, NodeId, NodeState, Outcome, PartitionKey, RunHeader, RunId, Version};
use crate::store::columns::At;
use crate::store::decide::{self, Decision, Head, LeaseRow, LeasesWanted, NodesWanted, Numbers, Rows, Wanted};
use crate::store::{MIGRATION, StoreError, StoreErrorKind, short_answer};

/// How long a commit may take, with everything that is tried again.
const TOTAL: Duration = Duration::from_secs(10);

/// The first pause before something is tried again; it doubles.
const PAUSE: Duration = Duration::from_millis(5);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Mutexes of names; two names that share one wait for one another now and then.
const MUTEXES: u64 = 256;

/// The longest limit of time that the server takes.
const LONGEST_MS: u64 = i32::MAX.unsigned_abs() as u64;

/// What is heavier is given more time, bytes.
const HEAVY: usize = 64 << 10;

const BEGIN: &str = "BEGIN";
/// For this transaction: the server's patience runs until a statement has arrived as a whole.
const MORE_TIME: &str =
    "SELECT set_config('idle_in_transaction_session_timeout', $1, true), set_config('statement_timeout', $2, true)";
const COMMIT: &str = "COMMIT";
const KEEP_ID: &str = "INSERT INTO batches (id, at) VALUES ($1, clock_timestamp()) ON CONFLICT DO NOTHING \
     RETURNING (SELECT schema_version FROM meta WHERE id = 1)";
const ANSWER: &str = "UPDATE batches SET answers = $2 WHERE id = $1";
/// The lease of another opening that moves the state.
const MOVING: &str = concat!(
    "SELECT ",
    lease_columns!(),
    " FROM locks WHERE run_id = $1 AND node_id = '' AND owner_process <> $2 AND expires_at > clock_timestamp()"
);
/// Sorted in a set of its own: each is taken as it comes out of it.
const LOCK_MUTEXES: &str = "SELECT pg_advisory_xact_lock(k) FROM (SELECT k FROM unnest($1::bigint[]) AS k ORDER BY k) AS sorted";
const LOCK_RUNS: &str =
    concat!("SELECT run_id, ", head_columns!(), " FROM runs WHERE run_id = ANY($1) ORDER BY run_id FOR UPDATE");
/// Locks runs and moves them on at once, as far as they go if nothing is refused: a lock that is followed by an update writes every row twice. Sorted in a
/// set of its own, as above, and as the column is: whatever the database's own order is.
const MOVE_RUNS: &str = "UPDATE runs AS r SET version = r.version + k.steps \
     FROM (SELECT run_id, steps FROM unnest($1::text[], $2::bigint[]) AS k (run_id, steps) ORDER BY run_id COLLATE \"C\") AS k \
     WHERE r.run_id = k.run_id RETURNING r.run_id, r.version - k.steps, r.created_version, r.header_version, r.nodes_deleted_version, \
     r.created_at, r.status";
const DRAW_SEQS: &str = "SELECT nextval('commit_seq') FROM generate_series(1, $1::bigint)";
const DRAW_TOKENS: &str = "SELECT nextval('fencing_token') FROM generate_series(1, $1::bigint)";

/// The leases on these keys, of these runs, under these tokens.
macro_rules! leases_wanted {
    () => {
        " FROM locks WHERE (run_id, node_id) IN (\
         SELECT l.run_id, l.node_id FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
         JOIN locks AS l ON l.run_id = k.run_id AND l.node_id = k.node_id \
         UNION SELECT run_id, node_id FROM locks WHERE run_id = ANY($3::text[]) \
         UNION SELECT run_id, node_id FROM locks WHERE token = ANY($4::bigint[]))"
    };
}
const LOCK_LEASES: &str = concat!("SELECT 1", leases_wanted!(), " ORDER BY run_id, node_id FOR UPDATE");
const READ_LEASES: &str = concat!("SELECT expires_at > clock_timestamp(), ", lease_columns!(), leases_wanted!());

/// Applies a batch.
pub(super) async fn commit(shared: &Shared, batch: &Batch) -> Result<BatchAnswer, StoreError> {
    let began = Instant::now();
    let mut pause = PAUSE;
    let mut looked_elsewhere = false;
    let pace = Pace::default();
    loop {
        pace.decided.store(false, Ordering::Release);
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
        if error.is_unknown_outcome() || !(elsewhere || is_passing(&error)) || began.elapsed() + pause >= total {
            return Err(error);
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

/// How far an attempt has come.
#[derive(Debug, Default)]
struct Pace {
    /// Whether what it wants written may have been sent.
    decided: AtomicBool,
    /// How much longer than others it may take, milliseconds: it sends much.
    more: AtomicU64,
}

impl Pace {
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
    let texts = [
        BEGIN,
        KEEP_ID,
        MOVING,
        LOCK_MUTEXES,
        LOCK_RUNS,
        MOVE_RUNS,
        DRAW_SEQS,
        DRAW_TOKENS,
        LOCK_LEASES,
        READ_LEASES,
        MORE_TIME,
        ANSWER,
        COMMIT,
    ];
    let statements: Vec<Sql<'_>> = texts.into_iter().map(Sql::plain).collect();
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
    let Some(rows) = lock(shared, &mut conn, id, &wanted).await? else {
        let answer = known(&mut conn, batch, id).await?;
        conn.ask(Sql::plain("ROLLBACK")).await?;
        shared.pool.put(conn);
        if let Some(follower) = shared.follower() {
            // Who committed it did not get so far as to tell.
            follower.committed(changed_runs(&answer), true);
        }
        return Ok(answer);
    };
    let answer = apply(shared, conn, batch, id, &wanted, rows, pace).await;
    // The batch's id was free: whoever sent it before has not committed, and is not going to. Then what is certain of this transaction is so of all.
    answer.map_err(|error| if error.is_unknown_outcome() { error } else { error.never_applied() })
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
        read(&mut conn, more, &mut rows).await?;
    }
    let moved = moved(wanted, &rows.heads);
    let Decision { answer, writes, .. } = decide::decide(batch, rows)?;
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
    pace.decided.store(true, Ordering::Release);
    if let Err(Failed { index, error, by_server }) = conn.send(&plan).await {
        return Err(if by_server && index < commit { error } else { error.into_unknown() });
    }
    shared.pool.put(conn);
    if let Some(follower) = shared.follower() {
        follower.committed(changed_runs(&answer), !writes.leases.is_empty());
    }
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

fn changed_runs(answer: &BatchAnswer) -> BTreeSet<RunId> {
    let applied = answer.outcomes.iter().filter_map(|outcome| match outcome {
        Outcome::Applied(receipt) => Some(receipt),
        Outcome::Refused(_) => None,
    });
    applied.flat_map(|receipt| &receipt.runs).map(|run| run.run.clone()).collect()
}

/// The answer that a batch was given before.
async fn known(conn: &mut Conn, batch: &Batch, id: Uuid) -> Result<BatchAnswer, StoreError> {
    let found = conn.ask(Sql::new("table batches", "SELECT answers FROM batches WHERE id = $1", vec![Box::new(id)])).await?;
    let place = || format!("table batches, batch {}", batch.id);
    let stored: Option<Vec<u8>> = match found.first() {
        Some(row) => Fields::new(row, place()).get(0)?,
        None => None,
    };
    let answer = stored.and_then(|bytes| short_answer::read(batch, &bytes).or_else(|| serde_json::from_slice(&bytes).ok()));
    match answer {
        Some(answer) if answer.outcomes.len() == batch.entries.len() => Ok(answer),
        _ => Err(corrupt(place(), "what is stored there is no answer to these entries")),
    }
}

/// FNV-1a: the same in every process and version.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The mutex of a whole schema, for changes of its tables.
pub(super) fn schema_mutex(schema: &str) -> i64 {
    hash(schema.bytes()).cast_signed()
}

/// The mutex of a name. Where two names fall together they only wait.
fn mutex(schema: &str, run: &RunId) -> i64 {
    // The upper bits tell schemas apart, the lower ones names.
    let run = hash(run.as_str().bytes()) % MUTEXES;
    ((hash(schema.bytes().chain(*b" runs")) & !(MUTEXES - 1)) | run).cast_signed()
}

/// Step 1: takes every lock, and reads what a batch needs in any case. `None`: the batch is known.
async fn lock(shared: &Shared, conn: &mut Conn, id: Uuid, wanted: &Wanted) -> Result<Option<Rows>, StoreError> {
    let schema = &shared.pool.place.schema;
    let mutexes: BTreeSet<i64> = wanted.mutexes.iter().map(|run| mutex(schema, run)).collect();
    let lock_runs = if let Some(steps) = &wanted.steps {
        let (runs, steps): (Vec<&str>, Vec<i64>) = steps.iter().map(|(run, steps)| (run.as_str(), counter(*steps))).unzip();
        Sql::new("table runs", MOVE_RUNS, vec![Box::new(runs), Box::new(steps)])
    } else {
        let runs: Vec<&str> = wanted.runs.iter().map(RunId::as_str).collect();
        Sql::new("table runs", LOCK_RUNS, vec![Box::new(runs)])
    };
    let mut statements = vec![
        Sql::plain(BEGIN),
        Sql::new("table batches", KEEP_ID, vec![Box::new(id)]),
        // Before anything is locked: whoever moves the state is not held up, and waits for nobody who does not see it.
        Sql::new("table locks", MOVING, vec![Box::new(MIGRATION), Box::new(&*shared.process.id)]),
        lock_runs,
        Sql::new("the commit sequence", DRAW_SEQS, vec![Box::new(counter(wanted.seqs as u64))]),
    ];
    if !mutexes.is_empty() {
        let mutexes: Vec<i64> = mutexes.into_iter().collect();
        statements.insert(3, Sql::new("the mutexes of runs", LOCK_MUTEXES, vec![Box::new(mutexes)]));
    }
    let heads_at = statements.len().saturating_sub(2);
    if wanted.tokens > 0 {
        statements.push(Sql::new("the fencing tokens", DRAW_TOKENS, vec![Box::new(counter(wanted.tokens as u64))]));
    }
    let tokens_at = statements.len().saturating_sub(1);
    let leases_at = lease_statements(&mut statements, &wanted.leases);
    let answers = conn.send(&statements).await.map_err(|failed| failed.error)?;
    let rows = |index: usize| answers.get(index).map_or(&[][..], Vec::as_slice);
    let Some(kept) = rows(1).first() else { return Ok(None) };
    let read = || {
        schema::check_version(&shared.pool.place, Fields::new(kept, "table meta").get(0)?)?;
        let mut heads: BTreeMap<RunId, Option<Head>> = wanted.runs.iter().map(|run| (run.clone(), None)).collect();
        for row in rows(heads_at) {
            let fields = Fields::new(row, At::table("runs"));
            let run = fields.run_id(0)?;
            let head = Fields::new(row, At::table("runs").run(&run)).head(1)?;
            heads.insert(run, Some(head));
        }
        let mut leases = Vec::new();
        for row in leases_at.into_iter().flat_map(rows) {
            let fields = Fields::new(row, "table locks");
            leases.push(LeaseRow { record: fields.lease(1)?, valid: fields.get(0)? });
        }
        let moving = rows(2).first().map(|row| Fields::new(row, "table locks").lease(0)).transpose()?;
        Ok(Rows {
            moving,
            own: shared.pool.own.of(&wanted.runs).into_iter().collect(),
            heads,
            headers: BTreeMap::new(),
            nodes: BTreeMap::new(),
            whole: BTreeSet::new(),
            leases,
            seqs: drawn(rows(heads_at + 1))?,
            tokens: if wanted.tokens > 0 { drawn(rows(tokens_at))? } else { Numbers::Drawn([].into()) },
        })
    };
    read().map(Some).map_err(StoreError::never_applied)
}

fn drawn(rows: &[Row]) -> Result<Numbers, StoreError> {
    rows.iter().map(|row| Fields::new(row, "a sequence").counter(0)).collect::<Result<_, _>>().map(Numbers::Drawn)
}

/// Locks the leases, then reads them: whether one is over is asked once it is held fast, by the server's clock at that moment.
fn lease_statements<'a>(statements: &mut Vec<Sql<'a>>, wanted: &'a LeasesWanted) -> Option<usize> {
    const PLACE: &str = "table locks";
    if wanted.is_empty() {
        return None;
    }
    let values = || -> Vec<Param<'a>> {
        let keys: Vec<&LeaseKey> = wanted.keys.iter().collect();
        vec![
            Box::new(keys.iter().map(|key| key.run.as_str()).collect::<Vec<&str>>()),
            Box::new(keys.iter().map(|key| write::node_column(key.node.as_ref())).collect::<Vec<&str>>()),
            Box::new(wanted.runs.iter().map(RunId::as_str).collect::<Vec<&str>>()),
            Box::new(wanted.tokens.iter().map(|token| counter(token.0)).collect::<Vec<i64>>()),
        ]
    };
    statements.push(Sql::new(PLACE, LOCK_LEASES, values()));
    statements.push(Sql::new(PLACE, READ_LEASES, values()));
    Some(statements.len().saturating_sub(1))
}

/// Step 2: headers and nodes.
async fn read(conn: &mut Conn, wanted: NodesWanted, rows: &mut Rows) -> Result<(), StoreError> {
    let (mut runs, mut ids) = (Vec::new(), Vec::new());
    let (mut all, mut headers) = (Vec::new(), Vec::new());
    for (run, of_run) in &wanted.0 {
        let nodes = rows.nodes.entry(run.clone()).or_default();
        if of_run.header {
            headers.push(run.as_str());
        }
        if of_run.all {
            all.push(run.as_str());
            rows.whole.insert(run.clone());
            continue;
        }
        for node in &of_run.nodes {
            runs.push(run.as_str());
            ids.push(node.as_str());
            nodes.insert(node.clone(), None);
        }
    }
    let keys = || -> Vec<Param<'_>> { vec![Box::new(runs.clone()), Box::new(ids.clone()), Box::new(all.clone())] };
    let statements = [
        Sql::new(
            "table runs",
            concat!("SELECT run_id, ", header_columns!(), " FROM runs WHERE run_id = ANY($1)"),
            vec![Box::new(headers.clone())],
        ),
        Sql::new(
            "table node_states",
            concat!(
                "SELECT n.run_id, n.node_id, ",
                node_columns!(),
                " FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
                 JOIN node_states AS n ON n.run_id = k.run_id AND n.node_id = k.node_id \
                 UNION ALL SELECT n.run_id, n.node_id, ",
                node_columns!(),
                " FROM node_states AS n WHERE n.run_id = ANY($3::text[])"
            ),
            keys(),
        ),
        Sql::new(
            "table completed_intervals",
            "SELECT i.run_id, i.node_id, i.start_at, i.end_at FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             JOIN completed_intervals AS i ON i.run_id = k.run_id AND i.node_id = k.node_id \
             UNION ALL SELECT run_id, node_id, start_at, end_at FROM completed_intervals WHERE run_id = ANY($3::text[])",
            keys(),
        ),
        Sql::new(
            "table partitions",
            "SELECT p.run_id, p.node_id, p.partition FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             JOIN partitions AS p ON p.run_id = k.run_id AND p.node_id = k.node_id \
             UNION ALL SELECT run_id, node_id, partition FROM partitions WHERE run_id = ANY($3::text[])",
            keys(),
        ),
    ];
    let answers = conn.send(&statements).await.map_err(|failed| failed.error)?;
    let [header_rows, node_rows, interval_rows, partition_rows] = answers.as_slice() else {
        return Err(corrupt("the answers to a read", "there are not as many as there were questions"));
    };
    for row in header_rows {
        let run = Fields::new(row, At::table("runs")).run_id(0)?;
        let header: RunHeader = Fields::new(row, At::table("runs").run(&run)).header(1)?;
        rows.headers.insert(run, header);
    }
    let mut found: BTreeMap<(RunId, NodeId), NodeState> = BTreeMap::new();
    for row in node_rows {
        let (key, fields) = key(row, "node_states")?;
        found.insert(key, fields.node(2)?);
    }
    for row in interval_rows {
        let (key, fields) = key(row, "completed_intervals")?;
        let node = found.get_mut(&key).ok_or_else(|| fields.bad(1, "there is no such node"))?;
        let interval = Interval::new(fields.stamp(2)?, fields.stamp(3)?).map_err(|error| fields.bad(2, error))?;
        Arc::make_mut(&mut node.intervals).insert(interval);
    }
    for row in partition_rows {
        let (key, fields) = key(row, "partitions")?;
        let node = found.get_mut(&key).ok_or_else(|| fields.bad(1, "there is no such node"))?;
        let partition = PartitionKey::new(fields.text(2)?).map_err(|error| fields.bad(2, error))?;
        Arc::make_mut(&mut node.partitions).insert(partition);
    }
    for ((run, node), state) in found {
        rows.nodes.entry(run).or_default().insert(node, Some(Arc::new(state)));
    }
    Ok(())
}

/// The key of a node's row: its first two columns.
fn key<'r>(row: &'r Row, table: &'static str) -> Result<((RunId, NodeId), Fields<'r, String>), StoreError> {
    let place = At::table(table);
    let fields = Fields::new(row, place);
    let (run, node) = (fields.run_id(0)?, fields.node_id(1)?);
    let named = place.run(&run).node(&node).to_string();
    Ok(((run, node), Fields::new(row, named)))
}
