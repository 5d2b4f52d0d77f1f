//! The one function that changes a run: each rule of a transition, refusals, versions, and that nothing but the input decides.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "helpers of tests are tests")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use seeknal_state::model::{
    Fingerprint, Interval, Metadata, Mutation, NewRun, NodeId, NodeState, NodeStatus, NodeUpdate, PartitionKey, ProcessInfo,
    RawJson, Refusal, RunHeader, RunId, RunImport, RunState, RunStatus, RunUpdate, Version, apply, apply_all, time,
};

fn at(seconds: i64) -> DateTime<Utc> {
    time::from_micros(1_704_067_200_000_000 + seconds * 1_000_000).unwrap()
}

fn span(start: i64, end: i64) -> Interval {
    Interval::new(at(start), at(end)).unwrap()
}

fn id() -> RunId {
    RunId::new("run").unwrap()
}

fn n(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn create() -> Mutation {
    Mutation::Create { run: NewRun::running(), at: at(0) }
}

fn set(node: &str, update: NodeUpdate, seconds: i64) -> Mutation {
    Mutation::SetNode { node: n(node), update: Box::new(update), at: at(seconds) }
}

fn update(update: RunUpdate, seconds: i64) -> Mutation {
    Mutation::Update { update, at: at(seconds) }
}

/// A run after these mutations, each an entry of its own.
fn after(mutations: &[Mutation]) -> RunState {
    let mut state = None;
    for (index, mutation) in mutations.iter().enumerate() {
        apply(&mut state, &id(), mutation, Version(u64::try_from(index).unwrap() + 1)).unwrap();
    }
    state.unwrap()
}

/// A node after these updates, ten seconds apart, beginning at second 10.
fn node_after(updates: Vec<NodeUpdate>) -> NodeState {
    let mut mutations = vec![create()];
    for (update, seconds) in updates.into_iter().zip((1..).map(|step| step * 10)) {
        mutations.push(set("n", update, seconds));
    }
    after(&mutations).node("n").unwrap().clone()
}

fn ends() -> [NodeUpdate; 4] {
    [NodeUpdate::success(), NodeUpdate::failed("why"), NodeUpdate::skipped(), NodeUpdate::cached()]
}

#[test]
fn a_new_node_is_pending_and_on_its_first_attempt() {
    let node = node_after(vec![NodeUpdate::new()]);
    assert_eq!(node.without_version(), NodeState::new(NodeStatus::Pending));
    assert_eq!(node.attempt, 1);
    assert_eq!(node_after(vec![NodeUpdate::pending()]).without_version(), NodeState::new(NodeStatus::Pending));
}

#[test]
fn moving_to_running_begins_an_attempt() {
    let first = node_after(vec![NodeUpdate::running()]);
    assert_eq!((first.attempt, first.started_at, first.finished_at), (1, Some(at(10)), None));
    for end in ends() {
        let ended = end.clone().row_count(5).fingerprint("f").metadata("k", 1).watermark("w", "1").error("an old warning");
        let node = node_after(vec![NodeUpdate::running(), ended, NodeUpdate::running()]);
        assert_eq!(node.attempt, 2, "it had ended as {end:?}");
        assert_eq!(node.started_at, Some(at(30)));
        assert_eq!((node.finished_at, node.duration_ms, node.error.clone()), (None, None, None));
        assert_eq!(
            (node.row_count, node.fingerprint.as_ref().and_then(Fingerprint::content_hash)),
            (Some(5), Some("f".to_owned())),
            "fields not given are kept"
        );
        assert_eq!((node.metadata.len(), node.watermarks.len()), (1, 1), "notes not given are kept");
    }
}

/// Number, status and error of every attempt that is over.
fn history(node: &NodeState) -> Vec<(u32, &str, Option<&str>)> {
    node.attempts.iter().map(|attempt| (attempt.number, attempt.status.as_str(), attempt.error.as_deref())).collect()
}

#[test]
fn an_attempt_that_is_over_is_kept_once_and_as_it_was() {
    let failed = || NodeUpdate::failed("why");
    let node = node_after(vec![NodeUpdate::running(), failed(), NodeUpdate::running()]);
    assert_eq!((node.attempt, history(&node)), (2, vec![(1, "failed", Some("why"))]));
    let first = &node.attempts[0];
    assert_eq!((first.started_at, first.finished_at, first.duration_ms), (Some(at(10)), Some(at(20)), Some(10_000)));

    // By way of pending it is told when the end is left, and not again.
    let node =
        node_after(vec![failed(), NodeUpdate::pending(), NodeUpdate::running(), NodeUpdate::success(), NodeUpdate::running()]);
    assert_eq!((node.attempt, history(&node)), (3, vec![(1, "failed", Some("why")), (2, "success", None)]));
    let odd = node_after(vec![failed(), NodeUpdate::status(NodeStatus::parse("queued")), NodeUpdate::running()]);
    assert_eq!((odd.attempt, history(&odd)), (2, vec![(1, "failed", Some("why"))]));

    // Counting backwards loses nothing either.
    let node = node_after(vec![failed().attempt(5), NodeUpdate::running().attempt(1), failed(), NodeUpdate::running()]);
    assert_eq!((node.attempt, history(&node)), (2, vec![(5, "failed", Some("why")), (1, "failed", Some("why"))]));

    for quiet in [
        vec![NodeUpdate::running(), NodeUpdate::success()],
        vec![NodeUpdate::pending(), NodeUpdate::pending().attempt(4)],
        vec![NodeUpdate::running(), NodeUpdate::pending(), NodeUpdate::running()],
        vec![NodeUpdate::running(), NodeUpdate::success().attempt(3)],
    ] {
        assert_eq!(history(&node_after(quiet)), vec![]);
    }
}

/// A node that waits again after its attempt was told, and ends without beginning another one: the time and the error of what was told are not its own.
#[test]
fn an_end_without_a_beginning_counts_nothing_of_what_was_told() {
    let told = || vec![NodeUpdate::running(), NodeUpdate::failed("x")];
    for waits in [NodeUpdate::pending(), NodeUpdate::status(NodeStatus::parse("queued"))] {
        let and = |more: Vec<NodeUpdate>| node_after([told(), vec![waits.clone()], more].concat());
        let still = and(vec![]);
        assert_eq!((still.finished_at, still.error.as_deref()), (Some(at(20)), Some("x")), "until then it shows how it ended");
        for end in ["skipped", "cached", "success"] {
            let status = NodeStatus::parse(end);
            let end_of = || NodeUpdate::status(status.clone());
            let node = and(vec![end_of()]);
            assert_eq!((node.started_at, node.finished_at, node.duration_ms), (None, Some(at(40)), None), "{end}");
            assert_eq!((node.error, node.attempt), (None, 1), "{end}");
            let node = and(vec![end_of(), NodeUpdate::running()]);
            assert_eq!(history(&node), [(1, "failed", Some("x")), (1, end, None)]);
            assert_eq!((node.attempts[1].started_at, node.attempts[1].duration_ms), (None, None));
        }
        let node = and(vec![NodeUpdate::success().started_at(at(35))]);
        assert_eq!((node.started_at, node.duration_ms), (Some(at(35)), Some(5_000)), "a start that is given counts");
        let node = and(vec![NodeUpdate::new().started_at(at(33)), NodeUpdate::success()]);
        assert_eq!((node.started_at, node.duration_ms), (Some(at(33)), Some(17_000)), "also one that was given before");
        let node = and(vec![NodeUpdate::failed("y").duration_ms(7)]);
        assert_eq!((node.error.as_deref(), node.duration_ms), (Some("y"), Some(7)));
        let node = and(vec![NodeUpdate::new().error("a warning"), NodeUpdate::success()]);
        assert_eq!(node.error.as_deref(), Some("a warning"), "what was said since is kept");
        let node = and(vec![NodeUpdate::running(), NodeUpdate::success()]);
        assert_eq!(
            (node.started_at, node.duration_ms, node.attempt),
            (Some(at(40)), Some(10_000), 2),
            "one that begins is its own"
        );
    }
    let node = node_after(vec![NodeUpdate::running(), NodeUpdate::pending(), NodeUpdate::success()]);
    assert_eq!((node.started_at, node.duration_ms), (Some(at(10)), Some(20_000)), "an attempt that was not told is not over");
    let long = "é".repeat(3_000);
    let node = node_after(vec![NodeUpdate::failed(&long), NodeUpdate::pending(), NodeUpdate::cached()]);
    assert_eq!(node.error, None, "also one of which the history keeps a part");
}

#[test]
fn a_higher_attempt_takes_over_what_runs() {
    let begun = NodeUpdate::running;
    let taken = node_after(vec![begun(), NodeUpdate::running().attempt(2)]);
    assert_eq!((taken.attempt, taken.started_at), (2, Some(at(20))));
    assert_eq!(history(&taken), vec![(1, "running", None)]);
    let freed = node_after(vec![begun().error("a warning"), NodeUpdate::pending().attempt(2)]);
    assert_eq!((freed.attempt, freed.started_at, freed.finished_at, freed.worker.clone()), (2, None, None, None));
    assert_eq!((freed.error.clone(), history(&freed)), (None, vec![(1, "running", Some("a warning"))]));
    let next = node_after(vec![begun(), NodeUpdate::pending().attempt(2), NodeUpdate::running()]);
    assert_eq!((next.attempt, next.attempts.len()), (2, 1), "a number that was said is not counted again");
    let again = node_after(vec![begun(), NodeUpdate::failed("x"), NodeUpdate::pending().attempt(2), NodeUpdate::running()]);
    assert_eq!((again.attempt, history(&again)), (2, vec![(1, "failed", Some("x"))]));
}

#[test]
fn dependencies_and_limits_are_checked_when_they_are_written() {
    let node = node_after(vec![NodeUpdate::new().depends_on(["b", "a", "b"]).max_attempts(3), NodeUpdate::running()]);
    assert_eq!((node.depends_on.as_slice(), node.max_attempts), ([n("b"), n("a")].as_slice(), Some(3)));
    let none: [&str; 0] = [];
    let cleared = node_after(vec![
        NodeUpdate::new().depends_on(["b"]).max_attempts(3),
        NodeUpdate::new().depends_on(none).clear_max_attempts(),
    ]);
    assert_eq!((cleared.depends_on.len(), cleared.max_attempts), (0, None));
    let many = (0..=seeknal_state::model::MAX_DEPENDENCIES).map(|index| format!("n{index}"));
    for (wrong, said) in [
        (NodeUpdate::new().depends_on(["a", "n"]), "itself"),
        (NodeUpdate::new().depends_on(["a", ""]), "empty"),
        (NodeUpdate::new().depends_on(many), "more than"),
        (NodeUpdate::new().max_attempts(0), "at least 1"),
    ] {
        let mut state = Some(after(&[create()]));
        let refusal = apply(&mut state, &id(), &set("n", wrong, 1), Version(2)).unwrap_err();
        assert!(matches!(refusal, Refusal::Input(_)) && refusal.to_string().contains(said), "{refusal}");
        assert_eq!(state, Some(after(&[create()])));
    }
}

#[test]
fn only_an_ended_node_begins_another_attempt() {
    let resumed = node_after(vec![
        NodeUpdate::pending(),
        NodeUpdate::running(),
        NodeUpdate::status(NodeStatus::parse("paused")),
        NodeUpdate::running(),
    ]);
    assert_eq!((resumed.attempt, resumed.started_at), (1, Some(at(40))));
    let same = node_after(vec![NodeUpdate::running(), NodeUpdate::running().row_count(1)]);
    assert_eq!((same.attempt, same.started_at), (1, Some(at(10))), "running to running is no move");
    let counted = node_after(vec![
        NodeUpdate::failed("x"),
        NodeUpdate::running(),
        NodeUpdate::failed("x"),
        NodeUpdate::running(),
        NodeUpdate::success(),
    ]);
    assert_eq!(counted.attempt, 3);
    let said = node_after(vec![NodeUpdate::failed("x"), NodeUpdate::running().attempt(9)]);
    assert_eq!(said.attempt, 9, "a given attempt wins");
    let most = node_after(vec![NodeUpdate::failed("x").attempt(u32::MAX), NodeUpdate::running()]);
    assert_eq!(most.attempt, u32::MAX, "the counter stops at its end");
}

#[test]
fn moving_to_an_end_stamps_it() {
    for end in ends() {
        let node = node_after(vec![NodeUpdate::running(), end.clone()]);
        assert_eq!((node.started_at, node.finished_at, node.duration_ms), (Some(at(10)), Some(at(20)), Some(10_000)), "{end:?}");
        let never_ran = node_after(vec![end]);
        assert_eq!((never_ran.started_at, never_ran.finished_at, never_ran.duration_ms), (None, Some(at(10)), None));
    }
    let other_end = node_after(vec![NodeUpdate::running(), NodeUpdate::success(), NodeUpdate::failed("late")]);
    assert_eq!((other_end.finished_at, other_end.duration_ms), (Some(at(30)), Some(20_000)), "another end is a move to an end");
    let again = node_after(vec![NodeUpdate::running(), NodeUpdate::success(), NodeUpdate::success().row_count(4)]);
    assert_eq!((again.finished_at, again.row_count), (Some(at(20)), Some(4)), "the same status is no move");
}

#[test]
fn given_values_win() {
    let node = node_after(vec![NodeUpdate::running(), NodeUpdate::success().finished_at(at(13)).started_at(at(12))]);
    assert_eq!(
        (node.started_at, node.finished_at, node.duration_ms),
        (Some(at(12)), Some(at(13)), Some(1_000)),
        "the duration is that between the given stamps"
    );
    let node = node_after(vec![NodeUpdate::running(), NodeUpdate::success().duration(Duration::from_millis(7))]);
    assert_eq!((node.finished_at, node.duration_ms), (Some(at(20)), Some(7)));
    let node = node_after(vec![NodeUpdate::failed("x"), NodeUpdate::running().error("a warning").started_at(at(1))]);
    assert_eq!((node.error.as_deref(), node.started_at), (Some("a warning"), Some(at(1))));
    let node = node_after(vec![NodeUpdate::running(), NodeUpdate::new().finished_at(at(99)).duration_ms(3)]);
    assert_eq!((node.status, node.finished_at, node.duration_ms), (NodeStatus::Running, Some(at(99)), Some(3)));
}

#[test]
fn an_end_before_the_start_has_no_duration() {
    let node = node_after(vec![NodeUpdate::running(), NodeUpdate::success().finished_at(at(3))]);
    assert_eq!((node.finished_at, node.duration_ms), (Some(at(3)), None));
}

#[test]
fn fields_not_given_are_kept_and_cleared_ones_are_not() {
    let full = NodeUpdate::failed("e")
        .row_count(1)
        .fingerprint("f")
        .metadata("a", 1)
        .metadata("b", 2)
        .watermark("w", "x")
        .duration_ms(5);
    let before = node_after(vec![full.clone()]);
    let kept = node_after(vec![full.clone(), NodeUpdate::new()]);
    assert_eq!(kept.without_version(), before.without_version());
    let cleared = node_after(vec![
        full.clone(),
        NodeUpdate::new().clear_error().clear_row_count().clear_fingerprint().remove_metadata("a").remove_metadata("missing"),
    ]);
    assert_eq!((cleared.error, cleared.row_count, cleared.fingerprint), (None, None, None));
    assert_eq!(cleared.metadata.to_raw().as_str(), "{\"b\":2}");
    let moved = node_after(vec![full, NodeUpdate::new().metadata("b", 3).metadata("c", 4)]);
    assert_eq!(moved.metadata.to_raw().as_str(), "{\"a\":1,\"b\":3,\"c\":4}", "a key keeps its place");
}

#[test]
fn stamps_are_cut_to_microseconds() {
    let fine = at(5) + chrono::Duration::nanoseconds(1_999);
    let cut = at(5) + chrono::Duration::microseconds(1);
    let mutations = [
        Mutation::Create { run: NewRun::running(), at: fine },
        Mutation::SetNode { node: n("a"), update: Box::new(NodeUpdate::running()), at: fine },
        Mutation::SetNode { node: n("b"), update: Box::new(NodeUpdate::success()), at: fine },
        Mutation::Update { update: RunUpdate::failed(), at: fine },
    ];
    let run = after(&mutations);
    let header = run.header();
    assert_eq!((header.created_at, header.started_at, header.finished_at), (cut, Some(cut), Some(cut)));
    assert_eq!((run.node("a").unwrap().started_at, run.node("b").unwrap().finished_at), (Some(cut), Some(cut)));
}

#[test]
fn runs_are_created_as_they_begin() {
    let header = |new: NewRun| after(&[Mutation::Create { run: new, at: at(7) }]).header().clone();
    let pending = header(NewRun::pending());
    assert_eq!((pending.created_at, pending.started_at, pending.finished_at), (at(7), None, None));
    assert_eq!(header(NewRun::running()).started_at, Some(at(7)));
    assert_eq!(header(NewRun::running().started_at(at(3))).started_at, Some(at(3)));
    let ended = header(NewRun::status(RunStatus::Failed));
    assert_eq!((ended.started_at, ended.finished_at), (None, Some(at(7))));
    let odd = header(NewRun::status(RunStatus::parse("queued")).metadata("k", "v"));
    assert_eq!((odd.status.as_str(), odd.started_at, odd.metadata.len()), ("queued", None, 1));
}

#[test]
fn runs_move_as_they_are_told() {
    let header = |updates: &[RunUpdate]| {
        let mut mutations = vec![Mutation::Create { run: NewRun::pending(), at: at(0) }];
        mutations
            .extend(updates.iter().cloned().zip((1..).map(|step| step * 10)).map(|(change, seconds)| update(change, seconds)));
        after(&mutations).header().clone()
    };
    let started = header(&[RunUpdate::running()]);
    assert_eq!((started.status, started.started_at), (RunStatus::Running, Some(at(10))));
    for end in [RunUpdate::success(), RunUpdate::failed(), RunUpdate::cancelled()] {
        let ended = header(&[RunUpdate::running(), end.clone()]);
        assert_eq!((ended.started_at, ended.finished_at), (Some(at(10)), Some(at(20))));
        let given = header(&[RunUpdate::running(), end.clone().finished_at(at(15)).started_at(at(1))]);
        assert_eq!((given.started_at, given.finished_at), (Some(at(1)), Some(at(15))));
        let same = header(&[RunUpdate::running(), end.clone(), end.clone()]);
        assert_eq!(same.finished_at, Some(at(20)), "the same status is no move");
        let again = header(&[RunUpdate::running(), end, RunUpdate::running()]);
        assert_eq!((again.started_at, again.finished_at), (Some(at(10)), None), "a run keeps the stamp of its first start");
    }
    let noted = header(&[RunUpdate::new().metadata("a", 1).metadata("b", 2), RunUpdate::new().remove_metadata("a")]);
    assert_eq!((noted.status, noted.metadata.to_raw().as_str()), (RunStatus::Pending, "{\"b\":2}"));
    assert_eq!(noted.created_at, at(0), "the stamp of creation never changes");
}

#[test]
fn intervals_and_partitions_make_their_node() {
    let key = |text: &str| PartitionKey::new(text).unwrap();
    let run = after(&[
        create(),
        Mutation::AddInterval { node: n("i"), interval: span(0, 10) },
        Mutation::AddInterval { node: n("i"), interval: span(10, 20) },
        Mutation::RemoveInterval { node: n("i"), interval: span(5, 6) },
        Mutation::AddPartition { node: n("p"), partition: key("b") },
        Mutation::AddPartition { node: n("p"), partition: key("a") },
        Mutation::AddPartition { node: n("p"), partition: key("a") },
        Mutation::RemovePartition { node: n("p"), partition: key("missing") },
    ]);
    assert_eq!(run.node("i").unwrap().intervals.iter().collect::<Vec<_>>(), [span(0, 5), span(6, 20)]);
    assert_eq!(run.node("i").unwrap().status, NodeStatus::Pending);
    assert_eq!(run.node("p").unwrap().partitions.iter().map(PartitionKey::as_str).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(run.node_count(), 2);
}

/// A node that nobody named as one to be worked on does not come to be by taking something out of it.
#[test]
fn taking_out_makes_no_node() {
    let run = after(&[
        create(),
        Mutation::RemoveInterval { node: n("i"), interval: span(5, 6) },
        Mutation::RemovePartition { node: n("p"), partition: PartitionKey::new("a").unwrap() },
    ]);
    assert_eq!((run.node_count(), run.version()), (0, Version(3)));
}

#[test]
fn what_needs_a_run_is_refused_without_one() {
    let partition = PartitionKey::new("p").unwrap();
    for mutation in [
        set("n", NodeUpdate::running(), 1),
        update(RunUpdate::success(), 1),
        Mutation::Delete { keep_coverage: true },
        Mutation::DeleteNode { node: n("n") },
        Mutation::AddInterval { node: n("n"), interval: span(0, 1) },
        Mutation::RemoveInterval { node: n("n"), interval: span(0, 1) },
        Mutation::AddPartition { node: n("n"), partition: partition.clone() },
        Mutation::RemovePartition { node: n("n"), partition },
    ] {
        let mut state = None;
        assert_eq!(apply(&mut state, &id(), &mutation, Version(1)), Err(Refusal::RunNotFound { run: id() }), "{mutation:?}");
        assert_eq!(state, None);
    }
}

#[test]
fn what_is_there_is_not_made_again() {
    let import =
        Mutation::Import(Box::new(RunImport { header: RunHeader::new(RunStatus::Success, at(9)), nodes: BTreeMap::new() }));
    for mutation in [create(), import] {
        let mut state = Some(after(&[create()]));
        assert_eq!(apply(&mut state, &id(), &mutation, Version(2)), Err(Refusal::RunExists { run: id() }));
        assert_eq!(state, Some(after(&[create()])));
    }
}

#[test]
fn an_entry_is_applied_whole_or_not_at_all() {
    let before = Some(after(&[create(), set("n", NodeUpdate::running(), 1)]));
    for bad in [Mutation::DeleteNode { node: n("missing") }, create()] {
        let mut state = before.clone();
        let mutations =
            [set("n", NodeUpdate::success(), 2), update(RunUpdate::failed(), 2), bad, set("m", NodeUpdate::running(), 2)];
        assert!(apply_all(&mut state, &id(), &mutations, Version(9)).is_err());
        assert_eq!(state, before);
    }
    let mut state = before.clone();
    let mutations =
        [set("n", NodeUpdate::success(), 2), Mutation::Delete { keep_coverage: false }, set("m", NodeUpdate::running(), 2)];
    assert!(
        matches!(apply_all(&mut state, &id(), &mutations, Version(9)), Err(Refusal::Input(_))),
        "a deletion is the last step"
    );
    assert_eq!(state, before);
    assert!(apply_all(&mut state, &id(), &mutations[..2], Version(9)).is_ok());
    assert_eq!(state, None);
    // A creation and what belongs to it are one.
    assert!(apply_all(&mut state, &id(), &[create(), set("n", NodeUpdate::running(), 1)], Version(12)).is_ok());
    let made = state.unwrap();
    assert_eq!(
        (made.version(), made.created_version(), made.node("n").unwrap().version),
        (Version(12), Version(12), Version(12))
    );
}

/// A node's sets may be long: they are copied once an entry, not once a step.
#[test]
fn many_steps_of_one_node_share_one_copy_of_its_sets() {
    const PARTITIONS: usize = 20_000;
    let mut mutations = vec![create()];
    for number in 0..PARTITIONS {
        for node in ["a", "b"] {
            let partition = PartitionKey::new(format!("p{number}")).unwrap();
            mutations.push(Mutation::AddPartition { node: n(node), partition });
        }
    }
    let mut state = None;
    apply_all(&mut state, &id(), &mutations, Version(1)).unwrap();
    let state = state.unwrap();
    assert!(["a", "b"].iter().all(|node| state.node(node).unwrap().partitions.len() == PARTITIONS));
}

#[test]
fn versions_are_stamped_on_what_is_touched() {
    let mut state = Some(after(&[create(), set("a", NodeUpdate::running(), 1), set("b", NodeUpdate::running(), 1)]));
    let versions = |state: &Option<RunState>| {
        let run = state.as_ref().unwrap();
        let of = |node: &str| run.node(node).map(|node| node.version.0);
        (run.version().0, run.header().version.0, of("a"), of("b"))
    };
    assert_eq!(versions(&state), (3, 1, Some(2), Some(3)));
    apply_all(&mut state, &id(), &[set("a", NodeUpdate::new(), 5)], Version(7)).unwrap();
    assert_eq!(versions(&state), (7, 1, Some(7), Some(3)), "also by an update that changes nothing");
    apply_all(&mut state, &id(), &[update(RunUpdate::new(), 5)], Version(8)).unwrap();
    assert_eq!(versions(&state), (8, 8, Some(7), Some(3)));
    apply_all(&mut state, &id(), &[], Version(9)).unwrap();
    assert_eq!(versions(&state), (9, 8, Some(7), Some(3)), "an entry without mutations is an entry");
    apply_all(&mut state, &id(), &[Mutation::DeleteNode { node: n("a") }], Version(10)).unwrap();
    assert_eq!(versions(&state), (10, 8, None, Some(3)));
    assert_eq!(state.unwrap().created_version(), Version(1));
}

#[test]
fn an_import_keeps_its_stamps_and_not_its_versions() {
    let mut header = RunHeader::new(RunStatus::Success, at(3));
    header.finished_at = Some(at(8));
    header.version = Version(77);
    let mut node = NodeState::new(NodeStatus::Success);
    node.attempt = 4;
    node.finished_at = Some(at(6));
    node.version = Version(78);
    let import = RunImport { header, nodes: [(n("n"), Arc::new(node))].into() };
    let run = after(&[Mutation::Import(Box::new(import))]);
    assert_eq!((run.version(), run.header().version, run.node("n").unwrap().version), (Version(1), Version(1), Version(1)));
    assert_eq!((run.header().created_at, run.header().finished_at), (at(3), Some(at(8))));
    assert_eq!((run.node("n").unwrap().attempt, run.newest_stamp()), (4, Some(at(8))));
}

#[test]
fn a_mutation_survives_json() {
    let raw = |text: &str| RawJson::parse(text).unwrap();
    let mut node = NodeState::new(NodeStatus::parse("odd"));
    node.extra = Some(raw("{\"b\":1e-300,\"a\":9007199254740993,\"u\":\"\\u0000\"}"));
    node.fingerprint = Some(Fingerprint::from_raw(raw("{\"content_hash\":\"\\u0041\"}")).unwrap());
    node.metadata = Metadata::from_raw(&raw("{\"z\":1.0,\"a\":null}")).unwrap();
    let mut header = RunHeader::new(RunStatus::parse(""), at(1));
    header.worker = Some(ProcessInfo::current(at(0)));
    header.extra = Some(raw("{\"version\":\"1.0.0\"}"));
    let nothing = serde_json::Value::Null;
    for mutation in [
        create(),
        Mutation::Import(Box::new(RunImport { header, nodes: [(n("n"), Arc::new(node))].into() })),
        update(RunUpdate::cancelled().metadata("a", nothing.clone()).remove_metadata("b").started_at(at(2)), 3),
        Mutation::Create { run: NewRun::pending().metadata("empty", nothing.clone()), at: at(1) },
        set(
            "n",
            NodeUpdate::failed("\u{0} \"x\"")
                .row_count(u64::MAX)
                .metadata("empty", nothing)
                .remove_metadata("gone")
                .clear_fingerprint()
                .watermark("w", ""),
            4,
        ),
        Mutation::Delete { keep_coverage: true },
        Mutation::DeleteNode { node: n("a/b \"c\"") },
        Mutation::AddInterval { node: n("n"), interval: span(0, 1) },
        Mutation::RemoveInterval { node: n("n"), interval: span(0, 1) },
        Mutation::AddPartition { node: n("n"), partition: PartitionKey::new("dt=1").unwrap() },
        Mutation::RemovePartition { node: n("n"), partition: PartitionKey::new("dt=1").unwrap() },
    ] {
        let text = serde_json::to_string(&mutation).unwrap();
        let again: Mutation = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(again, mutation, "{text}");
    }
}

/// What is built and what is read of an update are under the same rules.
#[test]
fn an_update_that_is_read_is_checked_as_one_that_is_built() {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned>(update: &T) -> T {
        serde_json::from_str(&serde_json::to_string(update).unwrap()).unwrap()
    }
    // What was refused when it was built is refused by whoever reads it.
    let bad = again(&NodeUpdate::pending().depends_on(["a", "", "b"]));
    let refused = |update: NodeUpdate| {
        let mut state = Some(after(&[create()]));
        matches!(apply(&mut state, &id(), &set("n", update, 10), Version(2)), Err(Refusal::Input(_)))
    };
    assert!(refused(bad));
    assert!(refused(serde_json::from_str("{\"depends_on\":[\"n\"]}").unwrap()));
    assert!(refused(serde_json::from_str("{\"max_attempts\":{\"set\":0}}").unwrap()));
    // A node that is named twice counts once.
    let twice: NodeUpdate = serde_json::from_str("{\"depends_on\":[\"a\",\"b\",\"a\"]}").unwrap();
    assert_eq!(twice, NodeUpdate::new().depends_on(["a", "b"]));
    // Stamps are cut.
    let fine = "2024-01-01T00:00:05.123456789Z";
    let cut = time::parse("2024-01-01T00:00:05.123456").unwrap();
    let both = format!("{{\"started_at\":{{\"set\":\"{fine}\"}},\"finished_at\":{{\"set\":\"{fine}\"}}}}");
    let node: NodeUpdate = serde_json::from_str(&both).unwrap();
    assert_eq!(node, NodeUpdate::new().started_at(cut).finished_at(cut));
    let run: RunUpdate = serde_json::from_str(&both).unwrap();
    assert_eq!(run, RunUpdate::new().started_at(cut).finished_at(cut));
    let new: NewRun = serde_json::from_str(&format!("{{\"status\":\"running\",\"started_at\":\"{fine}\"}}")).unwrap();
    assert_eq!(new, NewRun::running().started_at(cut));
    assert_eq!(again(&new), new);
    // A fingerprint is a text or an object.
    for text in ["5", "null", "[]", "true"] {
        assert!(serde_json::from_str::<Fingerprint>(text).is_err(), "{text}");
        assert!(serde_json::from_str::<NodeUpdate>(&format!("{{\"fingerprint\":{{\"set\":{text}}}}}")).is_err(), "{text}");
    }
    let print = Fingerprint::text("a");
    assert_eq!(again(&print), print);
}

#[test]
fn a_mutation_weighs_what_its_texts_do() {
    let long = "x".repeat(10_000);
    let (node, run) = (NodeStatus::parse(&long), RunStatus::parse(&long));
    let mut state = NodeState::new(node.clone());
    state.attempts = [seeknal_state::model::Attempt::new(1, node.clone())].into_iter().collect();
    let import = RunImport { header: RunHeader::new(run.clone(), at(0)), nodes: [(n("n"), Arc::new(state))].into() };
    for (mutation, texts) in [
        (set("n", NodeUpdate::status(node), 1), 1),
        (update(RunUpdate::status(run.clone()), 1), 1),
        (Mutation::Create { run: NewRun::status(run), at: at(0) }, 1),
        (Mutation::Import(Box::new(import)), 3),
    ] {
        let weight = mutation.weight();
        assert!((texts * 10_000..texts * 10_000 + 2_000).contains(&weight), "{weight} of {texts} texts");
    }
}

#[test]
fn a_note_may_be_null() {
    let node = node_after(vec![NodeUpdate::new().metadata("k", serde_json::Value::Null)]);
    assert_eq!(node.metadata.get("k").map(RawJson::as_str), Some("null"), "null is a value, and no removal");
}

#[test]
fn doubled_keys_of_foreign_notes_leave_the_last_value() {
    let notes = Metadata::from_raw(&RawJson::parse("{\"a\":1,\"b\":2,\"a\":3}").unwrap()).unwrap();
    assert_eq!(notes.to_raw().as_str(), "{\"a\":3,\"b\":2}");
    assert_eq!(Metadata::from_raw(&RawJson::parse("[]").unwrap()), None);
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    let node = (0..4_u8).prop_map(|index| n(&format!("n{index}")));
    let stretch = (0..40_i64, 1..9_i64).prop_map(|(start, len)| span(start, start + len));
    let partition = (0..3_u8).prop_map(|index| PartitionKey::new(format!("p{index}")).unwrap());
    let status = prop::sample::select(vec!["pending", "running", "success", "failed", "skipped", "cached", "odd"]);
    let change = (prop::option::of(status), prop::option::of(any::<u64>()), prop::option::of("[a-c]"), any::<bool>()).prop_map(
        |(status, rows, key, clear)| {
            let mut update = status.map_or_else(NodeUpdate::new, |status| NodeUpdate::status(NodeStatus::parse(status)));
            if let Some(rows) = rows {
                update = update.row_count(rows);
            }
            if let Some(key) = key {
                update = if clear { update.remove_metadata(key) } else { update.metadata(key, 1) };
            }
            if clear { update.clear_error() } else { update }
        },
    );
    let run_status = prop::sample::select(vec!["pending", "running", "success", "failed", "cancelled", "odd"]);
    prop_oneof![
        1 => (0..99_i64).prop_map(|seconds| Mutation::Create { run: NewRun::running(), at: at(seconds) }),
        8 => (node.clone(), change, 0..99_i64).prop_map(|(node, update, seconds)| Mutation::SetNode { node, update: Box::new(update), at: at(seconds) }),
        2 => (run_status, 0..99_i64).prop_map(|(status, seconds)| update(RunUpdate::status(RunStatus::parse(status)), seconds)),
        2 => (node.clone(), stretch.clone()).prop_map(|(node, interval)| Mutation::AddInterval { node, interval }),
        2 => (node.clone(), stretch).prop_map(|(node, interval)| Mutation::RemoveInterval { node, interval }),
        1 => (node.clone(), partition.clone()).prop_map(|(node, partition)| Mutation::AddPartition { node, partition }),
        1 => (node.clone(), partition).prop_map(|(node, partition)| Mutation::RemovePartition { node, partition }),
        1 => node.prop_map(|node| Mutation::DeleteNode { node }),
        1 => Just(Mutation::Delete { keep_coverage: false }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The same mutations give the same state: also when they went through JSON, as a journal's do; and also one by one or as one entry.
    #[test]
    fn replaying_gives_an_equal_state(mutations in prop::collection::vec(any_mutation(), 0..40)) {
        let (mut first, mut replayed) = (None, None);
        for (index, mutation) in std::iter::once(&create()).chain(&mutations).enumerate() {
            let version = Version(u64::try_from(index).unwrap() + 1);
            let text = serde_json::to_string(mutation).unwrap();
            let read: Mutation = serde_json::from_str(&text).unwrap();
            let before = first.clone();
            let outcome = apply(&mut first, &id(), mutation, version);
            prop_assert_eq!(&apply(&mut replayed, &id(), &read, version), &outcome);
            prop_assert_eq!(&first, &replayed);
            if outcome.is_err() {
                prop_assert_eq!(&first, &before, "a refusal changes nothing");
            }
            if let Some(run) = &first {
                for node in (0..4_u8).map(|index| format!("n{index}")) {
                    let shared = run.node_shared(&node);
                    prop_assert_eq!(shared.as_deref(), run.node(&node), "both ways to {} lead to one place", node);
                }
            }
        }
    }

    /// Exactly the rows that an entry names carry its version; every other row is the same one as before.
    #[test]
    fn an_entry_touches_what_it_names(history in prop::collection::vec(any_mutation(), 0..20), entry in prop::collection::vec(any_mutation(), 0..9)) {
        let mut state = Some(after(&[create()]));
        for mutation in &history {
            let _refused = apply(&mut state, &id(), mutation, Version(2));
        }
        let before = state.clone();
        let mut one_by_one = state.clone();
        let steps: Result<(), Refusal> = entry.iter().try_for_each(|mutation| apply(&mut one_by_one, &id(), mutation, Version(3)));
        if let Err(refusal) = apply_all(&mut state, &id(), &entry, Version(3)) {
            prop_assert_eq!(state, before);
            let deletes = |mutation: &Mutation| matches!(mutation, Mutation::Delete { .. });
            prop_assert!(entry.iter().any(deletes) || steps == Err(refusal));
            return Ok(());
        }
        prop_assert!(steps.is_ok());
        prop_assert!(entry.is_empty() || state == one_by_one, "{:?} and {:?}", state, one_by_one);
        let (Some(before), Some(run)) = (before, state) else { return Ok(()) };
        prop_assert_eq!(run.version(), Version(3));
        let header = entry.iter().any(Mutation::touches_header);
        prop_assert_eq!(run.header().version == Version(3), header);
        if !header {
            prop_assert_eq!(run.header(), before.header());
        }
        for (node_id, node) in run.nodes() {
            let touched = entry.iter().any(|mutation| mutation.node() == Some(node_id));
            prop_assert_eq!(node.version == Version(3), touched, "{:?}", node_id);
            if !touched {
                prop_assert_eq!(Some(node), before.node(node_id.as_str()));
            }
        }
    }

    /// An end has a stamp, and a duration where both stamps are there and in order; a running node has neither.
    #[test]
    fn stamps_follow_the_status(mutations in prop::collection::vec(any_mutation(), 0..40)) {
        let mut state = Some(after(&[create()]));
        for mutation in &mutations {
            let _refused = apply(&mut state, &id(), mutation, Version(2));
            for (_, node) in state.iter().flat_map(RunState::nodes) {
                if node.status.is_ended() {
                    prop_assert!(node.finished_at.is_some());
                }
                if node.status == NodeStatus::Running {
                    prop_assert!(node.started_at.is_some() && node.finished_at.is_none() && node.duration_ms.is_none() && node.error.is_none());
                }
                prop_assert!(node.attempt >= 1);
            }
        }
    }
}
