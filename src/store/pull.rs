//! Batches that a backend with a writer of its own takes by itself.

use std::fmt;
use std::sync::Arc;
#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
use std::sync::Weak;

#[cfg(any(feature = "file", feature = "sqlite"))]
use tokio::sync::oneshot;

use super::StoreError;
#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
use super::StoreErrorKind;
#[cfg(feature = "postgres")]
use crate::model::BatchId;
use crate::model::{Batch, BatchAnswer};

/// Where a backend with a writer of its own takes its batches from. What is collected while one batch is being written is the next one, so that
/// neither the storage nor those who write to it wait for a runtime in between.
pub trait BatchSource: Send + Sync + fmt::Debug {
    /// Whether a batch waits, for a backend that has to wait for its turn to write: what arrives until it has it makes the batch longer. `false`: as when
    /// [`next`](Self::next) has none. Never blocks for long.
    fn waits(&self) -> bool {
        true
    }

    /// The next batch; `None` if nothing waits: the backend is woken when something does. Never blocks for long. The batch that was given last has to
    /// be answered first: until then it is given again.
    fn next(&self) -> Option<Arc<Batch>>;

    /// Puts what arrived since behind the batch that was given last, as long as nothing of it can be in stable storage: it stays the same batch, under the
    /// same name, and the same answer is waited for, with more outcomes. `false`: it is as it was. Never blocks for long.
    fn join(&self, _batch: &mut Arc<Batch>) -> bool {
        false
    }

    /// Tells what became of the batch that was given last, in the words of [`StateBackend::commit`](super::StateBackend::commit). Never blocks for long.
    fn answer(&self, answer: Result<BatchAnswer, StoreError>);

    /// Whoever asked for batches has ended before there were none left, and cannot be woken any more: what waits goes another way.
    fn forsaken(&self);
}

/// Word to a writer that something waits in a source. Dropped before a writer took it in (it came behind a close, or the writer panicked) it tells the source:
/// who was called is not called again.
#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
#[derive(Debug)]
pub(super) struct Call(Option<Weak<dyn BatchSource>>);

#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
impl Call {
    pub(super) fn new(source: &Weak<dyn BatchSource>) -> Self {
        Self(Some(Weak::clone(source)))
    }

    /// There is no writer, and who called knows that.
    #[cfg(any(feature = "file", feature = "sqlite"))]
    pub(super) fn take_back(mut self) {
        self.0 = None;
    }
}

#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
impl Drop for Call {
    fn drop(&mut self) {
        if let Some(source) = self.0.take().and_then(|source| source.upgrade()) {
            source.forsaken();
        }
    }
}

/// The sources that a writer asks for batches. If it ends before they are empty, however it ends, they are told.
#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
#[derive(Debug, Default)]
pub(super) struct Sources(Vec<Arc<dyn BatchSource>>);

#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
impl Sources {
    #[cfg(any(feature = "file", feature = "sqlite"))]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, mut call: Call) {
        self.0.extend(call.0.take().and_then(|source| source.upgrade()));
    }

    /// Whether any source has a batch; one that has none is asked no more before it wakes the writer again.
    #[cfg(feature = "sqlite")]
    pub(super) fn wait(&mut self) -> bool {
        self.0.retain(|source| source.waits());
        !self.0.is_empty()
    }

    /// The next batch of every source; one that has none is asked no more before it wakes the writer again.
    pub(super) fn pull(&mut self, mut take: impl FnMut(Arc<Batch>, BatchReply)) {
        self.0.retain(|source| {
            let batch = source.next();
            batch.map(|batch| take(batch, BatchReply { to: Some(To::Source(Arc::clone(source))) })).is_some()
        });
    }

    /// The writer ends. It must not be possible any more to wake it.
    pub(super) fn forsake(&mut self) {
        for source in self.0.drain(..) {
            source.forsaken();
        }
    }
}

/// Tells a backend that something waits in its source. `false` if its writer has ended: then
/// [`StateBackend::commit`](super::StateBackend::commit) is asked.
pub type Wake = Box<dyn Fn() -> bool + Send + Sync>;

/// Whom a writer answers: who sent a batch, or the source that it was pulled from.
#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
#[derive(Debug)]
pub(super) struct BatchReply {
    to: Option<To>,
}

#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
#[derive(Debug)]
enum To {
    #[cfg(any(feature = "file", feature = "sqlite"))]
    Asker(oneshot::Sender<Result<BatchAnswer, StoreError>>),
    Source(Arc<dyn BatchSource>),
}

#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
impl BatchReply {
    #[cfg(any(feature = "file", feature = "sqlite"))]
    pub(super) fn asker(sender: oneshot::Sender<Result<BatchAnswer, StoreError>>) -> Self {
        Self { to: Some(To::Asker(sender)) }
    }

    /// Makes the batch longer by what arrived since, if it came from a source that has something.
    #[cfg(feature = "sqlite")]
    pub(super) fn join(&self, batch: &mut Arc<Batch>) -> bool {
        matches!(&self.to, Some(To::Source(source)) if source.join(batch))
    }

    /// Says whether anybody was there to hear it.
    pub(super) fn answer(mut self, answer: Result<BatchAnswer, StoreError>) -> bool {
        match self.to.take() {
            #[cfg(any(feature = "file", feature = "sqlite"))]
            Some(To::Asker(asker)) => asker.send(answer).is_ok(),
            Some(To::Source(source)) => {
                source.answer(answer);
                true
            }
            None => false,
        }
    }
}

