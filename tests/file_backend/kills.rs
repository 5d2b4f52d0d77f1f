//! Killed at any system call: also in a checkpoint, and while it recovers.

use super::trace::{Child, can_trace};
use super::*;

#[tokio::test]
async fn a_kill_at_any_step_of_a_checkpoint_loses_nothing_and_applies_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "a", NodeUpdate::success(), 1).await;
    let before = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), before.path());
    backend.checkpoint().await.unwrap();
    set(&backend, "run_1", "b", NodeUpdate::success(), 2).await;
    let told = all(&backend).await;
    let after = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), after.path());
    let old = |name: &str| before.path().join(name);
    let new = |name: &str| after.path().join(name);
    let lock = "run_state.json.lock";
    // Which document, which journal, which next journal lie there when it is killed.
    let crashes = [
        (
            "the next journal has begun",
            old("run_state.json"),
            Some(old("run_state.json.journal")),
            Some(new("run_state.json.journal")),
        ),
        (
            "the document has its name",
            new("run_state.json"),
            Some(old("run_state.json.journal")),
            Some(new("run_state.json.journal")),
        ),
        ("the journal has its name", new("run_state.json"), Some(new("run_state.json.journal")), None),
        ("somebody removed the spent one", new("run_state.json"), None, Some(new("run_state.json.journal"))),
    ];
    for (step, document_now, journal_now, next_now) in crashes {
        let crashed = tempfile::tempdir().unwrap();
        std::fs::copy(new(lock), crashed.path().join(lock)).unwrap();
        std::fs::copy(document_now, document(crashed.path())).unwrap();
        if let Some(from) = journal_now {
            std::fs::copy(from, journal(crashed.path())).unwrap();
        }
        if let Some(from) = next_now {
            std::fs::copy(from, crashed.path().join("run_state.json.journal.next")).unwrap();
        }
        std::fs::write(crashed.path().join(".run_state.json.tmp-left"), "half").unwrap();
        assert_eq!(all(&reader(crashed.path()).await).await, told, "{step}: read");
        let (again, notices) = open_told(crashed.path()).await;
        assert_eq!(all(&again).await, told, "{step}");
        assert!(!notices.iter().any(|notice| notice.contains("orphan")), "{step}: {notices:?}");
        assert!(!crashed.path().join(".run_state.json.tmp-left").exists(), "{step}: unfinished files are swept");
        set(&again, "run_1", "c", NodeUpdate::success(), 3).await;
        let more = all(&again).await;
        let twice = tempfile::tempdir().unwrap();
        copy_folder(crashed.path(), twice.path());
        assert_eq!(all(&open(twice.path()).await).await, more, "{step}: killed again");
        again.checkpoint().await.unwrap();
        again.close().await.unwrap();
        assert_eq!(all(&open(crashed.path()).await).await, more, "{step}: closed");
        assert!(!names(crashed.path()).iter().any(|name| name.contains(".next")), "{step}");
    }
}

/// Killed between a rotation and the document that it is for, before anything was written behind it.
#[tokio::test]
async fn a_checkpoint_ends_where_a_kill_left_a_journal_without_a_record() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let told = all(&backend).await;
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    backend.checkpoint().await.unwrap();
    std::fs::copy(journal(folder.path()), killed.path().join("run_state.json.journal.next")).unwrap();

    let again = open(killed.path()).await;
    let ended = tokio::time::timeout(std::time::Duration::from_secs(20), again.checkpoint()).await;
    ended.expect("what the document holds is waited for, not numbers that no record has").unwrap();
    assert_eq!(all(&reader(killed.path()).await).await, told);
    assert!(!names(killed.path()).iter().any(|name| name.contains(".next")), "it is in the document");
}

