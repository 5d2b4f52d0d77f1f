//! Databases of which single values are wrong, and ones that are older than they should be.

use std::fs;
use std::path::Path;

use crate::projects::{open, project, put};
use crate::{json, run};
use seeknal_state::model::{Mutation, NewRun, time};

fn sql(dir: &Path, statement: &str) -> usize {
    rusqlite::Connection::open(dir.join("target/state.db")).unwrap().execute(statement, []).unwrap()
}

fn copies(dir: &Path) -> usize {
    let entries = fs::read_dir(dir.join("target")).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().contains(".damaged-")).count()
}

/// The row is named with the statement that mends it; nothing is copied for it, and nothing else is advised.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_stamp_is_named_with_the_statement_that_mends_it() {
    let dir = project("database").await;
    for (table, column, keys) in [
        ("runs", "created_at", "run_id = 'run_1'"),
        ("node_states", "finished_at", "run_id = 'run_1' AND node_id = 'a/b'"),
        ("completed_intervals", "end_at", "run_id = 'run_1'"),
    ] {
        let harm = format!("UPDATE {table} SET {column} = '2024-02-01 12:00:00' WHERE {keys}");
        assert_eq!(sql(dir.path(), &harm), 1, "{harm}");
        for arguments in ["state verify", "state verify --repair"] {
            let (code, out, err) = run(dir.path(), arguments);
            assert_eq!(code, 5, "{arguments}: {out}{err}");
            assert!(err.contains("said above") && !format!("{out}{err}").contains(".bak"), "{arguments}: {out}{err}");
            assert_eq!(copies(dir.path()), 0, "{arguments}: {out}");
        }
        let problems = json_of(dir.path());
        let told: Vec<&str> = problems.iter().filter_map(|problem| problem.split("mend it: ").nth(1)).collect();
        assert!(told.len() == 1 && told[0].starts_with(&format!("UPDATE {table} SET {column} = strftime(")), "{problems:?}");
        assert_eq!(sql(dir.path(), told[0]), 1, "{}", told[0]);
        if table == "runs" {
            // The nodes of a run name its creation.
            assert_eq!(
                sql(dir.path(), "UPDATE node_states SET run_created_at = '2024-02-01T12:00:00.000000Z' WHERE run_id = 'run_1'"),
                2
            );
        }
        assert_eq!(json(dir.path(), "state verify")["sound"], true, "{}", told[0]);
    }
    // One that is no stamp at all.
    assert_eq!(
        sql(dir.path(), "UPDATE node_states SET started_at = 'it''s late' WHERE run_id = 'run_1' AND node_id = 'load'"),
        1
    );
    let problems = json_of(dir.path());
    assert!(
        problems.iter().any(|problem| problem.contains("it is no stamp") && problem.contains("AND started_at = 'it''s late'")),
        "{problems:?}"
    );
    assert!(
        !problems.iter().any(|problem| problem.contains("seeknal state verify")),
        "whoever reads this has asked it: {problems:?}"
    );
}

