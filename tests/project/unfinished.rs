//! A move into the place that the settings name already, cut off: nobody takes the part that is there for the whole, and the same move run again ends it.
#![cfg(all(feature = "file", feature = "sqlite", feature = "project"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

#[cfg(feature = "libsql")]
use crate::projects::fill;
use crate::projects::{go_on, now, open, project, put, settings};
use seeknal_state::model::{Mutation, NewRun, RunQuery};
use seeknal_state::project::relocate::{self, Home, Move, Origin, Step};
use seeknal_state::project::{self, ProjectErrorKind};
#[cfg(feature = "libsql")]
use seeknal_state::store::create_state_backend;
use seeknal_state::{Coordinator, Error, StoreErrorKind};

/// A project whose state is in the file, and whose settings name the database.
async fn left_behind() -> tempfile::TempDir {
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    dir
}

fn from_file() -> Move {
    Move::new(Home::File, Home::Database)
}

/// Stops at the first step of this name, as a kill would.
async fn cut_off(dir: &Path, what: Move, at: &str) {
    let stop = |step: Step| if format!("{step:?}") == at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let error = relocate::execute(&settings(dir), what, now(), stop).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Stopped, "{error}");
}

/// Who opens it for writing is refused, by the settings and by hand, and told everything; who reads is let in, and told too.
async fn assert_kept_out(dir: &Path, words: &[&str]) {
    let named = settings(dir);
    let error = project::open_with(&named).await.expect_err("it passes for the whole state");
    assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
    let by_hand = Coordinator::open(named.backend(false).unwrap()).await.expect_err("it passes for the whole state");
    assert!(matches!(&by_hand, Error::Store(told) if told.kind() == StoreErrorKind::Unfinished), "{by_hand}");
    // It does not pass by itself: who tries again as long as that may help would do so for good.
    assert!(!error.is_retryable() && !by_hand.is_retryable(), "{error}");
    let (reader, report) = named.open_existing().await.unwrap().unwrap();
    reader.list_runs(&RunQuery::default()).await.unwrap();
    reader.close().await.unwrap();
    for told in [error.to_string(), by_hand.to_string(), report.notices.join("\n")] {
        for word in ["--no-dry-run", "seeknal state unlock", " UTC"].iter().chain(words) {
            assert!(told.contains(word), "{word}: {told}");
        }
    }
}

async fn assert_whole(dir: &Path) {
    let state = project::open_with(&settings(dir)).await.unwrap();
    assert_eq!(state.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 4);
    assert!(state.backend().list_leases().await.unwrap().is_empty());
    state.close().await.unwrap();
    let (reader, report) = settings(dir).open_existing().await.unwrap().unwrap();
    assert!(report.notices.is_empty(), "{:?}", report.notices);
    reader.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_step_the_part_that_is_there_is_opened_by_nobody() {
    let (mut stop, mut kept_out) = (0, 0);
    loop {
        let dir = left_behind().await;
        let mut seen = Vec::new();
        let outcome = relocate::execute(&settings(dir.path()), from_file(), now(), |step| {
            seen.push(step);
            if seen.len() > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .await;
        let Err(error) = outcome else { break };
        assert_eq!(error.kind(), ProjectErrorKind::Stopped, "{error}");
        if seen.contains(&Step::BatchCopied) && !seen.contains(&Step::Verified) {
            assert_kept_out(dir.path(), &["run_state.json", "--backend database --from file"]).await;
            kept_out += 1;
        }
        relocate::preview(&settings(dir.path()), from_file(), |_, _| ()).await.unwrap();
        relocate::execute(&settings(dir.path()), from_file(), now(), go_on).await.unwrap();
        assert_whole(dir.path()).await;
        stop += 1;
    }
    assert!(kept_out >= 2, "{kept_out} of {stop} steps");
}

/// The machine ended with the mover: locks of an earlier start of it are over, this one is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_kept_shut_over_a_start_of_the_machine() {
    let dir = left_behind().await;
    cut_off(dir.path(), from_file(), "BatchCopied").await;
    let database = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
    database.execute("UPDATE locks SET boot_id = 'an earlier start', expires_boot_ms = 0", []).unwrap();
    drop(database);
    assert_kept_out(dir.path(), &["run_state.json"]).await;
    relocate::execute(&settings(dir.path()), from_file(), now(), go_on).await.unwrap();
    assert_whole(dir.path()).await;
}

/// The project lies in another folder when the move goes on: a container, another host, `mv`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_move_goes_on_where_the_project_lies_by_then() {
    let dir = left_behind().await;
    cut_off(dir.path(), from_file(), "BatchCopied").await;
    let elsewhere = tempfile::tempdir().unwrap();
    let moved = elsewhere.path().join("moved");
    fs::rename(dir.path(), &moved).unwrap();
    relocate::execute(&settings(&moved), from_file(), now(), go_on).await.unwrap();
    assert_whole(&moved).await;
}

/// Nothing is there to go on from, and what is here is not the whole: that is no end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_whose_source_is_gone_does_not_end_well() {
    let dir = left_behind().await;
    cut_off(dir.path(), from_file(), "BatchCopied").await;
    // First the document alone, then what tells of its numbers, too.
    for (file, is_left) in [("run_state.json", true), ("run_state.json.lock", false)] {
        fs::remove_file(dir.path().join("target").join(file)).unwrap();
        let preview = relocate::preview(&settings(dir.path()), from_file(), |_, _| ()).await.unwrap();
        assert!(preview.is_unfinished && preview.plan.is_some() == is_left, "{file}");
        let error = relocate::execute(&settings(dir.path()), from_file(), now(), go_on).await.unwrap_err();
        assert!(error.kind() == ProjectErrorKind::Conflict && error.to_string().contains("state unlock"), "{file}: {error}");
        assert_kept_out(dir.path(), &["run_state.json"]).await;
    }
}

