//! What one executor does: takes a node (sometimes two), locks it, says that it runs, works, says how it ended, and goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::sync::oneshot;

use seeknal_state::{
    Coordinator, Error, FencingToken, Lease, LeaseKey, LockOptions, NodeStatus, NodeUpdate, RunStatus, RunUpdate,
};

use crate::Failure;
use crate::ack::{Said, Scribe};
use crate::board::{Board, MAX_ATTEMPTS, Outcome, Task};
use crate::chance;
use crate::marks::{Mark, Plan};

/// How long an executor waits for a lock before it puts its work back.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of a hundred attempts so many fail.
const FAILING: u64 = 15;

/// What all executors share.
#[derive(Debug)]
pub(crate) struct Floor {
    pub(crate) state: Coordinator,
    pub(crate) board: Board,
    pub(crate) scribe: Scribe,
    /// By the run's place on the board.
    pub(crate) plans: Vec<Plan>,
    pub(crate) seed: u64,
    pub(crate) work_ms: u64,
    pub(crate) bar: ProgressBar,
    /// The first executor to hold a lock reports here, and is killed.
    pub(crate) hostage: Mutex<Option<oneshot::Sender<Hostage>>>,
    pub(crate) tally: Tally,
}

/// An executor that holds a lock and waits for its end.
#[derive(Debug)]
pub(crate) struct Hostage {
    pub(crate) executor: usize,
    pub(crate) task: Task,
    pub(crate) token: FencingToken,
    /// Its way to write under the lock that it is going to lose.
    pub(crate) fenced: Coordinator,
}

/// Who went on with the node of the executor that was killed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Takeover {
    pub(crate) executor: usize,
    pub(crate) token: FencingToken,
}

/// What the executors went through.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) failures: AtomicU64,
    pub(crate) pairs: AtomicU64,
    pub(crate) over_two_runs: AtomicU64,
    pub(crate) lost_locks: AtomicU64,
    pub(crate) takeover: Mutex<Option<Takeover>>,
}

impl Floor {
    /// Works until nothing is left to do.
    pub(crate) async fn work(&self, executor: usize) -> Result<(), Failure> {
        while let Some(mut tasks) = self.board.next().await {
            if self.is_hostage_wanted() {
                // The one who dies holds one lock.
                tasks.drain(1..).for_each(|task| self.board.again(task));
            }
            // Everybody takes locks in one order, so that nobody waits in a circle.
            tasks.sort_by(|a, b| (&a.run, &a.node).cmp(&(&b.run, &b.node)));
            match self.execute(executor, &tasks).await {
                Err(failure) if failure.is_lost_lock() => self.lost(tasks),
                done => done?,
            }
        }
        Ok(())
    }

    /// Somebody freed the lock by force, or the storage stalled for longer than it lasts: nothing was written under it, and the work begins anew.
    fn lost(&self, tasks: Vec<Task>) {
        self.tally.lost_locks.fetch_add(1, Ordering::Relaxed);
        for task in tasks {
            self.again(task);
        }
    }

    fn again(&self, task: Task) {
        self.board.again(Task { attempt: task.attempt + 1, step: task.step + 2, orphaned: false, ..task });
    }

    /// The day that a task's run works on.
    fn day(&self, task: Option<&Task>) -> &str {
        task.and_then(|task| self.plans.get(task.place)).map_or("", |plan| &plan.partition)
    }

