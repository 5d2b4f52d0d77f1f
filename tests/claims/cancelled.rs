//! An operator who ends a node that is being worked on has the last word: what its worker notes meanwhile, or tells late, does not undo that.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use crate::support::Store;
use seeknal_state::{
    Claim, ClaimFilter, Commit, Coordinator, Error, LostReason, NewRun, Next, NodeStatus, NodeUpdate, OnDelete, Refusal,
};

const RUN: &str = "run_1";
const TTL: Duration = Duration::from_secs(3_600);
const LONG: Duration = Duration::from_secs(20);

on_every_backend!(
    a_cancelled_node_stays_so_whatever_its_worker_writes,
    who_waits_for_the_loss_of_his_claim_hears_that_its_node_was_ended,
    a_worker_whose_node_runs_notes_what_he_wants,
);

/// Who looks on: another opening, where there can be one.
async fn operator(store: &Store, state: &Coordinator) -> Coordinator {
    if store.backend == "database" { store.open().await } else { state.clone() }
}

async fn claimed(state: &Coordinator) -> Claim {
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    tx.set_node_state(RUN, "n", NodeUpdate::pending().max_attempts(3));
    tx.set_node_state(RUN, "other", NodeUpdate::running());
    tx.commit().await.unwrap();
    state.claim_node(RUN, "n", "worker", TTL).await.unwrap().unwrap()
}

async fn close(state: Coordinator, other: Coordinator) {
    other.close().await.unwrap();
    state.close().await.unwrap();
}

/// The ways in which a worker notes something of his own node.
const WAYS: [&str; 7] = ["plain", "at once", "interval", "transaction", "fenced by", "with the lease", "transact"];

async fn note(way: &str, state: &Coordinator, claim: &Claim) -> Result<Commit, Error> {
    let progress = || NodeUpdate::running().row_count(7);
    let fenced = claim.fenced();
    match way {
        "plain" => fenced.set_node_state(RUN, "n", progress()).await,
        "at once" => fenced.try_set_node_state(RUN, "n", progress()).await,
        "interval" => fenced.add_completed_interval(RUN, "n", ("2024-01-01", "2024-01-02")).await,
        "transaction" => {
            let mut tx = fenced.transaction();
            tx.set_node_state(RUN, "other", NodeUpdate::running()).set_node_state(RUN, "n", progress());
            tx.commit().await
        }
        "fenced by" => {
            let mut tx = state.transaction();
            tx.fenced_by(claim.lease().unwrap()).set_node_state(RUN, "n", progress());
            tx.commit().await
        }
        "with the lease" => state.with_lease(claim.lease().unwrap()).set_node_state(RUN, "n", progress()).await,
        _ => {
            let told = fenced.transact(|_, tx| {
                tx.set_node_state(RUN, "n", progress());
                Ok(())
            });
            told.await.map(|((), commit)| commit)
        }
    }
}

async fn a_cancelled_node_stays_so_whatever_its_worker_writes(store: Store) {
    let state = store.open().await;
    let operator = operator(&store, &state).await;
    for way in WAYS {
        let claim = claimed(&state).await;
        operator.set_node_state(RUN, "n", NodeUpdate::failed("cancelled")).await.unwrap();

        let refused = note(way, &state, &claim).await.unwrap_err();
        assert!(matches!(&refused, Error::Conflict(Refusal::Guard { .. })), "{way}: {refused:?}");
        assert!(claim.is_lost(), "{way}: he may stop");
        let reason = tokio::time::timeout(LONG, claim.lost()).await.unwrap();
        assert_eq!(reason, LostReason::Ended, "{way}");
        // Nobody else is handed it, though its worker has not said that he stops.
        assert!(operator.claim_node(RUN, "n", "another", TTL).await.unwrap().is_none(), "{way}");
        let told = claim.complete(NodeUpdate::success()).await.unwrap_err();
        assert_eq!(told.to_string(), refused.to_string(), "{way}");
        drop(claim);

        let none = operator.claim_next(RUN, ClaimFilter::new().nodes(["n"]).wait(LONG)).await.unwrap();
        assert!(matches!(none, Next::Drained { blocked: 0 }), "{way}: {none:?}");
        let node = operator.fresh(RUN).await.unwrap().unwrap().node("n").unwrap().clone();
        assert_eq!((&node.status, node.attempt, node.error.as_deref()), (&NodeStatus::Failed, 1, Some("cancelled")), "{way}");
        assert_eq!((node.row_count, node.intervals.len()), (None, 0), "{way}");
        let free = async {
            while !state.list_locks().await.unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        assert!(tokio::time::timeout(LONG, free).await.is_ok(), "{way}: its lock is not free");
        operator.delete_run(RUN, OnDelete::DropCoverage).await.unwrap();
    }
    close(state, operator).await;
}

async fn who_waits_for_the_loss_of_his_claim_hears_that_its_node_was_ended(store: Store) {
    let state = store.open().await;
    let operator = operator(&store, &state).await;
    for way in ["failed", "deleted"] {
        let claim = claimed(&state).await;
        assert!(!claim.is_lost());
        let ending = async {
            match way {
                "failed" => operator.set_node_state(RUN, "n", NodeUpdate::failed("cancelled")).await,
                _ => operator.delete_node(RUN, "n").await,
            }
        };
        let (reason, ended) = tokio::time::timeout(LONG, async { tokio::join!(claim.lost(), ending) }).await.unwrap();
        ended.unwrap();
        assert_eq!((reason, claim.is_lost()), (LostReason::Ended, true), "{way}");
        let told = claim.complete(NodeUpdate::success()).await.unwrap_err();
        assert!(told.is_conflict(), "{way}: {told}");
        drop(claim);
        operator.delete_run(RUN, OnDelete::DropCoverage).await.unwrap();
    }
    close(state, operator).await;
}

async fn a_worker_whose_node_runs_notes_what_he_wants(store: Store) {
    let state = store.open().await;
    let claim = claimed(&state).await;
    for way in WAYS {
        note(way, &state, &claim).await.unwrap_or_else(|error| panic!("{way}: {error}"));
    }
    // Of other nodes he may say what he wants as long as he holds his own, whatever they are.
    claim.fenced().set_node_state(RUN, "other", NodeUpdate::failed("broken")).await.unwrap();
    claim.fenced().set_node_state(RUN, "new", NodeUpdate::pending()).await.unwrap();
    assert!(!claim.is_lost());
    claim.complete(NodeUpdate::success()).await.unwrap();
    let node = state.get_node_state(RUN, "n").await.unwrap().unwrap();
    assert_eq!((node.status, node.attempt, node.row_count), (NodeStatus::Success, 1, Some(7)));
    state.close().await.unwrap();
}
