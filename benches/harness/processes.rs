//! Processes with one database and one run in common, each with nodes of its own. They are this program, started again, and work when they are told.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use seeknal_state::{NewRun, NodeId, RunId};
use tokio::runtime::Runtime;

use crate::measure::{Contender, Sample};
use crate::plan::Backend;
use crate::workload::{Field, NODES, Product, Work, open};
use crate::{Fault, Outcome};

const RUN: &str = "run_0000";

fn field(number: usize) -> Outcome<Field> {
    Ok(Field {
        runs: vec![RunId::new(RUN)?],
        nodes: (0..NODES).map(|index| NodeId::new(format!("of_{number}_{index:04}"))).collect::<Result<_, _>>()?,
    })
}

/// The side of a worker: opens the store, then works whenever it is told for how long, and says how many operations that were.
pub(crate) fn work(folder: &Path, number: usize, clients: usize) -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let state = runtime.block_on(open(Backend::Sqlite, folder))?;
    runtime.block_on(state.get_run(RUN))?.ok_or("the run is not there")?;
    let mut product = Product::over(&runtime, Work::Together, clients, state, field(number)?);
    println!("open");
    for order in std::io::stdin().lines() {
        let sample = product.round(Duration::from_millis(order?.parse()?))?;
        println!("{}", sample.operations);
    }
    product.close()
}

struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    fn start(folder: &Path, number: usize, clients: usize) -> Outcome<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--worker")
            .arg(folder)
            .args(["--part", &number.to_string(), &clients.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take();
        let output = child.stdout.take().ok_or("a worker without an output")?;
        let mut worker = Self { child, orders, answers: BufReader::new(output).lines() };
        match worker.answer()?.as_str() {
            "open" => Ok(worker),
            other => Err(Fault::from(format!("a worker: {other}"))),
        }
    }

    fn answer(&mut self) -> Outcome<String> {
        Ok(self.answers.next().ok_or("a worker ended too early")??)
    }

    fn tell(&mut self, lasting: Duration) -> Outcome<()> {
        let orders = self.orders.as_mut().ok_or("a worker that was closed")?;
        Ok(writeln!(orders, "{}", lasting.as_millis())?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Without its orders it closes its store and ends.
        drop(self.orders.take());
        let _reaped = self.child.wait().is_ok();
    }
}

/// So many processes.
pub(crate) struct Processes(Vec<Worker>);

impl Processes {
    pub(crate) fn start(runtime: &Runtime, folder: &Path, count: usize, clients: usize) -> Outcome<Self> {
        runtime.block_on(async {
            let state = open(Backend::Sqlite, folder).await?;
            state.create_run(RUN, NewRun::running()).await?;
            Ok::<(), Fault>(state.close().await?)
        })?;
        Ok(Self((0..count).map(|number| Worker::start(folder, number, clients)).collect::<Outcome<_>>()?))
    }
}

impl Contender for Processes {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        let started = Instant::now();
        for worker in &mut self.0 {
            worker.tell(lasting)?;
        }
        let mut sample = Sample::default();
        for worker in &mut self.0 {
            sample.operations += worker.answer()?.parse::<u64>()?;
        }
        sample.took = started.elapsed();
        Ok(sample)
    }
}
