//! The ledger: indexes, pages, the two ways a part is applied, what outlives deletions, and the order inside a batch.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "helpers of tests are tests")]

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use seeknal_state::model::{
    BatchAnswer, CommitSeq, Entry, Fence, FenceCheck, FencingToken, Guard, Interval, LastSuccess, LeaseKey, Ledger, LoggedPart,
    Mutation, NewRun, NoFences, NodeCoverage, NodeId, NodeStatus, NodeUpdate, Outcome, PartitionKey, Receipt, Refusal, Retained,
    RunFilter, RunId, RunPart, RunQuery, RunState, RunStatus, RunUpdate, Version, apply_all, time,
};

fn at(seconds: i64) -> DateTime<Utc> {
    time::from_micros(1_704_067_200_000_000 + seconds * 1_000_000).unwrap()
}

fn span(start: i64, end: i64) -> Interval {
    Interval::new(at(start), at(end)).unwrap()
}

fn r(text: &str) -> RunId {
    RunId::new(text).unwrap()
}

fn n(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn create(seconds: i64) -> Mutation {
    Mutation::Create { run: NewRun::running(), at: at(seconds) }
}

fn set(node: &str, update: NodeUpdate) -> Mutation {
    Mutation::SetNode { node: n(node), update: Box::new(update), at: at(60) }
}

fn add(node: &str, start: i64, end: i64) -> Mutation {
    Mutation::AddInterval { node: n(node), interval: span(start, end) }
}

/// An entry on a state, as its actor makes it; what the model refuses is sent with the state unchanged.
fn on(state: Option<&RunState>, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Entry {
    let version = state.map_or(Version::NONE, RunState::version);
    let mut after = state.cloned();
    let _refused = apply_all(&mut after, &r(run), &mutations, version.next());
    Entry { parts: vec![RunPart { run: r(run), base: version, expect: version, guards, mutations, after }], ..Entry::default() }
}

fn send(ledger: &mut Ledger, entry: Entry) -> Outcome {
    ledger.commit(&[entry], &NoFences).outcomes.remove(0)
}

/// Commits mutations on the present state.
fn write(ledger: &mut Ledger, run: &str, mutations: Vec<Mutation>) -> Receipt {
    let entry = on(ledger.run(run), run, Vec::new(), mutations);
    match send(ledger, entry) {
        Outcome::Applied(receipt) => receipt,
        Outcome::Refused(refusal) => panic!("{refusal}"),
    }
}

fn latest(ledger: &Ledger, node: &str) -> Vec<String> {
    ledger.runs_of_node(node).map(|run| run.id().to_string()).collect()
}

/// Of a log of an earlier version, for which taking something out made a node: what it deleted then is not there to be deleted now.
#[test]
fn a_log_in_which_taking_out_made_a_node_is_replayed() {
    let out = |node: &str| Mutation::RemoveInterval { node: n(node), interval: span(0, 1) };
    let gone = |node: &str| Mutation::DeleteNode { node: n(node) };
    let steps = [
        vec![create(0)],
        vec![out("a")],
        vec![gone("a")],
        vec![out("b"), gone("b"), add("c", 0, 2)],
        vec![out("d")],
        vec![set("d", NodeUpdate::success())],
    ];
    let mut ledger = Ledger::new();
    for (before, mutations) in (0_u64..).zip(steps) {
        let part = LoggedPart { run: r("run"), before: Version(before), after: Version(before + 1), mutations };
        ledger.replay(CommitSeq(before + 1), &[part], &[]).unwrap();
    }
    let run = ledger.run("run").unwrap();
    assert_eq!(run.nodes().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["c", "d"]);
    assert_eq!(run.version(), Version(6));
}

#[test]
fn the_runs_of_a_node_follow_every_change() {
    let mut ledger = Ledger::new();
    write(&mut ledger, "b", vec![create(20), set("n", NodeUpdate::running())]);
    write(&mut ledger, "a", vec![create(10), set("n", NodeUpdate::running()), set("only", NodeUpdate::running())]);
    write(&mut ledger, "c", vec![create(30)]);
    assert_eq!(latest(&ledger, "n"), ["b", "a"]);
    write(&mut ledger, "c", vec![add("n", 0, 1)]);
    assert_eq!(latest(&ledger, "n"), ["c", "b", "a"]);
    write(&mut ledger, "b", vec![Mutation::DeleteNode { node: n("n") }]);
    assert_eq!(latest(&ledger, "n"), ["c", "a"]);
    // Deleted and made again in one entry, and the other way round.
    write(&mut ledger, "c", vec![Mutation::DeleteNode { node: n("n") }, add("n", 0, 1)]);
    assert_eq!(latest(&ledger, "n"), ["c", "a"]);
    write(&mut ledger, "b", vec![add("n", 0, 1), Mutation::DeleteNode { node: n("n") }]);
    assert_eq!(latest(&ledger, "n"), ["c", "a"]);
    write(&mut ledger, "c", vec![Mutation::Delete { keep_coverage: false }]);
    assert_eq!(latest(&ledger, "n"), ["a"]);
    write(&mut ledger, "a", vec![Mutation::Delete { keep_coverage: true }]);
    assert!(latest(&ledger, "n").is_empty() && latest(&ledger, "only").is_empty());
    assert_eq!(ledger.node_ids().count(), 0);
    assert_eq!(ledger.run_count(), 1);
}

#[test]
fn restored_runs_replace_their_indexes_and_keep_their_numbers() {
    let mut source = Ledger::new();
    for seconds in 0..6 {
        write(&mut source, "filler", if seconds == 0 { vec![create(0)] } else { vec![set("x", NodeUpdate::running())] });
    }
    write(&mut source, "run", vec![create(10), set("a", NodeUpdate::running())]);
    let first = source.run("run").unwrap().clone();
    write(&mut source, "run", vec![set("b", NodeUpdate::running()), Mutation::DeleteNode { node: n("a") }]);
    let second = source.run("run").unwrap().clone();

    let mut ledger = Ledger::new();
    ledger.restore_run(first);
    ledger.restore_run(second.clone());
    assert_eq!((ledger.run("run"), ledger.run_count(), ledger.runs().count()), (Some(&second), 1, 1));
    assert_eq!((latest(&ledger, "a").len(), latest(&ledger, "b").len()), (0, 1));
    // A document may say less of the sequence than its runs have used.
    write(&mut ledger, "run", vec![Mutation::Delete { keep_coverage: false }]);
    write(&mut ledger, "run", vec![create(20)]);
    assert!(ledger.run("run").unwrap().version() > second.version(), "a version is used twice");
}

#[test]
fn the_sequence_never_goes_back() {
    let mut ledger = Ledger::new();
    ledger.raise_seq(CommitSeq(100));
    ledger.raise_seq(CommitSeq(7));
    let receipt = write(&mut ledger, "run", vec![create(0)]);
    assert_eq!(receipt.seq, CommitSeq(101));
    assert_eq!(ledger.run("run").unwrap().version(), Version(101));
}

#[test]
fn a_clone_is_a_copy() {
    let mut ledger = Ledger::new();
    write(&mut ledger, "run", vec![create(0), set("n", NodeUpdate::running())]);
    let before = ledger.clone();
    write(&mut ledger, "run", vec![set("n", NodeUpdate::success())]);
    write(&mut ledger, "other", vec![create(1), set("n", NodeUpdate::running())]);
    assert_eq!((before.run_count(), latest(&before, "n").len()), (1, 1));
    assert_eq!(before.run("run").unwrap().node("n").unwrap().status, NodeStatus::Running);
}

#[test]
fn a_batch_is_decided_in_order() {
    let mut ledger = Ledger::new();
    write(&mut ledger, "run", vec![create(0)]);
    let base = ledger.run("run").unwrap().clone();
    // Two entries on one state: the second one stands on what the first one left, or says that it does not.
    let claim = || on(Some(&base), "run", vec![Guard::NodeAbsent { node: n("n") }], vec![set("n", NodeUpdate::running())]);
    let answer = ledger.commit(&[claim(), claim()], &NoFences);
    assert!(matches!(answer.outcomes[0], Outcome::Applied(_)));
    assert!(matches!(answer.outcomes[1], Outcome::Refused(Refusal::Guard { .. })), "{:?}", answer.outcomes[1]);
    // Sequences grow inside a batch; a refused entry takes none.
    let entries: Vec<Entry> = ["a", "run", "b"].map(|run| on(None, run, Vec::new(), vec![create(1)])).into();
    let answer = ledger.commit(&entries, &NoFences);
    let seqs: Vec<Option<u64>> = answer
        .outcomes
        .iter()
        .map(|outcome| if let Outcome::Applied(receipt) = outcome { Some(receipt.seq.0) } else { None })
        .collect();
    assert_eq!(seqs, [Some(3), None, Some(4)]);
    assert_eq!(ledger.seq(), CommitSeq(4));
}

/// A run that is made and written in one batch: the entries behind the creation cannot know its version.
#[test]
fn a_chain_may_begin_with_the_creation() {
    let mut ledger = Ledger::new();
    write(&mut ledger, "before", vec![create(0)]);
    let chain = |mutations: Vec<Mutation>, base: Version, expect: u64| {
        let part = RunPart { run: r("run"), base, expect: Version(expect), guards: Vec::new(), mutations, after: None };
        Entry { parts: vec![part], ..Entry::default() }
    };
    let mut base = Version::NONE;
    for round in 0..2 {
        let mut entries = vec![
            chain(vec![create(round)], base, 0),
            chain(vec![set("n", NodeUpdate::running())], base, 1),
            chain(vec![set("n", NodeUpdate::success())], base, 2),
        ];
        if round > 0 {
            entries.insert(0, chain(vec![Mutation::Delete { keep_coverage: false }], base, base.0));
        }
        let answer = ledger.commit(&entries, &NoFences);
        assert!(answer.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_))), "{answer:?}");
        let run = ledger.run("run").unwrap();
        assert_eq!(run.node("n").unwrap().status, NodeStatus::Success);
        assert_eq!(run.node("n").unwrap().version, run.version());
        base = run.version();
    }
    // In another batch the same entry belongs to a run that is gone.
    let late = chain(vec![set("n", NodeUpdate::running())], Version::NONE, 1);
    assert_eq!(send(&mut ledger, late), Outcome::Refused(Refusal::RunNotFound { run: r("run") }));
}

