//! Moving a project's state from one backend to another: lock, backup, copy, proof, and as the very last step the switch of its settings.
//!
//! Until the settings are switched the old backend is what the project uses, whole and unchanged; afterwards it is the new one. So it may be killed at any
//! point and started again.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::copied::Copied;
use super::exclusive::Exclusive;
use super::files::with_suffix;
use super::migrate::{self, Fate, Moved, Plan, go_on};
pub use super::origin::{Home, Move, Origin};
use super::{ProjectError, ProjectErrorKind, Settings, Source, Switch, files};
use crate::model::RunSummary;
use crate::store::{KnownOpenings, MIGRATION, StateBackend};

/// The document's name in the state's folder.
const DOCUMENT: &str = "run_state.json";
const DATABASE: &str = "state.db";
/// What a backup's name ends with.
const BACKUP: &str = ".bak";

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
    /// Where it would go.
    pub to: String,
    /// What would move; `None` if there is no state yet.
    pub plan: Option<Plan>,
    /// The settings file that would be switched.
    pub settings_file: PathBuf,
    /// Whether the settings name the target already.
    pub settings_done: bool,
    /// What the operator should know.
    pub notices: Vec<String>,
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
    pub backup: Option<PathBuf>,
    /// The name under which an older backup was put aside.
    pub older_backup: Option<PathBuf>,
    /// The settings file that was switched.
    pub settings_file: PathBuf,
    /// What takes it all back: shell commands, and the line for the settings file.
    pub rollback: Vec<String>,
    /// What the operator should know.
    pub notices: Vec<String>,
    /// What was written so far, for an error that comes later.
    #[serde(skip)]
    done: Vec<String>,
}

