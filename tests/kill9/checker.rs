//! The comparison itself: it must find nothing where nothing is wrong, and every forgery.

use std::sync::Arc;

use seeknal_state::model::{NodeState, RunState, Version};
use seeknal_state::{Coordinator, MemoryBackend, NewRun, NodeId, NodeUpdate, RunId};

use super::ack::{Line, Said, Scribe};
use super::check::{Stored, compare, unchanged};
use super::marks::{MADE_BY, Mark, Plan};

/// A little job on two runs: what it was told, and what was stored before and after its last transaction.
struct Job {
    lines: Vec<Line>,
    before: Stored,
    after: Stored,
}

fn ids() -> (RunId, RunId, NodeId) {
    (RunId::new("run_1").unwrap(), RunId::new("run_2").unwrap(), NodeId::new("a").unwrap())
}

impl Job {
    async fn done() -> Self {
        let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
        let scribe = Scribe::open(None).unwrap();
        let plan = Plan {
            made_by: MADE_BY.to_owned(),
            seed: 1,
            nodes: 1,
            interval: ("2024-01-01T00:00:00Z".to_owned(), "2024-01-02T00:00:00Z".to_owned()),
            partition: "dt=2024-01-01".to_owned(),
        };
        let (first, second, node) = ids();
        for run in [&first, &second] {
            let tx_name = scribe.new_tx();
            let mut tx = state.transaction();
            tx.create_run(run, NewRun::running().metadata(Plan::KEY, serde_json::to_value(&plan).unwrap()));
            let mark = Mark { step: 1, tx: tx_name.clone(), with: Vec::new() };
            tx.set_node_state(run, &node, mark.put_on(NodeUpdate::running()).unwrap());
            let commit = tx.commit().await.unwrap();
            let said = vec![Said::header(run, "running"), Said::node(run, &node, "running", 1)];
            scribe.acknowledged(&tx_name, &commit, said).unwrap();
        }
        let before = Stored::read(&state).await.unwrap();
        let tx_name = scribe.new_tx();
        let mut tx = state.transaction();
        let mut said = Vec::new();
        for (run, other) in [(&first, &second), (&second, &first)] {
            let mark = Mark { step: 2, tx: tx_name.clone(), with: vec![(other.clone(), node.clone(), 2)] };
            tx.set_node_state(run, &node, mark.put_on(NodeUpdate::success().row_count(7)).unwrap());
            tx.add_completed_interval(run, &node, plan.interval().unwrap());
            tx.add_completed_partition(run, &node, &plan.partition);
            let mut line = Said::node(run, &node, "success", 1);
            line.rows = Some(7);
            line.interval = Some(plan.interval.clone());
            line.partition = Some(plan.partition.clone());
            said.push(line);
        }
        let commit = tx.commit().await.unwrap();
        scribe.acknowledged(&tx_name, &commit, said).unwrap();
        let after = Stored::read(&state).await.unwrap();
        state.close().await.unwrap();
        Self { lines: scribe.told(), before, after }
    }

    fn objections(&self) -> Vec<String> {
        compare(&self.lines, &self.after).problems
    }

    /// Changes a stored node behind everybody's back.
    fn tamper(&mut self, run: &RunId, change: impl FnOnce(&mut NodeState)) {
        let old = self.after.0.remove(run).unwrap();
        let mut nodes: Vec<(NodeId, NodeState)> = old.nodes().map(|(id, node)| (id.clone(), node.clone())).collect();
        change(&mut nodes[0].1);
        let version = nodes[0].1.version.max(old.version());
        let new = RunState::from_parts(run.clone(), old.header().clone(), version, old.created_version(), nodes);
        self.after.0.insert(run.clone(), new);
    }
}

#[tokio::test]
async fn a_job_without_a_fault_passes() {
    let job = Job::done().await;
    let findings = compare(&job.lines, &job.after);
    assert_eq!((findings.problems.len(), findings.ahead.len()), (0, 0), "{:?}", findings.problems);
    assert_eq!((findings.writes, findings.transactions, findings.rows), (6, 3, 4));
}

#[tokio::test]
async fn a_write_that_nobody_was_told_of_is_ahead_and_no_problem() {
    let mut job = Job::done().await;
    job.lines.truncate(4);
    let findings = compare(&job.lines, &job.after);
    assert_eq!(findings.problems, Vec::<String>::new());
    assert_eq!(findings.ahead.len(), 4, "two runs and two nodes: {:?}", findings.ahead);
}

