//! Claims: exactly one of many, in the order of the graph, over drops, expiry, late writers and blocked runtimes.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::stalls::unless_it_stalls;
use crate::support::Store;
use seeknal_state::{
    Claim, ClaimFilter, Coordinator, Error, LostReason, NewRun, Next, NodeState, NodeStatus, NodeUpdate, RunUpdate,
};
use tokio::task::JoinSet;

const RUN: &str = "run_1";
const TTL: Duration = Duration::from_secs(30);
/// Looked after twice a second, and not over before a busy machine comes to it.
const SHORT: Duration = Duration::from_secs(2);

fn worker(name: impl AsRef<str>) -> ClaimFilter {
    ClaimFilter::new().owner(name)
}

async fn begin(state: &Coordinator, nodes: &[(&str, &[&str])]) {
    state.create_run(RUN, NewRun::running()).await.unwrap();
    let mut tx = state.transaction();
    for (node, needs) in nodes {
        tx.set_node_state(RUN, *node, NodeUpdate::pending().depends_on(needs.iter().copied()));
    }
    tx.commit().await.unwrap();
}

async fn node(state: &Coordinator, name: &str) -> NodeState {
    state.get_node_state(RUN, name).await.unwrap().unwrap()
}

async fn claim(state: &Coordinator, name: &str) -> Claim {
    state.claim_node(RUN, name, "w", TTL).await.unwrap().unwrap()
}

/// Waits for something that happens in the background.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn exactly_one_of_many_claims_a_node(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[])]).await;
    let mut tasks = JoinSet::new();
    for index in 0..40 {
        let state = state.clone();
        tasks.spawn(async move { state.claim_node(RUN, "n", format!("w{index}"), TTL).await.unwrap() });
    }
    let claims: Vec<Claim> = tasks.join_all().await.into_iter().flatten().collect();
    assert_eq!(claims.len(), 1);
    let claim = claims.into_iter().next().unwrap();
    let seen = node(&state, "n").await;
    assert_eq!((seen.status.clone(), seen.attempt), (NodeStatus::Running, 1));
    let locks = state.list_locks().await.unwrap();
    assert_eq!((locks.len(), locks[0].token), (1, claim.token()));
    assert_eq!(seen.worker.as_deref(), Some(&*locks[0].owner.name));
    let token = claim.token();
    claim.complete(NodeUpdate::success().row_count(7)).await.unwrap();
    let done = node(&state, "n").await;
    assert_eq!((done.status, done.row_count, done.token), (NodeStatus::Success, Some(7), Some(token)));
    assert!(state.list_locks().await.unwrap().is_empty(), "the lease went with the same commit");
    assert!(state.claim_node(RUN, "n", "w", TTL).await.unwrap().is_none(), "what is done is not claimed");
    state.close().await.unwrap();
}

async fn a_graph_is_drained_in_its_order(store: Store) {
    let state = Coordinator::builder().open(store.backend()).await.unwrap();
    state.create_run(RUN, NewRun::running()).await.unwrap();
    let mut tx = state.transaction();
    let mut needs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for index in 0..120_usize {
        let of: Vec<String> =
            [index / 2, index / 3].iter().filter(|other| **other < index).map(|other| format!("n{other}")).collect();
        tx.set_node_state(RUN, format!("n{index}"), NodeUpdate::pending().depends_on(&of));
        needs.insert(format!("n{index}"), of);
    }
    tx.commit().await.unwrap();
    let done: Arc<Mutex<Vec<String>>> = Arc::default();
    let mut tasks = JoinSet::new();
    for index in 0..16 {
        let (state, done) = (state.clone(), Arc::clone(&done));
        tasks.spawn(async move {
            let filter = worker(format!("w{index}")).wait(Duration::from_secs(30));
            loop {
                match state.claim_next(RUN, filter.clone()).await.unwrap() {
                    Next::Claimed(claim) => {
                        done.lock().unwrap().push(claim.node_id().to_string());
                        tokio::task::yield_now().await;
                        claim.complete(NodeUpdate::success()).await.unwrap();
                    }
                    Next::Drained { blocked } => return blocked,
                    Next::NothingReady => panic!("somebody works, and will wake who waits"),
                    _ => unreachable!(),
                }
            }
        });
    }
    assert!(tasks.join_all().await.into_iter().all(|blocked| blocked == 0));
    let order = done.lock().unwrap().clone();
    assert_eq!(order.len(), 120, "every node once");
    let mut before = BTreeSet::new();
    for node in order {
        assert!(needs[&node].iter().all(|needed| before.contains(needed)), "{node} came too early");
        assert!(before.insert(node));
    }
    state.close().await.unwrap();
}

