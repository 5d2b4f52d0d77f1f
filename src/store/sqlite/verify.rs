//! Checks the database from end to end, reading only, and names every row that makes no sense.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, params_from_iter};

use super::error::sql_error;
use super::rows::{STRFTIME, counter};
use super::thread::behind;
use super::{lease, open, read, schema};
use crate::model::{NodeId, RunId, RunQuery};
use crate::store::{StoreError, VerifyReport};

/// Problems named at most of one kind, and of one run; the rest is counted.
const NAMED: usize = 20;

/// Questions that must find nothing: what they look for, and the rows that are wrong, as text.
const ORPHANS: &[(&str, &str)] = &[
    (
        "node_states of runs that are not there",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states WHERE run_id NOT IN (SELECT run_id FROM runs)",
    ),
    (
        "completed_intervals of nodes that are not there",
        "SELECT DISTINCT 'run ' || run_id || ', node ' || node_id FROM completed_intervals \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = completed_intervals.run_id AND n.node_id = completed_intervals.node_id)",
    ),
    (
        "partitions of nodes that are not there",
        "SELECT DISTINCT 'run ' || run_id || ', node ' || node_id FROM partitions \
         WHERE NOT EXISTS (SELECT 1 FROM node_states AS n WHERE n.run_id = partitions.run_id AND n.node_id = partitions.node_id)",
    ),
    (
        "completed_intervals that overlap or touch",
        "SELECT 'run ' || run_id || ', node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY run_id, node_id ORDER BY start_at) AS before FROM completed_intervals) WHERE before >= start_at",
    ),
    (
        "coverage that overlaps or touches",
        "SELECT 'node ' || node_id || ', from ' || start_at FROM \
         (SELECT *, lag(end_at) OVER (PARTITION BY node_id ORDER BY start_at) AS before FROM coverage) WHERE before >= start_at",
    ),
    (
        "node_states newer than their run",
        "SELECT 'run ' || run_id || ', node ' || node_id FROM node_states AS n JOIN runs AS r USING (run_id) WHERE n.version > r.version",
    ),
    (
        "runs whose header is newer, or whose beginning is later, than the run itself",
        "SELECT 'run ' || run_id FROM runs WHERE header_version > version OR created_version > version OR nodes_deleted_version > version",
    ),
    (
        "runs newer than the store's commit sequence",
        "SELECT 'run ' || run_id FROM runs WHERE version > (SELECT seq FROM meta WHERE id = 1)",
    ),
    (
        "locks with tokens that were never granted",
        "SELECT 'run ' || run_id || ', token ' || token FROM locks WHERE token > (SELECT token FROM meta WHERE id = 1)",
    ),
    // Of each run once. Where its own row holds no stamp at all its nodes tell which one it was.
    (
        "node_states that name another creation of their run",
        "SELECT 'run ' || run_id || ', created at ' || quote(r.created_at) || ', and ' || count(*) || ' of its nodes say ' || quote(n.run_created_at) || \
         ', first ' || min(n.node_id) || CASE WHEN strftime('%s', r.created_at) IS NULL AND strftime('%s', n.run_created_at) IS NOT NULL \
         THEN '; mend it: UPDATE runs SET created_at = ' || quote(n.run_created_at) || ' WHERE run_id = ' || quote(run_id) ELSE '' END \
         FROM node_states AS n JOIN runs AS r USING (run_id) WHERE n.run_created_at <> r.created_at GROUP BY run_id, n.run_created_at",
    ),
];

/// Where stamps are: the table, how a row of it is named, what finds it again, and its columns of stamps.
const STAMPS: &[(&str, &str, &[&str], &[&str])] = &[
    ("runs", "'run ' || run_id", &["run_id"], &["created_at", "started_at", "finished_at"]),
    ("node_states", NODE, &["run_id", "node_id"], &["started_at", "finished_at", "run_created_at"]),
    ("completed_intervals", NODE, &["run_id", "node_id"], &["start_at", "end_at"]),
    ("coverage", "'node ' || node_id", &["node_id"], &["start_at", "end_at"]),
    ("last_success", "'node ' || node_id", &["node_id"], &["run_created_at", "finished_at"]),
    ("locks", "'run ' || run_id || ', token ' || token", &["token"], &["since", "until", "owner_started_at"]),
    ("tombstones", "'run ' || run_id", &["run_id"], &["deleted_at"]),
    ("batches", "'batch ' || hex(id)", &["id"], &["at"]),
];

