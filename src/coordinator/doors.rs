//! What the lock manager is given of the rooms beside it.

use std::sync::{Arc, Weak};

use tokio::sync::oneshot;

use super::directory::Directory;
use crate::lease::{DoorError, LeaseStoreDoor};
use crate::model::{Entry, LeaseKey, Receipt, RunId};
use crate::persist::{Persist, Submission};
use crate::run::{FlushSink, NotCommitted, OneSink, RunHandle};
use crate::store::{BoxFuture, StoreError, StoreErrorKind};

/// About what an entry of leases takes.
const WEIGHT: usize = 512;

#[derive(Debug)]
pub(super) struct Doors {
    persist: Persist<FlushSink>,
    // Weak: the directory knows the lock manager, which knows these doors.
    directory: Weak<Directory>,
}

impl Doors {
    pub(super) fn new(persist: Persist<FlushSink>, directory: &Arc<Directory>) -> Self {
        Self { persist, directory: Arc::downgrade(directory) }
    }

    fn resident(&self, run: &RunId) -> Option<RunHandle> {
        self.directory.upgrade()?.get(run.as_str())
    }
}

impl LeaseStoreDoor for Doors {
    fn commit(&self, entry: Entry) -> BoxFuture<'_, Result<Receipt, DoorError>> {
        let (reply, answer) = oneshot::channel();
        // No permit: there is at most one such entry for every caller that waits for a lock.
        let sink = FlushSink::One(OneSink { reply, permit: None });
        self.persist.submit(Submission { entry, weight: WEIGHT, chain: 0, sink });
        Box::pin(async move {
            match answer.await {
                Ok(Ok(receipt)) => Ok(receipt),
                Ok(Err(NotCommitted::Refused(refusal))) => Err(DoorError::Refused(refusal)),
                Ok(Err(NotCommitted::Store(error))) => Err(DoorError::Store(error)),
                Ok(Err(NotCommitted::Recheck)) => Err(DoorError::Store(StoreError::not_applied(
                    StoreErrorKind::Busy,
                    "the lease met an entry that was refused; ask again (`seeknal state locks` lists who holds what)",
                ))),
                Err(_) => Err(DoorError::Store(StoreError::closed())),
            }
        })
    }

    fn has_unsettled(&self, run: &RunId) -> bool {
        self.resident(run).is_some_and(|handle| handle.cell().has_unsettled())
    }

    fn is_there(&self, run: &RunId) -> bool {
        self.resident(run).is_some_and(|handle| handle.cell().snapshot().is_some())
    }

    fn flush_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            if let Some(handle) = self.resident(run) {
                // A loss stays to be told to whoever wrote: it is not the lock's.
                handle.settle().await;
            }
            Ok(())
        })
    }

    fn vacated(&self, key: &LeaseKey) {
        if let (Some(directory), Some(node)) = (self.directory.upgrade(), &key.node) {
            directory.boards.vacated(&key.run, node);
        }
    }
}
