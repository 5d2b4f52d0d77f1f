//! Statuses of runs and nodes. A status that is not known is kept as it was found.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::InputError;

macro_rules! status_type {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vdoc])* $variant,)+
            /// A status that another system wrote; it is kept and written back as it was found. It never counts as an end, whatever it says.
            Other(Arc<str>),
        }

        impl $name {
            /// The status as it is stored and shown.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)+
                    Self::Other(text) => text,
                }
            }

            /// Reads a status; text that is not known becomes `Other`.
            pub fn parse(text: &str) -> Self {
                match text {
                    $($text => Self::$variant,)+
                    _ => Self::Other(Arc::from(text)),
                }
            }
        }

        impl $name {
            /// How many bytes it has that others do not share.
            pub(crate) fn weight(&self) -> usize {
                if let Self::Other(text) = self { text.len() } else { 0 }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = InputError;

            /// Reads one of the known statuses; unlike `parse` it refuses all others (for command lines and settings).
            fn from_str(text: &str) -> Result<Self, InputError> {
                match Self::parse(text) {
                    Self::Other(_) => Err(InputError::new(
                        format!("status {}", super::id::excerpt(text)),
                        format!("known statuses: {}", [$($text),+].join(", ")),
                    )),
                    known => Ok(known),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                Ok(Self::parse(&text))
            }
        }
    };
}

status_type!(
    /// Where a node stands.
    NodeStatus {
        /// Known, not started.
        Pending = "pending",
        /// An executor works on it.
        Running = "running",
        /// Ended well.
        Success = "success",
        /// Ended badly.
        Failed = "failed",
        /// Ended without work: it was not needed.
        Skipped = "skipped",
        /// Ended without work: an earlier result was still good.
        Cached = "cached",
    }
);

status_type!(
    /// Where a run stands.
    RunStatus {
        /// Known, not started.
        Pending = "pending",
        /// Somebody works on it.
        Running = "running",
        /// Ended well.
        Success = "success",
        /// Ended badly.
        Failed = "failed",
        /// Ended because somebody said so.
        Cancelled = "cancelled",
    }
);

impl NodeStatus {
    /// Whether a node in this status has ended: success, failed, skipped or cached.
    pub fn is_ended(&self) -> bool {
        matches!(self, Self::Success | Self::Failed | Self::Skipped | Self::Cached)
    }
}

impl RunStatus {
    /// Whether a run in this status has ended: success, failed or cancelled.
    pub fn is_ended(&self) -> bool {
        matches!(self, Self::Success | Self::Failed | Self::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_statuses_survive() {
        for text in ["success", "upstream_failed", "", "日本"] {
            assert_eq!(NodeStatus::parse(text).as_str(), text);
            assert_eq!(RunStatus::parse(text).as_str(), text);
        }
        assert!("sucess".parse::<NodeStatus>().unwrap_err().to_string().contains("success"));
    }
}
