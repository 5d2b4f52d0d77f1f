//! Gathers what SQLite writes to the WAL: one call to the system for many pages.
//!
//! SQLite writes every page of a transaction in two calls (the head of a frame, then the page), and the calls cost more than the bytes. The writer's
//! connection is opened through a VFS (SQLite's word for what stands between it and the system) that is the usual one but for the WAL: what is written
//! there in a row is held, and given to the system at once
//!
//! - before anything else is done with the file. A transaction counts once SQLite has synced the WAL behind its last page (`synchronous=FULL`, which an
//!   opening reads back): what is committed was written, in the same order as ever, and a write that fails makes the commit fail;
//! - before others are told anything by the shared index, or get a lock in it: what an abandoned transaction wrote must never come after what the next
//!   process writes in its place.
//!
//! Readers, checkpoints and other programs open the same files in the usual way, and so does the writer where SQLite does not take the VFS: it is slower
//! then, and nothing else.
//!
//! This is the one module with `unsafe` code: SQLite asks for a VFS in C's terms, and no well-kept library wraps one that has a WAL.
#![expect(unsafe_code, reason = "SQLite takes a VFS as tables of C functions")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use rusqlite::ffi::{
    self, SQLITE_CANTOPEN, SQLITE_IOERR, SQLITE_IOERR_WRITE, SQLITE_NOMEM, SQLITE_OK, SQLITE_OPEN_MAIN_DB, SQLITE_OPEN_WAL,
    SQLITE_SHM_EXCLUSIVE, SQLITE_SHM_UNLOCK, sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs,
};

/// The name by which connections ask for it.
const NAME: &CStr = c"seeknal-wal";

/// So much is held at most, in bytes. SQLite's VFS for Unix must not be given more than 128 KiB less one byte at once: it takes a length of exactly that for
/// nothing, and tells a full disk.
const MOST: usize = 127 << 10;

/// The lock that whoever writes to the WAL holds, by its number in the shared index.
const WRITE_LOCK: c_int = 0;

/// What stands below: SQLite's default when the first database was opened.
static USUAL: AtomicPtr<sqlite3_vfs> = AtomicPtr::new(ptr::null_mut());

/// The name of the VFS, for a connection that writes; `None` where SQLite did not take it.
pub(super) fn vfs() -> Option<&'static CStr> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    REGISTERED.get_or_init(register).then_some(NAME)
}

fn register() -> bool {
    // SAFETY: asked for no name, SQLite answers with its default VFS, which stays valid, or with null.
    let usual = unsafe { ffi::sqlite3_vfs_find(ptr::null()) };
    // SAFETY: it is valid if it is not null, and read before anything is registered.
    let Some(theirs) = (unsafe { usual.as_ref() }) else { return false };
    let Ok(own) = c_int::try_from(size_of::<Handle>()) else { return false };
    USUAL.store(usual, Ordering::Release);
    // All that is not named here is the usual one's, with what it needs in `pAppData`.
    let ours = sqlite3_vfs {
        pNext: ptr::null_mut(),
        zName: NAME.as_ptr(),
        szOsFile: theirs.szOsFile.max(own),
        xOpen: Some(open),
        ..*theirs
    };
    // SAFETY: it lives as long as the process, and so does its name.
    unsafe { ffi::sqlite3_vfs_register(Box::leak(Box::new(ours)), 0) == SQLITE_OK }
}

/// Bytes that were written in a row and are not in the file yet.
#[derive(Debug, Default)]
struct Held {
    at: i64,
    bytes: Vec<u8>,
}

impl Held {
    /// Room is made once, so that no write fails for want of it.
    fn with_room() -> Option<Self> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(MOST).ok()?;
        Some(Self { at: 0, bytes })
    }

    /// Takes bytes in, if they follow what is held and there is room for them: nothing ever, where no room was made.
    fn take_in(&mut self, more: &[u8], at: i64) -> bool {
        let Ok(length) = i64::try_from(self.bytes.len()) else { return false };
        let follows = self.bytes.is_empty() || self.at.checked_add(length) == Some(at);
        if !follows || more.len() > MOST.min(self.bytes.capacity()).saturating_sub(self.bytes.len()) {
            return false;
        }
        if self.bytes.is_empty() {
            self.at = at;
        }
        self.bytes.extend_from_slice(more);
        true
    }
}

/// A file as SQLite holds it: first what it wants to find there.
#[repr(C)]
struct Handle {
    base: sqlite3_file,
    file: *mut File,
}

