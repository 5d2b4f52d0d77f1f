//! The SQLite backend, through the trait: what it accepts and refuses, what it shares with other openings, what it leaves untouched.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use seeknal_state::model::{
    Batch, BatchAnswer, Entry, Guard, LeaseMutation, Ledger, Mutation, NoFences, Outcome, Receipt, Refusal, RunPart, apply_all,
    time,
};
use seeknal_state::{
    BackendOptions, Fence, FencingToken, Interval, LeaseKey, LeaseOwner, Metadata, NewRun, NodeId, NodeStatus, NodeUpdate,
    PartitionKey, ProcessInfo, RawJson, RunFilter, RunId, RunQuery, RunState, RunStatus, RunUpdate, StateBackend, StoreErrorKind,
    Version, create_state_backend,
};

type Backend = Arc<dyn StateBackend>;

fn db(dir: &Path) -> PathBuf {
    dir.join("state.db")
}

fn make(path: &Path) -> Backend {
    create_state_backend("database", &BackendOptions::new().db_path(path)).unwrap()
}

async fn open(path: &Path) -> Backend {
    let backend = make(path);
    backend.initialize().await.unwrap();
    backend
}

async fn open_reading(path: &Path) -> Backend {
    let backend = create_state_backend("database", &BackendOptions::new().db_path(path).read_only(true)).unwrap();
    backend.initialize().await.unwrap();
    backend
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

fn hours(from: i64, to: i64) -> Interval {
    Interval::new(at(from * 3600), at(to * 3600)).unwrap()
}

fn create(second: i64) -> Mutation {
    Mutation::Create { run: NewRun::running(), at: at(second) }
}

fn set(node: &str, update: NodeUpdate) -> Mutation {
    Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(100) }
}

/// A part as a run's actor builds it: `tip` is what it knows, with everything on its way.
fn part_on(tip: Option<&RunState>, base: Version, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> RunPart {
    let run = run_id(run);
    let expect = tip.map_or(Version::NONE, RunState::version);
    let mut after = tip.cloned();
    if apply_all(&mut after, &run, &mutations, expect.next()).is_err() {
        after = None;
    }
    RunPart { run, base, expect, guards, mutations, after }
}

fn entry(part: RunPart) -> Entry {
    Entry { parts: vec![part], ..Entry::default() }
}

/// Commits one entry on the run as it is in storage now.
async fn change_guarded(backend: &Backend, run: &str, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Outcome {
    let tip = backend.load_run(&run_id(run)).await.unwrap();
    let base = tip.as_ref().map_or(Version::NONE, RunState::version);
    commit(backend, vec![entry(part_on(tip.as_ref(), base, run, guards, mutations))]).await.outcomes.remove(0)
}

async fn change(backend: &Backend, run: &str, mutations: Vec<Mutation>) -> Receipt {
    applied(change_guarded(backend, run, Vec::new(), mutations).await)
}

async fn commit(backend: &Backend, entries: Vec<Entry>) -> BatchAnswer {
    backend.commit(Arc::new(Batch::new(entries))).await.unwrap()
}

fn applied(outcome: Outcome) -> Receipt {
    match outcome {
        Outcome::Applied(receipt) => receipt,
        Outcome::Refused(refusal) => panic!("refused: {refusal}"),
    }
}

fn refused(outcome: Outcome) -> Refusal {
    match outcome {
        Outcome::Applied(receipt) => panic!("applied: {receipt:?}"),
        Outcome::Refused(refusal) => refusal,
    }
}

async fn load(backend: &Backend, run: &str) -> RunState {
    backend.load_run(&run_id(run)).await.unwrap().unwrap()
}

fn owner(name: &str) -> LeaseOwner {
    LeaseOwner { process: ProcessInfo::current(at(0)), name: name.into() }
}

fn grant(key: LeaseKey, name: &str, ttl_ms: u64) -> Entry {
    Entry {
        leases: vec![LeaseMutation::Grant { key, owner: owner(name), purpose: Some("test".into()), at: at(0), ttl_ms }],
        ..Entry::default()
    }
}

async fn lock(backend: &Backend, key: &LeaseKey, name: &str, ttl_ms: u64) -> Result<FencingToken, Refusal> {
    match commit(backend, vec![grant(key.clone(), name, ttl_ms)]).await.outcomes.remove(0) {
        Outcome::Applied(receipt) => Ok(receipt.grants[0].token),
        Outcome::Refused(refusal) => Err(refusal),
    }
}

/// Every file of a folder with its bytes.
fn bytes_of(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        } else {
            found.insert(path, Vec::new());
        }
    }
    found
}

fn raw(path: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(path).unwrap()
}

