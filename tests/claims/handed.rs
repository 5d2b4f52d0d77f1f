//! Work that is handed from one to another: whoever waits for it gets it when it is there, not at the next look.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::time::{Duration, Instant};

use crate::stalls::Witness;
use crate::support::Store;
use seeknal_state::{Claim, ClaimFilter, Coordinator, NewRun, NodeStatus, NodeUpdate, OnDelete};
use tokio::task::{JoinHandle, JoinSet};

const RUN: &str = "run_1";
/// Who sleeps until the next look sleeps for a second. A machine that keeps everybody waiting proves nothing: see [`Witness`].
const MISSED: Duration = Duration::from_millis(700);

fn wait_for(state: &Coordinator, run: &str) -> JoinHandle<Claim> {
    let (state, run) = (state.clone(), run.to_owned());
    tokio::spawn(async move {
        let filter = ClaimFilter::new().wait(Duration::from_secs(20));
        state.claim_next(&run, filter).await.unwrap().claimed().unwrap()
    })
}

on_every_backend!(a_node_that_is_given_back_is_handed_to_who_waits);

async fn a_node_that_is_given_back_is_handed_to_who_waits(store: Store) {
    let state = store.open().await;
    state.create_run(RUN, NewRun::running()).await.unwrap();
    state.set_node_state(RUN, "n", NodeUpdate::pending()).await.unwrap();
    let mut claim = state.claim_node(RUN, "n", "first", Duration::from_secs(30)).await.unwrap().unwrap();
    let witness = Witness::watch(store.folder.path());
    let mut late = Vec::new();
    for round in 0..if store.is_local() { 24 } else { 6 } {
        let mut waiter = wait_for(&state, RUN);
        // Until it stands in front of the board, or nearly.
        assert!(tokio::time::timeout(Duration::from_millis(10), &mut waiter).await.is_err(), "the node is not free");
        witness.forget();
        let began = Instant::now();
        match round % 3 {
            0 => drop(claim.retry("again").await.unwrap()),
            1 => drop(claim.release().await.unwrap()),
            _ => drop(claim),
        }
        claim = waiter.await.unwrap();
        if witness.saw_a_wait_of(MISSED, began) {
            late.push((round, began.elapsed()));
        }
    }
    assert!(late.is_empty(), "{late:?}");
    claim.complete(NodeUpdate::success()).await.unwrap();
    state.close().await.unwrap();
}

/// Who begins to wait in the very moment in which a node is made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_who_waits_misses_nothing() {
    let store = Store::of("memory");
    let state = store.open().await;
    let witness = Witness::watch(store.folder.path());
    let began = Instant::now();
    for round in 0..1_500_u32 {
        let run = format!("r{round}");
        state.create_run(&run, NewRun::running()).await.unwrap();
        state.set_node_state(&run, "busy", NodeUpdate::running()).await.unwrap();
        let waiter = {
            let (state, run) = (state.clone(), run.clone());
            tokio::spawn(async move {
                for _ in 0..round * 37 % 4_000 {
                    std::hint::spin_loop();
                }
                let filter = ClaimFilter::new().wait(Duration::from_secs(20));
                state.claim_next(&run, filter).await.unwrap().claimed().unwrap().complete(NodeUpdate::success()).await.unwrap()
            })
        };
        witness.forget();
        state.set_node_state(&run, "ready", NodeUpdate::pending()).await.unwrap();
        let made = Instant::now();
        waiter.await.unwrap();
        assert!(!witness.saw_a_wait_of(MISSED, made), "round {round}: {:?}", made.elapsed());
        state.delete_run(&run, OnDelete::DropCoverage).await.unwrap();
        if began.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    state.close().await.unwrap();
}

/// Each has a board of its own, and none is taken from who stands in front of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_with_whatever_idea_of_done_is_woken() {
    const KINDS: usize = 20;
    let store = Store::of("memory");
    let state = store.open().await;
    state.create_run(RUN, NewRun::running()).await.unwrap();
    state.set_node_state(RUN, "busy", NodeUpdate::running()).await.unwrap();
    let mut waiters = Vec::new();
    for kind in 0..KINDS {
        let state = state.clone();
        let mut waiter = tokio::spawn(async move {
            let filter = ClaimFilter::new().wait(Duration::from_secs(20));
            let filter = filter.done([NodeStatus::Success, NodeStatus::parse(&format!("odd-{kind}"))]);
            state.claim_next(RUN, filter).await.unwrap().claimed().unwrap()
        });
        assert!(tokio::time::timeout(Duration::from_millis(2), &mut waiter).await.is_err(), "nothing is ready");
        waiters.push(waiter);
    }
    let witness = Witness::watch(store.folder.path());
    let began = Instant::now();
    let mut tx = state.transaction();
    for kind in 0..KINDS {
        tx.set_node_state(RUN, format!("n{kind}"), NodeUpdate::pending());
    }
    tx.commit().await.unwrap();
    for (kind, waiter) in waiters.into_iter().enumerate() {
        drop(waiter.await.unwrap().complete(NodeUpdate::success()).await.unwrap());
        assert!(!witness.saw_a_wait_of(MISSED, began), "kind {kind}: {:?}", began.elapsed());
    }
    state.close().await.unwrap();
}

/// Where another process comes first for a node, and has its hands full, the node is left to it for a moment, not until the next look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_left_to_others_is_handed_to_who_waits() {
    let store = Store::of("database");
    let (busy, idle) = (store.open().await, store.open().await);
    let witness = Witness::watch(store.folder.path());
    let mut late = Vec::new();
    // One of two processes comes first for half of the nodes.
    for round in 0..8 {
        let run = format!("r{round}");
        busy.create_run(&run, NewRun::running()).await.unwrap();
        busy.set_node_state(&run, "held", NodeUpdate::pending()).await.unwrap();
        let held = busy.claim_node(&run, "held", "busy", Duration::from_secs(30)).await.unwrap().unwrap();
        let mut waiters = JoinSet::new();
        for _ in 0..2 {
            let mut waiter = wait_for(&idle, &run);
            assert!(tokio::time::timeout(Duration::from_millis(10), &mut waiter).await.is_err(), "nothing is ready");
            waiters.spawn(waiter);
        }
        for number in 0..2 {
            idle.set_node_state(&run, format!("n{round}-{number}"), NodeUpdate::pending()).await.unwrap();
            let made = Instant::now();
            witness.forget();
            let claim = waiters.join_next().await.unwrap().unwrap().unwrap();
            if witness.saw_a_wait_of(MISSED, made) {
                late.push((round, number, made.elapsed()));
            }
            claim.complete(NodeUpdate::success()).await.unwrap();
        }
        held.complete(NodeUpdate::success()).await.unwrap();
    }
    assert!(late.is_empty(), "{late:?}");
    idle.close().await.unwrap();
    busy.close().await.unwrap();
}
