//! A server whose disk is full, or whose machine fails it otherwise.

use std::sync::Arc;

use seeknal_state::model::{Batch, NodeUpdate};
use seeknal_state::store::{StoreErrorKind, create_state_backend};

use super::batches::{applied, change, create, entry, load, part_on, set};
use super::sqld::Sqld;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_told_and_the_service_goes_on_when_there_is_space() {
    let Some(server) = Sqld::start() else { return };
    let backend = create_state_backend("database", &server.options()).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
    // Some servers send the words without a code, and so does a trigger.
    let faults = [
        ("database or disk is full", StoreErrorKind::Full),
        ("disk I/O error", StoreErrorKind::Io),
        ("unable to open database file", StoreErrorKind::Io),
        ("out of memory", StoreErrorKind::Busy),
    ];
    for (row, (words, kind)) in (1..).zip(faults) {
        let before = load(&backend, "r").await;
        server.sql(&format!("CREATE TRIGGER full BEFORE INSERT ON node_states BEGIN SELECT RAISE(ABORT, '{words}'); END"));
        let mutations = vec![set("n", NodeUpdate::running().row_count(row))];
        let batch = Arc::new(Batch::new(vec![entry(part_on(Some(&before), before.version(), "r", vec![], mutations))]));
        let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
        assert_eq!((error.kind(), error.is_unknown_outcome()), (kind, false), "{error}");
        assert!(error.to_string().contains(words) && !error.to_string().contains("is a libSQL server"), "{error}");
        assert_eq!(load(&backend, "r").await, before, "{words}: something was written");
        server.sql("DROP TRIGGER full");
        applied(backend.commit(batch).await.unwrap().outcomes.into_iter().next().unwrap());
        assert_eq!(load(&backend, "r").await.node("n").unwrap().row_count, Some(row));
    }
    backend.close().await.unwrap();
}
