//! A document that we wrote, with what an editor changed in it since.

use std::collections::{BTreeMap, HashMap};

use chrono::DateTime;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Building, Document, FORMAT, Top, Unread, is_untouched, read_nodes, read_top, shape_of, without_our_part};
use crate::model::{
    CommitSeq, IntervalSet, LastSuccess, Ledger, NodeCoverage, NodeId, NodeState, PartitionKey, Retained, RunHeader, RunId,
    RunState, RunStatus, Version,
};
use crate::store::file::foreign::derived_status;
use crate::store::file::node;
use crate::store::file::node_write::{self, Place};
use crate::store::file::text::{self, Members, Source, get, kind};
use crate::store::file::{edited, foreign, kept};
use crate::store::highwater::HIGHEST;
use crate::store::{StoreError, StoreErrorKind};

/// Our own part of a document.
#[derive(Deserialize)]
struct OwnPart<'a> {
    #[serde(borrow)]
    checksum: Option<&'a RawValue>,
    generation: String,
    #[serde(default)]
    follows: Option<String>,
    last_seq: u64,
    #[serde(default)]
    run_version: Version,
    #[serde(borrow, default)]
    run: Option<&'a RawValue>,
    #[serde(borrow, default)]
    nodes: Option<&'a RawValue>,
    #[serde(borrow, default)]
    history: Option<&'a RawValue>,
    #[serde(borrow, default)]
    coverage: Option<&'a RawValue>,
    #[serde(borrow, default)]
    covered_partitions: Option<&'a RawValue>,
    #[serde(borrow, default)]
    last_success: Option<&'a RawValue>,
}

pub(super) fn read_ours(source: Source<'_>, members: &Members<'_>, state: &str) -> Result<Document, StoreError> {
    if !state.starts_with('{') {
        return Err(source.error(state, format!("`seeknal_state` is {}; it must be an object", kind(state))));
    }
    let own = text::members(state).map_err(|error| source.parse_error(state, &error))?;
    let format = get(&own, "format").and_then(|raw| raw.parse::<u32>().ok());
    match format {
        Some(format) if format <= FORMAT => {}
        Some(format) => {
            return Err(StoreError::not_applied(
                StoreErrorKind::NewerFormat,
                format!(
                    "{}: format {format} is newer than this program knows ({FORMAT}); use the newer seeknal",
                    source.path.display()
                ),
            ));
        }
        None => return Err(source.error(state, "`seeknal_state` does not say its `format`")),
    }
    let part: OwnPart<'_> = serde_json::from_str(state).map_err(|error| source.parse_error(state, &error))?;
    let last_seq = part.last_seq;
    let mut runs: BTreeMap<RunId, Building> = BTreeMap::new();
    if let Some(history) = part.history {
        let elements = text::elements(history.get()).ok_or_else(|| source.error(history.get(), "`history` is no list"))?;
        for raw in elements {
            let (id, run) = read_history(source, raw)?;
            runs.insert(id, run);
        }
    }
    let edited = !part.checksum.is_some_and(|sum| is_untouched(source, sum.get()));
    let top = read_top(members);
    let mut top_id = None;
    if let Some(own_run) = part.run {
        let (id, run) = read_own_run(source, members, top, own_run.get(), (part.run_version, edited))?;
        top_id = Some(id.clone());
        runs.insert(id, run);
    }
    let (order, unread) = read_our_nodes(source, members, &part, (top_id.as_ref(), edited), &mut runs)?;
    let numbers = runs.values().flat_map(|run| {
        let of_nodes = run.nodes.iter().map(|(_, node)| node.version);
        [run.version, run.created, run.header.version].into_iter().chain(of_nodes)
    });
    if let Some(most) = numbers.map(|version| version.0).chain([last_seq]).max().filter(|most| *most > HIGHEST) {
        return Err(source.error(state, format!("{most} is no sequence number or version of ours: they end at {HIGHEST}")));
    }
    let mut ledger = Ledger::new();
    for (id, run) in runs {
        ledger.restore_run(RunState::from_parts(id, run.header, run.version, run.created, run.nodes));
    }
    for (node, retained) in read_retained(source, &part)? {
        ledger.restore_retained(&node, &retained);
    }
    ledger.raise_seq(CommitSeq(last_seq));
    Ok(Document {
        ledger,
        generation: (!edited).then_some(part.generation),
        follows: part.follows,
        is_ours: true,
        shape: shape_of(members, order),
        notices: unread.told(source.path),
    })
}

