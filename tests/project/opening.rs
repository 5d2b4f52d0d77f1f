//! Opening a project by its settings, beside moves.
#![cfg(all(feature = "file", feature = "sqlite", feature = "project"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::projects::{go_on, now, project, settings};
use seeknal_state::project::relocate::{self, Home};
#[cfg(feature = "libsql")]
use seeknal_state::project::relocate::{Move, Origin};
use seeknal_state::project::{self, ProjectErrorKind, Settings};

/// What is written where the state was nobody reads any more.
#[tokio::test]
async fn settings_from_before_a_move_open_nothing_that_was_left() {
    for (from, to) in [("file", Home::Database), ("database", Home::File)] {
        let dir = project(from).await;
        let before = settings(dir.path());
        relocate::execute(&settings(dir.path()), to, now(), go_on).await.unwrap();
        let error = project::open_with(&before).await.unwrap_err();
        assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
        assert!(error.to_string().contains(&format!("names {} by now", to.name())), "{error}");
        let error = relocate::execute(&before, to, now(), go_on).await.unwrap_err();
        assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
        // It is closed again, so that the one that is meant opens, and so does the one that was left for whoever says so.
        project::open_with(&settings(dir.path())).await.unwrap().close().await.unwrap();
        let named = |name: &str| (name == "SEEKNAL_STATE_BACKEND").then(|| from.into());
        let by_environment = Settings::load(dir.path(), &named).unwrap();
        project::open_with(&by_environment).await.unwrap().close().await.unwrap();
    }
}

/// A move into the place that the settings name already switches nothing: they were changed before it.
#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_from_before_another_server_was_named_open_nothing_that_was_left() {
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    let dir = project("database").await;
    let before = settings(dir.path());
    let file = dir.path().join("seeknal_project.yml");
    fs::write(&file, format!("state_backend: database\ndatabase_url: {}?authToken=s3cret\n", server.url())).unwrap();
    let what = || Move::new(Origin::parse("sqlite").unwrap(), Home::Database);
    relocate::execute(&settings(dir.path()), what(), now(), go_on).await.unwrap();
    let error = project::open_with(&before).await.expect_err("what is written there nobody reads");
    assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains(&server.url()) && !error.to_string().contains("s3cret"), "{error}");
    // The same server in other words, with another token.
    let named = settings(dir.path());
    fs::write(&file, format!("state_backend: database\ndatabase_url: http://LOCALHOST:{}\n", server.port())).unwrap();
    project::open_with(&named).await.unwrap().close().await.unwrap();
}

/// What says the same in other words is no move.
#[tokio::test]
async fn settings_that_name_the_same_place_in_other_words_are_not_left() {
    let dir = project("file").await;
    let before = settings(dir.path());
    fs::write(dir.path().join("seeknal_project.yml"), "name: demo\nstate_backend: \"file\"\n").unwrap();
    project::open_with(&before).await.unwrap().close().await.unwrap();
}

/// Opens the project, locks a run, and says by which token.
async fn granted(dir: &Path) -> u64 {
    let state = project::open_with(&settings(dir)).await.unwrap();
    let lease = state.acquire_lock("still", Duration::from_secs(30)).await.unwrap().unwrap();
    let token = lease.token().0;
    lease.release().await.unwrap();
    state.close().await.unwrap();
    token
}

/// The way back that a move prints is no move, and takes no tokens along: what the other backend gave out is known from the file beside it.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_do_not_go_back_with_the_settings() {
    for (from, to) in [("file", Home::Database), ("database", Home::File)] {
        let dir = project(from).await;
        let target = dir.path().join("target");
        let mut last = granted(dir.path()).await;
        relocate::execute(&settings(dir.path()), to, now(), go_on).await.unwrap();
        let other = target.join(if to == Home::File { "run_state.json.lock" } else { "state.db.lock" });
        for way in ["as it is", "and forth", "and back", "where the other one cannot be read", "where there is no other one"] {
            let name = if way == "and forth" { to.name() } else { from };
            match way {
                "as it is" => {
                    let there = granted(dir.path()).await;
                    assert!(there > last, "{from}: the move takes them along");
                    last = there;
                }
                "where the other one cannot be read" => fs::write(&other, "no numbers").unwrap(),
                "where there is no other one" => fs::remove_file(&other).unwrap(),
                _ => {}
            }
            fs::write(dir.path().join("seeknal_project.yml"), format!("state_backend: {name}\n")).unwrap();
            let next = granted(dir.path()).await;
            assert!(next > last, "{from}, {way}: {next} after {last}");
            last = next;
        }
        // The other door of the project.
        fs::write(&other, format!("{{\"token\":{},\"seq\":0}}", last + 1_000_000)).unwrap();
        let (backend, _) = settings(dir.path()).open_backend(false).await.unwrap();
        assert!(backend.highest_token().await.unwrap() >= last + 1_000_000, "{from}");
        backend.close().await.unwrap();
        // Whatever could not be read may have been as far as the clock.
        assert!(last > 1 << 50, "{from}: {last}");
    }
}
