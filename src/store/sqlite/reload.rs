//! A run again, after others wrote to it: only the rows that are newer than what the reader has.

use std::collections::BTreeSet;

use rusqlite::{Connection, params};

use super::cell;
use super::error::sql_error;
use super::read;
use super::rows::{At, Fields, counter, node_columns};
use crate::model::{NodeId, RunId, RunState, Version};
use crate::store::StoreError;

/// Rows that are read one by one at most; beyond it the run is read as a whole.
const MOST: usize = 256;

/// The same where the rows need not be searched for.
const MOST_NOTED: usize = 2_048;

/// The nodes that changed since, if they were noted without a gap.
fn noted(conn: &Connection, run: &RunId, since: Version) -> Result<Option<BTreeSet<NodeId>>, StoreError> {
    let place = At::table("changes").run(run);
    let fail = |error| sql_error(place, error);
    let mut complete = conn.prepare_cached("SELECT 1 FROM runs WHERE run_id = ?1 AND changes_from <= ?2").map_err(fail)?;
    if !complete.exists(params![run.as_str(), counter(since.0)]).map_err(fail)? {
        return Ok(None);
    }
    let sql = "SELECT node_id FROM changes WHERE run_id = ?1 AND version > ?2";
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(params![run.as_str(), counter(since.0)]).map_err(fail)?;
    let mut nodes = BTreeSet::new();
    while let Some(row) = rows.next().map_err(fail)? {
        let fields = Fields::new(row, place);
        nodes.insert(NodeId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?);
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
    if let Some(noted) = noted(conn, id, since)? {
        if noted.len() > MOST_NOTED {
            return read::run(conn, id);
        }
        let mut nodes = Vec::with_capacity(noted.len());
        for node in noted {
            match read::node(conn, id, &node)? {
                Some(state) => nodes.push((node, state)),
                None => return read::run(conn, id),
            }
        }
        let header = if head.header_version > since { read::run_row(conn, id)?.map(|row| row.header) } else { None };
        return Ok(Some(have.with_rows(head.version, header, nodes)));
    }
    let place = At::table("node_states").run(id);
    let fail = |error| sql_error(place, error);
    let mut nodes = Vec::new();
    {
        let sql = concat!("SELECT node_id, ", node_columns!(), " FROM node_states WHERE run_id = ?1 AND version > ?2");
        let mut statement = conn.prepare_cached(sql).map_err(fail)?;
        let mut rows = statement.query(params![id.as_str(), counter(since.0)]).map_err(fail)?;
        while let Some(row) = rows.next().map_err(fail)? {
            if nodes.len() >= MOST {
                return read::run(conn, id);
            }
            let fields = Fields::new(row, place);
            let node = NodeId::new(fields.text(0)?).map_err(|error| fields.bad(0, error))?;
            let state = Fields::new(row, place.node(&node)).node(1)?;
            nodes.push((node, state));
        }
    }
    for (node, state) in &mut nodes {
        read::fill(conn, id, node, state)?;
    }
    let header = if head.header_version > since { read::run_row(conn, id)?.map(|row| row.header) } else { None };
    Ok(Some(have.with_rows(head.version, header, nodes)))
}
