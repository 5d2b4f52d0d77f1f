//! The guard that a worker keeps while it works on a node.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument;

use crate::coordinator::write::node_change;
use crate::coordinator::{Commit, Coordinator};
use crate::error::Error;
use crate::lease::{Lease, LostReason};
use crate::model::{
    Fence, FencingToken, Guard, InputError, LeaseKey, NodeId, NodeState, NodeStatus, NodeUpdate, Refusal, RunId, RunStatus,
};
use crate::run::Op;

/// How often an end is told while storage is busy or full, and how long between.
const TELL_TRIES: u32 = 10;
const TELL_PAUSE: Duration = Duration::from_millis(200);
/// For how long: storage that takes seconds to say that it is busy would hold its caller, and closing, for as many times.
const TELL_TIME: Duration = Duration::from_secs(3);

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

/// A node that this worker, and nobody else, works on. Its lease is renewed by itself, on a thread that a blocked runtime cannot starve.
///
/// It ends by [`complete`](Self::complete), [`fail`](Self::fail), [`retry`](Self::retry) or [`release`](Self::release): each is one commit, which writes the
/// node and gives the lease back, and which is refused if the lease is lost or the node does not run any more. So a finished state is
/// never undone by who comes late.
///
/// An end that makes no sense, or that storage does not take, leaves the claim with its caller, who may tell another one or the same once more. A call of
/// an end that is dropped in the middle happens as a whole or not: if it did, the claim is lost, which it learns when it is known.
///
/// Dropped, it is given back in the background: the node is pending again **on the same attempt**, as by `release`; only an attempt that told its end, or
/// whose worker vanished, counts. If the process dies instead, the lease ends, and whoever looks next takes the node over on its next attempt.
#[must_use = "a claim that is dropped is given back"]
pub struct Claim {
    run: RunId,
    node: NodeId,
    state: Arc<NodeState>,
    coordinator: Coordinator,
    held: Arc<Held>,
    token: FencingToken,
    commit: Commit,
}

/// What an end that is on its way has in common with the claim, whose caller may be gone.
struct Held {
    lease: Lease,
    /// An end was told, or can be told no more. Who waits for the loss of the claim waits for this too.
    ended: watch::Sender<bool>,
}

impl Held {
    fn is_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// What holds the node, unless that is over.
    fn lease(&self) -> Option<&Lease> {
        Some(&self.lease).filter(|_| !self.is_ended())
    }

    /// The end is in storage, and gave the lease back.
    fn landed(&self) {
        self.ended.send_replace(true);
        self.lease.returned();
    }

    fn forsake(&self) {
        self.ended.send_replace(true);
        self.lease.let_go();
    }
}

impl Claim {
    pub(super) fn new(
        coordinator: Coordinator,
        run: RunId,
        node: NodeId,
        state: Arc<NodeState>,
        lease: Lease,
        commit: Commit,
    ) -> Self {
        let token = lease.token();
        Self { run, node, state, coordinator, held: Arc::new(Held { lease, ended: watch::Sender::new(false) }), token, commit }
    }

    /// The run.
    pub fn run_id(&self) -> &RunId {
        &self.run
    }

    /// The node.
    pub fn node_id(&self) -> &NodeId {
        &self.node
    }

    /// Which attempt this is; the first one is 1.
    pub fn attempt(&self) -> u32 {
        self.state.attempt
    }

    /// The node as it was when it was claimed.
    pub fn node_state(&self) -> &NodeState {
        &self.state
    }

    /// The fencing token of its lease: higher than that of every earlier claim of the same node.
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// The commit that made it: its place in the order of the store, the run's versions.
    pub fn commit(&self) -> &Commit {
        &self.commit
    }

    /// Its lease: what remains of it, whether it is lost.
    pub fn lease(&self) -> Option<&Lease> {
        self.held.lease()
    }

    /// Whether it is lost, or has ended: somebody else may work on the node, and nothing more can be told.
    pub fn is_lost(&self) -> bool {
        self.lease().is_none_or(Lease::is_lost)
    }

    /// Waits until the claim is lost, and says why: the time to stop working. Once it has ended, by whichever task, it waits no longer, and the reason is
    /// [`LostReason::Closed`].
    ///
    /// # Cancel safety
    /// Safe: dropping the future changes nothing.
    pub async fn lost(&self) -> LostReason {
        let mut ended = self.held.ended.subscribe();
        tokio::select! {
            biased;
            _ = ended.wait_for(|ended| *ended) => LostReason::Closed,
            reason = self.held.lease.lost() => reason,
        }
    }

