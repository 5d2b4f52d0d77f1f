//! What becomes of the journal: torn, flipped, cut, without its document.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// Where the used part of a journal ends: behind the last byte that is not zero, rounded up to whole frames.
fn used(bytes: &[u8]) -> usize {
    (bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1).next_multiple_of(8)
}

/// A state of three runs whose journal holds everything, as a kill leaves it; with the number of records that were acknowledged.
async fn killed_after(commits: i64) -> (tempfile::TempDir, Vec<Vec<RunState>>) {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    let mut states = Vec::new();
    create(&backend, "run_1", 0).await;
    states.push(all(&backend).await);
    for second in 1..commits {
        set(&backend, "run_1", &format!("node_{}", second % 3), NodeUpdate::running().metadata("text", "x".repeat(50)), second)
            .await;
        states.push(all(&backend).await);
    }
    let copy = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), copy.path());
    backend.close().await.unwrap();
    (copy, states)
}

#[tokio::test]
async fn what_was_committed_is_there_again_after_a_close_and_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    set(&backend, "run_1", "node", NodeUpdate::success().row_count(7).fingerprint("abc").metadata("k", 1), 3).await;
    let version = version(&backend, "run_1").await;
    let more = vec![
        Mutation::AddInterval { node: node_id("node"), interval: Interval::parse("2024-01-01", "2024-01-02").unwrap() },
        Mutation::AddPartition { node: node_id("other"), partition: PartitionKey::new("dt=1").unwrap() },
        Mutation::Update { update: RunUpdate::success().metadata("why", "done"), at: at(9) },
    ];
    commit(&backend, entry(vec![part("run_1", version, more)])).await;
    let told = all(&backend).await;
    // A copy of the folder is what a kill at this moment leaves.
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    let again = open(killed.path()).await;
    assert_eq!(all(&again).await, told);
    again.close().await.unwrap();
    backend.close().await.unwrap();
    assert_eq!(names(folder.path()), ["run_state.json", "run_state.json.lock", "run_state.json.prev"], "nothing to replay");
    let again = open(folder.path()).await;
    assert_eq!(all(&again).await, told);
    let refused = backend.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Closed);
}

#[tokio::test]
async fn a_last_frame_that_is_torn_at_any_byte_is_cut_and_kept_aside() {
    let (folder, states) = killed_after(4).await;
    let bytes = std::fs::read(journal(folder.path())).unwrap();
    let end = used(&bytes);
    let last = bytes.windows(4).rposition(|window| window == b"SKF1").unwrap();
    let (whole, before) = (&states[states.len() - 1], &states[states.len() - 2]);
    for cut in last..=end {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), copy.path());
        let mut torn = bytes.clone();
        torn[cut..].fill(0);
        std::fs::write(journal(copy.path()), &torn).unwrap();
        // The frame ends with padding, which no tear is seen in.
        let is_whole = torn == bytes;
        let seen = reader(copy.path()).await;
        assert_eq!(all(&seen).await, *if is_whole { whole } else { before }, "cut at {cut}");
        assert_eq!(std::fs::read(journal(copy.path())).unwrap(), torn, "a reader changes nothing");
        if cut % 64 != 0 && cut + 9 < end {
            continue;
        }
        let (backend, notices) = open_told(copy.path()).await;
        assert_eq!(all(&backend).await, *if is_whole { whole } else { before }, "cut at {cut}");
        let aside = names(copy.path()).into_iter().filter(|name| name.contains(".torn-")).count();
        let is_torn = !is_whole && cut > last;
        assert_eq!((aside == 1, notices.iter().any(|n| n.contains("torn"))), (is_torn, is_torn), "cut at {cut}: {notices:?}");
        // It goes on where the good part ends.
        set(&backend, "run_1", "after", NodeUpdate::success(), 99).await;
        let told = all(&backend).await;
        backend.close().await.unwrap();
        assert_eq!(all(&open(copy.path()).await).await, told);
    }
}

