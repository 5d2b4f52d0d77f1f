//! What a live run costs in memory, and that a known run which nobody uses has no actor.

use std::sync::Arc;
use std::time::{Duration, Instant};

use seeknal_state::{Coordinator, NodeId};
use tokio::runtime::Runtime;

use crate::Outcome;
use crate::null::NullSink;

/// A live run should take less.
pub(crate) const LIVE_RUN_BYTES: u64 = 20 * 1024;
/// Nodes of a small run.
const NODES: usize = 5;

/// What was found.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) runs: u64,
    /// Growth of the process by one run that is resident: actor, cell, state.
    pub(crate) bytes_a_run: u64,
    /// Actors that are left when nobody has used the runs for a while.
    pub(crate) left: usize,
}

/// Touches so many runs, looks how much the process has grown, and waits until they have gone to sleep.
pub(crate) fn measure(runtime: &Runtime, runs: usize) -> Outcome<Resident> {
    const IDLE: Duration = Duration::from_secs(2);
    runtime.block_on(async {
        let nodes: Vec<NodeId> = (0..NODES).map(|index| NodeId::new(format!("node_{index}"))).collect::<Result<_, _>>()?;
        let backend = Arc::new(NullSink::with_known_runs(nodes));
        let state = Coordinator::builder().idle_after(IDLE).max_resident_runs(runs * 2).open(backend).await?;
        // What is made once is not on the bill.
        state.get_run("warm_up").await?;
        let before = resident_bytes()?;
        for index in 0..runs {
            state.get_run(format!("run_{index}")).await?;
        }
        let grown = resident_bytes()?.saturating_sub(before);
        let until = Instant::now() + IDLE * 5;
        while state.stats().resident_runs > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let left = state.stats().resident_runs;
        state.close().await?;
        let runs = u64::try_from(runs)?;
        Ok(Resident { runs, bytes_a_run: grown / runs.max(1), left })
    })
}

/// Bytes of this process that are in memory. Only Linux tells them so easily.
fn resident_bytes() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| format!("/proc/self/status: {error}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("/proc/self/status: it has no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}
