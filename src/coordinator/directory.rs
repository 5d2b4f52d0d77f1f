//! Which runs are resident, and where. "Get, else start" under any number of callers starts one actor.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use dashmap::DashMap;
use ractor::{ActorCell, ActorId};
use tokio::runtime::Handle;
use tokio::sync::{Notify, OnceCell};

use super::claims::Boards;
use super::events::Events;
use crate::error::Error;
use crate::lease::LeaseHandle;
use crate::model::{FencingToken, RunId, RunReceipt, RunState, Snapshot, Version};
use crate::run::{ChangeSeed, DeferredLoss, RunContext, RunHandle, Surroundings, add_gone, newer};
use crate::store::{load_panicked, surviving};

/// Where a run is, or will be: what became of loading it is told to all who wait for it.
#[derive(Debug, Default)]
struct Slot {
    loaded: OnceCell<Result<RunHandle, Stop>>,
    /// Whether somebody who waits wants an actor also for a run that is not there.
    missing_too: AtomicBool,
}

impl Slot {
    fn handle(&self) -> Option<&RunHandle> {
        self.loaded.get().and_then(|loaded| loaded.as_ref().ok())
    }
}

/// Runs at most of which it is remembered what subscribers know; of one beyond it the next change is told as if nothing was known.
pub(super) const REMEMBERED: usize = 4096;

/// The resident runs.
#[derive(Debug)]
pub(crate) struct Directory {
    runs: DashMap<RunId, Arc<Slot>>,
    by_actor: DashMap<ActorId, RunId>,
    /// Runs whose actor died, and which death it was: the next one loads behind whatever the dead one had sent down.
    crashed: DashMap<RunId, u64>,
    deaths: AtomicU64,
    /// The versions of runs that are not resident up to which subscribers were told of them; and of those whose actor died what it showed last: what it
    /// had deleted is not there to be told.
    told: DashMap<RunId, (Version, Option<RunState>)>,
    /// Versions of other runs that were seen in storage while there are subscribers, or that their actors showed last: who loads one of them tells what
    /// became of it since. The follower takes those out that are not among the newest of the store, when there are many more than these.
    seen: DashMap<RunId, Version>,
    events: Arc<Events>,
    supervisor: ActorCell,
    /// Where actors live: on the runtime that the coordinator was opened on. That of a caller may stand still, or end.
    runtime: Handle,
    context: OnceLock<Weak<RunContext>>,
    leases: OnceLock<LeaseHandle>,
    ended: AtomicBool,
    /// How many runs may be resident, and who is woken when there are more.
    bound: usize,
    crowded: Notify,
    /// Ready nodes of the runs that somebody asks for work.
    pub(super) boards: Boards,
}

impl Directory {
    pub(super) fn new(events: Arc<Events>, supervisor: ActorCell, runtime: Handle, bound: usize) -> Self {
        Self {
            runs: DashMap::new(),
            by_actor: DashMap::new(),
            crashed: DashMap::new(),
            deaths: AtomicU64::new(0),
            told: DashMap::new(),
            seen: DashMap::new(),
            events,
            supervisor,
            runtime,
            context: OnceLock::new(),
            leases: OnceLock::new(),
            ended: AtomicBool::new(false),
            bound,
            crowded: Notify::new(),
            boards: Boards::default(),
        }
    }

    pub(super) fn set_context(&self, context: &Arc<RunContext>) {
        // Set once, while the coordinator is opened.
        let _first = self.context.set(Arc::downgrade(context));
    }

    pub(super) fn set_leases(&self, leases: LeaseHandle) {
        // Set once, while the coordinator is opened.
        let _first = self.leases.set(leases);
    }

    /// A run's handle if it is resident and its actor lives.
    pub(crate) fn get(&self, run: &str) -> Option<RunHandle> {
        self.found(run).filter(RunHandle::is_alive)
    }

    /// As [`get`](Self::get), also of an actor that died and is not forgotten yet.
    fn found(&self, run: &str) -> Option<RunHandle> {
        self.runs.get(run).and_then(|slot| slot.handle().cloned())
    }

    /// A run's handle, for a run that is there; `None` if it is not.
    pub(super) async fn existing(self: &Arc<Self>, run: &RunId) -> Result<Option<RunHandle>, Error> {
        self.open(run, false).await
    }

