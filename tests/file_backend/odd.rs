//! Odd things in the folder: numbers that are none of ours, files that are no files, links, folders that were not there.

use super::trace::{Child, can_trace};
use super::*;
use seeknal_state::store::StoreError;

async fn refused(folder: &Path) -> String {
    for read_only in [true, false] {
        let opened = FileBackend::new(&options(folder).read_only(read_only)).initialize().await;
        if read_only && opened.is_ok() {
            continue;
        }
        return opened.unwrap_err().to_string();
    }
    unreachable!()
}

#[tokio::test]
async fn numbers_that_would_soon_be_used_up_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    let sound = std::fs::read_to_string(document(folder.path())).unwrap();
    let lock = folder.path().join("run_state.json.lock");
    let held = std::fs::read(&lock).unwrap();
    for key in ["last_seq", "run_version", "created_version"] {
        let at = sound.find(&format!("\"{key}\": ")).unwrap() + key.len() + 4;
        let end = at + sound[at..].find(|c: char| !c.is_ascii_digit()).unwrap();
        let text = format!("{}{}{}", &sound[..at], u64::MAX - 1, &sound[end..]);
        std::fs::write(document(folder.path()), &text).unwrap();
        let told = refused(folder.path()).await;
        assert!(told.contains("18446744073709551614") && told.contains("line "), "{key}: {told}");
        assert_eq!(std::fs::read_to_string(document(folder.path())).unwrap(), text);
    }
    std::fs::write(document(folder.path()), &sound).unwrap();
    std::fs::write(&lock, format!("{{\"token\":5,\"seq\":{}}}", u64::MAX)).unwrap();
    let told = refused(folder.path()).await;
    assert!(told.contains(".lock") && told.contains("18446744073709551615"), "{told}");
    std::fs::write(&lock, b"\xff\xfe\x80").unwrap();
    let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
    std::fs::write(&lock, held).unwrap();
    set(&open(folder.path()).await, "run_1", "n", NodeUpdate::success(), 1).await;
}

/// Nothing is answered under a number that would not be read again.
#[tokio::test]
async fn numbers_that_are_used_up_are_refused_before_they_are_given_out() {
    const HIGHEST: u64 = 1 << 62;
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    let lock = folder.path().join("run_state.json.lock");
    std::fs::write(&lock, format!("{{\"token\":{},\"seq\":{}}}", HIGHEST - 2, HIGHEST - 2)).unwrap();
    let backend = open(folder.path()).await;
    assert_eq!(backend.reserve_tokens(1).await.unwrap().end, HIGHEST);
    assert_eq!(backend.reserve_tokens(2).await.unwrap_err().kind(), StoreErrorKind::Input);
    assert_eq!(backend.reserve_tokens(1).await.unwrap().start, HIGHEST);
    let mut refused = None;
    for second in 1..5 {
        let version = version(&backend, "run_1").await;
        let mutation = Mutation::SetNode { node: node_id("n"), update: Box::new(NodeUpdate::running()), at: at(second) };
        let batch = Batch::new(vec![entry(vec![part("run_1", version, vec![mutation])])]);
        refused = backend.commit(Arc::new(batch)).await.err();
        if refused.is_some() {
            break;
        }
    }
    let error = refused.unwrap();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Input, false), "{error}");
    let told = all(&backend).await;
    assert_eq!(all_after_a_kill(folder.path()).await, told);
    backend.close().await.unwrap();
    assert_eq!(all(&open(folder.path()).await).await, told);
}

#[tokio::test]
async fn a_journal_that_was_cut_in_its_header_is_not_taken_for_empty() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "n", NodeUpdate::success(), 1).await;
    for length in [1, 300, 511] {
        let crashed = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), crashed.path());
        let cut = std::fs::read(journal(crashed.path())).unwrap()[..length].to_vec();
        std::fs::write(journal(crashed.path()), &cut).unwrap();
        let told = refused(crashed.path()).await;
        assert!(told.contains(&format!("cut to {length} bytes")) && told.contains("--repair"), "{told}");
        let report = reader_unopened(crashed.path()).verify().await.unwrap();
        assert!(!report.is_sound(), "{length}");
        assert_eq!(std::fs::read(journal(crashed.path())).unwrap(), cut, "it was left as it is");
        repair(crashed.path(), at(0), false).unwrap();
        open(crashed.path()).await.close().await.unwrap();
        assert!(names(crashed.path()).iter().any(|name| name.contains(".journal.damaged-")), "{length}");
    }
    // Of a journal that was just being made there may be nothing but zeros.
    let made = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), made.path());
    std::fs::write(journal(made.path()), [0; 300]).unwrap();
    open(made.path()).await.close().await.unwrap();
}

