//! Documents that others put there, and those that are bad.

use super::*;

#[tokio::test]
async fn tokens_and_sequences_never_go_back_over_kills_and_restored_backups() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    let first = create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    let backup = std::fs::read(document(folder.path())).unwrap();
    let tokens = backend.reserve_tokens(10).await.unwrap();
    assert_eq!(tokens, 1..11);
    let version_then = set(&backend, "run_1", "node", NodeUpdate::running(), 1).await;
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    let again = open(killed.path()).await;
    assert_eq!(again.reserve_tokens(1).await.unwrap().start, 11);
    let later = create(&again, "run_2", 5).await;
    assert!(later.seq > version_then.seq && later.runs[0].after.0 > version_then.runs[0].after.0);
    again.close().await.unwrap();
    backend.close().await.unwrap();
    // `cp` of a backup: what it does not know is gone, its numbers are not.
    std::fs::write(document(folder.path()), backup).unwrap();
    let again = open(folder.path()).await;
    assert!(all(&again).await[0].node("node").is_none());
    assert!(create(&again, "run_2", 6).await.seq > version_then.seq);
    assert!(again.reserve_tokens(1).await.unwrap().start > 10 && first.seq < version_then.seq);
}

#[tokio::test]
async fn a_backup_that_is_put_beside_a_journal_wins_and_the_journal_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    let backup = std::fs::read(document(folder.path())).unwrap();
    set(&backend, "run_1", "node", NodeUpdate::running(), 1).await;
    backend.checkpoint().await.unwrap();
    set(&backend, "run_1", "node", NodeUpdate::success(), 2).await;
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    std::fs::write(document(killed.path()), &backup).unwrap();
    assert!(all(&reader(killed.path()).await).await[0].node("node").is_none());
    let (again, notices) = open_told(killed.path()).await;
    assert!(all(&again).await[0].node("node").is_none());
    assert!(notices.iter().any(|notice| notice.contains("1 records") && notice.contains(".orphan-")), "{notices:?}");
    assert!(names(killed.path()).iter().any(|name| name.starts_with("run_state.json.journal.orphan-")));
    // An edit by hand is another document too.
    let edited = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), edited.path());
    let text = std::fs::read_to_string(document(edited.path())).unwrap().replace("\"running\"", "\"failed\"");
    std::fs::write(document(edited.path()), text).unwrap();
    let (again, notices) = open_told(edited.path()).await;
    assert_eq!(all(&again).await[0].node("node").unwrap().status, NodeStatus::Failed);
    assert!(notices.iter().any(|notice| notice.contains("edited")), "{notices:?}");
    set(&again, "run_1", "node", NodeUpdate::success(), 3).await;
    let told = all(&again).await;
    again.close().await.unwrap();
    assert_eq!(all(&open(edited.path()).await).await, told);
}

#[tokio::test]
async fn a_document_that_is_replaced_under_the_writer_stops_it_and_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    std::fs::write(folder.path().join("other"), "{\"run_id\":\"run_x\",\"nodes\":{}}").unwrap();
    std::fs::rename(folder.path().join("other"), document(folder.path())).unwrap();
    let error = backend.checkpoint().await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Poisoned && error.to_string().contains("replaced"), "{error}");
    let error = backend.commit(Arc::new(Batch::new(vec![entry(vec![])]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Poisoned, false));
    assert_eq!(backend.close().await.unwrap_err().kind(), StoreErrorKind::Poisoned);
    assert_eq!(std::fs::read_to_string(document(folder.path())).unwrap(), "{\"run_id\":\"run_x\",\"nodes\":{}}");
    let (again, notices) = open_told(folder.path()).await;
    assert_eq!(all(&again).await[0].id(), &run_id("run_x"));
    assert!(notices.iter().any(|notice| notice.contains(".orphan-")), "{notices:?}");
}

