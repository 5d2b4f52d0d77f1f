//! A state that cannot be reached is never taken for none: not by looking at it, and least of all by a move that would then switch the settings.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::projects::{project, tree};
use crate::support::postgres::{PASSWORD, cluster, fresh_schema};

/// Everything that looks at a state, and the moves that would leave it.
const LOOKING: &[&str] = &["state runs", "state locks", "state verify", "state cleanup --days 1", "state show run_1"];

/// The words before the command, and the command: root may read everything, so that it goes on as somebody else.
fn as_nobody(scratch: &Path) -> Vec<PathBuf> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_seeknal"));
    let id = Command::new("id").arg("-u").output().unwrap();
    if String::from_utf8(id.stdout).unwrap().trim() != "0" {
        return vec![program];
    }
    // Where the build is, nobody else may be able to look.
    let copy = scratch.join("seeknal");
    fs::copy(program, &copy).unwrap();
    fs::set_permissions(scratch, fs::Permissions::from_mode(0o755)).unwrap();
    ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(PathBuf::from).into_iter().chain([copy]).collect()
}

fn run_as(words: &[PathBuf], dir: &Path, arguments: &str) -> (i32, String) {
    let (program, before) = words.split_first().unwrap();
    let output = Command::new(program)
        .args(before)
        .args(arguments.split_whitespace())
        .current_dir(dir)
        .env_remove("SEEKNAL_STATE_BACKEND")
        .env_remove("SEEKNAL_DATABASE_URL")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout) + &text(&output.stderr))
}

fn run(dir: &Path, arguments: &str) -> (i32, String) {
    run_as(&[env!("CARGO_BIN_EXE_seeknal").into()], dir, arguments)
}

/// The moves away from where the settings say that the state is.
fn moves(backend: &str) -> [String; 2] {
    let to = if backend == "file" { "database" } else { "file" };
    [format!("migrate-state --backend {to}"), format!("migrate-state --backend {to} --no-dry-run")]
}

/// Every command fails, says why, and the settings stay.
fn all_fail(words: &[PathBuf], dir: &Path, backend: &str, why: &str) {
    let settings = fs::read_to_string(dir.join("seeknal_project.yml")).unwrap();
    for arguments in LOOKING.iter().map(|line| (*line).to_owned()).chain(moves(backend)) {
        let (code, told) = run_as(words, dir, &arguments);
        assert!(code != 0 && told.contains(why), "{backend}, {arguments}: {code}: {told}");
        assert!(!told.contains("no state yet") && !told.contains("is sound"), "{backend}, {arguments}: {told}");
    }
    assert_eq!(fs::read_to_string(dir.join("seeknal_project.yml")).unwrap(), settings, "{backend}, {why}");
}

