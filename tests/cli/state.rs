//! `seeknal state …` beside live writers, on damage, and in moves that fail half-way.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::folder::copy_folder;
use crate::projects::{project, tree};
use crate::{json, run, seeknal};
use chrono::{DateTime, Utc};
use seeknal_state::{
    BackendOptions, Clock, Coordinator, LeaseKey, LockOptions, NewRun, NodeUpdate, RunId, SystemClock, create_state_backend,
};
use serde_json::Value;
use std::process::Command;

async fn open(dir: &Path) -> Coordinator {
    let backend = create_state_backend("file", &BackendOptions::new().base_path(dir.join("target"))).unwrap();
    Coordinator::open(backend).await.unwrap()
}

/// Asks until something is listed.
fn listed(dir: &Path) -> Value {
    let begun = Instant::now();
    loop {
        let locks = json(dir, "state locks");
        if let Some(lease) = locks["leases"].as_array().unwrap().first() {
            return lease.clone();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "the lock is not listed: {locks}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_a_live_writer_are_listed_at_once_and_until_they_end() {
    for foreign in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("target")).unwrap();
        if foreign {
            fs::write(dir.path().join("target/run_state.json"), crate::projects::GUIDE).unwrap();
        }
        let state = open(dir.path()).await;
        let key = LeaseKey::run(RunId::new("run_20240110_120000").unwrap());
        let options = LockOptions::new().ttl(Duration::from_millis(300)).owner("executor 7").purpose("load");
        let lease = state.acquire(key.clone(), options, Duration::ZERO).await.unwrap().unwrap();
        let first = listed(dir.path());
        assert_eq!((&first["owner"], &first["purpose"], &first["ttl_ms"]), (&"executor 7".into(), &"load".into(), &300.into()));
        // Kept alive by its guard it has no end that could pass.
        let stamp = |lease: &Value, key: &str| lease[key].as_str().unwrap().parse::<DateTime<Utc>>().unwrap();
        let since = stamp(&first, "since");
        loop {
            let asked = SystemClock.now();
            let lease = listed(dir.path());
            assert_eq!(stamp(&lease, "since"), since);
            assert!(stamp(&lease, "until") > asked, "{lease} at {asked}");
            if asked > since + Duration::from_millis(900) {
                break;
            }
        }
        drop(lease);
        let begun = Instant::now();
        while json(dir.path(), "state locks")["leases"] != Value::Array(Vec::new()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "a lock that was given back stays listed");
        }
        state.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_state_has_nothing_to_repair() {
    for backend in ["file", "database"] {
        let dir = project(backend).await;
        let verified = json(dir.path(), "state verify --repair");
        assert_eq!((&verified["sound"], &verified["repaired"]), (&true.into(), &Value::Array(Vec::new())), "{backend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_is_copied_and_left_as_it_is() {
    let dir = project("database").await;
    let path = dir.path().join("target/state.db");
    let mut bytes = fs::read(&path).unwrap();
    let pages = bytes.len();
    assert!(pages > 16_384);
    bytes[8192..12_288].fill(0x5a);
    fs::write(&path, &bytes).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _there_or_not = fs::remove_file(dir.path().join(format!("target/state.db{suffix}")));
    }
    let (code, out, err) = run(dir.path(), "state verify --repair");
    assert_eq!(code, 5, "{out}{err}");
    assert!(out.contains("state.db.damaged-") && out.contains(".recover"), "{out}");
    // Where that command knows no `.recover`, as Debian's: a dump loses the marks, which are told.
    assert!(out.contains(".dump") && out.contains("PRAGMA application_id=1397444172; PRAGMA user_version=3"), "{out}");
    assert!(err.contains("backup"), "{err}");
    assert_eq!(fs::read(&path).unwrap(), bytes, "the database itself stays as it was");
    let copy = fs::read_dir(dir.path().join("target"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().contains("state.db.damaged-"))
        .unwrap();
    let copy = fs::read(copy).unwrap();
    assert_eq!((copy.len(), &copy[1024..]), (bytes.len(), &bytes[1024..]), "but for the counters in its header");
}

/// Pages of a table, values of a row: what is damaged is listed, and the rest is looked at as well.
#[tokio::test(flavor = "multi_thread")]
async fn every_damage_of_a_database_is_a_line_of_the_report() {
    let dir = project("database").await;
    let path = dir.path().join("target/state.db");
    let sound = fs::read(&path).unwrap();
    let sqlite = rusqlite::Connection::open(&path).unwrap();
    let page = |table: &str| -> u32 {
        sqlite.query_row("SELECT rootpage FROM sqlite_master WHERE name = ?1", [table], |row| row.get(0)).unwrap()
    };
    let (nodes, intervals) = (page("node_states"), page("completed_intervals"));
    drop(sqlite);
    for (root, kind) in [(nodes, 0x33_u8), (intervals, 0x00)] {
        let mut bytes = sound.clone();
        bytes[(root as usize - 1) * 1024] = kind;
        fs::write(&path, &bytes).unwrap();
        let (code, out, err) = run(dir.path(), "state verify --repair");
        assert_eq!(code, 5, "{out}{err}");
        assert!(out.contains("PROBLEM: the database is damaged"), "{out}");
        assert!(out.contains("checked: every value of"), "the check goes on: {out}");
        assert!(out.contains("state.db.damaged-"), "a copy is kept: {out}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    fs::write(&path, &sound).unwrap();
    let sqlite = rusqlite::Connection::open(&path).unwrap();
    let changed = sqlite.execute("UPDATE node_states SET status = CAST(x'ff41' AS TEXT), attempt = 'many'", []).unwrap();
    drop(sqlite);
    assert!(changed > 1);
    let (code, out, err) = run(dir.path(), "state verify");
    assert_eq!(code, 5, "{out}{err}");
    let named = out.lines().filter(|line| line.starts_with("PROBLEM: ") && line.contains("node_states")).count();
    assert!(named >= changed, "every row is named, {named} of {changed}: {out}");
}

/// A database that is gone is not "no state yet", as long as the file beside it knows better.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_removed_or_emptied_is_missed() {
    let dir = project("database").await;
    let path = dir.path().join("target/state.db");
    for suffix in ["-wal", "-shm"] {
        let _there_or_not = fs::remove_file(dir.path().join(format!("target/state.db{suffix}")));
    }
    for emptied in [true, false] {
        if emptied {
            fs::write(&path, "").unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
        for arguments in ["state runs", "state verify", "migrate-state --backend file --no-dry-run"] {
            let (_, out, err) = run(dir.path(), arguments);
            let told = format!("{out}{err}");
            assert!(told.contains("state.db.lock tells of one"), "{arguments}: {told}");
            assert!(!told.contains("sound"), "{arguments}: {told}");
        }
        let settings = fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap();
        assert!(settings.contains("database"), "nothing is switched: {settings}");
    }
    // Whoever goes on with an empty one is told once.
    let backend = create_state_backend("database", &BackendOptions::new().base_path(dir.path().join("target"))).unwrap();
    let report = backend.initialize().await.unwrap();
    assert!(report.notices[0].contains("removed or emptied"), "{:?}", report.notices);
    backend.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_beside_a_database_is_repaired() {
    let dir = project("database").await;
    let lock = dir.path().join("target/state.db.lock");
    fs::write(&lock, b"\xff{\"token\":7").unwrap();
    let (code, out, err) = run(dir.path(), "state verify");
    assert_eq!(code, 5, "{out}{err}");
    assert!(out.contains("PROBLEM: target/state.db.lock") && out.contains("--repair"), "{out}");
    let (code, out, err) = run(dir.path(), "state verify --repair");
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("state.db.lock.damaged-") && !out.contains("state.db.damaged-"), "{out}");
    let backend = create_state_backend("database", &BackendOptions::new().base_path(dir.path().join("target"))).unwrap();
    backend.initialize().await.unwrap();
    assert!(backend.highest_token().await.unwrap() >= 1 << 40);
    backend.close().await.unwrap();
    assert_eq!(json(dir.path(), "state verify --repair")["repaired"], Value::Array(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_meant_is_wrong_usage() {
    for backend in ["file", "database"] {
        wrong_usage(&project(backend).await);
    }
}

fn wrong_usage(dir: &tempfile::TempDir) {
    let before = tree(dir.path());
    for arguments in [
        "state cleanup --days 99999999",
        "state cleanup --days -1",
        "migrate-state --backend database --from bogus",
        "migrate-state --backend file --from file",
        "migrate-state --backend database --from database",
        "migrate-state --backend database --from sqlite",
        "migrate-state --backend database --from sqlite --no-dry-run",
        "migrate-state --backend elsewhere",
    ] {
        let (code, out, err) = run(dir.path(), arguments);
        assert_eq!((code, &*out), (2, ""), "{arguments}: {err}");
    }
    assert_eq!(tree(dir.path()), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_in_the_way_is_named_and_no_disk_is_blamed() {
    for name in ["run_state.json", "run_state.json.journal", "run_state.json.lock"] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("target").join(name)).unwrap();
        for arguments in ["state runs", "state verify"] {
            let (code, out, err) = run(dir.path(), arguments);
            assert!(code != 0 && format!("{out}{err}").contains("move it aside"), "{name}: {arguments}: {code} {out}{err}");
            assert!(!err.contains("check the disk"), "{name}: {arguments}: {err}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_document_says_how_the_previous_one_comes_back() {
    let dir = project("file").await;
    let document = dir.path().join("target/run_state.json");
    fs::write(&document, "{\"run_id\": \"x\", \"nodes\": {").unwrap();
    for arguments in ["state runs", "state verify", "state verify --repair"] {
        let (code, out, err) = run(dir.path(), arguments);
        assert_eq!(code, 5, "{arguments}");
        let told = format!("{out}{err}");
        assert!(told.contains("seeknal state verify --repair --use-previous"), "{arguments}: {told}");
        assert!(told.contains("run_state.json.prev"), "{arguments}: {told}");
    }
    let repaired = json(dir.path(), "state verify --repair --use-previous");
    assert_eq!(repaired["sound"], true);
    assert_eq!(json(dir.path(), "state runs").as_array().unwrap().len(), 4);
}

/// What is ordinary after a crash or a restored backup is told, and is no damage.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_and_a_journal_of_another_document_are_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    state.create_run("run_1", NewRun::running()).await.unwrap();
    state.create_run("run_2", NewRun::running()).await.unwrap();
    // As kill -9 leaves it: the folder in mid-flight, with half a record.
    let killed = tempfile::tempdir().unwrap();
    copy_folder(dir.path(), killed.path());
    state.close().await.unwrap();
    let journal = killed.path().join("target/run_state.json.journal");
    let mut bytes = fs::read(&journal).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap().next_multiple_of(8);
    bytes[end..end + 4].copy_from_slice(b"SKF1");
    fs::write(&journal, &bytes).unwrap();
    let before = tree(killed.path());
    let verified = json(killed.path(), "state verify");
    assert_eq!((&verified["sound"], &verified["problems"]), (&true.into(), &Value::Array(Vec::new())));
    assert!(verified["checked"].to_string().contains("torn"), "{verified}");
    assert_eq!(tree(killed.path()), before);
    // The guide's way back, beside a journal.
    fs::write(killed.path().join("target/run_state.json"), crate::projects::GUIDE).unwrap();
    let verified = json(killed.path(), "state verify");
    assert_eq!(verified["sound"], true, "{verified}");
    assert!(verified["checked"].to_string().contains("do not belong to the document"), "{verified}");
}

/// Whatever needs more than a few pages meets a full disk: the document is backed up, the database finds no room.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_fails_after_it_wrote_something_ends_with_6_and_says_what() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    fs::write(dir.path().join("target/run_state.json"), crate::projects::GUIDE).unwrap();
    let line = format!(
        "trap '' XFSZ; ulimit -f 8; exec {} migrate-state --backend database --no-dry-run",
        env!("CARGO_BIN_EXE_seeknal")
    );
    let output = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{err}");
    assert!(err.contains("backed up as target/run_state.json.bak; then: "), "{err}");
    assert_eq!(fs::read_to_string(dir.path().join("target/run_state.json.bak")).unwrap(), crate::projects::GUIDE);
    assert!(!dir.path().join("seeknal_project.yml").exists(), "the settings are not switched");
    assert_eq!(json(dir.path(), "state runs")[0]["run_id"], "run_20240110_120000");
    // With room it goes on.
    let (code, _, err) = run(dir.path(), "migrate-state --backend database --no-dry-run");
    assert_eq!(code, 0, "{err}");
}

/// The journal finds room for what is deleted, the document for what stays does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_that_cannot_be_closed_ends_with_6_and_says_what_it_deleted() {
    let dir = crate::projects::project("file").await;
    let state = open(dir.path()).await;
    state.set_metadata("still", "long", "x".repeat(4 << 20)).await.unwrap();
    state.close().await.unwrap();
    let line = format!("trap '' XFSZ; ulimit -f 3072; exec {} state cleanup --days 30", env!("CARGO_BIN_EXE_seeknal"));
    let output = Command::new("bash").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{err}");
    assert!(err.contains("3 run(s) were deleted; then: "), "{err}");
    let runs = json(dir.path(), "state runs");
    assert_eq!((runs.as_array().unwrap().len(), &runs[0]["run_id"]), (1, &Value::from("still")), "they are gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_that_names_the_backend_is_told_whatever_it_says() {
    for (set, mend) in [("file", "set it to database"), ("database", "as long as it is set")] {
        for arguments in ["migrate-state --backend database", "migrate-state --backend database --no-dry-run"] {
            let dir = project("file").await;
            let output =
                seeknal(dir.path()).args(arguments.split_whitespace()).env("SEEKNAL_STATE_BACKEND", set).output().unwrap();
            let err = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(0), "{err}");
            let told = format!("SEEKNAL_STATE_BACKEND={set} overrides the settings file");
            assert!(err.contains(&told) && err.contains(mend), "{arguments}: {err}");
        }
    }
}

/// Another system's status can be asked for, and steers no terminal.
#[tokio::test(flavor = "multi_thread")]
async fn runs_of_a_foreign_status_are_listed_by_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    let foreign = crate::projects::GUIDE.replace("\"status\": \"running\"", "\"status\": \"upstream_failed\"");
    fs::write(dir.path().join("target/run_state.json"), foreign).unwrap();
    let runs = json(dir.path(), "state runs --status upstream_failed");
    assert_eq!((runs.as_array().unwrap().len(), &runs[0]["status"]), (1, &"upstream_failed".into()));
    assert_eq!(json(dir.path(), "state runs --status running"), Value::Array(Vec::new()));
}

/// Ids are data: whatever they hold, they name no path, and what cannot be one is refused in one line.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_will_not_become_ready_is_shown_with_what_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    let mut tx = state.transaction();
    tx.create_run("r", NewRun::running());
    tx.set_node_state("r", "orders", NodeUpdate::failed("no such table"));
    tx.set_node_state("r", "report", NodeUpdate::pending().depends_on(["orders"]));
    tx.set_node_state("r", "mail", NodeUpdate::pending().depends_on(["report"]));
    tx.set_node_state("r", "other", NodeUpdate::pending().depends_on(["gone"]));
    tx.set_node_state("r", "free", NodeUpdate::pending());
    tx.commit().await.unwrap();
    state.close().await.unwrap();

    let (_, table, _) = run(dir.path(), "state show r");
    let line = |node: &str| table.lines().find(|line| line.starts_with(node)).unwrap();
    assert!(line("mail").contains("blocked by orders (failed)"), "{table}");
    assert!(line("report").contains("blocked by orders (failed)"), "{table}");
    assert!(line("other").contains("blocked by gone (missing)"), "{table}");
    assert!(line("orders").contains("no such table") && !line("free").contains("blocked"), "{table}");
    let nodes = &json(dir.path(), "state show r")["nodes"];
    assert_eq!(nodes["mail"]["blocked"], serde_json::json!({"by": "orders", "reason": "failed"}));
    assert_eq!((&nodes["free"]["blocked"], &nodes["orders"]["blocked"]), (&Value::Null, &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_ids_are_data_and_never_paths() {
    for backend in ["file", "database"] {
        let dir = project(backend).await;
        let state = seeknal_state::project::open(dir.path()).await.unwrap();
        let fine =
            ["../x", "../../etc/passwd", "/abs", "a/b", "a:b", "日本語", "--days", "'; DROP TABLE runs; --", "%00", "C:\\x"];
        for id in fine {
            state.create_run(id, NewRun::running()).await.unwrap();
            state.set_node_state(id, id, seeknal_state::NodeUpdate::success().row_count(3)).await.unwrap();
            state.add_completed_partition(id, id, id).await.unwrap();
        }
        state.close().await.unwrap();
        let names =
            |folder: &Path| -> Vec<_> { tree(folder).into_keys().filter(|name| !name.starts_with("target/state.db")).collect() };
        let before = names(dir.path());
        for id in fine {
            let output = seeknal(dir.path()).args(["state", "show", "-o", "json", "--", id]).output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{backend} {id:?}: {output:?}");
            let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!((&shown["run_id"], &shown["nodes"][id]["row_count"]), (&id.into(), &3.into()), "{backend}");
        }
        assert_eq!(names(dir.path()), before, "{backend}: nothing was made for a name");
        assert!(!dir.path().join("x").exists());
        let long = "x".repeat(100_000);
        for (id, code) in [("", 2), ("a\nb", 2), ("\u{1b}[31m", 2), (&*long, 2)] {
            let output = seeknal(dir.path()).args(["state", "show", "--", id]).output().unwrap();
            let err = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(code), "{backend}: {err}");
            assert!(!err.contains('\u{1b}'), "{err:?}");
        }
    }
}
