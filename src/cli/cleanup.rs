//! `seeknal state cleanup --days N`.

use serde::Serialize;

use super::args::CleanupArgs;
use super::exit::CliError;
use super::output::{Output, counted, one_line, open_for_reading, open_for_writing, table, tell_no_state};
use crate::model::{Clock, RunId, SystemClock, time};
use crate::project::cleanup::{self, Cleaned, Doomed, Plan, Rules, Stays};
use crate::project::shown::shell;
use crate::project::{ProjectError, ProjectErrorKind, Settings};

/// What is printed. Every field is always there.
#[derive(Serialize)]
struct Printed<'a> {
    dry_run: bool,
    cutoff: String,
    /// Runs that were looked out to go.
    delete: &'a [Doomed],
    deleted: u64,
    /// The sum of the next four: of the list's length, and of the counts.
    kept: u64,
    /// Runs in a status of the end, without a stamp of it, of which nodes run.
    nodes_running: &'a [RunId],
    running: u64,
    recent: u64,
    kept_last: u64,
    locked: &'a [RunId],
    without_stamp: &'a [RunId],
    changed_meanwhile: &'a [RunId],
    /// Runs that cannot be read or deleted.
    failed: Vec<&'a Stays>,
}

pub(super) async fn run(settings: &Settings, options: &CleanupArgs, out: &mut Output) -> Result<(), CliError> {
    let rules = Rules::older_than_days(options.days, options.keep_last, SystemClock.now())?;
    let opened = if options.dry_run { open_for_reading(settings).await? } else { open_for_writing(settings).await? };
    let mut plan = Plan::default();
    let mut cleaned = Cleaned::default();
    if let Some(backend) = &opened {
        plan = cleanup::plan(&**backend, rules).await?;
        if options.dry_run {
            cleanup::read_through(&**backend, &mut plan).await?;
        }
        let done = if options.dry_run { Ok(Cleaned::default()) } else { cleanup::execute(backend, &plan).await };
        let closed = backend.close().await;
        cleaned = done?;
        closed.map_err(|error| {
            let error = ProjectError::from(error);
            if cleaned.deleted == 0 { error } else { error.after(format!("{} run(s) were deleted", cleaned.deleted)) }
        })?;
    }
    if cleaned.deleted > 0 {
        out.set_done("runs were deleted");
    }
    let failed: Vec<&Stays> = plan.unreadable.iter().chain(&cleaned.failed).collect();
    let fault = failed.first().map(|first| {
        let more = if failed.len() > 1 { format!(" (and {} more)", failed.len() - 1) } else { String::new() };
        let error =
            ProjectError::new(ProjectErrorKind::Integrity, format!("run {:?} stays{more}: {}", first.run_id, first.reason));
        if cleaned.deleted == 0 { error } else { error.after(format!("{} run(s) were deleted", cleaned.deleted)) }
    });
    if opened.is_none() {
        tell_no_state(settings, out)?;
        if !out.is_json() {
            return Ok(());
        }
    }
    if out.is_json() {
        out.json(&Printed {
            dry_run: options.dry_run,
            cutoff: time::format(rules.cutoff()),
            delete: &plan.delete,
            deleted: cleaned.deleted,
            kept: plan.kept,
            nodes_running: &plan.nodes_running,
            running: plan.running,
            recent: plan.recent,
            kept_last: plan.kept_last,
            locked: &plan.locked,
            without_stamp: &plan.without_stamp,
            changed_meanwhile: &cleaned.changed_meanwhile,
            failed,
        })?;
        return fault.map_or(Ok(()), |fault| Err(fault.into()));
    }
    if options.dry_run && !plan.delete.is_empty() {
        let mut runs = table(&["run", "status", "ended", "nodes"]);
        for run in &plan.delete {
            runs.add_row([
                one_line(run.run_id.as_str()),
                one_line(run.status.as_str()),
                time::format(run.ended_at),
                run.nodes.to_string(),
            ]);
        }
        out.table(&runs)?;
    }
    for (runs, why) in [
        (&plan.locked, "it, or a node of it, is locked"),
        (&plan.without_stamp, "nothing says when it ended"),
        (&cleaned.changed_meanwhile, "it was changed or locked meanwhile"),
    ] {
        for run in runs {
            out.line(format!("kept {run}: {why}"))?;
        }
    }
    for run in &plan.nodes_running {
        out.line(format!("kept {run}: it does not say when it ended, and nodes of it run; if nobody works on it, `seeknal state end {}` ends them", shell(std::path::Path::new(run.as_str()))))?;
    }
    for Stays { run_id, reason, .. } in failed {
        out.line(format!("kept {}: {}", one_line(run_id), one_line(reason)))?;
    }
    if let Some(kept) = kept(&plan) {
        out.line(kept)?;
    }
    let before = time::format(rules.cutoff());
    if options.dry_run {
        let runs = counted(u64::try_from(plan.delete.len()).unwrap_or(u64::MAX), "run");
        out.line(format!("Would delete {runs} that ended before {before}; nothing was changed."))?;
    } else {
        out.line(format!("Deleted {} that ended before {before}.", counted(cleaned.deleted, "run")))?;
    }
    fault.map_or(Ok(()), |fault| Err(fault.into()))
}

/// How many runs stay by the rules, and by which.
fn kept(plan: &Plan) -> Option<String> {
    let nodes_running = u64::try_from(plan.nodes_running.len()).unwrap_or(u64::MAX);
    let reasons = [
        (plan.running, "running or pending"),
        (nodes_running, "with nodes that run"),
        (plan.recent, "not old enough"),
        (plan.kept_last, "by --keep-last"),
    ];
    let reasons: Vec<String> =
        reasons.into_iter().filter(|(count, _)| *count > 0).map(|(count, reason)| format!("{count} {reason}")).collect();
    (!reasons.is_empty()).then(|| format!("Kept {}: {}.", counted(plan.kept, "run"), reasons.join(", ")))
}
