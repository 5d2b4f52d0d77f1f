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

mod file;
#[cfg(test)]
mod tests;

use file::File;

/// The name by which connections ask for it.
const NAME: &CStr = c"seeknal-wal";

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

/// A file as SQLite holds it: first what it wants to find there.
#[repr(C)]
struct Handle {
    base: sqlite3_file,
    file: *mut File,
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
    let Some(mut opened) = File::with_room(length, is_wal, METHODS) else { return SQLITE_NOMEM };
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
