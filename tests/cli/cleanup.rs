//! Cleanup beside others who write, and where a run cannot go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use seeknal_state::model::{
    Batch, BatchAnswer, LeaseRecord, Mutation, NewRun, NodeId, NodeUpdate, RunId, RunPage, RunQuery, RunState, RunUpdate, time,
};
use seeknal_state::project::cleanup::{self, Plan, Rules};
use seeknal_state::store::{BoxFuture, MemoryBackend, OpenReport, StateBackend, StoreError};
use seeknal_state::{BackendOptions, Coordinator, create_state_backend};
use tokio::time::Instant;

use crate::projects::{open, project, put};
use crate::run;

/// A run that ended long ago.
async fn old_run(backend: &Arc<dyn StateBackend>, run: &str, nodes: u64) {
    let at = time::parse("2024-01-10T12:00:00Z").unwrap();
    let mut mutations = vec![Mutation::Create { run: NewRun::running(), at }];
    for index in 0..nodes {
        let node = NodeId::new(format!("n{index}")).unwrap();
        mutations.push(Mutation::SetNode { node, update: Box::new(NodeUpdate::success()), at });
    }
    mutations.push(Mutation::Update { update: RunUpdate::success(), at });
    put(backend, run, mutations).await;
}

async fn plan(backend: &Arc<dyn StateBackend>) -> Plan {
    cleanup::plan(&**backend, Rules::older_than_days(30, 0, time::parse("2025-01-01").unwrap()).unwrap()).await.unwrap()
}

/// A database that is shared: a transaction takes its time for each node that goes.
#[derive(Debug, Default)]
struct Shared {
    inner: MemoryBackend,
    nodes: BTreeMap<RunId, u32>,
    /// Runs of which one node completed as much as if it were that many.
    completed: Mutex<BTreeSet<RunId>>,
    /// When each transaction began and ended, and how many runs it held.
    held: Mutex<Vec<(Instant, Instant, usize)>>,
    slow: AtomicU32,
}

/// What a node that goes takes.
const A_NODE: Duration = Duration::from_micros(20);

impl StateBackend for Shared {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "shared"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.inner.initialize()
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            let began = Instant::now();
            if self.slow.load(Ordering::Relaxed) > 0 {
                let runs = batch.entries.iter().flat_map(|entry| &entry.parts).map(|part| &part.run);
                tokio::time::sleep(A_NODE * runs.map(|run| self.nodes.get(run).unwrap_or(&0)).sum()).await;
            }
            let answer = self.inner.commit(Arc::clone(&batch)).await;
            self.held.lock().unwrap().push((began, Instant::now(), batch.entries.len()));
            answer
        })
    }

    fn count_completed<'a>(&'a self, run: &'a RunId, most: u32) -> BoxFuture<'a, Result<Option<u64>, StoreError>> {
        let completed = self.completed.lock().unwrap().contains(run).then(|| self.nodes[run].min(most).into());
        Box::pin(async move { Ok(completed) })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.inner.load_run(run)
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.inner.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.inner.list_leases()
    }
}

/// Large runs go one by one, small ones together; and others have a turn as long as they had to wait.
#[tokio::test(start_paused = true)]
async fn a_cleanup_leaves_those_who_write_their_turns() {
    let sizes = (0..40).map(|number| if number % 2 == 0 { 8_000 } else { 5 });
    let nodes: BTreeMap<_, _> =
        sizes.chain([5; 400]).enumerate().map(|(number, nodes)| (RunId::new(format!("run_{number}")).unwrap(), nodes)).collect();
    let shared = Arc::new(Shared { nodes: nodes.clone(), ..Shared::default() });
    let backend: Arc<dyn StateBackend> = Arc::clone(&shared) as _;
    for (run, nodes) in &nodes {
        // How many it has decides; each of them would only take the test's time.
        let few = if *nodes == 8_000 { 800 } else { 1 };
        old_run(&backend, run.as_str(), few).await;
    }
    let mut plan = plan(&backend).await;
    for (number, doomed) in plan.delete.iter_mut().enumerate() {
        if number % 3 == 0 {
            doomed.nodes = 1;
            shared.completed.lock().unwrap().insert(doomed.run_id.clone());
        } else {
            doomed.nodes = u64::from(nodes[&doomed.run_id]);
        }
    }
    shared.held.lock().unwrap().clear();
    shared.slow.store(1, Ordering::Relaxed);
    assert_eq!(cleanup::execute(&backend, &plan).await.unwrap().deleted, 440);
    let held = shared.held.lock().unwrap();
    for (before, after) in held.iter().zip(held.iter().skip(1)) {
        let took = before.1 - before.0;
        assert!(took < Duration::from_millis(350), "{took:?} for {} runs", before.2);
        assert!(after.0 - before.1 >= took.min(Duration::from_secs(1)), "a turn after {took:?}: {:?}", after.0 - before.1);
    }
    assert!(held.iter().any(|(_, _, runs)| *runs == 50), "small ones go together");
}

async fn with_an_unreadable_run() -> tempfile::TempDir {
    let dir = project("database").await;
    let backend = open("database", &dir.path().join("target")).await;
    for number in 0..60 {
        old_run(&backend, &format!("old_{number}"), 2).await;
    }
    backend.close().await.unwrap();
    let sql = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
    let harmed = "UPDATE node_states SET metadata = '{' WHERE run_id = 'old_30' AND node_id = 'n1'";
    assert_eq!(sql.execute(harmed, []).unwrap(), 1);
    dir
}

/// One run that cannot be read keeps no other one back, stays, and is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_read_stays_and_the_others_go() {
    let dir = with_an_unreadable_run().await;
    let (code, out, err) = run(dir.path(), "-o json state cleanup --days 30");
    assert_eq!(code, 6, "{err}");
    assert!(err.contains("62 run(s) were deleted") && err.contains("old_30") && err.contains("metadata"), "{err}");
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&told["deleted"], told["failed"].as_array().unwrap().len()), (&62.into(), 1), "{told}");
    assert_eq!(told["failed"][0]["run_id"], "old_30");
    let left: serde_json::Value = serde_json::from_str(&run(dir.path(), "-o json state runs --prefix old").1).unwrap();
    assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
    let (code, out, err) = run(dir.path(), "state cleanup --days 30");
    assert_eq!(code, 5, "nothing is left that could go: {err}");
    assert!(out.contains("kept old_30: ") && out.contains("Deleted 0 runs"), "{out}");

    // Where only its nodes would tell when it ended.
    let sql = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
    assert_eq!(sql.execute("UPDATE runs SET finished_at = NULL WHERE run_id = 'old_30'", []).unwrap(), 1);
    drop(sql);
    let (code, out, err) = run(dir.path(), "state cleanup --days 30");
    assert!(code == 5 && out.contains("kept old_30: "), "{out}{err}");

    let dir = with_an_unreadable_run().await;
    let options = BackendOptions::new().base_path(dir.path().join("target"));
    let state = Coordinator::open(create_state_backend("database", &options).unwrap()).await.unwrap();
    let plan = plan(state.backend()).await;
    let cleaned = cleanup::through(&state, &plan).await.unwrap();
    assert_eq!((cleaned.deleted, cleaned.failed.len()), (62, 1));
    assert_eq!(cleaned.failed[0].run_id, "old_30");
    assert!(cleaned.failed[0].reason.contains("metadata"), "{}", cleaned.failed[0].reason);
    state.close().await.unwrap();
}
