//! One run while a batch is decided: what is stored of it, what is to be written, and whether somebody else wrote since.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Head, NodeWrite, RunWrite, not_read};
use crate::model::{
    Guard, GuardedRun, Mutation, NodeId, NodeState, NodeStatus, RunHeader, RunId, RunPart, RunState, RunStatus, Version,
    first_violated,
};
use crate::store::StoreError;
use crate::store::own_versions::OwnVersions;

/// One run: as it was read, with what the batch did to it so far.
#[derive(Debug)]
pub(super) struct Cell {
    /// The run's row as it is by now.
    pub(super) head: Option<Head>,
    pub(super) own: OwnVersions,
    /// The version before this batch wrote to it. What is newer was written by the chain itself: all entries of one run in one batch stand on one
    /// another.
    pub(super) began: Option<Version>,
    existed: bool,
    header: Option<RunHeader>,
    header_changed: bool,
    changed: bool,
    /// The nodes that were read; of no use once the run was deleted.
    stored: BTreeMap<NodeId, Option<Arc<NodeState>>>,
    /// Whether `stored` has all nodes that are there.
    whole: bool,
    deleted: Option<Version>,
    nodes: BTreeMap<NodeId, NodeWrite>,
}

impl Cell {
    pub(super) fn new(
        head: Option<Head>,
        header: Option<RunHeader>,
        stored: BTreeMap<NodeId, Option<Arc<NodeState>>>,
        whole: bool,
        own: OwnVersions,
    ) -> Self {
        let existed = head.is_some();
        Self {
            head,
            own,
            began: None,
            existed,
            header,
            header_changed: false,
            changed: false,
            stored,
            // Where there is no run there is no node.
            whole: whole || !existed,
            deleted: None,
            nodes: BTreeMap::new(),
        }
    }

    /// Whether an earlier entry of the same batch wrote this version.
    pub(super) fn is_of_batch(&self, version: Version) -> bool {
        self.began.is_some_and(|began| version > began)
    }

    /// A node as it is by now.
    fn node(&self, run: &RunId, id: &NodeId) -> Result<Option<&Arc<NodeState>>, StoreError> {
        if let Some(pending) = self.nodes.get(id) {
            return Ok(pending.state.as_ref());
        }
        match self.stored.get(id) {
            Some(stored) => Ok(stored.as_ref()),
            None if self.whole => Ok(None),
            None => Err(not_read(format_args!("node {id:?} of run {run:?}"))),
        }
    }

