//! Projects: their settings, and moving what they hold.
#![cfg(feature = "project")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod damaged;
mod fixtures;
mod leftovers;
mod migrate;
mod opening;
#[path = "../projects/mod.rs"]
mod projects;
mod relocate;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod unfinished;
