//! The threads that ask the database: begun when they are needed, kept for the next question, gone after a while without one.
//!
//! They are the backend's own, as its writer is: a question depends on no runtime, neither on that of who asks nor on that of who opened the database.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::store::{StoreError, StoreErrorKind};

/// How long a thread waits for the next question.
const KEPT: Duration = Duration::from_secs(10);

type Question = Box<dyn FnOnce() + Send>;

/// The door of the threads. Those that wait end with it.
#[derive(Debug, Default)]
pub(super) struct Readers {
    desk: Arc<Desk>,
}

#[derive(Default)]
struct Desk {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// Never more than there are threads that wait, or are on their way here.
    questions: VecDeque<Question>,
    /// Threads that wait and that no question is meant for yet.
    idle: usize,
    /// Nobody waits any more: a thread that has answered ends.
    over: bool,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl Readers {
    /// Does what may block on one of the threads, to its end, also if nobody waits for it any more.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.desk.send(Box::new(move || {
            let _asker_gone = reply.send(work()).is_err();
        }))?;
        answer.await.unwrap_or_else(|_| {
            Err(StoreError::not_applied(StoreErrorKind::Unavailable, "reading the database was cut off: it panicked"))
        })
    }

    /// Lets go of the threads that wait. Questions that come all the same are answered by one that ends with it.
    pub(super) fn end(&self) {
        self.desk.waiting().over = true;
        self.desk.changed.notify_all();
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.end();
    }
}

impl Desk {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(self: &Arc<Self>, question: Question) -> Result<(), StoreError> {
        {
            let mut waiting = self.waiting();
            if waiting.idle > 0 {
                waiting.idle -= 1;
                waiting.questions.push_back(question);
                self.changed.notify_one();
                return Ok(());
            }
        }
        let desk = Arc::clone(self);
        std::thread::Builder::new()
            .name("seeknal-reader".to_owned())
            .spawn(move || desk.work(question))
            .map(drop)
            .map_err(|error| StoreError::io("starting a thread that reads the database", error))
    }

    fn work(&self, first: Question) {
        let mut next = Some(first);
        while let Some(question) = next {
            // Who asked learns of it: his answer is dropped. The hook for panics has told it already.
            let _panicked = catch_unwind(AssertUnwindSafe(question)).is_err();
            next = self.next();
        }
    }

    /// Waits for the next question; `None`: there is none for a while, or for ever.
    fn next(&self) -> Option<Question> {
        let mut waiting = self.waiting();
        if waiting.over {
            return None;
        }
        waiting.idle += 1;
        let (mut waiting, _) = self
            .changed
            .wait_timeout_while(waiting, KEPT, |waiting| waiting.questions.is_empty() && !waiting.over)
            .unwrap_or_else(PoisonError::into_inner);
        let question = waiting.questions.pop_front();
        if question.is_none() {
            // Nothing was meant for it.
            waiting.idle = waiting.idle.saturating_sub(1);
        }
        question
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_question_that_panics_is_told_and_takes_nobody_along() {
        let readers = Readers::default();
        for _ in 0..3 {
            let cut_off = readers.ask::<()>(|| panic!("a bug in a question")).await.unwrap_err();
            assert_eq!(cut_off.kind(), StoreErrorKind::Unavailable);
            assert_eq!(readers.ask(|| Ok(7)).await.unwrap(), 7);
        }
        readers.end();
        assert_eq!(readers.ask(|| Ok(8)).await.unwrap(), 8, "closing tells by itself that it is over");
    }

    /// More than there are threads, and in the moments in which these begin and cease to wait.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_asks_is_answered() {
        let readers = Arc::new(Readers::default());
        let askers: Vec<_> = (0..8_u32)
            .map(|asker| {
                let readers = Arc::clone(&readers);
                tokio::spawn(async move {
                    for question in 0..500 {
                        assert_eq!(readers.ask(move || Ok((asker, question))).await.unwrap(), (asker, question));
                    }
                })
            })
            .collect();
        for asker in askers {
            asker.await.unwrap();
        }
        let idle = readers.desk.waiting().idle;
        assert!(idle <= 16, "{idle} threads for eight askers");
    }
}
