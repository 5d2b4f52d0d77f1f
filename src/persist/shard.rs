//! One line of entries on their way down, shared by those who put in, the one who takes out, and the actor that tells the outcomes.
//!
//! Whoever flushes (a backend's own writer, or the [driver](super::driver)) pulls: it asks for the next batch, which is everything that arrived
//! meanwhile, and answers it before it asks again. So the disk never waits for the runtime, and the runtime never for the disk.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use ractor::{ActorRef, MessagingErr};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::actor::Msg;
use super::driver;
use super::fault::Fault;
use super::queue::{Flight, FlushQueue, Settlement, Sink, Submission};
use super::stats::PersistStats;
use crate::model::{Batch, RunId};
use crate::store::{BatchSource, StateBackend, StoreError, StoreErrorKind, Wake};

mod source;

/// How long waiters wait for an unknown outcome to be settled before they are told that it is unknown.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);
/// How long it is not logged again that an outcome is unknown.
const SAID_AGAIN_AFTER: Duration = Duration::from_secs(600);
/// Pauses between attempts to settle an unknown outcome.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// So few outcomes are told by whoever flushed, one hop earlier; more are the actor's work, while the next batch is being flushed.
const TOLD_AT_ONCE: usize = 1;

/// Whether everything before a barrier is settled, or why that cannot be said.
pub(super) type BarrierReply = oneshot::Sender<Result<(), StoreError>>;

/// The batch that is being flushed.
struct Current<S> {
    batch: Arc<Batch>,
    flight: Flight<S, BarrierReply>,
    span: tracing::Span,
    sent: Instant,
    /// Since when the outcome is unknown; a flush that is merely slow is not.
    unknown_since: Option<Instant>,
    /// When it was said last that its waiters were given up.
    said: Option<Instant>,
    pause: Duration,
}

impl<S> Current<S> {
    /// Says in the span how many entries it has become.
    fn note_entries(&self) {
        if self.unknown_since.is_none() && !self.span.is_disabled() {
            self.span.record("entries", self.batch.entries.len());
        }
    }
}

/// What the lock guards. Nothing that may call out (logging, telling) happens under it.
struct Line<S> {
    queue: FlushQueue<S, BarrierReply>,
    /// Whether somebody pulls, or was woken to.
    pulled: bool,
    /// Whether the batch with an unknown outcome waits before it is sent again.
    pausing: bool,
    /// Set while a batch whose waiters were told "unknown" is still not settled: nothing new is taken in.
    stuck: Option<StoreError>,
    /// The runs of that batch.
    stuck_runs: BTreeSet<RunId>,
    winding_up: bool,
    closed: bool,
    closing: Vec<oneshot::Sender<()>>,
}

/// Outcomes and barriers of one batch, to be told.
pub(super) struct News<S: Sink> {
    settled: Vec<(S, Settlement)>,
    barriers: Vec<BarrierReply>,
    /// What the barriers are told instead of "settled".
    barred: Option<StoreError>,
    /// What was flushed: taken apart where the news are told, not where the next batch waits to be written.
    batch: Option<Arc<Batch>>,
}

impl<S: Sink> News<S> {
    /// As it is dropped, wherever that is.
    pub(super) fn tell(self) {
        drop(self);
    }
}

impl<S: Sink> Drop for News<S> {
    fn drop(&mut self) {
        // Also in the mailbox of an actor whose runtime has ended: nobody is left without an answer.
        self.batch = None;
        let settled = std::mem::take(&mut self.settled);
        if !settled.is_empty() {
            S::settle(settled);
        }
        for barrier in std::mem::take(&mut self.barriers) {
            let _waiter_gone = barrier.send(self.barred.clone().map_or(Ok(()), Err));
        }
    }
}

/// News that are on their way to the actor, or are being told. Dropped when it told them, or when it took them along: its runtime has ended.
pub(super) struct Untold<S: Sink>(Arc<Shard<S>>);

