//! How leases are renewed, and how they end.

use std::time::Duration;

use tokio::sync::oneshot;

use crate::lease::DoorError;
use crate::lease::actor::Reply;
use crate::lease::error::{LeaseError, LostReason};
use crate::lease::rows::{self, Departure};
use crate::lease::table::{Cleared, Released, Ticket};
use crate::lease::trust::trusted;
use crate::model::{FencingToken, LeaseKey, LeaseRecord, Refusal, RunId};

use super::{Holding, Leaving, Manager, Store, answer};

impl Manager {
    pub(in crate::lease) fn release(&mut self, token: FencingToken, reply: Option<Reply<()>>) {
        match self.table.release(token) {
            Released::Leaving(ticket) => self.depart(ticket, None, reply),
            Released::Shared => answer(reply, Ok(())),
            Released::Unknown => answer(reply, Err(LeaseError::NotFound { token })),
        }
    }

    pub(in crate::lease) fn lost(&mut self, token: FencingToken, reason: LostReason) {
        if let Some(ticket) = self.table.force(token) {
            self.depart(ticket, Some(reason), None);
        }
    }

    pub(in crate::lease) fn force(&mut self, token: FencingToken, reply: Reply<LeaseRecord>) {
        let ticket = self.table.force(token);
        let record = ticket.and_then(|ticket| self.held.get(&ticket)).map(|held| held.record.clone());
        if let Some(ticket) = ticket {
            self.depart(ticket, Some(LostReason::Forced), None);
        }
        answer(Some(reply), record.ok_or(LeaseError::NotFound { token }));
    }

    /// Sees a lease off that has left its holder: what its run has not made durable is flushed, its row is given back, then its place is free.
    pub(super) fn depart(&mut self, ticket: Ticket, lost: Option<LostReason>, reply: Option<Reply<()>>) {
        let Some(Holding { grant, .. }) = self.held.remove(&ticket) else { return };
        let (key, token) = (grant.key.clone(), grant.token);
        // What the holder wrote is in the next one's first look, also if it has not come to rest yet.
        let mut flush = self.context.door.has_unsettled(&key.run);
        let mut barred = true;
        let row = match &self.store {
            Store::Book { book, .. } => {
                // What a holder wrote before it released is still covered by its fence.
                if lost.is_some() || !flush {
                    book.remove(&key, token);
                    // What was decided under the lease a moment ago is on its way; nothing more is decided under it now.
                    flush = self.context.door.has_unsettled(&key.run);
                } else {
                    barred = false;
                }
                None
            }
            Store::Rows { keeper, .. } => {
                if grant.keep_alive {
                    keeper.forget(token);
                }
                Some(token)
            }
        };
        // Only now: whoever has heard that it is lost writes nothing under it any more.
        if let Some(reason) = lost {
            grant.trust.lose(reason);
            match reason {
                LostReason::RunEnded | LostReason::Closed | LostReason::Ended => {
                    tracing::debug!(%key, %token, %reason, "a lock has ended");
                }
                _ => tracing::warn!(%key, %token, %reason, "a lock was lost"),
            }
        }
        let leaving = Leaving { key: key.clone(), token, replies: reply.into_iter().collect(), barred };
        // What somebody took away is not held any more: its place is free, and its row, if it was merely over by the server's clock, goes in its own time.
        let over = lost == Some(LostReason::Forced);
        if flush || row.is_some() {
            rows::depart(&self.context, &self.myself, Departure { ticket, key, flush, row, lost: lost.is_some() });
        }
        if flush || (row.is_some() && !over) {
            self.leaving.insert(ticket, leaving);
        } else {
            self.vacate(ticket, leaving, Ok(()));
        }
    }

    pub(in crate::lease) fn left(&mut self, ticket: Ticket, result: Result<(), LeaseError>) {
        let Some(mut leaving) = self.leaving.remove(&ticket) else { return };
        if let (Store::Book { book, .. }, false) = (&self.store, leaving.barred) {
            book.remove(&leaving.key, leaving.token);
            // What others decided under it while all was flushed is on its way; nothing more is decided under it now.
            if result.is_ok() && self.context.door.has_unsettled(&leaving.key.run) {
                leaving.barred = true;
                let departure = Departure { ticket, key: leaving.key.clone(), flush: true, row: None, lost: false };
                self.leaving.insert(ticket, leaving);
                return rows::depart(&self.context, &self.myself, departure);
            }
        }
        self.vacate(ticket, leaving, result);
    }