#[tokio::test]
async fn a_run_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let mut notes = Metadata::new();
    notes.insert("n", RawJson::parse("1e-300").unwrap());
    let update = NodeUpdate::success()
        .row_count(u64::MAX)
        .duration_ms(9_223_372_036_854_775_808)
        .fingerprint("abc123")
        .error("warn\u{0}ing")
        .watermark("last_watermark", "2024-01-01")
        .metadata("big", serde_json::json!({"z": 1, "a": [1, 2]}));
    let mutations = vec![
        Mutation::Create { run: NewRun::running().metadata("trigger", "cron"), at: at(0) },
        set("a/../b", update),
        set("日本", NodeUpdate::status(NodeStatus::parse("upstream_failed"))),
        Mutation::AddInterval { node: node_id("a/../b"), interval: hours(0, 2) },
        Mutation::AddInterval { node: node_id("a/../b"), interval: hours(4, 6) },
        Mutation::AddPartition { node: node_id("later"), partition: PartitionKey::new("dt=2024-01-01").unwrap() },
    ];
    let receipt = change(&backend, "run 1", mutations.clone()).await;
    assert_eq!(receipt.runs[0].before, Version::NONE);
    let mut oracle = None;
    apply_all(&mut oracle, &run_id("run 1"), &mutations, receipt.runs[0].after).unwrap();
    assert_eq!(load(&backend, "run 1").await, oracle.clone().unwrap());
    assert_eq!(backend.run_version(&run_id("run 1")).await.unwrap(), Some(receipt.runs[0].after));

    backend.close().await.unwrap();
    let again = open(&db(dir.path())).await;
    assert_eq!(load(&again, "run 1").await, oracle.unwrap());
    assert!(again.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn columns_are_readable_with_plain_sql() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success().row_count(1000).fingerprint("abc"))]).await;
    change(&backend, "r", vec![Mutation::AddInterval { node: node_id("n"), interval: hours(0, 1) }]).await;
    backend.close().await.unwrap();
    let sql = raw(&db(dir.path()));
    let row: (String, i64, String, String) = sql
        .query_row("SELECT status, row_count, fingerprint, finished_at FROM node_states WHERE run_id = 'r'", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .unwrap();
    assert_eq!(row, ("success".into(), 1000, "abc".into(), time::format_sortable(at(100))));
    let interval: (String, String) =
        sql.query_row("SELECT start_at, end_at FROM completed_intervals", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert_eq!(interval, (time::format_sortable(at(0)), time::format_sortable(at(3600))));
    let mode: String = sql.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
}

#[tokio::test]
async fn missing_and_existing_runs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let missing = change_guarded(&backend, "r", vec![], vec![set("n", NodeUpdate::running())]).await;
    assert!(matches!(refused(missing), Refusal::RunNotFound { .. }));
    change(&backend, "r", vec![create(0)]).await;
    let twice = change_guarded(&backend, "r", vec![], vec![create(1)]).await;
    assert!(matches!(refused(twice), Refusal::RunExists { .. }));
    let no_node = change_guarded(&backend, "r", vec![], vec![Mutation::DeleteNode { node: node_id("n") }]).await;
    assert!(matches!(refused(no_node), Refusal::NodeNotFound { .. }));

    // Deleted and made again: what stood on the old one is refused.
    let old = load(&backend, "r").await;
    change(&backend, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
    let made = change(&backend, "r", vec![create(2)]).await;
    assert!(made.runs[0].after > old.version().next());
    let part = part_on(Some(&old), old.version(), "r", vec![], vec![set("n", NodeUpdate::running())]);
    let outcome = commit(&backend, vec![entry(part)]).await.outcomes.remove(0);
    assert!(matches!(refused(outcome), Refusal::RunNotFound { .. }));
}

#[tokio::test]
async fn guards_are_decided_on_the_rows() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
    let version = load(&backend, "r").await.version();
    let running = vec![NodeStatus::Running];
    for (guard, holds) in [
        (Guard::RunVersion(version), true),
        (Guard::RunVersion(Version(1_000_000)), false),
        (Guard::RunStatus(vec![RunStatus::Running]), true),
        (Guard::RunStatus(vec![RunStatus::Failed]), false),
        (Guard::NodeStatus { node: node_id("n"), one_of: running.clone() }, true),
        (Guard::NodeStatus { node: node_id("n"), one_of: vec![NodeStatus::Pending] }, false),
        (Guard::NodeStatus { node: node_id("x"), one_of: running }, false),
        (Guard::NodeAbsent { node: node_id("x") }, true),
        (Guard::NodeAbsent { node: node_id("n") }, false),
        (Guard::NodeVersion { node: node_id("n"), version }, true),
        (Guard::NodeVersion { node: node_id("n"), version: Version::NONE }, false),
        (Guard::Unlocked, true),
    ] {
        // What is written is refused by itself, so that the version stays where it is.
        let outcome = change_guarded(&backend, "r", vec![guard.clone()], vec![Mutation::DeleteNode { node: node_id("y") }]).await;
        match refused(outcome) {
            Refusal::NodeNotFound { .. } => assert!(holds, "{guard}"),
            Refusal::Guard { guard: found, .. } => assert!(!holds && found == guard, "{guard}"),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn a_refusal_takes_its_chain_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "a", vec![create(0)]).await;
    change(&backend, "b", vec![create(1)]).await;
    let (a, b) = (load(&backend, "a").await, load(&backend, "b").await);
    let guard = Guard::NodeStatus { node: node_id("n"), one_of: vec![NodeStatus::Success] };
    let entries = vec![
        entry(part_on(Some(&a), a.version(), "a", vec![guard], vec![set("n", NodeUpdate::running())])),
        entry(part_on(Some(&b), b.version(), "b", vec![], vec![set("n", NodeUpdate::running())])),
        entry(part_on(Some(&a), a.version(), "a", vec![], vec![set("m", NodeUpdate::running())])),
    ];
    let answer = commit(&backend, entries).await;
    assert!(matches!(answer.outcomes[0], Outcome::Refused(Refusal::Guard { .. })));
    assert!(matches!(answer.outcomes[1], Outcome::Applied(_)));
    assert!(matches!(answer.outcomes[2], Outcome::Refused(Refusal::Chained { .. })));
    assert_eq!(load(&backend, "a").await, a);
}

#[tokio::test]
async fn a_batch_is_applied_once() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let other = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0)]).await;
    let tip = load(&backend, "r").await;
    let good = entry(part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::running())]));
    let bad = entry(part_on(Some(&tip), tip.version(), "r", vec![Guard::NodeAbsent { node: node_id("n") }], vec![]));
    for entries in [vec![good.clone(), grant(LeaseKey::run(run_id("x")), "me", 60_000)], vec![good, bad]] {
        let batch = Arc::new(Batch::new(entries));
        let first = backend.commit(Arc::clone(&batch)).await.unwrap();
        let state = load(&backend, "r").await;
        assert_eq!(backend.commit(Arc::clone(&batch)).await.unwrap(), first);
        assert_eq!(other.commit(batch).await.unwrap(), first, "another opening answers from the same row");
        assert_eq!(load(&backend, "r").await, state);
    }
}

