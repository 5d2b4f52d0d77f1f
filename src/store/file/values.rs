//! The values of a node's members: what a text means, in every shape in which it is found. What is not understood says nothing, and stays as text.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;

use super::stamp;
use super::text::{elements, string};
use crate::model::{FencingToken, Fingerprint, Interval, IntervalSet, List, Metadata, PartitionKey, RawJson};
use crate::store::highwater::HIGHEST;

pub(super) fn notes(raw: &str) -> Metadata {
    RawJson::parse(raw).ok().and_then(|raw| Metadata::from_raw(&raw)).unwrap_or_default()
}

pub(super) fn fingerprint(raw: &str) -> Option<Fingerprint> {
    Fingerprint::from_raw(RawJson::parse(raw).ok()?).ok()
}

/// Seconds with a fraction, as milliseconds.
pub(super) fn millis(raw: &str) -> Option<u64> {
    let ms = (raw.parse::<f64>().ok()? * 1e3).round();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked")]
    (ms.is_finite() && (0.0..1e18).contains(&ms)).then_some(ms as u64)
}

pub(super) fn interval(raw: &str) -> Option<Interval> {
    let bounds = elements(raw)?;
    let [start, end] = bounds.as_slice() else { return None };
    Interval::new(stamp::from_json(start)?, stamp::from_json(end)?).ok()
}

pub(super) fn intervals(raw: &str) -> IntervalSet {
    elements(raw).unwrap_or_default().into_iter().filter_map(interval).collect()
}

/// A list that is wholly ours; what somebody else keeps under the same name says nothing to us.
pub(super) fn list<T: DeserializeOwned>(raw: &str) -> List<T> {
    serde_json::from_str(raw).unwrap_or_default()
}

pub(super) fn partition(raw: &str) -> Option<PartitionKey> {
    PartitionKey::new(string(raw)?).ok()
}

pub(super) fn partitions(raw: &str) -> BTreeSet<PartitionKey> {
    elements(raw).unwrap_or_default().into_iter().filter_map(partition).collect()
}

/// Reads a fencing token from JSON text. A number that is higher than any of ours was put there by somebody else: it is kept with the object, and means nothing.
pub(super) fn token(raw: &str) -> Option<FencingToken> {
    raw.parse().ok().filter(|token| *token <= HIGHEST).map(FencingToken)
}
