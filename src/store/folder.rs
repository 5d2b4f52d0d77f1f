//! Folders whose names survive a power cut.

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::access::give_to_owner_of;

/// Makes renames and new names in a folder durable.
pub(crate) fn sync(folder: &Path) -> Result<()> {
    File::open(named(folder)).and_then(|folder| folder.sync_all())
}

/// Makes a folder, and those that it lies in; the names of those that were not there are durable when it returns.
pub(crate) fn make(folder: &Path) -> Result<()> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !named(folder).exists()).collect();
    std::fs::create_dir_all(named(folder))?;
    for made in missing.iter().rev() {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Only root gives any away, and root may open it.
        if let (Ok(opened), Some(parent)) = (rustix::fs::open(*made, flags, Mode::empty()), made.parent()) {
            give_to_owner_of(parent, &File::from(opened))?;
        }
    }
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
