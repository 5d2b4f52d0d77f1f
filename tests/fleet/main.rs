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

#[cfg(feature = "libsql")]
#[path = "../support/proxy.rs"]
mod proxy;
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
    let (ended_well, text) = tried(place, arguments);
    assert!(ended_well, "fleet {arguments:?} failed:\n{text}");
    text
}

/// Runs the fleet, and gives whether it ended well and what it said.
fn tried(place: &Place, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(binaries::example("fleet"));
    // Whoever runs the tests may have set these for work of his own.
    for name in ["SEEKNAL_FLEET_DATABASE_URL", "SEEKNAL_DATABASE_SCHEMA", "SEEKNAL_DATABASE_CA_FILE", "SEEKNAL_DATABASE_TOKEN"] {
        command.env_remove(name);
    }
    command.envs(place.url.iter().map(|url| ("SEEKNAL_FLEET_DATABASE_URL", url)));
    command.envs(place.schema.iter().map(|schema| ("SEEKNAL_DATABASE_SCHEMA", schema)));
    command.envs(place.ca_file.iter().map(|file| ("SEEKNAL_DATABASE_CA_FILE", file)));
    let output = command.args(arguments).output().unwrap();
    (output.status.success(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
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

/// The same through TLS: the certificate and its name are checked, the right credentials do the work, and any others begin nothing.
#[cfg(feature = "postgres")]
#[test]
fn a_fleet_through_encryption_on_postgresql() {
    use support::postgres::{Cluster, PASSWORD};
    let Some(cluster) = support::postgres::cluster() else { return };
    let schema = support::postgres::fresh_schema();
    let with = |cluster: &Cluster, user: &str, password: &str, ca_file| Place {
        url: Some(cluster.url_of(user, password, "localhost", "?sslmode=verify-full")),
        schema: Some(schema.clone()),
        ca_file: Some(ca_file),
        ..Place::default()
    };
    let expired = format!("expired_{schema}");
    cluster.sql(&format!("CREATE ROLE {expired} LOGIN PASSWORD '{PASSWORD}' VALID UNTIL '2000-01-01'"));
    let folder = tempfile::tempdir().unwrap();
    refused(&[
        ("another password", with(cluster, "postgres", "wrong-s3cret", cluster.ca_file()), "check the user and the password"),
        ("expired", with(cluster, &expired, PASSWORD, cluster.ca_file()), "check the user and the password"),
        ("may only read", with(cluster, "reader", PASSWORD, cluster.ca_file()), "permission"),
        ("vouched for by somebody else", with(cluster, "postgres", PASSWORD, cluster.other_ca_file()), "certificate"),
    ]);
    cluster.sql(&format!("DROP ROLE {expired}"));
    let made = cluster.sql_in("public", &format!("SELECT count(*) FROM pg_namespace WHERE nspname = '{schema}'"));
    assert_eq!(made, "0", "nothing was begun");
    drained(folder.path(), &with(cluster, "postgres", PASSWORD, cluster.ca_file()), 60, "400", "350");
}

#[cfg(feature = "libsql")]
#[test]
fn a_fleet_through_encryption_on_libsql() {
    let Some(server) = support::sqld::Sqld::with_tokens() else { return };
    let folder = tempfile::tempdir().unwrap();
    support::sqld::certificates(folder.path(), "DNS:localhost");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let front = runtime.block_on(proxy::Tls::before(server.port(), folder.path()));
    let with = |token: &str, ca_file: &str| Place {
        url: Some(format!("libsql://{token}@localhost:{}", front.port)),
        ca_file: Some(folder.path().join(ca_file)),
        ..Place::default()
    };
    let right = server.token(r#"{"a":"rw"}"#);
    support::sqld::certificates(&subfolder(folder.path(), "other"), "DNS:localhost");
    refused(&[
        ("signed by somebody else", with(&support::sqld::Sqld::forged(r#"{"a":"rw"}"#), "ca.pem"), "give a valid token"),
        ("expired", with(&server.token(r#"{"a":"rw","exp":1500000000}"#), "ca.pem"), "give a valid token"),
        ("may only read", with(&server.token(r#"{"a":"ro"}"#), "ca.pem"), "use a token that may write"),
        ("vouched for by somebody else", with(&right, "other/ca.pem"), "certificate"),
    ]);
    let place = with(&right, "ca.pem");
    let looked = runtime.block_on(create_state_backend("database", &place.options().read_only(true)).unwrap().initialize());
    assert_eq!(looked.unwrap_err().kind(), seeknal_state::StoreErrorKind::NotFound, "nothing was begun");
    drained(&subfolder(folder.path(), "project"), &place, 60, "400", "350");
}

#[cfg(feature = "libsql")]
fn subfolder(folder: &Path, name: &str) -> std::path::PathBuf {
    let made = folder.join(name);
    std::fs::create_dir(&made).unwrap();
    made
}

/// Starts that are refused with one clear line, which tells no secret.
#[cfg(any(feature = "postgres", feature = "libsql"))]
fn refused(starts: &[(&str, Place, &str)]) {
    for (name, place, said) in starts {
        let (ended_well, text) = tried(place, &["--nodes", "10", "--kill-every-ms", "0"]);
        assert!(!ended_well && text.contains(said), "{name}: {text}");
        let url = place.url.as_ref().unwrap();
        let secret = url.split("://").nth(1).unwrap().split('@').next().unwrap().rsplit(':').next().unwrap();
        assert!(!text.contains(secret), "{name}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{name}: {text}");
    }
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
