//! Storage that fails, lies and panics; actors that die; others that write. Through the front door and the public backend trait.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use crate::support::{Lie, LyingBackend};
use chrono::{DateTime, Utc};
use seeknal_state::{
    BackendOptions, ClaimFilter, Clock, Coordinator, Durability, Error, Event, FencingToken, MemoryBackend, NewRun, Next, NodeId,
    NodeStatus, NodeUpdate, RunId, StateBackend, SystemClock, Version, create_state_backend,
};

pub(super) async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state
}

async fn rows(state: &Coordinator, node: &str) -> Option<u64> {
    state.get_node_state("r", node).await.unwrap().and_then(|node| node.row_count)
}

#[tokio::test]
async fn a_lost_answer_is_settled_by_the_same_batch() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let before = state.get_run("r").await.unwrap().unwrap().version();
    backend.tell([Lie::AnswerLost, Lie::NeverArrived, Lie::NeverArrived]);
    let commit = state.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    assert_eq!(commit.version(), before.next(), "applied once, though it was sent four times");
    let sent = backend.sent.lock().unwrap().clone();
    let last = sent[sent.len() - 1];
    assert_eq!(sent.iter().filter(|id| **id == last).count(), 4, "the same batch under the same id");
    assert_eq!(state.stats().unknown_flushes, 3);
    assert_eq!(state.get_run("r").await.unwrap().unwrap().version(), before.next());
}

#[tokio::test]
async fn a_failed_flush_fails_its_writes_and_nothing_else() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.close_gate();
    backend.tell([Lie::Full]);
    let first = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "a", NodeUpdate::running().row_count(1)).await }
    });
    backend.arrived(2).await;
    // These were checked against a tip that is about to fall.
    let queued: Vec<_> = (0..10_u64)
        .map(|n| {
            let state = state.clone();
            tokio::spawn(async move { state.set_node_state("r", format!("b{n}"), NodeUpdate::running().row_count(n)).await })
        })
        .collect();
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    backend.open_gate();
    let error = first.await.unwrap().unwrap_err();
    assert!(error.is_retryable() && !error.is_unknown_outcome(), "{error}");
    for task in queued {
        task.await.unwrap().unwrap();
    }
    assert_eq!(rows(&state, "a").await, None, "what failed is not there");
    for n in 0..10 {
        assert_eq!(rows(&state, &format!("b{n}")).await, Some(n));
    }
    state.set_node_state("r", "a", NodeUpdate::running().row_count(2)).await.unwrap();
    let run = state.get_run("r").await.unwrap().unwrap();
    assert_eq!(backend.inner.load_run(run.id()).await.unwrap().unwrap(), *run.state());
}

#[tokio::test]
async fn readers_never_see_what_is_not_committed() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.close_gate();
    let write = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "n", NodeUpdate::running()).await }
    });
    backend.arrived(2).await;
    assert!(state.get_node_state("r", "n").await.unwrap().is_none());
    let deferred = state.with_durability(Durability::Deferred);
    let behind = tokio::spawn(async move { deferred.set_node_state("r", "d", NodeUpdate::running()).await });
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    assert!(!behind.is_finished(), "a deferred write behind a durable one waits for it");
    backend.open_gate();
    write.await.unwrap().unwrap();
    behind.await.unwrap().unwrap();
    assert!(state.get_node_state("r", "n").await.unwrap().is_some());
    state.close().await.unwrap();
}

#[tokio::test]
async fn a_lost_deferred_write_is_told() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let mut events = state.subscribe();
    let deferred = state.with_durability(Durability::Deferred);
    backend.tell([Lie::Full]);
    deferred.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    let error = state.flush().await.unwrap_err();
    assert!(matches!(&error, Error::DeferredLost(loss) if loss.lost == 1), "{error}");
    assert_eq!(rows(&state, "n").await, None);
    assert!(matches!(events.next().await.unwrap(), Event::DeferredLost(_)));
    state.flush().await.unwrap();

    backend.tell([Lie::Full]);
    deferred.set_node_state("r", "n", NodeUpdate::running().row_count(2)).await.unwrap();
    while state.health().lost.is_empty() {
        tokio::task::yield_now().await;
    }
    let error = state.set_node_state("r", "n", NodeUpdate::running().row_count(3)).await.unwrap_err();
    assert!(matches!(error, Error::DeferredLost(_)), "{error}");
    state.set_node_state("r", "n", NodeUpdate::running().row_count(4)).await.unwrap();
    assert!(state.health().is_sound());
    assert_eq!(rows(&state, "n").await, Some(4));
}

