//! Runs whose process is gone, and how another one takes them over.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Commit, Coordinator, Transaction};
use crate::error::Error;
use crate::lease::pause_on;
use crate::model::{
    FencingToken, IntoRunId, LeaseMutation, LeaseRecord, ProcessInfo, RunFilter, RunId, RunQuery, RunStatus, RunSummary,
    RunUpdate, Snapshot, Version,
};
use crate::store::{OpenProcess, gone};

/// A running run that nobody works on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AbandonedRun {
    /// The run.
    pub summary: RunSummary,
    /// Who worked on it; `None` if nobody ever said so (a run from a foreign file).
    pub worker: Option<ProcessInfo>,
}

/// A run that was taken over.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Resumed {
    /// The run as it is now.
    pub snapshot: Snapshot,
    /// The commit that made this process its worker; `None` where it was already.
    pub commit: Option<Commit>,
}

impl std::ops::Deref for Resumed {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

/// So long a run need not be watched again that was named as abandoned.
const KNOWN_FOR: Duration = Duration::from_secs(10);

/// Runs that were watched, at which version, so that who takes over what was named to him does not wait once more for each.
#[derive(Debug, Default)]
pub(super) struct Watched(Mutex<Option<(Instant, HashMap<RunId, Version>)>>);

impl Watched {
    fn note(&self, runs: &[RunSummary]) {
        let runs = runs.iter().map(|run| (run.run_id.clone(), run.version)).collect();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), runs));
    }

    fn knows(&self, run: &RunId, version: Version) -> bool {
        let watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        watched.as_ref().is_some_and(|(at, runs)| at.elapsed() < KNOWN_FOR && runs.get(run) == Some(&version))
    }
}

