//! Backends by name: the built-in ones, and those that an embedder registers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use super::options::{self, is_built_in};
use super::{MemoryBackend, StateBackend, StoreError, StoreErrorKind};

/// What a backend is made from. Every backend takes what it needs; an option that is [`set`](Self::set) and that none of the built-in backends knows is
/// refused by them.
///
/// ```
/// use seeknal_state::{BackendOptions, create_state_backend};
///
/// let here = BackendOptions::new().base_path("target"); // run_state.json, or state.db in it
/// let there = BackendOptions::new().database_url("postgres://app:s3cret@db.example.org/pipelines").set("database_schema", "etl");
/// let looking = here.clone().read_only(true); // beside whoever writes
/// assert!(!format!("{there:?}").contains("s3cret"));
/// # let _ = (create_state_backend("memory", &here)?, looking);
/// # Ok::<(), seeknal_state::StoreError>(())
/// ```
#[derive(Clone, Default)]
#[must_use]
pub struct BackendOptions {
    base_path: Option<PathBuf>,
    db_path: Option<PathBuf>,
    database_url: Option<String>,
    read_only: bool,
    extra: BTreeMap<String, String>,
    /// The variable of the environment that said an option's value, where one did: errors name it.
    variables: BTreeMap<String, &'static str>,
    /// Whether the environment's token is for another server than this one.
    foreign: bool,
}

/// A text that was set, and what says it: an option, or a variable of the environment.
#[cfg(any(feature = "postgres", feature = "libsql"))]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) text: String,
    /// The name of the option or the variable.
    pub(crate) place: &'static str,
}

impl BackendOptions {
    /// No options: everything is at its default.
    pub fn new() -> Self {
        Self::default()
    }

    /// The folder that holds `run_state.json` and `state.db`; `target` by default.
    pub fn base_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.base_path = Some(path.into());
        self
    }

    /// The SQLite file; `state.db` in the base path by default.
    pub fn db_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.db_path = Some(path.into());
        self
    }

    /// The URL of a remote database. It may hold a secret: it is never printed.
    pub fn database_url(mut self, url: impl Into<String>) -> Self {
        self.database_url = Some(url.into());
        self
    }

    /// Opens for reading only: nothing is made, recovered or changed, and a live writer is not disturbed.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Sets an option of a server, or of a custom backend. Those of the built-in backends are `database_ca_file`, `database_flush_shards`,
    /// `database_poll_ms`, `database_schema`, `database_token` and `sqlite_allow_network_fs`; each takes all of them, and uses its own. A file of authorities, a
    /// schema or a token that is set here stands before its variable of the environment; one that is blank counts as not set.
    pub fn set(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        let key = key.into();
        self.variables.remove(&key);
        self.extra.insert(key, value.into());
        self
    }

    /// As [`set`](Self::set), for a value that a variable of the environment said.
    #[cfg(feature = "project")]
    pub(crate) fn set_by_variable(mut self, key: &str, value: &str, variable: &'static str) -> Self {
        self = self.set(key, value);
        self.variables.insert(key.to_owned(), variable);
        self
    }

    /// For another server than the one that the settings are for: its token, and the password of the environment, are not to be told there.
    #[cfg(feature = "project")]
    pub(crate) fn without_secrets(mut self) -> Self {
        self.foreign = true;
        self.unset("database_token")
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Takes an option out: a custom backend that makes a built-in one takes out those of its own.
    pub fn unset(mut self, key: &str) -> Self {
        self.extra.remove(key);
        self.variables.remove(key);
        self
    }

    /// Without what a backend of this name would refuse because it is some custom backend's.
    #[cfg(feature = "project")]
    pub(crate) fn for_backend(mut self, name: &str) -> Self {
        if is_built_in(name) {
            self.extra.retain(|key, _| options::BackendOption::of(key).is_some());
        }
        self
    }

    /// An option that was set.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.extra.get(key).map(String::as_str)
    }

    /// What an option says, else its variable of the environment. Blank counts as not set, in both.
    #[cfg(any(feature = "postgres", feature = "libsql"))]
    pub(crate) fn setting(&self, option: &'static str) -> Result<Option<Setting>, StoreError> {
        let foreign = self.foreign && option == "database_token";
        self.setting_in(option, |name| if foreign { None } else { std::env::var_os(name) })
    }

    #[cfg(any(feature = "postgres", feature = "libsql"))]
    fn setting_in(
        &self,
        option: &'static str,
        environment: impl Fn(&str) -> Option<std::ffi::OsString>,
    ) -> Result<Option<Setting>, StoreError> {
        let said = |text: &str, place| {
            let text = text.trim();
            (!text.is_empty()).then(|| Setting { text: text.to_owned(), place })
        };
        let given = self.get(option).and_then(|text| said(text, self.variables.get(option).copied().unwrap_or(option)));
        let variable = options::BackendOption::of(option).and_then(|option| option.variable);
        let (None, Some(variable)) = (&given, variable) else { return Ok(given) };
        match environment(variable).map(std::ffi::OsString::into_string).transpose() {
            Ok(text) => Ok(text.and_then(|text| said(&text, variable))),
            Err(_) => Err(StoreError::not_applied(StoreErrorKind::Input, format!("{variable} is not UTF-8 text"))),
        }
    }

    /// The folder that holds the state.
    pub fn base(&self) -> &Path {
        self.base_path.as_deref().unwrap_or(Path::new("target"))
    }

    /// The SQLite file.
    pub fn db(&self) -> PathBuf {
        self.db_path.clone().unwrap_or_else(|| self.base().join("state.db"))
    }

    /// The URL of a remote database.
    pub fn url(&self) -> Option<&str> {
        self.database_url.as_deref()
    }

    /// Whether only reading is wanted.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }
}

