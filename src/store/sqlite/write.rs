//! Puts rows down: one write for every row that a transaction changed, in the order of their keys.

use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{CachedStatement, Connection, ToSql, params};

use super::cell::{Cell, PendingNode};
use super::changes::{self, Noting};
use super::error::sql_error;
use super::rows::{At, Number, Stamp, counter, fingerprint_text, list_text, metadata_text};
use crate::model::{NodeId, NodeState, RawJson, RunHeader, RunId, Version};
use crate::store::StoreError;
use crate::store::rewrite::{Rewrite, rewrites};

/// What is on the right of `=` in an update is the row as it was: the version before this writing.
const PUT_VERSION: &str = "UPDATE runs SET version = ?2, nodes_deleted_version = ?3, \
     change_sets_from = CASE WHEN ?4 THEN coalesce(change_sets_from, version) END WHERE run_id = ?1";

// run_created_at never changes, so that an update leaves the index alone.
const UPDATE_NODE: &str = "UPDATE node_states SET status = ?3, attempt = ?4, started_at = ?5, finished_at = ?6, duration_ms = ?7, row_count = ?8, \
     fingerprint = ?9, error = ?10, watermarks = ?11, metadata = ?12, extra = ?13, version = ?14, \
     depends_on = ?15, max_attempts = ?16, attempts = ?17, worker = ?18, token = ?19 WHERE run_id = ?1 AND node_id = ?2";

const INSERT_NODE: &str = "INSERT INTO node_states (run_id, node_id, status, attempt, started_at, finished_at, duration_ms, row_count, fingerprint, error, \
     watermarks, metadata, extra, version, depends_on, max_attempts, attempts, worker, token, run_created_at) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)";

/// The statements that most transactions run again and again: looked up once.
pub(super) struct Statements<'c> {
    conn: &'c Connection,
    /// What is noted for other processes.
    noting: Noting,
    put_version: Option<CachedStatement<'c>>,
    update_node: Option<UpdateNode<'c>>,
}

impl<'c> Statements<'c> {
    pub(super) fn new(conn: &'c Connection, noting: Noting) -> Self {
        Self { conn, noting, put_version: None, update_node: None }
    }

    fn put_version(&mut self) -> rusqlite::Result<&mut CachedStatement<'c>> {
        match &mut self.put_version {
            Some(statement) => Ok(statement),
            place => Ok(place.insert(self.conn.prepare_cached(PUT_VERSION)?)),
        }
    }

    fn update_node(&mut self) -> rusqlite::Result<&mut UpdateNode<'c>> {
        match &mut self.update_node {
            Some(update) => Ok(update),
            place => Ok(place.insert(UpdateNode { statement: self.conn.prepare_cached(UPDATE_NODE)?, nulls: 0 })),
        }
    }
}

/// The update of a node's row. Of most nodes most columns are NULL: what is bound so is not bound again for the next one.
struct UpdateNode<'c> {
    statement: CachedStatement<'c>,
    /// Which parameters are bound to NULL, a bit each.
    nulls: u32,
}

impl UpdateNode<'_> {
    /// Answers how many rows there were.
    fn execute(&mut self, values: &[&dyn ToSql]) -> rusqlite::Result<usize> {
        let mut bit = 1;
        for (index, value) in values.iter().enumerate() {
            let value = value.to_sql()?;
            let null = matches!(value, ToSqlOutput::Borrowed(ValueRef::Null) | ToSqlOutput::Owned(Value::Null));
            if !null {
                self.nulls &= !bit;
                self.statement.raw_bind_parameter(index + 1, value)?;
            } else if self.nulls & bit == 0 {
                self.statement.raw_bind_parameter(index + 1, value)?;
                self.nulls |= bit;
            }
            bit <<= 1;
        }
        self.statement.raw_execute()
    }
}

