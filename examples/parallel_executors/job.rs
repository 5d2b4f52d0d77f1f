//! The job from end to end: open, take over, begin, work, close, read back, compare.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Days, Utc};
use indicatif::ProgressBar;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};

use seeknal_state::{
    BackendOptions, Coordinator, Error, LeaseError, NewRun, NodeId, NodeUpdate, RunId, RunState, RunStatus, RunUpdate,
    create_state_backend, model::time,
};

use crate::ack::{Said, Scribe};
use crate::board::{Board, Outcome, Task};
use crate::check::{self, Stored};
use crate::dag::Dag;
use crate::executor::{Floor, Hostage, Tally};
use crate::marks::{MADE_BY, Mark, Plan};
use crate::report::{Resumed, Sentence, Story, Summary};
use crate::{Backend, Failure, Options, report};

/// Where a state is begun: that another one lies in the same folder, whose nodes were probably meant.
fn unused(options: &Options, target: &Path) -> Option<String> {
    let (mine, other, backend) = match options.backend {
        _ if options.database_url.is_some() => return None,
        Backend::File => ("run_state.json", "state.db", "database"),
        Backend::Database => ("state.db", "run_state.json", "file"),
    };
    let other = target.join(other);
    let is_begun = !target.join(mine).exists() && other.is_file();
    is_begun.then(|| format!("{} is there, and is not used: --backend {backend}?", other.display()))
}

/// Does the whole job; `false` if what is on disk is not what the executors were told.
pub(crate) async fn run(options: &Options) -> Result<bool, Failure> {
    let project = project(options)?;
    let target = super::options::target(&project)?;
    let unused = unused(options, &target);
    let open = || async {
        let mut at = BackendOptions::new().base_path(&target);
        if let Some(url) = &options.database_url {
            at = at.database_url(&url.0);
        }
        let backend = create_state_backend(options.backend(), &at)?;
        Ok::<_, Failure>(Coordinator::open(backend).await?)
    };
    let state = open().await?;
    let notices: Vec<String> = state.open_report().notices.iter().cloned().chain(unused).collect();
    report::opened(&project, options.backend(), &state.backend().location(), &notices)?;

    let before = Stored::read(&state).await?;
    let abandoned: Vec<RunId> = state.abandoned_runs().await?.into_iter().map(|run| run.summary.run_id).collect();
    let elsewhere: BTreeSet<RunId> = live_elsewhere(&state, &before, &abandoned);
    let mut floor = Floor {
        state,
        board: Board::new(options.seed),
        scribe: Scribe::open(options.ack_log.as_deref())?,
        plans: Vec::new(),
        seed: options.seed,
        work_ms: options.work_ms,
        bar: ProgressBar::hidden(),
        hostage: Mutex::default(),
        tally: Tally::default(),
    };
    let mut summary = Summary::default();
    for id in &abandoned {
        if let Some(old) = before.0.get(id) {
            summary.resumed.extend(resume(&mut floor, old).await?);
        }
    }
    let own: BTreeSet<NodeId> = foreign_nodes(&before);
    let dag = if own.is_empty() { Dag::made_up(options.nodes, options.seed)? } else { Dag::of(own.clone(), options.seed) };
    report::pipeline(&dag, &own, before.0.len())?;
    let first_day = next_day(&before);
    for index in 0..options.runs {
        let day = u64::try_from(index).ok().and_then(|days| first_day.checked_add_days(Days::new(days))).unwrap_or(first_day);
        summary.begun.push(begin(&mut floor, &dag, day, options.seed).await?);
    }
    for line in &summary.resumed {
        report::resumed(line)?;
    }
    if !elsewhere.is_empty() {
        report::elsewhere(&elsewhere)?;
    }

    let floor = Arc::new(floor);
    summary.story = work(&floor, options.executors).await?;
    let told = floor.scribe.told();
    let state = floor.state.clone();
    summary.count(&floor.tally);
    drop(floor);
    state.close().await?;
    drop(state);

    let again = open().await?;
    let stored = Stored::read(&again).await?;
    let worked_on: BTreeSet<RunId> = summary.runs().cloned().chain(elsewhere).collect();
    summary.findings = check::compare(&told, &stored.settled(&summary.runs().cloned().collect()));
    // Everybody ended in order: nothing may be there that nobody was told of.
    let ahead = std::mem::take(&mut summary.findings.ahead);
    summary.findings.problems.extend(ahead);
    let (unchanged, changes) = check::unchanged(&before, &stored, &worked_on);
    summary.unchanged = unchanged;
    summary.findings.problems.extend(changes);
    summary.findings.problems.extend(unfinished(&summary, &stored));
    summary.findings.problems.extend(uncovered(&again, &summary, &stored).await?);
    summary.findings.problems.extend(summary.story.as_ref().and_then(Story::problem));
    again.close().await?;
    report::summary(&summary, &stored, options.ack_log.as_deref())?;
    Ok(summary.findings.problems.is_empty())
}

