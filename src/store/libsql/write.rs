//! A decided batch as the statements of one conditional request.
//!
//! ```text
//! BEGIN IMMEDIATE
//!   the batch's id with its answers          a second time: fails, the batch was applied
//!   checks                                   fail if a row that was looked at is newer than it was, a lease is lost, the schema another one
//!   leases that go · check: the way is free · leases that come
//!   rows that go · rows that come · versions of runs
//!   counters
//! COMMIT, or ROLLBACK
//! ```
//!
//! What is written does not name absolute versions but how far they are beyond the run's version: commits of others on other nodes of the same run
//! are no conflict, and need not be known. Many rows are one statement: they are bound as one JSON list (256 nodes take 3 ms this way, and 14 ms as
//! 256 statements).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Error;

use super::answer::{Before, Kept};
use super::hrana::{Arg, Stmt};
use super::lease::{now_ms, others_move};
use super::rows::{JsonRows, row};
use super::{schema, write_leases, write_runs};
use crate::model::{Batch, Guard, LeaseKey, LeaseMutation, Mutation, NodeId, Outcome, Refusal, RunId, Version};
use crate::store::MIGRATION;
use crate::store::columns::node_column;
use crate::store::decide::Decision;
use crate::store::moving::is_kept_out;

/// What makes a check fail: there is no such number.
macro_rules! failing {
    ($condition:expr) => {
        concat!("SELECT CASE WHEN ", $condition, " THEN abs(-9223372036854775808) ELSE 1 END")
    };
}
pub(super) use failing;

/// The statements of a batch, and which of them are checks.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) statements: Vec<Stmt>,
    checks: BTreeSet<usize>,
    /// Those that remove a few of many rows: how many they were is looked at.
    pub(super) sweeps: BTreeSet<usize>,
}

impl Request {
    /// Whether the statement with this index is a check.
    pub(super) fn is_check(&self, index: usize) -> bool {
        self.checks.contains(&index)
    }

    /// Adds a statement for each list of rows; none for no rows.
    pub(super) fn exec(&mut self, sql: &'static str, rows: JsonRows) {
        for list in rows.into_lists() {
            self.statements.push(Stmt::exec(sql, vec![list.into()]));
        }
    }

    /// Adds a check for each list of rows.
    pub(super) fn check(&mut self, sql: &'static str, rows: JsonRows) {
        for list in rows.into_lists() {
            self.check_one(sql, vec![list.into()]);
        }
    }

    /// Adds a check.
    pub(super) fn check_one(&mut self, sql: &'static str, args: Vec<Arg>) {
        self.checks.insert(self.statements.len());
        self.statements.push(Stmt::exec(sql, args));
    }
}

/// What must be so when the request runs, because the decision was built on it.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Runs that are there; whether at exactly the assumed version; whether with the header of then.
    runs: BTreeMap<RunId, (bool, bool)>,
    /// Runs that are not there, and the version that they begin at.
    absent: BTreeMap<RunId, Version>,
    nodes: BTreeSet<(RunId, NodeId)>,
    held: BTreeSet<(RunId, String, u64)>,
    /// Nodes whose lease was granted.
    pub(super) free_nodes: BTreeSet<(RunId, String)>,
    /// Runs whose lease was granted.
    pub(super) free_runs: BTreeSet<RunId>,
    /// Runs that nobody may hold a lease on, nor on one of their nodes, save what is given back in the same batch.
    pub(super) unlocked: BTreeSet<RunId>,
    /// The same of nodes whose lease was granted before the batch frees their run: by then whatever was in the way would be gone.
    pub(super) unlocked_nodes: BTreeSet<(RunId, String)>,
    pub(super) given_back: BTreeSet<(RunId, String, u64)>,
    /// Whether the tokens must be the assumed ones.
    tokens: bool,
}

