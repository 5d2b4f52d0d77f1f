//! Questions about many runs: filters, keyset pages, summaries.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::id::RunId;
use super::run::{RunHeader, RunState, Version};
use super::status::{NodeStatus, RunStatus};
use super::time;

/// Which runs are asked for. Everything that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub struct RunFilter {
    /// One of these statuses; empty means any.
    pub statuses: Vec<RunStatus>,
    /// Created at this time or later.
    pub created_from: Option<DateTime<Utc>>,
    /// Created before this time.
    pub created_before: Option<DateTime<Utc>>,
    /// The id starts with this text.
    pub id_prefix: Option<String>,
}

impl RunFilter {
    /// All runs.
    pub fn all() -> Self {
        Self::default()
    }

    /// Also runs in this status.
    pub fn status(mut self, status: RunStatus) -> Self {
        self.statuses.push(status);
        self
    }

    /// Only runs created at this time or later.
    pub fn created_from(mut self, from: DateTime<Utc>) -> Self {
        self.created_from = Some(from);
        self
    }

    /// Only runs created before this time.
    pub fn created_before(mut self, before: DateTime<Utc>) -> Self {
        self.created_before = Some(before);
        self
    }

    /// Only runs whose id starts with this text.
    pub fn id_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.id_prefix = Some(prefix.into());
        self
    }

    /// The bounds of creation as a store compares them: whole microseconds of the calendar, `None` where there is none. `None` for both together: no run can
    /// be between them.
    #[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
    pub(crate) fn created(&self) -> Option<[Option<DateTime<Utc>>; 2]> {
        let ends = [DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC].map(time::to_micros);
        let [first, last] = ends.map(time::micros);
        let (from, before) = (self.created_from.map(time::micros_up), self.created_before.map(time::micros_up));
        if from.is_some_and(|from| from > last) || before.is_some_and(|before| before <= first) {
            return None;
        }
        let stored = |bound: Option<i64>| bound.and_then(time::from_micros);
        Some([stored(from), stored(before)])
    }

    /// Whether a run is asked for.
    pub fn matches(&self, id: &RunId, header: &RunHeader) -> bool {
        (self.statuses.is_empty() || self.statuses.contains(&header.status))
            && self.created_from.is_none_or(|from| time::micros(header.created_at) >= time::micros_up(from))
            && self.created_before.is_none_or(|before| time::micros(header.created_at) < time::micros_up(before))
            && self.id_prefix.as_deref().is_none_or(|prefix| id.as_str().starts_with(prefix))
    }
}

/// The place after which the next page begins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RunCursor {
    /// When the last run of the page was created.
    pub created_at: DateTime<Utc>,
    /// Its id.
    pub run_id: RunId,
}

/// One page of runs, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub struct RunQuery {
    /// Which runs.
    pub filter: RunFilter,
    /// Begin after this place; `None` is the first page.
    pub after: Option<RunCursor>,
    /// How many runs at most, 1 to 1,000 (what is outside of that counts as the nearest of these); 100 by default.
    pub limit: usize,
    /// Whether a run that cannot be read is named in the page ([`RunPage::unreadable`]), instead of failing it. A backend that cannot do that fails it.
    pub names_unreadable: bool,
}

impl Default for RunQuery {
    fn default() -> Self {
        Self { filter: RunFilter::all(), after: None, limit: 100, names_unreadable: false }
    }
}

impl RunQuery {
    /// The first page of the runs that a filter asks for.
    pub fn new(filter: RunFilter) -> Self {
        Self { filter, ..Self::default() }
    }

    /// Begins after a place.
    pub fn after(mut self, cursor: Option<RunCursor>) -> Self {
        self.after = cursor;
        self
    }

    /// Names runs that cannot be read, and lists the others.
    pub fn naming_unreadable(mut self) -> Self {
        self.names_unreadable = true;
        self
    }

    /// At most this many runs (clamped to 1 to 1,000).
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit.clamp(1, 1000);
        self
    }

    /// The query as a backend answers it: a limit outside of 1 to 1,000 counts as the nearest of these, so that every page ends and none is empty before the last.
    pub fn clamped(&self) -> Self {
        self.clone().limit(self.limit)
    }
}

/// A run in a listing. It is written (`Serialize`) as one flat object, with the run's own `version` and the header's as `header_version`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunSummary {
    /// Its name.
    pub run_id: RunId,
    /// Its version.
    pub version: Version,
    /// What is known of it as a whole.
    pub header: RunHeader,
    /// How many nodes stand where.
    pub nodes: BTreeMap<NodeStatus, u64>,
}

impl RunSummary {
    /// A summary from its parts.
    pub fn new(run_id: RunId, version: Version, header: RunHeader, nodes: BTreeMap<NodeStatus, u64>) -> Self {
        Self { run_id, version, header, nodes }
    }

    /// The summary of a run.
    pub fn of(run: &RunState) -> Self {
        let mut nodes = BTreeMap::new();
        for (_, node) in run.nodes() {
            *nodes.entry(node.status.clone()).or_default() += 1;
        }
        Self::new(run.id().clone(), run.version(), run.header().clone(), nodes)
    }

    /// Where this run stands in the order of runs.
    pub fn cursor(&self) -> RunCursor {
        RunCursor { created_at: self.header.created_at, run_id: self.run_id.clone() }
    }
}

/// A run that is stored and cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct UnreadableRun {
    /// Its name as it is stored: perhaps that is what makes no sense.
    pub run_id: String,
    /// What the storage says of it.
    pub reason: String,
}

impl UnreadableRun {
    /// A run that cannot be read, and why.
    pub fn new(run_id: impl Into<String>, reason: impl ToString) -> Self {
        Self { run_id: run_id.into(), reason: reason.to_string() }
    }
}

/// One page of runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunPage {
    /// The runs, newest first.
    pub runs: Vec<RunSummary>,
    /// Where the next page begins; `None` if this was the last one.
    pub next: Option<RunCursor>,
    /// Runs among these, or behind the last ones, that cannot be read, where [`RunQuery::names_unreadable`] asks for them. Each is on one page.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<UnreadableRun>,
}

impl RunPage {
    /// A page from its parts.
    pub fn new(runs: Vec<RunSummary>, next: Option<RunCursor>) -> Self {
        Self { runs, next, unreadable: Vec::new() }
    }

    /// A page of `most` runs from rows, newest first, of which so many were `asked` for. `None` if more are needed: only a run that can be read tells where the
    /// next page begins, and what lies behind it is on that one.
    #[cfg(any(feature = "sqlite", feature = "libsql", feature = "postgres"))]
    pub(crate) fn of_rows(rows: Vec<Result<RunSummary, UnreadableRun>>, asked: usize, most: usize) -> Option<Self> {
        let mut page = Self::default();
        let mut more = rows.len() >= asked;
        let mut behind = Vec::new();
        for row in rows {
            if page.runs.len() == most {
                more = true;
                break;
            }
            match row {
                Ok(run) => {
                    page.unreadable.append(&mut behind);
                    page.runs.push(run);
                }
                Err(unreadable) => behind.push(unreadable),
            }
        }
        if more {
            page.next = Some(page.runs.last()?.cursor());
        } else {
            page.unreadable.append(&mut behind);
        }
        Some(page)
    }
}
