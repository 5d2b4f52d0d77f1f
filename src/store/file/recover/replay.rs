//! A journal on top of what it continues: every frame in its place, or an error that says where not.

use super::Active;
use crate::model::Ledger;
use crate::store::file::journal::{HEADER_LEN, Header, Kind, Stored, frame_at, frame_behind, is_cut_off, last_written, lines};
use crate::store::file::record::{Leases, Record};
use crate::store::{StoreError, StoreErrorKind};

/// What came of a journal.
pub(super) struct Replayed {
    pub(super) end: usize,
    pub(super) frames: u64,
    pub(super) records: usize,
    pub(super) tail: u64,
    pub(super) torn: Option<(usize, usize)>,
    pub(super) leases: Option<Leases>,
}

impl Replayed {
    pub(super) fn active(self, stored: Stored, header: Header) -> Active {
        Active { stored, header, end: self.end, frames: self.frames, tail: self.tail, torn: self.torn }
    }
}

pub(super) fn gap(stored: &Stored, why: &str) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Corrupt,
        format!(
            "{}: {why}; it was left as it is. `seeknal state verify` explains, `seeknal state verify --repair` keeps a copy and cuts it there",
            stored.path.display()
        ),
    )
}

/// Replays a journal; a torn last frame is told, damage is an error.
pub(super) fn replay(ledger: &mut Ledger, stored: &Stored, header: &Header, document_seq: u64) -> Result<Replayed, StoreError> {
    if header.last_seq != document_seq {
        return Err(gap(
            stored,
            &format!("it continues a document of record {}, but the document is at {document_seq}", header.last_seq),
        ));
    }
    let mut replayed = Replayed { end: HEADER_LEN, frames: 0, records: 0, tail: header.last_seq, torn: None, leases: None };
    loop {
        let offset = replayed.end;
        let damage = |why: &str| gap(stored, &format!("damaged at byte {offset}: {why}"));
        let Some(frame) = frame_at(&stored.bytes, offset, header.epoch) else {
            if let Some(behind) = frame_behind(&stored.bytes, offset, header.epoch) {
                return Err(damage(&format!("the frame there is broken, and a whole one follows at byte {behind}")));
            }
            if is_cut_off(&stored.bytes, offset) {
                return Err(damage("the frame there goes on behind the end of the file, so that somebody cut it"));
            }
            replayed.torn = last_written(&stored.bytes, offset).map(|last| (offset, last + 1));
            return Ok(replayed);
        };
        if frame.kind == Kind::Leases {
            if let Some(leases) = lines(frame.payload).next().and_then(|line| serde_json::from_slice::<Leases>(line).ok()) {
                replayed.leases = Some(leases);
            }
            // What is provisional lies at the end, always: a writer that had lost its lock wrote it over records of the one after it.
            if let Some(behind) = frame_behind(&stored.bytes, offset, header.epoch) {
                return Err(damage(&format!("a note of leases lies there, and records follow at byte {behind}")));
            }
            return Ok(replayed);
        }
        if frame.previous != replayed.tail {
            return Err(damage(&format!(
                "the frame goes on after record {}, but the one before it ends with {}",
                frame.previous, replayed.tail
            )));
        }
        for line in lines(frame.payload) {
            let record: Record =
                serde_json::from_slice(line).map_err(|error| damage(&format!("the record cannot be read: {error}")))?;
            ledger.replay(record.seq, &record.runs, &record.retained).map_err(|error| damage(&error.to_string()))?;
            replayed.tail = record.seq.0;
            replayed.records += 1;
        }
        replayed.frames += 1;
        replayed.end = frame.end;
    }
}
