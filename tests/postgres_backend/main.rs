//! The PostgreSQL backend against a real server: what it accepts and refuses, what several openings do to one another, and what it survives.
#![cfg(feature = "postgres")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use seeknal_state::model::{
    Batch, Entry, Fence, FencingToken, Guard, LeaseKey, LeaseMutation, Mutation, NewRun, NodeUpdate, Outcome, PartitionKey,
    Refusal, RunQuery, RunState, RunStatus, RunUpdate, Version,
};
use seeknal_state::store::{BackendOptions, StoreError, StoreErrorKind, create_state_backend};

#[path = "../support/postgres.rs"]
mod server;
#[path = "../support/servers.rs"]
mod servers;

mod at_once;
#[path = "../support/batches.rs"]
mod batches;
mod clocks;
mod commits;
mod copies;
mod credentials;
mod doors;
#[path = "../support/exactly.rs"]
mod exactly;
mod faults;
mod leases;
mod leftovers;
mod networks;
mod oracle;
mod others;
#[path = "../support/proxy.rs"]
mod proxy;
mod sessions;
mod sizes;
#[path = "../support/steps.rs"]
mod steps;
#[path = "../support/unreadable.rs"]
mod telling;
mod unreadable;
#[path = "../support/wire.rs"]
mod wire;

use batches::*;

/// A schema of its own on the server of this process.
struct Store {
    cluster: &'static server::Cluster,
    schema: String,
}

impl Store {
    /// None: servers are left out.
    fn fresh() -> Option<Self> {
        Some(Self { cluster: server::cluster()?, schema: server::fresh_schema() })
    }

    fn options(&self) -> BackendOptions {
        BackendOptions::new().database_url(self.cluster.url("")).set("database_schema", &self.schema)
    }

    fn make(&self) -> Backend {
        create_state_backend("database", &self.options()).unwrap()
    }

    async fn open(&self) -> Backend {
        let backend = self.make();
        backend.initialize().await.unwrap();
        backend
    }

    fn sql(&self, sql: &str) -> String {
        self.cluster.sql_in(&self.schema, sql)
    }
}

/// A store, or the end of the test where servers are left out.
macro_rules! store {
    () => {
        match Store::fresh() {
            Some(store) => store,
            None => return,
        }
    };
}
use store;

/// Waits until it holds; fails after a while.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(tokio::time::Instant::now() < patience, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
