//! Keeps leases alive where they are rows: on a thread of its own, so that a runtime whose workers are all blocked loses no lease.
//!
//! Every third of its TTL a lease is due. All that are due go in one batch, one entry each, so that one that is gone takes no other along; what
//! falls due meanwhile is the next batch. A lease whose trust ends before a renewal was answered is lost, whatever is answered later.
//!
//! Most leases are given back long before they are due: the thread is not woken for what it only has to know by then.

use std::collections::{BTreeSet, HashMap};
use std::future::pending;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ractor::ActorRef;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::model::{Batch, BatchAnswer, Entry, FencingToken, LeaseMutation, Outcome, Refusal};
use crate::store::{StoreError, StoreErrorKind};

use super::actor::Message;
use super::error::LostReason;
use super::guard::Grant;
use super::rows::Context;
use super::trust::trusted;

/// Commands that wait at most, before the thread is woken to take them in.
const MOST_WAITING: usize = 256;

enum Command {
    Keep(Arc<Grant>),
    Forget(FencingToken),
    /// It may be gone, and why: its next renewal is due now.
    Doubt(FencingToken, LostReason),
}

/// What the thread has not taken in yet.
#[derive(Default)]
struct Inbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Default)]
struct Waiting {
    commands: Vec<Command>,
    /// When the thread looks by itself; zero while it is at work: it looks before it sleeps.
    next_look: Duration,
    closed: bool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts something in that has to be known by then.
    fn put(&self, command: Command, by: Duration) {
        let mut waiting = self.lock();
        waiting.commands.push(command);
        if by < waiting.next_look || (waiting.commands.len() >= MOST_WAITING && waiting.next_look > Duration::ZERO) {
            waiting.next_look = Duration::ZERO;
            drop(waiting);
            self.wake.notify_one();
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    /// Everything that waits; `None`: it is closed.
    fn take(&self) -> Option<Vec<Command>> {
        let mut waiting = self.lock();
        waiting.next_look = Duration::ZERO;
        (!waiting.closed).then(|| std::mem::take(&mut waiting.commands))
    }

    /// The thread sleeps from now on, unless something waits already.
    fn may_sleep(&self, until: Option<Duration>) -> bool {
        let mut waiting = self.lock();
        let may = waiting.commands.is_empty() && !waiting.closed;
        if may {
            waiting.next_look = until.unwrap_or(Duration::MAX);
        }
        may
    }
}

/// The way to the keeper's thread, which ends when this is dropped.
pub(super) struct Keeper {
    inbox: Arc<Inbox>,
}

impl Keeper {
    pub(super) fn start(context: &Arc<Context>, manager: &ActorRef<Message>) -> std::io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let rounds = Rounds::new(Arc::clone(context), manager.clone(), Arc::clone(&inbox));
        let (ready, started) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("seeknal-leases".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let (runtime, told) = match runtime {
                Ok(runtime) => (Some(runtime), ready.send(Ok(()))),
                Err(error) => (None, ready.send(Err(error))),
            };
            if let (Some(runtime), Ok(())) = (runtime, told) {
                runtime.block_on(rounds.run());
            }
        })?;
        started.recv().unwrap_or_else(|_| Err(std::io::Error::other("the thread that keeps locks alive ended at once")))?;
        Ok(Self { inbox })
    }

    /// Renews a lease from now on. Without its thread the lease ends with its first trust, and its guard says so.
    pub(super) fn keep(&self, grant: Arc<Grant>) {
        // One that is lost already is told of at once.
        let due = grant.trust.state().ok().flatten().map_or(Duration::ZERO, |end| first_due(&grant, end));
        self.inbox.put(Command::Keep(grant), due);
    }

    /// Asks storage now whether a lease is still held, by a renewal; `why`: what it is lost by, if it is.
    pub(super) fn doubt(&self, token: FencingToken, why: LostReason) {
        self.inbox.put(Command::Doubt(token, why), Duration::ZERO);
    }

    /// Renews a lease no more.
    pub(super) fn forget(&self, token: FencingToken) {
        self.inbox.put(Command::Forget(token), Duration::MAX);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.inbox.close();
    }
}

