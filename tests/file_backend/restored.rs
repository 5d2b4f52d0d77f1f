//! Backups that are put back, and copies of documents that are not what they seem: nothing comes back, and nothing goes for good.

use super::*;

const SEEKNAL: &str = "tests/fixtures/seeknal-2.x-real-4-nodes/run_state.json";

fn previous(folder: &Path) -> PathBuf {
    folder.join("run_state.json.prev")
}

/// What is kept of a copy of a document under another name.
fn orphans(folder: &Path) -> Vec<String> {
    let kept = names(folder).into_iter().filter(|name| name.starts_with("run_state.json.prev.orphan-"));
    kept.map(|name| std::fs::read_to_string(folder.join(name)).unwrap()).collect()
}

async fn latest(backend: &FileBackend, node: &str) -> (RunId, NodeStatus) {
    let (run, state) = backend.latest_node(&node_id(node)).await.unwrap().unwrap();
    (run, state.status)
}

#[tokio::test]
async fn a_foreign_backup_that_is_put_back_rolls_back() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_before", 0).await;
    set(&backend, "run_before", "source.raw_customers", NodeUpdate::failed("long ago"), 1).await;
    backend.close().await.unwrap();
    // Seeknal goes on, and its document is kept.
    std::fs::copy(SEEKNAL, document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    let told = latest(&backend, "source.raw_customers").await;
    assert_eq!(told.1, NodeStatus::Success);
    create(&backend, "run_bad", 2_000_000_000 - 1_704_888_000).await;
    set(&backend, "run_bad", "source.raw_customers", NodeUpdate::failed("bad"), 3).await;
    set(&backend, told.0.as_str(), "source.raw_customers", NodeUpdate::failed("worse"), 4).await;
    backend.close().await.unwrap();
    let newest = std::fs::read_to_string(document(folder.path())).unwrap();
    std::fs::copy(SEEKNAL, document(folder.path())).unwrap();
    for time in ["at once", "again, before anything was written", "after a write", "and closed"] {
        let (backend, notices) = open_told(folder.path()).await;
        assert_eq!(latest(&backend, "source.raw_customers").await, told, "{time}");
        assert!(backend.load_run(&run_id("run_bad")).await.unwrap().is_none(), "{time}");
        assert!(backend.load_run(&run_id("run_before")).await.unwrap().is_some(), "{time}: what was before it is still there");
        match time {
            "after a write" => {
                set(&backend, told.0.as_str(), "mine", NodeUpdate::success(), 5).await;
                backend.close().await.unwrap();
            }
            "and closed" => assert!(backend.load_run(&told.0).await.unwrap().unwrap().node("mine").is_some()),
            _ => assert!(
                notices.iter().any(|notice| notice.contains("put back") && notice.contains("1 run(s)")),
                "{time}: {notices:?}"
            ),
        }
        if time != "at once" && time != "again, before anything was written" {
            assert_eq!(orphans(folder.path()), [newest.as_str()], "{time}: what it took the place of is kept");
        }
    }
}

#[tokio::test]
async fn no_version_is_used_twice_after_a_backup_was_put_back() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    let backup = std::fs::read(document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    let lost = set(&backend, "run_1", "lost", NodeUpdate::success(), 1).await;
    backend.close().await.unwrap();
    let newer = std::fs::read_to_string(document(folder.path())).unwrap();
    std::fs::write(document(folder.path()), &backup).unwrap();
    let (backend, notices) = open_told(folder.path()).await;
    assert!(notices.iter().any(|notice| notice.contains("put back")), "{notices:?}");
    let seen = version(&backend, "run_1").await;
    assert!(seen > lost.runs[0].after, "{seen} is not that of another state");
    let next = set(&backend, "run_1", "next", NodeUpdate::success(), 2).await;
    assert_eq!((next.runs[0].before, next.runs[0].after), (seen, Version(seen.0 + 1)));
    let beside = reader(folder.path()).await;
    assert_eq!(version(&beside, "run_1").await, next.runs[0].after, "readers see the same");
    // Killed, it comes back as it was.
    let copy = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), copy.path());
    assert_eq!(all(&open(copy.path()).await).await, all(&backend).await);
    backend.close().await.unwrap();
    assert_eq!(orphans(folder.path()), [newer.as_str()], "the document that the backup took the place of is kept");
    let report = reader_unopened(folder.path()).verify().await.unwrap();
    assert!(report.is_sound(), "{:?}", report.problems);
}

