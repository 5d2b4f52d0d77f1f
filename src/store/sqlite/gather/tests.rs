//! Beside another connection that writes, and on a disk that takes nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use rusqlite::{Connection, OpenFlags, params};

use super::file::{File, Held, MOST};
use super::*;

fn gathering(db: &Path) -> Connection {
    let conn = Connection::open_with_flags_and_vfs(db, OpenFlags::default(), vfs().unwrap()).unwrap();
    conn.pragma_update(None, "journal_mode", "WAL").unwrap();
    conn.pragma_update(None, "synchronous", "FULL").unwrap();
    conn.execute_batch("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, bytes BLOB)").unwrap();
    conn
}

fn put(conn: &Connection, id: i64, bytes: i64) {
    conn.execute("INSERT INTO t VALUES (?1, zeroblob(?2))", params![id, bytes]).unwrap();
}

fn found(conn: &Connection) -> Vec<(i64, i64)> {
    assert_eq!(conn.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0)).unwrap(), "ok");
    let mut statement = conn.prepare("SELECT id, length(bytes) FROM t ORDER BY id").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

#[test]
fn what_was_given_up_never_lies_over_what_others_commit() {
    let folder = tempfile::tempdir().unwrap();
    let db = folder.path().join("some.db");
    let conn = gathering(&db);
    put(&conn, 1, 10);
    let other = Connection::open(&db).unwrap();
    for round in 0..20_i64 {
        // Nothing is read from the log while the transaction is given up: that would give what is held.
        conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        // A cache so small that pages are written before the transaction ends; the last of them are held when it is given up.
        conn.pragma_update(None, "cache_size", 16).unwrap();
        conn.execute_batch("BEGIN IMMEDIATE").unwrap();
        put(&conn, 1_000, 100_000 + 5_000 * round);
        conn.execute_batch("ROLLBACK").unwrap();
        // They stood where this is written.
        put(&other, 10 + round, 50_000);
        // Whatever it does next must not write them.
        assert_eq!(found(&conn).last(), Some(&(10 + round, 50_000)));
        conn.pragma_update(None, "cache_size", 2_000).unwrap();
    }
    let expected: Vec<(i64, i64)> = std::iter::once((1, 10)).chain((10..30).map(|id| (id, 50_000))).collect();
    assert_eq!(found(&Connection::open(&db).unwrap()), expected);
    drop(conn);
    drop(other);
    assert_eq!(found(&Connection::open(&db).unwrap()), expected, "and in the database itself");
}

#[test]
fn others_see_what_is_committed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let db = folder.path().join("some.db");
    let conn = gathering(&db);
    let other = Connection::open(&db).unwrap();
    // Also more than is held at once, with savepoints that go, and a log that begins anew.
    for id in 0..60_i64 {
        conn.execute_batch("BEGIN IMMEDIATE").unwrap();
        put(&conn, id, id * 20_000);
        conn.execute_batch("SAVEPOINT s").unwrap();
        put(&conn, 1_000, 300_000);
        conn.execute_batch("ROLLBACK TO s; RELEASE s").unwrap();
        assert_eq!(other.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).unwrap(), id);
        conn.execute_batch("COMMIT").unwrap();
        let last: i64 = other.query_row("SELECT length(bytes) FROM t WHERE id = ?1", [id], |row| row.get(0)).unwrap();
        assert_eq!(last, id * 20_000);
        if id % 7 == 0 {
            conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        }
    }
    let expected: Vec<(i64, i64)> = (0..60).map(|id| (id, id * 20_000)).collect();
    assert_eq!(found(&other), expected);
}

unsafe extern "C" fn no_space(_: *mut sqlite3_file, _: *const c_void, _: c_int, _: sqlite3_int64) -> c_int {
    ffi::SQLITE_FULL
}

unsafe extern "C" fn reads(_: *mut sqlite3_file, _: *mut c_void, _: c_int, _: sqlite3_int64) -> c_int {
    SQLITE_OK
}

unsafe extern "C" fn synced(_: *mut sqlite3_file, _: c_int) -> c_int {
    SQLITE_OK
}

static FULL: sqlite3_io_methods =
    sqlite3_io_methods { xWrite: Some(no_space), xRead: Some(reads), xSync: Some(synced), ..METHODS };

#[test]
fn no_transaction_is_synced_whose_pages_were_not_taken_whoever_heard_of_it() {
    let mut of_database = File::with_room(64, false, METHODS).unwrap();
    let mut of_wal = File::with_room(64, true, METHODS).unwrap();
    // SAFETY: there is room for it.
    unsafe { of_wal.usual.as_mut_ptr().cast::<sqlite3_file>().write(sqlite3_file { pMethods: &raw const FULL }) };
    let of_wal = Box::into_raw(of_wal);
    of_database.other = of_wal;
    let mut handle = Handle { base: sqlite3_file { pMethods: &raw const FULL }, file: of_wal };
    let wal: *mut sqlite3_file = (&raw mut handle).cast();
    let page = [7_u8; 1_024];
    // SAFETY: it is a handle with a file, and is used as SQLite would.
    let put = |at| unsafe { write(wal, page.as_ptr().cast(), 1_024, at) };
    // SAFETY: as above.
    let look = || unsafe { read(wal, ptr::null_mut(), 0, 0) };
    // SAFETY: as above.
    let synced = || unsafe { sync(wal, 0) };
    let full = ffi::SQLITE_FULL;
    assert_eq!((put(32), look(), look()), (SQLITE_OK, full, SQLITE_OK), "a reader hears of it, once");
    assert_eq!((synced(), put(1_056), synced()), (full, full, full));
    of_database.give_of_wal(false);
    assert_eq!(synced(), full, "a barrier ends no transaction");
    of_database.give_of_wal(true);
    assert_eq!(synced(), SQLITE_OK, "the next transaction has nothing to do with it");
    // SAFETY: it was a box, and nobody uses it after this.
    drop(unsafe { Box::from_raw(of_wal) });
}

#[test]
fn what_is_held_follows_in_a_row_and_has_an_end() {
    let mut held = Held::with_room().unwrap();
    assert!(held.take_in(&[1; 24], 32) && held.take_in(&[2; 1024], 56));
    assert!(!held.take_in(&[3; 24], 56), "over what is held");
    assert!(!held.take_in(&[3; 24], 1_081), "behind a gap");
    assert!(!held.take_in(&vec![3; MOST], 1_080), "no room");
    assert_eq!((held.at, held.bytes.len()), (32, 1_048));
    assert!(!Held::default().take_in(&[1], 0), "a database holds nothing");
}
