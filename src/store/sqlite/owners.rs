//! Who has the database open: every opening holds an operating system's lock on a small file of its own, so that a dead one is known at once.
//!
//! A process that was stopped (SIGSTOP) still holds its lock, and is rightly not taken for dead.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::DateTime;
use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use super::boot;
use super::error::sql_error;
use crate::model::ProcessInfo;
use crate::store::access::Access;
use crate::store::{OpenProcess, StoreError, plain};

/// What an opening's file says.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    process: ProcessInfo,
    boot_id: String,
    /// Which file this was written into: a copy of it proves nothing.
    #[serde(default)]
    file: Option<(u64, u64)>,
}

/// The folder of the openings of a database.
pub(super) fn folder(db: &Path) -> PathBuf {
    let mut name = db.as_os_str().to_owned();
    name.push(".owners");
    PathBuf::from(name)
}

/// Makes the folder for those who have the database.
fn make_folder(folder: &Path, db: &Path) -> std::io::Result<()> {
    match std::fs::create_dir(folder) {
        Ok(()) => match std::fs::metadata(db) {
            Ok(db) => Access::of(&db).give_folder(folder),
            Err(_) => Ok(()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// This opening's file; locked as long as this lives, and removed at the end.
#[derive(Debug)]
pub(super) struct Owner {
    id: Arc<str>,
    path: PathBuf,
    file: File,
    is_left: bool,
}

impl Owner {
    /// Makes and locks the file of this opening.
    pub(super) fn register(db: &Path, process: &ProcessInfo) -> Result<Self, StoreError> {
        let folder = folder(db);
        make_folder(&folder, db).map_err(|error| StoreError::io(folder.display(), error))?;
        let fresh = folder.join(format!("{}.new", process.id));
        let path = folder.join(format!("{}.lock", process.id));
        let fail = |error| StoreError::io(fresh.display(), error);
        let mut file = File::options().read(true).write(true).create_new(true).open(&fresh).map_err(fail)?;
        // Locked and written under a name that nobody looks at: whoever sees the final name sees a locked, whole file.
        let named = file.lock().and_then(|()| {
            let written = Written { process: process.clone(), boot_id: boot::boot_id().to_owned(), file: identity(&file) };
            file.write_all(serde_json::to_string(&written)?.as_bytes())?;
            std::fs::rename(&fresh, &path)
        });
        if let Err(error) = named {
            let _left_behind = std::fs::remove_file(&fresh).is_err();
            return Err(fail(error));
        }
        Ok(Self { id: Arc::clone(&process.id), path, file, is_left: false })
    }

    /// Leaves the file where a lease of this opening could not be given back (a full disk): it proves that nobody holds that any more. The next opening sweeps
    /// both.
    pub(super) fn leave_behind(&mut self, conn: &Connection) {
        let held = "SELECT EXISTS (SELECT 1 FROM locks WHERE owner_process = ?1)";
        self.is_left = conn.query_row(held, [&*self.id], |row| row.get(0)).unwrap_or(false);
    }

    /// The identity of the opening.
    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // A file that stays is swept by the next opening: it can be locked then.
        let _left_behind = self.is_left || std::fs::remove_file(&self.path).is_err();
        let _still_locked = self.file.unlock().is_err();
    }
}

/// Which file is open, so that a copy can be told from it.
#[cfg(unix)]
fn identity(file: &File) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    file.metadata().ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(not(unix))]
fn identity(_: &File) -> Option<(u64, u64)> {
    None
}

/// Whether the file is the one that its opening would have, by its name.
fn is_named(path: &Path, written: &Written) -> bool {
    path.file_stem() == Some(OsStr::new(&*written.process.id))
}

/// Whether the file was written where it lies, since the machine was started: then nobody's lock on it proves that its process has ended.
fn is_of_now(file: &File, written: &Written) -> bool {
    boot::is_known() && written.boot_id == boot::boot_id() && written.file.is_some() && written.file == identity(file)
}

/// Whether the file was written where it lies, by this host, before the machine was started last: nothing of that time lives. Devices may be
/// numbered anew by then.
fn is_of_before(file: &File, written: &Written) -> bool {
    let inode = |identity: Option<(u64, u64)>| identity.map(|(_, inode)| inode);
    boot::is_known()
        && written.boot_id != boot::boot_id()
        && boot::is_real(&written.boot_id)
        && *written.process.host == *rustix::system::uname().nodename().to_string_lossy()
        && written.file.is_some()
        && inode(written.file) == inode(identity(file))
}

fn open(path: &Path) -> Option<(File, Written)> {
    let mut file = plain::open(path).ok()?;
    let mut text = String::new();
    (&mut file).take(64 * 1024).read_to_string(&mut text).ok()?;
    let written = serde_json::from_str(&text).ok()?;
    Some((file, written))
}

/// All openings that left a file, with whether they live. A copy of a file proves nothing, and neither does one of another machine.
pub(super) fn list(db: &Path, own: Option<&ProcessInfo>) -> Result<Vec<OpenProcess>, StoreError> {
    let folder = folder(db);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io(folder.display(), error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| StoreError::io(folder.display(), error))?.path();
        if path.extension() != Some(OsStr::new("lock")) {
            continue;
        }
        let Some((file, written)) = open(&path) else {
            // Gone while we looked, it belongs to somebody who left. Otherwise nothing is known of its owner but that he may live.
            if let Some(id) = path.file_stem().and_then(OsStr::to_str).filter(|_| path.exists()) {
                let mut process = ProcessInfo::current(DateTime::UNIX_EPOCH);
                (process.id, process.host, process.pid) = (id.into(), "unknown".into(), 0);
                found.push(OpenProcess::new(process, None));
            }
            continue;
        };
        let alive = if own.is_some_and(|own| own.id == written.process.id) {
            Some(true)
        } else {
            // Shared, so that two who ask at once do not take each other for the owner.
            match file.try_lock_shared() {
                Err(TryLockError::WouldBlock) => Some(true),
                Err(TryLockError::Error(_)) => None,
                Ok(()) => {
                    (is_named(&path, &written) && (is_of_now(&file, &written) || is_of_before(&file, &written))).then_some(false)
                }
            }
        };
        found.push(OpenProcess::new(written.process, alive));
    }
    found.sort_by(|a, b| (a.process.started_at, &a.process.id).cmp(&(b.process.started_at, &b.process.id)));
    Ok(found)
}

/// How many openings left a file, living or dead: a hint for who only wants to know whether they are many.
pub(super) fn count(db: &Path) -> usize {
    let is_opening = |entry: &std::fs::DirEntry| Path::new(&entry.file_name()).extension() == Some(OsStr::new("lock"));
    std::fs::read_dir(folder(db)).map_or(0, |entries| entries.flatten().filter(is_opening).count())
}

/// Removes what dead openings left: their locks first, because without the file nobody could tell any more that they are dead.
pub(super) fn sweep(conn: &Connection, db: &Path, own: &ProcessInfo) -> Result<(), StoreError> {
    let fail = |error| sql_error("table locks", error);
    let all = list(db, Some(own))?;
    let alone = all.iter().all(|opening| opening.process.id == own.id || opening.alive == Some(false));
    let noted = "SELECT EXISTS (SELECT 1 FROM change_sets)";
    if alone && conn.query_row(noted, [], |row| row.get::<_, bool>(0)).map_err(fail)? {
        // Nobody is left to find them. Both in one: what is not complete must not say that it is.
        let forgotten = conn.execute_batch(
            "BEGIN IMMEDIATE; DELETE FROM change_sets; \
             UPDATE runs SET change_sets_from = NULL WHERE change_sets_from IS NOT NULL; COMMIT",
        );
        if forgotten.is_err() && !conn.is_autocommit() {
            conn.execute_batch("ROLLBACK").map_err(fail)?;
        }
        forgotten.map_err(fail)?;
    }
    for dead in all.into_iter().filter(|opening| opening.alive == Some(false)) {
        conn.execute("DELETE FROM locks WHERE owner_process = ?1", [&*dead.process.id]).map_err(fail)?;
        let Some(path) = file(db, &dead.process.id) else { continue };
        let _left_behind = std::fs::remove_file(path).is_err();
    }
    for unfinished in unfinished(db) {
        let _left_behind = std::fs::remove_file(unfinished).is_err();
    }
    Ok(())
}

/// Files of openings that ended before theirs had its name. One that is being made at this moment is younger than that.
fn unfinished(db: &Path) -> Vec<PathBuf> {
    const MADE_LONG_AGO: Duration = Duration::from_secs(60);
    let entries = std::fs::read_dir(folder(db)).into_iter().flatten().filter_map(Result::ok);
    let is_old = |path: &Path| {
        let modified = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file).and_then(|file| file.modified().ok());
        modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > MADE_LONG_AGO)
    };
    entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "new") && is_old(path)).collect()
}

