//! The actor of one run: carries what the chain decides.
//!
//! Modes: *ready* takes ops; *recovering* waits until nothing is on its way, loads the run if others wrote to it, and checks again what came
//! back; *held* belongs to a transaction over several runs. Whatever arrives meanwhile is stashed, in order.

mod again;
mod following;
mod fresh;
mod settling;
mod stash;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use self::again::Again;
use self::fresh::Fresh;
use self::stash::{Stash, Stashed};
use super::admission::Permit;
use super::chain::{Chain, is_another};
use super::handle::{HoldGrant, Release, RunCell};
use super::losses::Losses;
use super::op::{Ack, ChangeSeed, CommitError, Committed, DeferredLoss, Envelope, Op};
use super::sink::{Aside, FlushSink, Outcomes, RunSink};
use crate::model::{Clock, FencingToken, LeaseMutation, Mutation, Refusal, RunId, RunReceipt, RunState, Snapshot, Version};
use crate::persist::{Persist, Submission};
use crate::store::{StateBackend, StoreError};

/// How often an op is checked again before its caller is told that the run is contended.
const MAX_ATTEMPTS: u32 = 512;
/// How often loading a run is tried before its actor gives up and ends.
const LOAD_ATTEMPTS: u32 = 5;

/// What a run's actor needs to know of the world above it.
pub(crate) trait Surroundings: Send + Sync + fmt::Debug + 'static {
    /// The actor ends: the next use of the run starts a new one, behind what was sent down if that is not settled.
    fn retire(&self, run: &RunId, actor: ractor::ActorId, settled: bool);
    /// The run ended or was deleted: its locks and its nodes' are free.
    fn ended(&self, run: &RunId);
    /// A lease was given back with a commit that can be seen now: its place is free.
    fn returned(&self, token: FencingToken);
    /// Whether anybody listens to changes. Asked once more when they can be seen: whoever listens before he looks misses none.
    fn wants_changes(&self) -> bool;
    /// Deferred writes that were seen did not come to be as they were seen; their versions name other states now.
    fn taken_back(&self, run: &RunId);
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

impl RunContext {
    /// An acknowledged write went with the actor of its run.
    fn lose(&self, run: &RunId) {
        let loss = self.losses.note(run, "the actor of the run ended".to_owned().into());
        self.surroundings.lost(&loss);
    }
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
    /// The run as it is in storage, which had this version when it was asked; none where nobody else can write. Answered and not held for who asks:
    /// nobody knows when he is polled next.
    Read {
        found: Option<Found>,
        reply: oneshot::Sender<Option<Snapshot>>,
    },
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
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found(pub(crate) Option<Version>);

/// Why an op was not committed, and whom to tell: nobody, if it is a deferred write that was acknowledged. With its permit: whoever waits until all is
/// settled finds its loss noted.
struct Answer {
    ack: Option<Ack>,
    error: CommitError,
    permit: Permit,
}

/// An op with whom to answer (nobody, for a deferred write that was acknowledged).
struct Job {
    /// Its place among the ops of this actor: what comes back is checked again in this order.
    order: u64,
    /// Which run it was sent to, by the version at which that was made. None if it was not sent yet, or makes the run.
    born: Version,
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
    stash: Stash,
    /// What came back from storage, or was refused on a state that was not settled (or not fresh), to be checked again, in the order in which
    /// it was asked for.
    again: Again,
    orders: u64,
    /// Deferred writes that are not acknowledged yet, because durable ones are on their way before them: their tickets in order, and the versions that they
    /// expect before them.
    deferred: VecDeque<(u64, Version, Ack)>,
    /// What deferred writes bring along, once there was one.
    aside_of_deferred: Option<Arc<Aside>>,
    /// What is in storage, to be acknowledged when the run is loaded.
    overtaken: Vec<(Ack, Committed, Permit)>,
    /// Who waits for a fresh load.
    fresh: Option<Fresh>,
    /// The version that storage was seen to have; compared when nothing is on its way, because own entries move it too.
    found: Option<Found>,
    /// Whether deferred writes that were seen did not come to be as they were seen, and readers are still to be shown what is.
    takes_back: bool,
    /// Whether the run is to be loaded once more when the load that is under way, or who holds it, is done.
    reload_again: bool,
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
            stash: Stash::default(),
            again: Again::default(),
            orders: 0,
            deferred: VecDeque::new(),
            aside_of_deferred: None,
            overtaken: Vec::new(),
            fresh: None,
            found: None,
            takes_back: false,
            reload_again: false,
        })
    }

    async fn handle(&self, _: ActorRef<Msg>, message: Msg, state: &mut State) -> Result<(), ActorProcessingErr> {
        let handling = Handling(state);
        let state = &mut *handling.0;
        match message {
            Msg::Commit(envelope) => state.take_in(Stashed::Commit(envelope)),
            Msg::Hold { fresh, reply } => state.take_in(Stashed::Hold { fresh, reply }),
            Msg::Read { found, reply } => state.take_in(Stashed::Read { found, reply }),
            Msg::Flush(reply) => state.take_in(Stashed::Flush(reply)),
            Msg::Settled(outcomes) => state.settled(outcomes),
            Msg::Release(release) => state.released(release),
            Msg::Loaded(loaded) => state.loaded(loaded),
            Msg::Reload => {
                state.reload();
                state.go_on();
            }
            Msg::Follow(found) => {
                state.hear(found);
                state.go_on();
            }
            Msg::Passivate => state.passivate(),
        }
        state.mark();
        Ok(())
    }
}

