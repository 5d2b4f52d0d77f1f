//! Who has the state open. Each opening has a row, and a lock that its connection holds: the server frees it when the connection ends.
//!
//! A lock that is held proves a living process (or one whose end the server has not noticed). One that is not held proves nothing by itself, because a
//! connection may break while its process lives: that one makes a new connection within seconds and says so in its row. Who holds no lock and was not
//! heard of for half a minute, by the server's clock, is silent. But while the server is away, or the network to it, or after a change to a standby, which
//! knows no locks, nobody is heard: silence counts only where the server has answered this opening for a while, without a pause ([`Contact`]).

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::connection::{Conn, Pool, Sql};
use super::rows::{Fields, plain};
use crate::model::ProcessInfo;
use crate::store::boot_time::boot_time;
use crate::store::{OpenProcess, StoreError};

/// Who is silent while the server answers for so long is gone: longer than it takes to connect again, the time for a host that does not answer and a pause included.
const WATCHED: Duration = Duration::from_secs(16);

/// Answers that are further apart prove nothing of the time between them.
const PAUSE: Duration = Duration::from_secs(3);

/// Between two looks at who is silent.
const LOOK: Duration = Duration::from_secs(1);

/// How long somebody watches a server that comes and goes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Since when the server answers this opening. Times are since the machine was started.
#[derive(Debug, Default)]
pub(super) struct Contact(Mutex<Option<(Duration, Duration)>>);

impl Contact {
    /// It has answered.
    pub(super) fn answered(&self, now: Duration) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = known.filter(|(_, last)| now.saturating_sub(*last) <= PAUSE).map_or(now, |(since, _)| since);
        *known = Some((since, now));
    }

    /// Whether it has done so for long enough.
    pub(super) fn is_long(&self, now: Duration) -> bool {
        let known = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.is_some_and(|(since, last)| now.saturating_sub(last) <= PAUSE && now.saturating_sub(since) >= WATCHED)
    }
}

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

/// Removes openings that were not heard of since a moment, some at a time, and hold no lock.
macro_rules! forget {
    ($since:literal) => {
        concat!(
            "DELETE FROM openings WHERE process = ANY(ARRAY(SELECT o.process FROM openings AS o \
             WHERE coalesce(o.seen_at, o.started_at) < ",
            $since,
            " AND NOT EXISTS (SELECT 1 FROM pg_locks AS l \
             WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.classid::bigint = (o.lock_class::bigint & 4294967295) \
             AND l.objid::bigint = (o.lock_id::bigint & 4294967295)) LIMIT $1 FOR UPDATE SKIP LOCKED)) AND coalesce(seen_at, started_at) < ",
            $since,
            " RETURNING 1"
        )
    };
}

/// What removes openings that were not heard of for a day. A server that was away for days heard of nobody: where silence does not count, somebody else
/// was heard of a day after their last word, and that is a day ago too.
pub(super) fn forget(silence_counts: bool) -> &'static str {
    if silence_counts {
        forget!("clock_timestamp() - interval '1 day'")
    } else {
        forget!(
            "(SELECT max(coalesce(k.seen_at, k.started_at)) FROM openings AS k \
             WHERE coalesce(k.seen_at, k.started_at) < clock_timestamp() - interval '1 day') - interval '1 day'"
        )
    }
}

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

/// An opening, as it is seen now.
#[derive(Debug)]
pub(super) struct Seen {
    process: ProcessInfo,
    is_held: bool,
    is_silent: bool,
}

/// All openings that are known. A standby sees no lock of the primary, and may be behind with what it heard: there nobody is silent. A reader may meet the table of an
/// older version, in which nobody said when it was heard of.
async fn seen(pool: &Pool) -> Result<Vec<Seen>, StoreError> {
    let answers = pool
        .read(vec![Sql::new(
            "table openings",
            "SELECT process, host, pid, started_at, EXISTS (SELECT 1 FROM pg_locks AS l \
             WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND l.classid::bigint = (o.lock_class::bigint & 4294967295) AND l.objid::bigint = (o.lock_id::bigint & 4294967295)), \
             coalesce((to_jsonb(o)->>'seen_at')::timestamptz < clock_timestamp() - interval '30 seconds' AND NOT pg_is_in_recovery(), false) \
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
        found.push(Seen { process, is_held: fields.get(4)?, is_silent: fields.get(5)? });
    }
    Ok(found)
}

fn judge(found: Vec<Seen>, silence_counts: bool) -> Vec<OpenProcess> {
    let alive = |seen: &Seen| match (seen.is_held, seen.is_silent) {
        (true, _) => Some(true),
        (false, true) if silence_counts => Some(false),
        (false, _) => None,
    };
    found.into_iter().map(|seen| OpenProcess::new(seen.process.clone(), alive(&seen))).collect()
}

/// What is known of all openings.
pub(super) async fn list(pool: &Pool, contact: &Contact) -> Result<Vec<OpenProcess>, StoreError> {
    let silence_counts = contact.is_long(boot_time());
    Ok(judge(seen(pool).await?, silence_counts))
}

/// What is known of all openings; where one of `who` is silent, once the server has answered for long enough.
pub(super) async fn watch(pool: &Pool, contact: &Contact, who: &BTreeSet<String>) -> Result<Vec<OpenProcess>, StoreError> {
    let began = boot_time();
    loop {
        let asked = boot_time();
        let silence_counts = contact.is_long(asked);
        let found = seen(pool).await?;
        let is_doubted = |seen: &Seen| seen.is_silent && !seen.is_held && who.contains(&*seen.process.id);
        if silence_counts || !found.iter().any(is_doubted) || asked.saturating_sub(began) >= PATIENCE {
            return Ok(judge(found, silence_counts));
        }
        tokio::time::sleep(LOOK).await;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_while_the_server_answers_without_a_pause() {
        let at = Duration::from_secs;
        let contact = Contact::default();
        assert!(!contact.is_long(at(100)), "nobody answered");
        (100..=116).for_each(|second| contact.answered(at(second)));
        assert!(!contact.is_long(at(115)) && contact.is_long(at(116)) && contact.is_long(at(119)));
        assert!(!contact.is_long(at(120)), "for how long it has not answered is not known");
        (120..=135).for_each(|second| contact.answered(at(second)));
        assert!(!contact.is_long(at(135)), "it was away in between");
        contact.answered(at(136));
        assert!(contact.is_long(at(136)));
    }
}
