//! What the writer remembers between its transactions: which versions of a run it committed itself, and the heads of runs while nobody else writes.

use std::collections::HashMap;
use std::sync::Arc;

pub(super) use crate::store::own_versions::OwnVersions;

use crate::model::{RunId, Version};

/// Runs remembered at most; beyond it everything is forgotten, which costs reads and, for chains in flight, one more check each.
const REMEMBERED: usize = 50_000;

/// What a commit must know of a run's row.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) version: Version,
    pub(super) created_version: Version,
    pub(super) header_version: Version,
    /// The version that deleted a node last: a node that is not there has no version of its own to compare.
    pub(super) nodes_deleted: Version,
    /// When the run was created, as it is stored beside every node.
    pub(super) created_at: Arc<str>,
}

/// What a committed transaction leaves behind.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) counters: (u64, u64),
    /// Rows that were written.
    pub(super) rows: usize,
    pub(super) runs: Vec<(RunId, Option<Head>, OwnVersions)>,
}

/// What the writer remembers.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// What SQLite counts up with every commit of somebody else; the heads are good as long as it stays.
    data_version: Option<i64>,
    /// Commit sequence and fencing token, as good as the heads.
    counters: Option<(u64, u64)>,
    runs: HashMap<RunId, Known>,
    /// How often all heads were forgotten.
    doubts: u64,
}

/// What is remembered of a run.
#[derive(Debug)]
struct Known {
    /// Its head, as it was after so many doubts; `None`: there is no such run.
    head: Option<Head>,
    after: u64,
    /// The versions of it that this process committed.
    own: OwnVersions,
}

impl Memory {
    /// A transaction begins: forgets what somebody else may have changed.
    pub(super) fn begin(&mut self, data_version: i64) {
        if self.data_version != Some(data_version) {
            self.doubt();
            self.data_version = Some(data_version);
        }
    }

    /// Nobody knows what is stored: forgets everything about rows. What was committed by this process stays known.
    pub(super) fn doubt(&mut self) {
        self.doubts = self.doubts.saturating_add(1);
        self.counters = None;
        self.data_version = None;
    }

    /// Commit sequence and fencing token that were given out last, if they are remembered.
    pub(super) fn counters(&self) -> Option<(u64, u64)> {
        self.counters
    }

    /// The head of a run, if it is remembered (the inner `None` says that there is no such run), and the versions of it that this process committed.
    pub(super) fn run(&self, run: &RunId) -> (Option<&Option<Head>>, OwnVersions) {
        let Some(known) = self.runs.get(run) else { return (None, OwnVersions::default()) };
        ((known.after == self.doubts).then_some(&known.head), known.own.clone())
    }

    /// A transaction was committed.
    pub(super) fn settle(&mut self, settled: Settled) {
        self.counters = Some(settled.counters);
        if self.runs.len() > REMEMBERED {
            self.runs.clear();
        }
        for (run, head, own) in settled.runs {
            self.runs.insert(run, Known { head, after: self.doubts, own });
        }
    }
}
