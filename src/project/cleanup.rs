//! Deleting old runs, without ever making a done interval pending again.

use std::collections::BTreeSet;
use std::sync::Arc;

use chrono::{DateTime, Datelike, Utc};
use serde::Serialize;
use tokio::time::Instant;

use super::ProjectError;
use super::migrate::commit;
use super::pace::{Pace, leave_a_turn};
use crate::coordinator::{Coordinator, OnDelete, Transaction};
use crate::error::Error;
use crate::model::{
    Batch, Entry, Guard, Mutation, NodeStatus, Outcome, Refusal, RunId, RunPart, RunQuery, RunStatus, RunSummary, UnreadableRun,
    Version,
};
use crate::store::StateBackend;

/// Runs in one page of the listing.
const PAGE: usize = 500;

/// Which runs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    cutoff: DateTime<Utc>,
    keep_last: u64,
}

impl Rules {
    /// Runs that ended more than this many days before now go, but the newest `keep_last` ended ones stay.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Input`](super::ProjectErrorKind::Input) if that many days ago is before the year 1.
    pub fn older_than_days(days: u64, keep_last: u64, now: DateTime<Utc>) -> Result<Self, ProjectError> {
        let cutoff = i64::try_from(days)
            .ok()
            .and_then(chrono::Duration::try_days)
            .and_then(|age| now.checked_sub_signed(age))
            .filter(|cutoff| (1..=9999).contains(&cutoff.year()));
        let Some(cutoff) = cutoff else {
            let most = now.num_days_from_ce().saturating_sub(1);
            return Err(ProjectError::input(format!("--days {days}: that is before the year 1; give at most {most}")));
        };
        Ok(Self { cutoff, keep_last })
    }

    /// The stamp before which a run must have ended.
    pub fn cutoff(&self) -> DateTime<Utc> {
        self.cutoff
    }
}

/// A run that would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Doomed {
    /// Its name.
    pub run_id: RunId,
    /// Its status.
    pub status: RunStatus,
    /// When it ended.
    pub ended_at: DateTime<Utc>,
    /// Its version; it goes only if it still is at this one.
    pub version: Version,
    /// How many nodes it has.
    pub nodes: u64,
}

/// What would go, and what stays though it is old.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// What goes, newest first.
    pub delete: Vec<Doomed>,
    /// Runs that stay because they, or nodes of theirs, are locked.
    pub locked: Vec<RunId>,
    /// Ended runs that stay because nothing says when they ended.
    pub without_stamp: Vec<RunId>,
    /// Runs that stay because they cannot be read, in the listing or where that was needed to know when they ended.
    pub unreadable: Vec<Stays>,
    /// Runs in a status of the end, without a stamp of it, that stay because nodes of theirs run.
    pub nodes_running: Vec<RunId>,
    /// How many stay because they run or wait.
    pub running: u64,
    /// How many stay because they did not end that long ago.
    pub recent: u64,
    /// How many stay because they are among the newest ended ones.
    pub kept_last: u64,
    /// How many runs stay by the rules: all of these together.
    pub kept: u64,
}

/// A run that stays for a fault of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stays {
    /// Its name, as it is stored.
    pub run_id: String,
    /// What the storage says of it.
    pub reason: String,
}

impl Stays {
    fn new(run_id: &RunId, reason: impl ToString) -> Self {
        Self { run_id: run_id.to_string(), reason: reason.to_string() }
    }
}

/// Judges one run after another, newest first; pure.
#[derive(Debug)]
pub struct Judge {
    rules: Rules,
    locked: BTreeSet<RunId>,
    ended: u64,
    plan: Plan,
}

impl Judge {
    /// A judge who knows the rules and which runs have leases.
    pub fn new(rules: Rules, locked: BTreeSet<RunId>) -> Self {
        Self { rules, locked, ended: 0, plan: Plan::default() }
    }

    /// Whether the run's own header does not say when it ended, so that its newest stamp is needed.
    pub fn needs_stamp(summary: &RunSummary) -> bool {
        has_ended(summary) && summary.header.finished_at.is_none()
    }

