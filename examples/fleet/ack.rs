//! The ack log of a worker process: one JSON line for everything that it was told.
//!
//! | member | meaning |
//! |---|---|
//! | `run`, `node` | the node of the run |
//! | `status` | `running`: it was claimed; `success`: it was completed; `refused`: what this worker said under the claim came too late |
//! | `attempt`, `token` | the attempt and the fencing token of the claim |
//! | `before`, `after` | the run's version before and after the commit; 0 where there was none |
//! | `seq` | the commit's place in the order of the store; `null` where there was none |
//! | `tx`, `of` | a name for the commit, and how many lines it has: always 1 |
//! | `worker` | the process |
//!
//! A line goes to the kernel with one `write(2)` in append mode, after the acknowledgement and before the executor goes on. A killed process may leave
//! out its last lines, or leave one that is cut off: the reader passes over that.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use seeknal_state::{Claim, Commit, FencingToken, NodeId, RunId};

/// One thing that a worker was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) run: RunId,
    pub(crate) node: NodeId,
    pub(crate) status: String,
    pub(crate) attempt: u32,
    pub(crate) token: FencingToken,
    pub(crate) before: u64,
    pub(crate) after: u64,
    pub(crate) seq: Option<u64>,
    pub(crate) tx: String,
    pub(crate) of: usize,
    pub(crate) worker: String,
}

/// What a line says of a claim that is about to end.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    run: RunId,
    node: NodeId,
    attempt: u32,
    token: FencingToken,
}

impl Subject {
    pub(crate) fn of(claim: &Claim) -> Self {
        let (run, node) = (claim.run_id().clone(), claim.node_id().clone());
        Self { run, node, attempt: claim.attempt(), token: claim.token() }
    }
}

/// Writes the ack log of one process.
#[derive(Debug)]
pub(crate) struct Scribe {
    path: PathBuf,
    log: File,
    worker: String,
    next: AtomicU64,
}

impl Scribe {
    pub(crate) fn open(path: &Path, worker: &str) -> io::Result<Self> {
        let log = OpenOptions::new().append(true).create_new(true).open(path);
        let log = log.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Self { path: path.to_owned(), log, worker: worker.to_owned(), next: AtomicU64::new(1) })
    }

    /// Notes what was told of a claim; without a commit it was refused.
    pub(crate) fn note(&self, subject: &Subject, status: &str, commit: Option<&Commit>) -> io::Result<()> {
        let Subject { run, node, attempt, token } = subject.clone();
        let versions = commit.and_then(|commit| commit.runs.first());
        let line = Line {
            run,
            node,
            status: status.to_owned(),
            attempt,
            token,
            before: versions.map_or(0, |run| run.before.0),
            after: versions.map_or(0, |run| run.after.0),
            seq: commit.and_then(|commit| commit.seq).map(|seq| seq.0),
            tx: format!("{}-{}", self.worker, self.next.fetch_add(1, Ordering::Relaxed)),
            of: 1,
            worker: self.worker.clone(),
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        let mut log = &self.log;
        log.write_all(&text).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.path.display())))
    }
}

/// All lines of all ack logs in a folder.
pub(crate) fn read_all(folder: &Path) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let text = std::fs::read(&path)?;
        // What is behind the last newline was cut off by a kill.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for line in text.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let read = serde_json::from_slice(line);
            lines.push(read.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))?);
        }
    }
    Ok(lines)
}
