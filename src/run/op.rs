//! What a client asks of a run, and what it is answered.

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::sync::oneshot;

use super::admission::Permit;
use super::chain::Touched;
use super::losses::Untold;
use crate::model::{
    CommitSeq, Entry, Fence, Guard, LeaseGrant, LeaseMutation, Mutation, NodeId, Receipt, Refusal, RunId, RunReceipt, RunState,
    Version,
};
use crate::store::StoreError;

/// One transaction on one run, before it is checked.
#[derive(Debug, Default)]
pub(crate) struct Op {
    pub(crate) mutations: Vec<Mutation>,
    pub(crate) guards: Vec<Guard>,
    pub(crate) fences: Vec<Fence>,
    pub(crate) leases: Vec<LeaseMutation>,
    /// Whether the caller is answered from memory.
    pub(crate) deferred: bool,
    /// How often it was sent down and came back.
    pub(crate) attempts: u32,
    /// Whether a refusal by the actor was checked against storage already; only where others write too.
    pub(crate) verified: bool,
    /// Whether a refusal by the actor is enough: who asks has other things to try.
    pub(crate) hasty: bool,
    /// Whether nobody reads what it is answered: lost writes are told to somebody else.
    pub(crate) unheard: bool,
    /// Whether its stamps are set.
    pub(crate) stamped: bool,
}

impl Op {
    /// Only what asks for nothing but to be written can be answered before storage was asked.
    pub(crate) fn is_deferred(&self) -> bool {
        self.deferred && self.guards.is_empty() && self.fences.is_empty() && self.leases.is_empty() && !self.is_barrier()
    }

    /// Whether the run comes or goes with it, so that what follows cannot be decided before it is settled.
    pub(crate) fn is_barrier(&self) -> bool {
        self.mutations.iter().any(|m| m.creates_run() || matches!(m, Mutation::Delete { .. }))
    }

    pub(crate) fn creates_run(&self) -> bool {
        self.mutations.first().is_some_and(Mutation::creates_run)
    }

    pub(crate) fn weight(&self) -> usize {
        const FIXED: usize = 256;
        FIXED
            + self.mutations.iter().map(Mutation::weight).sum::<usize>()
            + self.guards.iter().map(Guard::weight).sum::<usize>()
            + weight_of_leases(&self.fences, &self.leases)
    }

    /// Sets the stamps of all mutations, once.
    pub(crate) fn stamp(&mut self, now: impl FnOnce() -> DateTime<Utc>) {
        if self.stamped {
            return;
        }
        self.stamped = true;
        let now = now();
        for mutation in &mut self.mutations {
            match mutation {
                Mutation::SetNode { at, .. } | Mutation::Update { at, .. } => *at = now,
                _ => {}
            }
        }
    }

    /// The op that an entry over one run was made from.
    pub(crate) fn again(entry: Entry, attempts: u32, deferred: bool, hasty: bool) -> Self {
        let (fences, leases) = (entry.fences, entry.leases);
        let mut op = Self { fences, leases, deferred, attempts, hasty, stamped: true, ..Self::default() };
        if let Some(part) = entry.parts.into_iter().next() {
            op.mutations = part.mutations;
            op.guards = part.guards;
        }
        op
    }
}

/// What leases weigh that are looked at and changed.
pub(crate) fn weight_of_leases(fences: &[Fence], leases: &[LeaseMutation]) -> usize {
    fences.iter().map(|fence| 32 + fence.key.weight()).sum::<usize>() + leases.iter().map(LeaseMutation::weight).sum::<usize>()
}

/// What a committed transaction became.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    /// Not known for a deferred write: it has no place in the order of the store yet.
    pub(crate) seq: Option<CommitSeq>,
    pub(crate) runs: Vec<RunReceipt>,
    /// The leases that it granted.
    pub(crate) grants: Vec<LeaseGrant>,
}

impl Committed {
    pub(crate) fn durable(receipt: Receipt) -> Self {
        Self { seq: Some(receipt.seq), runs: receipt.runs, grants: receipt.grants }
    }
}

/// Deferred writes that were acknowledged from memory and did not reach storage, or of which nobody knows whether they did.
#[derive(Debug, Clone, thiserror::Error, Serialize)]
#[error("{lost} deferred write(s) of run {run:?} were lost{}: {cause}", if *.unknown { " (of some of them that is not known)" } else { "" })]
#[non_exhaustive]
pub struct DeferredLoss {
    /// The run.
    pub run: RunId,
    /// How many writes.
    pub lost: u64,
    /// Whether it is not known of some of them if they reached storage: read before you write again.
    pub unknown: bool,
    /// Why, in words.
    pub cause: String,
}

/// Why deferred writes were lost.
#[derive(Debug)]
pub(super) struct Cause {
    pub(super) words: String,
    /// Whether nobody knows if they were.
    pub(super) unknown: bool,
}

impl From<&StoreError> for Cause {
    fn from(error: &StoreError) -> Self {
        Self { words: error.to_string(), unknown: error.is_unknown_outcome() }
    }
}

impl From<&Refusal> for Cause {
    fn from(refusal: &Refusal) -> Self {
        refusal.to_string().into()
    }
}

