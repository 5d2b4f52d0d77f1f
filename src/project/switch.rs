//! Changing `state_backend` in the settings file: one value, and nothing else of the file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::settings_file::{self, Parsed, read_text, read_yaml};
use super::{ProjectError, ProjectErrorKind, files};

/// A change of the settings file that was tried out on its text: only `state_backend` changes, comments, layout, line ends and anchors stay.
#[derive(Debug, Clone)]
pub struct Switch {
    path: PathBuf,
    backend: String,
    before: Option<String>,
    after: String,
}

impl Switch {
    /// Works out the change; reads only. A file that is not there will be made.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Input`] if the file cannot be read as settings, or cannot be changed without changing
    /// something else with it (the value carries an anchor that is used elsewhere): then the message says what to write by hand.
    pub fn plan(path: &Path, backend: &str) -> Result<Self, ProjectError> {
        let line = format!("state_backend: {backend}");
        if path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Ok(Self { path: path.to_owned(), backend: backend.to_owned(), before: None, after: format!("{line}\n") });
        }
        let text = read_text(path)?;
        let parsed = settings_file::parse(path, &text)?;
        let here = |line: u64| format!("{}:{line}", path.display());
        let by_hand = |place: String| {
            ProjectError::input(format!(
                "{place}: state_backend cannot be changed without changing more; write `state_backend: {backend}` there by hand"
            ))
        };
        let place = parsed.state_backend.as_ref().map_or_else(|| path.display().to_string(), |found| here(found.line));
        let after = candidates(&text, &parsed, backend)
            .into_iter()
            .find(|candidate| changes_only_backend(path, &text, candidate, backend))
            .ok_or_else(|| by_hand(place))?;
        Ok(Self { path: path.to_owned(), backend: backend.to_owned(), before: Some(text), after })
    }

    /// Whether the file says it already.
    pub fn is_done(&self) -> bool {
        self.before.as_ref() == Some(&self.after)
    }

    /// Whether the file, looked at again, says it.
    pub(super) fn is_done_by_now(&self) -> bool {
        Self::plan(&self.path, &self.backend).is_ok_and(|fresh| fresh.is_done())
    }

    /// What it is switched to.
    pub(super) fn backend(&self) -> &str {
        &self.backend
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a file that cannot be replaced, for itself or for its folder: that should be known before anything else is done.
    ///
    /// # Errors
    /// What the system will refuse.
    pub(super) fn check_replaceable(&self) -> Result<(), ProjectError> {
        if self.is_done() {
            return Ok(());
        }
        // As replacing it does: where the file is a link, its target is replaced.
        let path = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let may = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        let why = match (fixed(&path), rustix::fs::access(files::folder_of(&path), may)) {
            (Some(why), _) => why.to_owned(),
            (None, Err(error)) => format!("nothing may be written in its folder ({})", std::io::Error::from(error)),
            (None, Ok(())) => return Ok(()),
        };
        Err(ProjectError::new(
            ProjectErrorKind::Failed,
            format!(
                "{}: {why}, so that it cannot be replaced. Stop who works on the state, write `state_backend: {}` into it by hand, and start the move again before \
                 anybody works on",
                path.display(),
                self.backend
            ),
        ))
    }

    /// Does it, atomically and durably. A file that was edited since is looked at anew.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), and whatever the system refuses; then the file is as it was, but for a folder that could not be synced at the end.
    pub fn execute(&self) -> Result<(), ProjectError> {
        let fresh = Self::plan(&self.path, &self.backend)?;
        if fresh.is_done() {
            return Ok(());
        }
        files::replace_text(&fresh.path, &fresh.after)
    }
}

/// What keeps a file from being replaced by another one, whoever has the right to: a container is often given a single file by a mount.
#[cfg(target_os = "linux")]
fn fixed(path: &Path) -> Option<&'static str> {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
    // Where it cannot be asked, replacing it will tell.
    let found = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::TYPE).ok()?.stx_attributes;
    [
        (StatxAttributes::MOUNT_ROOT, "it is mounted by itself"),
        (StatxAttributes::IMMUTABLE, "it is marked as immutable (`chattr -i` takes that from it)"),
        (StatxAttributes::APPEND, "it is marked as one to append to only (`chattr -a` takes that from it)"),
    ]
    .into_iter()
    .find_map(|(attribute, why)| found.contains(attribute).then_some(why))
}

#[cfg(not(target_os = "linux"))]
fn fixed(_: &Path) -> Option<&'static str> {
    None
}

/// Sets `state_backend` in a settings file, and makes the file if it is not there.
///
/// # Errors
/// As [`Switch::plan`] and [`Switch::execute`].
pub fn switch_backend(path: &Path, backend: &str) -> Result<(), ProjectError> {
    Switch::plan(path, backend)?.execute()
}

