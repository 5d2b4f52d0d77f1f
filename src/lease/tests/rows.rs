//! Where many processes write: leases as rows, real time, and a storage that is slow, silent or gone.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::world::{Rows, lost, ms, node, start, until, whole};
use crate::lease::{Lease, LeaseError, LeaseHandle, LockOptions, LostReason};
use crate::store::StateBackend;

const LONG: Duration = Duration::from_secs(600);

async fn open(rows: &Rows) -> LeaseHandle {
    start(Arc::new(rows.clone())).await.0
}

fn brief() -> LockOptions {
    LockOptions::new().ttl(ms(300))
}

async fn get(locks: &LeaseHandle, options: LockOptions) -> Lease {
    locks.acquire(whole("r"), options, LONG).await.unwrap().unwrap()
}

#[tokio::test]
async fn two_processes_exclude_each_other_and_tokens_rise() {
    let rows = Rows::new();
    let other = rows.another();
    assert_ne!(rows.process(), other.process(), "two openings are two owners");
    let (here, there) = (open(&rows).await, open(&other).await);
    let first = get(&here, LockOptions::new().owner("same name")).await;
    let try_once = there.acquire(node("r", "n"), LockOptions::new().owner("same name"), Duration::ZERO);
    assert!(try_once.await.unwrap().is_none());
    let started = Instant::now();
    assert!(there.acquire(whole("r"), LockOptions::new(), ms(120)).await.unwrap().is_none());
    assert!(started.elapsed() >= ms(120));
    let mut waiting = pin!(there.acquire(whole("r"), LockOptions::new(), LONG));
    assert!(tokio::time::timeout(ms(200), &mut waiting).await.is_err());
    let token = first.token();
    first.release().await.unwrap();
    let second = waiting.await.unwrap().unwrap();
    assert!(second.token() > token);
    assert_eq!(there.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn waiters_of_one_process_are_served_in_order_before_storage_is_asked() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    let held = get(&locks, LockOptions::new()).await;
    let mut one = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    let mut two = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    assert!(tokio::time::timeout(Duration::ZERO, &mut one).await.is_err());
    assert!(tokio::time::timeout(ms(150), &mut two).await.is_err());
    assert_eq!(rows.shared.grants_asked.load(Ordering::SeqCst), 1, "who waits for a holder here does not bother the storage");
    drop(held);
    let one = one.await.unwrap().unwrap();
    assert!(tokio::time::timeout(ms(20), &mut two).await.is_err());
    drop(one);
    assert!(two.await.unwrap().is_some());
}

#[tokio::test]
async fn a_storage_that_panics_when_it_is_looked_at_keeps_nobody_waiting() {
    let rows = Rows::new();
    let (here, there) = (open(&rows).await, open(&rows.another()).await);
    let held = get(&here, LockOptions::new()).await;
    rows.shared.listings_panic.store(3, Ordering::SeqCst);
    let answer = tokio::time::timeout(ms(30_000), there.acquire(whole("r"), LockOptions::new(), ms(300))).await;
    assert!(answer.expect("the wait ends in time").unwrap().is_none());
    let mut waiting = pin!(there.acquire(whole("r"), LockOptions::new(), LONG));
    assert!(tokio::time::timeout(ms(300), &mut waiting).await.is_err());
    drop(held);
    assert!(waiting.await.unwrap().is_some());
}

#[tokio::test]
async fn a_dead_holder_is_taken_over_after_its_own_ttl() {
    let rows = Rows::new();
    let dead = open(&rows).await;
    let lease = get(&dead, LockOptions::new().ttl(ms(400))).await;
    let started = Instant::now();
    // Like a process that stops: renewals no longer go out, and no release does.
    dead.kill_manager();
    std::mem::forget(lease);
    let heir = open(&rows.another()).await;
    let next = get(&heir, LockOptions::new().ttl(ms(100)).keep_alive(false)).await;
    assert!(started.elapsed() >= ms(350), "the holder's TTL counts, not the heir's: {:?}", started.elapsed());
    drop(next);
}

/// Every worker of the holder's runtime is blocked for longer than the TTL.
#[test]
fn a_blocked_runtime_loses_no_lease() {
    let rows = Rows::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (locks, lease) = runtime.block_on(async {
        let locks = open(&rows).await;
        let lease = get(&locks, LockOptions::new().ttl(ms(5_000))).await;
        (locks, lease)
    });
    let asked = rows.shared.renewals_asked.load(Ordering::SeqCst);
    runtime.block_on(runtime.spawn(async { std::thread::sleep(ms(11_000)) })).unwrap();
    assert!(rows.shared.renewals_asked.load(Ordering::SeqCst) > asked);
    assert_eq!(rows.held().len(), 1);
    assert!(!lease.is_lost());
    drop(lease);
    runtime.block_on(locks.close());
    assert!(rows.held().is_empty(), "released at close");
}

#[tokio::test]
async fn a_silent_storage_costs_the_lease_and_a_late_answer_does_not_bring_it_back() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    let lease = get(&locks, brief()).await;
    rows.shared.renewals.send_replace(false);
    assert_eq!(lost(&lease).await, LostReason::Storage);
    let extended = rows.held();
    assert!(extended.iter().all(|held| held.token == lease.token()), "the row may still be there: {extended:?}");
    rows.shared.renewals.send_replace(true);
    until("the row is given back", || rows.held().is_empty()).await;
    assert!(lease.is_lost() && lease.remaining().is_zero());
    assert!(matches!(lease.renew().await, Err(LeaseError::Lost { reason: LostReason::Storage, .. })));
}

