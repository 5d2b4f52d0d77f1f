//! Where a state is moved from, and where to.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

#[cfg(feature = "cli")]
use super::checks::one_place;
use super::{ProjectError, ProjectErrorKind, Secret, Settings, there, unfinished};
use crate::model::RunQuery;
use crate::store::{OpenReport, StateBackend, create_state_backend};

/// The backends that settings name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Home {
    /// `run_state.json`.
    File,
    /// `state.db`, or the remote database of `database_url`.
    Database,
}

impl Home {
    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Database => "database",
        }
    }

    /// Where a project that moves here comes from, unless it is told.
    pub fn other(self) -> Self {
        match self {
            Self::File => Self::Database,
            Self::Database => Self::File,
        }
    }
}

/// Where the state that moves is now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// A backend as the settings describe it.
    Home(Home),
    /// `state.db` in the state's folder, also where the settings name a remote database.
    Sqlite,
    /// Another database. The URL may hold a secret: it is never printed.
    Url(Secret),
}

impl Origin {
    /// Reads `file`, `database`, `sqlite`, or a URL.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Input`] if it is none of them; the text is not repeated, it may hold a secret.
    pub fn parse(text: &str) -> Result<Self, ProjectError> {
        match text {
            "file" => Ok(Self::Home(Home::File)),
            "database" => Ok(Self::Home(Home::Database)),
            "sqlite" => Ok(Self::Sqlite),
            url if url.contains("://") => Ok(Self::Url(Secret::new(url))),
            _ => Err(ProjectError::input(
                "the place to move from is not known; known are `file`, `database` (what the settings name), `sqlite` (state.db) and a URL",
            )),
        }
    }

    /// What the settings have to say for it to be used again.
    pub(super) fn settings_lines(&self) -> Vec<String> {
        match self {
            Self::Home(home) => vec![format!("state_backend: {}", home.name())],
            Self::Sqlite => vec!["state_backend: database".to_owned(), "(and no database_url)".to_owned()],
            Self::Url(_) => vec!["state_backend: database".to_owned(), "database_url: (the one that was moved from)".to_owned()],
        }
    }

    /// Whether it is on a server: beside it lies nothing that tells how far numbers were given out.
    pub(super) fn is_on_server(&self, settings: &Settings) -> bool {
        match self {
            Self::Home(home) => *home == Home::Database && settings.database_url.is_some(),
            Self::Sqlite => false,
            Self::Url(_) => true,
        }
    }

    fn backend(&self, settings: &Settings, read_only: bool) -> Result<Arc<dyn StateBackend>, ProjectError> {
        let local = || settings.local_options(read_only).for_backend("database");
        match self {
            Self::Home(home) => settings.named_backend(home.name(), read_only),
            Self::Sqlite => Ok(create_state_backend("database", &local())?),
            Self::Url(url) => {
                let other =
                    settings.database_url.as_ref().is_some_and(|named| server(named.value.expose()) != server(url.expose()));
                let options = if other { local().without_secrets() } else { local() };
                create_state_backend("database", &options.database_url(url.expose()))
                    .map_err(|error| ProjectError::from(error).at("the place to move from"))
            }
        }
    }

    /// Where it is, also where nothing is yet.
    pub(super) fn place(&self, settings: &Settings) -> Result<String, ProjectError> {
        Ok(self.backend(settings, true)?.location())
    }

