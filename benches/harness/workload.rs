//! What the clients do, through the front door.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seeknal_state::{
    BackendOptions, Coordinator, Durability, NewRun, NodeId, NodeUpdate, RunId, StateBackend, create_state_backend,
};
use tokio::runtime::{Handle, Runtime};
use tokio::task::JoinSet;

use crate::measure::{Contender, Dice, Sample};
use crate::null::NullSink;
use crate::plan::Backend;
use crate::{Fault, Outcome};

/// Runs, and nodes in each of them.
pub(crate) const RUNS: usize = 100;
pub(crate) const NODES: usize = 100;

/// Nodes in one transaction.
const TRANSACTION: usize = 10;
/// Reads between two looks at the clock, which costs as much as a read.
const READS: u64 = 200;
/// Longer than any harness runs: nothing goes to sleep.
const AWAKE: Duration = Duration::from_secs(24 * 3600);

/// What a client does again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// One node's transition, in stable storage.
    Durable,
    /// The same, answered from memory; what is on its way at the end is flushed within the round.
    Deferred,
    /// Ten nodes of one run, whole or not at all.
    Transaction,
    /// A snapshot of a resident run.
    Snapshot,
    /// The same, while a task writes to the same runs as fast as it can.
    SnapshotBesideWriter,
    /// One node of a resident run.
    NodeState,
    /// Locking and releasing a run of its own.
    LockApart,
    /// Locking and releasing one run that all want.
    LockOne,
    /// One node's transition, in stable storage, by two processes with a database and a run in common and nodes of their own.
    Together,
}

impl Work {
    /// Nodes that one operation writes.
    pub(crate) fn width(self) -> usize {
        if self == Self::Transaction { TRANSACTION } else { 1 }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Durable => "durable",
            Self::Deferred => "deferred",
            Self::Transaction => "transaction-of-10",
            Self::Snapshot => "snapshot",
            Self::SnapshotBesideWriter => "snapshot-beside-writer",
            Self::NodeState => "get-node-state",
            Self::LockApart => "lock-apart",
            Self::LockOne => "lock-contended",
            Self::Together => "two-processes-one-run",
        })
    }
}

/// The names of what is written.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) runs: Vec<RunId>,
    pub(crate) nodes: Vec<NodeId>,
}

impl Field {
    pub(crate) fn new(runs: usize, nodes: usize) -> Outcome<Self> {
        Ok(Self {
            runs: (0..runs).map(|index| RunId::new(format!("run_{index:04}"))).collect::<Result<_, _>>()?,
            nodes: (0..nodes).map(|index| NodeId::new(format!("node_{index:04}"))).collect::<Result<_, _>>()?,
        })
    }

    fn run(&self, dice: &mut Dice) -> Outcome<&RunId> {
        self.runs.get(dice.below(self.runs.len())).ok_or_else(|| "there is no run".into())
    }

    fn node(&self, dice: &mut Dice) -> Outcome<&NodeId> {
        self.nodes.get(dice.below(self.nodes.len())).ok_or_else(|| "there is no node".into())
    }

    /// Makes all runs with all nodes.
    pub(crate) async fn sow(&self, state: &Coordinator) -> Outcome<()> {
        for run in &self.runs {
            state.create_run(run, NewRun::running()).await?;
            let mut tx = state.transaction();
            for node in &self.nodes {
                tx.set_node_state(run, node, NodeUpdate::success().row_count(0));
            }
            tx.commit().await?;
        }
        Ok(())
    }
}

/// Opens a coordinator over a new store in a folder.
pub(crate) async fn open(backend: Backend, folder: &Path) -> Outcome<Coordinator> {
    std::fs::create_dir_all(folder)?;
    let options = BackendOptions::new().base_path(folder);
    #[cfg(feature = "libsql")]
    if matches!(backend, Backend::Libsql | Backend::LibsqlSingly) {
        // It lives as long as the harness: with that its shell ends, and with the shell the server.
        let server = Box::leak(Box::new(crate::sqld::Sqld::start().ok_or("there is no libSQL server")?));
        let builder = Coordinator::builder().idle_after(AWAKE);
        // With one write under way at a time none shares its request with another.
        let builder = if backend == Backend::LibsqlSingly { builder.max_in_flight(1) } else { builder };
        return Ok(builder.open(create_state_backend("database", &server.options())?).await?);
    }
    let backend: Arc<dyn StateBackend> = match backend {
        Backend::Memory => create_state_backend("memory", &options)?,
        Backend::File => create_state_backend("file", &options)?,
        Backend::Sqlite => create_state_backend("database", &options)?,
        #[cfg(feature = "libsql")]
        Backend::Libsql | Backend::LibsqlSingly => return Err("a server is opened by its URL".into()),
        #[cfg(feature = "postgres")]
        Backend::Postgres => create_state_backend("database", &crate::yardstick::schema_of(folder)?)?,
        Backend::Null => Arc::new(NullSink::new()),
    };
    Ok(Coordinator::builder().idle_after(AWAKE).open(backend).await?)
}

/// The product under a workload.
pub(crate) struct Product {
    handle: Handle,
    work: Work,
    clients: usize,
    state: Coordinator,
    field: Arc<Field>,
    rounds: u64,
}

