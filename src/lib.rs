//! The state coordinator of data pipelines.
pub mod model;
pub mod store;
pub use model::*;
pub use store::*;
