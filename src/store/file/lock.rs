//! Who may write: the operating system's lock on `run_state.json.lock`, and how far tokens and sequence numbers were given out.
//!
//! The lock belongs to the open file, so that two openings in one process exclude each other as two processes do; it ends with the
//! process, however that ends. The file is never renamed and never deleted.

use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::elsewhere;
use super::paths::{self, Paths};
use crate::model::ProcessInfo;
use crate::store::highwater::{HIGHEST, HighWater, HighWaterFile, far_behind};
use crate::store::{StoreError, StoreErrorKind};

/// How many sequence numbers are reserved with one sync: hours of writing at full speed.
const SEQ_BLOCK: u64 = 10_000_000;

/// Somebody who only asks whether the lock is held has it for an instant: it is tried so often, 5 ms apart.
const ASKED_FOR: u32 = 20;

/// The lock, held.
#[derive(Debug)]
pub(super) struct Lock {
    file: HighWaterFile,
    place: LockFile,
    /// The lock of whoever opens the document where its symbolic link leads: two links to one document exclude each other by it.
    behind_link: Option<HighWaterFile>,
    value: HighWater,
    /// Who had it last and did not give it back.
    left: Option<ProcessInfo>,
    /// The highest sequence number that may have been used before this opening.
    found_seq: u64,
    /// Journals beside another path to the document, which has all that is in them.
    spent: Vec<PathBuf>,
}

/// Which file was locked: its device and its number.
#[derive(Debug, Clone, Copy)]
pub(super) struct LockFile((u64, u64));

impl LockFile {
    /// Fails if this is not the file that lies there.
    pub(super) fn check(self, paths: &Paths) -> Result<(), StoreError> {
        match std::fs::metadata(&paths.lock) {
            Ok(there) if (there.dev(), there.ino()) == self.0 => Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::io(paths.lock.display(), error)),
            _ => Err(taken_away(&paths.lock)),
        }
    }
}

impl Lock {
    /// Takes the lock and writes down who has it.
    pub(super) fn acquire(paths: &Paths, process: &ProcessInfo) -> Result<Self, StoreError> {
        let mut lock = Self::acquire_unnamed(paths)?;
        let through = elsewhere::folder(paths);
        let value = HighWater { holder: Some(process.clone()), through, mender: None, ..lock.value.clone() };
        lock.put(value)?;
        for journal in std::mem::take(&mut lock.spent) {
            // In later documents nothing would tell any more that it is done with. Where it cannot be removed its name stays to be told.
            let _stays = paths::remove(&journal).is_err();
        }
        Ok(lock)
    }

    /// Takes the lock to mend what lies under it, and writes down who does, beside who had it last.
    pub(super) fn acquire_to_mend(paths: &Paths, process: &ProcessInfo) -> Result<Self, StoreError> {
        let mut lock = Self::acquire_unnamed(paths)?;
        lock.value.mender = Some(process.clone());
        let mut files = std::iter::once(&mut lock.file).chain(&mut lock.behind_link);
        files.try_for_each(|file| file.note_mender(Some(process)))?;
        Ok(lock)
    }

    /// Takes the lock and changes nothing. Fails if a writer that came by another path left records there.
    fn acquire_unnamed(paths: &Paths) -> Result<Self, StoreError> {
        let mut file = HighWaterFile::open(&paths.lock, &paths.document)?;
        if !try_lock(&file)? {
            return Err(busy(&paths.document, &file.read().unwrap_or_default()));
        }
        let place = LockFile(file.inode()?);
        place.check(paths)?;
        let mut value = file.read()?;
        let (mut behind_link, mut left) = (None, value.holder.clone());
        // Whose journal was found beside another path, with nothing in it that is not in the document, lost nothing.
        let elsewhere;
        if let Some(path) = paths.lock_behind_link() {
            let mut other = HighWaterFile::open(&path, &paths.document)?;
            if !try_lock(&other)? {
                return Err(busy(&paths.document, &other.read().unwrap_or_default()));
            }
            let known = other.read()?;
            (value.token, value.seq) = (value.token.max(known.token), value.seq.max(known.seq));
            value.skip = value.skip.max(known.skip);
            if value.holder.is_none() {
                (value.holder, value.through) = (known.holder.clone(), known.through.clone());
            }
            elsewhere = elsewhere::refuse(paths, &HighWater { seq: value.seq, ..known })?;
            left = left.or_else(|| value.holder.clone().filter(|_| !elsewhere.has_holders));
            behind_link = Some(other);
        } else {
            elsewhere = elsewhere::refuse(paths, &value)?;
            left = left.filter(|_| !elsewhere.has_holders);
        }
        let (spent, found_seq) = (elsewhere.spent, value.seq);
        Ok(Self { file, place, behind_link, value, left, found_seq, spent })
    }

