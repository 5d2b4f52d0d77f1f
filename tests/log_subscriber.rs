//! Whoever listens to the log may call the coordinator from there: nothing logs, and no span ends, under a lock that the call would need.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

mod support;
#[cfg(all(feature = "file", feature = "sqlite", unix))]
#[path = "support/trace.rs"]
mod trace;

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use seeknal_state::{Coordinator, Durability, Error, NewRun, NodeUpdate};
use support::{Lie, LyingBackend};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};

thread_local! {
    /// What the answer to a span or event logs itself is not answered again.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Asks the coordinator for everything, and writes, at every event and whenever a span begins, is entered, left or ends.
#[derive(Default)]
struct Caller {
    ids: AtomicU64,
    calls: Arc<AtomicU64>,
    state: Arc<Mutex<Option<Coordinator>>>,
}

impl Caller {
    fn call(&self) {
        if INSIDE.replace(true) {
            return;
        }
        let state = self.state.lock().unwrap().clone();
        if let Some(state) = state {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let asked = (state.stats(), state.health(), state.snapshot("run_1"));
            drop(asked);
            // Each write has spans of its own: without an end they would feed one another.
            let writes = self.calls.load(Ordering::Relaxed) < 500;
            if let (true, Ok(runtime)) = (writes, tokio::runtime::Handle::try_current()) {
                runtime.spawn(async move {
                    // Whether it comes to rest is not the question: the log may end with the runtime.
                    let _told = state.set_node_state("run_1", "from the log", NodeUpdate::running()).await.is_ok();
                });
            }
        }
        INSIDE.set(false);
    }
}

impl Subscriber for Caller {
    // Asked anew each time: else what is met first inside of an answer would never be heard.
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        !INSIDE.get()
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        self.call();
        Id::from_u64(self.ids.fetch_add(1, Ordering::Relaxed) + 1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {
        self.call();
    }
    fn enter(&self, _: &Id) {
        self.call();
    }
    fn exit(&self, _: &Id) {
        self.call();
    }
    fn try_close(&self, _: Id) -> bool {
        self.call();
        true
    }
}

/// Works under a listener of its own; whoever hangs is found out by the clock.
fn under_a_listener(what: &str, work: impl FnOnce(&tokio::runtime::Runtime, &Mutex<Option<Coordinator>>) + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let calls = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    std::thread::spawn(move || {
        let caller = Caller { calls: counted, ..Caller::default() };
        let state = Arc::clone(&caller.state);
        tracing::subscriber::with_default(caller, || {
            // One thread: all that the coordinator does is heard.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            work(&runtime, &state);
            drop(runtime);
        });
        done.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| panic!("{what}: it hangs or failed: {error}"));
    assert!(calls.load(Ordering::Relaxed) > 0, "{what}: nobody was called");
}

#[test]
fn a_listener_that_calls_back_hangs_nothing() {
    under_a_listener("a failing flush", |runtime, state| {
        runtime.block_on(async {
            let backend = LyingBackend::new(false);
            let opened = Coordinator::open(Arc::clone(&backend) as _).await.unwrap();
            opened.create_run("run_1", NewRun::running()).await.unwrap();
            *state.lock().unwrap() = Some(opened.clone());
            for lie in [None, Some(Lie::Full), Some(Lie::AnswerLost), Some(Lie::NeverArrived), Some(Lie::Panic), None] {
                backend.tell(lie);
                let set = opened.set_node_state("run_1", "node", NodeUpdate::running()).await;
                assert!(set.is_ok() || lie.is_some(), "{lie:?}: {set:?}");
            }
            backend.tell([Lie::Full]);
            let deferred = opened.with_durability(Durability::Deferred);
            deferred.set_node_state("run_1", "node", NodeUpdate::running()).await.unwrap();
            assert!(matches!(opened.flush().await, Err(Error::DeferredLost(_))));
            state.lock().unwrap().take();
            opened.close().await.unwrap();
        });
    });
}

#[test]
fn a_runtime_that_ends_in_a_flush_ends_its_span_outside_of_all_locks() {
    under_a_listener("the end of a runtime", |runtime, state| {
        let backend = LyingBackend::new(false);
        runtime.block_on(async {
            let opened = Coordinator::open(Arc::clone(&backend) as _).await.unwrap();
            opened.create_run("run_1", NewRun::running()).await.unwrap();
            backend.close_gate();
            let sent = backend.commits.load(Ordering::SeqCst);
            let writing = opened.clone();
            tokio::spawn(async move { writing.set_node_state("run_1", "node", NodeUpdate::running()).await });
            backend.arrived(sent + 1).await;
            *state.lock().unwrap() = Some(opened);
        });
        // The batch stays behind the gate for ever; what happens now is `work`'s end, with the runtime.
    });
}

#[cfg(all(feature = "file", feature = "sqlite", unix))]
mod real_backends {
    use std::collections::BTreeMap;

    use seeknal_state::{BackendOptions, create_state_backend};
    use tokio::runtime::Handle;

    use super::*;
    use crate::trace::Child;

    /// As [`Caller`], but on whatever thread, and it waits for what it reads where that is allowed: on the backends' own threads, where flushes begin and end.
    struct Everywhere {
        ids: AtomicU64,
        state: Arc<Mutex<Option<Coordinator>>>,
        runtime: Handle,
        /// How often it called, by thread.
        calls: Arc<Mutex<BTreeMap<String, u64>>>,
        writes: AtomicU64,
    }

    impl Everywhere {
        fn call(&self) {
            if INSIDE.replace(true) {
                return;
            }
            let state = self.state.lock().unwrap().clone();
            if let Some(state) = state {
                let thread = std::thread::current().name().unwrap_or_default().to_owned();
                *self.calls.lock().unwrap().entry(thread).or_default() += 1;
                let asked = (state.stats(), state.health(), state.snapshot("run_1"));
                drop(asked);
                if Handle::try_current().is_err() {
                    let run = self.runtime.block_on(state.get_run("run_1")).unwrap();
                    assert!(run.is_some(), "it is there all the time");
                }
                if self.writes.fetch_add(1, Ordering::Relaxed) < 500 {
                    self.runtime.spawn(async move {
                        let _told = state.set_node_state("run_1", "from the log", NodeUpdate::running()).await.is_ok();
                    });
                }
            }
            INSIDE.set(false);
        }
    }

    impl Subscriber for Everywhere {
        // Asked anew each time: else what is met first inside of an answer would never be heard.
        fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
            Interest::sometimes()
        }
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            !INSIDE.get()
        }
        fn new_span(&self, _: &Attributes<'_>) -> Id {
            self.call();
            Id::from_u64(self.ids.fetch_add(1, Ordering::Relaxed) + 1)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {
            self.call();
        }
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, _: &Event<'_>) {
            self.call();
        }
        fn enter(&self, _: &Id) {
            self.call();
        }
        fn exit(&self, _: &Id) {
            self.call();
        }
        fn try_close(&self, _: Id) -> bool {
            self.call();
            true
        }
    }

    /// In a process of its own: who listens on every thread listens to every test of it.
    #[test]
    #[ignore = "it is run by another test, which does not listen itself"]
    fn child_that_listens_everywhere() {
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            work();
            done.send(()).unwrap();
        });
        ended.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| panic!("it hangs or failed: {error}"));
    }

    fn work() {
        let name = std::env::var("BACKEND").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let everywhere = Everywhere {
            ids: AtomicU64::new(0),
            state: Arc::default(),
            runtime: runtime.handle().clone(),
            calls: Arc::default(),
            writes: AtomicU64::new(0),
        };
        let (state, calls) = (Arc::clone(&everywhere.state), Arc::clone(&everywhere.calls));
        tracing::subscriber::set_global_default(everywhere).unwrap();
        let backend = create_state_backend(&name, &BackendOptions::new().base_path(folder.path())).unwrap();
        runtime.block_on(async {
            let opened = Coordinator::open(backend).await.unwrap();
            opened.create_run("run_1", NewRun::running()).await.unwrap();
            *state.lock().unwrap() = Some(opened.clone());
            let writers: Vec<_> = (0..8)
                .map(|writer| {
                    let opened = opened.clone();
                    tokio::spawn(async move {
                        for row in 1..=25 {
                            let update = NodeUpdate::running().row_count(row);
                            opened.set_node_state("run_1", format!("node_{writer}"), update).await.unwrap();
                        }
                    })
                })
                .collect();
            for writer in writers {
                writer.await.unwrap();
            }
            // What the writer finds wrong is told by its thread.
            if name == "file" {
                std::fs::remove_file(folder.path().join("run_state.json.journal")).unwrap();
            }
            opened.set_node_state("run_1", "last", NodeUpdate::success()).await.unwrap();
            opened.flush().await.unwrap();
            state.lock().unwrap().take();
            let run = opened.get_run("run_1").await.unwrap().unwrap();
            assert!((0..8).all(|writer| run.node(&format!("node_{writer}")).unwrap().row_count == Some(25)), "{run:?}");
            assert!(run.node("last").is_some());
            opened.close().await.unwrap();
        });
        let calls = calls.lock().unwrap();
        let of_backend: u64 = calls.iter().filter(|(thread, _)| thread.starts_with("seeknal-")).map(|(_, calls)| calls).sum();
        assert!(of_backend > 20, "the threads of the backend say nothing: {calls:?}");
    }

    fn a_listener_on_every_thread_hangs_nothing(backend: &str) {
        Child::test("real_backends::child_that_listens_everywhere").env("BACKEND", backend).run().passed(backend);
    }

    #[test]
    fn a_listener_on_the_threads_of_the_file_backend_hangs_nothing() {
        a_listener_on_every_thread_hangs_nothing("file");
    }

    #[test]
    fn a_listener_on_the_threads_of_sqlite_hangs_nothing() {
        a_listener_on_every_thread_hangs_nothing("database");
    }
}
