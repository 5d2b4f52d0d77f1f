//! The comparison itself: it must find nothing where nothing is wrong, and every forgery.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use seeknal_state::model::{NodeState, RunState};
use seeknal_state::{ClaimFilter, Coordinator, FencingToken, MemoryBackend, NewRun, NodeId, NodeUpdate, Version};

use super::ack::{Line, Scribe, Subject, read_all};
use super::check::compare;

type Plan = BTreeMap<NodeId, BTreeSet<NodeId>>;

/// A little job of one process: two nodes, one after the other, the second one on its second attempt.
struct Job {
    plan: Plan,
    lines: Vec<Line>,
    run: RunState,
}

fn id(text: &str) -> NodeId {
    NodeId::new(text).unwrap()
}

impl Job {
    async fn done() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
        let scribe = Scribe::open(&folder.path().join("w.jsonl"), "w").unwrap();
        state.create_run("r", NewRun::running()).await.unwrap();
        state.set_node_state("r", "a", NodeUpdate::pending()).await.unwrap();
        state.set_node_state("r", "b", NodeUpdate::pending().depends_on(["a"])).await.unwrap();
        let filter = ClaimFilter::new().owner("w").wait(Duration::from_secs(20)).ttl(Duration::from_millis(400));
        for round in 0..3 {
            let claim = state.claim_next("r", filter.clone()).await.unwrap().claimed().unwrap();
            let subject = Subject::of(&claim);
            scribe.note(&subject, "running", Some(claim.commit())).unwrap();
            if round == 1 {
                state.force_unlock(claim.token()).await.unwrap();
                let _why = claim.lost().await;
                assert!(claim.complete(NodeUpdate::success()).await.is_err());
                scribe.note(&subject, "refused", None).unwrap();
            } else {
                let commit = claim.complete(NodeUpdate::success()).await.unwrap();
                scribe.note(&subject, "success", Some(&commit)).unwrap();
            }
        }
        let run = state.get_run("r").await.unwrap().unwrap().state().clone();
        state.close().await.unwrap();
        let plan = [(id("a"), BTreeSet::new()), (id("b"), [id("a")].into())].into();
        Self { plan, lines: read_all(folder.path()).unwrap(), run }
    }

    fn objections(&self) -> Vec<String> {
        compare(&self.plan, &self.lines, &self.run, false).problems
    }

    fn line(&mut self, node: &str, status: &str) -> &mut Line {
        self.lines.iter_mut().rev().find(|line| line.node == id(node) && line.status == status).unwrap()
    }

    /// Changes a stored node behind everybody's back.
    fn tamper(&mut self, node: &str, change: impl FnOnce(&mut NodeState)) {
        let mut nodes: BTreeMap<NodeId, NodeState> = self.run.nodes().map(|(id, node)| (id.clone(), node.clone())).collect();
        change(nodes.get_mut(node).unwrap());
        let (id, header) = (self.run.id().clone(), self.run.header().clone());
        self.run = RunState::from_parts(id, header, self.run.version(), self.run.created_version(), nodes);
    }
}

#[tokio::test]
async fn a_sound_job_passes() {
    let job = Job::done().await;
    let findings = compare(&job.plan, &job.lines, &job.run, false);
    assert_eq!(findings.problems, Vec::<String>::new());
    assert_eq!((findings.claims, findings.takeovers, findings.refused, findings.unnoted), (3, 1, 1, 0));
    // A worker that did not live to note its end is no objection where workers were killed.
    let mut cut = Job::done().await;
    cut.lines.retain(|line| line.status != "success");
    assert_eq!(cut.objections().len(), 2, "where nobody was killed it is one");
    let findings = compare(&cut.plan, &cut.lines, &cut.run, true);
    assert_eq!((findings.problems.len(), findings.unnoted), (0, 2));
}

type Forgery = (&'static str, fn(&mut Job));

#[tokio::test]
async fn every_forgery_is_seen() {
    let forgeries: &[Forgery] = &[
        ("two workers did it", |job| {
            let mut twin = job.line("a", "success").clone();
            (twin.seq, twin.after) = (Some(900), 900);
            job.lines.push(twin);
        }),
        ("done by a token that is not stored", |job| job.line("b", "success").token = FencingToken(1)),
        ("done, and written again", |job| job.tamper("a", |node| node.version = Version(node.version.0 + 1))),
        ("acknowledged, and lost", |job| job.tamper("b", |node| node.status = seeknal_state::NodeStatus::Running)),
        ("another token is stored", |job| job.tamper("a", |node| node.token = Some(FencingToken(2)))),
        ("no token is stored", |job| job.tamper("a", |node| node.token = None)),
        ("its history is overwritten", |job| job.tamper("b", |node| node.attempts = Vec::new().into())),
        ("a finished attempt was worked on again", |job| {
            job.tamper("b", |node| {
                let mut attempts = node.attempts.to_vec();
                attempts[0].status = seeknal_state::NodeStatus::Success;
                node.attempts = attempts.into();
            });
        }),
        ("one place for two commits", |job| {
            let seq = job.line("a", "success").seq;
            job.line("b", "success").seq = seq;
        }),
        ("a version that does not grow", |job| job.line("a", "success").after = 0),
        ("tokens that fall", |job| job.line("b", "running").token = FencingToken(0)),
        ("claimed before what it depends on was done", |job| {
            let early = job.line("a", "running").after;
            job.line("b", "running").after = early;
        }),
        ("refused, and stored all the same", |job| {
            let token = job.line("b", "success").token;
            job.line("b", "refused").token = token;
        }),
        ("claimed again after it was done", |job| {
            let mut late = job.line("a", "running").clone();
            (late.token, late.seq, late.before, late.after) = (FencingToken(u64::MAX), Some(901), 900, 901);
            job.lines.push(late);
        }),
        ("an end that nobody was told", |job| job.lines.retain(|line| !(line.node == id("a") && line.status == "success"))),
        ("a claim that nobody was told", |job| job.lines.retain(|line| !(line.node == id("a") && line.status == "running"))),
        ("a node that was not planned", |job| {
            job.plan.remove(&id("b"));
        }),
        ("a node that is missing", |job| {
            job.plan.insert(id("c"), BTreeSet::new());
        }),
        ("a line that says nothing", |job| job.line("a", "running").status = "well".to_owned()),
    ];
    for (name, forge) in forgeries {
        let mut job = Job::done().await;
        forge(&mut job);
        assert!(!job.objections().is_empty(), "not seen: {name}");
    }
}

#[test]
fn a_line_that_was_cut_off_is_passed_over_and_damage_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.jsonl");
    let whole = r#"{"run":"r","node":"a","status":"running","attempt":1,"token":1,"before":1,"after":2,"seq":2,"tx":"w-1","of":1,"worker":"w"}"#;
    std::fs::write(&path, format!("{whole}\n{}", &whole[..40])).unwrap();
    assert_eq!(read_all(folder.path()).unwrap().len(), 1);
    std::fs::write(&path, format!("{}\n{whole}\n", &whole[..40])).unwrap();
    assert!(read_all(folder.path()).unwrap_err().to_string().contains("w.jsonl"));
}
