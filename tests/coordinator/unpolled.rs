//! A call that was begun and is not polled for a while (a branch of a `select!` loop, one of a buffer of futures) keeps nobody waiting.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::support::LyingBackend;
use seeknal_state::{Coordinator, Durability, NewRun, NodeUpdate, StateBackend};

async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    for run in ["r", "s"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    state
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Polls it once.
async fn begin(mut future: Pin<&mut impl Future>) {
    poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// What others of this process want of the run.
async fn others(state: &Coordinator) {
    let others = async {
        state.set_node_state("r", "other", NodeUpdate::running()).await.unwrap();
        let mut tx = state.transaction();
        tx.set_node_state("r", "both", NodeUpdate::running()).set_node_state("s", "both", NodeUpdate::running());
        tx.commit().await.unwrap();
        state.close().await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(10), others).await.expect("they wait for somebody who is not polled");
}

#[tokio::test]
async fn a_fresh_read() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    backend.write_as_another("r", "theirs", NodeUpdate::running().row_count(7)).await;
    let mut fresh = Box::pin(state.fresh("r"));
    begin(fresh.as_mut()).await;
    settle().await;
    others(&state).await;
    let read = fresh.await.unwrap().unwrap();
    assert_eq!(read.node("theirs").unwrap().row_count, Some(7));
    assert!(read.node("other").is_none(), "it is what was read then");
}

#[tokio::test]
async fn a_transaction_that_waits_for_deferred_writes() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.close_gate();
    state.with_durability(Durability::Deferred).set_node_state("r", "n", NodeUpdate::running().row_count(7)).await.unwrap();
    let mut transact = Box::pin(state.transact(|view, _| Ok(view.run("r")?.and_then(|run| run.node("n")?.row_count))));
    begin(transact.as_mut()).await;
    settle().await;
    backend.open_gate();
    settle().await;
    others(&state).await;
    assert_eq!(transact.await.unwrap().0, Some(7));
}

#[tokio::test]
async fn who_gives_up_waiting_leaves_nothing_behind() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.close_gate();
    state.with_durability(Durability::Deferred).set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = alive();
    for _ in 0..200 {
        let mut transact = Box::pin(state.transact(|view, _| Ok(view.run("r")?.is_some())));
        begin(transact.as_mut()).await;
        settle().await;
    }
    let until = async {
        while alive() > before + 20 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), until).await.unwrap_or_else(|_| panic!("{} tasks, before {before}", alive()));
    backend.open_gate();
    state.close().await.unwrap();
}
