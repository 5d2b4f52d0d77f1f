//! The writer: one thread that owns journal, document and lock, and decides, writes and syncs every batch before anybody hears of it.
//!
//! ```text
//! commit ─┐                 ┌─ decide on a copy of the ledger ─ one frame ─ sync ─ publish ─ answer
//! tokens ─┼─ channel ─ writer
//! close  ─┘                 └─ rotate ─ checkpoint thread ─ document in place ─ wake
//! ```
//! What waits in the channel is taken together and shares one sync. The channel is not bounded: callers above are.

mod commit;
mod notes;
mod rotation;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use super::backups;
use super::checkpoint::{self, Expected, Failed, Job};
use super::document::Shape;
use super::document_write::Generation;
use super::journal::Journal;
use super::lock::Lock;
use super::paths::{self, Identity, Paths};
use super::recover::{self, Pending};
use super::spare::SpareJob;
use crate::model::{Batch, BatchAnswer, Clock, Ledger, ProcessInfo, SystemClock};
use crate::store::attention::Attention;
use crate::store::pull::{BatchReply, Call, Sources};
use crate::store::{AnswerLog, LeaseBook, OpenReport, StoreError, StoreErrorKind, folder, network};

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer is asked for.
#[derive(Debug)]
pub(super) enum Op {
    Commit(Arc<Batch>, Reply<BatchAnswer>),
    /// Something waits in a source.
    Pull(Call),
    Tokens(u64, Reply<std::ops::Range<u64>>),
    Checkpoint(Reply<()>),
    /// A checkpoint ended, or there is something to look at.
    Wake,
    Close(Option<Reply<()>>),
}

/// What readers see.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ledger: ArcSwap<Ledger>,
    pub(super) leases: Arc<LeaseBook>,
}

/// A journal is never folded into the document before it has this length.
const CHECKPOINT_FLOOR: u64 = 8 << 20;
/// It is, when it is this many times as long as the document.
const CHECKPOINT_FACTOR: u64 = 2;
/// How long nothing must have been written before an idle checkpoint.
const IDLE: Duration = Duration::from_millis(500);
/// How long a write waits for the document where others follow it without such a pause: whoever looks at it is to see what is true.
const BEHIND: Duration = Duration::from_secs(5);
/// Checkpoints that nothing but the time asks for take at most one part in so many of it.
const IDLE_SHARE: u32 = 20;
/// How often the writer looks up when nothing happens: for leases to note, checkpoints to begin, a document that was replaced.
const TICK: Duration = Duration::from_millis(100);
/// How often the document is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How many batches may share one sync.
const GROUP: usize = 64;
/// A checkpoint that failed is tried again after this, then after twice as long, up to [`LONGEST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// The buffer is given back when one frame made it larger than this.
const KEPT_BUFFER: usize = 4 << 20;

/// The document as the writer knows it.
#[derive(Debug)]
struct Known {
    identity: Option<Identity>,
    /// Its generation; `None` if a journal cannot continue it (any more): there is none, it is not as we wrote it, or versions go on behind what was lost.
    generation: Option<String>,
    seq: u64,
}

/// Everything that the writer's thread owns.
#[derive(Debug)]
pub(super) struct Writer {
    paths: Paths,
    lock: Lock,
    shared: Arc<Shared>,
    sender: Sender<Op>,
    ledger: Ledger,
    answers: AnswerLog,
    shape: Shape,
    document: Known,
    journal: Option<Journal>,
    /// The last record in the journal, or the document's last sequence number.
    tail: u64,
    /// Why the journal must not be written any more; a new document replaces it.
    broken: bool,
    /// The document that a checkpoint writes, or failed to write.
    pending: Option<Pending>,
    job: Option<Job>,
    waiting: Vec<(u64, Reply<()>)>,
    poisoned: Option<StoreError>,
    buffer: Vec<u8>,
    lease_changes: u64,
    lease_due: Instant,
    /// What was noted last.
    lease_note: Vec<u8>,
    last_write: Instant,
    last_look: Instant,
    last_checkpoint: Option<(Instant, Duration)>,
    retry: Option<(Instant, Duration)>,
    /// The copy of the last document holds what this state does not.
    keeps_previous: bool,
    /// How long the journal before this one became, and space that is ready for the next one.
    last_space: u64,
    spare: Option<SpareJob>,
    attention: Attention,
}

