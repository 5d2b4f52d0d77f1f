//! Checks the database from end to end, reading only, and names every row that makes no sense.

use rusqlite::Connection;

use super::error::sql_error;
use super::{lease, read, schema};
use crate::model::{RunId, RunQuery};
use crate::store::{StoreError, VerifyReport};

/// Problems named at most of one kind; the rest is counted.
const NAMED: usize = 20;

/// Questions that must find nothing: what they look for, and the rows that are wrong, as text.
const ORPHANS: &[(&str, &str)] = &[
    (
        "node_states of runs that are not there",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states WHERE run_id NOT IN (SELECT run_id FROM runs)",
    ),
    (
        "completed_intervals of nodes that are not there",
        "SELECT DISTINCT 'run ' || run_id || ', node ' || node_id FROM completed_intervals \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = completed_intervals.run_id AND n.node_id = completed_intervals.node_id)",
    ),
    (
        "partitions of nodes that are not there",
        "SELECT DISTINCT 'run ' || run_id || ', node ' || node_id FROM partitions \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = partitions.run_id AND n.node_id = partitions.node_id)",
    ),
    (
        "completed_intervals that overlap or touch",
        "SELECT 'run ' || run_id || ', node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY run_id, node_id ORDER BY start_at) AS before FROM completed_intervals) WHERE before >= start_at",
    ),
    (
        "coverage that overlaps or touches",
        "SELECT 'node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY node_id ORDER BY start_at) AS before FROM coverage) WHERE before >= start_at",
    ),
    (
        "node_states newer than their run",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states AS n JOIN runs AS r USING (run_id) WHERE n.version > r.version",
    ),
    (
        "runs whose header is newer, or whose beginning is later, than the run itself",
        "SELECT 'run ' || run_id FROM runs WHERE header_version > version OR created_version > version OR nodes_deleted_version > version",
    ),
    (
        "runs newer than the store's commit sequence",
        "SELECT 'run ' || run_id FROM runs WHERE version > (SELECT seq FROM meta WHERE id = 1)",
    ),
    (
        "locks with tokens that were never granted",
        "SELECT 'run ' || run_id || ', token ' || token FROM locks WHERE token > (SELECT token FROM meta WHERE id = 1)",
    ),
    (
        "node_states that name another creation of their run",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states AS n JOIN runs AS r USING (run_id) WHERE n.run_created_at <> r.created_at",
    ),
];

/// Checks everything. The caller holds a read transaction.
pub(super) fn verify(conn: &Connection) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::new();
    let fail = |error| sql_error("the database", error);

    let mut found: Vec<String> = Vec::new();
    let mut statement = conn.prepare("PRAGMA integrity_check").map_err(fail)?;
    let mut rows = statement.query([]).map_err(fail)?;
    while let Some(row) = rows.next().map_err(fail)? {
        let line: String = row.get(0).map_err(fail)?;
        if line != "ok" {
            found.push(line);
        }
    }
    report.checked.push("every page and index (integrity_check)".to_owned());
    note(&mut report, "the database is damaged", found);
    report.checked.push(format!("schema version {}", schema::schema_version(conn).map_err(fail)?));

    for (what, sql) in ORPHANS {
        let mut statement = conn.prepare(sql).map_err(fail)?;
        let found = statement.query_map([], |row| row.get(0)).and_then(Iterator::collect).map_err(fail)?;
        note(&mut report, what, found);
    }
    report.checked.push("that rows belong together".to_owned());

    let (runs, nodes) = values(conn, &mut report)?;
    report.checked.push(format!("every value of {runs} runs and {nodes} nodes"));
    Ok(report)
}

fn note(report: &mut VerifyReport, what: &str, found: Vec<String>) {
    let more = found.len().saturating_sub(NAMED);
    report.problems.extend(found.into_iter().take(NAMED).map(|row| format!("{what}: {row}")));
    if more > 0 {
        report.problems.push(format!("{what}: and {more} more"));
    }
}

/// Reads every value as readers do.
fn values(conn: &Connection, report: &mut VerifyReport) -> Result<(usize, usize), StoreError> {
    let fail = |error| sql_error("table runs", error);
    let (mut runs, mut nodes) = (0_usize, 0_usize);
    let mut statement = conn.prepare("SELECT run_id FROM runs").map_err(fail)?;
    let mut rows = statement.query([]).map_err(fail)?;
    while let Some(row) = rows.next().map_err(fail)? {
        runs = runs.saturating_add(1);
        let text: String = row.get(0).map_err(fail)?;
        match RunId::new(&text).map_err(|error| error.to_string()) {
            Err(problem) => report.problems.push(format!("table runs: {problem}")),
            Ok(id) => match read::run(conn, &id) {
                Ok(state) => nodes = nodes.saturating_add(state.map_or(0, |state| state.node_count())),
                Err(error) => report.problems.push(error.to_string()),
            },
        }
    }
    for problem in [
        read::counters(conn).err(),
        lease::running(conn).err(),
        read::retained(conn).err(),
        read::list(conn, &RunQuery::default().limit(1)).err(),
    ] {
        report.problems.extend(problem.map(|error| error.to_string()));
    }
    Ok((runs, nodes))
}
