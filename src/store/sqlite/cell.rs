//! One run inside the writer's transaction: what is stored of it, what is pending, and whether somebody else wrote since.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use rusqlite::Connection;

use super::error::{corrupt, sql_error};
use super::own::{Head, OwnVersions};
use super::read;
use super::rows::{At, Fields, Stamp};
use crate::model::{
    Guard, GuardedRun, IntervalSet, Mutation, NodeId, NodeState, NodeStatus, PartitionKey, RunHeader, RunId, RunPart, RunState,
    RunStatus, Version, first_violated, time,
};
use crate::store::StoreError;

/// What is to be written of one node.
#[derive(Debug, Default)]
pub(super) struct PendingNode {
    /// The node as it will be; `None`: it goes.
    pub(super) state: Option<Arc<NodeState>>,
    /// Whether all of its intervals and partitions are to be written anew.
    pub(super) whole: bool,
    /// What changed of its coverage: seldom anything.
    pub(super) covered: Option<Box<Covered>>,
}

/// What changed of a node's coverage.
#[derive(Debug, Default)]
pub(super) struct Covered {
    /// Where its intervals changed.
    pub(super) intervals: IntervalSet,
    /// Which of its partitions changed.
    pub(super) partitions: BTreeSet<PartitionKey>,
}

impl PendingNode {
    fn covered(&mut self) -> &mut Covered {
        self.covered.get_or_insert_default()
    }
}

/// One run in the transaction: what is stored, and what is to be written.
#[derive(Debug)]
pub(super) struct Cell {
    /// The version that its row has.
    pub(super) before: Version,
    pub(super) head: Option<Head>,
    /// The run's header, where it was needed.
    pub(super) header: Option<Box<RunHeader>>,
    pub(super) header_changed: bool,
    pub(super) changed: bool,
    /// Whether the version of its row is still to be written: once, at the end of the transaction.
    pub(super) owes_version: bool,
    pub(super) nodes: BTreeMap<NodeId, PendingNode>,
    /// Status and version of nodes that are not pending, as they were found: each is searched for once, until rows are written.
    found: HashMap<NodeId, Option<(NodeStatus, Version)>>,
    pub(super) own: OwnVersions,
    /// The batch that wrote to it last, and the version before it did. What is newer was written by the chain itself: all entries of one run in one
    /// batch stand on one another.
    pub(super) began: Option<(usize, Version)>,
}

impl Cell {
    pub(super) fn new(head: Option<Head>, own: OwnVersions) -> Self {
        Self {
            before: head.as_ref().map_or(Version::NONE, |head| head.version),
            head,
            header: None,
            header_changed: false,
            changed: false,
            owes_version: false,
            nodes: BTreeMap::new(),
            found: HashMap::new(),
            own,
            began: None,
        }
    }

    /// What was pending is in its rows: whoever needs it finds it there.
    pub(super) fn written(&mut self) {
        self.before = self.head.as_ref().map_or(Version::NONE, |head| head.version);
        self.nodes.clear();
        self.found.clear();
        self.changed = false;
        self.header_changed = false;
    }

    /// The run is gone, with all that was known of it.
    pub(super) fn delete(&mut self) {
        self.head = None;
        self.header = None;
        self.nodes.clear();
        self.found.clear();
    }

    /// Takes in what a part made of the run: the rows that it touches, stamped with the version that it has here.
    pub(super) fn update(&mut self, part: &RunPart, after: &RunState, version: Version) {
        let Some(head) = &mut self.head else { return };
        head.version = version;
        self.changed = true;
        for mutation in &part.mutations {
            let Some(id) = mutation.node() else {
                head.header_version = version;
                self.header = Some(Box::new(RunHeader { version, ..after.header().clone() }));
                self.header_changed = true;
                continue;
            };
            let mut state = after.node_shared(id.as_str());
            if state.is_none() && !mutation.deletes_node() && !self.nodes.contains_key(id) {
                // Something was removed from a node that is not there, or is deleted below.
                continue;
            }
            if let Some(state) = state.as_mut().filter(|state| state.version != version) {
                Arc::make_mut(state).version = version;
            }
            let pending = self.nodes.entry(id.clone()).or_default();
            match mutation {
                Mutation::DeleteNode { .. } => {
                    pending.whole = true;
                    head.nodes_deleted = version;
                }
                Mutation::AddInterval { interval, .. } | Mutation::RemoveInterval { interval, .. } => {
                    pending.covered().intervals.insert(*interval);
                }
                Mutation::AddPartition { partition, .. } | Mutation::RemovePartition { partition, .. } => {
                    pending.covered().partitions.insert(partition.clone());
                }
                _ => {}
            }
            pending.state = state;
        }
    }

    pub(super) fn create(&mut self, after: &RunState) {
        let header = after.header();
        self.head = Some(Head {
            version: after.version(),
            created_version: after.created_version(),
            header_version: header.version,
            nodes_deleted: Version::NONE,
            created_at: Arc::from(Stamp::of(header.created_at).as_str()),
        });
        self.header = Some(Box::new(header.clone()));
        self.header_changed = true;
        self.changed = true;
        for (id, _) in after.nodes() {
            let state = after.node_shared(id.as_str());
            self.nodes.insert(id.clone(), PendingNode { state, whole: true, ..PendingNode::default() });
        }
    }

