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

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::paths::Identity;
use crate::store::{StoreError, StoreErrorKind};

/// The newest format that this version reads, and the one it writes.
pub(super) const FORMAT: u32 = 1;
/// Where the first frame begins.
pub(super) const HEADER_LEN: usize = 512;
/// What a frame needs before its payload.
pub(super) const FRAME_HEAD: usize = 32;
/// Payloads beyond this are refused: they would make one record of a quarter of the address space of a length field.
pub(super) const MAX_PAYLOAD: usize = 1 << 30;

const CHECKSUM_LEN: usize = 8;
const MAGIC: [u8; 4] = *b"SKF1";
const ALIGN: usize = 8;

/// What a journal says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// The format of the journal.
    pub(super) seeknal_journal: u32,
    /// A number that no other journal has: frames of an earlier life of the file are not of this epoch.
    pub(super) epoch: u64,
    /// The generation of the document that it continues.
    pub(super) generation: String,
    /// The generation before that one, whose journal this one continues too until the document is in place.
    pub(super) follows: Option<String>,
    /// The last sequence number that the document knows as used.
    pub(super) last_seq: u64,
    /// The last record of the journal that continues `follows`: between the two there is no gap.
    pub(super) after: u64,
}

impl Header {
    pub(super) fn new(generation: &str, follows: Option<&str>, last_seq: u64, after: u64) -> Self {
        let (time, random) = uuid::Uuid::now_v7().as_u64_pair();
        Self {
            seeknal_journal: FORMAT,
            epoch: time.rotate_left(32) ^ random,
            generation: generation.to_owned(),
            follows: follows.map(str::to_owned),
            last_seq,
            after,
        }
    }

    fn to_bytes(&self, path: &Path) -> Result<Vec<u8>, StoreError> {
        let mut line = serde_json::to_vec(self).map_err(|error| StoreError::io(path.display(), error.into()))?;
        line.resize(HEADER_LEN - CHECKSUM_LEN - 1, b' ');
        let sum = crc32c::crc32c(&line);
        line.extend_from_slice(format!("{sum:08x}\n").as_bytes());
        Ok(line)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let line = bytes.get(..HEADER_LEN)?;
        let (text, sum) = line.split_at_checked(HEADER_LEN - CHECKSUM_LEN - 1)?;
        let sum = u32::from_str_radix(std::str::from_utf8(sum.get(..CHECKSUM_LEN)?).ok()?, 16).ok()?;
        if crc32c::crc32c(text) != sum {
            return None;
        }
        serde_json::from_slice(text).ok()
    }
}

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Accepted entries.
    Data,
    /// The leases that are held, for others to list.
    Leases,
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Self::Data => 1,
            Self::Leases => 2,
        }
    }

    fn of(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Data),
            2 => Some(Self::Leases),
            _ => None,
        }
    }
}

/// Begins a frame at the end of a buffer; the payload is appended, then [`finish_frame`] is called with the place that this returned.
pub(super) fn begin_frame(buffer: &mut Vec<u8>) -> usize {
    let start = buffer.len();
    buffer.resize(start + FRAME_HEAD, 0);
    buffer.push(b'\n');
    start
}

/// Fills in the head of the frame that began at `start`. Fails if the payload is too long for a frame.
pub(super) fn finish_frame(
    buffer: &mut Vec<u8>,
    start: usize,
    epoch: u64,
    kind: Kind,
    previous: u64,
    first: u64,
) -> Result<(), StoreError> {
    while !(buffer.len() - start).is_multiple_of(ALIGN) {
        buffer.push(b'\n');
    }
    let payload = buffer.len().saturating_sub(start + FRAME_HEAD);
    let length = u32::try_from(payload).ok().filter(|_| payload <= MAX_PAYLOAD).ok_or_else(|| {
        StoreError::not_applied(
            StoreErrorKind::Input,
            format!("a batch of {payload} bytes is too large for the journal; write it in parts"),
        )
        .of_one_entry()
    })?;
    if let Some(frame) = buffer.get_mut(start..) {
        let (head, payload) = frame.split_at_mut(FRAME_HEAD);
        let sum = checksum(epoch, kind.code(), length, previous, first, payload);
        let fields = MAGIC
            .into_iter()
            .chain(kind.code().to_le_bytes())
            .chain(length.to_le_bytes())
            .chain(sum.to_le_bytes())
            .chain(previous.to_le_bytes())
            .chain(first.to_le_bytes());
        for (to, from) in head.iter_mut().zip(fields) {
            *to = from;
        }
    }
    Ok(())
}

