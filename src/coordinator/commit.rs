//! The ways down: one run through its actor, several runs by holding their actors.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use serde::Serialize;
use tokio::sync::oneshot;
use tracing::Instrument;

use super::step_back::step_back;
use super::{Coordinator, Durability, Engine};
use crate::error::Error;
use crate::model::{
    CommitSeq, Entry, Fence, Guard, InputError, LeaseKey, LeaseMutation, Mutation, NodeId, NodeStatus, Receipt, Refusal, RunId,
    RunReceipt, RunState, Version,
};
use crate::persist::{Submission, Watch};
use crate::run::{
    ChangeSeed, CommitError, Committed, FlushSink, HoldGrant, NotCommitted, OneSink, Op, Permit, Release, RunHandle, Sending,
    Sent, Surroundings, born, is_another, plan, weight_of_leases,
};
use crate::store::BoxFuture;

/// How often a transaction over several runs is tried while others change what it touches.
const MAX_ATTEMPTS: u32 = 512;

/// What a committed transaction became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Commit {
    /// Its place in the order of the whole store; `None` for a deferred write, which has none yet.
    pub seq: Option<CommitSeq>,
    /// The runs that it changed, with their versions before and after, in the order of their ids; also those of which it only had conditions: their
    /// versions grow too.
    pub runs: Vec<RunReceipt>,
}

impl Commit {
    /// The version of the (first) run after it; [`Version::NONE`] if no run changed.
    pub fn version(&self) -> Version {
        self.runs.first().map_or(Version::NONE, |run| run.after)
    }
}

impl From<Committed> for Commit {
    fn from(committed: Committed) -> Self {
        Self { seq: committed.seq, runs: committed.runs }
    }
}

/// What a transaction does to one run, before it is checked.
#[derive(Debug, Clone, Default)]
pub(super) struct Draft {
    pub(super) mutations: Vec<Mutation>,
    pub(super) guards: Vec<Guard>,
}

/// A whole transaction before it is checked.
#[derive(Debug, Clone, Default)]
pub(super) struct Work {
    pub(super) runs: BTreeMap<RunId, Draft>,
    pub(super) fences: Vec<Fence>,
    /// The nodes whose claims are among them.
    pub(super) claims: Vec<LeaseKey>,
    pub(super) leases: Vec<LeaseMutation>,
    /// Refuse at once instead of waiting for a permit.
    pub(super) now: bool,
    /// Whether lost writes of others are told to somebody else.
    pub(super) unheard: bool,
}

impl Work {
    /// Whether there is nothing to decide.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.fences.is_empty() && self.leases.is_empty()
    }
}

/// A transaction over several runs, on its way.
struct Several {
    ops: BTreeMap<RunId, Op>,
    fences: Vec<Fence>,
    leases: Vec<LeaseMutation>,
}

impl Several {
    fn weight(&self) -> usize {
        self.ops.values().map(Op::weight).sum::<usize>() + weight_of_leases(&self.fences, &self.leases)
    }
}

impl Coordinator {
    /// Commits one mutation of one run: the way of most writes.
    pub(super) fn write(&self, run: RunId, mutation: Mutation) -> impl Future<Output = Result<Commit, Error>> + Send {
        self.write_checked(Ok((run, mutation)))
    }

    /// The same of what may have been refused before it was begun.
    pub(super) fn write_checked(
        &self,
        work: Result<(RunId, Mutation), InputError>,
    ) -> impl Future<Output = Result<Commit, Error>> + Send {
        let engine = self.engine();
        let deferred = self.durability == Durability::Deferred;
        let fences = || self.fences.as_deref().map(<[Fence]>::to_vec).unwrap_or_default();
        let work = work.map(|(run, mutation)| {
            let mutations = vec![mutation];
            let guards = self.claims.as_deref().map(|claims| of_claims(claims, &run, &mutations)).unwrap_or_default();
            (run, Op { mutations, guards, fences: fences(), deferred, ..Op::default() })
        });
        async move {
            let (run, op) = work?;
            if engine.is_closed() {
                return Err(Error::Closed);
            }
            Ok(engine.commit_one(run, op, false).await?.into())
        }
    }

    pub(super) async fn commit_work(&self, mut work: Work) -> Result<Commit, Error> {
        let engine = self.engine();
        if engine.is_closed() {
            return Err(Error::Closed);
        }
        if let Some(fences) = &self.fences {
            for fence in fences.iter() {
                if !work.fences.contains(fence) {
                    work.fences.push(fence.clone());
                }
            }
        }
        Ok(engine.commit(work, self.durability == Durability::Deferred).await?.into())
    }
}

