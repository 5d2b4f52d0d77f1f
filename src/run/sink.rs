//! Where outcomes go: to the actor of the run, or to a task that waits.

use std::collections::HashMap;
use std::sync::Arc;

use ractor::ActorRef;
use tokio::sync::oneshot;

use super::actor::{Msg, RunContext, Surroundings};
use super::admission::Permit;
use super::handle::RunCell;
use super::losses::Losses;
use super::op::{Ack, CommitError, Committed};
use crate::model::{Entry, FencingToken, Receipt, Refusal, RunId, Version};
use crate::persist::{Settlement, Sink};
use crate::store::StoreError;

/// Who learns what became of an entry.
#[derive(Debug)]
pub(crate) enum FlushSink {
    /// The actor of the run that the entry is on.
    Run(RunSink),
    /// A task: entries over several runs, entries of leases.
    One(OneSink),
}

/// The outcome of an entry goes to its run's actor.
#[derive(Debug)]
pub(crate) struct RunSink {
    pub(super) actor: ActorRef<Msg>,
    pub(super) ticket: u64,
    /// Its place among the ops of its actor.
    pub(super) order: u64,
    /// Which run it was sent to, by the version at which that was made.
    pub(super) born: Version,
    /// None for a deferred write: its caller is answered by the actor.
    pub(super) ack: Option<Ack>,
    pub(super) attempts: u32,
    pub(super) hasty: bool,
    /// What most entries have not: they are copied from line to line on their way.
    pub(super) aside: Option<Arc<Aside>>,
    pub(super) permit: Permit,
}

/// What only some entries bring along.
#[derive(Debug)]
pub(super) struct Aside {
    /// The run, and whom to tell of it.
    pub(super) run: RunId,
    pub(super) surroundings: Arc<dyn Surroundings>,
    /// Where the loss of a deferred write is noted if the actor is gone.
    pub(super) losses: Option<Arc<Losses>>,
    /// Whether the run's locks are free once the entry is in storage.
    pub(super) ends: bool,
    /// The leases that are given back with it.
    pub(super) returned: Vec<FencingToken>,
}

impl Aside {
    pub(super) fn new(context: &RunContext, cell: &RunCell, losses: Option<Arc<Losses>>) -> Self {
        let (run, surroundings) = (cell.id().clone(), Arc::clone(&context.surroundings));
        Self { run, surroundings, losses, ends: false, returned: Vec::new() }
    }
}

impl RunSink {
    /// The entry is in storage. Whoever hears of it first says so: its actor, or nobody but what it left.
    pub(super) fn landed(&self) {
        if let Some(aside) = self.aside.as_ref().filter(|aside| aside.ends) {
            aside.surroundings.ended(&aside.run);
        }
    }
}

/// The outcome of an entry goes to a task.
#[derive(Debug)]
pub(crate) struct OneSink {
    pub(crate) reply: oneshot::Sender<Result<Receipt, NotCommitted>>,
    pub(crate) permit: Option<Permit>,
}

/// Why an entry of a task was not committed.
#[derive(Debug)]
pub(crate) enum NotCommitted {
    Refused(Refusal),
    /// It has to be checked again.
    Recheck,
    Store(StoreError),
}

/// Outcomes on their way to a run's actor. If the actor ends first, whoever waits is answered from here.
#[derive(Debug)]
pub(super) struct Outcomes(Vec<(RunSink, Settlement)>);

impl Outcomes {
    pub(super) fn take(mut self) -> Vec<(RunSink, Settlement)> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Outcomes {
    fn drop(&mut self) {
        for (sink, settlement) in self.0.drain(..) {
            if let Settlement::Applied(_) = &settlement {
                sink.landed();
            }
            if let (Some(aside), None) = (&sink.aside, &sink.ack)
                && let Some(losses) = &aside.losses
            {
                let cause = match &settlement {
                    Settlement::Applied(_) => continue,
                    Settlement::Refused(refusal) => refusal.into(),
                    Settlement::NotApplied(error) | Settlement::Unknown(error) => error.into(),
                    Settlement::Recheck(..) => "the actor of the run ended".to_owned().into(),
                };
                aside.surroundings.lost(&losses.note(&aside.run, cause));
            }
            if let Some(ack) = sink.ack {
                match settlement {
                    Settlement::Applied(receipt) => ack.answer(Ok(Committed::durable(receipt))),
                    Settlement::Refused(refusal) => ack.answer(Err(CommitError::Refused(refusal))),
                    Settlement::NotApplied(error) | Settlement::Unknown(error) => ack.answer(Err(CommitError::Store(error))),
                    // It was never written, and there is nobody left to check it again.
                    Settlement::Recheck(entry, _) => {
                        let run = entry.parts.into_iter().next().map(|part| part.run);
                        ack.answer(Err(run.map_or(CommitError::Closed, |run| CommitError::Contended(run, sink.attempts))));
                    }
                }
            }
        }
    }
}

impl Sink for FlushSink {
    fn settle(outcomes: Vec<(Self, Settlement)>) {
        // A lone outcome is the usual one of a lone writer.
        if outcomes.len() == 1 {
            for (sink, settlement) in outcomes {
                match sink {
                    FlushSink::Run(sink) => drop(sink.actor.clone().cast(Msg::Settled(Outcomes(vec![(sink, settlement)])))),
                    FlushSink::One(sink) => sink.answer(settlement),
                }
            }
            return;
        }
        let mut by_run: HashMap<ractor::ActorId, Vec<(RunSink, Settlement)>> = HashMap::new();
        for (sink, settlement) in outcomes {
            match sink {
                FlushSink::Run(sink) => by_run.entry(sink.actor.get_id()).or_default().push((sink, settlement)),
                FlushSink::One(sink) => sink.answer(settlement),
            }
        }
        for outcomes in by_run.into_values() {
            let actor = outcomes.first().map(|(sink, _)| sink.actor.clone());
            if let Some(actor) = actor {
                // If the actor is gone the message comes back and answers as it is dropped.
                drop(actor.cast(Msg::Settled(Outcomes(outcomes))));
            }
        }
    }
}

impl OneSink {
    fn answer(self, settlement: Settlement) {
        drop(self.permit);
        let answer = match settlement {
            Settlement::Applied(receipt) => Ok(receipt),
            Settlement::Refused(refusal) => Err(NotCommitted::Refused(refusal)),
            Settlement::Recheck(Entry { .. }, _) => Err(NotCommitted::Recheck),
            Settlement::NotApplied(error) | Settlement::Unknown(error) => Err(NotCommitted::Store(error)),
        };
        let _task_gone = self.reply.send(answer);
    }
}
