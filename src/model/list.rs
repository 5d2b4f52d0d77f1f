//! An immutable list that is cheap to clone, and takes nothing where it is empty.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An immutable list. A clone shares it; an empty one allocates nothing. Reads as a slice.
///
/// ```
/// use seeknal_state::model::List;
/// let list: List<u32> = [1, 2].into_iter().collect();
/// assert_eq!(list.iter().sum::<u32>(), 3);
/// assert!(List::<u32>::new().is_empty());
/// ```
pub struct List<T>(Option<Arc<Vec<T>>>);

impl<T> List<T> {
    /// An empty list.
    pub const fn new() -> Self {
        Self(None)
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        self.0.as_ref().map_or(&[], |elements| elements.as_slice())
    }
}

impl<T: Clone> List<T> {
    /// Appends an element; if there are more than `most` then, the oldest go.
    pub(crate) fn push_bounded(&mut self, element: T, most: usize) {
        let elements = Arc::make_mut(self.0.get_or_insert_default());
        elements.push(element);
        let spare = elements.len().saturating_sub(most);
        elements.drain(..spare);
    }
}

impl<T> Clone for List<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<T> From<Vec<T>> for List<T> {
    fn from(elements: Vec<T>) -> Self {
        Self((!elements.is_empty()).then(|| Arc::new(elements)))
    }
}

impl<T> FromIterator<T> for List<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        Vec::from_iter(elements).into()
    }
}

impl<'a, T> IntoIterator for &'a List<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: PartialEq> PartialEq for List<T> {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl<T: Eq> Eq for List<T> {}

impl<T: fmt::Debug> fmt::Debug for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().fmt(f)
    }
}

impl<T: Serialize> Serialize for List<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.as_slice())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(Self::from)
    }
}
