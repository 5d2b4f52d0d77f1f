//! A reader that stays for long keeps SQLite from emptying its WAL, and so do short ones that overlap: the WAL begins anew all the same, or it is told.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::fmt::{Debug, Write};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Until then the log must have begun anew.
const LONGEST: std::time::Duration = std::time::Duration::from_secs(60);

/// Keeps the warnings of the whole process: the writer has a thread of its own.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

struct Text<'t>(&'t mut String);

impl Visit for Text<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, "{}={value:?} ", field.name()).unwrap();
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut text = String::new();
        event.record(&mut Text(&mut text));
        self.0.lock().unwrap().push(text);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

static WARNINGS: LazyLock<Warnings> = LazyLock::new(|| {
    let warnings = Warnings::default();
    tracing::subscriber::set_global_default(warnings.clone()).unwrap();
    warnings
});

/// How often it was told that the WAL of the database in this folder does not begin anew.
fn held_up(folder: &Path) -> usize {
    let of = |text: &&String| text.contains("the WAL") && text.contains(folder.to_str().unwrap());
    WARNINGS.0.lock().unwrap().iter().filter(of).count()
}

async fn open(folder: &Path) -> Coordinator {
    LazyLock::force(&WARNINGS);
    let state = Coordinator::open(create_state_backend("database", &BackendOptions::new().base_path(folder)).unwrap());
    let state = state.await.unwrap();
    state.create_run("run_1", NewRun::running()).await.unwrap();
    state
}

/// So many KiB.
async fn write(state: &Coordinator, number: u32, kib: usize) {
    let text = char::from_digit(number % 10, 10).unwrap().to_string().repeat(kib << 10);
    state.set_node_state("run_1", "node", NodeUpdate::running().metadata("text", text)).await.unwrap();
}

fn wal_length(folder: &Path) -> u64 {
    std::fs::metadata(folder.join("state.db-wal")).unwrap().len()
}

/// How often the log began, as its header says: the checkpoint sequence number. Its length stays as it was.
fn beginnings(folder: &Path) -> u32 {
    let mut header = [0; 16];
    std::fs::File::open(folder.join("state.db-wal")).unwrap().read_exact(&mut header).unwrap();
    u32::from_be_bytes(header[12..].try_into().unwrap())
}

/// A reader of another program.
struct Reader(rusqlite::Connection);

impl Reader {
    fn new(folder: &Path) -> Self {
        let conn = rusqlite::Connection::open(folder.join("state.db")).unwrap();
        conn.busy_timeout(std::time::Duration::from_secs(60)).unwrap();
        Self(conn)
    }

    fn begin(&self) {
        self.0.execute_batch("BEGIN").unwrap();
        let runs: i64 = self.0.query_row("SELECT count(*) FROM runs", [], |row| row.get(0)).unwrap();
        assert_eq!(runs, 1);
    }

    fn end(&self) {
        self.0.execute_batch("ROLLBACK").unwrap();
    }
}

/// Two of them, never both out; each stays for longer than a commit takes, and not for long.
fn overlap(folder: PathBuf, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let readers = [Reader::new(&folder), Reader::new(&folder)];
        let stay = || std::thread::sleep(std::time::Duration::from_millis(25));
        readers[0].begin();
        while !stop.load(Ordering::Acquire) {
            for (next, last) in [(1, 0), (0, 1)] {
                readers[next].begin();
                readers[last].end();
                stay();
            }
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_short_readers_that_overlap_the_wal_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    let stop = Arc::<AtomicBool>::default();
    let readers = overlap(dir.path().to_owned(), Arc::clone(&stop));
    // How many commits that takes depends on when readers leave room for a moment, and on the machine.
    let (first, began) = (beginnings(dir.path()), std::time::Instant::now());
    let mut number = 0;
    while beginnings(dir.path()) == first && began.elapsed() < LONGEST {
        write(&state, number, 128).await;
        number += 1;
    }
    let begun = beginnings(dir.path()) != first;
    stop.store(true, Ordering::Release);
    readers.join().unwrap();
    assert!(begun, "{number} commits, {} MiB, told {} times", wal_length(dir.path()) >> 20, held_up(dir.path()));
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_never_let_the_wal_begin_anew_are_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    let readers = [Reader::new(dir.path()), Reader::new(dir.path())];
    readers[0].begin();
    // Whatever one of them keeps out of the database is little, and one of them is always there.
    for number in 0..180 {
        write(&state, number, 512).await;
        if number % 4 == 3 {
            let (next, last) = if number % 8 == 3 { (1, 0) } else { (0, 1) };
            readers[next].begin();
            readers[last].end();
        }
    }
    assert_eq!(held_up(dir.path()), 1, "{} MiB; {:?}", wal_length(dir.path()) >> 20, WARNINGS.0.lock().unwrap());
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_holds_the_wal_up_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    let held_up = || held_up(dir.path());
    let warnings = &*WARNINGS;
    let reader = rusqlite::Connection::open(dir.path().join("state.db")).unwrap();
    reader.execute_batch("BEGIN").unwrap();
    let runs: i64 = reader.query_row("SELECT count(*) FROM runs", [], |row| row.get(0)).unwrap();
    assert_eq!(runs, 1);

    // Until the WAL is far longer than it may be without a word.
    for number in 0..120 {
        write(&state, number, 512).await;
    }
    state.backend().checkpoint().await.unwrap();
    assert_eq!(held_up(), 1, "{:?}", warnings.0.lock().unwrap());

    // The reader ends: the WAL is used from its beginning again, and does not grow.
    reader.execute_batch("ROLLBACK").unwrap();
    state.backend().checkpoint().await.unwrap();
    let before = wal_length(dir.path());
    for number in 0..20 {
        write(&state, number, 512).await;
    }
    assert_eq!(wal_length(dir.path()), before);
    assert_eq!(held_up(), 1);
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_reader_made_of_the_wal_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path()).await;
    let reader = Reader::new(dir.path());
    reader.begin();
    let mut number = 0;
    while wal_length(dir.path()) < 80 << 20 {
        write(&state, number, 512).await;
        number += 1;
    }
    reader.end();

    // By those who write on, without being asked; how soon depends on the clock.
    let began = std::time::Instant::now();
    while wal_length(dir.path()) > 40 << 20 && began.elapsed() < LONGEST {
        write(&state, number, 1).await;
        number += 1;
    }
    assert!(wal_length(dir.path()) <= 40 << 20, "{} MiB after {number} commits", wal_length(dir.path()) >> 20);
    let node = state.get_node_state("run_1", "node").await.unwrap().unwrap();
    let text = node.metadata.get("text").unwrap().to_string();
    assert_eq!(text.len(), (1 << 10) + 2, "the last one that was written");
    state.close().await.unwrap();
}
