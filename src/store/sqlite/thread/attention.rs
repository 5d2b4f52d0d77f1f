//! A client that writes alone asks again right after its answer: the writer stays awake for it, because waking a thread costs a good part of a commit.
//!
//! Only where that came true the last time, for a tenth of a millisecond, and behind everybody else who wants the processor: nobody pays for a client that
//! thinks between two writes, and nothing is held back.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::Job;

/// How long a writer that answered a lone client listens for its next word without going to sleep.
const LISTEN: Duration = Duration::from_micros(100);

/// Whether it is worth listening.
#[derive(Debug, Default)]
pub(super) struct Attention {
    /// When a single entry was answered.
    answered: Option<Instant>,
    /// Whether the next word after it came soon.
    was_soon: bool,
}

impl Attention {
    pub(super) fn answered(&mut self, entries: usize) {
        self.answered = (entries == 1).then(Instant::now);
    }

    /// The next job; `None` if nobody is left who could ask.
    pub(super) fn listen(&mut self, jobs: &mut mpsc::UnboundedReceiver<Job>) -> Option<Job> {
        let Some(answered) = self.answered.take() else { return jobs.blocking_recv() };
        if self.was_soon {
            while answered.elapsed() < LISTEN {
                if let Ok(job) = jobs.try_recv() {
                    return Some(job);
                }
                // Whoever wants to work may.
                std::thread::yield_now();
            }
        }
        let job = jobs.blocking_recv();
        self.was_soon = answered.elapsed() < 2 * LISTEN;
        job
    }
}
