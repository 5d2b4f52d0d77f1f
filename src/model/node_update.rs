//! What to change in a node.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};

use super::change::{Change, NoteChanges, notes, notes_weight, read_stamp};
use super::id::{InputError, IntoNodeId, NodeId};
use super::json::RawJson;
use super::lease::FencingToken;
use super::list::List;
use super::node::Fingerprint;
use super::status::NodeStatus;
use super::time::to_micros;

/// How many nodes a node may depend on.
pub const MAX_DEPENDENCIES: usize = 10_000;

/// What to change in a node. What is not given is kept.
///
/// Moving to `running` clears `error`, `finished_at` and `duration_ms`, stamps `started_at`, and raises `attempt` if the node had
/// ended; so does `running` with a higher [`attempt`](Self::attempt) on a node that runs: somebody else took it over. The attempt that is over
/// joins the node's [`attempts`](crate::NodeState::attempts). Moving to an end (success, failed, skipped, cached) stamps `finished_at` and `duration_ms` unless they are given. A node
/// that had ended, waits again, and ends without having run in between keeps neither the start nor the error of the attempt before.
///
/// ```
/// use seeknal_state::NodeUpdate;
/// let update = NodeUpdate::success().row_count(1_000).fingerprint("abc123");
/// # let _ = update;
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[must_use]
pub struct NodeUpdate {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<NodeStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attempt: Option<u32>,
    #[serde(skip_serializing_if = "Change::is_keep", deserialize_with = "read_stamp")]
    pub(crate) started_at: Change<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Change::is_keep", deserialize_with = "read_stamp")]
    pub(crate) finished_at: Change<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) duration_ms: Change<u64>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) row_count: Change<u64>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) fingerprint: Change<Fingerprint>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) error: Change<Arc<str>>,
    #[serde(skip_serializing_if = "Vec::is_empty", with = "notes")]
    pub(crate) watermarks: NoteChanges,
    #[serde(skip_serializing_if = "Vec::is_empty", with = "notes")]
    pub(crate) metadata: NoteChanges,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "read_needed")]
    pub(crate) depends_on: Option<List<NodeId>>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) max_attempts: Change<u32>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) worker: Change<Arc<str>>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) token: Change<FencingToken>,
    /// What was wrong with what was given: said when it is applied, because building it cannot fail. It goes where the update goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) invalid: Option<InputError>,
}

/// A node that is named twice counts once, also where it is read.
fn read_needed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<List<NodeId>>, D::Error> {
    let Some(mut needed) = Option::<Vec<NodeId>>::deserialize(deserializer)? else { return Ok(None) };
    let mut seen = BTreeSet::new();
    needed.retain(|node| seen.insert(node.clone()));
    Ok(Some(needed.into()))
}

impl NodeUpdate {
    /// Changes nothing yet; on a node that is not there it makes a pending one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves to a status.
    pub fn status(status: NodeStatus) -> Self {
        Self { status: Some(status), ..Self::default() }
    }

    /// Moves to `pending`.
    pub fn pending() -> Self {
        Self::status(NodeStatus::Pending)
    }

    /// Moves to `running`.
    pub fn running() -> Self {
        Self::status(NodeStatus::Running)
    }

    /// Moves to `success`.
    pub fn success() -> Self {
        Self::status(NodeStatus::Success)
    }

    /// Moves to `failed`, with the reason.
    pub fn failed(error: impl AsRef<str>) -> Self {
        Self { error: Change::Set(Arc::from(error.as_ref())), ..Self::status(NodeStatus::Failed) }
    }

    /// Moves to `skipped`. That counts as done: what depends on the node becomes ready ([`ClaimFilter::done`](crate::ClaimFilter::done) says otherwise). So where a node failed
    /// and nothing behind it is to run, skip all that depends on it, directly or not, in one transaction.
    pub fn skipped() -> Self {
        Self::status(NodeStatus::Skipped)
    }

    /// Moves to `cached`.
    pub fn cached() -> Self {
        Self::status(NodeStatus::Cached)
    }

