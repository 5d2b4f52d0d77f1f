//! Claims that are held when the coordinator closes: given back in order, told alike everywhere, and no reason to wait for ever.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};
use std::time::Duration;

use crate::support::{Lie, LyingBackend, Store};
use seeknal_state::{
    Claim, ClaimFilter, Coordinator, Error, LostReason, NewRun, NodeState, NodeStatus, NodeUpdate, StateBackend,
};

const RUN: &str = "run_1";

async fn begin(state: &Coordinator, nodes: usize) {
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    for node in 0..nodes {
        tx.set_node_state(RUN, format!("n{node}"), NodeUpdate::pending().max_attempts(1));
    }
    tx.commit().await.unwrap();
}

async fn claim(state: &Coordinator) -> Claim {
    state.claim_next(RUN, ClaimFilter::new().owner("w")).await.unwrap().claimed().unwrap()
}

/// Another opening of what this one had open.
async fn again(store: &Store, before: &Arc<dyn StateBackend>) -> Coordinator {
    let backend = if store.backend == "memory" { Arc::clone(before) } else { store.backend() };
    Coordinator::open(backend).await.unwrap()
}

async fn node(state: &Coordinator, id: impl AsRef<str>) -> NodeState {
    state.get_node_state(RUN, id.as_ref()).await.unwrap().unwrap()
}

async fn assert_untouched(state: &Coordinator, id: impl AsRef<str>) {
    let node = node(state, id).await;
    let as_it_was = (&node.status, node.attempt, node.attempts.len(), &node.worker, node.started_at);
    assert_eq!(as_it_was, (&NodeStatus::Pending, 1, 0, &None, None), "{node:?}");
}

async fn what_is_held_at_the_end_costs_no_attempt(store: Store) {
    let backend = store.backend();
    let state = Coordinator::open(Arc::clone(&backend)).await.unwrap();
    begin(&state, 4).await;
    let mut claims = Vec::new();
    for _ in 0..4 {
        claims.push(claim(&state).await);
    }
    state.close().await.unwrap();
    for claim in &claims {
        assert!(claim.is_lost());
        assert_eq!(claim.lost().await, LostReason::Closed);
        let told = [
            claim.complete(NodeUpdate::success()).await,
            claim.fail("late").await,
            claim.retry("late").await,
            claim.fenced().set_node_state(RUN, claim.node_id(), NodeUpdate::new().row_count(1)).await,
        ];
        for refused in told {
            assert!(matches!(refused, Err(Error::Closed)), "{refused:?}");
        }
    }
    let refused = claims.pop().unwrap().release().await;
    assert!(matches!(refused, Err(Error::Closed)), "{refused:?}");
    drop(claims);

    let state = again(&store, &backend).await;
    for index in 0..4 {
        assert_untouched(&state, format!("n{index}")).await;
    }
    assert_eq!(state.list_locks().await.unwrap(), []);
    let claim = claim(&state).await;
    assert_eq!(claim.attempt(), 1);
    claim.complete(NodeUpdate::success()).await.unwrap();
    state.close().await.unwrap();
}

async fn an_end_that_was_told_before_the_end_wins(store: Store) {
    let backend = store.backend();
    let state = Coordinator::open(Arc::clone(&backend)).await.unwrap();
    begin(&state, 2).await;
    let (done, held) = (claim(&state).await, claim(&state).await);
    let (told, closed) = tokio::join!(biased; done.complete(NodeUpdate::success().row_count(7)), state.close());
    told.unwrap();
    closed.unwrap();
    let (done, held) = (done.node_id().clone(), held.node_id().clone());

    let state = again(&store, &backend).await;
    let done = node(&state, &done).await;
    assert_eq!((done.status, done.row_count), (NodeStatus::Success, Some(7)));
    assert_untouched(&state, &held).await;
    state.close().await.unwrap();
}

on_every_backend!(what_is_held_at_the_end_costs_no_attempt, an_end_that_was_told_before_the_end_wins);

