//! Moving state from one backend into another: what would move, the copy, and the proof that it arrived.
//!
//! Nothing here knows of files or settings, and no more than a page of runs is in memory: every run is read, compared and written on its own.
//! A run that is in the target already is left there if it is equal, and stops everything if it is not. So a copy that was cut off at any
//! point is finished by starting it again.

mod plan;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

pub use self::plan::{Counts, Fate, Plan, plan};
pub(super) use self::plan::{NAMED, named, outlives_nothing_else, plan_after};
use self::plan::{Pages, lacking, same_content};
use super::copied::{Copied, content};
use super::shown::counted;
use super::{ProjectError, ProjectErrorKind};
use crate::model::{
    Batch, Entry, Guard, Mutation, Outcome, Refusal, RunId, RunImport, RunPart, RunReceipt, RunState, Version, apply_all,
};
use crate::store::StateBackend;

/// Runs in one batch, at most.
const BATCH_RUNS: usize = 100;
/// Bytes in one batch, about; a run that is larger goes alone.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Nodes whose coverage goes in one entry.
const BATCH_COVERAGE: usize = 200;
/// How often a batch with an unknown outcome is sent again. The same batch is applied once.
const RESENDS: u32 = 5;

/// Copies what the target lacks, in batches of bounded size. `after_batch` is called when a batch is durable and may stop the copy there.
///
/// # Errors
/// [`ProjectErrorKind::Stopped`] if `after_batch` said so; [`ProjectErrorKind::Conflict`] if somebody else made a run meanwhile; or whatever
/// reading and writing meet; [`ProjectErrorKind::Partial`] instead of these if runs were copied before. What was copied stays: start again to go on.
///
/// # Cancel safety
/// Dropping it leaves whole runs copied, never a part of one; start again to go on.
pub async fn copy(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    after_batch: impl FnMut() -> ControlFlow<()> + Send,
) -> Result<Counts, ProjectError> {
    copy_noting(source, target, None, after_batch).await
}

/// [`copy`], noting what was copied.
pub(super) async fn copy_noting(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    notes: Option<&mut Copied>,
    after_batch: impl FnMut() -> ControlFlow<()> + Send,
) -> Result<Counts, ProjectError> {
    let mut sent = 0;
    copy_some(source, target, notes, after_batch, &mut sent).await.map_err(|error| {
        if sent == 0 || error.kind() == ProjectErrorKind::Stopped {
            return error;
        }
        let runs = counted(u64::try_from(sent).unwrap_or(u64::MAX), "run");
        let were = if sent == 1 { "was" } else { "were" };
        error.after(format!("{runs} {were} copied to {} (start again to go on)", target.location()))
    })
}

/// `sent` counts the runs that are in the target for good.
async fn copy_some(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    mut notes: Option<&mut Copied>,
    mut after_batch: impl FnMut() -> ControlFlow<()> + Send,
    sent: &mut usize,
) -> Result<Counts, ProjectError> {
    let mut moved = Counts::default();
    let mut pages = Pages::new();
    let (mut entries, mut contents) = (Vec::new(), Vec::new());
    let mut weight = 0usize;
    while let Some(page) = pages.next(source).await? {
        for summary in &page {
            if target.run_version(&summary.run_id).await?.is_some() {
                continue;
            }
            let Some(run) = source.load_run(&summary.run_id).await? else { continue };
            let entry = import(&run)?;
            let heavy = entry.parts.iter().flat_map(|part| &part.mutations).map(Mutation::weight).sum::<usize>();
            if !entries.is_empty() && (entries.len() >= BATCH_RUNS || weight.saturating_add(heavy) > BATCH_BYTES) {
                let runs = entries.len();
                let there = send(target, std::mem::take(&mut entries)).await?;
                *sent += runs;
                note(&mut notes, &mut contents, there)?;
                weight = 0;
                go_on(after_batch())?;
            }
            weight = weight.saturating_add(heavy);
            if notes.is_some() {
                contents.push(content(&run));
            }
            entries.push(entry);
            moved.add_run(&run);
        }
    }
    if !entries.is_empty() {
        let runs = entries.len();
        let there = send(target, entries).await?;
        *sent += runs;
        note(&mut notes, &mut contents, there)?;
        go_on(after_batch())?;
    }
    let lacking = lacking(source.retained().await?, Some(target)).await?;
    moved.coverage_nodes = u64::try_from(lacking.len()).unwrap_or(u64::MAX);
    for some in lacking.chunks(BATCH_COVERAGE) {
        send(target, vec![Entry { retained: some.to_vec(), ..Entry::default() }]).await?;
        go_on(after_batch())?;
    }
    Ok(moved)
}

