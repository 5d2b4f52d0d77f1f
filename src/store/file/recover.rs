//! Reading a state back: the document, and the journals that continue it, whatever a crash or an operator left beside it.
//!
//! | document | journal | next journal | meaning |
//! |---|---|---|---|
//! | G | of G | none | the journal is replayed |
//! | G | of G | of H, follows G | a checkpoint had begun: both are replayed, the document H is still to be written |
//! | H | of G | of H, follows G | it had come as far as the document's name: the next journal takes the place of the spent one |
//! | H follows G | of G | none | the journal is spent |
//! | any other | of G | | the document wins, the journal is set aside |
//!
//! Reading changes nothing: what is to be put right is told in [`State`], and done by [`heal`] under the lock.

use std::path::PathBuf;

use chrono::{DateTime, Utc};

use self::replay::{Replayed, gap, replay};
use super::document::{self, Document, Shape};
use super::join;
use super::journal::{Header, Journal, Stored};
use super::paths::{self, Identity, Paths};
use super::record::{Leases, Record};
use super::text;
use crate::model::{CommitSeq, Ledger};
use crate::store::{StoreError, StoreErrorKind};

mod alone;
mod lost;
mod replay;

use self::alone::without_document;

pub(super) use self::alone::refuse_journals_alone;

/// Everything that lies there, as one state.
#[derive(Debug)]
pub(super) struct State {
    pub(super) ledger: Ledger,
    pub(super) shape: Shape,
    /// The document that is there.
    pub(super) document: Option<Identity>,
    /// Its generation, if it is ours and untouched.
    pub(super) generation: Option<String>,
    /// The generation that it replaced.
    pub(super) follows: Option<String>,
    /// The last sequence number that the document knows as used.
    pub(super) document_seq: u64,
    /// The journal to go on with.
    pub(super) active: Option<Active>,
    /// The document that a checkpoint did not finish.
    pub(super) pending: Option<Pending>,
    /// Journals that belong to another document, with the number of their records.
    pub(super) strangers: Vec<(PathBuf, usize)>,
    /// Journals that are done with.
    pub(super) spent: Vec<PathBuf>,
    /// Whether any journal is there that has begun.
    has_journal: bool,
    /// The leases that were noted last.
    pub(super) leases: Leases,
    pub(super) notices: Vec<String>,
    /// How many records were replayed.
    pub(super) replayed: usize,
    /// The copy of the last document holds what this state does not: it is kept under another name before another copy takes its place.
    pub(super) keeps_previous: bool,
    /// Whether the copy of the last document says that there was no newer one.
    pub(super) is_newest: bool,
    /// The last sequence number that the document tells, if it is ours.
    pub(super) told_seq: Option<u64>,
    /// The last sequence number that anything beside the document tells, where that is newer or the document is not ours: the copy of the last document of
    /// ours, a journal that is set aside.
    pub(super) beside_seq: Option<u64>,
    /// That there was a document, where there is none. Of meaning while nobody writes: a first writer has the lock before it has a document.
    pub(super) lost: Option<String>,
}

/// The journal to go on with.
#[derive(Debug)]
pub(super) struct Active {
    stored: Stored,
    pub(super) header: Header,
    /// Where the next frame goes.
    end: usize,
    frames: u64,
    /// The last record in it.
    pub(super) tail: u64,
    /// Bytes of a torn frame behind the end.
    pub(super) torn: Option<(usize, usize)>,
}

/// A document that is still to be written.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub(super) ledger: Ledger,
    pub(super) generation: String,
    pub(super) follows: String,
}

/// The files of a state, read one after another.
#[derive(Debug)]
pub(super) struct Files {
    document: Option<(Vec<u8>, Identity)>,
    journal: Option<Stored>,
    next: Option<Stored>,
}

impl Files {
    pub(super) fn read(paths: &Paths) -> Result<Self, StoreError> {
        let document = paths::read(&paths.document)?;
        Ok(Self { document, ..Self::journals(paths)? })
    }

