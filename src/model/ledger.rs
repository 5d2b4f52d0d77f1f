//! A whole store as one pure value: every run, the order of runs, coverage, last successes, and the rules by which entries are
//! accepted or refused. The memory and file backends are this ledger with a place to rest; for database backends it is the oracle.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use rpds::{RedBlackTreeMapSync, RedBlackTreeSetSync};
use serde::{Deserialize, Serialize};

use super::apply::{apply_all, apply_logged};
use super::batch::{BatchAnswer, Entry, Outcome, Receipt, Refusal, RunPart, RunReceipt};
use super::coverage::{LastSuccess, NodeCoverage, Retained, outliving};
use super::fences::{FenceCheck, Freed};
use super::guard::{Guard, NoRun, check_guards, first_violated};
use super::id::{InputError, NodeId, RunId};
use super::mutation::Mutation;
use super::query::{RunPage, RunQuery, RunSummary};
use super::run::{CommitSeq, RunState, Version};

/// What an accepted entry did to one run, as a log keeps it to do it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedPart {
    /// The run.
    pub run: RunId,
    /// Its version before; [`Version::NONE`] if the entry made it.
    pub before: Version,
    /// Its version after; the last version it had if the entry deleted it.
    pub after: Version,
    /// What changed.
    pub mutations: Vec<Mutation>,
}

type OrderKey = (DateTime<Utc>, RunId);

/// What the entries of one batch have done so far.
#[derive(Debug)]
struct InBatch<'f> {
    /// The runs of which an entry was refused: what comes later stands on it.
    refused: HashSet<RunId>,
    /// The runs that were written, once for every entry, with the version they had before it. What is newer was written by their own chain: all
    /// entries of one run in one batch stand on one another.
    /// A list, because nearly nobody asks: only an entry that meets another version than it expected.
    wrote: Vec<(RunId, Version)>,
    freed: &'f mut Freed,
}

impl InBatch<'_> {
    /// Whether an earlier entry of the same chain wrote this version.
    fn is_own(&self, run: &RunId, version: Version) -> bool {
        self.wrote.iter().any(|(written, before)| written == run && version > *before)
    }
}

/// A whole store as one value. A clone shares everything, so that a change is made on a copy and put in place when it is durable.
#[derive(Debug, Clone)]
pub struct Ledger {
    runs: RedBlackTreeMapSync<RunId, RunState>,
    order: RedBlackTreeSetSync<OrderKey>,
    node_runs: RedBlackTreeMapSync<NodeId, RedBlackTreeSetSync<OrderKey>>,
    coverage: RedBlackTreeMapSync<NodeId, Arc<NodeCoverage>>,
    last_success: RedBlackTreeMapSync<NodeId, Arc<LastSuccess>>,
    seq: CommitSeq,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// An empty store.
    pub fn new() -> Self {
        Self {
            runs: RedBlackTreeMapSync::new_sync(),
            order: RedBlackTreeSetSync::new_sync(),
            node_runs: RedBlackTreeMapSync::new_sync(),
            coverage: RedBlackTreeMapSync::new_sync(),
            last_success: RedBlackTreeMapSync::new_sync(),
            seq: CommitSeq(0),
        }
    }

    /// The sequence number of the last entry.
    pub fn seq(&self) -> CommitSeq {
        self.seq
    }

    /// Makes sure that no sequence number up to this one is used (again).
    pub fn raise_seq(&mut self, seq: CommitSeq) {
        self.seq = self.seq.max(seq);
    }

    /// Decides every entry of a batch in order, and applies what is accepted. Keeps no leases: an entry that grants or renews one is refused.
    pub fn commit(&mut self, entries: &[Entry], fences: &dyn FenceCheck) -> BatchAnswer {
        self.commit_freeing(entries, fences, &mut Freed::default())
    }

    /// As [`commit`](Self::commit), behind entries that have freed leases which `fences` still knows, and says which ones these have freed: they are to be
    /// void (`LeaseBook::free`) before anybody can see what was accepted.
    pub fn commit_freeing(&mut self, entries: &[Entry], fences: &dyn FenceCheck, freed: &mut Freed) -> BatchAnswer {
        let mut batch = InBatch { refused: HashSet::new(), wrote: Vec::with_capacity(entries.len()), freed };
        let outcomes = entries.iter().map(|entry| self.commit_entry(entry, fences, &mut batch)).collect();
        BatchAnswer { outcomes }
    }

