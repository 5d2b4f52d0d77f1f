//! Decides batches without touching storage: rows that were read go in, the answer and the folded writes come out. No I/O, no clock.
//!
//! The rules are those of [`Ledger`](crate::model::Ledger) and, for what other processes wrote, those of the SQLite backend. How a backend uses it:
//!
//! 1. [`Wanted::of`] says what a batch needs whatever is stored: the heads of its runs, leases, how many numbers. A backend with locks takes them
//!    here: first on [`Wanted::mutexes`] (names that are made or granted, which may have no row yet), then on the rows of the runs, in order.
//! 2. [`NodesWanted::of`] says, once the heads are known, which nodes and headers must be read as well. Often none: a chain that only this process
//!    wrote to brings its result with it.
//! 3. [`decide`] takes all of that as [`Rows`] and gives a [`Decision`]: one outcome for every entry, and at most one write for every row.
//! 4. The backend writes [`Writes`] in one transaction with the answer under the batch's id. One that holds row locks from step 1 on is done. One that
//!    writes conditionally makes the write depend on [`Decision::assumed`] (the version of every run as it was read; `None`: no such run), on the
//!    leases of [`Decision::leases_assumed`] being held and valid, and on the counters where it gives out numbers by itself; if a condition fails it
//!    reads again and decides again.
//! 5. After the commit [`OwnRuns::note`] remembers which versions are this process's own.
//!
//! Numbers (commit sequence, fencing tokens) are either counted on from the last one ([`Numbers::After`]) or drawn before ([`Numbers::Drawn`], with
//! gaps). They must be drawn after the locks of step 1 are held: a new run begins at its commit sequence, above all that a deleted run of its name
//! had.

mod cell;
mod locks;
mod own;
#[cfg(test)]
mod tests;
mod wanted;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use self::cell::Cell;
use self::locks::Locks;
use super::moving::is_kept_out;
use super::own_versions::OwnVersions;
use super::verdict::{Verdict, verdict};
use super::{StoreError, StoreErrorKind};
use crate::model::{
    Batch, BatchAnswer, CommitSeq, Entry, Guard, InputError, IntervalSet, LastSuccess, LeaseGrant, LeaseKey, LeaseRecord,
    Mutation, NoRun, NodeId, NodeState, Outcome, PartitionKey, Receipt, Refusal, Retained, RunHeader, RunId, RunPart, RunReceipt,
    RunState, RunStatus, Version, apply_all, first_violated, outliving,
};

pub(crate) use self::locks::{LeaseRow, LeaseWrites};
pub(crate) use self::own::OwnRuns;
#[cfg(any(feature = "postgres", test))]
pub(crate) use self::wanted::LeasesWanted;
#[cfg(feature = "libsql")]
pub(crate) use self::wanted::OfRun;
pub(crate) use self::wanted::{NodesWanted, Wanted};

/// What a commit must know of a run's row, whatever it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) version: Version,
    pub(crate) created_version: Version,
    pub(crate) header_version: Version,
    /// The version that deleted a node last: a node that is not there has no version of its own to compare.
    pub(crate) nodes_deleted: Version,
    /// When the run was created, as it is stored beside every node.
    pub(crate) created_at: DateTime<Utc>,
    pub(crate) status: RunStatus,
}

/// Where numbers that grow come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// The next one is one more than this, the last one that was given out.
    After(u64),
    /// They were drawn before; what is left over is never used.
    Drawn(VecDeque<u64>),
}

impl Numbers {
    fn peek(&self) -> Result<u64, StoreError> {
        match self {
            Self::After(last) => Ok(last.saturating_add(1)),
            Self::Drawn(drawn) => drawn.front().copied().ok_or_else(|| not_read("enough numbers")),
        }
    }

    fn take(&mut self) -> Result<u64, StoreError> {
        let next = self.peek()?;
        match self {
            Self::After(last) => *last = next,
            Self::Drawn(drawn) => drop(drawn.pop_front()),
        }
        Ok(next)
    }

    /// The number that was given out last; `None` where numbers are drawn.
    pub(crate) fn last(&self) -> Option<u64> {
        match self {
            Self::After(last) => Some(*last),
            Self::Drawn(_) => None,
        }
    }
}

