//! Conditions that must hold when an entry commits.

use serde::{Deserialize, Serialize};

use super::id::NodeId;
use super::run::{RunState, Version};
use super::status::{NodeStatus, RunStatus};

/// The statuses that a guard accepts.
pub type StatusSet = Vec<NodeStatus>;

/// A condition on a run that must hold when an entry commits; it is decided inside the backend's own transaction.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

/// As much of a run as guards look at.
pub(crate) trait GuardedRun {
    fn version(&self) -> Version;
    /// `None`: the run is not there.
    fn status(&self) -> Option<&RunStatus>;
    /// Status and version of a node.
    fn node(&self, node: &NodeId) -> Option<(&NodeStatus, Version)>;
}

impl GuardedRun for RunState {
    fn version(&self) -> Version {
        self.version()
    }

    fn status(&self) -> Option<&RunStatus> {
        Some(&self.header().status)
    }

    fn node(&self, node: &NodeId) -> Option<(&NodeStatus, Version)> {
        self.node(node.as_str()).map(|state| (&state.status, state.version))
    }
}

/// What guards find where there is no run.
pub(crate) struct NoRun;

impl GuardedRun for NoRun {
    fn version(&self) -> Version {
        Version::NONE
    }

    fn status(&self) -> Option<&RunStatus> {
        None
    }

    fn node(&self, _: &NodeId) -> Option<(&NodeStatus, Version)> {
        None
    }
}

impl Guard {
    /// The node that this looks at.
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::NodeStatus { node, .. } | Self::NodeAbsent { node } | Self::NodeVersion { node, .. } => Some(node),
            Self::RunVersion(_) | Self::RunStatus(_) | Self::Unlocked => None,
        }
    }

    /// About how many bytes this takes.
    pub(crate) fn weight(&self) -> usize {
        const FIXED: usize = 64;
        let statuses = match self {
            Self::RunStatus(one_of) => one_of.iter().map(|status| 24 + status.weight()).sum(),
            Self::NodeStatus { one_of, .. } => one_of.iter().map(|status| 24 + status.weight()).sum(),
            _ => 0,
        };
        FIXED + self.node().map_or(0, |node| node.as_str().len()) + statuses
    }

    /// What is there instead of what this expects; `None` if it holds. [`Guard::Unlocked`] is decided by who knows the leases.
    pub fn violation(&self, run: &RunState) -> Option<String> {
        self.violated(run)
    }

    fn violated(&self, run: &impl GuardedRun) -> Option<String> {
        match self {
            Self::RunVersion(version) => (run.version() != *version).then(|| format!("the run is at version {}", run.version())),
            Self::RunStatus(one_of) => match run.status() {
                None => Some("the run is not there".to_owned()),
                Some(status) => (!one_of.contains(status)).then(|| format!("the run is {status}")),
            },
            Self::NodeStatus { node, one_of } => match run.node(node) {
                None => Some(format!("node {node:?} is not there")),
                Some((status, _)) => (!one_of.contains(status)).then(|| format!("node {node:?} is {status}")),
            },
            Self::NodeAbsent { node } => run.node(node).map(|(status, _)| format!("node {node:?} is there, and {status}")),
            Self::NodeVersion { node, version } => {
                let found = run.node(node).map_or(Version::NONE, |(_, version)| version);
                (found != *version).then(|| format!("node {node:?} was changed at version {found}"))
            }
            Self::Unlocked => None,
        }
    }
}

impl std::fmt::Display for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list =
            |statuses: &[String]| if statuses.is_empty() { "in no status at all".to_owned() } else { statuses.join(" or ") };
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
    first_violated(run, guards)
}

/// The same, of whatever knows enough of a run.
pub(crate) fn first_violated<'g>(run: &impl GuardedRun, guards: &'g [Guard]) -> Option<(&'g Guard, String)> {
    guards.iter().find_map(|guard| guard.violated(run).map(|found| (guard, found)))
}
