//! `seeknal state end RUN --as failed|cancelled`.

use serde::Serialize;

use super::args::EndArgs;
use super::exit::CliError;
use super::output::{Output, counted, look_first, no_state, one_line};
use crate::model::{Clock, NodeId, SystemClock};
use crate::project::end::{self, Plan};
use crate::project::{ProjectError, ProjectErrorKind, Settings};
use crate::store::StateBackend;

/// What is printed. Every field is always there.
#[derive(Serialize)]
struct Printed<'a> {
    /// `false`: it had ended in this way already.
    changed: bool,
    #[serde(flatten)]
    plan: &'a Plan,
}

pub(super) async fn run(settings: &Settings, options: &EndArgs, out: &mut Output) -> Result<(), CliError> {
    let Some(looked) = look_first(settings).await? else {
        let message = format!("run {:?} is not there: {}", options.run, no_state(settings));
        return Err(CliError::new(ProjectErrorKind::NotFound, message));
    };
    let seen = end::look(looked.reader(), &options.run, options.end.into()).await;
    let plan = if seen.as_ref().is_ok_and(|seen| !seen.is_done()) {
        write(&*looked.write(settings).await?, options, out).await?
    } else {
        let closed = looked.close().await;
        let seen = seen?;
        closed?;
        seen
    };
    if out.is_json() {
        return out.json(&Printed { changed: !plan.is_done(), plan: &plan });
    }
    let Plan { run_id, was, status, nodes, worker, .. } = &plan;
    if plan.is_done() {
        return out.line(format!("Run {run_id} has ended already: it is {status}. Nothing was changed."));
    }
    let of = worker.as_ref().map(|worker| format!(" (worked on by {worker})")).unwrap_or_default();
    out.line(one_line(&if was == status {
        format!("Run {run_id}{of} had ended before: it is {status}, and stays so.")
    } else {
        format!("Run {run_id} was {was}{of} and is {status} now.")
    }))?;
    if nodes.is_empty() {
        return Ok(());
    }
    let count = counted(u64::try_from(nodes.len()).unwrap_or(u64::MAX), "node");
    let names = nodes.iter().take(20).map(NodeId::as_str).collect::<Vec<_>>().join(", ");
    let more = if nodes.len() > 20 { format!(", and {} more", nodes.len() - 20) } else { String::new() };
    out.line(one_line(&format!("{count} that still ran failed: {names}{more}")))
}

async fn write(backend: &dyn StateBackend, options: &EndArgs, out: &mut Output) -> Result<Plan, CliError> {
    let done = async {
        let plan = end::plan(backend, &options.run, options.end.into(), options.force).await?;
        end::execute(backend, &plan, SystemClock.now()).await.map(|()| plan)
    }
    .await;
    let closed = backend.close().await;
    let plan = done?;
    if plan.is_done() {
        closed?;
        return Ok(plan);
    }
    let what = if plan.was == plan.status { "nodes of the run were ended" } else { "the run was ended" };
    out.set_done(what);
    closed.map_err(|error| ProjectError::from(error).after(what))?;
    Ok(plan)
}
