//! What fails, or is refused, harms nobody beside it. Through the front door and the public backend trait.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use crate::support::{Lie, LyingBackend};
use seeknal_state::model::{Batch, Entry, Mutation, RunPart};
use seeknal_state::{
    Clock, Coordinator, Durability, Error, Event, NewRun, NodeId, NodeStatus, NodeUpdate, RunId, StateBackend, SystemClock,
    Transaction, Version,
};

async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// Polls it once, and goes away.
async fn begin(future: impl Future) {
    let mut future = pin!(future);
    poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

fn commit(tx: Transaction) -> tokio::task::JoinHandle<Result<(), Error>> {
    tokio::spawn(async move { tx.commit().await.map(drop) })
}

#[tokio::test]
async fn a_loss_that_was_told_to_nobody_is_told_to_the_next() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.tell([Lie::Full]);
    let deferred = state.with_durability(Durability::Deferred);
    deferred.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    while state.health().lost.is_empty() {
        tokio::task::yield_now().await;
    }
    begin(state.set_node_state("r", "n", NodeUpdate::running())).await;
    settle().await;
    let error = state.flush().await.unwrap_err();
    assert!(matches!(&error, Error::DeferredLost(loss) if loss.lost == 1), "{error}");
    assert!(state.health().lost.is_empty());
}

#[tokio::test]
async fn a_deferred_write_stays_seen_while_it_is_checked_again() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let deferred = state.with_durability(Durability::Deferred);
    backend.close_gate();
    deferred.set_node_state("r", "n1", NodeUpdate::running()).await.unwrap();
    backend.arrived(2).await;
    deferred.set_node_state("r", "n2", NodeUpdate::running()).await.unwrap();
    assert!(state.get_node_state("r", "n2").await.unwrap().is_some());
    backend.tell([Lie::Full]);
    backend.gate.add_permits(1);
    backend.arrived(3).await;
    assert!(state.get_node_state("r", "n2").await.unwrap().is_some(), "it was acknowledged, and is on its way again");
    assert!(state.get_node_state("r", "n1").await.unwrap().is_none(), "it is lost");
    backend.open_gate();
    assert!(matches!(state.flush().await, Err(Error::DeferredLost(loss)) if loss.lost == 1));
    assert!(state.get_node_state("r", "n2").await.unwrap().is_some());
}

#[tokio::test]
async fn a_conflict_is_judged_on_what_is_committed() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    let _held = state.acquire_lock("r", Duration::from_secs(30)).await.unwrap().unwrap();
    backend.close_gate();
    let before = backend.commits.load(Ordering::SeqCst);
    let mut refused = Vec::new();
    for (node, update) in [("x", NodeUpdate::running()), ("n", NodeUpdate::success())] {
        let mut tx = state.transaction();
        tx.expect_unlocked("r").set_node_state("r", node, update);
        refused.push(commit(tx));
        backend.arrived(before + 1).await;
        settle().await;
    }
    // True all the time; but not on what the second one would have made.
    let mut tx = state.transaction();
    tx.expect_status("r", "n", [NodeStatus::Running]).set_node_state("r", "y", NodeUpdate::running());
    let innocent = commit(tx);
    settle().await;
    backend.open_gate();
    innocent.await.unwrap().expect("the node runs all the time");
    for refused in refused {
        assert!(refused.await.unwrap().unwrap_err().is_conflict());
    }
}

#[tokio::test]
async fn many_refusals_ahead_are_not_held_against_what_is_behind_them() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let _held = state.acquire_lock("r", Duration::from_secs(30)).await.unwrap().unwrap();
    backend.close_gate();
    let mut refused = Vec::new();
    for index in 0..60 {
        let mut tx = state.transaction();
        tx.expect_unlocked("r").set_node_state("r", format!("n{index}"), NodeUpdate::running());
        refused.push(commit(tx));
    }
    settle().await;
    let mut tx = state.transaction();
    tx.set_node_state("r", "behind", NodeUpdate::running());
    let behind = commit(tx);
    settle().await;
    backend.open_gate();
    behind.await.unwrap().expect("nobody stands in its way");
    for refused in refused {
        let error = refused.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Conflict(_)), "{error}");
    }
}

