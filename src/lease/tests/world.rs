//! What the tests stand on: a door straight to a backend, a storage that keeps leases as rows, and waiting without hoping.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::lease::{DoorError, Lease, LeaseHandle, LeaseStoreDoor, LostReason};
use crate::model::*;
use crate::store::*;

pub(super) fn run(name: &str) -> RunId {
    RunId::new(name).unwrap()
}

pub(super) fn whole(name: &str) -> LeaseKey {
    LeaseKey::run(run(name))
}

pub(super) fn node(name: &str, node: &str) -> LeaseKey {
    LeaseKey::node(run(name), NodeId::new(node).unwrap())
}

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Waits until something is so; the limit is for a broken build only.
pub(super) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        tokio::time::sleep(ms(2)).await;
    }
}

/// Why a lease was lost; the limit is for a broken build only.
pub(super) async fn lost(lease: &Lease) -> LostReason {
    tokio::time::timeout(Duration::from_secs(20), lease.lost()).await.expect("it is never lost")
}

/// A door that commits straight to the backend, with a flush that can be held up.
pub(super) struct Door {
    backend: Arc<dyn StateBackend>,
    pub(super) deferred: AtomicBool,
    pub(super) flushes: AtomicUsize,
    pub(super) flush_gate: watch::Sender<bool>,
}

impl Door {
    pub(super) fn new(backend: Arc<dyn StateBackend>) -> Arc<Self> {
        let (flush_gate, _) = watch::channel(true);
        Arc::new(Self { backend, deferred: AtomicBool::new(false), flushes: AtomicUsize::new(0), flush_gate })
    }
}

pub(super) async fn open(gate: &watch::Sender<bool>) {
    gate.subscribe().wait_for(|open| *open).await.unwrap();
}

impl LeaseStoreDoor for Door {
    fn commit(&self, entry: Entry) -> BoxFuture<'_, Result<Receipt, DoorError>> {
        Box::pin(async move {
            let answer = self.backend.commit(Arc::new(Batch::new(vec![entry]))).await.map_err(DoorError::Store)?;
            match answer.outcomes.into_iter().next().unwrap() {
                Outcome::Applied(receipt) => Ok(receipt),
                Outcome::Refused(refusal) => Err(DoorError::Refused(refusal)),
            }
        })
    }

    fn vacated(&self, _: &LeaseKey) {}

    fn has_unsettled(&self, _: &RunId) -> bool {
        self.deferred.load(Ordering::SeqCst)
    }

    fn is_there(&self, _: &RunId) -> bool {
        false
    }

    fn flush_run<'a>(&'a self, _: &'a RunId) -> BoxFuture<'a, Result<(), StoreError>> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            open(&self.flush_gate).await;
            self.deferred.store(false, Ordering::SeqCst);
            Ok(())
        })
    }
}

pub(super) async fn start(backend: Arc<dyn StateBackend>) -> (LeaseHandle, Arc<Door>) {
    backend.initialize().await.unwrap();
    let door = Door::new(Arc::clone(&backend));
    let process = backend.process().unwrap_or_else(|| ProcessInfo::current(SystemClock.now()));
    let handle = LeaseHandle::start(backend, process, Arc::<Door>::clone(&door), Arc::new(SystemClock)).await.unwrap();
    (handle, door)
}

/// A storage that many processes share and that keeps leases as rows; every clone made by [`Rows::another`] is another process.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    pub(super) shared: Arc<Shared>,
    process: ProcessInfo,
}

#[derive(Debug)]
pub(super) struct Shared {
    store: Mutex<Table>,
    /// Closed: a renewal is applied, and its answer is held back.
    pub(super) renewals: watch::Sender<bool>,
    /// Closed: grants do not get through.
    pub(super) grants: watch::Sender<bool>,
    pub(super) grants_asked: AtomicUsize,
    pub(super) renewals_asked: AtomicUsize,
    /// The next grant is applied, and its answer is lost.
    pub(super) lose_answer: AtomicBool,
    /// Renewals fail.
    pub(super) renewals_fail: AtomicBool,
    pub(super) renewals_failed: AtomicUsize,
    /// How many of the next listings panic.
    pub(super) listings_panic: AtomicUsize,
    pub(super) listings_asked: AtomicUsize,
}

#[derive(Debug, Default)]
struct Table {
    rows: HashMap<LeaseKey, (LeaseRecord, Instant)>,
    last_token: u64,
}

