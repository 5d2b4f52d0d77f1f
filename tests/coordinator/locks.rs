//! Locks through the front door, on every backend.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use crate::stalls::unless_it_stalls;
use crate::support::Store;
use seeknal_state::{
    Coordinator, Error, Lease, LeaseError, LeaseKey, LockOptions, LostReason, NewRun, NodeId, NodeUpdate, OnDelete, RunId,
    RunUpdate, StoreError,
};

const NOW: Duration = Duration::ZERO;
/// Nobody waits for so long, on however busy a machine.
const SOON: Duration = Duration::from_secs(60);

on_every_backend!(
    a_run_and_its_nodes_exclude_one_another,
    waiters_are_served_in_order,
    a_fenced_write_is_refused_once_the_lease_is_lost,
    a_lease_that_nobody_renews_expires_by_itself,
    a_lease_that_is_kept_alive_outlives_its_ttl,
    a_short_lease_is_kept_alive_beside_long_ones,
    ending_a_run_frees_its_locks,
    a_lock_is_released_after_its_run_has_ended,
    however_a_run_ends_its_holder_and_its_waiters_are_told,
    the_shortest_leases_grant_nothing_twice,
    a_holder_whose_wall_clock_is_wrong_is_not_robbed_and_not_waited_for_longer,
    tokens_grow_over_restarts,
    a_cycle_of_waiters_is_refused_with_the_names,
    a_caller_that_goes_away_leaks_nothing,
    abandoned_runs_are_taken_over,
    a_run_of_a_process_that_lives_is_not_taken_over,
);

fn run(name: &str) -> LeaseKey {
    LeaseKey::run(RunId::new(name).unwrap())
}

async fn a_run_and_its_nodes_exclude_one_another(store: Store) {
    let state = store.open().await;
    let node = state.acquire_node_lock("r", "a", NOW).await.unwrap().expect("free");
    assert!(state.acquire_lock("r", NOW).await.unwrap().is_none());
    let other = state.acquire_node_lock("r", "b", NOW).await.unwrap().expect("another node is free");
    let elsewhere = state.acquire_lock("another", NOW).await.unwrap().expect("another run is free");
    elsewhere.release().await.unwrap();
    let listed = state.list_locks().await.unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|lease| lease.owner.process.pid == std::process::id()));
    drop((node, other));
    let whole = state.acquire_lock("r", SOON).await.unwrap().expect("free again");
    assert!(state.acquire_node_lock("r", "a", NOW).await.unwrap().is_none());
    whole.release().await.unwrap();
    state.close().await.unwrap();
}

async fn waiters_are_served_in_order(store: Store) {
    let state = store.open().await;
    let first = state.acquire_lock("r", NOW).await.unwrap().expect("free");
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let mut waiters = Vec::new();
    for number in 0..20 {
        let (state, told) = (state.clone(), told.clone());
        let (started, is_waiting) = tokio::sync::oneshot::channel();
        waiters.push(tokio::spawn(async move {
            let waiting = state.acquire_lock("r", SOON);
            tokio::pin!(waiting);
            // Polled once, it has its place in the queue.
            let mut started = Some(started);
            let lease = std::future::poll_fn(|context| {
                let polled = waiting.as_mut().poll(context);
                if let Some(started) = started.take() {
                    let _told = started.send(());
                }
                polled
            })
            .await
            .unwrap()
            .expect("in time");
            told.send((number, lease.token())).unwrap();
        }));
        is_waiting.await.unwrap();
    }
    let mut last = first.token();
    drop(first);
    for expected in 0..20 {
        let (number, token) = heard.recv().await.unwrap();
        assert_eq!(number, expected);
        assert!(token > last, "tokens grow with every grant");
        last = token;
    }
    for waiter in waiters {
        waiter.await.unwrap();
    }
}

async fn a_fenced_write_is_refused_once_the_lease_is_lost(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let lease = state.acquire_lock("r", NOW).await.unwrap().expect("free");
    let fenced = state.with_lease(&lease);
    fenced.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    let freed = state.force_unlock(lease.token()).await.unwrap();
    assert_eq!(freed.token, lease.token());
    assert_eq!(lease.lost().await, LostReason::Forced);
    let error = fenced.set_node_state("r", "n", NodeUpdate::running().row_count(2)).await.unwrap_err();
    assert!(error.is_lease_lost(), "{error}");
    let mut tx = state.transaction();
    tx.fenced_by(&lease).set_node_state("r", "n", NodeUpdate::running().row_count(3));
    assert!(tx.commit().await.unwrap_err().is_lease_lost());
    assert_eq!(state.get_node_state("r", "n").await.unwrap().unwrap().row_count, Some(1));
    // The new holder is not touched by the old token.
    let next = state.acquire_lock("r", NOW).await.unwrap().expect("free");
    drop(lease);
    assert!(matches!(state.force_unlock(freed.token).await, Err(Error::Lease(LeaseError::NotFound { .. }))));
    state.with_lease(&next).set_node_state("r", "n", NodeUpdate::running().row_count(4)).await.unwrap();
    assert!(!next.is_lost());
}

