//! Keeping others out of a shared store while its state is moved: the lock that says so, and how they are told. And out of one into which a move was cut off:
//! a second lock, which outlasts the mover, says that a part may be missing there.

use super::{StateBackend, StoreError, StoreErrorKind};
use crate::model::LeaseRecord;
#[cfg(any(feature = "postgres", feature = "libsql"))]
use crate::model::{Entry, LeaseMutation};

/// The key (a run's id) of the lock that keeps others out of a shared store while its state is moved: who finds it held does not open the store, and the
/// servers take no commits but those of its holder.
pub const MIGRATION: &str = "seeknal:migration";

/// The key (a run's id) of the lock that stands in a store from before the first batch of a move into it until all of it was compared: who finds it held opens
/// the store for reading only. Its owner's name is the command that goes on with the move, its purpose says from where. Nobody's process holds it, and it lasts for
/// longer than anybody waits: on SQLite over starts of the machine, too.
pub(crate) const UNFINISHED: &str = "seeknal:unfinished-move";

/// Whether a lock is the one of a move that has not ended.
pub(crate) fn is_unfinished(lease: &LeaseRecord) -> bool {
    lease.key.run.as_str() == UNFINISHED
}

/// Refuses a store whose state is being moved, or into which a move was cut off. It must be open already, so that whoever moves it sees this process.
pub(crate) async fn refuse_moving(backend: &dyn StateBackend) -> Result<(), StoreError> {
    refuse(backend, is_unfinished).await
}

/// The same, but for what was cut off.
#[cfg(feature = "cli")]
pub(crate) async fn refuse_mover(backend: &dyn StateBackend) -> Result<(), StoreError> {
    refuse(backend, |_| false).await
}

async fn refuse(backend: &dyn StateBackend, or: impl Fn(&LeaseRecord) -> bool) -> Result<(), StoreError> {
    if !backend.is_shared() || backend.is_read_only() {
        return Ok(());
    }
    let (leases, place) = (backend.list_leases().await?, backend.location());
    if let Some(mover) = leases.iter().find(|lease| lease.key.run.as_str() == MIGRATION) {
        return Err(moved_by(&place, mover));
    }
    match leases.iter().find(|lease| or(lease)) {
        Some(mark) => Err(StoreError::not_applied(StoreErrorKind::Unfinished, cut_off(&place, mark))),
        None => Ok(()),
    }
}

/// What is to be known of a store into which a move was cut off.
pub(crate) fn cut_off(place: &str, mark: &LeaseRecord) -> String {
    format!(
        "{place}: {} since {}, and has not ended: a part may be missing here. `{}` goes on with it, and until then this place is only read; if what it comes from is \
         gone for good, `seeknal state unlock {}` leaves it at what is here",
        mark.purpose.as_deref().unwrap_or("its state is being moved here"),
        mark.since.format("%Y-%m-%d %H:%M:%S UTC"),
        mark.owner.name,
        mark.token
    )
}

fn moved_by(place: &str, lease: &LeaseRecord) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Busy,
        format!(
            "{place}: its state is being moved by {} since {}; wait for the end and look where it is then (if the mover died, until {}). See `seeknal state locks`",
            lease.owner,
            lease.since.format("%H:%M:%S UTC"),
            lease.until.format("%H:%M:%S UTC")
        ),
    )
}

/// Whether a commit of somebody else may not be made while the state is moved. What only gives leases back may: they are not moved.
#[cfg(any(feature = "postgres", feature = "libsql"))]
pub(crate) fn is_kept_out(entry: &Entry) -> bool {
    let gives_back = entry.leases.iter().all(|lease| matches!(lease, LeaseMutation::Release { .. }));
    !gives_back || !entry.parts.is_empty() || !entry.retained.is_empty()
}
