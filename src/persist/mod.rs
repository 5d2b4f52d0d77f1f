//! The persistence actors: they collect entries, flush whole batches, and answer every entry.
//!
//! ```text
//! run actors ──submit(entry, sink)──►┌───────┐◄──next()── whoever flushes: the backend's own writer,
//!            ──barrier(reply)───────►│ shard │──batch───►  or a task that calls commit(batch)
//!                                    └───────┘◄──answer(outcomes)──
//!            ◄──sink.settle(outcome)── persistence actor ◄──Tell──┘
//! ```
//!
//! While one batch is being flushed the line collects the next one; whoever flushes takes it the moment it is free, without a hop through the runtime.
//! No timer, no linger: a lone writer never waits for company.

mod actor;
mod driver;
mod fault;
mod handle;
mod queue;
mod shard;
#[cfg(test)]
mod shard_tests;
mod stats;

pub(crate) use handle::{Persist, Watch};
pub(crate) use queue::{Settlement, Sink, Submission};
pub use stats::Histogram;
