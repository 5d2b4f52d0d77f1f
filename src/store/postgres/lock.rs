//! The locks of a batch's transaction, and what is read under them: steps 1 and 2 of a [commit](super::commit).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio_postgres::Row;
use uuid::Uuid;

use super::connection::{Conn, Param, Sql};
use super::error::corrupt;
use super::rows::{Fields, counter, head_columns, header_columns, lease_columns, node_columns};
use super::{Shared, schema};
use crate::model::{Interval, LeaseKey, NodeId, NodeState, PartitionKey, RunHeader, RunId};
use crate::store::columns::{At, node_column};
use crate::store::decide::{Head, LeaseRow, LeasesWanted, NodesWanted, Numbers, Rows, Wanted};
use crate::store::{MIGRATION, StoreError};

/// Mutexes of names; two names that share one wait for one another now and then.
const MUTEXES: u64 = 256;

pub(super) const BEGIN: &str = "BEGIN";
const KEEP_ID: &str = "INSERT INTO batches (id, at) VALUES ($1, clock_timestamp()) ON CONFLICT DO NOTHING \
     RETURNING (SELECT schema_version FROM meta WHERE id = 1)";
/// The lease of another opening that moves the state.
const MOVING: &str = concat!(
    "SELECT ",
    lease_columns!(),
    " FROM locks WHERE run_id = $1 AND node_id = '' AND owner_process <> $2 AND expires_at > clock_timestamp()"
);
/// Sorted in a set of its own: each is taken as it comes out of it.
const LOCK_MUTEXES: &str = "SELECT pg_advisory_xact_lock(k) FROM (SELECT k FROM unnest($1::bigint[]) AS k ORDER BY k) AS sorted";
const LOCK_RUNS: &str =
    concat!("SELECT run_id, ", head_columns!(), " FROM runs WHERE run_id = ANY($1) ORDER BY run_id FOR UPDATE");
/// Locks runs and moves them on at once, as far as they go if nothing is refused: a lock that is followed by an update writes every row twice. Sorted in a
/// set of its own, as above, and as the column is: whatever the database's own order is.
const MOVE_RUNS: &str = "UPDATE runs AS r SET version = r.version + k.steps \
     FROM (SELECT run_id, steps FROM unnest($1::text[], $2::bigint[]) AS k (run_id, steps) ORDER BY run_id COLLATE \"C\") AS k \
     WHERE r.run_id = k.run_id RETURNING r.run_id, r.version - k.steps, r.created_version, r.header_version, r.nodes_deleted_version, \
     r.created_at, r.status";
const DRAW_SEQS: &str = "SELECT nextval('commit_seq') FROM generate_series(1, $1::bigint)";
const DRAW_TOKENS: &str = "SELECT nextval('fencing_token') FROM generate_series(1, $1::bigint)";

/// The leases on these keys, of these runs, under these tokens.
macro_rules! leases_wanted {
    () => {
        " FROM locks WHERE (run_id, node_id) IN (\
         SELECT l.run_id, l.node_id FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
         JOIN locks AS l ON l.run_id = k.run_id AND l.node_id = k.node_id \
         UNION SELECT run_id, node_id FROM locks WHERE run_id = ANY($3::text[]) \
         UNION SELECT run_id, node_id FROM locks WHERE token = ANY($4::bigint[]))"
    };
}
const LOCK_LEASES: &str = concat!("SELECT 1", leases_wanted!(), " ORDER BY run_id, node_id FOR UPDATE");
const READ_LEASES: &str = concat!("SELECT expires_at > clock_timestamp(), ", lease_columns!(), leases_wanted!());

/// What the transactions of most batches begin with.
pub(super) const TEXTS: [&str; 10] =
    [BEGIN, KEEP_ID, MOVING, LOCK_MUTEXES, LOCK_RUNS, MOVE_RUNS, DRAW_SEQS, DRAW_TOKENS, LOCK_LEASES, READ_LEASES];

/// FNV-1a: the same in every process and version.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The mutex of a whole schema, for changes of its tables.
pub(super) fn schema_mutex(schema: &str) -> i64 {
    hash(schema.bytes()).cast_signed()
}

/// The mutex of a name. Where two names fall together they only wait.
fn mutex(schema: &str, run: &RunId) -> i64 {
    // The upper bits tell schemas apart, the lower ones names.
    let run = hash(run.as_str().bytes()) % MUTEXES;
    ((hash(schema.bytes().chain(*b" runs")) & !(MUTEXES - 1)) | run).cast_signed()
}

/// What was read under the locks.
pub(super) type Locked = Result<Rows, StoreError>;

