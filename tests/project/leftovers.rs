//! What moves that were cut off leave lying: their notes take nothing from a state that is in use, and their documents no backup's place.
#![cfg(all(feature = "file", feature = "sqlite", feature = "project"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::projects::{go_on, now, open, project, put, settings};
use seeknal_state::model::{Mutation, NewRun, NodeId, RunQuery};
use seeknal_state::project::relocate::{self, Home, Step};
use seeknal_state::project::{ProjectErrorKind, Settings, migrate};

fn notes(dir: &Path) -> PathBuf {
    dir.join("target/.migrate-state.copied")
}

/// A move from the file that is cut off when everything is copied.
async fn cut_off() -> tempfile::TempDir {
    let dir = project("file").await;
    let stop = |step| if step == Step::Copied { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    relocate::execute(&settings(dir.path()), Home::Database, now(), stop).await.unwrap_err();
    assert!(notes(dir.path()).exists());
    dir
}

fn switch_by_hand(dir: &Path, to: &str) {
    fs::write(dir.join("seeknal_project.yml"), format!("state_backend: {to}\n")).unwrap();
}

async fn runs(dir: &Path, backend: &str) -> BTreeSet<String> {
    let backend = open(backend, &dir.join("target")).await;
    let runs = backend.list_runs(&RunQuery::default().limit(1_000)).await.unwrap().runs;
    backend.close().await.unwrap();
    runs.iter().map(|run| run.run_id.to_string()).collect()
}

async fn change(dir: &Path, backend: &str, run: &str, mutation: Mutation) {
    let backend = open(backend, &dir.join("target")).await;
    put(&backend, run, vec![mutation]).await;
    backend.close().await.unwrap();
}

fn later() -> Mutation {
    Mutation::AddPartition { node: "load".parse().unwrap(), partition: "dt=later".parse().unwrap() }
}

/// Whoever switched by hand works on in the database; what is tidied up in the file that was left behind is no order to delete it there.
#[tokio::test]
async fn notes_of_a_move_that_was_cut_off_take_nothing_from_the_state_in_use() {
    let by_environment = |name: &str| (name == "SEEKNAL_STATE_BACKEND").then(|| OsString::from("database"));
    let file_by_environment = |name: &str| (name == "SEEKNAL_STATE_BACKEND").then(|| OsString::from("file"));
    for way in ["by the file", "by the environment", "by the file, looked at from elsewhere"] {
        let dir = cut_off().await;
        if way != "by the environment" {
            switch_by_hand(dir.path(), "database");
        }
        let database = open("database", &dir.path().join("target")).await;
        put(&database, "worked", vec![Mutation::Create { run: NewRun::running(), at: now() }]).await;
        database.close().await.unwrap();
        for run in ["run_0", "run_1"] {
            change(dir.path(), "file", run, Mutation::Delete { keep_coverage: true }).await;
        }
        let before = runs(dir.path(), "database").await;
        assert_eq!(before.len(), 5);
        let settings = match way {
            "by the file" => settings(dir.path()),
            "by the environment" => Settings::load(dir.path(), &by_environment).unwrap(),
            _ => Settings::load(dir.path(), &file_by_environment).unwrap(),
        };
        let named = |notices: &[String]| {
            ["\"run_0\"", "\"run_1\""]
                .iter()
                .all(|run| notices.iter().any(|notice| notice.contains("also holds") && notice.contains(run)))
        };
        let preview = relocate::preview(&settings, Home::Database, |_, _| ()).await.unwrap();
        assert!(named(&preview.notices), "{way}: {:?}", preview.notices);
        let report = relocate::execute(&settings, Home::Database, now(), go_on).await.unwrap();
        assert!(named(&report.notices), "{way}: {:?}", report.notices);
        assert_eq!(runs(dir.path(), "database").await, before, "{way}");
        assert!(!notes(dir.path()).exists(), "{way}: the notes are gone");
    }
}

/// Another document is in the file's place: it says nothing of what was copied from the one before.
#[tokio::test]
async fn what_another_document_does_not_know_stays_where_it_was_copied_to() {
    let dir = cut_off().await;
    let target = dir.path().join("target");
    for name in fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().path()) {
        if name.file_name().unwrap().to_str().unwrap().starts_with("run_state.json") {
            fs::remove_file(name).unwrap();
        }
    }
    fs::write(target.join("run_state.json"), crate::projects::GUIDE).unwrap();
    let plan = relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap().plan.unwrap();
    assert_eq!((plan.only_in_target, plan.replaced_runs), (4, 0));
    relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert_eq!(runs(dir.path(), "database").await.len(), 5);
}

/// In a state that is in use a run that differs is a conflict, also where the other one is a copy of it.
#[tokio::test]
async fn a_copy_in_the_state_in_use_is_not_replaced() {
    let dir = cut_off().await;
    switch_by_hand(dir.path(), "database");
    change(dir.path(), "file", "run_1", later()).await;
    let plan = relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap().plan.unwrap();
    assert_eq!((plan.differing_runs, plan.replaced_runs), (1, 0));
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert!(error.kind() == ProjectErrorKind::Conflict && error.to_string().contains("\"run_1\""), "{error}");
}

