//! The conformance suite, every case on a server of its own.

use std::sync::Arc;

use seeknal_state::create_state_backend;
use seeknal_state::store::conformance::{Harness, cases};
use seeknal_state::store::{BoxFuture, StateBackend, StoreError};

use super::sqld::Sqld;

impl Harness for Sqld {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let backend = create_state_backend("database", &self.options());
        Box::pin(async move { backend })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_holds() {
    let only = std::env::var("SEEKNAL_TEST_CASE").ok();
    let mut left = cases().into_iter().filter(|case| only.as_deref().is_none_or(|only| case.name().contains(only)));
    let mut running = tokio::task::JoinSet::new();
    let mut violations = Vec::new();
    loop {
        while running.len() < 4
            && let Some(case) = left.next()
        {
            let Some(server) = tokio::task::spawn_blocking(Sqld::start).await.unwrap() else { return };
            running.spawn(async move { case.run(&server).await });
        }
        match running.join_next().await {
            Some(done) => violations.extend(done.unwrap().err()),
            None => break,
        }
    }
    assert!(violations.is_empty(), "{violations:#?}");
}
