//! The two states of a run and the chain of entries between them. Pure: it decides, the actor carries.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::op::Op;
use crate::model::{
    Entry, Mutation, NoRun, NodeId, Refusal, RunId, RunPart, RunReceipt, RunState, Version, apply_all, check_guards,
    first_violated,
};

/// An entry that passed its checks: what goes down, and the run as it will be.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) part: RunPart,
    pub(crate) after: Option<RunState>,
}

/// Checks mutations and guards against a state and says what the entry is.
pub(crate) fn plan(
    id: &RunId,
    base: Version,
    tip: Option<&RunState>,
    mutations: Vec<Mutation>,
    guards: Vec<crate::model::Guard>,
) -> Result<Planned, Box<Refused>> {
    let refuse = |refusal, mutations, guards| Err(Box::new(Refused { refusal, mutations, guards }));
    let expect = tip.map_or(Version::NONE, RunState::version);
    if tip.is_none() && !mutations.first().is_some_and(Mutation::creates_run) {
        return refuse(Refusal::RunNotFound { run: id.clone() }, mutations, guards);
    }
    let violated = tip.map_or_else(|| first_violated(&NoRun, &guards), |run| check_guards(run, &guards));
    if let Some((guard, found)) = violated {
        let refusal = Refusal::Guard { run: id.clone(), guard: guard.clone(), found };
        return refuse(refusal, mutations, guards);
    }
    let mut after = tip.cloned();
    // A new run's version is the backend's to give; one is what stands in for it until then.
    if let Err(refusal) = apply_all(&mut after, id, &mutations, expect.next()) {
        return refuse(refusal, mutations, guards);
    }
    let part = RunPart { run: id.clone(), base, expect, guards, mutations, after: after.clone() };
    Ok(Planned { part, after })
}

/// A plan that was refused, with what it was made from, to be checked again.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) refusal: Refusal,
    mutations: Vec<Mutation>,
    guards: Vec<crate::model::Guard>,
}

/// An entry on its way.
#[derive(Debug)]
struct InFlight {
    ticket: u64,
    expect: Version,
    after: Option<RunState>,
    barrier: bool,
    touched: Option<Touched>,
}

/// What an entry changes, for subscribers; noted only if there are any.
#[derive(Debug, Clone, Default)]
pub(crate) struct Touched {
    pub(crate) nodes: Vec<NodeId>,
    pub(crate) header: bool,
}

/// What an applied entry means for the run.
#[derive(Debug)]
pub(super) enum Progress {
    /// `committed` moved to the entry's own state.
    Moved(Option<Touched>),
    /// Somebody else wrote in between: the run has to be loaded before it can be published.
    Overtaken,
}

/// One run as its actor knows it.
#[derive(Debug)]
pub(super) struct Chain {
    id: RunId,
    committed: Option<RunState>,
    tip: Option<RunState>,
    in_flight: VecDeque<InFlight>,
    /// Which chain this is: what is broken is followed by a new one. Drawn from one counter, so that no successor of this actor takes one again.
    number: u64,
    numbers: Arc<AtomicU64>,
    tickets: u64,
    /// The tickets of those on their way that are not deferred, in order.
    durable: VecDeque<u64>,
    /// Whether the tip stands on something that fell: nothing of it may be seen.
    broken: bool,
}

