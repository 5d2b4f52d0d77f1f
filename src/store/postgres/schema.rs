//! The tables: what an operator may read with SQL, and how they came to be.
//!
//! Ids compare byte by byte, as they do in memory. JSON is text: `jsonb` refuses `\u0000` and changes numbers.

use tokio_postgres::Row;

use super::connection::{Conn, Sql};
use super::error::sql_error;
use super::place::Place;
use crate::store::{StoreError, StoreErrorKind};

/// The number of the newest step in [`STEPS`].
pub(super) const SCHEMA_VERSION: i32 = 2;

/// The schema, one step for every version. A step is never changed once it was released; a new one is added.
const STEPS: &[&str] = &[STEP_1, STEP_2];

const STEP_1: &str = "
CREATE TABLE meta (
    id integer PRIMARY KEY CHECK (id = 1),
    application text NOT NULL,         -- whose tables these are
    schema_version integer NOT NULL,
    origin text NOT NULL               -- which copy of the database this is: a restored one raises the counters
);
INSERT INTO meta (id, application, schema_version, origin) VALUES (1, 'seeknal-state', 1, '');

-- Counters that never go back. They leave gaps; the order of commits of one run is kept.
CREATE SEQUENCE commit_seq AS bigint;
CREATE SEQUENCE fencing_token AS bigint;

CREATE TABLE runs (
    run_id text COLLATE \"C\" PRIMARY KEY,
    status text NOT NULL,
    created_at timestamptz NOT NULL,
    started_at timestamptz,
    finished_at timestamptz,
    worker text,                       -- JSON: the process that works on it
    metadata text,                     -- JSON object
    extra text,                        -- JSON: what a foreign file said beyond that
    version bigint NOT NULL,           -- grows with every commit on the run
    created_version bigint NOT NULL,
    header_version bigint NOT NULL,    -- the version that changed this row's own fields last
    nodes_deleted_version bigint NOT NULL DEFAULT 0 -- the version that deleted a node last
) WITH (fillfactor = 50);
CREATE INDEX runs_by_creation ON runs (created_at, run_id);

CREATE TABLE node_states (
    run_id text COLLATE \"C\" NOT NULL,
    node_id text COLLATE \"C\" NOT NULL,
    status text NOT NULL,
    attempt bigint NOT NULL,
    started_at timestamptz,
    finished_at timestamptz,
    duration_ms numeric(20),
    row_count numeric(20),
    fingerprint text,                  -- plain text, or a JSON object of hashes
    error text,
    watermarks text,                   -- JSON object
    metadata text,                     -- JSON object
    extra text,                        -- JSON: what a foreign file said beyond that
    version bigint NOT NULL,           -- the run's version that changed this row last
    run_created_at timestamptz NOT NULL, -- of the run: which state of a node is the latest
    depends_on text,                   -- JSON list of node ids
    max_attempts bigint,
    attempts text,                     -- JSON list of earlier attempts, oldest first
    worker text,                       -- who works on the attempt
    token bigint,                      -- of the claim that told the attempt's end
    PRIMARY KEY (run_id, node_id)
) WITH (fillfactor = 70);
CREATE INDEX node_states_by_node ON node_states (node_id, run_created_at, run_id);

CREATE TABLE completed_intervals (
    run_id text COLLATE \"C\" NOT NULL,
    node_id text COLLATE \"C\" NOT NULL,
    start_at timestamptz NOT NULL,     -- belongs to it
    end_at timestamptz NOT NULL,       -- does not
    PRIMARY KEY (run_id, node_id, start_at)
);

CREATE TABLE partitions (
    run_id text COLLATE \"C\" NOT NULL,
    node_id text COLLATE \"C\" NOT NULL,
    partition text COLLATE \"C\" NOT NULL,
    PRIMARY KEY (run_id, node_id, partition)
);

