//! Leases in the statements of a batch: what goes, whether the way is free, what comes.

use serde_json::Error;

use super::answer::Before;
use super::hrana::Stmt;
use super::lease::{now_ms, until};
use super::rows::{JsonRows, Number, row, stamp_text};
use super::write::{Checks, Request, failing};
use crate::store::columns::{node_column, ttl};
use crate::store::decide::LeaseWrites;

/// Checks that nobody holds a lease, before anything of leases is changed.
pub(super) fn check_unlocked(request: &mut Request, checks: &Checks) -> Result<(), Error> {
    let given_back = serde_json::to_string(&checks.given_back)?;
    if !checks.unlocked.is_empty() {
        request.check_one(
            failing!(concat!(
                "EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN locks AS l ON l.run_id = w.value WHERE l.expires_ms > ",
                now_ms!(),
                " AND (l.run_id, l.node_id, l.token) NOT IN (SELECT value->>0, value->>1, value->>2 FROM json_each(?2)))"
            )),
            vec![serde_json::to_string(&checks.unlocked)?.into(), given_back.as_str().into()],
        );
    }
    if !checks.unlocked_nodes.is_empty() {
        request.check_one(
            failing!(concat!(
                "EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN locks AS l ON l.run_id = w.value->>0 AND l.node_id IN ('', w.value->>1) \
                 WHERE l.expires_ms > ",
                now_ms!(),
                " AND (l.run_id, l.node_id, l.token) NOT IN (SELECT value->>0, value->>1, value->>2 FROM json_each(?2)))"
            )),
            vec![serde_json::to_string(&checks.unlocked_nodes)?.into(), given_back.into()],
        );
    }
    Ok(())
}

/// What goes, what comes and what is renewed.
pub(super) fn leases(request: &mut Request, checks: &Checks, writes: &LeaseWrites, before: &Before) -> Result<(), Error> {
    let mut list = JsonRows::default();
    for run in &writes.freed {
        row!(list, run);
    }
    request.exec("DELETE FROM locks WHERE run_id IN (SELECT value->>0 FROM json_each(?1))", list);
    let mut list = JsonRows::default();
    for (key, token) in &writes.removed {
        row!(list, key.run, node_column(key), token);
    }
    request.exec(
        "DELETE FROM locks WHERE (run_id, node_id, token) IN (SELECT value->>0, value->>1, value->>2 FROM json_each(?1))",
        list,
    );
    free_ways(request, checks)?;
    let mut list = JsonRows::default();
    for (key, lease) in &writes.granted {
        let process = &lease.owner.process;
        row!(
            list,
            key.run,
            node_column(key),
            lease.token.0.saturating_sub(before.token),
            lease.owner.name,
            process.host,
            process.pid,
            process.id,
            stamp_text(process.started_at),
            lease.purpose,
            stamp_text(lease.since),
            Number(lease.ttl_ms),
            ttl(lease.ttl_ms),
        );
    }
    request.exec(
        concat!(
            "INSERT INTO locks (run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, until, \
             ttl_ms, expires_ms) \
             SELECT w.value->>0, w.value->>1, m.token + (w.value->>2), w.value->>3, w.value->>4, w.value->>5, w.value->>6, w.value->>7, \
             w.value->>8, w.value->>9, ",
            until!("(w.value->>11)"),
            ", w.value->>10, ",
            now_ms!(),
            " + (w.value->>11) FROM json_each(?1) AS w CROSS JOIN meta AS m WHERE m.id = 1 \
             ON CONFLICT (run_id, node_id) DO UPDATE SET token = excluded.token, owner = excluded.owner, owner_host = excluded.owner_host, \
             owner_pid = excluded.owner_pid, owner_process = excluded.owner_process, owner_started_at = excluded.owner_started_at, \
             purpose = excluded.purpose, since = excluded.since, until = excluded.until, ttl_ms = excluded.ttl_ms, \
             expires_ms = excluded.expires_ms"
        ),
        list,
    );
    let mut list = JsonRows::default();
    for (key, renewed) in &writes.renewed {
        row!(list, key.run, node_column(key), renewed.token, Number(renewed.ttl_ms), ttl(renewed.ttl_ms));
    }
    request.exec(
        concat!(
            "UPDATE locks SET until = ",
            until!("(w.value->>4)"),
            ", ttl_ms = w.value->>3, expires_ms = ",
            now_ms!(),
            " + (w.value->>4) FROM json_each(?1) AS w \
             WHERE locks.run_id = w.value->>0 AND locks.node_id = w.value->>1 AND locks.token = w.value->>2"
        ),
        list,
    );
    Ok(())
}

/// Removes leases that are over where new ones come, and checks that no other one is in the way.
fn free_ways(request: &mut Request, checks: &Checks) -> Result<(), Error> {
    let mut nodes = JsonRows::default();
    for (run, node) in &checks.free_nodes {
        row!(nodes, run, node);
    }
    let mut runs = JsonRows::default();
    for run in &checks.free_runs {
        row!(runs, run);
    }
    for list in nodes.into_lists() {
        request.statements.push(Stmt::exec(
            concat!(
                "DELETE FROM locks WHERE (run_id, node_id) IN (SELECT value->>0, '' FROM json_each(?1)) AND expires_ms <= ",
                now_ms!()
            ),
            vec![list.as_str().into()],
        ));
        request.check_one(
            failing!(concat!(
                "EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN locks AS l ON l.run_id = w.value->>0 AND l.node_id IN ('', w.value->>1) \
                 WHERE l.expires_ms > ",
                now_ms!(),
                ")"
            )),
            vec![list.into()],
        );
    }
    for list in runs.into_lists() {
        request.statements.push(Stmt::exec(
            concat!("DELETE FROM locks WHERE run_id IN (SELECT value->>0 FROM json_each(?1)) AND expires_ms <= ", now_ms!()),
            vec![list.as_str().into()],
        ));
        request.check_one(
            failing!(concat!(
                "EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN locks AS l ON l.run_id = w.value->>0 WHERE l.expires_ms > ",
                now_ms!(),
                ")"
            )),
            vec![list.into()],
        );
    }
    Ok(())
}
