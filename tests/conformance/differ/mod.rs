//! Random batches of two openings with views of different age, on two stores: the same answers, the same state. What one ledger cannot know is in them: locks and
//! fences, runs that come and go inside a batch, entries over several runs, numbers and stamps at the ends of what there is. Every batch is sent twice.
//!
//! SQLite is the measure of the others. A failure names its seed; `SEEKNAL_TEST_SEEDS=N` tries the seeds up to N instead of a few.

mod script;

use std::collections::BTreeMap;
use std::sync::Arc;

use seeknal_state::model::{
    Batch, Entry, Fence, FencingToken, Guard, LeaseKey, LeaseMutation, NodeStatus, Outcome, Receipt, Refusal, RunId, RunPart,
    RunQuery, RunState, RunStatus, Version, apply_all,
};
use seeknal_state::store::StateBackend;
use seeknal_state::store::conformance::Harness;

use self::script::{Condition, Lock, NODES, Part, RUNS, Script, Step, node_id, run_id};
use super::batches::{Backend, at, grant};

const OPENINGS: usize = 2;
const ROUNDS: usize = 30;

/// Rounds between two looks at everything: a difference stays.
const LOOK: usize = 5;

/// A version and a token that no store gives out here.
const UNKNOWN: u64 = 888_888_888;

/// One store, as both openings know it.
struct World {
    name: &'static str,
    open: Vec<Backend>,
    /// What each opening read last of every run.
    views: Vec<BTreeMap<RunId, RunState>>,
    locks: BTreeMap<usize, (LeaseKey, FencingToken)>,
}

/// What can be compared of a run: stores number as they like.
fn relative(run: &RunState) -> RunState {
    let since = |version: Version| Version(version.0.wrapping_sub(run.created_version().0));
    let mut header = run.header().clone();
    header.version = since(header.version);
    let nodes = run.nodes().map(|(id, node)| {
        let mut node = node.clone();
        node.version = since(node.version);
        (id.clone(), node)
    });
    RunState::from_parts(run.id().clone(), header, since(run.version()), Version::NONE, nodes)
}

impl World {
    async fn of(name: &'static str, harness: &dyn Harness) -> Self {
        let mut open = Vec::new();
        for _ in 0..OPENINGS {
            let backend = harness.open().await.unwrap();
            backend.initialize().await.unwrap();
            open.push(backend);
        }
        Self { name, open, views: vec![BTreeMap::new(); OPENINGS], locks: BTreeMap::new() }
    }

    fn lock(&self, lock: usize) -> (LeaseKey, FencingToken) {
        self.locks.get(&lock).cloned().unwrap_or((LeaseKey::run(run_id(0)), FencingToken(UNKNOWN)))
    }

    /// The batch as this opening's actors would send it on what they know.
    fn entries(&self, opening: usize, steps: &[Step]) -> Vec<Entry> {
        let views = &self.views[opening];
        let mut tips: BTreeMap<RunId, Option<RunState>> = BTreeMap::new();
        let mut entries = Vec::new();
        for step in steps {
            let mut parts: Vec<_> = Vec::new();
            for Part { run, conditions, mutations, after } in &step.parts {
                let id = run_id(*run);
                let view = views.get(&id);
                let tip = tips.entry(id.clone()).or_insert_with(|| view.cloned());
                let expect = tip.as_ref().map_or(Version::NONE, RunState::version);
                let guards = conditions.iter().map(|condition| guard(condition, tip.as_ref(), view)).collect();
                let mut next = tip.clone();
                let applies = apply_all(&mut next, &id, mutations, expect.next()).is_ok();
                // What a run that this batch makes begins at is not known.
                let brought = next.clone().filter(|_| applies && *after && tip.is_some() && view.is_some());
                if applies {
                    *tip = next;
                }
                let base = view.map_or(Version::NONE, RunState::version);
                parts.push(RunPart { run: id, base, expect, guards, mutations: mutations.clone(), after: brought });
            }
            parts.sort_by(|a, b| a.run.cmp(&b.run));
            let leases = step.locks.iter().map(|lock| self.lease(lock)).collect();
            let fences = step.fences.iter().map(|lock| self.lock(*lock)).map(|(key, token)| Fence { key, token }).collect();
            entries.push(Entry { parts, leases, fences, retained: step.retained.clone(), ..Entry::default() });
        }
        entries
    }

