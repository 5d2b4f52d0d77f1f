//! Writes that are acknowledged from memory: what they are to readers, and what is told of those that are lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::support::{Lie, LyingBackend};
use seeknal_state::{Coordinator, Durability, Error, Event, MemoryBackend, NewRun, NodeUpdate, StateBackend, Transaction, View};

async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state
}

/// Closing begins at the moment at which the last write is said to be settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn close_tells_every_deferred_loss() {
    const WRITES: u64 = 1_000;
    for round in 0..20 {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        let all = state.stats().permits_available;
        backend.close_gate();
        let deferred = state.with_durability(Durability::Deferred);
        for row in 0..WRITES {
            deferred.set_node_state("r", "n", NodeUpdate::running().row_count(row)).await.unwrap();
        }
        backend.tell([Lie::Full; 4]);
        backend.open_gate();
        while state.stats().permits_available < all {
            tokio::task::yield_now().await;
        }
        let told = state.close().await;
        assert!(matches!(&told, Err(Error::DeferredLost(loss)) if loss.lost == WRITES), "round {round}: {told:?}");
    }
}

type Flushing = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// Begins to flush in the very moment in which it is woken, once.
struct Flusher {
    state: Coordinator,
    begun: Mutex<Option<Flushing>>,
}

impl Wake for Flusher {
    fn wake(self: Arc<Self>) {
        let mut begun = self.begun.lock().unwrap();
        if begun.is_none() {
            let state = self.state.clone();
            let mut flushing: Flushing = Box::pin(async move { state.flush().await });
            let polled = flushing.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            *begun = Some(match polled {
                Poll::Ready(flushed) => Box::pin(std::future::ready(flushed)),
                Poll::Pending => flushing,
            });
        }
    }
}

/// Who is told of one write may flush before anything else is told.
#[tokio::test]
async fn a_flush_tells_the_loss_that_came_with_what_wakes_it() {
    let backend = LyingBackend::new(false);
    let state = open(&backend).await;
    let deferred = state.with_durability(Durability::Deferred);
    let write = |node: &'static str| deferred.set_node_state("r", node, NodeUpdate::running());
    let mut events = state.subscribe();
    let sent = backend.commits.load(Ordering::SeqCst);
    backend.close_gate();
    write("first").await.unwrap();
    backend.arrived(sent + 1).await;
    // These two are the next batch.
    write("applied").await.unwrap();
    write("lost").await.unwrap();
    backend.gate.add_permits(1);
    backend.arrived(sent + 2).await;
    backend.tell([Lie::LastRefused]);
    assert!(matches!(events.next().await.unwrap(), Event::Changed(change) if change.nodes.len() == 1));
    let flusher = Arc::new(Flusher { state: state.clone(), begun: Mutex::default() });
    let mut told = pin!(events.next());
    assert!(told.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&flusher)))).is_pending());
    backend.open_gate();
    let flushing = loop {
        if let Some(begun) = flusher.begun.lock().unwrap().take() {
            break begun;
        }
        tokio::task::yield_now().await;
    };
    let flushed = flushing.await;
    assert!(matches!(&flushed, Err(Error::DeferredLost(loss)) if loss.lost == 1), "{flushed:?}");
    state.close().await.unwrap();
}

#[tokio::test]
async fn a_deferred_write_of_which_nobody_knows_is_not_told_as_lost_for_certain() {
    for (lie, unknown) in [(Lie::Panic, true), (Lie::TooFew, true), (Lie::Full, false)] {
        let backend = LyingBackend::new(false);
        let state = open(&backend).await;
        let mut events = state.subscribe();
        let deferred = state.with_durability(Durability::Deferred);
        for time in ["first", "second"] {
            backend.tell([lie]);
            deferred.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
            if time == "first" {
                let error = state.flush().await.unwrap_err();
                assert_eq!(error.is_unknown_outcome(), unknown, "{lie:?}: {error}");
                assert_eq!(error.to_string().contains("not known"), unknown, "{lie:?}: {error}");
            } else {
                let error = state.close().await.unwrap_err();
                assert_eq!(error.is_unknown_outcome(), unknown, "{lie:?}, told by close: {error}");
            }
            let Event::DeferredLost(loss) = events.next().await.unwrap() else { panic!("nothing was committed") };
            assert_eq!((loss.lost, loss.unknown), (1, unknown), "{lie:?}");
        }
    }
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_transaction_decides_on_nothing_that_may_still_be_lost() {
    for shared in [false, true] {
        let backend = LyingBackend::new(shared);
        let state = open(&backend).await;
        state.set_node_state("r", "n", NodeUpdate::running().row_count(1)).await.unwrap();
        backend.close_gate();
        let deferred = state.with_durability(Durability::Deferred);
        deferred.set_node_state("r", "n", NodeUpdate::running().row_count(10)).await.unwrap();
        backend.tell([Lie::Full]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let copy = || {
            let (state, seen) = (state.clone(), Arc::clone(&seen));
            tokio::spawn(async move {
                let copy = |view: &View, tx: &mut Transaction| {
                    let rows = view.run("r")?.and_then(|run| run.node("n")?.row_count).unwrap_or(0);
                    seen.lock().unwrap().push(rows);
                    tx.set_node_state("r", "copy", NodeUpdate::running().row_count(rows));
                    Ok(())
                };
                state.transact(copy).await
            })
        };
        let copying = copy();
        settle().await;
        backend.open_gate();
        assert!(matches!(copying.await.unwrap(), Err(Error::DeferredLost(_))), "the next write is told of it");
        copy().await.unwrap().unwrap();
        assert_eq!(*seen.lock().unwrap(), [1, 1], "what it decides on is committed");
        let run = state.get_run("r").await.unwrap().unwrap();
        assert_eq!(run.node("copy").unwrap().row_count, Some(1));
    }
}

/// Who writes on and on, and is acknowledged from memory, keeps no transaction from deciding.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_comes_to_its_turn_beside_deferred_writers() {
    let state = Coordinator::open(Arc::new(MemoryBackend::new())).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let writers: Vec<_> = (0..4_u64)
        .map(|writer| {
            let deferred = state.with_durability(Durability::Deferred);
            tokio::spawn(async move {
                for row in 0.. {
                    if deferred.set_node_state("r", format!("n{writer}"), NodeUpdate::running().row_count(row)).await.is_err() {
                        return;
                    }
                }
            })
        })
        .collect();
    for row in 1..=20 {
        let count = |view: &View, tx: &mut Transaction| {
            let rows = view.run("r")?.and_then(|run| run.node("counted")?.row_count).unwrap_or(0) + 1;
            tx.set_node_state("r", "counted", NodeUpdate::running().row_count(rows));
            Ok(rows)
        };
        let counted = tokio::time::timeout(Duration::from_secs(60), state.transact(count)).await.expect("it is kept waiting");
        assert_eq!(counted.unwrap().0, row);
    }
    state.close().await.unwrap();
    for writer in writers {
        writer.await.unwrap();
    }
}