    /// Judges a run. `newest` is the newest stamp in it, where [`needs_stamp`](Self::needs_stamp) asked for it.
    pub fn see(&mut self, summary: &RunSummary, newest: Option<DateTime<Utc>>) {
        if !has_ended(summary) {
            self.plan.kept += 1;
            if is_under_way(summary) {
                self.plan.running += 1;
            } else {
                self.plan.nodes_running.push(summary.run_id.clone());
            }
            return;
        }
        self.ended += 1;
        let Some(ended_at) = summary.header.finished_at.or(newest) else {
            self.plan.without_stamp.push(summary.run_id.clone());
            return;
        };
        let is_last = self.ended <= self.rules.keep_last;
        if is_last || ended_at >= self.rules.cutoff {
            self.plan.kept += 1;
            *(if is_last { &mut self.plan.kept_last } else { &mut self.plan.recent }) += 1;
        } else if self.locked.contains(&summary.run_id) {
            self.plan.locked.push(summary.run_id.clone());
        } else {
            self.plan.delete.push(Doomed {
                run_id: summary.run_id.clone(),
                status: summary.header.status.clone(),
                ended_at,
                version: summary.version,
                nodes: summary.nodes.values().sum(),
            });
        }
    }

    /// A run that has ended and cannot be read stays.
    fn cannot_see(&mut self, summary: &RunSummary, why: impl ToString) {
        self.ended += 1;
        self.plan.unreadable.push(Stays::new(&summary.run_id, why));
    }

    /// Nor goes one of which nothing can be read.
    fn cannot_list(&mut self, run: UnreadableRun) {
        self.plan.unreadable.push(Stays { run_id: run.run_id, reason: run.reason });
    }

    /// The plan.
    pub fn into_plan(self) -> Plan {
        self.plan
    }
}

/// Statuses of other systems count as ended: only what is known to be waiting or at work stays. The status of a run that does not say when it ended may be
/// what its nodes tell, one of which failed: it is at work as long as another one runs.
fn has_ended(summary: &RunSummary) -> bool {
    let at_work =
        || summary.header.finished_at.is_none() && summary.nodes.get(&NodeStatus::Running).is_some_and(|nodes| *nodes > 0);
    !is_under_way(summary) && !at_work()
}

fn is_under_way(summary: &RunSummary) -> bool {
    matches!(summary.header.status, RunStatus::Pending | RunStatus::Running)
}

/// Looks at all runs and says what would go. Only reads; memory holds the names of what goes.
///
/// # Errors
/// Whatever reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn plan(backend: &dyn StateBackend, rules: Rules) -> Result<Plan, ProjectError> {
    let locked = backend.list_leases().await?.into_iter().map(|lease| lease.key.run).collect();
    let mut judge = Judge::new(rules, locked);
    let mut query = RunQuery::default().limit(PAGE).naming_unreadable();
    loop {
        let page = backend.list_runs(&query).await?;
        page.unreadable.into_iter().for_each(|run| judge.cannot_list(run));
        for summary in &page.runs {
            let newest = if Judge::needs_stamp(summary) {
                match backend.load_run(&summary.run_id).await {
                    Ok(run) => run.and_then(|run| run.newest_stamp()),
                    Err(error) if error.is_of_one_entry() => {
                        judge.cannot_see(summary, error);
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
            } else {
                None
            };
            judge.see(summary, newest);
        }
        if page.next.is_none() {
            return Ok(judge.into_plan());
        }
        query = query.after(page.next);
    }
}

/// Reads what would go, and takes out of the plan what cannot be read: a cleanup would leave it and name it. Without this a plan knows it of runs only that do
/// not say themselves when they ended.
///
/// # Errors
/// Whatever else reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn read_through(backend: &dyn StateBackend, plan: &mut Plan) -> Result<(), ProjectError> {
    let mut doomed = Vec::with_capacity(plan.delete.len());
    for run in std::mem::take(&mut plan.delete) {
        match backend.load_run(&run.run_id).await {
            Err(error) if error.is_of_one_entry() => plan.unreadable.push(Stays::new(&run.run_id, error)),
            read => {
                read?;
                doomed.push(run);
            }
        }
    }
    plan.delete = doomed;
    Ok(())
}

/// What came of a cleanup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Cleaned {
    /// Runs that are gone now.
    pub deleted: u64,
    /// Runs that were changed, locked or taken up again since they were looked at: they stay.
    pub changed_meanwhile: Vec<RunId>,
    /// Runs that the storage could not delete for what they are, as one that cannot be read: they stay, the others went.
    pub failed: Vec<Stays>,
}

