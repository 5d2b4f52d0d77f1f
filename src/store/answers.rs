//! The answers to the last batches, so that a batch which is sent again is answered and not applied again.

use std::collections::VecDeque;

use crate::model::{BatchAnswer, BatchId};

/// How many answers are kept. A process sends one batch at a time and shard, so that few would do.
const KEPT: usize = 64;

/// The answers to the last batches of this opening, oldest first.
#[derive(Debug, Default)]
pub struct AnswerLog(VecDeque<(BatchId, BatchAnswer)>);

impl AnswerLog {
    /// No answers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The answer to a batch that was applied before.
    pub fn get(&self, id: BatchId) -> Option<&BatchAnswer> {
        self.0.iter().rev().find(|(known, _)| *known == id).map(|(_, answer)| answer)
    }

    /// Keeps an answer, and forgets the oldest one if there are too many.
    pub fn put(&mut self, id: BatchId, answer: BatchAnswer) {
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        self.0.push_back((id, answer));
    }
}
