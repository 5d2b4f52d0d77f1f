//! How a coordinator is opened: where, on what, and what is said where that goes wrong.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use chrono::{DateTime, Utc};
use seeknal_state::model::{Batch, BatchAnswer};
use seeknal_state::store::BoxFuture;
use seeknal_state::{
    Clock, Coordinator, Error, LeaseRecord, MemoryBackend, NewRun, NodeUpdate, OpenReport, RunId, RunPage, RunQuery, RunState,
    StateBackend, StoreError, StoreErrorKind,
};
use tokio::runtime::Builder;
use tokio::sync::Notify;

/// A clock that has a bug.
#[derive(Debug)]
struct Stopped;

impl Clock for Stopped {
    fn now(&self) -> DateTime<Utc> {
        panic!("the clock has stopped")
    }
}

/// A backend that has a bug where it is opened first.
#[derive(Debug, Default)]
struct Falling {
    inner: MemoryBackend,
    /// It never answers, instead of panicking.
    hangs: bool,
    /// It panics also when it is asked where it is.
    lost: bool,
    opened: AtomicUsize,
    closing: Notify,
    /// Closing it waits for this, if so.
    closes: Option<Notify>,
}

impl StateBackend for Falling {
    fn name(&self) -> &'static str {
        "falling"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async {
            self.opened.fetch_add(1, Ordering::SeqCst);
            if self.hangs {
                std::future::pending::<()>().await;
            }
            panic!("the ladder slipped")
        })
    }

    fn location(&self) -> String {
        assert!(!self.lost, "nobody knows where");
        "a falling one".to_owned()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async {
            self.closing.notify_one();
            if let Some(closes) = &self.closes {
                closes.notified().await;
            }
            self.inner.close().await
        })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.inner.commit(batch)
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
}

#[tokio::test]
async fn an_opening_that_panics_says_so_and_why() {
    let fell = Coordinator::open(Arc::new(Falling::default())).await.unwrap_err();
    assert!(matches!(fell, Error::Store(_)), "{fell:?}");
    assert!(fell.to_string().contains("falling") && fell.to_string().contains("the ladder slipped"), "{fell}");

    let lost = Coordinator::open(Arc::new(Falling { lost: true, ..Falling::default() })).await.unwrap_err();
    assert!(lost.to_string().contains("the ladder slipped"), "{lost}");

    let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
    let stopped = Coordinator::builder().clock(Stopped).open(Arc::clone(&backend)).await.unwrap_err();
    assert!(matches!(stopped, Error::Store(_)) && stopped.to_string().contains("the clock has stopped"), "{stopped:?}");
    // Nothing of it is in the way of the next one.
    Coordinator::open(backend).await.unwrap().close().await.unwrap();
}

/// A clock that stands still until it is turned.
#[derive(Debug)]
struct Turned(Mutex<DateTime<Utc>>);

impl Clock for Turned {
    fn now(&self) -> DateTime<Utc> {
        *self.0.lock().unwrap()
    }
}

#[tokio::test]
async fn a_clock_stays_in_the_hand_of_who_turns_it() {
    let clock = Arc::new(Turned(Mutex::new(DateTime::UNIX_EPOCH)));
    let state = Coordinator::builder().clock(Arc::clone(&clock)).open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    *clock.0.lock().unwrap() += chrono::TimeDelta::days(3);
    state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    let node = state.get_node_state("r", "n").await.unwrap().unwrap();
    assert_eq!(node.finished_at, Some(clock.now()));
    state.close().await.unwrap();
    let shared: Arc<dyn Clock> = clock;
    let state = Coordinator::builder().clock(shared).open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.close().await.unwrap();
}

#[tokio::test]
async fn a_moment_of_a_wrong_clock_stamps_the_run_of_that_moment_alone() {
    let right = DateTime::UNIX_EPOCH + chrono::TimeDelta::days(20_000);
    let clock = Arc::new(Turned(Mutex::new(right)));
    let state = Coordinator::builder().clock(Arc::clone(&clock)).open(Arc::new(MemoryBackend::new())).await.unwrap();
    let set = |at| *clock.0.lock().unwrap() = at;
    state.create_run("before", NewRun::running()).await.unwrap();
    set(right + chrono::TimeDelta::days(365));
    state.create_run("astray", NewRun::running()).await.unwrap();
    set(right + chrono::TimeDelta::seconds(1));
    for run in ["after", "last"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    let page = state.list_runs(&RunQuery::default()).await.unwrap();
    let ids: Vec<_> = page.runs.iter().map(|run| run.run_id.as_str()).collect();
    assert_eq!(ids, ["astray", "last", "after", "before"]);
    assert!(page.runs.iter().skip(1).all(|run| run.header.created_at <= right + chrono::TimeDelta::seconds(2)), "{page:?}");
    state.close().await.unwrap();
}

#[test]
fn without_a_runtime_or_its_timers_it_is_refused_in_words() {
    let refused = |opened: Result<Coordinator, Error>| {
        let error = opened.unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error:?}");
        error.to_string()
    };
    let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
    let bare = Builder::new_current_thread().build().unwrap();
    let told = refused(bare.block_on(Coordinator::open(Arc::clone(&backend))));
    assert!(told.contains("enable_time"), "{told}");

    let mut opening = pin!(Coordinator::open(Arc::clone(&backend)));
    let Poll::Ready(opened) = opening.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("it waits for nothing")
    };
    let told = refused(opened);
    assert!(told.contains("tokio runtime"), "{told}");

    let with_timers = Builder::new_current_thread().enable_time().build().unwrap();
    with_timers.block_on(async { Coordinator::open(backend).await.unwrap().close().await.unwrap() });
}