#[tokio::test]
async fn a_write_that_was_overtaken_is_answered_before_all_is_closed() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    backend.close_gate();
    let write = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "ours", NodeUpdate::running()).await }
    });
    backend.arrived(2).await;
    backend.write_as_another("r", "theirs", NodeUpdate::running()).await;
    let loading = backend.loading.write().await;
    backend.open_gate();
    let closing = tokio::spawn({
        let state = state.clone();
        async move { state.close().await }
    });
    settle().await;
    assert!(!write.is_finished(), "it is not seen yet");
    drop(loading);
    write.await.unwrap().expect("it is in storage");
    closing.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hears_of_a_change_can_read_it() {
    const WRITES: u64 = 2_000;
    let state = Coordinator::open(Arc::new(seeknal_state::MemoryBackend::new())).await.unwrap();
    let created = state.create_run("r", NewRun::running()).await.unwrap().version();
    let mut events = state.subscribe();
    let writers: Vec<_> = (0..16_u64)
        .map(|writer| {
            let state = state.clone();
            tokio::spawn(async move {
                for row in 0..WRITES / 16 {
                    state.set_node_state("r", format!("n{writer}"), NodeUpdate::running().row_count(row)).await.unwrap();
                }
            })
        })
        .collect();
    let mut heard = created;
    while heard.0 < created.0 + WRITES {
        let Event::Changed(change) = events.next().await.unwrap() else { panic!("nothing is lost") };
        assert_eq!(change.before, heard, "every change is told, in order");
        heard = change.after;
        let seen = state.snapshot("r").unwrap().version();
        assert!(seen >= heard, "told of version {heard}, seen is {seen}");
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

/// A guard that is refused can be seen not to hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_can_read_why() {
    let state = Coordinator::open(Arc::new(seeknal_state::MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut writers = Vec::new();
    for _ in 0..8 {
        let state = state.clone();
        writers.push(tokio::spawn(async move {
            let mut refused = 0;
            for _ in 0..400 {
                let seen = state.snapshot("r").unwrap().version();
                let mut tx = state.transaction();
                tx.expect_version("r", seen).set_node_state("r", "n", NodeUpdate::running());
                if tx.commit().await.is_err() {
                    refused += 1;
                    let now = state.snapshot("r").unwrap().version();
                    assert!(now > seen, "refused because it is not at version {seen}, and it is read at {now}");
                }
            }
            refused
        }));
    }
    let mut refused = 0;
    for writer in writers {
        refused += writer.await.unwrap();
    }
    assert!(refused > 0, "nobody was in anybody's way");
}

/// A run that cannot be loaded any more is nothing to wait for twice.
#[tokio::test]
async fn a_death_is_waited_for_once() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    state.create_run("q", NewRun::running()).await.unwrap();
    backend.close_gate();
    let write = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "ours", NodeUpdate::running()).await }
    });
    backend.arrived(3).await;
    backend.write_as_another("r", "theirs", NodeUpdate::running()).await;
    backend.unreadable.store(true, Ordering::SeqCst);
    backend.gate.add_permits(1);
    write.await.unwrap().expect("it is in storage");
    state.flush().await.unwrap();
    let other = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("q", "n", NodeUpdate::running()).await }
    });
    backend.arrived(4).await;
    tokio::select! {
        biased;
        flushed = state.flush() => flushed.unwrap(),
        () = settle() => panic!("it waits behind what others write"),
    }
    backend.open_gate();
    other.await.unwrap().unwrap();
}

/// What is done stays done for who reads it while a run is deleted that did it.
#[tokio::test]
async fn coverage_that_moves_while_it_is_read_is_not_missed() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    state.add_completed_interval("r", "n", ("2024-01-01", "2024-01-02")).await.unwrap();
    let (run, node) = (RunId::new("r").unwrap(), NodeId::new("n").unwrap());
    *backend.doomed.lock().unwrap() = Some(run.clone());
    let provided = backend.coverage(&node).await.unwrap();
    assert!(backend.inner.load_run(&run).await.unwrap().is_none(), "it was deleted meanwhile");
    assert_eq!(provided.intervals.len(), 1);
    *backend.doomed.lock().unwrap() = None;
    assert_eq!(backend.coverage(&node).await.unwrap(), provided);
    assert_eq!(backend.node_ids().await.unwrap().len(), 1);
}

