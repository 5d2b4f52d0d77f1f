//! The lease table: who holds, who waits, who is next. Pure: the caller brings the time, and nothing here is durable.
//!
//! A request passes through these states, each named by its ticket:
//!
//! ```text
//! ask ─► Waiting ─► Claimed ─► Held ─► Leaving ─► gone
//!  └────────────────▲  │ confirm (the token is known)   │ vacate
//!   nothing in the way └──────── vacate (it failed) ────┘
//! ```
//!
//! A claim stands in everybody's way already: between it and its confirmation a token is drawn, which may take a round trip to storage. A lease that
//! is leaving is nobody's any more, but what its holder wrote is still being flushed: it stands in the way until it is vacated.
//!
//! Fairness: a waiter is next when nothing that is held and nobody who came earlier excludes it. So waiters of one key are served in
//! their order; waiters of different nodes pass one another, but nobody passes a waiter for the whole run.
//!
//! Every step costs O(log n), whatever the length of the queue; only the search for a cycle looks at waiters, each of them once, and
//! it is made only for an owner that holds or awaits something else already.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::model::{FencingToken, LeaseKey, RunId};

use super::cycle;
use super::locks::{Arrival, Moved, RunLocks};

/// The name of one request, chosen by the caller and never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ticket(pub(super) u64);

/// A request for a lease.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) ticket: Ticket,
    pub(super) key: LeaseKey,
    /// `None`: a caller of its own, never the same as another.
    pub(super) owner: Option<Arc<str>>,
    /// Whether an owner that holds this very lease already shares it.
    pub(super) reentrant: bool,
    /// `None`: do not wait.
    pub(super) wait_until: Option<Duration>,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// Claimed: to be confirmed with a token, or vacated.
    Claimed,
    /// The owner holds it already and shares it once more.
    Joined(FencingToken),
    /// In the queue; it is told when it is claimed, or times out.
    Queued,
    /// Not free, and it did not want to wait.
    Busy,
    /// The owner stands in its own way: it holds this lease, which excludes what it asks for, or awaits it.
    Reentrant { own: LeaseKey },
    /// Waiting would close a cycle: everybody in it waits for the next one, the last one for the first.
    Deadlock { cycle: Vec<Arc<str>> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Waiting { until: Duration },
    Claimed,
    Held { token: FencingToken, count: u32, expires: Option<Duration> },
    Leaving,
}

/// One request where it stands.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) key: LeaseKey,
    pub(super) owner: Option<Arc<str>>,
    pub(super) arrival: Arrival,
    pub(super) phase: Phase,
}

/// What the end of a run, or of everything, takes from whom.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Cleared {
    /// Waiters: they are gone.
    pub(super) waiting: Vec<Ticket>,
    /// Claims: they stay until they are vacated.
    pub(super) claimed: Vec<Ticket>,
    /// Holders: they are leaving.
    pub(super) held: Vec<Ticket>,
}

/// What a release did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Released {
    /// Nobody holds a lease under this token (any more).
    Unknown,
    /// Its owner holds it still, because it had entered more than once.
    Shared,
    /// It is leaving: to be vacated.
    Leaving(Ticket),
}

/// All leases and waiters of one store, as far as this process knows them.
#[derive(Debug, Default)]
pub(super) struct LeaseTable {
    pub(super) slots: HashMap<Ticket, Slot>,
    pub(super) runs: HashMap<RunId, RunLocks>,
    tokens: HashMap<FencingToken, Ticket>,
    /// What each named owner holds and awaits (what is leaving is not among it).
    pub(super) owners: HashMap<Arc<str>, BTreeMap<LeaseKey, Vec<Ticket>>>,
    expiries: BTreeSet<(Duration, Ticket)>,
    timeouts: BTreeSet<(Duration, Ticket)>,
    arrivals: Arrival,
}

