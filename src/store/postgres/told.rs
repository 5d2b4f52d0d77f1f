//! Rows that nobody asks for any more: answers that were told, and what openings that are gone left. Only room depends on them.

use std::collections::VecDeque;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::connection::{Conn, Sql};
use super::{Shared, commit, openings};
use crate::model::{Batch, BatchAnswer, BatchId};
use crate::store::StoreError;
use crate::store::boot_time::boot_time;

/// Answers of this opening that are kept at least. Whoever has seen an answer does not ask again; the rest is for those who sit between.
const ANSWERS_KEPT: usize = 512;

/// Answers that are removed together.
const ANSWERS_AT_ONCE: usize = 256;

/// Between two looks for what openings that are gone left; each opening looks at its beginning, too.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);

/// As long as silence does not count yet: short openings alone should not pile up.
const SWEEP_AGAIN: Duration = Duration::from_secs(20);

/// How many rows of each table are removed together then.
const SWEPT_AT_ONCE: i64 = 5_000;

/// After a connection that failed.
const REST: Duration = Duration::from_secs(1);

/// What is to be removed, and when. Times are since the machine was started.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Batches of this opening whose answers are stored and were told, oldest first.
    ids: VecDeque<BatchId>,
    /// When it is looked for what the others left.
    sweep_at: Duration,
    rests_until: Duration,
    at_work: bool,
}

impl Told {
    fn is_sweep_due(&self, now: Duration) -> bool {
        now >= self.sweep_at
    }

    fn are_many(&self) -> bool {
        self.ids.len() >= ANSWERS_KEPT + ANSWERS_AT_ONCE
    }

    /// Notes one more; whether somebody is to go to work.
    fn note(&mut self, id: BatchId, now: Duration) -> bool {
        self.ids.push_back(id);
        let due = !self.at_work && now >= self.rests_until && (self.are_many() || self.is_sweep_due(now));
        self.at_work |= due;
        due
    }

    /// The oldest ones, where there are many.
    fn take(&mut self) -> Vec<BatchId> {
        if self.are_many() { self.ids.drain(..ANSWERS_AT_ONCE).collect() } else { Vec::new() }
    }

    fn put_back(&mut self, ids: Vec<BatchId>) {
        ids.into_iter().rev().for_each(|id| self.ids.push_front(id));
    }

    fn worked(&mut self, well: bool, now: Duration) {
        self.at_work = false;
        if !well {
            self.rests_until = now.saturating_add(REST);
        }
    }
}

/// Applies a batch, unless a failed one before it is not settled.
pub(super) async fn settle(shared: &Shared, batch: &Batch) -> Result<BatchAnswer, StoreError> {
    shared.unsettled().check(batch.id, &shared.pool.place.name)?;
    let answer = commit::commit(shared, batch).await;
    shared.unsettled().note(batch.id, &answer);
    answer
}

/// Removes what is due, many rows at a time and seldom, beside the commits.
pub(super) async fn prune(shared: &Shared) {
    let well = match shared.pool.get().await {
        Ok(mut conn) => {
            let well = remove(shared, &mut conn).await.is_ok();
            if well {
                shared.pool.put(conn);
            }
            well
        }
        Err(_) => false,
    };
    shared.told().worked(well, boot_time());
}

async fn remove(shared: &Shared, conn: &mut Conn) -> Result<(), StoreError> {
    let old = shared.told().take();
    if !old.is_empty() {
        let ids: Vec<Uuid> = old.iter().map(|id| Uuid::from_bytes(*id.as_bytes())).collect();
        let removal = Sql::new("table batches", "DELETE FROM batches WHERE id = ANY($1)", vec![Box::new(ids)]);
        if let Err(error) = conn.ask(removal).await {
            shared.told().put_back(old);
            return Err(error);
        }
    }
    while shared.told().is_sweep_due(boot_time()) {
        sweep(shared, conn).await?;
    }
    Ok(())
}

/// Removes some of what nobody will ask for any more, a day after it was written or was over: openings that are gone, their answers, tombstones, and locks that
/// nobody asked for again. Rows that somebody else has in hand are left to him.
pub(super) async fn sweep(shared: &Shared, conn: &mut Conn) -> Result<(), StoreError> {
    openings::bring_back(conn).await?;
    let silence_counts = shared.follower.contact().is_long(boot_time());
    let mut more = false;
    for (place, sql) in [
        ("table openings", openings::forget(silence_counts)),
        (
            "table batches",
            "DELETE FROM batches WHERE id = ANY(ARRAY(SELECT id FROM batches WHERE at < clock_timestamp() - interval '1 day' \
             LIMIT $1 FOR UPDATE SKIP LOCKED)) RETURNING 1",
        ),
        (
            "table tombstones",
            "DELETE FROM tombstones WHERE run_id = ANY(ARRAY(SELECT run_id FROM tombstones WHERE deleted_at < clock_timestamp() - interval '1 day' \
             LIMIT $1 FOR UPDATE SKIP LOCKED)) RETURNING 1",
        ),
        (
            "table locks",
            "DELETE FROM locks WHERE token = ANY(ARRAY(SELECT token FROM locks WHERE expires_at < clock_timestamp() - interval '1 day' \
             LIMIT $1 FOR UPDATE SKIP LOCKED)) AND expires_at < clock_timestamp() - interval '1 day' RETURNING 1",
        ),
    ] {
        let removed = conn.ask(Sql::new(place, sql, vec![Box::new(SWEPT_AT_ONCE)])).await?.len();
        more |= i64::try_from(removed).is_ok_and(|removed| removed >= SWEPT_AT_ONCE);
    }
    if !more {
        let pause = if silence_counts { SWEEP_EVERY } else { SWEEP_AGAIN };
        shared.told().sweep_at = boot_time().saturating_add(pause);
    }
    Ok(())
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the answer to a batch was told. `true`: somebody is to [`prune`].
    pub(super) fn tell(&self, id: BatchId) -> bool {
        if self.unanswered.forget(id) {
            // A sending of it may still be on its way: its answer, which that one meets, stays until its age removes it.
            return false;
        }
        self.told().note(id, boot_time())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> BatchId {
        Batch::new(Vec::new()).id
    }

    #[test]
    fn it_is_looked_for_what_others_left_every_hour_by_one_at_a_time() {
        let at = Duration::from_secs;
        let mut told = Told { sweep_at: at(3_700), ..Told::default() };
        assert!(!told.note(id(), at(100)) && !told.note(id(), at(3_699)));
        assert!(told.note(id(), at(3_700)) && !told.note(id(), at(3_700)), "one is at work");
        told.worked(false, at(3_701));
        assert!(!told.note(id(), at(3_701)), "a connection failed a moment ago");
        assert!(told.note(id(), at(3_702)));
        told.sweep_at = at(7_302);
        told.worked(true, at(3_702));
        assert!(!told.note(id(), at(3_703)));
    }

    #[test]
    fn what_could_not_be_removed_is_removed_later() {
        let mut told = Told { sweep_at: SWEEP_EVERY, ..Told::default() };
        let ids: Vec<BatchId> = (0..ANSWERS_KEPT + ANSWERS_AT_ONCE).map(|_| id()).collect();
        let due = ids.iter().filter(|id| told.note(**id, Duration::ZERO)).count();
        assert_eq!(due, 1);
        let taken = told.take();
        assert_eq!(taken, ids[..ANSWERS_AT_ONCE]);
        told.put_back(taken);
        assert!(told.ids.iter().eq(&ids));
    }
}
