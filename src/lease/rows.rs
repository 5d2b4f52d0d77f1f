//! What the lock manager asks of the storage, in tasks that answer it by message.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use ractor::{ActorRef, MessagingErr};

use crate::model::{
    Clock, Entry, FencingToken, LeaseKey, LeaseMutation, LeaseOwner, ProcessInfo, Receipt, Refusal, RunId, SystemClock,
};
use crate::store::{StateBackend, StoreError, StoreErrorKind, load_panicked, surviving};

use super::actor::{Message, Reply};
use super::error::{LeaseError, LostReason};
use super::table::Ticket;
use super::trust::LeaseTime;
use super::{DoorError, LeaseStoreDoor};

/// How often a release is tried again while the storage is busy; after that the lease ends by its expiry.
const RELEASE_TRIES: u32 = 5;
const RELEASE_PAUSE: Duration = Duration::from_millis(200);
/// How long it is asked why a lease is gone.
const ASKED_WITHIN: Duration = Duration::from_secs(1);

/// What everybody in this room works with.
pub(super) struct Context {
    pub(super) backend: Arc<dyn StateBackend>,
    pub(super) process: ProcessInfo,
    pub(super) door: Arc<dyn LeaseStoreDoor>,
    clock: Arc<dyn Clock>,
    pub(super) time: Arc<LeaseTime>,
}

impl Context {
    pub(super) fn new(
        backend: Arc<dyn StateBackend>,
        process: ProcessInfo,
        door: Arc<dyn LeaseStoreDoor>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { backend, process, door, clock, time: Arc::new(LeaseTime::new()) }
    }

    /// What leases are stamped with. It decides nothing, and it is asked where all locks of this process are decided and kept alive: a clock of
    /// the embedder's that panics must not end that.
    pub(super) fn now(&self) -> DateTime<Utc> {
        catch_unwind(AssertUnwindSafe(|| self.clock.now())).unwrap_or_else(|_told_by_its_hook| SystemClock.now())
    }

    async fn change(&self, lease: LeaseMutation) -> Result<Receipt, DoorError> {
        self.door.commit(Entry { leases: vec![lease], ..Entry::default() }).await
    }

