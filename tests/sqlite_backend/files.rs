//! What lies at the path: refused untouched, told by name, closed, replaced, read-only.

use super::trace::Child;
use super::*;

/// Commits until it is killed, so that what it committed waits in the WAL.
#[tokio::test]
#[ignore = "it is run by another test, and killed"]
async fn child_that_fills_a_wal() {
    let path = db(Path::new(&std::env::var_os("STATE_FOLDER").unwrap()));
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_wal_without_its_database_is_refused_untouched() {
    let filled = tempfile::tempdir().unwrap();
    let told = Child::test("files::child_that_fills_a_wal").env("STATE_FOLDER", filled.path()).run();
    assert!(told.was_killed("after its commits"));
    let wal = bytes_of(filled.path())[&filled.path().join("state.db-wal")].clone();
    assert!(!wal.is_empty());
    for name in ["missing", "empty", "an older journal"] {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        let (waits, content) =
            if name == "an older journal" { ("state.db-journal", &wal[..512]) } else { ("state.db-wal", &wal[..]) };
        std::fs::write(dir.path().join(waits), content).unwrap();
        std::fs::copy(filled.path().join("state.db-shm"), dir.path().join("state.db-shm")).unwrap();
        if name == "empty" {
            std::fs::write(&path, "").unwrap();
        }
        let before = bytes_of(dir.path());
        for read_only in [false, true] {
            let options = BackendOptions::new().db_path(&path).read_only(read_only);
            let error = create_state_backend("database", &options).unwrap().initialize().await.unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{name}: {error}");
            let text = error.to_string();
            for file in ["state.db ", waits, "state.db-shm"] {
                assert!(text.contains(file), "{name}: {file}: {text}");
            }
            assert!(text.contains(&format!("mv {0} {0}.orphan", dir.path().join(waits).display())), "{name}: {text}");
            assert_eq!(bytes_of(dir.path()), before, "{name}");
        }
    }
    // The mend that the error names: with its own database everything is there, and away from here it is in nobody's way.
    let backend = open(&db(filled.path())).await;
    assert!(load(&backend, "r").await.node("n").is_some());
    backend.close().await.unwrap();
}

/// What README says of the tables is so: every column is there, and every query finds something.
#[tokio::test]
async fn the_tables_are_as_the_readme_tells() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success()), set("m", NodeUpdate::failed("boom"))]).await;
    backend.close().await.unwrap();
    let conn = rusqlite::Connection::open(db(dir.path())).unwrap();
    let readme = include_str!("../../README.md");
    let section = readme.split("## Reading the database with SQL").nth(1).unwrap().split("\n## ").next().unwrap();
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut columns = 0;
    for row in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').collect();
        let tables = names(cells[1]);
        let there: BTreeSet<String> = tables
            .iter()
            .flat_map(|table| {
                let statement = conn.prepare(&format!("SELECT * FROM {table}")).unwrap();
                statement.column_names().map(str::to_owned).collect::<Vec<_>>()
            })
            .collect();
        for column in names(cells[3]) {
            assert!(there.contains(&column), "{tables:?} have no column {column}");
            columns += 1;
        }
    }
    assert!(columns > 30, "{columns} columns were read from README");
    let queries = section.split("```sql").nth(1).unwrap().split("```").next().unwrap();
    for query in queries.lines().filter(|line| !line.is_empty()) {
        assert!(conn.prepare(query).unwrap().exists([]).unwrap(), "{query}");
    }
}

#[tokio::test]
async fn foreign_databases_are_refused_untouched() {
    for (name, setup) in [
        (
            "seeknal",
            "CREATE TABLE run_state (x); CREATE TABLE node_state (x); CREATE TABLE backend_locks (x); INSERT INTO run_state VALUES (1)",
        ),
        ("wal", "PRAGMA journal_mode = WAL; CREATE TABLE anything (x)"),
        ("its wal beside it", "PRAGMA journal_mode = WAL; CREATE TABLE anything (x)"),
        ("marked", "PRAGMA application_id = 4711; VACUUM"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        let theirs = raw(&path);
        theirs.execute_batch(setup).unwrap();
        if name == "its wal beside it" {
            // As their own killed program leaves it.
            let copy = tempfile::tempdir().unwrap();
            for (file, bytes) in bytes_of(dir.path()) {
                std::fs::write(copy.path().join(file.file_name().unwrap()), bytes).unwrap();
            }
            drop(theirs);
            for (file, bytes) in bytes_of(copy.path()) {
                std::fs::write(dir.path().join(file.file_name().unwrap()), bytes).unwrap();
            }
        } else {
            drop(theirs);
        }
        let before = bytes_of(dir.path());
        for backend in
            [make(&path), create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap()]
        {
            let error = backend.initialize().await.unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Foreign, "{name}: {error}");
            let text = error.to_string();
            for file in bytes_of(dir.path()).keys() {
                assert!(text.contains(&format!("mv {0} {0}.foreign", file.display())), "{name}: {text}");
            }
            assert_eq!(bytes_of(dir.path()), before, "{name}");
        }
    }
}

