//! **seeknal-state** is the state coordinator that orchestrators written in async Rust embed: it remembers, safely, which run exists, where
//! each of its nodes stands, which time intervals and partitions are complete, and who holds which lock.
//!
//! It is no scheduler and no queue: it starts nothing and decides nothing. It keeps what many executors say at once, atomically and durably, in
//! `target/run_state.json` (file backend, the default), in `target/state.db` (SQLite, any number of processes of one machine), on PostgreSQL or a libSQL server
//! (any number of machines; features `postgres` and `libsql`), in memory, or in a backend of your own.
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! use std::time::Duration;
//! use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
//!
//! # let folder = tempfile::tempdir()?;
//! # let target = folder.path().join("target");
//! let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new().base_path(&target))?).await?;
//! state.create_run("run_1", NewRun::running()).await?;
//! state.set_node_state("run_1", "node1", NodeUpdate::success().row_count(1_000)).await?;
//! state.add_completed_interval("run_1", "node1", ("2024-01-01", "2024-01-02")).await?;
//!
//! let mut tx = state.transaction();
//! tx.set_node_state("run_1", "node1", NodeUpdate::success());
//! tx.set_node_state("run_1", "node2", NodeUpdate::success());
//! tx.commit().await?; // both or neither; dropped: neither
//!
//! if let Some(lease) = state.acquire_lock("run_1", Duration::from_millis(5_000)).await? {
//!     let fenced = state.with_lease(&lease); // every method; writes are refused once the lease is lost
//!     fenced.set_node_state("run_1", "node1", NodeUpdate::running()).await?;
//! } // released here
//! state.close().await?;
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! # What an acknowledgement means
//!
//! | backend | `Ok` from a write means | survives a killed process | survives a power cut |
//! |---|---|---|---|
//! | `file` | in the journal, `fdatasync` done | yes | yes |
//! | `database` (SQLite) | committed, WAL with `synchronous=FULL` | yes | yes |
//! | `database` (PostgreSQL) | committed by the server, `synchronous_commit=on` | yes | as the server is set up |
//! | `database` (libSQL) | committed by the server, which runs `synchronous=NORMAL` | yes | as the server is set up |
//! | `memory` | in memory | no | no |
//! | any, [`Durability::Deferred`] | in memory, on its way | what was flushed | what was flushed |
//!
//! # What else there is
//!
//! - Conditions: [`Transaction`] (`expect_…`, `fenced_by`); read, decide, commit: [`Coordinator::transact`].
//! - Locks: [`Coordinator::acquire_lock`], [`Coordinator::acquire`] with [`LockOptions`], and [`Coordinator::with_lease`] for writes that end with them.
//! - Work for many workers: [`Coordinator::claim_next`] and [`Coordinator::claim_node`] hand a ready node to exactly one of them; a [`Claim`] keeps it.
//! - Questions: [`Coordinator::get_run`], [`Coordinator::list_runs`], [`Coordinator::latest_node_state`], [`Coordinator::coverage`], [`Coordinator::pending`].
//! - After a crash: [`Coordinator::abandoned_runs`], [`Coordinator::resume_run`].
//! - Looking on: [`Coordinator::subscribe`], [`Coordinator::stats`], [`Coordinator::health`], and spans of the crate `tracing`.
//! - Errors: [`Error`], with `is_conflict()`, `is_retryable()`, `is_unknown_outcome()`, `is_lease_lost()`, `is_not_found()`, `is_closed()`.
//! - A backend of your own: [`StateBackend`] and [`StateBackendFactory`]; the feature `conformance` has the test kit.
//! - Project folders and their settings: feature `project`. The command `seeknal`: feature `cli`.
//!
//! # The rooms, from the ground up
//!
//! [`model`] is plain data and pure logic; [`store`] is where batches come to rest; above them the persistence actors, the run actors and the lock
//! manager, which are private; [`coordinator`] is the front door. Most users need only the names at the crate's root.

/// The example of the README, compiled and run.
#[cfg(all(doctest, feature = "file"))]
#[doc = include_str!("../README.md")]
pub struct Readme;

#[cfg(feature = "cli")]
pub mod cli;
pub mod coordinator;
mod error;
mod lease;
pub mod model;
mod persist;
#[cfg(feature = "project")]
pub mod project;
mod run;
pub mod store;

pub use coordinator::{
    AbandonedRun, Change, ChangeStream, Claim, ClaimFilter, Commit, Coordinator, CoordinatorBuilder, Durability, Event,
    Freshness, Health, Next, OnDelete, Resumed, RunView, Stats, StreamError, TransactError, Transaction, View,
};
pub use error::Error;
pub use lease::{Lease, LeaseError, LockOptions, LostReason};
pub use model::{
    Attempt, Blocked, BlockedReason, Clock, CommitSeq, Fence, FencingToken, Fingerprint, Guard, InputError, Interval,
    IntervalSet, IntoInterval, IntoNodeId, IntoRunId, LastSuccess, LeaseKey, LeaseOwner, LeaseRecord, List, Metadata, NewRun,
    NodeCoverage, NodeId, NodeState, NodeStatus, NodeUpdate, PartitionKey, ProcessInfo, RawJson, Refusal, RunCursor, RunFilter,
    RunHeader, RunId, RunPage, RunQuery, RunReceipt, RunState, RunStatus, RunSummary, RunUpdate, Snapshot, SystemClock, Version,
};
pub use persist::Histogram;
pub use run::DeferredLoss;
pub use store::{
    BackendOptions, MemoryBackend, OpenReport, StateBackend, StateBackendFactory, StoreError, StoreErrorKind,
    create_state_backend,
};
