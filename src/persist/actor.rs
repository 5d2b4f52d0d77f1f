//! The persistence actor: carries what the queue decides.
//!
//! A flush runs in a task of its own and answers by a message, so that the mailbox is always served. The actor first starts the next flush and then
//! tells the runs: the disk never waits for them. Where nothing waits to be flushed and all of a batch was applied there is nothing to decide, and the
//! task tells the runs itself, one hop earlier. Either way the outcomes of one batch are told before those of the next.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::queue::{FlushQueue, Settlement, Sink, Submission};
use super::stats::PersistStats;
use crate::model::{Batch, BatchAnswer, Outcome};
use crate::store::{StateBackend, StoreError, StoreErrorKind};

/// How long waiters wait for an unknown outcome to be settled before they are told that it is unknown.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);
/// Pauses between attempts to settle an unknown outcome.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Whether everything before a barrier is settled, or why that cannot be said.
pub(super) type BarrierReply = oneshot::Sender<Result<(), StoreError>>;

pub(super) enum Msg<S> {
    Submit(Submission<S>),
    Barrier(BarrierReply),
    /// The batch under way was applied as a whole, and who waited was told.
    Applied,
    Done {
        flight: Vec<(S, u64)>,
        answer: Result<BatchAnswer, StoreError>,
        took: Duration,
    },
    Retry,
    /// The coordinator is about to close: an outcome that stays unknown is not waited for any longer than it takes to give up.
    WindUp,
    /// Answered when everything is settled; entries that come later are refused as closed.
    Close(oneshot::Sender<()>),
}

pub(super) struct PersistActor<S>(PhantomData<fn() -> S>);

impl<S> PersistActor<S> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

pub(super) struct Arguments {
    pub(super) backend: Arc<dyn StateBackend>,
    pub(super) stats: Arc<PersistStats>,
}

struct Current<S> {
    batch: Arc<Batch>,
    /// Empty while they are with the flush.
    sinks: Vec<(S, u64)>,
    barriers: Vec<BarrierReply>,
    /// Since when the outcome is unknown; a flush that is merely slow is not.
    unknown_since: Option<Instant>,
    pause: Duration,
}

pub(super) struct State<S> {
    backend: Arc<dyn StateBackend>,
    stats: Arc<PersistStats>,
    queue: FlushQueue<S, BarrierReply>,
    current: Option<Current<S>>,
    /// Set while a batch whose waiters were told "unknown" is still not settled: nothing new is taken in.
    stuck: Option<StoreError>,
    winding_up: bool,
    closing: Vec<oneshot::Sender<()>>,
    closed: bool,
}

#[cfg_attr(seeknal_ractor_async_trait, ractor::async_trait)]
impl<S: Sink> Actor for PersistActor<S> {
    type Msg = Msg<S>;
    type State = State<S>;
    type Arguments = Arguments;

    async fn pre_start(&self, _: ActorRef<Msg<S>>, args: Arguments) -> Result<State<S>, ActorProcessingErr> {
        let Arguments { backend, stats } = args;
        Ok(State {
            backend,
            stats,
            queue: FlushQueue::new(),
            current: None,
            stuck: None,
            winding_up: false,
            closing: Vec::new(),
            closed: false,
        })
    }

    async fn handle(&self, myself: ActorRef<Msg<S>>, message: Msg<S>, state: &mut State<S>) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Submit(submission) => state.submit(submission),
            Msg::Barrier(reply) => match &state.stuck {
                Some(stuck) => {
                    let _waiter_gone = reply.send(Err(stuck.clone()));
                }
                None => state.queue.push_barrier(reply),
            },
            Msg::WindUp => state.winding_up = true,
            Msg::Applied => state.applied(&myself),
            Msg::Done { flight, answer, took } => state.done(&myself, flight, answer, took),
            Msg::Retry => state.send_current(&myself, true),
            Msg::Close(reply) => {
                state.closed = true;
                state.closing.push(reply);
            }
        }
        state.flush_next(&myself, true);
        if state.closed && state.current.is_none() && state.queue.is_empty() {
            for reply in state.closing.drain(..) {
                let _closer_gone = reply.send(());
            }
        }
        Ok(())
    }
}