/// The state while a message is handled. A panic of that is the actor's end, and nobody may read or ask it from then on: those whose outcomes are in its
/// mailbox are answered while it unwinds, long before its supervisor hears of it.
struct Handling<'a>(&'a mut State);

impl Drop for Handling<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cell.set_dead();
            self.0.lose_acknowledged();
        }
    }
}

/// An op that was acknowledged from memory is in no list, because it is being checked.
struct Deciding(Arc<RunContext>, Arc<RunCell>);

impl Drop for Deciding {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lose(self.1.id());
        }
    }
}

/// However else the actor ends, as when its task is taken away.
impl Drop for State {
    fn drop(&mut self) {
        self.lose_acknowledged();
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
        self.stash.push(item);
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
            if let Some(job) = self.again.pop_first() {
                self.decide_or_refuse(job);
                continue;
            }
            match self.stash.first() {
                Some(Stashed::Commit(_)) => {}
                Some(Stashed::Hold { .. } | Stashed::Read { .. } | Stashed::Flush(_)) if self.chain.is_settled() => {}
                None | Some(_) => return,
            }
            match self.stash.pop_first() {
                Some(Stashed::Commit(envelope)) => {
                    if let Some((op, permit, ack)) = envelope.open() {
                        let loss = if op.unheard { None } else { self.context.losses.tell(self.cell.id()) };
                        if let Some(loss) = loss {
                            ack.answer(Err(CommitError::Lost(loss)));
                        } else {
                            self.orders += 1;
                            self.decide_or_refuse(Job { order: self.orders, born: Version::NONE, op, ack: Some(ack), permit });
                        }
                    }
                }
                Some(Stashed::Flush(reply)) => {
                    let _caller_gone = reply.send(());
                }
                Some(Stashed::Hold { fresh: false, reply }) => self.hold(reply),
                Some(Stashed::Hold { fresh: true, reply }) => self.load_for(Fresh::Hold(reply)),
                Some(Stashed::Read { found, reply }) => self.read(found, reply),
                None => return,
            }
        }
    }

    /// Checks again what came back, as far as that can be done now: what was acknowledged from memory is on its way again before anybody looks. What
    /// is refused is to be answered once it can be seen why.
    fn decide_again(&mut self) -> Vec<Answer> {
        let mut refused = Vec::new();
        if (self.mode, self.chain.is_settled()) == (Mode::Recovering { reload: false, loading: false }, true) {
            self.chain.reset();
            self.mode = Mode::Ready;
        }
        while self.mode == Mode::Ready
            && !self.chain.has_barrier()
            && let Some(job) = self.again.pop_first()
        {
            refused.extend(self.decide(job));
        }
        refused
    }

    fn decide_or_refuse(&mut self, job: Job) {
        if let Some(answer) = self.decide(job) {
            self.give_up(answer);
        }
    }

    /// Checks an op against the tip, and sends it down; or answers why it is refused.
    fn decide(&mut self, job: Job) -> Option<Answer> {
        let Job { order, born: sent_to, mut op, ack, permit } = job;
        // Behind the permit, and so dropped before it.
        let _lost_by_a_panic = ack.is_none().then(|| Deciding(Arc::clone(&self.context), Arc::clone(&self.cell)));
        if op.attempts > MAX_ATTEMPTS {
            let error = CommitError::Contended(self.cell.id().clone(), op.attempts);
            return Some(Answer { ack, error, permit });
        }
        let born = self.chain.born();
        if is_another(sent_to, born) {
            // As storage says of what it meets on its way.
            let error = CommitError::Refused(Refusal::RunNotFound { run: self.cell.id().clone() });
            return Some(Answer { ack, error, permit });
        }
        let context = &self.context;
        op.stamp(|| context.clock.now());
        let (deferred, weight) = (op.is_deferred(), op.weight());
        match self.chain.decide(&mut op, context.surroundings.wants_changes()) {
            Ok((ticket, entry)) => {
                // Before it is sent: whoever finds it decided finds this too.
                self.cell.set_unsettled(true);
                let (attempts, hasty) = (op.attempts, op.hasty);
                let ends = entry.parts.iter().flat_map(|part| &part.mutations).any(Mutation::frees_locks);
                let returned: Vec<FencingToken> =
                    entry.leases.iter().filter_map(LeaseMutation::returned).map(|(_, token)| token).collect();
                let losses = || deferred.then(|| Arc::clone(&context.losses));
                let aside = if ends || !returned.is_empty() {
                    Some(Arc::new(Aside { ends, returned, ..Aside::new(context, &self.cell, losses()) }))
                } else if deferred {
                    // The same for nearly all of them.
                    let aside = || Arc::new(Aside::new(context, &self.cell, losses()));
                    Some(Arc::clone(self.aside_of_deferred.get_or_insert_with(aside)))
                } else {
                    None
                };
                let actor = self.myself.clone();
                let mut sink = RunSink { actor, ticket, order, born, ack, attempts, hasty, aside, permit };
                if deferred {
                    self.cell.set_deferred(true);
                    if let Some(ack) = sink.ack.take() {
                        let before = entry.parts.first().map_or(Version::NONE, |part| part.expect);
                        self.deferred.push_back((ticket, before, ack));
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
                self.again.insert(Job { order, born: sent_to, op, ack, permit });
                self.recover(reload);
            }
            Err(refusal) => return Some(Answer { ack, error: CommitError::Refused(refusal), permit }),
        }
        None
    }

    /// The actor ends in the middle: what was acknowledged from memory and was to be checked again does not vanish in silence.
    fn lose_acknowledged(&mut self) {
        for job in std::mem::take(&mut self.again).into_jobs() {
            if job.ack.is_none() {
                self.context.lose(self.cell.id());
            }
            // Last: closing waits for its permit, and then tells what is noted.
            drop(job);
        }
    }

    /// Answers a caller with an error; a deferred write that was acknowledged is lost.
    fn give_up(&mut self, Answer { ack, error, permit }: Answer) {
        if let Some(ack) = ack {
            // First: who is answered may ask for the next one at once.
            drop(permit);
            ack.answer(Err(error));
        } else {
            let cause = match &error {
                CommitError::Refused(refusal) => refusal.into(),
                CommitError::Store(error) => error.into(),
                _ => "others changed the run again and again".to_owned().into(),
            };
            let loss = self.context.losses.note(self.cell.id(), cause);
            self.context.surroundings.lost(&loss);
            drop(permit);
        }
    }

    /// Shows and acknowledges the deferred writes that stand directly on what is committed.
    fn show_deferred(&mut self) {
        let mut seen = self.deferred.partition_point(|(ticket, ..)| self.chain.is_visible(*ticket));
        if seen == 0 {
            return;
        }
        self.publish();
        while seen > 0
            && let Some((_, before, ack)) = self.deferred.pop_front()
        {
            seen -= 1;
            let receipt = RunReceipt { run: self.cell.id().clone(), before, after: before.next() };
            ack.answer(Ok(Committed { seq: None, runs: vec![receipt], grants: Vec::new() }));
        }
    }

    /// Says whether acknowledged writes are not in storage yet, and whether anything is on its way. What is settled was published before.
    fn mark(&self) {
        self.cell.set_deferred(self.chain.has_deferred() || self.again.has_acknowledged());
        let is_doubtful = self.mode != Mode::Ready || !self.again.is_empty();
        self.cell.set_doubtful(is_doubtful);
        self.cell.set_unsettled(is_doubtful || !self.chain.is_settled());
    }

    fn publish(&mut self) {
        let durable = self.chain.committed().map_or(Version::NONE, RunState::version);
        self.cell.publish(self.chain.visible(), durable);
        if self.takes_back {
            self.takes_back = self.mode != Mode::Ready;
            self.cell.take_back();
            self.context.surroundings.taken_back(self.cell.id());
        }
    }

    fn recover(&mut self, reload: bool) {
        self.mode = match self.mode {
            Mode::Recovering { reload: before, loading } => Mode::Recovering { reload: before || reload, loading },
            _ => Mode::Recovering { reload, loading: false },
        };
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
