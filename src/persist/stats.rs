//! Counters and histograms of the flushes, kept in atomics so that reading them disturbs nobody.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

const BUCKETS: usize = 40;

/// A distribution in powers of two: bucket `i` counts the values below `2^i` that no lower bucket has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Histogram {
    buckets: Vec<u64>,
    sum: u64,
}

impl Histogram {
    /// How many values were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The sum of all values.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The upper bound of every bucket (no value in it reaches that) with how many values are in it, in order, as exporters take them. Values beyond the
    /// last bound are in the last bucket.
    pub fn buckets(&self) -> impl ExactSizeIterator<Item = (u64, u64)> + '_ {
        self.buckets.iter().enumerate().map(|(index, count)| (1_u64 << index.min(63), *count))
    }

    /// Their mean; zero if there are none.
    #[expect(clippy::cast_precision_loss, reason = "a mean for people")]
    pub fn mean(&self) -> f64 {
        let count = self.count();
        if count == 0 { 0.0 } else { self.sum as f64 / count as f64 }
    }

    /// An upper bound of the value below which this share (0.0 to 1.0) of all values lies; exact within a factor of two.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shares of a count")]
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.count() as f64 * share.clamp(0.0, 1.0)).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted.max(1) {
                return 1_u64 << index.min(63);
            }
        }
        0
    }
}

#[derive(Debug)]
pub(crate) struct Recorder {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum: AtomicU64::new(0) }
    }
}

impl Recorder {
    fn record(&self, value: u64) {
        let index = usize::try_from(64 - value.leading_zeros()).unwrap_or(BUCKETS).min(BUCKETS - 1);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Histogram {
        Histogram {
            buckets: self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            sum: self.sum.load(Ordering::Relaxed),
        }
    }
}

/// What the persistence actors counted since the coordinator was opened.
#[derive(Debug, Default)]
pub(crate) struct PersistStats {
    /// Entries in a batch.
    pub(crate) batch_entries: Recorder,
    /// Microseconds of a flush.
    pub(crate) flush_micros: Recorder,
    pub(crate) applied: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) failed_flushes: AtomicU64,
    pub(crate) unknown_flushes: AtomicU64,
}

impl PersistStats {
    pub(crate) fn flushed(&self, entries: usize, took: Duration) {
        self.batch_entries.record(u64::try_from(entries).unwrap_or(u64::MAX));
        self.flush_micros.record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_bound_the_values() {
        let recorder = Recorder::default();
        for value in [0, 1, 3, 100, 1000, u64::MAX] {
            recorder.record(value);
        }
        let histogram = recorder.read();
        assert_eq!(histogram.count(), 6);
        assert!(histogram.quantile(0.5) >= 3);
        assert!(histogram.quantile(0.8) >= 1000);
        assert_eq!(Recorder::default().read().quantile(0.5), 0);
    }
}
