//! A reader that stays for long keeps SQLite from emptying its WAL: that is told, and is over when the reader is gone.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};

use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

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

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_holds_the_wal_up_is_told_once() {
    let warnings = Warnings::default();
    tracing::subscriber::set_global_default(warnings.clone()).unwrap();
    let held_up = || warnings.0.lock().unwrap().iter().filter(|text| text.contains("keeps the WAL")).count();

    let dir = tempfile::tempdir().unwrap();
    let state = Coordinator::open(create_state_backend("database", &BackendOptions::new().base_path(dir.path())).unwrap());
    let state = state.await.unwrap();
    state.create_run("run_1", NewRun::running()).await.unwrap();
    let reader = rusqlite::Connection::open(dir.path().join("state.db")).unwrap();
    reader.execute_batch("BEGIN").unwrap();
    let runs: i64 = reader.query_row("SELECT count(*) FROM runs", [], |row| row.get(0)).unwrap();
    assert_eq!(runs, 1);

    // Half a mebibyte each time, until the WAL is far longer than it may be without a word.
    let write = async |number: u32| {
        let text = char::from_digit(number % 10, 10).unwrap().to_string().repeat(512 << 10);
        state.set_node_state("run_1", "node", NodeUpdate::running().metadata("text", text)).await.unwrap();
    };
    for number in 0..120 {
        write(number).await;
    }
    state.backend().checkpoint().await.unwrap();
    assert_eq!(held_up(), 1, "{:?}", warnings.0.lock().unwrap());

    // The reader ends: the WAL is used from its beginning again, and does not grow.
    reader.execute_batch("ROLLBACK").unwrap();
    state.backend().checkpoint().await.unwrap();
    let length = || std::fs::metadata(dir.path().join("state.db-wal")).unwrap().len();
    let before = length();
    for number in 0..20 {
        write(number).await;
    }
    assert_eq!(length(), before);
    assert_eq!(held_up(), 1);
    state.close().await.unwrap();
}
