//! Leases as data: what can be locked, by whom, under which fencing token.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::id::{NodeId, RunId};
use super::process::ProcessInfo;

/// A fencing token: one counter for the whole store that grows with every grant, for ever, over restarts, processes and restored backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FencingToken(pub u64);

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a lease is on: a whole run, or one node of it. A run's lock and its nodes' locks exclude one another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseKey {
    /// The run.
    pub run: RunId,
    /// The node; none for the whole run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
}

impl LeaseKey {
    /// A whole run.
    pub fn run(run: RunId) -> Self {
        Self { run, node: None }
    }

    /// One node of a run.
    pub fn node(run: RunId, node: NodeId) -> Self {
        Self { run, node: Some(node) }
    }

    /// About how many bytes this takes.
    pub(crate) fn weight(&self) -> usize {
        32 + self.run.as_str().len() + self.node.as_ref().map_or(0, |node| node.as_str().len())
    }

    /// Whether leases on both cannot be held at the same time.
    pub fn excludes(&self, other: &Self) -> bool {
        self.run == other.run && (self.node.is_none() || other.node.is_none() || self.node == other.node)
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node {
            None => write!(f, "run {:?}", self.run),
            Some(node) => write!(f, "node {node:?} of run {:?}", self.run),
        }
    }
}

/// Who holds or wants a lease: a process, and inside it a name (a task, an executor).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseOwner {
    /// The process.
    pub process: ProcessInfo,
    /// The name inside the process, for people and for finding cycles of waiters; unique for a caller who gave none.
    pub name: Arc<str>,
}

impl fmt::Display for LeaseOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({})", self.name, self.process)
    }
}

/// One lease as it can be listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LeaseRecord {
    /// What it is on.
    pub key: LeaseKey,
    /// Its fencing token.
    pub token: FencingToken,
    /// Who holds it.
    pub owner: LeaseOwner,
    /// What for, in the holder's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purpose: Option<Arc<str>>,
    /// When it was granted (wall clock, for people).
    pub since: DateTime<Utc>,
    /// When it expires unless it is renewed (wall clock, on servers theirs; for people: expiry itself is decided on monotonic time, or by the server).
    pub until: DateTime<Utc>,
    /// How long a renewal lasts, in milliseconds.
    pub ttl_ms: u64,
}

impl LeaseRecord {
    /// A lease as it was granted.
    pub fn new(
        key: LeaseKey,
        token: FencingToken,
        owner: LeaseOwner,
        purpose: Option<Arc<str>>,
        since: DateTime<Utc>,
        ttl_ms: u64,
    ) -> Self {
        let until = later(since, ttl_ms);
        Self { key, token, owner, purpose, since, until, ttl_ms }
    }

    /// The same lease, renewed at this time.
    pub fn renewed(mut self, now: DateTime<Utc>) -> Self {
        self.until = later(now, self.ttl_ms);
        self
    }
}

fn later(stamp: DateTime<Utc>, ms: u64) -> DateTime<Utc> {
    i64::try_from(ms)
        .ok()
        .and_then(chrono::Duration::try_milliseconds)
        .and_then(|ttl| stamp.checked_add_signed(ttl))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

/// A change of a lease. Where leases are rows of a database these travel in entries and are decided in the entry's own transaction,
/// on the database's clock; where one process writes they never leave the lock manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseMutation {
    /// Grant a lease with a new token, unless one that excludes it is held; an expired one is taken over.
    Grant {
        /// What on.
        key: LeaseKey,
        /// To whom.
        owner: LeaseOwner,
        /// What for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        purpose: Option<Arc<str>>,
        /// When, by the wall clock.
        at: DateTime<Utc>,
        /// For how long, in milliseconds.
        ttl_ms: u64,
    },
    /// Extend a lease that is still held under this token, and not expired.
    Renew {
        /// What on.
        key: LeaseKey,
        /// The token of the grant.
        token: FencingToken,
        /// When, by the wall clock.
        at: DateTime<Utc>,
        /// For how long from now, in milliseconds.
        ttl_ms: u64,
    },
    /// Give a lease back. An old token changes nothing and is no error: the lease is not this holder's any more.
    Release {
        /// What on.
        key: LeaseKey,
        /// The token of the grant.
        token: FencingToken,
    },
    /// Take a lease away from whoever holds it under this token.
    Force {
        /// The token of the grant.
        token: FencingToken,
    },
}

impl LeaseMutation {
    /// What its holder gives back with this.
    pub(crate) fn returned(&self) -> Option<(&LeaseKey, FencingToken)> {
        match self {
            Self::Release { key, token } => Some((key, *token)),
            _ => None,
        }
    }

    /// About how many bytes this takes.
    pub(crate) fn weight(&self) -> usize {
        const FIXED: usize = 64;
        FIXED
            + match self {
                Self::Grant { key, owner, purpose, .. } => {
                    key.weight() + owner.name.len() + owner.process.host.len() + purpose.as_ref().map_or(0, |text| text.len())
                }
                Self::Renew { key, .. } | Self::Release { key, .. } => key.weight(),
                Self::Force { .. } => 0,
            }
    }
}
