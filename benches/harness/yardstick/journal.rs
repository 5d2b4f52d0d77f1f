//! A loop on one thread that appends the same lines to a journal: serialise, checksum, write into space that is there, sync.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use seeknal_state::model::{BatchId, CommitSeq, Mutation};
use seeknal_state::{Clock, NodeUpdate, RunId, SystemClock, Version};
use serde::Serialize;

use crate::Outcome;
use crate::measure::{Contender, Dice, Sample, steadily};
use crate::workload::{Field, NODES, RUNS};

/// Space of the journal; at its end the loop begins anew, so that it always overwrites.
const SPACE: usize = 64 << 20;
/// Head of a frame.
const HEAD: usize = 32;

/// A line of the file backend's journal.
#[derive(Serialize)]
struct Line<'a> {
    seq: CommitSeq,
    batch: BatchId,
    runs: [Part<'a>; 1],
}

#[derive(Serialize)]
struct Part<'a> {
    run: &'a RunId,
    before: Version,
    after: Version,
    mutations: &'a [Mutation],
}

/// The loop.
pub(crate) struct RawJournal {
    file: File,
    field: Field,
    batch: usize,
    width: usize,
    versions: Vec<Version>,
    seq: u64,
    end: u64,
    buffer: Vec<u8>,
    dice: Dice,
}

impl RawJournal {
    pub(crate) fn create(folder: &Path, batch: usize, width: usize) -> Outcome<Self> {
        std::fs::create_dir_all(folder)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(folder.join("journal"))?;
        file.write_all_at(&vec![0_u8; SPACE], 0)?;
        file.sync_all()?;
        let field = Field::new(RUNS, NODES)?;
        let versions = vec![Version(1_000); RUNS];
        Ok(Self { file, field, batch, width, versions, seq: 0, end: 0, buffer: Vec::new(), dice: Dice::new(7) })
    }

    fn append(&mut self) -> Outcome<u64> {
        self.buffer.clear();
        self.buffer.resize(HEAD, 0);
        let (batch, at) = (BatchId::generate(), SystemClock.now());
        let mut mutations = Vec::with_capacity(self.width);
        for _ in 0..self.batch {
            let index = self.dice.below(RUNS);
            mutations.clear();
            for _ in 0..self.width {
                let node = self.field.nodes.get(self.dice.below(NODES)).ok_or("the field is smaller than the dice")?.clone();
                let update = Box::new(NodeUpdate::success().row_count(self.dice.next() >> 24));
                mutations.push(Mutation::SetNode { node, update, at });
            }
            let (Some(run), Some(version)) = (self.field.runs.get(index), self.versions.get_mut(index)) else {
                return Err("the field is smaller than the dice".into());
            };
            let before = *version;
            *version = version.next();
            self.seq += 1;
            let line =
                Line { seq: CommitSeq(self.seq), batch, runs: [Part { run, before, after: *version, mutations: &mutations }] };
            serde_json::to_writer(&mut self.buffer, &line)?;
            self.buffer.push(b'\n');
        }
        let (head, payload) = self.buffer.split_at_mut(HEAD);
        let sum = crc32c::crc32c(payload);
        for (to, from) in head.iter_mut().zip(sum.to_le_bytes()) {
            *to = from;
        }
        if self.end + u64::try_from(self.buffer.len())? > u64::try_from(SPACE)? {
            self.end = 0;
        }
        self.file.write_all_at(&self.buffer, self.end)?;
        self.file.sync_data()?;
        self.end += u64::try_from(self.buffer.len())?;
        Ok(u64::try_from(self.batch)?)
    }
}

impl Contender for RawJournal {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        steadily(lasting, || self.append())
    }
}
