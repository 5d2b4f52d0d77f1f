//! What is ready to be worked on, over all runs. It lives in memory and forgets everything with the process: what is remembered is the state's business.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use seeknal_state::{NodeId, NodeStatus, RunId, RunState};

use crate::chance;
use crate::dag::Dag;

/// How often a node is tried before it is failed for good.
pub(crate) const MAX_ATTEMPTS: u32 = 5;

/// Of a hundred nodes that become ready so many go to an executor together with the next one, often of another run.
const IN_PAIRS: u64 = 30;

/// One node that is ready.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    /// The place of its run on the board.
    pub(crate) place: usize,
    /// The place of the node in its pipeline.
    pub(crate) index: usize,
    pub(crate) run: RunId,
    pub(crate) node: NodeId,
    /// Which attempt this will be; the first one is 1.
    pub(crate) attempt: u32,
    /// The number of the node's last write.
    pub(crate) step: u64,
    /// Whether somebody was killed while working on it.
    pub(crate) orphaned: bool,
}

/// What follows from the end of a node.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Nodes that will never be ready, because something before them failed for good: to be skipped.
    pub(crate) skip: Vec<Task>,
    /// The run, if nothing of it is left to do, and whether all went well.
    pub(crate) ended: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// Waits for this many nodes.
    Waits(usize),
    Ready,
    Good,
    Bad,
    /// Something before it failed for good; that it is skipped is not written yet.
    Doomed,
}

#[derive(Debug)]
struct Run {
    id: RunId,
    dag: Dag,
    stands: Vec<Stand>,
    steps: Vec<(u32, u64)>,
    left: usize,
    bad: usize,
}

#[derive(Debug)]
struct Inner {
    seed: u64,
    runs: Vec<Run>,
    /// How many nodes were given out, and are not back.
    out: usize,
    /// A node that waits for a second one to go with; never while nothing is out, so that it goes in the end.
    shelf: Option<Task>,
    /// Gone when nothing is left to do, which sends the executors home.
    ready: Option<mpsc::UnboundedSender<Vec<Task>>>,
}

/// The board that all executors look at.
#[derive(Debug)]
pub(crate) struct Board {
    inner: Mutex<Inner>,
    tasks: tokio::sync::Mutex<mpsc::UnboundedReceiver<Vec<Task>>>,
}