/// A database, or its WAL, that is open.
struct File {
    /// What SQLite calls.
    methods: sqlite3_io_methods,
    /// The usual VFS's own file: as many bytes as it asked for, where they stay.
    usual: Box<[u64]>,
    /// Of a WAL: what is held.
    held: Held,
    /// What the system said when it did not take what was held, until the transaction has ended.
    failed: c_int,
    /// Of a database its WAL, of a WAL its database, as long as both are open; else null.
    other: *mut File,
}

impl File {
    /// Of what the usual file does not have nothing is promised: SQLite asks for it, and can do without a shared index.
    fn promise(&mut self) {
        let mut methods = self.methods;
        self.usual(
            |m| Some(*m),
            SQLITE_OK,
            |theirs, _| {
                methods.iVersion = methods.iVersion.min(theirs.iVersion);
                if theirs.iVersion < 2 || theirs.xShmMap.is_none() {
                    methods.xShmMap = None;
                }
                SQLITE_OK
            },
        );
        self.methods = methods;
    }

    /// Calls a function of the usual VFS's file; where it has none, this fails with `absent`.
    fn usual<F>(
        &mut self,
        pick: impl Fn(&sqlite3_io_methods) -> Option<F>,
        absent: c_int,
        call: impl FnOnce(F, *mut sqlite3_file) -> c_int,
    ) -> c_int {
        let file: *mut sqlite3_file = self.usual.as_mut_ptr().cast();
        // SAFETY: its bytes were zero before the usual VFS opened it: its methods are null, or set and valid.
        let methods = unsafe { (*file).pMethods.as_ref() };
        match methods.and_then(pick) {
            Some(function) => call(function, file),
            None => absent,
        }
    }

    /// Gives what is held, and then does something else with the file.
    fn then<F>(
        &mut self,
        pick: impl Fn(&sqlite3_io_methods) -> Option<F>,
        call: impl FnOnce(F, *mut sqlite3_file) -> c_int,
    ) -> c_int {
        match self.give() {
            SQLITE_OK => self.usual(pick, SQLITE_IOERR, call),
            failed => failed,
        }
    }

    fn write(&mut self, bytes: &[u8], at: i64) -> c_int {
        if self.failed != SQLITE_OK {
            return self.failed;
        }
        if self.held.take_in(bytes, at) {
            return SQLITE_OK;
        }
        let given = self.give();
        if given != SQLITE_OK || self.held.take_in(bytes, at) {
            return given;
        }
        self.write_through(bytes, at)
    }

    /// Gives what is held to the system. What it did not take is forgotten, and nothing is written or synced any more before the transaction has ended:
    /// whoever hears of it may be a reader, behind whom SQLite would go on and commit without these pages.
    fn give(&mut self) -> c_int {
        if self.held.bytes.is_empty() {
            return SQLITE_OK;
        }
        let held = std::mem::take(&mut self.held);
        let given = self.write_through(&held.bytes, held.at);
        self.held = held;
        self.held.bytes.clear();
        self.failed = given;
        given
    }

    fn write_through(&mut self, bytes: &[u8], at: i64) -> c_int {
        let Ok(length) = c_int::try_from(bytes.len()) else { return SQLITE_IOERR_WRITE };
        // SAFETY: the bytes are there for the length of the call.
        self.usual(|m| m.xWrite, SQLITE_IOERR_WRITE, |write, file| unsafe { write(file, bytes.as_ptr().cast(), length, at) })
    }

    /// Of a database: gives what its WAL holds, before others may go on; `ends`: with that the transaction has ended. What fails here is of one that was
    /// given up: none is committed before the WAL was synced.
    fn give_of_wal(&mut self, ends: bool) {
        // SAFETY: it is null, or a WAL that is open: it takes itself out when it is closed. Nobody uses it meanwhile: SQLite is in a call of the database.
        if let Some(wal) = unsafe { self.other.as_mut() } {
            let _given_up = wal.give();
            if ends {
                wal.failed = SQLITE_OK;
            }
        }
    }
}

/// What SQLite hands back.
///
/// # Safety
/// `handle` was opened by [`open`] as one of ours and is not closed; it is used by one thread at a time.
unsafe fn file<'f>(handle: *mut sqlite3_file) -> &'f mut File {
    // SAFETY: `open` made it a handle with a file of its own.
    unsafe { &mut *(*handle.cast::<Handle>()).file }
}

