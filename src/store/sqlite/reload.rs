//! A run again, after others wrote to it: only the rows that are newer than what the reader has.

use std::collections::BTreeMap;

use rusqlite::{Connection, params};

use super::error::sql_error;
use super::rows::{At, Fields, counter, node_columns};
use super::{cell, changes, read};
use crate::model::{NodeId, NodeState, RunId, RunState, Version};
use crate::store::StoreError;

/// Rows with intervals or partitions that are read one by one at most; beyond it the run is read as a whole.
const MOST: usize = 256;

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
    let nodes = match changes::since(conn, id, since)? {
        Some(changed) => noted(conn, id, changed)?,
        None => searched(conn, id, since)?,
    };
    let Some(nodes) = nodes else { return read::run(conn, id) };
    let header = if head.header_version > since { read::run_row(conn, id)?.map(|row| row.header) } else { None };
    Ok(Some(have.with_rows(head.version, header, nodes)))
}

type Rows = Vec<(NodeId, NodeState)>;

/// What was noted, with the rows that the notes leave out.
fn noted(conn: &Connection, run: &RunId, changed: BTreeMap<NodeId, Option<NodeState>>) -> Result<Option<Rows>, StoreError> {
    let covered = changed.values().any(Option::is_none) && read::has_coverage(conn, run)?;
    let mut nodes = Vec::with_capacity(changed.len());
    for (node, state) in changed {
        if let Some(state) = state {
            nodes.push((node, state));
            continue;
        }
        let Some(mut state) = read::node_row(conn, run, &node)? else { return Ok(None) };
        if covered {
            read::fill(conn, run, &node, &mut state)?;
        }
        nodes.push((node, state));
    }
    Ok(Some(nodes))
}

/// The rows that are newer; none: there are too many of them.
fn searched(conn: &Connection, run: &RunId, since: Version) -> Result<Option<Rows>, StoreError> {
    let place = At::table("node_states").run(run);
    let fail = |error| sql_error(place, error);
    let covered = read::has_coverage(conn, run)?;
    let sql = concat!("SELECT node_id, ", node_columns!(), " FROM node_states WHERE run_id = ?1 AND version > ?2");
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(params![run.as_str(), counter(since.0)]).map_err(fail)?;
    let mut nodes = Vec::new();
    while let Some(row) = rows.next().map_err(fail)? {
        if covered && nodes.len() >= MOST {
            return Ok(None);
        }
        let fields = Fields::new(row, place);
        let node = NodeId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?;
        let state = Fields::new(row, place.node(&node)).node(1)?;
        nodes.push((node, state));
    }
    if covered {
        for (node, state) in &mut nodes {
            read::fill(conn, run, node, state)?;
        }
    }
    Ok(Some(nodes))
}
