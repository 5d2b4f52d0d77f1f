//! The backend that settings name, made and opened.

use std::sync::Arc;

use super::{Settings, Source};
use crate::model::{Clock, SystemClock};
use crate::project::{ProjectError, neighbour, there, unfinished};
use crate::store::{BackendOptions, OpenReport, StateBackend, create_state_backend};

impl Settings {
    /// What a backend of this project is made from.
    pub fn backend_options(&self, read_only: bool) -> BackendOptions {
        let options = self.local_options(read_only);
        match &self.database_url {
            Some(url) => options.database_url(url.value.expose()),
            None => options,
        }
    }

    /// The same without the remote database. Where the environment names a built-in backend instead of a registered one, that one's options are not for it.
    pub(in crate::project) fn local_options(&self, read_only: bool) -> BackendOptions {
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
    /// [`ProjectErrorKind::Input`](crate::project::ProjectErrorKind::Input) if this build cannot make it (the message names the missing feature).
    pub fn backend(&self, read_only: bool) -> Result<Arc<dyn StateBackend>, ProjectError> {
        self.named_backend(&self.backend.value, read_only)
    }

    /// Makes a backend of this project by name; nothing is opened yet.
    pub(in crate::project) fn named_backend(&self, name: &str, read_only: bool) -> Result<Arc<dyn StateBackend>, ProjectError> {
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
    /// [`open_with`](crate::project::open_with).
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
    /// As [`open_backend`](Self::open_backend); [`ProjectErrorKind::Integrity`](crate::project::ProjectErrorKind::Integrity) for a `state.db` that was removed or emptied, as the file beside it tells:
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
    pub(in crate::project) async fn open_existing_named(
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
            Ok(mut report) => {
                unfinished::notice(&*backend).await.into_iter().for_each(|told| report.notice(told));
                Ok(Some((backend, report)))
            }
            Err(error) if error.is_no_state() => Ok(None),
            Err(error) => Err(error),
        }
    }
}
