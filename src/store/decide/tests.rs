//! The decider against the ledger, over rows that are kept as a database keeps them; leases; chains that others wrote into.

use chrono::TimeDelta;
use proptest::prelude::*;

use super::*;
use crate::model::{
    Fence, FencingToken, Interval, LeaseMutation, LeaseOwner, Ledger, NewRun, NoFences, NodeStatus, NodeUpdate, ProcessInfo,
    RunUpdate,
};
use crate::store::rewrite::{Rewrite, rewrites};

/// Rows as a database has them, and what applies writes to them.
#[derive(Default)]
struct Store {
    seq: u64,
    token: u64,
    runs: BTreeMap<RunId, (Head, RunHeader)>,
    nodes: BTreeMap<(RunId, NodeId), NodeState>,
    intervals: BTreeMap<(RunId, NodeId, DateTime<Utc>), DateTime<Utc>>,
    partitions: BTreeSet<(RunId, NodeId, PartitionKey)>,
    retained: BTreeMap<NodeId, Retained>,
    leases: BTreeMap<LeaseKey, LeaseRow>,
}

impl Store {
    fn node(&self, run: &RunId, id: &NodeId) -> Option<NodeState> {
        let mut state = self.nodes.get(&(run.clone(), id.clone()))?.clone();
        state.intervals = Arc::new(
            self.intervals
                .iter()
                .filter(|((r, n, _), _)| r == run && n == id)
                .map(|((_, _, start), end)| Interval::new(*start, *end).unwrap())
                .collect(),
        );
        state.partitions =
            Arc::new(self.partitions.iter().filter(|(r, n, _)| r == run && n == id).map(|(_, _, p)| p.clone()).collect());
        Some(state)
    }

    fn nodes_of(&self, run: &RunId) -> BTreeMap<NodeId, NodeState> {
        let ids = self.nodes.keys().filter(|(r, _)| r == run).map(|(_, id)| id.clone());
        ids.map(|id| (id.clone(), self.node(run, &id).unwrap())).collect()
    }

    fn run(&self, run: &RunId) -> Option<RunState> {
        let (head, header) = self.runs.get(run)?.clone();
        Some(RunState::from_parts(run.clone(), header, head.version, head.created_version, self.nodes_of(run)))
    }

    /// Reads no more than what is wanted.
    fn read(&self, batch: &Batch, own: &OwnRuns, drawn: bool) -> Rows {
        let wanted = Wanted::of(batch);
        let heads: BTreeMap<RunId, Option<Head>> =
            wanted.runs.iter().map(|run| (run.clone(), self.runs.get(run).map(|(head, _)| head.clone()))).collect();
        let own: BTreeMap<RunId, OwnVersions> = own.of(&wanted.runs).into_iter().collect();
        let more = NodesWanted::of(batch, &heads, &own);
        let mut rows = Rows {
            heads,
            headers: BTreeMap::new(),
            nodes: BTreeMap::new(),
            whole: BTreeSet::new(),
            leases: self
                .leases
                .values()
                .filter(|row| {
                    let LeasesWanted { keys, runs, tokens } = &wanted.leases;
                    keys.contains(&row.record.key) || runs.contains(&row.record.key.run) || tokens.contains(&row.record.token)
                })
                .cloned()
                .collect(),
            own,
            seqs: Numbers::After(self.seq),
            tokens: Numbers::After(self.token),
            moving: None,
        };
        if drawn {
            let from = |last: u64, count: usize| (last + 1..).take(count).collect();
            rows.seqs = Numbers::Drawn(from(self.seq, wanted.seqs));
            rows.tokens = Numbers::Drawn(from(self.token, wanted.tokens));
        }
        for (run, of_run) in more.0 {
            if of_run.header {
                rows.headers.insert(run.clone(), self.runs[&run].1.clone());
            }
            let nodes = rows.nodes.entry(run.clone()).or_default();
            nodes.extend(of_run.nodes.iter().map(|id| (id.clone(), self.node(&run, id).map(Arc::new))));
            if of_run.all {
                nodes.extend(self.nodes_of(&run).into_iter().map(|(id, state)| (id, Some(Arc::new(state)))));
                rows.whole.insert(run);
            }
        }
        rows
    }

