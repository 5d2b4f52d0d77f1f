//! How a coordinator is opened: where, on what, and what is said where that goes wrong.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use chrono::{DateTime, Utc};
use seeknal_state::model::{Batch, BatchAnswer};
use seeknal_state::store::BoxFuture;
use seeknal_state::{
    Clock, Coordinator, Error, LeaseRecord, MemoryBackend, NewRun, NodeUpdate, OpenReport, RunId, RunPage, RunQuery, RunState,
    StateBackend, StoreError,
};
use tokio::runtime::Builder;

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
struct Falling(MemoryBackend);

impl StateBackend for Falling {
    fn name(&self) -> &'static str {
        "falling"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async { panic!("the ladder slipped") })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.0.commit(batch)
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.0.load_run(run)
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.0.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.0.list_leases()
    }
}

#[tokio::test]
async fn an_opening_that_panics_says_so_and_why() {
    let fell = Coordinator::open(Arc::new(Falling::default())).await.unwrap_err();
    assert!(matches!(fell, Error::Store(_)), "{fell:?}");
    assert!(fell.to_string().contains("falling") && fell.to_string().contains("the ladder slipped"), "{fell}");

    let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
    let stopped = Coordinator::builder().clock(Stopped).open(Arc::clone(&backend)).await.unwrap_err();
    assert!(matches!(stopped, Error::Store(_)) && stopped.to_string().contains("the clock has stopped"), "{stopped:?}");
    // Nothing of it is in the way of the next one.
    Coordinator::open(backend).await.unwrap().close().await.unwrap();
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
