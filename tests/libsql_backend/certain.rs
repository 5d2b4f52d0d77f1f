//! What a failure says about the requests before it.

use std::sync::Arc;
use std::time::Duration;

use seeknal_state::model::{Batch, Entry, LeaseKey, LeaseMutation, Mutation, NodeUpdate, RunState, Version};
use seeknal_state::store::create_state_backend;

use super::batches::{applied, at, change, commit, create, entry, load, lock, part_on, run_id, set};
use super::proxy::Swallowing;
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

/// A lease runs out after 30 s: its renewal does not wait for a batch whose answer is lost, and a batch waits for its answer no longer because it is large.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_renewed_while_the_answer_to_a_large_batch_is_lost() {
    let Some(server) = Sqld::start() else { return };
    let network = Swallowing::before(server.port(), 500_000).await;
    let backend = create_state_backend("database", &server.options().database_url(network.url())).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
    let key = LeaseKey::run(run_id("q"));
    let token = lock(&backend, &key, "me", 30_000).await.unwrap();
    let tip = load(&backend, "r").await;
    let large = (0..400).map(|node| set(&format!("n{node}"), NodeUpdate::failed("x".repeat(10_000)))).collect();
    let batch = Arc::new(Batch::new(vec![entry(part_on(Some(&tip), tip.version(), "r", vec![], large))]));
    let began = std::time::Instant::now();
    let committing = tokio::spawn({
        let (backend, batch) = (Arc::clone(&backend), Arc::clone(&batch));
        async move { backend.commit(batch).await }
    });
    network.swallowed.notified().await;
    let renewal = LeaseMutation::Renew { key, token, at: at(1), ttl_ms: 30_000 };
    let renewed = commit(&backend, vec![Entry { leases: vec![renewal], ..Entry::default() }]);
    let renewed = tokio::time::timeout(Duration::from_secs(8), renewed).await.expect("a renewal waits for the batch");
    applied(renewed.outcomes.into_iter().next().unwrap());
    assert!(lock(&backend, &LeaseKey::run(run_id("p")), "me", 30_000).await.unwrap() > token);

    let lost = committing.await.unwrap().unwrap_err();
    assert!(lost.is_unknown_outcome(), "{lost}");
    assert!(began.elapsed() < Duration::from_secs(40), "its size counted after it was taken: {:?}", began.elapsed());
    let answer = backend.commit(batch).await.unwrap();
    let receipt = applied(answer.outcomes.into_iter().next().unwrap());
    let now = load(&backend, "r").await;
    assert_eq!((now.node_count(), now.version()), (400, receipt.runs[0].after), "applied once");
    backend.close().await.unwrap();
}

/// Counters are what own commits met, and a run that others moved on may be far beyond them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_made_where_it_was_deleted_begins_beyond_all_that_it_was() {
    let Some(server) = Sqld::start() else { return };
    let make = || create_state_backend("database", &server.options()).unwrap();
    let (one, two) = (make(), make());
    for backend in [&one, &two] {
        backend.initialize().await.unwrap();
    }
    change(&one, "r", vec![create(0)]).await;
    for rows in 0..9 {
        change(&two, "r", vec![set("n", NodeUpdate::running().row_count(rows))]).await;
    }
    let tip = load(&one, "r").await;
    let gone = part_on(Some(&tip), tip.version(), "r", vec![], vec![Mutation::Delete { keep_coverage: false }]);
    let anew = part_on(None, Version::NONE, "r", vec![], vec![create(1)]);
    for outcome in commit(&one, vec![entry(gone), entry(anew)]).await.outcomes {
        applied(outcome);
    }
    assert!(load(&two, "r").await.version() > tip.version().next(), "its versions were given out before");
    for backend in [one, two] {
        backend.close().await.unwrap();
    }
}
