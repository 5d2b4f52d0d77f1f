//! The values of a node's members: what a text means, in every shape in which it is found. What is not understood says nothing, and stays as text.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde::de::DeserializeOwned;

use super::stamp;
use super::text::{self, elements, get, string};
use crate::model::{FencingToken, Fingerprint, Interval, IntervalSet, List, Metadata, PartitionKey, RawJson};
use crate::store::highwater::HIGHEST;

pub(super) fn notes(raw: &str) -> Metadata {
    RawJson::parse(raw).ok().and_then(|raw| Metadata::from_raw(&raw)).unwrap_or_default()
}

pub(super) fn fingerprint(raw: &str) -> Option<Fingerprint> {
    Fingerprint::from_raw(RawJson::parse(raw).ok()?).ok()
}

/// The largest whole number up to which a fraction tells every one exactly.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A number that is no fraction: `1500`, and also `1500.0` and `1.5e3`, as other programs write it. A fraction, and what is so large that a fraction does not
/// tell it exactly, is none.
pub(super) fn count(raw: &str) -> Option<u64> {
    raw.parse().ok().or_else(|| whole(fraction(raw)?))
}

/// Milliseconds: what is finer than one of them is rounded.
pub(super) fn duration_ms(raw: &str) -> Option<u64> {
    raw.parse().ok().or_else(|| whole(fraction(raw)?.round()))
}

/// Seconds with a fraction, as milliseconds.
pub(super) fn millis(raw: &str) -> Option<u64> {
    let ms = (fraction(raw)? * 1e3).round();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked")]
    (0.0..1e18).contains(&ms).then_some(ms as u64)
}

fn fraction(raw: &str) -> Option<f64> {
    raw.parse().ok().filter(|number: &f64| number.is_finite())
}

fn whole(number: f64) -> Option<u64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked")]
    (number.fract() == 0.0 && (0.0..=EXACT).contains(&number)).then_some(number as u64)
}

/// How an interval is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `[start, end]`, which is ours and Seeknal's.
    Pair,
    /// `{"start": …, "end": …}`.
    Named,
    /// `"start/end"`, as ISO-8601 has it.
    Text,
}

/// How an interval is written, and its two bounds; `None` if it is none of these.
pub(super) fn bounds(raw: &str) -> Option<(Form, Cow<'_, str>, Cow<'_, str>)> {
    match raw.bytes().next()? {
        b'[' => {
            let bounds = elements(raw)?;
            let [start, end] = bounds.as_slice() else { return None };
            Some((Form::Pair, string(start)?, string(end)?))
        }
        b'{' => {
            let members = text::members(raw).ok()?;
            let bound = |key| get(&members, key).and_then(string);
            Some((Form::Named, bound("start")?, bound("end")?))
        }
        b'"' => {
            let text = string(raw)?;
            let (start, end) = text.split_once('/')?;
            Some((Form::Text, start.to_owned().into(), end.to_owned().into()))
        }
        _ => None,
    }
}

pub(super) fn interval(raw: &str) -> Option<Interval> {
    let (_, start, end) = bounds(raw)?;
    Interval::new(stamp::parse(&start)?, stamp::parse(&end)?).ok()
}

/// What a list says, and how many of its elements are not understood; what is no list is one such element.
fn understood<T, C: FromIterator<T>>(raw: &str, read: impl Fn(&str) -> Option<T>) -> (C, usize) {
    let listed = elements(raw);
    let strange = usize::from(listed.is_none() && raw != "null");
    let listed = listed.unwrap_or_default();
    let mut unread = listed.len();
    let read = listed.into_iter().filter_map(read).inspect(|_| unread -= 1).collect();
    (read, unread + strange)
}

/// The intervals of a list, and how many of its elements are not understood.
pub(super) fn intervals(raw: &str) -> (IntervalSet, usize) {
    understood(raw, interval)
}

/// The partitions of a list, and how many of its elements are not understood.
pub(super) fn partitions(raw: &str) -> (BTreeSet<PartitionKey>, usize) {
    understood(raw, partition)
}

/// A partition: a text, or a whole number that names one (`20240101`).
pub(super) fn partition(raw: &str) -> Option<PartitionKey> {
    if is_whole_number(raw) {
        return PartitionKey::new(raw).ok();
    }
    PartitionKey::new(string(raw)?).ok()
}

/// Whether a JSON text is a number without a fraction, or a text could be written as such a one.
pub(super) fn is_whole_number(raw: &str) -> bool {
    let digits = raw.strip_prefix('-').unwrap_or(raw);
    let canonical = digits == "0" || !digits.starts_with('0');
    !digits.is_empty() && canonical && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// A list that is wholly ours; what somebody else keeps under the same name says nothing to us.
pub(super) fn list<T: DeserializeOwned>(raw: &str) -> List<T> {
    serde_json::from_str(raw).unwrap_or_default()
}

/// Reads a fencing token from JSON text. A number that is higher than any of ours was put there by somebody else: it is kept with the object, and means nothing.
pub(super) fn token(raw: &str) -> Option<FencingToken> {
    raw.parse().ok().filter(|token| *token <= HIGHEST).map(FencingToken)
}
