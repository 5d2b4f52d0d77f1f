//! Decides the entries of batches inside one transaction of SQLite, and folds what is accepted into one write a row.
//!
//! The rules are those of [`Ledger`](crate::model::Ledger); what this adds is other processes. If every version since the entry's base is this
//! process's own and the last one is what the entry expects, then the run's actor saw everything. Otherwise the rows that the entry touches or
//! guards on must be no newer than its base (save what its own chain wrote). If also all that it stands on was committed, the rows that the actor
//! made are right, and are written under the version that the entry has here; else its mutations are applied to the rows as they are now.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;

use chrono::{DateTime, Utc};
use rusqlite::Connection;

use super::cell::{Cell, head};
use super::changes::Noting;
use super::error::sql_error;
use super::own::{Memory, Settled};
use super::owners::Deaths;
use super::rows::Stamp;
use super::write::Statements;
use super::{lease, outlive, read, write};
use crate::model::{
    BatchAnswer, CommitSeq, Entry, Fallen, Guard, InputError, LeaseGrant, Mutation, NoRun, Outcome, Receipt, Refusal, RunId,
    RunPart, RunReceipt, RunState, Version, apply_all, first_violated, outliving,
};
use crate::store::StoreError;
use crate::store::verdict::{Verdict, verdict};

/// What a part becomes if its entry is accepted.
struct Decided<'p> {
    /// The run after it; not always with all nodes, but with all that the part touches.
    after: Option<Cow<'p, RunState>>,
    before: Version,
    version: Version,
}

/// One transaction of the writer.
pub(super) struct Session<'c> {
    conn: &'c Connection,
    memory: &'c Memory,
    deaths: &'c Deaths<'c>,
    now: DateTime<Utc>,
    cells: HashMap<RunId, Box<Cell>>,
    /// Which batch of this transaction is being decided, by its number.
    batch: usize,
    seq: u64,
    token: u64,
    counted: (u64, u64),
    /// Rows written.
    rows: usize,
}

impl<'c> Session<'c> {
    /// Begins; the caller holds SQLite's write transaction.
    pub(super) fn begin(
        conn: &'c Connection,
        memory: &'c Memory,
        deaths: &'c Deaths<'c>,
        now: DateTime<Utc>,
    ) -> Result<Self, StoreError> {
        let (seq, token) = match memory.counters() {
            Some(counters) => counters,
            None => read::counters(conn)?,
        };
        Ok(Self { conn, memory, deaths, now, cells: HashMap::new(), batch: 0, seq, token, counted: (seq, token), rows: 0 })
    }

    /// The commit sequence that was there at the beginning.
    pub(super) fn found_seq(&self) -> u64 {
        self.counted.0
    }

    /// Decides the entries of one batch in their order, from the first one that has no outcome yet.
    pub(super) fn decide(&mut self, number: usize, entries: &[Entry], answer: &mut BatchAnswer) -> Result<(), StoreError> {
        self.batch = number;
        let outcomes = &mut answer.outcomes;
        let mut fallen = Fallen::default();
        for (entry, outcome) in entries.iter().zip(&*outcomes) {
            if matches!(outcome, Outcome::Refused(_)) {
                fallen.add(entry);
            }
        }
        let later = entries.get(outcomes.len()..).unwrap_or_default();
        outcomes.reserve(later.len());
        for entry in later {
            outcomes.push(match self.entry(entry, &fallen)? {
                Ok(receipt) => Outcome::Applied(receipt),
                Err(refusal) => {
                    fallen.add(entry);
                    Outcome::Refused(refusal)
                }
            });
        }
        Ok(())
    }

    /// Writes what was accepted since it was called last, and notes it for others.
    pub(super) fn write(&mut self, noting: Noting) -> Result<(), StoreError> {
        let mut statements = Statements::new(self.conn, noting);
        let mut changed: Vec<(&RunId, &mut Box<Cell>)> = self.cells.iter_mut().filter(|(_, cell)| cell.changed).collect();
        changed.sort_unstable_by_key(|(run, _)| *run);
        for (run, cell) in changed {
            self.rows = self.rows.saturating_add(cell.nodes.len()).saturating_add(1);
            write::run(&mut statements, run, cell)?;
        }
        Ok(())
    }

