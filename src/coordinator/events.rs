//! The stream of committed changes.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::broadcast;

use crate::error::Error;
use crate::model::{CommitSeq, NodeId, RunId, Snapshot, Version};
use crate::run::{ChangeSeed, DeferredLoss};

/// What happened. Written down it is an object with one member, `changed` or `deferred_lost`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// Something was committed.
    Changed(Arc<Change>),
    /// Deferred writes that were acknowledged from memory are lost.
    DeferredLost(DeferredLoss),
}

/// A committed change of one run. Of what other processes committed one event tells the net change.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Change {
    /// The run.
    pub run: RunId,
    /// Its version before.
    pub before: Version,
    /// Its version after.
    pub after: Version,
    /// The place of the commit in the order of the store; not known for what other processes committed.
    pub seq: Option<CommitSeq>,
    /// The nodes that were changed, made or deleted.
    pub nodes: Vec<NodeId>,
    /// Whether the run's header changed.
    pub header: bool,
    /// Whether the run was deleted.
    pub deleted: bool,
    /// The run after the change; `None` if it was deleted.
    pub snapshot: Option<Snapshot>,
}

/// Why a stream gave no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The subscriber was too slow: this many events are gone. The stream goes on with the oldest one that is still there; read snapshots for the rest.
    #[error("{0} events were missed; read snapshots to catch up")]
    Lagged(u64),
    /// The coordinator was closed.
    #[error("the coordinator is closed")]
    Closed,
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Lagged(missed) => Self::EventsMissed(missed),
            StreamError::Closed => Self::Closed,
        }
    }
}

/// A subscription; it does not keep the coordinator open. Every subscriber has its own place in the stream and never slows a writer.
#[derive(Debug)]
pub struct ChangeStream(broadcast::Receiver<Event>);

impl ChangeStream {
    /// The next event, in the order of each run's commits.
    ///
    /// # Errors
    /// [`StreamError::Lagged`] once if events were missed, [`StreamError::Closed`] at the end.
    ///
    /// # Cancel safety
    /// Dropping the future loses no event.
    pub async fn next(&mut self) -> Result<Event, StreamError> {
        self.0.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(missed) => StreamError::Lagged(missed),
            broadcast::error::RecvError::Closed => StreamError::Closed,
        })
    }

    /// The next event, if there is one already; `None` if there is none yet.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn try_next(&mut self) -> Result<Option<Event>, StreamError> {
        match self.0.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(broadcast::error::TryRecvError::Empty) => Ok(None),
            Err(broadcast::error::TryRecvError::Lagged(missed)) => Err(StreamError::Lagged(missed)),
            Err(broadcast::error::TryRecvError::Closed) => Err(StreamError::Closed),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Events {
    sender: Mutex<Option<broadcast::Sender<Event>>>,
    /// Kept outside of the mutex: asked on every commit.
    counter: broadcast::WeakSender<Event>,
    backlog: usize,
}

impl Events {
    pub(super) fn new(backlog: usize) -> Self {
        let (sender, _) = broadcast::channel(backlog);
        Self { counter: sender.downgrade(), sender: Mutex::new(Some(sender)), backlog }
    }

    pub(super) fn has_subscribers(&self) -> bool {
        self.counter.upgrade().is_some_and(|sender| sender.receiver_count() > 0)
    }

    fn sender(&self) -> Option<broadcast::Sender<Event>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn subscribe(&self) -> ChangeStream {
        ChangeStream(match self.sender() {
            Some(sender) => sender.subscribe(),
            // After the end: a stream that is closed from the start.
            None => broadcast::channel(self.backlog.min(1)).1,
        })
    }

    pub(super) fn changed(&self, seed: ChangeSeed) {
        let snapshot = seed.state.map(|state| {
            let durable = state.version();
            Snapshot::new(state, durable)
        });
        let ChangeSeed { run, before, after, seq, nodes, header, deleted, .. } = seed;
        self.send(Event::Changed(Arc::new(Change { run, before, after, seq, nodes, header, deleted, snapshot })));
    }

    pub(super) fn lost(&self, loss: &DeferredLoss) {
        self.send(Event::DeferredLost(loss.clone()));
    }

    fn send(&self, event: Event) {
        if let Some(sender) = self.sender() {
            // Without subscribers nobody misses it.
            let _nobody = sender.send(event);
        }
    }

    pub(super) fn close(&self) {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
