//! JSON text by its members, borrowed: every token keeps its spelling and its place, duplicates are refused, and errors say line and column.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::nan::{self, Accepted};
use crate::store::{StoreError, StoreErrorKind};

/// The members of an object in their own order.
pub(super) type Members<'a> = Vec<(Cow<'a, str>, &'a str)>;

struct Key<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Cow<'de, str>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }
        }
        deserializer.deserialize_str(Text).map(Key)
    }
}

struct Object<'a>(Members<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Object<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                // Few members are compared one by one; many by a set.
                const MANY: usize = 24;
                let mut members: Members<'de> = Vec::new();
                let mut seen: std::collections::HashSet<Cow<'de, str>> = std::collections::HashSet::new();
                while let Some(Key(key)) = map.next_key()? {
                    if members.len() == MANY {
                        seen.extend(members.iter().map(|(key, _)| key.clone()));
                    }
                    let twice = if members.len() < MANY {
                        members.iter().any(|(known, _)| *known == key)
                    } else {
                        !seen.insert(key.clone())
                    };
                    if twice {
                        return Err(A::Error::custom(format!("the key {key:?} is there twice")));
                    }
                    members.push((key, map.next_value::<&'de RawValue>()?.get()));
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

struct Array<'a>(Vec<&'a str>);

impl<'de: 'a, 'a> Deserialize<'de> for Array<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Array<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = seq.next_element::<&'de RawValue>()? {
                    elements.push(element.get());
                }
                Ok(Array(elements))
            }
        }
        deserializer.deserialize_seq(InOrder)
    }
}

/// The members of an object.
pub(super) fn members(raw: &str) -> Result<Members<'_>, serde_json::Error> {
    serde_json::from_str::<Object<'_>>(raw).map(|object| object.0)
}

/// The elements of a list; `None` if it is none.
pub(super) fn elements(raw: &str) -> Option<Vec<&str>> {
    serde_json::from_str::<Array<'_>>(raw).ok().map(|array| array.0)
}

/// The text of a JSON string; `None` if it is none, or stands for a word that JSON does not know: that is no name of anything.
pub(super) fn string(raw: &str) -> Option<Cow<'_, str>> {
    if nan::is_word(raw) {
        return None;
    }
    serde_json::from_str::<Key<'_>>(raw).ok().map(|key| key.0)
}

/// A member by its key.
pub(super) fn get<'a>(members: &Members<'a>, key: &str) -> Option<&'a str> {
    members.iter().find(|(known, _)| known == key).map(|(_, raw)| *raw)
}

/// What a JSON text is, for a message.
pub(super) fn kind(raw: &str) -> &'static str {
    match raw.trim_ascii_start().bytes().next() {
        Some(b'{') => "an object",
        Some(b'[') => "a list",
        Some(b'"') => "a text",
        Some(b't' | b'f') => "a truth value",
        Some(b'n') => "null",
        _ => "a number",
    }
}

/// A whole document, for errors that name line and column of a piece of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
    /// What lies there, if it is not the text itself.
    pub(super) accepted: Option<&'a Accepted<'a>>,
}

