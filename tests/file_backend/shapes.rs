//! The shapes that a document can have: what others wrote survives our writing, and our own reads back exactly.
#![cfg(feature = "file")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::folder::copy_folder;
use chrono::{DateTime, TimeZone, Utc};
use proptest::prelude::*;
use seeknal_state::model::{Batch, Entry, Mutation, Outcome, RunImport, RunPart, time};
use seeknal_state::store::file::FileBackend;
use seeknal_state::{
    BackendOptions, Interval, NewRun, NodeId, NodeState, NodeStatus, NodeUpdate, PartitionKey, RawJson, RunHeader, RunId,
    RunQuery, RunState, RunStatus, RunUpdate, StateBackend, Version,
};

fn at(second: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_704_888_000 + second, 0).unwrap()
}

fn node_id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

async fn open(folder: &Path) -> FileBackend {
    let backend = FileBackend::new(&BackendOptions::new().base_path(folder));
    backend.initialize().await.unwrap();
    backend
}

async fn all(backend: &FileBackend) -> Vec<RunState> {
    let mut runs = Vec::new();
    for summary in backend.list_runs(&RunQuery::default().limit(1000)).await.unwrap().runs {
        runs.push(backend.load_run(&summary.run_id).await.unwrap().unwrap());
    }
    runs
}

async fn change(backend: &FileBackend, run: &str, mutations: Vec<Mutation>) -> Outcome {
    let run = RunId::new(run).unwrap();
    let version = backend.load_run(&run).await.unwrap().map_or(Version::NONE, |state| state.version());
    let part = RunPart { run, base: version, expect: version, guards: Vec::new(), mutations, after: None };
    let batch = Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }]);
    backend.commit(Arc::new(batch)).await.unwrap().outcomes.remove(0)
}

async fn applied(backend: &FileBackend, run: &str, mutations: Vec<Mutation>) {
    let outcome = change(backend, run, mutations).await;
    assert!(matches!(outcome, Outcome::Applied(_)), "{outcome:?}");
}

fn set(node: &str, update: NodeUpdate, second: i64) -> Mutation {
    Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(second) }
}

