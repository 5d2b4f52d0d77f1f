//! `seeknal state end`: runs whose process is gone.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::projects::{open, put};
use crate::{json, run};
use seeknal_state::model::{Mutation, NewRun, RunId, RunUpdate, time};
use seeknal_state::project::end::{self, EndAs};
use seeknal_state::project::{ProjectErrorKind, open as open_project};
use seeknal_state::{Clock, Coordinator, NodeUpdate, SystemClock};

const BACKENDS: [&str; 2] = ["file", "database"];

/// A project whose run has a node that runs and one that is done, and the opening that works on it.
async fn at_work(backend: &str) -> (tempfile::TempDir, Coordinator) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: {backend}\n")).unwrap();
    let state = open_project(dir.path()).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "runs", NodeUpdate::running()).await.unwrap();
    state.set_node_state("r", "done", NodeUpdate::success()).await.unwrap();
    (dir, state)
}

/// The same, after its process has gone without ending it.
async fn left(backend: &str) -> tempfile::TempDir {
    let (dir, state) = at_work(backend).await;
    state.close().await.unwrap();
    dir
}

fn assert_runs(dir: &Path) {
    let shown = json(dir, "state show r");
    assert_eq!((&shown["status"], &shown["nodes"]["runs"]["status"]), (&"running".into(), &"running".into()), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_process_is_gone_is_marked_and_can_be_ended() {
    for backend in BACKENDS {
        for (flag, status) in [("", "failed"), (" --as cancelled", "cancelled")] {
            let dir = left(backend).await;
            assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], true, "{backend}");
            assert_eq!(json(dir.path(), "state show r")["abandoned"], true, "{backend}");
            assert!(run(dir.path(), "state runs").1.contains("running (process gone)"));
            assert!(run(dir.path(), "state show r").1.contains("which is gone: `seeknal state end r`"));
            let (code, out, err) = run(dir.path(), &format!("state end r{flag}"));
            assert_eq!(code, 0, "{backend}: {err}");
            assert!(out.contains("Run r was running") && out.contains(&format!("is {status} now")), "{out}");
            assert!(out.contains("1 node that still ran failed: runs"), "{out}");
            let shown = json(dir.path(), "state show r");
            assert_eq!((&shown["status"], &shown["abandoned"]), (&status.into(), &false.into()), "{shown}");
            assert_eq!(
                (&shown["nodes"]["runs"]["status"], &shown["nodes"]["done"]["status"]),
                (&"failed".into(), &"success".into())
            );
            let error = shown["nodes"]["runs"]["error"].as_str().unwrap();
            assert!(error.contains("`seeknal state end`") && error.contains(status), "{error}");
            assert!(!shown["finished_at"].is_null() && !shown["nodes"]["runs"]["finished_at"].is_null(), "{shown}");

            // Once more: nothing is left to do, and it does not become another end.
            let version = shown["version"].clone();
            let again = json(dir.path(), &format!("state end r{flag}"));
            assert_eq!((&again["changed"], &again["status"]), (&false.into(), &status.into()), "{again}");
            let other = if flag.is_empty() { " --as cancelled" } else { "" };
            let (code, _, err) = run(dir.path(), &format!("state end r{other}"));
            assert!(code == 4 && err.contains(&format!("it is {status}")), "{err}");
            assert_eq!(json(dir.path(), "state show r")["version"], version);
            let (code, _, err) = run(dir.path(), "state end nobody");
            assert!(code == 3 && err.contains("nobody"), "{err}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_process_lives_is_not_ended() {
    for backend in BACKENDS {
        let (dir, state) = at_work(backend).await;
        for flag in ["", " --force"] {
            let (code, _, err) = run(dir.path(), &format!("state end r{flag}"));
            assert!(code == 4 && err.contains(&format!("pid {}", std::process::id())), "{backend}: {code} {err}");
        }
        assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], false, "{backend}");
        assert!(!run(dir.path(), "state show r").1.contains("gone"));
        assert_runs(dir.path());
        state.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_somebody_else_has_locked_is_not_ended() {
    let dir = left("database").await;
    let other = open_project(dir.path()).await.unwrap();
    let lease = other.acquire_lock("r", Duration::from_secs(5)).await.unwrap().unwrap();
    let (code, _, err) = run(dir.path(), "state end r");
    assert!(code == 4 && err.contains("state unlock"), "{code} {err}");
    assert_runs(dir.path());
    drop(lease);
    other.close().await.unwrap();
    assert_eq!(run(dir.path(), "state end r").0, 0);
}

/// Who claims from a run works on it, when the process that planned it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_worked_on_by_claims_is_not_ended() {
    let dir = left("database").await;
    let worker = open_project(dir.path()).await.unwrap();
    for node in ["one", "two"] {
        worker.set_node_state("r", node, NodeUpdate::pending()).await.unwrap();
    }
    assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], true, "nobody works on it yet");
    let claim = worker.claim_node("r", "one", "w", Duration::from_secs(60)).await.unwrap().unwrap();
    for flag in ["", " --force"] {
        let (code, _, err) = run(dir.path(), &format!("state end r{flag}"));
        assert!(code == 4 && err.contains(&format!("pid {}", std::process::id())), "{code} {err}");
        assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], false);
        assert_eq!(json(dir.path(), "state show r")["abandoned"], false);
    }
    assert_runs(dir.path());
    claim.complete(NodeUpdate::success()).await.unwrap();
    // He lives on, and has nothing to do with it any more.
    assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], true);
    assert_eq!(run(dir.path(), "state end r").0, 0);
    worker.close().await.unwrap();
}

