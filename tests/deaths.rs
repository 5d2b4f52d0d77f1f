//! Code of the embedder that panics inside of an actor or of the follower: what was acknowledged is read, what is lost is told, and work goes on.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{DateTime, Utc};
use seeknal_state::{Clock, Coordinator, Error, NewRun, NodeUpdate, StateBackend, SystemClock};
use support::LyingBackend;

/// A clock that panics on demand.
#[derive(Debug, Default)]
struct Faulty(Arc<AtomicBool>);

impl Clock for Faulty {
    fn now(&self) -> DateTime<Utc> {
        assert!(!self.0.swap(false, Ordering::SeqCst), "the clock's own fault");
        SystemClock.now()
    }
}

/// A coordinator with a run, and what makes its clock panic once.
async fn open(backend: Arc<dyn StateBackend>) -> (Coordinator, Arc<AtomicBool>) {
    let fault = Arc::new(AtomicBool::new(false));
    let state = Coordinator::builder().clock(Faulty(Arc::clone(&fault))).open(backend).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    (state, fault)
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// One thread, so that everything comes in the order in which it was woken: what the flush became reaches an actor that dies before it looks at it.
#[tokio::test]
async fn who_is_answered_by_a_dead_actor_reads_what_he_wrote() {
    let backend = LyingBackend::new(false);
    let (state, fault) = open(Arc::clone(&backend) as _).await;
    backend.close_gate();
    let write = |node: &'static str| {
        let state = state.clone();
        tokio::spawn(async move {
            state.set_node_state("r", node, NodeUpdate::running()).await?;
            let quick = state.snapshot("r").is_none_or(|run| run.node(node).is_some());
            let quick_of_many = state.snapshots(&["r"]).await?.pop().flatten().is_some_and(|run| run.node(node).is_some());
            Ok::<_, Error>((quick, quick_of_many, state.get_node_state("r", node).await?.is_some()))
        })
    };
    let written = write("n");
    backend.arrived(2).await;
    settle().await;
    fault.store(true, Ordering::SeqCst);
    let victim = write("victim");
    backend.open_gate();
    let seen = written.await.unwrap().expect("it is in storage");
    assert_eq!(seen, (true, true, true), "after Ok everybody reads it");
    assert!(victim.await.unwrap().unwrap_err().is_unknown_outcome());
}