#[tokio::test]
async fn renewals_that_fail_are_tried_again_as_long_as_there_is_trust() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    let lease = get(&locks, LockOptions::new().ttl(ms(10_000))).await;
    rows.shared.renewals_fail.store(true, Ordering::SeqCst);
    until("it could not be renewed", || rows.shared.renewals_failed.load(Ordering::SeqCst) >= 2).await;
    let before = lease.remaining();
    rows.shared.renewals_fail.store(false, Ordering::SeqCst);
    until("it was renewed", || lease.remaining() > before).await;
    assert!(!lease.is_lost());
    lease.release().await.unwrap();
    let lease = get(&locks, LockOptions::new().ttl(ms(5_000))).await;
    rows.shared.renewals_fail.store(true, Ordering::SeqCst);
    assert_eq!(lost(&lease).await, LostReason::Storage);
}

#[tokio::test]
async fn a_lease_forced_in_another_process_is_noticed() {
    let rows = Rows::new();
    let (here, there) = (open(&rows).await, open(&rows.another()).await);
    let lease = get(&here, brief()).await;
    assert_eq!(there.force_unlock(lease.token()).await.unwrap().token, lease.token());
    assert_eq!(lost(&lease).await, LostReason::Forced);
    assert!(matches!(there.force_unlock(lease.token()).await, Err(LeaseError::NotFound { .. })));
    assert!(here.acquire(whole("r"), brief(), LONG).await.unwrap().is_some(), "and its place here is free");
}

/// However many others commit, and however many leases are held here.
#[tokio::test]
async fn what_others_commit_costs_holders_a_look_a_second_and_no_renewals() {
    let rows = Rows::new();
    let (here, there) = (open(&rows).await, open(&rows.another()).await);
    let options = || LockOptions::new().ttl(ms(3_600_000));
    let mut held = Vec::new();
    for index in 0..50 {
        held.push(here.acquire(node("r", &format!("n{index}")), options(), LONG).await.unwrap().unwrap());
    }
    let (asked, began) = (|| rows.shared.listings_asked.load(Ordering::SeqCst), Instant::now());
    for _ in 0..200 {
        here.foreign_commits();
        tokio::time::sleep(ms(5)).await;
    }
    until("it is looked at", || asked() > 0).await;
    let most = began.elapsed().as_secs() + 1;
    assert!(asked() as u64 <= most, "{} looks, of {most}", asked());
    assert_eq!(rows.shared.renewals_asked.load(Ordering::SeqCst), 0, "none is missed");
    there.force_unlock(held[7].token()).await.unwrap();
    here.foreign_commits();
    assert_eq!(lost(&held[7]).await, LostReason::Forced);
    assert_eq!(rows.shared.renewals_asked.load(Ordering::SeqCst), 1, "the one that is missed is asked for");
    assert_eq!(held.iter().filter(|lease| lease.is_lost()).count(), 1);
}

#[tokio::test]
async fn a_lease_that_was_taken_away_is_free_at_once() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    for _ in 0..20 {
        let lease = get(&locks, LockOptions::new()).await;
        locks.force_unlock(lease.token()).await.unwrap();
        let next = locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO).await.unwrap();
        assert!(next.is_some(), "its row is gone: nothing has to be given back first");
        assert_eq!(lost(&lease).await, LostReason::Forced);
        next.unwrap().release().await.unwrap();
    }
}

#[tokio::test]
async fn an_unknown_outcome_of_a_grant_is_an_error_and_leaves_no_row() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    rows.shared.lose_answer.store(true, Ordering::SeqCst);
    let error = locks.acquire(whole("r"), LockOptions::new(), LONG).await.unwrap_err();
    assert!(error.is_unknown_outcome(), "{error}");
    assert!(rows.held().is_empty());
    assert!(locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO).await.unwrap().is_some());
}