impl Board {
    pub(crate) fn new(seed: u64) -> Self {
        let (ready, tasks) = mpsc::unbounded_channel();
        Self {
            inner: Mutex::new(Inner { seed, runs: Vec::new(), out: 0, shelf: None, ready: Some(ready) }),
            tasks: tokio::sync::Mutex::new(tasks),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a run on the board, as it stands on disk. What was running when its process died is ready again.
    pub(crate) fn add(&self, id: &RunId, dag: Dag, on_disk: &RunState, step_of: impl Fn(&NodeId) -> u64) -> (usize, Outcome) {
        let mut inner = self.lock();
        let place = inner.runs.len();
        let mut run = Run { id: id.clone(), stands: Vec::new(), steps: Vec::new(), left: dag.len(), bad: 0, dag };
        let mut outcome = Outcome::default();
        for (index, step) in run.dag.steps().iter().enumerate() {
            let node = on_disk.node(step.id.as_str());
            let attempts = node.map_or(0, |node| if node.status == NodeStatus::Pending { 0 } else { node.attempt });
            run.steps.push((attempts, step_of(&step.id)));
            let upstream = |wanted: Stand| step.upstream.iter().filter(|at| run.stands.get(**at) == Some(&wanted)).count();
            let stand = match node.map(|node| &node.status) {
                Some(NodeStatus::Success | NodeStatus::Cached) => Stand::Good,
                Some(NodeStatus::Skipped) => Stand::Bad,
                Some(NodeStatus::Failed) if attempts >= MAX_ATTEMPTS => Stand::Bad,
                _ if upstream(Stand::Bad) + upstream(Stand::Doomed) > 0 => {
                    outcome.skip.extend(task(place, id, &run.dag, &run.steps, index));
                    Stand::Doomed
                }
                _ => match step.upstream.len() - upstream(Stand::Good) {
                    0 => Stand::Ready,
                    waits => Stand::Waits(waits),
                },
            };
            match stand {
                Stand::Good => run.left -= 1,
                Stand::Bad => {
                    run.left -= 1;
                    run.bad += 1;
                }
                Stand::Ready | Stand::Waits(_) | Stand::Doomed => {}
            }
            run.stands.push(stand);
        }
        outcome.ended = (run.left == 0).then_some(run.bad == 0);
        inner.runs.push(run);
        (place, outcome)
    }

    /// Lets the executors begin with all that is ready.
    pub(crate) fn open(&self) {
        let mut inner = self.lock();
        let mut tasks = Vec::new();
        for (place, run) in inner.runs.iter().enumerate() {
            for (index, _) in run.stands.iter().enumerate().filter(|(_, stand)| **stand == Stand::Ready) {
                tasks.extend(task(place, &run.id, &run.dag, &run.steps, index));
            }
        }
        // So that neighbours are of different runs.
        tasks.sort_by_key(|task| (task.index, task.place));
        inner.send(tasks);
        inner.close_if_done();
    }

    /// The run at a place.
    pub(crate) fn run_at(&self, place: usize) -> Option<RunId> {
        self.lock().runs.get(place).map(|run| run.id.clone())
    }

    /// How many nodes are left to do.
    pub(crate) fn left(&self) -> usize {
        self.lock().runs.iter().map(|run| run.left).sum()
    }

    /// The next node that is ready, or the next two, to be committed as one; `None` when all is done.
    pub(crate) async fn next(&self) -> Option<Vec<Task>> {
        self.tasks.lock().await.recv().await
    }

    /// Puts a node back, for another try by anybody.
    pub(crate) fn again(&self, task: Task) {
        let mut inner = self.lock();
        inner.out = inner.out.saturating_sub(1);
        inner.send(vec![task]);
    }

    /// A node ended well.
    pub(crate) fn succeeded(&self, task: &Task) -> Outcome {
        let mut inner = self.lock();
        let Some(run) = inner.runs.get_mut(task.place) else { return Outcome::default() };
        run.end(task.index, Stand::Good);
        let mut ready = Vec::new();
        let downstream = run.dag.step(task.index).map(|step| step.downstream.clone()).unwrap_or_default();
        for index in downstream {
            if let Some(stand) = run.stands.get_mut(index) {
                *stand = match *stand {
                    Stand::Waits(1) => {
                        ready.push(index);
                        Stand::Ready
                    }
                    Stand::Waits(more) => Stand::Waits(more - 1),
                    other => other,
                };
            }
        }
        let ended = run.ended();
        let tasks: Vec<Task> = ready.into_iter().filter_map(|index| task_of(task.place, run, index)).collect();
        inner.out = inner.out.saturating_sub(1);
        inner.send(tasks);
        inner.close_if_done();
        Outcome { skip: Vec::new(), ended }
    }

    /// A node failed for good: whatever waits for it, near or far, is to be skipped, and then told to [`skipped`](Self::skipped).
    pub(crate) fn failed(&self, task: &Task) -> Outcome {
        let mut inner = self.lock();
        let Some(run) = inner.runs.get_mut(task.place) else { return Outcome::default() };
        run.end(task.index, Stand::Bad);
        let mut skip = Vec::new();
        let mut open = vec![task.index];
        while let Some(index) = open.pop() {
            let downstream = run.dag.step(index).map(|step| step.downstream.clone()).unwrap_or_default();
            for index in downstream {
                if let Some(stand @ Stand::Waits(_)) = run.stands.get_mut(index) {
                    *stand = Stand::Doomed;
                    skip.extend(task_of(task.place, run, index));
                    open.push(index);
                }
            }
        }
        let ended = run.ended();
        inner.out = inner.out.saturating_sub(1);
        inner.send(Vec::new());
        inner.close_if_done();
        Outcome { skip, ended }
    }

    /// Nodes were skipped.
    pub(crate) fn skipped(&self, place: usize, skipped: &[Task]) -> Outcome {
        let mut inner = self.lock();
        let Some(run) = inner.runs.get_mut(place) else { return Outcome::default() };
        for task in skipped {
            run.end(task.index, Stand::Bad);
        }
        let ended = run.ended();
        inner.close_if_done();
        Outcome { skip: Vec::new(), ended }
    }
}

impl Run {
    fn end(&mut self, index: usize, stand: Stand) {
        if let Some(old) = self.stands.get_mut(index) {
            if !matches!(old, Stand::Good | Stand::Bad) {
                self.left -= 1;
                self.bad += usize::from(stand == Stand::Bad);
            }
            *old = stand;
        }
    }

    fn ended(&self) -> Option<bool> {
        (self.left == 0).then_some(self.bad == 0)
    }
}

impl Inner {
    /// Gives out what is ready, now or on the shelf.
    fn send(&mut self, tasks: Vec<Task>) {
        let Some(ready) = &self.ready else { return };
        let mut tasks = self.shelf.take().into_iter().chain(tasks);
        while let Some(task) = tasks.next() {
            let dice =
                chance::below(100, self.seed, &["pair", task.node.as_str(), &task.place.to_string(), &task.attempt.to_string()]);
            let second = if dice < IN_PAIRS { tasks.next() } else { None };
            if dice < IN_PAIRS && second.is_none() && self.out > 0 {
                self.shelf = Some(task);
                return;
            }
            let bundle: Vec<Task> = std::iter::once(task).chain(second).collect();
            self.out += bundle.len();
            // The receiver is a neighbour of this sender: it is there.
            drop(ready.send(bundle));
        }
    }

    fn close_if_done(&mut self) {
        if self.runs.iter().all(|run| run.left == 0) {
            self.ready = None;
        }
    }
}

fn task_of(place: usize, run: &Run, index: usize) -> Option<Task> {
    task(place, &run.id, &run.dag, &run.steps, index)
}

fn task(place: usize, run: &RunId, dag: &Dag, steps: &[(u32, u64)], index: usize) -> Option<Task> {
    let node = dag.step(index)?.id.clone();
    let (attempts, step) = steps.get(index).copied()?;
    Some(Task { place, index, run: run.clone(), node, attempt: attempts + 1, step, orphaned: false })
}
