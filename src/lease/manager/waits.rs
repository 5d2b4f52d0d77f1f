//! Waiting for other processes, where leases are rows: who was refused looks again, and asks only when it finds its place free.
//!
//! Looking is one question for all who wait here, and reads only; asking is a transaction. A look is due when the backend's pause is over, and at
//! once when other processes committed.
//!
//! Who holds a lease learns by the same look that another process took it away: once a second at most where others commit, however many leases are held here.
//! One that is not found is asked for by a renewal, which storage decides.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::lease::error::LostReason;
use crate::lease::rows::{self, Doubt};
use crate::lease::table::Ticket;
use crate::model::{FencingToken, LeaseRecord, RunId};
use crate::store::StoreError;

use super::{Holding, Manager, Store};

/// Between two looks at least, however often others commit.
const BREATH: Duration = Duration::from_millis(5);
/// Between two looks for what is held here at least.
const HELD: Duration = Duration::from_secs(1);

/// Who waits for other processes.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// When to look again.
    again: BTreeSet<(Duration, Ticket)>,
    /// Who waits for the look that is under way.
    due: Vec<Ticket>,
    under_way: bool,
    /// Others committed since the look under way began.
    stale: bool,
    /// When the last look began.
    looked: Duration,
    /// When to look for what is held here.
    held_due: Option<Duration>,
    /// When that was done last.
    held_looked: Option<Duration>,
    /// What is held here, for the look that is under way.
    held: Vec<FencingToken>,
}

impl Waits {
    pub(super) fn next(&self) -> Option<Duration> {
        // While a look is under way its answer is the next thing to happen.
        self.again.first().map(|(at, _)| *at).into_iter().chain(self.held_due).min().filter(|_| !self.under_way)
    }
}

impl Manager {
    /// A request met the lease of another process: it looks again later, or its time is up.
    pub(super) fn wait_for(&mut self, ticket: Ticket, holder: &LeaseRecord) {
        let now = self.now();
        let Some(pending) = self.pending.get_mut(&ticket) else { return };
        let until = pending.wait_until.filter(|until| pending.reply.is_some() && now < *until);
        let (Some(until), Store::Rows { waits, .. }) = (until, &mut self.store) else { return self.fail(ticket, Ok(None)) };
        pending.refused = pending.refused.saturating_add(1);
        let left = holder.until.signed_duration_since(self.context.now()).to_std().ok().filter(|left| !left.is_zero());
        let pause = if waits.stale { BREATH } else { jitter(self.context.backend.lock_poll(), ticket, pending.refused) };
        // The expiry is on somebody's wall clock: a hint to look sooner, never later.
        let pause = left.map_or(pause, |left| pause.min(left)).max(Duration::from_millis(1));
        waits.again.insert((now.saturating_add(pause).min(until), ticket));
    }

    /// Looks for those whose time has come.
    pub(super) fn look(&mut self, now: Duration) {
        let Store::Rows { waits, .. } = &mut self.store else { return };
        while !waits.under_way
            && let Some((at, ticket)) = waits.again.first().filter(|(at, _)| *at <= now).copied()
        {
            waits.again.remove(&(at, ticket));
            waits.due.push(ticket);
        }
        if !waits.under_way && waits.held_due.is_some_and(|at| at <= now) {
            (waits.held_due, waits.held_looked) = (None, Some(now));
            // Those that are granted from now on are no news to anybody.
            waits.held.extend(self.held.values().map(|held| held.grant.token));
        }
        let is_asked = !waits.due.is_empty() || !waits.held.is_empty();
        if is_asked && !waits.under_way {
            (waits.under_way, waits.stale, waits.looked) = (true, false, now);
            rows::look(&self.context, &self.myself);
        }
    }

    /// Other processes committed: everybody looks now, and what is held here may be gone.
    pub(in crate::lease) fn foreign(&mut self) {
        let now = self.now();
        let Store::Rows { waits, .. } = &mut self.store else { return };
        waits.stale = true;
        let soonest = now.max(waits.looked.saturating_add(BREATH));
        if !self.held.is_empty() {
            let soonest = waits.held_looked.map_or(now, |looked| now.max(looked.saturating_add(HELD)));
            waits.held_due = waits.held_due.or(Some(soonest));
        }
        waits.again = std::mem::take(&mut waits.again).into_iter().map(|(at, ticket)| (at.min(soonest), ticket)).collect();
        self.catch_up();
    }

    /// What a look found.
    pub(in crate::lease) fn looked(&mut self, found: Result<Vec<LeaseRecord>, StoreError>) {
        let Store::Rows { waits, .. } = &mut self.store else { return };
        waits.under_way = false;
        let held = std::mem::take(&mut waits.held);
        match &found {
            Ok(found) => self.doubt(held, found),
            Err(_) if !held.is_empty() => {
                let again = self.now().saturating_add(HELD);
                if let Store::Rows { waits, .. } = &mut self.store {
                    waits.held_due.get_or_insert(again);
                }
            }
            Err(_) => {}
        }
        let Store::Rows { waits, .. } = &mut self.store else { return };
        for ticket in std::mem::take(&mut waits.due) {
            let Some(pending) = self.pending.get(&ticket).filter(|pending| !pending.in_flight) else { continue };
            let holder = found.as_ref().ok().and_then(|found| found.iter().find(|lease| lease.key.excludes(&pending.key)));
            match holder {
                Some(holder) => self.wait_for(ticket, holder),
                // Free, as far as one can see; or storage has something to say that a grant will say better.
                None => self.attempt(ticket),
            }
        }
        self.catch_up();
    }
}

impl Manager {
    /// Leases of this process that are not among those that are held, as storage has them.
    fn doubt(&mut self, held: Vec<FencingToken>, found: &[LeaseRecord]) {
        let found: HashSet<FencingToken> = found.iter().map(|lease| lease.token).collect();
        let mut doubted: HashMap<(RunId, bool), Vec<FencingToken>> = HashMap::new();
        for token in held.into_iter().filter(|token| !found.contains(token)) {
            let Some(Holding { grant, in_run, .. }) = self.table.holder(token).and_then(|holder| self.held.get(&holder)) else {
                continue;
            };
            if !grant.returning.load(Ordering::Acquire) {
                doubted.entry((grant.key.run.clone(), *in_run)).or_default().push(token);
            }
        }
        if !doubted.is_empty() {
            let doubts = doubted.into_iter().map(|((run, was_there), tokens)| Doubt { run, was_there, tokens }).collect();
            rows::ask_why(&self.context, &self.myself, doubts);
        }
    }

    /// Why leases may be gone, for who asks storage whether they are.
    pub(in crate::lease) fn doubted(&mut self, tokens: &[FencingToken], why: LostReason) {
        for token in tokens {
            let Some(held) = self.table.holder(*token).and_then(|holder| self.held.get(&holder)) else { continue };
            match &self.store {
                Store::Rows { keeper, .. } if held.grant.keep_alive => keeper.doubt(*token, why),
                // Nobody but its holder renews it.
                _ => self.lost(*token, why),
            }
        }
    }
}

/// Two to four thirds of a pause, different for every waiter and every time, so that processes do not look in step.
fn jitter(pause: Duration, ticket: Ticket, round: u32) -> Duration {
    let mut mixed = ticket
        .0
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(u64::from(round))
        .wrapping_add(u64::from(std::process::id()) << 32);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    let share = u32::try_from((mixed >> 33) % 667).unwrap_or(0);
    pause.saturating_mul(667 + share) / 1000
}