/// Says what a move would do. Opens for reading, makes and changes nothing.
///
/// # Errors
/// Whatever reading meets; [`ProjectErrorKind::Input`] if the settings file cannot be switched. Runs that differ are in the plan, not an error.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn preview(
    settings: &Settings,
    what: impl Into<Move>,
    see: impl FnMut(&RunSummary, Fate) + Send,
) -> Result<Preview, ProjectError> {
    let Move { from, to } = what.into();
    let switch = Switch::plan(&settings.file_or_default(), to.name())?;
    let mut notices = overrides(settings, to);
    let source = from.open_existing(settings, &mut notices).await?;
    let target = Origin::from(to).open_existing(settings, &mut notices).await?;
    let place = |origin: &Origin, open: &Option<Arc<dyn StateBackend>>| match open {
        Some(backend) => backend.location(),
        None => format!("{origin} backend (no state yet)"),
    };
    refuse_same(source.as_deref(), target.as_deref())?;
    let copied = target.as_ref().map(|target| Copied::load(&settings.target.value, &target.location()));
    let plan: Option<Plan> = match &source {
        Some(source) => Some(migrate::plan_after(&**source, target.as_deref(), copied.as_ref(), see).await?),
        None => None,
    };
    if let (Some(plan), Some(target)) = (&plan, &target) {
        notices.extend(plan.only_there(&target.location()));
    }
    let preview = Preview {
        from: place(&from, &source),
        to: place(&to.into(), &target),
        plan,
        settings_file: switch.path().to_owned(),
        settings_done: switch.is_done(),
        notices,
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
/// [`ProjectErrorKind::Conflict`] if another process writes the file or works on the database that is left, locks are held there, or the target
/// has a run with other content; whatever reading and writing meet; and [`ProjectErrorKind::Partial`] instead of any of them, with what was done, once
/// something was written (a backup, a part of the copy). The settings are not switched then, and the old backend is as it was.
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
    let mut report = Report {
        from: what.from.to_string(),
        to: to.name().to_owned(),
        moved: None,
        backup: None,
        older_backup: None,
        settings_file: switch.path().to_owned(),
        rollback: Vec::new(),
        notices: overrides(settings, to),
        done: Vec::new(),
    };
    let (mut open, mut locks) = (Vec::new(), Vec::new());
    let moved = move_state(settings, &what, now, &mut observe, &mut report, &mut open, &mut locks).await;
    let moved = moved.and_then(|()| locks.iter().try_for_each(Exclusive::still_held));
    let switched = match moved {
        Ok(()) => switch.execute().and_then(|()| {
            Copied::forget(&settings.target.value);
            go_on(observe(Step::Switched))
        }),
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
    report.rollback.extend(what.from.settings_lines());
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
    let Some(seen) = from.open_existing(settings, &mut Vec::new()).await? else { return Ok(()) };
    // A conflict that can be seen already is told before anything is written, even a backup.
    if let Some(target) = to.open_existing(settings, &mut Vec::new()).await? {
        refuse_same(Some(&*seen), Some(&*target))?;
        let copied = Copied::load(&settings.target.value, &target.location());
        let plan = migrate::plan_after(&*seen, Some(&*target), Some(&copied), |_, _| ()).await?;
        target.close().await?;
        plan.refuse_conflicts(&target.location())?;
    }
    seen.close().await?;
    let source = from.open_writable(settings, &mut report.notices).await?;
    open.push(Arc::clone(&source));
    locks.extend(Exclusive::take(&source).await?);
    if *from != file {
        refuse_busy(&*source).await?;
    }
    report.from = source.location();
    let before = migrate::stamp(&*source).await?;
    let mut target = None;
    if to == file {
        let opened = to.open_writable(settings, &mut report.notices).await?;
        open.push(Arc::clone(&opened));
        target = Some(opened);
    }
    go_on(observe(Step::Locked))?;
    let document = settings.target.value.join(DOCUMENT);
    files::sweep(&with_suffix(&document, BACKUP))?;
    files::sweep(&report.settings_file)?;
    if let Some(file) = if *from == file { Some(&source) } else { target.as_ref() } {
        file.checkpoint().await?;
        go_on(observe(Step::Checkpointed))?;
        if document.exists() {
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
        let database = to.open_writable(settings, &mut report.notices).await?;
        open.push(Arc::clone(&database));
        locks.extend(Exclusive::take(&database).await?);
        database
    };
    report.to = target.location();
    go_on(observe(Step::TargetOpen))?;
    let mut copied = Copied::load(&settings.target.value, &target.location());
    let plan = migrate::plan_after(&*source, Some(&*target), Some(&copied), |_, _| ()).await?;
    plan.refuse_conflicts(&target.location())?;
    migrate::remove_stale(&*source, &*target, &copied).await?;
    // Whoever fences something of his own by tokens refuses lower ones.
    target.raise_tokens(source.highest_token().await?).await?;
    report.notices.extend(plan.only_there(&target.location()));
    let moved = migrate::copy_noting(&*source, &*target, Some(&mut copied), || observe(Step::BatchCopied)).await?;
    if !moved.is_empty() {
        report.done.push(format!("{} runs were copied to {}", moved.runs, target.location()));
    }
    target.checkpoint().await?;
    go_on(observe(Step::Copied))?;
    // Read through a second opening, so that what is compared is what another process would find.
    let reader = to.open_reader(settings).await?;
    let verified = migrate::verify(&*source, &*reader).await;
    reader.close().await?;
    report.moved = Some(Moved::new(moved, plan.equal_runs, verified?));
    if *from != file {
        refuse_busy(&*source).await?;
    }
    if migrate::stamp(&*source).await? != before {
        return Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{}: somebody wrote there in the middle of the move, unseen; the settings were not switched. Stop who works there and start again",
                source.location()
            ),
        ));
    }
    go_on(observe(Step::Verified))
}

/// Refuses a move from a place to itself.
fn refuse_same(source: Option<&dyn StateBackend>, target: Option<&dyn StateBackend>) -> Result<(), ProjectError> {
    match (source, target) {
        (Some(source), Some(target)) if source.location() == target.location() => Err(ProjectError::input(format!(
            "{} is both where the state is and where it would go; say where it comes from (`--from`)",
            source.location()
        ))),
        _ => Ok(()),
    }
}

