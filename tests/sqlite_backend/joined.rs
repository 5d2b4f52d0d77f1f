//! Batches that become longer while they are written: what joins them is judged behind what is there, and shares its fate.

use std::collections::VecDeque;
use std::sync::{Mutex, Weak};

use seeknal_state::model::{BatchAnswer, Interval};
use seeknal_state::store::{BatchSource, Wake};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::*;

type Told = (Arc<Batch>, Result<BatchAnswer, StoreError>);

/// Gives one batch whose entries arrive in pieces: the first when it is taken, each other one when the writer asks what joins it.
#[derive(Debug)]
struct Pieces {
    coming: Mutex<VecDeque<Vec<Entry>>>,
    given: Mutex<Option<Arc<Batch>>>,
    tell: UnboundedSender<Told>,
}

impl Pieces {
    /// Offers them to a backend, and waits for what becomes of them.
    async fn written(backend: &Backend, pieces: Vec<Vec<Entry>>) -> Told {
        let (tell, mut told): (_, UnboundedReceiver<Told>) = unbounded_channel();
        let source = Arc::new(Self { coming: Mutex::new(pieces.into()), given: Mutex::default(), tell });
        let offered: Arc<dyn BatchSource> = Arc::clone(&source) as _;
        let weak: Weak<dyn BatchSource> = Arc::downgrade(&offered);
        let wake: Wake = backend.pull_from(weak).unwrap();
        assert!(wake());
        told.recv().await.unwrap()
    }
}

impl BatchSource for Pieces {
    fn next(&self) -> Option<Arc<Batch>> {
        let mut given = self.given.lock().unwrap();
        if given.is_none() {
            *given = self.coming.lock().unwrap().pop_front().map(|entries| Arc::new(Batch::new(entries)));
        }
        given.clone()
    }

    fn join(&self, batch: &mut Arc<Batch>) -> bool {
        let Some(entries) = self.coming.lock().unwrap().pop_front() else { return false };
        Arc::make_mut(batch).entries.extend(entries);
        *self.given.lock().unwrap() = Some(Arc::clone(batch));
        true
    }

    fn answer(&self, answer: Result<BatchAnswer, StoreError>) {
        let batch = self.given.lock().unwrap().take().unwrap();
        self.tell.send((batch, answer)).unwrap();
    }

    fn forsaken(&self) {}
}

/// A run as its actor knows it, with everything on its way.
struct Tip {
    run: &'static str,
    base: Version,
    state: Option<RunState>,
}

impl Tip {
    async fn of(backend: &Backend, run: &'static str) -> Self {
        let state = load(backend, run).await;
        Self { run, base: state.version(), state: Some(state) }
    }

    fn entry(&mut self, guards: Vec<Guard>, mutations: Vec<Mutation>) -> Entry {
        let part = part_on(self.state.as_ref(), self.base, self.run, guards, mutations);
        self.state.clone_from(&part.after);
        entry(part)
    }
}

fn rows(node: &str, rows: u64) -> Mutation {
    set(node, NodeUpdate::success().row_count(rows))
}

fn covered(node: &str, interval: Interval) -> Mutation {
    Mutation::AddInterval { node: node_id(node), interval }
}

