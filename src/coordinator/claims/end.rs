//! How a claim ends: what its worker tells, told to storage until that takes it; and what is still held when all is closed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::coordinator::commit::{Work, runs};
use crate::coordinator::write::node_change;
use crate::coordinator::{Commit, Engine};
use crate::error::Error;
use crate::lease::{Lease, LostReason};
use crate::model::{Fence, FencingToken, Guard, LeaseKey, NodeId, NodeUpdate, Refusal, RunId, RunStatus};
use crate::run::Committed;

/// How often an end is told while storage is busy or full, and how long between.
const TELL_TRIES: u32 = 10;
const TELL_PAUSE: Duration = Duration::from_millis(200);
/// For how long: storage that takes seconds to say that it is busy would hold its caller, and closing, for as many times.
const TELL_TIME: Duration = Duration::from_secs(3);
/// How often it is told once more that its run got another status meanwhile, which is no end.
const STATUSES: u32 = 64;
/// How long closing waits until storage has answered to all that is given back. What storage does not answer it may have taken.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(30);

/// How long is looked why a claim is lost, for the words of an error.
const LOOKED_WITHIN: Duration = Duration::from_secs(1);

/// How often something was told, and since when in vain.
#[derive(Debug, Default)]
pub(super) struct Tries {
    count: u32,
    since: Option<Instant>,
}

impl Tries {
    /// Whether storage may take at the next try what it did not at this one: it was busy or full, and not for long. What nobody knows is not tried again: a
    /// second try would be refused by the first, if that was applied.
    fn are_left(&mut self, error: &Error) -> bool {
        self.count += 1;
        let since = *self.since.get_or_insert_with(Instant::now);
        let passes = matches!(error, Error::Store(fault) if fault.is_retryable() && !fault.is_unknown_outcome());
        // Once more in any case, however long the first try took.
        passes && self.count < TELL_TRIES && (self.count == 1 || since.elapsed() < TELL_TIME)
    }

    /// As [`are_left`](Self::are_left), behind a pause if so.
    pub(super) async fn once_more(&mut self, error: &Error) -> bool {
        let left = self.are_left(error);
        if left {
            tokio::time::sleep(TELL_PAUSE).await;
        }
        left
    }
}

/// What an end that is on its way has in common with the claim, whose caller may be gone.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) run: RunId,
    pub(super) node: NodeId,
    pub(super) lease: Lease,
    /// Why no end can be told any more: one was, or was refused for good. Who waits for the loss of the claim waits for this too.
    pub(super) ended: watch::Sender<Option<LostReason>>,
    /// How many ends are being told.
    telling: watch::Sender<usize>,
}

impl Held {
    pub(super) fn new(run: RunId, node: NodeId, lease: Lease) -> Arc<Self> {
        Arc::new(Self { run, node, lease, ended: watch::Sender::new(None), telling: watch::Sender::new(0) })
    }

    fn is_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// What holds the node, unless that is over.
    pub(super) fn lease(&self) -> Option<&Lease> {
        Some(&self.lease).filter(|_| !self.is_ended())
    }

    /// The end is in storage, and gave the lease back.
    fn landed(&self, as_what: LostReason) {
        self.ended.send_replace(Some(as_what));
        self.lease.returned();
    }

    fn forsake(&self, as_what: LostReason) {
        self.ended.send_replace(Some(as_what));
        self.lease.let_go();
    }

    /// Waits until no end is being told.
    async fn all_told(&self) {
        let _none_is_left = self.telling.subscribe().wait_for(|count| *count == 0).await.is_ok();
    }

    /// Why it is not held any more, if so.
    fn over(&self) -> Option<LostReason> {
        (*self.ended.borrow()).or_else(|| self.lease.lost_reason())
    }
}

/// An end of a claim that is being told: until then the claim is not given back.
#[derive(Debug)]
pub(super) struct Telling(Arc<Held>);

