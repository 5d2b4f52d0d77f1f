//! Places: leases that an entry of their holder grants, together with what it writes.

use std::time::Duration;

use crate::lease::actor::{Asker, Reply};
use crate::lease::error::LeaseError;
use crate::lease::guard::Lease;
use crate::lease::place::Place;
use crate::lease::rows::{self, Departure};
use crate::lease::table::{Released, Ticket};
use crate::model::{FencingToken, LeaseKey, LeaseRecord};

use super::{Holding, Manager, Pending, Store, answer};

impl Manager {
    /// Gives a claimed place to who asked for it. Dropped, also unread, it comes back by a message.
    pub(super) fn hand_out(&mut self, ticket: Ticket, token: Option<FencingToken>) {
        let now = self.now();
        let Some(pending) = self.pending.get_mut(&ticket) else { return };
        let Some(Asker::Place(reply)) = pending.reply.take() else { return };
        if let (Store::Book { book, .. }, Some(token)) = (&self.store, token) {
            let Pending { key, owner, terms, .. } = &*pending;
            let record =
                LeaseRecord::new(key.clone(), token, owner.clone(), terms.purpose.clone(), self.context.now(), terms.ttl_ms);
            book.place(record);
            pending.placed = Some(token);
        }
        let place = Place::new(
            self.myself.clone(),
            std::sync::Arc::clone(&self.context),
            ticket,
            pending.key.clone(),
            pending.owner.clone(),
            &pending.terms,
            now,
            token,
        );
        let _caller_gone = reply.send(Ok(Some(place)));
    }

    /// The entry was committed: its holder gets the guard.
    pub(in crate::lease) fn confirm(
        &mut self,
        ticket: Ticket,
        key: LeaseKey,
        token: FencingToken,
        start: Duration,
        reply: Reply<Option<Lease>>,
    ) {
        let closing = self.closing.is_some();
        let Some(pending) = self.pending.get_mut(&ticket) else {
            // The run ended meanwhile, or all is closing: the place is somebody else's.
            if matches!(self.store, Store::Rows { .. }) {
                let row = Some(token);
                rows::depart(&self.context, &self.myself, Departure { ticket, key: key.clone(), flush: false, lost: true, row });
            }
            return answer(Some(reply), Err(if closing { LeaseError::Closed } else { LeaseError::RunEnded { key } }));
        };
        pending.reply = Some(Asker::Lease(reply));
        self.attempted(ticket, start, Ok(token));
    }

    /// The entry of a holder gave its lease back: nothing is left to be asked of the storage.
    pub(in crate::lease) fn returned(&mut self, token: FencingToken) {
        let Released::Leaving(ticket) = self.table.release(token) else { return };
        let held = self.held.remove(&ticket);
        if let Some(Holding { grant, .. }) = &held {
            match &self.store {
                Store::Book { book, .. } => book.remove(&grant.key, token),
                Store::Rows { keeper, .. } => keeper.forget(token),
            }
        }
        let next = self.table.vacate(ticket);
        if let Some(Holding { grant, .. }) = held {
            self.context.door.vacated(&grant.key);
        }
        self.claim(next);
    }
}
