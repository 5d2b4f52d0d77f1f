//! What needs a project folder: its settings, moving its state between backends, cleaning up, checking.
//!
//! Each job is a plan, which only reads, and its execution.

pub mod cleanup;
mod error;
mod files;
pub mod migrate;
pub mod relocate;
mod settings;
mod settings_file;
mod switch;
mod verify;

pub use error::{ProjectError, ProjectErrorKind};
pub use settings::{Lookup, Secret, Settings, Source, Sourced, process_environment};
pub use settings_file::KEYS;
pub use switch::{Switch, switch_backend};
pub use verify::{repair, verify};
