//! The locks and the queue of one run: who has a place, who is next.

use std::collections::{BTreeMap, HashMap};

use crate::model::NodeId;

use super::table::Ticket;

#[cfg(test)]
thread_local! {
    /// How many waiters were looked at, for who counts what a queue costs.
    pub(super) static LOOKED_AT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// A waiter is looked at. Whoever goes along a queue says so of each.
pub(super) fn look<T>(waiter: T) -> T {
    #[cfg(test)]
    LOOKED_AT.set(LOOKED_AT.get() + 1);
    waiter
}

/// The order of arrival, over the whole table.
pub(super) type Arrival = u64;

/// The locks and the queue of one run.
#[derive(Debug, Default)]
pub(super) struct RunLocks {
    /// Who has the whole run (claimed, held or leaving).
    whole: Option<Ticket>,
    /// Who has which node.
    nodes: HashMap<NodeId, Ticket>,
    /// Who waits for the whole run, in order of arrival.
    pub(super) whole_waiters: BTreeMap<Arrival, Ticket>,
    /// Who waits for each node.
    pub(super) node_waiters: HashMap<NodeId, BTreeMap<Arrival, Ticket>>,
    /// All who wait for some node, and for which, in order of arrival.
    pub(super) node_order: BTreeMap<Arrival, (NodeId, Ticket)>,
}

impl RunLocks {
    pub(super) fn is_free(&self) -> bool {
        self.whole.is_none() && self.nodes.is_empty() && self.whole_waiters.is_empty() && self.node_order.is_empty()
    }

    /// Whether a newcomer gets the key at once.
    pub(super) fn admits(&self, node: Option<&NodeId>) -> bool {
        match node {
            None => self.is_free(),
            Some(node) => {
                self.whole.is_none()
                    && self.whole_waiters.is_empty()
                    && !self.nodes.contains_key(node)
                    && !self.node_waiters.contains_key(node)
            }
        }
    }

    pub(super) fn occupy(&mut self, node: Option<&NodeId>, ticket: Ticket) {
        match node {
            None => self.whole = Some(ticket),
            Some(node) => {
                self.nodes.insert(node.clone(), ticket);
            }
        }
    }

    pub(super) fn enqueue(&mut self, node: Option<&NodeId>, arrival: Arrival, ticket: Ticket) {
        match node {
            None => {
                self.whole_waiters.insert(arrival, ticket);
            }
            Some(node) => {
                self.node_waiters.entry(node.clone()).or_default().insert(arrival, ticket);
                self.node_order.insert(arrival, (node.clone(), ticket));
            }
        }
    }

    pub(super) fn dequeue(&mut self, node: Option<&NodeId>, arrival: Arrival) {
        let Some(node) = node else {
            self.whole_waiters.remove(&arrival);
            return;
        };
        self.node_order.remove(&arrival);
        if let Some(lane) = self.node_waiters.get_mut(node) {
            lane.remove(&arrival);
            if lane.is_empty() {
                self.node_waiters.remove(node);
            }
        }
    }

    /// Gives the place back.
    pub(super) fn leave(&mut self, node: Option<&NodeId>) {
        match node {
            None => self.whole = None,
            Some(node) => {
                self.nodes.remove(node);
            }
        }
    }

    /// Lets in whoever is next after something moved out of the way.
    pub(super) fn admit_next(&mut self, moved: &Moved<'_>) -> Vec<Ticket> {
        let mut next = Vec::new();
        if self.whole.is_some() {
            return next;
        }
        let barrier = first(&self.whole_waiters);
        let candidates: Vec<(Arrival, NodeId, Ticket)> = match moved {
            Moved::Node(node) => {
                let front = self.node_waiters.get(*node).and_then(BTreeMap::first_key_value).map(look);
                front.into_iter().filter(|(arrival, _)| **arrival < barrier).map(|(a, t)| (*a, NodeId::clone(node), *t)).collect()
            }
            // Each waiter is looked at here at most once: from now on nobody who waits for the whole run is ahead of it.
            Moved::Whole { from } if *from < barrier => {
                self.node_order.range(*from..barrier).map(look).map(|(a, (n, t))| (*a, n.clone(), *t)).collect()
            }
            Moved::Whole { .. } => Vec::new(),
        };
        for (arrival, node, ticket) in candidates {
            if !self.nodes.contains_key(&node) {
                self.dequeue(Some(&node), arrival);
                self.occupy(Some(&node), ticket);
                next.push(ticket);
            }
        }
        let whole_is_next = self.nodes.is_empty() && barrier < first(&self.node_order);
        if let Some((_, ticket)) = if whole_is_next { self.whole_waiters.pop_first() } else { None } {
            self.occupy(None, ticket);
            next.push(ticket);
        }
        next
    }

    /// Everybody who has a place.
    pub(super) fn occupants(&self) -> Vec<Ticket> {
        self.whole.iter().chain(self.nodes.values()).copied().collect()
    }

    /// Everybody who waits, in order of arrival.
    pub(super) fn waiters(&self) -> Vec<Ticket> {
        let nodes = self.node_order.iter().map(|(arrival, (_, ticket))| (*arrival, *ticket));
        let mut all: Vec<(Arrival, Ticket)> = self.whole_waiters.iter().map(|(a, t)| (*a, *t)).chain(nodes).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, ticket)| ticket).collect()
    }
}

/// What was taken out of the way of a queue.
pub(super) enum Moved<'a> {
    /// A node's lock, or a waiter of a node.
    Node(&'a NodeId),
    /// The whole run's lock, or a waiter for the whole run: node waiters from this arrival on may be next.
    Whole { from: Arrival },
}

fn first<T>(queue: &BTreeMap<Arrival, T>) -> Arrival {
    queue.first_key_value().map_or(Arrival::MAX, |(arrival, _)| *arrival)
}