#[tokio::test]
async fn a_backend_that_panics_or_miscounts_leaves_an_unknown_outcome_and_a_working_coordinator() {
    for lie in [Lie::Panic, Lie::TooFew] {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        backend.tell([lie]);
        let error = state.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap_err();
        assert!(error.is_unknown_outcome(), "{lie:?}: {error}");
        state.set_node_state("r", "n", NodeUpdate::running().row_count(2)).await.unwrap();
        assert_eq!(rows(&state, "n").await, Some(2));
        state.close().await.unwrap();
    }
}

/// A clock that panics on demand: the only code of the embedder that runs inside a run's actor.
#[derive(Debug, Default)]
struct Faulty(Arc<AtomicBool>);

impl Clock for Faulty {
    fn now(&self) -> DateTime<Utc> {
        assert!(!self.0.swap(false, Ordering::SeqCst), "the clock's own fault");
        SystemClock.now()
    }
}

#[tokio::test]
async fn an_actor_that_dies_is_started_again_and_waiters_learn_what_became_of_their_writes() {
    let backend = LyingBackend::new(false);
    let fault = Arc::new(AtomicBool::new(false));
    let state = Coordinator::builder()
        .clock(Faulty(Arc::clone(&fault)))
        .open(Arc::clone(&backend) as Arc<dyn StateBackend>)
        .await
        .unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut events = state.subscribe();
    backend.close_gate();
    let in_flight = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "in_flight", NodeUpdate::running().row_count(1)).await }
    });
    backend.arrived(2).await;
    fault.store(true, Ordering::SeqCst);
    let error = state.set_node_state("r", "victim", NodeUpdate::running()).await.unwrap_err();
    assert!(error.is_unknown_outcome(), "{error}");
    // The successor loads behind what the dead one had sent down.
    let next = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "next", NodeUpdate::running().row_count(2)).await }
    });
    backend.open_gate();
    in_flight.await.unwrap().expect("what was sent down is settled, and told");
    let commit = next.await.unwrap().unwrap();
    let run = state.get_run("r").await.unwrap().unwrap();
    assert_eq!(run.version(), commit.version());
    assert_eq!(run.node("in_flight").unwrap().row_count, Some(1));
    assert!(run.node("victim").is_none(), "nothing of the one that died in mid-transaction was applied");
    assert_eq!(commit.runs[0].before.0 - run.created_version().0, 1);
    let mut told = Vec::new();
    while !told.contains(&"next".to_owned()) {
        let Event::Changed(change) = events.next().await.unwrap() else { panic!("nothing was lost") };
        told.extend(change.nodes.iter().map(ToString::to_string));
    }
    assert!(told.contains(&"in_flight".to_owned()), "what the dead one committed is told too, not {told:?}");
}

/// A clock that panics once, at a call that was chosen before.
#[derive(Debug)]
struct FaultyAt(Arc<AtomicI64>);

impl Clock for FaultyAt {
    fn now(&self) -> DateTime<Utc> {
        assert_ne!(self.0.fetch_sub(1, Ordering::SeqCst), 0, "the clock's own fault");
        SystemClock.now()
    }
}

