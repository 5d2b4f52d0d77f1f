//! What an editor put into a document of ours, where this program would write something else or nothing in its place: it is kept, as the text of a foreign
//! object is.

use super::document::Shape;
use super::document_write;
use super::kept;
use super::node_write::{self, Place};
use super::text::{self, Members, get};
use crate::model::{NodeState, RawJson, RunState};

/// The source of a node that was read of an edited object.
pub(super) fn node(found: &Members<'_>, node: &NodeState, place: Place<'_>) -> serde_json::Result<Option<RawJson>> {
    let written = node_write::text(node, place)?;
    Ok(source(found, node.extra.as_ref(), &text::members(&written)?))
}

/// The source of an edited top level, by the run that was read of it.
pub(super) fn top(found: &Members<'_>, run: &RunState, shape: &Shape) -> serde_json::Result<Option<RawJson>> {
    let written = document_write::top_text(run, shape)?;
    Ok(source(found, run.header().extra.as_ref(), &text::members(&written)?))
}

/// A source that loses nothing of what was found: what would be written in its place says the rest.
fn source(found: &Members<'_>, own: Option<&RawJson>, written: &Members<'_>) -> Option<RawJson> {
    let is_said = |key: &str, raw: &str| get(written, key).is_some_and(|now| is_same(now, raw));
    let unsaid: Vec<_> = found.iter().filter(|(key, raw)| !is_said(key, raw)).collect();
    let Some(own) = own else { return if unsaid.is_empty() { None } else { kept::restore("true", found) } };
    // What is no object has no members that could be edited.
    let Some(mut members) = text::members(own.as_str()).ok().filter(|_| !unsaid.is_empty()) else { return Some(own.clone()) };
    for (key, raw) in unsaid {
        match members.iter_mut().find(|(known, _)| known == key) {
            Some((_, was)) => *was = raw,
            None => members.push((key.clone(), raw)),
        }
    }
    kept::restore("true", &members)
}

/// Whether two texts say the same, however they are spelled.
fn is_same(a: &str, b: &str) -> bool {
    let value = |text| serde_json::from_str::<serde_json::Value>(text).ok();
    a == b || value(a).is_some_and(|value_a| value(b) == Some(value_a))
}
