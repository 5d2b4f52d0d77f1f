//! The one function that changes a run. Run actors, journal replay and the backends' tests all go through it.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::attempt::{Attempt, MAX_ATTEMPTS_KEPT};
use super::batch::Refusal;
use super::change::{Change, NoteChanges};
use super::id::{NodeId, RunId};
use super::json::RawJson;
use super::metadata::Metadata;
use super::mutation::{Mutation, RunImport};
use super::node::NodeState;
use super::node_update::NodeUpdate;
use super::run::{RunHeader, RunState, Version};
use super::run_update::{NewRun, RunUpdate};
use super::status::{NodeStatus, RunStatus};
use super::time::to_micros;

/// Applies one mutation to a run (`None`: there is no such run) and stamps what it changes with `version`.
///
/// On refusal the state is untouched. Stamps are cut to whole microseconds, whatever clock they came from: no store keeps more. Pure: the same input gives the same output, wherever it runs.
///
/// # Errors
/// [`Refusal`] if the run or node that the mutation needs is missing, or is there and must not be.
pub fn apply(state: &mut Option<RunState>, id: &RunId, mutation: &Mutation, version: Version) -> Result<(), Refusal> {
    if mutation.creates_run() {
        if state.is_some() {
            return Err(Refusal::RunExists { run: id.clone() });
        }
        *state = Some(match mutation {
            Mutation::Import(run) => imported(id, run, version),
            Mutation::Create { run, at } => RunState::new(id.clone(), created(run, to_micros(*at)), version),
            _ => return Err(Refusal::RunNotFound { run: id.clone() }),
        });
        return Ok(());
    }
    let Some(run) = state else { return Err(Refusal::RunNotFound { run: id.clone() }) };
    if matches!(mutation, Mutation::Delete { .. }) {
        *state = None;
        return Ok(());
    }
    if let Some(node_id) = mutation.node() {
        check_update(mutation, node_id)?;
        if matches!(mutation, Mutation::DeleteNode { .. }) {
            if !run.drop_node(node_id) {
                return Err(Refusal::NodeNotFound { run: id.clone(), node: node_id.clone() });
            }
        } else if !mutation.only_removes() || run.node(node_id.as_str()).is_some() {
            run.change_node(node_id, fresh, |node| change(node, mutation, version));
        }
    } else if let Mutation::Update { update, at } = mutation {
        let header = run.header_mut();
        update_run(header, update, to_micros(*at));
        header.version = version;
    }
    run.set_version(version);
    Ok(())
}

fn check_update(mutation: &Mutation, node: &NodeId) -> Result<(), Refusal> {
    match mutation {
        Mutation::SetNode { update, .. } => update.check(node).map_err(Refusal::Input),
        _ => Ok(()),
    }
}

/// A node that is told of for the first time.
fn fresh() -> NodeState {
    NodeState::new(NodeStatus::Pending)
}

/// What a mutation makes of its node.
fn change(node: &mut NodeState, mutation: &Mutation, version: Version) {
    match mutation {
        Mutation::SetNode { update, at, .. } => update_node(node, update, to_micros(*at)),
        Mutation::AddInterval { interval, .. } => Arc::make_mut(&mut node.intervals).insert(*interval),
        Mutation::RemoveInterval { interval, .. } => Arc::make_mut(&mut node.intervals).remove(*interval),
        Mutation::AddPartition { partition, .. } => {
            Arc::make_mut(&mut node.partitions).insert(partition.clone());
        }
        Mutation::RemovePartition { partition, .. } => {
            Arc::make_mut(&mut node.partitions).remove(partition);
        }
        Mutation::Create { .. }
        | Mutation::Import(_)
        | Mutation::Update { .. }
        | Mutation::Delete { .. }
        | Mutation::DeleteNode { .. } => return,
    }
    node.version = version;
}

