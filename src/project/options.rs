//! The options of the built-in backends under `seeknal_state: options:`. A name or a value that none of them knows is refused: what is swallowed there
//! sends the work to another schema, or to nowhere. Registered backends have options of their own.

/// One of them.
pub(super) struct BackendOption {
    pub(super) name: &'static str,
    /// What it takes, for people.
    pub(super) wanted: &'static str,
    /// Whether a value can be meant; the backend itself may know more.
    pub(super) fits: fn(&str) -> bool,
}

/// Whether text is a whole number of a range.
fn is_number(text: &str, range: std::ops::RangeInclusive<u64>) -> bool {
    text.parse().is_ok_and(|number| range.contains(&number))
}

/// All of them, of all backends: a project keeps those of the one that it does not use now.
pub(super) const OPTIONS: &[BackendOption] = &[
    BackendOption { name: "database_ca_file", wanted: "the path of a PEM file", fits: |_| true },
    BackendOption { name: "database_flush_shards", wanted: "a number from 1 to 64", fits: |text| is_number(text, 1..=64) },
    BackendOption {
        name: "database_poll_ms",
        wanted: "a number of milliseconds from 10 to 60000",
        fits: |text| is_number(text, 10..=60_000),
    },
    BackendOption { name: "database_schema", wanted: "the schema's name", fits: |_| true },
    BackendOption { name: "database_token", wanted: "the token", fits: |_| true },
    BackendOption { name: "sqlite_allow_network_fs", wanted: "true or false", fits: |text| ["true", "false"].contains(&text) },
];

/// The backends that come with the crate.
pub(super) fn is_built_in(backend: &str) -> bool {
    ["file", "database", "memory"].contains(&backend)
}
