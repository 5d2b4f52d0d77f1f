//! Looking at a stored state from end to end, and putting right what can be put right, with a copy of everything that is changed.

use std::path::Path;

use chrono::{DateTime, Utc};

use super::checkpoint;
use super::document;
use super::elsewhere::{self, Unseen};
use super::journal::Stored;
use super::lock::{self, Lock};
use super::mend;
use super::paths::{self, Paths};
use super::reader::read_settled;
use super::recover::{self, Files};
use crate::model::ProcessInfo;
use crate::store::access::Access;
use crate::store::highwater::HighWater;
use crate::store::{StoreError, StoreErrorKind, VerifyReport};

/// Checks document, journals, numbers and leftovers; changes nothing.
pub(super) fn verify(paths: &Paths) -> Result<VerifyReport, StoreError> {
    let mut report = VerifyReport::new();
    let mut held = false;
    // The last sequence number of the document and its journal, if the document is ours.
    let mut known = None;
    // A lock that cannot be read is told with the state.
    let unseen = lock::look(&paths.lock).and_then(|seen| elsewhere::unseen(paths, &seen)).unwrap_or_default();
    match read_settled(paths) {
        Ok((state, seen)) => {
            held = seen.held;
            known = state.told_seq.map(|seq| state.active.as_ref().map_or(seq, |active| active.tail.max(seq)));
            if paths.lock.exists() {
                let HighWater { token, seq, .. } = seen.value;
                report.checked.push(format!("{}: token {token}, sequence {seq}", paths.lock.display()));
            }
            let runs = state.ledger.run_count();
            let nodes: usize = state.ledger.runs().map(crate::model::RunState::node_count).sum();
            report.checked.push(format!(
                "{}: {runs} run(s), {nodes} node state(s), {} record(s) in the journal",
                // The oldest runner's map stands for a document that is not there.
                if paths.document.exists() || !paths.bare.exists() { &paths.document } else { &paths.bare }.display(),
                state.replayed
            ));
            check_versions(&state.ledger, &mut report);
            let lost_journal = state.lost_journal(seen.value.holder.as_ref().filter(|_| !held), seen.value.seq);
            // Beside a live writer document and journal may be seen apart, or a frame half written.
            if !held {
                // Neither is damage: the next open for writing puts both right, and keeps what it cuts or sets aside.
                for (journal, records) in &state.strangers {
                    report.checked.push(format!(
                        "{}: {records} record(s) that do not belong to the document; it is set aside at the next open for writing",
                        journal.display()
                    ));
                }
                if let Some((from, to)) = state.active.as_ref().and_then(|active| active.torn) {
                    report.checked.push(format!(
                        "the journal ends with a torn record: {} bytes at byte {from}; it was never acknowledged, and is cut at the next open for writing",
                        to - from
                    ));
                }
            }
            // A writer that was ended before it had a document leaves a lock that tells of one; only a copy of one proves that there was one.
            let told = if paths.previous.exists() { &mut report.problems } else { &mut report.checked };
            told.extend(state.lost.filter(|_| !held));
            report.checked.extend(lost_journal.filter(|_| unseen.is_none()));
            report.checked.extend(state.notices);
        }
        Err(error) => report.problems.push(error.to_string()),
    }
    match unseen {
        Some(Unseen::Left(unseen)) => report.problems.push(unseen),
        Some(Unseen::Live(unseen)) => report.checked.push(unseen),
        None => {}
    }
    if let Some((bytes, _)) = paths::read(&paths.previous)? {
        match document::read(&paths.previous, &bytes, 0) {
            Ok(previous) => {
                report.checked.push(format!("{}: {} run(s)", paths.previous.display(), previous.ledger.run_count()));
                if previous.generation.is_some() && !held && known.is_some_and(|known| known < previous.ledger.seq().0) {
                    report.checked.push(format!(
                        "{} is newer than the document: a backup was put back, and is what counts; the newer one is kept under another name when \
                         something is written",
                        paths.previous.display()
                    ));
                }
            }
            Err(error) => report.problems.push(error.to_string()),
        }
    }
    if !held {
        for left in paths.unfinished() {
            report.checked.push(format!("{}: left by a crash, removed at the next open for writing", left.display()));
        }
    }
    Ok(report)
}