impl Rows {
    pub(super) fn new() -> Self {
        let shared = Shared {
            store: Mutex::default(),
            renewals: watch::channel(true).0,
            grants: watch::channel(true).0,
            grants_asked: AtomicUsize::new(0),
            renewals_asked: AtomicUsize::new(0),
            lose_answer: AtomicBool::new(false),
            renewals_fail: AtomicBool::new(false),
            renewals_failed: AtomicUsize::new(0),
            listings_panic: AtomicUsize::new(0),
            listings_asked: AtomicUsize::new(0),
        };
        Self { shared: Arc::new(shared), process: ProcessInfo::current(SystemClock.now()) }
    }

    pub(super) fn another(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), process: ProcessInfo::current(SystemClock.now()) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.store.lock().unwrap()
    }

    pub(super) fn held(&self) -> Vec<LeaseRecord> {
        let now = Instant::now();
        self.table().rows.values().filter(|(_, expires)| now < *expires).map(|(record, _)| record.clone()).collect()
    }

    fn decide(&self, lease: &LeaseMutation, grants: &mut Vec<LeaseGrant>) -> Result<(), Refusal> {
        let (mut table, now) = (self.table(), Instant::now());
        match lease {
            LeaseMutation::Grant { key, owner, purpose, at, ttl_ms } => {
                table.rows.retain(|_, (_, expires)| now < *expires);
                if let Some((holder, _)) = table.rows.values().find(|(held, _)| held.key.excludes(key)) {
                    return Err(Refusal::LeaseHeld { holder: Box::new(holder.clone()) });
                }
                table.last_token += 1;
                let token = FencingToken(table.last_token);
                let record = LeaseRecord::new(key.clone(), token, owner.clone(), purpose.clone(), *at, *ttl_ms);
                table.rows.insert(key.clone(), (record, now + ms(*ttl_ms)));
                grants.push(LeaseGrant { key: key.clone(), token });
            }
            LeaseMutation::Renew { key, token, ttl_ms, .. } => match table.rows.get_mut(key) {
                Some((held, expires)) if held.token == *token && now < *expires => *expires = now + ms(*ttl_ms),
                _ => return Err(Refusal::LeaseGone { key: key.clone(), token: *token }),
            },
            LeaseMutation::Release { key, token } => table.rows.retain(|held, (row, _)| held != key || row.token != *token),
            LeaseMutation::Force { token } => {
                let key = table.rows.values().find(|(held, _)| held.token == *token).map(|(held, _)| held.key.clone());
                let gone = Refusal::LeaseGone { key: whole("unknown"), token: *token };
                table.rows.remove(&key.ok_or(gone)?);
            }
        }
        Ok(())
    }
}

impl StateBackend for Rows {
    fn name(&self) -> &'static str {
        "rows"
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Rows
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async { Ok(OpenReport::new()) })
    }

    fn process(&self) -> Option<ProcessInfo> {
        Some(self.process.clone())
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            let all = |wanted: fn(&LeaseMutation) -> bool| batch.entries.iter().flat_map(|entry| &entry.leases).any(wanted);
            let grant = all(|lease| matches!(lease, LeaseMutation::Grant { .. }));
            let renew = all(|lease| matches!(lease, LeaseMutation::Renew { .. }));
            if grant {
                self.shared.grants_asked.fetch_add(1, Ordering::SeqCst);
                open(&self.shared.grants).await;
            }
            if renew && self.shared.renewals_fail.load(Ordering::SeqCst) {
                self.shared.renewals_failed.fetch_add(1, Ordering::SeqCst);
                return Err(StoreError::not_applied(StoreErrorKind::Busy, "the database is busy"));
            }
            let decide = |entry: &Entry| {
                let mut grants = Vec::new();
                match entry.leases.iter().try_for_each(|lease| self.decide(lease, &mut grants)) {
                    Ok(()) => Outcome::Applied(Receipt { seq: CommitSeq(0), runs: Vec::new(), grants }),
                    Err(refusal) => Outcome::Refused(refusal),
                }
            };
            let outcomes = batch.entries.iter().map(decide).collect();
            if renew {
                self.shared.renewals_asked.fetch_add(1, Ordering::SeqCst);
                open(&self.shared.renewals).await;
            }
            if grant && self.shared.lose_answer.swap(false, Ordering::SeqCst) {
                return Err(StoreError::unknown(StoreErrorKind::Unavailable, "the connection broke at COMMIT"));
            }
            Ok(BatchAnswer { outcomes })
        })
    }

    fn load_run<'a>(&'a self, _: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    fn list_runs<'a>(&'a self, _: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async { Ok(RunPage::new(Vec::new(), None)) })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async {
            self.shared.listings_asked.fetch_add(1, Ordering::SeqCst);
            let left = self.shared.listings_panic.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            assert!(left.is_err(), "the storage's own fault");
            Ok(self.held())
        })
    }
}
