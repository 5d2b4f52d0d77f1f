//! `NaN`, `Infinity` and `-Infinity`: Python's writer puts them where numbers belong, though JSON does not know them.
//!
//! Within this program, in a journal and in a database such a value is a text in a spelling that nobody else uses: every character of it is
//! escaped (`"\u004e\u0061\u004e"`). So it is valid JSON wherever it goes, reads as what it is, and becomes the bare word again in a document.

/// The words, and the texts that stand for them. The longer one of two that end alike comes first.
const WORDS: [(&str, &str); 3] = [
    ("-Infinity", r#""\u002d\u0049\u006e\u0066\u0069\u006e\u0069\u0074\u0079""#),
    ("Infinity", r#""\u0049\u006e\u0066\u0069\u006e\u0069\u0074\u0079""#),
    ("NaN", r#""\u004e\u0061\u004e""#),
];

/// A document with texts in the place of such words.
#[derive(Debug)]
pub(super) struct Accepted<'a> {
    /// As it lies there.
    pub(super) original: &'a str,
    pub(super) text: String,
    /// Behind every word: where that is in the text, and how much longer the text is up to there than the original.
    shifts: Vec<(usize, usize)>,
    /// Where the first one begins in the original.
    pub(super) first: usize,
}

impl Accepted<'_> {
    /// The place in the original.
    pub(super) fn original_offset(&self, offset: usize) -> usize {
        let before = self.shifts.partition_point(|(end, _)| *end <= offset);
        let longer = before.checked_sub(1).and_then(|last| self.shifts.get(last)).map_or(0, |(_, longer)| *longer);
        offset.saturating_sub(longer)
    }

    pub(super) fn count(&self) -> usize {
        self.shifts.len()
    }
}

/// The document with texts in the place of such words; `None` if it has none. A word counts only where a value can stand: not within a text, not as a part
/// of a longer one, and not as a key.
pub(super) fn accept(original: &str) -> Option<Accepted<'_>> {
    let bytes = original.as_bytes();
    let mut text = String::new();
    let (mut shifts, mut first, mut done, mut at) = (Vec::new(), None, 0, 0);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = end_of_text(bytes, at),
            b'N' | b'I' | b'-' => {
                let word = WORDS.iter().find(|(word, _)| bytes.get(at..).is_some_and(|rest| rest.starts_with(word.as_bytes())));
                let Some((word, stands_for)) = word.filter(|(word, _)| is_value(bytes, at, at + word.len())) else {
                    at += 1;
                    continue;
                };
                text.push_str(original.get(done..at)?);
                text.push_str(stands_for);
                first.get_or_insert(at);
                at += word.len();
                done = at;
                shifts.push((text.len(), text.len() - at));
            }
            _ => at += 1,
        }
    }
    let first = first?;
    text.push_str(original.get(done..)?);
    Some(Accepted { original, text, shifts, first })
}

/// The place behind a text that begins here.
fn end_of_text(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    at
}

/// Whether what stands here stands alone, and is no key.
fn is_value(bytes: &[u8], start: usize, end: usize) -> bool {
    let before = start.checked_sub(1).and_then(|at| bytes.get(at));
    let behind = bytes.get(end..).unwrap_or_default();
    before.is_none_or(|byte| byte.is_ascii_whitespace() || b",:[".contains(byte))
        && behind.first().is_none_or(|byte| byte.is_ascii_whitespace() || b",]}".contains(byte))
        && behind.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b':')
}

/// Whether a JSON text stands for such a word.
pub(super) fn is_word(raw: &str) -> bool {
    raw.starts_with("\"\\u00") && WORDS.iter().any(|(_, stands_for)| *stands_for == raw)
}

/// Puts the words back into a written document, where values stand.
pub(super) fn restore(written: &mut Vec<u8>) {
    let Ok(text) = std::str::from_utf8(written) else { return };
    let (mut now, mut done) = (String::new(), 0);
    // All of them begin alike, and hardly any document has one.
    for (at, _) in text.match_indices(r#""\u00"#) {
        let rest = text.get(at..).unwrap_or_default();
        let word = WORDS.iter().find(|(_, stands_for)| rest.starts_with(stands_for));
        let Some((word, stands_for)) = word.filter(|(_, text)| is_value(written, at, at + text.len())) else { continue };
        now.push_str(text.get(done..at).unwrap_or_default());
        now.push_str(word);
        done = at + stands_for.len();
    }
    if done > 0 {
        now.push_str(text.get(done..).unwrap_or_default());
        *written = now.into_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_where_values_stand_and_come_back() {
        let original = "{\"a\": NaN,\n\"NaN\":[1,-Infinity , Infinity],\"t\":\"NaN, \\\"Infinity\", \"n\": -1}";
        let accepted = accept(original).unwrap();
        assert_eq!((accepted.count(), accepted.first), (3, 6));
        let value: serde_json::Value = serde_json::from_str(&accepted.text).unwrap();
        assert_eq!(value["NaN"], serde_json::json!([1, "-Infinity", "Infinity"]));
        assert_eq!(value["a"], "NaN");
        let behind = accepted.text.find("\"n\"").unwrap();
        assert_eq!(accepted.original_offset(behind), original.find("\"n\"").unwrap());
        assert_eq!(accepted.original_offset(3), 3);
        let mut back = accepted.text.clone().into_bytes();
        restore(&mut back);
        assert_eq!(String::from_utf8(back).unwrap(), original);
    }

    #[test]
    fn what_does_not_stand_for_a_value_stays() {
        let [.., (_, nan)] = WORDS;
        let inner = nan.trim_matches('"');
        for text in [format!("{{{nan}:1,{nan}:[\"\\\"{inner}\",\"{inner}\\\"\"]}}"), format!("[\"a{inner}\"]")] {
            assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{text}");
            let mut back = text.clone().into_bytes();
            restore(&mut back);
            assert_eq!(String::from_utf8(back).unwrap(), text);
        }
    }

    #[test]
    fn other_words_are_left_alone() {
        for text in ["{\"a\": \"NaN\"}", "{NaN: 1}", "[xNaN]", "[NaNs]", "{\"a\": 1, NaN : 2}", "[-1, nan, \"\\\"NaN\"]", "\"NaN"]
        {
            assert!(accept(text).is_none(), "{text}");
        }
    }
}