/// Writes and checkpoints until it is killed; notes every acknowledged node in a file, after its acknowledgement and before the next.
#[tokio::test]
#[ignore = "it is run by another test, and killed"]
async fn child_that_is_killed() {
    use std::io::Write;
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let mut acks = std::fs::OpenOptions::new().create(true).append(true).open(std::env::var_os("ACKS").unwrap()).unwrap();
    let backend = open(&folder).await;
    let run = backend.load_run(&run_id("run_1")).await.unwrap();
    let first = run.as_ref().map_or(0, RunState::node_count);
    if run.is_none() {
        create(&backend, "run_1", 0).await;
    }
    for number in first..first + 12 {
        let node = format!("node_{number}");
        set(&backend, "run_1", &node, NodeUpdate::success(), 1).await;
        acks.write_all(format!("{node}\n").as_bytes()).unwrap();
        if number % 4 == 3 {
            backend.checkpoint().await.unwrap();
        }
    }
    backend.close().await.unwrap();
}

/// What was acknowledged is there for who reads and for who opens; of more at most what was under way when it was killed, in every attempt.
async fn keeps_what_was_acknowledged(state: &Path, acks: &Path, what: &str) {
    let acknowledged = std::fs::read_to_string(acks).unwrap_or_default();
    let told: Vec<&str> = acknowledged.lines().collect();
    let check = |runs: &[RunState], how: &str| {
        let there = runs.first().map_or(0, RunState::node_count);
        assert!(told.iter().all(|node| runs[0].node(node).is_some()), "{what} {how}: {told:?}");
        assert!(there <= told.len() + 2, "{what} {how}: {there} for {told:?}");
    };
    check(&all(&reader(state).await).await, "read");
    let copy = tempfile::tempdir().unwrap();
    copy_folder(state, copy.path());
    check(&all(&open(copy.path()).await).await, "opened");
}

/// Kills it at each call of one kind, also while it recovers from the kill before: what was acknowledged is there.
async fn killed_at_every(call: &str) {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut killed = 0;
    for when in 1.. {
        let state = folder.path().join(when.to_string());
        std::fs::create_dir(&state).unwrap();
        let acks = state.join("acks");
        let mut struck = false;
        // Recovery has fewer calls than the work before it.
        for (attempt, when) in [("first", when), ("second", when % 7 + 1)] {
            let child = Child::test("kills::child_that_is_killed").env("STATE_FOLDER", &state).env("ACKS", &acks);
            let told = child.inject(call, &format!("signal=SIGKILL:when={when}")).run();
            let what = format!("{call} {when} {attempt}");
            let was_killed = told.was_killed(&what);
            keeps_what_was_acknowledged(&state, &acks, &what).await;
            killed += usize::from(was_killed);
            struck |= was_killed && attempt == "first";
        }
        if !struck {
            break;
        }
        assert!(when < 200, "{call}: it ends");
    }
    assert!(killed > 0, "no {call} was met");
}

/// Each kind by itself: they take long, and need not wait for one another.
mod a_kill_at_any {
    macro_rules! calls {
        ($($name:ident: $call:literal),+ $(,)?) => {
            $(#[tokio::test]
            async fn $name() {
                super::killed_at_every($call).await;
            })+
        };
    }
    calls! {
        write_at: "pwrite64",
        data_sync: "fdatasync",
        sync: "fsync",
        rename: "/rename.*",
        removal: "/unlink.*",
        link: "/link.*",
        write: "write",
    }
}

/// The disk is full while the journal grows, and the process is killed where it gives back what it had got.
#[tokio::test]
async fn a_kill_while_a_journal_that_could_not_grow_is_cut_keeps_what_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    if !can_trace() {
        return;
    }
    let mut killed = 0;
    for full in 1..=24 {
        let state = folder.path().join(full.to_string());
        std::fs::create_dir(&state).unwrap();
        let acks = state.join("acks");
        let child = Child::test("kills::child_that_is_killed").env("STATE_FOLDER", &state).env("ACKS", &acks);
        let child = child.inject("pwrite64", &format!("error=ENOSPC:when={full}")).inject("/^ftruncate", "signal=SIGKILL");
        let told = child.run();
        if told.text.contains("panicked") {
            // Another write than the growing one was refused, and the child says so.
            continue;
        }
        killed += usize::from(told.was_killed(&format!("full at {full}")));
        keeps_what_was_acknowledged(&state, &acks, &format!("full at {full}")).await;
    }
    assert!(killed > 0, "the journal never grew");
}