    pub(super) async fn force(&self, token: FencingToken) -> Result<(), LeaseError> {
        match self.change(LeaseMutation::Force { token }).await {
            Ok(_) => Ok(()),
            Err(DoorError::Refused(Refusal::LeaseGone { .. })) => Err(LeaseError::NotFound { token }),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn give_back(&self, key: &LeaseKey, token: FencingToken) -> Result<(), LeaseError> {
        let mut tries = 1;
        loop {
            match self.change(LeaseMutation::Release { key: key.clone(), token }).await {
                Ok(_) | Err(DoorError::Refused(Refusal::LeaseGone { .. })) => return Ok(()),
                // Given back twice is given back.
                Err(DoorError::Store(error)) if (error.is_retryable() || error.is_unknown_outcome()) && tries < RELEASE_TRIES => {
                    tries += 1;
                    tokio::time::sleep(RELEASE_PAUSE).await;
                }
                Err(error) => {
                    tracing::warn!(%key, %token, error = %LeaseError::from(error.clone()), "a lock was not given back; it ends by its expiry");
                    return Err(error.into());
                }
            }
        }
    }

    /// Nobody knows whether the grant has happened: if it has, it is found by its owner and given back. (The key is claimed by this
    /// request in this process, so that nobody else here can have it.)
    pub(super) async fn give_back_orphan(&self, key: &LeaseKey, owner: &LeaseOwner) {
        let Ok(leases) = self.backend.list_leases().await else { return };
        for lease in leases.iter().filter(|lease| lease.key == *key && lease.owner == *owner) {
            // It ends by its expiry if this fails too.
            let _told_in_the_log = self.give_back(key, lease.token).await;
        }
    }
}

/// Reserves the next block of tokens.
pub(super) fn reserve(context: &Arc<Context>, manager: &ActorRef<Message>, count: u64) {
    let (context, manager) = (Arc::clone(context), manager.clone());
    let asked = tokio::spawn(async move { context.backend.reserve_tokens(count).await });
    tokio::spawn(async move {
        let _manager_gone = manager.send_message(Message::Tokens(answered(asked.await)));
    });
}

/// What storage answered; a panic of its code is an answer too: somebody waits for one.
fn answered<T>(asked: Result<Result<T, StoreError>, tokio::task::JoinError>) -> Result<T, StoreError> {
    asked.unwrap_or_else(|panicked| {
        Err(StoreError::not_applied(StoreErrorKind::Io, "the storage's own code panicked").with_source(panicked))
    })
}

/// What is asked for where leases are rows.
pub(super) struct Attempt {
    pub(super) ticket: Ticket,
    pub(super) key: LeaseKey,
    pub(super) owner: LeaseOwner,
    pub(super) purpose: Option<Arc<str>>,
    pub(super) ttl_ms: u64,
}

/// Asks the storage for a lease.
pub(super) fn attempt(context: &Arc<Context>, manager: &ActorRef<Message>, attempt: Attempt) {
    let (context, manager) = (Arc::clone(context), manager.clone());
    tokio::spawn(async move {
        let Attempt { ticket, key, owner, purpose, ttl_ms } = attempt;
        // Taken before the entry is sent: the lease cannot have begun earlier.
        let start = context.time.now();
        let at = context.now();
        let asked = context.change(LeaseMutation::Grant { key: key.clone(), owner: owner.clone(), purpose, at, ttl_ms }).await;
        let result = match asked {
            Ok(receipt) => receipt.grants.first().map(|grant| grant.token).ok_or_else(|| {
                let message = format!(
                    "{}: it granted the lock on {key} without a token; this backend breaks its contract",
                    context.backend.name()
                );
                DoorError::Store(StoreError::unknown(StoreErrorKind::Corrupt, message))
            }),
            Err(error) => Err(error),
        };
        if matches!(&result, Err(DoorError::Store(error)) if error.is_unknown_outcome()) {
            let (context, key) = (Arc::clone(&context), key.clone());
            // In a task: whatever a backend's own code does, the manager is answered.
            let _told_in_the_log = tokio::spawn(async move { context.give_back_orphan(&key, &owner).await }).await;
        }
        let answer = manager.send_message(Message::Attempted { ticket, start, result });
        if let Err(MessagingErr::SendErr(Message::Attempted { result: Ok(token), .. })) = answer {
            let _told_in_the_log = context.give_back(&key, token).await;
        }
    });
}

/// Looks which leases are held.
pub(super) fn look(context: &Arc<Context>, manager: &ActorRef<Message>) {
    let (context, manager) = (Arc::clone(context), manager.clone());
    let asked = tokio::spawn(async move { context.backend.list_leases().await });
    tokio::spawn(async move {
        let _manager_gone = manager.send_message(Message::Looked(answered(asked.await)));
    });
}

/// Leases on a run that seem to be gone.
pub(super) struct Doubt {
    pub(super) run: RunId,
    /// Whether the run was there when they were granted.
    pub(super) was_there: bool,
    pub(super) tokens: Vec<FencingToken>,
}

/// Finds out why leases may be gone: for the words alone, so that it does not take long, and one run after another.
pub(super) fn ask_why(context: &Arc<Context>, manager: &ActorRef<Message>, doubts: Vec<Doubt>) {
    let (context, manager) = (Arc::clone(context), manager.clone());
    tokio::spawn(async move {
        let until = tokio::time::Instant::now() + ASKED_WITHIN;
        for Doubt { run, was_there, tokens } in doubts {
            let load = surviving(context.backend.load_run(&run), || load_panicked(&run));
            let ended = match tokio::time::timeout_at(until, load).await {
                Ok(Ok(Some(run))) => run.header().status.is_ended(),
                Ok(Ok(None)) => was_there,
                Ok(Err(_)) | Err(_) => false,
            };
            let why = if ended { LostReason::RunEnded } else { LostReason::Forced };
            let _manager_gone = manager.send_message(Message::Doubted { tokens, why });
        }
    });
}

/// A lease on its way out.
pub(super) struct Departure {
    pub(super) ticket: Ticket,
    pub(super) key: LeaseKey,
    pub(super) flush: bool,
    /// Whether its holder lost it; else it was released.
    pub(super) lost: bool,
    /// The row to give back, where leases are rows.
    pub(super) row: Option<FencingToken>,
}

/// Flushes what the holder of a lease left behind, and gives its row back.
pub(super) fn depart(context: &Arc<Context>, manager: &ActorRef<Message>, departure: Departure) {
    let (context, manager) = (Arc::clone(context), manager.clone());
    tokio::spawn(async move {
        let Departure { ticket, key, flush, row, lost } = departure;
        let flushing = async { if flush { context.door.flush_run(&key.run).await.map_err(LeaseError::from) } else { Ok(()) } };
        let giving_back = async {
            match row {
                Some(token) => context.give_back(&key, token).await,
                None => Ok(()),
            }
        };
        // What was lost is over whatever is on its way; what is released covers it until then.
        let (flushed, given_back) = if lost { tokio::join!(flushing, giving_back) } else { (flushing.await, giving_back.await) };
        let _manager_gone = manager.send_message(Message::Left { ticket, result: flushed.and(given_back) });
    });
}

/// Renews a lease by hand.
pub(super) fn renew(
    context: &Arc<Context>,
    manager: &ActorRef<Message>,
    key: LeaseKey,
    token: FencingToken,
    ttl_ms: u64,
    reply: Reply<()>,
) {
    let (context, manager) = (Arc::clone(context), manager.clone());
    tokio::spawn(async move {
        let start = context.time.now();
        let at = context.now();
        let result = context.change(LeaseMutation::Renew { key, token, at, ttl_ms }).await.map(drop);
        let _manager_gone = manager.send_message(Message::Renewed { token, start, result, reply });
    });
}