    /// The journals, with another document than the one that lies there.
    pub(super) fn beside(paths: &Paths, document: (Vec<u8>, Identity)) -> Result<Self, StoreError> {
        Ok(Self { document: Some(document), ..Self::journals(paths)? })
    }

    fn journals(paths: &Paths) -> Result<Self, StoreError> {
        let journal = Stored::read(&paths.journal)?;
        let next = Stored::read(&paths.next)?;
        Ok(Self { document: None, journal, next })
    }

    /// Whether a journal goes on from the document, and none is left over.
    pub(super) fn go_on(self, paths: &Paths, highest_seq: u64) -> bool {
        join(paths, self, highest_seq).is_ok_and(|state| state.active.is_some() && state.strangers.is_empty())
    }

    /// As who looked for the next journal too late has them.
    #[cfg(test)]
    pub(super) fn forget_next(&mut self) {
        self.next = None;
    }

    /// Whether these are the files that lie there, so that they lay there together when the last one was read. A journal may have been written to since.
    pub(super) fn are_there(&self, paths: &Paths) -> Result<bool, StoreError> {
        let is_there = |stored: Option<&Stored>, path| {
            let there = Identity::at(path)?;
            Ok::<_, StoreError>(match (stored, there) {
                (Some(stored), Some(there)) => stored.identity.is_same_file(&there),
                (stored, there) => stored.is_none() && there.is_none(),
            })
        };
        Ok(self.document.as_ref().map(|(_, identity)| *identity) == Identity::at(&paths.document)?
            && is_there(self.journal.as_ref(), &paths.journal)?
            && is_there(self.next.as_ref(), &paths.next)?)
    }
}

/// Reads the state; only under the lock do the files stay where they are meanwhile. `highest_seq` is the highest sequence number that may have been used.
pub(super) fn read(paths: &Paths, highest_seq: u64) -> Result<State, StoreError> {
    join(paths, Files::read(paths)?, highest_seq)
}

/// Makes one state of the files that were read.
pub(super) fn join(paths: &Paths, files: Files, highest_seq: u64) -> Result<State, StoreError> {
    let Files { document: found, journal, next } = files;
    let Some((bytes, identity)) = found else { return without_document(paths, highest_seq, [journal, next]) };
    let mut notices = Vec::new();
    let name = paths.document.display();
    let document = read_document(paths, &bytes, highest_seq)?;
    let told_seq = document.is_ours.then(|| document.ledger.seq().0);
    let (mut keeps_previous, mut beside_seq) = (false, None);
    let document = if document.is_ours {
        if document.generation.is_none() {
            notices.push(format!("{name} was edited since it was written; it is taken as it is now"));
        }
        document
    } else {
        let joined = join::with_previous(paths, &bytes, document, highest_seq, &mut notices)?;
        (keeps_previous, beside_seq) = (joined.keeps_previous, joined.copy_seq);
        joined.document
    };
    notices.extend(document.notices);
    drop(bytes);
    let mut state = State {
        document_seq: document.ledger.seq().0,
        ledger: document.ledger,
        shape: document.shape,
        document: Some(identity),
        generation: document.generation,
        follows: document.follows,
        active: None,
        pending: None,
        strangers: Vec::new(),
        spent: Vec::new(),
        has_journal: false,
        leases: Leases::default(),
        notices,
        replayed: 0,
        keeps_previous,
        is_newest: false,
        told_seq,
        beside_seq,
        lost: None,
    };
    join_journals(&mut state, journal, next)?;
    state.ledger.raise_seq(CommitSeq(highest_seq));
    Ok(state)
}

/// Reads the document. One with nothing in it is a new state where nothing of ours lies beside it; elsewhere somebody emptied the one that was there, and that is
/// nobody's backup.
pub(super) fn read_document(paths: &Paths, bytes: &[u8], highest_seq: u64) -> Result<Document, StoreError> {
    let document = document::read(&paths.document, bytes, highest_seq)?;
    if document.is_ours || document.ledger.runs().next().is_some() {
        return Ok(document);
    }
    let has_records = |journal| Ok::<_, StoreError>(Stored::read(journal)?.is_some_and(|stored| !stored.content().is_empty()));
    let tells = if has_records(&paths.journal)? || has_records(&paths.next)? {
        &paths.journal
    } else if paths.previous.exists() {
        &paths.previous
    } else if highest_seq > 0 {
        &paths.lock
    } else {
        return Ok(document);
    };
    let why = format!("nothing is in it, but {} tells of a state that was; to begin anew put it away as well", tells.display());
    Err(text::damaged(&paths.document, "line 1, column 1", why))
}

