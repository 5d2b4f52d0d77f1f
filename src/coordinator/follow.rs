//! Following what other processes commit: which runs are to be loaded again, and how fresh the snapshots are.
//!
//! ```text
//! backend.others_committed() ──► follower ──run_versions──► backend
//!                                   ├── Follow(version) ──► run actors whose snapshot has another one
//!                                   ├── load ─────────────► runs that are not resident, if somebody subscribes
//!                                   └── foreign ──────────► lock manager: who waits looks again
//! ```
//!
//! An actor compares with what it knows when nothing of its own is on its way, so that own commits make nobody load. What the backend says is a
//! hint: at the latest every five seconds the versions are asked for without one.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Engine;
use super::directory::REMEMBERED;
use crate::error::Error;
use crate::model::{RunId, Version};
use crate::store::{ForeignCommits, StateBackend, StoreError, StoreErrorKind, surviving};

/// How long the backend may say nothing before the versions are asked for all the same.
const UNASKED: Duration = Duration::from_secs(5);
/// How long an answer may take before it counts as a failure.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pauses after failures.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// After a round follows a pause of this many times its duration: following takes at most a fifth of a reader.
const REST: u32 = 4;
/// Also after a short one: what others write to a node in quick succession is taken in at once.
const SHORTEST_REST: Duration = Duration::from_millis(25);
const LONGEST_REST: Duration = Duration::from_millis(200);
/// How soon a run is looked at again that was just being loaded.
const STARTING: Duration = Duration::from_millis(20);
/// Where the backend does not say which runs changed: how many of the newest runs are looked through for those that are not resident, and how often at most;
/// looking takes a small part of the time at most.
const NEWEST: usize = 100_000;
const LOOK_THROUGH: Duration = Duration::from_millis(250);
const LOOKING_SHARE: u32 = 5;
/// So many of the newest are compared in every round.
const CLOSELY: usize = 64;
/// Runs that are not found any more are asked for by name, so many at once.
const MISSED: usize = 1_000;

/// How fresh the snapshots are, where other processes write too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Freshness {
    /// Whether there is anybody to follow: other processes may write to the same storage.
    pub shared: bool,
    /// When storage was last heard of, so that snapshots were brought up to then (wall clock). `None`: nobody is followed, or not yet.
    pub followed_at: Option<DateTime<Utc>>,
    /// How long that is ago.
    pub age: Option<Duration>,
    /// Since when snapshots may be stale: storage has not been heard of for longer than a lease lasts. `None`: they are not.
    pub stale_since: Option<DateTime<Utc>>,
    /// Why storage cannot be followed now.
    pub error: Option<String>,
}

/// What the follower counted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) rounds: u64,
    pub(super) behind: u64,
    pub(super) failures: u64,
}

/// What the follower says of itself.
#[derive(Debug, Default)]
pub(crate) struct Following {
    state: Mutex<State>,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
    /// Somebody subscribed.
    subscribed: Notify,
}

#[derive(Debug, Default)]
struct State {
    heard: Option<(Instant, DateTime<Utc>)>,
    error: Option<StoreError>,
    counts: Counts,
}

impl Following {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Storage was heard of.
    fn heard(&self, started: Instant, at: DateTime<Utc>) {
        let mut state = self.state();
        state.heard = Some((started, at));
        state.error = None;
    }

    fn failed(&self, error: StoreError) {
        let mut state = self.state();
        state.counts.failures += 1;
        state.error = Some(error);
    }

    pub(super) fn counts(&self) -> Counts {
        self.state().counts
    }

    pub(super) fn freshness(&self, shared: bool, ttl: Duration) -> Freshness {
        let state = self.state();
        let age = state.heard.map(|(at, _)| at.elapsed());
        let failing = state.error.is_some() || age.is_some_and(|age| age > UNASKED + PATIENCE);
        let followed_at = state.heard.map(|(_, at)| at);
        let stale = failing && age.is_some_and(|age| age > ttl);
        Freshness {
            shared,
            followed_at,
            age,
            stale_since: followed_at.filter(|_| stale),
            error: state.error.as_ref().map(ToString::to_string),
        }
    }

    pub(super) fn subscribed(&self) {
        self.subscribed.notify_one();
    }

    /// Ends the follower; after it nothing of it asks the backend any more.
    pub(super) async fn stop(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.abort();
            let _it_was_cut_off = task.await;
        }
    }
}

/// Begins to follow other processes, until the engine is dropped or closed.
pub(super) fn start(engine: &Arc<Engine>) {
    if !engine.backend.is_shared() {
        return;
    }
    // Everything that is resident from now on was loaded after this.
    engine.following.heard(Instant::now(), engine.context.clock.now());
    let follower = Follower {
        backend: Arc::clone(&engine.backend),
        engine: Arc::downgrade(engine),
        starting: BTreeSet::new(),
        looked: None,
        look_due: None,
        look_pause: LOOK_THROUGH,
        kept: 0,
        asked_all: Instant::now(),
    };
    let task = tokio::spawn(follower.work());
    *engine.following.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
}

