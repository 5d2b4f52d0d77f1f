//! A fleet of worker processes drains a run while some are killed and others are stopped: the example run as a user runs it, and its check itself tried
//! with forged logs.
//!
//! `SEEKNAL_FLEET_NODES=2000 cargo test --test fleet` makes the runs larger; `SEEKNAL_FLEET_SEED=N` chooses other moments.
#![cfg(all(unix, feature = "file", feature = "sqlite"))]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

#[path = "../binaries/mod.rs"]
mod binaries;
mod checker;

// The example's own comparison and log format: what the example claims is what is tested.
#[path = "../../examples/fleet/ack.rs"]
#[allow(dead_code, reason = "only the format is needed here")]
mod ack;
#[path = "../../examples/fleet/check.rs"]
#[allow(dead_code, reason = "only the comparison is needed here")]
mod check;

#[path = "../../examples/fleet/progress.rs"]
mod progress;

#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use seeknal_state::{Coordinator, NodeStatus, RunQuery, create_state_backend};
use support::Place;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value:?}")))
}

/// Runs the fleet on a database, SQLite's in the project if it is none of its own, and gives what it said.
fn fleet_on(place: &Place, arguments: &[&str]) -> String {
    let mut command = Command::new(binaries::example("fleet"));
    // Whoever runs the tests may have set these for work of his own.
    for name in ["SEEKNAL_FLEET_DATABASE_URL", "SEEKNAL_DATABASE_SCHEMA"] {
        command.env_remove(name);
    }
    command.envs(place.url.iter().map(|url| ("SEEKNAL_FLEET_DATABASE_URL", url)));
    command.envs(place.schema.iter().map(|schema| ("SEEKNAL_DATABASE_SCHEMA", schema)));
    let output = command.args(arguments).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "fleet {arguments:?} ended with {}:\n{text}", output.status);
    text
}

fn fleet(arguments: &[&str]) -> String {
    fleet_on(&Place::default(), arguments)
}

/// The number behind a word of the summary.
fn told(text: &str, what: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("no line {what:?} in:\n{text}"));
    line[what.len()..].split_whitespace().next().unwrap().parse().unwrap()
}

/// Drains a run while workers are killed and stopped, and compares what is stored with what they were told.
fn drained(project: &Path, place: &Place, nodes: u64, work_ms: &str, kill_every_ms: &str) {
    let (nodes, seed) = (setting("SEEKNAL_FLEET_NODES", nodes).to_string(), setting("SEEKNAL_FLEET_SEED", 7).to_string());
    let text = fleet_on(
        place,
        &[
            "--project-path",
            project.to_str().unwrap(),
            "--workers",
            "3",
            "--executors",
            "4",
            "--nodes",
            &nodes,
            "--work-ms",
            work_ms,
            "--kill-every-ms",
            kill_every_ms,
            "--pause-share",
            "0.4",
            "--ttl-ms",
            "500",
            "--seed",
            &seed,
        ],
    );
    println!("{text}");
    assert!(text.contains("every node was done exactly once"), "{text}");
    assert!(!text.contains(" 0 killed") && !text.contains(" 0 stopped"), "nobody was harmed:\n{text}");
    assert!(told(&text, "claims") > 0 && told(&text, "nodes") == nodes.parse::<u64>().unwrap(), "{text}");
    assert!(told(&text, "takeovers") > 0, "nobody died with a node in hand:\n{text}");

    // The same comparison, made here, on what is there.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let state = Coordinator::open(create_state_backend("database", &place.options()).unwrap()).await.unwrap();
        let verified = state.backend().verify().await.unwrap();
        assert!(verified.is_sound(), "{:?}", verified.problems);
        let summary = state.list_runs(&RunQuery::default()).await.unwrap().runs.remove(0);
        let run = state.get_run(&summary.run_id).await.unwrap().unwrap();
        let plan = run.nodes().map(|(id, node)| (id.clone(), node.depends_on.iter().cloned().collect())).collect();
        let lines = ack::read_all(&project.join("target/acks")).unwrap();
        let findings = check::compare(&plan, &lines, run.state(), true);
        assert_eq!(findings.problems, Vec::<String>::new());
        assert!(run.nodes().all(|(_, node)| node.status == NodeStatus::Success && node.token.is_some()));
        state.close().await.unwrap();
    });
}

#[test]
fn every_node_is_done_exactly_once_whoever_is_killed_or_stopped() {
    let folder = tempfile::tempdir().unwrap();
    drained(folder.path(), &Place::of_folder(&folder.path().join("target")), 240, "60", "250");
}

/// Nothing proves a death to another machine: what the dead held is over when its time is. A worker takes long to begin on a server, so that the work is long
/// too: else those that are killed may all have nothing in hand.
#[cfg(feature = "postgres")]
#[test]
fn every_node_is_done_exactly_once_on_postgresql_too() {
    let Some(cluster) = support::postgres::cluster() else { return };
    let folder = tempfile::tempdir().unwrap();
    drained(folder.path(), &Place::of_schema(cluster), 120, "400", "350");
}

#[cfg(feature = "libsql")]
#[test]
fn every_node_is_done_exactly_once_on_libsql_too() {
    let Some(server) = support::sqld::Sqld::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    drained(folder.path(), &Place::of_server(&server), 120, "400", "350");
}

#[test]
fn a_long_run_that_goes_on_is_not_taken_for_one_that_hangs() {
    let second = Duration::from_secs(1);
    let mut now = Instant::now();
    let mut progress = progress::Progress::new(10 * second, now);
    for done in 1..=50 {
        now += 9 * second;
        assert!(!progress.hangs(done, now), "something was done {done} times");
    }
    assert!(!progress.hangs(50, now + 10 * second));
    assert!(progress.hangs(50, now + 11 * second), "nothing was done for too long");
    assert!(!progress.hangs(51, now + 12 * second), "at last");
}

#[test]
fn a_fleet_that_nobody_harms_notes_every_end() {
    let text = fleet(&["--workers", "2", "--nodes", "60", "--work-ms", "1", "--kill-every-ms", "0", "--only-summary"]);
    assert_eq!((told(&text, "claims"), told(&text, "takeovers"), told(&text, "ends not noted")), (60, 0, 0), "{text}");
    assert!(text.contains("2 started, 0 killed, 0 stopped, 0 failed"), "{text}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (arguments, said) in [
        (&["--workers", "0"][..], "at least 1"),
        (&["--pause-share", "1.5"], "0 to 1"),
        (&["--ttl-ms", "5"], "100"),
        (&["--database-url", "mysql://u:secret@h/d"], "unknown scheme"),
        (&["postgres://u:secret@h/d"], "not shown"),
        (&["--workers", "libsql://secret@h"], "not shown"),
        (&["--seed", "libsql://secret@h"], "not shown"),
        (&["--pause-share", "libsql://secret@h"], "not shown"),
        (&["--libsql://secret@h"], "not shown"),
        (&["--project-path", "postgres://u:secret@h/d"], "belongs into --database-url"),
        (&["--ack-log-dir", "postgres://u:secret@h/d"], "belongs into --database-url"),
    ] {
        let output = Command::new(binaries::example("fleet")).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(said) && !text.contains("secret"), "{arguments:?}: {text}");
    }
}
