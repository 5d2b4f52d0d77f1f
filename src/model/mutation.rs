//! Every change there is. What cannot be said with a [`Mutation`] cannot be written.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::attempt::Attempt;
use super::id::{NodeId, PartitionKey};
use super::interval::Interval;
use super::json::RawJson;
use super::node::NodeState;
use super::node_update::NodeUpdate;
use super::run::RunHeader;
use super::run_update::{NewRun, RunUpdate};
use super::time;

/// A whole run from elsewhere: another backend, an export, a foreign file. Its stamps and counters are kept, its versions are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunImport {
    /// Its header; `version` in it means nothing.
    pub header: RunHeader,
    /// Its nodes; `version` in them means nothing.
    pub nodes: BTreeMap<NodeId, Arc<NodeState>>,
}

/// One change of one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mutation {
    /// Makes the run; refused if it is there.
    Create {
        /// How it begins.
        run: NewRun,
        /// When.
        #[serde(serialize_with = "time::serialize")]
        at: DateTime<Utc>,
    },
    /// Makes the run as it was elsewhere; refused if it is there.
    Import(Box<RunImport>),
    /// Changes the run's header.
    Update {
        /// What.
        update: RunUpdate,
        /// When.
        #[serde(serialize_with = "time::serialize")]
        at: DateTime<Utc>,
    },
    /// Deletes the run. Nothing may follow in the same entry.
    Delete {
        /// Whether its nodes' completed intervals and partitions join the coverage, and their last success stays readable.
        keep_coverage: bool,
    },
    /// Changes a node, or makes it.
    SetNode {
        /// Which.
        node: NodeId,
        /// What.
        update: Box<NodeUpdate>,
        /// When.
        #[serde(serialize_with = "time::serialize")]
        at: DateTime<Utc>,
    },
    /// Deletes a node; refused if it is not there.
    DeleteNode {
        /// Which.
        node: NodeId,
    },
    /// Marks a stretch of time as complete; a node that is not there is made, pending.
    AddInterval {
        /// For which node.
        node: NodeId,
        /// Which time.
        interval: Interval,
    },
    /// Marks a stretch of time as not complete (a restatement); a node that is not there is not made.
    RemoveInterval {
        /// For which node.
        node: NodeId,
        /// Which time.
        interval: Interval,
    },
    /// Marks a partition as complete; a node that is not there is made, pending.
    AddPartition {
        /// For which node.
        node: NodeId,
        /// Which one.
        partition: PartitionKey,
    },
    /// Marks a partition as not complete; a node that is not there is not made.
    RemovePartition {
        /// For which node.
        node: NodeId,
        /// Which one.
        partition: PartitionKey,
    },
}

impl Mutation {
    /// The node that this changes; none for the run's header or the whole run.
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::SetNode { node, .. }
            | Self::DeleteNode { node }
            | Self::AddInterval { node, .. }
            | Self::RemoveInterval { node, .. }
            | Self::AddPartition { node, .. }
            | Self::RemovePartition { node, .. } => Some(node),
            Self::Create { .. } | Self::Import(_) | Self::Update { .. } | Self::Delete { .. } => None,
        }
    }

    /// Whether this makes the run.
    pub fn creates_run(&self) -> bool {
        matches!(self, Self::Create { .. } | Self::Import(_))
    }

    /// Whether this deletes a node.
    pub(crate) fn deletes_node(&self) -> bool {
        matches!(self, Self::DeleteNode { .. })
    }

    /// Whether this only takes something out of a node: where there is none, nothing is to be done.
    pub(crate) fn only_removes(&self) -> bool {
        matches!(self, Self::RemoveInterval { .. } | Self::RemovePartition { .. })
    }

    /// Whether this changes the run's header.
    pub fn touches_header(&self) -> bool {
        self.node().is_none()
    }

    /// Whether this ends or deletes the run, and so frees its locks.
    pub fn frees_locks(&self) -> bool {
        match self {
            Self::Update { update, .. } => update.ends_run(),
            Self::Delete { .. } => true,
            _ => false,
        }
    }

    /// About how many bytes this takes in memory and on disk; admission is bounded by the sum.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 128;
        FIXED
            + self.node().map_or(0, |node| node.as_str().len())
            + match self {
                Self::SetNode { update, .. } => update.weight(),
                Self::Create { run, .. } => run.weight(),
                Self::Update { update, .. } => update.weight(),
                Self::Import(run) => {
                    let extra = |extra: &Option<RawJson>| extra.as_ref().map_or(0, |raw| raw.as_str().len());
                    extra(&run.header.extra)
                        + run.header.status.weight()
                        + run.header.metadata.weight()
                        + run
                            .nodes
                            .iter()
                            .map(|(id, node)| {
                                512 + id.as_str().len()
                                    + node.status.weight()
                                    + node.error.as_ref().map_or(0, |error| error.len())
                                    + node.worker.as_ref().map_or(0, |worker| worker.len())
                                    + node.fingerprint.as_ref().map_or(0, |print| print.as_raw().as_str().len())
                                    + node.watermarks.weight()
                                    + extra(&node.extra)
                                    + node.metadata.weight()
                                    + node.depends_on.iter().map(|needed| needed.as_str().len() + 32).sum::<usize>()
                                    + node.attempts.iter().map(Attempt::weight).sum::<usize>()
                                    + node.intervals.len() * 64
                                    + node.partitions.iter().map(|p| p.as_str().len() + 32).sum::<usize>()
                            })
                            .sum::<usize>()
                }
                Self::AddPartition { partition, .. } | Self::RemovePartition { partition, .. } => partition.as_str().len(),
                Self::Delete { .. } | Self::DeleteNode { .. } | Self::AddInterval { .. } | Self::RemoveInterval { .. } => 0,
            }
    }
}
