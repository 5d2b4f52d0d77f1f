//! Keeps leases alive where they are rows: on a thread of its own, so that a runtime whose workers are all blocked loses no lease.
//!
//! Every third of its TTL a lease is due. All that are due go in one batch, one entry each, so that one that is gone takes no other along; what
//! falls due meanwhile is the next batch. A lease whose trust ends before a renewal was answered is lost, whatever is answered later.

use std::collections::{BTreeSet, HashMap};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ractor::ActorRef;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::model::{Batch, BatchAnswer, Entry, FencingToken, LeaseMutation, Outcome, Refusal};
use crate::store::{StoreError, StoreErrorKind};

use super::actor::Message;
use super::error::LostReason;
use super::guard::Grant;
use super::rows::Context;
use super::trust::trusted;

enum Command {
    Keep(Arc<Grant>),
    Forget(FencingToken),
}

/// The way to the keeper's thread, which ends when this is dropped.
pub(super) struct Keeper {
    commands: mpsc::UnboundedSender<Command>,
}

impl Keeper {
    pub(super) fn start(context: &Arc<Context>, manager: &ActorRef<Message>) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (context, manager) = (Arc::clone(context), manager.clone());
        let (ready, started) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("seeknal-leases".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let (runtime, told) = match runtime {
                Ok(runtime) => (Some(runtime), ready.send(Ok(()))),
                Err(error) => (None, ready.send(Err(error))),
            };
            if let (Some(runtime), Ok(())) = (runtime, told) {
                runtime.block_on(Rounds::new(context, manager).run(inbox));
            }
        })?;
        started.recv().unwrap_or_else(|_| Err(std::io::Error::other("the thread that keeps locks alive ended at once")))?;
        Ok(Self { commands })
    }

    /// Renews a lease from now on.
    pub(super) fn keep(&self, grant: Arc<Grant>) {
        // Without its thread the lease ends with its first trust, and its guard says so.
        let _thread_gone = self.commands.send(Command::Keep(grant));
    }

    /// Renews a lease no more.
    pub(super) fn forget(&self, token: FencingToken) {
        let _thread_gone = self.commands.send(Command::Forget(token));
    }
}

struct Kept {
    grant: Arc<Grant>,
    /// When its next renewal is due; `None` while one waits or is under way.
    due: Option<Duration>,
    /// When to look whether its trust has ended.
    end: Duration,
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
    kept: HashMap<FencingToken, Kept>,
    due: BTreeSet<(Duration, FencingToken)>,
    /// Due, for the next batch.
    waiting: Vec<FencingToken>,
    ends: BTreeSet<(Duration, FencingToken)>,
}

impl Rounds {
    fn new(context: Arc<Context>, manager: ActorRef<Message>) -> Self {
        Self { context, manager, kept: HashMap::new(), due: BTreeSet::new(), waiting: Vec::new(), ends: BTreeSet::new() }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut flight: Option<Flight> = None;
        loop {
            self.give_up_overdue();
            self.line_up();
            if flight.is_none() {
                flight = self.set_out();
            }
            let due = self.due.first().map(|(at, _)| *at);
            let end = self.ends.first().map(|(at, _)| *at);
            let wake = due.into_iter().chain(end).min();
            let landed = async {
                match &mut flight {
                    Some(flight) => (&mut flight.answer).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(Command::Keep(grant)) => self.keep(grant),
                    Some(Command::Forget(token)) => {
                        self.forget(token);
                    }
                    None => return,
                },
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
        // The attempt to get it may have taken a while: the first renewal counts from when trust began.
        let due = end.saturating_sub(trusted(grant.ttl)).saturating_add(grant.ttl / 3).max(now);
        self.due.insert((due, token));
        self.ends.insert((end, token));
        self.kept.insert(token, Kept { grant, due: Some(due), end });
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
        let at = self.context.clock.now();
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
                    flight.start.saturating_add(grant.ttl / 3)
                }
                Some(Outcome::Refused(Refusal::LeaseGone { .. })) if grant.returning.load(Ordering::Acquire) => {
                    // Its holder gave it back, and the manager is about to learn of it.
                    self.forget(token);
                    continue;
                }
                Some(Outcome::Refused(Refusal::LeaseGone { .. })) => {
                    grant.trust.lose(LostReason::Forced);
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
