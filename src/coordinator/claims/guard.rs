//! The guard that a worker keeps while it works on a node.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;

use super::end::{End, Held, Telling, Told};
use super::take::WaitedFor;
use crate::coordinator::{Commit, Coordinator, Engine, Transaction};
use crate::error::Error;
use crate::lease::{Lease, LostReason, pause_on};
use crate::model::{Fence, FencingToken, InputError, NodeId, NodeState, NodeStatus, NodeUpdate, RunId};

/// Why an attempt has failed whose worker says no more.
const PANICKED: &str = "its worker panicked";
/// How often who waits for the loss of a claim looks what became of its node.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// A node that this worker, and nobody else, works on. Its lease is renewed by itself, on a thread that a blocked runtime cannot starve.
///
/// It ends by [`complete`](Self::complete), [`fail`](Self::fail), [`retry`](Self::retry) or [`release`](Self::release): each is one commit, which writes the
/// node and gives the lease back, and which is refused if the lease is lost or the node does not run any more. What belongs to the end goes into the same commit with
/// [`complete_in`](Self::complete_in). What is noted meanwhile goes through [`fenced`](Self::fenced), and is refused in the same way. So a finished state is
/// never undone by who comes late.
///
/// To cancel a node that is worked on, end it: `set_node_state(run, node, NodeUpdate::failed("cancelled"))`, by whomever, in whichever process. Nothing that its worker
/// writes to it or tells of it is taken any more, [`lost`](Self::lost) tells him to stop, and nobody else is handed the node.
///
/// An end that makes no sense, or that storage does not take, leaves the claim with its caller, who may tell another one or the same once more. So does one
/// that is refused because another lease is lost which it was [claimed under](Coordinator::with_lease): no end is told then, and the node can be given back. A call of
/// an end that is dropped in the middle happens as a whole or not: if it did, the claim is lost, which it learns when it is known.
///
/// Dropped, it is given back in the background: the node is pending again **on the same attempt**, as by `release`; only an attempt that told its end, or
/// whose worker vanished or panicked, counts. [Closing](Coordinator::close) the coordinator gives back what is held in the same way, and from then on every end is answered by
/// [`Error::Closed`]. If the process dies instead, the lease ends, and whoever looks next takes the node over on its next attempt.
///
/// Dropped by a panic (it is on the stack, or in the task, that a panic unwinds), the attempt has failed: as by `retry("its worker panicked")` the node is pending again on
/// its next attempt, or failed if it was the last of its [`max_attempts`](NodeUpdate::max_attempts). Set these: without them a node whose work always panics is tried without end.
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
    /// Whether a panic drops it.
    panics: bool,
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
        Self { engine: Arc::clone(engine), state, held, commit, panics: false }
    }

    /// This attempt has failed: what that makes of the node.
    fn failed(&self, error: &str) -> Vec<NodeUpdate> {
        let attempt = self.state.attempt;
        let mut told = vec![NodeUpdate::failed(error).token(self.held.lease.token())];
        if self.state.max_attempts.is_none_or(|most| attempt < most) {
            told.push(NodeUpdate::pending().attempt(attempt.saturating_add(1)));
        }
        told
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

    /// Whether it is lost, or has ended: somebody else may work on the node, and nothing more can be told. So it is too once somebody else ended the node, as far as this
    /// process has heard of that: see [`lost`](Self::lost).
    pub fn is_lost(&self) -> bool {
        self.lease().is_none_or(Lease::is_lost) || self.is_overruled()
    }

    /// Whether somebody else has ended the node, or deleted it, by what is known here: its run goes on, and it does not run.
    fn is_overruled(&self) -> bool {
        let Granted { engine, held, commit, .. } = &self.granted;
        let Some(now) = engine.directory.get(held.run.as_str()).and_then(|handle| handle.cell().snapshot()) else { return false };
        let runs = |node: &NodeState| node.status == NodeStatus::Running;
        now.version() >= commit.version() && !now.header().status.is_ended() && !now.node(held.node.as_str()).is_some_and(runs)
    }

    /// Waits until the claim itself is lost, and says why: the time to stop working. Once it has ended, by whichever task, it waits no longer, and the reason is
    /// [`LostReason::Ended`]; [`LostReason::Closed`] if closing the coordinator gave it back.
    ///
    /// That somebody else ended the node (or made it wait again, or deleted it) is told as `Ended` too, within a second of when this process hears of it: at once of what goes
    /// through this coordinator, of what other processes commit as far as the run's [snapshots](Coordinator::get_run) follow them, and in any case when a write or an end is refused
    /// for it.
    ///
    /// # Cancel safety
    /// Safe: dropping the future changes nothing.
    pub async fn lost(&self) -> LostReason {
        let mut ended = self.granted.held.ended.subscribe();
        tokio::select! {
            biased;
            ended = ended.wait_for(Option::is_some) => ended.ok().and_then(|ended| *ended).unwrap_or(LostReason::Ended),
            reason = self.granted.held.lease.lost() => reason,
            () = self.overruled() => LostReason::Ended,
        }
    }

    async fn overruled(&self) {
        let engine = &self.granted.engine;
        // Closing gives back what is held, and says so.
        while engine.is_closed() || !self.is_overruled() {
            if !pause_on(&engine.runtime, LOOK_PAUSE).await {
                return std::future::pending().await;
            }
        }
    }

    /// A coordinator whose writes are refused once this claim is lost: for what is noted while the work goes on. What is written to the claimed node is refused as an
    /// end would be: also with [`Error::Conflict`] if the node does not run any more, because somebody ended it; where the lease is lost besides, either is told. That goes for
    /// every way to write under its [lease](Self::lease): in transactions, in [`transact`](Coordinator::transact), with [`Transaction::fenced_by`]. What is written to other nodes asks
    /// for the lease alone.
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
        let update = self.ending(update)?;
        self.tell(vec![update].into(), self.coordinator.fences.clone()).await
    }

    /// As [`complete`](Self::complete), together with all that is in a transaction: in one commit, behind its steps, and only if all its conditions hold. So what the work
    /// completed and that it is done are never there without one another. The transaction may be over several runs, and end the claim's own.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use std::time::Duration;
    /// # use seeknal_state::{BackendOptions, Coordinator, Error, NewRun, NodeStatus, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// # state.set_node_state("run_1", "orders", NodeUpdate::pending()).await?;
    /// let claim = state.claim_node("run_1", "orders", "worker-1", Duration::from_secs(30)).await?.unwrap();
    /// // … loads the first of January …
    /// let mut tx = state.transaction();
    /// tx.add_completed_interval("run_1", "orders", ("2024-01-01", "2024-01-02"));
    /// claim.complete_in(tx, NodeUpdate::success().row_count(1_000)).await?;
    ///
    /// let node = state.get_node_state("run_1", "orders").await?.unwrap();
    /// assert_eq!((node.status, node.intervals.len()), (NodeStatus::Success, 1));
    /// # state.close().await?;
    /// # Ok::<(), Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`complete`](Self::complete), and as [`Transaction::commit`]; nothing was written then, and where it was a condition or a step of the transaction that was refused
    /// (also [`Error::LeaseLost`] for a lease that it is [fenced by](Transaction::fenced_by)) the claim is still held ([`is_lost`](Self::is_lost) tells), so that its end can be told with another
    /// transaction, or without one. [`Error::Input`] for a transaction of another coordinator.
    ///
    /// # Cancel safety
    /// As [`complete`](Self::complete).
    pub async fn complete_in(&self, tx: Transaction, update: NodeUpdate) -> Result<Commit, Error> {
        let update = self.ending(update)?;
        let (of, mut with) = tx.into_work()?;
        if !Arc::ptr_eq(of.engine(), self.coordinator.engine()) {
            let why = "it was begun on another coordinator than the claim is of, and a commit is one storage's";
            return Err(InputError::new("transaction", why).into());
        }
        with.fences.extend(of.fences.iter().flat_map(|fences| fences.iter().cloned()));
        self.tell(Told { updates: vec![update], with }, self.coordinator.fences.clone()).await
    }

    /// The update, if it is an end of what was claimed.
    fn ending(&self, update: NodeUpdate) -> Result<NodeUpdate, InputError> {
        let Granted { held, state, .. } = &self.granted;
        let refused = |why| InputError::new(format!("end of node {:?}", held.node), why);
        let update = match update.target() {
            None => update.and_status(NodeStatus::Success),
            Some(status) if status.is_ended() => update,
            Some(status) => {
                let why =
                    format!("{status} is no end; name success, failed, skipped or cached, or give the claim back with release()");
                return Err(refused(why));
            }
        };
        if update.attempt.is_some_and(|attempt| attempt != state.attempt) {
            let why = format!(
                "it names another attempt than the claim's, {}; leave it out, or begin the next one with retry()",
                state.attempt
            );
            return Err(refused(why));
        }
        Ok(update.token(held.lease.token()))
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
        self.tell(vec![NodeUpdate::failed(error).token(token)].into(), self.coordinator.fences.clone()).await
    }

    /// Tells that this attempt failed: the node is pending again on its next attempt, with this one in its history; or failed, if it was the last of
    /// its `max_attempts`.
    ///
    /// It is ready again at once, for whoever asks next. For a pause between two attempts keep the claim through it, in a task of its own, and tell this behind
    /// it: `tokio::spawn(async move { sleep(pause).await; claim.retry(error).await })`. Until then nobody else gets the node; if the process dies meanwhile, it is taken over.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    ///
    /// # Cancel safety
    /// As [`complete`](Self::complete).
    pub async fn retry(&self, error: impl AsRef<str>) -> Result<Commit, Error> {
        self.tell(self.granted.failed(error.as_ref()).into(), self.coordinator.fences.clone()).await
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
        self.tell(Told::unbegun(), None).await
    }

    /// Tells an end, which is refused unless these leases are held too, in a task of its own: whoever waits for it or not, the claim learns what it became.
    async fn tell(&self, told: Told, fences: Option<Arc<[Fence]>>) -> Result<Commit, Error> {
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
            end.tell(&told).await
        };
        let told = engine.apart(task.in_current_span()).await;
        drop(caller);
        told.unwrap_or_else(|cut| Err(if cut.begun { Error::Unknown(self.granted.held.run.clone()) } else { Error::Closed }))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Only what its worker had: a claim that was still on its way to him is no attempt of his.
        self.granted.panics = std::thread::panicking();
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
        let told = if self.panics { self.failed(PANICKED).into() } else { Told::unbegun() };
        let giving_back = End::give_back(Arc::clone(engine), Arc::clone(&self.held), told);
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
