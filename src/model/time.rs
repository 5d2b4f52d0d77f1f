//! Stamps: UTC, whole microseconds, years 1 to 9999.
//!
//! A microsecond is what PostgreSQL and Python keep, and what every backend here keeps exactly. Stamps without a zone mean UTC: the real
//! Seeknal writes such stamps, and chrono reads RFC 3339 only with a zone.

use std::ops::Range;

use chrono::{DateTime, Datelike, FixedOffset, NaiveDate, NaiveTime, Timelike, Utc};
use serde::Serializer;

use super::id::{InputError, excerpt};

/// Nanoseconds of a second.
const NANOS: u32 = 1_000_000_000;

/// The microseconds at which the years 1 to 9999 begin and end.
const CALENDAR: (i64, i64) = (-62_135_596_800_000_000, 253_402_300_799_999_999);

/// Cuts a stamp to whole microseconds (towards the past). A leap second becomes the second after it: no store keeps a sixty-first one. A stamp beyond the years
/// 1 to 9999 becomes their end.
pub fn to_micros(stamp: DateTime<Utc>) -> DateTime<Utc> {
    let (first, last) = CALENDAR;
    DateTime::from_timestamp_micros(stamp.timestamp_micros().clamp(first, last)).unwrap_or(stamp)
}

/// Whether a stamp can be stored exactly: whole microseconds, years 1 to 9999.
pub fn is_storable(stamp: DateTime<Utc>) -> bool {
    (1..=9999).contains(&stamp.year()) && to_micros(stamp) == stamp
}

/// Reads an ISO-8601 stamp or date. These forms are taken, every digit of them, and no other:
/// - the date, `YYYY-MM-DD`, which alone means its first instant;
/// - behind it a `T` or a space and the time, `HH:MM` or `HH:MM:SS`, or the latter with a point and digits, which are no finer than a microsecond;
/// - behind the time its zone: `Z`, or what it is ahead of UTC, `+HH:MM`, `+HHMM` or `+HH` (behind: `-`), also after one space. Without one it is UTC.
///
/// `T` and `Z` may be small. Python's `isoformat()` writes these forms, except where an offset has seconds, or it was told to write the hour alone.
///
/// # Errors
/// [`InputError`] if the text is no stamp, outside of the years 1 to 9999, or finer than a microsecond.
pub fn parse(text: &str) -> Result<DateTime<Utc>, InputError> {
    parse_styled(text).map(|(stamp, _)| stamp)
}

/// As [`parse`], and says whether the text named a zone.
pub(crate) fn parse_styled(text: &str) -> Result<(DateTime<Utc>, bool), InputError> {
    let refuse = |why: &str| InputError::new(format!("stamp {}", excerpt(text)), why);
    let (stamp, zoned) =
        read(text).ok_or_else(|| refuse("write it as 2024-01-31, 2024-01-31T12:00:00 or 2024-01-31T12:00:00Z"))?;
    if stamp.timestamp_subsec_nanos() % 1_000 != 0 {
        return Err(refuse("it is finer than a microsecond; cut it to six digits after the second"));
    }
    if !(1..=9999).contains(&stamp.year()) {
        return Err(refuse("its year is outside of 1 to 9999"));
    }
    Ok((to_micros(stamp), zoned))
}

/// Reads it digit by digit. chrono's patterns also take years of any length, signs and blanks: a year of two digits would be one of long ago.
fn read(text: &str) -> Option<(DateTime<Utc>, bool)> {
    let mut rest = Rest(text.as_bytes());
    let date = rest.date()?;
    if rest.0.is_empty() {
        return Some((date.and_hms_opt(0, 0, 0)?.and_utc(), false));
    }
    rest.one_of(b"Tt ")?;
    let stamp = date.and_time(rest.time()?);
    // Python's `strftime` pattern for an offset is often written behind a blank.
    if let [b' ', b'+' | b'-', ..] = rest.0 {
        rest.one_of(b" ")?;
    }
    let Some(zone) = rest.one_of(b"Zz+-") else { return rest.0.is_empty().then(|| (stamp.and_utc(), false)) };
    let ahead = rest.offset(zone)?;
    rest.0.is_empty().then_some((stamp.checked_sub_offset(ahead)?.and_utc(), true))
}

