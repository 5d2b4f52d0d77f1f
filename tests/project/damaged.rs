//! Moving a state that is damaged: what cannot be read any more is not left behind as if it had never been.
#![cfg(all(feature = "file", feature = "sqlite", feature = "project"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use crate::projects::{go_on, now, open, project, put, settings};
use seeknal_state::model::{Mutation, NewRun};
use seeknal_state::project::relocate::{self, Home};
use seeknal_state::project::{self, ProjectErrorKind};

fn database(dir: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(dir.join("target/state.db")).unwrap()
}

/// Rows whose run is gone, and an index that SQLite misses: every run that is left reads well.
#[tokio::test]
async fn a_damaged_database_is_not_moved_as_if_it_were_whole() {
    let damages = [
        ("rows without a run", "DELETE FROM runs WHERE run_id = 'run_1'", "of runs that are not there: run run_1"),
        (
            "pages that nothing leads to",
            "PRAGMA writable_schema = on; DELETE FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL",
            "the database is damaged: ",
        ),
    ];
    for (what, damage, told) in damages {
        let dir = project("database").await;
        database(dir.path()).execute_batch(damage).unwrap();
        let settings = settings(dir.path());
        assert!(!project::verify(&settings).await.unwrap().unwrap().is_sound(), "{what}");
        let preview = relocate::preview(&settings, Home::File, |_, _| ()).await.map(|_| ());
        let moved = relocate::execute(&settings, Home::File, now(), go_on).await.map(|_| ());
        for refused in [preview, moved] {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ProjectErrorKind::Integrity, "{what}: {error}");
            assert!(error.to_string().contains(told) && error.to_string().contains("state verify"), "{what}: {error}");
        }
        assert!(!dir.path().join("target/run_state.json").exists(), "{what}: nothing was written");
        assert_eq!(crate::projects::settings(dir.path()).backend.value, "database", "{what}");
    }
}

/// A document that is gone is not left for an empty state, and one that was set aside after a move is not missed.
#[tokio::test]
async fn a_lost_document_is_not_left_for_an_empty_database() {
    let dir = project("file").await;
    let document = dir.path().join("target/run_state.json");
    let aside = dir.path().join("target/aside.json");
    fs::rename(&document, &aside).unwrap();
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Integrity, "{error}");
    assert!(error.to_string().contains("is missing") && !dir.path().join("target/state.db").exists(), "{error}");
    fs::rename(&aside, &document).unwrap();
    relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    fs::rename(&document, &aside).unwrap();
    let again = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(again.moved.unwrap().moved.is_empty());
}

/// An older copy that was put back is told by the check, and is no damage.
#[tokio::test]
async fn what_the_check_only_remarks_on_moves() {
    let dir = project("database").await;
    let path = dir.path().join("target/state.db");
    let backup = fs::read(&path).unwrap();
    let backend = open("database", &dir.path().join("target")).await;
    put(&backend, "later", vec![Mutation::Create { run: NewRun::running(), at: now() }]).await;
    backend.close().await.unwrap();
    for suffix in ["-wal", "-shm"] {
        let _there_or_not = fs::remove_file(dir.path().join(format!("target/state.db{suffix}")));
    }
    fs::write(&path, backup).unwrap();
    let verified = project::verify(&settings(dir.path())).await.unwrap().unwrap();
    assert!(verified.is_sound() && verified.checked.iter().any(|line| line.contains("is older than")), "{verified:?}");
    let moved = relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap().moved.unwrap();
    assert_eq!(moved.moved.runs, 4);
}
