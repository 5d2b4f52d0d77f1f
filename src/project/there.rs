//! Whether a state's files are there at all. "Not there" is said only where the system says so: what it refuses to look at may well be there.

use std::io::ErrorKind;
use std::path::Path;
#[cfg(feature = "cli")]
use std::path::PathBuf;

#[cfg(feature = "cli")]
use super::Source;
use super::files::{DATABASE, DOCUMENT, with_suffix};
#[cfg(feature = "cli")]
use super::shown::shell;
use super::{ProjectError, ProjectErrorKind, Settings};
use crate::store::folder::NOWHERE;
use crate::store::{StoreError, StoreErrorKind};

/// What the file backend keeps beside its document, and what shows a state that has no document yet, or lost it.
const BESIDE_DOCUMENT: &[&str] = &[".journal", ".journal.next", ".lock", ".prev"];

/// The map of the oldest runner.
const BARE: &str = "state/execution_state.json";

fn refuse(path: &Path, why: &str) -> ProjectError {
    ProjectError::new(ProjectErrorKind::Failed, format!("{}: {why}", path.display()))
}

/// Whether there is a name, wherever it leads.
fn is_named(path: &Path) -> Result<bool, ProjectError> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(ProjectError::io(path, error)),
    }
}

/// Whether there is something. A link that leads nowhere is an error: what it led to may be on a disk that is not mounted.
fn is_there(path: &Path) -> Result<bool, ProjectError> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(ProjectError::io(path, error)),
        Err(_) if is_named(path)? => Err(refuse(path, NOWHERE)),
        Err(_) => Ok(false),
    }
}

/// Whether the folder is there. What stands in its place, or in the place of one above it, is an error.
fn is_folder(folder: &Path) -> Result<bool, ProjectError> {
    let named = folder.ancestors().filter(|path| !path.as_os_str().is_empty());
    for (above, path) in named.enumerate() {
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => return Ok(above == 0),
            Ok(_) => {
                return Err(refuse(
                    path,
                    "it is no folder, but the state's folder should be there; move it aside, or name another folder (`target_path`)",
                ));
            }
            // What is in the way is told when it is its turn.
            Err(error) if error.kind() == ErrorKind::NotADirectory => {}
            Err(_) => {
                is_there(path)?;
            }
        }
    }
    Ok(false)
}

/// Whether the file backend has a state in this folder.
pub(super) fn file_state(folder: &Path) -> Result<bool, ProjectError> {
    if !is_folder(folder)? {
        return Ok(false);
    }
    let named = folder.join(DOCUMENT);
    for end in BESIDE_DOCUMENT {
        if is_named(&with_suffix(&named, end))? {
            return Ok(true);
        }
    }
    Ok(is_there(&named)? || is_there(&folder.join(BARE))?)
}

/// Whether `state.db` is in this folder.
pub(super) fn database_file(folder: &Path) -> Result<bool, ProjectError> {
    let database = folder.join(DATABASE);
    if !is_folder(folder)? || !is_there(&database)? {
        return Ok(false);
    }
    match std::fs::metadata(&database) {
        // An empty one that nobody can write would be taken for none.
        Ok(found) if !found.is_file() => {
            Err(refuse(&database, "it is no plain file, but the database should be there; move it aside"))
        }
        _ => Ok(true),
    }
}

impl Settings {
    /// Where the settings name a `state.db` that is not there, or has nothing in it: that there was one, as the file beside it tells.
    pub(super) fn lost(&self) -> Option<String> {
        let database = self.target.value.join(DATABASE);
        if self.backend.value != "database"
            || self.database_url.is_some()
            || std::fs::metadata(&database).is_ok_and(|found| found.len() > 0)
        {
            return None;
        }
        // Looked at once more: meanwhile somebody may have made it.
        #[cfg(feature = "sqlite")]
        return crate::store::sqlite::lost(&database)
            .filter(|_| !std::fs::metadata(&database).is_ok_and(|found| found.len() > 0));
        #[cfg(not(feature = "sqlite"))]
        None
    }
}

impl Settings {
    /// The same, as an error.
    pub(super) fn refuse_lost(&self) -> Result<(), ProjectError> {
        self.lost().map_or(Ok(()), |lost| Err(StoreError::not_applied(StoreErrorKind::Corrupt, lost).into()))
    }
}

#[cfg(feature = "cli")]
impl Settings {
    /// That the settings name a server, and the file all the same. The URL itself is not shown.
    pub(crate) fn unused_url(&self) -> Option<String> {
        let url = self.database_url.as_ref().filter(|_| self.backend.value == "file")?;
        let because = match &self.backend.source {
            Source::Default => "state_backend is file by default".to_owned(),
            source => format!("{source} says state_backend: file"),
        };
        Some(format!(
            "{}: database_url is not used, because {because}; to use it write `state_backend: database` (`seeknal migrate-state --backend database` also takes \
             the state there)",
            url.source
        ))
    }

