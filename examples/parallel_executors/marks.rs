//! What the example writes beside its results, so that the stored state can be checked by itself: a number for every write of a node, the
//! transaction it was in, and the rows that were in it together.

use serde::{Deserialize, Serialize};

use seeknal_state::{InputError, Metadata, NodeId, NodeState, NodeUpdate, RunHeader, RunId};

/// The note on a run that says that this example made it.
pub(crate) const MADE_BY: &str = "parallel_executors";

const WRITE: &str = "write";
const PLAN: &str = "plan";

/// The note on a node: its last write.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// Grows with every write of the node.
    pub(crate) step: u64,
    /// The transaction.
    pub(crate) tx: String,
    /// The other rows of the transaction and the numbers of their writes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) with: Vec<(RunId, NodeId, u64)>,
}

impl Mark {
    /// The note of a node, if it has one.
    pub(crate) fn of(node: &NodeState) -> Option<Self> {
        node.metadata.get(WRITE)?.read().ok()
    }

    /// Puts it on a write.
    pub(crate) fn put_on(&self, update: NodeUpdate) -> Result<NodeUpdate, serde_json::Error> {
        Ok(update.metadata(WRITE, serde_json::to_value(self)?))
    }
}

/// The note on a run: how its pipeline is made again, and what its nodes complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) made_by: String,
    pub(crate) seed: u64,
    pub(crate) nodes: usize,
    /// The day that the run works on: every node completes it.
    pub(crate) interval: (String, String),
    pub(crate) partition: String,
}

impl Plan {
    /// The name of the note.
    pub(crate) const KEY: &str = PLAN;

    /// The plan of a run that this example made.
    pub(crate) fn of(header: &RunHeader) -> Option<Self> {
        Self::read(&header.metadata)
    }

    fn read(notes: &Metadata) -> Option<Self> {
        notes.get(PLAN)?.read::<Self>().ok().filter(|plan| plan.made_by == MADE_BY)
    }

    /// The interval that a success completes.
    pub(crate) fn interval(&self) -> Result<seeknal_state::Interval, InputError> {
        seeknal_state::Interval::parse(&self.interval.0, &self.interval.1)
    }
}
