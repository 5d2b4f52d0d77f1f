//! Where the files of one state lie, and the small file operations that they share.

use std::fs::{DirEntry, File, Metadata, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use crate::store::access::{Access, PRIVATE};
use crate::store::{StoreError, folder, plain};

/// The name of the document; every other name begins with it.
const DOCUMENT: &str = "run_state.json";

/// The files of one state.
#[derive(Debug, Clone)]
pub(super) struct Paths {
    /// The folder of all of them.
    pub(super) base: PathBuf,
    /// `run_state.json`.
    pub(super) document: PathBuf,
    /// The journal that continues the document.
    pub(super) journal: PathBuf,
    /// The journal that continues the document which is being written.
    pub(super) next: PathBuf,
    /// The lock, its holder, and how far numbers were given out.
    pub(super) lock: PathBuf,
    /// A copy of the last document of ours.
    pub(super) previous: PathBuf,
    /// The bare map of the oldest runner; only ever read.
    pub(super) bare: PathBuf,
}

impl Paths {
    pub(super) fn new(base: &Path) -> Self {
        let beside = |end: &str| base.join(format!("{DOCUMENT}{end}"));
        Self {
            base: base.to_owned(),
            document: beside(""),
            journal: beside(".journal"),
            next: beside(".journal.next"),
            lock: beside(".lock"),
            previous: beside(".prev"),
            bare: base.join("state").join("execution_state.json"),
        }
    }

    /// A name that is free, for a file that is set aside: `<file>.<why>-<UTC>`.
    pub(super) fn aside(file: &Path, why: &str, now: DateTime<Utc>) -> PathBuf {
        let stamp = now.format("%Y%m%dT%H%M%S%.6fZ");
        let mut name = file.as_os_str().to_owned();
        name.push(format!(".{why}-{stamp}"));
        let mut free = PathBuf::from(&name);
        let mut count = 1_u32;
        while free.symlink_metadata().is_ok() {
            let mut next = name.clone();
            next.push(format!("-{count}"));
            free = PathBuf::from(next);
            count = count.saturating_add(1);
        }
        free
    }

    /// A name for an unfinished document, in the same folder, that nobody else uses.
    pub(super) fn temporary(&self) -> PathBuf {
        temporary(&self.document)
    }

    /// Where the document really lies: where its symbolic link leads, if it is one.
    pub(super) fn place(&self) -> PathBuf {
        if let Ok(place) = std::fs::canonicalize(&self.document) {
            let is_link = self.document.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
            return if is_link { place } else { self.document.clone() };
        }
        // A link to a file that is not there yet.
        std::fs::read_link(&self.document).map_or_else(|_| self.document.clone(), |target| self.base.join(target))
    }

    /// The lock of whoever opens the document where its symbolic link leads; `None` if it is none.
    pub(super) fn lock_behind_link(&self) -> Option<PathBuf> {
        let place = self.place();
        let mut name = place.as_os_str().to_owned();
        name.push(".lock");
        (place != self.document).then(|| PathBuf::from(name))
    }

    /// Who may read and write the document that is there; what is written of the same content gets the same. Where there is none its last copy says it, or the lock,
    /// which every writer makes first.
    pub(super) fn access(&self) -> Result<Option<Access>, StoreError> {
        for path in [&self.document, &self.previous, &self.lock] {
            match std::fs::metadata(path) {
                Ok(metadata) => return Ok(Some(Access::of(&metadata))),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::io(path.display(), error)),
            }
        }
        Ok(None)
    }

    /// Lets whoever may read the document read a new file beside it, and nobody else; and makes its name durable.
    pub(super) fn settle(&self, path: &Path, file: &File) -> Result<(), StoreError> {
        if let Some(access) = self.access()? {
            // Its owner writes it, also where nobody is to write the document by hand.
            access.with_owner().give(file).map_err(|error| StoreError::io(path.display(), error))?;
        }
        self.sync_folder()
    }

    /// Where unfinished documents may lie, and what their names begin with. Whoever holds the lock may sweep them: also behind a link the name says
    /// whose they are, because others may have theirs in the same folder.
    fn unfinished_places(&self) -> Vec<(PathBuf, String)> {
        let mut places = vec![self.document.clone()];
        places.extend(Some(self.place()).filter(|place| *place != self.document));
        places.iter().map(|place| (folder_of(place).to_owned(), unfinished_prefix(place))).collect()
    }

    /// Removes unfinished documents that a crash left behind; only for the holder of the lock. Says how many.
    pub(super) fn sweep(&self) -> Result<usize, StoreError> {
        let mut swept = 0;
        for (folder, prefix) in self.unfinished_places() {
            let fail = |error| StoreError::io(folder.display(), error);
            let entries = match std::fs::read_dir(&folder) {
                // Where a link leads to a folder that is not there, nothing is left.
                Err(error) if error.kind() == ErrorKind::NotFound && folder != self.base => continue,
                entries => entries.map_err(fail)?,
            };
            for entry in entries {
                let entry = entry.map_err(fail)?;
                if is_unfinished(&entry, &prefix) {
                    remove(&entry.path())?;
                    swept += 1;
                }
            }
        }
        Ok(swept)
    }

    /// Unfinished documents that lie about.
    pub(super) fn unfinished(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for (folder, prefix) in self.unfinished_places() {
            let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
            all.extend(entries.filter(|entry| is_unfinished(entry, &prefix)).map(|entry| entry.path()));
        }
        all
    }

    /// Makes renames and new names in the folder durable.
    pub(super) fn sync_folder(&self) -> Result<(), StoreError> {
        sync(&self.base)
    }
}

