//! Single writes, each a transaction of its own.

use chrono::{DateTime, Utc};

use super::{Commit, Coordinator, Transaction};
use crate::error::Error;
use crate::model::InputError;
use crate::model::{
    IntoInterval, IntoNodeId, IntoRunId, Mutation, NewRun, NodeId, NodeUpdate, PartitionKey, RunId, RunStatus, RunUpdate,
    Snapshot,
};

/// What happens to what a run's nodes completed when the run is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum OnDelete {
    /// Its completed intervals and partitions are pending again, unless another run completed them too. The default.
    #[default]
    DropCoverage,
    /// Its completed intervals and partitions stay complete, and its nodes' last success stays readable. What cleanup does.
    KeepCoverage,
}

/// What a mutation's stamp is until the run's actor sets it.
pub(super) const UNSTAMPED: DateTime<Utc> = DateTime::<Utc>::UNIX_EPOCH;

impl Coordinator {
    /// Begins a transaction: see [`Transaction`].
    pub fn transaction(&self) -> Transaction {
        Transaction::new(self.clone())
    }

    /// Creates a run.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, create_state_backend};
    ///
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// let commit = state.create_run("run_1", NewRun::running().metadata("trigger", "cron")).await?;
    /// assert!(commit.seq.is_some(), "its place in the order of the whole store");
    /// let again = state.create_run("run_1", NewRun::running()).await.unwrap_err();
    /// assert!(again.is_conflict(), "nobody's run is made twice");
    /// # state.close().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::RunExists`] if there is such a run; [what every write may answer](Self#what-every-write-may-answer).
    ///
    /// # Cancel safety
    /// Dropped before it was sent it changes nothing; after, the run is created or not.
    pub async fn create_run(&self, run: impl IntoRunId, new: NewRun) -> Result<Commit, Error> {
        let run = run.into_run_id()?;
        let mutation = self.creation(new);
        self.write(run, mutation).await
    }

    /// Opens a run, and creates it if it is not there.
    ///
    /// # Errors
    /// As [`create_run`](Self::create_run), but for the run that is there.
    ///
    /// # Cancel safety
    /// As [`create_run`](Self::create_run).
    pub async fn ensure_run(&self, run: impl IntoRunId, new: NewRun) -> Result<Snapshot, Error> {
        let run = run.into_run_id()?;
        loop {
            if let Some(snapshot) = self.get_run(&run).await? {
                return Ok(snapshot);
            }
            match self.create_run(&run, new.clone()).await {
                Ok(_) | Err(Error::RunExists(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Changes a run's header. Ending a run frees its locks and its nodes'. The nodes stay as they are, also those that run: end them in the same
    /// [transaction](Self::transaction). Of a run whose process is gone `seeknal state end` (in a program `project::end`) fails those that still run.
    ///
    /// # Errors
    /// [`Error::RunNotFound`]; [what every write may answer](Self#what-every-write-may-answer).
    ///
    /// # Cancel safety
    /// Dropped before it was sent it changes nothing; after, it happens or not.
    pub async fn update_run(&self, run: impl IntoRunId, update: RunUpdate) -> Result<Commit, Error> {
        let mutation = self.header_change(update);
        self.write(run.into_run_id()?, mutation).await
    }

    /// Deletes a run and frees its locks.
    ///
    /// # Errors
    /// As [`update_run`](Self::update_run).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn delete_run(&self, run: impl IntoRunId, coverage: OnDelete) -> Result<Commit, Error> {
        self.write(run.into_run_id()?, Mutation::Delete { keep_coverage: coverage == OnDelete::KeepCoverage }).await
    }

    /// Changes a node, or makes it; never makes the run. See [`NodeUpdate`] for what happens to the fields that are not given.
    ///
    /// # Errors
    /// As [`update_run`](Self::update_run).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub fn set_node_state(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        update: NodeUpdate,
    ) -> impl Future<Output = Result<Commit, Error>> + Send {
        self.write_checked(checked_ids(run, node).map(|(run, node)| (run, node_change(node, update))))
    }

    /// As [`set_node_state`](Self::set_node_state), but refused at once if the coordinator is full.
    ///
    /// # Errors
    /// [`Error::Overloaded`]; else as [`set_node_state`](Self::set_node_state).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn try_set_node_state(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        update: NodeUpdate,
    ) -> Result<Commit, Error> {
        let mut tx = self.transaction();
        tx.set_node_state(run, node, update);
        tx.try_commit().await
    }

    /// Deletes a node of a run, with what it completed there.
    ///
    /// # Errors
    /// [`Error::NodeNotFound`]; else as [`update_run`](Self::update_run).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn delete_node(&self, run: impl IntoRunId, node: impl IntoNodeId) -> Result<Commit, Error> {
        self.write(run.into_run_id()?, Mutation::DeleteNode { node: node.into_node_id()? }).await
    }

    /// Marks a stretch of time as complete for a node: half-open, UTC; what overlaps or touches becomes one. A node that is not there is made,
    /// pending. Takes an [`Interval`](crate::Interval), a range of stamps (cut to whole microseconds), or a pair of texts (without zone: UTC).
    ///
    /// # Errors
    /// [`Error::Input`] for an inverted, empty (also by the cut) or unparsable interval; else as [`update_run`](Self::update_run).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn add_completed_interval(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        interval: impl IntoInterval,
    ) -> Result<Commit, Error> {
        let mutation = Mutation::AddInterval { node: node.into_node_id()?, interval: interval.into_interval()? };
        self.write(run.into_run_id()?, mutation).await
    }

