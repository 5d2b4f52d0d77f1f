//! The crate's error, over the rooms' own.

use crate::model::{InputError, NodeId, ProcessInfo, Refusal, RunId};
use crate::run::{CommitError, DeferredLoss, Overloaded};
use crate::store::{StoreError, StoreErrorKind};

/// What can go wrong. Cheap to clone. The message names the place and the mend; decide by the `is_…` methods or by variant.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value from outside makes no sense; nothing was done.
    #[error(transparent)]
    Input(#[from] InputError),
    /// There is no such run.
    #[error("run {0:?} does not exist; create it with create_run")]
    RunNotFound(RunId),
    /// There is no such node in the run.
    #[error("run {run:?} has no node {node:?}")]
    NodeNotFound {
        /// The run.
        run: RunId,
        /// The node.
        node: NodeId,
    },
    /// The run is there already.
    #[error("run {0:?} exists already; use ensure_run to open it")]
    RunExists(RunId),
    /// A guard did not hold when the transaction committed; nothing was written.
    #[error("{0}")]
    Conflict(Refusal),
    /// Others changed what the transaction touches again and again; nothing was written.
    #[error("run {run:?} was changed by others {attempts} times in a row; nothing was written, try again later")]
    Contended {
        /// The run.
        run: RunId,
        /// How often it was tried.
        attempts: u32,
    },
    /// A lease that the write is fenced by is lost; nothing was written.
    #[error("{0}")]
    LeaseLost(Refusal),
    /// What is wanted is locked by somebody else.
    #[error("{0}; `seeknal state locks` lists who holds what")]
    Locked(Refusal),
    /// The run is worked on by a process that lives.
    #[error("run {run:?} is worked on by {worker}; it can be resumed when that process is gone (see `seeknal state locks`)")]
    RunInUse {
        /// The run.
        run: RunId,
        /// The process.
        worker: ProcessInfo,
    },
    /// Leases: re-entry, a cycle of waiters, an unknown token, a lock that is lost. What is told by a variant of this type is never in here: a bad option is
    /// [`Input`](Self::Input), a fault of the storage [`Store`](Self::Store), the end of all [`Closed`](Self::Closed).
    #[error(transparent)]
    Lease(crate::lease::LeaseError),
    /// Deferred writes that were acknowledged from memory are lost, or it is not known whether they are. Told once; nothing of the present call was done.
    #[error(transparent)]
    DeferredLost(#[from] DeferredLoss),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A subscriber was too slow: this many events are gone. See [`StreamError::Lagged`](crate::StreamError::Lagged).
    #[error("{0} events were missed; read snapshots to catch up")]
    EventsMissed(u64),
    /// All permits are taken (only `try_…` calls say so; others wait).
    #[error("the coordinator is full; wait for earlier writes or raise its limits")]
    Overloaded,
    /// The coordinator was closed.
    #[error("the coordinator is closed")]
    Closed,
    /// Nobody knows whether it was written: the run's actor ended in mid-flight.
    #[error("whether the write on run {0:?} happened is not known; read the run before you write again")]
    Unknown(RunId),
}

impl Error {
    /// Whether the same call may succeed later without anybody's help. Never when the [outcome is not known](Self::is_unknown_outcome): read before you write
    /// again.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Contended { .. } | Self::Locked(_) | Self::Overloaded => true,
            Self::Store(error) => error.is_retryable(),
            _ => false,
        }
    }

    /// Whether somebody else was first: a guard, an existing run, a lock; or the caller's own other lock is in the way.
    pub fn is_conflict(&self) -> bool {
        use crate::lease::LeaseError as L;
        matches!(
            self,
            Self::Conflict(_)
                | Self::Contended { .. }
                | Self::RunExists(_)
                | Self::Locked(_)
                | Self::RunInUse { .. }
                | Self::Lease(L::Reentrant { .. } | L::Deadlock { .. })
        )
    }

    /// Whether something that was asked for is not there.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::RunNotFound(_) | Self::NodeNotFound { .. } => true,
            Self::Store(error) => error.kind() == StoreErrorKind::NotFound,
            Self::Lease(error) => matches!(error, crate::lease::LeaseError::NotFound { .. }),
            _ => false,
        }
    }

    /// Whether nobody knows if it (or, of deferred writes, what was acknowledged before) was written. Read before writing again.
    pub fn is_unknown_outcome(&self) -> bool {
        match self {
            Self::Unknown(_) => true,
            Self::DeferredLost(loss) => loss.unknown,
            Self::Store(error) => error.is_unknown_outcome(),
            _ => false,
        }
    }

    /// Whether the coordinator was closed, or the storage under it: some calls are refused by the one, others by the other.
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Store(error) => error.kind() == StoreErrorKind::Closed,
            _ => false,
        }
    }

    /// Whether a lease is lost under which the call was made.
    pub fn is_lease_lost(&self) -> bool {
        use crate::lease::LeaseError as L;
        matches!(self, Self::LeaseLost(_) | Self::Lease(L::Lost { .. }))
    }
}

impl From<crate::lease::LeaseError> for Error {
    fn from(error: crate::lease::LeaseError) -> Self {
        use crate::lease::LeaseError as L;
        match error {
            L::Store(error) => Self::Store(error),
            L::Input(error) => Self::Input(error),
            L::Refused(refusal) => refusal.into(),
            L::Closed => Self::Closed,
            error @ (L::Reentrant { .. } | L::Deadlock { .. } | L::NotFound { .. } | L::Lost { .. } | L::RunEnded { .. }) => {
                Self::Lease(error)
            }
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::RunNotFound { run } => Self::RunNotFound(run),
            Refusal::NodeNotFound { run, node } => Self::NodeNotFound { run, node },
            Refusal::RunExists { run } => Self::RunExists(run),
            Refusal::Input(error) => Self::Input(error),
            Refusal::Fenced { .. } | Refusal::LeaseGone { .. } | Refusal::ClaimOver { .. } => Self::LeaseLost(refusal),
            Refusal::LeaseHeld { .. } => Self::Locked(refusal),
            Refusal::Stale { run } | Refusal::Chained { run } => Self::Contended { run, attempts: 1 },
            Refusal::Guard { .. } => Self::Conflict(refusal),
        }
    }
}

impl From<CommitError> for Error {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Refused(refusal) => refusal.into(),
            CommitError::Store(error) => error.into(),
            CommitError::Lost(loss) => loss.read().map_or(Self::Closed, Self::from),
            CommitError::Contended(run, attempts) => Self::Contended { run, attempts },
            CommitError::Closed => Self::Closed,
            CommitError::Unknown(run) => Self::Unknown(run),
        }
    }
}

impl From<Overloaded> for Error {
    fn from(refused: Overloaded) -> Self {
        match refused {
            Overloaded::Full => Self::Overloaded,
            Overloaded::Closed => Self::Closed,
        }
    }
}
