//! What needs a project folder: its settings, moving its state between backends, cleaning up, checking.
//!
//! Each job is a plan, which only reads, and its execution.

mod error;
mod files;
mod settings;
mod settings_file;
mod switch;

pub use error::{ProjectError, ProjectErrorKind};
pub use settings::{Lookup, Secret, Settings, Source, Sourced, process_environment};
pub use settings_file::KEYS;
pub use switch::{Switch, switch_backend};
