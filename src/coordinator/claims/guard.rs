//! The guard that a worker keeps while it works on a node.

use std::fmt;
use std::sync::Arc;

use tracing::Instrument;

use super::end::{End, Held, Telling};
use super::take::WaitedFor;
use crate::coordinator::{Commit, Coordinator, Engine};
use crate::error::Error;
use crate::lease::{Lease, LostReason};
use crate::model::{Fence, FencingToken, InputError, NodeId, NodeState, NodeStatus, NodeUpdate, RunId};

/// A node that this worker, and nobody else, works on. Its lease is renewed by itself, on a thread that a blocked runtime cannot starve.
///
/// It ends by [`complete`](Self::complete), [`fail`](Self::fail), [`retry`](Self::retry) or [`release`](Self::release): each is one commit, which writes the
/// node and gives the lease back, and which is refused if the lease is lost or the node does not run any more. So a finished state is
/// never undone by who comes late.
///
/// An end that makes no sense, or that storage does not take, leaves the claim with its caller, who may tell another one or the same once more. So does one
/// that is refused because another lease is lost which it was [claimed under](Coordinator::with_lease): no end is told then, and the node can be given back. A call of
/// an end that is dropped in the middle happens as a whole or not: if it did, the claim is lost, which it learns when it is known.
///
/// Dropped, it is given back in the background: the node is pending again **on the same attempt**, as by `release`; only an attempt that told its end, or
/// whose worker vanished, counts. [Closing](Coordinator::close) the coordinator gives back what is held in the same way, and from then on every end is answered by
/// [`Error::Closed`]. If the process dies instead, the lease ends, and whoever looks next takes the node over on its next attempt.
#[must_use = "a claim that is dropped is given back"]
pub struct Claim {
    // Before the handle: closing waits until it is given back.
    granted: Granted,
    coordinator: Coordinator,
}

/// What a claim is made of, also while it is on its way to who asked for it. Dropped, it is given back.
pub(super) struct Granted {
    engine: Arc<Engine>,
    state: Arc<NodeState>,
    held: Arc<Held>,
    commit: Commit,
}

impl Granted {
    pub(super) fn new(
        engine: &Arc<Engine>,
        run: RunId,
        node: NodeId,
        state: Arc<NodeState>,
        lease: Lease,
        commit: Commit,
    ) -> Self {
        let held = Held::new(run, node, lease);
        engine.held.add(&held);
        Self { engine: Arc::clone(engine), state, held, commit }
    }
}

impl Claim {
    pub(super) fn new(coordinator: Coordinator, granted: Granted) -> Self {
        Self { granted, coordinator }
    }

    /// The run.
    pub fn run_id(&self) -> &RunId {
        &self.granted.held.run
    }

    /// The node.
    pub fn node_id(&self) -> &NodeId {
        &self.granted.held.node
    }

    /// Which attempt this is; the first one is 1.
    pub fn attempt(&self) -> u32 {
        self.granted.state.attempt
    }

    /// The node as it was when it was claimed.
    pub fn node_state(&self) -> &NodeState {
        &self.granted.state
    }

    /// The fencing token of its lease: higher than that of every earlier claim of the same node.
    pub fn token(&self) -> FencingToken {
        self.granted.held.lease.token()
    }

    /// The commit that made it: its place in the order of the store, the run's versions.
    pub fn commit(&self) -> &Commit {
        &self.granted.commit
    }

    /// Its lease: what remains of it, whether it is lost.
    pub fn lease(&self) -> Option<&Lease> {
        self.granted.held.lease()
    }

    /// Whether it is lost, or has ended: somebody else may work on the node, and nothing more can be told.
    pub fn is_lost(&self) -> bool {
        self.lease().is_none_or(Lease::is_lost)
    }

    /// Waits until the claim itself is lost, and says why: the time to stop working. Once it has ended, by whichever task, it waits no longer, and the reason is
    /// [`LostReason::Ended`]; [`LostReason::Closed`] if closing the coordinator gave it back.
    ///
    /// # Cancel safety
    /// Safe: dropping the future changes nothing.
    pub async fn lost(&self) -> LostReason {
        let mut ended = self.granted.held.ended.subscribe();
        tokio::select! {
            biased;
            ended = ended.wait_for(Option::is_some) => ended.ok().and_then(|ended| *ended).unwrap_or(LostReason::Ended),
            reason = self.granted.held.lease.lost() => reason,
        }
    }

    /// A coordinator whose writes are refused once this claim is lost: for what is noted while the work goes on.
    pub fn fenced(&self) -> Coordinator {
        self.coordinator.with_lease(&self.granted.held.lease)
    }