/// What is not read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn one_of(&mut self, these: &[u8]) -> Option<u8> {
        let (first, rest) = self.0.split_first().filter(|(first, _)| these.contains(first))?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self, digits: usize) -> Option<u32> {
        let (number, rest) = self.0.split_at_checked(digits)?;
        let digit = |sum: u32, byte: &u8| byte.is_ascii_digit().then(|| sum * 10 + u32::from(byte - b'0'));
        let number = number.iter().try_fold(0, digit)?;
        self.0 = rest;
        Some(number)
    }

    fn date(&mut self) -> Option<NaiveDate> {
        let year = self.number(4)?;
        self.one_of(b"-")?;
        let month = self.number(2)?;
        self.one_of(b"-")?;
        NaiveDate::from_ymd_opt(i32::try_from(year).ok()?, month, self.number(2)?)
    }

    fn time(&mut self) -> Option<NaiveTime> {
        let hour = self.number(2)?;
        self.one_of(b":")?;
        let minute = self.number(2)?;
        if self.one_of(b":").is_none() {
            return NaiveTime::from_hms_opt(hour, minute, 0);
        }
        let second = self.number(2)?;
        let nanos = if self.one_of(b".").is_some() { self.fraction()? } else { 0 };
        // A leap second is chrono's second before it, with more than a second of nanoseconds.
        let (second, nanos) = if second == 60 { (59, nanos + NANOS) } else { (second, nanos) };
        NaiveTime::from_hms_nano_opt(hour, minute, second, nanos)
    }

    /// The digits behind a point, in nanoseconds. What is finer than those is one more of them: it is told from a stamp that is not.
    fn fraction(&mut self) -> Option<u32> {
        let digits = self.0.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (fraction, rest) = self.0.split_at_checked(digits).filter(|(fraction, _)| !fraction.is_empty())?;
        self.0 = rest;
        let (nanos, finer) = fraction.split_at_checked(9).unwrap_or((fraction, &[]));
        let places = nanos.iter().copied().chain(std::iter::repeat(b'0')).take(9);
        let nanos = places.fold(0, |sum, byte| sum * 10 + u32::from(byte - b'0'));
        Some(if finer.iter().any(|byte| *byte != b'0') { nanos | 1 } else { nanos })
    }

    /// What stands behind the first letter of a zone.
    fn offset(&mut self, zone: u8) -> Option<FixedOffset> {
        if matches!(zone, b'Z' | b'z') {
            return FixedOffset::east_opt(0);
        }
        let hours = self.number(2)?;
        let minutes = if self.0.is_empty() {
            0
        } else {
            let _with_or_without = self.one_of(b":");
            self.number(2).filter(|minutes| *minutes < 60)?
        };
        let seconds = i32::try_from(hours * 3600 + minutes * 60).ok()?;
        FixedOffset::east_opt(if zone == b'-' { -seconds } else { seconds })
    }
}

/// The text of a stamp, without an allocation and without the search of a general formatter. A stamp beyond the years that are stored (a bound of
/// a filter may be one) becomes their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    text: [u8; 27],
    length: usize,
}

impl Stamp {
    /// Of fixed width: it sorts as time does.
    pub(crate) fn of(stamp: DateTime<Utc>) -> Self {
        let stamp = if (1..=9999).contains(&stamp.year()) { stamp } else { to_micros(stamp) };
        let mut text = *b"0000-00-00T00:00:00.000000Z";
        let mut put = |place: Range<usize>, mut value: u32| {
            for digit in text.get_mut(place).unwrap_or_default().iter_mut().rev() {
                // The remainder is a single digit.
                *digit = b'0' + u8::try_from(value % 10).unwrap_or(0);
                value /= 10;
            }
        };
        put(0..4, stamp.year().unsigned_abs());
        put(5..7, stamp.month());
        put(8..10, stamp.day());
        put(11..13, stamp.hour());
        put(14..16, stamp.minute());
        put(17..19, stamp.second());
        put(20..26, stamp.timestamp_subsec_micros());
        Self { text, length: 27 }
    }