impl fmt::Debug for BackendOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendOptions")
            .field("base_path", &self.base_path)
            .field("db_path", &self.db_path)
            .field("database_url", &self.database_url.as_ref().map(|_| "(not shown)"))
            .field("read_only", &self.read_only)
            .field("extra", &self.extra.keys())
            .field("variables", &self.variables)
            .field("foreign", &self.foreign)
            .finish()
    }
}

type MakeBackend = Arc<dyn Fn(&BackendOptions) -> Result<Arc<dyn StateBackend>, StoreError> + Send + Sync>;

static REGISTERED: LazyLock<RwLock<BTreeMap<String, MakeBackend>>> = LazyLock::new(RwLock::default);

/// The registry of backends.
#[derive(Debug)]
pub struct StateBackendFactory;

impl StateBackendFactory {
    /// The names that this build knows by itself.
    const BUILT_IN: &'static [&'static str] = &[
        #[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
        "database",
        #[cfg(feature = "file")]
        "file",
        "memory",
    ];

    /// Makes a backend known under a name, for [`create_state_backend`] and for `state_backend:` in a project's settings. Registering a
    /// name again replaces what it meant.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use seeknal_state::{BackendOptions, MemoryBackend, StateBackendFactory, create_state_backend};
    ///
    /// StateBackendFactory::register("mine", |_options| Ok(Arc::new(MemoryBackend::new())))?;
    /// assert!(create_state_backend("mine", &BackendOptions::new()).is_ok());
    /// # Ok::<(), seeknal_state::StoreError>(())
    /// ```
    ///
    /// # Errors
    /// [`StoreErrorKind::Input`] if the name is empty, not plain (letters, digits, `-`, `_`), or one of the built-in ones.
    pub fn register<F>(name: &str, make: F) -> Result<(), StoreError>
    where
        F: Fn(&BackendOptions) -> Result<Arc<dyn StateBackend>, StoreError> + Send + Sync + 'static,
    {
        let refuse = |why: &str| Err(StoreError::not_applied(StoreErrorKind::Input, format!("backend name {name:?}: {why}")));
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            return refuse("use letters, digits, `-` and `_`");
        }
        if is_built_in(name) {
            return refuse("this name is built in; choose another one");
        }
        REGISTERED.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), Arc::new(make));
        Ok(())
    }

    /// An unknown name as errors show it. What cannot be a name may be a URL with a secret in it: it is not repeated.
    pub(crate) fn shown(name: &str) -> String {
        let plain = name.len() <= 32 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if plain {
            format!(" {name:?}")
        } else {
            " (it is not shown: no name looks like that; a URL belongs into database_url, beside `state_backend: database`)"
                .to_owned()
        }
    }

    /// All names that [`create_state_backend`] knows now, sorted.
    pub fn names() -> Vec<String> {
        let mut names: Vec<String> = Self::BUILT_IN.iter().map(|name| (*name).to_owned()).collect();
        names.extend(REGISTERED.read().unwrap_or_else(PoisonError::into_inner).keys().cloned());
        names.sort();
        names
    }
}

