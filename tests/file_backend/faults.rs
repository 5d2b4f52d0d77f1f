//! System calls that fail, and a disk that is full: what was acknowledged is there, what was refused is not.

use super::trace::{Child, can_limit, can_trace};
use super::*;

#[test]
fn a_full_disk_is_a_typed_error_and_service_goes_on_with_the_space() {
    if !can_limit() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // The nearest thing to a full disk: files may not grow beyond a size.
    let child = Child::test("faults::child_on_a_full_disk").env("STATE_FOLDER", folder.path());
    child.limit(format!("--fsize={}:unlimited", 3 << 20)).run().passed("full disk");
}

#[tokio::test]
#[ignore = "it is run by another test, under a limit"]
async fn child_on_a_full_disk() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let backend = open(&folder).await;
    create(&backend, "run_1", 0).await;
    let mut told = all(&backend).await;
    let mut error = None;
    for second in 1..200 {
        let update = NodeUpdate::running().metadata("text", "x".repeat(64 * 1024));
        let mutation =
            Mutation::SetNode { node: node_id(&format!("node_{}", second % 20)), update: Box::new(update), at: at(second) };
        let one = entry(vec![part("run_1", version(&backend, "run_1").await, vec![mutation])]);
        match backend.commit(Arc::new(Batch::new(vec![one]))).await {
            Ok(_) => told = all(&backend).await,
            Err(found) => {
                error = Some(found);
                break;
            }
        }
    }
    let error = error.expect("the limit was met");
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Full, false), "{error}");
    assert!(error.to_string().contains("space"), "{error}");
    assert_eq!(all(&backend).await, told, "the state is as it was");
    let killed = tempfile::tempdir().unwrap();
    copy_folder(&folder, killed.path());
    assert_eq!(all(&open(killed.path()).await).await, told, "so it is on the disk");
    let freed = std::process::Command::new("prlimit")
        .args(["--pid", &std::process::id().to_string(), "--fsize=unlimited"])
        .status()
        .unwrap();
    assert!(freed.success());
    set(&backend, "run_1", "after", NodeUpdate::success(), 999).await;
    let told = all(&backend).await;
    backend.close().await.unwrap();
    assert_eq!(all(&open(&folder).await).await, told);
}

/// How many writes the child under faults makes, each of them sent five times if it must be.
const WRITES: i64 = 30;

/// Writes, checkpoints and opens again; for running by hand under a tool that makes system calls fail. Whatever was acknowledged must be there, and
/// whatever was said not to be applied must not. It says what it came to, so that who runs it sees that this was anything.
#[tokio::test]
#[ignore = "it is run by another test, under faults"]
async fn child_under_faults() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let backend = FileBackend::new(&options(&folder));
    if let Err(error) = backend.initialize().await {
        eprintln!("open: {error}");
        return;
    }
    println!("opened");
    // Acknowledged, refused for good, or in doubt: by node.
    let mut known: std::collections::BTreeMap<String, Option<bool>> = std::collections::BTreeMap::new();
    let mut version = Version::NONE;
    for second in 0..WRITES {
        let node = format!("node_{second}");
        let mut mutations =
            vec![Mutation::SetNode { node: node_id(&node), update: Box::new(NodeUpdate::success()), at: at(second) }];
        if version == Version::NONE {
            mutations.insert(0, Mutation::Create { run: NewRun::running(), at: at(0) });
        }
        let batch = Arc::new(Batch::new(vec![entry(vec![part("run_1", version, mutations)])]));
        for _ in 0..5 {
            let answer = backend.commit(Arc::clone(&batch)).await;
            known.insert(
                node.clone(),
                match &answer {
                    Ok(answer) => Some(matches!(answer.outcomes[0], Outcome::Applied(_))),
                    Err(error) if error.is_unknown_outcome() => None,
                    Err(_) => Some(false),
                },
            );
            match answer {
                Ok(answer) => {
                    version = applied(&answer, 0).runs[0].after;
                    println!("acknowledged {node}");
                    break;
                }
                Err(error) => eprintln!("commit {second}: {error}"),
            }
        }
        if second % 7 == 6
            && let Err(error) = backend.checkpoint().await
        {
            eprintln!("checkpoint: {error}");
        }
    }
    let told = backend.load_run(&run_id("run_1")).await.unwrap();
    let copy = tempfile::tempdir().unwrap();
    copy_folder(&folder, copy.path());
    let check = |run: Option<RunState>, what: &str| {
        for (node, known) in &known {
            let is_there = run.as_ref().is_some_and(|run| run.node(node).is_some());
            assert!(known.is_none_or(|known| known == is_there), "{what}: {node}: told {known:?}, there {is_there}");
        }
    };
    check(told, "in memory");
    let killed = reader(copy.path()).await;
    check(killed.load_run(&run_id("run_1")).await.unwrap(), "after a kill");
    if let Err(error) = backend.close().await {
        eprintln!("close: {error}");
    }
    let seen = reader(&folder).await;
    check(seen.load_run(&run_id("run_1")).await.unwrap(), "after a close");
}

