//! Code of the embedder that panics inside of an actor or of the follower: what was acknowledged is read, what is lost is told, and work goes on.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use crate::support::{Lie, LyingBackend};
use chrono::{DateTime, Utc};
use seeknal_state::model::{Batch, BatchAnswer};
use seeknal_state::store::{BatchSource, BoxFuture, LeaseStore, Wake};
use seeknal_state::{
    Clock, Coordinator, Durability, Error, Event, LeaseRecord, LostReason, MemoryBackend, NewRun, NodeId, NodeUpdate, OpenReport,
    ProcessInfo, RunId, RunPage, RunQuery, RunState, RunUpdate, StateBackend, StoreError, StoreErrorKind, SystemClock,
};

/// A clock that panics on demand.
#[derive(Debug, Default)]
struct Faulty(Arc<AtomicBool>);

impl Clock for Faulty {
    fn now(&self) -> DateTime<Utc> {
        assert!(!self.0.swap(false, Ordering::SeqCst), "the clock's own fault");
        SystemClock.now()
    }
}

/// A coordinator with a run, and what makes its clock panic once.
async fn open(backend: Arc<dyn StateBackend>) -> (Coordinator, Arc<AtomicBool>) {
    let fault = Arc::new(AtomicBool::new(false));
    let state = Coordinator::builder().clock(Faulty(Arc::clone(&fault))).open(backend).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    (state, fault)
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// One thread, so that everything comes in the order in which it was woken: what the flush became reaches an actor that dies before it looks at it.
#[tokio::test]
async fn who_is_answered_by_a_dead_actor_reads_what_he_wrote() {
    let backend = LyingBackend::new(false);
    let (state, fault) = open(Arc::clone(&backend) as _).await;
    backend.close_gate();
    let write = |node: &'static str| {
        let state = state.clone();
        tokio::spawn(async move {
            state.set_node_state("r", node, NodeUpdate::running()).await?;
            let quick = state.snapshot("r").is_none_or(|run| run.node(node).is_some());
            let quick_of_many = state.snapshots(&["r"]).await?.pop().flatten().is_some_and(|run| run.node(node).is_some());
            Ok::<_, Error>((quick, quick_of_many, state.get_node_state("r", node).await?.is_some()))
        })
    };
    let written = write("n");
    backend.arrived(2).await;
    settle().await;
    fault.store(true, Ordering::SeqCst);
    let victim = write("victim");
    backend.open_gate();
    let seen = written.await.unwrap().expect("it is in storage");
    assert_eq!(seen, (true, true, true), "after Ok everybody reads it");
    assert!(victim.await.unwrap().unwrap_err().is_unknown_outcome());
}

/// Also where only what the actor left behind hears that the end of the run is in storage.
#[tokio::test]
async fn the_locks_of_a_run_are_free_though_the_actor_that_ended_it_died() {
    let backend = LyingBackend::new(false);
    let (state, fault) = open(Arc::clone(&backend) as _).await;
    let run = state.acquire_lock("r", Duration::ZERO).await.unwrap().unwrap();
    backend.close_gate();
    let ending = {
        let state = state.clone();
        tokio::spawn(async move { state.update_run("r", RunUpdate::success()).await })
    };
    backend.arrived(2).await;
    settle().await;
    fault.store(true, Ordering::SeqCst);
    let victim = {
        let state = state.clone();
        tokio::spawn(async move { state.set_node_state("r", "victim", NodeUpdate::running()).await })
    };
    backend.open_gate();
    ending.await.unwrap().expect("it is in storage");
    assert!(victim.await.unwrap().unwrap_err().is_unknown_outcome());
    let reason = tokio::time::timeout(Duration::from_secs(20), run.lost()).await.expect("its run has ended");
    assert_eq!(reason, LostReason::RunEnded);
    assert_eq!(state.list_locks().await.unwrap(), []);
}

/// What became of it is heard by nobody but what the actor left behind.
#[tokio::test]
async fn subscribers_are_told_what_was_lost_of_an_actor_that_died() {
    let backend = LyingBackend::new(false);
    let (state, fault) = open(Arc::clone(&backend) as _).await;
    let mut events = state.subscribe();
    backend.close_gate();
    backend.tell([Lie::Full]);
    state.with_durability(Durability::Deferred).set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    backend.arrived(2).await;
    fault.store(true, Ordering::SeqCst);
    assert!(state.set_node_state("r", "victim", NodeUpdate::running()).await.unwrap_err().is_unknown_outcome());
    backend.open_gate();
    let told = tokio::time::timeout(Duration::from_secs(20), events.next()).await.expect("nobody is told");
    assert!(matches!(&told, Ok(Event::DeferredLost(loss)) if loss.run == "r" && loss.lost == 1), "{told:?}");
    assert!(matches!(state.close().await, Err(Error::DeferredLost(loss)) if loss.lost == 1));
}

/// A backend with a writer of its own, which asks for the next batch at once. While it is held, it writes nothing; then it is full, until it is told
/// otherwise.
#[derive(Debug, Default)]
struct Pulling {
    inner: MemoryBackend,
    door: Arc<(Mutex<Door>, Condvar)>,
}

#[derive(Debug, Default)]
struct Door {
    held: bool,
    full: bool,
}

impl Pulling {
    fn set(&self, held: bool, full: bool) {
        *self.door.0.lock().unwrap() = Door { held, full };
        self.door.1.notify_all();
    }
}

