//! Reading `seeknal_project.yml`: the few keys that are ours or shared, each with its place. Everything else belongs to Seeknal.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};

use super::ProjectError;
use super::settings::distance;
use crate::store::plain;

/// The longest file of settings that is read.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// The keys under `seeknal_state:`, each with what it means, its unit and its default.
pub const KEYS: &[(&str, &str)] = &[
    ("target_path", "the folder that holds run_state.json and state.db, relative to the project's folder; default: target"),
    ("lease_ttl_ms", "how long a lock lives without renewal, in milliseconds, 100 to 3600000; default: 30000"),
    ("idle_run_seconds", "after how long without work a run is put out of memory, in seconds, 1 to 86400; default: 60"),
    ("options", "a mapping of texts for a server or a registered backend; default: none"),
];

/// One value, as far as settings need to know it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List,
    Map(Vec<(Spanned<String>, Spanned<Value>)>),
}

impl Value {
    /// The value's kind, for messages: never the value itself, which may be a secret.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::List => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(Value::Int(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Int(value.into()))
            }
            fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
                Ok(Value::Int(value))
            }
            fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
                Ok(Value::Int(i128::try_from(value).unwrap_or(i128::MAX)))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(Value::Float(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Value::List)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Value::Map(members))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A value and the line where it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    pub(super) value: Value,
    pub(super) line: u64,
    /// Where the value's text is in the file, in bytes.
    pub(super) bytes: Option<Range<usize>>,
}

impl Found {
    fn of(spanned: Spanned<Value>) -> Self {
        let place = spanned.referenced;
        let bytes = place.span().byte_offset().zip(place.span().byte_len()).and_then(|(start, len)| {
            let start = usize::try_from(start).ok()?;
            Some(start..start.checked_add(usize::try_from(len).ok()?)?)
        });
        Self { value: spanned.value, line: place.line(), bytes }
    }
}

/// What a file of settings says.
#[derive(Debug, Clone, Default)]
pub(super) struct Parsed {
    pub(super) state_backend: Option<Found>,
    pub(super) database_url: Option<Found>,
    pub(super) ours: Option<Found>,
    /// Where the first key is, in bytes; `None` if there is none.
    pub(super) first_key: Option<usize>,
    twice: Option<(String, u64)>,
    /// A key that looks like one of ours but is not, the one that it looks like, and its line.
    near: Option<(String, &'static str, u64)>,
    /// It is a list or a single value.
    is_no_mapping: bool,
}

impl Parsed {
    fn no_mapping() -> Self {
        Self { is_no_mapping: true, ..Self::default() }
    }
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TopLevel;
        impl<'de> Visitor<'de> for TopLevel {
            type Value = Parsed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of settings")
            }
            fn visit_unit<E>(self) -> Result<Parsed, E> {
                // `null`, or comments only: nothing is set.
                Ok(Parsed::default())
            }
            fn visit_bool<E>(self, _: bool) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_i64<E>(self, _: i64) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_u64<E>(self, _: u64) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_i128<E>(self, _: i128) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_u128<E>(self, _: u128) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_f64<E>(self, _: f64) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_str<E>(self, _: &str) -> Result<Parsed, E> {
                Ok(Parsed::no_mapping())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Parsed, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Parsed::no_mapping())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
                let mut parsed = Parsed::default();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    if parsed.first_key.is_none() {
                        parsed.first_key = key.referenced.span().byte_offset().and_then(|offset| usize::try_from(offset).ok());
                    }
                    let slot = match key.value.as_str() {
                        "state_backend" => &mut parsed.state_backend,
                        "database_url" => &mut parsed.database_url,
                        "seeknal_state" => &mut parsed.ours,
                        other => {
                            if let Some(ours) = near_miss(other) {
                                parsed.near.get_or_insert((other.to_owned(), ours, key.referenced.line()));
                            }
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    if slot.is_some() {
                        parsed.twice.get_or_insert((key.value, key.referenced.line()));
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        *slot = Some(Found::of(map.next_value()?));
                    }
                }
                Ok(parsed)
            }
        }
        deserializer.deserialize_any(TopLevel)
    }
}

/// The keys at the top level that are ours; all others are Seeknal's.
const TOP_LEVEL: &[&str] = &["state_backend", "database_url", "seeknal_state"];

/// The key of ours that this one was meant to be: two slips of a finger away at most, or written with other capitals or hyphens.
fn near_miss(key: &str) -> Option<&'static str> {
    let bare = |key: &str| key.chars().filter(|c| c.is_alphanumeric()).take(64).collect::<String>();
    TOP_LEVEL.iter().copied().find(|ours| distance(&bare(key), &bare(ours)) <= 2)
}

/// Reads the text of a file of settings.
pub(super) fn read_text(path: &Path) -> Result<String, ProjectError> {
    // Asked by its name first: opening a pipe waits for a writer.
    let kind = std::fs::metadata(path).map_err(|error| ProjectError::io(path, error))?;
    if !kind.is_file() {
        let what = if kind.is_dir() { "a folder" } else { "no plain file" };
        return Err(ProjectError::input(format!(
            "{}: it is {what}, but the settings should be there; move it aside",
            path.display()
        )));
    }
    let file = plain::open(path).map_err(|error| ProjectError::io(path, error))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| ProjectError::io(path, error))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ProjectError::input(format!(
            "{}: it is longer than {MAX_BYTES} bytes; is this the settings file?",
            path.display()
        )));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        let line = String::from_utf8_lossy(good).matches('\n').count() + 1;
        ProjectError::input(format!("{}:{line}: it is not UTF-8 text; save it as UTF-8", path.display()))
    })
}

/// Reads the settings out of YAML text. `path` is for messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Parsed, ProjectError> {
    let parsed: Spanned<Parsed> = read_yaml(text).map_err(|(line, message)| {
        ProjectError::input(format!(
            "{}:{line}: it cannot be read as settings ({message}); correct the YAML there",
            path.display()
        ))
    })?;
    let (line, parsed) = (parsed.referenced.line(), parsed.value);
    if parsed.is_no_mapping {
        // The value itself is not shown: it may be a secret.
        return Err(ProjectError::input(format!("{}:{line}: it must be a mapping: `key: value` lines", path.display())));
    }
    if let Some((key, ours, line)) = &parsed.near {
        return Err(ProjectError::input(format!(
            "{}:{line}: there is no key {key:?}; did you mean {ours}? Write it so, or remove the line",
            path.display()
        )));
    }
    if let Some((key, line)) = &parsed.twice {
        return Err(ProjectError::input(format!("{}:{line}: {key} is given a second time; remove one of them", path.display())));
    }
    Ok(parsed)
}

/// Reads YAML as any type. Duplicate keys, infinities and unknown tags are Seeknal's business. An error is its line and what is wrong, without
/// any of the text around it.
pub(super) fn read_yaml<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, (u64, String)> {
    // What says nothing sets nothing, with comments or without.
    let text = if text.trim_start_matches('\u{feff}').trim().is_empty() { "null" } else { text };
    let options = serde_saphyr::options! {
        with_snippet: false,
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map_or(1, |location| location.line());
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        let message = match message {
            _ if message.starts_with("multiple YAML documents") => "it holds more than one YAML document",
            // Of the parser's own developers.
            _ if message.starts_with("cannot deserialize null into string") => {
                "a key or a text is missing where a colon or a comma stands"
            }
            _ => message,
        };
        (line, message.replace(['\n', '\r'], " "))
    })
}