#[tokio::test]
async fn newer_and_damaged_databases_are_refused_untouched() {
    type Case = (&'static str, fn(&Path), StoreErrorKind);
    let make_ours = || async {
        let dir = tempfile::tempdir().unwrap();
        let backend = open(&db(dir.path())).await;
        change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
        backend.close().await.unwrap();
        dir
    };
    let cases: [Case; 4] = [
        ("newer", |path| raw(path).pragma_update(None, "user_version", 99).unwrap(), StoreErrorKind::NewerFormat),
        (
            "text",
            |path| std::fs::write(path, "this is not a database, but it is longer than a header: ".repeat(40)).unwrap(),
            StoreErrorKind::Corrupt,
        ),
        ("zeros", |path| std::fs::write(path, vec![0; 8192]).unwrap(), StoreErrorKind::Corrupt),
        (
            "cut",
            |path| {
                let bytes = std::fs::read(path).unwrap();
                std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            },
            StoreErrorKind::Corrupt,
        ),
    ];
    for (name, harm, kind) in cases {
        let dir = make_ours().await;
        harm(&db(dir.path()));
        let before = bytes_of(dir.path());
        let error = make(&db(dir.path())).initialize().await.unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains("state.db"), "{error}");
        assert_eq!(bytes_of(dir.path()), before, "{name}");
    }
}

#[tokio::test]
async fn a_schema_that_a_newer_program_raises_while_it_is_open_stops_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
    let newer = raw(&path);
    newer.execute_batch("BEGIN; ALTER TABLE runs ADD COLUMN later TEXT; PRAGMA user_version = 99; COMMIT").unwrap();
    let tip = load(&backend, "r").await;
    for _ in 0..2 {
        let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::success())]);
        let error = backend.commit(Arc::new(Batch::new(vec![entry(part)]))).await.unwrap_err();
        assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::NewerFormat, false), "{error}");
        assert!(error.to_string().contains("99") && error.to_string().contains("state.db"), "{error}");
    }
    assert_eq!(load(&backend, "r").await, tip, "nothing was written");
    newer.pragma_update(None, "user_version", 3).unwrap();
    change(&backend, "r", vec![set("n", NodeUpdate::success())]).await;
}

/// A database that the first version of the schema made: read beside its writer as it is, brought forward by the first that writes.
#[tokio::test]
async fn a_database_of_the_first_schema_is_brought_forward() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    raw(&path).execute_batch(include_str!("../fixtures/state_v1.sql")).unwrap();
    let version = || raw(&path).pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0)).unwrap();
    let reading = open_reading(&path).await;
    let before = load(&reading, "old").await;
    let done = before.node("done").unwrap();
    assert_eq!((done.row_count, done.attempt, done.attempts.len(), done.intervals.len()), (Some(u64::MAX), 2, 0, 1));
    assert_eq!(reading.verify().await.unwrap().problems, Vec::<String>::new());
    assert_eq!(version(), 1, "a reader changes nothing");

    let backend = open(&path).await;
    assert_eq!(version(), 3);
    assert_eq!(load(&backend, "old").await, before);
    let update = NodeUpdate::running().max_attempts(2);
    change(&backend, "old", vec![set("waiting", NodeUpdate::new().depends_on(["done"])), set("done", update)]).await;
    let after = load(&backend, "old").await;
    assert_eq!(after.node("waiting").unwrap().depends_on.as_slice(), [node_id("done")]);
    let done = after.node("done").unwrap();
    assert_eq!((done.attempt, done.attempts[0].number, done.attempts[0].duration_ms), (3, 2, Some(2500)));
    // Also the reader that began before it sees what the new columns say.
    assert_eq!(load(&reading, "old").await, after);
    assert!(lock(&backend, &LeaseKey::run(run_id("old")), "x", 1_000).await.unwrap() > FencingToken(41));
    backend.close().await.unwrap();
    assert_eq!(load(&open(&path).await, "old").await, after);
}

