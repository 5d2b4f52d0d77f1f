//! Who claims nodes of a run whose worker is gone stands in for that one: this process becomes the run's worker in the claim's own commit, so that nobody takes
//! the run for abandoned between two claims. A run that it works on no more it gives back, to whom it found there: then nobody works on it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Engine;
use crate::coordinator::write::UNSTAMPED;
use crate::error::Error;
use crate::model::{Mutation, ProcessInfo, RunHeader, RunId, RunUpdate, Snapshot};
use crate::run::Op;
use crate::store::gone;

/// For how long it is taken for known whether a worker lives: by then a claim asks again.
const JUDGED_FOR: Duration = Duration::from_secs(1);
/// A question that takes longer says nothing: the claim does not wait for it.
const ASKED_WITHIN: Duration = Duration::from_secs(1);
/// So many workers are remembered; more of them are asked for anew.
const MOST_JUDGED: usize = 1_000;
/// So long a run stays this process's own that somebody of it took by name: by then its claims know.
const TAKEN_FOR: Duration = Duration::from_secs(60);
/// So many of those are remembered.
const MOST_TAKEN: usize = 100;
/// How long nobody may have asked for work, and nobody held any, until a run is given back.
const IDLE: Duration = Duration::from_secs(30);

/// The runs that this process stands in for somebody.
#[derive(Debug, Default)]
pub(in crate::coordinator) struct StandIns {
    inner: Mutex<Inner>,
    /// Asked with every change of a run's header.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Inner {
    /// Workers of runs, by their ids.
    judged: HashMap<Arc<str>, Judged>,
    runs: HashMap<RunId, StandIn>,
    /// Runs that this process took by name, and when.
    taken: HashMap<RunId, Instant>,
}

#[derive(Debug)]
struct Judged {
    at: Instant,
    gone: bool,
}

#[derive(Debug, Clone)]
struct StandIn {
    /// Whose run it was.
    before: ProcessInfo,
    /// When somebody of this process was seen to work on it last.
    since: Instant,
    /// It is being given back.
    leaving: bool,
}

impl StandIns {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a worker; `None`: the caller is to ask, for all who come meanwhile, and they go by what was known before.
    fn known(&self, worker: &ProcessInfo) -> Option<bool> {
        let now = Instant::now();
        let mut inner = self.lock();
        if inner.judged.len() >= MOST_JUDGED {
            inner.judged.clear();
        }
        match inner.judged.entry(Arc::clone(&worker.id)) {
            Place::Occupied(known) if now.duration_since(known.get().at) < JUDGED_FOR => Some(known.get().gone),
            Place::Occupied(mut known) => {
                known.get_mut().at = now;
                None
            }
            Place::Vacant(new) => {
                new.insert(Judged { at: now, gone: false });
                None
            }
        }
    }

    fn judge(&self, worker: &ProcessInfo, gone: bool) {
        self.lock().judged.insert(Arc::clone(&worker.id), Judged { at: Instant::now(), gone });
    }

    /// Notes it before it is sent; `false`: somebody of this process has just taken the run by name, and knows better whose it is.
    pub(super) fn add(&self, run: &RunId, before: &ProcessInfo) -> bool {
        let mut inner = self.lock();
        if inner.taken.get(run).is_some_and(|at| at.elapsed() < TAKEN_FOR) {
            return false;
        }
        inner.runs.insert(run.clone(), StandIn { before: before.clone(), since: Instant::now(), leaving: false });
        self.count.store(inner.runs.len(), Ordering::Release);
        true
    }

    /// Somebody of this process takes a run by name: it stays his.
    pub(in crate::coordinator) fn taken(&self, run: &RunId) {
        let mut inner = self.lock();
        if inner.taken.len() >= MOST_TAKEN {
            inner.taken.retain(|_, at| at.elapsed() < TAKEN_FOR);
            if inner.taken.len() >= MOST_TAKEN {
                // Who sets so many running is not at work on them by claims in the same moment.
                inner.taken.clear();
            }
        }
        inner.taken.insert(run.clone(), Instant::now());
        drop(inner);
        self.forget(run);
    }

