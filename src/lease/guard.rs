//! The guard that a holder keeps: it releases the lease when it goes.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ractor::ActorRef;
use tokio::sync::oneshot;

use crate::model::{Fence, FencingToken, LeaseKey, LeaseMutation, RunId};

use super::actor::Message;
use super::error::{LeaseError, LostReason};
use super::trust::Trust;

/// What the holder, the manager and the keeper know of one grant.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) key: LeaseKey,
    pub(super) token: FencingToken,
    pub(super) ttl: Duration,
    pub(super) keep_alive: bool,
    pub(super) trust: Trust,
    /// An entry that gives it back is on its way: if it is found gone, that is no loss.
    pub(super) returning: AtomicBool,
}

impl Grant {
    pub(super) fn lost_error(&self, reason: LostReason) -> LeaseError {
        LeaseError::Lost { key: self.key.clone(), token: self.token, reason }
    }
}

/// A lock that is held. Dropping it releases it, also outside of a runtime; what its run has not yet made durable is flushed before the lock
/// goes to the next one.
///
/// Locks are advisory: they keep out those who ask for them. A write that must not happen once the lock is lost has to be fenced by it
/// (see [`fence`](Self::fence)).
#[must_use = "a lease that is dropped is released at once"]
pub struct Lease {
    grant: Arc<Grant>,
    manager: ActorRef<Message>,
    /// Whether dropping this gives the lease back.
    armed: AtomicBool,
    /// Whether it came with a claim of what it is on.
    of_claim: bool,
}

impl Lease {
    pub(super) fn new(grant: Arc<Grant>, manager: ActorRef<Message>) -> Self {
        Self { grant, manager, armed: AtomicBool::new(true), of_claim: false }
    }

    pub(super) fn of_claim(mut self) -> Self {
        self.of_claim = true;
        self
    }

    /// What its holder has claimed with it: a node that runs as long as the claim is good for anything.
    pub(crate) fn claimed(&self) -> Option<&LeaseKey> {
        Some(&self.grant.key).filter(|_| self.of_claim)
    }

    /// What it is on.
    pub fn key(&self) -> &LeaseKey {
        &self.grant.key
    }

    /// The run that it is on, or whose node it is on.
    pub fn run_id(&self) -> &RunId {
        &self.grant.key.run
    }

    /// Its fencing token: higher than that of every earlier grant on the same run or node; in a database of every earlier grant at all.
    pub fn token(&self) -> FencingToken {
        self.grant.token
    }

    /// The condition that this lease is held, for transactions: it is decided in the commit itself.
    pub fn fence(&self) -> Fence {
        Fence { key: self.grant.key.clone(), token: self.grant.token }
    }

    /// How long the holder may rely on it without another renewal; zero once it is lost. For a lease that cannot expire as long as this
    /// guard lives it is always the whole TTL.
    pub fn remaining(&self) -> Duration {
        self.grant.trust.remaining().unwrap_or(self.grant.ttl)
    }

    /// Whether it is not held any more. Once lost it stays lost.
    pub fn is_lost(&self) -> bool {
        self.grant.trust.state().is_err()
    }

    /// Why it is not held any more, if so.
    pub(crate) fn lost_reason(&self) -> Option<LostReason> {
        self.grant.trust.state().err()
    }

    /// Waits until the lease is lost, and says why.
    ///
    /// # Cancel safety
    /// Safe: dropping the future changes nothing. Any number of tasks may wait.
    pub async fn lost(&self) -> LostReason {
        self.grant.trust.lost().await
    }

    /// Renews the lease by hand: from now on it lasts its whole TTL again. Needed only with `keep_alive(false)`.
    ///
    /// # Errors
    /// [`LeaseError::Lost`] if it is not held any more; [`LeaseError::Store`] if the storage failed, then it lasts as long as before.
    ///
    /// # Cancel safety
    /// Once polled, the renewal happens or not, whether or not the future is dropped.
    pub async fn renew(&self) -> Result<(), LeaseError> {
        self.check()?;
        self.ask(|reply| Message::Renew { token: self.grant.token, reply }).await
    }

    /// Releases the lease and waits until it is free: what its run has not yet made durable is flushed before. That its run has ended, which frees its
    /// locks, is no loss; if another process ended it, as far as that is known ([`LostReason::RunEnded`]).
    ///
    /// # Errors
    /// [`LeaseError::Lost`] if it was lost before in another way; [`LeaseError::Store`] if the flush or the release failed. The lease is gone in any case.
    ///
    /// # Cancel safety
    /// The lease is released, whether or not the future is dropped.
    pub async fn release(self) -> Result<(), LeaseError> {
        if let Err(lost) = self.check() {
            return freed_by_its_run(lost);
        }
        let token = self.grant.token;
        self.armed.store(false, Ordering::Release);
        self.ask(|reply| Message::Release { token, reply: Some(reply) }).await.or_else(freed_by_its_run)
    }

    /// What gives this lease back inside an entry. To be followed by [`returned`](Self::returned) if the entry was committed, by [`kept`](Self::kept) if
    /// not.
    pub(crate) fn returning(&self) -> LeaseMutation {
        self.grant.returning.store(true, Ordering::Release);
        LeaseMutation::Release { key: self.grant.key.clone(), token: self.grant.token }
    }

    /// The entry that was to give it back was not committed.
    pub(crate) fn kept(&self) {
        self.grant.returning.store(false, Ordering::Release);
    }

    /// The entry gave it back.
    pub(crate) fn returned(&self) {
        self.armed.store(false, Ordering::Release);
        let _manager_gone = self.manager.send_message(Message::Returned { token: self.grant.token });
    }

    /// As dropping it.
    pub(crate) fn let_go(&self) {
        if self.armed.swap(false, Ordering::AcqRel) {
            let _manager_gone = self.manager.send_message(Message::Release { token: self.grant.token, reply: None });
        }
    }

    fn check(&self) -> Result<(), LeaseError> {
        self.grant.trust.state().map(drop).map_err(|reason| self.grant.lost_error(reason))
    }

    async fn ask(&self, message: impl FnOnce(oneshot::Sender<Result<(), LeaseError>>) -> Message) -> Result<(), LeaseError> {
        let (reply, answer) = oneshot::channel();
        self.manager.send_message(message(reply)).map_err(|_| LeaseError::Closed)?;
        match answer.await.unwrap_or(Err(LeaseError::Closed)) {
            // The token is void: the guard knows why, or will in a moment.
            Err(LeaseError::NotFound { .. }) => {
                Err(self.grant.lost_error(self.grant.trust.state().err().unwrap_or(LostReason::Expired)))
            }
            answer => answer,
        }
    }
}

/// The usual end: the work is done, the run has ended, and then its lock is released.
fn freed_by_its_run(error: LeaseError) -> Result<(), LeaseError> {
    match error {
        LeaseError::Lost { reason: LostReason::RunEnded, .. } => Ok(()),
        error => Err(error),
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("key", &self.grant.key)
            .field("token", &self.grant.token)
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}
