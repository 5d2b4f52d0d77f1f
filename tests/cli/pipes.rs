//! A pipe in the place of a file: whoever opens one waits for its other end. No command does.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::projects::project;
use crate::seeknal;

const COMMANDS: [&str; 9] = [
    "state runs",
    "state show run_1",
    "state verify",
    "state verify --repair",
    "state locks",
    "state unlock 7",
    "state cleanup --days 30",
    "migrate-state --backend file",
    "migrate-state --backend file --no-dry-run",
];

/// As [`crate::run`], but one that hangs is killed and fails the test.
fn run(dir: &Path, arguments: &str) -> (i32, String) {
    let mut command = seeknal(dir);
    let mut child = command.args(arguments.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > patience {
            child.kill().unwrap();
            panic!("{arguments}: it hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let out = child.wait_with_output().unwrap();
    let told = [out.stdout, out.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    (out.status.code().unwrap(), told)
}

fn make_pipe(path: &Path) {
    let _there_or_not = std::fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_command_waits_for_a_pipe_beside_a_database() {
    for name in ["state.db", "state.db-wal", "state.db-shm", "state.db-journal", "state.db.lock"] {
        let dir = project("database").await;
        make_pipe(&dir.path().join("target").join(name));
        for arguments in COMMANDS {
            let (code, told) = run(dir.path(), arguments);
            // What is not there is not written for: the lock is read by nobody then.
            let is_not_found = code == 3 && arguments.starts_with("state unlock");
            if code != 0 && !(is_not_found && name == "state.db.lock") {
                assert!(
                    told.contains(name) && told.contains("no plain file") && told.contains("aside"),
                    "{name}: {arguments}: {told}"
                );
            } else {
                assert_eq!(name, "state.db.lock", "{arguments}: {told}");
            }
        }
        assert!(!dir.path().join("target").join(name).is_file(), "{name}: it is left alone");
    }
}

/// Nobody knows whose it is: that one may live, and nothing else is said of it.
#[tokio::test(flavor = "multi_thread")]
async fn no_command_waits_for_a_pipe_among_the_openings() {
    let dir = project("database").await;
    let owners = dir.path().join("target/state.db.owners");
    make_pipe(&owners.join("x.lock"));
    for arguments in COMMANDS {
        let (code, told) = run(dir.path(), arguments);
        let expected = if arguments.starts_with("state unlock") { 3 } else { 0 };
        assert_eq!(code, expected, "{arguments}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_in_the_place_of_a_moves_notes_is_refused_before_anything_is_written() {
    for backend in ["file", "database"] {
        let dir = project(backend).await;
        let target = dir.path().join("target");
        make_pipe(&target.join(".migrate-state.copied"));
        let names = || {
            std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect::<std::collections::BTreeSet<_>>()
        };
        let before = names();
        let to = if backend == "file" { "database" } else { "file" };
        for arguments in [format!("migrate-state --backend {to}"), format!("migrate-state --backend {to} --no-dry-run")] {
            let (code, told) = run(dir.path(), &arguments);
            assert_eq!(code, 1, "{arguments}: {told}");
            assert!(told.contains(".migrate-state.copied") && told.contains("no plain file") && told.contains("aside"), "{told}");
        }
        let mut after = names();
        after.retain(|name| before.contains(name) || !name.to_str().unwrap().starts_with("state.db-"));
        assert_eq!(after, before);
    }
}
