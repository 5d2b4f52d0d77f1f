//! The public test kit on the SQLite backend.

use seeknal_state::store::conformance::Harness;
use seeknal_state::store::{BoxFuture, StoreError};

use super::*;

/// Every opening is one of the same file, as several processes have it.
struct OneFile(tempfile::TempDir);

impl Harness for OneFile {
    fn open(&self) -> BoxFuture<'_, Result<Backend, StoreError>> {
        let backend = make(&db(self.0.path()));
        Box::pin(async move { Ok(backend) })
    }
}

seeknal_state::conformance_tests!(sqlite, OneFile(tempfile::tempdir().unwrap()));
