//! What lies there without a document.

use super::{State, copied_seq};
use crate::model::{CommitSeq, Ledger};
use crate::store::file::backups;
use crate::store::file::document::{self, Shape};
use crate::store::file::journal::Stored;
use crate::store::file::paths::{self, Paths};
use crate::store::file::record::Leases;
use crate::store::{StoreError, StoreErrorKind};

/// What to do about a journal without its document.
fn put_back(paths: &Paths) -> String {
    let previous = if paths.previous.exists() {
        format!(
            " ({} is the last one before it, `seeknal state verify --repair --use-previous` puts it there)",
            paths.previous.display()
        )
    } else {
        String::new()
    };
    format!("Put the document back{previous}, or rename the journal to begin with an empty state")
}

/// Refuses journals with something in them whose document is missing, also those that are damaged: with it they may be whole.
pub(in crate::store::file) fn refuse_journals_alone(paths: &Paths) -> Result<(), StoreError> {
    let mut journals = [None, None];
    for (stored, path) in journals.iter_mut().zip([&paths.journal, &paths.next]) {
        *stored = Stored::read(path).map_err(|error| match error.kind() {
            StoreErrorKind::Corrupt => StoreError::not_applied(
                StoreErrorKind::Corrupt,
                format!(
                    "{} is missing, and its journal {} is damaged; it was left as it is. {}",
                    paths.document.display(),
                    path.display(),
                    put_back(paths)
                ),
            ),
            _ => error,
        })?;
    }
    without_document(paths, 0, journals).map(drop)
}

pub(super) fn without_document(paths: &Paths, highest_seq: u64, journals: [Option<Stored>; 2]) -> Result<State, StoreError> {
    let mut spent = Vec::new();
    for journal in journals.into_iter().flatten() {
        let content = journal.content();
        if !content.is_empty() {
            return Err(StoreError::not_applied(
                StoreErrorKind::Corrupt,
                format!(
                    "{} is missing, but its journal {} is there and holds {} records{}; it was left as it is. {}",
                    paths.document.display(),
                    journal.path.display(),
                    content.records,
                    if content.records == 0 || content.is_damaged { " and something damaged" } else { "" },
                    put_back(paths),
                ),
            ));
        }
        spent.push(journal.path);
    }
    let mut notices = Vec::new();
    let document = match paths::read(&paths.bare)? {
        Some((bytes, _)) => {
            notices.push(format!("{} is read as one run; it is never written", paths.bare.display()));
            let mut document = document::read_bare(&paths.bare, &bytes, highest_seq)?;
            // It stays where it is.
            document.shape.keeps_original = false;
            notices.extend(document.notices.iter().cloned());
            Some(document)
        }
        None => None,
    };
    let lost = lost(paths, highest_seq, document.is_some());
    if document.is_none()
        && let Some(backup) = backups::newest(&paths.document)
    {
        notices.push(format!(
            "{} is missing: an empty state is opened; {} is the newest copy of one that can be read: put it in its place if it should be there",
            paths.document.display(),
            backup.display()
        ));
    }
    let (mut ledger, shape) =
        document.map_or_else(|| (Ledger::new(), Shape::default()), |document| (document.ledger, document.shape));
    let document_seq = ledger.seq().0;
    let copy_seq = copied_seq(paths)?;
    ledger.raise_seq(CommitSeq(highest_seq.max(copy_seq.unwrap_or(0))));
    Ok(State {
        ledger,
        shape,
        document: None,
        generation: None,
        follows: None,
        document_seq,
        active: None,
        pending: None,
        strangers: Vec::new(),
        spent,
        has_journal: false,
        leases: Leases::default(),
        notices,
        replayed: 0,
        keeps_previous: false,
        is_newest: false,
        told_seq: None,
        beside_seq: copy_seq,
        lost,
    })
}

/// Where there is no document: what tells of one that was.
fn lost(paths: &Paths, highest_seq: u64, has_bare: bool) -> Option<String> {
    let document = paths.document.display();
    let now = if has_bare { format!("{} is read instead", paths.bare.display()) } else { "an empty state is opened".to_owned() };
    if paths.previous.exists() {
        return Some(format!(
            "{document} is missing: {now}; the last one is {}, and is kept under another name when something is written. `seeknal state verify \
             --repair --use-previous` puts it back",
            paths.previous.display()
        ));
    }
    (highest_seq > 0).then(|| {
        format!(
            "{document} is missing, but {} tells of one that records were written to: {now}. If it was not removed on purpose, and no process was ended \
             just before it wrote the first one, put a backup of it in its place",
            paths.lock.display()
        )
    })
}