impl Product {
    pub(crate) fn open(runtime: &Runtime, work: Work, backend: Backend, clients: usize, folder: &Path) -> Outcome<Self> {
        let state = runtime.block_on(open(backend, folder))?;
        let field = if work == Work::LockApart { Field::new(clients, 0)? } else { Field::new(RUNS, NODES)? };
        runtime.block_on(field.sow(&state))?;
        let state = if work == Work::Deferred { state.with_durability(Durability::Deferred) } else { state };
        Ok(Self { handle: runtime.handle().clone(), work, clients, state, field: Arc::new(field), rounds: 0 })
    }

    /// The same over a store that is open and has everything in it.
    pub(crate) fn over(runtime: &Runtime, work: Work, clients: usize, state: Coordinator, field: Field) -> Self {
        Self { handle: runtime.handle().clone(), work, clients, state, field: Arc::new(field), rounds: 0 }
    }

    async fn clients(&self, lasting: Duration) -> Outcome<Sample> {
        let started = Instant::now();
        let until = started + lasting;
        let mut tasks: JoinSet<Outcome<Tally>> = JoinSet::new();
        for index in 0..self.clients {
            let seed = self.rounds << 32 | u64::try_from(index)?;
            let client =
                Client { work: self.work, state: self.state.clone(), field: Arc::clone(&self.field), index, until, seed };
            tasks.spawn(client.go());
        }
        let writer = (self.work == Work::SnapshotBesideWriter).then(|| {
            let work = Work::Durable;
            let client =
                Client { work, state: self.state.clone(), field: Arc::clone(&self.field), index: 0, until, seed: self.rounds };
            tokio::spawn(client.go())
        });
        let mut sample = Sample::default();
        while let Some(done) = tasks.join_next().await {
            let Tally { operations, latencies } = done??;
            sample.operations += operations;
            sample.latencies.extend(latencies);
        }
        if self.work == Work::Deferred {
            self.state.flush().await?;
        }
        sample.took = started.elapsed();
        if let Some(writer) = writer {
            writer.await??;
        }
        Ok(sample)
    }
}

impl Contender for Product {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        self.rounds += 1;
        self.handle.clone().block_on(self.clients(lasting))
    }

    fn close(&mut self) -> Outcome<()> {
        Ok(self.handle.clone().block_on(self.state.close())?)
    }
}

#[derive(Default)]
struct Tally {
    operations: u64,
    latencies: Vec<u64>,
}

impl Tally {
    /// Notes so many operations that took this long together.
    fn note(&mut self, operations: u64, took: Duration) {
        self.operations += operations;
        self.latencies.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) / operations.max(1));
    }
}

struct Client {
    work: Work,
    state: Coordinator,
    field: Arc<Field>,
    index: usize,
    until: Instant,
    seed: u64,
}

impl Client {
    async fn go(self) -> Outcome<Tally> {
        let mut dice = Dice::new(self.seed);
        let mut tally = Tally::default();
        loop {
            let start = Instant::now();
            if start >= self.until {
                return Ok(tally);
            }
            let operations = self.step(&mut dice).await?;
            tally.note(operations, start.elapsed());
            if operations > 1 {
                // Reading never waits, so that it would keep its worker for ever.
                tokio::task::yield_now().await;
            }
        }
    }

    async fn step(&self, dice: &mut Dice) -> Outcome<u64> {
        let (state, field) = (&self.state, &*self.field);
        match self.work {
            Work::Durable | Work::Deferred | Work::Together => {
                state.set_node_state(field.run(dice)?, field.node(dice)?, transition(dice)).await?;
            }
            Work::Transaction => {
                let run = field.run(dice)?;
                let mut tx = state.transaction();
                for _ in 0..TRANSACTION {
                    tx.set_node_state(run, field.node(dice)?, transition(dice));
                }
                tx.commit().await?;
            }
            Work::Snapshot | Work::SnapshotBesideWriter => {
                for _ in 0..READS {
                    let snapshot = state.snapshot(field.run(dice)?).ok_or("a run is not resident")?;
                    std::hint::black_box(snapshot.version());
                }
                return Ok(READS);
            }
            Work::NodeState => {
                for _ in 0..READS {
                    let node = state.get_node_state(field.run(dice)?, field.node(dice)?).await?.ok_or("a node is not there")?;
                    std::hint::black_box(node.version);
                }
                return Ok(READS);
            }
            Work::LockApart => self.lock(field.runs.get(self.index)).await?,
            Work::LockOne => self.lock(field.runs.first()).await?,
        }
        Ok(1)
    }

    async fn lock(&self, run: Option<&RunId>) -> Outcome<()> {
        let run = run.ok_or_else(|| Fault::from("there is no run"))?;
        let lease = self.state.acquire_lock(run, Duration::from_secs(60)).await?.ok_or("the lock was not granted in a minute")?;
        Ok(lease.release().await?)
    }
}

/// A change that changes a value: storage skips rows that stay as they are.
fn transition(dice: &mut Dice) -> NodeUpdate {
    NodeUpdate::success().row_count(dice.next() >> 24)
}
