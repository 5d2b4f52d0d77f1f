//! A coordinator that only reads the file, beside the one that writes it.
#![cfg(feature = "file")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::time::{Duration, Instant};

use seeknal_state::{
    BackendOptions, Coordinator, Event, LeaseKey, LockOptions, NewRun, NodeStatus, NodeUpdate, OnDelete, RunId, RunUpdate,
    StoreErrorKind, create_state_backend,
};

async fn open(folder: &Path, read_only: bool) -> Coordinator {
    let options = BackendOptions::new().base_path(folder).read_only(read_only);
    Coordinator::open(create_state_backend("file", &options).unwrap()).await.unwrap()
}

async fn wait_for(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < Duration::from_secs(20), "it did not happen: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_follow_the_writer() {
    let folder = tempfile::tempdir().unwrap();
    let writer = open(folder.path(), false).await;
    writer.create_run("run_1", NewRun::running()).await.unwrap();
    let reader = open(folder.path(), true).await;
    assert!(reader.get_run("run_1").await.unwrap().is_some());
    let mut changes = reader.subscribe();
    for rows in 0..5_u64 {
        writer.set_node_state("run_1", "n", NodeUpdate::success().row_count(rows)).await.unwrap();
        let seen = || reader.snapshot("run_1").and_then(|run| run.node("n")?.row_count);
        wait_for("the snapshot follows", async || seen() == Some(rows)).await;
    }
    let Event::Changed(change) = changes.next().await.unwrap() else { unreachable!() };
    assert_eq!((change.run.as_str(), change.nodes.len()), ("run_1", 1));
    // Also over a checkpoint, and to the end of a run.
    writer.backend().checkpoint().await.unwrap();
    writer.delete_run("run_1", OnDelete::DropCoverage).await.unwrap();
    wait_for("a deleted run goes", async || reader.get_run("run_1").await.unwrap().is_none()).await;
    writer.create_run("run_2", NewRun::running()).await.unwrap();
    wait_for("a new run comes", async || reader.get_run("run_2").await.unwrap().is_some()).await;
    let freshness = reader.health().freshness;
    assert!(freshness.shared && freshness.followed_at.is_some() && freshness.stale_since.is_none());
    let error = reader.create_run("run_3", NewRun::running()).await.unwrap_err();
    assert!(matches!(&error, seeknal_state::Error::Store(error) if error.kind() == StoreErrorKind::Busy), "{error}");
    reader.close().await.unwrap();
    writer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_read_is_fresh() {
    let folder = tempfile::tempdir().unwrap();
    let writer = open(folder.path(), false).await;
    writer.create_run("run_1", NewRun::running()).await.unwrap();
    let reader = open(folder.path(), true).await;
    assert!(reader.get_run("run_1").await.unwrap().is_some());
    for rows in 0..20_u64 {
        writer.set_node_state("run_1", "n", NodeUpdate::success().row_count(rows)).await.unwrap();
        let run = reader.fresh("run_1").await.unwrap().unwrap();
        assert_eq!(run.node("n").unwrap().row_count, Some(rows));
    }
    reader.close().await.unwrap();
    writer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_of_the_writer_are_abandoned_when_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let writer = open(folder.path(), false).await;
    writer.create_run("run_1", NewRun::running()).await.unwrap();
    writer.create_run("ended", NewRun::running()).await.unwrap();
    writer.update_run("ended", RunUpdate::success()).await.unwrap();
    let reader = open(folder.path(), true).await;
    assert_eq!(reader.abandoned_runs().await.unwrap(), [], "its process lives");
    let key = LeaseKey::run(RunId::new("run_1").unwrap());
    let lease = writer.acquire(key.clone(), LockOptions::new().owner("task"), Duration::ZERO).await.unwrap().unwrap();
    wait_for("the lock is listed", async || {
        reader.list_locks().await.unwrap().iter().any(|held| held.key == key && held.token == lease.token())
    })
    .await;
    drop(lease);
    writer.close().await.unwrap();
    let abandoned = reader.abandoned_runs().await.unwrap();
    assert_eq!(abandoned.iter().map(|run| run.summary.run_id.as_str()).collect::<Vec<_>>(), ["run_1"]);
    assert_eq!(reader.list_locks().await.unwrap(), []);
    // The next writer finds the same.
    let next = open(folder.path(), false).await;
    assert_eq!(next.abandoned_runs().await.unwrap(), abandoned);
    next.resume_run("run_1").await.unwrap();
    assert_eq!(next.abandoned_runs().await.unwrap(), []);
    assert_eq!(reader.abandoned_runs().await.unwrap(), []);
    next.set_node_state("run_1", "n", NodeUpdate::running()).await.unwrap();
    let run = reader.fresh("run_1").await.unwrap().unwrap();
    assert_eq!(run.node("n").unwrap().status, NodeStatus::Running);
    next.close().await.unwrap();
    reader.close().await.unwrap();
}
