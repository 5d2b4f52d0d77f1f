//! A journal that lies there, as it is read: whole, cut off or damaged.

use std::path::{Path, PathBuf};

use super::SHORTEST;
use super::frame::{FORMAT, FRAME_HEAD, HEADER_LEN, Header, Kind, frame_at, frame_behind, last_written, lines};
use crate::store::file::paths::{self, Identity};
use crate::store::file::record::Record;
use crate::store::{StoreError, StoreErrorKind};

/// A journal as it was read.
#[derive(Debug)]
pub(in crate::store::file) struct Stored {
    pub(in crate::store::file) path: PathBuf,
    /// Which file it was.
    pub(in crate::store::file) identity: Identity,
    pub(in crate::store::file) bytes: Vec<u8>,
    /// `None` if it was never begun: the crash came while the file was made, so that no frame can be in it.
    pub(in crate::store::file) header: Option<Header>,
}

impl Stored {
    /// Reads a journal; `None` if there is none.
    pub(in crate::store::file) fn read(path: &Path) -> Result<Option<Self>, StoreError> {
        let Some((bytes, identity)) = paths::read_own(path)? else { return Ok(None) };
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
    pub(in crate::store::file) fn content(&self) -> Content {
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

    /// The last record of its valid frames, also of those behind a broken one; `None` where there is none that can be read.
    pub(in crate::store::file) fn last_seq(&self) -> Option<u64> {
        let last = self.last_lines(&self.content()).last().and_then(|line| serde_json::from_slice::<Record>(line).ok());
        last.map(|record| record.seq.0)
    }

    /// The lines of its last valid frame.
    pub(in crate::store::file) fn last_lines(&self, content: &Content) -> impl Iterator<Item = &[u8]> {
        let frame = content.last_frame.and_then(|(from, to)| self.bytes.get(from + FRAME_HEAD..to));
        lines(frame.unwrap_or_default())
    }
}

/// What lies in a journal.
#[derive(Debug, Default, Clone, Copy)]
pub(in crate::store::file) struct Content {
    /// The records of its valid frames, also of those behind a broken one.
    pub(in crate::store::file) records: usize,
    /// Whether a valid frame lies behind a broken one.
    pub(in crate::store::file) is_damaged: bool,
    /// Whether something is written behind the last valid frame.
    has_rest: bool,
    last_frame: Option<(usize, usize)>,
}

impl Content {
    /// Whether nothing was ever written: what cannot be read is not nothing.
    pub(in crate::store::file) fn is_empty(&self) -> bool {
        self.records == 0 && !self.is_damaged && !self.has_rest
    }
}
