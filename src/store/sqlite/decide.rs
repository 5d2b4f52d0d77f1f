//! Decides the entries of batches inside one transaction of SQLite, and folds what is accepted into one write a row.
//!
//! The rules are those of [`Ledger`](crate::model::Ledger); what this adds is other processes. If every version since the entry's base is this
//! process's own and the last one is what the entry expects, then the run's actor saw everything, and its result is written as it is. Otherwise the
//! rows that the entry touches or guards on must be no newer than its base (save what its own chain wrote), and its mutations are applied to
//! the rows as they are now.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use rusqlite::Connection;

use super::error::sql_error;
use super::own::{Head, Memory, OwnVersions, Settled};
use super::rows::{At, Fields, Stamp};
use super::{lease, outlive, read, write};
use crate::model::{
    BatchAnswer, CommitSeq, Entry, Guard, InputError, IntervalSet, LastSuccess, LeaseGrant, Mutation, NodeId, NodeState,
    NodeStatus, Outcome, PartitionKey, Receipt, Refusal, Retained, RunHeader, RunId, RunPart, RunReceipt, RunState, RunStatus,
    Version, apply_all, check_guards, time,
};
use crate::store::StoreError;

/// What is to be written of one node.
#[derive(Debug, Default)]
pub(super) struct PendingNode {
    /// The node as it will be; `None`: it goes.
    pub(super) state: Option<Arc<NodeState>>,
    /// Whether all of its intervals and partitions are to be written anew.
    pub(super) whole: bool,
    /// Where its intervals changed.
    pub(super) intervals: IntervalSet,
    /// Which of its partitions changed.
    pub(super) partitions: BTreeSet<PartitionKey>,
}

/// One run in the transaction: what is stored, and what is to be written.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) head: Option<Head>,
    /// The run's header, where it was needed.
    pub(super) header: Option<RunHeader>,
    pub(super) header_changed: bool,
    pub(super) changed: bool,
    pub(super) nodes: BTreeMap<NodeId, PendingNode>,
    own: OwnVersions,
}

/// What a part becomes if its entry is accepted.
struct Decided {
    /// The run after it; not always with all nodes, but with all that the part touches.
    after: Option<RunState>,
    before: Version,
    version: Version,
}

type Verdict<T> = Result<Result<T, Refusal>, StoreError>;

/// The two results of a decision in one step: a refusal leaves the function as `Ok(Err(..))`.
macro_rules! verdict {
    ($decided:expr) => {
        match $decided? {
            Ok(value) => value,
            Err(refusal) => return Ok(Err(refusal)),
        }
    };
}

/// One transaction of the writer.
pub(super) struct Session<'c> {
    conn: &'c Connection,
    memory: &'c Memory,
    now: DateTime<Utc>,
    cells: BTreeMap<RunId, Cell>,
    seq: u64,
    token: u64,
    counted: (u64, u64),
}

impl<'c> Session<'c> {
    /// Begins; the caller holds SQLite's write transaction.
    pub(super) fn begin(conn: &'c Connection, memory: &'c Memory, now: DateTime<Utc>) -> Result<Self, StoreError> {
        let (seq, token) = match memory.counters() {
            Some(counters) => counters,
            None => read::counters(conn)?,
        };
        Ok(Self { conn, memory, now, cells: BTreeMap::new(), seq, token, counted: (seq, token) })
    }

    /// Decides the entries of one batch in their order.
    pub(super) fn decide(&mut self, entries: &[Entry]) -> Result<BatchAnswer, StoreError> {
        let mut refused = HashSet::new();
        let mut outcomes = Vec::with_capacity(entries.len());
        for entry in entries {
            outcomes.push(match self.entry(entry, &refused)? {
                Ok(receipt) => Outcome::Applied(receipt),
                Err(refusal) => {
                    refused.extend(entry.parts.iter().map(|part| part.run.clone()));
                    Outcome::Refused(refusal)
                }
            });
        }
        Ok(BatchAnswer { outcomes })
    }

