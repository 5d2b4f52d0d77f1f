//! Methods of the front door that no other test calls, its bounds, and its ends.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::support::{LyingBackend, Store};
use seeknal_state::model::{Batch, Entry, Mutation, Outcome, RunPart, Version, apply_all, time};
use seeknal_state::{
    Clock, Coordinator, Durability, Error, Event, Interval, LockOptions, MemoryBackend, NewRun, NodeId, NodeStatus, NodeUpdate,
    OnDelete, PartitionKey, RunId, RunQuery, RunStatus, RunUpdate, StreamError, Transaction, View,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_close_waits_for_the_first() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(backend.clone()).await.unwrap();
    state.create_run("run_1", NewRun::running()).await.unwrap();
    assert!(!state.is_closed());
    backend.close_gate();
    let arrived = backend.commits.load(std::sync::atomic::Ordering::SeqCst) + 1;
    let writer = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("run_1", "n", NodeUpdate::running()).await }
    });
    backend.arrived(arrived).await;
    let first = tokio::spawn({
        let state = state.clone();
        async move { state.close().await }
    });
    while !state.is_closed() {
        tokio::task::yield_now().await;
    }
    let mut second = Box::pin(state.close());
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut second).await.is_err(), "the first is not done");
    backend.open_gate();
    second.await.unwrap();
    assert!(writer.is_finished(), "what was admitted is answered before anybody hears that all is closed");
    writer.await.unwrap().unwrap();
    first.await.unwrap().unwrap();
    state.close().await.unwrap();
}

async fn runs_and_nodes_are_made_opened_and_deleted(store: Store) {
    let state = store.open().await;
    assert!(state.open_report().notices.is_empty());
    let first = state.ensure_run("run_1", NewRun::running().metadata("by", "one")).await.unwrap();
    let second = state.ensure_run("run_1", NewRun::pending().metadata("by", "two")).await.unwrap();
    assert_eq!((second.version(), second.header()), (first.version(), first.header()), "the second only opens it");
    state.set_metadata("run_1", "tries", 3).await.unwrap();
    let run = state.get_run("run_1").await.unwrap().unwrap();
    assert_eq!(run.header().metadata.get("tries").unwrap().as_str(), "3");
    assert!(run.header().metadata.get("by").is_some(), "the others stay");
    for node in ["a", "b"] {
        state.set_node_state("run_1", node, NodeUpdate::success()).await.unwrap();
    }
    assert_eq!(state.node_ids().await.unwrap().iter().map(NodeId::as_str).collect::<Vec<_>>(), ["a", "b"]);
    state.delete_node("run_1", "a").await.unwrap();
    assert!(state.get_node_state("run_1", "a").await.unwrap().is_none());
    let again = state.delete_node("run_1", "a").await.unwrap_err();
    assert!(matches!(&again, Error::NodeNotFound { node, .. } if node.as_str() == "a"), "{again}");
    assert_eq!(state.node_ids().await.unwrap().iter().map(NodeId::as_str).collect::<Vec<_>>(), ["b"]);
    state.close().await.unwrap();
    assert!(state.is_closed());
    let state = store.open().await;
    assert_eq!(
        state.get_run("run_1").await.unwrap().map(|run| run.nodes().count()),
        Some(1).filter(|_| store.backend != "memory")
    );
    state.close().await.unwrap();
}

async fn intervals_and_partitions_come_and_go(store: Store) {
    let state = store.open().await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    assert!(state.get_completed_intervals("run_1", "n").await.unwrap().is_empty());
    assert!(state.list_completed_partitions("no", "n").await.unwrap().is_empty());
    state.add_completed_interval("run_1", "n", ("2024-01-01", "2024-01-11")).await.unwrap();
    state.remove_completed_interval("run_1", "n", ("2024-01-03", "2024-01-04")).await.unwrap();
    let left = [Interval::parse("2024-01-01", "2024-01-03").unwrap(), Interval::parse("2024-01-04", "2024-01-11").unwrap()];
    assert_eq!(state.get_completed_intervals("run_1", "n").await.unwrap().iter().collect::<Vec<_>>(), left);
    assert_eq!(
        state.pending("n", ("2024-01-01", "2024-01-11")).await.unwrap(),
        [Interval::parse("2024-01-03", "2024-01-04").unwrap()]
    );
    for partition in ["dt=2", "dt=1", "dt=3", "dt=1"] {
        state.add_completed_partition("run_1", "n", partition).await.unwrap();
    }
    state.remove_completed_partition("run_1", "n", "dt=2").await.unwrap();
    state.remove_completed_partition("run_1", "n", "never").await.unwrap();
    let keys = state.list_completed_partitions("run_1", "n").await.unwrap();
    assert_eq!(keys.iter().map(PartitionKey::as_str).collect::<Vec<_>>(), ["dt=1", "dt=3"]);
    let inverted = state.remove_completed_interval("run_1", "n", ("2024-01-04", "2024-01-03")).await.unwrap_err();
    assert!(matches!(inverted, Error::Input(_)), "{inverted}");
    state.close().await.unwrap();
}

