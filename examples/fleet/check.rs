//! What must be true in the end, whoever was killed when: compared are the database and what the workers were told.

use std::collections::{BTreeMap, BTreeSet};

use seeknal_state::model::RunState;
use seeknal_state::{FencingToken, NodeId, NodeStatus};

use crate::ack::Line;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// What is wrong; empty means: every node was done exactly once, in order.
    pub(crate) problems: Vec<String>,
    /// Claims that were told.
    pub(crate) claims: usize,
    /// Attempts that were taken over from a worker that vanished.
    pub(crate) takeovers: usize,
    /// Late writes that were refused.
    pub(crate) refused: usize,
    /// Ends that are stored, and whose worker did not live to note them.
    pub(crate) unnoted: usize,
}

/// Compares the run with the plan (every node and what it depends on) and with what was told. `killed`: some workers did not live to note what they
/// were told last.
pub(crate) fn compare(plan: &BTreeMap<NodeId, BTreeSet<NodeId>>, lines: &[Line], run: &RunState, killed: bool) -> Findings {
    let mut found = Findings::default();
    let lines: Vec<&Line> = lines.iter().filter(|line| line.run == *run.id()).collect();
    commits(&mut found, &lines);
    let mut of_node: BTreeMap<&NodeId, Vec<&Line>> = BTreeMap::new();
    for line in &lines {
        of_node.entry(&line.node).or_default().push(line);
        match line.status.as_str() {
            "running" => found.claims += 1,
            "success" => {}
            "refused" => found.refused += 1,
            other => found.problems.push(format!("node {:?}: a line says {other:?}", line.node)),
        }
    }
    for node in of_node.keys().filter(|node| !plan.contains_key(**node)) {
        found.problems.push(format!("node {node:?} was worked on, and is not in the plan"));
    }
    if run.node_count() != plan.len() {
        found.problems.push(format!("the run has {} nodes, the plan {}", run.node_count(), plan.len()));
    }
    for (node, needs) in plan {
        let told = of_node.get(node).map(Vec::as_slice).unwrap_or_default();
        one_node(&mut found, node, told, run, killed);
        in_order(&mut found, node, needs, told, run);
    }
    found
}

/// Every commit has a place and a version of its own, and tokens grow with them.
fn commits(found: &mut Findings, lines: &[&Line]) {
    let mut by_seq: BTreeMap<u64, &Line> = BTreeMap::new();
    let mut versions = BTreeSet::new();
    for line in lines.iter().filter(|line| line.status != "refused") {
        let Some(seq) = line.seq else {
            found.problems.push(format!("node {:?}: a commit without a place in the order", line.node));
            continue;
        };
        if let Some(other) = by_seq.insert(seq, line) {
            found.problems.push(format!("commit {seq} was told for node {:?} and for node {:?}", other.node, line.node));
        }
        if line.before >= line.after || !versions.insert(line.after) {
            found
                .problems
                .push(format!("node {:?}: version {} follows {}, or was told twice", line.node, line.after, line.before));
        }
    }
    let (mut last_version, mut last_token) = (0, FencingToken(0));
    for (seq, line) in by_seq {
        if line.after <= last_version {
            found.problems.push(format!("commit {seq} has version {}, an earlier one has {last_version}", line.after));
        }
        last_version = last_version.max(line.after);
        if line.status == "running" {
            if line.token <= last_token {
                found.problems.push(format!("commit {seq}: token {} was granted after {last_token}", line.token));
            }
            last_token = last_token.max(line.token);
        }
    }
}

/// A node is done, once, by the claim that it names.
fn one_node(found: &mut Findings, node: &NodeId, told: &[&Line], run: &RunState, killed: bool) {
    let mut wrong = |what: String| found.problems.push(format!("node {node:?}: {what}"));
    let Some(state) = run.node(node.as_str()) else { return wrong("it is not there".to_owned()) };
    if state.status != NodeStatus::Success {
        return wrong(format!("it is {}", state.status));
    }
    let Some(token) = state.token else { return wrong("no claim says that it was done".to_owned()) };
    let numbers: Vec<u32> = state.attempts.iter().map(|attempt| attempt.number).collect();
    if !numbers.iter().copied().eq(1..state.attempt) {
        wrong(format!("it is on attempt {}, its history has {numbers:?}", state.attempt));
    }
    for attempt in state.attempts.iter().filter(|attempt| attempt.status != NodeStatus::Running) {
        wrong(format!("attempt {} ended as {}, and the node was worked on again", attempt.number, attempt.status));
    }
    let mut claims: Vec<&&Line> = told.iter().filter(|line| line.status == "running").collect();
    claims.sort_by_key(|line| line.token);
    if claims.windows(2).any(|pair| matches!(pair, [a, b] if a.attempt > b.attempt)) {
        wrong("a later claim was for an earlier attempt".to_owned());
    }
    if claims.last().is_some_and(|last| last.token > token) {
        wrong(format!("it was claimed again after it was done by token {token}"));
    }
    match claims.iter().find(|line| line.token == token) {
        Some(claim) if claim.attempt != state.attempt => {
            wrong(format!("token {token} was granted for attempt {}, it is on {}", claim.attempt, state.attempt));
        }
        None if !killed => wrong(format!("nobody was told of the claim with token {token}")),
        _ => {}
    }
    let ends: Vec<&&Line> = told.iter().filter(|line| line.status == "success").collect();
    match ends.as_slice() {
        [] if killed => found.unnoted += 1,
        [] => wrong("it is done, and nobody was told".to_owned()),
        [end] => {
            if end.token != token {
                wrong(format!("token {} was told that it is done, stored is token {token}", end.token));
            }
            if end.after != state.version.0 {
                wrong(format!("it was done at version {}, and written again at {}", end.after, state.version));
            }
        }
        several => wrong(format!("{} workers were told that they have done it", several.len())),
    }
    for late in told.iter().filter(|line| line.status == "refused" && line.token == token) {
        wrong(format!("worker {} was refused under the token that is stored", late.worker));
    }
    found.takeovers += state.attempts.len();
}

/// Nobody was given a node before what it depends on was done.
fn in_order(found: &mut Findings, node: &NodeId, needs: &BTreeSet<NodeId>, told: &[&Line], run: &RunState) {
    for claim in told.iter().filter(|line| line.status == "running") {
        for needed in needs {
            let done = run.node(needed.as_str()).map_or(u64::MAX, |state| state.version.0);
            if done >= claim.after {
                found
                    .problems
                    .push(format!("node {node:?} was claimed at version {}, node {needed:?} was done at {done}", claim.after));
            }
        }
    }
}