#[tokio::test]
async fn a_panic_at_any_moment_of_a_claim_leaves_a_node_that_can_be_claimed() {
    const TTL: Duration = Duration::from_secs(30);
    let folder = tempfile::tempdir().unwrap();
    let sqlite = create_state_backend("database", &BackendOptions::new().db_path(folder.path().join("state.db"))).unwrap();
    for (name, backend) in [("memory", Arc::new(MemoryBackend::new()) as Arc<dyn StateBackend>), ("sqlite", sqlite)] {
        let calls = Arc::new(AtomicI64::new(-1));
        let state = Coordinator::builder().clock(FaultyAt(Arc::clone(&calls))).open(backend).await.unwrap();
        let claim = |run: RunId, next: bool| {
            let state = state.clone();
            tokio::spawn(async move {
                if next {
                    Ok(state.claim_next(run, ClaimFilter::new().owner("w").ttl(TTL)).await?.claimed())
                } else {
                    state.claim_node(run, "n", "w", TTL).await
                }
            })
        };
        let mut newest = FencingToken::default();
        for next in [false, true] {
            let mut struck = 0;
            for call in 0.. {
                assert!(call < 50, "{name}: a claim asks the clock less often");
                let run = RunId::new(format!("r-{next}-{call}")).unwrap();
                state.create_run(&run, NewRun::running()).await.unwrap();
                state.set_node_state(&run, "n", NodeUpdate::pending()).await.unwrap();
                calls.store(call, Ordering::SeqCst);
                let claimed = claim(run.clone(), next).await;
                if calls.swap(-1, Ordering::SeqCst) >= 0 {
                    claimed.unwrap().unwrap().expect("nothing was in the way").complete(NodeUpdate::new()).await.unwrap();
                    break;
                }
                struck += 1;
                let place = format!("{name}, claim_next: {next}, call {call}");
                let claim = match claimed {
                    Ok(Ok(Some(claim))) => claim,
                    // Its caller was told, or died of it itself: nothing is held, and nothing is half done.
                    Ok(Ok(None)) => panic!("{place}: nobody else was there"),
                    Ok(Err(_)) | Err(_) => claim(run.clone(), next)
                        .await
                        .unwrap()
                        .unwrap_or_else(|error| panic!("{place}: {error}"))
                        .unwrap_or_else(|| panic!("{place}: the node is lost")),
                };
                let node = state.get_node_state(&run, "n").await.unwrap().unwrap();
                assert_eq!((node.status.clone(), node.attempt), (NodeStatus::Running, claim.attempt()), "{place}");
                assert!(claim.token() > newest, "{place}: tokens rise");
                newest = claim.token();
                claim.complete(NodeUpdate::new().row_count(1)).await.unwrap_or_else(|error| panic!("{place}: {error}"));
                let node = state.get_node_state(&run, "n").await.unwrap().unwrap();
                assert_eq!(
                    (node.status.clone(), node.row_count, node.token),
                    (NodeStatus::Success, Some(1), Some(newest)),
                    "{place}"
                );
                assert!(state.list_locks().await.unwrap().is_empty(), "{place}: nothing is held for ever");
            }
            assert!(struck > 0, "{name}: a claim asks the clock");
        }
        state.close().await.unwrap();
    }
}

#[tokio::test]
async fn what_an_actor_that_died_had_deferred_is_waited_for() {
    let backend = LyingBackend::new(false);
    let fault = Arc::new(AtomicBool::new(false));
    let builder = Coordinator::builder().clock(Faulty(Arc::clone(&fault)));
    let state = builder.open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    backend.close_gate();
    let deferred = state.with_durability(Durability::Deferred);
    deferred.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    backend.arrived(2).await;
    fault.store(true, Ordering::SeqCst);
    assert!(state.set_node_state("r", "victim", NodeUpdate::running()).await.unwrap_err().is_unknown_outcome());
    let flush = tokio::spawn({
        let state = state.clone();
        async move { state.flush().await }
    });
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    assert!(!flush.is_finished(), "it is not in storage");
    backend.open_gate();
    flush.await.unwrap().unwrap();
    assert!(backend.inner.load_run(&RunId::new("r").unwrap()).await.unwrap().unwrap().node("n").is_some());
}

#[tokio::test]
async fn foreign_commits_on_other_rows_are_no_conflict_and_are_seen_before_the_acknowledgement() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    state.set_node_state("r", "mine", NodeUpdate::running().row_count(1)).await.unwrap();
    backend.write_as_another("r", "theirs", NodeUpdate::running().row_count(7)).await;
    let commit = state.set_node_state("r", "mine", NodeUpdate::running().row_count(2)).await.unwrap();
    let run = state.snapshot("r").unwrap();
    assert_eq!(run.version(), commit.version());
    assert_eq!(run.node("theirs").unwrap().row_count, Some(7), "a snapshot never carries a number whose commits it lacks");
    assert_eq!(run.node("mine").unwrap().row_count, Some(2));
}

#[tokio::test]
async fn foreign_commits_on_the_same_row_are_merged_per_field() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    state.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    backend.write_as_another("r", "n", NodeUpdate::new().fingerprint("theirs")).await;
    state.set_node_state("r", "n", NodeUpdate::new().row_count(2)).await.unwrap();
    let node = state.get_node_state("r", "n").await.unwrap().unwrap();
    assert_eq!(node.row_count, Some(2));
    assert_eq!(node.fingerprint.unwrap().content_hash().as_deref(), Some("theirs"));
}

