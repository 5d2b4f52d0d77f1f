//! Batches of which nobody knows whether they were applied, and for how long. Their answers are stored for a day: what is sent again after that is decided anew.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use super::{StoreError, StoreErrorKind, boot_time};
use crate::model::{BatchAnswer, BatchId};

/// An unknown outcome that is older than this cannot be settled any more: other openings may have removed its answer. The time in which the machine sleeps
/// counts.
const SETTLED_WITHIN: Duration = Duration::from_secs(12 * 3600);

/// The unsettled batches of one opening.
#[derive(Debug, Default)]
pub(super) struct Unsettled(HashMap<BatchId, Duration>);

impl Unsettled {
    /// Whether a sending of the batch may have been applied, or may still be.
    #[cfg(feature = "libsql")]
    pub(super) fn holds(&self, id: BatchId) -> bool {
        self.0.contains_key(&id)
    }

    /// An error for a batch that cannot be settled any more.
    pub(super) fn check(&self, id: BatchId, place: impl fmt::Display) -> Result<(), StoreError> {
        self.check_at(id, place, boot_time())
    }

    fn check_at(&self, id: BatchId, place: impl fmt::Display, now: Duration) -> Result<(), StoreError> {
        if self.0.get(&id).is_some_and(|since| now.saturating_sub(*since) > SETTLED_WITHIN) {
            return Err(StoreError::unknown(
                StoreErrorKind::Poisoned,
                format!("{place}: a batch was without an answer for too long to be settled; open the state anew"),
            ));
        }
        Ok(())
    }

    /// What became of a sending.
    pub(super) fn note(&mut self, id: BatchId, answer: &Result<BatchAnswer, StoreError>) {
        self.note_at(id, answer, boot_time());
    }

    fn note_at(&mut self, id: BatchId, answer: &Result<BatchAnswer, StoreError>, now: Duration) {
        match answer {
            Err(error) if error.is_unknown_outcome() => {
                // Whoever comes back for one that is much older is told that it cannot be settled, or has long given up.
                self.0.retain(|_, since| now.saturating_sub(*since) < 2 * SETTLED_WITHIN);
                self.0.entry(id).or_insert(now);
            }
            // An earlier failure does not become certain by a later one.
            Err(error) if !error.is_never_applied() => {}
            _ => {
                self.0.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Batch;

    #[test]
    fn a_batch_is_settled_within_half_a_day_or_not_at_all() {
        let id = Batch::new(Vec::new()).id;
        let mut unsettled = Unsettled::default();
        let hour = |hours: u64| Duration::from_secs(hours * 3600);
        let lost = || Err(StoreError::unknown(StoreErrorKind::Unavailable, "lost"));
        let busy = || StoreError::not_applied(StoreErrorKind::Busy, "busy");
        unsettled.check_at(id, "there", hour(1)).unwrap();
        unsettled.note_at(id, &lost(), hour(1));
        unsettled.note_at(id, &lost(), hour(12));
        unsettled.note_at(id, &Err(busy()), hour(12));
        unsettled.check_at(id, "there", hour(13)).unwrap();
        let error = unsettled.check_at(id, "there", hour(14)).unwrap_err();
        assert!(error.is_unknown_outcome() && error.kind() == StoreErrorKind::Poisoned, "{error}");
        unsettled.note_at(id, &Err(busy().never_applied()), hour(14));
        unsettled.check_at(id, "there", hour(14)).unwrap();
    }
}
