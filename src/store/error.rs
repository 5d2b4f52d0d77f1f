//! Errors of storage: what happened, where, what to do, and whether anything was written.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// What kind of fault it is; callers decide by it, people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// Somebody else has it: a second writer, a held lock, a busy database. Trying again may help.
    Busy,
    /// A move of a state into it was cut off, and a part may be missing: it opens for reading only until somebody ends the move, or gives it up. The message says
    /// how. Trying again does not help.
    Unfinished,
    /// It may only be read: a read-only folder, mount, token or opening.
    ReadOnly,
    /// No space is left. Nothing is lost; the service goes on when there is space again.
    Full,
    /// The system refused or failed to read or write.
    Io,
    /// What is stored is damaged. It was left as it is.
    Corrupt,
    /// What is stored was written by a newer version. It was left as it is.
    NewerFormat,
    /// What is stored belongs to another program. It was left as it is.
    Foreign,
    /// Something that was asked for is not there.
    NotFound,
    /// The value, path, name or setting makes no sense.
    Input,
    /// This backend or this build cannot do it.
    Unsupported,
    /// After a failure that cannot be healed while it is open, this opening refuses to write. Open it anew.
    Poisoned,
    /// It was closed.
    Closed,
    /// It cannot be reached now.
    Unavailable,
}

impl fmt::Display for StoreErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy => "busy",
            Self::Unfinished => "unfinished",
            Self::ReadOnly => "read-only",
            Self::Full => "full",
            Self::Io => "input/output",
            Self::Corrupt => "damaged",
            Self::NewerFormat => "newer format",
            Self::Foreign => "foreign",
            Self::NotFound => "not found",
            Self::Input => "bad input",
            Self::Unsupported => "unsupported",
            Self::Poisoned => "poisoned",
            Self::Closed => "closed",
            Self::Unavailable => "unavailable",
        })
    }
}

