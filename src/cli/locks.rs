//! `seeknal state locks` and `seeknal state unlock TOKEN`.

use serde::Serialize;

use super::exit::CliError;
use super::output::{Looked, Output, look_first, no_state, note, one_line, open_for_reading, table, tell_no_state};
use crate::model::{Batch, Entry, FencingToken, LeaseMutation, LeaseRecord, NodeId, Outcome, ProcessInfo, Refusal, RunId, time};
use crate::project::{ProjectError, ProjectErrorKind, Settings};
use crate::store::moving::is_unfinished;
use crate::store::{LeaseStore, OpenProcess, StateBackend};

/// What is printed. Every field is always there.
#[derive(Default, Serialize)]
struct Listing<'a> {
    leases: Vec<Lease<'a>>,
    processes: Vec<Process<'a>>,
}

/// A lease as it is printed.
#[derive(Serialize)]
struct Lease<'a> {
    run_id: &'a RunId,
    node_id: Option<&'a NodeId>,
    token: FencingToken,
    owner: &'a str,
    host: &'a str,
    pid: u32,
    purpose: Option<&'a str>,
    since: String,
    until: String,
    ttl_ms: u64,
}

impl<'a> Lease<'a> {
    fn of(record: &'a LeaseRecord) -> Self {
        Self {
            run_id: &record.key.run,
            node_id: record.key.node.as_ref(),
            token: record.token,
            owner: &record.owner.name,
            host: &record.owner.process.host,
            pid: record.owner.process.pid,
            purpose: record.purpose.as_deref(),
            since: time::format(record.since),
            until: time::format(record.until),
            ttl_ms: record.ttl_ms,
        }
    }
}

/// A process as it is printed.
#[derive(Serialize)]
struct Process<'a> {
    id: &'a str,
    host: &'a str,
    pid: u32,
    started_at: String,
    /// `null`: it cannot be known from here.
    alive: Option<bool>,
}

impl<'a> Process<'a> {
    fn of(open: &'a OpenProcess) -> Self {
        let ProcessInfo { id, host, pid, started_at, .. } = &open.process;
        Self { id, host, pid: *pid, started_at: time::format(*started_at), alive: open.alive }
    }
}

pub(super) async fn list(settings: &Settings, out: &mut Output) -> Result<(), CliError> {
    let Some(backend) = open_for_reading(settings).await? else {
        tell_no_state(settings, out)?;
        return if out.is_json() { out.json(&Listing::default()) } else { Ok(()) };
    };
    let leases = backend.list_leases().await?;
    let own = backend.process().map(|process| process.id);
    let processes: Vec<OpenProcess> =
        backend.processes().await?.into_iter().filter(|open| Some(&open.process.id) != own.as_ref()).collect();
    backend.close().await?;
    let listing =
        Listing { leases: leases.iter().map(Lease::of).collect(), processes: processes.iter().map(Process::of).collect() };
    if out.is_json() {
        return out.json(&listing);
    }
    if listing.leases.is_empty() {
        out.line("No locks are held.")?;
    } else {
        let mut locks = table(&["token", "on", "owner", "process", "for", "since", "until"]);
        for lease in &leases {
            locks.add_row([
                lease.token.to_string(),
                one_line(&lease.key.to_string()),
                one_line(&lease.owner.name),
                format!("pid {} on {}", lease.owner.process.pid, one_line(&lease.owner.process.host)),
                lease.purpose.as_deref().map_or_else(super::output::dash, one_line),
                time::format(lease.since),
                time::format(lease.until),
            ]);
        }
        out.table(&locks)?;
    }
    out.line("")?;
    if listing.processes.is_empty() {
        return out.line("No other process has the state open.");
    }
    let mut open = table(&["pid", "host", "since", "alive"]);
    for process in &listing.processes {
        let alive = match process.alive {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not known",
        };
        open.add_row([process.pid.to_string(), one_line(process.host), process.started_at.clone(), alive.to_owned()]);
    }
    out.table(&open)
}

/// What is printed of a lock that was taken away.
#[derive(Serialize)]
struct Unlocked<'a> {
    token: FencingToken,
    /// What was known of it; `null` if it ended while it was taken away.
    lease: Option<Lease<'a>>,
}