-- What outlives the runs that were cleaned up.
CREATE TABLE coverage (
    node_id text COLLATE \"C\" NOT NULL,
    start_at timestamptz NOT NULL,
    end_at timestamptz NOT NULL,
    PRIMARY KEY (node_id, start_at)
);
CREATE TABLE coverage_partitions (
    node_id text COLLATE \"C\" NOT NULL,
    partition text COLLATE \"C\" NOT NULL,
    PRIMARY KEY (node_id, partition)
);
CREATE TABLE last_success (
    node_id text COLLATE \"C\" PRIMARY KEY,
    run_id text COLLATE \"C\" NOT NULL,
    run_created_at timestamptz NOT NULL,
    finished_at timestamptz,
    fingerprint text,
    row_count numeric(20),
    watermarks text
);

CREATE TABLE locks (
    run_id text COLLATE \"C\" NOT NULL,
    node_id text COLLATE \"C\" NOT NULL, -- '' locks the whole run: no node has an empty id
    token bigint NOT NULL,
    owner text NOT NULL,
    owner_host text NOT NULL,
    owner_pid bigint NOT NULL,
    owner_process text NOT NULL,       -- the id of the opening that holds it
    owner_started_at timestamptz NOT NULL,
    purpose text,
    since timestamptz NOT NULL,
    until timestamptz NOT NULL,        -- for people: the same as expires_at
    ttl_ms numeric(20) NOT NULL,
    expires_at timestamptz NOT NULL,   -- by the server's clock: this one decides
    PRIMARY KEY (run_id, node_id)
);
CREATE INDEX locks_by_token ON locks (token);

CREATE TABLE tombstones (
    run_id text COLLATE \"C\" PRIMARY KEY,
    version bigint NOT NULL,           -- the last version that the run had
    deleted_at timestamptz NOT NULL
);

-- The answers to the last batches, so that a batch which is sent again is not applied again.
CREATE TABLE batches (
    id uuid PRIMARY KEY,
    at timestamptz NOT NULL,
    answers bytea                      -- NULL only inside the transaction that decides it
);

-- Who has it open. Whether a process is still there is told by a lock that its connection holds: (lock_class, lock_id) in pg_locks.
CREATE TABLE openings (
    process text PRIMARY KEY,
    host text NOT NULL,
    pid bigint NOT NULL,
    started_at timestamptz NOT NULL,
    lock_class integer NOT NULL,
    lock_id integer NOT NULL
);
";

const STEP_2: &str = "
-- When the opening said last that it lives, by the server's clock.
ALTER TABLE openings ADD COLUMN seen_at timestamptz;
";

/// Where the counters of a copy go on: at the microseconds since 1970. Numbers are not given out as fast as these go by, so that all that were given out since
/// the copy was made lie before, and whoever brings the same copy back once more goes on behind what he gave out in between. Where the clock does not tell
/// (a counter is ahead of it) they go on so far behind what is known: further than anybody has counted since.
const BEHIND_ALL: &str = "SELECT setval('{sequence}', greatest(last_value, least(4611686018427387904, \
     CASE WHEN last_value < micros THEN micros ELSE last_value::numeric + 1000000000 END)::bigint)) \
     FROM {sequence}, (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS micros) AS clock";

/// No version is beyond the commit sequence. Who has seen what the copy lacks must not take what is newer on it for all there is to read: as after a node's
/// deletion he reads the whole run.
const RAISE_RUNS: &str = "UPDATE runs AS r SET version = s.highest, header_version = s.highest, nodes_deleted_version = s.highest \
     FROM (SELECT max(last_value) AS highest FROM commit_seq) AS s WHERE r.version < s.highest";

/// What lies in the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing at all.
    Nothing,
    /// Our tables of this version.
    Version(i32),
}

