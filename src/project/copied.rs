//! What a move has copied so far, noted beside the state: the next move from the same place into the same one tells its copies from what others wrote there.
//!
//! A copy that is still what was copied may be replaced by its original: nothing is lost with it, the original decides. Whatever cannot be told for certain (a
//! note that is missing, a run that was changed since, an original that is gone) is left alone. And nothing is replaced in a state that is in use: what was
//! copied there once is what work goes on with.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ProjectError;
use super::files::{folder_of, sync_folder};
use crate::model::{RunHeader, RunId, RunState, Version};
use crate::store::plain;

/// The notes' name in the state's folder. They are gone when a move has ended well.
const NAME: &str = ".migrate-state.copied";

/// One run that was copied.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// Where the original is. Notes without it are of no use: another source may have another run of that name.
    #[serde(default)]
    source: Option<String>,
    target: String,
    run: RunId,
    version: Version,
    content: u64,
}

/// The notes on what was copied from one place into another.
#[derive(Debug)]
pub(super) struct Copied {
    path: PathBuf,
    source: String,
    target: String,
    runs: BTreeMap<RunId, (Version, u64)>,
}

impl Copied {
    /// What is noted of two places (by their locations); a line that cannot be read is not known.
    ///
    /// # Errors
    /// What reading meets, and what lies there and is no file.
    pub(super) fn load(folder: &Path, source: &str, target: &str) -> Result<Self, ProjectError> {
        let path = folder.join(NAME);
        let (source, target) = (stable(source), stable(target));
        let text = read(&path)?.unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
        let runs = lines
            .filter(|line| line.target == target && line.source.as_ref() == Some(&source))
            .map(|line| (line.run, (line.version, line.content)))
            .collect();
        Ok(Self { path, source, target, runs })
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
            let line = Line {
                source: Some(self.source.clone()),
                target: self.target.clone(),
                run: run.clone(),
                version: *version,
                content: *content,
            };
            text.push_str(&serde_json::to_string(&line).map_err(|error| ProjectError::input(error.to_string()))?);
            text.push('\n');
            self.runs.insert(run.clone(), (*version, *content));
        }
        append(&self.path, &text).map_err(|error| ProjectError::io(&self.path, error))
    }

    /// Refuses what is in the place of the notes and is no file, before anything is written.
    pub(super) fn check(folder: &Path) -> Result<(), ProjectError> {
        read(&folder.join(NAME)).map(|_| ())
    }

    /// Removes all notes for good: who finds them later would take them for those of a move that was cut off.
    pub(super) fn forget(folder: &Path) -> Result<Forgotten, ProjectError> {
        let path = folder.join(NAME);
        let text = read(&path)?;
        if text.is_some() {
            std::fs::remove_file(&path).map_err(|error| ProjectError::io(&path, error))?;
            sync_folder(folder)?;
        }
        Ok(Forgotten { path, text: text.unwrap_or_default() })
    }
}

/// Notes that were removed.
#[derive(Debug)]
pub(super) struct Forgotten {
    path: PathBuf,
    text: String,
}

impl Forgotten {
    /// Writes them again: the move did not come to its end. Without them nothing is lost, but its copies count as anybody's.
    pub(super) fn remember(self) {
        let _not_known_any_more = append(&self.path, &self.text).is_err();
    }
}

/// The notes' text, if there are any.
fn read(path: &Path) -> Result<Option<String>, ProjectError> {
    let mut bytes = Vec::new();
    match plain::open_own(File::options().read(true), path).and_then(|mut file| file.read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ProjectError::io(path, error)),
    }
}

fn append(path: &Path, text: &str) -> std::io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    plain::open_own(File::options().append(true).create(true), path)?.write_all(text.as_bytes())
}

/// A name of a place that is the same from every working folder: of a path the whole one, of anything else what it is.
pub(super) fn stable(location: &str) -> String {
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
