//! Every acknowledged commit once, every refused one not at all: over networks that lie, most of all about `COMMIT`, and with a server that dies.

use std::sync::atomic::{AtomicBool, Ordering};

use seeknal_state::Coordinator;
use tokio::task::JoinSet;

use super::exactly::{Told, begin, check, open, writer};
use super::wire::{Odds, Wire};
use super::*;

/// Through a network, which encrypts nothing so that it can read along.
pub(super) fn through(cluster: &server::Cluster, wire: &Wire, schema: &str) -> BackendOptions {
    let url = format!("postgres://postgres:{}@127.0.0.1:{}/tests?sslmode=disable", server::PASSWORD, wire.port);
    assert_ne!(wire.port, cluster.port);
    BackendOptions::new().database_url(url).set("database_schema", schema)
}

async fn checked(options: &BackendOptions, began: &BTreeMap<String, u64>, told: &Told) {
    let backend = create_state_backend("database", options).unwrap();
    backend.initialize().await.unwrap();
    check(&*backend, began, told).await;
    backend.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn networks_that_lie_about_commits_change_nothing() {
    let store = store!();
    let began = begin(&store.options()).await;
    let mut told = Told::default();
    let wire = Wire::before(store.cluster.port, 1, Odds { commits: 350, others: 5 }).await;
    let options = through(store.cluster, &wire, &store.schema);
    // Two processes, as far as the server can tell.
    let openings = [open(&options).await, open(&options).await];
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for number in 0..12_usize {
        writers.spawn(writer(openings[number % 2].clone(), number as u64, u64::MAX, Arc::clone(&stop)));
    }
    let commits = || wire.deeds.commits.load(Ordering::Relaxed);
    until("everything was done to somebody", async || commits() > 150 && wire.deeds.undone().is_empty()).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(done) = writers.join_next().await {
        told.join(done.unwrap());
    }
    for state in openings {
        let _closed_over_a_bad_network = state.close().await.is_ok();
    }
    checked(&store.options(), &began, &told).await;
}

/// PgBouncer answers for a server that it has lost, whatever that one has committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_lost_its_server_is_no_proof_that_nothing_was_committed() {
    let store = store!();
    let wire = Wire::before(store.cluster.port, 3, Odds { commits: 0, others: 0 }).await;
    let backend = create_state_backend("database", &through(store.cluster, &wire, &store.schema)).unwrap();
    backend.initialize().await.unwrap();
    let batch = Arc::new(Batch::new(vec![entry(part_on(None, Version::NONE, "r", vec![], vec![create(0)]))]));
    wire.deeds.lose_server.store(true, Ordering::Release);
    let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
    assert!(error.is_unknown_outcome() && !error.is_retryable(), "{error}");
    assert_eq!(store.sql("SELECT count(*) FROM runs"), "1", "it is there");
    wire.deeds.lose_server.store(false, Ordering::Release);
    let receipt = applied(backend.commit(batch).await.unwrap().outcomes.remove(0));
    assert_eq!(load(&backend, "r").await.version(), receipt.runs[0].after);
    backend.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_ten_times_loses_nothing_that_was_acknowledged() {
    let Some(mut cluster) = server::Cluster::start() else { return };
    let schema = server::fresh_schema();
    let direct = BackendOptions::new().database_url(cluster.url("?sslmode=disable")).set("database_schema", &schema);
    let began = begin(&direct).await;
    let wire = Wire::before(cluster.port, 7, Odds { commits: 20, others: 0 }).await;
    let options = through(&cluster, &wire, &schema);
    let openings: [Coordinator; 2] = [open(&options).await, open(&options).await];
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for number in 0..16_usize {
        writers.spawn(writer(openings[number % 2].clone(), number as u64, u64::MAX, Arc::clone(&stop)));
    }
    let applied = || openings.iter().map(|state| state.stats().applied).sum::<u64>();
    for _ in 0..10 {
        let goal = applied() + 50;
        until("writes are acknowledged", async || applied() >= goal).await;
        cluster = tokio::task::spawn_blocking(move || {
            cluster.kill();
            cluster.start_again();
            cluster
        })
        .await
        .unwrap();
    }
    let goal = applied() + 50;
    until("writes are acknowledged", async || applied() >= goal).await;
    stop.store(true, Ordering::Relaxed);
    let mut told = Told::default();
    while let Some(done) = writers.join_next().await {
        told.join(done.unwrap());
    }
    for state in openings {
        let _closed_over_a_bad_network = state.close().await.is_ok();
    }
    checked(&direct, &began, &told).await;
}
