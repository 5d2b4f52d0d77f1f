//! The examples, run as a user runs them: exit code, what they say, what they leave behind.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod binaries;
#[cfg(any(feature = "postgres", feature = "libsql"))]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use binaries::example;

fn run(name: &str, arguments: &[&str]) -> (Output, String) {
    let output = Command::new(example(name)).args(arguments).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}

fn succeed(name: &str, arguments: &[&str], lines: &[&str]) -> String {
    let (output, text) = run(name, arguments);
    assert!(output.status.success(), "{name} {arguments:?} ended with {}:\n{text}", output.status);
    for line in lines {
        assert!(text.contains(line), "{name} {arguments:?} does not say {line:?}:\n{text}");
    }
    text
}

#[test]
fn embed_says_what_is_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let project = folder.path().to_str().unwrap();
    let lines = [
        "extract: on disk as version",
        "load: on disk as version",
        "is done; still to load: 2024-01-02T00:00:00Z .. 2024-01-04T00:00:00Z",
    ];
    succeed("embed", &[project], &lines);
    let document = fs::read_to_string(folder.path().join("target/run_state.json")).unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["nodes"]["transform"]["status"], "success");
    assert_eq!(document["nodes"]["transform"]["row_count"], 900);
    succeed("embed", &[project], &lines);
}

#[test]
fn embed_names_the_place_of_trouble() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("target")).unwrap();
    let damaged = b"{\"run_id\": \"run_1\", \"nodes\": {\"a\"";
    fs::write(folder.path().join("target/run_state.json"), damaged).unwrap();
    let (output, text) = run("embed", &[folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: ") && text.contains("run_state.json"), "{text}");
    assert_eq!(fs::read(folder.path().join("target/run_state.json")).unwrap(), damaged);
}

/// The state of the project's own, and made-up nodes in another place: that is told.
#[test]
fn parallel_executors_names_a_state_that_it_does_not_use() {
    for (used, other, name) in [("database", "file", "run_state.json"), ("file", "database", "state.db")] {
        let folder = tempfile::tempdir().unwrap();
        let project = folder.path().to_str().unwrap();
        let job = |backend| ["--project-path", project, "--backend", backend, "--runs", "1", "--nodes", "3", "--executors", "1"];
        succeed("parallel_executors", &job(other), &[]);
        let hint = format!("target/{name} is there, and is not used: --backend {other}?");
        succeed("parallel_executors", &job(used), &[&hint]);
        // Somebody works with both.
        let (_, text) = run("parallel_executors", &job(used));
        assert!(!text.contains("is not used"), "{text}");
    }
}

#[test]
fn parallel_executors_makes_nothing_where_a_link_leads_nowhere() {
    for backend in ["file", "database"] {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("not-mounted", folder.path().join("target")).unwrap();
        let (output, text) =
            run("parallel_executors", &["--project-path", folder.path().to_str().unwrap(), "--backend", backend, "--runs", "1"]);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("target: it is a symbolic link that leads nowhere; mend the link"), "{text}");
    }
}

#[test]
fn help_that_is_asked_for_is_no_failure() {
    for name in ["embed", "custom_backend"] {
        assert!(run(name, &["--help"]).0.status.success(), "{name}");
        assert_eq!(run(name, &["--unknown"]).0.status.code(), Some(2), "{name}");
    }
}

#[test]
fn transactions_shows_every_outcome() {
    let lines = [
        "two runs, one transaction: monday at version",
        "dropped, so rolled back: orders is success",
        "one half is impossible, so nothing happens: run \"wednesday\" does not exist",
        "conflict on run \"monday\": expected the run at version",
        "conditions on nodes hold: version",
        "ten tasks counted to 10",
        "the lock is lost: the lease on run \"tuesday\" with token",
        "so orders is still success",
    ];
    let text = succeed("transactions", &[], &lines);
    assert!(!text.contains("unexpected"), "{text}");
}