    /// Writes what was accepted.
    pub(super) fn write(&mut self) -> Result<(), StoreError> {
        for (run, cell) in &mut self.cells {
            write::run(self.conn, run, cell)?;
        }
        if (self.seq, self.token) != self.counted {
            write::counters(self.conn, self.seq, self.token)?;
        }
        Ok(())
    }

    /// What the writer remembers of the runs, once this is committed.
    pub(super) fn settled(self) -> Settled {
        let runs = self.cells.into_iter().map(|(run, cell)| (run, cell.head, cell.own)).collect();
        Settled { counters: (self.seq, self.token), runs }
    }

    fn entry(&mut self, entry: &Entry, refused: &HashSet<RunId>) -> Verdict<Receipt> {
        for fence in &entry.fences {
            if !lease::holds(self.conn, fence)? {
                return Ok(Err(Refusal::Fenced { fence: fence.clone() }));
            }
        }
        let mut decided = Vec::with_capacity(entry.parts.len());
        for (index, part) in entry.parts.iter().enumerate() {
            if !refused.is_empty() && refused.contains(&part.run) {
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
            match lease::apply(self.conn, mutation, &mut token)? {
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

    fn part(&mut self, part: &RunPart) -> Verdict<Decided> {
        let conn = self.conn;
        let next = Version(self.seq.saturating_add(1));
        let cell = self.cell(&part.run)?;
        let head = cell.head.clone();
        let version = head.as_ref().map_or(next, |head| head.version.next());
        let before = head.as_ref().map_or(Version::NONE, |head| head.version);
        let mut unbroken = false;
        if let Some(head) = &head {
            if !part.mutations.first().is_some_and(Mutation::creates_run) {
                if part.base < head.created_version {
                    return Ok(Err(Refusal::RunNotFound { run: part.run.clone() }));
                }
                unbroken = head.version == part.expect && cell.own.covers(part.base, head.version);
                if !unbroken && cell.is_stale(conn, part, head)? {
                    return Ok(Err(Refusal::Stale { run: part.run.clone() }));
                }
            }
            if !part.guards.is_empty() {
                let seen = cell.guard_view(conn, part, head)?;
                if let Some((guard, found)) = check_guards(&seen, &part.guards) {
                    return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: guard.clone(), found }));
                }
            }
        }
        if part.guards.contains(&Guard::Unlocked)
            && let Some(holder) = lease::holder(conn, &part.run)?
        {
            let found = format!("it is locked by {}", holder.owner);
            return Ok(Err(Refusal::Guard { run: part.run.clone(), guard: Guard::Unlocked, found }));
        }
        if let (true, Some(head), Some(after)) = (unbroken, &head, &part.after)
            && after.version() == version
            && after.created_version() == head.created_version
        {
            return Ok(Ok(Decided { after: Some(after.clone()), before, version }));
        }
        let mut state = match &head {
            Some(head) => Some(cell.present(conn, part, head)?),
            None => None,
        };
        if let Err(refusal) = apply_all(&mut state, &part.run, &part.mutations, version) {
            return Ok(Err(refusal));
        }
        Ok(Ok(Decided { after: state, before, version }))
    }

    fn cell(&mut self, run: &RunId) -> Result<&mut Cell, StoreError> {
        // Looked up twice, because a borrow that is returned cannot also be given up.
        if !self.cells.contains_key(run) {
            let head = match self.memory.head(run) {
                Some(head) => head.clone(),
                None => head(self.conn, run)?,
            };
            let own = self.memory.own(run);
            let cell = Cell { head, header: None, header_changed: false, changed: false, nodes: BTreeMap::new(), own };
            self.cells.insert(run.clone(), cell);
        }
        self.cells.get_mut(run).ok_or_else(|| super::error::corrupt(format_args!("run {run:?}"), "it vanished from memory"))
    }

    /// Puts an accepted part among what is to be written.
    fn install(&mut self, part: &RunPart, decided: Decided) -> Result<(), StoreError> {
        let conn = self.conn;
        let now = self.now;
        let Decided { after, version, .. } = decided;
        let cell = self.cell(&part.run)?;
        cell.own.push(version);
        match (cell.head.is_some(), after) {
            (true, Some(after)) => cell.update(part, &after, version),
            (false, Some(after)) => cell.create(&after),
            (true, None) => {
                let keep = part.mutations.iter().any(|m| matches!(m, Mutation::Delete { keep_coverage: true }));
                // What earlier entries wrote is put down first, so that what outlives the run is read from its rows.
                write::run(conn, &part.run, cell)?;
                if keep {
                    retain(conn, &part.run)?;
                }
                write::delete_run(conn, &part.run, version, Stamp::of(now))?;
                cell.head = None;
                cell.header = None;
            }
            (false, None) => {}
        }
        if part.mutations.iter().any(Mutation::frees_locks) {
            lease::free(conn, &part.run)?;
        }
        Ok(())
    }
}

impl Cell {
    fn update(&mut self, part: &RunPart, after: &RunState, version: Version) {
        let Some(head) = &mut self.head else { return };
        head.version = version;
        self.changed = true;
        for mutation in &part.mutations {
            let Some(id) = mutation.node() else {
                head.header_version = after.header().version;
                self.header = Some(after.header().clone());
                self.header_changed = true;
                continue;
            };
            let state = after.node_shared(id.as_str());
            if !self.nodes.contains_key(id) {
                self.nodes.insert(id.clone(), PendingNode::default());
            }
            let Some(pending) = self.nodes.get_mut(id) else { continue };
            match mutation {
                Mutation::DeleteNode { .. } => {
                    pending.whole = true;
                    head.nodes_deleted = version;
                }
                Mutation::AddInterval { interval, .. } | Mutation::RemoveInterval { interval, .. } => {
                    pending.intervals.insert(*interval);
                }
                Mutation::AddPartition { partition, .. } | Mutation::RemovePartition { partition, .. } => {
                    pending.partitions.insert(partition.clone());
                }
                _ => {}
            }
            pending.state = state;
        }
    }

