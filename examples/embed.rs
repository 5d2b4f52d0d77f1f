//! The smallest embedding: open, write, read, close, and what to do when something goes wrong.
//!
//! ```text
//! cargo run --example embed [-- PROJECT]
//! ```

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example tells its user what happens")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use seeknal_state::{BackendOptions, Coordinator, Error, NewRun, NodeUpdate, RunId, RunUpdate, create_state_backend};

#[tokio::main]
async fn main() -> ExitCode {
    let argument = std::env::args_os().nth(1);
    if let Some(option) = argument.as_ref().map(|argument| argument.to_string_lossy()).filter(|text| text.starts_with('-')) {
        let usage = "usage: embed [PROJECT]    the folder of a project; without one, a folder for trying things out";
        if option == "-h" || option == "--help" {
            println!("{usage}");
            return ExitCode::SUCCESS;
        }
        eprintln!("{usage}");
        return ExitCode::from(2);
    }
    let project = argument.map_or_else(|| std::env::temp_dir().join("seeknal-embed"), PathBuf::from);
    match pipeline(project).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn pipeline(project: PathBuf) -> Result<(), Error> {
    // `target/run_state.json`; "database" for `target/state.db`.
    let backend = create_state_backend("file", &BackendOptions::new().base_path(project.join("target")))?;
    let state = Coordinator::open(backend).await?;
    let run = RunId::generate();
    let worked = work(&state, &run).await;
    // Also after a failure: what was acknowledged is brought into the form that others read.
    state.close().await?;
    worked
}

async fn work(state: &Coordinator, run: &RunId) -> Result<(), Error> {
    state.create_run(run, NewRun::running()).await?;
    let Some(lease) = state.acquire_lock(run, Duration::from_secs(5)).await? else {
        println!("{run} is locked by somebody else");
        return Ok(());
    };
    // A handle whose writes are refused once the lock is lost.
    let fenced = state.with_lease(&lease);
    for node in ["extract", "transform", "load"] {
        fenced.set_node_state(run, node, NodeUpdate::running()).await?;
        let update = match step(node) {
            Ok(rows) => NodeUpdate::success().row_count(rows),
            Err(why) => NodeUpdate::failed(why),
        };
        match fenced.set_node_state(run, node, update).await {
            Ok(commit) => println!("{node}: on disk as version {}", commit.version()),
            // Each kind of trouble has its own answer.
            Err(error) if error.is_unknown_outcome() => {
                let is = state.get_node_state(run, node).await?.map(|node| node.status.to_string());
                println!("{node}: it may or may not have been written; it is {is:?}");
            }
            Err(Error::LeaseLost(why)) => {
                println!("{node}: somebody else has the run now: {why}");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    fenced.add_completed_interval(run, "load", ("2024-01-01", "2024-01-02")).await?;
    fenced.update_run(run, RunUpdate::success()).await?;
    let pending = state.pending("load", ("2024-01-01", "2024-01-04")).await?;
    println!("{run} is done; still to load: {}", pending.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    Ok(())
}

/// The pipeline's own work, which may fail.
fn step(node: &str) -> Result<u64, String> {
    u64::try_from(node.len()).map(|length| length * 100).map_err(|error| error.to_string())
}
