//! The tables: those of the SQLite backend in spirit, readable with SQL, and how they came to be.
//!
//! Stamps are UTC text of fixed width (`2024-01-10T12:00:00.000000Z`), so that they sort as time does; free notes are JSON text. What the server
//! counts by its own clock (leases, ages) is a number. The server refuses `PRAGMA application_id`: the table `seeknal_schema` says whose database
//! it is, and which version.

use super::client::Client;
use super::fault::{Class, Fault};
use super::hrana::Stmt;
use super::rows::Table;
use super::send::{self, Ask};
use crate::store::{StoreError, StoreErrorKind};

/// The version of the schema: the number of the newest step in [`STEPS`].
pub(super) const VERSION: u64 = 2;

/// The schema, one step for every version, one statement for every change. A step is never changed once it was released; a new one is added.
const STEPS: &[&[&str]] = &[STEP_1, STEP_2];

const STEP_1: &[&str] = &[
    "CREATE TABLE seeknal_schema (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL)",
    "INSERT INTO seeknal_schema (id, version) VALUES (1, 1)",
    // One row: the counters that never go back. seq: the commit sequence of the last entry; token: the fencing token that was granted last.
    "CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, token INTEGER NOT NULL)",
    "INSERT INTO meta (id, seq, token) VALUES (1, 0, 0)",
    "CREATE TABLE runs (
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
) WITHOUT ROWID",
    "CREATE INDEX runs_by_creation ON runs (created_at, run_id)",
    // Numbers without a type: SQLite would round one beyond 63 bits, which is kept as text here.
    "CREATE TABLE node_states (
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
    depends_on TEXT,                  -- JSON list of node ids
    max_attempts INTEGER,
    attempts TEXT,                    -- JSON list of earlier attempts, oldest first
    worker TEXT,                      -- who works on the attempt
    token,                            -- of the claim that told the attempt's end
    run_created_at TEXT NOT NULL,     -- of the run: which state of a node is the latest
    PRIMARY KEY (run_id, node_id)
) WITHOUT ROWID",
    "CREATE INDEX node_states_by_node ON node_states (node_id, run_created_at, run_id)",
    "CREATE TABLE completed_intervals (
    run_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    start_at TEXT NOT NULL,           -- belongs to it
    end_at TEXT NOT NULL,             -- does not
    PRIMARY KEY (run_id, node_id, start_at)
) WITHOUT ROWID",
    "CREATE TABLE partitions (
    run_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    partition TEXT NOT NULL,
    PRIMARY KEY (run_id, node_id, partition)
) WITHOUT ROWID",
    // What outlives the runs that were cleaned up. Stretches may overlap: readers join them.
    "CREATE TABLE coverage (
    node_id TEXT NOT NULL,
    start_at TEXT NOT NULL,
    end_at TEXT NOT NULL,
    PRIMARY KEY (node_id, start_at)
) WITHOUT ROWID",
    "CREATE TABLE coverage_partitions (
    node_id TEXT NOT NULL,
    partition TEXT NOT NULL,
    PRIMARY KEY (node_id, partition)
) WITHOUT ROWID",
    "CREATE TABLE last_success (
    node_id TEXT NOT NULL PRIMARY KEY,
    run_id TEXT NOT NULL,
    run_created_at TEXT NOT NULL,
    finished_at TEXT,
    fingerprint TEXT,
    row_count,
    watermarks TEXT
) WITHOUT ROWID",
    "CREATE TABLE locks (
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
    until TEXT NOT NULL,              -- for people; the last column decides
    ttl_ms,
    expires_ms INTEGER NOT NULL,      -- when it is over: milliseconds of the server's clock since 1970
    PRIMARY KEY (run_id, node_id)
) WITHOUT ROWID",
    "CREATE UNIQUE INDEX locks_by_token ON locks (token)",
    "CREATE TABLE tombstones (
    run_id TEXT NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL,         -- the last version that the run had
    deleted_at INTEGER NOT NULL       -- seconds of the server's clock since 1970
) WITHOUT ROWID",
    // The answers to the last batches, in the numbers that the sender assumed; the last three columns say what the numbers really were.
    "CREATE TABLE batches (
    id TEXT NOT NULL PRIMARY KEY,
    at INTEGER NOT NULL,              -- seconds of the server's clock since 1970
    answers TEXT NOT NULL,
    seq INTEGER NOT NULL,
    token INTEGER NOT NULL,
    versions TEXT NOT NULL            -- JSON object: the version of every run before
) WITHOUT ROWID",
];

const STEP_2: &[&str] = &["CREATE TABLE openings (
    process TEXT NOT NULL PRIMARY KEY,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started_at TEXT NOT NULL,
    seen_ms INTEGER NOT NULL          -- when it said last that it lives: milliseconds of the server's clock since 1970
) WITHOUT ROWID"];

