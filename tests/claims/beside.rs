//! Claims, and runs that are taken over, while others do something at the very moment: commit, lock, open, end. And while storage is busy for a moment.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Lie, LyingBackend, Store};
use seeknal_state::model::{Batch, BatchAnswer, LeaseMutation};
use seeknal_state::store::{BoxFuture, ForeignCommits, KnownOpenings, LeaseStore, OpenProcess};
use seeknal_state::{
    ClaimFilter, Coordinator, Error, LeaseRecord, NewRun, Next, NodeStatus, NodeUpdate, OnDelete, OpenReport, ProcessInfo, RunId,
    RunPage, RunQuery, RunState, RunUpdate, StateBackend, StoreError, StoreErrorKind, Version,
};
use tokio::sync::Notify;

const TTL: Duration = Duration::from_secs(30);
/// As SQLite, which waits before it says that somebody else keeps it busy.
const REFUSED_AFTER: Duration = Duration::from_secs(2);

/// A place where the next one who comes by waits until he is let go.
#[derive(Debug, Default)]
struct Stop {
    armed: AtomicBool,
    reached: Notify,
    go: Notify,
}

impl Stop {
    fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    async fn pass(&self) {
        if self.armed.swap(false, Ordering::SeqCst) {
            self.reached.notify_one();
            self.go.notified().await;
        }
    }
}

/// In front of a real backend: hears of no other opening's commits by itself, and stops where it is told to.
#[derive(Debug)]
struct Slow {
    backend: Arc<dyn StateBackend>,
    /// Behind the reading of a run's version.
    version: Stop,
    /// In front of the reading of runs.
    list: Stop,
    /// Behind a commit that writes to runs.
    written: Stop,
    /// Whether the next one of those finds no space.
    full: AtomicBool,
    /// Whether all of those are refused, after a while, by somebody who keeps storage busy.
    busy: AtomicBool,
    /// In front of the reading of openings.
    openings: Stop,
    /// Leases on nodes that were asked for.
    grants: AtomicUsize,
    /// Whether the leases that are held are not told.
    silent: AtomicBool,
}

impl Slow {
    fn new(store: &Store) -> Arc<Self> {
        Arc::new(Self {
            backend: store.backend(),
            version: Stop::default(),
            list: Stop::default(),
            written: Stop::default(),
            full: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            openings: Stop::default(),
            grants: AtomicUsize::new(0),
            silent: AtomicBool::new(false),
        })
    }

    async fn open(self: &Arc<Self>) -> Coordinator {
        Coordinator::open(Arc::clone(self) as Arc<dyn StateBackend>).await.unwrap()
    }
}

impl StateBackend for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.backend.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        let leases = batch.entries.iter().flat_map(|entry| &entry.leases);
        let asked = leases.filter(|lease| matches!(lease, LeaseMutation::Grant { key, .. } if key.node.is_some())).count();
        self.grants.fetch_add(asked, Ordering::SeqCst);
        Box::pin(async move {
            let writes = batch.entries.iter().any(|entry| !entry.parts.is_empty());
            if writes && self.full.swap(false, Ordering::SeqCst) {
                return Err(StoreError::not_applied(StoreErrorKind::Full, "no space left"));
            }
            if writes && self.busy.load(Ordering::SeqCst) {
                tokio::time::sleep(REFUSED_AFTER).await;
                return Err(StoreError::not_applied(StoreErrorKind::Busy, "somebody else writes"));
            }
            let answer = self.backend.commit(batch).await;
            if writes {
                self.written.pass().await;
            }
            answer
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.backend.load_run(run)
    }

    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.backend.reload_run(have)
    }

    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        Box::pin(async move {
            let version = self.backend.run_version(run).await;
            self.version.pass().await;
            version
        })
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        self.backend.run_versions(runs)
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        Box::pin(std::future::pending())
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async move {
            self.list.pass().await;
            self.backend.list_runs(query).await
        })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async move {
            let leases = self.backend.list_leases().await?;
            Ok(if self.silent.load(Ordering::SeqCst) { Vec::new() } else { leases })
        })
    }

    fn lease_store(&self) -> LeaseStore {
        self.backend.lease_store()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.backend.reserve_tokens(count)
    }

    fn is_shared(&self) -> bool {
        self.backend.is_shared()
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.backend.process()
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        Box::pin(async move {
            self.openings.pass().await;
            self.backend.processes().await
        })
    }

    fn known_openings(&self) -> KnownOpenings {
        self.backend.known_openings()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.backend.close()
    }
}

