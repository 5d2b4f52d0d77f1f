//! The coordinator through its front door.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[macro_use]
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/stalls.rs"]
mod stalls;

mod after_half_a_minute;
mod bystanders;
mod crowd;
mod cut_off;
mod deaths;
mod deferred;
mod endings;
mod every_backend;
mod faults;
mod freed;
mod fresh;
mod front_door;
mod leaving;
mod locks;
mod minimal;
mod opening;
mod runtimes;
mod sent;
mod several;
mod unpolled;