/// What a power cut takes is what was not synced: so everything that was acknowledged has to be, in the right order.
#[test]
fn all_that_is_acknowledged_was_synced_before_and_every_new_name_too() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let (state, acks, log) = (folder.join("state"), folder.join("acks"), folder.join("log"));
    let child = Child::test("kills::child_that_is_killed").env("STATE_FOLDER", &state).env("ACKS", &acks);
    child.log(syncs::CALLS, &log).run().passed("traced");
    let found = syncs::read(
        &std::fs::read_to_string(&log).unwrap(),
        &syncs::Rules {
            acks: acks.to_str().unwrap(),
            folder: state.to_str().unwrap(),
            // A copy for repairs: nothing that was acknowledged rests on it.
            free: |path| path.ends_with("run_state.json.prev"),
            grows: |path| path.ends_with(".journal"),
            behind_log: None,
        },
    );
    assert_eq!(found.wrong, Vec::<String>::new());
    assert!(found.acks == 12 && found.writes > 12 && found.renames > 4 && found.syncs > 12, "{found:?}");
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
    let cuts = power::cuts(&std::fs::read_to_string(&log).unwrap(), &state, &acks, |_| false);
    let last = cuts.last().unwrap();
    assert!(last.1 == 12 && cuts.len() > 100, "{} cuts, {} acknowledged", cuts.len(), last.1);
    for (how, acknowledged, tree) in cuts {
        let left = tempfile::tempdir().unwrap();
        power::lay(&tree, left.path());
        let backend = FileBackend::new(&options(left.path()));
        backend.initialize().await.unwrap_or_else(|error| panic!("{how}: {error}"));
        let run = backend.load_run(&run_id("run_1")).await.unwrap();
        let there = run.as_ref().map_or(0, RunState::node_count);
        let all_there = (0..acknowledged).all(|node| run.as_ref().unwrap().node(&format!("node_{node}")).is_some());
        assert!(all_there && there <= acknowledged + 1, "{how}: {there} of {acknowledged}");
    }
}

/// Opens, and so recovers, until it is killed.
#[tokio::test]
#[ignore = "it is run by another test, and killed"]
async fn child_that_recovers() {
    open(&PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap())).await;
}

/// A folder in which something is wrong that recovery sets aside, and what it sets aside.
struct Wreck {
    name: &'static str,
    folder: tempfile::TempDir,
    aside: Vec<u8>,
}

async fn wrecks() -> [Wreck; 3] {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "a", NodeUpdate::success(), 1).await;
    backend.checkpoint().await.unwrap();
    let early = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), early.path());
    for node in ["b", "c"] {
        set(&backend, "run_1", node, NodeUpdate::success(), 2).await;
        backend.checkpoint().await.unwrap();
    }
    set(&backend, "run_1", "d", NodeUpdate::success(), 3).await;
    let whole = std::fs::read(journal(folder.path())).unwrap();
    set(&backend, "run_1", "e", NodeUpdate::success(), 4).await;
    let wreck = |name, change: &dyn Fn(&Path) -> Vec<u8>| {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), copy.path());
        let aside = change(copy.path());
        Wreck { name, folder: copy, aside }
    };
    [
        wreck("torn", &|copy| {
            let mut bytes = std::fs::read(journal(copy)).unwrap();
            // Of the last frame there is all but its end.
            let first = (0..bytes.len()).find(|at| whole.get(*at) != bytes.get(*at)).unwrap();
            let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
            bytes[last - 8..=last].fill(0);
            std::fs::write(journal(copy), &bytes).unwrap();
            let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
            bytes[first..=last].to_vec()
        }),
        wreck("beside a restored document", &|copy| {
            std::fs::copy(document(early.path()), document(copy)).unwrap();
            std::fs::read(journal(copy)).unwrap()
        }),
        wreck("beside a document that somebody else rewrote", &|copy| {
            std::fs::write(document(copy), r#"{"version": "1.0.0", "nodes": {"x": {"status": "success"}}}"#).unwrap();
            std::fs::read(journal(copy)).unwrap()
        }),
    ]
}

