//! A crowd at one lock: served in its order, each woken for its own turn alone.
#![cfg(feature = "file")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use seeknal_state::{Coordinator, Lease, LeaseKey, LockOptions, NodeId, RunId};

use crate::support::Store;

type Waiting = Pin<Box<dyn Future<Output = Result<Option<Lease>, seeknal_state::Error>> + Send>>;

/// Nobody waits for so long, on however busy a machine.
const SOON: Duration = Duration::from_secs(60);

/// Asks, and has a place in the queue when it returns.
fn queue(state: &Coordinator, key: LeaseKey) -> Waiting {
    let state = state.clone();
    let mut waiting: Waiting = Box::pin(async move { state.acquire(key, LockOptions::new(), SOON).await });
    let polled = waiting.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending(), "it is held: {polled:?}");
    waiting
}

/// Answers how often those who wait were woken.
async fn all_have_a_turn(state: &Coordinator, key: LeaseKey, crowd: usize) -> usize {
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let first = state.acquire(key.clone(), LockOptions::new(), Duration::ZERO).await.unwrap().unwrap();
    let mut last = first.token();
    let polls = Arc::new(AtomicUsize::new(0));
    for number in 0..crowd {
        let (mut waiting, told, polls) = (queue(state, key.clone()), told.clone(), Arc::clone(&polls));
        tokio::spawn(async move {
            let granted = std::future::poll_fn(|context| {
                polls.fetch_add(1, Ordering::Relaxed);
                waiting.as_mut().poll(context)
            });
            let lease = granted.await.unwrap().unwrap_or_else(|| panic!("{number} had no turn"));
            told.send((number, lease.token())).unwrap();
            lease.release().await.unwrap();
        });
    }
    // All wait before the first has its turn.
    assert_eq!(state.list_locks().await.unwrap().len(), 1);
    drop(told);
    first.release().await.unwrap();
    for expected in 0..crowd {
        let (number, token) = heard.recv().await.unwrap();
        assert_eq!(number, expected, "first come, first served");
        assert!(token > last, "tokens grow with every grant");
        last = token;
    }
    assert_eq!(heard.recv().await, None, "nobody has two turns");
    polls.load(Ordering::Relaxed)
}

/// Grows with the crowd, not with its square: whoever waits is woken for its own turn alone.
async fn a_crowd_at_one_lock_is_served_in_its_order(backend: &'static str) {
    let store = Store::of(backend);
    let state = store.open().await;
    let run = RunId::new("r").unwrap();
    for (key, crowd) in [(LeaseKey::run(run.clone()), 2_000), (LeaseKey::node(run, NodeId::new("n").unwrap()), 8_000)] {
        let polls = all_have_a_turn(&state, key.clone(), crowd).await;
        // Once as it begins to wait, and once for its turn.
        assert!(polls <= 2 * crowd, "{backend}, {key}: {crowd} who wait were woken {polls} times");
    }
    state.close().await.unwrap();
}

#[tokio::test]
async fn in_memory() {
    a_crowd_at_one_lock_is_served_in_its_order("memory").await;
}

#[tokio::test]
async fn in_a_file() {
    a_crowd_at_one_lock_is_served_in_its_order("file").await;
}
