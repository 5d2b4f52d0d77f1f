//! Checking a project's storage, and repairing what can be repaired.

use chrono::{DateTime, Utc};

use super::{ProjectError, ProjectErrorKind, Settings};
use crate::store::VerifyReport;

/// Checks the project's storage from end to end; only reads, also beside a live writer. `None` if there is no state yet.
///
/// # Errors
/// Whatever reading meets. Damage is no error here but a problem in the report, also when the state does not open for it.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn verify(settings: &Settings) -> Result<Option<VerifyReport>, ProjectError> {
    let (backend, opened) = match settings.open_existing().await {
        Ok(Some(opened)) => opened,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == ProjectErrorKind::Integrity => {
            let mut report = VerifyReport::new();
            report.problems.push(error.to_string());
            return Ok(Some(report));
        }
        Err(error) => return Err(error),
    };
    let mut report = backend.verify().await?;
    for notice in opened.notices {
        if !report.checked.contains(&notice) {
            report.checked.push(notice);
        }
    }
    backend.close().await?;
    Ok(Some(report))
}

/// Repairs what can be repaired, and says what it did. A copy of every file that is changed is kept beside it. `use_previous` allows to bring back the
/// previous, older document where the present one cannot be read. A sound state is left as it is.
///
/// # Errors
/// [`ProjectErrorKind::Conflict`] while a writer has the state open; [`ProjectErrorKind::Integrity`] if it is beyond repair, or would need
/// `use_previous`; [`ProjectErrorKind::Input`] if the backend has no repair.
pub fn repair(settings: &Settings, now: DateTime<Utc>, use_previous: bool) -> Result<Vec<String>, ProjectError> {
    #[cfg(feature = "file")]
    if settings.backend.value == "file" {
        return match crate::store::file::repair(&settings.target.value, now, use_previous).map_err(ProjectError::from) {
            Err(error) if error.is_no_state() => Ok(Vec::new()),
            repaired => repaired,
        };
    }
    #[cfg(not(feature = "file"))]
    let _ = (now, use_previous);
    Err(ProjectError::input(format!("the {} backend has no repair; restore a backup", settings.backend.value)))
}
