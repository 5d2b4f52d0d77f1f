//! Folders whose names survive a power cut.

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::path::Path;

/// Makes renames and new names in a folder durable.
pub(crate) fn sync(folder: &Path) -> Result<()> {
    File::open(named(folder)).and_then(|folder| folder.sync_all())
}

/// Makes a folder, and those that it lies in; the names of those that were not there are durable when it returns.
pub(crate) fn make(folder: &Path) -> Result<()> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !named(folder).exists()).collect();
    std::fs::create_dir_all(named(folder))?;
    missing.iter().rev().filter_map(|made| made.parent()).try_for_each(|parent| match sync(parent) {
        // One that may be written but not read cannot be opened, and so not be synced.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        synced => synced,
    })
}

/// The empty path means the working folder.
fn named(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}