impl<S: Sink> Untold<S> {
    /// Whoever closes waits for its end.
    pub(super) fn of(shard: &Arc<Shard<S>>) -> Self {
        shard.untold.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(shard))
    }
}

impl<S: Sink> Drop for Untold<S> {
    fn drop(&mut self) {
        if self.0.untold.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.end_if_done();
        }
    }
}

/// The pause before a batch with an unknown outcome is sent again. Dropped before it is over (the runtime has ended, and with it whoever waits it out) it
/// tells everybody: nobody sends the batch again.
pub(super) struct Pausing<S: Sink>(Option<Arc<Shard<S>>>);

impl<S: Sink> Pausing<S> {
    pub(super) fn over(mut self) {
        if let Some(shard) = self.0.take() {
            shard.retry();
        }
    }
}

impl<S: Sink> Drop for Pausing<S> {
    fn drop(&mut self) {
        if let Some(shard) = self.0.take() {
            shard.abandon();
        }
    }
}

/// One line.
pub(super) struct Shard<S: Sink> {
    me: Weak<Self>,
    backend: Arc<dyn StateBackend>,
    stats: Arc<PersistStats>,
    runtime: Handle,
    actor: OnceLock<ActorRef<Msg<S>>>,
    wake: OnceLock<Wake>,
    line: Mutex<Line<S>>,
    current: Mutex<Option<Current<S>>>,
    /// Batches whose outcomes are on their way to the actor: what comes later must not overtake them.
    untold: AtomicUsize,
    /// How often outcomes were told by whoever flushed.
    told: AtomicU64,
    /// How many batches in a row failed with nothing written: where it is not one entry in many, sending them apart helps nobody.
    failures: AtomicU32,
    /// What storage said of a flush that failed; of all lines. Whichever line succeeds next clears it: they write to the same storage.
    failed: Arc<Fault>,
    /// What it said of the batch of which nobody knows what became. Another line's success says nothing of that.
    unsettled: Fault,
}

impl<S: Sink> fmt::Debug for Shard<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard").field("backend", &self.backend.name()).finish_non_exhaustive()
    }
}