    /// Opens for reading; `None` if there is nothing yet.
    pub(super) async fn open_existing(
        &self,
        settings: &Settings,
        notices: &mut Vec<String>,
    ) -> Result<Option<Arc<dyn StateBackend>>, ProjectError> {
        if let Self::Home(home) = self {
            let found = settings.open_existing_named(home.name()).await?;
            return Ok(found.map(|(backend, report)| {
                notices.extend(report.notices);
                backend
            }));
        }
        if *self == Self::Sqlite {
            there::database_file(&settings.target.value)?;
        }
        let backend = self.backend(settings, true)?;
        match backend.initialize().await.map_err(ProjectError::from) {
            Ok(report) => {
                notices.extend(report.notices);
                notices.extend(unfinished::notice(&*backend).await);
                Ok(Some(backend))
            }
            Err(error) if error.is_no_state() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn open_writable(
        &self,
        settings: &Settings,
        notices: &mut Vec<String>,
    ) -> Result<Arc<dyn StateBackend>, ProjectError> {
        let backend = self.backend(settings, false)?;
        let OpenReport { notices: told, .. } = backend.initialize().await?;
        notices.extend(told);
        Ok(backend)
    }

    /// Opens a second time, for reading.
    pub(super) async fn open_reader(&self, settings: &Settings) -> Result<Arc<dyn StateBackend>, ProjectError> {
        let backend = self.backend(settings, true)?;
        backend.initialize().await?;
        Ok(backend)
    }
}

impl From<Home> for Origin {
    fn from(home: Home) -> Self {
        Self::Home(home)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Home(home) => home.name(),
            Self::Sqlite => "sqlite",
            Self::Url(_) => "remote database",
        })
    }
}

/// A move of a project's state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Move {
    /// Where from.
    pub from: Origin,
    /// Where to: what the settings will name.
    pub to: Home,
    /// Nobody said where from.
    is_guessed: bool,
}

impl Move {
    /// A move between two places.
    pub fn new(from: impl Into<Origin>, to: Home) -> Self {
        Self { from: from.into(), to, is_guessed: false }
    }

    /// What is wrong with it where both places are the same one, which can be seen before anything is opened.
    #[cfg(feature = "cli")]
    pub(crate) fn of_one_place(&self, settings: &Settings) -> Result<Option<String>, ProjectError> {
        let (from, to) = (self.from.place(settings)?, Origin::from(self.to).place(settings)?);
        Ok((from == to).then(|| one_place(&from)))
    }

    /// Refuses a guess where it may well be wrong: where the settings name a server, the state may have lain in the file, and may have been moved from there into
    /// `state.db` before. Then the file is the older one of the two.
    pub(super) async fn refuse_guess(&self, settings: &Settings) -> Result<(), ProjectError> {
        let is_named = settings.backend.value == self.to.name();
        if !self.is_guessed || self.to != Home::Database || settings.database_url.is_none() || !is_named {
            return Ok(());
        }
        let holds_runs = match Self::runs_in_database(settings).await {
            Ok(holds_runs) => holds_runs,
            // What cannot be read may well hold some.
            Err(error) => !error.is_no_state(),
        };
        if !holds_runs {
            return Ok(());
        }
        let (database, file) = (Origin::Sqlite.place(settings)?, self.from.place(settings)?);
        Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{database} is there too, and nothing tells which one was in use before {}; nothing was changed. Say where the state comes from: `--from sqlite` for \
                 {database}, `--from file` for {file}",
                Origin::from(self.to).place(settings)?,
            ),
        ))
    }

    async fn runs_in_database(settings: &Settings) -> Result<bool, ProjectError> {
        let Some(database) = Origin::Sqlite.open_existing(settings, &mut Vec::new()).await? else { return Ok(false) };
        let runs = database.list_runs(&RunQuery::default().limit(1)).await?.runs;
        database.close().await?;
        Ok(!runs.is_empty())
    }
}

/// From the file to the database, or back.
impl From<Home> for Move {
    fn from(to: Home) -> Self {
        Self { is_guessed: true, ..Self::new(to.other(), to) }
    }
}

/// Whether it is reached in the clear, host and port of a URL, for telling one server from another.
fn server(url: &str) -> (bool, String) {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let scheme = scheme.to_ascii_lowercase();
    let port = match scheme.as_str() {
        "http" | "ws" => 80,
        "postgres" | "postgresql" => 5432,
        _ => 443,
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host).to_ascii_lowercase();
    // Of an address of version 6 the colons stand in brackets.
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    (scheme == "http" || scheme == "ws", if has_port { host } else { format!("{host}:{port}") })
}
