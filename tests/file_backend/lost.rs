//! What was acknowledged and is lost: by a repair, with a journal, behind a backup. Its versions are not given out a second time, whatever lies between.

use super::*;

/// How many tokens [`killed`] gave out.
const TOKENS: u64 = 1000;

/// How many records lie in its journal.
const SETS: usize = 8;

/// In which session a writer was killed: the first one's document was written before its first record, and tells of no number.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Session {
    First,
    Second,
}

/// A killed writer's folder, whose document has a journal that goes on from it; and the version that was given out last.
async fn killed() -> (tempfile::TempDir, Version) {
    killed_in(Session::Second).await
}

async fn killed_in(session: Session) -> (tempfile::TempDir, Version) {
    // A machine that kept the writer waiting for so long that it wrote a document in between: it is done again.
    for _ in 0..100 {
        let (killed, last) = killed_once(session).await;
        if holds_all(killed.path(), session) {
            return (killed, last);
        }
    }
    panic!("no journal held all that was set");
}

/// Whether one journal holds all that was set, and goes on from the document.
fn holds_all(folder: &Path, session: Session) -> bool {
    let path = journal(folder);
    // The first one holds its run too.
    let records = if session == Session::First { SETS + 1 } else { SETS };
    if !path.exists() || frames(&path).len() != records || names(folder).iter().any(|name| name.ends_with(".journal.next")) {
        return false;
    }
    let document = json(&document(folder));
    let header = String::from_utf8_lossy(&std::fs::read(&path).unwrap()[..512]).into_owned();
    header.contains(&format!("\"generation\":{}", document["seeknal_state"]["generation"]))
}

async fn killed_once(session: Session) -> (tempfile::TempDir, Version) {
    let folder = tempfile::tempdir().unwrap();
    let mut backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    if session == Session::Second {
        backend.close().await.unwrap();
        backend = open(folder.path()).await;
    }
    assert_eq!(backend.reserve_tokens(TOKENS).await.unwrap().end, TOKENS + 1);
    let mut last = Version::NONE;
    for second in (1..).take(SETS) {
        last = set(&backend, "run_1", "n", NodeUpdate::success(), second).await.runs[0].after;
    }
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    (killed, last)
}

/// Goes on, twice, and is killed in between; no version comes again.
async fn goes_on_behind(folder: &Path, last: Version, what: &str) {
    let backend = open(folder).await;
    if backend.load_run(&run_id("run_1")).await.unwrap().is_none() {
        // It was lost as a whole.
        create(&backend, "run_1", 19).await;
    }
    let next = set(&backend, "run_1", "next", NodeUpdate::success(), 20).await;
    assert!(next.runs[0].after > last, "{what}: {:?} was used up to {last}", next.runs[0]);
    let told = all(&backend).await;
    assert_eq!(all_after_a_kill(folder).await, told, "{what}");
    backend.checkpoint().await.unwrap();
    backend.close().await.unwrap();
    // And it is over: nothing more is passed over.
    let backend = open(folder).await;
    assert_eq!(all(&backend).await, told, "{what}");
    let again = set(&backend, "run_1", "next", NodeUpdate::success(), 21).await;
    assert_eq!(again.runs[0].before, next.runs[0].after, "{what}");
    backend.close().await.unwrap();
    let report = reader_unopened(folder).verify().await.unwrap();
    assert!(report.is_sound(), "{what}: {:?}", report.problems);
}

/// An opening that writes nothing, as `seeknal state cleanup` is one.
async fn idle(folder: &Path) {
    open(folder).await.close().await.unwrap();
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn shorten(path: &Path, length: usize) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..length]).unwrap();
}

/// Where the frames of a journal begin.
fn frames(path: &Path) -> Vec<usize> {
    const SPACE: [u8; 4096] = [0; 4096];
    let bytes = std::fs::read(path).unwrap();
    let mut written = &*bytes;
    while let Some(before) = written.strip_suffix(&SPACE) {
        written = before;
    }
    written.windows(4).enumerate().filter(|(_, w)| *w == b"SKF1").map(|(at, _)| at).collect()
}

