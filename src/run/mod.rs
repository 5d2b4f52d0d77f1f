//! The run actor: the only writer of one run in this process.
//!
//! ```text
//! clients ──Commit(envelope)──► ┌───────────┐ ──Submit(entry)──► persistence actor
//!         ─Hold / Read / Flush► │ run actor │ ◄──Settled(outcomes)──
//!         ◄──ack── publish ◄─── └───────────┘
//! ```
//!
//! It checks guards against `tip` (what is committed and on its way), applies, sends the entry down and goes on with the next message. When an
//! entry is settled, `committed` moves, a snapshot is published, then the caller is answered. It never awaits storage.

mod actor;
mod admission;
mod chain;
mod handle;
mod jitter;
mod losses;
mod op;
mod sink;

pub(crate) use actor::{Found, RunContext, Surroundings};
pub(crate) use admission::{Admission, Overloaded, Permit};
pub(crate) use chain::{Planned, add_gone, born, is_another, newer, plan, touched};
pub(crate) use handle::{HoldGrant, Release, RunHandle, Sending, Sent};
pub(crate) use jitter::jitter;
pub use op::DeferredLoss;
pub(crate) use op::{ChangeSeed, CommitError, Committed, Op, weight_of_leases};
pub(crate) use sink::{FlushSink, NotCommitted, OneSink};
