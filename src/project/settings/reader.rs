//! Reads single values of the settings file, and knows which line to blame.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::near::{did_you_mean, shown};
use super::{Source, Sourced};
use crate::project::ProjectError;
use crate::project::settings_file::{Found, Value};
use crate::store::BackendOption;

/// Reads single values and knows which file to blame.
pub(super) struct Reader {
    pub(super) file: PathBuf,
}

impl Reader {
    pub(super) fn at(&self, line: u64, message: String) -> ProjectError {
        ProjectError::input(format!("{}:{line}: {message}", self.file.display()))
    }

    pub(super) fn wrong(&self, key: &str, found: &Found, wanted: &str) -> ProjectError {
        self.at(found.line, format!("{key} is {}; write {wanted}, or remove the line", found.value.kind()))
    }

    pub(super) fn source(&self, found: &Found) -> Source {
        Source::File { path: self.file.clone(), line: found.line }
    }

    pub(super) fn text(&self, key: &str, found: &Found) -> Result<Sourced<String>, ProjectError> {
        match &found.value {
            // The system takes none in a path, and the rest of a URL would be another one.
            Value::Text(text) if text.contains('\0') => {
                Err(self.at(found.line, format!("{key} holds a NUL character (\\0); write it without")))
            }
            Value::Text(text) if !text.trim().is_empty() => {
                Ok(Sourced { value: text.trim().to_owned(), source: self.source(found) })
            }
            Value::Text(_) => Err(self.at(found.line, format!("{key} is empty; write a text, or remove the line"))),
            _ => Err(self.wrong(key, found, "a text")),
        }
    }

    pub(super) fn number(
        &self,
        key: &str,
        found: &Found,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Sourced<u64>, ProjectError> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        match &found.value {
            Value::Int(number) => u64::try_from(*number)
                .ok()
                .filter(|number| range.contains(number))
                .map(|number| Sourced { value: number, source: self.source(found) })
                .ok_or_else(|| self.at(found.line, format!("{key} is {number}; write {wanted}"))),
            _ => Err(self.wrong(key, found, &wanted)),
        }
    }

    pub(super) fn texts(&self, key: &str, found: &Found) -> Result<BTreeMap<String, Sourced<String>>, ProjectError> {
        let Value::Map(members) = &found.value else { return Err(self.wrong(key, found, "a mapping of texts")) };
        let mut texts = BTreeMap::new();
        for (name, value) in members {
            let line = name.referenced.line();
            let text = match &value.value {
                Value::Text(text) => text.clone(),
                Value::Int(number) => number.to_string(),
                Value::Float(number) => number.to_string(),
                Value::Bool(flag) => flag.to_string(),
                other => {
                    return Err(self.at(line, format!("{key}: {} is {}; write a text", shown(&name.value), other.kind())));
                }
            };
            let source = Source::File { path: self.file.clone(), line };
            if texts.insert(name.value.clone(), Sourced { value: text, source }).is_some() {
                return Err(self.at(line, format!("{key}: {} is given a second time; remove one of them", shown(&name.value))));
            }
        }
        Ok(texts)
    }

    /// Refuses an option that no built-in backend knows. The value may be a secret: it is not shown.
    pub(super) fn check_option(&self, key: &str, name: &str, text: &Sourced<String>) -> Result<(), ProjectError> {
        let Source::File { line, .. } = text.source else { return Ok(()) };
        let Some(option) = BackendOption::of(name) else {
            let known = BackendOption::names();
            let hint = did_you_mean(name, known.iter().copied());
            return Err(self.at(line, format!("{key} has no {}{hint}; known are: {}", shown(name), known.join(", "))));
        };
        if option.takes(&text.value) {
            return Ok(());
        }
        Err(self.at(line, format!("{key}.{name} makes no sense; write {}, or remove the line", option.wanted)))
    }
}