/// The texts to try, best first.
fn candidates(text: &str, parsed: &Parsed, backend: &str) -> Vec<String> {
    let end = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let line = format!("state_backend: {backend}");
    if let Some(found) = &parsed.state_backend {
        let Some(bytes) = found.bytes.clone() else { return Vec::new() };
        let (Some(head), Some(old), Some(tail)) = (text.get(..bytes.start), text.get(bytes.clone()), text.get(bytes.end..))
        else {
            return Vec::new();
        };
        // The file's own quotes stay.
        let quoted = match old.chars().next() {
            Some(quote @ ('"' | '\'')) => format!("{quote}{backend}{quote}"),
            _ => backend.to_owned(),
        };
        let mut all = vec![format!("{head}{quoted}{tail}")];
        // A value in several lines (`>-`) becomes one in the line of its key.
        let start = head.rfind("state_backend").and_then(|key| head.get(..key)).unwrap_or(head);
        let rest = tail.split_once('\n').map(|(_, rest)| rest);
        all.extend([Some(tail), rest].into_iter().flatten().map(|rest| format!("{start}{line}{end}{rest}")));
        return all;
    }
    let Some(first) = parsed.first_key else {
        // Comments only, or an empty mapping `{}`, or `null`.
        let mut all = vec![joined(text, &line, end)];
        for (head, tail) in without_nothing(text) {
            all.extend([format!("{head}{line}{tail}"), format!("{head}{{{line}}}{tail}")]);
        }
        return all;
    };
    let start_of_line = text.get(..first).and_then(|head| head.rfind('\n')).map_or(0, |newline| newline + 1);
    let indent = text.get(start_of_line..first).unwrap_or_default().trim_start_matches('\u{feff}');
    let mut all = Vec::new();
    if indent.chars().all(|c| c == ' ') {
        all.push(joined(text, &format!("{indent}{line}"), end));
        if let (Some(head), Some(tail)) = (text.get(..first), text.get(first..)) {
            all.push(format!("{head}{line}{end}{indent}{tail}"));
        }
        if !text.ends_with('\n') {
            // Readers differ on a block of text that ends the file without a line end; ours would not see that it changed.
            all.reverse();
        }
    }
    if let (Some(head), Some(tail)) = (text.get(..first), text.get(first..)) {
        all.push(format!("{head}{line}, {tail}"));
    }
    all
}

/// What is around every place of a text that may be an empty mapping, or null.
fn without_nothing(text: &str) -> Vec<(&str, &str)> {
    let mut places = Vec::new();
    for (start, brace) in text.match_indices('{') {
        let tail = text.get(start + brace.len()..).unwrap_or_default().trim_start();
        places.extend(text.get(..start).zip(tail.strip_prefix('}')));
    }
    for null in ["~", "null", "Null", "NULL"] {
        places.extend(text.match_indices(null).filter_map(|(start, _)| text.get(..start).zip(text.get(start + null.len()..))));
    }
    places
}

/// The comments of a text, and what looks like one.
fn comments(text: &str) -> Vec<&str> {
    let is_comment =
        |line: &str, at: usize| line.get(..at).is_some_and(|head| head.is_empty() || head.ends_with([' ', '\t', '\u{feff}']));
    let in_line = |line| -> Option<&str> {
        let (at, _) = str::match_indices(line, '#').find(|(at, _)| is_comment(line, *at))?;
        line.get(at..).map(str::trim_end)
    };
    text.lines().filter_map(in_line).collect()
}

/// A line behind the last one.
fn joined(text: &str, line: &str, end: &str) -> String {
    let gap = if text.is_empty() || text.ends_with('\n') { "" } else { end };
    format!("{text}{gap}{line}{end}")
}

/// Whether the new text says the new backend, and everything else as before, comments too.
fn changes_only_backend(path: &Path, before: &str, after: &str, backend: &str) -> bool {
    let says = settings_file::parse(path, after)
        .ok()
        .and_then(|parsed| parsed.state_backend)
        .is_some_and(|found| found.value == settings_file::Value::Text(backend.to_owned()));
    let rest = |text: &str| {
        let mut value: Value = read_yaml(text).ok()?;
        if value.is_null() {
            value = Value::Object(serde_json::Map::new());
        }
        value.as_object_mut()?.remove("state_backend");
        Some(value)
    };
    says && comments(before) == comments(after) && rest(before).is_some() && rest(before) == rest(after)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_by_itself_cannot_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seeknal_project.yml");
        std::fs::write(&path, "name: x\n").unwrap();
        assert_eq!(fixed(&path), None);
        assert_eq!(fixed(&dir.path().join("none")), None);
        let known = rustix::fs::statx(rustix::fs::CWD, "/proc", rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::TYPE);
        if !known.unwrap().stx_attributes_mask.contains(rustix::fs::StatxAttributes::MOUNT_ROOT) {
            // Kernels before 5.8 do not tell mounts: there replacing it tells, after the copy.
            assert_eq!(fixed(Path::new("/proc")), None);
            return;
        }
        assert_eq!(fixed(Path::new("/proc")), Some("it is mounted by itself"));
        let switch = |path: &str| Switch { path: path.into(), backend: "database".into(), before: None, after: String::new() };
        let error = switch("/proc").check_replaceable().unwrap_err().to_string();
        assert!(error.starts_with("/proc: it is mounted by itself") && error.contains("`state_backend: database`"), "{error}");
    }
}
