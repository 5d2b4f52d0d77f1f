//! Brings the WAL into the database while the writer goes on.
//!
//! A checkpoint writes every page that changed and syncs the database: some ten milliseconds in which the writer would acknowledge nothing. So a thread
//! with a connection of its own does most of it; what was committed meanwhile is a short rest, which the writer adds itself, and the WAL begins anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::open;

/// Rows written after which the WAL is brought into the database; about as many pages of it.
const DUE_AFTER: usize = 8 * 1024;

/// What a checkpoint has to do with the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing.
    No,
    /// Most of it is done: the writer adds the rest.
    Rest,
}

const IDLE: u8 = 0;
const RUNNING: u8 = 1;
const DONE: u8 = 2;

/// The thread, from its first use on.
#[derive(Debug)]
pub(super) struct Checkpointer {
    db: PathBuf,
    thread: Option<(SyncSender<()>, JoinHandle<()>)>,
    phase: Arc<AtomicU8>,
    /// Rows written since the last checkpoint.
    rows: usize,
}

impl Checkpointer {
    pub(super) fn new(db: &Path) -> Self {
        Self { db: db.to_owned(), thread: None, phase: Arc::new(AtomicU8::new(IDLE)), rows: 0 }
    }

    /// So many rows were committed.
    pub(super) fn wrote(&mut self, rows: usize) -> Due {
        self.rows = self.rows.saturating_add(rows);
        if self.rows < DUE_AFTER {
            return Due::No;
        }
        match self.phase.load(Ordering::Acquire) {
            IDLE => {
                self.phase.store(RUNNING, Ordering::Release);
                if !self.signal() {
                    // Without the thread SQLite's own checkpoint, inside a commit, does it.
                    self.rows = 0;
                    self.phase.store(IDLE, Ordering::Release);
                }
                Due::No
            }
            DONE => {
                self.rows = 0;
                self.phase.store(IDLE, Ordering::Release);
                Due::Rest
            }
            _ => Due::No,
        }
    }

    fn signal(&mut self) -> bool {
        if self.thread.is_none() {
            let (signal, signals) = sync_channel(1);
            let (db, phase) = (self.db.clone(), Arc::clone(&self.phase));
            let spawned = std::thread::Builder::new().name("seeknal-wal".to_owned()).spawn(move || work(&db, &signals, &phase));
            self.thread = spawned.ok().map(|thread| (signal, thread));
        }
        self.thread.as_ref().is_some_and(|(signal, _)| signal.try_send(()).is_ok())
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        // Its connection goes before the writer's, which tidies up as the last one.
        if let Some((signal, thread)) = self.thread.take() {
            drop(signal);
            let _panicked = thread.join().is_err();
        }
    }
}

fn work(db: &Path, signals: &Receiver<()>, phase: &AtomicU8) {
    let mut conn = None;
    while signals.recv().is_ok() {
        if conn.is_none() {
            conn = open::open_checkpointer(db).ok();
        }
        // A fault is met again, and told, where the writer does the rest.
        let done = conn.as_ref().map(|conn| conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())));
        if !matches!(done, Some(Ok(()))) {
            conn = None;
        }
        phase.store(DONE, Ordering::Release);
    }
}
