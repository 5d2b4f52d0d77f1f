//! A move that ends between a command's look at the settings and its opening.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::projects::{project, tree};
use crate::{run, seeknal};

/// Whether a process has a file open.
fn has_open(pid: u32, file: &Path) -> bool {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    open.filter_map(Result::ok).any(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == file))
}

/// The command waits for its turn to open `state.db`, and that was left when it is let in.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_read_the_settings_before_the_switch_writes_nothing_where_the_state_was() {
    let dir = project("database").await;
    let database = dir.path().join("target/state.db");
    assert_eq!(run(dir.path(), "migrate-state --backend file --no-dry-run").0, 0);
    let settings = dir.path().join("seeknal_project.yml");
    let switched = fs::read(&settings).unwrap();
    fs::write(&settings, "state_backend: database\n").unwrap();
    let before = tree(dir.path());
    for arguments in [["state", "cleanup", "--days", "0"].as_slice(), &["state", "end", "still", "--as", "failed"]] {
        fs::write(&settings, "state_backend: database\n").unwrap();
        let path = fs::canonicalize(&database).unwrap().with_extension("db.lock");
        let turn = File::open(&path).unwrap();
        turn.lock().unwrap();
        let command = seeknal(dir.path()).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It has read its settings when it comes to the database.
        let began = Instant::now();
        while !has_open(command.id(), &path) {
            assert!(began.elapsed() < Duration::from_secs(60), "it does not come to the database");
            std::thread::yield_now();
        }
        fs::write(&settings, &switched).unwrap();
        turn.unlock().unwrap();
        let output = command.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{arguments:?}: {err}");
        assert!(err.contains("names file by now") && err.contains("seeknal_project.yml"), "{arguments:?}: {err}");
    }
    fs::write(&settings, "state_backend: database\n").unwrap();
    let (code, out, _) = run(dir.path(), "state runs");
    assert!(code == 0 && out.contains("still") && out.contains("run_2"), "nothing was written: {out}");
    assert_eq!(tree(dir.path()).get("target/run_state.json"), before.get("target/run_state.json"));
}
