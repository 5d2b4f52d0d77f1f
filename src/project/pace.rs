//! How much a cleanup deletes at once, so that those who write beside it are not held up.

use std::time::Duration;

use super::cleanup::Doomed;

/// Runs deleted in one batch at most.
const BATCH: usize = 50;
/// How long a batch should take: whoever writes beside it waits that long. A run that takes longer goes by itself.
const TARGET: Duration = Duration::from_millis(100);
/// Runs and nodes that go together however long the last batch took: so few hold nobody up, and where time goes by on the way to a server, or in waiting for
/// others, fewer would not be faster.
const LIGHT: u64 = 64;
/// How much more than the last one a batch may hold.
const GROWTH: u64 = 4;
/// Others are left a turn as long as they had to wait, and at most this.
const LONGEST_TURN: Duration = Duration::from_secs(1);

/// How much goes at once. What a run takes is known by its nodes alone, and not what each of them completed, or how fast the storage is: so it begins with one
/// run, and goes by how long the last batch took.
#[derive(Debug)]
pub(super) struct Pace {
    weight: u64,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { weight: 1 }
    }

    /// The runs that go next, one at least, and those that are left.
    pub(super) fn next<'p>(&self, left: &'p [Doomed]) -> (&'p [Doomed], &'p [Doomed]) {
        let mut weight = 0_u64;
        let fits = |doomed: &&Doomed| {
            weight = weight.saturating_add(weight_of(doomed));
            weight <= self.weight
        };
        let runs = left.iter().take(BATCH).take_while(fits).count().max(1);
        left.split_at_checked(runs).unwrap_or((left, &[]))
    }

    /// What went took so long.
    pub(super) fn took(&mut self, gone: &[Doomed], took: Duration) {
        let weight: u64 = gone.iter().map(weight_of).sum();
        let fits = u128::from(weight) * TARGET.as_micros() / took.as_micros().max(1);
        let most = weight.max(self.weight).saturating_mul(GROWTH);
        self.weight = u64::try_from(fits).unwrap_or(u64::MAX).clamp(LIGHT, most.max(LIGHT));
    }
}

fn weight_of(doomed: &Doomed) -> u64 {
    doomed.nodes.saturating_add(1)
}

/// Between two batches those who write beside this have their turn.
pub(super) async fn leave_a_turn(shared: bool, took: Duration) {
    if shared {
        tokio::time::sleep(took.min(LONGEST_TURN)).await;
    } else {
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::model::{RunId, RunStatus, Version};

    #[test]
    fn a_batch_is_as_large_as_the_last_one_was_fast() {
        let doomed = |nodes| Doomed {
            run_id: RunId::new("r").unwrap(),
            status: RunStatus::Success,
            ended_at: DateTime::UNIX_EPOCH,
            version: Version(1),
            nodes,
        };
        let (small, large) = (vec![doomed(9); 200], vec![doomed(8_000); 3]);
        let mut pace = Pace::new();
        let mut runs = Vec::new();
        for _ in 0..5 {
            let (some, rest) = pace.next(&small);
            assert_eq!(some.len() + rest.len(), 200);
            runs.push(some.len());
            pace.took(some, Duration::from_millis(1));
        }
        assert_eq!(runs, [1, 6, 25, 50, 50]);
        assert_eq!(pace.next(&large).0.len(), 2, "as many as fit");
        pace.took(&small[..50], Duration::from_secs(1));
        assert_eq!(pace.next(&small).0.len(), 6, "ten times as long as it should, but never less than what is light");
        pace.took(&large[..1], Duration::from_secs(20));
        assert_eq!(pace.next(&[doomed(20), doomed(80)]).0.len(), 1);
        pace.took(&small[..1], Duration::MAX);
        assert_eq!(pace.next(&small).0.len(), 6);
        assert!(pace.next(&[]).0.is_empty());
    }
}
