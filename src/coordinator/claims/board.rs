//! The boards of ready nodes that this process keeps, one for a run that somebody asks for work, and who waits in front of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dashmap::DashMap;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use crate::model::{LeaseRecord, NodeId, Pick, ProcessInfo, ReadyBoard, RunId, Snapshot, Version, Wish};
use crate::run::ChangeSeed;

/// Boards of one run, each for another wish; more of them are not kept, unless somebody waits in front of each.
const MOST_OF_A_RUN: usize = 16;
/// The longest pause between two looks.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The boards of all runs.
#[derive(Debug, Default)]
pub(in crate::coordinator) struct Boards {
    runs: DashMap<RunId, Vec<Arc<Board>>>,
    /// Asked with every commit.
    count: AtomicUsize,
}

/// The board of one run.
#[derive(Debug)]
pub(super) struct Board {
    run: RunId,
    inner: Mutex<Inner>,
    news: Notify,
    /// The coordinator's: whoever waits may go away, and with him his runtime.
    runtime: Handle,
}

#[derive(Debug)]
struct Inner {
    ready: ReadyBoard,
    /// What the board's time counts from.
    start: Instant,
    /// When somebody asked here for work.
    asked: Instant,
    next_look: Instant,
    /// Not before then is a refusal a reason to look early.
    hurries_from: Instant,
    /// Who was seen to hold the lock on the whole run, or whatever else keeps all claims out, until the next look.
    locked: Option<Box<LeaseRecord>>,
    alarm: Option<Alarm>,
}