fn raw(path: &Path) -> RawJson {
    RawJson::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A member somewhere below, as its own text.
fn member(raw: &RawJson, path: &[&str]) -> Option<RawJson> {
    let mut here = raw.clone();
    for key in path {
        here = here.members()?.into_iter().find(|(k, _)| k == key)?.1;
    }
    Some(here)
}

fn keys(raw: &RawJson) -> Vec<String> {
    raw.members().unwrap().into_iter().map(|(key, _)| key).collect()
}

fn fixture(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(Path::new("tests/fixtures").join(name).join("run_state.json"), folder.path().join("run_state.json")).unwrap();
    folder
}

#[tokio::test]
async fn every_fixture_survives_a_change_of_one_node_token_for_token() {
    for (name, run, changed) in [
        ("guide-sample", "run_20240110_120000", "my_node"),
        ("seeknal-1.0.0", "20260208_231057", "source.raw"),
        ("seeknal-2.x-real-4-nodes", "20261123_004355", "transform.clean_orders"),
        ("seeknal-2.x-rich", "run_20240111_120000", "transform.clean_orders"),
    ] {
        let folder = fixture(name);
        let path = folder.path().join("run_state.json");
        let before = raw(&path);
        let backend = open(folder.path()).await;
        assert_eq!(raw(&path), before, "{name}: opening changes nothing");
        applied(
            &backend,
            run,
            vec![set(changed, NodeUpdate::running(), 10), set(changed, NodeUpdate::success().row_count(77), 12)],
        )
        .await;
        backend.checkpoint().await.unwrap();
        let after = raw(&path);
        let told = all(&backend).await;
        for key in keys(&before) {
            if key != "nodes" {
                assert_eq!(member(&after, &[&key]), member(&before, &[&key]), "{name}: {key}");
            }
        }
        let nodes = member(&before, &["nodes"]).unwrap();
        assert_eq!(keys(&member(&after, &["nodes"]).unwrap()), keys(&nodes), "{name}: the order of the nodes");
        for node in keys(&nodes) {
            let touched: &[&str] = &["status", "row_count", "last_run", "duration_ms"];
            for key in keys(&member(&nodes, &[&node]).unwrap()) {
                if node != changed || !touched.contains(&key.as_str()) {
                    let path = ["nodes", &node, &key];
                    assert_eq!(member(&after, &path), member(&before, &path), "{name}: {path:?}");
                }
            }
        }
        assert_eq!(member(&after, &["nodes", changed, "row_count"]).unwrap().as_str(), "77", "{name}");
        assert_eq!(member(&after, &["nodes", changed, "status"]).unwrap().as_str(), "\"success\"", "{name}");
        backend.close().await.unwrap();
        let again = open(folder.path()).await;
        assert_eq!(all(&again).await, told, "{name}");
    }
}

#[tokio::test]
async fn what_foreign_files_say_is_understood() {
    let backend = open(fixture("seeknal-2.x-rich").path()).await;
    let run = &all(&backend).await[0];
    assert_eq!((run.id().as_str(), run.header().status.as_str()), ("run_20240111_120000", "failed"));
    let orders = run.node("source.iceberg_orders").unwrap();
    assert_eq!(orders.row_count, Some(9_007_199_254_740_993));
    assert_eq!(orders.duration_ms, Some(1500));
    assert_eq!(orders.finished_at, Some(time::parse("2024-01-10T12:00:00.123456Z").unwrap()));
    assert_eq!(orders.intervals.iter().collect::<Vec<_>>(), [Interval::parse("2024-01-01", "2024-01-10").unwrap()]);
    assert_eq!(orders.partitions.len(), 2);
    assert!(orders.fingerprint.as_ref().unwrap().is_object());
    assert_eq!(orders.watermarks.get("last_watermark").unwrap().as_text().unwrap(), "2024-01-10 11:58:59.999999");
    assert_eq!(run.node("model.prévisions été/β").unwrap().finished_at, None);
    let sample = open(fixture("guide-sample").path()).await;
    let run = &all(&sample).await[0];
    assert_eq!(
        (run.header().status.clone(), run.header().created_at),
        (RunStatus::Success, time::parse("2024-01-10T12:00:00Z").unwrap())
    );
    assert_eq!(run.node("my_node").unwrap().fingerprint.as_ref().unwrap().content_hash().unwrap(), "abc123...");
}

#[tokio::test]
async fn the_oldest_runners_map_is_read_and_never_written() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("state")).unwrap();
    let bare = folder.path().join("state/execution_state.json");
    std::fs::copy("tests/fixtures/old-runner/state/execution_state.json", &bare).unwrap();
    let before = raw(&bare);
    let backend = open(folder.path()).await;
    let runs = all(&backend).await;
    let id = runs[0].id().clone();
    let node = runs[0].node("source.raw_customers").unwrap();
    assert_eq!((node.duration_ms, node.row_count, runs[0].node_count()), (Some(124), Some(0), 4));
    assert_eq!(node.finished_at, Some(time::parse("2026-11-23T01:22:55.154480Z").unwrap()));
    backend.close().await.unwrap();
    assert!(!folder.path().join("run_state.json").exists());
    let backend = open(folder.path()).await;
    assert_eq!(all(&backend).await[0].id(), &id, "the same id at every opening");
    applied(&backend, id.as_str(), vec![set("source.raw_customers", NodeUpdate::new().row_count(5), 3)]).await;
    let told = all(&backend).await;
    backend.close().await.unwrap();
    assert_eq!(raw(&bare), before);
    let written = raw(&folder.path().join("run_state.json"));
    let node = ["nodes", "source.raw_customers"];
    assert_eq!(member(&written, &[node[0], node[1], "duration"]).unwrap().as_str(), "0.12366771697998047");
    assert_eq!(member(&written, &[node[0], node[1], "last_run"]).unwrap().as_str(), "1795396975.15448");
    let again = open(folder.path()).await;
    assert_eq!(all(&again).await, told);
}

