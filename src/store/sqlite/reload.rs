//! A run again, after others wrote to it: only the rows that are newer than what the reader has.

use rusqlite::{Connection, params};

use super::cell;
use super::error::sql_error;
use super::read;
use super::rows::{At, Fields, counter, node_columns};
use crate::model::{NodeId, NodeState, RunId, RunState, Version};
use crate::store::StoreError;

/// Rows that are read one by one at most; beyond it the run is read as a whole.
const MOST: usize = 256;

/// The same where the rows need not be searched for.
const MOST_NOTED: usize = 2_048;

/// Whether every change since was noted.
fn is_noted(conn: &Connection, run: &RunId, since: Version) -> Result<bool, StoreError> {
    conn.prepare_cached("SELECT 1 FROM runs WHERE run_id = ?1 AND changes_from <= ?2")
        .and_then(|mut statement| statement.exists(params![run.as_str(), counter(since.0)]))
        .map_err(|error| sql_error(At::table("changes").run(run), error))
}

/// The rows that a statement finds, without intervals and partitions; `None`: there are more of them than that.
fn rows(
    conn: &Connection,
    sql: &str,
    run: &RunId,
    since: Version,
    most: usize,
) -> Result<Option<Vec<(NodeId, NodeState)>>, StoreError> {
    let place = At::table("node_states").run(run);
    let fail = |error| sql_error(place, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(params![run.as_str(), counter(since.0)]).map_err(fail)?;
    let mut nodes = Vec::new();
    while let Some(row) = rows.next().map_err(fail)? {
        if nodes.len() >= most {
            return Ok(None);
        }
        let fields = Fields::new(row, place);
        let node = NodeId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?;
        let state = Fields::new(row, place.node(&node)).node(1)?;
        nodes.push((node, state));
    }
    Ok(Some(nodes))
}

/// The run as it is now. The caller holds a transaction, and `have` is the run as it was at its version.
pub(super) fn run(conn: &Connection, have: &RunState) -> Result<Option<RunState>, StoreError> {
    let id = have.id();
    let Some(head) = cell::head(conn, id)? else { return Ok(None) };
    let since = have.version();
    if head.version == since && head.created_version == have.created_version() {
        return Ok(Some(have.clone()));
    }
    // Of rows that are gone nothing can be read: what was deleted is missing in the whole.
    if head.created_version != have.created_version() || head.version < since || head.nodes_deleted > since {
        return read::run(conn, id);
    }
    // A node that changed several times is found by the last one.
    let noted = concat!(
        "SELECT node_id, ",
        node_columns!(),
        " FROM changes CROSS JOIN node_states USING (run_id, node_id, version) WHERE run_id = ?1 AND version > ?2"
    );
    let searched = concat!("SELECT node_id, ", node_columns!(), " FROM node_states WHERE run_id = ?1 AND version > ?2");
    let found = if is_noted(conn, id, since)? {
        rows(conn, noted, id, since, MOST_NOTED)?
    } else {
        rows(conn, searched, id, since, MOST)?
    };
    let Some(mut nodes) = found else { return read::run(conn, id) };
    if read::has_coverage(conn, id)? {
        for (node, state) in &mut nodes {
            read::fill(conn, id, node, state)?;
        }
    }
    let header = if head.header_version > since { read::run_row(conn, id)?.map(|row| row.header) } else { None };
    Ok(Some(have.with_rows(head.version, header, nodes)))
}