/// The file of an opening; `None` for an id that is none.
fn file(db: &Path, process: &str) -> Option<PathBuf> {
    let plain = !process.is_empty() && process.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    plain.then(|| folder(db).join(format!("{process}.lock")))
}

/// Which openings are proven dead. What was found is remembered: one of these serves one transaction.
///
/// Proof is the opening's own file, written on this start of the machine, not copied since, and with nobody's lock on it: the system takes the lock
/// away when a process ends, however it ends, and not before. A file that is not there proves nothing, and a stopped process is not dead.
#[derive(Debug)]
pub(super) struct Deaths<'a> {
    db: &'a Path,
    own: Option<&'a str>,
    found: RefCell<HashMap<String, bool>>,
}

impl<'a> Deaths<'a> {
    pub(super) fn new(db: &'a Path, own: Option<&'a str>) -> Self {
        Self { db, own, found: RefCell::default() }
    }

    /// Whether an opening is proven dead.
    pub(super) fn proven(&self, process: &str) -> bool {
        if self.own == Some(process) {
            return false;
        }
        if let Some(found) = self.found.borrow().get(process) {
            return *found;
        }
        let dead = self.look(process).is_some();
        self.found.borrow_mut().insert(process.to_owned(), dead);
        dead
    }

    fn look(&self, process: &str) -> Option<()> {
        let (file, written) = open(&file(self.db, process)?)?;
        (&*written.process.id == process && is_of_now(&file, &written) && file.try_lock_shared().is_ok()).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Clock, SystemClock};

