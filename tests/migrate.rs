//! Moving state between two backends: everything arrives, a cut copy is finished, a difference stops it, and what did not arrive is found.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow;
use std::sync::Arc;

use seeknal_state::project::ProjectErrorKind;
use seeknal_state::project::migrate::{Fate, execute, plan, verify};
use seeknal_state::{
    Batch, Entry, Interval, MemoryBackend, Mutation, NewRun, NodeId, NodeUpdate, Outcome, PartitionKey, RunId, RunPart, RunQuery,
    StateBackend, Version, time,
};

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
