//! How long the WAL becomes: it is brought into the database and begins anew, or it is told why not.
//!
//! A checkpoint that waits for nobody does, as long as there is a moment without readers now and then: the next commit begins the log anew. Short readers that overlap leave no
//! such moment, although everything is in the database: then the writer waits for them, shortly, while nothing is committed. Whoever comes meanwhile reads
//! the database alone, and stands in nobody's way.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::error::sql_error;
use super::open::beside;
use super::schema::PAGE_SIZE;
use super::turn;
use crate::store::StoreError;

/// So many pages of the WAL that cannot be brought into the database are told: 32 MiB. A log of this length is to begin anew; one that is twice as long
/// and did not is told.
const HELD_UP: i64 = 32 * 1024;

/// A file of this length, in such logs, gives its space back once readers allow: it became so long while one of them stayed, and else would stay so until
/// everybody has closed the database.
const TOO_LONG: i64 = 2;

/// How long the writer waits for readers at most, so that the log can begin anew.
const WAIT: Duration = Duration::from_millis(50);

/// How often it does.
const AGAIN: Duration = Duration::from_secs(1);

/// What the writer knows of the log.
#[derive(Debug, Default)]
pub(super) struct Wal {
    /// Whether it was told that it is held up.
    told: bool,
    /// When the writer waited last for readers.
    waited: Option<Instant>,
    /// When the writer saw last that the file is too long.
    seen: Option<Instant>,
    /// Its length when it was longest, in bytes.
    longest: u64,
}

/// The log as a checkpoint left it.
struct Log {
    /// Pages since its beginning.
    pages: i64,
    /// Pages that are not in the database.
    left: i64,
    /// Whether somebody stood in the way.
    held: bool,
}

fn checkpoint(conn: &Connection, sql: &str) -> rusqlite::Result<Log> {
    conn.query_row(sql, [], |row| {
        let (held, pages, done): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok(Log { pages, left: pages.saturating_sub(done), held: held != 0 })
    })
}

/// How long the file is.
fn length(db: &Path) -> u64 {
    std::fs::metadata(beside(db, "-wal")).map_or(0, |meta| meta.len())
}

fn bytes(pages: i64) -> u64 {
    u64::try_from(pages.saturating_mul(PAGE_SIZE)).unwrap_or(u64::MAX)
}

impl Wal {
    /// Whether it is to be emptied: it is longer than it ever was and should be (wide rows fill it sooner than their number says), or is too long still.
    pub(super) fn has_grown(&mut self, db: &Path) -> bool {
        let length = length(db);
        let grown = length > self.longest.max(bytes(HELD_UP));
        self.longest = self.longest.max(length);
        let is_too_long = length >= bytes(HELD_UP * TOO_LONG) && self.seen.is_none_or(|at| at.elapsed() >= AGAIN);
        if is_too_long {
            self.seen = Some(Instant::now());
        }
        grown || is_too_long
    }

    /// Brings the log into the database as far as readers allow, and says so when they hold it up for too long. Answers whether the file has given back its
    /// space.
    pub(super) fn checkpoint(&mut self, conn: &mut Connection, db: &Path, place: &str) -> Result<bool, StoreError> {
        let fail = |error| sql_error(place, error);
        let mut log = checkpoint(conn, "PRAGMA wal_checkpoint(PASSIVE)").map_err(fail)?;
        if log.pages < 0 {
            // Somebody else is at it.
            return Ok(false);
        }
        let is_too_long = length(db) >= bytes(HELD_UP * TOO_LONG);
        let mut is_short = false;
        if (log.pages >= HELD_UP || is_too_long) && log.left < HELD_UP && self.waited.is_none_or(|at| at.elapsed() >= AGAIN) {
            self.waited = Some(Instant::now());
            if begin_anew(conn, is_too_long).map_err(fail)? {
                log = Log { pages: 0, left: 0, held: false };
                is_short = is_too_long;
            }
        }
        if is_short {
            self.longest = 0;
        }
        let stays = log.left >= HELD_UP;
        let held_up = stays || log.pages >= 2 * HELD_UP;
        if held_up && !std::mem::replace(&mut self.told, true) {
            let mib = if stays { log.left } else { log.pages }.saturating_mul(PAGE_SIZE) >> 20;
            if stays {
                tracing::warn!(
                    database = place,
                    mib,
                    "a reader that stays keeps the WAL from being brought into the database: it grows until that one ends; look for a program with an \
                     open transaction on it"
                );
            } else {
                tracing::warn!(
                    database = place,
                    mib,
                    "readers that overlap keep the WAL from beginning anew: it grows until none of them is in a transaction for a moment; look for \
                     programs that read it without a pause"
                );
            }
        }
        self.told = held_up;
        Ok(is_short)
    }
}

/// Lets the log begin anew with the next commit, if readers end in time; `short`: in a file without length.
fn begin_anew(conn: &mut Connection, short: bool) -> rusqlite::Result<bool> {
    conn.busy_timeout(WAIT)?;
    let begun = checkpoint(conn, if short { "PRAGMA wal_checkpoint(TRUNCATE)" } else { "PRAGMA wal_checkpoint(RESTART)" });
    conn.busy_handler(Some(turn::wait))?;
    begun.map(|log| !log.held)
}