/// Makes a backend by name: `file` (folder `base_path`), `database` (SQLite file `db_path`, or `database_url`), `memory`, or one that was
/// [registered](StateBackendFactory::register). Nothing is opened yet: that is [`Coordinator::open`](crate::Coordinator::open)'s work.
///
/// # Errors
/// [`StoreErrorKind::Input`] if the name is not known (the known ones are listed), an option makes no sense, or it is one of no built-in backend (the known
/// ones are listed; a registered backend has its own); [`StoreErrorKind::Unsupported`] if this build lacks the feature for it.
pub fn create_state_backend(name: &str, options: &BackendOptions) -> Result<Arc<dyn StateBackend>, StoreError> {
    if is_built_in(name) {
        options::check(options.extra.iter().map(|(key, value)| (key.as_str(), value.as_str())))?;
    }
    match name {
        #[cfg(feature = "file")]
        "file" => Ok(Arc::new(super::file::FileBackend::new(options))),
        #[cfg(not(feature = "file"))]
        "file" => Err(StoreError::not_applied(
            StoreErrorKind::Unsupported,
            "the file backend needs the feature `file`, which is not compiled into this build",
        )),
        "database" => database(options),
        "memory" => Ok(Arc::new(MemoryBackend::new())),
        _ => {
            let make = REGISTERED.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
            match make {
                Some(make) => make(options),
                None => Err(StoreError::not_applied(
                    StoreErrorKind::Input,
                    format!(
                        "unknown state backend{}; known are: {}",
                        StateBackendFactory::shown(name),
                        StateBackendFactory::names().join(", ")
                    ),
                )),
            }
        }
    }
}

fn database(options: &BackendOptions) -> Result<Arc<dyn StateBackend>, StoreError> {
    if let Some(url) = options.url() {
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        #[cfg(not(all(feature = "postgres", feature = "libsql")))]
        let needs = |feature: &str| {
            StoreError::not_applied(
                StoreErrorKind::Unsupported,
                format!(
                    "database_url with {scheme}:// needs the feature `{feature}`, which is not compiled into this build; remove database_url to use the SQLite file"
                ),
            )
        };
        return match scheme.to_ascii_lowercase().as_str() {
            #[cfg(feature = "postgres")]
            "postgres" | "postgresql" => Ok(Arc::new(super::postgres::PostgresBackend::new(options)?)),
            #[cfg(not(feature = "postgres"))]
            "postgres" | "postgresql" => Err(needs("postgres")),
            #[cfg(feature = "libsql")]
            "libsql" | "http" | "https" | "ws" | "wss" => Ok(Arc::new(super::libsql::LibsqlBackend::new(options)?)),
            #[cfg(not(feature = "libsql"))]
            "libsql" | "http" | "https" | "ws" | "wss" => Err(needs("libsql")),
            _ => Err(StoreError::not_applied(
                StoreErrorKind::Input,
                "database_url has an unknown scheme; known are postgres://, postgresql://, libsql://, http:// and https://",
            )),
        };
    }
    #[cfg(feature = "sqlite")]
    return Ok(Arc::new(super::sqlite::SqliteBackend::new(options)));
    #[cfg(not(feature = "sqlite"))]
    Err(StoreError::not_applied(StoreErrorKind::Unsupported, "the database backend needs the feature `sqlite`"))
}

#[cfg(all(test, any(feature = "postgres", feature = "libsql")))]
mod tests {
    use super::*;

    /// What code says wins over the environment; what is blank says nothing.
    #[test]
    fn an_option_stands_before_its_variable_and_blank_is_not_set() {
        let says = |options: BackendOptions, variable: Option<&str>| {
            let environment = |name: &str| (name == "SEEKNAL_DATABASE_TOKEN").then(|| variable.map(Into::into)).flatten();
            options.setting_in("database_token", environment).unwrap().map(|found| (found.text, found.place))
        };
        let option = |text: &str| BackendOptions::new().set("database_token", text);
        assert_eq!(says(option("a"), Some("b")), Some(("a".to_owned(), "database_token")));
        for blank in ["", " "] {
            assert_eq!(says(option(blank), Some("b")), Some(("b".to_owned(), "SEEKNAL_DATABASE_TOKEN")));
            assert_eq!(says(option("a"), Some(blank)), Some(("a".to_owned(), "database_token")));
            assert_eq!(says(option(blank), Some(blank)), None);
        }
        assert_eq!(says(BackendOptions::new(), Some(" b ")), Some(("b".to_owned(), "SEEKNAL_DATABASE_TOKEN")));
        assert_eq!(says(BackendOptions::new(), None), None);
    }
}
