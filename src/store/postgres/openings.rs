//! Who has the state open. Each opening has a row, and a lock that its connection holds: the server frees it when the connection ends.
//!
//! A lock that is held proves a living process (or one whose end the server has not noticed). One that is not held proves nothing by itself, because a
//! connection may break while its process lives: that one makes a new connection within seconds and says so in its row. Who holds no lock and was not
//! heard of for half a minute, by the server's clock, is gone; but not where the server itself was started only since then: it could hear nobody, and its end
//! freed all locks.

use std::hash::{BuildHasher, Hasher, RandomState};

use super::connection::{Conn, Pool, Sql};
use super::rows::{Fields, plain};
use crate::model::ProcessInfo;
use crate::store::{OpenProcess, StoreError};

/// The two numbers of an opening's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lock {
    /// The same for all openings of one schema.
    pub(super) class: i32,
    pub(super) id: i32,
}

impl Lock {
    pub(super) fn new(schema: &str) -> Self {
        let mut hash: u32 = 0x811c_9dc5;
        for byte in "seeknal openings ".bytes().chain(schema.bytes()) {
            hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
        let random = RandomState::new().build_hasher().finish();
        Self { class: hash.cast_signed(), id: u32::try_from(random & 0xFFFF_FFFF).unwrap_or(0).cast_signed() }
    }
}

/// Takes the opening's lock, for as long as the connection lives.
pub(super) async fn hold(conn: &mut Conn, lock: Lock) -> Result<(), StoreError> {
    conn.ask(Sql::new(
        "the lock of this opening",
        "SELECT pg_try_advisory_lock_shared($1, $2)",
        vec![Box::new(lock.class), Box::new(lock.id)],
    ))
    .await
    .map(|_| ())
}

/// Removes openings that were not heard of for a day, some at a time, where they are gone by the rule above: a server that was away for days heard of nobody.
pub(super) const FORGET: &str = "DELETE FROM openings WHERE process = ANY(ARRAY(SELECT o.process FROM openings AS o \
     WHERE coalesce(o.seen_at, o.started_at) < clock_timestamp() - interval '1 day' \
     AND pg_postmaster_start_time() < clock_timestamp() - interval '30 seconds' AND NOT EXISTS (SELECT 1 FROM pg_locks AS l \
     WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.classid::bigint = (o.lock_class::bigint & 4294967295) \
     AND l.objid::bigint = (o.lock_id::bigint & 4294967295)) LIMIT $1 FOR UPDATE SKIP LOCKED)) \
     AND coalesce(seen_at, started_at) < clock_timestamp() - interval '1 day' RETURNING 1";

/// A word of old that lies in the future stays as it is: the server's clock went back meanwhile.
const SAY: &str = "INSERT INTO openings (process, host, pid, started_at, lock_class, lock_id, seen_at) \
     VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp()) \
     ON CONFLICT (process) DO UPDATE SET seen_at = excluded.seen_at \
     WHERE NOT coalesce(openings.seen_at > clock_timestamp() + interval '1 second', false) RETURNING 1";

/// Says that the opening lives: its row, as of now.
pub(super) async fn say(conn: &mut Conn, process: &ProcessInfo, lock: Lock) -> Result<(), StoreError> {
    let word = Sql::new(
        "table openings",
        SAY,
        vec![
            Box::new(process.id.to_string()),
            Box::new(plain(&process.host).into_owned()),
            Box::new(i64::from(process.pid)),
            Box::new(process.started_at),
            Box::new(lock.class),
            Box::new(lock.id),
        ],
    );
    if conn.ask(word).await?.is_empty() { bring_back(conn).await } else { Ok(()) }
}

/// Brings back what lies in the future because the server's clock went back since: leases end when those do that are renewed now, and who was heard of then was
/// heard of now. Otherwise a dead holder would keep everybody out, and would not be taken for gone, for as long as that. Leases do not end earlier:
/// who lives trusts his by a clock of his own, and is not heard before his next renewal. Words come last: as long as they are ahead this is tried again.
pub(super) async fn bring_back(conn: &mut Conn) -> Result<(), StoreError> {
    // Rows are locked in the order in which commits lock them.
    for (place, sql) in [
        (
            "table locks",
            "UPDATE locks AS l SET (until, expires_at) = (SELECT k.over, k.over FROM (SELECT clock_timestamp() \
             + make_interval(secs => least(l.ttl_ms, 9223372036854)::float8 / 1000) AS over) AS k) \
             WHERE token = ANY(ARRAY(SELECT token FROM locks WHERE expires_at > clock_timestamp() + interval '1 second' \
             + make_interval(secs => least(ttl_ms, 9223372036854)::float8 / 1000) ORDER BY run_id, node_id FOR UPDATE)) \
             AND expires_at > clock_timestamp() + interval '1 second' + make_interval(secs => least(ttl_ms, 9223372036854)::float8 / 1000)",
        ),
        (
            "table openings",
            "UPDATE openings SET seen_at = clock_timestamp() \
             WHERE process = ANY(ARRAY(SELECT process FROM openings WHERE seen_at > clock_timestamp() + interval '1 second' \
             ORDER BY process FOR UPDATE)) AND seen_at > clock_timestamp() + interval '1 second'",
        ),
    ] {
        conn.ask(Sql::new(place, sql, Vec::new())).await?;
    }
    Ok(())
}

/// All openings that are known. A standby sees no lock of the primary, and may be behind with what it heard: it takes nobody for gone. A reader may meet the table of an older version, in which nobody said when it was heard of.
pub(super) async fn list(pool: &Pool) -> Result<Vec<OpenProcess>, StoreError> {
    let answers = pool
        .read(vec![Sql::new(
            "table openings",
            "SELECT process, host, pid, started_at, EXISTS (SELECT 1 FROM pg_locks AS l \
             WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND l.classid::bigint = (o.lock_class::bigint & 4294967295) AND l.objid::bigint = (o.lock_id::bigint & 4294967295)), \
             coalesce((to_jsonb(o)->>'seen_at')::timestamptz < clock_timestamp() - interval '30 seconds' \
             AND pg_postmaster_start_time() < clock_timestamp() - interval '30 seconds' AND NOT pg_is_in_recovery(), false) \
             FROM openings AS o ORDER BY started_at, process",
            Vec::new(),
        )])
        .await?;
    let mut found = Vec::new();
    for row in answers.iter().flatten() {
        let fields = Fields::new(row, "table openings");
        let mut process = ProcessInfo::current(fields.stamp(3)?);
        process.id = fields.text(0)?.into();
        process.host = fields.plain(1)?.into();
        process.pid = fields.small(2)?;
        let alive = match (fields.get::<bool>(4)?, fields.get::<bool>(5)?) {
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        };
        found.push(OpenProcess::new(process, alive));
    }
    Ok(found)
}

/// How many openings of this schema are connected now, this one included.
pub(super) async fn count(conn: &mut Conn, lock: Lock) -> Result<i64, StoreError> {
    let rows = conn
        .ask(Sql::new(
            "the locks of openings",
            "SELECT count(*) FROM pg_locks AS l WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND l.classid::bigint = ($1::integer::bigint & 4294967295)",
            vec![Box::new(lock.class)],
        ))
        .await?;
    rows.first().map_or(Ok(0), |row| Fields::new(row, "the locks of openings").get(0))
}
