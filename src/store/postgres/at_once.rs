//! A batch on runs that only this opening writes to, in one statement.
//!
//! ```text
//!     decide, on the heads as this opening left them
//! ──► the batch's id and answer ─ run rows moved on, if all are as they were left ─ nodes
//! ```
//!
//! Whether somebody else wrote is asked by the statement itself: a run that is not where it was left makes it fail, and with it all of it; the batch is then
//! decided [on what is stored](super::commit). A run's version grows with every commit on it, and none is given out twice: where it is what was left, so is
//! everything else of the run. Numbers are drawn with the batch's id, before the runs are locked: whoever writes to one of them later and draws earlier finds
//! other versions than he takes them to have, or locks them first and has them moved when we come.
//!
//! One statement is a transaction by itself, which commits before its end is told: what a server refuses of it has not happened. But while its answer is
//! missing it may still be on its way, and find the batch's id free: a sending again under that id proves nothing, unless it commits. What is certain of that one
//! is so of both once the id is taken for good.

use std::collections::{BTreeMap, HashSet};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::commit::{HEAVY, Pace, changed_runs};
use super::connection::{Conn, Failed, Param, Sql};
use super::error::{corrupt, is_met_by_others};
use super::groups::{self, Filled};
use super::rows::{Fields, counter};
use super::sql::weight;
use super::{Shared, schema, write};
use crate::model::{Batch, BatchAnswer, BatchId, CommitSeq, Outcome, RunId, Version};
use crate::store::decide::{self, Decision, NodesWanted, Numbers, Rows, Wanted};
use crate::store::{MIGRATION, StoreError, StoreErrorKind, short_answer};

/// Values of the statement before those of the nodes.
const VALUES: usize = 9;

/// Each part stands on the one before it, so that they run in this order, and rows of runs are taken in that of their ids as the column sorts. A text that is no
/// number ends all of it: what it says stands in the server's log. Versions are compared behind the join, for which no other plan is then better than by key.
fn text(filled: Filled) -> String {
    format!(
        "WITH drawn AS MATERIALIZED (SELECT array_agg(nextval('commit_seq')) AS seqs FROM generate_series(1, $3::bigint)), \
         kept AS (INSERT INTO batches (id, at, answers) \
         SELECT $1::uuid, clock_timestamp(), $2::bytea || convert_to(array_to_string(seqs, ','), 'UTF8') FROM drawn RETURNING 1), \
         moved AS (UPDATE runs AS r SET version = r.version + k.steps \
         FROM (SELECT k.run_id, k.version, k.steps FROM kept, unnest($4::text[], $5::bigint[], $6::bigint[]) AS k (run_id, version, steps) \
         ORDER BY k.run_id COLLATE \"C\") AS k WHERE r.run_id = k.run_id RETURNING r.version - k.steps = k.version AS as_left), \
         sound AS MATERIALIZED (SELECT (CASE WHEN (SELECT count(*) FILTER (WHERE as_left) FROM moved) = cardinality($4) \
         AND (SELECT schema_version FROM meta WHERE id = 1) <= $7::integer \
         AND NOT EXISTS (SELECT 1 FROM locks WHERE run_id = $8 AND node_id = '' AND owner_process <> $9 AND expires_at > clock_timestamp()) \
         THEN '1' ELSE 'seeknal: another process works on these runs as well, and the batch is decided again' END)::integer AS one), \
         put AS ({}) SELECT seqs FROM drawn, sound",
        groups::text(filled, VALUES, ", sound")
    )
}

/// An answer that is empty says that there will be none.
const KEEP_OUT: &str =
    "INSERT INTO batches (id, at, answers) VALUES ($1, clock_timestamp(), '') ON CONFLICT DO NOTHING RETURNING 1";

/// The statement for nodes in which these groups hold anything.
pub(super) fn statement(filled: Filled) -> &'static str {
    static TEXTS: LazyLock<Vec<String>> = LazyLock::new(|| groups::all(text));
    TEXTS.get(filled.number()).map_or("", String::as_str)
}

/// Batches that went down at once and were not answered: they may still be on their way.
#[derive(Debug, Default)]
pub(super) struct Unanswered(Mutex<HashSet<BatchId>>);

impl Unanswered {
    fn ids(&self) -> MutexGuard<'_, HashSet<BatchId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn holds(&self, id: BatchId) -> bool {
        self.ids().contains(&id)
    }

    /// Whether it was one.
    pub(super) fn forget(&self, id: BatchId) -> bool {
        self.ids().remove(&id)
    }
}

/// What was decided on known heads.
struct Plan {
    decision: Decision,
    /// The answer as it is stored, but for the numbers.
    stored: Vec<u8>,
}

