//! Closing that is cut off in the middle: what it leaves open is given up by who waits for it, or closes next.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use crate::support::LyingBackend;
use seeknal_state::model::{Batch, BatchAnswer};
use seeknal_state::store::BoxFuture;
use seeknal_state::{
    Coordinator, Durability, Error, LeaseRecord, MemoryBackend, NewRun, NodeUpdate, OpenReport, RunId, RunPage, RunQuery,
    RunState, StateBackend, StoreError, StreamError,
};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

/// Longer than anything here takes, however busy the machine is.
const LONG: Duration = Duration::from_secs(20);

/// One that stands still whenever nobody is in its `block_on`.
fn workers() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    let Ok(done) = tokio::time::timeout(LONG, future).await else { panic!("{what}: it never ended") };
    done
}

/// Polls it once.
async fn begin(mut future: Pin<&mut impl Future>) {
    poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// Closing has begun, and goes as far as it can.
async fn is_closing(state: &Coordinator) {
    in_time("closing begins", async {
        while !state.is_closed() {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// One deferred write is acknowledged that storage does not take, and closing has begun.
async fn closing_waits_for_a_deferred_write(state: &Coordinator, backend: &LyingBackend) {
    state.create_run("r", NewRun::running()).await.unwrap();
    backend.close_gate();
    state.with_durability(Durability::Deferred).set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    begin(pin!(state.close())).await;
    is_closing(state).await;
}

/// A memory backend whose closing waits, or has a bug.
#[derive(Debug)]
struct Fragile {
    inner: MemoryBackend,
    /// How often it was closed, and the permits for that; none: it panics.
    closes: AtomicUsize,
    gate: Option<Semaphore>,
}

impl Fragile {
    fn new(gate: Option<Semaphore>) -> Arc<Self> {
        Arc::new(Self { inner: MemoryBackend::new(), closes: AtomicUsize::new(0), gate })
    }
}

impl StateBackend for Fragile {
    fn name(&self) -> &'static str {
        "fragile"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.inner.initialize()
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

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async {
            self.closes.fetch_add(1, Ordering::SeqCst);
            let Some(gate) = &self.gate else { panic!("the door fell off") };
            gate.acquire().await.unwrap().forget();
            self.inner.close().await
        })
    }
}

#[cfg(all(feature = "file", feature = "sqlite"))]
#[test]
fn storage_is_given_up_where_the_runtime_ends_while_it_is_closed() {
    for backend in ["file", "database"] {
        for waited_for in [true, false] {
            let store = crate::support::Store::of(backend);
            let (own, other) = (workers(), workers());
            let state = own.block_on(Coordinator::builder().max_in_flight(1).open(store.backend())).unwrap();
            let mut events = state.subscribe();
            // A write that was given its permit and is not polled: closing waits for it.
            let mut unpolled = Box::pin(state.set_node_state("r", "b", NodeUpdate::success()));
            own.block_on(async {
                state.create_run("r", NewRun::running()).await.unwrap();
                let mut first = Box::pin(state.set_node_state("r", "a", NodeUpdate::success()));
                begin(first.as_mut()).await;
                begin(unpolled.as_mut()).await;
                first.await.unwrap();
                assert_eq!(state.stats().permits_available, 0);
                if !waited_for {
                    begin(pin!(state.close())).await;
                    is_closing(&state).await;
                }
            });
            let waiting = waited_for.then(|| {
                let (state, another) = (state.clone(), workers());
                std::thread::spawn(move || another.block_on(in_time("closing", state.close())))
            });
            own.block_on(is_closing(&state));
            drop(own);
            if let Some(waiting) = waiting {
                waiting.join().unwrap().unwrap();
            }
            other.block_on(async {
                in_time("the stream ends", async { while !matches!(events.next().await, Err(StreamError::Closed)) {} }).await;
                in_time("closing again", state.close()).await.unwrap();
                let next = in_time("opening", store.open()).await;
                assert!(next.get_node_state("r", "a").await.unwrap().is_some(), "{backend}");
                next.close().await.unwrap();
                let refused = in_time("the write", unpolled).await;
                assert!(matches!(refused, Err(Error::Closed)), "{backend}: {refused:?}");
            });
        }
    }
}

#[test]
fn what_was_lost_with_it_is_told_by_who_closes_next() {
    let (own, other) = (workers(), workers());
    let backend = LyingBackend::new(false);
    let state = own.block_on(Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>)).unwrap();
    own.block_on(closing_waits_for_a_deferred_write(&state, &backend));
    drop(own);
    let told = other.block_on(in_time("closing", state.close()));
    assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.lost == 1), "{told:?}");
    other.block_on(in_time("closing again", state.close())).unwrap();
}

