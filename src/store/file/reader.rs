//! Reading without the lock, beside a live writer or after one: nothing is made, recovered or changed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::lock::{self, Seen};
use super::paths::{Identity, Paths};
use super::record::Leases;
use super::recover::{self, State};
use crate::model::{Clock, LeaseRecord, Ledger, SystemClock};
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

/// A reader that remembers what it read as long as the files stay as they are.
#[derive(Debug)]
pub(super) struct Reader {
    paths: Paths,
    last: Mutex<Option<(Look, Arc<View>)>>,
    /// The files as they looked when their change was told last; `None`: they may have changed since.
    told: Mutex<Option<Look>>,
    /// How long reading took last.
    took: Mutex<Duration>,
}

impl Reader {
    pub(super) fn new(paths: Paths) -> Self {
        Self { paths, last: Mutex::new(None), told: Mutex::new(None), took: Mutex::new(Duration::ZERO) }
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
        if let Some((at, view)) = &*last
            && *at == look
        {
            return Ok(Arc::clone(view));
        }
        let begun = Instant::now();
        let view = Arc::new(load(&self.paths)?);
        *self.took.lock().unwrap_or_else(PoisonError::into_inner) = begun.elapsed();
        *last = is_settled(&look).then(|| (look, Arc::clone(&view)));
        Ok(view)
    }

    /// The leases that a live writer noted; none without one.
    pub(super) fn leases(&self) -> Result<Vec<LeaseRecord>, StoreError> {
        let held = lock::look(&self.paths.lock)?.held;
        Ok(if held { self.view()?.leases.at(SystemClock.now()) } else { Vec::new() })
    }

    /// What can be seen of the lock.
    pub(super) fn lock(&self) -> Result<Seen, StoreError> {
        lock::look(&self.paths.lock)
    }
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
        let found = recover::read(paths, seen.value.seq);
        // A document takes its place before its journal is put away: as long as it is the same, what was read beside it belongs to it.
        let (settled, read) = match &found {
            Ok(state) => (state.strangers.is_empty(), Some(state.document)),
            Err(error) => (error.kind() != StoreErrorKind::Corrupt, None),
        };
        let moved = match read {
            Some(document) => Identity::at(&paths.document)? != document,
            None => false,
        };
        // Without a writer nothing moves: what is apart is apart.
        if (!moved && (settled || !seen.held)) || attempt == ATTEMPTS {
            return found.map(|state| (state, seen));
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
    if let (Some((from, to)), false) = (state.active.as_ref().and_then(|active| active.torn), seen.held) {
        state.notices.push(format!(
            "the last record of the journal is torn ({} bytes at byte {from}); it was never acknowledged, and is cut when the state is opened for writing",
            to - from
        ));
    }
    Ok(View { ledger: state.ledger, leases: state.leases, notices: state.notices })
}