/// What must hold of the nodes that are written to under their own claims, besides the leases of these: whoever ended such a node has the last word.
pub(super) fn of_claims(claims: &[LeaseKey], run: &RunId, mutations: &[Mutation]) -> Vec<Guard> {
    let of_run = claims.iter().filter(|claim| claim.run == *run).filter_map(|claim| claim.node.as_ref());
    of_run.filter(|claimed| mutations.iter().any(|m| m.node() == Some(*claimed))).map(runs).collect()
}

/// The node runs.
pub(super) fn runs(node: &NodeId) -> Guard {
    Guard::NodeStatus { node: node.clone(), one_of: vec![NodeStatus::Running] }
}

impl Engine {
    /// Commits what was put together, each way as it is due to it.
    pub(super) async fn commit(self: &Arc<Self>, mut work: Work, deferred: bool) -> Result<Committed, Error> {
        if work.runs.len() != 1 {
            return Box::pin(self.commit_several(work)).await;
        }
        let Some((run, Draft { mutations, guards })) = work.runs.pop_first() else { return Err(Error::Closed) };
        let Work { fences, leases, now, unheard, .. } = work;
        self.commit_one(run, Op { mutations, guards, fences, leases, deferred, unheard, ..Op::default() }, now).await
    }

    async fn admit(&self, weight: usize, now: bool) -> Result<Permit, Error> {
        if weight > self.limits.entry_bytes {
            let why = format!("it takes about {weight} bytes, the limit is {}; split it", self.limits.entry_bytes);
            return Err(InputError::new("transaction", why).into());
        }
        let permit = if now { self.admission.try_acquire(weight) } else { self.admission.acquire(weight).await };
        Ok(permit?)
    }

    /// Commits an op on one run, under a span that names it.
    ///
    /// Futures are copied into one another as a whole, with all that they may ever hold: what is not usual is boxed, and a block keeps its op once.
    #[expect(clippy::manual_async_fn, reason = "an async function keeps its arguments twice")]
    pub(super) fn commit_one(&self, run: RunId, op: Op, now: bool) -> impl Future<Output = Result<Committed, Error>> + Send {
        async move {
            if let Some(span) = span_of(&run, &op) {
                let under: BoxFuture<'_, _> = Box::pin(self.under(span, run, op, now));
                return under.await;
            }
            let (sending, watch) = match self.sent_at_once(&run, op, now) {
                Ok(sending) => sending,
                Err(later) => return later.await,
            };
            let sent = match watch {
                Some(watch) => {
                    let awake: BoxFuture<'_, _> = Box::pin(self.awake.wait(sending, watch));
                    awake.await
                }
                None => sending.await,
            };
            let back = match sent {
                Sent::Answered(answer) => return Ok(answer?),
                Sent::Bounced(back) => back,
            };
            let again: BoxFuture<'_, _> = Box::pin(self.sent_again(run, back));
            again.await
        }
    }

    async fn under(&self, span: tracing::Span, run: RunId, op: Op, now: bool) -> Result<Committed, Error> {
        let committed = self.through_actor(run, op, now).instrument(span.clone()).await;
        note_seq(&span, &committed);
        committed
    }

    /// Sends an op to a run that is here, if it is admitted now; else the way that may take longer.
    fn sent_at_once(&self, run: &RunId, op: Op, now: bool) -> Result<OnItsWay<'_>, BoxFuture<'_, Result<Committed, Error>>> {
        let weight = op.weight();
        let permit = if weight > self.limits.entry_bytes { None } else { self.admission.try_acquire(weight).ok() };
        match permit.zip(self.directory.get(run.as_str())) {
            Some((permit, handle)) => {
                let waits_for_storage = !op.deferred && self.admission.is_of_one();
                let watch = if waits_for_storage { self.context.persist.watch(run) } else { None };
                Ok((handle.commit(op, permit), watch))
            }
            None => Err(Box::pin(self.through_actor(run.clone(), op, now))),
        }
    }

    async fn through_actor(&self, run: RunId, op: Op, now: bool) -> Result<Committed, Error> {
        let permit = self.admit(op.weight(), now).await?;
        self.send_on(run, op, permit).await
    }