    fn clear(&mut self, run: &RunId) {
        self.nodes.retain(|(r, _), _| r != run);
        self.intervals.retain(|(r, _, _), _| r != run);
        self.partitions.retain(|(r, _, _)| r != run);
    }

    fn write(&mut self, writes: Writes) {
        for (run, write) in writes.runs {
            assert_eq!(write.existed, self.runs.contains_key(&run));
            if write.deleted.is_some() {
                self.clear(&run);
            }
            let Some(head) = write.head else {
                self.runs.remove(&run);
                continue;
            };
            let header = write.header.unwrap_or_else(|| self.runs[&run].1.clone());
            self.runs.insert(run.clone(), (head, header));
            for (id, node) in write.nodes {
                let key = (run.clone(), id.clone());
                if node.whole {
                    self.intervals.retain(|(r, n, _), _| (r, n) != (&run, &id));
                    self.partitions.retain(|(r, n, _)| (r, n) != (&run, &id));
                }
                let Some(state) = node.state else {
                    self.nodes.remove(&key);
                    continue;
                };
                if node.whole {
                    self.intervals.extend(state.intervals.iter().map(|i| ((run.clone(), id.clone(), i.start()), i.end())));
                    self.partitions.extend(state.partitions.iter().map(|p| (run.clone(), id.clone(), p.clone())));
                } else {
                    for Rewrite { from, to, islands } in rewrites(&state.intervals, &node.intervals) {
                        self.intervals.retain(|(r, n, start), _| (r, n) != (&run, &id) || *start < from || *start > to);
                        self.intervals.extend(islands.iter().map(|i| ((run.clone(), id.clone(), i.start()), i.end())));
                    }
                    for partition in node.partitions {
                        let row = (run.clone(), id.clone(), partition);
                        if state.partitions.contains(&row.2) {
                            self.partitions.insert(row);
                        } else {
                            self.partitions.remove(&row);
                        }
                    }
                }
                self.nodes.insert(key, NodeState { intervals: Arc::default(), partitions: Arc::default(), ..(*state).clone() });
            }
        }
        for (id, more) in &writes.retained {
            join(&mut self.retained, id, more);
        }
        let leases = writes.leases;
        self.leases.retain(|key, _| !leases.freed.contains(&key.run));
        self.leases.retain(|key, row| leases.removed.get(key) != Some(&row.record.token));
        for (key, renewed) in leases.renewed {
            let row = self.leases.get_mut(&key).unwrap();
            assert_eq!(row.record.token, renewed.token);
            (row.record.until, row.record.ttl_ms, row.valid) = (renewed.until, renewed.ttl_ms, renewed.ttl_ms > 0);
        }
        for (key, record) in leases.granted {
            let valid = record.ttl_ms > 0;
            self.leases.insert(key, LeaseRow { record, valid });
        }
    }

    fn commit(&mut self, batch: &Batch, own: &OwnRuns, drawn: bool) -> BatchAnswer {
        let Decision { answer, writes, assumed, .. } = decide(batch, self.read(batch, own, drawn)).unwrap();
        for (run, version) in assumed {
            assert_eq!(version, self.runs.get(&run).map(|(head, _)| head.version));
        }
        for outcome in &answer.outcomes {
            if let Outcome::Applied(receipt) = outcome {
                self.seq = self.seq.max(receipt.seq.0);
                self.token = receipt.grants.iter().map(|grant| grant.token.0).fold(self.token, u64::max);
            }
        }
        if !drawn {
            assert_eq!((writes.seqs.last(), writes.tokens.last()), (Some(self.seq), Some(self.token)));
        }
        self.write(writes);
        own.note(&answer);
        answer
    }
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + second, 0).unwrap()
}

