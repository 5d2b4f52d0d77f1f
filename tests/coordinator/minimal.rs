//! A backend with the required methods and nothing else: what it lacks is told, and nothing is lost in silence.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use seeknal_state::model::{Batch, BatchAnswer, LeaseRecord, Ledger, NoFences, RunPage, RunQuery, RunState};
use seeknal_state::store::{AnswerLog, BoxFuture, OpenReport};
use seeknal_state::{
    ClaimFilter, Coordinator, Error, NewRun, NodeStatus, NodeUpdate, OnDelete, RunId, StateBackend, StoreError, StoreErrorKind,
};

/// A clone is another opening of the same store.
#[derive(Debug, Clone, Default)]
struct Minimal(Arc<Mutex<(Ledger, AnswerLog)>>);

impl StateBackend for Minimal {
    fn name(&self) -> &'static str {
        "minimal"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async { Ok(OpenReport::new()) })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            let (ledger, answers) = &mut *self.0.lock().unwrap();
            if let Some(answer) = answers.get(batch.id) {
                return Ok(answer.clone());
            }
            let answer = ledger.commit(&batch.entries, &NoFences);
            answers.put(batch.id, answer.clone());
            Ok(answer)
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async { Ok(self.0.lock().unwrap().0.run(run.as_str()).cloned()) })
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async { Ok(self.0.lock().unwrap().0.list(query)) })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

async fn open(store: &Minimal) -> Coordinator {
    Coordinator::open(Arc::new(store.clone())).await.unwrap()
}

#[tokio::test]
async fn a_run_is_abandoned_by_others_only_and_is_resumed_once() {
    let store = Minimal::default();
    let dead = open(&store).await;
    dead.create_run("run", NewRun::running()).await.unwrap();
    assert!(dead.abandoned_runs().await.unwrap().is_empty(), "it is its own");
    assert!(dead.resume_run("run").await.unwrap().commit.is_none());
    dead.close().await.unwrap();

    let next = open(&store).await;
    assert_eq!(next.abandoned_runs().await.unwrap().len(), 1);
    let resumed = next.resume_run("run").await.unwrap();
    assert!(resumed.commit.is_some_and(|commit| commit.seq.is_some()));
    assert!(next.abandoned_runs().await.unwrap().is_empty());
    assert!(next.resume_run("run").await.unwrap().commit.is_none());
    next.close().await.unwrap();
}

#[tokio::test]
async fn what_it_does_not_keep_is_refused_in_words() {
    let store = Minimal::default();
    let state = open(&store).await;
    state.create_run("run", NewRun::running()).await.unwrap();
    state.set_node_state("run", "node", NodeUpdate::pending()).await.unwrap();
    let told = |error: &Error| {
        let unsupported = matches!(error, Error::Store(fault) if fault.kind() == StoreErrorKind::Unsupported);
        unsupported && error.to_string().contains("lease_store") && !error.is_unknown_outcome()
    };
    let error = state.acquire_lock("run", Duration::ZERO).await.unwrap_err();
    assert!(told(&error), "{error}");
    let error = state.claim_next("run", ClaimFilter::new()).await.unwrap_err();
    assert!(told(&error), "{error}");
    let error = state.claim_node("run", "node", "worker", Duration::from_secs(30)).await.unwrap_err();
    assert!(told(&error), "{error}");
    assert_eq!(state.get_node_state("run", "node").await.unwrap().unwrap().status, NodeStatus::Pending);
    let health = state.health();
    assert!(!health.locks && health.is_sound(), "it grants none, and nothing is wrong: {health:?}");

    // What outlives a run that is deleted is not taken for nothing.
    state.add_completed_interval("run", "node", ("2024-01-01", "2024-01-02")).await.unwrap();
    state.delete_run("run", OnDelete::KeepCoverage).await.unwrap();
    let error = state.coverage("node").await.unwrap_err();
    assert!(error.to_string().contains("retained"), "{error}");
    state.close().await.unwrap();
}