#[test]
fn answers_survive_json() {
    let run = r("run \"x\"");
    let fence = Fence { key: LeaseKey::node(run.clone(), n("n")), token: FencingToken(7) };
    let input = Interval::parse("b", "a").unwrap_err();
    let refusals = [
        Refusal::RunNotFound { run: run.clone() },
        Refusal::NodeNotFound { run: run.clone(), node: n("n") },
        Refusal::RunExists { run: run.clone() },
        Refusal::Guard {
            run: run.clone(),
            guard: Guard::NodeVersion { node: n("n"), version: Version(u64::MAX) },
            found: "it is not".to_owned(),
        },
        Refusal::Guard { run: run.clone(), guard: Guard::Unlocked, found: String::new() },
        Refusal::Fenced { fence },
        Refusal::LeaseGone { key: LeaseKey::run(run.clone()), token: FencingToken(0) },
        Refusal::Stale { run: run.clone() },
        Refusal::Chained { run },
        Refusal::Input(input),
    ];
    let mut ledger = Ledger::new();
    let mut outcomes = ledger.commit(&[on(None, "run", Vec::new(), vec![create(0)])], &NoFences).outcomes;
    outcomes.extend(refusals.into_iter().map(Outcome::Refused));
    let answer = BatchAnswer { outcomes };
    let text = serde_json::to_string(&answer).unwrap();
    assert_eq!(serde_json::from_str::<BatchAnswer>(&text).unwrap(), answer, "{text}");
}

