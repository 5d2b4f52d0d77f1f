//! A backend whose check is taken out, one half of it at a time: nothing that is asked of it is refused because somebody else has written meanwhile, or
//! because the lease is lost. The checker must object to what comes of it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use seeknal_state::model::{Batch, BatchAnswer};
use seeknal_state::store::{BoxFuture, ForeignCommits, LeaseStore, OpenProcess};
use seeknal_state::{
    LeaseRecord, OpenReport, ProcessInfo, RunId, RunPage, RunQuery, RunState, StateBackend, StoreError, Version,
};
use serde::{Deserialize, Serialize};

/// A version that no row is newer than.
const NEWEST: Version = Version(1 << 60);

/// How long what is written under a lease waits on its way to the backend: the holder looks at his lease before, so that only who is stopped behind that
/// look writes without it.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// What is not asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Without {
    /// Conditions on what is stored.
    Guards,
    /// Leases.
    Fences,
}

/// In front of a real backend.
#[derive(Debug)]
pub(crate) struct Blind {
    pub(crate) backend: Arc<dyn StateBackend>,
    pub(crate) without: Without,
}

/// The same changes, asked for as by somebody who has seen all that is stored.
fn blinded(batch: &Batch, without: Without) -> Batch {
    let mut batch = batch.clone();
    for entry in &mut batch.entries {
        if without == Without::Fences {
            entry.fences.clear();
        }
        for part in &mut entry.parts {
            if without == Without::Guards {
                part.guards.clear();
            }
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
        self.backend.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            if self.without == Without::Fences && batch.entries.iter().any(|entry| !entry.fences.is_empty()) {
                tokio::time::sleep(ON_ITS_WAY).await;
            }
            self.backend.commit(Arc::new(blinded(&batch, self.without))).await
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.backend.load_run(run)
    }

    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.backend.reload_run(have)
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        self.backend.run_versions(runs)
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        self.backend.others_committed()
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.backend.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.backend.list_leases()
    }

    fn lease_store(&self) -> LeaseStore {
        self.backend.lease_store()
    }

    fn lock_poll(&self) -> Duration {
        self.backend.lock_poll()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.backend.reserve_tokens(count)
    }

    fn flush_shards(&self) -> usize {
        self.backend.flush_shards()
    }

    fn is_shared(&self) -> bool {
        self.backend.is_shared()
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.backend.process()
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        self.backend.processes()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.backend.close()
    }
}