#[tokio::test]
async fn two_openings_write_different_nodes_and_lose_nothing() {
    const EACH: u32 = 60;
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0)]).await;
    let writer = |backend: Backend, node: &'static str| async move {
        let mut tip = load(&backend, "r").await;
        for count in 0..EACH {
            let update = NodeUpdate::running().row_count(count.into()).metadata(format!("{node}{count}"), count);
            let mutations = vec![
                set(node, update),
                Mutation::AddInterval { node: node_id(node), interval: hours(i64::from(count) * 2, i64::from(count) * 2 + 1) },
            ];
            let part = part_on(Some(&tip), tip.version(), "r", vec![], mutations);
            let receipt = applied(commit(&backend, vec![entry(part.clone())]).await.outcomes.remove(0));
            // An actor that was alone goes on with its tip; one that was not reads again.
            tip = if receipt.runs[0].before == part.expect { part.after.unwrap() } else { load(&backend, "r").await };
        }
    };
    tokio::join!(writer(Arc::clone(&one), "left"), writer(Arc::clone(&two), "right"));
    let state = load(&one, "r").await;
    for node in ["left", "right"] {
        let node = state.node(node).unwrap();
        assert_eq!(
            (node.metadata.len(), node.intervals.len(), node.row_count),
            (EACH as usize, EACH as usize, Some(u64::from(EACH) - 1))
        );
    }
    assert_eq!(state.version().0, state.created_version().0 + 2 * u64::from(EACH));
    assert!(one.verify().await.unwrap().is_sound());
}

/// Two sides send chains of entries on the same three nodes, the second batch of a chain before the first one is answered, as actors do. Every key that was
/// accepted is there in the end, and none that was refused.
#[tokio::test]
async fn chains_of_two_openings_never_lose_or_smuggle_a_write() {
    const ROUNDS: usize = 25;
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    let nodes = ["a", "b", "c"];
    change(&one, "r", [create(0)].into_iter().chain(nodes.map(|node| set(node, NodeUpdate::pending()))).collect()).await;
    let created = load(&one, "r").await.version();
    let side = |backend: Backend, name: &'static str, stride: usize| async move {
        let mut outcomes = Vec::new();
        for round in 0..ROUNDS {
            let seen = load(&backend, "r").await;
            let mut tip = seen.clone();
            let mut chain = |from: usize| {
                let mut keys = Vec::new();
                let entries = (from..from + 2)
                    .map(|index| {
                        let node = nodes[(round * stride + index) % nodes.len()];
                        let key = format!("{name}-{round}-{index}");
                        // Every third one guards on a node that it does not write.
                        let other = node_id(nodes[(round + index) % nodes.len()]);
                        let version = tip.node(other.as_str()).unwrap().version;
                        let guards = if index % 3 == 0 { vec![Guard::NodeVersion { node: other, version }] } else { vec![] };
                        let part = part_on(
                            Some(&tip),
                            seen.version(),
                            "r",
                            guards,
                            vec![set(node, NodeUpdate::new().metadata(&key, 1))],
                        );
                        tip = part.after.clone().unwrap();
                        keys.push((node, key));
                        entry(part)
                    })
                    .collect();
                (keys, Arc::new(Batch::new(entries)))
            };
            for (keys, batch) in [chain(0), chain(2)] {
                let answer = backend.commit(batch).await.unwrap();
                outcomes.extend(
                    keys.into_iter().zip(answer.outcomes.into_iter().map(|outcome| matches!(outcome, Outcome::Applied(_)))),
                );
            }
        }
        outcomes
    };
    let (left, right) = tokio::join!(side(Arc::clone(&one), "left", 1), side(Arc::clone(&two), "right", 2));
    let state = load(&one, "r").await;
    let accepted = left.iter().chain(&right).filter(|(_, accepted)| *accepted).count();
    assert!(accepted >= ROUNDS && accepted < left.len() + right.len(), "nothing was contended: {accepted}");
    for ((node, key), accepted) in left.into_iter().chain(right) {
        assert_eq!(state.node(node).unwrap().metadata.get(&key).is_some(), accepted, "{node} {key}");
    }
    assert_eq!(state.version().0, created.0 + accepted as u64);
}

#[tokio::test]
async fn two_openings_claim_one_node_and_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0)]).await;
    for round in 0..30 {
        let node = format!("n{round}");
        let claim = |backend: Backend| {
            let node = node.clone();
            async move {
                let guard = Guard::NodeAbsent { node: node_id(&node) };
                change_guarded(&backend, "r", vec![guard], vec![set(&node, NodeUpdate::running())]).await
            }
        };
        let (a, b) = tokio::join!(claim(Arc::clone(&one)), claim(Arc::clone(&two)));
        let wins = [&a, &b].iter().filter(|outcome| matches!(outcome, Outcome::Applied(_))).count();
        assert_eq!(wins, 1, "{a:?} {b:?}");
        let loser = if matches!(a, Outcome::Applied(_)) { b } else { a };
        assert!(matches!(refused(loser), Refusal::Guard { .. } | Refusal::Stale { .. }));
    }
}

