//! What a figure should reach.

use std::fmt;

/// What is asked of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// This share of the yardstick's rate, or more.
    Ratio(f64),
    /// So many operations a second, or more.
    Rate(f64),
}

impl Goal {
    pub(crate) fn is_met(self, rate: f64, ratio: Option<f64>) -> bool {
        match self {
            Self::Ratio(wanted) => ratio.is_some_and(|ratio| ratio >= wanted),
            Self::Rate(wanted) => rate >= wanted,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio(wanted) => write!(f, "{wanted:.2}x"),
            Self::Rate(wanted) => write!(f, "{wanted:.0}/s"),
        }
    }
}
