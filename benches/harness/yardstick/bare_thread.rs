//! A thread that commits in one transaction whatever its clients ask for meanwhile, and answers each of them: what any design with a writer of its
//! own pays at least. No actors, no versions that are checked, no conditions, no fate of a single entry.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::database::{self, STAMP, run};
use super::raw_loop::{RawLoop, Rows};
use crate::Outcome;
use crate::measure::{Contender, Sample};
use crate::workload::Field;

/// What a client wants to have done.
struct Job {
    client: usize,
    step: usize,
    done: oneshot::Sender<()>,
}

/// The thread, and how many clients ask it.
pub(crate) struct BareThread {
    handle: Handle,
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<JoinHandle<Outcome<()>>>,
    clients: usize,
    /// Steps of one operation, each waited for.
    steps: usize,
}

impl BareThread {
    /// Every client puts a row of a lock in, and takes it out.
    pub(crate) fn locks(runtime: &Runtime, folder: &Path, clients: usize) -> Outcome<Self> {
        let field = Field::new(clients, 0)?;
        let conn = database::sown(runtime, folder, &field, false)?;
        let mut token = 0;
        let commit = move |group: &[Job]| commit_locks(&conn, &field, &mut token, group);
        Ok(Self::start(runtime, clients, 2, commit))
    }

    /// Every client writes the rows of transitions.
    pub(crate) fn transitions(runtime: &Runtime, folder: &Path, clients: usize, width: usize) -> Outcome<Self> {
        let mut rows = RawLoop::open(runtime, folder, Rows::Same, 0, width)?;
        Ok(Self::start(runtime, clients, 1, move |group| rows.transaction(group.len()).map(|_| ())))
    }

    fn start(
        runtime: &Runtime,
        clients: usize,
        steps: usize,
        mut commit: impl FnMut(&[Job]) -> Outcome<()> + Send + 'static,
    ) -> Self {
        let (jobs, mut waiting) = mpsc::unbounded_channel::<Job>();
        let thread = std::thread::spawn(move || {
            let mut group = Vec::new();
            while let Some(first) = waiting.blocking_recv() {
                group.push(first);
                while let Ok(next) = waiting.try_recv() {
                    group.push(next);
                }
                commit(&group)?;
                for job in group.drain(..) {
                    let _client_gone = job.done.send(());
                }
            }
            Ok(())
        });
        Self { handle: runtime.handle().clone(), jobs: Some(jobs), thread: Some(thread), clients, steps }
    }
}

fn commit_locks(conn: &Connection, field: &Field, token: &mut i64, group: &[Job]) -> Outcome<()> {
    run(conn, "BEGIN IMMEDIATE")?;
    let mut put = conn.prepare_cached(
        "INSERT INTO locks (run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, \
         until, ttl_ms, expires_boot_ms, boot_id) VALUES (?1, '', ?2, ?3, ?4, ?5, ?6, ?7, NULL, ?7, ?7, ?8, ?9, ?6)",
    )?;
    let mut take = conn.prepare_cached("DELETE FROM locks WHERE run_id = ?1 AND node_id = ''")?;
    for job in group {
        let run = field.runs.get(job.client).ok_or("the field is smaller than the clients")?;
        if job.step == 0 {
            *token += 1;
            let process = "0190a6a0-0000-7000-8000-000000000000";
            put.execute(params![run.as_str(), *token, "client", "localhost", 4_711, process, STAMP, 30_000, 1_i64 << 40])?;
        } else {
            take.execute([run.as_str()])?;
        }
    }
    run(conn, "COMMIT")?;
    Ok(())
}

async fn client(jobs: mpsc::UnboundedSender<Job>, client: usize, steps: usize, until: Instant) -> Outcome<u64> {
    let mut operations = 0;
    while Instant::now() < until {
        for step in 0..steps {
            let (done, answer) = oneshot::channel();
            if jobs.send(Job { client, step, done }).is_err() || answer.await.is_err() {
                return Err("the thread has ended".into());
            }
        }
        operations += 1;
    }
    Ok(operations)
}

impl Contender for BareThread {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        let jobs = self.jobs.clone().ok_or("the thread is closed")?;
        let started = Instant::now();
        let until = started + lasting;
        let operations = self.handle.block_on(async {
            let mut tasks = JoinSet::new();
            for index in 0..self.clients {
                tasks.spawn(client(jobs.clone(), index, self.steps, until));
            }
            let mut operations = 0;
            while let Some(done) = tasks.join_next().await {
                operations += done??;
            }
            Ok::<u64, crate::Fault>(operations)
        })?;
        Ok(Sample { operations, took: started.elapsed(), latencies: Vec::new() })
    }

    fn close(&mut self) -> Outcome<()> {
        drop(self.jobs.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(ended)) => ended,
            Some(Err(_)) => Err("the thread panicked".into()),
            None => Ok(()),
        }
    }
}