/// Looks at the schema, changing nothing.
pub(super) async fn look(conn: &mut Conn, place: &Place) -> Result<Found, StoreError> {
    let tables = conn
        .ask(Sql::new(
            "the list of tables",
            "SELECT c.relname::text, EXISTS (SELECT 1 FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'application'), \
             has_schema_privilege(s.oid, 'USAGE'), CASE WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, 'SELECT') \
             ELSE has_table_privilege(c.oid, 'SELECT') END \
             FROM pg_class AS c JOIN pg_namespace AS s ON s.oid = c.relnamespace \
             WHERE s.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')",
            vec![Box::new(place.schema.as_str())],
        ))
        .await?;
    if tables.is_empty() {
        return Ok(Found::Nothing);
    }
    let ours = tables
        .iter()
        .any(|row| row.try_get::<_, &str>(0).is_ok_and(|name| name == "meta") && row.try_get::<_, bool>(1).unwrap_or(false));
    let foreign = || {
        StoreError::not_applied(
            StoreErrorKind::Foreign,
            format!(
                "{}: the schema holds tables of somebody else; name another one with database_schema, nothing was changed",
                place.name
            ),
        )
    };
    if !ours {
        return Err(foreign());
    }
    refuse_unreadable(&tables, place)?;
    let meta = conn.ask(Sql::new("table meta", "SELECT application, schema_version FROM meta WHERE id = 1", Vec::new())).await?;
    let row = meta.first().ok_or_else(foreign)?;
    if !row.try_get::<_, &str>(0).is_ok_and(|application| application == "seeknal-state") {
        return Err(foreign());
    }
    let version = row.try_get::<_, i32>(1).map_err(|error| sql_error("table meta", error))?;
    check_version(place, version)?;
    Ok(Found::Version(version))
}

/// Says which right is missing: without `USAGE` the server says that there are no tables.
fn refuse_unreadable(tables: &[Row], place: &Place) -> Result<(), StoreError> {
    let has = |row: &Row, column| row.try_get::<_, bool>(column).unwrap_or(true);
    let made_here = |name: &str| {
        STEPS.iter().any(|step| [" TABLE ", " SEQUENCE "].iter().any(|kind| step.contains(&format!("CREATE{kind}{name} "))))
    };
    let (schema, name) = (&place.schema, &place.name);
    let lacks = |right: String| {
        StoreError::not_applied(
            StoreErrorKind::ReadOnly,
            format!("{name}: the role of database_url has not the right to read there; {right}, or name a role that has it"),
        )
    };
    if tables.iter().any(|row| !has(row, 2)) {
        return Err(lacks(format!("GRANT USAGE ON SCHEMA {schema}, and SELECT on its tables and sequences")));
    }
    let closed: Vec<&str> = tables
        .iter()
        .filter(|row| !has(row, 3))
        .filter_map(|row| row.try_get::<_, &str>(0).ok())
        .filter(|name| made_here(name))
        .collect();
    if closed.is_empty() {
        return Ok(());
    }
    Err(lacks(format!(
        "GRANT SELECT ON ALL TABLES and ALL SEQUENCES IN SCHEMA {schema} (it lacks that of {})",
        closed.join(", ")
    )))
}

/// Refuses tables that a newer version made, also where it made them while this one had them open.
pub(super) fn check_version(place: &Place, version: i32) -> Result<(), StoreError> {
    if (1..=SCHEMA_VERSION).contains(&version) {
        return Ok(());
    }
    Err(StoreError::not_applied(
        StoreErrorKind::NewerFormat,
        format!(
            "{} has schema version {version}, this build knows {SCHEMA_VERSION}; use the newer seeknal, nothing was changed",
            place.name
        ),
    ))
}

/// Makes the tables of an empty schema, or brings those of an older version of ours forward, in one transaction that holds all others off.
pub(super) async fn migrate(conn: &mut Conn, place: &Place, lock: i64) -> Result<(), StoreError> {
    if look(conn, place).await? == Found::Version(SCHEMA_VERSION) {
        return Ok(());
    }
    conn.batch(&format!("BEGIN; SELECT pg_advisory_xact_lock({lock});")).await?;
    // Asked again under the lock: another process may have been faster.
    let done = match look(conn, place).await? {
        Found::Nothing => 0,
        Found::Version(version) => usize::try_from(version).unwrap_or(0),
    };
    let there = conn
        .ask(Sql::new(
            "the list of schemas",
            "SELECT 1 FROM pg_namespace WHERE nspname = $1",
            vec![Box::new(place.schema.as_str())],
        ))
        .await?;
    if there.is_empty() {
        // A role that may not make schemas can still use one that was made for it.
        conn.batch(&format!("CREATE SCHEMA \"{}\"", place.schema)).await?;
    }
    for step in STEPS.iter().skip(done) {
        conn.batch(step).await?;
    }
    conn.batch(&format!("UPDATE meta SET schema_version = {SCHEMA_VERSION} WHERE id = 1; COMMIT")).await
}

