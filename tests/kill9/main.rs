//! The main job, killed with SIGKILL at random moments, again and again in the same project: every write that was acknowledged is there, no
//! transaction is there in part, whoever opens the state next.
//!
//! `SEEKNAL_KILLS=200 cargo test --test kill9` kills 200 times on each backend; `SEEKNAL_KILL_SEED=N` chooses other moments.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

#[path = "../binaries/mod.rs"]
mod binaries;
mod checker;

// The example's own comparison and log format: what the example claims is what is tested.
#[path = "../../examples/parallel_executors/ack.rs"]
#[allow(dead_code, reason = "only the format is needed here")]
mod ack;
#[path = "../../examples/parallel_executors/chance.rs"]
mod chance;
#[path = "../../examples/parallel_executors/check.rs"]
#[allow(dead_code, reason = "only the comparison is needed here")]
mod check;
#[path = "../../examples/parallel_executors/marks.rs"]
mod marks;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use seeknal_state::{BackendOptions, Coordinator, create_state_backend};

use ack::Line;
use check::{Findings, Stored};

/// After so many kills a new project begins: the work of a round grows with what is in the project.
const PROJECT_ROUNDS: u64 = 25;
/// How long a round may take; a child that hangs is a failure.
const PATIENCE: Duration = Duration::from_secs(120);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value:?}")))
}

/// The lines of an ack log, without those that a kill cut off.
fn read_log(path: &Path) -> Vec<Line> {
    let text = fs::read(path).unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines
        .filter_map(|line| match serde_json::from_slice(line) {
            Ok(line) => Some(line),
            Err(error) if error.is_eof() => None,
            Err(error) => panic!("{}: {error}: {}", path.display(), String::from_utf8_lossy(line)),
        })
        .collect()
}

fn read_state(target: &Path, backend: &str) -> Stored {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let backend = create_state_backend(backend, &BackendOptions::new().base_path(target)).unwrap();
        let state = Coordinator::open(backend).await.expect("after a kill the state opens");
        let verified = state.backend().verify().await.unwrap();
        assert!(verified.is_sound(), "{:?}", verified.problems);
        let stored = Stored::read(&state).await.unwrap();
        state.close().await.unwrap();
        stored
    })
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// What a kill is waited for.
enum Moment {
    /// So much time after the start: also while it opens and recovers.
    After(Duration),
    /// So many bytes in the ack log, and a little later.
    Bytes(u64, Duration),
}

fn moment(seed: u64, round: u64, log_before: u64) -> Moment {
    let dice = |what: &str, limit: u64| chance::below(limit, seed, &[what, &round.to_string()]);
    let little = Duration::from_micros(dice("little", 3_000));
    if dice("early", 4) == 0 {
        Moment::After(Duration::from_micros(dice("after", 60_000)))
    } else {
        Moment::Bytes(log_before + dice("bytes", 60_000), little)
    }
}

/// Runs the job until the moment has come; whether it had to be killed.
fn run_until(mut child: Child, log: &Path, moment: &Moment) -> bool {
    let start = Instant::now();
    let come = || match moment {
        Moment::After(time) => start.elapsed() >= *time,
        Moment::Bytes(bytes, _) => fs::metadata(log).is_ok_and(|log| log.len() >= *bytes),
    };
    while !come() {
        if let Some(status) = child.try_wait().unwrap() {
            let mut text = String::new();
            child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
            child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
            assert!(status.success(), "the job failed by itself, with {status}:\n{text}");
            return false;
        }
        assert!(start.elapsed() < PATIENCE, "the job hangs");
        std::thread::sleep(Duration::from_micros(200));
    }
    if let Moment::Bytes(_, little) = moment {
        std::thread::sleep(*little);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

fn campaign(backend: &str) {
    let rounds = setting("SEEKNAL_KILLS", 6);
    let seed = setting("SEEKNAL_KILL_SEED", 20_240_101);
    let job = binaries::example("parallel_executors");
    let mut folder = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let (mut kills, mut round, mut ahead, mut checked) = (0, 0, 0, 0);
    while kills < rounds {
        if round % PROJECT_ROUNDS == PROJECT_ROUNDS - 1 {
            folder = tempfile::tempdir().unwrap();
        }
        let (project, log) = (folder.path().join("project"), folder.path().join("ack.log"));
        let log_before = fs::metadata(&log).map_or(0, |log| log.len());
        let child = Command::new(&job)
            .arg("--project-path")
            .arg(&project)
            .arg("--ack-log")
            .arg(&log)
            .args(["--backend", backend, "--runs", "1", "--nodes", "60", "--executors", "16", "--work-ms", "3"])
            .args(["--seed", &round.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        kills += u64::from(run_until(child, &log, &moment(seed, round, log_before)));
        if project.join("target").exists() {
            let findings = look(&project.join("target"), backend, &read_log(&log), round);
            assert!(
                findings.problems.is_empty(),
                "{backend}, round {round}, seed {seed}: {findings}\n{}",
                findings.problems.join("\n")
            );
            ahead += findings.ahead.len();
            checked = checked.max(findings.writes);
        }
        round += 1;
        assert!(round < 3 * rounds + 10, "of {round} jobs only {kills} lived until they were killed");
    }
    assert!(checked > 0, "nothing was ever acknowledged");
    println!(
        "{backend}: {kills} kills in {round} rounds, up to {checked} writes compared at once, {ahead} times something was ahead of its acknowledgement; {:.0?}",
        start.elapsed()
    );
}

/// Opens the state and compares. Every other time it is a copy that is opened, so that the next job recovers from the crash itself.
fn look(target: &Path, backend: &str, lines: &[Line], round: u64) -> Findings {
    if round.is_multiple_of(2) {
        return check::compare(lines, &read_state(target, backend));
    }
    let apart = tempfile::tempdir().unwrap();
    copy(target, apart.path());
    check::compare(lines, &read_state(apart.path(), backend))
}

#[test]
fn a_killed_job_loses_nothing_on_the_file_backend() {
    campaign("file");
}

#[test]
fn a_killed_job_loses_nothing_in_the_database() {
    campaign("database");
}
