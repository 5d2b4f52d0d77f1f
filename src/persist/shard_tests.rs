//! A writer that pulls and ends in the middle: nobody waits for ever.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::handle::Persist;
use super::queue::{Settlement, Sink, Submission};
use super::shard::is_to_be_said;
use crate::model::{
    Batch, BatchAnswer, CommitSeq, Entry, LeaseRecord, Outcome, Receipt, RunId, RunPage, RunPart, RunQuery, RunReceipt, RunState,
    Version,
};
use crate::store::{BatchSource, BoxFuture, OpenReport, StateBackend, StoreError, StoreErrorKind, Wake};

/// Tells by a channel what became of it.
#[derive(Debug)]
struct Told(u32, UnboundedSender<(u32, &'static str)>);

impl Sink for Told {
    fn settle(outcomes: Vec<(Self, Settlement)>) {
        for (Self(number, tell), settlement) in outcomes {
            let what = match settlement {
                Settlement::Applied(_) => "applied",
                Settlement::NotApplied(_) => "not applied",
                Settlement::Unknown(_) => "unknown",
                Settlement::Refused(_) | Settlement::Recheck(..) => "checked again",
            };
            tell.send((number, what)).unwrap();
        }
    }
}

/// Its writer is the test itself; when that has ended, commits say so.
#[derive(Debug, Default)]
struct Pulls {
    source: Mutex<Option<Weak<dyn BatchSource>>>,
    ended: Arc<AtomicBool>,
}

impl StateBackend for Pulls {
    fn name(&self) -> &'static str {
        "pulls"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async { Ok(OpenReport::new()) })
    }

    fn commit(&self, _: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        assert!(self.ended.load(Ordering::Acquire), "as long as there is a writer, it pulls");
        Box::pin(async { Err(StoreError::closed()) })
    }

    fn pull_from(&self, source: Weak<dyn BatchSource>) -> Option<Wake> {
        *self.source.lock().unwrap() = Some(source);
        let ended = Arc::clone(&self.ended);
        Some(Box::new(move || !ended.load(Ordering::Acquire)))
    }

    fn load_run<'a>(&'a self, _: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    fn list_runs<'a>(&'a self, _: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async { Ok(RunPage::default()) })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