/// As [`execute`], through a coordinator of this process: its own resident runs learn of it. Needed on the file backend, whose coordinator takes it that
/// nobody else writes: beside [`execute`] on [`Coordinator::backend`] it would go on showing runs that are gone. `plan` is made on that backend.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # use seeknal_state::{BackendOptions, Clock, Coordinator, NewRun, RunUpdate, SystemClock, create_state_backend};
/// use seeknal_state::project::cleanup;
///
/// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
/// # state.create_run("run_1", NewRun::running()).await?;
/// # state.update_run("run_1", RunUpdate::success()).await?;
/// # let now = SystemClock.now() + chrono::Duration::days(31);
/// let rules = cleanup::Rules::older_than_days(30, 0, now)?;
/// let plan = cleanup::plan(&**state.backend(), rules).await?;
/// assert_eq!(cleanup::through(&state, &plan).await?.deleted, 1);
/// assert!(state.snapshot("run_1").is_none());
/// # state.close().await?;
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
///
/// # Errors
/// As [`execute`].
///
/// # Cancel safety
/// Dropping it leaves every run whole or gone; start again to go on.
pub async fn through(state: &Coordinator, plan: &Plan) -> Result<Cleaned, ProjectError> {
    let mut cleaned = Cleaned::default();
    let mut pace = Pace::new();
    let mut left = plan.delete.as_slice();
    while !left.is_empty() {
        let (some, rest) = pace.next(&**state.backend(), left).await;
        left = rest;
        let (began, before) = (Instant::now(), cleaned.deleted);
        // Together, so that they share a flush.
        let deletions: Vec<_> = some.iter().map(|doomed| tokio::spawn(deletion_through(state, doomed).commit())).collect();
        let mut failed = None;
        let mut apart = Vec::new();
        for (doomed, deletion) in some.iter().zip(deletions) {
            match deletion.await.unwrap_or(Err(Error::Closed)) {
                Err(error) if is_of_one(&error) => apart.push(doomed),
                answer => failed = failed.or(cleaned.note(doomed, answer).err()),
            }
        }
        if let Some(error) = failed {
            return Err(partly(error, &cleaned));
        }
        // What shared its flush with others may have failed for one of them.
        for doomed in apart {
            match deletion_through(state, doomed).commit().await {
                Err(error) if is_of_one(&error) => cleaned.failed.push(Stays::new(&doomed.run_id, error)),
                answer => cleaned.note(doomed, answer).map_err(|error| partly(error, &cleaned))?,
            }
        }
        let took = began.elapsed();
        pace.took(took, cleaned.deleted - before == some.len() as u64);
        if !left.is_empty() {
            leave_a_turn(state.backend().is_shared(), took).await;
        }
    }
    Ok(cleaned)
}

fn deletion_through(state: &Coordinator, doomed: &Doomed) -> Transaction {
    let mut tx = state.transaction();
    tx.expect_version(&doomed.run_id, doomed.version);
    tx.expect_unlocked(&doomed.run_id);
    tx.delete_run(&doomed.run_id, OnDelete::KeepCoverage);
    tx
}

/// Whether a deletion failed for what its run is.
fn is_of_one(error: &Error) -> bool {
    matches!(error, Error::Store(error) if error.is_of_one_entry() && !error.is_unknown_outcome())
}

