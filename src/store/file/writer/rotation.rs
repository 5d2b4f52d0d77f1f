//! When the journal is brought into a document, and what the writer does meanwhile.

use std::time::Instant;

use super::{
    BEHIND, CHECKPOINT_FACTOR, CHECKPOINT_FLOOR, FIRST_RETRY, IDLE, IDLE_SHARE, Known, LONGEST_RETRY, LOOK, Reply, Writer,
    answer, new_generation,
};
use crate::store::file::checkpoint::{self, Job, Task};
use crate::store::file::journal::{self, Header, Journal};
use crate::store::file::paths;
use crate::store::file::recover::Pending;
use crate::store::file::spare::SpareJob;
use crate::store::{StoreError, StoreErrorKind};

/// Space for the next journal comes in steps of this.
const SPACE: u64 = 1 << 20;

impl Writer {
    /// Whether something was written that the document does not have.
    pub(super) fn is_dirty(&self) -> bool {
        self.broken || self.pending.is_some() || self.journal.as_ref().is_some_and(|journal| journal.frames() > 0)
    }

    /// A checkpoint that somebody asked for.
    pub(super) fn checkpoint(&mut self, reply: Reply<()>) {
        if let Some(error) = &self.poisoned {
            return answer(reply, Err(error.clone()));
        }
        if !self.is_dirty() {
            return answer(reply, Ok(()));
        }
        // Up to the last record: behind a crash the ledger's own number is beyond all that may have been used, and no document need ever get there.
        self.waiting.push((self.tail, reply));
        if self.job.is_none()
            && let Err(error) = self.begin_checkpoint()
        {
            self.fail_waiting(&error);
        }
    }

    pub(super) fn fail_waiting(&mut self, error: &StoreError) {
        for (_, reply) in self.waiting.drain(..) {
            answer(reply, Err(error.clone()));
        }
    }

    /// Rotates to the next journal and begins to write the document that it continues. A document that failed before is tried again.
    pub(super) fn begin_checkpoint(&mut self) -> Result<(), StoreError> {
        if self.broken || self.document.generation.is_none() {
            let ledger = self.ledger.clone();
            self.write_document_now(&ledger)?;
            self.answer_waiting();
            return Ok(());
        }
        if self.pending.is_none() {
            self.rotate().or_else(|error| {
                let again = error.kind() == StoreErrorKind::Full && self.give_back_space();
                if again { self.rotate() } else { Err(error) }
            })?;
        }
        let Some(pending) = &self.pending else { return Ok(()) };
        let task = Task {
            paths: self.paths.clone(),
            ledger: pending.ledger.clone(),
            generation: pending.generation.clone(),
            follows: pending.follows.clone(),
            shape: self.shape.clone(),
            expected: self.expected(),
        };
        self.job = Some(Job::spawn(task, self.sender.clone())?);
        Ok(())
    }

    /// Checks that nobody else touched the document; if somebody did, nothing more is written.
    pub(super) fn check_document(&mut self) -> Result<(), StoreError> {
        checkpoint::check(&self.paths, self.document.identity).inspect_err(|error| self.document_failed(error, None))
    }

    pub(super) fn rotate(&mut self) -> Result<(), StoreError> {
        self.check_lock()?;
        self.check_document()?;
        let Some(journal) = &self.journal else { return Ok(()) };
        let follows = journal.header().generation.clone();
        let generation = new_generation();
        let header = Header::new(&generation, Some(&follows), self.ledger.seq().0, self.tail);
        let used = journal.used();
        let made = match self.spare.take_if(|spare| spare.is_ready()).and_then(SpareJob::take) {
            Some(spare) => {
                Journal::create_from(spare.path(), &self.paths.next, header, |file| self.paths.settle(&self.paths.next, file))
            }
            None => Journal::create(&self.paths.next, header, |file| self.paths.settle(&self.paths.next, file)),
        };
        let next = made.inspect_err(|_| {
            // Half made, it would look like a journal that goes on where this one ended; with no record in it, it is passed over.
            let _passed_over = paths::remove(&self.paths.next);
        })?;
        self.journal = Some(next);
        self.last_space = used.next_multiple_of(SPACE);
        self.tail = self.ledger.seq().0;
        if !self.lease_note.is_empty() {
            // They are noted in the new one too.
            self.note_again();
        }
        self.pending = Some(Pending { ledger: self.ledger.clone(), generation, follows });
        Ok(())
    }

