//! Claims in runs whose status is one of one's own, which is no end: who works there tells what became of it as anywhere else.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::support::Store;
use seeknal_state::{Claim, Coordinator, Error, NewRun, NodeStatus, NodeUpdate, RunStatus, RunUpdate};

const RUN: &str = "run_1";

on_every_backend!(
    work_in_a_queued_run_that_went_to_sleep_is_told,
    work_that_is_told_while_its_run_is_paused_is_taken,
    work_in_a_run_that_has_ended_is_not_told,
);

async fn begin(state: &Coordinator, status: RunStatus, nodes: &[&str]) -> Vec<Claim> {
    state.create_run(RUN, NewRun::status(status)).await.unwrap();
    let mut claims = Vec::new();
    for node in nodes {
        state.set_node_state(RUN, *node, NodeUpdate::pending().max_attempts(1)).await.unwrap();
        claims.push(state.claim_node(RUN, *node, "worker", Duration::from_secs(300)).await.unwrap().unwrap());
    }
    claims
}

/// Also what is given back there: by its worker, and as all is closed.
async fn work_in_a_queued_run_that_went_to_sleep_is_told(store: Store) {
    let builder = Coordinator::builder().idle_after(Duration::from_millis(1));
    let state = builder.open(store.backend()).await.unwrap();
    let asleep = async || {
        while state.stats().resident_runs > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let mut claims = begin(&state, RunStatus::parse("queued"), &["done", "released", "held"]).await.into_iter();
    asleep().await;
    claims.next().unwrap().complete(NodeUpdate::success()).await.unwrap();
    asleep().await;
    claims.next().unwrap().release().await.unwrap();
    asleep().await;
    state.close().await.unwrap();
    let state = store.open().await;
    // What is kept in memory went with it.
    if let Some(run) = state.get_run(RUN).await.unwrap() {
        let statuses = ["done", "released", "held"].map(|node| run.node(node).unwrap().status.clone());
        assert_eq!(statuses, [NodeStatus::Success, NodeStatus::Pending, NodeStatus::Pending]);
    }
    drop(claims);
    state.close().await.unwrap();
}

/// The run gets another status while an end is on its way.
async fn work_that_is_told_while_its_run_is_paused_is_taken(store: Store) {
    let state = store.open().await;
    for (round, claim) in begin(&state, RunStatus::Running, &["a", "b", "c", "d", "e", "f"]).await.into_iter().enumerate() {
        let paused = RunStatus::parse(&format!("paused {round}"));
        let (paused, told) =
            tokio::join!(state.update_run(RUN, RunUpdate::status(paused)), claim.complete(NodeUpdate::success()));
        paused.unwrap();
        told.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    state.close().await.unwrap();
}

async fn work_in_a_run_that_has_ended_is_not_told(store: Store) {
    let state = store.open().await;
    let claims = begin(&state, RunStatus::parse("queued"), &["a"]).await;
    let (ended, told) = tokio::join!(
        state.update_run(RUN, RunUpdate::status(RunStatus::Cancelled)),
        claims.first().unwrap().complete(NodeUpdate::success())
    );
    ended.unwrap();
    // It may have been faster.
    if let Err(error) = told {
        assert!(error.is_lease_lost() && matches!(error, Error::LeaseLost(_)), "{error}");
        assert_eq!(state.get_node_state(RUN, "a").await.unwrap().unwrap().status, NodeStatus::Running);
    }
    assert!(claims.first().unwrap().is_lost());
    state.close().await.unwrap();
}
