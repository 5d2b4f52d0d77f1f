//! The file backend through its public doors: what it writes, what a crash leaves, what others write beside it.
#![cfg(feature = "file")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test that cannot go on has failed"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeZone, Utc};
use folder::copy_folder;
use seeknal_state::model::{Batch, BatchAnswer, Entry, Guard, Mutation, Outcome, Receipt, Refusal, RunPart};
use seeknal_state::store::file::{FileBackend, repair};
use seeknal_state::store::{LeaseBook, LeaseStore};
use seeknal_state::{
    BackendOptions, Fence, FencingToken, Interval, LeaseKey, LeaseOwner, LeaseRecord, NewRun, NodeId, NodeState, NodeStatus,
    NodeUpdate, PartitionKey, RunHeader, RunId, RunQuery, RunState, RunUpdate, StateBackend, StoreErrorKind, Version,
};

mod documents;
mod faults;
#[path = "../support/folder.rs"]
mod folder;
mod foreign;
mod found;
mod journal;
mod kills;
mod links;
mod lost;
mod odd;
mod openings;
#[path = "../support/power.rs"]
mod power;
mod reader;
mod restored;
mod shapes;
#[path = "../support/syncs.rs"]
mod syncs;
#[path = "../support/trace.rs"]
mod trace;

fn at(second: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_704_888_000 + second, 0).unwrap()
}

fn run_id(text: &str) -> RunId {
    RunId::new(text).unwrap()
}

fn node_id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn options(folder: &Path) -> BackendOptions {
    BackendOptions::new().base_path(folder)
}

fn book(backend: &FileBackend) -> Arc<LeaseBook> {
    let LeaseStore::Book(book) = backend.lease_store() else { panic!("leases live in a book") };
    book
}

/// Holds run "run_1" until it is taken out.
fn hold(backend: &FileBackend) -> LeaseRecord {
    let owner = LeaseOwner { process: backend.process().unwrap(), name: "task".into() };
    let record = LeaseRecord::new(LeaseKey::run(run_id("run_1")), FencingToken(3), owner, Some("load".into()), at(0), 30_000);
    book(backend).put(record.clone(), None);
    record
}

async fn open(folder: &Path) -> FileBackend {
    let backend = FileBackend::new(&options(folder));
    backend.initialize().await.unwrap();
    backend
}

async fn open_told(folder: &Path) -> (FileBackend, Vec<String>) {
    let backend = FileBackend::new(&options(folder));
    let report = backend.initialize().await.unwrap();
    (backend, report.notices)
}

async fn reader(folder: &Path) -> FileBackend {
    let backend = FileBackend::new(&options(folder).read_only(true));
    backend.initialize().await.unwrap();
    backend
}

fn reader_unopened(folder: &Path) -> FileBackend {
    FileBackend::new(&options(folder).read_only(true))
}

fn part(run: &str, version: Version, mutations: Vec<Mutation>) -> RunPart {
    RunPart { run: run_id(run), base: version, expect: version, guards: Vec::new(), mutations, after: None }
}

fn entry(parts: Vec<RunPart>) -> Entry {
    Entry { parts, ..Entry::default() }
}

async fn commit(backend: &FileBackend, entry: Entry) -> Receipt {
    let answer = backend.commit(Arc::new(Batch::new(vec![entry]))).await.unwrap();
    applied(&answer, 0)
}

fn applied(answer: &BatchAnswer, index: usize) -> Receipt {
    match &answer.outcomes[index] {
        Outcome::Applied(receipt) => receipt.clone(),
        Outcome::Refused(refusal) => panic!("refused: {refusal}"),
    }
}

async fn create(backend: &FileBackend, run: &str, second: i64) -> Receipt {
    commit(backend, entry(vec![part(run, Version::NONE, vec![Mutation::Create { run: NewRun::running(), at: at(second) }])]))
        .await
}

async fn version(backend: &FileBackend, run: &str) -> Version {
    backend.load_run(&run_id(run)).await.unwrap().unwrap().version()
}

async fn set(backend: &FileBackend, run: &str, node: &str, update: NodeUpdate, second: i64) -> Receipt {
    let version = version(backend, run).await;
    let mutation = Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(second) };
    commit(backend, entry(vec![part(run, version, vec![mutation])])).await
}

/// What a kill at this moment would leave, opened.
async fn all_after_a_kill(folder: &Path) -> Vec<RunState> {
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder, killed.path());
    all(&open(killed.path()).await).await
}

async fn all(backend: &FileBackend) -> Vec<RunState> {
    let mut runs = Vec::new();
    for summary in backend.list_runs(&RunQuery::default().limit(1000)).await.unwrap().runs {
        runs.push(backend.load_run(&summary.run_id).await.unwrap().unwrap());
    }
    runs
}

type Rows = (RunId, RunHeader, Vec<(NodeId, NodeState)>);

/// What runs hold. Their versions go on behind what was lost.
fn rows(runs: &[RunState]) -> Vec<Rows> {
    let rows = |run: &RunState| run.nodes().map(|(id, node)| (id.clone(), node.clone())).collect();
    runs.iter().map(|run| (run.id().clone(), run.header().clone(), rows(run))).collect()
}

fn document(folder: &Path) -> PathBuf {
    folder.join("run_state.json")
}

fn journal(folder: &Path) -> PathBuf {
    folder.join("run_state.json.journal")
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn wait_for(mut holds: impl AsyncFnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !holds().await {
        assert!(begun.elapsed().as_secs() < 20, "it did not happen");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