/// What claims need stands in the guide's shape as members of the node; Seeknal's own shape is left alone, and what others keep under our names stays.
#[tokio::test]
async fn claims_are_written_where_there_is_something_to_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run_state.json");
    std::fs::write(
        &path,
        r#"{"run_id":"r","status":"running","nodes":{"odd":{"status":"failed","depends_on":"x","attempts":3,"max_attempts":1.50,
           "worker":{"a":1e-300},"token":"t"},"plain":{"status":"success","depends_on":["odd"]}}}"#,
    )
    .unwrap();
    let backend = open(folder.path()).await;
    let run = all(&backend).await.remove(0);
    let odd = run.node("odd").unwrap();
    assert_eq!((odd.depends_on.len(), odd.attempts.len(), odd.max_attempts, odd.token), (0, 0, None, None));
    assert_eq!(run.node("plain").unwrap().depends_on.as_slice(), [node_id("odd")]);
    applied(&backend, "r", vec![set("odd", NodeUpdate::new().row_count(7), 1)]).await;
    let own = NodeUpdate::new().depends_on(["plain"]).max_attempts(2);
    applied(&backend, "r", vec![set("own", own, 1), set("bare", NodeUpdate::success(), 1)]).await;
    backend.checkpoint().await.unwrap();
    let written = raw(&path);
    let text = |keys: &[&str]| member(&written, keys).map(|raw| raw.as_str().to_owned());
    for (key, kept) in [("depends_on", "\"x\""), ("attempts", "3"), ("max_attempts", "1.50"), ("worker", r#"{"a":1e-300}"#)] {
        assert_eq!(text(&["nodes", "odd", key]).as_deref(), Some(kept), "{key}");
    }
    assert_eq!(text(&["nodes", "own", "depends_on"]).as_deref(), Some(r#"["plain"]"#));
    assert!(
        ["attempts", "depends_on", "max_attempts", "worker", "token"].iter().all(|key| text(&["nodes", "bare", key]).is_none())
    );
    // Taken over: what was somebody else's text under our names gives way, and is not lost.
    applied(&backend, "r", vec![set("odd", NodeUpdate::running().depends_on(["plain"]), 2)]).await;
    let before = all(&backend).await;
    backend.close().await.unwrap();
    let after = all(&open(folder.path()).await).await;
    assert_eq!(after, before);
    assert_eq!(after[0].node("odd").unwrap().attempts.len(), 1);
}

#[tokio::test]
async fn a_new_run_in_seeknals_file_keeps_it_readable_for_seeknal() {
    let folder = fixture("seeknal-2.x-real-4-nodes");
    let path = folder.path().join("run_state.json");
    let before = raw(&path);
    let backend = open(folder.path()).await;
    let old = all(&backend).await[0].clone();
    let start = Mutation::Create { run: NewRun::running(), at: time::parse("2027-01-01").unwrap() };
    let update = NodeUpdate::success().row_count(9).fingerprint("abc").metadata("k", "v");
    applied(&backend, "run_new", vec![start, set("source.raw_orders", update, 5), set("brand.new", NodeUpdate::running(), 6)])
        .await;
    let told = all(&backend).await;
    backend.close().await.unwrap();
    let after = raw(&path);
    for key in ["schema_version", "seeknal_version"] {
        assert_eq!(member(&after, &[key]), member(&before, &[key]));
    }
    assert_eq!(member(&after, &["run_id"]).unwrap().as_str(), "\"run_new\"");
    assert_eq!(member(&after, &["last_run"]).unwrap().as_str(), "\"2027-01-01T00:00:00\"");
    for node in ["source.raw_orders", "brand.new"] {
        let object = member(&after, &["nodes", node]).unwrap();
        for key in ["hash", "last_run", "status"] {
            assert!(member(&object, &[key]).unwrap().as_text().is_some(), "{node}: {key}");
        }
        for key in ["duration_ms", "row_count", "version"] {
            assert!(member(&object, &[key]).unwrap().read::<i64>().is_ok(), "{node}: {key}");
        }
        assert!(member(&object, &["metadata"]).unwrap().members().is_some());
    }
    assert_eq!(member(&after, &["nodes", "source.raw_orders", "fingerprint"]).unwrap().as_str(), "{\"content_hash\":\"abc\"}");
    assert_eq!(member(&after, &["nodes", "brand.new", "fingerprint"]), None);
    let again = open(folder.path()).await;
    assert_eq!(all(&again).await, told, "also what Seeknal's words cannot say");
    assert_eq!(again.load_run(old.id()).await.unwrap().unwrap(), old, "the run that it held is whole");
    // Deleting the run that brought Seeknal's shape does not change the shape.
    applied(&again, old.id().as_str(), vec![Mutation::Delete { keep_coverage: true }]).await;
    again.close().await.unwrap();
    assert_eq!(member(&raw(&path), &["schema_version"]), member(&before, &["schema_version"]));
}

#[tokio::test]
async fn a_document_that_another_program_rewrote_gets_its_history_from_the_previous_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run_state.json");
    let backend = open(folder.path()).await;
    let interval = Mutation::AddInterval { node: node_id("n"), interval: Interval::parse("2024-01-01", "2024-01-02").unwrap() };
    applied(&backend, "run_1", vec![Mutation::Create { run: NewRun::running(), at: at(0) }, interval]).await;
    applied(&backend, "run_0", vec![Mutation::Create { run: NewRun::running(), at: at(-9) }]).await;
    applied(&backend, "run_1", vec![Mutation::Delete { keep_coverage: true }]).await;
    backend.checkpoint().await.unwrap();
    applied(&backend, "run_0", vec![set("m", NodeUpdate::running(), 1)]).await;
    backend.close().await.unwrap();
    std::fs::write(&path, "{\"schema_version\":\"2.0\",\"run_id\":\"sk\",\"last_run\":\"2024-02-01T00:00:00\",\"nodes\":{\"m\":{\"hash\":\"h\",\"status\":\"success\",\"last_run\":\"\"}}}").unwrap();
    let backend = FileBackend::new(&BackendOptions::new().base_path(folder.path()));
    let report = backend.initialize().await.unwrap();
    assert!(report.notices.iter().any(|notice| notice.contains("rewritten") && notice.contains(".prev")), "{:?}", report.notices);
    let runs = all(&backend).await;
    assert_eq!(runs.iter().map(|run| run.id().as_str()).collect::<Vec<_>>(), ["sk", "run_0"]);
    assert!(runs[1].node("m").is_some(), "also what was written after the last checkpoint but one");
    assert_eq!(backend.coverage(&node_id("n")).await.unwrap().intervals.len(), 1);
    applied(&backend, "sk", vec![set("m", NodeUpdate::failed("boom"), 9)]).await;
    let told = all(&backend).await;
    backend.close().await.unwrap();
    assert_eq!(all(&open(folder.path()).await).await, told);
}

#[tokio::test]
async fn odd_values_keep_their_text_until_they_are_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run_state.json");
    let node = r#"{"status":7,"row_count":"n/a","duration_ms":-5,"finished_at":"","fingerprint":"","last_run":1e3,"x":1e-300,"y":"\u0000\u65e5","error":null,
        "completed_intervals":[["2024-01-02 00:00:00","2024-01-03 00:00:00"],["a","b"],["2024-01-01 00:00:00","2024-01-02 00:00:00"],{"odd":1}],
        "completed_partitions":["b",3,"a"],"run_id":"other"}"#;
    std::fs::write(
        &path,
        format!("{{\"started_at\":\"soon\",\"z\":[],\"nodes\":{{\"b\":{node},\"a\":{node}}},\"y\":9007199254740993}}"),
    )
    .unwrap();
    let before = raw(&path);
    let backend = open(folder.path()).await;
    let runs = all(&backend).await;
    let other = runs.iter().find(|run| run.id().as_str() == "other").unwrap();
    assert_eq!(other.node_count(), 2);
    let new = Interval::parse("2024-01-05", "2024-01-06").unwrap();
    let gone = Interval::parse("2024-01-02T12:00", "2024-01-03").unwrap();
    applied(
        &backend,
        "other",
        vec![
            Mutation::AddInterval { node: node_id("b"), interval: new },
            Mutation::RemoveInterval { node: node_id("b"), interval: gone },
            Mutation::AddPartition { node: node_id("b"), partition: PartitionKey::new("c").unwrap() },
            Mutation::RemovePartition { node: node_id("b"), partition: PartitionKey::new("b").unwrap() },
        ],
    )
    .await;
    backend.checkpoint().await.unwrap();
    let after = raw(&path);
    assert_eq!(member(&after, &["nodes", "a"]), member(&before, &["nodes", "a"]));
    assert_eq!(keys(&member(&after, &["nodes"]).unwrap()), ["b", "a"]);
    for key in ["started_at", "z", "y"] {
        assert_eq!(member(&after, &[key]), member(&before, &[key]), "{key}");
    }
    for key in ["status", "row_count", "duration_ms", "finished_at", "fingerprint", "last_run", "x", "y", "error", "run_id"] {
        assert_eq!(member(&after, &["nodes", "b", key]), member(&before, &["nodes", "b", key]), "{key}");
    }
    assert_eq!(
        member(&after, &["nodes", "b", "completed_intervals"]).unwrap().as_str(),
        r#"[["2024-01-02 00:00:00","2024-01-02 12:00:00"],["a","b"],["2024-01-01 00:00:00","2024-01-02 00:00:00"],{"odd":1},["2024-01-05 00:00:00","2024-01-06 00:00:00"]]"#
    );
    assert_eq!(member(&after, &["nodes", "b", "completed_partitions"]).unwrap().as_str(), r#"[3,"a","c"]"#);
    let told = all(&backend).await;
    backend.close().await.unwrap();
    assert_eq!(all(&open(folder.path()).await).await, told);
}