/// Tables that a server makes by itself.
const SERVERS_OWN: &str =
    "name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT LIKE '\\_%' ESCAPE '\\' AND name NOT LIKE 'libsql\\_%' ESCAPE '\\'";

/// What lies at the server.
enum Found {
    Nothing,
    Version(u64),
}

async fn look(client: &Client) -> Result<Found, StoreError> {
    let place = client.place();
    let tables = Stmt::ask(
        "sqlite_master",
        format!(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND {SERVERS_OWN} ORDER BY name = 'seeknal_schema' DESC, name LIMIT 1"
        ),
        Vec::new(),
    );
    let tables = send::ask(client, Ask::Latest, &[tables]).await.map_err(|fault| fault.into_error(place))?;
    let first = tables.first().and_then(Table::first);
    match first.map(|row| row.text(0)).transpose()? {
        None => Ok(Found::Nothing),
        Some("seeknal_schema") => {
            let version = Stmt::ask("seeknal_schema", "SELECT version FROM seeknal_schema WHERE id = 1", Vec::new());
            let found = send::ask(client, Ask::Latest, &[version]).await.map_err(|fault| fault.into_error(place))?;
            let row = found.first().and_then(Table::first);
            row.ok_or_else(|| super::fault::corrupt(place, "table seeknal_schema has no row"))?.number(0).map(Found::Version)
        }
        Some(name) => Err(StoreError::not_applied(
            StoreErrorKind::Foreign,
            format!(
                "{place} holds tables of another program ({:?} and perhaps more); use a database of its own, nothing was changed",
                super::fault::short(name)
            ),
        )),
    }
}

/// Checks whose database it is, makes the tables of an empty one, brings older ones of ours forward. A reader changes nothing.
pub(super) async fn prepare(client: &Client, read_only: bool) -> Result<(), StoreError> {
    let place = client.place();
    let mut refused: Option<StoreError> = None;
    // A second look after a first failure: another process may have been faster.
    for _ in 0..2 {
        let done = match look(client).await? {
            Found::Version(VERSION) => return Ok(()),
            Found::Version(newer) if newer > VERSION => return Err(refuse_newer(place, newer)),
            Found::Nothing if read_only => {
                return Err(StoreError::not_applied(
                    StoreErrorKind::NotFound,
                    format!("{place}: there is no state yet; open it for writing once, or check database_url"),
                ));
            }
            // Readers know the older schemas as far as there are any.
            Found::Version(_) if read_only => return Ok(()),
            Found::Version(version) => version,
            Found::Nothing => 0,
        };
        if let Some(refused) = refused {
            return Err(refused);
        }
        let steps = STEPS.iter().skip(usize::try_from(done).unwrap_or(usize::MAX));
        let mut statements: Vec<Stmt> = Vec::new();
        if done > 0 {
            // Fails if somebody else has migrated meanwhile.
            statements.push(Stmt::exec(
                "SELECT CASE version WHEN ?1 THEN 1 ELSE abs(-9223372036854775808) END FROM seeknal_schema",
                vec![done.into()],
            ));
        }
        statements.extend(steps.flat_map(|step| step.iter()).map(|sql| Stmt::exec(*sql, Vec::new())));
        statements.push(Stmt::exec("UPDATE seeknal_schema SET version = ?1 WHERE id = 1", vec![VERSION.into()]));
        match send::write(client, &statements).await {
            Ok(()) => return Ok(()),
            Err(fault) => refused = Some(fault.into_error(place)),
        }
    }
    Err(refused.unwrap_or_else(|| Fault::new(Class::Refused, "its tables could not be made").into_error(place)))
}

/// The refusal of a database that a newer version of ours wrote.
pub(super) fn refuse_newer(place: &str, found: u64) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::NewerFormat,
        format!("{place} has schema version {found}, this build knows {VERSION}; use the newer seeknal, nothing was changed"),
    )
}

/// The refusal of a database whose version is another one than when it was opened.
pub(super) fn refuse_other(place: &str, found: u64) -> StoreError {
    if found > VERSION {
        return refuse_newer(place, found);
    }
    StoreError::not_applied(
        StoreErrorKind::Poisoned,
        format!(
            "{place} has schema version {found}, and had {VERSION} when it was opened: an older state was brought back; open it anew, which \
             brings it forward, nothing was changed"
        ),
    )
}

/// The version that the tables have now.
pub(super) async fn version(client: &Client) -> Result<u64, StoreError> {
    match look(client).await? {
        Found::Version(version) => Ok(version),
        Found::Nothing => Err(super::fault::corrupt(client.place(), "table seeknal_schema is missing")),
    }
}