impl<S: Sink> State<S> {
    fn submit(&mut self, submission: Submission<S>) {
        let refusal = if self.closed { Some(StoreError::closed()) } else { self.stuck.clone() };
        if let Some(error) = refusal {
            S::settle(vec![(submission.sink, Settlement::NotApplied(error))]);
        } else if let Some(returned) = self.queue.push(submission) {
            S::settle(vec![returned]);
        }
        self.count_waiting();
    }

    fn count_waiting(&self) {
        self.stats.waiting.store(u64::try_from(self.queue.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Starts the next flush. `in_order` says whether the outcomes of the last one were told: only then may the flush tell its own.
    fn flush_next(&mut self, myself: &ActorRef<Msg<S>>, in_order: bool) {
        while self.current.is_none() {
            let Some((entries, flight)) = self.queue.next_batch() else { return };
            self.count_waiting();
            if entries.is_empty() {
                for barrier in flight.barriers {
                    let _waiter_gone = barrier.send(Ok(()));
                }
                continue;
            }
            let batch = Arc::new(Batch::new(entries));
            self.current =
                Some(Current { batch, sinks: flight.sinks, barriers: flight.barriers, unknown_since: None, pause: FIRST_PAUSE });
            self.send_current(myself, in_order);
        }
    }

    fn send_current(&mut self, myself: &ActorRef<Msg<S>>, in_order: bool) {
        let Some(current) = &mut self.current else { return };
        let (backend, batch) = (Arc::clone(&self.backend), Arc::clone(&current.batch));
        let (flight, stats) = (std::mem::take(&mut current.sinks), Arc::clone(&self.stats));
        let mut report = Report { to: Some(myself.clone()), flight, stats, in_order, started: Instant::now() };
        drop(tokio::spawn(async move {
            let span = tracing::debug_span!("flush", backend = backend.name(), entries = batch.entries.len(), batch = %batch.id);
            let answer = tracing::Instrument::instrument(backend.commit(batch), span).await;
            report.send(answer);
        }));
    }

    fn applied(&mut self, myself: &ActorRef<Msg<S>>) {
        let Some(current) = self.current.take() else { return };
        self.stuck = None;
        self.flush_next(myself, true);
        for barrier in current.barriers {
            let _waiter_gone = barrier.send(Ok(()));
        }
    }

    fn done(
        &mut self,
        myself: &ActorRef<Msg<S>>,
        flight: Vec<(S, u64)>,
        answer: Result<BatchAnswer, StoreError>,
        took: Duration,
    ) {
        let Some(mut current) = self.current.take() else { return };
        current.sinks = flight;
        self.stats.flushed(current.batch.entries.len(), took);
        let settled = match answer {
            Ok(answer) => {
                self.stuck = None;
                self.queue.answered(&current.batch.entries, std::mem::take(&mut current.sinks), answer)
            }
            Err(error) if current.unknown_since.is_none() && !error.is_unknown_outcome() => {
                self.stats.failed_flushes.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, entries = current.batch.entries.len(), "a flush failed; nothing of it was written");
                self.queue.failed(&current.batch.entries, std::mem::take(&mut current.sinks), &error)
            }
            Err(error) => {
                self.unknown(myself, current, error);
                return;
            }
        };
        for (_, settlement) in &settled {
            let counter = if matches!(settlement, Settlement::Applied(_)) { &self.stats.applied } else { &self.stats.refused };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        // The next flush goes down before the runs hear of this one.
        self.flush_next(myself, false);
        S::settle(settled);
        for barrier in current.barriers {
            let _waiter_gone = barrier.send(Ok(()));
        }
    }

    /// Nobody knows whether the batch was applied: the same batch, with the same id, is sent until an answer settles it. An error of a repetition does
    /// not: it speaks of the repetition only.
    fn unknown(&mut self, myself: &ActorRef<Msg<S>>, mut current: Current<S>, error: StoreError) {
        self.stats.unknown_flushes.fetch_add(1, Ordering::Relaxed);
        let since = *current.unknown_since.get_or_insert_with(Instant::now);
        let given_up = since.elapsed() >= GIVE_UP_AFTER;
        let hopeless = matches!(error.kind(), StoreErrorKind::Poisoned | StoreErrorKind::Closed) || (given_up && self.winding_up);
        if hopeless || given_up {
            let error = error.into_unknown();
            tracing::error!(%error, batch = %current.batch.id, "the outcome of a flush is unknown");
            let mut settled = self.queue.failed(&current.batch.entries, std::mem::take(&mut current.sinks), &error);
            if hopeless {
                self.stuck = None;
                S::settle(settled);
                for barrier in current.barriers {
                    let _waiter_gone = barrier.send(Ok(()));
                }
                return;
            }
            let busy = StoreError::not_applied(
                StoreErrorKind::Unavailable,
                format!("storage does not settle an earlier batch: {error}"),
            );
            let (rejected, barriers) = self.queue.reject_waiting(&busy);
            settled.extend(rejected);
            for barrier in barriers.into_iter().chain(current.barriers.drain(..)) {
                let _waiter_gone = barrier.send(Err(busy.clone()));
            }
            self.stuck = Some(busy);
            S::settle(settled);
        }
        let pause = current.pause;
        current.pause = (pause * 2).min(LONGEST_PAUSE);
        self.current = Some(current);
        let myself = myself.clone();
        drop(tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let _actor_gone = myself.cast(Msg::Retry);
        }));
    }
}

/// Reports the end of a flush, also when the backend panicked.
struct Report<S: Sink> {
    to: Option<ActorRef<Msg<S>>>,
    flight: Vec<(S, u64)>,
    stats: Arc<PersistStats>,
    /// Whether the outcomes of the flush before were told when this one began.
    in_order: bool,
    started: Instant,
}

impl<S: Sink> Report<S> {
    fn send(&mut self, answer: Result<BatchAnswer, StoreError>) {
        let Some(actor) = self.to.take() else { return };
        let (flight, took) = (std::mem::take(&mut self.flight), self.started.elapsed());
        match answer {
            Ok(answer) if self.is_plain(&answer, flight.len()) => {
                let settled = flight.into_iter().zip(answer.outcomes).filter_map(|((sink, _), outcome)| match outcome {
                    Outcome::Applied(receipt) => Some((sink, Settlement::Applied(receipt))),
                    Outcome::Refused(_) => None,
                });
                let settled: Vec<_> = settled.collect();
                // Counted first: whoever was told finds itself in the figures.
                self.stats.flushed(settled.len(), took);
                self.stats.applied.fetch_add(u64::try_from(settled.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
                S::settle(settled);
                let _actor_gone = actor.cast(Msg::Applied);
            }
            answer => {
                let _actor_gone = actor.cast(Msg::Done { flight, answer, took });
            }
        }
    }
}

impl<S: Sink> Report<S> {
    /// Whether nothing has to be decided, and nothing waits for the answer.
    fn is_plain(&self, answer: &BatchAnswer, expected: usize) -> bool {
        self.in_order
            && self.stats.waiting.load(Ordering::Relaxed) == 0
            && answer.outcomes.len() == expected
            && answer.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_)))
    }
}

impl<S: Sink> Drop for Report<S> {
    fn drop(&mut self) {
        self.send(Err(StoreError::unknown(
            StoreErrorKind::Poisoned,
            "the backend stopped in the middle of a batch; its code panicked",
        )));
    }
}
