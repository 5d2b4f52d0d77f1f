//! Moving a project's state from one backend to another: lock, backup, copy, proof, and as the very last step the switch of its settings.
//!
//! Until the settings are switched the old backend is what the project uses, whole and unchanged; afterwards it is the new one. Where they name the new one already
//! it is marked as long as it is not whole, and nobody else writes there. So it may be killed at any point and started again.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::again::Told;
use super::backup::{BACKUP, back_up};
use super::checks::{
    overrides, refuse_busy, refuse_lost, refuse_no_file, refuse_same, refuse_source, unless_empty, without_missed,
};
use super::copied::Copied;
use super::exclusive::Exclusive;
use super::files::{DATABASE, DOCUMENT, NUMBERS, with_suffix};
use super::migrate::{self, Fate, Moved, Plan, go_on};
pub use super::origin::{Home, Move, Origin};
use super::shown::{counted, lossy, lossy_option, shell};
use super::unfinished::{self, Unfinished};
use super::{ProjectError, ProjectErrorKind, Settings, Switch, files};
use crate::model::RunSummary;
use crate::store::StateBackend;

/// A point that a move has reached; everything before it is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// The source is locked: no other process writes it.
    Locked,
    /// The document is brought up to date.
    Checkpointed,
    /// An older backup was put aside under its own name.
    OldBackupAside,
    /// The document is backed up.
    BackedUp,
    /// The target is open.
    TargetOpen,
    /// The target says that a move into it has not ended: nobody else opens it for writing. Told of a database, if anything moves there.
    Marked,
    /// One more batch is in the target.
    BatchCopied,
    /// Everything is in the target.
    Copied,
    /// Everything was read from both sides and found equal.
    Verified,
    /// The settings name the new backend.
    Switched,
}

/// What a move would do.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Preview {
    /// Where the state is.
    pub from: String,
    /// Whether there is one.
    pub from_exists: bool,
    /// Where it would go.
    pub to: String,
    /// Whether there is a state already.
    pub to_exists: bool,
    /// What would move; `None` if there is no state yet.
    pub plan: Option<Plan>,
    /// The settings file that would be switched.
    #[serde(serialize_with = "lossy")]
    pub settings_file: PathBuf,
    /// Whether the settings name the target already.
    pub settings_done: bool,
    /// Whether an earlier move into the target was cut off: until a move ends well there, or the mark is taken away, it opens for reading only.
    pub is_unfinished: bool,
    /// What the operator should know.
    pub notices: Vec<String>,
    #[serde(skip)]
    told: Told,
}

impl Preview {
    /// What a move would say of runs that both places have with other content.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Conflict`] that names them, and says what to do.
    pub fn refuse_conflicts(&self) -> Result<(), ProjectError> {
        self.plan.as_ref().map_or(Ok(()), |plan| self.told.refuse_conflicts(plan))
    }
}

/// What a move did.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Where the state was, and still is.
    pub from: String,
    /// Where it is now.
    pub to: String,
    /// What was copied and verified; `None` if there was no state to move.
    pub moved: Option<Moved>,
    /// The backup of the document.
    #[serde(serialize_with = "lossy_option")]
    pub backup: Option<PathBuf>,
    /// The name under which an older backup was put aside.
    #[serde(serialize_with = "lossy_option")]
    pub older_backup: Option<PathBuf>,
    /// The settings file that was switched.
    #[serde(serialize_with = "lossy")]
    pub settings_file: PathBuf,
    /// Whether it was switched just now; else it said so before.
    pub switched: bool,
    /// What takes it all back: shell commands, and the line for the settings file; in brackets what goes with it. Empty if nothing was moved and nothing switched.
    pub rollback: Vec<String>,
    /// What the operator should know.
    pub notices: Vec<String>,
    /// The target is what the settings in force name.
    #[serde(skip)]
    is_in_use: bool,
    /// Everything was read from both sides and found equal.
    #[serde(skip)]
    is_compared: bool,
    /// What was written so far, for an error that comes later.
    #[serde(skip)]
    pub(super) done: Vec<String>,
}

impl Report {
    /// What the settings say where a move that wrote something did not end.
    fn unsettled(&self) -> String {
        let to = &self.to;
        match (self.is_in_use, self.is_compared) {
            (false, _) => "; the settings were not switched".to_owned(),
            (true, true) => format!("; the settings name {to} already, which has all that was moved: it was compared"),
            (true, false) => format!(
                "; the settings name {to} already, where a part may be missing: run the move again before anybody works there"
            ),
        }
    }
}