/// Reads everything again from both sides and compares counts and content.
///
/// # Errors
/// [`ProjectErrorKind::Integrity`] that names the first run or node which did not arrive as it is in the source.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn verify(source: &dyn StateBackend, target: &dyn StateBackend) -> Result<Counts, ProjectError> {
    let wrong = |what: String| {
        let message = format!("after the copy {what}. If somebody wrote meanwhile, stop it and try again");
        ProjectError::new(ProjectErrorKind::Integrity, message)
    };
    let (mut here, mut there) = (Counts::default(), Counts::default());
    let mut pages = Pages::new();
    while let Some(page) = pages.next(source).await? {
        for summary in &page {
            let Some(run) = source.load_run(&summary.run_id).await? else { continue };
            let copy = target.load_run(&summary.run_id).await?;
            let copy = copy.ok_or_else(|| wrong(format!("{} has no run {:?}", target.location(), run.id())))?;
            if !same_content(&run, &copy) {
                return Err(wrong(format!(
                    "run {:?} is not the same in {} and {}",
                    run.id(),
                    source.location(),
                    target.location()
                )));
            }
            here.add_run(&run);
            there.add_run(&copy);
        }
    }
    let retained = source.retained().await?;
    here.coverage_nodes = u64::try_from(retained.len()).unwrap_or(u64::MAX);
    there.coverage_nodes = here.coverage_nodes;
    if let Some((node, _)) = lacking(retained, Some(target)).await?.first() {
        return Err(wrong(format!("the coverage of node {node:?} is not whole in {}", target.location())));
    }
    if here != there {
        return Err(wrong(format!("the counts differ: {here:?} and {there:?}")));
    }
    Ok(there)
}

/// What a backend holds, as a number: two of the same backend are equal if no run was changed, made or deleted in between.
///
/// # Errors
/// Whatever reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub(super) async fn stamp(backend: &dyn StateBackend) -> Result<u64, ProjectError> {
    let mut stamp = DefaultHasher::new();
    let mut pages = Pages::new();
    while let Some(page) = pages.next(backend).await? {
        let ids: Vec<RunId> = page.into_iter().map(|run| run.run_id).collect();
        let versions = backend.run_versions(&ids).await?;
        for (id, version) in ids.iter().zip(versions) {
            (id.as_str(), version.map(|version| version.0)).hash(&mut stamp);
        }
    }
    Ok(stamp.finish())
}

/// Removes from the target what an earlier move copied, where the source has it with other content by now: the original decides, and takes its place. What the
/// source does not have stays: its only copy may be this one.
pub(super) async fn remove_stale(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    copied: &Copied,
) -> Result<(), ProjectError> {
    for id in copied.runs() {
        let Some(there) = target.load_run(id).await?.filter(|there| copied.is_ours(there)) else { continue };
        if source.load_run(id).await?.is_none_or(|here| same_content(&here, &there)) {
            continue;
        }
        let version = there.version();
        let part = RunPart {
            run: id.clone(),
            base: version,
            expect: version,
            guards: vec![Guard::RunVersion(version)],
            mutations: vec![Mutation::Delete { keep_coverage: false }],
            after: None,
        };
        send(target, vec![Entry { parts: vec![part], ..Entry::default() }]).await?;
    }
    Ok(())
}

