//! The conformance suite, every case on a server of its own: open to everybody, and with a token through TLS.

use std::sync::Arc;

use seeknal_state::store::conformance::{Harness, cases};
use seeknal_state::store::{BoxFuture, StateBackend, StoreError};
use seeknal_state::{BackendOptions, create_state_backend};

use super::proxy::Tls;
use super::sqld::{Sqld, certificates};

impl Harness for Sqld {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let backend = create_state_backend("database", &self.options());
        Box::pin(async move { backend })
    }
}

/// A server that wants tokens, behind encryption.
struct Guarded {
    _server: Sqld,
    _front: Tls,
    options: BackendOptions,
}

impl Harness for Guarded {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let backend = create_state_backend("database", &self.options);
        Box::pin(async move { backend })
    }
}

/// Runs every case, some at once, each on what `make` makes for it.
async fn every_case<H: Harness + Send + Sync + 'static>(mut make: impl AsyncFnMut() -> Option<H>) {
    let only = std::env::var("SEEKNAL_TEST_CASE").ok();
    let mut left = cases().into_iter().filter(|case| only.as_deref().is_none_or(|only| case.name().contains(only)));
    let mut running = tokio::task::JoinSet::new();
    let mut violations = Vec::new();
    loop {
        while running.len() < 4
            && let Some(case) = left.next()
        {
            let Some(harness) = make().await else { return };
            running.spawn(async move { case.run(&harness).await });
        }
        match running.join_next().await {
            Some(done) => violations.extend(done.unwrap().err()),
            None => break,
        }
    }
    assert!(violations.is_empty(), "{violations:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_holds() {
    every_case(async || tokio::task::spawn_blocking(Sqld::start).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_holds_with_a_token_through_tls() {
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path(), "DNS:localhost");
    every_case(async || {
        let (server, token) = tokio::task::spawn_blocking(|| {
            let server = Sqld::with_tokens()?;
            let token = server.token(r#"{"a":"rw"}"#);
            Some((server, token))
        })
        .await
        .unwrap()?;
        let front = Tls::before(server.port(), folder.path()).await;
        let options = BackendOptions::new()
            .database_url(format!("libsql://{token}@localhost:{}", front.port))
            .set("database_ca_file", folder.path().join("ca.pem").to_string_lossy());
        Some(Guarded { _server: server, _front: front, options })
    })
    .await;
}