    fn vacate(&mut self, ticket: Ticket, leaving: Leaving, result: Result<(), LeaseError>) {
        for reply in leaving.replies {
            answer(Some(reply), result.clone());
        }
        let next = self.table.vacate(ticket);
        self.context.door.vacated(&leaving.key);
        self.claim(next);
    }

    pub(in crate::lease) fn renew(&mut self, token: FencingToken, reply: Reply<()>) {
        self.catch_up();
        let Some(held) = self.table.holder(token).and_then(|ticket| self.held.get_mut(&ticket)) else {
            return answer(Some(reply), Err(LeaseError::NotFound { token }));
        };
        let grant = &held.grant;
        match &self.store {
            Store::Rows { .. } => {
                rows::renew(&self.context, &self.myself, grant.key.clone(), token, held.record.ttl_ms, reply);
            }
            Store::Book { book, .. } => {
                let now = self.context.time.now();
                let until = now.saturating_add(grant.ttl);
                let deadline = (!grant.keep_alive).then(|| self.context.time.instant(until));
                let record = held.record.clone().renewed(self.context.now());
                // Its run may have ended a moment ago, and it is void.
                let renewed = grant.trust.extend(until).is_ok()
                    && self.table.renew(token, until, now)
                    && book.confirm(record.clone(), deadline);
                if renewed {
                    held.record = record;
                }
                answer(Some(reply), if renewed { Ok(()) } else { Err(LeaseError::NotFound { token }) });
            }
        }
    }

    pub(in crate::lease) fn renewed(
        &mut self,
        token: FencingToken,
        start: Duration,
        result: Result<(), DoorError>,
        reply: Reply<()>,
    ) {
        let now = self.now();
        let gone = Err(LeaseError::NotFound { token });
        let Some(held) = self.table.holder(token).and_then(|ticket| self.held.get_mut(&ticket)) else {
            return answer(Some(reply), gone);
        };
        let result = match result {
            Ok(()) => {
                let until = start.saturating_add(trusted(held.grant.ttl));
                if held.grant.trust.extend(until).is_ok() && self.table.renew(token, until, now) { Ok(()) } else { gone }
            }
            Err(DoorError::Refused(Refusal::LeaseGone { .. })) => {
                self.lost(token, LostReason::Forced);
                gone
            }
            Err(error) => Err(error.into()),
        };
        answer(Some(reply), result);
    }

    /// What the end of the run took is out of the book since its commit; what is in it was granted behind that.
    pub(in crate::lease) fn free_run(&mut self, run: &RunId) {
        let cleared = match &self.store {
            Store::Book { book, .. } => self.table.clear_run(run, |key, token| book.has(key, token)),
            Store::Rows { .. } => self.table.clear_run(run, |_, _| false),
        };
        self.end_all(cleared, LostReason::RunEnded, |key| LeaseError::RunEnded { key });
    }

    fn end_all(&mut self, cleared: Cleared, reason: LostReason, why: impl Fn(LeaseKey) -> LeaseError) {
        for ticket in cleared.waiting {
            if let Some(mut pending) = self.pending.remove(&ticket) {
                let error = why(pending.key.clone());
                pending.answer(Err(error));
            }
        }
        for ticket in cleared.claimed {
            let Some(pending) = self.pending.get_mut(&ticket) else { continue };
            let error = why(pending.key.clone());
            pending.answer(Err(error));
            self.cancel(ticket);
        }
        for ticket in cleared.held {
            self.depart(ticket, Some(reason), None);
        }
    }

    pub(in crate::lease) fn close(&mut self, reply: Option<oneshot::Sender<()>>) {
        self.closing.get_or_insert_default().extend(reply);
        for run in self.table.run_ids().cloned().collect::<Vec<_>>() {
            let cleared = self.table.clear_run(&run, |_, _| false);
            self.end_all(cleared, LostReason::Closed, |_| LeaseError::Closed);
        }
    }

    /// Whether all is closed that was to be closed; then those who waited for it know.
    pub(in crate::lease) fn finish_closing(&mut self) -> bool {
        match &mut self.closing {
            Some(waiting) if self.table.is_empty() => {
                for reply in waiting.drain(..) {
                    let _caller_gone = reply.send(());
                }
                true
            }
            _ => false,
        }
    }
}
