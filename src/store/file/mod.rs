//! The state in a folder: `run_state.json`, which people and other programs read, and a journal beside it, which makes every commit durable.
//!
//! - **Document** (`run_state.json`): the shape that Seeknal's "State Backends Guide" describes, or Seeknal's own where the file came from there. Written whole by checkpoints.
//! - **Journal** (`run_state.json.journal`): every accepted entry, synced before it is answered. It continues the document; opening replays it.
//! - **Lock** (`run_state.json.lock`): one process writes; any number may read beside it. It also remembers how far fencing tokens and
//!   sequence numbers were given out, which no restored backup brings back.
//! - **Previous** (`run_state.json.prev`): the last document of ours, for the day on which another program rewrites the present one.
//! - **Original** (`run_state.json.original-<UTC>`): the first document that was found with words that JSON does not know (`NaN`), as it was.
//!
//! A run that a foreign file does not give a status has the one that its nodes tell: one failed, it is `failed`; one running, `running`;
//! all ended, `success`; else `pending`. It was created when it started, or at its newest stamp, or (without any) at the epoch: never "now", so
//! that every opening sees the same.

mod backups;
mod checkpoint;
mod document;
mod document_write;
mod edited;
mod elsewhere;
mod foreign;
mod join;
mod journal;
mod kept;
mod lock;
mod mend;
mod nan;
mod node;
mod node_write;
mod paths;
mod reader;
mod record;
mod recover;
mod spare;
mod stamp;
mod text;
mod values;
mod verify;
mod writer;

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{SendError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

pub use self::verify::repair;

use self::paths::Paths;
use self::reader::Reader;
use self::writer::{Op, Opened, Reply, Shared, Writer};
use super::folder;
use super::pull::Call;
use super::{
    BackendOptions, BatchSource, BoxFuture, ForeignCommits, LeaseBook, LeaseStore, OpenProcess, OpenReport, StateBackend,
    StoreError, StoreErrorKind, VerifyReport, Wake,
};
use crate::model::{
    Batch, BatchAnswer, Clock, LastSuccess, LeaseRecord, Ledger, NodeCoverage, NodeId, NodeState, ProcessInfo, Retained, RunId,
    RunPage, RunQuery, RunState, SystemClock, Version,
};

/// The state in a folder, written by one process at a time and read by any number. Who opens it for reading follows the writer: what was committed is
/// seen within a fraction of a second (of a large document within two).
///
/// Commits are decided, written and synced by a thread of its own; dropping the backend closes it as [`close`](StateBackend::close) does, and waits.
pub struct FileBackend {
    paths: Paths,
    access: Access,
}

enum Access {
    Read(Arc<Reader>),
    Write {
        phase: Mutex<Phase>,
        /// Held by an opening until it is open or its thread has ended: who comes meanwhile finds it open, and not in the way of itself.
        opening: Arc<tokio::sync::Mutex<()>>,
        leases: Arc<LeaseBook>,
    },
}

/// A writing backend's life.
#[derive(Debug)]
enum Phase {
    New,
    /// Its thread is at work, and reads from this. Also where nobody waits for that any more.
    Opening(Sender<Op>),
    Open(Running),
    Closed,
}

/// The writer's thread and how to reach it.
#[derive(Debug)]
struct Running {
    sender: Sender<Op>,
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
    process: ProcessInfo,
}

/// Travels with the answer to an opening: an answer that nobody takes closes the writer, which keeps a way to itself and would not end by itself.
struct CloseUnlessTaken(Option<Sender<Op>>);

impl CloseUnlessTaken {
    fn taken(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseUnlessTaken {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            // A writer that is gone is closed.
            let _gone = sender.send(Op::Close(None));
        }
    }
}

impl fmt::Debug for FileBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileBackend")
            .field("document", &self.paths.document)
            .field("read_only", &self.is_read_only())
            .finish_non_exhaustive()
    }
}

