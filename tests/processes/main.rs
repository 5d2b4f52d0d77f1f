//! Several processes on one database: what one commits the others see, none of them loses what another one wrote, and locks outlive no holder.
//!
//! The peers are this test's own binary, started again: see `peer.rs`.
#![cfg(all(feature = "file", feature = "sqlite", unix))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking"
)]

#[macro_use]
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/stalls.rs"]
mod stalls;

mod following;
mod lies;
mod locks;
mod peer;
mod planned;
mod remade;
mod silence;
mod writing;

use std::time::{Duration, Instant};

use seeknal_state::Coordinator;

/// Waits until something is so, and says how long it took; the limit is for a broken build only.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    start.elapsed()
}

/// The number that was written to a node, as far as the snapshot of the run shows it.
fn rows(state: &Coordinator, run: &str, node: &str) -> Option<u64> {
    state.snapshot(run)?.node(node)?.row_count
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
