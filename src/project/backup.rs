//! The backup of the document that a move leaves or replaces.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use super::ProjectError;
use super::files::{self, with_suffix};
use super::migrate::go_on;
use super::relocate::{Report, Step};

/// What a backup's name ends with.
pub(super) const BACKUP: &str = ".bak";

/// Backs the document up under its fixed name; an older backup with other content is put aside first.
pub(super) fn back_up(
    document: &Path,
    now: DateTime<Utc>,
    observe: &mut impl FnMut(Step) -> ControlFlow<()>,
    report: &mut Report,
) -> Result<(), ProjectError> {
    let backup = with_suffix(document, BACKUP);
    // A second name of the document is no copy: what is written to the one is written to the other.
    if files::is_same_file(document, &backup) || !files::same_content(document, &backup)? {
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
