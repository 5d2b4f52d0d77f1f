//! Attempts at a node that are over: what each of them came to, kept when the next one begins.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::lease::FencingToken;
use super::node::NodeState;
use super::status::NodeStatus;

/// How many ended attempts of a node are kept: the newest. Which attempt a node is on is counted beside them, without a bound.
pub const MAX_ATTEMPTS_KEPT: usize = 100;

/// How much of an attempt's error is kept in the history, in bytes of UTF-8. The node's own error is kept whole.
pub const MAX_ATTEMPT_ERROR_BYTES: usize = 2_048;

/// An attempt at a node that is over, as it was when the node went on.
///
/// One whose worker vanished is still `running` and has no end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Attempt {
    /// Which attempt it was; the first one is 1.
    pub number: u32,
    /// Where it stood: `success`, `failed`, … or `running` if it never told an end.
    pub status: NodeStatus,
    /// When it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// How long it took, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Why it failed; at most [`MAX_ATTEMPT_ERROR_BYTES`] of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Arc<str>>,
    /// Who worked on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<Arc<str>>,
    /// The fencing token of the claim that told its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<FencingToken>,
}

impl Attempt {
    /// An attempt of which only its number and where it stood is known.
    pub fn new(number: u32, status: NodeStatus) -> Self {
        Self { number, status, started_at: None, finished_at: None, duration_ms: None, error: None, worker: None, token: None }
    }

    /// About how many bytes this takes.
    pub(super) fn weight(&self) -> usize {
        let text = |text: &Option<Arc<str>>| text.as_ref().map_or(0, |text| text.len());
        256 + self.status.weight() + text(&self.error) + text(&self.worker)
    }

    /// The attempt that a node is on.
    pub fn of(node: &NodeState) -> Self {
        Self {
            number: node.attempt,
            status: node.status.clone(),
            started_at: node.started_at,
            finished_at: node.finished_at,
            duration_ms: node.duration_ms,
            error: node.error.as_ref().map(cut),
            worker: node.worker.clone(),
            token: node.token,
        }
    }
}

fn cut(error: &Arc<str>) -> Arc<str> {
    if error.len() <= MAX_ATTEMPT_ERROR_BYTES {
        return Arc::clone(error);
    }
    let mut end = MAX_ATTEMPT_ERROR_BYTES - '…'.len_utf8();
    while !error.is_char_boundary(end) {
        end -= 1;
    }
    let mut kept = error.get(..end).unwrap_or_default().to_owned();
    kept.push('…');
    Arc::from(kept)
}
