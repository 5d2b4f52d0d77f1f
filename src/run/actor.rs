//! The actor of one run: carries what the chain decides.
//!
//! Modes: *ready* takes ops; *recovering* waits until nothing is on its way, loads the run if others wrote to it, and checks again what came
//! back; *held* belongs to a transaction over several runs. Whatever arrives meanwhile is stashed, in order.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use super::admission::Permit;
use super::chain::{Chain, Progress, Touched};
use super::handle::{HoldGrant, Release, RunCell};
use super::jitter::jitter;
use super::losses::Losses;
use super::op::{Ack, ChangeSeed, CommitError, Committed, DeferredLoss, Envelope, Op};
use super::sink::{FlushSink, Outcomes, RunSink};
use crate::model::{Clock, Receipt, RunId, RunReceipt, RunState, Version};
use crate::persist::{Persist, Settlement, Submission};
use crate::store::{StateBackend, StoreError};

/// How often an op is checked again before its caller is told that the run is contended.
const MAX_ATTEMPTS: u32 = 32;
/// How often loading a run is tried before its actor gives up and ends.
const LOAD_ATTEMPTS: u32 = 5;

/// What a run's actor needs to know of the world above it.
pub(crate) trait Surroundings: Send + Sync + fmt::Debug + 'static {
    /// The actor ends: the next use of the run starts a new one, behind what was sent down if that is not settled.
    fn retire(&self, run: &RunId, actor: ractor::ActorId, settled: bool);
    /// The run ended or was deleted: its locks and its nodes' are free.
    fn ended(&self, run: &RunId);
    /// Whether anybody listens to changes.
    fn wants_changes(&self) -> bool;
    /// Something was committed; nobody can see it yet.
    fn moved(&self, change: &ChangeSeed);
    /// Something was committed, and can be seen.
    fn changed(&self, change: ChangeSeed);
    /// Deferred writes were lost.
    fn lost(&self, loss: &DeferredLoss);
}

/// What all runs share.
#[derive(Debug)]
pub(crate) struct RunContext {
    pub(crate) backend: Arc<dyn StateBackend>,
    pub(crate) persist: Persist<FlushSink>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) surroundings: Arc<dyn Surroundings>,
    /// How many runs have deferred writes on their way.
    pub(crate) deferred_runs: Arc<AtomicUsize>,
    /// Deferred writes that were lost and not told yet.
    pub(crate) losses: Arc<Losses>,
    /// Where chains draw their numbers.
    pub(crate) chain_numbers: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(crate) enum Msg {
    Commit(Envelope),
    Settled(Outcomes),
    Hold {
        fresh: bool,
        reply: oneshot::Sender<HoldGrant>,
    },
    Release(Release),
    Flush(oneshot::Sender<()>),
    Reload,
    /// The version that storage has of the run, because others may have written to it.
    Follow(Option<Version>),
    Passivate,
    Loaded(Result<Option<RunState>, StoreError>),
}

#[derive(Debug)]
pub(super) struct RunActor;

pub(super) struct Arguments {
    pub(super) context: Arc<RunContext>,
    pub(super) cell: Arc<RunCell>,
    pub(super) state: Option<RunState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Ready,
    Recovering { reload: bool, loading: bool },
    Held,
    Retired,
}

/// The version that storage had when it was asked; `None`: there was no such run.
struct Found(Option<Version>);

enum Stashed {
    Commit(Envelope),
    Hold { fresh: bool, reply: oneshot::Sender<HoldGrant> },
    Flush(oneshot::Sender<()>),
}

/// An op with whom to answer (nobody, for a deferred write that was acknowledged).
struct Job {
    /// Its place among the ops of this actor: what comes back is checked again in this order.
    order: u64,
    op: Op,
    ack: Option<Ack>,
    permit: Permit,
}

pub(super) struct State {
    context: Arc<RunContext>,
    cell: Arc<RunCell>,
    myself: ActorRef<Msg>,
    chain: Chain,
    mode: Mode,
    stash: VecDeque<Stashed>,
    /// What came back from storage, or was refused on a state that was not settled (or not fresh), to be checked again, in the order in which
    /// it was asked for.
    again: BTreeMap<u64, Job>,
    orders: u64,
    /// Deferred writes that are not acknowledged yet, because durable ones are on their way before them.
    deferred: HashMap<u64, Ack>,
    /// What is in storage, to be acknowledged when the run is loaded.
    overtaken: Vec<(Ack, Committed, Permit)>,
    /// A hold that waits for a fresh load.
    fresh_hold: Option<oneshot::Sender<HoldGrant>>,
    /// The version that storage was seen to have; compared when nothing is on its way, because own entries move it too.
    found: Option<Found>,
}

