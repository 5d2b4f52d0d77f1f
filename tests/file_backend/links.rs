//! One document that several paths lead to, and a journal that lies beside another one than that by which it is opened.

use super::*;

/// How many records lie in a killed writer's journal.
const RECORDS: usize = 5;

/// A folder `real` with a document, and two whose document is a link to it.
fn folders() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    make(root.path());
    root
}

fn make(root: &Path) {
    std::fs::create_dir(root.join("real")).unwrap();
    for link in ["one", "two"] {
        std::fs::create_dir(root.join(link)).unwrap();
        std::os::unix::fs::symlink("../real/run_state.json", document(&root.join(link))).unwrap();
    }
}

/// What a kill leaves: the files of this moment, which tell of where they lie now.
fn killed(root: &Path) -> tempfile::TempDir {
    let (copy, halves) = (folders(), [root.to_owned(), root.canonicalize().unwrap()]);
    for folder in ["real", "one", "two"] {
        for name in names(&root.join(folder)) {
            let (from, to) = (root.join(folder).join(&name), copy.path().join(folder).join(&name));
            if from.symlink_metadata().unwrap().is_symlink() {
                continue;
            }
            std::fs::copy(&from, &to).unwrap();
            if name == "run_state.json.lock" {
                let there = copy.path().canonicalize().unwrap();
                let mut text = std::fs::read_to_string(&from).unwrap();
                for half in &halves {
                    text = text.replace(half.to_str().unwrap(), there.to_str().unwrap());
                }
                std::fs::write(&to, text).unwrap();
            }
        }
    }
    copy
}

/// A writer that came by one path and was killed.
async fn killed_at(by: &str) -> (tempfile::TempDir, Version) {
    for _ in 0..100 {
        let root = folders();
        let backend = open(&root.path().join(by)).await;
        create(&backend, "run_1", 0).await;
        let mut last = Version::NONE;
        for second in 1..i64::try_from(RECORDS).unwrap() {
            last = set(&backend, "run_1", "n", NodeUpdate::success(), second).await.runs[0].after;
        }
        let copy = killed(root.path());
        let journal = journal(&copy.path().join(by));
        let bytes = std::fs::read(journal).unwrap_or_default();
        // A machine that kept it waiting had a document written in between.
        if bytes.windows(4).filter(|window| *window == b"SKF1").count() == RECORDS {
            return (copy, last);
        }
    }
    panic!("no journal held all that was set");
}

#[tokio::test]
async fn a_journal_beside_another_path_to_the_document_is_not_passed_over() {
    for by in ["real", "one"] {
        let (root, last) = killed_at(by).await;
        let (there, names_before) = (journal(&root.path().join(by)), names(&root.path().join(by)));
        let names_it = |told: &str| {
            told.contains(&format!("/{by}/run_state.json.journal"))
                && told.contains("5 record(s)")
                && told.contains("Open it there")
        };
        for other in ["real", "one", "two"].into_iter().filter(|other| *other != by) {
            let folder = root.path().join(other);
            let error = FileBackend::new(&options(&folder)).initialize().await.unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{by}, {other}: {error}");
            assert!(names_it(&error.to_string()), "{by}, {other}: {error}");
            let error = repair(&folder, at(0), true).unwrap_err();
            assert!(names_it(&error.to_string()), "{by}, {other}: {error}");
            let report = reader_unopened(&folder).verify().await.unwrap();
            assert!(report.problems.iter().any(|problem| names_it(problem)), "{by}, {other}: {report:?}");
            let seen = reader_unopened(&folder).initialize().await.unwrap();
            assert_eq!(seen.notices.iter().filter(|notice| names_it(notice)).count(), 1, "{by}, {other}: {:?}", seen.notices);
            assert!(!seen.notices.iter().any(|notice| notice.contains("is lost")), "{by}, {other}: {:?}", seen.notices);
        }
        assert_eq!(names(&root.path().join(by)), names_before);
        assert!(there.exists());
        // Opened there once, it is in the document.
        let backend = open(&root.path().join(by)).await;
        assert_eq!(version(&backend, "run_1").await, last);
        backend.close().await.unwrap();
        for other in ["real", "one", "two"] {
            let (backend, notices) = open_told(&root.path().join(other)).await;
            assert_eq!((version(&backend, "run_1").await, notices), (last, Vec::new()), "{by}, {other}");
            backend.close().await.unwrap();
            assert!(reader_unopened(&root.path().join(other)).verify().await.unwrap().is_sound(), "{by}, {other}");
        }
    }
}