/// The folder of the project: the one that was given, or a fresh one.
fn project(options: &Options) -> Result<PathBuf, Failure> {
    Ok(match &options.project_path {
        Some(path) => path.clone(),
        None => tempfile::Builder::new().prefix("seeknal-").tempdir()?.keep(),
    })
}

/// Runs that a living process works on: they may change while we look.
fn live_elsewhere(state: &Coordinator, before: &Stored, abandoned: &[RunId]) -> BTreeSet<RunId> {
    let running = before.0.iter().filter(|(id, run)| run.header().status == RunStatus::Running && !abandoned.contains(id));
    let shared = state.backend().is_shared();
    running.filter(|(_, run)| shared && run.header().worker.is_some()).map(|(id, _)| id.clone()).collect()
}

/// The nodes that the state brings: those of all runs that this example did not make.
fn foreign_nodes(before: &Stored) -> BTreeSet<NodeId> {
    let foreign = before.0.values().filter(|run| Plan::of(run.header()).is_none());
    foreign.flat_map(|run| run.nodes().map(|(id, _)| id.clone()).collect::<Vec<_>>()).collect()
}

/// The day after the last one that a run of this example works on.
fn next_day(before: &Stored) -> DateTime<Utc> {
    const FIRST: i64 = 1_704_067_200_000_000;
    let ends = before.0.values().filter_map(|run| Plan::of(run.header())?.interval().ok()).map(|interval| interval.end());
    ends.max().or_else(|| time::from_micros(FIRST)).unwrap_or_default()
}