/// One fault is told once, with what mends it: the nodes of a run know when it was created.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_is_no_stamp_is_mended_by_what_the_nodes_say() {
    let dir = project("database").await;
    assert_eq!(sql(dir.path(), "UPDATE runs SET created_at = 'x' WHERE run_id = 'run_1'"), 1);
    let problems = json_of(dir.path());
    assert!(problems.len() <= 3, "{problems:#?}");
    let told: Vec<&str> = problems.iter().filter_map(|problem| problem.split("mend it: ").nth(1)).collect();
    assert!(told.len() == 1 && told[0].contains("2024-01-11T12:00:00"), "{problems:#?}");
    assert_eq!(sql(dir.path(), told[0]), 1);
    assert_eq!(json(dir.path(), "state verify")["sound"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_that_make_no_sense_are_told_with_the_statement_that_mends_them() {
    for (harm, beside) in [("DELETE FROM meta", true), ("UPDATE meta SET seq = -1", true), ("UPDATE meta SET token = 'x'", false)]
    {
        let dir = project("database").await;
        if !beside {
            fs::remove_file(dir.path().join("target/state.db.lock")).unwrap();
        }
        let versions = |dir: &Path| -> (i64, i64) {
            let database = rusqlite::Connection::open(dir.join("target/state.db")).unwrap();
            let highest = "SELECT (SELECT max(version) FROM runs), (SELECT seq FROM meta)";
            database.query_row(highest, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
        };
        assert_eq!(sql(dir.path(), harm), 1, "{harm}");
        assert_eq!(run(dir.path(), "state cleanup --days 30").0, 5, "{harm}");
        let problems = json_of(dir.path());
        let told: Vec<&str> = problems.iter().filter_map(|problem| problem.split("mend it: ").nth(1)).collect();
        assert!(told.len() == 1 && told[0].starts_with("INSERT OR REPLACE INTO meta"), "{harm}: {problems:#?}");
        assert_eq!(sql(dir.path(), told[0]), 1, "{}", told[0]);
        let (version, seq) = versions(dir.path());
        assert!(version > 0 && seq >= version, "{harm}: {}", told[0]);
        assert_eq!(json(dir.path(), "state verify")["sound"], true, "{harm}");
        assert_eq!(json(dir.path(), "state cleanup --days 30")["deleted"], 3, "{harm}");
    }
}

fn json_of(dir: &Path) -> Vec<String> {
    let (_, out, _) = run(dir, "state verify -o json");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    report["problems"].as_array().unwrap().iter().map(|problem| problem.as_str().unwrap().to_owned()).collect()
}

/// What SQLite itself finds is copied; the file from before a move is named where there is one.
#[tokio::test(flavor = "multi_thread")]
async fn the_way_back_to_the_file_is_named_where_there_is_one() {
    for backup in [false, true] {
        let dir = project("database").await;
        let path = dir.path().join("target/state.db");
        let mut bytes = fs::read(&path).unwrap();
        bytes[8192..12_288].fill(0x5a);
        fs::write(&path, &bytes).unwrap();
        if backup {
            fs::write(dir.path().join("target/run_state.json.bak"), crate::projects::GUIDE).unwrap();
        }
        let (code, out, err) = run(dir.path(), "state verify --repair");
        assert!(code == 5 && copies(dir.path()) == 1, "{out}{err}");
        assert_eq!(out.contains("run_state.json.bak"), backup, "{out}");
        assert!(!format!("{out}{err}").contains("`seeknal state verify` says more"), "{out}{err}");
    }
}

/// What the next writer is told, who looks is told too.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_that_was_put_back_is_told_by_verify() {
    let dir = project("database").await;
    let path = dir.path().join("target/state.db");
    let older = fs::read(&path).unwrap();
    assert!(!json(dir.path(), "state verify")["checked"].to_string().contains("older"));
    let backend = open("database", &dir.path().join("target")).await;
    let at = time::parse("2024-03-01").unwrap();
    put(&backend, "new", vec![Mutation::Create { run: NewRun::running(), at }]).await;
    assert!(!json(dir.path(), "state verify")["checked"].to_string().contains("older"), "beside a writer");
    backend.close().await.unwrap();
    assert!(!json(dir.path(), "state verify")["checked"].to_string().contains("older"));
    for suffix in ["-wal", "-shm"] {
        let _there_or_not = fs::remove_file(dir.path().join(format!("target/state.db{suffix}")));
    }
    fs::write(&path, older).unwrap();
    let (code, out, err) = run(dir.path(), "state verify");
    assert!(code == 0 && out.contains("is older than what was committed to it") && out.contains("sound"), "{out}{err}");
    // The next writer raises the numbers, and it is older no more.
    open("database", &dir.path().join("target")).await.close().await.unwrap();
    assert!(!json(dir.path(), "state verify")["checked"].to_string().contains("older"));
}

/// Runs of which single values make no sense, with what is shown as their names.
const HARMED: [(&str, &str); 5] = [
    ("UPDATE runs SET created_at = 'x' WHERE run_id = 'run_1'", "run_1"),
    ("UPDATE runs SET created_at = '2024-02-30T00:00:00.000000Z' WHERE run_id = 'run_1'", "run_1"),
    ("UPDATE runs SET metadata = '{' WHERE run_id = 'run_1'", "run_1"),
    ("UPDATE runs SET status = x'00' WHERE run_id = 'run_1'", "run_1"),
    ("UPDATE runs SET run_id = 'run' || char(10) || '1' WHERE run_id = 'run_1'", "run\n1"),
];

/// The others are listed and deleted as if it were not there, and it is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_row_cannot_be_read_is_named_and_the_others_are_there() {
    for (harm, name) in HARMED {
        let dir = project("database").await;
        assert_eq!(sql(dir.path(), harm), 1, "{harm}");
        for arguments in ["state runs -o json", "state runs -o json --all", "state runs -o json --limit 3"] {
            let (code, out, err) = run(dir.path(), arguments);
            let runs: serde_json::Value =
                serde_json::from_str(&out).unwrap_or_else(|error| panic!("{harm}: {error}: {out}{err}"));
            let ids: Vec<&str> = runs.as_array().unwrap().iter().map(|run| run["run_id"].as_str().unwrap()).collect();
            assert_eq!((code, &*ids), (5, &["run_2", "run_0", "still"][..]), "{harm}: {err}");
            assert_eq!(err.matches(&format!("run {name:?} cannot be read")).count(), 1, "{harm}: {err}");
        }
        let (code, out, err) = run(dir.path(), "state runs");
        assert!(
            code == 5 && out.contains("run_2") && out.contains("still") && err.contains("error: 1 run cannot be read"),
            "{out}{err}"
        );

        let before = crate::projects::tree(dir.path());
        for arguments in ["migrate-state --backend file", "migrate-state --backend file --no-dry-run"] {
            let (code, _, err) = run(dir.path(), arguments);
            assert!(code == 5 && err.contains(&format!("cannot be read: {name:?}")), "{harm}: {arguments}: {code} {err}");
            let mut after = crate::projects::tree(dir.path());
            after.retain(|name, _| before.contains_key(name) || !name.starts_with("target/state.db-"));
            assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{harm}: {arguments}");
        }

        let (code, out, err) = run(dir.path(), "state cleanup --days 30 --dry-run -o json");
        let plan: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert!(code == 5 && plan["failed"][0]["run_id"] == name, "{harm}: {out}{err}");
        assert_eq!(plan["delete"].as_array().unwrap().len(), 2, "{harm}: {out}");
        let (code, out, err) = run(dir.path(), "state cleanup --days 30");
        assert!(code == 6 && out.contains("Deleted 2 runs") && out.contains("kept run"), "{harm}: {code} {out}{err}");
        let left = rusqlite::Connection::open(dir.path().join("target/state.db")).unwrap();
        let left: i64 = left.query_row("SELECT count(*) FROM runs", [], |row| row.get(0)).unwrap();
        assert_eq!(left, 2, "{harm}");
    }
}

/// So it is on servers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_a_server_whose_row_cannot_be_read_is_named_and_the_others_are_there() {
    let Some(cluster) = crate::support::postgres::cluster() else { return };
    let Some(server) = crate::support::sqld::Sqld::start() else { return };
    let (postgres, libsql) = (crate::support::Place::of_schema(cluster), crate::support::Place::of_server(&server));
    let harm = "UPDATE runs SET metadata = '{' WHERE run_id = 'run_1'";
    for place in [&postgres, &libsql] {
        let dir = tempfile::tempdir().unwrap();
        crate::moves::on_server(dir.path(), place);
        let backend = seeknal_state::create_state_backend("database", &place.options()).unwrap();
        backend.initialize().await.unwrap();
        crate::projects::fill(&backend).await;
        backend.close().await.unwrap();
        match &place.schema {
            Some(schema) => cluster.sql_in(schema, harm),
            None => server.sql(harm),
        };
        let (code, out, err) = run(dir.path(), "state runs -o json");
        let runs: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        let ids: Vec<&str> = runs.as_array().unwrap().iter().map(|run| run["run_id"].as_str().unwrap()).collect();
        assert_eq!((code, &*ids), (5, &["run_2", "run_0", "still"][..]), "{err}");
        assert_eq!(err.matches("run \"run_1\" cannot be read").count(), 1, "{err}");
        assert!(json_of(dir.path()).iter().any(|problem| problem.contains("run_1")), "verify names it");

        for arguments in ["migrate-state --backend file", "migrate-state --backend file --no-dry-run"] {
            let (code, _, err) = run(dir.path(), arguments);
            assert!(code == 5 && err.contains("cannot be read: \"run_1\""), "{arguments}: {code} {err}");
            assert!(!dir.path().join("target/run_state.json").exists(), "{arguments}");
        }

        let (code, out, err) = run(dir.path(), "state cleanup --days 30 --dry-run -o json");
        let plan: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert!(code == 5 && plan["failed"][0]["run_id"] == "run_1", "{out}{err}");
        assert_eq!(plan["delete"].as_array().unwrap().len(), 2, "{out}");
        let (code, out, err) = run(dir.path(), "state cleanup --days 30");
        assert!(code == 6 && out.contains("Deleted 2 runs") && out.contains("kept run_1"), "{code} {out}{err}");
    }
}

