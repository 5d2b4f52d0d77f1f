//! Everything that is asked. Every answer comes from one read transaction: never torn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio_postgres::Row;

use super::connection::{Param, Pool, Sql};
use super::error::corrupt;
use super::rows::{Fields, counter, header_columns, lease_columns, node_columns};
use crate::model::{
    Interval, IntervalSet, LastSuccess, LeaseRecord, NodeCoverage, NodeId, NodeState, NodeStatus, PartitionKey, Retained,
    RunFilter, RunHeader, RunId, RunState, RunStatus, Version,
};
use crate::store::StoreError;
use crate::store::columns::At;

/// Rows of a run that are read one by one at most when it is reloaded; beyond it the run is read as a whole.
const MOST_NEWER: usize = 256;

/// The last successes of deleted runs, of some nodes.
pub(super) const SUCCESS_SQL: &str = "SELECT node_id, run_id, run_created_at, finished_at, fingerprint, row_count::text, watermarks \
                                      FROM last_success WHERE node_id = ANY($1)";

const RUN_SQL: &str =
    concat!("SELECT version, created_version, ", header_columns!(), ", nodes_deleted_version FROM runs WHERE run_id = $1");

/// As many answers as there were questions.
fn exactly<const N: usize>(answers: Vec<Vec<Row>>) -> Result<[Vec<Row>; N], StoreError> {
    answers.try_into().map_err(|_| corrupt("the answers to a read", "there are not as many as there were questions"))
}

/// The run's own row.
struct RunRow {
    version: Version,
    created_version: Version,
    header: RunHeader,
    nodes_deleted: Version,
}

fn run_row(rows: &[Row], run: &RunId) -> Result<Option<RunRow>, StoreError> {
    let Some(row) = rows.first() else { return Ok(None) };
    let fields = Fields::new(row, At::table("runs").run(run));
    Ok(Some(RunRow {
        version: fields.version(0)?,
        created_version: fields.version(1)?,
        header: fields.header(2)?,
        nodes_deleted: fields.version(10)?,
    }))
}

/// How many questions a run takes, whole or only what is newer.
const QUESTIONS: usize = 4;

/// A whole run.
pub(super) async fn run(pool: &Pool, run: &RunId) -> Result<Option<RunState>, StoreError> {
    whole(run, &exactly(pool.read_much(ask_whole(run)).await?)?)
}

fn ask_whole(run: &RunId) -> Vec<Sql<'_>> {
    let id = || -> Vec<Param<'_>> { vec![Box::new(run.as_str())] };
    vec![
        Sql::new("table runs", RUN_SQL, id()),
        Sql::new(
            "table node_states",
            concat!("SELECT n.node_id, ", node_columns!(), " FROM node_states AS n WHERE n.run_id = $1"),
            id(),
        ),
        Sql::new(
            "table completed_intervals",
            "SELECT node_id, start_at, end_at FROM completed_intervals WHERE run_id = $1",
            id(),
        ),
        Sql::new("table partitions", "SELECT node_id, partition FROM partitions WHERE run_id = $1", id()),
    ]
}

fn whole(run: &RunId, answers: &[Vec<Row>; QUESTIONS]) -> Result<Option<RunState>, StoreError> {
    let [runs, states, intervals, partitions] = answers;
    let Some(row) = run_row(runs, run)? else { return Ok(None) };
    let nodes = nodes(run, states, intervals, partitions)?;
    Ok(Some(RunState::from_parts(run.clone(), row.header, row.version, row.created_version, nodes)))
}

fn nodes(run: &RunId, states: &[Row], intervals: &[Row], partitions: &[Row]) -> Result<BTreeMap<NodeId, NodeState>, StoreError> {
    let mut nodes = BTreeMap::new();
    let place = At::table("node_states").run(run);
    for row in states {
        let id = Fields::new(row, place).node_id(0)?;
        let state = Fields::new(row, place.node(&id)).node(1)?;
        nodes.insert(id, state);
    }
    for row in intervals {
        let fields = Fields::new(row, At::table("completed_intervals").run(run));
        let node = nodes.get_mut(fields.text(0)?).ok_or_else(|| fields.bad(0, "there is no such node"))?;
        Arc::make_mut(&mut node.intervals).insert(interval(&fields, 1)?);
    }
    for row in partitions {
        let fields = Fields::new(row, At::table("partitions").run(run));
        let node = nodes.get_mut(fields.text(0)?).ok_or_else(|| fields.bad(0, "there is no such node"))?;
        Arc::make_mut(&mut node.partitions).insert(partition(&fields, 1)?);
    }
    Ok(nodes)
}

