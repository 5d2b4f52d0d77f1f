//! The PostgreSQL backend against a real server: what it accepts and refuses, what several openings do to one another, and what it survives.
#![cfg(feature = "postgres")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use seeknal_state::model::{
    Batch, BatchAnswer, CommitSeq, Entry, Fence, FencingToken, Guard, Interval, LeaseKey, LeaseMutation, LeaseOwner, Ledger,
    Mutation, NewRun, NoFences, NodeId, NodeStatus, NodeUpdate, Outcome, PartitionKey, ProcessInfo, Receipt, Refusal, RunId,
    RunPart, RunQuery, RunState, RunStatus, RunUpdate, Version, apply_all,
};
use seeknal_state::store::{BackendOptions, StateBackend, StoreError, StoreErrorKind, create_state_backend};

#[path = "../support/postgres.rs"]
mod server;
#[path = "../support/servers.rs"]
mod servers;

mod commits;
mod credentials;
mod doors;
#[path = "../support/exactly.rs"]
mod exactly;
mod faults;
mod leases;
mod networks;
mod oracle;
mod others;
#[path = "../support/proxy.rs"]
mod proxy;
#[path = "../support/wire.rs"]
mod wire;

type Backend = Arc<dyn StateBackend>;

/// A schema of its own on the server of this process.
struct Store {
    cluster: &'static server::Cluster,
    schema: String,
}

impl Store {
    /// None: servers are left out.
    fn fresh() -> Option<Self> {
        Some(Self { cluster: server::cluster()?, schema: server::fresh_schema() })
    }

    fn options(&self) -> BackendOptions {
        BackendOptions::new().database_url(self.cluster.url("")).set("database_schema", &self.schema)
    }

    fn make(&self) -> Backend {
        create_state_backend("database", &self.options()).unwrap()
    }

    async fn open(&self) -> Backend {
        let backend = self.make();
        backend.initialize().await.unwrap();
        backend
    }

    fn sql(&self, sql: &str) -> String {
        self.cluster.sql_in(&self.schema, sql)
    }
}

/// A store, or the end of the test where servers are left out.
macro_rules! store {
    () => {
        match Store::fresh() {
            Some(store) => store,
            None => return,
        }
    };
}
use store;

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

/// Waits until it holds; fails after a while.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let patience = tokio::time::Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(tokio::time::Instant::now() < patience, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
