//! The main job: a pipeline of some hundred nodes, run by dozens of executors at once, each of which says what it does and is told when that is on
//! disk.
//!
//! ```text
//! cargo run --example parallel_executors                                 # a fresh project, file backend
//! cargo run --example parallel_executors -- --backend database --runs 8 --executors 64
//! cargo run --example parallel_executors --features libsql -- --database-url http://127.0.0.1:8080
//! cargo run --example parallel_executors -- --project-path my_project     # runs the nodes of my_project/target/run_state.json
//! ```
//!
//! Executors have random durations, fail and try again; take run locks and node locks, and write under them; complete an interval and a partition
//! with each success, in one transaction; and sometimes commit two nodes, also of two runs, as one. One of them is killed while it holds a lock:
//! another one takes its node over, and what the dead one still had to say is refused. At the end the state is closed, opened again, and
//! compared with what the executors were told.
//!
//! It may be killed at any moment and started again in the same project: what the dead process left running is taken over and finished. With
//! `--ack-log FILE` everybody can check what was acknowledged against what is there; the lines are described in `ack.rs`.

mod ack;
mod board;
mod chance;
mod check;
mod dag;
mod executor;
mod job;
mod marks;
mod options;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use self::options::DatabaseUrl;

/// Runs a pipeline with many executors on one state, and checks that everything they were told is on disk.
#[derive(Debug, Parser)]
struct Options {
    /// The project's folder; the state is in its folder `target`, or in the one that its settings name (with `--features project`) [default: a fresh folder]
    #[arg(long, value_name = "DIR", value_parser = options::place)]
    project_path: Option<PathBuf>,
    /// Where the state is kept: `target/run_state.json` or `target/state.db`
    #[arg(long, value_enum, default_value_t = Backend::File)]
    backend: Backend,
    /// A server that keeps the state instead: `libsql://TOKEN@HOST`, `http://127.0.0.1:8080`, ... as far as this build knows them
    #[arg(long, value_name = "URL", conflicts_with = "backend")]
    database_url: Option<DatabaseUrl>,
    /// How many new runs
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_most::<10_000>)]
    runs: usize,
    /// How many nodes a run has; a state that brings nodes of its own runs those
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = at_most::<100_000>)]
    nodes: usize,
    /// How many executors work at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = executors)]
    executors: usize,
    /// How long an attempt takes at most, in milliseconds
    #[arg(long, value_name = "MAX", default_value_t = 5, value_parser = clap::value_parser!(u64).range(..=3_600_000))]
    work_ms: u64,
    /// What decides the pipeline, the durations and the failures
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// A file that gets one JSON line for every acknowledged write
    #[arg(long, value_name = "FILE", value_parser = options::place)]
    ack_log: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    File,
    Database,
}

impl Options {
    /// The name of the backend that keeps the state.
    fn backend(&self) -> &'static str {
        if self.database_url.is_some() { "database" } else { self.backend.name() }
    }
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Database => "database",
        }
    }
}

fn executors(text: &str) -> Result<usize, String> {
    match at_most::<10_000>(text)? {
        0 => Err("at least one executor is needed".to_owned()),
        executors => Ok(executors),
    }
}

/// More than that is a slip of the finger, and would only fill the memory.
fn at_most<const MOST: usize>(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number <= MOST).ok_or_else(|| format!("write a whole number, {MOST} at most"))
}

/// Why the job ends early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    State(#[from] seeknal_state::Error),
    #[error(transparent)]
    Store(#[from] seeknal_state::StoreError),
    #[error(transparent)]
    Input(#[from] seeknal_state::InputError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("an executor panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
    #[error("{0}")]
    Told(String),
}

impl Failure {
    fn is_lost_lock(&self) -> bool {
        matches!(self, Self::State(seeknal_state::Error::LeaseLost(_)))
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let options: Options = options::parse();
    match job::run(&options).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            report::failure(&failure);
            ExitCode::FAILURE
        }
    }
}