/// Beginnings of frames, each of which claims all that follows: summing up every one of them would take half an hour.
#[tokio::test]
async fn a_journal_made_of_beginnings_is_damage_that_is_soon_told() {
    const LENGTH: usize = 8 << 20;
    let (folder, _) = killed_after(5).await;
    let good = std::fs::read(journal(folder.path())).unwrap();
    let first = good.windows(4).position(|window| window == b"SKF1").unwrap();
    let mut bad = good[..first].to_vec();
    while bad.len() < LENGTH {
        let claimed = u32::try_from(LENGTH - bad.len() - 32).unwrap_or(0);
        bad.extend([&b"SKF1"[..], &1_u32.to_le_bytes(), &claimed.to_le_bytes(), &[0; 20]].concat());
    }
    std::fs::write(journal(folder.path()), &bad).unwrap();
    let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
    assert!(std::fs::read(journal(folder.path())).unwrap() == bad, "it was changed");
    assert!(!reader_unopened(folder.path()).verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn a_flipped_bit_in_mid_journal_is_an_error_that_names_the_byte_and_changes_nothing() {
    let (folder, _) = killed_after(5).await;
    let good = std::fs::read(journal(folder.path())).unwrap();
    let frames: Vec<usize> = good.windows(4).enumerate().filter(|(_, w)| *w == b"SKF1").map(|(at, _)| at).collect();
    for (place, field) in [(frames[1] + 40, "payload"), (frames[2] + 8, "length"), (frames[1], "magic")] {
        let mut bad = good.clone();
        bad[place] ^= 1;
        std::fs::write(journal(folder.path()), &bad).unwrap();
        let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{field}");
        let frame = frames.iter().rev().find(|frame| **frame <= place).unwrap();
        assert!(error.to_string().contains(&format!("byte {frame}")) && error.to_string().contains("verify"), "{field}: {error}");
        assert_eq!(std::fs::read(journal(folder.path())).unwrap(), bad, "{field}: it was changed");
        let report = reader_unopened(folder.path()).verify().await.unwrap();
        assert!(!report.is_sound(), "{field}");
    }
    // The mend keeps the good part and a copy of the whole.
    let lines = repair(folder.path(), at(0), false).unwrap();
    assert!(lines[0].contains("cut at byte"), "{lines:?}");
    assert!(names(folder.path()).iter().any(|name| name.contains(".damaged-")));
    let (backend, _) = open_told(folder.path()).await;
    assert_eq!(all(&backend).await.len(), 1);
    assert!(reader_unopened(folder.path()).verify().await.unwrap().is_sound());
    assert_eq!(repair(folder.path(), at(0), false).unwrap_err().kind(), StoreErrorKind::Busy);
}

/// As an editor of texts does it: the frames behind are whole, each of them at another place than it was written to.
#[tokio::test]
async fn a_byte_that_was_taken_out_or_put_in_is_damage_and_no_torn_tail() {
    let (folder, states) = killed_after(5).await;
    let good = std::fs::read(journal(folder.path())).unwrap();
    let frames: Vec<usize> = good.windows(4).enumerate().filter(|(_, w)| *w == b"SKF1").map(|(at, _)| at).collect();
    let places = [(frames[2] + 40, 2), (frames[1] + 9, 1), (frames[2], 2), (frames[3] - 1, 2), (frames[4] - 4, 3)];
    for (place, frame) in places {
        for (what, with) in [("removed", None), ("inserted", Some(b'x'))] {
            let mut bad = good.clone();
            drop(bad.splice(place..place + usize::from(with.is_none()), with));
            std::fs::write(journal(folder.path()), &bad).unwrap();
            for read_only in [true, false] {
                let error = FileBackend::new(&options(folder.path()).read_only(read_only)).initialize().await.unwrap_err();
                assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{what} at {place}: {error}");
                let at = format!("damaged at byte {}", frames[frame]);
                assert!(error.to_string().contains(&at), "{what} at {place}: {error}");
            }
            assert!(!reader_unopened(folder.path()).verify().await.unwrap().is_sound(), "{what} at {place}");
            assert_eq!(std::fs::read(journal(folder.path())).unwrap(), bad, "{what} at {place}: it was changed");
        }
    }
    let lines = repair(folder.path(), at(0), false).unwrap();
    assert!(lines.iter().any(|line| line.contains("cut at byte")), "{lines:?}");
    assert_eq!(rows(&all(&open(folder.path()).await).await), rows(&states[2]), "the records before it");
}

#[tokio::test]
async fn a_length_that_is_absurd_allocates_nothing() {
    let (folder, states) = killed_after(3).await;
    let mut bytes = std::fs::read(journal(folder.path())).unwrap();
    let last = bytes.windows(4).rposition(|window| window == b"SKF1").unwrap();
    bytes[last + 8..last + 12].fill(0xFF);
    std::fs::write(journal(folder.path()), &bytes).unwrap();
    let (backend, notices) = open_told(folder.path()).await;
    assert_eq!(all(&backend).await, states[states.len() - 2]);
    assert!(notices.iter().any(|notice| notice.contains("torn")), "{notices:?}");
}

#[tokio::test]
async fn a_journal_without_its_document_or_with_a_damaged_header_is_refused() {
    let (folder, _) = killed_after(3).await;
    let kept = std::fs::read(document(folder.path())).unwrap();
    std::fs::remove_file(document(folder.path())).unwrap();
    let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Corrupt && error.to_string().contains("3 records"), "{error}");
    std::fs::write(document(folder.path()), kept).unwrap();
    let mut bytes = std::fs::read(journal(folder.path())).unwrap();
    bytes[5] ^= 1;
    std::fs::write(journal(folder.path()), bytes).unwrap();
    let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
    assert!(error.to_string().contains("header is damaged"), "{error}");
}

#[tokio::test]
async fn the_same_batch_is_applied_once() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    let create = entry(vec![part("run_1", Version::NONE, vec![Mutation::Create { run: NewRun::running(), at: at(0) }])]);
    let batch = Arc::new(Batch::new(vec![create.clone(), create]));
    let (first, second) = tokio::join!(backend.commit(Arc::clone(&batch)), backend.commit(Arc::clone(&batch)));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first, second);
    assert_eq!(backend.commit(batch).await.unwrap(), first);
    assert!(matches!(&first.outcomes[1], Outcome::Refused(Refusal::RunExists { .. })));
    let mut guarded = part("run_1", version(&backend, "run_1").await, vec![Mutation::Delete { keep_coverage: true }]);
    guarded.guards.push(Guard::RunVersion(Version(99)));
    let answer = backend.commit(Arc::new(Batch::new(vec![entry(vec![guarded])]))).await.unwrap();
    assert!(matches!(&answer.outcomes[0], Outcome::Refused(Refusal::Guard { .. })));
    assert_eq!(all(&backend).await.len(), 1);
}

