//! Batches as run actors build them, and what becomes of them on a backend: for the tests of the databases through their trait.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use seeknal_state::model::{
    Batch, BatchAnswer, Entry, FencingToken, Guard, Interval, LeaseKey, LeaseMutation, LeaseOwner, Mutation, NewRun, NodeId,
    NodeUpdate, Outcome, ProcessInfo, Receipt, Refusal, RunId, RunPart, RunState, Version, apply_all,
};
use seeknal_state::store::StateBackend;

pub(crate) type Backend = Arc<dyn StateBackend>;

pub(crate) fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap()
}

pub(crate) fn run_id(text: &str) -> RunId {
    RunId::new(text).unwrap()
}

pub(crate) fn node_id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

pub(crate) fn hours(from: i64, to: i64) -> Interval {
    Interval::new(at(from * 3600), at(to * 3600)).unwrap()
}

pub(crate) fn create(second: i64) -> Mutation {
    Mutation::Create { run: NewRun::running(), at: at(second) }
}

pub(crate) fn set(node: &str, update: NodeUpdate) -> Mutation {
    Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(100) }
}

/// A part as a run's actor builds it: `tip` is what it knows, with everything on its way.
pub(crate) fn part_on(tip: Option<&RunState>, base: Version, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> RunPart {
    let run = run_id(run);
    let expect = tip.map_or(Version::NONE, RunState::version);
    let mut after = tip.cloned();
    if apply_all(&mut after, &run, &mutations, expect.next()).is_err() {
        after = None;
    }
    RunPart { run, base, expect, guards, mutations, after }
}

pub(crate) fn entry(part: RunPart) -> Entry {
    Entry { parts: vec![part], ..Entry::default() }
}

/// Commits one entry on the run as it is in storage now.
pub(crate) async fn change_guarded(backend: &Backend, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Outcome {
    let tip = backend.load_run(&run_id(run)).await.unwrap();
    let base = tip.as_ref().map_or(Version::NONE, RunState::version);
    commit(backend, vec![entry(part_on(tip.as_ref(), base, run, guards, mutations))]).await.outcomes.remove(0)
}

pub(crate) async fn change(backend: &Backend, run: &str, mutations: Vec<Mutation>) -> Receipt {
    applied(change_guarded(backend, run, Vec::new(), mutations).await)
}

pub(crate) async fn commit(backend: &Backend, entries: Vec<Entry>) -> BatchAnswer {
    backend.commit(Arc::new(Batch::new(entries))).await.unwrap()
}

pub(crate) fn applied(outcome: Outcome) -> Receipt {
    match outcome {
        Outcome::Applied(receipt) => receipt,
        Outcome::Refused(refusal) => panic!("refused: {refusal}"),
    }
}

pub(crate) fn refused(outcome: Outcome) -> Refusal {
    match outcome {
        Outcome::Applied(receipt) => panic!("applied: {receipt:?}"),
        Outcome::Refused(refusal) => refusal,
    }
}

pub(crate) async fn load(backend: &Backend, run: &str) -> RunState {
    backend.load_run(&run_id(run)).await.unwrap().unwrap()
}

pub(crate) fn owner(name: &str) -> LeaseOwner {
    LeaseOwner { process: ProcessInfo::current(at(0)), name: name.into() }
}

pub(crate) fn grant(key: LeaseKey, name: &str, ttl_ms: u64) -> Entry {
    Entry {
        leases: vec![LeaseMutation::Grant { key, owner: owner(name), purpose: Some("test".into()), at: at(0), ttl_ms }],
        ..Entry::default()
    }
}

pub(crate) async fn lock(backend: &Backend, key: &LeaseKey, name: &str, ttl_ms: u64) -> Result<FencingToken, Refusal> {
    match commit(backend, vec![grant(key.clone(), name, ttl_ms)]).await.outcomes.remove(0) {
        Outcome::Applied(receipt) => Ok(receipt.grants[0].token),
        Outcome::Refused(refusal) => Err(refusal),
    }
}
