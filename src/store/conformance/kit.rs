//! What the cases share: a store that is open, short ways to say what must hold, and names for stamps, ids and mutations.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use super::{Chain, Harness};
use crate::model::{
    Batch, BatchAnswer, Entry, Fence, FencingToken, InputError, Interval, LeaseKey, LeaseMutation, LeaseOwner, LeaseRecord,
    Mutation, NewRun, NodeId, NodeState, NodeStatus, NodeUpdate, Outcome, PartitionKey, ProcessInfo, RawJson, Receipt, Refusal,
    RunHeader, RunId, RunQuery, RunState, RunSummary, Version, time,
};
use crate::store::{LeaseStore, StateBackend, StoreError, StoreErrorKind};

/// How often a batch is sent before a server that does not answer is what is wrong.
const SENDINGS: u32 = 5;

/// How long a case waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a case fails.
#[derive(Debug)]
pub(super) struct Fault(String);

impl Fault {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    pub(super) fn into_text(self) -> String {
        self.0
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self(format!("the backend failed ({:?}): {error}", error.kind()))
    }
}

impl From<InputError> for Fault {
    fn from(error: InputError) -> Self {
        Self(format!("the case is wrong: {error}"))
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self(format!("the case is wrong: the model refuses: {refusal}"))
    }
}

/// Commits as a coordinator does: where a server did not answer, the same batch goes out again until its outcome is known. A machine that stood still for
/// some seconds is no fault of a backend's.
pub(super) async fn commit(backend: &Arc<dyn StateBackend>, batch: impl Into<Arc<Batch>>) -> Result<BatchAnswer, StoreError> {
    let batch = batch.into();
    let mut sendings = 1;
    loop {
        match backend.commit(Arc::clone(&batch)).await {
            Err(error) if error.kind() == StoreErrorKind::Unavailable && sendings < SENDINGS => sendings += 1,
            answered => return answered,
        }
    }
}

/// Fails the case unless the condition holds.
macro_rules! ensure {
    ($holds:expr, $($what:tt)+) => {
        if !$holds {
            return Err($crate::store::conformance::kit::Fault::new(format!($($what)+)));
        }
    };
}

/// Fails the case unless both are equal; says what both are.
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($what:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => {
                if *found != *expected {
                    let what = format!($($what)+);
                    return Err($crate::store::conformance::kit::Fault::new($crate::store::conformance::kit::unequal(&what, found, expected)));
                }
            }
        }
    };
}

/// Fails the case unless the value has that shape.
macro_rules! ensure_matches {
    ($found:expr, $shape:pat $(if $guard:expr)?, $($what:tt)+) => {
        match &$found {
            $shape $(if $guard)? => {}
            found => return Err($crate::store::conformance::kit::Fault::new(format!("{}: found {found:?}", format!($($what)+)))),
        }
    };
}

pub(super) use {ensure, ensure_eq, ensure_matches};

/// The message of two values that must be equal, shortened to where they begin to differ.
pub(super) fn unequal(what: &str, found: &dyn fmt::Debug, expected: &dyn fmt::Debug) -> String {
    const SHOWN: usize = 600;
    let (found, expected) = (format!("{found:?}"), format!("{expected:?}"));
    let same = found.chars().zip(expected.chars()).take_while(|(a, b)| a == b).count();
    let skip = same.saturating_sub(120);
    let show = |text: &str| text.chars().skip(skip).take(SHOWN).collect::<String>();
    format!("{what}: found …{}…, expected …{}… (they differ from character {same} on)", show(&found), show(&expected))
}

/// A stamp: seconds after the first moment of 2024.
pub(super) fn at(seconds: i64) -> DateTime<Utc> {
    time::from_micros(1_704_067_200_000_000 + seconds * 1_000_000).unwrap_or_default()
}

/// An interval: seconds after the first moment of 2024.
pub(super) fn span(start: i64, end: i64) -> Result<Interval, Fault> {
    Ok(Interval::new(at(start), at(end))?)
}

pub(super) fn run_id(text: &str) -> Result<RunId, Fault> {
    Ok(RunId::new(text)?)
}

