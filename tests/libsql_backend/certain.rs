//! What a failure says about the requests before it.

use std::sync::Arc;

use seeknal_state::model::{Batch, NodeUpdate, RunState};
use seeknal_state::store::create_state_backend;

use super::batches::{change, create, entry, load, part_on, set};
use super::sqld::Sqld;

/// A server's word about a batch of which an earlier request was refused is as good as its word about the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_is_too_large_beside_a_row_that_others_changed_is_told_and_holds_nobody_up() {
    let Some(server) = Sqld::start() else { return };
    let make = || create_state_backend("database", &server.options()).unwrap();
    let (one, two) = (make(), make());
    for backend in [&one, &two] {
        backend.initialize().await.unwrap();
    }
    change(&one, "a", vec![create(0)]).await;
    change(&one, "b", vec![create(0), set("n", NodeUpdate::running())]).await;
    let (a, b) = (load(&one, "a").await, load(&one, "b").await);
    change(&two, "b", vec![set("n", NodeUpdate::running().row_count(7))]).await;
    let on = |tip: &RunState, run, node, update| entry(part_on(Some(tip), tip.version(), run, vec![], vec![set(node, update)]));
    let large = on(&a, "a", "huge", NodeUpdate::failed("x".repeat(6_000_000)));
    let batch = Arc::new(Batch::new(vec![on(&b, "b", "n", NodeUpdate::running().row_count(8)), large.clone()]));
    let error = one.commit(Arc::clone(&batch)).await.unwrap_err();
    assert!(error.is_of_one_entry() && error.is_never_applied() && !error.is_unknown_outcome(), "{error}");
    let error = one.commit(batch).await.unwrap_err();
    assert!(error.is_of_one_entry() && error.is_never_applied(), "the id is of no use any more: {error}");
    // What waited for the outcome would wait for ever: nobody is unknown, and the next one is written.
    let error = one.commit(Arc::new(Batch::new(vec![large]))).await.unwrap_err();
    assert!(error.is_of_one_entry() && !error.is_unknown_outcome(), "{error}");
    change(&one, "b", vec![set("n", NodeUpdate::running().row_count(9))]).await;
    assert_eq!(load(&two, "b").await.node("n").unwrap().row_count, Some(9));
    for backend in [one, two] {
        backend.close().await.unwrap();
    }
}
