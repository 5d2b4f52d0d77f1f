//! Moving a project between its backends: killed at every step and run again, conflicts, backups, and what must not change.
#![cfg(all(feature = "file", feature = "sqlite", feature = "project"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use crate::projects::{fill, go_on, now, open, project, put, settings, tree};
use seeknal_state::model::{Mutation, NewRun};
use seeknal_state::project::relocate::{self, Home, Move, Origin, Step};
use seeknal_state::project::{ProjectErrorKind, Settings, migrate};
use seeknal_state::store::{BackendOptions, create_state_backend};

/// Both homes of the project hold the same, and the settings name the one.
async fn assert_moved(dir: &Path, to: &str) {
    assert_eq!(settings(dir).backend.value, to);
    let reader =
        |name: &str| create_state_backend(name, &BackendOptions::new().base_path(dir.join("target")).read_only(true)).unwrap();
    let (file, database) = (reader("file"), reader("database"));
    file.initialize().await.unwrap();
    database.initialize().await.unwrap();
    let counts = migrate::verify(&*file, &*database).await.unwrap();
    assert_eq!((counts.runs, counts.nodes, counts.coverage_nodes), (4, 6, 1));
    migrate::verify(&*database, &*file).await.unwrap();
}

#[tokio::test]
async fn the_file_moves_into_the_database_and_stays_as_it_was() {
    let dir = project("file").await;
    let document = dir.path().join("target/run_state.json");
    let before = fs::read(&document).unwrap();
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert_moved(dir.path(), "database").await;
    assert_eq!(fs::read(&document).unwrap(), before, "the document is untouched");
    assert_eq!(fs::read(dir.path().join("target/run_state.json.bak")).unwrap(), before);
    assert_eq!(fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap(), "state_backend: database\n");
    let moved = report.moved.unwrap();
    assert_eq!((moved.moved.rows, moved.moved.intervals, moved.moved.partitions), (303, 3, 3));
    let place = document.display();
    assert_eq!(report.rollback, [format!("cp {place}.bak {place}"), "state_backend: file".to_owned()]);

    let again = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(again.moved.unwrap().moved.is_empty());
    assert!(again.older_backup.is_none());
    assert_eq!(fs::read(&document).unwrap(), before);
}

/// Whoever fences something of his own by tokens must not meet lower ones after a move.
#[tokio::test]
async fn tokens_grow_over_a_move() {
    let dir = project("file").await;
    let mut highest = 0;
    for (from, to) in [("file", Home::Database), ("database", Home::File)] {
        let source = open(from, &dir.path().join("target")).await;
        source.raise_tokens(highest + 1_000).await.unwrap();
        let given = source.highest_token().await.unwrap();
        assert!(given >= highest + 1_000);
        source.close().await.unwrap();
        if to == Home::File {
            fs::remove_file(dir.path().join("target/run_state.json")).unwrap();
        }
        relocate::execute(&settings(dir.path()), to, now(), go_on).await.unwrap();
        let target = open(if to == Home::File { "file" } else { "database" }, &dir.path().join("target")).await;
        highest = target.highest_token().await.unwrap();
        assert!(highest >= given, "{from}: {given} were given out, {highest} are known after the move");
        target.close().await.unwrap();
    }
}