    /// A run's handle, also for a run that is not there yet.
    pub(super) async fn any(self: &Arc<Self>, run: &RunId) -> Result<RunHandle, Error> {
        self.open(run, true).await?.ok_or(Error::Closed)
    }

    async fn open(self: &Arc<Self>, run: &RunId, missing_too: bool) -> Result<Option<RunHandle>, Error> {
        loop {
            if let Some(handle) = self.found(run.as_str()) {
                if handle.is_alive() {
                    return Ok(Some(handle));
                }
                handle.gone().await;
                self.died(run, handle.actor_id());
                continue;
            }
            // A task of its own: a caller that goes away does not leave an actor that nobody knows.
            let (directory, id) = (Arc::clone(self), run.clone());
            let started = self.runtime.spawn(async move { directory.start(id, missing_too).await }).await;
            match started.unwrap_or(Err(Error::Closed))? {
                Started::Here(handle) => return Ok(Some(handle)),
                Started::Missing => return Ok(None),
                Started::Again => {}
            }
        }
    }

    async fn start(&self, run: RunId, missing_too: bool) -> Result<Started, Error> {
        let mut asked_before = false;
        loop {
            let slot = self.runs.entry(run.clone()).or_default().clone();
            if missing_too {
                slot.missing_too.store(true, Ordering::Release);
            }
            let mut first = false;
            let load = || {
                first = true;
                self.load_and_start(&run, &slot.missing_too)
            };
            match slot.loaded.get_or_init(load).await {
                Ok(handle) => {
                    let current = self.runs.get(&run).is_some_and(|now| Arc::ptr_eq(now.value(), &slot));
                    if current {
                        return Ok(Started::Here(handle.clone()));
                    }
                    // The slot was taken out while it was filled: whoever finds the new one must not meet this actor.
                    handle.passivate();
                    return Ok(Started::Again);
                }
                Err(stop) => {
                    self.runs.remove_if(&run, |_, now| Arc::ptr_eq(now, &slot));
                    match stop {
                        // It was not known in time that somebody wants more.
                        Stop::Missing if missing_too => {}
                        // Storage was asked before this caller asked: what it was not told then may be there now. All of them wait for one more answer.
                        _ if !first && !asked_before => {}
                        Stop::Missing => return Ok(Started::Missing),
                        Stop::Failed(error) => return Err(error.clone()),
                    }
                    asked_before = true;
                }
            }
        }
    }

    async fn load_and_start(&self, run: &RunId, missing_too: &AtomicBool) -> Result<RunHandle, Stop> {
        let context = self.context.get().and_then(Weak::upgrade).ok_or(Stop::Failed(Error::Closed))?;
        if self.ended.load(Ordering::Acquire) {
            return Err(Stop::Failed(Error::Closed));
        }
        if self.crashed.contains_key(run) {
            context.persist.barrier(run).await.map_err(|error| Stop::Failed(error.into()))?;
            self.crashed.remove(run);
        }
        // A slot that stays empty would be taken for one that is just being filled.
        let loaded = surviving(async { context.backend.load_run(run).await }, || load_panicked(run)).await;
        let state = loaded.map_err(|error| Stop::Failed(error.into()))?;
        if state.is_none() && !missing_too.load(Ordering::Acquire) {
            self.catch_up(run, None);
            return Err(Stop::Missing);
        }
        // Before the actor is there: what it commits is told after this.
        self.catch_up(run, state.as_ref());
        let handle = RunHandle::start(context, run.clone(), state, self.supervisor.clone())
            .await
            .map_err(|_| Stop::Failed(Error::Closed))?;
        self.by_actor.insert(handle.actor_id(), run.clone());
        if self.ended.load(Ordering::Acquire) {
            // Nobody else would end it.
            handle.end();
            return Err(Stop::Failed(Error::Closed));
        }
        self.tell_if_crowded();
        Ok(handle)
    }

    /// Wakes who waits for that, if more runs are resident than may be.
    pub(super) fn tell_if_crowded(&self) {
        if self.len() > self.bound {
            self.crowded.notify_one();
        }
    }