/// Each of the two documents is put back in turn, each the successor of the other by name: what was acknowledged between is set aside, not thrown away.
#[tokio::test]
async fn a_journal_that_the_successor_of_its_document_does_not_have_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    for (run, kept) in [("run_1", &first), ("run_2", &second)] {
        let backend = open(folder.path()).await;
        create(&backend, run, 0).await;
        backend.close().await.unwrap();
        std::fs::copy(document(folder.path()), kept).unwrap();
    }
    std::fs::copy(&first, document(folder.path())).unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_3", 0).await;
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    std::fs::copy(&second, document(killed.path())).unwrap();
    let records = std::fs::read(journal(killed.path())).unwrap();
    let (backend, notices) = open_told(killed.path()).await;
    assert!(notices.iter().any(|notice| notice.contains("1 records")), "{notices:?}");
    let orphan = names(killed.path()).into_iter().find(|name| name.contains(".orphan-")).expect("it is kept");
    assert_eq!(std::fs::read(killed.path().join(orphan)).unwrap(), records);
    assert_eq!(all(&backend).await.len(), 2);
}

/// What cannot be read is not nothing.
#[tokio::test]
async fn a_journal_whose_first_frame_is_damaged_is_not_empty() {
    let (folder, _) = killed_after(4).await;
    let mut bytes = std::fs::read(journal(folder.path())).unwrap();
    bytes[512 + 40] ^= 1;
    std::fs::write(journal(folder.path()), &bytes).unwrap();
    let own = std::fs::read(document(folder.path())).unwrap();
    // Beside a document that it does not belong to.
    let other = tempfile::tempdir().unwrap();
    let backend = open(other.path()).await;
    create(&backend, "elsewhere", 0).await;
    backend.close().await.unwrap();
    std::fs::copy(document(other.path()), document(folder.path())).unwrap();
    let (backend, notices) = open_told(folder.path()).await;
    assert!(notices.iter().any(|notice| notice.contains("3 records")), "{notices:?}");
    backend.close().await.unwrap();
    let orphan = names(folder.path()).into_iter().find(|name| name.contains(".orphan-")).expect("it is kept");
    // Without any document.
    let alone = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join(orphan), journal(alone.path())).unwrap();
    let error = FileBackend::new(&options(alone.path())).initialize().await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Corrupt && error.to_string().contains("3 records and something damaged"), "{error}");
    // With its own one it is what it was.
    std::fs::write(document(alone.path()), own).unwrap();
    let error = FileBackend::new(&options(alone.path())).initialize().await.unwrap_err();
    assert!(error.to_string().contains("damaged at byte 512"), "{error}");
}