/// Two processes on one store, the first of which can be held up.
async fn two() -> (Arc<Slow>, Coordinator, Coordinator, Store) {
    let store = Store::of("database");
    let slow = Slow::new(&store);
    let (state, other) = (slow.open().await, store.open().await);
    (slow, state, other, store)
}

async fn close(states: [Coordinator; 2]) {
    for state in states {
        state.close().await.unwrap();
    }
}

async fn in_time<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(30), future).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// Waits for something that happens in the background.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let all = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    in_time(what, all).await;
}

async fn begin(state: &Coordinator, nodes: usize) {
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut tx = state.transaction();
    for node in 0..nodes {
        tx.set_node_state("r", format!("n{node}"), NodeUpdate::pending().max_attempts(1));
    }
    tx.commit().await.unwrap();
}

/// Whether the lock is seen when leases are listed, or only by the refusal, as that of whoever moves the state away: nobody tries one node after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_run_is_not_tried_node_by_node() {
    for silent in [false, true] {
        let (slow, state, other, _store) = two().await;
        begin(&other, 200).await;
        let lock = other.acquire_lock("r", Duration::ZERO).await.unwrap().unwrap();
        slow.silent.store(silent, Ordering::SeqCst);
        let told = in_time("it asks once", state.claim_next("r", ClaimFilter::new())).await.unwrap();
        assert!(matches!(&told, Next::Locked { holder } if holder.token == lock.token()), "silent: {silent}, {told:?}");
        let tried = slow.grants.load(Ordering::SeqCst);
        assert!(tried <= 8, "silent: {silent}, {tried} nodes were tried");
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { state.claim_next("r", ClaimFilter::new().wait(Duration::from_secs(20))).await.unwrap() }
        });
        lock.release().await.unwrap();
        slow.silent.store(false, Ordering::SeqCst);
        let claim = waiting.await.unwrap().claimed().expect("it is free again");
        claim.complete(NodeUpdate::success()).await.unwrap();
        close([state, other]).await;
    }
}

