//! Listing runs. A page is as long as the server's answers allow, and names what cannot be read.

use std::collections::BTreeMap;

use super::client::Client;
use super::fault::{Class, Fault};
use super::garbled;
use super::hrana::{Arg, Stmt};
use super::read::nth;
use super::rows::{Fields, Table, header_columns, stamp_text};
use super::send::{self, Ask};
use crate::model::{NodeStatus, RunPage, RunQuery, RunStatus, RunSummary, UnreadableRun};
use crate::store::StoreError;

/// One page of runs.
pub(super) async fn list(client: &Client, query: &RunQuery) -> Result<RunPage, StoreError> {
    // One more than asked for: whether there is a next page.
    let (mut limit, mut ahead) = (query.limit, 1);
    let mut after = query.after.as_ref().map(|cursor| [stamp_text(cursor.created_at).into(), cursor.run_id.as_str().into()]);
    let mut unreadable = Vec::new();
    loop {
        let asked = limit.saturating_add(ahead);
        let rows = match list_rows(client, query, after.as_ref(), asked).await {
            // A shorter page is a page, too; and the last one may be empty.
            Err(fault) if fault.class == Class::AnswerTooLarge && limit > 1 => {
                limit = (limit / 4).max(1);
                continue;
            }
            Err(fault) if fault.class == Class::AnswerTooLarge && ahead > 0 => {
                ahead = 0;
                continue;
            }
            answer => answer.map_err(|fault| fault.into_error(client.place()))??,
        };
        // Only a run that can be read tells where the next page begins. Those that cannot may be too many for one answer.
        if let Some(last) = rows.last.filter(|_| rows.found.len() >= asked && rows.found.iter().all(Result::is_err)) {
            unreadable.extend(rows.found.into_iter().filter_map(Result::err));
            after = Some(last);
        } else if let Some(mut page) = RunPage::of_rows(rows.found, asked, limit) {
            unreadable.append(&mut page.unreadable);
            page.unreadable = unreadable;
            return Ok(page);
        }
    }
}

/// Creation and name of a run as they are stored, whether or not they make sense.
type Key = [Arg; 2];

/// The first rows of a page.
#[derive(Default)]
struct Rows {
    /// Runs, and those that cannot be read if they are asked for.
    found: Vec<Result<RunSummary, UnreadableRun>>,
    last: Option<Key>,
}

async fn list_rows(
    client: &Client,
    query: &RunQuery,
    after: Option<&Key>,
    most: usize,
) -> Result<Result<Rows, StoreError>, Fault> {
    let mut filter = String::from("1");
    let mut args: Vec<Arg> = Vec::new();
    let wanted = &query.filter;
    let Some([from, before]) = wanted.created() else { return Ok(Ok(Rows::default())) };
    if !wanted.statuses.is_empty() {
        filter.push_str(" AND status IN (SELECT value FROM json_each(?))");
        let statuses: Vec<&str> = wanted.statuses.iter().map(RunStatus::as_str).collect();
        args.push(serde_json::to_string(&statuses).unwrap_or_default().into());
    }
    if let Some(from) = from {
        filter.push_str(" AND created_at >= ?");
        args.push(stamp_text(from).into());
    }
    if let Some(before) = before {
        filter.push_str(" AND created_at < ?");
        args.push(stamp_text(before).into());
    }
    if let Some(prefix) = wanted.id_prefix.as_deref().filter(|prefix| !prefix.is_empty()) {
        filter.push_str(" AND run_id >= ? AND substr(run_id, 1, ?) = ?");
        args.push(prefix.into());
        args.push(u64::try_from(prefix.chars().count()).unwrap_or(u64::MAX).into());
        args.push(prefix.into());
    }
    if let Some(key) = after {
        let place = |behind: usize| garbled::key(&format!("?{}", args.len().saturating_add(behind)));
        filter.extend([" AND (created_at, run_id) < (", &place(1), ", ", &place(2), ")"]);
        args.extend_from_slice(key);
    }
    args.push(u64::try_from(most).unwrap_or(u64::MAX).into());
    let page = format!("FROM runs AS r WHERE {filter} ORDER BY r.created_at DESC, r.run_id DESC LIMIT ?");
    let questions = [
        Stmt::ask("runs", format!(concat!("SELECT r.run_id, r.version, ", header_columns!(), " {}"), page), args.clone()),
        Stmt::ask(
            "node_states",
            format!(
                "SELECT run_id, status, count(*) FROM node_states WHERE run_id IN (SELECT r.run_id {page}) GROUP BY run_id, status"
            ),
            args,
        ),
    ];
    let tables = send::ask(client, Ask::Latest, &questions).await?;
    Ok(read_rows(client, query, &tables))
}

/// Reads runs and the counts of their nodes.
fn read_rows(client: &Client, query: &RunQuery, tables: &[Table]) -> Result<Rows, StoreError> {
    let mut counts: BTreeMap<&str, Vec<Fields<'_>>> = BTreeMap::new();
    for row in nth(client, tables, 1)?.rows() {
        // Where it is no text, no run of that name can be read.
        if let Ok(run) = row.text(0) {
            counts.entry(run).or_default().push(row);
        }
    }
    let runs = nth(client, tables, 0)?;
    let read = |row: Fields<'_>| match summary(row, &counts) {
        Err(error) if query.names_unreadable && error.is_of_one_entry() => Ok(Err(UnreadableRun::new(row.shown(0), error))),
        read => read.map(Ok),
    };
    let found = runs.rows().map(read).collect::<Result<_, _>>()?;
    // The creation is behind the status.
    let last = runs.rows().last().map(|row| Ok([row.key(3)?, row.key(0)?])).transpose()?;
    Ok(Rows { found, last })
}

fn summary(row: Fields<'_>, counts: &BTreeMap<&str, Vec<Fields<'_>>>) -> Result<RunSummary, StoreError> {
    let id = row.run_id(0)?;
    let (version, header) = (row.of(&id, None).version(1)?, row.of(&id, None).from(2).header()?);
    let mut nodes = BTreeMap::new();
    for row in counts.get(id.as_str()).into_iter().flatten() {
        let row = row.of(&id, None);
        nodes.insert(NodeStatus::parse(row.text(1)?), row.number(2)?);
    }
    Ok(RunSummary::new(id, version, header, nodes))
}