/// Who waits on a thread of its own hears of the cut while the runtime is still dropping what it ran.
#[test]
fn what_was_lost_with_it_is_told_to_who_waits_for_it() {
    const RUNS: usize = 100;
    for round in 0..4 {
        let own = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let backend = LyingBackend::new(false);
        let state = own.block_on(Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>)).unwrap();
        own.block_on(async {
            for run in 0..RUNS {
                state.create_run(format!("r{run}"), NewRun::running()).await.unwrap();
            }
            backend.close_gate();
            let deferred = state.with_durability(Durability::Deferred);
            for run in 0..RUNS {
                deferred.set_node_state(format!("r{run}"), "n", NodeUpdate::success()).await.unwrap();
            }
        });
        let waiting = state.clone();
        let waiting = std::thread::spawn(move || workers().block_on(in_time("closing", waiting.close())));
        own.block_on(is_closing(&state));
        drop(own);
        let told = waiting.join().unwrap();
        assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.lost == RUNS as u64), "{round}: {told:?}");
        workers().block_on(in_time("closing again", state.close())).unwrap();
    }
}

/// As long as nobody ends that closing, nobody else waits for its end.
#[test]
fn who_opens_the_same_value_after_a_closing_that_was_cut_off_is_told_what_to_do() {
    let (own, other) = (workers(), workers());
    let backend = LyingBackend::new(false);
    let value: Arc<dyn StateBackend> = Arc::clone(&backend) as _;
    let state = own.block_on(Coordinator::open(Arc::clone(&value))).unwrap();
    own.block_on(closing_waits_for_a_deferred_write(&state, &backend));
    // Also who waited for it already.
    let mut early = Box::pin(Coordinator::open(Arc::clone(&value)));
    other.block_on(begin(early.as_mut()));
    drop(own);
    for refused in
        [other.block_on(in_time("opening", early)), other.block_on(in_time("opening", Coordinator::open(Arc::clone(&value))))]
    {
        let error = refused.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("call `close` on that one once more"), "{error}");
    }
    other.block_on(in_time("closing", state.close())).unwrap_err();
    backend.open_gate();
    let again = other.block_on(in_time("opening", Coordinator::open(value))).unwrap();
    other.block_on(in_time("closing that one", again.close())).unwrap();
}

/// A second call to the backend could answer before the first one is done.
#[test]
fn a_backend_that_is_being_closed_is_waited_for() {
    let (own, other) = (workers(), workers());
    let fragile = Fragile::new(Some(Semaphore::new(0)));
    let backend: Arc<dyn StateBackend> = Arc::clone(&fragile) as _;
    let state = own.block_on(Coordinator::open(Arc::clone(&backend))).unwrap();
    own.block_on(async {
        begin(pin!(state.close())).await;
        is_closing(&state).await;
        assert_eq!(fragile.closes.load(Ordering::SeqCst), 1);
    });
    drop(own);
    other.block_on(async {
        let mut closing = Box::pin(state.close());
        for _ in 0..100 {
            begin(closing.as_mut()).await;
            tokio::task::yield_now().await;
        }
        fragile.gate.as_ref().unwrap().add_permits(1);
        in_time("closing", closing).await.unwrap();
        assert_eq!(fragile.closes.load(Ordering::SeqCst), 1);
        // From here on it is nobody's.
        let again = in_time("opening", Coordinator::open(backend)).await.unwrap();
        fragile.gate.as_ref().unwrap().add_permits(1);
        in_time("closing that one", again.close()).await.unwrap();
    });
}

#[tokio::test]
async fn a_backend_that_panics_while_it_is_closed_is_told() {
    let fragile = Fragile::new(None);
    let state = Coordinator::open(Arc::clone(&fragile) as Arc<dyn StateBackend>).await.unwrap();
    let mut events = state.subscribe();
    let told = in_time("closing", state.close()).await;
    assert!(matches!(&told, Err(Error::Store(error)) if error.to_string().contains("panicked")), "{told:?}");
    in_time("closing again", state.close()).await.unwrap();
    assert!(matches!(in_time("the stream ends", events.next()).await, Err(StreamError::Closed)));
    assert_eq!(fragile.closes.load(Ordering::SeqCst), 1);
}