    fn create(&mut self, after: &RunState) {
        let header = after.header();
        self.head = Some(Head {
            version: after.version(),
            created_version: after.created_version(),
            header_version: header.version,
            nodes_deleted: Version::NONE,
            created_at: Arc::from(Stamp::of(header.created_at).as_str()),
        });
        self.header = Some(header.clone());
        self.header_changed = true;
        self.changed = true;
        for (id, _) in after.nodes() {
            let state = after.node_shared(id.as_str());
            self.nodes.insert(id.clone(), PendingNode { state, whole: true, ..PendingNode::default() });
        }
    }

    /// Whether a row that the part writes or guards on is newer than its base, and not written by its own chain.
    fn is_stale(&self, conn: &Connection, part: &RunPart, head: &Head) -> Result<bool, StoreError> {
        // The chain has seen as many of this process's commits after its base as it expects; if there are more, it has not seen them all.
        let ahead = part.expect.0.saturating_sub(part.base.0);
        let own_seen = self.own.count_after(part.base) <= ahead;
        let unseen = |version: Version| version > part.base && !(own_seen && self.own.contains(version));
        let header =
            part.mutations.iter().any(Mutation::touches_header) || part.guards.iter().any(|g| matches!(g, Guard::RunStatus(_)));
        if header && unseen(head.header_version) {
            return Ok(true);
        }
        let nodes: BTreeSet<&NodeId> =
            part.mutations.iter().filter_map(Mutation::node).chain(part.guards.iter().filter_map(Guard::node)).collect();
        for id in nodes {
            let version = self.glance(conn, &part.run, id)?.map_or(head.nodes_deleted, |(_, version)| version);
            if unseen(version) {
                return Ok(true);
            }
        }
        // Deleting a run touches all of it.
        Ok(part.mutations.iter().any(|m| matches!(m, Mutation::Delete { .. })) && unseen(head.version))
    }

