//! Who has the database open: every opening holds an operating system's lock on a small file of its own, so that a dead one is known at once.
//!
//! A process that was stopped (SIGSTOP) still holds its lock, and is rightly not taken for dead.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::boot;
use crate::model::ProcessInfo;
use crate::store::{OpenProcess, StoreError};

/// What an opening's file says.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    process: ProcessInfo,
    boot_id: String,
}

/// The folder of the openings of a database.
pub(super) fn folder(db: &Path) -> PathBuf {
    let mut name = db.as_os_str().to_owned();
    name.push(".owners");
    PathBuf::from(name)
}

/// This opening's file; locked as long as this lives, and removed at the end.
#[derive(Debug)]
pub(super) struct Owner {
    path: PathBuf,
    file: File,
}

impl Owner {
    /// Makes and locks the file of this opening.
    pub(super) fn register(db: &Path, process: &ProcessInfo) -> Result<Self, StoreError> {
        let folder = folder(db);
        std::fs::create_dir_all(&folder).map_err(|error| StoreError::io(folder.display(), error))?;
        let fresh = folder.join(format!("{}.new", process.id));
        let path = folder.join(format!("{}.lock", process.id));
        let fail = |error| StoreError::io(fresh.display(), error);
        let mut file = File::options().read(true).write(true).create_new(true).open(&fresh).map_err(fail)?;
        // Locked and written under a name that nobody looks at: whoever sees the final name sees a locked, whole file.
        let named = file.lock().and_then(|()| {
            let written = Written { process: process.clone(), boot_id: boot::boot_id().to_owned() };
            file.write_all(serde_json::to_string(&written)?.as_bytes())?;
            std::fs::rename(&fresh, &path)
        });
        if let Err(error) = named {
            let _left_behind = std::fs::remove_file(&fresh).is_err();
            return Err(fail(error));
        }
        Ok(Self { path, file })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // A file that stays is swept by the next opening: it can be locked then.
        let _left_behind = std::fs::remove_file(&self.path).is_err();
        let _still_locked = self.file.unlock().is_err();
    }
}

/// All openings that left a file, with whether they live; files of dead ones are removed if `sweep` says so.
pub(super) fn list(db: &Path, own: Option<&ProcessInfo>, sweep: bool) -> Result<Vec<OpenProcess>, StoreError> {
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
        // A file that vanishes or cannot be read while we look belongs to somebody who is just leaving.
        let Ok(mut file) = File::open(&path) else { continue };
        let mut text = String::new();
        if (&mut file).take(64 * 1024).read_to_string(&mut text).is_err() {
            continue;
        }
        let Ok(written) = serde_json::from_str::<Written>(&text) else { continue };
        let alive = if own.is_some_and(|own| own.id == written.process.id) {
            Some(true)
        } else {
            // Shared, so that two who ask at once do not take each other for the owner.
            match file.try_lock_shared() {
                Err(TryLockError::WouldBlock) => Some(true),
                Err(TryLockError::Error(_)) => None,
                Ok(()) => {
                    let here = written.boot_id == boot::boot_id() || own.is_some_and(|own| own.host == written.process.host);
                    if here && sweep {
                        let _left_behind = std::fs::remove_file(&path).is_err();
                    }
                    here.then_some(false)
                }
            }
        };
        found.push(OpenProcess::new(written.process, alive));
    }
    found.sort_by(|a, b| (a.process.started_at, &a.process.id).cmp(&(b.process.started_at, &b.process.id)));
    Ok(found)
}
