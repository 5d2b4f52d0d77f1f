//! What came together is decided on a copy of the ledger, written as one frame, synced, published and answered.

use std::sync::Arc;
use std::time::Instant;

use super::notes::{append_note, encode_leases};
use super::{KEPT_BUFFER, Waiting, Writer};
use crate::model::{Batch, BatchAnswer, Freed, Ledger, Outcome};
use crate::store::file::journal::{Header, Journal, Kind, begin_frame, finish_frame};
use crate::store::file::record::Line;
use crate::store::{StoreError, StoreErrorKind};

/// A note of leases of this length at most is written again behind every frame that would overwrite it.
const CARRIED_NOTE: usize = 16 << 10;

impl Writer {
    /// Decides, writes and answers a group of batches.
    pub(super) fn commit(&mut self, mut group: Vec<Waiting>) {
        if group.is_empty() {
            return;
        }
        self.decide_and_write(&mut group);
        for Waiting { batch, reply, answer: outcome } in group {
            // Whoever is answered has it too, and takes it apart in its own time.
            drop(batch);
            let nothing = || Err(StoreError::closed());
            let _asker_gone = reply.answer(outcome.unwrap_or_else(nothing));
        }
    }

    fn decide_and_write(&mut self, group: &mut [Waiting]) {
        for waiting in group.iter_mut() {
            waiting.answer = self.answers.get(waiting.batch.id).cloned().map(Ok);
        }
        let refuse_all = |group: &mut [Waiting], error: &StoreError| {
            for waiting in group.iter_mut().filter(|waiting| waiting.answer.is_none()) {
                waiting.answer = Some(Err(error.clone()));
            }
        };
        let entries: usize = group.iter().map(|waiting| waiting.batch.entries.len()).sum();
        let ready = self.check_files().and_then(|()| self.lock.cover_seq(self.ledger.seq().0.saturating_add(entries as u64)));
        if let Err(error) = ready {
            return refuse_all(group, &error);
        }
        let before = self.ledger.seq();
        let (mut work, mut freed) = (self.ledger.clone(), Freed::default());
        self.buffer.clear();
        let start = begin_frame(&mut self.buffer);
        let mut decided: Vec<(usize, BatchAnswer)> = Vec::with_capacity(group.len());
        for index in 0..group.len() {
            let Some(waiting) = group.get(index) else { break };
            if waiting.answer.is_some() {
                continue;
            }
            let twin =
                decided.iter().find(|(other, _)| group.get(*other).is_some_and(|other| other.batch.id == waiting.batch.id));
            let answer = match twin {
                Some((_, answer)) => Ok(answer.clone()),
                None => self.decide(&mut work, &mut freed, &waiting.batch),
            };
            match answer {
                Ok(answer) => decided.push((index, answer)),
                Err(error) => {
                    if let Some(waiting) = group.get_mut(index) {
                        waiting.answer = Some(Err(error));
                    }
                }
            }
        }
        let is_applied = |outcome: &Outcome| matches!(outcome, Outcome::Applied(_));
        if decided.iter().any(|(_, answer)| answer.outcomes.iter().any(is_applied)) {
            if let Err(error) = self.make_durable(&work, start, before.0.saturating_add(1)) {
                return refuse_all(group, &error);
            }
            self.tail = work.seq().0;
            self.ledger = work;
            self.shared.leases.free(&freed);
            self.shared.ledger.store(Arc::new(self.ledger.clone()));
            self.last_write = Instant::now();
        }
        if self.buffer.capacity() > KEPT_BUFFER {
            self.buffer = Vec::new();
        }
        for (index, answer) in decided {
            if let Some(waiting) = group.get_mut(index) {
                self.answers.put(waiting.batch.id, answer.clone());
                waiting.answer = Some(Ok(answer));
            }
        }
    }

