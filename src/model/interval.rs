//! Time intervals and sets of them: which stretches of time are complete.

use std::fmt;
use std::ops::Range;

use chrono::{DateTime, Datelike, Utc};
use rangemap::RangeSet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::InputError;
use super::time;

/// A half-open stretch of time in UTC: the start belongs to it, the end does not. Never empty, never inverted, whole microseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interval {
    start: DateTime<Utc>,
    end: DateTime<Utc>,
}

impl Interval {
    /// Checks and keeps a stretch of time. Bounds are cut to whole microseconds (towards the past), as all stamps are.
    ///
    /// # Errors
    /// [`InputError`] if the end is not after the start (also where both are cut to the same microsecond), or a bound is outside of the years 1 to 9999.
    pub fn new(start: DateTime<Utc>, end: DateTime<Utc>) -> Result<Self, InputError> {
        let name = || format!("interval {} .. {}", time::format(start), time::format(end));
        if [start, end].iter().any(|bound| !(1..=9999).contains(&bound.year())) {
            return Err(InputError::new(name(), "bounds are in the years 1 to 9999"));
        }
        let (start, end) = (time::to_micros(start), time::to_micros(end));
        match start.cmp(&end) {
            std::cmp::Ordering::Less => Ok(Self { start, end }),
            std::cmp::Ordering::Equal => {
                Err(InputError::new(name(), "it is empty; the end must be a microsecond after the start, or later (half-open)"))
            }
            std::cmp::Ordering::Greater => Err(InputError::new(name(), "it is inverted; the end must be after the start")),
        }
    }

    /// Reads two stamps (see [`time::parse`](crate::model::time::parse)); stamps without a zone mean UTC.
    ///
    /// # Errors
    /// [`InputError`] if one of them is no stamp or finer than a microsecond, or as [`Interval::new`].
    pub fn parse(start: &str, end: &str) -> Result<Self, InputError> {
        Self::new(
            time::parse(start).map_err(|error| error.within("interval start"))?,
            time::parse(end).map_err(|error| error.within("interval end"))?,
        )
    }

    /// The first instant that belongs to it.
    pub fn start(&self) -> DateTime<Utc> {
        self.start
    }

    /// The first instant after it.
    pub fn end(&self) -> DateTime<Utc> {
        self.end
    }

    fn range(self) -> Range<DateTime<Utc>> {
        self.start..self.end
    }

    fn of(range: &Range<DateTime<Utc>>) -> Self {
        Self { start: range.start, end: range.end }
    }
}

impl TryFrom<Range<DateTime<Utc>>> for Interval {
    type Error = InputError;
    fn try_from(range: Range<DateTime<Utc>>) -> Result<Self, InputError> {
        Self::new(range.start, range.end)
    }
}

/// What may stand where an interval is given: an [`Interval`], a range or a pair of stamps, or a pair of texts.
pub trait IntoInterval {
    /// Checks the interval, where it is not checked already.
    ///
    /// # Errors
    /// [`InputError`] as [`Interval::new`] and [`Interval::parse`].
    fn into_interval(self) -> Result<Interval, InputError>;
}

impl IntoInterval for Interval {
    fn into_interval(self) -> Result<Interval, InputError> {
        Ok(self)
    }
}

impl IntoInterval for Range<DateTime<Utc>> {
    fn into_interval(self) -> Result<Interval, InputError> {
        Interval::try_from(self)
    }
}

impl IntoInterval for &Interval {
    fn into_interval(self) -> Result<Interval, InputError> {
        Ok(*self)
    }
}

impl IntoInterval for (DateTime<Utc>, DateTime<Utc>) {
    fn into_interval(self) -> Result<Interval, InputError> {
        Interval::new(self.0, self.1)
    }
}

impl IntoInterval for (&str, &str) {
    fn into_interval(self) -> Result<Interval, InputError> {
        Interval::parse(self.0, self.1)
    }
}

impl IntoInterval for (String, String) {
    fn into_interval(self) -> Result<Interval, InputError> {
        Interval::parse(&self.0, &self.1)
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} .. {}", time::format(self.start), time::format(self.end))
    }
}

