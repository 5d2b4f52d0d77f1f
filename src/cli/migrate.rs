//! `seeknal migrate-state --backend file|database`.

use std::fmt;
use std::ops::ControlFlow;

use serde::Serialize;

use super::args::{MigrateArgs, Target};
use super::exit::CliError;
use super::output::{Output, counted, note, one_line, table};
use crate::model::{Clock, RunId, RunStatus, SystemClock};
use crate::project::Settings;
use crate::project::migrate::{Counts, Fate};
use crate::project::relocate::{self, Home, Move, Origin, Preview, Report};

/// A preview as it is printed.
#[derive(Serialize)]
struct PrintedPreview<'a> {
    dry_run: bool,
    #[serde(flatten)]
    preview: &'a Preview,
    /// Every run and its fate; not with `--summary`.
    #[serde(skip_serializing_if = "Option::is_none")]
    runs: Option<&'a [SeenRun]>,
}

#[derive(Serialize)]
struct SeenRun {
    run_id: RunId,
    status: RunStatus,
    nodes: u64,
    fate: Fate,
}

/// What was done, as it is printed.
#[derive(Serialize)]
struct PrintedReport<'a> {
    dry_run: bool,
    #[serde(flatten)]
    report: &'a Report,
}

pub(super) async fn run(settings: &Settings, options: &MigrateArgs, out: &mut Output) -> Result<(), CliError> {
    let to = match options.backend {
        Target::File => Home::File,
        Target::Database => Home::Database,
    };
    let what = match &options.from {
        Some(from) => match Origin::parse(from.expose()).map_err(|error| CliError::Usage(format!("--from: {error}")))? {
            Origin::Home(from) if from == to => {
                let to = to.name();
                return Err(CliError::Usage(format!(
                    "--from {to} --backend {to}: that is the same place; say where the state comes from"
                )));
            }
            from => Move::new(from, to),
        },
        None => to.into(),
    };
    if let Some(why) = what.of_one_place(settings)? {
        return Err(CliError::Usage(why));
    }
    if options.no_dry_run { execute(settings, what, out).await } else { preview(settings, what, options, out).await }
}

async fn preview(settings: &Settings, what: Move, options: &MigrateArgs, out: &mut Output) -> Result<(), CliError> {
    let (from, to) = (what.from.clone(), what.to);
    let mut seen = Vec::new();
    let preview = relocate::preview(settings, what, |run, fate| {
        if !options.summary {
            let nodes = run.nodes.values().sum();
            seen.push(SeenRun { run_id: run.run_id.clone(), status: run.header.status.clone(), nodes, fate });
        }
    })
    .await?;
    preview.notices.iter().for_each(|notice| note(notice));
    if out.is_json() {
        out.json(&PrintedPreview { dry_run: true, preview: &preview, runs: (!options.summary).then_some(&*seen) })?;
    } else {
        print_preview(&preview, &seen, &from, to, out)?;
    }
    Ok(preview.refuse_conflicts()?)
}