impl Checks {
    fn of(batch: &Batch, decision: &Decision, before: &Before) -> Self {
        let mut checks = Self::default();
        let mut freed: BTreeSet<&RunId> = BTreeSet::new();
        let mut granted: Vec<&LeaseKey> = Vec::new();
        for (entry, outcome) in batch.entries.iter().zip(&decision.answer.outcomes) {
            let receipt = match outcome {
                Outcome::Applied(receipt) => receipt,
                Outcome::Refused(Refusal::LeaseHeld { holder }) => {
                    // Held by an earlier entry of this batch: its token is told.
                    checks.tokens |= holder.token.0 > before.token;
                    continue;
                }
                Outcome::Refused(_) => continue,
            };
            for (part, run) in entry.parts.iter().zip(&receipt.runs) {
                if before.versions.contains_key(&part.run) {
                    let exact = part.guards.iter().any(|g| matches!(g, Guard::RunVersion(_) | Guard::NodeVersion { .. }))
                        || part.mutations.iter().any(|m| matches!(m, Mutation::Delete { .. }) || m.creates_run());
                    let header = part.mutations.iter().any(Mutation::touches_header)
                        || part.guards.iter().any(|guard| matches!(guard, Guard::RunStatus(_)));
                    let check = checks.runs.entry(part.run.clone()).or_default();
                    *check = (check.0 || exact, check.1 || header);
                    let looked_at =
                        part.mutations.iter().filter_map(Mutation::node).chain(part.guards.iter().filter_map(Guard::node));
                    checks.nodes.extend(looked_at.map(|node| (part.run.clone(), node.clone())));
                } else if run.before == Version::NONE {
                    checks.absent.entry(part.run.clone()).or_insert(run.after);
                }
                // Behind what frees its locks nobody has one; the checks come before that.
                if part.guards.contains(&Guard::Unlocked) && !freed.contains(&part.run) {
                    checks.unlocked.insert(part.run.clone());
                }
            }
            checks.held.extend(
                entry.fences.iter().map(|fence| (fence.key.run.clone(), node_column(&fence.key).to_owned(), fence.token.0)),
            );
            for lease in &entry.leases {
                if let LeaseMutation::Grant { key, .. } = lease
                    && !freed.contains(&key.run)
                {
                    granted.push(key);
                }
                match lease {
                    LeaseMutation::Grant { key, .. } if key.node.is_none() => {
                        checks.free_runs.insert(key.run.clone());
                    }
                    LeaseMutation::Grant { key, .. } => {
                        checks.free_nodes.insert((key.run.clone(), node_column(key).to_owned()));
                    }
                    LeaseMutation::Renew { key, token, ttl_ms, .. } => {
                        let held = (key.run.clone(), node_column(key).to_owned(), token.0);
                        if *ttl_ms == 0 {
                            checks.given_back.insert(held.clone());
                        }
                        checks.held.insert(held);
                    }
                    LeaseMutation::Force { token } => {
                        let held = decision.leases_assumed.iter().find(|row| row.record.token == *token);
                        let held = held
                            .map(|row| (row.record.key.run.clone(), node_column(&row.record.key).to_owned(), row.record.token.0));
                        checks.held.extend(held.clone());
                        checks.given_back.extend(held);
                    }
                    LeaseMutation::Release { key, token } => {
                        checks.given_back.insert((key.run.clone(), node_column(key).to_owned(), token.0));
                    }
                }
            }
            freed
                .extend(entry.parts.iter().filter(|part| part.mutations.iter().any(Mutation::frees_locks)).map(|part| &part.run));
        }
        for key in granted.into_iter().filter(|key| freed.contains(&key.run)) {
            if key.node.is_none() {
                checks.unlocked.insert(key.run.clone());
            } else {
                checks.unlocked_nodes.insert((key.run.clone(), node_column(key).to_owned()));
            }
        }
        checks
    }
}

/// The answer of a batch that was given up: no request with its id is applied any more.
pub(super) const NEVER: &str = "null";

/// Takes the id of a batch, so that none of its requests is applied any more; fails if one was. It took it only if it answers with a row.
pub(super) fn forswear(batch: &Batch) -> Stmt {
    Stmt::ask(
        "batches",
        "INSERT INTO batches (id, at, answers, seq, token, versions) SELECT ?1, unixepoch(), ?2, m.seq, m.token, '{}' FROM meta AS m WHERE m.id = 1 \
         RETURNING seq",
        vec![batch.id.to_string().into(), NEVER.to_owned().into()],
    )
}