/// A lease that nobody renews, its TTL, and when it was asked for. Where storage takes longer to grant it than it would last, that is told, and a longer one
/// is asked for.
async fn unrenewed(state: &Coordinator, mut ttl: Duration) -> (Lease, Duration, Instant) {
    loop {
        let (options, begun) = (LockOptions::new().ttl(ttl).keep_alive(false), Instant::now());
        match state.acquire(run("r"), options, SOON).await {
            Ok(lease) => return (lease.expect("free"), ttl, begun),
            Err(Error::Store(error)) if is_too_slow(&error) && ttl < SOON => ttl *= 2,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Whether storage took longer to grant a lease than it would have lasted.
fn is_too_slow(error: &StoreError) -> bool {
    error.to_string().contains("ask for a longer ttl")
}

async fn a_lease_that_nobody_renews_expires_by_itself(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let (lease, ttl, begun) = unrenewed(&state, Duration::from_millis(300)).await;
    assert!(lease.remaining() <= ttl);
    let next = state.acquire_lock("r", SOON).await.unwrap().expect("the first one expired without anybody's help");
    assert!(begun.elapsed() >= ttl / 2, "it lasted its time: {:?}", begun.elapsed());
    assert_eq!(lease.lost().await, LostReason::Expired);
    assert!(next.token() > lease.token());
    let error = state.with_lease(&lease).set_node_state("r", "n", NodeUpdate::running()).await.unwrap_err();
    assert!(error.is_lease_lost(), "{error}");
    drop(next);
}

/// A lease that is kept alive.
async fn kept_alive(state: &Coordinator, ttl: Duration) -> Result<Lease, String> {
    match state.acquire(run("r"), LockOptions::new().ttl(ttl), SOON).await {
        Ok(lease) => Ok(lease.expect("free")),
        Err(Error::Store(error)) if is_too_slow(&error) => Err(error.to_string()),
        Err(error) => panic!("{error}"),
    }
}

/// It is held, and what is fenced by it is taken.
async fn still_held(state: &Coordinator, lease: Lease) -> Result<(), String> {
    if lease.is_lost() {
        return Err(format!("it was lost: {}", lease.lost().await));
    }
    let fenced = state.with_lease(&lease).set_node_state("r", "n", NodeUpdate::running()).await;
    fenced.map_err(|error| format!("what it covers was refused: {error}"))?;
    lease.release().await.map_err(|error| format!("it could not be released: {error}"))
}

async fn a_lease_that_is_kept_alive_outlives_its_ttl(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    unless_it_stalls(store.folder.path(), Duration::from_millis(400), async |ttl| {
        let kept = kept_alive(&state, ttl).await?;
        if state.acquire_lock("r", ttl * 4).await.unwrap().is_some() {
            assert!(kept.is_lost(), "two hold it");
            return Err(format!("somebody else had it within four times its TTL: {}", kept.lost().await));
        }
        still_held(&state, kept).await
    })
    .await;
}

async fn a_short_lease_is_kept_alive_beside_long_ones(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let long = state.acquire_lock("long", NOW).await.unwrap().expect("free");
    unless_it_stalls(store.folder.path(), Duration::from_millis(600), async |ttl| {
        // Whoever renews them has settled down to wait for the long one by then.
        for _ in 0..3 {
            state.acquire_lock("passing", NOW).await.unwrap().expect("free").release().await.unwrap();
        }
        let short = kept_alive(&state, ttl).await?;
        let _lost_by_then = tokio::time::timeout(ttl * 3, short.lost()).await;
        still_held(&state, short).await
    })
    .await;
    long.release().await.unwrap();
    state.close().await.unwrap();
}

async fn ending_a_run_frees_its_locks(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let node = state.acquire_node_lock("r", "n", NOW).await.unwrap().expect("free");
    state.update_run("r", RunUpdate::success()).await.unwrap();
    assert_eq!(node.lost().await, LostReason::RunEnded);
    assert!(state.acquire_lock("r", SOON).await.unwrap().is_some());
    assert!(state.list_locks().await.unwrap().iter().all(|lease| lease.key.node.is_none()));
}

async fn however_a_run_ends_its_holder_and_its_waiters_are_told(store: Store) {
    let state = store.open().await;
    for (name, end) in [
        ("success", Some(RunUpdate::success())),
        ("failed", Some(RunUpdate::failed())),
        ("cancelled", Some(RunUpdate::cancelled())),
        ("deleted", None),
    ] {
        state.create_run(name, NewRun::running()).await.unwrap();
        let lease = state.acquire_lock(name, NOW).await.unwrap().expect("free");
        let waiting = state.acquire_lock(name, SOON);
        tokio::pin!(waiting);
        // Polled once, it has its place in the queue.
        let polled = std::future::poll_fn(|context| std::task::Poll::Ready(waiting.as_mut().poll(context))).await;
        assert!(polled.is_pending(), "{name}");
        let ended = match end {
            Some(update) => state.update_run(name, update).await,
            None => state.delete_run(name, OnDelete::KeepCoverage).await,
        };
        ended.unwrap();
        assert_eq!(lease.lost().await, LostReason::RunEnded, "{name}");
        // Whoever waited for a lock learns that there is nothing to wait for any more: by the lock itself, or by an error.
        let told = tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("{name}: the waiter was not told"));
        assert!(!matches!(told, Ok(None)), "{name}: it waited until its time was over");
        let error = state.with_lease(&lease).set_node_state(name, "n", NodeUpdate::running()).await.unwrap_err();
        assert!(error.is_lease_lost() || error.is_not_found(), "{name}: {error}");
    }
}

async fn the_shortest_leases_grant_nothing_twice(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::running().row_count(0)).await.unwrap();
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let state = state.clone();
        tasks.push(tokio::spawn(async move {
            let (mut tokens, mut counted) = (Vec::new(), 0_u64);
            for _ in 0..20 {
                let options = LockOptions::new().ttl(Duration::from_millis(1)).keep_alive(false);
                let lease = match state.acquire(run("r"), options, SOON).await {
                    Ok(Some(lease)) => lease,
                    Ok(None) => continue,
                    // Storage took longer to grant it than it would have lasted.
                    Err(Error::Store(error)) if is_too_slow(&error) => continue,
                    Err(error) => panic!("{error}"),
                };
                tokens.push(lease.token());
                // Read and written under the lease: who is late is refused, and so no count is lost.
                let seen = state.fresh("r").await.unwrap().unwrap().node("n").unwrap().row_count.unwrap();
                match state.with_lease(&lease).set_node_state("r", "n", NodeUpdate::running().row_count(seen + 1)).await {
                    Ok(_) => counted += 1,
                    Err(error) => assert!(error.is_lease_lost(), "{error}"),
                }
            }
            (tokens, counted)
        }));
    }
    let (mut tokens, mut counted) = (std::collections::BTreeSet::new(), 0);
    for task in tasks {
        let (granted, by_one) = task.await.unwrap();
        for token in granted {
            assert!(tokens.insert(token), "{token} was granted twice");
        }
        counted += by_one;
    }
    // From a database no answer may come in time.
    assert!(!tokens.is_empty() || !matches!(store.backend, "memory" | "file"));
    assert_eq!(state.get_node_state("r", "n").await.unwrap().unwrap().row_count, Some(counted), "every count, and none twice");
}

