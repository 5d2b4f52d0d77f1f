//! Every acknowledged commit once, every refused one not at all: over networks that lie, and with servers that die.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use seeknal_state::{Coordinator, Error, NewRun, NodeUpdate, StateBackend, create_state_backend};
use tokio::task::JoinSet;

use super::proxy::Faulty;
use super::sqld::Sqld;

const RUNS: u64 = 3;

/// What the writers were told.
#[derive(Debug, Default)]
struct Told {
    /// Acknowledged: run and version after.
    acknowledged: Vec<(String, u64)>,
    /// Nodes that were made with `expect_absent`: the node, and the mark of who made it.
    made: Vec<(String, String, u64)>,
    /// How many outcomes nobody could tell, by run.
    unknown: BTreeMap<String, u64>,
    refused: u64,
}

impl Told {
    fn join(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.made.extend(other.made);
        self.refused += other.refused;
        for (run, count) in other.unknown {
            *self.unknown.entry(run).or_default() += count;
        }
    }

    /// Notes an outcome; whether it was acknowledged.
    fn note(&mut self, run: &str, outcome: Result<seeknal_state::Commit, Error>) -> bool {
        match outcome {
            Ok(commit) => {
                self.acknowledged.push((run.to_owned(), commit.version().0));
                true
            }
            Err(error) if error.is_unknown_outcome() => {
                *self.unknown.entry(run.to_owned()).or_default() += 1;
                false
            }
            Err(_) => {
                self.refused += 1;
                false
            }
        }
    }
}

/// Writes until it is told to stop, or `most` times: plain writes of its own node, and nodes that only one of all may make.
async fn writer(state: Coordinator, number: u64, most: u64, stop: Arc<AtomicBool>) -> Told {
    let mut told = Told::default();
    for round in 0..most {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let run = format!("run{}", (number + round) % RUNS);
        if round % 4 == 3 {
            let node = format!("only {round}");
            let mark = number * 1_000_000 + round;
            let mut tx = state.transaction();
            tx.expect_absent(&*run, &*node);
            tx.set_node_state(&*run, &*node, NodeUpdate::running().row_count(mark));
            if told.note(&run, tx.commit().await) {
                told.made.push((run, node, mark));
            }
        } else {
            let update = NodeUpdate::running().row_count(round);
            told.note(&run, state.set_node_state(&*run, format!("of {number}"), update).await);
        }
    }
    told
}

async fn open(options: &seeknal_state::BackendOptions) -> Coordinator {
    let backend = create_state_backend("database", options).unwrap();
    // Opening itself may meet the faults: it is tried again, as an operator would.
    for _ in 0..50 {
        if backend.initialize().await.is_ok() {
            return Coordinator::open(backend).await.unwrap();
        }
    }
    panic!("it never opened");
}

/// What is stored agrees with what was told.
async fn check(backend: &dyn StateBackend, began: &BTreeMap<String, u64>, told: &Told) {
    assert!(told.acknowledged.len() > 20, "hardly anything was written: {told:?}");
    for (run, began) in began {
        let state = backend.load_run(&seeknal_state::RunId::new(run).unwrap()).await.unwrap().unwrap();
        let version = state.version().0;
        let acknowledged: Vec<u64> = told.acknowledged.iter().filter(|(of, _)| of == run).map(|(_, version)| *version).collect();
        let distinct: BTreeSet<u64> = acknowledged.iter().copied().collect();
        assert_eq!(distinct.len(), acknowledged.len(), "{run}: no version is told twice");
        assert!(
            distinct.iter().all(|acknowledged| *began < *acknowledged && *acknowledged <= version),
            "{run}: what was told is there"
        );
        let applied = version - began;
        let (least, unknown) = (acknowledged.len() as u64, told.unknown.get(run).copied().unwrap_or(0));
        assert!(
            (least..=least + unknown).contains(&applied),
            "{run}: {applied} commits, {least} acknowledged, {unknown} unknown: {:?}",
            told.refused
        );
    }
    let mut made = BTreeMap::new();
    for (run, node, mark) in &told.made {
        assert_eq!(made.insert((run, node), mark), None, "{node} of {run} was made twice");
    }
    for ((run, node), mark) in made {
        let state = backend.load_run(&seeknal_state::RunId::new(run).unwrap()).await.unwrap().unwrap();
        assert_eq!(state.node(node).and_then(|node| node.row_count), Some(*mark), "{node} of {run} is as its maker wrote it");
    }
    let report = backend.verify().await.unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

async fn begin(server: &Sqld) -> BTreeMap<String, u64> {
    let state = open(&server.options()).await;
    let mut began = BTreeMap::new();
    for run in 0..RUNS {
        let run = format!("run{run}");
        let version = state.create_run(&*run, NewRun::running()).await.unwrap().version().0;
        began.insert(run, version);
    }
    state.close().await.unwrap();
    began
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn networks_that_lie_change_nothing() {
    let Some(server) = Sqld::start() else { return };
    let began = begin(&server).await;
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
        for deed in [&deeds.requests_lost, &deeds.answers_lost, &deeds.halved, &deeds.doubled, &deeds.late] {
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
    let began = begin(&server).await;
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
