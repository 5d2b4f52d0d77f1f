//! Transactions: mutations and guards, on one run or several, that happen as one.

use std::collections::HashSet;

use super::commit::{Work, of_claims};
use super::write::node_change;
use super::{Commit, Coordinator, Durability, OnDelete};
use crate::error::Error;
use crate::lease::Lease;
use crate::model::{
    Guard, InputError, IntoInterval, IntoNodeId, IntoRunId, LeaseMutation, Mutation, NewRun, NodeStatus, NodeUpdate,
    PartitionKey, RunId, RunStatus, RunUpdate, Version,
};

/// Mutations and guards that happen as one, or not at all: for readers, on disk, after a crash. Nothing happens before
/// [`commit`](Self::commit); dropped, it is a rollback.
///
/// A bad id, interval or partition is told by `commit`; then nothing was written. What is put in may be chained, what commits stands alone: `commit` takes the
/// transaction itself.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeStatus, NodeUpdate, create_state_backend};
/// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
/// # state.create_run("run_1", NewRun::running()).await?;
/// let mut tx = state.transaction();
/// tx.expect_absent("run_1", "node2")
///     .set_node_state("run_1", "node1", NodeUpdate::success())
///     .set_node_state("run_1", "node2", NodeUpdate::running());
/// let commit = tx.commit().await?;
/// assert_eq!(commit.version(), state.get_run("run_1").await?.unwrap().version());
/// # state.close().await }).unwrap();
/// ```
#[derive(Debug)]
#[must_use = "a transaction that is dropped is a rollback"]
pub struct Transaction {
    state: Coordinator,
    work: Work,
    error: Option<InputError>,
}

impl Transaction {
    pub(super) fn new(state: Coordinator) -> Self {
        Self { state, work: Work::default(), error: None }
    }