impl Source<'_> {
    /// What is wrong at a piece of the text (a slice of it).
    pub(super) fn error(&self, piece: &str, why: impl fmt::Display) -> StoreError {
        self.at_offset(self.offset(piece), why)
    }

    /// What a parser said about a piece of the text.
    pub(super) fn parse_error(&self, piece: &str, error: &serde_json::Error) -> StoreError {
        let start = self.offset(piece);
        let lines_before = error.line().saturating_sub(1);
        let line_start: usize = piece.split_inclusive('\n').take(lines_before).map(str::len).sum();
        let at = start + line_start + error.column().saturating_sub(1);
        let message = error.to_string();
        let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
        // Python's reader and writer let it pass; no text that is one can hold it.
        if message.contains("surrogate") || message.contains("end of hex escape") {
            let mend = "an id or the name of a member holds half of a character (a lone surrogate, \\ud800 to \\udfff); write the whole character \
                        there, or another name";
            return self.at_offset(at, format!("{message}: {mend}"));
        }
        self.at_offset(at, message)
    }

    /// Where a piece of the text begins in it.
    pub(super) fn offset(&self, piece: &str) -> usize {
        (piece.as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize).min(self.text.len())
    }

    /// What lies there, byte for byte.
    pub(super) fn original(&self) -> &str {
        self.accepted.map_or(self.text, |accepted| accepted.original)
    }

    /// Where something in the text lies there.
    pub(super) fn original_offset(&self, offset: usize) -> usize {
        self.accepted.map_or(offset, |accepted| accepted.original_offset(offset))
    }

    fn at_offset(&self, offset: usize, why: impl fmt::Display) -> StoreError {
        let (line, column) = line_and_column(self.original().as_bytes(), self.original_offset(offset));
        damaged(self.path, &format!("line {line}, column {column}"), why)
    }
}

/// Line and column, counted from one, of an offset in bytes.
pub(super) fn line_and_column(bytes: &[u8], offset: usize) -> (usize, usize) {
    let before = bytes.get(..offset.min(bytes.len())).unwrap_or_default();
    let line = before.split(|byte| *byte == b'\n').count();
    let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    (line, column)
}

/// A document that cannot be read, and how to mend it.
pub(super) fn damaged(path: &Path, place: &str, why: impl fmt::Display) -> StoreError {
    let mut previous = path.as_os_str().to_owned();
    previous.push(".prev");
    let previous = Path::new(&previous);
    let is_copy = path.extension().is_some_and(|end| end == "prev");
    let mend = if is_copy {
        "`seeknal state verify --repair` sets it aside where the document can be read, and makes another copy of one that this program wrote".to_owned()
    } else if previous.exists() {
        format!(
            "Mend it there; or bring back {}, the last document that this program wrote (`seeknal state verify --repair --use-previous`, \
             which keeps a copy of the damaged one); or put a backup in its place",
            previous.display()
        )
    } else {
        "Mend it there (`seeknal state verify --repair` can mend a journal, not this), or put a backup in its place".to_owned()
    };
    StoreError::not_applied(StoreErrorKind::Corrupt, format!("{}: {place}: {why}; it was left as it is. {mend}", path.display()))
}

/// Writes JSON text again, indented by two, without changing a token. Also says where the token that began at `mark` begins now.
pub(super) fn indent(compact: &[u8], mark: usize) -> (Vec<u8>, usize) {
    let mut out = Vec::with_capacity(compact.len() + compact.len() / 2);
    let mut depth = 0_usize;
    let mut marked = 0;
    let mut rest = compact.iter().copied().peekable();
    let line = |out: &mut Vec<u8>, depth: usize| {
        out.push(b'\n');
        // Deeper than people read, spaces would grow with the square of the depth.
        out.resize(out.len() + depth.min(64) * 2, b' ');
    };
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => {
                // Only strings are marked, so that other tokens need not be counted.
                if compact.len() - rest.len() == mark + 1 {
                    marked = out.len();
                }
                out.push(byte);
                while let Some(byte) = rest.next() {
                    out.push(byte);
                    match byte {
                        b'\\' => out.extend(rest.next()),
                        b'"' => break,
                        _ => {}
                    }
                }
            }
            b' ' | b'\n' | b'\r' | b'\t' => {}
            b'{' | b'[' => {
                out.push(byte);
                while rest.next_if(u8::is_ascii_whitespace).is_some() {}
                if let Some(close) = rest.next_if(|byte| matches!(byte, b'}' | b']')) {
                    out.push(close);
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(byte);
            }
            b',' => {
                out.push(byte);
                line(&mut out, depth);
            }
            b':' => out.extend_from_slice(b": "),
            _ => out.push(byte),
        }
    }
    out.push(b'\n');
    (out, marked)
}
