//! Whose the files are that the command makes: root at work in somebody else's project locks nobody out.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::projects::{project, put};
use crate::run;
use seeknal_state::model::{Mutation, NewRun, time};
use seeknal_state::{BackendOptions, create_state_backend};

const SOMEBODY: (u32, u32) = (12_345, 12_346);

fn give(folder: &Path) {
    chown(folder, Some(SOMEBODY.0), Some(SOMEBODY.1)).unwrap();
    for path in files(folder) {
        chown(&path, Some(SOMEBODY.0), Some(SOMEBODY.1)).unwrap();
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found
}

/// Only root gives files away; whoever else runs the tests has nothing to look at here.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn assert_theirs(folder: &Path, mode: u32) {
    for path in files(folder) {
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid()), SOMEBODY, "{}", path.display());
        let name = path.file_name().unwrap().to_str().unwrap();
        if found.is_file() && name.starts_with("run_state.json") {
            assert_eq!(found.mode() & 0o777, mode, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_by_root_into_the_file_leaves_it_to_those_who_have_the_database() {
    if !is_root() {
        return;
    }
    let dir = project("database").await;
    fs::set_permissions(dir.path().join("target/state.db"), fs::Permissions::from_mode(0o640)).unwrap();
    give(dir.path());
    let (code, _, err) = run(dir.path(), "migrate-state --backend file --no-dry-run");
    assert_eq!(code, 0, "{err}");
    assert!(dir.path().join("target/run_state.json.prev").exists());
    assert_theirs(dir.path(), 0o640);
}

/// What root makes where nothing was before goes to the owner of the folder.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_root_begins_in_a_folder_of_somebody_else_is_his() {
    if !is_root() {
        return;
    }
    for name in ["file", "database"] {
        for there in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("target");
            if there {
                fs::create_dir(&target).unwrap();
            }
            give(dir.path());
            let backend = create_state_backend(name, &BackendOptions::new().base_path(&target)).unwrap();
            backend.initialize().await.unwrap();
            let at = time::parse("2024-01-10T12:00:00Z").unwrap();
            put(&backend, "r", vec![Mutation::Create { run: NewRun::running(), at }]).await;
            let opened = files(dir.path());
            assert!(opened.len() > 2, "{opened:?}");
            for path in opened.iter().filter(|path| !path.parent().unwrap().ends_with("state.db.owners")) {
                let found = fs::metadata(path).unwrap();
                assert_eq!((found.uid(), found.gid()), SOMEBODY, "{name}: {}", path.display());
            }
            backend.close().await.unwrap();
            assert_theirs(
                dir.path(),
                fs::metadata(target.join(if name == "file" { "run_state.json" } else { "state.db" })).unwrap().mode() & 0o777,
            );
        }
    }
}