/// The same of the second one, whose table of changes is made anew: what it noted is not needed by whoever comes next.
#[tokio::test]
async fn a_database_of_the_second_schema_is_brought_forward() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running()), set("m", NodeUpdate::pending())]).await;
    backend.close().await.unwrap();
    raw(&path)
        .execute_batch(
            "BEGIN; DROP TABLE change_sets; ALTER TABLE runs DROP COLUMN change_sets_from; \
             CREATE TABLE changes (run_id TEXT NOT NULL, version INTEGER NOT NULL, node_id TEXT NOT NULL, \
             PRIMARY KEY (run_id, version, node_id)) WITHOUT ROWID; \
             ALTER TABLE runs ADD COLUMN changes_from INTEGER; \
             INSERT INTO changes SELECT run_id, version, node_id FROM node_states; UPDATE runs SET changes_from = 0; \
             PRAGMA user_version = 2; COMMIT",
        )
        .unwrap();
    let reading = open_reading(&path).await;
    let before = load(&reading, "r").await;
    let (one, two) = (open(&path).await, open(&path).await);
    assert_eq!(raw(&path).pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0)).unwrap(), 3);
    assert_eq!(load(&one, "r").await, before);
    for (backend, node) in [(&one, "n"), (&two, "m"), (&one, "m")] {
        change(backend, "r", vec![set(node, NodeUpdate::success())]).await;
        assert_eq!(reading.reload_run(&before).await.unwrap().unwrap(), load(&one, "r").await);
    }
}

#[tokio::test]
async fn an_empty_file_is_a_new_database_and_reading_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/er/state.db");
    let reading = create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap();
    assert_eq!(reading.initialize().await.unwrap_err().kind(), StoreErrorKind::NotFound);
    assert!(!dir.path().join("deep").exists());
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "").unwrap();
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let beside = open_reading(&path).await;
    assert_eq!(load(&beside, "r").await, load(&backend, "r").await);
    let error = beside.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::ReadOnly, false));
}

#[tokio::test]
async fn values_that_make_no_sense_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    let harms = [
        ("UPDATE node_states SET started_at = 'yesterday' WHERE run_id = ?1", "started_at"),
        ("UPDATE node_states SET row_count = -5 WHERE run_id = ?1", "row_count"),
        ("UPDATE node_states SET metadata = '{' WHERE run_id = ?1", "metadata"),
        ("UPDATE node_states SET depends_on = '[\"\"]' WHERE run_id = ?1", "depends_on"),
        ("UPDATE node_states SET attempts = '{}' WHERE run_id = ?1", "attempts"),
        ("UPDATE node_states SET max_attempts = 4294967296 WHERE run_id = ?1", "max_attempts"),
        ("UPDATE runs SET created_at = x'00' WHERE run_id = ?1", "created_at"),
        ("UPDATE completed_intervals SET end_at = start_at WHERE run_id = ?1", "start_at"),
        ("DELETE FROM node_states WHERE run_id = ?1", "node"),
    ];
    for (index, (harm, column)) in harms.iter().enumerate() {
        let run = format!("harmed {index}");
        let mutations =
            vec![create(0), set("n", NodeUpdate::success()), Mutation::AddInterval { node: node_id("n"), interval: hours(0, 1) }];
        change(&backend, &run, mutations).await;
        raw(&path).execute(harm, [&run]).unwrap();
        let error = backend.load_run(&run_id(&run)).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt);
        let text = error.to_string();
        assert!(text.contains(column) && text.contains(&run) && text.contains("table "), "{text}");
    }
    let report = backend.verify().await.unwrap();
    for index in 0..harms.len() {
        let run = format!("harmed {index}");
        assert!(report.problems.iter().any(|problem| problem.contains(&run)), "{run}: {:?}", report.problems);
    }
}

#[tokio::test]
async fn closing_answers_and_then_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    backend.checkpoint().await.unwrap();
    backend.close().await.unwrap();
    backend.close().await.unwrap();
    let error = backend.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Closed, false));
    assert_eq!(backend.load_run(&run_id("r")).await.unwrap_err().kind(), StoreErrorKind::Closed);
    assert!(!path.with_file_name("state.db-wal").exists());
}

