//! What operators do to the database with SQL.

use super::*;

#[tokio::test]
async fn stamps_of_another_form_are_named_and_can_be_mended_with_sql() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    let mutations = vec![
        create(0),
        set("n", NodeUpdate::success()),
        Mutation::AddInterval { node: node_id("n"), interval: hours(0, 1) },
        Mutation::Update { update: RunUpdate::success(), at: at(100) },
    ];
    change(&backend, "r", mutations.clone()).await;
    change(&backend, "gone", mutations).await;
    change(&backend, "gone", vec![Mutation::Delete { keep_coverage: true }]).await;
    lock(&backend, &LeaseKey::run(run_id("other")), "a", 60_000).await.unwrap();
    assert!(backend.verify().await.unwrap().is_sound());
    let sql = raw(&path);
    let columns = [
        ("runs", "finished_at"),
        ("node_states", "started_at"),
        ("completed_intervals", "end_at"),
        ("coverage", "start_at"),
        ("last_success", "finished_at"),
        ("locks", "since"),
        ("tombstones", "deleted_at"),
    ];
    for (table, column) in columns {
        for form in
            ["datetime('2023-11-15')", "strftime('%Y-%m-%dT%H:%M:%fZ', '2023-11-15')", "'2023-11-15T01:00:00.000000+01:00'"]
        {
            let before: String =
                sql.query_row(&format!("SELECT max({column}) FROM {table}"), [], |row| row.get(0)).unwrap_or_default();
            assert!(sql.execute(&format!("UPDATE {table} SET {column} = {form}"), []).unwrap() > 0, "{table}.{column}");
            let problems = backend.verify().await.unwrap().problems;
            let named =
                problems.iter().any(|problem| problem.contains(&format!("{table}.{column}")) && problem.contains("2023-11-15"));
            assert!(named, "{table}.{column} = {form}: {problems:?}");
            // As the README says.
            let mend = "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now')".replace("'now'", column);
            sql.execute(&format!("UPDATE {table} SET {column} = {mend}"), []).unwrap();
            let problems = backend.verify().await.unwrap().problems;
            assert!(!problems.iter().any(|problem| problem.contains(&format!("{table}.{column}"))), "{mend}: {problems:?}");
            sql.execute(&format!("UPDATE {table} SET {column} = ?1 WHERE ?1 <> ''"), [before]).unwrap();
        }
    }
    sql.execute("UPDATE runs SET finished_at = 'yesterday'", []).unwrap();
    let error = backend.load_run(&run_id("r")).await.unwrap_err();
    assert!(error.to_string().contains("%f000Z"), "it says the form: {error}");
}

#[tokio::test]
async fn what_a_trigger_or_an_altered_table_refuses_is_no_fault_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let write = |node: &'static str| {
        let backend = Arc::clone(&backend);
        async move {
            let tip = load(&backend, "r").await;
            let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set(node, NodeUpdate::success())]);
            backend.commit(Arc::new(Batch::new(vec![entry(part)]))).await
        }
    };
    let sql = raw(&path);
    sql.execute_batch(
        "CREATE TRIGGER mine BEFORE INSERT ON node_states WHEN NEW.node_id = 'bad' BEGIN SELECT RAISE(ABORT, 'not that one'); END",
    )
    .unwrap();
    let error = write("bad").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Input, "{error}");
    assert!(error.is_of_one_entry() && !error.is_unknown_outcome(), "the others can be written");
    assert!(error.to_string().contains("not that one") && error.to_string().contains("trigger"), "{error}");
    write("good").await.unwrap();
    // Nor does it take those along who share a transaction with it: the writer waits with the first of these while the others come.
    let tip = load(&backend, "r").await;
    sql.execute_batch("BEGIN IMMEDIATE").unwrap();
    let sent = ["first", "bad", "good"].map(|node| {
        let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set(node, NodeUpdate::failed("x"))]);
        let backend = Arc::clone(&backend);
        tokio::spawn(async move { backend.commit(Arc::new(Batch::new(vec![entry(part)]))).await.is_ok() })
    });
    // Every task is polled once before this one goes on: all of them are at the writer.
    tokio::task::yield_now().await;
    sql.execute_batch("ROLLBACK").unwrap();
    let [first, bad, good] = sent;
    assert_eq!((first.await.unwrap(), bad.await.unwrap(), good.await.unwrap()), (true, false, true));
    sql.execute_batch("DROP TRIGGER mine").unwrap();
    for (alter, back) in [
        ("node_states RENAME COLUMN error TO mistake", "node_states RENAME COLUMN mistake TO error"),
        ("partitions RENAME TO parts", "parts RENAME TO partitions"),
    ] {
        let part = part_on(None, Version::NONE, "another", vec![], vec![create(0), set("n", NodeUpdate::success())]);
        sql.execute_batch(&format!("ALTER TABLE {alter}")).unwrap();
        let reading = backend.load_run(&run_id("r")).await.unwrap_err();
        let writing = backend.commit(Arc::new(Batch::new(vec![entry(part)]))).await.unwrap_err();
        for error in [reading, writing] {
            assert_eq!(error.kind(), StoreErrorKind::Foreign, "{error}");
            assert!(error.to_string().contains("altered"), "{error}");
        }
        sql.execute_batch(&format!("ALTER TABLE {back}")).unwrap();
    }
    write("good").await.unwrap();
}

