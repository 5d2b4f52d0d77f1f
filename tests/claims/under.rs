//! Claims that are taken under another lease: where that one is lost, the claim is not.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::support::Store;
use seeknal_state::{
    Claim, ClaimFilter, Commit, Coordinator, Error, Lease, NewRun, Next, NodeState, NodeStatus, NodeUpdate, RunUpdate,
};

const RUN: &str = "run_1";
const OTHER: &str = "orchestrator";
const TTL: Duration = Duration::from_secs(30);

async fn node(state: &Coordinator) -> NodeState {
    state.fresh(RUN).await.unwrap().unwrap().node("n").unwrap().clone()
}

/// A claim under the lock on another run.
async fn claimed(state: &Coordinator) -> (Claim, Lease) {
    state.create_run(OTHER, NewRun::running()).await.unwrap();
    let lock = state.acquire_lock(OTHER, TTL).await.unwrap().unwrap();
    let claim = state.with_lease(&lock).claim_node(RUN, "n", "w", TTL).await.unwrap().unwrap();
    assert_eq!(claim.attempt(), 1);
    (claim, lock)
}

async fn lose(state: &Coordinator, lock: Lease, by_end: bool) {
    if by_end {
        state.update_run(OTHER, RunUpdate::success()).await.unwrap();
    } else {
        state.force_unlock(lock.token()).await.unwrap();
    }
    lock.lost().await;
    state.delete_run(OTHER, seeknal_state::OnDelete::DropCoverage).await.unwrap();
}

fn assert_refused(told: Result<Commit, Error>, lock: &str) {
    let error = told.unwrap_err();
    assert!(matches!(&error, Error::LeaseLost(_)) && error.to_string().contains(lock), "{error}");
}

async fn one_node(state: &Coordinator) {
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    tx.set_node_state(RUN, "n", NodeUpdate::pending().max_attempts(1));
    tx.commit().await.unwrap();
}

on_every_backend!(an_end_under_a_lost_lease_leaves_the_claim, who_lost_another_lease_gives_his_claim_back);

async fn an_end_under_a_lost_lease_leaves_the_claim(store: Store) {
    let state = store.open().await;
    one_node(&state).await;
    for by_end in [false, true] {
        let (claim, lock) = claimed(&state).await;
        lose(&state, lock, by_end).await;
        for _ in 0..2 {
            assert_refused(claim.complete(NodeUpdate::success()).await, OTHER);
            assert_refused(claim.retry("late").await, OTHER);
            assert!(!claim.is_lost());
        }
        // His own claim still keeps others out.
        let seen = node(&state).await;
        assert_eq!((seen.status, seen.attempt), (NodeStatus::Running, 1), "by its end: {by_end}");
        assert!(state.claim_node(RUN, "n", "v", TTL).await.unwrap().is_none());
        claim.fenced().set_node_state(RUN, "n", NodeUpdate::new().row_count(1)).await.unwrap_err();
        drop(claim);

        let next = state.claim_next(RUN, ClaimFilter::new().wait(TTL)).await.unwrap();
        let Next::Claimed(again) = next else { panic!("its worker lives, and gave back what it could not end: {next:?}") };
        assert_eq!((again.attempt(), again.node_state().attempts.len()), (1, 0));
        again.release().await.unwrap();
    }
    state.close().await.unwrap();
}

async fn who_lost_another_lease_gives_his_claim_back(store: Store) {
    let state = store.open().await;
    one_node(&state).await;
    for by_end in [false, true] {
        let (claim, lock) = claimed(&state).await;
        lose(&state, lock, by_end).await;
        claim.release().await.unwrap();
        let seen = node(&state).await;
        assert_eq!((seen.status, seen.attempt, seen.attempts.len()), (NodeStatus::Pending, 1, 0), "by its end: {by_end}");
        assert_eq!(state.list_locks().await.unwrap(), []);
    }
    state.close().await.unwrap();
}
