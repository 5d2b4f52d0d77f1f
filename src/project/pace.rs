//! How much a cleanup deletes at once, so that those who write beside it are not held up.

use std::time::Duration;

use super::cleanup::Doomed;
use crate::model::RunId;
use crate::store::StateBackend;

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

/// Intervals, and partitions, of a run that are counted at most: one that has so many is heavy.
const COUNTED: u32 = 100_000;

/// How much goes at once. What a run takes is known by its nodes and, where the storage tells it cheaply, by what they completed, and not by how fast the
/// storage is: so it begins with one run, and goes by how long the last batch took.
#[derive(Debug)]
pub(super) struct Pace {
    weight: u64,
    /// What goes now weighs this much.
    going: u64,
    /// The run that did not fit any more, and its weight.
    weighed: Option<(RunId, u64)>,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { weight: 1, going: 0, weighed: None }
    }

    /// The runs that go next, one at least, and those that are left.
    pub(super) async fn next<'p>(&mut self, backend: &dyn StateBackend, left: &'p [Doomed]) -> (&'p [Doomed], &'p [Doomed]) {
        let mut runs = 0;
        self.going = 0;
        for doomed in left.iter().take(BATCH) {
            let weight = match self.weighed.take() {
                Some((run, weight)) if run == doomed.run_id => weight,
                _ => weight_of(backend, doomed).await,
            };
            let together = self.going.saturating_add(weight);
            if runs > 0 && together > self.weight {
                self.weighed = Some((doomed.run_id.clone(), weight));
                break;
            }
            self.going = together;
            runs += 1;
        }
        left.split_at_checked(runs).unwrap_or((left, &[]))
    }

    /// What went took so long. Where not `all` of it went, what stayed took no time: that is no sign that more would fit.
    pub(super) fn took(&mut self, took: Duration, all: bool) {
        let fits = u128::from(self.going) * TARGET.as_micros() / took.as_micros().max(1);
        let most = if all { self.going.max(self.weight).saturating_mul(GROWTH) } else { self.weight };
        self.weight = u64::try_from(fits).unwrap_or(u64::MAX).clamp(LIGHT, most.max(LIGHT));
    }
}

async fn weight_of(backend: &dyn StateBackend, doomed: &Doomed) -> u64 {
    // What fails here fails where it is deleted, and is told there.
    let completed = backend.count_completed(&doomed.run_id, COUNTED).await.ok().flatten().unwrap_or(0);
    doomed.nodes.saturating_add(completed).saturating_add(1)
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
    use crate::model::{RunStatus, Version};
    use crate::store::MemoryBackend;

    #[tokio::test]
    async fn a_batch_is_as_large_as_the_last_one_was_fast() {
        let doomed = |nodes| Doomed {
            run_id: RunId::new(format!("of {nodes}")).unwrap(),
            status: RunStatus::Success,
            ended_at: DateTime::UNIX_EPOCH,
            version: Version(1),
            nodes,
        };
        let backend = MemoryBackend::new();
        let (small, large) = (vec![doomed(9); 200], vec![doomed(8_000); 3]);
        let mut pace = Pace::new();
        let mut runs = Vec::new();
        for _ in 0..5 {
            let (some, rest) = pace.next(&backend, &small).await;
            assert_eq!(some.len() + rest.len(), 200);
            runs.push(some.len());
            pace.took(Duration::from_millis(1), true);
        }
        assert_eq!(runs, [1, 6, 25, 50, 50]);
        assert_eq!(pace.next(&backend, &large).await.0.len(), 2, "as many as fit");
        pace.going = 500;
        pace.took(Duration::from_secs(1), true);
        assert_eq!(
            pace.next(&backend, &small).await.0.len(),
            6,
            "ten times as long as it should, but never less than what is light"
        );
        pace.going = 8_001;
        pace.took(Duration::from_secs(20), true);
        assert_eq!(pace.next(&backend, &[doomed(20), doomed(80)]).await.0.len(), 1);
        pace.took(Duration::MAX, true);
        pace.took(Duration::from_millis(1), false);
        assert_eq!(pace.next(&backend, &small).await.0.len(), 6);
        assert!(pace.next(&backend, &[]).await.0.is_empty());
    }
}