async fn guards_on_a_runs_status_and_locks_are_decided_in_the_commit(store: Store) {
    let state = store.open().await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    let write = |expected: &[RunStatus]| {
        let mut tx = state.transaction();
        tx.expect_run_status("run_1", expected.to_vec());
        tx.set_node_state("run_1", "n", NodeUpdate::running());
        tx.commit()
    };
    write(&[RunStatus::Pending, RunStatus::Running]).await.unwrap();
    let refused = write(&[RunStatus::Success]).await.unwrap_err();
    assert!(matches!(refused, Error::Conflict(_)), "{refused}");
    let unlocked = || {
        let mut tx = state.transaction();
        tx.expect_unlocked("run_1");
        tx.set_node_state("run_1", "m", NodeUpdate::running());
        tx.commit()
    };
    unlocked().await.unwrap();
    let lease = state.acquire_node_lock("run_1", "n", Duration::ZERO).await.unwrap().unwrap();
    let refused = unlocked().await.unwrap_err();
    assert!(refused.is_conflict(), "{refused}");
    lease.release().await.unwrap();
    unlocked().await.unwrap();
    // A deferred transaction with a guard is durable all the same, and one without is seen at once.
    let mut tx = state.transaction();
    tx.durability(Durability::Deferred);
    tx.set_node_state("run_1", "later", NodeUpdate::success());
    let commit = tx.commit().await.unwrap();
    assert_eq!(commit.seq, None);
    assert!(state.snapshot("run_1").unwrap().node("later").is_some());
    let mut tx = state.transaction();
    tx.durability(Durability::Deferred);
    tx.expect_run_status("run_1", [RunStatus::Running]);
    tx.set_node_state("run_1", "later", NodeUpdate::failed("x"));
    assert!(tx.commit().await.unwrap().seq.is_some());
    state.flush().await.unwrap();
    state.close().await.unwrap();
}

async fn locks_are_taken_twice_renewed_and_say_what_for(store: Store) {
    let state = store.open().await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    let key = seeknal_state::LeaseKey::run(seeknal_state::RunId::new("run_1").unwrap());
    let options =
        LockOptions::new().owner("task").purpose("backfill").reentrant(true).keep_alive(false).ttl(Duration::from_secs(60));
    let first = state.acquire(key.clone(), options.clone(), Duration::ZERO).await.unwrap().unwrap();
    let second = state.acquire(key.clone(), options, Duration::ZERO).await.unwrap().unwrap();
    assert_eq!(first.token(), second.token());
    let plain = state.acquire(key.clone(), LockOptions::new().owner("task"), Duration::ZERO).await.unwrap_err();
    assert!(matches!(plain, Error::Lease(_)) && plain.is_conflict() && !plain.is_lease_lost(), "{plain}");
    let listed = state.list_locks().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].purpose.as_deref(), &*listed[0].owner.name), (Some("backfill"), "task"));
    drop(first);
    assert!(!second.is_lost(), "free when all its guards are gone");
    let before = listed[0].until;
    while state.list_locks().await.unwrap()[0].until <= before {
        second.renew().await.unwrap();
    }
    assert!(second.remaining() > Duration::from_secs(30));
    state.force_unlock(second.token()).await.unwrap();
    let lost = Error::from(second.renew().await.unwrap_err());
    assert!(lost.is_lease_lost() && !lost.is_conflict() && !lost.is_unknown_outcome(), "{lost}");
    let nobody_knows = seeknal_state::StoreError::unknown(seeknal_state::StoreErrorKind::Io, "the answer is lost");
    assert!(
        Error::from(seeknal_state::LeaseError::from(nobody_knows)).is_unknown_outcome(),
        "also where a grant's answer is lost"
    );
    let gone = second.renew().await.unwrap_err();
    assert!(matches!(gone, seeknal_state::LeaseError::Lost { reason: seeknal_state::LostReason::Forced, .. }), "{gone}");
    state.close().await.unwrap();
}

