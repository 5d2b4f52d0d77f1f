//! Every foreign document that is known here, moved to the database and back into an empty folder: each value keeps its own text.
#![cfg(all(feature = "project", feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use seeknal_state::model::time;
use seeknal_state::project::{self, Settings, relocate};
use seeknal_state::{RawJson, RunQuery, RunState};

fn raw(path: &Path) -> RawJson {
    RawJson::parse(&fs::read_to_string(path).unwrap()).unwrap()
}

fn member(object: &RawJson, key: &str) -> Option<RawJson> {
    object.members()?.into_iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

async fn move_to(project: &Path, home: relocate::Home) {
    let settings = Settings::load(project, &|_| None).unwrap();
    let now = time::parse("2026-01-01").unwrap();
    let report = relocate::execute(&settings, home, now, |_| ControlFlow::Continue(())).await.unwrap();
    assert!(report.moved.unwrap().verified.runs > 0);
}

/// Everything in a project, without the versions, which belong to a store.
async fn content(project: &Path) -> Vec<(RunState, Vec<seeknal_state::NodeState>)> {
    let state = project::open_with(&Settings::load(project, &|_| None).unwrap()).await.unwrap();
    let mut all = Vec::new();
    for run in state.list_runs(&RunQuery::default()).await.unwrap().runs {
        let run = state.backend().load_run(&run.run_id).await.unwrap().unwrap();
        let nodes = run.nodes().map(|(_, node)| node.without_version()).collect();
        all.push((run, nodes));
    }
    state.close().await.unwrap();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fixture_comes_back_from_the_database_token_for_token() {
    for fixture in [
        "guide-sample/run_state.json",
        "seeknal-1.0.0/run_state.json",
        "seeknal-2.x-real-4-nodes/run_state.json",
        "seeknal-2.x-rich/run_state.json",
        "seeknal-2.x-rich/run_state.json.bak.run_20240111_120000",
        "old-runner/state/execution_state.json",
    ] {
        let source = Path::new("tests/fixtures").join(fixture);
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        let bare = fixture.ends_with("execution_state.json");
        let place = target.join(if bare { "state/execution_state.json" } else { "run_state.json" });
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(&source, &place).unwrap();
        let before = raw(&place);
        let told = content(dir.path()).await;
        move_to(dir.path(), relocate::Home::Database).await;
        assert_eq!(raw(&place), before, "{fixture}: it stays as it was");
        // Nothing but the database knows it now.
        for entry in fs::read_dir(&target).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("run_state.json") {
                fs::remove_file(&path).unwrap();
            } else if name == "state" {
                fs::remove_dir_all(&path).unwrap();
            }
        }
        let in_database = content(dir.path()).await;
        assert_eq!(in_database.len(), told.len(), "{fixture}");
        for ((here, nodes), (there, others)) in told.iter().zip(&in_database) {
            assert_eq!(here.id(), there.id(), "{fixture}");
            assert_eq!(nodes, others, "{fixture}: {:?}", here.id());
            let (mut left, mut right) = (here.header().clone(), there.header().clone());
            (left.version, right.version) = Default::default();
            assert_eq!(left, right, "{fixture}: {:?}", here.id());
        }
        move_to(dir.path(), relocate::Home::File).await;
        let after = raw(&target.join("run_state.json"));
        let nodes_before = if bare { before.clone() } else { member(&before, "nodes").unwrap() };
        let nodes_after = member(&after, "nodes").unwrap();
        let mut compared = 0;
        if !bare {
            for (key, value) in before.members().unwrap().into_iter().filter(|(key, _)| key != "nodes") {
                assert_eq!(member(&after, &key), Some(value), "{fixture}: {key}");
                compared += 1;
            }
        }
        for (id, node) in nodes_before.members().unwrap() {
            let now = member(&nodes_after, &id).unwrap_or_else(|| panic!("{fixture}: {id} is gone"));
            for (key, value) in node.members().unwrap() {
                assert_eq!(member(&now, &key), Some(value), "{fixture}: {id}: {key}");
                compared += 1;
            }
        }
        assert!(compared >= 8, "{fixture}: {compared} values compared");
        assert_eq!(nodes_after.members().unwrap().len(), nodes_before.members().unwrap().len(), "{fixture}");
    }
}
