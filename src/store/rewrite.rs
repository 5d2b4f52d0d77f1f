//! Which rows of intervals must be rewritten after a change: as few as there can be, however many there are.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::model::{Interval, IntervalSet, time};

/// A stretch of rows to rewrite: those that start from `from` to `to` (both inclusive) become `islands`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rewrite {
    pub(crate) from: DateTime<Utc>,
    pub(crate) to: DateTime<Utc>,
    pub(crate) islands: Vec<Interval>,
}

/// The stretches that must be rewritten, when the set is what it is now and has changed at most inside `changed`. A row may be in two of them: it
/// is deleted and written twice with the same values.
pub(crate) fn rewrites(now: &IntervalSet, changed: &IntervalSet) -> Vec<Rewrite> {
    changed.iter().map(|range| rewrite(now, range)).collect()
}

fn rewrite(now: &IntervalSet, range: Interval) -> Rewrite {
    // The islands that overlap or touch the range: one before its start, one at its start, one behind every gap, one at its end.
    let before = time::from_micros(time::micros(range.start()).saturating_sub(1));
    let behind_gaps = now.gaps(range).into_iter().map(|gap| gap.end());
    let places = before.into_iter().chain([range.start(), range.end()]).chain(behind_gaps);
    let islands: BTreeMap<_, _> =
        places.filter_map(|place| now.island_at(place)).map(|island| (island.start(), island)).collect();
    let from = islands.keys().next().copied().unwrap_or(range.start()).min(range.start());
    let to = islands.values().map(Interval::end).max().unwrap_or(range.end()).max(range.end());
    Rewrite { from, to, islands: islands.into_values().collect() }
}