impl FileBackend {
    /// A backend on the options' folder; nothing is opened yet.
    pub fn new(options: &BackendOptions) -> Self {
        let paths = Paths::new(options.base());
        let access = if options.is_read_only() {
            Access::Read(Arc::new(Reader::new(paths.clone())))
        } else {
            let opening = Arc::default();
            Access::Write { phase: Mutex::new(Phase::New), opening, leases: Arc::new(LeaseBook::new()) }
        };
        Self { paths, access }
    }

    /// Asks the writer, and waits for its answer.
    fn ask<T: Send + 'static>(&self, op: impl FnOnce(Reply<T>) -> Op) -> BoxFuture<'_, Result<T, StoreError>> {
        let sent = self.sender().and_then(|sender| {
            let (reply, answer) = oneshot::channel();
            sender.send(op(reply)).map_err(|_| StoreError::closed()).map(|()| answer)
        });
        Box::pin(async move {
            // A writer that ended without an answer may have written before.
            sent?.await.unwrap_or_else(|_| {
                Err(StoreError::unknown(
                    StoreErrorKind::Closed,
                    "the writer of the state ended before it answered; open the state again",
                ))
            })
        })
    }

    fn sender(&self) -> Result<Sender<Op>, StoreError> {
        match &self.access {
            Access::Read(reader) => Err(self.refuse_writing(reader)),
            Access::Write { phase, .. } => match &*lock(phase) {
                Phase::Open(running) => Ok(running.sender.clone()),
                Phase::New | Phase::Opening(_) => Err(not_open()),
                Phase::Closed => Err(StoreError::closed()),
            },
        }
    }

    /// Why nothing is written here: this opening may only read, and perhaps somebody else writes.
    fn refuse_writing(&self, reader: &Reader) -> StoreError {
        match reader.lock() {
            Ok(seen) if seen.held => lock::busy(&self.paths.document, &seen.value),
            _ => StoreError::not_applied(
                StoreErrorKind::ReadOnly,
                format!("{} was opened for reading only; open it for writing", self.paths.document.display()),
            ),
        }
    }

    /// Asks the present state.
    fn read<T: Send + 'static>(&self, read: impl FnOnce(&Ledger) -> T + Send + 'static) -> BoxFuture<'_, Result<T, StoreError>> {
        match &self.access {
            Access::Read(reader) => {
                let reader = Arc::clone(reader);
                blocking(move || Ok(read(&reader.view()?.ledger)))
            }
            Access::Write { phase, .. } => {
                let found = match &*lock(phase) {
                    Phase::Open(running) => Ok(Arc::clone(&running.shared)),
                    Phase::New | Phase::Opening(_) => Err(not_open()),
                    Phase::Closed => Err(StoreError::closed()),
                };
                Box::pin(async move { Ok(read(&found?.ledger.load())) })
            }
        }
    }
}

fn lock(phase: &Mutex<Phase>) -> MutexGuard<'_, Phase> {
    // A phase is replaced in one assignment, so that a panicking holder leaves it whole.
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

fn not_open() -> StoreError {
    StoreError::not_applied(StoreErrorKind::Input, "the state is not open; call initialize first")
}

/// Does what may block beside the runtime's workers; at once where there is no runtime.
fn blocking<'a, T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> BoxFuture<'a, Result<T, StoreError>> {
    Box::pin(async move {
        if tokio::runtime::Handle::try_current().is_err() {
            return work();
        }
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            Err(StoreError::not_applied(StoreErrorKind::Io, format!("reading the state was broken off: {error}")))
        })
    })
}