#[test]
fn system_calls_that_fail_lose_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    if !can_trace() {
        return;
    }
    let mut place = 0;
    for (call, error) in [
        ("fdatasync", "EIO"),
        ("fsync", "EIO"),
        ("pwrite64", "EIO"),
        ("pwrite64", "ENOSPC"),
        ("/rename.*", "EACCES"),
        ("/link.*", "EPERM"),
    ] {
        let (mut met, mut opened) = (0, 0);
        for when in ["1", "2", "3", "5", "9", "14", "3+2", "6+"] {
            place += 1;
            let what = format!("{call} {error} when {when}");
            let (state, log) = (folder.path().join(place.to_string()), folder.path().join(format!("{place}.log")));
            std::fs::create_dir(&state).unwrap();
            let child = Child::test("faults::child_under_faults").env("STATE_FOLDER", &state).log(call, &log);
            let told = child.inject(call, &format!("error={error}:when={when}")).run();
            told.passed(&what);
            let failed = std::fs::read_to_string(&log).unwrap().matches("(INJECTED)").count();
            let acknowledged = told.after("acknowledged ").len();
            met += usize::from(failed > 0);
            if told.after("opened").is_empty() {
                assert!(failed > 0, "{what}: it did not open, and nothing had failed: {}", told.text);
                continue;
            }
            opened += 1;
            // A call that fails once keeps no write out for good.
            if !when.contains('+') {
                assert_eq!(acknowledged, usize::try_from(WRITES).unwrap(), "{what}, {failed} calls failed: {}", told.text);
            }
        }
        assert!(met >= 3 && opened >= 3, "{call} {error}: of eight children {met} met the fault, and {opened} opened the state");
    }
}

/// Commits while no sync of the journal succeeds: what is acknowledged stands in a document that was synced as a whole.
#[tokio::test]
#[ignore = "it is run by another test, under strace"]
async fn child_whose_journal_cannot_be_synced() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let backend = open(&folder).await;
    create(&backend, "run_1", 0).await;
    for number in 0..3 {
        let node = format!("node_{number}");
        set(&backend, "run_1", &node, NodeUpdate::success(), 1).await;
        let text = std::fs::read_to_string(document(&folder)).unwrap();
        assert!(text.contains(&node), "{node} was acknowledged, and only the journal whose sync failed has it");
    }
}

#[test]
fn what_a_failed_sync_left_in_the_journal_is_not_acknowledged_from_there() {
    let folder = tempfile::tempdir().unwrap();
    if !can_trace() {
        return;
    }
    let child = Child::test("faults::child_whose_journal_cannot_be_synced").env("STATE_FOLDER", folder.path());
    child.inject("fdatasync", "error=EIO:when=1+").run().passed("no sync");
}

