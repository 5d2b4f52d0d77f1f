//! A document that another program rewrote, joined with what the last one of ours knew.
//!
//! Three ways: what our last document told a reader who knows nothing of our part (`was`), what stands there now, and all that we knew (`old`).
//! What was changed there wins; what is as it was, or is not told, stays as we knew it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::document::{self, Document};
use super::foreign::derived_status;
use super::paths::{self, Paths};
use super::text::{self, Members, get};
use crate::model::{Ledger, NodeId, NodeState, NodeStatus, RawJson, RunHeader, RunId, RunState};
use crate::store::StoreError;

/// A foreign document, with what the last one of ours knew beside it.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) document: Document,
    /// Whether the last one of ours holds what this state does not.
    pub(super) keeps_previous: bool,
    /// The last sequence number that it tells; one that cannot be read says at least that there was one.
    pub(super) copy_seq: Option<u64>,
}

/// Joins a foreign document with the last one of ours, if there is one.
pub(super) fn with_previous(
    paths: &Paths,
    bytes: &[u8],
    foreign: Document,
    highest_seq: u64,
    notices: &mut Vec<String>,
) -> Result<Joined, StoreError> {
    let joined = |document, keeps_previous, copy_seq| Ok(Joined { document, keeps_previous, copy_seq });
    let Some((previous, _)) = paths::read(&paths.previous)? else { return joined(foreign, false, None) };
    let name = paths.document.display();
    let read = document::read(&paths.previous, &previous, highest_seq)
        .and_then(|known| Ok((known, document::read_without_our_part(&paths.previous, &previous)?)));
    let (previous, was) = match read {
        Ok(read) => read,
        Err(error) => {
            notices.push(format!(
                "{name} was rewritten by another program, and history cannot be taken from the last document of ours: {error}. That one is kept \
                 under another name when something is written"
            ));
            return joined(foreign, true, Some(1));
        }
    };
    let copy_seq = Some(previous.ledger.seq().0);
    let foreign = document::read(&paths.document, bytes, highest_seq.max(previous.ledger.seq().0))?;
    let newest = foreign.ledger.runs().next();
    let known = newest.and_then(|newest| Some((newest, previous.ledger.run(newest.id().as_str())?)));
    let put_back = known.filter(|(newest, known)| {
        previous.ledger.runs().next().is_some_and(|last| last.id() != known.id()) && is_as_it_came(newest, known)
    });
    if let Some(known) = put_back.map(|(_, known)| known.id().clone()) {
        return joined(restored(paths, &known, foreign, &previous.ledger, &was, notices), true, copy_seq);
    }
    let mut ledger = previous.ledger;
    let known = ledger.run_count();
    let newest = ledger.runs().next().map(|run| run.header().created_at);
    for new in foreign.ledger.runs() {
        let joined = match ledger.run(new.id().as_str()) {
            Some(old) => both(old, new, &was),
            // It was written after all that was known, whatever its clock or its time zone say.
            None => newest.map_or_else(|| new.clone(), |newest| later_than(newest, new)),
        };
        ledger.restore_run(joined);
    }
    ledger.raise_seq(foreign.ledger.seq());
    notices.push(format!(
        "{name} was rewritten by another program: it is opened as run(s) of its own, and {known} earlier run(s) and the coverage come from {}",
        paths.previous.display()
    ));
    joined(Document { ledger, ..foreign }, false, copy_seq)
}

/// A foreign document whose newest run is an old one of those that we knew, word for word as it came then: somebody put a backup back. It wins: what was
/// begun after that run is no part of the state any more, and the run is as the backup tells it.
fn restored(
    paths: &Paths,
    known: &RunId,
    foreign: Document,
    previous: &Ledger,
    was: &Ledger,
    notices: &mut Vec<String>,
) -> Document {
    let mut ledger = Ledger::new();
    for run in previous.runs().skip_while(|run| run.id() != known).skip(1) {
        ledger.restore_run(run.clone());
    }
    for (node, retained) in previous.retained() {
        ledger.restore_retained(&node, &retained);
    }
    for run in foreign.ledger.runs() {
        let mut header = run.header().clone();
        if let Some(old) = previous.run(run.id().as_str()) {
            if old.id() != known {
                ledger.restore_run(both(old, run, was));
                continue;
            }
            header.created_at = old.header().created_at;
        }
        ledger.restore_run(under(header, run));
    }
    ledger.raise_seq(foreign.ledger.seq());
    notices.push(format!(
        "{} is a backup that was put back: run {:?} is its newest, and {} run(s) had been begun since. It wins; what was known since is in {}, and is kept \
         under another name when something is written",
        paths.document.display(),
        known.as_str(),
        previous.runs().take_while(|run| run.id() != known).count(),
        paths.previous.display()
    ));
    Document { ledger, ..foreign }
}

/// A run, created after a moment.
fn later_than(moment: DateTime<Utc>, run: &RunState) -> RunState {
    let mut header = run.header().clone();
    header.created_at = header.created_at.max(document::moved(moment, 1));
    under(header, run)
}

/// A run under another header.
fn under(header: RunHeader, run: &RunState) -> RunState {
    let nodes = run.nodes().map(|(id, node)| (id.clone(), node.clone()));
    RunState::from_parts(run.id().clone(), header, run.version(), run.created_version(), nodes)
}

/// A run that both know.
fn both(old: &RunState, new: &RunState, was: &Ledger) -> RunState {
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
fn is_as_it_came(now: &RunState, known: &RunState) -> bool {
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
