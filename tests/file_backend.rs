//! The file backend through its public doors: what it writes, what a crash leaves, what others write beside it.
#![cfg(feature = "file")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test that cannot go on has failed"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeZone, Utc};
use seeknal_state::model::{Batch, BatchAnswer, Entry, Guard, Mutation, Outcome, Receipt, Refusal, RunPart};
use seeknal_state::store::LeaseStore;
use seeknal_state::store::file::{FileBackend, repair};
use seeknal_state::{
    BackendOptions, Fence, FencingToken, Interval, LeaseKey, LeaseOwner, LeaseRecord, NewRun, NodeId, NodeStatus, NodeUpdate,
    PartitionKey, RunId, RunQuery, RunState, RunUpdate, StateBackend, StoreErrorKind, Version,
};

fn at(second: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(1_704_888_000 + second, 0).unwrap()
}

fn run_id(text: &str) -> RunId {
    RunId::new(text).unwrap()
}

fn node_id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

fn options(folder: &Path) -> BackendOptions {
    BackendOptions::new().base_path(folder)
}

async fn open(folder: &Path) -> FileBackend {
    let backend = FileBackend::new(&options(folder));
    backend.initialize().await.unwrap();
    backend
}

async fn open_told(folder: &Path) -> (FileBackend, Vec<String>) {
    let backend = FileBackend::new(&options(folder));
    let report = backend.initialize().await.unwrap();
    (backend, report.notices)
}

async fn reader(folder: &Path) -> FileBackend {
    let backend = FileBackend::new(&options(folder).read_only(true));
    backend.initialize().await.unwrap();
    backend
}

fn part(run: &str, version: Version, mutations: Vec<Mutation>) -> RunPart {
    RunPart { run: run_id(run), base: version, expect: version, guards: Vec::new(), mutations, after: None }
}

fn entry(parts: Vec<RunPart>) -> Entry {
    Entry { parts, ..Entry::default() }
}

async fn commit(backend: &FileBackend, entry: Entry) -> Receipt {
    let answer = backend.commit(Arc::new(Batch::new(vec![entry]))).await.unwrap();
    applied(&answer, 0)
}

fn applied(answer: &BatchAnswer, index: usize) -> Receipt {
    match &answer.outcomes[index] {
        Outcome::Applied(receipt) => receipt.clone(),
        Outcome::Refused(refusal) => panic!("refused: {refusal}"),
    }
}

async fn create(backend: &FileBackend, run: &str, second: i64) -> Receipt {
    commit(backend, entry(vec![part(run, Version::NONE, vec![Mutation::Create { run: NewRun::running(), at: at(second) }])]))
        .await
}

async fn version(backend: &FileBackend, run: &str) -> Version {
    backend.load_run(&run_id(run)).await.unwrap().unwrap().version()
}

async fn set(backend: &FileBackend, run: &str, node: &str, update: NodeUpdate, second: i64) -> Receipt {
    let version = version(backend, run).await;
    let mutation = Mutation::SetNode { node: node_id(node), update: Box::new(update), at: at(second) };
    commit(backend, entry(vec![part(run, version, vec![mutation])])).await
}

