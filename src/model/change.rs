//! What happens to one field, and to notes.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};

use super::json::RawJson;
use super::time::to_micros;

/// What happens to one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change<T> {
    /// It stays as it is.
    #[default]
    Keep,
    /// It becomes this.
    Set(T),
    /// It is emptied.
    Clear,
}

impl<T> Change<T> {
    /// Whether nothing happens.
    pub fn is_keep(&self) -> bool {
        matches!(self, Self::Keep)
    }

    /// Does it to a field.
    pub fn apply_to(&self, field: &mut Option<T>)
    where
        T: Clone,
    {
        match self {
            Self::Keep => {}
            Self::Set(value) => *field = Some(value.clone()),
            Self::Clear => *field = None,
        }
    }
}

/// A stamp that is read is cut as one that is given: see [`to_micros`].
pub(super) fn read_stamp<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Change<DateTime<Utc>>, D::Error> {
    Ok(match Change::deserialize(deserializer)? {
        Change::Set(stamp) => Change::Set(to_micros(stamp)),
        other => other,
    })
}

/// Notes to set (`Some`) or to remove (`None`), by key.
pub(crate) type NoteChanges = Vec<(Arc<str>, Option<RawJson>)>;

/// Notes are written as `["key",[value]]` or `["key",[]]`: a note may be `null`, which must not read as a removal.
pub(super) mod notes {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::{NoteChanges, RawJson};

    pub(in crate::model) fn serialize<S: Serializer>(notes: &NoteChanges, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(notes.iter().map(|(key, value)| (key, value.as_slice())))
    }

    pub(in crate::model) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NoteChanges, D::Error> {
        let written = Vec::<(Arc<str>, Vec<RawJson>)>::deserialize(deserializer)?;
        Ok(written.into_iter().map(|(key, value)| (key, value.into_iter().next())).collect())
    }
}

/// About how many bytes they take.
pub(super) fn notes_weight(notes: &NoteChanges) -> usize {
    notes.iter().map(|(key, value)| 48 + key.len() + value.as_ref().map_or(0, |v| v.as_str().len())).sum()
}
