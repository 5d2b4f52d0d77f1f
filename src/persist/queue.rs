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
}

impl<S, B> Flight<S, B> {
    /// Parts what was taken into the entries that go down and those who wait for them.
    pub(super) fn of(items: VecDeque<Item<S, B>>) -> (Vec<Entry>, Self) {
        let mut entries = Vec::with_capacity(items.len());
        let mut flight = Self { sinks: Vec::with_capacity(items.len()), barriers: Vec::new() };
        for item in items {
            match item {
                Item::Entry(Submission { entry, chain, sink, .. }) => {
                    entries.push(entry);
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
    }
}

/// The line of one shard.
#[derive(Debug)]
pub(super) struct FlushQueue<S, B> {
    waiting: VecDeque<Item<S, B>>,
    /// About how many bytes wait.
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

    /// What joins a batch that is under way: as [`take`](Self::take), but nothing while entries are sent apart, so that what comes apart gets smaller.
    pub(super) fn take_more(&mut self) -> Option<VecDeque<Item<S, B>>> {
        if self.apart.is_empty() { self.take() } else { None }
    }

    /// Puts the entries of a batch back that failed, with nothing written, for what one of them is: they are sent in ever smaller batches, so that the
    /// fault is told to that one alone.
    pub(super) fn put_apart(&mut self, entries: &[Entry], flight: Flight<S, B>) {
        self.piece = (entries.len() / 2).max(1);
        let back = |((sink, chain), entry): ((S, u64), &Entry)| {
            // Their bytes are not counted a second time: together they made one batch.
            Item::Entry(Submission { entry: entry.clone(), weight: 0, chain, sink })
        };
        let mut back: VecDeque<Item<S, B>> = flight.sinks.into_iter().zip(entries).map(back).collect();
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
        self.apart = self.without_broken(apart, settled);
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
mod tests {
    use super::*;
    use crate::model::{CommitSeq, RunPart, RunReceipt, Version};

    fn entry(run: &str) -> Entry {
        let run = RunId::new(run).unwrap();
        let part = RunPart { run, base: Version(1), expect: Version(1), guards: vec![], mutations: vec![], after: None };
        Entry { parts: vec![part], ..Entry::default() }
    }

    fn submission(run: &str, chain: u64, sink: u32) -> Submission<u32> {
        Submission { entry: entry(run), weight: 100, chain, sink }
    }

    fn applied(run: &str) -> Outcome {
        let runs = vec![RunReceipt { run: RunId::new(run).unwrap(), before: Version(1), after: Version(2) }];
        Outcome::Applied(Receipt { seq: CommitSeq(1), runs, grants: vec![] })
    }

    fn names(settled: &[(u32, Settlement)]) -> Vec<(u32, &'static str)> {
        settled
            .iter()
            .map(|(sink, settlement)| {
                let name = match settlement {
                    Settlement::Applied(_) => "applied",
                    Settlement::Refused(_) => "refused",
                    Settlement::Recheck(_, true) => "reload",
                    Settlement::Recheck(_, false) => "recheck",
                    Settlement::NotApplied(_) => "not applied",
                    Settlement::Unknown(_) => "unknown",
                };
                (*sink, name)
            })
            .collect()
    }

    #[test]
    fn a_refused_entry_takes_back_its_own_chain_and_nobody_elses() {
        let mut queue: FlushQueue<u32, ()> = FlushQueue::new();
        for (run, sink) in [("a", 1), ("b", 2)] {
            assert!(queue.push(submission(run, 7, sink)).is_none());
        }
        let (entries, flight) = Flight::of(queue.take().unwrap());
        for (run, sink) in [("a", 3), ("b", 4)] {
            assert!(queue.push(submission(run, 7, sink)).is_none());
        }
        let refusal = Refusal::RunNotFound { run: RunId::new("a").unwrap() };
        let answer = BatchAnswer { outcomes: vec![Outcome::Refused(refusal), applied("b")] };
        let settled = queue.answered(&entries, flight.sinks, answer);
        assert_eq!(names(&settled), [(1, "refused"), (2, "applied"), (3, "recheck")]);
        // What the actor sent before it learned of the break comes back too, the new chain goes through.
        assert_eq!(names(&[queue.push(submission("a", 7, 5)).unwrap()]), [(5, "recheck")]);
        assert!(queue.push(submission("a", 8, 6)).is_none());
        let (_, flight) = Flight::of(queue.take().unwrap());
        assert_eq!(flight.sinks, [(4, 7), (6, 8)]);
    }

    #[test]
    fn a_failed_flush_fails_its_entries_and_takes_back_what_stood_on_them() {
        let mut queue: FlushQueue<u32, ()> = FlushQueue::new();
        assert!(queue.push(submission("a", 1, 1)).is_none());
        let (entries, flight) = Flight::of(queue.take().unwrap());
        assert!(queue.push(submission("a", 1, 2)).is_none());
        assert!(queue.push(submission("b", 1, 3)).is_none());
        let error = StoreError::not_applied(StoreErrorKind::Full, "full");
        assert_eq!(names(&queue.failed(&entries, flight.sinks, &error)), [(1, "not applied"), (2, "recheck")]);
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn what_is_broken_is_forgotten_when_its_run_begins_anew() {
        let mut queue: FlushQueue<u32, ()> = FlushQueue::new();
        for number in 0..100 {
            let run = format!("r{number}");
            assert!(queue.push(submission(&run, 1, number)).is_none());
            let (entries, flight) = Flight::of(queue.take().unwrap());
            let refused = Refusal::RunNotFound { run: RunId::new(&run).unwrap() };
            queue.answered(&entries, flight.sinks, BatchAnswer { outcomes: vec![Outcome::Refused(refused)] });
            assert_eq!(names(&[queue.push(submission(&run, 1, number)).unwrap()]), [(number, "recheck")]);
            queue.begun(&RunId::new(&run).unwrap(), 2);
            assert!(queue.broken.is_empty(), "nothing of the old chain comes any more");
        }
    }

    #[test]
    fn a_batch_that_failed_for_one_of_its_entries_is_sent_in_ever_smaller_ones() {
        for (guilty, others) in (0..20).flat_map(|guilty| [(guilty, 0), (guilty, 7)]) {
            let mut queue: FlushQueue<u32, u32> = FlushQueue::new();
            for sink in 0..20 {
                // The last three stand on the guilty one.
                let run = if sink == guilty || sink > 16 { "guilty".to_owned() } else { format!("r{sink}") };
                assert!(queue.push(submission(&run, 1, sink)).is_none());
            }
            queue.push_barrier(1);
            let (mut sent, mut told, mut batches) = (Vec::new(), Vec::new(), 0);
            while let Some(items) = queue.take() {
                let (entries, flight) = Flight::of(items);
                batches += 1;
                assert!(batches < 20, "it ends soon");
                if entries.is_empty() {
                    assert_eq!(flight.barriers, [1]);
                    continue;
                }
                if batches == 1 {
                    for sink in 100..100 + others {
                        assert!(queue.push(submission(&format!("late{sink}"), 1, sink)).is_none());
                    }
                }
                let is_guilty = |(sink, _): &(u32, u64)| *sink == guilty;
                if !flight.sinks.iter().any(is_guilty) {
                    assert!(flight.barriers.is_empty() || sent.len() + told.len() + flight.sinks.len() >= 20, "a barrier waits");
                    sent.extend(flight.sinks.iter().map(|(sink, _)| *sink));
                } else if entries.len() > 1 {
                    queue.put_apart(&entries, flight);
                } else {
                    let error = StoreError::not_applied(StoreErrorKind::Input, "too large");
                    told.extend(names(&queue.failed(&entries, flight.sinks, &error)));
                }
            }
            let behind = (17..20).filter(|sink| *sink > guilty).map(|sink| (sink, "recheck"));
            assert_eq!(told, [(guilty, "not applied")].into_iter().chain(behind).collect::<Vec<_>>());
            let sound = (0..20).filter(|sink| *sink != guilty && (*sink <= 16 || *sink < guilty));
            assert_eq!(sent, sound.chain(100..100 + others).collect::<Vec<_>>(), "in their order");
        }
    }

    #[test]
    fn a_wrong_number_of_outcomes_is_unknown_for_all() {
        let mut queue: FlushQueue<u32, ()> = FlushQueue::new();
        assert!(queue.push(submission("a", 1, 1)).is_none());
        let (entries, flight) = Flight::of(queue.take().unwrap());
        let settled = queue.answered(&entries, flight.sinks, BatchAnswer { outcomes: vec![] });
        assert_eq!(names(&settled), [(1, "unknown")]);
    }

    #[test]
    fn batches_are_bounded_and_keep_the_order() {
        let mut queue: FlushQueue<u32, u32> = FlushQueue::new();
        let total = u32::try_from(MAX_BATCH_ENTRIES).unwrap() + 10;
        for sink in 0..total {
            assert!(queue.push(submission(&format!("r{sink}"), 1, sink)).is_none());
        }
        queue.push_barrier(99);
        let (first, flight) = Flight::of(queue.take().unwrap());
        assert_eq!(first.len(), MAX_BATCH_ENTRIES);
        assert!(flight.barriers.is_empty());
        let (second, rest) = Flight::of(queue.take().unwrap());
        assert_eq!(second.len(), 10);
        assert_eq!(rest.barriers, [99]);
        let order: Vec<u32> = flight.sinks.into_iter().chain(rest.sinks).map(|(sink, _)| sink).collect();
        assert_eq!(order, (0..total).collect::<Vec<_>>());
        let heavy = Submission { weight: MAX_BATCH_BYTES, ..submission("x", 1, 1) };
        assert!(queue.push(heavy).is_none());
        assert!(queue.push(submission("y", 1, 2)).is_none());
        assert_eq!(Flight::of(queue.take().unwrap()).0.len(), 1);
    }
}
