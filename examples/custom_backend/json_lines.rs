//! A complete backend in one file: an append-only log of JSON lines, over the ledger that holds all rules.
//!
//! Each line is one batch: what was accepted of it, and what was answered. A batch is decided on a copy of the ledger, appended, synced, and only
//! then is the copy put in place. Opening replays the lines; a last line that was cut off was never acknowledged and is cut away; anything
//! else that does not read, or does not lead to the same answer again, is damage and refuses to open.
//!
//! What a backend for production would add: a checkpoint, so that the log does not grow for ever, and a checksum for every line.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use seeknal_state::model::{
    Batch, BatchAnswer, BatchId, Clock, Entry, Freed, LeaseRecord, Ledger, Mutation, NoFences, NodeId, Outcome, ProcessInfo,
    Retained, RunId, RunPage, RunPart, RunQuery, RunState, SystemClock, Version,
};
use seeknal_state::store::{AnswerLog, BoxFuture, LeaseBook, LeaseStore};
use seeknal_state::{BackendOptions, OpenReport, StateBackend, StoreError, StoreErrorKind};

/// Makes the backend for the registry. It needs the option `path`: the log's file.
///
/// # Errors
/// [`StoreErrorKind::Input`] without a path, [`StoreErrorKind::Unsupported`] for reading only.
pub(crate) fn make(options: &BackendOptions) -> Result<Arc<dyn StateBackend>, StoreError> {
    if options.is_read_only() {
        return Err(StoreError::unsupported(NAME, "opening for reading only"));
    }
    match options.get("path") {
        Some(path) => Ok(Arc::new(JsonLines::new(path))),
        None => {
            Err(StoreError::not_applied(StoreErrorKind::Input, "the custom backend needs the option `path`, the file of its log"))
        }
    }
}

const NAME: &str = "custom";
const FORMAT: u32 = 1;

/// One line of the log.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    /// The first one.
    Format(u32),
    /// Fencing tokens up to this one may be given out.
    Tokens(u64),
    /// What was accepted of a batch, and the answer to it.
    Batch { id: BatchId, accepted: Vec<Accepted>, answer: BatchAnswer },
}

#[derive(Serialize, Deserialize)]
struct Accepted {
    runs: Vec<RunChange>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    retained: Vec<(NodeId, Retained)>,
}

#[derive(Serialize, Deserialize)]
struct RunChange {
    run: RunId,
    before: Version,
    mutations: Vec<Mutation>,
}

impl Accepted {
    /// The entry that does the same again, on the state that it was accepted on.
    fn into_entry(self) -> Entry {
        let part = |change: RunChange| RunPart {
            run: change.run,
            base: change.before,
            expect: change.before,
            guards: Vec::new(),
            mutations: change.mutations,
            after: None,
        };
        Entry { parts: self.runs.into_iter().map(part).collect(), retained: self.retained, ..Entry::default() }
    }
}

/// What readers see, and what writers replace as a whole.
#[derive(Debug, Default)]
struct Memory {
    ledger: Ledger,
    answers: AnswerLog,
    tokens: u64,
}

/// The log, open for appending.
struct Log {
    file: File,
    /// Why nothing can be written any more: after a failed write nobody knows what the file holds.
    broken: Option<String>,
}

impl Drop for Log {
    fn drop(&mut self) {
        // Closing alone would not do: a child that is just being started has the file open too, until it runs its program.
        let _freed_with_the_process = self.file.unlock().is_err();
    }
}

struct Shared {
    path: PathBuf,
    /// Held over a whole commit, sync included. `None`: not open.
    log: Mutex<Option<Log>>,
    /// Held for moments only, so that nobody who reads waits for the disk.
    memory: Mutex<Memory>,
    leases: Arc<LeaseBook>,
    process: OnceLock<ProcessInfo>,
}

/// The backend. A clone of its inside goes to the blocking thread of every call.
struct JsonLines {
    shared: Arc<Shared>,
}

impl fmt::Debug for JsonLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonLines").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl JsonLines {
    fn new(path: impl Into<PathBuf>) -> Self {
        let shared = Shared {
            path: path.into(),
            log: Mutex::new(None),
            memory: Mutex::default(),
            leases: Arc::default(),
            process: OnceLock::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Does blocking work on a thread that may block. It goes on when the caller goes away.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let done = tokio::task::spawn_blocking(move || work(&shared)).await;
            done.unwrap_or_else(|error| {
                Err(StoreError::unknown(StoreErrorKind::Poisoned, format!("the custom backend panicked: {error}")))
            })
        })
    }

    fn read<T: Send + 'static>(&self, read: impl FnOnce(&Ledger) -> T) -> BoxFuture<'_, Result<T, StoreError>> {
        let found = read(&self.shared.memory().ledger);
        Box::pin(async move { Ok(found) })
    }
}

