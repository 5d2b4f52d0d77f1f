//! Commits batches: decides here, checks and writes there, in one request while nobody else writes the same rows.
//!
//! ```text
//! assume what is known ──► decide ──► one conditional request ──► applied
//!        ▲                    │                  ├─ a check failed, or something would be refused: read from the primary, decide again
//!        └── read ◄───────────┴──────────────────┤
//!                                                ├─ the id is there already: its row has the answer
//!                                                ├─ it cannot go well, or not soon: the id is taken, so that no copy of an earlier request is applied any more
//!                                                └─ no answer: unknown; the same id is sent until it is settled
//! ```
//!
//! All requests for one batch carry its id, also when it was decided anew. Whatever became of a request whose answer was lost, a delayed or doubled one
//! included: at most one request with that id is ever applied, and the row of the id says which answers go with it. So nothing is ever looked up and
//! passed over.

mod follow;
mod raise;
mod told;

use std::collections::HashSet;
use std::sync::{self, Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;

use self::follow::{Follow, OnTheWay};
use self::told::Told;
use super::answer::{Before, Kept};
use super::cache::Cache;
use super::client::Client;
use super::facts::{self, Facts};
use super::fault::{Class, Fault, corrupt};
use super::hrana::{Batch as Steps, Stmt};
use super::read::{self, nth};
use super::rows::Table;
use super::send::{self, Ask, PATIENCE, pause};
use super::write::{self, Request};
use crate::model::{Batch, BatchAnswer, LeaseKey, LeaseMutation, LeaseOwner, Outcome, Refusal, RunId, RunState, Version};
use crate::store::boot_time::boot_time;
use crate::store::decide::{Decision, OwnRuns, decide};
use crate::store::unsettled::Unsettled;
use crate::store::{StoreError, StoreErrorKind};

/// How often a batch is decided anew because others were faster.
const ROUNDS: u32 = 16;

/// How often a request is sent whose answer was lost, before the caller is told that the outcome is unknown.
const SENT: u32 = 2;

/// Counters that are older than this are read anew, the time in which the machine sleeps counted: a run's beginning is told apart from an earlier run of its name by them and by tombstones, which
/// stay for a day.
const COUNTERS_FOR: Duration = Duration::from_secs(3600);

/// Keys that somebody else held when they were asked for last, at most.
const CONTESTED: usize = 10_000;

/// What the commits of one opening share.
#[derive(Debug)]
pub(super) struct Committer {
    client: Arc<Client>,
    own: OwnRuns,
    pub(super) cache: Cache,
    pub(super) follow: Follow,
    nobody: LeaseOwner,
    /// One at a time: the server has one place for a writer.
    turn: Mutex<()>,
    /// Batches of leases alone: they go beside one that is long under way, or whose answer is lost. Leases run out meanwhile.
    turn_of_leases: Mutex<()>,
    /// Never locked while something is waited for.
    memory: sync::Mutex<Memory>,
}

/// What is remembered between two commits.
#[derive(Debug, Default)]
struct Memory {
    /// Commit sequence and fencing token that were given out last, as far as is known, and since when.
    counters: Option<(u64, u64, Duration)>,
    /// The highest fencing token that was ever heard of.
    highest_token: u64,
    /// Batches of which a request was sent and not answered.
    unsettled: Unsettled,
    told: Told,
    contested: HashSet<LeaseKey>,
}

impl Memory {
    /// The numbers that were given out last.
    fn note(&mut self, seq: u64, token: u64) {
        self.counters = Some((seq, token, boot_time()));
        self.heard_of(token);
    }

    /// Numbers that were given out; those that are known may be newer, where two commits were on their way.
    fn advance(&mut self, seq: u64, token: u64) {
        let (seq, token) = self.counters.map_or((seq, token), |(s, t, _)| (s.max(seq), t.max(token)));
        self.note(seq, token);
    }

    fn heard_of(&mut self, token: u64) {
        self.highest_token = self.highest_token.max(token);
    }
}

/// What is known of the sendings of a batch so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sendings {
    /// There was none.
    Nothing,
    /// Every one was answered, and refused.
    Refused,
    /// The answer of one was lost: it may have been applied, or may still be.
    Lost,
}

/// What became of one request.
enum Sent {
    Applied(Before),
    /// The id was there: an earlier request of this batch was applied.
    Known,
    /// A row that was looked at is another one by now.
    Outdated,
    /// Somebody else writes.
    Busy(Fault),
    /// Nobody knows.
    Lost(Fault),
    /// It will not go better the next time.
    Failed(Fault),
}

impl Committer {
    pub(super) fn new(client: Arc<Client>, nobody: LeaseOwner) -> Self {
        Self {
            client,
            own: OwnRuns::default(),
            cache: Cache::default(),
            follow: Follow::default(),
            nobody,
            turn: Mutex::default(),
            turn_of_leases: Mutex::default(),
            memory: sync::Mutex::default(),
        }
    }

