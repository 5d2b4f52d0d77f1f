//! Errors of work on a project: what is wrong, where, and how to mend it.

use std::error::Error as _;
use std::fmt;
use std::path::Path;

use crate::model::{InputError, Refusal};
use crate::store::{StoreError, StoreErrorKind};

/// What kind of fault it is; the command line's exit code follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProjectErrorKind {
    /// A setting, an argument or a file of settings makes no sense.
    Input,
    /// What was asked for is not there.
    NotFound,
    /// Somebody else has it, or what is there contradicts what should be written. Nothing was changed.
    Conflict,
    /// What is stored is damaged, foreign, newer than this program, or not what was written.
    Integrity,
    /// Something was done, and then something failed.
    Partial,
    /// The caller's observer stopped it.
    Stopped,
    /// The system or the storage failed.
    Failed,
}

/// A fault of work on a project.
#[derive(Debug, Clone)]
pub struct ProjectError {
    kind: ProjectErrorKind,
    message: String,
    retryable: bool,
    source: Option<StoreError>,
}

impl fmt::Display for ProjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ProjectError {
    /// The message tells what storage said: below it is only what that came from.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().and_then(std::error::Error::source)
    }
}

impl ProjectError {
    /// A fault of a kind; the message names the place and the mend.
    pub fn new(kind: ProjectErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retryable: false, source: None }
    }

    /// A fault of the operating system at a path.
    pub(super) fn io(path: &Path, error: std::io::Error) -> Self {
        StoreError::io(path.display(), error).into()
    }

    pub(super) fn input(message: impl Into<String>) -> Self {
        Self::new(ProjectErrorKind::Input, message)
    }

    /// The same fault, after something was done already.
    pub(crate) fn after(self, done: impl fmt::Display) -> Self {
        Self { kind: ProjectErrorKind::Partial, message: format!("{done}; then: {}", self.message), ..self }
    }

    /// The same fault, with more to say of it.
    pub(super) fn and(self, more: impl fmt::Display) -> Self {
        Self { message: format!("{}{more}", self.message), ..self }
    }

    /// What kind of fault it is.
    pub fn kind(&self) -> ProjectErrorKind {
        self.kind
    }

    /// The same fault, with the place that it came from in front.
    pub(super) fn at(self, place: impl fmt::Display) -> Self {
        Self { message: format!("{place}: {}", self.message), ..self }
    }

    /// Whether the same work may succeed later without anybody's help, as the storage or the coordinator told: it is busy, full, not reached, or others were
    /// faster. What was done [in part](ProjectErrorKind::Partial) goes on then from where it stopped. Never when nobody knows whether something was written.
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// What kind of fault of storage it came from.
    pub(super) fn stored(&self) -> Option<StoreErrorKind> {
        self.source.as_ref().map(StoreError::kind)
    }

    /// Whether a batch failed for what one of its entries is, with nothing written: without that one the others may well be.
    pub(super) fn is_of_one_entry(&self) -> bool {
        self.source.as_ref().is_some_and(|error| error.is_of_one_entry() && !error.is_unknown_outcome())
    }

    /// Whether it is known what was written, and nobody only stopped to look: an unknown outcome may still become a known one.
    pub(super) fn is_certain(&self) -> bool {
        self.kind != ProjectErrorKind::Stopped && !self.source.as_ref().is_some_and(StoreError::is_unknown_outcome)
    }

    /// Whether there simply is no state yet. What the system or a driver did not find (a database, a file of certificates) is another matter: the state
    /// was not reached, and may well be there.
    pub fn is_no_state(&self) -> bool {
        self.source.as_ref().is_some_and(|error| error.kind() == StoreErrorKind::NotFound && error.source().is_none())
    }
}

impl From<StoreError> for ProjectError {
    fn from(error: StoreError) -> Self {
        let kind = match error.kind() {
            StoreErrorKind::Busy | StoreErrorKind::Unfinished => ProjectErrorKind::Conflict,
            StoreErrorKind::Corrupt | StoreErrorKind::NewerFormat | StoreErrorKind::Foreign => ProjectErrorKind::Integrity,
            StoreErrorKind::NotFound => ProjectErrorKind::NotFound,
            StoreErrorKind::Input | StoreErrorKind::Unsupported => ProjectErrorKind::Input,
            _ => ProjectErrorKind::Failed,
        };
        Self { kind, message: error.to_string(), retryable: error.is_retryable(), source: Some(error) }
    }
}

impl From<Refusal> for ProjectError {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal {
            Refusal::RunNotFound { .. } | Refusal::NodeNotFound { .. } | Refusal::LeaseGone { .. } => ProjectErrorKind::NotFound,
            Refusal::Input(_) => ProjectErrorKind::Input,
            _ => ProjectErrorKind::Conflict,
        };
        let message = refusal.to_string();
        Self { retryable: crate::error::Error::from(refusal).is_retryable(), ..Self::new(kind, message) }
    }
}

impl From<InputError> for ProjectError {
    fn from(error: InputError) -> Self {
        Self::input(error.to_string())
    }
}

impl From<crate::error::Error> for ProjectError {
    fn from(error: crate::error::Error) -> Self {
        let kind = match error {
            crate::error::Error::Store(error) => return error.into(),
            crate::error::Error::Input(error) => return error.into(),
            _ if error.is_conflict() => ProjectErrorKind::Conflict,
            _ if error.is_not_found() => ProjectErrorKind::NotFound,
            _ => ProjectErrorKind::Failed,
        };
        Self { retryable: error.is_retryable(), ..Self::new(kind, error.to_string()) }
    }
}

#[cfg(all(test, feature = "file"))]
mod tests {
    use super::*;

    #[test]
    fn more_words_make_no_missing_state_of_a_failure() {
        let fault = StoreError::io("x", std::io::ErrorKind::NotFound.into());
        assert!(!ProjectError::from(fault.clone()).is_no_state());
        assert!(!ProjectError::from(fault.and("; what was repaired before: y")).is_no_state());
    }

    #[test]
    fn every_error_of_a_chain_says_something_of_its_own() {
        let mut chain = Vec::new();
        let fault = StoreError::io("x", std::io::Error::other("disk")).of_one_entry().into_unknown();
        let error = ProjectError::from(fault);
        let mut next: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = next {
            chain.push(error.to_string());
            next = error.source();
        }
        assert_eq!(chain.len(), 2, "{chain:#?}");
    }
}
