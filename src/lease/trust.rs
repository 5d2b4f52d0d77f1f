//! How long a holder may believe that it holds its lease: one word that only ever ends.

use std::fmt;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::error::LostReason;
use super::pause::pause_on;
use crate::store::boot_time;

/// A sleeping machine stops tokio's clock: nobody sleeps longer than this before looking at the time again.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// The time since the machine was started, or what a test puts in its place.
type BootClock = dyn Fn() -> Duration + Send + Sync;

/// Time as leases see it: it counts from the start of the lock manager, never goes back, and goes on while the machine sleeps.
pub(super) struct LeaseTime {
    start: Instant,
    boot: Box<BootClock>,
    boot_start: Duration,
    /// The runtime that it was made on, for who waits without one.
    runtime: Option<Handle>,
}

impl fmt::Debug for LeaseTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseTime").field("start", &self.start).field("boot_start", &self.boot_start).finish_non_exhaustive()
    }
}

impl LeaseTime {
    pub(super) fn new() -> Self {
        Self::with_boot_clock(boot_time)
    }

    fn with_boot_clock(boot: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { start: Instant::now(), boot_start: boot(), boot: Box::new(boot), runtime: Handle::try_current().ok() }
    }

    /// Tokio's clock follows a test's virtual time but stands still while the machine sleeps; the boot clock does the opposite.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed().max((self.boot)().saturating_sub(self.boot_start))
    }

    /// The same moment on tokio's clock, as far as that clock can tell.
    pub(super) fn instant(&self, at: Duration) -> Instant {
        let now = Instant::now();
        now.checked_add(at.saturating_sub(self.now())).unwrap_or(now)
    }

    /// Sleeps until then, or for a second at most.
    pub(super) async fn doze(&self, until: Duration) {
        tokio::time::sleep(until.saturating_sub(self.now()).min(LONGEST_SLEEP)).await;
    }

    /// As [`doze`](Self::doze), also for who has no runtime; `false`: neither has this any more.
    async fn doze_anywhere(&self, until: Duration) -> bool {
        let here = Handle::try_current().is_ok();
        let Some(runtime) = self.runtime.as_ref().filter(|_| !here) else {
            self.doze(until).await;
            return true;
        };
        pause_on(runtime, until.saturating_sub(self.now()).min(LONGEST_SLEEP)).await
    }

    /// Sleeps until then.
    pub(super) async fn sleep_until(&self, until: Option<Duration>) {
        let Some(until) = until else { return pending().await };
        while self.now() < until {
            self.doze(until).await;
        }
    }
}

/// Until when to trust, in microseconds; the last few values say that it is over, and why.
const FOREVER: u64 = u64::MAX - 16;

fn lost_word(reason: LostReason) -> u64 {
    u64::MAX
        - match reason {
            LostReason::Expired => 0,
            LostReason::Forced => 1,
            LostReason::Storage => 2,
            LostReason::RunEnded => 3,
            LostReason::Closed => 4,
            LostReason::Ended => 5,
        }
}

fn lost_reason(word: u64) -> Option<LostReason> {
    [LostReason::Expired, LostReason::Forced, LostReason::Storage, LostReason::RunEnded, LostReason::Closed, LostReason::Ended]
        .into_iter()
        .find(|reason| lost_word(*reason) == word)
}

fn word_of(until: Option<Duration>) -> u64 {
    until.map_or(FOREVER, |until| u64::try_from(until.as_micros()).unwrap_or(FOREVER).min(FOREVER))
}

/// A holder's trust in its lease. Once it has ended it stays so, whoever looks and whatever answer comes late.
#[derive(Debug)]
pub(super) struct Trust {
    word: AtomicU64,
    /// A renewal is due or under way: if trust ends now, the storage is to blame.
    renewing: AtomicBool,
    ended: Notify,
    time: Arc<LeaseTime>,
}

impl Trust {
    /// Trust until then; without an end it lasts until it is taken.
    pub(super) fn new(time: Arc<LeaseTime>, until: Option<Duration>) -> Self {
        Self { word: AtomicU64::new(word_of(until)), renewing: AtomicBool::new(false), ended: Notify::new(), time }
    }

    /// The end of trust (`None`: open), or why it is over.
    pub(super) fn state(&self) -> Result<Option<Duration>, LostReason> {
        loop {
            let word = self.word.load(Ordering::Acquire);
            if let Some(reason) = lost_reason(word) {
                return Err(reason);
            }
            if word == FOREVER {
                return Ok(None);
            }
            let until = Duration::from_micros(word);
            if self.time.now() < until {
                return Ok(Some(until));
            }
            // Whoever sees the end makes it final, so that a renewal answered a moment later cannot take it back.
            self.swap(word, self.overdue());
        }
    }

    fn overdue(&self) -> LostReason {
        if self.renewing.load(Ordering::Acquire) { LostReason::Storage } else { LostReason::Expired }
    }

    fn swap(&self, word: u64, reason: LostReason) -> bool {
        let swapped = self.word.compare_exchange(word, lost_word(reason), Ordering::AcqRel, Ordering::Acquire).is_ok();
        if swapped {
            self.ended.notify_waiters();
        }
        swapped
    }