#[tokio::test]
async fn copies_that_a_move_would_replace_are_named_before() {
    let dir = cut_off().await;
    change(dir.path(), "file", "run_1", later()).await;
    let mut fates = Vec::new();
    let preview =
        relocate::preview(&settings(dir.path()), Home::Database, |run, fate| fates.push((run.run_id.to_string(), fate)))
            .await
            .unwrap();
    let named = |notices: &[String]| notices.iter().any(|notice| notice.contains("replace") && notice.contains("\"run_1\""));
    assert!(named(&preview.notices), "{:?}", preview.notices);
    let plan = preview.plan.unwrap();
    assert_eq!((plan.replaced_runs, plan.moves.runs, plan.equal_runs), (1, 1, 3));
    assert_eq!(plan.replaced, ["run_1"]);
    assert!(fates.contains(&("run_1".to_owned(), migrate::Fate::Replace)), "{fates:?}");
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(named(&report.notices), "{:?}", report.notices);
    let database = open("database", &dir.path().join("target")).await;
    let run = database.load_run(&"run_1".parse().unwrap()).await.unwrap().unwrap();
    assert!(run.node("load").unwrap().partitions.iter().any(|partition| partition.as_str() == "dt=later"));
    assert_eq!(database.coverage(&NodeId::new("load").unwrap()).await.unwrap().intervals.len(), 2);
    database.close().await.unwrap();
}

/// Copies of runs of another place, and those of which nobody noted where they came from, follow nothing.
#[tokio::test]
async fn notes_of_another_source_license_nothing() {
    for (what, with) in [("\"source\":\"", "\"source\":\"/elsewhere"), ("\"source\":", "\"was\":")] {
        let dir = cut_off().await;
        let text = fs::read_to_string(notes(dir.path())).unwrap();
        assert!(text.contains(what), "{text}");
        fs::write(notes(dir.path()), text.replace(what, with)).unwrap();
        change(dir.path(), "file", "run_1", later()).await;
        let plan = relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap().plan.unwrap();
        assert_eq!((plan.differing_runs, plan.replaced_runs), (1, 0), "{with}");
    }
}

/// Where the settings cannot be switched the move is not over: its notes are there for the next.
#[tokio::test]
async fn notes_outlive_a_switch_that_fails() {
    let dir = project("file").await;
    let settings_file = dir.path().join("seeknal_project.yml");
    let in_the_way = |step| {
        if step == Step::Verified {
            fs::create_dir(&settings_file).unwrap();
        }
        ControlFlow::Continue(())
    };
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), in_the_way).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Partial, "{error}");
    fs::remove_dir(&settings_file).unwrap();
    change(dir.path(), "file", "run_1", later()).await;
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert_eq!(report.moved.unwrap().moved.runs, 1);
}

/// The backup is what the first move made: what a later one has half written is nobody's state, and is not kept as one.
#[tokio::test]
async fn a_document_that_a_move_has_half_written_takes_no_backups_place() {
    for cut in [Step::Locked, Step::TargetOpen, Step::BatchCopied] {
        let dir = project("file").await;
        let target = dir.path().join("target");
        let before = fs::read(target.join("run_state.json")).unwrap();
        relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
        change(dir.path(), "database", "worked", Mutation::Create { run: NewRun::running(), at: now() }).await;
        fs::rename(target.join("run_state.json"), target.join("aside.json")).unwrap();
        let stop = |step| if step == cut { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        relocate::execute(&settings(dir.path()), Home::File, now(), stop).await.unwrap_err();
        let report = relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap();
        assert_eq!((report.backup, report.older_backup), (None, None), "{cut:?}");
        assert!(fs::read(target.join("run_state.json.bak")).unwrap() == before, "{cut:?}: the backup is another one");
        assert_eq!(runs(dir.path(), "file").await.len(), 5, "{cut:?}");
    }
}

/// What the document holds of its own is backed up: a run, or no more than what outlives one.
#[tokio::test]
async fn a_document_that_holds_more_than_the_source_is_backed_up() {
    for keeps in [None, Some(true)] {
        let dir = project("database").await;
        let file = open("file", &dir.path().join("target")).await;
        let at = now();
        let interval = seeknal_state::model::Interval::parse("2020-01-01", "2020-01-02").unwrap();
        let add = Mutation::AddInterval { node: "load".parse().unwrap(), interval };
        put(&file, "own", vec![Mutation::Create { run: NewRun::running(), at }, add]).await;
        if let Some(keep_coverage) = keeps {
            put(&file, "own", vec![Mutation::Delete { keep_coverage }]).await;
        }
        file.close().await.unwrap();
        let before = fs::read(dir.path().join("target/run_state.json")).unwrap();
        let report = relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap();
        assert_eq!(fs::read(report.backup.unwrap()).unwrap(), before);
    }
}
