//! Keeping others out of a shared store while its state is moved: the lock that says so, and how they are told.

use super::{StateBackend, StoreError, StoreErrorKind};
use crate::model::LeaseRecord;
#[cfg(any(feature = "postgres", feature = "libsql"))]
use crate::model::{Entry, LeaseMutation};

/// The key (a run's id) of the lock that keeps others out of a shared store while its state is moved: who finds it held does not open the store, and the
/// servers take no commits but those of its holder.
pub const MIGRATION: &str = "seeknal:migration";

/// Refuses a store whose state is being moved away. It must be open already, so that whoever moves it sees this process.
pub(crate) async fn refuse_moving(backend: &dyn StateBackend) -> Result<(), StoreError> {
    if !backend.is_shared() || backend.is_read_only() {
        return Ok(());
    }
    let leases = backend.list_leases().await?;
    leases
        .iter()
        .find(|lease| lease.key.run.as_str() == MIGRATION)
        .map_or(Ok(()), |lease| Err(moved_by(&backend.location(), lease)))
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