/// Step 1: takes every lock, and reads what a batch needs in any case. `None`: the batch is known. An error inside: its id is free, and what is stored cannot be
/// read.
pub(super) async fn lock(shared: &Shared, conn: &mut Conn, id: Uuid, wanted: &Wanted) -> Result<Option<Locked>, StoreError> {
    let schema = &shared.pool.place.schema;
    let mutexes: BTreeSet<i64> = wanted.mutexes.iter().map(|run| mutex(schema, run)).collect();
    let lock_runs = if let Some(steps) = &wanted.steps {
        let (runs, steps): (Vec<&str>, Vec<i64>) = steps.iter().map(|(run, steps)| (run.as_str(), counter(*steps))).unzip();
        Sql::new("table runs", MOVE_RUNS, vec![Box::new(runs), Box::new(steps)])
    } else {
        let runs: Vec<&str> = wanted.runs.iter().map(RunId::as_str).collect();
        Sql::new("table runs", LOCK_RUNS, vec![Box::new(runs)])
    };
    let mut statements = vec![
        Sql::plain(BEGIN),
        Sql::new("table batches", KEEP_ID, vec![Box::new(id)]),
        // Before anything is locked: whoever moves the state is not held up, and waits for nobody who does not see it.
        Sql::new("table locks", MOVING, vec![Box::new(MIGRATION), Box::new(&*shared.process.id)]),
        lock_runs,
        Sql::new("the commit sequence", DRAW_SEQS, vec![Box::new(counter(wanted.seqs as u64))]),
    ];
    if !mutexes.is_empty() {
        let mutexes: Vec<i64> = mutexes.into_iter().collect();
        statements.insert(3, Sql::new("the mutexes of runs", LOCK_MUTEXES, vec![Box::new(mutexes)]));
    }
    let heads_at = statements.len().saturating_sub(2);
    if wanted.tokens > 0 {
        statements.push(Sql::new("the fencing tokens", DRAW_TOKENS, vec![Box::new(counter(wanted.tokens as u64))]));
    }
    let tokens_at = statements.len().saturating_sub(1);
    let leases_at = lease_statements(&mut statements, &wanted.leases);
    let answers = conn.send(&statements).await.map_err(|failed| failed.error)?;
    let rows = |index: usize| answers.get(index).map_or(&[][..], Vec::as_slice);
    let Some(kept) = rows(1).first() else { return Ok(None) };
    let read = || {
        schema::check_version(&shared.pool.place, Fields::new(kept, "table meta").get(0)?)?;
        let mut heads: BTreeMap<RunId, Option<Head>> = wanted.runs.iter().map(|run| (run.clone(), None)).collect();
        for row in rows(heads_at) {
            let fields = Fields::new(row, At::table("runs"));
            let run = fields.run_id(0)?;
            let head = Fields::new(row, At::table("runs").run(&run)).head(1)?;
            heads.insert(run, Some(head));
        }
        let mut leases = Vec::new();
        for row in leases_at.into_iter().flat_map(rows) {
            let fields = Fields::new(row, "table locks");
            leases.push(LeaseRow { record: fields.lease(1)?, valid: fields.get(0)? });
        }
        let moving = rows(2).first().map(|row| Fields::new(row, "table locks").lease(0)).transpose()?;
        Ok(Rows {
            moving,
            own: shared.pool.own.of(&wanted.runs).into_iter().collect(),
            heads,
            headers: BTreeMap::new(),
            nodes: BTreeMap::new(),
            whole: BTreeSet::new(),
            leases,
            seqs: drawn(rows(heads_at + 1))?,
            tokens: if wanted.tokens > 0 { drawn(rows(tokens_at))? } else { Numbers::Drawn([].into()) },
        })
    };
    Ok(Some(read()))
}

fn drawn(rows: &[Row]) -> Result<Numbers, StoreError> {
    rows.iter().map(|row| Fields::new(row, "a sequence").counter(0)).collect::<Result<_, _>>().map(Numbers::Drawn)
}

/// Locks the leases, then reads them: whether one is over is asked once it is held fast, by the server's clock at that moment.
fn lease_statements<'a>(statements: &mut Vec<Sql<'a>>, wanted: &'a LeasesWanted) -> Option<usize> {
    const PLACE: &str = "table locks";
    if wanted.is_empty() {
        return None;
    }
    let values = || -> Vec<Param<'a>> {
        let keys: Vec<&LeaseKey> = wanted.keys.iter().collect();
        vec![
            Box::new(keys.iter().map(|key| key.run.as_str()).collect::<Vec<&str>>()),
            Box::new(keys.iter().map(|key| node_column(key)).collect::<Vec<&str>>()),
            Box::new(wanted.runs.iter().map(RunId::as_str).collect::<Vec<&str>>()),
            Box::new(wanted.tokens.iter().map(|token| counter(token.0)).collect::<Vec<i64>>()),
        ]
    };
    statements.push(Sql::new(PLACE, LOCK_LEASES, values()));
    statements.push(Sql::new(PLACE, READ_LEASES, values()));
    Some(statements.len().saturating_sub(1))
}

