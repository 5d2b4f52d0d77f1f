//! Timed locks with fencing tokens: a pure table of who holds and who waits, the actor around it, and the guard that users hold.
//!
//! ```text
//! LeaseHandle ── Acquire, Release, Renew, Force, FreeRun, Close ──► lock manager (table) ──► LeaseBook      one writing process
//!      ▲                                                              │   ▲      └────────► door ► storage  leases as rows
//!      └── the guard, inside the reply ───────────────────────────────┘   └── Lost ── keeper thread ► storage
//! ```
//!
//! The manager decides in memory and never awaits storage: what it wants from there is asked by tasks that answer by message. Two ways to
//! keep leases, as the backend says: in a book in this process, with tokens from blocks reserved ahead; or as rows that many processes
//! share, where the local queue decides who of this process asks next, and the storage decides between processes. There a waiter behind
//! another process looks again when others committed, or after the backend's `lock_poll`, and asks when its place is free (`manager/waits`); cycles over
//! several processes end by the wait's timeout.

mod actor;
mod cycle;
mod error;
mod guard;
mod handle;
mod keeper;
mod locks;
mod manager;
mod options;
mod pause;
mod place;
mod rows;
mod table;
mod tokens;
mod trust;

#[cfg(test)]
mod tests;

use crate::model::{Entry, LeaseKey, Receipt, Refusal, RunId};
use crate::store::{BoxFuture, StoreError};

pub use error::{LeaseError, LostReason};
pub use guard::Lease;
pub(crate) use handle::LeaseHandle;
pub use options::LockOptions;
pub(crate) use pause::pause_on;
pub(crate) use place::Place;

/// What the lock manager needs of those who write: the way of entries to the storage, and the flush of a run before its lock goes on.
pub(crate) trait LeaseStoreDoor: Send + Sync + 'static {
    /// Sends an entry on the way that all entries go, and answers when it is decided.
    fn commit(&self, entry: Entry) -> BoxFuture<'_, Result<Receipt, DoorError>>;

    /// Whether writes of this run were accepted that are not settled yet.
    fn has_unsettled(&self, run: &RunId) -> bool;

    /// Whether the run is known to be there.
    fn is_there(&self, run: &RunId) -> bool;

    /// Waits until everything that was accepted for the run so far is settled.
    fn flush_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<(), StoreError>>;

    /// The place of a lease is free: who was kept out by it, and does not wait in the queue for locks, may try again.
    fn vacated(&self, key: &LeaseKey);
}

/// Why an entry was not applied.
#[derive(Debug, Clone)]
pub(crate) enum DoorError {
    /// It was refused; nothing of it was applied.
    Refused(Refusal),
    /// The storage failed.
    Store(StoreError),
}

impl From<DoorError> for LeaseError {
    fn from(error: DoorError) -> Self {
        match error {
            DoorError::Refused(refusal) => Self::Refused(refusal),
            DoorError::Store(error) => Self::Store(error),
        }
    }
}