impl LeaseTable {
    /// Asks for a lease.
    pub(super) fn ask(&mut self, ask: Ask) -> Asked {
        if let Some(answer) = ask.owner.as_ref().and_then(|owner| self.ask_as_owner(owner, &ask)) {
            return answer;
        }
        let node = ask.key.node.as_ref();
        let admitted = self.runs.get(&ask.key.run).is_none_or(|locks| locks.admits(node));
        let phase = match (admitted, ask.wait_until) {
            (true, _) => Phase::Claimed,
            (false, None) => return Asked::Busy,
            (false, Some(until)) => Phase::Waiting { until },
        };
        if let (false, Some(owner)) = (admitted, &ask.owner) {
            // Who shares with an earlier request of its own waits for that one alone, and that one was checked.
            let shares = self.owners.get(owner).is_some_and(|own| own.contains_key(&ask.key));
            if let Some(cycle) = if shares { None } else { cycle::find(self, owner, &ask.key) } {
                return Asked::Deadlock { cycle };
            }
        }
        self.arrivals += 1;
        let arrival = self.arrivals;
        let locks = self.runs.entry(ask.key.run.clone()).or_default();
        match phase {
            Phase::Waiting { until } => {
                locks.enqueue(node, arrival, ask.ticket);
                self.timeouts.insert((until, ask.ticket));
            }
            _ => locks.occupy(node, ask.ticket),
        }
        if let Some(owner) = &ask.owner {
            self.owners.entry(Arc::clone(owner)).or_default().entry(ask.key.clone()).or_default().push(ask.ticket);
        }
        let Ask { ticket, key, owner, .. } = ask;
        self.slots.insert(ticket, Slot { key, owner, arrival, phase });
        if admitted { Asked::Claimed } else { Asked::Queued }
    }

    /// Decides a request whose owner has to do with the same run already; `None`: it is a request like any other.
    fn ask_as_owner(&mut self, owner: &Arc<str>, ask: &Ask) -> Option<Asked> {
        let own = self.in_own_way(owner, &ask.key)?;
        if !ask.reentrant || own != ask.key {
            return Some(Asked::Reentrant { own });
        }
        let held = self.owners.get(owner)?.get(&own)?.iter().copied().find_map(|ticket| match self.slots.get(&ticket)?.phase {
            Phase::Held { .. } => Some(ticket),
            _ => None,
        });
        match held {
            Some(ticket) => self.join(ticket).map(Asked::Joined),
            // Its first request is on its way: this one shares the lease as soon as that is confirmed.
            None => None,
        }
    }

    fn join(&mut self, holder: Ticket) -> Option<FencingToken> {
        match &mut self.slots.get_mut(&holder)?.phase {
            Phase::Held { token, count, .. } => {
                *count = count.saturating_add(1);
                Some(*token)
            }
            _ => None,
        }
    }

    /// A key that the owner holds or awaits and that excludes this one; the same key first.
    pub(super) fn in_own_way(&self, owner: &str, key: &LeaseKey) -> Option<LeaseKey> {
        let own = self.owners.get(owner)?;
        if own.contains_key(key) {
            return Some(key.clone());
        }
        let whole = LeaseKey::run(key.run.clone());
        let (first, _) = own.range(whole..).next()?;
        let excludes = first.run == key.run && (key.node.is_none() || first.node.is_none());
        excludes.then(|| first.clone())
    }

    /// Gives a claim its token. Without an expiry it is held until it is released. Answers with the waiters that share it at once: they are the same
    /// owner's, and asked to.
    pub(super) fn confirm(&mut self, ticket: Ticket, token: FencingToken, expires: Option<Duration>) -> Vec<Ticket> {
        let Some(slot) = self.slots.get_mut(&ticket) else { return Vec::new() };
        if slot.phase != Phase::Claimed {
            return Vec::new();
        }
        slot.phase = Phase::Held { token, count: 1, expires };
        self.tokens.insert(token, ticket);
        if let Some(expires) = expires {
            self.expiries.insert((expires, ticket));
        }
        let Some(owner) = &slot.owner else { return Vec::new() };
        let of_key = self.owners.get(owner).and_then(|own| own.get(&slot.key));
        let sharing: Vec<Ticket> = of_key.into_iter().flatten().copied().filter(|other| *other != ticket).collect();
        for waiter in &sharing {
            self.remove_waiter(*waiter);
            self.join(ticket);
        }
        sharing
    }

