//! Who holds which lease, as it is asked while entries are decided.

use std::collections::{HashMap, HashSet};

use super::batch::{Entry, Fence};
use super::id::RunId;
use super::lease::{FencingToken, LeaseKey, LeaseMutation};
use super::mutation::Mutation;

/// Who knows the leases, asked while an entry is decided.
pub trait FenceCheck {
    /// Whether the lease is held under this token, and not expired.
    fn holds(&self, fence: &Fence) -> bool;

    /// Who holds a lease on the run or one of its nodes.
    fn holder(&self, run: &RunId) -> Option<String>;

    /// As [`holder`](Self::holder), but for the leases that were freed a moment ago. The default knows them by their runs only.
    fn holder_besides(&self, run: &RunId, freed: &Freed) -> Option<String> {
        if freed.runs.contains(run) { None } else { self.holder(run) }
    }
}

/// The leases that entries have freed which were accepted and cannot be seen yet: those of runs that ended or were deleted, and those that their holders gave
/// back. Nothing that is decided after them is done under one of these.
#[derive(Debug, Clone, Default)]
pub struct Freed {
    runs: HashSet<RunId>,
    returned: HashMap<FencingToken, LeaseKey>,
}

impl Freed {
    /// Whether it is nothing.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.returned.is_empty()
    }

    /// The runs whose leases are void, all of them.
    pub fn runs(&self) -> impl Iterator<Item = &RunId> {
        self.runs.iter()
    }

    /// The leases that were given back.
    pub fn returned(&self) -> impl Iterator<Item = (&LeaseKey, FencingToken)> {
        self.returned.iter().map(|(token, key)| (key, *token))
    }

    /// Whether the lease under this token was given back.
    pub fn is_returned(&self, token: FencingToken) -> bool {
        self.returned.contains_key(&token)
    }

    pub(super) fn take_in(&mut self, entry: &Entry) {
        for part in entry.parts.iter().filter(|part| part.mutations.iter().any(Mutation::frees_locks)) {
            self.runs.insert(part.run.clone());
        }
        self.returned.extend(entry.leases.iter().filter_map(LeaseMutation::returned).map(|(key, token)| (token, key.clone())));
    }

    pub(super) fn holds(&self, fence: &Fence, fences: &dyn FenceCheck) -> bool {
        !self.runs.contains(&fence.key.run) && !self.is_returned(fence.token) && fences.holds(fence)
    }

    pub(super) fn holder(&self, run: &RunId, fences: &dyn FenceCheck) -> Option<String> {
        if self.runs.contains(run) {
            return None;
        }
        if self.returned.is_empty() { fences.holder(run) } else { fences.holder_besides(run, self) }
    }
}

/// No lease is held: for replay, where everything was decided before.
#[derive(Debug, Clone, Copy)]
pub struct NoFences;

impl FenceCheck for NoFences {
    fn holds(&self, _: &Fence) -> bool {
        false
    }

    fn holder(&self, _: &RunId) -> Option<String> {
        None
    }
}