#[tokio::test]
async fn a_conflict_is_told_only_where_the_guard_no_longer_holds() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    backend.write_as_another("r", "n", NodeUpdate::success()).await;
    // By what this process knows the guard does not hold; by what is there it does.
    let mut tx = state.transaction();
    tx.expect_status("r", "n", [NodeStatus::Success]).set_node_state("r", "after", NodeUpdate::running());
    tx.commit().await.unwrap();
    // And the other way round.
    backend.write_as_another("r", "n", NodeUpdate::failed("theirs")).await;
    let mut tx = state.transaction();
    tx.expect_status("r", "n", [NodeStatus::Success]).set_node_state("r", "never", NodeUpdate::running());
    assert!(tx.commit().await.unwrap_err().is_conflict());
    assert!(state.get_node_state("r", "never").await.unwrap().is_none());
    // Over two runs likewise.
    state.create_run("s", NewRun::running()).await.unwrap();
    backend.write_as_another("r", "n", NodeUpdate::running()).await;
    let mut tx = state.transaction();
    tx.expect_status("r", "n", [NodeStatus::Running]).set_node_state("s", "n", NodeUpdate::running());
    tx.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_writers_and_lies_together_lose_nothing() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    let done = Arc::new(AtomicBool::new(false));
    let foreign = tokio::spawn({
        let (backend, done) = (Arc::clone(&backend), Arc::clone(&done));
        async move {
            for step in 1..=100_u64 {
                backend.write_as_another("r", "theirs", NodeUpdate::running().row_count(step)).await;
                if step % 10 == 0 && backend.lies.lock().unwrap().is_empty() {
                    backend.tell([Lie::AnswerLost, Lie::NeverArrived]);
                }
                // Side by side with the coordinator, not all before it.
                let seen = backend.commits.load(Ordering::SeqCst);
                while !done.load(Ordering::SeqCst) && backend.commits.load(Ordering::SeqCst) == seen {
                    tokio::task::yield_now().await;
                }
            }
        }
    });
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let state = state.clone();
            tokio::spawn(async move {
                let mut last = Version::NONE;
                for step in 1..=25_u64 {
                    let commit =
                        state.set_node_state("r", format!("n{task}"), NodeUpdate::running().row_count(step)).await.unwrap();
                    assert!(commit.version() > last);
                    last = commit.version();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    done.store(true, Ordering::SeqCst);
    foreign.await.unwrap();
    let run = backend.inner.load_run(&RunId::new("r").unwrap()).await.unwrap().unwrap();
    assert_eq!(run.version().0 - run.created_version().0, 8 * 25 + 100, "every commit once");
    assert_eq!(run.node("theirs").unwrap().row_count, Some(100));
    assert!((0..8).all(|task| run.node(&format!("n{task}")).unwrap().row_count == Some(25)));
}

#[tokio::test]
async fn close_answers_everybody_and_drop_closes_too() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.close_gate();
    let writes: Vec<_> = (0..20_u64)
        .map(|n| {
            let state = state.clone();
            tokio::spawn(async move { state.set_node_state("r", format!("n{n}"), NodeUpdate::running()).await })
        })
        .collect();
    backend.arrived(2).await;
    let closing = tokio::spawn({
        let state = state.clone();
        async move { state.close().await }
    });
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    backend.open_gate();
    closing.await.unwrap().unwrap();
    let mut applied = 0;
    for write in writes {
        match write.await.unwrap() {
            Ok(_) => applied += 1,
            Err(error) => assert!(matches!(error, Error::Closed), "{error}"),
        }
    }
    let run = backend.inner.load_run(&RunId::new("r").unwrap()).await.unwrap().unwrap();
    assert_eq!(run.node_count(), applied);

    let inner = MemoryBackend::new();
    let state = Coordinator::open(Arc::new(inner.clone())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let deferred = state.with_durability(Durability::Deferred);
    for n in 0..50_u64 {
        deferred.set_node_state("r", "n", NodeUpdate::running().row_count(n)).await.unwrap();
    }
    drop((state, deferred));
    let id = RunId::new("r").unwrap();
    while inner.load_run(&id).await.unwrap().unwrap().node("n").and_then(|node| node.row_count) != Some(49) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_full_coordinator_refuses_who_does_not_want_to_wait() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::builder().max_in_flight(1).open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    backend.close_gate();
    let first = tokio::spawn({
        let state = state.clone();
        async move { state.set_node_state("r", "a", NodeUpdate::running()).await }
    });
    backend.arrived(2).await;
    let refused = state.try_set_node_state("r", "b", NodeUpdate::running());
    let refused = tokio::time::timeout(Duration::from_secs(10), refused).await.expect("it does not wait");
    assert!(matches!(refused, Err(Error::Overloaded)), "{refused:?}");
    backend.open_gate();
    first.await.unwrap().unwrap();
    state.try_set_node_state("r", "b", NodeUpdate::running()).await.unwrap();
    let huge = NodeUpdate::running().metadata("blob", "x".repeat(17 << 20));
    let error = state.set_node_state("r", "b", huge).await.unwrap_err();
    assert!(error.to_string().contains("split it"), "{error}");
}

/// A million writes thrown at one run whose storage answers nothing: as many as may be on their way are kept, and written in the end; the others are
/// refused at once, and nothing of them stays.
#[tokio::test]
async fn a_flood_at_one_run_is_bounded() {
    const THROWN: usize = 1_000_000;
    const KEPT: usize = 500;
    let backend = LyingBackend::new(false);
    let state = Coordinator::builder().max_in_flight(KEPT).open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    backend.close_gate();
    let run = RunId::new("r").unwrap();
    let nodes: Vec<NodeId> = (0..KEPT).map(|number| NodeId::new(format!("n{number}")).unwrap()).collect();
    let (mut kept, mut refused) = (Vec::new(), 0);
    for number in 0..THROWN {
        let node = &nodes[number % KEPT];
        let mut write = Box::pin(state.try_set_node_state(&run, node, NodeUpdate::running().row_count(number as u64)));
        match std::future::poll_fn(|cx| std::task::Poll::Ready(write.as_mut().poll(cx))).await {
            std::task::Poll::Pending => kept.push(write),
            std::task::Poll::Ready(Err(Error::Overloaded)) => refused += 1,
            std::task::Poll::Ready(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((kept.len(), refused), (KEPT, THROWN - KEPT));
    assert!(state.stats().waiting <= KEPT as u64, "{:?}", state.stats());
    backend.open_gate();
    for write in kept {
        write.await.unwrap();
    }
    let stored = backend.inner.load_run(&run).await.unwrap().unwrap();
    let rows: Vec<u64> = stored.nodes().map(|(_, node)| node.row_count.unwrap()).collect();
    assert_eq!(rows.len(), KEPT);
    assert!(rows.iter().all(|row| *row < KEPT as u64), "what was refused came in by the back door");
    state.try_set_node_state(&run, "n0", NodeUpdate::success()).await.unwrap();
}

/// The runtime is dropped by a thread that unwinds, wherever the work under way is then: the embedder is told of his panic, and not of anything of ours.
#[test]
fn a_panic_that_takes_the_runtime_down_stays_a_panic() {
    for moment in 0..40 {
        let unwound = std::panic::catch_unwind(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
                state.create_run("r", NewRun::running()).await.unwrap();
                for writer in 0..10 {
                    let state = state.clone();
                    tokio::spawn(async move {
                        while state.set_node_state("r", format!("n{writer}"), NodeUpdate::running()).await.is_ok() {}
                    });
                }
                for _ in 0..moment {
                    tokio::task::yield_now().await;
                }
                std::panic::resume_unwind(Box::new("the embedder's own fault"));
            });
        });
        let payload = unwound.unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&"the embedder's own fault"));
    }
}

