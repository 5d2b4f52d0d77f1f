//! Conditions that must hold when an entry commits.

use serde::{Deserialize, Serialize};

use super::id::NodeId;
use super::run::{RunState, Version};
use super::status::{NodeStatus, RunStatus};

/// The statuses that a guard accepts.
pub type StatusSet = Vec<NodeStatus>;

/// A condition on a run that must hold when an entry commits; it is decided inside the backend's own transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Guard {
    /// The run is at exactly this version.
    RunVersion(Version),
    /// The run is in one of these statuses.
    RunStatus(Vec<RunStatus>),
    /// The node is there, in one of these statuses.
    NodeStatus {
        /// Which node.
        node: NodeId,
        /// The statuses that are accepted.
        one_of: StatusSet,
    },
    /// There is no such node.
    NodeAbsent {
        /// Which node.
        node: NodeId,
    },
    /// The node was last changed at this version of the run ([`Version::NONE`]: it is not there).
    NodeVersion {
        /// Which node.
        node: NodeId,
        /// The version that is expected.
        version: Version,
    },
    /// Nobody holds a lease on the run or one of its nodes.
    Unlocked,
}

impl Guard {
    /// The node that this looks at.
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::NodeStatus { node, .. } | Self::NodeAbsent { node } | Self::NodeVersion { node, .. } => Some(node),
            Self::RunVersion(_) | Self::RunStatus(_) | Self::Unlocked => None,
        }
    }

    /// What is there instead of what this expects; `None` if it holds. [`Guard::Unlocked`] is decided by who knows the leases.
    pub fn violation(&self, run: &RunState) -> Option<String> {
        match self {
            Self::RunVersion(version) => (run.version() != *version).then(|| format!("the run is at version {}", run.version())),
            Self::RunStatus(one_of) => {
                (!one_of.contains(&run.header().status)).then(|| format!("the run is {}", run.header().status))
            }
            Self::NodeStatus { node, one_of } => match run.node(node.as_str()) {
                None => Some(format!("node {node:?} is not there")),
                Some(state) => (!one_of.contains(&state.status)).then(|| format!("node {node:?} is {}", state.status)),
            },
            Self::NodeAbsent { node } => {
                run.node(node.as_str()).map(|state| format!("node {node:?} is there, and {}", state.status))
            }
            Self::NodeVersion { node, version } => {
                let found = run.node(node.as_str()).map_or(Version::NONE, |state| state.version);
                (found != *version).then(|| format!("node {node:?} was changed at version {found}"))
            }
            Self::Unlocked => None,
        }
    }
}

impl std::fmt::Display for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |statuses: &[String]| statuses.join(" or ");
        match self {
            Self::RunVersion(version) => write!(f, "the run at version {version}"),
            Self::RunStatus(one_of) => write!(f, "the run {}", list(&one_of.iter().map(ToString::to_string).collect::<Vec<_>>())),
            Self::NodeStatus { node, one_of } => {
                write!(f, "node {node:?} {}", list(&one_of.iter().map(ToString::to_string).collect::<Vec<_>>()))
            }
            Self::NodeAbsent { node } => write!(f, "no node {node:?}"),
            Self::NodeVersion { node, version } => write!(f, "node {node:?} as it was at version {version}"),
            Self::Unlocked => f.write_str("no lease on the run or its nodes"),
        }
    }
}

/// The first guard that does not hold, and what is there instead.
pub fn check_guards<'g>(run: &RunState, guards: &'g [Guard]) -> Option<(&'g Guard, String)> {
    guards.iter().find_map(|guard| guard.violation(run).map(|found| (guard, found)))
}
