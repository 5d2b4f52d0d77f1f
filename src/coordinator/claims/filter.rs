//! What a worker asks for.

use std::sync::Arc;
use std::time::Duration;

use crate::model::{InputError, NodeStatus};

/// Which work is asked for, by whom, and for how long.
///
/// | option | default | |
/// |---|---|---|
/// | [`owner`](Self::owner) | host and process id | who works, for people: it stands in the node and in its lease |
/// | [`ttl`](Self::ttl) | the coordinator's `lease_ttl`, 30 s | 100 ms to 1 h: how long a claim outlives its process at most |
/// | [`wait`](Self::wait) | not at all | for a node to become ready |
/// | [`done`](Self::done) | success, cached, skipped | what a node must be for those that depend on it |
#[derive(Debug, Clone)]
#[must_use = "a filter does nothing until a claim is asked for with it"]
pub struct ClaimFilter {
    pub(super) owner: Option<Arc<str>>,
    pub(super) ttl: Option<Duration>,
    pub(super) wait: Duration,
    pub(super) done: Vec<NodeStatus>,
}

impl Default for ClaimFilter {
    fn default() -> Self {
        let done = vec![NodeStatus::Success, NodeStatus::Cached, NodeStatus::Skipped];
        Self { owner: None, ttl: None, wait: Duration::ZERO, done }
    }
}

impl ClaimFilter {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names the worker. Any number of claims may be held under one name.
    pub fn owner(mut self, name: impl AsRef<str>) -> Self {
        self.owner = Some(Arc::from(name.as_ref()));
        self
    }

    /// How long the claim's lease lasts without a renewal; it is renewed as long as the claim lives.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// How long to wait for a node to become ready. Waiting costs nothing: whoever makes one ready wakes whoever waits. Without it the answer comes at once, and
    /// a loop that asks again at once burns a core.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// The statuses that a node must be in for those that depend on it to be ready. Refused when it is used: pending and running.
    pub fn done(mut self, statuses: impl IntoIterator<Item = NodeStatus>) -> Self {
        self.done = statuses.into_iter().collect();
        self.done.sort();
        self.done.dedup();
        self
    }

    pub(super) fn check(&self) -> Result<(), InputError> {
        match self.done.iter().find(|status| matches!(status, NodeStatus::Pending | NodeStatus::Running)) {
            Some(status) => Err(InputError::new(format!("claim filter done({status})"), "a node in it has not ended")),
            None => Ok(()),
        }
    }
}