/// A number that no token of ours comes near fits no column: it is kept as it was written, and means nothing.
#[tokio::test]
async fn a_foreign_token_beyond_all_of_ours_moves_along() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    let document = target.join("run_state.json");
    fs::write(&document, r#"{"run_id":"theirs","nodes":{"n":{"status":"success","token":18446744073709551615}}}"#).unwrap();
    relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    let database = open("database", &target).await;
    let run = database.load_run(&"theirs".parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(run.node("n").unwrap().token, None);
    database.close().await.unwrap();
    fs::remove_file(&document).unwrap();
    relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap();
    assert!(fs::read_to_string(&document).unwrap().contains("18446744073709551615"));
}

#[tokio::test]
async fn the_database_moves_into_the_file() {
    let dir = project("database").await;
    relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap();
    assert_moved(dir.path(), "file").await;
    let text = fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap();
    assert_eq!(text, "name: demo # kept\nstate_backend: file\n");
}

/// Stops after each step in turn, as a kill would; the project must be usable as before, and a second run must end the work.
async fn killed_at_every_step(from: &str, to: Home) {
    let mut stop = 0;
    loop {
        let dir = project(from).await;
        let mut steps = 0;
        let outcome = relocate::execute(&settings(dir.path()), to, now(), |_| {
            steps += 1;
            if steps > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .await;
        if outcome.is_ok() {
            assert!(stop >= 7, "only {stop} steps were told");
            return;
        }
        assert_eq!(outcome.unwrap_err().kind(), ProjectErrorKind::Stopped);
        // The backend that the settings name is whole, whichever it is.
        let (backend, _) = settings(dir.path()).open_backend(true).await.unwrap();
        assert_eq!(migrate::plan(&*backend, None, |_, _| ()).await.unwrap().source.runs, 4, "after step {stop}");
        backend.close().await.unwrap();
        relocate::execute(&settings(dir.path()), to, now(), go_on).await.unwrap();
        assert_moved(dir.path(), to.name()).await;
        stop += 1;
    }
}

#[tokio::test]
async fn killed_at_every_step_towards_the_database() {
    killed_at_every_step("file", Home::Database).await;
}

#[tokio::test]
async fn killed_at_every_step_towards_the_file() {
    killed_at_every_step("database", Home::File).await;
}

#[tokio::test]
async fn a_preview_changes_nothing() {
    for (from, to) in [("file", Home::Database), ("database", Home::File)] {
        let dir = project(from).await;
        let before = tree(dir.path());
        let mut runs = 0;
        let preview = relocate::preview(&settings(dir.path()), to, |_, _| runs += 1).await.unwrap();
        let mut after = tree(dir.path());
        // SQLite's own files of a reader; they hold nothing.
        after.retain(|name, _| before.contains_key(name) || !name.starts_with("target/state.db-"));
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{from}");
        assert_eq!(after, before, "{from}");
        let plan = preview.plan.unwrap();
        assert_eq!((runs, plan.moves.runs, plan.moves.coverage_nodes), (4, 4, 1));
        assert!(!preview.settings_done);
    }
}

#[tokio::test]
async fn a_run_that_differs_stops_it_before_anything_is_written() {
    let dir = project("file").await;
    let database = open("database", &dir.path().join("target")).await;
    put(&database, "run_1", vec![Mutation::Create { run: NewRun::pending(), at: now() }]).await;
    database.close().await.unwrap();
    let before = tree(dir.path());
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Conflict);
    assert!(error.to_string().contains("\"run_1\""), "{error}");
    let after = tree(dir.path());
    assert_eq!(before.get("target/run_state.json"), after.get("target/run_state.json"));
    assert!(!after.contains_key("target/run_state.json.bak") && !after.contains_key("seeknal_project.yml"), "{:?}", after.keys());
    assert_eq!(settings(dir.path()).backend.value, "file");
}

#[tokio::test]
async fn an_older_backup_keeps_its_content_under_its_own_name() {
    let dir = project("file").await;
    let backup = dir.path().join("target/run_state.json.bak");
    fs::write(&backup, "older").unwrap();
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    let aside = report.older_backup.unwrap();
    assert_eq!(aside, dir.path().join("target/run_state.json.bak.20240601T100000Z"));
    assert_eq!(fs::read_to_string(aside).unwrap(), "older");
    assert_eq!(fs::read(backup).unwrap(), fs::read(dir.path().join("target/run_state.json")).unwrap());
}

#[tokio::test]
async fn what_a_killed_move_left_lying_is_swept_and_nothing_else() {
    let dir = project("file").await;
    let stray = |name: &str| {
        let path = dir.path().join(name);
        fs::write(&path, "half").unwrap();
        path
    };
    let swept = [
        stray("target/run_state.json.bak.01a20682f584742387eb3e561cbca77c.tmp"),
        stray("seeknal_project.yml.01a20682f584742387eb3e561cbca77c.tmp"),
    ];
    let kept = [stray("target/run_state.json.bak.mine.tmp"), stray("seeknal_project.yml.tmp")];
    relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(swept.iter().all(|path| !path.exists()) && kept.iter().all(|path| path.exists()));
}

#[tokio::test]
async fn a_database_that_a_killed_move_half_made_is_made_anew() {
    let dir = project("file").await;
    for name in ["state.db.new", "state.db.new-journal"] {
        fs::write(dir.path().join("target").join(name), "half made").unwrap();
    }
    assert!(relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap().plan.is_some());
    relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert_moved(dir.path(), "database").await;
    assert!(!dir.path().join("target/state.db.new").exists() && !dir.path().join("target/state.db.new-journal").exists());
}

#[tokio::test]
async fn a_live_writer_is_named_and_nothing_happens() {
    let dir = project("file").await;
    let writer = open("file", &dir.path().join("target")).await;
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Conflict);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    assert!(!dir.path().join("target/state.db").exists());
    relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap();
    writer.close().await.unwrap();
}

#[tokio::test]
async fn a_database_that_is_in_use_is_not_left() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    let writer = open("database", &dir.path().join("target")).await;
    fill(&writer).await;
    let error = relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    writer.close().await.unwrap();
    relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap();
}