#[tokio::test]
async fn what_joins_a_batch_is_judged_behind_it_and_answered_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    // Two openings that write note their changes for one another.
    let other = open(&db(dir.path())).await;
    for run in ["a", "b"] {
        change(&backend, run, vec![create(0), rows("n", 1)]).await;
    }
    change(&other, "b", vec![rows("m", 1)]).await;
    let had = (load(&other, "a").await, load(&other, "b").await);
    let (mut a, mut b) = (Tip::of(&backend, "a").await, Tip::of(&backend, "b").await);
    let seen = |tip: &Tip| Guard::NodeVersion {
        node: node_id("n"),
        version: tip.state.as_ref().and_then(|run| run.node("n")).map(|node| node.version).unwrap(),
    };
    let not_there = Guard::NodeAbsent { node: node_id("n") };
    let old = seen(&b);
    let (guard, first) = (seen(&a), vec![rows("n", 2), covered("n", hours(0, 1))]);
    let pieces = vec![
        vec![a.entry(vec![guard], first), b.entry(vec![not_there], vec![rows("n", 3)])],
        // On what was written a moment ago; and on what was refused.
        vec![a.entry(vec![seen(&a)], vec![rows("n", 4), covered("n", hours(1, 2))]), b.entry(vec![], vec![rows("m", 5)])],
        vec![a.entry(vec![old], vec![rows("n", 6)])],
    ];
    let (batch, answer) = Pieces::written(&backend, pieces).await;
    let answer = answer.unwrap();
    assert_eq!(batch.entries.len(), 5);
    let names: Vec<&str> = answer
        .outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Applied(_) => "applied",
            Outcome::Refused(Refusal::Guard { .. }) => "guard",
            Outcome::Refused(Refusal::Chained { .. }) => "chained",
            Outcome::Refused(_) => "refused",
        })
        .collect();
    assert_eq!(names, ["applied", "guard", "applied", "chained", "guard"]);

    let now = load(&backend, "a").await;
    let node = now.node("n").unwrap();
    assert_eq!((node.row_count, node.intervals.iter().collect::<Vec<_>>()), (Some(4), vec![hours(0, 2)]));
    assert_eq!(now.version(), Version(had.0.version().0 + 2));
    assert_eq!(load(&backend, "b").await, had.1, "nothing of the other run was written");
    assert_eq!(other.reload_run(&had.0).await.unwrap().unwrap(), now, "who follows finds all of it");

    // The longer batch has the name, and its answer is kept under it.
    assert_eq!(backend.commit(Arc::clone(&batch)).await.unwrap(), answer);
    for backend in [backend, other] {
        backend.close().await.unwrap();
    }
    let again = open(&db(dir.path())).await;
    assert_eq!(load(&again, "a").await, now);
    assert!(again.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn runs_end_go_and_come_again_in_what_joins() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "a", vec![create(0), rows("n", 1)]).await;
    let mut a = Tip::of(&backend, "a").await;
    let ended = Mutation::Update { update: RunUpdate::success(), at: at(50) };
    let pieces = vec![
        vec![a.entry(vec![], vec![rows("n", 2)])],
        vec![a.entry(vec![], vec![ended, rows("m", 3)])],
        vec![a.entry(vec![], vec![Mutation::Delete { keep_coverage: true }])],
        vec![a.entry(vec![], vec![create(60), rows("o", 4)])],
    ];
    let (_, answer) = Pieces::written(&backend, pieces).await;
    for outcome in answer.unwrap().outcomes {
        applied(outcome);
    }
    let run = load(&backend, "a").await;
    assert_eq!(run.nodes().map(|(id, node)| (id.as_str(), node.row_count)).collect::<Vec<_>>(), [("o", Some(4))]);
    assert_eq!(run.header().status, RunStatus::Running);
    backend.close().await.unwrap();
    let again = open(&db(dir.path())).await;
    assert_eq!(load(&again, "a").await, run);
    assert!(again.verify().await.unwrap().is_sound());
}

/// One piece that storage cannot take: nothing of the batch is written, and the same batch is answered.
#[tokio::test]
async fn what_joins_shares_the_fate_of_its_batch() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "a", vec![create(0), rows("n", 1)]).await;
    let before = load(&backend, "a").await;
    let mut a = Tip::of(&backend, "a").await;
    let sql = raw(&db(dir.path()));
    sql.execute_batch(
        "CREATE TRIGGER no_m BEFORE INSERT ON node_states WHEN new.node_id = 'm' BEGIN SELECT raise(ABORT, 'no'); END",
    )
    .unwrap();
    let pieces = vec![vec![a.entry(vec![], vec![rows("n", 2)])], vec![a.entry(vec![], vec![rows("m", 3)])]];
    let (batch, answer) = Pieces::written(&backend, pieces).await;
    assert_eq!(batch.entries.len(), 2);
    assert!(!answer.unwrap_err().is_unknown_outcome());
    assert_eq!(load(&backend, "a").await, before);
    sql.execute_batch("DROP TRIGGER no_m").unwrap();
    let answer = backend.commit(batch).await.unwrap();
    assert!(answer.outcomes.into_iter().all(|outcome| matches!(outcome, Outcome::Applied(_))));
    assert_eq!(load(&backend, "a").await.nodes().count(), 2);
}

/// Who gives up waiting and sends the same batch again may find both in one transaction.
#[tokio::test]
async fn a_batch_that_waits_twice_is_applied_once_and_both_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "a", vec![create(0), rows("n", 1)]).await;
    let mut a = Tip::of(&backend, "a").await;
    let earlier = Arc::new(Batch::new(vec![a.entry(vec![], vec![rows("n", 2)])]));
    let batch = Arc::new(Batch::new(vec![a.entry(vec![], vec![rows("n", 3)])]));
    let sql = raw(&db(dir.path()));
    sql.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (earlier, first, second, ()) =
        tokio::join!(backend.commit(earlier), backend.commit(Arc::clone(&batch)), backend.commit(Arc::clone(&batch)), async {
            sql.execute_batch("COMMIT").unwrap();
        });
    for outcome in earlier.unwrap().outcomes {
        applied(outcome);
    }
    let first = first.unwrap();
    assert_eq!(second.unwrap(), first);
    assert_eq!(backend.commit(batch).await.unwrap(), first);
    let now = load(&backend, "a").await;
    assert_eq!((now.version(), now.node("n").unwrap().row_count), (a.state.unwrap().version(), Some(3)));
}
