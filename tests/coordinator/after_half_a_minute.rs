//! What becomes of a write of which nobody knows for longer than anybody waits: half a minute, in each of these tests. So they are the first to begin.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::Duration;

use crate::several::RUNS;
use crate::support::{Lie, LyingBackend};
use crate::{faults, fresh, several};
use seeknal_state::{ClaimFilter, NewRun, Next, NodeStatus, NodeUpdate, RunId, StateBackend};

#[tokio::test]
async fn an_end_of_a_claim_that_nobody_knows_of_is_not_told_a_second_time() {
    let backend = LyingBackend::new(false);
    let state = faults::open(&backend).await;
    state.set_node_state("r", "n", NodeUpdate::pending()).await.unwrap();
    let claim = state.claim_node("r", "n", "w", Duration::from_secs(3600)).await.unwrap().unwrap();
    let before = backend.sent.lock().unwrap().len();
    backend.tell(std::iter::repeat_n(Lie::AnswerLost, 10_000));
    let error = claim.complete(NodeUpdate::success()).await.unwrap_err();
    backend.lies.lock().unwrap().clear();
    assert!(error.is_unknown_outcome(), "{error}");
    let sent = backend.sent.lock().unwrap().split_off(before);
    let first = sent[0];
    assert!(sent.iter().take(20).all(|id| *id == first), "only the same batch may be sent again");
    let stored = backend.inner.load_run(&RunId::new("r").unwrap()).await.unwrap().unwrap();
    assert_eq!(stored.node("n").unwrap().status, NodeStatus::Success);
}

/// The claim of a node that may be tried once.
#[tokio::test]
async fn a_claim_that_nobody_knows_of_is_taken_back_when_it_is_known() {
    let backend = LyingBackend::new(false);
    let state = faults::open(&backend).await;
    state.set_node_state("r", "n", NodeUpdate::pending().max_attempts(1)).await.unwrap();
    backend.tell(std::iter::repeat_n(Lie::AnswerLost, 10_000));
    let ask = |owner| state.claim_next("r", ClaimFilter::new().owner(owner).wait(Duration::from_secs(60)));
    let error = ask("gone").await.unwrap_err();
    assert!(error.is_unknown_outcome(), "{error}");
    backend.lies.lock().unwrap().clear();
    let claim = loop {
        match ask("next").await {
            Ok(Next::Claimed(claim)) => break claim,
            // As long as the batch is not settled.
            Err(error) if error.is_retryable() => tokio::time::sleep(Duration::from_millis(100)).await,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(claim.attempt(), 1, "an attempt that nobody made does not count");
    claim.complete(NodeUpdate::new()).await.unwrap();
    assert!(state.list_locks().await.unwrap().is_empty());
}

/// The batch is still being sent, and may be applied at any time.
#[tokio::test]
async fn a_fresh_read_tells_that_it_cannot_be_known() {
    let case = async |shared| {
        let backend = LyingBackend::new(shared);
        let state = fresh::open(&backend).await;
        state.create_run("r", NewRun::running()).await.unwrap();
        backend.tell(std::iter::repeat_n(Lie::NeverArrived, 10_000));
        let writing = state.clone();
        let read = tokio::spawn(async move {
            let error = writing.set_node_state("r", "n", NodeUpdate::success()).await.unwrap_err();
            assert!(error.is_unknown_outcome(), "{error}");
            writing.fresh("r").await
        });
        let read = read.await.unwrap();
        assert!(matches!(&read, Err(error) if error.is_retryable()), "shared {shared}: {read:?}");
        // Of the batch before it is not known whether it was written: of this one it is.
        let refused = state.set_node_state("r", "m", NodeUpdate::success()).await.unwrap_err();
        assert!(refused.is_retryable() && !refused.is_unknown_outcome(), "shared {shared}: {refused:?}");
        let told = refused.to_string();
        assert!(told.contains("an earlier batch: ") && !told.contains("is not known"), "shared {shared}: {told}");
        backend.lies.lock().unwrap().clear();
        assert!(fresh::fresh(&state, "r").await.unwrap().node("n").is_some(), "shared {shared}: it was sent again");
        state.close().await.unwrap();
    };
    tokio::join!(case(false), case(true));
}

#[tokio::test]
async fn what_was_written_of_several_runs_is_seen_when_it_is_known() {
    let case = async |lie| {
        let backend = LyingBackend::new(false);
        let state = several::open(&backend).await;
        backend.tell(std::iter::repeat_n(lie, 10_000));
        let error = several::write(&state, &RUNS, 7).await.unwrap_err();
        assert!(error.is_unknown_outcome(), "{lie:?}: {error}");
        let landed = backend.inner.load_run(&RunId::new("a").unwrap()).await.unwrap().unwrap().node("n").is_some();
        assert_eq!(landed, lie == Lie::AnswerLost);
        backend.lies.lock().unwrap().clear();
        several::seen_as_written(&state, 7, lie).await;
        state.close().await.unwrap();
    };
    // It is in storage before they are told that nobody knows; or comes there only afterwards.
    tokio::join!(case(Lie::AnswerLost), case(Lie::NeverArrived));
}
