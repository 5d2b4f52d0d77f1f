//! A loop on one thread that writes rows in transactions of a fixed size: no actors, no checks, no acknowledgements.

use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, params};
use tokio::runtime::Runtime;

use super::database::{self, PUT_NODE, STAMP, run};
use crate::Outcome;
use crate::measure::{Contender, Dice, Sample, steadily};
use crate::workload::{Field, NODES, RUNS};

/// What is written for a transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// What our backend writes: the node, the run's version, and once a batch its id with the answers and the counters; as they come.
    Same,
    /// The same, in the order of the keys, every row once: the best that a batch allows.
    Sorted,
    /// The same as they come, through the VFS that our backend uses: the loop as somebody would write it who has what we have.
    Gathered,
    /// The node alone.
    NodesAlone,
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "same rows",
            Self::Sorted => "same, sorted",
            Self::Gathered => "same, gathered",
            Self::NodesAlone => "nodes alone",
        })
    }
}

/// As many answers as our backend keeps, and removes together.
const ANSWERS_KEPT: usize = 512;
const ANSWERS_AT_ONCE: usize = 256;
/// About what an answer takes in the short form.
const ANSWER_BYTES: usize = 5;

/// The loop.
pub(crate) struct RawLoop {
    conn: Connection,
    field: Field,
    rows: Rows,
    /// Transitions in a transaction, and nodes in a transition.
    batch: usize,
    width: usize,
    versions: Vec<i64>,
    seq: i64,
    told: VecDeque<[u8; 16]>,
    dice: Dice,
}

impl RawLoop {
    pub(crate) fn open(runtime: &Runtime, folder: &Path, rows: Rows, batch: usize, width: usize) -> Outcome<Self> {
        let field = Field::new(RUNS, NODES)?;
        let conn = database::sown(runtime, folder, &field, rows == Rows::Gathered)?;
        Ok(Self {
            conn,
            field,
            rows,
            batch,
            width,
            versions: vec![1_000; RUNS],
            seq: 1_000_000,
            told: VecDeque::new(),
            dice: Dice::new(7),
        })
    }

    /// Writes the rows of so many transitions.
    pub(super) fn transaction(&mut self, batch: usize) -> Outcome<u64> {
        let mut picked = Vec::with_capacity(batch * self.width);
        for _ in 0..batch {
            let run = self.dice.below(RUNS);
            picked.extend((0..self.width).map(|_| (run, self.dice.below(NODES))));
        }
        if self.rows == Rows::Sorted {
            picked.sort_unstable();
            picked.dedup();
        }
        run(&self.conn, "BEGIN IMMEDIATE")?;
        {
            let mut put_node = self.conn.prepare_cached(PUT_NODE)?;
            let mut put_version =
                self.conn.prepare_cached("UPDATE runs SET version = ?2, nodes_deleted_version = ?3 WHERE run_id = ?1")?;
            for (index, (at, node)) in picked.iter().enumerate() {
                let (Some(run), Some(node), Some(version)) =
                    (self.field.runs.get(*at), self.field.nodes.get(*node), self.versions.get_mut(*at))
                else {
                    return Err("the field is smaller than the dice".into());
                };
                // The last row of a transition (sorted: of a run) brings the run's version.
                let last = match self.rows {
                    Rows::Same | Rows::Gathered => (index + 1) % self.width == 0,
                    Rows::Sorted => picked.get(index + 1).is_none_or(|(next, _)| next != at),
                    Rows::NodesAlone => false,
                };
                let rows = i64::try_from(self.dice.next() >> 24)?;
                let none: Option<&str> = None;
                put_node.execute(params![
                    run.as_str(),
                    node.as_str(),
                    "success",
                    1,
                    none,
                    STAMP,
                    none,
                    rows,
                    none,
                    none,
                    none,
                    none,
                    none,
                    *version + 1,
                    STAMP
                ])?;
                if last {
                    *version += 1;
                    put_version.execute(params![run.as_str(), *version, 0])?;
                }
            }
        }
        if self.rows != Rows::NodesAlone {
            self.close_batch(batch)?;
        }
        run(&self.conn, "COMMIT")?;
        Ok(u64::try_from(batch)?)
    }

    /// What is written once a batch.
    fn close_batch(&mut self, batch: usize) -> Outcome<()> {
        let id = uuid::Uuid::now_v7().into_bytes();
        let answers = vec![1_u8; 1 + ANSWER_BYTES * batch];
        let conn = &self.conn;
        conn.prepare_cached("INSERT INTO batches (id, at, answers) VALUES (?1, ?2, ?3)")?.execute(params![
            id.as_slice(),
            STAMP,
            answers
        ])?;
        self.seq += i64::try_from(batch)?;
        conn.prepare_cached("UPDATE meta SET seq = ?1, token = ?2 WHERE id = 1")?.execute([self.seq, 0])?;
        self.told.push_back(id);
        if self.told.len() > ANSWERS_KEPT + ANSWERS_AT_ONCE {
            let mut forget = conn.prepare_cached("DELETE FROM batches WHERE id = ?1")?;
            for id in self.told.drain(..ANSWERS_AT_ONCE) {
                forget.execute([id.as_slice()])?;
            }
        }
        Ok(())
    }
}

impl Contender for RawLoop {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        steadily(lasting, || self.transaction(self.batch))
    }
}