fn submit(persist: &Persist<Told>, number: u32, tell: &UnboundedSender<(u32, &'static str)>) {
    let run = RunId::new(format!("r{number}")).unwrap();
    let part = RunPart { run, base: Version(1), expect: Version(1), guards: vec![], mutations: vec![], after: None };
    let entry = Entry { parts: vec![part], ..Entry::default() };
    persist.submit(Submission { entry, weight: 100, chain: 1, sink: Told(number, tell.clone()) });
}

async fn open() -> (
    Persist<Told>,
    Arc<dyn BatchSource>,
    Arc<AtomicBool>,
    UnboundedSender<(u32, &'static str)>,
    UnboundedReceiver<(u32, &'static str)>,
) {
    let pulls = Arc::new(Pulls::default());
    let ended = Arc::clone(&pulls.ended);
    let backend: Arc<dyn StateBackend> = Arc::clone(&pulls) as Arc<dyn StateBackend>;
    let persist = Persist::start(&backend).await.unwrap();
    let source = pulls.source.lock().unwrap().clone().unwrap().upgrade().unwrap();
    let (tell, told) = unbounded_channel();
    (persist, source, ended, tell, told)
}

#[tokio::test]
async fn what_waits_behind_a_writer_that_ended_is_answered() {
    let (persist, source, ended, tell, mut told) = open().await;
    submit(&persist, 1, &tell);
    assert_eq!(source.next().unwrap().entries.len(), 1);
    submit(&persist, 2, &tell);
    // The writer dies with the first batch, and before it asked for the second one.
    source.answer(Err(StoreError::unknown(StoreErrorKind::Poisoned, "it panicked")));
    ended.store(true, Ordering::Release);
    source.forsaken();
    assert_eq!(told.recv().await, Some((1, "unknown")));
    assert_eq!(told.recv().await, Some((2, "not applied")));
    submit(&persist, 3, &tell);
    assert_eq!(told.recv().await, Some((3, "not applied")));
    persist.close().await;
    // Nothing goes through a closed line any more: what it settles last cannot be waited for.
    let barrier = persist.barrier(&RunId::new("r1").unwrap()).await;
    assert_eq!(barrier.unwrap_err().kind(), StoreErrorKind::Closed);
}

/// As where the word that the batch is to be sent again comes behind the writer's close.
#[tokio::test]
async fn a_batch_that_nobody_knows_is_sent_again_where_the_writer_ended_meanwhile() {
    let (persist, source, ended, tell, mut told) = open().await;
    submit(&persist, 1, &tell);
    assert_eq!(source.next().unwrap().entries.len(), 1);
    source.answer(Err(StoreError::unknown(StoreErrorKind::Unavailable, "no answer")));
    // It is called again after a pause, and then it has the batch.
    while !source.waits() {
        tokio::task::yield_now().await;
    }
    ended.store(true, Ordering::Release);
    source.forsaken();
    assert_eq!(told.recv().await, Some((1, "unknown")));
    persist.close().await;
}

#[tokio::test]
async fn what_arrives_before_the_writer_has_its_turn_is_in_the_batch() {
    let (persist, source, _, tell, mut told) = open().await;
    assert!(!source.waits());
    submit(&persist, 1, &tell);
    assert!(source.waits() && source.waits(), "asked twice, nothing is taken");
    submit(&persist, 2, &tell);
    assert_eq!(source.next().unwrap().entries.len(), 2);
    submit(&persist, 3, &tell);
    assert!(source.waits(), "what was given and not answered");
    assert_eq!(source.next().unwrap().entries.len(), 2, "is given again");
    source.answer(Err(StoreError::not_applied(StoreErrorKind::Busy, "busy")));
    assert_eq!(told.recv().await.unwrap(), (1, "not applied"));
    assert!(source.waits());
    assert_eq!(source.next().unwrap().entries.len(), 1);
}

#[tokio::test]
async fn what_arrives_while_a_batch_is_written_joins_it() {
    let (persist, source, _, tell, mut told) = open().await;
    submit(&persist, 1, &tell);
    let mut batch = source.next().unwrap();
    let id = batch.id;
    assert!(!source.join(&mut batch), "nothing arrived");
    submit(&persist, 2, &tell);
    let run = RunId::new("r2").unwrap();
    let mut behind = pin!(persist.barrier(&run));
    assert!(poll(behind.as_mut()).await.is_pending());
    assert!(source.join(&mut batch));
    assert_eq!((batch.id, batch.entries.len()), (id, 2));
    assert_eq!(source.next().unwrap(), batch, "given again it is the longer one");
    // Another batch than the one that is under way.
    assert!(!source.join(&mut Arc::new(Batch::new(Vec::new()))));
    submit(&persist, 3, &tell);
    source.answer(Err(StoreError::not_applied(StoreErrorKind::Busy, "busy")));
    behind.await.unwrap();
    assert_eq!(told.try_recv(), Ok((1, "not applied")));
    assert_eq!(told.try_recv(), Ok((2, "not applied")));
    assert!(told.try_recv().is_err());

    // One that is long enough is left alone.
    for number in 4..100 {
        submit(&persist, number, &tell);
    }
    let mut long = source.next().unwrap();
    submit(&persist, 100, &tell);
    assert!(!source.join(&mut long));
    source.answer(Err(StoreError::not_applied(StoreErrorKind::Busy, "busy")));
    let mut last = source.next().unwrap();
    assert_eq!(last.entries.len(), 1);

    // What was sent once may be in storage: it stays what it is.
    source.answer(Err(StoreError::unknown(StoreErrorKind::Unavailable, "the answer was lost")));
    submit(&persist, 101, &tell);
    let again = loop {
        tokio::task::yield_now().await;
        if let Some(batch) = source.next() {
            break batch;
        }
    };
    assert_eq!(again, last);
    assert!(!source.join(&mut last));
}

#[tokio::test]
async fn nothing_joins_what_is_sent_apart() {
    let (persist, source, _, tell, mut told) = open().await;
    for number in 1..=4 {
        submit(&persist, number, &tell);
    }
    let guilty = || Err(StoreError::not_applied(StoreErrorKind::Corrupt, "one of them").of_one_entry());
    // The fourth is the one that storage does not take. Its kind comes down to it although the writer asks every time what joins.
    for _ in 0..20 {
        let Some(mut batch) = source.next() else { break };
        source.join(&mut batch);
        let fails = batch.entries.iter().any(|entry| entry.parts.iter().any(|part| part.run.as_str() == "r4"));
        source.answer(if fails { guilty() } else { Ok(plain(&batch)) });
    }
    assert!(source.next().is_none(), "all of it was answered");
    let mut outcomes = Vec::new();
    for _ in 0..4 {
        outcomes.push(told.recv().await.unwrap());
    }
    assert_eq!(outcomes, [(1, "applied"), (2, "applied"), (3, "applied"), (4, "not applied")]);
}

/// What becomes of these runs' entries, and how many sendings that takes, where storage does not take some of them.
async fn outcomes(
    persist: &Persist<Told>,
    source: &dyn BatchSource,
    runs: std::ops::RangeInclusive<u32>,
    guilty: impl Fn(&str) -> bool,
    kind: StoreErrorKind,
) -> (Vec<(u32, &'static str)>, usize) {
    let (tell, mut told) = unbounded_channel();
    for number in runs.clone() {
        submit(persist, number, &tell);
    }
    let mut sendings = 0;
    while let Some(batch) = source.next() {
        sendings += 1;
        let fails = batch.entries.iter().flat_map(|entry| &entry.parts).any(|part| guilty(part.run.as_str()));
        let error = || StoreError::not_applied(kind, "one of them").of_one_entry();
        source.answer(if fails { Err(error()) } else { Ok(plain(&batch)) });
    }
    let mut outcomes = Vec::new();
    for _ in runs {
        outcomes.push(told.recv().await.unwrap());
    }
    (outcomes, sendings)
}

#[tokio::test]
async fn who_fails_alone_takes_nobody_along_later() {
    for kind in [StoreErrorKind::Input, StoreErrorKind::Corrupt] {
        let (persist, source, ..) = open().await;
        for run in 101..=109 {
            let (alone, _) = outcomes(&persist, &*source, run..=run, |_| true, kind).await;
            assert_eq!(alone, [(run, "not applied")]);
        }
        let (mixed, _) = outcomes(&persist, &*source, 1..=9, |run| run == "r1", kind).await;
        assert_eq!(mixed.iter().filter(|(_, what)| *what == "applied").count(), 8, "{kind:?}: {mixed:?}");
    }
}

#[tokio::test]
async fn many_values_in_a_row_that_storage_does_not_take_take_nobody_along() {
    let (persist, source, ..) = open().await;
    let guilty = |run: &str| run != "r9";
    let (all, _) = outcomes(&persist, &*source, 1..=9, guilty, StoreErrorKind::Input).await;
    assert_eq!(all.last(), Some(&(9, "applied")), "{all:?}");
    // Where storage can read nothing at all it is not asked about every entry.
    let (all, sendings) = outcomes(&persist, &*source, 1_001..=1_200, |_| true, StoreErrorKind::Corrupt).await;
    assert!(all.iter().all(|(_, what)| *what == "not applied") && sendings < 30, "{sendings}");
}

/// Whoever only wants to read behind what was written needs no turn to write.
#[tokio::test]
async fn a_barrier_that_nothing_waits_before_waits_for_no_turn() {
    let (persist, source, _, tell, _told) = open().await;
    let run = RunId::new("r1").unwrap();
    let mut barrier = pin!(persist.barrier(&run));
    assert!(poll(barrier.as_mut()).await.is_pending());
    assert!(!source.waits());
    barrier.await.unwrap();
    // Behind an entry it does.
    submit(&persist, 1, &tell);
    let mut behind = pin!(persist.barrier(&run));
    assert!(poll(behind.as_mut()).await.is_pending());
    assert!(source.waits());
    assert!(poll(behind.as_mut()).await.is_pending());
    assert_eq!(source.next().unwrap().entries.len(), 1);
    source.answer(Err(StoreError::not_applied(StoreErrorKind::Busy, "busy")));
    behind.await.unwrap();
}

/// Everything applied.
fn plain(batch: &Batch) -> BatchAnswer {
    let receipt = |entry: &Entry| {
        let runs =
            entry.parts.iter().map(|part| RunReceipt { run: part.run.clone(), before: part.expect, after: part.expect.next() });
        Outcome::Applied(Receipt { seq: CommitSeq(1), runs: runs.collect(), grants: vec![] })
    };
    BatchAnswer { outcomes: batch.entries.iter().map(receipt).collect() }
}

/// Asks a future once.
async fn poll<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

#[tokio::test]
async fn a_batch_with_an_unknown_outcome_is_given_again_before_anything_else() {
    let (persist, source, _, tell, mut told) = open().await;
    submit(&persist, 1, &tell);
    let first = source.next().unwrap();
    submit(&persist, 2, &tell);
    source.answer(Err(StoreError::unknown(StoreErrorKind::Unavailable, "the answer was lost")));
    assert!(source.next().is_none(), "there is a pause before it is sent again");
    let again = loop {
        tokio::task::yield_now().await;
        if let Some(batch) = source.next() {
            break batch;
        }
    };
    assert_eq!(again.id, first.id);
    source.answer(Err(StoreError::not_applied(StoreErrorKind::Busy, "it says nothing of the first try")));
    assert!(told.try_recv().is_err(), "an error of a repetition settles nothing");
}

#[tokio::test]
async fn a_failure_that_speaks_of_all_sendings_settles_a_batch() {
    let (persist, source, _, tell, mut told) = open().await;
    for number in 1..=2 {
        submit(&persist, number, &tell);
    }
    let again = async || loop {
        tokio::task::yield_now().await;
        if let Some(batch) = source.next() {
            break batch;
        }
    };
    let lost = || Err(StoreError::unknown(StoreErrorKind::Unavailable, "the answer was lost"));
    let large = || StoreError::not_applied(StoreErrorKind::Input, "too large").of_one_entry().never_applied();
    assert_eq!(again().await.entries.len(), 2);
    source.answer(lost());
    assert_eq!(again().await.entries.len(), 2);
    assert!(persist.fault().is_some(), "nobody knows what became of them");
    source.answer(Err(large()));
    assert_eq!(persist.fault(), None, "that is known now");
    assert_eq!(again().await.entries.len(), 1, "they are sent apart");
    source.answer(lost());
    assert_eq!(again().await.entries.len(), 1);
    source.answer(Err(large()));
    assert_eq!(told.recv().await, Some((1, "not applied")));
    assert_eq!(again().await.entries.len(), 1);
    source.answer(Err(large()));
    assert_eq!(told.recv().await, Some((2, "not applied")));
}

/// A writer that asks for the next batch while nobody has told yet what became of the one before.
#[tokio::test]
async fn a_barrier_is_passed_only_when_all_before_it_is_told() {
    let error = || Err(StoreError::not_applied(StoreErrorKind::Busy, "busy"));
    for asks_first in [false, true] {
        let (persist, source, _, tell, mut told) = open().await;
        let run = RunId::new("r1").unwrap();
        for number in 1..=2 {
            submit(&persist, number, &tell);
        }
        assert_eq!(source.next().unwrap().entries.len(), 2);
        let mut barrier = pin!(persist.barrier(&run));
        assert!(poll(barrier.as_mut()).await.is_pending());
        source.answer(error());
        let more = if asks_first { source.waits() } else { source.next().is_some() };
        assert!(!more, "only the barrier waits");
        barrier.await.unwrap();
        assert_eq!(told.try_recv(), Ok((1, "not applied")));
        assert_eq!(told.try_recv(), Ok((2, "not applied")));
    }
}

/// The backend's own thread lives on, and answers; but nobody would send the batch again.
#[test]
fn a_batch_that_nobody_knows_is_told_of_where_the_runtime_has_ended() {
    for ended_in_the_pause in [false, true] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let lost = || Err(StoreError::unknown(StoreErrorKind::Unavailable, "the answer was lost"));
        let (persist, source, _, tell, mut told) = runtime.block_on(async {
            let opened = open().await;
            submit(&opened.0, 1, &opened.3);
            submit(&opened.0, 2, &opened.3);
            assert_eq!(opened.1.next().unwrap().entries.len(), 2);
            if ended_in_the_pause {
                opened.1.answer(lost());
                assert!(opened.1.next().is_none());
            }
            opened
        });
        submit(&persist, 3, &tell);
        drop(runtime);
        if !ended_in_the_pause {
            source.answer(lost());
        }
        let told: Vec<_> = std::iter::from_fn(|| told.try_recv().ok()).collect();
        assert_eq!(told, [(3, "not applied"), (1, "unknown"), (2, "unknown")]);
        assert!(source.next().is_none());
    }
}

#[test]
fn an_outage_of_an_hour_is_no_flood_in_the_log() {
    let begun = Instant::now();
    let (mut said, mut lines) = (None, 0);
    for second in 0..3_600 {
        let now = begun + Duration::from_secs(second);
        if is_to_be_said(said, now) {
            (said, lines) = (Some(now), lines + 1);
        }
    }
    assert_eq!(lines, 6, "once when it begins, and every ten minutes");
}
