//! Whether the process that works on a run is gone.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{KnownOpenings, LeaseStore, OpenProcess, StateBackend, StoreError};
use crate::model::{LeaseRecord, ProcessInfo, RunId};

/// Who has the storage open, for who goes on where one of them is gone: where that is not known of one that `matters`, it is found out if time tells.
pub(crate) async fn processes(
    backend: &dyn StateBackend,
    matters: impl Fn(&ProcessInfo) -> bool,
) -> Result<Vec<OpenProcess>, StoreError> {
    let found = backend.processes().await?;
    let doubted: BTreeSet<String> = found
        .iter()
        .filter(|open| open.alive.is_none() && matters(&open.process))
        .map(|open| open.process.id.to_string())
        .collect();
    if doubted.is_empty() { Ok(found) } else { backend.watch_processes(doubted).await }
}

/// Those of `leases` that are on a run: who holds one works on the run, whoever its worker is.
pub(crate) fn holders<'a>(leases: &'a [LeaseRecord], run: &'a RunId) -> impl Iterator<Item = &'a ProcessInfo> {
    leases.iter().filter(move |lease| lease.key.run == *run).map(|lease| &lease.owner.process)
}

/// Whether the storage says that nobody works on a run any more: its worker is gone, and so is whoever holds a lease on it. `leases` must have been asked for
/// before `processes` were.
pub(crate) fn is_left(
    backend: &dyn StateBackend,
    me: &ProcessInfo,
    run: &RunId,
    worker: Option<&ProcessInfo>,
    leases: &[LeaseRecord],
    processes: &[OpenProcess],
) -> bool {
    is_gone(backend, me, worker, processes) && holders(leases, run).all(|holder| is_gone(backend, me, Some(holder), processes))
}

/// So long a run is watched that nobody seems to work on, where somebody might: who works by claims writes to it, or holds one of its nodes, more often.
pub(crate) const WATCHED: Duration = Duration::from_secs(1);

/// Whether anybody has the storage open who may work on a run by claims although its worker is gone: not `me`, and not who is gone.
pub(crate) fn others_live(me: &ProcessInfo, processes: &[OpenProcess]) -> bool {
    processes.iter().any(|open| open.process.id != me.id && open.alive != Some(false))
}

/// Whether the storage says that a run's worker is gone. `me` is this process; `processes` must have been asked for after the run was read: who works
/// on one has the storage open before.
pub(crate) fn is_gone(
    backend: &dyn StateBackend,
    me: &ProcessInfo,
    worker: Option<&ProcessInfo>,
    processes: &[OpenProcess],
) -> bool {
    // Also where the backend knows of nobody.
    if worker.is_some_and(|worker| worker.id == me.id) {
        return false;
    }
    if matches!(backend.lease_store(), LeaseStore::Book(_)) {
        // One process writes at a time: whoever is not that one is gone. Also seen so by those who only read beside it.
        let is_open =
            |worker: &ProcessInfo| processes.iter().any(|open| open.process.id == worker.id && open.alive != Some(false));
        return !worker.is_some_and(is_open);
    }
    let Some(worker) = worker.filter(|_| backend.is_shared()) else { return !backend.is_shared() };
    match processes.iter().find(|open| open.process.id == worker.id) {
        Some(open) => open.alive == Some(false),
        // Who is not listed is gone only where everybody is.
        None => match backend.known_openings() {
            KnownOpenings::All => true,
            KnownOpenings::OfThisHost => worker.host == me.host,
            KnownOpenings::Some => false,
        },
    }
}