/// What was read for a batch.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    /// Every run of [`Wanted::runs`]; `None`: it is not there.
    pub(crate) heads: BTreeMap<RunId, Option<Head>>,
    /// The headers that [`NodesWanted`] asks for.
    pub(crate) headers: BTreeMap<RunId, RunHeader>,
    /// The nodes that [`NodesWanted`] asks for; `None`: it is not there.
    pub(crate) nodes: BTreeMap<RunId, BTreeMap<NodeId, Option<Arc<NodeState>>>>,
    /// The runs of which `nodes` has all that are there.
    pub(crate) whole: BTreeSet<RunId>,
    /// The leases that [`Wanted::leases`] asks for, also those that are over.
    pub(crate) leases: Vec<LeaseRow>,
    /// Which versions of the runs this process committed.
    pub(crate) own: BTreeMap<RunId, OwnVersions>,
    pub(crate) seqs: Numbers,
    pub(crate) tokens: Numbers,
    /// The lease of another process that moves the state: until its end nobody else may change anything.
    pub(crate) moving: Option<LeaseRecord>,
}

/// What becomes of a batch.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) answer: BatchAnswer,
    pub(crate) writes: Writes,
    /// The version of every run that was looked at, as it was read: what a conditional write must find.
    pub(crate) assumed: BTreeMap<RunId, Option<Version>>,
    /// The leases that an accepted or refused entry was found to hold, or that were in the way: token and whether it was valid.
    pub(crate) leases_assumed: Vec<LeaseRow>,
}

/// What is to be written: at most one write for every row.
#[derive(Debug)]
pub(crate) struct Writes {
    /// The runs that changed.
    pub(crate) runs: BTreeMap<RunId, RunWrite>,
    pub(crate) leases: LeaseWrites,
    /// What joins that which outlives deleted runs.
    pub(crate) retained: BTreeMap<NodeId, Retained>,
    /// The counters after it.
    pub(crate) seqs: Numbers,
    pub(crate) tokens: Numbers,
}

/// What is to be written of one run, in this order: the tombstone, what is cleared, the run's row, its nodes.
#[derive(Debug)]
pub(crate) struct RunWrite {
    /// Whether the run has a row now.
    pub(crate) existed: bool,
    /// It was deleted (and perhaps made again) at this version: what is stored of its nodes goes.
    pub(crate) deleted: Option<Version>,
    /// The row as it will be; `None`: it goes.
    pub(crate) head: Option<Head>,
    /// All fields of the row, where they changed; otherwise only `version` and `nodes_deleted` of `head` did.
    pub(crate) header: Option<RunHeader>,
    pub(crate) nodes: BTreeMap<NodeId, NodeWrite>,
}

/// What is to be written of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NodeWrite {
    /// The node as it will be; `None`: it goes.
    pub(crate) state: Option<Arc<NodeState>>,
    /// Whether all of its intervals and partitions are to be written anew.
    pub(crate) whole: bool,
    /// Where its intervals changed.
    pub(crate) intervals: IntervalSet,
    /// Which of its partitions changed.
    pub(crate) partitions: BTreeSet<PartitionKey>,
}

/// A row was needed that was not asked for: a fault of ours, after which nothing has happened.
fn not_read(what: impl std::fmt::Display) -> StoreError {
    StoreError::not_applied(StoreErrorKind::Io, format!("deciding a batch needed {what}, which was not read; please report it"))
}

