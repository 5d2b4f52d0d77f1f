//! `run_state.json` as it is written: readable, indented, what has not changed in its own words, and all that is ours in one object.

use std::collections::HashMap;

use serde::Serialize;

use super::document::{FORMAT, NO_CHECKSUM, Shape, checksum, told_by_top};
use super::kept;
use super::nan;
use super::node::Dialect;
use super::node_write::{self, ObjectWriter, Overrides, Place};
use super::stamp::{self, Style};
use super::text::{self, Members, get, indent, string};
use crate::model::{LastSuccess, Ledger, NodeId, NodeState, RunId, RunState, RunStatus, time};
use crate::store::{StoreError, StoreErrorKind};

/// Names of a document: its own, and the one that it replaces.
#[derive(Debug, Clone, Copy)]
pub(super) struct Generation<'a> {
    pub(super) own: &'a str,
    pub(super) follows: Option<&'a str>,
}

/// The text of the document that says all that a ledger holds.
pub(super) fn write(ledger: &Ledger, generation: Generation<'_>, shape: &Shape) -> Result<Vec<u8>, StoreError> {
    let fail = |error: serde_json::Error| {
        StoreError::not_applied(StoreErrorKind::Input, format!("the state cannot be written as JSON: {error}"))
    };
    let (compact, mark) = compact(ledger, generation, shape).map_err(fail)?;
    let (mut bytes, place) = indent(&compact, mark);
    drop(compact);
    let at = place + 1;
    if let (Some(before), Some(after)) = (bytes.get(..at), bytes.get(at + NO_CHECKSUM.len()..)) {
        let sum = format!("{:08x}", checksum(before, after));
        for (to, from) in bytes.iter_mut().skip(at).zip(sum.bytes()) {
            *to = from;
        }
    }
    Ok(bytes)
}

/// The latest state of a node, and the run in which it got there.
struct Latest<'a> {
    id: &'a NodeId,
    run: &'a RunState,
    state: &'a NodeState,
}

fn latest<'a>(ledger: &'a Ledger, shape: &Shape) -> Vec<Latest<'a>> {
    let of = |id: &'a NodeId| {
        let run = ledger.runs_of_node(id.as_str()).next()?;
        Some(Latest { id, run, state: run.node(id.as_str())? })
    };
    let mut all: Vec<Latest<'a>> = ledger.node_ids().filter_map(of).collect();
    if !shape.order.is_empty() {
        let places: HashMap<&NodeId, usize> = shape.order.iter().enumerate().map(|(place, id)| (id, place)).collect();
        all.sort_by_key(|node| places.get(node.id).copied().unwrap_or(usize::MAX));
    }
    all
}

/// The document without white space, and where the checksum's text begins in it.
fn compact(ledger: &Ledger, generation: Generation<'_>, shape: &Shape) -> serde_json::Result<(Vec<u8>, usize)> {
    let mut out = Vec::new();
    let top = ledger.runs().next();
    let shape = &with_newest_dialect(ledger, shape);
    if let Some(run) = top {
        write_top(&mut out, run, shape)?;
    } else {
        let mut object = ObjectWriter::begin(&mut out);
        for (key, raw) in &shape.seeknal {
            object.raw(key, raw.as_str())?;
        }
        object.end();
    }
    let told = std::str::from_utf8(&out).map(text::members);
    let own_run = match (top, told) {
        (Some(run), Ok(Ok(members))) => Some(own_run(run, &members)?),
        _ => None,
    };
    // The object goes on: its closing brace comes at the end.
    out.pop();
    let separator: &[u8] = if out.len() > 1 { b",\"nodes\":{" } else { b"\"nodes\":{" };
    out.extend_from_slice(separator);
    let nodes = latest(ledger, shape);
    let mut beside: Vec<(&NodeId, &NodeState, Overrides)> = Vec::with_capacity(nodes.len());
    for (index, node) in nodes.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        serde_json::to_writer(&mut out, node.id)?;
        out.push(b':');
        // Where there is a node there is a run, and so a newest one.
        let top = top.map_or(node.run.id(), RunState::id);
        let place = Place { id: node.id, run: node.run.id(), top, dialect: shape.dialect() };
        beside.push((node.id, node.state, node_write::write(&mut out, node.state, place)?));
    }
    nan::restore(&mut out);
    out.extend_from_slice(b"},\"seeknal_state\":");
    let mark;
    {
        let mut own = ObjectWriter::begin(&mut out);
        let place = own.key("checksum")?;
        mark = place.len();
        serde_json::to_writer(place, NO_CHECKSUM)?;
        own.value("format", &FORMAT)?;
        own.value("generation", generation.own)?;
        own.value("follows", &generation.follows)?;
        own.value("last_seq", &ledger.seq())?;
        if let (Some(run), Some(own_run)) = (top, own_run) {
            own.value("run_version", &run.version())?;
            own.raw("run", &own_run)?;
        }
        write_beside(own.key("nodes")?, &beside)?;
        write_history(own.key("history")?, ledger, top.map(RunState::id))?;
        write_retained(&mut own, ledger)?;
        own.end();
    }
    out.push(b'}');
    Ok((out, mark))
}