/// The attempt to get it may have taken a while: the first renewal counts from when trust began.
fn first_due(grant: &Grant, end: Duration) -> Duration {
    end.saturating_sub(trusted(grant.ttl)).saturating_add(grant.ttl / 3)
}

struct Kept {
    grant: Arc<Grant>,
    /// When its next renewal is due; `None` while one waits or is under way.
    due: Option<Duration>,
    /// When to look whether its trust has ended.
    end: Duration,
    /// Somebody doubts since then that it is held: what it is lost by, if it is.
    doubt: Option<(LostReason, Duration)>,
}

/// A batch of renewals under way.
struct Flight {
    tokens: Vec<FencingToken>,
    start: Duration,
    answer: JoinHandle<Result<BatchAnswer, StoreError>>,
}

struct Rounds {
    context: Arc<Context>,
    manager: ActorRef<Message>,
    inbox: Arc<Inbox>,
    kept: HashMap<FencingToken, Kept>,
    due: BTreeSet<(Duration, FencingToken)>,
    /// Due, for the next batch.
    waiting: Vec<FencingToken>,
    ends: BTreeSet<(Duration, FencingToken)>,
}

impl Rounds {
    fn new(context: Arc<Context>, manager: ActorRef<Message>, inbox: Arc<Inbox>) -> Self {
        Self { context, manager, inbox, kept: HashMap::new(), due: BTreeSet::new(), waiting: Vec::new(), ends: BTreeSet::new() }
    }

