//! What an operator is told where something is not as he thinks.

use std::fs;
use std::path::Path;

use crate::projects::{GUIDE, open, project, put, tree};
use crate::{json, run, seeknal, told};
use seeknal_state::model::{Mutation, NewRun, RunUpdate, time};
use seeknal_state::{BackendOptions, create_state_backend};

/// Takes what lies beside a database and goes with it away.
fn without_wal(dir: &Path) {
    for suffix in ["-wal", "-shm"] {
        let _there_or_not = fs::remove_file(dir.join(format!("target/state.db{suffix}")));
    }
}

/// stdout holds the one value, stderr what a person should know.
#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_state_a_program_gets_its_value_and_a_person_the_hint() {
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    for arguments in ["state runs", "state locks", "state cleanup --days 30", "state cleanup --days 30 --dry-run"] {
        let (code, out, err) = run(dir.path(), &format!("{arguments} -o json"));
        assert!(code == 0 && serde_json::from_str::<serde_json::Value>(&out).is_ok(), "{arguments}: {out}{err}");
        assert!(err.starts_with("note: There is no state yet in /"), "{arguments}: {err}");
        assert!(err.contains("run_state.json is there: state_backend: file?"), "{arguments}: {err}");
        let (_, out, err) = run(dir.path(), arguments);
        assert!(out.contains("state_backend: file?") && err.is_empty(), "{arguments}: told once: {out}{err}");
    }
}