impl fmt::Debug for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (time::format(self.start), time::format(self.end)).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (start, end) = <(String, String)>::deserialize(deserializer)?;
        Self::parse(&start, &end).map_err(serde::de::Error::custom)
    }
}

/// A set of instants, kept as the fewest half-open intervals: adding merges what overlaps or touches.
///
/// With n islands here and m there, union, difference and intersection take O((n + m) log (n + m)), adding and containment O(log n)
/// (plus what is merged away), gaps O(log n + answer).
///
/// ```
/// use seeknal_state::{Interval, IntervalSet};
///
/// let mut done = IntervalSet::default();
/// done.insert(Interval::parse("2024-01-01", "2024-01-02")?);
/// done.insert(Interval::parse("2024-01-02", "2024-01-03")?); // it touches the first: they are one now
/// done.insert(Interval::parse("2024-01-05", "2024-01-06")?);
/// assert_eq!(done.len(), 2);
/// let todo = done.gaps(Interval::parse("2024-01-01", "2024-01-07")?);
/// assert_eq!(todo, [Interval::parse("2024-01-03", "2024-01-05")?, Interval::parse("2024-01-06", "2024-01-07")?]);
/// # Ok::<(), seeknal_state::InputError>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct IntervalSet(RangeSet<DateTime<Utc>>);

impl IntervalSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many islands (maximal intervals) there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The islands in order of time; no two of them overlap or touch.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Interval> + '_ {
        self.0.iter().map(Interval::of)
    }

    /// Adds an interval; what overlaps or touches becomes one island.
    pub fn insert(&mut self, interval: Interval) {
        self.0.insert(interval.range());
    }

    /// Takes an interval out; an island that it cuts becomes two.
    pub fn remove(&mut self, interval: Interval) {
        self.0.remove(interval.range());
    }

    /// Whether every instant of the interval is in the set.
    pub fn contains(&self, interval: Interval) -> bool {
        self.island_at(interval.start).is_some_and(|island| island.end >= interval.end)
    }

    /// Whether an instant is in the set.
    pub fn contains_instant(&self, instant: DateTime<Utc>) -> bool {
        self.0.contains(&instant)
    }

    /// The island that holds an instant.
    pub fn island_at(&self, instant: DateTime<Utc>) -> Option<Interval> {
        self.0.get(&instant).map(Interval::of)
    }

    /// Whether any instant of the interval is in the set.
    pub fn overlaps(&self, interval: Interval) -> bool {
        self.0.overlaps(&interval.range())
    }

    /// The parts of `within` that are not in the set, in order of time.
    pub fn gaps(&self, within: Interval) -> Vec<Interval> {
        self.0.gaps(&within.range()).map(|range| Interval::of(&range)).collect()
    }

    /// Everything that is in one of the two.
    pub fn union(&self, other: &Self) -> Self {
        let (mut all, few) = if self.len() >= other.len() { (self.clone(), other) } else { (other.clone(), self) };
        all.0.extend(few.0.iter().cloned());
        all
    }

    /// Everything that is here and not there.
    pub fn difference(&self, other: &Self) -> Self {
        let mut rest = self.clone();
        for island in other.0.iter() {
            rest.0.remove(island.clone());
        }
        rest
    }

    /// Everything that is in both.
    pub fn intersection(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).collect())
    }
}

impl FromIterator<Interval> for IntervalSet {
    fn from_iter<I: IntoIterator<Item = Interval>>(intervals: I) -> Self {
        Self(intervals.into_iter().map(Interval::range).collect())
    }
}

impl Extend<Interval> for IntervalSet {
    fn extend<I: IntoIterator<Item = Interval>>(&mut self, intervals: I) {
        self.0.extend(intervals.into_iter().map(Interval::range));
    }
}

impl fmt::Debug for IntervalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Serialize for IntervalSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for IntervalSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Vec::<Interval>::deserialize(deserializer)?.into_iter().collect())
    }
}
