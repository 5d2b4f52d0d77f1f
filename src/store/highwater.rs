//! A small file beside the state that remembers how far numbers were given out, so that no restored backup brings old ones back.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
#[cfg(feature = "sqlite")]
use std::time::{Duration, Instant};

#[cfg(any(feature = "file", feature = "project"))]
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::access::{Access, PRIVATE, give_to_owner_of};
use super::{StoreError, StoreErrorKind, folder, plain};
use crate::model::ProcessInfo;

/// No number of ours comes near this; one that is higher was written by somebody else, and after it there would soon be none left.
pub(super) const HIGHEST: u64 = 1 << 62;

/// How many tokens are passed over where it is not known which ones were given out.
#[cfg(any(feature = "file", feature = "project"))]
const SKIPPED_TOKENS: u64 = 1 << 32;

/// Where numbers go on where it is not known which ones were given out: behind the microseconds since 1970, and where the last that is known is beyond these
/// already, far behind it. They are not given out as fast as the microseconds go by, so that whatever is forgotten twice does not begin again at the same number.
#[cfg(any(feature = "file", feature = "project"))]
pub(super) fn far_behind(known: u64, now: DateTime<Utc>) -> u64 {
    let micros = u64::try_from(now.timestamp_micros()).unwrap_or(0);
    let behind = if micros > known { micros } else { known.saturating_add(SKIPPED_TOKENS) };
    behind.min(HIGHEST)
}

/// The text is padded to this length, so that one small write replaces all of it.
const LENGTH: usize = 512;

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct HighWater {
    /// The highest fencing token that may have been given out.
    pub(super) token: u64,
    /// The highest commit sequence that may have been given out.
    pub(super) seq: u64,
    /// The commit sequence that an opening left when it was closed, as far as they told: what is behind it is an older copy.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) closed: u64,
    /// That numbers up to this one were given out for what the files do not hold (any more): until a document goes on behind them, whoever opens it does.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) skip: u64,
    /// The process that holds the lock on this file; of meaning only while it is locked.
    pub(super) holder: Option<ProcessInfo>,
    /// The folder of the holder's journal, where that is another one than this file's: a symbolic link in it leads to the state here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) through: Option<String>,
    /// Who mends the state under this lock, and works on no run; of meaning only while it is locked. The holder is gone then, and stays noted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mender: Option<ProcessInfo>,
}