    /// Tells that the work is done: `success` unless the update names another end (`cached`, `skipped`, `failed`). That deferred writes on the run were lost
    /// stops no end: it stays to be told by `flush` and the next other write.
    ///
    /// # Errors
    /// [`Error::Closed`] once the coordinator is closed. [`Error::LeaseLost`] if the claim is lost or has ended, [`Error::Conflict`] if the node does not run any more: nothing was written, and somebody else may
    /// have taken it over. [`Error::LeaseLost`] also if [another lease](Coordinator::with_lease) is lost that it was claimed under: nothing was written, and this claim is still held
    /// ([`is_lost`](Self::is_lost) tells the two apart), to be given back by `release` or its drop. [`Error::Input`] for an update that does not end the node, names another attempt, or is larger than a transaction may be, [`Error::Store`] if storage was busy or full at
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
    /// stays with the caller, and is lost if it did. Dropping the claim right after does not undo it: only what storage did not take is given back.
    pub async fn complete(&self, update: NodeUpdate) -> Result<Commit, Error> {
        let update = match update.target() {
            None => update.and_status(NodeStatus::Success),
            Some(status) if status.is_ended() => update,
            Some(status) => {
                let what = format!("end of node {:?}", self.granted.held.node);
                let why =
                    format!("{status} is no end; name success, failed, skipped or cached, or give the claim back with release()");
                return Err(InputError::new(what, why).into());
            }
        };
        if update.attempt.is_some_and(|attempt| attempt != self.granted.state.attempt) {
            let what = format!("end of node {:?}", self.granted.held.node);
            let why = format!(
                "it names another attempt than the claim's, {}; leave it out, or begin the next one with retry()",
                self.granted.state.attempt
            );
            return Err(InputError::new(what, why).into());
        }
        let token = self.token();
        self.tell(vec![update.token(token)], self.coordinator.fences.clone()).await
    }

    /// Tells that the work failed, for good: the node is failed, whatever its `max_attempts`. See [`retry`](Self::retry).
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    ///
    /// # Cancel safety
    /// As [`complete`](Self::complete).
    pub async fn fail(&self, error: impl AsRef<str>) -> Result<Commit, Error> {
        let token = self.token();
        self.tell(vec![NodeUpdate::failed(error).token(token)], self.coordinator.fences.clone()).await
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
        let token = self.token();
        let mut told = vec![NodeUpdate::failed(error).token(token)];
        if self.granted.state.max_attempts.is_none_or(|most| self.granted.state.attempt < most) {
            told.push(NodeUpdate::pending().attempt(self.granted.state.attempt.saturating_add(1)));
        }
        self.tell(told, self.coordinator.fences.clone()).await
    }

    /// Gives the node back: it is pending again, on the same attempt. Also where [another lease](Coordinator::with_lease) is lost that it was claimed under: what
    /// is given back is not written in its name.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    ///
    /// # Cancel safety
    /// The node is given back, whether or not the future is dropped.
    pub async fn release(self) -> Result<Commit, Error> {
        self.tell(vec![NodeUpdate::pending().unbegun()], None).await
    }

    /// Tells an end, which is refused unless these leases are held too, in a task of its own: whoever waits for it or not, the claim learns what it became.
    async fn tell(&self, updates: Vec<NodeUpdate>, fences: Option<Arc<[Fence]>>) -> Result<Commit, Error> {
        let engine = self.coordinator.engine();
        // Counted before it is asked whether all closes: closing gives back what was not told before.
        let waited_for = WaitedFor::new(engine);
        if engine.is_closed() {
            return Err(Error::Closed);
        }
        let caller = Arc::new(());
        let end = End {
            engine: Arc::clone(engine),
            fences,
            held: Arc::clone(&self.granted.held),
            as_what: LostReason::Ended,
            caller: Arc::downgrade(&caller),
        };
        let telling = Telling::new(&self.granted.held);
        let task = async move {
            let _until_it_is_told = (waited_for, telling);
            end.tell(&updates).await
        };
        let told = engine.apart(task.in_current_span()).await;
        drop(caller);
        told.unwrap_or_else(|cut| Err(if cut.begun { Error::Unknown(self.granted.held.run.clone()) } else { Error::Closed }))
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        let engine = &self.engine;
        // Counted before it is taken out: closing gives it back, or waits until it is.
        let waited_for = WaitedFor::new(engine);
        engine.held.remove(&self.held);
        if self.held.lease().is_none_or(Lease::is_lost) {
            return;
        }
        let giving_back = End::give_back(Arc::clone(engine), Arc::clone(&self.held));
        // On a runtime that has ended the task is dropped at once; then the lease ends by itself, and the node is taken over.
        drop(engine.runtime.spawn(async move {
            let _until_it_is_given_back = waited_for;
            giving_back.await;
        }));
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("run", &self.granted.held.run)
            .field("node", &self.granted.held.node)
            .field("attempt", &self.granted.state.attempt)
            .field("token", &self.token())
            .finish_non_exhaustive()
    }
}
