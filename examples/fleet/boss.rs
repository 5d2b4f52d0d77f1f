//! The boss: makes the run, starts workers, kills and stops them, and checks what they leave behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use seeknal_state::{Coordinator, NewRun, NodeId, NodeUpdate, RunId, RunUpdate};

use crate::check::{Findings, compare};
use crate::dag::Dag;
use crate::progress::Progress;
use crate::{Failure, Options, URL_VARIABLE, ack, backend, chance};

/// How often the boss looks around.
const GLANCE: Duration = Duration::from_millis(10);
/// A fleet that notes nothing for so long, beyond what one node may take, hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often the boss asks whether something was noted.
const CHECK: Duration = Duration::from_secs(1);
/// Nodes that are made in one transaction.
const AT_ONCE: usize = 2_000;

/// A worker process. Dropped it is killed: no process is left behind.
struct Worker {
    child: Child,
    /// When it is to go on, while it is stopped.
    wakes: Option<Instant>,
}

impl Worker {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself a moment ago.
            let _gone = kill_process(pid, signal);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[derive(Debug, Default)]
struct Deeds {
    started: usize,
    killed: usize,
    stopped: usize,
    failed: usize,
}

type Plan = BTreeMap<NodeId, BTreeSet<NodeId>>;

struct Fleet<'o> {
    options: &'o Options,
    url: Option<&'o str>,
    target: PathBuf,
    acks: PathBuf,
    run: RunId,
    deeds: Deeds,
}

/// Runs the whole story; says whether all is as it must be.
pub(crate) async fn run(options: &Options, url: Option<&str>) -> Result<bool, Failure> {
    let fresh = if options.project_path.is_none() { Some(tempfile::tempdir()?) } else { None };
    let project = options.project_path.as_deref().or_else(|| fresh.as_ref().map(tempfile::TempDir::path));
    let target = super::options::target(project.unwrap_or(Path::new(".")))?;
    let acks = options.ack_log_dir.clone().unwrap_or_else(|| target.join("acks"));
    std::fs::create_dir_all(&target)?;
    std::fs::create_dir_all(&acks)?;
    let run = RunId::new(format!("fleet_{}", uuid::Uuid::now_v7().simple()))?;

    let state = Coordinator::open(backend(&target, url)?).await?;
    let plan = make_run(&state, &run, options).await?;
    if !options.only_summary {
        say(&format!("{}: run {run}, {} nodes, {} workers", state.backend().location(), plan.len(), options.workers))?;
    }
    let mut fleet = Fleet { options, url, target, acks, run: run.clone(), deeds: Deeds::default() };
    let began = Instant::now();
    fleet.drain().await?;
    let took = began.elapsed();

    state.update_run(&run, RunUpdate::success()).await?;
    let stored = state.backend().load_run(&run).await?.ok_or_else(|| Failure::Told(format!("run {run:?} is gone")))?;
    let leases = state.list_locks().await?.into_iter().filter(|lease| lease.key.run == run).count();
    state.close().await?;
    let lines = ack::read_all(&fleet.acks)?;
    let killed = fleet.deeds.killed + fleet.deeds.failed > 0;
    let mut findings = compare(&plan, &lines, &stored, killed);
    if leases > 0 {
        findings.problems.push(format!("{leases} leases are left"));
    }
    summary(&findings, &fleet.deeds, plan.len(), took)?;
    Ok(findings.problems.is_empty())
}

async fn make_run(state: &Coordinator, run: &RunId, options: &Options) -> Result<Plan, Failure> {
    let dag = Dag::made_up(options.nodes, options.work.seed)?;
    let name = |index: usize| dag.step(index).map(|step| step.id.clone());
    let plan: Plan = dag
        .steps()
        .iter()
        .map(|step| (step.id.clone(), step.upstream.iter().filter_map(|index| name(*index)).collect()))
        .collect();
    state.create_run(run, NewRun::running().metadata("made_by", "fleet")).await?;
    let nodes: Vec<_> = plan.iter().collect();
    for some in nodes.chunks(AT_ONCE) {
        let mut tx = state.transaction();
        for (node, needs) in some {
            tx.set_node_state(run, *node, NodeUpdate::pending().depends_on(needs.iter()));
        }
        tx.commit().await?;
    }
    Ok(plan)
}

