//! State that lives as long as its process: for tests, and for pipelines that need no history.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{AnswerLog, BoxFuture, LeaseBook, LeaseStore, OpenReport, StateBackend, StoreError, StoreErrorKind};
use crate::model::{
    Batch, BatchAnswer, Clock, Freed, LastSuccess, LeaseRecord, Ledger, NodeCoverage, NodeId, NodeState, ProcessInfo, Retained,
    RunId, RunPage, RunQuery, RunState, SystemClock,
};

/// A backend in memory. Nothing is durable; every other contract holds. A clone is another opening of the same store, so that a store can
/// be opened again after a coordinator was closed. One of them is open at a time, as with the file backend: a second coordinator, which would grant the same
/// locks once more, is refused as busy until the first is closed. One that is dropped closes in the background: the next one may be
/// refused for a moment, so await [`close`](crate::Coordinator::close).
#[derive(Debug, Default)]
pub struct MemoryBackend {
    shared: Arc<Shared>,
    opening: Mutex<Opening>,
}

/// How far this opening is. One that was never initialised may be used all the same: there is nothing to recover.
#[derive(Debug, Clone, Default)]
enum Opening {
    #[default]
    New,
    Open(ProcessInfo),
    Closed,
}

impl Clone for MemoryBackend {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), opening: Mutex::default() }
    }
}

#[derive(Debug, Default)]
struct Shared {
    store: Mutex<Store>,
    tokens: AtomicU64,
    leases: Arc<LeaseBook>,
    /// Whether some opening is open.
    is_open: AtomicBool,
}

#[derive(Debug, Default)]
struct Store {
    ledger: Ledger,
    answers: AnswerLog,
}

impl MemoryBackend {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for another opening.
    fn end(&self) {
        if let Opening::Open(_) = std::mem::replace(&mut *self.opening(), Opening::Closed) {
            self.shared.is_open.store(false, Ordering::Release);
        }
    }

    fn opening(&self) -> MutexGuard<'_, Opening> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> Result<MutexGuard<'_, Store>, StoreError> {
        let poisoned = |_: PoisonError<_>| {
            StoreError::not_applied(
                StoreErrorKind::Poisoned,
                "the state in memory was left by a panic in mid-change; open it anew",
            )
        };
        self.shared.store.lock().map_err(poisoned)
    }

    fn read<T>(&self, read: impl FnOnce(&Ledger) -> T) -> BoxFuture<'_, Result<T, StoreError>>
    where
        T: Send + 'static,
    {
        let found = self.store().map(|store| read(&store.ledger));
        Box::pin(async move { found })
    }
}

impl StateBackend for MemoryBackend {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async {
            let mut opening = self.opening();
            if !matches!(*opening, Opening::Open(_)) {
                if self.shared.is_open.swap(true, Ordering::AcqRel) {
                    return Err(StoreError::not_applied(
                        StoreErrorKind::Busy,
                        "this state in memory is open in another coordinator: clone that one, or close it first",
                    ));
                }
                *opening = Opening::Open(ProcessInfo::current(SystemClock.now()));
            }
            Ok(OpenReport::new())
        })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            if matches!(*self.opening(), Opening::Closed) {
                return Err(StoreError::closed());
            }
            let mut store = self.store()?;
            if let Some(answer) = store.answers.get(batch.id) {
                return Ok(answer.clone());
            }
            let mut freed = Freed::default();
            let answer = store.ledger.commit_freeing(&batch.entries, &*self.shared.leases, &mut freed);
            self.shared.leases.free(&freed);
            store.answers.put(batch.id, answer.clone());
            Ok(answer)
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.read(|ledger| ledger.run(run.as_str()).cloned())
    }

    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        self.read(|ledger| runs.iter().map(|(run, _)| ledger.run(run.as_str()).cloned()).collect())
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.read(|ledger| ledger.list(query))
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async { Ok(self.shared.leases.list()) })
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Book(Arc::clone(&self.shared.leases))
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        let start = self.shared.tokens.fetch_add(count, Ordering::Relaxed).saturating_add(1);
        Box::pin(async move { Ok(start..start.saturating_add(count)) })
    }

    fn process(&self) -> Option<ProcessInfo> {
        match &*self.opening() {
            Opening::Open(process) => Some(process.clone()),
            Opening::New | Opening::Closed => None,
        }
    }

    fn latest_node<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<(RunId, NodeState)>, StoreError>> {
        self.read(|ledger| {
            let run = ledger.runs_of_node(node.as_str()).next()?;
            Some((run.id().clone(), run.node(node.as_str())?.clone()))
        })
    }

    fn last_success<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<LastSuccess>, StoreError>> {
        self.read(|ledger| ledger.last_success(node.as_str()))
    }

    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        self.read(|ledger| ledger.coverage(node.as_str()))
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        self.read(|ledger| ledger.retained().into_iter().collect())
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async {
            self.end();
            Ok(())
        })
    }
}

impl Drop for MemoryBackend {
    fn drop(&mut self) {
        self.end();
    }
}
