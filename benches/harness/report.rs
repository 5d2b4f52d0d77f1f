//! The table for people, line by line as it comes, and the JSON for programs.

use std::path::Path;

use serde::Serialize;

use crate::Outcome;
use crate::goal::Goal;
use crate::measure::{Compared, Pace};
use crate::plan::Case;
use crate::resident::{LIVE_RUN_BYTES, Resident};

/// One line of the table.
#[derive(Debug, Serialize)]
struct Line {
    workload: String,
    backend: String,
    clients: usize,
    ops_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    p50_micros: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    p99_micros: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    yardstick: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    yardstick_ops_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// What memory a run takes.
#[derive(Debug, Serialize)]
struct Memory {
    runs: u64,
    bytes_a_live_run: u64,
    goal_bytes: u64,
    met: bool,
    actors_left_when_idle: usize,
}

/// Everything that came out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    version: &'static str,
    quick: bool,
    rounds: usize,
    seconds: f64,
    cores: usize,
    system: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    resident: Option<Memory>,
    lines: Vec<Line>,
}

impl Report {
    pub(crate) fn begin(pace: Pace, quick: bool) -> Self {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        let seconds = pace.lasting.as_secs_f64();
        println!("{} rounds of {seconds} s for each side, {cores} cores{}", pace.rounds, if quick { ", quick" } else { "" });
        let system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            quick,
            rounds: pace.rounds,
            seconds,
            cores,
            system,
            resident: None,
            lines: Vec::new(),
        }
    }

    pub(crate) fn resident(&mut self, found: Resident) {
        let Resident { runs, bytes_a_run, left } = found;
        let met = bytes_a_run < LIVE_RUN_BYTES;
        println!("a live run takes {bytes_a_run} bytes (over {runs} runs; goal below {LIVE_RUN_BYTES}: {})", verdict(met));
        println!("of {runs} known runs that nobody uses {left} have an actor (goal 0: {})", verdict(left == 0));
        self.resident =
            Some(Memory { runs, bytes_a_live_run: bytes_a_run, goal_bytes: LIVE_RUN_BYTES, met, actors_left_when_idle: left });
    }

    pub(crate) fn case(&mut self, case: &Case, found: &Compared) {
        if self.lines.is_empty() {
            println!();
            println!(
                "{:<22} {:<9} {:>7} {:>11} {:>10} {:>10}  {:<27} {:>11} {:>7}  {:>9}",
                "workload", "backend", "clients", "ops/s", "p50", "p99", "yardstick", "its ops/s", "ratio", "goal"
            );
        }
        let line = |against: Option<(String, f64, f64)>, goal: Option<Goal>| {
            let (yardstick, its_rate, ratio) = match against {
                Some((name, rate, ratio)) => (Some(name), Some(rate), Some(ratio)),
                None => (None, None, None),
            };
            Line {
                workload: case.work.to_string(),
                backend: case.backend.to_string(),
                clients: case.clients,
                ops_per_second: found.rate,
                p50_micros: micros(found, 0.5),
                p99_micros: micros(found, 0.99),
                yardstick,
                yardstick_ops_per_second: its_rate,
                ratio,
                goal: goal.map(|goal| goal.to_string()),
                met: goal.map(|goal| goal.is_met(found.rate, ratio)),
            }
        };
        let mut lines = Vec::new();
        if case.goal.is_some() || case.against.is_empty() {
            lines.push(line(None, case.goal));
        }
        for ((yardstick, goal), (rate, ratio)) in case.against.iter().zip(&found.against) {
            lines.push(line(Some((yardstick.to_string(), *rate, *ratio)), *goal));
        }
        for (index, line) in lines.iter().enumerate() {
            print(line, index == 0);
        }
        self.lines.extend(lines);
    }

    pub(crate) fn end(&self, file: &Path) -> Outcome<()> {
        let fail = |error: std::io::Error| format!("{}: {error}", file.display());
        if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(fail)?;
        }
        std::fs::write(file, serde_json::to_string_pretty(self)? + "\n").map_err(fail)?;
        let (met, asked) =
            self.lines.iter().filter_map(|line| line.met).fold((0, 0), |(met, asked), is| (met + u32::from(is), asked + 1));
        println!("\ngoals met: {met} of {asked}; written to {}", file.display());
        Ok(())
    }
}

fn print(line: &Line, first: bool) {
    let (workload, backend, clients, rate, p50, p99) = if first {
        let duration = |micros: Option<f64>| micros.map_or_else(String::new, duration);
        (
            &*line.workload,
            &*line.backend,
            line.clients.to_string(),
            format!("{:.0}", line.ops_per_second),
            duration(line.p50_micros),
            duration(line.p99_micros),
        )
    } else {
        ("", "", String::new(), String::new(), String::new(), String::new())
    };
    let its_rate = line.yardstick_ops_per_second.map_or_else(String::new, |rate| format!("{rate:.0}"));
    let ratio = line.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
    let goal = line.goal.as_deref().unwrap_or("");
    let met = line.met.map_or("", verdict);
    println!(
        "{workload:<22} {backend:<9} {clients:>7} {rate:>11} {p50:>10} {p99:>10}  {:<27} {its_rate:>11} {ratio:>7}  {goal:>9} {met}",
        line.yardstick.as_deref().unwrap_or("")
    );
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "not met" }
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of one operation are far below 2^52")]
fn micros(found: &Compared, quantile: f64) -> Option<f64> {
    (!found.latencies.is_empty()).then(|| found.latencies.value_at_quantile(quantile) as f64 / 1_000.0)
}

fn duration(micros: f64) -> String {
    if micros < 1.0 {
        format!("{:.0} ns", micros * 1_000.0)
    } else if micros < 1_000.0 {
        format!("{micros:.0} us")
    } else {
        format!("{:.1} ms", micros / 1_000.0)
    }
}