#[tokio::test]
async fn a_missing_document_is_brought_back_from_the_previous_one() {
    let (folder, states) = killed_after(4).await;
    std::fs::remove_file(document(folder.path())).unwrap();
    let previous = folder.path().join("run_state.json.prev");
    std::fs::set_permissions(&previous, std::fs::Permissions::from_mode(0o600)).unwrap();
    let before = names(folder.path());
    let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
    assert!(error.to_string().contains("run_state.json.prev is the last one"), "{error}");
    let error = repair(folder.path(), at(0), false).unwrap_err();
    assert_eq!((error.kind(), names(folder.path())), (StoreErrorKind::Corrupt, before), "nothing is set aside");
    let lines = repair(folder.path(), at(0), true).unwrap();
    assert!(lines[0].contains("takes its place"), "{lines:?}");
    let mode = std::fs::metadata(document(folder.path())).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "whoever may not read the one may not read the other");
    let backend = open(folder.path()).await;
    assert_eq!(all(&backend).await, states[states.len() - 1]);
}

/// With the document they may be whole: nothing is set aside for want of it, and no empty state takes its place.
#[tokio::test]
async fn records_without_their_document_are_no_empty_state_after_a_repair() {
    for (with_runner, damaged) in [(false, false), (true, false), (false, true)] {
        let (folder, states) = killed_after(4).await;
        let kept = std::fs::read(document(folder.path())).unwrap();
        for gone in [document(folder.path()), folder.path().join("run_state.json.prev")] {
            std::fs::remove_file(gone).unwrap();
        }
        if with_runner {
            std::fs::create_dir(folder.path().join("state")).unwrap();
            std::fs::write(folder.path().join("state/execution_state.json"), r#"{"n": {"status": "success"}}"#).unwrap();
        }
        let whole = std::fs::read(journal(folder.path())).unwrap();
        if damaged {
            let mut bytes = whole.clone();
            bytes[5] ^= 1;
            std::fs::write(journal(folder.path()), bytes).unwrap();
        }
        let before = names(folder.path());
        for use_previous in [false, true] {
            let error = repair(folder.path(), at(0), use_previous).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
            let told = error.to_string();
            assert!(told.contains("run_state.json is missing") && told.contains("rename the journal"), "{told}");
            assert_eq!(names(folder.path()), before, "nothing is set aside");
        }
        // Put back, it has all of them.
        std::fs::write(document(folder.path()), kept).unwrap();
        std::fs::write(journal(folder.path()), whole).unwrap();
        assert_eq!(repair(folder.path(), at(0), false).unwrap(), Vec::<String>::new());
        assert_eq!(all(&open(folder.path()).await).await, states[states.len() - 1]);
    }
}

#[tokio::test]
async fn records_behind_a_note_of_leases_are_damage() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    backend.checkpoint().await.unwrap();
    hold(&backend);
    let bytes = || std::fs::read(journal(folder.path())).unwrap_or_default();
    wait_for(async || String::from_utf8_lossy(&bytes()).contains("\"task\"")).await;
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    let noted = bytes();
    let next = open(killed.path()).await;
    for second in 1..5 {
        set(&next, "run_1", "node", NodeUpdate::running().metadata("text", "x".repeat(200)), second).await;
    }
    let damaged = tempfile::tempdir().unwrap();
    copy_folder(killed.path(), damaged.path());
    let mut written = std::fs::read(journal(damaged.path())).unwrap();
    let end = used(&noted);
    written[512..end].copy_from_slice(&noted[512..end]);
    std::fs::write(journal(damaged.path()), &written).unwrap();
    let unopened = FileBackend::new(&options(damaged.path()));
    let error = unopened.initialize().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("damaged at byte 512: a note of leases"), "{error}");
    assert_eq!(std::fs::read(journal(damaged.path())).unwrap(), written, "it is left as it is");
    let done = repair(damaged.path(), at(0), false).unwrap();
    assert!(done.iter().any(|line| line.contains("after 0 good record(s)")), "{done:?}");
    assert_eq!(rows(&all(&open(damaged.path()).await).await), rows(&all(&backend).await), "what the document has is there");
}

