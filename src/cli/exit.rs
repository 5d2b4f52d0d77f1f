//! What went wrong, and the exit code that says so.

use std::fmt;
use std::io;

use crate::model::InputError;
use crate::project::{ProjectError, ProjectErrorKind};
use crate::store::StoreError;

pub(super) const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;
const EXIT_NOT_FOUND: u8 = 3;
const EXIT_CONFLICT: u8 = 4;
const EXIT_INTEGRITY: u8 = 5;
const EXIT_PARTIAL: u8 = 6;

/// Why a command ended without success.
#[derive(Debug)]
pub(super) enum CliError {
    Project(ProjectError),
    Output {
        error: io::Error,
        /// What had happened by then.
        done: Option<&'static str>,
    },
    /// The command line asks for what cannot be meant.
    Usage(String),
}

impl CliError {
    pub(super) fn new(kind: ProjectErrorKind, message: impl Into<String>) -> Self {
        Self::Project(ProjectError::new(kind, message))
    }

    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Output { done: Some(_), .. } => EXIT_PARTIAL,
            Self::Output { done: None, .. } => EXIT_FAILED,
            Self::Usage(_) => EXIT_USAGE,
            Self::Project(error) => match error.kind() {
                ProjectErrorKind::NotFound => EXIT_NOT_FOUND,
                ProjectErrorKind::Conflict => EXIT_CONFLICT,
                ProjectErrorKind::Integrity => EXIT_INTEGRITY,
                ProjectErrorKind::Partial => EXIT_PARTIAL,
                ProjectErrorKind::Input | ProjectErrorKind::Stopped | ProjectErrorKind::Failed => EXIT_FAILED,
            },
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Project(error) => error.fmt(f),
            Self::Output { error, done: Some(done) } => write!(f, "{done}, but the output cannot be written: {error}"),
            Self::Output { error, done: None } => write!(f, "the output cannot be written: {error}"),
            Self::Usage(why) => f.write_str(why),
        }
    }
}

impl From<ProjectError> for CliError {
    fn from(error: ProjectError) -> Self {
        Self::Project(error)
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> Self {
        Self::Project(error.into())
    }
}

impl From<InputError> for CliError {
    fn from(error: InputError) -> Self {
        Self::Project(error.into())
    }
}