/// What a repair has to do with.
const DAMAGES: [&str; 9] = [
    "cut",
    "cut before its first record",
    "its last records damaged",
    "shortened to its first frames",
    "shortened to its header",
    "header",
    "shortened",
    "document",
    "document, without its journal",
];

fn damage(folder: &Path, what: &str) {
    let path = journal(folder);
    match what {
        "cut" => flip(&path, frames(&path)[3] + 40),
        "cut before its first record" => flip(&path, frames(&path)[0] + 40),
        // Behind them nothing whole tells how far they went, but for the space that is there.
        "its last records damaged" => {
            let frames = frames(&path);
            flip(&path, frames[3] + 40);
            frames[5..].iter().for_each(|frame| flip(&path, frame + 40));
        }
        "shortened to its first frames" => shorten(&path, frames(&path)[4] + 20),
        "shortened to its header" => shorten(&path, frames(&path)[0] + 20),
        "header" => flip(&path, 5),
        "shortened" => shorten(&path, 300),
        "document" => std::fs::write(document(folder), "{").unwrap(),
        _ => {
            std::fs::write(document(folder), "{").unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }
}

/// What may have become of the lock's file; the last is put back from an earlier time.
const LOCKS: [&str; 3] = ["removed", "emptied", "of before the first record"];

fn lose_lock(folder: &Path, how: &str) {
    let path = folder.join("run_state.json.lock");
    match how {
        "removed" => std::fs::remove_file(&path).unwrap(),
        "emptied" => std::fs::write(&path, "").unwrap(),
        "damaged" => std::fs::write(&path, r#"{"token":3,"se"#).unwrap(),
        _ => std::fs::write(&path, r#"{"token":3,"seq":0}"#).unwrap(),
    }
}

fn told_of_lock(line: &&String) -> bool {
    line.contains("run_state.json.lock") && line.contains("tokens go on behind")
}

/// Opens, and looks that the next token is none that was given out. Answers with what was told.
async fn opens_with_later_tokens(folder: &Path, what: &str) -> Vec<String> {
    let (backend, notices) = open_told(folder).await;
    let tokens = backend.reserve_tokens(1).await.unwrap();
    assert!(tokens.start > TOKENS, "{what}: tokens up to {TOKENS} were given out, {tokens:?} come next");
    backend.close().await.unwrap();
    notices
}

#[tokio::test]
async fn no_version_is_used_twice_after_a_repair() {
    for what in DAMAGES {
        for between in ["nothing", "an idle opening", "another repair"] {
            let (folder, last) = killed().await;
            damage(folder.path(), what);
            let what = format!("{what}, then {between}");
            let done = repair(folder.path(), at(0), what.starts_with("document")).unwrap();
            assert!(!done.is_empty(), "{what}");
            match between {
                "an idle opening" => idle(folder.path()).await,
                "another repair" => assert_eq!(repair(folder.path(), at(1), false).unwrap(), Vec::<String>::new(), "{what}"),
                _ => {}
            }
            goes_on_behind(folder.path(), last, &what).await;
        }
    }
}

#[tokio::test]
async fn no_token_and_no_version_is_used_twice_after_a_repair_that_finds_no_lock() {
    repairs_without_lock(Session::Second).await;
}

#[tokio::test]
async fn no_token_and_no_version_is_used_twice_after_a_repair_of_a_first_session_that_finds_no_lock() {
    repairs_without_lock(Session::First).await;
}

async fn repairs_without_lock(session: Session) {
    for what in DAMAGES {
        // One that is damaged is put right first, and does not tell either.
        for lock in LOCKS.into_iter().chain(["damaged"]) {
            let (folder, last) = killed_in(session).await;
            damage(folder.path(), what);
            lose_lock(folder.path(), lock);
            let what = format!("{what}, its lock {lock}");
            let done = repair(folder.path(), at(1_000_000), what.starts_with("document")).unwrap();
            let notices = opens_with_later_tokens(folder.path(), &what).await;
            assert_eq!(done.iter().chain(&notices).filter(told_of_lock).count(), 1, "{what}: {done:?}, {notices:?}");
            goes_on_behind(folder.path(), last, &what).await;
        }
    }
}

#[tokio::test]
async fn no_token_and_no_version_is_used_twice_after_an_opening_that_finds_no_lock() {
    for gone in ["nothing more", "its journal", "its document and its journal"] {
        for (lock, session) in LOCKS.into_iter().flat_map(|lock| [Session::First, Session::Second].map(|session| (lock, session)))
        {
            let (folder, last) = killed_in(session).await;
            lose_lock(folder.path(), lock);
            if gone != "nothing more" {
                std::fs::remove_file(journal(folder.path())).unwrap();
            }
            if gone == "its document and its journal" {
                std::fs::remove_file(document(folder.path())).unwrap();
            }
            let what = format!("its lock {lock}, and {gone} gone, {session:?} session");
            // The first one, which is idle, is told; what it found out is noted.
            let notices = opens_with_later_tokens(folder.path(), &what).await;
            assert_eq!(notices.iter().filter(told_of_lock).count(), 1, "{what}: {notices:?}");
            let (backend, notices) = open_told(folder.path()).await;
            assert_eq!(notices.iter().filter(told_of_lock).count(), 0, "{what}: {notices:?}");
            backend.close().await.unwrap();
            goes_on_behind(folder.path(), last, &what).await;
        }
    }
}

/// The number up to which versions are passed over tells how far they went where that of the records cannot be read.
#[tokio::test]
async fn no_version_is_used_twice_where_the_lock_that_a_repair_left_is_damaged() {
    for damaged in ["\"se", "no number"] {
        let (folder, last) = killed().await;
        damage(folder.path(), "shortened to its first frames");
        repair(folder.path(), at(0), false).unwrap();
        let lock = folder.path().join("run_state.json.lock");
        let left = std::fs::read_to_string(&lock).unwrap();
        assert!(left.contains("\"skip\":"), "{left}");
        if damaged == "no number" {
            // An older program, or a hand: it can be read.
            let value: serde_json::Value = serde_json::from_str(left.trim()).unwrap();
            std::fs::write(&lock, serde_json::json!({"token": value["token"], "seq": 0, "skip": value["skip"]}).to_string())
                .unwrap();
        } else {
            std::fs::write(&lock, left.replacen("\"seq\"", damaged, 1)).unwrap();
            let done = repair(folder.path(), at(1_000_000), false).unwrap();
            assert!(done.len() == 1 && done[0].contains(".lock.damaged-"), "{done:?}");
        }
        goes_on_behind(folder.path(), last, damaged).await;
    }
}

#[tokio::test]
async fn a_damaged_copy_is_made_anew_and_no_token_is_used_twice_where_nothing_else_tells_of_any() {
    let (folder, _) = killed().await;
    std::fs::remove_file(journal(folder.path())).unwrap();
    std::fs::remove_file(folder.path().join("run_state.json.lock")).unwrap();
    std::fs::remove_file(document(folder.path())).unwrap();
    std::fs::write(document(folder.path()), r#"{"run_id": "theirs", "nodes": {"n": {"status": "success"}}}"#).unwrap();
    std::fs::write(folder.path().join("run_state.json.prev"), "{").unwrap();
    let done = repair(folder.path(), at(1_000_000), false).unwrap();
    assert!(done.iter().any(|line| line.contains("run_state.json.prev")), "{done:?}");
    let backend = open(folder.path()).await;
    let tokens = backend.reserve_tokens(1).await.unwrap();
    assert!(tokens.start > TOKENS, "tokens up to {TOKENS} were given out, {tokens:?} come next");
    backend.close().await.unwrap();
}

#[tokio::test]
async fn no_version_is_used_twice_after_an_opening_that_wrote_nothing() {
    for what in ["a lost journal", "an edited document"] {
        for between in [&["idle"][..], &["repair"], &["repair", "idle", "idle"]] {
            let (folder, last) = killed().await;
            if what == "a lost journal" {
                std::fs::remove_file(journal(folder.path())).unwrap();
            } else {
                let mut edited = json(&document(folder.path()));
                edited["status"] = "failed".into();
                std::fs::write(document(folder.path()), edited.to_string()).unwrap();
            }
            for step in between {
                if *step == "idle" {
                    idle(folder.path()).await;
                } else {
                    assert_eq!(repair(folder.path(), at(0), false).unwrap(), Vec::<String>::new(), "{what}: it is sound");
                }
            }
            goes_on_behind(folder.path(), last, &format!("{what}, {between:?}")).await;
        }
    }
}

#[tokio::test]
async fn a_repair_of_what_is_sound_leaves_the_name_of_who_was_killed() {
    let (folder, _) = killed().await;
    let lock = folder.path().join("run_state.json.lock");
    let before = std::fs::read(&lock).unwrap();
    assert_eq!(repair(folder.path(), at(0), false).unwrap(), Vec::<String>::new());
    assert_eq!(std::fs::read(&lock).unwrap(), before);
    std::fs::remove_file(journal(folder.path())).unwrap();
    let report = reader_unopened(folder.path()).verify().await.unwrap();
    assert!(report.checked.iter().any(|line| line.contains("did not close the state")), "{:?}", report.checked);
}

#[tokio::test]
async fn no_version_is_used_twice_after_document_and_journal_were_put_back_beside_a_newer_copy() {
    for between in ["nothing", "an idle opening", "a checkpoint", "a kill"] {
        let (folder, _) = killed().await;
        let kept = [document(folder.path()), journal(folder.path())].map(|path| (std::fs::read(&path).unwrap(), path));
        let backend = open(folder.path()).await;
        let mut last = Version::NONE;
        for second in 10..15 {
            last = set(&backend, "run_1", "lost", NodeUpdate::success(), second).await.runs[0].after;
        }
        backend.close().await.unwrap();
        for (bytes, path) in kept {
            std::fs::write(path, bytes).unwrap();
        }
        match between {
            "an idle opening" => {
                let (backend, notices) = open_told(folder.path()).await;
                assert!(notices.iter().any(|notice| notice.contains("put back")), "{notices:?}");
                assert!(version(&backend, "run_1").await > last);
                backend.close().await.unwrap();
            }
            "a checkpoint" => {
                let backend = open(folder.path()).await;
                backend.checkpoint().await.unwrap();
                drop(backend);
            }
            "a kill" => {
                let backend = open(folder.path()).await;
                let next = set(&backend, "run_1", "next", NodeUpdate::running(), 19).await;
                assert!(next.runs[0].before > last);
                assert_eq!(all_after_a_kill(folder.path()).await, all(&backend).await);
            }
            _ => {}
        }
        goes_on_behind(folder.path(), last, between).await;
        let orphans = names(folder.path()).into_iter().filter(|name| name.starts_with("run_state.json.prev.orphan-"));
        assert_eq!(orphans.count(), 1, "{between}: the newer document is kept: {:?}", names(folder.path()));
    }
}

/// The first document of a state is there before its first record; where that fails the lock tells of it all the same, and was not emptied.
#[tokio::test]
async fn a_first_record_that_could_not_be_written_is_no_lost_lock() {
    let folder = tempfile::tempdir().unwrap();
    let (backend, blocker) = (open(folder.path()).await, journal(folder.path()));
    std::fs::create_dir(&blocker).unwrap();
    let create = || vec![Mutation::Create { run: NewRun::running(), at: at(0) }];
    let batch = Batch::new(vec![entry(vec![part("run_1", Version::NONE, create())])]);
    backend.commit(Arc::new(batch)).await.unwrap_err();
    assert_eq!(json(&document(folder.path()))["seeknal_state"]["last_seq"], 0);
    backend.close().await.unwrap();
    std::fs::remove_dir(&blocker).unwrap();
    assert_eq!(open_told(folder.path()).await.1, Vec::<String>::new());
}
