//! Questions: runs, nodes, intervals, partitions, over one run and over all.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use chrono::{DateTime, Utc};
use tokio::sync::oneshot;

use super::builder::FURTHEST_ZONE;
use super::step_back::step_back;
use super::{ChangeStream, Coordinator, Engine};
use crate::error::Error;
use crate::model::{
    Interval, IntervalSet, IntoInterval, IntoNodeId, IntoRunId, LastSuccess, NodeCoverage, NodeId, NodeState, PartitionKey,
    RunId, RunPage, RunQuery, RunState, Snapshot, Version,
};
use crate::run::Found;

impl Coordinator {
    /// A run as it is now; `None` if there is no such run. Of a run that is resident it is a copy of a pointer: it waits for nobody.
    ///
    /// # Errors
    /// [`Error::Input`] for a bad id; [`Error::Store`] if a run that is not resident could not be loaded.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn get_run(&self, run: impl IntoRunId) -> Result<Option<Snapshot>, Error> {
        self.engine().snapshot(&run.into_run_id()?).await
    }

    /// A run as it is now, if it is resident: without waiting, from any thread.
    pub fn snapshot(&self, run: impl AsRef<str>) -> Option<Snapshot> {
        self.engine().directory.get(run.as_ref())?.cell().snapshot()
    }

    /// A run as it is in storage now, read past what this process knows: for a decision that must not rest on a snapshot that lags behind other
    /// processes by some milliseconds. `None` if there is no such run. It waits for this process's writes on the run that were acknowledged from memory, and
    /// brings its snapshot up to date. After a write of which nobody knows whether it happened it shows what became of it.
    ///
    /// Where no other process can write it is [`get_run`](Self::get_run) behind those writes.
    ///
    /// A guard (`expect_version`, …) needs no fresh read: it is decided on what is in storage, in the commit.
    ///
    /// # Errors
    /// [`Error::Input`] for a bad id; [`Error::Store`] if storage could not be asked, or does not settle what it was sent: never an old snapshot instead.
    ///
    /// # Cancel safety
    /// Reads only. Dropping the future disturbs nobody, nor does not polling it.
    pub async fn fresh(&self, run: impl IntoRunId) -> Result<Option<Snapshot>, Error> {
        self.engine().fresh(&run.into_run_id()?).await
    }

    /// Several runs as they were at one moment, in the order of the names: no transaction is there in part, and nothing is seen without what came
    /// before it. Where other processes write too, storage is asked: what they committed over several runs comes to this process run by run.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    ///
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// # state.create_run("run_2", NewRun::running()).await?;
    /// let mut tx = state.transaction();
    /// tx.set_node_state("run_1", "orders", NodeUpdate::success());
    /// tx.set_node_state("run_2", "orders", NodeUpdate::running());
    /// tx.commit().await?;
    /// let [Some(one), Some(two)] = &state.snapshots(&["run_1", "run_2"]).await?[..] else { panic!("both are there") };
    /// assert!(one.node("orders").is_some() && two.node("orders").is_some(), "never the one without the other");
    /// # state.close().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`get_run`](Self::get_run); [`Error::Store`] if storage could not be asked: never snapshots of different moments instead.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn snapshots<R>(&self, runs: &[R]) -> Result<Vec<Option<Snapshot>>, Error>
    where
        R: AsRef<str>,
    {
        let ids: Vec<RunId> = runs.iter().map(|run| RunId::new(run.as_ref())).collect::<Result<_, _>>()?;
        self.engine().snapshots(&ids).await
    }

    /// A node of a run as it is now; `None` if there is no such run or node.
    ///
    /// # Errors
    /// As [`get_run`](Self::get_run).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn get_node_state(&self, run: impl IntoRunId, node: impl IntoNodeId) -> Result<Option<NodeState>, Error> {
        let (run, node) = super::write::ids(run, node)?;
        Ok(self.engine().snapshot(&run).await?.and_then(|run| run.node(node.as_str()).cloned()))
    }

    /// The stretches of time that a node completed in a run, in order; empty if there is no such run or node.
    ///
    /// # Errors
    /// As [`get_run`](Self::get_run).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn get_completed_intervals(&self, run: impl IntoRunId, node: impl IntoNodeId) -> Result<IntervalSet, Error> {
        Ok(self.get_node_state(run, node).await?.map(|node| (*node.intervals).clone()).unwrap_or_default())
    }

    /// The partitions that a node completed in a run, sorted; empty if there is no such run or node.
    ///
    /// # Errors
    /// As [`get_run`](Self::get_run).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list_completed_partitions(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
    ) -> Result<BTreeSet<PartitionKey>, Error> {
        Ok(self.get_node_state(run, node).await?.map(|node| (*node.partitions).clone()).unwrap_or_default())
    }

    /// One page of runs, newest first. Pages are cut by key: runs that come or go meanwhile make nobody else appear twice or not at all.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, RunFilter, RunQuery, RunStatus, create_state_backend};
    ///
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # for run in ["run_1", "run_2", "run_3"] { state.create_run(run, NewRun::running()).await?; }
    /// let mut query = RunQuery::new(RunFilter::all().status(RunStatus::Running)).limit(2);
    /// let mut seen = Vec::new();
    /// loop {
    ///     let page = state.list_runs(&query).await?;
    ///     seen.extend(page.runs.into_iter().map(|run| run.run_id));
    ///     if page.next.is_none() {
    ///         break;
    ///     }
    ///     query = query.after(page.next);
    /// }
    /// assert_eq!(seen, ["run_3", "run_2", "run_1"]);
    /// # state.close().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`] if storage failed.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list_runs(&self, query: &RunQuery) -> Result<RunPage, Error> {
        let engine = self.asked()?;
        engine.settle_deferred().await;
        // The field may hold what the setter would not take.
        let query = query.clamped();
        Ok(engine.backend.list_runs(&query).await?)
    }

    /// The state of a node in the newest run that has it, with that run's id.
    ///
    /// # Errors
    /// [`Error::Input`] for a bad id; [`Error::Store`] if storage failed.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn latest_node_state(&self, node: impl IntoNodeId) -> Result<Option<(RunId, NodeState)>, Error> {
        let node = node.into_node_id()?;
        let engine = self.asked()?;
        engine.settle_deferred().await;
        Ok(engine.backend.latest_node(&node).await?)
    }

    /// The last success of a node over all runs, also those that cleanup deleted: its fingerprint, row count, watermarks and run. Of a run that is there it counts what
    /// the node is now: a success that is begun anew in the same run (reset, running, failed) is none any more, and that of an earlier run counts again.
    ///
    /// A database looks at the node's states from the newest run on, until one is a success: a node that has had none in thousands of runs costs a look at each of them
    /// (half a second for 25,000 on SQLite; an index for this would double what every commit writes).
    ///
    /// # Errors
    /// As [`latest_node_state`](Self::latest_node_state).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn last_success(&self, node: impl IntoNodeId) -> Result<Option<LastSuccess>, Error> {
        let node = node.into_node_id()?;
        let engine = self.asked()?;
        engine.settle_deferred().await;
        Ok(engine.backend.last_success(&node).await?)
    }

    /// What a node completed over all runs, also those that cleanup deleted.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, OnDelete, create_state_backend};
    ///
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// state.add_completed_interval("run_1", "orders", ("2024-01-01", "2024-01-03")).await?;
    /// state.set_node_state("run_1", "orders", NodeUpdate::success().row_count(7)).await?;
    /// state.delete_run("run_1", OnDelete::KeepCoverage).await?;
    /// assert_eq!(state.coverage("orders").await?.intervals.len(), 1);
    /// assert_eq!(state.last_success("orders").await?.and_then(|last| last.row_count), Some(7));
    /// let todo = state.pending("orders", ("2024-01-01", "2024-01-04")).await?;
    /// assert_eq!(todo.iter().count(), 1, "the third of January");
    /// # state.close().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// It reads what every run that is there says of the node, as [`pending`](Self::pending) does: a quarter of a second for 25,000 runs on SQLite.
    ///
    /// # Errors
    /// As [`latest_node_state`](Self::latest_node_state).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn coverage(&self, node: impl IntoNodeId) -> Result<NodeCoverage, Error> {
        let node = node.into_node_id()?;
        let engine = self.asked()?;
        engine.settle_deferred().await;
        Ok(engine.backend.coverage(&node).await?)
    }

    /// The parts of a stretch of time that a node has not completed in any run, in order: what is still to do. Bounds are cut to whole microseconds.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::Interval;
    ///
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    ///
    /// state.add_completed_interval("run_1", "load", ("2024-01-01", "2024-01-03")).await?;
    /// let todo = state.pending("load", ("2024-01-01", "2024-01-05")).await?;
    /// assert_eq!(todo, [Interval::parse("2024-01-03", "2024-01-05")?]);
    /// # state.close().await?;
    /// # Ok::<(), seeknal_state::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for an inverted or empty range, also one whose bounds are in the same microsecond; else as [`latest_node_state`](Self::latest_node_state).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn pending(&self, node: impl IntoNodeId, within: impl IntoInterval) -> Result<Vec<Interval>, Error> {
        let within = within.into_interval()?;
        Ok(self.coverage(node).await?.intervals.gaps(within))
    }

    /// Every node that some run or the coverage knows, sorted.
    ///
    /// # Errors
    /// [`Error::Store`] if storage failed.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn node_ids(&self) -> Result<BTreeSet<NodeId>, Error> {
        let engine = self.asked()?;
        engine.settle_deferred().await;
        Ok(engine.backend.node_ids().await?)
    }

    /// What answers a question that storage is asked. What that says itself once it is closed differs from one to another.
    fn asked(&self) -> Result<&Arc<Engine>, Error> {
        Some(self.engine()).filter(|engine| !engine.is_closed()).ok_or(Error::Closed)
    }

    /// Listens to committed changes from now on. A subscriber that lags misses the oldest events, and is told how many.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::Event;
    ///
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    ///
    /// let mut changes = state.subscribe();
    /// state.set_node_state("run_1", "load", NodeUpdate::running()).await?;
    /// let Ok(Event::Changed(change)) = changes.next().await else { panic!("nothing else happened") };
    /// assert_eq!((change.run.as_str(), change.nodes[0].as_str()), ("run_1", "load"));
    /// # state.close().await?;
    /// # Ok::<(), seeknal_state::Error>(()) }).unwrap();
    /// ```
    ///
    /// Of what other processes commit it is told the net change of every run, usually within 20 ms (within 200 ms where others write without a pause), as one event that may stand for several commits:
    /// of all runs that are resident here, of those that were since there are subscribers, and of those that storage names as changed (PostgreSQL) or
    /// that are among the newest 100,000 (SQLite) or 1,000 (libSQL) of the store. Of those beyond the newest 64 it is told later: their versions are read four
    /// times a second, or as often as reading all of them takes a fifth of the time. A run that was not known here before is told as changed from
    /// [`Version::NONE`]. Runs that others change become resident as long as there is room for them
    /// ([`max_resident_runs`](crate::CoordinatorBuilder::max_resident_runs)); beyond it they are told when there is room again. What others commit in the milliseconds after the first
    /// `subscribe` to runs that are not resident may be taken for known: list the runs after subscribing, not before. So is a new run of another
    /// process that is read or written here before it was heard of.
    pub fn subscribe(&self) -> ChangeStream {
        let stream = self.engine().events.subscribe();
        self.engine().following.subscribed();
        stream
    }
}