pub(super) async fn unlock(settings: &Settings, token: u64, out: &mut Output) -> Result<(), CliError> {
    let not_found = |why: String| CliError::new(ProjectErrorKind::NotFound, format!("no lock with token {token} is held: {why}"));
    let looked = look_first(settings).await?;
    let (elsewhere, looked) = match part_elsewhere(settings, FencingToken(token), looked.as_ref()).await {
        Some((elsewhere, part)) => {
            if let Some(looked) = looked {
                looked.close().await?;
            }
            note(&format!("it stands in {}, which is not what the settings name", part.reader().location()));
            (Some(elsewhere), Some(part))
        }
        None => (None, looked),
    };
    let settings = elsewhere.as_ref().unwrap_or(settings);
    let Some(looked) = looked else { return Err(not_found(no_state(settings))) };
    // Where one process alone has the state open for writing, that one's answer is about the locks of who was there before.
    let is_told = !matches!(looked.reader().lease_store(), LeaseStore::Book(_));
    let leases = looked.reader().list_leases().await;
    if is_told && leases.as_ref().is_ok_and(|leases| leases.iter().all(|lease| lease.token != FencingToken(token))) {
        looked.close().await?;
        return Err(not_found(LISTED.to_owned()));
    }
    // A move that was cut off keeps everybody out until it ends, or is given up here.
    let is_part =
        leases.is_ok_and(|leases| leases.iter().any(|lease| lease.token == FencingToken(token) && is_unfinished(lease)));
    let backend = if is_part { looked.write_part(settings).await? } else { looked.write(settings).await? };
    let done = force(&*backend, FencingToken(token), not_found).await;
    let closed = backend.close().await;
    let lease = done?;
    out.set_done("the lock was taken away");
    closed.map_err(|error| ProjectError::from(error).after("the lock was taken away"))?;
    if out.is_json() {
        return out.json(&Unlocked { token: FencingToken(token), lease: lease.as_ref().map(Lease::of) });
    }
    match lease {
        Some(mark) if is_unfinished(&mark) => out.line(format!(
            "The move that was cut off is given up ({}): what is here is the state from now on, and what was not moved is not in it.",
            mark.purpose.as_deref().unwrap_or_default()
        )),
        Some(lease) => out.line(format!(
            "The lock on {} was taken away from {}; what it still writes under token {token} is refused.",
            lease.key, lease.owner
        )),
        None => out.line(format!("The lock with token {token} was taken away.")),
    }
}

/// The database of a project whose settings name another backend, if a move into it was cut off and that is what is meant: until its end the settings name
/// where it comes from. What cannot be looked at there holds no lock that was told.
async fn part_elsewhere(settings: &Settings, token: FencingToken, looked: Option<&Looked>) -> Option<(Settings, Looked)> {
    if settings.backend.value == DATABASE {
        return None;
    }
    if let Some(looked) = looked
        && looked.reader().list_leases().await.ok()?.iter().any(|lease| lease.token == token)
    {
        return None;
    }
    let mut elsewhere = settings.clone();
    DATABASE.clone_into(&mut elsewhere.backend.value);
    let part = look_first(&elsewhere).await.ok()??;
    let leases = part.reader().list_leases().await.unwrap_or_default();
    if leases.iter().any(|lease| lease.token == token && is_unfinished(lease)) {
        return Some((elsewhere, part));
    }
    let _holds_nothing_that_is_meant = part.close().await.is_err();
    None
}

/// The backend into which moves go that leave a mark.
const DATABASE: &str = "database";

/// Where those are that could be meant.
const LISTED: &str = "`seeknal state locks` lists those that are";

async fn force(
    backend: &dyn StateBackend,
    token: FencingToken,
    not_found: impl Fn(String) -> CliError,
) -> Result<Option<LeaseRecord>, CliError> {
    if let LeaseStore::Book(_) = backend.lease_store() {
        // This opening is the only writer now, so that whoever held a lease here is gone, and the lease with it.
        return Err(not_found("the locks of this backend end with the process that holds them, and none is running".to_owned()));
    }
    let known = backend.list_leases().await?.into_iter().find(|lease| lease.token == token);
    let lease = match &known {
        // It stands whatever the clocks say: nobody holds it.
        Some(mark) if is_unfinished(mark) => LeaseMutation::Release { key: mark.key.clone(), token },
        _ => LeaseMutation::Force { token },
    };
    let entry = Entry { leases: vec![lease], ..Entry::default() };
    let outcomes = crate::project::migrate::commit(backend, Batch::new(vec![entry])).await?;
    match outcomes.into_iter().next() {
        Some(Outcome::Refused(Refusal::LeaseGone { .. })) => Err(not_found(LISTED.to_owned())),
        Some(Outcome::Refused(refusal)) => Err(crate::project::ProjectError::from(refusal).into()),
        _ => Ok(known),
    }
}