/// Says what a move would do. Opens for reading, makes and changes nothing.
///
/// # Errors
/// Whatever reading meets; [`ProjectErrorKind::Input`] if the settings file cannot be switched; [`ProjectErrorKind::Integrity`] if [`verify`](super::verify())
/// finds problems in the source; [`ProjectErrorKind::Conflict`] if nobody said whether `state.db` or the file moves to the server that the settings name. Runs
/// that differ are in the plan, not an error.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn preview(
    settings: &Settings,
    what: impl Into<Move>,
    mut see: impl FnMut(&RunSummary, Fate) + Send,
) -> Result<Preview, ProjectError> {
    let what = what.into();
    let (from, to) = (&what.from, what.to);
    let switch = Switch::plan(&settings.file_or_default(), to.name())?;
    let mut notices = overrides(settings, to);
    notices.extend(switch.check_replaceable().err().map(|error| format!("the settings could not be switched: {error}")));
    let source = from.open_existing(settings, &mut notices).await?;
    refuse_lost(settings, from, source.is_none())?;
    let source = unless_empty(settings, from, source).await?;
    let mut of_target = Vec::new();
    let target = Origin::from(to).open_existing(settings, &mut of_target).await?;
    notices.extend(without_missed(settings, of_target));
    refuse_same(source.as_deref(), target.as_deref())?;
    Copied::check(&settings.target.value)?;
    let mut told = Told::new(settings, &what, from.place(settings)?, Origin::from(to).place(settings)?);
    if let Some(target) = &target {
        told.set_part(unfinished::notice(&**target).await);
    }
    let plan: Option<Plan> = match &source {
        Some(source) => {
            let copied = match &target {
                Some(target) if !told.is_in_use() && !switch.is_done() => {
                    Some(Copied::load(&settings.target.value, &source.location(), &target.location())?)
                }
                _ => None,
            };
            let see = |run: &RunSummary, fate| {
                if fate == Fate::Move {
                    told.moves(&run.run_id);
                }
                see(run, fate);
            };
            let plan = migrate::plan_after(&**source, target.as_deref(), copied.as_ref(), see).await?;
            refuse_source(settings, &what, &**source, &plan, switch.is_done()).await?;
            Some(plan)
        }
        None => None,
    };
    if let Some(plan) = &plan {
        notices.extend(told.notices(plan, target.is_some()));
    }
    let preview = Preview {
        from: from.place(settings)?,
        from_exists: source.is_some(),
        to: Origin::from(to).place(settings)?,
        to_exists: target.is_some(),
        plan,
        settings_file: switch.path().to_owned(),
        settings_done: switch.is_done(),
        is_unfinished: told.part().is_some(),
        notices,
        told,
    };
    for backend in [source, target].into_iter().flatten() {
        backend.close().await?;
    }
    Ok(preview)
}

