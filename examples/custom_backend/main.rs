//! A backend of one's own: registered under a name, opened by it, and used like every other one.
//!
//! ```text
//! cargo run --example custom_backend [-- FILE]
//! ```
//!
//! The backend itself is in `json_lines.rs`; the project's conformance suite runs on it as it does on the built-in ones.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example tells its user what happens")]

mod json_lines;

use std::error::Error;
use std::path::PathBuf;

use seeknal_state::{
    BackendOptions, Coordinator, NewRun, NodeUpdate, RunId, RunUpdate, StateBackendFactory, create_state_backend,
};

const USAGE: &str = "usage: custom_backend [FILE]    the file of the state; without one, a temporary file";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Once, early: from then on the name works wherever a backend is named, also as `state_backend: custom` in a project's settings.
    StateBackendFactory::register("custom", json_lines::make)?;

    let argument = std::env::args_os().nth(1);
    match argument.as_ref().and_then(|argument| argument.to_str()) {
        Some("-h" | "--help") => {
            println!("{USAGE}");
            return Ok(());
        }
        Some(option) if option.starts_with('-') => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
        _ => {}
    }
    let fresh;
    let path = if let Some(path) = argument {
        PathBuf::from(path)
    } else {
        fresh = tempfile::tempdir()?;
        fresh.path().join("state.jsonl")
    };
    let options = BackendOptions::new().set("path", path.to_string_lossy());

    let state = Coordinator::open(create_state_backend("custom", &options)?).await?;
    let run = RunId::generate();
    state.create_run(&run, NewRun::running()).await?;
    let mut tx = state.transaction();
    tx.set_node_state(&run, "extract", NodeUpdate::success().row_count(1_000));
    tx.add_completed_interval(&run, "extract", ("2024-01-01", "2024-01-02"));
    tx.set_node_state(&run, "load", NodeUpdate::running());
    let commit = tx.commit().await?;
    println!("committed {} at version {}", run, commit.version());
    state.update_run(&run, RunUpdate::success()).await?;
    state.close().await?;

    let state = Coordinator::open(create_state_backend("custom", &options)?).await?;
    for notice in &state.open_report().notices {
        println!("notice: {notice}");
    }
    let found = state.get_run(&run).await?.ok_or("the run is gone")?;
    println!("found {} again: {}, version {}, {} nodes", run, found.header().status, found.version(), found.node_count());
    println!(
        "extract completed {}",
        state.get_completed_intervals(&run, "extract").await?.iter().map(|i| i.to_string()).collect::<String>()
    );
    state.close().await?;
    println!("log: {}", path.display());
    Ok(())
}