/// Runs that nobody used for a while have left memory, or are about to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_of_runs_that_sleep_is_given_back_too() {
    let backend = Store::of("memory").backend();
    for round in 0..4_u32 {
        let state = Coordinator::builder()
            .idle_after(Duration::from_millis(1))
            .max_resident_runs(2)
            .open(Arc::clone(&backend))
            .await
            .unwrap();
        let mut held = Vec::new();
        for run in 0..50 {
            let run = format!("{round}-{run}");
            state.create_run(&run, NewRun::running()).await.unwrap();
            state.set_node_state(&run, "n", NodeUpdate::pending().max_attempts(1)).await.unwrap();
            held.push(state.claim_next(&run, ClaimFilter::new()).await.unwrap().claimed().unwrap());
        }
        while round % 2 == 0 && state.stats().resident_runs > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        state.close().await.unwrap();
        let state = Coordinator::open(Arc::clone(&backend)).await.unwrap();
        for claim in held {
            let node = state.get_node_state(claim.run_id(), "n").await.unwrap().unwrap();
            assert_eq!(node.status, NodeStatus::Pending, "{claim:?}");
        }
        state.close().await.unwrap();
    }
}

/// Also an end that storage did not take at once, and giving back what it does not take at once.
#[tokio::test]
async fn storage_that_is_full_for_a_moment_changes_nothing() {
    let lying = LyingBackend::new(false);
    let backend = Arc::clone(&lying) as Arc<dyn StateBackend>;
    let state = Coordinator::open(Arc::clone(&backend)).await.unwrap();
    begin(&state, 2).await;
    let (done, held) = (claim(&state).await, claim(&state).await);
    lying.tell([Lie::Full]);
    let (told, closed) = tokio::join!(biased; done.complete(NodeUpdate::success()), async {
        lying.arrived(lying.commits.load(std::sync::atomic::Ordering::SeqCst) + 1).await;
        lying.tell([Lie::Full]);
        state.close().await
    });
    told.unwrap();
    closed.unwrap();
    let state = Coordinator::open(backend).await.unwrap();
    assert_eq!(node(&state, done.node_id()).await.status, NodeStatus::Success);
    assert_untouched(&state, held.node_id()).await;
    state.close().await.unwrap();
}

/// Storage that neither answers nor fails holds up closing for a while, and not for ever.
#[tokio::test(start_paused = true)]
async fn storage_that_does_not_answer_is_not_waited_for_without_end() {
    let lying = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
    begin(&state, 2).await;
    let held = [claim(&state).await, claim(&state).await];
    lying.close_gate();
    let began = tokio::time::Instant::now();
    tokio::time::timeout(Duration::from_secs(120), state.close()).await.expect("it ends").unwrap();
    assert!(began.elapsed() >= Duration::from_secs(30), "{:?}", began.elapsed());
    for claim in held {
        let refused = claim.complete(NodeUpdate::success()).await;
        assert!(matches!(refused, Err(Error::Closed)), "{refused:?}");
    }
}

/// A write that was sent before is waited for as ever: it is not given up with the claims.
#[tokio::test(start_paused = true)]
async fn a_write_that_storage_does_not_answer_is_not_given_up_with_claims() {
    let lying = LyingBackend::new(false);
    let builder = Coordinator::builder().max_in_flight(1);
    let state = builder.open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
    begin(&state, 2).await;
    let held = [claim(&state).await, claim(&state).await];
    lying.close_gate();
    let sent = lying.commits.load(std::sync::atomic::Ordering::SeqCst);
    let (written, closed, ()) = tokio::join!(
        biased;
        state.set_node_state(RUN, "beside", NodeUpdate::skipped()),
        async {
            lying.arrived(sent + 1).await;
            state.close().await
        },
        async {
            tokio::time::sleep(Duration::from_secs(100)).await;
            lying.open_gate();
        }
    );
    written.unwrap();
    closed.unwrap();
    let state = Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
    assert_eq!(node(&state, "beside").await.status, NodeStatus::Skipped);
    for claim in held {
        assert_untouched(&state, claim.node_id()).await;
    }
    state.close().await.unwrap();
}

/// Its caller is gone, and so is the last handle: it is closed, and whoever opens it again waits for that.
#[tokio::test]
async fn a_claim_on_its_way_keeps_nothing_open() {
    let backend = LyingBackend::new(false);
    let open = || Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>);
    let state = open().await.unwrap();
    begin(&state, 1).await;
    let sent = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    {
        let mut claiming = pin!(state.claim_node(RUN, "n0", "w", Duration::from_secs(30)));
        tokio::select! {
            biased;
            early = &mut claiming => panic!("storage has not answered: {early:?}"),
            () = backend.arrived(sent + 1) => {}
        }
    }
    drop(state);
    let mut opening = pin!(open());
    let early = opening.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(early.is_pending(), "it is being closed: {early:?}");
    backend.open_gate();
    let next = opening.await.unwrap();
    assert_untouched(&next, "n0").await;
    assert_eq!(next.list_locks().await.unwrap(), []);
    next.close().await.unwrap();
}
