//! The thread on which a backend of a server does all its work: a runtime of the embedder whose workers are all blocked still has its leases renewed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::StoreError;
#[cfg(feature = "postgres")]
use super::StoreErrorKind;

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Engine {
    handle: Handle,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    /// Set before it ends.
    ended: Arc<AtomicBool>,
}

/// Says that the thread ends, however it does.
struct Ending(Arc<AtomicBool>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Begins work on the thread for those who do not own it.
#[cfg(feature = "postgres")]
#[derive(Debug, Clone)]
pub(super) struct Spawner {
    handle: Handle,
    ended: Arc<AtomicBool>,
}

#[cfg(feature = "postgres")]
impl Spawner {
    /// `false`: the thread has ended, or is about to, and the work was not made. Where it ends in the same moment, it is dropped.
    pub(super) fn spawn<F>(&self, work: impl FnOnce() -> F) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if self.ended.load(Ordering::Acquire) {
            return false;
        }
        drop(self.handle.spawn(work()));
        true
    }
}

impl Engine {
    /// Starts the thread, under a name.
    pub(super) fn start(name: &str) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(format_args!("starting the thread {name}"), error);
        let runtime = Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let ended = Arc::<AtomicBool>::default();
        let ending = Ending(Arc::clone(&ended));
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let runtime = runtime;
                // Dropped before the runtime, and also if that panics.
                let _ending = ending;
                runtime.block_on(async {
                    let _dropped_or_told = stopped.await;
                });
            })
            .map_err(fail)?;
        Ok(Self { handle, stop: Mutex::new(Some(stop)), ended })
    }

    /// Runs something there, to its end, also if nobody waits for it.
    pub(super) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
        self.handle.spawn(work)
    }

    /// Runs it to its end, also if the caller does not wait for it.
    #[cfg(feature = "postgres")]
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
        cut_off: fn(StoreErrorKind, &'static str) -> StoreError,
    ) -> Result<T, StoreError> {
        self.handle
            .spawn(work)
            .await
            .unwrap_or_else(|_| Err(cut_off(StoreErrorKind::Closed, "the state was closed meanwhile; open it again")))
    }

    /// Who may begin work there.
    #[cfg(feature = "postgres")]
    pub(super) fn spawner(&self) -> Spawner {
        Spawner { handle: self.handle.clone(), ended: Arc::clone(&self.ended) }
    }

    /// Ends the thread; what still runs there is cut off.
    pub(super) fn stop(&self) {
        self.ended.store(true, Ordering::Release);
        drop(self.stop.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}