#[tokio::test]
async fn who_goes_away_while_it_is_opened_is_not_in_the_way_of_himself() {
    let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
    {
        let mut opening = pin!(Coordinator::open(Arc::clone(&backend)));
        assert!(opening.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let state = Coordinator::open(Arc::clone(&backend)).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    drop(state);
    let next = Coordinator::open(Arc::clone(&backend)).await.unwrap();
    assert!(next.get_run("r").await.unwrap().is_some());
    next.close().await.unwrap();
}

/// Two of them would grant the same lock twice, and neither would see what the other writes.
#[tokio::test]
async fn one_opening_at_a_time_of_a_state_in_memory() {
    let memory = MemoryBackend::new();
    let open = || Coordinator::open(Arc::new(memory.clone()));
    let refused = |opened: Result<Coordinator, Error>| {
        let error = opened.unwrap_err();
        assert!(matches!(&error, Error::Store(error) if error.kind() == StoreErrorKind::Busy), "{error:?}");
        assert!(error.to_string().contains("close it first"), "{error}");
    };
    let state = open().await.unwrap();
    refused(open().await);
    state.create_run("r", NewRun::running()).await.unwrap();
    let lock = state.acquire_lock("r", Duration::ZERO).await.unwrap();
    refused(open().await);
    assert!(lock.is_some_and(|lock| !lock.is_lost()), "who is refused takes nothing along");
    state.close().await.unwrap();
    let next = open().await.unwrap();
    assert!(next.get_run("r").await.unwrap().is_some());
    // Also a value that nobody closes makes room when it goes.
    let unclosed = memory.clone();
    refused(Coordinator::open(Arc::new(unclosed.clone())).await);
    next.close().await.unwrap();
    unclosed.initialize().await.unwrap();
    refused(open().await);
    drop(unclosed);
    open().await.unwrap().close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_closed_because_opening_it_panicked_is_opened_by_nobody_meanwhile() {
    let falling = Arc::new(Falling { closes: Some(Notify::new()), ..Falling::default() });
    let backend: Arc<dyn StateBackend> = Arc::clone(&falling) as _;
    let first = tokio::spawn(Coordinator::open(Arc::clone(&backend)));
    falling.closing.notified().await;
    let early = tokio::time::timeout(Duration::from_secs(5), Coordinator::open(Arc::clone(&backend))).await;
    assert!(early.is_err(), "it is being closed: {early:?}");
    assert_eq!(falling.opened.load(Ordering::SeqCst), 1);
    falling.closes.as_ref().unwrap().notify_one();
    assert!(first.await.unwrap().unwrap_err().to_string().contains("the ladder slipped"));
    falling.closes.as_ref().unwrap().notify_one();
    assert!(Coordinator::open(backend).await.unwrap_err().to_string().contains("the ladder slipped"));
}

/// Its runtime stands still, or its storage never answers: that is told, as what may pass.
#[test]
fn one_that_is_never_closed_is_not_waited_for_without_an_end() {
    let told = |opened: Result<Coordinator, Error>| {
        let error = opened.unwrap_err();
        assert!(matches!(error, Error::Store(_)) && error.is_retryable(), "{error:?}");
        assert!(error.to_string().contains("keep the runtime going"), "{error}");
    };
    let own = Builder::new_current_thread().enable_all().build().unwrap();
    // Time goes on as soon as nobody has anything to do.
    let other = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
    drop(own.block_on(Coordinator::open(Arc::clone(&backend))).unwrap());
    told(other.block_on(Coordinator::open(Arc::clone(&backend))));
    drop(own);
    other.block_on(async { Coordinator::open(backend).await.unwrap().close().await.unwrap() });

    let hanging: Arc<dyn StateBackend> = Arc::new(Falling { hangs: true, ..Falling::default() });
    other.block_on(async {
        let opening = tokio::time::timeout(Duration::from_secs(5), Coordinator::open(Arc::clone(&hanging))).await;
        assert!(opening.is_err(), "{opening:?}");
        told(Coordinator::open(hanging).await);
    });
}

#[cfg(all(feature = "file", feature = "sqlite"))]
mod everywhere {
    use super::{Arc, Coordinator, Error, NewRun, NodeUpdate};
    use crate::support::Store;

    on_every_backend!(one_coordinator_for_one_value_of_a_backend);

    async fn one_coordinator_for_one_value_of_a_backend(store: Store) {
        let backend = store.backend();
        let state = Coordinator::open(Arc::clone(&backend)).await.unwrap();
        state.create_run("r", NewRun::running()).await.unwrap();
        for _ in 0..2 {
            let second = Coordinator::open(Arc::clone(&backend)).await.unwrap_err();
            assert!(matches!(second, Error::Input(_)) && !second.is_retryable(), "{second:?}");
            assert!(second.to_string().contains("create_state_backend"), "{second}");
        }
        state.clone().set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
        state.close().await.unwrap();
        // Closed, it is open in none; whether it can be opened again is its own matter.
        match Coordinator::open(backend).await {
            Ok(again) => {
                assert!(again.get_run("r").await.unwrap().is_some());
                again.close().await.unwrap();
            }
            Err(closed) => {
                assert!(matches!(closed, Error::Store(_)), "{closed:?}");
                assert!(closed.to_string().contains("create_state_backend"), "{closed}");
            }
        }
        if store.backend != "memory" {
            let next = store.open().await;
            assert!(next.get_run("r").await.unwrap().is_some());
            next.close().await.unwrap();
        }
    }
}