struct OneLease(Fence);

impl FenceCheck for OneLease {
    fn holds(&self, fence: &Fence) -> bool {
        *fence == self.0
    }

    fn holder(&self, run: &RunId) -> Option<String> {
        (*run == self.0.key.run).then(|| "somebody".to_owned())
    }
}

#[test]
fn fences_are_asked_of_who_knows_them() {
    let mut ledger = Ledger::new();
    write(&mut ledger, "run", vec![create(0)]);
    let fence = |token| Fence { key: LeaseKey::run(r("run")), token: FencingToken(token) };
    let leases = OneLease(fence(5));
    let entry = |ledger: &Ledger, guards: Vec<Guard>, token| {
        let mut entry = on(ledger.run("run"), "run", guards, vec![set("n", NodeUpdate::running())]);
        entry.fences.push(fence(token));
        entry
    };
    let held = entry(&ledger, Vec::new(), 5);
    assert!(matches!(ledger.commit(&[held], &leases).outcomes[0], Outcome::Applied(_)));
    let lost = entry(&ledger, Vec::new(), 4);
    assert_eq!(ledger.commit(&[lost], &leases).outcomes[0], Outcome::Refused(Refusal::Fenced { fence: fence(4) }));
    let locked = entry(&ledger, vec![Guard::Unlocked], 5);
    assert!(
        matches!(&ledger.commit(&[locked], &leases).outcomes[0], Outcome::Refused(Refusal::Guard { found, .. }) if found.contains("somebody"))
    );
}