const NODE: &str = "'run ' || run_id || ', node ' || node_id";

/// Names every stamp of another form than ours, with the statement that mends it: it may well be read, but SQL compares texts, and sorts it in a wrong place.
fn stamps(conn: &Connection, report: &mut VerifyReport) -> Result<(), StoreError> {
    const OURS: &str = "????-??-??T??:??:??.??????Z";
    let ours = OURS.replace('?', "[0-9]");
    for (table, row, keys, columns) in STAMPS {
        for column in *columns {
            let place: Vec<String> = keys.iter().chain([column]).map(|key| format!("'{key} = ' || quote({key})")).collect();
            let place = place.join(" || ' AND ' || ");
            let sql = format!(
                "SELECT {row} || ': ' || {column} || CASE \
                 WHEN strftime('{STRFTIME}', {column}) IS NULL THEN '; it is no stamp, put one in its place: UPDATE {table} SET {column} = …' \
                 ELSE '; mend it: UPDATE {table} SET {column} = strftime(''{STRFTIME}'', {column})' END || ' WHERE ' || {place} \
                 FROM {table} WHERE {column} IS NOT NULL AND NOT {column} GLOB '{ours}'"
            );
            let found = texts(conn, &sql, &[], report)?;
            let what = format!("{table}.{column} is not written as 2024-01-10T12:00:00.000000Z and sorts wrong");
            note(report, &what, found);
        }
    }
    Ok(())
}

/// Checks everything. The caller holds a read transaction.
pub(super) fn verify(conn: &Connection, db: &Path) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::new();
    // Read before the database, whose snapshot begins with the first question: what others commit meanwhile makes it no older.
    if let Some(known) = report.take(open::known(db))?.flatten() {
        report.checked.push(format!("{}: token {}, sequence {}", open::beside(db, ".lock").display(), known.token, known.seq));
        if let Some((seq, _)) = report.take(read::counters(conn))?
            && let Some(behind) = behind(&known, seq)
            && report.take(any_run(conn))?.unwrap_or(false)
        {
            report.checked.push(format!(
                "{} is older than what was committed to it (sequence {seq} of {behind} at least): a backup was put back. Its runs go on behind version {} as \
                 soon as it is opened for writing",
                db.display(),
                known.seq
            ));
        }
    }
    let found = texts(conn, "PRAGMA integrity_check", &[], &mut report)?;
    report.checked.push("every page and index (integrity_check)".to_owned());
    note(&mut report, "the database is damaged", found.into_iter().filter(|line| line != "ok").collect());
    let version = schema::schema_version(conn).map_err(|error| sql_error("the database", error));
    if let Some(version) = report.take(version)? {
        report.checked.push(format!("schema version {version}"));
    }

    for (what, sql) in ORPHANS {
        let found = texts(conn, sql, &[], &mut report)?;
        note(&mut report, what, found);
    }
    report.checked.push("that rows belong together".to_owned());
    stamps(conn, &mut report)?;
    report.checked.push("that stamps are of one width".to_owned());

    let (runs, nodes) = values(conn, &mut report)?;
    report.checked.push(format!("every value of {runs} runs and {nodes} nodes"));
    let mut seen = BTreeSet::new();
    report.problems.retain(|problem| seen.insert(problem.clone()));
    Ok(report)
}

