//! The model: pure, and tried against naive oracles.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod apply;
mod blocked;
mod intervals;
mod ledger;
mod written;