/// How far numbers were given out by what the copy of the last document of ours tells; one that cannot be read says at least that there was one.
fn copied_seq(paths: &Paths) -> Result<Option<u64>, StoreError> {
    let Some((bytes, _)) = paths::read(&paths.previous)? else { return Ok(None) };
    Ok(Some(document::read(&paths.previous, &bytes, 0).map_or(1, |previous| previous.ledger.seq().0)))
}

/// The highest number that anything which lies there tells of; one at least, where something lies there. What cannot be read tells nothing more.
pub(super) fn told(paths: &Paths) -> Result<u64, StoreError> {
    let document = paths::read(&paths.document)?.map(|(bytes, _)| {
        let read = document::read(&paths.document, &bytes, 0).ok();
        read.filter(|document| document.is_ours).map_or(1, |document| document.ledger.seq().0)
    });
    let told_by = |journal| match Stored::read(journal) {
        Err(error) if error.kind() == StoreErrorKind::Corrupt => Ok(Some(1)),
        stored => Ok(stored?.and_then(|stored| stored.last_seq())),
    };
    let told = [document, copied_seq(paths)?, told_by(&paths.journal)?, told_by(&paths.next)?];
    Ok(told.into_iter().flatten().max().map_or(0, |told| told.max(1)))
}

/// Finds out what the journals are to the document, and replays those that continue it.
fn join_journals(state: &mut State, journal: Option<Stored>, next: Option<Stored>) -> Result<(), StoreError> {
    let mut begun = |stored: Option<Stored>| {
        let stored = stored?;
        let Some(header) = stored.header.clone() else {
            state.spent.push(stored.path);
            return None;
        };
        state.has_journal = true;
        Some((stored, header))
    };
    let (journal, next) = (begun(journal), begun(next));
    let (generation, follows) = (state.generation.clone(), state.follows.clone());
    let is_spent = |header: &Header| generation.is_some() && follows.as_deref() == Some(header.generation.as_str());
    // A next journal that is spent takes the one before it along.
    let before_spent = next.as_ref().filter(|(_, header)| is_spent(header)).and_then(|(_, header)| header.follows.clone());
    let continues = |header: &Header| generation.as_deref() == Some(header.generation.as_str());
    match (journal, next) {
        (Some((stored, header)), next) if continues(&header) => {
            let replayed = replay(&mut state.ledger, &stored, &header, state.document_seq)?;
            note_replay(state, &replayed);
            match next {
                Some((next, next_header)) if next_header.follows.as_deref() == Some(header.generation.as_str()) => {
                    if next_header.after != replayed.tail && next.content().is_empty() {
                        // It was given up while it was made, and the writer went on with the old one.
                        state.spent.push(next.path);
                        state.active = Some(replayed.active(stored, header));
                        return Ok(());
                    }
                    if next_header.after != replayed.tail {
                        return Err(gap(
                            &next,
                            &format!(
                                "it goes on after record {}, but {} ends with {}",
                                next_header.after,
                                stored.path.display(),
                                replayed.tail
                            ),
                        ));
                    }
                    state.ledger.raise_seq(CommitSeq(next_header.last_seq));
                    state.pending = Some(Pending {
                        ledger: state.ledger.clone(),
                        generation: next_header.generation.clone(),
                        follows: header.generation.clone(),
                    });
                    let after = replay(&mut state.ledger, &next, &next_header, next_header.last_seq)?;
                    note_replay(state, &after);
                    state.active = Some(after.active(next, next_header));
                }
                next => {
                    if let Some((next, next_header)) = next {
                        put_away(state, next, is_spent(&next_header));
                    }
                    state.active = Some(replayed.active(stored, header));
                }
            }
        }
        (journal, Some((next, next_header))) if continues(&next_header) => {
            if let Some((journal, header)) = journal {
                let spent = next_header.follows.as_deref() == Some(header.generation.as_str()) || is_spent(&header);
                put_away(state, journal, spent);
            }
            let replayed = replay(&mut state.ledger, &next, &next_header, state.document_seq)?;
            note_replay(state, &replayed);
            state.active = Some(replayed.active(next, next_header));
        }
        (journal, next) => {
            if let Some((journal, header)) = journal {
                let spent = is_spent(&header) || before_spent.as_deref() == Some(header.generation.as_str());
                put_away(state, journal, spent);
            }
            if let Some((next, header)) = next {
                put_away(state, next, is_spent(&header));
            }
        }
    }
    Ok(())
}

