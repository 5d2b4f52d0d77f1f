//! Interval sets against a naive oracle: a bit for every instant of a short time line.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests are tests")]

use chrono::{DateTime, Utc};
use proptest::prelude::*;
use seeknal_state::model::{Interval, IntervalSet, IntoInterval, time};

/// Instants of the time line; one of them is one microsecond.
const LINE: usize = 64;

fn stamp(tick: usize) -> DateTime<Utc> {
    time::from_micros(1_704_067_200_000_000 + i64::try_from(tick).unwrap()).unwrap()
}

fn span(start: usize, end: usize) -> Interval {
    Interval::new(stamp(start), stamp(end)).unwrap()
}

/// A set of instants, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bits(u64);

impl Bits {
    fn of(start: usize, end: usize) -> Self {
        Self((start..end).fold(0, |bits, tick| bits | 1 << tick))
    }

    /// The maximal stretches of set bits.
    fn islands(self) -> Vec<Interval> {
        let mut islands = Vec::new();
        let mut start = None;
        for tick in 0..=LINE {
            let set = tick < LINE && self.0 >> tick & 1 == 1;
            match (set, start) {
                (true, None) => start = Some(tick),
                (false, Some(from)) => {
                    islands.push(span(from, tick));
                    start = None;
                }
                _ => {}
            }
        }
        islands
    }
}

fn islands(set: &IntervalSet) -> Vec<Interval> {
    set.iter().collect()
}

/// An interval of the line that is not empty.
fn part() -> impl Strategy<Value = (usize, usize)> {
    (0..LINE).prop_flat_map(|start| (Just(start), start + 1..=LINE))
}

/// What was added (`true`) and taken out, in order.
fn steps() -> impl Strategy<Value = Vec<(bool, (usize, usize))>> {
    // Short intervals make many islands, long ones merge and wipe.
    let short = (0..LINE - 3, 1..4_usize).prop_map(|(start, len)| (start, start + len));
    prop::collection::vec((prop::bool::weighted(0.7), prop_oneof![3 => short, 1 => part()]), 0..40)
}

fn build(steps: &[(bool, (usize, usize))]) -> (IntervalSet, Bits) {
    let (mut set, mut bits) = (IntervalSet::new(), Bits(0));
    for (add, (start, end)) in steps {
        let (interval, mask) = (span(*start, *end), Bits::of(*start, *end));
        if *add {
            set.insert(interval);
            bits.0 |= mask.0;
        } else {
            set.remove(interval);
            bits.0 &= !mask.0;
        }
    }
    (set, bits)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn adding_and_removing_match_the_oracle(steps in steps()) {
        let (mut set, mut bits) = (IntervalSet::new(), Bits(0));
        for step in &steps {
            let (start, end) = step.1;
            if step.0 {
                set.insert(span(start, end));
                bits.0 |= Bits::of(start, end).0;
            } else {
                set.remove(span(start, end));
                bits.0 &= !Bits::of(start, end).0;
            }
            prop_assert_eq!(islands(&set), bits.islands());
        }
        prop_assert_eq!(set.len(), bits.islands().len());
        prop_assert_eq!(set.is_empty(), bits.0 == 0);
        let backwards: Vec<Interval> = set.iter().rev().collect();
        prop_assert_eq!(backwards.into_iter().rev().collect::<Vec<_>>(), bits.islands());
    }

    #[test]
    fn islands_never_overlap_or_touch(steps in steps()) {
        let found = islands(&build(&steps).0);
        for pair in found.windows(2) {
            prop_assert!(pair[0].end() < pair[1].start(), "{:?}", pair);
        }
    }

    #[test]
    fn the_way_does_not_matter(steps in steps()) {
        // The same instants give the same value, however they came together.
        let (set, bits) = build(&steps);
        let again: IntervalSet = bits.islands().into_iter().rev().collect();
        prop_assert_eq!(&set, &again);
        let mut extended = IntervalSet::new();
        extended.extend(bits.islands().into_iter().flat_map(|island| [island, island]));
        prop_assert_eq!(&set, &extended);
    }

    #[test]
    fn set_operations_match_the_oracle(a in steps(), b in steps()) {
        let ((set_a, a), (set_b, b)) = (build(&a), build(&b));
        prop_assert_eq!(islands(&set_a.union(&set_b)), Bits(a.0 | b.0).islands());
        prop_assert_eq!(islands(&set_b.union(&set_a)), Bits(a.0 | b.0).islands());
        prop_assert_eq!(islands(&set_a.difference(&set_b)), Bits(a.0 & !b.0).islands());
        prop_assert_eq!(islands(&set_b.difference(&set_a)), Bits(b.0 & !a.0).islands());
        prop_assert_eq!(islands(&set_a.intersection(&set_b)), Bits(a.0 & b.0).islands());
        prop_assert_eq!(islands(&set_b.intersection(&set_a)), Bits(a.0 & b.0).islands());
        prop_assert_eq!(islands(&set_a), a.islands(), "the operands are as they were");
    }

    #[test]
    fn questions_match_the_oracle(steps in steps(), (start, end) in part()) {
        let (set, bits) = build(&steps);
        let (interval, mask) = (span(start, end), Bits::of(start, end).0);
        prop_assert_eq!(set.contains(interval), bits.0 & mask == mask);
        prop_assert_eq!(set.overlaps(interval), bits.0 & mask != 0);
        prop_assert_eq!(set.gaps(interval), Bits(mask & !bits.0).islands());
        for tick in 0..LINE {
            let expected = bits.islands().into_iter().find(|island| island.start() <= stamp(tick) && stamp(tick) < island.end());
            prop_assert_eq!(set.contains_instant(stamp(tick)), expected.is_some());
            prop_assert_eq!(set.island_at(stamp(tick)), expected);
        }
    }

    #[test]
    fn gaps_and_islands_make_up_the_whole(steps in steps(), (start, end) in part()) {
        let (mut set, _) = build(&steps);
        let within = span(start, end);
        for gap in set.gaps(within) {
            prop_assert!(!set.overlaps(gap));
            set.insert(gap);
        }
        prop_assert!(set.contains(within));
        prop_assert!(set.gaps(within).is_empty());
    }

    #[test]
    fn sets_survive_json(steps in steps()) {
        let (set, _) = build(&steps);
        let text = serde_json::to_string(&set).unwrap();
        prop_assert_eq!(serde_json::from_str::<IntervalSet>(&text).unwrap(), set);
    }

    #[test]
    fn stamps_survive_their_text(micros in -62_135_596_800_000_000_i64..=253_402_300_799_999_999) {
        let stamp = time::from_micros(micros).unwrap();
        prop_assert_eq!(time::micros(stamp), micros);
        prop_assert_eq!(time::parse(&time::format(stamp)).unwrap(), stamp);
        prop_assert_eq!(time::parse(&time::format_sortable(stamp)).unwrap(), stamp);
        // Without its zone the text means the same instant.
        let text = time::format(stamp);
        prop_assert_eq!(time::parse(text.trim_end_matches('Z')).unwrap(), stamp);
        prop_assert_eq!(time::parse(&text.replace('T', " ").replace('Z', "+00:00")).unwrap(), stamp);
    }

    #[test]
    fn sortable_texts_sort_as_time_does(a in -62_135_596_800_000_000_i64..=253_402_300_799_999_999, b in -62_135_596_800_000_000_i64..=253_402_300_799_999_999) {
        let text = |micros| time::format_sortable(time::from_micros(micros).unwrap());
        prop_assert_eq!(text(a).cmp(&text(b)), a.cmp(&b));
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[0-9TZ:+. -]{0,40}|\\PC{0,20}") {
        if let Ok(stamp) = time::parse(&text) {
            prop_assert!(time::is_storable(stamp));
            prop_assert_eq!(time::from_micros(time::micros(stamp)), Some(stamp));
        }
    }
}

