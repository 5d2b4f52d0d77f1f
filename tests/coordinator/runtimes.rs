//! A coordinator belongs to the runtime that it was opened on: who uses it from another one, blocks that, ends it or has none, stops nobody else.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use crate::support::{Lie, LyingBackend};
use seeknal_state::{
    ClaimFilter, Coordinator, Durability, LeaseKey, LockOptions, LostReason, NewRun, Next, NodeUpdate, RunId, RunQuery,
    StateBackend,
};
use tokio::runtime::{Builder, Runtime};

/// Longer than anything here takes, however busy the machine is.
const LONG: Duration = Duration::from_secs(20);

fn own() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// One that stands still whenever nobody is in its `block_on`.
fn workers() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn open(own: &Runtime, backend: &Arc<LyingBackend>) -> Coordinator {
    own.block_on(Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>)).unwrap()
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    let Ok(done) = tokio::time::timeout(LONG, future).await else { panic!("{what}: it never ended") };
    done
}

/// As it is without any runtime.
fn wait_for<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return done;
        }
        std::thread::park();
    }
}

#[test]
fn a_worker_that_blocks_its_runtime_stops_nobody_else() {
    let (own, blocked) = (own(), workers());
    let state = open(&own, &LyingBackend::new(false));
    blocked.block_on(async {
        state.create_run("r", NewRun::running()).await.unwrap();
        let mut tx = state.transaction();
        tx.set_node_state("r", "n", NodeUpdate::running());
        tx.create_run("s", NewRun::running());
        tx.commit().await.unwrap();
    });
    // From here on nobody is in it: what lives there stands still.
    own.block_on(in_time("a write by another one", state.set_node_state("r", "n", NodeUpdate::success()))).unwrap();
    own.block_on(in_time("closing", state.close())).unwrap();
}

#[test]
fn a_runtime_that_ends_takes_no_run_along() {
    let (own, ending) = (own(), workers());
    let backend = LyingBackend::new(false);
    let state = open(&own, &backend);
    own.block_on(state.create_run("first", NewRun::running())).unwrap();
    ending.block_on(state.create_run("r", NewRun::running())).unwrap();
    // Both runs are held, and the commit is on its way.
    backend.close_gate();
    let sent = backend.commits.load(Ordering::SeqCst);
    ending.block_on(async {
        let mut tx = state.transaction();
        tx.set_node_state("first", "n", NodeUpdate::success());
        tx.set_node_state("r", "n", NodeUpdate::success());
        let committing = tokio::spawn(tx.commit());
        backend.arrived(sent + 1).await;
        drop(committing);
    });
    drop(ending);
    backend.open_gate();
    own.block_on(async {
        for run in ["first", "r"] {
            let seen = async {
                while state.get_node_state(run, "n").await.unwrap().is_none() {
                    tokio::task::yield_now().await;
                }
            };
            in_time("what was committed is seen", seen).await;
            in_time(run, state.set_node_state(run, "m", NodeUpdate::success())).await.unwrap();
        }
        assert_eq!(state.stats().resident_runs, 2);
        in_time("flush", state.flush()).await.unwrap();
        in_time("closing", state.close()).await.unwrap();
    });
}

#[test]
fn it_is_closed_without_a_runtime() {
    let own = own();
    let state = open(&own, &LyingBackend::new(false));
    wait_for(state.create_run("r", NewRun::running())).unwrap();
    wait_for(state.close()).unwrap();
    assert!(state.is_closed());
}