#[test]
fn coverage_kept_never_shrinks() {
    let mut ledger = Ledger::new();
    for (index, keep) in [true, true, false].into_iter().enumerate() {
        let start = i64::try_from(index).unwrap() * 100;
        write(&mut ledger, "run", vec![create(start), set("n", NodeUpdate::success()), add("n", start, start + 10)]);
        let before = ledger.coverage("n");
        write(&mut ledger, "run", vec![Mutation::Delete { keep_coverage: keep }]);
        let after = ledger.coverage("n");
        assert_eq!(after == before, keep, "round {index}");
    }
    assert_eq!(ledger.coverage("n").intervals.iter().collect::<Vec<_>>(), [span(0, 10), span(100, 110)]);
    assert_eq!(ledger.last_success("n").unwrap().run_created_at, at(100));
    let mut carried = Retained::default();
    carried.coverage.intervals.insert(span(110, 120));
    ledger.restore_retained(&n("n"), &carried);
    assert_eq!(ledger.retained_coverage("n").intervals.iter().collect::<Vec<_>>(), [span(0, 10), span(100, 120)]);
    assert!(ledger.last_success("n").is_some(), "what says nothing of a success takes none away");
}

#[test]
fn a_deletion_keeps_what_its_own_entry_did() {
    let mut ledger = Ledger::new();
    let goes = || Mutation::Delete { keep_coverage: true };
    write(&mut ledger, "run", vec![create(0), add("n", 50, 60), set("gone", NodeUpdate::success())]);
    let did = vec![
        set("n", NodeUpdate::success()),
        add("n", 0, 10),
        Mutation::RemoveInterval { node: n("n"), interval: span(50, 60) },
        Mutation::DeleteNode { node: n("gone") },
        goes(),
    ];
    write(&mut ledger, "run", did);
    write(&mut ledger, "at once", vec![create(10), set("m", NodeUpdate::success()), add("n", 10, 20), goes()]);
    assert_eq!(ledger.run_count(), 0);
    assert_eq!(ledger.coverage("n").intervals.iter().collect::<Vec<_>>(), [span(0, 20)]);
    assert_eq!(ledger.last_success("n").unwrap().run_id.as_str(), "run");
    assert_eq!(ledger.last_success("m").unwrap().run_id.as_str(), "at once");
    assert!(ledger.last_success("gone").is_none());
}