fn run_id(text: &str) -> RunId {
    RunId::new(text).unwrap()
}

fn node_id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn set(node: &str, update: NodeUpdate) -> Mutation {
    Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(100) }
}

/// A part as a run's actor builds it: `tip` is what it knows, with everything on its way.
fn part_on(tip: Option<&RunState>, base: Version, run: &RunId, guards: Vec<Guard>, mutations: Vec<Mutation>) -> RunPart {
    let expect = tip.map_or(Version::NONE, RunState::version);
    let mut after = tip.cloned();
    if apply_all(&mut after, run, &mutations, expect.next()).is_err() {
        after = None;
    }
    RunPart { run: run.clone(), base, expect, guards, mutations, after }
}

fn entry(part: RunPart) -> Entry {
    Entry { parts: vec![part], ..Entry::default() }
}

#[derive(Debug, Clone)]
struct Step {
    run: u8,
    second: Option<u8>,
    guard: Option<u8>,
    what: Vec<(u8, u8, u8)>,
    send_after: bool,
}

/// Batches, each of one of several processes, which know of a run what they saw when they wrote to it last.
fn batches(processes: usize) -> impl Strategy<Value = Vec<(usize, bool, Vec<Step>)>> {
    let step = (
        0..3_u8,
        prop::option::weighted(0.15, 0..3_u8),
        prop::option::weighted(0.3, 0..8_u8),
        prop::collection::vec((0..12_u8, 0..4_u8, any::<u8>()), 1..4),
        prop::bool::weighted(0.9),
    );
    let step = step.prop_map(|(run, second, guard, what, send_after)| Step { run, second, guard, what, send_after });
    prop::collection::vec((0..processes, any::<bool>(), prop::collection::vec(step, 1..6)), 1..16)
}

fn mutation((kind, node, value): (u8, u8, u8), exists: bool, alone: bool) -> Mutation {
    let id = node_id(["a", "b", "n/ö", "z"][usize::from(node)]);
    let hour = |hour: u8| at(i64::from(hour) * 3600);
    let interval = Interval::new(hour(value % 24), hour(value % 24 + 1 + value / 64)).unwrap();
    let partition = PartitionKey::new(format!("p={}", value % 5)).unwrap();
    let stamp = at(i64::from(value));
    match kind {
        _ if !exists => Mutation::Create {
            run: NewRun::status([RunStatus::Running, RunStatus::Pending][usize::from(value % 2)].clone()),
            at: stamp,
        },
        0 => Mutation::Update {
            update: [RunUpdate::running(), RunUpdate::success()][usize::from(value % 2)].clone().metadata("k", value),
            at: stamp,
        },
        1 if value < 80 => Mutation::Delete { keep_coverage: value < 50 },
        // The ledger does not see that a node was deleted since: one process writes to it.
        2 if alone => Mutation::DeleteNode { node: id },
        3 | 4 => Mutation::AddInterval { node: id, interval },
        5 | 6 => Mutation::RemoveInterval { node: id, interval },
        7 => Mutation::AddPartition { node: id, partition },
        8 => Mutation::RemovePartition { node: id, partition },
        _ => {
            let status = [NodeStatus::Running, NodeStatus::Success, NodeStatus::Failed, NodeStatus::parse("odd")]
                [usize::from(value % 4)]
            .clone();
            set(id.as_str(), NodeUpdate::status(status).row_count(value.into()))
        }
    }
}

fn guard(kind: u8, tip: Version) -> Guard {
    let node = node_id(["a", "b"][usize::from(kind % 2)]);
    match kind / 2 {
        0 => Guard::NodeAbsent { node },
        1 => Guard::NodeStatus { node, one_of: vec![NodeStatus::Success, NodeStatus::Failed] },
        2 => Guard::RunStatus(vec![RunStatus::Running]),
        _ => Guard::RunVersion(tip),
    }
}

type Known = BTreeMap<RunId, Option<RunState>>;

