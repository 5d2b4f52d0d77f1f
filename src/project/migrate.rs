//! Moving state from one backend into another: what would move, the copy, and the proof that it arrived.
//!
//! Nothing here knows of files or settings, and no more than a page of runs is in memory: every run is read, compared and written on its own.
//! A run that is in the target already is left there if it is equal, and stops everything if it is not. So a copy that was cut off at any
//! point is finished by starting it again.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::copied::{Copied, content};
use super::shown::counted;
use super::{ProjectError, ProjectErrorKind};
use crate::model::{
    Batch, Entry, Guard, Mutation, NodeId, Outcome, Refusal, Retained, RunId, RunImport, RunPart, RunQuery, RunReceipt, RunState,
    RunSummary, UnreadableRun, Version, apply_all,
};
use crate::store::StateBackend;

/// Runs in one page of the source.
const PAGE: usize = 200;
/// Runs in one batch, at most.
const BATCH_RUNS: usize = 100;
/// Bytes in one batch, about; a run that is larger goes alone.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Nodes whose coverage goes in one entry.
const BATCH_COVERAGE: usize = 200;
/// How often a batch with an unknown outcome is sent again. The same batch is applied once.
const RESENDS: u32 = 5;
/// How many ids are kept for a message.
pub(super) const NAMED: usize = 10;

/// How much there is of everything. Sums stop at their type's limit instead of wrapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Counts {
    /// Runs.
    pub runs: u64,
    /// Nodes, each counted once a run.
    pub nodes: u64,
    /// The sum of all row counts.
    pub rows: u64,
    /// Completed intervals (maximal ones).
    pub intervals: u64,
    /// Completed partitions.
    pub partitions: u64,
    /// Nodes of which something outlives deleted runs.
    pub coverage_nodes: u64,
}

impl Counts {
    fn add_run(&mut self, run: &RunState) {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        self.runs = self.runs.saturating_add(1);
        self.nodes = self.nodes.saturating_add(count(run.node_count()));
        for (_, node) in run.nodes() {
            self.rows = self.rows.saturating_add(node.row_count.unwrap_or(0));
            self.intervals = self.intervals.saturating_add(count(node.intervals.len()));
            self.partitions = self.partitions.saturating_add(count(node.partitions.len()));
        }
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What happens to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Fate {
    /// It is not in the target: it moves.
    Move,
    /// It is there as an earlier move, which was cut off, copied it, and it changed here since: it moves, and takes the copy's place.
    Replace,
    /// It is there already, and equal.
    Equal,
    /// It is there with other content: nothing moves.
    Differs,
}

/// What would move.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// All that the source holds.
    pub source: Counts,
    /// What the target lacks.
    pub moves: Counts,
    /// Runs that the target has already, equal.
    pub equal_runs: u64,
    /// How many of those that move take the place of a copy that an earlier move made before it was cut off.
    pub replaced_runs: u64,
    /// The first of them.
    pub replaced: Vec<RunId>,
    /// How many runs the target has with other content.
    pub differing_runs: u64,
    /// The first of them.
    pub differing: Vec<RunId>,
    /// How many runs only the target has. They stay there, and are part of the state from then on: runs of its own, or copies of an earlier move
    /// whose originals were deleted since.
    pub only_in_target: u64,
    /// The first of them.
    pub only_in_target_runs: Vec<RunId>,
}

impl Plan {
    /// The plan itself, unless a run differs.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Conflict`] that names the runs which differ.
    pub fn refuse_conflicts(&self, target: &str) -> Result<(), ProjectError> {
        if self.differing_runs == 0 {
            return Ok(());
        }
        let names = named(&self.differing, self.differing_runs);
        // What waits in a WAL would be replayed into whatever is put in the database's place.
        let is_database = std::path::Path::new(target).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("db"));
        let along = if is_database { format!(" with {target}-wal and {target}-shm") } else { String::new() };
        Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{target} holds other content for: {names}; nothing was changed. Move {target}{along} aside, or delete these runs in one of the two places (those that ended: \
                 `seeknal state cleanup`, under the settings that name it), and try again (where an earlier move was cut off, they may be its copies of runs that changed since)"
            ),
        ))
    }

    /// Which copies of an earlier move are replaced.
    pub(super) fn replaces(&self, target: &str) -> Option<String> {
        (self.replaced_runs > 0).then(|| {
            let names = named(&self.replaced, self.replaced_runs);
            format!("{target} holds copies that a move which was cut off made of runs that changed since: {names}; this move replaces the copies")
        })
    }

    /// What an operator should know of runs that only the target has.
    pub fn only_there(&self, target: &str) -> Option<String> {
        (self.only_in_target > 0).then(|| {
            let names = named(&self.only_in_target_runs, self.only_in_target);
            format!(
                "{target} also holds runs that the source has not: {names}; they stay and are part of the state after the move. If an earlier move copied them \
                 and they were deleted since, delete them there too (`seeknal state runs` after the move)"
            )
        })
    }
}

