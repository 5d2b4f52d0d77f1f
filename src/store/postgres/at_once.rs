//! A batch on runs that only this opening writes to, in one way there and back.
//!
//! ```text
//!     decide, on the heads as this opening left them
//! ──► BEGIN ─ the batch's id and answer ─ run rows moved on, if all are as they were left ─ nodes ─ COMMIT
//! ```
//!
//! Whether somebody else wrote is asked by the statement that moves the runs on: one that is not where it was left makes it fail, and with it the
//! transaction; the batch is then decided [on what is stored](super::commit). A run's version grows with every commit on it, and none is given out twice: where it is
//! what was left, so is everything else of the run. Numbers are drawn with the batch's id, before the runs are locked: whoever writes
//! to one of them later and draws earlier finds other versions than he takes them to have, or locks them first and has them moved when we come.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::commit::{COMMIT, HEAVY, Pace, changed_runs, moved};
use super::connection::{Conn, Failed, Sql};
use super::error::{corrupt, is_met_by_others};
use super::lock::BEGIN;
use super::rows::{Fields, counter};
use super::sql::weight;
use super::{Shared, schema, write};
use crate::model::{Batch, BatchAnswer, CommitSeq, Outcome, RunId};
use crate::store::decide::{self, Decision, Head, NodesWanted, Numbers, Rows, Wanted};
use crate::store::{MIGRATION, StoreError, short_answer};

/// It looks into `meta` as every commit does before it takes anything else: who raises all numbers keeps others out there.
const KEEP_ANSWER: &str = "WITH drawn AS MATERIALIZED (SELECT array_agg(nextval('commit_seq')) AS seqs FROM generate_series(1, $3::bigint)) \
     INSERT INTO batches (id, at, answers) SELECT $1, clock_timestamp(), $2::bytea || convert_to(array_to_string(seqs, ','), 'UTF8') \
     FROM drawn, meta WHERE meta.id = 1 RETURNING (SELECT seqs FROM drawn)";
/// A text that is no number ends the transaction: what it says stands in the server's log. Sorted in a set of its own, as the column is.
const MOVE_KNOWN: &str = "WITH moved AS (UPDATE runs AS r SET version = k.version + k.steps \
     FROM (SELECT run_id, version, steps FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS k (run_id, version, steps) \
     ORDER BY run_id COLLATE \"C\") AS k WHERE r.run_id = k.run_id AND r.version = k.version RETURNING 1) \
     SELECT (CASE WHEN (SELECT count(*) FROM moved) = cardinality($1) AND (SELECT schema_version FROM meta WHERE id = 1) <= $4 \
     AND NOT EXISTS (SELECT 1 FROM locks WHERE run_id = $5 AND node_id = '' AND owner_process <> $6 AND expires_at > clock_timestamp()) \
     THEN '1' ELSE 'seeknal: another process works on these runs as well, and the batch is decided again' END)::integer";

/// The statements of every such transaction.
pub(super) const TEXTS: [&str; 2] = [KEEP_ANSWER, MOVE_KNOWN];

/// Their places among what is sent.
const ANSWER_AT: usize = 1;
const MOVE_AT: usize = 2;

/// What was decided on known heads.
struct Plan {
    known: BTreeMap<RunId, Option<Head>>,
    decision: Decision,
    /// The answer as it is stored, but for the numbers.
    stored: Vec<u8>,
}

/// Decides a batch that needs nothing but the heads of its runs, if they are known; `None` where rows have to be read.
fn plan(shared: &Shared, batch: &Batch, wanted: &Wanted) -> Option<Plan> {
    let plain = wanted.steps.is_some() && wanted.leases.is_empty() && wanted.mutexes.is_empty() && wanted.tokens == 0;
    if !plain || wanted.runs.is_empty() || batch.entries.iter().any(|entry| !entry.retained.is_empty()) {
        return None;
    }
    let known = shared.pool.heads.of(&wanted.runs)?;
    let own = shared.pool.own.of(&wanted.runs).into_iter().collect();
    if !NodesWanted::of(batch, &known, &own).is_empty() {
        return None;
    }
    let rows = Rows {
        heads: known.clone(),
        headers: BTreeMap::new(),
        nodes: BTreeMap::new(),
        whole: [].into(),
        leases: Vec::new(),
        own,
        // In their places until the server says which they are.
        seqs: Numbers::After(0),
        tokens: Numbers::Drawn([].into()),
        moving: None,
    };
    // Whatever is refused is refused on rows that are stored.
    let decision = decide::decide(batch, rows).ok()?;
    let stored = short_answer::write_unnumbered(&decision.answer)?;
    Some(Plan { known, decision, stored })
}