#[tokio::test]
async fn a_storage_that_panics_when_it_is_asked_for_a_lost_grant_keeps_nobody_waiting() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    rows.shared.lose_answer.store(true, Ordering::SeqCst);
    rows.shared.listings_panic.store(1, Ordering::SeqCst);
    let asked = tokio::time::timeout(ms(20_000), locks.acquire(whole("r"), LockOptions::new(), LONG)).await;
    assert!(asked.expect("who asked is answered").unwrap_err().is_unknown_outcome());
    let again = tokio::time::timeout(ms(20_000), locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO)).await;
    assert!(again.expect("so is who asks for it next").unwrap().is_none(), "its row ends by its time");
    tokio::time::timeout(ms(20_000), locks.close()).await.expect("it can be closed");
}

#[tokio::test]
async fn a_caller_that_goes_while_storage_decides_leaves_no_row() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    rows.shared.grants.send_replace(false);
    {
        let mut gone = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
        assert!(tokio::time::timeout(ms(1), &mut gone).await.is_err());
        until("the storage is asked", || rows.shared.grants_asked.load(Ordering::SeqCst) == 1).await;
    }
    let mut next = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    assert!(tokio::time::timeout(ms(1), &mut next).await.is_err());
    rows.shared.grants.send_replace(true);
    let next = next.await.unwrap().unwrap();
    let held = rows.held();
    assert_eq!(held.iter().map(|held| held.token).collect::<Vec<_>>(), [next.token()]);
}

#[tokio::test]
async fn a_release_during_a_renewal_stays_a_release() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    let lease = get(&locks, brief()).await;
    rows.shared.renewals.send_replace(false);
    until("a renewal is under way", || rows.shared.renewals_asked.load(Ordering::SeqCst) == 1).await;
    lease.release().await.unwrap();
    rows.shared.renewals.send_replace(true);
    assert!(rows.held().is_empty());
    let next = get(&open(&rows.another()).await, brief()).await;
    assert!(!next.is_lost());
    assert_eq!(rows.held().len(), 1);
}

#[tokio::test]
async fn by_hand_a_lease_is_renewed_or_expires() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    let lease = get(&locks, LockOptions::new().ttl(ms(10_000)).keep_alive(false)).await;
    let granted = lease.remaining();
    until("its time passes", || lease.remaining() + ms(600) < granted).await;
    let before = lease.remaining();
    lease.renew().await.unwrap();
    let renewed = lease.remaining();
    assert!(renewed > before, "{before:?}, then {renewed:?}");
    lease.release().await.unwrap();
    let lease = get(&locks, LockOptions::new().ttl(ms(1_000)).keep_alive(false)).await;
    assert_eq!(lost(&lease).await, LostReason::Expired);
    until("the row is given back", || rows.held().is_empty()).await;
    assert_eq!(rows.shared.renewals_asked.load(Ordering::SeqCst), 1, "nobody kept it alive");
}

#[tokio::test]
async fn a_grant_that_comes_later_than_it_would_last_is_given_back() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    rows.shared.grants.send_replace(false);
    let mut late = pin!(locks.acquire(whole("r"), LockOptions::new().ttl(ms(20)).keep_alive(false), LONG));
    assert!(tokio::time::timeout(ms(60), &mut late).await.is_err());
    rows.shared.grants.send_replace(true);
    let error = late.await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("longer ttl"), "{error}");
    until("the row is given back", || rows.held().is_empty()).await;
}

#[tokio::test]
async fn the_shortest_ttl_of_all_is_no_panic() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    for _ in 0..20 {
        let brief = locks.acquire(whole("r"), LockOptions::new().ttl(ms(1)).keep_alive(false), LONG).await;
        match brief {
            Ok(lease) => drop(lease.unwrap()),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
}

#[tokio::test]
async fn a_renewal_counts_from_when_it_was_asked_for() {
    let rows = Rows::new();
    let locks = open(&rows).await;
    let lease = get(&locks, LockOptions::new().ttl(ms(9_000))).await;
    let asked = rows.shared.renewals_asked.load(Ordering::SeqCst);
    rows.shared.renewals.send_replace(false);
    until("a renewal is asked for", || rows.shared.renewals_asked.load(Ordering::SeqCst) > asked).await;
    let since = Instant::now();
    tokio::time::sleep(ms(2_000)).await;
    let before = lease.remaining();
    rows.shared.renewals.send_replace(true);
    until("it was renewed", || lease.remaining() > before).await;
    let until = since.elapsed() + lease.remaining();
    assert!(until <= ms(9_000), "trusted for {until:?} from when it was asked for");
    lease.release().await.unwrap();
}
