//! The libSQL backend on real servers: the conformance suite, tokens, certificates, networks that lie, servers that die, several openings.
#![cfg(feature = "libsql")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "../support/batches.rs"]
#[allow(dead_code, reason = "a few of them")]
mod batches;
mod certain;
mod clocks;
#[cfg(feature = "conformance")]
mod conformance;
mod credentials;
#[path = "../support/exactly.rs"]
mod exactly;
mod exactly_once;
mod full;
mod leftovers;
mod opening;
mod openings;
#[path = "../support/proxy.rs"]
mod proxy;
#[path = "../support/servers.rs"]
mod servers;
#[path = "../support/sqld.rs"]
mod sqld;
#[path = "../support/unreadable.rs"]
mod telling;
mod unreadable;