#[cfg(feature = "file")]
impl HighWater {
    /// Who has the lock, where somebody has it.
    pub(super) fn who(&self) -> Option<&ProcessInfo> {
        self.mender.as_ref().or(self.holder.as_ref())
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Whether a path leads to an open file.
#[cfg(feature = "file")]
pub(super) fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let own = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// How far tokens were given out by what a file beside a state says; `None` if there is none. One that cannot be read tells no number, so that they may have been
/// given out as far as it ever gets: see [`far_behind`].
#[cfg(feature = "project")]
pub(crate) fn tokens_given(sidecar: &Path, now: DateTime<Utc>) -> Option<u64> {
    let looked = HighWaterFile::look(sidecar).and_then(|mut file| {
        let read = file.read().map(|value| value.token);
        read.or_else(|_| Ok(far_behind(told(&String::from_utf8_lossy(&file.bytes()?), "\"token\":"), now)))
    });
    match looked {
        Ok(token) => Some(token),
        Err(error) if error.kind() == StoreErrorKind::NotFound => None,
        Err(_) => Some(far_behind(0, now)),
    }
}

/// The open file. It is never renamed and never deleted: the operating system's lock on it is the lock on the state.
#[derive(Debug)]
pub(super) struct HighWaterFile {
    path: PathBuf,
    file: File,
}

impl HighWaterFile {
    /// Opens the file, and makes it (durably) if it is not there, for those who have the state.
    pub(super) fn open(path: &Path, state: &Path) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(path.display(), error);
        let open = |options: &mut OpenOptions| plain::open_own(options.read(true).write(true), path);
        let like = std::fs::metadata(state);
        let mode = if like.is_ok() { PRIVATE } else { 0o666 };
        let file = match open(OpenOptions::new().create_new(true).mode(mode)) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                open(OpenOptions::new().create(true).truncate(false)).map_err(fail)?
            }
            made => {
                let made = made.map_err(fail)?;
                match like {
                    Ok(state) => Access::of(&state).with_owner().give(&made),
                    Err(_) => path.parent().map_or(Ok(()), |folder| give_to_owner_of(folder, &made)),
                }
                .map_err(fail)?;
                made
            }
        };
        if file.metadata().map_err(fail)?.len() == 0 {
            file.sync_all().map_err(fail)?;
            if let Some(folder) = path.parent() {
                folder::sync(folder).map_err(fail)?;
            }
        }
        Ok(Self { path: path.to_owned(), file })
    }

    /// What the file says, without opening it for writing.
    #[cfg(feature = "sqlite")]
    pub(super) fn peek(path: &Path) -> Result<HighWater, StoreError> {
        Self::look(path)?.read()
    }

    /// The open file, for reading alone.
    fn look(path: &Path) -> Result<Self, StoreError> {
        let opened = plain::open_own(OpenOptions::new().read(true), path);
        Ok(Self { path: path.to_owned(), file: opened.map_err(|error| StoreError::io(path.display(), error))? })
    }

    /// What the file says and whether somebody has it locked for himself; `None` if there is none. Nothing is changed: a lock that is shared with all who look
    /// is taken for an instant.
    #[cfg(feature = "file")]
    pub(super) fn look_at_lock(path: &Path) -> Result<Option<(bool, HighWater)>, StoreError> {
        let fail = |error| StoreError::io(path.display(), error);
        let mut looked = match Self::look(path) {
            Err(error) if error.kind() == StoreErrorKind::NotFound => return Ok(None),
            looked => looked?,
        };
        let held = match looked.file.try_lock_shared() {
            Ok(()) => {
                looked.file.unlock().map_err(fail)?;
                false
            }
            Err(std::fs::TryLockError::WouldBlock) => true,
            Err(std::fs::TryLockError::Error(error)) => return Err(fail(error)),
        };
        Ok(Some((held, looked.read()?)))
    }

    /// Takes the exclusive lock; `false` if somebody else has it.
    #[cfg(any(feature = "file", feature = "sqlite"))]
    pub(super) fn try_lock(&self) -> Result<bool, StoreError> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(std::fs::TryLockError::WouldBlock) => Ok(false),
            Err(std::fs::TryLockError::Error(error)) => Err(StoreError::io(self.path.display(), error)),
        }
    }

    /// Waits for the exclusive lock, so long at most: others may wait for whoever waits here.
    #[cfg(feature = "sqlite")]
    pub(super) fn lock(&self, most: Duration) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut pause = Duration::from_millis(1);
        while !self.try_lock()? {
            if began.elapsed() >= most {
                let path = self.path.display();
                return Err(StoreError::not_applied(
                    StoreErrorKind::Busy,
                    format!(
                        "{path}: another process has held the lock on it for {most:?}; `seeknal state locks` shows who has the state open, and \
                         `fuser {path}` who has this file: if that one hangs, end it, and try again"
                    ),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Its device and its number: a lock on a file that is not at its path any more keeps nobody out.
    #[cfg(feature = "file")]
    pub(super) fn inode(&self) -> Result<(u64, u64), StoreError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.file.metadata().map_err(|error| StoreError::io(self.path.display(), error))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Gives the lock back.
    pub(super) fn unlock(&self) -> Result<(), StoreError> {
        self.file.unlock().map_err(|error| StoreError::io(self.path.display(), error))
    }

    fn bytes(&mut self) -> Result<Vec<u8>, StoreError> {
        let fail = |error| StoreError::io(self.path.display(), error);
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        // The file is a line of a few hundred bytes; whatever is longer is not ours.
        (&self.file).take(64 * 1024).read_to_end(&mut bytes).map_err(fail)?;
        Ok(bytes)
    }

    /// What the file says; an empty one says zero.
    pub(super) fn read(&mut self) -> Result<HighWater, StoreError> {
        let bytes = self.bytes()?;
        // What is no text is no line of ours either, and is told as such.
        let text = String::from_utf8_lossy(&bytes);
        let line = text.trim_end_matches(['\0', ' ', '\n']);
        if line.is_empty() {
            return Ok(HighWater::default());
        }
        let wrong = |why: String| {
            StoreError::not_applied(
                StoreErrorKind::Corrupt,
                format!(
                    "{}: it does not say how far tokens were given out ({why}); `seeknal state verify --repair` keeps a copy and goes on far behind \
                     any in use, or write {{\"token\":N,\"seq\":N}} into it with numbers higher than those",
                    self.path.display()
                ),
            )
        };
        let mut value: HighWater = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        // What is to be passed over was given out.
        value.seq = value.seq.max(value.skip);
        // Numbers are reserved before they are used: a higher one is none of ours.
        value.closed = value.closed.min(value.seq);
        if value.token.max(value.seq) > HIGHEST {
            return Err(wrong(format!("{} is more than {HIGHEST}, the most it may be", value.token.max(value.seq))));
        }
        Ok(value)
    }

    /// Puts a file right that cannot be read, and says what was done: a copy of it is kept, and numbers go on far behind whatever can still be told from it.
    /// Only for the holder of the lock.
    #[cfg(any(feature = "file", feature = "project"))]
    pub(super) fn mend(&mut self, aside: &Path, now: DateTime<Utc>) -> Result<Option<String>, StoreError> {
        match self.read() {
            Err(error) if error.kind() == StoreErrorKind::Corrupt => {}
            read => return read.map(|_| None),
        }
        let keep = || {
            let mut copy = OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(aside)?;
            Access::of(&self.file.metadata()?).give(&copy)?;
            std::io::copy(&mut plain::open_own(OpenOptions::new().read(true), &self.path)?, &mut copy)?;
            copy.sync_all()?;
            folder::sync(aside.parent().unwrap_or(aside))
        };
        keep().map_err(|error| StoreError::io(aside.display(), error))?;
        let bytes = self.bytes()?;
        let text = String::from_utf8_lossy(&bytes);
        let token = far_behind(told(&text, "\"token\":"), now);
        // First the line: a file that is empty for a moment would tell of no token at all.
        let (seq, skip) = (told(&text, "\"seq\":"), told(&text, "\"skip\":"));
        self.write(&HighWater { token, seq: seq.max(skip), skip, ..HighWater::default() })?;
        let cut = self.file.set_len(LENGTH as u64).and_then(|()| self.file.sync_all());
        cut.map_err(|error| StoreError::io(self.path.display(), error))?;
        Ok(Some(format!(
            "{}: it did not say how far tokens were given out; they go on behind {token}, and what it said is kept as {}",
            self.path.display(),
            aside.display()
        )))
    }

    /// Notes who mends, or that nobody does any more, and leaves the rest as it is.
    #[cfg(feature = "file")]
    pub(super) fn note_mender(&mut self, mender: Option<&ProcessInfo>) -> Result<(), StoreError> {
        let value = self.read()?;
        self.write(&HighWater { mender: mender.cloned(), ..value })
    }

    /// Writes it in place and syncs.
    pub(super) fn write(&mut self, value: &HighWater) -> Result<(), StoreError> {
        let fail = |error| StoreError::io(self.path.display(), error);
        let text = |value: &HighWater| serde_json::to_string(value).map_err(|error| fail(error.into()));
        let mut line = text(value)?;
        // A longer one would stay behind the next line. They are not needed but for what is told: of who is at it, and after a crash.
        if line.len() >= LENGTH && value.mender.is_some() {
            line = text(&HighWater { mender: None, ..value.clone() })?;
        }
        if line.len() >= LENGTH && value.through.is_some() {
            line = text(&HighWater { through: None, mender: None, ..value.clone() })?;
        }
        while line.len() + 1 < LENGTH {
            line.push(' ');
        }
        line.push('\n');
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        self.file.write_all(line.as_bytes()).map_err(fail)?;
        self.file.sync_all().map_err(fail)
    }
}

/// The number behind a name in what is left of a damaged line; 0 where there is none, or none that can be right.
#[cfg(any(feature = "file", feature = "project"))]
fn told(text: &str, name: &str) -> u64 {
    let digits = text.split(name).nth(1).unwrap_or_default();
    let end = digits.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(digits.len());
    digits.get(..end).and_then(|digits| digits.parse().ok()).filter(|number| *number < HIGHEST / 2).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(any(feature = "file", feature = "project"))]
    fn what_is_forgotten_twice_does_not_begin_again_at_the_same_number() {
        let at = |micros: i64| crate::model::time::from_micros(micros).unwrap();
        let now: i64 = 1 << 50;
        // The last one: a first opening's, one that was passed over a moment ago, one beyond all clocks.
        for known in [7, now.unsigned_abs() - 1_000, now.unsigned_abs() + 1_000] {
            let (first, second) = (far_behind(known, at(now)), far_behind(known, at(now + 1_000_000)));
            assert!(first > known && second > known, "{known}: {first}, {second}");
            let in_the_way = far_behind(first + 1_000, at(now + 1_000_000));
            assert!(in_the_way > first + 1_000, "{known}: {first}, {in_the_way}");
            assert!(known > now.unsigned_abs() || second > first + 100_000, "{known}: {first}, {second}");
        }
        assert_eq!(far_behind(u64::MAX, at(now)), HIGHEST);
    }

    #[test]
    #[cfg(feature = "sqlite")]
    fn a_lock_that_is_not_given_back_is_waited_for_so_long_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db.lock");
        let (one, two) = (HighWaterFile::open(&path, &path).unwrap(), HighWaterFile::open(&path, &path).unwrap());
        one.lock(Duration::ZERO).unwrap();
        let error = two.lock(Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Busy);
        assert!(error.to_string().contains(path.to_str().unwrap()) && error.to_string().contains("30ms"), "{error}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| two.lock(Duration::from_secs(30)));
            one.unlock().unwrap();
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    #[cfg(any(feature = "file", feature = "project"))]
    fn numbers_of_a_damaged_line() {
        let name = "\"token\":";
        for (text, number) in [
            ("", 0),
            ("{\"token\":", 0),
            ("{\"token\":12", 12),
            ("{\"token\":12,\"seq\":\u{fffd}", 12),
            ("{\"token\":99999999999999999999,", 0),
            ("{\"token\":4611686018427387903,", 0),
        ] {
            assert_eq!(told(text, name), number, "{text}");
        }
    }
}
