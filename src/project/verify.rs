//! Checking a project's storage, and repairing what can be repaired.

use chrono::{DateTime, Utc};

use super::{ProjectError, Settings};
use crate::store::VerifyReport;

/// Checks the project's storage from end to end; only reads, also beside a live writer. `None` if there is no state yet.
///
/// # Errors
/// Damage so bad that the state does not open, or whatever reading meets. What can be listed is in the report instead.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn verify(settings: &Settings) -> Result<Option<VerifyReport>, ProjectError> {
    let (backend, opened) = match settings.open_backend(true).await {
        Ok(opened) => opened,
        Err(error) if error.is_no_state() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut report = backend.verify().await?;
    report.checked.extend(opened.notices);
    backend.close().await?;
    Ok(Some(report))
}

/// Repairs what can be repaired, keeping a copy of what was damaged, and says what it did. Nothing is done where nothing is wrong.
///
/// # Errors
/// [`ProjectErrorKind::Input`](super::ProjectErrorKind::Input) if the backend has no repair.
///
/// # Cancel safety
/// Not to be dropped half-way: started again, it goes on.
pub async fn repair(settings: &Settings, now: DateTime<Utc>) -> Result<Vec<String>, ProjectError> {
    let _unused = now;
    match settings.backend.value.as_str() {
        other => Err(ProjectError::input(format!("the {other} backend has no repair; restore a backup"))),
    }
}
