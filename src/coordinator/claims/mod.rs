//! Claims: work that many workers, also of many processes, take from one run, and that survives whoever took it.
//!
//! A claim is a node that runs and its lease, which came to be in one commit; it ends in one commit too, fenced by the lease's token. What its
//! worker leaves behind is found by whoever looks next: a node that runs under a claim whose lease is gone.

mod board;
mod filter;
mod guard;
mod look;

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

pub(super) use self::board::Boards;
pub use self::filter::ClaimFilter;
pub use self::guard::Claim;

use self::board::Picked;
use super::write::{ids, node_change};
use super::{Coordinator, Engine};
use crate::error::Error;
use crate::lease::{LeaseError, LockOptions, Place};
use crate::model::{
    Fence, Guard, IntoNodeId, IntoRunId, LeaseKey, NodeId, NodeState, NodeStatus, NodeUpdate, Pick, RunId, RunStatus, Snapshot,
    Taking, Version, updated,
};
use crate::run::Op;
use crate::store::StoreErrorKind;

/// How often `claim_node` looks again when it meets others.
const TRIES: u32 = 8;

/// How long to wait before it is asked again what became of a claim.
const RETRACT_PAUSE: Duration = Duration::from_secs(1);

/// What there was to do.
#[derive(Debug)]
#[must_use = "a claim that is dropped is given back"]
#[non_exhaustive]
pub enum Next {
    /// A node, for nobody else.
    Claimed(Claim),
    /// Nothing is ready yet; others are working.
    NothingReady,
    /// Nothing is ready, nothing runs, and so nothing will be.
    Drained {
        /// How many nodes are pending all the same: what they depend on has failed, is not there, or waits for them.
        blocked: usize,
    },
}

impl Next {
    /// The claim, if there is one.
    pub fn claimed(self) -> Option<Claim> {
        match self {
            Self::Claimed(claim) => Some(claim),
            _ => None,
        }
    }
}

/// What a claim writes and asks for.
struct Want {
    run: RunId,
    node: NodeId,
    /// The node as it was seen, and must be when it is claimed.
    seen: Arc<NodeState>,
    taking: Taking,
    /// What must hold when it commits, besides that.
    guards: Vec<Guard>,
    run_status: RunStatus,
    owner: Arc<str>,
    ttl: Duration,
    /// Somebody else's claim is no question worth another look: there are other nodes.
    hasty: bool,
}

/// What became of it.
enum Tried {
    Claimed(Claim),
    /// Somebody else has it, or it is not what it was.
    Taken,
    /// It was on its last attempt, and has failed now.
    GaveUp,
    /// Storage took so long that the lease was over before it was known. The node is as it was, on the same attempt.
    TooLate,
}