async fn what_can_never_be_ready_is_told(store: Store) {
    let state = store.open().await;
    begin(&state, &[("a", &[]), ("b", &["a"]), ("c", &["not there"])]).await;
    let claim = state.claim_next(RUN, worker("w")).await.unwrap().claimed().unwrap();
    assert_eq!(claim.node_id().as_str(), "a");
    assert!(matches!(state.claim_next(RUN, worker("v")).await.unwrap(), Next::NothingReady));
    claim.fail("no such table").await.unwrap();
    assert!(matches!(state.claim_next(RUN, worker("w")).await.unwrap(), Next::Drained { blocked: 2 }));
    // As this call allows: what failed is done too.
    let lenient = worker("w").done([NodeStatus::Failed]);
    let claim = state.claim_next(RUN, lenient).await.unwrap().claimed().unwrap();
    assert_eq!(claim.node_id().as_str(), "b");
    claim.complete(NodeUpdate::cached()).await.unwrap();
    assert_eq!(node(&state, "b").await.status, NodeStatus::Cached);
    let wrong = state.claim_next(RUN, worker("w").done([NodeStatus::Running])).await;
    assert!(matches!(wrong, Err(Error::Input(_))), "{wrong:?}");
    state.update_run(RUN, RunUpdate::failed()).await.unwrap();
    assert!(matches!(state.claim_next(RUN, worker("w")).await.unwrap(), Next::Drained { blocked: 1 }));
    let ended = state.claim_node(RUN, "c", "w", TTL).await;
    assert!(ended.as_ref().is_err_and(Error::is_conflict), "{ended:?}");
    assert!(matches!(state.claim_next("no such run", worker("w")).await, Err(Error::RunNotFound(_))));
    assert!(matches!(state.claim_node(RUN, "no such node", "w", TTL).await, Err(Error::NodeNotFound { .. })));
    assert!(state.claim_node(RUN, "c", "w", Duration::from_millis(1)).await.is_err(), "renewals cannot keep up");
    state.close().await.unwrap();
}

async fn a_waiter_is_woken_by_what_becomes_ready(store: Store) {
    let state = store.open().await;
    begin(&state, &[("a", &[]), ("b", &["a"])]).await;
    let first = claim(&state, "a").await;
    let mut waiting = {
        let state = state.clone();
        tokio::spawn(async move { state.claim_next(RUN, worker("w").wait(Duration::from_secs(60))).await.unwrap() })
    };
    assert!(tokio::time::timeout(Duration::from_millis(10), &mut waiting).await.is_err(), "it has to wait");
    first.complete(NodeUpdate::success()).await.unwrap();
    let began = Instant::now();
    let second = waiting.await.unwrap().claimed().unwrap();
    assert_eq!(second.node_id().as_str(), "b");
    assert!(began.elapsed() < Duration::from_secs(10));
    // What is added later is found too.
    let mut waiting = {
        let state = state.clone();
        tokio::spawn(async move { state.claim_next(RUN, worker("w").wait(Duration::from_secs(60))).await.unwrap() })
    };
    assert!(tokio::time::timeout(Duration::from_millis(10), &mut waiting).await.is_err(), "nothing is ready");
    state.set_node_state(RUN, "new", NodeUpdate::pending()).await.unwrap();
    assert_eq!(waiting.await.unwrap().claimed().unwrap().node_id().as_str(), "new");
    drop(second);
    state.close().await.unwrap();
}

