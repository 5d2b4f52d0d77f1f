//! What must be read before a batch can be decided.

use std::collections::{BTreeMap, BTreeSet};

use super::{Head, run_key};
use crate::model::{Batch, FencingToken, Guard, LeaseKey, LeaseMutation, Mutation, NodeId, RunId, RunPart, Version};
use crate::store::own_versions::OwnVersions;

/// What a batch needs whatever is stored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The heads of these runs, locked until the end where a backend can lock.
    pub(crate) runs: BTreeSet<RunId>,
    /// How many versions each of them goes on if nothing is refused; `None` if some of them come, go, or change in more than their nodes.
    pub(crate) steps: Option<BTreeMap<RunId, u64>>,
    /// Runs that are made, runs of which leases are granted, and runs that must have none or lose them: only one transaction at a time may do that to one of them,
    /// though there may be no row yet that could be locked.
    pub(crate) mutexes: BTreeSet<RunId>,
    pub(crate) leases: LeasesWanted,
    /// Commit sequence numbers that may be used.
    pub(crate) seqs: usize,
    /// Fencing tokens that may be used.
    pub(crate) tokens: usize,
}

/// Leases that a batch needs, with whether each is valid now by the database's clock.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LeasesWanted {
    /// On exactly these keys.
    pub(crate) keys: BTreeSet<LeaseKey>,
    /// All of these runs and their nodes.
    pub(crate) runs: BTreeSet<RunId>,
    /// Under these tokens.
    pub(crate) tokens: BTreeSet<FencingToken>,
}

impl LeasesWanted {
    /// Whether no lease is needed.
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.runs.is_empty() && self.tokens.is_empty()
    }
}

impl Wanted {
    /// What this batch needs.
    pub(crate) fn of(batch: &Batch) -> Self {
        let mut wanted = Self { seqs: batch.entries.len(), steps: Some(BTreeMap::new()), ..Self::default() };
        for entry in &batch.entries {
            for part in &entry.parts {
                if !wanted.runs.contains(&part.run) {
                    wanted.runs.insert(part.run.clone());
                }
                wanted.count(part);
                if part.mutations.iter().any(Mutation::creates_run) {
                    wanted.mutexes.insert(part.run.clone());
                }
                // Those that a run takes along are locked in their turn with the others, and none comes between that and their going.
                if part.guards.contains(&Guard::Unlocked) || part.mutations.iter().any(Mutation::frees_locks) {
                    wanted.leases.runs.insert(part.run.clone());
                    wanted.mutexes.insert(part.run.clone());
                }
            }
            wanted.leases.keys.extend(entry.fences.iter().map(|fence| fence.key.clone()));
            for lease in &entry.leases {
                match lease {
                    LeaseMutation::Grant { key, .. } => {
                        wanted.tokens = wanted.tokens.saturating_add(1);
                        wanted.mutexes.insert(key.run.clone());
                        if key.node.is_none() {
                            wanted.leases.runs.insert(key.run.clone());
                        } else {
                            wanted.leases.keys.insert(run_key(&key.run));
                            wanted.leases.keys.insert(key.clone());
                        }
                    }
                    LeaseMutation::Renew { key, .. } | LeaseMutation::Release { key, .. } => {
                        wanted.leases.keys.insert(key.clone());
                    }
                    LeaseMutation::Force { token } => {
                        wanted.leases.tokens.insert(*token);
                    }
                }
            }
        }
        wanted
    }

    fn count(&mut self, part: &RunPart) {
        let Some(steps) = &mut self.steps else { return };
        let plain = part.mutations.iter().all(|mutation| mutation.node().is_some() && !mutation.deletes_node());
        match steps.get_mut(&part.run) {
            _ if !plain => self.steps = None,
            Some(step) => *step += 1,
            None => drop(steps.insert(part.run.clone(), 1)),
        }
    }
}

/// What is needed beyond the heads, by run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct NodesWanted(pub(crate) BTreeMap<RunId, OfRun>);

/// What is needed of one run beyond its head.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct OfRun {
    /// Its whole header.
    pub(crate) header: bool,
    /// All of its nodes, with their intervals and partitions.
    pub(crate) all: bool,
    /// These nodes, with their intervals and partitions.
    pub(crate) nodes: BTreeSet<NodeId>,
}

/// A run while the batch is gone through: what it will be if everything is accepted. Where something is refused, all that follows on the run is
/// refused as well, and needs nothing.
struct Tip {
    version: Version,
    created: Version,
    own: OwnVersions,
}

impl Tip {
    /// Whether the part brings its result with it: nobody else wrote since its base, and it says what the run is after it.
    fn is_smooth(&self, part: &RunPart) -> bool {
        self.version == part.expect
            && self.own.covers(part.base, self.version)
            && part
                .after
                .as_ref()
                .is_some_and(|after| after.version() == self.version.next() && after.created_version() == self.created)
    }
}

impl NodesWanted {
    /// What this batch needs of the runs that are there.
    pub(crate) fn of(batch: &Batch, heads: &BTreeMap<RunId, Option<Head>>, own: &BTreeMap<RunId, OwnVersions>) -> Self {
        let mut wanted: BTreeMap<RunId, OfRun> = BTreeMap::new();
        let mut tips: BTreeMap<&RunId, Tip> = BTreeMap::new();
        for part in batch.entries.iter().flat_map(|entry| &entry.parts) {
            let Some(Some(head)) = heads.get(&part.run) else { continue };
            let tip = tips.entry(&part.run).or_insert_with(|| Tip {
                version: head.version,
                created: head.created_version,
                own: own.get(&part.run).cloned().unwrap_or_default(),
            });
            let creates = part.mutations.first().is_some_and(Mutation::creates_run);
            let smooth = !creates && tip.is_smooth(part);
            tip.version = tip.version.next();
            tip.own.push(tip.version);
            let mut needs = OfRun::default();
            needs.nodes.extend(part.guards.iter().filter_map(Guard::node).cloned());
            if !smooth {
                needs.nodes.extend(part.mutations.iter().filter_map(Mutation::node).cloned());
                needs.header = part.mutations.iter().any(|mutation| matches!(mutation, Mutation::Update { .. }));
            }
            needs.all = part.mutations.iter().any(|m| matches!(m, Mutation::Delete { keep_coverage: true }));
            if needs != OfRun::default() {
                let of_run = wanted.entry(part.run.clone()).or_default();
                of_run.header |= needs.header;
                of_run.all |= needs.all;
                of_run.nodes.extend(needs.nodes);
            }
        }
        Self(wanted)
    }

    /// Whether the heads are enough.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