impl From<String> for Cause {
    fn from(words: String) -> Self {
        Self { words, unknown: false }
    }
}

/// Why a transaction was not committed.
#[derive(Debug)]
pub(crate) enum CommitError {
    /// It was judged and refused.
    Refused(Refusal),
    /// Storage failed, or the outcome is unknown (the error says which).
    Store(StoreError),
    /// Earlier deferred writes were lost; told once, nothing of this was written.
    Lost(Untold),
    /// Others changed what it touches again and again.
    Contended(RunId, u32),
    /// The coordinator was closed before it was sent.
    Closed,
    /// Its actor ended in mid-flight: nobody knows.
    Unknown(RunId),
}

/// The answer of a run's actor.
#[derive(Debug)]
pub(crate) enum Reply {
    Done(Result<Committed, CommitError>),
    /// The actor ended before it looked at it: nothing happened, it can be sent to its successor.
    Bounced(Box<(Op, Permit)>),
}

/// An op on its way to its actor. Dropped unread (the actor ended first) it goes back to its sender.
#[derive(Debug)]
pub(crate) struct Envelope {
    content: Option<(Op, Permit, oneshot::Sender<Reply>)>,
}

impl Envelope {
    pub(crate) fn new(op: Op, permit: Permit) -> (Self, oneshot::Receiver<Reply>) {
        let (reply, answer) = oneshot::channel();
        (Self { content: Some((op, permit, reply)) }, answer)
    }

    pub(crate) fn open(mut self) -> Option<(Op, Permit, Ack)> {
        self.content.take().map(|(op, permit, reply)| (op, permit, Ack(reply)))
    }
}

impl Drop for Envelope {
    fn drop(&mut self) {
        if let Some((op, permit, reply)) = self.content.take() {
            let _caller_gone = reply.send(Reply::Bounced(Box::new((op, permit))));
        }
    }
}

/// The right to answer a caller. Dropped unanswered the caller learns that the outcome is unknown.
#[derive(Debug)]
pub(crate) struct Ack(oneshot::Sender<Reply>);

impl Ack {
    pub(crate) fn answer(self, answer: Result<Committed, CommitError>) {
        // A caller that went away is no fault: the mutation happened or not, as it was settled.
        let _caller_gone = self.0.send(Reply::Done(answer));
    }
}

/// What changed with a commit, before it is told to subscribers.
#[derive(Debug, Clone)]
pub(crate) struct ChangeSeed {
    pub(crate) run: RunId,
    pub(crate) before: Version,
    pub(crate) after: Version,
    pub(crate) seq: Option<CommitSeq>,
    pub(crate) nodes: Vec<NodeId>,
    pub(crate) header: bool,
    pub(crate) deleted: bool,
    pub(crate) state: Option<RunState>,
}

impl ChangeSeed {
    /// What a commit (or, without a place in the order, several of others) made of a run: `None` if it is gone.
    pub(crate) fn of(versions: RunReceipt, seq: Option<CommitSeq>, touched: Touched, state: Option<RunState>) -> Self {
        let RunReceipt { run, before, after } = versions;
        let Touched { nodes, header } = touched;
        Self { run, before, after, seq, nodes, header, deleted: state.is_none(), state }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FencingToken, LeaseKey, NodeStatus, RunStatus};
    use crate::run::Admission;

    #[test]
    fn an_op_weighs_what_its_conditions_and_leases_hold() {
        let text = "x".repeat(1_000);
        let (run, node) = (RunId::new(&text).unwrap(), NodeId::new(&text).unwrap());
        let key = LeaseKey::node(run, node.clone());
        let empty = Op::default().weight();
        let guards = vec![
            Guard::NodeStatus { node: node.clone(), one_of: vec![NodeStatus::parse(&text), NodeStatus::Running] },
            Guard::NodeAbsent { node: node.clone() },
            Guard::NodeVersion { node, version: Version(1) },
            Guard::RunStatus(vec![RunStatus::parse(&text)]),
        ];
        let op = Op { guards, ..Op::default() };
        assert!((5_000..6_000).contains(&(op.weight() - empty)), "{}", op.weight());
        let fences = vec![Fence { key: key.clone(), token: FencingToken(1) }];
        let op = Op { fences, ..Op::default() };
        assert!((2_000..2_500).contains(&(op.weight() - empty)), "{}", op.weight());
        let leases = vec![LeaseMutation::Release { key, token: FencingToken(1) }];
        let op = Op { leases, ..Op::default() };
        assert!((2_000..2_500).contains(&(op.weight() - empty)), "{}", op.weight());
    }

    #[tokio::test]
    async fn an_op_whose_actor_ended_unread_goes_back_to_its_sender_with_its_permit() {
        let admission = Admission::new(1, 1024);
        let (envelope, answer) = Envelope::new(Op::default(), admission.try_acquire(1).unwrap());
        drop(envelope);
        let Reply::Bounced(back) = answer.await.unwrap() else { panic!("nothing happened, and the sender is told so") };
        let (_, permit) = *back;
        assert_eq!(admission.available(), 0, "the permit came back with the op");
        drop(permit);
        assert_eq!(admission.available(), 1);
    }
}