    /// Where there is no state: what lies in the state's folder instead, and how it is used. Only a hint, so that what cannot be looked at is nothing.
    pub(crate) fn elsewhere(&self) -> Option<String> {
        let (document, database) = (self.target.value.join(DOCUMENT), self.target.value.join(DATABASE));
        let is_file = || file_state(&self.target.value).unwrap_or(false);
        let is_database = || std::fs::metadata(&database).is_ok_and(|found| found.len() > 0);
        let (place, mend) = match (self.backend.value.as_str(), &self.database_url) {
            ("file" | "memory", _) if is_database() => (&database, "state_backend: database?"),
            ("database", None) | ("memory", _) if is_file() => (&document, "state_backend: file?"),
            ("database", Some(_)) if is_database() => (&database, "`seeknal migrate-state --backend database --from sqlite`?"),
            ("database", Some(_)) if is_file() => (&document, "`seeknal migrate-state --backend database`?"),
            ("file", _) => {
                return self.is_in_target(DOCUMENT).or_else(|| copies(&document)).or_else(|| of_single_runs(&self.target.value));
            }
            ("database", None) => return self.is_in_target(DATABASE),
            _ => return None,
        };
        Some(format!("{} is there: {mend}", place.display()))
    }
}

#[cfg(feature = "cli")]
impl Settings {
    /// Where the folder that was given as the project's is the state's own: what to give instead.
    fn is_in_target(&self, name: &str) -> Option<String> {
        let folder = std::fs::canonicalize(&self.project).ok()?;
        let found = folder.join(name);
        if !std::fs::metadata(&found).is_ok_and(|found| found.is_file() && found.len() > 0) {
            return None;
        }
        let project = folder.parent().filter(|_| self.file.is_none() && folder.file_name() == self.target.value.file_name());
        Some(match project {
            Some(project) => format!("{} is there: --project-path {}?", found.display(), shell(project)),
            None => format!("{} is there: seeknal_state.target_path: .?", found.display()),
        })
    }

    /// That the settings name a backend in memory: whatever looks at it finds nothing.
    pub(crate) fn keeps_nothing(&self) -> Option<String> {
        if self.backend.value != "memory" {
            return None;
        }
        let hint = self.elsewhere().map(|hint| format!(" {hint}")).unwrap_or_default();
        Some(format!(
            "{} says state_backend: memory, which keeps nothing beyond the process that works with it: there is nothing to look at here.{hint}",
            self.backend.source
        ))
    }
}

/// The newest of so many paths: whose file changed last.
#[cfg(feature = "cli")]
fn newest(paths: Vec<PathBuf>) -> Option<PathBuf> {
    paths.into_iter().max_by_key(|path| std::fs::metadata(path).and_then(|found| found.modified()).ok())
}

#[cfg(feature = "cli")]
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path())
}

/// Where the document is gone, the copies of it that a move and Seeknal keep.
#[cfg(feature = "cli")]
fn copies(document: &Path) -> Option<String> {
    let backup = with_suffix(document, ".bak");
    let is_copy = |path: &PathBuf| {
        let (name, backup) = (path.as_os_str().as_encoded_bytes(), backup.as_os_str().as_encoded_bytes());
        name.strip_prefix(backup).is_some_and(|end| end.is_empty() || end.starts_with(b"."))
    };
    let newest = newest(entries(document.parent()?).filter(is_copy).collect())?;
    Some(format!("{} is there: copy it to {}?", newest.display(), document.display()))
}

/// Seeknal's own file backend keeps one document a run, each in a folder of its own; they are not read.
#[cfg(feature = "cli")]
fn of_single_runs(folder: &Path) -> Option<String> {
    const NAMED: usize = 3;
    let mut runs: Vec<PathBuf> = entries(folder).map(|run| run.join(DOCUMENT)).filter(|document| document.is_file()).collect();
    runs.sort_unstable();
    let names: Vec<_> = runs.iter().take(NAMED).map(|run| run.display().to_string()).collect();
    let more = if runs.len() > NAMED { format!(", and {} more", runs.len() - NAMED) } else { String::new() };
    let newest = newest(runs)?;
    Some(format!(
        "Documents of single runs are there, as Seeknal's own file backend keeps them, and are not read: {}{more}. To go on with one of them, copy it \
         ({} is the newest) to {}",
        names.join(", "),
        newest.display(),
        folder.join(DOCUMENT).display()
    ))
}