    fn lease(&self, lock: &Lock) -> LeaseMutation {
        let told = |lock: usize, wrong: bool| {
            let (key, token) = self.lock(lock);
            (key, if wrong { FencingToken(UNKNOWN) } else { token })
        };
        match *lock {
            Lock::Grant { run, node, ttl_ms, lock } => {
                let key = LeaseKey { run: run_id(run), node: node.map(node_id) };
                grant(key, &format!("owner {lock}"), ttl_ms).leases.remove(0)
            }
            Lock::Renew { lock, ttl_ms, wrong } => {
                let (key, token) = told(lock, wrong);
                LeaseMutation::Renew { key, token, at: at(5), ttl_ms }
            }
            Lock::Release { lock, wrong } => {
                let (key, token) = told(lock, wrong);
                LeaseMutation::Release { key, token }
            }
            Lock::Force { lock } => LeaseMutation::Force { token: told(lock, false).1 },
        }
    }

    /// Sends a batch twice; what became of its entries, without numbers.
    async fn send(&mut self, opening: usize, steps: &[Step]) -> Vec<String> {
        let batch = Arc::new(Batch::new(self.entries(opening, steps)));
        let answer = self.open[opening].commit(Arc::clone(&batch)).await.unwrap();
        let again = self.open[opening].commit(batch).await.unwrap();
        let mut outlines = Vec::new();
        for (step, outcome) in steps.iter().zip(&answer.outcomes) {
            if let Outcome::Applied(receipt) = outcome {
                assert_eq!(again, answer, "{}: a batch that is sent again is answered as before", self.name);
                self.note(step, receipt);
            }
            outlines.push(outline(outcome));
        }
        outlines
    }

    fn note(&mut self, step: &Step, receipt: &Receipt) {
        let told = step.locks.iter().filter(|lock| matches!(lock, Lock::Grant { .. } | Lock::Renew { .. }));
        for (lock, granted) in told.zip(&receipt.grants) {
            if let Lock::Grant { lock, .. } = lock {
                self.locks.insert(*lock, (granted.key.clone(), granted.token));
            }
        }
    }

    /// Reads a run from what the opening has of it, and as a whole: they must be the same.
    async fn look(&mut self, opening: usize, run: &RunId) {
        let backend = &self.open[opening];
        let whole = backend.load_run(run).await.unwrap();
        if let Some(have) = self.views[opening].remove(run) {
            let reloaded = backend.reload_run(&have).await.unwrap();
            assert_eq!(reloaded, whole, "{}: run {run:?}, reloaded from {have:?}", self.name);
        }
        self.views[opening].extend(whole.map(|state| (run.clone(), state)));
    }

    /// All that can be asked for, without numbers.
    async fn everything(&self) -> Vec<String> {
        let backend: &dyn StateBackend = &*self.open[0];
        let mut found = Vec::new();
        for run in 0..RUNS {
            found.push(format!("{:?}", backend.load_run(&run_id(run)).await.unwrap().as_ref().map(relative)));
        }
        for node in (0..NODES).map(node_id) {
            let latest = backend.latest_node(&node).await.unwrap().map(|(run, mut state)| {
                state.version = Version::NONE;
                (run, state)
            });
            let coverage = backend.coverage(&node).await.unwrap();
            found.push(format!("{node}: {latest:?} {coverage:?} {:?}", backend.last_success(&node).await.unwrap()));
        }
        let mut retained = backend.retained().await.unwrap();
        retained.sort_by(|(a, _), (b, _)| a.cmp(b));
        found.push(format!("{retained:?}"));
        let leases = backend.list_leases().await.unwrap();
        // `until` is by a server's clock where there is one.
        let mut leases: Vec<String> =
            leases.iter().map(|lease| format!("{} {} {} {}", lease.key, lease.owner.name, lease.ttl_ms, lease.since)).collect();
        leases.sort();
        found.extend(leases);
        for mut run in backend.list_runs(&RunQuery::default()).await.unwrap().runs {
            run.header.version = Version::NONE;
            found.push(format!("{:?} {:?} {:?}", run.run_id, run.header, run.nodes));
        }
        let report = backend.verify().await.unwrap();
        assert!(report.is_sound(), "{}: {:?}", self.name, report.problems);
        found
    }
}

/// A condition with the numbers of one store.
fn guard(condition: &Condition, tip: Option<&RunState>, view: Option<&RunState>) -> Guard {
    // Of a run that the batch makes itself no version is known.
    let known = tip.filter(|tip| view.is_some_and(|view| view.created_version() == tip.created_version()));
    match *condition {
        Condition::Absent(node) => Guard::NodeAbsent { node: node_id(node) },
        Condition::Status(node) => {
            Guard::NodeStatus { node: node_id(node), one_of: vec![NodeStatus::Running, NodeStatus::Success] }
        }
        Condition::RunStatus => Guard::RunStatus(vec![RunStatus::Running]),
        Condition::RunVersion(beyond) => {
            Guard::RunVersion(Version(known.map_or(UNKNOWN, |tip| tip.version().0.saturating_add(beyond))))
        }
        Condition::NodeVersion(node, true) => Guard::NodeVersion { node: node_id(node), version: Version::NONE },
        Condition::NodeVersion(node, false) => {
            let of_node = |tip: &RunState| tip.node(node_id(node).as_str()).map_or(Version::NONE, |state| state.version);
            Guard::NodeVersion { node: node_id(node), version: known.map_or(Version(UNKNOWN), of_node) }
        }
        Condition::Unlocked => Guard::Unlocked,
    }
}