#[tokio::test]
async fn bad_documents_are_refused_with_line_and_mend_and_are_not_touched() {
    let long = format!("{{\"nodes\":{{\"{}\":{{}}}}}}", "x".repeat(2000));
    let cases: &[(&[u8], &str)] = &[
        (b"", "empty"),
        (&[0; 64], "zero bytes"),
        (b"   \n", "white space"),
        (b"{\n  \"nodes\": {\n", "line 3"),
        (b"[1,2]", "line 1"),
        (b"null", "line 1"),
        (b"{\"a\":{}}", "neither"),
        (b"{\"nodes\":{}}x", "line 1, column 13"),
        (b"{\"run_id\":\"a\",\n\"run_id\":\"b\",\"nodes\":{}}", "twice"),
        (b"{\"nodes\":{\"a\":{},\n \"a\":{}}}", "line 2"),
        (b"{\"nodes\":{\"a\":{\"status\":\"x\",\n\"status\":\"y\"}}}", "line 2"),
        (b"{\"nodes\":\n[]}", "line 2"),
        (b"{\"nodes\":{\n\n\"a\":7}}", "line 3, column 5"),
        (b"{\"nodes\":{\"\":{}}}", "empty"),
        (b"{\"nodes\":{\"a\":{\"metadata\":{NaN: 1}}}}", "line 1, column 28"),
        (b"{\"nodes\":{\"a\":{\"metadata\":{\"x\": NaN, \"y\":\nnan}}}}", "line 2, column 2"),
        (b"\xff\xfe{\0", "UTF-8"),
        (b"{\"nodes\":{},\"seeknal_state\":7}", "line 1"),
        (b"{\"nodes\":{},\"seeknal_state\":{}}", "format"),
        (b"{\"nodes\":{},\n\"seeknal_state\":{\"format\":1}}", "generation"),
        (long.as_bytes(), "1024"),
    ];
    for (bytes, told) in cases {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(document(folder.path()), bytes).unwrap();
        for read_only in [false, true] {
            let error = FileBackend::new(&options(folder.path()).read_only(read_only)).initialize().await.unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{text}");
            assert!(
                text.contains(told) && text.contains("line ") && text.contains("put a backup in its place"),
                "{told}: {text}"
            );
            assert_eq!(std::fs::read(document(folder.path())).unwrap(), *bytes);
        }
        assert!(!reader_unopened(folder.path()).verify().await.unwrap().is_sound());
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(document(folder.path()), "{\"nodes\":{},\"seeknal_state\":{\"format\":2,\"what\":{}}}").unwrap();
    assert_eq!(FileBackend::new(&options(folder.path())).initialize().await.unwrap_err().kind(), StoreErrorKind::NewerFormat);
}

#[tokio::test]
async fn a_damaged_document_is_replaced_by_the_previous_one_only_when_told() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    create(&backend, "run_2", 1).await;
    backend.close().await.unwrap();
    std::fs::write(document(folder.path()), "{\"nodes\":").unwrap();
    assert_eq!(repair(folder.path(), at(0), false).unwrap_err().kind(), StoreErrorKind::Corrupt);
    let lines = repair(folder.path(), at(0), true).unwrap();
    assert!(lines[0].contains(".prev"), "{lines:?}");
    let runs = all(&open(folder.path()).await).await;
    assert_eq!(runs.len(), 2, "the copy is of the last document, not of the one before");
    assert!(names(folder.path()).iter().any(|name| name.starts_with("run_state.json.damaged-")));
}

#[tokio::test]
async fn a_document_that_cannot_be_replaced_fails_the_checkpoint_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    // A folder where the next journal should be: rotation fails, commits go on.
    let blocker = folder.path().join("run_state.json.journal.next");
    std::fs::create_dir(&blocker).unwrap();
    backend.checkpoint().await.unwrap_err();
    set(&backend, "run_1", "node", NodeUpdate::success(), 1).await;
    std::fs::remove_dir(&blocker).unwrap();
    backend.checkpoint().await.unwrap();
    assert_eq!(json(&document(folder.path()))["nodes"]["node"]["status"], "success");
    let told = all(&backend).await;
    drop(backend);
    assert_eq!(all(&open(folder.path()).await).await, told, "dropping closes");
}

/// What an editor changed in the readable part counts, and what it added stays.
#[tokio::test]
async fn an_edit_by_hand_is_taken_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "node", NodeUpdate::running(), 1).await;
    backend.close().await.unwrap();
    let mut edited: serde_json::Value = serde_json::from_slice(&std::fs::read(document(folder.path())).unwrap()).unwrap();
    assert_eq!(edited["status"], "running");
    edited["status"] = "failed".into();
    edited["my_note"] = "do not lose me".into();
    edited["nodes"]["node"]["owner"] = "me".into();
    std::fs::write(document(folder.path()), serde_json::to_vec(&edited).unwrap()).unwrap();
    let backend = open(folder.path()).await;
    assert_eq!(all(&backend).await[0].header().status, seeknal_state::RunStatus::Failed);
    set(&backend, "run_1", "node", NodeUpdate::success(), 3).await;
    let told = all(&backend).await;
    backend.close().await.unwrap();
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(document(folder.path())).unwrap()).unwrap();
    assert_eq!((&written["status"], &written["my_note"]), (&"failed".into(), &"do not lose me".into()));
    assert_eq!((&written["nodes"]["node"]["owner"], &written["nodes"]["node"]["status"]), (&"me".into(), &"success".into()));
    assert_eq!(all(&open(folder.path()).await).await, told);
}

