//! Free notes on a run or a node: an ordered map from text to JSON.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::json::RawJson;

/// An ordered map from keys to JSON values. Keys keep the order in which they came, values keep their own text. Cheap to clone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Metadata(Option<Arc<Vec<Note>>>);

/// A key and its value.
type Note = (Arc<str>, RawJson);

impl Metadata {
    /// No notes.
    pub const fn new() -> Self {
        Self(None)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&RawJson> {
        self.entries().iter().find(|(k, _)| &**k == key).map(|(_, value)| value)
    }

    /// All keys and values in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &RawJson)> {
        self.entries().iter().map(|(key, value)| (&**key, value))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets a key, at its old place where it had one.
    pub fn insert(&mut self, key: &str, value: RawJson) {
        let entries = Arc::make_mut(self.0.get_or_insert_default());
        match entries.iter_mut().find(|(k, _)| &**k == key) {
            Some(entry) => entry.1 = value,
            None => entries.push((Arc::from(key), value)),
        }
    }

    /// Removes a key; says whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        let Some(position) = self.entries().iter().position(|(k, _)| &**k == key) else { return false };
        if let Some(entries) = &mut self.0 {
            Arc::make_mut(entries).remove(position);
        }
        if self.entries().is_empty() {
            self.0 = None;
        }
        true
    }

    /// The JSON text of the whole map.
    pub fn to_raw(&self) -> RawJson {
        RawJson::object(self.iter())
    }

    /// Reads an object; `None` if it is none.
    pub fn from_raw(raw: &RawJson) -> Option<Self> {
        let mut metadata = Self::new();
        for (key, value) in raw.members()? {
            metadata.insert(&key, value);
        }
        Some(metadata)
    }

    /// About how many bytes this takes.
    pub(crate) fn weight(&self) -> usize {
        self.iter().map(|(key, value)| key.len() + value.as_str().len() + 32).sum()
    }

    fn entries(&self) -> &[(Arc<str>, RawJson)] {
        self.0.as_ref().map_or(&[], |entries| entries.as_slice())
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawJson::deserialize(deserializer)?;
        Self::from_raw(&raw).ok_or_else(|| serde::de::Error::custom("metadata must be a JSON object"))
    }
}
