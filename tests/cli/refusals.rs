//! What the command refuses, hides and escapes, and what it says of a move that is done already.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use crate::projects::{GUIDE, open, project, put, tree};
use crate::{json, run, seeknal, told};
use seeknal_state::model::{Mutation, NewRun, time};
use serde_json::Value;

const PREVIEW: &str = "migrate-state --backend database";
const EXECUTE: &str = "migrate-state --backend database --no-dry-run";

/// A project that was moved to its database.
async fn moved() -> tempfile::TempDir {
    let dir = project("file").await;
    assert_eq!(run(dir.path(), EXECUTE).0, 0);
    dir
}

/// Nobody is told to move the state in use aside, or to delete what is in it.
fn assert_harmless(text: &str) {
    for harm in ["-wal", "Move target/state.db", "delete these runs", "delete them there"] {
        assert!(!text.contains(harm), "{harm}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_move_is_told_to_be_one_whatever_went_on_since() {
    let dir = moved().await;
    let (code, out, err) = run(dir.path(), EXECUTE);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("says state_backend: database already: target/state.db is the state in use"), "{err}");
    assert!(err.contains("target/run_state.json is what was left behind"), "{err}");
    assert!(out.contains("said state_backend: database already") && !out.contains("To take it back"), "{out}");

    // New work there.
    let database = open("database", &dir.path().join("target")).await;
    let at = time::parse("2024-03-01").unwrap();
    put(&database, "new", vec![Mutation::Create { run: NewRun::running(), at }]).await;
    database.close().await.unwrap();
    for arguments in [PREVIEW, EXECUTE] {
        let (code, out, err) = run(dir.path(), arguments);
        assert!(code == 0 && err.contains("\"new\"") && err.contains("work went on there"), "{err}");
        assert_harmless(&format!("{out}{err}"));
    }

    // What was cleaned up there would come back: that is said before.
    assert_eq!(run(dir.path(), "state cleanup --days 30").0, 0);
    for arguments in [PREVIEW, EXECUTE] {
        let (code, out, err) = run(dir.path(), arguments);
        assert!(code == 0 && err.contains("3 runs that target/state.db lacks") && err.contains("\"run_1\""), "{err}");
        assert!(err.contains("deleted there since"), "{err}");
        assert_harmless(&format!("{out}{err}"));
    }

    // An old run that went on there.
    let database = open("database", &dir.path().join("target")).await;
    let partition = "dt=later".parse().unwrap();
    put(&database, "run_1", vec![Mutation::AddPartition { node: "load".parse().unwrap(), partition }]).await;
    database.close().await.unwrap();
    for arguments in [PREVIEW, EXECUTE] {
        let (code, out, err) = run(dir.path(), arguments);
        assert!(code == 4 && err.contains("error: seeknal_project.yml:1 says state_backend: database already"), "{err}");
        assert!(err.contains("other content for: \"run_1\""), "{err}");
        assert_harmless(&format!("{out}{err}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_preview_names_where_the_state_would_go() {
    let dir = project("file").await;
    let (_, out, _) = run(dir.path(), PREVIEW);
    assert!(out.starts_with("From target/run_state.json to target/state.db (database backend, no state yet)\n"), "{out}");
    let moving = project("file").await;
    let (previewed, moved) = (json(moving.path(), PREVIEW), json(moving.path(), EXECUTE));
    assert_eq!((&previewed["from_exists"], &previewed["to_exists"]), (&true.into(), &false.into()));
    assert_eq!((&previewed["from"], &previewed["to"]), (&moved["from"], &moved["to"]), "one place has one name");
    let url = "database_url: postgres://u:S3kr3t@127.0.0.1:1/d\n";
    fs::write(dir.path().join("seeknal_project.yml"), url).unwrap();
    let (_, out, err) = run(dir.path(), PREVIEW);
    assert!(
        err.contains("postgres://127.0.0.1:1/d (schema seeknal_state)") && !format!("{out}{err}").contains("S3kr3t"),
        "{err}"
    );
}

/// The environment wins over the file, for what stands among its options too.
#[tokio::test(flavor = "multi_thread")]
async fn the_schema_of_the_environment_is_the_one_that_is_worked_on() {
    let dir = project("file").await;
    let text = "database_url: postgres://127.0.0.1:1/d\nseeknal_state:\n  options: {database_schema: production}\n";
    fs::write(dir.path().join("seeknal_project.yml"), text).unwrap();
    for (variable, schema) in [(None, "production"), (Some(" "), "production"), (Some("staging"), "staging")] {
        let mut command = seeknal(dir.path());
        command.args(PREVIEW.split_whitespace()).envs(variable.map(|schema| ("SEEKNAL_DATABASE_SCHEMA", schema)));
        let (_, _, err) = told(&mut command);
        assert!(err.contains(&format!("postgres://127.0.0.1:1/d (schema {schema})")), "{variable:?}: {err}");
    }
}

/// Two tokens are refused, and the places that have them are named; what is empty has none. A variable and the file are no two: the variable wins.
#[test]
fn two_tokens_are_refused_where_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let option = "the option `database_token`";
    for (url, options, variable, named) in [
        ("libsql://t0ken-a@h.invalid", "{database_token: t0ken-b}", None, Some(option)),
        ("libsql://h.invalid?authToken=t0ken-a", "{database_token: t0ken-b}", Some(" "), Some(option)),
        ("libsql://t0ken-a@h.invalid", "{database_token: t0ken-b}", Some("t0ken-c"), Some("SEEKNAL_DATABASE_TOKEN")),
        ("libsql://t0ken-a@h.invalid", "{database_token: \"\"}", Some("t0ken-c"), Some("SEEKNAL_DATABASE_TOKEN")),
        ("libsql://t0ken-a@h.invalid", "{}", Some("t0ken-c"), Some("SEEKNAL_DATABASE_TOKEN")),
        ("libsql://t0ken-a@h.invalid", "{database_token: \"\"}", None, None),
        ("libsql://h.invalid", "{database_token: t0ken-b}", Some("t0ken-c"), None),
    ] {
        let text = format!("state_backend: database\ndatabase_url: {url}\nseeknal_state:\n  options: {options}\n");
        fs::write(dir.path().join("seeknal_project.yml"), text).unwrap();
        let mut command = seeknal(dir.path());
        command.args(["state", "runs"]).envs(variable.map(|token| ("SEEKNAL_DATABASE_TOKEN", token)));
        let (code, out, err) = told(&mut command);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(!err.contains("t0ken-"), "{err}");
        assert_eq!(err.contains("two tokens"), named.is_some(), "{url}, {options}, {variable:?}: {err}");
        assert!(named.is_none_or(|named| err.contains(named)), "{url}, {options}, {variable:?}: {err}");
    }
}

/// The token is the one of the server that the settings name, and of no other.
#[test]
fn a_token_goes_to_its_own_server_only() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let heard = std::thread::spawn(move || {
        let mut heard = Vec::new();
        for stream in listener.incoming() {
            let (mut stream, mut head) = (stream.unwrap(), Vec::new());
            let mut piece = [0; 4096];
            while !head.ends_with(b"END") && !head.windows(4).any(|end| end == b"\r\n\r\n") {
                match stream.read(&mut piece).unwrap() {
                    0 => break,
                    read => head.extend_from_slice(&piece[..read]),
                }
            }
            if head.ends_with(b"END") {
                break;
            }
            heard.push(String::from_utf8(head).unwrap());
        }
        heard
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "database_url: http://127.0.0.1:1\n").unwrap();
    for to in ["database", "file"] {
        let mut command = seeknal(dir.path());
        command.args(["migrate-state", "--backend", to, "--from", &format!("http://{at}")]);
        assert_ne!(told(command.env("SEEKNAL_DATABASE_TOKEN", "t0ken-new")).0, 0);
    }
    TcpStream::connect(at).unwrap().write_all(b"END").unwrap();
    let heard = heard.join().unwrap();
    assert!(!heard.is_empty() && heard.iter().all(|head| !head.contains("t0ken")), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_newer_or_another_program_wrote_is_neither_copied_nor_called_damaged() {
    // Two numbers in the header of a database: `user_version` and `application_id`.
    for (at, why) in [(60, "newer"), (68, "another program")] {
        let dir = project("database").await;
        let database = dir.path().join("target/state.db");
        let mut bytes = fs::read(&database).unwrap();
        bytes[at..at + 4].copy_from_slice(&1234_u32.to_be_bytes());
        fs::write(&database, bytes).unwrap();
        let before = tree(dir.path());
        let mut said = Vec::new();
        for arguments in ["state verify", "state verify --repair"] {
            let (code, out, err) = run(dir.path(), arguments);
            assert!(code == 5 && out.is_empty() && err.lines().count() == 1, "{why}, {arguments}: {code} {out}{err}");
            assert!(!err.contains("backup"), "{err}");
            said.push(err);
        }
        assert_eq!(said[0], said[1], "{why}");
        let names = |tree: &std::collections::BTreeMap<String, Vec<u8>>| tree.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&tree(dir.path())), names(&before), "{why}: no copy");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_document_does_not_contradict_itself() {
    for previous in [true, false] {
        let dir = project("file").await;
        fs::write(dir.path().join("target/run_state.json"), "{\"run_id\": \"x\", \"nodes\": {").unwrap();
        if !previous {
            fs::remove_file(dir.path().join("target/run_state.json.prev")).unwrap();
        }
        let (code, out, err) = run(dir.path(), "state verify");
        assert!(code == 5 && out.contains("--repair") && !err.contains("--repair") && err.contains("said above"), "{out}{err}");
    }
}

#[test]
fn a_url_in_the_wrong_place_is_not_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let (code, out, err) = run(dir.path(), "state runs --project-path postgres://u:S3kr3t@h/d");
    assert!(code == 3 && err.contains("database_url") && !format!("{out}{err}").contains("S3kr3t"), "{err}");
    for url in ["postgres://u@127.0.0.1:1/d;password=S3kr3t", "postgres://u@127.0.0.1:1/d%3Fpassword=S3kr3t"] {
        fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: database\ndatabase_url: {url}\n")).unwrap();
        let (code, out, err) = run(dir.path(), "state runs");
        assert!(code == 1 && err.contains("seeknal_project.yml:2: database_url: "), "{code} {err}");
        assert!(!format!("{out}{err}").contains("S3kr3t"), "{err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_found_before_anything_is_copied() {
    let dir = project("file").await;
    fs::create_dir(dir.path().join("target/run_state.json.bak")).unwrap();
    let before = tree(dir.path());
    let (code, _, err) = run(dir.path(), EXECUTE);
    assert!(code == 1 && err.contains("run_state.json.bak") && err.contains("move it aside"), "{code} {err}");
    assert_eq!(tree(dir.path()).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
}

/// A project in a folder of this name, with the guide's state in it.
fn named(parent: &Path, name: &OsStr) -> OsString {
    let folder = parent.join(name);
    fs::create_dir_all(folder.join("target")).unwrap();
    fs::write(folder.join("target/run_state.json"), GUIDE).unwrap();
    name.to_owned()
}

#[test]
fn paths_that_are_no_text_or_look_like_options_are_printed_so_that_they_can_be_typed_again() {
    let dir = tempfile::tempdir().unwrap();
    let name = named(dir.path(), OsStr::from_bytes(b"caf\xe9 x"));
    let (code, out, err) =
        told(seeknal(dir.path()).args(["-o", "json"]).args(EXECUTE.split(' ')).arg("--project-path").arg(&name));
    assert_eq!(code, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert!(report["backup"].as_str().unwrap().ends_with("run_state.json.bak"), "{report}");
    for name in [&b"caf\xe9 y"[..], b"-dash", b"it's", "\u{202e}evil".as_bytes()] {
        let name = named(dir.path(), OsStr::from_bytes(name));
        let mut option = OsString::from("--project-path=");
        option.push(&name);
        let (code, out, err) = told(seeknal(dir.path()).args(EXECUTE.split(' ')).arg(option));
        assert_eq!(code, 0, "{err}");
        assert!(!out.contains('\u{202e}'), "{out:?}");
        // The rollback as it is printed, in the shell that it is printed for.
        let line = out.lines().find(|line| line.starts_with("cp ")).unwrap();
        let document = dir.path().join(&name).join("target/run_state.json");
        fs::write(&document, "changed").unwrap();
        assert!(Command::new("bash").args(["-c", line]).current_dir(dir.path()).status().unwrap().success(), "{line}");
        assert_eq!(fs::read_to_string(document).unwrap(), GUIDE, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_turn_no_line_around() {
    for backend in ["file", "database"] {
        let dir = project(backend).await;
        let state = seeknal_state::project::open(dir.path()).await.unwrap();
        let id = "a\u{202e}b\u{2066}";
        state.create_run(id, NewRun::running()).await.unwrap();
        state.set_node_state(id, id, seeknal_state::NodeUpdate::running()).await.unwrap();
        state.close().await.unwrap();
        for arguments in [
            &["state", "runs"][..],
            &["state", "show", id],
            &["migrate-state", "--backend", "file"],
            &["migrate-state", "--backend", "database"],
        ] {
            let (_, out, err) = told(seeknal(dir.path()).args(arguments));
            let shown = format!("{out}{err}");
            assert!(!shown.contains(['\u{202e}', '\u{2066}']), "{arguments:?}: {shown:?}");
        }
        let (_, out, _) = run(dir.path(), "state runs");
        assert!(out.contains("a\\u{202e}b\\u{2066}"), "{out}");
        // A program gets it as it is.
        let (_, out, _) = run(dir.path(), "state runs --prefix a -o json");
        let runs: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(runs[0]["run_id"], id);
    }
}

/// The verdict is the command's, whoever reads what it prints.
#[test]
fn a_reader_that_goes_or_a_full_disk_does_not_change_what_the_exit_code_says() {
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    fs::write(dir.path().join("target/run_state.json"), GUIDE).unwrap();
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();

    let moved =
        seeknal(dir.path()).args(["migrate-state", "--backend", "database", "--no-dry-run"]).stdout(full()).output().unwrap();
    let err = String::from_utf8(moved.stderr).unwrap();
    assert_eq!(moved.status.code(), Some(6), "{err}");
    assert!(err.contains("the state was moved, but the output cannot be written"), "{err}");
    let listed = seeknal(dir.path()).args(["state", "runs"]).stdout(full()).output().unwrap();
    assert_eq!(listed.status.code(), Some(1), "nothing was done there");

    let database = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
    database.execute("UPDATE runs SET created_at = 'nonsense'", []).unwrap();
    drop(database);
    for format in ["table", "json"] {
        let mut child = seeknal(dir.path())
            .args(["state", "verify", "-o", format])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(5), "{format}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    let mut child = seeknal(dir.path()).args(["state", "runs", "--help"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_backup_that_is_the_document_under_another_name_is_none() {
    for is_hard in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs::create_dir(&target).unwrap();
        let (document, backup) = (target.join("run_state.json"), target.join("run_state.json.bak"));
        fs::write(&document, GUIDE).unwrap();
        let linked = if is_hard { fs::hard_link(&document, &backup) } else { std::os::unix::fs::symlink(&document, &backup) };
        linked.unwrap();
        let (code, out, err) = run(dir.path(), EXECUTE);
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("An older backup is now"), "{out}");
        assert!(fs::symlink_metadata(&backup).unwrap().is_file());
        let before = fs::read_to_string(&backup).unwrap();
        fs::OpenOptions::new().write(true).open(&document).unwrap().set_len(0).unwrap();
        assert_eq!(fs::read_to_string(&backup).unwrap(), before);
        assert!(before.contains("run_20240110_120000"));
    }
}

#[test]
fn a_name_that_is_too_long_is_no_fault_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), format!("seeknal_state:\n  target_path: {}\n", "x".repeat(300))).unwrap();
    let (code, _, err) = run(dir.path(), "state runs");
    assert!(code == 1 && err.contains("shorter path") && !err.contains("check the disk"), "{code} {err}");
}

/// Who writes to the older database meanwhile is not stopped by a mistyped name.
#[test]
fn a_command_that_changes_nothing_leaves_an_older_database_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    let path = dir.path().join("target/state.db");
    let sql = rusqlite::Connection::open(&path).unwrap();
    sql.execute_batch(include_str!("../fixtures/state_v1.sql")).unwrap();
    sql.execute_batch("UPDATE runs SET status = 'success' WHERE run_id = 'old'; UPDATE node_states SET status = 'success'")
        .unwrap();
    let version = || sql.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)).unwrap();
    for (arguments, expected) in
        [("state end nonsense", 3), ("state end old", 4), ("state unlock 7", 3), ("state unlock 7 -o json", 3)]
    {
        let (code, out, err) = run(dir.path(), arguments);
        assert_eq!((code, version()), (expected, 1), "{arguments}: {out}{err}");
    }
    // What has something to write still does.
    sql.execute_batch("UPDATE runs SET status = 'running' WHERE run_id = 'old'").unwrap();
    let (code, _, err) = run(dir.path(), "state end old --force");
    assert!(code == 0 && version() > 1, "{err}");
    let (code, out, err) = run(dir.path(), "state end old");
    assert!(code == 0 && out.contains("Nothing was changed"), "{out}{err}");
}