fn print_preview(preview: &Preview, seen: &[SeenRun], from: &Origin, to: Home, out: &mut Output) -> Result<(), CliError> {
    let place = |place: &str, backend: &dyn fmt::Display, exists: bool| {
        if exists { place.to_owned() } else { format!("{place} ({backend} backend, no state yet)") }
    };
    let (source, target) = (place(&preview.from, from, preview.from_exists), place(&preview.to, &to.name(), preview.to_exists));
    out.line(format!("From {source} to {target}"))?;
    match &preview.plan {
        None => out.line("There is no state to move.")?,
        Some(plan) => {
            if !seen.is_empty() {
                let mut runs = table(&["run", "status", "nodes", "what happens"]);
                for run in seen {
                    let what = match run.fate {
                        Fate::Move => "moves",
                        Fate::Replace => "moves, replaces its copy there",
                        Fate::Equal => "is there already",
                        Fate::Differs => "DIFFERS",
                    };
                    runs.add_row([
                        one_line(run.run_id.as_str()),
                        one_line(run.status.as_str()),
                        run.nodes.to_string(),
                        what.to_owned(),
                    ]);
                }
                out.table(&runs)?;
            }
            out.line(format!("Would move: {}", sums(&plan.moves)))?;
            if plan.equal_runs > 0 {
                out.line(format!("Already there: {}", counted(plan.equal_runs, "run")))?;
            }
        }
    }
    if let Some(plan) = preview.plan.as_ref().filter(|plan| plan.differing_runs > 0) {
        // The error that follows names them, and what mends it.
        let differ = if plan.differing_runs == 1 { "differs" } else { "differ" };
        return out.line(format!(
            "Nothing was changed, and --no-dry-run would be refused as long as {} {differ} in both places",
            counted(plan.differing_runs, "run")
        ));
    }
    if preview.settings_done {
        out.line(format!("{} says state_backend: {} already", preview.settings_file.display(), to.name()))?;
    } else if preview.plan.is_none() && preview.is_unfinished {
        // It is no place to begin anew.
    } else if preview.plan.is_none() {
        let (to, file) = (to.name(), preview.settings_file.display());
        return out.line(format!(
            "Without one the settings are not switched: to begin anew there, write `state_backend: {to}` into {file}"
        ));
    } else {
        out.line(format!("Would then set state_backend: {} in {}", to.name(), preview.settings_file.display()))?;
    }
    match &preview.plan {
        // The note that is printed says how it ends.
        None if preview.is_unfinished => {
            out.line("Nothing was changed, and --no-dry-run would be refused: see the note on the move that was cut off.")
        }
        Some(_) if preview.is_unfinished => out.line("Nothing was changed. To do it: --no-dry-run"),
        Some(plan) if preview.settings_done && plan.moves.is_empty() => out.line("Nothing is left to do."),
        None if preview.settings_done => out.line("Nothing is left to do."),
        _ => out.line("Nothing was changed. To do it: --no-dry-run"),
    }
}

async fn execute(settings: &Settings, what: Move, out: &mut Output) -> Result<(), CliError> {
    let to = what.to;
    let report = relocate::execute(settings, what, SystemClock.now(), |_| ControlFlow::Continue(())).await?;
    out.set_done("the state was moved");
    report.notices.iter().for_each(|notice| note(notice));
    if out.is_json() {
        return out.json(&PrintedReport { dry_run: false, report: &report });
    }
    out.line(format!("From {} to {}", report.from, report.to))?;
    match &report.moved {
        None => out.line("There was no state to move.")?,
        Some(moved) => {
            out.line(format!("Moved: {}", sums(&moved.moved)))?;
            if moved.equal_runs > 0 {
                out.line(format!("Already there: {}", counted(moved.equal_runs, "run")))?;
            }
            out.line(format!("Verified: {}", sums(&moved.verified)))?;
        }
    }
    if let Some(backup) = &report.backup {
        out.line(format!("Backup: {}", backup.display()))?;
    }
    if let Some(older) = &report.older_backup {
        out.line(format!("An older backup is now: {}", older.display()))?;
    }
    if report.switched {
        out.line(format!("{} now says state_backend: {}", report.settings_file.display(), to.name()))?;
    } else {
        out.line(format!("{} said state_backend: {} already", report.settings_file.display(), to.name()))?;
    }
    if !report.rollback.is_empty() {
        out.line(format!("To take it back (`state_backend` is the line for {}):", report.settings_file.display()))?;
    }
    for line in &report.rollback {
        out.line(line)?;
    }
    Ok(())
}

fn sums(counts: &Counts) -> String {
    [
        counted(counts.runs, "run"),
        counted(counts.nodes, "node"),
        counted(counts.rows, "row"),
        counted(counts.intervals, "interval"),
        counted(counts.partitions, "partition"),
        format!("coverage of {}", counted(counts.coverage_nodes, "node")),
    ]
    .join(", ")
}
