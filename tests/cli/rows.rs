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
