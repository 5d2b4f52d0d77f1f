//! Space for the next journal, zeroed and synced before it is needed: a journal that grows in mid-flight holds up everybody.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use super::journal::zero;
use super::paths::{PIECE, folder_of};
use crate::store::access::PRIVATE;

/// A journal that did not become this long makes its successor no space.
const FROM: u64 = 4 << 20;
/// More than this is not kept ready.
const LARGEST: u64 = 64 << 20;

/// A file of synced zeros. It is removed as this is dropped, unless it has another name by then.
#[derive(Debug)]
pub(super) struct Spare {
    path: PathBuf,
}

impl Spare {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn make(path: PathBuf, length: u64) -> Option<Self> {
        let made = OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(&path).and_then(|file| {
            let (length, piece) = (length.min(LARGEST), PIECE as u64);
            for start in (0..length).step_by(PIECE) {
                zero(&file, start, length.min(start + piece))?;
                file.sync_data()?;
            }
            file.sync_all()
        });
        let spare = Self { path };
        made.is_ok().then_some(spare)
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // What stays in spite of this is swept at the next opening.
        let _used_or_swept = std::fs::remove_file(&self.path);
    }
}

/// Whether the disk has twice as much space as this: the rest of it belongs to journal and document.
fn has_room(path: &Path, bytes: u64) -> bool {
    let free = rustix::fs::statvfs(folder_of(path)).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    free / 2 > bytes
}

/// Spare space in the making, on a thread of its own.
#[derive(Debug)]
pub(super) struct SpareJob {
    thread: Option<JoinHandle<Option<Spare>>>,
}

impl SpareJob {
    /// Begins to make space as long as the last journal became, if that is worth it, and if the disk has far more than that and the next document
    /// of so many bytes. Where there is no room for it nothing is lost but time.
    pub(super) fn spawn(path: PathBuf, length: u64, document: u64) -> Option<Self> {
        if length < FROM || !has_room(&path, length.min(LARGEST).saturating_add(document)) {
            return None;
        }
        let thread = std::thread::Builder::new().name("seeknal-spare".to_owned()).spawn(move || Spare::make(path, length));
        thread.ok().map(|thread| Self { thread: Some(thread) })
    }

    /// Whether taking it takes no time.
    pub(super) fn is_ready(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// The space, if there was room for it.
    pub(super) fn take(mut self) -> Option<Spare> {
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for SpareJob {
    fn drop(&mut self) {
        // Whoever gives up the lock leaves nothing in the making behind.
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn no_space_is_kept_ready_where_the_document_may_need_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spare");
        assert!(SpareJob::spawn(path.clone(), FROM - 1, 0).is_none());
        assert!(SpareJob::spawn(path.clone(), FROM, 1 << 60).is_none());
        let spare = SpareJob::spawn(path.clone(), FROM, 1).and_then(SpareJob::take).unwrap();
        let made = std::fs::metadata(spare.path()).unwrap();
        assert_eq!(
            (made.len(), made.permissions().mode() & 0o777),
            (FROM, PRIVATE),
            "it becomes the journal of a state that may be private"
        );
        drop(spare);
        assert!(!path.exists());
    }
}
