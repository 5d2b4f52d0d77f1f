//! Workers of different kinds, each of which asks for its own nodes.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::sync::Arc;
use std::time::Duration;

use crate::support::{LyingBackend, Store};
use seeknal_state::{ClaimFilter, Coordinator, Error, NewRun, Next, NodeStatus, NodeUpdate, RunId, RunUpdate, StateBackend};

const RUN: &str = "run_1";
const LONG: Duration = Duration::from_secs(20);

/// Works until there is nothing more of its kind; what it did, and how much is left blocked.
async fn work(state: Coordinator, filter: ClaimFilter) -> (Vec<String>, usize) {
    let mut done = Vec::new();
    loop {
        match state.claim_next(RUN, filter.clone().wait(LONG)).await.unwrap() {
            Next::Claimed(claim) => {
                done.push(claim.node_id().to_string());
                claim.complete(NodeUpdate::success()).await.unwrap();
            }
            Next::Drained { blocked } => break (done, blocked),
            other => panic!("{other:?}: somebody was not woken"),
        }
    }
}

on_every_backend!(workers_of_two_kinds_finish_a_run_together, who_asks_for_some_nodes_hears_of_those);

async fn workers_of_two_kinds_finish_a_run_together(store: Store) {
    let state = store.open().await;
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    for number in 0..6 {
        let load = format!("load.{number}");
        tx.set_node_state(RUN, &load, NodeUpdate::pending());
        let train = NodeUpdate::pending().depends_on([load]).metadata("queue", "gpu");
        tx.set_node_state(RUN, format!("train.{number}"), train);
    }
    tx.set_node_state(RUN, "report", NodeUpdate::pending().depends_on(["train.0", "train.5"]));
    tx.commit().await.unwrap();

    let gpu = ClaimFilter::new().owner("gpu").metadata("queue", "gpu");
    let plain = ClaimFilter::new().owner("plain").prefix("load.").prefix("rep");
    let workers = [&gpu, &plain, &gpu].map(|filter| tokio::spawn(work(state.clone(), filter.clone())));
    let mut all = Vec::new();
    for (worker, kinds) in workers.into_iter().zip([&["train."][..], &["load.", "report"], &["train."]]) {
        let (done, blocked) = worker.await.unwrap();
        assert!(done.iter().all(|node| kinds.iter().any(|kind| node.starts_with(kind))), "{done:?} by a worker for {kinds:?}");
        assert_eq!(blocked, 0, "it waited for the others");
        all.extend(done);
    }
    assert_eq!(all.len(), 13);
    let run = state.fresh(RUN).await.unwrap().unwrap();
    assert!(run.nodes().all(|(_, node)| node.status == NodeStatus::Success), "{run:?}");
    state.close().await.unwrap();
}

async fn who_asks_for_some_nodes_hears_of_those(store: Store) {
    let state = store.open().await;
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    tx.set_node_state(RUN, "a", NodeUpdate::pending());
    tx.set_node_state(RUN, "b", NodeUpdate::pending().depends_on(["c"]));
    tx.set_node_state(RUN, "c", NodeUpdate::running());
    tx.commit().await.unwrap();
    let ask = |filter: ClaimFilter| state.claim_next(RUN, filter);

    // What is ready is not what is asked for, and what is asked for may become ready.
    let b = ClaimFilter::new().nodes(["b", "unheard of"]);
    assert!(matches!(ask(b.clone()).await.unwrap(), Next::NothingReady));
    // Nothing of what is asked for is there, whatever runs.
    for none in [ClaimFilter::new().nodes(["unheard of"]), ClaimFilter::new().nodes([""; 0]), ClaimFilter::new().metadata("k", 1)]
    {
        assert!(matches!(ask(none).await.unwrap(), Next::Drained { blocked: 0 }));
    }

    let waiting = tokio::spawn({
        let (state, b) = (state.clone(), b.clone());
        async move { state.claim_next(RUN, b.wait(LONG)).await.unwrap() }
    });
    state.set_node_state(RUN, "c", NodeUpdate::success()).await.unwrap();
    let claim = waiting.await.unwrap().claimed().unwrap();
    assert_eq!(claim.node_id(), "b");
    claim.fail("broken").await.unwrap();
    assert!(matches!(ask(b).await.unwrap(), Next::Drained { blocked: 0 }), "only `a` is left");

    // What a node says of itself decides as it is now.
    let gpu = ClaimFilter::new().metadata("queue", "gpu");
    assert!(matches!(ask(gpu.clone()).await.unwrap(), Next::Drained { blocked: 0 }));
    state.set_node_state(RUN, "a", NodeUpdate::new().metadata("queue", "gpu")).await.unwrap();
    let claim = ask(gpu).await.unwrap().claimed().unwrap();
    assert_eq!(claim.node_id(), "a");
    claim.complete(NodeUpdate::success()).await.unwrap();

    let error = ask(ClaimFilter::new().nodes(["a", "\n"])).await.unwrap_err();
    assert!(matches!(&error, Error::Input(_)) && error.to_string().contains("node id"), "{error}");
    state.close().await.unwrap();
}

#[tokio::test]
async fn who_has_no_work_is_told_so_however_busy_others_are() {
    let backend = LyingBackend::new(true);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    let mut tx = state.transaction();
    tx.create_run(RUN, NewRun::running());
    tx.set_node_state(RUN, "theirs", NodeUpdate::running());
    tx.commit().await.unwrap();
    *backend.rushed.lock().unwrap() = Some(RunId::new(RUN).unwrap());
    for wait in [Duration::ZERO, LONG] {
        let asked = state.claim_next(RUN, ClaimFilter::new().nodes(["mine"]).wait(wait));
        let next = tokio::time::timeout(LONG, asked).await.expect("there is always something newer").unwrap();
        assert!(matches!(next, Next::Drained { blocked: 0 }), "{next:?}");
    }
    *backend.rushed.lock().unwrap() = None;
    state.update_run(RUN, RunUpdate::cancelled()).await.unwrap();
    *backend.rushed.lock().unwrap() = Some(RunId::new(RUN).unwrap());
    let asked = state.claim_next(RUN, ClaimFilter::new().wait(LONG));
    let next = tokio::time::timeout(LONG, asked).await.expect("also where the run has ended").unwrap();
    assert!(matches!(next, Next::Drained { blocked: 0 }), "{next:?}");
    state.close().await.unwrap();
}

#[tokio::test]
async fn of_many_kinds_of_work_each_goes_to_its_own() {
    let state = Store::of("memory").open().await;
    state.create_run(RUN, NewRun::running()).await.unwrap();
    let kinds = 40_u32;
    for kind in 0..kinds {
        state.set_node_state(RUN, format!("n{kind}"), NodeUpdate::pending().metadata("kind", kind)).await.unwrap();
    }
    for _ in 0..3 {
        for kind in 0..kinds {
            let claim = state.claim_next(RUN, ClaimFilter::new().metadata("kind", kind)).await.unwrap().claimed().unwrap();
            assert_eq!(claim.node_id().as_str(), format!("n{kind}"));
            claim.release().await.unwrap();
        }
    }
    state.close().await.unwrap();
}
