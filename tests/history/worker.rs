//! One of the processes: it counts nodes up, in three ways, and notes what it is told.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use seeknal_state::{
    Commit, Coordinator, Error, LeaseKey, LockOptions, NodeId, NodeUpdate, RunId, Version, create_state_backend,
};

use super::TTL;
use super::blind::Blind;
use super::checker::{Kind, Line, Told};
use super::support::Place;

pub(crate) const TARGET: &str = "SEEKNAL_TEST_HISTORY_TARGET";
pub(crate) const NOTES: &str = "SEEKNAL_TEST_HISTORY_NOTES";
pub(crate) const NUMBER: &str = "SEEKNAL_TEST_HISTORY_NUMBER";
/// What half of the backend's check is taken out, if any.
pub(crate) const BLIND: &str = "SEEKNAL_TEST_HISTORY_BLIND";
pub(crate) const RUN: &str = "shared";

/// Nodes that all processes write.
const SHARED: usize = 4;

struct Work {
    state: Coordinator,
    notes: Mutex<File>,
    enough: PathBuf,
    worker: String,
}

impl Work {
    fn is_over(&self) -> bool {
        self.enough.exists()
    }

    /// The number of a node, as this process knows it, and the version at which it was written.
    fn known(&self, node: &str) -> (u64, Version) {
        let run = self.state.snapshot(RUN);
        let node = run.as_ref().and_then(|run| run.node(node));
        node.map_or((0, Version::NONE), |node| (node.row_count.unwrap_or(0), node.version))
    }

    fn note(&self, kind: Kind, node: &str, value: u64, result: &Result<Commit, Error>) -> Told {
        let told = match result {
            Ok(commit) => {
                let run = commit.runs.first().expect("a run");
                Told::Done { seq: commit.seq.expect("a durable write").0, before: run.before.0, after: run.after.0 }
            }
            Err(Error::LeaseLost(_)) => Told::Fenced,
            Err(Error::Conflict(_)) => Told::Conflict,
            Err(error) if error.is_unknown_outcome() => Told::Unknown,
            Err(_) => Told::Failed,
        };
        let line = Line { worker: self.worker.clone(), kind, node: node.to_owned(), value, told };
        let mut text = serde_json::to_string(&line).unwrap();
        text.push('\n');
        self.notes.lock().unwrap().write_all(text.as_bytes()).unwrap();
        told
    }

    async fn guarded(&self, turn: usize) {
        let node = format!("guarded-{}", turn % SHARED);
        let (value, version) = self.known(&node);
        let mut tx = self.state.transaction();
        tx.expect_node_version(RUN, &node, version);
        tx.set_node_state(RUN, &node, NodeUpdate::running().row_count(value + 1));
        let result = tx.commit().await;
        self.note(Kind::Guarded, &node, value + 1, &result);
    }

    async fn fenced(&self, turn: usize) {
        let node = format!("fenced-{}", turn % SHARED);
        let key = LeaseKey::node(RunId::new(RUN).unwrap(), NodeId::new(&node).unwrap());
        let lease = self.state.acquire(key, LockOptions::new().ttl(TTL), Duration::from_millis(500)).await;
        let Ok(Some(lease)) = lease else { return };
        let Ok(Some(run)) = self.state.fresh(RUN).await else { return };
        let value = run.node(&node).and_then(|node| node.row_count).unwrap_or(0) + 1;
        // Long enough that the process is stopped now and then between reading and writing.
        tokio::time::sleep(Duration::from_millis(10)).await;
        let result = self.state.with_lease(&lease).set_node_state(RUN, &node, NodeUpdate::running().row_count(value)).await;
        self.note(Kind::Fenced, &node, value, &result);
    }

    /// Says whether the number may have been written.
    async fn own(&self, value: u64) -> bool {
        let node = format!("own-{}", self.worker);
        let result = self.state.set_node_state(RUN, &node, NodeUpdate::running().row_count(value)).await;
        matches!(self.note(Kind::Own, &node, value, &result), Told::Done { .. } | Told::Unknown)
    }
}

/// Opens the state; a server that eight processes come to at once may be too busy for one of them.
async fn open(target: &Place) -> Coordinator {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let mut backend = create_state_backend("database", &target.options()).unwrap();
        if let Ok(without) = std::env::var(BLIND) {
            backend = Arc::new(Blind { backend, without: serde_json::from_str(&without).unwrap() });
        }
        match Coordinator::open(backend).await {
            Ok(state) => return state,
            Err(error) => assert!(error.is_retryable() && Instant::now() < patience, "{error}"),
        }
    }
}

/// The other side. Without the variable this is no test at all.
#[test]
fn works() {
    let Ok(target) = std::env::var(TARGET) else { return };
    let target: Place = serde_json::from_str(&target).unwrap();
    let notes = PathBuf::from(std::env::var(NOTES).unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let state = open(&target).await;
        state.fresh(RUN).await.unwrap().expect("the run");
        let work = Arc::new(Work {
            state,
            enough: notes.with_file_name("enough"),
            notes: Mutex::new(File::create(&notes).unwrap()),
            worker: std::env::var(NUMBER).unwrap(),
        });
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..3 {
            let work = Arc::clone(&work);
            tasks.spawn(async move {
                let (mut turn, mut own) = (0, 0);
                while !work.is_over() {
                    turn += 1;
                    match task {
                        0 => work.guarded(turn).await,
                        1 => work.fenced(turn).await,
                        _ => own += u64::from(work.own(own + 1).await),
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        work.state.close().await.unwrap();
    });
}