    fn commit_entry(&mut self, entry: &Entry, fences: &dyn FenceCheck, batch: &mut InBatch<'_>) -> Outcome {
        match self.decide(entry, fences, batch) {
            Ok(after) => {
                self.seq = CommitSeq(self.seq.0.saturating_add(1));
                let mut runs = Vec::with_capacity(after.len());
                for (part, (state, version)) in entry.parts.iter().zip(after) {
                    let before = self.install(&part.run, &part.mutations, state);
                    batch.wrote.push((part.run.clone(), before));
                    runs.push(RunReceipt { run: part.run.clone(), before, after: version });
                }
                batch.freed.take_in(entry);
                for (node, retained) in &entry.retained {
                    self.restore_retained(node, retained);
                }
                Outcome::Applied(Receipt { seq: self.seq, runs, grants: Vec::new() })
            }
            Err(refusal) => {
                batch.refused.extend(entry.parts.iter().map(|part| part.run.clone()));
                Outcome::Refused(refusal)
            }
        }
    }

    /// Does again what a log says was accepted, at the versions that it was accepted at. On an error nothing is changed.
    ///
    /// # Errors
    /// [`InputError`] if the log does not fit this ledger: a sequence number that was used, a run at another version, a mutation that is refused.
    pub fn replay(&mut self, seq: CommitSeq, parts: &[LoggedPart], retained: &[(NodeId, Retained)]) -> Result<(), InputError> {
        let refuse = |why: String| InputError::new(format!("record {seq}"), why);
        if seq <= self.seq {
            return Err(refuse(format!("the state is at record {} already", self.seq)));
        }
        let mut states = Vec::with_capacity(parts.len());
        for part in parts {
            let current = self.runs.get(&part.run);
            let version = current.map_or(Version::NONE, RunState::version);
            if version != part.before {
                return Err(refuse(format!(
                    "it was made on run {:?} at version {}, which is at {version}",
                    part.run, part.before
                )));
            }
            if part.after <= part.before || part.after.0 > seq.0 {
                return Err(refuse(format!("it moves run {:?} from version {} to {}", part.run, part.before, part.after)));
            }
            let mut state = current.cloned();
            apply_logged(&mut state, &part.run, &part.mutations, part.after).map_err(|refusal| refuse(refusal.to_string()))?;
            states.push(state);
        }
        for (part, state) in parts.iter().zip(states) {
            self.install(&part.run, &part.mutations, state);
        }
        for (node, retained) in retained {
            self.restore_retained(node, retained);
        }
        self.seq = seq;
        Ok(())
    }

    /// The states after the entry, without changing anything yet.
    fn decide(
        &self,
        entry: &Entry,
        fences: &dyn FenceCheck,
        batch: &InBatch<'_>,
    ) -> Result<Vec<(Option<RunState>, Version)>, Refusal> {
        if !entry.leases.iter().all(|lease| lease.returned().is_some()) {
            // It must not be taken for granted by who asks for it.
            let why = "this storage keeps no leases as rows; its backend must keep them in a book, and say so (`lease_store`)";
            return Err(Refusal::Input(InputError::new("the lease of an entry", why)));
        }
        if let Some(fence) = entry.fences.iter().find(|fence| !batch.freed.holds(fence, fences)) {
            return Err(Refusal::Fenced { fence: fence.clone() });
        }
        let mut states = Vec::with_capacity(entry.parts.len());
        for (index, part) in entry.parts.iter().enumerate() {
            if !batch.refused.is_empty() && batch.refused.contains(&part.run) {
                return Err(Refusal::Chained { run: part.run.clone() });
            }
            if entry.parts.iter().take(index).any(|earlier| earlier.run == part.run) {
                return Err(Refusal::Input(InputError::new(format!("entry on run {:?}", part.run), "it names the run twice")));
            }
            states.push(self.decide_part(part, fences, batch)?);
        }
        Ok(states)
    }