/// # Safety
/// As SQLite calls a VFS: `handle` has room for `szOsFile` bytes, aligned for any number, and `name` is one of SQLite's.
unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    handle: *mut sqlite3_file,
    flags: c_int,
    found: *mut c_int,
) -> c_int {
    let vfs = USUAL.load(Ordering::Acquire);
    // SAFETY: it was set before this function was given to SQLite, and stays valid.
    let (theirs, length) = unsafe { ((*vfs).xOpen, (*vfs).szOsFile) };
    let Some(theirs) = theirs else { return SQLITE_CANTOPEN };
    if flags & (SQLITE_OPEN_MAIN_DB | SQLITE_OPEN_WAL) == 0 {
        // SAFETY: what SQLite gave is passed on, and there is room for what the usual one asks for.
        return unsafe { theirs(vfs, name, handle, flags, found) };
    }
    // SAFETY: there is room for a handle. Without methods SQLite does not close what could not be opened.
    unsafe { (*handle).pMethods = ptr::null() };
    let is_wal = flags & SQLITE_OPEN_WAL != 0;
    let Some(mut opened) = File::with_room(length, is_wal) else { return SQLITE_NOMEM };
    // SAFETY: there are as many bytes as the usual one asks for, zero and aligned as SQLite's own are.
    let answer = unsafe { theirs(vfs, name, opened.usual.as_mut_ptr().cast(), flags, found) };
    if answer != SQLITE_OK {
        // Who sets its methods wants to be closed, whatever it answers.
        // SAFETY: as SQLite would.
        opened.usual(|m| m.xClose, SQLITE_OK, |close, file| unsafe { close(file) });
        return answer;
    }
    opened.promise();
    let opened = Box::into_raw(opened);
    if is_wal {
        // SAFETY: for the name of a WAL that a pager gave, SQLite tells the file of the database, which was opened here (no other
        // VFS stands above this one) and is closed behind the WAL. Both are valid, and nobody else uses them.
        unsafe {
            let database = (*ffi::sqlite3_database_file_object(name).cast::<Handle>()).file;
            (*opened).other = database;
            (*database).other = opened;
        }
    }
    // SAFETY: there is room for a handle, and the methods stay where they are until the file is closed.
    unsafe {
        handle.cast::<Handle>().write(Handle { base: sqlite3_file { pMethods: &raw const (*opened).methods }, file: opened });
    };
    SQLITE_OK
}

impl File {
    /// Room for a file of the usual VFS, and for what is held of a WAL.
    fn with_room(length: c_int, is_wal: bool) -> Option<Box<Self>> {
        let words = usize::try_from(length).ok()?.div_ceil(size_of::<u64>());
        let mut usual = Vec::new();
        usual.try_reserve_exact(words).ok()?;
        usual.resize(words, 0);
        let held = if is_wal { Held::with_room()? } else { Held::default() };
        Some(Box::new(Self {
            methods: METHODS,
            usual: usual.into_boxed_slice(),
            held,
            failed: SQLITE_OK,
            other: ptr::null_mut(),
        }))
    }
}

/// What we have of SQLite's functions for a file.
const METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 3,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: Some(fetch),
    xUnfetch: Some(unfetch),
};

// All that follow are called by SQLite alone, with a file that `open` opened and that is not closed, and with what the usual VFS's own functions may be
// called with. That is passed on, and is what "as SQLite calls it" means.

unsafe extern "C" fn close(handle: *mut sqlite3_file) -> c_int {
    let handle: *mut Handle = handle.cast();
    // SAFETY: as SQLite calls it, this is a handle of ours with a file that was a box, and nobody uses it after this.
    let mut closed = unsafe {
        (*handle).base.pMethods = ptr::null();
        Box::from_raw((*handle).file)
    };
    let given = closed.give();
    // SAFETY: it is null, or the other of the two, which is open.
    if let Some(other) = unsafe { closed.other.as_mut() } {
        other.other = ptr::null_mut();
    }
    // SAFETY: as SQLite calls it.
    let done = closed.usual(|m| m.xClose, SQLITE_IOERR, |close, file| unsafe { close(file) });
    if given == SQLITE_OK { done } else { given }
}

unsafe extern "C" fn write(handle: *mut sqlite3_file, bytes: *const c_void, length: c_int, at: sqlite3_int64) -> c_int {
    // SAFETY: as SQLite calls it.
    let file = unsafe { file(handle) };
    let Ok(length) = usize::try_from(length) else { return SQLITE_IOERR_WRITE };
    if bytes.is_null() || length == 0 {
        return SQLITE_OK;
    }
    // SAFETY: SQLite gives so many bytes, and keeps them for the length of the call.
    file.write(unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), length) }, at)
}

