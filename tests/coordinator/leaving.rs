//! What is on its way for a run when a lock on it goes: it comes to rest before anybody else has the lock.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use crate::support::LyingBackend;
use seeknal_state::{Coordinator, Durability, Lease, LostReason, NewRun, NodeUpdate, RunId, StateBackend};

const NOW: Duration = Duration::ZERO;
/// Time goes on only when nobody has anything to do: whatever can happen before it is over has happened.
const A_WHILE: Duration = Duration::from_secs(5);
const LONG: Duration = Duration::from_secs(3600);

async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state
}

/// Somebody holds the run, and what he wrote is on its way to storage, which takes nothing yet.
async fn deferred_under_a_lock() -> (Arc<LyingBackend>, Coordinator, Lease) {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let lease = state.acquire_lock("r", NOW).await.unwrap().expect("free");
    backend.close_gate();
    let deferred = state.with_durability(Durability::Deferred);
    deferred.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    (backend, state, lease)
}

/// What storage has of the node.
async fn stored(backend: &LyingBackend) -> Option<u64> {
    let run = backend.inner.load_run(&RunId::new("r").unwrap()).await.unwrap().unwrap();
    run.node("n").and_then(|node| node.row_count)
}

#[tokio::test(start_paused = true)]
async fn what_was_deferred_under_a_lock_is_stored_before_it_is_released() {
    let (backend, state, lease) = deferred_under_a_lock().await;
    let mut releasing = tokio::spawn(lease.release());
    let early = tokio::time::timeout(A_WHILE, &mut releasing).await;
    assert!(early.is_err(), "it was released before storage had what was written under it: {early:?}");
    assert!(state.acquire_lock("r", NOW).await.unwrap().is_none(), "it is not free yet");
    backend.open_gate();
    releasing.await.unwrap().unwrap();
    assert_eq!(stored(&backend).await, Some(1));
    state.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_was_deferred_under_a_lock_that_is_lost_is_stored_before_the_next_one_has_it() {
    let (backend, state, lease) = deferred_under_a_lock().await;
    let mut next = tokio::spawn({
        let state = state.clone();
        async move { state.acquire_lock("r", LONG).await }
    });
    state.force_unlock(lease.token()).await.unwrap();
    assert_eq!(lease.lost().await, LostReason::Forced);
    let early = tokio::time::timeout(A_WHILE, &mut next).await;
    assert!(early.is_err(), "the next one has it before storage has what was written under it: {early:?}");
    backend.open_gate();
    let next = next.await.unwrap().unwrap().expect("it is free now");
    assert_eq!(stored(&backend).await, Some(1), "it was seen, and the next holder begins with it");
    drop((lease, next));
    state.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_on_its_way_when_its_lock_is_released_is_covered_by_it() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let lease = state.acquire_lock("r", NOW).await.unwrap().expect("free");
    let sent = backend.commits.load(std::sync::atomic::Ordering::SeqCst);
    backend.close_gate();
    let fenced = state.with_lease(&lease);
    let write = tokio::spawn(async move { fenced.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await });
    backend.arrived(sent + 1).await;
    let mut releasing = tokio::spawn(lease.release());
    let early = tokio::time::timeout(A_WHILE, &mut releasing).await;
    assert!(early.is_err(), "it was released while what it covers is on its way: {early:?}");
    backend.open_gate();
    write.await.unwrap().expect("it was sent while the lock was held");
    releasing.await.unwrap().unwrap();
    let next = state.acquire_lock("r", NOW).await.unwrap().expect("free");
    let seen = state.snapshot("r").unwrap();
    assert_eq!(seen.node("n").and_then(|node| node.row_count), Some(1), "the next holder's first look shows it");
    drop(next);
    state.close().await.unwrap();
}
