//! Reading without the lock, beside a live writer or after one: nothing is made, recovered or changed.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::backups;
use super::elsewhere::{self, Unseen};
use super::lock::{self, Seen};
use super::paths::{Identity, Paths};
use super::record::Leases;
use super::recover::{self, Files, State};
use crate::model::{Clock, LeaseRecord, Ledger, NodeId, NodeState, RunHeader, RunState, SystemClock, Version};
use crate::store::{StoreError, StoreErrorKind};

/// How often a state that is seen apart (a writer is checkpointing just now) is read again.
const ATTEMPTS: u32 = 50;
/// How long to wait before reading again.
const PAUSE: Duration = Duration::from_millis(10);
/// Files that changed this recently may change again within the same tick of the file system's clock: what was read is not kept.
const TICK_OF_STAMPS: i64 = 50;

/// Following a writer, reading takes one part in so many of the time.
const READING_SHARE: u32 = 10;
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The files as they looked when they were read.
type Look = [Option<Identity>; 4];

/// What was read.
#[derive(Debug)]
pub(super) struct View {
    pub(super) ledger: Ledger,
    pub(super) leases: Leases,
    pub(super) notices: Vec<String>,
}

#[derive(Debug, Default)]
struct Last {
    view: Option<Arc<View>>,
    /// The files as they looked then; `None`: they may have changed since.
    at: Option<Look>,
}

/// A reader that remembers what it read as long as the files stay as they are.
#[derive(Debug)]
pub(super) struct Reader {
    paths: Paths,
    last: Mutex<Last>,
    /// The files as they looked when their change was told last; `None`: they may have changed since.
    told: Mutex<Option<Look>>,
    /// How long reading took last.
    took: Mutex<Duration>,
}

impl Reader {
    pub(super) fn new(paths: Paths) -> Self {
        Self { paths, last: Mutex::default(), told: Mutex::new(None), took: Mutex::new(Duration::ZERO) }
    }

    /// Whether the files changed since this was answered with yes, or since they were read first. Too much, never too little: files that changed just
    /// now may change again within one tick of their stamps.
    pub(super) fn has_changed(&self) -> Result<bool, StoreError> {
        let look = look(&self.paths)?;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let same = *told == Some(look);
        *told = is_settled(&look).then_some(look);
        Ok(!same)
    }

    /// How long to wait between two looks: reading all of it takes at most a small part of the time.
    pub(super) fn pause(&self) -> Duration {
        (*self.took.lock().unwrap_or_else(PoisonError::into_inner) * READING_SHARE).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
    }

    /// The present state.
    pub(super) fn view(&self) -> Result<Arc<View>, StoreError> {
        let look = look(&self.paths)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(view), true) = (&last.view, last.at == Some(look)) {
            return Ok(Arc::clone(view));
        }
        let begun = Instant::now();
        let mut view = load(&self.paths)?;
        if let Some(before) = &last.view {
            tell_apart(&before.ledger, &mut view.ledger);
        }
        let view = Arc::new(view);
        *self.took.lock().unwrap_or_else(PoisonError::into_inner) = begun.elapsed();
        *last = Last { view: Some(Arc::clone(&view)), at: is_settled(&look).then_some(look) };
        Ok(view)
    }

    /// The leases that a live writer noted; none without one.
    pub(super) fn leases(&self) -> Result<Vec<LeaseRecord>, StoreError> {
        let is_written = lock::look(&self.paths.lock)?.is_written();
        Ok(if is_written { self.view()?.leases.at(SystemClock.now()) } else { Vec::new() })
    }

    /// What can be seen of the lock.
    pub(super) fn lock(&self) -> Result<Seen, StoreError> {
        lock::look(&self.paths.lock)
    }
}

/// Who follows goes by versions. Those of a document that somebody else wrote, or put back, say nothing: what is not as it was gets a higher one, and what
/// is as it was keeps the one that it had.
fn tell_apart(before: &Ledger, now: &mut Ledger) {
    let mended: Vec<RunState> = now.runs().filter_map(|run| told_apart(before.run(run.id().as_str())?, run)).collect();
    for run in mended {
        now.restore_run(run);
    }
}

/// The run with versions that tell what changed; `None` if they do already.
fn told_apart(was: &RunState, run: &RunState) -> Option<RunState> {
    let version = run.version().max(Version(was.version().0.saturating_add(1)));
    let header = RunHeader { version: was.header().version, ..run.header().clone() };
    let header_changed = header != *was.header();
    let changed: HashSet<&NodeId> =
        run.nodes().filter(|(id, node)| !was.node(id.as_str()).is_some_and(|was| is_same(was, node))).map(|(id, _)| id).collect();
    if !header_changed && changed.is_empty() && run.node_count() == was.node_count() {
        return (run.version() < was.version()).then(|| was.clone());
    }
    let tells = |row: Version| row > was.version();
    let all_told = changed.iter().all(|id| run.node(id.as_str()).is_some_and(|node| tells(node.version)));
    if tells(run.version()) && all_told && (!header_changed || tells(run.header().version)) {
        return None;
    }
    let row = |changed: bool, row: Version| if changed && !tells(row) { version } else { row };
    let mut header = run.header().clone();
    header.version = row(header_changed, header.version);
    let nodes = run.nodes().map(|(id, node)| {
        let mut node = node.clone();
        node.version = row(changed.contains(&id), node.version);
        (id.clone(), node)
    });
    Some(RunState::from_parts(run.id().clone(), header, version, run.created_version(), nodes))
}

/// Whether a node says what it said; which version says so is another matter.
fn is_same(was: &NodeState, now: &NodeState) -> bool {
    if was.version == now.version {
        return was == now;
    }
    let mut now = now.clone();
    now.version = was.version;
    now == *was
}