async fn all(backend: &FileBackend) -> Vec<RunState> {
    let mut runs = Vec::new();
    for summary in backend.list_runs(&RunQuery::default().limit(1000)).await.unwrap().runs {
        runs.push(backend.load_run(&summary.run_id).await.unwrap().unwrap());
    }
    runs
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_dir() {
            copy_folder(&file.path(), &to.join(file.file_name()));
        } else {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
}

fn document(folder: &Path) -> PathBuf {
    folder.join("run_state.json")
}

fn journal(folder: &Path) -> PathBuf {
    folder.join("run_state.json.journal")
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Where the used part of a journal ends: behind the last byte that is not zero, rounded up to whole frames.
fn used(bytes: &[u8]) -> usize {
    (bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1).next_multiple_of(8)
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
async fn a_last_frame_that_is_torn_at_any_byte_is_cut_and_kept_aside() {
    let (folder, states) = killed_after(4).await;
    let bytes = std::fs::read(journal(folder.path())).unwrap();
    let end = used(&bytes);
    let last = bytes.windows(4).rposition(|window| window == b"SKF1").unwrap();
    let (whole, before) = (&states[states.len() - 1], &states[states.len() - 2]);
    for cut in last..=end {
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(document(folder.path()), document(copy.path())).unwrap();
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

fn reader_unopened(folder: &Path) -> FileBackend {
    FileBackend::new(&options(folder).read_only(true))
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
async fn one_writer_at_a_time_and_readers_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let second = FileBackend::new(&options(folder.path()));
    let error = second.initialize().await.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), StoreErrorKind::Busy);
    assert!(text.contains(&format!("pid {}", std::process::id())) && text.contains("seeknal state locks"), "{text}");
    let seen = reader(folder.path()).await;
    assert_eq!(all(&seen).await, all(&backend).await);
    // What is committed now, is seen now.
    for second in 1..20 {
        set(&backend, "run_1", "node", NodeUpdate::running().attempt(u32::try_from(second).unwrap()), second).await;
        assert_eq!(all(&seen).await, all(&backend).await);
        if second % 5 == 0 {
            backend.checkpoint().await.unwrap();
        }
    }
    let error = seen.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Busy && error.to_string().contains("pid"), "{error}");
    let holders = seen.processes().await.unwrap();
    assert_eq!(holders[0].process, backend.process().unwrap());
    backend.close().await.unwrap();
    assert!(seen.processes().await.unwrap().is_empty());
    let error = seen.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::ReadOnly);
    second.initialize().await.unwrap();
}

#[tokio::test]
async fn a_read_only_opening_makes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("not").join("there");
    let seen = reader(&missing).await;
    assert!(all(&seen).await.is_empty());
    assert!(!missing.exists());
    std::fs::copy("tests/fixtures/guide-sample/run_state.json", document(folder.path())).unwrap();
    let seen = reader(folder.path()).await;
    assert_eq!(all(&seen).await.len(), 1);
    seen.close().await.unwrap();
    assert_eq!(names(folder.path()), ["run_state.json"]);
}

#[tokio::test]
async fn leases_of_a_live_writer_are_listed_by_others_and_die_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let LeaseStore::Book(book) = backend.lease_store() else { panic!("leases live in a book") };
    let owner = LeaseOwner { process: backend.process().unwrap(), name: "task".into() };
    let record = LeaseRecord::new(LeaseKey::run(run_id("run_1")), FencingToken(3), owner, Some("load".into()), at(0), 30_000);
    book.put(record.clone(), None);
    let seen = reader(folder.path()).await;
    wait_for(async || seen.list_leases().await.unwrap() == vec![record.clone()]).await;
    // Writing goes over the provisional frame; the leases stay listed.
    for second in 1..10 {
        set(&backend, "run_1", "node", NodeUpdate::running().attempt(u32::try_from(second).unwrap()), second).await;
        assert_eq!(seen.list_leases().await.unwrap(), vec![record.clone()], "at once, not at the next tick");
    }
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    assert!(reader(killed.path()).await.list_leases().await.unwrap().is_empty(), "no writer, no leases");
    assert_eq!(all(&open(killed.path()).await).await, all(&backend).await);
    // A write that is fenced by a lease which is gone is refused.
    let version = version(&backend, "run_1").await;
    let fenced = |token| Entry {
        parts: vec![part("run_1", version, vec![Mutation::DeleteNode { node: node_id("node") }])],
        fences: vec![Fence { key: record.key.clone(), token: FencingToken(token) }],
        ..Entry::default()
    };
    let answer = backend.commit(Arc::new(Batch::new(vec![fenced(2), fenced(3)]))).await.unwrap();
    assert!(matches!(&answer.outcomes[0], Outcome::Refused(Refusal::Fenced { .. })));
    book.remove(&record.key, FencingToken(3));
    wait_for(async || seen.list_leases().await.unwrap().is_empty()).await;
}