    /// Waits until more runs are resident than may be.
    pub(super) async fn crowded(&self) {
        self.crowded.notified().await;
    }

    fn is_shared(&self) -> bool {
        self.context.get().and_then(Weak::upgrade).is_some_and(|context| context.backend.is_shared())
    }

    /// Runs whose actor died, and whose last writes may be on their way; with which death it was.
    pub(super) fn crashed_runs(&self) -> Vec<(RunId, u64)> {
        self.crashed.iter().map(|run| (run.key().clone(), *run.value())).collect()
    }

    /// Nothing that the actor which died that death had sent down is on its way any more.
    pub(super) fn settled(&self, run: &RunId, death: u64) {
        self.crashed.remove_if(run, |_, last| *last == death);
    }

    /// All resident runs now.
    pub(crate) fn resident(&self) -> Vec<RunHandle> {
        self.runs.iter().filter_map(|slot| slot.handle().cloned()).collect()
    }

    /// How many runs are resident.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// Runs whose actor is just being started: what was loaded for it may be older than what was committed since.
    pub(super) fn starting(&self) -> Vec<RunId> {
        self.runs.iter().filter(|slot| !slot.loaded.initialized()).map(|slot| slot.key().clone()).collect()
    }

    /// Remembers up to which version subscribers know a run that is not resident.
    pub(super) fn remember(&self, run: &RunId, version: Version) {
        self.remember_with(run, version, None);
    }

    fn remember_with(&self, run: &RunId, version: Version, shown: Option<RunState>) {
        if self.told.len() < REMEMBERED && self.found(run.as_str()).is_none() {
            self.told.insert(run.clone(), (version, shown));
        }
    }

    /// The runs that are not resident, with the versions up to which subscribers know them.
    pub(super) fn remembered(&self) -> Vec<(RunId, Version)> {
        self.told.iter().map(|told| (told.key().clone(), told.value().0)).collect()
    }

    /// A run has this version in storage, and subscribers need not be told how it came to it.
    pub(super) fn see(&self, run: &RunId, version: Version) {
        self.seen.insert(run.clone(), version);
    }

    /// A run of which nothing is known changed, and could not be loaded yet.
    pub(super) fn note(&self, run: &RunId) {
        if !self.told.contains_key(run) {
            self.seen.entry(run.clone()).or_insert(Version::NONE);
        }
    }

    /// A run is as it was seen, and is not looked for any more; unless it went to sleep here with another version since.
    pub(super) fn lose_sight(&self, run: &RunId, version: Version) {
        self.seen.remove_if(run, |_, seen| *seen == version);
    }

    /// How many versions are kept for looking.
    pub(super) fn in_sight(&self) -> usize {
        self.seen.len()
    }

    /// Whether anything is known of a run that is not resident.
    pub(super) fn knows(&self, run: &RunId) -> bool {
        self.told.contains_key(run) || self.seen.contains_key(run)
    }

    /// Whether a run has this version as far as subscribers know, now.
    pub(super) fn is_known(&self, run: &RunId, version: Option<Version>) -> bool {
        let told = self.told.get(run).map(|told| told.0);
        told.or_else(|| self.seen.get(run).map(|seen| *seen)) == version
    }

    /// A run that cannot be read: subscribers are not told of it before it has another version.
    pub(super) fn pass_over(&self, run: &RunId, version: Option<Version>) {
        self.told.remove(run);
        self.shown_last(run, version);
    }

    /// Up to which versions subscribers know runs, also of some that are resident.
    pub(super) fn known(&self) -> Vec<(RunId, Version)> {
        let seen = self.seen.iter().map(|seen| (seen.key().clone(), *seen.value()));
        // What is remembered counts for more: it is as new as what subscribers were told.
        seen.chain(self.remembered()).collect()
    }

    /// Nobody listens: nothing has to be remembered.
    pub(super) fn forget_told(&self) {
        self.told.clear();
        self.seen.clear();
    }

    /// Makes a run that others changed resident, and tells subscribers the net change.
    pub(super) async fn follow(self: &Arc<Self>, run: &RunId) -> Result<(), Error> {
        let known = self.seen.get(run).map_or(Version::NONE, |seen| *seen);
        self.told.entry(run.clone()).or_insert((known, None));
        let followed = self.existing(run).await;
        if followed.is_ok() {
            // It may have been there already, and then tells by itself.
            self.told.remove(run);
        }
        followed.map(drop)
    }