    /// Takes notice of the end of a checkpoint.
    pub(super) fn checkpoint_ended(&mut self, done: checkpoint::Done) {
        match done.result {
            Ok(identity) => {
                self.keeps_previous = false;
                self.lock.skipped();
                if let Some(pending) = self.pending.take() {
                    self.document =
                        Known { identity: Some(identity), generation: Some(pending.generation), seq: pending.ledger.seq().0 };
                }
                if let Some(journal) = &mut self.journal {
                    if done.renamed {
                        journal.renamed(&self.paths.journal);
                    } else {
                        // The next rotation would write over it. A whole document now, and a new journal after it.
                        self.broken = true;
                    }
                }
                self.retry = None;
                self.last_checkpoint = Some((Instant::now(), done.took));
                self.answer_waiting();
                let document = self.document.identity.map_or(0, |identity| identity.size());
                // One that is still in the making is good for the one after: whoever drops it waits for its end.
                if self.spare.as_ref().is_none_or(SpareJob::is_ready) {
                    self.spare = SpareJob::spawn(self.paths.temporary(), self.last_space, document);
                }
            }
            Err(failed) => {
                self.document_failed(&failed.error, failed.placed);
                let wait = self.retry.map_or(FIRST_RETRY, |(_, wait)| (wait * 2).min(LONGEST_RETRY));
                self.retry = Some((Instant::now() + wait, wait));
                if failed.error.kind() == StoreErrorKind::Full && self.give_back_space() {
                    // Here and now: commits would take what it gave back before the document had it.
                    let ledger = self.ledger.clone();
                    if self.write_document_now(&ledger).is_ok() {
                        return self.answer_waiting();
                    }
                }
                self.fail_waiting(&failed.error);
            }
        }
    }

    /// Gives the disk back what is kept ready and holds nothing, because the document finds no room. Says whether there was any.
    pub(super) fn give_back_space(&mut self) -> bool {
        let mut gave = self.spare.take().is_some();
        // Of a journal that failed nobody knows what is in it, and without the lock the files may be somebody else's.
        if self.broken || self.check_lock().is_err() {
            return gave;
        }
        if let Some(journal) = &mut self.journal {
            match journal.give_back() {
                Ok(given) => gave |= given,
                Err(_) => self.broken = true,
            }
        }
        if self.pending.is_some() {
            // The one before it is done with, but for reading it.
            gave |= journal::give_back(&self.paths.journal).unwrap_or(false);
        }
        gave
    }

    /// Answers those whose writes the document holds now.
    pub(super) fn answer_waiting(&mut self) {
        let seq = self.document.seq;
        let (done, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|(wanted, _)| *wanted <= seq);
        self.waiting = waiting;
        for (_, reply) in done {
            answer(reply, Ok(()));
        }
    }

    /// What is due now and then: leases to note, the end of a checkpoint, the beginning of one, a look at the document.
    pub(super) fn look_around(&mut self) {
        if let Some(done) = self.job.as_ref().and_then(Job::poll) {
            self.job = None;
            self.checkpoint_ended(done);
        }
        if let Some(error) = self.poisoned.clone() {
            return self.fail_waiting(&error);
        }
        let now = Instant::now();
        if now.duration_since(self.last_look) >= LOOK {
            self.last_look = now;
            // While a checkpoint runs, the document changes by our own hand.
            if self.job.is_none() {
                // A fault of the system is met again where it matters; a document that was replaced poisons.
                if self.check_document().is_err() && self.poisoned.is_some() {
                    return;
                }
            }
        }
        self.note_leases();
        let wanted = !self.waiting.is_empty() || self.is_checkpoint_due(now);
        if wanted
            && self.job.is_none()
            && self.is_dirty()
            && self.retry.is_none_or(|(at, _)| now >= at)
            && let Err(error) = self.begin_checkpoint()
        {
            let wait = self.retry.map_or(FIRST_RETRY, |(_, wait)| (wait * 2).min(LONGEST_RETRY));
            self.retry = Some((now + wait, wait));
            self.fail_waiting(&error);
        }
    }

    pub(super) fn is_checkpoint_due(&self, now: Instant) -> bool {
        let used = self.journal.as_ref().map_or(0, Journal::used);
        let size = self.document.identity.map_or(0, |identity| identity.size());
        if self.broken || self.pending.is_some() || used >= CHECKPOINT_FLOOR.max(size.saturating_mul(CHECKPOINT_FACTOR)) {
            return true;
        }
        let rested = self.last_checkpoint.is_none_or(|(at, took)| now.duration_since(at) >= took * IDLE_SHARE);
        let since = self.journal.as_ref().and_then(Journal::since);
        let behind = since.is_some_and(|at| now.duration_since(at) >= BEHIND);
        rested && (behind || now.duration_since(self.last_write) >= IDLE)
    }
}