fn interval<P: std::fmt::Display>(fields: &Fields<'_, P>, first: usize) -> Result<Interval, StoreError> {
    Interval::new(fields.stamp(first)?, fields.stamp(first + 1)?).map_err(|error| fields.bad(first, error))
}

fn partition<P: std::fmt::Display>(fields: &Fields<'_, P>, column: usize) -> Result<PartitionKey, StoreError> {
    PartitionKey::new(fields.text(column)?).map_err(|error| fields.bad(column, error))
}

fn islands(rows: &[Row], table: &'static str) -> Result<IntervalSet, StoreError> {
    rows.iter().map(|row| interval(&Fields::new(row, At::table(table)), 0)).collect()
}

fn keys(rows: &[Row], table: &'static str) -> Result<BTreeSet<PartitionKey>, StoreError> {
    rows.iter().map(|row| partition(&Fields::new(row, At::table(table)), 0)).collect()
}

/// The run as it is now, from what a reader has of it: only the rows that are newer, where that is enough.
pub(super) async fn reload(pool: &Pool, have: &RunState) -> Result<Option<RunState>, StoreError> {
    match newer(have, &exactly(pool.read(ask_newer(have)).await?)?)? {
        Newer::Run(state) => Ok(state),
        Newer::NotEnough => run(pool, have.id()).await,
    }
}

/// Several runs at one moment, each from what a reader has of it.
pub(super) async fn reload_all(pool: &Pool, runs: &[(RunId, Option<RunState>)]) -> Result<Vec<Option<RunState>>, StoreError> {
    let questions = runs.iter().flat_map(|(id, have)| have.as_ref().map_or_else(|| ask_whole(id), ask_newer));
    let mut states = Vec::with_capacity(runs.len());
    for ((id, have), answers) in runs.iter().zip(apart(pool.read_much(questions.collect()).await?)?) {
        match have {
            None => states.push(whole(id, &answers)?),
            Some(have) => match newer(have, &answers)? {
                Newer::Run(state) => states.push(state),
                // Read apart it would be of another moment than the others.
                Newer::NotEnough => return whole_all(pool, runs).await,
            },
        }
    }
    Ok(states)
}

async fn whole_all(pool: &Pool, runs: &[(RunId, Option<RunState>)]) -> Result<Vec<Option<RunState>>, StoreError> {
    let answers = pool.read_much(runs.iter().flat_map(|(id, _)| ask_whole(id)).collect()).await?;
    runs.iter().zip(apart(answers)?).map(|((id, _), answers)| whole(id, &answers)).collect()
}

/// The answers of several runs, run by run.
fn apart(answers: Vec<Vec<Row>>) -> Result<Vec<[Vec<Row>; QUESTIONS]>, StoreError> {
    let mut answers = answers.into_iter();
    let mut runs = Vec::with_capacity(answers.len() / QUESTIONS);
    while answers.len() > 0 {
        runs.push(exactly(answers.by_ref().take(QUESTIONS).collect())?);
    }
    Ok(runs)
}

enum Newer {
    Run(Option<RunState>),
    /// It takes the whole run.
    NotEnough,
}

fn ask_newer(have: &RunState) -> Vec<Sql<'_>> {
    let id = have.id();
    let newer = || -> Vec<Param<'_>> { vec![Box::new(id.as_str()), Box::new(counter(have.version().0))] };
    let limit = i64::try_from(MOST_NEWER.saturating_add(1)).unwrap_or(i64::MAX);
    let mut limited = newer();
    limited.push(Box::new(limit));
    vec![
        Sql::new("table runs", RUN_SQL, vec![Box::new(id.as_str())]),
        Sql::new(
            "table node_states",
            concat!(
                "SELECT n.node_id, ",
                node_columns!(),
                " FROM node_states AS n WHERE n.run_id = $1 AND n.version > $2 LIMIT $3::bigint"
            ),
            limited,
        ),
        Sql::new(
            "table completed_intervals",
            "SELECT i.node_id, i.start_at, i.end_at FROM node_states AS n JOIN completed_intervals AS i USING (run_id, node_id) \
             WHERE n.run_id = $1 AND n.version > $2",
            newer(),
        ),
        Sql::new(
            "table partitions",
            "SELECT p.node_id, p.partition FROM node_states AS n JOIN partitions AS p USING (run_id, node_id) \
             WHERE n.run_id = $1 AND n.version > $2",
            newer(),
        ),
    ]
}