impl Engine {
    pub(super) async fn snapshot(&self, run: &RunId) -> Result<Option<Snapshot>, Error> {
        if let Some(handle) = self.directory.get(run.as_str()) {
            // Of a run that is not there somebody else may have made one since.
            let snapshot = handle.cell().snapshot();
            if snapshot.is_some() || !self.backend.is_shared() {
                return Ok(snapshot);
            }
            handle.passivate();
            if !self.is_closed() {
                return Ok(self.backend.load_run(run).await?.map(|state| {
                    let durable = state.version();
                    Snapshot::new(state, durable)
                }));
            }
        }
        if self.is_closed() {
            return Err(Error::Closed);
        }
        match self.directory.existing(run).await? {
            Some(handle) => Ok(handle.cell().snapshot()),
            None => Ok(None),
        }
    }

    pub(super) async fn fresh(&self, run: &RunId) -> Result<Option<Snapshot>, Error> {
        let shared = self.backend.is_shared();
        loop {
            if self.is_closed() && (shared || self.directory.get(run.as_str()).is_none()) {
                return Err(Error::Closed);
            }
            let found = if shared { Some(self.backend.run_version(run).await?) } else { None };
            let Some(handle) = self.directory.existing(run).await? else {
                // Made between the two questions it is as fresh as none.
                return Ok(None);
            };
            if let Ok(stored) = handle.cell().stored()
                && found.is_none_or(|found| found == stored.as_ref().map(|stored| stored.version()))
            {
                return Ok(stored);
            }
            // Its actor is asked where what it shows may wait to be written. Who was told that nobody knows what became of a write was told so when it was marked
            // as such.
            let found = found.map(Found);
            if let Ok(read) = handle.read(found).await {
                return Ok(read);
            }
            step_back().await;
        }
    }