    /// Whether an earlier entry of the same batch wrote this version.
    pub(super) fn is_of_batch(&self, batch: usize, version: Version) -> bool {
        self.began.is_some_and(|(of, began)| of == batch && version > began)
    }

    /// Whether what the part's chain stands on between base and expectation was committed: nothing of it was refused.
    pub(super) fn has_all_before(&self, part: &RunPart) -> bool {
        part.expect.0.checked_sub(part.base.0) == Some(self.own.count_after(part.base))
    }

    /// Whether a row that the part writes or guards on is newer than its base, and not written by its own chain, of which so many entries of this
    /// batch were passed over.
    pub(super) fn is_stale(
        &mut self,
        conn: &Connection,
        part: &RunPart,
        head: &Head,
        (batch, passed_over): (usize, u64),
    ) -> Result<bool, StoreError> {
        // The chain has seen as many of this process's commits after its base as it expects; if there are more, it has not seen them all.
        let ahead = part.expect.0.saturating_sub(part.base.0).saturating_sub(passed_over);
        let own_seen = self.own.count_after(part.base) <= ahead;
        let unseen = |cell: &Self, version: Version| {
            version > part.base && !(own_seen && cell.own.contains(version)) && !cell.is_of_batch(batch, version)
        };
        if part.mutations.iter().any(|mutation| matches!(mutation, Mutation::Delete { .. })) && unseen(self, head.version) {
            return Ok(true);
        }
        let header =
            part.mutations.iter().any(Mutation::touches_header) || part.guards.iter().any(|g| matches!(g, Guard::RunStatus(_)));
        if header && unseen(self, head.header_version) {
            return Ok(true);
        }
        // A deletion leaves one stamp for all nodes: who puts his own over it has seen it.
        if part.mutations.iter().any(Mutation::deletes_node) && unseen(self, head.nodes_deleted) {
            return Ok(true);
        }
        let written = part.mutations.iter().filter_map(Mutation::node);
        for id in written.chain(part.guards.iter().filter_map(Guard::node)) {
            self.look(conn, &part.run, id)?;
            let version = self.node(id).map_or(head.nodes_deleted, |(_, version)| version);
            if unseen(self, version) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Searches for a node, if that was not done yet.
    fn look(&mut self, conn: &Connection, run: &RunId, id: &NodeId) -> Result<(), StoreError> {
        if !self.nodes.contains_key(id) && !self.found.contains_key(id) {
            self.found.insert(id.clone(), glance(conn, run, id)?);
        }
        Ok(())
    }

    /// Status and version of a node that was searched for.
    fn node(&self, id: &NodeId) -> Option<(&NodeStatus, Version)> {
        match self.nodes.get(id) {
            Some(pending) => pending.state.as_ref().map(|state| (&state.status, state.version)),
            None => self.found.get(id)?.as_ref().map(|(status, version)| (status, *version)),
        }
    }

    /// The first guard of the part that does not hold, and what is there instead.
    pub(super) fn violated<'p>(
        &mut self,
        conn: &Connection,
        part: &'p RunPart,
        head: &Head,
    ) -> Result<Option<(&'p Guard, String)>, StoreError> {
        if part.guards.is_empty() {
            return Ok(None);
        }
        for id in part.guards.iter().filter_map(Guard::node) {
            self.look(conn, &part.run, id)?;
        }
        let status = if part.guards.iter().any(|guard| matches!(guard, Guard::RunStatus(_))) {
            self.header(conn, &part.run)?.status.clone()
        } else {
            RunStatus::Pending
        };
        Ok(first_violated(&View { cell: self, version: head.version, status }, &part.guards))
    }

    /// The run as it is now, with the nodes that the part touches.
    pub(super) fn present(&mut self, conn: &Connection, part: &RunPart, head: &Head) -> Result<RunState, StoreError> {
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
            self.header = read::run_row(conn, run)?.map(|row| Box::new(row.header));
        }
        self.header.as_deref().ok_or_else(|| corrupt(At::table("runs").run(run), "its row is gone"))
    }
}

/// As much of a run as its guards look at: what they name was looked at.
struct View<'c> {
    cell: &'c Cell,
    version: Version,
    status: RunStatus,
}

impl GuardedRun for View<'_> {
    fn version(&self) -> Version {
        self.version
    }

    fn status(&self) -> Option<&RunStatus> {
        Some(&self.status)
    }

    fn node(&self, node: &NodeId) -> Option<(&NodeStatus, Version)> {
        self.cell.node(node)
    }
}

/// Status and version of a node, without the rest.
fn glance(conn: &Connection, run: &RunId, id: &NodeId) -> Result<Option<(NodeStatus, Version)>, StoreError> {
    let place = At::table("node_states").run(run).node(id);
    let fail = |error| sql_error(place, error);
    let sql = "SELECT status, version FROM node_states WHERE run_id = ?1 AND node_id = ?2";
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([run.as_str(), id.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let fields = Fields::new(row, place);
    Ok(Some((NodeStatus::parse(fields.text(0)?), fields.version(1)?)))
}

/// What a commit must know of a run's row.
pub(super) fn head(conn: &Connection, run: &RunId) -> Result<Option<Head>, StoreError> {
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