    async fn run(mut self) {
        let mut flight: Option<Flight> = None;
        while let Some(commands) = self.inbox.take() {
            for command in commands {
                match command {
                    Command::Keep(grant) => self.keep(grant),
                    Command::Forget(token) => drop(self.forget(token)),
                    Command::Doubt(token, why) => self.doubt(token, why),
                }
            }
            self.give_up_overdue();
            self.line_up();
            if flight.is_none() {
                flight = self.set_out();
            }
            let due = self.due.first().map(|(at, _)| *at);
            let end = self.ends.first().map(|(at, _)| *at);
            let wake = due.into_iter().chain(end).min();
            if !self.inbox.may_sleep(wake) {
                continue;
            }
            let landed = async {
                match &mut flight {
                    Some(flight) => (&mut flight.answer).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = self.inbox.wake.notified() => {}
                answer = landed => if let Some(flight) = flight.take() {
                    let answer = answer.unwrap_or_else(|panicked| {
                        Err(StoreError::unknown(StoreErrorKind::Poisoned, "the storage panicked while it renewed locks").with_source(panicked))
                    });
                    self.land(&flight, answer);
                },
                () = self.context.time.sleep_until(wake) => {}
            }
        }
    }

    fn keep(&mut self, grant: Arc<Grant>) {
        let (token, now) = (grant.token, self.context.time.now());
        let Ok(Some(end)) = grant.trust.state() else {
            // Lost before it came here.
            return self.tell(&grant);
        };
        let due = first_due(&grant, end).max(now);
        self.due.insert((due, token));
        self.ends.insert((end, token));
        self.kept.insert(token, Kept { grant, due: Some(due), end, doubt: None });
    }

    fn doubt(&mut self, token: FencingToken, why: LostReason) {
        let now = self.context.time.now();
        let Some(kept) = self.kept.get_mut(&token) else { return };
        kept.doubt = Some((why, now));
        // A renewal that is under way may have been decided before it was gone: the next one follows it.
        if let Some(due) = kept.due.filter(|due| *due > now) {
            self.due.remove(&(due, token));
            self.due.insert((now, token));
            kept.due = Some(now);
        }
    }

    fn forget(&mut self, token: FencingToken) -> Option<Arc<Grant>> {
        let kept = self.kept.remove(&token)?;
        if let Some(due) = kept.due {
            self.due.remove(&(due, token));
        }
        self.ends.remove(&(kept.end, token));
        Some(kept.grant)
    }

    /// Tells the manager that a lease is lost.
    fn tell(&self, grant: &Grant) {
        let reason = grant.trust.state().err().unwrap_or(LostReason::Expired);
        let _manager_gone = self.manager.send_message(Message::Lost { token: grant.token, reason });
    }

    fn give_up_overdue(&mut self) {
        let now = self.context.time.now();
        while let Some((end, token)) = self.ends.first().filter(|(at, _)| *at <= now).copied() {
            self.ends.remove(&(end, token));
            let Some(kept) = self.kept.get_mut(&token) else { continue };
            if let Ok(Some(later)) = kept.grant.trust.state() {
                // It was renewed by hand.
                kept.end = later;
                self.ends.insert((later, token));
            } else if let Some(grant) = self.forget(token) {
                self.tell(&grant);
            }
        }
    }

    /// Notes what is due: from now on the storage is to blame if trust ends.
    fn line_up(&mut self) {
        let now = self.context.time.now();
        while let Some((due, token)) = self.due.first().filter(|(due, _)| *due <= now).copied() {
            self.due.remove(&(due, token));
            if let Some(kept) = self.kept.get_mut(&token) {
                kept.due = None;
                kept.grant.trust.set_renewing(true);
                self.waiting.push(token);
            }
        }
    }

    /// Sends what waits.
    fn set_out(&mut self) -> Option<Flight> {
        let start = self.context.time.now();
        let at = self.context.now();
        let (mut tokens, mut entries) = (Vec::new(), Vec::new());
        for token in self.waiting.drain(..) {
            let Some(kept) = self.kept.get(&token) else { continue };
            let ttl_ms = u64::try_from(kept.grant.ttl.as_millis()).unwrap_or(u64::MAX);
            let renew = LeaseMutation::Renew { key: kept.grant.key.clone(), token, at, ttl_ms };
            entries.push(Entry { leases: vec![renew], ..Entry::default() });
            tokens.push(token);
        }
        if tokens.is_empty() {
            return None;
        }
        let context = Arc::clone(&self.context);
        let answer = tokio::spawn(async move { context.backend.commit(Arc::new(Batch::new(entries))).await });
        Some(Flight { tokens, start, answer })
    }

    fn land(&mut self, flight: &Flight, answer: Result<BatchAnswer, StoreError>) {
        let mut outcomes = match answer {
            Ok(answer) => answer.outcomes.into_iter(),
            Err(error) => {
                // A renewal is harmless twice, so that an unknown outcome needs no more than another try.
                tracing::warn!(%error, leases = flight.tokens.len(), "locks were not renewed; trying again");
                Vec::new().into_iter()
            }
        };
        for token in flight.tokens.iter().copied() {
            let outcome = outcomes.next();
            let Some(kept) = self.kept.get_mut(&token) else { continue };
            let grant = Arc::clone(&kept.grant);
            let next = match outcome {
                Some(Outcome::Applied(_)) => {
                    let until = flight.start.saturating_add(trusted(grant.ttl));
                    if grant.trust.extend(until).is_ok() {
                        grant.trust.set_renewing(false);
                    }
                    if let Some((_, since)) = kept.doubt.filter(|(_, since)| *since >= flight.start) {
                        since
                    } else {
                        kept.doubt = None;
                        flight.start.saturating_add(grant.ttl / 3)
                    }
                }
                Some(Outcome::Refused(Refusal::LeaseGone { .. })) if grant.returning.load(Ordering::Acquire) => {
                    // Its holder gave it back, and the manager is about to learn of it.
                    self.forget(token);
                    continue;
                }
                Some(Outcome::Refused(Refusal::LeaseGone { .. })) => {
                    grant.trust.lose(kept.doubt.map_or(LostReason::Forced, |(why, _)| why));
                    Duration::ZERO
                }
                Some(Outcome::Refused(_)) | None => {
                    let pause = (grant.ttl / 20).clamp(Duration::from_millis(10), Duration::from_millis(500));
                    self.context.time.now().saturating_add(pause)
                }
            };
            if grant.trust.state().is_ok() {
                kept.due = Some(next);
                self.due.insert((next, token));
            } else {
                self.forget(token);
                self.tell(&grant);
            }
        }
    }
}
