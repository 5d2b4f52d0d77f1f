//! The doors of a run: its cell, which readers use without asking anybody, and its actor's handle.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use std::task::{Context, Poll};

use arc_swap::ArcSwapOption;
use ractor::{Actor, ActorCell, ActorId, ActorRef, MessagingErr};
use tokio::sync::oneshot;

use super::actor::{Arguments, Found, Msg, RunActor, RunContext};
use super::admission::Permit;
use super::op::{CommitError, Committed, Envelope, Op, Reply};
use crate::model::{RunId, RunState, Snapshot, Version};

/// What readers see of a run, shared with its actor. Reading never waits for a writer.
#[derive(Debug)]
pub(crate) struct RunCell {
    id: RunId,
    snapshot: ArcSwapOption<Snapshot>,
    /// Set by every use, cleared by the sweep that looks for idle runs.
    used: AtomicBool,
    /// Deferred writes on their way.
    deferred: AtomicBool,
    /// How many runs have such.
    deferred_runs: Arc<AtomicUsize>,
    /// Whether anything is on its way that the snapshot does not show yet.
    unsettled: AtomicBool,
    /// Whether what it shows may not be what storage has: the run is held, to be loaded, or has writes that came back.
    doubtful: AtomicBool,
    /// How often deferred writes that readers had seen did not come to be as they were seen: their versions then name other states.
    taken_back: AtomicU64,
    /// Set while its actor dies, before anybody is answered in its place: what it publishes is not what is committed any more.
    dead: AtomicBool,
}

impl RunCell {
    pub(crate) fn new(id: RunId, state: Option<&RunState>, deferred_runs: Arc<AtomicUsize>) -> Self {
        let cell = Self {
            id,
            snapshot: ArcSwapOption::empty(),
            used: AtomicBool::new(true),
            deferred: AtomicBool::new(false),
            deferred_runs,
            unsettled: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
            taken_back: AtomicU64::new(0),
            dead: AtomicBool::new(false),
        };
        cell.publish(state, state.map_or(Version::NONE, RunState::version));
        cell
    }

    pub(crate) fn id(&self) -> &RunId {
        &self.id
    }

    /// The run as it is now; `None` if there is no such run.
    pub(crate) fn snapshot(&self) -> Option<Snapshot> {
        self.touch();
        self.snapshot.load().as_deref().cloned()
    }

    pub(crate) fn publish(&self, state: Option<&RunState>, durable: Version) {
        self.snapshot.store(state.map(|state| Arc::new(Snapshot::new(state.clone(), durable))));
    }

    /// The version that is in storage as far as it was published here; `None` if there is no such run. Does not count as a use.
    pub(crate) fn durable_version(&self) -> Option<Version> {
        self.snapshot.load().as_ref().map(|snapshot| snapshot.durable_version())
    }

    /// Grows after a snapshot was published that takes back what an earlier one showed: whoever keeps something by versions begins anew.
    pub(crate) fn taken_back(&self) -> u64 {
        self.taken_back.load(Ordering::Acquire)
    }

