//! The state coordinator of data pipelines.
pub mod model;
mod persist;
pub mod store;
pub use model::*;
pub use store::*;