fn put_away(state: &mut State, journal: Stored, spent: bool) {
    let content = journal.content();
    // Its name says that the document has it; only its numbers say that it is so. A document that was brought back may have gone another way since.
    let has_all = || {
        let mut seqs = journal.last_lines(&content).map(|line| serde_json::from_slice::<Record>(line).map(|record| record.seq.0));
        !content.is_damaged && content.records > 0 && seqs.all(|seq| seq.is_ok_and(|seq| seq <= state.document_seq))
    };
    if content.is_empty() || (spent && has_all()) {
        state.spent.push(journal.path);
    } else {
        let last = journal.last_lines(&content).last().and_then(|line| serde_json::from_slice::<Record>(line).ok());
        state.beside_seq = state.beside_seq.max(last.map(|record| record.seq.0));
        state.strangers.push((journal.path, content.records));
    }
}

fn note_replay(state: &mut State, replayed: &Replayed) {
    state.replayed += replayed.records;
    if let Some(leases) = &replayed.leases {
        state.leases.clone_from(leases);
    }
}

/// Puts right what reading found, under the lock, and gives the journal to go on with. May be cut off and done again at any point.
pub(super) fn heal(state: &mut State, paths: &Paths, now: DateTime<Utc>) -> Result<Option<Journal>, StoreError> {
    if state.active.is_some() {
        // Of the names that were found nobody knows whether they were ever synced, and what is put right here, and written later, rests on them.
        paths::sync(paths::folder_of(&paths.place()))?;
        paths.sync_folder()?;
    }
    let mut renamed = false;
    for (journal, records) in std::mem::take(&mut state.strangers) {
        let aside = Paths::aside(&journal, "orphan", now);
        paths::rename(&journal, &aside)?;
        renamed = true;
        state.notices.push(format!(
            "{} did not belong to {} any more (a restored backup, another program, an editor): the document wins, and the journal with its \
             {records} records is kept as {}",
            journal.display(),
            paths.document.display(),
            aside.display()
        ));
    }
    let mut place = paths.journal.clone();
    if let Some(active) = &state.active
        && active.stored.path == paths.next
    {
        if state.pending.is_some() {
            place.clone_from(&paths.next);
        } else {
            // It takes the place of the spent one.
            paths::rename(&paths.next, &paths.journal)?;
            renamed = true;
        }
    }
    for spent in std::mem::take(&mut state.spent) {
        let taken_over = spent == paths.journal && state.active.is_some() && place == paths.journal;
        if !taken_over {
            paths::remove(&spent)?;
            renamed = true;
        }
    }
    if renamed {
        paths.sync_folder()?;
    }
    let Some(active) = state.active.take() else { return Ok(None) };
    if let Some((from, to)) = active.torn {
        let aside = Paths::aside(&paths.journal, "torn", now);
        paths::write_new(&aside, active.stored.bytes.get(from..to).unwrap_or_default(), paths.access()?)?;
        paths.sync_folder()?;
        state.notices.push(format!(
            "the last record of {} was torn by a crash (it was never acknowledged): {} bytes at byte {from} were cut and kept as {}",
            place.display(),
            to - from,
            aside.display()
        ));
    }
    Journal::resume(&place, &active.stored, active.header, active.end, active.frames).map(Some)
}