    /// Whether a row that the part writes or guards on is newer than its base, and not written by its own chain.
    pub(super) fn is_stale(&self, part: &RunPart, head: &Head) -> Result<bool, StoreError> {
        // The chain has seen as many of this process's commits after its base as it expects; if there are more, it has not seen them all.
        let ahead = part.expect.0.saturating_sub(part.base.0);
        let own_seen = self.own.count_after(part.base) <= ahead;
        let unseen =
            |version: Version| version > part.base && !(own_seen && self.own.contains(version)) && !self.is_of_batch(version);
        if part.mutations.iter().any(|mutation| matches!(mutation, Mutation::Delete { .. })) && unseen(head.version) {
            return Ok(true);
        }
        let header =
            part.mutations.iter().any(Mutation::touches_header) || part.guards.iter().any(|g| matches!(g, Guard::RunStatus(_)));
        if header && unseen(head.header_version) {
            return Ok(true);
        }
        // A deletion leaves one stamp for all nodes: who puts his own over it has seen it.
        if part.mutations.iter().any(Mutation::deletes_node) && unseen(head.nodes_deleted) {
            return Ok(true);
        }
        let nodes: BTreeSet<&NodeId> =
            part.mutations.iter().filter_map(Mutation::node).chain(part.guards.iter().filter_map(Guard::node)).collect();
        for id in nodes {
            let version = self.node(&part.run, id)?.map_or(head.nodes_deleted, |state| state.version);
            if unseen(version) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The first guard of the part that does not hold, and what is there instead.
    pub(super) fn violated<'p>(&self, part: &'p RunPart, head: &Head) -> Result<Option<(&'p Guard, String)>, StoreError> {
        for id in part.guards.iter().filter_map(Guard::node) {
            self.node(&part.run, id)?;
        }
        Ok(first_violated(&View { cell: self, run: &part.run, head }, &part.guards))
    }

    /// The run as it is now, with the nodes that the part touches.
    pub(super) fn present(&self, part: &RunPart, head: &Head) -> Result<RunState, StoreError> {
        let mut header = match &self.header {
            Some(header) => header.clone(),
            None if part.mutations.iter().any(|mutation| matches!(mutation, Mutation::Update { .. })) => {
                return Err(not_read(format_args!("the header of run {:?}", part.run)));
            }
            // Nothing looks at it.
            None => RunHeader::new(head.status.clone(), head.created_at),
        };
        header.version = head.header_version;
        let mut found = BTreeMap::new();
        for id in part.mutations.iter().filter_map(Mutation::node) {
            if let Some(state) = self.node(&part.run, id)? {
                found.insert(id.clone(), NodeState::clone(state));
            }
        }
        Ok(RunState::from_parts(part.run.clone(), header, head.version, head.created_version, found))
    }

    pub(super) fn update(&mut self, part: &RunPart, after: &RunState, version: Version) {
        let Some(head) = &mut self.head else { return };
        head.version = version;
        self.changed = true;
        for mutation in &part.mutations {
            let Some(id) = mutation.node() else {
                head.header_version = after.header().version;
                head.status = after.header().status.clone();
                self.header = Some(after.header().clone());
                self.header_changed = true;
                continue;
            };
            let state = after.node_shared(id.as_str());
            if state.is_none() && !mutation.deletes_node() && !self.nodes.contains_key(id) {
                // Something was removed from a node that is not there, or is deleted below.
                continue;
            }
            if !self.nodes.contains_key(id) {
                self.nodes.insert(id.clone(), NodeWrite::default());
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

    pub(super) fn create(&mut self, after: &RunState) {
        let header = after.header();
        self.head = Some(Head {
            version: after.version(),
            created_version: after.created_version(),
            header_version: header.version,
            nodes_deleted: Version::NONE,
            created_at: header.created_at,
            status: header.status.clone(),
        });
        self.header = Some(header.clone());
        self.header_changed = true;
        self.changed = true;
        for (id, _) in after.nodes() {
            let state = after.node_shared(id.as_str());
            self.nodes.insert(id.clone(), NodeWrite { state, whole: true, ..NodeWrite::default() });
        }
    }

    pub(super) fn delete(&mut self, version: Version) {
        self.head = None;
        self.header = None;
        self.header_changed = false;
        self.changed = true;
        self.stored.clear();
        self.whole = true;
        self.nodes.clear();
        self.deleted = Some(version);
    }

    /// The run as it is now, with all of its nodes, but only as much of its header as its nodes' history needs; `None`: it is not there.
    pub(super) fn as_found(&self, run: &RunId) -> Result<Option<RunState>, StoreError> {
        let Some(head) = &self.head else { return Ok(None) };
        if !self.whole {
            return Err(not_read(format_args!("all nodes of run {run:?}")));
        }
        let header = RunHeader::new(head.status.clone(), head.created_at);
        let stored = self.stored.iter().filter(|(id, _)| !self.nodes.contains_key(*id)).map(|(id, node)| (id, node.as_deref()));
        let pending = self.nodes.iter().map(|(id, write)| (id, write.state.as_deref()));
        let nodes = stored.chain(pending).filter_map(|(id, node)| Some((id.clone(), node?.clone())));
        Ok(Some(RunState::from_parts(run.clone(), header, head.version, head.created_version, nodes)))
    }

    /// What is to be written; `None`: nothing.
    pub(super) fn into_write(self) -> Option<RunWrite> {
        // A run that was made and deleted by the same batch leaves a tombstone and nothing else.
        self.changed.then(|| RunWrite {
            existed: self.existed,
            deleted: self.deleted,
            header: self.header.filter(|_| self.header_changed && self.head.is_some()),
            head: self.head,
            nodes: self.nodes,
        })
    }
}

/// As much of a run as its guards look at: what they name was read.
struct View<'c> {
    cell: &'c Cell,
    run: &'c RunId,
    head: &'c Head,
}

impl GuardedRun for View<'_> {
    fn version(&self) -> Version {
        self.head.version
    }

    fn status(&self) -> Option<&RunStatus> {
        Some(&self.head.status)
    }

    fn node(&self, node: &NodeId) -> Option<(&NodeStatus, Version)> {
        let state = self.cell.node(self.run, node).ok().flatten()?;
        Some((&state.status, state.version))
    }
}
