//! What a process remembers of its own commits, between batches.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::model::{BatchAnswer, Outcome, RunId};
use crate::store::own_versions::OwnVersions;

/// Runs remembered at most; beyond it everything is forgotten, which costs chains in flight one more check each.
const REMEMBERED: usize = 50_000;

/// The versions of runs that this process committed. Shared by everything that commits.
#[derive(Debug, Default)]
pub(crate) struct OwnRuns(Mutex<HashMap<RunId, OwnVersions>>);

impl OwnRuns {
    /// What is known of some runs.
    pub(crate) fn of<'r>(&self, runs: impl IntoIterator<Item = &'r RunId>) -> Vec<(RunId, OwnVersions)> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        runs.into_iter().filter_map(|run| Some((run.clone(), known.get(run)?.clone()))).collect()
    }

    /// Knows nothing any more: what is stored may be older than what was noted.
    pub(crate) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Notes what a batch of this process did, once it is committed.
    pub(crate) fn note(&self, answer: &BatchAnswer) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() > REMEMBERED {
            known.clear();
        }
        for outcome in &answer.outcomes {
            let Outcome::Applied(receipt) = outcome else { continue };
            for run in &receipt.runs {
                match known.get_mut(&run.run) {
                    Some(own) => own.push(run.after),
                    None => known.entry(run.run.clone()).or_default().push(run.after),
                }
            }
        }
    }
}