    /// With as many digits behind the second as are needed: none, three or six.
    fn short(stamp: DateTime<Utc>) -> Self {
        let mut short = Self::of(stamp);
        short.length = match stamp.timestamp_subsec_micros() {
            0 => 20,
            micros if micros % 1_000 == 0 => 24,
            _ => 27,
        };
        if let Some(last) = short.text.get_mut(short.length - 1) {
            *last = b'Z';
        }
        short
    }

    pub(crate) fn as_str(&self) -> &str {
        self.text.get(..self.length).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
    }
}

/// Serialises as chrono does, for stamps that every entry carries. Only what cannot be stored goes chrono's own way.
pub(crate) fn serialize<S: Serializer>(stamp: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    if is_storable(*stamp) {
        serializer.serialize_str(Stamp::short(*stamp).as_str())
    } else {
        serde::Serialize::serialize(stamp, serializer)
    }
}

/// A stamp as people and other programs read it: `2024-01-10T12:00:00Z`, with three or six digits only where they are needed.
pub fn format(stamp: DateTime<Utc>) -> String {
    stamp.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
}

/// A stamp of fixed width, whose text sorts as time does: `2024-01-10T12:00:00.000000Z`.
pub fn format_sortable(stamp: DateTime<Utc>) -> String {
    stamp.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)
}

/// Microseconds since the epoch, exact for every storable stamp.
pub fn micros(stamp: DateTime<Utc>) -> i64 {
    stamp.timestamp_micros()
}

/// Microseconds since the epoch, rounded up: stamps are before it exactly where they are before this.
pub(crate) fn micros_up(stamp: DateTime<Utc>) -> i64 {
    micros(stamp).saturating_add(i64::from(!stamp.timestamp_subsec_nanos().is_multiple_of(1_000)))
}

/// The stamp of a number of microseconds since the epoch; beyond the years 1 to 9999 their end.
pub(crate) fn nearest(micros: i64) -> DateTime<Utc> {
    let (first, last) = CALENDAR;
    DateTime::from_timestamp_micros(micros.clamp(first, last)).unwrap_or_default()
}

