//! One document that several paths lead to: a writer keeps its journal beside the path by which it opened it. What it acknowledged is not passed over by who
//! comes by another one.
//!
//! Where it may lie tells the lock beside the real document, which every one of them takes: the folder beside it, or the one that the lock names.

use std::path::{Path, PathBuf};

use super::journal::Stored;
use super::lock::{self, Seen};
use super::paths::{Paths, folder_of};
use super::recover;
use crate::store::highwater::HighWater;
use crate::store::{StoreError, StoreErrorKind};

/// What lies beside other paths, and holds nothing that is not in the document.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// Whether the journal of who had the document last is among it.
    pub(super) has_holders: bool,
    /// Journals that are done with.
    pub(super) spent: Vec<PathBuf>,
}

/// What the lock beside the real document is to name: the folder of a writer whose files lie elsewhere.
pub(super) fn folder(paths: &Paths) -> Option<String> {
    paths.lock_behind_link()?;
    // A name that is no text cannot be written down: then it is told that a journal is missing, but not where it lies.
    std::fs::canonicalize(&paths.base).ok()?.to_str().map(str::to_owned)
}

/// Fails if a writer that had the document open by another path, and is gone, left records in a journal there. `value` is what the lock beside the real
/// document says.
pub(super) fn refuse(paths: &Paths, value: &HighWater) -> Result<Elsewhere, StoreError> {
    let mut found = Elsewhere::default();
    let who = value.holder.as_ref().map_or_else(|| "somebody".to_owned(), ToString::to_string);
    for other in others(paths, value) {
        let holds = |what: String| {
            StoreError::not_applied(
                StoreErrorKind::Corrupt,
                format!(
                    "{}: {who} had it open by another path that leads to it and did not close it, and {} {what}; nothing was changed. Open it there for \
                     writing once, which brings them into the document, or sets them aside where that is another one by now; or rename that journal to go \
                     on without it",
                    paths.document.display(),
                    other.journal.display()
                ),
            )
        };
        match recover::read(&other, value.seq) {
            Ok(state) => {
                let set_aside: usize = state.strangers.iter().map(|(_, records)| *records).sum();
                // One without a whole record is a torn one, which was never acknowledged, unless it is damaged.
                let is_damaged = |(journal, _): &(PathBuf, usize)| {
                    Stored::read(journal).is_ok_and(|stored| stored.is_some_and(|stored| stored.content().is_damaged))
                };
                if state.replayed + set_aside > 0 || state.strangers.iter().any(is_damaged) {
                    return Err(holds(format!("holds {} record(s) that are not in it", state.replayed + set_aside)));
                }
                let theirs = value.through.as_deref().map_or_else(|| folder_of(&paths.place()).to_owned(), PathBuf::from);
                found.has_holders |= value.holder.is_some() && is_here(&other, &theirs);
                found.spent.extend(state.spent);
            }
            Err(error) if error.kind() == StoreErrorKind::Corrupt => {
                return Err(holds(format!("holds records that cannot be joined with it ({error})")));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// What who only reads does not see here, because it lies beside another path that leads to the document. `here` is what was seen of the lock beside that path.
pub(super) fn unseen(paths: &Paths, here: &Seen) -> Result<Option<Unseen>, StoreError> {
    let behind_link = paths.lock_behind_link();
    let there = match &behind_link {
        // Whoever has the lock here writes here.
        Some(_) if here.held => return Ok(None),
        Some(path) => Some(lock::look(path)?),
        None => None,
    };
    let seen = there.as_ref().unwrap_or(here);
    if !seen.held {
        return Ok(refuse(paths, &seen.value).err().map(|error| Unseen::Left(error.to_string())));
    }
    let writes_here = match &seen.value.through {
        Some(folder) => is_here(paths, Path::new(folder)),
        None => behind_link.is_none(),
    };
    if writes_here {
        return Ok(None);
    }
    let who = seen.value.who().map_or_else(|| "another process".to_owned(), ToString::to_string);
    Ok(Some(Unseen::Live(format!(
        "{} is open for writing by {who}, by another path that leads to it: what is not in the document yet is seen there alone",
        paths.document.display()
    ))))
}

/// What is not seen.
#[derive(Debug)]
pub(super) enum Unseen {
    /// Somebody writes there, and it comes with the next document.
    Live(String),
    /// Nobody does.
    Left(String),
}

/// The states beside other paths that have a journal, and lead to the same document.
fn others(paths: &Paths, value: &HighWater) -> Vec<Paths> {
    let place = paths.place();
    let beside = (place != paths.document).then(|| folder_of(&place).to_owned());
    let named = value.through.as_deref().filter(|_| value.holder.is_some()).map(PathBuf::from);
    let folders = beside.into_iter().chain(named).filter(|folder| !is_here(paths, folder));
    let has_journal = |other: &Paths| other.journal.exists() || other.next.exists();
    let others = folders.map(|folder| Paths::new(&folder)).filter(has_journal);
    others.filter(|other| is_same(&other.place(), &place)).collect()
}

fn is_here(paths: &Paths, folder: &Path) -> bool {
    std::fs::canonicalize(&paths.base).is_ok_and(|base| std::fs::canonicalize(folder).is_ok_and(|folder| folder == base))
}

/// Whether two names are one, also where no file has it.
fn is_same(one: &Path, other: &Path) -> bool {
    let whole = |path: &Path| Some(std::fs::canonicalize(folder_of(path)).ok()?.join(path.file_name()?));
    whole(one).is_some_and(|one| whole(other) == Some(one))
}