/// A database that is lost is no new project for who reads it, or cleans it up.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_database_is_an_error_for_who_reads_it() {
    for emptied in [true, false] {
        let dir = project("database").await;
        without_wal(dir.path());
        let path = dir.path().join("target/state.db");
        if emptied {
            fs::write(&path, "").unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
        let before = tree(dir.path());
        for arguments in [
            "state runs",
            "state show run_1",
            "state locks",
            "state unlock 1",
            "state verify",
            "state cleanup --days 30",
            "state cleanup --days 30 --dry-run",
            "migrate-state --backend file",
            "migrate-state --backend file --no-dry-run",
        ] {
            for format in ["", " -o json"] {
                let (code, out, err) = run(dir.path(), &format!("{arguments}{format}"));
                assert_eq!(code, 5, "{arguments}: {out}{err}");
                let told = format!("{out}{err}");
                assert!(told.contains("state.db.lock tells of one") && !told.contains("no state yet"), "{arguments}: {told}");
            }
        }
        assert_eq!(tree(dir.path()), before, "nothing is made or changed");
        // Whoever moves a state there begins anew, and is told.
        fs::write(dir.path().join("target/run_state.json"), GUIDE).unwrap();
        fs::write(dir.path().join("seeknal_project.yml"), "state_backend: file\n").unwrap();
        let (code, _, err) = run(dir.path(), "migrate-state --backend database --no-dry-run");
        assert!(code == 0 && err.contains("removed or emptied"), "{err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_url_that_is_not_used_is_told() {
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "database_url: postgres://u:S3kr3t@h/d\n").unwrap();
    let (code, out, err) = run(dir.path(), "state runs");
    assert!(code == 0 && out.contains("run_1"), "{err}");
    assert!(err.contains("seeknal_project.yml:1: database_url is not used") && err.contains("state_backend: database"), "{err}");
    assert!(err.lines().count() == 1 && !err.contains("S3kr3t"), "{err}");
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: file\n").unwrap();
    let (_, _, err) = told(seeknal(dir.path()).args(["state", "locks"]).env("SEEKNAL_DATABASE_URL", "postgres://h/d"));
    assert!(err.contains("environment variable SEEKNAL_DATABASE_URL: database_url is not used"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_nothing_has_is_told_with_those_that_are_known() {
    let dir = project("file").await;
    let (code, out, err) = run(dir.path(), "state runs --status sucess");
    assert_eq!((code, &*out), (0, "No runs.\n"));
    assert!(err.contains("\"sucess\"") && err.contains("pending, running, success, failed, cancelled"), "{err}");
    let (_, _, err) = run(dir.path(), "state runs --status pending");
    assert!(err.is_empty(), "{err}");
}

#[test]
fn a_run_without_stamps_was_created_at_no_time() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    fs::write(dir.path().join("target/run_state.json"), r#"{"run_id": "r", "status": "success", "nodes": {}}"#).unwrap();
    let (_, out, err) = run(dir.path(), "state show r");
    assert!(out.contains("created -, started -"), "{out}{err}");
    assert_eq!(json(dir.path(), "state show r")["created_at"], serde_json::Value::Null);
    assert_eq!(json(dir.path(), "state runs")[0]["created_at"], serde_json::Value::Null);
}

/// What would be refused is not said to be only a flag away.
#[tokio::test(flavor = "multi_thread")]
async fn a_preview_of_a_move_that_would_be_refused_says_so() {
    for (to, name) in [("database", "database"), ("file", "file")] {
        let from = if to == "database" { "file" } else { "database" };
        let dir = project(from).await;
        let other = open(name, &dir.path().join("target")).await;
        let at = time::parse("2024-01-10T12:00:00Z").unwrap();
        put(&other, "run_1", vec![Mutation::Create { run: NewRun::running(), at }]).await;
        other.close().await.unwrap();
        let (code, out, err) = run(dir.path(), &format!("migrate-state --backend {to}"));
        assert_eq!(code, 4, "{err}");
        let last = out.lines().last().unwrap();
        assert!(last.contains("would be refused") && last.contains("1 run"), "{out}");
        assert!(!out.contains("To do it") && !out.contains("Would then set") && !out.contains("Nothing is left"), "{out}");
        assert!(err.contains("\"run_1\"") && err.contains("seeknal state cleanup"), "{err}");
    }
}

/// The way back that the README tells: the old document is set aside, and is not missed. One of Seeknal's has no copy beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_is_set_aside_for_the_way_back_is_not_missed() {
    for is_foreign in [false, true] {
        let dir = project("file").await;
        let target = dir.path().join("target");
        if is_foreign {
            fs::remove_dir_all(&target).unwrap();
            fs::create_dir(&target).unwrap();
            fs::write(target.join("run_state.json"), GUIDE).unwrap();
        }
        assert_eq!(run(dir.path(), "migrate-state --backend database --no-dry-run").0, 0);
        fs::rename(target.join("run_state.json"), target.join("run_state.before-the-move.json")).unwrap();
        for arguments in ["migrate-state --backend file", "migrate-state --backend file --no-dry-run"] {
            let (code, out, err) = run(dir.path(), arguments);
            assert_eq!(code, 0, "{err}");
            assert!(!format!("{out}{err}").contains("missing"), "{arguments}: {out}{err}");
        }
        // Whoever only looks for it misses it.
        fs::rename(target.join("run_state.json"), target.join("elsewhere.json")).unwrap();
        assert!(run(dir.path(), "state runs").2.contains("missing"));
    }
}

/// What a conflict tells to do is not answered with the advice to undo it.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_set_aside_for_a_move_is_not_to_be_brought_back() {
    let dir = project("file").await;
    assert_eq!(run(dir.path(), "migrate-state --backend database --no-dry-run").0, 0);
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: file\n").unwrap();
    without_wal(dir.path());
    fs::rename(dir.path().join("target/state.db"), dir.path().join("target/aside.db")).unwrap();
    let (code, _, err) = run(dir.path(), "migrate-state --backend database --no-dry-run");
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("set aside; this move makes a new one") && !err.contains("backup"), "{err}");
    // Whoever only looks for it misses it.
    without_wal(dir.path());
    fs::remove_file(dir.path().join("target/state.db")).unwrap();
    assert!(run(dir.path(), "state runs").2.contains("bring a backup of it back"));
}

/// A finished move that is run again moves nothing, and leaves the backup from before the move alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_moves_nothing_backs_nothing_up() {
    let dir = project("database").await;
    let document = dir.path().join("target/run_state.json");
    fs::write(&document, GUIDE).unwrap();
    assert_eq!(run(dir.path(), "migrate-state --backend file --no-dry-run").0, 0);
    let names = || tree(dir.path()).into_keys().filter(|name| name.contains(".bak")).collect::<Vec<_>>();
    assert_eq!(names(), ["target/run_state.json.bak"]);
    let (code, out, err) = run(dir.path(), "migrate-state --backend file --no-dry-run");
    assert!(code == 0 && !out.to_lowercase().contains("backup"), "{out}{err}");
    assert_eq!(names(), ["target/run_state.json.bak"]);
    assert_eq!(fs::read_to_string(dir.path().join("target/run_state.json.bak")).unwrap(), GUIDE);
}

/// What a cleanup would leave is not shown as what would go.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_names_runs_that_cannot_be_read() {
    let dir = project("database").await;
    let sql = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
    assert_eq!(sql.execute("UPDATE node_states SET metadata = '{' WHERE run_id = 'run_1' AND node_id = 'load'", []).unwrap(), 1);
    drop(sql);
    let (code, out, err) = run(dir.path(), "state cleanup --days 30 --dry-run");
    assert!(code == 5 && out.contains("kept run_1: ") && out.contains("Would delete 2 runs"), "{out}{err}");
    let (_, out, _) = run(dir.path(), "state cleanup --days 30 --dry-run -o json");
    let shown: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((shown["delete"].as_array().unwrap().len(), &shown["failed"][0]["run_id"]), (2, &"run_1".into()), "{shown}");
}