    /// Writes the versions that were put off, and the counters. Answers with what the writer remembers of the runs, once this is committed.
    pub(super) fn finish(mut self) -> Result<Settled, StoreError> {
        let mut statements = Statements::new(self.conn, Noting::Nothing);
        let mut owing: Vec<(&RunId, &mut Box<Cell>)> = self.cells.iter_mut().filter(|(_, cell)| cell.owes_version).collect();
        owing.sort_unstable_by_key(|(run, _)| *run);
        for (run, cell) in owing {
            write::owed_version(&mut statements, run, cell)?;
        }
        if (self.seq, self.token) != self.counted {
            write::counters(self.conn, self.seq, self.token)?;
        }
        let runs = self.cells.into_iter().map(|(run, cell)| (run, cell.head, cell.own)).collect();
        Ok(Settled { counters: (self.seq, self.token), rows: self.rows, runs })
    }

    fn entry(&mut self, entry: &Entry, fallen: &Fallen<'_>) -> Verdict<Receipt> {
        for fence in &entry.fences {
            if !lease::holds(self.conn, fence)? {
                return Ok(Err(Refusal::Fenced { fence: fence.clone() }));
            }
        }
        let mut decided = Vec::with_capacity(entry.parts.len());
        for (index, part) in entry.parts.iter().enumerate() {
            if fallen.holds_up(part) {
                return Ok(Err(Refusal::Chained { run: part.run.clone() }));
            }
            if entry.parts.iter().take(index).any(|earlier| earlier.run == part.run) {
                return Ok(Err(Refusal::Input(InputError::new(
                    format!("entry on run {:?}", part.run),
                    "it names the run twice",
                ))));
            }
            decided.push(verdict!(self.part(part, entry.detached, fallen.passed_over(&part.run))));
        }
        // From here on nothing but a lease can refuse; leases are rows that are written at once.
        let grants = verdict!(self.leases(entry));
        self.seq = self.seq.saturating_add(1);
        let mut runs = Vec::with_capacity(decided.len());
        for (part, decided) in entry.parts.iter().zip(decided) {
            runs.push(RunReceipt { run: part.run.clone(), before: decided.before, after: decided.version });
            self.install(part, decided)?;
        }
        for (node, retained) in &entry.retained {
            outlive::join(self.conn, node, retained)?;
        }
        Ok(Ok(Receipt { seq: CommitSeq(self.seq), runs, grants }))
    }

    /// Makes the changes of leases: all of them or none.
    fn leases(&mut self, entry: &Entry) -> Verdict<Vec<LeaseGrant>> {
        let mut grants = Vec::new();
        let several = entry.leases.len() > 1;
        let step = |sql: &str| {
            let done =
                if several { self.conn.prepare_cached(sql).and_then(|mut statement| statement.execute([])) } else { Ok(0) };
            done.map(|_| ()).map_err(|error| sql_error("table locks", error))
        };
        let mut token = self.token;
        step("SAVEPOINT leases")?;
        for mutation in &entry.leases {
            match lease::apply(self.conn, mutation, &mut token, self.deaths)? {
                Ok(grant) => grants.extend(grant),
                Err(refusal) => {
                    step("ROLLBACK TO leases")?;
                    step("RELEASE leases")?;
                    return Ok(Err(refusal));
                }
            }
        }
        step("RELEASE leases")?;
        self.token = token;
        Ok(Ok(grants))
    }

