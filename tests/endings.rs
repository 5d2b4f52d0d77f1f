//! How claims and locks end, and what their holders are told, over a backend that lies.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use seeknal_state::{Claim, Coordinator, Durability, Error, NewRun, NodeState, NodeStatus, NodeUpdate, StateBackend};
use support::{Lie, LyingBackend};

const TTL: Duration = Duration::from_secs(30);

async fn with_node(state: &Coordinator) {
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::pending()).await.unwrap();
}

async fn claim(state: &Coordinator) -> Claim {
    state.claim_node("r", "n", "w", TTL).await.unwrap().unwrap()
}

async fn node(state: &Coordinator) -> NodeState {
    state.get_node_state("r", "n").await.unwrap().unwrap()
}

#[tokio::test]
async fn lost_writes_of_others_throw_no_finished_work_away() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    backend.tell([Lie::Full]);
    state.with_durability(Durability::Deferred).set_node_state("r", "other", NodeUpdate::running()).await.unwrap();
    while state.health().lost.is_empty() {
        tokio::task::yield_now().await;
    }
    claim.complete(NodeUpdate::success().row_count(7)).await.unwrap();
    assert_eq!((node(&state).await.status, node(&state).await.attempt), (NodeStatus::Success, 1));
    assert!(matches!(state.flush().await, Err(Error::DeferredLost(loss)) if loss.lost == 1), "it stays to be told");
    state.close().await.unwrap();
}

#[tokio::test]
async fn an_end_that_makes_no_sense_leaves_the_claim_with_its_worker() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::builder().max_transaction_bytes(4096).open(backend as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    for wrong in [NodeUpdate::running(), NodeUpdate::failed("x".repeat(8192))] {
        let error = claim.complete(wrong).await.unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error}");
        assert!(!claim.is_lost() && claim.lease().is_some());
        assert_eq!(node(&state).await.status, NodeStatus::Running, "nobody else gets it");
    }
    claim.complete(NodeUpdate::success()).await.unwrap();
    assert!(claim.is_lost() && claim.lease().is_none());
    let again = claim.complete(NodeUpdate::success()).await.unwrap_err();
    assert!(again.is_lease_lost(), "{again}");
    drop(claim);
    assert_eq!((node(&state).await.status, node(&state).await.attempt), (NodeStatus::Success, 1));
    assert_eq!(state.list_locks().await.unwrap(), []);
    state.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_end_that_storage_does_not_take_can_be_told_again() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    backend.tell([Lie::Full; 10]);
    let error = claim.complete(NodeUpdate::success()).await.unwrap_err();
    assert!(matches!(error, Error::Store(_)), "{error}");
    assert_eq!(node(&state).await.status, NodeStatus::Running);
    claim.complete(NodeUpdate::success()).await.unwrap();
    assert_eq!(node(&state).await.status, NodeStatus::Success);
    state.close().await.unwrap();
}