/// An error about the counters that never go back, with the statement that brings them behind every number which is known to have been given out: without them
/// nothing opens, also not to be verified.
pub(super) fn with_mend(wrong: StoreError, conn: &Connection, db: &Path) -> StoreError {
    let highest = "SELECT max(coalesce((SELECT max(version) FROM runs), 0), coalesce((SELECT max(version) FROM tombstones), 0)), \
                   max(coalesce((SELECT max(token) FROM locks), 0), coalesce((SELECT max(token) FROM node_states), 0))";
    let there = conn.query_row(highest, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)));
    // Where these are no numbers either nobody can tell.
    let (true, Ok((seq, token))) = (wrong.is_of_one_entry(), there) else { return wrong };
    let known = open::known(db).ok().flatten();
    let beyond = |stored: i64, known: Option<u64>| known.map_or(stored, |known| counter(known).max(stored));
    let (seq, token) =
        (beyond(seq, known.as_ref().map(|known| known.seq)), beyond(token, known.as_ref().map(|known| known.token)));
    let mend = format!("INSERT OR REPLACE INTO meta (id, seq, token) VALUES (1, {seq}, {token})");
    StoreError::not_applied(wrong.kind(), format!("{wrong}; mend it: {mend}")).with_source(wrong)
}

fn any_run(conn: &Connection) -> Result<bool, StoreError> {
    conn.query_row("SELECT EXISTS (SELECT 1 FROM runs)", [], |row| row.get(0)).map_err(|error| sql_error("table runs", error))
}

fn note(report: &mut VerifyReport, what: &str, found: Vec<String>) {
    let more = found.len().saturating_sub(NAMED);
    report.problems.extend(found.into_iter().take(NAMED).map(|row| format!("{what}: {row}")));
    if more > 0 {
        report.problems.push(format!("{what}: and {more} more"));
    }
}

/// The first column of what a statement finds, up to where damage ends it; that is told in the report. Bytes that are no text are shown as such.
fn texts(conn: &Connection, sql: &str, keys: &[&str], report: &mut VerifyReport) -> Result<Vec<String>, StoreError> {
    let mut found = Vec::new();
    let ended = (|| {
        let mut statement = conn.prepare(sql)?;
        let mut rows = statement.query(params_from_iter(keys))?;
        while let Some(row) = rows.next()? {
            found.push(match row.get_ref(0)? {
                ValueRef::Text(bytes) | ValueRef::Blob(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                ValueRef::Null => String::new(),
                ValueRef::Integer(number) => number.to_string(),
                ValueRef::Real(number) => number.to_string(),
            });
        }
        Ok(())
    })();
    report.take(ended.map_err(|error| sql_error("the database", error)))?;
    Ok(found)
}

/// Reads every value as readers do. Where a run does not read, every node of it is looked at by itself.
fn values(conn: &Connection, report: &mut VerifyReport) -> Result<(usize, usize), StoreError> {
    let ids = texts(conn, "SELECT run_id FROM runs", &[], report)?;
    let mut nodes = 0_usize;
    for text in &ids {
        let Ok(run) = RunId::new(text.as_str()) else {
            report.problems.push(format!("table runs: {text:?} is no id of a run"));
            continue;
        };
        match read::run(conn, &run) {
            Ok(state) => nodes = nodes.saturating_add(state.map_or(0, |state| state.node_count())),
            Err(error) => nodes = nodes.saturating_add(nodes_of(conn, &run, error, report)?),
        }
    }
    report.take(read::counters(conn))?;
    report.take(lease::running(conn))?;
    report.take(read::retained(conn))?;
    report.take(read::list(conn, &RunQuery::default().limit(1)))?;
    Ok((ids.len(), nodes))
}

/// Looks at a run that does not read; answers how many of its nodes do.
fn nodes_of(conn: &Connection, run: &RunId, whole: StoreError, report: &mut VerifyReport) -> Result<usize, StoreError> {
    let mut found = VerifyReport::new();
    let mut nodes = 0_usize;
    found.take(read::run_row(conn, run))?;
    for text in texts(conn, "SELECT node_id FROM node_states WHERE run_id = ?1", &[run.as_str()], &mut found)? {
        match NodeId::new(text.as_str()) {
            Ok(node) => nodes += usize::from(found.take(read::node(conn, run, &node))?.is_some()),
            Err(_) => found.problems.push(format!("table node_states: run {run:?}: {text:?} is no id of a node")),
        }
    }
    if found.is_sound() {
        found.take(Err::<(), _>(whole))?;
    }
    let more = found.problems.len().saturating_sub(NAMED);
    report.problems.extend(found.problems.into_iter().take(NAMED));
    if more > 0 {
        report.problems.push(format!("run {run:?}: and {more} more"));
    }
    Ok(nodes)
}