async fn wait_for(mut holds: impl AsyncFnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !holds().await {
        assert!(begun.elapsed().as_secs() < 20, "it did not happen");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

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
        (b"{}", "neither"),
        (b"{\"nodes\":{}}x", "line 1, column 13"),
        (b"{\"run_id\":\"a\",\n\"run_id\":\"b\",\"nodes\":{}}", "twice"),
        (b"{\"nodes\":{\"a\":{},\n \"a\":{}}}", "line 2"),
        (b"{\"nodes\":{\"a\":{\"status\":\"x\",\n\"status\":\"y\"}}}", "line 2"),
        (b"{\"nodes\":\n[]}", "line 2"),
        (b"{\"nodes\":{\n\n\"a\":7}}", "line 3, column 5"),
        (b"{\"nodes\":{\"\":{}}}", "empty"),
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
async fn a_folder_that_cannot_be_written_is_a_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = FileBackend::new(&options(&file.join("target"))).initialize().await.unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
    let unopened = FileBackend::new(&options(folder.path()));
    let error = unopened.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert!(error.to_string().contains("initialize"), "{error}");
    assert_eq!(repair(&folder.path().join("nowhere"), at(0), false).unwrap_err().kind(), StoreErrorKind::NotFound);
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

/// Whether system calls can be made to fail here. Where they cannot, a test of them fails, unless a run without these faults is wanted.
fn can_trace() -> bool {
    let traced = std::process::Command::new("strace").args(["-o", "/dev/null", "true"]).status();
    let can = traced.is_ok_and(|status| status.success());
    let unwanted = std::env::var_os("WITHOUT_FAULTS").is_some_and(|value| value == "1");
    assert!(
        can || unwanted,
        "strace is missing or not permitted here: install it, or set WITHOUT_FAULTS=1 for a run without these faults"
    );
    can
}

/// Runs one of the tests below again in a process of its own, whose files may not grow beyond a size: the nearest thing to a full disk.
fn run_child(test: &str, folder: &Path, largest_file: u64) {
    let out = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; exec prlimit --fsize=$0:unlimited \"$@\"", &largest_file.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("STATE_FOLDER", folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

fn is_there(program: &str) -> bool {
    std::process::Command::new(program).arg("--version").output().is_ok()
}

#[test]
fn a_full_disk_is_a_typed_error_and_service_goes_on_with_the_space() {
    if !is_there("prlimit") {
        let allowed = std::env::var_os("WITHOUT_FAULTS").is_some_and(|value| value == "1");
        assert!(allowed, "prlimit is missing: install util-linux, or set WITHOUT_FAULTS=1 for a run without a full disk");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    run_child("child_on_a_full_disk", folder.path(), 3 << 20);
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

/// Writes, checkpoints and opens again; for running by hand under a tool that makes system calls fail. Whatever was acknowledged must be there, and
/// whatever was said not to be applied must not.
#[tokio::test]
#[ignore = "it is run by another test, under faults"]
async fn child_under_faults() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let backend = FileBackend::new(&options(&folder));
    if let Err(error) = backend.initialize().await {
        eprintln!("open: {error}");
        return;
    }
    // Acknowledged, refused for good, or in doubt: by node.
    let mut known: std::collections::BTreeMap<String, Option<bool>> = std::collections::BTreeMap::new();
    let mut version = Version::NONE;
    for second in 0..30_i64 {
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
        for when in ["1", "2", "3", "5", "9", "14", "3+2", "6+"] {
            place += 1;
            let state = folder.path().join(place.to_string());
            std::fs::create_dir(&state).unwrap();
            let out = std::process::Command::new("strace")
                .args(["-f", "-o", "/dev/null", "-e", &format!("inject={call}:error={error}:when={when}")])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", "child_under_faults", "--ignored", "--nocapture"])
                .env("STATE_FOLDER", &state)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success() && text.contains("1 passed"), "{call} {error} when {when}: {text}");
        }
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
    let out = std::process::Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO:when=1+"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child_whose_journal_cannot_be_synced", "--ignored", "--nocapture"])
        .env("STATE_FOLDER", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
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
        let out = std::process::Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", &format!("inject=pwrite64:error=EIO:when={when}")])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_dies_after_failed_writes", "--ignored", "--nocapture"])
            .env("STATE_FOLDER", &state)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&out.stdout).into_owned();
        let backend = open(&state).await;
        let run = backend.load_run(&run_id("run_1")).await.unwrap();
        for node in told.lines().filter_map(|line| line.split("acknowledged ").nth(1)) {
            acknowledged += 1;
            let there = run.as_ref().is_some_and(|run| run.node(node.trim()).is_some());
            assert!(there, "write {when} of the journal failed, and {node}, which was acknowledged, is gone");
        }
    }
    assert!(acknowledged >= 48, "the child did not get far: {acknowledged}");
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
        writeln!(acks, "{node}").unwrap();
        if number % 4 == 3 {
            backend.checkpoint().await.unwrap();
        }
    }
    backend.close().await.unwrap();
}