/// What came of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Moved {
    /// What was copied.
    pub moved: Counts,
    /// Runs that were there already, equal.
    pub equal_runs: u64,
    /// What was read from both sides afterwards and found equal.
    pub verified: Counts,
}

impl Moved {
    pub(super) fn new(moved: Counts, equal_runs: u64, verified: Counts) -> Self {
        Self { moved, equal_runs, verified }
    }
}

/// Plans, copies and verifies between two open backends. `after_batch` as in [`copy`].
///
/// # Errors
/// As [`plan`], [`Plan::refuse_conflicts`], [`copy`] and [`verify`].
///
/// # Cancel safety
/// As [`copy`].
pub async fn execute(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    after_batch: impl FnMut() -> ControlFlow<()> + Send,
) -> Result<Moved, ProjectError> {
    let plan = plan(source, Some(target), |_, _| ()).await?;
    plan.refuse_conflicts(&target.location())?;
    let moved = copy(source, target, after_batch).await?;
    Ok(Moved::new(moved, plan.equal_runs, verify(source, target).await?))
}

/// Turns an observer's answer into going on or an error.
pub(super) fn go_on(answer: ControlFlow<()>) -> Result<(), ProjectError> {
    match answer {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(ProjectError::new(ProjectErrorKind::Stopped, "stopped; start again to go on")),
    }
}

/// The entry that makes a run as it is elsewhere.
fn import(run: &RunState) -> Result<Entry, ProjectError> {
    let nodes: BTreeMap<_, _> = run.nodes().filter_map(|(id, _)| Some((id.clone(), run.node_shared(id.as_str())?))).collect();
    let mutations = vec![Mutation::Import(Box::new(RunImport { header: run.header().clone(), nodes }))];
    let mut after = None;
    apply_all(&mut after, run.id(), &mutations, Version::NONE.next())?;
    let part =
        RunPart { run: run.id().clone(), base: Version::NONE, expect: Version::NONE, guards: Vec::new(), mutations, after };
    Ok(Entry { parts: vec![part], ..Entry::default() })
}

/// Notes the runs of a batch that is durable.
fn note(notes: &mut Option<&mut Copied>, contents: &mut Vec<u64>, there: Vec<RunReceipt>) -> Result<(), ProjectError> {
    let Some(notes) = notes else { return Ok(()) };
    let copied: Vec<_> = there.into_iter().zip(contents.drain(..)).map(|(run, content)| (run.run, run.after, content)).collect();
    notes.note(&copied)
}

async fn send(target: &dyn StateBackend, entries: Vec<Entry>) -> Result<Vec<RunReceipt>, ProjectError> {
    let answer = commit(target, Batch::new(entries)).await?;
    let mut runs = Vec::new();
    for outcome in answer {
        let refusal = match outcome {
            Outcome::Applied(receipt) => {
                runs.extend(receipt.runs);
                continue;
            }
            Outcome::Refused(refusal) => refusal,
        };
        let hint =
            if let Refusal::RunExists { .. } = &refusal { "somebody else writes there; stop it and try again: " } else { "" };
        let error = ProjectError::from(refusal);
        return Err(ProjectError::new(error.kind(), format!("{}: {hint}{error}", target.location())));
    }
    Ok(runs)
}

/// Commits a batch; while nobody knows what became of it, the same one is sent again.
pub(crate) async fn commit(target: &dyn StateBackend, batch: Batch) -> Result<Vec<Outcome>, ProjectError> {
    let batch = Arc::new(batch);
    let mut sent = 0;
    loop {
        match target.commit(Arc::clone(&batch)).await {
            Ok(answer) => return Ok(answer.outcomes),
            Err(error) if error.is_unknown_outcome() && sent < RESENDS => {
                sent += 1;
                tokio::time::sleep(Duration::from_millis(50) * 2u32.saturating_pow(sent)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