#[tokio::test]
async fn every_forged_line_is_found() {
    type Forgery = fn(&mut Line);
    let forgeries: [(&str, Forgery); 12] = [
        ("a version that was never written", |line| (line.before, line.after) = (line.before + 5, line.after + 5)),
        ("a version that was not the next one", |line| line.before -= 1),
        ("another status", |line| line.status = "failed".to_owned()),
        ("another attempt", |line| line.attempt = Some(2)),
        ("another row count", |line| line.rows = Some(8)),
        ("another interval", |line| line.interval = Some(("2024-01-02".to_owned(), "2024-01-03".to_owned()))),
        ("another partition", |line| line.partition = Some("dt=2024-01-02".to_owned())),
        ("another node", |line| line.node = Some(NodeId::new("b").unwrap())),
        ("another run", |line| line.run = RunId::new("run_3").unwrap()),
        ("another transaction", |line| line.tx = "forged-1".to_owned()),
        ("a sequence number that was given before", |line| line.seq = Some(1)),
        ("a transaction that is too long", |line| line.of = 1),
    ];
    for (what, forge) in forgeries {
        let mut job = Job::done().await;
        forge(job.lines.last_mut().unwrap());
        assert!(!job.objections().is_empty(), "{what} was not found");
    }
}

#[tokio::test]
async fn a_state_that_was_rolled_back_is_found() {
    let (first, ..) = ids();
    let mut job = Job::done().await;
    job.after = job.before.clone();
    assert_eq!(job.objections().len(), 4, "two runs and two nodes: {:?}", job.objections());
    let mut job = Job::done().await;
    job.after.0.remove(&first);
    assert!(job.objections().iter().any(|problem| problem.contains("there is no such run")));
}

#[tokio::test]
async fn half_a_transaction_is_found_without_any_acknowledgement() {
    let (first, second, _) = ids();
    for (whole, half) in [(&first, &second), (&second, &first)] {
        let mut job = Job::done().await;
        job.lines.clear();
        assert!(job.objections().is_empty());
        job.after.0.insert(half.clone(), job.before.0[half].clone());
        let problems = job.objections();
        assert!(
            matches!(&*problems, [one] if one.contains(whole.as_str()) && one.contains("which is not there")),
            "{problems:?}"
        );
    }
    let torn: [fn(&mut NodeState); 3] = [
        |node| node.intervals = Arc::default(),
        |node| node.partitions = Arc::default(),
        |node| {
            node.status = seeknal_state::NodeStatus::Running;
        },
    ];
    for tear in torn {
        let mut job = Job::done().await;
        job.lines.clear();
        job.tamper(&first, tear);
        assert!(!job.objections().is_empty());
    }
}

#[tokio::test]
async fn a_transaction_that_was_applied_twice_is_found() {
    let (first, ..) = ids();
    let mut job = Job::done().await;
    job.tamper(&first, |node| node.version = Version(node.version.0 + 1));
    assert!(job.objections().iter().any(|problem| problem.contains("repeats transaction")), "{:?}", job.objections());
}

#[tokio::test]
async fn a_change_of_what_nobody_worked_on_is_found() {
    let (first, ..) = ids();
    let mut job = Job::done().await;
    let earlier = job.after.clone();
    assert_eq!(unchanged(&earlier, &job.after, &[].into()), (2, Vec::new()));
    job.tamper(&first, |node| node.row_count = None);
    assert_eq!(unchanged(&earlier, &job.after, &[].into()).1.len(), 1);
    assert_eq!(unchanged(&earlier, &job.after, &[first.clone()].into()), (1, Vec::new()));
    job.after.0.remove(&first);
    assert_eq!(unchanged(&earlier, &job.after, &[].into()).1.len(), 1);
}

#[test]
fn a_log_that_was_cut_off_goes_on_with_a_new_line() {
    let (run, ..) = ids();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ack.log");
    let line = |tx: &str| Line::new(Said::header(&run, "running"), tx, 1, 1, 2, Some(2));
    Scribe::open(Some(&path)).unwrap().note(vec![line("x-1")]).unwrap();
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&whole[..], &whole[..whole.len() / 2]].concat()).unwrap();
    Scribe::open(Some(&path)).unwrap().note(vec![line("y-1")]).unwrap();
    assert_eq!(super::read_log(&path), vec![line("x-1"), line("y-1")]);
}
