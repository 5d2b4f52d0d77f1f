//! What waits to be flushed, what is on its way, and which chains are broken. Pure: it decides, the shard carries.

use std::collections::{HashMap, VecDeque};

use crate::model::{BatchAnswer, Entry, Outcome, Receipt, Refusal, RunId};
use crate::store::{StoreError, StoreErrorKind};

/// What became of an entry, as its run learns it.
#[derive(Debug)]
pub(crate) enum Settlement {
    /// It is in stable storage.
    Applied(Receipt),
    /// It was judged and refused; nothing of it was written.
    Refused(Refusal),
    /// It was not judged: it, or what it stood on, met a state that its run's actor had not seen. It comes back to be checked again. The flag says
    /// whether that state has to be loaded first.
    Recheck(Entry, bool),
    /// Storage failed before anything of it was written.
    NotApplied(StoreError),
    /// Nobody knows, and waiting any longer helps nobody.
    Unknown(StoreError),
}

/// Who learns what became of an entry.
pub(crate) trait Sink: Send + Sized + 'static {
    /// Tells all outcomes of one flush, in the order of the batch.
    fn settle(outcomes: Vec<(Self, Settlement)>);
}

/// An entry on its way down.
#[derive(Debug)]
pub(crate) struct Submission<S> {
    pub(crate) entry: Entry,
    /// About how many bytes it takes.
    pub(crate) weight: usize,
    /// The chain that it stands on, by run: when one entry of a chain fails, all later ones of the same chain do. Zero: it stands alone.
    pub(crate) chain: u64,
    pub(crate) sink: S,
}

/// Limits of one batch. A larger one would hold up those who come after it for longer than it saves.
const MAX_BATCH_ENTRIES: usize = 4096;
const MAX_BATCH_BYTES: usize = 8 << 20;
/// So much joins a batch that is under way at most: about what a few hundred clients send who write one thing each. Where more waits it is a batch of its
/// own, and whoever came before it is not held up by its work.
const MAX_JOINED_ENTRIES: usize = 512;
const MAX_JOINED_BYTES: usize = 256 << 10;

/// What stands in the line.
#[derive(Debug)]
pub(super) enum Item<S, B> {
    Entry(Submission<S>),
    /// Answered when everything before it is settled.
    Barrier(B),
}

/// What a batch leaves behind to be answered.
#[derive(Debug)]
pub(super) struct Flight<S, B> {
    pub(super) sinks: Vec<(S, u64)>,
    pub(super) barriers: Vec<B>,
    /// About how many bytes each of its entries takes.
    pub(super) weights: Vec<usize>,
}

impl<S, B> Flight<S, B> {
    /// Parts what was taken into the entries that go down and those who wait for them.
    pub(super) fn of(items: VecDeque<Item<S, B>>) -> (Vec<Entry>, Self) {
        let mut entries = Vec::with_capacity(items.len());
        let (sinks, weights) = (Vec::with_capacity(items.len()), Vec::with_capacity(items.len()));
        let mut flight = Self { sinks, barriers: Vec::new(), weights };
        for item in items {
            match item {
                Item::Entry(Submission { entry, chain, sink, weight }) => {
                    entries.push(entry);
                    flight.weights.push(weight);
                    flight.sinks.push((sink, chain));
                }
                Item::Barrier(barrier) => flight.barriers.push(barrier),
            }
        }
        (entries, flight)
    }

    /// Takes in those who wait for what joined the batch.
    pub(super) fn join(&mut self, later: Self) {
        self.sinks.extend(later.sinks);
        self.barriers.extend(later.barriers);
        self.weights.extend(later.weights);
    }

    /// About how many bytes its entries take together.
    pub(super) fn weight(&self) -> usize {
        self.weights.iter().sum()
    }
}

/// The line of one shard.
#[derive(Debug)]
pub(super) struct FlushQueue<S, B> {
    waiting: VecDeque<Item<S, B>>,
    /// About how many bytes wait, without those that came back.
    bytes: usize,
    broken: HashMap<RunId, u64>,
    /// What came back with a batch that failed for one of its entries; it goes before all that waits.
    apart: VecDeque<Item<S, B>>,
    /// How many entries of it go in one batch.
    piece: usize,
}

