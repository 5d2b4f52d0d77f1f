//! What frees a lease voids it with its own commit: nothing is written under it behind that, however late the lock manager hears of it.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::support::{Lie, LyingBackend, Store};
use seeknal_state::{
    Clock, Coordinator, Error, LostReason, NewRun, NodeUpdate, OnDelete, RunId, RunStatus, RunUpdate, StateBackend, SystemClock,
};

const NOW: Duration = Duration::ZERO;
const TTL: Duration = Duration::from_secs(30);

on_every_backend!(
    what_is_sent_with_the_end_of_its_run_is_not_written_behind_it,
    what_is_sent_with_the_end_of_its_claim_is_not_written_behind_it
);

async fn what_is_sent_with_the_end_of_its_run_is_not_written_behind_it(store: Store) {
    let state = store.open().await;
    for round in 0..if store.is_local() { 20 } else { 4 } {
        let run = format!("r{round}");
        state.create_run(&run, NewRun::running()).await.unwrap();
        let lease = state.acquire_lock(&run, NOW).await.unwrap().expect("free");
        let fenced = state.with_lease(&lease);
        let (end, late) = tokio::join!(
            state.update_run(&run, RunUpdate::success()),
            fenced.set_node_state(&run, "late", NodeUpdate::success())
        );
        let end = end.unwrap();
        match late {
            Ok(late) => assert!(late.seq < end.seq, "round {round}: written as {:?}, behind the end {:?}", late.seq, end.seq),
            Err(error) => assert!(matches!(error, Error::LeaseLost(_)), "round {round}: {error}"),
        }
    }
    state.close().await.unwrap();
}

async fn what_is_sent_with_the_end_of_its_claim_is_not_written_behind_it(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    for round in 0..if store.is_local() { 20 } else { 4 } {
        let node = format!("n{round}");
        state.set_node_state("r", &node, NodeUpdate::pending()).await.unwrap();
        let claim = state.claim_node("r", &node, "w", TTL).await.unwrap().expect("free");
        let fenced = claim.fenced();
        let (end, late, other) = tokio::join!(
            claim.complete(NodeUpdate::success()),
            fenced.set_node_state("r", &node, NodeUpdate::new().row_count(1)),
            fenced.set_node_state("r", "other", NodeUpdate::new().row_count(1))
        );
        let end = end.unwrap();
        // Its own node does not run any more either, which may be found first.
        for (late, is_own) in [(late, true), (other, false)] {
            match late {
                Ok(late) => assert!(late.seq < end.seq, "round {round}: written as {:?}, behind the end {:?}", late.seq, end.seq),
                Err(Error::Conflict(_)) if is_own => {}
                Err(error) => assert!(matches!(error, Error::LeaseLost(_)), "round {round}: {error}"),
            }
        }
    }
    state.close().await.unwrap();
}

/// A clock that holds up one who asks it: the lock manager, which asks it for what it lists.
#[derive(Debug, Clone, Default)]
struct Stalling(Arc<Stall>);

#[derive(Debug, Default)]
struct Stall {
    armed: AtomicBool,
    stands: tokio::sync::Notify,
    released: Mutex<bool>,
    told: Condvar,
}

impl Clock for Stalling {
    fn now(&self) -> chrono::DateTime<chrono::Utc> {
        if self.0.armed.swap(false, Ordering::SeqCst) {
            // What its worker would have done next is done by another one meanwhile.
            tokio::task::block_in_place(|| {
                self.0.stands.notify_one();
                let released = self.0.released.lock().unwrap();
                drop(self.0.told.wait_while(released, |released| !*released).unwrap());
            });
        }
        SystemClock.now()
    }
}

/// The lock manager stands still as long as this lives.
struct StandsStill(Stalling);

impl StandsStill {
    /// It is asked for what is held.
    async fn begin(clock: &Stalling, state: &Coordinator) -> Self {
        clock.0.armed.store(true, Ordering::SeqCst);
        let state = state.clone();
        drop(tokio::spawn(async move { state.list_locks().await }));
        clock.0.stands.notified().await;
        Self(clock.clone())
    }
}

