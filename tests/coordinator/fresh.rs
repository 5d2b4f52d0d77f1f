//! Fresh reads: what they show of this process's own writes that are on their way, and of those of which nobody knows.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use crate::support::{Following, Lie, LyingBackend};
use seeknal_state::{Coordinator, Durability, Error, NewRun, NodeUpdate, Snapshot, StateBackend};

pub(super) async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    backend.follow(Following::Silent);
    Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap()
}

/// A fresh read, as soon as storage can be asked: until then that is told, and no old snapshot.
pub(super) async fn fresh(state: &Coordinator, run: &str) -> Option<Snapshot> {
    loop {
        match state.fresh(run).await {
            Ok(read) => return read,
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// In a task of its own: who is answered there goes on before whatever is begun behind the answer.
#[tokio::test(start_paused = true)]
async fn what_nobody_knows_is_looked_up() {
    for shared in [false, true] {
        for (lie, landed) in [(Lie::LatePanic, true), (Lie::Panic, false), (Lie::TooFew, false)] {
            tokio::spawn(looked_up(shared, lie, landed)).await.unwrap();
        }
    }
}

async fn looked_up(shared: bool, lie: Lie, landed: bool) {
    let backend = LyingBackend::new(shared);
    let state = open(&backend).await;
    let unknown = |written: Result<(), Error>| {
        let error = written.unwrap_err();
        assert!(error.is_unknown_outcome(), "{lie:?}: {error}");
    };
    backend.tell([lie]);
    unknown(state.create_run("r", NewRun::running()).await.map(drop));
    assert_eq!(fresh(&state, "r").await.is_some(), landed, "shared {shared}, {lie:?}: a run");
    for run in ["r", "s"] {
        if fresh(&state, run).await.is_none() {
            state.create_run(run, NewRun::running()).await.unwrap();
        }
    }

    backend.tell([lie]);
    unknown(state.set_node_state("r", "n", NodeUpdate::success()).await.map(drop));
    let read = fresh(&state, "r").await.unwrap();
    assert_eq!(read.node("n").is_some(), landed, "shared {shared}, {lie:?}: a node");
    assert_eq!(read.version(), read.durable_version(), "shared {shared}, {lie:?}");

    backend.tell([lie]);
    let mut tx = state.transaction();
    tx.set_node_state("r", "both", NodeUpdate::success()).set_node_state("s", "both", NodeUpdate::success());
    unknown(tx.commit().await.map(drop));
    for run in ["r", "s"] {
        let read = fresh(&state, run).await.unwrap();
        assert_eq!(read.node("both").is_some(), landed, "shared {shared}, {lie:?}: {run} of two");
    }
    state.close().await.unwrap();
}

#[tokio::test]
async fn what_is_only_in_memory_is_waited_for() {
    for (shared, lost) in [(false, false), (false, true), (true, false), (true, true)] {
        let backend = LyingBackend::new(shared);
        let state = open(&backend).await;
        state.create_run("r", NewRun::running()).await.unwrap();
        backend.close_gate();
        if lost {
            backend.tell([Lie::Full]);
        }
        let sent = backend.commits.load(Ordering::SeqCst);
        state.with_durability(Durability::Deferred).set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
        backend.arrived(sent + 1).await;
        let mut reading = pin!(state.fresh("r"));
        for _ in 0..100 {
            poll_fn(|cx| {
                let read = reading.as_mut().poll(cx);
                assert!(read.is_pending(), "shared {shared}: it is not in storage: {read:?}");
                Poll::Ready(())
            })
            .await;
            tokio::task::yield_now().await;
        }
        backend.open_gate();
        let read = reading.await.unwrap().unwrap();
        assert_eq!(read.node("n").is_some(), !lost, "shared {shared}");
        assert_eq!(read.version(), read.durable_version(), "shared {shared}");
        assert_eq!(state.close().await.is_err(), lost, "shared {shared}");
    }
}