fn an_id() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => prop::sample::select(vec!["a", "b", "../x", "a/b", "日本 \"語\"", "back\\slash", "{}", "\u{2028}", "seeknal_state"]).prop_map(str::to_owned),
        1 => "[a-z\"\\\\/{}:, é]{1,6}",
    ]
}

fn an_update() -> impl Strategy<Value = NodeUpdate> {
    (0..7_u8, proptest::option::of(0..3_u64), proptest::option::of("[a\"{}\\\\é\n]{0,4}"), proptest::option::of(-5..5_i64))
        .prop_map(|(status, rows, text, second)| {
            let mut update = match status {
                0 => NodeUpdate::pending(),
                1 => NodeUpdate::running(),
                2 => NodeUpdate::success(),
                3 => NodeUpdate::failed("why \"not\""),
                4 => NodeUpdate::cached(),
                5 => NodeUpdate::new().clear_error().clear_row_count().clear_fingerprint(),
                _ => NodeUpdate::status(NodeStatus::parse("upstream_failed")),
            };
            if let Some(rows) = rows {
                update = update.row_count(u64::MAX - rows).watermark("last_watermark", "w").watermark("mine", "x");
            }
            if let Some(text) = text {
                update = update
                    .fingerprint(text.as_str())
                    .metadata("checksum", "00000000")
                    .metadata(text, serde_json::json!({"seeknal_state": [1, {}]}));
            }
            if let Some(second) = second {
                update = update.started_at(at(second) + chrono::Duration::microseconds(second)).attempt(3);
            }
            update
        })
}

