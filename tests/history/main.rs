//! Many processes on one run, some of them stopped beyond the life of their leases: nothing that was acknowledged is lost, nothing is applied twice.
//!
//! Every process writes down what it was told; the [`checker`] proves the claim from these notes and from what is stored at the end.
//! `SEEKNAL_HISTORY_SECONDS` says for how long (6 by default), `SEEKNAL_HISTORY_SEED` who is stopped when. With one half of the
//! backend's check taken out the same processes lose updates, and the checker must say so.
#![cfg(all(feature = "sqlite", unix))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

mod blind;
mod checker;
mod worker;

#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use seeknal_state::{Coordinator, NewRun, create_state_backend};

use blind::Without;
use checker::{Final, Line, Told, check};
use support::Place;

const PROCESSES: usize = 8;
/// As many are stopped at once.
const STOPPED: usize = 2;
/// How long a lease lives; a stopped process sleeps three times as long.
const TTL: Duration = Duration::from_millis(300);
/// How long nobody is stopped then, so that a fifth of the time of all is slept away. A server keeps the locks of a process that was stopped in
/// mid-transaction, so that the others work in this time only.
const FREE: Duration = Duration::from_millis(225);

/// A machine that is busy with other things gets so much longer until there is something to prove.
const AT_MOST_LONGER: Duration = Duration::from_secs(60);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn signal(name: &str, process: &Child) {
    let status = Command::new("kill").args([name, &process.id().to_string()]).status().unwrap();
    assert!(status.success(), "kill {name}");
}

/// Ends what was started, also what was stopped, also when the test fails.
struct Workers(Vec<Child>);

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