/// A database cannot be locked as a whole: refuse to leave it while somebody works on it.
async fn refuse_busy(backend: &dyn StateBackend) -> Result<(), ProjectError> {
    let own = backend.process().map(|process| process.id);
    let others: Vec<String> = backend
        .processes()
        .await?
        .into_iter()
        .filter(|open| Some(&open.process.id) != own.as_ref())
        .filter_map(|open| match open.alive {
            Some(true) => Some(open.process.to_string()),
            // A server soon knows of everybody.
            None if backend.known_openings() == KnownOpenings::All => {
                Some(format!("{} (or was, until a moment ago: if it was killed, this is known within a minute)", open.process))
            }
            _ => None,
        })
        .collect();
    let refuse = |why: String| {
        let message =
            format!("{}: {why}; stop it and try again (`seeknal state locks` lists who works here)", backend.location());
        Err(ProjectError::new(ProjectErrorKind::Conflict, message))
    };
    if !others.is_empty() {
        return refuse(format!("it is open in {}", others.join(", ")));
    }
    match backend.list_leases().await?.iter().find(|lease| lease.key.run.as_str() != MIGRATION) {
        Some(lease) => refuse(format!("{} is locked by {}", lease.key, lease.owner)),
        None => Ok(()),
    }
}

/// Backs the document up under its fixed name; an older backup with other content is put aside first.
fn back_up(
    document: &Path,
    now: DateTime<Utc>,
    observe: &mut impl FnMut(Step) -> ControlFlow<()>,
    report: &mut Report,
) -> Result<(), ProjectError> {
    let backup = with_suffix(document, BACKUP);
    if !files::same_content(document, &backup)? {
        if backup.symlink_metadata().is_ok() {
            let aside = free_name(&backup, now);
            std::fs::rename(&backup, &aside).map_err(|error| ProjectError::io(&backup, error))?;
            files::sync_folder(files::folder_of(&backup))?;
            report.done.push(format!("an older backup is now {}", aside.display()));
            report.older_backup = Some(aside);
            go_on(observe(Step::OldBackupAside))?;
        }
        files::copy(document, &backup)?;
        report.done.push(format!("the document was backed up as {}", backup.display()));
    }
    report.backup = Some(backup);
    Ok(())
}

/// `.bak.<UTC>`, numbered if that second has one already.
fn free_name(backup: &Path, now: DateTime<Utc>) -> PathBuf {
    let stamped = with_suffix(backup, &format!(".{}", now.format("%Y%m%dT%H%M%SZ")));
    let mut name = stamped.clone();
    let mut number = 1u32;
    while name.symlink_metadata().is_ok() {
        number = number.saturating_add(1);
        name = with_suffix(&stamped, &format!(".{number}"));
    }
    name
}

/// Warnings about variables of the environment that settings files cannot change.
fn overrides(settings: &Settings, to: Home) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Source::Environment(name) = settings.backend.source {
        let (set, to) = (&settings.backend.value, to.name());
        let mend = if set == to {
            "as long as it is set, what the file says (also to take it back) changes nothing".to_owned()
        } else {
            format!("unset it, or set it to {to}")
        };
        warnings.push(format!("the environment variable {name}={set} overrides the settings file; {mend}"));
    }
    if let Some(Source::Environment(name)) = settings.database_url.as_ref().map(|url| &url.source) {
        warnings.push(format!("the database is the one that the environment variable {name} names; it must stay set"));
    }
    warnings
}

/// A path as a shell takes it.
fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    if text.chars().all(|c| c.is_alphanumeric() || "/._-+=:@%,".contains(c)) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_printed_as_a_shell_takes_them() {
        assert_eq!(shell(Path::new("target/run_state.json")), "target/run_state.json");
        assert_eq!(shell(Path::new("/a b/it's")), "'/a b/it'\\''s'");
    }
}
