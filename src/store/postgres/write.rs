//! Puts rows down: one statement for every table and kind of change, with all rows in arrays, each row in it once.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::connection::{Param, Sql};
use super::error::corrupt;
use super::groups;
use super::rows::{counter, plain, stamp};
use crate::model::{LeaseRecord, NodeId, NodeState, RawJson, RunHeader, RunId, Version};
use crate::store::StoreError;
use crate::store::columns::{fingerprint_text, list_text, metadata_text, node_column, ttl};
use crate::store::decide::{Head, LeaseWrites, NodeWrite, RunWrite, Writes};
use crate::store::rewrite::{Rewrite, rewrites};

/// A column of values that become an array.
macro_rules! columns {
    ($($name:ident),+ $(,)?) => { vec![$(Box::new($name) as Param<'_>),+] };
}

type Stamp = DateTime<Utc>;
type Text<'a> = Option<Cow<'a, str>>;

fn text(json: Option<RawJson>) -> Text<'static> {
    json.map(|json| Cow::Owned(json.as_str().to_owned()))
}

/// A run whose row was moved on when it was locked.
pub(super) struct Moved {
    pub(super) before: Head,
    pub(super) now: Version,
}

impl Moved {
    /// Whether its row is what it is to be.
    fn is(&self, head: &Head) -> bool {
        (self.now, self.before.nodes_deleted) == (head.version, head.nodes_deleted)
    }
}

/// Everything that a decision wants written, but for what outlives deleted runs.
pub(super) fn plan<'a>(writes: &'a Writes, moved: &'a BTreeMap<RunId, Moved>) -> Result<Vec<Sql<'a>>, StoreError> {
    let mut plan = Vec::new();
    clear(&mut plan, &writes.runs);
    runs(&mut plan, &writes.runs, moved)?;
    let changed: Vec<Changed<'_>> = writes
        .runs
        .iter()
        .filter_map(|(run, write)| Some((run, write, write.head.as_ref()?)))
        .flat_map(|(run, write, head)| {
            let fresh = !write.existed || write.deleted.is_some();
            write.nodes.iter().map(move |(node, change)| Changed { run: run.as_str(), node, head, change, fresh })
        })
        .collect();
    nodes(&mut plan, &changed)?;
    intervals(&mut plan, &changed);
    partitions(&mut plan, &changed);
    leases(&mut plan, &writes.leases);
    Ok(plan)
}

/// A node that changed, and whether nothing is stored of its run yet.
struct Changed<'a> {
    run: &'a str,
    node: &'a NodeId,
    head: &'a Head,
    change: &'a NodeWrite,
    fresh: bool,
}

fn clear<'a>(plan: &mut Vec<Sql<'a>>, runs: &'a BTreeMap<RunId, RunWrite>) {
    let deleted: Vec<(&str, i64)> =
        runs.iter().filter_map(|(run, write)| Some((run.as_str(), counter(write.deleted?.0)))).collect();
    if !deleted.is_empty() {
        let (ids, versions): (Vec<&str>, Vec<i64>) = deleted.into_iter().unzip();
        for (place, sql) in [
            ("table node_states", "DELETE FROM node_states WHERE run_id = ANY($1)"),
            ("table completed_intervals", "DELETE FROM completed_intervals WHERE run_id = ANY($1)"),
            ("table partitions", "DELETE FROM partitions WHERE run_id = ANY($1)"),
        ] {
            plan.push(Sql::new(place, sql, vec![Box::new(ids.clone())]));
        }
        plan.push(Sql::new(
            "table tombstones",
            "INSERT INTO tombstones (run_id, version, deleted_at) SELECT k.*, clock_timestamp() FROM unnest($1::text[], $2::bigint[]) AS k \
             ON CONFLICT (run_id) DO UPDATE SET version = excluded.version, deleted_at = excluded.deleted_at",
            columns![ids, versions],
        ));
    }
    let gone: Vec<&str> =
        runs.iter().filter(|(_, write)| write.existed && write.head.is_none()).map(|(run, _)| run.as_str()).collect();
    if !gone.is_empty() {
        plan.push(Sql::new("table runs", "DELETE FROM runs WHERE run_id = ANY($1)", columns![gone]));
    }
}