fn outline(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Applied(receipt) => {
            let runs = receipt.runs.iter().map(|run| {
                assert!(run.before < run.after);
                (&run.run, if run.before == Version::NONE { 0 } else { run.after.0 - run.before.0 })
            });
            let granted: Vec<String> = receipt.grants.iter().map(|grant| grant.key.to_string()).collect();
            format!("applied to {:?}, granted {granted:?}", runs.collect::<Vec<_>>())
        }
        Outcome::Refused(Refusal::Guard { run, guard, .. }) => format!("{:?} of {run}", std::mem::discriminant(guard)),
        Outcome::Refused(Refusal::Fenced { fence }) => format!("fenced by {}", fence.key),
        Outcome::Refused(Refusal::LeaseHeld { holder }) => format!("held on {}", holder.key.run),
        Outcome::Refused(Refusal::LeaseGone { key, .. }) => format!("gone on {key}"),
        Outcome::Refused(Refusal::Input(_)) => "input".to_owned(),
        Outcome::Refused(other) => format!("{other:?}"),
    }
}

/// Plays one seed on all stores; the first one is the measure.
async fn play(seed: u64, worlds: &mut [World]) {
    let mut script = Script::of(seed);
    for round in 0..ROUNDS {
        let opening = script.dice.below(OPENINGS);
        for run in 0..RUNS {
            // What was not looked at is as old as it is.
            if !script.dice.once_in(4) {
                for world in &mut *worlds {
                    world.look(opening, &run_id(run)).await;
                }
            }
        }
        let there = std::array::from_fn(|run| worlds[0].views[opening].contains_key(&run_id(run)));
        let batch = script.batch(there);
        let mut measure = None;
        for world in &mut *worlds {
            let outcomes = world.send(opening, &batch).await;
            let (named, expected) = measure.get_or_insert_with(|| (world.name, outcomes.clone()));
            let at = outcomes.iter().zip(&*expected).position(|(found, expected)| found != expected);
            // A libSQL server that reads a run as a whole does not say when a node went: there more may be stale, which is decided again by who sent it.
            if world.name == "libsql" && at.is_some_and(|at| outcomes[at].starts_with("Stale")) {
                return;
            }
            if let Some(at) = at {
                panic!(
                    "seed {seed}, round {round}, entry {at}: {} where {named} says {}, {} says {}",
                    format_args!("{:#?}", batch[at]),
                    expected[at],
                    world.name,
                    outcomes[at]
                );
            }
        }
        if round % LOOK != LOOK - 1 {
            continue;
        }
        let mut measure = None;
        for world in &*worlds {
            let found = world.everything().await;
            let (named, expected) = measure.get_or_insert_with(|| (world.name, found.clone()));
            assert_eq!(found, *expected, "seed {seed}, round {round}: {} and {named} after {batch:#?}", world.name);
        }
    }
}

/// How many seeds are played where nobody says it.
fn seeds(usual: u64) -> impl Iterator<Item = u64> {
    let asked = std::env::var("SEEKNAL_TEST_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    1..=asked.unwrap_or(usual)
}

async fn close(worlds: Vec<World>) {
    for backend in worlds.iter().flat_map(|world| &world.open) {
        backend.close().await.unwrap();
    }
}

/// Alone it is only asked whether it agrees with itself: sent again, reloaded, verified.
#[tokio::test]
async fn sqlite_agrees_with_itself() {
    for seed in seeds(10) {
        let folder = super::Folder::of("database");
        let mut worlds = vec![World::of("sqlite", &folder).await];
        play(seed, &mut worlds).await;
        close(worlds).await;
    }
}

#[cfg(feature = "postgres")]
#[tokio::test]
async fn postgres_does_as_sqlite_does() {
    for seed in seeds(3) {
        let folder = super::Folder::of("database");
        let Some(server) = super::Postgres::of("?sslmode=disable") else { return };
        let mut worlds = vec![World::of("sqlite", &folder).await, World::of("postgres", &server).await];
        play(seed, &mut worlds).await;
        close(worlds).await;
    }
}

#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libsql_does_as_sqlite_does() {
    for seed in seeds(2) {
        let folder = super::Folder::of("database");
        let Some(server) = tokio::task::spawn_blocking(super::sqld::Sqld::start).await.unwrap() else { return };
        let server = super::Libsql(server);
        let mut worlds = vec![World::of("sqlite", &folder).await, World::of("libsql", &server).await];
        play(seed, &mut worlds).await;
        close(worlds).await;
    }
}