/// The same where the document is gone, or was replaced, so that nothing goes on from it.
#[tokio::test]
async fn a_journal_beside_another_path_is_kept_whatever_became_of_the_document() {
    for by in ["real", "one"] {
        for what in ["gone", "another one", "its journal is damaged"] {
            let (root, _) = killed_at(by).await;
            let document = document(&root.path().join("real"));
            match what {
                "gone" => std::fs::remove_file(&document).unwrap(),
                "another one" => {
                    std::fs::write(&document, r#"{"run_id": "theirs", "nodes": {"n": {"status": "success"}}}"#).unwrap();
                }
                _ => {
                    let path = journal(&root.path().join(by));
                    let mut bytes = std::fs::read(&path).unwrap();
                    bytes[600] ^= 1;
                    std::fs::write(&path, bytes).unwrap();
                }
            }
            let error = FileBackend::new(&options(&root.path().join("two"))).initialize().await.unwrap_err();
            let told = error.to_string();
            assert!(told.contains(&format!("/{by}/run_state.json.journal")), "{by}, {what}: {told}");
        }
    }
}

/// Where that journal is gone too, or was renamed, the state is opened, and goes on behind what is lost.
#[tokio::test]
async fn who_comes_by_another_path_goes_on_behind_a_journal_that_is_gone() {
    for by in ["real", "one"] {
        let (root, last) = killed_at(by).await;
        let path = journal(&root.path().join(by));
        std::fs::rename(&path, path.with_extension("mine")).unwrap();
        let (backend, notices) = open_told(&root.path().join("two")).await;
        assert!(notices.iter().any(|notice| notice.contains("its journal is missing or empty")), "{by}: {notices:?}");
        let made = create(&backend, "run_1", 9).await;
        assert!(made.runs[0].after > last, "{by}: {made:?} was used up to {last}");
        backend.close().await.unwrap();
    }
}

#[tokio::test]
async fn who_reads_by_another_path_is_told_of_the_writer() {
    for by in ["real", "one"] {
        let root = folders();
        let backend = open(&root.path().join(by)).await;
        create(&backend, "run_1", 0).await;
        for other in ["real", "one", "two"] {
            let folder = root.path().join(other);
            let report = reader_unopened(&folder).verify().await.unwrap();
            let seen = reader_unopened(&folder).initialize().await.unwrap();
            let tells = |lines: &[String]| lines.iter().any(|line| line.contains("by another path that leads to it"));
            assert_eq!((tells(&seen.notices), tells(&report.checked)), (other != by, other != by), "{by}, {other}: {seen:?}");
            assert!(report.is_sound(), "{by}, {other}: {report:?}");
        }
        backend.close().await.unwrap();
        let lock = std::fs::read_to_string(root.path().join("real/run_state.json.lock")).unwrap();
        assert!(!lock.contains("through"), "{lock}");
    }
}

/// The lock is one line of a fixed length: a path that does not fit is left out.
#[tokio::test]
async fn a_long_path_does_not_make_the_lock_longer() {
    let root = folders();
    let deep = root.path().join("a".repeat(200)).join("b".repeat(200)).join("c".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    std::os::unix::fs::symlink(document(&root.path().join("real")), document(&deep)).unwrap();
    let backend = open(&deep).await;
    create(&backend, "run_1", 0).await;
    let lock = std::fs::read_to_string(root.path().join("real/run_state.json.lock")).unwrap();
    assert!(lock.len() == 512 && lock.contains("holder") && !lock.contains("through"), "{lock}");
    backend.close().await.unwrap();
    assert_eq!(open_told(&root.path().join("real")).await.1, Vec::<String>::new());
}

/// A close that could not write the document leaves records in its journal, as a kill does.
#[tokio::test]
async fn what_a_close_that_failed_left_beside_another_path_is_not_passed_over() {
    let root = folders();
    let backend = open(&root.path().join("one")).await;
    create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    let last = set(&backend, "run_1", "n", NodeUpdate::success(), 1).await.runs[0].after;
    // Where the document lies nothing can be written for a while.
    let (real, away) = (root.path().join("real"), root.path().join("away"));
    std::fs::rename(&real, &away).unwrap();
    backend.close().await.unwrap_err();
    std::fs::rename(&away, &real).unwrap();
    for other in ["two", "real"] {
        let error = FileBackend::new(&options(&root.path().join(other))).initialize().await.unwrap_err();
        assert!(error.to_string().contains("/one/run_state.json.journal"), "{other}: {error}");
    }
    let backend = open(&root.path().join("one")).await;
    assert_eq!(version(&backend, "run_1").await, last);
    backend.close().await.unwrap();
    let (backend, notices) = open_told(&root.path().join("two")).await;
    assert_eq!((version(&backend, "run_1").await, notices), (last, Vec::new()));
    backend.close().await.unwrap();
}

/// Journals of a writer that was killed while it changed over to the next one, a record that was torn before it was acknowledged, a journal without a record.
#[tokio::test]
async fn who_was_killed_at_another_path_with_nothing_unsaid_is_in_nobodys_way() {
    for what in ["changing over", "torn", "idle"] {
        let (root, mut last) = killed_at("real").await;
        let real = root.path().join("real");
        let before = std::fs::read(journal(&real)).unwrap();
        let root = if what == "torn" {
            let mut bytes = before;
            bytes[512 + 200..].fill(0);
            std::fs::write(journal(&real), bytes).unwrap();
            last = Version::NONE;
            root
        } else {
            let backend = open(&real).await;
            backend.checkpoint().await.unwrap();
            let copy = killed(root.path());
            if what == "changing over" {
                let real = copy.path().join("real");
                std::fs::rename(journal(&real), real.join("run_state.json.journal.next")).unwrap();
                std::fs::write(journal(&real), &before).unwrap();
            }
            copy
        };
        for turn in 0..4 {
            let (backend, notices) = open_told(&root.path().join("two")).await;
            assert_eq!(notices, Vec::<String>::new(), "{what}, {turn}");
            if turn == 0 && last != Version::NONE {
                assert_eq!(version(&backend, "run_1").await, last, "{what}: nothing is missing");
            }
            create(&backend, &format!("two_{turn}"), 50 + turn).await;
            backend.close().await.unwrap();
            assert!(reader_unopened(&root.path().join("two")).verify().await.unwrap().is_sound(), "{what}, {turn}");
        }
        // Nor is anything missing there.
        let backend = open(&root.path().join("real")).await;
        assert_eq!(all(&backend).await.len(), if last == Version::NONE { 4 } else { 5 }, "{what}");
        backend.close().await.unwrap();
    }
}

/// What another one left there, with nothing in it, does not stand for the journal of who had the document last.
#[tokio::test]
async fn an_empty_journal_elsewhere_does_not_speak_for_the_one_that_is_gone() {
    let root = folders();
    let backend = open(&root.path().join("real")).await;
    create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    let idle = killed(root.path());
    let left = journal(&idle.path().join("real"));
    let bytes = std::fs::read(&left).unwrap();
    let backend = open(&idle.path().join("one")).await;
    let mut last = Version::NONE;
    for second in 1..5 {
        last = set(&backend, "run_1", "n", NodeUpdate::success(), second).await.runs[0].after;
    }
    let root = killed(idle.path());
    std::fs::write(journal(&root.path().join("real")), bytes).unwrap();
    let gone = journal(&root.path().join("one"));
    std::fs::rename(&gone, gone.with_extension("mine")).unwrap();
    let (backend, notices) = open_told(&root.path().join("two")).await;
    assert!(notices.iter().any(|notice| notice.contains("its journal is missing or empty")), "{notices:?}");
    let next = set(&backend, "run_1", "n", NodeUpdate::success(), 9).await.runs[0].after;
    assert!(next > last, "{next:?} was used up to {last:?}");
    backend.close().await.unwrap();
}

/// What a link leads to may lie on a disk that is not mounted: a folder made in its place would be the beginning of another state.
#[tokio::test]
async fn nothing_is_made_where_a_link_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (away, target, folder) = (dir.path().join("not-mounted"), dir.path().join("target"), dir.path().join("folder"));
    std::fs::create_dir(&target).unwrap();
    std::os::unix::fs::symlink(away.join("run_state.json"), document(&target)).unwrap();
    std::os::unix::fs::symlink(&away, &folder).unwrap();
    for (base, link) in [(&target, &document(&target)), (&folder, &folder), (&folder.join("deeper"), &folder)] {
        for options in [options(base), options(base).read_only(true)] {
            let error = FileBackend::new(&options).initialize().await.unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: it is a symbolic link that leads nowhere", link.display())), "{error}");
        }
        assert!(!away.exists() && std::fs::read_dir(&target).unwrap().count() == 1, "{}", base.display());
    }
    std::fs::create_dir(&away).unwrap();
    open(&target).await.close().await.unwrap();
}