    /// Takes a stretch of time out again (a restatement), in this run. A node that is not there is not made.
    ///
    /// # Errors
    /// As [`add_completed_interval`](Self::add_completed_interval).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn remove_completed_interval(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        interval: impl IntoInterval,
    ) -> Result<Commit, Error> {
        let mutation = Mutation::RemoveInterval { node: node.into_node_id()?, interval: interval.into_interval()? };
        self.write(run.into_run_id()?, mutation).await
    }

    /// Marks a partition as complete for a node. A node that is not there is made, pending. Partitions are always on: nothing need be enabled.
    ///
    /// # Errors
    /// [`Error::Input`] for a bad partition name; else as [`update_run`](Self::update_run).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn add_completed_partition(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        partition: impl AsRef<str>,
    ) -> Result<Commit, Error> {
        let mutation = Mutation::AddPartition { node: node.into_node_id()?, partition: PartitionKey::new(partition)? };
        self.write(run.into_run_id()?, mutation).await
    }

    /// Takes a partition out again, in this run. One that is not there changes nothing, and a node that is not there is not made.
    ///
    /// # Errors
    /// As [`add_completed_partition`](Self::add_completed_partition).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn remove_completed_partition(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        partition: impl AsRef<str>,
    ) -> Result<Commit, Error> {
        let mutation = Mutation::RemovePartition { node: node.into_node_id()?, partition: PartitionKey::new(partition)? };
        self.write(run.into_run_id()?, mutation).await
    }

    /// Sets a note on a run.
    ///
    /// # Errors
    /// As [`update_run`](Self::update_run).
    ///
    /// # Cancel safety
    /// As [`update_run`](Self::update_run).
    pub async fn set_metadata(
        &self,
        run: impl IntoRunId,
        key: impl AsRef<str>,
        value: impl Into<serde_json::Value>,
    ) -> Result<Commit, Error> {
        self.update_run(run, RunUpdate::new().metadata(key, value)).await
    }

    pub(super) fn creation(&self, mut new: NewRun) -> Mutation {
        if new.status == RunStatus::Running && new.worker.is_none() {
            new.worker = Some(self.engine().process.clone());
        }
        let (now, at) = self.engine().next_creation_stamp();
        if new.status == RunStatus::Running {
            // Where the run is put behind others, that is not when it starts.
            new.started_at.get_or_insert(now);
        }
        Mutation::Create { run: new, at }
    }

    pub(super) fn header_change(&self, mut update: RunUpdate) -> Mutation {
        if update.status == Some(RunStatus::Running) && update.worker.is_keep() {
            update.worker = crate::model::Change::Set(self.engine().process.clone());
        }
        Mutation::Update { update, at: UNSTAMPED }
    }
}

pub(super) fn node_change(node: NodeId, update: NodeUpdate) -> Mutation {
    Mutation::SetNode { node, update: Box::new(update), at: UNSTAMPED }
}

/// Ids of a call, checked.
pub(super) fn ids(run: impl IntoRunId, node: impl IntoNodeId) -> Result<(RunId, NodeId), Error> {
    Ok(checked_ids(run, node)?)
}

fn checked_ids(run: impl IntoRunId, node: impl IntoNodeId) -> Result<(RunId, NodeId), InputError> {
    Ok((run.into_run_id()?, node.into_node_id()?))
}
