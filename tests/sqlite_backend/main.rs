//! The SQLite backend, through the trait: what it accepts and refuses, what it shares with other openings, what it leaves untouched.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use seeknal_state::model::{
    Batch, BatchAnswer, Entry, Fence, FencingToken, Guard, Interval, LeaseKey, LeaseMutation, LeaseOwner, Ledger, Metadata,
    Mutation, NewRun, NoFences, NodeId, NodeStatus, NodeUpdate, Outcome, PartitionKey, ProcessInfo, RawJson, Receipt, Refusal,
    RunFilter, RunId, RunPart, RunQuery, RunState, RunStatus, RunUpdate, Version, apply_all, time,
};
use seeknal_state::store::{BackendOptions, StateBackend, StoreErrorKind, create_state_backend};

mod commits;
mod files;
mod kills;
mod leases;
mod openings;
mod oracle;
#[path = "../support/syncs.rs"]
mod syncs;
#[path = "../support/trace.rs"]
mod trace;

type Backend = Arc<dyn StateBackend>;

fn db(dir: &Path) -> PathBuf {
    dir.join("state.db")
}

fn make(path: &Path) -> Backend {
    create_state_backend("database", &BackendOptions::new().db_path(path)).unwrap()
}

async fn open(path: &Path) -> Backend {
    let backend = make(path);
    backend.initialize().await.unwrap();
    backend
}

async fn open_reading(path: &Path) -> Backend {
    let backend = create_state_backend("database", &BackendOptions::new().db_path(path).read_only(true)).unwrap();
    backend.initialize().await.unwrap();
    backend
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap()
}

fn run_id(text: &str) -> RunId {
    RunId::new(text).unwrap()
}

fn node_id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn hours(from: i64, to: i64) -> Interval {
    Interval::new(at(from * 3600), at(to * 3600)).unwrap()
}

fn create(second: i64) -> Mutation {
    Mutation::Create { run: NewRun::running(), at: at(second) }
}

fn set(node: &str, update: NodeUpdate) -> Mutation {
    Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(100) }
}

/// A part as a run's actor builds it: `tip` is what it knows, with everything on its way.
fn part_on(tip: Option<&RunState>, base: Version, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> RunPart {
    let run = run_id(run);
    let expect = tip.map_or(Version::NONE, RunState::version);
    let mut after = tip.cloned();
    if apply_all(&mut after, &run, &mutations, expect.next()).is_err() {
        after = None;
    }
    RunPart { run, base, expect, guards, mutations, after }
}

fn entry(part: RunPart) -> Entry {
    Entry { parts: vec![part], ..Entry::default() }
}

/// Commits one entry on the run as it is in storage now.
async fn change_guarded(backend: &Backend, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Outcome {
    let tip = backend.load_run(&run_id(run)).await.unwrap();
    let base = tip.as_ref().map_or(Version::NONE, RunState::version);
    commit(backend, vec![entry(part_on(tip.as_ref(), base, run, guards, mutations))]).await.outcomes.remove(0)
}

async fn change(backend: &Backend, run: &str, mutations: Vec<Mutation>) -> Receipt {
    applied(change_guarded(backend, run, Vec::new(), mutations).await)
}

async fn commit(backend: &Backend, entries: Vec<Entry>) -> BatchAnswer {
    backend.commit(Arc::new(Batch::new(entries))).await.unwrap()
}

fn applied(outcome: Outcome) -> Receipt {
    match outcome {
        Outcome::Applied(receipt) => receipt,
        Outcome::Refused(refusal) => panic!("refused: {refusal}"),
    }
}

fn refused(outcome: Outcome) -> Refusal {
    match outcome {
        Outcome::Applied(receipt) => panic!("applied: {receipt:?}"),
        Outcome::Refused(refusal) => refusal,
    }
}

async fn load(backend: &Backend, run: &str) -> RunState {
    backend.load_run(&run_id(run)).await.unwrap().unwrap()
}

fn owner(name: &str) -> LeaseOwner {
    LeaseOwner { process: ProcessInfo::current(at(0)), name: name.into() }
}

fn grant(key: LeaseKey, name: &str, ttl_ms: u64) -> Entry {
    Entry {
        leases: vec![LeaseMutation::Grant { key, owner: owner(name), purpose: Some("test".into()), at: at(0), ttl_ms }],
        ..Entry::default()
    }
}

async fn lock(backend: &Backend, key: &LeaseKey, name: &str, ttl_ms: u64) -> Result<FencingToken, Refusal> {
    match commit(backend, vec![grant(key.clone(), name, ttl_ms)]).await.outcomes.remove(0) {
        Outcome::Applied(receipt) => Ok(receipt.grants[0].token),
        Outcome::Refused(refusal) => Err(refusal),
    }
}

/// Every file of a folder with its bytes.
fn bytes_of(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        } else {
            found.insert(path, Vec::new());
        }
    }
    found
}

fn raw(path: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(path).unwrap()
}