#[tokio::test]
async fn a_settings_file_that_cannot_be_switched_stops_it_first() {
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: &s file\nother: *s\n").unwrap();
    let before = tree(dir.path());
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert!(error.to_string().contains("by hand"), "{error}");
    assert_eq!(tree(dir.path()), before);
}

/// All the work is done then, and one line is missing.
#[tokio::test]
async fn a_switch_that_fails_in_the_end_is_told_with_what_is_left_to_do() {
    let dir = project("file").await;
    let file = dir.path().join("seeknal_project.yml");
    let spoil = |step| {
        if step == Step::Verified {
            fs::write(&file, "state_backend: &s file\nother: *s\n").unwrap();
        }
        ControlFlow::Continue(())
    };
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), spoil).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Partial, "{error}");
    let (place, left) = (dir.path().join("target/state.db"), format!("write `state_backend: database` into {}", file.display()));
    assert!(error.to_string().contains(&format!("Everything is in {} and was compared", place.display())), "{error}");
    assert!(error.to_string().contains(&left), "{error}");
    fs::write(&file, "state_backend: database\n").unwrap();
    let again = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(again.moved.unwrap().moved.is_empty(), "what was told is true");
}

#[tokio::test]
async fn without_state_nothing_is_switched_and_it_says_what_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("`state_backend: database`"), "{error}");
    assert!(tree(dir.path()).is_empty());
    // Where the settings say it already there is nothing to refuse.
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(report.moved.is_none() && !report.switched && report.rollback.is_empty(), "{report:?}");
}

#[tokio::test]
async fn a_variable_that_overrides_the_file_is_told() {
    let dir = project("file").await;
    let settings = Settings::load(dir.path(), &|name| (name == "SEEKNAL_STATE_BACKEND").then(|| "file".into())).unwrap();
    let report = relocate::execute(&settings, Home::Database, now(), go_on).await.unwrap();
    assert!(report.notices.iter().any(|notice| notice.contains("SEEKNAL_STATE_BACKEND")), "{:?}", report.notices);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_kept_out_of_a_database_that_is_moved_and_told_by_whom() {
    let dir = project("database").await;
    let target = dir.path().join("target");
    let mut refusals = Vec::new();
    relocate::execute(&settings(dir.path()), Home::File, now(), |step| {
        if step == Step::Locked {
            let target = target.clone();
            let opening = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let backend = create_state_backend("database", &BackendOptions::new().base_path(target)).unwrap();
                runtime.block_on(seeknal_state::Coordinator::open(backend)).err().map(|error| error.to_string())
            });
            refusals.push(opening.join().unwrap());
        }
        ControlFlow::Continue(())
    })
    .await
    .unwrap();
    let [Some(refusal)] = &refusals[..] else { panic!("it was let in: {refusals:?}") };
    assert!(refusal.contains("migrate-state") && refusal.contains(&std::process::id().to_string()), "{refusal}");
    open("database", &target).await.close().await.unwrap();
}