    /// As [`snapshots`](Self::snapshots), without what was only acknowledged from memory: that may still be lost, and its versions then name other states.
    pub(super) async fn committed(self: &Arc<Self>, runs: &[RunId]) -> Result<Vec<Option<Snapshot>>, Error> {
        let mut read = self.snapshots(runs).await?;
        while read.iter().flatten().any(|run| run.version() != run.durable_version()) {
            read = self.held(runs).await?;
        }
        Ok(read)
    }

    async fn snapshots(self: &Arc<Self>, runs: &[RunId]) -> Result<Vec<Option<Snapshot>>, Error> {
        /// How often two readings in a row may differ before the runs are held.
        const READINGS: usize = 32;
        if self.backend.is_shared() && runs.iter().any(|run| Some(run) != runs.first()) {
            return self.snapshots_of_storage(runs).await;
        }
        let mut before = self.read_all(runs).await?;
        for _ in 0..READINGS {
            let again = self.read_all(runs).await?;
            if versions(&before) == versions(&again) {
                return Ok(again);
            }
            before = again;
        }
        self.held(runs).await
    }

    /// Several runs while all of them are held, each one settled; by a task of its own, so that nobody waits for a caller who is not polled.
    async fn held(self: &Arc<Self>, runs: &[RunId]) -> Result<Vec<Option<Snapshot>>, Error> {
        let (engine, runs) = (Arc::clone(self), runs.to_vec());
        let (mut reply, answer) = oneshot::channel();
        self.runtime.spawn(async move {
            let read = tokio::select! {
                read = engine.hold_and_read(&runs) => read,
                // While storage stands still callers may come and go without end.
                () = reply.closed() => return,
            };
            let _caller_gone = reply.send(read);
        });
        answer.await.unwrap_or(Err(Error::Closed))
    }

