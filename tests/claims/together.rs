//! An end of a claim and what belongs to it: one commit, or none.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::support::Store;
use seeknal_state::{
    Claim, ClaimFilter, Coordinator, Error, LostReason, NewRun, NodeStatus, NodeUpdate, RunStatus, RunUpdate, Version,
};

const RUN: &str = "run_1";
const OTHER: &str = "run_2";
const TTL: Duration = Duration::from_secs(3_600);
const LONG: Duration = Duration::from_secs(20);
const DAY: (&str, &str) = ("2024-01-01", "2024-01-02");

on_every_backend!(
    what_was_completed_and_that_it_is_done_are_one_commit,
    an_end_over_several_runs_is_one_commit,
    an_end_whose_transaction_is_refused_can_be_told_again,
    an_end_that_comes_late_takes_its_transaction_along,
);

async fn begin(state: &Coordinator) {
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running()).create_run(OTHER, NewRun::running());
    for node in ["n", "twin"] {
        tx.set_node_state(RUN, node, NodeUpdate::pending().max_attempts(3));
    }
    tx.set_node_state(RUN, "behind", NodeUpdate::pending().depends_on(["n"]));
    tx.set_node_state(OTHER, "m", NodeUpdate::pending());
    tx.commit().await.unwrap();
}

async fn claim(state: &Coordinator, node: &str) -> Claim {
    state.claim_node(RUN, node, "worker", TTL).await.unwrap().unwrap()
}

async fn what_was_completed_and_that_it_is_done_are_one_commit(store: Store) {
    let state = store.open().await;
    begin(&state).await;
    let twin = claim(&state, "twin").await;
    let as_token = twin.token();
    twin.complete(NodeUpdate::success().row_count(7)).await.unwrap();
    let claim = claim(&state, "n").await;
    let mut tx = claim.fenced().transaction();
    tx.add_completed_interval(RUN, "n", DAY).add_completed_partition(RUN, "n", "dt=1");
    tx.expect_status(RUN, "twin", [NodeStatus::Success]);
    let commit = claim.complete_in(tx, NodeUpdate::new().row_count(7)).await.unwrap();
    assert_eq!(commit.runs.len(), 1);
    assert_eq!(commit.runs[0].after.0, commit.runs[0].before.0 + 1, "one commit");
    assert!(state.list_locks().await.unwrap().is_empty(), "the lease went with it");
    assert_eq!((claim.lost().await, claim.is_lost()), (LostReason::Ended, true));

    let run = state.fresh(RUN).await.unwrap().unwrap();
    let (node, twin) = (run.node("n").unwrap(), run.node("twin").unwrap());
    assert_eq!((node.intervals.len(), node.partitions.len(), node.version), (1, 1, commit.version()));
    assert_eq!((node.token, twin.token), (Some(claim.token()), Some(as_token)));
    let seen = |node: &seeknal_state::NodeState| {
        (node.status.clone(), node.attempt, node.worker.clone(), node.row_count, node.duration_ms.is_some(), node.attempts.len())
    };
    assert_eq!(seen(node), seen(twin));
    assert_eq!(node.status, NodeStatus::Success);

    let late = claim.complete_in(state.transaction(), NodeUpdate::success()).await.unwrap_err();
    assert!(late.is_lease_lost(), "{late}");
    state.close().await.unwrap();
}

async fn an_end_over_several_runs_is_one_commit(store: Store) {
    let state = store.open().await;
    begin(&state).await;
    let claimed = claim(&state, "n").await;
    let waiting = tokio::spawn({
        let state = state.clone();
        async move { state.claim_next(RUN, ClaimFilter::new().nodes(["behind"]).wait(LONG)).await.unwrap().claimed() }
    });
    let mut tx = state.transaction();
    tx.add_completed_interval(RUN, "n", DAY).set_node_state(OTHER, "m", NodeUpdate::cached());
    let commit = claimed.complete_in(tx, NodeUpdate::success()).await.unwrap();
    assert_eq!(commit.runs.len(), 2);
    let behind = waiting.await.unwrap().unwrap();
    let runs = state.snapshots(&[RUN, OTHER]).await.unwrap();
    let (one, other) = (runs[0].as_ref().unwrap(), runs[1].as_ref().unwrap());
    assert_eq!((&one.node("n").unwrap().status, one.node("n").unwrap().intervals.len()), (&NodeStatus::Success, 1));
    assert_eq!(other.node("m").unwrap().status, NodeStatus::Cached);
    assert_eq!(claimed.lost().await, LostReason::Ended);
    assert_eq!(state.list_locks().await.unwrap().len(), 1, "that of the node behind");
    // Its place is free for who works on it next.
    state.set_node_state(RUN, "n", NodeUpdate::pending()).await.unwrap();
    claim(&state, "n").await.release().await.unwrap();

    // The last end ends the run too.
    let mut tx = behind.fenced().transaction();
    tx.update_run(RUN, RunUpdate::success());
    behind.complete_in(tx, NodeUpdate::success()).await.unwrap();
    let run = state.fresh(RUN).await.unwrap().unwrap();
    assert_eq!((&run.header().status, &run.node("behind").unwrap().status), (&RunStatus::Success, &NodeStatus::Success));
    assert!(state.list_locks().await.unwrap().is_empty());
    state.close().await.unwrap();
}

