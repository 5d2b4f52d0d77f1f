//! Reading nodes over all runs, and what outlives runs that were deleted.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::client::Client;
use super::fault::Class;
use super::hrana::{Arg, Stmt};
use super::read::{self, PAGE, TORN, ask, interval, last_of_full, nth, partition};
use super::rows::{Fields, Table, node_columns};
use super::send::{self, Ask};
use crate::model::{
    IntervalSet, LastSuccess, NodeCoverage, NodeId, NodeState, NodeStatus, PartitionKey, Retained, RunHeader, RunId, RunState,
    RunStatus, Version,
};
use crate::store::{StoreError, StoreErrorKind};

/// The state of a node in the newest run that has it.
pub(super) async fn latest_node(client: &Client, id: &NodeId) -> Result<Option<(RunId, NodeState)>, StoreError> {
    let newest = "(SELECT run_id FROM node_states WHERE node_id = ?1 ORDER BY run_created_at DESC, run_id DESC LIMIT 1)";
    let node = || vec![Arg::from(id.as_str())];
    let questions = [
        Stmt::ask(
            "node_states",
            format!(
                concat!("SELECT n.run_id, ", node_columns!(), " FROM node_states AS n WHERE n.node_id = ?1 AND n.run_id = {}"),
                newest
            ),
            node(),
        ),
        Stmt::ask(
            "completed_intervals",
            format!("SELECT start_at, end_at FROM completed_intervals WHERE node_id = ?1 AND run_id = {newest}"),
            node(),
        ),
        Stmt::ask("partitions", format!("SELECT partition FROM partitions WHERE node_id = ?1 AND run_id = {newest}"), node()),
    ];
    let tables = match send::ask(client, Ask::Latest, &questions).await {
        Err(fault) if fault.class == Class::AnswerTooLarge => return latest_in_pages(client, id, newest).await,
        answer => answer.map_err(|fault| fault.into_error(client.place()))?,
    };
    let Some(row) = nth(client, &tables, 0)?.first() else { return Ok(None) };
    let run = row.run_id(0)?;
    let mut state = row.of(&run, Some(id)).from(1).node()?;
    state.intervals = Arc::new(islands(nth(client, &tables, 1)?)?);
    state.partitions = Arc::new(keys(nth(client, &tables, 2)?)?);
    Ok(Some((run, state)))
}

/// The same of a node that is beyond one answer: with its whole run, which comes in pages, and as of one version.
async fn latest_in_pages(client: &Client, id: &NodeId, newest: &str) -> Result<Option<(RunId, NodeState)>, StoreError> {
    for attempt in 0..TORN {
        let question = Stmt::ask("node_states", format!("SELECT run_id FROM {newest}"), vec![id.as_str().into()]);
        let tables = ask(client, &[question]).await?;
        let Some(run) = nth(client, &tables, 0)?.first().map(|row| row.run_id(0)).transpose()? else { return Ok(None) };
        let state = read::run(client, &run).await?;
        if let Some(node) = state.as_ref().and_then(|state| state.node(id.as_str())) {
            return Ok(Some((run, node.clone())));
        }
        // The run or the node was deleted in between.
        send::pause(client, attempt).await;
    }
    let why = format!("{}: node {id:?} comes and goes faster than it can be read; try again", client.place());
    Err(StoreError::not_applied(StoreErrorKind::Busy, why))
}

fn islands(table: &Table) -> Result<IntervalSet, StoreError> {
    table.rows().map(|row| interval(row, 0)).collect()
}

fn keys(table: &Table) -> Result<BTreeSet<PartitionKey>, StoreError> {
    table.rows().map(|row| partition(row, 0)).collect()
}

/// The last success of a node over all runs, also deleted ones.
pub(super) async fn last_success(client: &Client, id: &NodeId) -> Result<Option<LastSuccess>, StoreError> {
    let node = || vec![Arg::from(id.as_str())];
    let questions = [
        Stmt::ask(
            "node_states",
            "SELECT run_id, run_created_at, finished_at, fingerprint, row_count, watermarks FROM node_states \
             WHERE node_id = ?1 AND status = 'success' ORDER BY run_created_at DESC, run_id DESC LIMIT 1",
            node(),
        ),
        Stmt::ask(
            "last_success",
            "SELECT run_id, run_created_at, finished_at, fingerprint, row_count, watermarks FROM last_success WHERE node_id = ?1",
            node(),
        ),
    ];
    let tables = ask(client, &questions).await?;
    let live = nth(client, &tables, 0)?.first().map(success).transpose()?;
    let kept = nth(client, &tables, 1)?.first().map(success).transpose()?;
    Ok(match (live, kept) {
        (Some(live), Some(kept)) => Some(if kept.is_newer_than(&live) { kept } else { live }),
        (live, kept) => live.or(kept),
    })
}