pub(super) fn node_id(text: &str) -> Result<NodeId, Fault> {
    Ok(NodeId::new(text)?)
}

pub(super) fn partition(text: &str) -> Result<PartitionKey, Fault> {
    Ok(PartitionKey::new(text)?)
}

/// Creates a running run at a time.
pub(super) fn create(seconds: i64) -> Mutation {
    Mutation::Create { run: NewRun::running(), at: at(seconds) }
}

pub(super) fn set(node: &str, update: NodeUpdate) -> Result<Mutation, Fault> {
    set_at(node, update, 60)
}

pub(super) fn set_at(node: &str, update: NodeUpdate, seconds: i64) -> Result<Mutation, Fault> {
    Ok(Mutation::SetNode { node: node_id(node)?, update: Box::new(update), at: at(seconds) })
}

pub(super) fn add_interval(node: &str, start: i64, end: i64) -> Result<Mutation, Fault> {
    Ok(Mutation::AddInterval { node: node_id(node)?, interval: span(start, end)? })
}

pub(super) fn add_partition(node: &str, key: &str) -> Result<Mutation, Fault> {
    Ok(Mutation::AddPartition { node: node_id(node)?, partition: partition(key)? })
}

/// A store that is open.
pub(super) struct Bench<'h> {
    harness: &'h dyn Harness,
    pub(super) backend: Arc<dyn StateBackend>,
}

impl<'h> Bench<'h> {
    pub(super) async fn open(harness: &'h dyn Harness) -> Result<Self, Fault> {
        let backend = harness.open().await?;
        backend.initialize().await?;
        Ok(Self { harness, backend })
    }

    /// Closes the store and opens the same storage again.
    pub(super) async fn reopen(self) -> Result<Self, Fault> {
        let Self { harness, backend } = self;
        backend.close().await?;
        drop(backend);
        Self::open(harness).await
    }