fn read_history(source: Source<'_>, raw: &str) -> Result<(RunId, Building), StoreError> {
    #[derive(Deserialize)]
    struct Run<'a> {
        #[serde(rename = "run_id")]
        id: RunId,
        #[serde(rename = "run_version")]
        version: Version,
        created_version: Version,
        #[serde(borrow)]
        nodes: HashMap<NodeId, &'a RawValue>,
    }
    let fail = |error| source.parse_error(raw, &error);
    let run: Run<'_> = serde_json::from_str(raw).map_err(fail)?;
    let header: RunHeader = serde_json::from_str(raw).map_err(fail)?;
    let node = |(id, raw): (NodeId, &RawValue)| {
        serde_json::from_str::<NodeState>(raw.get()).map(|node| (id, node)).map_err(|error| source.parse_error(raw.get(), &error))
    };
    let nodes = run.nodes.into_iter().map(node).collect::<Result<_, _>>()?;
    Ok((run.id, Building { header, version: run.version, created: run.created_version, nodes }))
}

fn read_own_run(
    source: Source<'_>,
    members: &Members<'_>,
    top: Top,
    own: &str,
    (version, edited): (Version, bool),
) -> Result<(RunId, Building), StoreError> {
    let fail = |error| source.parse_error(own, &error);
    let own_members = text::members(own).map_err(fail)?;
    // Who edits a document edits what is readable of it.
    let told = top.status.clone().filter(|_| edited);
    let mut header = RunHeader::new(top.status.unwrap_or(RunStatus::Pending), DateTime::UNIX_EPOCH);
    header.started_at = top.started_at;
    header.finished_at = top.finished_at;
    header.version = version;
    let (mut id, mut created) = (top.run_id, version);
    for (key, raw) in own_members {
        let fail = |error| source.parse_error(raw, &error);
        match &*key {
            "run_id" => id = Some(serde_json::from_str(raw).map_err(fail)?),
            "created_version" => created = serde_json::from_str(raw).map_err(fail)?,
            "header_version" => header.version = serde_json::from_str(raw).map_err(fail)?,
            "created_at" => header.created_at = serde_json::from_str(raw).map_err(fail)?,
            "status" if told.is_some() => {}
            "status" => header.status = serde_json::from_str(raw).map_err(fail)?,
            "started_at" => header.started_at = serde_json::from_str(raw).map_err(fail)?,
            "finished_at" => header.finished_at = serde_json::from_str(raw).map_err(fail)?,
            "worker" => header.worker = serde_json::from_str(raw).map_err(fail)?,
            "metadata" => header.metadata = serde_json::from_str(raw).map_err(fail)?,
            "kept" => header.extra = kept::restore(raw, &without_our_part(members)),
            _ => {}
        }
    }
    let id = id.ok_or_else(|| source.error(source.text, "the top level names no run: `run_id` is missing or no text"))?;
    if edited {
        let run = RunState::from_parts(id.clone(), header.clone(), version, created, Vec::new());
        header.extra = edited::top(&without_our_part(members), &run, &shape_of(members, Vec::new())).map_err(fail)?;
    }
    Ok((id, Building { header, version, created, nodes: Vec::new() }))
}

