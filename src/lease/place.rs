//! A place in front of everybody else of this process, before its lease is granted by an entry that its holder sends.

use std::sync::Arc;
use std::time::Duration;

use ractor::{ActorRef, MessagingErr};
use tokio::sync::oneshot;

use crate::model::{FencingToken, LeaseKey, LeaseMutation, LeaseOwner};
use crate::store::{StoreError, StoreErrorKind};

use super::actor::Message;
use super::error::LeaseError;
use super::guard::Lease;
use super::options::Terms;
use super::rows::Context;
use super::table::Ticket;

/// Nobody else of this process gets the lock while this lives; other processes may, until the entry is committed. Dropped it is given up.
pub(crate) struct Place {
    manager: ActorRef<Message>,
    context: Arc<Context>,
    /// `None`: it became a lease.
    ticket: Option<Ticket>,
    key: LeaseKey,
    owner: LeaseOwner,
    purpose: Option<Arc<str>>,
    ttl_ms: u64,
    /// Before the entry is sent: the lease cannot have begun earlier.
    start: Duration,
    /// Known ahead where leases live in this process.
    token: Option<FencingToken>,
}

impl Place {
    #[expect(clippy::too_many_arguments, reason = "called in one place, by the manager that knows all of it")]
    pub(super) fn new(
        manager: ActorRef<Message>,
        context: Arc<Context>,
        ticket: Ticket,
        key: LeaseKey,
        owner: LeaseOwner,
        terms: &Terms,
        start: Duration,
        token: Option<FencingToken>,
    ) -> Self {
        let (purpose, ttl_ms) = (terms.purpose.clone(), terms.ttl_ms);
        Self { manager, context, ticket: Some(ticket), key, owner, purpose, ttl_ms, start, token }
    }

    /// What the entry must carry; `None` where leases live in this process.
    pub(crate) fn grant(&self) -> Option<LeaseMutation> {
        self.token.is_none().then(|| LeaseMutation::Grant {
            key: self.key.clone(),
            owner: self.owner.clone(),
            purpose: self.purpose.clone(),
            at: self.context.now(),
            ttl_ms: self.ttl_ms,
        })
    }

    /// The entry was committed, with the token of the grant that it carried.
    ///
    /// # Cancel safety
    /// Dropped after it was polled, the lease is given back.
    pub(crate) async fn confirm(mut self, granted: Option<FencingToken>) -> Result<Lease, LeaseError> {
        let (Some(ticket), Some(token)) = (self.ticket, self.token.or(granted)) else {
            let message = format!(
                "{}: it granted the lock on {} without a token; this backend breaks its contract",
                self.context.backend.name(),
                self.key
            );
            return Err(StoreError::unknown(StoreErrorKind::Corrupt, message).into());
        };
        self.ticket = None;
        let (reply, answer) = oneshot::channel();
        let message = Message::Confirm { ticket, key: self.key.clone(), token, start: self.start, reply };
        if let Err(MessagingErr::SendErr(_) | MessagingErr::ChannelClosed) = self.manager.send_message(message) {
            if self.token.is_none() {
                // The manager has ended: nobody else knows of the row.
                let _told_in_the_log = self.context.give_back(&self.key, token).await;
            }
            return Err(LeaseError::Closed);
        }
        let Ok(answered) = answer.await else {
            // It ended before it read the message.
            if self.token.is_none() {
                let _told_in_the_log = self.context.give_back(&self.key, token).await;
            }
            return Err(LeaseError::Closed);
        };
        answered?.map(Lease::of_claim).ok_or(LeaseError::NotFound { token })
    }

    /// Nobody knows whether the entry was committed: a lease that it granted is given back.
    pub(crate) async fn orphaned(self) {
        if self.token.is_none() {
            self.context.give_back_orphan(&self.key, &self.owner).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            let _manager_gone = self.manager.send_message(Message::Cancel(ticket));
        }
    }
}
