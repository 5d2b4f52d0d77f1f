//! What outlives deleted runs: their completed intervals and partitions join the coverage, the newest success stays.
//!
//! Deletions of several runs may bring the same node; they take turns by a lock on the coverage, which is seldom wanted.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::connection::{Conn, Sql};
use super::read::{self, SUCCESS_SQL};
use super::rows::Fields;
use crate::model::{Interval, IntervalSet, LastSuccess, NodeId, RawJson, Retained};
use crate::store::StoreError;
use crate::store::columns::{At, fingerprint_text, metadata_text};
use crate::store::rewrite::{Rewrite, rewrites};

/// Reads what is there and says what to write. Inside the batch's transaction, until whose end nobody else joins anything.
pub(super) async fn join(conn: &mut Conn, retained: &BTreeMap<NodeId, Retained>) -> Result<Vec<Sql<'static>>, StoreError> {
    let ids: Vec<&str> = retained.keys().map(NodeId::as_str).collect();
    let answers = conn
        .send(&[
            Sql::plain("LOCK TABLE coverage IN SHARE ROW EXCLUSIVE MODE"),
            Sql::new(
                "table coverage",
                "SELECT node_id, start_at, end_at FROM coverage WHERE node_id = ANY($1)",
                vec![Box::new(ids.clone())],
            ),
            Sql::new("table last_success", SUCCESS_SQL, vec![Box::new(ids)]),
        ])
        .await
        .map_err(|failed| failed.error)?;
    let [_, coverage_rows, success_rows] = answers.as_slice() else { return Ok(Vec::new()) };
    let mut covered: BTreeMap<NodeId, Vec<Interval>> = BTreeMap::new();
    for row in coverage_rows {
        let fields = Fields::new(row, At::table("coverage"));
        let interval = Interval::new(fields.stamp(1)?, fields.stamp(2)?).map_err(|error| fields.bad(1, error))?;
        covered.entry(fields.node_id(0)?).or_default().push(interval);
    }
    let mut kept: BTreeMap<NodeId, LastSuccess> = BTreeMap::new();
    for row in success_rows {
        let (node, success) = read::success(row)?;
        kept.insert(node, success);
    }
    let mut plan = Vec::new();
    intervals(&mut plan, retained, covered);
    partitions(&mut plan, retained);
    successes(&mut plan, retained, &kept);
    Ok(plan)
}

fn intervals(plan: &mut Vec<Sql<'static>>, retained: &BTreeMap<NodeId, Retained>, mut covered: BTreeMap<NodeId, Vec<Interval>>) {
    let (mut ids, mut from, mut to) = (Vec::new(), Vec::new(), Vec::new());
    let mut islands: BTreeMap<(String, DateTime<Utc>), DateTime<Utc>> = BTreeMap::new();
    for (node, more) in retained.iter().filter(|(_, more)| !more.coverage.intervals.is_empty()) {
        let before: IntervalSet = covered.remove(node).unwrap_or_default().into_iter().collect();
        let all = before.union(&more.coverage.intervals);
        for Rewrite { from: first, to: last, islands: now } in rewrites(&all, &more.coverage.intervals) {
            ids.push(node.as_str().to_owned());
            from.push(first);
            to.push(last);
            islands.extend(now.iter().map(|island| ((node.as_str().to_owned(), island.start()), island.end())));
        }
    }
    if ids.is_empty() {
        return;
    }
    plan.push(Sql::new(
        "table coverage",
        "DELETE FROM coverage AS c USING unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS k (node_id, first, last) \
         WHERE c.node_id = k.node_id AND c.start_at BETWEEN k.first AND k.last",
        vec![Box::new(ids), Box::new(from), Box::new(to)],
    ));
    let (keys, ends): (Vec<_>, Vec<DateTime<Utc>>) = islands.into_iter().unzip();
    let (ids, starts): (Vec<String>, Vec<DateTime<Utc>>) = keys.into_iter().unzip();
    plan.push(Sql::new(
        "table coverage",
        "INSERT INTO coverage (node_id, start_at, end_at) SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) \
         ON CONFLICT (node_id, start_at) DO UPDATE SET end_at = excluded.end_at",
        vec![Box::new(ids), Box::new(starts), Box::new(ends)],
    ));
}

fn partitions(plan: &mut Vec<Sql<'static>>, retained: &BTreeMap<NodeId, Retained>) {
    let rows = retained.iter().flat_map(|(node, more)| {
        more.coverage.partitions.iter().map(|partition| (node.as_str().to_owned(), partition.as_str().to_owned()))
    });
    let (ids, partitions): (Vec<String>, Vec<String>) = rows.unzip();
    if !ids.is_empty() {
        plan.push(Sql::new(
            "table coverage_partitions",
            "INSERT INTO coverage_partitions (node_id, partition) SELECT * FROM unnest($1::text[], $2::text[]) ON CONFLICT DO NOTHING",
            vec![Box::new(ids), Box::new(partitions)],
        ));
    }
}

fn successes(plan: &mut Vec<Sql<'static>>, retained: &BTreeMap<NodeId, Retained>, kept: &BTreeMap<NodeId, LastSuccess>) {
    let newer: Vec<(&NodeId, &LastSuccess)> = retained
        .iter()
        .filter_map(|(node, more)| Some((node, more.last_success.as_ref()?)))
        .filter(|(node, success)| kept.get(*node).is_none_or(|kept| success.replaces(kept)))
        .collect();
    if newer.is_empty() {
        return;
    }
    let each = || newer.iter().map(|(_, success)| *success);
    let ids: Vec<String> = newer.iter().map(|(node, _)| node.as_str().to_owned()).collect();
    let runs: Vec<String> = each().map(|success| success.run_id.as_str().to_owned()).collect();
    let created: Vec<DateTime<Utc>> = each().map(|success| success.run_created_at).collect();
    let finished: Vec<Option<DateTime<Utc>>> = each().map(|success| success.finished_at).collect();
    let prints: Vec<Option<String>> =
        each().map(|success| success.fingerprint.as_ref().map(fingerprint_text).map(Cow::into_owned)).collect();
    let counts: Vec<Option<String>> = each().map(|success| success.row_count.map(|rows| rows.to_string())).collect();
    let marks: Vec<Option<String>> =
        each().map(|success| metadata_text(&success.watermarks).map(|json: RawJson| json.as_str().to_owned())).collect();
    plan.push(Sql::new(
        "table last_success",
        "INSERT INTO last_success (node_id, run_id, run_created_at, finished_at, fingerprint, row_count, watermarks) \
         SELECT node_id, run_id, run_created_at, finished_at, fingerprint, row_count::numeric, watermarks \
         FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::text[], $6::text[], $7::text[]) \
         AS k (node_id, run_id, run_created_at, finished_at, fingerprint, row_count, watermarks) \
         ON CONFLICT (node_id) DO UPDATE SET run_id = excluded.run_id, run_created_at = excluded.run_created_at, \
         finished_at = excluded.finished_at, fingerprint = excluded.fingerprint, row_count = excluded.row_count, \
         watermarks = excluded.watermarks",
        vec![
            Box::new(ids),
            Box::new(runs),
            Box::new(created),
            Box::new(finished),
            Box::new(prints),
            Box::new(counts),
            Box::new(marks),
        ],
    ));
}