#[tokio::test]
async fn a_lost_journal_is_told_and_no_version_comes_twice() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    let backend = open(folder.path()).await;
    set(&backend, "run_1", "n", NodeUpdate::success(), 1).await;
    let used = backend.load_run(&run_id("run_1")).await.unwrap().unwrap().version();
    for emptied in [None, Some(&[0_u8; 4096][..]), Some(&[])] {
        let crashed = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), crashed.path());
        match emptied {
            None => std::fs::remove_file(journal(crashed.path())).unwrap(),
            Some(bytes) => std::fs::write(journal(crashed.path()), bytes).unwrap(),
        }
        let told = "did not close the state, and its journal is missing or empty";
        let report = reader_unopened(crashed.path()).verify().await.unwrap();
        assert!(report.checked.iter().any(|line| line.contains(told)), "{:?}", report.checked);
        let (backend, notices) = open_told(crashed.path()).await;
        assert!(notices.iter().any(|notice| notice.contains(told)), "{notices:?}");
        let run = backend.load_run(&run_id("run_1")).await.unwrap().unwrap();
        assert!(run.node("n").is_none() && run.version() > used, "{} after {used}", run.version());
        // Once told, it is over.
        backend.close().await.unwrap();
        let (_, notices) = open_told(crashed.path()).await;
        assert!(!notices.iter().any(|notice| notice.contains(told)), "{notices:?}");
    }
    // Nor of one that wrote nothing before it was killed: it had not made a journal.
    let idle = tempfile::tempdir().unwrap();
    let first = open(idle.path()).await;
    create(&first, "run_1", 0).await;
    first.close().await.unwrap();
    let _second = open(idle.path()).await;
    let crashed = tempfile::tempdir().unwrap();
    copy_folder(idle.path(), crashed.path());
    let report = reader_unopened(crashed.path()).verify().await.unwrap();
    assert!(!report.checked.iter().any(|line| line.contains("did not close")), "{:?}", report.checked);
    assert_eq!(open_told(crashed.path()).await.1, Vec::<String>::new());
    // A writer that is killed leaves its journal, and nothing of this is said.
    let crashed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), crashed.path());
    let (_, notices) = open_told(crashed.path()).await;
    assert!(notices.is_empty(), "{notices:?}");
}