/// Applies those of the first mutations that change nodes of a run that is there, each node copied once however many they are: its sets may be long. Answers
/// with how many they were.
fn change_nodes(state: &mut Option<RunState>, mutations: &[Mutation], version: Version) -> Result<usize, Refusal> {
    let Some(run) = state else { return Ok(0) };
    let mut nodes: BTreeMap<&NodeId, Option<NodeState>> = BTreeMap::new();
    let mut count = 0;
    for mutation in mutations {
        let Some(id) = mutation.node().filter(|_| !matches!(mutation, Mutation::DeleteNode { .. })) else { break };
        check_update(mutation, id)?;
        let node = nodes.entry(id).or_insert_with(|| run.node(id.as_str()).cloned());
        if node.is_some() || !mutation.only_removes() {
            change(node.get_or_insert_with(fresh), mutation, version);
        }
        count += 1;
    }
    for (id, node) in nodes {
        if let Some(node) = node {
            run.put_node(id.clone(), node);
        }
    }
    if count > 0 {
        run.set_version(version);
    }
    Ok(count)
}

/// Applies the mutations of one entry to a run, all or nothing.
///
/// # Errors
/// [`Refusal`] of the first mutation that is refused; then the state is untouched.
pub fn apply_all(state: &mut Option<RunState>, id: &RunId, mutations: &[Mutation], version: Version) -> Result<(), Refusal> {
    if let [mutation] = mutations {
        // Refused alone it changes nothing: no copy is needed to fall back to.
        return apply(state, id, mutation, version);
    }
    let mut next = state.clone();
    let mut left = mutations;
    loop {
        let changed = change_nodes(&mut next, left, version)?;
        let Some((mutation, behind)) = left.get(changed..).and_then(<[Mutation]>::split_first) else { break };
        left = behind;
        if matches!(mutation, Mutation::Delete { .. }) && !left.is_empty() {
            return Err(Refusal::Input(super::id::InputError::new(
                format!("transaction on run {id:?}"),
                "it deletes the run and goes on; make the deletion its last step",
            )));
        }
        apply(&mut next, id, mutation, version)?;
    }
    if let Some(next) = &mut next {
        next.set_version(version);
    }
    *state = next;
    Ok(())
}

/// Applies the mutations of one entry that was accepted once, as a log says. Earlier versions made a node where something was only removed, and may have
/// deleted it then: what is not there now needs no deleting.
///
/// # Errors
/// [`Refusal`] of the first mutation that is refused otherwise; then the state is half-way.
pub(super) fn apply_logged(
    state: &mut Option<RunState>,
    id: &RunId,
    mutations: &[Mutation],
    version: Version,
) -> Result<(), Refusal> {
    let mut left = mutations;
    loop {
        let changed = change_nodes(state, left, version)?;
        let Some((mutation, behind)) = left.get(changed..).and_then(<[Mutation]>::split_first) else { break };
        left = behind;
        match apply(state, id, mutation, version) {
            Err(Refusal::NodeNotFound { .. }) => {}
            applied => applied?,
        }
    }
    if let Some(state) = state {
        state.set_version(version);
    }
    Ok(())
}

fn created(new: &NewRun, at: DateTime<Utc>) -> RunHeader {
    let mut header = RunHeader::new(new.status.clone(), at);
    header.started_at = new.started_at.or_else(|| (new.status == RunStatus::Running).then_some(at));
    if new.status.is_ended() {
        header.finished_at = Some(at);
    }
    header.worker.clone_from(&new.worker);
    note(&mut header.metadata, &new.metadata);
    header
}

fn imported(id: &RunId, import: &RunImport, version: Version) -> RunState {
    let mut state = RunState::new(id.clone(), import.header.clone(), version);
    for (node_id, node) in &import.nodes {
        let mut node = NodeState::clone(node);
        node.version = version;
        state.put_node(node_id.clone(), node);
    }
    state
}

fn update_run(header: &mut RunHeader, update: &RunUpdate, at: DateTime<Utc>) {
    if let Some(status) = &update.status {
        if *status != header.status {
            if *status == RunStatus::Running {
                header.started_at.get_or_insert(at);
                header.finished_at = None;
            } else if status.is_ended() {
                header.finished_at = Some(at);
            }
        }
        header.status = status.clone();
    }
    update.started_at.apply_to(&mut header.started_at);
    update.finished_at.apply_to(&mut header.finished_at);
    update.worker.apply_to(&mut header.worker);
    note(&mut header.metadata, &update.metadata);
}

