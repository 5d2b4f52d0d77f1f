//! The command under faults: on a file system of another machine, and killed at its system calls: what it moved or deleted is whole or not, and the same command run again ends the work.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;

use crate::projects::{open, project, put};
use crate::trace::{Child, can_trace};
use seeknal_state::model::{
    Batch, Entry, Interval, LeaseKey, LeaseMutation, LeaseOwner, Mutation, NewRun, NodeId, NodeUpdate, Outcome, RunId, RunUpdate,
    time,
};
use seeknal_state::project::{Settings, migrate};
use seeknal_state::store::StateBackend;

/// Old runs that a cleanup finds: more than it deletes at once.
const RUNS: i64 = 60;

fn seeknal(dir: &Path, arguments: &str) -> Child {
    let child = Child::program(env!("CARGO_BIN_EXE_seeknal")).arguments(["--project-path".as_ref(), dir.as_os_str()]);
    child.arguments(arguments.split_whitespace())
}

fn settings(dir: &Path) -> Settings {
    Settings::load(dir, &|_| None).unwrap()
}

#[tokio::test]
async fn a_move_that_is_killed_at_any_call_is_done_when_it_is_run_again() {
    if !can_trace() {
        return;
    }
    for (from, to) in [("file", "database"), ("database", "file")] {
        let mut killed = 0;
        for call in ["pwrite64", "fsync", "fdatasync", "/^write$", "/rename.*", "/unlink.*", "/^ftruncate"] {
            for when in [1, 3, 9] {
                let what = format!("{from} to {to}, {call} {when}");
                let dir = project(from).await;
                let order = format!("migrate-state --backend {to} --no-dry-run");
                killed += usize::from(
                    seeknal(dir.path(), &order).inject(call, &format!("signal=SIGKILL:when={when}")).run().was_killed(&what),
                );
                // What the settings name is whole, whichever it is.
                let (backend, _) = settings(dir.path()).open_backend(true).await.unwrap();
                assert_eq!(migrate::plan(&*backend, None, |_, _| ()).await.unwrap().source.runs, 4, "{what}");
                backend.close().await.unwrap();

                let told = seeknal(dir.path(), &order).run();
                assert!(told.status.success(), "{what}: {}", told.text);
                assert_eq!(settings(dir.path()).backend.value, to, "{what}");
                let (file, database) =
                    (open("file", &dir.path().join("target")).await, open("database", &dir.path().join("target")).await);
                let counts = migrate::verify(&*file, &*database).await.unwrap();
                assert_eq!((counts.runs, counts.nodes, counts.coverage_nodes), (4, 6, 1), "{what}");
                migrate::verify(&*database, &*file).await.unwrap();
            }
        }
        assert!(killed > 8, "{from}: only {killed} were killed");
    }
}

/// Notes that outlive the switch would be taken for those of a move that is still to be ended.
#[tokio::test]
async fn the_notes_of_a_move_are_gone_before_the_settings_are_switched() {
    if !can_trace() {
        return;
    }
    let dir = project("file").await;
    let notes = dir.path().join("target/.migrate-state.copied");
    let order = "migrate-state --backend database --no-dry-run";
    let killed = seeknal(dir.path(), order).inject("/unlink.*", "signal=SIGKILL:when=1").on(&notes).run();
    assert!(killed.was_killed("notes"), "{}", killed.text);
    assert_eq!(settings(dir.path()).backend.value, "file");
    // And for good: the folder's names are synced in between.
    let log = dir.path().join("log");
    let told = seeknal(dir.path(), order).log("/unlink.*,/^rename.*,/^f(data)?sync$", &log).run();
    assert!(told.status.success(), "{}", told.text);
    let calls = std::fs::read_to_string(&log).unwrap();
    let at = |found: &dyn Fn(&str) -> bool| calls.lines().position(found).unwrap();
    let gone = at(&|call| call.contains("unlink") && call.contains("migrate-state.copied"));
    let switched = at(&|call| call.contains("rename") && call.contains("seeknal_project.yml"));
    let target = format!("{}>)", dir.path().join("target").display());
    let synced = calls
        .lines()
        .enumerate()
        .any(|(line, call)| (gone..switched).contains(&line) && call.contains("sync(") && call.contains(&target));
    assert!(gone < switched && synced, "{calls}");
}

#[tokio::test]
async fn settings_that_are_switched_are_told_to_be_although_their_folder_could_not_be_synced() {
    if !can_trace() {
        return;
    }
    let dir = project("file").await;
    std::fs::write(dir.path().join("seeknal_project.yml"), "state_backend: file\n").unwrap();
    let order = "migrate-state --backend database --no-dry-run";
    let told = seeknal(dir.path(), order).inject("fsync", "error=EIO:when=1+").on(dir.path()).run();
    assert!(told.status.success(), "{}", told.text);
    assert!(told.text.contains("names the database backend now, but this may not survive"), "{}", told.text);
    assert_eq!(settings(dir.path()).backend.value, "database");
}

#[tokio::test]
async fn a_database_on_a_file_system_of_another_machine_is_refused_and_the_servers_are_named() {
    if !can_trace() {
        return;
    }
    let dir = project("database").await;
    let before = crate::projects::tree(dir.path());
    // The kernel's answer begins with the type of the file system: NFS.
    let told = seeknal(dir.path(), "state runs").inject("statfs", "poke_exit=@arg2=6969").run();
    assert!(!told.status.success());
    for named in ["NFS", "postgres://", "libsql://"] {
        assert!(told.text.contains(named), "{}", told.text);
    }
    assert_eq!(crate::projects::tree(dir.path()), before);
}

