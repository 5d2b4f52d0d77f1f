//! What a move has copied so far, noted beside the state: the next move into the same place tells its own copies from what others wrote there.
//!
//! A copy that is still what was copied may go: nothing is lost with it, the original decides. Whatever cannot be told for certain (a note that is missing, a
//! run that was changed since) is left alone.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ProjectError;
use super::files::folder_of;
use crate::model::{RunHeader, RunId, RunState, Version};

/// The notes' name in the state's folder. They are gone when a move has ended well.
const NAME: &str = ".migrate-state.copied";

/// One run that was copied.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    target: String,
    run: RunId,
    version: Version,
    content: u64,
}

/// The notes on one target.
#[derive(Debug)]
pub(super) struct Copied {
    path: PathBuf,
    target: String,
    runs: BTreeMap<RunId, (Version, u64)>,
}

impl Copied {
    /// What is noted of a target; what cannot be read is not known.
    pub(super) fn load(folder: &Path, location: &str) -> Self {
        let path = folder.join(NAME);
        let target = stable(location);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
        let runs = lines
            .filter(|line| line.target == target || line.target == location)
            .map(|line| (line.run, (line.version, line.content)))
            .collect();
        Self { path, target, runs }
    }

    /// The runs that were copied.
    pub(super) fn runs(&self) -> impl Iterator<Item = &RunId> {
        self.runs.keys()
    }

    /// Whether a run of the target is a copy that nobody has changed since.
    pub(super) fn is_ours(&self, there: &RunState) -> bool {
        self.runs.get(there.id()).is_some_and(|noted| *noted == (there.version(), content(there)))
    }

    /// Notes runs that were copied just now, under their versions there.
    pub(super) fn note(&mut self, copied: &[(RunId, Version, u64)]) -> Result<(), ProjectError> {
        let mut text = String::new();
        for (run, version, content) in copied {
            let line = Line { target: self.target.clone(), run: run.clone(), version: *version, content: *content };
            text.push_str(&serde_json::to_string(&line).map_err(|error| ProjectError::input(error.to_string()))?);
            text.push('\n');
            self.runs.insert(run.clone(), (*version, *content));
        }
        let mut file = std::fs::File::options().append(true).create(true).open(&self.path);
        let written =
            file.as_mut().map_err(|error| std::io::Error::from(error.kind())).and_then(|file| file.write_all(text.as_bytes()));
        written.map_err(|error| ProjectError::io(&self.path, error))
    }

    /// Removes the notes: the move has ended.
    pub(super) fn forget(folder: &Path) {
        let _left_behind = std::fs::remove_file(folder.join(NAME)).is_err();
    }
}

/// A name of a place that is the same from every working folder: of a path the whole one, of anything else what it is.
fn stable(location: &str) -> String {
    let path = Path::new(location);
    let name = path.file_name().and_then(|name| Some(folder_of(path).canonicalize().ok()?.join(name).to_str()?.to_owned()));
    name.unwrap_or_else(|| location.to_owned())
}

/// What a run holds, but for its versions, as a number. Other builds may count another one: then a copy is not known any more.
pub(super) fn content(run: &RunState) -> u64 {
    let mut hash = DefaultHasher::new();
    format!("{:?}", RunHeader { version: Version::NONE, ..run.header().clone() }).hash(&mut hash);
    for (id, node) in run.nodes() {
        (id.as_str(), format!("{:?}", node.without_version())).hash(&mut hash);
    }
    hash.finish()
}