    /// Sends on an op that came back: its actor had ended.
    async fn sent_again(&self, run: RunId, back: Box<(Op, Permit)>) -> Result<Committed, Error> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        step_back().await;
        let (op, permit) = *back;
        self.send_on(run, op, permit).await
    }

    async fn send_on(&self, run: RunId, mut op: Op, mut permit: Permit) -> Result<Committed, Error> {
        let creates = op.creates_run();
        loop {
            let handle = match self.directory.get(run.as_str()) {
                Some(resident) => resident,
                None if creates => self.directory.any(&run).await?,
                None => self.directory.existing(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?,
            };
            match handle.commit(op, permit).await {
                Sent::Answered(answer) => return Ok(answer?),
                Sent::Bounced(back) => {
                    if self.is_closed() {
                        return Err(Error::Closed);
                    }
                    (op, permit) = *back;
                    step_back().await;
                }
            }
        }
    }

    /// Commits over several runs in a task of its own, so that a caller that goes away leaves no run held.
    async fn commit_several(self: &Arc<Self>, work: Work) -> Result<Committed, Error> {
        if work.is_empty() {
            return Ok(Committed { seq: None, runs: Vec::new(), grants: Vec::new() });
        }
        let Work { runs, fences, leases, now, unheard, .. } = work;
        let draft = |(run, Draft { mutations, guards })| (run, Op { mutations, guards, ..Op::default() });
        let several = Several { ops: runs.into_iter().map(draft).collect(), fences, leases };
        // Here, not in the task: until it is admitted a caller that goes away takes all of it along; and who is told of a loss is there.
        let permit = self.admit(several.weight(), now).await?;
        if !unheard && let Some(loss) = several.ops.keys().find_map(|run| self.context.losses.take(run)) {
            return Err(loss.into());
        }
        let (engine, first) = (Arc::clone(self), several.ops.keys().next().cloned());
        let span = tracing::debug_span!(
            "commit",
            runs = several.ops.len(),
            run = first.as_ref().map(RunId::as_str),
            mutations = several.ops.values().map(|op| op.mutations.len()).sum::<usize>(),
            seq = tracing::field::Empty,
        );
        let of_task = span.clone();
        let task = async move {
            let committed = engine.several(several, permit).await;
            note_seq(&of_task, &committed);
            committed
        };
        match self.apart(task.instrument(span)).await {
            Ok(answer) => answer,
            // It panicked or its runtime ended, perhaps after it was sent.
            Err(cut) if cut.begun => Err(first.map_or(Error::Closed, Error::Unknown)),
            Err(_) => Err(Error::Closed),
        }
    }

    async fn several(self: Arc<Self>, several: Several, permit: Permit) -> Result<Committed, Error> {
        let weight = several.weight();
        let Several { mut ops, fences, leases } = several;
        let mut permit = Some(permit);
        for op in ops.values_mut() {
            op.stamp(|| self.context.clock.now());
        }
        let (mut fresh, mut verified) = (false, false);
        // Which runs it was sent to, once it came back.
        let mut sent_to = Vec::new();
        for attempt in 1..=MAX_ATTEMPTS {
            let held = self.hold_all(&ops, fresh).await?;
            let mut remade = ops.keys().zip(&held).zip(&sent_to);
            if let Some(((run, _), _)) = remade.find(|((_, grant), sent_to)| is_another(**sent_to, born(grant.state()))) {
                return Err(Error::RunNotFound(run.clone()));
            }
            let planned = match plan_all(&ops, &held) {
                Ok(planned) => planned,
                // Others may have changed since what it was refused on.
                Err(_) if self.backend.is_shared() && !verified => {
                    (fresh, verified) = (true, true);
                    continue;
                }
                Err(refusal) => return Err(refusal.into()),
            };
            let (parts, after): (Vec<_>, Vec<_>) = planned.into_iter().map(|planned| (planned.part, planned.after)).unzip();
            let bases: Vec<Version> = parts.iter().map(|part| part.expect).collect();
            let entry = Entry { parts, leases: leases.clone(), fences: fences.clone(), ..Entry::default() };
            // From here on it may be committed: what is not released otherwise, because this task ends in the middle, is loaded again.
            let mut held = held;
            held.iter_mut().for_each(HoldGrant::sent);
            let (reply, answer) = oneshot::channel();
            let sink = FlushSink::One(OneSink { reply, permit: permit.take() });
            self.context.persist.submit(Submission { entry, weight, chain: 0, sink });
            let release = |held: Vec<HoldGrant>, reload: bool| {
                for grant in held {
                    grant.release(if reload { Release::Reload } else { Release::Unchanged });
                }
            };
            match answer.await {
                Ok(Ok(receipt)) => {
                    for (run, _) in ops.iter().filter(|(_, op)| op.mutations.iter().any(Mutation::frees_locks)) {
                        self.leases.free_run(run);
                    }
                    for overtaken in self.publish_all(held, &ops, &bases, after, &receipt) {
                        // Who is answered reads what he wrote.
                        overtaken.settle().await;
                    }
                    return Ok(Committed::durable(receipt));
                }
                Ok(Err(NotCommitted::Refused(refusal))) => {
                    release(held, self.backend.is_shared());
                    return Err(refusal.into());
                }
                Ok(Err(NotCommitted::Store(error))) => {
                    release(held, error.is_unknown_outcome());
                    return Err(error.into());
                }
                Ok(Err(NotCommitted::Recheck)) => {
                    sent_to = held.iter().map(|grant| born(grant.state())).collect();
                    release(held, true);
                    verified = false;
                    tokio::time::sleep(crate::run::jitter(attempt)).await;
                }
                Err(_) => {
                    release(held, true);
                    let run = ops.into_keys().next();
                    return Err(run.map_or(Error::Closed, |run| CommitError::Unknown(run).into()));
                }
            }
            permit = Some(self.admit(weight, false).await?);
        }
        let run = ops.into_keys().next();
        Err(run.map_or(Error::Closed, |run| Error::Contended { run, attempts: MAX_ATTEMPTS }))
    }

    /// Holds the runs in the order of their ids, so that two such transactions never wait for one another.
    async fn hold_all(self: &Arc<Self>, ops: &BTreeMap<RunId, Op>, fresh: bool) -> Result<Vec<HoldGrant>, Error> {
        let mut held = Vec::with_capacity(ops.len());
        for (run, op) in ops {
            loop {
                let handle = if op.creates_run() {
                    self.directory.any(run).await?
                } else {
                    self.directory.existing(run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?
                };
                if let Some(grant) = handle.hold(fresh).await {
                    held.push(grant);
                    break;
                }
                if self.is_closed() {
                    return Err(Error::Closed);
                }
                tokio::task::yield_now().await;
            }
        }
        Ok(held)
    }

    /// Publishes all runs as one, then lets their actors go on. Answers with those that load what others wrote in between, and their own part with it.
    fn publish_all(
        &self,
        held: Vec<HoldGrant>,
        ops: &BTreeMap<RunId, Op>,
        bases: &[Version],
        after: Vec<Option<RunState>>,
        receipt: &Receipt,
    ) -> Vec<RunHandle> {
        let mut releases = Vec::with_capacity(held.len());
        let publication = self.publications.write().unwrap_or_else(PoisonError::into_inner);
        for (((grant, state), versions), base) in held.into_iter().zip(after).zip(&receipt.runs).zip(bases) {
            let is_as_thought = state.as_ref().is_none_or(|state| state.version() == versions.after || state.is_newborn());
            if versions.before != *base || !is_as_thought {
                // Others wrote in between: what they wrote is loaded before anything is published.
                releases.push((grant, Release::Reload));
                continue;
            }
            let state = state.map(|state| if state.version() == versions.after { state } else { state.born_at(versions.after) });
            grant.cell().publish(state.as_ref(), versions.after);
            releases.push((grant, Release::Moved(state)));
        }
        drop(publication);
        if self.directory.wants_changes() {
            for ((grant, release), versions) in releases.iter().zip(&receipt.runs) {
                if let (Release::Moved(state), Some(op)) = (release, ops.get(grant.cell().id())) {
                    let touched = crate::run::touched(&op.mutations);
                    let change = ChangeSeed::of(versions.clone(), Some(receipt.seq), touched, state.clone());
                    self.directory.changed(change);
                }
            }
        }
        let mut loading = Vec::new();
        for (grant, release) in releases {
            let run = grant.cell().id().clone();
            let reloads = matches!(release, Release::Reload);
            let lives = grant.release(release);
            if lives && !reloads {
                continue;
            }
            let Some(handle) = self.directory.get(run.as_str()) else { continue };
            if !lives {
                // It died while it was held: its successor may have loaded before this commit.
                handle.reload();
            }
            loading.push(handle);
        }
        loading
    }
}

/// An op that was sent, and what tells its answer, if that may be waited for awake.
type OnItsWay<'a> = (Sending, Option<Watch<'a>>);

/// The span of a commit, if anybody is told of it.
fn span_of(run: &RunId, op: &Op) -> Option<tracing::Span> {
    let span = tracing::debug_span!(
        "commit",
        run = run.as_str(),
        node = op.mutations.first().and_then(Mutation::node).map(NodeId::as_str),
        mutations = op.mutations.len(),
        seq = tracing::field::Empty,
    );
    (!span.is_disabled()).then_some(span)
}

fn note_seq(span: &tracing::Span, committed: &Result<Committed, Error>) {
    if let Some(seq) = committed.as_ref().ok().and_then(|committed| committed.seq) {
        span.record("seq", seq.0);
    }
}

fn plan_all(ops: &BTreeMap<RunId, Op>, held: &[HoldGrant]) -> Result<Vec<crate::run::Planned>, Refusal> {
    ops.iter()
        .zip(held)
        .map(|((run, op), grant)| {
            let base = grant.state().map_or(Version::NONE, RunState::version);
            plan(run, base, grant.state(), op.mutations.clone(), op.guards.clone()).map_err(|refused| refused.refusal)
        })
        .collect()
}
