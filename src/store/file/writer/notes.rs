//! Leases live in memory. They are noted in the journal, without a promise, so that others can list them.

use std::time::{Duration, Instant};

use super::{FIRST_RETRY, LONGEST_RETRY, TICK, Writer};
use crate::store::file::journal::{Kind, begin_frame, finish_frame};
use crate::store::file::record::Leases;
use crate::store::{StoreError, StoreErrorKind};

impl Writer {
    /// The leases, if they changed since they were noted last and it is time to note them again.
    pub(super) fn lease_news(&mut self) -> Option<Leases> {
        let changes = self.shared.leases.changes();
        if changes == self.lease_changes || Instant::now() < self.lease_due {
            return None;
        }
        self.lease_changes = changes;
        let (mut leases, mut kept) = (Vec::new(), Vec::new());
        for (lease, is_kept) in self.shared.leases.with_kept() {
            kept.extend(is_kept.then_some(lease.token));
            leases.push(lease);
        }
        // Many leases are noted less often: the note must not outgrow the work.
        let pause = TICK + Duration::from_micros(20).saturating_mul(u32::try_from(leases.len()).unwrap_or(u32::MAX));
        self.lease_due = Instant::now() + pause;
        Some(Leases { leases, kept })
    }

    /// What was noted of leases is nowhere, or not where it is looked for: it is due again.
    pub(super) fn note_again(&mut self) {
        self.lease_changes = self.shared.leases.changes().wrapping_sub(1);
    }

    /// Notes the leases for others to list, without a sync: they die with this process.
    pub(super) fn note_leases(&mut self) {
        let now = Instant::now();
        if self.broken || (self.needs_document() && self.retry.is_some_and(|(at, _)| now < at)) {
            return;
        }
        let Some(leases) = self.lease_news() else { return };
        if self.journal.is_none() && leases.leases.is_empty() {
            return;
        }
        // Where there is no document yet that a journal can continue, one is written: whoever holds a lock is about to write, and others must see it.
        let noted = self.check_lock().and_then(|()| self.ensure_journal()).and_then(|()| {
            let Some(journal) = &mut self.journal else { return Ok(()) };
            self.buffer.clear();
            encode_leases(&mut self.lease_note, &leases)?;
            append_note(&mut self.buffer, &self.lease_note, journal.header().epoch, self.tail)?;
            journal.note(&mut self.buffer)
        });
        if noted.is_err() {
            // Listing is a service, no promise: it is tried again when the pause is over.
            self.note_again();
            if self.needs_document() {
                let wait = self.retry.map_or(FIRST_RETRY, |(_, wait)| (wait * 2).min(LONGEST_RETRY));
                self.retry = Some((now + wait, wait));
            }
        }
    }
}

/// The payload of a note; empty if there are no leases.
pub(super) fn encode_leases(note: &mut Vec<u8>, leases: &Leases) -> Result<(), StoreError> {
    note.clear();
    if leases.leases.is_empty() {
        return Ok(());
    }
    serde_json::to_writer(note, leases)
        .map_err(|error| StoreError::not_applied(StoreErrorKind::Input, format!("the leases cannot be written as JSON: {error}")))
}

pub(super) fn append_note(buffer: &mut Vec<u8>, note: &[u8], epoch: u64, tail: u64) -> Result<(), StoreError> {
    let start = begin_frame(buffer);
    buffer.extend_from_slice(if note.is_empty() { br#"{"leases":[]}"# } else { note });
    finish_frame(buffer, start, epoch, Kind::Leases, tail, tail)
}