fn checksum(epoch: u64, kind: u32, length: u32, previous: u64, first: u64, payload: &[u8]) -> u32 {
    let mut sum = crc32c::crc32c(&epoch.to_le_bytes());
    for field in [kind, length] {
        sum = crc32c::crc32c_append(sum, &field.to_le_bytes());
    }
    for field in [previous, first] {
        sum = crc32c::crc32c_append(sum, &field.to_le_bytes());
    }
    crc32c::crc32c_append(sum, payload)
}

/// One frame as it was found.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    pub(super) kind: Kind,
    pub(super) previous: u64,
    pub(super) payload: &'a [u8],
    /// Where the next frame begins.
    pub(super) end: usize,
}

/// The frame at an offset, if there is a whole one of this epoch. Nothing is allocated, whatever the length field says.
pub(super) fn frame_at(bytes: &[u8], offset: usize, epoch: u64) -> Option<Frame<'_>> {
    let head = bytes.get(offset..offset.checked_add(FRAME_HEAD)?)?;
    if !head.starts_with(&MAGIC) {
        return None;
    }
    let four = |at: usize| head.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let eight = |at: usize| head.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let (kind, length, sum) = (four(4)?, four(8)?, four(12)?);
    let (previous, first) = (eight(16)?, eight(24)?);
    let start = offset + FRAME_HEAD;
    let end = start.checked_add(usize::try_from(length).ok()?)?;
    let payload = bytes.get(start..end)?;
    if checksum(epoch, kind, length, previous, first, payload) != sum {
        return None;
    }
    Some(Frame { kind: Kind::of(kind)?, previous, payload, end })
}

/// Whether a frame begins at an offset that goes on behind the end of the file. Space is there, synced, before anything is written into it, and lengths are
/// written whole: no crash leaves this, only somebody who cut the file. Of a note of leases nothing was ever promised.
pub(super) fn is_cut_off(bytes: &[u8], offset: usize) -> bool {
    let Some(rest) = bytes.get(offset..).filter(|rest| rest.iter().any(|byte| *byte != 0)) else { return false };
    let field = |at: usize| rest.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let is_frame = rest.starts_with(&MAGIC) || MAGIC.starts_with(rest);
    let is_data = field(4).is_none_or(|kind| Kind::of(kind) == Some(Kind::Data));
    // What no frame may be as long as is no length that was written.
    let length = field(8)
        .and_then(|length| usize::try_from(length).ok())
        .map_or(Some(0), |length| (length <= MAX_PAYLOAD).then_some(length));
    is_frame && is_data && length.is_some_and(|length| rest.len() < FRAME_HEAD + length)
}

/// Whether a valid data frame of this epoch lies behind an offset.
pub(super) fn frame_behind(bytes: &[u8], offset: usize, epoch: u64) -> Option<usize> {
    let mut at = offset + ALIGN;
    while let Some(word) = bytes.get(at..at + ALIGN) {
        if word.starts_with(&MAGIC) && frame_at(bytes, at, epoch).is_some_and(|frame| frame.kind == Kind::Data) {
            return Some(at);
        }
        at += ALIGN;
    }
    None
}

/// Where the last byte that is not zero lies behind an offset; `None` if there is none.
pub(super) fn last_written(bytes: &[u8], offset: usize) -> Option<usize> {
    bytes.get(offset..)?.iter().rposition(|byte| *byte != 0).map(|at| offset + at)
}

/// A journal gets this length, of zeros, before its header is written.
const SHORTEST: usize = 4096;

/// A journal as it was read.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) path: PathBuf,
    /// Which file it was.
    pub(super) identity: Identity,
    pub(super) bytes: Vec<u8>,
    /// `None` if it was never begun: the crash came while the file was made, so that no frame can be in it.
    pub(super) header: Option<Header>,
}

