//! A file below SQLite: the usual VFS's own, and what is held of it.

use std::ffi::c_int;
use std::ptr;

use rusqlite::ffi::{SQLITE_IOERR, SQLITE_IOERR_WRITE, SQLITE_OK, sqlite3_file, sqlite3_io_methods};

/// So much is held at most, in bytes. SQLite's VFS for Unix must not be given more than 128 KiB less one byte at once: it takes a length of exactly that for
/// nothing, and tells a full disk.
pub(super) const MOST: usize = 127 << 10;

/// Bytes that were written in a row and are not in the file yet.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) at: i64,
    pub(super) bytes: Vec<u8>,
}

impl Held {
    /// Room is made once, so that no write fails for want of it.
    pub(super) fn with_room() -> Option<Self> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(MOST).ok()?;
        Some(Self { at: 0, bytes })
    }

    /// Takes bytes in, if they follow what is held and there is room for them: nothing ever, where no room was made.
    pub(super) fn take_in(&mut self, more: &[u8], at: i64) -> bool {
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

/// A database, or its WAL, that is open.
pub(super) struct File {
    /// What SQLite calls.
    pub(super) methods: sqlite3_io_methods,
    /// The usual VFS's own file: as many bytes as it asked for, where they stay.
    pub(super) usual: Box<[u64]>,
    /// Of a WAL: what is held.
    held: Held,
    /// What the system said when it did not take what was held, until the transaction has ended.
    pub(super) failed: c_int,
    /// Of a database its WAL, of a WAL its database, as long as both are open; else null.
    pub(super) other: *mut File,
}

impl File {
    /// Room for a file of the usual VFS, zero and aligned as SQLite's own is, and for what is held of a WAL.
    pub(super) fn with_room(length: c_int, is_wal: bool, methods: sqlite3_io_methods) -> Option<Box<Self>> {
        let words = usize::try_from(length).ok()?.div_ceil(size_of::<u64>());
        let mut usual = Vec::new();
        usual.try_reserve_exact(words).ok()?;
        usual.resize(words, 0);
        let held = if is_wal { Held::with_room()? } else { Held::default() };
        Some(Box::new(Self { methods, usual: usual.into_boxed_slice(), held, failed: SQLITE_OK, other: ptr::null_mut() }))
    }

    /// Of what the usual file does not have nothing is promised: SQLite asks for it, and can do without a shared index.
    pub(super) fn promise(&mut self) {
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
    pub(super) fn usual<F>(
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
    pub(super) fn then<F>(
        &mut self,
        pick: impl Fn(&sqlite3_io_methods) -> Option<F>,
        call: impl FnOnce(F, *mut sqlite3_file) -> c_int,
    ) -> c_int {
        match self.give() {
            SQLITE_OK => self.usual(pick, SQLITE_IOERR, call),
            failed => failed,
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8], at: i64) -> c_int {
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
    pub(super) fn give(&mut self) -> c_int {
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
    pub(super) fn give_of_wal(&mut self, ends: bool) {
        // SAFETY: it is null, or a WAL that is open: it takes itself out when it is closed. Nobody uses it meanwhile: SQLite is in a call of the database.
        if let Some(wal) = unsafe { self.other.as_mut() } {
            let _given_up = wal.give();
            if ends {
                wal.failed = SQLITE_OK;
            }
        }
    }
}
