//! Who may do what with a file, and whose it is: what takes a file's place, or lies beside it, is for the same people.

use std::fs::{File, Metadata, Permissions};
use std::io::Result;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

#[cfg(feature = "sqlite")]
use rustix::fs::{Mode, OFlags};

/// The mode of a new file until it is [given](Access::give) to those who may have it: whoever opened it before could go on reading it.
pub(crate) const PRIVATE: u32 = 0o600;

/// Mode, owner and group of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    mode: u32,
    owner: u32,
    group: u32,
}

impl Access {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self { mode: metadata.mode() & 0o777, owner: metadata.uid(), group: metadata.gid() }
    }

    /// The same, with reading and writing for the owner.
    pub(crate) fn with_owner(self) -> Self {
        Self { mode: self.mode | 0o600, ..self }
    }

    /// The same for a folder: who may read files may look into it, and who may write them may make and remove some.
    #[cfg(feature = "sqlite")]
    fn as_folder(self) -> Self {
        Self { mode: self.mode | (self.mode & 0o444) >> 2 | 0o700, ..self }
    }

    /// Gives a file of this process to those who have the other one, as far as it may: only root changes owners, only members pass a group on. A group that
    /// was not to read what is in it does not read it now. The open file and no path: whoever may write in its folder could put another one there.
    pub(crate) fn give(self, file: &File) -> Result<()> {
        let own = file.metadata()?;
        if own.uid() != self.owner {
            let _stays_ours = fchown(file, Some(self.owner), None).is_err();
        }
        let other_group = own.gid() != self.group && fchown(file, None, Some(self.group)).is_err();
        let mode = if other_group { self.mode & !0o070 | (self.mode & 0o007) << 3 } else { self.mode };
        // A folder whose files go to its group has that from the one that it lies in.
        let mode = if own.is_dir() { mode | own.mode() & 0o2000 } else { mode };
        file.set_permissions(Permissions::from_mode(mode))
    }

    /// The same for a file that nothing of this process has open: closing it takes the locks away that SQLite has on it.
    #[cfg(feature = "sqlite")]
    pub(crate) fn give_closed(self, path: &Path) -> Result<()> {
        self.give(&File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// As [`as_folder`](Self::as_folder), given to a folder.
    #[cfg(feature = "sqlite")]
    pub(crate) fn give_folder(self, folder: &Path) -> Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.as_folder().give(&File::from(rustix::fs::open(folder, flags, Mode::empty())?))
    }
}

/// Gives a file that root has just made to the owner and the group of the folder that it lies in: he would be locked out of it. The files of everybody else are his
/// own. The open file and no path, as in [`Access::give`].
pub(crate) fn give_to_owner_of(folder: &Path, file: &File) -> Result<()> {
    let folder = std::fs::metadata(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?;
    give_to(file, folder.uid(), folder.gid())
}

/// The same where the folder is open.
pub(crate) fn give_to_owner_of_open(folder: impl AsFd, file: &File) -> Result<()> {
    let folder = rustix::fs::fstat(folder)?;
    give_to(file, folder.st_uid, folder.st_gid)
}

fn give_to(file: &File, owner: u32, group: u32) -> Result<()> {
    const ROOT: u32 = 0;
    if owner != ROOT && file.metadata()?.uid() == ROOT {
        // Root within a namespace may not give to whom it does not know there.
        let _stays_ours = fchown(file, Some(owner), Some(group)).is_err();
    }
    Ok(())
}

/// Makes an empty file in a folder, for whom the umask lets, and closes it.
#[cfg(feature = "sqlite")]
pub(crate) fn make_new(path: &Path, folder: &Path) -> Result<()> {
    give_to_owner_of(folder, &File::options().write(true).create_new(true).open(path)?)
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_has_the_same_mode_owner_and_group() {
        let folder = tempfile::tempdir().unwrap();
        let (model, given) =
            (File::create(folder.path().join("model")).unwrap(), File::create(folder.path().join("given")).unwrap());
        model.set_permissions(Permissions::from_mode(0o440)).unwrap();
        // Only root may give files away; everybody else has one owner and one group here, and both stay.
        let _only_root = fchown(&model, Some(2001), Some(3000)).is_err();
        let access = Access::of(&model.metadata().unwrap());
        access.give(&given).unwrap();
        assert_eq!(Access::of(&given.metadata().unwrap()), access);
        access.with_owner().give(&given).unwrap();
        assert_eq!(given.metadata().unwrap().mode() & 0o7777, 0o640);
        let inner = folder.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let inner = File::open(&inner).unwrap();
        inner.set_permissions(Permissions::from_mode(0o2755)).unwrap();
        access.as_folder().give(&inner).unwrap();
        assert_eq!(inner.metadata().unwrap().mode() & 0o7777, 0o2750);
    }
}
