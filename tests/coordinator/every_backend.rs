//! The coordinator through its front door, on every backend.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::Duration;

use crate::support::Store;
use seeknal_state::{
    Coordinator, Durability, Error, Event, NewRun, NodeStatus, NodeUpdate, OnDelete, RunFilter, RunQuery, RunStatus, RunUpdate,
    Version,
};

on_every_backend!(
    the_guides_protocol_under_its_own_names,
    many_executors_on_many_runs_lose_nothing,
    guards_are_decided_at_commit,
    conditions_and_fences_alone_are_decided_too,
    transactions_over_several_runs_are_whole_for_readers,
    transact_counts_exactly_under_contention,
    deferred_writes_are_seen_at_once_and_durable_after_flush,
    idle_runs_go_to_sleep_and_come_back,
    subscribers_hear_of_every_commit_in_order,
    pages_of_runs_newest_first,
    a_full_coordinator_makes_callers_wait,
    callers_that_go_away_disturb_nobody,
    who_writes_while_the_backend_is_closed_is_answered,
    who_asks_after_the_end_is_told_so
);

async fn the_guides_protocol_under_its_own_names(store: Store) {
    let state = store.open().await;
    let created = state.create_run("run_1", NewRun::running()).await.unwrap();
    assert!(created.seq.is_some());
    assert!(matches!(state.create_run("run_1", NewRun::running()).await, Err(Error::RunExists(_))));
    state.set_node_state("run_1", "node1", NodeUpdate::success().row_count(1_000)).await.unwrap();
    state.add_completed_interval("run_1", "node1", ("2024-01-01", "2024-01-02")).await.unwrap();
    state.add_completed_interval("run_1", "node1", ("2024-01-02", "2024-01-03")).await.unwrap();
    state.add_completed_partition("run_1", "node1", "dt=2024-01-01").await.unwrap();
    let node = state.get_node_state("run_1", "node1").await.unwrap().unwrap();
    assert_eq!(
        (node.status, node.row_count, node.intervals.len(), node.partitions.len()),
        (NodeStatus::Success, Some(1_000), 1, 1)
    );
    let pending = state.pending("node1", ("2024-01-01", "2024-01-05")).await.unwrap();
    assert_eq!(pending.len(), 1);
    assert_eq!(pending[0].to_string(), "2024-01-03T00:00:00Z .. 2024-01-05T00:00:00Z");
    state.update_run("run_1", RunUpdate::success()).await.unwrap();
    let run = state.get_run("run_1").await.unwrap().unwrap();
    assert_eq!(run.header().status, RunStatus::Success);
    assert!(run.header().finished_at.is_some());
    assert_eq!(state.latest_node_state("node1").await.unwrap().unwrap().0, "run_1");
    state.delete_run("run_1", OnDelete::KeepCoverage).await.unwrap();
    assert!(state.get_run("run_1").await.unwrap().is_none());
    assert!(matches!(state.set_node_state("run_1", "n", NodeUpdate::success()).await, Err(Error::RunNotFound(_))));
    assert_eq!(state.pending("node1", ("2024-01-01", "2024-01-05")).await.unwrap().len(), 1);
    assert_eq!(state.last_success("node1").await.unwrap().unwrap().row_count, Some(1_000));
    let again = state.create_run("run_1", NewRun::pending()).await.unwrap();
    assert!(again.version() > run.version(), "a version is never used twice");
    state.close().await.unwrap();
    assert!(matches!(state.create_run("x", NewRun::pending()).await, Err(Error::Closed)));
}

