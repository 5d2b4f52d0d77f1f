//! The null sink: a backend that answers at once and keeps nothing, so that what is measured is everything above it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chrono::{DateTime, Utc};
use seeknal_state::model::{Batch, BatchAnswer, CommitSeq, Outcome, Receipt, RunReceipt, Version};
use seeknal_state::store::{BoxFuture, LeaseBook, LeaseStore};
use seeknal_state::{
    LeaseRecord, NodeId, NodeState, NodeStatus, OpenReport, RunHeader, RunId, RunPage, RunQuery, RunState, RunStatus,
    StateBackend, StoreError,
};

/// Says "applied" to everything. A run stays only in its actor: nothing may go to sleep that is needed later.
#[derive(Debug, Default)]
pub(crate) struct NullSink {
    seq: AtomicU64,
    leases: Arc<LeaseBook>,
    /// If set, every run is there, with these nodes.
    known: Option<Vec<NodeId>>,
}

impl NullSink {
    /// No run is there until it is created.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Every run that is asked for is there, with these nodes.
    pub(crate) fn with_known_runs(nodes: Vec<NodeId>) -> Self {
        Self { known: Some(nodes), ..Self::default() }
    }
}

impl StateBackend for NullSink {
    fn name(&self) -> &'static str {
        "null"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async { Ok(OpenReport::new()) })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            let mut outcomes = Vec::with_capacity(batch.entries.len());
            for entry in &batch.entries {
                let seq = CommitSeq(self.seq.fetch_add(1, Ordering::Relaxed) + 1);
                // One process writes, so that the version before is the one that the entry expects.
                let runs = entry.parts.iter().map(|part| RunReceipt {
                    run: part.run.clone(),
                    before: part.expect,
                    after: part.expect.next(),
                });
                outcomes.push(Outcome::Applied(Receipt { seq, runs: runs.collect(), grants: Vec::new() }));
            }
            Ok(BatchAnswer { outcomes })
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async move {
            Ok(self.known.as_ref().map(|nodes| {
                let header = RunHeader::new(RunStatus::Running, DateTime::<Utc>::UNIX_EPOCH);
                let nodes = nodes.iter().map(|node| (node.clone(), NodeState::new(NodeStatus::Pending)));
                RunState::from_parts(run.clone(), header, Version(1), Version(1), nodes)
            }))
        })
    }

    fn list_runs<'a>(&'a self, _: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async { Ok(RunPage::default()) })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async { Ok(self.leases.list()) })
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Book(Arc::clone(&self.leases))
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<std::ops::Range<u64>, StoreError>> {
        let start = self.seq.fetch_add(count, Ordering::Relaxed) + 1;
        Box::pin(async move { Ok(start..start + count) })
    }
}