fn entries_of(steps: &[Step], known: &Known, alone: bool) -> Vec<Entry> {
    let mut tips = known.clone();
    let mut entries = Vec::new();
    for step in steps {
        let names: BTreeSet<RunId> =
            [Some(step.run), step.second].into_iter().flatten().map(|run| run_id(&format!("run{run}"))).collect();
        let mut waits = false;
        let parts = names
            .iter()
            .map(|name| {
                let base = known.get(name).and_then(Option::as_ref).map_or(Version::NONE, RunState::version);
                let tip = tips.entry(name.clone()).or_default();
                let mut exists = tip.is_some();
                let mutations: Vec<Mutation> = step
                    .what
                    .iter()
                    .map(|what| {
                        let made = mutation(*what, exists, alone);
                        exists = !matches!(made, Mutation::Delete { .. });
                        waits |= !exists || made.creates_run();
                        made
                    })
                    .collect();
                let expect = tip.as_ref().map_or(Version::NONE, RunState::version);
                let guards = step.guard.map(|kind| guard(kind, expect)).into_iter().collect();
                let mut part = part_on(tip.as_ref(), base, name, guards, mutations);
                *tip = part.after.clone().or_else(|| tip.clone());
                if !step.send_after {
                    part.after = None;
                }
                part
            })
            .collect();
        entries.push(Entry { parts, ..Entry::default() });
        if waits {
            // What the version of a new run will be, its actor does not know: it waits for the answer.
            break;
        }
    }
    entries
}

