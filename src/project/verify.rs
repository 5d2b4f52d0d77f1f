//! Checking a project's storage, and repairing what can be repaired.

use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use super::backup::BACKUP;
use super::shown::shell;
use super::{ProjectError, ProjectErrorKind, Settings, files};
use crate::store::{StateBackend, StoreErrorKind, VerifyReport};

/// Checks the project's storage from end to end; only reads, also beside a live writer. `None` if there is no state yet; a `state.db` that was removed
/// or emptied, as the file beside it tells, is a problem in the report.
///
/// # Errors
/// Whatever reading meets; [`ProjectErrorKind::Integrity`] for a state of a newer version or of another program: that is no damage. Damage is no error
/// here but a problem in the report, also when the state does not open for it.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn verify(settings: &Settings) -> Result<Option<VerifyReport>, ProjectError> {
    let mut report = look(settings).await?;
    report.iter_mut().for_each(without_pointers);
    Ok(report)
}

/// Errors name this very check.
fn without_pointers(report: &mut VerifyReport) {
    for problem in &mut report.problems {
        for pointer in
            ["`seeknal state verify` says more, ", "; `seeknal state verify` names it", "`seeknal state verify` explains, "]
        {
            *problem = problem.replace(pointer, "");
        }
    }
}

/// Refuses to move a state in which this check finds problems: what cannot be read any more would stay behind, and the copy would pass for whole. Those that
/// would not stay behind (a stamp that is spelled otherwise) are mended as soon, and are not told apart here.
pub(super) async fn refuse_damaged(backend: &dyn StateBackend) -> Result<(), ProjectError> {
    /// Problems that are named; the rest is counted.
    const NAMED: usize = 3;
    let mut report = backend.verify().await?;
    if report.is_sound() {
        return Ok(());
    }
    without_pointers(&mut report);
    let all = report.problems.len();
    let more = if all > NAMED { format!("; and {} more", all - NAMED) } else { String::new() };
    report.problems.truncate(NAMED);
    Err(ProjectError::new(
        ProjectErrorKind::Integrity,
        format!(
            "{}: the check of what is moved found problems, and nothing was moved: {}{more}. Mend them first, or bring a backup back (`seeknal state verify`, under \
             the settings that name it, says more)",
            backend.location(),
            report.problems.join("; ")
        ),
    ))
}

async fn look(settings: &Settings) -> Result<Option<VerifyReport>, ProjectError> {
    let (backend, opened) = match settings.open_existing().await {
        Ok(Some(opened)) => opened,
        Ok(None) => return Ok(None),
        Err(error) if error.stored() == Some(StoreErrorKind::Corrupt) => {
            let mut report = VerifyReport::new();
            report.problems.push(error.to_string());
            return Ok(Some(report));
        }
        Err(error) => return Err(error),
    };
    let mut report = match backend.verify().await {
        Err(error) if error.kind() == StoreErrorKind::Corrupt => {
            let mut report = VerifyReport::new();
            report.problems.push(error.to_string());
            report
        }
        verified => verified?,
    };
    for notice in opened.notices {
        if !report.checked.contains(&notice) && !report.problems.contains(&notice) {
            report.checked.push(notice);
        }
    }
    backend.close().await?;
    Ok(Some(report))
}

