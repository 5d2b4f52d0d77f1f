//! Where the database is, and whether that is still the file that was opened.

use std::path::{Path, PathBuf};
use std::sync::{OnceLock, PoisonError, RwLock};

use super::open::beside;
use crate::store::{StoreError, StoreErrorKind, folder};

/// The path of a database. Which file it names is noted when it is opened, and asked again before each use.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    /// How it was named, which may be a link to it.
    given: PathBuf,
    /// The path for messages.
    pub(super) name: String,
    opened: OnceLock<Option<(u64, u64)>>,
    /// The WAL and its index, while an opening writes.
    beside: RwLock<Vec<(PathBuf, (u64, u64))>>,
}

impl Place {
    pub(super) fn new(given: &Path) -> Self {
        let path = real(given);
        let name = path.display().to_string();
        Self { path, given: given.to_owned(), name, opened: OnceLock::new(), beside: RwLock::default() }
    }

    /// Refuses a link that leads nowhere.
    pub(super) fn refuse_nowhere(&self) -> Result<(), StoreError> {
        folder::refuse_nowhere(&self.given)
    }

    /// Notes which file the path names now.
    pub(super) fn opened(&self) {
        self.opened.get_or_init(|| identity(&self.path));
    }

    /// Notes which files lie beside the database now. SQLite makes them when a connection reads for the first time, and removes them under a lock that only the
    /// last connection gets: they stay the same as long as one of them is open, whoever else comes and goes. So they are noted by who keeps one, anew each time.
    pub(super) fn opened_beside(&self) {
        let there = ["-wal", "-shm"].into_iter().filter_map(|suffix| {
            let path = beside(&self.path, suffix);
            identity(&path).map(|identity| (path, identity))
        });
        *self.beside.write().unwrap_or_else(PoisonError::into_inner) = there.collect();
    }

    /// Names a file system that was made read-only meanwhile: SQLite only says that a write failed.
    #[cfg(unix)]
    pub(super) fn blame(&self, error: StoreError) -> StoreError {
        let refused = || rustix::fs::access(&self.path, rustix::fs::Access::WRITE_OK) == Err(rustix::io::Errno::ROFS);
        if error.kind() != StoreErrorKind::Io || !refused() {
            return error;
        }
        let named = format!("{}: the file system is mounted read-only; mount it for writing: {error}", self.name);
        if error.is_unknown_outcome() {
            StoreError::unknown(StoreErrorKind::ReadOnly, named)
        } else {
            StoreError::not_applied(StoreErrorKind::ReadOnly, named)
        }
    }

    #[cfg(not(unix))]
    pub(super) fn blame(&self, error: StoreError) -> StoreError {
        error
    }

    /// Refuses to go on with a file that was renamed, removed or replaced: what is written there is written to nobody, and what is read there is not
    /// what others see.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        if let Some(Some(opened)) = self.opened.get()
            && identity(&self.path) != Some(*opened)
        {
            return Err(StoreError::not_applied(
                StoreErrorKind::Poisoned,
                format!("{} was renamed, removed or replaced while it was open; put it back or open the state anew", self.name),
            ));
        }
        let beside = self.beside.read().unwrap_or_else(PoisonError::into_inner);
        match beside.iter().find(|(path, opened)| identity(path) != Some(*opened)) {
            Some((path, _)) => Err(StoreError::not_applied(
                StoreErrorKind::Poisoned,
                format!(
                    "{} was renamed, removed or replaced while {} was open: what was committed last may be in no file that can be found; put it back, \
                     or close the state, which brings that into the database, and open it anew",
                    path.display(),
                    self.name
                ),
            )),
            None => Ok(()),
        }
    }
}

/// Where a database really lies. SQLite keeps what belongs to it there, and whatever is made, looked for or locked beside it must be beside that.
pub(super) fn real(db: &Path) -> PathBuf {
    folder::real(db)
}

/// Which file a path names now; never opens it.
#[cfg(unix)]
fn identity(db: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(db).ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(not(unix))]
fn identity(_: &Path) -> Option<(u64, u64)> {
    None
}