    async fn hold_and_read(&self, runs: &[RunId]) -> Result<Vec<Option<Snapshot>>, Error> {
        let mut ids: Vec<&RunId> = runs.iter().collect();
        ids.sort_unstable();
        ids.dedup();
        let mut held = Vec::with_capacity(ids.len());
        for id in ids {
            if let Some(handle) = self.directory.existing(id).await? {
                held.extend(handle.hold(false).await);
            }
        }
        self.read_all(runs).await
    }

    /// What storage has at one moment, with the help of what is known here.
    async fn snapshots_of_storage(&self, runs: &[RunId]) -> Result<Vec<Option<Snapshot>>, Error> {
        for run in runs {
            // What was acknowledged from memory is among it.
            if let Some(handle) = self.directory.get(run.as_str()).filter(|handle| handle.cell().has_deferred()) {
                handle.settle().await;
            }
        }
        let known = self.read_all(runs).await?;
        let stored = |known: Option<&Snapshot>| {
            known.filter(|known| known.version() == known.durable_version()).map(|known| known.state().clone())
        };
        let have: Vec<_> = runs.iter().cloned().zip(known.iter().map(|known| stored(known.as_ref()))).collect();
        let states = self.backend.reload_runs(&have).await?;
        let mut behind = Vec::new();
        for ((run, had), state) in have.iter().zip(&states) {
            let version = state.as_ref().map(RunState::version);
            if version != had.as_ref().map(RunState::version)
                && let Some(handle) = self.directory.get(run.as_str())
            {
                handle.follow(version);
                behind.push(handle);
            }
        }
        // Who reads one of them after this does not see it older.
        for handle in behind {
            handle.settle().await;
        }
        let snapshot = |state: RunState| {
            let durable = state.version();
            Snapshot::new(state, durable)
        };
        Ok(states.into_iter().map(|state| state.map(snapshot)).collect())
    }

