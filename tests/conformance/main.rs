//! The conformance suite on the backends of this crate: every case is a test of its own.
#![cfg(feature = "conformance")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "../support/batches.rs"]
#[allow(dead_code, reason = "a few of them")]
mod batches;
mod bites;
#[cfg(feature = "sqlite")]
mod differ;
#[path = "../../examples/custom_backend/json_lines.rs"]
mod json_lines;
#[cfg(feature = "postgres")]
#[path = "../support/postgres.rs"]
mod postgres_server;
#[cfg(any(feature = "postgres", feature = "libsql"))]
#[path = "../support/servers.rs"]
mod servers;
#[cfg(feature = "libsql")]
#[path = "../support/sqld.rs"]
mod sqld;

use std::sync::Arc;

use seeknal_state::store::conformance::{Harness, cases, run_all, run_case};
use seeknal_state::store::{BoxFuture, MemoryBackend, StateBackend, StoreError};

/// Clones of a memory backend are openings of one store.
#[derive(Default)]
struct MemoryHarness(MemoryBackend);

impl Harness for MemoryHarness {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let backend: Arc<dyn StateBackend> = Arc::new(self.0.clone());
        Box::pin(async move { Ok(backend) })
    }
}

/// A folder that holds the storage of one of the built-in backends.
#[cfg(any(feature = "file", feature = "sqlite"))]
struct Folder {
    folder: tempfile::TempDir,
    backend: &'static str,
}

#[cfg(any(feature = "file", feature = "sqlite"))]
impl Folder {
    fn of(backend: &'static str) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), backend }
    }
}

#[cfg(any(feature = "file", feature = "sqlite"))]
impl Harness for Folder {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let options = seeknal_state::BackendOptions::new().base_path(self.folder.path());
        let backend = seeknal_state::create_state_backend(self.backend, &options);
        Box::pin(async move { backend })
    }
}

/// A log of the backend that the example of a custom one makes.
struct CustomHarness(tempfile::TempDir);

impl Harness for CustomHarness {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let path = self.0.path().join("state.jsonl");
        let backend = json_lines::make(&seeknal_state::BackendOptions::new().set("path", path.to_string_lossy()));
        Box::pin(async move { backend })
    }
}

/// A schema on a server of the tests' own.
#[cfg(feature = "postgres")]
struct Postgres(seeknal_state::BackendOptions);

#[cfg(feature = "postgres")]
impl Postgres {
    fn of(query: &str) -> Option<Self> {
        let cluster = postgres_server::cluster()?;
        let url = cluster.url_of("postgres", postgres_server::PASSWORD, "localhost", query);
        let options = postgres_server::fresh(cluster).database_url(url).set("database_ca_file", "");
        let trusted = query.contains("verify").then(|| cluster.ca_file());
        Some(Self(match trusted {
            Some(file) => options.set("database_ca_file", file.to_string_lossy()),
            None => options,
        }))
    }
}

#[cfg(feature = "postgres")]
impl Harness for Postgres {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let backend = seeknal_state::create_state_backend("database", &self.0);
        Box::pin(async move { backend })
    }
}

/// A libSQL server of one test's own. The suite itself runs on it in `libsql_backend`.
#[cfg(feature = "libsql")]
struct Libsql(sqld::Sqld);

#[cfg(feature = "libsql")]
impl Harness for Libsql {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        let backend = seeknal_state::create_state_backend("database", &self.0.options());
        Box::pin(async move { backend })
    }
}

seeknal_state::conformance_tests!(memory, MemoryHarness::default());
seeknal_state::conformance_tests!(custom, CustomHarness(tempfile::tempdir().unwrap()));
#[cfg(feature = "file")]
seeknal_state::conformance_tests!(file, Folder::of("file"));
#[cfg(feature = "sqlite")]
seeknal_state::conformance_tests!(sqlite, Folder::of("database"));
#[cfg(feature = "postgres")]
seeknal_state::conformance_tests!(
    postgres,
    match Postgres::of("?sslmode=disable") {
        Some(harness) => harness,
        None => return,
    }
);
#[cfg(feature = "postgres")]
seeknal_state::conformance_tests!(
    postgres_tls,
    match Postgres::of("?sslmode=verify-full") {
        Some(harness) => harness,
        None => return,
    }
);

#[tokio::test]
async fn the_report_names_every_case() {
    let report = run_all(MemoryHarness::default).await;
    assert!(report.is_conforming(), "{report}");
    assert_eq!(report.passed.len(), cases().len());
}

#[tokio::test]
async fn a_case_that_is_not_there_is_a_violation() {
    let violation = run_case("no_such_case", &MemoryHarness::default()).await.unwrap_err();
    assert!(violation.to_string().contains("no_such_case"));
}