impl<S, B> FlushQueue<S, B> {
    pub(super) fn new() -> Self {
        Self { waiting: VecDeque::new(), bytes: 0, broken: HashMap::new(), apart: VecDeque::new(), piece: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.apart.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len() + self.apart.len()
    }

    /// Whether an entry waits; if none does, the barriers are done.
    pub(super) fn holds_entries(&mut self) -> Result<(), Vec<B>> {
        if self.apart.iter().chain(&self.waiting).any(|item| matches!(item, Item::Entry(_))) {
            return Ok(());
        }
        let barriers = self.apart.drain(..).chain(self.waiting.drain(..)).filter_map(|item| match item {
            Item::Barrier(barrier) => Some(barrier),
            Item::Entry(_) => None,
        });
        Err(barriers.collect())
    }

    /// Takes in an entry. One that stands on a broken chain comes back at once.
    pub(super) fn push(&mut self, submission: Submission<S>) -> Option<(S, Settlement)> {
        if !self.broken.is_empty() && self.stands_on_broken(&submission) {
            return Some((submission.sink, Settlement::Recheck(submission.entry, false)));
        }
        self.bytes = self.bytes.saturating_add(submission.weight);
        self.waiting.push_back(Item::Entry(submission));
        None
    }

    pub(super) fn push_barrier(&mut self, barrier: B) {
        self.waiting.push_back(Item::Barrier(barrier));
    }

    fn stands_on_broken(&mut self, submission: &Submission<S>) -> bool {
        if submission.chain == 0 {
            return false;
        }
        let mut broken = false;
        for part in &submission.entry.parts {
            match self.broken.get(&part.run) {
                Some(chain) if submission.chain <= *chain => broken = true,
                // The run's actor has learned of the break and begun a new chain.
                Some(_) => {
                    self.broken.remove(&part.run);
                }
                None => {}
            }
        }
        broken
    }

    /// What makes the next batch: everything that waits, in order, up to the limits of a batch.
    pub(super) fn take(&mut self) -> Option<VecDeque<Item<S, B>>> {
        if !self.apart.is_empty() {
            return Some(self.take_piece());
        }
        if self.waiting.is_empty() {
            return None;
        }
        if self.waiting.len() <= MAX_BATCH_ENTRIES && self.bytes <= MAX_BATCH_BYTES {
            self.bytes = 0;
            // The next batch will be about as long as this one.
            let room = self.waiting.len();
            return Some(std::mem::replace(&mut self.waiting, VecDeque::with_capacity(room)));
        }
        let (mut taken, mut entries, mut bytes) = (VecDeque::new(), 0, 0_usize);
        while let Some(next) = self.waiting.pop_front() {
            if let Item::Entry(submission) = &next {
                if entries > 0 && (entries == MAX_BATCH_ENTRIES || bytes.saturating_add(submission.weight) > MAX_BATCH_BYTES) {
                    self.waiting.push_front(next);
                    break;
                }
                entries += 1;
                bytes = bytes.saturating_add(submission.weight);
            }
            taken.push_back(next);
        }
        self.bytes = self.bytes.saturating_sub(bytes);
        Some(taken)
    }

    /// What joins a batch of this weight that is under way: all that waits, if it is little and together they are no more than a batch may be. Nothing while
    /// entries are sent apart, so that what comes apart gets smaller.
    pub(super) fn take_more(&mut self, weight: usize) -> Option<VecDeque<Item<S, B>>> {
        let is_little = self.waiting.len() <= MAX_JOINED_ENTRIES && self.bytes <= MAX_JOINED_BYTES;
        let fits = self.bytes.saturating_add(weight) <= MAX_BATCH_BYTES;
        if is_little && fits && self.apart.is_empty() { self.take() } else { None }
    }

    /// Puts the entries of a batch back that failed, with nothing written, for what one of them is: they are sent in ever smaller batches, so that the
    /// fault is told to that one alone.
    pub(super) fn put_apart(&mut self, entries: &[Entry], flight: Flight<S, B>) {
        self.piece = (entries.len() / 2).max(1);
        let back = |(((sink, chain), weight), entry): (((S, u64), usize), &Entry)| {
            Item::Entry(Submission { entry: entry.clone(), weight, chain, sink })
        };
        let sinks = flight.sinks.into_iter().zip(flight.weights);
        let mut back: VecDeque<Item<S, B>> = sinks.zip(entries).map(back).collect();
        back.extend(flight.barriers.into_iter().map(Item::Barrier));
        back.append(&mut self.apart);
        self.apart = back;
    }

    fn take_piece(&mut self) -> VecDeque<Item<S, B>> {
        let (mut taken, mut entries) = (VecDeque::new(), 0);
        while let Some(next) = self.apart.pop_front() {
            if matches!(next, Item::Entry(_)) {
                if entries == self.piece {
                    self.apart.push_front(next);
                    break;
                }
                entries += 1;
            }
            taken.push_back(next);
        }
        // If this piece is sound the next one may be longer; if not, it is halved.
        self.piece = self.piece.saturating_mul(2);
        taken
    }

    /// Takes out everything that waits and answers it with a fault; barriers are the caller's to answer.
    pub(super) fn reject_waiting(&mut self, error: &StoreError) -> (Vec<(S, Settlement)>, Vec<B>) {
        let mut rejected = Vec::new();
        let mut barriers = Vec::new();
        self.bytes = 0;
        for item in self.apart.drain(..).chain(self.waiting.drain(..)) {
            match item {
                Item::Entry(submission) => rejected.push((submission.sink, Settlement::NotApplied(error.clone()))),
                Item::Barrier(barrier) => barriers.push(barrier),
            }
        }
        (rejected, barriers)
    }

    /// Settles a flush that was answered, and whatever in the queue stood on what was refused.
    pub(super) fn answered(&mut self, entries: &[Entry], flight: Vec<(S, u64)>, answer: BatchAnswer) -> Vec<(S, Settlement)> {
        if answer.outcomes.len() != entries.len() {
            let error = StoreError::unknown(
                StoreErrorKind::Poisoned,
                format!("the backend answered {} outcomes for {} entries", answer.outcomes.len(), entries.len()),
            );
            return self.failed(entries, flight, &error);
        }
        let mut settled = Vec::with_capacity(flight.len());
        let mut any_refused = false;
        for ((sink, chain), (entry, outcome)) in flight.into_iter().zip(entries.iter().zip(answer.outcomes)) {
            let settlement = match outcome {
                Outcome::Applied(receipt) => Settlement::Applied(receipt),
                Outcome::Refused(refusal) => {
                    any_refused = true;
                    self.break_chains(entry, chain);
                    match refusal {
                        Refusal::Stale { .. } => Settlement::Recheck(entry.clone(), true),
                        Refusal::Chained { .. } => Settlement::Recheck(entry.clone(), false),
                        refusal => Settlement::Refused(refusal),
                    }
                }
            };
            settled.push((sink, settlement));
        }
        if any_refused {
            self.take_broken(&mut settled);
        }
        settled
    }

    /// Settles a flush that failed: its entries with the fault, and what stood on them comes back to be checked again.
    pub(super) fn failed(&mut self, entries: &[Entry], flight: Vec<(S, u64)>, error: &StoreError) -> Vec<(S, Settlement)> {
        let mut settled = Vec::with_capacity(flight.len());
        for ((sink, chain), entry) in flight.into_iter().zip(entries) {
            self.break_chains(entry, chain);
            let settlement = if error.is_unknown_outcome() {
                Settlement::Unknown(error.clone())
            } else {
                Settlement::NotApplied(error.clone())
            };
            settled.push((sink, settlement));
        }
        self.take_broken(&mut settled);
        settled
    }

    fn break_chains(&mut self, entry: &Entry, chain: u64) {
        if chain == 0 {
            return;
        }
        for part in &entry.parts {
            let broken = self.broken.entry(part.run.clone()).or_insert(chain);
            *broken = (*broken).max(chain);
        }
    }

    /// The actor of a run has learned of a break and begun this chain: nothing of an earlier one comes any more.
    pub(super) fn begun(&mut self, run: &RunId, chain: u64) {
        if self.broken.get(run).is_some_and(|broken| *broken < chain) {
            self.broken.remove(run);
        }
    }

    fn take_broken(&mut self, settled: &mut Vec<(S, Settlement)>) {
        let apart = std::mem::take(&mut self.apart);
        // Of these `bytes` knows nothing.
        let waiting = self.bytes;
        self.apart = self.without_broken(apart, settled);
        self.bytes = waiting;
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting = self.without_broken(waiting, settled);
    }

    fn without_broken(&mut self, items: VecDeque<Item<S, B>>, settled: &mut Vec<(S, Settlement)>) -> VecDeque<Item<S, B>> {
        let mut kept = VecDeque::with_capacity(items.len());
        for item in items {
            match item {
                Item::Entry(submission) if self.stands_on_broken(&submission) => {
                    self.bytes = self.bytes.saturating_sub(submission.weight);
                    settled.push((submission.sink, Settlement::Recheck(submission.entry, false)));
                }
                item => kept.push_back(item),
            }
        }
        kept
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
