//! Writing the document: a new file, a sync, a rename, a sync of the folder; on a thread of its own while the writer goes on.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::document::{self, Shape};
use super::document_write::{self, Generation};
use super::lock::LockFile;
use super::paths::{self, Identity, Paths};
use super::recover::State;
use super::writer::Op;
use crate::model::{Clock, Ledger, SystemClock};
use crate::store::{StoreError, StoreErrorKind};

/// The document that should lie there now.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    /// `None`: there should be none.
    pub(super) identity: Option<Identity>,
    /// Whether the copy of the last one holds what this state does not.
    pub(super) keeps_previous: bool,
    /// The file that keeps other writers out.
    pub(super) lock: LockFile,
}

/// A document that could not be written.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) error: StoreError,
    /// The document that lies there now, if it was put in place and only the last sync failed.
    pub(super) placed: Option<Identity>,
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self { error, placed: None }
    }
}

/// Somebody else replaced, changed or removed the document while this process had it open.
pub(super) fn replaced(paths: &Paths) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Poisoned,
        format!(
            "{} was replaced or changed by somebody else while this process had it open; nothing more is written, and it was left as it is. \
             Open the state anew: the document wins, and what was written since the last checkpoint is kept in a journal that is set aside",
            paths.document.display()
        ),
    )
}

/// Checks that nobody else touched the document.
pub(super) fn check(paths: &Paths, expected: Option<Identity>) -> Result<(), StoreError> {
    if Identity::at(&paths.document)? == expected { Ok(()) } else { Err(replaced(paths)) }
}

/// Writes a document and puts it in place.
pub(super) fn put_document(
    paths: &Paths,
    ledger: &Ledger,
    generation: Generation<'_>,
    shape: &Shape,
    expected: &Expected,
) -> Result<Identity, Failed> {
    check(paths, expected.identity)?;
    let bytes = document_write::write(ledger, generation, shape)?;
    // Through a symbolic link, the file that it names is replaced, not the link.
    let place = paths.place();
    let temporary = paths::temporary(&place);
    let access = paths.access()?;
    let identity = paths::write_new(&temporary, &bytes, access)?;
    let keeps = expected.identity.is_none() || expected.keeps_previous;
    let placed = if keeps { keep_previous(paths) } else { Ok(()) }
        .and_then(|()| if shape.keeps_original { keep_original(paths) } else { Ok(()) })
        .and_then(|()| check(paths, expected.identity))
        .and_then(|()| expected.lock.check(paths))
        .and_then(|()| paths::rename(&temporary, &place));
    if let Err(error) = placed {
        // The first fault is the one to tell; a leftover is swept at the next open.
        let _left_for_the_sweep = paths::remove(&temporary);
        return Err(error.into());
    }
    paths::sync(paths::folder_of(&place)).map_err(|error| Failed { error, placed: Some(identity) })?;
    if let Err(error) = keep_copy(paths, &bytes) {
        // The document itself is in place: a second copy that could not be made must not stop anybody.
        tracing::warn!(%error, "the document was written, but no copy of it could be kept");
    }
    Ok(identity)
}

/// Keeps the last document of ours under a name that no other program rewrites. A copy and not a link: editors write in place, through all links.
fn keep_copy(paths: &Paths, document: &[u8]) -> Result<(), StoreError> {
    let copy = paths.temporary();
    let access = paths.access()?;
    let kept = paths::write_new(&copy, document, access).and_then(|_| paths::rename(&copy, &paths.previous));
    if kept.is_err() {
        let _left_for_the_sweep = paths::remove(&copy);
    }
    kept
}

/// The copy of the last document may be all that is left of what it holds: it gets one more name, that nothing of ours writes to.
fn keep_previous(paths: &Paths) -> Result<(), StoreError> {
    use std::os::unix::fs::MetadataExt;
    // What has two names was kept before, and the document could not be written then.
    match paths.previous.symlink_metadata() {
        Ok(previous) if previous.nlink() == 1 => {}
        _ => return Ok(()),
    }
    let aside = Paths::aside(&paths.previous, "orphan", SystemClock.now());
    // Not every file system has links. Renamed it is out of sight for a moment, should a crash come before the next copy.
    if std::fs::hard_link(&paths.previous, &aside).is_err() {
        paths::rename(&paths.previous, &aside)?;
    }
    paths.sync_folder()
}

