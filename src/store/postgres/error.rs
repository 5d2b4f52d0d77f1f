//! What PostgreSQL's errors mean to callers. No text of ours and none of the driver's holds a password.

use std::error::Error as _;
use std::fmt;

use tokio_postgres::Error;
use tokio_postgres::error::{Severity, SqlState};

use crate::store::{StoreError, StoreErrorKind};

/// The server, or the role, may only read.
const STANDBY: (StoreErrorKind, &str) =
    (StoreErrorKind::ReadOnly, "the server is a standby or the role may only read; use the primary");

/// What kind of fault an error is, and what usually mends it.
fn classify(error: &Error) -> (StoreErrorKind, &'static str) {
    use StoreErrorKind as K;
    let Some(state) = error.code() else {
        if is_untrusted(error) {
            return (
                K::Input,
                "check the host's name in database_url, the server's certificate (of X.509 version 3, with the host as a subjectAltName) and sslmode; \
                 a private authority is named by sslrootcert or database_ca_file",
            );
        }
        if is_not_written_to(error) {
            return STANDBY;
        }
        if error.is_closed() || error.source().is_some_and(<dyn std::error::Error>::is::<std::io::Error>) {
            return (K::Unavailable, "the connection is gone; check the server and the network");
        }
        return (K::Unavailable, "check the server, the network and the URL's parameters");
    };
    match *state {
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            (K::Input, "check the user and the password in database_url or SEEKNAL_DATABASE_PASSWORD, and pg_hba.conf")
        }
        SqlState::INVALID_CATALOG_NAME => (K::NotFound, "create the database, or check its name in database_url"),
        SqlState::INSUFFICIENT_PRIVILEGE => (
            K::ReadOnly,
            "grant the role what it lacks: for reading USAGE on the schema and SELECT on its tables and sequences; who writes owns the schema",
        ),
        SqlState::READ_ONLY_SQL_TRANSACTION => STANDBY,
        SqlState::DISK_FULL => (K::Full, "free some space on the server; nothing is lost"),
        SqlState::OUT_OF_MEMORY | SqlState::TOO_MANY_CONNECTIONS | SqlState::CONFIGURATION_LIMIT_EXCEEDED => {
            (K::Busy, "the server has no room for this now; raise its limits or try again")
        }
        SqlState::LOCK_NOT_AVAILABLE => (
            K::Busy,
            "somebody holds a lock there for long (in pg_locks; another worker perhaps, see `seeknal state locks`); try again",
        ),
        SqlState::T_R_SERIALIZATION_FAILURE
        | SqlState::T_R_DEADLOCK_DETECTED
        | SqlState::QUERY_CANCELED
        | SqlState::UNIQUE_VIOLATION => {
            (K::Busy, "others write to the same rows; see who with `seeknal state locks`, and try again")
        }
        SqlState::DATA_CORRUPTED | SqlState::INDEX_CORRUPTED => {
            (K::Corrupt, "the database is damaged; it was left as it is, a backup brings it back")
        }
        SqlState::UNDEFINED_TABLE | SqlState::UNDEFINED_COLUMN | SqlState::INVALID_SCHEMA_NAME => {
            (K::Foreign, "the tables are not there any more, or not as this version made them; open the state anew")
        }
        _ if is_of_value(state) => (
            K::Input,
            "the server takes no such value; make it shorter (of a run, a node and a partition the ids together are at most 2,600 bytes there)",
        ),
        SqlState::IO_ERROR => (K::Io, "check the server's disk and its log"),
        // The server waited too long for us inside a transaction, which it took back.
        _ if state.code() == "25P03" => {
            (K::Unavailable, "this process was held up in the middle of a transaction; it is tried again")
        }
        // It would be longer than the server gives any transaction, which it took back.
        _ if state.code() == "25P04" => (
            K::Unavailable,
            "it took longer than the server's transaction_timeout; it is tried again, and has the time where that is 0 for this role",
        ),
        _ if state.code().starts_with("08") || state.code().starts_with("57P") => {
            (K::Unavailable, "the server ended the connection; it is starting, stopping, or an operator ended it")
        }
        _ => (K::Io, "check the server's log"),
    }
}

/// Whether the server takes a value for impossible, or for too long.
fn is_of_value(state: &SqlState) -> bool {
    state.code().starts_with("54") || state.code().starts_with("22")
}