async fn of(backend: &str) -> tempfile::TempDir {
    let dir = project(backend).await;
    fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: {backend}\n")).unwrap();
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_may_not_be_looked_into_is_no_empty_one() {
    let scratch = tempfile::tempdir().unwrap();
    let words = as_nobody(scratch.path());
    for backend in ["file", "database"] {
        let dir = of(backend).await;
        // The settings could be switched: it is the state's folder alone that is closed.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let target = dir.path().join("target");
        for mode in [0o000, 0o444] {
            fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
            all_fail(&words, dir.path(), backend, "Permission denied");
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_may_not_be_read_is_told_by_its_name() {
    let scratch = tempfile::tempdir().unwrap();
    let words = as_nobody(scratch.path());
    for (backend, name) in [("file", "run_state.json"), ("database", "state.db")] {
        let dir = of(backend).await;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let state = dir.path().join("target").join(name);
        fs::set_permissions(&state, fs::Permissions::from_mode(0o000)).unwrap();
        all_fail(
            &words,
            dir.path(),
            backend,
            &format!("target/{name}: Permission denied (os error 13); check the permissions of the file"),
        );
    }
}

/// Before anything is moved, with the line to write.
#[tokio::test(flavor = "multi_thread")]
async fn settings_in_a_folder_that_may_not_be_written_in_are_told() {
    let scratch = tempfile::tempdir().unwrap();
    let words = as_nobody(scratch.path());
    let dir = of("file").await;
    let target = dir.path().join("target");
    for (path, mode) in [(dir.path(), 0o555), (&target, 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    for entry in fs::read_dir(&target).unwrap() {
        fs::set_permissions(entry.unwrap().path(), fs::Permissions::from_mode(0o666)).unwrap();
    }
    let (code, told) = run_as(&words, dir.path(), "migrate-state --backend database --no-dry-run");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let why = "seeknal_project.yml: nothing may be written in its folder (Permission denied (os error 13))";
    assert!(code == 1 && told.contains(why), "{code}: {told}");
    assert!(told.contains("write `state_backend: database` into it by hand") && !target.join("state.db").exists(), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_folders_place_is_told() {
    for backend in ["file", "database"] {
        let dir = of(backend).await;
        let (target, away) = (dir.path().join("target"), dir.path().join("away"));
        let program = [PathBuf::from(env!("CARGO_BIN_EXE_seeknal"))];
        fs::rename(&target, &away).unwrap();
        fs::write(&target, "a file").unwrap();
        all_fail(&program, dir.path(), backend, "it is no folder");
        fs::remove_file(&target).unwrap();
        symlink("not-mounted/target", &target).unwrap();
        all_fail(&program, dir.path(), backend, "a symbolic link that leads nowhere");
        // The link of a folder above, and the file or database alone.
        fs::remove_file(&target).unwrap();
        fs::rename(&away, &target).unwrap();
        let name = if backend == "file" { "run_state.json" } else { "state.db" };
        fs::rename(target.join(name), dir.path().join(name)).unwrap();
        for end in [".journal", ".lock", ".prev", "-wal", "-shm"] {
            let _there_or_not = fs::remove_file(target.join(format!("{name}{end}")));
        }
        symlink("../not-mounted", target.join(name)).unwrap();
        all_fail(&program, dir.path(), backend, "a symbolic link that leads nowhere");
        // Neither is what nobody can read as a file.
        fs::remove_file(target.join(name)).unwrap();
        assert!(Command::new("mkfifo").arg(target.join(name)).status().unwrap().success());
        all_fail(&program, dir.path(), backend, "plain file");
        // Where it leads somewhere it is the state.
        fs::remove_file(target.join(name)).unwrap();
        symlink(format!("../{name}"), target.join(name)).unwrap();
        let (code, told) = run(dir.path(), "state runs");
        assert!(code == 0 && told.contains("run_1"), "{backend}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_be_switched_stop_a_move_before_it_copies() {
    let scratch = tempfile::tempdir().unwrap();
    let words = as_nobody(scratch.path());
    let dir = of("file").await;
    let target = dir.path().join("target");
    for (path, mode) in
        fs::read_dir(&target).unwrap().map(|entry| (entry.unwrap().path(), 0o666)).chain([(target.clone(), 0o777)])
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let before = tree(dir.path());
    let (code, told) = run_as(&words, dir.path(), "migrate-state --backend database --no-dry-run");
    assert!(code == 1 && told.contains("Permission denied") && !told.contains("then:"), "{code} {told}");
    assert_eq!(tree(dir.path()), before, "nothing was copied");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (code, told) = run_as(&words, dir.path(), "migrate-state --backend database --no-dry-run");
    assert_eq!(code, 0, "{told}");
}

#[test]
fn a_move_without_a_state_switches_nothing_and_says_how_it_is_done() {
    for backend in ["file", "database"] {
        let dir = tempfile::tempdir().unwrap();
        let settings = format!("state_backend: {backend}\n");
        fs::write(dir.path().join("seeknal_project.yml"), &settings).unwrap();
        let [preview, execute] = moves(backend);
        let (code, told) = run(dir.path(), &preview);
        assert!(code == 0 && told.contains("There is no state to move") && told.contains("write `state_backend:"), "{told}");
        let (code, told) = run(dir.path(), &execute);
        assert!(code == 3 && told.contains("no state to move") && told.contains("write `state_backend:"), "{code} {told}");
        assert_eq!(fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap(), settings);
        assert!(!dir.path().join("target").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_state_the_other_one_is_named() {
    let dir = project("database").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: file\n").unwrap();
    let (_, told) = run(dir.path(), "state runs");
    assert!(told.contains("target/state.db is there: state_backend: database?"), "{told}");
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    let (_, told) = run(dir.path(), "state runs");
    assert!(told.contains("target/state.db (database backend)") && told.contains("target/run_state.json is there"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_does_not_exist_is_not_an_empty_one() {
    let Some(cluster) = cluster() else { return };
    let dir = tempfile::tempdir().unwrap();
    let url = cluster.url("?sslmode=disable").replace("/tests", "/tests_typo");
    fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: database\ndatabase_url: {url}\n")).unwrap();
    let program = [PathBuf::from(env!("CARGO_BIN_EXE_seeknal"))];
    all_fail(&program, dir.path(), "database", "create the database, or check its name in database_url");
    let (code, told) = run(dir.path(), "migrate-state --backend file --no-dry-run");
    assert!(code == 3 && !told.contains(PASSWORD), "{code} {told}");
    // As the place to come from, too.
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    let (code, told) = run(dir.path(), &format!("migrate-state --backend file --from {url} --no-dry-run"));
    assert!(code == 3 && told.contains("create the database"), "{code} {told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_not_read_is_told_which_right_it_lacks() {
    let Some(cluster) = cluster() else { return };
    let dir = tempfile::tempdir().unwrap();
    let schema = fresh_schema();
    let settings = |user: &str| {
        let url = cluster.url_of(user, PASSWORD, "127.0.0.1", "?sslmode=disable");
        let text =
            format!("state_backend: database\ndatabase_url: {url}\nseeknal_state:\n  options:\n    database_schema: {schema}\n");
        fs::write(dir.path().join("seeknal_project.yml"), text).unwrap();
    };
    settings("postgres");
    let (code, told) = run(dir.path(), "state runs");
    assert!(code == 0 && told.contains(&schema), "where there is nothing the schema and the server are named: {told}");
    let state = seeknal_state::project::open(dir.path()).await.unwrap();
    state.create_run("run_1", seeknal_state::NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    settings("reader");
    for (grant, lacks) in [
        ("SELECT 1", "GRANT USAGE ON SCHEMA"),
        (&*format!("GRANT USAGE ON SCHEMA {schema} TO reader"), "GRANT SELECT ON ALL TABLES"),
        ("GRANT SELECT ON meta, runs TO reader", "node_states"),
    ] {
        cluster.sql_in(&schema, grant);
        let (code, told) = run(dir.path(), "state runs");
        assert!(code == 1 && told.contains(lacks) && told.contains(&schema) && told.contains("127.0.0.1"), "{code} {told}");
        assert!(!told.contains("write") && !told.contains(PASSWORD), "{told}");
    }
    let rest = format!(
        "GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader; GRANT SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO reader"
    );
    cluster.sql_in(&schema, &rest);
    assert_eq!(run(dir.path(), "state runs").0, 0);
}
