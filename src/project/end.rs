//! Ending a run by hand whose process is gone, and telling which runs those are.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::migrate::commit;
use super::shown::shell;
use super::{ProjectError, ProjectErrorKind};
use crate::model::{
    Batch, Clock, Entry, FencingToken, Guard, Mutation, NodeId, NodeStatus, NodeUpdate, Outcome, ProcessInfo, RunId, RunPart,
    RunState, RunStatus, RunSummary, RunUpdate, SystemClock, Version, apply_all,
};
use crate::store::{OpenProcess, StateBackend, gone};

/// How a run ends that nobody works on any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndAs {
    /// It did not do what it should.
    Failed,
    /// Somebody does not want it any more.
    Cancelled,
}

impl EndAs {
    fn status(self) -> RunStatus {
        match self {
            Self::Failed => RunStatus::Failed,
            Self::Cancelled => RunStatus::Cancelled,
        }
    }
}

/// What would be ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// The run.
    pub run_id: RunId,
    /// Its status before.
    pub was: RunStatus,
    /// Its status afterwards. One that is an end already stays, also where nodes still run.
    pub status: RunStatus,
    /// Its nodes that still run: they fail.
    pub nodes: Vec<NodeId>,
    /// Who worked on it, as far as anybody said so.
    pub worker: Option<ProcessInfo>,
    #[serde(skip)]
    state: RunState,
}

impl Plan {
    /// Whether it has ended in that very way already, so that nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.was == self.status && self.nodes.is_empty()
    }
}

fn is_under_way(status: &RunStatus) -> bool {
    matches!(status, RunStatus::Pending | RunStatus::Running)
}

fn conflict(run: &RunId, why: impl std::fmt::Display) -> ProjectError {
    ProjectError::new(ProjectErrorKind::Conflict, format!("run {run:?} {why}; nothing was changed"))
}

fn me(backend: &dyn StateBackend) -> ProcessInfo {
    backend.process().unwrap_or_else(|| ProcessInfo::current(SystemClock.now()))
}

/// Looks whether a run may be ended. `force` allows it also where nobody knows whether its process lives (another host's, of which the storage has not heard;
/// that of a run which never said who works on it, on every backend), never where it is known to live. Only reads.
///
/// # Errors
/// [`ProjectErrorKind::NotFound`] if there is no such run; [`ProjectErrorKind::Conflict`] if its process lives, or may live, if it or a node of it is locked, and
/// if it ended in another way; whatever reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn plan(backend: &dyn StateBackend, run: &RunId, end: EndAs, force: bool) -> Result<Plan, ProjectError> {
    let plan = look(backend, run, end).await?;
    if !plan.is_done() {
        refuse_used(backend, &plan, force).await?;
    }
    Ok(plan)
}

/// As [`plan`], without a look at who works on the run: whether there is anything to end at all.
pub(crate) async fn look(backend: &dyn StateBackend, run: &RunId, end: EndAs) -> Result<Plan, ProjectError> {
    let Some(state) = backend.load_run(run).await? else {
        let message = format!("{} has no run {run:?}; `seeknal state runs --all` lists them", backend.location());
        return Err(ProjectError::new(ProjectErrorKind::NotFound, message));
    };
    let was = state.header().status.clone();
    let running = state.nodes().filter(|(_, node)| node.status == NodeStatus::Running);
    let nodes: Vec<NodeId> = running.map(|(id, _)| id.clone()).collect();
    let status = if is_under_way(&was) { end.status() } else { was.clone() };
    if !is_under_way(&was) && nodes.is_empty() && was != end.status() {
        return Err(conflict(run, format_args!("has ended already: it is {was}")));
    }
    let worker = state.header().worker.clone();
    Ok(Plan { run_id: run.clone(), was, status, nodes, worker, state })
}

async fn refuse_used(backend: &dyn StateBackend, plan: &Plan, force: bool) -> Result<(), ProjectError> {
    let run = &plan.run_id;
    let worker = plan.worker.as_ref();
    let processes = gone::processes(backend, |process| worker.is_some_and(|worker| worker.id == process.id)).await?;
    let lives = |open: &OpenProcess| worker.is_some_and(|worker| open.process.id == worker.id) && open.alive == Some(true);
    if let Some(open) = processes.iter().find(|open| lives(open)) {
        return Err(conflict(run, format_args!("is worked on by {}, which lives: stop it first", open.process)));
    }
    // Also where one process writes at a time: who names no worker may be a program that takes no lock of ours.
    let is_gone = worker.is_some() && gone::is_gone(backend, &me(backend), worker, &processes);
    if !force && !is_gone {
        let why = match worker {
            Some(worker) => format!(
                "is worked on by {worker}, of which it cannot be known from here whether it lives: make sure that nobody does"
            ),
            None if backend.is_shared() => {
                "does not say who works on it: make sure that nobody does (`seeknal state locks` shows who \
                 has the state open)"
                    .to_owned()
            }
            None => format!(
                "does not say who works on it, and a Seeknal process that writes {} takes no lock: make sure that none runs",
                backend.location()
            ),
        };
        return Err(conflict(run, format_args!("{why}, then add --force")));
    }
    if gone::others_live(&me(backend), &processes) {
        // Who works on it by claims: what he writes meanwhile is not what was looked at, and what he holds is found.
        tokio::time::sleep(gone::WATCHED).await;
    }
    let leases = backend.list_leases().await?;
    if let Some(lease) = leases.iter().find(|lease| lease.key.run == *run) {
        let why = format!(
            "is in use: {} is locked by {} (`seeknal state unlock {}` takes the lock away)",
            lease.key, lease.owner, lease.token
        );
        return Err(conflict(run, why));
    }
    Ok(())
}