impl Cleaned {
    fn note<T>(&mut self, doomed: &Doomed, answer: Result<T, Error>) -> Result<(), ProjectError> {
        match answer {
            Ok(_) => self.deleted += 1,
            // Somebody else deleted it: it is gone, as was asked, though not by us.
            Err(Error::RunNotFound(_)) => {}
            Err(error) if error.is_conflict() => self.changed_meanwhile.push(doomed.run_id.clone()),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// Deletes what a plan says, in batches that take about a tenth of a second; what its nodes completed and their last successes stay readable. Where the state
/// is shared, those who write beside this have a turn between two batches, as long as they had to wait and a second at most. A run that is not exactly as it was
/// when it was looked at, or is locked, stays; so does one that cannot be read, and it is named ([`Cleaned::failed`]). Beside a coordinator of this
/// process: [`through`].
///
/// One run goes in one transaction, however large it is: beside one of many nodes with many intervals and partitions those who write wait longer than that.
///
/// What becomes free of `state.db` is used again by what is written later; the file does not become smaller. `VACUUM`, while nobody has it open, makes it so.
///
/// # Errors
/// Whatever writing meets; [`ProjectErrorKind::Partial`](super::ProjectErrorKind::Partial) if something was deleted before.
///
/// # Cancel safety
/// Dropping it leaves every run whole or gone; start again to go on.
pub async fn execute(backend: &Arc<dyn StateBackend>, plan: &Plan) -> Result<Cleaned, ProjectError> {
    let mut cleaned = Cleaned::default();
    let mut pace = Pace::new();
    let mut left = plan.delete.as_slice();
    while !left.is_empty() {
        let (some, rest) = pace.next(&**backend, left).await;
        left = rest;
        let (began, before) = (Instant::now(), cleaned.deleted);
        let mut done = delete(&**backend, some, &mut cleaned).await;
        if done.as_ref().is_err_and(ProjectError::is_of_one_entry) {
            done = delete_apart(&**backend, some, &mut cleaned).await;
        }
        done.map_err(|error| partly(error, &cleaned))?;
        let took = began.elapsed();
        pace.took(took, cleaned.deleted - before == some.len() as u64);
        if !left.is_empty() {
            leave_a_turn(backend.is_shared(), took).await;
        }
    }
    Ok(cleaned)
}

/// Deletes runs in one batch.
async fn delete(backend: &dyn StateBackend, some: &[Doomed], cleaned: &mut Cleaned) -> Result<(), ProjectError> {
    let outcomes = commit(backend, Batch::new(some.iter().map(deletion).collect())).await?;
    for (doomed, outcome) in some.iter().zip(outcomes) {
        match outcome {
            Outcome::Applied(_) => cleaned.deleted += 1,
            // Somebody else deleted it: it is gone, as was asked, though not by us.
            Outcome::Refused(Refusal::RunNotFound { .. }) => {}
            Outcome::Refused(Refusal::Guard { .. } | Refusal::Stale { .. } | Refusal::Chained { .. }) => {
                cleaned.changed_meanwhile.push(doomed.run_id.clone());
            }
            Outcome::Refused(refusal) => return Err(refusal.into()),
        }
    }
    Ok(())
}

/// Deletes each by itself: one of them cannot go.
async fn delete_apart(backend: &dyn StateBackend, some: &[Doomed], cleaned: &mut Cleaned) -> Result<(), ProjectError> {
    for doomed in some {
        match delete(backend, std::slice::from_ref(doomed), cleaned).await {
            Err(error) if error.is_of_one_entry() => cleaned.failed.push(Stays::new(&doomed.run_id, error)),
            done => done?,
        }
    }
    Ok(())
}

fn partly(error: ProjectError, cleaned: &Cleaned) -> ProjectError {
    if cleaned.deleted == 0 { error } else { error.after(format!("{} run(s) were deleted", cleaned.deleted)) }
}

fn deletion(doomed: &Doomed) -> Entry {
    let part = RunPart {
        run: doomed.run_id.clone(),
        base: doomed.version,
        expect: doomed.version,
        guards: vec![Guard::RunVersion(doomed.version), Guard::Unlocked],
        mutations: vec![Mutation::Delete { keep_coverage: true }],
        after: None,
    };
    Entry { parts: vec![part], ..Entry::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        FencingToken, Interval, LeaseKey, LeaseOwner, LeaseRecord, NewRun, NodeId, NodeUpdate, ProcessInfo, RunHeader, RunUpdate,
        time,
    };
    use crate::project::ProjectErrorKind;
    use crate::store::{LeaseStore, MemoryBackend};

    fn day(day: u32) -> DateTime<Utc> {
        time::parse(&format!("2024-01-{day:02}T00:00:00Z")).unwrap()
    }

    async fn put(backend: &Arc<dyn StateBackend>, run: &str, mutations: Vec<Mutation>) {
        let run = RunId::new(run).unwrap();
        let version = backend.run_version(&run).await.unwrap().unwrap_or(Version::NONE);
        let part = RunPart { run, base: version, expect: version, guards: vec![], mutations, after: None };
        let outcomes = commit(&**backend, Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }])).await.unwrap();
        assert!(matches!(outcomes[0], Outcome::Applied(_)), "{outcomes:?}");
    }

    fn create(at: DateTime<Utc>) -> Mutation {
        Mutation::Create { run: NewRun::running(), at }
    }

    fn end(at: DateTime<Utc>) -> Mutation {
        Mutation::Update { update: RunUpdate::success(), at }
    }

    fn ids(runs: &[RunId]) -> Vec<&str> {
        runs.iter().map(RunId::as_str).collect()
    }

    async fn filled() -> Arc<dyn StateBackend> {
        let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
        let node = NodeId::new("n").unwrap();
        let interval = Interval::parse("2023-01-01", "2023-01-02").unwrap();
        put(
            &backend,
            "old",
            vec![
                create(day(1)),
                Mutation::SetNode { node: node.clone(), update: Box::new(NodeUpdate::success().row_count(7)), at: day(1) },
                Mutation::AddInterval { node, interval },
                end(day(2)),
            ],
        )
        .await;
        put(&backend, "old2", vec![create(day(2)), end(day(2))]).await;
        put(&backend, "running", vec![create(day(1))]).await;
        put(&backend, "young", vec![create(day(20)), end(day(20))]).await;
        backend
    }

