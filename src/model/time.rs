//! Stamps: UTC, whole microseconds, years 1 to 9999.
//!
//! A microsecond is what PostgreSQL and Python keep, and what every backend here keeps exactly. Stamps without a zone mean UTC: the real
//! Seeknal writes such stamps, and chrono reads RFC 3339 only with a zone.

use chrono::{DateTime, Datelike, NaiveDate, NaiveDateTime, Utc};

use super::id::{InputError, excerpt};

/// Cuts a stamp to whole microseconds (towards the past). A leap second becomes the second after it: no store keeps a sixty-first one.
pub fn to_micros(stamp: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(stamp.timestamp_micros()).unwrap_or(stamp)
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
    let stamp = to_micros(stamp);
    if !(1..=9999).contains(&stamp.year()) {
        return Err(refuse("its year is outside of 1 to 9999"));
    }
    Ok((stamp, zoned))
}

fn read(text: &str) -> Option<(DateTime<Utc>, bool)> {
    if text.len() > 64 || !text.is_ascii() {
        return None;
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
}