fn runs<'a>(
    plan: &mut Vec<Sql<'a>>,
    runs: &'a BTreeMap<RunId, RunWrite>,
    moved: &'a BTreeMap<RunId, Moved>,
) -> Result<(), StoreError> {
    let (mut ids, mut versions, mut deletions) = (Vec::new(), Vec::new(), Vec::new());
    // Where all was refused the run stays what it was.
    for (run, Moved { before, .. }) in moved.iter().filter(|(run, _)| !runs.contains_key(*run)) {
        ids.push(run.as_str());
        versions.push(counter(before.version.0));
        deletions.push(counter(before.nodes_deleted.0));
    }
    let mut whole: Vec<(&RunId, &Head, &RunHeader)> = Vec::new();
    for (run, write) in runs {
        match (&write.head, &write.header) {
            (Some(head), Some(header)) => whole.push((run, head, header)),
            (Some(head), None) if moved.get(run).is_some_and(|moved| moved.is(head)) => {}
            (Some(head), None) => {
                ids.push(run.as_str());
                versions.push(counter(head.version.0));
                deletions.push(counter(head.nodes_deleted.0));
            }
            (None, _) => {}
        }
    }
    if !ids.is_empty() {
        plan.push(Sql::new(
            "table runs",
            "UPDATE runs AS r SET version = k.version, nodes_deleted_version = k.deleted \
             FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS k (run_id, version, deleted) WHERE r.run_id = k.run_id",
            columns![ids, versions, deletions],
        ));
    }
    if whole.is_empty() {
        return Ok(());
    }
    let mut workers: Vec<Text<'a>> = Vec::new();
    for (run, _, header) in &whole {
        let worker = header.worker.as_ref().map(RawJson::from_serialize).transpose();
        workers.push(text(worker.map_err(|error| corrupt(format_args!("worker of run {run:?}"), error))?));
    }
    let ids: Vec<&str> = whole.iter().map(|(run, _, _)| run.as_str()).collect();
    let statuses: Vec<Cow<'_, str>> = whole.iter().map(|(_, _, header)| plain(header.status.as_str())).collect();
    let created: Vec<Stamp> = whole.iter().map(|(_, head, _)| head.created_at).collect();
    let started: Vec<Option<Stamp>> = whole.iter().map(|(_, _, header)| header.started_at).collect();
    let finished: Vec<Option<Stamp>> = whole.iter().map(|(_, _, header)| header.finished_at).collect();
    let notes: Vec<Text<'_>> = whole.iter().map(|(_, _, header)| text(metadata_text(&header.metadata))).collect();
    let extras: Vec<Option<&str>> = whole.iter().map(|(_, _, header)| header.extra.as_ref().map(RawJson::as_str)).collect();
    let versions: Vec<i64> = whole.iter().map(|(_, head, _)| counter(head.version.0)).collect();
    let creations: Vec<i64> = whole.iter().map(|(_, head, _)| counter(head.created_version.0)).collect();
    let headers: Vec<i64> = whole.iter().map(|(_, _, header)| counter(header.version.0)).collect();
    let deletions: Vec<i64> = whole.iter().map(|(_, head, _)| counter(head.nodes_deleted.0)).collect();
    plan.push(Sql::new(
        "table runs",
        "INSERT INTO runs (run_id, status, created_at, started_at, finished_at, worker, metadata, extra, version, created_version, \
         header_version, nodes_deleted_version) \
         SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::text[], $7::text[], \
         $8::text[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[]) \
         ON CONFLICT (run_id) DO UPDATE SET status = excluded.status, created_at = excluded.created_at, \
         started_at = excluded.started_at, finished_at = excluded.finished_at, worker = excluded.worker, metadata = excluded.metadata, \
         extra = excluded.extra, version = excluded.version, created_version = excluded.created_version, \
         header_version = excluded.header_version, nodes_deleted_version = excluded.nodes_deleted_version",
        columns![
            ids, statuses, created, started, finished, workers, notes, extras, versions, creations, headers, deletions
        ],
    ));
    Ok(())
}

