//! How a coordinator is closed: whole, on the runtime that it was opened on; what that leaves open, where it ends in the middle, from wherever it is closed next.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Coordinator, Core, Engine};
use crate::error::Error;
use crate::store::{StateBackend, StoreError, StoreErrorKind, surviving};

/// How far the storage is given up.
#[derive(Default)]
pub(super) enum Storage {
    #[default]
    Open,
    /// Kept here and not by who waits for it: whoever comes after him goes on where he stopped.
    Closing(Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>),
    Closed,
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "Open",
            Self::Closing(_) => "Closing",
            Self::Closed => "Closed",
        })
    }
}

impl Storage {
    /// Gives it up; what was begun is ended. `None`: it was given up before.
    async fn close(&mut self, backend: &Arc<dyn StateBackend>) -> Option<Result<(), StoreError>> {
        if let Self::Open = self {
            let backend = Arc::clone(backend);
            *self = Self::Closing(Box::pin(async move { backend.close().await }));
        }
        let Self::Closing(closing) = self else { return None };
        // Its panic would take along all that is told and ended behind it.
        let closed = surviving(closing.as_mut(), || {
            StoreError::not_applied(StoreErrorKind::Io, "the backend's own code panicked while it was closed")
        })
        .await;
        *self = Self::Closed;
        Some(closed)
    }
}

impl Coordinator {
    /// Stops taking writes, flushes and answers everybody, gives back the claims that are held, releases all leases, brings the storage into the form that others
    /// read, and gives it up. A node whose claim is held is pending again on the same attempt, as if the claim were dropped; an end that was told before wins.
    /// What its worker says later is answered by [`Error::Closed`].
    ///
    /// A second call, also through another clone, waits for the end of the first, which alone tells what went wrong. Where the runtime that it was opened
    /// on has ended, also in the middle of closing, the storage is given up all the same: by who waits for that, or calls this next.
    ///
    /// # Errors
    /// [`Error::DeferredLost`] if deferred writes were lost, [`Error::Store`] if the storage could not be closed in order. All is closed all
    /// the same. For how long it waits see [above](Self#how-long-a-call-may-take). A claim that storage did not take back is no error, and told in the log: its
    /// node is taken over on its next attempt.
    ///
    /// # Cancel safety
    /// Closing goes on in the background if the future is dropped.
    pub async fn close(&self) -> Result<(), Error> {
        let engine = Arc::clone(self.engine());
        match self.engine().apart(async move { engine.close().await }).await {
            Ok(closed) => closed,
            // Its runtime has ended, and with it all that ran there: what is left to be closed is closed from here.
            Err(_cut) => {
                if !self.is_closed() {
                    self.engine().abandon();
                }
                self.engine().close().await
            }
        }
    }

    /// Whether it was closed, or is being closed. From then on what writes is refused, and so is what asks storage; a run that is in memory is read as long as it is
    /// there.
    pub fn is_closed(&self) -> bool {
        self.engine().is_closed()
    }
}

impl Engine {
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    async fn claims_settled(&self) {
        let _all_are = self.claiming.subscribe().wait_for(|count| *count == 0).await.is_ok();
    }

    /// Runs first, then locks, then the writer.
    async fn close(self: &Arc<Self>) -> Result<(), Error> {
        if self.closed.swap(true, Ordering::AcqRel) {
            // The other end is in `self`: it does not go away before it says so.
            let _ended = self.ended.subscribe().wait_for(|ended| *ended).await.is_ok();
            return self.close_what_is_left().await;
        }
        self.sole.leaves();
        let _tells_the_end = TellsTheEnd(self);
        self.directory.boards.close();
        self.following.stop().await;
        self.context.persist.wind_up();
        // Claims that are on their way are held by somebody, or given back: both take a write. So does an end that was told before.
        self.claims_settled().await;
        self.give_back_claims().await;
        // Who dropped his claim meanwhile gives it back himself.
        self.claims_settled().await;
        // Who was admitted is answered first; who asks from now on is refused.
        let nobody_is_admitted = self.admission.drained().await;
        self.admission.close();
        drop(nobody_is_admitted);
        self.leases.close().await;
        self.context.persist.close().await;
        self.end_all().await
    }

    /// After a closing that was cut off: what it would have waited for went with its runtime, or is waited for by nobody.
    async fn close_what_is_left(&self) -> Result<(), Error> {
        if let Storage::Closed = &*self.storage.lock().await {
            return Ok(());
        }
        self.admission.close();
        self.abandon();
        // The runtime that ends may still be dropping what it ran, which tells as it goes what is lost.
        self.context.persist.close().await;
        let resident = self.directory.resident();
        self.directory.end();
        for handle in resident {
            handle.gone().await;
        }
        self.end_all().await
    }

    /// What is on its way is not waited for.
    fn abandon(&self) {
        self.context.persist.abandon();
        self.held.forget();
    }

    /// All is written that will be.
    async fn end_all(&self) -> Result<(), Error> {
        self.directory.end();
        self.supervisor.stop(None);
        let Some(closed) = self.storage.lock().await.close(&self.backend).await else { return Ok(()) };
        self.events.close();
        self.sole.give_up();
        // At the end: a closing that is cut off has told nothing yet.
        let told = self.context.losses.take_all().map_or(Ok(()), |loss| Err(Error::DeferredLost(loss)));
        told.and(closed.map_err(Error::from))
    }
}

/// Tells those who wait for the end of closing, also if closing is cut off.
struct TellsTheEnd<'a>(&'a Engine);

impl Drop for TellsTheEnd<'_> {
    fn drop(&mut self) {
        // Nobody is left who would tell anything.
        self.0.events.close();
        self.0.sole.cut_off();
        self.0.ended.send_replace(true);
    }
}

/// What closes in the background. Where it is not done, the backend is nobody's all the same.
struct Closes(Arc<Engine>);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.sole.give_up();
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.engine.is_closed() {
            return;
        }
        // On a runtime that ended the task is dropped at once; then the backend closes by its own drop.
        self.engine.sole.leaves();
        let closes = Closes(Arc::clone(&self.engine));
        drop(self.engine.runtime.spawn(async move {
            if let Err(error) = closes.0.close().await {
                tracing::error!(%error, "the coordinator was dropped without close, and closing it failed");
            }
        }));
    }
}
