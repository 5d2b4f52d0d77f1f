//! Killed at any system call, and what a power cut would take.

use super::trace::{Child, SYNCS, can_trace};
use super::*;

/// Writes until it is killed; notes every acknowledged node in a file, after its acknowledgement and before the next. Every node also fills pages, so that
/// checkpoints have something to do.
#[tokio::test]
#[ignore = "it is run by another test, and killed"]
async fn child_that_is_killed() {
    use std::io::Write;
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let mut acks = std::fs::OpenOptions::new().create(true).append(true).open(std::env::var_os("ACKS").unwrap()).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    let backend = open(&db(&folder)).await;
    let run = backend.load_run(&run_id("r")).await.unwrap();
    let first = run.as_ref().map_or(0, RunState::node_count);
    if run.is_none() {
        change(&backend, "r", vec![create(0)]).await;
    }
    for number in first..first + 12 {
        let node = format!("node_{number}");
        change(&backend, "r", vec![set(&node, NodeUpdate::success().error("x".repeat(3_000)))]).await;
        acks.write_all(format!("{node}\n").as_bytes()).unwrap();
        if number % 4 == 3 {
            backend.checkpoint().await.unwrap();
        }
    }
    backend.close().await.unwrap();
}

#[test]
fn all_that_is_acknowledged_was_synced_before_and_the_wal_goes_only_after_the_database() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let (state, acks, log) = (folder.join("state"), folder.join("acks"), folder.join("log"));
    let child = Child::test("kills::child_that_is_killed").env("STATE_FOLDER", &state).env("ACKS", &acks);
    child.log(syncs::CALLS, &log).run().passed("traced");
    let log = std::fs::read_to_string(&log).unwrap();
    let of_wal = |call: &str| log.lines().filter(|line| line.contains(call) && line.contains("/state.db-wal>")).count();
    let (writes, syncs) = (of_wal("pwrite64("), of_wal("sync("));
    assert!(writes > 12 && writes <= syncs, "{writes} writes and {syncs} syncs: the pages of a commit are written together");
    let found = syncs::read(
        &log,
        &syncs::Rules {
            acks: acks.to_str().unwrap(),
            folder: state.to_str().unwrap(),
            // Who lives says nothing after a power cut, and the shared index is made anew.
            free: |path| path.contains("/state.db.owners") || path.ends_with("-shm"),
            grows: |_| false,
            behind_log: Some(("-wal", "/state.db")),
        },
    );
    assert_eq!(found.wrong, Vec::<String>::new());
    assert!(found.acks == 12 && found.writes > 24 && found.renames == 1 && found.syncs > 12, "{found:?}");
}

/// Every folder that a power cut could leave, at every call: what was acknowledged is in it, whatever else of the unsynced is there, or not, or half.
#[tokio::test]
async fn whatever_a_power_cut_leaves_has_what_was_acknowledged() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let (state, acks, log) = (folder.join("state"), folder.join("acks"), folder.join("log"));
    std::fs::create_dir(&state).unwrap();
    let child = Child::test("kills::child_that_is_killed").env("STATE_FOLDER", &state).env("ACKS", &acks);
    child.log_bytes(power::CALLS, &log).run().passed("traced");
    let of_memory = |name: &str| name.contains("state.db.owners") || name.ends_with("-shm");
    let cuts = power::cuts(&std::fs::read_to_string(&log).unwrap(), &state, &acks, of_memory);
    let last = cuts.last().unwrap();
    assert!(last.1 == 12 && cuts.len() > 100, "{} cuts, {} acknowledged", cuts.len(), last.1);
    for (how, acknowledged, tree) in cuts {
        let left = tempfile::tempdir().unwrap();
        power::lay(&tree, left.path());
        let backend = make(&db(left.path()));
        backend.initialize().await.unwrap_or_else(|error| panic!("{how}: {error}"));
        let run = backend.load_run(&run_id("r")).await.unwrap();
        let there = run.as_ref().map_or(0, RunState::node_count);
        let all_there = (0..acknowledged).all(|node| run.as_ref().unwrap().node(&format!("node_{node}")).is_some());
        assert!(all_there && there <= acknowledged + 1, "{how}: {there} of {acknowledged}");
        backend.close().await.unwrap();
    }
}

