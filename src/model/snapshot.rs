//! What readers see: one run at one version.

use std::ops::Deref;

use super::run::{RunState, Version};

/// The committed state of a run at one version: immutable, cheap to clone, never torn.
///
/// [`version`](RunState::version) is what this process knows; [`durable_version`](Snapshot::durable_version) what is in stable storage. They differ
/// only while deferred writes are on their way. If such a write is lost, the version under which it was seen may become that of another commit: what
/// guards by a version that it saw takes one that is not beyond the durable one (`flush` makes it so).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    state: RunState,
    durable: Version,
}

impl Snapshot {
    /// A snapshot of a state of which everything up to `durable` is in stable storage.
    pub fn new(state: RunState, durable: Version) -> Self {
        Self { state, durable }
    }

    /// The version that is in stable storage.
    pub fn durable_version(&self) -> Version {
        self.durable
    }

    /// The state itself.
    pub fn state(&self) -> &RunState {
        &self.state
    }
}

impl Deref for Snapshot {
    type Target = RunState;
    fn deref(&self) -> &RunState {
        &self.state
    }
}