#[tokio::test]
async fn a_damaged_lock_file_is_repaired_and_tokens_go_on_far_behind() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    let lock = folder.path().join("run_state.json.lock");
    let sound = std::fs::read_to_string(&lock).unwrap();
    let damaged = [sound.replacen("\"seq\"", "\"se", 1), "}".repeat(2000), format!("{{\"token\":{}", 1_u64 << 50)];
    for (damaged, least) in damaged.iter().zip([1_u64 << 40, 1 << 40, 1 << 50]) {
        std::fs::write(&lock, damaged).unwrap();
        let report = reader_unopened(folder.path()).verify().await.unwrap();
        assert!(report.problems.iter().any(|problem| problem.contains("--repair")), "{:?}", report.problems);
        assert!(refused(folder.path()).await.contains("--repair"));
        let done = repair(folder.path(), at(0), false).unwrap();
        assert!(done.len() == 1 && done[0].contains("tokens") && done[0].contains(".lock.damaged-"), "{done:?}");
        assert!(names(folder.path()).iter().any(|name| {
            name.starts_with("run_state.json.lock.damaged-")
                && std::fs::read_to_string(folder.path().join(name)).unwrap() == *damaged
        }));
        assert!(reader_unopened(folder.path()).verify().await.unwrap().is_sound());
        let backend = open(folder.path()).await;
        assert!(backend.highest_token().await.unwrap() >= least);
        backend.close().await.unwrap();
        assert_eq!(repair(folder.path(), at(0), false).unwrap(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn two_links_to_one_document_have_one_writer() {
    let (shared, one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for folder in [&one, &two] {
        std::os::unix::fs::symlink(document(shared.path()), document(folder.path())).unwrap();
    }
    let first = open(one.path()).await;
    create(&first, "run_1", 0).await;
    for other in [two.path(), shared.path()] {
        let error = FileBackend::new(&options(other)).initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Busy, "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "it says who: {error}");
    }
    let tokens = first.reserve_tokens(5).await.unwrap();
    first.close().await.unwrap();
    let second = open(two.path()).await;
    set(&second, "run_1", "n", NodeUpdate::success(), 1).await;
    assert!(second.reserve_tokens(1).await.unwrap().start >= tokens.end, "tokens rise over both");
    second.close().await.unwrap();
    for folder in [&one, &two] {
        assert!(document(folder.path()).symlink_metadata().unwrap().is_symlink());
    }
    assert!(open(shared.path()).await.load_run(&run_id("run_1")).await.unwrap().unwrap().node("n").is_some());
}

#[tokio::test]
async fn a_link_that_is_replaced_is_noticed_and_loses_no_history() {
    let (elsewhere, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::os::unix::fs::symlink(document(elsewhere.path()), document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let tokens = backend.reserve_tokens(3).await.unwrap();
    backend.checkpoint().await.unwrap();
    // Another program saves over the name, as most do.
    std::fs::write(folder.path().join("new"), r#"{"run_id": "theirs", "nodes": {"x": {"status": "success"}}}"#).unwrap();
    std::fs::rename(folder.path().join("new"), document(folder.path())).unwrap();
    create_refused(&backend).await;
    drop(backend);
    let (again, _) = open_told(folder.path()).await;
    let runs: Vec<String> = all(&again).await.iter().map(|run| run.id().to_string()).collect();
    assert_eq!(runs, ["theirs", "run_1"]);
    assert!(again.reserve_tokens(1).await.unwrap().start >= tokens.end);
}

/// A checkpoint finds that the document is another one.
async fn create_refused(backend: &FileBackend) {
    create(backend, "late", 1).await;
    let error = backend.checkpoint().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Poisoned, "{error}");
}

#[tokio::test]
async fn a_document_that_moves_behind_a_link_keeps_its_tokens() {
    let (elsewhere, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let tokens = backend.reserve_tokens(3).await.unwrap();
    backend.close().await.unwrap();
    std::fs::rename(document(folder.path()), document(elsewhere.path())).unwrap();
    std::os::unix::fs::symlink(document(elsewhere.path()), document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    assert!(backend.load_run(&run_id("run_1")).await.unwrap().is_some());
    assert!(backend.reserve_tokens(1).await.unwrap().start >= tokens.end);
}

#[tokio::test]
async fn the_journal_of_a_document_that_is_not_to_be_written_by_hand_can_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    std::fs::set_permissions(document(folder.path()), std::fs::Permissions::from_mode(0o444)).unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_2", 1).await;
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(journal(folder.path())), 0o644);
    backend.close().await.unwrap();
    assert_eq!(mode(document(folder.path())), 0o444);
}

#[tokio::test]
async fn what_is_no_plain_file_is_refused_or_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join(".run_state.json.tmp-x")).unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    assert!(folder.path().join(".run_state.json.tmp-x").is_dir(), "a folder is none of ours");
    let pipe = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("mkfifo").arg(document(pipe.path())).status().unwrap();
    assert!(made.success());
    let told = refused(pipe.path()).await;
    assert!(told.contains("no plain file"), "{told}");
}

type Work = Box<dyn Fn(&Path) -> Result<(), StoreError> + Send>;

/// Whoever opens a pipe waits for its other end.
#[test]
fn nobody_waits_for_a_pipe_in_the_place_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let run = |work: Work, folder: &Path| {
        let (folder, (sender, answer)) = (folder.to_owned(), std::sync::mpsc::channel());
        // Not waited for: it would never end.
        std::thread::spawn(move || sender.send(work(&folder)));
        answer.recv_timeout(std::time::Duration::from_secs(30)).expect("it hangs")
    };
    let opened = |read_only: bool| {
        move |folder: &Path| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let backend = FileBackend::new(&options(folder).read_only(read_only));
                backend.initialize().await?;
                backend.load_run(&run_id("run_1")).await.map(drop)
            })
        }
    };
    for end in ["", ".lock", ".journal", ".journal.next", ".prev"] {
        let name = format!("run_state.json{end}");
        let place = folder.path().join(&name);
        std::fs::create_dir(&place).unwrap();
        let place = place.join(&name);
        assert!(std::process::Command::new("mkfifo").arg(&place).status().unwrap().success());
        let folder = place.parent().unwrap();
        let works: [(&str, Work); 3] = [
            ("reading", Box::new(opened(true))),
            ("writing", Box::new(opened(false))),
            ("repair", Box::new(|folder| repair(folder, at(0), false).map(drop))),
        ];
        for (what, work) in works {
            if let Err(error) = run(work, folder) {
                let told = error.to_string();
                assert_eq!(error.kind(), StoreErrorKind::Input, "{what} of {name}: {told}");
                assert!(told.contains(&name) && told.contains("no plain file"), "{what} of {name}: {told}");
            }
        }
    }
}