/// What a writer is told of that has lost its file, as soon as it looks: it looks now and then.
async fn noticed(backend: &Backend) -> StoreError {
    let noticed = async {
        loop {
            if let Err(error) = backend.commit(Arc::new(Batch::new(vec![]))).await {
                return error;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), noticed).await.unwrap()
}

#[tokio::test]
async fn a_replaced_database_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    std::fs::rename(&path, dir.path().join("away.db")).unwrap();
    let error = noticed(&backend).await;
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Poisoned, false));
    // Readers look each time.
    assert_eq!(backend.load_run(&run_id("r")).await.unwrap_err().kind(), StoreErrorKind::Poisoned);
    std::fs::rename(dir.path().join("away.db"), &path).unwrap();
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
}

/// SQLite goes on in files that no path names any more: what is written there is gone with the process.
#[tokio::test]
async fn a_wal_or_its_index_that_is_taken_away_is_noticed() {
    for suffix in ["-wal", "-shm"] {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        let beside = dir.path().join(format!("state.db{suffix}"));
        let backend = open(&path).await;
        change(&backend, "r", vec![create(0)]).await;
        let away = dir.path().join("away");
        std::fs::rename(&beside, &away).unwrap();
        let error = noticed(&backend).await;
        assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Poisoned, false), "{suffix}");
        assert!(error.to_string().contains(beside.to_str().unwrap()), "{error}");
        assert_eq!(backend.load_run(&run_id("r")).await.unwrap_err().kind(), StoreErrorKind::Poisoned, "{suffix}");
        // Another one in its place is none.
        std::fs::write(&beside, "").unwrap();
        assert_eq!(noticed(&backend).await.kind(), StoreErrorKind::Poisoned, "{suffix}");
        std::fs::rename(&away, &beside).unwrap();
        change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
        backend.close().await.unwrap();
    }
}

/// What was acknowledged before it was noticed is brought into the database by an orderly end.
#[tokio::test]
async fn what_was_acknowledged_into_a_wal_that_is_gone_is_there_after_closing() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
    let state = load(&backend, "r").await;
    for suffix in ["-wal", "-shm"] {
        std::fs::remove_file(dir.path().join(format!("state.db{suffix}"))).unwrap();
    }
    noticed(&backend).await;
    backend.close().await.unwrap();
    let error = backend.load_run(&run_id("r")).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Closed, "{error}");
    assert_eq!(load(&open(&path).await, "r").await, state);
}

/// The files beside the database go when the last opening ends, and only then: whoever is left is not told that something was taken away.
#[tokio::test]
async fn the_files_beside_the_database_stay_while_anybody_has_it_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    for round in 0..3 {
        let other = open(&path).await;
        change(&other, &format!("r{round}"), vec![create(0)]).await;
        change(&backend, &format!("s{round}"), vec![create(0)]).await;
        other.close().await.unwrap();
        raw(&path).execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        let mode: Result<String, _> = raw(&path).query_row("PRAGMA journal_mode = DELETE", [], |row| row.get(0));
        assert!(mode.is_err(), "{mode:?}");
        load(&backend, &format!("r{round}")).await;
        change(&backend, &format!("t{round}"), vec![create(0)]).await;
    }
    backend.close().await.unwrap();
    assert!(!dir.path().join("state.db-wal").exists());
    // A backend whose opening is repeated looks at the files of its own.
    change(&open(&path).await, "u", vec![create(0)]).await;
}

#[tokio::test]
async fn what_may_only_be_read_is_read_and_says_so() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let state = load(&backend, "r").await;
    backend.close().await.unwrap();
    let allow = |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    allow(0o555);
    // Who may write everywhere (root) cannot be shown a folder that may not be written.
    if std::fs::write(dir.path().join("probe"), "").is_err() {
        let before = bytes_of(dir.path());
        let reading = open_reading(&path).await;
        assert_eq!(load(&reading, "r").await, state);
        reading.close().await.unwrap();
        let error = make(&dir.path().join("new.db")).initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");
        assert_eq!(bytes_of(dir.path()), before);
    }
    allow(0o755);
}

