//! The side of the one who takes out: gives batches, lets them grow, and hears what became of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Current, FIRST_PAUSE, News, Shard};
use crate::model::{Batch, BatchAnswer, Outcome};
use crate::persist::queue::{Flight, Settlement, Sink};
use crate::store::{BatchSource, StoreError, StoreErrorKind};

/// After so many batches in a row of which nothing was written, those that fail for one entry are not sent apart any more: then it is not one. Who fails alone,
/// without having been parted from others, is no sign of that.
const MOST_FAILURES: u32 = 4;
/// As many, where it is values that storage cannot take: those are their callers', and storage is well.
const MOST_VALUES: u32 = 9;
/// Among the failures: some batch was sent apart since anything was written.
const SENT_APART: u32 = 1 << 31;
/// A batch of so many entries is not joined by what arrives while it is written: its sync is shared by enough of them, and who comes later is not to hold it
/// up.
const JOINED_BELOW: usize = 32;

impl<S: Sink> BatchSource for Shard<S> {
    fn forsaken(&self) {
        let mut line = self.line();
        line.pulled = false;
        // Also for a batch of which nobody knows: it is to be sent again.
        let must_wake = (!line.queue.is_empty() || self.current().is_some()) && line.must_wake();
        drop(line);
        match self.me.upgrade() {
            Some(shard) if must_wake => shard.wake(),
            _ => self.end_if_done(),
        }
    }

    fn waits(&self) -> bool {
        let mut line = self.line();
        if line.pausing {
            line.pulled = false;
            return false;
        }
        if self.current().is_some() {
            return true;
        }
        let Err(barriers) = line.queue.holds_entries() else { return true };
        line.pulled = false;
        drop(line);
        if !barriers.is_empty() {
            self.deliver(News { settled: Vec::new(), barriers, barred: None, batch: None });
        }
        self.end_if_done();
        false
    }

    fn next(&self) -> Option<Arc<Batch>> {
        loop {
            let items = {
                let mut line = self.line();
                if line.pausing {
                    line.pulled = false;
                    return None;
                }
                // What is unknown is sent again before anything else.
                if let Some(current) = &mut *self.current() {
                    current.sent = Instant::now();
                    return Some(Arc::clone(&current.batch));
                }
                let items = line.queue.take();
                line.pulled = items.is_some();
                items
            };
            let Some(items) = items else {
                self.end_if_done();
                return None;
            };
            let (entries, flight) = Flight::of(items);
            if entries.is_empty() {
                // Behind what was settled before and is not told yet.
                self.deliver(News { settled: Vec::new(), barriers: flight.barriers, barred: None, batch: None });
                continue;
            }
            let batch = Arc::new(Batch::new(entries));
            let span = tracing::debug_span!(
                "flush",
                backend = self.backend.name(),
                entries = tracing::field::Empty,
                batch = %batch.id,
                micros = tracing::field::Empty,
                applied = tracing::field::Empty,
                refused = tracing::field::Empty,
            );
            *self.current() = Some(Current {
                batch: Arc::clone(&batch),
                flight,
                span,
                sent: Instant::now(),
                unknown_since: None,
                said: None,
                pause: FIRST_PAUSE,
            });
            return Some(batch);
        }
    }

    fn join(&self, batch: &mut Arc<Batch>) -> bool {
        if batch.entries.len() >= JOINED_BELOW {
            return false;
        }
        let mut line = self.line();
        let mut current = self.current();
        // What was sent before may be in stable storage, under its name.
        let known = |current: &&mut Current<S>| current.batch.id == batch.id && current.unknown_since.is_none();
        let Some(current) = current.as_mut().filter(known) else { return false };
        let Some(items) = line.queue.take_more(current.flight.weight()) else { return false };
        drop(line);
        let (entries, flight) = Flight::of(items);
        current.flight.join(flight);
        // Given up here first: who has the only one need not copy it.
        current.batch = Arc::new(Batch { id: batch.id, entries: Vec::new() });
        Arc::make_mut(batch).entries.extend(entries);
        current.batch = Arc::clone(batch);
        true
    }

