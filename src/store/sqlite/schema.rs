//! The tables: what an operator may read with SQL, and how they came to be.
//!
//! Stamps are UTC text of fixed width (`2024-01-10T12:00:00.000000Z`), so that they sort as time does; free notes are JSON text. Ids compare byte
//! by byte, as they do in memory.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::error::sql_error;
use crate::store::{StoreError, StoreErrorKind};

/// `PRAGMA application_id` of our databases: the letters `SKNL`.
pub(super) const APPLICATION_ID: i32 = 0x534B_4E4C;

/// `PRAGMA user_version`: the number of the newest step in [`STEPS`].
pub(super) const SCHEMA_VERSION: i32 = 3;

/// Small pages: a batch touches rows that lie far apart, and every page that it touches is written whole. Measured: 1 KiB takes 1.6 times
/// as many random upserts a second as 4 KiB.
pub(super) const PAGE_SIZE: i64 = 1024;

/// Views with the name of a table of ours.
pub(super) const COVERING: &str = "SELECT name FROM main.sqlite_schema WHERE type = 'view' AND lower(name) IN \
     ('batches', 'change_sets', 'completed_intervals', 'coverage', 'coverage_partitions', 'last_success', 'locks', 'meta', 'node_states', \
     'partitions', 'runs', 'tombstones') ORDER BY name";

/// The schema, one step for every version. A step is never changed once it was released; a new one is added.
const STEPS: &[&str] = &[STEP_1, STEP_2, STEP_3];

const STEP_1: &str = "
-- One row: the counters that never go back.
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    seq INTEGER NOT NULL,   -- the commit sequence of the last entry
    token INTEGER NOT NULL  -- the fencing token that was granted last
);
INSERT INTO meta (id, seq, token) VALUES (1, 0, 0);

CREATE TABLE runs (
    run_id TEXT NOT NULL PRIMARY KEY,
    status TEXT NOT NULL,
    created_at TEXT NOT NULL,
    started_at TEXT,
    finished_at TEXT,
    worker TEXT,                      -- JSON: the process that works on it
    metadata TEXT,                    -- JSON object
    extra TEXT,                       -- JSON: what a foreign file said beyond that
    version INTEGER NOT NULL,         -- grows with every commit on the run
    created_version INTEGER NOT NULL,
    header_version INTEGER NOT NULL,  -- the version that changed this row's own fields last
    nodes_deleted_version INTEGER NOT NULL DEFAULT 0 -- the version that deleted a node last
) WITHOUT ROWID;
CREATE INDEX runs_by_creation ON runs (created_at, run_id);

-- row_count and duration_ms have no type: SQLite would round a number beyond 63 bits, which is kept as text here.
CREATE TABLE node_states (
    run_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    status TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    started_at TEXT,
    finished_at TEXT,
    duration_ms,
    row_count,
    fingerprint TEXT,                 -- plain text, or a JSON object of hashes
    error TEXT,
    watermarks TEXT,                  -- JSON object
    metadata TEXT,                    -- JSON object
    extra TEXT,                       -- JSON: what a foreign file said beyond that
    version INTEGER NOT NULL,         -- the run's version that changed this row last
    run_created_at TEXT NOT NULL,     -- of the run: which state of a node is the latest
    PRIMARY KEY (run_id, node_id)
) WITHOUT ROWID;
CREATE INDEX node_states_by_node ON node_states (node_id, run_created_at, run_id);

CREATE TABLE completed_intervals (
    run_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    start_at TEXT NOT NULL,           -- belongs to it
    end_at TEXT NOT NULL,             -- does not
    PRIMARY KEY (run_id, node_id, start_at)
) WITHOUT ROWID;

CREATE TABLE partitions (
    run_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    partition TEXT NOT NULL,
    PRIMARY KEY (run_id, node_id, partition)
) WITHOUT ROWID;

-- What outlives the runs that were cleaned up.
CREATE TABLE coverage (
    node_id TEXT NOT NULL,
    start_at TEXT NOT NULL,
    end_at TEXT NOT NULL,
    PRIMARY KEY (node_id, start_at)
) WITHOUT ROWID;
CREATE TABLE coverage_partitions (
    node_id TEXT NOT NULL,
    partition TEXT NOT NULL,
    PRIMARY KEY (node_id, partition)
) WITHOUT ROWID;
CREATE TABLE last_success (
    node_id TEXT NOT NULL PRIMARY KEY,
    run_id TEXT NOT NULL,
    run_created_at TEXT NOT NULL,
    finished_at TEXT,
    fingerprint TEXT,
    row_count,
    watermarks TEXT
) WITHOUT ROWID;

CREATE TABLE locks (
    run_id TEXT NOT NULL,
    node_id TEXT NOT NULL,            -- '' locks the whole run: no node has an empty id
    token INTEGER NOT NULL,
    owner TEXT NOT NULL,
    owner_host TEXT NOT NULL,
    owner_pid INTEGER NOT NULL,
    owner_process TEXT NOT NULL,      -- the id of the opening that holds it
    owner_started_at TEXT NOT NULL,
    purpose TEXT,
    since TEXT NOT NULL,
    until TEXT NOT NULL,              -- for people; the next two columns decide
    ttl_ms,
    expires_boot_ms INTEGER NOT NULL, -- milliseconds since the machine was started
    boot_id TEXT NOT NULL,            -- which start that was
    PRIMARY KEY (run_id, node_id)
) WITHOUT ROWID;

CREATE TABLE tombstones (
    run_id TEXT NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL,         -- the last version that the run had
    deleted_at TEXT NOT NULL
) WITHOUT ROWID;

-- The answers to the last batches, so that a batch which is sent again is not applied again.
CREATE TABLE batches (
    id BLOB NOT NULL PRIMARY KEY,
    at TEXT NOT NULL,
    answers NOT NULL
) WITHOUT ROWID;
";