/// Why all numbers were raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Raised {
    /// The tables are a copy of those that were used before.
    Copy,
    /// They may be one: nobody noted their server until now.
    Unnoted,
}

/// Raises the counters, and with them the versions of all runs, if this is a copy of the database that they counted in: numbers that were given out after the
/// copy was made are not in it. A copy made by dump has other object ids or lies on another server, one made from the server's files has another timeline.
///
/// Nobody commits meanwhile: every commit looks into `meta`.
pub(super) async fn raise(conn: &mut Conn, place: &Place) -> Result<Option<Raised>, StoreError> {
    let Some((known, here)) = origins(conn, place).await? else { return Ok(None) };
    if is_same(&known, &here) {
        return Ok(None);
    }
    let first = known.is_empty();
    conn.batch("BEGIN; LOCK TABLE meta IN ACCESS EXCLUSIVE MODE").await?;
    let changed = conn
        .ask(Sql::new(
            "table meta",
            "UPDATE meta SET origin = $1 WHERE id = 1 AND origin = $2 RETURNING 1",
            vec![Box::new(here.as_str()), Box::new(known.as_str())],
        ))
        .await?;
    if !changed.is_empty() && !first {
        for sequence in ["commit_seq", "fencing_token"] {
            // Altering it keeps others from drawing until this is committed.
            conn.batch(&format!("ALTER SEQUENCE {sequence} INCREMENT BY 1; {}", BEHIND_ALL.replace("{sequence}", sequence)))
                .await?;
        }
        conn.ask_through(Sql::plain(RAISE_RUNS)).await?;
    }
    conn.batch("COMMIT").await?;
    let why = if lacks_only_system(&known, &here) { Raised::Unnoted } else { Raised::Copy };
    Ok((!changed.is_empty() && !first).then_some(why))
}

/// What the first of these questions answers that the server answers at all.
async fn told(conn: &mut Conn, what: &'static str, questions: &[&'static str]) -> Option<String> {
    for sql in questions {
        let rows = conn.ask(Sql::new(what, sql, Vec::new())).await.ok();
        if let Some(told) = rows.and_then(|rows| rows.first()?.try_get::<_, String>(0).ok()) {
            return Some(told);
        }
    }
    None
}

/// The timeline that the server writes. Right after a promotion the last checkpoint is still of the one before, so that it is asked only where the server
/// does not tell what it writes.
const TIMELINE_OF: &[&str] = &[
    "SELECT ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::bigint::text",
    "SELECT timeline_id::text FROM pg_control_checkpoint()",
];

/// What tells servers apart that were made anew: each of them gives out the same object ids in the same order.
const SYSTEM_OF: &[&str] = &["SELECT system_identifier::text FROM pg_control_system()"];

/// Which copy of the database the tables say that they are, and which they are.
async fn origins(conn: &mut Conn, place: &Place) -> Result<Option<(String, String)>, StoreError> {
    let fail = |error| sql_error(&place.name, error);
    let system = told(conn, "the server's identifier", SYSTEM_OF).await;
    let timeline = told(conn, "the server's timeline", TIMELINE_OF).await;
    let rows = conn
        .ask(Sql::new(
            "table meta",
            "SELECT origin, (SELECT oid::text FROM pg_database WHERE datname = current_database()) || '/' || 'runs'::regclass::oid::text || ';' \
             FROM meta WHERE id = 1",
            Vec::new(),
        ))
        .await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let known: String = row.try_get(0).map_err(fail)?;
    let mut here: String = row.try_get(1).map_err(fail)?;
    for (name, told) in [(SYSTEM, system), (TIMELINE, timeline)] {
        if let Some(told) = told {
            here.push_str(name);
            here.push_str(&told);
        }
    }
    Ok(Some((known, here)))
}

/// Which copy of the database this is.
pub(super) async fn origin(conn: &mut Conn, place: &Place) -> Result<String, StoreError> {
    Ok(origins(conn, place).await?.map(|(_, here)| here).unwrap_or_default())
}

