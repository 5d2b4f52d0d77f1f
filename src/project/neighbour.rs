//! The other backend in the state's folder. Where the settings go back to a place without a move (the way back that a move prints) nothing else tells how far
//! fencing tokens were given out meanwhile.

use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use super::files::{DATABASE, DOCUMENT, NUMBERS, with_suffix};
use super::{ProjectError, Settings};
use crate::store::StateBackend;

/// The files that say how far numbers were given out: of the one that the settings name, and of the one beside it. `None`: a server, or a backend of somebody's own.
fn numbers(settings: &Settings) -> Option<(PathBuf, PathBuf)> {
    let folder = &settings.target.value;
    let database = folder.join(DATABASE);
    // It lies where a symbolic link leads.
    let database = with_suffix(&std::fs::canonicalize(&database).unwrap_or(database), NUMBERS);
    let file = with_suffix(&folder.join(DOCUMENT), NUMBERS);
    match (&*settings.backend.value, &settings.database_url) {
        ("file", _) => Some((file, database)),
        ("database", None) => Some((database, file)),
        _ => None,
    }
}

#[cfg(any(feature = "file", feature = "sqlite"))]
fn given(numbers: &Path, now: DateTime<Utc>) -> Option<u64> {
    crate::store::tokens_given(numbers, now)
}

#[cfg(not(any(feature = "file", feature = "sqlite")))]
fn given(_: &Path, _: DateTime<Utc>) -> Option<u64> {
    None
}

/// Sees to it that fencing tokens go on behind those that the other backend of the folder gave out. For a state that was opened for writing just now, before
/// anybody asks it for a lock.
pub(super) async fn pass_tokens(settings: &Settings, backend: &dyn StateBackend, now: DateTime<Utc>) -> Result<(), ProjectError> {
    let Some((own, other)) = numbers(settings) else { return Ok(()) };
    let Some(beyond) = given(&other, now) else { return Ok(()) };
    // What the own file says is passed already.
    if given(&own, now).unwrap_or(0) < beyond {
        backend.raise_tokens(beyond).await?;
    }
    Ok(())
}