    fn is_hostage_wanted(&self) -> bool {
        self.hostage.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    async fn execute(&self, executor: usize, tasks: &[Task]) -> Result<(), Failure> {
        let Some(leases) = self.lock_all(executor, tasks).await? else {
            for task in tasks {
                self.board.again(task.clone());
            }
            return Ok(());
        };
        let fenced = leases.iter().fold(self.state.clone(), |state, lease| state.with_lease(lease));
        for task in tasks {
            self.begin(&fenced, task).await?;
        }
        for (_, lease) in tasks.iter().zip(&leases).filter(|(task, _)| task.orphaned) {
            let takeover = Takeover { executor, token: lease.token() };
            *self.tally.takeover.lock().unwrap_or_else(PoisonError::into_inner) = Some(takeover);
        }
        if let ([task], [lease]) = (tasks, &*leases) {
            let wanted = self.hostage.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(wanted) = wanted {
                let hostage = Hostage { executor, task: task.clone(), token: lease.token(), fenced: fenced.clone() };
                if wanted.send(hostage).is_ok() {
                    // Holds the lock and never comes back: the task is aborted here.
                    std::future::pending::<()>().await;
                }
            }
        }
        self.pretend_to_work(tasks).await;
        let (failed, good): (Vec<Task>, Vec<Task>) = tasks.iter().cloned().partition(|task| self.fails(task));
        self.succeed(&fenced, &good).await?;
        let mut told = Vec::with_capacity(failed.len());
        for task in failed {
            match self.fail(&fenced, &task).await {
                Err(failure) if failure.is_lost_lock() => self.lost(vec![task]),
                done => {
                    done?;
                    told.push(task);
                }
            }
        }
        // Before anything follows: the end of a run waits for its nodes' locks.
        drop(leases);
        for task in &good {
            self.bar.inc(1);
            self.follow(task.place, self.board.succeeded(task)).await?;
        }
        for task in told {
            if task.attempt < MAX_ATTEMPTS {
                self.again(task);
            } else {
                self.bar.inc(1);
                self.follow(task.place, self.board.failed(&task)).await?;
            }
        }
        Ok(())
    }

    async fn lock_all(&self, executor: usize, tasks: &[Task]) -> Result<Option<Vec<Lease>>, Failure> {
        let mut leases = Vec::with_capacity(tasks.len());
        for task in tasks {
            let options = LockOptions::new().owner(owner(executor)).purpose(format!("attempt {}", task.attempt));
            let key = LeaseKey::node(task.run.clone(), task.node.clone());
            match self.state.acquire(key, options, PATIENCE).await? {
                Some(lease) => leases.push(lease),
                None => return Ok(None),
            }
        }
        Ok(Some(leases))
    }

    async fn begin(&self, fenced: &Coordinator, task: &Task) -> Result<(), Failure> {
        let tx = self.scribe.new_tx();
        let mark = Mark { step: task.step + 1, tx: tx.clone(), with: Vec::new() };
        let update = mark.put_on(NodeUpdate::running().attempt(task.attempt))?;
        let commit = fenced.set_node_state(&task.run, &task.node, update).await?;
        self.scribe.acknowledged(&tx, &commit, vec![Said::node(&task.run, &task.node, "running", task.attempt)])?;
        Ok(())
    }

    async fn pretend_to_work(&self, tasks: &[Task]) {
        let longest = tasks
            .iter()
            .map(|task| chance::below(self.work_ms + 1, self.seed, &["work", task.node.as_str(), &task.attempt.to_string()]));
        tokio::time::sleep(Duration::from_millis(longest.max().unwrap_or(0))).await;
    }

    fn fails(&self, task: &Task) -> bool {
        chance::below(100, self.seed, &["failure", self.day(Some(task)), task.node.as_str(), &task.attempt.to_string()]) < FAILING
    }

    /// Results, intervals and partitions of one node or two, as one.
    async fn succeed(&self, fenced: &Coordinator, tasks: &[Task]) -> Result<(), Failure> {
        if tasks.is_empty() {
            return Ok(());
        }
        let name = self.scribe.new_tx();
        let mut tx = fenced.transaction();
        let mut said = Vec::with_capacity(tasks.len());
        for task in tasks {
            let Some(plan) = self.plans.get(task.place) else { continue };
            let others = tasks.iter().filter(|other| other.node != task.node || other.run != task.run);
            let with = others.map(|other| (other.run.clone(), other.node.clone(), other.step + 2)).collect();
            let mark = Mark { step: task.step + 2, tx: name.clone(), with };
            let rows = chance::below(1_000_000, self.seed, &["rows", &plan.partition, task.node.as_str()]);
            let print = format!("{:016x}", chance::number(self.seed, &["print", &plan.partition, task.node.as_str()]));
            let update = mark.put_on(NodeUpdate::success().attempt(task.attempt).row_count(rows).fingerprint(print))?;
            tx.expect_status(&task.run, &task.node, [NodeStatus::Running]);
            tx.set_node_state(&task.run, &task.node, update);
            tx.add_completed_interval(&task.run, &task.node, plan.interval()?);
            tx.add_completed_partition(&task.run, &task.node, &plan.partition);
            let mut line = Said::node(&task.run, &task.node, "success", task.attempt);
            line.rows = Some(rows);
            line.interval = Some(plan.interval.clone());
            line.partition = Some(plan.partition.clone());
            said.push(line);
        }
        if let [first, second] = tasks {
            self.tally.pairs.fetch_add(1, Ordering::Relaxed);
            self.tally.over_two_runs.fetch_add(u64::from(first.run != second.run), Ordering::Relaxed);
        }
        let commit = tx.commit().await?;
        self.scribe.acknowledged(&name, &commit, said)?;
        Ok(())
    }

    async fn fail(&self, fenced: &Coordinator, task: &Task) -> Result<(), Failure> {
        self.tally.failures.fetch_add(1, Ordering::Relaxed);
        let name = self.scribe.new_tx();
        let mark = Mark { step: task.step + 2, tx: name.clone(), with: Vec::new() };
        let update = mark.put_on(NodeUpdate::failed("it was its turn to fail").attempt(task.attempt))?;
        let commit = fenced.set_node_state(&task.run, &task.node, update).await?;
        self.scribe.acknowledged(&name, &commit, vec![Said::node(&task.run, &task.node, "failed", task.attempt)])?;
        Ok(())
    }

    /// Does what follows from the end of a node: skips what waited for it in vain, ends the run.
    pub(crate) async fn follow(&self, place: usize, outcome: Outcome) -> Result<(), Failure> {
        let Outcome { skip, mut ended } = outcome;
        if !skip.is_empty() {
            self.skip(&skip).await?;
            ended = self.board.skipped(place, &skip).ended;
        }
        match ended {
            Some(good) => self.end_run(place, good).await,
            None => Ok(()),
        }
    }

    /// Nobody works on these nodes, and nobody will: no lock is needed.
    async fn skip(&self, tasks: &[Task]) -> Result<(), Failure> {
        let name = self.scribe.new_tx();
        let mut tx = self.state.transaction();
        let mut said = Vec::with_capacity(tasks.len());
        for task in tasks {
            let mark = Mark { step: task.step + 1, tx: name.clone(), with: Vec::new() };
            tx.set_node_state(&task.run, &task.node, mark.put_on(NodeUpdate::skipped().attempt(task.attempt))?);
            said.push(Said::node(&task.run, &task.node, "skipped", task.attempt));
        }
        let commit = tx.commit().await?;
        self.scribe.acknowledged(&name, &commit, said)?;
        self.bar.inc(u64::try_from(tasks.len()).unwrap_or(0));
        Ok(())
    }

    async fn end_run(&self, place: usize, good: bool) -> Result<(), Failure> {
        let status = if good { RunStatus::Success } else { RunStatus::Failed };
        self.change_run(place, RunUpdate::status(status.clone()), &status).await
    }

    /// Changes a run as a whole: under its lock, which waits for all of its nodes' locks and keeps new ones out.
    pub(crate) async fn change_run(&self, place: usize, update: RunUpdate, status: &RunStatus) -> Result<(), Failure> {
        let run = self.board.run_at(place).ok_or(Failure::Told("no such run on the board".to_owned()))?;
        let name = self.scribe.new_tx();
        let update = update.metadata("write", name.as_str());
        loop {
            let Some(lease) = self.state.acquire_lock(&run, PATIENCE).await? else {
                return Err(Failure::Told(format!("the lock on run {run} was not to be had in {} s", PATIENCE.as_secs())));
            };
            match self.state.with_lease(&lease).update_run(&run, update.clone()).await {
                Ok(commit) => return Ok(self.scribe.acknowledged(&name, &commit, vec![Said::header(&run, status.as_str())])?),
                Err(Error::LeaseLost(_)) => self.tally.lost_locks.fetch_add(1, Ordering::Relaxed),
                Err(error) => return Err(error.into()),
            };
        }
    }
}

/// The name under which an executor asks for locks.
fn owner(executor: usize) -> String {
    format!("executor {executor}")
}
