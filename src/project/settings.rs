//! The settings of a project: environment over `seeknal_project.yml` over defaults, each with where it came from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::settings_file::{self, Found, KEYS, Value};
use super::{ProjectError, ProjectErrorKind, neighbour, there};
use crate::model::{Clock, SystemClock};
use crate::store::{
    BackendOption, BackendOptions, OpenReport, StateBackend, StateBackendFactory, create_state_backend, is_built_in,
};

/// The name of the settings file that is made where there is none.
pub(super) const FILE_NAME: &str = "seeknal_project.yml";
const OTHER_FILE_NAME: &str = "seeknal_project.yaml";
const ENV_BACKEND: &str = "SEEKNAL_STATE_BACKEND";
const ENV_URL: &str = "SEEKNAL_DATABASE_URL";

/// How the environment is asked for a variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Looks into the environment of this process.
pub fn process_environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// Where a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// Nobody set it.
    Default,
    /// The settings file.
    File {
        /// Its path.
        path: PathBuf,
        /// The line in it, from 1.
        line: u64,
    },
    /// A variable of the environment.
    Environment(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("by default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// A setting and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sourced<T> {
    /// The setting.
    pub value: T,
    /// Where it came from.
    pub source: Source,
}

/// Text that is never shown: a database URL may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text from being shown.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself. Do not print it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
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
    /// [`ProjectErrorKind::NotFound`] if `path` is not there; [`ProjectErrorKind::Input`] if the file cannot be read as settings, a value
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
        let database_url = match variable(environment, ENV_URL)? {
            Some(url) => Some(Sourced { value: url, source: Source::Environment(ENV_URL) }),
            None => url_in_file,
        }
        .map(|url| Sourced { value: Secret::new(url.value), source: url.source });

        let mut settings = Self {
            target: Sourced { value: under(&project, Path::new("target")), source: Source::Default },
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
                    return Err(
                        reader.at(line, format!("seeknal_state has no key {unknown:?}{hint}; known are: {}", known.join(", ")))
                    );
                }
            }
        }
        Ok(())
    }

    /// What a backend of this project is made from.
    pub fn backend_options(&self, read_only: bool) -> BackendOptions {
        let options = self.local_options(read_only);
        match &self.database_url {
            Some(url) => options.database_url(url.value.expose()),
            None => options,
        }
    }

    /// The same without the remote database. Where the environment names a built-in backend instead of a registered one, that one's options are not for it.
    pub(super) fn local_options(&self, read_only: bool) -> BackendOptions {
        let options = BackendOptions::new().base_path(&self.target.value).read_only(read_only);
        let add = |options: BackendOptions, (key, value): (&String, &String)| match self.option_sources.get(key) {
            Some(Source::Environment(variable)) => options.set_by_variable(key, value, variable),
            _ => options.set(key, value),
        };
        self.options.iter().fold(options, add).for_backend(&self.backend.value)
    }

    /// Makes the project's backend; nothing is opened yet.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Input`] if this build cannot make it (the message names the missing feature).
    pub fn backend(&self, read_only: bool) -> Result<Arc<dyn StateBackend>, ProjectError> {
        self.named_backend(&self.backend.value, read_only)
    }

    /// Makes a backend of this project by name; nothing is opened yet.
    pub(super) fn named_backend(&self, name: &str, read_only: bool) -> Result<Arc<dyn StateBackend>, ProjectError> {
        create_state_backend(name, &self.backend_options(read_only).for_backend(name)).map_err(|error| self.located(error.into()))
    }

    /// An error about a setting, with where that came from. Backends begin such an error with the setting's name.
    fn located(&self, error: ProjectError) -> ProjectError {
        let message = error.to_string();
        let mut sources: Vec<(&str, &Source)> =
            self.option_sources.iter().map(|(name, source)| (name.as_str(), source)).collect();
        sources.extend(self.database_url.iter().map(|url| ("database_url", &url.source)));
        match sources.into_iter().find(|(name, _)| message.starts_with(name)) {
            Some((_, source)) => error.at(source),
            None => error,
        }
    }

    /// Makes and opens the project's backend. One that is opened for writing gives fencing tokens out behind those of the other one in the same folder, as with
    /// [`open_with`](super::open_with).
    ///
    /// # Errors
    /// As [`backend`](Self::backend), and whatever opening finds.
    ///
    /// # Cancel safety
    /// A dropped call may have opened the backend, which then closes by its own drop.
    pub async fn open_backend(&self, read_only: bool) -> Result<(Arc<dyn StateBackend>, OpenReport), ProjectError> {
        let backend = self.backend(read_only)?;
        let report = backend.initialize().await?;
        if !read_only && let Err(error) = neighbour::pass_tokens(self, &*backend, SystemClock.now()).await {
            let _gives_its_own_error = backend.close().await.is_err();
            return Err(error);
        }
        Ok((backend, report))
    }

    /// Opens the project's backend for reading, if there is any state; makes nothing.
    ///
    /// # Errors
    /// As [`open_backend`](Self::open_backend); [`ProjectErrorKind::Integrity`] for a `state.db` that was removed or emptied, as the file beside it tells:
    /// whoever reads on would take it for a new project. (An opening for writing begins anew, and says so in its notices.)
    ///
    /// # Cancel safety
    /// Only reads: may be dropped at any time.
    pub async fn open_existing(&self) -> Result<Option<(Arc<dyn StateBackend>, OpenReport)>, ProjectError> {
        let found = self.open_existing_named(&self.backend.value).await?;
        if found.is_some() {
            return Ok(found);
        }
        self.refuse_lost()?;
        // Whoever made it between the two looks is read.
        self.open_existing_named(&self.backend.value).await
    }

    /// The same for a backend by name.
    pub(super) async fn open_existing_named(
        &self,
        name: &str,
    ) -> Result<Option<(Arc<dyn StateBackend>, OpenReport)>, ProjectError> {
        match name {
            // To read a folder without a document is no error: such a state is empty. Here it matters that there is none.
            "file" if !there::file_state(&self.target.value)? => return Ok(None),
            "database" if self.database_url.is_none() => {
                there::database_file(&self.target.value)?;
            }
            _ => {}
        }
        let backend = self.named_backend(name, true)?;
        match backend.initialize().await.map_err(ProjectError::from) {
            Ok(report) => Ok(Some((backend, report))),
            Err(error) if error.is_no_state() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The path of the settings file, also of one that is not there yet.
    pub fn file_or_default(&self) -> PathBuf {
        self.file.clone().unwrap_or_else(|| under(&self.project, Path::new(FILE_NAME)))
    }
}

/// Joins without a leading `./`, so that what is printed can be typed again.
fn under(folder: &Path, path: &Path) -> PathBuf {
    if folder == Path::new(".") || folder.as_os_str().is_empty() { path.to_owned() } else { folder.join(path) }
}

/// The project's folder and its settings file.
fn find(path: &Path) -> Result<(PathBuf, Option<PathBuf>), ProjectError> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    // So that what is printed can be typed again: a leading hyphen is taken for an option.
    let path = &if path.as_os_str().as_encoded_bytes().starts_with(b"-") { Path::new(".").join(path) } else { path.to_owned() };
    let kind = std::fs::metadata(path).map_err(|error| match error.kind() {
        // A URL in the wrong place may hold a password.
        _ if path.to_string_lossy().contains("://") => ProjectError::new(
            ProjectErrorKind::NotFound,
            "--project-path: this is a URL (it is not shown), and there is no such folder; give the project's folder, a URL belongs into database_url",
        ),
        std::io::ErrorKind::NotFound => ProjectError::new(
            ProjectErrorKind::NotFound,
            format!("{}: there is no such folder; give the project's folder with --project-path", path.display()),
        ),
        _ => ProjectError::io(path, error),
    })?;
    let start = if kind.is_dir() { path } else { super::files::folder_of(path) };
    if let Some(file) = settings_file_in(start)? {
        return Ok((start.to_owned(), Some(file)));
    }
    let absolute = std::fs::canonicalize(start).map_err(|error| ProjectError::io(start, error))?;
    for folder in absolute.ancestors().skip(1) {
        if let Some(file) = settings_file_in(folder)? {
            return Ok((folder.to_owned(), Some(file)));
        }
    }
    Ok((start.to_owned(), None))
}