/// Whether what protects the connection is refused, on this side or on the other: trying again does not help.
fn is_untrusted(error: &(dyn std::error::Error + 'static)) -> bool {
    use rustls::Error as Tls;
    if let Some(tls) = error.downcast_ref::<Tls>() {
        return matches!(
            tls,
            Tls::InvalidCertificate(_)
                | Tls::NoCertificatesPresented
                | Tls::UnsupportedNameType
                | Tls::PeerIncompatible(_)
                | Tls::AlertReceived(_)
        );
    }
    // The driver's own words; it has no kind for them.
    if error.to_string() == "server does not support TLS" {
        return true;
    }
    // An error of the system tells what it wraps by another way than what caused it.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|wrapped| is_untrusted(wrapped)) || error.source().is_some_and(is_untrusted)
}

/// The error in words. The driver prints "db error" and keeps the rest for those who ask.
pub(super) fn words(error: &Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} (SQLSTATE {})", db.message(), db.code().code());
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = source.source();
    }
    text
}

/// A fault of PostgreSQL at a place; nothing has happened.
pub(super) fn sql_error(place: impl fmt::Display, error: Error) -> StoreError {
    let words = format!("{place}: {}", words(&error));
    sql_error_as(&words, error)
}

/// The same, in other words.
pub(super) fn sql_error_as(words: &str, error: Error) -> StoreError {
    let (kind, mend) = classify(&error);
    let fault = StoreError::not_applied(kind, format!("{words}; {mend}"));
    if error.code().is_some_and(is_of_value) { fault.of_one_entry() } else { fault }.with_source(error)
}

/// Whether a server refused a statement, and goes on with the session.
pub(super) fn is_refused(error: &Error) -> bool {
    error.as_db_error().is_some_and(|db| db.parsed_severity() == Some(Severity::Error) && !db.code().code().starts_with("08"))
}

/// A stored value that cannot be read.
pub(super) fn corrupt(place: impl fmt::Display, why: impl fmt::Display) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Corrupt,
        format!("{place}: {why}; it was left as it is, mend the row with SQL or bring a backup back"),
    )
    .of_one_entry()
}

/// What the driver said.
fn driver_error(error: &StoreError) -> Option<&Error> {
    let mut causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.find_map(|cause| cause.downcast_ref::<Error>())
}

/// What the server called it.
fn state_of(error: &StoreError) -> Option<&SqlState> {
    driver_error(error)?.code()
}

/// Whether the last of several hosts could not be written to: the driver's own words.
fn is_not_written_to(error: &Error) -> bool {
    error.source().is_some_and(|source| source.to_string() == "database does not allow writes")
}

/// Whether no connection was made because none of the hosts can be written to, as far as they answer.
pub(super) fn is_without_primary(error: &StoreError) -> bool {
    driver_error(error).is_some_and(is_not_written_to)
}

/// Whether the session only reads: its server was made a standby, perhaps, and another one of several is written to.
pub(super) fn is_of_standby(error: &StoreError) -> bool {
    state_of(error) == Some(&SqlState::READ_ONLY_SQL_TRANSACTION)
}

/// Whether the server ended a statement because it took too long, or waited too long for a lock, or because an operator said so.
pub(super) fn is_canceled(error: &StoreError) -> bool {
    state_of(error).is_some_and(|state| matches!(*state, SqlState::QUERY_CANCELED | SqlState::LOCK_NOT_AVAILABLE))
}

/// Whether a question had to give way: what only reads comes into no conflict but with what a standby follows.
pub(super) fn is_of_recovery(error: &StoreError) -> bool {
    state_of(error) == Some(&SqlState::T_R_SERIALIZATION_FAILURE)
}

/// What is said of a question that had to give way each time it was asked.
pub(super) fn gave_way(place: impl fmt::Display, times: u32, error: StoreError) -> StoreError {
    let why = "as it stood in the way of what the primary did; set hot_standby_feedback or a longer max_standby_streaming_delay there, or read at the primary";
    let message = format!("{place}: the standby ended what was read {times} times, one after another (SQLSTATE 40001), {why}");
    StoreError::not_applied(StoreErrorKind::Busy, message).with_source(error)
}

/// Whether what a batch took for granted is not so: its runs were moved on, or it was sent before. Whatever else a server calls so is told when the batch is decided
/// on what is stored.
pub(super) fn is_met_by_others(error: &StoreError) -> bool {
    state_of(error).is_some_and(|state| matches!(*state, SqlState::INVALID_TEXT_REPRESENTATION | SqlState::UNIQUE_VIOLATION))
}

/// Whether a transaction that was not committed may go through when it is tried again: it met others, or the connection is gone.
pub(super) fn is_passing(error: &StoreError) -> bool {
    error.kind() == StoreErrorKind::Unavailable
        || state_of(error).is_some_and(|state| {
            matches!(
                *state,
                SqlState::T_R_SERIALIZATION_FAILURE
                    | SqlState::T_R_DEADLOCK_DETECTED
                    | SqlState::UNIQUE_VIOLATION
                    | SqlState::TOO_MANY_CONNECTIONS
            )
        })
}