/// More runs than a page holds, newest first `many_0`.
async fn many(runs: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    open("database", &dir.path().join("target")).await.close().await.unwrap();
    let made = sql(
        dir.path(),
        &format!(
            "INSERT INTO runs (run_id, status, created_at, version, created_version, header_version) \
             WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {}) \
             SELECT 'many_' || i, 'success', strftime('%Y-%m-%dT%H:%M:%f000Z', '2024-01-31', '-' || i || ' seconds'), 1, 1, 1 FROM n",
            runs - 1
        ),
    );
    assert_eq!(made, runs);
    dir
}

/// Each is told once, on whichever page it is; also where there are more of them in a row than a page holds.
#[tokio::test(flavor = "multi_thread")]
async fn runs_that_cannot_be_read_are_told_once_on_every_page() {
    let dir = many(1_600).await;
    let harm = |which: &str| {
        sql(dir.path(), &format!("UPDATE runs SET metadata = '{{' WHERE CAST(substr(run_id, 6) AS INTEGER) {which}"))
    };
    let harmed = harm("IN (0, 1, 498, 499, 500, 501, 1599)") + harm("BETWEEN 700 AND 1399");
    let (code, out, err) = run(dir.path(), "state runs --all -o json");
    let runs: serde_json::Value = serde_json::from_str(&out).unwrap();
    let told: Vec<&str> = err.lines().filter(|line| line.starts_with("note: run ")).collect();
    let once: std::collections::BTreeSet<&&str> = told.iter().collect();
    assert_eq!((code, harmed, told.len(), once.len()), (5, 707, 707, 707));
    assert_eq!(runs.as_array().unwrap().len(), 1_600 - harmed);
    // Only those among what is asked for.
    let (code, out, err) = run(dir.path(), "state runs --limit 2 -o json");
    let runs: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, runs.as_array().unwrap().len(), err.matches("note: run ").count()), (5, 2, 2), "{err}");
}

/// Whatever ends a listing that was begun: what was printed is a value.
#[tokio::test(flavor = "multi_thread")]
async fn a_listing_that_is_cut_off_leaves_no_half_value() {
    let dir = many(1_200).await;
    let long = format!("{{\"a\": \"{}MARK{}\"}}", "x".repeat(3_000), "y".repeat(3_000));
    // Behind all others, so that nobody comes by on his way to another one of the first page.
    assert_eq!(sql(dir.path(), &format!("UPDATE runs SET run_id = 'z', metadata = '{long}' WHERE run_id = 'many_1199'")), 1);
    let path = dir.path().join("target/state.db");
    let mut bytes = fs::read(&path).unwrap();
    let page = bytes.windows(4).position(|some| some == b"MARK").unwrap() / 1_024;
    bytes[page * 1_024..(page + 1) * 1_024].fill(0x5a);
    fs::write(&path, &bytes).unwrap();
    let (code, out, err) = run(dir.path(), "state runs --all -o json");
    let runs: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {err}"));
    let listed = runs.as_array().unwrap().len();
    assert!(code == 5 && [500, 1_000].contains(&listed), "{code} {listed} {err}");
}