    fn decide_part(
        &self,
        part: &RunPart,
        fences: &dyn FenceCheck,
        batch: &InBatch<'_>,
    ) -> Result<(Option<RunState>, Version), Refusal> {
        let current = self.runs.get(&part.run);
        let creates = part.mutations.first().is_some_and(Mutation::creates_run);
        let version = match current {
            Some(run) => {
                if !creates {
                    if part.base < run.created_version() && !batch.is_own(&part.run, run.created_version()) {
                        return Err(Refusal::RunNotFound { run: part.run.clone() });
                    }
                    if run.version() != part.expect && is_stale(part, run, batch) {
                        return Err(Refusal::Stale { run: part.run.clone() });
                    }
                }
                run.version().next()
            }
            // Also a part that only guards: nothing can be said of a run that is not there.
            None if !creates => return Err(Refusal::RunNotFound { run: part.run.clone() }),
            None => Version(self.seq.0.saturating_add(1)),
        };
        let violated = current.map_or_else(|| first_violated(&NoRun, &part.guards), |run| check_guards(run, &part.guards));
        if let Some((guard, found)) = violated {
            return Err(Refusal::Guard { run: part.run.clone(), guard: guard.clone(), found });
        }
        if part.guards.contains(&Guard::Unlocked)
            && let Some(holder) = batch.freed.holder(&part.run, fences)
        {
            let found = format!("it is locked by {holder}");
            return Err(Refusal::Guard { run: part.run.clone(), guard: Guard::Unlocked, found });
        }
        if let (Some(run), Some(after)) = (current, &part.after)
            && run.version() == part.expect
            && after.version() == version
            && after.created_version() == run.created_version()
        {
            return Ok((Some(after.clone()), version));
        }
        let mut state = current.cloned();
        apply_all(&mut state, &part.run, &part.mutations, version)?;
        Ok((state, version))
    }

    /// Puts a decided state in place, keeps the indexes, and tells the version before.
    fn install(&mut self, run: &RunId, mutations: &[Mutation], after: Option<RunState>) -> Version {
        let before = match (self.runs.get_mut(run), &after) {
            (Some(place), Some(new)) => Some(std::mem::replace(place, new.clone())),
            (Some(place), None) => Some(place.clone()),
            (None, _) => None,
        };
        match (&before, after) {
            // As many as before and none deleted: then they are the same ones.
            (Some(old), Some(new)) if old.node_count() == new.node_count() && !mutations.iter().any(Mutation::deletes_node) => {}
            (Some(old), Some(new)) => {
                for node in mutations.iter().filter_map(Mutation::node) {
                    let (was, is) = (old.node(node.as_str()).is_some(), new.node(node.as_str()).is_some());
                    if is && !was {
                        self.index_node(node, new.order_key());
                    } else if was && !is {
                        self.unindex_node(node, &old.order_key());
                    }
                }
            }
            (None, Some(new)) => {
                self.index_run(&new);
                self.runs.insert_mut(run.clone(), new);
            }
            (before, None) => {
                for (node, kept) in outliving(before.clone(), run, mutations) {
                    self.restore_retained(&node, &kept);
                }
                if let Some(old) = before {
                    self.unindex_run(old);
                    self.runs.remove_mut(run);
                }
            }
        }
        before.map_or(Version::NONE, |run| run.version())
    }

    fn index_run(&mut self, run: &RunState) {
        let key = run.order_key();
        for (node, _) in run.nodes() {
            self.index_node(node, key.clone());
        }
        self.order.insert_mut(key);
    }

    fn unindex_run(&mut self, run: &RunState) {
        let key = run.order_key();
        for (node, _) in run.nodes() {
            self.unindex_node(node, &key);
        }
        self.order.remove_mut(&key);
    }

    fn index_node(&mut self, node: &NodeId, key: OrderKey) {
        let runs = self.node_runs.get(node).cloned().unwrap_or_else(RedBlackTreeSetSync::new_sync);
        self.node_runs.insert_mut(node.clone(), runs.insert(key));
    }

    fn unindex_node(&mut self, node: &NodeId, key: &OrderKey) {
        let Some(runs) = self.node_runs.get(node) else { return };
        let runs = runs.remove(key);
        if runs.is_empty() {
            self.node_runs.remove_mut(node);
        } else {
            self.node_runs.insert_mut(node.clone(), runs);
        }
    }

    fn keep_success(&mut self, node: &NodeId, success: LastSuccess) {
        if self.last_success.get(node).is_none_or(|kept| success.replaces(kept)) {
            self.last_success.insert_mut(node.clone(), Arc::new(success));
        }
    }

    /// Puts in a run as it was stored, versions included. The sequence is raised to its version, so that a run which is made again under its
    /// name begins above it, whatever the stored sequence said.
    pub fn restore_run(&mut self, run: RunState) {
        self.raise_seq(CommitSeq(run.version().0));
        if let Some(old) = self.runs.get(run.id()).cloned() {
            self.unindex_run(&old);
        }
        self.index_run(&run);
        self.runs.insert_mut(run.id().clone(), run);
    }

    /// Joins what outlives the deleted runs of a node: coverage is added, the newer last success stays.
    pub fn restore_retained(&mut self, node: &NodeId, stored: &Retained) {
        if !stored.coverage.is_empty() {
            let mut coverage = self.retained_coverage(node.as_str());
            coverage.intervals.extend(stored.coverage.intervals.iter());
            coverage.partitions.extend(stored.coverage.partitions.iter().cloned());
            self.coverage.insert_mut(node.clone(), Arc::new(coverage));
        }
        if let Some(success) = &stored.last_success {
            self.keep_success(node, success.clone());
        }
    }

