//! Where the state is: what URL, options and environment say, checked before anything is connected.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

use super::hosts::{Target, targets};
use crate::store::{BackendOptions, SCHEMA, StoreError, StoreErrorKind};

/// How long making a connection to one address may take, unless the URL says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long what was sent may be without the peer's confirmation, unless the URL says otherwise.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a connection is quiet before the peer is asked whether it is there, and between two such questions; unless the URL says otherwise.
const KEEPALIVES_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVES_INTERVAL: Duration = Duration::from_secs(5);

/// Batches that are sent at once, unless it is said.
const FLUSH_SHARDS: usize = 2;

/// How the connection is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    /// No TLS.
    None,
    /// TLS if the server has it. The certificate is not checked: it keeps out who listens, not who pretends.
    IfOffered,
    /// TLS or nothing, without a check of the certificate unless a CA file is given.
    Encrypted,
    /// TLS, and the certificate must be signed by a known authority and name the host.
    Verified,
}

/// Where the state is and how to get there.
pub(super) struct Place {
    pub(super) config: Config,
    /// The hosts that the URL names.
    pub(super) targets: Vec<Target>,
    /// Whether only one of several hosts is written to, which may be another one tomorrow.
    pub(super) moves: bool,
    pub(super) protection: Protection,
    /// Whom to trust instead of the public authorities.
    pub(super) ca_file: Option<PathBuf>,
    pub(super) schema: String,
    pub(super) flush_shards: usize,
    pub(super) read_only: bool,
    /// For people; no user, no password.
    pub(super) name: String,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("name", &self.name).field("protection", &self.protection).finish_non_exhaustive()
    }
}

fn refuse(why: impl fmt::Display) -> StoreError {
    StoreError::not_applied(StoreErrorKind::Input, format!("database_url: {why}"))
}

/// The password of the environment, as it stands there: blanks may belong to it.
fn password() -> Result<Option<String>, StoreError> {
    match std::env::var("SEEKNAL_DATABASE_PASSWORD") {
        Ok(password) => Ok(Some(password).filter(|password| !password.is_empty())),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(StoreError::not_applied(StoreErrorKind::Input, "SEEKNAL_DATABASE_PASSWORD is not UTF-8 text"))
        }
    }
}

/// Takes the parameters of TLS out of a URL: the driver knows fewer modes than libpq.
fn split(url: &str) -> Result<(String, Vec<(String, String)>), StoreError> {
    let Some((base, query)) = url.split_once('?') else { return Ok((url.to_owned(), Vec::new())) };
    let (mut kept, mut ours) = (Vec::new(), Vec::new());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| refuse("a parameter after `?` has no value; write key=value"))?;
        // As the driver reads it: a key that is encoded is the same key.
        match decode(key)?.as_str() {
            key @ ("sslmode" | "sslrootcert") => ours.push((key.to_owned(), decode(value)?)),
            "password" => {
                return Err(refuse("the password belongs before the host or into SEEKNAL_DATABASE_PASSWORD, not after `?`"));
            }
            _ => kept.push(pair),
        }
    }
    let base = if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) };
    Ok((base, ours))
}

fn decode(text: &str) -> Result<String, StoreError> {
    let bad = || refuse("a parameter after `?` is not percent-encoded UTF-8");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next().ok_or_else(bad)?, rest.next().ok_or_else(bad)?];
        let digits = std::str::from_utf8(&digits).map_err(|_| bad())?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