#[tokio::test]
async fn what_many_short_openings_left_behind_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    raw(&path)
        .execute_batch(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) \
             INSERT INTO batches (id, at, answers) SELECT unhex(printf('%032x', i)), '2020-01-01T00:00:00.000000Z', x'00' FROM n; \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) \
             INSERT INTO tombstones (run_id, version, deleted_at) SELECT 'gone' || i, i, '2020-01-01T00:00:00.000000Z' FROM n",
        )
        .unwrap();
    let backend = open(&path).await;
    for row in 0..6 {
        change(&backend, "r", vec![set("n", NodeUpdate::success().row_count(row))]).await;
    }
    backend.close().await.unwrap();
    let count = |sql: &str| raw(&path).query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(count("SELECT count(*) FROM batches WHERE at < '2021'"), 0);
    assert_eq!(count("SELECT count(*) FROM tombstones"), 0);
}

#[tokio::test]
async fn unfinished_files_of_openings_are_swept_when_they_are_old() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    open(&path).await.close().await.unwrap();
    let owners = folder.path().join("state.db.owners");
    let (old, fresh) = (owners.join("1-old.new"), owners.join("2-fresh.new"));
    for file in [&old, &fresh] {
        std::fs::write(file, "").unwrap();
    }
    let long_ago = std::time::UNIX_EPOCH;
    std::fs::File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
    open(&path).await.close().await.unwrap();
    assert!(!old.exists(), "a crash left it behind");
    assert!(fresh.exists(), "somebody may be making it");
}

/// SQLite keeps everything where the link leads.
#[tokio::test]
async fn a_link_stays_and_the_database_lies_where_it_leads() {
    let dir = tempfile::tempdir().unwrap();
    let (here, elsewhere) = (dir.path().join("here"), dir.path().join("elsewhere"));
    std::fs::create_dir(&here).unwrap();
    std::fs::create_dir(&elsewhere).unwrap();
    let path = db(&here);
    std::os::unix::fs::symlink("../elsewhere/state.db", &path).unwrap();
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
    assert!(path.symlink_metadata().unwrap().is_symlink(), "the link is as it was");
    assert_eq!(bytes_of(&here).len(), 1, "nothing lies beside it");
    assert!(elsewhere.join("state.db").is_file() && elsewhere.join("state.db-wal").is_file());
    let direct = open(&elsewhere.join("state.db")).await;
    assert_eq!(direct.location(), elsewhere.join("state.db").display().to_string());
    assert!(direct.load_run(&"r".parse().unwrap()).await.unwrap().is_some());
    direct.close().await.unwrap();
    backend.close().await.unwrap();
    // A WAL that waits there is seen.
    std::fs::remove_file(elsewhere.join("state.db")).unwrap();
    std::fs::write(elsewhere.join("state.db-wal"), "what was committed").unwrap();
    let error = make(&path).initialize().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
}

/// Sweeping is tidying up: what hinders it hinders nothing else.
#[tokio::test]
async fn a_sweep_that_fails_half_way_hinders_no_opening() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let (backend, other) = (open(&path).await, open(&path).await);
    change(&backend, "r", vec![create(0)]).await;
    change(&other, "r", vec![set("n", NodeUpdate::running())]).await;
    change(&backend, "r", vec![set("n", NodeUpdate::success())]).await;
    backend.close().await.unwrap();
    other.close().await.unwrap();
    let conn = raw(&path);
    let noted: i64 = conn.query_row("SELECT count(*) FROM change_sets", [], |row| row.get(0)).unwrap();
    assert!(noted > 0, "there is something to sweep");
    conn.execute_batch("CREATE TRIGGER kept BEFORE DELETE ON change_sets BEGIN SELECT RAISE(ABORT, 'kept'); END").unwrap();
    drop(conn);
    let backend = open(&path).await;
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
    backend.close().await.unwrap();
}

/// The WAL is grown once, for a writer that commits: not again at each commit that fails, on a disk that may be full.
#[tokio::test]
async fn the_wal_is_not_grown_again_by_commits_that_fail() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let length = || std::fs::metadata(dir.path().join("state.db-wal")).unwrap().len();
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    for row in 0..63 {
        assert!(length() < 1 << 20);
        change(&backend, "r", vec![set("n", NodeUpdate::success().row_count(row))]).await;
    }
    // The writer does it when it has answered, and before anything else.
    backend.checkpoint().await.unwrap();
    assert!(length() > 8 << 20, "it has its full length after 64 commits");
    let conn = raw(&path);
    conn.execute_batch(
        "CREATE TRIGGER full BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'no'); END; PRAGMA wal_checkpoint(TRUNCATE)",
    )
    .unwrap();
    let state = load(&backend, "r").await;
    let part = part_on(Some(&state), state.version(), "r", vec![], vec![set("n", NodeUpdate::running())]);
    backend.commit(Arc::new(Batch::new(vec![entry(part)]))).await.unwrap_err();
    backend.checkpoint().await.unwrap();
    assert!(length() < 1 << 20, "{}", length());
    conn.execute_batch("DROP TRIGGER full").unwrap();
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
    backend.close().await.unwrap();
}