async fn a_dropped_claim_is_given_back_on_the_same_attempt(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[])]).await;
    drop(claim(&state, "n").await);
    until("given back", || async { node(&state, "n").await.status == NodeStatus::Pending }).await;
    let given = node(&state, "n").await;
    assert_eq!((given.attempt, given.attempts.len(), given.started_at, given.worker), (1, 0, None, None));
    let again = state.claim_next(RUN, worker("w").wait(Duration::from_secs(20))).await.unwrap().claimed().unwrap();
    assert_eq!(again.attempt(), 1);
    again.release().await.unwrap();
    assert_eq!(node(&state, "n").await.status, NodeStatus::Pending);
    let third = claim(&state, "n").await;
    third.retry("flaky").await.unwrap();
    let tried = node(&state, "n").await;
    assert_eq!((tried.status, tried.attempt, tried.error, tried.finished_at), (NodeStatus::Pending, 2, None, None));
    assert_eq!((tried.attempts.len(), tried.attempts[0].error.as_deref()), (1, Some("flaky")));
    assert!(tried.attempts[0].token.is_some());
    let fourth = claim(&state, "n").await;
    assert_eq!(fourth.attempt(), 2);
    let wrong = fourth.complete(NodeUpdate::pending()).await;
    assert!(matches!(wrong, Err(Error::Input(_))));
    assert_eq!(node(&state, "n").await.status, NodeStatus::Running, "it is still held");
    drop(fourth);
    until("given back", || async { node(&state, "n").await.status == NodeStatus::Pending }).await;
    assert!(state.list_locks().await.unwrap().is_empty());
    state.close().await.unwrap();
}

/// Callers that go away at every instant: nothing is left claimed.
async fn a_caller_that_goes_away_leaves_nothing_claimed(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[])]).await;
    for polls in 0..60_u32 {
        let asking = state.claim_next(RUN, worker("w").wait(Duration::from_secs(20)));
        tokio::pin!(asking);
        let mut left = polls;
        let gone = std::future::poll_fn(|cx| {
            let polled = asking.as_mut().poll(cx);
            if polled.is_ready() || left == 0 {
                return std::task::Poll::Ready(polled);
            }
            left -= 1;
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        });
        drop(gone.await);
    }
    // The last ones may still be on their way there and back.
    let last = state.claim_next(RUN, worker("w").wait(Duration::from_secs(20))).await.unwrap().claimed().unwrap();
    assert_eq!((last.attempt(), last.node_state().attempts.len()), (1, 0));
    last.complete(NodeUpdate::success()).await.unwrap();
    assert!(state.list_locks().await.unwrap().is_empty());
    state.close().await.unwrap();
}

/// A claim whose lease was taken away is taken over on the next attempt; what its worker says later is refused.
async fn a_vanished_worker_is_taken_over_and_cannot_write(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[])]).await;
    state.set_node_state(RUN, "n", NodeUpdate::new().max_attempts(3)).await.unwrap();
    let mut last = None;
    for attempt in 1..=3_u32 {
        let filter = worker(format!("w{attempt}")).ttl(SHORT).wait(Duration::from_secs(20));
        let claim = state.claim_next(RUN, filter).await.unwrap().claimed().unwrap();
        assert_eq!((claim.attempt(), claim.node_state().attempts.len()), (attempt, attempt as usize - 1));
        assert!(state.claim_node(RUN, "n", "other", TTL).await.unwrap().is_none());
        state.force_unlock(claim.token()).await.unwrap();
        assert_eq!(claim.lost().await, LostReason::Forced);
        if let Some(late) = last.replace(claim) {
            let late: Claim = late;
            let refused = late.complete(NodeUpdate::success()).await;
            assert!(refused.as_ref().is_err_and(Error::is_lease_lost), "{refused:?}");
        }
    }
    // That was the last one.
    let next = state.claim_next(RUN, worker("w4").ttl(SHORT).wait(Duration::from_secs(20))).await.unwrap();
    assert!(matches!(next, Next::Drained { blocked: 0 }), "{next:?}");
    let failed = node(&state, "n").await;
    assert_eq!((failed.status.clone(), failed.attempt), (NodeStatus::Failed, 3));
    assert!(failed.error.as_deref().is_some_and(|why| why.contains("w3") && why.contains("3 of 3")), "{:?}", failed.error);
    let history: Vec<_> = failed.attempts.iter().map(|a| (a.number, a.status.as_str(), a.worker.clone().unwrap())).collect();
    assert_eq!(history, [(1, "running", "w1".into()), (2, "running", "w2".into())]);
    // And its worker changes nothing any more.
    let refused = last.unwrap().complete(NodeUpdate::success()).await;
    assert!(refused.as_ref().is_err_and(Error::is_lease_lost), "{refused:?}");
    assert_eq!(node(&state, "n").await, failed);
    until("its lease is free", || async { state.list_locks().await.unwrap().is_empty() }).await;
    state.close().await.unwrap();
}