/// Who asks needs no runtime, and what is only read not even that of the coordinator.
#[cfg(all(feature = "file", feature = "sqlite"))]
#[test]
fn questions_are_asked_without_a_runtime_and_after_its_own_has_ended() {
    for backend in ["memory", "file", "database"] {
        let store = crate::support::Store::of(backend);
        let own = own();
        let state = own.block_on(store.open());
        wait_for(async {
            state.create_run("r", NewRun::running()).await.unwrap();
            state.set_node_state("r", "n", NodeUpdate::pending()).await.unwrap();
            state.create_run("s", NewRun::running()).await.unwrap();
            assert!(state.fresh("r").await.unwrap().is_some(), "{backend}");
            assert_eq!(state.snapshots(&["r", "s"]).await.unwrap().iter().flatten().count(), 2, "{backend}");
            assert_eq!(state.latest_node_state("n").await.unwrap().unwrap().0, "r", "{backend}");
            assert!(state.last_success("n").await.unwrap().is_none(), "{backend}");
            assert!(state.coverage("n").await.unwrap().intervals.is_empty(), "{backend}");
            assert_eq!(state.pending("n", ("2024-01-01", "2024-01-02")).await.unwrap().len(), 1, "{backend}");
            assert_eq!(state.node_ids().await.unwrap().len(), 1, "{backend}");
            assert!(state.abandoned_runs().await.unwrap().is_empty(), "{backend}");
            assert!(state.list_locks().await.unwrap().is_empty(), "{backend}");
            assert!(state.free_dead_claims("r").await.unwrap().is_empty(), "{backend}");
            let Next::Claimed(claim) = state.claim_next("r", ClaimFilter::new()).await.unwrap() else { panic!("{backend}") };
            claim.complete(NodeUpdate::success()).await.unwrap();
            state.resume_run("r").await.unwrap();
            let locked = state.acquire_lock("s", Duration::from_secs(1)).await.unwrap().unwrap();
            assert_eq!(state.force_unlock(locked.token()).await.unwrap().token, locked.token(), "{backend}");
            assert!(state.backend().processes().await.is_ok(), "{backend}");
        });
        drop(own);
        wait_for(async {
            // The storage is still open, and says what is in it.
            assert_eq!(state.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 2, "{backend}");
            assert!(state.last_success("n").await.unwrap().is_some(), "{backend}");
            state.close().await.unwrap();
            if backend != "memory" {
                let refused = state.list_runs(&RunQuery::default()).await;
                assert!(refused.is_err_and(|error| error.is_closed()), "{backend}");
            }
            let refused = state.get_run("r").await;
            assert!(refused.is_err_and(|error| error.is_closed() && !error.is_retryable()), "{backend}");
        });
    }
}

/// A write after the other, so fast that its client is waited for awake. What wakes it is the answer, and not the runtime whose worker stands still.
#[cfg(all(feature = "file", feature = "sqlite"))]
#[test]
fn a_lone_client_is_answered_whoever_blocks_its_worker() {
    for backend in ["memory", "file", "database"] {
        let (own, store) = (own(), crate::support::Store::of(backend));
        let state = own.block_on(store.open());
        own.block_on(state.create_run("r", NewRun::running())).unwrap();
        let (told, answered) = std::sync::mpsc::channel();
        let client = state.clone();
        std::thread::spawn(move || {
            workers().block_on(async {
                wait_for(async {
                    // Fewer than tokio lets a task do in one turn: beyond that it waits for its worker by itself.
                    for rows in 0..60 {
                        client.set_node_state("r", "n", NodeUpdate::success().row_count(rows)).await.unwrap();
                    }
                });
            });
            told.send(()).unwrap();
        });
        assert!(answered.recv_timeout(LONG).is_ok(), "{backend}: a write is not answered");
        own.block_on(in_time("closing", state.close())).unwrap();
    }
}

/// Nor does a question that is asked again and again need the worker on which somebody waits for its answer.
#[test]
fn who_finds_no_work_is_told_whoever_blocks_his_worker() {
    let own = own();
    let state = own.block_on(crate::support::Store::of("memory").open());
    let _claim = own.block_on(async {
        state.create_run("r", NewRun::running()).await.unwrap();
        state.set_node_state("r", "first", NodeUpdate::pending()).await.unwrap();
        state.set_node_state("r", "second", NodeUpdate::pending().depends_on(["first"])).await.unwrap();
        state.claim_next("r", ClaimFilter::new()).await.unwrap()
    });
    let (told, answered) = std::sync::mpsc::channel();
    let worker = state.clone();
    std::thread::spawn(move || {
        let next = workers().block_on(async { wait_for(worker.claim_next("r", ClaimFilter::new().wait(Duration::ZERO))) });
        told.send(matches!(next, Ok(Next::NothingReady))).unwrap();
    });
    assert_eq!(answered.recv_timeout(LONG), Ok(true));
    own.block_on(in_time("closing", state.close())).unwrap();
}

