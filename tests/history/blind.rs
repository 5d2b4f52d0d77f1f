//! A backend whose check is taken out: nothing that is asked of it is refused because somebody else was there. The checker must object to what comes of it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use seeknal_state::model::{Batch, BatchAnswer};
use seeknal_state::store::{BoxFuture, ForeignCommits, LeaseStore, OpenProcess};
use seeknal_state::{
    LeaseRecord, OpenReport, ProcessInfo, RunId, RunPage, RunQuery, RunState, StateBackend, StoreError, Version,
};

/// A version that no row is newer than.
const NEWEST: Version = Version(1 << 60);

/// In front of a real backend.
#[derive(Debug)]
pub(crate) struct Blind(pub(crate) Arc<dyn StateBackend>);

/// The same changes, asked for as by somebody who has seen everything and to whom nothing matters.
fn blinded(batch: &Batch) -> Batch {
    let mut batch = batch.clone();
    for entry in &mut batch.entries {
        entry.fences.clear();
        for part in &mut entry.parts {
            part.guards.clear();
            if part.base != Version::NONE {
                (part.base, part.expect, part.after) = (NEWEST, NEWEST, None);
            }
        }
    }
    batch
}

impl StateBackend for Blind {
    fn name(&self) -> &'static str {
        "blind"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.0.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.0.commit(Arc::new(blinded(&batch)))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.0.load_run(run)
    }

    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.0.reload_run(have)
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        self.0.run_versions(runs)
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        self.0.others_committed()
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.0.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.0.list_leases()
    }

    fn lease_store(&self) -> LeaseStore {
        self.0.lease_store()
    }

    fn lock_poll(&self) -> Duration {
        self.0.lock_poll()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.0.reserve_tokens(count)
    }

    fn flush_shards(&self) -> usize {
        self.0.flush_shards()
    }

    fn is_shared(&self) -> bool {
        self.0.is_shared()
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.0.process()
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        self.0.processes()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.0.close()
    }
}