/// Writes what is pending of a run, and notes that it is not pending any more.
pub(super) fn run(statements: &mut Statements<'_>, id: &RunId, cell: &mut Cell) -> Result<(), StoreError> {
    let conn = statements.conn;
    let Some(head) = &cell.head else { return Ok(()) };
    if !cell.changed {
        return Ok(());
    }
    let fail = |error| sql_error(At::table("runs").run(id), error);
    let ends = cell.header_changed && cell.header.as_ref().is_some_and(|header| header.status.is_ended());
    let noted = statements.noting != Noting::Nothing && cell.nodes.len() <= changes::MOST && !ends;
    match &cell.header {
        Some(header) if cell.header_changed => {
            let worker = header.worker.as_ref().map(RawJson::from_serialize).transpose();
            let worker = worker.map_err(|error| super::error::corrupt(format_args!("worker of run {id:?}"), error))?;
            put_header(conn, id, header, worker.as_ref(), head, noted).map_err(fail)?;
            cell.owes_version = false;
        }
        _ if statements.noting == Noting::Nothing => cell.owes_version = true,
        // What is noted for others goes from the version that the row has to the next one.
        _ => version(statements, id, head, noted).map_err(fail)?,
    }
    for (node_id, pending) in &cell.nodes {
        node(statements, id, node_id, pending, &head.created_at)
            .map_err(|error| sql_error(At::table("node_states").run(id).node(node_id), error))?;
    }
    if ends {
        changes::ended(conn, id).map_err(|error| sql_error(At::table(changes::TABLE).run(id), error))?;
    } else if noted {
        changes::note(conn, id, &cell.nodes, (cell.before, head.version), statements.noting)
            .map_err(|error| sql_error(At::table(changes::TABLE).run(id), error))?;
    }
    cell.written();
    Ok(())
}

/// Writes the version of a run's row, where that was put off: several entries of a transaction that write to one run change its row once.
pub(super) fn owed_version(statements: &mut Statements<'_>, id: &RunId, cell: &mut Cell) -> Result<(), StoreError> {
    let (true, Some(head)) = (std::mem::take(&mut cell.owes_version), &cell.head) else { return Ok(()) };
    version(statements, id, head, false).map_err(|error| sql_error(At::table("runs").run(id), error))
}

fn version(statements: &mut Statements<'_>, id: &RunId, head: &super::own::Head, noted: bool) -> rusqlite::Result<()> {
    let values = params![id.as_str(), counter(head.version.0), counter(head.nodes_deleted.0), noted];
    statements.put_version()?.execute(values).map(|_| ())
}

fn put_header(
    conn: &Connection,
    id: &RunId,
    header: &RunHeader,
    worker: Option<&RawJson>,
    head: &super::own::Head,
    noted: bool,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO runs (run_id, status, created_at, started_at, finished_at, worker, metadata, extra, version, created_version, \
               header_version, nodes_deleted_version) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12) \
               ON CONFLICT (run_id) DO UPDATE SET status = excluded.status, started_at = excluded.started_at, \
               finished_at = excluded.finished_at, worker = excluded.worker, metadata = excluded.metadata, extra = excluded.extra, \
               version = excluded.version, header_version = excluded.header_version, \
               nodes_deleted_version = excluded.nodes_deleted_version, \
               change_sets_from = CASE WHEN ?13 THEN coalesce(change_sets_from, version) END";
    conn.prepare_cached(sql)?.execute(params![
        id.as_str(),
        header.status.as_str(),
        &*head.created_at,
        header.started_at.map(Stamp::of),
        header.finished_at.map(Stamp::of),
        worker.map(RawJson::as_str),
        metadata_text(&header.metadata).as_ref().map(RawJson::as_str),
        header.extra.as_ref().map(RawJson::as_str),
        counter(head.version.0),
        counter(head.created_version.0),
        counter(header.version.0),
        counter(head.nodes_deleted.0),
        noted,
    ])?;
    Ok(())
}

fn node(
    statements: &mut Statements<'_>,
    run: &RunId,
    id: &NodeId,
    pending: &PendingNode,
    created_at: &str,
) -> rusqlite::Result<()> {
    let conn = statements.conn;
    let (run, node) = (run.as_str(), id.as_str());
    if pending.whole {
        conn.prepare_cached("DELETE FROM completed_intervals WHERE run_id = ?1 AND node_id = ?2")?.execute([run, node])?;
        conn.prepare_cached("DELETE FROM partitions WHERE run_id = ?1 AND node_id = ?2")?.execute([run, node])?;
    }
    let Some(state) = &pending.state else {
        conn.prepare_cached("DELETE FROM node_states WHERE run_id = ?1 AND node_id = ?2")?.execute([run, node])?;
        return Ok(());
    };
    put_node(statements, run, node, state, created_at)?;
    let insert = "INSERT OR REPLACE INTO completed_intervals (run_id, node_id, start_at, end_at) VALUES (?1, ?2, ?3, ?4)";
    if pending.whole {
        for island in state.intervals.iter() {
            conn.prepare_cached(insert)?.execute(params![run, node, Stamp::of(island.start()), Stamp::of(island.end())])?;
        }
        for partition in state.partitions.iter() {
            put_partition(conn, run, node, partition.as_str())?;
        }
        return Ok(());
    }
    let Some(covered) = &pending.covered else { return Ok(()) };
    for Rewrite { from, to, islands } in rewrites(&state.intervals, &covered.intervals) {
        conn.prepare_cached("DELETE FROM completed_intervals WHERE run_id = ?1 AND node_id = ?2 AND start_at BETWEEN ?3 AND ?4")?
            .execute(params![run, node, Stamp::of(from), Stamp::of(to)])?;
        for island in islands {
            conn.prepare_cached(insert)?.execute(params![run, node, Stamp::of(island.start()), Stamp::of(island.end())])?;
        }
    }
    for partition in &covered.partitions {
        if state.partitions.contains(partition) {
            put_partition(conn, run, node, partition.as_str())?;
        } else {
            conn.prepare_cached("DELETE FROM partitions WHERE run_id = ?1 AND node_id = ?2 AND partition = ?3")?.execute([
                run,
                node,
                partition.as_str(),
            ])?;
        }
    }
    Ok(())
}