#[test]
fn touching_intervals_become_one() {
    let set: IntervalSet = [span(0, 5), span(10, 15), span(5, 10)].into_iter().collect();
    assert_eq!(islands(&set), [span(0, 15)]);
    assert!(set.contains(span(0, 15)));
    assert!(!set.contains(span(0, 16)));
    assert!(!set.contains_instant(stamp(15)), "the end does not belong to it");
}

#[test]
fn an_interval_is_given_in_many_forms() {
    let (start, end) = ("2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z");
    let one = Interval::parse(start, end).unwrap();
    assert_eq!((&one).into_interval().unwrap(), one);
    assert_eq!((one.start(), one.end()).into_interval().unwrap(), one);
    assert_eq!((one.start()..one.end()).into_interval().unwrap(), one);
    assert_eq!((start.to_owned(), end.to_owned()).into_interval().unwrap(), one);
    assert!((one.end(), one.start()).into_interval().is_err());
}

#[test]
fn what_is_no_interval_is_refused() {
    let fine = stamp(0);
    let nanos = |nanos| fine + chrono::Duration::nanoseconds(nanos);
    let late = fine.checked_add_signed(chrono::Duration::days(365 * 9_000)).unwrap();
    let early = fine - chrono::Duration::days(365 * 2_100);
    for (start, end, why) in [
        (fine, fine, "empty"),
        (stamp(1), fine, "inverted"),
        (nanos(1), nanos(999), "empty"),
        (nanos(999), nanos(1), "empty"),
        (nanos(2_000), nanos(1_999), "inverted"),
        (fine, late, "years 1 to 9999"),
        (early, fine, "years 1 to 9999"),
        (DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC, "years 1 to 9999"),
    ] {
        let error = Interval::new(start, end).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert!((start..end).into_interval().is_err());
    }
    for (start, end, place) in
        [("yesterday", "2024-01-01", "start"), ("2024-01-01", "", "end"), ("2024-01-01", "2024-01-01T00:00", "empty")]
    {
        let error = (start, end).into_interval().unwrap_err().to_string();
        assert!(error.contains(place), "{error}");
    }
    for text in
        ["[[\"2024-01-02\",\"2024-01-01\"]]", "[[\"2024-01-01\",\"2024-01-01\"]]", "[[\"2024-01-01\"]]", "[[1,2]]", "[null]"]
    {
        assert!(serde_json::from_str::<IntervalSet>(text).is_err(), "{text}");
    }
}

