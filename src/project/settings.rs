//! The settings of a project: environment over `seeknal_project.yml` over defaults, each with where it came from.

mod find;
mod near;
mod opening;
mod reader;
mod source;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::find::{FILE_NAME, find, under};
use self::near::{did_you_mean, shown};
use self::reader::Reader;
use super::ProjectError;
use super::settings_file::{self, Found, KEYS, Value};
use crate::store::{BackendOption, StateBackendFactory, is_built_in};

pub(super) use near::distance;
pub use source::{Secret, Source, Sourced};

const ENV_BACKEND: &str = "SEEKNAL_STATE_BACKEND";
const ENV_URL: &str = "SEEKNAL_DATABASE_URL";

/// How the environment is asked for a variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Looks into the environment of this process.
pub fn process_environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// The settings of one project.
///
/// | where | key | meaning, unit, default |
/// |---|---|---|
/// | top level | `state_backend` | `file` (default), `database`, or a registered name; `SEEKNAL_STATE_BACKEND` overrides it |
/// | top level | `database_url` | a remote database instead of `state.db`; `SEEKNAL_DATABASE_URL` overrides it |
/// | `seeknal_state` | `target_path` | the state's folder, relative to the project's; `target` |
/// | `seeknal_state` | `lease_ttl_ms` | life of a lock without renewal, milliseconds, 100 to 3,600,000; 30,000 |
/// | `seeknal_state` | `idle_run_seconds` | a run without work leaves memory after this, seconds, 1 to 86,400; 60 |
/// | `seeknal_state` | `options` | texts for a server or a registered backend; none |
///
/// `SEEKNAL_DATABASE_SCHEMA`, `SEEKNAL_DATABASE_CA_FILE` and `SEEKNAL_DATABASE_TOKEN` override the options `database_schema`, `database_ca_file` and
/// `database_token` of the file.
///
/// Options of the built-in backends are checked by name and value; a registered backend has its own.
///
/// An unknown key under `seeknal_state` is an error, and so is one at the top level that is nearly one of ours; all other keys of the file belong to
/// Seeknal. A variable that is empty counts as not set.
#[derive(Clone)]
#[non_exhaustive]
pub struct Settings {
    /// The project's folder.
    pub project: PathBuf,
    /// The settings file; `None` if there is none.
    pub file: Option<PathBuf>,
    /// The backend's name.
    pub backend: Sourced<String>,
    /// What the file alone says about the backend; for warnings when the environment overrides it.
    pub backend_in_file: Option<String>,
    /// The remote database.
    pub database_url: Option<Sourced<Secret>>,
    /// The folder that holds the state.
    pub target: Sourced<PathBuf>,
    /// How long a lock lives without renewal; `None` leaves it to the coordinator (30 s).
    pub lease_ttl: Option<Sourced<Duration>>,
    /// After how long without work a run leaves memory; `None` leaves it to the coordinator (60 s).
    pub idle_run: Option<Sourced<Duration>>,
    /// Options for a server or a registered backend that the file names, each as the environment says it where that does.
    pub options: BTreeMap<String, String>,
    /// Where each of them stands.
    option_sources: BTreeMap<String, Source>,
    /// What the file alone says, for whoever looks later whether it says something else.
    pub(super) in_file: InFile,
}

/// Which place the settings file alone names, beside the backend.
#[derive(Debug, Clone)]
pub(super) struct InFile {
    pub(super) url: Option<Secret>,
    pub(super) target: PathBuf,
    pub(super) schema: Option<String>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A registered backend may be given a password among its options: their names only.
        let options: Vec<&String> = self.options.keys().collect();
        f.debug_struct("Settings")
            .field("project", &self.project)
            .field("file", &self.file)
            .field("backend", &self.backend)
            .field("backend_in_file", &self.backend_in_file)
            .field("database_url", &self.database_url)
            .field("target", &self.target)
            .field("lease_ttl", &self.lease_ttl)
            .field("idle_run", &self.idle_run)
            .field("options", &options)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Finds and reads the settings of the project that `path` (a folder, or a file in it) belongs to: the file is searched upwards. Without a file
    /// everything is at its default, and `path` is the project's folder.
    ///
    /// ```
    /// use seeknal_state::project::Settings;
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let project = folder.path();
    /// std::fs::write(project.join("seeknal_project.yml"), "state_backend: database\n")?;
    /// let settings = Settings::load(project, &|_| None)?; // no environment; `&process_environment` asks the real one
    /// assert_eq!(settings.backend.value, "database");
    /// assert!(settings.target.value.ends_with("target"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ProjectErrorKind::NotFound`](super::ProjectErrorKind::NotFound) if `path` is not there; [`ProjectErrorKind::Input`](super::ProjectErrorKind::Input) if the file cannot be read as settings, a value
    /// makes no sense, the backend is not known, or one folder has two files of settings. The message names file, line and mend.
    pub fn load(path: &Path, environment: Lookup<'_>) -> Result<Self, ProjectError> {
        let (project, file) = find(path)?;
        let parsed = match &file {
            Some(file) => settings_file::parse(file, &settings_file::read_text(file)?)?,
            None => settings_file::Parsed::default(),
        };
        let reader = Reader { file: file.clone().unwrap_or_default() };

        let in_file = parsed.state_backend.as_ref().map(|found| reader.text("state_backend", found)).transpose()?;
        let backend = match variable(environment, ENV_BACKEND)? {
            Some(name) => Sourced { value: name, source: Source::Environment(ENV_BACKEND) },
            None => in_file.clone().unwrap_or(Sourced { value: "file".to_owned(), source: Source::Default }),
        };
        check_backend(&backend)?;
        let url_in_file = parsed.database_url.as_ref().map(|found| reader.text("database_url", found)).transpose()?;
        let url_alone = url_in_file.as_ref().map(|url| Secret::new(url.value.clone()));
        let database_url = match variable(environment, ENV_URL)? {
            Some(url) => Some(Sourced { value: url, source: Source::Environment(ENV_URL) }),
            None => url_in_file,
        }
        .map(|url| Sourced { value: Secret::new(url.value), source: url.source });

        let target = under(&project, Path::new("target"));
        let mut settings = Self {
            in_file: InFile { url: url_alone, target: target.clone(), schema: None },
            target: Sourced { value: target, source: Source::Default },
            project,
            file,
            backend,
            backend_in_file: in_file.map(|setting| setting.value),
            database_url,
            lease_ttl: None,
            idle_run: None,
            options: BTreeMap::new(),
            option_sources: BTreeMap::new(),
        };
        if let Some(ours) = &parsed.ours {
            settings.read_ours(&reader, ours, environment)?;
        }
        Ok(settings)
    }

