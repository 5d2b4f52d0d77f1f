//! Adaptive spinning: where a word came soon the last time, the next one is waited for awake, because putting a thread to sleep and waking it costs a good
//! part of a commit.
//!
//! Pure: who waits says what time it is. He gives his place to others between two looks; where they take it for long, he rests for a while: a thread that
//! sleeps is preferred when it wakes, one that yields comes behind all others.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A look after which others had the processor for so long was the last one of this wait: they have work to do.
const SHARED: Duration = Duration::from_micros(100);
/// As long as a time slice: there are more threads than processors.
const CROWDED: Duration = Duration::from_millis(1);
/// How long nobody spins then.
const REST: Duration = Duration::from_millis(100);

/// Whether it is worth waiting awake.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    was_soon: bool,
    rests_until: Option<Instant>,
}

impl Spin {
    /// Whether it is worth it now.
    pub(crate) fn is_worth_it(&self, now: Instant) -> bool {
        self.was_soon && self.rests_until.is_none_or(|until| now >= until) && several_processors()
    }

    /// Whether to look once more, when the time since the last look was this. A look itself is short.
    pub(crate) fn goes_on(&mut self, since: Duration, now: Instant) -> bool {
        if since >= CROWDED {
            self.rests_until = now.checked_add(REST);
        }
        since < SHARED
    }

    /// The word came, soon or not.
    pub(crate) fn heard(&mut self, soon: bool) {
        self.was_soon = soon;
    }
}

/// On a single processor nothing happens while somebody spins.
fn several_processors() -> bool {
    static SEVERAL: OnceLock<bool> = OnceLock::new();
    *SEVERAL.get_or_init(|| std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_where_the_last_word_came_soon() {
        let (mut spin, now) = (Spin::default(), Instant::now());
        assert!(!spin.is_worth_it(now), "nothing is known yet");
        spin.heard(true);
        assert_eq!(spin.is_worth_it(now), several_processors());
        spin.heard(false);
        assert!(!spin.is_worth_it(now));
    }

    #[test]
    fn who_finds_others_at_work_stops_and_who_finds_a_crowd_rests() {
        let (mut spin, now) = (Spin::default(), Instant::now());
        spin.heard(true);
        assert!(spin.goes_on(Duration::from_micros(99), now));
        assert!(!spin.goes_on(Duration::from_micros(100), now));
        assert_eq!(spin.is_worth_it(now), several_processors(), "the next time it may be quiet");
        assert!(!spin.goes_on(Duration::from_millis(1), now));
        for (later, worth) in [(0, false), (99, false), (100, several_processors())] {
            assert_eq!(spin.is_worth_it(now + Duration::from_millis(later)), worth, "after {later} ms");
        }
    }
}
