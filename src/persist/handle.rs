//! The door of the persistence room.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use ractor::{Actor, ActorRef, MessagingErr};
use tokio::sync::oneshot;

use super::actor::{Arguments, Msg, PersistActor};
use super::queue::{Settlement, Sink, Submission};
use super::stats::PersistStats;
use crate::model::RunId;
use crate::store::{StateBackend, StoreError};

/// The persistence actors are gone: the coordinator was closed, or its runtime ended.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the coordinator is closed")]
pub(crate) struct PersistClosed;

/// A cheap handle on the persistence actors. Runs are spread over them by their ids, so that the order of one run is kept.
pub(crate) struct Persist<S: Sink> {
    shards: Arc<[ActorRef<Msg<S>>]>,
    hasher: RandomState,
    stats: Arc<PersistStats>,
}

impl<S: Sink> Clone for Persist<S> {
    fn clone(&self) -> Self {
        Self { shards: Arc::clone(&self.shards), hasher: self.hasher.clone(), stats: Arc::clone(&self.stats) }
    }
}

impl<S: Sink> std::fmt::Debug for Persist<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Persist").field("shards", &self.shards.len()).finish_non_exhaustive()
    }
}

impl<S: Sink> Persist<S> {
    /// Starts as many actors as the backend takes flushes at once.
    pub(crate) async fn start(backend: &Arc<dyn StateBackend>) -> Result<Self, PersistClosed> {
        let stats = Arc::new(PersistStats::default());
        let mut shards = Vec::new();
        for _ in 0..backend.flush_shards().clamp(1, 64) {
            let args = Arguments { backend: Arc::clone(backend), stats: Arc::clone(&stats) };
            let (actor, _) = Actor::spawn(None, PersistActor::new(), args).await.map_err(|_| PersistClosed)?;
            shards.push(actor);
        }
        Ok(Self { shards: shards.into(), hasher: RandomState::new(), stats })
    }

    fn shard(&self, run: Option<&RunId>) -> Option<&ActorRef<Msg<S>>> {
        let index = match run {
            Some(run) if self.shards.len() > 1 => {
                usize::try_from(self.hasher.hash_one(run) % u64::try_from(self.shards.len()).unwrap_or(1)).unwrap_or(0)
            }
            _ => 0,
        };
        self.shards.get(index)
    }

    /// Sends an entry down. It is always settled, at once if the actors are gone. An entry over several runs goes with its first one: their
    /// actors are held until it is settled.
    pub(crate) fn submit(&self, submission: Submission<S>) {
        let run = submission.entry.parts.first().map(|part| &part.run);
        let Some(shard) = self.shard(run) else { return };
        if let Err(MessagingErr::SendErr(Msg::Submit(submission))) = shard.cast(Msg::Submit(submission)) {
            S::settle(vec![(submission.sink, Settlement::NotApplied(StoreError::closed()))]);
        }
    }

    /// Waits until everything that was sent for this run before is settled; an error if that cannot be said now.
    pub(crate) async fn barrier(&self, run: &RunId) -> Result<(), StoreError> {
        let (reply, settled) = oneshot::channel();
        self.shard(Some(run)).ok_or_else(StoreError::closed)?.cast(Msg::Barrier(reply)).map_err(|_| StoreError::closed())?;
        settled.await.unwrap_or_else(|_| Err(StoreError::closed()))
    }

    /// The coordinator is about to close.
    pub(crate) fn wind_up(&self) {
        for shard in &*self.shards {
            let _actor_gone = shard.cast(Msg::WindUp);
        }
    }

    /// Refuses what comes from now on, waits until everything is settled, and ends the actors.
    pub(crate) async fn close(&self) {
        for shard in &*self.shards {
            let (reply, settled) = oneshot::channel();
            if shard.cast(Msg::Close(reply)).is_ok() {
                let _already_closed = settled.await;
            }
            shard.stop(None);
        }
    }

    pub(crate) fn stats(&self) -> &PersistStats {
        &self.stats
    }
}
