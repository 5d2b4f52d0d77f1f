//! Writes that are acknowledged from memory: what they are to readers, and what is told of those that are lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;

use seeknal_state::{Coordinator, Durability, Error, Event, NewRun, NodeUpdate, StateBackend};
use support::{Lie, LyingBackend};

async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state
}

/// Closing begins at the moment at which the last write is said to be settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn close_tells_every_deferred_loss() {
    const WRITES: u64 = 1_000;
    for round in 0..20 {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        let all = state.stats().permits_available;
        backend.close_gate();
        let deferred = state.with_durability(Durability::Deferred);
        for row in 0..WRITES {
            deferred.set_node_state("r", "n", NodeUpdate::running().row_count(row)).await.unwrap();
        }
        backend.tell([Lie::Full; 4]);
        backend.open_gate();
        while state.stats().permits_available < all {
            tokio::task::yield_now().await;
        }
        let told = state.close().await;
        assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.lost == WRITES), "round {round}: {told:?}");
    }
}

#[tokio::test]
async fn a_deferred_write_of_which_nobody_knows_is_not_told_as_lost_for_certain() {
    for (lie, unknown) in [(Lie::Panic, true), (Lie::TooFew, true), (Lie::Full, false)] {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        let mut events = state.subscribe();
        let deferred = state.with_durability(Durability::Deferred);
        for time in ["first", "second"] {
            backend.tell([lie]);
            deferred.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
            if time == "first" {
                let error = state.flush().await.unwrap_err();
                assert_eq!(error.is_unknown_outcome(), unknown, "{lie:?}: {error}");
                assert_eq!(error.to_string().contains("not known"), unknown, "{lie:?}: {error}");
            } else {
                let error = state.close().await.unwrap_err();
                assert_eq!(error.is_unknown_outcome(), unknown, "{lie:?}, told by close: {error}");
            }
            let Event::DeferredLost(loss) = events.next().await.unwrap() else { panic!("nothing was committed") };
            assert_eq!((loss.lost, loss.unknown), (1, unknown), "{lie:?}");
        }
    }
}