fn nodes<'a>(plan: &mut Vec<Sql<'a>>, changed: &[Changed<'a>]) -> Result<(), StoreError> {
    let (runs, gone): (Vec<&'a str>, Vec<&'a str>) = changed
        .iter()
        .filter(|changed| changed.change.state.is_none() && !changed.fresh)
        .map(|changed| (changed.run, changed.node.as_str()))
        .unzip();
    if !gone.is_empty() {
        plan.push(Sql::new(
            "table node_states",
            "DELETE FROM node_states AS n USING unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             WHERE n.run_id = k.run_id AND n.node_id = k.node_id",
            columns![runs, gone],
        ));
    }
    let rows: Vec<NodeRow<'a>> = changed
        .iter()
        .filter_map(|changed| Some((changed.run, changed.node.as_str(), changed.head, changed.change.state.as_deref()?)))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let (filled, params) = columns_of(&rows)?;
    plan.push(Sql::new("table node_states", groups::statement(filled), params));
    Ok(())
}

/// A node as it is to be stored: its run, its id, the run's head.
type NodeRow<'a> = (&'a str, &'a str, &'a Head, &'a NodeState);

/// The rows of a decision that writes nodes and versions of runs, and nothing else.
pub(super) fn nodes_alone(writes: &Writes) -> Option<Vec<NodeRow<'_>>> {
    if !writes.leases.is_empty() || !writes.retained.is_empty() {
        return None;
    }
    let mut rows = Vec::new();
    for (run, write) in &writes.runs {
        let head = write.head.as_ref().filter(|_| write.existed && write.deleted.is_none() && write.header.is_none())?;
        for (node, change) in &write.nodes {
            let plain = !change.whole && change.intervals.is_empty() && change.partitions.is_empty();
            rows.push((run.as_str(), node.as_str(), head, change.state.as_deref().filter(|_| plain)?));
        }
    }
    Some(rows)
}

/// Rows of nodes as the columns of [`groups`].
pub(super) fn columns_of<'a>(rows: &[NodeRow<'a>]) -> Result<(groups::Filled, Vec<Param<'a>>), StoreError> {
    let runs: Vec<&str> = rows.iter().map(|row| row.0).collect();
    let ids: Vec<&str> = rows.iter().map(|row| row.1).collect();
    let created: Vec<Stamp> = rows.iter().map(|row| row.2.created_at).collect();
    let states = || rows.iter().map(|row| row.3);
    let statuses: Vec<Cow<'_, str>> = states().map(|state| plain(state.status.as_str())).collect();
    let attempts: Vec<i64> = states().map(|state| i64::from(state.attempt)).collect();
    let started: Vec<Option<Stamp>> = states().map(|state| state.started_at).collect();
    let finished: Vec<Option<Stamp>> = states().map(|state| state.finished_at).collect();
    let counts: Vec<Option<String>> = states().map(|state| state.row_count.map(|rows| rows.to_string())).collect();
    let versions: Vec<i64> = states().map(|state| counter(state.version.0)).collect();
    let mut params = columns![runs, ids, statuses, attempts, started, finished, counts, versions, created];
    let filled = groups::filled(states());
    if filled.has(groups::DURATION) {
        let durations: Vec<Option<String>> = states().map(|state| state.duration_ms.map(|ms| ms.to_string())).collect();
        params.extend(columns![durations]);
    }
    if filled.has(groups::NOTES) {
        let prints: Vec<Text<'_>> = states().map(|state| state.fingerprint.as_ref().map(fingerprint_text)).collect();
        let errors: Vec<Text<'_>> = states().map(|state| state.error.as_deref().map(plain)).collect();
        let marks: Vec<Text<'_>> = states().map(|state| text(metadata_text(&state.watermarks))).collect();
        let notes: Vec<Text<'_>> = states().map(|state| text(metadata_text(&state.metadata))).collect();
        let extras: Vec<Option<&str>> = states().map(|state| state.extra.as_ref().map(RawJson::as_str)).collect();
        params.extend(columns![prints, errors, marks, notes, extras]);
    }
    if filled.has(groups::PLAN) {
        let (mut needed, mut earlier): (Vec<Option<String>>, Vec<Option<String>>) = (Vec::new(), Vec::new());
        for (run, node, _, state) in rows {
            let bad = |error| corrupt(format_args!("node {node:?} of run {run:?}"), error);
            needed.push(list_text(&state.depends_on).map_err(bad)?);
            earlier.push(list_text(&state.attempts).map_err(bad)?);
        }
        let most: Vec<Option<i64>> = states().map(|state| state.max_attempts.map(i64::from)).collect();
        params.extend(columns![needed, most, earlier]);
    }
    if filled.has(groups::CLAIM) {
        let workers: Vec<Text<'_>> = states().map(|state| state.worker.as_deref().map(plain)).collect();
        let tokens: Vec<Option<i64>> = states().map(|state| state.token.map(|token| counter(token.0))).collect();
        params.extend(columns![workers, tokens]);
    }
    Ok((filled, params))
}