impl Telling {
    pub(super) fn new(held: &Arc<Held>) -> Self {
        held.telling.send_modify(|count| *count += 1);
        Self(Arc::clone(held))
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.0.telling.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// The claims that somebody of this process holds, by their tokens.
#[derive(Debug, Default)]
pub(in crate::coordinator) struct HeldClaims(Mutex<HashMap<FencingToken, Weak<Held>>>);

impl HeldClaims {
    fn with<T>(&self, change: impl FnOnce(&mut HashMap<FencingToken, Weak<Held>>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn add(&self, held: &Arc<Held>) {
        self.with(|all| all.insert(held.lease.token(), Arc::downgrade(held)));
    }

    pub(super) fn remove(&self, held: &Held) {
        self.with(|all| all.remove(&held.lease.token()));
    }

    /// Nobody gives them back any more.
    pub(in crate::coordinator) fn forget(&self) {
        self.with(HashMap::clear);
    }

    fn take(&self) -> Vec<Arc<Held>> {
        self.with(std::mem::take).into_values().filter_map(|held| held.upgrade()).filter(|held| !held.is_ended()).collect()
    }
}

impl Engine {
    /// Gives back what is held when all is closed, as its drop does. All that was told before is settled by then, and nothing more is told.
    pub(in crate::coordinator) async fn give_back_claims(self: &Arc<Self>) {
        let held = self.held.take();
        if held.is_empty() {
            return;
        }
        let until = Instant::now() + GIVEN_BACK_WITHIN;
        // What was written before is waited for as ever. Behind it nothing is on its way that somebody waits for.
        let alone = timeout_at(until, self.admission.drained()).await.is_ok();
        let mut giving_back = JoinSet::new();
        for held in held {
            let engine = Arc::clone(self);
            giving_back.spawn(async move { End::give_back(engine, held, Told::unbegun()).await });
        }
        let all = async { while giving_back.join_next().await.is_some() {} };
        if timeout_at(until, all).await.is_ok() {
            return;
        }
        if alone {
            tracing::error!(
                claims = giving_back.len(),
                "storage does not answer to claims that are given back; they are taken over when it does"
            );
            self.context.persist.abandon();
        }
        while giving_back.join_next().await.is_some() {}
    }
}

/// What becomes of a node, and what else is written in the same commit.
pub(super) struct Told {
    pub(super) updates: Vec<NodeUpdate>,
    pub(super) with: Work,
}

impl From<Vec<NodeUpdate>> for Told {
    fn from(updates: Vec<NodeUpdate>) -> Self {
        Self { updates, with: Work::default() }
    }
}

impl Told {
    /// Pending again, on the same attempt.
    pub(super) fn unbegun() -> Self {
        vec![NodeUpdate::pending().unbegun()].into()
    }
}

/// An end that is being told.
pub(super) struct End {
    pub(super) engine: Arc<Engine>,
    /// What must hold besides its own lease.
    pub(super) fences: Option<Arc<[Fence]>>,
    pub(super) held: Arc<Held>,
    /// What those hear who wait for the loss of the claim.
    pub(super) as_what: LostReason,
    /// Once it is gone nobody is left who wants more than one try.
    pub(super) caller: Weak<()>,
}

impl End {
    /// What becomes of a node whose worker tells nothing, whatever else he lost: it gives back what it has.
    pub(super) async fn give_back(engine: Arc<Engine>, held: Arc<Held>, told: Told) {
        // An end may have been told before, by a call that nobody waited for: it has the first word, whichever task runs first.
        held.all_told().await;
        let caller = Arc::new(());
        let as_what = if engine.is_closed() { LostReason::Closed } else { LostReason::Ended };
        let end = Self { engine, fences: None, held, as_what, caller: Arc::downgrade(&caller) };
        if let Err(error) = end.tell(&told).await {
            let Held { run, node, .. } = &*end.held;
            match error {
                Error::Store(_) | Error::Unknown(_) => tracing::warn!(%run, %node, %error, "storage did not take back a claim"),
                _ => tracing::debug!(%run, %node, %error, "a claim was not given back"),
            }
        }
    }

    pub(super) async fn tell(&self, told: &Told) -> Result<Commit, Error> {
        let held = &self.held;
        let (mut tries, mut changes) = (Tries::default(), 0);
        let mut open = vec![RunStatus::Pending, RunStatus::Running];
        loop {
            // Once lost it stays lost: what storage would say is known.
            if let Some(reason) = held.over() {
                return Err(self.refused(reason).await);
            }
            let lease = &held.lease;
            let own = lease.fence();
            let error = match self.tell_once(told, &own, &mut open).await {
                Ok(committed) => {
                    held.landed(self.as_what);
                    return Ok(committed.into());
                }
                // Somebody gave the run a status of his own in that moment: the work is told in a run that goes on.
                Err(error) if self.asked_of(&error).is_some_and(|guard| *guard == Guard::RunStatus(open.clone())) => {
                    match self.note_open(&mut open).await {
                        Ok(true) if changes < STATUSES => {
                            changes += 1;
                            continue;
                        }
                        Ok(true) => return Err(error),
                        Ok(false) => error,
                        Err(unread) => unread,
                    }
                }
                Err(error) => error,
            };
            // Not what was put in besides: where that does not hold the claim is still its caller's.
            let is_own = |guard: &Guard| *guard == runs(&held.node) || *guard == Guard::RunStatus(open.clone());
            lease.kept();
            match &error {
                Error::Store(_) if tries.are_left(&error) && self.caller.strong_count() > 0 && !lease.is_lost() => {
                    tokio::time::sleep(TELL_PAUSE).await;
                }
                Error::Conflict(Refusal::Guard { .. }) if !self.asked_of(&error).is_some_and(is_own) => return Err(error),
                Error::RunNotFound(run) if *run != held.run => return Err(error),
                Error::Conflict(Refusal::Guard { guard: Guard::RunStatus(_), .. }) | Error::RunNotFound(_) => {
                    held.forsake(LostReason::RunEnded);
                    return Err(self.refused(LostReason::RunEnded).await);
                }
                // Nothing is left to be given back: it is lost, or has ended otherwise.
                Error::LeaseLost(Refusal::Fenced { fence }) if *fence == own => {
                    let reason = lease.lost_reason().unwrap_or(LostReason::Forced);
                    held.forsake(reason);
                    return Err(self.refused(reason).await);
                }
                // Another lease that its coordinator is under is lost, and this one holds: it is still its caller's, to be given back.
                Error::LeaseLost(Refusal::Fenced { .. }) => return Err(error),
                Error::LeaseLost(_) | Error::Conflict(_) => {
                    held.forsake(LostReason::Ended);
                    return Err(error);
                }
                _ => return Err(error),
            }
        }
    }

    /// What was asked of the run of this claim, and did not hold.
    fn asked_of<'e>(&self, error: &'e Error) -> Option<&'e Guard> {
        match error {
            Error::Conflict(Refusal::Guard { run, guard, .. }) if *run == self.held.run => Some(guard),
            _ => None,
        }
    }

    async fn tell_once(&self, told: &Told, own: &Fence, open: &mut Vec<RunStatus>) -> Result<Committed, Error> {
        let (engine, held) = (&self.engine, &self.held);
        let mut guards = vec![runs(&held.node)];
        // Where leases live in this process the actor of the run knows first that it has ended.
        if !engine.leases.keeps_rows() {
            self.note_open(open).await?;
            guards.push(Guard::RunStatus(open.clone()));
        }
        let mut work = told.with.clone();
        let draft = work.runs.entry(held.run.clone()).or_default();
        draft.mutations.extend(told.updates.iter().map(|update| node_change(held.node.clone(), update.clone())));
        draft.guards.splice(0..0, guards);
        let under = self.fences.iter().flat_map(|fences| fences.iter());
        let fences = [own].into_iter().chain(under).chain(&told.with.fences);
        work.fences = fences.fold(Vec::new(), |mut fences, fence| {
            if !fences.contains(fence) {
                fences.push(fence.clone());
            }
            fences
        });
        work.leases.push(held.lease.returning());
        // Lost writes of others are no reason to do this work again.
        work.unheard = true;
        engine.commit(work, false).await
    }

    /// Notes the status that the run has now, unless that is an end, and says whether there is one. A run that went to sleep is loaded: a claim does not keep
    /// it awake.
    async fn note_open(&self, open: &mut Vec<RunStatus>) -> Result<bool, Error> {
        let run = &self.held.run;
        let found = self.engine.directory.existing(run).await?.and_then(|handle| handle.cell().snapshot());
        let status = found.map(|run| run.header().status.clone()).filter(|status| !status.is_ended());
        let is_open = status.is_some();
        open.extend(status.filter(|status| !open.contains(status)));
        Ok(is_open)
    }

    /// What the caller of an end is told whose claim is not held any more.
    async fn refused(&self, reason: LostReason) -> Error {
        let Held { run, node, lease, .. } = &*self.held;
        if reason == LostReason::Closed {
            return Error::Closed;
        }
        // Where another process ended the run, all that is known here is that the lease went.
        let now = match reason {
            LostReason::RunEnded | LostReason::Forced => tokio::time::timeout(LOOKED_WITHIN, self.engine.fresh(run)).await.ok(),
            _ => None,
        };
        let why = match now {
            Some(Ok(None)) => "its run was deleted".to_owned(),
            Some(Ok(Some(now))) if now.header().status.is_ended() => format!("its run has ended ({})", now.header().status),
            _ => reason.to_string(),
        };
        Error::LeaseLost(Refusal::ClaimOver { key: LeaseKey::node(run.clone(), node.clone()), token: lease.token(), why })
    }
}
