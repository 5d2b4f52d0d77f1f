//! The lock manager as an actor: its messages, its timer, its life.
//!
//! ```text
//! LeaseHandle ──Acquire, Cancel, List, Force, Foreign, …──────►┌──────────────┐
//! Lease       ──Release, Renew────────────────────────────────►│ lock manager │──► tasks that ask the storage
//! timer       ──Tick──────────────────────────────────────────►│              │
//! keeper      ──Lost──────────────────────────────────────────►└──────────────┘◄── Tokens, Attempted, Looked, Renewed, Left
//! ```
//!
//! One message for an acquisition, one for a release, and no task of its own for a lease.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{oneshot, watch};

use crate::model::{FencingToken, LeaseKey, LeaseRecord, RunId};
use crate::store::StoreError;

use super::DoorError;
use super::error::{LeaseError, LostReason};
use super::guard::Lease;
use super::manager::Manager;
use super::options::Terms;
use super::place::Place;
use super::rows::Context;
use super::table::Ticket;
use super::trust::LeaseTime;

pub(super) type Reply<T> = oneshot::Sender<Result<T, LeaseError>>;

/// Somebody asks for a lease.
pub(super) struct Request {
    pub(super) ticket: Ticket,
    pub(super) key: LeaseKey,
    pub(super) terms: Terms,
    /// `None`: try once.
    pub(super) wait_until: Option<Duration>,
    pub(super) reply: Asker,
}

/// Who asks, and for what. The answer carries the guard: a caller that is gone by then drops it, and so releases.
pub(super) enum Asker {
    Lease(Reply<Option<Lease>>),
    /// A place that nobody else of this process can have; its holder sends the entry that grants the lease.
    Place(Reply<Option<Place>>),
}

impl Asker {
    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Lease(reply) => reply.is_closed(),
            Self::Place(reply) => reply.is_closed(),
        }
    }
}

pub(super) enum Message {
    Acquire(Request),
    /// The caller of this request is gone.
    Cancel(Ticket),
    Release {
        token: FencingToken,
        reply: Option<Reply<()>>,
    },
    /// The entry of a place's holder granted the lease, with an attempt that began at `start`.
    Confirm {
        ticket: Ticket,
        key: LeaseKey,
        token: FencingToken,
        start: Duration,
        reply: Reply<Option<Lease>>,
    },
    /// An entry of the holder gave its lease back.
    Returned {
        token: FencingToken,
    },
    Renew {
        token: FencingToken,
        reply: Reply<()>,
    },
    /// The keeper or the storage found a lease lost.
    Lost {
        token: FencingToken,
        reason: LostReason,
    },
    Force {
        token: FencingToken,
        reply: Reply<LeaseRecord>,
    },
    FreeRun(RunId),
    /// Other processes committed something.
    Foreign,
    /// The leases that are held, as the storage has them, for those who wait for other processes.
    Looked(Result<Vec<LeaseRecord>, StoreError>),
    /// Why leases may be gone that a look did not find.
    Doubted {
        tokens: Vec<FencingToken>,
        why: LostReason,
    },
    List(Reply<Vec<LeaseRecord>>),
    Close(Option<oneshot::Sender<()>>),
    /// A deadline has come.
    Tick,
    /// A block of tokens was reserved, or not.
    Tokens(Result<Range<u64>, StoreError>),
    /// What the storage said to a grant that was asked of it at `start`.
    Attempted {
        ticket: Ticket,
        start: Duration,
        result: Result<FencingToken, DoorError>,
    },
    /// What the storage said to a renewal by hand.
    Renewed {
        token: FencingToken,
        start: Duration,
        result: Result<(), DoorError>,
        reply: Reply<()>,
    },
    /// A lease that was leaving is flushed and given back.
    Left {
        ticket: Ticket,
        result: Result<(), LeaseError>,
    },
}

/// The actor; all it knows is in its state.
pub(super) struct LockManager;

#[cfg_attr(seeknal_ractor_async_trait, ractor::async_trait)]
impl Actor for LockManager {
    type Msg = Message;
    type State = Manager;
    type Arguments = Arc<Context>;

    async fn pre_start(&self, myself: ActorRef<Message>, context: Arc<Context>) -> Result<Manager, ActorProcessingErr> {
        Ok(Manager::start(myself, context)?)
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut Manager) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Acquire(request) => state.acquire(request),
            Message::Cancel(ticket) => state.cancel(ticket),
            Message::Release { token, reply } => state.release(token, reply),
            Message::Confirm { ticket, key, token, start, reply } => state.confirm(ticket, key, token, start, reply),
            Message::Returned { token } => state.returned(token),
            Message::Renew { token, reply } => state.renew(token, reply),
            Message::Lost { token, reason } => state.lost(token, reason),
            Message::Force { token, reply } => state.force(token, reply),
            Message::FreeRun(run) => state.free_run(&run),
            Message::Foreign => state.foreign(),
            Message::Looked(found) => state.looked(found),
            Message::Doubted { tokens, why } => state.doubted(&tokens, why),
            Message::List(reply) => state.list(reply),
            Message::Close(reply) => state.close(reply),
            Message::Tick => state.tick(),
            Message::Tokens(block) => state.tokens(block),
            Message::Attempted { ticket, start, result } => state.attempted(ticket, start, result),
            Message::Renewed { token, start, result, reply } => state.renewed(token, start, result, reply),
            Message::Left { ticket, result } => state.left(ticket, result),
        }
        state.arm();
        if state.finish_closing() {
            myself.stop(None);
        }
        Ok(())
    }
}

/// One timer for all deadlines: a task that sends a tick when the earliest has come.
#[derive(Debug)]
pub(super) struct Timer {
    at: watch::Sender<Option<Duration>>,
    armed: Option<Duration>,
    task: tokio::task::AbortHandle,
}

impl Timer {
    pub(super) fn start(manager: ActorRef<Message>, time: Arc<LeaseTime>) -> Self {
        let (at, mut wanted) = watch::channel(None);
        let task = tokio::spawn(async move {
            loop {
                let until: Option<Duration> = *wanted.borrow_and_update();
                tokio::select! {
                    changed = wanted.changed() => if changed.is_err() { return },
                    () = time.sleep_until(until) => {
                        if manager.send_message(Message::Tick).is_err() || wanted.changed().await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Self { at, armed: None, task: task.abort_handle() }
    }

    /// Makes sure of a tick at this time. One that comes too early is not taken back: it finds nothing to do.
    pub(super) fn arm(&mut self, next: Option<Duration>) {
        if next.is_some_and(|next| self.armed.is_none_or(|armed| next < armed)) {
            self.armed = next;
            self.at.send_replace(next);
        }
    }

    /// The tick has come; the task waits until it is told what is next.
    pub(super) fn ticked(&mut self, next: Option<Duration>) {
        self.armed = next;
        self.at.send_replace(next);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