    #[tokio::test]
    async fn old_ended_runs_go_and_what_they_completed_stays() {
        let backend = filled().await;
        let rules = Rules::older_than_days(10, 0, day(25)).unwrap();
        let plan = plan(&*backend, rules).await.unwrap();
        assert_eq!(plan.delete.iter().map(|doomed| doomed.run_id.as_str()).collect::<Vec<_>>(), ["old2", "old"]);
        assert_eq!(plan.kept, 2);
        let node = NodeId::new("n").unwrap();
        let (coverage, success) = (backend.coverage(&node).await.unwrap(), backend.last_success(&node).await.unwrap());
        assert!(success.is_some() && !coverage.is_empty());
        let cleaned = execute(&backend, &plan).await.unwrap();
        assert_eq!(cleaned, Cleaned { deleted: 2, ..Cleaned::default() });
        assert_eq!(backend.coverage(&node).await.unwrap(), coverage);
        assert_eq!(backend.last_success(&node).await.unwrap(), success);
        assert_eq!(backend.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 2);
        assert_eq!(execute(&backend, &plan).await.unwrap().deleted, 0, "a second time there is nothing to do");
    }

    #[tokio::test]
    async fn runs_that_changed_or_were_locked_meanwhile_stay() {
        let backend = filled().await;
        let plan = plan(&*backend, Rules::older_than_days(0, 0, day(25)).unwrap()).await.unwrap();
        assert_eq!(plan.delete.len(), 3);
        put(&backend, "old", vec![Mutation::Update { update: RunUpdate::running(), at: day(25) }]).await;
        let LeaseStore::Book(book) = backend.lease_store() else { panic!("memory keeps a book") };
        let owner = LeaseOwner { process: ProcessInfo::current(day(25)), name: Arc::from("someone") };
        let key = LeaseKey::run(RunId::new("old2").unwrap());
        book.put(LeaseRecord::new(key, FencingToken(1), owner, None, day(25), 1000), None);
        let cleaned = execute(&backend, &plan).await.unwrap();
        assert_eq!(cleaned.deleted, 1);
        assert_eq!(ids(&cleaned.changed_meanwhile), ["old2", "old"]);
        let again = super::plan(&*backend, Rules::older_than_days(0, 0, day(25)).unwrap()).await.unwrap();
        assert_eq!(ids(&again.locked), ["old2"]);
        assert!(again.delete.is_empty());
    }

    #[test]
    fn the_judge() {
        let rules = Rules::older_than_days(10, 1, day(25)).unwrap();
        let mut judge = Judge::new(rules, BTreeSet::new());
        let summary = |id: &str, status: &str, finished: Option<DateTime<Utc>>| {
            let mut header = RunHeader::new(RunStatus::parse(status), day(1));
            header.finished_at = finished;
            RunSummary::new(RunId::new(id).unwrap(), Version(1), header, [].into())
        };
        judge.see(&summary("kept as the last", "success", Some(day(2))), None);
        judge.see(&summary("edge", "failed", Some(day(15))), None);
        judge.see(&summary("over the edge", "failed", Some(day(14))), None);
        judge.see(&summary("pending", "pending", None), None);
        let foreign = summary("foreign", "upstream_failed", None);
        assert!(Judge::needs_stamp(&foreign));
        judge.see(&foreign, Some(day(3)));
        judge.see(&summary("no stamp", "success", None), None);
        let plan = judge.into_plan();
        assert_eq!(plan.delete.iter().map(|doomed| doomed.run_id.as_str()).collect::<Vec<_>>(), ["over the edge", "foreign"]);
        assert_eq!(ids(&plan.without_stamp), ["no stamp"]);
        assert_eq!(plan.kept, 3);
    }

    #[test]
    fn days_beyond_the_calendar_are_refused() {
        for days in [u64::MAX, 1 << 40, 800_000] {
            let error = Rules::older_than_days(days, 0, day(25)).unwrap_err();
            assert_eq!(error.kind(), ProjectErrorKind::Input);
            assert!(error.to_string().contains(&days.to_string()));
        }
        assert_eq!(Rules::older_than_days(0, 0, day(25)).unwrap().cutoff(), day(25));
    }
}