/// Makes a database and stays open until it has looked at what is beside it.
#[tokio::test]
#[ignore = "it is run by another test, under a umask of its own"]
async fn child_that_makes_a_database() {
    use std::os::unix::fs::PermissionsExt;
    let dir = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o002));
    let backend = open(&db(&dir)).await;
    change(&backend, "r", vec![create(0)]).await;
    let owner = std::fs::read_dir(dir.join("state.db.owners")).unwrap().next().unwrap().unwrap().path();
    for (name, mode) in [("state.db", 0o664), ("state.db-wal", 0o664), ("state.db-shm", 0o664), ("state.db.lock", 0o664)] {
        let found = std::fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{name}: {found:o}");
    }
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&owner), mode(owner.parent().unwrap())), (0o664, 0o2775));
    backend.close().await.unwrap();
}

/// Who shares a folder with his group, and has the umask for it, shares the database.
#[test]
fn a_database_is_made_for_whom_the_umask_lets() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o2775)).unwrap();
    let told = Child::test("files::child_that_makes_a_database").env("STATE_FOLDER", dir.path()).run();
    told.passed("child");
}

/// What a link leads to may lie on a disk that is not mounted: a folder made in its place would be the beginning of another state.
#[tokio::test]
async fn nothing_is_made_where_a_link_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (away, path, folder) = (dir.path().join("not-mounted"), db(dir.path()), dir.path().join("target"));
    std::os::unix::fs::symlink(away.join("state.db"), &path).unwrap();
    std::os::unix::fs::symlink(&away, &folder).unwrap();
    let before = bytes_of(dir.path());
    for (path, link) in [(&path, &path), (&db(&folder), &folder), (&db(&folder.join("deeper")), &folder)] {
        let reader = create_state_backend("database", &BackendOptions::new().db_path(path).read_only(true)).unwrap();
        for backend in [make(path), reader] {
            let error = backend.initialize().await.unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: it is a symbolic link that leads nowhere", link.display())), "{error}");
        }
        assert!(!away.exists() && bytes_of(dir.path()) == before, "{}", path.display());
    }
    std::fs::create_dir(&away).unwrap();
    open(&path).await.close().await.unwrap();
}

/// A view of somebody else's over our tables is none of them; one beside them is for him to read.
#[tokio::test]
async fn a_view_in_the_place_of_a_table_is_refused_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
    backend.close().await.unwrap();
    raw(&path).execute_batch("CREATE VIEW my_runs AS SELECT run_id FROM runs").unwrap();
    let backend = open(&path).await;
    change(&backend, "r", vec![set("m", NodeUpdate::success())]).await;
    backend.close().await.unwrap();
    raw(&path)
        .execute_batch("DROP VIEW my_runs; ALTER TABLE runs RENAME TO theirs; CREATE VIEW Runs AS SELECT * FROM theirs")
        .unwrap();
    let before = bytes_of(dir.path());
    let reader = create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap();
    for backend in [make(&path), reader] {
        let error = backend.initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Foreign, "{error}");
        assert!(error.to_string().contains("\"Runs\" is a view"), "{error}");
    }
    assert!(bytes_of(dir.path()) == before, "nothing was changed");
}

/// SQLite would write to wherever they lead.
#[tokio::test]
async fn links_in_the_place_of_what_lies_beside_the_database_are_refused() {
    let elsewhere = tempfile::tempdir().unwrap();
    let victim = elsewhere.path().join("victim");
    for suffix in ["-wal", "-shm", "-journal"] {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        open(&path).await.close().await.unwrap();
        std::os::unix::fs::symlink(&victim, format!("{}{suffix}", path.display())).unwrap();
        let error = make(&path).initialize().await.unwrap_err();
        assert!(error.to_string().contains("symbolic link") && !victim.exists(), "{suffix}: {error}");
    }
}
