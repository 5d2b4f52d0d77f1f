//! What outlives a run: the completed intervals and partitions of its nodes, and each node's last success.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::apply::apply_logged;
use super::id::{NodeId, PartitionKey, RunId};
use super::interval::IntervalSet;
use super::mutation::Mutation;
use super::node::{Fingerprint, NodeState};
use super::run::{RunState, Version};

/// The completed intervals and partitions of a node that outlive the runs which cleanup deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeCoverage {
    /// Completed intervals.
    #[serde(skip_serializing_if = "IntervalSet::is_empty")]
    pub intervals: IntervalSet,
    /// Completed partitions.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub partitions: BTreeSet<PartitionKey>,
}

impl NodeCoverage {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.intervals.is_empty() && self.partitions.is_empty()
    }

    /// Adds what a node completed in one run.
    pub fn absorb(&mut self, node: &NodeState) {
        self.intervals.extend(node.intervals.iter());
        self.partitions.extend(node.partitions.iter().cloned());
    }
}

/// Everything about a node that outlives its deleted runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Retained {
    /// What they completed.
    #[serde(flatten)]
    pub coverage: NodeCoverage,
    /// The newest success among them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_success: Option<LastSuccess>,
}

/// What outlives a run by the entry that deletes it; nothing where it is not told to keep anything, or deletes none. `current` is the run before the
/// entry: what the entry itself did to it before the deletion counts as well.
pub(crate) fn outliving(current: Option<RunState>, id: &RunId, mutations: &[Mutation]) -> Vec<(NodeId, Retained)> {
    let Some((Mutation::Delete { keep_coverage: true }, before)) = mutations.split_last() else { return Vec::new() };
    let mut run = current;
    // It was accepted: nothing of it is refused now. The version is nobody's.
    let (Ok(()), Some(run)) = (apply_logged(&mut run, id, before, Version::NONE), run) else { return Vec::new() };
    run.nodes()
        .map(|(id, node)| {
            let mut kept = Retained { last_success: LastSuccess::of(&run, node), ..Retained::default() };
            kept.coverage.absorb(node);
            (id.clone(), kept)
        })
        .filter(|(_, kept)| !kept.coverage.is_empty() || kept.last_success.is_some())
        .collect()
}

/// The last time that a node ended with success, over all runs, also runs that cleanup deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LastSuccess {
    /// The run in which it was.
    pub run_id: RunId,
    /// When that run was created: a later run's success replaces an earlier one's.
    pub run_created_at: DateTime<Utc>,
    /// When the node ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// Its fingerprint then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
    /// Its row count then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_count: Option<u64>,
    /// Its watermarks then, by name.
    #[serde(default, skip_serializing_if = "super::metadata::Metadata::is_empty")]
    pub watermarks: super::metadata::Metadata,
}

impl LastSuccess {
    /// What a node's state in a run says; `None` if it did not end with success there.
    pub fn of(run: &RunState, node: &NodeState) -> Option<Self> {
        (node.status == super::status::NodeStatus::Success).then(|| Self {
            run_id: run.id().clone(),
            run_created_at: run.header().created_at,
            finished_at: node.finished_at,
            fingerprint: node.fingerprint.clone(),
            row_count: node.row_count,
            watermarks: node.watermarks.clone(),
        })
    }

    /// Whether this one, which is told later, takes the place of the other as what outlives deleted runs: unless the other is newer. What is told twice of
    /// one run is another life of it, as a move brings it back: there the later end counts.
    pub(crate) fn replaces(&self, kept: &Self) -> bool {
        let place = |success: &Self| (success.run_created_at, success.run_id.clone(), success.finished_at);
        place(self) >= place(kept)
    }

    /// Whether this one is newer than the other: by the creation of the run, then by its id.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        (self.run_created_at, &self.run_id) > (other.run_created_at, &other.run_id)
    }
}
