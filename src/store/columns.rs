//! How values become columns of text in every database, and how they are read back.

use std::borrow::Cow;
use std::fmt;

use serde::Serialize;

use crate::model::{Fingerprint, LeaseKey, List, Metadata, NodeId, RawJson};

/// The longest lease, about 292 years: beyond it the sum with the clock would not fit.
pub(crate) const MAX_TTL_MS: i64 = i64::MAX / 1_000_000;

/// How long a lease lasts, as it is added to the clock: milliseconds.
pub(crate) fn ttl(ms: u64) -> i64 {
    i64::try_from(ms).map_or(MAX_TTL_MS, |ms| ms.min(MAX_TTL_MS))
}

/// The `node_id` column of a lease's key: empty for a whole run.
pub(crate) fn node_column(key: &LeaseKey) -> &str {
    key.node.as_ref().map_or("", NodeId::as_str)
}

/// Where a value lies, for errors; it is put into words only when there is one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At<'a> {
    table: &'static str,
    run: Option<&'a str>,
    node: Option<&'a str>,
}

impl<'a> At<'a> {
    pub(crate) fn table(table: &'static str) -> Self {
        Self { table, run: None, node: None }
    }

    pub(crate) fn run(self, run: &'a (impl AsRef<str> + ?Sized)) -> Self {
        Self { run: Some(run.as_ref()), ..self }
    }

    pub(crate) fn node(self, node: &'a (impl AsRef<str> + ?Sized)) -> Self {
        Self { node: Some(node.as_ref()), ..self }
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}", self.table)?;
        if let Some(run) = self.run {
            write!(f, ", run {run:?}")?;
        }
        if let Some(node) = self.node {
            write!(f, ", node {node:?}")?;
        }
        Ok(())
    }
}

/// Free notes as a JSON object; none where there are none.
pub(crate) fn metadata_text(metadata: &Metadata) -> Option<RawJson> {
    (!metadata.is_empty()).then(|| metadata.to_raw())
}

/// A list as JSON text; none for an empty one.
pub(crate) fn list_text<T: Serialize>(list: &List<T>) -> serde_json::Result<Option<String>> {
    (!list.is_empty()).then(|| serde_json::to_string(list)).transpose()
}

/// A fingerprint of plain text is stored as that text, so that people can search for it; what would be mistaken for JSON, or is not spelt as
/// we spell it, is stored as JSON.
pub(crate) fn fingerprint_text(print: &Fingerprint) -> Cow<'_, str> {
    let raw = print.as_raw();
    let plain = raw.as_str().strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    if let Some(plain) =
        plain.filter(|text| !text.starts_with('{') && text.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'\\' && b != b'"'))
    {
        return Cow::Borrowed(plain);
    }
    match raw.as_text() {
        Some(text) if !text.starts_with(['"', '{']) && !text.contains(char::is_control) && RawJson::string(&text) == *raw => {
            Cow::Owned(text)
        }
        _ => Cow::Borrowed(raw.as_str()),
    }
}

/// Reads what [`fingerprint_text`] wrote.
pub(crate) fn read_fingerprint(text: &str) -> Result<Fingerprint, String> {
    if text.starts_with(['"', '{']) {
        return RawJson::parse(text).and_then(Fingerprint::from_raw).map_err(|error| error.to_string());
    }
    Ok(Fingerprint::text(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_keep_their_text() {
        for raw in
            [r#""abc""#, r#""""#, r#""{x""#, r#""\u00e9""#, r#""é""#, r#""\u0000""#, r#"{"content_hash":"x"}"#, r#""\"q\"""#]
        {
            let print = Fingerprint::from_raw(RawJson::parse(raw).unwrap()).unwrap();
            assert_eq!(read_fingerprint(&fingerprint_text(&print)).unwrap(), print, "{raw}");
        }
        assert_eq!(fingerprint_text(&Fingerprint::text("abc123")), "abc123");
    }
}