/// A new run with all its nodes, as one transaction.
async fn begin(floor: &mut Floor, dag: &Dag, day: DateTime<Utc>, seed: u64) -> Result<RunId, Failure> {
    let run = RunId::generate();
    let end = day.checked_add_days(Days::new(1)).unwrap_or(day);
    let plan = Plan {
        made_by: MADE_BY.to_owned(),
        seed,
        nodes: dag.len(),
        interval: (time::format(day), time::format(end)),
        partition: format!("dt={}", day.format("%Y-%m-%d")),
    };
    let name = floor.scribe.new_tx();
    let mut tx = floor.state.transaction();
    tx.create_run(&run, NewRun::running().metadata(Plan::KEY, serde_json::to_value(&plan)?).metadata("write", name.as_str()));
    let mut said = vec![Said::header(&run, "running")];
    for step in dag.steps() {
        let mark = Mark { step: 1, tx: name.clone(), with: Vec::new() };
        tx.set_node_state(&run, &step.id, mark.put_on(NodeUpdate::pending())?);
        said.push(Said::node(&run, &step.id, "pending", 1));
    }
    let commit = tx.commit().await?;
    floor.scribe.acknowledged(&name, &commit, said)?;
    let made = floor.state.get_run(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?;
    let note = RunUpdate::new().metadata("layers", u64::try_from(dag.layers()).unwrap_or(u64::MAX));
    enter(floor, dag.clone(), plan, made.state(), note).await?;
    Ok(run)
}

/// Takes over a run that a dead process left running, if this example made it.
async fn resume(floor: &mut Floor, old: &RunState) -> Result<Option<Resumed>, Failure> {
    let Some(plan) = Plan::of(old.header()) else { return Ok(None) };
    let run = old.id().clone();
    // First: whoever dies between the two leaves the run as it was, for the next one to find.
    let freed = free_locks(&floor.state, old).await?;
    let taken = match floor.state.resume_run(&run).await {
        Ok(taken) => taken,
        // Another process was faster.
        Err(error) if error.is_conflict() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Some(commit) = &taken.commit {
        let said = Said::header(&run, taken.header().status.as_str());
        floor.scribe.acknowledged(&floor.scribe.new_tx(), commit, vec![said])?;
    }
    let resumed = Resumed::new(&run, old, taken.state(), freed);
    let dag = Dag::of(taken.state().nodes().map(|(id, _)| id.clone()).collect(), plan.seed);
    enter(floor, dag, plan, taken.state(), RunUpdate::new().metadata("resumed_by", std::process::id())).await?;
    Ok(Some(resumed))
}

/// Takes away the locks that a dead process left on its run, instead of waiting until they expire. Their tokens are void from now on: if it were alive
/// after all, its writes would be refused.
async fn free_locks(state: &Coordinator, run: &RunState) -> Result<usize, Failure> {
    let Some(dead) = &run.header().worker else { return Ok(0) };
    let locks = state.list_locks().await?;
    let mut freed = 0;
    for lock in locks.iter().filter(|lock| lock.key.run == *run.id() && lock.owner.process.id == dead.id) {
        match state.force_unlock(lock.token).await {
            Ok(_) => freed += 1,
            // It expired meanwhile.
            Err(Error::Lease(LeaseError::NotFound { .. })) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(freed)
}

/// Puts a run on the board, and notes that on the run.
async fn enter(floor: &mut Floor, dag: Dag, plan: Plan, on_disk: &RunState, note: RunUpdate) -> Result<(), Failure> {
    let steps: BTreeMap<NodeId, u64> =
        on_disk.nodes().map(|(id, node)| (id.clone(), Mark::of(node).map_or(0, |mark| mark.step))).collect();
    let (place, outcome) = floor.board.add(on_disk.id(), dag, on_disk, |node| steps.get(node).copied().unwrap_or(0));
    floor.plans.push(plan);
    floor.change_run(place, note, &RunStatus::Running).await?;
    floor.follow(place, Outcome { skip: outcome.skip, ended: outcome.ended }).await
}

/// Sends the executors to work, kills one, and waits for the others.
async fn work(floor: &Arc<Floor>, executors: usize) -> Result<Option<Story>, Failure> {
    let left = u64::try_from(floor.board.left()).unwrap_or(u64::MAX);
    report::begin_bar(&floor.bar, left);
    let (hostage, mut taken) = oneshot::channel();
    *floor.hostage.lock().unwrap_or_else(PoisonError::into_inner) = Some(hostage);
    floor.board.open();
    let mut at_work = JoinSet::new();
    let mut handles: Vec<AbortHandle> = Vec::with_capacity(executors + 1);
    let start = |executor: usize, at_work: &mut JoinSet<Result<(), Failure>>| {
        let floor = Arc::clone(floor);
        at_work.spawn(async move { floor.work(executor).await })
    };
    for executor in 0..executors {
        handles.push(start(executor, &mut at_work));
    }
    let mut killed: Option<Hostage> = None;
    let mut waiting = true;
    loop {
        tokio::select! {
            hostage = &mut taken, if waiting => {
                waiting = false;
                if let Ok(hostage) = hostage {
                    // Somebody may wait for the lock already when its holder dies.
                    let Task { attempt, step, .. } = hostage.task;
                    floor.board.again(Task { attempt: attempt + 1, step: step + 2, orphaned: true, ..hostage.task.clone() });
                    if let Some(handle) = handles.get(hostage.executor) {
                        handle.abort();
                    }
                    handles.push(start(executors, &mut at_work));
                    killed = Some(hostage);
                }
            }
            ended = at_work.join_next() => match ended {
                None => break,
                Some(Ok(done)) => done?,
                Some(Err(error)) if error.is_cancelled() => {}
                Some(Err(panicked)) => return Err(panicked.into()),
            },
        }
    }
    floor.bar.finish_and_clear();
    let Some(hostage) = killed else { return Ok(None) };
    let late = hostage.fenced.set_node_state(&hostage.task.run, &hostage.task.node, NodeUpdate::failed("said by the dead")).await;
    let takeover = *floor.tally.takeover.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Some(Story { hostage, takeover, late }))
}

/// Runs of this job that have not ended, and nodes in them.
fn unfinished(summary: &Summary, stored: &Stored) -> Vec<String> {
    let mut problems = Vec::new();
    for run in summary.runs().filter_map(|id| stored.0.get(id)) {
        if !run.header().status.is_ended() {
            problems.push(format!("run {}: it is {}, and should have ended", run.id(), run.header().status));
        }
        for (id, node) in run.nodes().filter(|(_, node)| !node.status.is_ended()) {
            problems.push(format!("run {}, node {id}: it is {}, and should have ended", run.id(), node.status));
        }
    }
    problems
}

/// Intervals that a node completed in one of the runs, and that are pending over all runs.
async fn uncovered(state: &Coordinator, summary: &Summary, stored: &Stored) -> Result<Vec<String>, Failure> {
    let mut done: BTreeMap<&NodeId, Vec<seeknal_state::Interval>> = BTreeMap::new();
    for run in summary.runs().filter_map(|id| stored.0.get(id)) {
        for (id, node) in run.nodes() {
            done.entry(id).or_default().extend(node.intervals.iter());
        }
    }
    let mut problems = Vec::new();
    for (id, intervals) in done {
        let coverage = state.coverage(id).await?;
        for interval in intervals {
            if !coverage.intervals.contains(interval) {
                problems.push(format!("node {id}: {interval} is complete in a run, and pending over all runs"));
            }
        }
    }
    Ok(problems)
}

impl Sentence for Hostage {
    fn sentence(&self) -> String {
        format!(
            "executor {} was killed while it held {} of {} (token {})",
            self.executor, self.task.node, self.task.run, self.token
        )
    }
}