    fn read_ours(&mut self, reader: &Reader, ours: &Found, environment: Lookup<'_>) -> Result<(), ProjectError> {
        let Value::Map(members) = &ours.value else {
            return Err(reader.wrong("seeknal_state", ours, "a mapping of our settings"));
        };
        let mut seen: Vec<&str> = Vec::new();
        for (key, value) in members {
            let line = key.referenced.line();
            let name = key.value.as_str();
            if seen.contains(&name) {
                return Err(reader.at(line, format!("seeknal_state.{name} is given a second time; remove one of them")));
            }
            seen.push(name);
            let found = Found { value: value.value.clone(), line, bytes: None };
            let full = format!("seeknal_state.{name}");
            match name {
                "target_path" => {
                    let text = reader.text(&full, &found)?;
                    if text.value.contains("://") {
                        // It may hold a password, and would be shown in every message.
                        return Err(reader.at(line, format!("{full} names a folder; a URL belongs into database_url")));
                    }
                    self.target = Sourced { value: under(&self.project, Path::new(&text.value)), source: text.source };
                    self.in_file.target.clone_from(&self.target.value);
                }
                "lease_ttl_ms" => {
                    let number = reader.number(&full, &found, 100..=3_600_000)?;
                    self.lease_ttl = Some(Sourced { value: Duration::from_millis(number.value), source: number.source });
                }
                "idle_run_seconds" => {
                    let number = reader.number(&full, &found, 1..=86_400)?;
                    self.idle_run = Some(Sourced { value: Duration::from_secs(number.value), source: number.source });
                }
                "options" => {
                    for (name, text) in reader.texts(&full, &found)? {
                        // Those of a registered backend are its own, also where the environment names another one for now.
                        if is_built_in(&self.backend.value) && self.backend_in_file.as_deref().is_none_or(is_built_in) {
                            reader.check_option(&full, &name, &text)?;
                        }
                        if name == "database_schema" {
                            self.in_file.schema = Some(text.value.trim().to_owned()).filter(|schema| !schema.is_empty());
                        }
                        // What only the environment says the backend asks itself: a registered one may take no such option.
                        let text = match BackendOption::of(&name).and_then(|option| option.variable) {
                            Some(name) => variable(environment, name)?
                                .map_or(text, |value| Sourced { value, source: Source::Environment(name) }),
                            None => text,
                        };
                        self.options.insert(name.clone(), text.value);
                        self.option_sources.insert(name, text.source);
                    }
                }
                unknown => {
                    let known: Vec<&str> = KEYS.iter().map(|(key, _)| *key).collect();
                    let hint = did_you_mean(unknown, known.iter().copied());
                    return Err(reader.at(
                        line,
                        format!("seeknal_state has no key {}{hint}; known are: {}", shown(unknown), known.join(", ")),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The path of the settings file, also of one that is not there yet.
    pub fn file_or_default(&self) -> PathBuf {
        self.file.clone().unwrap_or_else(|| under(&self.project, Path::new(FILE_NAME)))
    }
}
fn variable(environment: Lookup<'_>, name: &'static str) -> Result<Option<String>, ProjectError> {
    match environment(name) {
        None => Ok(None),
        Some(value) => match value.into_string() {
            Ok(text) if text.trim().is_empty() => Ok(None),
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(_) => {
                Err(ProjectError::input(format!("environment variable {name}: it is not UTF-8 text; set it anew or unset it")))
            }
        },
    }
}

fn check_backend(backend: &Sourced<String>) -> Result<(), ProjectError> {
    let names = StateBackendFactory::names();
    let name = &backend.value;
    if names.contains(name) || name == "file" || name == "database" {
        // The two that settings name may be missing from this build; making one says which feature it needs.
        return Ok(());
    }
    // What keeps a database is found out by its URL.
    let is_database =
        ["sqlite", "sqlite3", "postgres", "postgresql", "libsql"].iter().any(|kind| name.eq_ignore_ascii_case(kind));
    let meant = if is_database { "database" } else { name };
    let hint = did_you_mean(meant, names.iter().map(String::as_str).chain(["file", "database"]));
    Err(ProjectError::input(format!(
        "{}: unknown state backend{}{hint}; known are: {}",
        backend.source,
        StateBackendFactory::shown(name),
        names.join(", ")
    )))
}
