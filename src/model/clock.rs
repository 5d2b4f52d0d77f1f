//! The clock that callers bring: stored stamps come from it, and tests bring their own.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::time::to_micros;

/// Where stored stamps come from. No safety argument rests on it: leases run on monotonic time, order on versions.
pub trait Clock: Send + Sync + fmt::Debug + 'static {
    /// The present in UTC; it is cut to whole microseconds before it is stored.
    fn now(&self) -> DateTime<Utc>;
}

impl<C: Clock + ?Sized> Clock for Arc<C> {
    fn now(&self) -> DateTime<Utc> {
        (**self).now()
    }
}

/// The machine's wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the one place where the wall clock is read")]
    fn now(&self) -> DateTime<Utc> {
        to_micros(Utc::now())
    }
}
