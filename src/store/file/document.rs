//! `run_state.json` as it is read: our own documents exactly as they were written, foreign ones as one more run.
//!
//! The top level is the header of the newest run, `nodes` the latest state of every node over all runs, and all that is ours lies in
//! `seeknal_state`: versions, what superseded states were, coverage, and what the readable part cannot say.

mod ours;

use std::path::Path;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::value::RawValue;

use self::ours::read_ours;
use super::foreign;
use super::nan;
use super::node::Dialect;
use super::stamp;
use super::text::{self, Members, Source, damaged, get, kind, line_and_column, string};
use crate::model::{Ledger, NodeId, NodeState, RawJson, RunHeader, RunId, RunStatus, Version, time};
use crate::store::StoreError;

/// The newest format that this version reads, and the one it writes.
pub(super) const FORMAT: u32 = 1;

/// What stands where the checksum will be while it is computed.
pub(super) const NO_CHECKSUM: &str = "00000000";

/// What a document looks like, beyond what it says: kept from reading to writing.
#[derive(Debug, Clone, Default)]
pub(super) struct Shape {
    /// The members by which Seeknal knows its own files, as they were; none in a document of our shape.
    pub(super) seeknal: Vec<(String, RawJson)>,
    /// The order in which the nodes stood, if it was not that of their ids.
    pub(super) order: Vec<NodeId>,
    /// Whether somebody else wrote it, and not as JSON: its bytes are kept before something else takes their place.
    pub(super) keeps_original: bool,
}

impl Shape {
    pub(super) fn dialect(&self) -> Dialect {
        if self.seeknal.is_empty() { Dialect::Guide } else { Dialect::Seeknal }
    }
}

/// A document as it was read.
#[derive(Debug)]
pub(super) struct Document {
    /// Everything that it says. In a foreign document all rows are at one version.
    pub(super) ledger: Ledger,
    /// Its generation, if it is ours and as we wrote it.
    pub(super) generation: Option<String>,
    /// The generation that it replaced.
    pub(super) follows: Option<String>,
    /// Whether it carries our own part (also if it was edited since).
    pub(super) is_ours: bool,
    pub(super) shape: Shape,
    /// What an operator should know of it.
    pub(super) notices: Vec<String>,
}

/// Reads a document. Versions and sequence numbers of what is foreign in it begin after `base_seq`.
pub(super) fn read(path: &Path, bytes: &[u8], base_seq: u64) -> Result<Document, StoreError> {
    with_members(path, bytes, |source, members| match get(members, "seeknal_state") {
        Some(state) => read_ours(source, members, state),
        None => foreign::read(source, members, foreign::Lies::InTheDocument, base_seq),
    })
}

/// What a document of ours tells a reader who knows nothing of our part.
pub(super) fn read_without_our_part(path: &Path, bytes: &[u8]) -> Result<Ledger, StoreError> {
    let foreign = with_members(path, bytes, |source, members| foreign::read(source, members, foreign::Lies::InTheDocument, 0));
    Ok(foreign?.ledger)
}

/// Reads the file of the oldest runner; what lies there may have come from somewhere else.
pub(super) fn read_bare(path: &Path, bytes: &[u8], base_seq: u64) -> Result<Document, StoreError> {
    with_members(path, bytes, |source, members| match get(members, "seeknal_state") {
        Some(state) if state.starts_with('{') && get(members, "nodes").is_some() => read_ours(source, members, state),
        _ => foreign::read(source, members, foreign::Lies::WithTheRunner, base_seq),
    })
}

/// Reads the members of a whole file; words that JSON does not know are taken for texts.
fn with_members(
    path: &Path,
    bytes: &[u8],
    read: impl FnOnce(Source<'_>, &Members<'_>) -> Result<Document, StoreError>,
) -> Result<Document, StoreError> {
    let text = checked_text(path, bytes)?;
    let source = Source { path, text, accepted: None };
    let error = match text::members(text) {
        Ok(members) => return read(source, &members),
        Err(error) => error,
    };
    if !text.trim_ascii_start().starts_with('{') && serde_json::from_str::<&RawValue>(text).is_ok() {
        return Err(source.error(text, format!("the whole file is {}; it must be an object", kind(text))));
    }
    let Some(accepted) = nan::accept(text) else { return Err(source.parse_error(text, &error)) };
    let source = Source { path, text: &accepted.text, accepted: Some(&accepted) };
    let members = text::members(source.text).map_err(|error| source.parse_error(source.text, &error))?;
    let mut document = read(source, &members)?;
    let (line, column) = line_and_column(text.as_bytes(), accepted.first);
    document.notices.push(format!(
        "{}: {} values are NaN or Infinity, which JSON does not know (the first in line {line}, column {column}): they are kept as they are, \
         and are texts to whom this program hands them",
        path.display(),
        accepted.count()
    ));
    document.shape.keeps_original = !document.is_ours;
    Ok(document)
}

/// The text of a document that is neither empty nor anything but text.
fn checked_text<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str, StoreError> {
    let start = "line 1, column 1";
    if bytes.is_empty() {
        return Err(damaged(path, start, "the file is empty"));
    }
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(damaged(path, start, format!("the file holds nothing but {} zero bytes", bytes.len())));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let (line, column) = line_and_column(bytes, error.valid_up_to());
        damaged(path, &format!("line {line}, column {column}"), "this is not UTF-8 text")
    })?;
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_ascii().is_empty() {
        return Err(damaged(path, start, "the file holds nothing but white space"));
    }
    Ok(text)
}