#[tokio::test]
async fn what_was_not_seen_is_stale() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("n", NodeUpdate::pending()), set("gone", NodeUpdate::pending())]).await;
    let seen = load(&one, "r").await;
    change(&two, "r", vec![set("n", NodeUpdate::running().metadata("theirs", 1))]).await;
    change(&two, "r", vec![Mutation::DeleteNode { node: node_id("gone") }]).await;
    let try_one = |mutations: Vec<Mutation>, guards: Vec<Guard>| {
        let part = part_on(Some(&seen), seen.version(), "r", guards, mutations);
        let one = Arc::clone(&one);
        async move { commit(&one, vec![entry(part)]).await.outcomes.remove(0) }
    };
    let pending = Guard::NodeStatus { node: node_id("n"), one_of: vec![NodeStatus::Running] };
    for (mutations, guards) in [
        (vec![set("n", NodeUpdate::success())], vec![]),
        (vec![set("other", NodeUpdate::success())], vec![pending]),
        (vec![set("gone", NodeUpdate::success())], vec![]),
        (vec![Mutation::Delete { keep_coverage: false }], vec![]),
    ] {
        assert!(matches!(refused(try_one(mutations, guards).await), Refusal::Stale { .. }));
    }
    // A row that nobody touched is written, and nothing else of what this side believes.
    let before = load(&one, "r").await;
    let receipt = applied(try_one(vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(5) }], vec![]).await);
    assert_eq!(receipt.runs[0].before, before.version());
    let after = load(&one, "r").await;
    assert_eq!(after.node("n"), before.node("n"));
    assert_eq!(after.header().version, receipt.runs[0].after);
    assert_eq!(after.header().metadata.get("k").unwrap().as_str(), "1");
}

/// The versions fit by accident: this side's first entry was refused, somebody else's commit took its number, and the next entry of the broken
/// chain expects just that number. Its own view of the rows must not be written.
#[tokio::test]
async fn a_number_that_fits_by_accident_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("m", NodeUpdate::pending())]).await;
    let seen = load(&one, "r").await;
    let guard = Guard::NodeStatus { node: node_id("m"), one_of: vec![NodeStatus::Failed] };
    let first = part_on(Some(&seen), seen.version(), "r", vec![guard], vec![set("m", NodeUpdate::new().metadata("never", 1))]);
    let tip = first.after.clone().unwrap();
    let second = part_on(Some(&tip), seen.version(), "r", vec![], vec![set("m", NodeUpdate::new().metadata("second", 1))]);
    refused(commit(&one, vec![entry(first)]).await.outcomes.remove(0));
    change(&two, "r", vec![set("x", NodeUpdate::running())]).await;
    applied(commit(&one, vec![entry(second)]).await.outcomes.remove(0));
    let state = load(&one, "r").await;
    let notes = &state.node("m").unwrap().metadata;
    assert!(notes.get("never").is_none(), "what was refused came in by the back door");
    assert!(notes.get("second").is_some());
    assert!(state.node("x").is_some());
}

#[tokio::test]
async fn leases_exclude_expire_and_fence() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0)]).await;
    let (run, node) = (LeaseKey::run(run_id("r")), LeaseKey::node(run_id("r"), node_id("n")));
    let token = lock(&one, &run, "a", 60_000).await.unwrap();
    for key in [&run, &node] {
        match lock(&two, key, "b", 60_000).await.unwrap_err() {
            Refusal::LeaseHeld { holder } => assert_eq!((holder.token, &*holder.owner.name), (token, "a")),
            other => panic!("{other}"),
        }
    }
    let listed = two.list_leases().await.unwrap();
    assert_eq!((listed.len(), listed[0].token, listed[0].purpose.as_deref()), (1, token, Some("test")));
    assert_eq!(listed[0].owner, owner_like(&listed[0].owner, "a"));
    let unlocked = change_guarded(&two, "r", vec![Guard::Unlocked], vec![set("n", NodeUpdate::running())]).await;
    assert!(matches!(refused(unlocked), Refusal::Guard { guard: Guard::Unlocked, .. }));

    // Under the token it may write; under another one it may not.
    let fenced = |token: FencingToken| Fence { key: LeaseKey::run(run_id("r")), token };
    let write = |fence: Fence, tip: RunState| {
        let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::new())]);
        Entry { parts: vec![part], fences: vec![fence], ..Entry::default() }
    };
    applied(commit(&one, vec![write(fenced(token), load(&one, "r").await)]).await.outcomes.remove(0));
    let wrong = commit(&one, vec![write(fenced(FencingToken(token.0 + 1)), load(&one, "r").await)]).await.outcomes.remove(0);
    assert!(matches!(refused(wrong), Refusal::Fenced { .. }));

    // An old token renews and releases nothing.
    let lease = |mutation| Entry { leases: vec![mutation], ..Entry::default() };
    let old = FencingToken(0);
    let renew = |token| lease(LeaseMutation::Renew { key: LeaseKey::run(run_id("r")), token, at: at(1), ttl_ms: 60_000 });
    assert!(matches!(refused(commit(&one, vec![renew(old)]).await.outcomes.remove(0)), Refusal::LeaseGone { .. }));
    applied(commit(&one, vec![renew(token)]).await.outcomes.remove(0));
    applied(commit(&one, vec![lease(LeaseMutation::Release { key: run.clone(), token: old })]).await.outcomes.remove(0));
    assert_eq!(one.list_leases().await.unwrap().len(), 1);

    // Taken away by somebody else: the holder's writes are refused.
    assert!(matches!(
        refused(commit(&two, vec![lease(LeaseMutation::Force { token: FencingToken(999_999) })]).await.outcomes.remove(0)),
        Refusal::LeaseGone { .. }
    ));
    applied(commit(&two, vec![lease(LeaseMutation::Force { token })]).await.outcomes.remove(0));
    assert!(matches!(
        refused(commit(&one, vec![write(fenced(token), load(&one, "r").await)]).await.outcomes.remove(0)),
        Refusal::Fenced { .. }
    ));

    // A lease of zero milliseconds is over when it is granted: the next one takes it over, with a higher token.
    let brief = lock(&one, &node, "a", 0).await.unwrap();
    assert!(one.list_leases().await.unwrap().is_empty());
    let next = lock(&two, &run, "b", u64::MAX).await.unwrap();
    assert!(next > brief && brief > token);
    assert_eq!(one.list_leases().await.unwrap().len(), 1);
    assert!(matches!(refused(commit(&one, vec![renew(brief)]).await.outcomes.remove(0)), Refusal::LeaseGone { .. }));
}

