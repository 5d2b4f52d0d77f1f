//! Leases as rows. Whether one is over is decided by the server's clock, in the statement that asks.

use super::client::Client;
use super::hrana::Stmt;
use super::read::{self, last_of_full};
use super::rows::Fields;
use crate::model::{FencingToken, LeaseKey, LeaseOwner, LeaseRecord, ProcessInfo};
use crate::store::StoreError;

/// The server's clock in milliseconds since 1970, in SQL.
macro_rules! now_ms {
    () => {
        "CAST(unixepoch('subsec') * 1000 AS INTEGER)"
    };
}
pub(super) use now_ms;

/// When a lease ends that lasts so many milliseconds from now, for people: what `expires_ms` says, as a stamp.
macro_rules! until {
    ($ttl:literal) => {
        concat!(
            "strftime('%Y-%m-%dT%H:%M:%f000Z', (CAST(unixepoch('subsec') * 1000 AS INTEGER) + ",
            $ttl,
            ") / 1000.0, 'unixepoch')"
        )
    };
}
pub(super) use until;

/// The columns of a lease, in the order of [`record`].
macro_rules! record_columns {
    () => {
        "l.run_id, l.node_id, l.token, l.owner, l.owner_host, l.owner_pid, l.owner_process, l.owner_started_at, l.purpose, l.since, \
         l.until, l.ttl_ms"
    };
}
pub(super) use record_columns;

/// That somebody else moves the state: the lease on this key is held, and not by this opening.
macro_rules! others_move {
    ($key:literal, $own:literal) => {
        concat!(
            "l.run_id = ",
            $key,
            " AND l.node_id = '' AND l.owner_process <> ",
            $own,
            " AND l.expires_ms > CAST(unixepoch('subsec') * 1000 AS INTEGER)"
        )
    };
}
pub(super) use others_move;

/// How far the clock has gone back at least where it is told from one that is put right a little, milliseconds.
const BACK_MS: u64 = 1_000;

/// Lets leases that would last longer than they live end when those do that are renewed now: the server's clock went back since, and by as much longer a dead
/// holder would keep everybody out. They do not end earlier: who lives trusts his lease by a clock of his own, and is not heard before his next renewal.
///
/// With a process only if its last word lies in the future; otherwise no lock is looked at.
pub(super) fn shorten(process: Option<&ProcessInfo>) -> Stmt {
    // As `ttl` has it; of a time to live that is no whole number of 64 bits there is a text.
    const LIFE: &str = "min(CAST(l.ttl_ms AS INTEGER), 9223372036854)";
    let now = now_ms!();
    let (looks, values) = match process {
        Some(process) => (
            format!("openings AS o CROSS JOIN locks AS l WHERE o.process = ?1 AND o.seen_ms > {now} + {BACK_MS} AND"),
            vec![(&*process.id).into()],
        ),
        None => ("locks AS l WHERE".to_owned(), Vec::new()),
    };
    Stmt::exec(
        format!(
            "UPDATE locks AS l SET until = strftime('%Y-%m-%dT%H:%M:%f000Z', ({now} + {LIFE}) / 1000.0, 'unixepoch'), expires_ms = {now} + {LIFE} \
             WHERE (l.run_id, l.node_id) IN (SELECT l.run_id, l.node_id FROM {looks} l.expires_ms > {now} + {LIFE} + {BACK_MS})"
        ),
        values,
    )
}

/// A lease from its row.
pub(super) fn record(fields: Fields<'_>) -> Result<LeaseRecord, StoreError> {
    let run = fields.run_id(0)?;
    let node = match fields.text(1)? {
        "" => None,
        _ => Some(fields.node_id(1)?),
    };
    let mut process = ProcessInfo::current(fields.stamp(7)?);
    process.id = fields.text(6)?.into();
    process.host = fields.text(4)?.into();
    process.pid = fields.small(5)?;
    let owner = LeaseOwner { process, name: fields.text(3)?.into() };
    let purpose = fields.text_or_null(8)?.map(Into::into);
    let token = FencingToken(fields.number(2)?);
    let mut record = LeaseRecord::new(LeaseKey { run, node }, token, owner, purpose, fields.stamp(9)?, fields.number(11)?);
    record.until = fields.stamp(10)?;
    Ok(record)
}

/// All leases that are held and not over, in the order in which they were granted.
pub(super) async fn list(client: &Client) -> Result<Vec<LeaseRecord>, StoreError> {
    let mut limit = 10_000;
    let mut all: Vec<LeaseRecord> = Vec::new();
    loop {
        let after = all.last().map_or(0, |last| last.token.0);
        let question = |limit: u64| {
            Stmt::ask(
                "locks",
                concat!(
                    "SELECT ",
                    record_columns!(),
                    " FROM locks AS l WHERE l.token > ?1 AND l.expires_ms > ",
                    now_ms!(),
                    " ORDER BY l.token LIMIT ?2"
                ),
                vec![after.into(), limit.into()],
            )
        };
        let page = read::page(client, &mut limit, question).await?;
        for row in page.rows() {
            all.push(record(row)?);
        }
        if last_of_full(&page, limit).is_none() {
            return Ok(all);
        }
    }
}
