//! Links that somebody put where this program keeps files of its own: in a project that was cloned, or by whoever else may write in the folder.
#![cfg(feature = "cli")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::projects::{GUIDE, open, project};
use crate::run;
use seeknal_state::{Coordinator, NewRun};

const MOVE: &str = "migrate-state --backend database --no-dry-run";

/// A command fails with a word about the link, and its end is as it was.
fn refuses(project: &Path, arguments: &str, link: &Path, victim: &Path) {
    for exists in [true, false] {
        let _there_or_not = (fs::remove_file(link), fs::remove_file(victim));
        if exists {
            fs::write(victim, "mine\n").unwrap();
        }
        symlink(victim, link).unwrap();
        let (code, out, err) = run(project, arguments);
        let why = format!("{}: it is a symbolic link", link.file_name().unwrap().to_str().unwrap());
        assert!(code != 0 && err.contains(&why), "{arguments}: {code}: {out}{err}");
        assert_eq!(fs::read_to_string(victim).ok(), exists.then(|| "mine\n".to_owned()), "{arguments}");
        fs::remove_file(link).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_through_a_link_in_the_place_of_a_file_of_ours() {
    let elsewhere = tempfile::tempdir().unwrap();
    let victim = elsewhere.path().join("victim");
    for (backend, names) in [("file", &["run_state.json.lock", "run_state.json.journal"][..]), ("database", &["state.db.lock"])] {
        for name in names {
            let dir = project(backend).await;
            let target = dir.path().join("target");
            let commands = ["state cleanup --days 0", "state verify --repair"];
            for command in &commands[..if backend == "file" { 2 } else { 1 }] {
                refuses(dir.path(), command, &target.join(name), &victim);
            }
        }
    }
    // Lines with the names of runs, which somebody else chose.
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("run_state.json"), GUIDE).unwrap();
    refuses(dir.path(), MOVE, &target.join(".migrate-state.copied"), &victim);
    let (code, _, err) = run(dir.path(), MOVE);
    assert_eq!(code, 0, "{err}");
}

/// What lies in the way of a new journal goes, and what a link leads to stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_journal_is_made_and_not_written_into_what_is_there() {
    let elsewhere = tempfile::tempdir().unwrap();
    let victim = elsewhere.path().join("victim");
    fs::write(&victim, "mine\n").unwrap();
    let dir = project("file").await;
    let target = dir.path().join("target");
    fs::set_permissions(target.join("run_state.json"), fs::Permissions::from_mode(0o600)).unwrap();
    let state = Coordinator::open(open("file", &target).await).await.unwrap();
    // The writer is there, and makes its journal with the first write.
    symlink(&victim, target.join("run_state.json.journal")).unwrap();
    state.create_run("new", NewRun::running()).await.unwrap();
    let journal = target.join("run_state.json.journal").symlink_metadata().unwrap();
    assert!(journal.is_file() && journal.permissions().mode() & 0o777 == 0o600, "{journal:?}");
    state.close().await.unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "mine\n");
    assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o644);
}
