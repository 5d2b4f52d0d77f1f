//! What was sent and is not in storage yet: who sees it, and under which lock it stands.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::faults::open;
use crate::support::LyingBackend;
use seeknal_state::{Durability, Error, Event, NewRun, NodeUpdate};

#[tokio::test]
async fn what_is_on_its_way_behind_a_commit_is_not_seen_with_it() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let sent = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let write = |node: &'static str| {
        let state = state.clone();
        tokio::spawn(async move { state.set_node_state("r", node, NodeUpdate::running()).await })
    };
    let first = write("first");
    backend.arrived(sent + 1).await;
    let second = write("second");
    // On one thread: everybody has had his turn.
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    backend.gate.add_permits(1);
    first.await.unwrap().unwrap();
    backend.arrived(sent + 2).await;
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    let seen = state.snapshot("r").unwrap();
    assert!(seen.node("first").is_some());
    assert!(!second.is_finished());
    assert!(seen.node("second").is_none(), "storage has not taken it yet");
    backend.open_gate();
    second.await.unwrap().unwrap();
    assert!(state.snapshot("r").unwrap().node("second").is_some());
    state.close().await.unwrap();
}

#[tokio::test]
async fn a_deferred_write_under_a_lock_is_answered_by_storage() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let lease = state.acquire_lock("r", Duration::ZERO).await.unwrap().expect("free");
    let fenced = state.with_lease(&lease).with_durability(Durability::Deferred);
    let commit = fenced.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    assert!(commit.seq.is_some(), "what is written under a lock is durable whatever was asked for");
    lease.release().await.unwrap();
    let refused = fenced.set_node_state("r", "n", NodeUpdate::success()).await;
    assert!(matches!(&refused, Err(Error::LeaseLost(_))), "{refused:?}");
    state.close().await.unwrap();
}

#[tokio::test]
async fn a_transaction_of_who_has_a_lease_is_under_it() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    state.create_run("s", NewRun::running()).await.unwrap();
    let lease = state.acquire_lock("r", Duration::ZERO).await.unwrap().expect("free");
    let fenced = state.with_lease(&lease);
    lease.release().await.unwrap();
    for runs in [&["r"][..], &["r", "s"]] {
        let mut tx = fenced.transaction();
        for run in runs {
            tx.set_node_state(*run, "n", NodeUpdate::running());
        }
        let refused = tx.commit().await;
        assert!(matches!(&refused, Err(Error::LeaseLost(_))), "{runs:?}: {refused:?}");
    }
    assert_eq!(state.stats().refused, 2, "and counted");
    state.close().await.unwrap();
}

#[tokio::test]
async fn who_goes_away_from_a_transaction_over_several_runs_that_was_sent_leaves_it_whole() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    state.create_run("s", NewRun::running()).await.unwrap();
    let sent = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let mut tx = state.transaction();
    tx.set_node_state("r", "n", NodeUpdate::running()).set_node_state("s", "n", NodeUpdate::running());
    {
        let commit = tx.commit();
        tokio::pin!(commit);
        tokio::select! {
            _ = &mut commit => panic!("the gate is closed"),
            () = backend.arrived(sent + 1) => {}
        }
    }
    backend.open_gate();
    state.set_node_state("r", "m", NodeUpdate::running()).await.unwrap();
    for run in state.snapshots(&["r", "s"]).await.unwrap() {
        assert!(run.unwrap().node("n").is_some(), "it was sent, and happened");
    }
    state.close().await.unwrap();
}

#[tokio::test]
async fn subscribers_hear_of_every_run_of_a_transaction_over_several() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    state.create_run("s", NewRun::running()).await.unwrap();
    let mut events = state.subscribe();
    let mut tx = state.transaction();
    tx.set_node_state("r", "n", NodeUpdate::running()).set_node_state("s", "n", NodeUpdate::running());
    tx.commit().await.unwrap();
    let mut runs = Vec::new();
    for _ in 0..2 {
        let event = tokio::time::timeout(Duration::from_secs(10), events.next()).await.expect("both are told of").unwrap();
        let Event::Changed(change) = event else { panic!("{event:?}") };
        runs.push(change.run.to_string());
    }
    runs.sort_unstable();
    assert_eq!(runs, ["r", "s"]);
    state.close().await.unwrap();
}