/// A writer that has just opened, and what it found.
pub(super) struct Opened {
    pub(super) writer: Writer,
    pub(super) report: OpenReport,
    pub(super) shared: Arc<Shared>,
}

/// Where work comes from.
struct Intake {
    operations: Option<Receiver<Op>>,
    sources: Sources,
}

impl Drop for Intake {
    fn drop(&mut self) {
        // Also when the thread panics. First nobody can wake it any more, and who did so unheard is told; then who still counts on it is.
        self.operations = None;
        self.sources.forsake();
    }
}

struct Waiting {
    batch: Arc<Batch>,
    reply: BatchReply,
    answer: Option<Result<BatchAnswer, StoreError>>,
}

impl Writer {
    /// Takes the lock, reads what is there, and puts it right.
    pub(super) fn open(
        paths: Paths,
        process: &ProcessInfo,
        sender: Sender<Op>,
        leases: Arc<LeaseBook>,
    ) -> Result<Opened, StoreError> {
        folder::make(&paths.base).map_err(|error| StoreError::io(paths.base.display(), error))?;
        let mut lock = Lock::acquire(&paths, process)?;
        let swept = paths.sweep()?;
        let mut state = recover::read(&paths, lock.seq()).map_err(|error| backups::named(error, &paths.document))?;
        let tail = state.active.as_ref().map_or(state.document_seq, |active| active.tail);
        // A copy that is newer than the document tells of numbers too, and stays as it is.
        let no_copy = checkpoint::refresh_copy(&paths, &mut state)?;
        state.notices.extend(lock.make_up_for(state.told(), &paths, SystemClock.now())?);
        state.notices.extend(no_copy);
        let highest = lock.seq();
        if state.loses_versions(highest, lock.left()) || lock.is_to_skip() {
            // Noted before any of what tells of it is put away, and until a document goes on behind it: this opening may write none.
            lock.skip(0)?;
            state.go_on_behind(highest);
        }
        let journal = recover::heal(&mut state, &paths, SystemClock.now())?;
        let mut report = OpenReport::new();
        for notice in state.lost.take().into_iter().chain(std::mem::take(&mut state.notices)) {
            report.notice(notice);
        }
        if swept > 0 {
            report.notice(format!("{swept} unfinished file(s) of a crash were removed from {}", paths.base.display()));
        }
        if let Some(network) = network::found(&paths.base) {
            report.notice(format!(
                "{} lies on a file system that may be another machine's ({network}): its lock may not keep a writer on another machine \
                 out; use a local disk, or set database_url to a server: postgres://… or libsql://…",
                paths.base.display()
            ));
        }
        let shared = Arc::new(Shared { ledger: ArcSwap::from_pointee(state.ledger.clone()), leases });
        let now = Instant::now();
        let writer = Self {
            paths,
            lock,
            shared: Arc::clone(&shared),
            sender,
            ledger: state.ledger,
            answers: AnswerLog::new(),
            shape: state.shape,
            document: Known { identity: state.document, generation: state.generation, seq: state.document_seq },
            journal,
            tail,
            broken: false,
            pending: state.pending,
            job: None,
            waiting: Vec::new(),
            poisoned: None,
            buffer: Vec::new(),
            lease_changes: shared.leases.changes(),
            lease_due: now,
            lease_note: Vec::new(),
            last_write: now,
            last_look: now,
            last_checkpoint: None,
            retry: None,
            keeps_previous: state.keeps_previous,
            last_space: 0,
            spare: None,
            attention: Attention::default(),
        };
        Ok(Opened { writer, report, shared })
    }

