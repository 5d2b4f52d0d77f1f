//! What the log tells of a write on its way: which run and node, how large the batch was, how long it took, and what became of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// A span: its name, and its fields as text.
#[derive(Debug, Clone, Default)]
struct Seen {
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
    closed: bool,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
}

/// Keeps all spans of the crate.
#[derive(Default, Clone)]
struct Keeper(Arc<Mutex<Vec<Seen>>>);

impl Keeper {
    fn with(&self, id: &Id, what: impl FnOnce(&mut Seen)) {
        let index = usize::try_from(id.into_u64() - 1).unwrap();
        what(self.0.lock().unwrap().get_mut(index).unwrap());
    }

    /// The closed spans of this name.
    fn closed(&self, name: &str) -> Vec<BTreeMap<&'static str, String>> {
        let seen = self.0.lock().unwrap();
        seen.iter().filter(|span| span.name == name && span.closed).map(|span| span.fields.clone()).collect()
    }
}

impl Subscriber for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target().starts_with("seeknal_state")
    }
    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut span = Seen { name: attributes.metadata().name(), ..Seen::default() };
        attributes.record(&mut span);
        let mut seen = self.0.lock().unwrap();
        seen.push(span);
        Id::from_u64(u64::try_from(seen.len()).unwrap())
    }
    fn record(&self, id: &Id, values: &Record<'_>) {
        self.with(id, |span| values.record(span));
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
    fn try_close(&self, id: Id) -> bool {
        self.with(&id, |span| span.closed = true);
        true
    }
}

#[test]
fn a_write_is_told_with_its_run_its_node_its_batch_and_its_time() {
    let keeper = Keeper::default();
    tracing::subscriber::with_default(keeper.clone(), || {
        // One thread: all that happens is heard. The memory backend is flushed by a task of it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new()).unwrap()).await.unwrap();
            state.create_run("run_1", NewRun::running()).await.unwrap();
            state.create_run("run_2", NewRun::running()).await.unwrap();
            state.set_node_state("run_1", "orders", NodeUpdate::running()).await.unwrap();
            let mut tx = state.transaction();
            tx.set_node_state("run_1", "orders", NodeUpdate::success());
            tx.set_node_state("run_2", "orders", NodeUpdate::success());
            tx.commit().await.unwrap();
            let mut refused = state.transaction();
            refused.expect_absent("run_1", "orders");
            refused.set_node_state("run_1", "orders", NodeUpdate::running());
            refused.commit().await.unwrap_err();
            state.close().await.unwrap();
        });
    });

    let commits = keeper.closed("commit");
    let of_node: Vec<_> = commits.iter().filter(|span| span.get("node").is_some_and(|node| node == "\"orders\"")).collect();
    assert_eq!(of_node.len(), 2, "the write and the refused one: {commits:?}");
    assert!(of_node.iter().all(|span| span.get("run").is_some_and(|run| run == "\"run_1\"")), "{of_node:?}");
    assert_eq!(of_node.iter().filter(|span| span.contains_key("seq")).count(), 1, "what was refused has no place: {of_node:?}");
    let several: Vec<_> = commits.iter().filter(|span| span.get("runs").is_some_and(|runs| runs == "2")).collect();
    assert!(matches!(&*several, [span] if span.contains_key("seq")), "{commits:?}");

    let flushes = keeper.closed("flush");
    let told = |name: &str| flushes.iter().map(|span| span.get(name).unwrap().parse::<u64>().unwrap()).sum::<u64>();
    assert_eq!(told("entries"), told("applied") + told("refused"), "{flushes:?}");
    assert!(told("applied") >= 4, "{flushes:?}");
    assert!(flushes.iter().all(|span| span.contains_key("micros") && span.contains_key("batch")), "{flushes:?}");
}
