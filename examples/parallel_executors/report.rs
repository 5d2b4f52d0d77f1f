//! What the user is told.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use seeknal_state::{Commit, Error, NodeId, NodeStatus, RunId, RunState};

use crate::Failure;
use crate::check::{Findings, Stored};
use crate::dag::Dag;
use crate::executor::{Hostage, Takeover, Tally};

/// How many problems are shown.
const SHOWN: usize = 25;

/// Something that can be told in half a line.
pub(crate) trait Sentence {
    fn sentence(&self) -> String;
}

/// A run that was taken over from a dead process.
#[derive(Debug)]
pub(crate) struct Resumed {
    run: RunId,
    worker: String,
    ended: usize,
    running: usize,
    nodes: usize,
    freed: usize,
}

impl Resumed {
    pub(crate) fn new(run: &RunId, old: &RunState, now: &RunState, freed: usize) -> Self {
        let count = |wanted: &dyn Fn(&NodeStatus) -> bool| now.nodes().filter(|(_, node)| wanted(&node.status)).count();
        Self {
            run: run.clone(),
            worker: old.header().worker.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string),
            ended: count(&|status| status.is_ended() && *status != NodeStatus::Failed),
            running: count(&|status| *status == NodeStatus::Running),
            nodes: now.node_count(),
            freed,
        }
    }
}

/// What became of the executor that was killed.
#[derive(Debug)]
pub(crate) struct Story {
    pub(crate) hostage: Hostage,
    pub(crate) takeover: Option<Takeover>,
    pub(crate) late: Result<Commit, Error>,
}

impl Story {
    /// What is wrong with it.
    pub(crate) fn problem(&self) -> Option<String> {
        match (&self.takeover, &self.late) {
            (_, Ok(commit)) => {
                Some(format!("the killed executor wrote version {} under a lock that it had lost", commit.version()))
            }
            (_, Err(error)) if !matches!(error, Error::LeaseLost(_)) => {
                Some(format!("the late write failed for another reason: {error}"))
            }
            (None, _) => Some("nobody took over the node of the killed executor alone".to_owned()),
            (Some(takeover), _) if takeover.token <= self.hostage.token => {
                Some(format!("the lock was taken over with token {}, which is not above {}", takeover.token, self.hostage.token))
            }
            _ => None,
        }
    }
}

/// All that the end tells.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) begun: Vec<RunId>,
    pub(crate) resumed: Vec<Resumed>,
    pub(crate) story: Option<Story>,
    pub(crate) unchanged: usize,
    pub(crate) findings: Findings,
    failures: u64,
    pairs: u64,
    over_two_runs: u64,
    lost_locks: u64,
}

impl Summary {
    /// The runs that this job worked on.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &RunId> {
        self.resumed.iter().map(|resumed| &resumed.run).chain(&self.begun)
    }

    pub(crate) fn count(&mut self, tally: &Tally) {
        self.failures = tally.failures.load(Ordering::Relaxed);
        self.pairs = tally.pairs.load(Ordering::Relaxed);
        self.over_two_runs = tally.over_two_runs.load(Ordering::Relaxed);
        self.lost_locks = tally.lost_locks.load(Ordering::Relaxed);
    }
}

pub(crate) fn opened(project: &Path, backend: &str, location: &str, notices: &[String]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "project   {}", project.display())?;
    writeln!(out, "state     {backend} backend, {location}")?;
    for notice in notices {
        writeln!(out, "notice    {notice}")?;
    }
    Ok(())
}

pub(crate) fn pipeline(dag: &Dag, own: &BTreeSet<NodeId>, runs: usize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if runs > 0 {
        writeln!(out, "found     {}", earlier(runs))?;
    }
    let whose = if own.is_empty() { "made-up nodes" } else { "nodes of the state itself" };
    writeln!(out, "pipeline  {} {whose} in {} layers", dag.len(), dag.layers())
}

