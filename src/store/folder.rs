//! Folders whose names survive a power cut.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Result};
use std::path::Path;
#[cfg(any(feature = "file", feature = "sqlite"))]
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::access::give_to_owner_of_open;
#[cfg(any(feature = "file", feature = "sqlite"))]
use super::{StoreError, StoreErrorKind};

/// Makes renames and new names in a folder durable.
pub(crate) fn sync(folder: &Path) -> Result<()> {
    File::open(named(folder)).and_then(|folder| folder.sync_all())
}

/// Makes a folder, and those that it lies in; the names of those that were not there are durable when it returns. What root makes belongs to whom the folder
/// around it belongs to.
pub(crate) fn make(folder: &Path) -> Result<()> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !named(folder).exists()).collect();
    let names: Option<Vec<&OsStr>> = missing.iter().rev().map(|folder| folder.file_name()).collect();
    match (missing.last().and_then(|first| first.parent()), names) {
        (Some(parent), Some(names)) => make_within(parent, &names)?,
        // A path with `..` in what is not there yet.
        _ => std::fs::create_dir_all(named(folder))?,
    }
    missing.iter().rev().filter_map(|made| made.parent()).try_for_each(|parent| match sync(parent) {
        // One that may be written but not read cannot be opened, and so not be synced.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        synced => synced,
    })
}

/// To make something in a folder it need not be readable.
#[cfg(any(target_os = "linux", target_os = "android"))]
const AROUND: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const AROUND: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);

/// Step by step by open folders and no paths: what root gives away is what it has just made, whoever renames something meanwhile.
fn make_within(parent: &Path, names: &[&OsStr]) -> Result<()> {
    let mut around = rustix::fs::open(named(parent), AROUND, Mode::empty())?;
    for name in names {
        let made = match rustix::fs::mkdirat(&around, *name, Mode::from_raw_mode(0o777)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        if made
            && let Ok(opened) =
                rustix::fs::openat(&around, *name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        {
            give_to_owner_of_open(&around, &File::from(opened))?;
        }
        around = rustix::fs::openat(&around, *name, AROUND, Mode::empty())?;
    }
    Ok(())
}

/// What is wrong with a link whose end is not there, in words.
pub(crate) const NOWHERE: &str = "it is a symbolic link that leads nowhere; mend the link (is a disk not mounted?), or remove it";

/// Refuses a file that lies where a link leads to no folder: a folder that was made there would hold another state than the one which the link is about. A link
/// to a file that is not there yet, in a folder that is, is followed.
#[cfg(any(feature = "file", feature = "sqlite"))]
pub(super) fn refuse_nowhere(file: &Path) -> std::result::Result<(), StoreError> {
    let is_link = |path: &Path| path.symlink_metadata().is_ok_and(|found| found.is_symlink());
    let is_missing = |path: &Path| std::fs::metadata(named(path)).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    // The file's own link, or that of a folder above.
    let of_file = is_link(file) && real(file).parent().is_some_and(is_missing);
    let of_folder = || file.ancestors().skip(1).take_while(|folder| is_missing(folder)).find(|folder| is_link(folder));
    match if of_file { Some(file) } else { of_folder() } {
        Some(link) => Err(StoreError::not_applied(StoreErrorKind::Io, format!("{}: {NOWHERE}", link.display()))),
        None => Ok(()),
    }
}

/// How many links lead from one to the next at most; the system itself follows no more.
#[cfg(any(feature = "file", feature = "sqlite"))]
const MOST_LINKS: usize = 40;

/// Where a file really lies: where its symbolic link leads, if it is one, also to a file that is not there yet.
#[cfg(any(feature = "file", feature = "sqlite"))]
pub(super) fn real(file: &Path) -> PathBuf {
    let mut place = file.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(target) = std::fs::read_link(&place) else { break };
        place = place.parent().map_or_else(|| target.clone(), |folder| folder.join(&target));
    }
    place
}

/// The empty path means the working folder.
fn named(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}