fn owner_like(seen: &LeaseOwner, name: &str) -> LeaseOwner {
    let mut like = owner(name);
    like.process.id = Arc::clone(&seen.process.id);
    like
}

#[tokio::test]
async fn several_leases_are_granted_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let key = |node: &str| LeaseKey::node(run_id("r"), node_id(node));
    lock(&backend, &key("b"), "other", 60_000).await.unwrap();
    let both = Entry {
        leases: ["a", "b"]
            .map(|node| LeaseMutation::Grant { key: key(node), owner: owner("me"), purpose: None, at: at(0), ttl_ms: 60_000 })
            .into(),
        ..Entry::default()
    };
    assert!(matches!(refused(commit(&backend, vec![both]).await.outcomes.remove(0)), Refusal::LeaseHeld { .. }));
    assert_eq!(backend.list_leases().await.unwrap().len(), 1);
    lock(&backend, &key("a"), "third", 60_000).await.unwrap();
}

#[tokio::test]
async fn ending_or_deleting_a_run_frees_its_locks() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    for last in [Mutation::Update { update: RunUpdate::success(), at: at(9) }, Mutation::Delete { keep_coverage: true }] {
        change(&backend, "r", vec![create(0)]).await;
        let token = lock(&backend, &LeaseKey::node(run_id("r"), node_id("n")), "a", 60_000).await.unwrap();
        let others = lock(&backend, &LeaseKey::run(run_id("r2")), "a", 60_000).await.unwrap();
        change(&backend, "r", vec![last.clone()]).await;
        let left: Vec<_> = backend.list_leases().await.unwrap().into_iter().map(|lease| lease.token).collect();
        assert_eq!(left, [others], "{token} stayed");
        commit(&backend, vec![Entry { leases: vec![LeaseMutation::Force { token: others }], ..Entry::default() }]).await;
        if !matches!(last, Mutation::Delete { .. }) {
            change(&backend, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
        }
    }
}

#[tokio::test]
async fn cleanup_keeps_coverage_and_the_last_success() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let n = node_id("n");
    for (run, second, rows) in [("old", 0, 1), ("new", 10, 2)] {
        let mutations = vec![
            create(second),
            set("n", NodeUpdate::success().row_count(rows).watermark("w", "x")),
            Mutation::AddInterval { node: n.clone(), interval: hours(second, second + 5) },
            Mutation::AddPartition { node: n.clone(), partition: PartitionKey::new(run).unwrap() },
        ];
        change(&backend, run, mutations).await;
    }
    let (coverage, success) = (backend.coverage(&n).await.unwrap(), backend.last_success(&n).await.unwrap());
    assert_eq!(success.as_ref().unwrap().row_count, Some(2));
    for run in ["new", "old"] {
        change(&backend, run, vec![Mutation::Delete { keep_coverage: true }]).await;
        assert_eq!(backend.coverage(&n).await.unwrap(), coverage);
        assert_eq!(backend.last_success(&n).await.unwrap(), success);
    }
    assert!(backend.latest_node(&n).await.unwrap().is_none());
    assert!(backend.node_ids().await.unwrap().into_iter().eq([n.clone()]));

    // Carried to another store, where it joins what is there.
    let other = open(&dir.path().join("other.db")).await;
    commit(&other, vec![Entry { retained: backend.retained().await.unwrap(), ..Entry::default() }]).await;
    assert_eq!(other.retained().await.unwrap(), backend.retained().await.unwrap());
}

#[tokio::test]
async fn listing_filters_and_pages() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let mut ledger = Ledger::new();
    for index in 0..25_i64 {
        let run = format!("{}{index}", if index % 2 == 0 { "a%_" } else { "ä" });
        // Three runs share every stamp.
        let mut mutations = vec![create(index / 3), set("n", NodeUpdate::success()), set("m", NodeUpdate::failed("x"))];
        if index % 4 == 0 {
            mutations.push(Mutation::Update { update: RunUpdate::failed(), at: at(50) });
        }
        let entries = vec![entry(part_on(None, Version::NONE, &run, vec![], mutations))];
        ledger.commit(&entries, &NoFences);
        commit(&backend, entries).await;
    }
    let filters = [
        RunFilter::all(),
        RunFilter::all().status(RunStatus::Failed),
        RunFilter::all().status(RunStatus::Failed).status(RunStatus::Running).created_from(at(2)).created_before(at(6)),
        RunFilter::all().id_prefix("a%_"),
        RunFilter::all().id_prefix("ä1"),
        RunFilter::all().id_prefix("' OR 1 --"),
        RunFilter::all().id_prefix(""),
    ];
    for filter in filters {
        for limit in [1, 4, 1000] {
            let mut query = RunQuery::new(filter.clone()).limit(limit);
            loop {
                let page = backend.list_runs(&query).await.unwrap();
                assert_eq!(page, ledger.list(&query), "{query:?}");
                if page.next.is_none() {
                    break;
                }
                query = query.after(page.next);
            }
        }
    }
}