#[tokio::test]
async fn a_checkpoint_that_cannot_come_any_more_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let backend = Arc::new(open(folder.path()).await);
    create(&backend, "run_1", 0).await;
    let ask = || {
        let backend = Arc::clone(&backend);
        tokio::spawn(async move { backend.checkpoint().await })
    };
    let first = ask();
    set(&backend, "run_1", "n", NodeUpdate::success(), 1).await;
    let second = ask();
    std::fs::remove_file(folder.path().join("run_state.json.lock")).unwrap();
    let error = backend.commit(Arc::new(Batch::new(vec![entry(vec![])]))).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Poisoned);
    let both = async { (first.await, second.await) };
    let answered = tokio::time::timeout(std::time::Duration::from_secs(30), both).await;
    assert!(answered.is_ok(), "both are told");
}

/// Opens, and so makes the folder.
#[tokio::test]
#[ignore = "it is run by another test, and watched"]
async fn child_that_makes_its_folder() {
    create(&open(&PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap())).await, "run_1", 0).await;
}

#[test]
fn the_names_of_folders_that_are_made_are_synced() {
    if !can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    let (state, log) = (root.join("project").join("target"), root.join("log"));
    let child = Child::test("odd::child_that_makes_its_folder").env("STATE_FOLDER", &state);
    child.log("mkdirat,fsync,fdatasync", &log).run().passed("traced");
    let log = std::fs::read_to_string(&log).unwrap();
    let place = |what: String| log.find(&what).unwrap_or_else(|| panic!("{what} is missing: {log}"));
    let made = place("\"target\"".to_owned());
    for parent in [state.parent().unwrap(), &root] {
        let synced = log[made..].find(&format!("<{}>)", parent.display()));
        assert!(synced.is_some(), "{} is synced after it got a new name: {log}", parent.display());
    }
}

#[tokio::test]
async fn tokens_rise_also_where_the_lock_file_was_emptied_or_removed() {
    for emptied in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let backend = open(folder.path()).await;
        create(&backend, "run_1", 0).await;
        let tokens = backend.reserve_tokens(1000).await.unwrap();
        backend.close().await.unwrap();
        let lock = folder.path().join("run_state.json.lock");
        if emptied {
            std::fs::write(&lock, [0; 512]).unwrap();
        } else {
            std::fs::remove_file(&lock).unwrap();
        }
        let (backend, notices) = open_told(folder.path()).await;
        assert!(notices.iter().any(|notice| notice.contains("tokens go on behind")), "{notices:?}");
        assert!(backend.reserve_tokens(1).await.unwrap().start >= tokens.end);
        set(&backend, "run_1", "n", NodeUpdate::success(), 1).await;
        backend.close().await.unwrap();
        let (backend, notices) = open_told(folder.path()).await;
        assert_eq!(notices, Vec::<String>::new(), "once");
        backend.close().await.unwrap();
    }
}