fn check_versions(ledger: &crate::model::Ledger, report: &mut VerifyReport) {
    for run in ledger.runs() {
        let newest = run.nodes().map(|(_, node)| node.version).max().unwrap_or_default().max(run.header().version);
        if run.version() < run.created_version() || newest > run.version() || run.version().0 > ledger.seq().0 {
            report.problems.push(format!(
                "run {:?}: its versions do not fit (created {}, newest row {newest}, run {}, sequence {})",
                run.id(),
                run.created_version(),
                run.version(),
                ledger.seq()
            ));
        }
    }
}

/// Puts a damaged state right, and says what was done, line by line. A copy of every file that is changed is kept beside it as
/// `<file>.damaged-<UTC>`. A journal is cut at its first frame that is bad or does not fit; a journal that cannot be joined at all is set aside. A lock file that
/// cannot be read is written anew, with tokens far behind those that were given out. A copy of the last document that cannot be read is made anew from
/// the document. A document that cannot be read is replaced by the previous one only if `use_previous` says so: it is older, and a journal that continued the damaged
/// one is set aside with what it holds. Before records are dropped or set aside the lock file notes it: versions go on behind them, and versions and tokens far
/// behind where that file was emptied or removed. A sound state is left as it is.
///
/// # Errors
/// [`StoreErrorKind::Busy`] while a writer has the state open; [`StoreErrorKind::Corrupt`] if the document cannot be read (or is missing beside a journal with
/// records) and `use_previous` is false, or there is no previous one; and faults of the system.
pub fn repair(base: &Path, now: DateTime<Utc>, use_previous: bool) -> Result<Vec<String>, StoreError> {
    let paths = Paths::new(base);
    if !base.is_dir() {
        return Err(StoreError::not_applied(
            StoreErrorKind::NotFound,
            format!("{}: there is no such folder; check the path", base.display()),
        ));
    }
    let mut done = Lock::mend(&paths, now)?;
    let repaired = Lock::acquire_to_mend(&paths, &ProcessInfo::current(now)).and_then(|mut lock| {
        let repaired = repair_locked(&paths, &mut lock, now, use_previous, &mut done);
        let released = lock.leave();
        repaired.and(released)
    });
    match repaired {
        Ok(()) => Ok(done),
        Err(error) if done.is_empty() => Err(error),
        Err(error) => Err(error.and(format_args!("; what was repaired before: {}", done.join("; ")))),
    }
}

fn repair_locked(
    paths: &Paths,
    lock: &mut Lock,
    now: DateTime<Utc>,
    use_previous: bool,
    done: &mut Vec<String>,
) -> Result<(), StoreError> {
    match paths::read(&paths.document)? {
        Some((bytes, _)) => {
            if let Err(error) = recover::read_document(paths, &bytes, lock.seq()) {
                if error.kind() != StoreErrorKind::Corrupt || !use_previous {
                    return Err(error);
                }
                bring_back_previous(paths, lock, now, done)?;
            }
        }
        // Before any journal is judged: with it they may be whole.
        None if use_previous && paths.previous.exists() => bring_back_previous(paths, lock, now, done)?,
        None => recover::refuse_journals_alone(paths)?,
    }
    mend::journals(paths, lock, now, done)?;
    // What is still wrong is no torn frame: a journal that does not fit the document. It is set aside whole.
    if let Err(error) = recover::read(paths, lock.seq()) {
        if error.kind() != StoreErrorKind::Corrupt {
            return Err(error);
        }
        for journal in [&paths.next, &paths.journal] {
            if journal.exists() {
                mend::skip(paths, lock, told_by(journal), now, done)?;
                let aside = Paths::aside(journal, "damaged", now);
                paths::rename(journal, &aside)?;
                done.push(format!("{}: it cannot be joined ({error}); it is kept as {}", journal.display(), aside.display()));
            }
            if recover::read(paths, lock.seq()).is_ok() {
                break;
            }
        }
        paths.sync_folder()?;
        recover::read(paths, lock.seq())?;
    }
    mend_copy(paths, lock, now, done)
}