/// Wakes one of those who wait when the first node may be taken that is left to others until then. Nobody else is woken for such nodes, however many wait.
#[derive(Debug)]
struct Alarm {
    at: Duration,
    task: AbortHandle,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Boards {
    pub(in crate::coordinator) fn any(&self) -> bool {
        // In one order with the snapshots: who commits finds the board, or who asks for work finds the commit.
        self.count.load(Ordering::SeqCst) > 0
    }

    /// Whether somebody of this process asks for work in a run.
    pub(in crate::coordinator) fn has(&self, run: &RunId) -> bool {
        self.runs.contains_key(run)
    }

    /// The board of a run, not older than this snapshot.
    pub(super) fn of(&self, snapshot: &Snapshot, wish: &Arc<Wish>, me: &ProcessInfo, runtime: &Handle) -> Arc<Board> {
        let run = snapshot.state().id();
        let board = self.runs.get(run).and_then(|boards| boards.iter().find(|board| board.is_for(wish)).cloned());
        let board = board.unwrap_or_else(|| {
            // Counted first: from now on nothing that changes the run is missed. Who commits meanwhile does not wait until all nodes are on it.
            self.count.fetch_add(1, Ordering::SeqCst);
            let new = Arc::new(Board::new(snapshot, wish, me, runtime));
            let mut boards = self.runs.entry(run.clone()).or_default();
            if let Some(board) = boards.iter().find(|board| board.is_for(wish)) {
                self.count.fetch_sub(1, Ordering::SeqCst);
                return Arc::clone(board);
            }
            // One that somebody stands in front of stays: he would not hear of what comes, and taking his place back would take it from another one.
            while boards.len() >= MOST_OF_A_RUN
                && let idle = boards.iter().enumerate().filter(|(_, board)| Arc::strong_count(board) == 1)
                && let Some((longest, _)) = idle.min_by_key(|(_, board)| board.lock().asked)
            {
                boards.remove(longest);
                self.count.fetch_sub(1, Ordering::SeqCst);
            }
            boards.push(Arc::clone(&new));
            new
        });
        board.catch_up(snapshot);
        board
    }

    /// Takes in what was committed, in the order of the run's commits.
    pub(in crate::coordinator) fn changed(&self, seed: &ChangeSeed) {
        if !self.any() {
            return;
        }
        if seed.state.is_none() {
            self.forget(&seed.run);
            return;
        }
        // The guard of the map is not held while boards work.
        let Some(boards) = self.runs.get(&seed.run).map(|boards| boards.value().clone()) else { return };
        for board in boards {
            board.changed(seed);
        }
    }

    /// Somebody of this process held a node, and does not any more.
    pub(in crate::coordinator) fn vacated(&self, run: &RunId, node: &NodeId) {
        if !self.any() {
            return;
        }
        let Some(boards) = self.runs.get(run).map(|boards| boards.value().clone()) else { return };
        for board in boards {
            let mut inner = board.lock();
            if inner.ready.vacated(node) {
                board.tell(&mut inner);
            }
        }
    }

    /// The run is not resident any more, or gone: who waits looks anew.
    pub(in crate::coordinator) fn forget(&self, run: &RunId) {
        if let Some((_, boards)) = self.runs.remove(run) {
            self.count.fetch_sub(boards.len(), Ordering::SeqCst);
            for board in boards {
                board.news.notify_waiters();
            }
        }
    }

    /// Wakes everybody: all is closing.
    pub(in crate::coordinator) fn close(&self) {
        for boards in &self.runs {
            for board in boards.value() {
                board.news.notify_waiters();
            }
        }
    }
}

impl Board {
    fn new(snapshot: &Snapshot, wish: &Arc<Wish>, me: &ProcessInfo, runtime: &Handle) -> Self {
        let ready = ReadyBoard::new(snapshot.state().clone(), wish, &me.id);
        let now = Instant::now();
        let inner = Inner { ready, start: now, asked: now, next_look: now, hurries_from: now, locked: None, alarm: None };
        let run = snapshot.state().id().clone();
        Self { run, inner: Mutex::new(inner), news: Notify::new(), runtime: runtime.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic in the middle would leave it wrong, not unsafe: the next rebuild mends it.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = inner.start.elapsed();
        inner.ready.at(now);
        inner
    }

    pub(super) fn run(&self) -> &RunId {
        &self.run
    }

    fn is_for(&self, wish: &Arc<Wish>) -> bool {
        self.lock().ready.is_for(wish)
    }

    pub(super) fn catch_up(self: &Arc<Self>, snapshot: &Snapshot) {
        let mut inner = self.lock();
        inner.asked = Instant::now();
        if inner.ready.version() < snapshot.version() {
            inner.ready.replaced(snapshot.state().clone());
            self.tell(&mut inner);
        }
    }

    fn changed(self: &Arc<Self>, seed: &ChangeSeed) {
        let Some(state) = &seed.state else { return };
        let mut inner = self.lock();
        let known = inner.ready.version();
        if seed.after <= known {
            return;
        }
        if seed.before == known && inner.ready.state().created_version() == state.created_version() {
            inner.ready.moved(state.clone(), &seed.nodes);
        } else {
            inner.ready.replaced(state.clone());
        }
        self.tell(&mut inner);
    }

    /// Wakes one for a ready node, who wakes the next one; and all, if there will be none.
    fn tell(self: &Arc<Self>, inner: &mut Inner) {
        let has_none = || inner.ready.drained().is_some() || inner.ready.state().header().status.is_ended();
        if !inner.ready.has_next() && has_none() {
            self.news.notify_waiters();
        } else {
            self.hand_on(inner);
        }
    }

    /// Wakes one for a ready node, now or when its time comes.
    fn hand_on(self: &Arc<Self>, inner: &mut Inner) {
        if inner.ready.has_next() {
            self.news.notify_one();
            return;
        }
        // A node that is kept out is nothing to do, however long it was ready: the next look tells.
        let Some(at) = inner.ready.next_at().filter(|_| inner.locked.is_none()) else { return };
        if inner.alarm.as_ref().is_some_and(|alarm| alarm.at <= at) {
            return;
        }
        let (board, due) = (Arc::downgrade(self), inner.start + at);
        let task = self.runtime.spawn(async move {
            sleep_until(due).await;
            if let Some(board) = board.upgrade() {
                board.ring();
            }
        });
        inner.alarm = Some(Alarm { at, task: task.abort_handle() });
    }

    /// The time of a node has come, or would have, had others not taken it.
    fn ring(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.alarm = None;
        if inner.locked.is_none() {
            self.hand_on(&mut inner);
        }
    }

    pub(super) fn news(&self) -> Notified<'_> {
        self.news.notified()
    }