/// The dialect of the newest run that came from Seeknal; else the one that the document had.
fn with_newest_dialect(ledger: &Ledger, shape: &Shape) -> Shape {
    let of = |run: &RunState| {
        let extra = run.header().extra.as_ref()?;
        let members = extra.members()?;
        let known = |key: &str| members.iter().any(|(k, _)| k == key);
        (known("schema_version") || known("version")).then(|| {
            members
                .into_iter()
                .filter(|(key, _)| matches!(key.as_str(), "schema_version" | "version" | "seeknal_version"))
                .collect()
        })
    };
    let seeknal = ledger.runs().find_map(of).unwrap_or_else(|| shape.seeknal.clone());
    Shape { seeknal, ..shape.clone() }
}

fn write_top(out: &mut Vec<u8>, run: &RunState, shape: &Shape) -> serde_json::Result<()> {
    let header = run.header();
    let mut object = ObjectWriter::begin(out);
    let seeknal = shape.dialect() == Dialect::Seeknal;
    let naive = |stamp| Style::NAIVE.format(stamp);
    let source = header.extra.clone();
    let members = source.as_ref().and_then(|raw| text::members(raw.as_str()).ok()).unwrap_or_default();
    for (key, raw) in &members {
        match top_member(key, raw, &members, run, shape.dialect()) {
            Some(text) => object.raw(key, &text)?,
            None => object.raw(key, raw)?,
        }
    }
    let lacks = |key: &str| get(&members, key).is_none();
    if seeknal {
        // A document that has one of the two marks of its version needs no other one.
        let marked = !lacks("schema_version") || !lacks("version");
        for (key, raw) in &shape.seeknal {
            if lacks(key) && !(marked && key != "seeknal_version") {
                object.raw(key, raw.as_str())?;
            }
        }
        if lacks("last_run") {
            object.value("last_run", &naive(header.started_at.unwrap_or(header.created_at)))?;
        }
        if lacks("run_id") {
            object.value("run_id", run.id())?;
        }
        if lacks("config") {
            object.raw("config", "{}")?;
        }
    } else {
        if lacks("run_id") {
            object.value("run_id", run.id())?;
        }
        if lacks("started_at") && lacks("last_run") {
            object.value("started_at", &header.started_at.map(time::format))?;
        }
        if lacks("finished_at") && (members.is_empty() || header.finished_at.is_some()) {
            object.value("finished_at", &header.finished_at.map(time::format))?;
        }
        if lacks("status") {
            object.value("status", &header.status)?;
        }
    }
    object.end();
    Ok(())
}

