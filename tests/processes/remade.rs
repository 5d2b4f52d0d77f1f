//! A run that another process deletes and makes anew under its name: what was meant for the one that is gone never happens to the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use seeknal_state::{Coordinator, Durability, Error, NewRun, NodeUpdate, OnDelete, StateBackend, Transaction, View};

use super::support::{Following, LyingBackend, Store};

on_every_database!(a_transaction_decides_again_when_another_process_took_away_what_it_read);

/// Its closure is called again, whatever this process has heard of it by then.
async fn a_transaction_decides_again_when_another_process_took_away_what_it_read(store: Store) {
    let (state, other) = (store.open().await, store.open().await);
    for round in 0..12 {
        let (run, remade) = (format!("r{round}"), round % 2 == 0);
        state.create_run(&run, NewRun::running()).await.unwrap();
        state.set_node_state(&run, "n", NodeUpdate::running()).await.unwrap();
        let mut seen = Vec::new();
        let decide = |view: &View, tx: &mut Transaction| {
            let found = view.run(&run)?;
            seen.push(found.as_ref().is_some_and(|run| run.node("n").is_some()));
            if seen.len() == 1 {
                let anew = async {
                    other.delete_run(&run, OnDelete::DropCoverage).await.unwrap();
                    if remade {
                        other.create_run(&run, NewRun::running()).await.unwrap();
                    }
                };
                tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(anew));
            }
            if found.is_none() {
                tx.create_run(&run, NewRun::running());
            }
            tx.set_node_state(&run, "own", NodeUpdate::running());
            Ok(())
        };
        state.transact(decide).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(seen, [true, false], "round {round}");
        let run = state.fresh(&run).await.unwrap().unwrap();
        assert!(run.node("own").is_some() && run.node("n").is_none(), "round {round}");
    }
    other.close().await.unwrap();
    state.close().await.unwrap();
}

/// A storage that others write to, of which nobody here hears by himself.
async fn open(backend: &Arc<LyingBackend>, runs: &[&str]) -> Coordinator {
    backend.follow(Following::Silent);
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    for run in runs {
        state.create_run(*run, NewRun::running()).await.unwrap();
    }
    state
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

fn not_found<T>(told: &Result<T, Error>) -> bool {
    matches!(told, Err(Error::RunNotFound(_)))
}

/// Two are on their way, of which storage refuses the first: the other comes back, and finds a run of the same name.
#[tokio::test]
async fn of_two_writes_for_a_run_that_is_gone_neither_lands_in_its_successor() {
    let backend = LyingBackend::new(true);
    let state = open(&backend, &["r"]).await;
    let sent = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    let write = |node: &'static str| {
        let state = state.clone();
        tokio::spawn(async move { state.set_node_state("r", node, NodeUpdate::success()).await })
    };
    let first = write("first");
    backend.arrived(sent + 1).await;
    let second = write("second");
    settle().await;
    backend.remake_as_another("r").await;
    backend.open_gate();
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert!(not_found(&first) && not_found(&second), "{first:?}, {second:?}");
    let run = state.fresh("r").await.unwrap().unwrap();
    assert_eq!(run.state().nodes().count(), 0, "nobody worked on it");
    // What is asked for from now on is meant for the one that is there.
    state.set_node_state("r", "second", NodeUpdate::success()).await.unwrap();
    state.close().await.unwrap();
}

/// What was acknowledged from memory is told as lost.
#[tokio::test]
async fn deferred_writes_for_a_run_that_is_gone_are_lost() {
    let backend = LyingBackend::new(true);
    let state = open(&backend, &["r"]).await;
    let deferred = state.with_durability(Durability::Deferred);
    backend.close_gate();
    for node in ["first", "second", "third"] {
        deferred.set_node_state("r", node, NodeUpdate::success()).await.unwrap();
        settle().await;
    }
    backend.remake_as_another("r").await;
    backend.open_gate();
    let told = state.flush().await;
    assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.lost == 3), "{told:?}");
    assert_eq!(state.fresh("r").await.unwrap().unwrap().state().nodes().count(), 0);
    state.close().await.unwrap();
}

/// It was overtaken in the old run first, and that is gone before it is looked at again. Over one run, and over two.
#[tokio::test]
async fn a_write_that_was_overtaken_in_a_run_that_is_gone_does_not_land_in_its_successor() {
    for runs in [&["r"][..], &["q", "r"]] {
        let backend = LyingBackend::new(true);
        let state = open(&backend, runs).await;
        let sent = backend.commits.load(Ordering::SeqCst);
        backend.close_gate();
        let write = {
            let mut tx = state.transaction();
            for run in runs {
                tx.set_node_state(*run, "n", NodeUpdate::success());
            }
            tokio::spawn(tx.commit())
        };
        backend.arrived(sent + 1).await;
        backend.write_as_another("r", "n", NodeUpdate::running()).await;
        let not_yet = backend.loading.write().await;
        let loads = backend.loads.load(Ordering::SeqCst);
        backend.open_gate();
        while backend.loads.load(Ordering::SeqCst) == loads {
            tokio::task::yield_now().await;
        }
        backend.remake_as_another("r").await;
        drop(not_yet);
        let told = write.await.unwrap();
        assert!(not_found(&told), "{runs:?}: {told:?}");
        for run in runs {
            assert_eq!(state.fresh(*run).await.unwrap().unwrap().state().nodes().count(), 0, "{runs:?}: {run}");
        }
        state.close().await.unwrap();
    }
}