    /// Puts a lock's file right that cannot be read, and says so. Nobody may have the state open for writing.
    pub(super) fn mend(paths: &Paths, now: DateTime<Utc>) -> Result<Vec<String>, StoreError> {
        let mut done = Vec::new();
        for path in std::iter::once(paths.lock.clone()).chain(paths.lock_behind_link()) {
            if !path.exists() {
                continue;
            }
            let mut file = HighWaterFile::open(&path, &paths.document)?;
            if !try_lock(&file)? {
                return Err(busy(&paths.document, &file.read().unwrap_or_default()));
            }
            done.extend(file.mend(&Paths::aside(&path, "damaged", now), now)?);
            file.unlock()?;
        }
        Ok(done)
    }

    /// Fails if somebody took the lock's file away: then another writer may have made a new one.
    pub(super) fn check(&self, paths: &Paths) -> Result<(), StoreError> {
        self.place.check(paths)
    }

    /// Which file it is, for whoever has to look without the lock itself.
    pub(super) fn file(&self) -> LockFile {
        self.place
    }

    /// The writer before, if it ended without giving the lock back.
    pub(super) fn left(&self) -> Option<&ProcessInfo> {
        self.left.as_ref()
    }

    /// The highest sequence number that may have been used.
    pub(super) fn seq(&self) -> u64 {
        self.value.seq
    }

    /// The highest sequence number that may have been used before this opening.
    pub(super) fn found_seq(&self) -> u64 {
        self.found_seq
    }

    /// A file that knows less than what lies beside it was emptied, or that came here without it: nobody knows how far numbers were given out, also for what does
    /// not lie there any more. Tokens go on far behind, and so do versions, as after [`skip`](Self::skip). Answers with what an operator should know.
    pub(super) fn make_up_for(
        &mut self,
        told_seq: Option<u64>,
        paths: &Paths,
        now: DateTime<Utc>,
    ) -> Result<Option<String>, StoreError> {
        let Some(told) = told_seq.filter(|told| *told > self.value.seq) else { return Ok(None) };
        let (token, seq) = (far_behind(self.value.token, now), far_behind(told, now));
        self.put(HighWater { token, seq, skip: seq, ..self.value.clone() })?;
        self.found_seq = seq;
        Ok(Some(format!(
            "{} did not know how far numbers were given out (it was emptied or removed, or the document was brought from elsewhere): tokens go on behind {token}, \
             and versions behind {seq}",
            paths.lock.display()
        )))
    }

    /// Whether numbers were given out for what the files do not hold, and no document goes on behind them yet.
    pub(super) fn is_to_skip(&self) -> bool {
        self.value.skip > 0
    }

    /// Notes that numbers up to the last one (or this one, if that is higher) were given out for what the files do not hold, or will not in a moment; synced before
    /// it returns. Whoever opens them goes on behind, until [`skipped`](Self::skipped).
    pub(super) fn skip(&mut self, told_seq: u64) -> Result<(), StoreError> {
        let skip = self.value.seq.max(told_seq).clamp(1, HIGHEST);
        // The first number behind them is that of the document which comes.
        self.put(HighWater { skip, seq: skip.saturating_add(1).min(HIGHEST), ..self.value.clone() })
    }

    /// A document of ours is in place whose numbers go on behind those that were lost.
    pub(super) fn skipped(&mut self) {
        if self.is_to_skip()
            && let Err(error) = self.put(HighWater { skip: 0, ..self.value.clone() })
        {
            // Nothing is lost: they are passed over once more.
            tracing::warn!(%error, "it could not be noted that versions went on behind those that were lost");
        }
    }

    /// Makes sure that sequence numbers up to this one may be used; synced before it returns.
    pub(super) fn cover_seq(&mut self, seq: u64) -> Result<(), StoreError> {
        if seq <= self.value.seq {
            return Ok(());
        }
        self.put(HighWater { seq: seq.max(seq.saturating_add(SEQ_BLOCK).min(HIGHEST)), ..self.value.clone() })
    }