/// A transaction over several runs is no different from one over a single run: who goes away before it was admitted leaves nothing behind.
#[tokio::test]
async fn who_goes_away_while_the_coordinator_is_full_changes_nothing() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::builder().max_in_flight(2).open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    for run in ["r", "s"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    backend.close_gate();
    let mut full = Vec::new();
    for node in ["a", "b"] {
        let mut tx = state.transaction();
        tx.set_node_state("r", node, NodeUpdate::running());
        full.push(commit(tx));
    }
    while state.stats().permits_available > 0 {
        tokio::task::yield_now().await;
    }
    for runs in [&["r"][..], &["r", "s"]] {
        for _ in 0..10 {
            let mut tx = state.transaction();
            for run in runs {
                tx.set_node_state(*run, "abandoned", NodeUpdate::running());
            }
            begin(tx.commit()).await;
            settle().await;
        }
    }
    backend.open_gate();
    for write in full {
        write.await.unwrap().unwrap();
    }
    // Permits are given in the order of calls: what was asked for before has its turn before.
    let mut tx = state.transaction();
    tx.set_node_state("r", "n", NodeUpdate::running()).set_node_state("s", "n", NodeUpdate::running());
    tx.commit().await.unwrap();
    for run in state.snapshots(&["r", "s"]).await.unwrap() {
        assert!(run.unwrap().node("abandoned").is_none(), "nobody waited for it, and it was never admitted");
    }
    assert_eq!(state.stats().permits_available, 2);
}

/// What storage answers is answered to all who asked for it before it was asked.
#[tokio::test]
async fn a_run_that_is_not_there_is_not_looked_for_again_for_each_who_asks() {
    for unreadable in [false, true] {
        for shared in [false, true] {
            let backend = LyingBackend::new(shared);
            let state = open(&backend).await;
            backend.unreadable.store(unreadable, Ordering::SeqCst);
            let before = backend.loads.load(Ordering::SeqCst);
            let loading = backend.loading.write().await;
            let readers: Vec<_> = (0..40)
                .map(|_| {
                    let state = state.clone();
                    tokio::spawn(async move { state.get_run("nowhere").await })
                })
                .collect();
            while backend.loads.load(Ordering::SeqCst) == before {
                tokio::task::yield_now().await;
            }
            // The next load takes its time too.
            tokio::spawn({
                let backend = Arc::clone(&backend);
                async move {
                    let _loading = backend.loading.write().await;
                    settle().await;
                }
            });
            settle().await;
            drop(loading);
            for reader in readers {
                match reader.await.unwrap() {
                    Ok(found) => assert!(found.is_none() && !unreadable),
                    Err(error) => assert!(unreadable && error.to_string().contains("nobody can read it"), "{error}"),
                }
            }
            // The first one's, and one that began after all the others had asked.
            let loads = backend.loads.load(Ordering::SeqCst) - before;
            assert!(loads <= 2, "{loads} loads for 40 who asked at once");
        }
    }
}

/// What is answered to somebody was read after he asked.
#[tokio::test]
async fn a_run_that_another_process_made_is_found_by_who_asks_after_it() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    let read = || {
        let state = state.clone();
        tokio::spawn(async move { state.get_run("theirs").await.unwrap().is_some() })
    };
    backend.late.store(true, Ordering::SeqCst);
    let loading = backend.loading.write().await;
    let before = backend.loads.load(Ordering::SeqCst);
    let early = read();
    while backend.loads.load(Ordering::SeqCst) == before {
        tokio::task::yield_now().await;
    }
    // Storage has answered the first one, and the answer is on its way.
    let made = Mutation::Create { run: NewRun::running(), at: SystemClock.now() };
    let run = RunId::new("theirs").unwrap();
    let (base, expect) = (Version::NONE, Version::NONE);
    let parts = vec![RunPart { run, base, expect, guards: vec![], mutations: vec![made], after: None }];
    backend.inner.commit(Arc::new(Batch::new(vec![Entry { parts, ..Entry::default() }]))).await.unwrap();
    let late = read();
    settle().await;
    drop(loading);
    assert!(!early.await.unwrap(), "the answer was older than the run");
    assert!(late.await.unwrap(), "it was there before he asked");
}

/// Who makes a run while others look for it needs no turn of his own.
#[tokio::test]
async fn a_run_can_be_made_while_others_look_for_it() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let before = backend.loads.load(Ordering::SeqCst);
    let loading = backend.loading.write().await;
    let reader = tokio::spawn({
        let state = state.clone();
        async move { state.get_run("new").await }
    });
    while backend.loads.load(Ordering::SeqCst) == before {
        tokio::task::yield_now().await;
    }
    let maker = tokio::spawn({
        let state = state.clone();
        async move { state.create_run("new", NewRun::running()).await }
    });
    settle().await;
    drop(loading);
    maker.await.unwrap().unwrap();
    reader.await.unwrap().unwrap();
    assert_eq!(backend.loads.load(Ordering::SeqCst) - before, 1);
}
