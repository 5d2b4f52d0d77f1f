//! Pulls for a backend that has no writer of its own: a task that commits one batch after another until nothing waits.

use std::sync::Arc;

use super::queue::Sink;
use super::shard::{Shard, Untold};
use crate::store::{BatchSource, StoreError, StoreErrorKind};

/// The right to pull from a shard. It says so if it ends before its time.
pub(super) struct Driver<S: Sink> {
    shard: Arc<Shard<S>>,
    /// Whether it was ever polled: only a runtime that has ended drops a task before.
    begun: bool,
    /// Whether a batch is with the backend.
    flushing: bool,
    done: bool,
}

impl<S: Sink> Driver<S> {
    pub(super) fn new(shard: Arc<Shard<S>>) -> Self {
        Self { shard, begun: false, flushing: false, done: false }
    }
}

impl<S: Sink> Drop for Driver<S> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // Also for what was taken out already, and is told below.
        let _untold = Untold::of(&self.shard);
        if self.flushing {
            let error =
                StoreError::unknown(StoreErrorKind::Poisoned, "the backend stopped in the middle of a batch; its code panicked");
            self.shard.answer(Err(error));
        }
        // The thread may also unwind for a reason of its own, and take the runtime down with it: then nobody will pull in this one's place.
        if self.begun && std::thread::panicking() {
            self.shard.forsaken();
        } else {
            self.shard.abandon();
        }
    }
}

/// Commits what waits.
pub(super) async fn drive<S: Sink>(mut driver: Driver<S>) {
    driver.begun = true;
    let shard = Arc::clone(&driver.shard);
    let backend = Arc::clone(shard.backend());
    while let Some(batch) = shard.next() {
        driver.flushing = true;
        let answer = backend.commit(batch).await;
        driver.flushing = false;
        shard.answer(answer);
        // A backend that answers at once would keep its worker, and those whose entries make the next batch, from it.
        tokio::task::yield_now().await;
    }
    driver.done = true;
}