fn intervals<'a>(plan: &mut Vec<Sql<'a>>, changed: &[Changed<'a>]) {
    let (mut runs, mut ids, mut from, mut to) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // By key: a row may be in two stretches, and one statement must not write it twice.
    let mut islands: BTreeMap<(&'a str, &'a str, Stamp), Stamp> = BTreeMap::new();
    for Changed { run, node, change, .. } in changed.iter().filter(|changed| !changed.change.whole) {
        let Some(state) = &change.state else { continue };
        for Rewrite { from: first, to: last, islands: now } in rewrites(&state.intervals, &change.intervals) {
            runs.push(*run);
            ids.push(node.as_str());
            from.push(first);
            to.push(last);
            islands.extend(now.iter().map(|island| ((*run, node.as_str(), island.start()), island.end())));
        }
    }
    if !runs.is_empty() {
        plan.push(Sql::new(
            "table completed_intervals",
            "DELETE FROM completed_intervals AS i USING unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) \
             AS k (run_id, node_id, first, last) \
             WHERE i.run_id = k.run_id AND i.node_id = k.node_id AND i.start_at BETWEEN k.first AND k.last",
            columns![runs, ids, from, to],
        ));
    }
    anew(plan, changed, |runs, ids| {
        Sql::new(
            "table completed_intervals",
            "DELETE FROM completed_intervals AS i USING unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             WHERE i.run_id = k.run_id AND i.node_id = k.node_id",
            columns![runs, ids],
        )
    });
    for Changed { run, node, change, .. } in changed.iter().filter(|changed| changed.change.whole) {
        let Some(state) = &change.state else { continue };
        islands.extend(state.intervals.iter().map(|island| ((*run, node.as_str(), island.start()), island.end())));
    }
    if islands.is_empty() {
        return;
    }
    let runs: Vec<&str> = islands.keys().map(|key| key.0).collect();
    let ids: Vec<&str> = islands.keys().map(|key| key.1).collect();
    let starts: Vec<Stamp> = islands.keys().map(|key| key.2).collect();
    let ends: Vec<Stamp> = islands.into_values().collect();
    plan.push(Sql::new(
        "table completed_intervals",
        "INSERT INTO completed_intervals (run_id, node_id, start_at, end_at) \
         SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[]) \
         ON CONFLICT (run_id, node_id, start_at) DO UPDATE SET end_at = excluded.end_at",
        columns![runs, ids, starts, ends],
    ));
}