/// As the README says: what a cleanup leaves free goes with VACUUM.
#[tokio::test]
async fn a_vacuum_makes_the_file_smaller_and_leaves_it_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    for run in ["old", "kept"] {
        change(&backend, run, vec![create(0), set("n", NodeUpdate::success().error("x".repeat(100_000)))]).await;
    }
    let token = lock(&backend, &LeaseKey::run(run_id("kept")), "a", 60_000).await.unwrap();
    change(&backend, "old", vec![Mutation::Delete { keep_coverage: true }]).await;
    let kept = load(&backend, "kept").await;
    backend.close().await.unwrap();
    let before = std::fs::metadata(&path).unwrap().len();
    raw(&path).execute_batch("VACUUM").unwrap();
    let after = std::fs::metadata(&path).unwrap().len();
    assert!(after + 80_000 < before, "{before} to {after}");
    let backend = open(&path).await;
    assert!(backend.verify().await.unwrap().is_sound());
    assert_eq!(load(&backend, "kept").await, kept);
    let receipt = change(&backend, "kept", vec![set("m", NodeUpdate::running())]).await;
    assert_eq!(receipt.runs[0].after, kept.version().next());
    assert!(lock(&backend, &LeaseKey::run(run_id("x")), "a", 60_000).await.unwrap() > token);
    backend.close().await.unwrap();
}

/// Without the counters nothing opens: whoever tries is told how to bring them back.
#[tokio::test]
async fn counters_that_make_no_sense_are_told_with_their_mend_to_every_opening() {
    for harm in ["DELETE FROM meta", "UPDATE meta SET seq = -1", "UPDATE meta SET token = 'x'"] {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        let backend = open(&path).await;
        let made = change(&backend, "r", vec![create(0)]).await.runs[0].after;
        backend.close().await.unwrap();
        assert_eq!(raw(&path).execute(harm, []).unwrap(), 1);
        let reading = create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap();
        let mut mends = Vec::new();
        for opened in [reading.initialize().await, make(&path).initialize().await] {
            let told = opened.unwrap_err().to_string();
            mends.extend(told.split_once("mend it: ").map(|(_, mend)| mend.to_owned()));
        }
        assert!(mends.len() == 2 && mends[0] == mends[1], "{harm}: {mends:?}");
        assert_eq!(raw(&path).execute(&mends[0], []).unwrap(), 1);
        let backend = open(&path).await;
        assert!(change(&backend, "s", vec![create(1)]).await.runs[0].after > made, "{harm}");
        backend.close().await.unwrap();
    }
}

/// What a dump makes anew has no marks, and what it is missing is told as SQL: nothing else tells an operator.
#[tokio::test]
async fn a_database_that_a_dump_made_anew_is_told_how_to_get_its_marks_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    // What a dump leaves out, and what is found where somebody put a part of it back.
    for lost in ["PRAGMA application_id = 0; PRAGMA user_version = 0", "PRAGMA application_id = 0", "PRAGMA user_version = 0"] {
        raw(&path).execute_batch(lost).unwrap();
        let before = std::fs::read(&path).unwrap();
        let mut mend = String::new();
        for backend in
            [make(&path), create_state_backend("database", &BackendOptions::new().db_path(&path).read_only(true)).unwrap()]
        {
            let error = backend.initialize().await.unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Foreign, "{lost}: {error}");
            assert!(error.to_string().len() < 600 && !error.to_string().contains(".foreign"), "{error}");
            mend = error.to_string().split('"').find(|part| part.starts_with("PRAGMA")).unwrap().to_owned();
        }
        assert_eq!(mend, "PRAGMA application_id=1397444172; PRAGMA user_version=3", "{lost}");
        assert!(std::fs::read(&path).unwrap() == before, "{lost}");
        raw(&path).execute_batch(&mend).unwrap();
        let backend = open(&path).await;
        assert!(load(&backend, "r").await.version() > Version::NONE);
        assert!(backend.verify().await.unwrap().is_sound());
        backend.close().await.unwrap();
    }
    // Tables that are nearly ours are not: nobody is told to mark somebody else's, or a newer version's.
    for other in [
        "CREATE TABLE theirs (x); PRAGMA application_id = 0; PRAGMA user_version = 0",
        "DROP TABLE theirs; ALTER TABLE runs ADD COLUMN newer",
        "ALTER TABLE runs DROP COLUMN newer; UPDATE meta SET seq = 'x'",
        "DELETE FROM meta",
    ] {
        raw(&path).execute_batch(other).unwrap();
        let error = make(&path).initialize().await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Foreign, "{other}: {error}");
        assert!(!error.to_string().contains("PRAGMA") && error.to_string().contains(".foreign"), "{other}: {error}");
    }
    raw(&path).pragma_update(None, "application_id", 1_397_444_172).unwrap();
    let error = make(&path).initialize().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Foreign, "{error}");
    assert!(error.to_string().contains("schema version 0") && !error.to_string().contains("PRAGMA"), "{error}");
}

/// Each by the version that made it: its steps are taken then.
#[tokio::test]
async fn a_dump_of_an_older_version_gets_its_own_marks() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let fixture = include_str!("../fixtures/state_v1.sql");
    raw(&path).execute_batch(fixture).unwrap();
    raw(&path).execute_batch("PRAGMA application_id = 0; PRAGMA user_version = 0").unwrap();
    let error = make(&path).initialize().await.unwrap_err().to_string();
    assert!(error.contains("PRAGMA application_id=1397444172; PRAGMA user_version=1"), "{error}");
    raw(&path).execute_batch("PRAGMA application_id=1397444172; PRAGMA user_version=1").unwrap();
    open(&path).await.close().await.unwrap();
}