#[tokio::test]
async fn the_place_to_come_from_can_be_named() {
    let dir = project("database").await;
    let from = Origin::parse("sqlite").unwrap();
    let error =
        relocate::execute(&settings(dir.path()), Move::new(from.clone(), Home::Database), now(), go_on).await.unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Input, "a place is not moved to itself: {error}");
    let preview = relocate::preview(&settings(dir.path()), Move::new(from.clone(), Home::File), |_, _| ()).await.unwrap();
    assert_eq!(preview.plan.unwrap().moves.runs, 4);
    let report = relocate::execute(&settings(dir.path()), Move::new(from, Home::File), now(), go_on).await.unwrap();
    assert_moved(dir.path(), "file").await;
    assert_eq!(report.rollback, ["state_backend: database", "(and no database_url)"]);

    let error = Origin::parse("s3cret@nowhere").unwrap_err();
    assert!(!error.to_string().contains("s3cret"), "{error}");
}

/// Moves a project's `state.db` to a server and from there to the file, each time seen through the settings.
#[cfg(any(feature = "postgres", feature = "libsql"))]
async fn there_and_back(url: &str, options: &str) {
    let dir = project("database").await;
    let file = dir.path().join("seeknal_project.yml");
    fs::write(&file, format!("state_backend: database\ndatabase_url: {url}\n{options}")).unwrap();
    let named = settings(dir.path());

    let from = Origin::parse("sqlite").unwrap();
    let preview = relocate::preview(&named, Move::new(from.clone(), Home::Database), |_, _| ()).await.unwrap();
    assert_eq!(preview.plan.unwrap().moves.runs, 4);
    // Cut off after the first batch, and gone on with.
    let mut batches = 0;
    let cut = relocate::execute(&named, Move::new(from.clone(), Home::Database), now(), |step| {
        batches += usize::from(step == Step::BatchCopied);
        if batches == 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .await
    .unwrap_err();
    assert_eq!(cut.kind(), ProjectErrorKind::Stopped, "{cut}");
    let report = relocate::execute(&named, Move::new(from.clone(), Home::Database), now(), go_on).await.unwrap();
    let moved = report.moved.unwrap();
    assert_eq!((moved.verified.runs, moved.verified.rows, moved.verified.partitions), (4, 303, 3));
    let again = relocate::execute(&named, Move::new(from, Home::Database), now(), go_on).await.unwrap();
    assert_eq!((again.moved.as_ref().unwrap().moved.runs, again.moved.unwrap().equal_runs), (0, 4));

    let back = relocate::execute(&named, Home::File, now(), go_on).await.unwrap();
    assert_eq!(back.moved.unwrap().verified.runs, 4);
    assert_moved(dir.path(), "file").await;
}

/// A project that has only ever lived on a server has no folder for its state.
#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_moves_between_servers_without_a_folder_of_its_own() {
    let (Some(old), Some(new)) = (crate::support::sqld::Sqld::start(), crate::support::sqld::Sqld::start()) else { return };
    let backend = create_state_backend("database", &BackendOptions::new().database_url(old.url())).unwrap();
    backend.initialize().await.unwrap();
    fill(&backend).await;
    backend.close().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("seeknal_project.yml");
    fs::write(&file, format!("state_backend: database\ndatabase_url: {}\n", new.url())).unwrap();
    let from = Origin::parse(&old.url()).unwrap();
    let report = relocate::execute(&settings(dir.path()), Move::new(from, Home::Database), now(), go_on).await.unwrap();
    assert_eq!(report.moved.unwrap().verified.runs, 4);
}

#[cfg(feature = "postgres")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_moves_to_postgresql_and_back() {
    let Some(cluster) = crate::support::postgres::cluster() else { return };
    let schema = crate::support::postgres::fresh_schema();
    let options = format!("seeknal_state:\n  options:\n    database_schema: {schema}\n");
    there_and_back(&cluster.url(""), &options).await;
}

