//! What this opening left of the runs that it wrote to: right unless somebody else wrote since, which only the server knows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::{RunId, Version};
use crate::store::decide::{Head, Writes};

/// Runs remembered at most; beyond it everything is forgotten, which costs one more way there and back each.
const REMEMBERED: usize = 50_000;

/// So many of our commits one after another, with nobody else's between them, let us take it that the next one follows as well: where several processes work
/// on one run, guesses would mostly be wrong, and each wrong one is a way there and back for nothing and an error in the server's log.
const ALONE: u8 = 8;

#[derive(Debug)]
struct Known {
    head: Head,
    /// How many of our commits followed one another.
    alone: u8,
}

/// The heads of runs as this opening left them.
#[derive(Debug, Default)]
pub(super) struct KnownHeads(Mutex<HashMap<RunId, Known>>);

impl KnownHeads {
    fn known(&self) -> MutexGuard<'_, HashMap<RunId, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The heads of all of these runs, if nobody else seems to write to any of them.
    pub(super) fn of(&self, runs: &BTreeSet<RunId>) -> Option<BTreeMap<RunId, Option<Head>>> {
        let known = self.known();
        let of_run = |run: &RunId| {
            let known = known.get(run).filter(|known| known.alone >= ALONE)?;
            Some((run.clone(), Some(known.head.clone())))
        };
        runs.iter().map(of_run).collect()
    }

    /// Notes what a committed decision left, which was made on rows with these versions.
    pub(super) fn note(&self, found: &BTreeMap<RunId, Option<Version>>, writes: Writes) {
        let mut all = self.known();
        if all.len() > REMEMBERED {
            all.clear();
        }
        for (run, write) in writes.runs {
            let Some(head) = write.head else {
                all.remove(&run);
                continue;
            };
            match all.get_mut(&run) {
                // A commit that was answered later than one behind it.
                Some(known) if known.head.version > head.version => {}
                Some(known) => {
                    let followed = found.get(&run).is_some_and(|found| *found == Some(known.head.version));
                    known.alone = if followed { known.alone.saturating_add(1) } else { 0 };
                    known.head = head;
                }
                None => drop(all.insert(run, Known { head, alone: 0 })),
            }
        }
    }

    /// Notes what a decision on known heads left, which were forgotten while it was on its way.
    pub(super) fn go_on(&self, writes: Writes) {
        let mut all = self.known();
        for (run, write) in writes.runs {
            let Some(head) = write.head else { continue };
            if all.get(&run).is_none_or(|known| known.head.version < head.version) {
                all.insert(run, Known { head, alone: ALONE });
            }
        }
    }

    /// Somebody else wrote to one of these runs, or nobody knows what became of a commit on them.
    pub(super) fn forget<'r>(&self, runs: impl IntoIterator<Item = &'r RunId>) {
        let mut all = self.known();
        for run in runs {
            all.remove(run);
        }
    }

    /// Knows nothing any more: what is stored may be older than what was noted.
    pub(super) fn forget_all(&self) {
        self.known().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RunStatus;
    use crate::store::decide::{LeaseWrites, Numbers, RunWrite};

    fn head(version: u64) -> Head {
        Head {
            version: Version(version),
            created_version: Version(1),
            header_version: Version(1),
            nodes_deleted: Version::NONE,
            created_at: chrono::DateTime::UNIX_EPOCH,
            status: RunStatus::Running,
        }
    }

    fn writes(run: &RunId, head: Option<Head>) -> Writes {
        let write = RunWrite { existed: true, deleted: None, head, header: None, nodes: BTreeMap::new() };
        let numbers = || Numbers::Drawn([].into());
        Writes {
            runs: [(run.clone(), write)].into(),
            leases: LeaseWrites::default(),
            retained: BTreeMap::new(),
            seqs: numbers(),
            tokens: numbers(),
        }
    }

    #[test]
    fn only_a_run_that_nobody_else_writes_to_is_known() {
        let (heads, run) = (KnownHeads::default(), RunId::new("r").unwrap());
        let runs = BTreeSet::from([run.clone()]);
        let commit =
            |found: u64, left: u64| heads.note(&[(run.clone(), Some(Version(found)))].into(), writes(&run, Some(head(left))));
        let known = || heads.of(&runs).and_then(|mut known| known.remove(&run)).flatten().map(|head| head.version.0);
        commit(9, 10);
        for version in 10..10 + u64::from(ALONE) {
            assert_eq!(known(), None, "after version {version}");
            commit(version, version + 1);
        }
        assert_eq!(known(), Some(18));
        commit(16, 17);
        assert_eq!(known(), Some(18), "what is told late takes nothing back");
        commit(19, 20);
        assert_eq!(known(), None, "version 19 is somebody else's");
        for version in 20..20 + u64::from(ALONE) {
            commit(version, version + 1);
        }
        assert_eq!(known(), Some(28));
        heads.forget([&run]);
        assert_eq!(known(), None);
        heads.go_on(writes(&run, Some(head(30))));
        heads.go_on(writes(&run, Some(head(29))));
        assert_eq!(known(), Some(30));
        heads.forget([&run]);
        let other = BTreeSet::from([run.clone(), RunId::new("other").unwrap()]);
        for version in 28..=28 + u64::from(ALONE) {
            commit(version, version + 1);
        }
        assert!(heads.of(&runs).is_some() && heads.of(&other).is_none(), "all of them, or none");
        heads.note(&BTreeMap::new(), writes(&run, None));
        assert_eq!(known(), None, "it is gone");
    }
}
