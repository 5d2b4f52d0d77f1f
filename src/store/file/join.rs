//! A document that another program rewrote, joined with what the last one of ours knew.
//!
//! Three ways: what our last document told a reader who knows nothing of our part (`was`), what stands there now, and all that we knew (`old`).
//! What was changed there wins; what is as it was, or is not told, stays as we knew it.

use std::collections::BTreeMap;

use super::document::derived_status;
use super::text::{self, Members, get};
use crate::model::{Ledger, NodeId, NodeState, NodeStatus, RawJson, RunHeader, RunState};

/// A run that both know.
pub(super) fn run(old: &RunState, new: &RunState, was: &Ledger) -> RunState {
    let was_run = was.run(old.id().as_str());
    let mut nodes: BTreeMap<NodeId, NodeState> = old.nodes().map(|(id, node)| (id.clone(), node.clone())).collect();
    let mut changed = false;
    for (id, node) in new.nodes() {
        let own = was_run.and_then(|run| run.node(id.as_str()));
        let elsewhere = was.runs_of_node(id.as_str()).next().filter(|run| run.id() != old.id());
        let there = own.or_else(|| elsewhere.filter(|_| !tells(node, "run_id"))?.node(id.as_str()));
        if there.is_some_and(|was| is_as_it_was(node.extra.as_ref(), was.extra.as_ref())) {
            // As it was. If it is none of this run's, it still belongs to the run in which it got there, which such a program does not tell apart.
            continue;
        }
        let joined = match old.node(id.as_str()) {
            Some(known) => join_node(known, own, node),
            None => node.clone(),
        };
        changed = true;
        nodes.insert(id.clone(), joined);
    }
    let was_header = was_run.map(RunState::header);
    if !changed && was_header.is_some_and(|was| is_as_it_was(new.header().extra.as_ref(), was.extra.as_ref())) {
        return old.clone();
    }
    let mut header = join_header(old.header(), was_header, new.header(), changed.then_some(&nodes));
    header.version = new.version();
    RunState::from_parts(old.id().clone(), header, new.version(), old.created_version(), nodes)
}

/// Whether a foreign run says, word for word, what it said when it came; what we made of it since is beside that.
pub(super) fn is_as_it_came(now: &RunState, known: &RunState) -> bool {
    let came = |id: &NodeId| known.node(id.as_str()).and_then(|node| node.extra.as_ref());
    is_as_it_was(now.header().extra.as_ref(), known.header().extra.as_ref())
        && now.nodes().all(|(id, node)| came(id).is_some_and(|came| is_as_it_was(node.extra.as_ref(), Some(came))))
}

/// `changed`: all nodes, if some of them were changed.
fn join_header(
    old: &RunHeader,
    was: Option<&RunHeader>,
    new: &RunHeader,
    changed: Option<&BTreeMap<NodeId, NodeState>>,
) -> RunHeader {
    let given = members(new.extra.as_ref());
    let has = |key| get(&given, key).is_some();
    let mut header = old.clone();
    if has("status") {
        if was.is_none_or(|was| was.status != new.status) {
            header.status = new.status.clone();
        }
    } else if let Some(nodes) = changed {
        header.status = derived_status(nodes.values());
    }
    if (has("started_at") || has("last_run")) && was.is_none_or(|was| was.started_at != new.started_at) {
        header.started_at = new.started_at;
    }
    if has("finished_at") && was.is_none_or(|was| was.finished_at != new.finished_at) {
        header.finished_at = new.finished_at;
    }
    header.extra = join_extra(old.extra.as_ref(), new.extra.as_ref());
    header
}

