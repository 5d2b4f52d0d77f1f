//! Opening what should be a plain file: whoever opens a pipe waits for its other end, perhaps for ever, and all who need him wait with him. What this program alone
//! makes and keeps is no symbolic link either: one that lies in its place leads to a file of somebody else, which would be written to, or given away.

use std::error::Error;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// What is wrong then, in words.
pub(crate) const WHY: &str = "it is no plain file, but a file should be there";

/// The same where what is there is a link, and no other program makes one.
pub(crate) const LINK: &str = "it is a symbolic link, but this program keeps a file of its own there";

/// What lies at a path is a folder, a pipe, a socket or a device, or a link where none should be.
#[derive(Debug)]
struct NoPlainFile(&'static str);

impl fmt::Display for NoPlainFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for NoPlainFile {}

fn no_plain_file() -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, NoPlainFile(WHY))
}

/// Whether an opening failed because something else than a file lies there.
pub(crate) fn is_none(error: &io::Error) -> bool {
    error.get_ref().is_some_and(<dyn Error + Send + Sync>::is::<NoPlainFile>)
}

/// Opens a file for reading; never waits, and opens nothing but a plain file (or a link to one).
pub(crate) fn open(path: &Path) -> io::Result<File> {
    open_with(File::options().read(true), path)
}

/// The same with other options. Close on exec is set as always, and flags that are asked for by number are not kept.
pub(crate) fn open_with(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    opened(options, path, OFlags::empty())
}

/// Opens a file that this program made; follows no link.
pub(crate) fn open_own(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let is_link = || std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    match opened(options, path, OFlags::NOFOLLOW) {
        Err(_) if is_link() => Err(io::Error::new(ErrorKind::InvalidInput, NoPlainFile(LINK))),
        opened => opened,
    }
}

fn opened(options: &mut OpenOptions, path: &Path, flags: OFlags) -> io::Result<File> {
    let is_other = || std::fs::metadata(path).is_ok_and(|found| !found.is_file());
    // Asked by its name first: a device may do something when it is opened. What takes its place since is found out behind the opening.
    if is_other() {
        return Err(no_plain_file());
    }
    let without_waiting = flags.union(OFlags::NONBLOCK);
    let opened = match options.custom_flags(without_waiting.bits().cast_signed()).open(path) {
        // Somebody has a lease on it (a file server, say), and gives it back to who waits.
        Err(error) if error.kind() == ErrorKind::WouldBlock && !is_other() => {
            options.custom_flags(flags.bits().cast_signed()).open(path)
        }
        opened => opened,
    };
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(no_plain_file()),
        // A pipe without readers is refused in words of its own.
        Err(error) if error.kind() != ErrorKind::AlreadyExists && is_other() => Err(no_plain_file()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_are_opened_and_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(io::read_to_string(open(&at(name)).unwrap()).unwrap(), "text");
        }
        let missing = open(&at("missing")).unwrap_err();
        assert!(missing.kind() == ErrorKind::NotFound && !is_none(&missing), "{missing}");
        std::os::unix::fs::symlink("nothing", at("nowhere")).unwrap();
        assert_eq!(io::read_to_string(open_own(File::options().read(true), &at("file")).unwrap()).unwrap(), "text");
        for name in ["link", "nowhere"] {
            for options in [File::options().read(true), File::options().append(true).create(true), File::options().write(true)] {
                let refused = open_own(options, &at(name)).unwrap_err();
                assert!(is_none(&refused) && refused.to_string().contains("symbolic link"), "{name}: {refused}");
            }
        }
        assert_eq!(open_own(File::options().read(true), &at("missing")).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!at("nothing").exists());
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        std::os::unix::fs::symlink("pipe", at("led")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let others = [at("pipe"), at("led"), at("socket"), folder.path().to_owned(), "/dev/null".into()];
        for other in others {
            let writing = |options: &mut OpenOptions| open_with(options.write(true), &other);
            for opened in [open(&other), writing(&mut File::options()), writing(File::options().read(true).create(true))] {
                assert!(is_none(&opened.unwrap_err()), "{}", other.display());
            }
        }
        let made = open_with(File::options().write(true).create_new(true), &at("made")).unwrap();
        assert!(made.metadata().unwrap().is_file());
        let twice = open_with(File::options().write(true).create_new(true), &at("file")).unwrap_err();
        assert_eq!(twice.kind(), ErrorKind::AlreadyExists);
    }
}
