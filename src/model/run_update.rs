//! How a run begins, and what to change in one.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};

use super::change::{Change, NoteChanges, notes, notes_weight, read_stamp};
use super::json::RawJson;
use super::process::ProcessInfo;
use super::status::RunStatus;
use super::time::to_micros;

/// How a new run begins.
///
/// ```
/// use seeknal_state::NewRun;
/// let run = NewRun::running().metadata("trigger", "cron");
/// # let _ = run;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub struct NewRun {
    pub(crate) status: RunStatus,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "read_start")]
    pub(crate) started_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) worker: Option<ProcessInfo>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "notes")]
    pub(crate) metadata: NoteChanges,
}

/// A stamp that is read is cut as one that is given.
fn read_start<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DateTime<Utc>>, D::Error> {
    Ok(Option::deserialize(deserializer)?.map(to_micros))
}

impl NewRun {
    /// A run in a status.
    pub fn status(status: RunStatus) -> Self {
        Self { status, started_at: None, worker: None, metadata: Vec::new() }
    }

    /// A run that waits to be started.
    pub fn pending() -> Self {
        Self::status(RunStatus::Pending)
    }

    /// A run that this process works on from now on.
    pub fn running() -> Self {
        Self::status(RunStatus::Running)
    }

    /// About how many bytes this takes.
    pub(super) fn weight(&self) -> usize {
        notes_weight(&self.metadata) + self.status.weight()
    }

    /// When it started, instead of the time of the call. Cut to whole microseconds.
    pub fn started_at(mut self, stamp: DateTime<Utc>) -> Self {
        self.started_at = Some(to_micros(stamp));
        self
    }

    /// Sets a note.
    pub fn metadata(mut self, key: impl AsRef<str>, value: impl Into<serde_json::Value>) -> Self {
        self.metadata.push((Arc::from(key.as_ref()), Some(RawJson::from(&value.into()))));
        self
    }
}

/// What to change in a run. What is not given is kept. Moving to `running` stamps `started_at` if it has none, clears `finished_at` and
/// makes this process its worker; moving to an end (success, failed, cancelled) stamps `finished_at` unless it is given, and frees
/// the run's locks and its nodes'.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[must_use]
pub struct RunUpdate {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<RunStatus>,
    #[serde(skip_serializing_if = "Change::is_keep", deserialize_with = "read_stamp")]
    pub(crate) started_at: Change<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Change::is_keep", deserialize_with = "read_stamp")]
    pub(crate) finished_at: Change<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Change::is_keep")]
    pub(crate) worker: Change<ProcessInfo>,
    #[serde(skip_serializing_if = "Vec::is_empty", with = "notes")]
    pub(crate) metadata: NoteChanges,
}

impl RunUpdate {
    /// Changes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves to a status.
    pub fn status(status: RunStatus) -> Self {
        Self { status: Some(status), ..Self::default() }
    }

    /// Moves to `running`.
    pub fn running() -> Self {
        Self::status(RunStatus::Running)
    }

    /// Moves to `success`.
    pub fn success() -> Self {
        Self::status(RunStatus::Success)
    }

    /// Moves to `failed`.
    pub fn failed() -> Self {
        Self::status(RunStatus::Failed)
    }

    /// Moves to `cancelled`.
    pub fn cancelled() -> Self {
        Self::status(RunStatus::Cancelled)
    }

    /// When it started. Cut to whole microseconds.
    pub fn started_at(mut self, stamp: DateTime<Utc>) -> Self {
        self.started_at = Change::Set(to_micros(stamp));
        self
    }

    /// When it ended. Cut to whole microseconds.
    pub fn finished_at(mut self, stamp: DateTime<Utc>) -> Self {
        self.finished_at = Change::Set(to_micros(stamp));
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

    /// About how many bytes this takes.
    pub(super) fn weight(&self) -> usize {
        notes_weight(&self.metadata) + self.status.as_ref().map_or(0, RunStatus::weight)
    }

    /// Whether this ends the run, and so frees its locks.
    pub fn ends_run(&self) -> bool {
        self.status.as_ref().is_some_and(RunStatus::is_ended)
    }
}