/// What is stored of nodes that are written as a whole goes first, where there may be something.
fn anew<'a>(plan: &mut Vec<Sql<'a>>, changed: &[Changed<'a>], sql: impl FnOnce(Vec<&'a str>, Vec<&'a str>) -> Sql<'a>) {
    let (runs, ids): (Vec<&'a str>, Vec<&'a str>) = changed
        .iter()
        .filter(|changed| changed.change.whole && !changed.fresh)
        .map(|changed| (changed.run, changed.node.as_str()))
        .unzip();
    if !runs.is_empty() {
        plan.push(sql(runs, ids));
    }
}

fn partitions<'a>(plan: &mut Vec<Sql<'a>>, changed: &[Changed<'a>]) {
    anew(plan, changed, |runs, ids| {
        Sql::new(
            "table partitions",
            "DELETE FROM partitions AS p USING unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             WHERE p.run_id = k.run_id AND p.node_id = k.node_id",
            columns![runs, ids],
        )
    });
    let (mut there, mut gone) = (Rows3::default(), Rows3::default());
    for Changed { run, node, change, .. } in changed {
        let Some(state) = &change.state else { continue };
        if change.whole {
            for partition in state.partitions.iter() {
                there.push(run, node.as_str(), partition.as_str());
            }
            continue;
        }
        for partition in &change.partitions {
            let rows = if state.partitions.contains(partition) { &mut there } else { &mut gone };
            rows.push(run, node.as_str(), partition.as_str());
        }
    }
    if let Some(values) = there.into_params() {
        plan.push(Sql::new(
            "table partitions",
            "INSERT INTO partitions (run_id, node_id, partition) SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) \
             ON CONFLICT DO NOTHING",
            values,
        ));
    }
    if let Some(values) = gone.into_params() {
        plan.push(Sql::new(
            "table partitions",
            "DELETE FROM partitions AS p USING unnest($1::text[], $2::text[], $3::text[]) AS k (run_id, node_id, partition) \
             WHERE p.run_id = k.run_id AND p.node_id = k.node_id AND p.partition = k.partition",
            values,
        ));
    }
}

/// Rows of three texts, as columns.
#[derive(Default)]
struct Rows3<'a>(Vec<&'a str>, Vec<&'a str>, Vec<&'a str>);

impl<'a> Rows3<'a> {
    fn push(&mut self, run: &'a str, node: &'a str, partition: &'a str) {
        self.0.push(run);
        self.1.push(node);
        self.2.push(partition);
    }

    fn into_params(self) -> Option<Vec<Param<'a>>> {
        let Self(runs, ids, partitions) = self;
        (!runs.is_empty()).then(|| columns![runs, ids, partitions])
    }
}

/// Milliseconds of a lease's life, as seconds for `make_interval`.
fn seconds(ttl_ms: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "bounded: well below 2^53")]
    let ms = ttl(ttl_ms) as f64;
    ms / 1000.0
}