#[test]
fn custom_backend_finds_its_state_again() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("deep/er/state.jsonl");
    let lines = [
        "committed run_",
        "again: success, version",
        "2 nodes",
        "extract completed 2024-01-01T00:00:00Z .. 2024-01-02T00:00:00Z",
    ];
    succeed("custom_backend", &[log.to_str().unwrap()], &lines);

    succeed("custom_backend", &["--help"], &["usage: custom_backend [FILE]"]);
    let (output, text) = run("custom_backend", &["--bogus"]);
    assert!(output.status.code() == Some(2) && text.starts_with("usage: "), "{text}");

    // A crash cuts off the last line; the next opening says so and goes on.
    let whole = fs::read(&log).unwrap();
    fs::write(&log, [whole.as_slice(), b"{\"batch\":{\"id\":\"01"].concat()).unwrap();
    succeed("custom_backend", &[log.to_str().unwrap()], &["committed run_", "again: success"]);
    assert!(fs::read(&log).unwrap().starts_with(&whole));

    // Damage before the end is refused, and left as it is.
    let mut damaged = fs::read(&log).unwrap();
    let middle = whole.len() / 2;
    damaged[middle] = 0;
    fs::write(&log, &damaged).unwrap();
    let (output, text) = run("custom_backend", &[log.to_str().unwrap()]);
    assert!(!output.status.success() && text.contains("state.jsonl, line "), "{text}");
    assert_eq!(fs::read(&log).unwrap(), damaged);
}

fn small(project: &Path, backend: &str, more: &[&str], lines: &[&str]) -> String {
    let mut arguments = vec!["--project-path", project.to_str().unwrap(), "--backend", backend, "--work-ms", "2"];
    arguments.extend(more);
    succeed("parallel_executors", &arguments, lines)
}

#[test]
fn parallel_executors_does_its_job_twice_on_each_backend() {
    for backend in ["file", "database"] {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("ack.log");
        let options = ["--runs", "2", "--nodes", "40", "--executors", "12", "--ack-log", log.to_str().unwrap()];
        let text = small(
            folder.path(),
            backend,
            &options,
            &["was killed while it held", "took it over (token", "a late write was refused: the lease", "check     ok: "],
        );
        assert!(text.contains("40 made-up nodes") && text.contains("0 earlier runs unchanged"), "{text}");
        small(folder.path(), backend, &options, &["found     2 earlier runs", "check     ok: ", "; 2 earlier runs unchanged"]);

        // Every line has what it must have, and the lines of a transaction are all there.
        let mut sizes = std::collections::BTreeMap::<String, (u64, u64)>::new();
        let mut over_two_runs = std::collections::BTreeMap::<String, std::collections::BTreeSet<String>>::new();
        for line in fs::read_to_string(&log).unwrap().lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            for member in ["run", "node", "status", "attempt", "before", "after", "seq", "tx", "of"] {
                assert!(line.get(member).is_some(), "{member} is missing: {line}");
            }
            let size = sizes.entry(line["tx"].as_str().unwrap().to_owned()).or_default();
            *size = (size.0 + 1, line["of"].as_u64().unwrap());
            over_two_runs.entry(line["tx"].to_string()).or_default().insert(line["run"].to_string());
        }
        assert!(sizes.values().all(|(lines, of)| lines == of), "{sizes:?}");
        assert!(sizes.values().any(|(lines, _)| *lines == 2), "no node was ever written together with another one");
        assert!(over_two_runs.values().any(|runs| runs.len() == 2), "no transaction was ever over two runs");
    }
}

/// The same job twice on a server.
#[cfg(any(feature = "postgres", feature = "libsql"))]
fn on_server(place: &support::Place) {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("ack.log");
    for found in ["0 earlier runs unchanged", "2 earlier runs unchanged"] {
        let mut command = Command::new(example("parallel_executors"));
        command.env_remove("SEEKNAL_DATABASE_SCHEMA").env_remove("SEEKNAL_DATABASE_TOKEN");
        command.envs(place.schema.iter().map(|schema| ("SEEKNAL_DATABASE_SCHEMA", schema)));
        command.args(["--database-url", place.url.as_deref().unwrap(), "--project-path", folder.path().to_str().unwrap()]);
        command.args(["--runs", "2", "--nodes", "40", "--executors", "12", "--work-ms", "2", "--ack-log", log.to_str().unwrap()]);
        let output = command.output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "ended with {}:\n{text}", output.status);
        for line in ["took it over (token", "a late write was refused: the lease", "check     ok: ", found] {
            assert!(text.contains(line), "it does not say {line:?}:\n{text}");
        }
    }
    assert!(!folder.path().join("target/state.db").exists(), "it went to the server");
    assert!(fs::read_to_string(&log).unwrap().lines().count() > 160, "80 nodes begin and end, twice");
}

#[cfg(feature = "postgres")]
#[test]
fn parallel_executors_does_its_job_twice_on_postgresql() {
    let Some(cluster) = support::postgres::cluster() else { return };
    on_server(&support::Place::of_schema(cluster));
}

#[cfg(feature = "libsql")]
#[test]
fn parallel_executors_does_its_job_twice_on_libsql() {
    let Some(server) = support::sqld::Sqld::start() else { return };
    on_server(&support::Place::of_server(&server));
}