    /// Says which attempt this is, instead of counting. Raised together with `running` or `pending` it begins a new attempt: the one before
    /// joins the history.
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.attempt = Some(attempt);
        self
    }

    /// When it started, instead of the time of the call. Cut to whole microseconds.
    pub fn started_at(mut self, stamp: DateTime<Utc>) -> Self {
        self.started_at = Change::Set(to_micros(stamp));
        self
    }

    /// When it ended, instead of the time of the call. Cut to whole microseconds.
    pub fn finished_at(mut self, stamp: DateTime<Utc>) -> Self {
        self.finished_at = Change::Set(to_micros(stamp));
        self
    }

    /// How long it took, instead of the time between start and end. Kept in whole milliseconds.
    pub fn duration(self, duration: Duration) -> Self {
        self.duration_ms(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }

    /// How long it took in milliseconds, instead of the time between start and end.
    pub fn duration_ms(mut self, ms: u64) -> Self {
        self.duration_ms = Change::Set(ms);
        self
    }

    /// How many rows it made.
    pub fn row_count(mut self, rows: u64) -> Self {
        self.row_count = Change::Set(rows);
        self
    }

    /// What its result was made from.
    pub fn fingerprint(mut self, fingerprint: impl Into<Fingerprint>) -> Self {
        self.fingerprint = Change::Set(fingerprint.into());
        self
    }

    /// Why it failed, or a warning.
    pub fn error(mut self, error: impl AsRef<str>) -> Self {
        self.error = Change::Set(Arc::from(error.as_ref()));
        self
    }

    /// Forgets the error.
    pub fn clear_error(mut self) -> Self {
        self.error = Change::Clear;
        self
    }

    /// Forgets the row count.
    pub fn clear_row_count(mut self) -> Self {
        self.row_count = Change::Clear;
        self
    }

    /// Forgets the fingerprint.
    pub fn clear_fingerprint(mut self) -> Self {
        self.fingerprint = Change::Clear;
        self
    }

    /// How far an incremental source was read.
    pub fn watermark(mut self, name: impl AsRef<str>, value: impl AsRef<str>) -> Self {
        self.watermarks.push((Arc::from(name.as_ref()), Some(RawJson::string(value.as_ref()))));
        self
    }

    /// Sets a note.
    pub fn metadata(mut self, key: impl AsRef<str>, value: impl Into<serde_json::Value>) -> Self {
        self.metadata.push((Arc::from(key.as_ref()), Some(RawJson::from(&value.into()))));
        self
    }

    /// Removes a note.
    pub fn remove_metadata(mut self, key: impl AsRef<str>) -> Self {
        self.metadata.push((Arc::from(key.as_ref()), None));
        self
    }

    /// Which nodes of the same run must be done before this one is ready for a claim, instead of those it had; none clears them. A node that
    /// is named twice counts once; one that the run does not have is kept, and means: not ready. Refused when it is written: an invalid name,
    /// the node itself, more than [`MAX_DEPENDENCIES`].
    pub fn depends_on<I>(mut self, nodes: I) -> Self
    where
        I: IntoIterator,
        I::Item: IntoNodeId,
    {
        let mut seen = BTreeSet::new();
        let mut list = Vec::new();
        for node in nodes {
            match node.into_node_id() {
                Ok(node) => {
                    if seen.insert(node.clone()) {
                        list.push(node);
                    }
                }
                Err(error) => {
                    self.invalid.get_or_insert(error.within("depends_on"));
                }
            }
            if list.len() > MAX_DEPENDENCIES {
                // The rest of an endless list is nobody's.
                break;
            }
        }
        self.depends_on = Some(list.into());
        self
    }

    /// How many attempts it may take: a claim that is [given another try](crate::Claim::retry), or whose worker vanished or panicked, leaves it failed after the last one. Zero is refused
    /// when it is written.
    ///
    /// A node that used them up runs again when it is made pending with more of them: `NodeUpdate::pending().max_attempts(node.attempt + n)` gives it `n`. With
    /// `pending()` alone it has one.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Change::Set(attempts);
        self
    }

    /// Allows any number of attempts.
    pub fn clear_max_attempts(mut self) -> Self {
        self.max_attempts = Change::Clear;
        self
    }

    /// Who works on it: what tells a claimed node from one that its orchestrator moved by itself. Moving to `running` or `pending` forgets the
    /// last one.
    pub(crate) fn worker(mut self, name: impl AsRef<str>) -> Self {
        self.worker = Change::Set(Arc::from(name.as_ref()));
        self
    }

    /// Which claim tells the end of the attempt.
    pub(crate) fn token(mut self, token: FencingToken) -> Self {
        self.token = Change::Set(token);
        self
    }

    /// The status that it moves to.
    pub(crate) fn target(&self) -> Option<&NodeStatus> {
        self.status.as_ref()
    }

    /// The same, with a status to move to.
    pub(crate) fn and_status(mut self, status: NodeStatus) -> Self {
        self.status = Some(status);
        self
    }

    /// As if the attempt had not begun.
    pub(crate) fn unbegun(mut self) -> Self {
        self.started_at = Change::Clear;
        self
    }

    /// Whether it can be written to this node.
    pub(crate) fn check(&self, node: &NodeId) -> Result<(), InputError> {
        if let Some(error) = &self.invalid {
            return Err(error.clone().within(format_args!("node {node:?}")));
        }
        if let Some(needed) = &self.depends_on {
            let wrong = |why: String| Err(InputError::new(format!("depends_on of node {node:?}"), why));
            if needed.contains(node) {
                return wrong("it names the node itself; a node cannot wait for its own end".to_owned());
            }
            if needed.len() > MAX_DEPENDENCIES {
                return wrong(format!(
                    "it names more than {MAX_DEPENDENCIES} nodes; put a node between them that stands for many"
                ));
            }
        }
        if self.max_attempts == Change::Set(0) {
            return Err(InputError::new(format!("max_attempts of node {node:?}"), "it is 0; allow at least 1, or leave it out"));
        }
        Ok(())
    }

    /// About how many bytes this takes.
    pub(super) fn weight(&self) -> usize {
        let needed: usize = self.depends_on.iter().flatten().map(|node| node.as_str().len() + 32).sum();
        let text = |change: &Change<Arc<str>>| if let Change::Set(text) = change { text.len() } else { 0 };
        let fingerprint = if let Change::Set(print) = &self.fingerprint { print.as_raw().as_str().len() } else { 0 };
        needed
            + self.status.as_ref().map_or(0, NodeStatus::weight)
            + text(&self.error)
            + text(&self.worker)
            + fingerprint
            + notes_weight(&self.watermarks)
            + notes_weight(&self.metadata)
    }
}