    /// A coordinator whose writes are refused once this claim is lost: for what is noted while the work goes on.
    pub fn fenced(&self) -> Coordinator {
        self.coordinator.with_lease(&self.held.lease)
    }

    /// Tells that the work is done: `success` unless the update names another end (`cached`, `skipped`, `failed`). That deferred writes on the run were lost
    /// stops no end: it stays to be told by `flush` and the next other write.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] if the claim is lost or has ended, [`Error::Conflict`] if the node does not run any more: nothing was written, and somebody else may
    /// have taken it over. [`Error::Input`] for an update that does not end the node or is larger than a transaction may be, [`Error::Store`] if storage was busy or full at
    /// ten tries in a row, or once more three seconds after the first, or failed otherwise: nothing was written, and the claim is still held, so that its end can
    /// be told again (otherwise, or mended). Each try takes as long as storage needs to refuse it. [`Error::Store`] at once if nobody knows whether it was written ([`Error::is_unknown_outcome`]): read the node then.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use std::time::Duration;
    /// # use seeknal_state::{BackendOptions, Coordinator, Error, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// # state.set_node_state("run_1", "orders", NodeUpdate::pending()).await?;
    /// let claim = state.claim_node("run_1", "orders", "worker-1", Duration::from_secs(30)).await?.unwrap();
    /// let notes = "x".repeat(20 << 20);
    /// if claim.complete(NodeUpdate::success().metadata("notes", notes)).await.is_err_and(|error| matches!(error, Error::Input(_))) {
    ///     claim.complete(NodeUpdate::success()).await?; // too large: the work is not lost for that
    /// }
    /// # state.close().await }).unwrap();
    /// ```
    ///
    /// # Cancel safety
    /// Once polled it is told, on the runtime of the coordinator, though not again if storage did not take it. It happens as a whole or not; the claim
    /// stays with the caller, and is lost if it did.
    pub async fn complete(&self, update: NodeUpdate) -> Result<Commit, Error> {
        let update = match update.target() {
            None => update.and_status(NodeStatus::Success),
            Some(status) if status.is_ended() => update,
            Some(status) => {
                let what = format!("end of node {:?}", self.node);
                let why =
                    format!("{status} is no end; name success, failed, skipped or cached, or give the claim back with release()");
                return Err(InputError::new(what, why).into());
            }
        };
        let token = self.token;
        self.tell(vec![update.token(token)]).await
    }

    /// Tells that the work failed, for good: the node is failed, whatever its `max_attempts`. See [`retry`](Self::retry).
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    ///
    /// # Cancel safety
    /// As [`complete`](Self::complete).
    pub async fn fail(&self, error: impl AsRef<str>) -> Result<Commit, Error> {
        let token = self.token;
        self.tell(vec![NodeUpdate::failed(error).token(token)]).await
    }

    /// Tells that this attempt failed: the node is pending again on its next attempt, with this one in its history; or failed, if it was the last of
    /// its `max_attempts`.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    ///
    /// # Cancel safety
    /// As [`complete`](Self::complete).
    pub async fn retry(&self, error: impl AsRef<str>) -> Result<Commit, Error> {
        let token = self.token;
        let mut told = vec![NodeUpdate::failed(error).token(token)];
        if self.state.max_attempts.is_none_or(|most| self.state.attempt < most) {
            told.push(NodeUpdate::pending().attempt(self.state.attempt.saturating_add(1)));
        }
        self.tell(told).await
    }

    /// Gives the node back: it is pending again, on the same attempt.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    ///
    /// # Cancel safety
    /// The node is given back, whether or not the future is dropped.
    pub async fn release(self) -> Result<Commit, Error> {
        self.tell(vec![NodeUpdate::pending().unbegun()]).await
    }

    /// Tells an end in a task of its own: whoever waits for it or not, the claim learns what it became.
    async fn tell(&self, updates: Vec<NodeUpdate>) -> Result<Commit, Error> {
        if self.is_lost() {
            return Err(Error::LeaseLost(gone(&self.run, &self.node, self.token)));
        }
        // Gone with the caller: nobody is left who wants more than one try.
        let caller = Arc::new(());
        let end = End {
            run: self.run.clone(),
            node: self.node.clone(),
            coordinator: self.coordinator.clone(),
            fences: self.coordinator.fences.clone(),
            held: Arc::clone(&self.held),
            caller: Arc::downgrade(&caller),
        };
        let told = self.coordinator.engine().apart(async move { end.tell(&updates).await }.in_current_span()).await;
        drop(caller);
        told.unwrap_or_else(|cut| Err(if cut.begun { Error::Unknown(self.run.clone()) } else { Error::Closed }))
    }
}

