//! How things are shown to people: numbers, and paths that can be typed again.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serializer;

/// `1 run`, `2 runs`.
pub(crate) fn counted(count: u64, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// Whether a character would steer a terminal, or turn what is printed after it around.
pub(crate) fn steers(c: char) -> bool {
    c.is_control() || matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A path as a shell takes it. One that is no text, or would steer a terminal, is written byte by byte in `$'…'`.
pub(crate) fn shell(path: &Path) -> String {
    match path.to_str() {
        Some(text) if text.chars().all(|c| c.is_alphanumeric() || "/._-+=:@%,".contains(c)) => text.to_owned(),
        Some(text) if !text.chars().any(steers) => format!("'{}'", text.replace('\'', "'\\''")),
        _ => {
            let mut quoted = "$'".to_owned();
            for byte in path.as_os_str().as_encoded_bytes() {
                let _a_string_takes_all = match byte {
                    b'\'' | b'\\' => write!(quoted, "\\{}", char::from(*byte)),
                    b' '..=b'~' => write!(quoted, "{}", char::from(*byte)),
                    _ => write!(quoted, "\\x{byte:02x}"),
                }
                .is_err();
            }
            quoted.push('\'');
            quoted
        }
    }
}

/// A path in JSON, which knows text only: what is none is replaced.
pub(super) fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// The same of a path that may be missing.
#[expect(clippy::ref_option, reason = "serde hands out the field")]
pub(super) fn lossy_option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => lossy(path, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_printed_as_a_shell_takes_them() {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(shell(Path::new("target/run_state.json")), "target/run_state.json");
        assert_eq!(shell(Path::new("/a b/it's")), "'/a b/it'\\''s'");
        let odd = Path::new(std::ffi::OsStr::from_bytes(b"/\xff'\\ \n"));
        assert_eq!(shell(odd), r"$'/\xff\'\\ \x0a'");
        assert_eq!(shell(Path::new("/\u{202e}x")), r"$'/\xe2\x80\xaex'");
    }

    #[test]
    fn counts_have_their_plural() {
        assert_eq!((counted(1, "run"), counted(0, "run")), ("1 run".to_owned(), "0 runs".to_owned()));
    }
}
