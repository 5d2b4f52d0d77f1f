//! `database_url` of a libSQL server: what it may say, what is refused, and where the token goes before anybody can print it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::store::registry::Setting;
use crate::store::{StoreError, StoreErrorKind};

/// The option that has the token when the URL has none.
pub(super) const TOKEN_OPTION: &str = "database_token";

/// The longest name of a host, by the rules of DNS.
const MAX_HOST: usize = 253;

/// The longest part of such a name; a token that was put in the host's place is longer.
const MAX_LABEL: usize = 63;

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(Arc<str>);

impl Secret {
    /// The text itself, for the one header that it belongs into.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
}

/// A server, as the URL and the settings beside it name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) tls: bool,
    /// A name or an address; IPv6 without its brackets.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) token: Option<Secret>,
    /// Certificates (PEM) of those who may vouch for the server, instead of the public ones.
    pub(super) ca_file: Option<PathBuf>,
}

impl Target {
    /// Reads a URL. `token` is what the options or the environment say; the URL or they may have it, not both.
    pub(super) fn parse(url: &str, token: Option<Setting>, ca_file: Option<&str>) -> Result<Self, StoreError> {
        let (scheme, rest) =
            url.trim().split_once("://").ok_or_else(|| refuse("it has no scheme; write libsql://HOST, or http://HOST:PORT"))?;
        let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, query)| (rest, query));
        if rest.contains('#') || query.contains('#') {
            return Err(refuse("it has a fragment (`#…`); remove it"));
        }
        let query = Query::parse(query)?;
        let tls = match (scheme.to_ascii_lowercase().as_str(), query.tls) {
            ("libsql", tls) => tls.unwrap_or(true),
            ("https", None | Some(true)) => true,
            ("http", None | Some(false)) => false,
            ("https", Some(false)) => return Err(refuse("https:// contradicts `tls=0`; use one of them")),
            ("http", Some(true)) => return Err(refuse("http:// contradicts `tls=1`; use https://")),
            ("ws" | "wss", _) => return Err(refuse("ws:// and wss:// are not supported; write libsql:// or https:// instead")),
            _ => return Err(refuse("it has an unknown scheme; known are libsql://, http:// and https://")),
        };
        // From the right: an `@` inside the token would be its own, unescaped.
        let (user, authority) = rest.rsplit_once('@').map_or((None, rest), |(user, authority)| (Some(user), authority));
        let user = user.map(Self::user).transpose()?.flatten();
        let authority = match authority.split_once('/') {
            None | Some((_, "")) => authority.trim_end_matches('/'),
            Some(_) => return Err(refuse("it has a path; name the server only, libsql://HOST[:PORT]")),
        };
        let (host, port) = host_and_port(authority)?;
        let beside = token.as_ref().map_or_else(String::new, |token| {
            if token.place == TOKEN_OPTION { format!("in the option `{TOKEN_OPTION}`") } else { format!("in {}", token.place) }
        });
        let given: Vec<(&str, Secret)> = [
            ("before the host", user),
            ("in `authToken`", query.token),
            (&*beside, token.map(|token| Secret(Arc::from(token.text)))),
        ]
        .into_iter()
        .filter_map(|(place, token)| Some((place, token?)))
        .collect();
        if let [(one, _), (other, _), ..] = given.as_slice() {
            return Err(refuse(format!("it is given two tokens, {one} and {other}; keep one of them")));
        }
        let given = given.into_iter().next();
        if let Some((place, token)) = &given
            && !token.reveal().bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(refuse(format!("the token {place} holds characters that no token has; copy it again, in one line")));
        }
        let token = given.map(|(_, token)| token);
        let ca_file = ca_file.filter(|path| !path.is_empty()).map(PathBuf::from);
        if ca_file.is_some() && !tls {
            return Err(refuse("database_ca_file is set, but the connection is not encrypted; use libsql:// or https://"));
        }
        Ok(Self { tls, host, port: port.unwrap_or(if tls { 443 } else { 80 }), token, ca_file })
    }

    /// The user name of the URL is the token; a password has no meaning.
    fn user(text: &str) -> Result<Option<Secret>, StoreError> {
        if text.contains(':') {
            return Err(refuse("it has a password, which a libSQL server does not know; write libsql://TOKEN@HOST"));
        }
        Ok((!text.is_empty()).then(|| decode(text)).transpose()?.map(|text| Secret(Arc::from(text))))
    }

    /// Host and port as they stand in a URL.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == if self.tls { 443 } else { 80 } { host } else { format!("{host}:{}", self.port) }
    }

    /// The URL of the server for people: nothing of the token is in it.
    pub(super) fn location(&self) -> String {
        format!("{}://{}", if self.tls { "libsql" } else { "http" }, self.authority())
    }
}