/// The document is gone: whoever goes on with another state is told, and `verify` calls it a problem.
#[tokio::test]
async fn a_document_that_was_lost_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    std::fs::remove_file(document(folder.path())).unwrap();
    let runner = |folder: &Path| {
        std::fs::create_dir_all(folder.join("state")).unwrap();
        std::fs::write(folder.join("state/execution_state.json"), r#"{"n": {"status": "success"}}"#).unwrap();
    };
    for (with_previous, with_runner) in [(true, true), (true, false), (false, true), (false, false)] {
        let place = format!("previous {with_previous}, the runner's {with_runner}");
        let copy = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), copy.path());
        if !with_previous {
            std::fs::remove_file(copy.path().join("run_state.json.prev")).unwrap();
        }
        if with_runner {
            runner(copy.path());
        }
        let told = if with_previous { "run_state.json.prev" } else { "run_state.json.lock tells of" };
        let tells = |lines: &[String]| lines.iter().any(|line| line.contains("run_state.json is missing") && line.contains(told));
        let report = reader_unopened(copy.path()).verify().await.unwrap();
        // Only the copy proves it: a writer may have been ended before it had a document.
        assert_eq!((tells(&report.problems), tells(&report.checked)), (with_previous, !with_previous), "{place}: {report:?}");
        let seen = reader_unopened(copy.path()).initialize().await.unwrap();
        assert!(tells(&seen.notices), "{place}: {:?}", seen.notices);
        if with_previous {
            let brought = tempfile::tempdir().unwrap();
            copy_folder(copy.path(), brought.path());
            if with_runner {
                runner(brought.path());
            }
            repair(brought.path(), at(0), true).unwrap();
            assert_eq!(all(&open(brought.path()).await).await[0].id().as_str(), "run_1", "{place}");
        }
        let (backend, notices) = open_told(copy.path()).await;
        assert!(tells(&notices), "{place}: {notices:?}");
        create(&backend, "run_2", 0).await;
        backend.close().await.unwrap();
        assert!(reader_unopened(copy.path()).verify().await.unwrap().is_sound(), "{place}: told once, and gone on");
        assert!(!tells(&open_told(copy.path()).await.1), "{place}");
    }
    // Where there was no document yet, none is missed, however often it was opened.
    for with_runner in [true, false] {
        let fresh = tempfile::tempdir().unwrap();
        if with_runner {
            runner(fresh.path());
        }
        for time in ["first", "second"] {
            let (backend, notices) = open_told(fresh.path()).await;
            assert!(!notices.iter().any(|notice| notice.contains("is missing")), "{time}: {notices:?}");
            let refused = entry(vec![part("nowhere", Version(1), vec![Mutation::Delete { keep_coverage: true }])]);
            let answer = backend.commit(Arc::new(Batch::new(vec![refused]))).await.unwrap();
            assert!(matches!(answer.outcomes[0], Outcome::Refused(_)));
            backend.close().await.unwrap();
            let report = reader_unopened(fresh.path()).verify().await.unwrap();
            assert!(report.is_sound(), "{time}: {report:?}");
        }
    }
}

#[tokio::test]
async fn a_damaged_copy_beside_a_sound_document_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let told = all(&backend).await;
    backend.close().await.unwrap();
    let previous = folder.path().join("run_state.json.prev");
    std::fs::write(&previous, "{\"run_id\": ").unwrap();
    let problems = reader_unopened(folder.path()).verify().await.unwrap().problems;
    assert!(problems.len() == 1 && problems[0].contains("--repair` sets it aside"), "{problems:?}");
    let done = repair(folder.path(), at(0), false).unwrap();
    let is_told = done.len() == 1 && done[0].contains("run_state.json.prev.damaged-") && done[0].contains("takes its place");
    assert!(is_told, "{done:?}");
    let kept = names(folder.path()).into_iter().find(|name| name.starts_with("run_state.json.prev.damaged-")).unwrap();
    assert_eq!(std::fs::read_to_string(folder.path().join(kept)).unwrap(), "{\"run_id\": ");
    assert_eq!(std::fs::read(previous).unwrap(), std::fs::read(document(folder.path())).unwrap());
    assert!(reader_unopened(folder.path()).verify().await.unwrap().is_sound());
    assert_eq!(repair(folder.path(), at(0), false).unwrap(), Vec::<String>::new());
    assert_eq!(all(&open(folder.path()).await).await, told);
}

#[tokio::test]
async fn what_was_repaired_is_told_also_where_the_rest_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    std::fs::write(folder.path().join("run_state.json.lock"), "{\"token\":").unwrap();
    std::fs::write(document(folder.path()), "{\"nodes\": {").unwrap();
    let error = repair(folder.path(), at(0), false).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
    let text = error.to_string();
    assert!(text.contains("--use-previous") && text.contains("run_state.json.lock.damaged-"), "{text}");
}
