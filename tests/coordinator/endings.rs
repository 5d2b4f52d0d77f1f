//! How claims and locks end, and what their holders are told, over a backend that lies.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use crate::support::{Lie, LyingBackend};
use seeknal_state::{
    Claim, ClaimFilter, Coordinator, Durability, Error, Event, FencingToken, LeaseError, LeaseKey, LockOptions, LostReason,
    NewRun, Next, NodeId, NodeState, NodeStatus, NodeUpdate, RunFilter, RunId, RunQuery, StateBackend, StoreError,
    StoreErrorKind, StreamError, Transaction, View,
};

const TTL: Duration = Duration::from_secs(30);

async fn with_node(state: &Coordinator) {
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::pending()).await.unwrap();
}

async fn claim(state: &Coordinator) -> Claim {
    state.claim_node("r", "n", "w", TTL).await.unwrap().unwrap()
}

async fn node(state: &Coordinator) -> NodeState {
    state.get_node_state("r", "n").await.unwrap().unwrap()
}

#[tokio::test]
async fn lost_writes_of_others_throw_no_finished_work_away() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    backend.tell([Lie::Full]);
    state.with_durability(Durability::Deferred).set_node_state("r", "other", NodeUpdate::running()).await.unwrap();
    while state.health().lost.is_empty() {
        tokio::task::yield_now().await;
    }
    claim.complete(NodeUpdate::success().row_count(7)).await.unwrap();
    assert_eq!((node(&state).await.status, node(&state).await.attempt), (NodeStatus::Success, 1));
    assert!(matches!(state.flush().await, Err(Error::DeferredLost(loss)) if loss.lost == 1), "it stays to be told");
    state.close().await.unwrap();
}

#[tokio::test]
async fn an_end_that_makes_no_sense_leaves_the_claim_with_its_worker() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::builder().max_transaction_bytes(4096).open(backend as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    for wrong in [NodeUpdate::running(), NodeUpdate::failed("x".repeat(8192))] {
        let error = claim.complete(wrong).await.unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error}");
        assert!(!claim.is_lost() && claim.lease().is_some());
        assert_eq!(node(&state).await.status, NodeStatus::Running, "nobody else gets it");
    }
    claim.complete(NodeUpdate::success()).await.unwrap();
    assert!(claim.is_lost() && claim.lease().is_none());
    let again = claim.complete(NodeUpdate::success()).await.unwrap_err();
    assert!(again.is_lease_lost(), "{again}");
    drop(claim);
    assert_eq!((node(&state).await.status, node(&state).await.attempt), (NodeStatus::Success, 1));
    assert_eq!(state.list_locks().await.unwrap(), []);
    state.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_end_that_storage_does_not_take_can_be_told_again() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    backend.tell([Lie::Full; 10]);
    let error = claim.complete(NodeUpdate::success()).await.unwrap_err();
    assert!(matches!(error, Error::Store(_)), "{error}");
    assert_eq!(node(&state).await.status, NodeStatus::Running);
    claim.complete(NodeUpdate::success()).await.unwrap();
    assert_eq!(node(&state).await.status, NodeStatus::Success);
    state.close().await.unwrap();
}

#[tokio::test]
async fn what_goes_wrong_with_a_lock_is_told_by_the_variant_that_says_it() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    let key = || LeaseKey::run(RunId::new("r").unwrap());
    let nonsense = state.acquire(key(), LockOptions::new().ttl(Duration::ZERO), Duration::ZERO).await.unwrap_err();
    assert!(matches!(nonsense, Error::Input(_)), "{nonsense}");
    let lost = LeaseError::Lost { key: key(), token: FencingToken(1), reason: LostReason::Expired };
    assert!(lost.is_lease_lost() && !lost.is_conflict() && !lost.is_not_found());
    assert!(LeaseError::NotFound { token: FencingToken(1) }.is_not_found());
    let lost = Error::from(lost);
    assert!(lost.is_lease_lost() && !lost.is_conflict(), "{lost}");
    let missing = StoreError::not_applied(StoreErrorKind::NotFound, "the file is not there");
    assert_eq!(missing.kind().to_string(), "not found");
    assert!(LeaseError::from(missing.clone()).is_not_found());
    let missing = Error::from(LeaseError::from(missing));
    assert!(matches!(missing, Error::Store(_)) && missing.is_not_found(), "{missing}");
    let closed = Error::from(LeaseError::Closed);
    assert!(matches!(closed, Error::Closed), "{closed}");
    state.close().await.unwrap();
}