#[tokio::test]
async fn foreign_databases_are_refused_untouched() {
    for (name, setup) in [
        (
            "seeknal",
            "CREATE TABLE run_state (x); CREATE TABLE node_state (x); CREATE TABLE backend_locks (x); INSERT INTO run_state VALUES (1)",
        ),
        ("wal", "PRAGMA journal_mode = WAL; CREATE TABLE anything (x)"),
        ("marked", "PRAGMA application_id = 4711; VACUUM"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        raw(&path).execute_batch(setup).unwrap();
        let before = bytes_of(dir.path());
        for backend in
            [make(&path), create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap()]
        {
            let error = backend.initialize().await.unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Foreign, "{name}: {error}");
            assert!(error.to_string().contains("mv "), "{error}");
            assert_eq!(bytes_of(dir.path()), before, "{name}");
        }
    }
}

#[tokio::test]
async fn newer_and_damaged_databases_are_refused_untouched() {
    type Case = (&'static str, fn(&Path), StoreErrorKind);
    let make_ours = || async {
        let dir = tempfile::tempdir().unwrap();
        let backend = open(&db(dir.path())).await;
        change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
        backend.close().await.unwrap();
        dir
    };
    let cases: [Case; 4] = [
        ("newer", |path| raw(path).pragma_update(None, "user_version", 99).unwrap(), StoreErrorKind::NewerFormat),
        (
            "text",
            |path| std::fs::write(path, "this is not a database, but it is longer than a header: ".repeat(40)).unwrap(),
            StoreErrorKind::Corrupt,
        ),
        ("zeros", |path| std::fs::write(path, vec![0; 8192]).unwrap(), StoreErrorKind::Corrupt),
        (
            "cut",
            |path| {
                let bytes = std::fs::read(path).unwrap();
                std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            },
            StoreErrorKind::Corrupt,
        ),
    ];
    for (name, harm, kind) in cases {
        let dir = make_ours().await;
        harm(&db(dir.path()));
        let before = bytes_of(dir.path());
        let error = make(&db(dir.path())).initialize().await.unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains("state.db"), "{error}");
        assert_eq!(bytes_of(dir.path()), before, "{name}");
    }
}

#[tokio::test]
async fn an_empty_file_is_a_new_database_and_reading_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/er/state.db");
    let reading = create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap();
    assert_eq!(reading.initialize().await.unwrap_err().kind(), StoreErrorKind::NotFound);
    assert!(!dir.path().join("deep").exists());
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "").unwrap();
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let beside = open_reading(&path).await;
    assert_eq!(load(&beside, "r").await, load(&backend, "r").await);
    let error = beside.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::ReadOnly, false));
}

#[tokio::test]
async fn values_that_make_no_sense_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    let harms = [
        ("UPDATE node_states SET started_at = 'yesterday' WHERE run_id = ?1", "started_at"),
        ("UPDATE node_states SET row_count = -5 WHERE run_id = ?1", "row_count"),
        ("UPDATE node_states SET metadata = '{' WHERE run_id = ?1", "metadata"),
        ("UPDATE runs SET created_at = x'00' WHERE run_id = ?1", "created_at"),
        ("UPDATE completed_intervals SET end_at = start_at WHERE run_id = ?1", "start_at"),
        ("DELETE FROM node_states WHERE run_id = ?1", "node"),
    ];
    for (index, (harm, column)) in harms.iter().enumerate() {
        let run = format!("harmed {index}");
        let mutations =
            vec![create(0), set("n", NodeUpdate::success()), Mutation::AddInterval { node: node_id("n"), interval: hours(0, 1) }];
        change(&backend, &run, mutations).await;
        raw(&path).execute(harm, [&run]).unwrap();
        let error = backend.load_run(&run_id(&run)).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt);
        let text = error.to_string();
        assert!(text.contains(column) && text.contains(&run) && text.contains("table "), "{text}");
    }
    let report = backend.verify().await.unwrap();
    for index in 0..harms.len() {
        let run = format!("harmed {index}");
        assert!(report.problems.iter().any(|problem| problem.contains(&run)), "{run}: {:?}", report.problems);
    }
}

#[tokio::test]
async fn numbers_go_on_over_a_restored_backup() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let key = LeaseKey::run(run_id("r"));
    let backend = open(&path).await;
    change(&backend, "first", vec![create(0)]).await;
    backend.close().await.unwrap();
    let copy = std::fs::read(&path).unwrap();
    let backend = open(&path).await;
    let token = lock(&backend, &key, "a", 1).await.unwrap();
    let receipt = change(&backend, "second", vec![create(0)]).await;
    backend.close().await.unwrap();
    std::fs::write(&path, copy).unwrap();
    let backend = open(&path).await;
    assert!(lock(&backend, &key, "a", 60_000).await.unwrap() > token);
    let again = change(&backend, "second", vec![create(0)]).await;
    assert!(again.seq > receipt.seq && again.runs[0].after > receipt.runs[0].after);
}

#[tokio::test]
async fn openings_know_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let (one, two) = (open(&path).await, open(&path).await);
    let ids = |backend: &Backend| backend.process().unwrap().id;
    assert_ne!(ids(&one), ids(&two));
    let listed = one.processes().await.unwrap();
    assert_eq!(
        listed.iter().map(|process| (Arc::clone(&process.process.id), process.alive)).collect::<Vec<_>>(),
        [(ids(&one), Some(true)), (ids(&two), Some(true))]
    );
    two.close().await.unwrap();
    assert_eq!(one.processes().await.unwrap().len(), 1);

    // What a dead one left: its file, and nobody's lock on it.
    let own = std::fs::read_dir(dir.path().join("state.db.owners")).unwrap().next().unwrap().unwrap().path();
    let dead = std::fs::read_to_string(&own).unwrap().replace(&*ids(&one), "dead");
    std::fs::write(own.with_file_name("dead.lock"), dead).unwrap();
    let listed = one.processes().await.unwrap();
    assert!(listed.iter().any(|process| &*process.process.id == "dead" && process.alive == Some(false)));
    assert!(!own.with_file_name("dead.lock").exists(), "it is swept once it was told");
}

