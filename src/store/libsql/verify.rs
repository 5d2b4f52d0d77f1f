//! Checks the database from end to end, reading only, and names every row that makes no sense.

use std::time::Duration;

use super::client::Client;
use super::hrana::{Arg, Stmt};
use super::read::{self, nth};
use super::read_nodes;
use super::schema;
use super::send::{self, Ask};
use super::{fault::Class, garbled, lease, list};
use crate::model::RunQuery;
use crate::store::{StoreError, VerifyReport};

/// Problems named at most of one kind; the rest is counted.
const NAMED: usize = 20;

/// How long one of the questions may take that go through all pages or rows.
const THROUGH_ALL: Duration = Duration::from_secs(600);

/// Questions that must find nothing: what they look for, and the rows that are wrong, as text.
const ORPHANS: &[(&str, &str)] = &[
    (
        "node_states of runs that are not there",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states WHERE run_id NOT IN (SELECT run_id FROM runs)",
    ),
    (
        "completed_intervals of nodes that are not there",
        "SELECT DISTINCT 'run ' || i.run_id || ', node ' || i.node_id FROM completed_intervals AS i \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = i.run_id AND n.node_id = i.node_id)",
    ),
    (
        "partitions of nodes that are not there",
        "SELECT DISTINCT 'run ' || p.run_id || ', node ' || p.node_id FROM partitions AS p \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = p.run_id AND n.node_id = p.node_id)",
    ),
    (
        "completed_intervals that overlap or touch",
        "SELECT 'run ' || run_id || ', node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY run_id, node_id ORDER BY start_at) AS before FROM completed_intervals) WHERE before >= start_at",
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

/// Checks everything.
pub(super) async fn verify(client: &Client) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::new();
    // A hosted server may not allow it: what it then checks is its own business.
    let integrity = Stmt::ask("the database", "PRAGMA integrity_check", Vec::new());
    match send::ask_within(client, Ask::Latest, &[integrity], THROUGH_ALL).await {
        Ok(tables) => {
            let lines = nth(client, &tables, 0)?;
            let found = lines.rows().map(|row| row.text(0).map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
            report.checked.push("every page and index (integrity_check)".to_owned());
            note(&mut report, "the database is damaged", found.into_iter().filter(|line| line != "ok").collect());
        }
        Err(fault) if fault.class == Class::Refused => {}
        Err(fault) => return Err(fault.into_error(client.place())),
    }
    if let Some(version) = report.take(schema::version(client).await)? {
        report.checked.push(format!("schema version {version}"));
    }
    for (what, sql) in ORPHANS {
        // Counted by the server, so that a damaged database of any size is answered.
        let some = Stmt::ask("the database", format!("SELECT *, count(*) OVER () FROM ({sql}) LIMIT {NAMED}"), Vec::new());
        let tables = send::ask_within(client, Ask::Latest, &[some], THROUGH_ALL)
            .await
            .map_err(|fault| fault.into_error(client.place()))?;
        let table = nth(client, &tables, 0)?;
        let found: Vec<String> = table.rows().map(|row| row.shown(0)).collect();
        let all = table.first().map_or(Ok(0), |row| row.number(1))?;
        let named = u64::try_from(found.len()).unwrap_or(u64::MAX);
        note(&mut report, what, found);
        if all > named {
            report.problems.push(format!("{what}: and {} more", all - named));
        }
    }
    report.checked.push("that rows belong together".to_owned());
    let (runs, nodes) = values(client, &mut report).await?;
    report.checked.push(format!("every value of {runs} runs and {nodes} nodes"));
    Ok(report)
}

fn note(report: &mut VerifyReport, what: &str, found: Vec<String>) {
    report.problems.extend(found.into_iter().map(|row| format!("{what}: {row}")));
}

/// Reads every value as readers do.
async fn values(client: &Client, report: &mut VerifyReport) -> Result<(usize, usize), StoreError> {
    let (mut runs, mut nodes) = (0_usize, 0_usize);
    let mut after = Arg::from("");
    loop {
        let behind = garbled::key("?1");
        let ids = Stmt::ask(
            "runs",
            format!("SELECT run_id FROM runs WHERE run_id > {behind} ORDER BY run_id LIMIT 1000"),
            vec![after.clone()],
        );
        let tables = send::ask(client, Ask::Latest, &[ids]).await.map_err(|fault| fault.into_error(client.place()))?;
        let page = nth(client, &tables, 0)?;
        for row in page.rows() {
            runs = runs.saturating_add(1);
            after = row.key(0)?;
            match row.run_id(0) {
                Err(error) => report.problems.push(format!("run {:?}: {error}", row.shown(0))),
                Ok(id) => {
                    let state = report.take(read::run(client, &id).await)?.flatten();
                    nodes = nodes.saturating_add(state.map_or(0, |state| state.node_count()));
                }
            }
        }
        if page.len() == 0 {
            break;
        }
    }
    report.take(read::seq(client).await)?;
    report.take(lease::list(client).await)?;
    report.take(read_nodes::retained(client).await)?;
    report.take(list::list(client, &RunQuery::default().limit(1)).await)?;
    Ok((runs, nodes))
}