    /// Learns how far the counters are.
    pub(super) async fn begin(&self) -> Result<(), StoreError> {
        let seq = read::seq(&self.client).await?;
        self.follow.advance(seq, false);
        Ok(())
    }

    /// Gives out higher tokens only, from now on.
    pub(super) async fn raise_tokens(&self, beyond: u64) -> Result<(), StoreError> {
        let _turns = (self.turn.lock().await, self.turn_of_leases.lock().await);
        let raise = Stmt::exec("UPDATE meta SET token = max(token, ?1) WHERE id = 1", vec![beyond.into()]);
        send::write(&self.client, &[raise]).await.map_err(|fault| fault.into_error(self.client.place()))?;
        let mut memory = self.memory();
        memory.counters = None;
        memory.heard_of(beyond);
        Ok(())
    }

    /// An older state was brought back: what is given out from now on is beyond all that was.
    async fn raise(&self) -> Result<(), StoreError> {
        let token = self.memory().highest_token;
        let statements = raise::raise(self.follow.highest(), token);
        send::write(&self.client, &statements).await.map_err(|fault| fault.into_error(self.client.place()))?;
        self.own.forget();
        self.memory().counters = None;
        Ok(())
    }

    /// Waits until no commit is on its way.
    pub(super) async fn settle(&self) {
        drop((self.turn.lock().await, self.turn_of_leases.lock().await));
    }

    /// What is still to be removed when no commit comes any more.
    pub(super) fn last(&self) -> Option<Stmt> {
        self.memory().told.last()
    }

    /// Commits a batch.
    pub(super) async fn commit(&self, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let of_leases = batch.entries.iter().all(|entry| entry.parts.is_empty());
        let _turn = if of_leases { &self.turn_of_leases } else { &self.turn }.lock().await;
        let _on_the_way = OnTheWay::begin(&self.follow);
        self.memory().unsettled.check(batch.id, self.client.place())?;
        let answer = self.attempts(batch).await;
        let mut memory = self.memory();
        memory.unsettled.note(batch.id, &answer);
        match &answer {
            Ok(answer) => {
                memory.told.note(batch.id);
                Self::contested(&mut memory, batch, answer);
            }
            Err(error) if error.is_never_applied() => memory.told.note(batch.id),
            Err(_) => {}
        }
        answer
    }