/// Some of so many runs, for a message.
pub(super) fn named(some: &[RunId], all: u64) -> String {
    let mut names: Vec<String> = some.iter().map(|run| format!("{run:?}")).collect();
    let unnamed = all.saturating_sub(u64::try_from(names.len()).unwrap_or(u64::MAX));
    if unnamed > 0 {
        names.push(format!("and {unnamed} more"));
    }
    names.join(", ")
}

/// Whether two runs are the same but for their versions, which belong to the store they are in.
pub fn same_content(a: &RunState, b: &RunState) -> bool {
    let header = |run: &RunState| crate::model::RunHeader { version: Version::NONE, ..run.header().clone() };
    a.id() == b.id()
        && header(a) == header(b)
        && a.node_count() == b.node_count()
        && a.nodes()
            .zip(b.nodes())
            .all(|((id, left), (other, right))| id == other && left.without_version() == right.without_version())
}

/// Compares the source with the target (`None`: there is no target yet) and says what would move. Only reads. `see` is told every run and its fate, newest first.
///
/// # Errors
/// Whatever reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn plan(
    source: &dyn StateBackend,
    target: Option<&dyn StateBackend>,
    see: impl FnMut(&RunSummary, Fate) + Send,
) -> Result<Plan, ProjectError> {
    plan_after(source, target, None, see).await
}

/// [`plan`] after a move that was cut off: what it copied, and nobody changed there since, is replaced if the original is another one by now.
pub(super) async fn plan_after(
    source: &dyn StateBackend,
    target: Option<&dyn StateBackend>,
    copied: Option<&Copied>,
    mut see: impl FnMut(&RunSummary, Fate) + Send,
) -> Result<Plan, ProjectError> {
    let is_copy = |there: &RunState| copied.is_some_and(|copied| copied.is_ours(there));
    let mut plan = Plan::default();
    let mut pages = Pages::naming_unreadable();
    while let Some(page) = pages.next(source).await? {
        for summary in &page {
            let run = match source.load_run(&summary.run_id).await {
                Err(error) if error.is_of_one_entry() => {
                    pages.unreadable.push(UnreadableRun::new(summary.run_id.as_str(), error));
                    continue;
                }
                read => read?,
            };
            let Some(run) = run else { continue };
            plan.source.add_run(&run);
            let there = match target {
                Some(target) => target.load_run(&summary.run_id).await?,
                None => None,
            };
            let fate = match there {
                None => Fate::Move,
                Some(there) if same_content(&run, &there) => Fate::Equal,
                Some(there) if is_copy(&there) => Fate::Replace,
                Some(_) => Fate::Differs,
            };
            match fate {
                Fate::Move => plan.moves.add_run(&run),
                Fate::Replace => {
                    plan.moves.add_run(&run);
                    plan.replaced_runs += 1;
                    if plan.replaced.len() < NAMED {
                        plan.replaced.push(run.id().clone());
                    }
                }
                Fate::Equal => plan.equal_runs += 1,
                Fate::Differs => {
                    plan.differing_runs += 1;
                    if plan.differing.len() < NAMED {
                        plan.differing.push(run.id().clone());
                    }
                }
            }
            see(summary, fate);
        }
    }
    refuse_unreadable(source, &pages.unreadable)?;
    let retained = source.retained().await?;
    plan.source.coverage_nodes = u64::try_from(retained.len()).unwrap_or(u64::MAX);
    plan.moves.coverage_nodes = u64::try_from(lacking(retained, target).await?.len()).unwrap_or(u64::MAX);
    (plan.only_in_target, plan.only_in_target_runs) = only_there(source, target).await?;
    Ok(plan)
}

