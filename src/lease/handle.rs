//! The door of this room: how others ask for locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ractor::{Actor, ActorRef};
use tokio::sync::oneshot;

use crate::model::{Clock, FencingToken, LeaseKey, LeaseRecord, ProcessInfo, RunId};
use crate::store::{LeaseStore, StateBackend, StoreError, StoreErrorKind};

use super::LeaseStoreDoor;
use super::actor::{Asker, LockManager, Message, Reply, Request};
use super::error::{LeaseError, LostReason};
use super::guard::Lease;
use super::options::LockOptions;
use super::place::Place;
use super::rows::Context;
use super::table::Ticket;

/// A cheap handle of the lock manager. When the last one goes, everything is released as by [`close`](Self::close).
#[derive(Clone)]
pub(crate) struct LeaseHandle {
    shared: Arc<Shared>,
}

struct Shared {
    manager: ActorRef<Message>,
    context: Arc<Context>,
    tickets: AtomicU64,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _manager_gone = self.manager.send_message(Message::Close(None));
    }
}

impl std::fmt::Debug for LeaseHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeaseHandle").field("backend", &self.shared.context.backend.name()).finish_non_exhaustive()
    }
}

/// Takes a request back when its caller goes before it was answered.
struct Withdraw<'a> {
    manager: &'a ActorRef<Message>,
    ticket: Option<Ticket>,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let _manager_gone = self.manager.send_message(Message::Cancel(ticket));
        }
    }
}

impl LeaseHandle {
    /// Starts a lock manager over an initialised backend, for the locks of this process.
    pub(crate) async fn start(
        backend: Arc<dyn StateBackend>,
        process: ProcessInfo,
        door: Arc<dyn LeaseStoreDoor>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LeaseError> {
        let context = Arc::new(Context::new(backend, process, door, clock));
        let (manager, _) = Actor::spawn(None, LockManager, Arc::clone(&context)).await.map_err(|error| {
            StoreError::not_applied(StoreErrorKind::Unavailable, format!("the lock manager could not be started: {error}"))
        })?;
        Ok(Self { shared: Arc::new(Shared { manager, context, tickets: AtomicU64::new(0) }) })
    }

    /// Asks for a lock; `None` if it was not free in time. A wait of zero tries once. The wait is for other holders: an answer of the
    /// storage that is under way is awaited beyond it.
    ///
    /// # Cancel safety
    /// Dropping the future, at any instant, takes the request back or gives the lock back.
    pub(crate) async fn acquire(&self, key: LeaseKey, options: LockOptions, wait: Duration) -> Result<Option<Lease>, LeaseError> {
        let terms = options.check()?;
        self.check_kept()?;
        let Shared { manager, context, tickets } = &*self.shared;
        let ticket = Ticket(tickets.fetch_add(1, Ordering::Relaxed));
        let wait_until = (!wait.is_zero()).then(|| context.time.now().saturating_add(wait));
        let (reply, answer) = oneshot::channel();
        let request = Request { ticket, key, terms, wait_until, reply: Asker::Lease(reply) };
        manager.send_message(Message::Acquire(request)).map_err(|_| LeaseError::Closed)?;
        let mut withdraw = Withdraw { manager, ticket: Some(ticket) };
        let answer = answer.await;
        withdraw.ticket = None;
        answer.unwrap_or(Err(LeaseError::Closed))
    }

    /// Asks for the place of a lease that an entry of the caller's own is to grant; `None` if it is not free. Never waits for other holders.
    ///
    /// # Cancel safety
    /// As [`acquire`](Self::acquire).
    pub(crate) async fn reserve(&self, key: LeaseKey, options: LockOptions) -> Result<Option<Place>, LeaseError> {
        let terms = options.check()?;
        self.check_kept()?;
        let Shared { manager, tickets, .. } = &*self.shared;
        let ticket = Ticket(tickets.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = oneshot::channel();
        let request = Request { ticket, key, terms, wait_until: None, reply: Asker::Place(reply) };
        manager.send_message(Message::Acquire(request)).map_err(|_| LeaseError::Closed)?;
        let mut withdraw = Withdraw { manager, ticket: Some(ticket) };
        let answer = answer.await;
        withdraw.ticket = None;
        answer.unwrap_or(Err(LeaseError::Closed))
    }

    async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, LeaseError> {
        let (reply, answer) = oneshot::channel();
        self.shared.manager.send_message(message(reply)).map_err(|_| LeaseError::Closed)?;
        answer.await.unwrap_or(Err(LeaseError::Closed))
    }

    /// Whether there is somebody who grants locks.
    pub(crate) fn is_alive(&self) -> bool {
        !matches!(self.shared.manager.get_status(), ractor::ActorStatus::Stopping | ractor::ActorStatus::Stopped)
    }

    /// Whether the storage keeps leases at all.
    pub(crate) fn are_kept(&self) -> bool {
        !matches!(self.shared.context.backend.lease_store(), LeaseStore::None)
    }

    fn check_kept(&self) -> Result<(), StoreError> {
        if self.are_kept() {
            return Ok(());
        }
        let what = "locks and claims (its backend does not override `lease_store`)";
        Err(StoreError::unsupported(self.shared.context.backend.name(), what))
    }

    /// Whether leases are rows of the storage.
    pub(crate) fn keeps_rows(&self) -> bool {
        matches!(self.shared.context.backend.lease_store(), LeaseStore::Rows)
    }

    /// All leases that are held, by their tokens; those of other processes too, where leases are rows, and where this one only reads.
    pub(crate) async fn list(&self) -> Result<Vec<LeaseRecord>, LeaseError> {
        if self.keeps_rows() || self.shared.context.backend.is_read_only() {
            return Ok(self.shared.context.backend.list_leases().await?);
        }
        self.ask(Message::List).await
    }

    /// Takes a lease away from whoever holds it under this token.
    pub(crate) async fn force_unlock(&self, token: FencingToken) -> Result<LeaseRecord, LeaseError> {
        if !self.keeps_rows() {
            return self.ask(|reply| Message::Force { token, reply }).await;
        }
        let record = self.list().await?.into_iter().find(|lease| lease.token == token).ok_or(LeaseError::NotFound { token })?;
        self.shared.context.force(token).await?;
        let _manager_gone = self.shared.manager.send_message(Message::Lost { token, reason: LostReason::Forced });
        Ok(record)
    }

    /// Frees the locks of a run that has ended or was deleted, and answers its waiters.
    pub(crate) fn free_run(&self, run: &RunId) {
        let _manager_gone = self.shared.manager.send_message(Message::FreeRun(run.clone()));
    }

    /// A lease was given back with an entry that is in storage: nothing is left but its place.
    pub(crate) fn returned(&self, token: FencingToken) {
        let _manager_gone = self.shared.manager.send_message(Message::Returned { token });
    }

    /// Other processes may have granted or given back leases: who waits for them looks again.
    pub(crate) fn foreign_commits(&self) {
        let _manager_gone = self.shared.manager.send_message(Message::Foreign);
    }

    /// Releases all leases, answers all waiters, and ends the manager.
    pub(crate) async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.shared.manager.send_message(Message::Close(Some(reply))).is_ok() {
            let _closed_before = closed.await;
        }
    }

    #[cfg(test)]
    pub(super) fn kill_manager(&self) {
        self.shared.manager.kill();
    }
}
