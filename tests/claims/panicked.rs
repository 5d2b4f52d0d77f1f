//! Attempts that count: a worker that panics has made one, and failed. And what runs when they are used up.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::support::Store;
use seeknal_state::{Claim, ClaimFilter, NewRun, Next, NodeStatus, NodeUpdate};

const RUN: &str = "run_1";
const LONG: Duration = Duration::from_secs(20);
const TTL: Duration = Duration::from_secs(3_600);

on_every_backend!(an_attempt_whose_worker_panics_counts, a_node_that_used_up_its_attempts_runs_again_when_it_is_given_more);

/// With its worker's own claim on its stack.
async fn panics_in_a_task(claim: Claim) {
    let work = async move {
        tokio::task::yield_now().await;
        assert_eq!(claim.node_id(), "n");
        panic!("the worker of attempt {} panics, as it is to", claim.attempt());
    };
    assert!(tokio::spawn(work).await.unwrap_err().is_panic());
}

fn panics_in_a_thread(claim: Claim) {
    let work = move || panic!("the worker of attempt {} panics, as it is to", claim.attempt());
    std::thread::spawn(work).join().unwrap_err();
}

async fn an_attempt_whose_worker_panics_counts(store: Store) {
    let state = store.open().await;
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    tx.set_node_state(RUN, "n", NodeUpdate::pending().max_attempts(3));
    tx.commit().await.unwrap();
    let filter = ClaimFilter::new().owner("worker").ttl(TTL).wait(LONG);
    let mut attempts = Vec::new();
    while attempts.len() < 6
        && let Next::Claimed(claim) = state.claim_next(RUN, filter.clone()).await.unwrap()
    {
        attempts.push(claim.attempt());
        match attempts.len() {
            // Whoever is there beside a panic has not panicked.
            1 => {
                assert!(tokio::spawn(async { panic!("somebody else's") }).await.is_err());
                drop(claim);
            }
            3 => panics_in_a_thread(claim),
            _ => panics_in_a_task(claim).await,
        }
    }
    assert_eq!(attempts, [1, 1, 2, 3], "the first was given back, the others count");
    let node = state.fresh(RUN).await.unwrap().unwrap().node("n").unwrap().clone();
    assert_eq!((&node.status, node.attempt), (&NodeStatus::Failed, 3));
    let errors = node.attempts.iter().map(|past| past.error.as_deref()).chain([node.error.as_deref()]);
    assert!(errors.clone().eq([Some("its worker panicked"); 3]), "{:?}", errors.collect::<Vec<_>>());
    // Where locks live in the process they are free a moment behind the commit.
    let patience = tokio::time::Instant::now() + LONG;
    while !state.list_locks().await.unwrap().is_empty() {
        assert!(tokio::time::Instant::now() < patience, "its lock is held");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    state.close().await.unwrap();
}

async fn a_node_that_used_up_its_attempts_runs_again_when_it_is_given_more(store: Store) {
    let state = store.open().await;
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    tx.set_node_state(RUN, "n", NodeUpdate::pending().max_attempts(1));
    tx.commit().await.unwrap();
    let filter = ClaimFilter::new().owner("worker").ttl(TTL).wait(LONG);
    let mut made = Vec::new();
    for more in [0, 2, 1] {
        if more > 0 {
            let used_up = state.get_node_state(RUN, "n").await.unwrap().unwrap();
            let again = NodeUpdate::pending().max_attempts(used_up.attempt + more);
            state.set_node_state(RUN, "n", again).await.unwrap();
        }
        let mut attempts = Vec::new();
        while let Next::Claimed(claim) = state.claim_next(RUN, filter.clone()).await.unwrap() {
            attempts.push(claim.attempt());
            claim.retry("broken").await.unwrap();
        }
        made.push(attempts);
    }
    assert_eq!(made, [vec![1], vec![2, 3], vec![4]]);
    // Asked to run and given no more, it is tried once.
    state.set_node_state(RUN, "n", NodeUpdate::pending()).await.unwrap();
    let claim = state.claim_next(RUN, filter.clone()).await.unwrap().claimed().unwrap();
    assert_eq!(claim.attempt(), 5);
    claim.retry("broken").await.unwrap();
    let node = state.get_node_state(RUN, "n").await.unwrap().unwrap();
    assert_eq!((&node.status, node.attempts.len()), (&NodeStatus::Failed, 4));
    state.close().await.unwrap();
}