    /// Tells subscribers what changed in a run while it was not resident, if they knew it.
    fn catch_up(&self, run: &RunId, state: Option<&RunState>) {
        let seen = self.seen.get(run).map(|seen| *seen);
        let told = self.told.remove(run).map(|(_, told)| told);
        let Some((before, shown)) = told.or(seen.map(|seen| (seen, None))) else { return };
        let after = state.map_or(Version::NONE, RunState::version);
        if seen.is_some() {
            self.shown_last(run, state.map(RunState::version));
        }
        if after == before || !self.events.has_subscribers() {
            return;
        }
        let versions = RunReceipt { run: run.clone(), before, after };
        let mut changed = newer(state, before);
        if let Some(shown) = &shown {
            add_gone(&mut changed, shown, state);
        }
        self.events.changed(ChangeSeed::of(versions, None, changed, state.cloned()));
    }

    fn shown_last(&self, run: &RunId, version: Option<Version>) {
        match version {
            Some(version) => self.seen.insert(run.clone(), version),
            None => self.seen.remove(run).map(|(_, version)| version),
        };
    }

    fn forget(&self, run: &RunId, actor: ActorId) {
        self.boards.forget(run);
        self.by_actor.remove(&actor);
        self.runs.remove_if(run, |_, slot| slot.handle().is_some_and(|handle| handle.actor_id() == actor));
    }

    fn died(&self, run: &RunId, actor: ActorId) {
        // Nothing, if its death is known already.
        let found = self.found(run.as_str()).filter(|handle| handle.actor_id() == actor);
        self.crashed.insert(run.clone(), self.deaths.fetch_add(1, Ordering::Relaxed));
        self.forget(run, actor);
        // What it had sent down is told by who loads it next.
        if let Some(found) = found.filter(|_| self.events.has_subscribers()) {
            let shown = found.cell().snapshot();
            let known = shown.as_ref().map_or(Version::NONE, Snapshot::durable_version);
            self.remember_with(run, known, shown.map(|shown| shown.state().clone()));
        }
    }

    /// The supervisor saw an actor die; says which run it was, if it had not left by itself.
    pub(super) fn crashed(&self, actor: ActorId) -> Option<RunId> {
        let run = self.by_actor.get(&actor).map(|run| run.value().clone())?;
        self.died(&run, actor);
        Some(run)
    }

    /// Ends all actors; everything is settled.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        // Who waits for it waits no longer.
        self.crowded.notify_one();
        for handle in self.resident() {
            handle.end();
        }
        self.runs.clear();
        self.by_actor.clear();
    }
}

enum Started {
    Here(RunHandle),
    Missing,
    Again,
}

/// Why no actor was started.
#[derive(Debug)]
enum Stop {
    Missing,
    Failed(Error),
}

impl Surroundings for Directory {
    fn retire(&self, run: &RunId, actor: ActorId, settled: bool) {
        let known = self.found(run.as_str()).and_then(|handle| handle.cell().durable_version());
        if settled {
            let listens = self.is_shared() && self.events.has_subscribers();
            if listens {
                self.shown_last(run, known);
            }
            self.forget(run, actor);
            if let Some(known) = known.filter(|_| listens) {
                self.remember(run, known);
            }
        } else {
            self.died(run, actor);
        }
    }

    fn ended(&self, run: &RunId) {
        if let Some(leases) = self.leases.get() {
            leases.free_run(run);
        }
    }

    fn returned(&self, token: FencingToken) {
        if let Some(leases) = self.leases.get() {
            leases.returned(token);
        }
    }

    fn wants_changes(&self) -> bool {
        self.events.has_subscribers() || self.boards.any()
    }

    fn taken_back(&self, run: &RunId) {
        self.boards.forget(run);
    }

    fn changed(&self, change: ChangeSeed) {
        self.boards.changed(&change);
        if self.events.has_subscribers() {
            self.events.changed(change);
        }
    }

    fn lost(&self, loss: &DeferredLoss) {
        self.events.lost(loss);
    }
}