/// Every run that stays is accounted for.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_cleanup_keeps_is_counted_by_reason() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    let foreign = r#"{"schema_version": "2.0", "run_id": "old", "last_run": "2024-01-10T12:00:00", "status": "failed",
        "nodes": {"a": {"status": "running", "last_run": "2024-01-10T12:00:00"}, "b": {"status": "failed"}}}"#;
    fs::write(dir.path().join("target/run_state.json"), foreign).unwrap();
    let backend = create_state_backend("file", &BackendOptions::new().base_path(dir.path().join("target"))).unwrap();
    backend.initialize().await.unwrap();
    let at = time::parse("2024-01-10T12:00:00Z").unwrap();
    let create = || Mutation::Create { run: NewRun::running(), at };
    put(&backend, "runs", vec![create()]).await;
    let now = seeknal_state::Clock::now(&seeknal_state::SystemClock);
    put(&backend, "young", vec![create(), Mutation::Update { update: RunUpdate::success(), at: now }]).await;
    put(&backend, "ended", vec![create(), Mutation::Update { update: RunUpdate::success(), at }]).await;
    backend.close().await.unwrap();
    let kept = json(dir.path(), "state cleanup --days 30 --dry-run");
    assert_eq!(kept["kept"], 3, "{kept}");
    let by = ["running", "recent", "kept_last"].map(|reason| kept[reason].as_u64().unwrap());
    assert_eq!((by, &kept["nodes_running"]), ([1, 1, 0], &serde_json::json!(["old"])), "{kept}");
    let (_, out, _) = run(dir.path(), "state cleanup --days 30");
    assert!(out.contains("kept old: ") && out.contains("`seeknal state end old`"), "{out}");
    assert!(out.contains("Kept 3 runs: 1 running or pending, 1 with nodes that run, 1 not old enough"), "{out}");
}

/// The state's folder, or the file itself, in the place of the project's.
#[tokio::test(flavor = "multi_thread")]
async fn who_stands_in_the_states_folder_is_told_that_it_is_no_project() {
    for (backend, name) in [("file", "run_state.json"), ("database", "state.db")] {
        let dir = project(backend).await;
        let _none = fs::remove_file(dir.path().join("seeknal_project.yml"));
        let target = dir.path().join("target");
        let here = fs::canonicalize(dir.path()).unwrap();
        let file = target.join(name);
        for (folder, given) in [(target.as_path(), "."), (dir.path(), "target"), (dir.path(), file.to_str().unwrap())] {
            let mut command = seeknal(folder);
            command.args(["--project-path", given, "state", "runs"]).env("SEEKNAL_STATE_BACKEND", backend);
            let (code, out, err) = told(&mut command);
            let hint = format!("{name} is there: --project-path {}?", here.display());
            assert!(code == 0 && out.contains("There is no state yet") && out.contains(&hint), "{given}: {out}{err}");
        }
        // A folder of another name.
        let other = dir.path().join("elsewhere");
        fs::rename(&target, &other).unwrap();
        let mut command = seeknal(&other);
        let (_, out, _) = told(command.args(["state", "runs"]).env("SEEKNAL_STATE_BACKEND", backend));
        assert!(out.contains(&format!("{name} is there: seeknal_state.target_path: .?")), "{out}");
    }
}

/// Nobody finds a state there again, and his real one is beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_in_memory_is_told_to_keep_nothing() {
    for (backend, name) in [("file", "run_state.json"), ("database", "state.db")] {
        let dir = project(backend).await;
        fs::write(dir.path().join("seeknal_project.yml"), "state_backend: memory\n").unwrap();
        for arguments in ["state runs", "state cleanup --days 30", "state verify", "state runs -o json"] {
            let (code, _, err) = run(dir.path(), arguments);
            let hint = format!("{name} is there: state_backend: {backend}?");
            assert!(code == 0 && err.contains("keeps nothing") && err.contains(&hint), "{arguments}: {code} {err}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_make_no_sense_are_told_in_an_operators_words() {
    let dir = project("file").await;
    let file = dir.path().join("seeknal_project.yml");
    for name in ["sqlite", "SQLite3", "postgres", "postgresql", "libsql"] {
        fs::write(&file, format!("state_backend: {name}\n")).unwrap();
        let (code, _, err) = run(dir.path(), "state runs");
        assert!(code == 1 && err.contains("did you mean \"database\"?"), "{name}: {code} {err}");
    }
    fs::write(&file, ": : :\n").unwrap();
    let (code, _, err) = run(dir.path(), "state runs");
    assert!(
        code == 1 && err.contains("seeknal_project.yml:1") && !err.contains("Option<") && err.contains("key"),
        "{code} {err}"
    );
}

/// What is not there is not told as checked.
#[test]
fn a_check_names_the_files_that_are_there() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("target/state")).unwrap();
    let bare = dir.path().join("target/state/execution_state.json");
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/old-runner/state/execution_state.json"), &bare).unwrap();
    let (code, out, err) = run(dir.path(), "state verify");
    assert!(code == 0 && !out.contains(".lock") && !out.contains("run_state.json"), "{out}{err}");
    assert!(out.contains("target/state/execution_state.json: 1 run(s)"), "{out}");
}