impl<S: Sink> Shard<S> {
    pub(super) fn new(
        backend: Arc<dyn StateBackend>,
        stats: Arc<PersistStats>,
        failed: Arc<Fault>,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            backend,
            stats,
            runtime,
            actor: OnceLock::new(),
            wake: OnceLock::new(),
            line: Mutex::new(Line {
                queue: FlushQueue::new(),
                pulled: false,
                pausing: false,
                stuck: None,
                stuck_runs: BTreeSet::new(),
                winding_up: false,
                closed: false,
                closing: Vec::new(),
            }),
            current: Mutex::new(None),
            untold: AtomicUsize::new(0),
            told: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            failed,
            unsettled: Fault::default(),
        })
    }

    /// Begins, with the actor that tells outcomes.
    pub(super) fn begin(self: &Arc<Self>, actor: ActorRef<Msg<S>>) {
        let _only_once = self.actor.set(actor);
        let source: Arc<dyn BatchSource> = Arc::clone(self) as Arc<dyn BatchSource>;
        if let Some(wake) = self.backend.pull_from(Arc::downgrade(&source)) {
            let _only_once = self.wake.set(wake);
        }
    }

    pub(super) fn backend(&self) -> &Arc<dyn StateBackend> {
        &self.backend
    }

    /// Why nobody knows what became of its batch.
    pub(super) fn unsettled(&self) -> Option<String> {
        self.unsettled.get()
    }

    fn line(&self) -> MutexGuard<'_, Line<S>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> MutexGuard<'_, Option<Current<S>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts how often outcomes were told by whoever flushed; none where no writer has this line for its source.
    pub(super) fn told(&self) -> Option<&AtomicU64> {
        self.wake.get().map(|_| &self.told)
    }

    pub(super) fn waiting(&self) -> usize {
        self.line().queue.len()
    }

    /// Takes in an entry. It is always settled.
    pub(super) fn submit(self: &Arc<Self>, submission: Submission<S>) {
        let mut line = self.line();
        let refusal = if line.closed { Some(StoreError::closed()) } else { line.stuck.clone() };
        let returned = match refusal {
            Some(error) => Some((submission.sink, Settlement::NotApplied(error))),
            None => line.queue.push(submission),
        };
        let must_wake = returned.is_none() && line.must_wake();
        drop(line);
        if must_wake {
            self.wake();
        }
        if let Some(returned) = returned {
            S::settle(vec![returned]);
        }
    }

    /// Waits in the line like an entry.
    pub(super) fn barrier(self: &Arc<Self>, reply: BarrierReply) {
        let mut line = self.line();
        let refusal = if line.closed { Some(StoreError::closed()) } else { line.stuck.clone() };
        if let Some(error) = refusal {
            drop(line);
            let _waiter_gone = reply.send(Err(error));
            return;
        }
        line.queue.push_barrier(reply);
        let must_wake = line.must_wake();
        drop(line);
        if must_wake {
            self.wake();
        }
    }

    /// Whether a batch that may still be applied carries something of this run, although its waiters were told that nobody knows.
    pub(super) fn stuck_with(&self, run: &RunId) -> Option<StoreError> {
        let line = self.line();
        line.stuck.clone().filter(|_| line.stuck_runs.contains(run))
    }

    /// As [`FlushQueue::begun`].
    pub(super) fn begun(&self, run: &RunId, chain: u64) {
        self.line().queue.begun(run, chain);
    }

    /// Somebody has to pull: the backend's own writer, or a task.
    fn wake(self: &Arc<Self>) {
        if !self.wake.get().is_some_and(|wake| wake()) {
            drop(self.runtime.spawn(driver::drive(driver::Driver::new(Arc::clone(self)))));
        }
    }

    /// The pause before the batch with an unknown outcome is over.
    pub(super) fn retry(self: &Arc<Self>) {
        let mut line = self.line();
        line.pausing = false;
        let must_wake = !std::mem::replace(&mut line.pulled, true);
        drop(line);
        if must_wake {
            self.wake();
        }
    }

    /// Nobody will ever pull again: the runtime has ended.
    pub(super) fn abandon(&self) {
        let error = StoreError::closed();
        self.failed.set(&error);
        self.unsettled.clear();
        let mut line = self.line();
        line.closed = true;
        line.pulled = false;
        let (mut settled, mut barriers) = line.queue.reject_waiting(&error);
        // Taken in a statement of its own: its lock ends here. The span ends outside of all locks: that calls whoever listens to the log.
        let unsettled = self.current().take();
        let mut span = None;
        if let Some(Current { batch, flight: Flight { sinks, barriers: waiting, .. }, span: ending, .. }) = unsettled {
            settled.extend(line.queue.failed(&batch.entries, sinks, &error.clone().into_unknown()));
            barriers.extend(waiting);
            span = Some(ending);
        }
        // Before the lock is gone: who closes waits until it is told, whoever tells it.
        self.untold.fetch_add(1, Ordering::AcqRel);
        drop(line);
        drop(span);
        News { settled, barriers, barred: Some(error), batch: None }.tell();
        self.untold.fetch_sub(1, Ordering::AcqRel);
        self.end_if_done();
    }

    /// The coordinator is about to close: an outcome that stays unknown is not waited for any longer than it takes to give up.
    pub(super) fn wind_up(&self) {
        self.line().winding_up = true;
    }

    /// Refuses entries from now on, and waits until everything is settled and told.
    pub(super) async fn close(&self) {
        let (reply, settled) = oneshot::channel();
        {
            let mut line = self.line();
            line.closed = true;
            line.closing.push(reply);
        }
        self.end_if_done();
        let _abandoned = settled.await;
    }

    fn end_if_done(&self) {
        let mut line = self.line();
        let done = line.closed && !line.pulled && line.queue.is_empty() && self.untold.load(Ordering::Acquire) == 0;
        if !done || line.closing.is_empty() || self.current().is_some() {
            return;
        }
        let closing = std::mem::take(&mut line.closing);
        drop(line);
        for reply in closing {
            let _closer_gone = reply.send(());
        }
    }

    /// Tells the news: at once where it is little and nothing is told before it, else by the actor.
    fn deliver(&self, news: News<S>) {
        if news.settled.len() <= TOLD_AT_ONCE && self.untold.load(Ordering::Acquire) == 0 {
            // Before: a worker that is on its way to them need not be woken for them.
            self.told.fetch_add(1, Ordering::Relaxed);
            return news.tell();
        }
        let (Some(shard), Some(actor)) = (self.me.upgrade(), self.actor.get()) else { return news.tell() };
        if let Err(MessagingErr::SendErr(Msg::Tell(news, untold))) = actor.cast(Msg::Tell(news, Untold::of(&shard))) {
            news.tell();
            drop(untold);
        }
    }

    /// Nobody knows whether the batch was applied: the same batch, with the same id, is sent until an answer settles it. An error of a repetition does
    /// not: it speaks of the repetition only, unless it says that no sending is ever applied.
    fn unknown(&self, mut current: Current<S>, error: StoreError) {
        self.stats.unknown_flushes.fetch_add(1, Ordering::Relaxed);
        self.unsettled.set(&error);
        let since = *current.unknown_since.get_or_insert_with(Instant::now);
        let given_up = since.elapsed() >= GIVE_UP_AFTER;
        let hopeless =
            matches!(error.kind(), StoreErrorKind::Poisoned | StoreErrorKind::Closed) || (given_up && self.line().winding_up);
        if hopeless || given_up {
            let error = error.into_unknown();
            let now = Instant::now();
            if is_to_be_said(current.said, now) {
                current.said = Some(now);
                tracing::error!(%error, batch = %current.batch.id, "the outcome of a flush is unknown");
            }
            let sinks = std::mem::take(&mut current.flight.sinks);
            let barriers = std::mem::take(&mut current.flight.barriers);
            let mut line = self.line();
            let mut settled = line.queue.failed(&current.batch.entries, sinks, &error);
            if hopeless {
                line.stuck = None;
                drop(line);
                // It is sent no more: what is wrong now is known.
                self.failed.set(&error);
                self.unsettled.clear();
                return self.deliver(News { settled, barriers, barred: None, batch: Some(current.batch) });
            }
            let busy = StoreError::not_applied(
                StoreErrorKind::Unavailable,
                // What comes behind that batch was certainly not written.
                format!("storage does not settle an earlier batch: {}", error.words()),
            );
            let (rejected, waiting) = line.queue.reject_waiting(&busy);
            line.stuck = Some(busy.clone());
            line.stuck_runs = current.batch.entries.iter().flat_map(|entry| &entry.parts).map(|part| part.run.clone()).collect();
            drop(line);
            settled.extend(rejected);
            self.deliver(News {
                settled,
                barriers: waiting.into_iter().chain(barriers).collect(),
                barred: Some(busy),
                batch: None,
            });
        }
        let pause = current.pause;
        current.pause = (pause * 2).min(LONGEST_PAUSE);
        *self.current() = Some(current);
        self.line().pausing = true;
        // Where it comes back, as there is no actor, it is dropped here.
        let pausing = Pausing(self.me.upgrade());
        match self.actor.get() {
            Some(actor) => drop(actor.cast(Msg::RetryAfter(pause, pausing))),
            None => drop(pausing),
        }
    }
}

impl<S> Line<S> {
    /// Whether nobody pulls and somebody should; then that somebody is the caller's to wake.
    fn must_wake(&mut self) -> bool {
        !self.pausing && !std::mem::replace(&mut self.pulled, true)
    }
}

/// Whether it is time to log what goes on: when it begins, and then rarely.
pub(super) fn is_to_be_said(said: Option<Instant>, now: Instant) -> bool {
    said.is_none_or(|said| now.saturating_duration_since(said) >= SAID_AGAIN_AFTER)
}