fn settings_file_in(folder: &Path) -> Result<Option<PathBuf>, ProjectError> {
    let (yml, yaml) = (under(folder, Path::new(FILE_NAME)), under(folder, Path::new(OTHER_FILE_NAME)));
    // A link that leads nowhere is there too: reading it then says so.
    let there = |path: &Path| match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(ProjectError::io(path, error)),
    };
    match (there(&yml)?, there(&yaml)?) {
        (true, true) => Err(ProjectError::input(format!(
            "{} and {OTHER_FILE_NAME} are both there; keep one of them, {FILE_NAME} is the usual one",
            yml.display()
        ))),
        (true, false) => Ok(Some(yml)),
        (false, true) => Ok(Some(yaml)),
        (false, false) => Ok(None),
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
        // The two of the guide may be missing from this build; making one says which feature it needs.
        return Ok(());
    }
    let hint = did_you_mean(name, names.iter().map(String::as_str).chain(["file", "database"]));
    Err(ProjectError::input(format!(
        "{}: unknown state backend{}{hint}; known are: {}",
        backend.source,
        StateBackendFactory::shown(name),
        names.join(", ")
    )))
}

/// `, did you mean "x"?` for a near miss, else nothing.
fn did_you_mean<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known
        .map(|name| (distance(given, name), name))
        .min()
        .filter(|(steps, name)| *steps <= (name.len() / 3).max(2) && steps + 2 <= name.len());
    near.map_or_else(String::new, |(_, name)| format!(" (did you mean {name:?}?)"))
}

