//! Broken chains, pieces that are sent apart, limits of a batch.

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
fn what_joins_a_batch_keeps_it_within_its_limits() {
    let mut queue: FlushQueue<u32, ()> = FlushQueue::new();
    assert!(queue.push(Submission { weight: MAX_BATCH_BYTES - 150, ..submission("a", 1, 1) }).is_none());
    let (_, mut flight) = Flight::of(queue.take().unwrap());
    assert!(queue.push(submission("b", 1, 2)).is_none());
    flight.join(Flight::of(queue.take_more(flight.weight()).unwrap()).1);
    assert_eq!(flight.sinks, [(1, 1), (2, 1)]);
    assert!(queue.push(submission("c", 1, 3)).is_none());
    assert!(queue.take_more(flight.weight()).is_none());
    assert_eq!(queue.take().unwrap().len(), 1);
}

/// Whoever came first, alone, is not to wait for the work of a crowd: the crowd is the next batch.
#[test]
fn a_crowd_joins_no_batch_that_is_under_way() {
    for (crowd, weight, joins) in
        [(256, 700, true), (512, 100, true), (513, 100, false), (4_000, 100, false), (20, 20 << 10, false)]
    {
        let mut queue: FlushQueue<u32, u32> = FlushQueue::new();
        assert!(queue.push(submission("a", 1, 0)).is_none());
        let (_, flight) = Flight::of(queue.take().unwrap());
        for sink in 1..=crowd {
            assert!(queue.push(Submission { weight, ..submission(&format!("r{sink}"), 1, sink) }).is_none());
        }
        assert_eq!(queue.take_more(flight.weight()).is_some(), joins, "{crowd} of {weight} bytes");
        let waits = usize::try_from(if joins { 0 } else { crowd }).unwrap();
        assert_eq!((queue.len(), queue.take().map_or(0, |next| next.len())), (waits, waits));
    }
}

#[test]
fn what_was_sent_apart_keeps_its_weight() {
    let mut queue: FlushQueue<u32, ()> = FlushQueue::new();
    for sink in 1..=2 {
        assert!(queue.push(Submission { weight: MAX_BATCH_BYTES / 2, ..submission(&format!("r{sink}"), 1, sink) }).is_none());
    }
    let (entries, flight) = Flight::of(queue.take().unwrap());
    queue.put_apart(&entries, flight);
    let (_, first) = Flight::of(queue.take().unwrap());
    assert_eq!((&first.sinks[..], first.weight()), (&[(1, 1)][..], MAX_BATCH_BYTES / 2));
    assert!(queue.push(submission("late", 1, 3)).is_none());
    assert!(queue.take_more(first.weight()).is_none(), "nothing joins while entries are sent apart");
    // The last one has company again, within the limit.
    let (entries, last) = Flight::of(queue.take().unwrap());
    assert_eq!((&last.sinks[..], last.weight()), (&[(2, 1)][..], MAX_BATCH_BYTES / 2));
    // Once more apart, and then taken out as what stood on something broken: what waits is counted as before.
    queue.put_apart(&entries, last);
    let error = StoreError::not_applied(StoreErrorKind::Full, "full");
    let settled = queue.failed(&[entry("r2")], vec![(9, 1)], &error);
    assert_eq!(names(&settled), [(9, "not applied"), (2, "recheck")]);
    assert_eq!(queue.bytes, 100);
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