async fn dead_claims_are_freed_for_those_who_only_look_on(store: Store) {
    let state = store.open().await;
    begin(&state, &[("dead", &[]), ("alive", &[]), ("own", &[])]).await;
    // Moved by its orchestrator, not claimed: nobody's business.
    state.set_node_state(RUN, "own", NodeUpdate::running()).await.unwrap();
    let alive = claim(&state, "alive").await;
    let dead = claim(&state, "dead").await;
    state.force_unlock(dead.token()).await.unwrap();
    until("freed", || async { state.free_dead_claims(RUN).await.unwrap().iter().any(|id| id.as_str() == "dead") }).await;
    let freed = node(&state, "dead").await;
    assert_eq!((freed.status, freed.attempt, freed.attempts.len()), (NodeStatus::Pending, 2, 1));
    assert_eq!(node(&state, "own").await.status, NodeStatus::Running);
    assert!(state.free_dead_claims(RUN).await.unwrap().is_empty());
    alive.complete(NodeUpdate::success()).await.unwrap();
    assert!(state.claim_node(RUN, "own", "w", TTL).await.unwrap().is_none());
    drop(dead);
    state.close().await.unwrap();
}

async fn a_finished_node_is_not_undone(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[]), ("m", &[])]).await;
    let claimed = claim(&state, "n").await;
    // An operator decides otherwise.
    state.set_node_state(RUN, "n", NodeUpdate::skipped()).await.unwrap();
    let refused = claimed.complete(NodeUpdate::failed("late")).await;
    assert!(refused.as_ref().is_err_and(Error::is_conflict), "{refused:?}");
    assert_eq!(node(&state, "n").await.status, NodeStatus::Skipped);
    until("its lease is free", || async { state.list_locks().await.unwrap().is_empty() }).await;
    // The end of the run ends its claims.
    let other = claim(&state, "m").await;
    state.update_run(RUN, RunUpdate::cancelled()).await.unwrap();
    let refused = other.complete(NodeUpdate::success()).await;
    assert!(refused.as_ref().is_err_and(Error::is_lease_lost), "{refused:?}");
    state.close().await.unwrap();
}

async fn a_locked_node_waits_for_its_lock(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[])]).await;
    let lock = state.acquire_node_lock(RUN, "n", Duration::ZERO).await.unwrap().unwrap();
    assert!(state.claim_node(RUN, "n", "w", TTL).await.unwrap().is_none());
    assert!(matches!(state.claim_next(RUN, worker("w")).await.unwrap(), Next::NothingReady));
    let waiting = {
        let state = state.clone();
        tokio::spawn(async move { state.claim_next(RUN, worker("w").ttl(SHORT).wait(Duration::from_secs(30))).await.unwrap() })
    };
    lock.release().await.unwrap();
    let claim = waiting.await.unwrap().claimed().unwrap();
    assert!(state.acquire_lock(RUN, Duration::ZERO).await.unwrap().is_none(), "a claim keeps the run's lock away");
    claim.fenced().set_node_state(RUN, "n", NodeUpdate::new().metadata("half", "way")).await.unwrap();
    claim.complete(NodeUpdate::new()).await.unwrap();
    let done = node(&state, "n").await;
    assert_eq!((done.status, done.metadata.len()), (NodeStatus::Success, 1));
    state.close().await.unwrap();
}