    /// Loses the store without closing it, and opens the same storage again.
    pub(super) async fn crash(self) -> Result<Self, Fault> {
        let Self { harness, backend } = self;
        harness.crash(backend).await;
        let started = Instant::now();
        loop {
            let backend = harness.open().await?;
            match backend.initialize().await {
                // What is gone may still be ending.
                Err(error) if error.kind() == StoreErrorKind::Busy && started.elapsed() < PATIENCE => {
                    drop(backend);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                opened => {
                    opened?;
                    return Ok(Self { harness, backend });
                }
            }
        }
    }

    /// Sends a batch; every entry must be answered.
    pub(super) async fn send(&self, entries: Vec<Entry>) -> Result<Vec<Outcome>, Fault> {
        let count = entries.len();
        let answer = commit(&self.backend, Batch::new(entries)).await?;
        ensure_eq!(answer.outcomes.len(), count, "a batch is answered entry by entry");
        Ok(answer.outcomes)
    }

    pub(super) async fn one(&self, entry: Entry) -> Result<Outcome, Fault> {
        self.send(vec![entry]).await?.pop().ok_or_else(|| Fault::new("no outcome"))
    }

    /// Sends one entry that must be applied.
    pub(super) async fn applied(&self, entry: Entry) -> Result<Receipt, Fault> {
        applied(self.one(entry).await?)
    }

    /// Sends one entry that must be refused.
    pub(super) async fn refused(&self, entry: Entry) -> Result<Refusal, Fault> {
        refused(self.one(entry).await?)
    }

    pub(super) async fn load(&self, run: &str) -> Result<Option<RunState>, Fault> {
        Ok(self.backend.load_run(&run_id(run)?).await?)
    }

    /// A run that must be there.
    pub(super) async fn state(&self, run: &str) -> Result<RunState, Fault> {
        self.load(run).await?.ok_or_else(|| Fault::new(format!("run {run:?} must be there and is not")))
    }

    /// A chain on what is stored now.
    pub(super) async fn chain(&self, run: &str) -> Result<Chain, Fault> {
        Ok(match self.load(run).await? {
            Some(state) => Chain::on(&state),
            None => Chain::of_new(run_id(run)?),
        })
    }

    /// Commits mutations on what is stored now; they must be applied.
    pub(super) async fn write(&self, run: &str, mutations: Vec<Mutation>) -> Result<Receipt, Fault> {
        self.applied(self.chain(run).await?.entry(mutations)?).await
    }

    /// Makes a running run, created at that time.
    pub(super) async fn create(&self, run: &str, seconds: i64) -> Result<RunState, Fault> {
        self.write(run, vec![create(seconds)]).await?;
        self.state(run).await
    }

    /// All summaries, page by page.
    pub(super) async fn list(&self, mut query: RunQuery) -> Result<Vec<RunSummary>, Fault> {
        let mut all = Vec::new();
        loop {
            let page = self.backend.list_runs(&query).await?;
            ensure!(page.runs.len() <= query.limit, "a page of {} runs was asked for, {} came", query.limit, page.runs.len());
            ensure!(page.next.is_none() || !page.runs.is_empty(), "an empty page names a next one");
            all.extend(page.runs);
            if page.next.is_none() {
                return Ok(all);
            }
            ensure!(all.len() < 100_000, "the pages do not end");
            query = query.after(page.next);
        }
    }

    /// Every run as it is stored, newest first.
    pub(super) async fn everything(&self) -> Result<Vec<RunState>, Fault> {
        let mut all = Vec::new();
        for summary in self.list(RunQuery::default()).await? {
            all.push(self.state(summary.run_id.as_str()).await?);
        }
        Ok(all)
    }

    /// Whether leases are rows of this backend.
    pub(super) fn has_lease_rows(&self) -> bool {
        matches!(self.backend.lease_store(), LeaseStore::Rows)
    }

    pub(super) fn owner(&self, name: &str) -> LeaseOwner {
        let process = self.backend.process().unwrap_or_else(|| ProcessInfo::current(at(0)));
        LeaseOwner { process, name: Arc::from(name) }
    }

    /// The mutation that grants a lease.
    pub(super) fn grant_of(&self, key: LeaseKey, name: &str, ttl: Duration) -> LeaseMutation {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        LeaseMutation::Grant { key, owner: self.owner(name), purpose: Some(Arc::from("conformance")), at: at(0), ttl_ms }
    }

    /// Grants a lease, as the lock manager does for this kind of store.
    pub(super) async fn grant(&self, key: LeaseKey, name: &str, ttl: Duration) -> Result<FencingToken, Fault> {
        match self.backend.lease_store() {
            LeaseStore::Book(book) => {
                let start = Instant::now();
                let token = FencingToken(self.backend.reserve_tokens(1).await?.start);
                let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
                let record = LeaseRecord::new(key, token, self.owner(name), Some(Arc::from("conformance")), at(0), ttl_ms);
                book.put(record, Some(start + ttl));
                Ok(token)
            }
            LeaseStore::Rows => {
                let receipt = self.applied(lease_entry(self.grant_of(key.clone(), name, ttl))).await?;
                match receipt.grants.as_slice() {
                    [grant] => {
                        ensure_eq!(grant.key, key, "the receipt of a grant names its key");
                        Ok(grant.token)
                    }
                    other => Err(Fault::new(format!("one grant must be answered with one token, found {other:?}"))),
                }
            }
            LeaseStore::None => {
                Err(Fault::new("it keeps no leases, so that nobody can have a lock or a claim: override `lease_store`"))
            }
        }
    }

    /// Gives a lease back.
    pub(super) async fn release(&self, key: &LeaseKey, token: FencingToken) -> Result<(), Fault> {
        match self.backend.lease_store() {
            LeaseStore::Book(book) => book.remove(key, token),
            LeaseStore::Rows => {
                self.applied(lease_entry(LeaseMutation::Release { key: key.clone(), token })).await?;
            }
            LeaseStore::None => {}
        }
        Ok(())
    }

    /// Waits until no lease of the run is held any more.
    pub(super) async fn wait_for_expiry(&self, run: &str) -> Result<(), Fault> {
        let started = Instant::now();
        while self.backend.list_leases().await?.iter().any(|lease| lease.key.run == *run) {
            ensure!(started.elapsed() < PATIENCE, "a lease of a few milliseconds is still listed after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

/// An entry that only changes a lease.
pub(super) fn lease_entry(change: LeaseMutation) -> Entry {
    Entry { leases: vec![change], ..Entry::default() }
}

/// The same entry, fenced by a lease.
pub(super) fn fenced(mut entry: Entry, key: &LeaseKey, token: FencingToken) -> Entry {
    entry.fences.push(Fence { key: key.clone(), token });
    entry
}

pub(super) fn applied(outcome: Outcome) -> Result<Receipt, Fault> {
    match outcome {
        Outcome::Applied(receipt) => Ok(receipt),
        Outcome::Refused(refusal) => {
            Err(Fault::new(format!("an entry must be applied and was refused: {refusal} ({refusal:?})")))
        }
    }
}

pub(super) fn refused(outcome: Outcome) -> Result<Refusal, Fault> {
    match outcome {
        Outcome::Refused(refusal) => Ok(refusal),
        Outcome::Applied(receipt) => Err(Fault::new(format!("an entry must be refused and was applied: {receipt:?}"))),
    }
}

/// The outcome at a place.
pub(super) fn nth(outcomes: &[Outcome], index: usize) -> Result<Outcome, Fault> {
    outcomes.get(index).cloned().ok_or_else(|| Fault::new(format!("outcome {index} is missing")))
}

/// The versions of the first run of a receipt.
pub(super) fn versions(receipt: &Receipt) -> Result<(Version, Version), Fault> {
    receipt.runs.first().map(|run| (run.before, run.after)).ok_or_else(|| Fault::new("a receipt names no run"))
}

/// A run whose versions count from its creation: for comparing stores that number differently.
pub(super) fn relative(run: &RunState) -> RunState {
    let since = |version: Version| Version(version.0.wrapping_sub(run.created_version().0));
    let mut header = run.header().clone();
    header.version = since(header.version);
    let nodes = run.nodes().map(|(id, node)| {
        let mut node = node.clone();
        node.version = since(node.version);
        (id.clone(), node)
    });
    RunState::from_parts(run.id().clone(), header, since(run.version()), Version::NONE, nodes)
}

/// A node that must be there.
pub(super) fn node<'r>(run: &'r RunState, id: &str) -> Result<&'r NodeState, Fault> {
    run.node(id).ok_or_else(|| Fault::new(format!("node {id:?} of run {:?} must be there and is not", run.id())))
}

pub(super) fn status_of(run: &RunState, id: &str) -> Option<NodeStatus> {
    run.node(id).map(|node| node.status.clone())
}

/// A run without the foreign objects it came from: a store may add to those what its own form of them needs (see [`foreign_kept`]).
pub(super) fn without_extra(run: &RunState) -> RunState {
    let header = RunHeader { extra: None, ..run.header().clone() };
    let nodes = run.nodes().map(|(id, node)| (id.clone(), NodeState { extra: None, ..node.clone() }));
    RunState::from_parts(run.id().clone(), header, run.version(), run.created_version(), nodes)
}

/// Fails unless every member of a foreign object is still there, in its own text and in its old order.
pub(super) fn foreign_kept(found: Option<&RawJson>, expected: Option<&RawJson>, what: &str) -> Result<(), Fault> {
    let Some(members) = expected.and_then(RawJson::members) else { return Ok(()) };
    let found = found.and_then(RawJson::members).unwrap_or_default();
    let kept: Vec<_> = found.into_iter().filter(|(key, _)| members.iter().any(|(known, _)| known == key)).collect();
    ensure_eq!(kept, members, "{what}: the members of a foreign object");
    Ok(())
}

/// The same for a run and all its nodes.
pub(super) fn all_foreign_kept(found: &RunState, expected: &RunState, what: &str) -> Result<(), Fault> {
    foreign_kept(found.header().extra.as_ref(), expected.header().extra.as_ref(), what)?;
    for (id, state) in expected.nodes() {
        foreign_kept(
            found.node(id.as_str()).and_then(|node| node.extra.as_ref()),
            state.extra.as_ref(),
            &format!("{what}, node {id:?}"),
        )?;
    }
    Ok(())
}