#[tokio::test]
async fn a_kill_at_any_system_call_also_while_it_recovers_keeps_what_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    if !can_trace() {
        return;
    }
    let mut killed = 0;
    for call in ["pwrite64", "fdatasync", "fsync", "/rename.*", "/unlink.*", "/link.*", "write"] {
        for when in [1, 2, 3, 4, 6, 9, 13] {
            let state = folder.path().join(format!("{}-{when}", call.replace(['/', '.', '*'], "")));
            std::fs::create_dir(&state).unwrap();
            let acks = state.join("acks");
            for attempt in ["first", "second"] {
                let out = std::process::Command::new("strace")
                    .args(["-f", "-o", "/dev/null", "-e", &format!("inject={call}:signal=SIGKILL:when={when}")])
                    .arg(std::env::current_exe().unwrap())
                    .args(["--exact", "child_that_is_killed", "--ignored", "--nocapture"])
                    .envs([("STATE_FOLDER", &state), ("ACKS", &acks)])
                    .output()
                    .unwrap();
                let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
                assert!(!text.contains("panicked"), "{call} {when} {attempt}: {text}");
                killed += usize::from(!out.status.success());
                let acknowledged = std::fs::read_to_string(&acks).unwrap_or_default();
                let told: Vec<&str> = acknowledged.lines().collect();
                let check = |runs: &[RunState], how: &str| {
                    let there = runs.first().map_or(0, RunState::node_count);
                    assert!(told.iter().all(|node| runs[0].node(node).is_some()), "{call} {when} {attempt} {how}: {told:?}");
                    // At most the one that was under way when it was killed, in every attempt.
                    assert!(there <= told.len() + 2, "{call} {when} {attempt} {how}: {there} for {told:?}");
                };
                check(&all(&reader(&state).await).await, "read");
                let copy = tempfile::tempdir().unwrap();
                copy_folder(&state, copy.path());
                check(&all(&open(copy.path()).await).await, "opened");
            }
        }
    }
    assert!(killed > 40, "only {killed} were killed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_beside_a_writer_that_checkpoints_never_sees_less_than_was_acknowledged_before() {
    let folder = tempfile::tempdir().unwrap();
    let backend = Arc::new(open(folder.path()).await);
    create(&backend, "run_1", 0).await;
    let acknowledged = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reading = tokio::spawn({
        let (folder, acknowledged, done) = (folder.path().to_owned(), Arc::clone(&acknowledged), Arc::clone(&done));
        async move {
            let mut looks = 0;
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let before = acknowledged.load(std::sync::atomic::Ordering::SeqCst);
                let seen = reader(&folder).await;
                let run = seen.load_run(&run_id("run_1")).await.unwrap().unwrap();
                assert!(run.version().0 >= before, "{} is seen, {before} was acknowledged", run.version());
                looks += 1;
            }
            looks
        }
    });
    let writing = async {
        for second in 0..150 {
            let receipt = set(&backend, "run_1", "node", NodeUpdate::running().attempt(second), 1).await;
            acknowledged.store(receipt.runs[0].after.0, std::sync::atomic::Ordering::SeqCst);
            if second % 3 == 0 {
                backend.checkpoint().await.unwrap();
            }
        }
    };
    writing.await;
    backend.close().await.unwrap();
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(reading.await.unwrap() > 0);
}
