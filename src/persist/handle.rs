//! The door of the persistence room.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ractor::{Actor, ActorRef};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::actor::{Msg, PersistActor};
use super::fault::Fault;
use super::queue::{Sink, Submission};
use super::shard::Shard;
use super::stats::PersistStats;
use crate::model::RunId;
use crate::store::{StateBackend, StoreError};

/// The persistence actors are gone: the coordinator was closed, or its runtime ended.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the coordinator is closed")]
pub(crate) struct PersistClosed;

/// One line, and the actor that tells its outcomes.
struct Lane<S: Sink> {
    shard: Arc<Shard<S>>,
    actor: ActorRef<Msg<S>>,
}

/// Notices when a writer with a thread of its own tells an outcome.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    told: &'a AtomicU64,
    before: u64,
}

impl Watch<'_> {
    /// Whether it told one since.
    pub(crate) fn has_news(&self) -> bool {
        self.told.load(Ordering::Relaxed) != self.before
    }
}

/// A cheap handle on the persistence actors. Runs are spread over them by their ids, so that the order of one run is kept.
pub(crate) struct Persist<S: Sink> {
    lanes: Arc<[Lane<S>]>,
    hasher: RandomState,
    stats: Arc<PersistStats>,
    failed: Arc<Fault>,
}

impl<S: Sink> Clone for Persist<S> {
    fn clone(&self) -> Self {
        Self {
            lanes: Arc::clone(&self.lanes),
            hasher: self.hasher.clone(),
            stats: Arc::clone(&self.stats),
            failed: Arc::clone(&self.failed),
        }
    }
}

impl<S: Sink> std::fmt::Debug for Persist<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Persist").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl<S: Sink> Persist<S> {
    /// Starts as many lines as the backend takes flushes at once.
    pub(crate) async fn start(backend: &Arc<dyn StateBackend>) -> Result<Self, PersistClosed> {
        let (stats, failed) = (Arc::new(PersistStats::default()), Arc::new(Fault::default()));
        let runtime = Handle::try_current().map_err(|_| PersistClosed)?;
        let mut lanes = Vec::new();
        for _ in 0..backend.flush_shards().clamp(1, 64) {
            let shard = Shard::new(Arc::clone(backend), Arc::clone(&stats), Arc::clone(&failed), runtime.clone());
            let (actor, _) = Actor::spawn(None, PersistActor::new(), Arc::clone(&shard)).await.map_err(|_| PersistClosed)?;
            shard.begin(actor.clone());
            lanes.push(Lane { shard, actor });
        }
        Ok(Self { lanes: lanes.into(), hasher: RandomState::new(), stats, failed })
    }

    fn shard(&self, run: Option<&RunId>) -> Option<&Arc<Shard<S>>> {
        let index = match run {
            Some(run) if self.lanes.len() > 1 => {
                usize::try_from(self.hasher.hash_one(run) % u64::try_from(self.lanes.len()).unwrap_or(1)).unwrap_or(0)
            }
            _ => 0,
        };
        self.lanes.get(index).map(|lane| &lane.shard)
    }

    /// Sends an entry down. It is always settled. An entry over several runs goes with its first one: their actors are held until it is settled.
    pub(crate) fn submit(&self, submission: Submission<S>) {
        let run = submission.entry.parts.first().map(|part| &part.run);
        if let Some(shard) = self.shard(run) {
            shard.submit(submission);
        }
    }

    /// What of this run was told by a writer that has a thread of its own, from now on.
    pub(crate) fn watch(&self, run: &RunId) -> Option<Watch<'_>> {
        let told = self.shard(Some(run))?.told()?;
        Some(Watch { told, before: told.load(Ordering::Relaxed) })
    }

    /// Waits until everything that was sent for this run before is settled; an error if that cannot be said now. Entries over several runs go with the
    /// line of their first one: only after "unknown" may one of them be on its way while nobody holds this run.
    pub(crate) async fn barrier(&self, run: &RunId) -> Result<(), StoreError> {
        if let Some(stuck) = self.lanes.iter().find_map(|lane| lane.shard.stuck_with(run)) {
            return Err(stuck);
        }
        let (reply, settled) = oneshot::channel();
        self.shard(Some(run)).ok_or_else(StoreError::closed)?.barrier(reply);
        settled.await.unwrap_or_else(|_| Err(StoreError::closed()))
    }

    /// The actor of a run has learned that an earlier chain is broken, and sends nothing more of it.
    pub(crate) fn begun(&self, run: &RunId, chain: u64) {
        if let Some(shard) = self.shard(Some(run)) {
            shard.begun(run, chain);
        }
    }

    /// The coordinator is about to close.
    pub(crate) fn wind_up(&self) {
        for lane in &*self.lanes {
            lane.shard.wind_up();
        }
    }

    /// The runtime has ended: nothing is told or sent again any more, and nothing is waited for.
    pub(crate) fn abandon(&self) {
        for lane in &*self.lanes {
            lane.shard.abandon();
        }
    }

    /// Refuses what comes from now on, waits until everything is settled, and ends the actors.
    pub(crate) async fn close(&self) {
        for lane in &*self.lanes {
            lane.shard.close().await;
            lane.actor.stop(None);
        }
    }

    pub(crate) fn stats(&self) -> &PersistStats {
        &self.stats
    }

    /// Why a flush failed, if none succeeded since; or why some line does not know what became of its batch.
    pub(crate) fn fault(&self) -> Option<String> {
        self.lanes.iter().find_map(|lane| lane.shard.unsettled()).or_else(|| self.failed.get())
    }

    /// How many entries wait to be flushed.
    pub(crate) fn waiting(&self) -> usize {
        self.lanes.iter().map(|lane| lane.shard.waiting()).sum()
    }
}