fn join_node(old: &NodeState, was: Option<&NodeState>, new: &NodeState) -> NodeState {
    let given = members(new.extra.as_ref());
    let has = |keys: &[&str]| keys.iter().any(|key| get(&given, key).is_some());
    let is_new = |keys: &[&str], same: fn(&NodeState, &NodeState) -> bool| has(keys) && was.is_none_or(|was| !same(was, new));
    macro_rules! told {
        ($field:ident, $($key:literal),+) => {
            is_new(&[$($key),+], |was, new| was.$field == new.$field)
        };
    }
    let started = told!(started_at, "started_at") || (new.status == NodeStatus::Running && told!(started_at, "last_run"));
    let finished = told!(finished_at, "finished_at") || (new.status.is_ended() && told!(finished_at, "last_run"));
    let duration = told!(duration_ms, "duration_ms", "duration");
    let status = told!(status, "status");
    let mut node = old.clone();
    // What had ended and tells another end was done again: what is not told of the new attempt is not known.
    if old.status.is_ended() && (status || started || finished || duration) {
        (node.started_at, node.finished_at, node.duration_ms) = (new.started_at, new.finished_at, new.duration_ms);
        (node.error, node.worker, node.token) = (None, None, None);
    }
    macro_rules! take {
        ($($told:expr => $field:ident),+ $(,)?) => {
            $(if $told { node.$field.clone_from(&new.$field); })+
        };
    }
    take!(
        status => status,
        started => started_at,
        finished => finished_at,
        duration => duration_ms,
        told!(attempt, "attempt") => attempt,
        told!(row_count, "row_count") => row_count,
        told!(fingerprint, "fingerprint") => fingerprint,
        told!(error, "error") => error,
        told!(metadata, "metadata") => metadata,
        told!(intervals, "completed_intervals") => intervals,
        told!(partitions, "completed_partitions") => partitions,
        told!(depends_on, "depends_on") => depends_on,
        told!(max_attempts, "max_attempts") => max_attempts,
        told!(attempts, "attempts") => attempts,
        told!(worker, "worker") => worker,
        told!(token, "token") => token,
    );
    for (name, value) in new.watermarks.iter() {
        if was.is_none_or(|was| was.watermarks.get(name) != Some(value)) {
            node.watermarks.insert(name, value.clone());
        }
    }
    node.extra = join_extra(old.extra.as_ref(), new.extra.as_ref());
    node.version = new.version;
    node
}

fn members(extra: Option<&RawJson>) -> Members<'_> {
    extra.and_then(|raw| text::members(raw.as_str()).ok()).unwrap_or_default()
}

fn tells(node: &NodeState, key: &str) -> bool {
    get(&members(node.extra.as_ref()), key).is_some()
}

/// Whether an object says nothing else than it did: members may be gone, and their text may be written in another way.
fn is_as_it_was(now: Option<&RawJson>, was: Option<&RawJson>) -> bool {
    let was = members(was);
    members(now).iter().all(|(key, raw)| get(&was, key).is_some_and(|was| is_same(was, raw)))
}

fn is_same(a: &str, b: &str) -> bool {
    let value = |raw| serde_json::from_str::<serde_json::Value>(raw).ok();
    a == b || value(a).is_some_and(|a| Some(a) == value(b))
}

/// The object as it stands there now, and behind it what it lost of the one that we knew.
fn join_extra(old: Option<&RawJson>, new: Option<&RawJson>) -> Option<RawJson> {
    let Some(raw) = new else { return old.cloned() };
    let given = members(new);
    let lost: Vec<_> = members(old)
        .into_iter()
        .filter(|(key, _)| get(&given, key).is_none())
        .filter_map(|(key, raw)| Some((key, RawJson::parse(raw).ok()?)))
        .collect();
    if lost.is_empty() {
        return Some(raw.clone());
    }
    let given: Vec<_> = given.iter().filter_map(|(key, raw)| Some((key, RawJson::parse(raw).ok()?))).collect();
    let kept = lost.iter().map(|(key, raw)| (&**key, raw));
    Some(RawJson::object(given.iter().map(|(key, raw)| (&***key, raw)).chain(kept)))
}
