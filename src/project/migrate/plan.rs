//! What a move would do: what is there, what is lacking, what differs. Only reads.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::model::{NodeId, Retained, RunId, RunQuery, RunState, RunSummary, UnreadableRun, Version};
use crate::project::copied::Copied;
use crate::project::{ProjectError, ProjectErrorKind};
use crate::store::StateBackend;

/// Runs in one page of the source.
const PAGE: usize = 200;
/// How many ids are kept for a message.
pub(in crate::project) const NAMED: usize = 10;

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
    pub(super) fn add_run(&mut self, run: &RunState) {
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
    pub(in crate::project) fn replaces(&self, target: &str) -> Option<String> {
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
pub(in crate::project) fn named(some: &[RunId], all: u64) -> String {
    let mut names: Vec<String> = some.iter().map(|run| format!("{run:?}")).collect();
    let unnamed = all.saturating_sub(u64::try_from(names.len()).unwrap_or(u64::MAX));
    if unnamed > 0 {
        names.push(format!("and {unnamed} more"));
    }
    names.join(", ")
}

/// Whether two runs are the same but for their versions, which belong to the store they are in.
pub(super) fn same_content(a: &RunState, b: &RunState) -> bool {
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
pub(in crate::project) async fn plan_after(
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
pub(in crate::project) async fn outlives_nothing_else(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
) -> Result<bool, ProjectError> {
    Ok(lacking(target.retained().await?, Some(source)).await?.is_empty())
}

/// The pages of a listing, one after another.
pub(super) struct Pages {
    query: RunQuery,
    done: bool,
    /// Runs that cannot be read, where they are asked for.
    unreadable: Vec<UnreadableRun>,
}

impl Pages {
    pub(super) fn new() -> Self {
        Self { query: RunQuery::default().limit(PAGE), done: false, unreadable: Vec::new() }
    }

    fn naming_unreadable() -> Self {
        let mut pages = Self::new();
        pages.query.names_unreadable = true;
        pages
    }

    pub(super) async fn next(&mut self, backend: &dyn StateBackend) -> Result<Option<Vec<RunSummary>>, ProjectError> {
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

/// The part of what outlives deleted runs that the target does not have yet.
pub(super) async fn lacking(
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