    /// Decides one batch on `work`, and appends the lines of what was accepted to the buffer.
    fn decide(&mut self, work: &mut Ledger, freed: &mut Freed, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let (before, length) = ((work.clone(), freed.clone()), self.buffer.len());
        let answer = work.commit_freeing(&batch.entries, &*self.shared.leases, freed);
        for (entry, outcome) in batch.entries.iter().zip(&answer.outcomes) {
            let Outcome::Applied(receipt) = outcome else { continue };
            let line = Line { batch: batch.id, entry, receipt };
            if let Err(error) = serde_json::to_writer(&mut self.buffer, &line) {
                (*work, *freed) = before;
                self.buffer.truncate(length);
                return Err(StoreError::not_applied(
                    StoreErrorKind::Input,
                    format!("an entry cannot be written as JSON: {error}"),
                )
                .of_one_entry());
            }
            self.buffer.push(b'\n');
        }
        Ok(answer)
    }

    /// Brings `work` to rest: the frame in the buffer, synced; or, where the journal cannot be written, a whole new document.
    fn make_durable(&mut self, work: &Ledger, start: usize, first: u64) -> Result<(), StoreError> {
        if self.broken {
            return self.write_instead(work, None);
        }
        self.ensure_journal()?;
        let tail = self.tail;
        let Some(epoch) = self.journal.as_ref().map(|journal| journal.header().epoch) else { return Err(StoreError::closed()) };
        finish_frame(&mut self.buffer, start, epoch, Kind::Data, tail, first)?;
        let data = self.buffer.len() - start;
        let leases = self.lease_news();
        let Some(journal) = &mut self.journal else { return Err(StoreError::closed()) };
        if let Some(leases) = leases {
            encode_leases(&mut self.lease_note, &leases)?;
            append_note(&mut self.buffer, &self.lease_note, epoch, work.seq().0)?;
        } else if journal.has_provisional() && !self.lease_note.is_empty() {
            // Its place is taken now. It moves on behind this frame, or, where that costs too much, is noted again soon.
            if self.lease_note.len() <= CARRIED_NOTE {
                append_note(&mut self.buffer, &self.lease_note, epoch, work.seq().0)?;
            } else {
                self.lease_changes = self.lease_changes.wrapping_sub(1);
            }
        }
        let length = self.buffer.len();
        let room = journal.reserve(length).or_else(|error| match self.spare.take() {
            // What is kept ready for the next one is needed here.
            Some(spare) if error.kind() == StoreErrorKind::Full => {
                drop(spare);
                journal.reserve(length)
            }
            spare => {
                self.spare = spare;
                Err(error)
            }
        });
        if let Err(error) = room {
            self.note_again();
            return Err(error);
        }
        journal.append(&mut self.buffer, data).or_else(|error| {
            self.broken = true;
            self.write_instead(work, Some(error))
        })
    }

    /// After the journal failed: everything goes into a new document, or nobody knows.
    fn write_instead(&mut self, work: &Ledger, cause: Option<StoreError>) -> Result<(), StoreError> {
        // The frame may be on the disk or not, and stays in doubt until a document is there: whoever sends the batch again learns it.
        self.write_document_now(work).map_err(|error| match cause {
            Some(cause) => StoreError::unknown(cause.kind(), format!("{cause}; and no new document could be written: {error}")),
            None => error.into_unknown(),
        })
    }

    /// Whether there is no journal that can be written to, so that a document may come first.
    pub(super) fn needs_document(&self) -> bool {
        self.journal.is_none() || self.document.generation.is_none()
    }

    /// A journal that continues the document; a document first, if there is none that can be continued.
    pub(super) fn ensure_journal(&mut self) -> Result<(), StoreError> {
        if self.document.generation.is_none() {
            let ledger = self.ledger.clone();
            self.write_document_now(&ledger)?;
        }
        if self.journal.is_some() {
            return Ok(());
        }
        self.check_lock()?;
        let Some(generation) = &self.document.generation else { return Err(StoreError::closed()) };
        let header = Header::new(generation, None, self.document.seq, self.document.seq);
        self.journal = Some(Journal::create(&self.paths.journal, header, |file| self.paths.settle(&self.paths.journal, file))?);
        self.tail = self.document.seq;
        Ok(())
    }
}