fn agrees_with_the_ledger(batches: Vec<(usize, bool, Vec<Step>)>, processes: usize) -> Result<(), TestCaseError> {
    let mut store = Store::default();
    let mut ledger = Ledger::new();
    let own: Vec<OwnRuns> = (0..processes).map(|_| OwnRuns::default()).collect();
    let mut known: Vec<Known> = vec![Known::new(); processes];
    for (process, drawn, steps) in batches {
        let batch = Batch::new(entries_of(&steps, &known[process], processes == 1));
        let expected = ledger.commit(&batch.entries, &NoFences);
        let answer = store.commit(&batch, &own[process], drawn);
        prop_assert_eq!(&answer, &expected, "{:#?}", batch);
        for run in ["run0", "run1", "run2"].map(run_id) {
            let stored = store.run(&run);
            prop_assert_eq!(stored.as_ref(), ledger.run(run.as_str()));
            if batch.entries.iter().flat_map(|entry| &entry.parts).any(|part| part.run == run) {
                known[process].insert(run, stored);
            }
        }
        prop_assert_eq!(&store.retained, &ledger.retained());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn one_process_is_judged_as_the_ledger_judges(batches in batches(1)) {
        agrees_with_the_ledger(batches, 1)?;
    }

    #[test]
    fn processes_that_write_between_one_another_are_judged_as_the_ledger_judges(batches in batches(3)) {
        agrees_with_the_ledger(batches, 3)?;
    }
}

fn change(store: &mut Store, own: &OwnRuns, run: &str, mutations: Vec<Mutation>) -> Outcome {
    let run = run_id(run);
    let tip = store.run(&run);
    let base = tip.as_ref().map_or(Version::NONE, RunState::version);
    let batch = Batch::new(vec![entry(part_on(tip.as_ref(), base, &run, vec![], mutations))]);
    store.commit(&batch, own, true).outcomes.remove(0)
}

fn created() -> (Store, OwnRuns, OwnRuns) {
    let (mut store, own, other) = (Store::default(), OwnRuns::default(), OwnRuns::default());
    let made = change(&mut store, &own, "r", vec![Mutation::Create { run: NewRun::running(), at: at(0) }]);
    assert!(matches!(made, Outcome::Applied(_)));
    (store, own, other)
}

#[test]
fn several_changes_of_one_node_are_one_write() {
    let (store, own, _) = created();
    let run = run_id("r");
    let first = store.run(&run).unwrap();
    let one = part_on(Some(&first), first.version(), &run, vec![], vec![set("n", NodeUpdate::running())]);
    let two = part_on(one.after.as_ref(), first.version(), &run, vec![], vec![set("n", NodeUpdate::success())]);
    let batch = Batch::new(vec![entry(one), entry(two)]);
    let rows = store.read(&batch, &own, true);
    assert!(rows.nodes.is_empty(), "a chain of this process alone needs no node");
    let writes = decide(&batch, rows).unwrap().writes;
    let write = &writes.runs[&run];
    assert!(write.header.is_none());
    assert_eq!(write.head.as_ref().unwrap().version, Version(first.version().0 + 2));
    assert_eq!(write.nodes.len(), 1);
    assert_eq!(write.nodes[&node_id("n")].state.as_ref().unwrap().status, NodeStatus::Success);
}

#[test]
fn a_chain_goes_on_over_its_own_commits_beside_somebody_elses() {
    let (mut store, own, other) = created();
    let run = run_id("r");
    let first = store.run(&run).unwrap();
    let one = part_on(Some(&first), first.version(), &run, vec![], vec![set("mine", NodeUpdate::running())]);
    // On its way before the first one was answered: its base is still what was committed then.
    let two = part_on(one.after.as_ref(), first.version(), &run, vec![], vec![set("mine", NodeUpdate::success())]);
    let three = part_on(two.after.as_ref(), first.version(), &run, vec![], vec![set("theirs", NodeUpdate::success())]);
    assert!(matches!(store.commit(&Batch::new(vec![entry(one)]), &own, true).outcomes[0], Outcome::Applied(_)));
    assert!(matches!(change(&mut store, &other, "r", vec![set("theirs", NodeUpdate::running())]), Outcome::Applied(_)));
    let answer = store.commit(&Batch::new(vec![entry(two), entry(three)]), &own, true);
    assert!(matches!(&answer.outcomes[0], Outcome::Applied(receipt) if receipt.runs[0].before == Version(first.version().0 + 2)));
    assert!(matches!(&answer.outcomes[1], Outcome::Refused(Refusal::Stale { .. })));
}

#[test]
fn a_node_that_somebody_else_deleted_is_seen() {
    let (mut store, own, other) = created();
    change(&mut store, &own, "r", vec![set("n", NodeUpdate::running())]);
    let run = run_id("r");
    let seen = store.run(&run).unwrap();
    change(&mut store, &other, "r", vec![Mutation::DeleteNode { node: node_id("n") }]);
    let late = part_on(Some(&seen), seen.version(), &run, vec![], vec![set("n", NodeUpdate::success())]);
    let answer = store.commit(&Batch::new(vec![entry(late)]), &own, true);
    assert!(matches!(&answer.outcomes[0], Outcome::Refused(Refusal::Stale { .. })));
}

fn owner() -> LeaseOwner {
    LeaseOwner { process: ProcessInfo::current(at(0)), name: "me".into() }
}

fn lease(mutations: Vec<LeaseMutation>) -> Entry {
    Entry { leases: mutations, ..Entry::default() }
}

fn grant(node: Option<&str>, ttl_ms: u64) -> LeaseMutation {
    let key = LeaseKey { run: run_id("r"), node: node.map(node_id) };
    LeaseMutation::Grant { key, owner: owner(), purpose: None, at: at(0), ttl_ms }
}

fn release(node: Option<&str>, token: u64) -> LeaseMutation {
    LeaseMutation::Release { key: LeaseKey { run: run_id("r"), node: node.map(node_id) }, token: FencingToken(token) }
}

fn held(store: &Store) -> Vec<(Option<&str>, u64)> {
    store.leases.values().map(|row| (row.record.key.node.as_ref().map(NodeId::as_str), row.record.token.0)).collect()
}

fn outcomes(store: &mut Store, own: &OwnRuns, entries: Vec<Entry>) -> Vec<bool> {
    let answer = store.commit(&Batch::new(entries), own, true);
    answer.outcomes.iter().map(|outcome| matches!(outcome, Outcome::Applied(_))).collect()
}

#[test]
fn leases_exclude_expire_and_come_back_in_one_batch() {
    let (mut store, own, _) = created();
    let one = |mutation| lease(vec![mutation]);
    assert_eq!(
        outcomes(&mut store, &own, vec![one(grant(Some("a"), 9)), one(grant(None, 9)), one(grant(Some("b"), 0))]),
        [true, false, true]
    );
    assert_eq!(held(&store), [(Some("a"), 1), (Some("b"), 2)]);
    // What is over is taken over by whoever it is in the way of, and its row goes.
    assert_eq!(outcomes(&mut store, &own, vec![one(release(Some("a"), 1)), one(grant(None, 9))]), [true, true]);
    assert_eq!(held(&store), [(None, 3)]);
    // Given back, granted anew, given back again: nothing of the first row stays.
    assert_eq!(
        outcomes(&mut store, &own, vec![one(release(None, 3)), one(grant(None, 9)), one(release(None, 4))]),
        [true, true, true]
    );
    assert_eq!(held(&store), []);
}

#[test]
fn leases_of_one_entry_change_together_or_not_at_all() {
    let (mut store, own, _) = created();
    assert_eq!(outcomes(&mut store, &own, vec![lease(vec![grant(Some("b"), 9)])]), [true]);
    assert_eq!(outcomes(&mut store, &own, vec![lease(vec![grant(Some("a"), 9), grant(Some("b"), 9)])]), [false]);
    assert_eq!(held(&store), [(Some("b"), 1)]);
    let renew = |token| LeaseMutation::Renew {
        key: LeaseKey::node(run_id("r"), node_id("b")),
        token: FencingToken(token),
        at: at(7),
        ttl_ms: 1000,
    };
    assert_eq!(outcomes(&mut store, &own, vec![lease(vec![renew(1)]), lease(vec![renew(2)])]), [true, false]);
    assert_eq!(store.leases.values().next().unwrap().record.until, at(7) + TimeDelta::seconds(1));
    let force = |token| LeaseMutation::Force { token: FencingToken(token) };
    assert_eq!(outcomes(&mut store, &own, vec![lease(vec![force(7)]), lease(vec![force(1)])]), [false, true]);
    assert_eq!(held(&store), []);
}

#[test]
fn a_fence_holds_only_under_its_token_and_until_the_run_ends() {
    let (mut store, own, _) = created();
    let run = run_id("r");
    assert_eq!(outcomes(&mut store, &own, vec![lease(vec![grant(Some("n"), 9)])]), [true]);
    let fence = |token| Fence { key: LeaseKey::node(run.clone(), node_id("n")), token: FencingToken(token) };
    let mut tip = store.run(&run);
    let base = tip.as_ref().unwrap().version();
    let mut write = |token, mutation| {
        let part = part_on(tip.as_ref(), base, &run, vec![], vec![mutation]);
        tip.clone_from(&part.after);
        Entry { parts: vec![part], fences: vec![fence(token)], ..Entry::default() }
    };
    let entries = vec![
        write(1, set("n", NodeUpdate::running())),
        write(1, Mutation::Update { update: RunUpdate::success(), at: at(9) }),
        write(1, set("n", NodeUpdate::success())),
    ];
    assert_eq!(outcomes(&mut store, &own, entries), [true, true, false]);
    assert_eq!(held(&store), []);
    assert_eq!(outcomes(&mut store, &own, vec![lease(vec![grant(Some("n"), 9)])]), [true]);
    let tip = store.run(&run);
    let part = part_on(tip.as_ref(), tip.as_ref().unwrap().version(), &run, vec![], vec![set("n", NodeUpdate::new())]);
    assert_eq!(
        outcomes(&mut store, &own, vec![Entry { parts: vec![part], fences: vec![fence(1)], ..Entry::default() }]),
        [false]
    );
}
