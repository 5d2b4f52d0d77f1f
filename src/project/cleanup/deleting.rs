//! Deleting what a plan says, some at a time.

use std::sync::Arc;

use serde::Serialize;
use tokio::time::Instant;

use super::{Doomed, Plan, Stays};
use crate::coordinator::{Coordinator, OnDelete, Transaction};
use crate::error::Error;
use crate::model::{Batch, Entry, Guard, Mutation, Outcome, Refusal, RunId, RunPart};
use crate::project::ProjectError;
use crate::project::migrate::commit;
use crate::project::pace::{Pace, leave_a_turn};
use crate::store::StateBackend;

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
/// Whatever writing meets; [`ProjectErrorKind::Partial`](crate::project::ProjectErrorKind::Partial) if something was deleted before.
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