/// The statements of a decided batch. `process` is the opening that commits it.
pub(super) fn request(batch: &Batch, decision: &Decision, before: &Before, process: &str) -> Result<Request, Error> {
    let mut request = Request::default();
    let kept = serde_json::to_string(&Kept::of(&decision.answer, before))?;
    let runs: Vec<&RunId> = before.versions.keys().collect();
    request.statements.push(Stmt::ask(
        "batches",
        "INSERT INTO batches (id, at, answers, seq, token, versions) \
         SELECT ?1, unixepoch(), ?2, m.seq, m.token, \
         (SELECT json_group_object(r.run_id, r.version) FROM json_each(?3) AS w CROSS JOIN runs AS r ON r.run_id = w.value) \
         FROM meta AS m WHERE m.id = 1 RETURNING seq, token, versions",
        vec![batch.id.to_string().into(), kept.into(), serde_json::to_string(&runs)?.into()],
    ));
    let checks = Checks::of(batch, decision, before);
    check_rows(&mut request, &checks, before)?;
    let is_applied = |(entry, outcome)| matches!(outcome, &Outcome::Applied(_)) && is_kept_out(entry);
    if batch.entries.iter().zip(&decision.answer.outcomes).any(is_applied) {
        request.check_one(
            failing!(concat!("EXISTS (SELECT 1 FROM locks AS l WHERE ", others_move!("?1", "?2"), ")")),
            vec![MIGRATION.into(), process.into()],
        );
    }
    write_leases::check_unlocked(&mut request, &checks)?;
    write_leases::leases(&mut request, &checks, &decision.writes.leases, before)?;
    write_runs::runs(&mut request, &decision.writes, before)?;
    write_runs::retained(&mut request, &decision.writes)?;
    let moved = |last: Option<u64>, assumed: u64| last.unwrap_or(assumed).saturating_sub(assumed);
    let (seqs, tokens) = (moved(decision.writes.seqs.last(), before.seq), moved(decision.writes.tokens.last(), before.token));
    if (seqs, tokens) != (0, 0) {
        request.statements.push(Stmt::exec(
            "UPDATE meta SET seq = seq + ?1, token = token + ?2 WHERE id = 1",
            vec![seqs.into(), tokens.into()],
        ));
    }
    Ok(request)
}

fn check_rows(request: &mut Request, checks: &Checks, before: &Before) -> Result<(), Error> {
    request.check_one(
        failing!(
            "(SELECT version FROM seeknal_schema WHERE id = 1) <> ?1 OR (?2 >= 0 AND (SELECT token FROM meta WHERE id = 1) <> ?2) \
             OR EXISTS (SELECT 1 FROM meta WHERE id = 1 AND (seq < ?3 OR token < ?4))"
        ),
        vec![
            schema::VERSION.into(),
            if checks.tokens { before.token.into() } else { Arg::Integer(-1) },
            // They never go back, but where an older state was brought back.
            before.seq.into(),
            before.token.into(),
        ],
    );
    let mut list = JsonRows::default();
    for (run, (exact, header)) in &checks.runs {
        row!(list, run, before.versions.get(run), u8::from(*exact), u8::from(*header));
    }
    request.check(
        failing!(
            "EXISTS (SELECT 1 FROM json_each(?1) AS w LEFT JOIN runs AS r ON r.run_id = w.value->>0 \
             WHERE r.run_id IS NULL OR r.version < w.value->>1 OR r.created_version > w.value->>1 OR r.nodes_deleted_version > w.value->>1 \
             OR (w.value->>2 AND r.version <> w.value->>1) OR (w.value->>3 AND r.header_version > w.value->>1))"
        ),
        list,
    );
    let mut list = JsonRows::default();
    for (run, version) in &checks.absent {
        row!(list, run, version);
    }
    request.check(
        failing!(
            "EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN runs AS r ON r.run_id = w.value->>0) \
             OR EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN tombstones AS t ON t.run_id = w.value->>0 WHERE t.version >= w.value->>1)"
        ),
        list,
    );
    let mut list = JsonRows::default();
    for (run, node) in &checks.nodes {
        row!(list, run, node, before.versions.get(run));
    }
    request.check(
        failing!(
            "EXISTS (SELECT 1 FROM json_each(?1) AS w CROSS JOIN node_states AS n ON n.run_id = w.value->>0 AND n.node_id = w.value->>1 \
             WHERE n.version > w.value->>2)"
        ),
        list,
    );
    let mut list = JsonRows::default();
    for (run, node, token) in &checks.held {
        row!(list, run, node, token);
    }
    request.check(
        failing!(concat!(
            "EXISTS (SELECT 1 FROM json_each(?1) AS w LEFT JOIN locks AS l ON l.run_id = w.value->>0 AND l.node_id = w.value->>1 \
             AND l.token = w.value->>2 AND l.expires_ms > ",
            now_ms!(),
            " WHERE l.run_id IS NULL)"
        )),
        list,
    );
    Ok(())
}
