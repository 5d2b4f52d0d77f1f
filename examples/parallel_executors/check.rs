//! Compares what is on disk with what was acknowledged: every acknowledged write is there, no transaction is there in part.
//!
//! It knows nothing of the process that wrote: the ack log and the stored runs are all it needs.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use seeknal_state::{
    Coordinator, Error, Interval, NodeId, NodeState, NodeStatus, PartitionKey, RunId, RunQuery, RunState, RunStatus,
};

use crate::ack::Line;
use crate::marks::{Mark, Plan};

/// All runs, as storage has them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stored(pub(crate) BTreeMap<RunId, RunState>);

impl Stored {
    /// Reads everything from storage, past all that is kept in memory.
    pub(crate) async fn read(state: &Coordinator) -> Result<Self, Error> {
        let mut runs = BTreeMap::new();
        let mut query = RunQuery::default().limit(1_000);
        loop {
            let page = state.list_runs(&query).await?;
            for summary in page.runs {
                if let Some(run) = state.backend().load_run(&summary.run_id).await? {
                    runs.insert(summary.run_id, run);
                }
            }
            if page.next.is_none() {
                return Ok(Self(runs));
            }
            query = query.after(page.next);
        }
    }

    /// The runs that nobody writes to any more, and those that are named. Others, of another process, are read while they change, one after the
    /// other: what they wrote as one may be seen in part here, and nowhere else.
    pub(crate) fn settled(&self, named: &BTreeSet<RunId>) -> Self {
        let settled = self.0.iter().filter(|(id, run)| run.header().status != RunStatus::Running || named.contains(*id));
        Self(settled.map(|(id, run)| (id.clone(), run.clone())).collect())
    }

    fn node(&self, run: &RunId, node: &NodeId) -> Option<&NodeState> {
        self.0.get(run)?.node(node.as_str())
    }
}

/// What a comparison found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) writes: usize,
    pub(crate) transactions: usize,
    pub(crate) rows: usize,
    /// What is there beyond all acknowledgements: right after a kill, as whole transactions; wrong if all writers ended in order.
    pub(crate) ahead: Vec<String>,
    pub(crate) problems: Vec<String>,
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} acknowledged writes in {} transactions on {} rows; {} rows and runs are ahead of their last acknowledgement; {} problems",
            self.writes,
            self.transactions,
            self.rows,
            self.ahead.len(),
            self.problems.len()
        )
    }
}

/// Compares the ack log with what is stored.
pub(crate) fn compare(lines: &[Line], stored: &Stored) -> Findings {
    let mut found = Findings { writes: lines.len(), ..Findings::default() };
    let mut last: BTreeMap<(&RunId, Option<&NodeId>), &Line> = BTreeMap::new();
    let mut newest: BTreeMap<&RunId, u64> = BTreeMap::new();
    let mut by_tx: HashMap<&str, &Line> = HashMap::new();
    let mut by_seq: HashMap<u64, &str> = HashMap::new();
    let mut by_version: HashMap<(&RunId, u64), &str> = HashMap::new();
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for line in lines {
        let key = (&line.run, line.node.as_ref());
        let known = last.entry(key).or_insert(line);
        if line.after > known.after {
            *known = line;
        }
        let version = newest.entry(&line.run).or_default();
        *version = line.after.max(*version);
        *sizes.entry(&line.tx).or_default() += 1;
        by_tx.insert(&line.tx, line);
        if line.after <= line.before || (line.before != 0 && line.after != line.before + 1) {
            found.problems.push(format!("{}: it was told versions {} and {}", Row(line), line.before, line.after));
        }
        if let Some(other) = line.seq.and_then(|seq| by_seq.insert(seq, &line.tx)).filter(|other| **other != line.tx) {
            found.problems.push(format!("{}: its sequence number was given to transaction {other} too", Row(line)));
        }
        if let Some(other) = by_version.insert((&line.run, line.after), &line.tx).filter(|other| **other != line.tx) {
            found.problems.push(format!("{}: version {} of the run was given to transaction {other} too", Row(line), line.after));
        }
    }
    for (tx, lines) in &sizes {
        if let Some(line) = by_tx.get(tx).filter(|line| *lines > line.of) {
            found.problems.push(format!("transaction {tx} was acknowledged {lines} times instead of {}", line.of));
        }
    }
    found.transactions = sizes.len();
    found.rows = last.len();
    for (run, version) in newest {
        match stored.0.get(run) {
            None => found.problems.push(format!("run {run}: version {version} was acknowledged, and there is no such run")),
            Some(state) => {
                let differs = || format!("run {run}: version {version} was acknowledged last, stored is {}", state.version());
                match state.version().0.cmp(&version) {
                    Ordering::Less => found.problems.push(differs()),
                    Ordering::Equal => {}
                    Ordering::Greater => found.ahead.push(differs()),
                }
            }
        }
    }
    for line in last.into_values() {
        compare_row(line, stored, &by_tx, &mut found);
    }
    found.problems.extend(whole(stored));
    found
}