impl Place {
    /// Checks what the options say. Nothing that may hold a secret gets into an error.
    pub(super) fn of(url: &str, options: &BackendOptions) -> Result<Self, StoreError> {
        let (base, ours) = split(url)?;
        // The driver takes everything up to the first `@` for the user and the password, and the rest of a password for the host.
        let authority = base.split_once("://").map_or(base.as_str(), |(_, rest)| rest);
        let authority = authority.split_once('?').map_or(authority, |(authority, _)| authority);
        if authority.matches('@').count() > 1 {
            return Err(refuse(
                "there is more than one `@` before the parameters; write `%40` for one in the password or the user's name",
            ));
        }
        // What the driver says of a URL that it cannot read may quote it.
        let mut config = Config::from_str(&base).map_err(|_| {
            refuse(
                "this is no PostgreSQL URL, or it has a parameter that is not known; write \
                 postgres://user@host:5432/database?sslmode=verify-full and percent-encode special characters",
            )
        })?;
        let mut ca_file = options.setting("database_ca_file")?.map(|file| PathBuf::from(file.text));
        let (mut mode, mut is_system) = (None, false);
        for (key, value) in ours {
            if key == "sslrootcert" {
                is_system = value == "system";
                if !is_system {
                    ca_file = Some(PathBuf::from(value));
                }
            } else {
                mode = Some(value);
            }
        }
        // As libpq 16 has it: who names the system's authorities wants them to be asked.
        if is_system {
            match mode.as_deref() {
                None | Some("verify-full") => mode = Some("verify-full".to_owned()),
                Some(_) => return Err(refuse("sslrootcert=system checks the server; write sslmode=verify-full with it")),
            }
        }
        let protection = match mode.as_deref() {
            Some("disable") => Protection::None,
            None | Some("prefer") => Protection::IfOffered,
            Some("require") if ca_file.is_none() => Protection::Encrypted,
            Some("require" | "verify-ca" | "verify-full") => Protection::Verified,
            Some(_) => return Err(refuse("sslmode is not known; known are disable, prefer, require, verify-ca and verify-full")),
        };
        if ca_file.is_some() && protection != Protection::Verified {
            return Err(refuse("a CA file is given, but nothing would be checked with it; add sslmode=verify-full"));
        }
        config.ssl_mode(match protection {
            Protection::None => SslMode::Disable,
            Protection::IfOffered => SslMode::Prefer,
            Protection::Encrypted | Protection::Verified => SslMode::Require,
        });
        let targets = targets(&config).map_err(refuse)?;
        refuse_parameters_in_names(&config)?;
        // Of several hosts only one is written to, and it may be another one tomorrow. Who reads goes there too: a standby may be behind, and tells nothing.
        let several = targets.len() > 1;
        if several && config.get_target_session_attrs() == TargetSessionAttrs::Any {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        let moves = several && config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        // Silence on the way is noticed in less than a minute, also by a connection that only listens.
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if config.get_keepalives_idle() == Config::new().get_keepalives_idle() {
            config.keepalives_idle(KEEPALIVES_IDLE).keepalives_interval(KEEPALIVES_INTERVAL).keepalives_retries(3);
        }
        // That of the environment is for the server that the settings name.
        if config.get_password().is_none()
            && !options.is_foreign()
            && let Some(password) = password()?
        {
            config.password(password);
        }
        if config.get_application_name().is_none() {
            config.application_name("seeknal-state");
        }
        let (schema, from) = options
            .setting("database_schema")?
            .map_or_else(|| (SCHEMA.to_owned(), "database_schema"), |schema| (schema.text, schema.place));
        check_schema(&schema, from)?;
        let flush_shards = match options.get("database_flush_shards") {
            None => FLUSH_SHARDS,
            Some(text) => text.parse().ok().filter(|count| (1..=64).contains(count)).ok_or_else(|| {
                StoreError::not_applied(StoreErrorKind::Input, "database_flush_shards: it must be a number from 1 to 64")
            })?,
        };
        let name = name(&config, &schema);
        Ok(Self { config, targets, moves, protection, ca_file, schema, flush_shards, read_only: options.is_read_only(), name })
    }
}

/// Refuses what is meant for a parameter, and was taken for a part of a name: names are shown, and it may be a password.
fn refuse_parameters_in_names(config: &Config) -> Result<(), StoreError> {
    let odd = |name: &str| name.contains([';', '&', '=', '?']);
    let hosts = config.get_hosts().iter().any(|host| match host {
        Host::Tcp(name) => odd(name),
        #[cfg(unix)]
        Host::Unix(path) => odd(&path.to_string_lossy()),
    });
    // Without a database's name the user's stands for it.
    let shown = config.get_dbname().or(config.get_user());
    if !hosts && !shown.is_some_and(odd) {
        return Ok(());
    }
    Err(refuse(
        "there is `;`, `&`, `=` or `?` in the name of the host or the database (it is not shown); parameters stand behind one `?`, with `&` between \
         them, and the password before the host or in SEEKNAL_DATABASE_PASSWORD",
    ))
}

/// The schema's name becomes part of statements: only what needs no thought.
fn check_schema(schema: &str, from: &str) -> Result<(), StoreError> {
    let plain = schema.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if plain
        && (1..=63).contains(&schema.len())
        && !schema.starts_with(|c: char| c.is_ascii_digit())
        && !schema.starts_with("pg_")
    {
        return Ok(());
    }
    Err(StoreError::not_applied(
        StoreErrorKind::Input,
        format!(
            "{from}: a schema's name must be 1 to 63 lower-case letters, digits and `_`, not begin with a digit, and not with pg_"
        ),
    ))
}

fn name(config: &Config, schema: &str) -> String {
    let ports = config.get_ports();
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(5432);
    let hosts: Vec<String> = config
        .get_hosts()
        .iter()
        .enumerate()
        .map(|(index, host)| match host {
            Host::Tcp(host) => format!("{host}:{}", port(index)),
            #[cfg(unix)]
            Host::Unix(path) => format!("{}:{}", path.display(), port(index)),
        })
        .collect();
    let hosts = if hosts.is_empty() {
        config.get_hostaddrs().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    } else {
        hosts.join(",")
    };
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("postgres://{hosts}/{database} (schema {schema})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(url: &str) -> Result<Place, StoreError> {
        Place::of(url, &BackendOptions::new())
    }

    #[test]
    fn modes_of_protection() {
        for (mode, protection) in [
            ("", Protection::IfOffered),
            ("?sslmode=disable", Protection::None),
            ("?sslmode=prefer", Protection::IfOffered),
            ("?sslmode=require", Protection::Encrypted),
            ("?sslmode=require&sslrootcert=/ca%20file.pem", Protection::Verified),
            ("?connect_timeout=7&sslmode=verify-ca", Protection::Verified),
            ("?sslmode=verify-full", Protection::Verified),
            ("?sslrootcert=system", Protection::Verified),
            ("?sslrootcert=system&sslmode=verify-full", Protection::Verified),
            ("?%73slmode=require", Protection::Encrypted),
        ] {
            let place = place(&format!("postgres://u:secret@host:6432/db{mode}")).unwrap();
            assert_eq!(place.protection, protection, "{mode}");
            assert_eq!(place.name, "postgres://host:6432/db (schema seeknal_state)");
            assert!(!format!("{place:?}").contains("secret"));
        }
        assert_eq!(
            place("postgres://h/d?sslmode=require&sslrootcert=/ca%20file.pem").unwrap().ca_file,
            Some(PathBuf::from("/ca file.pem"))
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_without_quoting_it() {
        for url in [
            "postgres://u:secret@host/db?sslmode=maybe",
            "postgres://u:secret@host/db?password=secret",
            "postgres://u:secret@host/db?p%61ssword=secret",
            "postgres://u:secret@host/db?sslrootcert=system&sslmode=require",
            "postgres://u:secret@host/db?sslmode=disable&sslrootcert=system",
            "postgres://u:secret@host/db?authToken=secret",
            "postgres://u:secret@host/db?sslrootcert=/x",
            "postgres://u:secret@host:port/db",
            "postgres://u:sec?ret@host/db",
            "postgres://u:secret@host/db?x=%zz&sslmode=%zz",
            "postgres://u:pass@secret@host/db",
            "postgres://u:pass@secret@host/db?sslmode=disable",
            "postgres://u:p@se/cret@secret/db",
            "postgres://u@host/db;password=secret",
            "postgres://u@host/db&password=secret",
            "postgres://u@host/db%3Fpassword=secret",
            "postgres://u@host/db%3bsecret",
            "postgres://u@host;password=secret/db",
            "postgres://u;password=secret@host",
            "postgres://u@%2Ftmp%2Fsocket;password=secret/db",
        ] {
            let error = place(url).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Input, "{url}");
            assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
        }
        for schema in ["", "a\"b", "Upper", "1st", "pg_x", "ö", &"x".repeat(64)] {
            let named = Place::of("postgres://h/d", &BackendOptions::new().set("database_schema", schema));
            assert_eq!(named.is_err(), !schema.is_empty(), "{schema}");
        }
        for shards in ["0", "65", "x"] {
            assert!(Place::of("postgres://h/d", &BackendOptions::new().set("database_flush_shards", shards)).is_err());
        }
    }
}