/// Ends what a plan says, all of it in one transaction: the run, and its nodes that still run, which fail with an error that says so. Nothing is done if anything
/// of the run was changed, or locked, since the plan was made: somebody may have taken it over.
///
/// # Errors
/// [`ProjectErrorKind::Conflict`] if the run was changed or locked meanwhile; whatever writing meets.
///
/// # Cancel safety
/// Dropping it leaves the run ended or as it was.
pub async fn execute(backend: &dyn StateBackend, plan: &Plan, now: DateTime<Utc>) -> Result<(), ProjectError> {
    if plan.is_done() {
        return Ok(());
    }
    // A run that has an end already is not ended once more.
    let word = if plan.was == plan.status { String::new() } else { format!(" as {}", plan.status) };
    let error = format!("ended{word} by `seeknal state end`: nobody worked on it any more");
    let mut mutations: Vec<Mutation> = plan
        .nodes
        .iter()
        .map(|node| Mutation::SetNode { node: node.clone(), update: Box::new(NodeUpdate::failed(&error)), at: now })
        .collect();
    if plan.was != plan.status {
        mutations.push(Mutation::Update { update: RunUpdate::status(plan.status.clone()), at: now });
    }
    let version = plan.state.version();
    let mut after = Some(plan.state.clone());
    apply_all(&mut after, &plan.run_id, &mutations, version.next())?;
    let part = RunPart {
        run: plan.run_id.clone(),
        base: version,
        expect: version,
        guards: vec![Guard::RunVersion(version), Guard::Unlocked],
        mutations,
        after,
    };
    let outcomes = commit(backend, Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }])).await?;
    match outcomes.into_iter().next() {
        Some(Outcome::Refused(refusal)) => {
            let run = shell(std::path::Path::new(plan.run_id.as_str()));
            let why = format!("was changed or locked meanwhile ({refusal}): look at it with `seeknal state show {run}`");
            Err(conflict(&plan.run_id, why))
        }
        _ => Ok(()),
    }
}

/// Those of some runs that run, and whose process is known to be gone, and everybody who holds a lease on them. Of a run that never said who works on it nothing
/// is known: a foreign program may. Nor where it cannot be read who has the state open: then none is named. `watch`: where others have it open, for a second, so that a run is not named between two
/// claims of who works on it.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn abandoned(backend: &dyn StateBackend, runs: &[RunSummary], watch: bool) -> BTreeSet<RunId> {
    let working = || runs.iter().filter(|run| run.header.status == RunStatus::Running && run.header.worker.is_some());
    if working().next().is_none() {
        return BTreeSet::new();
    }
    // The openings last: who works on one of them has the storage open before.
    let Ok(leases) = backend.list_leases().await else { return BTreeSet::new() };
    let workers: BTreeSet<&str> = working()
        .flat_map(|run| run.header.worker.iter().chain(gone::holders(&leases, &run.run_id)))
        .map(|worker| &*worker.id)
        .collect();
    let Ok(processes) = gone::processes(backend, |process| workers.contains(&*process.id)).await else {
        return BTreeSet::new();
    };
    let me = me(backend);
    let is_left = |run: &&RunSummary| gone::is_left(backend, &me, &run.run_id, run.header.worker.as_ref(), &leases, &processes);
    let gone: Vec<&RunSummary> = working().filter(is_left).collect();
    let ids: Vec<RunId> = gone.iter().map(|run| run.run_id.clone()).collect();
    let mut taken = BTreeSet::new();
    if watch && !ids.is_empty() && gone::others_live(&me, &processes) {
        tokio::time::sleep(gone::WATCHED).await;
        let known: BTreeSet<FencingToken> = leases.iter().map(|lease| lease.token).collect();
        let Ok(now) = backend.list_leases().await else { return BTreeSet::new() };
        taken.extend(now.into_iter().filter(|lease| !known.contains(&lease.token)).map(|lease| lease.key.run));
    }
    // In between its process may have ended it in order, and itself after that; or somebody works on it by claims.
    let Ok(versions) = backend.run_versions(&ids).await else { return BTreeSet::new() };
    let is_left = |run: &RunSummary, now: Option<Version>| now == Some(run.version) && !taken.contains(&run.run_id);
    gone.into_iter().zip(versions).filter(|(run, now)| is_left(run, *now)).map(|(run, _)| run.run_id.clone()).collect()
}