/// A clock that goes wrong by some hours.
#[derive(Debug)]
struct Wrong(i64);

impl seeknal_state::model::Clock for Wrong {
    fn now(&self) -> chrono::DateTime<chrono::Utc> {
        seeknal_state::model::SystemClock.now() + chrono::Duration::hours(self.0)
    }
}

async fn a_holder_whose_wall_clock_is_wrong_is_not_robbed_and_not_waited_for_longer(store: Store) {
    for hours in [1, -1] {
        let wrong = Coordinator::builder().clock(Wrong(hours)).open(store.backend()).await.unwrap();
        // Where leases are rows another opening asks for it; elsewhere it is the same one, by the same clock.
        let shared = store.backend != "memory" && wrong.backend().is_shared();
        let other = if shared { store.open().await } else { wrong.clone() };
        let (lease, ttl, begun) = unrenewed(&wrong, Duration::from_millis(800)).await;
        let early = other.acquire_lock("r", NOW).await.unwrap().is_some();
        assert!(!early || begun.elapsed() >= ttl / 8 * 7, "{hours} h: it was stolen");
        // Less than an hour, by far.
        let next = other.acquire_lock("r", SOON).await.unwrap().expect("the time of the first is over");
        let waited = begun.elapsed();
        // The holder's own trust ends a little before the lease does; then it gives it back.
        assert!(waited >= ttl / 8 * 7, "{hours} h: {waited:?}");
        assert!(next.token() > lease.token() && lease.is_lost(), "{hours} h");
        next.release().await.unwrap();
        if shared {
            other.close().await.unwrap();
        }
        wrong.close().await.unwrap();
    }
}

async fn tokens_grow_over_restarts(store: Store) {
    let state = store.open().await;
    let first = state.acquire_lock("r", NOW).await.unwrap().expect("free").token();
    state.close().await.unwrap();
    let state = store.open().await;
    let lease = state.acquire_lock("r", SOON).await.unwrap().expect("closing released it");
    if store.backend != "memory" {
        assert!(lease.token() > first);
    }
}

