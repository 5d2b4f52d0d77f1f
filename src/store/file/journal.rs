//! The journal: a header of one line, then frames. One frame is what one sync made durable, one line of its payload one accepted entry.
//!
//! ```text
//! header   512 bytes: a JSON object padded with spaces, 8 hex digits of CRC-32C, a line feed
//! frame     32 bytes: magic, kind, length, CRC-32C, sequence before, first sequence (all little-endian), then the payload,
//!           padded with line feeds to a multiple of 8
//! ```
//! The checksum covers epoch, kind, length, both sequences and the payload. The next frame is written only after the last one is
//! synced, so a bad frame with nothing valid behind it is a torn tail, and one with a valid frame of this epoch behind it is damage; so is one that
//! goes on behind the end of the file, because space is there before anything is written into it.
//! Space ahead is zeroed, so that a sync need not change the file's size. A frame of leases is provisional: it lies where the next
//! data frame will go, is not synced, and never means anything for the state.

mod frame;
mod stored;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

pub(super) use self::frame::{
    HEADER_LEN, Header, Kind, begin_frame, finish_frame, frame_at, frame_behind, is_cut_off, last_written, lines,
};
pub(super) use self::stored::Stored;

use crate::store::access::PRIVATE;
use crate::store::{StoreError, plain};

/// A journal gets this length, of zeros, before its header is written.
const SHORTEST: usize = 4096;

/// The journal that is written to.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    header: Header,
    /// Where the next data frame goes.
    end: u64,
    /// How long the file is; everything between is zero or provisional.
    space: u64,
    /// How many data frames this opening and those before it put in.
    frames: u64,
    /// When this opening put its first one in.
    since: Option<Instant>,
    /// How far a provisional frame reaches that lies at the end; `end` or less if there is none.
    provisional: u64,
    /// A document finds no room: it takes no more space ahead than it needs.
    is_frugal: bool,
}

/// Writes zeros.
pub(super) fn zero(file: &File, from: u64, to: u64) -> std::io::Result<()> {
    const PIECE: usize = 256 * 1024;
    let zeros = vec![0_u8; PIECE];
    let mut at = from;
    while at < to {
        let length = usize::try_from(to - at).unwrap_or(PIECE).min(PIECE);
        file.write_all_at(zeros.get(..length).unwrap_or_default(), at)?;
        at += length as u64;
    }
    Ok(())
}

/// Gives back the space behind the last frame of a journal that nobody writes to any more. Says whether there was any.
pub(super) fn give_back(path: &Path) -> Result<bool, StoreError> {
    let fail = |error| StoreError::io(path.display(), error);
    let Some(stored) = Stored::read(path)? else { return Ok(false) };
    let Some(header) = &stored.header else { return Ok(false) };
    let mut end = HEADER_LEN;
    while let Some(frame) = frame_at(&stored.bytes, end, header.epoch) {
        end = frame.end;
    }
    let used = end.next_multiple_of(SHORTEST);
    // Whatever else is written there is not for here to judge.
    if used >= stored.bytes.len() || last_written(&stored.bytes, end).is_some() {
        return Ok(false);
    }
    let file = plain::open_own(OpenOptions::new().write(true), path).map_err(fail)?;
    file.set_len(used as u64).and_then(|()| file.sync_all()).map_err(fail)?;
    Ok(true)
}

/// The first piece of space ahead.
const FIRST_STEP: u64 = 1 << 20;
/// The largest piece of space ahead.
const LARGEST_STEP: u64 = 16 << 20;

