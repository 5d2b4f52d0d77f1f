//! Checks the database from end to end, reading only, and names every row that makes no sense.

use super::connection::{Pool, Sql};
use super::rows::Fields;
use super::{read, schema};
use crate::model::RunId;
use crate::store::{StoreError, VerifyReport};

/// Problems named at most of one kind; the rest is counted.
const NAMED: usize = 20;

/// Questions that must find nothing: what they look for, and the rows that are wrong, as text.
const ORPHANS: &[(&str, &str)] = &[
    (
        "node_states of runs that are not there",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states AS n \
         WHERE NOT EXISTS (SELECT 1 FROM runs AS r WHERE r.run_id = n.run_id)",
    ),
    (
        "completed_intervals of nodes that are not there",
        "SELECT DISTINCT 'run ' || run_id || ', node ' || node_id FROM completed_intervals AS i \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = i.run_id AND n.node_id = i.node_id)",
    ),
    (
        "partitions of nodes that are not there",
        "SELECT DISTINCT 'run ' || run_id || ', node ' || node_id FROM partitions AS p \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = p.run_id AND n.node_id = p.node_id)",
    ),
    (
        "completed_intervals that overlap or touch",
        "SELECT 'run ' || run_id || ', node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY run_id, node_id ORDER BY start_at) AS before FROM completed_intervals) AS i \
         WHERE before >= start_at",
    ),
    (
        "coverage that overlaps or touches",
        "SELECT 'node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY node_id ORDER BY start_at) AS before FROM coverage) AS c WHERE before >= start_at",
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
        "SELECT 'run ' || run_id FROM runs WHERE version > (SELECT last_value FROM commit_seq)",
    ),
    (
        "locks with tokens that were never granted",
        "SELECT 'run ' || run_id || ', token ' || token FROM locks WHERE token > (SELECT last_value FROM fencing_token)",
    ),
    (
        "node_states that name another creation of their run",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states AS n JOIN runs AS r USING (run_id) \
         WHERE n.run_created_at <> r.created_at",
    ),
    ("batches without an answer", "SELECT 'batch ' || id FROM batches WHERE answers IS NULL"),
];

/// Checks everything.
pub(super) async fn verify(pool: &Pool) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::new();
    // Each at a moment of its own: none compares with another one, and a large state takes minutes.
    for (what, sql) in ORPHANS {
        let answers = pool.read_through(vec![Sql::new(what, sql, Vec::new())]).await?;
        let rows: Vec<_> = answers.into_iter().flatten().collect();
        let more = rows.len().saturating_sub(NAMED);
        for row in rows.iter().take(NAMED) {
            report.problems.push(format!("{what}: {}", Fields::new(row, what).text(0)?));
        }
        if more > 0 {
            report.problems.push(format!("{what}: and {more} more"));
        }
    }
    report.checked.push(format!("schema version {}", schema::version()));
    report.checked.push("that rows belong together".to_owned());
    let (runs, nodes) = values(pool, &mut report).await?;
    report.checked.push(format!("every value of {runs} runs and {nodes} nodes"));
    Ok(report)
}

/// Reads every value as readers do.
async fn values(pool: &Pool, report: &mut VerifyReport) -> Result<(usize, usize), StoreError> {
    let (mut runs, mut nodes) = (0_usize, 0_usize);
    let answers = pool.read_through(vec![Sql::new("table runs", "SELECT run_id FROM runs ORDER BY run_id", Vec::new())]).await?;
    for row in answers.iter().flatten() {
        runs = runs.saturating_add(1);
        let id = RunId::new(Fields::new(row, "table runs").text(0)?);
        match id.map_err(|error| error.to_string()) {
            Err(problem) => report.problems.push(format!("table runs: {problem}")),
            Ok(id) => {
                let state = report.take(read::run(pool, &id).await)?.flatten();
                nodes = nodes.saturating_add(state.map_or(0, |state| state.node_count()));
            }
        }
    }
    report.take(read::leases(pool).await)?;
    report.take(read::retained(pool).await)?;
    Ok((runs, nodes))
}
