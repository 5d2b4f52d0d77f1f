//! Copies of the document that others left beside it: the move's `run_state.json.bak`, and Seeknal's `run_state.json.bak.<run id>`.

use std::path::{Path, PathBuf};

use super::{document, paths};

/// More than this are not tried: whoever has so many that cannot be read looks for himself.
const TRIED: usize = 16;

/// The newest copy that can be read.
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
        read.is_some_and(|(bytes, _)| document::read(path, &bytes, 0).is_ok())
    };
    copies.into_iter().map(|(_, path)| path).take(TRIED).find(is_read)
}