/// The columns run, creation of the run, end, fingerprint, row count, watermarks.
fn success(fields: Fields<'_>) -> Result<LastSuccess, StoreError> {
    let header = RunHeader::new(RunStatus::Success, fields.stamp(1)?);
    let run = RunState::new(fields.run_id(0)?, header, Version::NONE);
    let mut node = NodeState::new(NodeStatus::Success);
    node.finished_at = fields.stamp_or_null(2)?;
    node.fingerprint = fields.fingerprint(3)?;
    node.row_count = fields.number_or_null(4)?;
    node.watermarks = fields.metadata(5)?;
    LastSuccess::of(&run, &node).ok_or_else(|| fields.bad(0, "it is no success"))
}

/// Where completed work is kept, in the order in which it is read.
const COMPLETED: [(&str, &str, &str, &str); 4] = [
    (
        "completed_intervals",
        "i.start_at, i.end_at, i.run_id",
        "node_states AS n JOIN completed_intervals AS i USING (run_id, node_id) WHERE n.node_id = ?1",
        "i.run_id, i.start_at",
    ),
    (
        "partitions",
        "p.partition, p.partition, p.run_id",
        "node_states AS n JOIN partitions AS p USING (run_id, node_id) WHERE n.node_id = ?1",
        "p.run_id, p.partition",
    ),
    // After the runs: what a deletion takes from one between two requests is there by then.
    ("coverage", "start_at, end_at", "coverage WHERE node_id = ?1", "'', start_at"),
    ("coverage_partitions", "partition, partition", "coverage_partitions WHERE node_id = ?1", "'', partition"),
];

/// What a node completed over all runs, also deleted ones: of one moment.
pub(super) async fn coverage(client: &Client, id: &NodeId) -> Result<NodeCoverage, StoreError> {
    let of_table =
        |(place, columns, from, _)| Stmt::ask(place, format!("SELECT {columns} FROM {from}"), vec![Arg::from(id.as_str())]);
    let tables = match send::ask(client, Ask::Latest, &COMPLETED.map(of_table)).await {
        Err(fault) if fault.class == Class::AnswerTooLarge => return coverage_in_pages(client, id).await,
        answer => answer.map_err(|fault| fault.into_error(client.place()))?,
    };
    let mut coverage = NodeCoverage::default();
    for (index, (_, columns, ..)) in COMPLETED.into_iter().enumerate() {
        take(&mut coverage, nth(client, &tables, index)?, columns)?;
    }
    Ok(coverage)
}

/// The same beyond one answer: read until the node's rows are the same before and after. A row that changes has another version, and what outlives a run grows
/// when that run's row goes.
async fn coverage_in_pages(client: &Client, id: &NodeId) -> Result<NodeCoverage, StoreError> {
    let mut before = rows_of(client, id).await?;
    for attempt in 0..TORN {
        let coverage = completed(client, id, &COMPLETED.map(|(place, ..)| place)).await?;
        let after = rows_of(client, id).await?;
        if after == before {
            return Ok(coverage);
        }
        before = after;
        send::pause(client, attempt).await;
    }
    let why = format!("{}: what node {id:?} completed changes faster than it can be read; try again", client.place());
    Err(StoreError::not_applied(StoreErrorKind::Busy, why))
}

/// The runs that have a node, and the version of its row in each.
async fn rows_of(client: &Client, id: &NodeId) -> Result<Vec<(RunId, Version)>, StoreError> {
    let mut found = Vec::new();
    let mut after = String::new();
    let mut limit = PAGE;
    loop {
        let question = |limit: u64| {
            Stmt::ask(
                "node_states",
                format!(
                    "SELECT run_id, version FROM node_states WHERE node_id = ?1 AND run_id > ?2 ORDER BY run_id LIMIT {limit}"
                ),
                vec![id.as_str().into(), after.as_str().into()],
            )
        };
        let table = read::page(client, &mut limit, question).await?;
        for row in table.rows() {
            found.push((row.run_id(0)?, row.version(1)?));
        }
        let Some(last) = last_of_full(&table, limit) else { return Ok(found) };
        last.text(0)?.clone_into(&mut after);
    }
}

