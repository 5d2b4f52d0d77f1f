//! Stamps: UTC, whole microseconds, years 1 to 9999.
//!
//! A microsecond is what PostgreSQL and Python keep, and what every backend here keeps exactly. Stamps without a zone mean UTC: the real
//! Seeknal writes such stamps, and chrono reads RFC 3339 only with a zone.

use std::ops::Range;

use chrono::{DateTime, Datelike, NaiveDate, NaiveDateTime, Timelike, Utc};
use serde::Serializer;

use super::id::{InputError, excerpt};

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

/// Reads an ISO-8601 stamp or date, with or without a zone (without: UTC), with `T` or a space.
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

fn read(text: &str) -> Option<(DateTime<Utc>, bool)> {
    if text.len() > 64 || !text.is_ascii() {
        return None;
    }
    if let Some(stamp) = read_fixed(text) {
        return Some((stamp, true));
    }
    if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return Some((date.and_hms_opt(0, 0, 0)?.and_utc(), false));
    }
    for pattern in ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"] {
        if let Ok(naive) = NaiveDateTime::parse_from_str(text, pattern) {
            return Some((naive.and_utc(), false));
        }
    }
    if let Ok(zoned) = DateTime::parse_from_rfc3339(text) {
        return Some((zoned.to_utc(), true));
    }
    for pattern in ["%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z"] {
        if let Ok(zoned) = DateTime::parse_from_str(text, pattern) {
            return Some((zoned.to_utc(), true));
        }
    }
    None
}

/// Reads the form of fixed width, in which this program stores most stamps, without the search of the general parser.
fn read_fixed(text: &str) -> Option<DateTime<Utc>> {
    fn digits(bytes: &[u8]) -> Option<u32> {
        bytes.iter().try_fold(0, |sum: u32, byte| byte.is_ascii_digit().then(|| sum * 10 + u32::from(byte - b'0')))
    }
    let bytes: &[u8; 27] = text.as_bytes().try_into().ok()?;
    let [y1, y2, y3, y4, b'-', m1, m2, b'-', d1, d2, b'T', h1, h2, b':', n1, n2, b':', s1, s2, b'.', micros @ .., b'Z'] = bytes
    else {
        return None;
    };
    let date =
        NaiveDate::from_ymd_opt(i32::try_from(digits(&[*y1, *y2, *y3, *y4])?).ok()?, digits(&[*m1, *m2])?, digits(&[*d1, *d2])?)?;
    Some(date.and_hms_micro_opt(digits(&[*h1, *h2])?, digits(&[*n1, *n2])?, digits(&[*s1, *s2])?, digits(micros)?)?.and_utc())
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
            "2024-01-01T25:00:00",
            "１２３",
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
    fn the_fixed_form_is_read_as_any_other() {
        for (text, good) in [
            ("2024-02-29T23:59:59.123456Z", true),
            ("0001-01-01T00:00:00.000000Z", true),
            ("9999-12-31T23:59:59.999999Z", true),
            ("2023-02-29T00:00:00.000000Z", false),
            ("0000-01-01T00:00:00.000000Z", false),
            ("2024-01-01T24:00:00.000000Z", false),
            ("2024-01-01T00:00:0x.000000Z", false),
            ("2024-01-01T00:00:00.00000+Z", false),
        ] {
            assert_eq!(parse(text).is_ok(), good, "{text}");
            assert_eq!(parse(text).ok(), parse(&text.replace('Z', "+00:00")).ok(), "{text}");
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
        fn what_cannot_be_stored_is_serialised_as_chrono_does(nanos in proptest::num::i64::ANY) {
            let stamp = DateTime::from_timestamp_nanos(nanos);
            assert_eq!(serialize(&stamp, serde_json::value::Serializer).unwrap(), serde_json::to_value(stamp).unwrap());
        }
    }
}