impl Chain {
    pub(super) fn new(id: RunId, committed: Option<RunState>, numbers: Arc<AtomicU64>) -> Self {
        Self {
            id,
            tip: committed.clone(),
            committed,
            in_flight: VecDeque::new(),
            number: draw(&numbers),
            numbers,
            tickets: 0,
            durable: VecDeque::new(),
            broken: false,
        }
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn committed(&self) -> Option<&RunState> {
        self.committed.as_ref()
    }

    /// Which run the next op is decided on, by the version at which that was made; none if there is no run.
    pub(super) fn born(&self) -> Version {
        born(self.tip.as_ref())
    }

    pub(super) fn is_settled(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Whether the run is coming or going: what follows cannot be decided yet.
    pub(super) fn has_barrier(&self) -> bool {
        self.in_flight.back().is_some_and(|last| last.barrier)
    }

    /// Whether any deferred write is on its way.
    pub(super) fn has_deferred(&self) -> bool {
        self.in_flight.len() > self.durable.len()
    }

    /// Checks an op against the tip and puts it on the chain.
    pub(super) fn decide(&mut self, op: &mut Op, note: bool) -> Result<(u64, Entry), Refusal> {
        let base = self.committed.as_ref().map_or(Version::NONE, RunState::version);
        let (barrier, deferred) = (op.is_barrier(), op.is_deferred());
        // A node that is gone says nothing afterwards: who begins to listen meanwhile is told of it by this alone.
        let touched = (note || op.mutations.iter().any(Mutation::deletes_node)).then(|| touched(&op.mutations));
        let planned = plan(&self.id, base, self.tip.as_ref(), std::mem::take(&mut op.mutations), std::mem::take(&mut op.guards));
        let Planned { part, after } = planned.map_err(|refused| {
            let Refused { refusal, mutations, guards } = *refused;
            (op.mutations, op.guards) = (mutations, guards);
            refusal
        })?;
        self.tickets += 1;
        let ticket = self.tickets;
        self.tip.clone_from(&after);
        if !deferred {
            self.durable.push_back(ticket);
        }
        self.in_flight.push_back(InFlight { ticket, expect: part.expect, after, barrier, touched });
        let entry = Entry {
            parts: vec![part],
            leases: std::mem::take(&mut op.leases),
            fences: std::mem::take(&mut op.fences),
            detached: op.hasty,
            ..Entry::default()
        };
        Ok((ticket, entry))
    }

    fn take(&mut self, ticket: u64) -> Option<InFlight> {
        // Outcomes come in the order of the chain, so that this is the first one.
        let at = self.in_flight.iter().position(|entry| entry.ticket == ticket)?;
        let entry = self.in_flight.remove(at)?;
        if let Ok(at) = self.durable.binary_search(&ticket) {
            self.durable.remove(at);
        }
        Some(entry)
    }

    /// An entry is in storage.
    pub(super) fn applied(&mut self, ticket: u64, receipt: Option<&RunReceipt>) -> Progress {
        let Some(entry) = self.take(ticket) else { return Progress::Overtaken };
        // What stands on something that is not there as it was thought is not either, whatever its numbers.
        let Some(receipt) = receipt.filter(|receipt| receipt.before == entry.expect && !self.broken) else {
            // The tip stands on a state that never was: nothing of it may be seen before the run is loaded.
            self.broken = true;
            return Progress::Overtaken;
        };
        self.committed = match entry.after {
            Some(after) if after.version() != receipt.after => {
                if !after.is_newborn() {
                    // Only of a run that is made the backend chooses the version.
                    self.broken = true;
                    return Progress::Overtaken;
                }
                let after = after.born_at(receipt.after);
                if self.in_flight.is_empty() {
                    self.tip = Some(after.clone());
                }
                Some(after)
            }
            after => after,
        };
        Progress::Moved(entry.touched)
    }

    /// An entry is not in storage. The chain is broken: what stood on it comes back.
    pub(super) fn fell(&mut self, ticket: u64) {
        let _settled = self.take(ticket);
        self.number = draw(&self.numbers);
        self.broken = true;
    }

    /// Begins anew from what is committed, after a break, when nothing is on its way any more.
    pub(super) fn reset(&mut self) {
        self.tip.clone_from(&self.committed);
        self.broken = false;
    }

    /// Begins anew from a state that was loaded.
    pub(super) fn reload(&mut self, state: Option<RunState>) {
        self.committed = state;
        self.reset();
    }

    /// What readers may see: what is committed, and the deferred writes that stand directly on it.
    pub(super) fn visible(&self) -> Option<&RunState> {
        if self.broken {
            return self.committed.as_ref();
        }
        let Some(durable) = self.durable.front() else { return self.tip.as_ref() };
        let before = self.in_flight.partition_point(|entry| entry.ticket < *durable);
        match before.checked_sub(1).and_then(|last| self.in_flight.get(last)) {
            Some(entry) => entry.after.as_ref(),
            None => self.committed.as_ref(),
        }
    }

    /// Whether the deferred write with this ticket, which is on its way, stands directly on what is committed and others that do.
    pub(super) fn is_visible(&self, ticket: u64) -> bool {
        !self.broken && self.durable.front().is_none_or(|durable| ticket < *durable)
    }
}

/// Which run it is of those that have one name, by the version at which it was made; none if there is no run.
pub(crate) fn born(state: Option<&RunState>) -> Version {
    state.map_or(Version::NONE, RunState::created_version)
}

/// Whether what was sent to one run found another one in its place, made anew under its name.
pub(crate) fn is_another(sent_to: Version, now: Version) -> bool {
    sent_to != Version::NONE && now != Version::NONE && sent_to != now
}

/// What mutations change.
pub(crate) fn touched(mutations: &[Mutation]) -> Touched {
    let mut touched = Touched::default();
    // One is told once by itself.
    let mut seen = HashSet::with_capacity(if mutations.len() > 1 { mutations.len() } else { 0 });
    for mutation in mutations {
        match (mutation.node(), mutation) {
            (Some(node), _) => {
                if mutations.len() == 1 || seen.insert(node) {
                    touched.nodes.push(node.clone());
                }
            }
            (None, Mutation::Import(run)) => {
                touched.header = true;
                let nodes = run.nodes.keys();
                touched.nodes.extend(nodes.filter(|node| mutations.len() == 1 || seen.insert(*node)).cloned());
            }
            (None, _) => touched.header = true,
        }
    }
    touched
}

/// The rows of a run that are newer than a version.
pub(crate) fn newer(state: Option<&RunState>, version: Version) -> Touched {
    let Some(state) = state else { return Touched { nodes: Vec::new(), header: true } };
    Touched { nodes: state.newer_nodes(version), header: state.header().version > version }
}

/// Adds the nodes of an earlier state that are not there any more.
pub(crate) fn add_gone(changed: &mut Touched, known: &RunState, state: Option<&RunState>) {
    // A node that went is one that the counts miss.
    let made = changed.nodes.iter().filter(|id| known.node(id.as_str()).is_none()).count();
    let kept = state.map_or(0, RunState::node_count).saturating_sub(made);
    if known.node_count() > kept {
        let gone = |id: &NodeId| state.is_none_or(|state| state.node(id.as_str()).is_none());
        changed.nodes.extend(known.nodes().map(|(id, _)| id).filter(|id| gone(id)).cloned());
    }
}

/// A number that no chain had before; zero stands for no chain.
fn draw(numbers: &AtomicU64) -> u64 {
    numbers.fetch_add(1, Ordering::Relaxed).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeState, NodeStatus, RunHeader, RunImport, RunStatus};

    #[test]
    fn what_is_touched_is_told_once_and_in_its_order() {
        let id = |name: &str| NodeId::new(name).unwrap();
        let delete = |name: &str| Mutation::DeleteNode { node: id(name) };
        let node = Arc::new(NodeState::new(NodeStatus::Pending));
        let nodes = [(id("b"), Arc::clone(&node)), (id("c"), node)].into();
        let import = RunImport { header: RunHeader::new(RunStatus::Running, chrono::DateTime::UNIX_EPOCH), nodes };
        let steps = [Mutation::Import(Box::new(import)), delete("z"), delete("b"), delete("a"), delete("z")];
        let told = touched(&steps);
        assert_eq!(told.nodes, ["b", "c", "z", "a"].map(id));
        assert!(told.header);
        assert!(!touched(&[delete("a")]).header);
    }

    /// Hundreds of thousands of nodes in one transaction hold nobody up.
    #[test]
    fn many_nodes_are_told_as_they_come() {
        let many: Vec<Mutation> =
            (0..100_000).map(|index| Mutation::DeleteNode { node: NodeId::new(format!("n{index}")).unwrap() }).collect();
        assert_eq!(touched(&many).nodes.len(), many.len());
    }
}