async fn a_locked_run_keeps_claims_out_and_says_so(store: Store) {
    let state = store.open().await;
    begin(&state, &[("n", &[])]).await;
    let lock = state.acquire_lock(RUN, Duration::ZERO).await.unwrap().unwrap();
    let told = state.claim_next(RUN, worker("w")).await.unwrap();
    assert!(matches!(&told, Next::Locked { holder } if holder.token == lock.token()), "{told:?}");
    lock.release().await.unwrap();
    // Also who has looked a moment before it was taken is told.
    let _given_back = state
        .claim_next(RUN, worker("w").wait(Duration::from_secs(20)))
        .await
        .unwrap()
        .claimed()
        .unwrap()
        .release()
        .await
        .unwrap();
    let lock = state.acquire_lock(RUN, Duration::from_secs(20)).await.unwrap().unwrap();
    let told = state.claim_next(RUN, worker("w")).await.unwrap();
    assert!(matches!(&told, Next::Locked { holder } if holder.token == lock.token()), "{told:?}");
    assert!(state.claim_node(RUN, "n", "w", TTL).await.unwrap().is_none());
    let own = state.with_lease(&lock);
    for refused in [own.claim_next(RUN, worker("w")).await.map(drop), own.claim_node(RUN, "n", "w", TTL).await.map(drop)] {
        assert!(matches!(&refused, Err(Error::Input(why)) if why.to_string().contains("whole run")), "{refused:?}");
    }
    let waiting = {
        let state = state.clone();
        tokio::spawn(async move { state.claim_next(RUN, worker("w").ttl(SHORT).wait(Duration::from_secs(30))).await.unwrap() })
    };
    lock.release().await.unwrap();
    waiting.await.unwrap().claimed().unwrap().complete(NodeUpdate::new()).await.unwrap();
    assert!(own.claim_node(RUN, "n", "w", TTL).await.unwrap().is_none(), "the lock is gone, and the node has ended");
    assert!(matches!(state.claim_next(RUN, worker("w")).await.unwrap(), Next::Drained { blocked: 0 }));
    state.close().await.unwrap();
}

