//! Why a lease was not granted, renewed or released.

use std::fmt;
use std::sync::Arc;

use crate::model::{FencingToken, InputError, LeaseKey, Refusal};
use crate::store::{StoreError, StoreErrorKind};

/// Why a lease is not held any more, though nobody released it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LostReason {
    /// Its time was up, and nobody renewed it: it was not kept alive, or the process stood still.
    Expired,
    /// Somebody took it away: `force_unlock` here or in another process (a jump of a database server's clock looks the same, and so does the end of its run in
    /// another process where it is noticed by a renewal only, or where storage does not say within a second what became of the run).
    Forced,
    /// The storage did not answer a renewal in time.
    Storage,
    /// Its run ended or was deleted, here or in another process (of a run that was not in memory here when the lease was granted, a deletion elsewhere is
    /// [`Forced`](Self::Forced)).
    RunEnded,
    /// The state was closed.
    Closed,
    /// A claim: its end was told, it was given back, or somebody else ended its node.
    Ended,
}

impl fmt::Display for LostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expired => "its time was up",
            Self::Forced => "it was taken away",
            Self::Storage => "the storage did not answer its renewal in time",
            Self::RunEnded => "its run ended",
            Self::Closed => "the state was closed",
            Self::Ended => "it has ended already",
        })
    }
}

/// Why a lock could not be had, kept or given back. A lock that is merely taken is no error.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// The owner holds or awaits a lease itself that excludes what it asks for.
    #[error(
        "{owner:?} asked for the lock on {wanted}, but holds or awaits the lock on {own} itself; release that first, or ask for the same one with reentrant(true)"
    )]
    Reentrant {
        /// Who asked.
        owner: Arc<str>,
        /// For what.
        wanted: LeaseKey,
        /// What stands in its way.
        own: LeaseKey,
    },
    /// Waiting would close a cycle: each in it waits for the next one, the last one for the first.
    #[error("waiting for the lock on {wanted} would be a deadlock: {}; release one of the locks and take them in one order", chain(.cycle))]
    Deadlock {
        /// What was asked for.
        wanted: LeaseKey,
        /// The owners, beginning with who asked.
        cycle: Vec<Arc<str>>,
    },
    /// An option makes no sense.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The storage refused the lease itself.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No lease is held under this token.
    #[error("no lease is held under token {token}; list the locks to see the tokens in use")]
    NotFound {
        /// The token that was named.
        token: FencingToken,
    },
    /// The lease is not held any more.
    #[error("the lock on {key} (token {token}) is lost: {reason}")]
    Lost {
        /// What it was on.
        key: LeaseKey,
        /// Its token.
        token: FencingToken,
        /// Why.
        reason: LostReason,
    },
    /// The run ended or was deleted while somebody waited for its lock.
    #[error("nobody gets the lock on {key} any more: the run ended or was deleted while this caller waited")]
    RunEnded {
        /// What was asked for.
        key: LeaseKey,
    },
    /// The state was closed, or its lock manager has ended by a fault of this library.
    #[error("there are no locks any more: the state was closed, or its lock manager has died of a panic; open the state again")]
    Closed,
}

impl LeaseError {
    /// Whether the same call may succeed later without anybody's help. Never when nobody knows whether it has happened.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_retryable())
    }

    /// Whether another holder, or the caller's own locks, are in the way. A lock that is [lost](Self::is_lease_lost) is none.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Reentrant { .. } | Self::Deadlock { .. } | Self::Refused(Refusal::LeaseHeld { .. }))
    }

    /// Whether the lease that was spoken of is not held any more, as [`Error::is_lease_lost`](crate::Error::is_lease_lost) says it.
    pub fn is_lease_lost(&self) -> bool {
        matches!(
            self,
            Self::Lost { .. } | Self::Refused(Refusal::Fenced { .. } | Refusal::LeaseGone { .. } | Refusal::ClaimOver { .. })
        )
    }

    /// Whether something that was asked for is not there: a lease under this token, or what storage looked for.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::NotFound { .. } | Self::Refused(Refusal::RunNotFound { .. } | Refusal::NodeNotFound { .. }) => true,
            Self::Store(error) => error.kind() == StoreErrorKind::NotFound,
            _ => false,
        }
    }

    /// Whether nobody knows if what was asked has happened.
    pub fn is_unknown_outcome(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_unknown_outcome())
    }
}

fn chain(cycle: &[Arc<str>]) -> String {
    let names: Vec<String> = cycle.iter().chain(cycle.first()).map(|name| format!("{name:?}")).collect();
    names.join(" waits for ")
}