    fn part<'p>(&mut self, part: &'p RunPart, detached: bool, passed_over: u64) -> Verdict<Decided<'p>> {
        let conn = self.conn;
        let next = Version(self.seq.saturating_add(1));
        let batch = self.batch;
        let deaths = self.deaths;
        let creates = part.mutations.first().is_some_and(Mutation::creates_run);
        let cell = self.cell(&part.run)?;
        let head = cell.head.clone();
        let version = head.as_ref().map_or(next, |head| head.version.next());
        let before = head.as_ref().map_or(Version::NONE, |head| head.version);
        if let Some(head) = &head {
            if !creates {
                if part.base < head.created_version && !cell.is_of_batch(batch, head.created_version) {
                    return Ok(Err(Refusal::RunNotFound { run: part.run.clone() }));
                }
                let unbroken = passed_over == 0 && head.version == part.expect && cell.own.covers(part.base, head.version);
                let by_guards = detached && part.pins_its_nodes();
                if !unbroken && !by_guards && cell.is_stale(conn, part, head, (batch, passed_over))? {
                    return Ok(Err(Refusal::Stale { run: part.run.clone() }));
                }
            }
            if let Some((guard, found)) = cell.violated(conn, part, head)? {
                return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: guard.clone(), found }));
            }
        }
        if head.is_none() && !creates {
            // Also a part that only guards: nothing can be said of a run that is not there.
            return Ok(Err(Refusal::RunNotFound { run: part.run.clone() }));
        }
        if head.is_none()
            && let Some((guard, found)) = first_violated(&NoRun, &part.guards)
        {
            return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: guard.clone(), found }));
        }
        if part.guards.contains(&Guard::Unlocked)
            && let Some(holder) = lease::holder(conn, &part.run, deaths)?
        {
            let found = format!("it is locked by {}", holder.owner);
            return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: Guard::Unlocked, found }));
        }
        // Nothing that the part touches is newer than what its sender saw, and all that it stands on was committed: then the rows that it made are
        // right, whatever others did to other rows.
        if let (false, Some(head), Some(after)) = (creates, &head, &part.after)
            && cell.has_all_before(part)
            && after.created_version() == head.created_version
            && after.version() == part.expect.next()
        {
            return Ok(Ok(Decided { after: Some(Cow::Borrowed(after)), before, version }));
        }
        let mut state = match &head {
            Some(head) => Some(cell.present(conn, part, head)?),
            None => None,
        };
        if let Err(refusal) = apply_all(&mut state, &part.run, &part.mutations, version) {
            return Ok(Err(refusal));
        }
        Ok(Ok(Decided { after: state.map(Cow::Owned), before, version }))
    }

    fn cell(&mut self, run: &RunId) -> Result<&mut Cell, StoreError> {
        match self.cells.entry(run.clone()) {
            Place::Occupied(known) => Ok(known.into_mut()),
            Place::Vacant(place) => {
                let (known, own) = self.memory.run(run);
                let head = known.cloned().map_or_else(|| head(self.conn, run), Ok)?;
                Ok(place.insert(Box::new(Cell::new(head, own))))
            }
        }
    }

    /// Puts an accepted part among what is to be written.
    fn install(&mut self, part: &RunPart, decided: Decided<'_>) -> Result<(), StoreError> {
        let conn = self.conn;
        let now = self.now;
        let batch = self.batch;
        let Decided { after, before, version } = decided;
        let cell = self.cell(&part.run)?;
        if cell.began.is_none_or(|(of, _)| of != batch) {
            cell.began = Some((batch, before));
        }
        cell.own.push(version);
        match (cell.head.is_some(), after) {
            (true, Some(after)) => cell.update(part, &after, version),
            (false, Some(after)) => cell.create(&after),
            (true, None) => {
                // What earlier entries wrote is put down first, so that what outlives the run is read from its rows.
                write::run(&mut Statements::new(conn, Noting::Nothing), &part.run, cell)?;
                if part.mutations.iter().any(|m| matches!(m, Mutation::Delete { keep_coverage: true })) {
                    retain(conn, read::run(conn, &part.run)?, part)?;
                }
                write::delete_run(conn, &part.run, version, Stamp::of(now))?;
                cell.delete();
            }
            (false, None) => retain(conn, None, part)?,
        }
        if part.mutations.iter().any(Mutation::frees_locks) {
            lease::free(conn, &part.run)?;
        }
        Ok(())
    }
}

/// Keeps what outlives a run that a part deletes, which found it like this.
fn retain(conn: &Connection, found: Option<RunState>, part: &RunPart) -> Result<(), StoreError> {
    outliving(found, &part.run, &part.mutations).iter().try_for_each(|(node, kept)| outlive::join(conn, node, kept))
}
