//! `seeknal state runs`.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::args::RunsArgs;
use super::exit::CliError;
use super::output::{Output, between, counted, dash, duration, note, one_line, open_for_reading, stamp, table, tell_no_state};
use crate::model::{
    Metadata, NodeStatus, ProcessInfo, RunFilter, RunHeader, RunId, RunQuery, RunStatus, RunSummary, UnreadableRun, Version, time,
};
use crate::project::shown::shell;
use crate::project::{ProjectErrorKind, Settings, end};

/// A run as it is printed. Every field is always there.
#[derive(Serialize)]
struct Row<'a> {
    run_id: &'a RunId,
    status: &'a RunStatus,
    version: Version,
    /// `null`: nothing says it.
    created_at: Option<String>,
    started_at: Option<String>,
    finished_at: Option<String>,
    duration_ms: Option<u64>,
    node_count: u64,
    nodes: &'a std::collections::BTreeMap<NodeStatus, u64>,
    worker: Option<&'a ProcessInfo>,
    /// Whether it runs, and its process is known to be gone.
    abandoned: bool,
    metadata: &'a Metadata,
}

impl<'a> Row<'a> {
    fn of(run: &'a RunSummary, abandoned: bool) -> Self {
        let header = &run.header;
        Self {
            run_id: &run.run_id,
            status: &header.status,
            version: run.version,
            created_at: created(header).map(time::format),
            started_at: header.started_at.map(time::format),
            finished_at: header.finished_at.map(time::format),
            duration_ms: between(header.started_at, header.finished_at),
            node_count: run.nodes.values().sum(),
            nodes: &run.nodes,
            worker: header.worker.as_ref(),
            abandoned,
            metadata: &header.metadata,
        }
    }
}

pub(super) async fn run(settings: &Settings, options: &RunsArgs, out: &mut Output) -> Result<(), CliError> {
    let Some(backend) = open_for_reading(settings).await? else {
        tell_no_state(settings, out)?;
        return if out.is_json() { out.array().end() } else { Ok(()) };
    };
    let mut filter = RunFilter::all();
    for status in &options.status {
        filter = filter.status(status.clone());
    }
    if let Some(prefix) = &options.prefix {
        filter = filter.id_prefix(prefix);
    }
    let mut left = if options.all { u64::MAX } else { options.limit };
    let mut query = RunQuery::new(filter).naming_unreadable();
    let mut more = false;
    let mut unreadable = Vec::new();
    let mut printer = Printer::new(out);
    while left > 0 && !printer.is_reader_gone() {
        query = query.limit(usize::try_from(left.min(500)).unwrap_or(500));
        let page = match backend.list_runs(&query).await {
            Ok(page) => page,
            Err(error) => {
                printer.cut_off()?;
                return Err(error.into());
            }
        };
        // The newest are watched: a list of many pages would take as many seconds.
        let abandoned = end::abandoned(&*backend, &page.runs, query.after.is_none()).await;
        for run in &page.runs {
            printer.push(&Row::of(run, abandoned.contains(&run.run_id)))?;
        }
        unreadable.extend(page.unreadable);
        left = left.saturating_sub(u64::try_from(page.runs.len()).unwrap_or(u64::MAX));
        more = page.next.is_some();
        if !more {
            break;
        }
        query = query.after(page.next);
    }
    let is_empty = printer.end(unreadable.is_empty())?;
    if is_empty && unreadable.is_empty() {
        note_unknown(&options.status);
    }
    if more && !out.is_reader_gone() {
        note("there are more runs; see all with --all");
    }
    backend.close().await?;
    told_unreadable(&unreadable)
}

/// What is not in the list, although it was asked for.
fn told_unreadable(unreadable: &[UnreadableRun]) -> Result<(), CliError> {
    let Some(first) = unreadable.first() else { return Ok(()) };
    for run in unreadable {
        note(&format!("run {:?} cannot be read, and is not listed: {}", run.run_id, run.reason));
    }
    let some = counted(u64::try_from(unreadable.len()).unwrap_or(u64::MAX), "run");
    Err(CliError::new(
        ProjectErrorKind::Integrity,
        format!("{some} cannot be read ({:?} first); `seeknal state verify` names each fault", first.run_id),
    ))
}