/// A state is moved whole: all runs of the source that cannot be read are named at once, before anything is copied.
fn refuse_unreadable(source: &dyn StateBackend, unreadable: &[UnreadableRun]) -> Result<(), ProjectError> {
    let Some(first) = unreadable.first() else { return Ok(()) };
    let names: Vec<String> = unreadable.iter().take(NAMED).map(|run| format!("{:?}", run.run_id)).collect();
    let more =
        if unreadable.len() > names.len() { format!(", and {} more", unreadable.len() - names.len()) } else { String::new() };
    Err(ProjectError::new(
        ProjectErrorKind::Integrity,
        format!(
            "{} holds runs that cannot be read: {}{more}; a state is moved whole. Mend them (`seeknal state verify` names each fault) and try again: {}",
            source.location(),
            names.join(", "),
            first.reason
        ),
    ))
}

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
        let message =
            format!("after the copy {what}; the settings were not switched. If somebody wrote meanwhile, stop it and try again");
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

/// The runs that only the target has: how many, and the first of them.
async fn only_there(source: &dyn StateBackend, target: Option<&dyn StateBackend>) -> Result<(u64, Vec<RunId>), ProjectError> {
    let (mut count, mut named) = (0_u64, Vec::new());
    let Some(target) = target else { return Ok((count, named)) };
    let mut pages = Pages::new();
    while let Some(page) = pages.next(target).await? {
        let ids: Vec<RunId> = page.into_iter().map(|run| run.run_id).collect();
        let here = source.run_versions(&ids).await?;
        for (id, _) in ids.into_iter().zip(here).filter(|(_, here)| here.is_none()) {
            count = count.saturating_add(1);
            if named.len() < NAMED {
                named.push(id);
            }
        }
    }
    Ok((count, named))
}

/// Whether all that outlives deleted runs in the target is in the source too.
pub(super) async fn outlives_nothing_else(source: &dyn StateBackend, target: &dyn StateBackend) -> Result<bool, ProjectError> {
    Ok(lacking(target.retained().await?, Some(source)).await?.is_empty())
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

/// The pages of a listing, one after another.
struct Pages {
    query: RunQuery,
    done: bool,
    /// Runs that cannot be read, where they are asked for.
    unreadable: Vec<UnreadableRun>,
}

impl Pages {
    fn new() -> Self {
        Self { query: RunQuery::default().limit(PAGE), done: false, unreadable: Vec::new() }
    }

    fn naming_unreadable() -> Self {
        let mut pages = Self::new();
        pages.query.names_unreadable = true;
        pages
    }

    async fn next(&mut self, backend: &dyn StateBackend) -> Result<Option<Vec<RunSummary>>, ProjectError> {
        if self.done {
            return Ok(None);
        }
        let page = backend.list_runs(&self.query).await?;
        self.done = page.next.is_none();
        self.query.after = page.next;
        self.unreadable.extend(page.unreadable);
        Ok(Some(page.runs))
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

/// The part of what outlives deleted runs that the target does not have yet.
async fn lacking(
    source: Vec<(NodeId, Retained)>,
    target: Option<&dyn StateBackend>,
) -> Result<Vec<(NodeId, Retained)>, ProjectError> {
    let Some(target) = target else { return Ok(source) };
    let there: BTreeMap<NodeId, Retained> =
        if source.is_empty() { BTreeMap::new() } else { target.retained().await?.into_iter().collect() };
    let covers = |have: &Retained, want: &Retained| {
        let mut intervals = have.coverage.intervals.clone();
        intervals.extend(want.coverage.intervals.iter());
        let success = match (&have.last_success, &want.last_success) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(have), Some(want)) => have == want || !want.replaces(have),
        };
        success && intervals == have.coverage.intervals && want.coverage.partitions.is_subset(&have.coverage.partitions)
    };
    Ok(source.into_iter().filter(|(node, want)| !there.get(node).is_some_and(|have| covers(have, want))).collect())
}
