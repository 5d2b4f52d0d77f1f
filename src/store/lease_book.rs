//! The leases of a storage where one process writes: granted by the lock manager, asked about by the backend's commits.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::model::{Clock, Fence, FenceCheck, FencingToken, Freed, LeaseKey, LeaseRecord, NodeId, RunId, SystemClock};

/// The leases that are held now. The lock manager writes it; the backend reads it while it decides a batch, so that a write which is fenced by a
/// lost lease is refused in the same breath in which others are accepted.
#[derive(Debug)]
pub struct LeaseBook {
    held: Mutex<HashMap<RunId, HashMap<Option<NodeId>, Held>>>,
    changes: AtomicU64,
}

#[derive(Debug, Clone)]
struct Held {
    record: LeaseRecord,
    /// `None`: kept alive as long as its guard lives.
    deadline: Option<Instant>,
    /// It could at any time be renewed for its whole TTL: what is listed of it must say so.
    kept: bool,
    /// It has its place and is no lease yet: an entry that is on its way grants it.
    placed: bool,
}

impl Held {
    fn is_live(&self, now: Instant) -> bool {
        !self.placed && self.deadline.is_none_or(|deadline| now < deadline)
    }
}

impl Default for LeaseBook {
    fn default() -> Self {
        Self::new()
    }
}

impl LeaseBook {
    /// No leases.
    pub fn new() -> Self {
        Self { held: Mutex::new(HashMap::new()), changes: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RunId, HashMap<Option<NodeId>, Held>>> {
        // Nothing between two changes of it panics, so that a panicking holder leaves it whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a grant, or a renewal under the same token. Without a deadline it is held until it is taken out.
    pub fn put(&self, record: LeaseRecord, deadline: Option<Instant>) {
        self.insert(Held { record, deadline, kept: false, placed: false });
    }

    /// Notes a grant that its guard keeps alive: it is held until it is taken out, and whoever lists it sees it as renewed just now.
    pub fn keep(&self, record: LeaseRecord) {
        self.insert(Held { record, deadline: None, kept: true, placed: false });
    }

    /// Notes a lease that an entry on its way is to grant: it holds nothing before it is [`confirmed`](Self::confirm), and never if its run ends before.
    pub(crate) fn place(&self, record: LeaseRecord) {
        let LeaseKey { run, node } = record.key.clone();
        self.lock().entry(run).or_default().insert(node, Held { record, deadline: None, kept: false, placed: true });
    }

    /// Makes a lease of what was [placed](Self::place), or renews one; without a deadline its guard keeps it alive. `false`: it is void.
    pub(crate) fn confirm(&self, record: LeaseRecord, deadline: Option<Instant>) -> bool {
        let mut held = self.lock();
        let found = held.get_mut(&record.key.run).and_then(|of_run| of_run.get_mut(&record.key.node));
        let Some(found) = found.filter(|found| found.record.token == record.token) else { return false };
        *found = Held { record, deadline, kept: deadline.is_none(), placed: false };
        self.changes.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn insert(&self, held: Held) {
        let LeaseKey { run, node } = held.record.key.clone();
        self.lock().entry(run).or_default().insert(node, held);
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a lease is in it under this token, also one whose time is over.
    pub(crate) fn has(&self, key: &LeaseKey, token: FencingToken) -> bool {
        let held = self.lock();
        let found = held.get(&key.run).and_then(|of_run| of_run.get(&key.node));
        found.is_some_and(|found| !found.placed && found.record.token == token)
    }

    /// Takes a lease out, if it is still held under this token.
    pub fn remove(&self, key: &LeaseKey, token: FencingToken) {
        self.take_out(&mut self.lock(), key, token);
    }

    /// Takes out what was freed by entries that are in storage now; before anybody can see what they wrote, and before they are answered.
    pub fn free(&self, freed: &Freed) {
        if freed.is_empty() {
            return;
        }
        let mut held = self.lock();
        for run in freed.runs() {
            // What nobody ever saw is no news.
            let seen = held.remove(run).is_some_and(|of_run| of_run.values().any(|lease| !lease.placed));
            self.changes.fetch_add(u64::from(seen), Ordering::Relaxed);
        }
        for (key, token) in freed.returned() {
            self.take_out(&mut held, key, token);
        }
    }

    fn take_out(&self, held: &mut HashMap<RunId, HashMap<Option<NodeId>, Held>>, key: &LeaseKey, token: FencingToken) {
        let Some(of_run) = held.get_mut(&key.run) else { return };
        let Some(lease) = of_run.get(&key.node).filter(|lease| lease.record.token == token) else { return };
        // What nobody ever saw is no news.
        self.changes.fetch_add(u64::from(!lease.placed), Ordering::Relaxed);
        of_run.remove(&key.node);
        if of_run.is_empty() {
            held.remove(&key.run);
        }
    }

    /// All leases that are held and not expired.
    pub fn list(&self) -> Vec<LeaseRecord> {
        let wall = SystemClock.now();
        self.with_kept().into_iter().map(|(record, kept)| if kept { record.renewed(wall) } else { record }).collect()
    }

    /// All leases that are held and not expired, as they were granted or renewed last, and whether their guards keep them alive.
    pub fn with_kept(&self) -> Vec<(LeaseRecord, bool)> {
        let now = Instant::now();
        let mut all: Vec<(LeaseRecord, bool)> = self
            .lock()
            .values()
            .flat_map(HashMap::values)
            .filter(|held| held.is_live(now))
            .map(|held| (held.record.clone(), held.kept))
            .collect();
        all.sort_by_key(|(record, _)| record.token);
        all
    }

    /// Grows with every change: a backend that writes leases down for others to list sees by it whether there is news.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl FenceCheck for LeaseBook {
    fn holds(&self, fence: &Fence) -> bool {
        let now = Instant::now();
        self.lock()
            .get(&fence.key.run)
            .and_then(|of_run| of_run.get(&fence.key.node))
            .is_some_and(|held| held.record.token == fence.token && held.is_live(now))
    }

    fn holder(&self, run: &RunId) -> Option<String> {
        self.holder_besides(run, &Freed::default())
    }

    fn holder_besides(&self, run: &RunId, freed: &Freed) -> Option<String> {
        let now = Instant::now();
        let held = self.lock();
        let mut live = held.get(run)?.values().filter(|held| held.is_live(now));
        live.find(|held| !freed.is_returned(held.record.token)).map(|held| held.record.owner.to_string())
    }
}