/// Beside a document that can be read, a copy of the last one that cannot be is of no use: it is set aside, and the document gives another if it is ours.
fn mend_copy(paths: &Paths, lock: &mut Lock, now: DateTime<Utc>, done: &mut Vec<String>) -> Result<(), StoreError> {
    let Some((bytes, _)) = paths::read(&paths.previous)? else { return Ok(()) };
    let is_damaged = document::read(&paths.previous, &bytes, 0).is_err_and(|error| error.kind() == StoreErrorKind::Corrupt);
    if !is_damaged || !paths.document.exists() {
        return Ok(());
    }
    // The copy may be all that tells of numbers which a lock file that was emptied or removed does not know.
    done.extend(lock.make_up_for(Some(recover::told(paths)?), paths, now)?);
    let mut state = recover::read(paths, lock.seq())?;
    if state.loses_versions(lock.seq(), lock.left()) {
        // The copy that takes its place will say that the document is the newest one.
        lock.skip(0)?;
    }
    let aside = Paths::aside(&paths.previous, "damaged", now);
    paths::rename(&paths.previous, &aside)?;
    paths.sync_folder()?;
    let anew = if state.generation.is_some() { "; a copy of the document takes its place" } else { "" };
    done.push(format!("{}: it cannot be read and is kept as {}{anew}", paths.previous.display(), aside.display()));
    done.extend(checkpoint::refresh_copy(paths, &mut state)?);
    Ok(())
}

fn bring_back_previous(paths: &Paths, lock: &mut Lock, now: DateTime<Utc>, done: &mut Vec<String>) -> Result<(), StoreError> {
    let Some((bytes, identity)) = paths::read(&paths.previous)? else {
        return Err(StoreError::not_applied(
            StoreErrorKind::Corrupt,
            format!(
                "{} cannot be read, and there is no {}; put a backup in its place",
                paths.document.display(),
                paths.previous.display()
            ),
        ));
    };
    let previous = document::read(&paths.previous, &bytes, lock.seq())?;
    // What was written after it is lost, unless a journal goes on from it. A lock file that knows less does not know what was; nor does one that knows nothing.
    let seq = previous.ledger.seq().0.max(1);
    if lock.seq() != seq && !Files::beside(paths, (bytes.clone(), identity)).is_ok_and(|files| files.go_on(paths, lock.seq())) {
        mend::skip(paths, lock, None, now, done)?;
    }
    let aside = Paths::aside(&paths.document, "damaged", now);
    let place = paths.place();
    let temporary = paths::temporary(&place);
    // Where there is no document, the copy knows who may read it.
    let access = if let Some(access) = paths.access()? {
        access
    } else {
        let previous = std::fs::metadata(&paths.previous);
        Access::of(&previous.map_err(|error| StoreError::io(paths.previous.display(), error))?)
    };
    paths::write_new(&temporary, &bytes, Some(access))?;
    // The damaged one keeps its name until another stands in its place: a folder without a document would be read as empty.
    let was = if let Some((damaged, _)) = paths::read(&paths.document)? {
        paths::write_new(&aside, &damaged, Some(access))?;
        paths.sync_folder()?;
        format!("it cannot be read and is kept as {}", aside.display())
    } else {
        "it is missing".to_owned()
    };
    paths::rename(&temporary, &place)?;
    paths::sync(paths::folder_of(&place))?;
    paths.sync_folder()?;
    done.push(format!("{}: {was}; {} takes its place", paths.document.display(), paths.previous.display()));
    Ok(())
}

/// The last record that a journal tells of; nothing where it cannot be read.
fn told_by(journal: &Path) -> Option<u64> {
    Stored::read(journal).ok().flatten().and_then(|stored| stored.last_seq())
}
