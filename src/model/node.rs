//! The state of one node in one run.

use std::collections::BTreeSet;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::attempt::Attempt;
use super::id::{InputError, NodeId, PartitionKey};
use super::interval::IntervalSet;
use super::json::RawJson;
use super::lease::FencingToken;
use super::list::List;
use super::metadata::Metadata;
use super::run::Version;
use super::status::NodeStatus;

/// What a node's result was made from. The guide writes a text; Seeknal 2.x writes an object of hashes. Either keeps its shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawJson")]
pub struct Fingerprint(RawJson);

impl Fingerprint {
    /// A fingerprint of plain text.
    pub fn text(text: &str) -> Self {
        Self(RawJson::string(text))
    }

    /// Takes a JSON text or object as it is.
    ///
    /// # Errors
    /// [`InputError`] if the value is neither.
    pub fn from_raw(raw: RawJson) -> Result<Self, InputError> {
        if raw.as_str().starts_with(['"', '{']) {
            return Ok(Self(raw));
        }
        Err(InputError::new("fingerprint", "it must be a text or an object of hashes"))
    }

    /// The JSON as it is stored.
    pub fn as_raw(&self) -> &RawJson {
        &self.0
    }

    /// The text itself, or the `content_hash` of an object.
    pub fn content_hash(&self) -> Option<String> {
        self.0.as_text().or_else(|| {
            let members = self.0.members()?;
            members.iter().find(|(key, _)| key == "content_hash")?.1.as_text()
        })
    }

    /// Whether this is an object of hashes.
    pub fn is_object(&self) -> bool {
        self.0.as_str().starts_with('{')
    }
}

impl TryFrom<RawJson> for Fingerprint {
    type Error = InputError;

    /// As [`from_raw`](Self::from_raw).
    fn try_from(raw: RawJson) -> Result<Self, InputError> {
        Self::from_raw(raw)
    }
}

impl From<&str> for Fingerprint {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<String> for Fingerprint {
    fn from(text: String) -> Self {
        Self::text(&text)
    }
}

/// What is known of one node in one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeState {
    /// Where it stands.
    pub status: NodeStatus,
    /// Which attempt this is; the first one is 1.
    #[serde(default = "first_attempt", skip_serializing_if = "is_first")]
    pub attempt: u32,
    /// When the attempt started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// How long it took, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// How many rows it made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_count: Option<u64>,
    /// What its result was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Arc<str>>,
    /// How far incremental sources were read, by the watermark's name (`last_watermark`, `pg_last_watermark`, or one of the caller's).
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub watermarks: Metadata,
    /// Free notes.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub metadata: Metadata,
    /// The stretches of time that are complete.
    #[serde(default, skip_serializing_if = "no_intervals")]
    pub intervals: Arc<IntervalSet>,
    /// The partitions that are complete.
    #[serde(default, skip_serializing_if = "no_partitions")]
    pub partitions: Arc<BTreeSet<PartitionKey>>,
    /// The nodes of the same run that must be done before this one is ready for a claim. A name that the run does not have is kept; then this
    /// one is not ready.
    #[serde(default, skip_serializing_if = "no_elements")]
    pub depends_on: List<NodeId>,
    /// How many attempts it may take: a claim whose worker vanished on the last one leaves it failed. None: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    /// Earlier attempts that are over, oldest first; the newest [`MAX_ATTEMPTS_KEPT`](super::MAX_ATTEMPTS_KEPT).
    #[serde(default, skip_serializing_if = "no_elements")]
    pub attempts: List<Attempt>,
    /// Who works on the attempt, or worked on it: the name that the claim gave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<Arc<str>>,
    /// The fencing token of the claim that told the end of the attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<FencingToken>,
    /// For a node that came from a foreign file: the object it was, with everything that was not understood. What is known and has not
    /// changed since is written back in this object's own words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra: Option<RawJson>,
    /// The run's version that last changed this node.
    #[serde(default)]
    pub version: Version,
}

fn first_attempt() -> u32 {
    1
}

fn is_first(attempt: &u32) -> bool {
    *attempt == 1
}

fn no_intervals(set: &Arc<IntervalSet>) -> bool {
    set.is_empty()
}

fn no_partitions(set: &Arc<BTreeSet<PartitionKey>>) -> bool {
    set.is_empty()
}

fn no_elements<T>(list: &List<T>) -> bool {
    list.is_empty()
}

impl NodeState {
    /// A node of which nothing is known but its status.
    pub fn new(status: NodeStatus) -> Self {
        Self {
            status,
            attempt: 1,
            started_at: None,
            finished_at: None,
            duration_ms: None,
            row_count: None,
            fingerprint: None,
            error: None,
            watermarks: Metadata::new(),
            metadata: Metadata::new(),
            intervals: Arc::default(),
            partitions: Arc::default(),
            depends_on: List::new(),
            max_attempts: None,
            attempts: List::new(),
            worker: None,
            token: None,
            extra: None,
            version: Version::NONE,
        }
    }

    /// The same state, without the stamp of the version: for comparing content over stores.
    pub fn without_version(&self) -> Self {
        Self { version: Version::NONE, ..self.clone() }
    }
}
