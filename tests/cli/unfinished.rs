//! A move into the place that the settings name already, cut off: what each command does with the part that is there.
#![cfg(feature = "cli")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use crate::projects::{now, project, settings};
use crate::trace::{Child, can_trace};
use crate::{json, run};
use seeknal_state::model::RunQuery;
use seeknal_state::project::relocate::{self, Home, Move, Step};
use seeknal_state::project::{self, ProjectErrorKind};

const MOVE: &str = "migrate-state --backend database --from file";

/// A project whose state is in the file, and whose settings name the database.
async fn left_behind() -> tempfile::TempDir {
    let dir = project("file").await;
    fs::write(dir.path().join("seeknal_project.yml"), "state_backend: database\n").unwrap();
    dir
}

async fn cut_off() -> tempfile::TempDir {
    let dir = left_behind().await;
    cut_off_at(dir.path(), Step::BatchCopied).await;
    dir
}

async fn cut_off_at(dir: &Path, at: Step) {
    let stop = |step| if step == at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    relocate::execute(&settings(dir), Move::new(Home::File, Home::Database), now(), stop).await.unwrap_err();
}

/// The token that is told.
fn token_in(told: &str) -> String {
    told.split_once("state unlock ").unwrap().1.chars().take_while(char::is_ascii_digit).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_reads_tells_of_it_and_what_writes_is_refused() {
    let dir = cut_off().await;
    let goes_on = format!("seeknal {MOVE} --no-dry-run");
    for arguments in ["state runs", "state show run_1", "state verify", "state locks", "state cleanup --days 0 --dry-run", MOVE] {
        let (code, out, err) = run(dir.path(), arguments);
        // A check tells it among what it looked at.
        let told = if arguments == "state verify" { &out } else { &err };
        assert!(code == 0 && told.contains("has not ended") && told.contains(&goes_on), "{arguments}: {code} {out}{err}");
    }
    for arguments in
        ["state cleanup --days 0", "state end still --as failed --force", "migrate-state --backend file --no-dry-run"]
    {
        let (code, _, err) = run(dir.path(), arguments);
        assert!(code == 4 && err.contains(&goes_on), "{arguments}: {code} {err}");
    }
    let (code, _, err) = run(dir.path(), goes_on.trim_start_matches("seeknal "));
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = run(dir.path(), "state runs");
    assert!(code == 0 && !err.contains("note: "), "{err}");
    assert_eq!(json(dir.path(), "state locks")["leases"], serde_json::json!([]));
}

/// Its source is gone for good.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_given_up_by_the_token_that_is_told() {
    let dir = cut_off().await;
    let (_, _, err) = run(dir.path(), "state cleanup --days 0");
    let token = token_in(&err);
    assert_eq!(json(dir.path(), "state locks")["leases"][0]["token"].to_string(), token);
    let (code, out, err) = run(dir.path(), &format!("state unlock {token}"));
    assert!(code == 0 && out.contains("given up"), "{out}{err}");
    assert_eq!(run(dir.path(), &format!("state unlock {token}")).0, 3);
    let (code, _, err) = run(dir.path(), "state end still --as failed --force");
    assert!(code == 0 && !err.contains("note: "), "{err}");
}

/// The settings name the file still, as in the usual move: what is told of the database works nevertheless.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_given_up_also_where_the_settings_name_the_source() {
    let dir = project("file").await;
    cut_off_at(dir.path(), Step::BatchCopied).await;
    let (code, _, err) = run(dir.path(), MOVE);
    let token = token_in(&err);
    assert_eq!(code, 0, "{err}");
    let (code, out, err) = run(dir.path(), &format!("state unlock {token}"));
    assert!(code == 0 && out.contains("given up") && err.contains("state.db"), "{code} {out}{err}");
    assert_eq!(run(dir.path(), &format!("state unlock {token}")).0, 3);
    let (_, _, err) = run(dir.path(), MOVE);
    assert!(!err.contains("has not ended"), "{err}");
}

/// All is there, but nobody compared it.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_was_cut_off_behind_its_last_batch_is_left_to_do() {
    let dir = left_behind().await;
    cut_off_at(dir.path(), Step::Copied).await;
    let (code, out, err) = run(dir.path(), MOVE);
    assert!(code == 0 && out.contains("To do it: --no-dry-run") && !out.contains("Nothing is left to do"), "{code} {out}{err}");
    for file in ["run_state.json", "run_state.json.lock"] {
        fs::remove_file(dir.path().join("target").join(file)).unwrap();
    }
    let (code, out, err) = run(dir.path(), MOVE);
    assert!(code == 0 && !out.contains("To do it") && !out.contains("Nothing is left to do"), "{code} {out}{err}");
    assert_eq!(run(dir.path(), &format!("{MOVE} --no-dry-run")).0, 4);
}

fn seeknal(dir: &Path, arguments: &str) -> Child {
    let child = Child::program(env!("CARGO_BIN_EXE_seeknal")).arguments(["--project-path".as_ref(), dir.as_os_str()]);
    child.arguments(arguments.split_whitespace())
}

#[tokio::test]
async fn killed_at_any_call_it_leaves_nothing_that_passes_for_the_whole() {
    if !can_trace() {
        return;
    }
    let (mut killed, mut kept_out) = (0, 0);
    // Counted by thread: the one that writes the database makes it first. How many there are is SQLite's own affair: until one kills nobody any more.
    for (call, first, step) in [("pwrite64", 6, 10), ("fsync", 1, 3)] {
        for when in (first..1_000).step_by(step) {
            let what = format!("{call} {when}");
            let dir = left_behind().await;
            let order = format!("{MOVE} --no-dry-run");
            let kill = format!("signal=SIGKILL:when={when}");
            if !seeknal(dir.path(), &order).inject(call, &kill).run().was_killed(&what) {
                break;
            }
            killed += 1;
            match project::open_with(&settings(dir.path())).await {
                Ok(state) => {
                    let runs = state.list_runs(&RunQuery::default()).await.unwrap().runs.len();
                    assert!(runs == 0 || runs == 4, "{what}: {runs} of 4 runs pass for all");
                    state.close().await.unwrap();
                }
                Err(error) => {
                    assert!(error.kind() == ProjectErrorKind::Conflict && error.to_string().contains(MOVE), "{what}: {error}");
                    kept_out += 1;
                }
            }
            let told = seeknal(dir.path(), &order).run();
            assert!(told.status.success(), "{what}: {}", told.text);
            let state = project::open_with(&settings(dir.path())).await.unwrap();
            assert_eq!(state.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 4, "{what}");
            state.close().await.unwrap();
        }
    }
    assert!(killed > 8 && kept_out > 3, "{killed} were killed, {kept_out} of them in the middle");
}
