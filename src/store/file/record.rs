//! One accepted entry as a line of JSON, and back. An operator can `grep` a journal for a run, a node or a sequence number.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use crate::model::{
    BatchId, CommitSeq, Entry, FencingToken, LeaseRecord, LoggedPart, Mutation, NodeId, Receipt, Retained, RunId, RunPart,
    RunReceipt, Version,
};

/// An accepted entry on its way to the journal: nothing is copied.
pub(super) struct Line<'a> {
    pub(super) batch: BatchId,
    pub(super) entry: &'a Entry,
    pub(super) receipt: &'a Receipt,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("seq", &self.receipt.seq)?;
        map.serialize_entry("batch", &self.batch)?;
        map.serialize_entry("runs", &Parts(&self.entry.parts, &self.receipt.runs))?;
        if !self.entry.retained.is_empty() {
            map.serialize_entry("retained", &self.entry.retained)?;
        }
        map.end()
    }
}

struct Parts<'a>(&'a [RunPart], &'a [RunReceipt]);

impl Serialize for Parts<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Part<'a> {
            run: &'a RunId,
            before: Version,
            after: Version,
            mutations: &'a [Mutation],
        }
        serializer.collect_seq(self.0.iter().zip(self.1).map(|(part, receipt)| Part {
            run: &part.run,
            before: receipt.before,
            after: receipt.after,
            mutations: &part.mutations,
        }))
    }
}

/// A line of a data frame as it was found.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    pub(super) seq: CommitSeq,
    #[serde(default)]
    pub(super) runs: Vec<LoggedPart>,
    #[serde(default)]
    pub(super) retained: Vec<(NodeId, Retained)>,
}

/// The payload of a frame of leases.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Leases {
    pub(super) leases: Vec<LeaseRecord>,
    /// Those of them that their guards keep alive: as long as the writer lives, they are renewed at any time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) kept: Vec<FencingToken>,
}

impl Leases {
    /// As they are to be listed at a time at which the writer lives.
    pub(super) fn at(&self, now: DateTime<Utc>) -> Vec<LeaseRecord> {
        let kept: HashSet<FencingToken> = self.kept.iter().copied().collect();
        let present = |lease: &LeaseRecord| {
            if kept.contains(&lease.token) { lease.clone().renewed(now) } else { lease.clone() }
        };
        self.leases.iter().map(present).collect()
    }
}
