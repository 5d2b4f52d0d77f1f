//! The `seeknal` command, as an operator types it.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use crate::projects::{GUIDE, open, project, put, tree};
use crate::{json, run, seeknal};
use seeknal_state::model::{Batch, Entry, LeaseKey, LeaseMutation, LeaseOwner, Mutation, NewRun, Outcome, RunId, time};
use seeknal_state::store::StateBackend;
use serde_json::Value;

/// One line on stderr that begins with `error: `.
fn assert_error(err: &str) {
    let lines: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{err}");
    assert!(!err.contains('\u{1b}'), "colours beside a terminal only: {err}");
}

#[test]
fn a_project_without_state_gets_none_by_looking_at_it() {
    for backend in ["file", "database"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: {backend}\n")).unwrap();
        assert_eq!(json(dir.path(), "state runs"), serde_json::json!([]));
        assert!(run(dir.path(), "state runs").1.contains("There is no state yet"));
        assert_eq!(json(dir.path(), "state locks"), serde_json::json!({"leases": [], "processes": []}));
        assert_eq!(json(dir.path(), "state verify")["sound"], true);
        assert_eq!(json(dir.path(), "state cleanup --days 1")["deleted"], 0);
        assert_eq!(json(dir.path(), "migrate-state --backend database")["plan"], Value::Null);
        for missing in ["state show run_1", "state unlock 1"] {
            let (code, _, err) = run(dir.path(), missing);
            assert_eq!(code, 3, "{missing}: {err}");
            assert_error(&err);
        }
        assert_eq!(tree(dir.path()).keys().collect::<Vec<_>>(), ["seeknal_project.yml"], "{backend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_listed_and_shown_whole() {
    for backend in ["file", "database"] {
        let dir = project(backend).await;
        let ids = |arguments: &str| {
            let runs = json(dir.path(), arguments);
            runs.as_array().unwrap().iter().map(|run| run["run_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(ids("state runs"), ["run_2", "run_1", "run_0", "still"]);
        assert_eq!(ids("state runs --status running"), ["still"]);
        assert_eq!(ids("state runs --prefix run_ --limit 2"), ["run_2", "run_1"]);
        assert_eq!(ids("state runs --all --status running --status success").len(), 4);
        let (_, table, notes) = run(dir.path(), "state runs --limit 1");
        assert!(table.contains("run_2") && table.contains("1 failed") && !table.contains("run_1"), "{table}");
        assert!(notes.contains("--all"), "{notes}");

        let shown = json(dir.path(), "state show run_1");
        assert_eq!((&shown["status"], &shown["metadata"]["trigger"]), (&"success".into(), &"cron".into()));
        let node = &shown["nodes"]["load"];
        assert_eq!(node["status"], "success");
        assert_eq!((&node["attempt"], &node["row_count"], &node["duration_ms"]), (&1.into(), &101.into(), &1500.into()));
        assert_eq!(node["fingerprint"], "f00");
        assert_eq!(node["watermarks"]["w"], "9");
        assert_eq!(node["completed_partitions"], serde_json::json!(["dt=2024-01-01"]));
        assert_eq!(node["completed_intervals"], serde_json::json!([["2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z"]]));
        assert_eq!(shown["nodes"]["a/b"]["error"], "line 1\nline 2");
        for field in ["version", "started_at", "finished_at", "error", "metadata", "extra", "run_id", "node_id"] {
            assert!(node.as_object().unwrap().contains_key(field), "{field}");
        }
        let (_, table, _) = run(dir.path(), "state show run_1");
        assert!(table.contains("line 1 line 2"), "{table}");
        assert_eq!(run(dir.path(), "state show run_9").0, 3);
        assert_eq!(run(dir.path(), "state show run_1 --project-path nowhere").0, 3);
    }
}

#[test]
fn the_guides_own_file_moves_as_the_guide_says() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    fs::write(dir.path().join("target/run_state.json"), GUIDE).unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "# mine\r\nname: demo\r\n").unwrap();
    let before = tree(dir.path());
    let (code, preview, _) = run(dir.path(), "migrate-state --backend database");
    assert_eq!(code, 0);
    assert!(preview.contains("1 run, 1 node, 1000 rows, 1 interval, 1 partition"), "{preview}");
    assert!(preview.contains("run_20240110_120000") && preview.contains("--no-dry-run"), "{preview}");
    assert!(!run(dir.path(), "migrate-state --backend database --summary").1.contains("run_20240110_120000"));
    assert_eq!(tree(dir.path()), before, "a preview changes nothing");

    let shown = json(dir.path(), "state show run_20240110_120000");
    fs::set_permissions(dir.path().join("target/run_state.json"), fs::Permissions::from_mode(0o600)).unwrap();
    let (code, done, err) = run(dir.path(), "migrate-state --backend database --no-dry-run");
    assert_eq!(code, 0, "{err}");
    for copy in ["run_state.json.bak", "state.db"] {
        let mode = fs::metadata(dir.path().join("target").join(copy)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{copy} is for those who may read the document");
    }
    assert!(done.contains("\ncp target/run_state.json.bak target/run_state.json\nstate_backend: file\n"), "{done}");
    assert_eq!(
        fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap(),
        "# mine\r\nname: demo\r\nstate_backend: database\r\n"
    );
    let without_versions = |mut state: Value| {
        state["version"] = Value::Null;
        state["nodes"]["my_node"]["version"] = Value::Null;
        state
    };
    assert_eq!(without_versions(json(dir.path(), "state show run_20240110_120000")), without_versions(shown));

    // The rollback, as it is printed.
    fs::copy(dir.path().join("target/run_state.json.bak"), dir.path().join("target/run_state.json")).unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: file\n").unwrap();
    assert_eq!(json(dir.path(), "state runs")[0]["run_id"], "run_20240110_120000");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_ends_with_4_also_in_the_preview() {
    let dir = project("file").await;
    let database = open("database", &dir.path().join("target")).await;
    let at = time::parse("2024-01-01").unwrap();
    put(&database, "run_1", vec![Mutation::Create { run: NewRun::pending(), at }]).await;
    database.close().await.unwrap();
    for arguments in ["migrate-state --backend database", "migrate-state --backend database --no-dry-run"] {
        let (code, _, err) = run(dir.path(), arguments);
        assert_eq!(code, 4, "{err}");
        assert_error(&err);
        assert!(err.contains("\"run_1\""), "{err}");
    }
    assert!(!dir.path().join("seeknal_project.yml").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_live_writer_reading_works_and_writing_names_it() {
    let dir = project("file").await;
    let writer = open("file", &dir.path().join("target")).await;
    let at = time::parse("2024-02-01").unwrap();
    put(&writer, "live", vec![Mutation::Create { run: NewRun::running(), at }]).await;
    assert_eq!(json(dir.path(), "state runs")[0]["run_id"], "live");
    assert_eq!(json(dir.path(), "state show live")["status"], "running");
    assert_eq!(json(dir.path(), "state verify")["sound"], true);
    let locks = json(dir.path(), "state locks");
    assert_eq!(locks["processes"][0]["pid"], std::process::id(), "{locks}");
    assert_eq!(run(dir.path(), "state cleanup --days 1 --dry-run").0, 0);
    assert_eq!(run(dir.path(), "migrate-state --backend database").0, 0);
    for arguments in ["state cleanup --days 1", "state unlock 1", "migrate-state --backend database --no-dry-run"] {
        let (code, _, err) = run(dir.path(), arguments);
        assert_eq!(code, 4, "{arguments}: {err}");
        assert_error(&err);
        assert!(err.contains(&std::process::id().to_string()), "{arguments}: {err}");
    }
    writer.close().await.unwrap();
    let (code, _, err) = run(dir.path(), "state unlock 1");
    assert_eq!(code, 3, "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_deletes_old_runs_and_keeps_what_they_completed() {
    for backend in ["file", "database"] {
        let dir = project(backend).await;
        let plan = json(dir.path(), "state cleanup --days 30 --keep-last 1 --dry-run");
        assert_eq!((plan["delete"].as_array().unwrap().len(), &plan["deleted"]), (2, &0.into()));
        assert_eq!(json(dir.path(), "state runs").as_array().unwrap().len(), 4, "a dry run changes nothing");
        assert_eq!(json(dir.path(), "state cleanup --days 30 --keep-last 1")["deleted"], 2);
        assert_eq!(json(dir.path(), "state cleanup --days 30")["deleted"], 1);
        let left = json(dir.path(), "state runs");
        assert_eq!(left.as_array().unwrap().len(), 1);
        assert_eq!(left[0]["run_id"], "still");
        let backend = open(backend, &dir.path().join("target")).await;
        let node = seeknal_state::model::NodeId::new("load").unwrap();
        assert_eq!(backend.coverage(&node).await.unwrap().intervals.len(), 2);
        assert_eq!(backend.last_success(&node).await.unwrap().unwrap().run_id, "run_2");
        backend.close().await.unwrap();
    }
    // A document of Seeknal tells no status of its run: as long as a node runs it has not ended, although another one failed.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    let foreign = r#"{"version": "2.0", "run_id": "old", "last_run": "2024-01-10T12:00:00", "nodes": {
        "a": {"status": "failed", "last_run": "2024-01-10T12:00:00"}, "b": {"status": "running", "last_run": "2024-01-10T12:00:00"}}}"#;
    fs::write(dir.path().join("target/run_state.json"), foreign).unwrap();
    assert_eq!(json(dir.path(), "state cleanup --days 30")["deleted"], 0);
    let dir = project("file").await;
    for (arguments, code, words) in [
        ("--days 99999999999", 2, "write a whole number of days, from 0 to 7"),
        ("--days -1", 2, "write a whole number of days"),
        ("--days 30d", 2, "write a whole number of days"),
        ("--days 99999999999999999999999", 2, "write a whole number of days"),
        ("--days 1 --keep-last -1", 2, "write a whole number"),
        ("", 2, "--days"),
    ] {
        let (code_of, _, err) = run(dir.path(), &format!("state cleanup {arguments}"));
        assert!(code_of == code && err.contains(words), "{arguments}: {code_of} {err}");
    }
    for arguments in ["state unlock abc", "state runs --limit 0", "state runs --limit many"] {
        let (code, _, err) = run(dir.path(), arguments);
        assert!(code == 2 && err.contains("a whole number"), "{arguments}: {err}");
    }
}

async fn grant(backend: &Arc<dyn StateBackend>, run: &str) -> u64 {
    let at = time::parse("2024-01-01").unwrap();
    let owner = LeaseOwner { process: backend.process().unwrap(), name: Arc::from("executor 7") };
    let key = LeaseKey::run(RunId::new(run).unwrap());
    let grant = LeaseMutation::Grant { key, owner, purpose: Some(Arc::from("tests")), at, ttl_ms: 600_000 };
    let answer = backend.commit(Arc::new(Batch::new(vec![Entry { leases: vec![grant], ..Entry::default() }]))).await.unwrap();
    match &answer.outcomes[0] {
        Outcome::Applied(receipt) => receipt.grants[0].token.0,
        refused @ Outcome::Refused(_) => panic!("{refused:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_a_database_are_listed_and_taken_away() {
    let dir = project("database").await;
    let holder = open("database", &dir.path().join("target")).await;
    let token = grant(&holder, "run_1").await;
    let locks = json(dir.path(), "state locks");
    assert_eq!((&locks["leases"][0]["token"], &locks["leases"][0]["owner"]), (&token.into(), &"executor 7".into()));
    assert_eq!(locks["processes"][0]["pid"], std::process::id(), "{locks}");
    assert!(run(dir.path(), "state locks").1.contains("executor 7"));
    let plan = json(dir.path(), "state cleanup --days 30 --dry-run");
    assert_eq!(plan["locked"], serde_json::json!(["run_1"]));
    assert_eq!(run(dir.path(), &format!("state unlock {}", token + 1)).0, 3);
    assert_eq!(json(dir.path(), &format!("state unlock {token}"))["lease"]["run_id"], "run_1");
    assert_eq!(run(dir.path(), &format!("state unlock {token}")).0, 3);
    assert_eq!(json(dir.path(), "state locks")["leases"], serde_json::json!([]));
    holder.close().await.unwrap();
}

#[test]
fn damaged_and_foreign_state_ends_with_5_and_stays_as_it_is() {
    let garbage = |dir: &Path, name: &str, bytes: &[u8]| {
        fs::create_dir_all(dir.join("target")).unwrap();
        fs::write(dir.join("target").join(name), bytes).unwrap();
    };
    for (name, bytes) in [
        ("run_state.json", &b""[..]),
        ("run_state.json", b"{\"run_id\": \"x\", \"nodes\": {"),
        ("run_state.json", &[0; 4096]),
        ("state.db", b"this is no database, whatever its name says, and it is long enough to be looked at, header and all....."),
    ] {
        let dir = tempfile::tempdir().unwrap();
        garbage(dir.path(), name, bytes);
        if name == "state.db" {
            fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
        }
        for arguments in ["state runs", "state show x", "state cleanup --days 1", "state verify"] {
            let (code, out, err) = run(dir.path(), arguments);
            assert_eq!(code, 5, "{name} {arguments}: {out}{err}");
            assert_error(&err);
        }
        assert_eq!(fs::read(dir.path().join("target").join(name)).unwrap(), bytes, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_is_no_error() {
    let dir = project("file").await;
    let backend = open("file", &dir.path().join("target")).await;
    let at = time::parse("2024-02-01").unwrap();
    for index in 0..1500 {
        put(&backend, &format!("many_{index}"), vec![Mutation::Create { run: NewRun::pending(), at }]).await;
    }
    backend.close().await.unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_seeknal"))
        .current_dir(dir.path())
        .args(["state", "runs", "--all", "-o", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}

#[test]
fn help_tells_the_exit_codes_and_bad_settings_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let commands =
        ["runs", "show", "locks", "unlock", "end", "verify", "cleanup"].map(|command| format!("state {command} --help"));
    for arguments in ["--help", "state --help", "migrate-state --help"].into_iter().chain(commands.iter().map(String::as_str)) {
        let (code, out, _) = run(dir.path(), arguments);
        assert_eq!(code, 0);
        for told in ["Exit codes:", "  2  wrong usage", "seeknal_project.yml"].into_iter().chain(crate::VARIABLES) {
            assert!(out.contains(told), "{arguments} does not tell {told}: {out}");
        }
        // Who only reads has nothing done when something fails.
        let only_reads = ["runs", "show", "locks"].iter().any(|command| arguments.contains(command));
        assert_eq!(out.contains("\n  6  "), !only_reads, "{arguments}: {out}");
    }
    let (_, out, _) = run(dir.path(), "state verify --help");
    let previous = out.split("--use-previous").nth(1).and_then(|rest| rest.split("\n  -").next());
    assert!(previous.is_some_and(|previous| previous.contains("--repair")), "{out}");
    fs::write(dir.path().join("seeknal_project.yml"), "name: x\nstate_backend: fiel\n").unwrap();
    let (code, _, err) = run(dir.path(), "state runs");
    assert_eq!(code, 1);
    assert!(err.contains("seeknal_project.yml:2:") && err.contains("did you mean \"file\""), "{err}");
    let output = seeknal(dir.path()).args(["state", "runs"]).env("SEEKNAL_STATE_BACKEND", "file").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "the environment overrides the file");
}

#[test]
fn a_token_in_a_wrong_place_is_not_repeated() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        "migrate-state --backend libsql://t0ken-t0ken@host",
        "migrate-state --backend eyJ0t0ken-t0kenAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.t0ken-t0ken",
        "migrate-state --from libsql://t0ken-t0ken@host --backend nonsense",
        "state unlock libsql://t0ken-t0ken@host",
        "state libsql://t0ken-t0ken@host",
        "libsql://t0ken-t0ken@host",
        "state runs libsql://t0ken-t0ken@host",
        "--database-url=libsql://t0ken-t0ken@host state runs",
    ] {
        let (code, out, err) = run(dir.path(), arguments);
        assert_ne!(code, 0, "{arguments}");
        assert!(!out.contains("t0ken") && !err.contains("t0ken") && !err.is_empty(), "{arguments}: {err}");
    }
    let (_, _, err) = run(dir.path(), "migrate-state --backend nonsense");
    assert!(err.contains("nonsense") && err.contains("possible values"), "what is plain is shown: {err}");
}

/// The settings of a project whose state is on a server.
pub(super) fn on_server(dir: &Path, place: &crate::support::Place) {
    let url = place.url.as_deref().unwrap();
    let schema = place.schema.iter().map(|schema| format!("seeknal_state:\n  options:\n    database_schema: {schema}\n"));
    let text = format!("state_backend: database\ndatabase_url: {url}\n{}", schema.collect::<String>());
    fs::write(dir.join("seeknal_project.yml"), text).unwrap();
}

/// From `state.db` to PostgreSQL, from there to libSQL, and from there to another schema: as an operator types it, with a preview before each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_moves_from_server_to_server_as_it_is_told() {
    let Some(cluster) = crate::support::postgres::cluster() else { return };
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    let dir = project("database").await;
    let place = |url: String, schema: Option<String>| crate::support::Place {
        url: Some(url),
        schema,
        ..crate::support::Place::default()
    };
    // Of its own: the place to come from is named by a URL alone, and so is in the schema that the settings name.
    let postgres = place(cluster.url("?sslmode=disable"), Some(crate::support::postgres::fresh_schema()));
    let libsql = crate::support::Place { schema: postgres.schema.clone(), ..place(server.url(), None) };
    let moves = |from: &str| format!("migrate-state --backend database --from {from}");
    for (from, to) in [("sqlite", &postgres), (postgres.url.as_deref().unwrap(), &libsql)] {
        on_server(dir.path(), to);
        let (code, out, err) = run(dir.path(), &format!("{} --summary", moves(from)));
        assert!(code == 0 && out.contains("Would move: 4 runs"), "{out}{err}");
        assert!(!format!("{out}{err}").contains(crate::support::postgres::PASSWORD), "a password is shown: {out}{err}");
        assert_eq!(json(dir.path(), "state runs"), serde_json::json!([]), "a preview changes nothing");
        let (code, out, err) = run(dir.path(), &format!("{} --no-dry-run", moves(from)));
        assert!(code == 0 && out.contains("Verified: 4 runs"), "{out}{err}");
        assert!(!format!("{out}{err}").contains(crate::support::postgres::PASSWORD), "a password is shown: {out}{err}");
        assert_eq!(json(dir.path(), "state runs").as_array().unwrap().len(), 4);
        assert_eq!(json(dir.path(), "state verify")["sound"], true);
        let again = json(dir.path(), &format!("{} --no-dry-run", moves(from)));
        assert_eq!((&again["moved"]["moved"]["runs"], &again["moved"]["equal_runs"]), (&0.into(), &4.into()), "{again}");
    }
    // And back, into a schema in which nothing is yet.
    let back = place(cluster.url("?sslmode=disable"), Some(crate::support::postgres::fresh_schema()));
    on_server(dir.path(), &back);
    let moved = json(dir.path(), &format!("{} --no-dry-run", moves(&server.url())));
    assert_eq!(moved["moved"]["verified"]["runs"], 4, "{moved}");

    // What came round is what went out, row by row.
    let reader = |place: &crate::support::Place| {
        seeknal_state::create_state_backend("database", &place.options().read_only(true)).unwrap()
    };
    let local = reader(&crate::support::Place::of_folder(&dir.path().join("target")));
    local.initialize().await.unwrap();
    for place in [&postgres, &libsql, &back] {
        let other = reader(place);
        other.initialize().await.unwrap();
        let counts = seeknal_state::project::migrate::verify(&*local, &*other).await.unwrap();
        assert_eq!((counts.runs, counts.nodes, counts.rows, counts.coverage_nodes), (4, 6, 303, 1));
        other.close().await.unwrap();
    }
}

/// From the file into `state.db`, and from there to a server: the file is what was left before, and is not taken for the state because nobody named `state.db`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_does_not_get_the_file_that_was_left_for_the_database() {
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    let dir = project("file").await;
    let moves = "migrate-state --backend database";
    assert_eq!(run(dir.path(), &format!("{moves} --no-dry-run")).0, 0);
    let database = open("database", &dir.path().join("target")).await;
    put(&database, "later", vec![Mutation::Create { run: NewRun::running(), at: time::parse("2024-02-01").unwrap() }]).await;
    database.close().await.unwrap();
    let place = crate::support::Place { url: Some(server.url()), ..crate::support::Place::default() };
    on_server(dir.path(), &place);
    for flags in ["", " --no-dry-run"] {
        let (code, out, err) = run(dir.path(), &format!("{moves}{flags}"));
        assert_eq!(code, 4, "{out}{err}");
        assert!(["--from sqlite", "--from file", "target/state.db"].iter().all(|told| err.contains(told)), "{err}");
        assert_eq!(json(dir.path(), "state runs"), serde_json::json!([]), "nothing was moved");
    }
    // Either can be meant; and where nothing is left to move nobody has to choose.
    assert_eq!(json(dir.path(), &format!("{moves} --from file"))["plan"]["moves"]["runs"], 4);
    let moved = json(dir.path(), &format!("{moves} --from sqlite --no-dry-run"));
    assert_eq!(moved["moved"]["verified"]["runs"], 5);
    let back = moved["rollback"].as_array().unwrap();
    assert!(
        back.last().unwrap().as_str().unwrap().contains("fencing tokens"),
        "what a server gave out is not known beside it: {back:?}"
    );
    assert_eq!(json(dir.path(), &format!("{moves} --no-dry-run"))["moved"]["equal_runs"], 4);
}