/// The stamp of a number of microseconds since the epoch; `None` outside of the years 1 to 9999.
pub fn from_micros(micros: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_micros(micros).filter(|stamp| is_storable(*stamp))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_with_and_without_zone() {
        let noon = parse("2024-01-10T12:00:00Z").unwrap();
        for same in [
            "2024-01-10T12:00:00",
            "2024-01-10 12:00:00",
            "2024-01-10T12:00",
            "2024-01-10T14:00:00+02:00",
            "2024-01-10 19:00:00+07",
            "2024-01-10T07:00:00.000000-0500",
            "2024-01-10t12:00:00z",
            "2024-01-10 12:00Z",
            "2024-01-10 17:30+05:30",
            "2024-01-10 12:00:00 +0000",
            "2024-01-10T07:00:00.000 -05:00",
            "2024-01-10T12:00:00.0",
            "2024-01-10T12:00:00.000000000000Z",
        ] {
            assert_eq!(parse(same).unwrap(), noon, "{same}");
        }
        assert_eq!(parse("2024-01-10").unwrap(), parse("2024-01-10T00:00:00Z").unwrap());
    }

    #[test]
    fn bad_stamps_are_refused() {
        for bad in [
            "",
            "yesterday",
            "2024-13-01",
            "2024-02-30",
            "2023-02-29T00:00:00",
            "0000-01-01",
            "2024-01-01T00:00:00.1234567Z",
            "2024-01-01T00:00:00.000000001Z",
            "2024-01-01T00:00:00.0000000000001Z",
            "2024-01-01T25:00:00",
            "2024-01-01T24:00:00.000000Z",
            "2024-01-01T00:60",
            "2024-01-01T00:00:61Z",
            "2024-01-01T00:00:0x.000000Z",
            "2024-01-01T00:00:00.00000+Z",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00+24:00",
            "2024-01-01T00:00:00+00:60",
            "2024-01-01T00:00:00+7",
            "2024-01-01T00:00:00+07:",
            "2024-01-01T00:00:00+07:00:00",
            "2024-01-01T00:00:00  +07:00",
            "2024-01-01T00:00:00 + 07:00",
            "2024-01-01T00:00:00 Z",
            "2024-01-01T00:00:00 ",
            "2024-01-01T00:00:00 07:00",
            "2024-01-01 +07:00",
            "2024-01-01T00:00:00ZZ",
            "2024-01-01Z",
            "2024-01-01T",
            "2024-01-01T00",
            "2024-01-01 ",
            "20240101",
            "2024/01/01",
            "24-01-05",
            "224-1-5",
            "02024-01-05",
            " 2024-01-05",
            "+2024-01-05",
            "-024-01-05",
            "2024- 1- 5",
            "2024-01-05T7:05",
            "2024-01-05T+7:05",
            "１２３",
            "２０２４-01-01",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn formats_read_back() {
        for text in
            ["2024-01-10T12:00:00Z", "2024-01-10T12:00:00.500Z", "0001-01-01T00:00:00.000001Z", "9999-12-31T23:59:59.999999Z"]
        {
            let stamp = parse(text).unwrap();
            assert_eq!(format(stamp), text);
            assert_eq!(parse(&format_sortable(stamp)).unwrap(), stamp);
            assert_eq!(from_micros(micros(stamp)), Some(stamp));
        }
    }

    #[test]
    fn stamps_beyond_the_calendar_become_its_ends() {
        assert_eq!(Stamp::of(DateTime::<Utc>::MAX_UTC).as_str(), "9999-12-31T23:59:59.999999Z");
        assert_eq!(Stamp::of(DateTime::<Utc>::MIN_UTC).as_str(), "0001-01-01T00:00:00.000000Z");
    }

    proptest::proptest! {
        #[test]
        fn our_text_is_chronos(micros in -62_135_596_800_000_000_i64..=253_402_300_799_999_999, cut in 0_u32..3) {
            let stamp = from_micros(micros - micros.rem_euclid(1_000_i64.pow(cut))).unwrap_or_default();
            assert_eq!(Stamp::of(stamp).as_str(), format_sortable(stamp));
            assert_eq!(Stamp::short(stamp).as_str(), format(stamp));
            assert_eq!(serialize(&stamp, serde_json::value::Serializer).unwrap(), serde_json::to_value(stamp).unwrap());
        }

        #[test]
        fn what_python_writes_is_read(
            micros in -62_135_510_400_000_000_i64..=253_402_214_399_999_999, ahead in -1_439_i32..=1_439, space: bool, pattern in 0_usize..4,
        ) {
            let (unit, pattern) = [(1, "%H:%M:%S%.6f"), (1_000, "%H:%M:%S%.3f"), (1_000_000, "%H:%M:%S"), (60_000_000, "%H:%M")][pattern];
            let stamp = from_micros(micros - micros.rem_euclid(unit)).unwrap();
            let pattern = format!("%Y-%m-%d{}{pattern}", if space { ' ' } else { 'T' });
            assert_eq!(parse_styled(&stamp.format(&pattern).to_string()).unwrap(), (stamp, false));
            let local = stamp.with_timezone(&FixedOffset::east_opt(ahead * 60).unwrap());
            for zone in ["%:z", "%z"] {
                assert_eq!(parse_styled(&local.format(&format!("{pattern}{zone}")).to_string()).unwrap(), (stamp, true));
            }
            assert_eq!(parse_styled(&stamp.format(&format!("{pattern}Z")).to_string()).unwrap(), (stamp, true));
        }

        // Only the shape is stricter than chrono's own.
        #[test]
        fn what_is_read_is_what_chrono_reads(text in "[0-2][0-9]{3}-[01][0-9]-[0-3][0-9][T ][0-2][0-9]:[0-6][0-9]:[0-6][0-9](\\.[0-9]{1,6})?(Z|[+-][0-2][0-9]:[0-6][0-9])") {
            let chronos = DateTime::parse_from_rfc3339(&text).ok().map(|stamp| stamp.to_utc()).filter(|stamp| stamp.year() > 0);
            assert_eq!(parse(&text).ok(), chronos.map(to_micros));
        }

        #[test]
        fn what_cannot_be_stored_is_serialised_as_chrono_does(nanos in proptest::num::i64::ANY) {
            let stamp = DateTime::from_timestamp_nanos(nanos);
            assert_eq!(serialize(&stamp, serde_json::value::Serializer).unwrap(), serde_json::to_value(stamp).unwrap());
        }
    }
}