impl Shared {
    // Both locks guard values that are replaced in single steps: a panic leaves them whole.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Option<Log>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self, error: std::io::Error) -> StoreError {
        StoreError::io(self.path.display(), error)
    }

    fn corrupt(&self, number: usize, why: impl fmt::Display) -> StoreError {
        let place = format!("{}, line {number}", self.path.display());
        StoreError::not_applied(
            StoreErrorKind::Corrupt,
            format!("{place}: {why}; the file was left as it is, restore it from a backup"),
        )
    }

    fn open(&self) -> Result<OpenReport, StoreError> {
        let mut log = self.log();
        let mut report = OpenReport::new();
        if log.is_some() {
            return Ok(report);
        }
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|error| self.io(error))?;
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(&self.path).map_err(|error| self.io(error))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StoreError::not_applied(
                StoreErrorKind::Busy,
                format!("{}: another process has it open; close that one first", self.path.display()),
            ),
            TryLockError::Error(error) => self.io(error),
        })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|error| self.io(error))?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let memory = self.replay(bytes.get(..whole).unwrap_or_default())?;
        if whole < bytes.len() {
            file.set_len(u64::try_from(whole).unwrap_or(u64::MAX)).map_err(|error| self.io(error))?;
            file.seek(SeekFrom::End(0)).map_err(|error| self.io(error))?;
            report.notice(format!(
                "{}: the last line was cut off by a crash; its {} bytes were never acknowledged and are gone",
                self.path.display(),
                bytes.len() - whole
            ));
        }
        let mut opened = Log { file, broken: None };
        if whole == 0 {
            self.append(&mut opened, &Line::Format(FORMAT))?;
            // The name in the folder must last as well as the lines.
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| self.io(error))?;
        } else {
            opened.file.sync_data().map_err(|error| self.io(error))?;
        }
        *self.memory() = memory;
        self.process.get_or_init(|| ProcessInfo::current(SystemClock.now()));
        *log = Some(opened);
        Ok(report)
    }

    fn replay(&self, bytes: &[u8]) -> Result<Memory, StoreError> {
        let mut memory = Memory::default();
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
            let number = index + 1;
            let line = serde_json::from_slice(line).map_err(|error| self.corrupt(number, error))?;
            match line {
                Line::Format(FORMAT) if number == 1 => {}
                Line::Format(newer) if newer > FORMAT => {
                    let why = format!("{}: it was written in format {newer}; use a newer version", self.path.display());
                    return Err(StoreError::not_applied(StoreErrorKind::NewerFormat, why));
                }
                Line::Format(_) => return Err(self.corrupt(number, "the format is named in the wrong place")),
                Line::Tokens(tokens) => memory.tokens = memory.tokens.max(tokens),
                Line::Batch { id, accepted, answer } => {
                    let entries: Vec<Entry> = accepted.into_iter().map(Accepted::into_entry).collect();
                    let again = memory.ledger.commit(&entries, &NoFences);
                    if !again.outcomes.iter().eq(answer.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Applied(_))))
                    {
                        return Err(self.corrupt(number, "it does not lead to the answer that was given"));
                    }
                    memory.answers.put(id, answer);
                }
            }
        }
        Ok(memory)
    }

    fn commit(&self, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let mut log = self.log();
        if let Some(answer) = self.memory().answers.get(batch.id) {
            return Ok(answer.clone());
        }
        let log = log.as_mut().ok_or_else(StoreError::closed)?;
        let (mut ledger, mut freed) = (self.memory().ledger.clone(), Freed::default());
        let answer = ledger.commit_freeing(&batch.entries, &*self.leases, &mut freed);
        let accepted: Vec<Accepted> =
            batch.entries.iter().zip(&answer.outcomes).filter_map(|(entry, outcome)| accepted(entry, outcome)).collect();
        if !accepted.is_empty() {
            self.append(log, &Line::Batch { id: batch.id, accepted, answer: answer.clone() })?;
        }
        let mut memory = self.memory();
        // Whoever sees what was written finds the leases void that it freed.
        self.leases.free(&freed);
        memory.ledger = ledger;
        memory.answers.put(batch.id, answer.clone());
        Ok(answer)
    }

    fn reserve(&self, count: u64) -> Result<Range<u64>, StoreError> {
        let mut log = self.log();
        let log = log.as_mut().ok_or_else(StoreError::closed)?;
        let start = self.memory().tokens.saturating_add(1);
        let end = start.saturating_add(count);
        self.append(log, &Line::Tokens(end - 1))?;
        self.memory().tokens = end - 1;
        Ok(start..end)
    }

    /// Appends a line and syncs it. A failure is final: a sync that failed once may lie when it is tried again.
    fn append(&self, log: &mut Log, line: &Line) -> Result<(), StoreError> {
        if let Some(why) = &log.broken {
            let message = format!("{}: an earlier write failed ({why}); open the state again", self.path.display());
            return Err(StoreError::not_applied(StoreErrorKind::Poisoned, message));
        }
        let mut text = serde_json::to_vec(line).map_err(|error| self.io(error.into()))?;
        text.push(b'\n');
        let written = log.file.write_all(&text).and_then(|()| log.file.sync_data());
        written.map_err(|error| {
            log.broken = Some(error.to_string());
            self.io(error).into_unknown()
        })
    }
}

fn accepted(entry: &Entry, outcome: &Outcome) -> Option<Accepted> {
    let Outcome::Applied(receipt) = outcome else { return None };
    let change = |(part, receipt): (&RunPart, &seeknal_state::RunReceipt)| RunChange {
        run: part.run.clone(),
        before: receipt.before,
        mutations: part.mutations.clone(),
    };
    Some(Accepted { runs: entry.parts.iter().zip(&receipt.runs).map(change).collect(), retained: entry.retained.clone() })
}

impl StateBackend for JsonLines {
    fn name(&self) -> &str {
        NAME
    }

    fn location(&self) -> String {
        self.shared.path.display().to_string()
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.blocking(Shared::open)
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.blocking(move |shared| shared.commit(&batch))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.read(|ledger| ledger.run(run.as_str()).cloned())
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.read(|ledger| ledger.list(query))
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async { Ok(self.shared.leases.list()) })
    }

    // Everything below is optional: the file admits one process, so that leases may live in memory, and it keeps what outlives deleted runs.

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Book(Arc::clone(&self.shared.leases))
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.blocking(move |shared| shared.reserve(count))
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.shared.process.get().cloned()
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        self.read(|ledger| ledger.retained().into_iter().collect())
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.blocking(|shared| {
            // Every line was synced when it was acknowledged; the lock goes with the log.
            drop(shared.log().take());
            Ok(())
        })
    }
}