impl Stored {
    /// Reads a journal; `None` if there is none.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, StoreError> {
        let Some((bytes, identity)) = super::paths::read(path)? else { return Ok(None) };
        let header = Header::from_bytes(&bytes);
        match &header {
            None => {
                let why = if let Some(at) = last_written(&bytes, HEADER_LEN.min(bytes.len())) {
                    format!("its header is damaged, and there are records behind it (up to byte {at})")
                } else if bytes.len() < SHORTEST && last_written(&bytes, 0).is_some() {
                    format!("it was cut to {} bytes: nobody knows what was behind", bytes.len())
                } else {
                    String::new()
                };
                if !why.is_empty() {
                    return Err(StoreError::not_applied(
                        StoreErrorKind::Corrupt,
                        format!(
                            "{}: {why}; it was left as it is. `seeknal state verify` explains, `seeknal state verify --repair` sets it aside",
                            path.display()
                        ),
                    ));
                }
            }
            Some(header) if header.seeknal_journal > FORMAT => {
                return Err(StoreError::not_applied(
                    StoreErrorKind::NewerFormat,
                    format!(
                        "{}: journal format {} is newer than this program knows ({FORMAT}); use the newer seeknal",
                        path.display(),
                        header.seeknal_journal
                    ),
                ));
            }
            Some(_) => {}
        }
        Ok(Some(Self { path: path.to_owned(), identity, bytes, header }))
    }

    /// Looks at everything that lies in it, damaged or not.
    pub(super) fn content(&self) -> Content {
        let mut content = Content::default();
        let Some(header) = &self.header else { return content };
        let mut offset = HEADER_LEN;
        loop {
            while let Some(frame) = frame_at(&self.bytes, offset, header.epoch) {
                if frame.kind == Kind::Data {
                    content.records += lines(frame.payload).count();
                    content.last_frame = Some((offset, frame.end));
                }
                offset = frame.end;
            }
            let Some(behind) = frame_behind(&self.bytes, offset, header.epoch) else { break };
            content.is_damaged = true;
            offset = behind;
        }
        content.has_rest = last_written(&self.bytes, offset).is_some();
        content
    }

    /// The lines of its last valid frame.
    pub(super) fn last_lines(&self, content: &Content) -> impl Iterator<Item = &[u8]> {
        let frame = content.last_frame.and_then(|(from, to)| self.bytes.get(from + FRAME_HEAD..to));
        lines(frame.unwrap_or_default())
    }
}

/// What lies in a journal.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Content {
    /// The records of its valid frames, also of those behind a broken one.
    pub(super) records: usize,
    /// Whether a valid frame lies behind a broken one.
    pub(super) is_damaged: bool,
    /// Whether something is written behind the last valid frame.
    has_rest: bool,
    last_frame: Option<(usize, usize)>,
}

impl Content {
    /// Whether nothing was ever written: what cannot be read is not nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.records == 0 && !self.is_damaged && !self.has_rest
    }
}

/// The lines of a payload, without the padding.
pub(super) fn lines(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    payload.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

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
    let file = OpenOptions::new().write(true).open(path).map_err(fail)?;
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
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).map_err(fail)?;
        let mut journal = Self {
            path: path.to_owned(),
            file,
            header,
            end: HEADER_LEN as u64,
            space: 0,
            frames: 0,
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
        let file = OpenOptions::new().read(true).write(true).open(spare).map_err(fail)?;
        let space = file.metadata().map_err(fail)?.len();
        let journal = Self {
            path: path.to_owned(),
            file,
            header,
            end: HEADER_LEN as u64,
            space,
            frames: 0,
            provisional: 0,
            is_frugal: false,
        };
        journal.file.write_all_at(&journal.header.to_bytes(path)?, 0).map_err(fail)?;
        journal.file.sync_all().map_err(fail)?;
        super::paths::rename(spare, path)?;
        settle(&journal.file)?;
        Ok(journal)
    }

    /// How long the file is.
    pub(super) fn space(&self) -> u64 {
        self.space
    }

    /// Goes on with a journal that was read to `end`, under the name that it has now.
    pub(super) fn resume(path: &Path, stored: &Stored, header: Header, end: usize, frames: u64) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(path.display(), error);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
        let space = file.metadata().map_err(fail)?.len();
        let journal =
            Self { path: path.to_owned(), file, header, end: end as u64, space, frames, provisional: 0, is_frugal: false };
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