/// Moves a project. `observe` is told every step when it is done and may stop there, as a crash would.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # #[cfg(all(feature = "file", feature = "sqlite"))] {
/// use std::ops::ControlFlow;
/// use seeknal_state::project::{self, Settings, relocate};
/// use seeknal_state::{Clock, NewRun, SystemClock};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let project = folder.path();
/// # let state = project::open_with(&Settings::load(project, &|_| None)?).await?;
/// # state.create_run("run_1", NewRun::running()).await?;
/// # state.close().await?;
/// let settings = Settings::load(project, &|_| None)?;
/// let preview = relocate::preview(&settings, relocate::Home::Database, |_, _| ()).await?;
/// assert_eq!(preview.plan.unwrap().moves.runs, 1);
/// let report =
///     relocate::execute(&settings, relocate::Home::Database, SystemClock.now(), |_| ControlFlow::Continue(())).await?;
/// assert_eq!(report.moved.unwrap().verified.runs, 1);
/// assert_eq!(Settings::load(project, &|_| None)?.backend.value, "database");
/// # }
/// # Ok::<(), seeknal_state::project::ProjectError>(()) }).unwrap();
/// ```
///
/// # Errors
/// [`ProjectErrorKind::NotFound`] if there is no state to move, and the settings do not name the target already;
/// [`ProjectErrorKind::Conflict`] if another process writes the file or works on the database that is left, locks are held there, the target
/// has a run with other content, the settings were switched since they were read, a move into the source or from another place into the target was cut off, or nobody said whether `state.db` or the file moves to the server that the
/// settings name; [`ProjectErrorKind::Integrity`] if [`verify`](super::verify()) finds problems in the source; whatever reading and writing meet; and
/// [`ProjectErrorKind::Partial`] instead of any of them, with what was done, once something was written (a backup, a part of the copy). The settings are not
/// switched then, and the old backend is as it was. A database that was only filled in part stays marked: until the move is run again it opens for reading only.
///
/// # Cancel safety
/// Dropping it is like a crash: the settings name the old backend, or the move is done. Start again to go on.
pub async fn execute(
    settings: &Settings,
    what: impl Into<Move>,
    now: DateTime<Utc>,
    mut observe: impl FnMut(Step) -> ControlFlow<()> + Send,
) -> Result<Report, ProjectError> {
    let what = what.into();
    let to = what.to;
    let switch = Switch::plan(&settings.file_or_default(), to.name())?;
    switch.check_replaceable()?;
    let mut report = Report {
        from: what.from.place(settings)?,
        to: Origin::from(to).place(settings)?,
        moved: None,
        backup: None,
        older_backup: None,
        settings_file: switch.path().to_owned(),
        switched: !switch.is_done(),
        is_in_use: switch.is_done(),
        is_compared: false,
        rollback: Vec::new(),
        notices: overrides(settings, to),
        done: Vec::new(),
    };
    let (mut open, mut locks) = (Vec::new(), Vec::new());
    let moved = move_state(settings, &what, now, &mut observe, &mut report, &mut open, &mut locks).await;
    let moved = moved.and_then(|()| held(&locks).map_err(|error| error.and(report.unsettled())));
    let switched = match moved {
        Ok(()) => forget_and_switch(settings, &switch, &mut report).and_then(|()| go_on(observe(Step::Switched))),
        Err(error) => Err(error),
    };
    // The locks are held until the settings are switched: nobody writes to the old place in between.
    for lock in locks {
        lock.release().await;
    }
    for backend in open.into_iter().rev() {
        if let Err(error) = backend.close().await {
            report.notices.push(format!("closing {}: {error}", backend.location()));
        }
    }
    if let Err(error) = switched {
        let stopped = error.kind() == ProjectErrorKind::Stopped;
        return Err(if stopped || report.done.is_empty() { error } else { error.after(report.done.join(", ")) });
    }
    if report.switched || report.moved.as_ref().is_some_and(|moved| !moved.moved.is_empty()) {
        report.rollback.extend(what.from.settings_lines());
        if what.from.is_on_server(settings) || Origin::from(to).is_on_server(settings) {
            report.rollback.push(format!(
                "(fencing tokens then go on behind those of {}: lower than what {} gives out until then)",
                report.from, report.to
            ));
        }
    } else {
        report.rollback.clear();
    }
    Ok(report)
}

