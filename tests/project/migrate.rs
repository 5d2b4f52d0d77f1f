//! Moving state between two backends: everything arrives, a cut copy is finished, a difference stops it, and what did not arrive is found.
#![cfg(feature = "project")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use seeknal_state::Error;
use seeknal_state::model::{
    Batch, BatchAnswer, Entry, Interval, LeaseRecord, Mutation, NewRun, NodeId, NodeUpdate, Outcome, PartitionKey, RunId,
    RunPage, RunPart, RunQuery, RunState, RunUpdate, Version, time,
};
use seeknal_state::project::migrate::{Fate, execute, plan, verify};
use seeknal_state::project::{ProjectError, ProjectErrorKind, cleanup};
use seeknal_state::store::{BoxFuture, MemoryBackend, OpenReport, StateBackend, StoreError, StoreErrorKind};

fn entry(run: &str, base: u64, mutations: Vec<Mutation>) -> Entry {
    let version = Version(base);
    let part = RunPart { run: RunId::new(run).unwrap(), base: version, expect: version, guards: vec![], mutations, after: None };
    Entry { parts: vec![part], ..Entry::default() }
}

async fn put(backend: &MemoryBackend, entries: Vec<Entry>) {
    for outcome in backend.commit(Arc::new(Batch::new(entries))).await.unwrap().outcomes {
        assert!(matches!(outcome, Outcome::Applied(_)), "{outcome:?}");
    }
}

async fn filled(runs: usize) -> MemoryBackend {
    let backend = MemoryBackend::new();
    let at = time::parse("2024-01-10T12:00:00Z").unwrap();
    let node = |name: &str| NodeId::new(name).unwrap();
    for index in 0..runs {
        let at = at + chrono::Duration::seconds(i64::try_from(index).unwrap());
        put(
            &backend,
            vec![entry(
                &format!("run_{index}"),
                0,
                vec![
                    Mutation::Create { run: NewRun::running().metadata("n", index as u64), at },
                    Mutation::SetNode {
                        node: node("a"),
                        update: Box::new(NodeUpdate::success().row_count(u64::MAX).fingerprint("f").watermark("w", "9")),
                        at,
                    },
                    Mutation::AddInterval { node: node("a"), interval: Interval::parse("2024-01-01", "2024-01-02").unwrap() },
                    Mutation::AddPartition { node: node("b"), partition: PartitionKey::new("dt=1").unwrap() },
                ],
            )],
        )
        .await;
    }
    // One run is deleted and leaves its coverage.
    put(&backend, vec![entry("gone", 0, vec![Mutation::Create { run: NewRun::running(), at }])]).await;
    let gone = RunId::new("gone").unwrap();
    let version = backend.run_version(&gone).await.unwrap().unwrap();
    let interval = Interval::parse("2023-01-01", "2023-02-01").unwrap();
    put(&backend, vec![entry("gone", version.0, vec![Mutation::AddInterval { node: node("a"), interval }])]).await;
    put(&backend, vec![entry("gone", version.0 + 1, vec![Mutation::Delete { keep_coverage: true }])]).await;
    backend
}

#[tokio::test]
async fn everything_arrives_and_a_second_time_moves_nothing() {
    let (source, target) = (filled(250).await, MemoryBackend::new());
    let planned = plan(&source, None, |_, fate| assert_eq!(fate, Fate::Move)).await.unwrap();
    assert_eq!(planned.moves, planned.source);
    assert_eq!((planned.moves.runs, planned.moves.nodes, planned.moves.intervals), (250, 500, 250));
    assert_eq!((planned.moves.partitions, planned.moves.coverage_nodes, planned.moves.rows), (250, 1, u64::MAX));
    let mut batches = 0;
    let moved = execute(&source, &target, || {
        batches += 1;
        ControlFlow::Continue(())
    })
    .await
    .unwrap();
    assert_eq!((moved.moved, moved.verified), (planned.moves, planned.source));
    assert!(batches >= 4, "{batches}");
    assert_eq!(source.retained().await.unwrap(), target.retained().await.unwrap());

    let again = execute(&source, &target, || panic!("nothing is left to move")).await.unwrap();
    assert!(again.moved.is_empty());
    assert_eq!(again.equal_runs, 250);
}

#[tokio::test]
async fn a_copy_that_was_cut_off_anywhere_is_finished_by_the_next() {
    let source = filled(250).await;
    for stop in 1..5 {
        let target = MemoryBackend::new();
        let mut batches = 0;
        let cut = execute(&source, &target, || {
            batches += 1;
            if batches == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .await;
        if let Err(error) = cut {
            assert_eq!(error.kind(), ProjectErrorKind::Stopped);
        }
        execute(&source, &target, || ControlFlow::Continue(())).await.unwrap();
        assert_eq!(verify(&source, &target).await.unwrap().runs, 250);
    }
}

#[tokio::test]
async fn a_run_that_differs_is_named_and_nothing_changes() {
    let (source, target) = (filled(3).await, MemoryBackend::new());
    let at = time::parse("2024-01-10T12:00:01Z").unwrap();
    put(&target, vec![entry("run_1", 0, vec![Mutation::Create { run: NewRun::pending(), at }])]).await;
    let error = execute(&source, &target, || panic!("nothing may be written")).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Conflict);
    assert!(error.to_string().contains("\"run_1\""), "{error}");
    assert_eq!(target.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 1);
}

#[tokio::test]
async fn what_did_not_arrive_is_found() {
    let (source, target) = (filled(2).await, MemoryBackend::new());
    execute(&source, &target, || ControlFlow::Continue(())).await.unwrap();
    let run = RunId::new("run_0").unwrap();
    let version = target.run_version(&run).await.unwrap().unwrap();
    let node = NodeId::new("b").unwrap();
    let partition = PartitionKey::new("dt=1").unwrap();
    put(&target, vec![entry("run_0", version.0, vec![Mutation::RemovePartition { node, partition }])]).await;
    let error = verify(&source, &target).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Integrity);
    assert!(error.to_string().contains("run_0"), "{error}");
}

