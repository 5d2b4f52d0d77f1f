//! Claims: on every backend, at the very moment when others do something, and too late.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[macro_use]
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/stalls.rs"]
mod stalls;

mod beside;
mod cancelled;
mod chosen;
mod closing;
mod granted;
mod handed;
mod late;
mod panicked;
mod paused;
mod together;
mod under;