impl Journal {
    /// Makes a journal with its first space, synced, the folder too.
    pub(super) fn create(
        path: &Path,
        header: Header,
        settle: impl FnOnce(&File) -> Result<(), StoreError>,
    ) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(path.display(), error);
        // Made anew: what lies there may be a link, and a file that is given to others must be nobody's yet.
        super::paths::remove(path)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(PRIVATE).open(path).map_err(fail)?;
        let mut journal = Self {
            path: path.to_owned(),
            file,
            header,
            end: HEADER_LEN as u64,
            space: 0,
            frames: 0,
            since: None,
            provisional: 0,
            is_frugal: false,
        };
        let head = journal.header.to_bytes(path)?;
        journal.make_space(journal.end)?;
        journal.file.write_all_at(&head, 0).map_err(fail)?;
        journal.file.sync_all().map_err(fail)?;
        settle(&journal.file)?;
        Ok(journal)
    }

    /// Makes a journal of space that was zeroed and synced before under another name, so that it need not grow for a while.
    pub(super) fn create_from(
        spare: &Path,
        path: &Path,
        header: Header,
        settle: impl FnOnce(&File) -> Result<(), StoreError>,
    ) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(spare.display(), error);
        let file = plain::open_own(OpenOptions::new().read(true).write(true), spare).map_err(fail)?;
        let space = file.metadata().map_err(fail)?.len();
        let journal = Self {
            path: path.to_owned(),
            file,
            header,
            end: HEADER_LEN as u64,
            space,
            frames: 0,
            since: None,
            provisional: 0,
            is_frugal: false,
        };
        journal.file.write_all_at(&journal.header.to_bytes(path)?, 0).map_err(fail)?;
        journal.file.sync_all().map_err(fail)?;
        super::paths::rename(spare, path)?;
        settle(&journal.file)?;
        Ok(journal)
    }

    /// Goes on with a journal that was read to `end`, under the name that it has now.
    pub(super) fn resume(path: &Path, stored: &Stored, header: Header, end: usize, frames: u64) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(path.display(), error);
        let file = plain::open_own(OpenOptions::new().read(true).write(true), path).map_err(fail)?;
        let space = file.metadata().map_err(fail)?.len();
        let journal = Self {
            path: path.to_owned(),
            file,
            header,
            end: end as u64,
            space,
            frames,
            since: None,
            provisional: 0,
            is_frugal: false,
        };
        // What was read may be in memory alone: after a sync that failed, a system takes pages for written that are not. What is acknowledged behind it rests
        // on it, so it is written once more, as it is.
        journal.file.write_all_at(stored.bytes.get(..end).unwrap_or_default(), 0).map_err(fail)?;
        // What lies behind the end is a torn frame, kept aside by now, or a provisional one. Zeroed, so that it never looks like more.
        if let Some(last) = last_written(&stored.bytes, end) {
            journal.zero(journal.end, last as u64 + 1).map_err(fail)?;
        }
        journal.file.sync_all().map_err(fail)?;
        Ok(journal)
    }

    /// Whether one of these paths still leads to it: a checkpoint moves it from one to the other.
    pub(super) fn is_at_one_of(&self, paths: [&Path; 2]) -> Result<bool, StoreError> {
        for path in paths {
            if crate::store::highwater::is_at(&self.file, path).map_err(|error| StoreError::io(path.display(), error))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// Since when this opening's first frame is in it: what no document has, unless one is being written.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// How many data frames are in it.
    pub(super) fn frames(&self) -> u64 {
        self.frames
    }

    /// How many bytes are in use.
    pub(super) fn used(&self) -> u64 {
        self.end.saturating_sub(HEADER_LEN as u64)
    }

    /// It was renamed: the document that it continues is in place.
    pub(super) fn renamed(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
        self.is_frugal = false;
    }

    /// Gives back the space ahead, because a document finds none, and takes no more than it needs until that has found some. Says whether there was any.
    /// After an error the journal must not be written again.
    pub(super) fn give_back(&mut self) -> Result<bool, StoreError> {
        self.is_frugal = true;
        let used = self.end.max(self.provisional).next_multiple_of(SHORTEST as u64);
        if used >= self.space || self.file.set_len(used).is_err() {
            return Ok(false);
        }
        self.space = used;
        self.file.sync_all().map_err(|error| StoreError::io(self.path.display(), error))?;
        Ok(true)
    }

    /// Whether the next data frame will overwrite a provisional one.
    pub(super) fn has_provisional(&self) -> bool {
        self.provisional > self.end
    }

    /// Makes sure that there is zeroed, synced space for so many bytes. On failure the journal is as it was before.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), StoreError> {
        let needed = self.end.saturating_add(bytes as u64);
        if needed <= self.space {
            return Ok(());
        }
        self.make_space(needed)
    }

    fn make_space(&mut self, needed: u64) -> Result<(), StoreError> {
        let step = self.space.clamp(FIRST_STEP, LARGEST_STEP);
        let generous = needed.saturating_add(step).next_multiple_of(FIRST_STEP);
        let least = needed.next_multiple_of(SHORTEST as u64);
        let mut grown = self.grow(if self.is_frugal { least } else { generous });
        if grown.as_ref().is_err_and(|error| {
            matches!(
                error.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded | std::io::ErrorKind::FileTooLarge
            )
        }) {
            grown = self.grow(least);
        }
        grown.map_err(|error| StoreError::io(self.path.display(), error))
    }

    fn grow(&mut self, to: u64) -> std::io::Result<()> {
        let done = self.zero(self.space, to).and_then(|()| self.file.sync_all());
        if done.is_ok() {
            self.space = to;
        } else {
            // Gives back what the disk had for a part of it. That it may fail too changes nothing: the file is only longer than needed.
            let _longer_than_needed = self.file.set_len(self.space);
        }
        done
    }

    fn zero(&self, from: u64, to: u64) -> std::io::Result<()> {
        zero(&self.file, from, to)
    }

    /// Writes data frames (and perhaps a provisional one behind them, from `data` on) and syncs. Space must have been reserved. After
    /// an error the journal must not be written again: what is in it is not known.
    pub(super) fn append(&mut self, bytes: &mut Vec<u8>, data: usize) -> Result<(), StoreError> {
        let fail = |error| StoreError::io(self.path.display(), error);
        let provisional = bytes.len() > data;
        self.cover(bytes);
        self.file.write_all_at(bytes, self.end).map_err(fail)?;
        self.file.sync_data().map_err(fail)?;
        let written = self.end.saturating_add(bytes.len() as u64);
        self.end += data as u64;
        self.frames += 1;
        self.since.get_or_insert_with(Instant::now);
        self.provisional = if provisional { written } else { 0 };
        Ok(())
    }

    /// Writes a provisional frame at the end, without a sync.
    pub(super) fn note(&mut self, frame: &mut Vec<u8>) -> Result<(), StoreError> {
        self.reserve(frame.len())?;
        self.cover(frame);
        // Also when the write fails in the middle, something may lie there.
        self.provisional = self.end.saturating_add(frame.len() as u64);
        self.file.write_all_at(frame, self.end).map_err(|error| StoreError::io(self.path.display(), error))
    }

    /// Lengthens what is written by zeros, so that nothing of a longer provisional frame stays behind it.
    fn cover(&self, bytes: &mut Vec<u8>) {
        let over = usize::try_from(self.provisional.saturating_sub(self.end)).unwrap_or(0);
        if bytes.len() < over {
            bytes.resize(over, 0);
        }
    }
}