fn newer(have: &RunState, answers: &[Vec<Row>; QUESTIONS]) -> Result<Newer, StoreError> {
    let (id, [runs, states, intervals, partitions]) = (have.id(), answers);
    let Some(row) = run_row(runs, id)? else { return Ok(Newer::Run(None)) };
    let since = have.version();
    // Of rows that are gone nothing can be read: what was deleted is missing in the whole.
    let whole = row.created_version != have.created_version() || row.version < since || row.nodes_deleted > since;
    if whole || states.len() > MOST_NEWER {
        return Ok(Newer::NotEnough);
    }
    let header = (row.header.version > since).then_some(row.header);
    Ok(Newer::Run(Some(have.with_rows(row.version, header, nodes(id, states, intervals, partitions)?))))
}

/// The versions of runs, in the order asked.
pub(super) async fn versions(pool: &Pool, runs: &[RunId]) -> Result<Vec<Option<Version>>, StoreError> {
    let ids: Vec<&str> = runs.iter().map(RunId::as_str).collect();
    let answers = pool
        .read(vec![Sql::new("table runs", "SELECT run_id, version FROM runs WHERE run_id = ANY($1)", vec![Box::new(ids)])])
        .await?;
    let mut found: BTreeMap<&str, Version> = BTreeMap::new();
    for row in answers.iter().flatten() {
        let fields = Fields::new(row, At::table("runs"));
        found.insert(fields.text(0)?, fields.version(1)?);
    }
    Ok(runs.iter().map(|run| found.get(run.as_str()).copied()).collect())
}

/// The versions of the newest runs.
pub(super) async fn newest_versions(pool: &Pool, most: usize) -> Result<Vec<(RunId, Version)>, StoreError> {
    let sql = "SELECT run_id, version FROM runs ORDER BY created_at DESC, run_id DESC LIMIT $1";
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let answers = pool.read(vec![Sql::new("table runs", sql, vec![Box::new(most)])]).await?;
    let mut found = Vec::new();
    for row in answers.iter().flatten() {
        let fields = Fields::new(row, At::table("runs"));
        // A row that makes no sense is told to whoever asks for that run.
        if let (Ok(Ok(run)), Ok(version)) = (fields.text(0).map(RunId::new), fields.version(1)) {
            found.push((run, version));
        }
    }
    Ok(found)
}

/// When the newest run was created.
pub(super) async fn newest_creation(pool: &Pool, before: Option<DateTime<Utc>>) -> Result<Option<DateTime<Utc>>, StoreError> {
    let filter = before.map_or_else(RunFilter::all, |before| RunFilter::all().created_before(before));
    let Some([_, before]) = filter.created() else { return Ok(None) };
    let sql = "SELECT created_at FROM runs WHERE created_at < coalesce($1::timestamptz, 'infinity') \
               ORDER BY created_at DESC, run_id DESC LIMIT 1";
    let answers = pool.read(vec![Sql::new("table runs", sql, vec![Box::new(before)])]).await?;
    answers.iter().flatten().next().map(|row| Fields::new(row, At::table("runs")).stamp(0)).transpose()
}

/// The fencing token that was given out last, or one that was not.
pub(super) async fn highest_token(pool: &Pool) -> Result<u64, StoreError> {
    const PLACE: &str = "the fencing tokens";
    let answers = pool.read(vec![Sql::new(PLACE, "SELECT last_value FROM fencing_token", Vec::new())]).await?;
    answers.iter().flatten().next().map_or(Ok(0), |row| Fields::new(row, PLACE).counter(0))
}

/// All leases that are held and not over, in the order in which they were granted.
pub(super) async fn leases(pool: &Pool) -> Result<Vec<LeaseRecord>, StoreError> {
    let answers = pool
        .read(vec![Sql::new(
            "table locks",
            concat!("SELECT ", lease_columns!(), " FROM locks WHERE expires_at > clock_timestamp() ORDER BY token"),
            Vec::new(),
        )])
        .await?;
    answers.iter().flatten().map(|row| Fields::new(row, "table locks").lease(0)).collect()
}

