//! What outlives deleted runs: their completed intervals and partitions join the coverage, the newest success stays.
//!
//! Intervals are rewritten only where they changed: a node with a hundred thousand islands costs what one of them costs.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, params};

use super::error::sql_error;
use super::read;
use super::rows::{At, Number, Stamp, fingerprint_text, metadata_text};
use crate::model::{Interval, IntervalSet, LastSuccess, NodeId, PartitionKey, RawJson, Retained, time};
use crate::store::StoreError;

/// A stretch of rows to rewrite: those that start from `from` to `to` (both inclusive) become `islands`.
pub(super) struct Rewrite {
    pub(super) from: Stamp,
    pub(super) to: Stamp,
    pub(super) islands: Vec<Interval>,
}

/// The stretches that must be rewritten, when the set is what it is now and has changed at most inside `changed`.
pub(super) fn rewrites(now: &IntervalSet, changed: &IntervalSet) -> Vec<Rewrite> {
    changed.iter().map(|range| rewrite(now, range)).collect()
}

fn rewrite(now: &IntervalSet, range: Interval) -> Rewrite {
    // The islands that overlap or touch the range: one before its start, one at its start, one behind every gap, one at its end.
    let before = time::from_micros(time::micros(range.start()).saturating_sub(1));
    let behind_gaps = now.gaps(range).into_iter().map(|gap| gap.end());
    let places = before.into_iter().chain([range.start(), range.end()]).chain(behind_gaps);
    let islands: BTreeMap<_, _> =
        places.filter_map(|place| now.island_at(place)).map(|island| (island.start(), island)).collect();
    let from = islands.keys().next().copied().unwrap_or(range.start()).min(range.start());
    let to = islands.values().map(Interval::end).max().unwrap_or(range.end()).max(range.end());
    Rewrite { from: Stamp::of(from), to: Stamp::of(to), islands: islands.into_values().collect() }
}

/// Joins what outlives deleted runs of a node.
pub(super) fn join(conn: &Connection, id: &NodeId, retained: &Retained) -> Result<(), StoreError> {
    if !retained.coverage.intervals.is_empty() {
        join_intervals(conn, id, &retained.coverage.intervals)?;
    }
    join_partitions(conn, id, &retained.coverage.partitions)?;
    if let Some(success) = &retained.last_success {
        keep_success(conn, id, success)?;
    }
    Ok(())
}

fn join_intervals(conn: &Connection, id: &NodeId, more: &IntervalSet) -> Result<(), StoreError> {
    let place = At::table("coverage").node(id);
    let fail = |error| sql_error(place, error);
    let all = read::islands(conn, "SELECT start_at, end_at FROM coverage WHERE node_id = ?1", &[id.as_str()], place)?.union(more);
    let mut delete =
        conn.prepare_cached("DELETE FROM coverage WHERE node_id = ?1 AND start_at BETWEEN ?2 AND ?3").map_err(fail)?;
    let mut insert =
        conn.prepare_cached("INSERT OR REPLACE INTO coverage (node_id, start_at, end_at) VALUES (?1, ?2, ?3)").map_err(fail)?;
    for Rewrite { from, to, islands } in rewrites(&all, more) {
        delete.execute(params![id.as_str(), from, to]).map_err(fail)?;
        for island in islands {
            insert.execute(params![id.as_str(), Stamp::of(island.start()), Stamp::of(island.end())]).map_err(fail)?;
        }
    }
    Ok(())
}

fn join_partitions(conn: &Connection, id: &NodeId, more: &BTreeSet<PartitionKey>) -> Result<(), StoreError> {
    let fail = |error| sql_error(At::table("coverage_partitions").node(id), error);
    for partition in more {
        conn.prepare_cached("INSERT OR IGNORE INTO coverage_partitions (node_id, partition) VALUES (?1, ?2)")
            .and_then(|mut statement| statement.execute([id.as_str(), partition.as_str()]))
            .map_err(fail)?;
    }
    Ok(())
}

fn keep_success(conn: &Connection, id: &NodeId, success: &LastSuccess) -> Result<(), StoreError> {
    if read::kept_success(conn, id)?.is_some_and(|kept| !success.is_newer_than(&kept)) {
        return Ok(());
    }
    let sql = "INSERT OR REPLACE INTO last_success (node_id, run_id, run_created_at, finished_at, fingerprint, row_count, watermarks) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    conn.prepare_cached(sql)
        .and_then(|mut statement| {
            statement.execute(params![
                id.as_str(),
                success.run_id.as_str(),
                Stamp::of(success.run_created_at),
                success.finished_at.map(Stamp::of),
                success.fingerprint.as_ref().map(fingerprint_text),
                success.row_count.map(Number),
                metadata_text(&success.watermarks).as_ref().map(RawJson::as_str),
            ])
        })
        .map(|_| ())
        .map_err(|error| sql_error(At::table("last_success").node(id), error))
}