/// The next node of a run, done at once; or what else was told.
async fn next_done(state: &Coordinator) -> String {
    let filter = ClaimFilter::new().owner("w").wait(Duration::from_secs(20));
    match state.claim_next("r", filter).await.unwrap() {
        Next::Claimed(claim) => {
            let node = claim.node_id().to_string();
            claim.complete(NodeUpdate::new()).await.unwrap();
            node
        }
        other => format!("{other:?}"),
    }
}

/// Asks for work while a deferred write is on its way, so that who keeps an eye on the run has seen it.
async fn look_for_work(state: &Coordinator) {
    let filter = ClaimFilter::new().owner("w").wait(Duration::ZERO);
    assert!(!matches!(state.claim_next("r", filter).await.unwrap(), Next::Claimed(_)));
}

#[tokio::test]
async fn work_is_found_behind_a_deferred_write_that_was_lost() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    backend.close_gate();
    backend.tell([Lie::Full]);
    let deferred = state.with_durability(Durability::Deferred);
    deferred.set_node_state("r", "x", NodeUpdate::success()).await.unwrap();
    look_for_work(&state).await;
    backend.open_gate();
    state.flush().await.unwrap_err();
    // It takes the version that the lost one was seen under.
    state.set_node_state("r", "y", NodeUpdate::pending()).await.unwrap();
    assert_eq!(next_done(&state).await, "y");
}