    fn memory(&self) -> sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn attempts(&self, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let began = std::time::Instant::now();
        // Once a request was under way a copy of it may still be: then its row knows best how it ends.
        let mut sent = if self.memory().unsettled.holds(batch.id) { Sendings::Lost } else { Sendings::Nothing };
        let (mut rounds, mut lost, mut waits) = (0_u32, 0_u32, 0_u32);
        let mut facts = self.assume(batch);
        loop {
            let read = match facts.take() {
                Some(facts) => facts,
                None => match facts::read(&self.client, batch, &self.own, &self.nobody.process.id).await {
                    Ok(read) if read.before.seq < self.follow.highest() => match self.raise().await {
                        Ok(()) => continue,
                        Err(error) => return self.failed(batch, sent, error).await,
                    },
                    Ok(read) => {
                        self.memory().note(read.before.seq, read.before.token);
                        read
                    }
                    // No copy is applied any more to a schema that is newer.
                    Err(error) if error.kind() == StoreErrorKind::NewerFormat && sent < Sendings::Lost => return Err(error),
                    Err(error) => return self.failed(batch, sent, error).await,
                },
            };
            let Facts { rows, before, read, known } = read;
            if known {
                return self.known(batch).await;
            }
            let decision = match decide(batch, rows) {
                Ok(decision) => decision,
                Err(error) => return self.failed(batch, sent, error).await,
            };
            let applied = decision.answer.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Applied(_))).count();
            if !read && applied < batch.entries.len() {
                continue;
            }
            if applied == 0 && sent == Sendings::Nothing {
                return Ok(decision.answer);
            }
            let request = match self.request(batch, &decision, &before) {
                Ok(request) => request,
                Err(error) => return self.failed(batch, sent, error).await,
            };
            let sent_before = sent;
            sent = sent.max(Sendings::Refused);
            match self.send(&request).await {
                Sent::Applied(there) => return self.applied(batch, decision, &before, &there),
                Sent::Known => return self.known(batch).await,
                Sent::Outdated if rounds < ROUNDS => {
                    rounds = rounds.saturating_add(1);
                    if rounds > 1 {
                        pause(&self.client, rounds).await;
                    }
                }
                Sent::Outdated => {
                    let fault = Fault::new(Class::Busy, "others change the same rows faster than they can be read");
                    return self.failed(batch, sent, fault.into_error(self.client.place())).await;
                }
                Sent::Busy(_) if began.elapsed() < PATIENCE => {
                    waits = waits.saturating_add(1);
                    pause(&self.client, waits).await;
                }
                Sent::Lost(fault) => {
                    sent = Sendings::Lost;
                    lost = lost.saturating_add(1);
                    if lost >= SENT || began.elapsed() >= PATIENCE {
                        return Err(fault.into_error(self.client.place()).into_unknown());
                    }
                    pause(&self.client, lost).await;
                }
                Sent::Busy(fault) => return self.failed(batch, sent, fault.into_error(self.client.place())).await,
                // The server's own word about the only request that there was.
                Sent::Failed(fault) => {
                    return self.failed(batch, sent_before, fault.into_error(self.client.place())).await;
                }
            }
            // After a lost answer the same is taken for granted as before; after a failed check it is read.
            if rounds == 0 {
                facts = self.assume(batch);
            }
        }
    }

    /// A fault that trying again does not mend, or not soon. Behind requests that may have been applied, or of which a copy may still be, a row under the batch's
    /// id that stands for none of them makes it certain that none ever is. Without that row it is certain where every request was answered and refused, for
    /// faults that pass (those of one entry are sent on in pieces, beside which nothing of this batch may come to life).
    async fn failed(&self, batch: &Batch, sent: Sendings, error: StoreError) -> Result<BatchAnswer, StoreError> {
        let unsettled = |error: StoreError| match sent {
            Sendings::Refused if !error.is_of_one_entry() => error,
            _ => error.into_unknown(),
        };
        if sent == Sendings::Nothing {
            return Err(error);
        }
        if !error.is_of_one_entry() && error.kind() != StoreErrorKind::Busy {
            return Err(unsettled(error));
        }
        let statements = [write::forswear(batch)];
        let steps = Steps { exclusive: true, writes: true, statements: &statements, replication_index: None };
        match send::once(&self.client, &steps).await {
            Ok(mut result) => {
                // Where the counters' row is missing nothing took the id.
                let taken = Table::new(result.take(Steps::step_of(0)), "batches").first().is_some();
                Err(if taken { error.never_applied() } else { unsettled(error) })
            }
            Err(failed) if failed.statement == Some(0) && failed.is_duplicate => self.known(batch).await,
            Err(_) => Err(unsettled(error)),
        }
    }

    fn assume(&self, batch: &Batch) -> Option<Facts> {
        let memory = self.memory();
        let (seq, token, since) = memory.counters?;
        if boot_time().saturating_sub(since) > COUNTERS_FOR {
            return None;
        }
        let wanted = |lease: &LeaseMutation| matches!(lease, LeaseMutation::Grant { key, .. } if memory.contested.contains(key));
        if batch.entries.iter().flat_map(|entry| &entry.leases).any(wanted) {
            return None;
        }
        facts::assume(batch, &self.cache, &self.own, (seq, token), &self.nobody)
    }

    fn request(&self, batch: &Batch, decision: &Decision, before: &Before) -> Result<Request, StoreError> {
        let failed = |error: serde_json::Error| corrupt(self.client.place(), format_args!("a value cannot be written: {error}"));
        let mut request = write::request(batch, decision, before, &self.nobody.process.id).map_err(failed)?;
        self.memory().told.sweep(&mut request).map_err(failed)?;
        Ok(request)
    }

    async fn send(&self, request: &Request) -> Sent {
        let steps = Steps { exclusive: true, writes: true, statements: &request.statements, replication_index: None };
        let failed = match send::once(&self.client, &steps).await {
            Ok(mut result) => {
                self.memory().told.swept(request, &result);
                let row = Table::new(result.take(Steps::step_of(0)), "batches");
                return match there(&row) {
                    Ok(there) => Sent::Applied(there),
                    // It is applied: the row is there to be read.
                    Err(_) => Sent::Known,
                };
            }
            Err(failed) => failed,
        };
        match (failed.statement, failed.fault.class) {
            (Some(0), _) if failed.is_duplicate => Sent::Known,
            (Some(index), Class::Refused) if request.is_check(index) => Sent::Outdated,
            (_, Class::Busy) => Sent::Busy(failed.fault),
            (_, Class::Lost | Class::AtCommit) => Sent::Lost(failed.fault),
            _ => Sent::Failed(failed.fault),
        }
    }

    /// What was applied becomes known here.
    fn applied(&self, batch: &Batch, decision: Decision, assumed: &Before, there: &Before) -> Result<BatchAnswer, StoreError> {
        let kept = Kept::of(&decision.answer, assumed);
        // Applied it is, whatever is wrong with the numbers.
        let answer = kept.told(batch, there).map_err(StoreError::into_unknown)?;
        self.own.note(&answer);
        let moved = |last: Option<u64>, assumed: u64| last.unwrap_or(assumed).saturating_sub(assumed);
        let seq = there.seq + moved(decision.writes.seqs.last(), assumed.seq);
        let token = there.token + moved(decision.writes.tokens.last(), assumed.token);
        {
            let mut memory = self.memory();
            memory.heard_of(token);
            // Less than was heard of are the numbers of a time before all were raised, or before a commit that overtook this one.
            if seq >= self.follow.highest() {
                memory.advance(seq, token);
            }
        }
        self.follow.advance(seq, there.seq != self.follow.known());
        self.remember(batch, decision, assumed, there);
        Ok(answer)
    }

    /// An earlier request was applied: its row says what the answer is.
    async fn known(&self, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let question = Stmt::ask(
            "batches",
            "SELECT seq, token, versions, answers FROM batches WHERE id = ?1",
            vec![batch.id.to_string().into()],
        );
        // Applied it is; only what it came to is still to be learnt.
        let tables = send::ask(&self.client, Ask::Primary, &[question])
            .await
            .map_err(|fault| fault.into_error(self.client.place()).into_unknown())?;
        let table = nth(&self.client, &tables, 0)?;
        let row = table.first().ok_or_else(|| {
            corrupt(
                format_args!("{}: table batches", self.client.place()),
                format_args!("the row of batch {} was removed", batch.id),
            )
            .into_unknown()
        })?;
        if row.text(3).is_ok_and(|answers| answers == write::NEVER) {
            // That it was, and not why, is known; sent anew, the guilty one is told.
            let why = "a sending of the batch failed, and the answer to what made that certain was lost; nothing was written, try again";
            let place = self.client.place();
            return Err(StoreError::not_applied(StoreErrorKind::Unavailable, format!("{place}: {why}"))
                .of_one_entry()
                .never_applied());
        }
        let there = there(table).map_err(StoreError::into_unknown)?;
        let kept = row.text(3).and_then(|text| serde_json::from_str(text).map_err(|error| row.bad(3, error)));
        let kept: Kept = kept.map_err(StoreError::into_unknown)?;
        let answer = kept.told(batch, &there).map_err(StoreError::into_unknown)?;
        self.own.note(&answer);
        for part in batch.entries.iter().flat_map(|entry| &entry.parts) {
            self.cache.forget(&part.run);
        }
        // How far the tokens went is not known here, but for those of this batch: they are read before the next ones are given out.
        let mut memory = self.memory();
        memory.counters = None;
        memory.heard_of(there.token);
        for outcome in &answer.outcomes {
            if let Outcome::Applied(receipt) = outcome {
                receipt.grants.iter().for_each(|grant| memory.heard_of(grant.token.0));
            }
        }
        drop(memory);
        let others = there.seq != self.follow.known();
        self.follow.advance(there.seq + kept.applied(), others);
        Ok(answer)
    }

    /// Keeps the runs as they are now, where that is known as a whole.
    fn remember(&self, batch: &Batch, decision: Decision, assumed: &Before, there: &Before) {
        for (run, write) in decision.writes.runs {
            let version = match (assumed.versions.get(&run), &write.head) {
                (_, None) => None,
                (Some(assumed), _) if there.versions.get(&run) != Some(assumed) => None,
                (_, Some(head)) => Some(head.version),
            };
            match version.and_then(|version| now(batch, &run, version)) {
                Some(state) => self.cache.put(state),
                None => self.cache.forget(&run),
            }
        }
    }

    /// Remembers which leases somebody else holds: those are asked for by reading first.
    fn contested(memory: &mut Memory, batch: &Batch, answer: &BatchAnswer) {
        if memory.contested.len() > CONTESTED {
            memory.contested.clear();
        }
        for (entry, outcome) in batch.entries.iter().zip(&answer.outcomes) {
            let held = matches!(outcome, Outcome::Refused(Refusal::LeaseHeld { .. }));
            for lease in &entry.leases {
                if let LeaseMutation::Grant { key, .. } = lease {
                    if held {
                        memory.contested.insert(key.clone());
                    } else {
                        memory.contested.remove(key);
                    }
                }
            }
        }
    }
}

/// The run as the last part of it says that it is after the batch.
fn now(batch: &Batch, run: &RunId, version: Version) -> Option<RunState> {
    let parts = batch.entries.iter().rev().flat_map(|entry| &entry.parts);
    let last =
        parts.into_iter().find(|part| part.run == *run && part.after.as_ref().is_some_and(|after| after.version() == version))?;
    last.after.clone()
}

/// The numbers that a batch met, from its row: commit sequence, token, versions of runs.
fn there(table: &Table) -> Result<Before, StoreError> {
    let row = table.first().ok_or_else(|| corrupt("table batches", "the row of a batch was not answered"))?;
    let versions = row.json(2)?;
    Ok(Before { seq: row.number(0)?, token: row.number(1)?, versions })
}

#[cfg(test)]
mod tests;