/// A fault of storage. Cheap to clone: one failed flush answers every waiter.
#[derive(Debug, Clone)]
pub struct StoreError {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: StoreErrorKind,
    unknown: bool,
    of_one: bool,
    never: bool,
    message: String,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl StoreError {
    /// A fault after which nothing of what was asked has happened. The message names the place and the mend.
    pub fn not_applied(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self::of(Inner { kind, unknown: false, of_one: false, never: false, message: message.into(), source: None })
    }

    /// A fault after which nobody knows whether it has happened.
    pub fn unknown(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self::of(Inner { kind, unknown: true, of_one: false, never: false, message: message.into(), source: None })
    }

    fn of(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// The same fault and its source, said of the outcome in another way.
    fn again(&self, unknown: bool, of_one: bool, never: bool) -> Self {
        let Inner { kind, message, source, .. } = &*self.inner;
        Self::of(Inner { kind: *kind, unknown, of_one, never, message: message.clone(), source: source.clone() })
    }

    /// A fault of the operating system at a place; nothing has happened. Says what usually mends it.
    pub fn io(place: impl fmt::Display, error: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let (kind, mend) = match error.kind() {
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => (StoreErrorKind::Full, "free some space; nothing is lost"),
            K::PermissionDenied => (StoreErrorKind::ReadOnly, "check the permissions of the file and its folder"),
            K::ReadOnlyFilesystem => (StoreErrorKind::ReadOnly, "the file system is mounted read-only"),
            K::NotFound => (StoreErrorKind::NotFound, "check the path"),
            K::IsADirectory => {
                (StoreErrorKind::Input, "a folder lies where a file should be; move it aside, or name another place")
            }
            K::NotADirectory => {
                (StoreErrorKind::Input, "a file lies where a folder should be; move it aside, or name another place")
            }
            K::InvalidFilename => (StoreErrorKind::Input, "name another, shorter path"),
            #[cfg(any(feature = "file", feature = "sqlite", feature = "project"))]
            _ if super::plain::is_none(&error) => (StoreErrorKind::Input, "move it aside"),
            _ => (StoreErrorKind::Io, "check the disk and the system's log"),
        };
        let message = format!("{place}: {error}; {mend}");
        Self::of(Inner { kind, unknown: false, of_one: false, never: false, message, source: Some(Arc::new(error)) })
    }

    /// A backend was asked for something that it cannot do.
    pub fn unsupported(backend: &str, what: &str) -> Self {
        Self::not_applied(StoreErrorKind::Unsupported, format!("the {backend} backend does not support {what}"))
    }

    /// The backend was closed.
    pub fn closed() -> Self {
        Self::not_applied(StoreErrorKind::Closed, "the state was closed; open it again")
    }

    /// The same fault with the error that it came from.
    #[must_use]
    pub fn with_source(self, source: impl StdError + Send + Sync + 'static) -> Self {
        let Inner { kind, unknown, of_one, never, message, .. } = &*self.inner;
        let (kind, unknown, of_one, never) = (*kind, *unknown, *of_one, *never);
        Self::of(Inner { kind, unknown, of_one, never, message: message.clone(), source: Some(Arc::new(source)) })
    }

    /// The same fault, with more words.
    #[cfg(feature = "file")]
    pub(crate) fn and(self, more: impl fmt::Display) -> Self {
        let Inner { kind, unknown, of_one, never, message, source } = &*self.inner;
        let (kind, unknown, of_one, never, message) = (*kind, *unknown, *of_one, *never, format!("{message}{more}"));
        Self::of(Inner { kind, unknown, of_one, never, message, source: source.clone() })
    }

    /// The same fault of a batch, which lies in what one of its entries is or touches (a value that is too large, a row that cannot be read): sent without
    /// that one, the others may well be written. A backend that says so is sent the entries again in smaller batches, so that only the guilty one is told.
    #[must_use]
    pub fn of_one_entry(self) -> Self {
        self.again(self.inner.unknown, true, self.inner.never)
    }

    /// Whether a batch failed for one of its entries; see [`of_one_entry`](Self::of_one_entry).
    pub fn is_of_one_entry(&self) -> bool {
        self.inner.of_one
    }

    /// The same fault, after which nobody knows whether it has happened.
    #[must_use]
    pub fn into_unknown(self) -> Self {
        self.again(true, false, false)
    }

    /// The same fault of a batch, which settles it: whatever became of earlier sendings under its id, none of them was applied, and none will be. Only a
    /// backend that has made sure of that says so; then the batch is not sent again to learn what became of it.
    #[must_use]
    pub fn never_applied(self) -> Self {
        self.again(false, self.inner.of_one, true)
    }

    /// Whether nothing of a batch was applied by any sending, nor will be; see [`never_applied`](Self::never_applied).
    pub fn is_never_applied(&self) -> bool {
        self.inner.never
    }

    /// What is wrong, without a word on whether anything was written: for what is said of another write.
    pub(crate) fn words(&self) -> &str {
        &self.inner.message
    }

    /// What kind of fault it is.
    pub fn kind(&self) -> StoreErrorKind {
        self.inner.kind
    }

    /// Whether nobody knows if what was asked has happened.
    pub fn is_unknown_outcome(&self) -> bool {
        self.inner.unknown
    }

    /// Whether the same call may succeed later without anybody's help. Never when nobody knows whether it has happened: it might happen twice.
    pub fn is_retryable(&self) -> bool {
        !self.inner.unknown
            && matches!(self.inner.kind, StoreErrorKind::Busy | StoreErrorKind::Full | StoreErrorKind::Unavailable)
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)?;
        if self.inner.unknown {
            f.write_str(" (whether it was written is not known)")?;
        }
        Ok(())
    }
}

impl StdError for StoreError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.inner.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_happened_is_not_simply_tried_again() {
        let lost = StoreError::unknown(StoreErrorKind::Unavailable, "the answer was lost");
        assert!(!lost.is_retryable() && !crate::Error::from(lost.clone()).is_retryable());
        assert!(lost.never_applied().is_retryable());
        assert!(!StoreError::not_applied(StoreErrorKind::Busy, "busy").into_unknown().is_retryable());
    }

    #[test]
    fn what_is_said_of_a_fault_stays_with_it() {
        let fault =
            StoreError::not_applied(StoreErrorKind::Input, "large").of_one_entry().never_applied().with_source(fmt::Error);
        assert!(fault.is_of_one_entry() && fault.is_never_applied() && !fault.is_unknown_outcome());
        let unknown = fault.into_unknown();
        assert!(!unknown.is_of_one_entry() && !unknown.is_never_applied() && unknown.is_unknown_outcome());
    }
}
