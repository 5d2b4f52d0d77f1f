//! What both examples of many executors do with their command lines: a URL may hold a token, so that what stands in a wrong place is not shown; and
//! where a project keeps its state.

use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use super::Failure;

/// A URL that may hold a token: it is never printed.
#[derive(Clone)]
pub(super) struct DatabaseUrl(pub(super) String);

impl std::str::FromStr for DatabaseUrl {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(not shown)")
    }
}

/// A folder or a file of this machine.
pub(super) fn place(text: &str) -> Result<PathBuf, String> {
    if text.contains("://") { Err("this is a URL; it belongs into --database-url".to_owned()) } else { Ok(text.into()) }
}

/// Reads the arguments; whoever gives wrong ones is told, and the program ends.
pub(super) fn parse<O: Parser>() -> O {
    O::try_parse().unwrap_or_else(|mut error| {
        for kind in [ContextKind::InvalidValue, ContextKind::InvalidArg, ContextKind::InvalidSubcommand] {
            if matches!(error.get(kind), Some(ContextValue::String(text)) if text.contains([':', '@', '/'])) {
                error.insert(kind, ContextValue::String("(not shown)".to_owned()));
            }
        }
        error.exit()
    })
}

/// The state's folder: the one that the project's settings name (`seeknal_state.target_path`), else `target`.
pub(super) fn target(project: &Path) -> Result<PathBuf, Failure> {
    #[cfg(feature = "project")]
    if project.is_dir() {
        return Ok(seeknal_state::project::Settings::load(project, &|_| None)
            .map_err(|error| Failure::Told(error.to_string()))?
            .target
            .value);
    }
    #[cfg(not(feature = "project"))]
    for name in ["seeknal_project.yml", "seeknal_project.yaml"] {
        let file = project.join(name);
        if std::fs::read_to_string(&file).is_ok_and(|text| text.contains("target_path")) {
            let message = format!("{}: it names the state's folder; add `--features project` to follow it", file.display());
            return Err(Failure::Told(message));
        }
    }
    Ok(project.join("target"))
}