    pub(super) fn version(&self) -> Version {
        self.lock().ready.version()
    }

    /// A node for the caller alone, until what is answered is dropped; none while all claims are known to be kept out: each of them would be refused.
    pub(super) fn pick(self: &Arc<Self>) -> Option<Picked> {
        let mut inner = self.lock();
        if inner.locked.is_some() {
            return None;
        }
        let pick = inner.ready.pick()?;
        self.hand_on(&mut inner);
        drop(inner);
        Some(Picked { board: Arc::clone(self), pick, refused: false })
    }

    pub(super) fn pending(&self) -> usize {
        self.lock().ready.pending()
    }

    /// How many nodes are blocked if nothing is ready or runs, and the version at which that is so.
    pub(super) fn drained(&self) -> Option<(usize, Version)> {
        let inner = self.lock();
        inner.ready.drained().map(|blocked| (blocked, inner.ready.version()))
    }

    /// Who held the lock on the whole run when that was seen last.
    pub(super) fn locked(&self) -> Option<Box<LeaseRecord>> {
        self.lock().locked.clone()
    }

    /// When there may be something to do that nobody tells.
    pub(super) fn next_look(&self) -> Instant {
        self.lock().next_look
    }

    /// Whether the caller is to look at leases and at what others did: one does it for all.
    pub(super) fn is_due(&self, ttl: Duration) -> bool {
        let pause = (ttl / 4).clamp(Duration::from_millis(100), LONGEST_PAUSE);
        let mut inner = self.lock();
        let now = Instant::now();
        if now < inner.next_look {
            return false;
        }
        inner.next_look = now + pause;
        true
    }

    /// Takes in the leases that were held after the run was at this version.
    pub(super) fn looked(self: &Arc<Self>, version: Version, leases: &[LeaseRecord]) {
        let of_run = leases.iter().filter(|lease| lease.key.run == self.run);
        let mut inner = self.lock();
        let locked = of_run.clone().find(|lease| lease.key.node.is_none());
        let whole = locked.is_some();
        inner.locked = locked.cloned().map(Box::new);
        let held: std::collections::HashSet<&NodeId> = of_run.clone().filter_map(|lease| lease.key.node.as_ref()).collect();
        inner.ready.set_held(version, |node| whole || held.contains(node));
        inner.ready.set_peers(of_run.map(|lease| &*lease.owner.process.id));
        inner.ready.readmit();
        self.tell(&mut inner);
    }
}

/// A node that was handed out.
#[derive(Debug)]
pub(super) struct Picked {
    board: Arc<Board>,
    pick: Pick,
    refused: bool,
}

impl Picked {
    pub(super) fn pick(&self) -> &Pick {
        &self.pick
    }

    /// How long it took to claim it, or to be refused.
    pub(super) fn took(&self, time: Duration) {
        self.board.lock().ready.claim_took(time);
    }

    /// Nobody gets any, because of this lock: whoever asks before the next look need not try.
    pub(super) fn kept_out(&self, holder: Box<LeaseRecord>) {
        self.board.lock().locked = Some(holder);
    }

    /// Somebody else has it. Perhaps the whole run, of which nothing is known here since the last look: then it is time for the next one; rarely, because
    /// many workers are refused often.
    pub(super) fn note_refusal(&mut self) {
        self.refused = true;
        let mut inner = self.board.lock();
        let now = Instant::now();
        if inner.hurries_from <= now {
            inner.next_look = inner.next_look.min(now);
            inner.hurries_from = now + LONGEST_PAUSE;
        }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        let mut inner = self.board.lock();
        inner.ready.put_back(&self.pick, self.refused);
        self.board.tell(&mut inner);
    }
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;