unsafe extern "C" fn read(handle: *mut sqlite3_file, into: *mut c_void, length: c_int, at: sqlite3_int64) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xRead, |read, file| read(file, into, length, at)) }
}

unsafe extern "C" fn truncate(handle: *mut sqlite3_file, length: sqlite3_int64) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xTruncate, |truncate, file| truncate(file, length)) }
}

unsafe extern "C" fn sync(handle: *mut sqlite3_file, flags: c_int) -> c_int {
    // SAFETY: as SQLite calls it.
    let file = unsafe { file(handle) };
    if file.failed != SQLITE_OK {
        return file.failed;
    }
    // SAFETY: as SQLite calls it.
    file.then(|m| m.xSync, |sync, file| unsafe { sync(file, flags) })
}

unsafe extern "C" fn file_size(handle: *mut sqlite3_file, length: *mut sqlite3_int64) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xFileSize, |file_size, file| file_size(file, length)) }
}

unsafe extern "C" fn lock(handle: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xLock, |lock, file| lock(file, level)) }
}

unsafe extern "C" fn unlock(handle: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xUnlock, |unlock, file| unlock(file, level)) }
}

unsafe extern "C" fn check_reserved_lock(handle: *mut sqlite3_file, is_locked: *mut c_int) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xCheckReservedLock, |check_reserved_lock, file| check_reserved_lock(file, is_locked)) }
}

unsafe extern "C" fn file_control(handle: *mut sqlite3_file, what: c_int, argument: *mut c_void) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xFileControl, |file_control, file| file_control(file, what, argument)) }
}

unsafe extern "C" fn shm_map(
    handle: *mut sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    into: *mut *mut c_void,
) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xShmMap, |shm_map, file| shm_map(file, region, size, extend, into)) }
}

unsafe extern "C" fn shm_unmap(handle: *mut sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: as SQLite calls it.
    let file = unsafe { file(handle) };
    // Its locks go with it.
    file.give_of_wal(true);
    // SAFETY: as SQLite calls it.
    file.usual(|m| m.xShmUnmap, SQLITE_IOERR, |unmap, file| unsafe { unmap(file, delete) })
}

unsafe extern "C" fn fetch(handle: *mut sqlite3_file, at: sqlite3_int64, length: c_int, into: *mut *mut c_void) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xFetch, |fetch, file| fetch(file, at, length, into)) }
}

unsafe extern "C" fn unfetch(handle: *mut sqlite3_file, at: sqlite3_int64, page: *mut c_void) -> c_int {
    // SAFETY: as SQLite calls it.
    unsafe { file(handle).then(|m| m.xUnfetch, |unfetch, file| unfetch(file, at, page)) }
}

unsafe extern "C" fn sector_size(handle: *mut sqlite3_file) -> c_int {
    // SAFETY: as SQLite calls it. Zero stands for the usual size.
    unsafe { file(handle).usual(|m| m.xSectorSize, 0, |size, file| size(file)) }
}

unsafe extern "C" fn device_characteristics(handle: *mut sqlite3_file) -> c_int {
    // SAFETY: as SQLite calls it. Zero promises nothing.
    unsafe { file(handle).usual(|m| m.xDeviceCharacteristics, 0, |tell, file| tell(file)) }
}

unsafe extern "C" fn shm_lock(handle: *mut sqlite3_file, from: c_int, locks: c_int, flags: c_int) -> c_int {
    // SAFETY: as SQLite calls it.
    let file = unsafe { file(handle) };
    if flags & SQLITE_SHM_UNLOCK != 0 {
        file.give_of_wal(flags & SQLITE_SHM_EXCLUSIVE != 0 && from == WRITE_LOCK);
    }
    // SAFETY: as SQLite calls it.
    file.usual(|m| m.xShmLock, SQLITE_IOERR, |lock, file| unsafe { lock(file, from, locks, flags) })
}

unsafe extern "C" fn shm_barrier(handle: *mut sqlite3_file) {
    // SAFETY: as SQLite calls it.
    let file = unsafe { file(handle) };
    file.give_of_wal(false);
    file.usual(
        |m| m.xShmBarrier,
        SQLITE_OK,
        |barrier, file| {
            // SAFETY: as SQLite calls it.
            unsafe { barrier(file) };
            SQLITE_OK
        },
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::path::Path;

    use rusqlite::{Connection, OpenFlags, params};

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
        let mut of_database = File::with_room(64, false).unwrap();
        let mut of_wal = File::with_room(64, true).unwrap();
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
}