#[expect(clippy::large_enum_variant, reason = "a test makes some dozens of them")]
#[derive(Debug, Clone)]
enum Step {
    Create(String, i64),
    Set(String, String, NodeUpdate, i64),
    Interval(String, String, i64, i64, bool),
    Partition(String, String, String),
    Update(String, bool),
    DeleteNode(String, String),
    Delete(String, bool),
    Import(String, usize),
    Checkpoint,
    Reopen,
}

fn a_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (an_id(), -50..50_i64).prop_map(|(run, second)| Step::Create(run, second)),
        6 => (an_id(), an_id(), an_update(), 0..50_i64).prop_map(|(run, node, update, second)| Step::Set(run, node, update, second)),
        3 => (an_id(), an_id(), 0..20_i64, 1..5_i64, any::<bool>()).prop_map(|(r, n, from, length, add)| Step::Interval(r, n, from, length, add)),
        2 => (an_id(), an_id(), an_id()).prop_map(|(r, n, p)| Step::Partition(r, n, p)),
        1 => (an_id(), any::<bool>()).prop_map(|(run, ends)| Step::Update(run, ends)),
        1 => (an_id(), an_id()).prop_map(|(run, node)| Step::DeleteNode(run, node)),
        1 => (an_id(), any::<bool>()).prop_map(|(run, keep)| Step::Delete(run, keep)),
        2 => (an_id(), 0..4_usize).prop_map(|(run, shape)| Step::Import(run, shape)),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Reopen),
    ]
}