#[tokio::test]
async fn work_is_found_behind_a_deferred_write_that_somebody_overtook() {
    for waits in [false, true] {
        let backend = LyingBackend::new(true);
        let state = open(&backend).await;
        state.set_node_state("r", "x", NodeUpdate::success()).await.unwrap();
        backend.close_gate();
        let deferred = state.with_durability(Durability::Deferred);
        for rows in 1..4 {
            deferred.set_node_state("r", "x", NodeUpdate::success().row_count(rows)).await.unwrap();
        }
        look_for_work(&state).await;
        // Another process writes the same row, and one that is work, under a version that a deferred write was seen under.
        let rows = [("x", NodeUpdate::success().row_count(9)), ("y", NodeUpdate::pending())];
        backend.write_all_as_another("r", &rows).await;
        let asking = waits.then(|| {
            let state = state.clone();
            tokio::spawn(async move { next_done(&state).await })
        });
        backend.open_gate();
        state.flush().await.unwrap();
        let found = match asking {
            Some(asking) => asking.await.unwrap(),
            None => next_done(&state).await,
        };
        assert!(found == "y", "waits: {waits}, found {found}");
    }
}

#[tokio::test]
async fn what_storage_cannot_take_fails_alone() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    for run in 0..20 {
        state.create_run(format!("r{run}"), NewRun::running()).await.unwrap();
    }
    *backend.unwritable.lock().unwrap() = Some(NodeId::new("huge").unwrap());
    let before = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let mut writes = tokio::task::JoinSet::new();
    for run in 0..20 {
        for node in ["huge", "n"].into_iter().skip(usize::from(run % 7 != 3)) {
            let state = state.clone();
            writes.spawn(async move { (run, node, state.set_node_state(format!("r{run}"), node, NodeUpdate::success()).await) });
        }
    }
    backend.arrived(before + 1).await;
    backend.open_gate();
    while let Some(write) = writes.join_next().await {
        match write.unwrap() {
            (run, "huge", told) => {
                let error = told.unwrap_err();
                let told = error.to_string();
                assert!(told.contains("huge is too large") && !error.is_unknown_outcome(), "r{run}: {told}");
            }
            (run, node, told) => {
                told.unwrap_or_else(|error| panic!("r{run}, {node}: {error}"));
                let run = state.get_run(format!("r{run}")).await.unwrap().unwrap();
                assert!(run.node("n").is_some() && run.node("huge").is_none());
            }
        }
    }
    state.close().await.unwrap();
}

#[tokio::test]
async fn where_everything_fails_nothing_is_sent_apart_for_long() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    *backend.unwritable.lock().unwrap() = Some(NodeId::new("huge").unwrap());
    let before = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let mut writes = tokio::task::JoinSet::new();
    for _ in 0..500 {
        let state = state.clone();
        writes.spawn(async move { state.set_node_state("r", "huge", NodeUpdate::success()).await });
    }
    backend.arrived(before + 1).await;
    backend.open_gate();
    while let Some(write) = writes.join_next().await {
        assert!(!write.unwrap().unwrap_err().is_unknown_outcome());
    }
    let flushes = backend.commits.load(Ordering::SeqCst) - before;
    assert!(flushes < 100, "{flushes} flushes for what all of them refuse");
    // And when the fault is over, one in many is told alone again.
    state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
}

#[tokio::test]
async fn a_node_that_goes_is_told_to_who_began_to_listen_meanwhile() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    for node in ["a", "b"] {
        state.set_node_state("r", node, NodeUpdate::running()).await.unwrap();
    }
    let before = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let going = tokio::spawn({
        let state = state.clone();
        async move { state.delete_node("r", "b").await }
    });
    backend.arrived(before + 1).await;
    let mut events = state.subscribe();
    look_for_work(&state).await;
    backend.open_gate();
    going.await.unwrap().unwrap();
    let Event::Changed(change) = events.next().await.unwrap() else { panic!("nothing was lost") };
    assert_eq!(change.nodes, [NodeId::new("b").unwrap()]);
    state.set_node_state("r", "a", NodeUpdate::success()).await.unwrap();
    assert_eq!(next_done(&state).await, "Drained { blocked: 0 }", "nobody waits for what is gone");
}