#[tokio::test]
async fn closing_answers_and_then_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    backend.checkpoint().await.unwrap();
    backend.close().await.unwrap();
    backend.close().await.unwrap();
    let error = backend.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Closed, false));
    assert_eq!(backend.load_run(&run_id("r")).await.unwrap_err().kind(), StoreErrorKind::Closed);
    assert!(!path.with_file_name("state.db-wal").exists());
}

#[tokio::test]
async fn a_replaced_database_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    std::fs::rename(&path, dir.path().join("away.db")).unwrap();
    let error = backend.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Poisoned, false));
    std::fs::rename(dir.path().join("away.db"), &path).unwrap();
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
}

#[tokio::test]
async fn a_busy_database_is_told_and_nothing_is_half_done() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let tip = load(&backend, "r").await;
    let foreign = raw(&path);
    foreign.execute_batch("BEGIN IMMEDIATE").unwrap();
    let batch =
        Arc::new(Batch::new(vec![entry(part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::running())]))]));
    let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Busy, false));
    assert!(error.to_string().contains("seeknal state locks"), "{error}");
    assert_eq!(load(&backend, "r").await, tip, "reading goes on");
    foreign.execute_batch("ROLLBACK").unwrap();
    applied(backend.commit(batch).await.unwrap().outcomes.remove(0));
}

#[tokio::test]
async fn batches_that_wait_together_keep_their_own_answers() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    for index in 0..40 {
        change(&backend, &format!("r{index}"), vec![create(index)]).await;
    }
    let mut waiting = tokio::task::JoinSet::new();
    for index in 0..40 {
        let backend = Arc::clone(&backend);
        waiting.spawn(async move {
            let run = format!("r{index}");
            for count in 0..10_u64 {
                let receipt = change(&backend, &run, vec![set("n", NodeUpdate::running().row_count(count))]).await;
                assert_eq!(receipt.runs[0].run, run.as_str());
            }
            assert_eq!(load(&backend, &run).await.node("n").unwrap().row_count, Some(9));
        });
    }
    while let Some(done) = waiting.join_next().await {
        done.unwrap();
    }
    assert!(backend.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn what_may_only_be_read_is_read_and_says_so() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let state = load(&backend, "r").await;
    backend.close().await.unwrap();
    let allow = |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    allow(0o555);
    // Who may write everywhere (root) cannot be shown a folder that may not be written.
    if std::fs::write(dir.path().join("probe"), "").is_err() {
        let before = bytes_of(dir.path());
        let reading = open_reading(&path).await;
        assert_eq!(load(&reading, "r").await, state);
        reading.close().await.unwrap();
        let error = make(&dir.path().join("new.db")).initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");
        assert_eq!(bytes_of(dir.path()), before);
    }
    allow(0o755);
}

/// Not a test of its own: what [`killed_at_any_moment_nothing_told_is_lost`] starts and kills.
#[tokio::test]
async fn child_that_is_killed() {
    use std::io::Write;
    let Some(path) = std::env::var_os("SEEKNAL_TEST_CHILD_DB") else { return };
    let backend = open(Path::new(&path)).await;
    let run = std::process::id().to_string();
    change(&backend, &run, vec![create(0)]).await;
    let mut tip = load(&backend, &run).await;
    for count in 1_u64.. {
        // Two nodes in one entry: both or neither must be found.
        let mutations =
            vec![set("left", NodeUpdate::running().row_count(count)), set("right", NodeUpdate::running().row_count(count))];
        let part = part_on(Some(&tip), tip.version(), &run, vec![], mutations);
        tip = part.after.clone().unwrap();
        let receipt = applied(commit(&backend, vec![entry(part)]).await.outcomes.remove(0));
        let mut out = std::io::stdout().lock();
        writeln!(out, "ack {count} {}", receipt.runs[0].after).unwrap();
        out.flush().unwrap();
    }
}

#[tokio::test]
async fn killed_at_any_moment_nothing_told_is_lost() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    // A survivor has it open all the time, and every child comes to a database that the last one left behind.
    let survivor = open(&path).await;
    for acks in [1, 7, 40, 90] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_is_killed", "--nocapture"])
            .env("SEEKNAL_TEST_CHILD_DB", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut told = (0_u64, 0_u64);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let note = |line: String, told: &mut (u64, u64)| {
            // A line that the kill cut short was not told.
            let Some(at) = line.find("ack ") else { return };
            let mut words = line[at..].split(' ').skip(1).map(str::parse);
            if let (Some(Ok(count)), Some(Ok(version))) = (words.next(), words.next()) {
                *told = (count, version);
            }
        };
        while told.0 < acks {
            note(lines.next().unwrap().unwrap(), &mut told);
        }
        child.kill().unwrap();
        // Everything but the last line, which may be cut short, counts.
        let mut rest: Vec<String> = lines.map_while(Result::ok).collect();
        rest.pop();
        for line in rest {
            note(line, &mut told);
        }
        child.wait().unwrap();

        let state = load(&survivor, &child.id().to_string()).await;
        let found = |node: &str| state.node(node).and_then(|node| node.row_count).unwrap();
        assert_eq!(found("left"), found("right"), "an entry is whole or not at all");
        assert!(found("left") >= told.0 && state.version().0 >= told.1, "told {told:?}, found {}", found("left"));
        let dead = survivor.processes().await.unwrap().into_iter().find(|other| other.process.pid == child.id()).unwrap();
        assert_eq!(dead.alive, Some(false), "its death is seen at once");
        change(&survivor, &format!("after {acks}"), vec![create(0)]).await;
    }
    assert!(survivor.verify().await.unwrap().is_sound());
}