/// What an editor wrote that says nothing to this program is told as kept, and it is: over writes and edits, and also where the object was another program's.
#[tokio::test]
async fn what_an_edit_says_in_a_shape_that_is_not_understood_stays() {
    let theirs =
        r#"{"run_id":"run_1","schema_version":"2.0","nodes":{"node":{"hash":"h","status":"pending","row_count":3,"x":1e-300}}}"#;
    for before in [None, Some(theirs)] {
        let folder = tempfile::tempdir().unwrap();
        if let Some(text) = before {
            std::fs::write(document(folder.path()), text).unwrap();
        }
        let backend = open(folder.path()).await;
        if before.is_none() {
            create(&backend, "run_1", 0).await;
        }
        let span = Interval::new(at(0), at(60)).unwrap();
        let ended = NodeUpdate::success().row_count(5).duration_ms(7);
        set(&backend, "run_1", "node", ended, 1).await;
        let version = version(&backend, "run_1").await;
        let done = Mutation::AddInterval { node: node_id("node"), interval: span };
        commit(&backend, entry(vec![part("run_1", version, vec![done])])).await;
        backend.close().await.unwrap();

        let mut edited = json(&document(folder.path()));
        edited["status"] = serde_json::json!([null]);
        let node = &mut edited["nodes"]["node"];
        node["completed_intervals"].as_array_mut().unwrap().push(serde_json::json!(["2024-02-30", "2024-03-02"]));
        node["completed_partitions"] = false.into();
        node["row_count"] = "about 5".into();
        node["status"] = 5.into();
        node["hash"] = "by hand".into();
        node["duration_ms"] = "DURATION".into();
        let text = serde_json::to_string_pretty(&edited).unwrap().replace("\"DURATION\"", "Infinity");
        std::fs::write(document(folder.path()), text).unwrap();

        let (backend, notices) = open_told(folder.path()).await;
        assert!(notices.iter().any(|notice| notice.contains("2 element(s)")), "{notices:?}");
        let read = all(&backend).await;
        assert_eq!(*read[0].node("node").unwrap().intervals, std::iter::once(span).collect());
        create(&backend, "run_2", 60).await;
        backend.close().await.unwrap();
        let check = |when: &str| {
            let text = std::fs::read_to_string(document(folder.path())).unwrap();
            assert!(text.contains("\"duration_ms\": Infinity"), "{when}: {text}");
            let written = serde_json::from_str::<serde_json::Value>(&text.replace("Infinity", "0")).unwrap();
            let node = &written["nodes"]["node"];
            let said = ["row_count", "status", "hash", "completed_partitions"].map(|key| node[key].clone());
            assert_eq!(said, ["about 5".into(), 5.into(), "by hand".into(), serde_json::Value::Bool(false)], "{when}");
            assert_eq!(node["completed_intervals"][1], serde_json::json!(["2024-02-30", "2024-03-02"]), "{when}");
            assert!(before.is_none() || text.contains("\"x\": 1e-300"), "{when}: {text}");
            // The top level is about another run by now: this one keeps its own.
            let runs = written["seeknal_state"]["history"].as_array().unwrap();
            assert!(runs.iter().any(|run| run["extra"]["status"] == serde_json::json!([null])), "{when}: {text}");
        };
        check("written");
        // Untouched since, and then edited once more.
        let backend = open(folder.path()).await;
        assert_eq!(rows(&all(&backend).await)[1], rows(&read)[0]);
        set(&backend, "run_2", "other", NodeUpdate::running(), 61).await;
        backend.close().await.unwrap();
        check("written again");
        let text = std::fs::read_to_string(document(folder.path())).unwrap().replace("\"other\"", "\"renamed\"");
        std::fs::write(document(folder.path()), text).unwrap();
        let backend = open(folder.path()).await;
        create(&backend, "run_3", 62).await;
        backend.close().await.unwrap();
        check("edited and written");
    }
}