    fn add(&mut self, step: impl FnOnce(&Coordinator) -> Result<(RunId, Mutation), InputError>) -> &mut Self {
        match step(&self.state) {
            Ok((run, mutation)) => self.work.runs.entry(run).or_default().mutations.push(mutation),
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
        self
    }

    fn expect(&mut self, step: impl FnOnce() -> Result<(RunId, Guard), InputError>) -> &mut Self {
        match step() {
            Ok((run, guard)) => self.guard(run, guard),
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
        self
    }

    /// Leases that are given back with it, where they are rows of the storage.
    pub(super) fn give_back(&mut self, leases: Vec<LeaseMutation>) {
        self.work.leases.extend(leases);
    }

    /// Creates a run; the transaction is refused if it is there.
    pub fn create_run(&mut self, run: impl IntoRunId, new: NewRun) -> &mut Self {
        self.add(|state| Ok((run.into_run_id()?, state.creation(new))))
    }

    /// Changes a run's header.
    pub fn update_run(&mut self, run: impl IntoRunId, update: RunUpdate) -> &mut Self {
        self.add(|state| Ok((run.into_run_id()?, state.header_change(update))))
    }

    /// Deletes a run. It must be the last step on that run; what the steps before it complete or take out counts for the coverage that is kept.
    pub fn delete_run(&mut self, run: impl IntoRunId, coverage: OnDelete) -> &mut Self {
        self.add(|_| Ok((run.into_run_id()?, Mutation::Delete { keep_coverage: coverage == OnDelete::KeepCoverage })))
    }

    /// Changes a node, or makes it.
    pub fn set_node_state(&mut self, run: impl IntoRunId, node: impl IntoNodeId, update: NodeUpdate) -> &mut Self {
        self.add(|_| Ok((run.into_run_id()?, node_change(node.into_node_id()?, update))))
    }

    /// Deletes a node; the transaction is refused if it is not there.
    pub fn delete_node(&mut self, run: impl IntoRunId, node: impl IntoNodeId) -> &mut Self {
        self.add(|_| Ok((run.into_run_id()?, Mutation::DeleteNode { node: node.into_node_id()? })))
    }

    /// Marks a stretch of time as complete.
    pub fn add_completed_interval(
        &mut self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        interval: impl IntoInterval,
    ) -> &mut Self {
        self.add(|_| {
            let mutation = Mutation::AddInterval { node: node.into_node_id()?, interval: interval.into_interval()? };
            Ok((run.into_run_id()?, mutation))
        })
    }

    /// Takes a stretch of time out again.
    pub fn remove_completed_interval(
        &mut self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        interval: impl IntoInterval,
    ) -> &mut Self {
        self.add(|_| {
            let mutation = Mutation::RemoveInterval { node: node.into_node_id()?, interval: interval.into_interval()? };
            Ok((run.into_run_id()?, mutation))
        })
    }

    /// Marks a partition as complete.
    pub fn add_completed_partition(
        &mut self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        partition: impl AsRef<str>,
    ) -> &mut Self {
        self.add(|_| {
            let mutation = Mutation::AddPartition { node: node.into_node_id()?, partition: PartitionKey::new(partition)? };
            Ok((run.into_run_id()?, mutation))
        })
    }

    /// Takes a partition out again.
    pub fn remove_completed_partition(
        &mut self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        partition: impl AsRef<str>,
    ) -> &mut Self {
        self.add(|_| {
            let mutation = Mutation::RemovePartition { node: node.into_node_id()?, partition: PartitionKey::new(partition)? };
            Ok((run.into_run_id()?, mutation))
        })
    }

    /// The run must be at exactly this version. One beyond a snapshot's [`durable_version`](crate::Snapshot::durable_version) is not certain yet: if the
    /// deferred write that was seen under it is lost, another commit may get it.
    ///
    /// A condition on a run counts as a part of the transaction: when it commits, **the run gets a new version, also where nothing else is written to it**, and stands in
    /// [`Commit::runs`]. So two transactions that only look at the same run conflict if both expect its version, and its readers are told of a change.
    pub fn expect_version(&mut self, run: impl IntoRunId, version: Version) -> &mut Self {
        self.expect(|| Ok((run.into_run_id()?, Guard::RunVersion(version))))
    }

    /// The run must be in one of these statuses.
    pub fn expect_run_status(&mut self, run: impl IntoRunId, one_of: impl IntoIterator<Item = RunStatus>) -> &mut Self {
        self.expect(|| Ok((run.into_run_id()?, Guard::RunStatus(one_of.into_iter().collect()))))
    }

    /// The node must be there, in one of these statuses.
    pub fn expect_status(
        &mut self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        one_of: impl IntoIterator<Item = NodeStatus>,
    ) -> &mut Self {
        self.expect(|| {
            Ok((run.into_run_id()?, Guard::NodeStatus { node: node.into_node_id()?, one_of: one_of.into_iter().collect() }))
        })
    }

    /// There must be no such node.
    pub fn expect_absent(&mut self, run: impl IntoRunId, node: impl IntoNodeId) -> &mut Self {
        self.expect(|| Ok((run.into_run_id()?, Guard::NodeAbsent { node: node.into_node_id()? })))
    }

    /// The node must have been changed last at this version of the run ([`Version::NONE`]: it must not be there); of which versions are certain see
    /// [`expect_version`](Self::expect_version).
    pub fn expect_node_version(&mut self, run: impl IntoRunId, node: impl IntoNodeId, version: Version) -> &mut Self {
        self.expect(|| Ok((run.into_run_id()?, Guard::NodeVersion { node: node.into_node_id()?, version })))
    }

    /// Nobody may hold a lease on the run or one of its nodes.
    pub fn expect_unlocked(&mut self, run: impl IntoRunId) -> &mut Self {
        self.expect(|| Ok((run.into_run_id()?, Guard::Unlocked)))
    }

    /// The lease must be held when the transaction commits: decided by its token, in the commit itself. It is no change of a run: alone it gives none a new
    /// version, also in [`transact`](Coordinator::transact) that read some.
    pub fn fenced_by(&mut self, lease: &Lease) -> &mut Self {
        let fence = lease.fence();
        if !self.work.fences.contains(&fence) {
            self.work.fences.push(fence);
            self.work.claims.extend(lease.claimed().cloned());
        }
        self
    }

    /// Takes everything out that was put in: steps, conditions, fences, and a bad id among them. Its durability stays. So the closure of
    /// [`transact`](Coordinator::transact) may give up late and answer in its own words, and nothing is committed:
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// let (decided, _nothing) = state
    ///     .transact(|_, tx| {
    ///         tx.set_node_state("run_1", "reserve", NodeUpdate::running());
    ///         tx.clear();
    ///         Ok(Err::<(), _>("over budget"))
    ///     })
    ///     .await?;
    /// assert_eq!(decided, Err("over budget"));
    /// assert!(state.get_run("run_1").await?.unwrap().node("reserve").is_none());
    /// # state.close().await }).unwrap();
    /// ```
    pub fn clear(&mut self) -> &mut Self {
        self.work = Work::default();
        self.error = None;
        self
    }

    /// What its acknowledgement means; see [`Durability`].
    pub fn durability(&mut self, durability: Durability) -> &mut Self {
        self.state.durability = durability;
        self
    }

    /// Whether there is nothing in it: no step, no condition, no lease of [`fenced_by`](Self::fenced_by).
    pub fn is_empty(&self) -> bool {
        self.work.is_empty() && self.error.is_none()
    }

    /// Commits. An empty transaction does nothing, also under [`with_lease`](Coordinator::with_lease); one of conditions or fences alone is decided as any other.
    ///
    /// # Errors
    /// [What every write may answer](Coordinator#what-every-write-may-answer): [`Error::Conflict`] if a guard did not hold, [`Error::LeaseLost`] if a lease is not held
    /// any more, [`Error::DeferredLost`] if earlier deferred writes on one of its runs were lost; then nothing was written. [`Error::is_unknown_outcome`] says whether
    /// anything may have been.
    ///
    /// # Cancel safety
    /// Dropped before it was sent it changes nothing; after, all of it happens or nothing, and nobody else is disturbed.
    pub async fn commit(self) -> Result<Commit, Error> {
        self.finish(false).await
    }

    /// As [`commit`](Self::commit), but refused at once if the coordinator is full.
    ///
    /// # Errors
    /// [`Error::Overloaded`]; else as [`commit`](Self::commit).
    ///
    /// # Cancel safety
    /// As [`commit`](Self::commit).
    pub async fn try_commit(self) -> Result<Commit, Error> {
        self.finish(true).await
    }

    async fn finish(self, now: bool) -> Result<Commit, Error> {
        let (state, mut work) = self.into_work()?;
        if work.is_empty() {
            return Ok(Commit { seq: None, runs: Vec::new() });
        }
        work.now = now;
        state.commit_work(work).await
    }

    /// What was put in, with all conditions of its own and of the claims that it is under, each of them once.
    pub(super) fn into_work(self) -> Result<(Coordinator, Work), InputError> {
        let Self { state, mut work, error } = self;
        if let Some(error) = error {
            return Err(error);
        }
        work.claims.extend(state.claims.iter().flat_map(|claims| claims.iter().cloned()));
        for (run, draft) in &mut work.runs {
            // First: whose claim is over is told so, and what else did not hold is no matter.
            draft.guards.splice(0..0, of_claims(&work.claims, run, &draft.mutations));
            keep_first(&mut draft.guards);
        }
        Ok((state, work))
    }

    /// Whether it has a step or a condition, and not leases alone.
    pub(super) fn is_of_runs(&self) -> bool {
        !self.work.runs.is_empty()
    }

    pub(super) fn guard(&mut self, run: RunId, guard: Guard) {
        self.work.runs.entry(run).or_default().guards.push(guard);
    }
}

/// Drops every guard that stands before it already.
fn keep_first(guards: &mut Vec<Guard>) {
    let mut seen = HashSet::with_capacity(guards.len());
    let firsts: Vec<bool> = guards.iter().map(|guard| seen.insert(guard)).collect();
    let mut firsts = firsts.into_iter();
    guards.retain(|_| firsts.next().unwrap_or(true));
}
