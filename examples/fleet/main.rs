//! A fleet: many worker processes drain one run from one database, while some of them are killed and others are stopped for longer than their
//! claims last.
//!
//! ```text
//! cargo run --release --example fleet                                    # a fresh project, SQLite
//! cargo run --release --example fleet -- --workers 8 --executors 32 --nodes 20000 --work-ms 0 --kill-every-ms 0
//! cargo run --release --features postgres --example fleet -- --database-url postgres://user@host/db
//! ```
//!
//! The boss makes a run of nodes that depend on one another, starts workers (this program again, as processes of their own), and every now and then
//! kills one with SIGKILL and starts another in its place, or stops one with SIGSTOP for longer than its leases last. Workers claim what is
//! ready, work for a moment, and complete it. What a dead or stopped worker held is taken over by others on the next attempt; what a
//! stopped one still had to say when it wakes is refused.
//!
//! In the end every node must be done, by exactly one claim: that is checked against the database and against the workers' ack logs, whose lines
//! are described in `ack.rs`.

mod ack;
mod boss;
#[path = "../parallel_executors/chance.rs"]
mod chance;
mod check;
#[path = "../parallel_executors/dag.rs"]
#[allow(dead_code, reason = "only the graph is needed here")]
mod dag;
#[path = "../parallel_executors/options.rs"]
mod options;
mod progress;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use seeknal_state::{BackendOptions, StateBackend, StoreError, create_state_backend};

use self::options::DatabaseUrl;

/// Where a worker finds the URL of its database: not among its arguments, which everybody on the machine can read.
const URL_VARIABLE: &str = "SEEKNAL_FLEET_DATABASE_URL";

/// Drains a run with many processes, some of which are killed or stopped, and checks that every node was done exactly once.
#[derive(Debug, Parser)]
struct Options {
    /// The project's folder; the state is in its folder `target`, or in the one that its settings name (with `--features project`) [default: a fresh folder]
    #[arg(long, value_name = "DIR", value_parser = options::place)]
    project_path: Option<PathBuf>,
    /// A database server instead of `target/state.db`; give one with a password in the variable SEEKNAL_FLEET_DATABASE_URL instead
    #[arg(long, value_name = "URL")]
    database_url: Option<DatabaseUrl>,
    /// How many worker processes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    workers: usize,
    /// How many nodes the run has
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = at_least_one)]
    nodes: usize,
    /// How often a worker is killed or stopped, in milliseconds; 0: never
    #[arg(long, value_name = "N", default_value_t = 400)]
    kill_every_ms: u64,
    /// How many of them are stopped for longer than their leases last, instead of killed: 0 to 1
    #[arg(long, value_name = "P", default_value_t = 0.25, value_parser = share)]
    pause_share: f64,
    /// Where every worker writes its ack log [default: target/acks of the project]
    #[arg(long, value_name = "DIR", value_parser = options::place)]
    ack_log_dir: Option<PathBuf>,
    /// Print nothing but the summary
    #[arg(long)]
    only_summary: bool,
    #[command(flatten)]
    work: Task,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What workers need to know too.
#[derive(Debug, Clone, Args)]
struct Task {
    /// How many executors a worker has
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    executors: usize,
    /// How long an attempt takes at most, in milliseconds
    #[arg(long, value_name = "MAX", default_value_t = 20)]
    work_ms: u64,
    /// How long a claim outlives its process at most, in milliseconds: 100 to 3600000
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    ttl_ms: u64,
    /// What decides the graph, the durations, and who is killed when
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl Task {
    fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms)
    }
}

#[derive(Debug, Subcommand)]
enum Role {
    /// A worker process, as the boss starts it.
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        target: PathBuf,
        #[arg(long)]
        run: String,
        #[arg(long)]
        name: String,
        #[arg(long)]
        ack_log: PathBuf,
        #[command(flatten)]
        work: Task,
    },
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(count) => Ok(count),
        Err(error) => Err(format!("{error}")),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        Ok(_) => Err("it is a share: 0 to 1".to_owned()),
        Err(error) => Err(format!("{error}")),
    }
}

/// Why it ends early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    State(#[from] seeknal_state::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
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

fn backend(target: &Path, url: Option<&str>) -> Result<Arc<dyn StateBackend>, StoreError> {
    let options = BackendOptions::new().base_path(target);
    create_state_backend("database", &url.iter().fold(options, |options, url| options.database_url(*url)))
}

#[tokio::main]
async fn main() -> ExitCode {
    let options: Options = options::parse();
    let url = options.database_url.clone().map(|url| url.0).or_else(|| std::env::var(URL_VARIABLE).ok());
    let done = match &options.role {
        Some(Role::Worker { target, run, name, ack_log, work }) => {
            worker::run(backend(target, url.as_deref()), run, name, ack_log, work).await.map(|()| true)
        }
        None => boss::run(&options, url.as_deref()).await,
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            use std::io::Write;
            let _nobody_reads = writeln!(std::io::stderr(), "fleet: {failure}");
            ExitCode::FAILURE
        }
    }
}
