//! What was refused of a batch, and holds up what stands on it.

use std::collections::{HashMap, HashSet};

use super::batch::{Entry, RunPart};
use super::guard::Guard;
use super::id::{NodeId, RunId};
use super::mutation::Mutation;

/// What the entries of one batch that were refused would have changed.
#[derive(Debug, Default)]
pub(crate) struct Fallen<'e> {
    /// Runs of which everything later is held up.
    runs: HashSet<&'e RunId>,
    /// Of runs of which detached entries fell, how many did, and their nodes.
    detached: HashMap<&'e RunId, (u64, HashSet<&'e NodeId>)>,
}

impl<'e> Fallen<'e> {
    /// An entry was refused.
    pub(crate) fn add(&mut self, entry: &'e Entry) {
        for part in &entry.parts {
            let nodes: Option<Vec<&NodeId>> = part.mutations.iter().map(Mutation::node).collect();
            match nodes.filter(|_| entry.detached && entry.parts.len() == 1) {
                Some(nodes) => {
                    let (count, fallen) = self.detached.entry(&part.run).or_default();
                    *count += 1;
                    fallen.extend(nodes);
                }
                None => drop(self.runs.insert(&part.run)),
            }
        }
    }

    /// Whether a later part was made on top of what fell.
    pub(crate) fn holds_up(&self, part: &RunPart) -> bool {
        if !self.runs.is_empty() && self.runs.contains(&part.run) {
            return true;
        }
        let Some((_, fallen)) = self.detached.get(&part.run) else { return false };
        let whole = part.guards.iter().any(|guard| matches!(guard, Guard::RunVersion(_)))
            || part
                .mutations
                .iter()
                .any(|m| matches!(m, Mutation::Create { .. } | Mutation::Import(_) | Mutation::Delete { .. }));
        let mut named = part.mutations.iter().filter_map(Mutation::node).chain(part.guards.iter().filter_map(Guard::node));
        whole || named.any(|node| fallen.contains(node))
    }

    /// How many of the entries that a later part counts on were passed over.
    pub(crate) fn passed_over(&self, run: &RunId) -> u64 {
        self.detached.get(run).map_or(0, |(count, _)| *count)
    }
}

impl RunPart {
    /// Whether guards say of every row that it changes which version it must have: then they alone can decide.
    pub(crate) fn pins_its_nodes(&self) -> bool {
        let pinned = |id: &NodeId| self.guards.iter().any(|guard| matches!(guard, Guard::NodeVersion { node, .. } if node == id));
        self.mutations.iter().all(|mutation| mutation.node().is_some_and(pinned))
    }
}