#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_moves_to_libsql_and_back() {
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    there_and_back(&server.url(), "").await;
}

/// Runs something of the outside world inside an observer.
fn outside<T>(work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_was_not_seen_stops_the_move_before_the_switch() {
    let dir = project("database").await;
    let target = dir.path().join("target");
    let before = fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap();
    let writer = open("database", &target).await;
    // Nobody can tell any more that it is there.
    fs::remove_dir_all(target.join("state.db.owners")).unwrap();
    let error = relocate::execute(&settings(dir.path()), Home::File, now(), |step| {
        if step == Step::TargetOpen {
            outside(put(&writer, "unseen", vec![Mutation::Create { run: NewRun::pending(), at: now() }]));
        }
        ControlFlow::Continue(())
    })
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::Partial, "{error}");
    assert!(error.to_string().contains("state.db") && error.to_string().contains("in the middle"), "{error}");
    assert_eq!(fs::read_to_string(dir.path().join("seeknal_project.yml")).unwrap(), before, "the settings were not switched");
    writer.close().await.unwrap();
    let report = relocate::execute(&settings(dir.path()), Home::File, now(), go_on).await.unwrap();
    assert_eq!(report.moved.unwrap().verified.runs, 5);
}

/// Cuts a move off when everything is copied; then the original of one run is deleted, and another one is changed.
async fn cut_off_and_changed() -> tempfile::TempDir {
    let dir = project("file").await;
    let stop = |step| if step == Step::Copied { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    relocate::execute(&settings(dir.path()), Home::Database, now(), stop).await.unwrap_err();
    let file = open("file", &dir.path().join("target")).await;
    put(&file, "run_1", vec![Mutation::Delete { keep_coverage: false }]).await;
    put(&file, "run_2", vec![Mutation::AddPartition { node: "load".parse().unwrap(), partition: "dt=later".parse().unwrap() }])
        .await;
    file.close().await.unwrap();
    dir
}

#[tokio::test]
async fn copies_of_a_move_that_was_cut_off_follow_their_originals() {
    let dir = cut_off_and_changed().await;
    let preview = relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap();
    let plan = preview.plan.unwrap();
    assert_eq!((plan.differing_runs, plan.only_in_target, plan.moves.runs, plan.equal_runs), (0, 1, 1, 2));
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert_eq!(report.moved.unwrap().verified.runs, 3);
    let database = open("database", &dir.path().join("target")).await;
    assert!(
        database.run_version(&"run_1".parse().unwrap()).await.unwrap().is_some(),
        "what the source has not is left, and named"
    );
    database.close().await.unwrap();
    assert!(!tree(&dir.path().join("target")).keys().any(|name| name.contains("copied")), "the notes are gone");
}

#[tokio::test]
async fn copies_are_known_again_under_another_path_to_the_project() {
    let dir = cut_off_and_changed().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let other = elsewhere.path().join("project");
    std::os::unix::fs::symlink(dir.path(), &other).unwrap();
    let plan = relocate::preview(&settings(&other), Home::Database, |_, _| ()).await.unwrap().plan.unwrap();
    assert_eq!((plan.differing_runs, plan.only_in_target, plan.moves.runs, plan.equal_runs), (0, 1, 1, 2));
    let report = relocate::execute(&settings(&other), Home::Database, now(), go_on).await.unwrap();
    assert_eq!(report.moved.unwrap().verified.runs, 3);
}

#[tokio::test]
async fn what_cannot_be_told_from_the_runs_of_others_is_left_and_told() {
    let dir = cut_off_and_changed().await;
    let target = dir.path().join("target");
    // Somebody has worked on the copies meanwhile.
    let database = open("database", &target).await;
    for run in ["run_1", "run_2"] {
        put(
            &database,
            run,
            vec![Mutation::AddPartition { node: "load".parse().unwrap(), partition: "dt=there".parse().unwrap() }],
        )
        .await;
    }
    database.close().await.unwrap();
    let told = |notices: &[String]| notices.iter().any(|line| line.contains("\"run_1\"") && line.contains("also holds"));
    let preview = relocate::preview(&settings(dir.path()), Home::Database, |_, _| ()).await.unwrap();
    let plan = preview.plan.unwrap();
    assert_eq!((plan.differing_runs, plan.only_in_target), (1, 1));
    assert!(told(&preview.notices), "{:?}", preview.notices);
    let error = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap_err();
    assert!(error.kind() == ProjectErrorKind::Conflict && error.to_string().contains("\"run_2\""), "{error}");
    let database = open("database", &target).await;
    put(&database, "run_2", vec![Mutation::Delete { keep_coverage: false }]).await;
    database.close().await.unwrap();
    let report = relocate::execute(&settings(dir.path()), Home::Database, now(), go_on).await.unwrap();
    assert!(told(&report.notices), "{:?}", report.notices);
}

/// A writer of a server that is open already, and that the move does not see, commits nothing while it lasts, and is told who moves the state.
#[cfg(any(feature = "postgres", feature = "libsql"))]
async fn writers_are_kept_out(url: &str, options: &str, backend_options: BackendOptions, hide: impl Fn()) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("seeknal_project.yml");
    fs::write(&file, format!("state_backend: database\ndatabase_url: {url}\n{options}")).unwrap();
    let writer = seeknal_state::Coordinator::open(create_state_backend("database", &backend_options).unwrap()).await.unwrap();
    writer.create_run("r", NewRun::pending()).await.unwrap();
    // A server's opening that is not listed, as if its connection had been broken for long.
    hide();
    let mut refusals = Vec::new();
    relocate::execute(&settings(dir.path()), Home::File, now(), |step| {
        if matches!(step, Step::Locked | Step::Copied | Step::Verified) {
            let create = outside(writer.create_run(format!("{step:?}"), NewRun::pending()));
            let write = outside(writer.set_node_state("r", "n", seeknal_state::NodeUpdate::running()));
            let lock = outside(writer.acquire_lock("q", std::time::Duration::ZERO)).unwrap();
            assert!(lock.is_none());
            refusals.extend([create.err(), write.err()]);
        }
        ControlFlow::Continue(())
    })
    .await
    .unwrap();
    assert_eq!(refusals.len(), 6);
    for refusal in refusals {
        let refusal = refusal.expect("nothing is written while the state is moved");
        let told = refusal.to_string();
        assert!(refusal.is_conflict() && refusal.is_retryable() && !refusal.is_unknown_outcome(), "{told}");
        assert!(told.contains("migrate-state") && told.contains(&std::process::id().to_string()), "{told}");
    }
    writer.set_node_state("r", "n", seeknal_state::NodeUpdate::running()).await.unwrap();
    assert!(writer.acquire_lock("q", std::time::Duration::ZERO).await.unwrap().is_some());
}

#[cfg(feature = "postgres")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_postgresql_are_kept_out_by_a_move() {
    let Some(cluster) = crate::support::postgres::cluster() else { return };
    let schema = crate::support::postgres::fresh_schema();
    let options = format!("seeknal_state:\n  options:\n    database_schema: {schema}\n");
    let backend = BackendOptions::new().database_url(cluster.url("")).set("database_schema", &schema);
    writers_are_kept_out(&cluster.url(""), &options, backend, || {
        cluster.sql_in(&schema, "DELETE FROM openings");
    })
    .await;
}

#[cfg(feature = "libsql")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_libsql_are_kept_out_by_a_move() {
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    writers_are_kept_out(&server.url(), "", server.options(), || {
        server.sql("DELETE FROM openings");
    })
    .await;
}
