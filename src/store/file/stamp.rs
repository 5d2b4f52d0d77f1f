//! Stamps in the style of the file that they came from: naive stays naive, a space stays a space, `+00:00` stays `+00:00`.

use chrono::{DateTime, Timelike, Utc};

use super::text::string;
use crate::model::time;

/// How a foreign file writes stamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Style {
    space: bool,
    zone: Zone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zone {
    Naive,
    Letter,
    Offset,
}

impl Style {
    /// As this program writes them: `2024-01-10T12:00:00Z`.
    pub(super) const ZONED: Self = Self { space: false, zone: Zone::Letter };
    /// As Seeknal writes them: `2024-01-10T12:00:00`.
    pub(super) const NAIVE: Self = Self { space: false, zone: Zone::Naive };

    /// The style of a stamp.
    pub(super) fn of(text: &str) -> Self {
        let after_date = text.get(10..).unwrap_or_default();
        let zone = if after_date.ends_with(['Z', 'z']) {
            Zone::Letter
        } else if after_date.contains(['+', '-']) {
            Zone::Offset
        } else {
            Zone::Naive
        };
        Self { space: after_date.starts_with(' '), zone }
    }

    /// A stamp in this style. Only as many digits behind the second as are needed: none or six, as Python does it, or three with `Z`.
    pub(super) fn format(self, stamp: DateTime<Utc>) -> String {
        if self == Self::ZONED {
            return time::format(stamp);
        }
        let pattern = match (self.space, stamp.nanosecond() == 0) {
            (false, true) => "%Y-%m-%dT%H:%M:%S",
            (false, false) => "%Y-%m-%dT%H:%M:%S%.6f",
            (true, true) => "%Y-%m-%d %H:%M:%S",
            (true, false) => "%Y-%m-%d %H:%M:%S%.6f",
        };
        let zone = match self.zone {
            Zone::Naive => "",
            Zone::Letter => "Z",
            Zone::Offset => "+00:00",
        };
        format!("{}{zone}", stamp.format(pattern))
    }
}

/// Reads a stamp.
pub(super) fn parse(text: &str) -> Option<DateTime<Utc>> {
    time::parse(text).ok()
}

/// Reads a stamp from JSON text: a string.
pub(super) fn from_json(raw: &str) -> Option<DateTime<Utc>> {
    parse(&string(raw)?)
}

/// Seconds of other lengths are years, dates and numbers of somebody else: these are from 1973 to 2286.
const DIGITS: std::ops::RangeInclusive<usize> = 9..=10;

/// Reads a stamp from JSON text: a string, or seconds since the epoch as the oldest runner wrote them (cut to microseconds), also within a string, where
/// Seeknal puts them when it takes over the runner's file.
pub(super) fn from_json_or_epoch(raw: &str) -> Option<DateTime<Utc>> {
    if raw.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return from_seconds(raw);
    }
    let text = string(raw)?;
    parse(&text).or_else(|| {
        let (whole, rest) = text.split_once('.').unwrap_or((&text, "0"));
        let are_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (DIGITS.contains(&whole.len()) && are_digits(whole) && are_digits(rest)).then(|| from_seconds(&text))?
    })
}

fn from_seconds(text: &str) -> Option<DateTime<Utc>> {
    let seconds: f64 = text.parse().ok()?;
    let micros = (seconds * 1e6).round();
    // Beyond this the years have five digits, and below it they are before the first.
    if !micros.is_finite() || micros.abs() > 1e18 {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "the range was just checked")]
    time::from_micros(micros as i64)
}