/// A run while it is put together.
struct Building {
    header: RunHeader,
    version: Version,
    created: Version,
    nodes: Vec<(NodeId, NodeState)>,
}

/// What the top level says about its run.
pub(super) struct Top {
    pub(super) run_id: Option<RunId>,
    pub(super) status: Option<RunStatus>,
    pub(super) started_at: Option<DateTime<Utc>>,
    pub(super) finished_at: Option<DateTime<Utc>>,
}

pub(super) fn read_top(members: &Members<'_>) -> Top {
    let stamp = |key| get(members, key).and_then(stamp::from_json);
    Top {
        run_id: get(members, "run_id").and_then(string).and_then(|text| RunId::new(text).ok()),
        status: get(members, "status").and_then(string).map(|text| RunStatus::parse(&text)),
        started_at: stamp("started_at").or_else(|| get(members, "last_run").and_then(stamp::from_json_or_epoch)),
        finished_at: stamp("finished_at"),
    }
}

/// The header of the top level as its text alone gives it, for finding what must be said beside it.
pub(super) fn told_by_top(members: &Members<'_>) -> (Option<RunId>, Option<DateTime<Utc>>, Option<DateTime<Utc>>) {
    let top = read_top(members);
    (top.run_id, top.started_at, top.finished_at)
}

/// A stamp so many microseconds later, if there is such a one.
pub(super) fn moved(stamp: DateTime<Utc>, micros: i64) -> DateTime<Utc> {
    let moved = stamp.checked_add_signed(TimeDelta::microseconds(micros));
    moved.filter(|moved| time::is_storable(*moved)).unwrap_or(stamp)
}

/// The members by which Seeknal knows its files.
const SEEKNAL_TOP: &[&str] = &["schema_version", "version", "seeknal_version"];

pub(super) fn shape_of(members: &Members<'_>, order: Vec<NodeId>) -> Shape {
    let is_seeknal = get(members, "schema_version").is_some() || get(members, "version").is_some();
    let seeknal = if is_seeknal {
        members
            .iter()
            .filter(|(key, _)| SEEKNAL_TOP.contains(&&**key))
            .filter_map(|(key, raw)| Some((key.to_string(), RawJson::parse(raw).ok()?)))
            .collect()
    } else {
        Vec::new()
    };
    let order = if order.is_sorted() { Vec::new() } else { order };
    Shape { seeknal, order, keeps_original: false }
}

/// The members of the top level that are neither nodes nor ours.
pub(super) fn without_our_part<'a>(members: &Members<'a>) -> Members<'a> {
    members.iter().filter(|(key, _)| key != "nodes" && key != "seeknal_state").cloned().collect()
}

/// Completed work of which nobody here knows what it means.
#[derive(Debug, Default)]
pub(super) struct Unread {
    elements: usize,
    nodes: usize,
    first: Option<NodeId>,
}

impl Unread {
    pub(super) fn note(&mut self, node: &NodeId, elements: usize) {
        if elements > 0 {
            self.elements += elements;
            self.nodes += 1;
            self.first.get_or_insert_with(|| node.clone());
        }
    }

    pub(super) fn told(self, path: &Path) -> Vec<String> {
        let notice = |first: NodeId| {
            format!(
                "{}: {} element(s) of `completed_intervals` or `completed_partitions` of {} node(s) ({first:?} is the first) are in a shape that is not \
                 understood: they stay as they are, and count as not completed",
                path.display(),
                self.elements,
                self.nodes
            )
        };
        self.first.map(notice).into_iter().collect()
    }
}

pub(super) struct NodeText<'a> {
    pub(super) id: NodeId,
    pub(super) raw: &'a str,
    pub(super) members: Members<'a>,
}

pub(super) fn read_nodes<'a>(source: Source<'_>, nodes: Members<'a>) -> Result<Vec<NodeText<'a>>, StoreError> {
    let read = |(key, raw): (std::borrow::Cow<'a, str>, &'a str)| {
        let id = NodeId::new(&*key).map_err(|error| source.error(raw, error))?;
        if !raw.starts_with('{') {
            return Err(source.error(raw, format!("node {id:?} is no object")));
        }
        let members = text::members(raw).map_err(|error| source.parse_error(raw, &error))?;
        Ok(NodeText { id, raw, members })
    };
    nodes.into_iter().map(read).collect()
}

/// Whether the bytes are those that we wrote: an editor, or a tool that wrote them anew, makes another document of it.
fn is_untouched(source: Source<'_>, sum: &str) -> bool {
    let Some(told) = string(sum).and_then(|text| u32::from_str_radix(&text, 16).ok()) else { return false };
    let (bytes, at) = (source.original().as_bytes(), source.original_offset(source.offset(sum)) + 1);
    let (Some(before), Some(after)) = (bytes.get(..at), bytes.get(at + NO_CHECKSUM.len()..)) else {
        return false;
    };
    checksum(before, after) == told
}

/// The checksum of a document from what lies before and behind its place.
pub(super) fn checksum(before: &[u8], after: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), NO_CHECKSUM.as_bytes()), after)
}