/// It is the source that is not whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_state_is_not_moved_on() {
    let dir = left_behind().await;
    cut_off(dir.path(), from_file(), "BatchCopied").await;
    fs::rename(dir.path().join("target/run_state.json"), dir.path().join("target/aside.json")).unwrap();
    let preview = relocate::preview(&settings(dir.path()), Home::File, |_, _| ()).await.unwrap();
    assert!(preview.notices.iter().any(|notice| notice.contains("--from file")), "{:?}", preview.notices);
    let error = relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap_err();
    assert!(error.kind() == ProjectErrorKind::Conflict && error.to_string().contains("--from file"), "{error}");
    assert_eq!(settings(dir.path()).backend.value, "database");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_fails_and_changes_nothing_keeps_nobody_out() {
    let dir = left_behind().await;
    open("database", &dir.path().join("target")).await.close().await.unwrap();
    let database = dir.path().join("target/state.db");
    let refuse = || {
        let database = rusqlite::Connection::open(&database).unwrap();
        database.execute_batch("CREATE TRIGGER no BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'not today'); END").unwrap();
    };
    let error = relocate::execute(&settings(dir.path()), from_file(), now(), |step| {
        if format!("{step:?}") == "Marked" {
            refuse();
        }
        ControlFlow::Continue(())
    })
    .await
    .unwrap_err();
    assert!(error.to_string().contains("not today"), "{error}");
    rusqlite::Connection::open(&database).unwrap().execute_batch("DROP TRIGGER no").unwrap();
    let state = project::open_with(&settings(dir.path())).await.unwrap();
    state.create_run("tonight", NewRun::pending()).await.unwrap();
    state.close().await.unwrap();
}

/// What is copied when the rest fails is in use nevertheless: it is said what that means, and not that the settings were not switched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_after_the_first_batch_says_what_it_means_for_who_works_there() {
    let dir = left_behind().await;
    let target = dir.path().join("target");
    let document = fs::read(target.join("run_state.json")).unwrap();
    let error = relocate::execute(&settings(dir.path()), from_file(), now(), |step| {
        if step == Step::Copied {
            let database = rusqlite::Connection::open(target.join("state.db")).unwrap();
            database.execute("UPDATE runs SET status = 'failed' WHERE run_id = 'run_1'", []).unwrap();
        }
        ControlFlow::Continue(())
    })
    .await
    .unwrap_err();
    let told = error.to_string();
    assert!(told.contains("\"run_1\" is not the same") && told.contains("run the move again"), "{told}");
    assert!(told.contains("database already") || told.contains("state.db already"), "{told}");
    assert!(!told.contains("not switched"), "{told}");
    assert_kept_out(dir.path(), &["run_state.json"]).await;
    assert_eq!(fs::read(target.join("run_state.json")).unwrap(), document);
}

/// From `state.db` to a server that the settings name already.
#[cfg(any(feature = "postgres", feature = "libsql"))]
async fn cut_off_on_a_server(url: &str, options: &str) {
    let dir = project("database").await;
    let file = dir.path().join("seeknal_project.yml");
    let named = format!("state_backend: database\ndatabase_url: {url}\n{options}");
    fs::write(&file, &named).unwrap();
    let from = || Move::new(Origin::parse("sqlite").unwrap(), Home::Database);
    cut_off(dir.path(), from(), "BatchCopied").await;
    assert_kept_out(dir.path(), &["state.db", "--backend database --from sqlite"]).await;

    // What another place holds is not the rest of it.
    let other = open("file", &dir.path().join("target")).await;
    put(&other, "another", vec![Mutation::Create { run: NewRun::pending(), at: now() }]).await;
    other.close().await.unwrap();
    let error = relocate::execute(&settings(dir.path()), from_file(), now(), go_on).await.unwrap_err();
    assert!(error.kind() == ProjectErrorKind::Conflict && error.to_string().contains("--from sqlite"), "{error}");
    assert!(!dir.path().join("target/run_state.json.bak").exists(), "nothing was written");

    relocate::execute(&settings(dir.path()), from(), now(), go_on).await.unwrap();
    assert_whole(dir.path()).await;
}

#[cfg(feature = "postgres")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_state_on_postgresql_is_opened_by_nobody() {
    let Some(cluster) = crate::support::postgres::cluster() else { return };
    let schema = crate::support::postgres::fresh_schema();
    let options = format!("seeknal_state:\n  options:\n    database_schema: {schema}\n");
    cut_off_on_a_server(&cluster.url(""), &options).await;
}

#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_state_on_libsql_is_opened_by_nobody() {
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    cut_off_on_a_server(&server.url(), "").await;
}

/// The URL of the source is the caller's, and may hold a secret.
#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_that_goes_on_holds_no_secret() {
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    let source = create_state_backend("database", &server.options()).unwrap();
    source.initialize().await.unwrap();
    fill(&source).await;
    source.close().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    let url = format!("{}?authToken=s3cret", server.url());
    let from = || Move::new(Origin::parse(&url).unwrap(), Home::Database);
    cut_off(dir.path(), from(), "BatchCopied").await;
    let error = project::open_with(&settings(dir.path())).await.expect_err("it passes for the whole state").to_string();
    assert!(error.contains("--from URL") && error.contains(&server.port().to_string()) && !error.contains("s3cret"), "{error}");
    // One server, spelled in another way.
    let from = Move::new(Origin::parse(&url.replace("127.0.0.1", "localhost")).unwrap(), Home::Database);
    assert_ne!(from.from, Origin::parse(&url).unwrap());
    relocate::execute(&settings(dir.path()), from, now(), go_on).await.unwrap();
    assert_whole(dir.path()).await;
}