/// Everything but versions: a run that is new here gets higher ones at every opening.
async fn content(backend: &FileBackend) -> Vec<String> {
    let of_run = |run: &RunState| {
        let nodes: Vec<String> =
            run.nodes().map(|(id, node)| format!("{id} {:?} {:?} {}", node.finished_at, node.extra, node.status)).collect();
        format!("{} {} {nodes:?}", run.id(), run.header().status)
    };
    all(backend).await.iter().map(of_run).collect()
}

#[tokio::test]
async fn a_kill_at_any_step_of_a_recovery_that_sets_something_aside_comes_to_the_same_end() {
    if !can_trace() {
        return;
    }
    let mut killed = 0;
    for wreck in wrecks().await {
        let copy = |of: &Path| {
            let copy = tempfile::tempdir().unwrap();
            copy_folder(of, copy.path());
            copy
        };
        let once = copy(wreck.folder.path());
        let end = content(&open(once.path()).await).await;
        for call in ["pwrite64", "fdatasync", "fsync", "/rename.*", "/unlink.*", "/link.*", "write"] {
            for when in 1.. {
                let place = format!("{}, {call} {when}", wreck.name);
                let state = copy(wreck.folder.path());
                let mut struck = false;
                for attempt in ["first", "second"] {
                    let child = Child::test("kills::child_that_recovers").env("STATE_FOLDER", state.path());
                    let told = child.inject(call, &format!("signal=SIGKILL:when={when}")).run();
                    if !told.was_killed(&format!("{place}, {attempt}")) {
                        break;
                    }
                    struck = true;
                    assert_eq!(content(&reader(state.path()).await).await, end, "{place}, {attempt}: read");
                }
                assert_eq!(content(&open(state.path()).await).await, end, "{place}");
                let holds = |name: &String| {
                    let bytes = std::fs::read(state.path().join(name)).unwrap();
                    bytes.windows(wreck.aside.len()).any(|part| part == wreck.aside)
                };
                let kept = names(state.path()).into_iter().filter(|name| name.contains(".journal.") && holds(name)).count();
                assert!(kept > 0, "{place}: what was set aside is there: {:?}", names(state.path()));
                if !struck {
                    break;
                }
                killed += 1;
                assert!(when < 40, "{place}: it ends");
            }
        }
    }
    assert!(killed > 12, "only {killed} were killed");
}

/// The bytes of a journal that is found may be in memory alone, where a sync before the crash had failed: what is acknowledged behind them rests on them.
#[tokio::test]
async fn what_was_replayed_is_written_and_synced_before_anything_rests_on_it() {
    if !can_trace() {
        return;
    }
    let (folder, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "a", NodeUpdate::success(), 1).await;
    let state = killed.path().canonicalize().unwrap().join("state");
    std::fs::create_dir(&state).unwrap();
    copy_folder(folder.path(), &state);
    let found = std::fs::read(journal(&state)).unwrap();
    let end = found.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let log = killed.path().join("log");
    let child = Child::test("kills::child_that_recovers").env("STATE_FOLDER", &state);
    child.log("pwrite64,fsync,fdatasync", &log).run().passed("traced");
    let log = std::fs::read_to_string(&log).unwrap();
    let of_journal = format!("{}>", journal(&state).display());
    let calls: Vec<&str> = log.lines().filter(|line| line.contains(&of_journal)).collect();
    let written = calls.iter().position(|call| call.contains(&format!(", {end}, 0) = {end}")));
    let written = written.unwrap_or_else(|| panic!("{end} bytes were replayed and not written: {calls:?}"));
    assert!(calls[written..].iter().any(|call| call.contains("sync(") && call.contains("= 0")), "{calls:?}");
    assert_eq!(all(&open(&state).await).await, all(&backend).await);
}
