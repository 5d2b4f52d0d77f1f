//! Writers that note what they are told, and the comparison with what is stored: every acknowledged commit once, every refused one not at all.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use seeknal_state::{BackendOptions, Commit, Coordinator, Error, NewRun, NodeUpdate, RunId, StateBackend, create_state_backend};

const RUNS: u64 = 3;

/// What the writers were told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Acknowledged: run and version after.
    acknowledged: Vec<(String, u64)>,
    /// Nodes that were made with `expect_absent`: the node, and the mark of who made it.
    made: Vec<(String, String, u64)>,
    /// The same, of which they were told that nothing happened.
    not_made: Vec<(String, String, u64)>,
    /// How many outcomes nobody could tell, by run.
    unknown: BTreeMap<String, u64>,
    refused: u64,
}

impl Told {
    pub(crate) fn join(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.made.extend(other.made);
        self.not_made.extend(other.not_made);
        self.refused += other.refused;
        for (run, count) in other.unknown {
            *self.unknown.entry(run).or_default() += count;
        }
    }

    /// Notes an outcome; whether it was acknowledged, or refused. `None`: nobody knows.
    fn note(&mut self, run: &str, outcome: Result<Commit, Error>) -> Option<bool> {
        match outcome {
            Ok(commit) => {
                self.acknowledged.push((run.to_owned(), commit.version().0));
                Some(true)
            }
            Err(error) if error.is_unknown_outcome() => {
                *self.unknown.entry(run.to_owned()).or_default() += 1;
                None
            }
            Err(_) => {
                self.refused += 1;
                Some(false)
            }
        }
    }
}

/// Writes until it is told to stop, or `most` times: plain writes of its own node, and nodes that only one of all may make.
pub(crate) async fn writer(state: Coordinator, number: u64, most: u64, stop: Arc<AtomicBool>) -> Told {
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
            match told.note(&run, tx.commit().await) {
                Some(true) => told.made.push((run, node, mark)),
                Some(false) => told.not_made.push((run, node, mark)),
                None => {}
            }
        } else {
            let update = NodeUpdate::running().row_count(round);
            told.note(&run, state.set_node_state(&*run, format!("of {number}"), update).await);
        }
    }
    told
}

pub(crate) async fn open(options: &BackendOptions) -> Coordinator {
    // Opening itself may meet the faults, in any of its questions: it is tried again, as an operator would.
    for _ in 0..50 {
        if let Ok(state) = Coordinator::open(create_state_backend("database", options).unwrap()).await {
            return state;
        }
    }
    panic!("it never opened");
}

/// What is stored agrees with what was told.
pub(crate) async fn check(backend: &dyn StateBackend, began: &BTreeMap<String, u64>, told: &Told) {
    assert!(told.acknowledged.len() > 20, "hardly anything was written: {told:?}");
    for (run, began) in began {
        let state = backend.load_run(&RunId::new(run).unwrap()).await.unwrap().unwrap();
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
        let state = backend.load_run(&RunId::new(run).unwrap()).await.unwrap().unwrap();
        assert_eq!(state.node(node).and_then(|node| node.row_count), Some(*mark), "{node} of {run} is as its maker wrote it");
    }
    assert!(!told.not_made.is_empty(), "nobody was refused anything: {told:?}");
    for (run, node, mark) in &told.not_made {
        let state = backend.load_run(&RunId::new(run).unwrap()).await.unwrap().unwrap();
        assert_ne!(
            state.node(node).and_then(|node| node.row_count),
            Some(*mark),
            "{node} of {run} is as one wrote it who was refused"
        );
    }
    let report = backend.verify().await.unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

pub(crate) async fn begin(options: &BackendOptions) -> BTreeMap<String, u64> {
    let state = open(options).await;
    let mut began = BTreeMap::new();
    for run in 0..RUNS {
        let run = format!("run{run}");
        let version = state.create_run(&*run, NewRun::running()).await.unwrap().version().0;
        began.insert(run, version);
    }
    state.close().await.unwrap();
    began
}