/// As often as not in the middle of being waited for awake.
#[cfg(all(feature = "file", feature = "sqlite"))]
#[test]
fn a_lone_client_may_go_away_at_any_time() {
    for backend in ["memory", "file", "database"] {
        let (own, store) = (own(), crate::support::Store::of(backend));
        let state = own.block_on(store.open());
        // On a worker, as clients are.
        let client = own.spawn(async move {
            state.create_run("r", NewRun::running()).await.unwrap();
            let idle = state.stats().permits_available;
            let before = state.get_run("r").await.unwrap().unwrap().version();
            for rows in 0..=400_u32 {
                let update = NodeUpdate::success().row_count(u64::from(rows));
                let mut write = pin!(state.set_node_state("r", "n", update));
                if rows % 4 < 3 {
                    write.await.unwrap();
                    continue;
                }
                // Given up after so many looks, unless it is answered before.
                let mut looks = rows / 4 % 8 + 1;
                poll_fn(|cx| {
                    looks -= 1;
                    let answered = write.as_mut().poll(cx).is_ready();
                    if answered || looks == 0 { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }
            // The last one was answered, behind all others.
            let run = state.get_run("r").await.unwrap().unwrap();
            assert_eq!(run.node("n").unwrap().row_count, Some(400), "{backend}");
            assert_eq!(run.version().0 - before.0, 401, "{backend}: what was given up was sent all the same");
            assert_eq!(state.stats().permits_available, idle, "{backend}");
            in_time("closing", state.close()).await.unwrap();
        });
        own.block_on(client).unwrap();
    }
}

/// What pauses does so by the clock of the coordinator's runtime, if its caller has none.
#[cfg(feature = "sqlite")]
#[test]
fn who_has_no_runtime_pauses_all_the_same() {
    let own = own();
    let store = crate::support::Store::of("database");
    let state = own.block_on(store.open());
    wait_for(state.create_run("r", NewRun::running())).unwrap();
    wait_for(state.set_node_state("r", "n", NodeUpdate::pending())).unwrap();

    // Somebody is faster often enough for it to wait for its turn.
    let mut faster = 0_u64;
    let deciding = state.transact(|view, tx| {
        let seen = view.run("r")?.map(|run| run.version());
        if faster < 5 {
            faster += 1;
            wait_for(state.set_node_state("r", "m", NodeUpdate::running().row_count(faster)))?;
        }
        tx.set_node_state("r", "m", NodeUpdate::success());
        Ok(seen)
    });
    wait_for(deciding).unwrap();
    assert_eq!(faster, 5);

    // As long as storage takes longer to grant it than it would last, one is asked for that lasts longer.
    let mut ttl = Duration::from_secs(2);
    let lease = loop {
        let options = LockOptions::new().ttl(ttl).keep_alive(false);
        let key = LeaseKey::run(RunId::new("other").unwrap());
        match wait_for(state.acquire(key, options, LONG)) {
            Err(error) if error.to_string().contains("ask for a longer ttl") && ttl < LONG => ttl *= 2,
            lease => break lease.unwrap().unwrap(),
        }
    };
    assert_eq!(wait_for(lease.lost()), LostReason::Expired);
    drop(lease);

    // Storage takes longer to grant it than it lasts.
    let writer = rusqlite::Connection::open(store.folder.path().join("state.db")).unwrap();
    writer.busy_timeout(Duration::from_secs(5)).unwrap();
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();
    let free = state.stats().permits_available;
    let claiming = std::thread::spawn({
        let state = state.clone();
        move || wait_for(state.claim_node("r", "n", "worker", Duration::from_millis(200)))
    });
    // Counted from when it is asked for, whenever that thread gets so far.
    while state.stats().permits_available == free && !claiming.is_finished() {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(600));
    drop(writer);
    assert!(claiming.join().unwrap().unwrap().is_none());

    // Nobody is left who would tell when its time is over.
    let options = LockOptions::new().ttl(Duration::from_secs(3600)).keep_alive(false);
    let lease = wait_for(state.acquire(LeaseKey::run(RunId::new("other").unwrap()), options, Duration::ZERO)).unwrap().unwrap();
    drop(own);
    wait_for(lease.lost());
    wait_for(state.close()).unwrap();
}

/// The work of the coordinator ended with its runtime; what it had open is given up all the same, while handles on it live.
#[cfg(all(feature = "file", feature = "sqlite"))]
#[test]
fn it_is_closed_after_its_runtime_has_ended() {
    let workers = workers();
    for backend in ["file", "database"] {
        let store = crate::support::Store::of(backend);
        let own = own();
        let state = own.block_on(store.open());
        own.block_on(state.create_run("r", NewRun::running())).unwrap();
        let lock = own.block_on(state.acquire_lock("r", Duration::ZERO)).unwrap();
        drop(own);
        workers.block_on(async {
            let mut tx = state.transaction();
            tx.set_node_state("r", "n", NodeUpdate::success());
            tx.set_node_state("s", "n", NodeUpdate::success());
            let refused = in_time("a write over two runs", tx.commit()).await;
            assert!(matches!(refused, Err(seeknal_state::Error::Closed)), "{backend}: it never began: {refused:?}");
            in_time("closing", state.close()).await.unwrap();
            assert!(state.is_closed());
            in_time("closing again", state.close()).await.unwrap();
            let next = in_time("opening", store.open()).await;
            assert!(next.get_run("r").await.unwrap().is_some());
            next.close().await.unwrap();
        });
        drop((state, lock));
    }
}

/// What became of the last writes was on its way to somebody who went with the runtime.
#[cfg(feature = "sqlite")]
#[test]
fn it_is_closed_although_nobody_is_left_to_be_told() {
    let (own, other) = (workers(), workers());
    let store = crate::support::Store::of("database");
    let state = own.block_on(store.open());
    let deferred = state.with_durability(Durability::Deferred);
    let writer = rusqlite::Connection::open(store.folder.path().join("state.db")).unwrap();
    own.block_on(async {
        state.create_run("r", NewRun::running()).await.unwrap();
        writer.execute_batch("BEGIN IMMEDIATE").unwrap();
        for node in ["a", "b", "c"] {
            deferred.set_node_state("r", node, NodeUpdate::success()).await.unwrap();
        }
        in_time("they are sent", async {
            while state.stats().waiting < 3 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    });
    // From here on nobody is in it.
    writer.execute_batch("COMMIT").unwrap();
    let count = || writer.query_row("SELECT count(*) FROM node_states", [], |row| row.get::<_, u32>(0)).unwrap();
    let begun = std::time::Instant::now();
    while count() < 3 {
        assert!(begun.elapsed() < LONG, "they are never written");
        std::thread::yield_now();
    }
    drop(own);
    other.block_on(async {
        in_time("closing", state.close()).await.unwrap();
        assert!(state.is_closed());
        let next = in_time("opening", store.open()).await;
        assert_eq!(next.get_run("r").await.unwrap().unwrap().node_count(), 3);
        next.close().await.unwrap();
    });
}

/// Nobody knows what became of a write, and nobody is left who could ask.
#[test]
fn it_is_closed_although_an_outcome_is_never_known() {
    let (own, other) = (own(), workers());
    let backend = LyingBackend::new(false);
    let state = open(&own, &backend);
    own.block_on(state.create_run("r", NewRun::running())).unwrap();
    backend.tell([Lie::NeverArrived; 64]);
    let writing = state.clone();
    let write = own.spawn(async move { writing.set_node_state("r", "n", NodeUpdate::success()).await.map(drop) });
    own.block_on(in_time("it is sent", async {
        while state.health().storage.is_none() {
            tokio::task::yield_now().await;
        }
    }));
    drop(own);
    other.block_on(async {
        assert!(write.await.is_err(), "it went with the runtime");
        in_time("closing", state.close()).await.unwrap();
    });
}