impl StateBackend for FileBackend {
    fn name(&self) -> &'static str {
        "file"
    }

    fn location(&self) -> String {
        self.paths.document.display().to_string()
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        match &self.access {
            Access::Read(reader) => {
                let (reader, document) = (Arc::clone(reader), self.paths.document.clone());
                blocking(move || {
                    folder::refuse_nowhere(&document)?;
                    let view = reader.view()?;
                    let mut report = OpenReport::new();
                    for notice in &view.notices {
                        report.notice(notice.clone());
                    }
                    Ok(report)
                })
            }
            Access::Write { phase, opening, leases } => Box::pin(async move {
                let alone = Arc::clone(opening).lock_owned().await;
                let (sender, operations) = channel();
                {
                    let mut phase = lock(phase);
                    if matches!(*phase, Phase::Open(_)) {
                        return Ok(OpenReport::new());
                    }
                    *phase = Phase::Opening(sender.clone());
                }
                // Taken out here when it is open. Else the next one waits for the end of the thread, which may hold the lock: also where this future is
                // dropped, or polled no more.
                let until_ended = Arc::new(Mutex::new(Some(alone)));
                let alone = Arc::downgrade(&until_ended);
                let process = ProcessInfo::current(SystemClock.now());
                let (told, opened) = oneshot::channel();
                let (paths, named, own, leases) = (self.paths.clone(), process.clone(), sender.clone(), Arc::clone(leases));
                let abandoned = CloseUnlessTaken(Some(sender.clone()));
                let thread = std::thread::Builder::new()
                    .name("seeknal-file-writer".to_owned())
                    .spawn(move || {
                        let _until_ended = until_ended;
                        let opened = folder::refuse_nowhere(&paths.document);
                        match opened.and_then(|()| Writer::open(paths, &named, own, leases)) {
                            Ok(Opened { writer, report, shared }) => {
                                // A caller who went away leaves nobody who could use it: the writer closes at once. One who goes away
                                // before taking the answer drops it, and that closes the writer.
                                if told.send(Ok((report, shared, abandoned))).is_ok() {
                                    writer.run(operations);
                                }
                            }
                            Err(error) => {
                                let _caller_gone = told.send(Err(error));
                            }
                        }
                    })
                    .map_err(|error| StoreError::io(self.paths.document.display(), error))?;
                let ended =
                    |_| Err(StoreError::not_applied(StoreErrorKind::Io, "the writer of the state ended while it opened it"));
                let (report, shared, abandoned) = opened.await.unwrap_or_else(ended)?;
                let mut phase = lock(phase);
                if !matches!(*phase, Phase::Opening(_)) {
                    // Closed meanwhile, and so is the writer.
                    return Err(StoreError::closed());
                }
                abandoned.taken();
                *phase = Phase::Open(Running { sender, thread, shared, process });
                if let Some(alone) = alone.upgrade() {
                    *alone.lock().unwrap_or_else(PoisonError::into_inner) = None;
                }
                Ok(report)
            }),
        }
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.ask(|reply| Op::Commit(batch, reply))
    }

    fn pull_from(&self, source: Weak<dyn BatchSource>) -> Option<Wake> {
        let writer = self.sender().ok()?;
        Some(Box::new(move || match writer.send(Op::Pull(Call::new(&source))) {
            Err(SendError(Op::Pull(call))) => {
                call.take_back();
                false
            }
            sent => sent.is_ok(),
        }))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        let run = run.clone();
        self.read(move |ledger| ledger.run(run.as_str()).cloned())
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        let query = query.clone();
        self.read(move |ledger| ledger.list(&query))
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        match &self.access {
            Access::Read(reader) => {
                let reader = Arc::clone(reader);
                blocking(move || reader.leases())
            }
            Access::Write { phase, .. } => {
                let leases = match &*lock(phase) {
                    Phase::Open(running) => Ok(running.shared.leases.list()),
                    Phase::New | Phase::Opening(_) => Err(not_open()),
                    Phase::Closed => Err(StoreError::closed()),
                };
                Box::pin(async move { leases })
            }
        }
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Book(match &self.access {
            Access::Read(_) => Arc::new(LeaseBook::new()),
            Access::Write { leases, .. } => Arc::clone(leases),
        })
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.ask(|reply| Op::Tokens(count, reply))
    }

    /// Whoever only reads is followed by nobody and follows the process that writes.
    fn is_shared(&self) -> bool {
        self.is_read_only()
    }

    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        let run = run.clone();
        self.read(move |ledger| ledger.run(run.as_str()).map(RunState::version))
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        let runs = runs.to_vec();
        self.read(move |ledger| runs.iter().map(|run| ledger.run(run.as_str()).map(RunState::version)).collect())
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        let Access::Read(reader) = &self.access else { return Box::pin(std::future::pending()) };
        Box::pin(async move {
            loop {
                tokio::time::sleep(reader.pause()).await;
                // Four looks at names, each some microseconds.
                if reader.has_changed()? {
                    return Ok(ForeignCommits::all());
                }
            }
        })
    }

    fn is_read_only(&self) -> bool {
        matches!(self.access, Access::Read(_))
    }

    fn process(&self) -> Option<ProcessInfo> {
        match &self.access {
            Access::Read(_) => None,
            Access::Write { phase, .. } => match &*lock(phase) {
                Phase::Open(running) => Some(running.process.clone()),
                Phase::New | Phase::Opening(_) | Phase::Closed => None,
            },
        }
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        match &self.access {
            Access::Read(reader) => {
                let reader = Arc::clone(reader);
                blocking(move || {
                    let seen = reader.lock()?;
                    let who = seen.value.who().filter(|_| seen.held).cloned();
                    Ok(who.map(|process| OpenProcess::new(process, Some(true))).into_iter().collect())
                })
            }
            Access::Write { .. } => {
                let own = self.process().map(|process| OpenProcess::new(process, Some(true)));
                Box::pin(async move { Ok(own.into_iter().collect()) })
            }
        }
    }

    fn latest_node<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<(RunId, NodeState)>, StoreError>> {
        let node = node.clone();
        self.read(move |ledger| {
            let run = ledger.runs_of_node(node.as_str()).next()?;
            Some((run.id().clone(), run.node(node.as_str())?.clone()))
        })
    }

    fn last_success<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<LastSuccess>, StoreError>> {
        let node = node.clone();
        self.read(move |ledger| ledger.last_success(node.as_str()))
    }

    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        let node = node.clone();
        self.read(move |ledger| ledger.coverage(node.as_str()))
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        self.read(|ledger| ledger.retained().into_iter().collect())
    }

    fn checkpoint(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        if self.is_read_only() {
            return Box::pin(async { Ok(()) });
        }
        self.ask(Op::Checkpoint)
    }

    fn verify(&self) -> BoxFuture<'_, Result<VerifyReport, StoreError>> {
        let paths = self.paths.clone();
        blocking(move || verify::verify(&paths))
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        let Access::Write { phase, opening, .. } = &self.access else { return Box::pin(async { Ok(()) }) };
        let was = std::mem::replace(&mut *lock(phase), Phase::Closed);
        let running = match was {
            Phase::Open(running) => Some(running),
            Phase::Opening(sender) => {
                // A writer that did not come to be is closed.
                let _gone = sender.send(Op::Close(None));
                return Box::pin(async move {
                    drop(opening.lock().await);
                    Ok(())
                });
            }
            Phase::New | Phase::Closed => None,
        };
        // The message is on its way before the future is first polled: dropping it does not stop the close.
        let closed = running.map(|running| {
            let (reply, answer) = oneshot::channel();
            let sent = running.sender.send(Op::Close(Some(reply)));
            (running.thread, sent.is_ok(), answer)
        });
        Box::pin(async move {
            let Some((thread, sent, answer)) = closed else { return Ok(()) };
            let result =
                if sent { answer.await.unwrap_or_else(|_| Err(StoreError::closed())) } else { Err(StoreError::closed()) };
            // It has answered: what is left of the thread is its return.
            let _ended = thread.join();
            result
        })
    }
}

impl Drop for FileBackend {
    fn drop(&mut self) {
        let Access::Write { phase, .. } = &self.access else { return };
        let phase = std::mem::replace(&mut *lock(phase), Phase::Closed);
        if let Phase::Open(running) = phase
            && running.sender.send(Op::Close(None)).is_ok()
            // The writer may have been the last to hold a source, and with it this: it does not wait for itself.
            && running.thread.thread().id() != std::thread::current().id()
        {
            // A fault of this close has nobody to be told to; the journal holds everything.
            let _ended = running.thread.join();
        }
    }
}