/// A refusal of the URL; it never repeats the URL itself.
fn refuse(why: impl fmt::Display) -> StoreError {
    StoreError::not_applied(StoreErrorKind::Input, format!("database_url: {why}"))
}

#[derive(Default)]
struct Query {
    tls: Option<bool>,
    token: Option<Secret>,
}

impl Query {
    fn parse(text: &str) -> Result<Self, StoreError> {
        let mut query = Self::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let twice = match key {
                "tls" => {
                    let tls = match value {
                        "0" => false,
                        "1" => true,
                        _ => return Err(refuse("`tls` is 0 or 1")),
                    };
                    query.tls.replace(tls).is_some()
                }
                "authToken" if value.is_empty() => return Err(refuse("`authToken` is empty; remove it, or put the token there")),
                "authToken" => query.token.replace(Secret(Arc::from(decode(value)?))).is_some(),
                // A key may be a mistyped token: it is shown only if it looks like a word.
                _ if key.len() <= 16 && key.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'_') => {
                    return Err(refuse(format!("it has the unknown parameter `{key}`; known are `authToken` and `tls`")));
                }
                _ => return Err(refuse("it has an unknown parameter; known are `authToken` and `tls`")),
            };
            if twice && key == "authToken" {
                return Err(refuse("it is given two tokens, both in `authToken`; keep one of them"));
            }
            if twice {
                return Err(refuse(format!("it says `{key}` twice")));
            }
        }
        Ok(query)
    }
}

fn host_and_port(text: &str) -> Result<(String, Option<u16>), StoreError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(|| refuse("its IPv6 address has no closing bracket"))?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(refuse("what stands in brackets is no IPv6 address"));
            }
            let port = match rest {
                "" => None,
                rest => Some(rest.strip_prefix(':').ok_or_else(|| refuse("behind the IPv6 address stands no port"))?),
            };
            (host, port)
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err(refuse("it names no host; write libsql://HOST[:PORT]"));
    }
    // A host never looks so, a token whose `@HOST` was forgotten does.
    if host.starts_with("eyJ") {
        return Err(refuse("a token stands where the host belongs; write libsql://TOKEN@HOST[:PORT]"));
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b':');
    if host.len() > MAX_HOST || host.split('.').any(|label| label.len() > MAX_LABEL) || !host.bytes().all(plain) {
        return Err(refuse("what stands where the host belongs is no name of a host; write libsql://TOKEN@HOST[:PORT]"));
    }
    let port = match port {
        None => None,
        Some(port) => Some(
            port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| refuse("its port is no number from 1 to 65535"))?,
        ),
    };
    Ok((host.to_owned(), port))
}

