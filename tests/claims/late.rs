//! Claims that come too late, at the end of a coordinator, or on a run that is not what it was.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::stalls::unless_it_stalls;
use crate::support::{LyingBackend, Store};
use rusqlite::Connection;
use seeknal_state::{
    ClaimFilter, Coordinator, Error, LostReason, MemoryBackend, NewRun, Next, NodeStatus, NodeUpdate, OnDelete, RunStatus,
    RunUpdate, StateBackend,
};

const TTL: Duration = Duration::from_millis(500);

fn file(store: &Store) -> PathBuf {
    store.folder.path().join("state.db")
}

/// Nobody else commits as long as it lives.
fn hold_up(store: &Store) -> Connection {
    let conn = Connection::open(file(store)).unwrap();
    conn.busy_timeout(Duration::from_secs(5)).unwrap();
    conn.execute_batch("BEGIN IMMEDIATE").unwrap();
    conn
}

async fn pending(state: &Coordinator, node: &str) {
    state.set_node_state("r", node, NodeUpdate::pending().max_attempts(3)).await.unwrap();
}

async fn assert_untouched(state: &Coordinator, what: &str) {
    let run = state.fresh("r").await.unwrap().unwrap();
    let node = run.node("n").unwrap();
    assert_eq!((&node.status, node.attempt, node.attempts.len()), (&NodeStatus::Pending, 1, 0), "{what}: {node:?}");
    assert_eq!(state.list_locks().await.unwrap(), [], "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_is_known_too_late_costs_no_attempt() {
    let folder = tempfile::tempdir().unwrap();
    for next in [false, true] {
        unless_it_stalls(folder.path(), TTL, async |ttl| known_too_late(next, ttl).await).await;
    }
}

async fn known_too_late(next: bool, ttl: Duration) -> Result<(), String> {
    let store = Store::of("database");
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    pending(&state, "n").await;
    let free = state.stats().permits_available;
    let held = hold_up(&store);
    let claim = tokio::spawn({
        let state = state.clone();
        async move {
            if next {
                let filter = ClaimFilter::new().ttl(ttl).wait(Duration::from_secs(20));
                // It is free again, and claimed in time by the next try.
                return state.claim_next("r", filter).await.unwrap().claimed();
            }
            state.claim_node("r", "n", "worker", ttl).await.unwrap()
        }
    });
    // Or it has ended, and says below how.
    while state.stats().permits_available == free && !claim.is_finished() {
        tokio::task::yield_now().await;
    }
    // Longer than the lease would last.
    tokio::time::sleep(ttl + 2 * TTL).await;
    drop(held);
    let claim = claim.await.unwrap();
    if next && claim.is_none() {
        return Err("no try was in time".to_owned());
    }
    assert_eq!(claim.is_some(), next);
    if let Some(claim) = claim {
        assert_eq!(claim.attempt(), 1);
        match claim.release().await {
            Err(error) if error.is_lease_lost() => return Err(error.to_string()),
            released => drop(released.unwrap()),
        }
    }
    while !state.list_locks().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_untouched(&state, "too late").await;
    state.close().await.unwrap();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_nobody_waits_for_any_more_is_given_back_before_the_end() {
    let store = Store::of("database");
    for _ in 0..10 {
        let state = store.open().await;
        if state.get_run("r").await.unwrap().is_none() {
            state.create_run("r", NewRun::running()).await.unwrap();
            pending(&state, "n").await;
        }
        let free = state.stats().permits_available;
        let held = hold_up(&store);
        let claim = tokio::spawn({
            let state = state.clone();
            async move { state.claim_next("r", ClaimFilter::new()).await.map(|next| next.claimed().is_some()) }
        });
        while state.stats().permits_available == free {
            tokio::task::yield_now().await;
        }
        claim.abort();
        let closing = tokio::spawn({
            let state = state.clone();
            async move { state.close().await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(held);
        closing.await.unwrap().unwrap();
        let state = store.open().await;
        assert_untouched(&state, "given back").await;
        state.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_is_dropped_just_before_the_end_is_given_back() {
    for round in 0..200 {
        let backend = MemoryBackend::new();
        let state = Coordinator::open(Arc::new(backend.clone())).await.unwrap();
        let ended = tokio::spawn(async move {
            state.create_run("r", NewRun::running()).await.unwrap();
            pending(&state, "n").await;
            let claim = state.claim_node("r", "n", "worker", TTL).await.unwrap().unwrap();
            drop(claim);
            state.close().await.unwrap();
        });
        ended.await.unwrap();
        let state = Coordinator::open(Arc::new(backend)).await.unwrap();
        assert_untouched(&state, &format!("round {round}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_others_began_or_opened_again_is_worked_on() {
    let store = Store::of("database");
    let (one, two) = (store.open().await, store.open().await);
    for round in 0..20 {
        let run = format!("r{round}");
        one.create_run(&run, NewRun::pending()).await.unwrap();
        for node in ["a", "b"] {
            one.set_node_state(&run, node, NodeUpdate::pending()).await.unwrap();
        }
        two.fresh(&run).await.unwrap();
        one.update_run(&run, RunUpdate::running()).await.unwrap();
        let claim = two.claim_node(&run, "a", "worker", Duration::from_secs(30)).await.unwrap().unwrap();
        claim.complete(NodeUpdate::success()).await.unwrap();
        one.update_run(&run, RunUpdate::failed()).await.unwrap();
        two.fresh(&run).await.unwrap();
        one.update_run(&run, RunUpdate::running()).await.unwrap();
        let Next::Claimed(claim) = two.claim_next(&run, ClaimFilter::new()).await.unwrap() else {
            panic!("round {round}: it is open again")
        };
        claim.complete(NodeUpdate::success()).await.unwrap();
    }
    two.close().await.unwrap();
    one.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_run_that_has_ended_nothing_is_freed() {
    let store = Store::of("database");
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    pending(&state, "n").await;
    let claim = state.claim_node("r", "n", "worker", Duration::from_secs(30)).await.unwrap().unwrap();
    state.update_run("r", RunUpdate::cancelled()).await.unwrap();
    assert!(state.free_dead_claims("r").await.unwrap().is_empty());
    drop(claim);
    state.close().await.unwrap();
}

#[tokio::test]
async fn workers_of_a_run_that_is_empty_or_has_ended_are_told_to_stop() {
    const LONG: Duration = Duration::from_secs(3_600);
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::pending()).await.unwrap();
    let next = state.claim_next("r", ClaimFilter::new().wait(LONG)).await.unwrap();
    assert!(matches!(next, Next::Drained { blocked: 0 }), "nobody has written a node: {next:?}");
    for node in ["n", "m"] {
        pending(&state, node).await;
    }
    let claim = state.claim_next("r", ClaimFilter::new()).await.unwrap().claimed().unwrap();
    assert_eq!(state.get_run("r").await.unwrap().unwrap().header().status, RunStatus::Pending, "as its orchestrator left it");
    state.update_run("r", RunUpdate::cancelled()).await.unwrap();
    let next = state.claim_next("r", ClaimFilter::new().wait(LONG)).await.unwrap();
    assert!(matches!(next, Next::Drained { blocked: 1 }), "one is ready, one runs: {next:?}");
    drop(claim);
    state.close().await.unwrap();
}

/// Whoever ended it: the worker is told what became of its claim, and that nothing was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_claim_is_over_is_told_why() {
    const LONG: Duration = Duration::from_secs(30);
    let memory = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    let store = Store::of("database");
    let (one, two) = (store.open().await, store.open().await);
    for (state, other) in [(&memory, &memory), (&one, &two)] {
        for (run, why) in
            [("ended", "cancelled"), ("deleted", "deleted"), ("forced", "taken away"), ("told", "has ended already")]
        {
            state.create_run(run, NewRun::running()).await.unwrap();
            state.set_node_state(run, "n", NodeUpdate::pending()).await.unwrap();
            let claim = state.claim_node(run, "n", "worker", LONG).await.unwrap().unwrap();
            match run {
                "ended" => drop(other.update_run(run, RunUpdate::cancelled()).await.unwrap()),
                "deleted" => drop(other.delete_run(run, OnDelete::DropCoverage).await.unwrap()),
                "forced" => drop(other.force_unlock(claim.token()).await.unwrap()),
                _ => drop(claim.complete(NodeUpdate::success()).await.unwrap()),
            }
            // Refused by storage, and by what is known by then.
            for _ in 0..2 {
                let refused = claim.complete(NodeUpdate::failed("late")).await.unwrap_err();
                let told = refused.to_string();
                assert!(matches!(refused, Error::LeaseLost(_)), "{run}: {refused:?}");
                assert!(told.contains(why) && told.ends_with("; nothing was written"), "{run}: {told}");
            }
            let reason = claim.lost().await.to_string();
            assert!(!reason.contains("closed"), "{run}: {reason}");
        }
    }
    for state in [memory, one, two] {
        state.close().await.unwrap();
    }
}

/// Callers that go away at every instant: a run that is taken over has no locks of the dead left, and one that is not can still be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_is_taken_over_with_its_locks_or_not_at_all() {
    for polls in 0..12_u32 {
        let store = Store::of("database");
        let dead = store.open().await;
        dead.create_run("r", NewRun::running()).await.unwrap();
        let lock = dead.acquire_node_lock("r", "n", Duration::ZERO).await.unwrap().unwrap();
        let token = lock.token();
        let conn = Connection::open(file(&store)).unwrap();
        conn.busy_timeout(Duration::from_secs(5)).unwrap();
        conn.execute_batch("CREATE TEMP TABLE kept AS SELECT * FROM locks").unwrap();
        dead.close().await.unwrap();
        // As it would be had it died in the middle.
        conn.execute_batch("INSERT INTO locks SELECT * FROM kept").unwrap();
        let state = store.open().await;
        assert_eq!(state.list_locks().await.unwrap().first().map(|lease| lease.token), Some(token));
        {
            let resuming = state.resume_run("r");
            tokio::pin!(resuming);
            let mut left = polls;
            let going_away = std::future::poll_fn(|cx| {
                let polled = resuming.as_mut().poll(cx);
                if polled.is_ready() || left == 0 {
                    return std::task::Poll::Ready(());
                }
                left -= 1;
                std::task::Poll::Pending
            });
            going_away.await;
        }
        // What was sent is on its way, whoever waits for it.
        let resumed = loop {
            match state.resume_run("r").await {
                Err(error) if error.is_conflict() => tokio::task::yield_now().await,
                resumed => break resumed.unwrap(),
            }
        };
        assert_eq!(resumed.header().worker, state.backend().process());
        assert_eq!(state.list_locks().await.unwrap(), [], "after {polls} polls");
        state.close().await.unwrap();
    }
}

#[tokio::test]
async fn an_end_is_one_of_the_attempt_that_was_claimed() {
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::pending().max_attempts(3)).await.unwrap();
    let claim = state.claim_node("r", "n", "w", Duration::from_secs(30)).await.unwrap().unwrap();
    let another = claim.complete(NodeUpdate::success().attempt(7)).await.unwrap_err();
    assert!(matches!(another, Error::Input(_)) && another.to_string().contains("retry()"), "{another}");
    claim.complete(NodeUpdate::success().attempt(claim.attempt())).await.unwrap();
    let node = state.get_node_state("r", "n").await.unwrap().unwrap();
    assert_eq!((node.status, node.attempt), (NodeStatus::Success, 1));
    state.close().await.unwrap();
}

async fn until_told<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let all = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), all).await.is_ok(), "never: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_the_loss_of_a_claim_is_told_of_its_end() {
    for backend in ["memory", "database"] {
        let store = Store::of("database");
        let state = if backend == "memory" {
            Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap()
        } else {
            store.open().await
        };
        state.create_run("r", NewRun::running()).await.unwrap();
        pending(&state, "n").await;
        let claim = state.claim_node("r", "n", "worker", Duration::from_secs(3_600)).await.unwrap().unwrap();
        let watched = async { tokio::join!(claim.lost(), claim.complete(NodeUpdate::success())) };
        let (reason, told) = tokio::time::timeout(Duration::from_secs(20), watched).await.unwrap();
        told.unwrap();
        assert_eq!(reason, LostReason::Ended, "{backend}");
        state.close().await.unwrap();
    }
}

/// The claim lives on while nobody waits for its end any more, and learns what that became.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_nobody_waited_for_ends_its_claim() {
    const LONG: Duration = Duration::from_secs(3_600);
    let (lying, store) = (LyingBackend::new(false), Store::of("database"));
    for memory in [true, false] {
        let state = if memory {
            Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap()
        } else {
            store.open().await
        };
        state.create_run("r", NewRun::running()).await.unwrap();
        pending(&state, "n").await;
        let claim = state.claim_node("r", "n", "worker", LONG).await.unwrap().unwrap();
        let free = state.stats().permits_available;
        let held = (!memory).then(|| hold_up(&store));
        lying.close_gate();
        {
            let mut end = std::pin::pin!(claim.complete(NodeUpdate::success()));
            tokio::select! {
                biased;
                told = &mut end => panic!("it is held up: {told:?}"),
                () = until_told("it is sent", || async { state.stats().permits_available < free }) => {}
            }
        }
        assert!(!claim.is_lost());
        lying.open_gate();
        drop(held);
        let reason = tokio::time::timeout(Duration::from_secs(20), claim.lost()).await.unwrap();
        assert_eq!((reason, claim.is_lost()), (LostReason::Ended, true), "memory: {memory}");
        until_told("its lock is free", || async { state.list_locks().await.unwrap().is_empty() }).await;
        let node = state.get_node_state("r", "n").await.unwrap().unwrap();
        assert_eq!(node.status, NodeStatus::Success);
        drop(claim);
        state.close().await.unwrap();
    }
}

/// What was told wins over the drop of its claim, which comes right behind it and on one thread is begun first.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_end_that_was_told_is_not_overtaken_by_the_drop_of_its_claim() {
    let backend = MemoryBackend::new();
    let state = Coordinator::open(Arc::new(backend.clone())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let ends = ["complete", "fail", "retry"];
    for end in ends {
        state.set_node_state("r", end, NodeUpdate::pending()).await.unwrap();
        let state = state.clone();
        let told = async move {
            let claim = state.claim_node("r", end, "worker", Duration::from_secs(30)).await.unwrap().unwrap();
            let telling = async {
                match end {
                    "complete" => claim.complete(NodeUpdate::success()).await,
                    "fail" => claim.fail("broken").await,
                    _ => claim.retry("flaky").await,
                }
            };
            let mut telling = Box::pin(telling);
            tokio::select! {
                biased;
                told = &mut telling => panic!("too early: {told:?}"),
                () = std::future::ready(()) => {}
            }
            drop(telling);
            drop(claim);
        };
        tokio::spawn(told).await.unwrap();
    }
    state.close().await.unwrap();
    let state = Coordinator::open(Arc::new(backend)).await.unwrap();
    for (end, status) in ends.into_iter().zip([NodeStatus::Success, NodeStatus::Failed, NodeStatus::Pending]) {
        let node = state.get_node_state("r", end).await.unwrap().unwrap();
        assert_eq!((&node.status, node.attempts.len()), (&status, usize::from(end == "retry")), "{end}");
    }
    assert_eq!(state.list_locks().await.unwrap(), []);
    state.close().await.unwrap();
}

/// The lease that was to come with the claim went with the end of the run, and then the claim was committed.
#[tokio::test]
async fn a_claim_across_the_end_of_a_run_that_is_opened_again_costs_no_attempt() {
    const LONG: Duration = Duration::from_secs(3_600);
    for next in [false, true] {
        let lying = LyingBackend::new(false);
        let state = Coordinator::open(Arc::clone(&lying) as Arc<dyn StateBackend>).await.unwrap();
        state.create_run("r", NewRun::running()).await.unwrap();
        pending(&state, "n").await;
        lying.close_gate();
        let sent = lying.commits.load(std::sync::atomic::Ordering::SeqCst);
        let mut tx = state.transaction();
        tx.update_run("r", RunUpdate::failed()).update_run("r", RunUpdate::running());
        let reopening = tokio::spawn(tx.commit());
        lying.arrived(sent + 1).await;
        let free = state.stats().permits_available;
        let claiming = tokio::spawn({
            let state = state.clone();
            async move {
                if next {
                    let filter = ClaimFilter::new().ttl(LONG).wait(Duration::from_secs(20));
                    return state.claim_next("r", filter).await.unwrap().claimed();
                }
                state.claim_node("r", "n", "worker", LONG).await.unwrap()
            }
        });
        until_told("the claim is on its way", || async { state.stats().permits_available < free }).await;
        lying.open_gate();
        reopening.await.unwrap().unwrap();
        let claim = tokio::time::timeout(Duration::from_secs(20), claiming).await.unwrap().unwrap().unwrap();
        assert_eq!(claim.attempt(), 1, "next: {next}");
        claim.release().await.unwrap();
        assert_untouched(&state, "opened again").await;
        state.close().await.unwrap();
    }
}