fn start(target: &Place, notes: &Path, number: usize, without: Option<Without>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    if let Some(without) = without {
        command.env(worker::BLIND, serde_json::to_string(&without).unwrap());
    }
    command
        .args(["worker::works", "--exact", "--nocapture", "--test-threads=1"])
        .env(worker::TARGET, serde_json::to_string(target).unwrap())
        .env(worker::NOTES, notes.join(format!("{number}.jsonl")))
        .env(worker::NUMBER, number.to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

/// What the processes noted; while they write, the last line may be half of one.
fn read(notes: &Path, ended: bool) -> Vec<Line> {
    let mut lines = Vec::new();
    for number in 0..PROCESSES {
        let text = std::fs::read(notes.join(format!("{number}.jsonl"))).unwrap();
        let whole = if ended { text.len() } else { text.iter().rposition(|byte| *byte == b'\n').unwrap_or(0) };
        let whole = std::str::from_utf8(&text[..whole]).unwrap();
        lines.extend(whole.lines().map(|line| serde_json::from_str::<Line>(line).unwrap()));
    }
    lines
}

/// What must be told before there is something to prove.
#[derive(Debug, Clone, Copy, Default)]
struct Least {
    acknowledged: u64,
    fenced: u64,
}

/// What came of it.
struct History {
    lines: Vec<Line>,
    end: Final,
    stops: usize,
    took: Duration,
}

/// Lets the processes work, stops and wakes some of them all the time, and gathers what they noted.
fn gather(target: &Place, lasting: Duration, without: Option<Without>, least: Least) -> History {
    let mut dice = number("SEEKNAL_HISTORY_SEED", 11).max(1);
    let mut throw = |below: usize| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        usize::try_from(dice >> 33).unwrap() % below
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let state = runtime.block_on(async {
        let state = Coordinator::open(create_state_backend("database", &target.options()).unwrap()).await.unwrap();
        state.create_run(worker::RUN, NewRun::running()).await.unwrap();
        state
    });
    let first = runtime.block_on(state.fresh(worker::RUN)).unwrap().unwrap().version();
    let notes = tempfile::tempdir().unwrap();
    let mut workers = Workers((0..PROCESSES).map(|number| start(target, notes.path(), number, without)).collect());
    // Each begins its notes when it has opened the state.
    let patience = Instant::now() + Duration::from_secs(60);
    while (0..PROCESSES).any(|number| !notes.path().join(format!("{number}.jsonl")).exists()) {
        assert!(Instant::now() < patience, "not all processes came up");
        for process in &mut workers.0 {
            assert!(process.try_wait().unwrap().is_none(), "a worker failed");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let (began, mut stops) = (Instant::now(), 0);
    let too_little = || {
        let lines = read(notes.path(), false);
        let told = |what: fn(&Told) -> bool| lines.iter().filter(|line| what(&line.told)).count() as u64;
        told(|told| matches!(told, Told::Done { .. })) <= least.acknowledged || told(|told| *told == Told::Fenced) < least.fenced
    };
    while began.elapsed() < lasting || (began.elapsed() < lasting + AT_MOST_LONGER && too_little()) {
        let mut stopped: Vec<usize> = Vec::new();
        while stopped.len() < STOPPED {
            let chosen = throw(PROCESSES);
            if !stopped.contains(&chosen) {
                signal("-STOP", &workers.0[chosen]);
                stopped.push(chosen);
                stops += 1;
            }
        }
        // Not waits for something to happen: this is for how long they are stopped, and are not.
        std::thread::sleep(TTL * 3);
        for woken in stopped {
            signal("-CONT", &workers.0[woken]);
        }
        std::thread::sleep(FREE);
    }
    std::fs::write(notes.path().join("enough"), "").unwrap();
    for process in &mut workers.0 {
        assert!(process.wait().unwrap().success(), "a worker failed");
    }
    let lines = read(notes.path(), true);
    let end = runtime.block_on(async {
        let run = state.fresh(worker::RUN).await.unwrap().unwrap();
        let nodes = run.nodes().map(|(id, node)| (id.to_string(), node.row_count.unwrap_or(0))).collect();
        state.close().await.unwrap();
        Final { first: first.0, last: run.version().0, nodes }
    });
    History { lines, end, stops, took: began.elapsed() }
}

/// The checker finds nothing.
fn prove(target: &Place, at_least: u64) {
    let lasting = Duration::from_secs(number("SEEKNAL_HISTORY_SECONDS", 6));
    let fenced = u64::from(lasting >= Duration::from_secs(5));
    let History { lines, end, stops, took } = gather(target, lasting, None, Least { acknowledged: at_least, fenced });
    let told = check(&lines, &end).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{told}, {stops} stops in {took:?}");
    assert!(told.acknowledged > at_least, "too little happened to prove anything: {told}");
    assert!(told.refused_by_fence >= fenced, "no stopped process met its lost lease: {told}");
}

/// How often it is tried whether something is lost: that takes somebody who is stopped in the middle of a write, and somebody else who is faster then.
const CHANCES: u32 = 5;

/// The checker finds what is lost once one half or the other of the backend's check is taken out. Each chance has a place of its own.
fn objects(without: Without, on_a_new_place: impl Fn(&mut dyn FnMut(&Place))) {
    let (seconds, lost) = match without {
        Without::Guards => (2, "node guarded-"),
        Without::Fences => (5, "node fenced-"),
    };
    let mut found = None;
    for _ in 0..CHANCES {
        on_a_new_place(&mut |place| {
            let History { lines, end, .. } = gather(place, Duration::from_secs(seconds), Some(without), Least::default());
            found = check(&lines, &end).err();
        });
        if found.is_some() {
            break;
        }
    }
    let problem = found.expect("nothing was refused, and the checker has found nothing");
    println!("without {without:?}: {problem}");
    assert!(problem.starts_with(lost) && problem.contains("a write was lost"), "{problem}");
}

fn of_folder(then: impl FnOnce(&Place)) {
    let folder = tempfile::tempdir().unwrap();
    then(&Place::of_folder(folder.path()));
}

#[test]
fn on_sqlite() {
    of_folder(|place| prove(place, 100));
}

#[test]
fn on_sqlite_without_its_guards() {
    objects(Without::Guards, |then| of_folder(|place| then(place)));
}

#[test]
fn on_sqlite_without_its_fences() {
    objects(Without::Fences, |then| of_folder(|place| then(place)));
}

#[cfg(feature = "postgres")]
#[test]
fn on_postgres() {
    let Some(cluster) = support::postgres::cluster() else { return };
    prove(&Place::of_schema(cluster), 50);
}

#[cfg(feature = "postgres")]
#[test]
fn on_postgres_without_its_guards() {
    let Some(cluster) = support::postgres::cluster() else { return };
    objects(Without::Guards, |then| then(&Place::of_schema(cluster)));
}

#[cfg(feature = "postgres")]
#[test]
fn on_postgres_without_its_fences() {
    let Some(cluster) = support::postgres::cluster() else { return };
    objects(Without::Fences, |then| then(&Place::of_schema(cluster)));
}

#[cfg(feature = "libsql")]
#[test]
fn on_libsql() {
    let Some(server) = support::sqld::Sqld::start() else { return };
    prove(&Place::of_server(&server), 100);
}

#[cfg(feature = "libsql")]
#[test]
fn on_libsql_without_its_guards() {
    if support::sqld::program().is_none() {
        return;
    }
    objects(Without::Guards, |then| then(&Place::of_server(&support::sqld::Sqld::start().unwrap())));
}

#[cfg(feature = "libsql")]
#[test]
fn on_libsql_without_its_fences() {
    if support::sqld::program().is_none() {
        return;
    }
    objects(Without::Fences, |then| then(&Place::of_server(&support::sqld::Sqld::start().unwrap())));
}
