//! Work that must not stand still or end with who asked for it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Engine;

/// The work did not come to its end: the runtime has ended, or it panicked.
#[derive(Debug)]
pub(super) struct CutOff {
    /// Whether it had begun. What never began has done nothing.
    pub(super) begun: bool,
}

impl Engine {
    /// Does it on the runtime that the coordinator was opened on, to its end, also if nobody waits for that any more.
    pub(super) async fn apart<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T, CutOff> {
        let begun = Arc::new(AtomicBool::new(false));
        let begins = Arc::clone(&begun);
        let task = async move {
            begins.store(true, Ordering::Release);
            work.await
        };
        // A runtime that has ended drops the task before it is polled.
        self.runtime.spawn(task).await.map_err(|_| CutOff { begun: begun.load(Ordering::Acquire) })
    }
}
