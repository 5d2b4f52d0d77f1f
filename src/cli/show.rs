//! `seeknal state show RUN`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::exit::CliError;
use super::output::{Output, between, dash, duration, no_state, one_line, open_for_reading, stamp, table};
use super::runs::created;
use crate::model::{
    Attempt, Blocked, FencingToken, Fingerprint, IntervalSet, Metadata, NodeId, NodeState, NodeStatus, PartitionKey, ProcessInfo,
    RawJson, RunId, RunState, RunStatus, RunSummary, Version, time,
};
use crate::project::{ProjectErrorKind, Settings, end};

/// How much of an error fits a table.
const ERROR_SHOWN: usize = 60;

/// A run as it is printed. Every field is always there.
#[derive(Serialize)]
struct Shown<'a> {
    run_id: &'a RunId,
    status: &'a RunStatus,
    version: Version,
    /// `null`: nothing says it.
    created_at: Option<String>,
    started_at: Option<String>,
    finished_at: Option<String>,
    duration_ms: Option<u64>,
    worker: Option<&'a ProcessInfo>,
    /// Whether it runs, and its process is known to be gone.
    abandoned: bool,
    metadata: &'a Metadata,
    /// What a foreign file said beyond that.
    extra: Option<&'a RawJson>,
    nodes: BTreeMap<&'a NodeId, Node<'a>>,
}

/// A node as it is printed. Every field is always there.
#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "the names are the document's")]
struct Node<'a> {
    run_id: &'a RunId,
    node_id: &'a NodeId,
    status: &'a NodeStatus,
    attempt: u32,
    version: Version,
    started_at: Option<String>,
    finished_at: Option<String>,
    duration_ms: Option<u64>,
    row_count: Option<u64>,
    fingerprint: Option<&'a Fingerprint>,
    error: Option<&'a str>,
    watermarks: &'a Metadata,
    metadata: &'a Metadata,
    completed_intervals: &'a IntervalSet,
    completed_partitions: &'a BTreeSet<PartitionKey>,
    depends_on: &'a [NodeId],
    max_attempts: Option<u32>,
    /// Earlier attempts that are over.
    attempts: &'a [Attempt],
    worker: Option<&'a str>,
    token: Option<FencingToken>,
    /// Why it is pending and will not become ready; `null`: it may.
    blocked: Option<Why<'a>>,
    /// What a foreign file said beyond that.
    extra: Option<&'a RawJson>,
}

/// What keeps a node from becoming ready.
#[derive(Serialize)]
struct Why<'a> {
    by: &'a NodeId,
    reason: String,
}

impl<'a> Shown<'a> {
    fn of(run: &'a RunState, blocked: &'a [Blocked], abandoned: bool) -> Self {
        let header = run.header();
        Self {
            run_id: run.id(),
            status: &header.status,
            version: run.version(),
            created_at: created(header).map(time::format),
            started_at: header.started_at.map(time::format),
            finished_at: header.finished_at.map(time::format),
            duration_ms: between(header.started_at, header.finished_at),
            worker: header.worker.as_ref(),
            abandoned,
            metadata: &header.metadata,
            extra: header.extra.as_ref(),
            nodes: run.nodes().map(|(id, node)| (id, Node::of(run.id(), id, node, of_node(blocked, id)))).collect(),
        }
    }
}

impl<'a> Node<'a> {
    fn of(run_id: &'a RunId, node_id: &'a NodeId, node: &'a NodeState, blocked: Option<&'a Blocked>) -> Self {
        Self {
            run_id,
            node_id,
            status: &node.status,
            attempt: node.attempt,
            version: node.version,
            started_at: node.started_at.map(time::format),
            finished_at: node.finished_at.map(time::format),
            duration_ms: node.duration_ms,
            row_count: node.row_count,
            fingerprint: node.fingerprint.as_ref(),
            error: node.error.as_deref(),
            watermarks: &node.watermarks,
            metadata: &node.metadata,
            completed_intervals: &node.intervals,
            completed_partitions: &node.partitions,
            depends_on: &node.depends_on,
            max_attempts: node.max_attempts,
            attempts: &node.attempts,
            worker: node.worker.as_deref(),
            token: node.token,
            blocked: blocked.map(|blocked| Why { by: &blocked.by, reason: blocked.reason.to_string() }),
            extra: node.extra.as_ref(),
        }
    }
}

pub(super) async fn run(settings: &Settings, run: &RunId, out: &mut Output) -> Result<(), CliError> {
    let Some(backend) = open_for_reading(settings).await? else {
        return Err(CliError::new(ProjectErrorKind::NotFound, format!("run {run:?} is not there: {}", no_state(settings))));
    };
    let found = backend.load_run(run).await?;
    let location = backend.location();
    let summary = found.as_ref().map(RunSummary::of);
    let abandoned = !end::abandoned(&*backend, summary.as_slice(), true).await.is_empty();
    backend.close().await?;
    let (Some(state), Some(summary)) = (found, summary) else {
        let message = format!("{location} has no run {run:?}; `seeknal state runs --all` lists them");
        return Err(CliError::new(ProjectErrorKind::NotFound, message));
    };
    let blocked = state.blocked();
    if out.is_json() {
        return out.json(&Shown::of(&state, &blocked, abandoned));
    }
    for line in super::runs::header_lines(&summary, abandoned) {
        out.line(line)?;
    }
    if state.node_count() == 0 {
        return out.line("No nodes.");
    }
    let mut nodes = table(&["node", "status", "attempt", "started", "took", "rows", "intervals", "partitions", "error"]);
    for (id, node) in state.nodes() {
        nodes.add_row([
            one_line(id.as_str()),
            one_line(node.status.as_str()),
            node.attempt.to_string(),
            stamp(node.started_at),
            duration(node.duration_ms),
            node.row_count.map_or_else(dash, |rows| rows.to_string()),
            node.intervals.len().to_string(),
            node.partitions.len().to_string(),
            trouble(node, of_node(&blocked, id)).map_or_else(dash, |trouble| shortened(&trouble)),
        ]);
    }
    out.line("")?;
    out.table(&nodes)
}

/// Why a node will not become ready, of those that are told in the order of their ids.
fn of_node<'b>(blocked: &'b [Blocked], id: &NodeId) -> Option<&'b Blocked> {
    blocked.binary_search_by(|blocked| blocked.node.cmp(id)).ok().and_then(|at| blocked.get(at))
}

/// What went wrong with a node, or keeps it from becoming ready.
fn trouble<'a>(node: &'a NodeState, blocked: Option<&Blocked>) -> Option<Cow<'a, str>> {
    let kept = || blocked.map(|blocked| Cow::Owned(format!("blocked by {} ({})", blocked.by, blocked.reason)));
    kept().or_else(|| error_of(node))
}

/// What went wrong with a node. Seeknal itself tells it only among the metadata.
fn error_of(node: &NodeState) -> Option<Cow<'_, str>> {
    let noted = || node.metadata.get("error").filter(|error| node.status == NodeStatus::Failed && !error.is_null());
    let told = node.error.as_deref().map(Cow::Borrowed);
    told.or_else(|| noted().map(|error| Cow::Owned(error.as_text().unwrap_or_else(|| error.to_string()))))
}

fn shortened(text: &str) -> String {
    let mut shown: String = one_line(text).chars().take(ERROR_SHOWN).collect();
    if text.chars().nth(ERROR_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}
