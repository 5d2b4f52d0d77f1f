//! Bounded admission: mailboxes are unbounded, so callers take a permit before they send anything.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, TryAcquireError};

/// Bytes are counted in units of this size, because a semaphore counts in 32 bits.
const UNIT: usize = 256;

/// Why nothing was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Overloaded {
    /// All permits are taken now.
    #[error("the coordinator is full; wait for earlier writes or raise its limits")]
    Full,
    /// No more permits are given.
    #[error("the coordinator is closed")]
    Closed,
}

/// The right to have one entry on its way. It travels with the entry and is given back when that is settled.
#[derive(Debug)]
pub(crate) struct Permit {
    _count: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// Bounds entries on their way by number and by bytes.
#[derive(Debug)]
pub(crate) struct Admission {
    count: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    units: u32,
    entries: usize,
}

impl Admission {
    pub(crate) fn new(entries: usize, bytes: usize) -> Self {
        let units = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).max(1);
        // So many that all of them can be taken at once.
        let entries = entries.clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Self {
            count: Arc::new(Semaphore::new(entries)),
            entries,
            bytes: Arc::new(Semaphore::new(usize::try_from(units).unwrap_or(1))),
            units,
        }
    }

    /// An entry larger than the whole bound takes all of it: it goes alone, and not never.
    fn units(&self, weight: usize) -> u32 {
        u32::try_from(weight.div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(1, self.units)
    }

    /// Waits for a permit, in the order of calls. Dropping the future gives everything back.
    pub(crate) async fn acquire(&self, weight: usize) -> Result<Permit, Overloaded> {
        match self.try_acquire(weight) {
            Err(Overloaded::Full) => {}
            decided => return decided,
        }
        let count = Arc::clone(&self.count).acquire_owned().await.map_err(|_| Overloaded::Closed)?;
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(self.units(weight)).await.map_err(|_| Overloaded::Closed)?;
        Ok(Permit { _count: count, _bytes: bytes })
    }

    /// A permit now, or not.
    pub(crate) fn try_acquire(&self, weight: usize) -> Result<Permit, Overloaded> {
        let refuse = |error| match error {
            TryAcquireError::Closed => Overloaded::Closed,
            TryAcquireError::NoPermits => Overloaded::Full,
        };
        let count = Arc::clone(&self.count).try_acquire_owned().map_err(refuse)?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(self.units(weight)).map_err(refuse)?;
        Ok(Permit { _count: count, _bytes: bytes })
    }

    /// Waits until everything that was admitted is settled. As long as the answer is held nobody else is admitted.
    pub(crate) async fn drained(&self) -> Option<SemaphorePermit<'_>> {
        let all = u32::try_from(self.entries).unwrap_or(u32::MAX);
        self.count.acquire_many(all).await.ok()
    }

    /// Gives no more permits; who waits is refused.
    pub(crate) fn close(&self) {
        self.count.close();
        self.bytes.close();
    }

    /// Whether one entry at most is on its way.
    pub(crate) fn is_of_one(&self) -> bool {
        self.count.available_permits().saturating_add(1) >= self.entries
    }

    /// How many more entries would be admitted now.
    pub(crate) fn available(&self) -> usize {
        self.count.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bounded_by_number_and_by_bytes() {
        let admission = Admission::new(2, 1024);
        let first = admission.try_acquire(1).unwrap();
        let second = admission.try_acquire(1).unwrap();
        assert_eq!(admission.try_acquire(1).unwrap_err(), Overloaded::Full);
        drop(first);
        let huge = tokio::time::timeout(std::time::Duration::from_millis(20), admission.acquire(1 << 30)).await;
        assert!(huge.is_err(), "the bytes of the other entry are still taken");
        drop(second);
        let _huge = admission.acquire(1 << 30).await.unwrap();
        assert_eq!(admission.try_acquire(1).unwrap_err(), Overloaded::Full);
        admission.close();
        assert_eq!(admission.acquire(1).await.unwrap_err(), Overloaded::Closed);
    }

    #[tokio::test]
    async fn one_entry_is_alone_and_two_are_not() {
        let admission = Admission::new(3, 4096);
        assert!(admission.is_of_one());
        let first = admission.try_acquire(1).unwrap();
        assert!(admission.is_of_one());
        let second = admission.try_acquire(1).unwrap();
        assert!(!admission.is_of_one());
        drop(first);
        assert!(admission.is_of_one());
        drop(second);
        let _nobody_else_is_admitted = admission.drained().await.unwrap();
        assert!(!admission.is_of_one());
    }
}