/// Decides every entry of a batch, in order.
///
/// # Errors
/// If a row is needed that is not in `rows`: then [`Wanted`] and [`NodesWanted`] were not followed.
pub(crate) fn decide(batch: &Batch, rows: Rows) -> Result<Decision, StoreError> {
    let Rows { heads, headers, nodes, whole, leases, own, seqs, tokens, moving } = rows;
    let assumed = heads.iter().map(|(run, head)| (run.clone(), head.as_ref().map(|head| head.version))).collect();
    let leases_assumed = leases.clone();
    let mut headers = headers;
    let mut nodes = nodes;
    let mut own = own;
    let cells = heads
        .into_iter()
        .map(|(run, head)| {
            let cell = Cell::new(
                head,
                headers.remove(&run),
                nodes.remove(&run).unwrap_or_default(),
                whole.contains(&run),
                own.remove(&run).unwrap_or_default(),
            );
            (run, cell)
        })
        .collect();
    let mut session =
        Session { cells, locks: Locks::new(leases), retained: BTreeMap::new(), seqs, tokens, refused: HashSet::new() };
    let mut outcomes = Vec::with_capacity(batch.entries.len());
    for entry in &batch.entries {
        if let Some(mover) = moving.as_ref().filter(|_| is_kept_out(entry)) {
            outcomes.push(Outcome::Refused(Refusal::LeaseHeld { holder: Box::new(mover.clone()) }));
            continue;
        }
        outcomes.push(match session.entry(entry)? {
            Ok(receipt) => Outcome::Applied(receipt),
            Err(refusal) => {
                session.refused.extend(entry.parts.iter().map(|part| part.run.clone()));
                Outcome::Refused(refusal)
            }
        });
    }
    let Session { cells, locks, retained, seqs, tokens, .. } = session;
    let runs = cells.into_iter().filter_map(|(run, cell)| Some((run, cell.into_write()?))).collect();
    let writes = Writes { runs, leases: locks.into_writes(), retained, seqs, tokens };
    Ok(Decision { answer: BatchAnswer { outcomes }, writes, assumed, leases_assumed })
}

/// What a part becomes if its entry is accepted.
struct Decided {
    /// The run after it; not always with all nodes, but with all that the part touches.
    after: Option<RunState>,
    before: Version,
    version: Version,
}

/// The batch while it is decided.
struct Session {
    cells: BTreeMap<RunId, Cell>,
    locks: Locks,
    retained: BTreeMap<NodeId, Retained>,
    seqs: Numbers,
    tokens: Numbers,
    /// The runs of which an entry was refused: what comes later stands on it.
    refused: HashSet<RunId>,
}

impl Session {
    fn entry(&mut self, entry: &Entry) -> Verdict<Receipt> {
        if let Some(fence) = entry.fences.iter().find(|fence| !self.locks.holds(fence)) {
            return Ok(Err(Refusal::Fenced { fence: fence.clone() }));
        }
        let mut decided = Vec::with_capacity(entry.parts.len());
        for (index, part) in entry.parts.iter().enumerate() {
            if !self.refused.is_empty() && self.refused.contains(&part.run) {
                return Ok(Err(Refusal::Chained { run: part.run.clone() }));
            }
            if entry.parts.iter().take(index).any(|earlier| earlier.run == part.run) {
                return Ok(Err(Refusal::Input(InputError::new(
                    format!("entry on run {:?}", part.run),
                    "it names the run twice",
                ))));
            }
            decided.push(verdict!(self.part(part)));
        }
        // From here on nothing but a lease can refuse.
        let grants = verdict!(self.leases(entry));
        let seq = self.seqs.take()?;
        let mut runs = Vec::with_capacity(decided.len());
        for (part, decided) in entry.parts.iter().zip(decided) {
            runs.push(RunReceipt { run: part.run.clone(), before: decided.before, after: decided.version });
            self.install(part, decided)?;
        }
        for (node, retained) in &entry.retained {
            join(&mut self.retained, node, retained);
        }
        Ok(Ok(Receipt { seq: CommitSeq(seq), runs, grants }))
    }

    /// Makes the changes of leases: all of them or none.
    fn leases(&mut self, entry: &Entry) -> Verdict<Vec<LeaseGrant>> {
        let mut grants = Vec::new();
        match entry.leases.as_slice() {
            [] => {}
            // Refused alone it changes nothing: no copy is needed to fall back to.
            [one] => grants.extend(verdict!(self.locks.apply(one, &mut self.tokens))),
            several => {
                let (mut locks, mut tokens) = (self.locks.clone(), self.tokens.clone());
                for mutation in several {
                    grants.extend(verdict!(locks.apply(mutation, &mut tokens)));
                }
                (self.locks, self.tokens) = (locks, tokens);
            }
        }
        Ok(Ok(grants))
    }

