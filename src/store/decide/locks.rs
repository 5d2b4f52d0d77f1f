//! Leases as rows while a batch is decided: who holds what, what is granted and renewed, what goes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use chrono::{DateTime, Utc};

use super::{Numbers, Verdict, run_key};
use crate::model::{Fence, FencingToken, LeaseGrant, LeaseKey, LeaseMutation, LeaseRecord, Refusal, RunId};

/// A lease as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeaseRow {
    pub(crate) record: LeaseRecord,
    /// Whether it was not over when it was read, by the database's clock.
    pub(crate) valid: bool,
}

/// A lease that goes on for `ttl_ms` from the moment when this is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Renewed {
    pub(crate) token: FencingToken,
    /// For people.
    pub(crate) until: DateTime<Utc>,
    pub(crate) ttl_ms: u64,
}

/// What is to be written of leases, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LeaseWrites {
    /// Runs of which every lease goes, also such that were not read.
    pub(crate) freed: BTreeSet<RunId>,
    /// Leases that go, if they are still held under this token.
    pub(crate) removed: BTreeMap<LeaseKey, FencingToken>,
    /// Leases that are renewed.
    pub(crate) renewed: BTreeMap<LeaseKey, Renewed>,
    /// Leases that were granted; they replace what is in their place. They run from the moment when this is written.
    pub(crate) granted: BTreeMap<LeaseKey, LeaseRecord>,
}

impl LeaseWrites {
    /// Whether no lease changes.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The leases that were read, with what the batch did to them so far.
#[derive(Debug, Clone)]
pub(super) struct Locks {
    rows: BTreeMap<LeaseKey, LeaseRow>,
    writes: LeaseWrites,
}

impl Locks {
    pub(super) fn new(rows: Vec<LeaseRow>) -> Self {
        let rows = rows.into_iter().map(|row| (row.record.key.clone(), row)).collect();
        Self { rows, writes: LeaseWrites::default() }
    }

    pub(super) fn into_writes(self) -> LeaseWrites {
        self.writes
    }

    /// Whether a lease is held under this token, and not over.
    pub(super) fn holds(&self, fence: &Fence) -> bool {
        self.rows.get(&fence.key).is_some_and(|row| row.valid && row.record.token == fence.token)
    }

    /// A lease that is held on a run or one of its nodes.
    pub(super) fn holder(&self, run: &RunId) -> Option<&LeaseRecord> {
        self.of_run(run).find(|row| row.valid).map(|row| &row.record)
    }

    fn of_run(&self, run: &RunId) -> impl Iterator<Item = &LeaseRow> {
        // A run's own key sorts before those of its nodes.
        self.rows
            .range((Bound::Included(run_key(run)), Bound::Unbounded))
            .take_while(move |(key, _)| key.run == *run)
            .map(|(_, row)| row)
    }

    /// Takes all leases of a run away: it ended, or it was deleted.
    pub(super) fn free(&mut self, run: &RunId) {
        self.rows.retain(|key, _| key.run != *run);
        self.writes.removed.retain(|key, _| key.run != *run);
        self.writes.renewed.retain(|key, _| key.run != *run);
        self.writes.granted.retain(|key, _| key.run != *run);
        self.writes.freed.insert(run.clone());
    }

    fn remove(&mut self, key: &LeaseKey) {
        let Some(row) = self.rows.remove(key) else { return };
        self.writes.renewed.remove(key);
        if self.writes.granted.remove(key).is_none() {
            self.writes.removed.insert(key.clone(), row.record.token);
        }
    }

    /// The leases that exclude this one.
    fn in_the_way(&self, key: &LeaseKey) -> Vec<&LeaseRow> {
        if key.node.is_none() {
            return self.of_run(&key.run).collect();
        }
        [&run_key(&key.run), key].into_iter().filter_map(|key| self.rows.get(key)).collect()
    }

    /// Makes one change; on refusal nothing is changed.
    pub(super) fn apply(&mut self, mutation: &LeaseMutation, tokens: &mut Numbers) -> Verdict<Option<LeaseGrant>> {
        match mutation {
            LeaseMutation::Grant { key, owner, purpose, at, ttl_ms } => {
                let others = self.in_the_way(key);
                if let Some(holder) = others.iter().find(|row| row.valid) {
                    return Ok(Err(Refusal::LeaseHeld { holder: Box::new(holder.record.clone()) }));
                }
                let over: Vec<LeaseKey> = others.into_iter().map(|row| row.record.key.clone()).collect();
                let token = FencingToken(tokens.take()?);
                for key in &over {
                    self.remove(key);
                }
                let record = LeaseRecord::new(key.clone(), token, owner.clone(), purpose.clone(), *at, *ttl_ms);
                self.rows.insert(key.clone(), LeaseRow { record: record.clone(), valid: *ttl_ms > 0 });
                self.writes.granted.insert(key.clone(), record);
                Ok(Ok(Some(LeaseGrant { key: key.clone(), token })))
            }
            LeaseMutation::Renew { key, token, at, ttl_ms } => {
                let Some(row) = self.rows.get_mut(key).filter(|row| row.valid && row.record.token == *token) else {
                    return Ok(Err(Refusal::LeaseGone { key: key.clone(), token: *token }));
                };
                let until = LeaseRecord { ttl_ms: *ttl_ms, ..row.record.clone() }.renewed(*at).until;
                (row.record.until, row.record.ttl_ms, row.valid) = (until, *ttl_ms, *ttl_ms > 0);
                match self.writes.granted.get_mut(key) {
                    Some(granted) => (granted.until, granted.ttl_ms) = (until, *ttl_ms),
                    None => {
                        self.writes.renewed.insert(key.clone(), Renewed { token: *token, until, ttl_ms: *ttl_ms });
                    }
                }
                Ok(Ok(Some(LeaseGrant { key: key.clone(), token: *token })))
            }
            LeaseMutation::Release { key, token } => {
                if self.rows.get(key).is_some_and(|row| row.record.token == *token) {
                    self.remove(key);
                }
                Ok(Ok(None))
            }
            LeaseMutation::Force { token } => {
                let held = self.rows.values().find(|row| row.valid && row.record.token == *token);
                if let Some(key) = held.map(|row| row.record.key.clone()) {
                    self.remove(&key);
                    return Ok(Ok(None));
                }
                // What the token was on, nobody knows any more.
                let run = RunId::new("(unknown)").map_err(Refusal::Input);
                Ok(Err(run.map_or_else(|refusal| refusal, |run| Refusal::LeaseGone { key: LeaseKey::run(run), token: *token })))
            }
        }
    }
}