/// The newest state of a node, with its run, its intervals and partitions: all runs, or only those where it succeeded.
fn newest(node: &NodeId, success: bool) -> Vec<Sql<'_>> {
    macro_rules! newest {
        ($select:expr, $join:expr, $and:expr) => {
            concat!(
                "WITH found AS (SELECT run_id, node_id FROM node_states WHERE node_id = $1",
                $and,
                " ORDER BY run_created_at DESC, run_id DESC LIMIT 1) SELECT ",
                $select,
                " FROM found JOIN ",
                $join
            )
        };
    }
    macro_rules! three {
        ($and:expr) => {
            [
                newest!(
                    concat!("n.run_id, n.run_created_at, ", node_columns!()),
                    "node_states AS n USING (run_id, node_id)",
                    $and
                ),
                newest!("i.start_at, i.end_at", "completed_intervals AS i USING (run_id, node_id)", $and),
                newest!("p.partition", "partitions AS p USING (run_id, node_id)", $and),
            ]
        };
    }
    let [states, intervals, partitions] = if success { three!(" AND status = 'success'") } else { three!("") };
    let id = || -> Vec<Param<'_>> { vec![Box::new(node.as_str())] };
    vec![
        Sql::new("table node_states", states, id()),
        Sql::new("table completed_intervals", intervals, id()),
        Sql::new("table partitions", partitions, id()),
    ]
}

fn newest_state(
    node: &NodeId,
    states: &[Row],
    intervals: &[Row],
    partitions: &[Row],
) -> Result<Option<(RunId, DateTime<Utc>, NodeState)>, StoreError> {
    let Some(row) = states.first() else { return Ok(None) };
    let fields = Fields::new(row, At::table("node_states").node(node));
    let mut state = fields.node(2)?;
    state.intervals = Arc::new(islands(intervals, "completed_intervals")?);
    state.partitions = Arc::new(keys(partitions, "partitions")?);
    Ok(Some((fields.run_id(0)?, fields.stamp(1)?, state)))
}

/// The state of a node in the newest run that has it.
pub(super) async fn latest_node(pool: &Pool, node: &NodeId) -> Result<Option<(RunId, NodeState)>, StoreError> {
    let [states, intervals, partitions] = exactly(pool.read(newest(node, false)).await?)?;
    Ok(newest_state(node, &states, &intervals, &partitions)?.map(|(run, _, state)| (run, state)))
}

fn success_in(run: RunId, created_at: DateTime<Utc>, node: &NodeState) -> Option<LastSuccess> {
    let header = RunHeader::new(RunStatus::Success, created_at);
    LastSuccess::of(&RunState::new(run, header, Version::NONE), node)
}

/// The last success of a node over all runs, also deleted ones.
pub(super) async fn last_success(pool: &Pool, node: &NodeId) -> Result<Option<LastSuccess>, StoreError> {
    let mut questions = newest(node, true);
    questions.push(Sql::new("table last_success", SUCCESS_SQL, vec![Box::new(vec![node.as_str()])]));
    let [states, intervals, partitions, kept] = exactly(pool.read(questions).await?)?;
    let live = newest_state(node, &states, &intervals, &partitions)?
        .and_then(|(run, created_at, state)| success_in(run, created_at, &state));
    let kept = kept.first().map(success).transpose()?.map(|(_, kept)| kept);
    Ok(match (live, kept) {
        (Some(live), Some(kept)) => Some(if kept.is_newer_than(&live) { kept } else { live }),
        (live, kept) => live.or(kept),
    })
}

/// A row of [`SUCCESS_SQL`].
pub(super) fn success(row: &Row) -> Result<(NodeId, LastSuccess), StoreError> {
    let node = Fields::new(row, At::table("last_success")).node_id(0)?;
    let fields = Fields::new(row, At::table("last_success").node(&node));
    let mut state = NodeState::new(NodeStatus::Success);
    state.finished_at = fields.stamp_or_null(3)?;
    state.fingerprint = fields.fingerprint(4)?;
    state.row_count = fields.number_or_null(5)?;
    state.watermarks = fields.metadata(6)?;
    let success = success_in(fields.run_id(1)?, fields.stamp(2)?, &state);
    let success = success.ok_or_else(|| fields.bad(0, "it is no success"))?;
    Ok((node, success))
}