/// Space is there before a frame is written: no crash leaves one that reaches beyond the end of the file.
#[tokio::test]
async fn a_journal_that_was_cut_in_an_acknowledged_record_is_damage_and_no_torn_tail() {
    let (folder, states) = killed_after(4).await;
    let bytes = std::fs::read(journal(folder.path())).unwrap();
    let end = used(&bytes);
    let last = bytes.windows(4).rposition(|window| window == b"SKF1").unwrap();
    for cut in [last + 1, last + 9, last + 32, last + 100, end - 1] {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), copy.path());
        std::fs::write(journal(copy.path()), &bytes[..cut]).unwrap();
        let error = FileBackend::new(&options(copy.path())).initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "cut at {cut}: {error}");
        assert!(error.to_string().contains(&format!("byte {last}")) && error.to_string().contains("--repair"), "{error}");
        assert_eq!(std::fs::read(journal(copy.path())).unwrap(), bytes[..cut], "cut at {cut}: it is left as it is");
        assert!(!reader_unopened(copy.path()).verify().await.unwrap().is_sound(), "cut at {cut}");
        let done = repair(copy.path(), at(0), false).unwrap();
        assert!(done.len() == 1 && done[0].contains(&format!("cut at byte {last}")), "{done:?}");
        let (backend, notices) = open_told(copy.path()).await;
        let found = all(&backend).await;
        assert_eq!((rows(&found), notices.len()), (rows(&states[states.len() - 2]), 0), "cut at {cut}: {notices:?}");
        set(&backend, "run_1", "after", NodeUpdate::success(), 99).await;
        assert_eq!(all_after_a_kill(copy.path()).await, all(&backend).await);
    }
}

/// A note of leases is provisional: with it nothing is lost.
#[tokio::test]
async fn a_journal_that_was_cut_in_a_note_of_leases_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    hold(&backend);
    let bytes = || std::fs::read(journal(folder.path())).unwrap_or_default();
    wait_for(async || String::from_utf8_lossy(&bytes()).contains("\"task\"")).await;
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    let noted = std::fs::read(journal(killed.path())).unwrap();
    std::fs::write(journal(killed.path()), &noted[..used(&noted) - 3]).unwrap();
    assert_eq!(all(&open(killed.path()).await).await, all(&backend).await);
}

