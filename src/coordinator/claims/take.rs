//! Taking what was asked for: a claim is written and its lease granted in one commit, held or given back, and taken back where nobody knew whether it was
//! committed.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::board::Picked;
use super::end::Tries;
use super::guard::Granted;
use super::{Claim, Coordinator, Engine};
use crate::coordinator::write::node_change;
use crate::error::Error;
use crate::lease::{LeaseError, LockOptions, Place, pause_on};
use crate::model::{
    Fence, Guard, InputError, LeaseKey, LeaseRecord, NodeId, NodeState, NodeStatus, NodeUpdate, Pick, Refusal, RunId, RunStatus,
    Snapshot, Taking, Version, updated,
};
use crate::run::Op;
use crate::store::StoreErrorKind;

/// How long to wait before it is asked again what became of a claim.
const RETRACT_PAUSE: Duration = Duration::from_secs(1);
/// How long who asked for one node waits until it is given back.
const GIVING_BACK: Duration = Duration::from_secs(1);

/// What a claim writes and asks for.
pub(super) struct Want {
    pub(super) run: RunId,
    pub(super) node: NodeId,
    /// The node as it was seen, and must be when it is claimed.
    pub(super) seen: Arc<NodeState>,
    pub(super) taking: Taking,
    /// What must hold when it commits, besides that.
    pub(super) guards: Vec<Guard>,
    pub(super) run_status: RunStatus,
    pub(super) owner: Arc<str>,
    pub(super) ttl: Duration,
    /// Somebody else's claim is no question worth another look: there are other nodes.
    pub(super) hasty: bool,
}

/// What became of it.
pub(super) enum Tried<C = Claim> {
    Claimed(C),
    /// Somebody else has it, or it is not what it was.
    Taken,
    /// Somebody keeps everybody out of the whole run, or of the whole store.
    Locked(Box<LeaseRecord>),
    /// It was on its last attempt, and has failed now.
    GaveUp,
    /// Storage took so long that the lease was over before it was known. The node is as it was, on the same attempt, as soon as it is given back.
    TooLate(GivingBack),
    /// The run ended before its lease was known. Where it was opened again since, the node is given back as above.
    RunEnded(GivingBack),
}

impl Tried<Granted> {
    fn by(self, asker: &Coordinator) -> Tried {
        match self {
            Self::Claimed(granted) => Tried::Claimed(Claim::new(asker.clone(), granted)),
            Self::Taken => Tried::Taken,
            Self::Locked(holder) => Tried::Locked(holder),
            Self::GaveUp => Tried::GaveUp,
            Self::TooLate(back) => Tried::TooLate(back),
            Self::RunEnded(back) => Tried::RunEnded(back),
        }
    }
}

/// The way back of a node whose claim was known too late. It comes to its end whether or not somebody waits for that.
pub(super) struct GivingBack {
    task: Option<JoinHandle<()>>,
    runtime: Handle,
}

impl GivingBack {
    /// Waits until it is given back, or storage did not take that.
    pub(super) async fn ended(self) {
        if let Some(task) = self.task {
            let _told_in_the_log = task.await;
        }
    }

    /// As [`ended`](Self::ended), for a moment: where storage is busy its caller does not wait for it. Says whether it is over.
    pub(super) async fn ended_in_time(self) -> bool {
        let runtime = self.runtime.clone();
        tokio::select! {
            biased;
            () = self.ended() => true,
            // By the coordinator's clock: its caller may have none.
            _ = pause_on(&runtime, GIVING_BACK) => false,
        }
    }
}