    /// Who lives first: files of one name have no order of their own.
    fn alive(db: &Path) -> Vec<Option<bool>> {
        let mut alive: Vec<_> = list(db, None).unwrap().into_iter().map(|open| open.alive).collect();
        alive.sort_unstable_by(|a, b| b.cmp(a));
        alive
    }

    #[test]
    fn only_a_file_that_was_written_where_it_lies_proves_a_death() {
        let folder_of_db = tempfile::tempdir().unwrap();
        let db = folder_of_db.path().join("state.db");
        let process = ProcessInfo::current(SystemClock.now());
        let owner = Owner::register(&db, &process).unwrap();
        let path = owner.path.clone();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(alive(&db), [Some(true)]);
        // A copy beside it, under a name that is no opening's.
        std::fs::copy(&path, folder(&db).join("copy.lock")).unwrap();
        assert_eq!(alive(&db), [Some(true), None]);
        std::fs::remove_file(folder(&db).join("copy.lock")).unwrap();
        // The process ends without a word.
        owner.file.unlock().unwrap();
        assert_eq!(alive(&db), [Some(false)]);
        // The folder as a backup brings it back: other files of the same names.
        let aside = folder_of_db.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        std::fs::write(&path, &text).unwrap();
        assert_eq!(alive(&db), [None]);
        std::fs::rename(&aside, &path).unwrap();
        // Before the machine was started last, by this host or by another one.
        let rewritten = |from: &str, to: &str| std::fs::write(&path, text.replace(from, to)).unwrap();
        rewritten(boot::boot_id(), "another-boot");
        assert_eq!(alive(&db), [Some(false)]);
        let other = text.replace(boot::boot_id(), "another-boot").replace(&*process.host, "another-host");
        std::fs::write(&path, other).unwrap();
        assert_eq!(alive(&db), [None]);
        rewritten(boot::boot_id(), UNKNOWN_BOOT);
        assert_eq!(alive(&db), [None]);
    }

    const UNKNOWN_BOOT: &str = "unknown";
}