/// What an update makes of a node, by a commit that brings the run to `version`: what [`apply`] does to it.
pub(crate) fn updated(node: &NodeState, update: &NodeUpdate, at: DateTime<Utc>, version: Version) -> NodeState {
    let mut node = node.clone();
    update_node(&mut node, update, to_micros(at));
    node.version = version;
    node
}

fn update_node(node: &mut NodeState, update: &NodeUpdate, at: DateTime<Utc>) {
    let moved = update.status.as_ref().filter(|status| **status != node.status);
    let (runs, waits) = (update.status == Some(NodeStatus::Running), update.status == Some(NodeStatus::Pending));
    // Also by way of pending: what keeps the stamp of an end had ended.
    let had_ended = node.status.is_ended() || node.finished_at.is_some();
    let counted = if moved.is_some() && runs && had_ended { node.attempt.saturating_add(1) } else { node.attempt };
    let attempt = update.attempt.unwrap_or(counted);
    // A higher number begins another attempt, also on a node that runs: its worker is gone, and somebody else takes over.
    let begins = (runs || waits) && attempt > node.attempt;
    if begins || (node.status.is_ended() && moved.is_some_and(|status| !status.is_ended())) {
        remember(node);
    }
    if (moved.is_some() && runs) || begins {
        node.started_at = runs.then_some(at);
        node.finished_at = None;
        node.duration_ms = None;
        node.error = None;
    } else if moved.is_some_and(NodeStatus::is_ended) {
        forget_told(node);
        node.finished_at = Some(at);
    }
    if begins || (moved.is_some() && (runs || waits)) {
        node.worker = None;
        node.token = None;
    }
    if let Some(status) = moved {
        node.status = status.clone();
    }
    node.attempt = attempt;
    update.started_at.apply_to(&mut node.started_at);
    update.finished_at.apply_to(&mut node.finished_at);
    if moved.is_some_and(NodeStatus::is_ended)
        && update.duration_ms == Change::Keep
        && let (Some(start), Some(end)) = (node.started_at, node.finished_at)
    {
        node.duration_ms = u64::try_from((end - start).num_milliseconds()).ok();
    }
    update.duration_ms.apply_to(&mut node.duration_ms);
    update.row_count.apply_to(&mut node.row_count);
    update.fingerprint.apply_to(&mut node.fingerprint);
    update.error.apply_to(&mut node.error);
    note(&mut node.watermarks, &update.watermarks);
    note(&mut node.metadata, &update.metadata);
    if let Some(needed) = &update.depends_on {
        node.depends_on = needed.clone();
    }
    update.max_attempts.apply_to(&mut node.max_attempts);
    update.worker.apply_to(&mut node.worker);
    update.token.apply_to(&mut node.token);
}

/// Puts the attempt that a node is on among those that are over, once.
fn remember(node: &mut NodeState) {
    let begun = node.status != NodeStatus::Pending || node.started_at.is_some() || node.finished_at.is_some();
    if begun && told(node).is_none() {
        let attempt = Attempt::of(node);
        node.attempts.push_bounded(attempt, MAX_ATTEMPTS_KEPT);
    }
}

/// The attempt that a node is on, where it was told already: what went from its end to pending was, under the status of its end.
fn told(node: &NodeState) -> Option<&Attempt> {
    let stamps =
        |last: &&Attempt| (last.number, last.started_at, last.finished_at) == (node.attempt, node.started_at, node.finished_at);
    node.attempts.last().filter(stamps).filter(|_| !node.status.is_ended())
}

/// A node that ends without having begun anew has neither the start nor the error of the attempt that was told. What was set since is its own.
fn forget_told(node: &mut NodeState) {
    let Some(last) = told(node).filter(|last| last.finished_at.is_some()) else { return };
    let now = Attempt::of(node);
    let (took, failed) = (last.duration_ms == now.duration_ms, last.error == now.error);
    node.started_at = None;
    if took {
        node.duration_ms = None;
    }
    if failed {
        node.error = None;
    }
}

fn note(notes: &mut Metadata, changes: &NoteChanges) {
    for (key, value) in changes {
        match value {
            Some(value) => notes.insert(key, RawJson::clone(value)),
            None => {
                notes.remove(key);
            }
        }
    }
}