impl Fleet<'_> {
    /// Starts workers, and kills and stops them until the run is drained.
    async fn drain(&mut self) -> Result<(), Failure> {
        let Options { kill_every_ms, .. } = *self.options;
        let mut workers: Vec<Worker> = Vec::new();
        for _ in 0..self.options.workers {
            workers.push(self.start()?);
        }
        let began = Instant::now();
        let mut harm_due = (kill_every_ms > 0).then(|| began + self.pause(0));
        let mut harms = 0;
        let patience = PATIENCE + Duration::from_millis(self.options.work.work_ms);
        let (mut progress, mut check_due) = (Progress::new(patience, began), began + CHECK);
        while !workers.is_empty() {
            tokio::time::sleep(GLANCE).await;
            let now = Instant::now();
            if check_due <= now {
                check_due = now + CHECK;
                if progress.hangs(self.noted()?, now) {
                    return Err(Failure::Told(format!("the run is not drained, and for {patience:?} no worker noted anything")));
                }
            }
            for index in (0..workers.len()).rev() {
                let Some(worker) = workers.get_mut(index) else { continue };
                if worker.wakes.is_some_and(|wakes| wakes <= now) {
                    worker.wakes = None;
                    worker.signal(Signal::CONT);
                }
                if let Some(status) = worker.child.try_wait()? {
                    drop(workers.swap_remove(index));
                    if status.success() {
                        // It was told that nothing is left.
                        harm_due = None;
                    } else {
                        self.deeds.failed += 1;
                        if self.deeds.failed > self.options.workers {
                            return Err(Failure::Told(format!("workers end by themselves: {status}")));
                        }
                        workers.push(self.start()?);
                    }
                }
            }
            if harm_due.is_some_and(|due| due <= now) && !workers.is_empty() {
                harms += 1;
                self.harm(&mut workers, harms)?;
                harm_due = Some(now + self.pause(harms));
            }
        }
        Ok(())
    }

    /// How many bytes the workers have noted in all.
    fn noted(&self) -> std::io::Result<u64> {
        let mut noted = 0;
        for entry in std::fs::read_dir(&self.acks)? {
            noted += entry?.metadata()?.len();
        }
        Ok(noted)
    }

    /// Half to one and a half of the pause that was asked for.
    fn pause(&self, harms: u64) -> Duration {
        let every = self.options.kill_every_ms;
        Duration::from_millis(every / 2 + chance::below(every.max(1), self.options.work.seed, &["pause", &harms.to_string()]))
    }

    fn harm(&mut self, workers: &mut Vec<Worker>, harms: u64) -> Result<(), Failure> {
        let dice = |what: &str, limit: u64| chance::below(limit, self.options.work.seed, &[what, &harms.to_string()]);
        let count = u64::try_from(workers.len()).unwrap_or(1);
        let index = usize::try_from(dice("who", count)).unwrap_or(0);
        let Some(worker) = workers.get_mut(index) else { return Ok(()) };
        #[expect(clippy::cast_precision_loss, reason = "a share of a thousand")]
        let stop = (dice("how", 1_000) as f64) < self.options.pause_share * 1_000.0;
        if stop && worker.wakes.is_none() {
            worker.signal(Signal::STOP);
            let ttl = self.options.work.ttl();
            worker.wakes = Some(Instant::now() + ttl * 3 / 2 + Duration::from_millis(dice("long", self.options.work.ttl_ms)));
            self.deeds.stopped += 1;
            return Ok(());
        }
        // Also one that is stopped: it never wakes.
        drop(workers.swap_remove(index));
        self.deeds.killed += 1;
        let heir = self.start()?;
        workers.push(heir);
        Ok(())
    }

    fn start(&mut self) -> Result<Worker, Failure> {
        self.deeds.started += 1;
        let name = format!("w{}", self.deeds.started);
        let work = &self.options.work;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("worker");
        let log = self.acks.join(format!("{}-{name}.jsonl", self.run));
        let path = |command: &mut Command, flag: &str, value: &Path| {
            command.arg(flag).arg(value);
        };
        path(&mut command, "--target", &self.target);
        path(&mut command, "--ack-log", &log);
        command.args(["--run", self.run.as_str(), "--name", &name]);
        for (flag, value) in [
            ("--executors", u64::try_from(work.executors).unwrap_or(u64::MAX)),
            ("--work-ms", work.work_ms),
            ("--ttl-ms", work.ttl_ms),
            ("--seed", work.seed),
        ] {
            command.arg(flag).arg(value.to_string());
        }
        if let Some(url) = self.url {
            command.env(URL_VARIABLE, url);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Worker { child: command.spawn()?, wakes: None })
    }
}

fn say(line: &str) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{line}")
}

fn summary(findings: &Findings, deeds: &Deeds, nodes: usize, took: Duration) -> std::io::Result<()> {
    let seconds = took.as_secs_f64().max(1e-3);
    #[expect(clippy::cast_precision_loss, reason = "a rate, for people")]
    let rate = nodes as f64 / seconds;
    say(&format!("nodes               {nodes}"))?;
    say(&format!("claims              {}", findings.claims))?;
    say(&format!("takeovers           {}", findings.takeovers))?;
    say(&format!("late writes refused {}", findings.refused))?;
    say(&format!("ends not noted      {}", findings.unnoted))?;
    say(&format!(
        "workers             {} started, {} killed, {} stopped, {} failed",
        deeds.started, deeds.killed, deeds.stopped, deeds.failed
    ))?;
    say(&format!("time                {seconds:.2} s, {rate:.0} nodes claimed and completed a second"))?;
    if findings.problems.is_empty() {
        return say("check               every node was done exactly once, by its final token, in its order");
    }
    for problem in findings.problems.iter().take(20) {
        say(&format!("PROBLEM             {problem}"))?;
    }
    say(&format!("check               {} problems", findings.problems.len()))
}
