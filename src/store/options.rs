//! The options of the built-in backends. A name or a value that none of them knows is refused: what is swallowed there sends the work to another schema, or
//! to nowhere. Registered backends have options of their own.

use super::{StoreError, StoreErrorKind};

/// The schema that holds the tables on a server, unless it is named.
#[cfg(any(feature = "postgres", feature = "project"))]
pub(crate) const SCHEMA: &str = "seeknal_state";

/// One of them.
pub(crate) struct BackendOption {
    pub(crate) name: &'static str,
    /// What it takes, for people.
    pub(crate) wanted: &'static str,
    /// The variable of the environment that says the same.
    #[cfg_attr(
        not(any(feature = "postgres", feature = "libsql", feature = "project")),
        expect(dead_code, reason = "servers and projects ask for it")
    )]
    pub(crate) variable: Option<&'static str>,
    /// Whether a value can be meant; the backend itself may know more.
    fits: fn(&str) -> bool,
}

impl BackendOption {
    /// Finds one by its name.
    pub(crate) fn of(name: &str) -> Option<&'static Self> {
        OPTIONS.iter().find(|option| option.name == name)
    }

    /// All names, for people.
    pub(crate) fn names() -> Vec<&'static str> {
        OPTIONS.iter().map(|option| option.name).collect()
    }

    /// Whether a value can be meant.
    pub(crate) fn takes(&self, value: &str) -> bool {
        (self.fits)(value) && !value.contains('\0')
    }
}

/// Refuses what no built-in backend takes. The error begins with the option's name; its value may be a secret, and is not shown.
pub(super) fn check<'a>(options: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), StoreError> {
    for (name, value) in options {
        let why = match BackendOption::of(name) {
            Some(option) if option.takes(value) => continue,
            Some(option) => format!("{name} makes no sense; give it {}, or leave it out", option.wanted),
            None => {
                format!("{name:?} is an option of no built-in backend; known are: {}", BackendOption::names().join(", "))
            }
        };
        return Err(StoreError::not_applied(StoreErrorKind::Input, why));
    }
    Ok(())
}

/// Whether text is a whole number of a range.
fn is_number(text: &str, range: std::ops::RangeInclusive<u64>) -> bool {
    text.parse().is_ok_and(|number| range.contains(&number))
}

/// All of them, of all backends: a project keeps those of the one that it does not use now.
const OPTIONS: &[BackendOption] = &[
    BackendOption {
        name: "database_ca_file",
        wanted: "the path of a PEM file",
        variable: Some("SEEKNAL_DATABASE_CA_FILE"),
        fits: |_| true,
    },
    BackendOption {
        name: "database_flush_shards",
        wanted: "a number from 1 to 64",
        variable: None,
        fits: |text| is_number(text, 1..=64),
    },
    BackendOption {
        name: "database_poll_ms",
        wanted: "a number of milliseconds from 10 to 60000",
        variable: None,
        fits: |text| is_number(text, 10..=60_000),
    },
    BackendOption {
        name: "database_schema",
        wanted: "the schema's name",
        variable: Some("SEEKNAL_DATABASE_SCHEMA"),
        fits: |_| true,
    },
    BackendOption { name: "database_token", wanted: "the token", variable: Some("SEEKNAL_DATABASE_TOKEN"), fits: |_| true },
    BackendOption {
        name: "sqlite_allow_network_fs",
        wanted: "true or false",
        variable: None,
        fits: |text| ["true", "false"].contains(&text),
    },
];

/// The backends that come with the crate.
pub(crate) fn is_built_in(backend: &str) -> bool {
    ["file", "database", "memory"].contains(&backend)
}