/// Commits while writes of the journal fail, says what was acknowledged, and dies without closing.
#[tokio::test]
#[ignore = "it is run by another test, under strace"]
async fn child_that_dies_after_failed_writes() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let backend = Arc::new(FileBackend::new(&options(&folder)));
    let state = seeknal_state::Coordinator::open(backend).await.unwrap();
    while state.create_run("run_1", NewRun::running()).await.is_err() {}
    for number in 0..6 {
        let node = format!("node_{number}");
        if state.set_node_state("run_1", &node, NodeUpdate::success()).await.is_ok() {
            println!("acknowledged {node}");
        }
    }
    std::process::abort();
}

#[tokio::test]
async fn what_was_acknowledged_after_a_failed_write_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    if !can_trace() {
        return;
    }
    let mut acknowledged = 0;
    for when in 1..=12 {
        let state = folder.path().join(when.to_string());
        std::fs::create_dir(&state).unwrap();
        let child = Child::test("faults::child_that_dies_after_failed_writes").env("STATE_FOLDER", &state);
        let told = child.inject("pwrite64", &format!("error=EIO:when={when}")).run();
        let backend = open(&state).await;
        let run = backend.load_run(&run_id("run_1")).await.unwrap();
        for node in told.after("acknowledged ") {
            acknowledged += 1;
            let there = run.as_ref().is_some_and(|run| run.node(&node).is_some());
            assert!(there, "write {when} of the journal failed, and {node}, which was acknowledged, is gone");
        }
    }
    assert!(acknowledged >= 48, "the child did not get far: {acknowledged}");
}

/// A lock that was removed keeps nobody out.
#[tokio::test]
async fn a_writer_whose_lock_is_taken_away_writes_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    let one = open(folder.path()).await;
    create(&one, "run_1", 0).await;
    std::fs::remove_file(folder.path().join("run_state.json.lock")).unwrap();
    let two = open(folder.path()).await;
    assert_eq!(all(&two).await.len(), 1);
    let refused = || async {
        let mutation = Mutation::SetNode { node: node_id("n"), update: Box::new(NodeUpdate::running()), at: at(1) };
        let entries = vec![entry(vec![part("run_1", version(&one, "run_1").await, vec![mutation])])];
        one.commit(Arc::new(Batch::new(entries))).await.unwrap_err()
    };
    for _ in 0..2 {
        let error = refused().await;
        assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Poisoned, false), "{error}");
        assert!(error.to_string().contains("run_state.json.lock was removed"), "{error}");
    }
    set(&two, "run_1", "n", NodeUpdate::success(), 2).await;
    assert!(one.close().await.is_err());
    let told = all(&two).await;
    two.close().await.unwrap();
    assert_eq!(all(&open(folder.path()).await).await, told);
}

/// What it notes of leases would lie over the first record of the writer after it, and it would remove that one's journal when it closes.
#[tokio::test]
async fn a_writer_whose_lock_is_taken_away_spares_the_journal_of_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let one = open(folder.path()).await;
    create(&one, "run_1", 0).await;
    one.checkpoint().await.unwrap();
    hold(&one);
    let noted = || String::from_utf8_lossy(&std::fs::read(journal(folder.path())).unwrap_or_default()).contains("\"task\"");
    wait_for(async || noted()).await;
    std::fs::remove_file(folder.path().join("run_state.json.lock")).unwrap();
    let two = open(folder.path()).await;
    set(&two, "run_1", "a", NodeUpdate::success(), 1).await;
    set(&two, "run_1", "b", NodeUpdate::success(), 2).await;
    let told = all(&two).await;
    book(&one).remove(&LeaseKey::run(run_id("run_1")), FencingToken(3));
    // With nothing to write it is refused only once the writer has seen, by itself, that it must not note that.
    wait_for(async || one.checkpoint().await.is_err()).await;
    let error = one.reserve_tokens(1).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Poisoned, "{error}");
    assert_eq!(one.close().await.unwrap_err().kind(), StoreErrorKind::Poisoned);
    assert_eq!(all_after_a_kill(folder.path()).await, told);
}