#[cfg_attr(seeknal_ractor_async_trait, ractor::async_trait)]
impl Actor for RunActor {
    type Msg = Msg;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Msg>, args: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { context, cell, state } = args;
        Ok(State {
            chain: Chain::new(cell.id().clone(), state, Arc::clone(&context.chain_numbers)),
            context,
            cell,
            myself,
            mode: Mode::Ready,
            stash: VecDeque::new(),
            again: BTreeMap::new(),
            orders: 0,
            deferred: HashMap::new(),
            overtaken: Vec::new(),
            fresh_hold: None,
            found: None,
        })
    }

    async fn handle(&self, _: ActorRef<Msg>, message: Msg, state: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Commit(envelope) => state.take_in(Stashed::Commit(envelope)),
            Msg::Hold { fresh, reply } => state.take_in(Stashed::Hold { fresh, reply }),
            Msg::Flush(reply) => state.take_in(Stashed::Flush(reply)),
            Msg::Settled(outcomes) => state.settled(outcomes),
            Msg::Release(release) => state.released(release),
            Msg::Loaded(loaded) => state.loaded(loaded),
            Msg::Reload => {
                if state.mode == Mode::Ready {
                    state.recover(true);
                    state.go_on();
                }
            }
            Msg::Follow(found) => {
                state.found = Some(Found(found));
                state.go_on();
            }
            Msg::Passivate => state.passivate(),
        }
        state.mark();
        Ok(())
    }
}

impl State {
    fn take_in(&mut self, item: Stashed) {
        if self.mode == Mode::Retired {
            // Dropped, it goes back to its sender, who finds the successor.
            drop(item);
            return;
        }
        self.cell.touch();
        self.stash.push_back(item);
        self.go_on();
    }

    /// Does whatever can be done now, in order.
    fn go_on(&mut self) {
        loop {
            if let Mode::Recovering { reload, loading } = self.mode {
                if loading || !self.chain.is_settled() {
                    return;
                }
                if reload {
                    self.load();
                    return;
                }
                self.chain.reset();
                self.mode = Mode::Ready;
            }
            if self.mode != Mode::Ready || self.chain.has_barrier() {
                return;
            }
            if self.is_behind() {
                self.recover(true);
                continue;
            }
            if let Some((_, job)) = self.again.pop_first() {
                self.decide(job);
                continue;
            }
            match self.stash.front() {
                Some(Stashed::Commit(_)) => {}
                Some(Stashed::Hold { .. } | Stashed::Flush(_)) if self.chain.is_settled() => {}
                None | Some(_) => return,
            }
            match self.stash.pop_front() {
                Some(Stashed::Commit(envelope)) => {
                    if let Some((op, permit, ack)) = envelope.open() {
                        let loss = if op.unheard { None } else { self.context.losses.tell(self.cell.id()) };
                        if let Some(loss) = loss {
                            ack.answer(Err(CommitError::Lost(loss)));
                        } else {
                            self.orders += 1;
                            self.decide(Job { order: self.orders, op, ack: Some(ack), permit });
                        }
                    }
                }
                Some(Stashed::Flush(reply)) => {
                    let _caller_gone = reply.send(());
                }
                Some(Stashed::Hold { fresh, reply }) => {
                    if fresh {
                        self.fresh_hold = Some(reply);
                        self.recover(true);
                    } else {
                        self.hold(reply);
                    }
                }
                None => return,
            }
        }
    }

    /// Checks again what came back, as far as that can be done now: what was acknowledged from memory is on its way again before anybody looks.
    fn decide_again(&mut self) {
        if (self.mode, self.chain.is_settled()) == (Mode::Recovering { reload: false, loading: false }, true) {
            self.chain.reset();
            self.mode = Mode::Ready;
        }
        while self.mode == Mode::Ready
            && !self.chain.has_barrier()
            && let Some((_, job)) = self.again.pop_first()
        {
            self.decide(job);
        }
    }

