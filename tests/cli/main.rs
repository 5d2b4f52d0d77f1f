//! The `seeknal` command.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod cleanup;
mod end;
#[path = "../support/folder.rs"]
mod folder;
mod foreign;
mod killed;
mod links;
mod meanwhile;
mod mending;
mod moves;
mod owners;
mod pipes;
#[path = "../projects/mod.rs"]
mod projects;
mod refusals;
mod rows;
mod secrets;
mod state;
#[path = "../support/mod.rs"]
mod support;
mod told;
#[path = "../support/trace.rs"]
mod trace;
mod unfinished;
mod unreachable;

use std::path::Path;
use std::process::Command;

/// All variables that it reads.
const VARIABLES: [&str; 6] = [
    "SEEKNAL_STATE_BACKEND",
    "SEEKNAL_DATABASE_URL",
    "SEEKNAL_DATABASE_SCHEMA",
    "SEEKNAL_DATABASE_CA_FILE",
    "SEEKNAL_DATABASE_TOKEN",
    "SEEKNAL_DATABASE_PASSWORD",
];

/// The command in a project, whatever the environment says.
fn seeknal(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seeknal"));
    command.current_dir(dir);
    for variable in VARIABLES {
        command.env_remove(variable);
    }
    command
}

/// Runs it and answers with exit code, stdout and stderr.
fn told(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn run(dir: &Path, arguments: &str) -> (i32, String, String) {
    told(seeknal(dir).args(arguments.split_whitespace()))
}

fn json(dir: &Path, arguments: &str) -> serde_json::Value {
    let (code, out, err) = run(dir, &format!("{arguments} -o json"));
    assert_eq!(code, 0, "{arguments}: {err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{arguments}: {error}: {out}"))
}