#[tokio::test]
async fn a_copy_that_cannot_be_read_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    let sound = std::fs::read_to_string(document(folder.path())).unwrap();
    let newer = sound.replacen("\"format\": 1", "\"format\": 2", 1);
    let damaged = sound.replacen("\"generation\"", "\"gone\"", 1);
    assert!(newer != sound && damaged != sound);
    for (copy, foreign) in [(&damaged, true), (&newer, true), (&newer, false), (&damaged, false)] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(previous(folder.path()), copy).unwrap();
        if foreign {
            std::fs::copy(SEEKNAL, document(folder.path())).unwrap();
        } else {
            std::fs::write(document(folder.path()), &sound).unwrap();
        }
        let backend = open(folder.path()).await;
        backend.close().await.unwrap();
        assert_eq!(std::fs::read_to_string(previous(folder.path())).unwrap(), *copy, "opening alone changes nothing");
        let backend = open(folder.path()).await;
        create(&backend, "run_2", 1).await;
        backend.checkpoint().await.unwrap();
        create(&backend, "run_3", 2).await;
        backend.close().await.unwrap();
        assert_eq!(orphans(folder.path()), [copy.as_str()]);
        assert_eq!(std::fs::read(previous(folder.path())).unwrap(), std::fs::read(document(folder.path())).unwrap());
    }
}

#[tokio::test]
async fn the_top_level_stays_that_of_the_run_that_it_names() {
    for stamp in ["\"2024-01-10T12:00:00Z\"", "null"] {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            r#"{{"run_id": "run_2", "started_at": {stamp}, "status": "running", "owner": "ops", "nodes": {{
                "a": {{"run_id": "run_1", "status": "success", "finished_at": "2024-01-10T12:30:00Z"}},
                "b": {{"run_id": "run_2", "status": "running"}}}}}}"#
        );
        std::fs::write(document(folder.path()), text).unwrap();
        let backend = open(folder.path()).await;
        set(&backend, "run_2", "b", NodeUpdate::success(), 1).await;
        backend.close().await.unwrap();
        let written = json(&document(folder.path()));
        assert_eq!(
            (&written["run_id"], &written["owner"], &written["status"]),
            (&"run_2".into(), &"ops".into(), &"running".into())
        );
        assert_eq!(written["nodes"]["a"]["run_id"], "run_1");
    }
}

#[tokio::test]
async fn what_an_editor_writes_over_a_value_that_was_not_known_counts() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(SEEKNAL, document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "mine", 2_000_000_000 - 1_704_888_000).await;
    set(&backend, "mine", "n", NodeUpdate::running(), 1).await;
    set(&backend, "mine", "other", NodeUpdate::running(), 1).await;
    backend.close().await.unwrap();
    let mut written = json(&document(folder.path()));
    assert_eq!(written["nodes"]["n"]["row_count"], 0, "what Seeknal's reader takes for granted");
    for (key, value) in [("status", "success".into()), ("row_count", 500.into()), ("duration_ms", 77.into())] {
        written["nodes"]["n"][key] = value;
    }
    std::fs::write(document(folder.path()), serde_json::to_string_pretty(&written).unwrap()).unwrap();
    for time in ["edited", "written again"] {
        let backend = open(folder.path()).await;
        let run = backend.load_run(&run_id("mine")).await.unwrap().unwrap();
        let node = run.node("n").unwrap();
        assert_eq!((&node.status, node.row_count, node.duration_ms), (&NodeStatus::Success, Some(500), Some(77)), "{time}");
        let other = run.node("other").unwrap();
        assert_eq!((&other.status, other.row_count, other.duration_ms), (&NodeStatus::Running, None, None), "{time}");
        set(&backend, "mine", "third", NodeUpdate::success(), 2).await;
        backend.close().await.unwrap();
        assert_eq!(json(&document(folder.path()))["nodes"]["n"]["row_count"], 500, "{time}");
    }
}

#[tokio::test]
async fn a_program_that_goes_on_with_an_older_run_puts_no_backup_back() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(SEEKNAL, document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_mine", 2_000_000_000 - 1_704_888_000).await;
    set(&backend, "run_mine", "mine", NodeUpdate::success(), 1).await;
    backend.close().await.unwrap();
    let mut theirs = json(Path::new(SEEKNAL));
    theirs["last_run"] = "2033-01-01T00:00:00".into();
    theirs["nodes"]["source.raw_customers"]["row_count"] = 4711.into();
    std::fs::write(document(folder.path()), theirs.to_string()).unwrap();
    let (backend, notices) = open_told(folder.path()).await;
    assert!(backend.load_run(&run_id("run_mine")).await.unwrap().is_some(), "{notices:?}");
    let (run, state) = backend.latest_node(&node_id("source.raw_customers")).await.unwrap().unwrap();
    assert_eq!(state.row_count, Some(4711), "of {run}");
}

