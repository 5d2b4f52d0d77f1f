//! Tells a fleet that works on for long from one that hangs.

use std::time::{Duration, Instant};

/// How much was done, and when that grew last.
#[derive(Debug)]
pub(crate) struct Progress {
    done: u64,
    since: Instant,
    patience: Duration,
}

impl Progress {
    /// From now on; `patience` is how long nothing at all may happen.
    pub(crate) fn new(patience: Duration, now: Instant) -> Self {
        Self { done: 0, since: now, patience }
    }

    /// Whether nothing was done for too long: `done` is all that was done until `now`.
    pub(crate) fn hangs(&mut self, done: u64, now: Instant) -> bool {
        if done > self.done {
            (self.done, self.since) = (done, now);
        }
        now.saturating_duration_since(self.since) > self.patience
    }
}
