//! When a connection moved last: its driver is woken by what the socket takes and gives. An answer is waited for as long as something moves, however long it
//! is.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// When something moved last.
#[derive(Debug)]
pub(super) struct Moved {
    began: Instant,
    /// Milliseconds since then.
    last: AtomicU64,
}

impl Moved {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), last: AtomicU64::new(0) }
    }

    /// Something moves.
    pub(super) fn note(&self) {
        self.last.store(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Release);
    }

    fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last.load(Ordering::Acquire))
    }

    /// What `work` brings; `None` once nothing has moved for so long.
    pub(super) async fn wait<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let began = Instant::now();
        loop {
            let deadline = self.last().max(began) + limit;
            match tokio::time::timeout_at(deadline, work.as_mut()).await {
                Ok(done) => return Some(done),
                Err(_) if self.last().max(began) + limit > deadline => {}
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_moves_is_waited_for_and_what_does_not_is_not() {
        let (second, limit) = (Duration::from_secs(1), Duration::from_secs(10));
        let moved = Arc::new(Moved::new());
        let driver = Arc::clone(&moved);
        tokio::spawn(async move {
            for _ in 0..50 {
                tokio::time::sleep(second).await;
                driver.note();
            }
        });
        assert_eq!(moved.wait(limit, tokio::time::sleep(second * 45)).await, Some(()));
        let began = Instant::now();
        assert_eq!(moved.wait(limit, std::future::pending::<()>()).await, None);
        assert_eq!(began.elapsed().as_secs(), 15, "five more seconds it moved");
        let began = Instant::now();
        assert_eq!(moved.wait(limit, std::future::pending::<()>()).await, None);
        assert_eq!(began.elapsed().as_secs(), 10, "what was quiet before has as long");
    }
}