fn put_partition(conn: &Connection, run: &str, node: &str, partition: &str) -> rusqlite::Result<()> {
    conn.prepare_cached("INSERT OR IGNORE INTO partitions (run_id, node_id, partition) VALUES (?1, ?2, ?3)")?
        .execute([run, node, partition])?;
    Ok(())
}

fn put_node(statements: &mut Statements<'_>, run: &str, node: &str, state: &NodeState, created_at: &str) -> rusqlite::Result<()> {
    let (watermarks, metadata) = (metadata_text(&state.watermarks), metadata_text(&state.metadata));
    let fingerprint = state.fingerprint.as_ref().map(fingerprint_text);
    let (started_at, finished_at) = (state.started_at.map(Stamp::of), state.finished_at.map(Stamp::of));
    let (duration_ms, row_count) = (state.duration_ms.map(Number), state.row_count.map(Number));
    let (depends_on, attempts) = (list_text(&state.depends_on)?, list_text(&state.attempts)?);
    let token = state.token.map(|token| Number(token.0));
    let values: [&dyn ToSql; 20] = [
        &run,
        &node,
        &state.status.as_str(),
        &state.attempt,
        &started_at,
        &finished_at,
        &duration_ms,
        &row_count,
        &fingerprint,
        &state.error.as_deref(),
        &watermarks.as_ref().map(RawJson::as_str),
        &metadata.as_ref().map(RawJson::as_str),
        &state.extra.as_ref().map(RawJson::as_str),
        &counter(state.version.0),
        &depends_on,
        &state.max_attempts,
        &attempts,
        &state.worker.as_deref(),
        &token,
        &created_at,
    ];
    // Most nodes are there: an update is cheaper than an insert that finds out.
    let (there, _) = values.split_at(19);
    if statements.update_node()?.execute(there)? == 0 {
        statements.conn.prepare_cached(INSERT_NODE)?.execute(&values[..])?;
    }
    Ok(())
}

/// Deletes the rows of a run, and leaves a tombstone.
pub(super) fn delete_run(conn: &Connection, run: &RunId, version: Version, at: Stamp) -> Result<(), StoreError> {
    let fail = |error| sql_error(format_args!("deleting run {run:?}"), error);
    for sql in [
        "DELETE FROM node_states WHERE run_id = ?1",
        "DELETE FROM completed_intervals WHERE run_id = ?1",
        "DELETE FROM partitions WHERE run_id = ?1",
        "DELETE FROM change_sets WHERE run_id = ?1",
        "DELETE FROM runs WHERE run_id = ?1",
    ] {
        conn.prepare_cached(sql).and_then(|mut statement| statement.execute([run.as_str()])).map_err(fail)?;
    }
    conn.prepare_cached("INSERT OR REPLACE INTO tombstones (run_id, version, deleted_at) VALUES (?1, ?2, ?3)")
        .and_then(|mut statement| statement.execute(params![run.as_str(), counter(version.0), at]))
        .map(|_| ())
        .map_err(fail)
}

/// Moves the counters of the store.
pub(super) fn counters(conn: &Connection, seq: u64, token: u64) -> Result<(), StoreError> {
    conn.prepare_cached("UPDATE meta SET seq = ?1, token = ?2 WHERE id = 1")
        .and_then(|mut statement| statement.execute([counter(seq), counter(token)]))
        .map(|_| ())
        .map_err(|error| sql_error("table meta", error))
}

/// Raises the versions of all runs to this one at least; answers how many were raised.
pub(super) fn raise_versions(conn: &Connection, version: u64) -> Result<usize, StoreError> {
    conn.execute("UPDATE runs SET version = ?1 WHERE version < ?1", [counter(version)])
        .map_err(|error| sql_error(At::table("runs"), error))
}