/// An end that is being told.
struct End {
    run: RunId,
    node: NodeId,
    coordinator: Coordinator,
    /// What must hold besides its own lease.
    fences: Option<Arc<[Fence]>>,
    held: Arc<Held>,
    caller: Weak<()>,
}

impl End {
    async fn tell(&self, updates: &[NodeUpdate]) -> Result<Commit, Error> {
        let engine = self.coordinator.engine();
        let token = self.held.lease.token();
        let mut tries = Tries::default();
        loop {
            // Once lost it stays lost: what storage would say is known.
            let Some(lease) = self.held.lease().filter(|lease| !lease.is_lost()) else {
                return Err(Error::LeaseLost(gone(&self.run, &self.node, token)));
            };
            let mut fences = vec![lease.fence()];
            fences.extend(self.fences.iter().flat_map(|fences| fences.iter().cloned()));
            let op = Op {
                mutations: updates.iter().map(|update| node_change(self.node.clone(), update.clone())).collect(),
                guards: running(&self.coordinator, &self.run, &self.node),
                fences,
                leases: lease.returning(engine.leases.keeps_rows()).into_iter().collect(),
                // Lost writes of others are no reason to do this work again.
                unheard: true,
                ..Op::default()
            };
            let error = match engine.commit_one(self.run.clone(), op, false).await {
                Ok(committed) => {
                    self.held.landed();
                    return Ok(committed.into());
                }
                Err(error) => error,
            };
            lease.kept();
            match &error {
                Error::Store(_) if tries.are_left(&error) && self.caller.strong_count() > 0 && !lease.is_lost() => {
                    tokio::time::sleep(TELL_PAUSE).await;
                }
                Error::Conflict(Refusal::Guard { guard: Guard::RunStatus(_), .. }) => {
                    self.held.forsake();
                    return Err(Error::LeaseLost(gone(&self.run, &self.node, token)));
                }
                // Nothing is left to be given back: it is lost, or has ended otherwise.
                Error::LeaseLost(_) | Error::Conflict(_) => {
                    self.held.forsake();
                    return Err(error);
                }
                _ => return Err(error),
            }
        }
    }
}

fn gone(run: &RunId, node: &NodeId, token: FencingToken) -> Refusal {
    Refusal::LeaseGone { key: LeaseKey::node(run.clone(), node.clone()), token }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_lost() {
            return;
        }
        let runtime = self.coordinator.engine().runtime.clone();
        let caller = Arc::new(());
        let end = End {
            run: self.run.clone(),
            node: self.node.clone(),
            coordinator: self.coordinator.clone(),
            // Whatever else its worker lost: it gives back what it has.
            fences: None,
            held: Arc::clone(&self.held),
            caller: Arc::downgrade(&caller),
        };
        // On a runtime that has ended the task is dropped at once; then the lease ends by itself, and the node is taken over.
        let waited_for = super::WaitedFor::new(self.coordinator.engine());
        drop(runtime.spawn(async move {
            let _until_it_is_given_back = (waited_for, caller);
            // An end may have been told meanwhile, by a call that nobody waited for.
            if let Err(error) = end.tell(&[NodeUpdate::pending().unbegun()]).await {
                tracing::debug!(run = %end.run, node = %end.node, %error, "a dropped claim was not given back");
            }
        }));
    }
}

/// The node runs, and so does its run: where leases live in this process they end a moment after the run has.
fn running(coordinator: &Coordinator, run: &RunId, node: &NodeId) -> Vec<Guard> {
    let mut guards = vec![Guard::NodeStatus { node: node.clone(), one_of: vec![NodeStatus::Running] }];
    if !coordinator.engine().leases.keeps_rows() {
        let status = coordinator.snapshot(run).map(|run| run.header().status.clone()).filter(|status| !status.is_ended());
        guards.push(Guard::RunStatus([RunStatus::Pending, RunStatus::Running].into_iter().chain(status).collect()));
    }
    guards
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("run", &self.run)
            .field("node", &self.node)
            .field("attempt", &self.state.attempt)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}
