//! What can go wrong between here and the server, and what that says about whether something was written.

use std::fmt;

use super::hrana::ServerError;
use crate::store::{StoreError, StoreErrorKind};

/// What kind of fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// The request never reached the server, or was turned away at its door.
    NotSent,
    /// The server's certificate, or the encryption itself, is refused: no request was sent.
    Untrusted,
    /// The server does not accept the token.
    NoAccess,
    /// The token may only read.
    ReadOnly,
    /// The request was sent, and no answer that can be read came back.
    Lost,
    /// Somebody else is writing, or the server is at its limits. Nothing was written.
    Busy,
    /// A value is beyond what the server takes. Nothing was written.
    TooLarge,
    /// An answer is beyond what the server gives.
    AnswerTooLarge,
    /// A row of the answer holds text that is not UTF-8.
    Garbled,
    /// The server has no space left. Nothing was written.
    Full,
    /// The server's own disk or files fail it. Nothing was written.
    Disk,
    /// The server has no memory left. Nothing was written.
    Memory,
    /// The database is damaged.
    Corrupt,
    /// The server refuses the statement, or what answers there is no libSQL server.
    Refused,
    /// The transaction failed where nobody can say what became of it.
    AtCommit,
}

/// A fault, in words.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) class: Class,
    question: bool,
    message: String,
}

impl Fault {
    pub(super) fn new(class: Class, message: impl fmt::Display) -> Self {
        Self { class, question: false, message: message.to_string() }
    }

    /// What the server says about a statement.
    pub(super) fn of_statement(error: &ServerError) -> Self {
        let text = error.message.as_str();
        let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
        let class = match error.code() {
            "SQLITE_BUSY" | "SQLITE_LOCKED" | "TRANSACTION_TIMEOUT" | "TRANSACTION_BUSY" => Class::Busy,
            "SQLITE_FULL" => Class::Full,
            "SQLITE_NOMEM" => Class::Memory,
            code if code.starts_with("SQLITE_IOERR") || code.starts_with("SQLITE_CANTOPEN") => Class::Disk,
            "SQLITE_CORRUPT" | "SQLITE_NOTADB" => Class::Corrupt,
            "SQLITE_READONLY" | "BLOCKED" | "SQL_WRITE_BLOCKED" => Class::ReadOnly,
            "SQLITE_AUTH" => Class::NoAccess,
            "SQLITE_TOOBIG" => Class::TooLarge,
            "RESPONSE_TOO_LARGE" => Class::AnswerTooLarge,
            "ARGS_INVALID" if says(&["too big"]) => Class::TooLarge,
            // Some servers send the words without a code.
            _ if says(&["database is locked", "SQLITE_BUSY", "Transaction timed-out", "interactive transaction"]) => Class::Busy,
            _ if says(&["too big"]) => Class::TooLarge,
            _ if says(&["database or disk is full"]) => Class::Full,
            _ if says(&["disk I/O error", "unable to open database file"]) => Class::Disk,
            _ if says(&["out of memory"]) => Class::Memory,
            _ if says(&["malformed", "not a database"]) => Class::Corrupt,
            _ if says(&["readonly", "read-only", "Writes are blocked", "not authorized", "forbidden"]) => Class::ReadOnly,
            _ => Class::Refused,
        };
        Self::new(class, short(text))
    }

    /// The same fault with words that do not hold the token: a server, or what stands before it, may repeat what it was sent.
    pub(super) fn without(mut self, token: Option<&str>) -> Self {
        if let Some(token) = token {
            self.message = hide(&self.message, token);
        }
        self
    }

    /// What it says, for who knows the server's words.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The fault of a question: nothing can have been written, whatever became of it.
    pub(super) fn of_question(mut self) -> Self {
        self.question = true;
        self
    }

    /// Whether it is certain that the request changed nothing.
    pub(super) fn is_certain(&self) -> bool {
        self.question || !matches!(self.class, Class::Lost | Class::AtCommit)
    }

    /// The fault as callers of storage see it. `place` is the server, without its token.
    pub(super) fn into_error(self, place: impl fmt::Display) -> StoreError {
        let (kind, mend) = match self.class {
            Class::NotSent => (StoreErrorKind::Unavailable, "check that the server runs and that database_url names it"),
            Class::Untrusted => (
                StoreErrorKind::Input,
                "check the name in database_url and the server's certificate; a private authority is named by database_ca_file",
            ),
            Class::NoAccess => (
                StoreErrorKind::Input,
                "give a valid token in database_url, SEEKNAL_DATABASE_TOKEN or the option database_token; it may have expired",
            ),
            Class::ReadOnly => (StoreErrorKind::ReadOnly, "use a token that may write"),
            Class::Lost | Class::AtCommit => (StoreErrorKind::Unavailable, "the connection or the server failed in the middle"),
            Class::Busy => (
                StoreErrorKind::Busy,
                "another process is writing (see who with `seeknal state locks`), or the server is at its limits; try again",
            ),
            Class::TooLarge => (StoreErrorKind::Input, "the server takes values of up to 5 MB; make it smaller"),
            Class::AnswerTooLarge => (StoreErrorKind::Io, "a single row is beyond what the server answers with"),
            Class::Full => (StoreErrorKind::Full, "free some space on the server; nothing is lost"),
            Class::Disk => (StoreErrorKind::Io, "check the server's disk and its log"),
            Class::Memory => (StoreErrorKind::Busy, "the server has no room for this now; raise its limits or try again"),
            Class::Corrupt | Class::Garbled => {
                (StoreErrorKind::Corrupt, "it was left as it is; `seeknal state verify` says more, a backup brings it back")
            }
            Class::Refused => (StoreErrorKind::Io, "check that it is a libSQL server, and its log"),
        };
        let message = format!("{place}: {}; {mend}", self.message);
        let error = if self.is_certain() { StoreError::not_applied(kind, message) } else { StoreError::unknown(kind, message) };
        if self.class == Class::TooLarge { error.of_one_entry() } else { error }
    }
}

/// A text without the token, and without any part of it that is long enough to be told apart from words.
pub(super) fn hide(text: &str, token: &str) -> String {
    const LONG: usize = 8;
    let mut hidden = text.to_owned();
    let parts = std::iter::once(token).chain(token.split('.').filter(|part| part.len() >= LONG));
    for part in parts.filter(|part| !part.is_empty()) {
        hidden = hidden.replace(part, "(not shown)");
    }
    // What was cut off in the middle of it.
    if let Some(start) = token.get(..LONG)
        && let Some((before, _)) = hidden.split_once(start)
    {
        hidden = format!("{before}(not shown)");
    }
    hidden
}

/// What a server says, in a length that fits a line; without what would break a terminal.
pub(super) fn short(text: &str) -> String {
    const SHOWN: usize = 300;
    let mut shown: String = text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// A stored value that cannot be read.
pub(super) fn corrupt(place: impl fmt::Display, why: impl fmt::Display) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Corrupt,
        format!("{place}: {why}; it was left as it is, mend the row with SQL or bring a backup back"),
    )
    .of_one_entry()
}