    /// Takes a waiter, a claim or a leaving lease away. Answers with the requests that are claimed now.
    pub(super) fn vacate(&mut self, ticket: Ticket) -> Vec<Ticket> {
        let Some(slot) = self.slots.get(&ticket) else { return Vec::new() };
        match slot.phase {
            Phase::Waiting { .. } => {
                let Some(slot) = self.remove_waiter(ticket) else { return Vec::new() };
                match &slot.key.node {
                    Some(node) => self.settle(&slot.key.run, &Moved::Node(node)),
                    None => self.settle(&slot.key.run, &Moved::Whole { from: slot.arrival }),
                }
            }
            Phase::Held { .. } => {
                self.leave(ticket);
                self.vacate(ticket)
            }
            Phase::Claimed | Phase::Leaving => {
                let Some(slot) = self.slots.remove(&ticket) else { return Vec::new() };
                self.forget_owner(&slot, ticket);
                let Some(locks) = self.runs.get_mut(&slot.key.run) else { return Vec::new() };
                locks.leave(slot.key.node.as_ref());
                match &slot.key.node {
                    Some(node) => self.settle(&slot.key.run, &Moved::Node(node)),
                    None => self.settle(&slot.key.run, &Moved::Whole { from: 0 }),
                }
            }
        }
    }

    fn remove_waiter(&mut self, ticket: Ticket) -> Option<Slot> {
        let slot = self.slots.remove(&ticket)?;
        if let Phase::Waiting { until } = slot.phase {
            self.timeouts.remove(&(until, ticket));
        }
        self.forget_owner(&slot, ticket);
        if let Some(locks) = self.runs.get_mut(&slot.key.run) {
            locks.dequeue(slot.key.node.as_ref(), slot.arrival);
        }
        Some(slot)
    }

    fn forget_owner(&mut self, slot: &Slot, ticket: Ticket) {
        let Some(owner) = &slot.owner else { return };
        let Some(own) = self.owners.get_mut(owner) else { return };
        if let Some(of_key) = own.get_mut(&slot.key) {
            of_key.retain(|other| *other != ticket);
            if of_key.is_empty() {
                own.remove(&slot.key);
            }
        }
        if own.is_empty() {
            self.owners.remove(owner);
        }
    }

    /// Claims for whoever is next after something moved out of the way.
    fn settle(&mut self, run: &RunId, moved: &Moved<'_>) -> Vec<Ticket> {
        let Some(locks) = self.runs.get_mut(run) else { return Vec::new() };
        let next = locks.admit_next(moved);
        if locks.is_free() {
            self.runs.remove(run);
        }
        for ticket in &next {
            if let Some(slot) = self.slots.get_mut(ticket) {
                if let Phase::Waiting { until } = slot.phase {
                    self.timeouts.remove(&(until, *ticket));
                }
                slot.phase = Phase::Claimed;
            }
        }
        next
    }

    /// Makes a held lease nobody's: its token is void at once, its place is free when it is vacated.
    fn leave(&mut self, ticket: Ticket) {
        let Some(slot) = self.slots.get_mut(&ticket) else { return };
        let Phase::Held { token, expires, .. } = slot.phase else { return };
        slot.phase = Phase::Leaving;
        self.tokens.remove(&token);
        if let Some(expires) = expires {
            self.expiries.remove(&(expires, ticket));
        }
        let Some(owner) = slot.owner.take() else { return };
        let gone = Slot { key: slot.key.clone(), owner: Some(owner), ..*slot };
        self.forget_owner(&gone, ticket);
    }