struct Follower {
    backend: Arc<dyn StateBackend>,
    engine: Weak<Engine>,
    /// Runs that were just being loaded when the others were asked for.
    starting: BTreeSet<RunId>,
    /// When the newest runs were looked through last; `None`: not since somebody subscribed.
    looked: Option<Instant>,
    /// When they are to be looked through again.
    look_due: Option<Instant>,
    look_pause: Duration,
    /// How many versions the last look left in sight.
    kept: usize,
    /// When all that is known here was asked for last, without a hint.
    asked_all: Instant,
}

/// Why a round begins.
enum Cause {
    News(ForeignCommits),
    Subscribed,
    Nothing,
}

impl Follower {
    async fn work(mut self) {
        let (mut pause, mut owed, mut failing) = (FIRST_PAUSE, false, false);
        loop {
            let Some(following) = self.engine.upgrade().map(|engine| Arc::clone(&engine.following)) else { return };
            if owed {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            match surviving(self.step(owed, &following), panicked).await {
                Ok(()) if owed => owed = false,
                Ok(()) => {
                    if failing {
                        tracing::info!("what other processes commit is followed again");
                    }
                    (pause, failing) = (FIRST_PAUSE, false);
                }
                Err(error) if error.kind() == StoreErrorKind::Closed => return,
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "what other processes commit cannot be followed now; snapshots may be stale");
                    }
                    following.failed(error);
                    (owed, failing) = (true, true);
                }
            }
        }
    }

    /// Waits for a reason to begin a round, unless one is owed, and does it.
    async fn step(&mut self, owed: bool, following: &Following) -> Result<(), StoreError> {
        // Nobody knows what happened since it failed.
        let cause = if owed { Cause::News(ForeignCommits::all()) } else { self.wait(following).await? };
        self.round(cause).await
    }

    async fn wait(&self, following: &Following) -> Result<Cause, StoreError> {
        let soon = if self.starting.is_empty() { UNASKED } else { STARTING };
        let due = self.look_due.map_or(soon, |due| due.saturating_duration_since(Instant::now()).min(soon));
        tokio::select! {
            news = self.backend.others_committed() => news.map(Cause::News),
            () = following.subscribed.notified() => Ok(Cause::Subscribed),
            () = tokio::time::sleep(due) => Ok(Cause::Nothing),
        }
    }

    /// Brings what is resident up to what storage has.
    async fn round(&mut self, cause: Cause) -> Result<(), StoreError> {
        let Some(engine) = self.engine.upgrade() else { return Err(StoreError::closed()) };
        if engine.is_closed() {
            return Err(StoreError::closed());
        }
        let started = Instant::now();
        let at = engine.context.clock.now();
        let news = match cause {
            Cause::News(news) => news,
            Cause::Nothing if self.asked_all.elapsed() >= UNASKED => {
                self.asked_all = started;
                ForeignCommits::of(everything(&engine), false)
            }
            Cause::Subscribed | Cause::Nothing => ForeignCommits::of([], false),
        };
        if news.leases {
            engine.leases.foreign_commits();
        }
        self.compare(&engine, &news).await?;
        engine.following.heard(started, at);
        let rest = (started.elapsed() * REST).clamp(SHORTEST_REST, LONGEST_REST);
        drop(engine);
        tokio::time::sleep(rest).await;
        Ok(())
    }

    async fn compare(&mut self, engine: &Arc<Engine>, news: &ForeignCommits) -> Result<(), StoreError> {
        let started = Instant::now();
        let directory = &engine.directory;
        let listens = engine.events.has_subscribers();
        if !listens {
            directory.forget_told();
            (self.looked, self.look_due) = (None, None);
        }
        let again = std::mem::take(&mut self.starting);
        self.starting.extend(directory.starting());
        let concerned = |run: &RunId| again.contains(run) || news.runs.as_ref().is_none_or(|runs| runs.contains(run));
        let resident: Vec<_> = directory.resident().into_iter().filter(|handle| concerned(handle.cell().id())).collect();
        let remembered: Vec<_> = directory.remembered().into_iter().filter(|(run, _)| concerned(run)).collect();
        let asked: Vec<RunId> =
            resident.iter().map(|handle| handle.cell().id()).chain(remembered.iter().map(|(run, _)| run)).cloned().collect();
        let versions = if asked.is_empty() { Vec::new() } else { patiently(self.backend.run_versions(&asked)).await? };
        if versions.len() != asked.len() {
            let message = format!("{}: asked for {} runs, answered {}", self.backend.name(), asked.len(), versions.len());
            return Err(StoreError::not_applied(StoreErrorKind::Corrupt, message));
        }
        let mut behind = 0;
        for (handle, found) in resident.iter().zip(&versions) {
            if handle.cell().durable_version() != *found {
                handle.follow(*found);
                behind += 1;
            }
        }
        for ((run, known), found) in remembered.iter().zip(versions.iter().skip(resident.len())) {
            if *found != Some(*known) && !self.load(engine, run, *found).await? {
                // It is remembered, and looked at again when there may be room.
                self.look_due = self.look_due.or(Some(started + LOOK_THROUGH));
            }
        }
        if listens {
            match &news.runs {
                Some(runs) => {
                    let seen: BTreeSet<&RunId> = asked.iter().collect();
                    for run in runs.iter().filter(|run| !seen.contains(run)) {
                        if !self.load(engine, run, None).await? {
                            // Later, when there is room.
                            directory.note(run);
                            self.look_due = self.look_due.or(Some(started + LOOK_THROUGH));
                        }
                    }
                }
                None => self.look_due = self.look_due.or(Some(self.looked.map_or(started, |looked| looked + self.look_pause))),
            }
            // Whoever leaves stays in sight: also where nobody else commits, and nothing has to be looked for.
            if directory.in_sight() > self.kept + (self.kept / 4).max(REMEMBERED) {
                self.look_due = self.look_due.or(self.looked.map(|looked| looked + self.look_pause));
            }
            if self.looked.is_none() || self.look_due.is_some_and(|due| due <= Instant::now()) {
                self.look_through(engine).await?;
            }
        }
        let mut state = engine.following.state();
        state.counts.rounds += 1;
        state.counts.behind += behind;
        Ok(())
    }

    /// Looks through the newest runs for those that are not resident. What is there at the first look is taken for known.
    async fn look_through(&mut self, engine: &Arc<Engine>) -> Result<(), StoreError> {
        let directory = &engine.directory;
        let first = self.looked.is_none();
        let began = Instant::now();
        // Before storage is asked: what is made here meanwhile is not missed.
        let mut missed: HashMap<RunId, Version> = directory.known().into_iter().collect();
        let found = patiently(self.backend.newest_versions(NEWEST)).await?;
        self.look_pause = (began.elapsed() * LOOKING_SHARE).max(LOOK_THROUGH);
        let mut left_out = false;
        for (place, (run, version)) in found.into_iter().enumerate() {
            let before = missed.remove(&run);
            if directory.get(run.as_str()).is_some() {
                // Its actor tells.
            } else if first && before.is_none() {
                // Unless it was made here meanwhile, and is known better.
                if !directory.knows(&run) {
                    if place < CLOSELY {
                        directory.remember(&run, version);
                    }
                    directory.see(&run, version);
                }
            } else if before != Some(version) && !directory.is_known(&run, Some(version)) {
                left_out |= !self.load(engine, &run, Some(version)).await?;
            }
        }
        // Deleted, or no more among the newest.
        let missed: Vec<(RunId, Version)> = missed.into_iter().filter(|(run, _)| directory.get(run.as_str()).is_none()).collect();
        for some in missed.chunks(MISSED) {
            let ids: Vec<RunId> = some.iter().map(|(run, _)| run.clone()).collect();
            let there = patiently(self.backend.run_versions(&ids)).await?;
            for ((run, before), there) in some.iter().zip(there) {
                if there == Some(*before) {
                    directory.lose_sight(run, *before);
                } else if !directory.is_known(run, there) {
                    left_out |= !self.load(engine, run, there).await?;
                }
            }
        }
        self.kept = directory.in_sight();
        (self.looked, self.look_due) = (Some(began), left_out.then(|| Instant::now() + self.look_pause));
        Ok(())
    }

    /// Makes a run resident that others changed, so that subscribers are told. `found`: the version that it has now, if that is known. `false`: there is
    /// no room for it now.
    async fn load(&self, engine: &Arc<Engine>, run: &RunId, found: Option<Version>) -> Result<bool, StoreError> {
        if engine.directory.len() >= engine.limits.resident_runs {
            // Nobody here works on it; the bound on memory counts for more than being told at once.
            return Ok(false);
        }
        let load = async {
            engine.directory.follow(run).await.map_err(|error| match error {
                Error::Store(error) => error,
                _ if engine.is_closed() => StoreError::closed(),
                error => StoreError::not_applied(StoreErrorKind::Unavailable, format!("run {run:?} was not loaded: {error}")),
            })
        };
        match patiently(load).await {
            // One run that cannot be read does not keep the others from being followed: whoever asks for it is told.
            Err(error) if error.kind() == StoreErrorKind::Corrupt => {
                tracing::warn!(%run, %error, "a run that others changed cannot be read");
                engine.directory.pass_over(run, found);
                Ok(true)
            }
            loaded => loaded.map(|()| true),
        }
    }
}

/// Every run of which something is known here.
fn everything(engine: &Engine) -> Vec<RunId> {
    let resident = engine.directory.resident().into_iter().map(|handle| handle.cell().id().clone());
    resident.chain(engine.directory.remembered().into_iter().map(|(run, _)| run)).collect()
}

/// His clock, his backend: following goes on.
fn panicked() -> StoreError {
    let message = "the clock's or the backend's code panicked while others were followed";
    StoreError::not_applied(StoreErrorKind::Unavailable, message)
}

/// An answer that does not come is a failure like another.
async fn patiently<T>(answer: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| {
        let message = format!("storage did not say within {PATIENCE:?} what others committed");
        Err(StoreError::not_applied(StoreErrorKind::Unavailable, message))
    })
}