/// With nothing to note it finds out when it closes.
#[tokio::test]
async fn a_writer_whose_lock_is_taken_away_removes_no_journal_when_it_closes() {
    let folder = tempfile::tempdir().unwrap();
    let one = open(folder.path()).await;
    create(&one, "run_1", 0).await;
    one.checkpoint().await.unwrap();
    std::fs::remove_file(folder.path().join("run_state.json.lock")).unwrap();
    let two = open(folder.path()).await;
    set(&two, "run_1", "a", NodeUpdate::success(), 1).await;
    assert_eq!(one.close().await.unwrap_err().kind(), StoreErrorKind::Poisoned);
    assert!(journal(folder.path()).exists());
    assert_eq!(all_after_a_kill(folder.path()).await, all(&two).await);
}

#[tokio::test]
async fn what_is_acknowledged_after_the_journal_was_removed_is_in_the_document() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "a", NodeUpdate::running(), 1).await;
    std::fs::remove_file(folder.path().join("run_state.json.journal")).unwrap();
    set(&backend, "run_1", "b", NodeUpdate::running(), 2).await;
    set(&backend, "run_1", "c", NodeUpdate::running(), 3).await;
    let told = all(&backend).await;
    assert_eq!(all_after_a_kill(folder.path()).await, told);
    backend.close().await.unwrap();
    assert_eq!(all(&open(folder.path()).await).await, told);
}

/// Files may not grow beyond the length that the document has: it finds no room, and the journals need not keep theirs.
#[tokio::test]
#[ignore = "it is run by another test, under a limit that it sets"]
async fn child_whose_document_finds_no_room() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let limit = |bytes: &str| {
        let pid = std::process::id().to_string();
        let limited = std::process::Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:unlimited")]).status();
        assert!(limited.unwrap().success());
    };
    let backend = open(&folder).await;
    create(&backend, "run_1", 0).await;
    for second in 1..=24 {
        let update = NodeUpdate::success().metadata("text", "x".repeat(64 * 1024));
        set(&backend, "run_1", &format!("node_{second}"), update, second).await;
    }
    backend.checkpoint().await.unwrap();
    set(&backend, "run_1", "before", NodeUpdate::success(), 50).await;
    let length = |end: &str| std::fs::metadata(folder.join(format!("run_state.json{end}"))).unwrap().len();
    assert!(length(".journal") > 1 << 20, "space is kept ready");
    limit("1048576");
    set(&backend, "run_1", "a", NodeUpdate::success(), 51).await;
    let error = backend.checkpoint().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Full, "{error}");
    for journal in [".journal", ".journal.next"] {
        assert!(length(journal) <= 8192, "{journal} keeps {} bytes that the document could have", length(journal));
    }
    // What is there is whole, and the writer goes on.
    set(&backend, "run_1", "b", NodeUpdate::success(), 52).await;
    let told = all(&backend).await;
    limit("unlimited");
    assert_eq!(all_after_a_kill(&folder).await, told);
    backend.checkpoint().await.unwrap();
    set(&backend, "run_1", "c", NodeUpdate::success(), 53).await;
    let told = all(&backend).await;
    assert_eq!(all_after_a_kill(&folder).await, told);
    backend.close().await.unwrap();
    assert_eq!(all(&open(&folder).await).await, told);
}

#[test]
fn space_that_is_kept_ready_is_given_back_where_the_document_finds_none() {
    if !can_limit() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let child = Child::test("faults::child_whose_document_finds_no_room").env("STATE_FOLDER", folder.path());
    child.limit("--fsize=unlimited:unlimited".to_owned()).run().passed("no room");
}
