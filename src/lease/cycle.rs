//! Finding the cycle that a wait would close, before anybody waits in it.
//!
//! The search goes backwards, from the asking owner to those who wait for it: who holds nothing and awaits nothing costs nothing, and neither
//! does a long queue in front.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use crate::model::{LeaseKey, NodeId, RunId};

use super::locks::{Arrival, look};
use super::table::{LeaseTable, Phase, Ticket};

/// Somebody in the graph of waits. Who gave no name is one request and nothing else, but others may wait behind it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Who {
    Named(Arc<str>),
    Unnamed(Ticket),
}

impl Who {
    fn name(&self) -> Arc<str> {
        match self {
            Self::Named(name) => Arc::clone(name),
            Self::Unnamed(_) => Arc::from("a caller without a name"),
        }
    }
}

/// A part of a run's queue, to remember from where on it was looked at already.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Lane<'a> {
    Wholes(&'a RunId),
    Nodes(&'a RunId),
    Node(&'a RunId, &'a NodeId),
}

/// The cycle that would be closed if this owner waited for this key: everybody in it waits for the next one, the last one for the first.
pub(super) fn find(table: &LeaseTable, owner: &Arc<str>, key: &LeaseKey) -> Option<Vec<Arc<str>>> {
    table.owners.get(owner)?;
    let start = Who::Named(Arc::clone(owner));
    // Whom each one was found waiting for.
    let mut waits_for: HashMap<Who, Who> = HashMap::new();
    let mut scanned: HashMap<Lane<'_>, Arrival> = HashMap::new();
    let mut todo = vec![start.clone()];
    while let Some(blocker) = todo.pop() {
        for place in places(table, &blocker) {
            for ticket in behind(table, place, &mut scanned) {
                let Some(slot) = table.slots.get(&ticket) else { continue };
                let waiter = slot.owner.clone().map_or(Who::Unnamed(ticket), Who::Named);
                if waiter == start {
                    continue;
                }
                let Entry::Vacant(unseen) = waits_for.entry(waiter.clone()) else { continue };
                unseen.insert(blocker.clone());
                let in_the_way = match &waiter {
                    Who::Named(name) => table.in_own_way(name, key).is_some(),
                    Who::Unnamed(_) => slot.key.excludes(key),
                };
                if in_the_way {
                    return Some(path(&start, waiter, &waits_for));
                }
                todo.push(waiter);
            }
        }
    }
    None
}

fn path(start: &Who, last: Who, waits_for: &HashMap<Who, Who>) -> Vec<Arc<str>> {
    let mut names = vec![start.name()];
    let mut at = &last;
    while at != start {
        names.push(at.name());
        match waits_for.get(at) {
            Some(next) => at = next,
            None => break,
        }
    }
    names
}

/// Everything that somebody holds or awaits.
fn places(table: &LeaseTable, who: &Who) -> Vec<Ticket> {
    match who {
        Who::Named(name) => table.owners.get(name).into_iter().flat_map(|own| own.values().flatten().copied()).collect(),
        Who::Unnamed(ticket) => vec![*ticket],
    }
}

/// Those who wait because of this place, without those that were answered before.
fn behind<'a>(table: &'a LeaseTable, place: Ticket, scanned: &mut HashMap<Lane<'a>, Arrival>) -> Vec<Ticket> {
    let mut found = Vec::new();
    let Some(slot) = table.slots.get(&place) else { return found };
    let Some(locks) = table.runs.get(&slot.key.run) else { return found };
    let from = match slot.phase {
        Phase::Waiting { .. } => slot.arrival.saturating_add(1),
        _ => 0,
    };
    // What is left to look at in a part of the queue.
    let mut unseen = |lane: Lane<'a>| {
        let until = scanned.entry(lane).or_insert(Arrival::MAX);
        let left = from.min(*until)..*until;
        *until = left.start;
        left
    };
    let run = &slot.key.run;
    found.extend(locks.whole_waiters.range(unseen(Lane::Wholes(run))).map(look).map(|(_, ticket)| *ticket));
    match &slot.key.node {
        None => found.extend(locks.node_order.range(unseen(Lane::Nodes(run))).map(look).map(|(_, (_, ticket))| *ticket)),
        Some(node) => {
            if let Some(queue) = locks.node_waiters.get(node) {
                found.extend(queue.range(unseen(Lane::Node(run, node))).map(look).map(|(_, ticket)| *ticket));
            }
        }
    }
    found
}