/// Undoes `%41`.
fn decode(text: &str) -> Result<String, StoreError> {
    let bad = || refuse("a `%` in its token is not followed by two hexadecimal digits");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(bad)?;
        let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        bytes.push(digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).ok_or_else(bad)?);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| refuse("its token is no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VARIABLE: &str = "SEEKNAL_DATABASE_TOKEN";
    const TOKEN: &str = "eyJhbGciOiJFZERTQSJ9.eyJhIjoicncifQ.c2VjcmV0LXNlY3JldC1zZWNyZXQ";

    fn parse(url: &str) -> Result<Target, StoreError> {
        Target::parse(url, None, None)
    }

    fn beside(token: &str, place: &'static str) -> Setting {
        Setting { text: token.to_owned(), place }
    }

    fn shape(target: &Target) -> (bool, &str, u16, Option<&str>) {
        (target.tls, &target.host, target.port, target.token.as_ref().map(Secret::reveal))
    }

    #[test]
    fn every_form_that_is_documented_is_read() {
        let with = |url: String| parse(&url).unwrap();
        assert_eq!(shape(&with(format!("libsql://{TOKEN}@db.turso.io"))), (true, "db.turso.io", 443, Some(TOKEN)));
        assert_eq!(shape(&with(format!("libsql://db.turso.io/?authToken={TOKEN}"))), (true, "db.turso.io", 443, Some(TOKEN)));
        assert_eq!(shape(&with(format!("libsql://{TOKEN}@h:81?tls=0"))), (false, "h", 81, Some(TOKEN)));
        assert_eq!(shape(&with("http://127.0.0.1:8080".into())), (false, "127.0.0.1", 8080, None));
        assert_eq!(shape(&with("HTTP://127.0.0.1".into())), (false, "127.0.0.1", 80, None));
        assert_eq!(shape(&with("https://[::1]:8443/?tls=1".into())), (true, "::1", 8443, None));
        assert_eq!(shape(&with("libsql://a%2Bb@h".into())), (true, "h", 443, Some("a+b")));
        let environment = Target::parse("libsql://h", Some(beside(TOKEN, VARIABLE)), Some("/ca.pem")).unwrap();
        assert_eq!(shape(&environment), (true, "h", 443, Some(TOKEN)));
        assert_eq!(environment.ca_file.as_deref(), Some(std::path::Path::new("/ca.pem")));
        assert_eq!(with("https://[::1]:8443".into()).location(), "libsql://[::1]:8443");
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words_and_without_the_token() {
        let urls = [
            (format!("libsql://{TOKEN}:pw@h"), "password"),
            (format!("libsql://:{TOKEN}@h"), "password"),
            (format!("libsql://{TOKEN}@h?authToken={TOKEN}"), "two tokens"),
            (format!("libsql://h?authToken={TOKEN}&authToken=x"), "two tokens"),
            (format!("libsql://h?authtoken={TOKEN}"), "`authtoken`"),
            (format!("libsql://h?{TOKEN}"), "unknown parameter"),
            (format!("libsql://{TOKEN}"), "host"),
            (format!("libsql://{TOKEN}@"), "host"),
            (format!("libsql://{TOKEN}@h:port"), "port"),
            (format!("libsql://{TOKEN}@h:0"), "port"),
            (format!("libsql://{TOKEN}@h/path"), "path"),
            (format!("libsql://{TOKEN}@h#x"), "fragment"),
            (format!("libsql://{TOKEN}%0a@h"), "characters"),
            (format!("libsql://{TOKEN}%zz@h"), "hexadecimal"),
            (format!("libsql://{TOKEN}%4@h"), "hexadecimal"),
            (format!("libsql://{TOKEN}@h?tls=yes"), "0 or 1"),
            (format!("libsql://{TOKEN}@h?tls=1&tls=1"), "twice"),
            (format!("https://{TOKEN}@h?tls=0"), "contradicts"),
            (format!("http://{TOKEN}@h?tls=1"), "contradicts"),
            (format!("wss://{TOKEN}@h"), "ws://"),
            (format!("mysql://{TOKEN}@h"), "scheme"),
            (format!("{TOKEN}@h"), "scheme"),
            (format!("libsql://{TOKEN}@[::1"), "bracket"),
            (format!("libsql://{TOKEN}@[::1]x"), "port"),
        ];
        for (url, says) in urls {
            let error = parse(&url).unwrap_err();
            let (text, debug) = (error.to_string(), format!("{error:?}"));
            assert!(text.contains(says), "{text} does not say {says}");
            for part in TOKEN.split('.') {
                assert!(!text.contains(part) && !debug.contains(part), "{text} shows the token");
            }
            assert_eq!(error.kind(), StoreErrorKind::Input);
        }
        for (place, says) in [(VARIABLE, "and in SEEKNAL_DATABASE_TOKEN;"), (TOKEN_OPTION, "and in the option `database_token`;")]
        {
            let two = Target::parse(&format!("libsql://{TOKEN}@h"), Some(beside("x", place)), None).unwrap_err();
            assert!(two.to_string().contains(says), "{two}");
        }
        assert!(Target::parse("http://h", None, Some("/ca.pem")).unwrap_err().to_string().contains("database_ca_file"));
    }

    #[test]
    fn a_target_does_not_show_its_token() {
        let target = parse(&format!("libsql://{TOKEN}@h?tls=1")).unwrap();
        let shown = format!("{target:?} {} {}", target.location(), target.authority());
        assert!(!TOKEN.split('.').any(|part| shown.contains(part)), "{shown}");
    }
}
