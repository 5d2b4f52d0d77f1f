//! A foreign object's own text over many writings: what was added to it and what was changed in it is noted beside it, so that the
//! object as it came can be put together again.

use super::text::{self, Members, get};
use crate::model::RawJson;

/// What tells the source of a written object: `true` if it is the object itself, else what was added and what changed members said, or
/// the whole source where it cannot be told so.
pub(super) fn note(source: &str, written: &Members<'_>) -> String {
    let whole = || format!("{{\"whole\":{source}}}");
    // What is no object, or has a key twice, cannot be told by its members.
    let Ok(own) = text::members(source) else { return whole() };
    let in_place = own.len() <= written.len() && own.iter().zip(written).all(|((key, _), (now, _))| key == now);
    if !in_place {
        return whole();
    }
    let json = |key: &str| RawJson::string(key).to_string();
    let added: Vec<String> = written.iter().skip(own.len()).map(|(key, _)| json(key)).collect();
    let changed: Vec<String> = own
        .iter()
        .zip(written)
        .filter(|((_, was), (_, now))| was != now)
        .map(|((key, was), _)| format!("{}:{was}", json(key)))
        .collect();
    if added.is_empty() && changed.is_empty() {
        return "true".to_owned();
    }
    format!("{{\"added\":[{}],\"changed\":{{{}}}}}", added.join(","), changed.join(","))
}

/// The source of a written object, by its note; `None` if the note says nothing that can be used.
pub(super) fn restore(note: &str, written: &Members<'_>) -> Option<RawJson> {
    let note = if note == "true" { Members::new() } else { text::members(note).ok()? };
    if let Some(whole) = get(&note, "whole") {
        return RawJson::parse(whole).ok();
    }
    let added: Vec<_> =
        get(&note, "added").and_then(text::elements).unwrap_or_default().into_iter().filter_map(text::string).collect();
    let changed = get(&note, "changed").map(text::members).transpose().ok()?.unwrap_or_default();
    let members = written
        .iter()
        .filter(|(key, _)| !added.contains(key))
        .map(|(key, now)| Some((key, RawJson::parse(get(&changed, key).unwrap_or(now)).ok()?)))
        .collect::<Option<Vec<_>>>()?;
    Some(RawJson::object(members.iter().map(|(key, raw)| (&***key, raw))))
}