    fn answer(&self, answer: Result<BatchAnswer, StoreError>) {
        let Some(mut current) = self.current().take() else { return };
        let took = current.sent.elapsed();
        current.note_entries();
        self.stats.flushed(current.batch.entries.len(), took);
        let sinks = std::mem::take(&mut current.flight.sinks);
        if answer.is_ok() {
            self.failures.store(0, Ordering::Relaxed);
            self.unsettled.clear();
            self.failed.clear();
        }
        let settled = match answer {
            Ok(answer) if is_plain(&answer, &current) => applied(sinks, answer),
            Ok(answer) => {
                let mut line = self.line();
                line.stuck = None;
                line.queue.answered(&current.batch.entries, sinks, answer)
            }
            Err(error) if is_of_one(&error, &current) && self.failures_in_a_row() < most(&error) => {
                self.failures.fetch_or(SENT_APART, Ordering::Relaxed);
                tracing::debug!(%error, entries = current.batch.entries.len(), "a flush failed for one of its entries; they are sent apart");
                self.unsettled.clear();
                let flight = Flight { sinks, ..current.flight };
                let mut line = self.line();
                line.stuck = None;
                return line.queue.put_apart(&current.batch.entries, flight);
            }
            Err(error) if is_certain(&error, &current) => {
                self.stats.failed_flushes.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, entries = current.batch.entries.len(), "a flush failed; nothing of it was written");
                if is_sign(&error, self.failures.load(Ordering::Relaxed)) {
                    self.failures.fetch_add(1, Ordering::Relaxed);
                }
                self.unsettled.clear();
                // What is wrong with one entry is not wrong with storage.
                if !error.is_of_one_entry() {
                    self.failed.set(&error);
                }
                let mut line = self.line();
                line.stuck = None;
                line.queue.failed(&current.batch.entries, sinks, &error)
            }
            Err(error) => {
                current.flight.sinks = sinks;
                return self.unknown(current, error);
            }
        };
        // Counted first: whoever was told finds itself in the figures.
        let applied = settled.iter().filter(|(_, settlement)| matches!(settlement, Settlement::Applied(_))).count();
        self.stats.applied.fetch_add(applied as u64, Ordering::Relaxed);
        self.stats.refused.fetch_add((settled.len() - applied) as u64, Ordering::Relaxed);
        let Current { span, flight, batch, .. } = current;
        if !span.is_disabled() {
            span.record("micros", u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
            span.record("applied", applied).record("refused", settled.len() - applied);
        }
        drop(span);
        self.deliver(News { settled, barriers: flight.barriers, barred: None, batch: Some(batch) });
    }
}

impl<S: Sink> Shard<S> {
    fn failures_in_a_row(&self) -> u32 {
        self.failures.load(Ordering::Relaxed) & !SENT_APART
    }
}

fn most(error: &StoreError) -> u32 {
    if error.kind() == StoreErrorKind::Input { MOST_VALUES } else { MOST_FAILURES }
}

/// Whether a failure says something of storage itself.
fn is_sign(error: &StoreError, failures: u32) -> bool {
    !error.is_of_one_entry() || failures & SENT_APART != 0
}

/// Whether a batch failed, with nothing written, for what one of several entries is: a value that storage cannot take, a row that it cannot read.
fn is_of_one<S>(error: &StoreError, current: &Current<S>) -> bool {
    is_certain(error, current) && error.is_of_one_entry() && current.batch.entries.len() > 1
}

/// Whether nothing was written: by the only sending that there was, or by any of them.
fn is_certain<S>(error: &StoreError, current: &Current<S>) -> bool {
    !error.is_unknown_outcome() && (current.unknown_since.is_none() || error.is_never_applied())
}

/// Whether everything was applied, at the first try: then there is nothing to decide.
fn is_plain<S>(answer: &BatchAnswer, current: &Current<S>) -> bool {
    current.unknown_since.is_none()
        && answer.outcomes.len() == current.batch.entries.len()
        && answer.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_)))
}

fn applied<S>(sinks: Vec<(S, u64)>, answer: BatchAnswer) -> Vec<(S, Settlement)> {
    let mut settled = Vec::with_capacity(sinks.len());
    for ((sink, _), outcome) in sinks.into_iter().zip(answer.outcomes) {
        if let Outcome::Applied(receipt) = outcome {
            settled.push((sink, Settlement::Applied(receipt)));
        }
    }
    settled
}