async fn an_end_whose_transaction_is_refused_can_be_told_again(store: Store) {
    let state = store.open().await;
    let foreign = Store::of("memory").open().await;
    begin(&state).await;
    let claim = claim(&state, "n").await;
    let lost = state.acquire_lock("lock", TTL).await.unwrap().unwrap();
    state.force_unlock(lost.token()).await.unwrap();
    let cases = [
        "version",
        "status",
        "absent",
        "run status",
        "own run status",
        "other's status",
        "no run",
        "no node",
        "interval",
        "lease",
        "store",
    ];
    for case in cases {
        let mut tx = if case == "store" { foreign.transaction() } else { state.transaction() };
        tx.add_completed_interval(RUN, "n", DAY).set_node_state(RUN, "twin", NodeUpdate::skipped());
        match case {
            "version" => tx.expect_version(RUN, Version(1)),
            "status" => tx.expect_status(RUN, "twin", [NodeStatus::Success]),
            "absent" => tx.expect_absent(RUN, "twin"),
            "run status" => tx.expect_run_status(RUN, [RunStatus::Failed]),
            // As if it were the claim's own condition, and it is not.
            "own run status" => tx.expect_run_status(OTHER, [RunStatus::Pending]),
            "other's status" => tx.set_node_state(OTHER, "m", NodeUpdate::new()).expect_status(OTHER, "m", [NodeStatus::Running]),
            "no run" => tx.set_node_state("nowhere", "n", NodeUpdate::success()),
            "no node" => tx.delete_node(RUN, "nowhere"),
            "interval" => tx.add_completed_interval(RUN, "n", ("2024-01-02", "2024-01-01")),
            "lease" => tx.fenced_by(&lost),
            _ => &mut tx,
        };
        let error = claim.complete_in(tx, NodeUpdate::success()).await.unwrap_err();
        match case {
            "no run" | "no node" => assert!(error.is_not_found(), "{case}: {error}"),
            "interval" | "store" => assert!(matches!(&error, Error::Input(_)), "{case}: {error}"),
            "lease" => assert!(error.is_lease_lost(), "{case}: {error}"),
            _ => assert!(matches!(&error, Error::Conflict(_)), "{case}: {error}"),
        }
        assert!(!claim.is_lost(), "{case}: {error}");
        let run = state.fresh(RUN).await.unwrap().unwrap();
        let (node, twin) = (run.node("n").unwrap(), run.node("twin").unwrap());
        assert_eq!((&node.status, node.intervals.len()), (&NodeStatus::Running, 0), "{case}: {error}");
        assert_eq!(twin.status, NodeStatus::Pending, "{case}: {error}");
        claim.fenced().set_node_state(RUN, "n", NodeUpdate::running()).await.unwrap();
    }
    let no_end = claim.complete_in(state.transaction(), NodeUpdate::running()).await.unwrap_err();
    assert!(matches!(no_end, Error::Input(_)), "{no_end}");
    let mut tx = state.transaction();
    tx.add_completed_interval(RUN, "n", DAY).expect_run_status(RUN, [RunStatus::Running]);
    claim.complete_in(tx, NodeUpdate::success()).await.unwrap();
    foreign.close().await.unwrap();
    state.close().await.unwrap();
}

async fn an_end_that_comes_late_takes_its_transaction_along(store: Store) {
    let state = store.open().await;
    for (by, several) in [("cancelled", false), ("cancelled", true), ("forced", false), ("ended", false), ("ended", true)] {
        begin(&state).await;
        let claim = claim(&state, "n").await;
        match by {
            "cancelled" => drop(state.set_node_state(RUN, "n", NodeUpdate::failed("cancelled")).await.unwrap()),
            "forced" => drop(state.force_unlock(claim.token()).await.unwrap()),
            _ => drop(state.update_run(RUN, RunUpdate::cancelled()).await.unwrap()),
        }
        let mut tx = claim.fenced().transaction();
        tx.add_completed_interval(RUN, "n", DAY);
        if several {
            tx.set_node_state(OTHER, "m", NodeUpdate::success());
        }
        let error = claim.complete_in(tx, NodeUpdate::success()).await.unwrap_err();
        if by == "cancelled" {
            assert!(matches!(&error, Error::Conflict(_)), "{by}: {error}");
        } else {
            assert!(error.is_lease_lost(), "{by}: {error}");
        }
        assert!(claim.is_lost(), "{by}");
        drop(claim);
        let runs = state.snapshots(&[RUN, OTHER]).await.unwrap();
        assert!(runs[0].as_ref().unwrap().node("n").unwrap().intervals.is_empty(), "{by}");
        assert_eq!(runs[1].as_ref().unwrap().node("m").unwrap().status, NodeStatus::Pending, "{by}");
        for run in [RUN, OTHER] {
            state.delete_run(run, seeknal_state::OnDelete::DropCoverage).await.unwrap();
        }
    }
    state.close().await.unwrap();
}