async fn ids_that_cannot_be_are_refused_and_odd_ones_are_kept(store: Store) {
    let state = store.open().await;
    let long = "x".repeat(1 << 20);
    state.create_run("run_1", NewRun::running()).await.unwrap();
    for bad in ["", &long, "a\nb", "\u{0}", "tab\there", "\u{7f}"] {
        let shown: String = bad.chars().take(9).collect();
        for error in [
            state.create_run(bad, NewRun::running()).await.unwrap_err(),
            state.get_run(bad).await.unwrap_err(),
            state.set_node_state("run_1", bad, NodeUpdate::running()).await.unwrap_err(),
            state.acquire_lock(bad, Duration::ZERO).await.unwrap_err(),
            state.delete_run(bad, OnDelete::DropCoverage).await.unwrap_err(),
            state.coverage(bad).await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::Input(_)), "{shown:?}: {error}");
            let message = error.to_string();
            assert!(message.len() < 300 && !message.chars().any(char::is_control), "{shown:?}: {message:?}");
        }
    }
    let fine = ["../x", "a/b", "a:b", "ab", "日本語", " ", "rule.\"quoted\" \\ back", "'; DROP TABLE runs; --"];
    for id in fine {
        state.create_run(id, NewRun::running()).await.unwrap();
        state.set_node_state(id, id, NodeUpdate::success()).await.unwrap();
    }
    if store.backend == "memory" {
        return state.close().await.unwrap();
    }
    state.close().await.unwrap();
    let state = store.open().await;
    for id in fine {
        let run = state.get_run(id).await.unwrap().unwrap();
        assert_eq!(run.nodes().map(|(node, _)| node.as_str()).collect::<Vec<_>>(), [id]);
    }
    state.close().await.unwrap();
}

