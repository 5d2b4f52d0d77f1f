//! Claims: work that many workers, also of many processes, take from one run, and that survives whoever took it.
//!
//! A claim is a node that runs and its lease, which came to be in one commit; it ends in one commit too, fenced by the lease's token. What its
//! worker leaves behind is found by whoever looks next: a node that runs under a claim whose lease is gone.

mod board;
mod end;
mod filter;
mod guard;
mod look;
mod take;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

pub(super) use self::board::Boards;
pub(super) use self::end::HeldClaims;
pub use self::filter::ClaimFilter;
pub use self::guard::Claim;

use self::take::{Tried, Want, terms};
use super::step_back::step_back;
use super::write::ids;
use super::{Coordinator, Engine};
use crate::error::Error;
use crate::model::{
    InputError, IntoNodeId, IntoRunId, LeaseKey, LeaseRecord, NodeId, NodeStatus, Refusal, RunId, Taking, Version,
};

/// How often `claim_node` looks again when it meets others.
const TRIES: u32 = 8;
/// How many nodes that others have `claim_next` tries when its wait is over: where many are ready, going through all of them would take as long as it
/// takes until they are tried anew.
const LATE_TRIES: u32 = 32;

/// What there was to do.
#[derive(Debug)]
#[must_use = "a claim that is dropped is given back"]
#[non_exhaustive]
pub enum Next {
    /// A node, for nobody else.
    Claimed(Claim),
    /// Nothing is ready yet; others are working.
    NothingReady,
    /// Somebody holds the lock on the whole run, or moves the whole state elsewhere, and as long as that is so nobody gets any of its nodes.
    Locked {
        /// The lock, as it was seen last.
        holder: Box<LeaseRecord>,
    },
    /// There is no more work: nothing is ready and nothing runs, so that nothing will be ready; or the run has ended, whatever its nodes are. A run without
    /// nodes is drained too: whoever is to work on it asks when its nodes are written. Who asks for [some of the nodes](ClaimFilter) only is also told so when none
    /// of them is pending or runs, whatever others still do.
    Drained {
        /// How many of the nodes that were asked for are pending all the same. In a run that is open what they depend on has failed, is not there, or waits for
        /// them.
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

impl Coordinator {
    /// Claims a node: moves it from pending to running and grants its lease, in one commit. `None` if somebody else has it, it is not pending, somebody holds or
    /// awaits the lock on it or on the whole run ([`list_locks`](Self::list_locks) says who), or storage took longer to grant the lease than it lasts
    /// (ask for a longer TTL).
    /// A node whose worker vanished (it runs under a claim whose lease is gone) is taken over: its dead attempt joins the history, and
    /// `attempt` is raised; if that was the last of its `max_attempts`, it fails instead. A run that is pending stays so.
    ///
    /// Who names a node gets it: also one that [depends on](crate::NodeUpdate::depends_on) others that are not done. [`claim_next`](Self::claim_next) goes by that.
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
    /// [`Error::RunNotFound`], [`Error::NodeNotFound`]; [`Error::Conflict`] if the run has ended; [`Error::Input`] for an owner or a TTL that makes no sense
    /// (100 ms to 1 h), and through a handle that is itself [under the lock](Self::with_lease) on the whole run: that lock keeps out all claims, also one's own;
    /// [`Error::LeaseLost`] if another lease is lost that the handle is under; [`Error::Store`].
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
        terms(&owner, ttl).map(drop)?;
        let engine = self.engine();
        self.refuse_own_lock(&run).await?;
        for attempt in 0..TRIES {
            if attempt > 0 {
                engine.follow_up(&run, None).await?;
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
                        self.refuse_lost().await?;
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
                Tried::TooLate(back) => {
                    let _storage_is_slow = back.ended_in_time().await;
                    return Ok(None);
                }
                Tried::RunEnded(back) => {
                    if !back.ended_in_time().await {
                        return Ok(None);
                    }
                }
                Tried::GaveUp => return Ok(None),
                Tried::Locked(_) => break,
                Tried::Taken => {}
            }
        }
        self.refuse_lost().await?;
        Ok(None)
    }

    /// Hands one ready node of a run to the caller, and to nobody else: pending, and all that it [depends on](crate::NodeUpdate::depends_on) done, also when the
    /// claim commits. Nodes whose worker vanished are taken over as by [`claim_node`](Self::claim_node). The order is not fixed, and differs
    /// between processes.
    ///
    /// A claim is a lease on a node, and so is kept out by the lock on the whole run: while somebody holds that, the answer is [`Next::Locked`]. Who awaits it
    /// gets it when the claims that are held have ended, and until then nobody in his process gets a new one; between processes whoever asks first when it is
    /// free does.
    ///
    /// What others hold is known as of the last look, which is at most a second old: who comes in between may be told [`Next::NothingReady`] for either, and
    /// [`Next::Locked`] for up to a second after the lock is free.
    ///
    /// A [filter](ClaimFilter) may ask for some of the nodes only. What they depend on counts whoever works on that. Processes share work by the nodes' names,
    /// whatever they ask for: one for which another process comes first is left to it for four times what a claim takes here lately, 10 ms at least and half a second at
    /// most; where several come first, up to three times as long. Who waits is woken when that is over.
    ///
    /// [`Next::Drained`] ends a worker's loop: also where the run has ended, by whomever, whatever waits or runs in it then. It comes at once, whatever the wait: who adds nodes
    /// to a run later starts its workers after that. So create a run and its nodes in one transaction.
    ///
    /// A run that is pending is worked on as one that runs, and stays pending: its status is its orchestrator's.
    ///
    /// Without [`ClaimFilter::wait`], or when it is over, it answers at once, after at most 32 tries of nodes that turn out to be others': there may be more that
    /// are ready then. Who asks in a loop sets a wait, or pauses by itself.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use std::time::Duration;
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// use seeknal_state::{ClaimFilter, Next};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    ///
    /// let mut tx = state.transaction(); // a worker that asks between the two would find a run without work, and stop
    /// tx.create_run("run_1", NewRun::running());
    /// tx.set_node_state("run_1", "orders", NodeUpdate::pending());
    /// tx.set_node_state("run_1", "report", NodeUpdate::pending().depends_on(["orders"]).max_attempts(3));
    /// tx.commit().await?;
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
    ///         _ => {} // others are working, and `wait` is over: ask again
    ///     }
    /// }
    /// assert_eq!(done, ["orders", "report"]);
    /// # state.close().await }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`claim_node`](Self::claim_node). That others were faster is none, and neither is a run that has ended.
    ///
    /// # Panics
    /// While it waits, outside of a tokio runtime with timers enabled.
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
        terms(&owner, ttl).map(drop)?;
        self.refuse_own_lock(&run).await?;
        let until = Instant::now().checked_add(filter.wait);
        let is_late = || until.is_some_and(|until| until <= Instant::now());
        let mut late_tries = 0;
        let mut since: Option<Version> = None;
        loop {
            if engine.is_closed() {
                return Err(Error::Closed);
            }
            let taken_back = || engine.directory.get(run.as_str()).map_or(0, |handle| handle.cell().taken_back());
            let before = taken_back();
            let snapshot = engine.snapshot(&run).await?.ok_or_else(|| Error::RunNotFound(run.clone()))?;
            let board = engine.directory.boards.of(&snapshot, &filter.wish, &engine.process, &engine.runtime);
            // What was published before the board was there was told to nobody.
            let resident = engine.directory.get(run.as_str()).and_then(|handle| handle.cell().snapshot());
            let snapshot = resident.filter(|now| now.version() > snapshot.version()).unwrap_or(snapshot);
            board.catch_up(&snapshot);
            // A board goes by versions. That of a deferred write which was taken back meanwhile would hide who takes its number.
            if snapshot.version() != snapshot.durable_version() && taken_back() != before {
                engine.directory.boards.forget(&run);
                continue;
            }
            if snapshot.header().status.is_ended() {
                // Others may have opened it again. What is known of now is new enough as below.
                let seen = snapshot.durable_version();
                if since.is_none_or(|since| seen < since)
                    && let Followed::More(stored) = engine.follow_up(&run, Some(seen)).await?
                {
                    since = since.or(stored);
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
            if late_tries < LATE_TRIES
                && let Some(mut picked) = board.pick()
            {
                // What is told meanwhile is for those who wait: not for him who is busy with a claim.
                news.set(board.news());
                let want = Self::want(&snapshot, &picked, &owner, ttl, &filter.wish.done);
                let began = Instant::now();
                let tried = self.try_claim(want).await?;
                let has_run_ended = matches!(tried, Tried::RunEnded(_));
                picked.took(began.elapsed());
                match tried {
                    Tried::Claimed(claim) => return Ok(Next::Claimed(claim)),
                    Tried::Taken => {
                        picked.note_refusal();
                        late_tries += u32::from(is_late());
                    }
                    Tried::Locked(holder) => picked.kept_out(holder),
                    Tried::TooLate(back) | Tried::RunEnded(back) => {
                        // Nobody here gets it before it is given back: it would look as if its worker had vanished.
                        engine.runtime.spawn(async move {
                            back.ended().await;
                            drop(picked);
                        });
                        // Where storage is that slow the wait must end all the same. That the run has ended is seen at once.
                        if has_run_ended {
                            late_tries += u32::from(is_late());
                        } else if is_late() {
                            return Ok(Next::NothingReady);
                        }
                    }
                    Tried::GaveUp => {}
                }
                continue;
            }
            if let Some((blocked, at)) = board.drained() {
                // What it was judged by: the snapshot, or a commit that came to the board since, which counts once it is stored.
                let stored = || engine.directory.get(run.as_str()).and_then(|handle| handle.cell().durable_version());
                let newer = at > snapshot.version() && stored().is_some_and(|stored| at <= stored);
                let seen = if newer { at } else { snapshot.durable_version() };
                // What was stored at some moment since he asked is new enough: where others write without a pause there is always something newer.
                if since.is_none_or(|since| seen < since)
                    && let Followed::More(stored) = engine.follow_up(&run, Some(seen)).await?
                {
                    since = since.or(stored);
                    continue;
                }
                // A deferred write of somebody else may have been on the board, and others have its number now.
                if taken_back() != before {
                    engine.directory.boards.forget(&run);
                    continue;
                }
                return Ok(Next::Drained { blocked });
            }
            let locked = board.locked();
            if locked.is_some() {
                // Nothing is tried that would tell.
                self.refuse_lost().await?;
            }
            if is_late() {
                // Who asks again at once leaves those room who do the work, on whose end it depends.
                step_back().await;
                return Ok(locked.map_or(Next::NothingReady, |holder| Next::Locked { holder }));
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
    /// for work do so by themselves; this is for a process that only looks on. Answers with the nodes that it freed; of a run that has ended none is,
    /// and of one that ends meanwhile, or is locked as a whole, those that were freed before.
    ///
    /// # Errors
    /// [`Error::RunNotFound`], [`Error::Store`].
    ///
    /// # Cancel safety
    /// Dropped at any instant, some nodes are freed and others are not.
    pub async fn free_dead_claims(&self, run: impl IntoRunId) -> Result<Vec<NodeId>, Error> {
        let run = run.into_run_id()?;
        let engine = self.engine();
        engine.follow_up(&run, None).await?;
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
                ttl: engine.limits.lease_ttl,
                hasty: false,
            };
            let tried = match self.try_claim(want).await {
                // The run has ended meanwhile: nothing more of it is freed.
                Err(Error::Conflict(_)) => break,
                tried => tried?,
            };
            match tried {
                Tried::Claimed(claim) => match claim.release().await {
                    Ok(_) => freed.push(node.clone()),
                    // So it is if the run ended between the two.
                    Err(Error::LeaseLost(_) | Error::Conflict(_)) => {}
                    Err(error) => return Err(error),
                },
                Tried::GaveUp => freed.push(node.clone()),
                Tried::TooLate(back) | Tried::RunEnded(back) => {
                    let _or_storage_is_slow = back.ended_in_time().await;
                }
                Tried::Taken => {}
                Tried::Locked(_) => break,
            }
        }
        Ok(freed)
    }

    /// Whoever writes under the lock on the whole run has kept out his own claims too, and would wait for himself for ever.
    async fn refuse_own_lock(&self, run: &RunId) -> Result<(), Error> {
        let Some(own) = self.fences.iter().flat_map(|fences| fences.iter()).find(|fence| fence.key == LeaseKey::run(run.clone()))
        else {
            return Ok(());
        };
        if !self.engine().leases.list().await?.iter().any(|lease| lease.token == own.token) {
            // It is lost, which is told by what is tried.
            return Ok(());
        }
        let why = "it is asked for under the lock on the whole run, which keeps out all claims; release that lock, or work under it without claims";
        Err(InputError::new(format!("claim in run {run:?}"), why).into())
    }

    /// Whoever works under a lease that is lost is told so also where others keep it out, who may be why it is lost.
    async fn refuse_lost(&self) -> Result<(), Error> {
        let Some(fences) = &self.fences else { return Ok(()) };
        let held = self.engine().leases.list().await?;
        match fences.iter().find(|fence| !held.iter().any(|lease| lease.token == fence.token)) {
            Some(lost) => Err(Error::LeaseLost(Refusal::Fenced { fence: lost.clone() })),
            None => Ok(()),
        }
    }

    fn default_owner(&self) -> Arc<str> {
        let me = &self.engine().process;
        Arc::from(format!("{}:{}", me.host, me.pid))
    }
}

/// What is stored of a run, for who has seen it at some version.
pub(super) enum Followed {
    /// That, or less: no more than what he has seen.
    Seen,
    /// More: the run at this version, or no such run.
    More(Option<Version>),
}

impl Engine {
    /// Brings a resident run up to what is stored, if others wrote to it; says whether more is stored than what the caller has seen: the run at this version, or
    /// no such run.
    pub(super) async fn follow_up(&self, run: &RunId, seen: Option<Version>) -> Result<Followed, Error> {
        if !self.backend.is_shared() {
            return Ok(Followed::Seen);
        }
        let stored = self.backend.run_version(run).await?;
        // No number is used twice: what is gone, and what was made anew, is not what was seen.
        let is_behind = |known: Option<Version>| match (known, stored) {
            (Some(known), Some(stored)) => known < stored,
            (known, stored) => known.is_some() != stored.is_some(),
        };
        if let Some(handle) = self.directory.get(run.as_str())
            && is_behind(handle.cell().durable_version())
        {
            // What this process has on its way may be stored before it is published here.
            handle.follow(stored);
            handle.settle().await;
        }
        // Not what is known now: somebody else may have brought that up to date meanwhile.
        Ok(if is_behind(seen) { Followed::More(stored) } else { Followed::Seen })
    }
}
