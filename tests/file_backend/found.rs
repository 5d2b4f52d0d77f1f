//! What other programs wrote, understood as they meant it, and written back as they wrote it.
#![cfg(all(feature = "project", feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use seeknal_state::model::time;
use seeknal_state::project::{Settings, relocate};
use seeknal_state::store::file::FileBackend;
use seeknal_state::{
    BackendOptions, Coordinator, NewRun, NodeState, NodeUpdate, PartitionKey, RawJson, RunQuery, RunState, StateBackend,
    StoreErrorKind, create_state_backend,
};
use tempfile::TempDir;

const DOCUMENT: &str = "target/run_state.json";
const BARE: &str = "target/state/execution_state.json";

/// A project with this text in this place.
fn project_at(place: &str, text: impl AsRef<[u8]>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(place);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    dir
}

fn project(text: impl AsRef<[u8]>) -> TempDir {
    project_at(DOCUMENT, text)
}

/// Seeknal's document with one node `n`, which has these members besides those that its reader needs.
fn seeknal(members: &str) -> String {
    format!(
        r#"{{"schema_version": "2.0", "seeknal_version": "2.1.0", "last_run": "2024-01-10T12:00:00", "run_id": "r", "config": {{}},
            "nodes": {{"n": {{"hash": "h", "version": 1, {members}}}}}}}"#
    )
}

/// The guide's document with one node `n` of these members.
fn guide(members: &str) -> String {
    format!(
        r#"{{"run_id": "r", "started_at": "2024-01-10T12:00:00Z", "finished_at": null, "status": "running", "nodes": {{"n": {{{members}}}}}}}"#
    )
}

/// All runs as they are read, newest first, and what the opening said.
async fn opened(dir: &Path) -> (Vec<RunState>, Vec<String>) {
    let backend = FileBackend::new(&BackendOptions::new().base_path(dir.join("target")).read_only(true));
    let notices = backend.initialize().await.unwrap_or_else(|error| panic!("{error}")).notices;
    let mut runs = Vec::new();
    for run in backend.list_runs(&RunQuery::default()).await.unwrap().runs {
        runs.push(backend.load_run(&run.run_id).await.unwrap().unwrap());
    }
    (runs, notices)
}

async fn refusal(dir: &Path) -> String {
    let backend = FileBackend::new(&BackendOptions::new().base_path(dir.join("target")).read_only(true));
    backend.initialize().await.unwrap_err().to_string()
}

/// The node `n` of the newest run.
async fn node(text: &str) -> NodeState {
    opened(project(text).path()).await.0[0].node("n").unwrap().clone()
}

async fn move_to(project: &Path, home: relocate::Home) {
    let settings = Settings::load(project, &|_| None).unwrap();
    let now = time::parse("2026-01-01").unwrap();
    relocate::execute(&settings, home, now, |_| ControlFlow::Continue(())).await.unwrap();
}

/// The document after a move to the database and back into an empty folder.
async fn back_from_the_database(dir: &Path) -> String {
    let document = dir.join(DOCUMENT);
    move_to(dir, relocate::Home::Database).await;
    for entry in fs::read_dir(dir.join("target")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("run_state.json") {
            fs::remove_file(path).unwrap();
        }
    }
    let _where_there_is_one = fs::remove_dir_all(dir.join("target/state"));
    move_to(dir, relocate::Home::File).await;
    fs::read_to_string(document).unwrap()
}

async fn open(dir: &Path) -> Coordinator {
    Coordinator::open(create_state_backend("file", &BackendOptions::new().base_path(dir.join("target"))).unwrap()).await.unwrap()
}

