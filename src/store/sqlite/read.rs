//! Reading runs, nodes and what outlives them. Every answer comes from one read transaction: never torn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params, params_from_iter};

use super::error::{corrupt, sql_error};
use super::rows::{At, Fields, Stamp, header_columns, node_columns};
use crate::model::{
    Interval, IntervalSet, LastSuccess, NodeCoverage, NodeId, NodeState, NodeStatus, PartitionKey, Retained, RunHeader, RunId,
    RunPage, RunQuery, RunState, RunSummary, UnreadableRun, Version,
};
use crate::store::StoreError;

/// The run's own row.
pub(super) struct RunRow {
    pub(super) version: Version,
    pub(super) created_version: Version,
    pub(super) header: RunHeader,
}

/// Does something inside one read transaction.
pub(super) fn in_snapshot<T>(
    conn: &mut Connection,
    place: &str,
    read: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let tx = conn.transaction().map_err(|error| sql_error(place, error))?;
    read(&tx)
    // Dropping the transaction ends it; a reader has nothing to commit.
}

/// The row of a run.
pub(super) fn run_row(conn: &Connection, run: &RunId) -> Result<Option<RunRow>, StoreError> {
    let place = At::table("runs").run(run);
    let fail = |error| sql_error(place, error);
    let sql = concat!("SELECT version, created_version, ", header_columns!(), " FROM runs WHERE run_id = ?1");
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([run.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let fields = Fields::new(row, place);
    Ok(Some(RunRow { version: fields.version(0)?, created_version: fields.version(1)?, header: fields.header(2)? }))
}

/// One node of a run, whole.
pub(super) fn node(conn: &Connection, run: &RunId, node: &NodeId) -> Result<Option<NodeState>, StoreError> {
    let Some(mut state) = node_row(conn, run, node)? else { return Ok(None) };
    fill(conn, run, node, &mut state)?;
    Ok(Some(state))
}

/// One node of a run, without its intervals and partitions.
pub(super) fn node_row(conn: &Connection, run: &RunId, node: &NodeId) -> Result<Option<NodeState>, StoreError> {
    let place = At::table("node_states").run(run).node(node);
    let fail = |error| sql_error(place, error);
    let sql = concat!("SELECT ", node_columns!(), " FROM node_states WHERE run_id = ?1 AND node_id = ?2");
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([run.as_str(), node.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    Fields::new(row, place).node(0).map(Some)
}

/// Whether any node of a run has intervals or partitions.
pub(super) fn has_coverage(conn: &Connection, run: &RunId) -> Result<bool, StoreError> {
    let sql = "SELECT 1 WHERE EXISTS (SELECT 1 FROM completed_intervals WHERE run_id = ?1) \
               OR EXISTS (SELECT 1 FROM partitions WHERE run_id = ?1)";
    conn.prepare_cached(sql)
        .and_then(|mut statement| statement.exists([run.as_str()]))
        .map_err(|error| sql_error(At::table("completed_intervals").run(run), error))
}

/// How many intervals and partitions a run has, of each counted up to so many.
pub(super) fn count_completed(conn: &Connection, run: &RunId, most: u32) -> Result<u64, StoreError> {
    let place = At::table("completed_intervals").run(run);
    let sql = "SELECT (SELECT count(*) FROM (SELECT 1 FROM completed_intervals WHERE run_id = ?1 LIMIT ?2)) \
               + (SELECT count(*) FROM (SELECT 1 FROM partitions WHERE run_id = ?1 LIMIT ?2))";
    conn.prepare_cached(sql)
        .and_then(|mut statement| statement.query_row(params![run.as_str(), most], |row| Ok(Fields::new(row, place).number(0))))
        .map_err(|error| sql_error(place, error))?
}

/// Reads the intervals and partitions of a node into it.
pub(super) fn fill(conn: &Connection, run: &RunId, node: &NodeId, state: &mut NodeState) -> Result<(), StoreError> {
    let intervals = islands(
        conn,
        "SELECT start_at, end_at FROM completed_intervals WHERE run_id = ?1 AND node_id = ?2",
        &[run.as_str(), node.as_str()],
        At::table("completed_intervals").run(run).node(node),
    )?;
    let partitions = keys(
        conn,
        "SELECT partition FROM partitions WHERE run_id = ?1 AND node_id = ?2",
        &[run.as_str(), node.as_str()],
        At::table("partitions").run(run).node(node),
    )?;
    state.intervals = Arc::new(intervals);
    state.partitions = Arc::new(partitions);
    Ok(())
}

/// The intervals that a statement finds: columns start and end.
pub(super) fn islands(conn: &Connection, sql: &str, keys: &[&str], place: At<'_>) -> Result<IntervalSet, StoreError> {
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(params_from_iter(keys)).map_err(fail)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(fail)? {
        found.push(interval(&Fields::new(row, place), 0)?);
    }
    Ok(found.into_iter().collect())
}

pub(super) fn interval<P: std::fmt::Display>(fields: &Fields<'_, P>, first: usize) -> Result<Interval, StoreError> {
    Interval::new(fields.stamp(first)?, fields.stamp(first + 1)?).map_err(|error| fields.bad(first, error))
}

/// The partition keys that a statement finds.
pub(super) fn keys(conn: &Connection, sql: &str, keys: &[&str], place: At<'_>) -> Result<BTreeSet<PartitionKey>, StoreError> {
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(params_from_iter(keys)).map_err(fail)?;
    let mut found = BTreeSet::new();
    while let Some(row) = rows.next().map_err(fail)? {
        let fields = Fields::new(row, place);
        found.insert(PartitionKey::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?);
    }
    Ok(found)
}

/// All nodes of a run, with their intervals and partitions. The caller holds a transaction.
pub(super) fn nodes(conn: &Connection, run: &RunId) -> Result<BTreeMap<NodeId, NodeState>, StoreError> {
    let mut nodes = BTreeMap::new();
    {
        let place = At::table("node_states").run(run);
        let fail = |error| sql_error(place, error);
        let sql = concat!("SELECT node_id, ", node_columns!(), " FROM node_states WHERE run_id = ?1 ORDER BY node_id");
        let mut statement = conn.prepare_cached(sql).map_err(fail)?;
        let mut rows = statement.query([run.as_str()]).map_err(fail)?;
        while let Some(row) = rows.next().map_err(fail)? {
            let fields = Fields::new(row, place);
            let id = node_id(&fields)?;
            let state = Fields::new(row, place.node(&id)).node(1)?;
            nodes.insert(id, state);
        }
    }
    by_node(
        conn,
        "completed_intervals",
        "SELECT node_id, start_at, end_at FROM completed_intervals WHERE run_id = ?1 ORDER BY node_id",
        run,
        |id, fields| {
            let found = interval(fields, 1)?;
            let node = nodes.get_mut(id).ok_or_else(|| fields.bad(0, "there is no such node"))?;
            Arc::make_mut(&mut node.intervals).insert(found);
            Ok(())
        },
    )?;
    by_node(
        conn,
        "partitions",
        "SELECT node_id, partition FROM partitions WHERE run_id = ?1 ORDER BY node_id",
        run,
        |id, fields| {
            let found = PartitionKey::new(fields.text(1)?).map_err(|error| fields.bad(1, error))?;
            let node = nodes.get_mut(id).ok_or_else(|| fields.bad(0, "there is no such node"))?;
            Arc::make_mut(&mut node.partitions).insert(found);
            Ok(())
        },
    )?;
    Ok(nodes)
}

fn by_node(
    conn: &Connection,
    table: &'static str,
    sql: &str,
    run: &RunId,
    mut take: impl FnMut(&str, &Fields<'_, At<'_>>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let place = At::table(table).run(run);
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([run.as_str()]).map_err(fail)?;
    while let Some(row) = rows.next().map_err(fail)? {
        let fields = Fields::new(row, place);
        take(fields.text(0)?, &fields)?;
    }
    Ok(())
}

fn node_id<P: std::fmt::Display>(fields: &Fields<'_, P>) -> Result<NodeId, StoreError> {
    NodeId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))
}

/// A whole run. The caller holds a transaction.
pub(super) fn run(conn: &Connection, run: &RunId) -> Result<Option<RunState>, StoreError> {
    let Some(row) = run_row(conn, run)? else { return Ok(None) };
    let nodes = nodes(conn, run)?;
    Ok(Some(RunState::from_parts(run.clone(), row.header, row.version, row.created_version, nodes)))
}

/// The version of a run.
pub(super) fn run_version(conn: &Connection, run: &RunId) -> Result<Option<Version>, StoreError> {
    let place = At::table("runs").run(run);
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached("SELECT version FROM runs WHERE run_id = ?1").map_err(fail)?;
    let mut rows = statement.query([run.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    Fields::new(row, place).version(0).map(Some)
}

/// The versions of the newest runs.
pub(super) fn newest_versions(conn: &Connection, most: usize) -> Result<Vec<(RunId, Version)>, StoreError> {
    let place = At::table("runs");
    let fail = |error| sql_error(place, error);
    let sql = "SELECT run_id, version FROM runs ORDER BY created_at DESC, run_id DESC LIMIT ?1";
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([i64::try_from(most).unwrap_or(i64::MAX)]).map_err(fail)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(fail)? {
        let fields = Fields::new(row, place);
        // A row that makes no sense is told to whoever asks for that run.
        if let (Ok(Ok(run)), Ok(version)) = (fields.text(0).map(RunId::new), fields.version(1)) {
            found.push((run, version));
        }
    }
    Ok(found)
}

/// One page of runs. The caller holds a transaction.
pub(super) fn list(conn: &Connection, query: &RunQuery) -> Result<RunPage, StoreError> {
    // One more than asked for: whether there is a next page.
    let mut asked = query.limit.saturating_add(1);
    loop {
        if let Some(page) = RunPage::of_rows(list_rows(conn, query, asked)?, asked, query.limit) {
            return Ok(page);
        }
        asked = asked.saturating_mul(4);
    }
}

/// The first rows of a page: runs, and those that cannot be read if they are asked for.
fn list_rows(conn: &Connection, query: &RunQuery, most: usize) -> Result<Vec<Result<RunSummary, UnreadableRun>>, StoreError> {
    let place = At::table("runs");
    let fail = |error| sql_error(place, error);
    let mut sql = String::from(concat!("SELECT run_id, version, ", header_columns!(), " FROM runs WHERE 1"));
    let mut values: Vec<Value> = Vec::new();
    let filter = &query.filter;
    let Some([from, before]) = filter.created() else { return Ok(Vec::new()) };
    if !filter.statuses.is_empty() {
        sql.push_str(" AND status IN (");
        for (index, status) in filter.statuses.iter().enumerate() {
            sql.push_str(if index == 0 { "?" } else { ", ?" });
            values.push(Value::Text(status.as_str().to_owned()));
        }
        sql.push(')');
    }
    if let Some(from) = from {
        sql.push_str(" AND created_at >= ?");
        values.push(Value::Text(Stamp::of(from).as_str().to_owned()));
    }
    if let Some(before) = before {
        sql.push_str(" AND created_at < ?");
        values.push(Value::Text(Stamp::of(before).as_str().to_owned()));
    }
    if let Some(prefix) = filter.id_prefix.as_deref().filter(|prefix| !prefix.is_empty()) {
        sql.push_str(" AND run_id >= ? AND substr(run_id, 1, ?) = ?");
        values.push(Value::Text(prefix.to_owned()));
        values.push(Value::Integer(i64::try_from(prefix.chars().count()).unwrap_or(i64::MAX)));
        values.push(Value::Text(prefix.to_owned()));
    }
    if let Some(cursor) = &query.after {
        sql.push_str(" AND (created_at, run_id) < (?, ?)");
        values.push(Value::Text(Stamp::of(cursor.created_at).as_str().to_owned()));
        values.push(Value::Text(cursor.run_id.as_str().to_owned()));
    }
    sql.push_str(" ORDER BY created_at DESC, run_id DESC LIMIT ?");
    values.push(Value::Integer(i64::try_from(most).unwrap_or(i64::MAX)));

    let mut statement = conn.prepare_cached(&sql).map_err(fail)?;
    let mut rows = statement.query(params_from_iter(values)).map_err(fail)?;
    let (mut found, mut readable) = (Vec::new(), 0);
    while let Some(row) = rows.next().map_err(fail)? {
        // Of the one behind the page no nodes are counted.
        found.push(match summary(conn, row, readable < query.limit) {
            Err(error) if query.names_unreadable && error.is_of_one_entry() => {
                Err(UnreadableRun::new(Fields::new(row, place).shown(0), error))
            }
            read => {
                readable += 1;
                Ok(read?)
            }
        });
    }
    Ok(found)
}

fn summary(conn: &Connection, row: &Row<'_>, counts: bool) -> Result<RunSummary, StoreError> {
    let fields = Fields::new(row, At::table("runs"));
    let id = RunId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?;
    let fields = Fields::new(row, At::table("runs").run(&id));
    let (version, header) = (fields.version(1)?, fields.header(2)?);
    let nodes = if counts { status_counts(conn, &id)? } else { BTreeMap::new() };
    Ok(RunSummary::new(id, version, header, nodes))
}

fn status_counts(conn: &Connection, run: &RunId) -> Result<BTreeMap<NodeStatus, u64>, StoreError> {
    let place = At::table("node_states").run(run);
    let fail = |error| sql_error(place, error);
    let mut statement =
        conn.prepare_cached("SELECT status, count(*) FROM node_states WHERE run_id = ?1 GROUP BY status").map_err(fail)?;
    let mut rows = statement.query([run.as_str()]).map_err(fail)?;
    let mut counts = BTreeMap::new();
    while let Some(row) = rows.next().map_err(fail)? {
        let fields = Fields::new(row, place);
        counts.insert(NodeStatus::parse(fields.text(0)?), fields.number(1)?);
    }
    Ok(counts)
}

/// The state of a node in the newest run that has it. The caller holds a transaction.
pub(super) fn latest_node(conn: &Connection, id: &NodeId) -> Result<Option<(RunId, NodeState)>, StoreError> {
    let sql = "SELECT run_id FROM node_states WHERE node_id = ?1 ORDER BY run_created_at DESC, run_id DESC LIMIT 1";
    let Some(run) = run_of_node(conn, sql, id)? else { return Ok(None) };
    Ok(node(conn, &run, id)?.map(|state| (run, state)))
}

fn run_of_node(conn: &Connection, sql: &str, id: &NodeId) -> Result<Option<RunId>, StoreError> {
    let place = At::table("node_states").node(id);
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([id.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let fields = Fields::new(row, place);
    RunId::new(fields.text(0)?).map(Some).map_err(|error| fields.bad(0, error))
}

/// The last success of a node over all runs, also deleted ones. The caller holds a transaction.
pub(super) fn last_success(conn: &Connection, id: &NodeId) -> Result<Option<LastSuccess>, StoreError> {
    let sql = "SELECT run_id FROM node_states WHERE node_id = ?1 AND status = 'success' ORDER BY run_created_at DESC, run_id DESC LIMIT 1";
    let mut live = None;
    if let Some(run) = run_of_node(conn, sql, id)?
        && let (Some(row), Some(state)) = (run_row(conn, &run)?, node(conn, &run, id)?)
    {
        let run = RunState::from_parts(run, row.header, row.version, row.created_version, []);
        live = LastSuccess::of(&run, &state);
    }
    let kept = kept_success(conn, id)?;
    Ok(match (live, kept) {
        (Some(live), Some(kept)) => Some(if kept.is_newer_than(&live) { kept } else { live }),
        (live, kept) => live.or(kept),
    })
}

/// The last success of a node in runs that were deleted.
pub(super) fn kept_success(conn: &Connection, id: &NodeId) -> Result<Option<LastSuccess>, StoreError> {
    let place = At::table("last_success").node(id);
    let fail = |error| sql_error(place, error);
    let sql =
        "SELECT run_id, run_created_at, finished_at, fingerprint, row_count, watermarks FROM last_success WHERE node_id = ?1";
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([id.as_str()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let fields = Fields::new(row, place);
    let run = RunId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?;
    let mut success = success_of(&run, &fields)?;
    success.finished_at = fields.stamp_or_null(2)?;
    Ok(Some(success))
}

fn success_of<P: std::fmt::Display>(run: &RunId, fields: &Fields<'_, P>) -> Result<LastSuccess, StoreError> {
    let header = RunHeader::new(crate::model::RunStatus::Success, fields.stamp(1)?);
    let run = RunState::new(run.clone(), header, Version::NONE);
    let mut node = NodeState::new(NodeStatus::Success);
    node.fingerprint = fields.fingerprint(3)?;
    node.row_count = fields.number_or_null(4)?;
    node.watermarks = fields.metadata(5)?;
    LastSuccess::of(&run, &node).ok_or_else(|| fields.bad(0, "it is no success"))
}

/// The intervals and partitions of deleted runs of a node.
pub(super) fn kept_coverage(conn: &Connection, id: &NodeId) -> Result<NodeCoverage, StoreError> {
    Ok(NodeCoverage {
        intervals: islands(
            conn,
            "SELECT start_at, end_at FROM coverage WHERE node_id = ?1",
            &[id.as_str()],
            At::table("coverage").node(id),
        )?,
        partitions: keys(
            conn,
            "SELECT partition FROM coverage_partitions WHERE node_id = ?1",
            &[id.as_str()],
            At::table("coverage_partitions").node(id),
        )?,
    })
}

/// What a node completed over all runs, also deleted ones. The caller holds a transaction.
pub(super) fn coverage(conn: &Connection, id: &NodeId) -> Result<NodeCoverage, StoreError> {
    let mut coverage = kept_coverage(conn, id)?;
    let live = islands(
        conn,
        "SELECT i.start_at, i.end_at FROM node_states AS n JOIN completed_intervals AS i USING (run_id, node_id) WHERE n.node_id = ?1",
        &[id.as_str()],
        At::table("completed_intervals").node(id),
    )?;
    let live_keys = keys(
        conn,
        "SELECT DISTINCT p.partition FROM node_states AS n JOIN partitions AS p USING (run_id, node_id) WHERE n.node_id = ?1",
        &[id.as_str()],
        At::table("partitions").node(id),
    )?;
    coverage.intervals.extend(live.iter());
    coverage.partitions.extend(live_keys);
    Ok(coverage)
}

/// The node ids that one of the statements finds.
fn ids(conn: &Connection, sql: &str, place: At<'_>, into: &mut BTreeSet<NodeId>) -> Result<(), StoreError> {
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query([]).map_err(fail)?;
    while let Some(row) = rows.next().map_err(fail)? {
        into.insert(node_id(&Fields::new(row, place))?);
    }
    Ok(())
}

/// Every node that a run or what outlives runs knows. The caller holds a transaction.
pub(super) fn node_ids(conn: &Connection) -> Result<BTreeSet<NodeId>, StoreError> {
    let mut found = kept_ids(conn)?;
    ids(conn, "SELECT DISTINCT node_id FROM node_states", At::table("node_states"), &mut found)?;
    Ok(found)
}

fn kept_ids(conn: &Connection) -> Result<BTreeSet<NodeId>, StoreError> {
    let mut found = BTreeSet::new();
    ids(conn, "SELECT DISTINCT node_id FROM coverage", At::table("coverage"), &mut found)?;
    ids(conn, "SELECT DISTINCT node_id FROM coverage_partitions", At::table("coverage_partitions"), &mut found)?;
    ids(conn, "SELECT node_id FROM last_success", At::table("last_success"), &mut found)?;
    Ok(found)
}

/// Everything that outlives deleted runs. The caller holds a transaction.
pub(super) fn retained(conn: &Connection) -> Result<Vec<(NodeId, Retained)>, StoreError> {
    kept_ids(conn)?
        .into_iter()
        .map(|id| {
            let retained = Retained { coverage: kept_coverage(conn, &id)?, last_success: kept_success(conn, &id)? };
            Ok((id, retained))
        })
        .collect()
}

/// The counters that never go back: commit sequence and fencing token.
pub(super) fn counters(conn: &Connection) -> Result<(u64, u64), StoreError> {
    let place = At::table("meta");
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached("SELECT seq, token FROM meta WHERE id = 1").map_err(fail)?;
    statement
        .query_row(params![], |row| {
            let fields = Fields::new(row, place);
            Ok(fields.number(0).and_then(|seq| Ok((seq, fields.number(1)?))))
        })
        .optional()
        .map_err(fail)?
        .ok_or_else(|| corrupt(place, "its one row is gone"))?
}