impl StateBackend for Pulling {
    fn name(&self) -> &'static str {
        "pulling"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.inner.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.inner.commit(batch)
    }

    fn pull_from(&self, source: Weak<dyn BatchSource>) -> Option<Wake> {
        let (wake, woken) = std::sync::mpsc::channel::<()>();
        let (inner, door) = (self.inner.clone(), Arc::clone(&self.door));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            while woken.recv().is_ok() {
                let Some(source) = source.upgrade() else { return };
                while let Some(batch) = source.next() {
                    let full = door.1.wait_while(door.0.lock().unwrap(), |door| door.held).unwrap().full;
                    source.answer(if full {
                        Err(StoreError::not_applied(StoreErrorKind::Full, "no space left"))
                    } else {
                        runtime.block_on(inner.commit(batch))
                    });
                }
            }
        });
        Some(Box::new(move || wake.send(()).is_ok()))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.inner.load_run(run)
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.inner.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.inner.list_leases()
    }

    fn lease_store(&self) -> LeaseStore {
        self.inner.lease_store()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.inner.reserve_tokens(count)
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.inner.process()
    }
}

/// Which of the threads comes first is theirs to say: often enough the wrong one.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_flush_tells_what_a_dead_actor_lost() {
    const WRITES: u64 = 40;
    for round in 0..100 {
        let backend = Arc::new(Pulling::default());
        let (state, fault) = open(Arc::clone(&backend) as _).await;
        backend.set(true, true);
        let deferred = state.with_durability(Durability::Deferred);
        for row in 0..WRITES {
            deferred.set_node_state("r", format!("n{row}"), NodeUpdate::running()).await.unwrap();
        }
        fault.store(true, Ordering::SeqCst);
        assert!(deferred.set_node_state("r", "victim", NodeUpdate::running()).await.unwrap_err().is_unknown_outcome());
        let mut flush = pin!(state.flush());
        tokio::select! {
            biased;
            flushed = &mut flush => panic!("round {round}: nothing was answered, and yet {flushed:?}"),
            () = settle() => {}
        }
        backend.set(false, true);
        let told = flush.await;
        assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.lost == WRITES), "round {round}: {told:?}");
    }
}

#[tokio::test]
async fn others_are_followed_also_after_a_panic_of_the_clock() {
    let backend = LyingBackend::new(true);
    let (state, fault) = open(Arc::clone(&backend) as _).await;
    settle().await;
    fault.store(true, Ordering::SeqCst);
    let struck = async {
        while fault.load(Ordering::SeqCst) {
            backend.foreign.notify_one();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), struck).await.expect("the follower asks the clock");
    backend.write_as_another("r", "theirs", NodeUpdate::running()).await;
    let seen = async {
        while state.get_node_state("r", "theirs").await.unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), seen).await.expect("somebody follows again");
    let sound = async {
        while state.health().freshness.error.is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), sound).await.expect("it is told that all is well again");
}

#[tokio::test]
async fn a_node_that_a_dead_actor_deleted_is_told_as_gone() {
    let backend = LyingBackend::new(false);
    let (state, fault) = open(Arc::clone(&backend) as _).await;
    for node in ["kept", "gone"] {
        state.set_node_state("r", node, NodeUpdate::running()).await.unwrap();
    }
    let mut events = state.subscribe();
    let before = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let deleting = tokio::spawn({
        let state = state.clone();
        async move { state.delete_node("r", "gone").await }
    });
    backend.arrived(before + 1).await;
    fault.store(true, Ordering::SeqCst);
    assert!(state.set_node_state("r", "victim", NodeUpdate::running()).await.unwrap_err().is_unknown_outcome());
    backend.open_gate();
    let deleted = deleting.await.unwrap().unwrap().version();
    state.get_run("r").await.unwrap();
    let Event::Changed(change) = events.next().await.unwrap() else { panic!("nothing was lost") };
    assert_eq!(change.after, deleted);
    assert_eq!(change.nodes, [NodeId::new("gone").unwrap()]);
}

/// Who asks is told what happened, and the run is none that is just being loaded: not to who counts them, nor to who follows others.
#[tokio::test]
async fn a_load_that_panics_is_a_failure_of_storage() {
    for shared in [false, true] {
        let backend = LyingBackend::new(shared);
        let (state, _) = open(Arc::clone(&backend) as _).await;
        backend.broken.store(true, Ordering::SeqCst);
        let error = state.get_run("elsewhere").await.unwrap_err();
        assert!(matches!(&error, Error::Store(_)) && error.to_string().contains("code panicked while it loaded"), "{error}");
        assert_eq!(state.stats().resident_runs, 1, "only the one that was made here");
        assert!(state.get_run("elsewhere").await.unwrap().is_none(), "it goes on");
        state.close().await.unwrap();
    }
}

/// Of a run that is known here too: who waits for it is answered.
#[tokio::test]
async fn a_run_whose_load_panics_behind_others_is_read_anew() {
    let backend = LyingBackend::new(true);
    let (state, _) = open(Arc::clone(&backend) as _).await;
    backend.write_as_another("r", "theirs", NodeUpdate::running()).await;
    backend.broken.store(true, Ordering::SeqCst);
    let work = async {
        state.set_node_state("r", "ours", NodeUpdate::running()).await.expect("it is in storage");
        assert!(!backend.broken.load(Ordering::SeqCst), "what others wrote was looked for");
        let run = state.get_run("r").await.unwrap().unwrap();
        assert!(run.node("theirs").is_some() && run.node("ours").is_some());
        state.close().await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(10), work).await.expect("nobody waits for an answer that never comes");
}