/// A backend that fails some of its commits.
#[derive(Debug)]
struct Failing {
    inner: MemoryBackend,
    commits: AtomicU32,
    fail: fn(u32) -> Option<StoreError>,
    /// Whether a failed commit was applied all the same.
    applied: bool,
}

impl StateBackend for Failing {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "failing"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.inner.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        let failure = (self.fail)(self.commits.fetch_add(1, Ordering::Relaxed));
        Box::pin(async move {
            match failure {
                None => self.inner.commit(batch).await,
                Some(error) => {
                    if self.applied {
                        self.inner.commit(batch).await?;
                    }
                    Err(error)
                }
            }
        })
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

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, seeknal_state::model::Retained)>, StoreError>> {
        self.inner.retained()
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_with_an_unknown_outcome_is_sent_again_and_applied_once() {
    let source = filled(150).await;
    for applied in [true, false] {
        let fail = |commit: u32| (commit % 3 != 2).then(|| StoreError::unknown(StoreErrorKind::Io, "the answer was lost"));
        let target = Failing { inner: MemoryBackend::new(), commits: AtomicU32::new(0), fail, applied };
        let moved = execute(&source, &target, || ControlFlow::Continue(())).await.unwrap();
        assert_eq!(moved.verified.runs, 150);
        assert!(target.commits.load(Ordering::Relaxed) >= 6);
    }
    let fail = |_: u32| Some(StoreError::unknown(StoreErrorKind::Io, "the answer was lost"));
    let target = Failing { inner: MemoryBackend::new(), commits: AtomicU32::new(0), fail, applied: false };
    let error = execute(&source, &target, || ControlFlow::Continue(())).await.unwrap_err();
    assert!(error.to_string().contains("not known"), "{error}");
    assert!(!error.is_retryable(), "it might be done twice: {error}");
}

#[test]
fn what_may_pass_is_told_as_that() {
    let run = RunId::new("r").unwrap();
    let passes = [
        Error::Overloaded.into(),
        Error::Contended { run: run.clone(), attempts: 3 }.into(),
        ProjectError::from(StoreError::not_applied(StoreErrorKind::Busy, "somebody has it")),
    ];
    for error in passes {
        assert!(error.is_retryable(), "{error}");
    }
    let stays = [
        Error::Closed.into(),
        Error::RunNotFound(run.clone()).into(),
        Error::Unknown(run).into(),
        StoreError::not_applied(StoreErrorKind::Corrupt, "it is damaged").into(),
        ProjectError::new(ProjectErrorKind::Input, "no such thing"),
    ];
    for error in stays {
        assert!(!error.is_retryable(), "{error}");
    }
}

#[tokio::test]
async fn a_copy_that_fails_after_some_runs_says_so() {
    let source = filled(150).await;
    let fail = |commit: u32| (commit == 1).then(|| StoreError::not_applied(StoreErrorKind::Full, "no space; free some space"));
    let target = Failing { inner: MemoryBackend::new(), commits: AtomicU32::new(0), fail, applied: false };
    let error = execute(&source, &target, || ControlFlow::Continue(())).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Partial);
    assert!(error.is_retryable(), "{error}");
    assert!(
        error.to_string().starts_with("100 runs were copied to failing") && error.to_string().contains("no space"),
        "{error}"
    );
    assert_eq!(execute(&source, &target, || ControlFlow::Continue(())).await.unwrap().moved.runs, 50);
    let fail = |commit: u32| (commit == 0).then(|| StoreError::not_applied(StoreErrorKind::Full, "no space; free some space"));
    let target = Failing { inner: MemoryBackend::new(), commits: AtomicU32::new(0), fail, applied: false };
    let error = execute(&source, &target, || ControlFlow::Continue(())).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Failed, "nothing was written: {error}");
}

#[tokio::test]
async fn a_cleanup_that_fails_after_some_runs_says_so() {
    let inner = filled(120).await;
    let at = time::parse("2024-01-11T12:00:00Z").unwrap();
    for index in 0..120 {
        let run = format!("run_{index}");
        let version = inner.run_version(&RunId::new(&run).unwrap()).await.unwrap().unwrap();
        put(&inner, vec![entry(&run, version.0, vec![Mutation::Update { update: RunUpdate::success(), at }])]).await;
    }
    let fail = |commit: u32| (commit == 1).then(|| StoreError::not_applied(StoreErrorKind::Full, "no space; free some space"));
    let backend: Arc<dyn StateBackend> =
        Arc::new(Failing { inner: inner.clone(), commits: AtomicU32::new(0), fail, applied: false });
    let rules = cleanup::Rules::older_than_days(30, 0, time::parse("2025-01-01").unwrap()).unwrap();
    let plan = cleanup::plan(&*backend, rules).await.unwrap();
    assert_eq!(plan.delete.len(), 120);
    let error = cleanup::execute(&backend, &plan).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Partial);
    assert!(error.to_string().starts_with("1 run(s) were deleted"), "{error}");
    assert_eq!(inner.list_runs(&RunQuery::default().limit(1000)).await.unwrap().runs.len(), 119, "each run is whole or gone");
    assert_eq!(cleanup::execute(&backend, &plan).await.unwrap().deleted, 119);
}
