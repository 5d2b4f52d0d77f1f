//! Batches whose answers are stored, until nobody asks for them any more.

use std::sync::PoisonError;

use uuid::Uuid;

use super::connection::Sql;
use super::{Shared, commit};
use crate::model::{Batch, BatchAnswer, BatchId};
use crate::store::StoreError;

/// Answers of this opening that are kept at least. Whoever has seen an answer does not ask again; the rest is for those who sit between.
const ANSWERS_KEPT: usize = 512;

/// Answers that are removed together.
const ANSWERS_AT_ONCE: usize = 256;

/// Applies a batch, unless a failed one before it is not settled.
pub(super) async fn settle(shared: &Shared, batch: &Batch) -> Result<BatchAnswer, StoreError> {
    shared.unsettled().check(batch.id, &shared.pool.place.name)?;
    let answer = commit::commit(shared, batch).await;
    shared.unsettled().note(batch.id, &answer);
    answer
}

/// Removes answers that were told, many at a time and seldom. Only room depends on it.
pub(super) async fn prune(shared: &Shared) {
    let old: Vec<Uuid> = {
        let mut told = shared.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < ANSWERS_KEPT + ANSWERS_AT_ONCE {
            return;
        }
        told.drain(..ANSWERS_AT_ONCE).map(|id| Uuid::from_bytes(*id.as_bytes())).collect()
    };
    let Ok(mut conn) = shared.pool.get().await else { return };
    if conn.ask(Sql::new("table batches", "DELETE FROM batches WHERE id = ANY($1)", vec![Box::new(old)])).await.is_ok() {
        shared.pool.put(conn);
    }
}

impl Shared {
    /// Notes that the answer to a batch was told. `true`: there are many by now.
    pub(super) fn tell(&self, id: BatchId) -> bool {
        if self.unanswered.forget(id) {
            // A sending of it may still be on its way: its answer, which that one meets, stays until its age removes it.
            return false;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.push_back(id);
        told.len() >= ANSWERS_KEPT + ANSWERS_AT_ONCE
    }
}