async fn move_state(
    settings: &Settings,
    what: &Move,
    now: DateTime<Utc>,
    observe: &mut (impl FnMut(Step) -> ControlFlow<()> + Send),
    report: &mut Report,
    open: &mut Vec<Arc<dyn StateBackend>>,
    locks: &mut Vec<Exclusive>,
) -> Result<(), ProjectError> {
    let (from, to) = (&what.from, Origin::from(what.to));
    let file = Origin::Home(Home::File);
    let seen = from.open_existing(settings, &mut Vec::new()).await?;
    refuse_lost(settings, from, seen.is_none())?;
    let Some(seen) = unless_empty(settings, from, seen).await? else {
        if let Some(target) = to.open_existing(settings, &mut Vec::new()).await? {
            let is_whole = unfinished::refuse_part(&*target).await;
            target.close().await?;
            is_whole?;
        }
        return if report.switched { Err(no_state(report, what.to)) } else { Ok(()) };
    };
    let mut told = Told::new(settings, what, report.from.clone(), report.to.clone());
    let folder = &settings.target.value;
    Copied::check(folder)?;
    // The environment may name another place than the file, and others do as that says.
    let is_in_use = told.is_in_use() || !report.switched;
    report.is_in_use = is_in_use;
    let notes = |source: &str, target: &str| (!is_in_use).then(|| Copied::load(folder, source, target)).transpose();
    // A conflict that can be seen already is told before anything is written, even a backup.
    let there = to.open_existing(settings, &mut Vec::new()).await?;
    let (mut is_there_already, mut has_nothing_else) = (false, false);
    let plan;
    if let Some(target) = &there {
        refuse_same(Some(&*seen), Some(&**target))?;
        let copied = notes(&seen.location(), &target.location())?;
        plan = migrate::plan_after(&*seen, Some(&**target), copied.as_ref(), |_, _| ()).await?;
        has_nothing_else = plan.only_in_target == 0 && migrate::outlives_nothing_else(&*seen, &**target).await?;
        if unfinished::of_this_move(&**target, settings, what, &seen.location()).await?.is_some() {
            told.set_part(unfinished::notice(&**target).await);
        }
        target.close().await?;
        told.refuse_conflicts(&plan)?;
        is_there_already = plan.moves.is_empty();
    } else {
        // So is what cannot be read.
        plan = migrate::plan(&*seen, None, |_, _| ()).await?;
    }
    unfinished::refuse_part(&*seen).await?;
    refuse_source(settings, what, &*seen, &plan, !report.switched).await?;
    seen.close().await?;
    let source = from.open_writable(settings, &mut report.notices).await?;
    open.push(Arc::clone(&source));
    locks.extend(Exclusive::take(&source).await?);
    // Another move may have ended since they were read: then its target is the state in use.
    settings.refuse_left()?;
    if *from != file {
        refuse_busy(&*source).await?;
    }
    // A state that comes from a server may have none yet; what is noted meanwhile lies there.
    files::make_folder(&settings.target.value)?;
    report.from = source.location();
    let before = migrate::stamp(&*source).await?;
    let document = settings.target.value.join(DOCUMENT);
    let mut target = None;
    if to == file {
        // Whoever has the database has the file: the lock is made first, and what has no document to follow follows it.
        let database = settings.target.value.join(DATABASE);
        if !document.exists() && source.location() == database.display().to_string() {
            files::make_like(&database, &with_suffix(&document, NUMBERS))?;
        }
        let mut of_target = Vec::new();
        let opened = to.open_writable(settings, &mut of_target).await?;
        report.notices.extend(without_missed(settings, of_target));
        open.push(Arc::clone(&opened));
        target = Some(opened);
    }
    go_on(observe(Step::Locked))?;
    if *from == file || document.exists() {
        refuse_no_file(&with_suffix(&document, BACKUP))?;
    }
    files::sweep(&with_suffix(&document, BACKUP))?;
    files::sweep(&report.settings_file)?;
    if let Some(file) = if *from == file { Some(&source) } else { target.as_ref() } {
        file.checkpoint().await?;
        go_on(observe(Step::Checkpointed))?;
        // What an earlier move has written, whole or in part, is no document from before one: the backup that it made stays. And nobody leaves what was left
        // already.
        let is_needless =
            if what.to == Home::File { is_there_already || has_nothing_else } else { is_there_already && !report.switched };
        if document.exists() && !is_needless {
            back_up(&document, now, observe, report)?;
            if let (true, Some(backup)) = (*from == Origin::Home(Home::File), &report.backup) {
                report.rollback.push(format!("cp {} {}", shell(backup), shell(&document)));
            }
        }
        go_on(observe(Step::BackedUp))?;
    }
    let target = if let Some(file) = target {
        file
    } else {
        if *from == file && settings.database_url.is_none() {
            files::make_like(&document, &settings.target.value.join(DATABASE))?;
        }
        let mut of_target = Vec::new();
        let database = to.open_writable(settings, &mut of_target).await?;
        report.notices.extend(without_missed(settings, of_target));
        open.push(Arc::clone(&database));
        locks.extend(Exclusive::take(&database).await?);
        database
    };
    report.to = target.location();
    go_on(observe(Step::TargetOpen))?;
    if is_in_use {
        // They are those of a move that ended, or was given up: work went on in what it copied.
        Copied::forget(folder)?;
    }
    let mut copied = notes(&source.location(), &target.location())?;
    let see = |run: &RunSummary, fate| {
        if fate == Fate::Move {
            told.moves(&run.run_id);
        }
    };
    let plan = migrate::plan_after(&*source, Some(&*target), copied.as_ref(), see).await?;
    told.refuse_conflicts(&plan)?;
    let mut mark = Unfinished::left(&target, settings, what, &report.from).await?;
    let has_no_run = plan.moves.runs == 0 && plan.equal_runs == 0;
    if mark.is_some() && has_no_run && plan.only_in_target > 0 {
        // The source was lost since, and the part that is here would pass for all of it.
        unfinished::refuse_part(&*target).await?;
    }
    if mark.is_none() && !plan.moves.is_empty() {
        // Whoever has the lock by now may have ended this move: the mark would stand in a state at which people work.
        held(locks)?;
        mark = Unfinished::set(&target, what, &report.from).await?;
    }
    if mark.is_some() {
        go_on(observe(Step::Marked))?;
    }
    report.notices.extend(told.notices(&plan, there.is_some()));
    let filled = fill(&*source, &*target, copied.as_mut(), || observe(Step::BatchCopied)).await;
    let moved = match filled {
        Ok(moved) => moved,
        Err(error) => {
            // Without the lock it may be the mark of another by now, who goes on with this move.
            if let Some(mark) = mark.filter(|mark| mark.is_new && error.is_certain() && held(locks).is_ok()) {
                unmark_unchanged(&mark, &*source, &*target, copied.as_ref(), &plan).await;
            }
            return Err(if error.kind() == ProjectErrorKind::Partial { error.and(report.unsettled()) } else { error });
        }
    };
    if !moved.is_empty() {
        let were = if moved.runs == 1 { "was" } else { "were" };
        report.done.push(format!("{} {were} copied to {}", counted(moved.runs, "run"), target.location()));
    }
    target.checkpoint().await?;
    go_on(observe(Step::Copied))?;
    // Read through a second opening, so that what is compared is what another process would find.
    let reader = to.open_reader(settings).await?;
    let verified = migrate::verify(&*source, &*reader).await;
    reader.close().await?;
    let verified = verified.map_err(|error| error.and(report.unsettled()))?;
    report.moved = Some(Moved::new(moved, plan.equal_runs, verified));
    if *from != file {
        refuse_busy(&*source).await?;
    }
    if migrate::stamp(&*source).await? != before {
        return Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{}: somebody wrote there in the middle of the move, unseen. Stop who works there and start again{}",
                source.location(),
                report.unsettled()
            ),
        ));
    }
    if let Some(mark) = mark {
        held(locks).map_err(|error| error.and(report.unsettled()))?;
        mark.take_away().await.map_err(|error| error.and(report.unsettled()))?;
    }
    report.is_compared = true;
    go_on(observe(Step::Verified))
}

