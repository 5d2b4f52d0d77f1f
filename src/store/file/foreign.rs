//! Documents of other programs, read by their shape, wherever they lie: as the run that they are about, and those that their nodes name.
//!
//! | shape | nodes | the rest |
//! |---|---|---|
//! | Seeknal's and ours | the members of `nodes` | belongs to the run |
//! | a header without `nodes` | none | belongs to the run |
//! | the oldest runner's map | the members that are objects with a `status` | belongs to the run |
//! | nothing at all | none | there is no run |

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::document::{Document, NodeText, Unread, moved, read_nodes, read_top, shape_of, without_our_part};
use super::kept;
use super::node;
use super::text::{self, Members, Source, get, kind};
use crate::model::{CommitSeq, Ledger, NodeId, NodeState, NodeStatus, RawJson, RunHeader, RunId, RunState, RunStatus, Version};
use crate::store::StoreError;

/// Where a document lies, which tells what is likely where its shape could be two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lies {
    InTheDocument,
    /// In the file of the oldest runner.
    WithTheRunner,
}

/// A document by its parts.
struct Parts<'a> {
    nodes: Members<'a>,
    /// What belongs to the run.
    top: Members<'a>,
    /// Whether its nodes have no member of their own, or could have none.
    is_map: bool,
}

/// The members of `nodes`.
pub(super) fn nodes_of<'a>(source: Source<'_>, raw: &'a str) -> Result<Members<'a>, StoreError> {
    if !raw.starts_with('{') {
        return Err(source.error(raw, format!("`nodes` is {}; it must be an object from node id to node", kind(raw))));
    }
    text::members(raw).map_err(|error| source.parse_error(raw, &error))
}

fn status_of(raw: &str) -> Option<&str> {
    raw.starts_with('{').then(|| get(&text::members(raw).ok()?, "status"))?
}

fn parts<'a>(source: Source<'_>, members: &Members<'a>, lies: Lies) -> Result<Parts<'a>, StoreError> {
    let is_node = |raw: &str| status_of(raw).is_some();
    let has = |key, starts: &[char]| get(members, key).is_some_and(|raw| raw.starts_with(starts));
    let is_header = has("run_id", &['"']) || has("schema_version", &['"', '2']);
    // A map of nodes may have one of this name.
    let is_one = |raw: &&str| !is_header && status_of(raw).is_some_and(|status| status.starts_with('"'));
    if let Some(raw) = get(members, "nodes").filter(|raw| !is_one(raw)) {
        let nodes = if raw == "null" { Members::new() } else { nodes_of(source, raw)? };
        return Ok(Parts { nodes, top: without_our_part(members), is_map: false });
    }
    let node = members.iter().find(|(_, raw)| is_node(raw));
    let has_nodes = node.is_some();
    if let (true, Lies::InTheDocument, Some((id, raw))) = (is_header, lies, node) {
        return Err(
            source.error(raw, format!("{id:?} looks like a node beside the run's own members; nodes belong into `nodes`"))
        );
    }
    if members.is_empty() || (is_header && !has_nodes) {
        return Ok(Parts { nodes: Members::new(), top: without_our_part(members), is_map: lies == Lies::WithTheRunner });
    }
    let all_objects = members.iter().all(|(_, raw)| raw.starts_with('{'));
    let is_map = has_nodes || (lies == Lies::WithTheRunner && all_objects);
    if !is_map {
        return Err(source.error(source.text, "this is no state: it has neither `nodes` nor `seeknal_state`"));
    }
    let (nodes, top): (Members<'_>, Members<'_>) = members.iter().cloned().partition(|(_, raw)| !has_nodes || is_node(raw));
    Ok(Parts { nodes, top: without_our_part(&top), is_map: true })
}

/// The members by which Seeknal's reader knows its own shape, where what comes from it has none: else it would be written in a shape that it cannot read.
fn marks(parts: &Parts<'_>, nodes: &[NodeText<'_>]) -> Members<'static> {
    let has = |key| get(&parts.top, key).is_some();
    let all_hashed = !nodes.is_empty() && nodes.iter().all(|node| get(&node.members, "hash").is_some());
    if has("schema_version") || has("version") || !(parts.is_map || has("seeknal_version") || all_hashed) {
        return Members::new();
    }
    let marks = [("schema_version", "\"2.0\""), ("seeknal_version", "\"2.0.0\"")];
    marks.into_iter().filter(|(key, _)| !has(key)).map(|(key, raw)| (Cow::Borrowed(key), raw)).collect()
}

