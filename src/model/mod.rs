//! Plain data and pure logic: what a run is, what may change it, and the one function that changes it.
//!
//! No I/O, no clock reading (but the [`Clock`] that callers bring), no tokio. Everything here can be tested exhaustively.

mod apply;
mod attempt;
mod batch;
mod blocked;
mod change;
mod clock;
mod coverage;
#[cfg(feature = "sqlite")]
mod fallen;
mod fences;
mod guard;
mod id;
mod ids;
mod interval;
mod json;
mod lease;
mod ledger;
mod list;
mod metadata;
mod mutation;
mod node;
mod node_update;
mod nodes;
mod process;
mod query;
mod ready;
mod run;
mod run_update;
mod select;
mod snapshot;
mod status;
pub mod time;
mod written;

pub(crate) use apply::updated;
pub use apply::{apply, apply_all};
pub use attempt::{Attempt, MAX_ATTEMPT_ERROR_BYTES, MAX_ATTEMPTS_KEPT};
pub use batch::{Batch, BatchAnswer, BatchId, Entry, Fence, LeaseGrant, Outcome, Receipt, Refusal, RunPart, RunReceipt};
pub use blocked::{Blocked, BlockedReason};
pub use change::Change;
pub use clock::{Clock, SystemClock};
#[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
pub(crate) use coverage::outliving;
pub use coverage::{LastSuccess, NodeCoverage, Retained};
#[cfg(feature = "sqlite")]
pub(crate) use fallen::Fallen;
pub use fences::{FenceCheck, Freed, NoFences};
#[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
pub(crate) use guard::GuardedRun;
pub use guard::{Guard, StatusSet, check_guards};
pub(crate) use guard::{NoRun, first_violated};
pub use id::{InputError, IntoNodeId, IntoRunId, MAX_ID_BYTES, NodeId, PartitionKey, RunId};
pub use interval::{Interval, IntervalSet, IntoInterval};
pub use json::RawJson;
pub use lease::{FencingToken, LeaseKey, LeaseMutation, LeaseOwner, LeaseRecord};
pub use ledger::{Ledger, LoggedPart};
pub use list::List;
pub use metadata::Metadata;
pub use mutation::{Mutation, RunImport};
pub use node::{Fingerprint, NodeState};
pub use node_update::{MAX_DEPENDENCIES, NodeUpdate};
pub use process::ProcessInfo;
pub use query::{RunCursor, RunFilter, RunPage, RunQuery, RunSummary, UnreadableRun};
pub(crate) use ready::{Pick, ReadyBoard, Taking, Wish};
pub use run::{CommitSeq, RunHeader, RunState, Version};
pub use run_update::{NewRun, RunUpdate};
pub(crate) use select::Selection;
pub use snapshot::Snapshot;
pub use status::{NodeStatus, RunStatus};
