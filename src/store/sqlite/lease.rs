//! Leases as rows: granted, renewed, given back and asked about inside the batch's own transaction.
//!
//! Whether a lease is over is decided by SQL, on the boot-time clock, at the moment when the statement runs: after all waiting for locks. A lease
//! of an earlier start of the machine is over, and so is one of an opening that is proven dead: see `owners`.

use rusqlite::{Connection, params};

use super::boot::{self, boot_id, of_leases};
use super::error::sql_error;
use super::owners::Deaths;
use super::rows::{Fields, Number, Stamp, counter};
use crate::model::{
    Fence, FencingToken, LeaseGrant, LeaseKey, LeaseMutation, LeaseOwner, LeaseRecord, NodeId, ProcessInfo, Refusal, RunId,
};
use crate::store::columns::{node_column, ttl};
use crate::store::moving::UNFINISHED;
use crate::store::{StoreError, StoreErrorKind};

const PLACE: &str = "table locks";

macro_rules! record_columns {
    () => {
        "node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, until, ttl_ms, run_id"
    };
}

fn record<P: std::fmt::Display>(fields: &Fields<'_, P>) -> Result<LeaseRecord, StoreError> {
    let run = RunId::new(fields.text(11)?).map_err(|error| fields.bad(11, error))?;
    let node = match fields.text(0)? {
        "" => None,
        node => Some(NodeId::new(node).map_err(|error| fields.bad(0, error))?),
    };
    let mut process = ProcessInfo::current(fields.stamp(6)?);
    process.id = fields.text(5)?.into();
    process.host = fields.text(3)?.into();
    process.pid = fields.small(4)?;
    let owner = LeaseOwner { process, name: fields.text(2)?.into() };
    let purpose = fields.text_or_null(7)?.map(Into::into);
    let token = FencingToken(fields.number(1)?);
    let mut record = LeaseRecord::new(LeaseKey { run, node }, token, owner, purpose, fields.stamp(8)?, fields.number(10)?);
    record.until = fields.stamp(9)?;
    Ok(record)
}

fn query_records(conn: &Connection, sql: &str, values: &[&dyn rusqlite::ToSql]) -> Result<Vec<LeaseRecord>, StoreError> {
    let fail = |error| sql_error(PLACE, error);
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(values).map_err(fail)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(fail)? {
        found.push(record(&Fields::new(row, PLACE))?);
    }
    Ok(found)
}

/// All leases that are held and not over, in the order in which they were granted.
pub(super) fn list(conn: &Connection, deaths: &Deaths<'_>) -> Result<Vec<LeaseRecord>, StoreError> {
    let mut held = running(conn)?;
    held.retain(|lease| !deaths.proven(&lease.owner.process.id));
    Ok(held)
}

/// The same with those of openings that are proven dead. A move that was cut off by the end of the machine has not ended, and its lock stands.
pub(super) fn running(conn: &Connection) -> Result<Vec<LeaseRecord>, StoreError> {
    let sql = concat!(
        "SELECT ",
        record_columns!(),
        " FROM locks WHERE expires_boot_ms > seeknal_boot_ms() AND (boot_id = ?1 OR ?1 = '') OR run_id = ?2 ORDER BY token"
    );
    query_records(conn, sql, &[&of_leases(), &UNFINISHED])
}

/// Whether a lease is held under this token, and not over.
pub(super) fn holds(conn: &Connection, fence: &Fence) -> Result<bool, StoreError> {
    let sql = "SELECT 1 FROM locks WHERE run_id = ?1 AND node_id = ?2 AND token = ?3 AND expires_boot_ms > seeknal_boot_ms() AND boot_id = ?4";
    conn.prepare_cached(sql)
        .and_then(|mut statement| {
            statement.exists(params![fence.key.run.as_str(), node_column(&fence.key), counter(fence.token.0), &boot_id()])
        })
        .map_err(|error| sql_error(PLACE, error))
}

/// A lease that is held on a run or one of its nodes.
pub(super) fn holder(conn: &Connection, run: &RunId, deaths: &Deaths<'_>) -> Result<Option<LeaseRecord>, StoreError> {
    let sql = concat!(
        "SELECT ",
        record_columns!(),
        " FROM locks WHERE run_id = ?1 AND expires_boot_ms > seeknal_boot_ms() AND (boot_id = ?2 OR ?2 = '') ORDER BY node_id"
    );
    let held = query_records(conn, sql, &[&run.as_str(), &of_leases()])?;
    Ok(held.into_iter().find(|lease| !deaths.proven(&lease.owner.process.id)))
}

/// Takes all locks of a run away: it ended, or it was deleted.
pub(super) fn free(conn: &Connection, run: &RunId) -> Result<(), StoreError> {
    conn.prepare_cached("DELETE FROM locks WHERE run_id = ?1")
        .and_then(|mut statement| statement.execute([run.as_str()]))
        .map(|_| ())
        .map_err(|error| sql_error(PLACE, error))
}