impl Coordinator {
    /// The running runs whose process is gone, newest first. A process counts as gone if the storage says so: it admits one process at a time, or it knows
    /// who has it open ([`StateBackend::processes`](crate::StateBackend::processes), [`known_openings`](crate::StateBackend::known_openings)). SQLite knows it of
    /// this host; the servers know it of all hosts, and take for gone whom they have not heard of for 30 s (PostgreSQL)
    /// or a minute (libSQL). Whoever lives and holds a lock or a claim on a run works on it, this process too; and so does whoever
    /// writes to it: where others have the storage open a run is watched for a second before it is named, so that it is not taken for abandoned between two
    /// claims. That a server was away is no sign of that: it is waited until it has answered for 16 s before who was silent is taken for gone.
    ///
    /// # Errors
    /// [`Error::Store`] if storage failed.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn abandoned_runs(&self) -> Result<Vec<AbandonedRun>, Error> {
        let running = self.running_runs().await?;
        if running.is_empty() {
            return Ok(Vec::new());
        }
        let engine = self.engine();
        // Behind the runs, the openings last: who works on one of them has the storage open before.
        let leases = self.list_locks().await?;
        let workers: HashSet<&str> = running
            .iter()
            .flat_map(|run| run.header.worker.iter().chain(gone::holders(&leases, &run.run_id)))
            .map(|worker| &*worker.id)
            .collect();
        let processes = gone::processes(&*engine.backend, |process| workers.contains(&*process.id)).await?;
        let is_left = |run: &RunSummary| {
            gone::is_left(&*engine.backend, &engine.process, &run.run_id, run.header.worker.as_ref(), &leases, &processes)
        };
        let mut found: Vec<RunSummary> = running.into_iter().filter(is_left).collect();
        if !found.is_empty() {
            let here = |run: &RunSummary| engine.directory.boards.has(&run.run_id);
            if gone::others_live(&engine.process, &processes) || found.iter().any(here) {
                let _is_kept = pause_on(&engine.runtime, gone::WATCHED).await;
            }
            // In between its process may have ended a run in order, and itself after it; or somebody works on it.
            let now: HashMap<RunId, RunSummary> =
                self.running_runs().await?.into_iter().map(|run| (run.run_id.clone(), run)).collect();
            let known: HashSet<FencingToken> = leases.iter().map(|lease| lease.token).collect();
            let new: HashSet<RunId> =
                self.list_locks().await?.into_iter().filter(|l| !known.contains(&l.token)).map(|lease| lease.key.run).collect();
            found = found
                .into_iter()
                .filter(|run| !new.contains(&run.run_id))
                .filter_map(|run| now.get(&run.run_id).filter(|still| still.version == run.version).cloned())
                .collect();
        }
        engine.watched.note(&found);
        Ok(found.into_iter().map(|summary| AbandonedRun { worker: summary.header.worker.clone(), summary }).collect())
    }

    async fn running_runs(&self) -> Result<Vec<RunSummary>, Error> {
        let mut running = Vec::new();
        let mut query = RunQuery::new(RunFilter::all().status(RunStatus::Running)).limit(1000);
        loop {
            let page = self.list_runs(&query).await?;
            running.extend(page.runs);
            if page.next.is_none() {
                return Ok(running);
            }
            query = query.after(page.next);
        }
    }

    fn is_gone(&self, worker: &ProcessInfo, processes: &[OpenProcess]) -> bool {
        gone::is_gone(&*self.engine().backend, &self.engine().process, Some(worker), processes)
    }

    /// Takes over a run whose process is gone: from now on this process is its worker, and the locks that dead processes held on the run and
    /// its nodes are free, both in one commit. Where others have the storage open it is watched for a second first, unless
    /// [`abandoned_runs`](Self::abandoned_runs) has just done so: whoever writes to it meanwhile works on it.
    /// Whoever knows better than storage takes a run by [`update_run`](Self::update_run) with [`RunUpdate::running`], whoever works on it. Its nodes stay as they are: what was running was not finished, and is the caller's to start again.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, create_state_backend};
    ///
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let options = BackendOptions::new().base_path(folder.path());
    /// # let dead = Coordinator::open(create_state_backend("file", &options)?).await?;
    /// # dead.create_run("run_1", NewRun::running()).await?;
    /// # dead.close().await?;
    /// let state = Coordinator::open(create_state_backend("file", &options)?).await?;
    /// for run in state.abandoned_runs().await? {
    ///     let resumed = state.resume_run(&run.summary.run_id).await?;
    ///     println!("{} goes on with {} nodes", resumed.id(), resumed.node_count());
    ///     assert!(resumed.commit.is_some_and(|commit| commit.seq.is_some()));
    /// }
    /// assert!(state.abandoned_runs().await?.is_empty());
    /// # state.close().await?;
    /// # Ok::<(), seeknal_state::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::RunInUse`] if its process lives (or cannot be known to be gone), or another one does that holds a lock or a claim on it; [`Error::RunNotFound`], [`Error::Conflict`] if the run is not running any
    /// more, was written to meanwhile, or another one was faster.
    ///
    /// # Cancel safety
    /// Dropped before it was sent it changes nothing; after, the run is taken over and its locks are free, or neither.
    pub async fn resume_run(&self, run: impl IntoRunId) -> Result<Resumed, Error> {
        let run = run.into_run_id()?;
        let mut commit = None;
        // What this process knows may be of a time when the run was its own.
        let snapshot = self.fresh(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?;
        let worker = snapshot.header().worker.clone();
        if snapshot.header().status == RunStatus::Running
            && worker.as_ref().is_none_or(|worker| worker.id != self.engine().process.id)
        {
            // Where leases live in a process they died with it. This one's own are in nobody's way.
            let leases = if self.engine().leases.keeps_rows() { self.list_locks().await? } else { Vec::new() };
            let others = || gone::holders(&leases, &run).filter(|holder| holder.id != self.engine().process.id);
            let users = || worker.iter().chain(others());
            let matters = |process: &ProcessInfo| users().any(|user| user.id == process.id);
            let processes = gone::processes(&*self.engine().backend, matters).await?;
            let user = users().find(|user| !self.is_gone(user, &processes)).cloned();
            if let Some(worker) = user {
                return Err(Error::RunInUse { run, worker });
            }
            let is_watched = self.engine().watched.knows(&run, snapshot.version());
            if !is_watched && gone::others_live(&self.engine().process, &processes) {
                // What is written meanwhile makes the commit a conflict.
                let _is_kept = pause_on(&self.engine().runtime, gone::WATCHED).await;
                // A lock moves no version.
                let known: HashSet<FencingToken> = leases.iter().map(|lease| lease.token).collect();
                let is_new = |lease: &LeaseRecord| {
                    lease.key.run == run && lease.owner.process.id != self.engine().process.id && !known.contains(&lease.token)
                };
                if let Some(lease) = self.list_locks().await?.into_iter().find(is_new) {
                    return Err(Error::RunInUse { run, worker: lease.owner.process });
                }
            }
            // All of them are of the dead. One that is over by then is none to be missed.
            let dead = |lease: &&LeaseRecord| lease.key.run == run && lease.owner.process.id != self.engine().process.id;
            let locks = leases.iter().filter(dead);
            let locks = locks.map(|lease| LeaseMutation::Release { key: lease.key.clone(), token: lease.token }).collect();
            let mut tx: Transaction = self.transaction();
            tx.expect_version(&run, snapshot.version());
            tx.update_run(&run, RunUpdate::running());
            // In the same commit: a run that is ours has no locks of the dead left, and who is refused has taken nobody's.
            tx.give_back(locks);
            commit = Some(tx.commit().await?);
            // Who waits here for one of them looks again.
            self.engine().leases.foreign_commits();
        } else if snapshot.header().status != RunStatus::Running {
            // It does not run, as far as is seen here. If somebody made it run since, that one is not robbed of it.
            let mut tx: Transaction = self.transaction();
            tx.expect_version(&run, snapshot.version());
            tx.expect_run_status(&run, [RunStatus::Running]);
            tx.update_run(&run, RunUpdate::running());
            commit = Some(tx.commit().await?);
        }
        let snapshot = self.get_run(&run).await?.ok_or(Error::RunNotFound(run))?;
        Ok(Resumed { snapshot, commit })
    }
}
