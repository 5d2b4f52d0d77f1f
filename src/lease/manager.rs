//! What the lock manager does with each message: the table decides, this carries.

mod ends;
mod places;
mod waits;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ractor::ActorRef;
use tokio::sync::oneshot;

use crate::model::{FencingToken, LeaseKey, LeaseOwner, LeaseRecord, ProcessInfo, Refusal};
use crate::store::{LeaseBook, LeaseStore, StoreError, StoreErrorKind};

use super::DoorError;
use super::actor::{Asker, Message, Reply, Request, Timer};
use super::error::{LeaseError, LostReason};
use super::guard::{Grant, Lease};
use super::keeper::Keeper;
use super::options::Terms;
use super::rows::{self, Attempt, Context, Departure};
use super::table::{Ask, Asked, LeaseTable, Ticket};
use super::tokens::{self, Tokens};
use super::trust::{Trust, trusted};

use self::waits::Waits;

/// A request that is waiting or claimed.
struct Pending {
    terms: Terms,
    key: LeaseKey,
    owner: LeaseOwner,
    wait_until: Option<Duration>,
    /// `None`: the caller was answered or is gone, and only the storage's answer is awaited.
    reply: Option<Asker>,
    /// The storage was asked and has not answered.
    in_flight: bool,
    /// How often the storage said that another process holds it.
    refused: u32,
    /// The token under which it stands in the book, while an entry on its way is to grant it.
    placed: Option<FencingToken>,
}

impl Pending {
    fn answer(&mut self, answer: Result<Option<Lease>, LeaseError>) {
        // A guard that finds nobody is dropped here, and so released.
        match self.reply.take() {
            Some(Asker::Lease(reply)) => {
                let _caller_gone = reply.send(answer);
            }
            // It is answered with a place elsewhere; here only with why there is none.
            Some(Asker::Place(reply)) => {
                let _caller_gone = reply.send(answer.map(|_| None));
            }
            None => {}
        }
    }
}

struct Holding {
    grant: Arc<Grant>,
    record: LeaseRecord,
    /// Whether its run was there when it was granted, as far as that is known here: one can lock a name that is none yet.
    in_run: bool,
}

/// A lease that is given back; those who asked for it are answered when its place is free.
struct Leaving {
    key: LeaseKey,
    token: FencingToken,
    replies: Vec<Reply<()>>,
    /// Whether nothing more is decided under it.
    barred: bool,
}

/// Where the leases are kept.
enum Store {
    /// In this process. A grant takes a token from a reserved block; who finds none waits for the next block.
    Book { book: Arc<LeaseBook>, tokens: Tokens, without_token: VecDeque<Ticket> },
    /// As rows. Who finds another process there looks again later.
    Rows { keeper: Keeper, waits: Waits },
}

/// The state of the lock manager.
pub(super) struct Manager {
    myself: ActorRef<Message>,
    context: Arc<Context>,
    process: ProcessInfo,
    store: Store,
    table: LeaseTable,
    pending: HashMap<Ticket, Pending>,
    held: HashMap<Ticket, Holding>,
    leaving: HashMap<Ticket, Leaving>,
    timer: Timer,
    /// Who waits for the end; `None` while the room is open.
    closing: Option<Vec<oneshot::Sender<()>>>,
}

impl Manager {
    pub(super) fn start(myself: ActorRef<Message>, context: Arc<Context>) -> std::io::Result<Self> {
        let store = match context.backend.lease_store() {
            LeaseStore::Book(book) => Store::Book { book, tokens: Tokens::default(), without_token: VecDeque::new() },
            // Nobody is let in to ask for one.
            LeaseStore::None => Store::Book { book: Arc::default(), tokens: Tokens::default(), without_token: VecDeque::new() },
            LeaseStore::Rows => Store::Rows { keeper: Keeper::start(&context, &myself)?, waits: Waits::default() },
        };
        let process = context.process.clone();
        let timer = Timer::start(myself.clone(), Arc::clone(&context.time));
        Ok(Self {
            myself,
            context,
            process,
            store,
            table: LeaseTable::default(),
            pending: HashMap::new(),
            held: HashMap::new(),
            leaving: HashMap::new(),
            timer,
            closing: None,
        })
    }

