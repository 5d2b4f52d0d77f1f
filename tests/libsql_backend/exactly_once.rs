//! Every acknowledged commit once, every refused one not at all: over networks that lie, and with servers that die.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use seeknal_state::create_state_backend;
use tokio::task::JoinSet;

use super::exactly::{Told, begin, check, open, writer};
use super::proxy::Faulty;
use super::sqld::Sqld;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn networks_that_lie_change_nothing() {
    let Some(server) = Sqld::start() else { return };
    let began = begin(&server.options()).await;
    let mut told = Told::default();
    for seed in 1..=3 {
        let network = Faulty::before(server.port(), seed, 35).await;
        // Two processes, as far as the server can tell.
        let options = server.options().database_url(network.url());
        let openings = [open(&options).await, open(&options).await];
        let mut writers = JoinSet::new();
        for number in 0..12_usize {
            let state = openings[number % 2].clone();
            writers.spawn(writer(state, seed * 100 + number as u64, 40, Arc::default()));
        }
        while let Some(done) = writers.join_next().await {
            told.join(done.unwrap());
        }
        let deeds = &network.deeds;
        for deed in [
            &deeds.requests_lost,
            &deeds.answers_lost,
            &deeds.halved,
            &deeds.doubled,
            &deeds.answers_doubled,
            &deeds.late,
            &deeds.answers_late,
        ] {
            assert!(deed.load(Ordering::Relaxed) > 0, "seed {seed} did not try everything: {deeds:?}");
        }
        for state in openings {
            let _closed_over_a_bad_network = state.close().await.is_ok();
        }
    }
    // What is still on its way arrives.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let backend = create_state_backend("database", &server.options()).unwrap();
    backend.initialize().await.unwrap();
    check(&*backend, &began, &told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_that_die_lose_nothing_that_was_acknowledged() {
    let Some(mut server) = Sqld::start() else { return };
    let began = begin(&server.options()).await;
    let state = open(&server.options()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for number in 0..16 {
        writers.spawn(writer(state.clone(), number, u64::MAX, Arc::clone(&stop)));
    }
    for round in 0..10 {
        let seq = || state.stats().applied;
        let before = seq();
        // Some commits after each restart, so that every death meets load.
        for _ in 0..2_000 {
            if seq() >= before + 5 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(seq() >= before + 5, "nothing was committed in round {round}");
        server = tokio::task::spawn_blocking(move || {
            server.restart();
            server
        })
        .await
        .unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.store(true, Ordering::Relaxed);
    let mut told = Told::default();
    while let Some(done) = writers.join_next().await {
        told.join(done.unwrap());
    }
    state.close().await.unwrap();
    let backend = create_state_backend("database", &server.options()).unwrap();
    backend.initialize().await.unwrap();
    check(&*backend, &began, &told).await;
}
