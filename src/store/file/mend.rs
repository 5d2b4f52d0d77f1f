//! Cutting journals where they are damaged or do not fit any more, with a copy of all that was in them.

use std::path::Path;

use chrono::{DateTime, Utc};

use super::document;
use super::journal::{HEADER_LEN, Header, Kind, Stored, frame_at, last_written, lines};
use super::lock::Lock;
use super::paths::{self, Paths};
use super::record::Record;
use super::recover;
use crate::model::{CommitSeq, Ledger};
use crate::store::{StoreError, StoreErrorKind};

/// A journal as far as it is good.
struct Good {
    end: usize,
    records: usize,
    /// Its last record.
    tail: u64,
    /// What it makes of the state that it goes on from; `None` if it is not known which that is.
    ledger: Option<Ledger>,
}

/// Notes, before anything is put away that tells of them, that versions go on behind all numbers that were given out. `last` is the last one that is lost, where
/// that can be read: behind it more may have been. A lock file that knows less than what lies there knows nothing of tokens either: that is made up for here,
/// because the next opening finds numbers in it.
pub(super) fn skip(
    paths: &Paths,
    lock: &mut Lock,
    last: Option<u64>,
    now: DateTime<Utc>,
    done: &mut Vec<String>,
) -> Result<(), StoreError> {
    let told = recover::told(paths)?.max(last.unwrap_or(0));
    done.extend(lock.make_up_for(Some(told), paths, now)?);
    lock.skip(last.unwrap_or(0))
}

/// Cuts each journal at its first frame that is bad, does not go on where the one before it ended, or is refused by the state as it was then; or sets a journal
/// aside if not even its header can be read.
pub(super) fn journals(paths: &Paths, lock: &mut Lock, now: DateTime<Utc>, done: &mut Vec<String>) -> Result<(), StoreError> {
    let document = match paths::read(&paths.document)? {
        Some((bytes, _)) => Some(document::read(&paths.document, &bytes, lock.seq())?),
        None => None,
    };
    // What a journal goes on from: the document, if that is ours and untouched.
    let from_document = |header: &Header| {
        let document = document.as_ref()?;
        let continues = document.generation.as_ref() == Some(&header.generation) && document.ledger.seq().0 == header.last_seq;
        continues.then(|| document.ledger.clone())
    };
    let first = match begun(&paths.journal, lock, now, paths, done)? {
        Some((stored, header)) => {
            let good = walk(&stored, &header, from_document(&header));
            cut(paths, lock, &stored, &good, now, done)?;
            Some((header, good))
        }
        None => None,
    };
    if let Some((stored, header)) = begun(&paths.next, lock, now, paths, done)? {
        // Or the journal before it, while a checkpoint is not finished.
        let from_first = || {
            let (before, good) = first.as_ref()?;
            let continues = header.follows.as_ref() == Some(&before.generation) && header.after == good.tail;
            let mut ledger = good.ledger.clone().filter(|_| continues)?;
            ledger.raise_seq(CommitSeq(header.last_seq));
            Some(ledger)
        };
        let good = walk(&stored, &header, from_document(&header).or_else(from_first));
        cut(paths, lock, &stored, &good, now, done)?;
    }
    Ok(())
}

/// A journal that was begun, with its header; one whose header is damaged is set aside.
fn begun(
    journal: &Path,
    lock: &mut Lock,
    now: DateTime<Utc>,
    paths: &Paths,
    done: &mut Vec<String>,
) -> Result<Option<(Stored, Header)>, StoreError> {
    match Stored::read(journal) {
        Err(error) if error.kind() == StoreErrorKind::Corrupt => {
            skip(paths, lock, None, now, done)?;
            let aside = Paths::aside(journal, "damaged", now);
            paths::rename(journal, &aside)?;
            paths.sync_folder()?;
            done.push(format!("{}: its header is damaged; it is kept as {}", journal.display(), aside.display()));
            Ok(None)
        }
        stored => Ok(stored?.and_then(|stored| stored.header.clone().map(|header| (stored, header)))),
    }
}

/// Goes through a journal up to the first frame that is not good.
fn walk(stored: &Stored, header: &Header, ledger: Option<Ledger>) -> Good {
    let mut good = Good { end: HEADER_LEN, records: 0, tail: header.last_seq, ledger };
    while let Some(frame) = frame_at(&stored.bytes, good.end, header.epoch) {
        if frame.kind == Kind::Leases {
            // It is the last one, always.
            good.end = frame.end;
            break;
        }
        let read: Result<Vec<Record>, _> = lines(frame.payload).map(serde_json::from_slice).collect();
        let Some(found) = read.ok().filter(|_| frame.previous == good.tail) else { break };
        // A frame is good as a whole or not at all.
        let mut next = good.ledger.clone();
        let is_refused = next
            .as_mut()
            .is_some_and(|ledger| found.iter().any(|record| ledger.replay(record.seq, &record.runs, &record.retained).is_err()));
        if is_refused {
            break;
        }
        good = Good {
            end: frame.end,
            records: good.records + found.len(),
            tail: found.last().map_or(good.tail, |record| record.seq.0),
            ledger: next,
        };
    }
    good
}

/// Drops what lies behind the good part, if there is anything, and keeps a copy of the whole.
fn cut(
    paths: &Paths,
    lock: &mut Lock,
    stored: &Stored,
    good: &Good,
    now: DateTime<Utc>,
    done: &mut Vec<String>,
) -> Result<(), StoreError> {
    let end = good.end;
    let Some(last) = last_written(&stored.bytes, end) else { return Ok(()) };
    skip(paths, lock, stored.last_seq(), now, done)?;
    let aside = Paths::aside(&stored.path, "damaged", now);
    let access = paths.access()?;
    paths::write_new(&aside, &stored.bytes, access)?;
    let temporary = paths.temporary();
    paths::write_new(&temporary, stored.bytes.get(..end).unwrap_or_default(), access)?;
    paths::rename(&temporary, &stored.path)?;
    paths.sync_folder()?;
    done.push(format!(
        "{}: cut at byte {end}, after {} good record(s); {} bytes behind it are dropped, and the whole of it is kept as {}",
        stored.path.display(),
        good.records,
        last + 1 - end,
        aside.display()
    ));
    Ok(())
}