    fn part(&self, part: &RunPart) -> Verdict<Decided> {
        let creates = part.mutations.first().is_some_and(Mutation::creates_run);
        let cell = self.cell(&part.run)?;
        let Some(head) = &cell.head else {
            if !creates {
                // Also a part that only guards: nothing can be said of a run that is not there.
                return Ok(Err(Refusal::RunNotFound { run: part.run.clone() }));
            }
            if let Some((guard, found)) = first_violated(&NoRun, &part.guards) {
                return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: guard.clone(), found }));
            }
            if let Some(refusal) = self.locked(part) {
                return Ok(Err(refusal));
            }
            let version = Version(self.seqs.peek()?);
            let mut state = None;
            return Ok(apply_all(&mut state, &part.run, &part.mutations, version).map(|()| Decided {
                after: state,
                before: Version::NONE,
                version,
            }));
        };
        let (before, version) = (head.version, head.version.next());
        let mut unbroken = false;
        if !creates {
            if part.base < head.created_version && !cell.is_of_batch(head.created_version) {
                return Ok(Err(Refusal::RunNotFound { run: part.run.clone() }));
            }
            unbroken = head.version == part.expect && cell.own.covers(part.base, head.version);
            if !unbroken && cell.is_stale(part, head)? {
                return Ok(Err(Refusal::Stale { run: part.run.clone() }));
            }
        }
        if let Some((guard, found)) = cell.violated(part, head)? {
            return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: guard.clone(), found }));
        }
        if let Some(refusal) = self.locked(part) {
            return Ok(Err(refusal));
        }
        if let (true, Some(after)) = (unbroken, &part.after)
            && after.version() == version
            && after.created_version() == head.created_version
        {
            return Ok(Ok(Decided { after: Some(after.clone()), before, version }));
        }
        let mut state = Some(cell.present(part, head)?);
        Ok(apply_all(&mut state, &part.run, &part.mutations, version).map(|()| Decided { after: state, before, version }))
    }

    /// The refusal of a part that expects no lease where there is one.
    fn locked(&self, part: &RunPart) -> Option<Refusal> {
        if !part.guards.contains(&Guard::Unlocked) {
            return None;
        }
        let found = format!("it is locked by {}", self.locks.holder(&part.run)?.owner);
        Some(Refusal::Guard { run: part.run.clone(), guard: Guard::Unlocked, found })
    }

    fn cell(&self, run: &RunId) -> Result<&Cell, StoreError> {
        self.cells.get(run).ok_or_else(|| not_read(format_args!("run {run:?}")))
    }

    /// Puts an accepted part among what is to be written.
    fn install(&mut self, part: &RunPart, decided: Decided) -> Result<(), StoreError> {
        let Decided { after, before, version } = decided;
        let run = &part.run;
        let cell = self.cells.get_mut(run).ok_or_else(|| not_read(format_args!("run {run:?}")))?;
        cell.began.get_or_insert(before);
        cell.own.push(version);
        match (cell.head.is_some(), after) {
            (true, Some(after)) => cell.update(part, &after, version),
            (false, Some(after)) => cell.create(&after),
            (true, None) => {
                keep(&mut self.retained, cell, part)?;
                cell.delete(version);
            }
            (false, None) => keep(&mut self.retained, cell, part)?,
        }
        if part.mutations.iter().any(Mutation::frees_locks) {
            self.locks.free(run);
        }
        Ok(())
    }
}

/// Keeps what outlives a run that a part deletes.
fn keep(all: &mut BTreeMap<NodeId, Retained>, found: &Cell, part: &RunPart) -> Result<(), StoreError> {
    if part.mutations.iter().any(|m| matches!(m, Mutation::Delete { keep_coverage: true })) {
        for (node, kept) in outliving(found.as_found(&part.run)?, &part.run, &part.mutations) {
            join(all, &node, &kept);
        }
    }
    Ok(())
}

/// Joins what outlives deleted runs of a node: coverage is added, the newer last success stays.
fn join(all: &mut BTreeMap<NodeId, Retained>, node: &NodeId, more: &Retained) {
    if more.coverage.is_empty() && more.last_success.is_none() {
        return;
    }
    let kept = all.entry(node.clone()).or_default();
    kept.coverage.intervals.extend(more.coverage.intervals.iter());
    kept.coverage.partitions.extend(more.coverage.partitions.iter().cloned());
    let newer = |success: &LastSuccess| kept.last_success.as_ref().is_none_or(|kept| success.replaces(kept));
    if more.last_success.as_ref().is_some_and(newer) {
        kept.last_success.clone_from(&more.last_success);
    }
}

fn run_key(run: &RunId) -> LeaseKey {
    LeaseKey::run(run.clone())
}
