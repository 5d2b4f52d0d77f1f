//! Replacing small files so that a crash at any instruction leaves the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::ProjectError;
use crate::store::access::{Access, PRIVATE, give_to_owner_of};
use crate::store::{folder, plain};

/// The document of the file backend, in the state's folder.
pub(super) const DOCUMENT: &str = "run_state.json";

/// The database, in the state's folder.
pub(super) const DATABASE: &str = "state.db";

/// What the file with the numbers that were given out is called beyond either.
pub(super) const NUMBERS: &str = ".lock";

/// The folder that a path is in; `.` for a bare name.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes what happened to the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), ProjectError> {
    folder::sync(folder).map_err(|error| ProjectError::io(folder, error))
}

/// Makes a folder, and those above it, where they are not there; their names are durable.
pub(super) fn make_folder(folder: &Path) -> Result<(), ProjectError> {
    folder::make(folder).map_err(|error| ProjectError::io(folder, error))
}

/// The path with a longer name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A new file beside `path`, removed again unless it is put in place.
struct Beside {
    path: PathBuf,
    in_place: bool,
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.in_place {
            // The error that brought us here is the one to tell; a stray temporary file harms nobody.
            let _stays = fs::remove_file(&self.path).is_err();
        }
    }
}

/// Puts a file in place whole: written beside, synced, renamed, folder synced. Mode, owner and group of a file that is there stay, as far as this process may;
/// a new one is for those who have the one that it is `like`. A link that is there is replaced, and not what it names.
fn replace(path: &Path, like: Option<&Path>, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ProjectError> {
    let folder = folder_of(path);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", uuid::Uuid::now_v7().simple()));
    let temporary = folder.join(name);
    let there = fs::symlink_metadata(path)
        .and_then(|there| if there.is_file() { Ok(there) } else { Err(io::ErrorKind::NotFound.into()) });
    let old = there.or_else(|error| like.map_or(Err(error), fs::metadata));
    let mode = if old.is_ok() { PRIVATE } else { 0o666 };
    let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary);
    let mut file = made.map_err(|error| ProjectError::io(&temporary, error))?;
    let mut beside = Beside { path: temporary, in_place: false };
    let fail = |error| ProjectError::io(&beside.path, error);
    match old {
        Ok(old) => Access::of(&old).give(&file),
        Err(_) => give_to_owner_of(folder, &file),
    }
    .map_err(fail)?;
    write(&mut file).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    fs::rename(&beside.path, path).map_err(|error| ProjectError::io(path, error))?;
    beside.in_place = true;
    sync_folder(folder)
}

/// Removes what a killed [`replace`] of this file left beside it. Only for who keeps all others from replacing it.
pub(super) fn sweep(path: &Path) -> Result<(), ProjectError> {
    let folder = folder_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = fs::read_dir(folder).map_err(|error| ProjectError::io(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| ProjectError::io(folder, error))?;
        let found = entry.file_name().to_string_lossy().into_owned();
        let stamp = found.strip_prefix(&name).and_then(|rest| rest.strip_prefix('.')).and_then(|rest| rest.strip_suffix(".tmp"));
        if stamp.is_some_and(|stamp| uuid::Uuid::try_parse(stamp).is_ok()) {
            fs::remove_file(entry.path()).map_err(|error| ProjectError::io(&entry.path(), error))?;
        }
    }
    Ok(())
}

/// A durable copy, put in place whole.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), ProjectError> {
    let mut source = plain::open(from).map_err(|error| ProjectError::io(from, error))?;
    // Whoever may not read the one may not read the other.
    replace(to, Some(from), |file| io::copy(&mut source, file).map(|_| ()))
}

/// An empty file for those who may read another one, if it is not there yet. Its owner writes it, whatever he may do with the other one.
pub(super) fn make_like(model: &Path, path: &Path) -> Result<(), ProjectError> {
    let Ok(model) = fs::metadata(model) else { return Ok(()) };
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(made) => Access::of(&model).with_owner().give(&made).map_err(|error| ProjectError::io(path, error)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(ProjectError::io(path, error)),
    }
}

/// Whether two paths name one file, by a link of either kind.
pub(super) fn is_same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    identity(a).is_some_and(|one| identity(b) == Some(one))
}

/// Whether two files hold the same bytes; `false` if the second one is not there.
pub(super) fn same_content(a: &Path, b: &Path) -> Result<bool, ProjectError> {
    let open = |path: &Path| plain::open(path).map_err(|error| ProjectError::io(path, error));
    let mut first = open(a)?;
    let mut second = match plain::open(b) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened.map_err(|error| ProjectError::io(b, error))?,
    };
    let (mut left, mut right) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let n = read_full(&mut first, &mut left).map_err(|error| ProjectError::io(a, error))?;
        let m = read_full(&mut second, &mut right).map_err(|error| ProjectError::io(b, error))?;
        if left.get(..n) != right.get(..m) {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

fn read_full(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes text into a file that [`replace`] puts in place.
pub(super) fn replace_text(path: &Path, text: &str) -> Result<(), ProjectError> {
    // Through a symbolic link, the file that it names is replaced, not the link.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    replace(path, None, |file| file.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_keeps_the_mode_and_leaves_no_other_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yml");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        replace_text(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let failed = replace(&path, None, |_| Err(io::Error::from(io::ErrorKind::StorageFull)));
        assert!(failed.unwrap_err().to_string().contains("free some space"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_copy_is_for_those_who_may_read_the_original() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "secret").unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o600)).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_link_keeps_pointing_at_the_replaced_file() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real.yml");
        fs::write(&real, "old").unwrap();
        let link = dir.path().join("link.yml");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        replace_text(&link, "new").unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_copy_takes_the_place_of_a_link_and_leaves_what_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let (from, victim, link) = (dir.path().join("from"), dir.path().join("victim"), dir.path().join("copy"));
        fs::write(&from, "text").unwrap();
        fs::write(&victim, "mine").unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        copy(&from, &link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
        assert_eq!((fs::read_to_string(&link).unwrap(), fs::read_to_string(&victim).unwrap()), ("text".into(), "mine".into()));
    }

    #[test]
    fn contents_are_compared_to_the_last_byte() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let long = "x".repeat(100_000);
        fs::write(&a, &long).unwrap();
        assert!(!same_content(&a, &b).unwrap());
        fs::write(&b, &long).unwrap();
        assert!(same_content(&a, &b).unwrap());
        fs::write(&b, format!("{long}y")).unwrap();
        assert!(!same_content(&a, &b).unwrap());
    }

    #[test]
    fn what_is_made_like_a_read_only_file_can_be_written_by_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (model, made) = (folder.path().join("model"), folder.path().join("made"));
        fs::write(&model, "").unwrap();
        fs::set_permissions(&model, fs::Permissions::from_mode(0o440)).unwrap();
        make_like(&model, &made).unwrap();
        assert_eq!(fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o640);
    }
}