/// A project with many old runs, each of two nodes and an interval of its own.
async fn old_runs(backend: &str, runs: i64) -> tempfile::TempDir {
    let dir = project(backend).await;
    let state = open(backend, &dir.path().join("target")).await;
    let node = |name: &str| NodeId::new(name).unwrap();
    for number in 0..runs {
        let at = time::parse("2024-01-10T12:00:00Z").unwrap() + chrono::Duration::hours(number);
        let interval = Interval::new(at, at + chrono::Duration::minutes(30)).unwrap();
        let mutations = vec![
            Mutation::Create { run: NewRun::running(), at },
            Mutation::SetNode { node: node("one"), update: Box::new(NodeUpdate::success()), at },
            Mutation::SetNode { node: node("two"), update: Box::new(NodeUpdate::success()), at },
            Mutation::AddInterval { node: node("one"), interval },
            Mutation::Update { update: RunUpdate::success(), at },
        ];
        put(&state, &format!("old_{number}"), mutations).await;
    }
    state.close().await.unwrap();
    dir
}

async fn lock(state: &Arc<dyn StateBackend>, run: &str) {
    let at = time::parse("2024-06-01T00:00:00Z").unwrap();
    let owner = LeaseOwner { process: state.process().unwrap(), name: "somebody".into() };
    let key = LeaseKey::run(RunId::new(run).unwrap());
    let grant = LeaseMutation::Grant { key, owner, purpose: None, at, ttl_ms: 600_000 };
    let batch = Batch::new(vec![Entry { leases: vec![grant], ..Entry::default() }]);
    let outcomes = state.commit(Arc::new(batch)).await.unwrap().outcomes;
    assert!(matches!(outcomes[0], Outcome::Applied(_)), "{outcomes:?}");
}

#[tokio::test]
async fn a_cleanup_that_is_killed_leaves_runs_whole_or_gone_and_locked_ones_alone() {
    if !can_trace() {
        return;
    }
    for name in ["file", "database"] {
        let mut killed = 0;
        for call in ["pwrite64", "fsync", "fdatasync", "/^write$", "/rename.*", "/unlink.*"] {
            for when in [1, 5] {
                let what = format!("{name}, {call} {when}");
                let dir = old_runs(name, RUNS).await;
                let target = dir.path().join("target");
                // The file has one writer: there nobody can hold a lock beside a cleanup.
                let holder = if name == "database" {
                    let holder = open(name, &target).await;
                    lock(&holder, "old_7").await;
                    Some(holder)
                } else {
                    None
                };
                let order = "state cleanup --days 30";
                let child = seeknal(dir.path(), order).inject(call, &format!("signal=SIGKILL:when={when}"));
                killed += usize::from(child.run().was_killed(&what));
                for again in [false, true] {
                    if again {
                        let told = seeknal(dir.path(), order).run();
                        assert!(told.status.success(), "{what}: {}", told.text);
                    }
                    let (state, _) = settings(dir.path()).open_backend(true).await.unwrap();
                    let mut left = 0;
                    for number in 0..RUNS {
                        let id = RunId::new(format!("old_{number}")).unwrap();
                        if let Some(run) = state.load_run(&id).await.unwrap() {
                            left += 1;
                            let intervals = run.node("one").map(|node| node.intervals.len());
                            assert_eq!((run.node_count(), intervals), (2, Some(1)), "{what}: {id} is there in part");
                        } else {
                            assert!(holder.is_none() || number != 7, "{what}: it was locked");
                        }
                    }
                    let one = NodeId::new("one").unwrap();
                    assert_eq!(state.last_success(&one).await.unwrap().unwrap().run_id, "old_59", "{what}");
                    if again {
                        assert_eq!(left, i64::from(holder.is_some()), "{what}");
                        let covered = state.coverage(&one).await.unwrap().intervals.len();
                        assert!(covered >= usize::try_from(RUNS - 1).unwrap(), "{what}: {covered} of {RUNS} intervals are left");
                    }
                    assert!(state.verify().await.unwrap().is_sound(), "{what}");
                    state.close().await.unwrap();
                }
                if let Some(holder) = holder {
                    holder.close().await.unwrap();
                }
            }
        }
        assert!(killed > 4, "{name}: only {killed} were killed");
    }
}

#[tokio::test]
async fn a_full_disk_stops_no_look_at_a_database_that_nobody_has_open() {
    if !can_trace() {
        return;
    }
    let dir = project("database").await;
    let settled = seeknal(dir.path(), "state runs -o json").run();
    assert!(settled.status.success(), "{}", settled.text);
    for suffix in ["-shm", "-wal"] {
        let _not_there = std::fs::remove_file(dir.path().join(format!("target/state.db{suffix}"))).is_err();
    }
    for order in ["state runs -o json", "state verify", "state locks", "state cleanup --days 1 --dry-run"] {
        let told = seeknal(dir.path(), order).inject("pwrite64", "error=ENOSPC:when=1+").run();
        assert!(told.status.success(), "{order}: {}", told.text);
        if order.starts_with("state runs") {
            assert_eq!(told.output, settled.output);
        }
    }
}