/// A step of a random history: on which run, standing on how old a state, and what.
#[derive(Debug, Clone)]
struct Step {
    run: u8,
    back: usize,
    mutations: Vec<Mutation>,
    guard: Option<Guard>,
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    let node = (0..4_u8).prop_map(|index| n(&format!("n{index}")));
    let stretch = (0..40_i64, 1..9_i64).prop_map(|(start, len)| span(start, start + len));
    let status =
        prop::sample::select(vec![NodeStatus::Running, NodeStatus::Success, NodeStatus::Failed, NodeStatus::parse("odd")]);
    let run_status = prop::sample::select(vec![RunStatus::Running, RunStatus::Success]);
    prop_oneof![
        3 => (0..9_i64).prop_map(create),
        6 => (node.clone(), status, any::<u64>()).prop_map(|(node, status, rows)| {
            Mutation::SetNode { node, update: Box::new(NodeUpdate::status(status).row_count(rows)), at: at(60) }
        }),
        3 => (node.clone(), stretch.clone()).prop_map(|(node, interval)| Mutation::AddInterval { node, interval }),
        1 => (node.clone(), stretch).prop_map(|(node, interval)| Mutation::RemoveInterval { node, interval }),
        1 => (node.clone(), 0..3_u8).prop_map(|(node, key)| Mutation::AddPartition { node, partition: PartitionKey::new(format!("p{key}")).unwrap() }),
        1 => node.prop_map(|node| Mutation::DeleteNode { node }),
        1 => run_status.prop_map(|status| Mutation::Update { update: RunUpdate::status(status), at: at(70) }),
        1 => any::<bool>().prop_map(|keep_coverage| Mutation::Delete { keep_coverage }),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let guard = prop_oneof![
        4 => Just(None),
        1 => Just(Some(Guard::RunStatus(vec![RunStatus::Running]))),
        1 => (0..4_u8).prop_map(|index| Some(Guard::NodeAbsent { node: n(&format!("n{index}")) })),
    ];
    let back = prop_oneof![4 => Just(0_usize), 1 => 1..3_usize];
    (0..3_u8, back, prop::collection::vec(any_mutation(), 0..4), guard).prop_map(|(run, back, mutations, guard)| Step {
        run,
        back,
        mutations,
        guard,
    })
}

/// What the indexes say, found the slow way.
fn check_indexes(ledger: &Ledger) {
    let mut runs: Vec<&RunState> = ledger.runs().collect();
    assert_eq!(runs.len(), ledger.run_count());
    runs.sort_by_key(|run| std::cmp::Reverse(run.order_key()));
    assert_eq!(ledger.runs().collect::<Vec<_>>(), runs, "runs are newest first");
    let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
    nodes.extend(runs.iter().flat_map(|run| run.nodes()).map(|(id, _)| id.clone()));
    assert_eq!(ledger.node_ids().cloned().collect::<BTreeSet<_>>(), nodes);
    let retained = ledger.retained();
    for id in nodes.iter().chain(retained.keys()) {
        let having: Vec<&RunState> = runs.iter().copied().filter(|run| run.node(id.as_str()).is_some()).collect();
        assert_eq!(ledger.runs_of_node(id.as_str()).collect::<Vec<_>>(), having);
        let mut coverage: NodeCoverage = retained.get(id).map(|kept| kept.coverage.clone()).unwrap_or_default();
        for run in &having {
            coverage.absorb(run.node(id.as_str()).unwrap());
        }
        assert_eq!(ledger.coverage(id.as_str()), coverage);
        let live = having.iter().filter_map(|run| LastSuccess::of(run, run.node(id.as_str()).unwrap()));
        let kept = retained.get(id).and_then(|kept| kept.last_success.clone());
        let newest = live.chain(kept).max_by(|a, b| (a.run_created_at, &a.run_id).cmp(&(b.run_created_at, &b.run_id)));
        assert_eq!(
            ledger.last_success(id.as_str()).map(|s| (s.run_created_at, s.run_id)),
            newest.map(|s| (s.run_created_at, s.run_id))
        );
    }
}

/// Every page of every size visits every run once, in order.
fn check_pages(ledger: &Ledger) {
    for filter in [
        RunFilter::all(),
        RunFilter::all().status(RunStatus::Success),
        RunFilter::all().created_from(at(3)).created_before(at(6)),
    ] {
        let expected: Vec<&RunId> =
            ledger.runs().filter(|run| filter.matches(run.id(), run.header())).map(RunState::id).collect();
        for limit in 1..5 {
            let mut seen = Vec::new();
            let mut query = RunQuery::new(filter.clone()).limit(limit);
            loop {
                let page = ledger.list(&query);
                assert!(page.runs.len() <= limit);
                seen.extend(page.runs.into_iter().map(|run| run.run_id));
                match page.next {
                    Some(next) => query = query.after(Some(next)),
                    None => break,
                }
            }
            assert_eq!(seen.iter().collect::<Vec<_>>(), expected, "pages of {limit}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// A part whose state the ledger takes over ends as one that it applies itself; every index is what the slow way finds; versions
    /// only grow; what is kept of deleted runs only grows; and a refusal changes nothing.
    #[test]
    fn random_histories_keep_every_rule(steps in prop::collection::vec(any_step(), 0..50)) {
        let (mut adopting, mut applying) = (Ledger::new(), Ledger::new());
        let mut past: BTreeMap<String, Vec<RunState>> = BTreeMap::new();
        let mut highest: BTreeMap<String, Version> = BTreeMap::new();
        for step in steps {
            let name = format!("run {}", step.run);
            let states = past.entry(name.clone()).or_default();
            let known = adopting.run(&name).map(|now| states.len().checked_sub(1 + step.back).and_then(|index| states.get(index)).unwrap_or(now));
            let entry = on(known, &name, step.guard.into_iter().collect(), step.mutations);
            let mut bare = entry.clone();
            bare.parts[0].after = None;
            let before: Vec<RunState> = adopting.runs().cloned().collect();
            let (kept, kept_seq) = (adopting.retained(), adopting.seq());
            let outcome = send(&mut adopting, entry);
            prop_assert_eq!(&send(&mut applying, bare), &outcome);
            prop_assert_eq!(adopting.runs().collect::<Vec<_>>(), applying.runs().collect::<Vec<_>>());
            prop_assert_eq!(adopting.retained(), applying.retained());
            match outcome {
                Outcome::Applied(receipt) => {
                    prop_assert_eq!(receipt.seq.0, kept_seq.0 + 1);
                    let run = &receipt.runs[0];
                    prop_assert!(run.after > run.before);
                    let last = highest.entry(name.clone()).or_default();
                    prop_assert!(run.after > *last, "version {} of {} is used twice", run.after, name);
                    *last = run.after;
                    if let Some(state) = adopting.run(&name) {
                        prop_assert_eq!(state.version(), run.after);
                        prop_assert!(state.nodes().all(|(_, node)| node.version >= state.created_version() && node.version <= state.version()));
                    }
                }
                Outcome::Refused(_) => {
                    prop_assert_eq!(adopting.runs().cloned().collect::<Vec<_>>(), before);
                    prop_assert_eq!(adopting.seq(), kept_seq);
                }
            }
            for (node, old) in &kept {
                let now = adopting.retained().remove(node).unwrap();
                prop_assert!(old.coverage.intervals.difference(&now.coverage.intervals).is_empty());
                prop_assert!(old.coverage.partitions.is_subset(&now.coverage.partitions));
                prop_assert!(now.last_success.is_some() || old.last_success.is_none());
            }
            if let Some(state) = adopting.run(&name) {
                past.entry(name).or_default().push(state.clone());
            }
        }
        check_indexes(&adopting);
        check_pages(&adopting);
        // A ledger that is put together from what is stored is the same one.
        let mut restored = Ledger::new();
        for run in adopting.runs() {
            restored.restore_run(run.clone());
        }
        for (node, kept) in adopting.retained() {
            restored.restore_retained(&node, &kept);
        }
        check_indexes(&restored);
        prop_assert_eq!(restored.runs().collect::<Vec<_>>(), adopting.runs().collect::<Vec<_>>());
        prop_assert_eq!(restored.retained(), adopting.retained());
    }
}