async fn many_executors_on_many_runs_lose_nothing(store: Store) {
    let state = store.open().await;
    for run in 0..10 {
        state.create_run(format!("run_{run}"), NewRun::running()).await.unwrap();
    }
    let mut tasks = Vec::new();
    for task in 0..50_u64 {
        let state = state.clone();
        tasks.push(tokio::spawn(async move {
            for step in 0..40_u64 {
                let commit = state
                    .set_node_state(
                        format!("run_{}", (task + step) % 10),
                        format!("node_{task}"),
                        NodeUpdate::running().row_count(step),
                    )
                    .await
                    .unwrap();
                assert_eq!(commit.runs[0].after, commit.runs[0].before.next());
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let mut commits = 0;
    for run in 0..10 {
        let snapshot = state.get_run(format!("run_{run}")).await.unwrap().unwrap();
        commits += snapshot.version().0 - snapshot.created_version().0;
        assert_eq!(snapshot.version(), snapshot.durable_version());
        assert_eq!(snapshot.node_count(), 50);
    }
    assert_eq!(commits, 50 * 40);
    let stats = state.stats();
    assert_eq!(stats.applied, 50 * 40 + 10);
    assert!(stats.batch_entries.mean() > 1.0, "writes that arrive during a flush go together");
    state.close().await.unwrap();
}

async fn guards_are_decided_at_commit(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let version = state.get_run("r").await.unwrap().unwrap().version();
    let mut tx = state.transaction();
    tx.expect_version("r", version).expect_absent("r", "a").set_node_state("r", "a", NodeUpdate::running());
    tx.commit().await.unwrap();
    let mut late = state.transaction();
    late.expect_version("r", version).set_node_state("r", "a", NodeUpdate::failed("late"));
    let error = late.commit().await.unwrap_err();
    assert!(error.is_conflict(), "{error}");
    let mut tx = state.transaction();
    tx.expect_status("r", "a", [NodeStatus::Running]).set_node_state("r", "a", NodeUpdate::success());
    tx.commit().await.unwrap();
    assert_eq!(state.get_node_state("r", "a").await.unwrap().unwrap().status, NodeStatus::Success);
}

async fn conditions_and_fences_alone_are_decided_too(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    let expect = async |status: NodeStatus| {
        let decided = state.transact(|_, tx| {
            tx.expect_status("r", "n", [status.clone()]);
            Ok(())
        });
        decided.await.map(|((), commit)| commit)
    };
    let refused = expect(NodeStatus::Success).await;
    assert!(matches!(refused, Err(Error::Conflict(_))), "{refused:?}");
    let held = expect(NodeStatus::Running).await.unwrap();
    assert_eq!(held.version(), state.get_run("r").await.unwrap().unwrap().version());
    // What was only read is no condition of his own: nothing is committed.
    let read = state.transact(|view, _| Ok(view.run("r")?.and_then(|run| run.node("n").map(|node| node.status.clone()))));
    let (status, none) = read.await.unwrap();
    assert_eq!((status, none.runs.len(), none.seq), (Some(NodeStatus::Running), 0, None));

    let lease = state.acquire_lock("r", Duration::ZERO).await.unwrap().unwrap();
    let fenced = async || {
        let mut tx = state.transaction();
        tx.fenced_by(&lease);
        assert!(!tx.is_empty());
        tx.commit().await
    };
    let in_transact = async || {
        let decided = state.transact(|view, tx| {
            // What is only read is no condition of its own.
            let _version = view.run("r")?.map(|run| run.version());
            tx.fenced_by(&lease);
            Ok(())
        });
        decided.await.map(|((), commit)| commit)
    };
    let version = state.get_run("r").await.unwrap().unwrap().version();
    for held in [fenced().await.unwrap(), in_transact().await.unwrap()] {
        assert!(held.runs.is_empty(), "a lease is no run: {held:?}");
    }
    assert_eq!(state.fresh("r").await.unwrap().unwrap().version(), version);
    state.force_unlock(lease.token()).await.unwrap();
    for lost in [fenced().await, in_transact().await] {
        assert!(matches!(lost, Err(Error::LeaseLost(_))), "{lost:?}");
    }
    // Nothing is asked, so nothing is refused.
    assert!(state.with_lease(&lease).transaction().commit().await.unwrap().runs.is_empty());
    state.close().await.unwrap();
}

async fn transactions_over_several_runs_are_whole_for_readers(store: Store) {
    let state = store.open().await;
    for run in ["a", "b", "c"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    let writers: Vec<_> = (0..8_u64)
        .map(|writer| {
            let state = state.clone();
            tokio::spawn(async move {
                for step in 0..50_u64 {
                    let rows = writer * 1_000 + step;
                    let mut tx = state.transaction();
                    for run in ["c", "a", "b"] {
                        tx.set_node_state(run, "n", NodeUpdate::running().row_count(rows));
                    }
                    let commit = tx.commit().await.unwrap();
                    assert_eq!(commit.runs.len(), 3);
                }
            })
        })
        .collect();
    let reader = {
        let state = state.clone();
        tokio::spawn(async move {
            for _ in 0..500 {
                let seen = state.snapshots(&["a", "b", "c"]).await.unwrap();
                let rows: Vec<_> =
                    seen.iter().map(|run| run.as_ref().unwrap().node("n").and_then(|node| node.row_count)).collect();
                assert!(rows.iter().all(|row| *row == rows[0]), "a transaction was seen in part: {rows:?}");
                tokio::task::yield_now().await;
            }
        })
    };
    for writer in writers {
        writer.await.unwrap();
    }
    reader.await.unwrap();
    let missing = {
        let mut tx = state.transaction();
        tx.set_node_state("a", "n", NodeUpdate::success()).set_node_state("nowhere", "n", NodeUpdate::success());
        tx.commit().await.unwrap_err()
    };
    assert!(missing.is_not_found());
    assert_eq!(state.get_node_state("a", "n").await.unwrap().unwrap().status, NodeStatus::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_that_decide_on_the_same_node_come_through() {
    for (backend, tasks) in [("memory", 400_u64), ("file", 200), ("database", 200)] {
        let store = Store::of(backend);
        let state = store.open().await;
        for run in ["r", "s"] {
            state.create_run(run, NewRun::running()).await.unwrap();
            state.set_node_state(run, "n", NodeUpdate::running().row_count(0)).await.unwrap();
        }
        let all = (0..tasks).map(|task| {
            let state = state.clone();
            tokio::spawn(async move {
                state
                    .transact(|view, tx| {
                        // Some of them in both runs, which they meet in either order.
                        let runs = if task % 8 == 0 { &["s", "r"][..] } else { &["r"] };
                        for run in runs {
                            let rows = view.run(*run)?.unwrap().node("n").unwrap().row_count.unwrap() + 1;
                            tx.set_node_state(*run, "n", NodeUpdate::running().row_count(rows));
                        }
                        Ok(())
                    })
                    .await
                    .map(drop)
            })
        });
        for task in all.collect::<Vec<_>>() {
            task.await.unwrap().unwrap();
        }
        for (run, rows) in [("r", tasks), ("s", tasks / 8)] {
            assert_eq!(state.get_node_state(run, "n").await.unwrap().unwrap().row_count, Some(rows), "{backend}");
        }
        state.close().await.unwrap();
    }
}

async fn transact_counts_exactly_under_contention(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let state = state.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    loop {
                        let counted = state
                            .transact(|view, tx| {
                                let rows = view.run("r")?.and_then(|run| run.node("total")?.row_count).unwrap_or(0);
                                tx.set_node_state("r", "total", NodeUpdate::running().row_count(rows + 1));
                                Ok(())
                            })
                            .await;
                        match counted {
                            Ok(_) => break,
                            Err(error) => assert!(error.is_retryable(), "{error}"),
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(state.get_node_state("r", "total").await.unwrap().unwrap().row_count, Some(160));
}

async fn deferred_writes_are_seen_at_once_and_durable_after_flush(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let deferred = state.with_durability(Durability::Deferred);
    for step in 0..100_u64 {
        let commit = deferred.set_node_state("r", "n", NodeUpdate::running().row_count(step)).await.unwrap();
        let seen = state.snapshot("r").unwrap();
        assert!(seen.version() >= commit.version());
        assert_eq!(seen.node("n").unwrap().row_count, Some(step));
    }
    state.flush().await.unwrap();
    let seen = state.snapshot("r").unwrap();
    assert_eq!(seen.version(), seen.durable_version());
    assert_eq!(state.backend().load_run(seen.id()).await.unwrap().unwrap(), *seen.state());
}

async fn idle_runs_go_to_sleep_and_come_back(store: Store) {
    let state = Coordinator::builder().idle_after(Duration::from_millis(5)).open(store.backend()).await.unwrap();
    for run in 0..20 {
        state.create_run(format!("r{run}"), NewRun::running()).await.unwrap();
    }
    while state.stats().resident_runs > 0 {
        tokio::task::yield_now().await;
    }
    for round in 0..200_u64 {
        let run = format!("r{}", round % 20);
        state.set_node_state(&run, "n", NodeUpdate::running().row_count(round)).await.unwrap();
        // Now and then until one of them goes to sleep: the others are on their way to it when they are asked again.
        let awake = state.stats().resident_runs;
        while round % 7 == 0 && awake > 0 && state.stats().resident_runs >= awake {
            tokio::task::yield_now().await;
        }
    }
    let run = state.get_run("r19").await.unwrap().unwrap();
    assert_eq!(run.version().0 - run.created_version().0, 10);
}

async fn subscribers_hear_of_every_commit_in_order(store: Store) {
    let state = store.open().await;
    let mut changes = state.subscribe();
    state.create_run("r", NewRun::running()).await.unwrap();
    for _ in 0..3 {
        state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    }
    state.delete_run("r", OnDelete::DropCoverage).await.unwrap();
    let mut last = Version::NONE;
    for step in 0..5 {
        let heard = tokio::time::timeout(Duration::from_secs(10), changes.next()).await;
        let Ok(Ok(Event::Changed(change))) = heard else { panic!("every commit is told, and not {heard:?}") };
        assert_eq!(change.before, last);
        last = change.after;
        assert_eq!(change.deleted, step == 4);
        assert_eq!(change.nodes.len(), usize::from((1..4).contains(&step)));
    }
    state.close().await.unwrap();
    assert!(changes.next().await.is_err());
}

async fn pages_of_runs_newest_first(store: Store) {
    let state = store.open().await;
    for run in 0..25 {
        state
            .create_run(format!("run_{run:02}"), if run % 2 == 0 { NewRun::running() } else { NewRun::pending() })
            .await
            .unwrap();
    }
    let mut query = RunQuery::new(RunFilter::all().status(RunStatus::Running)).limit(5);
    let mut seen = Vec::new();
    loop {
        let page = state.list_runs(&query).await.unwrap();
        seen.extend(page.runs.iter().map(|run| run.run_id.to_string()));
        if page.next.is_none() {
            break;
        }
        query = query.after(page.next);
    }
    let expected: Vec<String> = (0..25).rev().filter(|run| run % 2 == 0).map(|run| format!("run_{run:02}")).collect();
    assert_eq!(seen, expected);
}

async fn a_full_coordinator_makes_callers_wait(store: Store) {
    let state = Coordinator::builder().max_in_flight(1).open(store.backend()).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let waited = tokio::join!(
        state.set_node_state("r", "a", NodeUpdate::running()),
        state.set_node_state("r", "b", NodeUpdate::running()),
        state.set_node_state("r", "c", NodeUpdate::running())
    );
    assert!(waited.0.is_ok() && waited.1.is_ok() && waited.2.is_ok());
}

async fn callers_that_go_away_disturb_nobody(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    for round in 0..300_u64 {
        let doomed = state.set_node_state("r", "doomed", NodeUpdate::running().row_count(round));
        let _gone = tokio::time::timeout(Duration::from_micros(round % 60), doomed).await;
        let commit = state.set_node_state("r", "n", NodeUpdate::running().row_count(round)).await.unwrap();
        assert_eq!(state.snapshot("r").unwrap().node("n").unwrap().row_count, Some(round));
        assert!(state.snapshot("r").unwrap().version() >= commit.version());
    }
    assert_eq!(state.stats().permits_available, 16_384);
}

/// The backend is anybody's to close. Whoever writes meanwhile is answered, and so is who closes the coordinator.
async fn who_writes_while_the_backend_is_closed_is_answered(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    // So many that closing takes its time: the file backend writes its document then.
    let mut tx = state.transaction();
    for node in 0..2_000 {
        tx.set_node_state("r", format!("node_{node}"), NodeUpdate::pending());
    }
    tx.commit().await.unwrap();
    let backend = std::sync::Arc::clone(state.backend());
    let ends = async {
        let (closed, written) = tokio::join!(backend.close(), state.set_node_state("r", "late", NodeUpdate::running()));
        closed.unwrap();
        // Before the close or not at all.
        assert!(matches!(&written, Ok(_) | Err(Error::Closed | Error::Store(_))), "{written:?}");
        let _closed_before = state.close().await;
    };
    tokio::time::timeout(Duration::from_secs(60), ends).await.unwrap();
}

/// Whatever the storage itself would still answer.
async fn who_asks_after_the_end_is_told_so(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
    state.close().await.unwrap();
    let refusals = [
        state.list_runs(&RunQuery::new(RunFilter::all())).await.map(drop),
        state.latest_node_state("n").await.map(drop),
        state.last_success("n").await.map(drop),
        state.coverage("n").await.map(drop),
        state.pending("n", ("2024-01-01", "2024-01-02")).await.map(drop),
        state.node_ids().await.map(drop),
        state.get_run("r").await.map(drop),
        state.get_node_state("r", "n").await.map(drop),
        state.fresh("r").await.map(drop),
        state.snapshots(&["r"]).await.map(drop),
        state.snapshots(&["r", "s"]).await.map(drop),
        state.list_locks().await.map(drop),
        state.abandoned_runs().await.map(drop),
        state.free_dead_claims("r").await.map(drop),
    ];
    for (asked, refusal) in refusals.into_iter().enumerate() {
        assert!(refusal.as_ref().is_err_and(Error::is_closed), "{}, question {asked}: {refusal:?}", store.backend);
    }
}