    /// One run.
    pub fn run(&self, id: &str) -> Option<&RunState> {
        self.runs.get(id)
    }

    /// How many runs there are.
    pub fn run_count(&self) -> usize {
        self.runs.size()
    }

    /// All runs, newest first.
    pub fn runs(&self) -> impl Iterator<Item = &RunState> {
        self.order.iter().rev().filter_map(|(_, id)| self.runs.get(id))
    }

    /// One page of runs, newest first.
    pub fn list(&self, query: &RunQuery) -> RunPage {
        let query = &query.clamped();
        let after = query.after.as_ref().map(|cursor| (cursor.created_at, cursor.run_id.clone()));
        let upper = match &after {
            Some(key) => std::ops::Bound::Excluded(key),
            None => std::ops::Bound::Unbounded,
        };
        let mut found: Vec<RunSummary> = self
            .order
            .range::<OrderKey, _>((std::ops::Bound::Unbounded, upper))
            .rev()
            .filter_map(|(_, id)| self.runs.get(id))
            .filter(|run| query.filter.matches(run.id(), run.header()))
            .take(query.limit.saturating_add(1))
            .map(RunSummary::of)
            .collect();
        let more = found.len() > query.limit;
        found.truncate(query.limit);
        let next = if more { found.last().map(RunSummary::cursor) } else { None };
        RunPage::new(found, next)
    }

    /// The runs that have a node, newest first.
    pub fn runs_of_node(&self, node: &str) -> impl Iterator<Item = &RunState> {
        self.node_runs.get(node).into_iter().flat_map(|runs| runs.iter().rev()).filter_map(|(_, id)| self.runs.get(id))
    }

    /// Every node that some run has.
    pub fn node_ids(&self) -> impl Iterator<Item = &NodeId> {
        self.node_runs.keys()
    }

    /// The last success of a node over all runs, also deleted ones.
    pub fn last_success(&self, node: &str) -> Option<LastSuccess> {
        let live = self.runs_of_node(node).find_map(|run| LastSuccess::of(run, run.node(node)?));
        let kept = self.last_success.get(node).map(|kept| LastSuccess::clone(kept));
        match (live, kept) {
            (Some(live), Some(kept)) => Some(if kept.is_newer_than(&live) { kept } else { live }),
            (live, kept) => live.or(kept),
        }
    }

    /// What the deleted runs of a node completed.
    pub fn retained_coverage(&self, node: &str) -> NodeCoverage {
        self.coverage.get(node).map(|c| NodeCoverage::clone(c)).unwrap_or_default()
    }

    /// Everything that outlives deleted runs, by node, in order of the nodes' ids.
    pub fn retained(&self) -> std::collections::BTreeMap<NodeId, Retained> {
        let mut all: std::collections::BTreeMap<NodeId, Retained> = self
            .coverage
            .iter()
            .map(|(node, coverage)| (node.clone(), Retained { coverage: NodeCoverage::clone(coverage), last_success: None }))
            .collect();
        for (node, success) in &self.last_success {
            all.entry(node.clone()).or_default().last_success = Some(LastSuccess::clone(success));
        }
        all
    }

    /// The completed intervals and partitions of a node, over all runs and what outlives them.
    pub fn coverage(&self, node: &str) -> NodeCoverage {
        let mut coverage = self.retained_coverage(node);
        for state in self.runs_of_node(node).filter_map(|run| run.node(node)) {
            coverage.absorb(state);
        }
        coverage
    }
}

/// Whether a row that the part writes or guards on is newer than its base, and not written by its own chain. A node that was deleted since
/// is not seen: one process writes here, so that only what bypassed the run's actor can be newer at all.
fn is_stale(part: &RunPart, run: &RunState, batch: &InBatch<'_>) -> bool {
    let newer = |version: Version| version > part.base && !batch.is_own(&part.run, version);
    let header =
        part.mutations.iter().any(Mutation::touches_header) || part.guards.iter().any(|g| matches!(g, Guard::RunStatus(_)));
    let nodes = part.mutations.iter().filter_map(Mutation::node).chain(part.guards.iter().filter_map(Guard::node));
    let deletes = part.mutations.iter().any(|m| matches!(m, Mutation::Delete { .. }));
    (deletes && newer(run.version()))
        || (header && newer(run.header().version))
        || nodes.into_iter().any(|node| run.node(node.as_str()).is_some_and(|state| newer(state.version)))
}