/// What an opening does again where its connections lead to another copy of the database than `before`: tables of a newer version are refused, and all
/// numbers are raised, unless somebody else was faster. Answers with the copy that it is now, if it is another one.
pub(super) async fn recheck(conn: &mut Conn, place: &Place, before: &str) -> Result<Option<String>, StoreError> {
    let here = origin(conn, place).await?;
    if is_same(before, &here) {
        return Ok(None);
    }
    if look(conn, place).await? == Found::Nothing {
        return Err(StoreError::not_applied(
            StoreErrorKind::Foreign,
            format!(
                "{}: the server that is written to now has no tables of this state; check the hosts of database_url",
                place.name
            ),
        ));
    }
    raise(conn, place).await?;
    Ok(Some(here))
}

/// Before the server's identifier in an origin, behind the object ids.
const SYSTEM: &str = " system ";

/// Before the timeline, behind those.
const TIMELINE: &str = " timeline ";

/// Whether two origins are the same. Where the server does not tell its identifier, or did not tell the timeline one of the two times, the rest decides. An
/// origin that lacks an identifier which the server tells was written when nobody asked for it, and may have come here in a dump: it counts as another one.
pub(super) fn is_same(known: &str, here: &str) -> bool {
    let split = |origin: &str| -> (String, Option<String>, Option<String>) {
        let cut = |text: &str, at: &str| match text.split_once(at) {
            Some((before, behind)) => (before.to_owned(), Some(behind.to_owned())),
            None => (text.to_owned(), None),
        };
        let (head, timeline) = cut(origin, TIMELINE);
        let (ids, system) = cut(&head, SYSTEM);
        (ids, system, timeline)
    };
    let ((known, system, then), (here, system_here, now)) = (split(known), split(here));
    known == here && (system_here.is_none() || system == system_here) && (then.is_none() || now.is_none() || then == now)
}

/// Whether a known origin differs only in that it lacks an identifier which the server tells.
fn lacks_only_system(known: &str, here: &str) -> bool {
    let rest = here.split_once(SYSTEM).map(|(ids, behind)| {
        let timeline = behind.find(TIMELINE).and_then(|at| behind.get(at..)).unwrap_or_default();
        format!("{ids}{timeline}")
    });
    !known.contains(SYSTEM) && rest.is_some_and(|rest| is_same(known, &rest))
}

/// The version of the schema, for people.
pub(super) fn version() -> i32 {
    SCHEMA_VERSION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_by_their_ids_by_the_server_and_by_the_timeline() {
        assert!(is_same("5/16;", "5/16;"));
        assert!(is_same("5/16; timeline 1", "5/16;") && is_same("5/16;", "5/16; timeline 1"));
        assert!(!is_same("5/16; timeline 1", "5/16; timeline 10") && !is_same("5/16; timeline 10", "5/16; timeline 1"));
        assert!(!is_same("5/1", "5/16;") && !is_same("", "5/16;"));
        assert!(is_same("5/16; system 7 timeline 1", "5/16; system 7 timeline 1"));
        assert!(!is_same("5/16; system 7 timeline 1", "5/16; system 71 timeline 1"));
        assert!(!is_same("5/16; system 7 timeline 1", "5/16; system 7 timeline 2"));
        // It was written before servers were asked, and may be of any of them; who is told no identifier can compare none.
        assert!(!is_same("5/16; timeline 1", "5/16; system 7 timeline 1") && !is_same("5/16;", "5/16; system 7"));
        assert!(is_same("5/16; system 7 timeline 1", "5/16; timeline 1") && is_same("5/16; system 7", "5/16;"));
        assert!(
            lacks_only_system("5/16; timeline 1", "5/16; system 7 timeline 1") && lacks_only_system("5/16;", "5/16; system 7")
        );
        assert!(!lacks_only_system("5/1; timeline 1", "5/16; system 7 timeline 1"));
        assert!(!lacks_only_system("5/16; timeline 1", "5/16; system 7 timeline 2"));
        assert!(!lacks_only_system("5/16; system 8 timeline 1", "5/16; system 7 timeline 1"));
    }
}
