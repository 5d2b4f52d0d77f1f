//! A thread that puts rows of locks in and takes them out, one commit for all that wait: what durable lock pairs cost at least.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::database::{self, STAMP, run};
use crate::Outcome;
use crate::measure::{Contender, Sample};
use crate::workload::Field;

struct Job {
    run: usize,
    /// Whether the row comes; else it goes.
    put: bool,
    done: oneshot::Sender<()>,
}

/// The thread, and how many clients want a row of their own.
pub(crate) struct BareLocks {
    handle: Handle,
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<JoinHandle<Outcome<()>>>,
    clients: usize,
}

impl BareLocks {
    pub(crate) fn open(runtime: &Runtime, handle: Handle, folder: &Path, clients: usize) -> Outcome<Self> {
        let field = Field::new(clients, 0)?;
        let conn = database::sown(runtime, folder, &field)?;
        let (jobs, waiting) = mpsc::unbounded_channel();
        let thread = std::thread::spawn(move || work(&conn, &field, waiting));
        Ok(Self { handle, jobs: Some(jobs), thread: Some(thread), clients })
    }
}

fn work(conn: &Connection, field: &Field, mut waiting: mpsc::UnboundedReceiver<Job>) -> Outcome<()> {
    let mut group = Vec::new();
    let mut token = 0_i64;
    while let Some(first) = waiting.blocking_recv() {
        group.push(first);
        while let Ok(next) = waiting.try_recv() {
            group.push(next);
        }
        run(conn, "BEGIN IMMEDIATE")?;
        {
            let mut put = conn.prepare_cached(
                "INSERT INTO locks (run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, \
                 until, ttl_ms, expires_boot_ms, boot_id) VALUES (?1, '', ?2, ?3, ?4, ?5, ?6, ?7, NULL, ?7, ?7, ?8, ?9, ?6)",
            )?;
            let mut take = conn.prepare_cached("DELETE FROM locks WHERE run_id = ?1 AND node_id = ''")?;
            for job in &group {
                let run = field.runs.get(job.run).ok_or("the field is smaller than the clients")?;
                if job.put {
                    token += 1;
                    let process = "0190a6a0-0000-7000-8000-000000000000";
                    put.execute(params![run.as_str(), token, "client", "localhost", 4_711, process, STAMP, 30_000, 1_i64 << 40])?;
                } else {
                    take.execute([run.as_str()])?;
                }
            }
        }
        run(conn, "COMMIT")?;
        for job in group.drain(..) {
            let _client_gone = job.done.send(());
        }
    }
    Ok(())
}

async fn client(jobs: mpsc::UnboundedSender<Job>, run: usize, until: Instant) -> Outcome<u64> {
    let mut pairs = 0;
    while Instant::now() < until {
        for put in [true, false] {
            let (done, answer) = oneshot::channel();
            if jobs.send(Job { run, put, done }).is_err() || answer.await.is_err() {
                return Err("the thread of the locks has ended".into());
            }
        }
        pairs += 1;
    }
    Ok(pairs)
}

impl Contender for BareLocks {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        let jobs = self.jobs.clone().ok_or("the locks are closed")?;
        let started = Instant::now();
        let until = started + lasting;
        let operations = self.handle.block_on(async {
            let mut tasks = JoinSet::new();
            for index in 0..self.clients {
                tasks.spawn(client(jobs.clone(), index, until));
            }
            let mut pairs = 0;
            while let Some(done) = tasks.join_next().await {
                pairs += done??;
            }
            Ok::<u64, crate::Fault>(pairs)
        })?;
        Ok(Sample { operations, took: started.elapsed(), latencies: Vec::new() })
    }

    fn close(&mut self) -> Outcome<()> {
        drop(self.jobs.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(ended)) => ended,
            Some(Err(_)) => Err("the thread of the locks panicked".into()),
            None => Ok(()),
        }
    }
}