/// Random batches, as actors send them: chains of entries on a tip, with guards that may fail, several runs in one entry.
#[derive(Debug, Clone)]
struct Step {
    run: u8,
    second: Option<u8>,
    guard: Option<u8>,
    what: Vec<(u8, u8, u8)>,
    send_after: bool,
    ends_batch: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        0..3_u8,
        prop::option::weighted(0.15, 0..3_u8),
        prop::option::weighted(0.3, 0..8_u8),
        prop::collection::vec((0..12_u8, 0..4_u8, any::<u8>()), 1..4),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.4),
    );
    let step = step.prop_map(|(run, second, guard, what, send_after, ends_batch)| Step {
        run,
        second,
        guard,
        what,
        send_after,
        ends_batch,
    });
    prop::collection::vec(step, 1..40)
}

fn mutation((kind, node, value): (u8, u8, u8), exists: bool) -> Mutation {
    let name = ["a", "b", "n/ö", "z"][usize::from(node)];
    let id = node_id(name);
    let interval = hours(i64::from(value % 24), i64::from(value % 24) + 1 + i64::from(value / 64));
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
        2 => Mutation::DeleteNode { node: id },
        3 | 4 => Mutation::AddInterval { node: id, interval },
        5 | 6 => Mutation::RemoveInterval { node: id, interval },
        7 => Mutation::AddPartition { node: id, partition },
        8 => Mutation::RemovePartition { node: id, partition },
        _ => {
            let status = [NodeStatus::Running, NodeStatus::Success, NodeStatus::Failed, NodeStatus::parse("odd")]
                [usize::from(value % 4)]
            .clone();
            Mutation::SetNode {
                node: id,
                update: Box::new(NodeUpdate::status(status).row_count(value.into()).fingerprint(format!("f{value}"))),
                at: stamp,
            }
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn it_decides_and_stores_as_the_ledger_does(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let backend = open(&db(dir.path())).await;
            let mut ledger = Ledger::new();
            let mut tips: BTreeMap<String, Option<RunState>> = BTreeMap::new();
            let mut entries = Vec::new();
            let last = steps.len() - 1;
            for (index, step) in steps.into_iter().enumerate() {
                let mut names: Vec<String> = [Some(step.run), step.second].into_iter().flatten().map(|run| format!("run{run}")).collect();
                names.sort();
                names.dedup();
                let parts: Vec<RunPart> = names
                    .iter()
                    .map(|name| {
                        let committed = ledger.run(name).map_or(Version::NONE, RunState::version);
                        let tip = tips.entry(name.clone()).or_insert_with(|| ledger.run(name).cloned());
                        let mut exists = tip.is_some();
                        let mutations: Vec<Mutation> = step
                            .what
                            .iter()
                            .map(|what| {
                                let made = mutation(*what, exists);
                                exists = !matches!(made, Mutation::Delete { .. });
                                made
                            })
                            .collect();
                        let expect = tip.as_ref().map_or(Version::NONE, RunState::version);
                        let guards = step.guard.map(|kind| guard(kind, expect)).into_iter().collect();
                        let mut part = part_on(tip.as_ref(), committed, name, guards, mutations);
                        *tip = part.after.clone().or_else(|| tip.clone());
                        if !step.send_after {
                            part.after = None;
                        }
                        part
                    })
                    .collect();
                // What a fresh run's version will be, its actor does not know: it waits for the answer.
                let waits = parts.iter().any(|part| part.expect == Version::NONE || part.mutations.iter().any(|m| matches!(m, Mutation::Delete { .. })));
                entries.push(Entry { parts, ..Entry::default() });
                if step.ends_batch || waits || index == last {
                    let batch = Arc::new(Batch::new(std::mem::take(&mut entries)));
                    let expected = ledger.commit(&batch.entries, &NoFences);
                    let answer = backend.commit(Arc::clone(&batch)).await.unwrap();
                    prop_assert_eq!(&answer, &expected, "{:#?}", batch);
                    prop_assert_eq!(&backend.commit(Arc::clone(&batch)).await.unwrap(), &expected);
                    tips.clear();
                }
            }
            for run in 0..3 {
                let name = format!("run{run}");
                let stored = backend.load_run(&run_id(&name)).await.unwrap();
                prop_assert_eq!(stored.as_ref(), ledger.run(&name));
            }
            prop_assert_eq!(backend.list_runs(&RunQuery::default()).await.unwrap(), ledger.list(&RunQuery::default()));
            prop_assert_eq!(backend.retained().await.unwrap(), ledger.retained().into_iter().collect::<Vec<_>>());
            for node in ["a", "b", "n/ö", "z"] {
                let id = node_id(node);
                prop_assert_eq!(backend.last_success(&id).await.unwrap(), ledger.last_success(node));
                prop_assert_eq!(backend.coverage(&id).await.unwrap(), ledger.coverage(node));
                let latest = ledger.runs_of_node(node).next().map(|run| (run.id().clone(), run.node(node).unwrap().clone()));
                prop_assert_eq!(backend.latest_node(&id).await.unwrap(), latest);
            }
            let report = backend.verify().await.unwrap();
            prop_assert!(report.is_sound(), "{:?}", report.problems);
            Ok(())
        })?;
    }
}