/// Puts every node where it belongs; answers with the order in which they stood.
fn read_our_nodes(
    source: Source<'_>,
    members: &Members<'_>,
    part: &OwnPart<'_>,
    (top_id, edited): (Option<&RunId>, bool),
    runs: &mut BTreeMap<RunId, Building>,
) -> Result<(Vec<NodeId>, Unread), StoreError> {
    let mut unread = Unread::default();
    let Some(nodes) = get(members, "nodes") else { return Ok((Vec::new(), unread)) };
    let beside: HashMap<_, _> = match part.nodes {
        Some(raw) => text::members(raw.get()).map_err(|error| source.parse_error(raw.get(), &error))?.into_iter().collect(),
        None => HashMap::new(),
    };
    let texts = read_nodes(source, foreign::nodes_of(source, nodes)?)?;
    let dialect = shape_of(members, Vec::new()).dialect();
    let mut order = Vec::with_capacity(texts.len());
    for text in texts {
        order.push(text.id.clone());
        let node::Found { mut state, mut run, unread: not_understood } = node::read(&text.members);
        unread.note(&text.id, not_understood);
        state.version = part.run_version;
        // A node of which nothing is told beside was put in by somebody else.
        let mut kept = Some("true");
        if let Some(raw) = beside.get(text.id.as_str()) {
            kept = None;
            let mut fields = Vec::new();
            for (field, raw) in text::members(raw).map_err(|error| source.parse_error(raw, &error))? {
                let fail = |error| source.parse_error(raw, &error);
                match &*field {
                    "run_id" => run = Some(serde_json::from_str(raw).map_err(fail)?),
                    "kept" => kept = Some(raw),
                    _ => fields.push((field, raw)),
                }
            }
            let told = edited.then(|| state.clone());
            let set = |state: &mut NodeState, (field, raw): &(std::borrow::Cow<'_, str>, &str)| {
                node::set(state, field, raw).map_err(|error| source.parse_error(raw, &error))
            };
            fields.iter().try_for_each(|field| set(&mut state, field))?;
            if let (Some(told), Some(top)) = (told, top_id) {
                // What an editor wrote into the object counts, also where something else had been told beside it.
                let mut as_it_was = state.clone();
                as_it_was.extra = kept.and_then(|note| kept::restore(note, &text.members));
                let place = Place { id: &text.id, run: run.as_ref().unwrap_or(top), top, dialect };
                let was = node_write::as_told(&as_it_was, place).map_err(|error| source.parse_error(raw, &error))?;
                fields.retain(|(field, _)| !node::differ(field, &was, &told));
                state = told;
                fields.iter().try_for_each(|field| set(&mut state, field))?;
            }
        }
        state.extra = kept.and_then(|note| kept::restore(note, &text.members));
        let Some(run) = run.or_else(|| top_id.cloned()) else {
            return Err(source.error(text.raw, format!("node {:?} belongs to no run", text.id)));
        };
        if edited {
            let place = Place { id: &text.id, run: &run, top: top_id.unwrap_or(&run), dialect };
            state.extra = edited::node(&text.members, &state, place).map_err(|error| source.parse_error(text.raw, &error))?;
        }
        let version = Version(part.last_seq);
        let building = runs.entry(run).or_insert_with(|| {
            let created_at = state.started_at.or(state.finished_at).unwrap_or(DateTime::UNIX_EPOCH);
            let mut header = RunHeader::new(derived_status(std::iter::once(&state)), created_at);
            header.version = version;
            Building { header, version, created: version, nodes: Vec::new() }
        });
        building.nodes.push((text.id, state));
    }
    Ok((order, unread))
}

fn read_retained(source: Source<'_>, part: &OwnPart<'_>) -> Result<BTreeMap<NodeId, Retained>, StoreError> {
    fn map<'a, T: Deserialize<'a>>(source: Source<'_>, raw: Option<&'a RawValue>) -> Result<BTreeMap<NodeId, T>, StoreError> {
        let Some(raw) = raw else { return Ok(BTreeMap::new()) };
        serde_json::from_str(raw.get()).map_err(|error| source.parse_error(raw.get(), &error))
    }
    let mut all: BTreeMap<NodeId, Retained> = BTreeMap::new();
    for (node, intervals) in map::<IntervalSet>(source, part.coverage)? {
        all.entry(node).or_default().coverage.intervals = intervals;
    }
    for (node, partitions) in map::<std::collections::BTreeSet<PartitionKey>>(source, part.covered_partitions)? {
        let coverage: &mut NodeCoverage = &mut all.entry(node).or_default().coverage;
        coverage.partitions = partitions;
    }
    for (node, success) in map::<LastSuccess>(source, part.last_success)? {
        all.entry(node).or_default().last_success = Some(success);
    }
    Ok(all)
}
