//! The state coordinator of data pipelines.

#[cfg(feature = "cli")]
pub mod cli;
pub mod coordinator;
mod error;
mod lease;
pub mod model;
mod persist;
pub mod project;
mod run;
pub mod store;

pub use coordinator::*;
pub use error::Error;
pub use lease::{Lease, LeaseError, LockOptions, LostReason};
pub use model::*;
pub use run::DeferredLoss;
pub use store::*;