async fn a_cycle_of_waiters_is_refused_with_the_names(store: Store) {
    let state = store.open().await;
    let named = |name: &str| LockOptions::new().owner(name);
    let _a = state.acquire(run("a"), named("alice"), NOW).await.unwrap().expect("free");
    let _b = state.acquire(run("b"), named("bob"), NOW).await.unwrap().expect("free");
    let waiting = state.acquire(run("b"), named("alice"), SOON);
    tokio::pin!(waiting);
    // Polled once, it has its place in the queue.
    let polled = std::future::poll_fn(|context| std::task::Poll::Ready(waiting.as_mut().poll(context))).await;
    assert!(polled.is_pending());
    let error = state.acquire(run("a"), named("bob"), SOON).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("alice") && text.contains("bob"), "{text}");
    let again = state.acquire(run("a"), named("alice"), NOW).await.unwrap_err();
    assert!(matches!(again, Error::Lease(LeaseError::Reentrant { .. })), "{again}");
}

async fn a_caller_that_goes_away_leaks_nothing(store: Store) {
    let state = store.open().await;
    for micros in 0..60_u64 {
        let doomed = state.acquire_lock("r", SOON);
        let _gone = tokio::time::timeout(Duration::from_micros(micros * 20), doomed).await;
    }
    let lease = state.acquire_lock("r", SOON).await.unwrap().expect("nobody holds it any more");
    lease.release().await.unwrap();
    while !state.list_locks().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
}

/// The usual order: lock, work, end, release.
async fn a_lock_is_released_after_its_run_has_ended(store: Store) {
    let state = store.open().await;
    for round in 0..20 {
        let name = format!("r{round}");
        state.create_run(&*name, NewRun::running()).await.unwrap();
        let whole = state.acquire_lock(&*name, SOON).await.unwrap().expect("free");
        state.with_lease(&whole).update_run(&*name, RunUpdate::success()).await.unwrap();
        whole.release().await.unwrap();
    }
    let forced = state.acquire_lock("other", SOON).await.unwrap().expect("free");
    state.force_unlock(forced.token()).await.unwrap();
    let lost = forced.release().await.unwrap_err();
    assert!(matches!(lost, LeaseError::Lost { reason: LostReason::Forced, .. }), "{lost}");
}

async fn abandoned_runs_are_taken_over(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    state.create_run("done", NewRun::running()).await.unwrap();
    state.update_run("done", RunUpdate::success()).await.unwrap();
    assert!(state.abandoned_runs().await.unwrap().is_empty(), "its process lives");
    assert_eq!(state.resume_run("r").await.unwrap().commit, None, "one's own run needs no taking over");
    state.close().await.unwrap();
    if store.backend == "memory" {
        return;
    }
    let state = store.open().await;
    let abandoned = state.abandoned_runs().await.unwrap();
    assert_eq!(abandoned.iter().map(|run| run.summary.run_id.as_str()).collect::<Vec<_>>(), ["r"]);
    let resumed = state.resume_run("r").await.unwrap();
    assert_eq!(resumed.header().worker, state.backend().process());
    let commit = resumed.commit.as_ref().unwrap();
    assert!(commit.seq.is_some() && commit.version() == resumed.version(), "{commit:?}");
    assert!(state.abandoned_runs().await.unwrap().is_empty());
    assert!(state.resume_run("done").await.unwrap_err().is_conflict());
    assert!(state.resume_run("nowhere").await.unwrap_err().is_not_found());
    let node = NodeId::new("n").unwrap();
    state.set_node_state("r", node, NodeUpdate::running()).await.unwrap();
}

async fn a_run_of_a_process_that_lives_is_not_taken_over(store: Store) {
    let one = store.open().await;
    one.create_run("r", NewRun::running()).await.unwrap();
    if !one.backend().is_shared() {
        assert!(matches!(store.backend, "memory" | "file"), "one opening at a time: nobody else can be asked");
        return;
    }
    let two = store.open().await;
    two.create_run("q", NewRun::running()).await.unwrap();
    for (here, other) in [(&one, "q"), (&two, "r")] {
        assert!(here.abandoned_runs().await.unwrap().is_empty(), "{other} is worked on");
        let refused = here.resume_run(other).await.unwrap_err();
        assert!(matches!(refused, Error::RunInUse { .. }), "{refused}");
        let listed = here.backend().processes().await.unwrap();
        assert_eq!(listed.iter().filter(|open| open.alive == Some(true)).count(), 2, "{listed:?}");
    }
    two.close().await.unwrap();
    assert_eq!(one.abandoned_runs().await.unwrap().len(), 1, "it has closed in order");
    one.resume_run("q").await.unwrap();
}