    /// The run is nobody's to be given back.
    pub(in crate::coordinator) fn forget(&self, run: &RunId) {
        if self.count.load(Ordering::Acquire) > 0 {
            let mut inner = self.lock();
            inner.runs.remove(run);
            self.count.store(inner.runs.len(), Ordering::Release);
        }
    }

    /// Somebody of this process works on a run.
    fn used(&self, run: &RunId) {
        if self.count.load(Ordering::Acquire) > 0
            && let Some(stand_in) = self.lock().runs.get_mut(run)
        {
            stand_in.since = Instant::now();
        }
    }

    /// `false`: that is under way already, or there is nothing to be given back.
    fn begin(&self, run: &RunId) -> bool {
        self.lock().runs.get_mut(run).is_some_and(|stand_in| !std::mem::replace(&mut stand_in.leaving, true))
    }

    fn gave_back(&self, run: &RunId, settled: bool) {
        let mut inner = self.lock();
        // A claim may have come since, and stand in anew.
        if settled && inner.runs.get(run).is_some_and(|stand_in| stand_in.leaving) {
            inner.runs.remove(run);
        } else if let Some(stand_in) = inner.runs.get_mut(run) {
            stand_in.leaving = false;
        }
        self.count.store(inner.runs.len(), Ordering::Release);
    }

    fn all(&self) -> Vec<(RunId, StandIn)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        self.lock().runs.iter().map(|(run, stand_in)| (run.clone(), stand_in.clone())).collect()
    }
}

impl Engine {
    /// Whose place this process takes with a claim in a run, if its worker is known to be gone. Costs nothing where that is this process, and a question now and
    /// then where it is another one.
    pub(super) async fn to_stand_in_for(&self, snapshot: &Snapshot) -> Option<ProcessInfo> {
        let worker = snapshot.header().worker.as_ref().filter(|_| self.backend.is_shared())?;
        if worker.id == self.process.id {
            self.stand_ins.used(snapshot.id());
            return None;
        }
        let gone = if let Some(gone) = self.stand_ins.known(worker) {
            gone
        } else {
            // Without the time that a doubt would take: a claim waits for it, and the next one asks again.
            let Ok(Ok(found)) = tokio::time::timeout(ASKED_WITHIN, self.backend.processes()).await else { return None };
            let gone = gone::is_gone(&*self.backend, &self.process, Some(worker), &found);
            self.stand_ins.judge(worker, gone);
            gone
        };
        gone.then(|| worker.clone())
    }

    /// Gives those runs back on which nobody of this process works any more, in a task of its own: storage may take its time.
    pub(in crate::coordinator) fn step_back(self: &Arc<Self>) {
        for (run, StandIn { before, since, .. }) in self.stand_ins.all() {
            if self.held.any_of(&run) {
                self.stand_ins.used(&run);
                continue;
            }
            let works = match self.directory.boards.use_of(&run) {
                Some(used) => !used.is_drained && used.asked.max(since).elapsed() < IDLE,
                None => since.elapsed() < IDLE,
            };
            if !works && self.stand_ins.begin(&run) {
                let engine = Arc::clone(self);
                self.runtime.spawn(async move {
                    let settled = engine.give_run_back(&run, before).await;
                    engine.stand_ins.gave_back(&run, settled);
                });
            }
        }
    }

    /// `false`: storage does not take it now.
    async fn give_run_back(&self, run: &RunId, before: ProcessInfo) -> bool {
        let found = match self.snapshot(run).await {
            Ok(found) => found,
            Err(error) => return !matches!(error, Error::Store(_)),
        };
        let is_mine = |header: &RunHeader| header.worker.as_ref().is_some_and(|worker| worker.id == self.process.id);
        if !found.is_some_and(|found| !found.header().status.is_ended() && is_mine(found.header())) {
            return true;
        }
        let update = RunUpdate::new().worker_after(&self.process, before);
        let op = Op { mutations: vec![Mutation::Update { update, at: UNSTAMPED }], unheard: true, ..Op::default() };
        match self.commit_one(run.clone(), op, false).await {
            Err(Error::Store(error)) => {
                tracing::debug!(%run, %error, "a run was not given back to its worker that is gone");
                false
            }
            _ => true,
        }
    }
}