    /// Ends trust; the first reason stays.
    pub(super) fn lose(&self, reason: LostReason) {
        loop {
            let word = self.word.load(Ordering::Acquire);
            if lost_reason(word).is_some() || self.swap(word, reason) {
                return;
            }
        }
    }

    /// Moves the end of trust, unless it has passed. An earlier end than the known one changes nothing.
    pub(super) fn extend(&self, until: Duration) -> Result<(), LostReason> {
        loop {
            let Some(known) = self.state()? else { return Ok(()) };
            if known >= until {
                return Ok(());
            }
            let (from, to) = (word_of(Some(known)), word_of(Some(until)));
            if self.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return Ok(());
            }
        }
    }

    /// Notes whether a renewal is wanted from the storage.
    pub(super) fn set_renewing(&self, renewing: bool) {
        self.renewing.store(renewing, Ordering::Release);
    }

    /// Waits for the end. Cancel-safe, for any number of waiters.
    pub(super) async fn lost(&self) -> LostReason {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that no end falls between.
            ended.as_mut().enable();
            match self.state() {
                Err(reason) => return reason,
                Ok(None) => ended.await,
                Ok(Some(until)) => tokio::select! {
                    () = ended => {}
                    is_kept = self.time.doze_anywhere(until) => {
                        if !is_kept {
                            // Nobody renews it any more, and nobody is left who would say when it is over.
                            self.lose(LostReason::Closed);
                        }
                    }
                },
            }
        }
    }

    /// How long trust lasts from now on (`None`: open).
    pub(super) fn remaining(&self) -> Option<Duration> {
        match self.state() {
            Ok(until) => until.map(|until| until.saturating_sub(self.time.now())),
            Err(_) => Some(Duration::ZERO),
        }
    }
}

/// How long a holder trusts a lease that lasts this long: less than all of it, by a tenth, 10 ms to 2 s.
pub(super) fn trusted(ttl: Duration) -> Duration {
    let margin = (ttl / 10).clamp(Duration::from_millis(10), Duration::from_secs(2)).min(ttl / 2);
    ttl.saturating_sub(margin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_lost_stays_lost() {
        let time = Arc::new(LeaseTime::new());
        let trust = Trust::new(Arc::clone(&time), Some(time.now() + ms(100)));
        tokio::time::advance(ms(90)).await;
        assert!(trust.extend(time.now() + ms(100)).is_ok());
        tokio::time::advance(ms(90)).await;
        assert!(trust.state().is_ok() && trust.remaining() <= Some(ms(10)));
        tokio::time::advance(ms(10)).await;
        // The answer that comes on the very tick is the first to look.
        assert_eq!(trust.extend(time.now() + ms(100)), Err(LostReason::Expired));
        trust.lose(LostReason::Forced);
        assert_eq!(trust.state(), Err(LostReason::Expired), "the first reason stays");
        assert_eq!((trust.lost().await, trust.remaining()), (LostReason::Expired, Some(Duration::ZERO)));
    }

    /// A machine that sleeps: tokio's clock stands still, the boot clock goes on.
    #[tokio::test(start_paused = true)]
    async fn trust_ends_while_the_machine_sleeps_and_whoever_waits_is_told() {
        const TTL: Duration = Duration::from_secs(3_600);
        let slept = Arc::new(AtomicU64::new(0));
        let boot = Arc::clone(&slept);
        let time = Arc::new(LeaseTime::with_boot_clock(move || ms(7_000 + boot.load(Ordering::SeqCst))));
        let [asked, waited] = [(); 2].map(|()| Trust::new(Arc::clone(&time), Some(time.now() + TTL)));
        let began = Instant::now();
        let mut lost = Box::pin(waited.lost());
        // It waits already.
        assert!(tokio::time::timeout(Duration::ZERO, &mut lost).await.is_err() && asked.state().is_ok());
        slept.store(3_600_000 - 1, Ordering::SeqCst);
        assert!(asked.remaining() <= Some(ms(1)) && asked.state().is_ok(), "{asked:?}");
        slept.store(3_600_000, Ordering::SeqCst);
        assert_eq!(began.elapsed(), Duration::ZERO, "tokio's clock stood still");
        assert_eq!(asked.state(), Err(LostReason::Expired));
        assert_eq!(asked.extend(time.now() + TTL), Err(LostReason::Expired), "a renewal that is answered after the sleep");
        assert_eq!(lost.await, LostReason::Expired);
        assert!(began.elapsed() <= LONGEST_SLEEP, "told {:?} after the machine woke", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn waiters_learn_of_an_end_at_any_moment() {
        let time = Arc::new(LeaseTime::new());
        let open = Trust::new(Arc::clone(&time), None);
        assert_eq!((open.state(), open.remaining()), (Ok(None), None));
        let ((), first, second) = tokio::join!(async { open.lose(LostReason::Storage) }, open.lost(), open.lost());
        assert_eq!((first, second), (LostReason::Storage, LostReason::Storage));
    }

    #[test]
    fn trust_ends_before_the_lease_does() {
        for (ttl, trust) in [(1, 0), (20, 10), (100, 90), (1_000, 900), (30_000, 28_000), (3_600_000, 3_598_000)] {
            assert_eq!(trusted(ms(ttl)).as_millis(), trust, "{ttl}");
        }
    }
}