    /// Works until it is closed, or until nobody is left who could ask.
    pub(super) fn run(mut self, operations: Receiver<Op>) {
        let mut intake = Intake { operations: Some(operations), sources: Sources::default() };
        loop {
            let Intake { operations: Some(operations), sources } = &mut intake else { return };
            let mut next = if sources.is_empty() {
                let sleep = |operations: &mut Receiver<Op>| match operations.recv_timeout(TICK) {
                    Ok(op) => Some(op),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => Some(Op::Close(None)),
                };
                self.attention.listen(operations, |operations| operations.try_recv().ok(), sleep)
            } else {
                operations.try_recv().ok()
            };
            let mut group = Vec::new();
            while let Some(op) = next.take() {
                match op {
                    Op::Commit(batch, reply) => {
                        group.push(Waiting { batch, reply: BatchReply::asker(reply), answer: None });
                        if group.len() < GROUP {
                            next = operations.try_recv().ok();
                        }
                        continue;
                    }
                    Op::Pull(call) => sources.add(call),
                    other => {
                        // What came before it is done before it.
                        self.commit(std::mem::take(&mut group));
                        match other {
                            Op::Tokens(count, reply) => answer(reply, self.tokens(count)),
                            Op::Checkpoint(reply) => self.checkpoint(reply),
                            Op::Close(reply) => {
                                let closed = self.close();
                                drop(intake);
                                if let Some(reply) = reply {
                                    answer(reply, closed);
                                }
                                return;
                            }
                            Op::Commit(..) | Op::Pull(_) | Op::Wake => {}
                        }
                    }
                }
                next = operations.try_recv().ok();
            }
            sources.pull(|batch, reply| group.push(Waiting { batch, reply, answer: None }));
            if !group.is_empty() {
                let entries = group.iter().map(|waiting| waiting.batch.entries.len()).sum();
                self.commit(group);
                self.attention.answered(entries);
            }
            self.look_around();
        }
    }

    fn tokens(&mut self, count: u64) -> Result<std::ops::Range<u64>, StoreError> {
        self.check_lock()?;
        self.lock.reserve_tokens(count)
    }

    /// Looks whether the lock is still the one that lies there: without it another writer may have the files, and nothing of them is written, cut or removed.
    fn check_lock(&mut self) -> Result<(), StoreError> {
        if let Some(error) = &self.poisoned {
            return Err(error.clone());
        }
        self.lock.check(&self.paths).inspect_err(|error| {
            if error.kind() == StoreErrorKind::Poisoned {
                tracing::error!(%error, "the state is not written any more");
                self.poisoned = Some(error.clone());
            }
        })
    }

    /// Looks whether the files are still those that lie there. Without the lock nothing is written; without the journal all goes into the document.
    fn check_files(&mut self) -> Result<(), StoreError> {
        self.check_lock()?;
        if let Some(journal) = self.journal.as_ref().filter(|_| !self.broken)
            && !journal.is_at_one_of([&self.paths.next, &self.paths.journal])?
            // Moved from one to the other between the two looks it is seen at the second place.
            && !journal.is_at_one_of([&self.paths.next, &self.paths.journal])?
        {
            tracing::error!(journal = %self.paths.journal.display(), "the journal was removed while it was written; the document takes its place");
            self.broken = true;
        }
        Ok(())
    }

    /// Writes a document of a ledger here and now; after it no journal is needed.
    fn write_document_now(&mut self, ledger: &Ledger) -> Result<(), StoreError> {
        if let Some(job) = self.job.take() {
            let done = job.wait();
            self.checkpoint_ended(done);
            if let Some(error) = &self.poisoned {
                return Err(error.clone());
            }
        }
        let generation = new_generation();
        let follows = match &self.journal {
            Some(journal) => Some(journal.header().generation.clone()),
            None => self.document.generation.clone(),
        };
        let names = Generation { own: &generation, follows: follows.as_deref() };
        let begun = Instant::now();
        let expected = self.expected();
        let mut put = checkpoint::put_document(&self.paths, ledger, names, &self.shape, &expected);
        let has_no_room = |failed: &Failed| failed.error.kind() == StoreErrorKind::Full && failed.placed.is_none();
        if put.as_ref().is_err_and(has_no_room) && self.give_back_space() {
            put = checkpoint::put_document(&self.paths, ledger, names, &self.shape, &expected);
        }
        match put {
            Ok(identity) => {
                self.document = Known { identity: Some(identity), generation: Some(generation), seq: ledger.seq().0 };
                self.journal = None;
                self.tail = ledger.seq().0;
                self.broken = false;
                self.lock.skipped();
                if !self.lease_note.is_empty() {
                    // They were noted in the journal that is gone.
                    self.note_again();
                }
                self.keeps_previous = false;
                self.pending = None;
                self.retry = None;
                self.last_checkpoint = Some((begun, begun.elapsed()));
                // Both are spent. The older one first: beside the document alone it would look like a stranger.
                for spent in [&self.paths.journal, &self.paths.next] {
                    let _spent_anyway = paths::remove(spent);
                }
                Ok(())
            }
            Err(failed) => {
                self.document_failed(&failed.error, failed.placed);
                Err(failed.error)
            }
        }
    }

