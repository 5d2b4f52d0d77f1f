//! What the command line says of files that other programs left.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use crate::run;
use std::fs;

use tempfile::TempDir;

/// A project with these files.
fn project(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (place, text) in files {
        let path = dir.path().join(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

const DOCUMENT: &str = r#"{"schema_version": "2.0", "seeknal_version": "2.1.0", "last_run": "2024-01-10T12:00:00", "run_id": "r", "nodes": {
    "said": {"hash": "", "last_run": "", "status": "failed", "metadata": {"error": "disk on fire"}},
    "meant": {"hash": "", "last_run": "", "status": "failed", "metadata": {"error": {"type": "ValueError"}, "rate": NaN}},
    "well": {"hash": "", "last_run": "", "status": "success", "metadata": {"error": null}},
    "again": {"hash": "", "last_run": "", "status": "success", "metadata": {"error": "old"}}}}"#;

#[test]
fn the_error_of_a_node_is_shown_where_seeknal_keeps_it() {
    let dir = project(&[("target/run_state.json", DOCUMENT)]);
    let (code, out, err) = run(dir.path(), "state show r");
    assert_eq!(code, 0, "{err}");
    let row = |node: &str| out.lines().find(|line| line.contains(node)).unwrap_or_else(|| panic!("{node}: {out}")).to_owned();
    assert!(row("said").contains("disk on fire"), "{out}");
    assert!(row("meant").contains(r#"{"type":"ValueError"}"#), "{out}");
    assert!(!row("well").contains("null") && !row("again").contains("old"), "{out}");
    // What JSON does not know is a text to whoever reads ours.
    let (code, out, err) = run(dir.path(), "state show r -o json");
    assert_eq!(code, 0, "{err}");
    let shown: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(shown.pointer("/nodes/meant/metadata/rate").unwrap(), "NaN");
}

#[test]
fn a_state_without_anything_in_it_is_not_moved() {
    for (place, text) in [("target/state/execution_state.json", "{}"), ("target/run_state.json", r#"{"nodes": {}}"#)] {
        let dir = project(&[(place, text)]);
        let (code, out, err) = run(dir.path(), "migrate-state --backend database");
        assert!(out.contains("There is no state to move"), "{place}: {code} {out}{err}");
        let (code, out, err) = run(dir.path(), "migrate-state --backend database --no-dry-run");
        assert_eq!(code, 3, "{place}: {out}{err}");
        assert!(!dir.path().join("seeknal_project.yml").exists() && !dir.path().join("target/state.db").exists(), "{place}");
    }
}

#[test]
fn what_lies_there_instead_of_a_document_is_named() {
    let dir = project(&[("target/run_state.json.bak.r1", DOCUMENT)]);
    let (_, out, err) = run(dir.path(), "state runs");
    assert!(
        format!("{out}{err}").contains("target/run_state.json.bak.r1 is there: copy it to target/run_state.json?"),
        "{out}{err}"
    );
    let runs = ["r1", "r2", "r3", "r4"].map(|run| (format!("target/{run}/run_state.json"), DOCUMENT));
    let runs: Vec<_> = runs.iter().map(|(place, text)| (place.as_str(), *text)).collect();
    let dir = project(&runs);
    let (_, out, err) = run(dir.path(), "state runs");
    let told = format!("{out}{err}");
    assert!(
        told.contains("target/r1/run_state.json, ") && told.contains("and 1 more") && told.contains("are not read"),
        "{told}"
    );
}