/// Step 2: headers and nodes.
pub(super) async fn read(conn: &mut Conn, wanted: NodesWanted, rows: &mut Rows) -> Result<(), StoreError> {
    let (mut runs, mut ids) = (Vec::new(), Vec::new());
    let (mut all, mut headers) = (Vec::new(), Vec::new());
    for (run, of_run) in &wanted.0 {
        let nodes = rows.nodes.entry(run.clone()).or_default();
        if of_run.header {
            headers.push(run.as_str());
        }
        if of_run.all {
            all.push(run.as_str());
            rows.whole.insert(run.clone());
            continue;
        }
        for node in &of_run.nodes {
            runs.push(run.as_str());
            ids.push(node.as_str());
            nodes.insert(node.clone(), None);
        }
    }
    let keys = || -> Vec<Param<'_>> { vec![Box::new(runs.clone()), Box::new(ids.clone()), Box::new(all.clone())] };
    let statements = [
        Sql::new(
            "table runs",
            concat!("SELECT run_id, ", header_columns!(), " FROM runs WHERE run_id = ANY($1)"),
            vec![Box::new(headers.clone())],
        ),
        Sql::new(
            "table node_states",
            concat!(
                "SELECT n.run_id, n.node_id, ",
                node_columns!(),
                " FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
                 JOIN node_states AS n ON n.run_id = k.run_id AND n.node_id = k.node_id \
                 UNION ALL SELECT n.run_id, n.node_id, ",
                node_columns!(),
                " FROM node_states AS n WHERE n.run_id = ANY($3::text[])"
            ),
            keys(),
        ),
        Sql::new(
            "table completed_intervals",
            "SELECT i.run_id, i.node_id, i.start_at, i.end_at FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             JOIN completed_intervals AS i ON i.run_id = k.run_id AND i.node_id = k.node_id \
             UNION ALL SELECT run_id, node_id, start_at, end_at FROM completed_intervals WHERE run_id = ANY($3::text[])",
            keys(),
        ),
        Sql::new(
            "table partitions",
            "SELECT p.run_id, p.node_id, p.partition FROM unnest($1::text[], $2::text[]) AS k (run_id, node_id) \
             JOIN partitions AS p ON p.run_id = k.run_id AND p.node_id = k.node_id \
             UNION ALL SELECT run_id, node_id, partition FROM partitions WHERE run_id = ANY($3::text[])",
            keys(),
        ),
    ];
    let answers = conn.send(&statements).await.map_err(|failed| failed.error)?;
    let [header_rows, node_rows, interval_rows, partition_rows] = answers.as_slice() else {
        return Err(corrupt("the answers to a read", "there are not as many as there were questions"));
    };
    for row in header_rows {
        let run = Fields::new(row, At::table("runs")).run_id(0)?;
        let header: RunHeader = Fields::new(row, At::table("runs").run(&run)).header(1)?;
        rows.headers.insert(run, header);
    }
    let mut found: BTreeMap<(RunId, NodeId), NodeState> = BTreeMap::new();
    for row in node_rows {
        let (key, fields) = key(row, "node_states")?;
        found.insert(key, fields.node(2)?);
    }
    for row in interval_rows {
        let (key, fields) = key(row, "completed_intervals")?;
        let node = found.get_mut(&key).ok_or_else(|| fields.bad(1, "there is no such node"))?;
        let interval = Interval::new(fields.stamp(2)?, fields.stamp(3)?).map_err(|error| fields.bad(2, error))?;
        Arc::make_mut(&mut node.intervals).insert(interval);
    }
    for row in partition_rows {
        let (key, fields) = key(row, "partitions")?;
        let node = found.get_mut(&key).ok_or_else(|| fields.bad(1, "there is no such node"))?;
        let partition = PartitionKey::new(fields.text(2)?).map_err(|error| fields.bad(2, error))?;
        Arc::make_mut(&mut node.partitions).insert(partition);
    }
    for ((run, node), state) in found {
        rows.nodes.entry(run).or_default().insert(node, Some(Arc::new(state)));
    }
    Ok(())
}

/// The key of a node's row: its first two columns.
fn key<'r>(row: &'r Row, table: &'static str) -> Result<((RunId, NodeId), Fields<'r, String>), StoreError> {
    let place = At::table(table);
    let fields = Fields::new(row, place);
    let (run, node) = (fields.run_id(0)?, fields.node_id(1)?);
    let named = place.run(&run).node(&node).to_string();
    Ok(((run, node), Fields::new(row, named)))
}