impl Drop for StandsStill {
    fn drop(&mut self) {
        *self.0.0.released.lock().unwrap() = true;
        self.0.0.told.notify_all();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_lock_manager_that_is_late_lets_nobody_write_under_what_was_freed() {
    for backend in ["memory", "file"] {
        let (store, clock) = (Store::of(backend), Stalling::default());
        let state = Coordinator::builder().clock(clock.clone()).open(store.backend()).await.unwrap();
        let mut leases = Vec::new();
        for run in ["ended", "deleted", "claims"] {
            state.create_run(run, NewRun::running()).await.unwrap();
            if run != "claims" {
                leases.push(state.acquire_lock(run, NOW).await.unwrap().expect("free"));
            }
        }
        state.set_node_state("claims", "n", NodeUpdate::pending()).await.unwrap();
        let claim = state.claim_node("claims", "n", "w", TTL).await.unwrap().expect("free");
        let [ended, deleted] = [state.with_lease(&leases[0]), state.with_lease(&leases[1])];
        let claimed = claim.fenced();
        let stands_still = StandsStill::begin(&clock, &state).await;

        state.update_run("ended", RunUpdate::success()).await.unwrap();
        let late = ended.set_node_state("ended", "late", NodeUpdate::success()).await;
        assert!(matches!(late, Err(Error::LeaseLost(_))), "{backend}, behind the end of the run: {late:?}");

        state.delete_run("deleted", OnDelete::DropCoverage).await.unwrap();
        state.create_run("deleted", NewRun::running()).await.unwrap();
        let late = deleted.set_node_state("deleted", "late", NodeUpdate::success()).await;
        assert!(matches!(late, Err(Error::LeaseLost(_))), "{backend}, in the run that was made anew: {late:?}");

        claim.complete(NodeUpdate::success()).await.unwrap();
        let late = claimed.set_node_state("claims", "late", NodeUpdate::success()).await;
        assert!(matches!(late, Err(Error::LeaseLost(_))), "{backend}, behind the end of the claim: {late:?}");
        let late = claimed.set_node_state("claims", "n", NodeUpdate::failed("late")).await;
        assert!(matches!(late, Err(Error::Conflict(_) | Error::LeaseLost(_))), "{backend}, to what has ended: {late:?}");
        let mut tx = state.transaction();
        tx.expect_unlocked("claims");
        tx.set_node_state("claims", "free", NodeUpdate::pending());
        tx.commit().await.expect("the claim was given back");

        drop(stands_still);
        assert!(state.list_locks().await.unwrap().is_empty(), "{backend}");
        let again = state.acquire_lock("deleted", Duration::from_secs(5)).await.unwrap().expect("free");
        state.with_lease(&again).set_node_state("deleted", "n", NodeUpdate::success()).await.unwrap();
        drop(again);
        state.close().await.unwrap();
    }
}

/// The end of a run takes the locks that were held when it was committed, and none that was granted behind it.
#[tokio::test]
async fn a_lock_that_is_granted_behind_the_end_of_its_run_is_held() {
    let backend = LyingBackend::new(false);
    let state = Coordinator::open(Arc::clone(&backend) as Arc<dyn StateBackend>).await.unwrap();
    let run = RunId::new("r").unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let before = state.acquire_node_lock("r", "before", NOW).await.unwrap().expect("free");
    backend.tell([Lie::AnswerLate]);
    let end = tokio::spawn({
        let state = state.clone();
        async move { state.update_run("r", RunUpdate::success()).await }
    });
    while backend.inner.load_run(&run).await.unwrap().unwrap().header().status != RunStatus::Success {
        tokio::task::yield_now().await;
    }
    // The end is in storage, and nobody here has heard of it.
    let behind = state.acquire_node_lock("r", "behind", NOW).await.unwrap().expect("free");
    backend.gate.add_permits(1);
    end.await.unwrap().unwrap();
    assert_eq!(before.lost().await, LostReason::RunEnded);
    let held: Vec<_> = state.list_locks().await.unwrap().into_iter().map(|lock| lock.token).collect();
    assert_eq!(held, [behind.token()]);
    assert!(!behind.is_lost());
    state.with_lease(&behind).set_node_state("r", "behind", NodeUpdate::success()).await.unwrap();
    assert!(state.acquire_node_lock("r", "behind", NOW).await.unwrap().is_none());
    state.delete_run("r", OnDelete::DropCoverage).await.unwrap();
    assert_eq!(behind.lost().await, LostReason::RunEnded);
    assert!(state.list_locks().await.unwrap().is_empty());
    state.close().await.unwrap();
}
