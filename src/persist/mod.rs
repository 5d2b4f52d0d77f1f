//! The persistence actors: they collect entries, flush whole batches, and answer every entry.
//!
//! ```text
//! run actors ──Submit(entry, sink)──►┌───────────────────┐──commit(batch)──► backend
//!            ──Barrier(reply)───────►│ persistence actor │
//!            ◄──sink.settle(outcome)─└───────────────────┘◄──Done(answer)── (flush task)
//! ```
//!
//! The actor never awaits a flush: while one is under way it collects, and when it is done it sends all that it collected. No timer, no
//! linger: a lone writer never waits for company.

mod actor;
mod handle;
mod queue;
mod stats;

pub(crate) use handle::Persist;
pub(crate) use queue::{Settlement, Sink, Submission};
pub use stats::Histogram;