    /// Whether others wrote what this actor has not seen. Told once: what is loaded after it is newer.
    fn is_behind(&mut self) -> bool {
        if !self.chain.is_settled() {
            return false;
        }
        let Some(Found(found)) = self.found.take() else { return false };
        match (found, self.chain.committed().map(RunState::version)) {
            (Some(found), Some(version)) => found > version,
            (found, version) => found.is_some() != version.is_some(),
        }
    }

    fn hold(&mut self, reply: oneshot::Sender<HoldGrant>) {
        self.mode = Mode::Held;
        // What holds it may commit before the actor hears of it.
        self.cell.set_unsettled(true);
        let grant = HoldGrant::new(self.chain.committed().cloned(), Arc::clone(&self.cell), self.myself.clone());
        // A grant that nobody takes releases itself as it is dropped.
        drop(reply.send(grant));
    }

    fn released(&mut self, release: Release) {
        if self.mode != Mode::Held {
            return;
        }
        self.mode = Mode::Ready;
        match release {
            Release::Unchanged => {}
            Release::Moved(state) => {
                self.chain.reload(state);
                self.publish();
            }
            Release::Reload => self.recover(true),
        }
        self.go_on();
    }

    /// Checks an op against the tip, and sends it down or refuses it.
    fn decide(&mut self, job: Job) {
        let Job { order, mut op, ack, permit } = job;
        if op.attempts > MAX_ATTEMPTS {
            self.give_up(ack, CommitError::Contended(self.cell.id().clone(), op.attempts));
            return;
        }
        let context = &self.context;
        op.stamp(|| context.clock.now());
        let (deferred, weight) = (op.is_deferred(), op.weight());
        match self.chain.decide(&mut op, context.surroundings.wants_changes()) {
            Ok((ticket, entry)) => {
                // Before it is sent: whoever finds it decided finds this too.
                self.cell.set_unsettled(true);
                let losses = deferred.then(|| (Arc::clone(&context.losses), self.cell.id().clone()));
                let (attempts, hasty) = (op.attempts, op.hasty);
                let mut sink = RunSink { actor: self.myself.clone(), ticket, order, ack, attempts, hasty, losses, permit };
                if deferred {
                    self.cell.set_deferred(true);
                    if let Some(ack) = sink.ack.take() {
                        self.deferred.insert(ticket, ack);
                    }
                    self.show_deferred();
                }
                self.context.persist.submit(Submission { entry, weight, chain: self.chain.number(), sink: FlushSink::Run(sink) });
            }
            // What it was refused on may never be committed: it is checked again when that is settled, however often. Or others may have changed it
            // since: it is checked once more on what is.
            Err(_) if !op.hasty && (!self.chain.is_settled() || (self.context.backend.is_shared() && !op.verified)) => {
                op.verified = true;
                let reload = self.context.backend.is_shared();
                self.again.insert(order, Job { order, op, ack, permit });
                self.recover(reload);
            }
            Err(refusal) => self.give_up(ack, CommitError::Refused(refusal)),
        }
    }

    /// Answers a caller with an error; a deferred write that was acknowledged is lost.
    fn give_up(&mut self, ack: Option<Ack>, error: CommitError) {
        if let Some(ack) = ack {
            ack.answer(Err(error));
        } else {
            let cause = match &error {
                CommitError::Refused(refusal) => refusal.to_string(),
                CommitError::Store(error) => error.to_string(),
                _ => "others changed the run again and again".to_owned(),
            };
            let loss = self.context.losses.note(self.cell.id(), &cause);
            self.context.surroundings.lost(&loss);
        }
    }

    /// Shows and acknowledges the deferred writes that stand directly on what is committed.
    fn show_deferred(&mut self) {
        if self.deferred.is_empty() {
            return;
        }
        let seen: Vec<(u64, Version)> =
            self.chain.visible_deferred().filter(|(ticket, _)| self.deferred.contains_key(ticket)).collect();
        if seen.is_empty() {
            return;
        }
        self.publish();
        for (ticket, before) in seen {
            if let Some(ack) = self.deferred.remove(&ticket) {
                let receipt = RunReceipt { run: self.cell.id().clone(), before, after: before.next() };
                ack.answer(Ok(Committed { seq: None, runs: vec![receipt], grants: Vec::new() }));
            }
        }
    }

    /// Says whether acknowledged writes are not in storage yet, and whether anything is on its way. What is settled was published before.
    fn mark(&self) {
        self.cell.set_deferred(self.chain.has_deferred() || self.again.values().any(|job| job.ack.is_none()));
        self.cell.set_unsettled(self.mode != Mode::Ready || !self.chain.is_settled() || !self.again.is_empty());
    }

