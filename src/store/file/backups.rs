//! Copies of the document that others left beside it: the move's `run_state.json.bak`, and Seeknal's `run_state.json.bak.<run id>`.

use std::path::{Path, PathBuf};

use super::{document, paths};
use crate::store::{StoreError, StoreErrorKind};

/// More than this are not tried: whoever has so many that cannot be read looks for himself.
const TRIED: usize = 16;

/// What is wrong with a state, and where its document cannot be read: which copy can. Reading copies takes its time: asked once, for who is told.
pub(super) fn named(error: StoreError, document: &Path) -> StoreError {
    let is_read = || paths::read(document).is_ok_and(|read| read.is_none_or(|(bytes, _)| has_something(document, &bytes)));
    if error.kind() != StoreErrorKind::Corrupt || is_read() {
        return error;
    }
    match newest(document) {
        Some(copy) => error.and(format_args!(" ({} is the newest copy that can be read)", copy.display())),
        None => error,
    }
}

fn has_something(path: &Path, bytes: &[u8]) -> bool {
    document::read(path, bytes, 0).is_ok_and(|document| document.is_ours || document.ledger.runs().next().is_some())
}

/// The newest copy that can be read, and has something in it.
pub(super) fn newest(document: &Path) -> Option<PathBuf> {
    let name = document.file_name()?.to_str()?;
    let is_copy = |other: &str| {
        other
            .strip_prefix(name)
            .and_then(|end| end.strip_prefix(".bak"))
            .is_some_and(|end| end.is_empty() || end.starts_with('.'))
    };
    let entries = std::fs::read_dir(paths::folder_of(document)).ok()?;
    // What cannot be looked at is not named.
    let mut copies: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(is_copy))
        .filter_map(|entry| Some((std::fs::metadata(entry.path()).ok()?.modified().ok()?, entry.path())))
        .collect();
    copies.sort_unstable_by(|a, b| b.cmp(a));
    let is_read = |path: &PathBuf| {
        let read = paths::read(path).ok().flatten();
        read.is_some_and(|(bytes, _)| has_something(path, &bytes))
    };
    copies.into_iter().map(|(_, path)| path).take(TRIED).find(is_read)
}
