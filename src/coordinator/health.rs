//! How it stands: counters, histograms, losses.

use std::sync::atomic::Ordering;

use serde::Serialize;

use super::{Coordinator, Freshness};
use crate::persist::Histogram;
use crate::run::DeferredLoss;

/// What a coordinator counted since it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Entries that reached storage.
    pub applied: u64,
    /// Entries that did not: refused, or failed with their batch.
    pub refused: u64,
    /// Flushes that failed; nothing of them was written.
    pub failed_flushes: u64,
    /// Answers that left open whether a flush was written; the same batch was sent again.
    pub unknown_flushes: u64,
    /// Entries that wait for a flush now.
    pub waiting: u64,
    /// How many more writes would be admitted now.
    pub permits_available: usize,
    /// Runs in memory now.
    pub resident_runs: usize,
    /// How often what other processes commit was looked at.
    pub follow_rounds: u64,
    /// How often a run's snapshot was found to differ from storage then: others wrote to it, or an own write was just being told.
    pub follow_behind: u64,
    /// How often storage could not be followed.
    pub follow_failures: u64,
    /// Entries in a flush.
    pub batch_entries: Histogram,
    /// Microseconds of a flush; on SQLite without the wait for others who write.
    pub flush_micros: Histogram,
}

/// Whether it works.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Health {
    /// Whether writes are taken.
    pub open: bool,
    /// Whether this opening may only read.
    pub read_only: bool,
    /// The backend's name.
    pub backend: String,
    /// Where the state is; never with a secret in it.
    pub location: String,
    /// What storage said of the last flush, if that failed or nobody knows what became of it: a full disk, a server that is away, a writer that gave up. The next
    /// flush that succeeds makes it `None`; where several are on their way at once, one of which nobody knows what became stays until that is known. Not a
    /// write that was refused for itself.
    pub storage: Option<String>,
    /// Whether locks and claims are granted. `false` where the backend keeps none ([`LeaseStore::None`](crate::store::LeaseStore::None)); otherwise, while
    /// [`open`](Self::open), it is a fault of this library, and mended by opening the state again.
    pub locks: bool,
    /// Who grants them, or would, is there.
    #[serde(skip)]
    granting: bool,
    /// Deferred writes that were lost, and of which nobody was told yet.
    pub lost: Vec<DeferredLoss>,
    /// How fresh the snapshots are, where other processes write too.
    pub freshness: Freshness,
    /// What opening found, for the operator.
    pub notices: Vec<String>,
}

impl Health {
    /// Whether nothing is wrong. That storage takes no writes is known by the writes that it did not take.
    pub fn is_sound(&self) -> bool {
        self.open && self.granting && self.storage.is_none() && self.lost.is_empty() && self.freshness.stale_since.is_none()
    }
}

impl Coordinator {
    /// Counters and histograms since the coordinator was opened. Cheap: it reads atomics.
    pub fn stats(&self) -> Stats {
        let engine = self.engine();
        let stats = engine.context.persist.stats();
        let followed = engine.following.counts();
        Stats {
            applied: stats.applied.load(Ordering::Relaxed),
            refused: stats.refused.load(Ordering::Relaxed),
            failed_flushes: stats.failed_flushes.load(Ordering::Relaxed),
            unknown_flushes: stats.unknown_flushes.load(Ordering::Relaxed),
            waiting: u64::try_from(engine.context.persist.waiting()).unwrap_or(u64::MAX),
            permits_available: engine.admission.available(),
            resident_runs: engine.directory.len(),
            follow_rounds: followed.rounds,
            follow_behind: followed.behind,
            follow_failures: followed.failures,
            batch_entries: stats.batch_entries.read(),
            flush_micros: stats.flush_micros.read(),
        }
    }

    /// Whether it works, whether storage took the last write, and what was lost. Telling a loss here does not count as told.
    pub fn health(&self) -> Health {
        let engine = self.engine();
        Health {
            open: !engine.is_closed(),
            read_only: engine.backend.is_read_only(),
            backend: engine.backend.name().to_owned(),
            location: engine.backend.location(),
            storage: engine.context.persist.fault(),
            locks: engine.leases.is_alive() && engine.leases.are_kept(),
            granting: engine.leases.is_alive(),
            lost: engine.context.losses.peek(),
            freshness: engine.following.freshness(engine.backend.is_shared(), engine.limits.lease_ttl),
            notices: engine.report.notices.clone(),
        }
    }
}