/// Claims: what a node waits for, how often it may be tried, and what its earlier attempts came to. And what changed lately.
const STEP_2: &str = "
ALTER TABLE node_states ADD COLUMN depends_on TEXT;      -- JSON list of node ids
ALTER TABLE node_states ADD COLUMN max_attempts INTEGER;
ALTER TABLE node_states ADD COLUMN attempts TEXT;        -- JSON list of earlier attempts, oldest first
ALTER TABLE node_states ADD COLUMN worker TEXT;          -- who works on the attempt
ALTER TABLE node_states ADD COLUMN token INTEGER;        -- of the claim that told the attempt's end

-- Which nodes changed lately, written only while several processes write: so that each finds the others' changes without looking at all nodes.
CREATE TABLE changes (
    run_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    PRIMARY KEY (run_id, version, node_id)
) WITHOUT ROWID;
ALTER TABLE runs ADD COLUMN changes_from INTEGER;        -- the table names every change after this version; NULL: it does not
";

/// What changed lately, with the rows themselves: one look where there was one for each of them.
const STEP_3: &str = "
DROP TABLE changes;
ALTER TABLE runs DROP COLUMN changes_from;

-- What transactions made of nodes lately, written only while several processes write: so that each takes in what the others did.
CREATE TABLE change_sets (
    run_id TEXT NOT NULL,
    version INTEGER NOT NULL,         -- the run's version after the transaction
    nodes TEXT NOT NULL,              -- JSON: each node that it changed, or null where its row has to be read
    PRIMARY KEY (run_id, version)
) WITHOUT ROWID;
ALTER TABLE runs ADD COLUMN change_sets_from INTEGER;    -- the table has every change after this version; NULL: it has not
";

/// The version of the schema that a database of ours has.
pub(super) fn schema_version(conn: &Connection) -> rusqlite::Result<i32> {
    conn.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// The mark of the program that a database belongs to.
pub(super) fn application_id(conn: &Connection) -> rusqlite::Result<i32> {
    conn.pragma_query_value(None, "application_id", |row| row.get(0))
}

/// What marks a database as one of ours, of this version, as SQL.
pub(super) fn marks(version: i32) -> String {
    format!("PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={version}")
}

/// The version that made the tables, where the marks do not tell: what a dump makes anew has none. `None` unless they are ours column by column, no more and no
/// fewer, with what `meta` holds.
pub(super) fn made_by(conn: &Connection) -> rusqlite::Result<Option<i32>> {
    let found = columns(conn)?;
    let blank = Connection::open_in_memory()?;
    for (version, step) in (1..).zip(STEPS) {
        blank.execute_batch(step)?;
        if columns(&blank)? == found {
            let counters = "SELECT count(*) = 1 AND sum(typeof(seq) = 'integer' AND typeof(token) = 'integer') = 1 FROM meta";
            return Ok(conn.query_row(counters, [], |row| row.get::<_, bool>(0))?.then_some(version));
        }
    }
    Ok(None)
}

fn columns(conn: &Connection) -> rusqlite::Result<Vec<(String, String)>> {
    let mut statement = conn.prepare(
        "SELECT here.name, of_it.name FROM sqlite_schema AS here, pragma_table_info(here.name) AS of_it \
         WHERE here.type IN ('table', 'view') AND substr(here.name, 1, 7) <> 'sqlite_' ORDER BY here.name, of_it.cid",
    )?;
    statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

/// Makes the tables of an empty database, or brings those of an older version of ours forward, in one transaction.
pub(super) fn migrate(conn: &mut Connection, place: &str) -> Result<(), StoreError> {
    if schema_version(conn).map_err(|error| sql_error(place, error))? == SCHEMA_VERSION {
        return Ok(());
    }
    let fail = |error| sql_error(place, error);
    let tx = Transaction::new(conn, TransactionBehavior::Exclusive).map_err(fail)?;
    // Asked again under the lock: another process may have been faster.
    let found = schema_version(&tx).map_err(fail)?;
    refuse_newer(found, place)?;
    let done = usize::try_from(found).unwrap_or(0);
    for step in STEPS.iter().skip(done) {
        tx.execute_batch(step).map_err(fail)?;
    }
    tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(fail)?;
    tx.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(fail)?;
    tx.commit().map_err(fail)
}

/// Lets a reader ask a database of an older version as if it had been brought forward: only a writer may do that. What the steps added reads as
/// NULL; once a writer has taken them, the same views show the real columns, which come first.
pub(super) fn read_as_newest(conn: &Connection) -> rusqlite::Result<()> {
    if application_id(conn)? != APPLICATION_ID {
        return Ok(());
    }
    let version = schema_version(conn)?;
    if version == 1 {
        conn.execute_batch(
            "CREATE TEMP VIEW node_states AS SELECT *, NULL AS depends_on, NULL AS max_attempts, NULL AS attempts, NULL AS worker, \
             NULL AS token FROM main.node_states",
        )?;
    }
    if (1..SCHEMA_VERSION).contains(&version) {
        conn.execute_batch("CREATE TEMP VIEW runs AS SELECT *, NULL AS change_sets_from FROM main.runs")?;
    }
    Ok(())
}

/// Refuses a database that a newer version of ours wrote.
pub(super) fn refuse_newer(found: i32, place: &str) -> Result<(), StoreError> {
    if (0..=SCHEMA_VERSION).contains(&found) {
        return Ok(());
    }
    Err(StoreError::not_applied(
        StoreErrorKind::NewerFormat,
        format!(
            "{place} has schema version {found}, this build knows {SCHEMA_VERSION}; use the newer seeknal, nothing was changed"
        ),
    ))
}