/// How many letters must be added, removed or changed to get from one text to the other, case aside; bounded input only.
pub(super) fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().take(64).collect();
    let b: Vec<char> = b.to_lowercase().chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.iter().enumerate() {
        let mut diagonal = i;
        let mut last = i + 1;
        let mut next = vec![last];
        for (right, above) in b.iter().zip(row.iter().skip(1)) {
            last = (diagonal + usize::from(left != right)).min(above + 1).min(last + 1);
            diagonal = *above;
            next.push(last);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

/// Reads single values and knows which file to blame.
struct Reader {
    file: PathBuf,
}

impl Reader {
    fn at(&self, line: u64, message: String) -> ProjectError {
        ProjectError::input(format!("{}:{line}: {message}", self.file.display()))
    }

    fn wrong(&self, key: &str, found: &Found, wanted: &str) -> ProjectError {
        self.at(found.line, format!("{key} is {}; write {wanted}, or remove the line", found.value.kind()))
    }

    fn source(&self, found: &Found) -> Source {
        Source::File { path: self.file.clone(), line: found.line }
    }

    fn text(&self, key: &str, found: &Found) -> Result<Sourced<String>, ProjectError> {
        match &found.value {
            // The system takes none in a path, and the rest of a URL would be another one.
            Value::Text(text) if text.contains('\0') => {
                Err(self.at(found.line, format!("{key} holds a NUL character (\\0); write it without")))
            }
            Value::Text(text) if !text.trim().is_empty() => {
                Ok(Sourced { value: text.trim().to_owned(), source: self.source(found) })
            }
            Value::Text(_) => Err(self.at(found.line, format!("{key} is empty; write a text, or remove the line"))),
            _ => Err(self.wrong(key, found, "a text")),
        }
    }

    fn number(&self, key: &str, found: &Found, range: std::ops::RangeInclusive<u64>) -> Result<Sourced<u64>, ProjectError> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        match &found.value {
            Value::Int(number) => u64::try_from(*number)
                .ok()
                .filter(|number| range.contains(number))
                .map(|number| Sourced { value: number, source: self.source(found) })
                .ok_or_else(|| self.at(found.line, format!("{key} is {number}; write {wanted}"))),
            _ => Err(self.wrong(key, found, &wanted)),
        }
    }

    fn texts(&self, key: &str, found: &Found) -> Result<BTreeMap<String, Sourced<String>>, ProjectError> {
        let Value::Map(members) = &found.value else { return Err(self.wrong(key, found, "a mapping of texts")) };
        let mut texts = BTreeMap::new();
        for (name, value) in members {
            let line = name.referenced.line();
            let text = match &value.value {
                Value::Text(text) => text.clone(),
                Value::Int(number) => number.to_string(),
                Value::Float(number) => number.to_string(),
                Value::Bool(flag) => flag.to_string(),
                other => {
                    return Err(self.at(line, format!("{key}.{} is {}; write a text", name.value, other.kind())));
                }
            };
            let source = Source::File { path: self.file.clone(), line };
            if texts.insert(name.value.clone(), Sourced { value: text, source }).is_some() {
                return Err(self.at(line, format!("{key}.{} is given a second time; remove one of them", name.value)));
            }
        }
        Ok(texts)
    }

    /// Refuses an option that no built-in backend knows. The value may be a secret: it is not shown.
    fn check_option(&self, key: &str, name: &str, text: &Sourced<String>) -> Result<(), ProjectError> {
        let Source::File { line, .. } = text.source else { return Ok(()) };
        let Some(option) = BackendOption::of(name) else {
            let known = BackendOption::names();
            let hint = did_you_mean(name, known.iter().copied());
            return Err(self.at(line, format!("{key} has no {name:?}{hint}; known are: {}", known.join(", "))));
        };
        if option.takes(&text.value) {
            return Ok(());
        }
        Err(self.at(line, format!("{key}.{name} makes no sense; write {}, or remove the line", option.wanted)))
    }
}