/// Who locked it works on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_somebody_has_locked_is_not_called_abandoned() {
    let dir = left("database").await;
    let other = open_project(dir.path()).await.unwrap();
    let lease = other.acquire_node_lock("r", "runs", Duration::from_secs(5)).await.unwrap().unwrap();
    assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], false);
    assert_eq!(json(dir.path(), "state show r")["abandoned"], false);
    lease.release().await.unwrap();
    assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], true);
    other.close().await.unwrap();
}

/// Nobody said who works on it, so nobody knows that he does not: on the file it may be a program that takes no lock of ours.
#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_knows_it_has_to_be_said_twice() {
    for (name, check) in [("file", "target/run_state.json"), ("database", "`seeknal state locks`")] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: {name}\n")).unwrap();
        let backend = open(name, &dir.path().join("target")).await;
        let at = time::parse("2024-01-10T12:00:00Z").unwrap();
        put(&backend, "r", vec![Mutation::Create { run: NewRun::running(), at }]).await;
        backend.close().await.unwrap();
        assert_eq!(json(dir.path(), "state runs")[0]["abandoned"], false);
        let (code, _, err) = run(dir.path(), "state end r");
        assert!(code == 4 && err.contains("--force") && err.contains(check), "{name}: {code} {err}");
        assert_eq!(json(dir.path(), "state show r")["status"], "running", "{name}");
        assert_eq!(json(dir.path(), "state end r --force")["changed"], true);
        assert_eq!(json(dir.path(), "state show r")["status"], "failed");
    }
}

/// Between the look and the deed somebody takes the run over, or locks it.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_taken_over_meanwhile_is_not_ended() {
    for locked in [false, true] {
        let dir = left("database").await;
        let backend = open("database", &dir.path().join("target")).await;
        let run = RunId::new("r").unwrap();
        let plan = end::plan(&*backend, &run, EndAs::Failed, false).await.unwrap();
        let other = open_project(dir.path()).await.unwrap();
        let mut lease = None;
        if locked {
            lease = other.acquire_lock("r", Duration::from_secs(5)).await.unwrap();
            assert!(lease.is_some());
        } else {
            other.resume_run("r").await.unwrap();
        }
        let error = end::execute(&*backend, &plan, SystemClock.now()).await.unwrap_err();
        assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
        assert_runs(dir.path());
        drop(lease);
        other.close().await.unwrap();
        backend.close().await.unwrap();
    }
}

/// A document of another program: its header is of an end, and a node of it runs for ever.
#[test]
fn nodes_of_a_run_that_has_an_end_are_ended_too() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    let foreign = r#"{"schema_version": "2.0", "run_id": "old", "last_run": "2024-01-10T12:00:00",
        "nodes": {"a": {"status": "running", "last_run": "2024-01-10T12:00:00"}, "b": {"status": "failed"}}}"#;
    fs::write(dir.path().join("target/run_state.json"), foreign).unwrap();
    assert_eq!(json(dir.path(), "state cleanup --days 30 --dry-run")["nodes_running"][0], "old");
    let (code, _, err) = run(dir.path(), "state end old");
    assert!(code == 4 && err.contains("--force"), "{code} {err}");
    let (code, out, err) = run(dir.path(), "state end old --as cancelled --force");
    assert!(code == 0 && out.contains("Run old had ended before: it is failed, and stays so"), "{code} {out}{err}");
    assert!(out.contains("1 node that still ran failed: a") && !out.contains("failed now"), "{out}");
    let shown = json(dir.path(), "state show old");
    assert_eq!((&shown["status"], &shown["nodes"]["a"]["status"]), (&"failed".into(), &"failed".into()), "{shown}");
    let error = shown["nodes"]["a"]["error"].as_str().unwrap();
    assert!(error.contains("`seeknal state end`") && !error.contains("cancelled"), "{error}");
    fs::write(dir.path().join("target/run_state.json"), foreign).unwrap();
    let ended = json(dir.path(), "state end old --force");
    assert_eq!((&ended["was"], &ended["nodes"]), (&"failed".into(), &serde_json::json!(["a"])), "{ended}");
    assert_eq!(json(dir.path(), "state cleanup --days 0 --dry-run")["delete"][0]["run_id"], "old");
}

/// What was ended by hand is an end as any other, for who reads the state without us too.
#[tokio::test(flavor = "multi_thread")]
async fn a_pending_run_is_ended_on_the_file_where_nobody_else_writes() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open("file", &dir.path().join("target")).await;
    let at = time::parse("2024-01-10T12:00:00Z").unwrap();
    put(&backend, "waits", vec![Mutation::Create { run: NewRun::pending(), at }]).await;
    put(
        &backend,
        "ended",
        vec![Mutation::Create { run: NewRun::running(), at }, Mutation::Update { update: RunUpdate::success(), at }],
    )
    .await;
    backend.close().await.unwrap();
    assert_eq!(json(dir.path(), "state end waits --as cancelled --force")["was"], "pending");
    let document: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("target/run_state.json")).unwrap()).unwrap();
    assert!(document.to_string().contains("cancelled"), "{document}");
    let (code, _, err) = run(dir.path(), "state end ended");
    assert!(code == 4 && err.contains("success"), "{err}");
}

/// Whether a process is gone is a hint: what keeps it from being known keeps nobody from the list.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_be_read_hides_no_run() {
    let dir = left("database").await;
    let db = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
    db.execute("UPDATE node_states SET metadata = '{broken'", []).unwrap();
    drop(db);
    let listed = json(dir.path(), "state runs");
    assert_eq!((&listed[0]["run_id"], &listed[0]["abandoned"]), (&"r".into(), &true.into()), "{listed}");
}
