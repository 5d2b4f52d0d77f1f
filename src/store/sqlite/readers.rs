//! The threads that ask the database: begun when they are needed, kept for the next question, gone after a while without one.
//!
//! They are the backend's own, as its writer is: a question depends on no runtime, neither on that of who asks nor on that of who opened the database.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::store::{StoreError, StoreErrorKind};

/// How long a thread waits for the next question.
const KEPT: Duration = Duration::from_secs(10);

/// It is answered by doing it, or by why nobody can.
type Question = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
/// How a thread is started.
type Start = fn(Box<dyn FnOnce() + Send>) -> io::Result<()>;

fn thread(work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
    std::thread::Builder::new().name("seeknal-reader".to_owned()).spawn(work).map(drop)
}

/// The door of the threads. Those that wait end with it.
#[derive(Debug)]
pub(super) struct Readers {
    desk: Arc<Desk>,
    /// Threads at most: whoever asks while all of them live is answered by the next one that is done.
    most: usize,
    start: Start,
}

#[derive(Default)]
struct Desk {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// Those that nobody has begun with. Whoever has answered one begins with the next of these before he waits.
    questions: VecDeque<Question>,
    /// Threads that wait. As many of them as there are questions were woken and are on their way.
    idle: usize,
    /// Threads that will come for a question once more: those that wait, that answer one, and that are being started.
    alive: usize,
    /// Nobody waits any more: a thread that finds no question ends.
    over: bool,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl Readers {
    pub(super) fn new(most: usize) -> Self {
        Self { desk: Arc::default(), most, start: thread }
    }

    /// Does what may block on one of the threads, to its end, also if nobody waits for it any more.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let question = move |begun: Result<(), StoreError>| {
            let _asker_gone = reply.send(begun.and_then(|()| work())).is_err();
        };
        self.send(Box::new(question));
        answer.await.unwrap_or_else(|_| {
            Err(StoreError::not_applied(StoreErrorKind::Unavailable, "reading the database was cut off: it panicked"))
        })
    }

    /// Lets go of the threads that wait. Questions that come all the same are answered by one that ends with it.
    pub(super) fn end(&self) {
        self.desk.waiting().over = true;
        self.desk.changed.notify_all();
    }

    fn send(&self, question: Question) {
        {
            let mut waiting = self.desk.waiting();
            let is_somebody_free = waiting.idle > waiting.questions.len();
            waiting.questions.push_back(question);
            if is_somebody_free {
                self.desk.changed.notify_one();
                return;
            }
            // One that has just answered does not wait yet, and looks for a question before it does.
            if waiting.alive >= self.most {
                return;
            }
            waiting.alive += 1;
        }
        let desk = Arc::clone(&self.desk);
        if let Err(error) = (self.start)(Box::new(move || desk.work())) {
            self.desk.lacks_one(error);
        }
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

    /// A thread could not be started: those that live answer one after another. Where there are none, nobody would.
    fn lacks_one(&self, error: io::Error) {
        let left = {
            let mut waiting = self.waiting();
            waiting.alive = waiting.alive.saturating_sub(1);
            if waiting.alive > 0 { VecDeque::new() } else { std::mem::take(&mut waiting.questions) }
        };
        let why = format!(
            "no thread could be started to read the database: {error}; it is tried anew with the next question, check the limits of processes and threads (ulimit -u, the container's pids limit) and memory"
        );
        let refused = StoreError::not_applied(StoreErrorKind::Unavailable, why).with_source(error);
        for question in left {
            question(Err(refused.clone()));
        }
    }

    fn work(&self) {
        while let Some(question) = self.next() {
            // Who asked learns of it: his answer is dropped. The hook for panics has told it already.
            let _panicked = catch_unwind(AssertUnwindSafe(move || question(Ok(())))).is_err();
        }
    }

    /// The next question, waited for if there is none; `None`: there is none for a while, or for ever.
    fn next(&self) -> Option<Question> {
        let mut waiting = self.waiting();
        if waiting.questions.is_empty() && !waiting.over {
            waiting.idle += 1;
            (waiting, _) = self
                .changed
                .wait_timeout_while(waiting, KEPT, |waiting| waiting.questions.is_empty() && !waiting.over)
                .unwrap_or_else(PoisonError::into_inner);
            waiting.idle = waiting.idle.saturating_sub(1);
        }
        let question = waiting.questions.pop_front();
        if question.is_none() {
            // Whoever asks from now on does not count on it.
            waiting.alive = waiting.alive.saturating_sub(1);
        }
        question
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_question_that_panics_is_told_and_takes_nobody_along() {
        let readers = Readers::new(4);
        for _ in 0..3 {
            let cut_off = readers.ask::<()>(|| panic!("a bug in a question")).await.unwrap_err();
            assert_eq!(cut_off.kind(), StoreErrorKind::Unavailable);
            assert_eq!(readers.ask(|| Ok(7)).await.unwrap(), 7);
        }
        readers.end();
        assert_eq!(readers.ask(|| Ok(8)).await.unwrap(), 8, "closing tells by itself that it is over");
    }

    fn no_thread(_: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(11))
    }

    /// The system has no thread left: those that live answer one question after another, and only where none lives it is told, as what passes.
    #[tokio::test]
    async fn a_thread_that_cannot_be_started_refuses_nobody_whom_another_can_answer() {
        let mut readers = Readers::new(4);
        readers.start = no_thread;
        let refused = readers.ask(|| Ok(0)).await.unwrap_err();
        assert!(refused.is_retryable() && refused.to_string().contains("pids limit"), "{refused:?}");

        readers.start = thread;
        let (go, gate) = std::sync::mpsc::channel::<()>();
        let mut first = Box::pin(readers.ask(move || Ok(gate.recv().is_ok())));
        assert!(poll_once(first.as_mut()).is_pending(), "it is asked");
        drop(first);
        readers.start = no_thread;
        let mut others: Vec<_> = (0..3).map(|number| Box::pin(readers.ask(move || Ok(number)))).collect();
        for other in &mut others {
            let answered = poll_once(other.as_mut());
            assert!(answered.is_pending(), "the one that lives is busy: {answered:?}");
        }
        go.send(()).unwrap();
        for (number, other) in others.into_iter().enumerate() {
            assert_eq!(other.await.unwrap(), number);
        }
        assert_eq!(readers.ask(|| Ok(4)).await.unwrap(), 4, "it waits for the next one");
        assert_eq!(readers.desk.waiting().alive, 1);
    }

    #[tokio::test]
    async fn who_asks_for_the_openings_waits_for_his_turn_as_all_do() {
        let folder = tempfile::tempdir().unwrap();
        let options = crate::BackendOptions::new().base_path(folder.path());
        let backend = crate::store::sqlite::SqliteBackend::new(&options);
        let turns = Arc::clone(&backend.shared.turns);
        let all = turns.acquire_many(16).await.unwrap();
        let mut asking = crate::store::StateBackend::processes(&backend);
        assert!(asking.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_pending());
        assert_eq!(backend.readers.desk.waiting().alive, 0, "no thread is started for it");
        drop(all);
        assert_eq!(asking.await.unwrap().len(), 0);
    }

    fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }

    /// More askers than there may be threads, and in the moments in which these begin and cease to wait.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_asks_is_answered() {
        let readers = Arc::new(Readers::new(4));
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
        let alive = readers.desk.waiting().alive;
        assert!(alive <= 4, "{alive} threads instead of four");
    }
}
