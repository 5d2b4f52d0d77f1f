//! The state coordinator of data pipelines.
mod lease;
pub mod model;
pub mod store;
pub use model::*;
pub use store::*;
