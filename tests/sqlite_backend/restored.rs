//! An older copy of the database that is put back: no number is given out twice.

use super::*;

/// Every file of the database, as a copy of its folder would have it, but what remembers numbers.
fn put_back(copy: &Path, dir: &Path) {
    for beside in ["state.db-wal", "state.db-shm"] {
        let _none_there = std::fs::remove_file(dir.join(beside)).is_err();
    }
    std::fs::copy(copy, db(dir)).unwrap();
}

async fn notices(path: &Path) -> (Backend, Vec<String>) {
    let backend = make(path);
    let report = backend.initialize().await.unwrap();
    (backend, report.notices)
}

#[tokio::test]
async fn versions_of_runs_go_on_behind_all_that_were_given_out() {
    // A copy that was made between two openings, and one that was made beside an opening which ended as it should.
    for beside in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (db(dir.path()), dir.path().join("copy"));
        let backend = open(&path).await;
        change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
        let old = load(&backend, "r").await;
        let backend = if beside {
            raw(&path).execute("VACUUM INTO ?1", [copy.to_str().unwrap()]).unwrap();
            backend
        } else {
            backend.close().await.unwrap();
            std::fs::copy(&path, &copy).unwrap();
            let (backend, notices) = notices(&path).await;
            assert!(notices.is_empty(), "nothing is older: {notices:?}");
            backend
        };
        let mut given = old.version();
        for _ in 0..3 {
            let receipt = change(&backend, "r", vec![set("n", NodeUpdate::success())]).await;
            assert_eq!((receipt.runs[0].before, receipt.runs[0].after), (given, given.next()), "one after another");
            given = given.next();
        }
        backend.close().await.unwrap();

        put_back(&copy, dir.path());
        let (backend, told) = notices(&path).await;
        assert!(told.len() == 1 && told[0].contains("a backup was put back") && told[0].contains("1 run(s)"), "{told:?}");
        let back = load(&backend, "r").await;
        assert_eq!(back.node("n").unwrap().status, NodeStatus::Running);
        assert!(back.version() > given, "{} was given out", back.version());
        assert_eq!(backend.reload_run(&old).await.unwrap().unwrap(), back, "for who knew it at that time, too");
        let receipt = change(&backend, "r", vec![set("n", NodeUpdate::failed("x"))]).await;
        assert_eq!(receipt.runs[0].after, back.version().next());
        assert!(backend.verify().await.unwrap().is_sound());
        backend.close().await.unwrap();
        let (backend, told) = notices(&path).await;
        assert!(told.is_empty(), "it is told once: {told:?}");
        assert_eq!(load(&backend, "r").await.version(), receipt.runs[0].after);
        backend.close().await.unwrap();
    }
}

/// Who is killed in the very transaction that reserves numbers leaves no older copy.
#[tokio::test]
async fn numbers_that_were_only_reserved_are_no_sign_of_a_backup() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    let made = change(&backend, "r", vec![create(0)]).await.runs[0].after;
    backend.close().await.unwrap();
    let sidecar = dir.path().join("state.db.lock");
    let seq: u64 = raw(&path).query_row("SELECT seq FROM meta", [], |row| row.get::<_, i64>(0)).unwrap().cast_unsigned();
    std::fs::write(&sidecar, format!("{{\"token\":1,\"seq\":{}}}", seq + 10_000_003)).unwrap();
    let (backend, told) = notices(&path).await;
    assert!(told.is_empty(), "{told:?}");
    assert_eq!(load(&backend, "r").await.version(), made);
    backend.close().await.unwrap();
}