impl Coordinator {
    /// Claims a node: moves it from pending to running and grants its lease, in one commit. `None` if somebody else has it, it is not pending, or
    /// storage took longer to grant the lease than it lasts (ask for a longer TTL).
    /// A node whose worker vanished (it runs under a claim whose lease is gone) is taken over: its dead attempt joins the history, and
    /// `attempt` is raised; if that was the last of its `max_attempts`, it fails instead.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use std::time::Duration;
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeStatus, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// state.create_run("run_1", NewRun::running()).await?;
    /// state.set_node_state("run_1", "orders", NodeUpdate::pending()).await?;
    /// let claim = state.claim_node("run_1", "orders", "worker-1", Duration::from_secs(30)).await?.unwrap();
    /// assert!(state.claim_node("run_1", "orders", "worker-2", Duration::from_secs(30)).await?.is_none());
    /// claim.complete(NodeUpdate::success().row_count(1_000)).await?;
    /// # state.close().await }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::RunNotFound`], [`Error::NodeNotFound`]; [`Error::Conflict`] if the run has ended; [`Error::Lease`] for an owner or a TTL that makes no sense
    /// (100 ms to 1 h); [`Error::Store`].
    ///
    /// # Cancel safety
    /// Dropped at any instant, the node is not claimed, or given back at once.
    pub async fn claim_node(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        owner: impl AsRef<str>,
        ttl: Duration,
    ) -> Result<Option<Claim>, Error> {
        let (run, node) = ids(run, node)?;
        let owner: Arc<str> = Arc::from(owner.as_ref());
        let engine = self.engine();
        for attempt in 0..TRIES {
            if attempt > 0 {
                engine.follow_up(&run).await?;
            }
            let snapshot = engine.snapshot(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?;
            let Some(seen) = snapshot.state().node_shared(node.as_str()) else {
                if attempt == 0 && engine.backend.is_shared() {
                    continue;
                }
                return Err(Error::NodeNotFound { run, node });
            };
            let taking = match seen.status {
                NodeStatus::Pending => Taking::Begin,
                NodeStatus::Running if seen.worker.is_some() => {
                    let key = LeaseKey::node(run.clone(), node.clone());
                    if engine.leases.list().await?.iter().any(|lease| lease.key.excludes(&key)) {
                        return Ok(None);
                    }
                    Taking::TakeOver
                }
                // What others wrote may not have come here yet.
                _ if attempt == 0 && engine.backend.is_shared() => continue,
                _ => return Ok(None),
            };
            let want = Want {
                run: run.clone(),
                node: node.clone(),
                run_status: snapshot.header().status.clone(),
                seen,
                taking,
                guards: Vec::new(),
                owner: Arc::clone(&owner),
                ttl,
                hasty: false,
            };
            match self.try_claim(want).await? {
                Tried::Claimed(claim) => return Ok(Some(claim)),
                Tried::GaveUp | Tried::TooLate => return Ok(None),
                Tried::Taken => {}
            }
        }
        Ok(None)
    }

    /// Hands one ready node of a run to the caller, and to nobody else: pending, and all that it [depends on](NodeUpdate::depends_on) done, also when the
    /// claim commits. Nodes whose worker vanished are taken over as by [`claim_node`](Self::claim_node). The order is not fixed, and differs
    /// between processes.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use std::time::Duration;
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// use seeknal_state::{ClaimFilter, Next};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    ///
    /// state.create_run("run_1", NewRun::running()).await?;
    /// state.set_node_state("run_1", "orders", NodeUpdate::pending()).await?;
    /// state.set_node_state("run_1", "report", NodeUpdate::pending().depends_on(["orders"]).max_attempts(3)).await?;
    ///
    /// let filter = ClaimFilter::new().owner("worker-1").wait(Duration::from_secs(5));
    /// let mut done = Vec::new();
    /// loop {
    ///     match state.claim_next("run_1", filter.clone()).await? {
    ///         Next::Claimed(claim) => {
    ///             done.push(claim.node_id().to_string());
    ///             claim.complete(NodeUpdate::success()).await?;
    ///         }
    ///         Next::Drained { .. } => break,
    ///         _ => {} // others are working; ask again
    ///     }
    /// }
    /// assert_eq!(done, ["orders", "report"]);
    /// # state.close().await }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`claim_node`](Self::claim_node). That others were faster is none.
    ///
    /// # Cancel safety
    /// Dropped at any instant, nothing is claimed, or what was claimed is given back at once.
    pub async fn claim_next(&self, run: impl IntoRunId, filter: ClaimFilter) -> Result<Next, Error> {
        let run = run.into_run_id()?;
        filter.check()?;
        // Whichever room is found closed first.
        self.next(run, filter).await.map_err(|error| if self.is_closed() { Error::Closed } else { error })
    }

    async fn next(&self, run: RunId, filter: ClaimFilter) -> Result<Next, Error> {
        let engine = self.engine();
        let ttl = filter.ttl.unwrap_or(engine.limits.lease_ttl);
        let owner = filter.owner.clone().unwrap_or_else(|| self.default_owner());
        let until = Instant::now().checked_add(filter.wait);
        loop {
            if engine.is_closed() {
                return Err(Error::Closed);
            }
            let taken_back = || engine.directory.get(run.as_str()).map(|handle| handle.cell().taken_back());
            let before = taken_back();
            let snapshot = engine.snapshot(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?;
            let board = engine.directory.boards.of(&snapshot, &filter.done, engine.backend.process().as_ref());
            // A board goes by versions. That of a deferred write which was taken back meanwhile would hide who takes its number.
            if snapshot.version() != snapshot.durable_version() && taken_back() != before {
                engine.directory.boards.forget(&run);
                continue;
            }
            if snapshot.header().status.is_ended() {
                // Others may have opened it again.
                if engine.follow_up(&run).await? {
                    continue;
                }
                return Ok(Next::Drained { blocked: board.pending() });
            }
            if board.is_due(ttl) {
                engine.look(&board).await?;
            }
            // Before it is looked at: what changes from now on is not missed.
            let news = board.news();
            tokio::pin!(news);
            news.as_mut().enable();
            if let Some(mut picked) = board.pick() {
                let want = Self::want(&snapshot, &picked, &owner, ttl, &filter.done);
                let began = Instant::now();
                let tried = self.try_claim(want).await?;
                picked.took(began.elapsed());
                match tried {
                    Tried::Claimed(claim) => return Ok(Next::Claimed(claim)),
                    Tried::Taken => picked.was_refused(),
                    // Where storage is that slow the wait must end all the same.
                    Tried::TooLate if until.is_some_and(|until| until <= Instant::now()) => return Ok(Next::NothingReady),
                    Tried::GaveUp | Tried::TooLate => {}
                }
                continue;
            }
            if let Some(blocked) = board.drained() {
                if engine.follow_up(&run).await? {
                    continue;
                }
                return Ok(Next::Drained { blocked });
            }
            let now = Instant::now();
            if until.is_some_and(|until| until <= now) {
                return Ok(Next::NothingReady);
            }
            let look = board.next_look();
            let wake = until.map_or(look, |until| until.min(look));
            tokio::select! {
                () = news => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Frees the nodes of a run whose workers vanished: they are pending again on their next attempt, or failed after the last one. Workers that ask
    /// for work do so by themselves; this is for a process that only looks on. Answers with the nodes that it freed; of a run that has ended none is.
    ///
    /// # Errors
    /// [`Error::RunNotFound`], [`Error::Store`].
    ///
    /// # Cancel safety
    /// Dropped at any instant, some nodes are freed and others are not.
    pub async fn free_dead_claims(&self, run: impl IntoRunId) -> Result<Vec<NodeId>, Error> {
        let run = run.into_run_id()?;
        let engine = self.engine();
        engine.follow_up(&run).await?;
        let snapshot = engine.snapshot(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?;
        if snapshot.header().status.is_ended() {
            return Ok(Vec::new());
        }
        // Behind the snapshot: a lease that is held under what it shows is among them.
        let leases = engine.leases.list().await?;
        let mut freed = Vec::new();
        for (node, seen) in snapshot.nodes() {
            let key = LeaseKey::node(run.clone(), node.clone());
            if seen.status != NodeStatus::Running || seen.worker.is_none() || leases.iter().any(|l| l.key.excludes(&key)) {
                continue;
            }
            let want = Want {
                run: run.clone(),
                node: node.clone(),
                seen: Arc::new(seen.clone()),
                taking: Taking::TakeOver,
                guards: Vec::new(),
                run_status: snapshot.header().status.clone(),
                owner: self.default_owner(),
                ttl: engine.limits.lease_ttl.max(Duration::from_millis(100)),
                hasty: false,
            };
            match self.try_claim(want).await? {
                Tried::Claimed(claim) => {
                    claim.release().await?;
                    freed.push(node.clone());
                }
                Tried::GaveUp => freed.push(node.clone()),
                Tried::Taken | Tried::TooLate => {}
            }
        }
        Ok(freed)
    }

    fn default_owner(&self) -> Arc<str> {
        let process = self.engine().backend.process();
        Arc::from(process.map_or_else(|| format!("pid {}", std::process::id()), |me| format!("{}:{}", me.host, me.pid)))
    }

    fn want(snapshot: &Snapshot, picked: &Picked, owner: &Arc<str>, ttl: Duration, done: &[NodeStatus]) -> Want {
        let Pick { node, seen, taking } = picked.pick().clone();
        let mut guards = Vec::new();
        if taking == Taking::Begin {
            // Others may have begun something anew since it was seen ready.
            guards.extend(seen.depends_on.iter().map(|needed| Guard::NodeStatus { node: needed.clone(), one_of: done.to_vec() }));
        }
        Want {
            run: snapshot.state().id().clone(),
            node,
            seen,
            taking,
            guards,
            run_status: snapshot.header().status.clone(),
            owner: Arc::clone(owner),
            ttl,
            hasty: true,
        }
    }

    /// Claims in a task of its own: the claim travels in the answer, so that a caller who is gone by then gives it back.
    async fn try_claim(&self, want: Want) -> Result<Tried, Error> {
        let (reply, answer) = oneshot::channel();
        let state = self.clone();
        let waited_for = WaitedFor::new(self.engine());
        self.core.runtime.spawn(async move {
            let _until_it_is_held_or_given_back = waited_for;
            let _caller_gone = reply.send(state.claim(want).await);
        });
        answer.await.unwrap_or(Err(Error::Closed))
    }

    async fn claim(&self, want: Want) -> Result<Tried, Error> {
        let engine = self.engine();
        if engine.is_closed() {
            return Err(Error::Closed);
        }
        let Want { run, node, seen, taking, guards: more, run_status, owner, ttl, hasty } = want;
        let options = LockOptions::new().owner(&owner).ttl(ttl).purpose("claim");
        let Some(place) = engine.leases.reserve(LeaseKey::node(run.clone(), node.clone()), options).await? else {
            return Ok(Tried::Taken);
        };
        let mut open = vec![RunStatus::Pending, RunStatus::Running];
        open.extend(Some(run_status).filter(|status| !status.is_ended() && !open.contains(status)));
        let given_up = taking == Taking::TakeOver && seen.max_attempts.is_some_and(|most| seen.attempt >= most);
        let update = match taking {
            Taking::Begin => NodeUpdate::running().worker(&owner),
            Taking::TakeOver if given_up => NodeUpdate::failed(vanished(&seen)),
            Taking::TakeOver => NodeUpdate::running().attempt(seen.attempt.saturating_add(1)).worker(&owner),
        };
        let mut guards = vec![Guard::RunStatus(open), Guard::NodeVersion { node: node.clone(), version: seen.version }];
        guards.extend(more);
        let mut op = Op {
            mutations: vec![node_change(node.clone(), update.clone())],
            guards,
            fences: self.fences.as_deref().map(<[Fence]>::to_vec).unwrap_or_default(),
            leases: place.grant().into_iter().collect(),
            hasty,
            // Told by what the worker writes itself.
            unheard: true,
            ..Op::default()
        };
        let at = engine.context.clock.now();
        op.stamp(|| at);
        let committed = match engine.commit_one(run.clone(), op, false).await {
            Ok(committed) => committed,
            Err(Error::Conflict(refusal))
                if !hasty && matches!(&refusal, crate::model::Refusal::Guard { guard: Guard::RunStatus(_), .. }) =>
            {
                return Err(Error::Conflict(refusal));
            }
            Err(Error::Conflict(_) | Error::Locked(_) | Error::Contended { .. }) => return Ok(Tried::Taken),
            Err(error) => {
                if error.is_unknown_outcome() {
                    let begun = (!given_up).then(|| updated(&seen, &update, at, seen.version));
                    drop(tokio::spawn(retract(Arc::downgrade(engine), run, node, begun, place)));
                }
                return Err(error);
            }
        };
        let granted = committed.grants.first().map(|grant| grant.token);
        let lease = match place.confirm(granted).await {
            Ok(lease) => lease,
            // The run ended: nothing was gained, and nothing is wrong.
            Err(LeaseError::RunEnded { .. }) => return Ok(Tried::Taken),
            Err(error) => {
                if let (false, Some(claimed)) = (given_up, committed.runs.first()) {
                    engine.unclaim(&run, &node, claimed.after).await;
                }
                return match error {
                    // This process was asleep for longer than the lease lasts, or storage was.
                    LeaseError::NotFound { .. } => Ok(Tried::TooLate),
                    LeaseError::Store(error) if error.is_retryable() => {
                        tracing::warn!(%run, %node, %error, "a claim came too late to be trusted");
                        Ok(Tried::TooLate)
                    }
                    error => Err(error.into()),
                };
            }
        };
        if given_up {
            tracing::warn!(%run, %node, attempt = seen.attempt, "a node has failed: the worker of its last attempt vanished");
            drop(lease);
            return Ok(Tried::GaveUp);
        }
        // What is known of it here may be of a later time: its guard says what the commit made of it.
        let version = committed.runs.first().map_or(seen.version, |run| run.after);
        let state = Arc::new(updated(&seen, &update, at, version));
        if taking == Taking::TakeOver {
            tracing::info!(%run, %node, attempt = state.attempt, "a node was taken over: its worker vanished");
        }
        Ok(Tried::Claimed(Claim::new(self.clone(), run, node, state, lease, committed.into())))
    }
}

/// Nobody knows whether a claim was committed, and its asker was told so. As soon as it is known, what was committed is taken back: an attempt that nobody
/// made does not count. Until then nobody else of this process gets the node.
async fn retract(engine: Weak<Engine>, run: RunId, node: NodeId, begun: Option<NodeState>, place: Place) {
    while let Some(engine) = engine.upgrade().filter(|engine| !engine.is_closed()) {
        let Err(error) = engine.context.persist.barrier(&run).await else { break };
        if matches!(error.kind(), StoreErrorKind::Closed | StoreErrorKind::Poisoned) {
            break;
        }
        drop(engine);
        tokio::time::sleep(RETRACT_PAUSE).await;
    }
    let engine = engine.upgrade();
    let _closing_waits = engine.as_ref().map(WaitedFor::new);
    if let (Some(begun), Some(engine)) = (begun, &engine)
        && let Ok(Some(now)) = engine.fresh(&run).await
        && let Some(found) = now.node(node.as_str())
        && (&found.status, &found.worker, found.attempt, found.started_at)
            == (&begun.status, &begun.worker, begun.attempt, begun.started_at)
    {
        engine.unclaim(&run, &node, found.version).await;
    }
    place.orphaned().await;
}

impl Engine {
    /// Gives a node back whose lease is gone already, unless somebody else was faster.
    async fn unclaim(&self, run: &RunId, node: &NodeId, claimed: Version) {
        let op = Op {
            mutations: vec![node_change(node.clone(), NodeUpdate::pending().unbegun())],
            guards: vec![Guard::NodeVersion { node: node.clone(), version: claimed }],
            unheard: true,
            ..Op::default()
        };
        if let Err(error) = self.commit_one(run.clone(), op, false).await {
            tracing::debug!(%run, %node, %error, "a claim that came too late was not given back");
        }
    }
}

/// Something that closing waits for: a claim that is not held yet, or that is being given back.
#[derive(Debug)]
pub(super) struct WaitedFor(Arc<Engine>);

impl WaitedFor {
    pub(super) fn new(engine: &Arc<Engine>) -> Self {
        engine.claiming.send_modify(|count| *count += 1);
        Self(Arc::clone(engine))
    }
}

impl Drop for WaitedFor {
    fn drop(&mut self) {
        self.0.claiming.send_modify(|count| *count = count.saturating_sub(1));
    }
}

fn vanished(node: &NodeState) -> String {
    let worker = node.worker.as_deref().unwrap_or("?");
    format!("worker {worker:?} vanished on attempt {} of {}", node.attempt, node.max_attempts.unwrap_or(node.attempt))
}

impl Engine {
    /// Brings a resident run up to what is stored, if others wrote to it; says whether it was behind.
    pub(super) async fn follow_up(&self, run: &RunId) -> Result<bool, Error> {
        if !self.backend.is_shared() {
            return Ok(false);
        }
        let stored = self.backend.run_version(run).await?;
        let Some(handle) = self.directory.get(run.as_str()) else { return Ok(false) };
        let known = handle.cell().durable_version();
        // What this process has on its way may be stored before it is published here.
        if known >= stored {
            return Ok(false);
        }
        handle.reload();
        handle.settle().await;
        Ok(true)
    }
}
