//! The answers to the last batches, so that a batch which is sent again is answered and not applied again.

use std::collections::VecDeque;

use super::short_answer;
use crate::model::{Batch, BatchAnswer, BatchId};

/// How many answers are kept. A process sends one batch at a time and shard, so that few would do.
const KEPT: usize = 64;

/// The answers to the last batches of this opening, oldest first.
#[derive(Debug, Default)]
pub struct AnswerLog(VecDeque<(BatchId, Kept)>);

#[derive(Debug)]
enum Kept {
    /// Everything was applied: a few bytes an entry.
    Short(Vec<u8>),
    Whole(BatchAnswer),
}

impl AnswerLog {
    /// No answers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The answer to a batch that was answered before.
    pub fn get(&self, batch: &Batch) -> Option<BatchAnswer> {
        let (_, kept) = self.0.iter().rev().find(|(known, _)| *known == batch.id)?;
        match kept {
            Kept::Short(bytes) => short_answer::read(batch, bytes),
            Kept::Whole(answer) => Some(answer.clone()),
        }
    }

    /// Keeps an answer, and forgets the oldest one if there are too many.
    pub fn put(&mut self, id: BatchId, answer: &BatchAnswer) {
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        let kept = short_answer::write(answer).map_or_else(|| Kept::Whole(answer.clone()), Kept::Short);
        self.0.push_back((id, kept));
    }
}