#[test]
fn a_slip_of_the_pen_is_no_year_of_long_ago() {
    // Each of them once was read as a date: the first as one of the year 24, which marked two thousand years complete.
    for slip in
        ["24-01-01", "224-1-5", " 2024-01-01", "+2024-01-01", "2024- 1- 1", "2024-1-1", "2024-01-01T7:05", "2024-01-01T07:5:00"]
    {
        let error = (slip, "2024-02-01").into_interval().unwrap_err().to_string();
        assert!(error.contains("interval start") && error.contains("2024-01-31T12:00:00Z"), "{slip}: {error}");
        assert!(("2024-02-01", slip).into_interval().is_err(), "{slip}");
    }
}

#[test]
fn bounds_are_cut_to_whole_microseconds() {
    let nanos = |nanos| stamp(0) + chrono::Duration::nanoseconds(nanos);
    assert_eq!(Interval::new(nanos(999), nanos(5_001)).unwrap(), span(0, 5));
    assert_eq!((nanos(1_500)..nanos(2_000)).into_interval().unwrap(), span(1, 2));
    let last = time::from_micros(253_402_300_799_999_999).unwrap();
    assert_eq!(Interval::new(stamp(0), last + chrono::Duration::nanoseconds(999)).unwrap().end(), last);
}

#[test]
fn stamps_without_a_zone_mean_utc() {
    let zoned = Interval::parse("2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z").unwrap();
    for (start, end) in [
        ("2024-01-01T00:00:00", "2024-01-02T00:00:00"),
        ("2024-01-01", "2024-01-02"),
        ("2024-01-01 00:00", "2024-01-02 00:00:00.000000"),
        ("2024-01-01T07:00:00+07:00", "2024-01-01T19:00:00-05:00"),
    ] {
        assert_eq!(Interval::parse(start, end).unwrap(), zoned, "{start} .. {end}");
    }
}

#[test]
fn a_leap_second_is_the_second_after_it() {
    // No store keeps a sixty-first second, so that it must not come in.
    for text in ["2016-12-31T23:59:60Z", "2016-12-31T23:59:60", "2016-12-31T23:59:60.000000+00:00"] {
        let stamp = time::parse(text).unwrap();
        assert_eq!(stamp, time::parse("2017-01-01T00:00:00Z").unwrap(), "{text}");
        assert_eq!(time::from_micros(time::micros(stamp)), Some(stamp));
    }
    let leap =
        chrono::NaiveDate::from_ymd_opt(2016, 12, 31).unwrap().and_hms_nano_opt(23, 59, 59, 1_500_000_000).unwrap().and_utc();
    assert!(!time::is_storable(leap));
    assert_eq!(time::to_micros(leap), time::parse("2017-01-01T00:00:00.5Z").unwrap());
}

#[test]
fn bounds_of_time_are_exact() {
    let whole = Interval::parse("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z").unwrap();
    let mut set = IntervalSet::new();
    set.insert(whole);
    let hole = Interval::parse("2024-01-01T00:00:00.000001Z", "2024-01-01T00:00:00.000002Z").unwrap();
    set.remove(hole);
    assert_eq!(set.len(), 2);
    assert_eq!(set.gaps(whole), [hole]);
    assert!(time::parse("10000-01-01").is_err());
    assert!(time::parse("0000-12-31T23:59:59Z").is_err());
}

/// 100,000 islands on either side: finishes at once if every operation takes its time by islands, and not in hours if it goes by pairs.
#[test]
fn many_islands_are_exact() {
    const ISLANDS: usize = 100_000;
    let every = |step: usize, shift: usize, len: usize| -> IntervalSet {
        (0..ISLANDS).map(|index| (index * 7_919 % ISLANDS) * step + shift).map(|start| span(start, start + len)).collect()
    };
    let (even, odd) = (every(10, 0, 3), every(10, 5, 3));
    assert_eq!((even.len(), odd.len()), (ISLANDS, ISLANDS));
    let both = even.union(&odd);
    assert_eq!(both.len(), 2 * ISLANDS);
    assert_eq!(both.difference(&odd), even);
    assert_eq!(both.intersection(&odd), odd);
    assert!(even.intersection(&odd).is_empty());
    assert_eq!(even.difference(&odd), even);
    let whole = span(0, ISLANDS * 10);
    assert_eq!(both.gaps(whole).len(), 2 * ISLANDS);
    let mut filled = both.clone();
    filled.extend(both.gaps(whole));
    assert_eq!(islands(&filled), [whole]);
    // Short questions everywhere on a long line.
    let found: usize = (0..ISLANDS).step_by(10).map(|index| both.gaps(span(index * 10, index * 10 + 10)).len()).sum();
    assert_eq!(found, 2 * ISLANDS / 10);
    let mut rest = both;
    rest.remove(whole);
    assert!(rest.is_empty());
}