    fn now(&self) -> Duration {
        self.context.time.now()
    }

    pub(super) fn acquire(&mut self, request: Request) {
        let Request { ticket, key, terms, wait_until, reply } = request;
        let mut pending = Pending {
            owner: self.owner(&terms, ticket),
            terms,
            key: key.clone(),
            wait_until,
            reply: Some(reply),
            in_flight: false,
            refused: 0,
            placed: None,
        };
        if self.closing.is_some() {
            return pending.answer(Err(LeaseError::Closed));
        }
        self.catch_up();
        // Who asks for a place stands for itself: any number of tasks may claim under one name.
        let owner = if matches!(pending.reply, Some(Asker::Place(_))) { None } else { pending.terms.owner.clone() };
        let ask = Ask { ticket, key: key.clone(), owner, reentrant: pending.terms.reentrant, wait_until };
        match self.table.ask(ask) {
            Asked::Claimed => {
                self.pending.insert(ticket, pending);
                self.claim(vec![ticket]);
            }
            Asked::Queued => {
                self.pending.insert(ticket, pending);
            }
            Asked::Joined(token) => {
                let lease =
                    self.table.holder(token).and_then(|holder| self.held.get(&holder)).map(|held| self.lease(&held.grant));
                pending.answer(lease.map(Some).ok_or(LeaseError::NotFound { token }));
            }
            Asked::Busy => pending.answer(Ok(None)),
            Asked::Reentrant { own } => {
                let owner = Arc::clone(&pending.owner.name);
                pending.answer(Err(LeaseError::Reentrant { owner, wanted: key, own }));
            }
            Asked::Deadlock { cycle } => pending.answer(Err(LeaseError::Deadlock { wanted: key, cycle })),
        }
    }

    fn owner(&self, terms: &Terms, ticket: Ticket) -> LeaseOwner {
        let name = terms.owner.clone().unwrap_or_else(|| Arc::from(format!("unnamed-{}", ticket.0)));
        LeaseOwner { process: self.process.clone(), name }
    }

    fn lease(&self, grant: &Arc<Grant>) -> Lease {
        Lease::new(Arc::clone(grant), self.myself.clone())
    }

    /// Goes on with requests that nothing in this process is in the way of any more.
    fn claim(&mut self, tickets: Vec<Ticket>) {
        let mut todo = VecDeque::from(tickets);
        while let Some(ticket) = todo.pop_front() {
            let wanted =
                self.pending.get(&ticket).and_then(|pending| pending.reply.as_ref()).is_some_and(|reply| !reply.is_closed());
            if !wanted {
                self.pending.remove(&ticket);
                todo.extend(self.table.vacate(ticket));
                continue;
            }
            let place = matches!(self.pending.get(&ticket), Some(Pending { reply: Some(Asker::Place(_)), .. }));
            match &mut self.store {
                Store::Book { tokens, without_token, .. } => {
                    let token = tokens.next();
                    if tokens.must_reserve() {
                        rows::reserve(&self.context, &self.myself, tokens::BLOCK);
                    }
                    match token {
                        Some(token) if place => self.hand_out(ticket, Some(token)),
                        Some(token) => self.grant(ticket, token, self.now()),
                        None => without_token.push_back(ticket),
                    }
                }
                Store::Rows { .. } if place => self.hand_out(ticket, None),
                Store::Rows { .. } => self.attempt(ticket),
            }
        }
    }

