//! Transactions over several runs, and those who read several: what they are told, and what is seen of them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use crate::support::{Following, Lie, LyingBackend};
use seeknal_state::{Commit, Coordinator, Durability, Error, MemoryBackend, NewRun, NodeUpdate, StateBackend};

pub(super) const RUNS: [&str; 2] = ["a", "b"];

pub(super) async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    // No run goes to sleep: who is woken up reads what is stored, whatever was known of it here.
    let builder = Coordinator::builder().idle_after(Duration::from_secs(86_400));
    let state = builder.open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    for run in RUNS {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    state
}

/// Writes a node of every run in one transaction.
pub(super) async fn write(state: &Coordinator, runs: &[impl AsRef<str>], rows: u64) -> Result<Commit, Error> {
    let mut tx = state.transaction();
    for run in runs {
        tx.set_node_state(run.as_ref(), "n", NodeUpdate::running().row_count(rows));
    }
    tx.commit().await
}

/// What is seen of that node in every run, one run after another.
async fn try_rows(state: &Coordinator) -> Result<[Option<u64>; 2], Error> {
    let mut seen = [None; 2];
    for (run, rows) in RUNS.iter().zip(&mut seen) {
        *rows = state.get_node_state(*run, "n").await?.and_then(|node| node.row_count);
    }
    Ok(seen)
}

async fn rows(state: &Coordinator) -> [Option<u64>; 2] {
    try_rows(state).await.unwrap()
}

#[tokio::test]
async fn who_writes_several_runs_is_told_what_one_of_them_lost() {
    for lost in RUNS {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        backend.tell([Lie::Full]);
        let deferred = state.with_durability(Durability::Deferred);
        deferred.set_node_state(lost, "n", NodeUpdate::running().row_count(1)).await.unwrap();
        while state.health().lost.is_empty() {
            tokio::task::yield_now().await;
        }
        let told = write(&state, &RUNS, 2).await;
        assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.run == lost && loss.lost == 1), "{lost}: {told:?}");
        assert_eq!(rows(&state).await, [None; 2], "{lost}: who is told of a loss has written nothing");
        write(&state, &RUNS, 3).await.unwrap_or_else(|error| panic!("{lost}: it is told once, and not again: {error}"));
        assert_eq!(rows(&state).await, [Some(3); 2], "{lost}");
        assert!(state.health().is_sound(), "{lost}");
        state.close().await.unwrap();
    }
}

/// Waits until both runs are seen as they were written, and then can be written again. As long as storage does not settle what it was sent, that is told to
/// whoever asks.
pub(super) async fn seen_as_written(state: &Coordinator, written: u64, what: Lie) {
    let waiting = async |error: Error| {
        assert!(error.is_retryable(), "{what:?}: {error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let seen = async {
        loop {
            match try_rows(state).await {
                Ok(rows) if rows == [Some(written); 2] => break,
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => waiting(error).await,
            }
        }
        while let Err(error) = write(state, &RUNS, written + 1).await {
            waiting(error).await;
        }
    };
    let seen = tokio::time::timeout(Duration::from_secs(30), seen).await;
    assert!(seen.is_ok(), "{what:?}: {written} is in storage, and here {:?} is seen", try_rows(state).await);
    assert_eq!(rows(state).await, [Some(written + 1); 2], "{what:?}");
}

#[tokio::test(start_paused = true)]
async fn what_nobody_knows_of_several_runs_is_looked_up() {
    for (lie, landed) in [(Lie::LatePanic, true), (Lie::Panic, false), (Lie::TooFew, false)] {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        write(&state, &RUNS, 1).await.unwrap();
        backend.tell([lie]);
        let error = write(&state, &RUNS, 7).await.unwrap_err();
        assert!(error.is_unknown_outcome(), "{lie:?}: {error}");
        seen_as_written(&state, if landed { 7 } else { 1 }, lie).await;
        state.close().await.unwrap();
    }
}

#[tokio::test]
async fn who_reads_one_run_after_several_does_not_see_it_older() {
    let backend = LyingBackend::new(true);
    backend.follow(Following::Silent);
    let state = open(&backend).await;
    write(&state, &RUNS, 0).await.unwrap();
    for written in 1..=20 {
        for run in RUNS {
            backend.write_as_another(run, "n", NodeUpdate::running().row_count(written)).await;
        }
        let several = state.snapshots(&RUNS).await.unwrap();
        for (run, together) in RUNS.iter().zip(several) {
            // Without waiting for anything: as it is here now.
            let alone = state.snapshot(run).unwrap();
            let together = together.unwrap();
            assert_eq!(together.node("n").unwrap().row_count, Some(written), "{run}");
            assert_eq!(alone.node("n").unwrap().row_count, Some(written), "{run}: it was seen newer a moment ago");
            assert!(alone.version() >= together.version(), "{run}");
        }
    }
    state.close().await.unwrap();
}

/// So many runs that the first one can be read, twice in a row, long before the last one is published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_is_not_seen_in_part_while_it_is_published() {
    const TRANSACTIONS: u64 = 60;
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    let runs: Vec<String> = (0..500).map(|run| format!("r{run:03}")).collect();
    for run in &runs {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    write(&state, &runs, 0).await.unwrap();
    let ends = [runs[0].clone(), runs[runs.len() - 1].clone()];
    let writer = tokio::spawn({
        let state = state.clone();
        async move {
            for rows in 1..=TRANSACTIONS {
                write(&state, &runs, rows).await.unwrap();
            }
        }
    });
    // On a thread of its own: that of the test.
    let mut last = 0;
    while !writer.is_finished() {
        let seen = state.snapshots(&ends).await.unwrap();
        let rows = |run: usize| seen[run].as_ref().unwrap().node("n").unwrap().row_count.unwrap();
        assert_eq!(rows(0), rows(1), "a transaction was seen in part");
        assert!(rows(0) >= last, "what was seen before is gone");
        last = rows(0);
    }
    writer.await.unwrap();
    state.close().await.unwrap();
}
