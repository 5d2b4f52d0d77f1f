//! What SQLite's errors mean to callers.

use std::fmt;

use rusqlite::{Error, ErrorCode};

use crate::store::{StoreError, StoreErrorKind};

/// Somebody changed the tables.
const ALTERED: (StoreErrorKind, &str) = (
    StoreErrorKind::Foreign,
    "the tables are not as this version made them; undo what was altered or dropped by hand, or bring a backup back",
);

/// What kind of fault an error of SQLite is, and what usually mends it.
fn classify(error: &Error) -> (StoreErrorKind, &'static str) {
    match error {
        Error::SqliteFailure(failure, _) => match failure.code {
            ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => (
                StoreErrorKind::Busy,
                "another process is writing; see who with `seeknal state locks`, or with `fuser` on the file where that names nobody (another program has \
                     it open: a `sqlite3`, say), and try again",
            ),
            ErrorCode::DiskFull => (StoreErrorKind::Full, "free some space; nothing is lost"),
            ErrorCode::ReadOnly | ErrorCode::PermissionDenied => {
                (StoreErrorKind::ReadOnly, "check the permissions of the file and its folder")
            }
            ErrorCode::CannotOpen => (StoreErrorKind::Io, "check that the folder is there and may be written"),
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => {
                (StoreErrorKind::Corrupt, "it was left as it is; `seeknal state verify` says more, a backup brings it back")
            }
            ErrorCode::ConstraintViolation => (
                StoreErrorKind::Input,
                "a trigger, CHECK or index refuses the row; `SELECT name, sql FROM sqlite_schema` shows which, drop what was added by hand",
            ),
            ErrorCode::OutOfMemory => (
                StoreErrorKind::Unavailable,
                "memory ran out, nothing is lost; free some, or raise this process's limit, and try again",
            ),
            _ if is_of_tables(error) => ALTERED,
            ErrorCode::TooBig => (StoreErrorKind::Input, "a value is larger than the database takes; make it smaller"),
            // The shared index beside the database could not be made as long as it must be: in practice for want of space.
            _ if is_index_too_short(error) => (StoreErrorKind::Full, "free some space; nothing is lost"),
            // SQLite does not say why.
            _ if is_unwritten(error) => {
                (StoreErrorKind::Io, "the system refused to write: check quotas, the disk and the system's log")
            }
            _ => (StoreErrorKind::Io, "check the disk and the system's log"),
        },
        Error::FromSqlConversionFailure(..)
        | Error::IntegralValueOutOfRange(..)
        | Error::Utf8Error(..)
        | Error::InvalidColumnType(..) => {
            (StoreErrorKind::Corrupt, "a stored value makes no sense; `seeknal state verify` names it")
        }
        Error::SqlInputError { .. } if is_of_tables(error) => ALTERED,
        Error::InvalidPath(_) | Error::NulError(_) => (StoreErrorKind::Input, "choose another path"),
        _ => (StoreErrorKind::Io, "this should not happen; please report it"),
    }
}

/// Whether the error tells that a table or a column of ours is not there. SQLite has no number for it, only words.
fn is_of_tables(error: &Error) -> bool {
    let words = match error {
        Error::SqliteFailure(failure, Some(words)) if failure.code == ErrorCode::Unknown => words,
        Error::SqlInputError { msg, .. } => msg,
        _ => return false,
    };
    ["no such table", "no such column", "has no column named"].iter().any(|part| words.contains(part))
}

/// A fault of SQLite at a place; nothing has happened.
pub(super) fn sql_error(place: impl fmt::Display, error: Error) -> StoreError {
    let (kind, mend) = classify(&error);
    let fault = StoreError::not_applied(kind, format!("{place}: {error}; {mend}"));
    if is_of_value(&error) { fault.of_one_entry() } else { fault }.with_source(error)
}

/// Whether the error lies in a single value, stored or to be stored.
fn is_of_value(error: &Error) -> bool {
    match error {
        Error::FromSqlConversionFailure(..)
        | Error::IntegralValueOutOfRange(..)
        | Error::Utf8Error(..)
        | Error::InvalidColumnType(..) => true,
        // A constraint of somebody else's may well let the other rows pass.
        _ => matches!(error.sqlite_error_code(), Some(ErrorCode::TooBig | ErrorCode::ConstraintViolation)),
    }
}

/// A stored value that cannot be read.
pub(super) fn corrupt(place: impl fmt::Display, why: impl fmt::Display) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Corrupt,
        format!("{place}: {why}; it was left as it is, mend the row with SQL or bring a backup back"),
    )
    .of_one_entry()
}

/// Whether the error tells of the system's failure to write or sync, after which nobody knows what the disk has.
pub(super) fn is_io(error: &Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::SystemIoFailure))
}

/// Whether the error tells that the system refused a write: a quota, a file system that became read-only, a disk that takes no more.
pub(super) fn is_unwritten(error: &Error) -> bool {
    error.sqlite_error().is_some_and(|failure| failure.extended_code == rusqlite::ffi::SQLITE_IOERR_WRITE)
}

fn is_index_too_short(error: &Error) -> bool {
    error.sqlite_error().is_some_and(|failure| failure.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE)
}

/// Whether the error tells that no space was left.
pub(super) fn is_full(error: &Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DiskFull))
}

/// Whether the error tells of damage, or of a file that is no database.
pub(super) fn is_damage(error: &Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Whether the error tells that files beside the database cannot be made. The shared index is one; it takes space, also for reading.
pub(super) fn is_unwritable(error: &Error) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_SHMMAP, SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE};
    let is_index = |code| [SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMMAP].contains(&code);
    error.sqlite_error().is_some_and(|failure| is_index(failure.extended_code))
        || matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied))
}

#[cfg(test)]
mod tests {
    use rusqlite::ffi;

    use super::*;

    #[test]
    fn an_index_that_finds_no_room_is_told_as_a_full_disk() {
        let told = sql_error("state.db", Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_IOERR_SHMSIZE), None));
        assert_eq!(told.kind(), StoreErrorKind::Full);
        assert!(told.to_string().contains("free some space"), "{told}");
    }

    #[test]
    fn memory_that_ran_out_is_no_fault_of_the_disk() {
        let told = sql_error("state.db", Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_NOMEM), None));
        assert_eq!(told.kind(), StoreErrorKind::Unavailable);
        assert!(told.to_string().contains("memory ran out"), "{told}");
    }
}