fn look(paths: &Paths) -> Result<Look, StoreError> {
    Ok([Identity::at(&paths.document)?, Identity::at(&paths.journal)?, Identity::at(&paths.next)?, Identity::at(&paths.bare)?])
}

fn is_settled(look: &Look) -> bool {
    let now = SystemClock.now().timestamp_millis();
    look.iter().flatten().all(|identity| now.saturating_sub(identity.changed_ms()) > TICK_OF_STAMPS)
}

/// Reads document and journals; again, if a writer moved them meanwhile. Also says what was seen of the lock.
pub(super) fn read_settled(paths: &Paths) -> Result<(State, Seen), StoreError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let seen = lock::look(&paths.lock)?;
        let files = Files::read(paths);
        // A checkpoint that renames between two reads would leave one of its journals unread, with all that was acknowledged since it began.
        let mut moved = match &files {
            Ok(files) => !files.are_there(paths)?,
            Err(_) => false,
        };
        if moved && attempt < ATTEMPTS {
            std::thread::sleep(PAUSE);
            continue;
        }
        let found = files.and_then(|files| recover::join(paths, files, seen.value.seq));
        let settled = match &found {
            Ok(state) => {
                // A foreign document was joined with the copy beside it, which its successor replaces.
                moved |= Identity::at(&paths.document)? != state.document;
                state.strangers.is_empty()
            }
            Err(error) => error.kind() != StoreErrorKind::Corrupt,
        };
        // Without a writer nothing moves: what is apart is apart.
        if (!moved && (settled || !seen.held)) || attempt == ATTEMPTS {
            return found.map(|state| (state, seen)).map_err(|error| backups::named(error, &paths.document));
        }
        std::thread::sleep(PAUSE);
    }
}

fn load(paths: &Paths) -> Result<View, StoreError> {
    let (mut state, seen) = read_settled(paths)?;
    for (journal, records) in &state.strangers {
        state.notices.push(format!(
            "{} does not belong to {}: the document wins; its {records} records will be set aside when the state is opened for writing",
            journal.display(),
            paths.document.display()
        ));
    }
    state.notices.extend(state.lost.take().filter(|_| !seen.held));
    match elsewhere::unseen(paths, &seen)? {
        Some(Unseen::Live(unseen) | Unseen::Left(unseen)) => state.notices.push(unseen),
        None => {
            let lost = state.lost_journal(seen.value.holder.as_ref().filter(|_| !seen.held), seen.value.seq);
            state.notices.extend(lost);
        }
    }
    if let (Some((from, to)), false) = (state.active.as_ref().and_then(|active| active.torn), seen.held) {
        state.notices.push(format!(
            "the last record of the journal is torn ({} bytes at byte {from}); it was never acknowledged, and is cut when the state is opened for writing",
            to - from
        ));
    }
    Ok(View { ledger: state.ledger, leases: state.leases, notices: state.notices })
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::model::{Batch, Entry, Mutation, NewRun, RunId, RunPart};
    use crate::store::file::FileBackend;
    use crate::store::{BackendOptions, StateBackend};

    async fn create(backend: &FileBackend, run: &str) {
        let mutations = vec![Mutation::Create { run: NewRun::running(), at: SystemClock.now() }];
        let (run, none) = (RunId::new(run).unwrap(), Version::NONE);
        let part = RunPart { run, base: none, expect: none, guards: Vec::new(), mutations, after: None };
        backend.commit(Arc::new(Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }]))).await.unwrap();
    }

    /// The document and the journal of this moment, under these names.
    fn keep(paths: &Paths, document: &Path, journal: &Path) {
        std::fs::copy(&paths.document, document).unwrap();
        std::fs::copy(&paths.journal, journal).unwrap();
    }

    /// The reader has read the document and the old journal when the checkpoint that put that document in place renames the next one.
    #[tokio::test]
    async fn files_that_a_checkpoint_moves_between_two_reads_are_read_again() {
        let (written, seen) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (from, paths) = (Paths::new(written.path()), Paths::new(seen.path()));
        let backend = FileBackend::new(&BackendOptions::new().base_path(written.path()));
        backend.initialize().await.unwrap();
        create(&backend, "run_1").await;
        keep(&from, &PathBuf::from("/dev/null"), &paths.journal);
        backend.checkpoint().await.unwrap();
        create(&backend, "run_2").await;
        keep(&from, &paths.document, &paths.next);
        let runs = |state: &State| state.ledger.runs().map(|run| run.id().to_string()).collect::<Vec<_>>();

        let whole = Files::read(&paths).unwrap();
        assert!(whole.are_there(&paths).unwrap());
        let mut apart = Files::read(&paths).unwrap();
        std::fs::rename(&paths.next, &paths.journal).unwrap();
        apart.forget_next();
        assert!(!whole.are_there(&paths).unwrap(), "a journal has another name");
        assert!(!apart.are_there(&paths).unwrap(), "the next journal was missed");
        let apart = recover::join(&paths, apart, 0).unwrap();
        assert_eq!((runs(&apart), apart.strangers.len()), (vec!["run_1".to_owned()], 0), "nothing else tells that it is apart");
        assert_eq!(runs(&read_settled(&paths).unwrap().0), ["run_2", "run_1"]);
        // Who writes on moves nothing.
        let files = Files::read(&paths).unwrap();
        let mut journal = std::fs::OpenOptions::new().append(true).open(&paths.journal).unwrap();
        std::io::Write::write_all(&mut journal, &[0; 4096]).unwrap();
        assert!(files.are_there(&paths).unwrap());
    }
}