/// What is no JSON is written as it was found, but others may think otherwise: the first document of this kind is kept, byte for byte.
fn keep_original(paths: &Paths) -> Result<(), StoreError> {
    const WHY: &str = "original";
    let kept = format!("{}.{WHY}-", paths.document.file_name().unwrap_or_default().to_string_lossy());
    let fail = |error| StoreError::io(paths.base.display(), error);
    for entry in std::fs::read_dir(&paths.base).map_err(fail)? {
        if entry.map_err(fail)?.file_name().to_string_lossy().starts_with(&kept) {
            return Ok(());
        }
    }
    let Some((bytes, _)) = paths::read(&paths.document)? else { return Ok(()) };
    let copy = Paths::aside(&paths.document, WHY, SystemClock.now());
    paths::write_new(&copy, &bytes, paths.access()?)?;
    paths.sync_folder()
}

/// Brings the copy of the document up to date if a crash came between the two. A copy that is newer than the document is left, beside a restored backup it
/// is; and one that is not as it was written, which may be. Answers with what could not be done.
pub(super) fn refresh_copy(paths: &Paths, state: &mut State) -> Result<Option<String>, StoreError> {
    let Some((document, identity)) = paths::read(&paths.document)? else { return Ok(None) };
    if Some(identity) != state.document {
        // Somebody replaced it just now; the writer finds that out.
        return Ok(None);
    }
    if let Some((copy, _)) = paths::read(&paths.previous)? {
        if copy == document {
            state.is_newest = true;
            return Ok(None);
        }
        let copy = document::read(&paths.previous, &copy, 0).ok().filter(|copy| copy.generation.is_some());
        let seq = copy.map(|copy| copy.ledger.seq().0);
        state.is_newest = seq.is_some_and(|seq| seq <= state.document_seq);
        state.beside_seq = state.beside_seq.max(seq.filter(|_| !state.is_newest));
        if !state.is_newest && state.generation.is_some() {
            state.keeps_previous = true;
            return Ok(None);
        }
    }
    if state.generation.is_none() {
        return Ok(None);
    }
    // The document itself is sound: that it has no second copy must not stop anybody.
    let kept = keep_copy(paths, &document).and_then(|()| paths.sync_folder());
    Ok(kept.err().map(|error| format!("no copy of {} could be kept: {error}", paths.document.display())))
}

/// A checkpoint under way on its own thread.
#[derive(Debug)]
pub(super) struct Job {
    result: Receiver<Done>,
    thread: JoinHandle<()>,
}

/// How a checkpoint ended.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) result: Result<Identity, Failed>,
    /// Whether the next journal has its proper name now.
    pub(super) renamed: bool,
    pub(super) took: Duration,
}

/// What a checkpoint needs: values of its own, nothing shared with the writer.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) paths: Paths,
    pub(super) ledger: Ledger,
    pub(super) generation: String,
    pub(super) follows: String,
    pub(super) shape: Shape,
    pub(super) expected: Expected,
}

impl Task {
    fn run(&self) -> Done {
        let begun = Instant::now();
        let generation = Generation { own: &self.generation, follows: Some(&self.follows) };
        let result = put_document(&self.paths, &self.ledger, generation, &self.shape, &self.expected);
        let renamed = result.is_ok()
            && paths::rename(&self.paths.next, &self.paths.journal).and_then(|()| self.paths.sync_folder()).is_ok();
        Done { result, renamed, took: begun.elapsed() }
    }
}

impl Job {
    /// Begins; the writer is woken when it is done.
    pub(super) fn spawn(task: Task, wake: Sender<Op>) -> Result<Self, StoreError> {
        let (sender, result) = channel();
        let place = task.paths.document.clone();
        let thread = std::thread::Builder::new()
            .name("seeknal-checkpoint".to_owned())
            .spawn(move || {
                // A writer that is gone needs no answer.
                let _writer_gone = sender.send(task.run());
                let _writer_gone = wake.send(Op::Wake);
            })
            .map_err(|error| StoreError::io(place.display(), error))?;
        Ok(Self { result, thread })
    }

    /// The end of it, if it has come.
    pub(super) fn poll(&self) -> Option<Done> {
        match self.result.try_recv() {
            Ok(done) => Some(done),
            Err(std::sync::mpsc::TryRecvError::Empty) => None,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => Some(Self::panicked()),
        }
    }

    /// Waits for the end of it.
    pub(super) fn wait(self) -> Done {
        let done = self.result.recv().unwrap_or_else(|_| Self::panicked());
        // What it had to say it has said; a panic was told as a failure.
        let _ended = self.thread.join();
        done
    }

    fn panicked() -> Done {
        let error =
            StoreError::not_applied(StoreErrorKind::Io, "the checkpoint ended without a result; the journal holds everything");
        Done { result: Err(error.into()), renamed: false, took: Duration::ZERO }
    }
}
