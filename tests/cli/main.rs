//! The `seeknal` command.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod cleanup;
#[path = "../support/folder.rs"]
mod folder;
mod foreign;
mod killed;
mod moves;
#[path = "../projects/mod.rs"]
mod projects;
mod refusals;
mod state;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/trace.rs"]
mod trace;
mod unreachable;