/// A state file of Seeknal's own making, with what only its writer understands.
const FOREIGN: &str = r#"{
  "schema_version": "2.0", "seeknal_version": "2.0.0", "last_run": "2024-01-10T12:00:00", "run_id": "run_20240110_120000",
  "config": {"full": false, "tolerance": 1e-300}, "someone_elses": {"b": 1, "a": [1.50, 9007199254740993]},
  "nodes": {
    "source.orders": {"hash": "6b86b273", "last_run": "2024-01-10T12:00:00.123456", "status": "success", "duration_ms": 1500, "row_count": 1000,
      "version": 3, "metadata": {"p": 0.12366771697998047}, "fingerprint": {"content_hash": "57", "schema_hash": "64", "upstream_hash": "b8", "config_hash": "79"},
      "iceberg_snapshot_id": "8744736658442914487", "completed_intervals": [["2024-01-01T00:00:00", "2024-01-02T00:00:00"]], "completed_partitions": ["dt=2023-12-31"]},
    "transform.clean": {"hash": "d4735e3a", "last_run": "", "status": "failed", "duration_ms": 7, "row_count": 0, "version": 1, "metadata": {}, "novelty": [null]},
    "table.日本": {"hash": "4e074085", "last_run": "2024-01-10T12:00:02", "status": "upstream_failed", "duration_ms": 0, "row_count": 0, "version": 1, "metadata": {}}
  }
}"#;

#[test]
fn parallel_executors_runs_the_nodes_of_a_project_and_keeps_what_it_held() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("run_state.json"), FOREIGN).unwrap();
    let options = ["--runs", "2", "--executors", "4"];
    small(folder.path(), "file", &options, &["3 nodes of the state itself", "check     ok: ", "; 1 earlier run unchanged"]);
    small(
        folder.path(),
        "file",
        &options,
        &["3 nodes of the state itself", "found     3 earlier runs", "; 3 earlier runs unchanged"],
    );
    let text = fs::read_to_string(target.join("run_state.json")).unwrap();
    for kept in [
        "1e-300",
        "9007199254740993",
        "1.50",
        "0.12366771697998047",
        "8744736658442914487",
        "novelty",
        "upstream_failed",
        "dt=2023-12-31",
    ] {
        assert!(text.contains(kept), "{kept} is lost:\n{text}");
    }
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<&String> = document["nodes"].as_object().unwrap().keys().collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert_eq!(document["nodes"]["table.日本"]["status"], "success");
}

#[test]
fn parallel_executors_does_not_repeat_a_token_in_a_wrong_place() {
    for arguments in [
        &["--backend", "libsql://t0ken-t0ken@host"][..],
        &["libsql://t0ken-t0ken@host"],
        &["--runs", "libsql://t0ken-t0ken@host"],
    ] {
        let (output, text) = run("parallel_executors", arguments);
        assert!(!output.status.success() && !text.contains("t0ken") && text.contains("(not shown)"), "{text}");
    }
}

#[test]
fn parallel_executors_refuses_what_makes_no_sense() {
    for (arguments, says) in [
        (["--backend", "databse"], "file, database"),
        (["--executors", "0"], "at least one executor"),
        (["--nodes", "many"], "--nodes"),
        (["--executors", "99999999"], "10000 at most"),
        (["--nodes", "99999999999999999999"], "100000 at most"),
        (["--runs", "10001"], "10000 at most"),
    ] {
        let (output, text) = run("parallel_executors", &arguments);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn parallel_executors_beside_a_writer_says_who_that_is() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let options = seeknal_state::BackendOptions::new().base_path(folder.path().join("target"));
    let backend = seeknal_state::create_state_backend("file", &options).unwrap();
    let state = runtime.block_on(seeknal_state::Coordinator::open(backend)).unwrap();
    let (output, text) = run("parallel_executors", &["--project-path", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
    runtime.block_on(state.close()).unwrap();
}

#[test]
#[cfg(feature = "project")]
fn the_main_job_keeps_the_state_where_the_settings_say() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("seeknal_project.yml"), "seeknal_state: {target_path: out/state}\n").unwrap();
    let path = folder.path().to_str().unwrap();
    succeed(
        "parallel_executors",
        &["--project-path", path, "--runs", "1", "--nodes", "10", "--executors", "4", "--work-ms", "1"],
        &[],
    );
    assert!(folder.path().join("out/state/run_state.json").exists());
    assert!(!folder.path().join("target").exists());
}
