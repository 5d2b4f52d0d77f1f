//! What outlives deleted runs: their completed intervals and partitions join the coverage, the newest success stays.
//!
//! Intervals are read and rewritten only where they change: a node with a hundred thousand islands costs what one of them costs.

use std::collections::BTreeSet;

use rusqlite::{Connection, params};

use super::error::sql_error;
use super::read;
use super::rows::{At, Fields, Number, Stamp, fingerprint_text, metadata_text};
use crate::model::{IntervalSet, LastSuccess, NodeId, PartitionKey, RawJson, Retained};
use crate::store::StoreError;

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

/// The islands that begin before something ends or where it does, the last one first: those that it overlaps or touches, and one before them.
const NEAR: &str = "SELECT start_at, end_at FROM coverage WHERE node_id = ?1 AND start_at <= ?2 ORDER BY start_at DESC";

fn join_intervals(conn: &Connection, id: &NodeId, more: &IntervalSet) -> Result<(), StoreError> {
    let place = At::table("coverage").node(id);
    let fail = |error| sql_error(place, error);
    let mut near = conn.prepare_cached(NEAR).map_err(fail)?;
    let mut delete =
        conn.prepare_cached("DELETE FROM coverage WHERE node_id = ?1 AND start_at BETWEEN ?2 AND ?3").map_err(fail)?;
    let mut insert =
        conn.prepare_cached("INSERT OR REPLACE INTO coverage (node_id, start_at, end_at) VALUES (?1, ?2, ?3)").map_err(fail)?;
    for island in more.iter() {
        let (mut start, mut end) = (island.start(), island.end());
        // As it is written there.
        let mut first = None;
        let mut there = near.query(params![id.as_str(), Stamp::of(end)]).map_err(fail)?;
        let known = loop {
            let Some(row) = there.next().map_err(fail)? else { break false };
            let fields = Fields::new(row, place);
            let found = read::interval(&fields, 0)?;
            if found.end() < island.start() {
                break false;
            }
            if found.start() <= island.start() && island.end() <= found.end() {
                break true;
            }
            (start, end) = (start.min(found.start()), end.max(found.end()));
            first = Some(fields.text(0)?.to_owned());
        };
        drop(there);
        if known {
            continue;
        }
        if let Some(first) = first {
            delete.execute(params![id.as_str(), first, Stamp::of(island.end())]).map_err(fail)?;
        }
        insert.execute(params![id.as_str(), Stamp::of(start), Stamp::of(end)]).map_err(fail)?;
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
    if read::kept_success(conn, id)?.is_some_and(|kept| !success.replaces(&kept)) {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rusqlite::StatementStatus;

    use super::*;
    use crate::model::{Interval, time};
    use crate::store::sqlite::schema;

    fn table() -> Connection {
        let mut conn = Connection::open_in_memory().unwrap();
        schema::migrate(&mut conn, "memory").unwrap();
        conn
    }

    fn interval(from: i64, to: i64) -> Interval {
        let at = |second: i64| time::from_micros(1_700_000_000_000_000 + second * 1_000_000).unwrap();
        Interval::new(at(from), at(to)).unwrap()
    }

    fn rows(conn: &Connection, node: &str) -> Vec<(String, String)> {
        let sql = "SELECT start_at, end_at FROM coverage WHERE node_id = ?1 ORDER BY start_at";
        let mut statement = conn.prepare(sql).unwrap();
        let rows = statement.query_map([node], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        rows.collect::<rusqlite::Result<_>>().unwrap()
    }

    #[test]
    fn one_more_island_costs_what_it_touches() {
        let conn = table();
        let node = NodeId::new("n").unwrap();
        join_intervals(&conn, &node, &(0..5_000).map(|number| interval(number * 10, number * 10 + 5)).collect()).unwrap();
        let steps = || conn.prepare_cached(NEAR).unwrap().get_status(StatementStatus::VmStep);
        let before = steps();
        for (more, changed) in [((25_005, 25_010), 2), ((25_001, 25_004), 0), ((100_000, 100_001), 1), ((30_007, 30_008), 1)] {
            let written = conn.total_changes();
            join_intervals(&conn, &node, &[interval(more.0, more.1)].into_iter().collect()).unwrap();
            // Two islands that became one are two rows less and one more.
            assert_eq!(conn.total_changes() - written, changed + u64::from(changed == 2), "{more:?}");
        }
        assert!(steps() - before < 200, "{} steps", steps() - before);
        let plan: String = conn.query_row(&format!("EXPLAIN QUERY PLAN {NEAR}"), ["n", ""], |row| row.get(3)).unwrap();
        assert_eq!(plan, "SEARCH coverage USING PRIMARY KEY (node_id=? AND start_at<?)", "and nothing is sorted");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_there_is_the_union(joined in prop::collection::vec(prop::collection::vec((0_i64..60, 1_i64..12), 1..5), 1..12)) {
            let conn = table();
            let (node, other) = (NodeId::new("n").unwrap(), NodeId::new("o").unwrap());
            join_intervals(&conn, &other, &[interval(0, 100)].into_iter().collect()).unwrap();
            let mut all = IntervalSet::new();
            for more in joined {
                let more: IntervalSet = more.into_iter().map(|(from, length)| interval(from, from + length)).collect();
                join_intervals(&conn, &node, &more).unwrap();
                all.extend(more.iter());
                let want: Vec<_> = all
                    .iter()
                    .map(|island| [island.start(), island.end()].map(|at| Stamp::of(at).as_str().to_owned()).into())
                    .collect();
                prop_assert_eq!(rows(&conn, "n"), want);
            }
            prop_assert_eq!(rows(&conn, "o").len(), 1);
        }
    }
}
