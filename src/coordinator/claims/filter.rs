//! What a worker asks for.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::model::{InputError, NodeId, NodeStatus, RawJson, Selection, Wish};

/// Which work is asked for, by whom, and for how long.
///
/// Workers of different kinds ask for different nodes: by [name](Self::nodes), by [how the name begins](Self::prefix), by what the node's
/// [metadata](Self::metadata) say. All of it must hold, what is not said restricts nothing.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
/// use seeknal_state::{ClaimFilter, Next};
/// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
///
/// let mut tx = state.transaction();
/// tx.create_run("run_1", NewRun::running());
/// tx.set_node_state("run_1", "load.orders", NodeUpdate::pending());
/// tx.set_node_state("run_1", "train.model", NodeUpdate::pending().metadata("queue", "gpu"));
/// tx.commit().await?;
///
/// let gpu = ClaimFilter::new().owner("gpu-1").metadata("queue", "gpu");
/// let claim = state.claim_next("run_1", gpu.clone()).await?.claimed().unwrap();
/// assert_eq!(claim.node_id(), "train.model");
/// claim.complete(NodeUpdate::success()).await?;
/// assert!(matches!(state.claim_next("run_1", gpu).await?, Next::Drained { blocked: 0 })); // the rest is for others
/// # state.close().await }).unwrap();
/// ```
///
/// | option | default | |
/// |---|---|---|
/// | [`owner`](Self::owner) | host and process id | who works, for people: it stands in the node and in its lease |
/// | [`ttl`](Self::ttl) | the coordinator's `lease_ttl`, 30 s | 100 ms to 1 h: how long a claim outlives its process at most |
/// | [`wait`](Self::wait) | not at all | for a node to become ready |
/// | [`done`](Self::done) | success, cached, skipped | what a node must be for those that depend on it |
/// | [`nodes`](Self::nodes), [`prefix`](Self::prefix), [`metadata`](Self::metadata) | every node | which nodes are asked for |
///
/// Everybody who asks for the same nodes with the same `done` shares one list of what is ready, which every commit of the run keeps up to date. Of a run 16 of
/// them are kept, beside those that somebody waits for; what a seventeenth asks for is put together anew, from all nodes. For one node there is
/// [`claim_node`](crate::Coordinator::claim_node).
#[derive(Debug, Clone)]
#[must_use = "a filter does nothing until a claim is asked for with it"]
pub struct ClaimFilter {
    pub(super) owner: Option<Arc<str>>,
    pub(super) ttl: Option<Duration>,
    pub(super) wait: Duration,
    pub(super) wish: Arc<Wish>,
    /// The first name that is none.
    bad: Option<InputError>,
}

impl Default for ClaimFilter {
    fn default() -> Self {
        let mut done = vec![NodeStatus::Success, NodeStatus::Cached, NodeStatus::Skipped];
        // As those that are named: who names these shares the list of those who name none.
        done.sort();
        Self {
            owner: None,
            ttl: None,
            wait: Duration::ZERO,
            wish: Arc::new(Wish { done, nodes: Selection::default() }),
            bad: None,
        }
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
        let done = &mut Arc::make_mut(&mut self.wish).done;
        *done = statuses.into_iter().collect();
        done.sort();
        done.dedup();
        self
    }

    /// Only these nodes; called again, these too. No names at all is no work at all. Refused when it is used: what is no node id.
    pub fn nodes(mut self, ids: impl IntoIterator<Item: AsRef<str>>) -> Self {
        let names = Arc::make_mut(&mut self.wish).nodes.ids.get_or_insert_default();
        for id in ids {
            match NodeId::new(id.as_ref()) {
                Ok(id) => drop(names.insert(Box::from(id.as_str()))),
                Err(error) => drop(self.bad.get_or_insert(error)),
            }
        }
        self
    }

    /// Only nodes whose ids begin so; called again, those that begin so too.
    pub fn prefix(mut self, prefix: impl AsRef<str>) -> Self {
        Arc::make_mut(&mut self.wish).nodes.prefixes.insert(Box::from(prefix.as_ref()));
        self
    }

    /// Only nodes whose metadata have this value under this key; called again, that one too. They are compared as JSON: `3` is neither `"3"` nor `3.0`.
    pub fn metadata(mut self, key: impl AsRef<str>, value: impl Into<Value>) -> Self {
        Arc::make_mut(&mut self.wish).nodes.notes.insert(Box::from(key.as_ref()), RawJson::from(&value.into()));
        self
    }

    pub(super) fn check(&self) -> Result<(), InputError> {
        if let Some(status) = self.wish.done.iter().find(|status| matches!(status, NodeStatus::Pending | NodeStatus::Running)) {
            return Err(InputError::new(format!("claim filter done({status})"), "a node in it has not ended"));
        }
        self.bad.clone().map_or(Ok(()), Err)
    }
}