    fn publish(&self) {
        let durable = self.chain.committed().map_or(Version::NONE, RunState::version);
        self.cell.publish(self.chain.visible(), durable);
    }

    fn recover(&mut self, reload: bool) {
        self.mode = match self.mode {
            Mode::Recovering { reload: before, loading } => Mode::Recovering { reload: before || reload, loading },
            _ => Mode::Recovering { reload, loading: false },
        };
    }

    fn settled(&mut self, outcomes: Outcomes) {
        let (mut acks, mut news) = (Vec::new(), Vec::new());
        let mut moved = false;
        for (sink, settlement) in outcomes.take() {
            let RunSink { ticket, order, ack, attempts, hasty, permit, .. } = sink;
            // A deferred write that is settled before it was acknowledged is answered like any other.
            let was_deferred = ack.is_none();
            let ack = ack.or_else(|| self.deferred.remove(&ticket));
            match settlement {
                Settlement::Applied(receipt) => {
                    let (progress, frees_locks) = self.chain.applied(ticket, receipt.runs.first());
                    if frees_locks {
                        self.context.surroundings.ended(self.cell.id());
                    }
                    match progress {
                        Progress::Moved(touched) => {
                            moved = true;
                            news.extend(self.news(&receipt, touched));
                            acks.extend(ack.map(|ack| (ack, Committed::durable(receipt))));
                            drop(permit);
                        }
                        Progress::Overtaken => {
                            // With its permit: whoever waits until all are answered waits for this one too.
                            self.overtaken.extend(ack.map(|ack| (ack, Committed::durable(receipt), permit)));
                            self.recover(true);
                        }
                    }
                }
                Settlement::Recheck(entry, reload) => {
                    self.chain.fell(ticket);
                    // That another entry was refused says nothing of this one.
                    let op = Op::again(entry, attempts + u32::from(reload), was_deferred, hasty);
                    self.again.insert(order, Job { order, op, ack, permit });
                    self.recover(reload);
                }
                Settlement::Refused(refusal) => {
                    self.chain.fell(ticket);
                    self.give_up(ack, CommitError::Refused(refusal));
                    self.recover(self.context.backend.is_shared());
                }
                Settlement::NotApplied(error) => {
                    self.chain.fell(ticket);
                    self.give_up(ack, CommitError::Store(error));
                    self.recover(false);
                }
                Settlement::Unknown(error) => {
                    self.chain.fell(ticket);
                    self.give_up(ack, CommitError::Store(error));
                    self.recover(true);
                }
            }
        }
        if self.chain.is_settled() && self.mode != Mode::Ready {
            // What was deferred and came back is not on its way: readers see what is committed until it is again.
            self.chain.reset();
        }
        self.decide_again();
        // What is acknowledged below is seen before, whatever has to be looked up for others. An overtaken run is published when it is loaded: a
        // snapshot never carries a number whose commits it lacks. And what was acknowledged from memory and waits to be checked again stays seen.
        let waits =
            matches!(self.mode, Mode::Recovering { reload: true, .. }) || self.again.values().any(|job| job.ack.is_none());
        if moved || !waits {
            self.publish();
        }
        self.mark();
        for change in news {
            self.context.surroundings.changed(change);
        }
        for (ack, committed) in acks {
            ack.answer(Ok(committed));
        }
        self.show_deferred();
        self.go_on();
    }

    /// What is told of an entry that was applied, once it can be seen. Who looks for work is told at once.
    fn news(&self, receipt: &Receipt, touched: Option<Touched>) -> Option<ChangeSeed> {
        let versions = receipt.runs.first()?;
        let state = self.chain.committed().cloned();
        // Who subscribed while it was on its way is told what its rows say.
        let touched = match touched {
            Some(touched) => touched,
            None if self.context.surroundings.wants_changes() => newer(state.as_ref(), versions.before),
            None => return None,
        };
        let change = ChangeSeed {
            run: versions.run.clone(),
            before: versions.before,
            after: versions.after,
            seq: Some(receipt.seq),
            nodes: touched.nodes,
            header: touched.header,
            deleted: state.is_none(),
            state,
        };
        self.context.surroundings.moved(&change);
        Some(change)
    }

