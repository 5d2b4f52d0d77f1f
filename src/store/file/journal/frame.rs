//! How a journal is written, byte by byte, and what bytes mean: its header and its frames.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::store::{StoreError, StoreErrorKind};

/// The newest format that this version reads, and the one it writes.
pub(in crate::store::file) const FORMAT: u32 = 1;
/// Where the first frame begins.
pub(in crate::store::file) const HEADER_LEN: usize = 512;
/// What a frame needs before its payload.
pub(in crate::store::file) const FRAME_HEAD: usize = 32;
/// Payloads beyond this are refused: they would make one record of a quarter of the address space of a length field.
pub(in crate::store::file) const MAX_PAYLOAD: usize = 1 << 30;

const CHECKSUM_LEN: usize = 8;
const MAGIC: [u8; 4] = *b"SKF1";
const ALIGN: usize = 8;

/// What a journal says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::store::file) struct Header {
    /// The format of the journal.
    pub(in crate::store::file) seeknal_journal: u32,
    /// A number that no other journal has: frames of an earlier life of the file are not of this epoch.
    pub(in crate::store::file) epoch: u64,
    /// The generation of the document that it continues.
    pub(in crate::store::file) generation: String,
    /// The generation before that one, whose journal this one continues too until the document is in place.
    pub(in crate::store::file) follows: Option<String>,
    /// The last sequence number that the document knows as used.
    pub(in crate::store::file) last_seq: u64,
    /// The last record of the journal that continues `follows`: between the two there is no gap.
    pub(in crate::store::file) after: u64,
}

impl Header {
    pub(in crate::store::file) fn new(generation: &str, follows: Option<&str>, last_seq: u64, after: u64) -> Self {
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

    pub(super) fn to_bytes(&self, path: &Path) -> Result<Vec<u8>, StoreError> {
        let mut line = serde_json::to_vec(self).map_err(|error| StoreError::io(path.display(), error.into()))?;
        line.resize(HEADER_LEN - CHECKSUM_LEN - 1, b' ');
        let sum = crc32c::crc32c(&line);
        line.extend_from_slice(format!("{sum:08x}\n").as_bytes());
        Ok(line)
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
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
pub(in crate::store::file) enum Kind {
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
pub(in crate::store::file) fn begin_frame(buffer: &mut Vec<u8>) -> usize {
    let start = buffer.len();
    buffer.resize(start + FRAME_HEAD, 0);
    buffer.push(b'\n');
    start
}

/// Fills in the head of the frame that began at `start`. Fails if the payload is too long for a frame.
pub(in crate::store::file) fn finish_frame(
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
pub(in crate::store::file) struct Frame<'a> {
    pub(in crate::store::file) kind: Kind,
    pub(in crate::store::file) previous: u64,
    pub(in crate::store::file) payload: &'a [u8],
    /// Where the next frame begins.
    pub(in crate::store::file) end: usize,
}

/// What lies at an offset and begins as a whole frame does, its sum not looked at.
struct Claimed<'a> {
    frame: Frame<'a>,
    first: u64,
    sum: u32,
}

impl Claimed<'_> {
    fn is_whole(&self, epoch: u64) -> bool {
        let Frame { kind, previous, payload, .. } = self.frame;
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        checksum(epoch, kind.code(), length, previous, self.first, payload) == self.sum
    }
}

/// Nothing is allocated, whatever the length field says.
fn claimed_at(bytes: &[u8], offset: usize) -> Option<Claimed<'_>> {
    let head = bytes.get(offset..offset.checked_add(FRAME_HEAD)?)?;
    if !head.starts_with(&MAGIC) {
        return None;
    }
    let four = |at: usize| head.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let eight = |at: usize| head.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    // Before the sum of what may be long: a text that looks like a frame's beginning has no such number behind it.
    let (code, length, sum) = (four(4)?, four(8)?, four(12)?);
    let kind = Kind::of(code)?;
    let (previous, first) = (eight(16)?, eight(24)?);
    let start = offset + FRAME_HEAD;
    let end = start.checked_add(usize::try_from(length).ok()?)?;
    let payload = bytes.get(start..end)?;
    Some(Claimed { frame: Frame { kind, previous, payload, end }, first, sum })
}

/// The frame at an offset, if there is a whole one of this epoch.
pub(in crate::store::file) fn frame_at(bytes: &[u8], offset: usize, epoch: u64) -> Option<Frame<'_>> {
    claimed_at(bytes, offset).filter(|claimed| claimed.is_whole(epoch)).map(|claimed| claimed.frame)
}

/// Whether a frame begins at an offset that goes on behind the end of the file. Space is there, synced, before anything is written into it, and lengths are
/// written whole: no crash leaves this, only somebody who cut the file. Of a note of leases nothing was ever promised.
pub(in crate::store::file) fn is_cut_off(bytes: &[u8], offset: usize) -> bool {
    let Some(rest) = bytes.get(offset..).filter(|rest| !rest.is_empty()) else { return false };
    let field = |at: usize| rest.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let is_frame = rest.starts_with(&MAGIC) || MAGIC.starts_with(rest);
    let is_data = field(4).is_none_or(|kind| Kind::of(kind) == Some(Kind::Data));
    // What no frame may be as long as is no length that was written.
    let length = field(8)
        .and_then(|length| usize::try_from(length).ok())
        .map_or(Some(0), |length| (length <= MAX_PAYLOAD).then_some(length));
    is_frame && is_data && length.is_some_and(|length| rest.len() < FRAME_HEAD + length)
}

/// Whether a valid data frame of this epoch lies behind an offset: at any byte, because who took bytes out or put some in has moved all that follows. What was made
/// to look like frames without end is not summed up again and again: beyond some times the whole file it is taken for one, and so for damage, which nobody cuts.
pub(in crate::store::file) fn frame_behind(bytes: &[u8], offset: usize, epoch: u64) -> Option<usize> {
    const PIECE: usize = 4096;
    const SUMS: usize = 16;
    const FIRST: u8 = MAGIC[0];
    let from = offset.checked_add(1)?;
    let mut budget = bytes.len().saturating_mul(SUMS);
    let is_data = |at: &usize| {
        let Some(claimed) = claimed_at(bytes, *at).filter(|claimed| claimed.frame.kind == Kind::Data) else { return false };
        match budget.checked_sub(claimed.frame.payload.len()) {
            Some(left) => {
                budget = left;
                claimed.is_whole(epoch)
            }
            None => true,
        }
    };
    // Behind the last frame there is nothing but space: pieces of it are passed over whole.
    let pieces = bytes.get(from..)?.chunks(PIECE).enumerate().filter(|(_, piece)| piece.contains(&FIRST));
    let mut begins = pieces.flat_map(|(number, piece)| {
        let start = from + number * PIECE;
        piece.iter().enumerate().filter(|(_, byte)| **byte == FIRST).map(move |(at, _)| start + at)
    });
    begins.find(is_data)
}

/// Where the last byte that is not zero lies behind an offset; `None` if there is none.
pub(in crate::store::file) fn last_written(bytes: &[u8], offset: usize) -> Option<usize> {
    const SPACE: [u8; 4096] = [0; 4096];
    let mut rest = bytes.get(offset..)?;
    // The space that is kept ready is far longer than what was written: it is passed over in whole pieces.
    while let Some(before) = rest.strip_suffix(&SPACE) {
        rest = before;
    }
    rest.iter().rposition(|byte| *byte != 0).map(|at| offset + at)
}

/// The lines of a payload, without the padding.
pub(in crate::store::file) fn lines(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    payload.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}