/// What a run's nodes say about it: one failed, one running, all ended; else it waits.
pub(super) fn derived_status<'a>(nodes: impl Iterator<Item = &'a NodeState> + Clone) -> RunStatus {
    let mut all = nodes.clone();
    if all.any(|node| node.status == NodeStatus::Failed) {
        RunStatus::Failed
    } else if nodes.clone().any(|node| node.status == NodeStatus::Running) {
        RunStatus::Running
    } else if nodes.clone().next().is_some() && nodes.clone().all(|node| node.status.is_ended()) {
        RunStatus::Success
    } else {
        RunStatus::Pending
    }
}

fn newest_stamp(nodes: &[(NodeId, NodeState)]) -> Option<DateTime<Utc>> {
    nodes.iter().flat_map(|(_, node)| [node.started_at, node.finished_at]).flatten().max()
}

fn oldest_stamp(nodes: &[(NodeId, NodeState)]) -> Option<DateTime<Utc>> {
    nodes.iter().flat_map(|(_, node)| [node.started_at, node.finished_at]).flatten().min()
}

fn newest_named(groups: &BTreeMap<RunId, Vec<(NodeId, NodeState)>>) -> Option<RunId> {
    let newest = groups.iter().max_by_key(|(_, nodes)| oldest_stamp(nodes));
    newest.map(|(id, _)| id.clone())
}

/// Reads a document that has no part of ours.
pub(super) fn read(source: Source<'_>, members: &Members<'_>, lies: Lies, base_seq: u64) -> Result<Document, StoreError> {
    let version = Version(base_seq.saturating_add(1));
    let mut parts = parts(source, members, lies)?;
    let texts = read_nodes(source, std::mem::take(&mut parts.nodes))?;
    let marks = marks(&parts, &texts);
    if texts.is_empty() && parts.top.is_empty() {
        let (ledger, shape) = (Ledger::new(), shape_of(&marks, Vec::new()));
        return Ok(Document { ledger, generation: None, follows: None, is_ours: false, shape, notices: Vec::new() });
    }
    parts.top.extend(marks);
    let order: Vec<NodeId> = texts.iter().map(|node| node.id.clone()).collect();
    let top = read_top(&parts.top);
    let mut unread = Unread::default();
    let mut groups: BTreeMap<RunId, Vec<(NodeId, NodeState)>> = BTreeMap::new();
    let mut unnamed = Vec::new();
    for text in texts {
        let node::Found { mut state, run, unread: not_understood } = node::read(&text.members);
        unread.note(&text.id, not_understood);
        state.extra = RawJson::parse(text.raw).ok();
        state.version = version;
        match run {
            Some(run) => groups.entry(run).or_default().push((text.id, state)),
            None => unnamed.push((text.id, state)),
        }
    }
    // Where only nodes name their run, the top level is about the newest of these.
    let top_id = match top.run_id.or_else(|| newest_named(&groups)) {
        Some(id) => id,
        None => derived_id(source.text).map_err(|error| source.error(source.text, error))?,
    };
    groups.entry(top_id.clone()).or_default().extend(unnamed);
    // Whatever stands there of other runs, the top level is about the one that was begun last.
    let top_created = top.started_at.or_else(|| newest_stamp(groups.get(&top_id)?));
    let others_created = |nodes: &[(NodeId, NodeState)]| {
        let created = oldest_stamp(nodes).unwrap_or(DateTime::UNIX_EPOCH);
        top_created.map_or(created, |top| created.min(moved(top, -1)))
    };
    let top_created = top_created.unwrap_or_else(|| {
        let newest = groups.iter().filter(|(id, _)| **id != top_id).map(|(_, nodes)| others_created(nodes)).max();
        newest.map_or(DateTime::UNIX_EPOCH, |newest| moved(newest, 1))
    });
    let mut ledger = Ledger::new();
    for (id, nodes) in groups {
        let mut header = RunHeader::new(derived_status(nodes.iter().map(|(_, node)| node)), DateTime::UNIX_EPOCH);
        if id == top_id {
            header.started_at = top.started_at;
            header.finished_at = top.finished_at;
            if let Some(status) = &top.status {
                header.status = status.clone();
            }
            header.created_at = top_created;
            header.extra = kept::restore("true", &parts.top);
        } else {
            header.created_at = others_created(&nodes);
        }
        header.version = version;
        ledger.restore_run(RunState::from_parts(id, header, version, version, nodes));
    }
    ledger.raise_seq(CommitSeq(version.0));
    let shape = shape_of(&parts.top, order);
    Ok(Document { ledger, generation: None, follows: None, is_ours: false, shape, notices: unread.told(source.path) })
}

/// A run id made from the content: the same at every opening (FNV-1a).
fn derived_id(text: &str) -> Result<RunId, crate::model::InputError> {
    let hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    RunId::new(format!("run_{hash:016x}"))
}