/// What a node completed over all runs, also deleted ones.
pub(super) async fn coverage(pool: &Pool, node: &NodeId) -> Result<NodeCoverage, StoreError> {
    let id = || -> Vec<Param<'_>> { vec![Box::new(node.as_str())] };
    let answers = pool
        .read_much(vec![
            Sql::new("table coverage", "SELECT start_at, end_at FROM coverage WHERE node_id = $1", id()),
            Sql::new("table coverage_partitions", "SELECT partition FROM coverage_partitions WHERE node_id = $1", id()),
            Sql::new(
                "table completed_intervals",
                "SELECT i.start_at, i.end_at FROM node_states AS n JOIN completed_intervals AS i USING (run_id, node_id) \
                 WHERE n.node_id = $1",
                id(),
            ),
            Sql::new(
                "table partitions",
                "SELECT DISTINCT p.partition FROM node_states AS n JOIN partitions AS p USING (run_id, node_id) WHERE n.node_id = $1",
                id(),
            ),
        ])
        .await?;
    let [kept, kept_keys, live, live_keys] = exactly(answers)?;
    let mut coverage =
        NodeCoverage { intervals: islands(&kept, "coverage")?, partitions: keys(&kept_keys, "coverage_partitions")? };
    coverage.intervals.extend(islands(&live, "completed_intervals")?.iter());
    coverage.partitions.extend(keys(&live_keys, "partitions")?);
    Ok(coverage)
}

/// Every name of a node in a table, from one to the next by the table's index: the server looks at no other rows of it, and sorts nothing.
macro_rules! names {
    ($table:literal) => {
        concat!(
            "(WITH RECURSIVE names AS ((SELECT node_id FROM ",
            $table,
            " ORDER BY node_id LIMIT 1) UNION ALL SELECT (SELECT t.node_id FROM ",
            $table,
            " AS t WHERE t.node_id > names.node_id ORDER BY t.node_id LIMIT 1) FROM names WHERE names.node_id IS NOT NULL) \
             SELECT node_id FROM names WHERE node_id IS NOT NULL)"
        )
    };
}

/// Every node that a run or what outlives runs knows.
pub(super) async fn node_ids(pool: &Pool) -> Result<BTreeSet<NodeId>, StoreError> {
    let sql = concat!(
        names!("node_states"),
        " UNION ",
        names!("coverage"),
        " UNION ",
        names!("coverage_partitions"),
        " UNION SELECT node_id FROM last_success"
    );
    let answers = pool.read_patiently(vec![Sql::new("the nodes' names", sql, Vec::new())]).await?;
    answers.iter().flatten().map(|row| Fields::new(row, "the nodes' names").node_id(0)).collect()
}

/// Everything that outlives deleted runs.
pub(super) async fn retained(pool: &Pool) -> Result<Vec<(NodeId, Retained)>, StoreError> {
    let answers = pool
        .read_much(vec![
            Sql::new("table coverage", "SELECT node_id, start_at, end_at FROM coverage", Vec::new()),
            Sql::new("table coverage_partitions", "SELECT node_id, partition FROM coverage_partitions", Vec::new()),
            Sql::new(
                "table last_success",
                "SELECT node_id, run_id, run_created_at, finished_at, fingerprint, row_count::text, watermarks FROM last_success",
                Vec::new(),
            ),
        ])
        .await?;
    let [covered, partitions, successes] = exactly(answers)?;
    let mut all: BTreeMap<NodeId, Retained> = BTreeMap::new();
    for row in &covered {
        let fields = Fields::new(row, At::table("coverage"));
        let found = interval(&fields, 1)?;
        all.entry(fields.node_id(0)?).or_default().coverage.intervals.insert(found);
    }
    for row in &partitions {
        let fields = Fields::new(row, At::table("coverage_partitions"));
        let found = partition(&fields, 1)?;
        all.entry(fields.node_id(0)?).or_default().coverage.partitions.insert(found);
    }
    for row in &successes {
        let (node, found) = success(row)?;
        all.entry(node).or_default().last_success = Some(found);
    }
    Ok(all.into_iter().collect())
}