/// Commits a batch in one way there and back, if that can be; `None`: it cannot, and nothing has happened.
pub(super) async fn commit(
    shared: &Shared,
    conn: &mut Conn,
    batch: &Batch,
    wanted: &Wanted,
    pace: &Pace,
) -> Result<Option<BatchAnswer>, StoreError> {
    let Some(Plan { known, decision, stored }) = plan(shared, batch, wanted) else { return Ok(None) };
    let Decision { mut answer, writes, assumed, .. } = decision;
    let moved = moved(wanted, &known);
    let mut statements = vec![
        Sql::plain(BEGIN),
        Sql::new(
            "table batches",
            KEEP_ANSWER,
            vec![Box::new(Uuid::from_bytes(*batch.id.as_bytes())), Box::new(stored), Box::new(counter(wanted.seqs as u64))],
        ),
        move_known(shared, wanted, &known),
    ];
    statements.extend(write::plan(&writes, &moved)?);
    statements.push(Sql::plain(COMMIT));
    if weight(&statements) > HEAVY {
        return Ok(None);
    }
    conn.prepare(&statements).await.map_err(|failed| failed.error)?;
    let commit = statements.len().saturating_sub(1);
    pace.decided();
    let told = match conn.send(&statements).await {
        Ok(told) => told,
        Err(Failed { index, error, by_server }) => {
            shared.pool.heads.forget(&wanted.runs);
            let certain = by_server && index < commit;
            if certain && matches!(index, ANSWER_AT | MOVE_AT) && is_met_by_others(&error) {
                pace.undecided();
                return Ok(None);
            }
            return Err(match (certain, index) {
                (false, _) => error.into_unknown(),
                (true, ..=ANSWER_AT) => error,
                // The batch's id was free: whoever sent it before has not committed, and is not going to.
                (true, _) => error.never_applied(),
            });
        }
    };
    drop(statements);
    let seqs: Option<Vec<i64>> = match told.get(ANSWER_AT).and_then(|rows| rows.first()) {
        Some(row) => Fields::new(row, "the commit sequence").get(0).map_err(StoreError::into_unknown)?,
        None => None,
    };
    number(&mut answer, seqs.unwrap_or_default()).ok_or_else(|| {
        // It is stored: sent again it is answered by what is there.
        shared.pool.heads.forget(&wanted.runs);
        corrupt("the commit sequence", "there are not as many numbers as were asked for").into_unknown()
    })?;
    shared.pool.heads.note(&assumed, writes);
    if let Some(follower) = shared.follower() {
        follower.committed(changed_runs(&answer), false);
    }
    Ok(Some(answer))
}

fn move_known<'a>(shared: &'a Shared, wanted: &'a Wanted, known: &BTreeMap<RunId, Option<Head>>) -> Sql<'a> {
    let (mut runs, mut versions, mut steps): (Vec<&str>, Vec<i64>, Vec<i64>) = Default::default();
    for (run, of_run) in wanted.steps.iter().flatten() {
        runs.push(run.as_str());
        versions.push(known.get(run).and_then(Option::as_ref).map_or(0, |head| counter(head.version.0)));
        steps.push(counter(*of_run));
    }
    Sql::new(
        "table runs",
        MOVE_KNOWN,
        vec![
            Box::new(runs),
            Box::new(versions),
            Box::new(steps),
            Box::new(schema::SCHEMA_VERSION),
            Box::new(MIGRATION),
            Box::new(&*shared.process.id),
        ],
    )
}

/// Puts the numbers that were drawn in their places.
fn number(answer: &mut BatchAnswer, seqs: Vec<i64>) -> Option<()> {
    if seqs.len() != answer.outcomes.len() {
        return None;
    }
    for (outcome, seq) in answer.outcomes.iter_mut().zip(seqs) {
        let Outcome::Applied(receipt) = outcome else { return None };
        receipt.seq = CommitSeq(u64::try_from(seq).ok()?);
    }
    Some(())
}
