//! Following the commits of other openings: a thread with a connection of its own, which asks SQLite whether anybody committed.
//!
//! ```text
//! others_committed() ──(somebody waits)──► thread: PRAGMA data_version, every 15 ms
//!                                            moved? sequence in `meta` beyond what this opening sent?
//!    ◄──────────────(watch)── told ──────────┘
//! ```
//!
//! While nobody waits the thread sleeps. Commits of this opening move `data_version` too, as the connection is not the writer's: so the commit
//! sequence is compared with what the writer sent down, and the writer says when it met commits of others itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::watch;

use super::error::sql_error;
use super::open;
use super::place::Place;
use super::read;
use crate::store::StoreError;

/// Between two looks; a look takes some microseconds.
const PAUSE: Duration = Duration::from_millis(15);

/// What the writer of this opening lets the follower know.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    /// The highest commit sequence that this opening sent down, or found when it began.
    sent: AtomicU64,
    /// Moves whenever somebody else committed as far as the writer knows, or the writer does not know.
    met: AtomicU64,
}

impl Foreign {
    /// This sequence is about to be committed, or was there at the beginning.
    pub(super) fn sent(&self, seq: u64) {
        self.sent.store(seq, Ordering::Release);
    }

    /// Somebody else has committed, or may have.
    pub(super) fn met(&self) {
        self.met.fetch_add(1, Ordering::AcqRel);
    }
}

/// What the thread said last.
#[derive(Debug, Clone, Default)]
struct Told {
    error: Option<StoreError>,
}

/// The door of the thread.
#[derive(Debug)]
pub(super) struct Follower {
    desk: Arc<Desk>,
    /// Started by the first who waits.
    told: tokio::sync::Mutex<Option<watch::Receiver<Told>>>,
    /// The same for who waits for the thread's end: a future that nobody polls may sit on the other one.
    ended: Mutex<Option<watch::Receiver<Told>>>,
}

/// Where waiters and thread meet.
#[derive(Debug)]
struct Desk {
    place: Arc<Place>,
    foreign: Arc<Foreign>,
    state: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    waiting: usize,
    closed: bool,
}

impl Desk {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.wanted().closed = true;
        self.changed.notify_all();
    }

    /// Waits until it is time for the next look; `false`: it is closed.
    fn next_look(&self) -> bool {
        let (mut wanted, _) = self
            .changed
            .wait_timeout_while(self.wanted(), PAUSE, |wanted| !wanted.closed)
            .unwrap_or_else(PoisonError::into_inner);
        while wanted.waiting == 0 && !wanted.closed {
            wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
        }
        !wanted.closed
    }
}

/// Somebody waits, as long as this lives.
struct Waiting<'d>(&'d Desk);

impl<'d> Waiting<'d> {
    fn at(desk: &'d Desk) -> Self {
        desk.wanted().waiting += 1;
        desk.changed.notify_all();
        Self(desk)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut wanted = self.0.wanted();
        wanted.waiting = wanted.waiting.saturating_sub(1);
    }
}

impl Follower {
    pub(super) fn new(place: Arc<Place>, foreign: Arc<Foreign>) -> Self {
        let desk = Desk { place, foreign, state: Mutex::default(), changed: Condvar::new() };
        Self { desk: Arc::new(desk), told: tokio::sync::Mutex::new(None), ended: Mutex::new(None) }
    }

    /// Waits until others may have committed.
    pub(super) async fn others_committed(&self) -> Result<(), StoreError> {
        let mut told = self.told.lock().await;
        let told = match &mut *told {
            Some(told) => told,
            none => {
                let started = start(&self.desk)?;
                *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(started.clone());
                none.insert(started)
            }
        };
        let _waiting = Waiting::at(&self.desk);
        // Nothing is awaited between taking the news and returning it: a future that is dropped takes no news with it.
        told.changed().await.map_err(|_| StoreError::closed())?;
        told.borrow_and_update().error.clone().map_or(Ok(()), Err)
    }

    /// Ends the thread, and waits until its connection is closed.
    pub(super) async fn close(&self) {
        self.desk.close();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut ended) = ended {
            while ended.changed().await.is_ok() {}
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.desk.close();
    }
}

fn start(desk: &Arc<Desk>) -> Result<watch::Receiver<Told>, StoreError> {
    let (teller, told) = watch::channel(Told::default());
    let desk = Arc::clone(desk);
    let watcher = Watcher { desk, conn: None, data_version: None, met: 0, seen: 0, failed: false };
    std::thread::Builder::new()
        .name("seeknal-follow".to_owned())
        .spawn(move || watcher.work(&teller))
        .map_err(|error| StoreError::io("starting the thread that follows other processes", error))?;
    Ok(told)
}

/// What the thread owns.
struct Watcher {
    desk: Arc<Desk>,
    conn: Option<Connection>,
    data_version: Option<i64>,
    met: u64,
    /// The highest commit sequence that was looked at.
    seen: u64,
    failed: bool,
}

impl Watcher {
    fn work(mut self, teller: &watch::Sender<Told>) {
        while self.desk.next_look() {
            match self.look() {
                Ok(news) => {
                    // After a failure nobody knows what happened meanwhile.
                    if news || self.failed {
                        teller.send_replace(Told::default());
                    }
                    self.failed = false;
                }
                Err(error) => {
                    self.conn = None;
                    self.data_version = None;
                    self.failed = true;
                    teller.send_replace(Told { error: Some(error) });
                }
            }
        }
        // The connection goes before the teller does, whose end says that it is gone.
        drop(self);
    }

    /// Whether others may have committed since the last look.
    fn look(&mut self) -> Result<bool, StoreError> {
        let place = &self.desk.place;
        place.check()?;
        let conn = if let Some(conn) = &self.conn {
            conn
        } else {
            let (conn, lasting) = open::open_reader(&place.path)?;
            if !lasting {
                // Nobody can write there.
                return Ok(false);
            }
            self.conn.insert(conn)
        };
        let version: i64 = conn
            .prepare_cached("PRAGMA data_version")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .map_err(|error| sql_error(&place.name, error))?;
        let foreign = &self.desk.foreign;
        if self.data_version == Some(version) && self.met == foreign.met.load(Ordering::Acquire) {
            return Ok(false);
        }
        let (seq, _) = read::counters(conn)?;
        // In this order: the writer tells of others before it sends what comes after them.
        let sent = foreign.sent.load(Ordering::Acquire);
        let met = foreign.met.load(Ordering::Acquire);
        let news = met != self.met || seq > sent.max(self.seen);
        (self.data_version, self.met, self.seen) = (Some(version), met, self.seen.max(seq));
        Ok(news)
    }
}