    pub(super) fn take_back(&self) {
        self.taken_back.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn set_dead(&self) {
        self.dead.store(true, Ordering::Release);
    }

    pub(super) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was used since it was asked with [`take_used`](Self::take_used) last.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether it was used since the last call.
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    pub(super) fn set_unsettled(&self, any: bool) {
        if self.unsettled.load(Ordering::Relaxed) != any {
            self.unsettled.store(any, Ordering::Release);
        }
    }

    pub(super) fn set_doubtful(&self, is: bool) {
        if self.doubtful.load(Ordering::Relaxed) != is {
            self.doubtful.store(is, Ordering::Release);
        }
    }

    /// The run as it is in storage by all that this process knows.
    pub(crate) fn stored(&self) -> Result<Option<Snapshot>, Doubtful> {
        // Asked before the snapshot is taken: what is certain by now is shown.
        if self.doubtful.load(Ordering::Acquire) || self.has_deferred() {
            return Err(Doubtful);
        }
        let snapshot = self.snapshot();
        if snapshot.as_ref().is_some_and(|shown| shown.version() != shown.durable_version()) {
            Err(Doubtful)
        } else {
            Ok(snapshot)
        }
    }

    /// Whether anything is on its way that the snapshot does not show yet.
    pub(crate) fn has_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Acquire)
    }

    pub(super) fn set_deferred(&self, any: bool) {
        if self.deferred.load(Ordering::Relaxed) == any {
            return;
        }
        if self.deferred.swap(any, Ordering::AcqRel) != any {
            if any {
                self.deferred_runs.fetch_add(1, Ordering::AcqRel);
            } else {
                self.deferred_runs.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Whether deferred writes are on their way.
    pub(crate) fn has_deferred(&self) -> bool {
        self.deferred.load(Ordering::Acquire)
    }
}

impl Drop for RunCell {
    fn drop(&mut self) {
        self.set_deferred(false);
    }
}

/// Only its actor can say how a run is stored: of what is shown some is only acknowledged from memory, or nobody knows yet what became of it.
#[derive(Debug)]
pub(crate) struct Doubtful;

/// A cheap handle on a run's actor.
#[derive(Debug, Clone)]
pub(crate) struct RunHandle {
    cell: Arc<RunCell>,
    actor: ActorRef<Msg>,
}

/// What became of sending an op.
#[derive(Debug)]
pub(crate) enum Sent {
    /// The actor answered.
    Answered(Result<Committed, CommitError>),
    /// The actor had ended; nothing happened.
    Bounced(Box<(Op, Permit)>),
}

/// An op that was sent, until it is answered. Small: it is copied with the futures that wait for it.
#[derive(Debug)]
pub(crate) struct Sending {
    cell: Arc<RunCell>,
    answer: oneshot::Receiver<Reply>,
}

impl Future for Sending {
    type Output = Sent;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Sent> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| match answer {
            Ok(Reply::Done(answer)) => Sent::Answered(answer),
            Ok(Reply::Bounced(back)) => Sent::Bounced(back),
            Err(_) => Sent::Answered(Err(CommitError::Unknown(self.cell.id().clone()))),
        })
    }
}

/// The actor ended before it answered.
#[derive(Debug)]
pub(crate) struct Gone;

impl RunHandle {
    /// Starts the actor of a run from what storage has of it.
    pub(crate) async fn start(
        context: Arc<RunContext>,
        id: RunId,
        state: Option<RunState>,
        supervisor: ActorCell,
    ) -> Result<Self, ractor::SpawnErr> {
        let cell = Arc::new(RunCell::new(id, state.as_ref(), Arc::clone(&context.deferred_runs)));
        let args = Arguments { context, cell: Arc::clone(&cell), state };
        let (actor, _) = Actor::spawn_linked(None, RunActor, args, supervisor).await?;
        Ok(Self { cell, actor })
    }

    pub(crate) fn cell(&self) -> &Arc<RunCell> {
        &self.cell
    }

    pub(crate) fn actor_id(&self) -> ActorId {
        self.actor.get_id()
    }

    /// Sends an op, here and now; then its answer can be waited for.
    ///
    /// # Cancel safety
    /// Also if the answer is not waited for the op happens or not, as a whole, and its permit comes back when it is settled.
    pub(crate) fn commit(self, op: Op, permit: Permit) -> Sending {
        let (envelope, answer) = Envelope::new(op, permit);
        // If the actor is gone the envelope is dropped here, and comes back by its own answer.
        drop(self.actor.cast(Msg::Commit(envelope)));
        Sending { cell: self.cell, answer }
    }

    /// Waits until the run is settled and holds it: its actor decides nothing until the grant is released or dropped. With `fresh` it is loaded
    /// from storage first. `None`: the actor ended. For a task of its own: a caller who is not polled would keep the run from everybody.
    pub(crate) async fn hold(&self, fresh: bool) -> Option<HoldGrant> {
        let (reply, grant) = oneshot::channel();
        self.actor.cast(Msg::Hold { fresh, reply }).ok()?;
        grant.await.ok()
    }

