//! What comes back from storage: entries that were applied, refused, or are to be checked again, and the run as others left it.

use std::sync::Arc;

use super::{Answer, Job, LOAD_ATTEMPTS, Mode, Msg, State};
use crate::model::{CommitSeq, RunReceipt, RunState, Version};
use crate::persist::Settlement;
use crate::run::chain::{Progress, Touched, add_gone, newer};
use crate::run::jitter::jitter;
use crate::run::op::{Ack, ChangeSeed, CommitError, Committed, Op};
use crate::run::sink::{Outcomes, RunSink};
use crate::store::{StoreError, load_panicked, surviving};

/// What was applied: which versions of the run, where in the order of the store, what it touched if that was noted, and the run behind it.
type News = (RunReceipt, CommitSeq, Option<Touched>, Option<RunState>);

impl State {
    pub(super) fn settled(&mut self, outcomes: Outcomes) {
        let (mut acks, mut refused, mut news, mut returned) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut moved, chain) = (false, self.chain.number());
        for (sink, settlement) in outcomes.take() {
            if let Settlement::Applied(_) = &settlement {
                sink.landed();
            }
            let RunSink { ticket, order, born, ack, attempts, hasty, permit, aside, .. } = sink;
            // A deferred write that is settled before it was acknowledged is answered like any other.
            let was_deferred = ack.is_none();
            let ack = ack.or_else(|| self.unacknowledged(ticket));
            self.takes_back |= was_deferred && !matches!(settlement, Settlement::Applied(_));
            match settlement {
                Settlement::Applied(receipt) => {
                    match self.chain.applied(ticket, receipt.runs.first()) {
                        Progress::Moved(touched) => {
                            moved = true;
                            returned.extend(aside.iter().flat_map(|aside| &aside.returned).copied());
                            if let Some(versions) = receipt.runs.first() {
                                news.push((versions.clone(), receipt.seq, touched, self.chain.committed().cloned()));
                            }
                            acks.extend(ack.map(|ack| (ack, Committed::durable(receipt))));
                            drop(permit);
                        }
                        Progress::Overtaken => {
                            // With its permit: whoever waits until all are answered waits for this one too.
                            self.takes_back |= was_deferred;
                            self.overtaken.extend(ack.map(|ack| (ack, Committed::durable(receipt), permit)));
                            self.recover(true);
                        }
                    }
                }
                Settlement::Recheck(entry, reload) => {
                    self.chain.fell(ticket);
                    // That another entry was refused says nothing of this one.
                    let op = Op::again(entry, attempts + u32::from(reload), was_deferred, hasty);
                    self.again.insert(Job { order, born, op, ack, permit });
                    self.recover(reload);
                }
                Settlement::Refused(refusal) => {
                    self.chain.fell(ticket);
                    refused.push(Answer { ack, error: CommitError::Refused(refusal), permit });
                    self.recover(self.context.backend.is_shared());
                }
                Settlement::NotApplied(error) => {
                    self.chain.fell(ticket);
                    refused.push(Answer { ack, error: CommitError::Store(error), permit });
                    self.recover(false);
                }
                Settlement::Unknown(error) => {
                    self.chain.fell(ticket);
                    refused.push(Answer { ack, error: CommitError::Store(error), permit });
                    self.recover(true);
                }
            }
        }
        if self.chain.number() != chain {
            self.context.persist.begun(self.cell.id(), self.chain.number());
        }
        if self.chain.is_settled() && self.mode != Mode::Ready {
            // What was deferred and came back is not on its way: readers see what is committed until it is again.
            self.chain.reset();
        }
        refused.extend(self.decide_again());
        // What is acknowledged below is seen before, and so is why something is refused, whatever has to be looked up for others. An overtaken run is published when it is loaded: a
        // snapshot never carries a number whose commits it lacks. And what was acknowledged from memory and waits to be checked again stays seen.
        let waits = matches!(self.mode, Mode::Recovering { reload: true, .. }) || self.again.has_acknowledged();
        if moved || !waits {
            self.publish();
        }
        // Before it is said that nothing of it is on its way any more: who flushes then is told of them.
        for lost in refused.extract_if(.., |answer| answer.ack.is_none()) {
            self.give_up(lost);
        }
        self.mark();
        // Between the two: whoever gets the place sees what was written in it, and whoever hears that there is work can have it.
        for token in returned {
            self.context.surroundings.returned(token);
        }
        self.tell(news);
        for (ack, committed) in acks {
            ack.answer(Ok(committed));
        }
        for answer in refused {
            self.give_up(answer);
        }
        self.show_deferred();
        self.go_on();
    }

    /// Whom to answer of a deferred write that was not acknowledged yet. Outcomes come in the order of the chain: it is the first one.
    fn unacknowledged(&mut self, ticket: u64) -> Option<Ack> {
        let at = self.deferred.binary_search_by_key(&ticket, |(ticket, ..)| *ticket).ok()?;
        self.deferred.remove(at).map(|(.., ack)| ack)
    }

    /// Tells what was applied and can be seen now.
    fn tell(&self, news: Vec<News>) {
        // Not before: who listens from now on has seen it, or will.
        if news.is_empty() || !self.context.surroundings.wants_changes() {
            return;
        }
        for (versions, seq, touched, state) in news {
            // Who began to listen while it was on its way is told what its rows say.
            let touched = touched.unwrap_or_else(|| newer(state.as_ref(), versions.before));
            self.context.surroundings.changed(ChangeSeed::of(versions, Some(seq), touched, state));
        }
    }

    /// Loads the run behind everything that was sent down for it.
    pub(super) fn load(&mut self) {
        self.mode = Mode::Recovering { reload: true, loading: true };
        let (context, have, myself) = (Arc::clone(&self.context), self.chain.committed().cloned(), self.myself.clone());
        let id = self.cell.id().clone();
        let attempts = self.again.attempts();
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
                let load = async {
                    match &have {
                        Some(have) => context.backend.reload_run(have).await,
                        None => context.backend.load_run(&id).await,
                    }
                };
                // All that wait for the run wait for this answer.
                answer = surviving(load, || load_panicked(&id)).await;
                match &answer {
                    Err(error) if error.is_retryable() => tokio::time::sleep(jitter(attempt + 1)).await,
                    _ => break,
                }
            }
            let _actor_gone = myself.cast(Msg::Loaded(answer));
        }));
    }

    pub(super) fn loaded(&mut self, loaded: Result<Option<RunState>, StoreError>) {
        match loaded {
            Ok(state) => {
                let known = self.chain.committed().cloned();
                self.chain.reload(state.clone());
                self.mode = Mode::Ready;
                // Who holds the run holds it before anything else is on its way.
                let refused = if self.fresh.is_none() { self.decide_again() } else { Vec::new() };
                if std::mem::take(&mut self.reload_again) {
                    self.recover(true);
                }
                self.publish();
                self.tell_net_change(known.as_ref(), state);
                for (ack, committed, _) in self.overtaken.drain(..) {
                    ack.answer(Ok(committed));
                }
                for answer in refused {
                    self.give_up(answer);
                }
                if self.mode == Mode::Ready
                    && let Some(fresh) = self.fresh.take()
                {
                    self.loaded_for(fresh);
                }
                self.go_on();
            }
            Err(error) => {
                tracing::error!(run = %self.cell.id(), %error, "a run could not be loaded again; its actor ends");
                let (lost, again): (Vec<_>, Vec<_>) =
                    std::mem::take(&mut self.again).into_jobs().partition(|job| job.ack.is_none());
                // While it is there to be waited for: who flushes finds it, or what is lost.
                let losses: Vec<_> = lost.iter().map(|_| self.context.losses.note(self.cell.id(), (&error).into())).collect();
                // First: whoever reads after the answers below asks storage, not what is known here.
                self.leave(false);
                for loss in &losses {
                    self.context.surroundings.lost(loss);
                }
                // With their permits: who closes finds the losses noted.
                drop(lost);
                // They are in storage, whatever can be read of it now.
                for (ack, committed, _) in self.overtaken.drain(..) {
                    ack.answer(Ok(committed));
                }
                // Before those are answered who wait in the stash until all is settled.
                for Job { ack, permit, .. } in again {
                    self.give_up(Answer { ack, error: CommitError::Store(error.clone()), permit });
                }
                self.end();
            }
        }
    }

    /// Of what others committed subscribers learn the net change of every row.
    fn tell_net_change(&self, known: Option<&RunState>, state: Option<RunState>) {
        let before = known.map_or(Version::NONE, RunState::version);
        let after = state.as_ref().map_or(Version::NONE, RunState::version);
        if before == after || !self.context.surroundings.wants_changes() {
            return;
        }
        let mut changed = newer(state.as_ref(), before);
        if let Some(known) = known.filter(|_| state.as_ref().is_none_or(|state| state.taken_in(before).is_none())) {
            add_gone(&mut changed, known, state.as_ref());
        }
        let versions = RunReceipt { run: self.cell.id().clone(), before, after };
        self.context.surroundings.changed(ChangeSeed::of(versions, None, changed, state));
    }
}
