//! What others commit: which version storage has, and whether that is newer than what is known here.

use super::{Found, Mode, State};
use crate::model::{RunState, Version};

impl State {
    /// Loads the run as soon as that can be done.
    pub(super) fn reload(&mut self) {
        match self.mode {
            Mode::Ready | Mode::Recovering { loading: false, .. } => self.recover(true),
            // What is being loaded may be older than what is to be seen.
            Mode::Recovering { loading: true, .. } | Mode::Held => self.reload_again = true,
            Mode::Retired => {}
        }
    }

    /// Notes which version storage has, until it can be compared. Who asked earlier may say so later.
    pub(super) fn hear(&mut self, found: Option<Version>) {
        self.found = match (self.found.take(), found) {
            // No version comes back: the higher one is the newer one.
            (Some(Found(Some(before))), Some(found)) => Some(Found(Some(found.max(before)))),
            // Whether it came or went nobody knows here. What is loaded after both is newer.
            (Some(Found(before)), found) if before.is_some() != found.is_some() => {
                self.reload();
                None
            }
            (_, found) => Some(Found(found)),
        };
    }

    /// Whether others wrote what this actor has not seen. Told once: what is loaded after it is newer.
    pub(super) fn is_behind(&mut self) -> bool {
        if !self.chain.is_settled() {
            return false;
        }
        self.found.take().is_some_and(|found| self.lacks(found))
    }

    /// Whether what is committed here is not as new as what storage had.
    pub(super) fn lacks(&self, Found(found): Found) -> bool {
        match (found, self.chain.committed().map(RunState::version)) {
            (Some(found), Some(version)) => found > version,
            (found, version) => found.is_some() != version.is_some(),
        }
    }
}