fn compare_row(line: &Line, stored: &Stored, by_tx: &HashMap<&str, &Line>, found: &mut Findings) {
    let Some(run) = stored.0.get(&line.run) else { return };
    let (version, status, attempt) = match &line.node {
        None => (run.header().version.0, run.header().status.as_str(), None),
        Some(id) => match run.node(id.as_str()) {
            Some(node) => (node.version.0, node.status.as_str(), Some(node)),
            None => return found.problems.push(format!("{}: it is gone", Row(line))),
        },
    };
    if version < line.after {
        return found.problems.push(format!("{}: stored is the older version {version}", Row(line)));
    }
    if version > line.after {
        found.ahead.push(format!("{}: stored is version {version}, which nobody was told of", Row(line)));
        let mark = attempt.and_then(Mark::of);
        if let Some(told) = mark.as_ref().and_then(|mark| by_tx.get(mark.tx.as_str())) {
            found.problems.push(format!("{}: version {version} repeats transaction {}", Row(line), told.tx));
        }
        return;
    }
    let mut differ = |what: &str, told: &dyn fmt::Debug, is: &dyn fmt::Debug| {
        found.problems.push(format!("{}: {what} was {told:?}, stored is {is:?}", Row(line)));
    };
    if status != line.status {
        differ("status", &line.status, &status);
    }
    let Some(node) = attempt else { return };
    if Some(node.attempt) != line.attempt {
        differ("attempt", &line.attempt, &node.attempt);
    }
    if line.rows.is_some() && node.row_count != line.rows {
        differ("row count", &line.rows, &node.row_count);
    }
    let has_interval =
        |(start, end): &(String, String)| Interval::parse(start, end).is_ok_and(|interval| node.intervals.contains(interval));
    if !line.interval.as_ref().is_none_or(has_interval) {
        differ("interval", &line.interval, &node.intervals);
    }
    let has_partition =
        |partition: &String| PartitionKey::new(partition).is_ok_and(|partition| node.partitions.contains(&partition));
    if !line.partition.as_ref().is_none_or(has_partition) {
        differ("partition", &line.partition, &node.partitions);
    }
    if let Some(mark) = Mark::of(node).filter(|mark| mark.tx != line.tx) {
        differ("transaction", &line.tx, &mark.tx);
    }
}

/// Looks for transactions that are there in part, in what is stored alone: runs without all their nodes, a result without its interval or
/// partition or the other way round, one node of a pair without the other. So it sees those that nobody was told of, too.
pub(crate) fn whole(stored: &Stored) -> Vec<String> {
    let mut problems = Vec::new();
    for (id, run) in &stored.0 {
        let Some(plan) = Plan::of(run.header()) else { continue };
        if run.node_count() != plan.nodes {
            problems.push(format!("run {id}: it was made with {} nodes, and has {}", plan.nodes, run.node_count()));
        }
        let interval = plan.interval().ok();
        let partition = PartitionKey::new(&plan.partition).ok();
        for (name, node) in run.nodes() {
            let success = node.status == NodeStatus::Success;
            let has_interval = interval.is_some_and(|interval| node.intervals.contains(interval));
            let has_partition = partition.as_ref().is_some_and(|partition| node.partitions.contains(partition));
            if has_interval != success || has_partition != success {
                problems.push(format!(
                    "run {id}, node {name}: it is {}, interval {has_interval}, partition {has_partition}: they were one transaction",
                    node.status
                ));
            }
            for (other_run, other_node, step) in Mark::of(node).map(|mark| mark.with).unwrap_or_default() {
                let other = stored.node(&other_run, &other_node).and_then(Mark::of);
                if stored.0.contains_key(&other_run) && other.as_ref().is_none_or(|other| other.step < step) {
                    problems.push(format!(
                        "run {id}, node {name}: it was written with write {step} of {other_node} in run {other_run}, which is not there"
                    ));
                }
            }
        }
        if run.version() < run.nodes().map(|(_, node)| node.version).max().unwrap_or_default() {
            problems.push(format!("run {id}: a node is newer than the run"));
        }
    }
    problems
}

/// Compares runs that nobody worked on with what they were before.
pub(crate) fn unchanged(before: &Stored, after: &Stored, worked_on: &BTreeSet<RunId>) -> (usize, Vec<String>) {
    let mut problems = Vec::new();
    let mut compared = 0;
    for (id, old) in before.0.iter().filter(|(id, _)| !worked_on.contains(*id)) {
        compared += 1;
        let Some(new) = after.0.get(id) else {
            problems.push(format!("run {id}: it was there before, and is gone"));
            continue;
        };
        if old.header() != new.header() || old.version() != new.version() {
            problems.push(format!("run {id}: its header was {:?}, and is {:?}", old.header(), new.header()));
        }
        for (name, node) in old.nodes() {
            if new.node(name.as_str()) != Some(node) {
                problems.push(format!("run {id}, node {name}: it was {node:?}, and is {:?}", new.node(name.as_str())));
            }
        }
        if old.node_count() != new.node_count() {
            problems.push(format!("run {id}: it had {} nodes, and has {}", old.node_count(), new.node_count()));
        }
    }
    (compared, problems)
}

/// Which row a line is about, for messages.
struct Row<'l>(&'l Line);

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line { run, node, status, after, tx, .. } = self.0;
        match node {
            Some(node) => write!(f, "run {run}, node {node} ({status} at version {after}, transaction {tx})"),
            None => write!(f, "run {run} ({status} at version {after}, transaction {tx})"),
        }
    }
}