#[tokio::test]
async fn runs_before_the_one_that_is_put_back_keep_what_only_we_knew() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = r#"{"run_id": "run_2", "started_at": "2024-01-10T12:00:00Z", "status": "success", "nodes": {
        "a": {"run_id": "run_1", "status": "success", "finished_at": "2024-01-09T12:00:00Z"},
        "b": {"run_id": "run_2", "status": "success", "finished_at": "2024-01-10T12:30:00Z"}}}"#;
    std::fs::write(document(folder.path()), theirs).unwrap();
    let backend = open(folder.path()).await;
    set(&backend, "run_1", "z", NodeUpdate::success(), 1).await;
    create(&backend, "run_3", 4000).await;
    backend.close().await.unwrap();
    std::fs::write(document(folder.path()), theirs).unwrap();
    let backend = open(folder.path()).await;
    assert!(backend.load_run(&run_id("run_3")).await.unwrap().is_none());
    let first = backend.load_run(&run_id("run_1")).await.unwrap().unwrap();
    assert_eq!(first.nodes().map(|(id, _)| id.to_string()).collect::<Vec<_>>(), ["a", "z"]);
}

#[tokio::test]
async fn what_is_kept_is_kept_once_however_often_the_document_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.close().await.unwrap();
    std::fs::remove_file(document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    // In the document's place lies what no document can replace.
    std::fs::create_dir_all(document(folder.path()).join("in the way")).unwrap();
    for _ in 0..5 {
        let entry = entry(vec![part("run_2", Version::NONE, vec![Mutation::Create { run: NewRun::running(), at: at(1) }])]);
        backend.commit(Arc::new(Batch::new(vec![entry]))).await.unwrap_err();
    }
    drop(backend);
    assert!(orphans(folder.path()).len() <= 1, "{:?}", names(folder.path()));
}

#[tokio::test]
async fn no_version_is_used_twice_beside_a_journal_that_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    let lost = set(&backend, "run_1", "lost", NodeUpdate::success(), 1).await;
    let crashed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), crashed.path());
    let mut edited = json(&document(crashed.path()));
    edited["status"] = "failed".into();
    std::fs::write(document(crashed.path()), edited.to_string()).unwrap();
    let (backend, notices) = open_told(crashed.path()).await;
    assert!(notices.iter().any(|notice| notice.contains(".orphan-")), "{notices:?}");
    let next = set(&backend, "run_1", "next", NodeUpdate::success(), 2).await;
    assert!(next.runs[0].before > lost.runs[0].after, "{next:?}");
}

/// The lock's file was lost too; what lies beside the document still tells how far numbers went.
#[tokio::test]
async fn no_version_is_used_twice_after_a_backup_was_put_back_and_the_lock_was_lost() {
    for beside in ["the copy of a newer document", "the journal of a newer document"] {
        let folder = tempfile::tempdir().unwrap();
        let backend = open(folder.path()).await;
        create(&backend, "run_1", 0).await;
        backend.close().await.unwrap();
        let backup = std::fs::read(document(folder.path())).unwrap();
        let backend = open(folder.path()).await;
        set(&backend, "run_1", "n", NodeUpdate::running(), 1).await;
        backend.checkpoint().await.unwrap();
        let mut lost = Version::NONE;
        for second in 2..6 {
            lost = set(&backend, "run_1", "n", NodeUpdate::success(), second).await.runs[0].after;
        }
        let killed = tempfile::tempdir().unwrap();
        let journal_alone = beside.contains("journal");
        if journal_alone {
            copy_folder(folder.path(), killed.path());
            std::fs::remove_file(previous(killed.path())).unwrap();
        }
        backend.close().await.unwrap();
        if !journal_alone {
            copy_folder(folder.path(), killed.path());
        }
        std::fs::write(document(killed.path()), &backup).unwrap();
        std::fs::remove_file(killed.path().join("run_state.json.lock")).unwrap();
        let (backend, notices) = open_told(killed.path()).await;
        let told = if journal_alone { "did not belong to" } else { "a backup that was put back" };
        assert!(notices.iter().any(|notice| notice.contains(told)), "{beside}: {notices:?}");
        let next = set(&backend, "run_1", "next", NodeUpdate::success(), 9).await;
        assert!(next.runs[0].after > lost, "{beside}: {:?} was used up to {lost}", next.runs[0]);
        backend.close().await.unwrap();
    }
}