/// Makes renames and new names in a folder durable.
pub(super) fn sync(folder: &Path) -> Result<(), StoreError> {
    folder::sync(folder).map_err(|error| StoreError::io(folder.display(), error))
}

/// The folder that a path is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// What the names of unfinished copies of a document begin with.
fn unfinished_prefix(document: &Path) -> String {
    format!(".{}.tmp-", document.file_name().unwrap_or_default().to_string_lossy())
}

/// Whether this is an unfinished copy of a document; what is no plain file was made by somebody else.
fn is_unfinished(entry: &DirEntry, prefix: &str) -> bool {
    entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)) && entry.file_type().is_ok_and(|kind| kind.is_file())
}

/// A name for an unfinished document, beside where it will lie, that nobody else uses.
pub(super) fn temporary(document: &Path) -> PathBuf {
    folder_of(document).join(format!("{}{}", unfinished_prefix(document), uuid::Uuid::now_v7().simple()))
}

/// Which file it is and how it looked: whoever writes or replaces it changes this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    seconds: i64,
    nanos: i64,
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            seconds: metadata.mtime(),
            nanos: metadata.mtime_nsec(),
        }
    }

    /// The file at a path; `None` if there is none.
    pub(super) fn at(path: &Path) -> Result<Option<Self>, StoreError> {
        match std::fs::metadata(path) {
            Ok(metadata) => Ok(Some(Self::of(&metadata))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io(path.display(), error)),
        }
    }

    /// Whether it is the same file, which may have been written to since.
    pub(super) fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// When it was written last, in milliseconds since the epoch.
    pub(super) fn changed_ms(&self) -> i64 {
        self.seconds.saturating_mul(1000).saturating_add(self.nanos / 1_000_000)
    }
}

/// A file's bytes and which file they came from; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<(Vec<u8>, Identity)>, StoreError> {
    read_opened(path, plain::open(path))
}

/// The same of a file that this program made.
pub(super) fn read_own(path: &Path) -> Result<Option<(Vec<u8>, Identity)>, StoreError> {
    read_opened(path, plain::open_own(OpenOptions::new().read(true), path))
}

fn read_opened(path: &Path, opened: std::io::Result<File>) -> Result<Option<(Vec<u8>, Identity)>, StoreError> {
    let fail = |error| StoreError::io(path.display(), error);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let metadata = file.metadata().map_err(fail)?;
    let mut bytes = Vec::new();
    // One byte more than there should be: a file that grew meanwhile is not cut in silence.
    bytes
        .try_reserve_exact(usize::try_from(metadata.len()).unwrap_or(usize::MAX).saturating_add(1))
        .map_err(|_| fail(ErrorKind::OutOfMemory.into()))?;
    std::io::Read::read_to_end(&mut &file, &mut bytes).map_err(fail)?;
    Ok(Some((bytes, Identity::of(&metadata))))
}

/// Removes a file; one that is gone already is fine.
pub(super) fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::io(path.display(), error)),
        _ => Ok(()),
    }
}

/// Renames a file, without the folder's sync.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    std::fs::rename(from, to).map_err(|error| StoreError::io(format!("{} to {}", from.display(), to.display()), error))
}

/// What is written beside the journal is synced in pieces of this length: a longer one would keep the disk from the journal's next sync.
pub(super) const PIECE: usize = 256 * 1024;

/// Writes a new file and syncs it; on failure nothing is left behind. `access`: who may read and write it, if not whom this process lets by default.
pub(super) fn write_new(path: &Path, bytes: &[u8], access: Option<Access>) -> Result<Identity, StoreError> {
    let write = || -> std::io::Result<Identity> {
        // Whoever opened it before it was given away could go on reading it.
        let mode = if access.is_some() { PRIVATE } else { 0o666 };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        if let Some(access) = access {
            access.give(&file)?;
        }
        let mut pieces = bytes.chunks(PIECE).peekable();
        while let Some(piece) = pieces.next() {
            file.write_all(piece)?;
            if pieces.peek().is_some() {
                file.sync_data()?;
            }
        }
        file.sync_all()?;
        Ok(Identity::of(&file.metadata()?))
    };
    write().map_err(|error| {
        // The first fault is the one to tell; a leftover is swept at the next open.
        let _left_for_the_sweep = remove(path);
        StoreError::io(path.display(), error)
    })
}