/// All workers of the runtime are blocked for longer than the TTL, and the claim holds.
async fn a_blocked_runtime_loses_no_claim(store: Store) {
    let state = store.open().await;
    begin(&state, &[]).await;
    unless_it_stalls(store.folder.path(), Duration::from_millis(900), async |ttl| {
        let node = format!("n{}", ttl.as_millis());
        state.set_node_state(RUN, &node, NodeUpdate::pending()).await.unwrap();
        let Some(claim) = state.claim_node(RUN, &node, "w", ttl).await.unwrap() else {
            return Err("its lease was over before it was known".to_owned());
        };
        let blocked: Vec<_> = (0..2).map(|_| tokio::spawn(async move { std::thread::sleep(ttl * 9 / 4) })).collect();
        for task in blocked {
            task.await.unwrap();
        }
        if claim.is_lost() {
            return Err(format!("it was lost: {}", claim.lost().await));
        }
        claim.complete(NodeUpdate::success()).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    state.close().await.unwrap();
}

async fn closing_gives_claims_back_and_wakes_who_waits(store: Store) {
    let state = store.open().await;
    begin(&state, &[("a", &[]), ("b", &["a"])]).await;
    let held = claim(&state, "a").await;
    let waiting = {
        let state = state.clone();
        tokio::spawn(async move { state.claim_next(RUN, worker("w").wait(Duration::from_secs(60))).await })
    };
    tokio::task::yield_now().await;
    state.close().await.unwrap();
    assert!(matches!(waiting.await.unwrap(), Err(Error::Closed)));
    let refused = held.complete(NodeUpdate::success()).await;
    assert!(refused.is_err());
}

/// Two openings of one database take from one run, and neither takes what the other one has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_openings_share_a_run() {
    let store = Store::of("database");
    let states = [store.open().await, store.open().await];
    states[0].create_run(RUN, NewRun::running()).await.unwrap();
    let mut tx = states[0].transaction();
    for index in 0..200_usize {
        let needs = (index >= 20).then(|| format!("n{}", index - 20));
        tx.set_node_state(RUN, format!("n{index}"), NodeUpdate::pending().depends_on(needs.as_slice()));
    }
    tx.commit().await.unwrap();
    // Nobody completes anything before all have claimed something: the first twenty nodes are enough for that.
    let all_have = Arc::new(tokio::sync::Barrier::new(12));
    let mut tasks = JoinSet::new();
    for (opening, state) in states.iter().enumerate() {
        for _ in 0..6 {
            let (state, all_have) = (state.clone(), Arc::clone(&all_have));
            tasks.spawn(async move {
                let mut done = Vec::new();
                loop {
                    match state.claim_next(RUN, worker(format!("p{opening}")).wait(Duration::from_secs(5))).await.unwrap() {
                        Next::Claimed(claim) => {
                            let node = claim.node_id().to_string();
                            done.push((node, claim.token(), claim.attempt()));
                            if done.len() == 1 {
                                all_have.wait().await;
                            }
                            claim.complete(NodeUpdate::success()).await.unwrap();
                        }
                        Next::Drained { blocked } => {
                            assert_eq!(blocked, 0);
                            return (opening, done);
                        }
                        _ => {}
                    }
                }
            });
        }
    }
    let told = tasks.join_all().await;
    let all: BTreeMap<String, _> =
        told.iter().flat_map(|(_, done)| done.clone()).map(|(n, token, at)| (n, (token, at))).collect();
    assert_eq!((all.len(), told.iter().map(|(_, done)| done.len()).sum::<usize>()), (200, 200), "every node once");
    for opening in 0..2 {
        assert!(told.iter().any(|(by, done)| *by == opening && !done.is_empty()), "opening {opening} did nothing");
    }
    let last = store.open().await;
    for (node, (token, attempt)) in all {
        let state = last.get_node_state(RUN, &node).await.unwrap().unwrap();
        assert_eq!((state.status, state.token, state.attempt, attempt), (NodeStatus::Success, Some(token), 1, 1), "{node}");
    }
}

/// What a node depends on is looked at once more when the claim commits: another opening may have taken it back a moment before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_waits_for_still_holds_when_it_is_claimed() {
    let store = Store::of("database");
    let (worker_side, other) = (store.open().await, store.open().await);
    begin(&other, &[("orders", &[]), ("report", &["orders"])]).await;
    let seen = async |status: NodeStatus| {
        let status = &status;
        until("what the other opening wrote is followed", async || node(&worker_side, "orders").await.status == *status).await;
    };
    for round in 0..20 {
        other.set_node_state(RUN, "orders", NodeUpdate::success()).await.unwrap();
        seen(NodeStatus::Success).await;
        other.set_node_state(RUN, "orders", NodeUpdate::failed("the orders of yesterday")).await.unwrap();
        let next = worker_side.claim_next(RUN, worker("w")).await.unwrap();
        assert!(!matches!(next, Next::Claimed(_)), "round {round}: the orders have failed, {next:?}");
        seen(NodeStatus::Failed).await;
    }
    other.set_node_state(RUN, "orders", NodeUpdate::success()).await.unwrap();
    let next = worker_side.claim_next(RUN, worker("w").wait(Duration::from_secs(20))).await.unwrap();
    assert_eq!(next.claimed().unwrap().node_id().as_str(), "report", "a refusal leaves nobody out for ever");
    for state in [worker_side, other] {
        state.close().await.unwrap();
    }
}

on_every_backend!(
    exactly_one_of_many_claims_a_node,
    a_graph_is_drained_in_its_order,
    what_can_never_be_ready_is_told,
    a_waiter_is_woken_by_what_becomes_ready,
    a_dropped_claim_is_given_back_on_the_same_attempt,
    a_caller_that_goes_away_leaves_nothing_claimed,
    a_vanished_worker_is_taken_over_and_cannot_write,
    dead_claims_are_freed_for_those_who_only_look_on,
    a_finished_node_is_not_undone,
    a_locked_node_waits_for_its_lock,
    a_locked_run_keeps_claims_out_and_says_so,
    a_blocked_runtime_loses_no_claim,
    closing_gives_claims_back_and_wakes_who_waits,
);