/// Where nothing is in a status that only another program can have written: it may be one of ours, with a slip.
fn note_unknown(statuses: &[RunStatus]) {
    for status in statuses {
        if let Err(unknown) = status.as_str().parse::<RunStatus>() {
            note(&format!("no run has this status; unless another program should have written it: {unknown}"));
        }
    }
}

/// Prints rows as they come (JSON), or as one table.
enum Printer<'a> {
    Json(super::output::JsonArray<'a>),
    Table(Box<comfy_table::Table>, &'a mut Output),
}

impl<'a> Printer<'a> {
    fn new(out: &'a mut Output) -> Self {
        if out.is_json() {
            Self::Json(out.array())
        } else {
            Self::Table(Box::new(table(&["run", "status", "started", "took", "nodes", "version"])), out)
        }
    }

    fn is_reader_gone(&self) -> bool {
        match self {
            Self::Json(array) => array.is_reader_gone(),
            Self::Table(_, out) => out.is_reader_gone(),
        }
    }

    fn push(&mut self, row: &Row<'_>) -> Result<(), CliError> {
        match self {
            Self::Json(array) => array.push(row),
            Self::Table(table, _) => {
                let nodes: Vec<String> = row.nodes.iter().map(|(status, count)| one_line(&format!("{count} {status}"))).collect();
                table.add_row([
                    one_line(row.run_id.as_str()),
                    one_line(row.status.as_str()) + if row.abandoned { " (process gone)" } else { "" },
                    row.started_at.clone().unwrap_or_else(dash),
                    duration(row.duration_ms),
                    if nodes.is_empty() { dash() } else { nodes.join(", ") },
                    row.version.to_string(),
                ]);
                Ok(())
            }
        }
    }

    /// What was begun is brought to an end: half an array is no value.
    fn cut_off(self) -> Result<(), CliError> {
        match self {
            Self::Json(array) if !array.is_empty() => array.end(),
            Self::Json(_) | Self::Table(..) => Ok(()),
        }
    }

    /// Says also whether there was nothing; `all`: nothing is missing.
    fn end(self, all: bool) -> Result<bool, CliError> {
        match self {
            Self::Json(array) => {
                let is_empty = array.is_empty();
                array.end().map(|()| is_empty)
            }
            Self::Table(table, _) if table.row_count() == 0 && !all => Ok(true),
            Self::Table(table, out) if table.row_count() == 0 => out.line("No runs.").map(|()| true),
            Self::Table(table, out) => out.table(&table).map(|()| false),
        }
    }
}

/// When a run was made. One of a document without any stamp was made at no time that is known.
pub(super) fn created(header: &RunHeader) -> Option<DateTime<Utc>> {
    Some(header.created_at).filter(|at| *at != DateTime::UNIX_EPOCH)
}

/// The lines about a run above its nodes.
pub(super) fn header_lines(run: &RunSummary, abandoned: bool) -> Vec<String> {
    let header = &run.header;
    let mut lines = vec![
        format!("Run {} is {} (version {})", run.run_id, header.status, run.version),
        format!(
            "created {}, started {}, finished {}, took {}",
            stamp(created(header)),
            stamp(header.started_at),
            stamp(header.finished_at),
            duration(between(header.started_at, header.finished_at)),
        ),
    ];
    if let Some(worker) = &header.worker {
        let gone =
            format!(", which is gone: `seeknal state end {}` ends the run", shell(std::path::Path::new(run.run_id.as_str())));
        lines.push(format!("worked on by {worker}{}", if abandoned { &*gone } else { "" }));
    }
    for (key, value) in header.metadata.iter() {
        lines.push(format!("{key}: {value}"));
    }
    lines.iter().map(|line| one_line(line)).collect()
}
