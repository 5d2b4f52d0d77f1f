//! Where one process writes: leases in this process, on a clock that the test turns.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, advance, timeout};

use super::world::{Door, lost, ms, node, run, start, whole};
use crate::lease::{Lease, LeaseError, LeaseHandle, LockOptions, LostReason};
use crate::model::*;
use crate::store::*;

const LONG: Duration = Duration::from_secs(600);

async fn memory() -> (LeaseHandle, Arc<Door>, MemoryBackend) {
    let backend = MemoryBackend::new();
    let (handle, door) = start(Arc::new(backend.clone())).await;
    (handle, door, backend)
}

async fn get(locks: &LeaseHandle, key: LeaseKey) -> Lease {
    locks.acquire(key, LockOptions::new(), LONG).await.unwrap().unwrap()
}

fn named(name: &str) -> LockOptions {
    LockOptions::new().owner(name)
}

/// Lets a request reach the manager's queue, and no further.
async fn queued<F: Future>(waiting: &mut std::pin::Pin<&mut F>, locks: &LeaseHandle) {
    assert!(timeout(Duration::ZERO, waiting.as_mut()).await.is_err(), "it did not have to wait");
    locks.list().await.unwrap();
}

async fn is_fenced(backend: &MemoryBackend, fence: Fence) -> bool {
    let entry = Entry { fences: vec![fence], ..Entry::default() };
    let answer = backend.commit(Arc::new(Batch::new(vec![entry]))).await.unwrap();
    matches!(answer.outcomes[0], Outcome::Refused(Refusal::Fenced { .. }))
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_exclusive_listed_fenced_and_released_on_drop() {
    let (locks, _, backend) = memory().await;
    let lease = locks.acquire(whole("r"), named("ann").purpose("tests"), Duration::ZERO).await.unwrap().unwrap();
    assert!(locks.acquire(node("r", "n"), LockOptions::new(), Duration::ZERO).await.unwrap().is_none());
    let listed = locks.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((&*listed[0].owner.name, listed[0].purpose.as_deref(), listed[0].token), ("ann", Some("tests"), lease.token()));
    assert_eq!(backend.list_leases().await.unwrap().len(), 1);
    let fence = lease.fence();
    assert!(!is_fenced(&backend, fence.clone()).await);
    advance(LONG).await;
    assert!(!lease.is_lost() && lease.remaining() == Duration::from_secs(30), "it is kept alive");
    drop(lease);
    let next = get(&locks, node("r", "n")).await;
    assert!(next.token() > fence.token);
    assert!(is_fenced(&backend, fence).await);
    assert_eq!(next.run_id(), &run("r"));
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_on_time() {
    let (locks, _, _) = memory().await;
    let held = get(&locks, whole("r")).await;
    let start = Instant::now();
    assert!(locks.acquire(whole("r"), LockOptions::new(), ms(250)).await.unwrap().is_none());
    assert!((ms(250)..ms(270)).contains(&start.elapsed()), "{:?}", start.elapsed());
    held.release().await.unwrap();
    assert!(
        locks.acquire(whole("r"), LockOptions::new(), Duration::MAX).await.unwrap().is_some(),
        "what timed out is not in the way"
    );
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_their_order() {
    let (locks, _, _) = memory().await;
    let first = get(&locks, whole("r")).await;
    let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
    for number in 0..2_000 {
        let (locks, sender) = (locks.clone(), sender.clone());
        tokio::spawn(async move {
            let lease = get(&locks, whole("r")).await;
            sender.send((number, lease.token())).unwrap();
        });
    }
    drop(sender);
    // On one thread the tasks start in their order; each has asked before this one goes on.
    tokio::task::yield_now().await;
    locks.list().await.unwrap();
    drop(first);
    let (mut expected, mut last) = (0, FencingToken(0));
    while let Some((number, token)) = order.recv().await {
        assert_eq!(number, expected);
        assert!(token > last);
        (expected, last) = (expected + 1, token);
    }
    assert_eq!(expected, 2_000);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_while_it_waits_leaves_nothing_behind() {
    let (locks, _, _) = memory().await;
    let held = get(&locks, whole("r")).await;
    let mut next = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    {
        let mut gone = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
        queued(&mut gone, &locks).await;
        queued(&mut next, &locks).await;
    }
    drop(held);
    assert!(timeout(ms(1), next).await.expect("the next one in the queue has it").unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_while_it_waits_is_in_nobodys_way() {
    let (locks, _, _) = memory().await;
    let _held = get(&locks, node("r", "a")).await;
    let mut behind = pin!(locks.acquire(node("r", "b"), LockOptions::new(), LONG));
    {
        let mut gone = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
        queued(&mut gone, &locks).await;
        queued(&mut behind, &locks).await;
    }
    assert!(timeout(ms(1), behind).await.expect("nobody is ahead any more").unwrap().is_some());
}

fn is_send<T: Send>(_: T) {}

fn is_send_and_sync<T: Send + Sync>() {}

/// A lease and its futures go from thread to thread: that this compiles is the test.
#[expect(dead_code, reason = "it is checked by the compiler alone")]
fn goes_from_thread_to_thread(lease: Lease, locks: &LeaseHandle) {
    is_send_and_sync::<(Lease, LeaseHandle, LeaseError, LockOptions)>();
    is_send(locks.acquire(whole("r"), LockOptions::new(), LONG));
    is_send((lease.lost(), lease.renew()));
    is_send(lease.release());
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_after_the_reply_was_sent_releases() {
    let (locks, _, _) = memory().await;
    get(&locks, whole("warm")).await.release().await.unwrap();
    {
        let mut granted = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
        // Polled once: the request is sent. Then the manager answers, and nobody looks.
        std::future::poll_fn(|context| {
            assert!(granted.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        assert_eq!(locks.list().await.unwrap().len(), 1);
    }
    assert_eq!(locks.list().await.unwrap(), []);
    assert!(locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_lease_and_a_wait_that_end_on_the_same_tick_have_one_outcome() {
    let (locks, _, _) = memory().await;
    let holder = locks.acquire(whole("r"), LockOptions::new().ttl(ms(50)).keep_alive(false), LONG).await.unwrap().unwrap();
    let waiting = locks.acquire(whole("r"), LockOptions::new(), ms(50));
    let lease = waiting.await.unwrap();
    assert_eq!(lost(&holder).await, LostReason::Expired);
    let held = locks.list().await.unwrap();
    assert_eq!(held.len(), usize::from(lease.is_some()), "told and kept alike");
    assert!(held.iter().all(|record| record.token != holder.token()));
}

#[tokio::test(start_paused = true)]
async fn deadlock_and_re_entry_are_refused_with_the_names() {
    let (locks, _, _) = memory().await;
    let a = locks.acquire(whole("a"), named("ann"), LONG).await.unwrap().unwrap();
    let _b = locks.acquire(whole("b"), named("bob"), LONG).await.unwrap().unwrap();
    let mut ann = pin!(locks.acquire(node("b", "n"), named("ann"), LONG));
    queued(&mut ann, &locks).await;
    let error = locks.acquire(whole("a"), named("bob"), LONG).await.unwrap_err();
    assert!(error.is_conflict());
    let text = error.to_string();
    assert!(text.contains(r#"run "a""#) && text.contains(r#""bob" waits for "ann" waits for "bob""#), "{text}");
    let text = locks.acquire(node("a", "x"), named("ann"), LONG).await.unwrap_err().to_string();
    assert!(text.contains("ann") && text.contains(r#"node "x" of run "a""#) && text.contains("reentrant"), "{text}");
    let again = locks.acquire(whole("a"), named("ann").reentrant(true), LONG).await.unwrap().unwrap();
    assert_eq!(again.token(), a.token());
    drop(a);
    assert!(locks.acquire(whole("a"), LockOptions::new(), Duration::ZERO).await.unwrap().is_none(), "entered twice, left once");
    again.release().await.unwrap();
    assert!(locks.acquire(whole("a"), LockOptions::new(), Duration::ZERO).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn two_requests_of_a_re_entrant_owner_share_one_grant() {
    let (locks, _, _) = memory().await;
    let held = get(&locks, whole("r")).await;
    let mut one = pin!(locks.acquire(whole("r"), named("ann").reentrant(true), LONG));
    let mut other = pin!(locks.acquire(whole("r"), named("bob"), LONG));
    let mut two = pin!(locks.acquire(whole("r"), named("ann").reentrant(true), LONG));
    queued(&mut one, &locks).await;
    queued(&mut other, &locks).await;
    queued(&mut two, &locks).await;
    drop(held);
    let (one, two) = (one.await.unwrap().unwrap(), two.await.unwrap().unwrap());
    assert_eq!(one.token(), two.token());
    drop(one);
    queued(&mut other, &locks).await;
    drop(two);
    assert!(other.await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_kept_alive_expires_unless_it_is_renewed() {
    let (locks, _, backend) = memory().await;
    let lease = locks.acquire(whole("r"), LockOptions::new().ttl(ms(100)).keep_alive(false), LONG).await.unwrap().unwrap();
    let mut waiting = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    for _ in 0..5 {
        tokio::time::sleep(ms(80)).await;
        lease.renew().await.unwrap();
        assert!((ms(90)..=ms(100)).contains(&lease.remaining()), "{:?}", lease.remaining());
        queued(&mut waiting, &locks).await;
    }
    assert!(!is_fenced(&backend, lease.fence()).await);
    let before = Instant::now();
    let next = waiting.await.unwrap().unwrap();
    assert!((ms(90)..ms(120)).contains(&before.elapsed()), "{:?}", before.elapsed());
    assert!(lease.is_lost() && lease.remaining().is_zero());
    assert_eq!(tokio::join!(lease.lost(), lease.lost()), (LostReason::Expired, LostReason::Expired));
    assert!(is_fenced(&backend, lease.fence()).await);
    assert!(matches!(lease.renew().await, Err(LeaseError::Lost { reason: LostReason::Expired, .. })));
    assert!(matches!(lease.release().await, Err(LeaseError::Lost { .. })));
    assert!(!next.is_lost() && !is_fenced(&backend, next.fence()).await, "the new holder is untouched");
}

#[tokio::test(start_paused = true)]
async fn bad_options_are_refused_and_the_shortest_ttl_holds() {
    let (locks, _, _) = memory().await;
    let long = "x".repeat(1025);
    for (bad, says) in [
        (LockOptions::new().ttl(Duration::ZERO), "1 ms"),
        (LockOptions::new().ttl(Duration::MAX), "1 h"),
        (LockOptions::new().ttl(ms(3_600_001)), "1 h"),
        (LockOptions::new().ttl(ms(99)), "keep_alive(false)"),
        (LockOptions::new().reentrant(true), "owner"),
        (named(""), "empty"),
        (named("a\nb"), "control"),
        (named(&long), "1024"),
        (LockOptions::new().purpose(&long), "1024"),
    ] {
        let error = locks.acquire(whole("r"), bad, LONG).await.unwrap_err();
        assert!(matches!(error, LeaseError::Input(_)), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }
    for _ in 0..100 {
        let brief = locks.acquire(whole("r"), LockOptions::new().ttl(ms(1)).keep_alive(false), LONG).await.unwrap().unwrap();
        assert!(locks.list().await.unwrap().len() <= 1);
        drop(brief);
    }
}

#[tokio::test(start_paused = true)]
async fn force_unlock_takes_it_from_the_holder_only() {
    let (locks, _, backend) = memory().await;
    let old = get(&locks, whole("r")).await;
    let mut waiting = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    queued(&mut waiting, &locks).await;
    let record = locks.force_unlock(old.token()).await.unwrap();
    assert_eq!(record.token, old.token());
    assert_eq!(lost(&old).await, LostReason::Forced);
    assert!(is_fenced(&backend, old.fence()).await);
    let new = waiting.await.unwrap().unwrap();
    let token = old.token();
    drop(old);
    assert_eq!(locks.list().await.unwrap().len(), 1, "the release of an old token is nothing");
    assert!(!new.is_lost());
    let unknown = locks.force_unlock(token).await.unwrap_err();
    assert!(matches!(unknown, LeaseError::NotFound { .. }) && unknown.to_string().contains(&token.to_string()));
}

/// Looks into the book in the very moment in which a holder is woken.
struct Looker {
    book: Arc<LeaseBook>,
    fence: Fence,
    found: std::sync::Mutex<Vec<bool>>,
}

impl std::task::Wake for Looker {
    fn wake(self: Arc<Self>) {
        self.found.lock().unwrap().push(self.book.holds(&self.fence));
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_hears_that_a_lock_is_lost_writes_nothing_under_it_any_more() {
    for by_force in [false, true] {
        let (locks, _, backend) = memory().await;
        let LeaseStore::Book(book) = backend.lease_store() else { panic!("it has a book") };
        let lease = get(&locks, node("r", "a")).await;
        let looker = Arc::new(Looker { book: Arc::clone(&book), fence: lease.fence(), found: std::sync::Mutex::default() });
        let waker = std::task::Waker::from(Arc::clone(&looker));
        let mut told = pin!(lease.lost());
        assert!(told.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
        if by_force {
            locks.force_unlock(lease.token()).await.unwrap();
        } else {
            book.remove(lease.key(), lease.token());
            locks.free_run(&run("r"));
        }
        lost(&lease).await;
        assert_eq!(*looker.found.lock().unwrap(), [false], "by force: {by_force}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_place_whose_run_ended_before_it_was_confirmed_becomes_no_lease() {
    let (locks, _, backend) = memory().await;
    let commit = async |base, mutation| {
        let part = RunPart { run: run("r"), base, expect: base, guards: vec![], mutations: vec![mutation], after: None };
        let entry = Entry { parts: vec![part], ..Entry::default() };
        let answer = backend.commit(Arc::new(Batch::new(vec![entry]))).await.unwrap();
        let Outcome::Applied(receipt) = &answer.outcomes[0] else { panic!("{answer:?}") };
        receipt.runs[0].after
    };
    let at = SystemClock.now();
    let made = commit(Version::NONE, Mutation::Create { run: NewRun::running(), at }).await;
    let [first, second] = ["a", "b"].map(|name| locks.reserve(node("r", name), LockOptions::new()));
    let place = first.await.unwrap().unwrap();
    let kept = second.await.unwrap().unwrap().confirm(None).await.unwrap();
    assert_eq!(backend.list_leases().await.unwrap().len(), 1, "a place is no lease yet");
    commit(made, Mutation::Update { update: RunUpdate::success(), at }).await;
    // The manager has not heard of the end.
    assert!(is_fenced(&backend, kept.fence()).await);
    assert!(kept.renew().await.is_err(), "it is not brought back by a renewal");
    assert!(matches!(place.confirm(None).await, Err(LeaseError::RunEnded { .. })));
    assert!(backend.list_leases().await.unwrap().is_empty());
    locks.free_run(&run("r"));
    assert_eq!(lost(&kept).await, LostReason::RunEnded);
    assert!(locks.reserve(node("r", "a"), LockOptions::new()).await.unwrap().is_some(), "its place is free");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_run_frees_its_locks_and_tells_its_waiters() {
    let (locks, _, backend) = memory().await;
    let lease = get(&locks, node("r", "a")).await;
    let other = get(&locks, whole("other")).await;
    let mut waiting = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    queued(&mut waiting, &locks).await;
    let LeaseStore::Book(book) = backend.lease_store() else { panic!("it has a book") };
    // As its commit did.
    book.remove(lease.key(), lease.token());
    locks.free_run(&run("r"));
    assert!(matches!(waiting.await, Err(LeaseError::RunEnded { .. })));
    assert_eq!(lost(&lease).await, LostReason::RunEnded);
    assert!(is_fenced(&backend, lease.fence()).await);
    assert!(!other.is_lost());
    assert!(locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO).await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn what_the_holder_deferred_is_flushed_before_the_next_one_has_the_lock() {
    let (locks, door, backend) = memory().await;
    for lost in [false, true] {
        door.flush_gate.send_replace(false);
        let held = get(&locks, whole("r")).await;
        door.deferred.store(true, Ordering::SeqCst);
        let (fence, token) = (held.fence(), held.token());
        let mut waiting = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
        queued(&mut waiting, &locks).await;
        if lost {
            locks.force_unlock(token).await.unwrap();
        } else {
            drop(held);
        }
        tokio::time::sleep(ms(100)).await;
        queued(&mut waiting, &locks).await;
        assert_eq!(is_fenced(&backend, fence).await, lost, "what was written before a release is still covered");
        door.flush_gate.send_replace(true);
        assert!(waiting.await.unwrap().is_some());
    }
    assert_eq!(door.flushes.load(Ordering::SeqCst), 2, "and no flush where nothing was deferred");
}

#[tokio::test(start_paused = true)]
async fn close_answers_everybody() {
    let (locks, door, backend) = memory().await;
    let lease = get(&locks, whole("r")).await;
    let mut waiting = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    queued(&mut waiting, &locks).await;
    door.deferred.store(true, Ordering::SeqCst);
    locks.close().await;
    assert_eq!(door.flushes.load(Ordering::SeqCst), 1);
    assert!(matches!(waiting.await, Err(LeaseError::Closed)));
    assert_eq!(lost(&lease).await, LostReason::Closed);
    assert_eq!(backend.list_leases().await.unwrap(), []);
    assert!(matches!(locks.acquire(whole("x"), LockOptions::new(), LONG).await, Err(LeaseError::Closed)));
    locks.close().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_closes() {
    let (locks, _, backend) = memory().await;
    let lease = get(&locks, whole("r")).await;
    drop(locks);
    assert_eq!(lost(&lease).await, LostReason::Closed);
    assert_eq!(backend.list_leases().await.unwrap(), []);
}

#[test]
fn a_guard_is_dropped_outside_of_a_runtime() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (locks, lease) = runtime.block_on(async {
        let (locks, _, _) = memory().await;
        let lease = get(&locks, whole("r")).await;
        (locks, lease)
    });
    std::thread::spawn(move || drop(lease)).join().unwrap();
    assert!(runtime.block_on(locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO)).unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn the_death_of_the_manager_is_told_and_tokens_go_on_rising() {
    let backend = Arc::new(MemoryBackend::new());
    let (locks, _) = start(Arc::<MemoryBackend>::clone(&backend)).await;
    let lease = get(&locks, whole("r")).await;
    let mut waiting = pin!(locks.acquire(whole("r"), LockOptions::new(), LONG));
    queued(&mut waiting, &locks).await;
    locks.kill_manager();
    assert!(matches!(waiting.await, Err(LeaseError::Closed)));
    assert_eq!(lost(&lease).await, LostReason::Closed);
    assert!(is_fenced(&backend, lease.fence()).await, "nobody writes under a lease that nobody looks after");
    backend.close().await.unwrap();
    let (again, _) = start(Arc::new(MemoryBackend::clone(&backend))).await;
    let next = get(&again, node("r", "n")).await;
    assert!(next.token() > lease.token());
}

/// A store in memory that can fail to reserve tokens.
#[derive(Debug, Default)]
struct NoTokens {
    memory: MemoryBackend,
    failing: AtomicBool,
}

impl StateBackend for NoTokens {
    fn name(&self) -> &'static str {
        "no tokens"
    }
    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.memory.initialize()
    }
    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.memory.commit(batch)
    }
    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.memory.load_run(run)
    }
    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.memory.list_runs(query)
    }
    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.memory.list_leases()
    }
    fn lease_store(&self) -> LeaseStore {
        self.memory.lease_store()
    }
    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        if self.failing.load(Ordering::SeqCst) {
            return Box::pin(async { Err(StoreError::not_applied(StoreErrorKind::Full, "no space for tokens")) });
        }
        self.memory.reserve_tokens(count)
    }
}

#[tokio::test(start_paused = true)]
async fn without_tokens_nothing_is_granted_and_nothing_leaks() {
    let backend = Arc::new(NoTokens::default());
    backend.failing.store(true, Ordering::SeqCst);
    let (locks, _) = start(Arc::<NoTokens>::clone(&backend)).await;
    let (one, two) =
        tokio::join!(locks.acquire(whole("r"), LockOptions::new(), LONG), locks.acquire(whole("r"), LockOptions::new(), LONG));
    for error in [one.unwrap_err(), two.unwrap_err()] {
        assert!(error.is_retryable() && error.to_string().contains("no space"), "{error}");
    }
    backend.failing.store(false, Ordering::SeqCst);
    assert!(locks.acquire(whole("r"), LockOptions::new(), Duration::ZERO).await.unwrap().is_some());
}