    /// Gives out tokens; synced before it returns.
    pub(super) fn reserve_tokens(&mut self, count: u64) -> Result<Range<u64>, StoreError> {
        let start = self.value.token.saturating_add(1);
        let end = start.checked_add(count).ok_or_else(|| {
            StoreError::not_applied(StoreErrorKind::Input, format!("{count} fencing tokens are more than there are left"))
        })?;
        self.put(HighWater { token: end - 1, ..self.value.clone() })?;
        Ok(start..end)
    }

    /// Writes what was really used, takes the holder's name out, and gives the lock back.
    pub(super) fn release(mut self, seq: u64) -> Result<(), StoreError> {
        let written = self.put(HighWater { seq, holder: None, through: None, mender: None, ..self.value.clone() });
        self.behind_link.map_or(Ok(()), |other| other.unlock())?;
        self.file.unlock()?;
        written
    }

    /// Takes the mender's name out and gives the lock back. The rest of what the file says is left: also who had it last and did not give it back.
    pub(super) fn leave(mut self) -> Result<(), StoreError> {
        let mut files = std::iter::once(&mut self.file).chain(&mut self.behind_link);
        let written = files.try_for_each(|file| file.note_mender(None));
        self.behind_link.map_or(Ok(()), |other| other.unlock())?;
        self.file.unlock()?;
        written
    }

    fn put(&mut self, value: HighWater) -> Result<(), StoreError> {
        refuse_beyond(value.seq, "sequence number")?;
        refuse_beyond(value.token, "fencing token")?;
        self.file.write(&value)?;
        if let Some(other) = &mut self.behind_link {
            other.write(&value)?;
        }
        self.value = value;
        Ok(())
    }
}

/// Refuses what could not be read again: nothing of ours comes so far, somebody else wrote a number that is near the end.
fn refuse_beyond(number: u64, what: &str) -> Result<(), StoreError> {
    if number <= HIGHEST {
        return Ok(());
    }
    let message = format!("{number} is no {what} any more: they end at {HIGHEST}, and somebody else wrote one that is near it");
    Err(StoreError::not_applied(StoreErrorKind::Input, message))
}

/// Takes it, although somebody may just be asking whether it is held.
fn try_lock(file: &HighWaterFile) -> Result<bool, StoreError> {
    for _ in 0..ASKED_FOR {
        if file.try_lock()? {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    file.try_lock()
}

/// What can be seen of the lock without taking it.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// Whether somebody has the state open for writing.
    pub(super) held: bool,
    pub(super) value: HighWater,
}

impl Seen {
    /// Whether a writer lives: who mends holds the lock too, and has no leases.
    pub(super) fn is_written(&self) -> bool {
        self.held && self.value.mender.is_none()
    }
}

/// Looks whether a writer lives, changing nothing.
pub(super) fn look(path: &Path) -> Result<Seen, StoreError> {
    // A writer that starts just now tries again.
    let seen = HighWaterFile::look_at_lock(path)?;
    Ok(seen.map_or_else(Seen::default, |(held, value)| Seen { held, value }))
}

fn taken_away(lock: &Path) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Poisoned,
        format!(
            "{} was removed or replaced while it was held: it keeps no other writer out any more, so nothing more is written. Stop all who have this \
             state open, then open it anew; the file is never stale, leave it where it is",
            lock.display()
        ),
    )
}

/// Another process writes, or mends: who, and where to look. By what the lock's file says.
pub(super) fn busy(document: &Path, value: &HighWater) -> StoreError {
    if let Some(mender) = &value.mender {
        let document = document.display();
        let message =
            format!("{document} is being repaired by {mender} (`seeknal state verify --repair`); wait until that has ended");
        return StoreError::not_applied(StoreErrorKind::Busy, message);
    }
    let holder = value.holder.as_ref();
    let who = holder.map_or_else(|| "another process".to_owned(), ToString::to_string);
    let here = ProcessInfo::current(DateTime::UNIX_EPOCH);
    let (who, mend) = if holder.is_some_and(|holder| (holder.pid, &holder.host) == (here.pid, &here.host)) {
        (format!("this process ({who})"), "Use the opening that is there (a coordinator can be cloned), or close it first")
    } else {
        (who, "See `seeknal state locks`; stop it, or use the database backend")
    };
    StoreError::not_applied(
        StoreErrorKind::Busy,
        format!("{} is open for writing by {who}; the file backend has one writer at a time. {mend}", document.display()),
    )
}
