//! What is told while somebody repairs the file: who does, and not who was there before.
#![cfg(feature = "cli")]

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::folder::copy_folder;
use crate::projects::{open, project, put};
use crate::run;
use crate::trace::{Child, SYNCS, can_trace};
use seeknal_state::model::{Mutation, NewRun, time};
use serde_json::Value;

/// The command that mends this project, once it stands.
fn stopped(dir: &Path) -> Option<i32> {
    let place = dir.to_str().unwrap().as_bytes();
    std::fs::read_dir("/proc").unwrap().find_map(|entry| {
        let process = entry.ok()?.path();
        let words = std::fs::read(process.join("cmdline")).ok()?;
        let mut words = words.split(|byte| *byte == 0);
        let is_it = words.next()?.ends_with(b"/seeknal") && words.any(|word| word == place);
        let status = std::fs::read_to_string(process.join("status")).ok().filter(|_| is_it)?;
        let state = status.lines().find(|line| line.starts_with("State:"))?;
        state.to_lowercase().contains("\tt").then(|| process.file_name()?.to_str()?.parse().ok())?
    })
}

/// A project whose writer is gone: this process, as far as the lock tells.
async fn left(closed: bool) -> tempfile::TempDir {
    let (dir, gone) = (project("file").await, tempfile::tempdir().unwrap());
    let backend = open("file", &dir.path().join("target")).await;
    let at = time::parse("2024-03-01").unwrap();
    for run in ["left", "torn"] {
        put(&backend, run, vec![Mutation::Create { run: NewRun::running(), at }]).await;
    }
    if closed {
        backend.close().await.unwrap();
    }
    copy_folder(dir.path(), gone.path());
    backend.close().await.unwrap();
    // A torn record is what there is to do.
    let journal = gone.path().join("target/run_state.json.journal");
    if !closed {
        let mut bytes = std::fs::read(&journal).unwrap();
        bytes.truncate(bytes.len() - 3);
        std::fs::write(&journal, bytes).unwrap();
    }
    gone
}

#[tokio::test(flavor = "multi_thread")]
async fn who_repairs_is_told_to_who_comes_meanwhile() {
    if !can_trace() {
        return;
    }
    for closed in [false, true] {
        let dir = left(closed).await;
        let place = dir.path().to_owned();
        let lock = place.join("target/run_state.json.lock");
        let before = std::fs::read(&lock).unwrap();
        // It stands at its first sync, which comes under the lock.
        let child = Child::program(env!("CARGO_BIN_EXE_seeknal")).arguments(["--project-path".as_ref(), place.as_os_str()]);
        let child = child.arguments(["state", "verify", "--repair"]).inject(SYNCS, "signal=SIGSTOP:when=1");
        let child = std::thread::spawn(move || child.run());
        let begun = Instant::now();
        // Where strace itself holds it for a moment it goes on by itself.
        let (mut seen, mut pid) = (0, None);
        while seen < 20 && !child.is_finished() && begun.elapsed() < Duration::from_secs(60) {
            pid = stopped(&place);
            seen = if pid.is_some() { seen + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let told = ["state cleanup --days 1", "state end left", "state runs"].map(|order| run(&place, order));
        let locks = run(&place, "state locks -o json").1;
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            kill_process(pid, Signal::CONT).unwrap();
        }
        let ended = child.join().unwrap();
        assert!(ended.status.success(), "{}", ended.text);

        let (pid, own) = (pid.unwrap(), std::process::id());
        let [cleanup, end, runs] = told;
        for (code, _, err) in [cleanup, end] {
            assert_eq!(code, 4, "{err}");
            assert!(
                err.contains(&format!("is being repaired by pid {pid} on ")) && !err.contains(&format!("pid {own} ")),
                "{err}"
            );
        }
        assert_eq!(runs.0, 0, "{}", runs.2);
        let locks: Value = serde_json::from_str(&locks).unwrap();
        let processes: Vec<_> = locks["processes"].as_array().unwrap().iter().map(|process| process["pid"].clone()).collect();
        assert_eq!(processes, [pid], "{locks}");
        assert_eq!(locks["leases"], Value::Array(Vec::new()));
        assert_eq!(std::fs::read(&lock).unwrap().len(), before.len());
        assert!(!String::from_utf8(std::fs::read(&lock).unwrap()).unwrap().contains("mender"), "its name is taken out");
    }
}
