//! The pipeline: nodes in layers, each with one to three upstream nodes in the layer before. The same names and seed give the same pipeline.

use std::collections::BTreeSet;

use seeknal_state::{InputError, NodeId};

use crate::chance;

/// A pipeline.
#[derive(Debug, Clone)]
pub(crate) struct Dag {
    nodes: Vec<Step>,
    layers: usize,
}

/// One node of it.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) id: NodeId,
    /// Who must be done before, by index; always smaller than the own one.
    pub(crate) upstream: BTreeSet<usize>,
    /// Who waits for it, by index.
    pub(crate) downstream: Vec<usize>,
}

impl Dag {
    /// A pipeline of made-up nodes.
    pub(crate) fn made_up(nodes: usize, seed: u64) -> Result<Self, InputError> {
        let names: Result<BTreeSet<_>, _> = (0..nodes).map(|index| NodeId::new(format!("node_{index:04}"))).collect();
        Ok(Self::of(names?, seed))
    }

    /// A pipeline of these nodes.
    pub(crate) fn of(names: BTreeSet<NodeId>, seed: u64) -> Self {
        let widest = u64::try_from(names.len() / 8).unwrap_or(u64::MAX).max(2);
        let mut nodes: Vec<Step> = Vec::with_capacity(names.len());
        let (mut before, mut current, mut layers) = (0..0, 0..0, 0);
        for (index, id) in names.into_iter().enumerate() {
            if index == current.end {
                let width = 1 + chance::below(widest, seed, &["width", id.as_str()]);
                before = current;
                current = index..index.saturating_add(usize::try_from(width).unwrap_or(1));
                layers += 1;
            }
            let mut upstream = BTreeSet::new();
            let candidates = u64::try_from(before.len()).unwrap_or(0);
            if candidates > 0 {
                for pick in 0..=chance::below(3, seed, &["fan-in", id.as_str()]) {
                    let chosen = chance::below(candidates, seed, &["upstream", id.as_str(), &pick.to_string()]);
                    upstream.insert(before.start + usize::try_from(chosen).unwrap_or(0));
                }
            }
            for parent in &upstream {
                if let Some(parent) = nodes.get_mut(*parent) {
                    parent.downstream.push(index);
                }
            }
            nodes.push(Step { id, upstream, downstream: Vec::new() });
        }
        Self { nodes, layers }
    }

    pub(crate) fn steps(&self) -> &[Step] {
        &self.nodes
    }

    pub(crate) fn step(&self, index: usize) -> Option<&Step> {
        self.nodes.get(index)
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn layers(&self) -> usize {
        self.layers
    }
}
