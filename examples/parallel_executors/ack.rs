//! The ack log: one JSON line for every row that an acknowledged write changed.
//!
//! | member | meaning |
//! |---|---|
//! | `run`, `node` | the row: a node of a run; `node` is `null` for the run's header |
//! | `status`, `attempt` | what was written (`attempt` is `null` for a header) |
//! | `rows`, `interval`, `partition` | what was completed with it, where something was |
//! | `before`, `after` | the run's version before and after the transaction; the row carries `after` until the next write |
//! | `seq` | the transaction's place in the order of the store; `null` where the call tells none (taking over a run) |
//! | `tx`, `of` | the transaction, and how many lines it has: all rows of a transaction are on disk, or none |
//!
//! The lines of a transaction go to the kernel with one `write(2)` in append mode, after the acknowledgement and before the executor's next write. A
//! line that is cut off can only be the last thing that a killed process did; the next process ends it with a newline, and the
//! reader passes over it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use seeknal_state::{Commit, NodeId, RunId};

/// One row that an acknowledged transaction changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) run: RunId,
    pub(crate) node: Option<NodeId>,
    pub(crate) status: String,
    pub(crate) attempt: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rows: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<(String, String)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) partition: Option<String>,
    pub(crate) before: u64,
    pub(crate) after: u64,
    pub(crate) seq: Option<u64>,
    pub(crate) tx: String,
    pub(crate) of: usize,
}

/// What was written to one row, before the versions are known.
#[derive(Debug, Clone)]
pub(crate) struct Said {
    pub(crate) run: RunId,
    pub(crate) node: Option<NodeId>,
    pub(crate) status: String,
    pub(crate) attempt: Option<u32>,
    pub(crate) rows: Option<u64>,
    pub(crate) interval: Option<(String, String)>,
    pub(crate) partition: Option<String>,
}

impl Said {
    /// A status of a node, in an attempt.
    pub(crate) fn node(run: &RunId, node: &NodeId, status: &str, attempt: u32) -> Self {
        Self {
            run: run.clone(),
            node: Some(node.clone()),
            status: status.to_owned(),
            attempt: Some(attempt),
            rows: None,
            interval: None,
            partition: None,
        }
    }

    /// A status of a run.
    pub(crate) fn header(run: &RunId, status: &str) -> Self {
        Self {
            run: run.clone(),
            node: None,
            status: status.to_owned(),
            attempt: None,
            rows: None,
            interval: None,
            partition: None,
        }
    }
}

/// Keeps what the executors were told: in memory for the check at the end, and in the ack log if there is one.
#[derive(Debug)]
pub(crate) struct Scribe {
    log: Option<(PathBuf, File)>,
    told: Mutex<Vec<Line>>,
    process: String,
    next: AtomicU64,
}

impl Scribe {
    /// Begins, or goes on with an ack log.
    pub(crate) fn open(path: Option<&Path>) -> io::Result<Self> {
        let log = path.map(|path| Ok::<_, io::Error>((path.to_owned(), open_log(path)?))).transpose()?;
        let process = uuid::Uuid::now_v7().simple().to_string().split_off(20);
        Ok(Self { log, told: Mutex::default(), process, next: AtomicU64::new(1) })
    }

    /// A name for a transaction that no other one has, also of other processes.
    pub(crate) fn new_tx(&self) -> String {
        format!("{}-{}", self.process, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Notes a transaction that was acknowledged.
    pub(crate) fn acknowledged(&self, tx: &str, commit: &Commit, rows: Vec<Said>) -> io::Result<()> {
        let versions: BTreeMap<_, _> = commit.runs.iter().map(|run| (&run.run, (run.before.0, run.after.0))).collect();
        let of = rows.len();
        let seq = commit.seq.map(|seq| seq.0);
        let lines = rows.into_iter().map(|said| {
            let (before, after) = versions.get(&said.run).copied().unwrap_or_default();
            Line::new(said, tx, of, before, after, seq)
        });
        self.note(lines.collect())
    }

    /// Notes lines of one transaction.
    pub(crate) fn note(&self, lines: Vec<Line>) -> io::Result<()> {
        if let Some((path, log)) = &self.log {
            let mut text = Vec::new();
            for line in &lines {
                serde_json::to_writer(&mut text, line)?;
                text.push(b'\n');
            }
            let mut log = log;
            log.write_all(&text).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        }
        self.told.lock().unwrap_or_else(PoisonError::into_inner).extend(lines);
        Ok(())
    }

    /// All that was told.
    pub(crate) fn told(&self) -> Vec<Line> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Line {
    pub(crate) fn new(said: Said, tx: &str, of: usize, before: u64, after: u64, seq: Option<u64>) -> Self {
        let Said { run, node, status, attempt, rows, interval, partition } = said;
        Self { run, node, status, attempt, rows, interval, partition, before, after, seq, tx: tx.to_owned(), of }
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut log = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(named)?;
    if log.seek(SeekFrom::End(0))? > 0 {
        log.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        log.read_exact(&mut last)?;
        if last != *b"\n" {
            log.write_all(b"\n").map_err(named)?;
        }
    }
    Ok(log)
}