#[test]
fn the_reader_of_logs_finds_what_is_not_synced() {
    let rules = syncs::Rules {
        acks: "/t/acks",
        folder: "/t/s",
        free: |path| path.ends_with("-shm"),
        grows: |path| path.ends_with(".journal"),
        behind_log: Some(("-wal", "/state.db")),
    };
    let ack = r#"1 write(9</t/acks>, ""..., 7) = 7"#;
    let cases: &[(&[&str], &[&str])] = &[
        (&[r#"1 pwrite64(3</t/s/j>, ""..., 8, 64) = 8"#, "1 fdatasync(3</t/s/j>) = 0", ack], &[]),
        (&[r#"1 pwrite64(3</t/s/j>, ""..., 8, 64) = 8"#, ack], &["line 2: acknowledged, /t/s/j is not synced since line 1"]),
        (&[r#"1 write(3</t/s/x-shm>, ""..., 8) = 8"#, ack], &[]),
        // A sync that failed, that began before the write, that has not ended, and of another file.
        (
            &[r#"1 write(3</t/s/j>, ""..., 8) = 8"#, "1 fsync(3</t/s/j>) = -1 EIO (Input/output error) (INJECTED)", ack],
            &["line 3: acknowledged, /t/s/j is not synced", "line 3: acknowledged, a sync of /t/s/j failed"],
        ),
        (
            &["2 fsync(3</t/s/j> <unfinished ...>", r#"1 write(3</t/s/j>, ""..., 8) = 8"#, "2 <... fsync resumed>) = 0", ack],
            &["line 4"],
        ),
        (
            &[
                r#"1 write(3</t/s/j>, ""..., 8 <unfinished ...>"#,
                "2 fsync(3</t/s/j> <unfinished ...>",
                "1 <... write resumed>) = 8",
                "2 <... fsync resumed>) = 0",
                ack,
            ],
            &[],
        ),
        (&[r#"1 write(3</t/s/j>, ""..., 8) = 8"#, "2 fsync(3</t/s/j> <unfinished ...>", ack], &["line 3"]),
        (&[r#"1 write(3</t/s/j>, ""..., 8) = 8"#, "1 fsync(4</t/s/k>) = 0", ack], &["line 3"]),
        // Names.
        (
            &[r#"1 openat(AT_FDCWD</x>, "/t/s/new", O_RDWR|O_CREAT|O_CLOEXEC, 0666) = 3</t/s/new>"#, ack],
            &["line 2: acknowledged, /t/s is not synced since /t/s/new got its name in line 1"],
        ),
        (&[r#"1 openat(AT_FDCWD</x>, "/t/s/new", O_RDWR|O_CREAT, 0666) = 3</t/s/new>"#, "1 fsync(4</t/s>) = 0", ack], &[]),
        (&[r#"1 rename("/t/s/a", "/t/s/b") = 0"#, ack], &["line 2"]),
        (&[r#"1 rename("/t/s/a", "/t/s/b") = 0"#, "1 fsync(4</t/s>) = 0", ack], &[]),
        (
            &[r#"1 write(3</t/s/a>, ""..., 8) = 8"#, r#"1 rename("/t/s/a", "/t/s/b") = 0"#, "1 fsync(4</t/s>) = 0", ack],
            &["line 2: /t/s/a is renamed"],
        ),
        (
            &[
                r#"1 write(3</t/s/a>, ""..., 8) = 8"#,
                r#"1 rename("/t/s/a", "/t/s/x.journal") = 0"#,
                "1 fsync(4</t/s>) = 0",
                ack,
                "1 fdatasync(3</t/s/x.journal>) = 0",
                ack,
            ],
            &["line 4: acknowledged, /t/s/x.journal is not synced since line 1"],
        ),
        (
            &[r#"1 rename("/t/s/a", "/t/s/b") = 0"#, r#"1 rename("/t/s/c", "/t/s/d") = 0"#, "1 fsync(4</t/s>) = 0", ack],
            &["line 2: /t/s/c is renamed, and the folder not synced since /t/s/b was"],
        ),
        // A database behind its log.
        (&[r#"1 pwrite64(3</t/s/state.db>, ""..., 8, 64) = 8"#, ack], &[]),
        (
            &[r#"1 pwrite64(3</t/s/state.db>, ""..., 8, 64) = 8"#, r#"1 pwrite64(4</t/s/state.db-wal>, ""..., 32, 0) = 32"#],
            &["line 2: -wal begins anew"],
        ),
        (
            &[r#"1 pwrite64(3</t/s/state.db>, ""..., 8, 64) = 8"#, r#"1 unlink("/t/s/state.db-wal") = 0"#],
            &["line 2: -wal is removed"],
        ),
    ];
    for (lines, wrong) in cases {
        let found = syncs::read(&lines.join("\n"), &rules);
        let is_told =
            found.wrong.len() == wrong.len() && found.wrong.iter().zip(*wrong).all(|(found, wrong)| found.starts_with(wrong));
        assert!(is_told, "{lines:#?}: {:?}", found.wrong);
    }
}

#[tokio::test]
async fn a_kill_at_any_system_call_also_while_it_recovers_or_checkpoints_keeps_what_was_acknowledged() {
    if !can_trace() {
        return;
    }
    let mut killed = 0;
    // What follows is killed at its beginning and its end too: commits, checkpoints after every fourth, and the one of closing. The second attempt
    // recovers what the first one left, and is killed in that.
    let places: &[(&str, &[usize])] = &[
        ("pwrite64", &[1, 2, 5, 9, 17, 33, 40, 47, 60, 80, 110]),
        (SYNCS, &[1, 2, 3, 5, 6, 9, 12, 15, 18, 22, 27, 32]),
        ("/^ftruncate", &[1, 2]),
        ("/unlink.*", &[1, 2, 3]),
        ("/rename.*", &[1, 2]),
    ];
    for (call, whens) in places {
        for when in *whens {
            let folder = tempfile::tempdir().unwrap();
            let (state, acks) = (folder.path().join("state"), folder.path().join("acks"));
            for attempt in 1..=3 {
                let what = format!("{call} {when} attempt {attempt}");
                // Recovery has fewer calls than the work before it.
                let when = if attempt == 1 { *when } else { when % 7 + 1 };
                let child = Child::test("kills::child_that_is_killed").env("STATE_FOLDER", &state).env("ACKS", &acks);
                killed += usize::from(child.inject(call, &format!("signal=SIGKILL:when={when}")).run().was_killed(&what));
                let told = std::fs::read_to_string(&acks).unwrap_or_default();
                // Looked at in a copy, so that the next attempt finds what this one left.
                let copy = tempfile::tempdir().unwrap();
                if !state.exists() {
                    continue;
                }
                for (file, bytes) in bytes_of(&state) {
                    if file.is_file() {
                        std::fs::write(copy.path().join(file.file_name().unwrap()), bytes).unwrap();
                    }
                }
                let backend = open(&db(copy.path())).await;
                let run = backend.load_run(&run_id("r")).await.unwrap();
                let there = run.as_ref().map_or(0, RunState::node_count);
                assert!(told.lines().all(|node| run.as_ref().is_some_and(|run| run.node(node).is_some())), "{what}: {told}");
                // At most the one that was under way when it was killed, in every attempt.
                assert!(there <= told.lines().count() + attempt, "{what}: {there} for {told}");
                assert!(backend.verify().await.unwrap().is_sound(), "{what}");
                backend.close().await.unwrap();
            }
        }
    }
    assert!(killed > 40, "only {killed} were killed");
}