impl Coordinator {
    pub(super) fn want(snapshot: &Snapshot, picked: &Picked, owner: &Arc<str>, ttl: Duration, done: &[NodeStatus]) -> Want {
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

    /// Claims in a task of its own: what is granted travels in the answer, so that it is given back if the caller is gone by then. Neither keeps the coordinator
    /// open: that is closed when its last handle goes, and waits for them.
    pub(super) async fn try_claim(&self, want: Want) -> Result<Tried, Error> {
        let (reply, answer) = oneshot::channel();
        let (engine, under) = (Arc::clone(self.engine()), self.fences.clone());
        let waited_for = WaitedFor::new(&engine);
        self.engine().runtime.spawn(async move {
            let _until_it_is_held_or_given_back = waited_for;
            let _caller_gone = reply.send(engine.claim(want, under.as_deref().unwrap_or_default()).await);
        });
        answer.await.unwrap_or(Err(Error::Closed)).map(|tried| tried.by(self))
    }
}

impl Engine {
    async fn claim(self: &Arc<Self>, want: Want, under: &[Fence]) -> Result<Tried<Granted>, Error> {
        let engine = self;
        if engine.is_closed() {
            return Err(Error::Closed);
        }
        let Want { run, node, seen, taking, guards: more, run_status, owner, ttl, hasty } = want;
        let key = LeaseKey::node(run.clone(), node.clone());
        let Some(place) = engine.leases.reserve(key.clone(), terms(&owner, ttl)?).await? else {
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
        let mut guards = vec![Guard::RunStatus(open.clone()), Guard::NodeVersion { node: node.clone(), version: seen.version }];
        guards.extend(more);
        let mut op = Op {
            mutations: vec![node_change(node.clone(), update.clone())],
            guards,
            fences: under.to_vec(),
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
            Err(Error::Conflict(refusal)) if !hasty && matches!(&refusal, Refusal::Guard { guard: Guard::RunStatus(_), .. }) => {
                return Err(Error::Conflict(refusal));
            }
            Err(Error::Locked(Refusal::LeaseHeld { holder })) if holder.key != key => return Ok(Tried::Locked(holder)),
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
            Err(error) => {
                let claimed = committed.runs.first().filter(|_| !given_up).map(|claimed| claimed.after);
                // In a run that has ended it stays as it is; in one that was opened again since it would look as if its worker had vanished.
                let only_if = matches!(error, LeaseError::RunEnded { .. }).then(|| Guard::RunStatus(open));
                let task = claimed.map(|claimed| {
                    let (waited_for, run, node) = (WaitedFor::new(engine), run.clone(), node.clone());
                    engine.runtime.spawn(async move { waited_for.0.unclaim(&run, &node, claimed, only_if).await })
                });
                let back = GivingBack { task, runtime: engine.runtime.clone() };
                return match error {
                    LeaseError::RunEnded { .. } => Ok(Tried::RunEnded(back)),
                    // This process was asleep for longer than the lease lasts, or storage was.
                    LeaseError::NotFound { .. } => Ok(Tried::TooLate(back)),
                    LeaseError::Store(error) if error.is_retryable() => {
                        tracing::warn!(%run, %node, %error, "a claim came too late to be trusted");
                        Ok(Tried::TooLate(back))
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
        Ok(Tried::Claimed(Granted::new(engine, run, node, state, lease, committed.into())))
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
        && let Some(now) = engine.fresh_in_time(&run).await
        && let Some(found) = now.node(node.as_str())
        && (&found.status, &found.worker, found.attempt, found.started_at)
            == (&begun.status, &begun.worker, begun.attempt, begun.started_at)
    {
        engine.unclaim(&run, &node, found.version, None).await;
    }
    place.orphaned().await;
}

impl Engine {
    /// Gives a node back whose lease is gone already, unless somebody else was faster.
    async fn unclaim(&self, run: &RunId, node: &NodeId, claimed: Version, only_if: Option<Guard>) {
        let mut tries = Tries::default();
        loop {
            let claimed = Guard::NodeVersion { node: node.clone(), version: claimed };
            let op = Op {
                mutations: vec![node_change(node.clone(), NodeUpdate::pending().unbegun())],
                guards: [claimed].into_iter().chain(only_if.clone()).collect(),
                unheard: true,
                ..Op::default()
            };
            let Err(error) = self.commit_one(run.clone(), op, false).await else { return };
            if !tries.once_more(&error).await {
                tracing::debug!(%run, %node, %error, "a claim that came too late was not given back");
                return;
            }
        }
    }

    /// A run as it is in storage, unless that cannot be read for longer than an end is told.
    async fn fresh_in_time(&self, run: &RunId) -> Option<Snapshot> {
        let mut tries = Tries::default();
        loop {
            match self.fresh(run).await {
                Ok(found) => return found,
                Err(error) if tries.once_more(&error).await => {}
                Err(_) => return None,
            }
        }
    }
}

/// Something that closing waits for: a claim that is not held yet, or that is being given back.
#[derive(Debug)]
pub(in crate::coordinator) struct WaitedFor(Arc<Engine>);

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

/// How the lease of a claim is asked for.
pub(super) fn terms(owner: &str, ttl: Duration) -> Result<LockOptions, InputError> {
    LockOptions::check_kept_ttl("claim ttl", ttl)?;
    LockOptions::new().owner(owner).ttl(ttl).purpose("claim").checked()
}

fn vanished(node: &NodeState) -> String {
    let worker = node.worker.as_deref().unwrap_or("?");
    format!("worker {worker:?} vanished on attempt {} of {}", node.attempt, node.max_attempts.unwrap_or(node.attempt))
}
