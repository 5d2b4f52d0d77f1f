//! JSON text that keeps its own tokens: `1e-300`, `9007199254740993`, `\u0000`, key order.

use std::fmt;
use std::sync::Arc;

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::id::InputError;

/// One JSON value as text. White space between tokens is dropped, every token is kept as it was written, so what a parser would round
/// (numbers), reorder (keys) or spell anew (escapes) survives reading and writing.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RawJson(Arc<str>);

impl RawJson {
    /// Checks JSON text and keeps it.
    ///
    /// # Errors
    /// [`InputError`] if the text is not exactly one JSON value.
    pub fn parse(text: &str) -> Result<Self, InputError> {
        let raw: &RawValue = serde_json::from_str(text).map_err(|error| InputError::new("JSON text", error.to_string()))?;
        Ok(Self::from_raw(raw))
    }

    /// The JSON text of a value.
    ///
    /// # Errors
    /// [`InputError`] if the value cannot be written as JSON (a map with keys that are no text, a failing `Serialize`).
    pub fn from_serialize(value: &impl Serialize) -> Result<Self, InputError> {
        let text = serde_json::to_string(value).map_err(|error| InputError::new("value", format!("it is no JSON: {error}")))?;
        // A value may carry JSON text of its own, with white space in it.
        Self::parse(&text)
    }

    /// The JSON text of a plain string.
    pub fn string(text: &str) -> Self {
        Self(Arc::from(serde_json::Value::from(text).to_string()))
    }

    fn from_raw(raw: &RawValue) -> Self {
        let text = raw.get();
        // JSON has nothing else up to the blank: in strings such characters are escaped.
        let spaced = text.bytes().any(|byte| byte <= b' ');
        Self(if spaced { Arc::from(compact(text)) } else { Arc::from(text) })
    }

    /// The text, without white space between tokens.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The parsed value. Numbers that do not fit 64 bits lose precision here, not in the stored text.
    ///
    /// # Errors
    /// [`InputError`] if the text cannot be held as a value (a number beyond the range of `f64`, nesting deeper than 128).
    pub fn to_value(&self) -> Result<serde_json::Value, InputError> {
        self.read()
    }

    /// Reads the text as any type.
    ///
    /// # Errors
    /// [`InputError`] if the text does not fit the type.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, InputError> {
        serde_json::from_str(&self.0).map_err(|error| InputError::new("JSON value", error.to_string()))
    }

    /// The text of a JSON string; `None` if this is no string.
    pub fn as_text(&self) -> Option<String> {
        self.0.starts_with('"').then(|| serde_json::from_str(&self.0).ok()).flatten()
    }

    /// Whether this is `null`.
    pub fn is_null(&self) -> bool {
        &*self.0 == "null"
    }

    /// The members of an object in their own order; `None` if this is no object.
    pub fn members(&self) -> Option<Vec<(String, RawJson)>> {
        self.0.starts_with('{').then(|| serde_json::from_str::<Members>(&self.0).ok().map(|m| m.0)).flatten()
    }

    /// The elements of an array; `None` if this is no array.
    pub fn elements(&self) -> Option<Vec<RawJson>> {
        self.0.starts_with('[').then(|| serde_json::from_str(&self.0).ok()).flatten()
    }

    /// An object with these members in this order.
    pub fn object<'a>(members: impl IntoIterator<Item = (&'a str, &'a RawJson)>) -> Self {
        let mut text = String::from("{");
        for (index, (key, value)) in members.into_iter().enumerate() {
            if index > 0 {
                text.push(',');
            }
            text.push_str(Self::string(key).as_str());
            text.push(':');
            text.push_str(value.as_str());
        }
        text.push('}');
        Self(Arc::from(text))
    }
}

/// Drops white space outside of strings. The text is known to be valid JSON.
fn compact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    for c in text.chars() {
        if in_string {
            out.push(c);
            if escaped {
                escaped = false;
            } else if c == '\\' {
                escaped = true;
            } else if c == '"' {
                in_string = false;
            }
        } else if !matches!(c, ' ' | '\n' | '\r' | '\t') {
            in_string = c == '"';
            out.push(c);
        }
    }
    out
}

struct Members(Vec<(String, RawJson)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::with_capacity(map.size_hint().unwrap_or(0).min(1024));
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

impl fmt::Debug for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&serde_json::Value> for RawJson {
    fn from(value: &serde_json::Value) -> Self {
        Self(Arc::from(value.to_string()))
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<&RawValue>(&self.0).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        Ok(Self::from_raw(&raw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_keep_their_own_text() {
        let text =
            "{ \"b\" : [1e-300, 9007199254740993, 0.12366771697998047],\n \"a\": \"\\u0000 \\u65e5 x\\\" y\", \"n\": null }";
        let raw = RawJson::parse(text).unwrap();
        assert_eq!(
            raw.as_str(),
            "{\"b\":[1e-300,9007199254740993,0.12366771697998047],\"a\":\"\\u0000 \\u65e5 x\\\" y\",\"n\":null}"
        );
        let members = raw.members().unwrap();
        assert_eq!(members[0].0, "b");
        assert_eq!(members[0].1.elements().unwrap()[1].as_str(), "9007199254740993");
        assert_eq!(members[1].1.as_text().unwrap(), "\u{0} 日 x\" y");
        assert_eq!(RawJson::object(members.iter().map(|(k, v)| (k.as_str(), v))), raw);
        let again: RawJson = serde_json::from_str(&serde_json::to_string(&raw).unwrap()).unwrap();
        assert_eq!(again, raw);
    }

    #[test]
    fn no_way_in_keeps_white_space_between_tokens() {
        let pretty = RawValue::from_string("{\n  \"a\": [ 1e0,\t2 ]\n}".to_owned()).unwrap();
        assert_eq!(RawJson::from_serialize(&pretty).unwrap().as_str(), "{\"a\":[1e0,2]}");
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for bad in ["", "{", "{}{}", "nul", "\"\u{1}\"", "[1,]"] {
            assert!(RawJson::parse(bad).is_err(), "{bad}");
        }
    }
}
