//! The SQLite backend, through the trait: what it accepts and refuses, what it shares with other openings, what it leaves untouched.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use seeknal_state::Coordinator;
use seeknal_state::model::{
    Batch, Entry, Fence, FencingToken, Guard, LeaseKey, LeaseMutation, LeaseOwner, Ledger, Metadata, Mutation, NewRun, NoFences,
    NodeStatus, NodeUpdate, Outcome, PartitionKey, RawJson, Refusal, RunFilter, RunQuery, RunState, RunStatus, RunUpdate,
    Version, apply_all, time,
};
use seeknal_state::store::{BackendOptions, StoreError, StoreErrorKind, create_state_backend};

#[path = "../support/batches.rs"]
mod batches;
mod by_hand;
mod commits;

mod files;
mod joined;
mod kills;
mod leases;
mod openings;
mod oracle;
mod outliving;
#[path = "../support/power.rs"]
mod power;
mod restored;
#[path = "../support/steps.rs"]
mod steps;
#[path = "../support/syncs.rs"]
mod syncs;
#[path = "../support/trace.rs"]
mod trace;

use batches::*;

fn db(dir: &Path) -> PathBuf {
    dir.join("state.db")
}

fn make(path: &Path) -> Backend {
    create_state_backend("database", &BackendOptions::new().db_path(path)).unwrap()
}

async fn open(path: &Path) -> Backend {
    let backend = make(path);
    backend.initialize().await.unwrap();
    backend
}

async fn open_reading(path: &Path) -> Backend {
    let backend = create_state_backend("database", &BackendOptions::new().db_path(path).read_only(true)).unwrap();
    backend.initialize().await.unwrap();
    backend
}

/// Every file of a folder with its bytes.
fn bytes_of(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        } else {
            found.insert(path, Vec::new());
        }
    }
    found
}

fn raw(path: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(path).unwrap()
}
