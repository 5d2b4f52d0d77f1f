//! What a shared backend can say of commits that other openings made.

use std::collections::BTreeSet;

use crate::model::RunId;

/// An answer of [`StateBackend::others_committed`](super::StateBackend::others_committed): what other openings may have changed.
///
/// It is a hint that must never say too little: a run that is named without need costs a look at its version, one that is left out is never followed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignCommits {
    /// The runs that may have been changed, made or deleted; `None`: it is not known which.
    pub runs: Option<BTreeSet<RunId>>,
    /// Whether leases may have been granted, given back or taken over.
    pub leases: bool,
}

impl ForeignCommits {
    /// Anything may have changed.
    #[must_use]
    pub fn all() -> Self {
        Self { runs: None, leases: true }
    }

    /// Only these runs, and `leases` or not.
    pub fn of(runs: impl IntoIterator<Item = RunId>, leases: bool) -> Self {
        Self { runs: Some(runs.into_iter().collect()), leases }
    }
}