    /// All runs, each as it is now, and no publication of several runs in part.
    async fn read_all(&self, runs: &[RunId]) -> Result<Vec<Option<Snapshot>>, Error> {
        for run in runs {
            self.snapshot(run).await?;
        }
        let mut missing = Vec::new();
        {
            let _no_publication = self.publications.read().unwrap_or_else(PoisonError::into_inner);
            let resident: Vec<_> = runs.iter().map(|run| self.directory.get(run.as_str())).collect();
            if resident.iter().all(Option::is_some) {
                return Ok(resident.into_iter().flatten().map(|handle| handle.cell().snapshot()).collect());
            }
            for (run, handle) in runs.iter().zip(resident) {
                missing.push((run, handle));
            }
        }
        // Some are not there, or went to sleep just now.
        let mut all = Vec::with_capacity(runs.len());
        for (run, handle) in missing {
            all.push(match handle {
                Some(handle) => handle.cell().snapshot(),
                None => self.snapshot(run).await?,
            });
        }
        Ok(all)
    }

    /// What the clock says, and the stamp of a new run: later than that of every run that this coordinator found when it was opened, or made since, so
    /// that these order as they were made. A stamp that lies further ahead than any zone is of a moment in which the clock was wrong, or this one is: behind it nobody goes.
    pub(super) fn next_creation_stamp(&self) -> (DateTime<Utc>, DateTime<Utc>) {
        use std::sync::atomic::Ordering;
        let now = crate::model::time::micros(self.context.clock.now());
        let furthest = now.saturating_add(FURTHEST_ZONE.num_microseconds().unwrap_or(0));
        let is_astray = |last: i64| last > furthest;
        let next = |last: i64| if is_astray(last) { last } else { now.max(last.saturating_add(1)) };
        let previous =
            self.last_creation.fetch_update(Ordering::AcqRel, Ordering::Acquire, |last| Some(next(last))).unwrap_or(now);
        let stamp = if is_astray(previous) { now } else { next(previous) };
        (crate::model::time::nearest(now), crate::model::time::nearest(stamp))
    }
}

fn versions(snapshots: &[Option<Snapshot>]) -> Vec<(Version, Version)> {
    snapshots
        .iter()
        .map(|run| run.as_ref().map_or((Version::NONE, Version::NONE), |run| (run.created_version(), run.version())))
        .collect()
}