/// Decides a batch that needs nothing but the heads of its runs, if they are known; `None` where rows have to be read.
fn plan(shared: &Shared, batch: &Batch, wanted: &Wanted) -> Option<Plan> {
    let plain = wanted.steps.is_some() && wanted.leases.is_empty() && wanted.mutexes.is_empty() && wanted.tokens == 0;
    // What may still be on its way is met by its id, and only then.
    if !plain || wanted.runs.is_empty() || shared.unanswered.holds(batch.id) {
        return None;
    }
    let known = shared.pool.heads.of(&wanted.runs)?;
    let own = shared.pool.own.of(&wanted.runs).into_iter().collect();
    if !NodesWanted::of(batch, &known, &own).is_empty() {
        return None;
    }
    let rows = Rows {
        heads: known,
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
    Some(Plan { decision, stored })
}

/// Commits a batch in one way there and back, if that can be; `None`: it cannot, and nothing has happened.
pub(super) async fn commit(
    shared: &Shared,
    conn: &mut Conn,
    batch: &Batch,
    wanted: &Wanted,
    pace: &Pace,
) -> Result<Option<BatchAnswer>, StoreError> {
    let Some(Plan { decision, stored }) = plan(shared, batch, wanted) else { return Ok(None) };
    let Decision { mut answer, writes, assumed, .. } = decision;
    let Some(rows) = write::nodes_alone(&writes) else { return Ok(None) };
    let (filled, nodes) = write::columns_of(&rows)?;
    let mut params: Vec<Param<'_>> =
        vec![Box::new(Uuid::from_bytes(*batch.id.as_bytes())), Box::new(stored), Box::new(counter(wanted.seqs as u64))];
    params.extend(moves(wanted, &assumed));
    params.push(Box::new(schema::SCHEMA_VERSION));
    params.push(Box::new(MIGRATION));
    params.push(Box::new(&*shared.process.id));
    params.extend(nodes);
    let sql = [Sql::new("tables batches, runs, node_states", statement(filled), params)];
    if weight(&sql) > HEAVY {
        return Ok(None);
    }
    conn.prepare(&sql).await.map_err(|failed| failed.error)?;
    // Before it is on its way: this may be dropped at any moment from then on.
    shared.unanswered.ids().insert(batch.id);
    shared.pool.heads.forget(&wanted.runs);
    pace.decided();
    let told = match conn.send(&sql).await {
        Ok(told) => told,
        Err(Failed { error, by_server: false, .. }) => return Err(error.into_unknown()),
        Err(Failed { error, .. }) => {
            shared.unanswered.forget(batch.id);
            if is_met_by_others(&error) {
                pace.undecided();
                return Ok(None);
            }
            return Err(error);
        }
    };
    drop(sql);
    let seqs: Option<Vec<i64>> = match told.first().and_then(|rows| rows.first()) {
        Some(row) => Fields::new(row, "the commit sequence").get(0).map_err(StoreError::into_unknown)?,
        None => None,
    };
    // Where they are not there it is stored all the same: sent again it is answered by what is there.
    number(&mut answer, seqs.unwrap_or_default())
        .ok_or_else(|| corrupt("the commit sequence", "there are not as many numbers as were asked for").into_unknown())?;
    shared.unanswered.forget(batch.id);
    drop(rows);
    shared.pool.heads.go_on(writes);
    if let Some(follower) = shared.follower() {
        follower.committed(changed_runs(&answer), false);
    }
    Ok(Some(answer))
}

/// Takes the id of a batch that may still be on its way: what comes later finds it taken, and changes nothing. `false`: that could not be done, or it came first.
pub(super) async fn keep_out(shared: &Shared, id: BatchId) -> bool {
    let Ok(mut conn) = shared.pool.get().await else { return false };
    let key = Uuid::from_bytes(*id.as_bytes());
    let Ok(taken) = conn.ask(Sql::new("table batches", KEEP_OUT, vec![Box::new(key)])).await else { return false };
    shared.pool.put(conn);
    if !taken.is_empty() {
        shared.unanswered.forget(id);
    }
    !taken.is_empty()
}

/// What is told of a batch whose id was taken so, also to whoever did not hear whether it was.
pub(super) fn was_kept_out(place: String) -> StoreError {
    let message = format!("{place}: a sending of it was lost, and it was given up; nothing of it was written, try again");
    StoreError::not_applied(StoreErrorKind::Busy, message).never_applied()
}

/// Where the runs were left, and by how much each goes on.
fn moves<'a>(wanted: &'a Wanted, assumed: &BTreeMap<RunId, Option<Version>>) -> [Param<'a>; 3] {
    let (mut runs, mut versions, mut steps): (Vec<&str>, Vec<i64>, Vec<i64>) = Default::default();
    for (run, of_run) in wanted.steps.iter().flatten() {
        runs.push(run.as_str());
        versions.push(assumed.get(run).copied().flatten().map_or(0, |version| counter(version.0)));
        steps.push(counter(*of_run));
    }
    [Box::new(runs), Box::new(versions), Box::new(steps)]
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