/// Repairs what can be repaired, and says what it did. A copy of every file that is changed is kept beside it. `use_previous` allows to bring back the
/// previous, older document where the present one cannot be read. A sound state is left as it is. A file beside the state that does not say any more how far
/// fencing tokens were given out is written anew, far behind those. Nothing repairs a database: of a `state.db` in
/// which SQLite itself finds damage a copy is kept, and the answer says what can be done.
///
/// A process that has the same `state.db` open must not call this: where SQLite cannot copy the file, it is copied by hand, which would take SQLite's locks
/// from it.
///
/// # Errors
/// [`ProjectErrorKind::Conflict`] while a writer has the file open; [`ProjectErrorKind::Integrity`] if the document is beyond repair, or would need
/// `use_previous`, and for a state of a newer version or of another program, of which no copy is made; whatever reading meets.
///
/// # Cancel safety
/// Dropping it leaves every file whole; start again to go on.
pub async fn repair(settings: &Settings, now: DateTime<Utc>, use_previous: bool) -> Result<Vec<String>, ProjectError> {
    #[cfg(feature = "file")]
    if settings.backend.value == "file" {
        if !super::there::file_state(&settings.target.value)? {
            return Ok(Vec::new());
        }
        return match crate::store::file::repair(&settings.target.value, now, use_previous).map_err(ProjectError::from) {
            Err(error) if error.is_no_state() => Ok(Vec::new()),
            repaired => repaired,
        };
    }
    #[cfg(not(feature = "file"))]
    let _ = use_previous;
    let database = (settings.backend.value == "database" && settings.database_url.is_none())
        .then(|| settings.target.value.join(files::DATABASE));
    let mut done = Vec::new();
    #[cfg(feature = "sqlite")]
    if let Some(database) = &database {
        done.extend(crate::store::sqlite::mend_sidecar(database, |file| aside(file, now), now)?);
    }
    let verified = verify(settings).await;
    match verified.map_err(|error| if done.is_empty() { error } else { error.after(done.join("; ")) })? {
        Some(report) if !report.is_sound() => {}
        _ => return Ok(done),
    }
    if let Some(database) = database.as_ref().filter(|database| std::fs::metadata(database).is_ok_and(|found| found.len() > 0)) {
        #[cfg(feature = "sqlite")]
        // What cannot be looked at is no better than damaged.
        let is_damaged = crate::store::sqlite::is_damaged(database).unwrap_or(true);
        #[cfg(not(feature = "sqlite"))]
        let is_damaged = true;
        done.push(if is_damaged {
            keep_database(database, now)?
        } else {
            format!(
                "nothing, and no copy was made: SQLite finds no damage in {}. Values that are wrong are mended with SQL, or a backup brings them back",
                database.display()
            )
        });
        return Ok(done);
    }
    done.push(format!(
        "nothing: what the {} backend stores cannot be repaired from here; restore a backup",
        settings.backend.value
    ));
    Ok(done)
}

/// Where a copy of what is damaged is kept.
fn aside(file: &Path, now: DateTime<Utc>) -> PathBuf {
    files::with_suffix(file, &format!(".damaged-{}", now.format("%Y%m%dT%H%M%S%.6fZ")))
}

/// Whether SQLite itself could copy the database: what others write meanwhile does not tear such a copy. What it does not take for a database is none for
/// anybody, and is copied as it lies.
#[cfg(feature = "sqlite")]
fn copied_by_sqlite(database: &Path, aside: &Path) -> Result<bool, ProjectError> {
    match crate::store::sqlite::copy(database, aside) {
        Ok(()) => {
            files::sync_folder(files::folder_of(aside))?;
            Ok(true)
        }
        Err(error) => {
            let _unfinished = std::fs::remove_file(aside);
            if error.kind() == StoreErrorKind::Corrupt { Ok(false) } else { Err(error.into()) }
        }
    }
}

/// Keeps a copy of a damaged database, for whatever is tried next.
fn keep_database(database: &Path, now: DateTime<Utc>) -> Result<String, ProjectError> {
    let aside = aside(database, now);
    files::make_like(database, &aside)?;
    #[cfg(feature = "sqlite")]
    let copied = copied_by_sqlite(database, &aside)?;
    #[cfg(not(feature = "sqlite"))]
    let copied = false;
    if !copied {
        files::copy(database, &aside)?;
        // It lies where a symbolic link leads.
        let place = std::fs::canonicalize(database).unwrap_or_else(|_| database.to_owned());
        let wal = files::with_suffix(&place, "-wal");
        if wal.exists() {
            files::copy(&wal, &files::with_suffix(&aside, "-wal"))?;
        }
    }
    let backup = files::folder_of(database).join(files::with_suffix(Path::new(files::DOCUMENT), BACKUP));
    let back = if backup.exists() {
        format!("; or go back to the file from before the move ({}, with `state_backend: file`)", backup.display())
    } else {
        String::new()
    };
    #[cfg(feature = "sqlite")]
    let marks = format!("; echo '{}'", crate::store::sqlite::marks(database));
    #[cfg(not(feature = "sqlite"))]
    let marks = "";
    let (from, kept, typed) = (database.display(), aside.display(), shell(&aside));
    // Some builds of the tool have no `.recover`. A dump ends without its commit where it met damage, and never has the marks.
    Ok(format!(
        "{from}: it is left as it is, and a copy is kept as {kept}. Restore a backup; or read out what can be read with SQLite's own tool \
         (`sqlite3 {typed} .recover | sqlite3 recovered.db`, or where it has no `.recover` `(sqlite3 {typed} .dump | sed 's/^ROLLBACK;.*/COMMIT;/'{marks}) | \
         sqlite3 recovered.db`), look at it, and put it in its place{back}"
    ))
}