    /// Gives a lease back; an old token changes nothing.
    pub(super) fn release(&mut self, token: FencingToken) -> Released {
        let Some(ticket) = self.tokens.get(&token).copied() else { return Released::Unknown };
        if let Some(Slot { phase: Phase::Held { count, .. }, .. }) = self.slots.get_mut(&ticket)
            && *count > 1
        {
            *count -= 1;
            return Released::Shared;
        }
        self.leave(ticket);
        Released::Leaving(ticket)
    }

    /// Takes a lease away from its holder, however often it entered.
    pub(super) fn force(&mut self, token: FencingToken) -> Option<Ticket> {
        let ticket = self.tokens.get(&token).copied()?;
        self.leave(ticket);
        Some(ticket)
    }

    /// Moves the expiry of a lease that is held under this token and has not expired.
    pub(super) fn renew(&mut self, token: FencingToken, expires: Duration, now: Duration) -> bool {
        let Some(ticket) = self.tokens.get(&token).copied() else { return false };
        let Some(Slot { phase: Phase::Held { expires: known, .. }, .. }) = self.slots.get_mut(&ticket) else { return false };
        match *known {
            None => true,
            Some(old) if old <= now => false,
            Some(old) => {
                // Renewals may come to rest in another order than they began.
                let expires = expires.max(old);
                self.expiries.remove(&(old, ticket));
                self.expiries.insert((expires, ticket));
                *known = Some(expires);
                true
            }
        }
    }

    /// The holder of a token.
    pub(super) fn holder(&self, token: FencingToken) -> Option<Ticket> {
        self.tokens.get(&token).copied()
    }

    /// The leases that have expired: they are leaving, to be vacated before [`time_out`](Self::time_out) is asked, so that who waited long
    /// enough for a free lock is not told the contrary.
    pub(super) fn expire(&mut self, now: Duration) -> Vec<Ticket> {
        let mut expired = Vec::new();
        while let Some((_, ticket)) = self.expiries.first().filter(|(at, _)| *at <= now).copied() {
            self.leave(ticket);
            expired.push(ticket);
        }
        expired
    }

    /// The waiters whose time is up (they are gone), and the requests that are claimed because of it.
    pub(super) fn time_out(&mut self, now: Duration) -> (Vec<Ticket>, Vec<Ticket>) {
        let (mut late, mut next) = (Vec::new(), Vec::new());
        while let Some((_, ticket)) = self.timeouts.first().filter(|(at, _)| *at <= now).copied() {
            next.extend(self.vacate(ticket));
            late.push(ticket);
        }
        (late, next)
    }

    /// When [`expire`](Self::expire) or [`time_out`](Self::time_out) has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let first = |set: &BTreeSet<(Duration, Ticket)>| set.first().map(|(at, _)| *at);
        first(&self.expiries).into_iter().chain(first(&self.timeouts)).min()
    }

    /// Ends everything on a run but the leases that stay: waiters go, holders leave, claims stay until they are vacated.
    pub(super) fn clear_run(&mut self, run: &RunId, stays: impl Fn(&LeaseKey, FencingToken) -> bool) -> Cleared {
        let Some(locks) = self.runs.get(run) else { return Cleared::default() };
        let mut cleared = Cleared { waiting: locks.waiters(), ..Cleared::default() };
        for ticket in locks.occupants() {
            let Some(slot) = self.slots.get(&ticket) else { continue };
            match slot.phase {
                Phase::Claimed => cleared.claimed.push(ticket),
                Phase::Held { token, .. } if !stays(&slot.key, token) => {
                    self.leave(ticket);
                    cleared.held.push(ticket);
                }
                _ => {}
            }
        }
        // Nobody can be next while waiters go: all of them go.
        for ticket in &cleared.waiting {
            self.remove_waiter(*ticket);
        }
        if self.runs.get(run).is_some_and(RunLocks::is_free) {
            self.runs.remove(run);
        }
        cleared
    }

    /// The runs on which anything is held or awaited.
    pub(super) fn run_ids(&self) -> impl Iterator<Item = &RunId> {
        self.runs.keys()
    }

    /// Whether nothing is held, claimed, leaving or awaited.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