    /// Status and version of a node, without the rest.
    fn glance(&self, conn: &Connection, run: &RunId, id: &NodeId) -> Result<Option<(NodeStatus, Version)>, StoreError> {
        if let Some(pending) = self.nodes.get(id) {
            return Ok(pending.state.as_ref().map(|state| (state.status.clone(), state.version)));
        }
        let place = At::table("node_states").run(run).node(id);
        let fail = |error| sql_error(place, error);
        let sql = "SELECT status, version FROM node_states WHERE run_id = ?1 AND node_id = ?2";
        let mut statement = conn.prepare_cached(sql).map_err(fail)?;
        let mut rows = statement.query([run.as_str(), id.as_str()]).map_err(fail)?;
        let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
        let fields = Fields::new(row, place);
        Ok(Some((NodeStatus::parse(fields.text(0)?), fields.version(1)?)))
    }

    /// As much of the run as its guards look at.
    fn guard_view(&mut self, conn: &Connection, part: &RunPart, head: &Head) -> Result<RunState, StoreError> {
        let header = if part.guards.iter().any(|guard| matches!(guard, Guard::RunStatus(_))) {
            self.header(conn, &part.run)?.clone()
        } else {
            RunHeader::new(RunStatus::Pending, DateTime::UNIX_EPOCH)
        };
        let mut nodes = Vec::new();
        for id in part.guards.iter().filter_map(Guard::node) {
            if let Some((status, version)) = self.glance(conn, &part.run, id)? {
                let mut state = NodeState::new(status);
                state.version = version;
                nodes.push((id.clone(), state));
            }
        }
        Ok(RunState::from_parts(part.run.clone(), header, head.version, head.created_version, nodes))
    }

    /// The run as it is now, with the nodes that the part touches.
    fn present(&mut self, conn: &Connection, part: &RunPart, head: &Head) -> Result<RunState, StoreError> {
        let header = self.header(conn, &part.run)?.clone();
        let touched: BTreeSet<&NodeId> = part.mutations.iter().filter_map(Mutation::node).collect();
        let mut nodes = Vec::with_capacity(touched.len());
        for id in touched {
            let state = match self.nodes.get(id) {
                Some(pending) => pending.state.as_deref().cloned(),
                None => read::node(conn, &part.run, id)?,
            };
            nodes.extend(state.map(|state| (id.clone(), state)));
        }
        Ok(RunState::from_parts(part.run.clone(), header, head.version, head.created_version, nodes))
    }

    fn header(&mut self, conn: &Connection, run: &RunId) -> Result<&RunHeader, StoreError> {
        if self.header.is_none() {
            self.header = read::run_row(conn, run)?.map(|row| row.header);
        }
        self.header.as_ref().ok_or_else(|| super::error::corrupt(At::table("runs").run(run), "its row is gone"))
    }
}

fn head(conn: &Connection, run: &RunId) -> Result<Option<Head>, StoreError> {
    let place = At::table("runs").run(run);
    let fail = |error| sql_error(place, error);
    let sql = "SELECT version, created_version, header_version, nodes_deleted_version, created_at FROM runs WHERE run_id = ?1";
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([run.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let fields = Fields::new(row, place);
    let created_at = fields.text(4)?;
    time::parse(created_at).map_err(|error| fields.bad(4, error))?;
    Ok(Some(Head {
        version: fields.version(0)?,
        created_version: fields.version(1)?,
        header_version: fields.version(2)?,
        nodes_deleted: fields.version(3)?,
        created_at: Arc::from(created_at),
    }))
}

/// Keeps what outlives a run that is deleted.
fn retain(conn: &Connection, run: &RunId) -> Result<(), StoreError> {
    let Some(state) = read::run(conn, run)? else { return Ok(()) };
    for (id, node) in state.nodes() {
        let mut retained = Retained { last_success: LastSuccess::of(&state, node), ..Retained::default() };
        retained.coverage.absorb(node);
        outlive::join(conn, id, &retained)?;
    }
    Ok(())
}