fn leases<'a>(plan: &mut Vec<Sql<'a>>, leases: &'a LeaseWrites) {
    if leases.is_empty() {
        return;
    }
    let place = "table locks";
    if !leases.freed.is_empty() {
        let runs: Vec<&str> = leases.freed.iter().map(RunId::as_str).collect();
        plan.push(Sql::new(place, "DELETE FROM locks WHERE run_id = ANY($1)", columns![runs]));
    }
    if !leases.removed.is_empty() {
        let runs: Vec<&str> = leases.removed.keys().map(|key| key.run.as_str()).collect();
        let ids: Vec<&str> = leases.removed.keys().map(node_column).collect();
        let tokens: Vec<i64> = leases.removed.values().map(|token| counter(token.0)).collect();
        plan.push(Sql::new(
            place,
            "DELETE FROM locks AS l USING unnest($1::text[], $2::text[], $3::bigint[]) AS k (run_id, node_id, token) \
             WHERE l.run_id = k.run_id AND l.node_id = k.node_id AND l.token = k.token",
            columns![runs, ids, tokens],
        ));
    }
    if !leases.renewed.is_empty() {
        let runs: Vec<&str> = leases.renewed.keys().map(|key| key.run.as_str()).collect();
        let ids: Vec<&str> = leases.renewed.keys().map(node_column).collect();
        let tokens: Vec<i64> = leases.renewed.values().map(|renewed| counter(renewed.token.0)).collect();
        let ttls: Vec<String> = leases.renewed.values().map(|renewed| renewed.ttl_ms.to_string()).collect();
        let lives: Vec<f64> = leases.renewed.values().map(|renewed| seconds(renewed.ttl_ms)).collect();
        plan.push(Sql::new(
            place,
            "UPDATE locks AS l SET until = k.over, ttl_ms = k.ttl_ms::numeric, expires_at = k.over \
             FROM (SELECT run_id, node_id, token, ttl_ms, clock_timestamp() + make_interval(secs => life) AS over \
             FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::float8[]) AS k (run_id, node_id, token, ttl_ms, life)) AS k \
             WHERE l.run_id = k.run_id AND l.node_id = k.node_id AND l.token = k.token",
            columns![runs, ids, tokens, ttls, lives],
        ));
    }
    if !leases.granted.is_empty() {
        granted(plan, leases.granted.values().collect());
    }
}

fn granted<'a>(plan: &mut Vec<Sql<'a>>, granted: Vec<&'a LeaseRecord>) {
    let each = || granted.iter().copied();
    let runs: Vec<&str> = each().map(|lease| lease.key.run.as_str()).collect();
    let ids: Vec<&str> = each().map(|lease| node_column(&lease.key)).collect();
    let tokens: Vec<i64> = each().map(|lease| counter(lease.token.0)).collect();
    let owners: Vec<Cow<'_, str>> = each().map(|lease| plain(&lease.owner.name)).collect();
    let hosts: Vec<Cow<'_, str>> = each().map(|lease| plain(&lease.owner.process.host)).collect();
    let pids: Vec<i64> = each().map(|lease| i64::from(lease.owner.process.pid)).collect();
    let processes: Vec<&str> = each().map(|lease| &*lease.owner.process.id).collect();
    let started: Vec<Stamp> = each().map(|lease| stamp(lease.owner.process.started_at)).collect();
    let purposes: Vec<Text<'_>> = each().map(|lease| lease.purpose.as_deref().map(plain)).collect();
    let since: Vec<Stamp> = each().map(|lease| stamp(lease.since)).collect();
    let ttls: Vec<String> = each().map(|lease| lease.ttl_ms.to_string()).collect();
    let lives: Vec<f64> = each().map(|lease| seconds(lease.ttl_ms)).collect();
    plan.push(Sql::new(
        "table locks",
        "INSERT INTO locks (run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, until, \
         ttl_ms, expires_at) \
         SELECT run_id, node_id, token, owner, host, pid, process, started, purpose, since, over, ttl_ms::numeric, over \
         FROM (SELECT *, clock_timestamp() + make_interval(secs => life) AS over \
         FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::text[], $8::timestamptz[], \
         $9::text[], $10::timestamptz[], $11::text[], $12::float8[]) \
         AS k (run_id, node_id, token, owner, host, pid, process, started, purpose, since, ttl_ms, life)) AS k \
         ON CONFLICT (run_id, node_id) DO UPDATE SET token = excluded.token, owner = excluded.owner, owner_host = excluded.owner_host, \
         owner_pid = excluded.owner_pid, owner_process = excluded.owner_process, owner_started_at = excluded.owner_started_at, \
         purpose = excluded.purpose, since = excluded.since, until = excluded.until, ttl_ms = excluded.ttl_ms, \
         expires_at = excluded.expires_at",
        columns![
            runs, ids, tokens, owners, hosts, pids, processes, started, purposes, since, ttls, lives
        ],
    ));
}
