//! What is flushed together, and what becomes of it.

use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::coverage::Retained;
use super::guard::Guard;
use super::id::{InputError, NodeId, RunId};
use super::lease::{FencingToken, LeaseKey, LeaseMutation, LeaseRecord};
use super::mutation::Mutation;
use super::run::{CommitSeq, RunState, Version};

/// The name of a batch. The same batch keeps its name however often it is sent, so that a backend applies it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BatchId(uuid::Uuid);

impl BatchId {
    /// A new name, never used before.
    pub fn generate() -> Self {
        // A random start of this process, and a counter: asking the system for random bytes each time costs more than a batch in memory.
        static START: LazyLock<u128> = LazyLock::new(|| uuid::Uuid::now_v7().as_u128());
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let tail = START.wrapping_add(u128::from(count)).to_be_bytes();
        let mut random = [0; 10];
        random.copy_from_slice(tail.split_at(6).1);
        let (seconds, nanos) = uuid::Timestamp::now(uuid::NoContext).to_unix();
        let millis = seconds.saturating_mul(1_000).saturating_add(u64::from(nanos / 1_000_000));
        Self(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
    }

    /// The sixteen bytes of the name; they sort by time.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The name from its sixteen bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(uuid::Uuid::from_bytes(bytes))
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease that must be held, under this token and not expired, when an entry commits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fence {
    /// What the lease is on.
    pub key: LeaseKey,
    /// The token of its grant.
    pub token: FencingToken,
}

/// What one entry does to one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunPart {
    /// The run.
    pub run: RunId,
    /// The committed version that the chain stands on: rows that are newer were not seen when this was decided (save what earlier
    /// entries of the same chain wrote).
    pub base: Version,
    /// The version that the run has when this commits, if nobody else writes.
    pub expect: Version,
    /// What must hold.
    pub guards: Vec<Guard>,
    /// What changes.
    pub mutations: Vec<Mutation>,
    /// The run as it is after this, on top of `expect` (`None`: it is deleted). Rows that the mutations touch are right whenever the
    /// part is accepted; others only if the version before was `expect`.
    pub after: Option<RunState>,
}

/// One transaction on its way down: changes of one run or several, of leases, and what they depend on. It happens whole or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// The runs, each at most once, in order of their ids.
    pub parts: Vec<RunPart>,
    /// Changes of leases, where leases are rows of the backend. Where they live in a book an entry may say which ones its holder gives back with it, and
    /// nothing else: they are void with the entry.
    pub leases: Vec<LeaseMutation>,
    /// Leases that must be held.
    pub fences: Vec<Fence>,
    /// What outlives runs that were deleted elsewhere: joins what is there (migration carries it from store to store).
    pub retained: Vec<(NodeId, Retained)>,
    /// Its guards alone decide, and if they refuse it, what comes later in the batch is held up only where it names the same nodes: nobody was told
    /// anything of it. A backend may pass over this, and hold up the whole chain.
    pub detached: bool,
}

/// The entries that are flushed together, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its name.
    pub id: BatchId,
    /// The entries; each is applied or refused on its own.
    pub entries: Vec<Entry>,
}

impl Batch {
    /// A new batch of these entries.
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { id: BatchId::generate(), entries }
    }
}

/// The versions of one run before and after an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReceipt {
    /// The run.
    pub run: RunId,
    /// Its version before; [`Version::NONE`] if the entry made it.
    pub before: Version,
    /// Its version after; the last version it had if the entry deleted it.
    pub after: Version,
}

/// A lease that was granted or renewed with an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseGrant {
    /// What on.
    pub key: LeaseKey,
    /// Its token.
    pub token: FencingToken,
}

/// What a committed entry became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Its place in the order of the whole store.
    pub seq: CommitSeq,
    /// The runs it changed, in the order of the entry's parts.
    pub runs: Vec<RunReceipt>,
    /// The leases it granted, in the order of the entry's grants.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<LeaseGrant>,
}

/// Why an entry was not applied. Nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Refusal {
    /// There is no such run (or it was deleted and made again since).
    #[error("run {run:?} does not exist; create it with create_run")]
    RunNotFound {
        /// Which run.
        run: RunId,
    },
    /// There is no such node.
    #[error("run {run:?} has no node {node:?}")]
    NodeNotFound {
        /// Which run.
        run: RunId,
        /// Which node.
        node: NodeId,
    },
    /// The run is there already.
    #[error("run {run:?} exists already; use ensure_run to open it")]
    RunExists {
        /// Which run.
        run: RunId,
    },
    /// A guard did not hold.
    #[error("conflict on run {run:?}: expected {guard}, but {found}")]
    Guard {
        /// Which run.
        run: RunId,
        /// What was expected.
        guard: Guard,
        /// What is there.
        found: String,
    },
    /// A lease that the entry is fenced by is not held any more under its token.
    #[error("the lease on {} with token {} is lost; nothing was written", .fence.key, .fence.token)]
    Fenced {
        /// Which lease.
        fence: Fence,
    },
    /// A lease was not granted: another one that excludes it is held.
    #[error("{} is locked by {} (token {})", .holder.key, .holder.owner, .holder.token)]
    LeaseHeld {
        /// The lease that is held.
        holder: Box<LeaseRecord>,
    },
    /// A lease was not renewed: it is not held any more under its token.
    #[error("the lease on {key} with token {token} is not held any more")]
    LeaseGone {
        /// What it was on.
        key: LeaseKey,
        /// The token of its grant; zero where only the token was known to be wrong.
        token: FencingToken,
    },
    /// The claim whose end was told is not held any more.
    #[error("the claim of {key} (token {token}) is over: {why}; nothing was written")]
    ClaimOver {
        /// The node.
        key: LeaseKey,
        /// The token of the claim's lease.
        token: FencingToken,
        /// What became of it, for people.
        why: String,
    },
    /// Somebody else changed a row that the entry writes or guards on since its base: it must be checked again on the present state.
    #[error("run {run:?} was changed by another process; the entry must be checked again")]
    Stale {
        /// Which run.
        run: RunId,
    },
    /// An earlier entry of the same run was refused, on which this one stood: it must be checked again.
    #[error("an earlier entry of run {run:?} was refused; this one must be checked again")]
    Chained {
        /// Which run.
        run: RunId,
    },
    /// The entry itself makes no sense.
    #[error(transparent)]
    Input(InputError),
}

/// What became of one entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is in stable storage.
    Applied(Receipt),
    /// Nothing of it is.
    Refused(Refusal),
}

/// What became of a batch: one outcome for every entry, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchAnswer {
    /// The outcomes.
    pub outcomes: Vec<Outcome>,
}

impl Serialize for InputError {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.parts().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for InputError {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (what, why) = <(String, String)>::deserialize(deserializer)?;
        Ok(Self::new(what, why))
    }
}