    /// Loads the run behind everything that was sent down for it.
    fn load(&mut self) {
        self.mode = Mode::Recovering { reload: true, loading: true };
        let (context, have, myself) = (Arc::clone(&self.context), self.chain.committed().cloned(), self.myself.clone());
        let id = self.cell.id().clone();
        let attempts = self.again.values().map(|job| job.op.attempts).max().unwrap_or(0);
        drop(tokio::spawn(async move {
            if attempts > 1 {
                tokio::time::sleep(jitter(attempts)).await;
            }
            let mut answer = Err(StoreError::closed());
            for attempt in 0..LOAD_ATTEMPTS {
                if let Err(error) = context.persist.barrier(&id).await {
                    answer = Err(error);
                    break;
                }
                answer = match &have {
                    Some(have) => context.backend.reload_run(have).await,
                    None => context.backend.load_run(&id).await,
                };
                match &answer {
                    Err(error) if error.is_retryable() => tokio::time::sleep(jitter(attempt + 1)).await,
                    _ => break,
                }
            }
            let _actor_gone = myself.cast(Msg::Loaded(answer));
        }));
    }

    fn loaded(&mut self, loaded: Result<Option<RunState>, StoreError>) {
        match loaded {
            Ok(state) => {
                let news = self.net_change(state.as_ref());
                self.chain.reload(state);
                self.mode = Mode::Ready;
                // Who holds the run holds it before anything else is on its way.
                if self.fresh_hold.is_none() {
                    self.decide_again();
                }
                self.publish();
                if let Some(change) = news {
                    self.context.surroundings.changed(change);
                }
                for (ack, committed, _) in self.overtaken.drain(..) {
                    ack.answer(Ok(committed));
                }
                if let Some(reply) = self.fresh_hold.take() {
                    self.hold(reply);
                }
                self.go_on();
            }
            Err(error) => {
                tracing::error!(run = %self.cell.id(), %error, "a run could not be loaded again; its actor ends");
                // First: whoever reads after the answers below asks storage, not what is known here.
                self.leave(false);
                // They are in storage, whatever can be read of it now.
                for (ack, committed, _) in self.overtaken.drain(..) {
                    ack.answer(Ok(committed));
                }
                // Before those are answered who wait in the stash until all is settled.
                for job in std::mem::take(&mut self.again).into_values() {
                    self.give_up(job.ack, CommitError::Store(error.clone()));
                }
                self.end();
            }
        }
    }

    /// Of what others committed subscribers learn the net change of every row.
    fn net_change(&self, state: Option<&RunState>) -> Option<ChangeSeed> {
        if !self.context.surroundings.wants_changes() {
            return None;
        }
        let known = self.chain.committed();
        let before = known.map_or(Version::NONE, RunState::version);
        let after = state.map_or(Version::NONE, RunState::version);
        if before == after {
            return None;
        }
        let mut changed = newer(state, before);
        // A node that went is one that the counts miss.
        let made = changed.nodes.iter().filter(|id| known.is_none_or(|known| known.node(id.as_str()).is_none())).count();
        let kept = state.map_or(0, RunState::node_count).saturating_sub(made);
        if let Some(known) = known.filter(|known| known.node_count() > kept) {
            let gone = known.nodes().map(|(id, _)| id).filter(|id| state.is_none_or(|state| state.node(id.as_str()).is_none()));
            changed.nodes.extend(gone.cloned());
        }
        let change = ChangeSeed {
            run: self.cell.id().clone(),
            before,
            after,
            seq: None,
            nodes: changed.nodes,
            header: changed.header,
            deleted: state.is_none(),
            state: state.cloned(),
        };
        self.context.surroundings.moved(&change);
        Some(change)
    }

    /// Ends if there is nothing to do.
    fn passivate(&mut self) {
        if self.mode == Mode::Ready && self.chain.is_settled() && self.stash.is_empty() && self.again.is_empty() {
            self.leave(true);
            self.end();
        }
    }

    fn leave(&mut self, settled: bool) {
        self.mode = Mode::Retired;
        self.context.surroundings.retire(self.cell.id(), self.myself.get_id(), settled);
    }

    fn end(&mut self) {
        // What is queued behind this message, or stashed, goes back to its senders as it is dropped.
        self.stash.clear();
        self.myself.stop(None);
    }
}

/// The rows of a run that are newer than a version.
pub(crate) fn newer(state: Option<&RunState>, version: Version) -> Touched {
    let Some(state) = state else { return Touched { nodes: Vec::new(), header: true } };
    Touched { nodes: state.newer_nodes(version), header: state.header().version > version }
}