/// As whoever embeds it writes it, with the names at the crate's root.
#[tokio::test]
async fn a_conflict_is_matched_and_a_closure_s_error_passed_on() {
    let state = Coordinator::open(LyingBackend::new(false) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", seeknal_state::NewRun::running()).await.unwrap();
    let mut tx = state.transaction();
    tx.expect_status("r", "n", []);
    let never = tx.commit().await.unwrap_err().to_string();
    assert_eq!(never, "conflict on run \"r\": expected node \"n\" in no status at all, but node \"n\" is not there");
    let mut tx = state.transaction();
    tx.expect_version("r", seeknal_state::Version(7)).set_node_state("r", "n", seeknal_state::NodeUpdate::running());
    let refused = tx.commit().await;
    assert!(
        matches!(refused, Err(Error::Conflict(seeknal_state::Refusal::Guard { guard: seeknal_state::Guard::RunVersion(_), .. }))),
        "{refused:?}"
    );
    let boxed: Box<dyn std::error::Error> = seeknal_state::TransactError::from(Error::Closed).into();
    assert_eq!(boxed.to_string(), Error::Closed.to_string());
    state.close().await.unwrap();
}

#[tokio::test]
async fn every_lock_lasts_as_long_as_the_coordinator_was_told() {
    let set = Duration::from_secs(300);
    let state = Coordinator::builder().lease_ttl(set).open(LyingBackend::new(false) as Arc<dyn StateBackend>).await.unwrap();
    let key = |run: &str| LeaseKey::run(RunId::new(run).unwrap());
    let named = state.acquire(key("a"), LockOptions::new().owner("w"), Duration::ZERO).await.unwrap().unwrap();
    let plain = state.acquire_lock("b", Duration::ZERO).await.unwrap().unwrap();
    let own = state.acquire(key("c"), LockOptions::new().ttl(TTL), Duration::ZERO).await.unwrap().unwrap();
    let listed: Vec<u64> = state.list_locks().await.unwrap().iter().map(|lease| lease.ttl_ms).collect();
    assert_eq!(listed, [300_000, 300_000, 30_000]);
    drop((named, plain, own));
    state.close().await.unwrap();
}

#[tokio::test]
async fn a_ttl_that_no_lock_can_have_opens_nothing() {
    for wrong in [Duration::ZERO, Duration::from_millis(99), Duration::from_secs(3_601)] {
        let open = Coordinator::builder().lease_ttl(wrong).open(LyingBackend::new(false) as Arc<dyn StateBackend>).await;
        let Err(Error::Input(why)) = open else { panic!("{wrong:?}: {open:?}") };
        let why = why.to_string();
        assert!(why.contains("lease_ttl") && why.contains("100 ms") && why.contains("1 h"), "{why}");
    }
}

/// What is locked need not be there yet: whoever is to make it can be alone with it.
#[tokio::test]
async fn a_run_that_is_not_there_can_be_locked() {
    let state = Coordinator::open(LyingBackend::new(false) as Arc<dyn StateBackend>).await.unwrap();
    let lease = state.acquire_lock("r", Duration::ZERO).await.unwrap().unwrap();
    state.with_lease(&lease).create_run("r", seeknal_state::NewRun::running()).await.unwrap();
    assert!(state.acquire_lock("r", Duration::ZERO).await.unwrap().is_none(), "the run that came is locked");
    state.close().await.unwrap();
}

#[tokio::test]
async fn what_is_told_can_be_written_down_and_exported() {
    let state = Coordinator::open(LyingBackend::new(false) as Arc<dyn StateBackend>).await.unwrap();
    let mut changes = state.subscribe();
    with_node(&state).await;
    let (own, commit) =
        state.transact(|view, _| Ok(if view.run("r")?.is_some() { Err("not today") } else { Ok(()) })).await.unwrap();
    assert!(own.is_err() && commit.runs.is_empty());
    let commit = state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    assert_eq!(serde_json::to_value(&commit).unwrap()["runs"][0]["run"], "r");
    let event = changes.next().await.unwrap();
    assert_eq!(serde_json::to_value(&event).unwrap()["changed"]["snapshot"]["durable_version"], 1);
    // The run, its node, and the node's end.
    for _ in 0..2 {
        let event = loop {
            match changes.try_next().unwrap() {
                Some(event) => break event,
                None => tokio::task::yield_now().await,
            }
        };
        assert!(matches!(event, Event::Changed(_)), "nothing was lost: {event:?}");
    }
    assert!(changes.try_next().unwrap().is_none());
    let page = state.list_runs(&RunQuery::new(RunFilter::all())).await.unwrap();
    assert_eq!(serde_json::to_value(&page).unwrap()["runs"][0]["run_id"], "r");
    assert_eq!(serde_json::to_value(state.health()).unwrap()["open"], true);
    let entries = state.stats().batch_entries;
    assert_eq!(entries.buckets().map(|(_, count)| count).sum::<u64>(), entries.count());
    assert_eq!(entries.buckets().find(|(_, count)| *count > 0), Some((2, entries.count())), "each alone in its batch: below two");
    assert_eq!(entries.sum(), entries.count());
    state.close().await.unwrap();
    assert_eq!(changes.try_next().unwrap_err(), StreamError::Closed);
}

#[tokio::test]
async fn what_is_taken_out_of_a_transaction_again_is_not_decided() {
    let state = Coordinator::open(LyingBackend::new(false) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let before = state.get_run("r").await.unwrap();
    // Steps, a condition that does not hold, a name that is none.
    let late = |view: &View, tx: &mut Transaction| {
        let node = view.run("r")?.and_then(|run| run.node("n")).is_some();
        tx.expect_absent("r", "n").set_node_state("r", "n", NodeUpdate::success()).delete_node("r", "\n");
        tx.clear();
        Ok(if node { Err("not today") } else { Ok(()) })
    };
    let (own, commit) = state.transact(late).await.unwrap();
    assert!(own == Err("not today") && commit.runs.is_empty());
    assert_eq!(state.get_run("r").await.unwrap(), before);
    let mut tx = state.transaction();
    tx.delete_node("r", "\n").clear().set_node_state("r", "n", NodeUpdate::success());
    assert_eq!(tx.commit().await.unwrap().runs.len(), 1);
    state.close().await.unwrap();
}

#[tokio::test]
async fn who_asks_for_work_in_a_loop_leaves_room_for_those_who_do_it() {
    let state = Coordinator::open(LyingBackend::new(false) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    let claim = claim(&state).await;
    // Looks at the leases now, and not again for a while.
    assert!(matches!(state.claim_next("r", ClaimFilter::new()).await.unwrap(), Next::NothingReady));
    let working = tokio::spawn(async move { claim.complete(NodeUpdate::success()).await.map(drop) });
    let mut asked = 0;
    while matches!(state.claim_next("r", ClaimFilter::new()).await.unwrap(), Next::NothingReady) {
        asked += 1;
        assert!(asked < 10_000, "the work is never done");
    }
    working.await.unwrap().unwrap();
    state.close().await.unwrap();
}

/// Runs are spread over the lines by chance: enough of them, so that some are on others than the one that failed.
#[tokio::test(start_paused = true)]
async fn what_one_line_wrote_disproves_the_fault_of_another() {
    let backend = LyingBackend::new(false);
    backend.lines.store(4, std::sync::atomic::Ordering::SeqCst);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    let run = |number: u32| format!("r{number}");
    for number in 0..32 {
        state.create_run(run(number), NewRun::running()).await.unwrap();
    }
    for number in 0..31 {
        backend.tell([Lie::Full]);
        state.set_node_state(run(number), "n", NodeUpdate::running()).await.unwrap_err();
        assert!(state.health().storage.is_some_and(|why| why.contains("no space left")));
        state.set_node_state(run(number + 1), "n", NodeUpdate::running()).await.unwrap();
        assert!(state.health().is_sound(), "there is space again");
    }
    // Not so what nobody knows: as long as something is ready to go on, its pause is not over.
    backend.tell([Lie::NeverArrived]);
    let write = |number: u32| {
        let state = state.clone();
        async move { state.set_node_state(run(number), "n", NodeUpdate::success()).await.map(drop) }
    };
    let unknown = tokio::spawn(write(0));
    while state.health().storage.is_none() {
        tokio::task::yield_now().await;
    }
    let mut others: tokio::task::JoinSet<_> = (1..32).map(write).collect();
    let first = loop {
        if let Some(first) = others.try_join_next() {
            break first;
        }
        tokio::task::yield_now().await;
    };
    first.unwrap().unwrap();
    assert!(!unknown.is_finished() && state.health().storage.is_some_and(|why| why.contains("no answer")));
    unknown.await.unwrap().unwrap();
    others.join_all().await.into_iter().for_each(|written| written.unwrap());
    assert!(state.health().is_sound());
    state.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn health_tells_that_storage_takes_no_writes() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    with_node(&state).await;
    assert!(state.health().is_sound() && state.health().storage.is_none());
    backend.tell([Lie::Full]);
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap_err();
    let health = state.health();
    assert!(!health.is_sound() && health.storage.is_some_and(|why| why.contains("no space left")));
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    assert!(state.health().is_sound(), "there is space again");
    // Nobody knows what became of a write, until it is known.
    backend.tell([Lie::NeverArrived]);
    let writing = {
        let state = state.clone();
        tokio::spawn(async move { state.set_node_state("r", "n", NodeUpdate::success()).await.map(drop) })
    };
    while state.health().storage.is_none() {
        tokio::task::yield_now().await;
    }
    assert!(!state.health().is_sound());
    writing.await.unwrap().unwrap();
    assert!(state.health().is_sound());
    // What is wrong with one write is not wrong with storage.
    *backend.unwritable.lock().unwrap() = Some(NodeId::new("huge").unwrap());
    state.set_node_state("r", "huge", NodeUpdate::running()).await.unwrap_err();
    assert!(state.health().is_sound());
    state.close().await.unwrap();
    assert!(!state.health().is_sound());
}
