//! What needs a project folder: its settings, moving its state between backends, cleaning up, checking.
//!
//! Each job is a plan, which only reads, and its execution.

mod again;
mod backup;
mod checks;
pub mod cleanup;
mod copied;
pub mod end;
mod error;
mod exclusive;
mod files;
mod meanwhile;
pub mod migrate;
mod neighbour;
mod origin;
mod pace;
pub mod relocate;
mod settings;
mod settings_file;
pub(crate) mod shown;
mod switch;
mod there;
mod unfinished;
mod verify;

use std::path::Path;
use std::sync::Arc;

use crate::coordinator::Coordinator;
use crate::model::{Clock, SystemClock};

pub use error::{ProjectError, ProjectErrorKind};
pub use origin::{Home, Move, Origin};
pub use settings::{Lookup, Secret, Settings, Source, Sourced, process_environment};
pub use settings_file::KEYS;
pub use switch::{Switch, switch_backend};
pub use verify::{repair, verify};

/// Opens the state of the project that `path` (a folder, or a file in it) belongs to, as the command line would: settings are searched upwards, the
/// environment overrides them.
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let state = seeknal_state::project::open(".").await?;
/// for run in state.list_runs(&seeknal_state::RunQuery::default()).await?.runs {
///     println!("{} {}", run.run_id, run.header.status);
/// }
/// state.close().await?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`Settings::load`] and [`open_with`].
///
/// # Cancel safety
/// Dropping the future closes what was opened so far.
pub async fn open(path: impl AsRef<Path>) -> Result<Coordinator, ProjectError> {
    open_with(&Settings::load(path.as_ref(), &process_environment)?).await
}

/// Opens the state that settings name. Fencing tokens go on behind those that the other backend in the same folder gave out, so that they never go back where
/// the settings do; how far a server gave them out is not known there.
///
/// # Errors
/// Whatever opening the storage finds; [`ProjectErrorKind::Conflict`] if the settings file names another place by now (another backend, server, schema or folder)
/// than when it was read: the state was moved meanwhile.
///
/// # Cancel safety
/// Dropping the future closes what was opened so far.
pub async fn open_with(settings: &Settings) -> Result<Coordinator, ProjectError> {
    let mut builder = Coordinator::builder();
    if let Some(idle) = &settings.idle_run {
        builder = builder.idle_after(idle.value);
    }
    if let Some(ttl) = &settings.lease_ttl {
        builder = builder.lease_ttl(ttl.value);
    }
    let backend = settings.backend(false)?;
    let state = builder.open(Arc::clone(&backend)).await?;
    let ready = match settings.refuse_left() {
        Ok(()) => neighbour::pass_tokens(settings, &*backend, SystemClock.now()).await,
        left => left,
    };
    if let Err(error) = ready {
        let _gives_its_own_error = state.close().await.is_err();
        return Err(error);
    }
    Ok(state)
}