    /// Gives a claimed lease to its caller. `start` is a moment at which it had not begun yet.
    fn grant(&mut self, ticket: Ticket, token: FencingToken, start: Duration) {
        let Some(mut pending) = self.pending.remove(&ticket) else { return };
        let Pending { terms, key, owner, .. } = &pending;
        let ttl = Duration::from_millis(terms.ttl_ms);
        let rows = matches!(self.store, Store::Rows { .. });
        // In the book a lease that is kept alive ends with its guard, and with this process.
        let until = match (rows, terms.keep_alive) {
            (false, true) => None,
            (false, false) => Some(start.saturating_add(ttl)),
            (true, _) => Some(start.saturating_add(trusted(ttl))),
        };
        let record = LeaseRecord::new(key.clone(), token, owner.clone(), terms.purpose.clone(), self.context.now(), terms.ttl_ms);
        if let Store::Book { book, .. } = &self.store {
            let deadline = until.map(|until| self.context.time.instant(until));
            match deadline {
                _ if pending.placed.is_some() => {
                    // Behind the entry that granted it its run may have ended already.
                    if !book.confirm(record.clone(), deadline) {
                        let ended = LeaseError::RunEnded { key: key.clone() };
                        self.pending.insert(ticket, pending);
                        return self.fail(ticket, Err(ended));
                    }
                }
                Some(_) => book.put(record.clone(), deadline),
                None => book.keep(record.clone()),
            }
        }
        let trust = Trust::new(Arc::clone(&self.context.time), until);
        let grant = Arc::new(Grant {
            key: key.clone(),
            token,
            ttl,
            keep_alive: terms.keep_alive,
            trust,
            returning: AtomicBool::new(false),
        });
        // The keeper says when a lease is lost that it keeps alive.
        let expires = if rows && terms.keep_alive { None } else { until };
        let sharing = self.table.confirm(ticket, token, expires);
        if let Store::Rows { keeper, .. } = &self.store
            && terms.keep_alive
        {
            keeper.keep(Arc::clone(&grant));
        }
        let in_run = rows && self.context.door.is_there(&key.run);
        self.held.insert(ticket, Holding { grant: Arc::clone(&grant), record, in_run });
        pending.answer(Ok(Some(self.lease(&grant))));
        for other in sharing {
            let lease = self.lease(&grant);
            if let Some(mut pending) = self.pending.remove(&other) {
                pending.answer(Ok(Some(lease)));
            }
        }
    }

    /// Asks the storage, where leases are rows.
    fn attempt(&mut self, ticket: Ticket) {
        let Some(pending) = self.pending.get_mut(&ticket) else { return };
        pending.in_flight = true;
        let Pending { key, owner, terms, .. } = &*pending;
        let attempt =
            Attempt { ticket, key: key.clone(), owner: owner.clone(), purpose: terms.purpose.clone(), ttl_ms: terms.ttl_ms };
        rows::attempt(&self.context, &self.myself, attempt);
    }

    pub(super) fn attempted(&mut self, ticket: Ticket, start: Duration, result: Result<FencingToken, DoorError>) {
        let now = self.now();
        let Some(pending) = self.pending.get_mut(&ticket) else { return };
        pending.in_flight = false;
        match result {
            Ok(token) => {
                let ttl = Duration::from_millis(pending.terms.ttl_ms);
                let too_late = matches!(self.store, Store::Rows { .. }) && now >= start.saturating_add(trusted(ttl));
                if too_late {
                    let message = format!(
                        "the storage took longer to grant the lock on {} than the lock would last ({ttl:?}); ask for a longer ttl (`seeknal state locks` lists who works there)",
                        pending.key
                    );
                    pending.answer(Err(StoreError::not_applied(StoreErrorKind::Busy, message).into()));
                }
                if pending.reply.is_some() {
                    return self.grant(ticket, token, start);
                }
                let key = pending.key.clone();
                self.pending.remove(&ticket);
                rows::depart(
                    &self.context,
                    &self.myself,
                    Departure { ticket, key: key.clone(), flush: false, lost: true, row: Some(token) },
                );
                self.leaving.insert(ticket, Leaving { key, token, replies: Vec::new(), barred: true });
            }
            Err(DoorError::Refused(Refusal::LeaseHeld { holder })) => {
                self.wait_for(ticket, &holder);
            }
            Err(error) => self.fail(ticket, Err(error.into())),
        }
    }