/// Takes rows with these columns of [`COMPLETED`].
fn take(coverage: &mut NodeCoverage, table: &Table, columns: &str) -> Result<(), StoreError> {
    let intervals = columns.contains("start_at");
    for row in table.rows() {
        if intervals {
            coverage.intervals.insert(interval(row, 0)?);
        } else {
            coverage.partitions.insert(partition(row, 0)?);
        }
    }
    Ok(())
}

/// What some tables say that a node completed, page by page.
async fn completed(client: &Client, id: &NodeId, tables: &[&str]) -> Result<NodeCoverage, StoreError> {
    let mut coverage = NodeCoverage::default();
    for (place, columns, from, key) in COMPLETED.into_iter().filter(|(place, ..)| tables.contains(place)) {
        let mut after = (String::new(), String::new());
        let mut limit = PAGE;
        loop {
            let question = |limit: u64| {
                Stmt::ask(
                    place,
                    format!("SELECT {columns} FROM {from} AND ({key}) > (?2, ?3) ORDER BY {key} LIMIT {limit}"),
                    vec![id.as_str().into(), after.0.as_str().into(), after.1.as_str().into()],
                )
            };
            let table = read::page(client, &mut limit, question).await?;
            take(&mut coverage, &table, columns)?;
            let Some(last) = last_of_full(&table, limit) else { break };
            let of_run = columns.ends_with("run_id");
            after = (if of_run { last.text(2)?.to_owned() } else { String::new() }, last.text(0)?.to_owned());
        }
    }
    Ok(coverage)
}

/// Every node id that one of some tables has.
async fn ids(client: &Client, tables: &[&'static str]) -> Result<BTreeSet<NodeId>, StoreError> {
    let mut found = BTreeSet::new();
    for place in tables {
        let mut after = String::new();
        let mut limit = PAGE;
        loop {
            let question = |limit: u64| {
                Stmt::ask(
                    place,
                    format!("SELECT DISTINCT node_id FROM {place} WHERE node_id > ?1 ORDER BY node_id LIMIT {limit}"),
                    vec![after.as_str().into()],
                )
            };
            let table = read::page(client, &mut limit, question).await?;
            for row in table.rows() {
                found.insert(row.node_id(0)?);
            }
            let Some(last) = last_of_full(&table, limit) else { break };
            last.text(0)?.clone_into(&mut after);
        }
    }
    Ok(found)
}

/// Every node that a run or what outlives runs knows.
pub(super) async fn node_ids(client: &Client) -> Result<BTreeSet<NodeId>, StoreError> {
    ids(client, &["node_states", "coverage", "coverage_partitions", "last_success"]).await
}

/// Everything that outlives deleted runs.
pub(super) async fn retained(client: &Client) -> Result<Vec<(NodeId, Retained)>, StoreError> {
    let nodes = ids(client, &["coverage", "coverage_partitions", "last_success"]).await?;
    let mut all = Vec::with_capacity(nodes.len());
    for id in nodes {
        let node = || vec![Arg::from(id.as_str())];
        let kept = || {
            Stmt::ask(
                "last_success",
                "SELECT run_id, run_created_at, finished_at, fingerprint, row_count, watermarks FROM last_success WHERE node_id = ?1",
                node(),
            )
        };
        let questions = [
            kept(),
            Stmt::ask("coverage", "SELECT start_at, end_at FROM coverage WHERE node_id = ?1", node()),
            Stmt::ask("coverage_partitions", "SELECT partition FROM coverage_partitions WHERE node_id = ?1", node()),
        ];
        let (coverage, tables) = match send::ask(client, Ask::Latest, &questions).await {
            Err(fault) if fault.class == Class::AnswerTooLarge => {
                let coverage = completed(client, &id, &["coverage", "coverage_partitions"]).await?;
                (coverage, ask(client, &[kept()]).await?)
            }
            answer => {
                let tables = answer.map_err(|fault| fault.into_error(client.place()))?;
                let (intervals, partitions) = (islands(nth(client, &tables, 1)?)?, keys(nth(client, &tables, 2)?)?);
                (NodeCoverage { intervals, partitions }, tables)
            }
        };
        let last_success = nth(client, &tables, 0)?.first().map(success).transpose()?;
        all.push((id, Retained { coverage, last_success }));
    }
    Ok(all)
}