on_every_backend!(
    runs_and_nodes_are_made_opened_and_deleted,
    intervals_and_partitions_come_and_go,
    guards_on_a_runs_status_and_locks_are_decided_in_the_commit,
    locks_are_taken_twice_renewed_and_say_what_for,
    ids_that_cannot_be_are_refused_and_odd_ones_are_kept,
);

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_beyond_its_limit_is_refused_before_room_is_taken_for_it() {
    let store = Store::of("memory");
    let error = Coordinator::builder().event_backlog(1 << 40).open(store.backend()).await.unwrap_err();
    assert!(matches!(error, Error::Input(_)) && error.to_string().contains("event_backlog"), "{error}");
    Coordinator::builder().event_backlog(1 << 20).open(store.backend()).await.unwrap().close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_lags_is_told_how_much_it_missed() {
    let store = Store::of("memory");
    let state = Coordinator::builder().event_backlog(4).open(store.backend()).await.unwrap();
    let mut slow = state.subscribe();
    state.create_run("run_1", NewRun::running()).await.unwrap();
    for rows in 0..20 {
        state.set_node_state("run_1", "n", NodeUpdate::success().row_count(rows)).await.unwrap();
    }
    let StreamError::Lagged(missed) = slow.next().await.unwrap_err() else { panic!("it lagged") };
    let mut seen = 0;
    let mut last = None;
    while seen + missed < 21 {
        let Event::Changed(change) = slow.next().await.unwrap() else { panic!("nothing was lost") };
        last = change.snapshot.clone();
        seen += 1;
    }
    assert!(missed >= 16, "{missed} and {seen}");
    assert_eq!(last.unwrap().node("n").unwrap().row_count, Some(19), "the newest ones are there");
    state.close().await.unwrap();
    assert_eq!(slow.next().await.unwrap_err(), StreamError::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_on_their_way_are_bounded() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::builder().max_bytes_in_flight(64 << 10).open(backend.clone()).await.unwrap();
    state.create_run("run_1", NewRun::running()).await.unwrap();
    backend.close_gate();
    let arrived = backend.commits.load(std::sync::atomic::Ordering::SeqCst) + 1;
    let large = || NodeUpdate::success().metadata("text", "x".repeat(40 << 10));
    let first = tokio::spawn({
        let state = state.clone();
        let large = large();
        async move { state.set_node_state("run_1", "a", large).await }
    });
    backend.arrived(arrived).await;
    assert!(state.stats().permits_available > 1_000, "by number there is room");
    let mut tx = state.transaction();
    tx.set_node_state("run_1", "b", large());
    let full = tx.try_commit().await.unwrap_err();
    assert!(matches!(full, Error::Overloaded), "{full}");
    let mut tx = state.transaction();
    tx.set_node_state("run_1", "b", NodeUpdate::success());
    let waiting = tokio::spawn(tx.try_commit());
    let more = tokio::spawn({
        let state = state.clone();
        let large = large();
        async move { state.set_node_state("run_1", "c", large).await }
    });
    backend.open_gate();
    first.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    more.await.unwrap().unwrap();
    let mut tx = state.transaction();
    tx.set_node_state("run_1", "b", large());
    tx.try_commit().await.unwrap();
    assert_eq!(state.get_run("run_1").await.unwrap().unwrap().nodes().count(), 3);
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn resident_runs_are_bounded_and_those_that_sleep_are_read_again() {
    for backend in ["file", "memory"] {
        let store = Store::of(backend);
        let builder = Coordinator::builder().max_resident_runs(8).idle_after(Duration::from_millis(20));
        let state = builder.open(store.backend()).await.unwrap();
        for index in 0..100_u64 {
            let run = format!("run_{index}");
            state.create_run(&*run, NewRun::running()).await.unwrap();
            state.set_node_state(&*run, "n", NodeUpdate::success().row_count(index)).await.unwrap();
        }
        let begun = Instant::now();
        while state.stats().resident_runs > 8 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{backend}: {} runs stay resident", state.stats().resident_runs);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for index in 0..100_u64 {
            let node = state.get_node_state(format!("run_{index}"), "n").await.unwrap().unwrap();
            assert_eq!((node.row_count, node.status), (Some(index), NodeStatus::Success), "{backend}");
        }
        state.close().await.unwrap();
    }
}

/// A bound is one also where nothing is swept for an hour.
#[tokio::test(flavor = "multi_thread")]
async fn more_runs_than_may_be_resident_are_sent_to_sleep_at_once() {
    let store = Store::of("memory");
    let builder = Coordinator::builder().max_resident_runs(40).idle_after(Duration::from_secs(3600));
    let state = builder.open(store.backend()).await.unwrap();
    for index in 0..2_000_u64 {
        state.create_run(format!("run_{index}"), NewRun::running()).await.unwrap();
    }
    let begun = Instant::now();
    while state.stats().resident_runs > 40 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} runs stay resident", state.stats().resident_runs);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(state.stats().resident_runs > 0, "not all of them at once");
    state.close().await.unwrap();
}

/// Contract C6: what is merely known costs no actor.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_known_runs_are_listed_and_read_without_an_actor_each() {
    const RUNS: usize = 100_000;
    let store = Store::of("database");
    let state = Coordinator::builder().max_resident_runs(16).open(store.backend()).await.unwrap();
    for thousand in 0..RUNS / 1_000 {
        let entries = (0..1_000).map(|index| {
            let run = RunId::new(format!("run_{:06}", thousand * 1_000 + index)).unwrap();
            let mutations = vec![Mutation::Create { run: NewRun::running(), at: time::parse("2024-01-10").unwrap() }];
            let mut after = None;
            apply_all(&mut after, &run, &mutations, Version::NONE.next()).unwrap();
            let part = RunPart { run, base: Version::NONE, expect: Version::NONE, guards: vec![], mutations, after };
            Entry { parts: vec![part], ..Entry::default() }
        });
        let answer = state.backend().commit(Arc::new(Batch::new(entries.collect()))).await.unwrap();
        assert!(answer.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_))), "{answer:?}");
    }
    let (mut listed, mut query) = (0, RunQuery::default().limit(1_000));
    loop {
        let page = state.list_runs(&query).await.unwrap();
        listed += page.runs.len();
        let Some(next) = page.next else { break };
        query = query.after(Some(next));
    }
    assert_eq!(listed, RUNS);
    assert_eq!(state.stats().resident_runs, 0);
    for index in (0..RUNS).step_by(5_000) {
        state.set_node_state(format!("run_{index:06}"), "n", NodeUpdate::success()).await.unwrap();
    }
    let begun = Instant::now();
    while state.stats().resident_runs > 16 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} runs stay resident", state.stats().resident_runs);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    state.close().await.unwrap();
}