#[cfg(any(feature = "file", feature = "sqlite", feature = "postgres"))]
impl Drop for BatchReply {
    fn drop(&mut self) {
        // An asker sees by itself that nobody will answer.
        if let Some(To::Source(source)) = self.to.take() {
            let message = "the writer of the state ended in the middle of a batch; open the state anew";
            source.answer(Err(StoreError::unknown(StoreErrorKind::Poisoned, message)));
        }
    }
}

/// The sources of a task, which may be dropped in the middle.
#[cfg(feature = "postgres")]
struct OfTask(Sources);

#[cfg(feature = "postgres")]
impl Drop for OfTask {
    fn drop(&mut self) {
        self.0.forsake();
    }
}

/// Commits what a source has, one batch after another, until it has none: for a task on the thread of a backend, which then needs no hop of another runtime
/// between two batches. `told` is given the ids of the batches that were answered, and
/// not of those of which nobody knows what became.
#[cfg(feature = "postgres")]
pub(super) async fn drain<F>(call: Call, mut commit: impl FnMut(Arc<Batch>) -> F, mut told: impl FnMut(BatchId))
where
    F: Future<Output = Result<BatchAnswer, StoreError>>,
{
    let mut sources = OfTask(Sources::default());
    sources.0.add(call);
    loop {
        let mut next = None;
        sources.0.pull(|batch, reply| next = Some((batch, reply)));
        let Some((batch, reply)) = next else { return };
        let id = batch.id;
        let answer = commit(batch).await;
        let settled = answer.is_ok();
        if reply.answer(answer) && settled {
            told(id);
        }
        // Others have their turn on the thread.
        tokio::task::yield_now().await;
    }
}

/// A source that counts how often it was forsaken.
#[cfg(all(test, any(feature = "file", feature = "sqlite")))]
#[derive(Debug, Default)]
pub(super) struct Forsaken(std::sync::atomic::AtomicUsize);

#[cfg(all(test, any(feature = "file", feature = "sqlite")))]
impl Forsaken {
    pub(super) fn times(&self) -> usize {
        self.0.load(std::sync::atomic::Ordering::Acquire)
    }
}

#[cfg(all(test, any(feature = "file", feature = "sqlite")))]
impl BatchSource for Forsaken {
    fn next(&self) -> Option<Arc<Batch>> {
        None
    }

    fn answer(&self, _: Result<BatchAnswer, StoreError>) {}

    fn forsaken(&self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
    }
}

#[cfg(all(test, feature = "postgres"))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;
    use crate::store::StoreErrorKind;

    /// A source with some batches that keeps what it is told.
    #[derive(Debug, Default)]
    struct Few {
        waiting: Mutex<Vec<Arc<Batch>>>,
        answers: Mutex<Vec<Result<BatchAnswer, StoreError>>>,
        forsaken: AtomicUsize,
    }

    fn held<T>(kept: &Mutex<T>) -> MutexGuard<'_, T> {
        kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    impl Few {
        fn of(count: usize) -> Arc<Self> {
            let batches = (0..count).map(|_| Arc::new(Batch::new(Vec::new()))).collect();
            Arc::new(Self { waiting: Mutex::new(batches), ..Self::default() })
        }

        fn call(self: &Arc<Self>) -> Call {
            let source: Arc<dyn BatchSource> = Arc::clone(self) as Arc<dyn BatchSource>;
            Call::new(&Arc::downgrade(&source))
        }

        fn told(&self) -> Vec<bool> {
            held(&self.answers).iter().map(Result::is_ok).collect()
        }
    }

    impl BatchSource for Few {
        fn next(&self) -> Option<Arc<Batch>> {
            held(&self.waiting).last().cloned()
        }

        fn answer(&self, answer: Result<BatchAnswer, StoreError>) {
            if answer.is_ok() {
                held(&self.waiting).pop();
            }
            held(&self.answers).push(answer);
        }

        fn forsaken(&self) {
            self.forsaken.fetch_add(1, Ordering::AcqRel);
        }
    }

    #[tokio::test]
    async fn a_batch_is_told_of_once_it_is_settled() {
        let source = Few::of(2);
        let (mut sent, mut told) = (Vec::new(), Vec::new());
        let commit = |batch: Arc<Batch>| {
            sent.push(batch.id);
            let lost = sent.len() == 1;
            async move {
                let answer = || BatchAnswer { outcomes: Vec::new() };
                if lost { Err(StoreError::unknown(StoreErrorKind::Unavailable, "lost")) } else { Ok(answer()) }
            }
        };
        drain(source.call(), commit, |id| told.push(id)).await;
        assert_eq!(source.told(), [false, true, true]);
        assert_eq!((sent.first(), told.as_slice()), (sent.get(1), sent.get(1..).unwrap()));
        assert_eq!(source.forsaken.load(Ordering::Acquire), 0);
    }

    #[tokio::test]
    async fn a_source_is_told_where_a_commit_panics_or_its_task_is_dropped() {
        for panics in [true, false] {
            let source = Few::of(1);
            let commit = move |_| async move {
                assert!(!panics, "a fault of the backend");
                std::future::pending().await
            };
            let task = tokio::spawn(drain(source.call(), commit, |_| {}));
            if !panics {
                tokio::task::yield_now().await;
                task.abort();
            }
            assert!(task.await.is_err());
            let answers = source.answers.lock().unwrap();
            assert!(matches!(&**answers, [Err(error)] if error.is_unknown_outcome()), "{answers:?}");
            assert_eq!(source.forsaken.load(Ordering::Acquire), 1);
        }
    }
}
