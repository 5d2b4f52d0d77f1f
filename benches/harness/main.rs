//! The benchmark harness: every workload of the front door on every backend, against yardsticks that are measured in the same rounds.
//!
//! ```text
//! cargo bench --bench harness                              everything, about half an hour
//! cargo bench --bench harness -- --only durable/sqlite     what has this in its name
//! cargo bench --bench harness -- --quick                   a smoke: few clients, short rounds; the figures mean little
//! ```
//! A round measures the product, then each of its yardsticks, for a fixed time each; so noise hits both. Of a figure the median over the rounds
//! is told, and the ratio is the median of the rounds' ratios. Figures of different machines, or of different calls, are not to be compared.
//! Whether a goal is met is told, never asserted.

#![expect(clippy::print_stdout, reason = "a table for people is what it is for")]

mod goal;
mod measure;
mod null;
mod plan;
mod processes;
mod report;
mod resident;
#[cfg(any(feature = "postgres", feature = "libsql"))]
#[path = "../../tests/support/servers.rs"]
mod servers;
#[cfg(feature = "libsql")]
#[path = "../../tests/support/sqld.rs"]
mod sqld;
mod workload;
mod yardstick;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::measure::{Pace, compare};
use crate::report::Report;

/// What goes wrong ends the harness with its message.
pub(crate) type Fault = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Outcome<T> = Result<T, Fault>;

/// Measures seeknal-state against yardsticks.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only the cases whose name holds this text, such as `durable/file/256` (several: any of them).
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The same, as an option.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Few clients and short rounds: shows that it runs.
    #[arg(long)]
    quick: bool,
    /// How many rounds; 5, or 1 with `--quick`.
    #[arg(long)]
    rounds: Option<usize>,
    /// How long a round lasts for each side, in seconds; 1, or 0.1 with `--quick`.
    #[arg(long)]
    seconds: Option<f64>,
    /// Where the JSON goes; `bench/harness.json` in the target folder by default.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leaves the yardsticks out: for profilers.
    #[arg(long)]
    alone: bool,
    /// Only lists the cases.
    #[arg(long)]
    list: bool,
    /// Works as one of several processes, on the store in this folder: what a case starts by itself.
    #[arg(long, value_name = "FOLDER", hide = true)]
    worker: Option<PathBuf>,
    /// Which of them, and with how many clients.
    #[arg(long, num_args = 2, value_names = ["NUMBER", "CLIENTS"], hide = true)]
    part: Vec<usize>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Outcome<()> {
    if let (Some(folder), [number, clients]) = (&arguments.worker, &*arguments.part) {
        return processes::work(folder, *number, *clients);
    }
    // `cargo test --all-targets` starts benches without any argument, `cargo bench` with `--bench`.
    let quick = arguments.quick || std::env::args_os().len() == 1;
    let seconds = arguments.seconds.unwrap_or(if quick { 0.1 } else { 1.0 });
    let lasting = Duration::try_from_secs_f64(seconds).map_err(|error| format!("--seconds {seconds}: {error}"))?;
    let pace = Pace { rounds: arguments.rounds.unwrap_or(if quick { 1 } else { 5 }).max(1), lasting };
    let wanted: Vec<String> = arguments.names.into_iter().chain(arguments.only).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let mut cases: Vec<_> = plan::cases(quick).into_iter().filter(|case| is_wanted(&case.name())).collect();
    if arguments.alone {
        for case in &mut cases {
            case.against.clear();
        }
    }
    if arguments.list {
        for case in &cases {
            println!("{}", case.name());
        }
        return Ok(());
    }
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let json = arguments.json.unwrap_or_else(|| target.parent().unwrap_or(&target).join("bench").join("harness.json"));
    std::fs::create_dir_all(&target).map_err(|error| format!("{}: {error}", target.display()))?;
    let scratch = tempfile::Builder::new().prefix("harness-").tempdir_in(&target)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;

    let mut report = Report::begin(pace, quick);
    // First of all, while the process has not grown yet.
    if is_wanted("resident") {
        report.resident(resident::measure(&runtime, if quick { 500 } else { 10_000 })?);
    }
    for case in &cases {
        let folder = scratch.path().join(case.name().replace('/', "-"));
        let compared = case.contenders(&runtime, &folder).and_then(|mut sides| {
            let compared = compare(&mut sides, pace)?;
            sides.close()?;
            Ok(compared)
        });
        report.case(case, &compared.map_err(|error| format!("{}: {error}", case.name()))?);
        std::fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    report.end(&json)
}