/// Outside of every runtime, and after its own has ended: what was acknowledged is there, and the state can be opened at once.
#[test]
fn dropping_the_last_handle_outside_a_runtime_closes() {
    for backend in ["file", "database"] {
        let store = Store::of(backend);
        for (ended, run) in [(false, "while it lives"), (true, "after its end")] {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let state = runtime.block_on(async {
                let state = store.open().await;
                state.create_run(run, NewRun::running()).await.unwrap();
                state.with_durability(Durability::Deferred).set_node_state(run, "n", NodeUpdate::success()).await.unwrap();
                if ended {
                    state.flush().await.unwrap();
                }
                state
            });
            if ended {
                drop(runtime);
                drop(state);
            } else {
                let weak = std::sync::Arc::downgrade(state.backend());
                drop(state);
                // It closes in the background.
                let begun = Instant::now();
                while weak.strong_count() > 0 {
                    assert!(begun.elapsed() < Duration::from_secs(20), "{backend}: it does not close");
                    std::thread::sleep(Duration::from_millis(2));
                }
                drop(runtime);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let state = store.open().await;
                let found = state.get_run(run).await.unwrap().unwrap();
                assert_eq!(found.node("n").map(|node| &node.status), Some(&NodeStatus::Success), "{backend}, {run}");
                assert_eq!(state.list_locks().await.unwrap(), []);
                state.update_run(run, RunUpdate::success()).await.unwrap();
                state.close().await.unwrap();
            });
        }
    }
}

/// Cleanup through the coordinator leaves no ghost of a run behind.
#[tokio::test(flavor = "multi_thread")]
#[cfg(feature = "project")]
async fn what_was_cleaned_up_through_the_coordinator_is_gone_for_it() {
    use seeknal_state::project::cleanup;
    for backend in ["file", "database", "memory"] {
        let store = Store::of(backend);
        let state = store.open().await;
        for run in ["old", "locked", "changed", "running"] {
            state.create_run(run, NewRun::running()).await.unwrap();
            state.set_node_state(run, "n", NodeUpdate::success()).await.unwrap();
            // Each one's own: what is deleted is told by nobody else.
            let of = if run == "old" { ("2023-01-01", "2023-01-02") } else { ("2024-01-01", "2024-01-02") };
            state.add_completed_interval(run, "n", of).await.unwrap();
            if run != "running" {
                state.update_run(run, RunUpdate::success()).await.unwrap();
            }
        }
        let now = seeknal_state::Clock::now(&seeknal_state::SystemClock) + chrono::Duration::days(31);
        let plan = cleanup::plan(&**state.backend(), cleanup::Rules::older_than_days(30, 0, now).unwrap()).await.unwrap();
        assert_eq!(plan.delete.len(), 3, "{backend}");
        let _lease = state.acquire_lock("locked", Duration::ZERO).await.unwrap().unwrap();
        state.set_metadata("changed", "k", "v").await.unwrap();
        let cleaned = cleanup::through(&state, &plan).await.unwrap();
        assert_eq!(cleaned.deleted, 1, "{backend}");
        let mut stay: Vec<_> = cleaned.changed_meanwhile.iter().map(seeknal_state::RunId::as_str).collect();
        stay.sort_unstable();
        assert_eq!(stay, ["changed", "locked"], "{backend}");
        assert!(state.snapshot("old").is_none() && state.get_run("old").await.unwrap().is_none(), "{backend}");
        let gone = state.set_node_state("old", "n", NodeUpdate::running()).await.unwrap_err();
        assert!(matches!(gone, Error::RunNotFound(_)), "{backend}: {gone}");
        assert_eq!(state.coverage("n").await.unwrap().intervals.len(), 2, "{backend}");
        assert_eq!(cleanup::through(&state, &plan).await.unwrap().deleted, 0, "{backend}: a second time");
        state.create_run("old", NewRun::running()).await.unwrap();
        state.close().await.unwrap();
    }
}

