//! Where a project and its settings file are.

use std::path::{Path, PathBuf};

use crate::project::{ProjectError, ProjectErrorKind, files};

/// The name of the settings file that is made where there is none.
pub(super) const FILE_NAME: &str = "seeknal_project.yml";
const OTHER_FILE_NAME: &str = "seeknal_project.yaml";

/// Joins without a leading `./`, so that what is printed can be typed again.
pub(super) fn under(folder: &Path, path: &Path) -> PathBuf {
    if folder == Path::new(".") || folder.as_os_str().is_empty() { path.to_owned() } else { folder.join(path) }
}

/// The project's folder and its settings file.
pub(super) fn find(path: &Path) -> Result<(PathBuf, Option<PathBuf>), ProjectError> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    // So that what is printed can be typed again: a leading hyphen is taken for an option.
    let path = &if path.as_os_str().as_encoded_bytes().starts_with(b"-") { Path::new(".").join(path) } else { path.to_owned() };
    let kind = std::fs::metadata(path).map_err(|error| match error.kind() {
        // A URL in the wrong place may hold a password.
        _ if path.to_string_lossy().contains("://") => ProjectError::new(
            ProjectErrorKind::NotFound,
            "--project-path: this is a URL (it is not shown), and there is no such folder; give the project's folder, a URL belongs into database_url",
        ),
        std::io::ErrorKind::NotFound => ProjectError::new(
            ProjectErrorKind::NotFound,
            format!("{}: there is no such folder; give the project's folder with --project-path", path.display()),
        ),
        _ => ProjectError::io(path, error),
    })?;
    let start = if kind.is_dir() { path } else { files::folder_of(path) };
    if let Some(file) = settings_file_in(start)? {
        return Ok((start.to_owned(), Some(file)));
    }
    let absolute = std::fs::canonicalize(start).map_err(|error| ProjectError::io(start, error))?;
    for folder in absolute.ancestors().skip(1) {
        if let Some(file) = settings_file_in(folder)? {
            return Ok((folder.to_owned(), Some(file)));
        }
    }
    Ok((start.to_owned(), None))
}

fn settings_file_in(folder: &Path) -> Result<Option<PathBuf>, ProjectError> {
    let (yml, yaml) = (under(folder, Path::new(FILE_NAME)), under(folder, Path::new(OTHER_FILE_NAME)));
    // A link that leads nowhere is there too: reading it then says so.
    let there = |path: &Path| match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(ProjectError::io(path, error)),
    };
    match (there(&yml)?, there(&yaml)?) {
        (true, true) => Err(ProjectError::input(format!(
            "{} and {OTHER_FILE_NAME} are both there; keep one of them, {FILE_NAME} is the usual one",
            yml.display()
        ))),
        (true, false) => Ok(Some(yml)),
        (false, true) => Ok(Some(yaml)),
        (false, false) => Ok(None),
    }
}
