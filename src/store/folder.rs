//! Folders whose names survive a power cut.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Result};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::access::give_to_owner_of_open;

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

/// The empty path means the working folder.
fn named(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}