/// What is no status says nothing, and stays as long as nobody here says more; then whoever reads the document is told that.
#[tokio::test]
async fn a_status_that_was_none_is_told_once_it_changes() {
    for status in ["null", "5", "[null]"] {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(r#"{{"run_id":"run_1","status":{status},"nodes":{{"n":{{"status":"running"}}}}}}"#);
        std::fs::write(document(folder.path()), text).unwrap();
        let backend = open(folder.path()).await;
        set(&backend, "run_1", "n", NodeUpdate::success(), 1).await;
        backend.checkpoint().await.unwrap();
        assert_eq!(json(&document(folder.path()))["status"].to_string(), status);
        let end = Mutation::Update { update: RunUpdate::success(), at: at(2) };
        commit(&backend, entry(vec![part("run_1", version(&backend, "run_1").await, vec![end])])).await;
        backend.close().await.unwrap();
        assert_eq!(json(&document(folder.path()))["status"], "success", "it was {status}");
        let backend = open(folder.path()).await;
        assert_eq!(all(&backend).await[0].header().extra.as_ref().unwrap().to_value().unwrap()["status"].to_string(), status);
    }
}

/// Its stamps are of another clock, or of another time zone; what it wrote is the latest all the same.
#[tokio::test]
async fn what_another_program_wrote_is_the_latest_whatever_its_clock_says() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "node", NodeUpdate::success(), 1).await;
    backend.close().await.unwrap();
    let foreign = r#"{"run_id":"theirs","last_run":"2001-01-01T00:00:00","schema_version":"2.0",
        "nodes":{"node":{"hash":"new","status":"failed","row_count":777}}}"#;
    std::fs::write(document(folder.path()), foreign).unwrap();
    let backend = open(folder.path()).await;
    assert_eq!(all(&backend).await[0].id(), &run_id("theirs"));
    create(&backend, "run_2", 60).await;
    let latest = backend.latest_node(&node_id("node")).await.unwrap().unwrap();
    assert_eq!((latest.0, latest.1.row_count), (run_id("theirs"), Some(777)));
    backend.close().await.unwrap();
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(document(folder.path())).unwrap()).unwrap();
    assert_eq!((&written["nodes"]["node"]["hash"], &written["nodes"]["node"]["row_count"]), (&"new".into(), &777.into()));
}

#[tokio::test]
async fn tokens_never_go_back_where_the_lock_is_gone_and_the_document_is_not_ours() {
    let foreign = r#"{"run_id":"theirs","schema_version":"2.0","nodes":{"node":{"hash":"h","status":"success"}}}"#;
    for (document_is, copy_is_whole) in [(Some(foreign), true), (None, true), (Some(foreign), false), (None, false)] {
        let folder = tempfile::tempdir().unwrap();
        let backend = open(folder.path()).await;
        let last = create(&backend, "run_1", 0).await;
        let told = backend.reserve_tokens(100).await.unwrap();
        backend.close().await.unwrap();
        std::fs::remove_file(folder.path().join("run_state.json.lock")).unwrap();
        match document_is {
            Some(text) => std::fs::write(document(folder.path()), text).unwrap(),
            None => std::fs::remove_file(document(folder.path())).unwrap(),
        }
        if !copy_is_whole {
            std::fs::write(folder.path().join("run_state.json.prev"), "{").unwrap();
        }
        let (again, notices) = open_told(folder.path()).await;
        assert!(again.reserve_tokens(1).await.unwrap().start >= told.end, "{document_is:?} {copy_is_whole}");
        assert!(notices.iter().any(|notice| notice.contains("tokens go on behind")), "{notices:?}");
        if copy_is_whole {
            assert!(create(&again, "run_2", 1).await.seq > last.seq);
        }
    }
}

/// Whoever looks at the document with other tools waits for no pause of those who write.
#[tokio::test]
async fn a_writer_that_never_rests_shows_its_work_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let mut rows = 0;
    wait_for(async || {
        rows += 1;
        set(&backend, "run_1", "node", NodeUpdate::running().row_count(rows), 1).await;
        std::fs::read_to_string(document(folder.path())).is_ok_and(|text| text.contains("\"row_count\""))
    })
    .await;
    assert_eq!(all(&backend).await[0].node("node").unwrap().row_count, Some(rows));
}

/// Space for the journal is made ahead by how much the last one was used, not by how much the longest one ever was.
#[tokio::test]
async fn a_journal_becomes_short_again_behind_a_burst() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    for rows in 0..8 {
        set(&backend, "run_1", "node", NodeUpdate::running().row_count(rows).metadata("large", "x".repeat(1 << 20)), 1).await;
    }
    let length = || std::fs::metadata(folder.path().join("run_state.json.journal")).unwrap().len();
    assert!(length() > 8 << 20);
    let mut lengths = Vec::new();
    wait_for(async || {
        set(&backend, "run_1", "node", NodeUpdate::running().metadata("large", lengths.len()), 1).await;
        backend.checkpoint().await.unwrap();
        lengths.push(length());
        lengths.iter().rev().take_while(|length| **length < 4 << 20).count() > 20
    })
    .await;
}
