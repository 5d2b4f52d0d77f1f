//! What other programs, operators and crashes do to the document and the files beside it, and what is still known afterwards.
#![cfg(feature = "file")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake};
use std::time::{Duration, Instant};

use seeknal_state::store::file::FileBackend;
use seeknal_state::{
    BackendOptions, Clock, Coordinator, NewRun, NodeStatus, NodeUpdate, RunQuery, RunStatus, StateBackend, SystemClock,
    create_state_backend,
};
use serde_json::{Value, json};

async fn open(folder: &Path) -> Coordinator {
    Coordinator::open(create_state_backend("file", &BackendOptions::new().base_path(folder)).unwrap()).await.unwrap()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Another program writes the document: of the nodes it knows these members, of the rest nothing.
fn rewrite(folder: &Path, known: &[&str], change: impl FnOnce(&mut Value)) {
    let path = folder.join("run_state.json");
    let mut document = read(&path);
    document.as_object_mut().unwrap().remove("seeknal_state").unwrap();
    for (_, node) in document["nodes"].as_object_mut().unwrap() {
        node.as_object_mut().unwrap().retain(|key, _| known.contains(&key.as_str()));
    }
    change(&mut document);
    std::fs::write(path, serde_json::to_string_pretty(&document).unwrap()).unwrap();
}

const KNOWN: &[&str] = &[
    "hash",
    "last_run",
    "status",
    "duration_ms",
    "row_count",
    "version",
    "started_at",
    "finished_at",
    "fingerprint",
    "completed_intervals",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_another_program_did_not_touch_stays_as_we_knew_it() {
    let folder = tempfile::tempdir().unwrap();
    let state = open(folder.path()).await;
    state.create_run("run_1", NewRun::running().metadata("trigger", "cron")).await.unwrap();
    for update in [NodeUpdate::running(), NodeUpdate::failed("boom"), NodeUpdate::running(), NodeUpdate::success().row_count(5)] {
        state.set_node_state("run_1", "twice", update.metadata("k", "v")).await.unwrap();
    }
    let waits = NodeUpdate::failed("disk on fire").depends_on(["twice"]).max_attempts(3).watermark("w", "9");
    state.set_node_state("run_1", "waits", waits).await.unwrap();
    state.set_node_state("run_1", "changed", NodeUpdate::new().depends_on(["twice"]).max_attempts(2)).await.unwrap();
    state.set_node_state("run_1", "dropped", NodeUpdate::success()).await.unwrap();
    let before = state.get_run("run_1").await.unwrap().unwrap();
    state.close().await.unwrap();

    rewrite(folder.path(), KNOWN, |document| {
        let top = document.as_object_mut().unwrap();
        top.remove("finished_at");
        top.remove("started_at");
        let nodes = top["nodes"].as_object_mut().unwrap();
        nodes.remove("dropped").unwrap();
        nodes["changed"]["status"] = json!("success");
        nodes["changed"]["row_count"] = json!(7);
        nodes.insert("theirs".to_owned(), json!({"status": "success"}));
    });
    let state = open(folder.path()).await;
    let notices = &state.open_report().notices;
    assert!(notices.iter().any(|notice| notice.contains("rewritten")), "{notices:?}");
    let after = state.get_run("run_1").await.unwrap().unwrap();
    let (old, new) = (before.header(), after.header());
    assert_eq!(
        (&new.status, new.created_at, new.started_at, &new.worker, &new.metadata),
        (&old.status, old.created_at, old.started_at, &old.worker, &old.metadata)
    );
    assert!(new.worker.is_some());
    for node in ["twice", "waits", "dropped"] {
        assert_eq!(after.node(node), before.node(node), "{node}");
    }
    let twice = after.node("twice").unwrap();
    assert_eq!((twice.attempt, twice.attempts.len()), (2, 1));
    let changed = after.node("changed").unwrap();
    assert_eq!((&changed.status, changed.row_count, changed.max_attempts), (&NodeStatus::Success, Some(7), Some(2)));
    assert_eq!(changed.depends_on, before.node("changed").unwrap().depends_on);
    assert!(after.node("theirs").is_some());
    // It is written and read back as it is.
    state.set_node_state("run_1", "theirs", NodeUpdate::new().row_count(1)).await.unwrap();
    let told = state.get_run("run_1").await.unwrap().unwrap();
    state.close().await.unwrap();
    let again = open(folder.path()).await;
    assert_eq!(again.get_run("run_1").await.unwrap().unwrap().nodes().collect::<Vec<_>>(), told.nodes().collect::<Vec<_>>());
    again.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_program_did_again_is_not_told_by_the_attempt_before() {
    let folder = tempfile::tempdir().unwrap();
    let state = open(folder.path()).await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    state.set_node_state("run_1", "n", NodeUpdate::running()).await.unwrap();
    let failed = NodeUpdate::failed("disk on fire").max_attempts(3).row_count(4).watermark("w", "9");
    state.set_node_state("run_1", "n", failed).await.unwrap();
    let before = state.get_node_state("run_1", "n").await.unwrap().unwrap();
    state.close().await.unwrap();
    rewrite(folder.path(), &["status", "finished_at"], |document| {
        document["nodes"]["n"] = json!({"status": "success", "finished_at": "2031-01-01T00:00:00Z"});
        document.as_object_mut().unwrap().remove("status");
    });
    let state = open(folder.path()).await;
    let run = state.get_run("run_1").await.unwrap().unwrap();
    let node = run.node("n").unwrap();
    assert_eq!((&node.status, &node.error, node.started_at, node.duration_ms), (&NodeStatus::Success, &None, None, None));
    assert_ne!(node.finished_at, before.finished_at);
    assert_eq!((node.max_attempts, node.row_count, &node.watermarks), (Some(3), Some(4), &before.watermarks));
    assert_eq!(run.header().status, RunStatus::Success, "nobody says what the run is, and its nodes were done again");
    state.close().await.unwrap();
}

/// Seeknal has one map of nodes and does not know in which of our runs they got there.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_earlier_runs_are_not_taken_for_nodes_of_the_newest_one() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Path::new("tests/fixtures/seeknal-2.x-real-4-nodes/run_state.json");
    std::fs::copy(fixture, folder.path().join("run_state.json")).unwrap();
    let state = open(folder.path()).await;
    state.create_run("run_new", NewRun::running()).await.unwrap();
    state.set_node_state("run_new", "source.raw_orders", NodeUpdate::success().row_count(9)).await.unwrap();
    let runs = state.list_runs(&RunQuery::default()).await.unwrap().runs;
    let mut before = Vec::new();
    for run in &runs {
        before.push(state.get_run(&run.run_id).await.unwrap().unwrap());
    }
    assert_eq!(before.len(), 2);
    state.close().await.unwrap();
    rewrite(folder.path(), KNOWN, |_| {});
    let state = open(folder.path()).await;
    for run in &before {
        let after = state.get_run(run.id()).await.unwrap().unwrap();
        assert_eq!(after.nodes().collect::<Vec<_>>(), run.nodes().collect::<Vec<_>>(), "{:?}", run.id());
    }
    state.close().await.unwrap();
}

/// Tells when it is woken.
struct Bell(Mutex<Sender<()>>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        let _nobody_waits = self.0.lock().unwrap().send(());
    }
}

#[test]
fn an_opening_that_is_given_up_gives_the_lock_back() {
    let folder = tempfile::tempdir().unwrap();
    let options = BackendOptions::new().base_path(folder.path());
    let given_up = FileBackend::new(&options);
    {
        let (sender, woken) = channel();
        let waker = Arc::new(Bell(Mutex::new(sender))).into();
        let mut opening = given_up.initialize();
        assert!(matches!(opening.as_mut().poll(&mut Context::from_waker(&waker)), Poll::Pending));
        // The answer is there, and nobody takes it.
        woken.recv_timeout(Duration::from_secs(20)).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let begun = Instant::now();
    loop {
        let second = FileBackend::new(&options);
        match runtime.block_on(second.initialize()) {
            Ok(_) => break,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
        }
    }
    drop(given_up);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_copy_of_a_document_that_is_gone_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let state = open(folder.path()).await;
    state.create_run("precious", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    let (document, previous) = (folder.path().join("run_state.json"), folder.path().join("run_state.json.prev"));
    let kept = std::fs::read(&previous).unwrap();
    std::fs::remove_file(&document).unwrap();
    let state = open(folder.path()).await;
    let notices = &state.open_report().notices;
    assert!(notices.iter().any(|notice| notice.contains(".prev")), "{notices:?}");
    assert_eq!(std::fs::read(&previous).unwrap(), kept, "opening changes nothing");
    state.create_run("new", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    let aside: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().unwrap().contains(".prev.orphan-"))
        .collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert_eq!(std::fs::read(&aside[0]).unwrap(), kept);
    assert_eq!(read(&previous)["run_id"], "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_a_crash_left_behind_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let (document, previous) = (folder.path().join("run_state.json"), folder.path().join("run_state.json.prev"));
    let state = open(folder.path()).await;
    state.create_run("first", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    let old = std::fs::read(&previous).unwrap();
    let state = open(folder.path()).await;
    state.create_run("second", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    let new = std::fs::read(&document).unwrap();
    // The crash came between the document and its copy.
    std::fs::write(&previous, &old).unwrap();
    open(folder.path()).await.close().await.unwrap();
    assert_eq!(std::fs::read(&previous).unwrap(), new);
    std::fs::remove_file(&previous).unwrap();
    open(folder.path()).await.close().await.unwrap();
    assert_eq!(std::fs::read(&previous).unwrap(), new);
    // Beside a restored backup the copy is the newer one.
    std::fs::write(&document, &old).unwrap();
    open(folder.path()).await.close().await.unwrap();
    assert_eq!(std::fs::read(&previous).unwrap(), new);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_is_private_stays_private() {
    let folder = tempfile::tempdir().unwrap();
    let document = folder.path().join("run_state.json");
    std::fs::copy("tests/fixtures/guide-sample/run_state.json", &document).unwrap();
    std::fs::set_permissions(&document, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mode = |name: &str| std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o777;
    let state = open(folder.path()).await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    state.set_node_state("run_1", "n", NodeUpdate::running()).await.unwrap();
    for name in ["run_state.json", "run_state.json.prev", "run_state.json.journal"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    state.close().await.unwrap();
    assert_eq!((mode("run_state.json"), mode("run_state.json.prev")), (0o600, 0o600));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_behind_a_symbolic_link_is_written_where_it_lies() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let real = elsewhere.path().join("shared.json");
    std::fs::copy("tests/fixtures/guide-sample/run_state.json", &real).unwrap();
    let link = folder.path().join("run_state.json");
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let state = open(folder.path()).await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(read(&real)["run_id"], "run_1");
    let names: Vec<_> = std::fs::read_dir(elsewhere.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().contains(".tmp-")), "nothing unfinished is left there: {names:?}");
    // What a crash leaves there is swept.
    std::fs::write(elsewhere.path().join(".shared.json.tmp-0"), "half").unwrap();
    let state = open(folder.path()).await;
    assert!(state.get_run("run_1").await.unwrap().is_some());
    state.close().await.unwrap();
    assert!(!elsewhere.path().join(".shared.json.tmp-0").exists());
}

/// Its naive stamps are of a place east of here: hours ahead.
#[tokio::test]
async fn a_run_of_ours_is_newer_than_what_a_clock_ahead_of_ours_wrote() {
    for ahead in [chrono::Duration::hours(3), chrono::Duration::hours(14)] {
        let folder = tempfile::tempdir().unwrap();
        let stamp = (SystemClock.now() + ahead).format("%Y-%m-%dT%H:%M:%S%.6f").to_string();
        let foreign = json!({"schema_version": "2.0", "seeknal_version": "2.1.0", "last_run": stamp, "run_id": "theirs", "config": {},
            "nodes": {"n": {"hash": "x", "last_run": stamp, "status": "success", "duration_ms": 5, "row_count": 1}}});
        std::fs::write(folder.path().join("run_state.json"), foreign.to_string()).unwrap();
        let state = open(folder.path()).await;
        let before = SystemClock.now();
        state.create_run("ours", NewRun::running()).await.unwrap();
        state.set_node_state("ours", "n", NodeUpdate::success().watermark("w", "9")).await.unwrap();
        assert_eq!(state.last_success("n").await.unwrap().unwrap().run_id.as_str(), "ours");
        let run = state.get_run("ours").await.unwrap().unwrap();
        let started = run.header().started_at.unwrap();
        assert!(started >= before - chrono::Duration::seconds(1) && started <= SystemClock.now(), "{started}: it began just now");
        state.close().await.unwrap();
        let written = read(&folder.path().join("run_state.json"));
        assert_eq!(written["run_id"], "ours");
    }
}