pub(crate) fn resumed(resumed: &Resumed) -> io::Result<()> {
    let Resumed { run, worker, ended, running, nodes, freed } = resumed;
    writeln!(
        io::stdout().lock(),
        "resumed   {run}, left by {worker}: {ended} of {nodes} nodes had ended; {running} were running and run again; {freed} of its locks were freed"
    )
}

pub(crate) fn elsewhere(runs: &BTreeSet<RunId>) -> io::Result<()> {
    writeln!(io::stdout().lock(), "left be   {} runs that another process works on", runs.len())
}

/// Shows the bar, if there is a terminal to show it on.
pub(crate) fn begin_bar(bar: &ProgressBar, nodes: u64) {
    bar.set_draw_target(ProgressDrawTarget::stderr());
    bar.set_length(nodes);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} nodes, {elapsed}") {
        bar.set_style(style);
    }
    if !bar.is_hidden() {
        bar.enable_steady_tick(Duration::from_millis(100));
    }
}

pub(crate) fn summary(summary: &Summary, stored: &Stored, ack_log: Option<&Path>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if let Some(story) = &summary.story {
        write!(out, "killed    {}", story.hostage.sentence())?;
        if let Some(Takeover { executor, token }) = story.takeover {
            write!(out, "; executor {executor} took it over (token {token})")?;
        }
        match &story.late {
            Err(error) => writeln!(out, "; a late write was refused: {error}")?,
            Ok(_) => writeln!(out)?,
        }
    }
    writeln!(
        out,
        "worked    {} failed attempts, {} transactions over two nodes ({} of them over two runs), {} locks lost",
        summary.failures, summary.pairs, summary.over_two_runs, summary.lost_locks
    )?;
    writeln!(out, "\non disk, read back after closing and opening again:")?;
    for run in summary.runs().filter_map(|id| stored.0.get(id)) {
        let header = run.header();
        writeln!(out, "  {}  {}  version {}  {}", run.id(), header.status, run.version(), nodes(run))?;
    }
    let others = stored.0.len() - summary.runs().filter(|id| stored.0.contains_key(*id)).count();
    let (mut intervals, mut partitions) = (0, 0);
    for (_, node) in stored.0.values().flat_map(RunState::nodes) {
        intervals += node.intervals.len();
        partitions += node.partitions.len();
    }
    writeln!(out, "  and {others} other runs; in all {intervals} intervals and {partitions} partitions")?;
    if let Some(path) = ack_log {
        writeln!(out, "ack log   {}", path.display())?;
    }
    let problems = &summary.findings.problems;
    if problems.is_empty() {
        writeln!(
            out,
            "\ncheck     ok: {} acknowledged writes in {} transactions are on disk, none in part; {} unchanged",
            summary.findings.writes,
            summary.findings.transactions,
            earlier(summary.unchanged)
        )
    } else {
        writeln!(out, "\ncheck     FAILED: {}", summary.findings)?;
        for problem in problems.iter().take(SHOWN) {
            writeln!(out, "  {problem}")?;
        }
        if let Some(more) = problems.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            writeln!(out, "  and {more} more")?;
        }
        Ok(())
    }
}

fn earlier(runs: usize) -> String {
    if runs == 1 { "1 earlier run".to_owned() } else { format!("{runs} earlier runs") }
}

fn nodes(run: &RunState) -> String {
    let mut by_status: BTreeMap<&NodeStatus, usize> = BTreeMap::new();
    for (_, node) in run.nodes() {
        *by_status.entry(&node.status).or_default() += 1;
    }
    let counts: Vec<String> = by_status.iter().map(|(status, count)| format!("{count} {status}")).collect();
    format!("{} nodes ({})", run.node_count(), counts.join(", "))
}

pub(crate) fn failure(failure: &Failure) {
    let mut lines = vec![format!("error: {failure}")];
    let mut source = failure.source();
    while let Some(cause) = source {
        let line = format!("  because: {cause}");
        if !lines.iter().any(|said| said.contains(&cause.to_string())) {
            lines.push(line);
        }
        source = cause.source();
    }
    // Nobody is left to tell if this fails.
    drop(writeln!(io::stderr(), "{}", lines.join("\n")));
}
