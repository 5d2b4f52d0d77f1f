//! Locks between processes: woken by a release, taken over from the dead at once, never from who is only stopped.

use std::future::Future;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use seeknal_state::{
    Clock, Coordinator, LeaseKey, LockOptions, LostReason, NewRun, NodeId, NodeUpdate, OnDelete, RunId, RunUpdate, SystemClock,
};

use super::peer::Peer;
use super::support::Store;
use super::until;

on_every_database!(
    a_waiter_is_woken_by_a_release_in_another_process,
    a_stopped_process_is_not_dead_and_its_late_write_is_refused,
    the_lock_of_a_killed_process_is_free_when_its_time_is_over,
    a_holder_hears_at_once_what_another_process_did_to_its_lock,
);

const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(60);

/// When the only lock there is ends unless it is renewed again: its holder counts from when it asks, storage from when it is asked.
async fn its_end(here: &Coordinator) -> DateTime<Utc> {
    here.list_locks().await.unwrap().first().expect("it is held").until
}

/// But for what rounding and two clocks make of it.
fn is_over(end: DateTime<Utc>) -> bool {
    SystemClock.now() >= end - TimeDelta::milliseconds(100)
}

async fn a_waiter_is_woken_by_a_release_in_another_process(store: Store) {
    let here = store.open().await;
    let mut peer = Peer::start(&store.place);
    let mut waits = Vec::new();
    for _ in 0..5 {
        assert!(peer.ask("lock r 30000 60000").starts_with("locked"));
        assert!(here.acquire_lock("r", NOW).await.unwrap().is_none());
        let waiting = tokio::spawn({
            let here = here.clone();
            async move { (here.acquire_lock("r", LONG).await.unwrap().unwrap(), Instant::now()) }
        });
        tokio::time::sleep(Duration::from_millis(120)).await;
        assert!(!waiting.is_finished(), "it is held");
        let released = Instant::now();
        assert_eq!(peer.ask("release"), "released");
        let (lease, granted) = waiting.await.unwrap();
        waits.push(granted.saturating_duration_since(released));
        lease.release().await.unwrap();
    }
    println!("granted after a release in another process: {waits:.1?}");
    // Its holder lives, and would have had it for longer.
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(20)), "{waits:?}");
    here.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_of_a_killed_process_is_taken_over_at_once() {
    let store = Store::of("database");
    let here = store.open().await;
    here.create_run("r", NewRun::running()).await.unwrap();
    let mut took = Vec::new();
    for _ in 0..7 {
        let mut peer = Peer::start(&store.place);
        let locked = peer.ask("lock r 30000 0");
        let token: u64 = locked.strip_prefix("locked ").unwrap_or_else(|| panic!("{locked}")).parse().unwrap();
        let waiting = tokio::spawn({
            let here = here.clone();
            async move { (here.acquire_lock("r", LONG).await.unwrap().unwrap(), Instant::now()) }
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!waiting.is_finished() && here.list_locks().await.unwrap().len() == 1, "it is held as long as its process lives");
        let died = Instant::now();
        peer.kill();
        let (lease, granted) = waiting.await.unwrap();
        took.push(granted.saturating_duration_since(died));
        assert!(lease.token().0 > token, "with a higher token");
        lease.release().await.unwrap();
    }
    println!("taken over from a killed process, TTL 30 s: {took:.1?}");
    assert!(took.iter().all(|took| *took < Duration::from_secs(5)), "{took:?}");
    here.close().await.unwrap();
}

/// Not when it would be renewed: that is in twenty minutes.
async fn a_holder_hears_at_once_what_another_process_did_to_its_lock(store: Store) {
    const TTL: Duration = Duration::from_secs(3_600);
    let (here, there) = (store.open().await, store.open().await);
    let lost = async |what: &str, lost: &mut (dyn Future<Output = LostReason> + Unpin)| {
        tokio::time::timeout(LONG, lost).await.unwrap_or_else(|_| panic!("never told: {what}"))
    };
    for run in ["forced", "ended", "deleted"] {
        let mut tx = here.transaction();
        tx.create_run(run, NewRun::running());
        tx.set_node_state(run, "claimed", NodeUpdate::pending());
        tx.set_node_state(run, "kept", NodeUpdate::pending());
        tx.commit().await.unwrap();
    }
    for keep_alive in [true, false] {
        let options = LockOptions::new().ttl(TTL).keep_alive(keep_alive);
        let lock = here.acquire(LeaseKey::run(RunId::new("forced").unwrap()), options, LONG).await.unwrap().unwrap();
        there.force_unlock(lock.token()).await.unwrap();
        assert_eq!(lost("forced", &mut Box::pin(lock.lost())).await, LostReason::Forced);
    }
    for run in ["forced", "ended", "deleted"] {
        let claim = here.claim_node(run, "claimed", "w", TTL).await.unwrap().unwrap();
        let options = LockOptions::new().ttl(TTL).keep_alive(false);
        let key = LeaseKey::node(RunId::new(run).unwrap(), NodeId::new("lock").unwrap());
        let lock = here.acquire(key, options, LONG).await.unwrap().unwrap();
        let kept = here.acquire_node_lock("kept", run, NOW).await.unwrap().unwrap();
        let why = match run {
            "forced" => {
                for token in [claim.token(), lock.token()] {
                    there.force_unlock(token).await.unwrap();
                }
                LostReason::Forced
            }
            "ended" => {
                there.update_run(run, RunUpdate::failed()).await.unwrap();
                LostReason::RunEnded
            }
            _ => {
                there.delete_run(run, OnDelete::KeepCoverage).await.unwrap();
                LostReason::RunEnded
            }
        };
        assert_eq!(lost(run, &mut Box::pin(claim.lost())).await, why, "{run}");
        assert_eq!(lost(run, &mut Box::pin(lock.lost())).await, why, "{run}");
        assert!(!kept.is_lost(), "{run}: another run's");
    }
}

/// Whether or not anybody can know that it is dead.
async fn the_lock_of_a_killed_process_is_free_when_its_time_is_over(store: Store) {
    const TTL: Duration = Duration::from_secs(2);
    let here = store.open().await;
    here.create_run("r", NewRun::running()).await.unwrap();
    let mut peer = Peer::start(&store.place);
    let locked = peer.ask("lock r 2000 0");
    let token: u64 = locked.strip_prefix("locked ").unwrap_or_else(|| panic!("{locked}")).parse().unwrap();
    assert_eq!(peer.ask("fenced r n"), "written");
    let end = its_end(&here).await;
    peer.kill();
    let died = Instant::now();
    let lease = here.acquire_lock("r", LONG).await.unwrap().expect("its time is over");
    let (waited, is_over) = (died.elapsed(), is_over(end));
    println!("taken over from a killed process, TTL {TTL:?}: {waited:.1?}");
    assert!(waited < TTL + Duration::from_secs(10), "{waited:?}");
    assert!(store.is_local() || is_over, "nothing proves its death elsewhere, and it was taken over after {waited:?}");
    assert!(lease.token().0 > token, "with a higher token");
    here.with_lease(&lease).set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    lease.release().await.unwrap();
    here.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_opens_after_the_holder_died_does_not_wait_either() {
    let store = Store::of("database");
    let mut peer = Peer::start(&store.place);
    assert!(peer.ask("lock r 30000 0").starts_with("locked"));
    peer.kill();
    let here = store.open().await;
    assert!(here.list_locks().await.unwrap().is_empty(), "a lock of a dead process is no lock");
    let lease = here.acquire_lock("r", NOW).await.unwrap().expect("its holder is dead");
    lease.release().await.unwrap();
    here.close().await.unwrap();
}

async fn a_stopped_process_is_not_dead_and_its_late_write_is_refused(store: Store) {
    const TTL: Duration = Duration::from_secs(3);
    let here = store.open().await;
    here.create_run("r", NewRun::running()).await.unwrap();
    let mut peer = Peer::start(&store.place);
    assert!(peer.ask("lock r 3000 0").starts_with("locked"));
    assert_eq!(peer.ask("fenced r n"), "written");
    let end = its_end(&here).await;
    peer.signal("-STOP");
    let stopped = Instant::now();
    let processes = here.backend().processes().await.unwrap();
    assert!(processes.iter().all(|process| process.alive != Some(false)), "{processes:?}");
    let options = LockOptions::new().ttl(Duration::from_secs(30));
    let lease = here.acquire(LeaseKey::run(RunId::new("r").unwrap()), options, LONG).await.unwrap().expect("its time is over");
    let (waited, is_over) = (stopped.elapsed(), is_over(end));
    println!("taken over from a stopped process, TTL {TTL:?}: {waited:.1?}");
    assert!(is_over, "a stopped process was taken for dead after {waited:?}");
    peer.signal("-CONT");
    let late = peer.ask("fenced r n");
    assert!(late.starts_with("refused"), "{late}");
    until("the holder's own view", async || here.list_locks().await.unwrap().len() == 1).await;
    lease.release().await.unwrap();
    here.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_or_missing_proof_proves_nothing() {
    let store = Store::of("database");
    let here = store.open().await;
    let mut peer = Peer::start(&store.place);
    assert!(peer.ask("lock r 30000 0").starts_with("locked"));
    let own = here.backend().process().unwrap().id;
    let owners = store.folder.path().join("state.db.owners");
    let file = std::fs::read_dir(&owners)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_stem().unwrap().to_str() != Some(&*own))
        .unwrap();
    // A copy is nobody's to hold, and lies where the original was.
    let aside = store.folder.path().join("aside");
    std::fs::rename(&file, &aside).unwrap();
    assert!(here.acquire_lock("r", NOW).await.unwrap().is_none(), "nothing is there that proves it");
    std::fs::copy(&aside, &file).unwrap();
    assert!(here.acquire_lock("r", NOW).await.unwrap().is_none(), "a copy proves nothing");
    assert_eq!(here.list_locks().await.unwrap().len(), 1);
    std::fs::rename(&aside, &file).unwrap();
    peer.kill();
    assert!(here.acquire_lock("r", LONG).await.unwrap().is_some(), "the original does");
    here.close().await.unwrap();
}
