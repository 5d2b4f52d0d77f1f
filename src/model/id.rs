//! Names of runs, nodes and partitions, checked once when they are made.
//!
//! An id is data: it never becomes a path, a table name or part of a URL, so `../x`, `a/b` and any script are fine. Refused are
//! empty ids, ids of more than [`MAX_ID_BYTES`] bytes, and control characters (they break terminals, logs and line formats).

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest id that is accepted, in bytes of UTF-8.
pub const MAX_ID_BYTES: usize = 1024;

/// A value from outside that cannot be used. The message names the place and the mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is not valid: {why}")]
pub struct InputError {
    what: String,
    why: String,
}

impl InputError {
    /// Says which value is wrong and how to mend it.
    pub fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into() }
    }

    /// The same error, seen from further outside: `place` is put before what was wrong.
    pub fn within(self, place: impl fmt::Display) -> Self {
        Self { what: format!("{place}: {}", self.what), why: self.why }
    }

    pub(super) fn parts(&self) -> (&str, &str) {
        (&self.what, &self.why)
    }

    /// The name of the value that is wrong.
    pub fn what(&self) -> &str {
        &self.what
    }
}

/// A bounded, printable excerpt of a value for an error message.
pub(crate) fn excerpt(text: &str) -> String {
    const SHOWN: usize = 64;
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    format!("\"{shown}\"")
}

fn check(kind: &str, text: &str) -> Result<(), InputError> {
    if text.is_empty() {
        return Err(InputError::new(kind, "it is empty; give it at least one character"));
    }
    if text.len() > MAX_ID_BYTES {
        return Err(InputError::new(
            format!("{kind} {}", excerpt(text)),
            format!("it has {} bytes, the limit is {MAX_ID_BYTES}", text.len()),
        ));
    }
    if let Some(c) = text.chars().find(|c| c.is_control()) {
        return Err(InputError::new(
            format!("{kind} {}", excerpt(text)),
            format!("it holds the control character {}; remove it", c.escape_unicode()),
        ));
    }
    Ok(())
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and keeps a name.
            ///
            /// # Errors
            /// [`InputError`] if it is empty, longer than [`MAX_ID_BYTES`] bytes, or holds a control character.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InputError> {
                let text = text.as_ref();
                check($kind, text)?;
                Ok(Self(Arc::from(text)))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, other: &str) -> bool {
                &*self.0 == other
            }
        }

        impl PartialEq<&str> for $name {
            fn eq(&self, other: &&str) -> bool {
                &*self.0 == *other
            }
        }

        impl TryFrom<&str> for $name {
            type Error = InputError;
            fn try_from(text: &str) -> Result<Self, InputError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InputError;
            fn try_from(text: String) -> Result<Self, InputError> {
                Self::new(text)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InputError;
            fn from_str(text: &str) -> Result<Self, InputError> {
                Self::new(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                Self::new(text).map_err(serde::de::Error::custom)
            }
        }
    };
}

id_type!(
    /// The name of a run: one execution of a pipeline. A cheap handle on shared text.
    RunId,
    "run id"
);
id_type!(
    /// The name of a node: one step of a pipeline. A cheap handle on shared text.
    NodeId,
    "node id"
);
id_type!(
    /// The name of a completed partition, for example `dt=2024-01-01/region=EU`.
    PartitionKey,
    "partition"
);

impl RunId {
    /// A new run id that sorts by time and never collides: `run_` and a version 7 UUID.
    pub fn generate() -> Self {
        Self(Arc::from(format!("run_{}", uuid::Uuid::now_v7().simple())))
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for &str {}
    impl Sealed for &&str {}
    impl Sealed for super::Arc<str> {}
    impl Sealed for &super::Arc<str> {}
    impl Sealed for super::Cow<'_, str> {}
    impl Sealed for &super::Cow<'_, str> {}
    impl Sealed for String {}
    impl Sealed for &String {}
    impl Sealed for super::RunId {}
    impl Sealed for &super::RunId {}
    impl Sealed for super::NodeId {}
    impl Sealed for &super::NodeId {}
}

macro_rules! into_id {
    ($(#[$doc:meta])* $trait:ident, $method:ident, $name:ident) => {
        $(#[$doc])*
        pub trait $trait: sealed::Sealed {
            /// Checks the name, where it is not checked already.
            ///
            /// # Errors
            /// [`InputError`] as the id's own `new`.
            fn $method(self) -> Result<$name, InputError>;
        }
        impl $trait for &str {
            fn $method(self) -> Result<$name, InputError> {
                $name::new(self)
            }
        }
        into_id!(@ $trait, $method, $name: &&str, String, &String, Arc<str>, &Arc<str>, Cow<'_, str>, &Cow<'_, str>);
        impl $trait for $name {
            fn $method(self) -> Result<$name, InputError> {
                Ok(self)
            }
        }
        impl $trait for &$name {
            fn $method(self) -> Result<$name, InputError> {
                Ok(self.clone())
            }
        }
    };
    (@ $trait:ident, $method:ident, $name:ident: $($text:ty),+) => {
        $(
            impl $trait for $text {
                fn $method(self) -> Result<$name, InputError> {
                    $name::new(self)
                }
            }
        )+
    };
}

into_id!(
    /// What may stand where a run is named: text, or a [`RunId`] (which is not checked again).
    IntoRunId,
    into_run_id,
    RunId
);
into_id!(
    /// What may stand where a node is named: text, or a [`NodeId`] (which is not checked again).
    IntoNodeId,
    into_node_id,
    NodeId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_data_and_never_paths() {
        for fine in ["../x", "a/b", "a:b", "日本語", "rule.not null \"quoted\" \\ back", " ", &"x".repeat(MAX_ID_BYTES)] {
            assert_eq!(RunId::new(fine).unwrap().as_str(), fine);
        }
    }

    #[test]
    fn bad_ids_are_refused_with_a_short_message() {
        for bad in ["", "a\nb", "\u{0}", "\u{7f}", "\u{85}", &"x".repeat(1 << 20)] {
            let error = NodeId::new(bad).unwrap_err().to_string();
            assert!(error.starts_with("node id"), "{error}");
            assert!(error.len() < 250, "{error}");
            assert!(!error.chars().any(char::is_control), "{error}");
        }
    }

    #[test]
    fn any_text_may_name_a_run_or_a_node() {
        let (list, shared, cow) = (["a"], Arc::<str>::from("a"), Cow::Borrowed("a"));
        for name in &list {
            assert_eq!(name.into_node_id().unwrap(), "a");
        }
        let runs = [(&shared).into_run_id(), shared.into_run_id(), (&cow).into_run_id(), cow.into_run_id()];
        assert!(runs.into_iter().all(|run| run.unwrap() == "a"));
        assert!(Cow::<str>::Owned(String::new()).into_run_id().is_err());
    }

    #[test]
    fn deserialising_checks_too() {
        assert!(serde_json::from_str::<RunId>("\"\"").is_err());
        assert!(serde_json::from_str::<RunId>("\"a\\nb\"").is_err());
        assert_eq!(serde_json::from_str::<RunId>("\"a\\u0062\"").unwrap(), "ab");
    }
}