/// Makes a run go, or a node of it, as soon as it was read: for the closure that is one change among others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_decides_again_when_what_it_read_is_gone() {
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    let now = |future: std::pin::Pin<Box<dyn Future<Output = Result<seeknal_state::Commit, Error>> + Send>>| {
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(future)).unwrap()
    };
    for lost in ["run", "node"] {
        let run = format!("without_{lost}");
        state.create_run(&run, NewRun::running()).await.unwrap();
        state.set_node_state(&run, "n", NodeUpdate::running()).await.unwrap();
        let mut seen = Vec::new();
        let decide = |view: &View, tx: &mut Transaction| {
            let there = view.run(&run)?.is_some_and(|run| run.node("n").is_some());
            seen.push(there);
            if there {
                let (state, id) = (state.clone(), run.clone());
                now(Box::pin(async move {
                    if lost == "run" {
                        state.delete_run(id, OnDelete::DropCoverage).await
                    } else {
                        state.delete_node(id, "n").await
                    }
                }));
                tx.delete_node(&run, "n");
            } else {
                if lost == "run" {
                    tx.create_run(&run, NewRun::running());
                }
                tx.set_node_state(&run, "other", NodeUpdate::running());
            }
            Ok(())
        };
        state.transact(decide).await.unwrap_or_else(|error| panic!("without its {lost}: {error}"));
        assert_eq!(seen, [true, false], "without its {lost}");
    }
    // What was never there is told at once.
    let mut calls = 0;
    let told = state
        .transact(|view, tx| {
            calls += usize::from(view.run("without_run")?.is_some());
            tx.delete_node("without_run", "nothing");
            Ok(())
        })
        .await;
    assert!(matches!(told, Err(Error::NodeNotFound { .. })), "{told:?}");
    assert_eq!(calls, 1);
}

/// What no other state of what it read would mend is told at once, and not tried until the caller is told of a contention that is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_can_never_be_is_told_at_once() {
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    for reads in [false, true] {
        let mut calls = 0;
        let told = state
            .transact(|view, tx| {
                if reads {
                    assert!(view.run("r")?.is_some_and(|run| run.node("n").is_some()));
                }
                calls += 1;
                tx.expect_status("r", "n", [NodeStatus::Success]);
                tx.set_node_state("r", "after n", NodeUpdate::running());
                Ok(())
            })
            .await;
        assert!(matches!(told, Err(Error::Conflict(_))), "{told:?}");
        assert_eq!(calls, 1, "reads: {reads}");
        let told = state
            .transact(|view, tx| {
                if reads {
                    view.run("r")?;
                }
                calls += 1;
                tx.create_run("r", NewRun::running());
                Ok(())
            })
            .await;
        assert!(matches!(&told, Err(Error::RunExists(run)) if run.as_str() == "r"), "{told:?}");
        assert_eq!(calls, 2, "reads: {reads}");
    }
    // A run that came meanwhile is another state.
    let mut seen = Vec::new();
    let made = |view: &View, tx: &mut Transaction| {
        let there = view.run("new")?.is_some();
        seen.push(there);
        if !there {
            let create = state.create_run("new", NewRun::running());
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(create)).unwrap();
            tx.create_run("new", NewRun::running());
        }
        tx.set_node_state("new", "n", NodeUpdate::running());
        Ok(())
    };
    state.transact(made).await.unwrap();
    assert_eq!(seen, [false, true]);
}

#[tokio::test]
async fn what_is_pending_is_asked_with_any_stamp() {
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let start = time::parse("2024-01-01").unwrap();
    let nanos = |nanos| start + chrono::Duration::nanoseconds(nanos);
    state.add_completed_interval("r", "load", start..nanos(2_999)).await.unwrap();
    let todo = state.pending("load", nanos(1)..nanos(9_999)).await.unwrap();
    assert_eq!(todo, [Interval::new(nanos(2_000), nanos(9_000)).unwrap()]);
    let empty = state.pending("load", nanos(1)..nanos(999)).await;
    assert!(matches!(empty, Err(Error::Input(_))), "{empty:?}");
}

/// A clock that was set to where no calendar goes.
#[derive(Debug)]
struct Beyond;

impl Clock for Beyond {
    fn now(&self) -> DateTime<Utc> {
        DateTime::<Utc>::MAX_UTC
    }
}

#[tokio::test]
async fn a_clock_beyond_the_calendar_makes_runs_at_its_end() {
    let state = Coordinator::builder().clock(Beyond).open(Arc::new(MemoryBackend::new())).await.unwrap();
    for run in ["a", "b"] {
        let made = state.create_run(run, NewRun::running()).await.map(|_| ());
        assert!(made.is_ok(), "{made:?}");
        let run = state.get_run(run).await.unwrap().unwrap();
        let end = time::parse("9999-12-31T23:59:59.999999Z").unwrap();
        assert_eq!((run.header().created_at, run.header().started_at), (end, Some(end)));
    }
}