/// A member somewhere below, as its own text.
fn member(text: &str, path: &[&str]) -> Option<String> {
    let mut here = RawJson::parse(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    for key in path {
        here = here.members()?.into_iter().find(|(k, _)| k == key)?.1;
    }
    Some(here.to_string())
}

/// `last_run` and `finished_at` of one node tell the same thing in two places, as `last_watermark` and `watermarks` do.
#[tokio::test(flavor = "multi_thread")]
async fn members_that_tell_one_thing_together_stay_as_they_are() {
    for members in [
        r#""status":"success","last_run":"2024-01-10T12:00:00","started_at":"2024-01-10T12:00:00","finished_at":"2024-01-10T12:00:01.500000""#,
        r#""status":"success","last_run":"2024-01-10T12:00:01.500000","started_at":"2024-01-10T12:00:00","finished_at":null"#,
        r#""status":"running","last_run":"2024-01-10T12:00:01","started_at":null"#,
        r#""status":"running","last_run":"2024-01-10T12:00:01","started_at":"2024-01-10T12:00:03""#,
        r#""status":"success","last_run":"","watermarks":{"a":"1"},"last_watermark":"w","pg_last_watermark":"p""#,
        r#""status":"success","last_run":"","last_watermark":"w","watermarks":{"a":"1"}"#,
        r#""status":"success","last_run":"","duration_ms":null,"duration":1.5"#,
    ] {
        for document in [seeknal(members), guide(members)] {
            let dir = project(&document);
            let after = back_from_the_database(dir.path()).await;
            for (key, value) in RawJson::parse(&format!("{{{members}}}")).unwrap().members().unwrap() {
                assert_eq!(member(&after, &["nodes", "n", &key]), Some(value.to_string()), "{key} of {document}");
            }
        }
    }
}

/// Once one of them says something else, all of them do.
#[tokio::test(flavor = "multi_thread")]
async fn members_that_tell_one_thing_together_change_together() {
    let members = r#""status":"success","last_run":"2024-01-10T12:00:00","started_at":"2024-01-10T12:00:00","finished_at":"2024-01-10T12:00:01""#;
    let dir = project(seeknal(members));
    let state = open(dir.path()).await;
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    let told = state.get_node_state("r", "n").await.unwrap().unwrap();
    state.close().await.unwrap();
    let after = fs::read_to_string(dir.path().join(DOCUMENT)).unwrap();
    let finished = member(&after, &["nodes", "n", "finished_at"]).unwrap();
    assert_eq!(member(&after, &["nodes", "n", "last_run"]), Some(finished));
    let (runs, _) = opened(dir.path()).await;
    assert_eq!(runs[0].node("n").unwrap().without_version(), told.without_version());
}

/// Python writes numbers that JSON does not know.
#[tokio::test(flavor = "multi_thread")]
async fn values_that_are_no_numbers_are_kept() {
    let members = r#""status":"success","last_run":"","row_count":NaN,"metadata":{"rate":NaN,"all":[1,Infinity,-Infinity],"text":"NaN, \"Infinity","k":"-Infinity"}"#;
    let dir = project(seeknal(members));
    let before = fs::read_to_string(dir.path().join(DOCUMENT)).unwrap();
    let (runs, notices) = opened(dir.path()).await;
    let found = runs[0].node("n").unwrap();
    assert_eq!((found.row_count, found.metadata.get("rate").unwrap().as_text().as_deref()), (None, Some("NaN")));
    assert!(notices.iter().any(|notice| notice.contains("4 values") && notice.contains("line 2, column")), "{notices:?}");
    let (metadata, nodes) = ("\"rate\": NaN", "\"row_count\": NaN");

    let state = open(dir.path()).await;
    state.create_run("ours", NewRun::running()).await.unwrap();
    state.set_node_state("ours", "m", NodeUpdate::success()).await.unwrap();
    state.close().await.unwrap();
    let after = fs::read_to_string(dir.path().join(DOCUMENT)).unwrap();
    for kept in [metadata, nodes, "Infinity,", " -Infinity\n", "\"k\": \"-Infinity\"", "\"text\": \"NaN, \\\"Infinity\""] {
        assert!(after.contains(kept), "{kept}: {after}");
    }
    let copies: Vec<_> = fs::read_dir(dir.path().join("target"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().unwrap().contains("run_state.json.original-"))
        .collect();
    assert_eq!(copies.len(), 1);
    assert_eq!(fs::read_to_string(&copies[0]).unwrap(), before);
    // What we wrote with them is still ours and whole.
    let (again, notices) = opened(dir.path()).await;
    assert!(!notices.iter().any(|notice| notice.contains("edited") || notice.contains("rewritten")), "{notices:?}");
    assert_eq!(again[1].node("n").unwrap().without_version(), found.without_version());

    let dir = project(seeknal(members));
    let after = back_from_the_database(dir.path()).await;
    assert!(after.contains(metadata) && after.contains(nodes), "{after}");
}

#[tokio::test]
async fn a_word_in_a_text_is_not_taken_for_the_fault_behind_it() {
    let dir = project(seeknal(r#""status":"success","metadata":{"m":"NaN" "x":1}"#));
    let why = refusal(dir.path()).await;
    assert!(!why.contains("NaN"), "{why}");
    let dir = project(seeknal(r#""status":"success","metadata":{NaN:1}"#));
    refusal(dir.path()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_without_nodes_is_a_run_without_nodes() {
    for (text, runs) in [
        (r#"{"run_id":"r","started_at":"2024-01-10T12:00:00Z","status":"running"}"#, 1),
        (r#"{"schema_version":"2.0","seeknal_version":"2.0.0","last_run":"2024-01-10T12:00:00","run_id":"r","config":{}}"#, 1),
        (r#"{"run_id":"r","status":"running","nodes":null}"#, 1),
        ("{}", 0),
        (r#"{"nodes":{}}"#, 0),
        (r#"{"nodes":null}"#, 0),
    ] {
        let dir = project(text);
        let (found, _) = opened(dir.path()).await;
        assert_eq!(found.len(), runs, "{text}");
        assert!(found.iter().all(|run| run.id().as_str() == "r" && run.node_count() == 0), "{text}");
        let state = open(dir.path()).await;
        state.ensure_run("r", NewRun::running()).await.unwrap();
        state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
        state.close().await.unwrap();
        let (found, _) = opened(dir.path()).await;
        assert_eq!((found.len(), found[0].node_count()), (1, 1), "{text}");
    }
    for text in [r#"{"runs":[]}"#, r#"{"status":"success"}"#] {
        let why = refusal(project(text).path()).await;
        assert!(why.contains("this is no state"), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_numbers_that_were_written_as_fractions_are_read() {
    for (text, duration, rows) in [
        (r#""duration_ms":1500.75,"row_count":1500.0"#, Some(1501), Some(1500)),
        (r#""duration_ms":9E0,"row_count":1e1"#, Some(9), Some(10)),
        (r#""duration_ms":-1,"row_count":-1"#, None, None),
        (r#""duration_ms":1e300,"row_count":1500.5"#, None, None),
        (r#""duration_ms":"1500","row_count":9007199254740994.0"#, None, None),
        (r#""duration_ms":0.0,"row_count":18446744073709551615"#, Some(0), Some(u64::MAX)),
    ] {
        let document = seeknal(&format!(r#""status":"success","last_run":"",{text}"#));
        let found = node(&document).await;
        assert_eq!((found.duration_ms, found.row_count), (duration, rows), "{text}");
        let after = back_from_the_database(project(&document).path()).await;
        for key in ["duration_ms", "row_count"] {
            assert_eq!(member(&after, &["nodes", "n", key]), member(&document, &["nodes", "n", key]), "{text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn completed_work_is_read_in_every_shape() {
    let day = |day: u32| time::parse(&format!("2024-01-0{day}")).unwrap();
    for (text, added) in [
        (r#"[["2024-01-01","2024-01-02"]]"#, r#"["2024-01-03T00:00:00","2024-01-04T00:00:00"]"#),
        (
            r#"[{"start":"2024-01-01T00:00:00","end":"2024-01-02T00:00:00"}]"#,
            r#"{"start":"2024-01-03T00:00:00","end":"2024-01-04T00:00:00"}"#,
        ),
        (r#"["2024-01-01T00:00:00Z/2024-01-02T00:00:00Z"]"#, r#""2024-01-03T00:00:00Z/2024-01-04T00:00:00Z""#),
    ] {
        let document = seeknal(&format!(
            r#""status":"success","last_run":"","completed_intervals":{text},"completed_partitions":[20240101,"p"]"#
        ));
        let dir = project(&document);
        let (runs, notices) = opened(dir.path()).await;
        assert!(notices.is_empty(), "{notices:?}");
        let found = runs[0].node("n").unwrap();
        let intervals: Vec<_> = found.intervals.iter().map(|found| (found.start(), found.end())).collect();
        assert_eq!(intervals, [(day(1), day(2))], "{text}");
        let partitions: Vec<_> = found.partitions.iter().map(|key| key.as_str().to_owned()).collect();
        assert_eq!(partitions, ["20240101", "p"]);
        let after = back_from_the_database(dir.path()).await;
        assert_eq!(
            member(&after, &["nodes", "n", "completed_intervals"]),
            member(&document, &["nodes", "n", "completed_intervals"])
        );
        assert_eq!(member(&after, &["nodes", "n", "completed_partitions"]).unwrap(), r#"[20240101,"p"]"#);
        // What is new is written as the rest of the list is.
        let dir = project(&document);
        let state = open(dir.path()).await;
        state.add_completed_interval("r", "n", day(3)..day(4)).await.unwrap();
        state.close().await.unwrap();
        let after = fs::read_to_string(dir.path().join(DOCUMENT)).unwrap();
        let list = member(&after, &["nodes", "n", "completed_intervals"]).unwrap();
        assert!(list.ends_with(&format!(",{added}]")), "{list}");
    }
}

#[tokio::test]
async fn completed_work_that_is_not_understood_is_told_once() {
    let text =
        r#""status":"success","completed_intervals":[[1,2],["2024-01-01","2024-01-02"]],"completed_partitions":{"dt":true}"#;
    let (runs, notices) = opened(project(seeknal(text)).path()).await;
    assert_eq!(runs[0].node("n").unwrap().intervals.len(), 1);
    let told: Vec<_> = notices.iter().filter(|notice| notice.contains("completed_intervals")).collect();
    assert_eq!(told.len(), 1, "{notices:?}");
    assert!(told[0].contains("\"n\"") && told[0].contains('2'), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stamps_that_count_seconds_are_read() {
    let at = time::parse("2026-11-23T00:49:35.154480").unwrap();
    for last_run in ["\"1795394975.15448\"", "1795394975.15448"] {
        let document = seeknal(&format!(r#""status":"success","last_run":{last_run}"#));
        assert_eq!(node(&document).await.finished_at, Some(at), "{last_run}");
        let document = document.replace("\"2024-01-10T12:00:00\"", last_run);
        let dir = project(&document);
        assert_eq!(opened(dir.path()).await.0[0].header().started_at, Some(at), "{last_run}");
        let after = back_from_the_database(dir.path()).await;
        assert_eq!(member(&after, &["last_run"]).as_deref(), Some(last_run));
        assert_eq!(member(&after, &["nodes", "n", "last_run"]).as_deref(), Some(last_run));
    }
    // Short ones are years and dates.
    assert_eq!(node(&seeknal(r#""status":"success","last_run":"20240110""#)).await.finished_at, None);
}

/// Seeknal's reader wants an object for a fingerprint, and `hash`, `last_run` and `status` in every node.
#[tokio::test(flavor = "multi_thread")]
async fn what_came_from_seeknal_is_written_for_its_reader() {
    let map = r#"{"n":{"status":"success","duration":1.5,"row_count":10,"last_run":1795394975.15448}}"#;
    let unmarked = r#"{"last_run":"2024-01-10T12:00:00","run_id":"r","config":{},"nodes":{"n":{"hash":"h","last_run":"","status":"success"}}}"#;
    let told = r#"{"seeknal_version":"2.1.0","run_id":"r","nodes":{"n":{"status":"success","last_run":""}}}"#;
    for (place, text) in [(BARE, map), (DOCUMENT, map), (DOCUMENT, unmarked), (DOCUMENT, told)] {
        let by_a_run_of_ours = {
            let dir = project_at(place, text);
            let state = open(dir.path()).await;
            state.create_run("ours", NewRun::running()).await.unwrap();
            state.set_node_state("ours", "m", NodeUpdate::success().fingerprint("abc")).await.unwrap();
            state.close().await.unwrap();
            fs::read_to_string(dir.path().join(DOCUMENT)).unwrap()
        };
        let by_a_move = back_from_the_database(project_at(place, text).path()).await;
        for after in [&by_a_run_of_ours, &by_a_move] {
            assert_eq!(member(after, &["schema_version"]).as_deref(), Some("\"2.0\""), "{text}: {after}");
            for key in ["hash", "last_run", "status"] {
                assert!(member(after, &["nodes", "n", key]).is_some(), "{text}: {key}: {after}");
            }
        }
        let print = member(&by_a_run_of_ours, &["nodes", "m", "fingerprint"]).unwrap();
        assert_eq!(print, r#"{"content_hash":"abc"}"#);
    }
    // Where the runner was, Seeknal will read, also if it had nothing to say.
    let dir = project_at(BARE, "{}");
    let state = open(dir.path()).await;
    state.create_run("ours", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    let after = fs::read_to_string(dir.path().join(DOCUMENT)).unwrap();
    assert_eq!(member(&after, &["schema_version"]).as_deref(), Some("\"2.0\""), "{after}");
    // The guide's own shape stays what it is.
    let after = back_from_the_database(project(guide(r#""status":"success""#)).path()).await;
    assert_eq!(member(&after, &["schema_version"]), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shape_decides_how_a_document_is_read_and_not_its_place() {
    let text = seeknal(r#""status":"success","last_run":"""#);
    let (runs, _) = opened(project_at(BARE, &text).path()).await;
    assert_eq!((runs.len(), runs[0].id().as_str(), runs[0].node_count()), (1, "r", 1));
    // Beside its nodes a map may hold other things.
    let map = r#"{"n":{"status":"success"},"_meta":{"runner":"1.0"},"updated_at":"2024-01-01"}"#;
    for place in [BARE, DOCUMENT] {
        let dir = project_at(place, map);
        let (runs, _) = opened(dir.path()).await;
        assert_eq!((runs.len(), runs[0].node_count()), (1, 1), "{place}");
        let after = back_from_the_database(dir.path()).await;
        assert_eq!(member(&after, &["_meta"]).as_deref(), Some(r#"{"runner":"1.0"}"#), "{place}");
        assert_eq!(member(&after, &["updated_at"]).as_deref(), Some("\"2024-01-01\""), "{place}");
        assert!(member(&after, &["nodes", "n"]).is_some(), "{place}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_only_nodes_name_their_run_the_newest_one_has_the_header() {
    let text = r#"{"status":"failed","config":{"full":true},"nodes":{
        "a":{"run_id":"r1","status":"success","started_at":"2024-01-09T12:00:00Z"},
        "b":{"run_id":"r2","status":"success","started_at":"2024-01-10T12:00:00Z"},
        "c":{"status":"cached"}}}"#;
    let dir = project(text);
    let (runs, _) = opened(dir.path()).await;
    let ids: Vec<_> = runs.iter().map(|run| (run.id().as_str(), run.header().status.as_str(), run.node_count())).collect();
    assert_eq!(ids, [("r2", "failed", 2), ("r1", "success", 1)]);
    assert!(runs[0].header().extra.as_ref().unwrap().as_str().contains("config"));
}

#[tokio::test]
async fn a_damaged_document_names_the_newest_backup_that_can_be_read() {
    let dir = project("{\"nodes\": {");
    let beside = |end: &str| dir.path().join(format!("{DOCUMENT}{end}"));
    let good = seeknal(r#""status":"success""#);
    for (end, text, age) in [(".bak", good.as_str(), 30), (".bak.r1", &good, 20), (".bak.r2", &good, 10), (".bak.r3", "{", 0)] {
        fs::write(beside(end), text).unwrap();
        let file = fs::File::options().write(true).open(beside(end)).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(2_000_000_000 - age)).unwrap();
    }
    let why = refusal(dir.path()).await;
    assert!(why.contains(".bak.r2") && !why.contains(".bak.r1") && !why.contains(".bak.r3"), "{why}");
    fs::remove_file(beside("")).unwrap();
    let (runs, notices) = opened(dir.path()).await;
    assert!(runs.is_empty());
    assert!(notices.iter().any(|notice| notice.contains(".bak.r2")), "{notices:?}");
}

/// Nothing in it is a new state only where nothing was: what somebody emptied is nobody's backup.
#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_document_is_no_new_state() {
    let fresh = project("{}");
    assert!(opened(fresh.path()).await.0.is_empty());
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let beside = |end: &str| dir.path().join(format!("{DOCUMENT}{end}"));
    // As it lies there if the process is killed now, and after it has closed.
    let journal = fs::read(beside(".journal")).unwrap();
    state.close().await.unwrap();
    let document = fs::read(beside("")).unwrap();
    let mut without_nodes: serde_json::Value = serde_json::from_slice(&document).unwrap();
    without_nodes["nodes"] = serde_json::Value::Null;
    fs::write(beside(""), without_nodes.to_string()).unwrap();
    assert!(refusal(dir.path()).await.contains("`nodes` is null"));
    for empty in ["{}", r#"{"nodes": {}}"#] {
        fs::write(beside(""), empty).unwrap();
        let why = refusal(dir.path()).await;
        assert!(why.contains("nothing is in it, but") && why.contains("run_state.json.prev tells of a state"), "{why}");
        fs::write(beside(".bak.r1"), &document).unwrap();
        fs::write(beside(".bak.r2"), "{}").unwrap();
        let why = refusal(dir.path()).await;
        assert!(why.contains(".bak.r1 is the newest copy that can be read"), "{why}");
        for copy in [".bak.r1", ".bak.r2"] {
            fs::remove_file(beside(copy)).unwrap();
        }
        let backend = FileBackend::new(&BackendOptions::new().base_path(dir.path().join("target")));
        assert_eq!(backend.initialize().await.unwrap_err().kind(), StoreErrorKind::Corrupt);
        assert_eq!(fs::read_to_string(beside("")).unwrap(), empty);
    }
    fs::rename(beside(".prev"), beside(".away")).unwrap();
    assert!(refusal(dir.path()).await.contains("run_state.json.lock tells of a state"));
    fs::write(beside(".journal"), journal).unwrap();
    assert!(refusal(dir.path()).await.contains("run_state.json.journal tells of a state"));
    fs::remove_file(beside(".journal")).unwrap();
    fs::rename(beside(".away"), beside(".prev")).unwrap();
    // The copy of the last document can be brought back.
    let settings = Settings::load(dir.path(), &|_| None).unwrap();
    seeknal_state::project::repair(&settings, time::parse("2026-01-01").unwrap(), true).await.unwrap();
    assert_eq!(opened(dir.path()).await.0.len(), 1);
}

/// What was read can be read again after a write of ours, whatever the members were called.
#[tokio::test(flavor = "multi_thread")]
async fn no_member_is_written_twice() {
    let dir = project_at(BARE, r#"{"n":{"status":"success"},"seeknal_state":null}"#);
    let state = open(dir.path()).await;
    state.create_run("ours", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    assert_eq!(opened(dir.path()).await.0.len(), 2);
}

/// A word that JSON does not know names nothing, and a date without separators is no time.
#[tokio::test(flavor = "multi_thread")]
async fn odd_values_name_nothing() {
    let text = seeknal(
        r#""status":"failed","run_id":NaN,"error":NaN,"completed_partitions":[NaN,"p"],"last_run":"202401101200","metadata":{"loss":NaN}"#,
    );
    let dir = project(&text);
    let (runs, notices) = opened(dir.path()).await;
    let ids: Vec<_> = runs.iter().map(|run| run.id().as_str()).collect();
    assert_eq!(ids, ["r"]);
    let node = runs[0].node("n").unwrap();
    assert_eq!((node.error.as_deref(), node.finished_at), (None, None));
    assert_eq!(node.partitions.iter().map(PartitionKey::as_str).collect::<Vec<_>>(), ["p"]);
    assert!(notices.iter().any(|notice| notice.contains("1 element")), "{notices:?}");
    assert_eq!(node.metadata.get("loss").unwrap().as_text().as_deref(), Some("NaN"));
}

#[tokio::test]
async fn a_refusal_says_what_is_wrong_and_what_mends_it() {
    for (text, part) in [
        (r#"{"run_id":"r","status":"running","nodes":{"status":"x","n":{"status":"success"}}}"#, "status"),
        (r#"{"run_id":"r","a":{"status":"success"},"b":{"status":"failed"}}"#, "nodes belong into `nodes`"),
        (r#"{"run_id":"r","nodes":[]}"#, "`nodes` is a list; it must be an object from node id to node"),
        (r#"{"run_id":"r","nodes":"x"}"#, "`nodes` is a text; it must be an object from node id to node"),
        (r#"{"run_id":"r","nodes":{},"seeknal_state":null}"#, "`seeknal_state` is null; it must be an object"),
        ("[]", "the whole file is a list; it must be an object"),
        ("12", "the whole file is a number; it must be an object"),
        (r#"{"run_id":"r","nodes":{"a\udce9":{"status":"success"}}}"#, "half of a character"),
        (r#"{"run_id":"r","nodes":{},"k\udce9":1}"#, "half of a character"),
    ] {
        let why = refusal(project(text).path()).await;
        assert!(why.contains(part), "{text}: {why}");
    }
}