    /// Ends a claim that comes to nothing.
    fn fail(&mut self, ticket: Ticket, answer: Result<Option<Lease>, LeaseError>) {
        if let Some(mut pending) = self.pending.remove(&ticket) {
            if let (Store::Book { book, .. }, Some(token)) = (&self.store, pending.placed) {
                book.remove(&pending.key, token);
            }
            pending.answer(answer);
        }
        let next = self.table.vacate(ticket);
        self.claim(next);
    }

    pub(super) fn cancel(&mut self, ticket: Ticket) {
        let Some(pending) = self.pending.get_mut(&ticket) else { return };
        if pending.in_flight {
            pending.reply = None;
        } else {
            self.fail(ticket, Ok(None));
        }
    }

    pub(super) fn tokens(&mut self, block: Result<Range<u64>, StoreError>) {
        let Store::Book { tokens, without_token, .. } = &mut self.store else { return };
        let waiting: Vec<Ticket> = without_token.drain(..).collect();
        match block {
            Ok(block) => {
                tokens.reserved(Some(block));
                self.claim(waiting.into_iter().filter(|ticket| self.pending.contains_key(ticket)).collect());
            }
            Err(error) => {
                tokens.reserved(None);
                tracing::warn!(%error, "no fencing tokens could be reserved");
                for ticket in waiting.into_iter().filter(|ticket| self.pending.contains_key(ticket)).collect::<Vec<_>>() {
                    self.fail(ticket, Err(error.clone().into()));
                }
            }
        }
    }

    /// The leases that are held, where they are kept in this process.
    pub(super) fn list(&mut self, reply: Reply<Vec<LeaseRecord>>) {
        self.catch_up();
        let now = self.context.now();
        let present = |held: &Holding| {
            // Kept alive by its guard, it could at any time be renewed for its whole TTL.
            if held.grant.keep_alive { held.record.clone().renewed(now) } else { held.record.clone() }
        };
        let mut records: Vec<LeaseRecord> = self.held.values().map(present).collect();
        records.sort_by_key(|record| record.token);
        answer(Some(reply), Ok(records));
    }

    pub(super) fn tick(&mut self) {
        self.catch_up();
        let next = self.next_deadline();
        self.timer.ticked(next);
    }

    pub(super) fn arm(&mut self) {
        let next = self.next_deadline();
        self.timer.arm(next);
    }

    fn next_deadline(&self) -> Option<Duration> {
        let again = match &self.store {
            Store::Rows { waits, .. } => waits.next(),
            Store::Book { .. } => None,
        };
        self.table.next_deadline().into_iter().chain(again).min()
    }

    /// Does what the time asks for: a message that comes before the tick must not see what is over.
    fn catch_up(&mut self) {
        if self.next_deadline().is_none() {
            return;
        }
        let now = self.now();
        for ticket in self.table.expire(now) {
            self.depart(ticket, Some(LostReason::Expired), None);
        }
        let (late, next) = self.table.time_out(now);
        for ticket in late {
            if let Some(mut pending) = self.pending.remove(&ticket) {
                pending.answer(Ok(None));
            }
        }
        self.claim(next);
        self.look(now);
    }
}

impl Drop for Manager {
    /// However the manager ends, also by a panic: nobody goes on under a lease that nobody looks after.
    fn drop(&mut self) {
        for Holding { grant, .. } in self.held.values() {
            grant.trust.lose(LostReason::Closed);
            if let Store::Book { book, .. } = &self.store {
                book.remove(&grant.key, grant.token);
            }
        }
        if let Store::Book { book, .. } = &self.store {
            for leaving in self.leaving.values() {
                book.remove(&leaving.key, leaving.token);
            }
            for (pending, token) in self.pending.values().filter_map(|pending| Some((pending, pending.placed?))) {
                book.remove(&pending.key, token);
            }
        }
    }
}

fn answer<T>(reply: Option<Reply<T>>, result: Result<T, LeaseError>) {
    if let Some(reply) = reply {
        let _caller_gone = reply.send(result);
    }
}