    fn expected(&self) -> Expected {
        Expected { identity: self.document.identity, keeps_previous: self.keeps_previous, lock: self.lock.file() }
    }

    fn document_failed(&mut self, error: &StoreError, placed: Option<Identity>) {
        if let Some(identity) = placed {
            // It has its name, though the folder was not synced: whatever comes next takes its place, and the journal goes on beside it.
            self.document.identity = Some(identity);
        }
        if error.kind() == StoreErrorKind::Poisoned {
            self.poisoned = Some(error.clone());
        }
    }

    /// Brings everything into the document, writes down what was used, and gives the lock back.
    fn close(mut self) -> Result<(), StoreError> {
        // From here on no space is made ready: it would still be in the making when the lock is given back.
        self.last_space = 0;
        if let Some(job) = self.job.take() {
            let done = job.wait();
            self.checkpoint_ended(done);
        }
        self.spare = None;
        let mut result = self.check_lock();
        if result.is_ok() && self.is_dirty() {
            let ledger = self.ledger.clone();
            result = self.write_document_now(&ledger);
        } else if result.is_ok() && self.journal.take().is_some() {
            // It holds nothing: whoever looks into the folder finds the document alone.
            let _holds_nothing = paths::remove(&self.paths.journal);
        }
        match &result {
            Ok(()) => self.answer_waiting(),
            Err(error) => self.fail_waiting(&error.clone()),
        }
        self.waiting.clear();
        if let Err(error) = result {
            // Records may lie in the journal alone: the lock goes on to tell whose it is, and where.
            let _told_already = self.lock.leave().is_err();
            return Err(error);
        }
        // Where there is no document none was ever used, and the lock must not tell of one. Beside one of ours it tells of a number, also where the first record
        // could not be written: a lock that tells of none there was emptied.
        let used = match &self.document {
            Known { identity: None, .. } => self.lock.found_seq(),
            Known { generation: Some(_), .. } => self.ledger.seq().0.max(1),
            Known { generation: None, .. } => self.ledger.seq().0,
        };
        self.lock.release(used)
    }
}

fn new_generation() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// Answers a caller; one who went away needs none.
fn answer<T>(reply: Reply<T>, result: Result<T, StoreError>) {
    let _caller_gone = reply.send(result);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::BatchSource;
    use crate::store::pull::Forsaken;

    /// As when the thread panics, or closes.
    #[test]
    fn who_calls_a_writer_that_ends_is_told() {
        let waits = Arc::new(Forsaken::default());
        let source: Arc<dyn BatchSource> = Arc::clone(&waits) as Arc<dyn BatchSource>;
        let call = || Op::Pull(Call::new(&Arc::downgrade(&source)));
        let (sender, operations) = std::sync::mpsc::channel();
        sender.send(call()).unwrap();
        let mut sources = Sources::default();
        sources.add(Call::new(&Arc::downgrade(&source)));
        drop(Intake { operations: Some(operations), sources });
        assert_eq!(waits.times(), 2, "the one that was heard, and the one that was not");
        let Err(std::sync::mpsc::SendError(Op::Pull(call))) = sender.send(call()) else { panic!("nobody is there") };
        call.take_back();
        assert_eq!(waits.times(), 2, "who sees that goes another way by himself");
    }
}
