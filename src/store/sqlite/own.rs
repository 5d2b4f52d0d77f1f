//! What the writer remembers between its transactions: which versions of a run it committed itself, and the heads of runs while nobody else writes.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{RunId, Version};

/// Runs remembered at most; beyond it everything is forgotten, which costs reads and, for chains in flight, one more check each.
const REMEMBERED: usize = 50_000;

/// Stretches remembered of one run; chains in flight are short, and only they ask.
const STRETCHES: usize = 16;

/// The versions of one run that this process committed, as stretches without a gap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OwnVersions {
    /// Mostly there is one: it costs no allocation.
    newest: Option<(u64, u64)>,
    /// Those before it, oldest first.
    older: Vec<(u64, u64)>,
}

impl OwnVersions {
    /// Adds the newest version.
    pub(super) fn push(&mut self, version: Version) {
        match &mut self.newest {
            Some((_, last)) if last.checked_add(1) == Some(version.0) => *last = version.0,
            newest => {
                if let Some(before) = newest.replace((version.0, version.0)) {
                    if self.older.len() + 1 >= STRETCHES {
                        self.older.remove(0);
                    }
                    self.older.push(before);
                }
            }
        }
    }

    fn stretches(&self) -> impl Iterator<Item = &(u64, u64)> {
        self.older.iter().chain(&self.newest)
    }

    /// Whether every version after `base` up to `version` is one of them.
    pub(super) fn covers(&self, base: Version, version: Version) -> bool {
        base == version
            || self.newest.is_some_and(|(first, last)| base.0 < version.0 && first <= base.next().0 && last == version.0)
    }

    /// How many of them are after `base`.
    pub(super) fn count_after(&self, base: Version) -> u64 {
        self.stretches().map(|(first, last)| (last.saturating_add(1)).saturating_sub((*first).max(base.next().0))).sum()
    }

    /// Whether this version is one of them.
    pub(super) fn contains(&self, version: Version) -> bool {
        self.stretches().any(|(first, last)| (*first..=*last).contains(&version.0))
    }
}

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
    heads: HashMap<RunId, Option<Head>>,
    own: HashMap<RunId, OwnVersions>,
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
        self.heads.clear();
        self.counters = None;
        self.data_version = None;
    }

    /// Commit sequence and fencing token that were given out last, if they are remembered.
    pub(super) fn counters(&self) -> Option<(u64, u64)> {
        self.counters
    }

    /// The head of a run, if it is remembered; the inner `None` says that there is no such run.
    pub(super) fn head(&self, run: &RunId) -> Option<&Option<Head>> {
        self.heads.get(run)
    }

    /// The versions of a run that this process committed.
    pub(super) fn own(&self, run: &RunId) -> OwnVersions {
        self.own.get(run).cloned().unwrap_or_default()
    }

    /// A transaction was committed.
    pub(super) fn settle(&mut self, settled: Settled) {
        self.counters = Some(settled.counters);
        if self.heads.len() > REMEMBERED {
            self.heads.clear();
        }
        if self.own.len() > REMEMBERED {
            self.own.clear();
        }
        for (run, head, own) in settled.runs {
            if own == OwnVersions::default() {
                self.own.remove(&run);
            } else {
                self.own.insert(run.clone(), own);
            }
            self.heads.insert(run, head);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_tell_own_from_foreign() {
        let mut own = OwnVersions::default();
        assert!(own.covers(Version(3), Version(3)));
        assert!(!own.covers(Version(3), Version(4)));
        for version in [4, 5, 7] {
            own.push(Version(version));
        }
        assert!(!own.covers(Version(3), Version(5)), "version 7 came after");
        assert!(own.covers(Version(6), Version(7)));
        assert!(!own.covers(Version(5), Version(7)), "version 6 is somebody else's");
        assert!(own.contains(Version(5)) && !own.contains(Version(6)));
        assert_eq!((own.count_after(Version(3)), own.count_after(Version(4)), own.count_after(Version(7))), (3, 2, 0));
    }
}
