//! Pending nodes that nothing will make ready, and why.

use std::collections::{HashMap, VecDeque};
use std::fmt;

use super::id::NodeId;
use super::run::RunState;
use super::status::NodeStatus;

/// A pending node that will not become ready, whatever comes of the nodes that run or can be worked on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Blocked {
    /// Which one.
    pub node: NodeId,
    /// Where that begins: a node that it depends on, by itself or through others; of a circle the next one on the way.
    pub by: NodeId,
    /// What is the matter with that one.
    pub reason: BlockedReason,
}

/// Why nodes that depend on a node will not become ready.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockedReason {
    /// It ended in a status that does not count as done.
    Ended(NodeStatus),
    /// The run has no such node.
    Missing,
    /// It waits for itself: nodes depend on one another in a circle.
    Circle,
}

/// `failed`, `missing`, `circle`.
impl fmt::Display for BlockedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(status) => status.fmt(f),
            Self::Missing => f.write_str("missing"),
            Self::Circle => f.write_str("circle"),
        }
    }
}

/// A node that waits for others that are not done.
struct Waiting<'r> {
    /// How many of these are pending, or never will be done.
    for_others: usize,
    /// The first one that never will.
    never: Option<(&'r NodeId, BlockedReason)>,
    /// Whether it will not become ready.
    stays: bool,
}

impl RunState {
    /// The pending nodes that will not become ready, in order of their ids: something that they depend on has failed, is not in the run, or waits for them.
    /// Done is what is success, cached or skipped, as for a [`ClaimFilter`](crate::ClaimFilter) that says nothing else. A node that runs may end well. Whether
    /// the run itself has ended makes no difference here.
    ///
    /// ```
    /// use seeknal_state::{NodeId, NodeState, NodeStatus, RunHeader, RunId, RunState, RunStatus, Version, model::time};
    ///
    /// let node = |id: &str, status, needs: &[&str]| {
    ///     let mut node = NodeState::new(status);
    ///     node.depends_on = needs.iter().map(NodeId::new).collect::<Result<_, _>>()?;
    ///     Ok((NodeId::new(id)?, node))
    /// };
    /// let nodes = [
    ///     node("orders", NodeStatus::Failed, &[])?,
    ///     node("report", NodeStatus::Pending, &["orders"])?,
    ///     node("mail", NodeStatus::Pending, &["report"])?,
    /// ];
    /// let header = RunHeader::new(RunStatus::Running, time::parse("2024-01-10T12:00:00Z")?);
    /// let run = RunState::from_parts(RunId::new("run_1")?, header, Version(1), Version(1), nodes);
    /// let told: Vec<String> = run.blocked().iter().map(|b| format!("{} by {} ({})", b.node, b.by, b.reason)).collect();
    /// assert_eq!(told, ["mail by orders (failed)", "report by orders (failed)"]);
    /// # Ok::<(), seeknal_state::InputError>(())
    /// ```
    pub fn blocked(&self) -> Vec<Blocked> {
        self.blocked_unless(&[NodeStatus::Success, NodeStatus::Cached, NodeStatus::Skipped])
    }

    /// The same where other statuses count as [done](crate::ClaimFilter::done). O(nodes + dependencies).
    pub fn blocked_unless(&self, done: &[NodeStatus]) -> Vec<Blocked> {
        let (mut waiting, dependents) = self.waiting(done);
        // Whatever can be worked on may be done one day, and what waits for it alone then too.
        let mut movable: VecDeque<&NodeId> = waiting.iter().filter(|(_, card)| card.for_others == 0).map(|(id, _)| *id).collect();
        while let Some(id) = movable.pop_front() {
            if let Some(card) = waiting.get_mut(id) {
                card.stays = false;
            }
            for dependent in dependents.get(id).into_iter().flatten() {
                if let Some(card) = waiting.get_mut(*dependent) {
                    card.for_others -= 1;
                    if card.for_others == 0 {
                        movable.push_back(dependent);
                    }
                }
            }
        }
        self.causes(&waiting, &dependents)
    }

    /// The pending nodes, and by which of them each is waited for.
    fn waiting(&self, done: &[NodeStatus]) -> (HashMap<&NodeId, Waiting<'_>>, HashMap<&NodeId, Vec<&NodeId>>) {
        let mut waiting = HashMap::new();
        let mut dependents: HashMap<&NodeId, Vec<&NodeId>> = HashMap::new();
        for (id, node) in self.nodes().filter(|(_, node)| node.status == NodeStatus::Pending) {
            let mut card = Waiting { for_others: 0, never: None, stays: true };
            for needed in &node.depends_on {
                let reason = match self.node(needed.as_str()).map(|needed| &needed.status) {
                    Some(NodeStatus::Pending) => {
                        dependents.entry(needed).or_default().push(id);
                        card.for_others += 1;
                        continue;
                    }
                    Some(status) if *status == NodeStatus::Running || done.contains(status) => continue,
                    Some(status) => BlockedReason::Ended(status.clone()),
                    None => BlockedReason::Missing,
                };
                card.for_others += 1;
                card.never.get_or_insert((needed, reason));
            }
            waiting.insert(id, card);
        }
        (waiting, dependents)
    }

    /// Carries each cause on to what depends on it.
    fn causes(&self, waiting: &HashMap<&NodeId, Waiting<'_>>, dependents: &HashMap<&NodeId, Vec<&NodeId>>) -> Vec<Blocked> {
        let stays = |id: &NodeId| waiting.get(id).is_some_and(|card| card.stays);
        let mut causes: HashMap<&NodeId, (&NodeId, BlockedReason)> = HashMap::new();
        let mut told: VecDeque<&NodeId> = VecDeque::new();
        for (id, _) in self.nodes() {
            if let Some(cause) = waiting.get(id).and_then(|card| card.never.clone()) {
                causes.insert(id, cause);
                told.push_back(id);
            }
        }
        while let Some(id) = told.pop_front() {
            let Some(cause) = causes.get(id).cloned() else { continue };
            for dependent in dependents.get(id).into_iter().flatten().filter(|dependent| stays(dependent)) {
                if !causes.contains_key(*dependent) {
                    causes.insert(dependent, cause.clone());
                    told.push_back(dependent);
                }
            }
        }
        let blocked = self.nodes().filter(|(id, _)| stays(id)).filter_map(|(id, node)| {
            let (by, reason) = match causes.remove(id) {
                Some(cause) => cause,
                // What is left leads into a circle, and nowhere else.
                None => (node.depends_on.iter().find(|needed| stays(needed))?, BlockedReason::Circle),
            };
            Some(Blocked { node: id.clone(), by: by.clone(), reason })
        });
        blocked.collect()
    }
}