/// What was judged was older than what is stored, though this process knew by then what is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_before_the_call_is_claimed() {
    let (slow, state, other, _store) = two().await;
    other.create_run("r", NewRun::running()).await.unwrap();
    other.set_node_state("r", "done", NodeUpdate::success()).await.unwrap();
    assert!(matches!(state.claim_next("r", ClaimFilter::new()).await.unwrap(), Next::Drained { blocked: 0 }));
    for round in 0..5 {
        let node = format!("n{round}");
        other.set_node_state("r", &node, NodeUpdate::pending()).await.unwrap();
        slow.version.arm();
        let asking = tokio::spawn({
            let state = state.clone();
            async move { state.claim_next("r", ClaimFilter::new()).await.unwrap() }
        });
        in_time("storage is asked", slow.version.reached.notified()).await;
        state.fresh("r").await.unwrap();
        slow.version.go.notify_one();
        let next = asking.await.unwrap();
        let Next::Claimed(claim) = next else { panic!("round {round}: {next:?}") };
        assert_eq!(claim.node_id().as_str(), node);
        claim.complete(NodeUpdate::success()).await.unwrap();
    }
    close([state, other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_others_deleted_is_not_drained() {
    let (_slow, state, other, _store) = two().await;
    other.create_run("r", NewRun::running()).await.unwrap();
    assert!(matches!(state.claim_next("r", ClaimFilter::new()).await.unwrap(), Next::Drained { blocked: 0 }));
    other.delete_run("r", OnDelete::DropCoverage).await.unwrap();
    let next = in_time("it is answered", state.claim_next("r", ClaimFilter::new())).await;
    assert!(matches!(next, Err(Error::RunNotFound(_))), "{next:?}");
    close([state, other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_a_process_that_opened_while_runs_were_listed_is_not_abandoned() {
    let store = Store::of("database");
    let slow = Slow::new(&store);
    let state = slow.open().await;
    slow.list.arm();
    let asking = tokio::spawn({
        let state = state.clone();
        async move { state.abandoned_runs().await.unwrap() }
    });
    in_time("runs are listed", slow.list.reached.notified()).await;
    let other = store.open().await;
    other.create_run("r", NewRun::running()).await.unwrap();
    slow.list.go.notify_one();
    assert_eq!(asking.await.unwrap(), []);
    other.close().await.unwrap();
    assert_eq!(state.abandoned_runs().await.unwrap().len(), 1, "now it is");
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_ended_before_its_process_closed_is_not_abandoned() {
    let (slow, state, other, _store) = two().await;
    for run in ["ends", "stays"] {
        other.create_run(run, NewRun::running()).await.unwrap();
    }
    slow.openings.arm();
    let asking = tokio::spawn({
        let state = state.clone();
        async move { state.abandoned_runs().await.unwrap() }
    });
    in_time("openings are listed", slow.openings.reached.notified()).await;
    other.update_run("ends", RunUpdate::success()).await.unwrap();
    other.close().await.unwrap();
    slow.openings.go.notify_one();
    let abandoned: Vec<RunId> = asking.await.unwrap().into_iter().map(|run| run.summary.run_id).collect();
    assert_eq!(abandoned, [RunId::new("stays").unwrap()]);
    state.close().await.unwrap();
}

/// Also where somebody else holds the lock on the run by now: who works under a lost lease is told of that, and waits for nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_under_a_lost_lease_is_told_so_though_the_run_is_locked() {
    let store = Store::of("database");
    for own in ["r", "another"] {
        let (state, other) = (store.open().await, store.open().await);
        if own == "r" {
            begin(&state, 3).await;
            state.create_run("another", NewRun::running()).await.unwrap();
        }
        let lease = state.acquire_lock(own, Duration::ZERO).await.unwrap().unwrap();
        let under = state.with_lease(&lease);
        if own == "r" {
            other.force_unlock(lease.token()).await.unwrap();
        }
        let lock = other.acquire_lock("r", Duration::ZERO).await.unwrap().unwrap();
        if own != "r" {
            let next = under.claim_next("r", ClaimFilter::new()).await;
            assert!(matches!(next, Ok(Next::Locked { .. })), "its own is held: {next:?}");
            other.force_unlock(lease.token()).await.unwrap();
        }
        for wait in [Duration::ZERO, Duration::from_secs(3_600)] {
            let next = in_time("it is told", under.claim_next("r", ClaimFilter::new().wait(wait))).await;
            assert!(matches!(next, Err(Error::LeaseLost(_))), "{own}, {wait:?}: {next:?}");
        }
        let claim = under.claim_node("r", "n0", "worker", TTL).await;
        assert!(matches!(claim, Err(Error::LeaseLost(_))), "{own}: {claim:?}");
        lock.release().await.unwrap();
        close([state, other]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_others_took_over_is_not_ones_own_any_more() {
    let (_slow, state, other, _store) = two().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    assert!(state.resume_run("r").await.unwrap().commit.is_none(), "it is its own");
    other.update_run("r", RunUpdate::failed()).await.unwrap();
    other.update_run("r", RunUpdate::running()).await.unwrap();
    let resumed = state.resume_run("r").await;
    let theirs = other.backend().process().unwrap();
    assert!(matches!(&resumed, Err(Error::RunInUse { worker, .. }) if *worker == theirs), "{resumed:?}");
    close([state, other]).await;
}

async fn assert_given_back(state: &Coordinator, what: &str) {
    until(what, || async {
        state.get_node_state("r", "n0").await.unwrap().is_some_and(|node| node.status == NodeStatus::Pending)
    })
    .await;
    let node = state.get_node_state("r", "n0").await.unwrap().unwrap();
    assert_eq!((node.attempt, node.attempts.len(), node.started_at), (1, 0, None), "{what}");
    until("its lease is free", || async { state.list_locks().await.unwrap().is_empty() }).await;
}

/// A moment in which storage takes nothing costs no attempt, and so not the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_given_back_when_storage_was_full_for_a_moment() {
    const SHORT: Duration = Duration::from_millis(100);
    let lying = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
    begin(&state, 1).await;
    let claim = state.claim_node("r", "n0", "worker", TTL).await.unwrap().unwrap();
    lying.tell([Lie::Full]);
    drop(claim);
    assert_given_back(&state, "dropped").await;

    state.close().await.unwrap();

    let store = Store::of("database");
    let slow = Slow::new(&store);
    let state = slow.open().await;
    begin(&state, 1).await;
    slow.written.arm();
    let late = tokio::spawn({
        let state = state.clone();
        async move { state.claim_node("r", "n0", "worker", SHORT).await.unwrap() }
    });
    in_time("it is written", slow.written.reached.notified()).await;
    // Longer than the lease lasts.
    tokio::time::sleep(3 * SHORT).await;
    slow.full.store(true, Ordering::SeqCst);
    slow.written.go.notify_one();
    assert!(late.await.unwrap().is_none(), "its lease was over before it was known");
    assert_given_back(&state, "known too late").await;
    state.close().await.unwrap();
}

/// Neither its caller nor the end waits for as many tries as there may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_storage_does_not_take_back_holds_up_nobody() {
    const SHORT: Duration = Duration::from_millis(100);
    let store = Store::of("database");
    let slow = Slow::new(&store);
    let state = slow.open().await;
    begin(&state, 1).await;
    slow.written.arm();
    let late = tokio::spawn({
        let state = state.clone();
        async move { state.claim_next("r", ClaimFilter::new().ttl(SHORT)).await.unwrap() }
    });
    in_time("it is written", slow.written.reached.notified()).await;
    tokio::time::sleep(3 * SHORT).await;
    slow.busy.store(true, Ordering::SeqCst);
    slow.written.go.notify_one();
    let began = Instant::now();
    let next = late.await.unwrap();
    assert!(matches!(next, Next::NothingReady), "{next:?}");
    assert!(began.elapsed() < REFUSED_AFTER, "{:?}", began.elapsed());
    let next = state.claim_next("r", ClaimFilter::new()).await.unwrap();
    assert!(matches!(next, Next::NothingReady), "it is on its way back: {next:?}");
    state.close().await.unwrap();
    assert!(began.elapsed() < 6 * REFUSED_AFTER, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_ends_while_dead_claims_are_freed_is_no_failure() {
    let lying = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
    begin(&state, 2).await;
    for node in ["n0", "n1"] {
        state.set_node_state("r", node, NodeUpdate::new().max_attempts(3)).await.unwrap();
        let claim = state.claim_node("r", node, "worker", TTL).await.unwrap().unwrap();
        state.force_unlock(claim.token()).await.unwrap();
        claim.lost().await;
    }
    let (commits, free) = (lying.commits.load(Ordering::SeqCst), state.stats().permits_available);
    lying.close_gate();
    let freeing = tokio::spawn({
        let state = state.clone();
        async move { state.free_dead_claims("r").await }
    });
    in_time("the first one is sent", lying.arrived(commits + 1)).await;
    let ending = tokio::spawn({
        let state = state.clone();
        async move { state.update_run("r", RunUpdate::cancelled()).await }
    });
    until("the end is on its way", || async { free - state.stats().permits_available >= 2 }).await;
    lying.open_gate();
    ending.await.unwrap().unwrap();
    let freed = freeing.await.unwrap().expect("what was freed until then is told");
    assert!(freed.len() <= 1, "{freed:?}");
    state.close().await.unwrap();
}

/// Whether or not there is anything to claim.
#[tokio::test]
async fn who_asks_for_what_makes_no_sense_is_told_at_once() {
    let lying = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    let short = Duration::from_millis(1);
    for wrong in [ClaimFilter::new().ttl(short), ClaimFilter::new().owner(""), ClaimFilter::new().ttl(Duration::from_secs(3_601))]
    {
        for run in ["r", "no such run"] {
            let next = state.claim_next(run, wrong.clone()).await;
            let Err(Error::Input(why)) = next else { panic!("{next:?}") };
            assert!(!why.to_string().contains("keep_alive"), "a claim has no such option: {why}");
        }
    }
    for (owner, ttl) in [("worker", short), ("", TTL)] {
        for node in ["n", "no such node"] {
            let claim = state.claim_node("r", node, owner, ttl).await;
            assert!(matches!(claim, Err(Error::Input(_))), "{claim:?}");
        }
    }
    state.close().await.unwrap();
}