/// An error if others may have come in.
fn held(locks: &[Exclusive]) -> Result<(), ProjectError> {
    locks.iter().try_for_each(Exclusive::still_held)
}

/// Brings to the target what it lacks.
async fn fill(
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    copied: Option<&mut Copied>,
    after_batch: impl FnMut() -> ControlFlow<()> + Send,
) -> Result<migrate::Counts, ProjectError> {
    if let Some(copied) = &copied {
        migrate::remove_stale(source, target, copied).await?;
    }
    // Whoever fences something of his own by tokens refuses lower ones.
    target.raise_tokens(source.highest_token().await?).await?;
    migrate::copy_noting(source, target, copied, after_batch).await
}

/// After a failure that changed nothing in the target its mark says too much. Where that cannot be seen it stays.
async fn unmark_unchanged(
    mark: &Unfinished,
    source: &dyn StateBackend,
    target: &dyn StateBackend,
    copied: Option<&Copied>,
    plan: &Plan,
) {
    let now = migrate::plan_after(source, Some(target), copied, |_, _| ()).await;
    if now.is_ok_and(|now| now == *plan) {
        let _stays_and_says_how_to_go_on = mark.take_away().await.is_err();
    }
}

/// The move's notes are gone for good before the settings are switched: with the switch what was copied is the state in use, which follows no original.
fn forget_and_switch(settings: &Settings, switch: &Switch, report: &mut Report) -> Result<(), ProjectError> {
    let notes = Copied::forget(&settings.target.value)?;
    switch_or_see(switch, report).inspect_err(|_| notes.remember())
}

/// Switches the settings. A fault that comes when the file says so already (its folder could not be synced) takes nothing back: it is told as a notice.
fn switch_or_see(switch: &Switch, report: &mut Report) -> Result<(), ProjectError> {
    let Err(error) = switch.execute() else { return Ok(()) };
    if !switch.is_done_by_now() {
        return Err(error.and(format_args!(
            ". Everything is in {} and was compared: before anybody works on, write `state_backend: {}` into {} by hand, or start again",
            report.to,
            switch.backend(),
            switch.path().display()
        )));
    }
    report.notices.push(format!(
        "{} names the {} backend now, but this may not survive a crash of the machine: {error}",
        switch.path().display(),
        switch.backend()
    ));
    Ok(())
}

/// Nothing moves, so nothing is switched: whoever means an empty state says so himself.
fn no_state(report: &Report, to: Home) -> ProjectError {
    ProjectError::new(
        ProjectErrorKind::NotFound,
        format!(
            "{}: there is no state to move; the settings were not switched. If it should be there, check where the settings look for it. To begin anew in {}, \
             write `state_backend: {}` into {}",
            report.from,
            report.to,
            to.name(),
            report.settings_file.display()
        ),
    )
}