/// Makes one change. `token` is the counter of the store; it moves with every grant.
///
/// The outer result is storage's, the inner one the decision: on refusal nothing was changed.
pub(super) fn apply(
    conn: &Connection,
    mutation: &LeaseMutation,
    token: &mut u64,
    deaths: &Deaths<'_>,
) -> Result<Result<Option<LeaseGrant>, Refusal>, StoreError> {
    let fail = |error| sql_error(PLACE, error);
    match mutation {
        LeaseMutation::Grant { key, owner, purpose, at, ttl_ms } => {
            if !boot::may_grant() {
                return Err(StoreError::not_applied(
                    StoreErrorKind::Unsupported,
                    "no lock is granted here: this process cannot read /proc/sys/kernel/random/boot_id, by which locks of an earlier start of the \
                     machine are known; mount /proc for it, or permit that file",
                )
                .of_one_entry());
            }
            if let Some(holder) = clear_way(conn, key, deaths)? {
                return Ok(Err(Refusal::LeaseHeld { holder: Box::new(holder) }));
            }
            let granted = token.saturating_add(1);
            let record = LeaseRecord::new(key.clone(), FencingToken(granted), owner.clone(), purpose.clone(), *at, *ttl_ms);
            let sql = "INSERT INTO locks (run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, \
                       until, ttl_ms, expires_boot_ms, boot_id) \
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, seeknal_boot_ms() + ?13, ?14)";
            let process = &owner.process;
            conn.prepare_cached(sql)
                .and_then(|mut statement| {
                    statement.execute(params![
                        key.run.as_str(),
                        node_column(key),
                        counter(granted),
                        &*owner.name,
                        &*process.host,
                        process.pid,
                        &*process.id,
                        Stamp::of(process.started_at),
                        purpose.as_deref(),
                        Stamp::of(record.since),
                        Stamp::of(record.until),
                        Number(*ttl_ms),
                        ttl(*ttl_ms),
                        boot_id(),
                    ])
                })
                .map_err(fail)?;
            *token = granted;
            Ok(Ok(Some(LeaseGrant { key: key.clone(), token: FencingToken(granted) })))
        }
        LeaseMutation::Renew { key, token, at, ttl_ms } => {
            let sql = "UPDATE locks SET until = ?1, ttl_ms = ?2, expires_boot_ms = seeknal_boot_ms() + ?3 \
                       WHERE run_id = ?4 AND node_id = ?5 AND token = ?6 AND expires_boot_ms > seeknal_boot_ms() AND boot_id = ?7";
            let end = LeaseRecord::new(key.clone(), *token, nobody(*at), None, *at, *ttl_ms);
            let changed = conn
                .prepare_cached(sql)
                .and_then(|mut statement| {
                    statement.execute(params![
                        Stamp::of(end.until),
                        Number(*ttl_ms),
                        ttl(*ttl_ms),
                        key.run.as_str(),
                        node_column(key),
                        counter(token.0),
                        boot_id()
                    ])
                })
                .map_err(fail)?;
            let grant = LeaseGrant { key: key.clone(), token: *token };
            Ok(if changed == 0 { Err(Refusal::LeaseGone { key: key.clone(), token: *token }) } else { Ok(Some(grant)) })
        }
        LeaseMutation::Release { key, token } => {
            conn.prepare_cached("DELETE FROM locks WHERE run_id = ?1 AND node_id = ?2 AND token = ?3")
                .and_then(|mut statement| statement.execute(params![key.run.as_str(), node_column(key), counter(token.0)]))
                .map_err(fail)?;
            Ok(Ok(None))
        }
        LeaseMutation::Force { token } => {
            let sql = "DELETE FROM locks WHERE token = ?1 AND expires_boot_ms > seeknal_boot_ms() AND (boot_id = ?2 OR ?2 = '')";
            let changed = conn
                .prepare_cached(sql)
                .and_then(|mut statement| statement.execute(params![counter(token.0), of_leases()]))
                .map_err(fail)?;
            if changed > 0 {
                return Ok(Ok(None));
            }
            // What the token was on, nobody knows any more.
            let run = RunId::new("(unknown)").map_err(Refusal::Input);
            Ok(Err(run.map_or_else(|refusal| refusal, |run| Refusal::LeaseGone { key: LeaseKey::run(run), token: *token })))
        }
    }
}

fn nobody(at: chrono::DateTime<chrono::Utc>) -> LeaseOwner {
    LeaseOwner { process: ProcessInfo::current(at), name: "".into() }
}

/// Removes the leases that exclude this key and are over; answers with one that is not.
fn clear_way(conn: &Connection, key: &LeaseKey, deaths: &Deaths<'_>) -> Result<Option<LeaseRecord>, StoreError> {
    let conflicts = if key.node.is_none() {
        "SELECT node_id, token FROM locks WHERE run_id = ?1 AND ?2 = ''"
    } else {
        "SELECT node_id, token FROM locks WHERE run_id = ?1 AND node_id IN ('', ?2)"
    };
    let fail = |error| sql_error(PLACE, error);
    let anything = conn
        .prepare_cached(conflicts)
        .and_then(|mut statement| statement.exists(params![key.run.as_str(), node_column(key)]))
        .map_err(fail)?;
    if !anything {
        return Ok(None);
    }
    let held = concat!(
        "SELECT ",
        record_columns!(),
        " FROM locks WHERE run_id = ?1 AND (?2 = '' OR node_id IN ('', ?2)) AND expires_boot_ms > seeknal_boot_ms() AND boot_id = ?3 LIMIT 1"
    );
    while let Some(holder) = query_records(conn, held, &[&key.run.as_str(), &node_column(key), &boot_id()])?.pop() {
        if !deaths.proven(&holder.owner.process.id) {
            return Ok(Some(holder));
        }
        conn.prepare_cached("DELETE FROM locks WHERE run_id = ?1 AND (?2 = '' OR node_id IN ('', ?2)) AND owner_process = ?3")
            .and_then(|mut statement| statement.execute(params![key.run.as_str(), node_column(key), &*holder.owner.process.id]))
            .map_err(fail)?;
    }
    conn.prepare_cached("DELETE FROM locks WHERE run_id = ?1 AND (?2 = '' OR node_id IN ('', ?2))")
        .and_then(|mut statement| statement.execute(params![key.run.as_str(), node_column(key)]))
        .map_err(fail)?;
    Ok(None)
}
