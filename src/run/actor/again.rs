//! What is to be checked again, in the order in which it was asked for.

use std::collections::BTreeMap;

use super::Job;

/// The jobs, and how many of them were acknowledged from memory: that is asked at every message.
#[derive(Default)]
pub(super) struct Again {
    jobs: BTreeMap<u64, Job>,
    acknowledged: usize,
}

impl Again {
    pub(super) fn insert(&mut self, job: Job) {
        self.acknowledged += usize::from(job.ack.is_none());
        // The order is a job's own.
        drop(self.jobs.insert(job.order, job));
    }

    pub(super) fn pop_first(&mut self) -> Option<Job> {
        let (_, job) = self.jobs.pop_first()?;
        self.acknowledged -= usize::from(job.ack.is_none());
        Some(job)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Whether any of them was acknowledged from memory.
    pub(super) fn has_acknowledged(&self) -> bool {
        self.acknowledged > 0
    }

    /// How often one of them was sent down at most.
    pub(super) fn attempts(&self) -> u32 {
        self.jobs.values().map(|job| job.op.attempts).max().unwrap_or(0)
    }

    pub(super) fn into_jobs(self) -> impl Iterator<Item = Job> {
        self.jobs.into_values()
    }
}