/// A run as a migration brings it: with the words of the file that it came from.
fn import(shape: usize) -> RunImport {
    let mut header = RunHeader::new(RunStatus::parse("partial"), at(7));
    header.metadata.insert("k", RawJson::parse("1e-300").unwrap());
    let mut node = NodeState::new(NodeStatus::Success);
    node.row_count = Some(5);
    let (top, text) = match shape {
        0 => (None, None),
        1 => (
            Some(r#"{"run_id":"x","started_at":"2024-01-01 00:00:00","config":{"a":1e3}}"#),
            Some(r#"{"status":"success","row_count":5.0,"hash":"h"}"#),
        ),
        2 => (
            Some(r#"{"schema_version":"2.0","last_run":"2024-01-01","run_id":7}"#),
            Some(r#"{"hash":"h","last_run":"","status":"failed","row_count":5}"#),
        ),
        _ => (Some(r#"{"version":"1.0.0","q":null}"#), Some(r#"{"duration":1.5,"last_run":17.25,"status":[]}"#)),
    };
    header.extra = top.map(|text| RawJson::parse(text).unwrap());
    node.extra = text.map(|text| RawJson::parse(text).unwrap());
    RunImport { header, nodes: BTreeMap::from([(node_id("a"), Arc::new(node.clone())), (node_id("imported"), Arc::new(node))]) }
}

/// Everything that must be the same after another opening.
async fn everything(backend: &FileBackend) -> impl PartialEq + std::fmt::Debug + use<> {
    let runs: Vec<_> = all(backend).await.into_iter().map(|run| (run.created_version(), run)).collect();
    (runs, backend.retained().await.unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_was_committed_reads_back_exactly(steps in prop::collection::vec(a_step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let mut backend = open(folder.path()).await;
            for step in steps {
                match step {
                    Step::Create(run, second) => { change(&backend, &run, vec![Mutation::Create { run: NewRun::running(), at: at(second) }]).await; }
                    Step::Set(run, node, update, second) => { change(&backend, &run, vec![set(&node, update, second)]).await; }
                    Step::Interval(run, node, from, length, add) => {
                        let interval = Interval::new(at(from), at(from + length)).unwrap();
                        let node = node_id(&node);
                        let mutation = if add { Mutation::AddInterval { node, interval } } else { Mutation::RemoveInterval { node, interval } };
                        change(&backend, &run, vec![mutation]).await;
                    }
                    Step::Partition(run, node, key) => {
                        change(&backend, &run, vec![Mutation::AddPartition { node: node_id(&node), partition: PartitionKey::new(key).unwrap() }]).await;
                    }
                    Step::Update(run, ends) => {
                        let update = if ends { RunUpdate::success().metadata("m", "v") } else { RunUpdate::running() };
                        change(&backend, &run, vec![Mutation::Update { update, at: at(60) }]).await;
                    }
                    Step::DeleteNode(run, node) => { change(&backend, &run, vec![Mutation::DeleteNode { node: node_id(&node) }]).await; }
                    Step::Delete(run, keep) => { change(&backend, &run, vec![Mutation::Delete { keep_coverage: keep }]).await; }
                    Step::Import(run, shape) => { change(&backend, &run, vec![Mutation::Import(Box::new(import(shape)))]).await; }
                    Step::Checkpoint => backend.checkpoint().await.unwrap(),
                    Step::Reopen => {
                        let told = everything(&backend).await;
                        backend.close().await.unwrap();
                        backend = open(folder.path()).await;
                        assert_eq!(everything(&backend).await, told);
                    }
                }
            }
            let told = everything(&backend).await;
            // As a kill leaves it, and as a close does.
            let killed = tempfile::tempdir().unwrap();
            copy_folder(folder.path(), killed.path());
            let seen = FileBackend::new(&BackendOptions::new().base_path(killed.path()).read_only(true));
            seen.initialize().await.unwrap();
            assert_eq!(everything(&seen).await, told);
            backend.close().await.unwrap();
            let path = folder.path().join("run_state.json");
            let again = open(folder.path()).await;
            assert_eq!(everything(&again).await, told);
            assert!(again.verify().await.unwrap().is_sound());
            again.close().await.unwrap();
            if path.exists() {
                serde_json::from_str::<serde_json::Value>(&std::fs::read_to_string(&path).unwrap()).unwrap();
            }
        });
    }
}