#[tokio::test]
async fn a_journal_with_a_frame_that_does_not_go_on_where_the_one_before_it_ended_is_cut_there() {
    let (folder, states) = killed_after(5).await;
    let bytes = std::fs::read(journal(folder.path())).unwrap();
    let frames: Vec<usize> = bytes.windows(4).enumerate().filter(|(_, w)| *w == b"SKF1").map(|(at, _)| at).collect();
    // The third is taken out: every frame is valid by itself.
    let without = [&bytes[..frames[2]], &bytes[frames[3]..]].concat();
    std::fs::write(journal(folder.path()), &without).unwrap();
    let error = FileBackend::new(&options(folder.path())).initialize().await.unwrap_err();
    assert!(error.to_string().contains(&format!("damaged at byte {}", frames[2])), "{error}");
    let done = repair(folder.path(), at(0), false).unwrap();
    assert!(done.len() == 1 && done[0].contains(&format!("cut at byte {}, after 2 good record(s)", frames[2])), "{done:?}");
    let kept = names(folder.path()).into_iter().find(|name| name.contains(".journal.damaged-")).unwrap();
    assert_eq!(std::fs::read(folder.path().join(kept)).unwrap(), without);
    assert_eq!(rows(&all(&open(folder.path()).await).await), rows(&states[1]));
}

/// Goes on from a killed writer's folder by three commits on a run: the journal after the first one and what the state was then, and the journal after the last.
/// `None` if a checkpoint came between, after a pause of the machine.
async fn three_on(killed: &Path, run: &str) -> Option<(Vec<u8>, Vec<RunState>, Vec<u8>)> {
    let copy = tempfile::tempdir().unwrap();
    copy_folder(killed, copy.path());
    let backend = open(copy.path()).await;
    set(&backend, run, "n", NodeUpdate::running(), 2).await;
    let (first, state) = (std::fs::read(journal(copy.path())).unwrap(), all(&backend).await);
    for second in 3..5 {
        set(&backend, run, "n", NodeUpdate::running(), second).await;
    }
    let last = std::fs::read(journal(copy.path())).unwrap();
    let header = &std::fs::read(journal(killed)).unwrap()[..512];
    (first[..512] == *header && last[..512] == *header).then_some((first, state, last))
}

/// Every frame is valid and goes on where the one before it ended, but one was made on another state.
#[tokio::test]
async fn a_journal_with_a_frame_that_its_state_refuses_is_cut_there() {
    let (folder, _) = killed_after(3).await;
    let killed = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_2", 0).await;
    copy_folder(folder.path(), killed.path());
    drop(backend);
    let mut ways = Vec::new();
    for run in ["run_1", "run_2"] {
        let mut way = None;
        while way.is_none() {
            way = three_on(killed.path(), run).await;
        }
        ways.extend(way);
    }
    let frames =
        |bytes: &[u8]| -> Vec<usize> { bytes.windows(4).enumerate().filter(|(_, w)| *w == b"SKF1").map(|(at, _)| at).collect() };
    let ((first, state, last), (other_first, _, other)) = (&ways[0], &ways[1]);
    let cut = frames(last)[frames(first).len()];
    let joined = [&last[..cut], &other[frames(other)[frames(other_first).len()]..]].concat();
    std::fs::write(journal(killed.path()), &joined).unwrap();
    let error = FileBackend::new(&options(killed.path())).initialize().await.unwrap_err();
    let told = error.to_string();
    assert!(told.contains("damaged at byte") && told.contains("it was made on run"), "{told}");
    let done = repair(killed.path(), at(0), false).unwrap();
    // Its records were made beside other locks, so that its own knows less than they tell.
    assert!(done.len() == 2 && done[0].contains("tokens go on behind"), "{done:?}");
    assert!(done[1].contains(&format!("cut at byte {cut}, after ")), "{done:?}");
    let kept = names(killed.path()).into_iter().find(|name| name.contains(".journal.damaged-")).unwrap();
    assert_eq!(std::fs::read(killed.path().join(kept)).unwrap(), joined);
    assert_eq!(rows(&all(&open(killed.path()).await).await), rows(state));
}