    /// The run as it is in storage, behind everything that was sent before: no older than what was found there, if others may write to it. Whoever does
    /// not come back for the answer keeps nobody waiting.
    pub(crate) async fn read(&self, found: Option<Found>) -> Result<Option<Snapshot>, Gone> {
        let (reply, read) = oneshot::channel();
        drop(self.actor.cast(Msg::Read { found, reply }));
        read.await.map_err(|_| Gone)
    }

    /// Waits until everything that was sent before is settled.
    pub(crate) async fn settle(&self) {
        let (reply, settled) = oneshot::channel();
        if self.actor.cast(Msg::Flush(reply)).is_ok() {
            // An actor that ended was settled, or its waiters were answered by the persistence actor.
            let _settled = settled.await;
        }
    }

    /// Makes the actor load the run again: somebody else wrote to it.
    pub(crate) fn reload(&self) {
        let _actor_gone = self.actor.cast(Msg::Reload);
    }

    /// Tells the actor which version storage has; it loads the run if that is not what it knows and none of its own entries explains it.
    pub(crate) fn follow(&self, found: Option<Version>) {
        let _actor_gone = self.actor.cast(Msg::Follow(found));
    }

    /// Asks the actor to end if it is idle.
    pub(crate) fn passivate(&self) {
        let _actor_gone = self.actor.cast(Msg::Passivate);
    }

    /// Ends the actor; everything is settled and nothing more is admitted.
    pub(crate) fn end(&self) {
        self.actor.stop(None);
    }

    pub(crate) fn is_alive(&self) -> bool {
        !self.cell.dead.load(Ordering::Acquire)
            && !matches!(self.actor.get_status(), ractor::ActorStatus::Stopping | ractor::ActorStatus::Stopped)
    }

    /// Waits until an actor that is not alive any more has left nothing in its mailbox: all that was sent to it is answered or noted.
    pub(crate) async fn gone(&self) {
        let _without_a_limit = self.actor.wait(None).await;
    }
}

/// How a held run goes on.
#[derive(Debug)]
pub(crate) enum Release {
    /// As it was.
    Unchanged,
    /// With this state, which is committed.
    Moved(Option<RunState>),
    /// With whatever storage has.
    Reload,
}

/// A held run. Dropped it is released as it was; once something was [sent](Self::sent), with what storage has.
#[derive(Debug)]
pub(crate) struct HoldGrant {
    state: Option<RunState>,
    cell: Arc<RunCell>,
    actor: Option<ActorRef<Msg>>,
    sent: bool,
}

impl HoldGrant {
    pub(super) fn new(state: Option<RunState>, cell: Arc<RunCell>, actor: ActorRef<Msg>) -> Self {
        Self { state, cell, actor: Some(actor), sent: false }
    }

    /// The run as it is committed.
    pub(crate) fn state(&self) -> Option<&RunState> {
        self.state.as_ref()
    }

    pub(crate) fn cell(&self) -> &RunCell {
        &self.cell
    }

    /// What its holder decided on it is on its way to storage.
    pub(crate) fn sent(&mut self) {
        self.sent = true;
    }

    /// Lets the actor go on. `false`: it died while it was held.
    pub(crate) fn release(mut self, release: Release) -> bool {
        let Some(actor) = self.actor.take() else { return true };
        let gone: Result<(), MessagingErr<Msg>> = actor.cast(Msg::Release(release));
        gone.is_ok()
    }
}

impl Drop for HoldGrant {
    fn drop(&mut self) {
        if let Some(actor) = self.actor.take() {
            let release = if self.sent { Release::Reload } else { Release::Unchanged };
            let _actor_gone: Result<(), MessagingErr<Msg>> = actor.cast(Msg::Release(release));
        }
    }
}