/// The members of the top level as they would be written, but nodes and our own part.
pub(super) fn top_text(run: &RunState, shape: &Shape) -> serde_json::Result<String> {
    let mut out = Vec::new();
    write_top(&mut out, run, shape)?;
    // It was written as text just now.
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A member of a foreign top level that says something else now; `None` if it stays as it is.
fn top_member(key: &str, raw: &str, members: &Members<'_>, run: &RunState, dialect: Dialect) -> Option<String> {
    let header = run.header();
    let json = |text: &str| serde_json::to_string(text).ok();
    let stamp = |now: Option<chrono::DateTime<chrono::Utc>>| {
        let was = if key == "last_run" { stamp::from_json_or_epoch(raw) } else { stamp::from_json(raw) };
        if was == now {
            return None;
        }
        let style = string(raw)
            .filter(|_| was.is_some())
            .map_or(if dialect == Dialect::Seeknal { Style::NAIVE } else { Style::ZONED }, |text| Style::of(&text));
        Some(now.and_then(|now| json(&style.format(now))).unwrap_or_else(|| "null".to_owned()))
    };
    match key {
        "run_id" => match string(raw).and_then(|text| RunId::new(text).ok()) {
            Some(was) if was != *run.id() => json(run.id().as_str()),
            _ => None,
        },
        "status" => match string(raw) {
            Some(text) if RunStatus::parse(&text) != header.status => json(header.status.as_str()),
            // What is no status says nothing, until something here does.
            None if header.version != run.created_version() => json(header.status.as_str()),
            _ => None,
        },
        "started_at" => stamp(header.started_at),
        "finished_at" => stamp(header.finished_at),
        // Seeknal's reader wants a text here: a run that was never started keeps the stamp that it came with.
        "last_run" if get(members, "started_at").is_none() && header.started_at.is_some() => stamp(header.started_at),
        _ => None,
    }
}

/// What the top level cannot say about its run.
fn own_run(run: &RunState, members: &Members<'_>) -> serde_json::Result<String> {
    let header = run.header();
    let (id, started_at, finished_at) = told_by_top(members);
    let mut out = Vec::new();
    let mut own = ObjectWriter::begin(&mut out);
    if id.as_ref() != Some(run.id()) {
        own.value("run_id", run.id())?;
    }
    own.value("created_version", &run.created_version())?;
    own.value("header_version", &header.version)?;
    own.value("created_at", &header.created_at)?;
    own.value("status", &header.status)?;
    if started_at != header.started_at {
        own.value("started_at", &header.started_at)?;
    }
    if finished_at != header.finished_at {
        own.value("finished_at", &header.finished_at)?;
    }
    if let Some(worker) = &header.worker {
        own.value("worker", worker)?;
    }
    if !header.metadata.is_empty() {
        own.value("metadata", &header.metadata)?;
    }
    if let Some(source) = &header.extra {
        own.raw("kept", &kept::note(source.as_str(), members))?;
    }
    own.end();
    // It was written as text just now.
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn write_beside(out: &mut Vec<u8>, nodes: &[(&NodeId, &NodeState, Overrides)]) -> serde_json::Result<()> {
    let mut object = ObjectWriter::begin(out);
    for (id, state, unsaid) in nodes {
        let mut own = ObjectWriter::begin(object.key(id.as_str())?);
        own.value("version", &state.version)?;
        for (field, raw) in unsaid {
            own.raw(field, raw)?;
        }
        own.end();
    }
    object.end();
    Ok(())
}

/// Every run but the one of the top level, newest first, with the states that a later run superseded. Those of the top level's run
/// are all in `nodes`: nothing is newer.
fn write_history(out: &mut Vec<u8>, ledger: &Ledger, top: Option<&RunId>) -> serde_json::Result<()> {
    #[derive(Serialize)]
    struct Names<'a> {
        run_id: &'a RunId,
        run_version: crate::model::Version,
        created_version: crate::model::Version,
    }
    out.push(b'[');
    let mut first = true;
    for run in ledger.runs().filter(|run| Some(run.id()) != top) {
        if !first {
            out.push(b',');
        }
        first = false;
        // Two objects become one: names first, then the header's members.
        serde_json::to_writer(
            &mut *out,
            &Names { run_id: run.id(), run_version: run.version(), created_version: run.created_version() },
        )?;
        out.pop();
        let header = serde_json::to_string(run.header())?;
        out.push(b',');
        out.extend_from_slice(header.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or_default().as_bytes());
        out.extend_from_slice(b",\"nodes\":");
        let mut nodes = ObjectWriter::begin(out);
        for (id, state) in run.nodes() {
            let newest = ledger.runs_of_node(id.as_str()).next();
            if newest.is_some_and(|newest| newest.id() != run.id()) {
                nodes.value(id.as_str(), state)?;
            }
        }
        nodes.end();
        out.push(b'}');
    }
    out.push(b']');
    Ok(())
}

fn write_retained(own: &mut ObjectWriter<'_>, ledger: &Ledger) -> serde_json::Result<()> {
    let retained = ledger.retained();
    let mut coverage = ObjectWriter::begin(own.key("coverage")?);
    for (node, kept) in retained.iter().filter(|(_, kept)| !kept.coverage.intervals.is_empty()) {
        coverage.value(node.as_str(), &kept.coverage.intervals)?;
    }
    coverage.end();
    let partitions: Vec<_> = retained.iter().filter(|(_, kept)| !kept.coverage.partitions.is_empty()).collect();
    if !partitions.is_empty() {
        let mut object = ObjectWriter::begin(own.key("covered_partitions")?);
        for (node, kept) in partitions {
            object.value(node.as_str(), &kept.coverage.partitions)?;
        }
        object.end();
    }
    let successes: Vec<(&NodeId, &LastSuccess)> =
        retained.iter().filter_map(|(node, kept)| Some((node, kept.last_success.as_ref()?))).collect();
    if !successes.is_empty() {
        let mut object = ObjectWriter::begin(own.key("last_success")?);
        for (node, success) in successes {
            object.value(node.as_str(), success)?;
        }
        object.end();
    }
    Ok(())
}
