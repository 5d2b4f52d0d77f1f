//! Projects for tests: folders with state in them, made through the backends' public door.
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use seeknal_state::model::{
    Batch, Entry, Interval, Mutation, NewRun, NodeId, NodeUpdate, Outcome, PartitionKey, RunId, RunPart, RunUpdate, Version, time,
};
use seeknal_state::project::Settings;
use seeknal_state::project::relocate::Step;
use seeknal_state::store::{BackendOptions, StateBackend, create_state_backend};

/// When what is moved is moved.
pub(crate) fn now() -> DateTime<Utc> {
    time::parse("2024-06-01T10:00:00Z").unwrap()
}

/// A project's settings, with nothing in the environment.
pub(crate) fn settings(dir: &Path) -> Settings {
    Settings::load(dir, &|_| None).unwrap()
}

/// Whoever looks on at a move and does not stop it.
pub(crate) fn go_on(_: Step) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The guide's own sample.
pub(crate) const GUIDE: &str = r#"{
  "run_id": "run_20240110_120000",
  "started_at": "2024-01-10T12:00:00Z",
  "status": "running",
  "nodes": {
    "my_node": {
      "status": "success",
      "duration_ms": 1500,
      "row_count": 1000,
      "fingerprint": "abc123...",
      "completed_intervals": [["2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z"]],
      "completed_partitions": ["dt=2024-01-01"]
    }
  }
}
"#;

/// Opens a backend of a folder for writing.
pub(crate) async fn open(name: &str, base: &Path) -> Arc<dyn StateBackend> {
    let backend = create_state_backend(name, &BackendOptions::new().base_path(base)).unwrap();
    backend.initialize().await.unwrap();
    backend
}

/// Commits one entry on a run and demands that it is accepted.
pub(crate) async fn put(backend: &Arc<dyn StateBackend>, run: &str, mutations: Vec<Mutation>) {
    let run = RunId::new(run).unwrap();
    let had = backend.load_run(&run).await.unwrap();
    let version = had.as_ref().map_or(Version::NONE, seeknal_state::model::RunState::version);
    let mut after = had;
    seeknal_state::model::apply_all(&mut after, &run, &mutations, version.next()).unwrap();
    let part = RunPart { run, base: version, expect: version, guards: vec![], mutations, after };
    let batch = Arc::new(Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }]));
    let outcomes = backend.commit(batch).await.unwrap().outcomes;
    assert!(matches!(outcomes[0], Outcome::Applied(_)), "{outcomes:?}");
}

/// Fills a store: three ended runs of two nodes, one that runs, and the coverage of one that was deleted.
pub(crate) async fn fill(backend: &Arc<dyn StateBackend>) {
    let node = |name: &str| NodeId::new(name).unwrap();
    for index in 0..3u64 {
        let at = time::parse(&format!("2024-01-1{index}T12:00:00Z")).unwrap();
        put(
            backend,
            &format!("run_{index}"),
            vec![
                Mutation::Create { run: NewRun::running().metadata("trigger", "cron"), at },
                Mutation::SetNode { node: node("load"), update: Box::new(NodeUpdate::running()), at },
                Mutation::SetNode {
                    node: node("load"),
                    update: Box::new(NodeUpdate::success().row_count(100 + index).fingerprint("f00").watermark("w", "9")),
                    at: at + chrono::Duration::milliseconds(1500),
                },
                Mutation::AddInterval { node: node("load"), interval: Interval::parse("2024-01-01", "2024-01-02").unwrap() },
                Mutation::AddPartition { node: node("load"), partition: PartitionKey::new("dt=2024-01-01").unwrap() },
                Mutation::SetNode { node: node("a/b"), update: Box::new(NodeUpdate::failed("line 1\nline 2")), at },
                Mutation::Update { update: RunUpdate::success(), at },
            ],
        )
        .await;
    }
    let at = time::parse("2024-01-09T12:00:00Z").unwrap();
    put(backend, "still", vec![Mutation::Create { run: NewRun::running(), at }]).await;
    let interval = Interval::parse("2023-01-01", "2023-02-01").unwrap();
    let create = Mutation::Create { run: NewRun::running(), at };
    put(backend, "gone", vec![create, Mutation::AddInterval { node: node("load"), interval }]).await;
    put(backend, "gone", vec![Mutation::Delete { keep_coverage: true }]).await;
}

/// A folder with filled state in it.
pub(crate) async fn project(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(name, &dir.path().join("target")).await;
    fill(&backend).await;
    backend.close().await.unwrap();
    if name != "file" {
        std::fs::write(dir.path().join("seeknal_project.yml"), format!("name: demo # kept\nstate_backend: {name}\n")).unwrap();
    }
    dir
}

/// Everything in a folder, by path and content.
pub(crate) fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.insert(format!("{}/", path.strip_prefix(folder).unwrap().display()), Vec::new());
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(folder).unwrap().display().to_string(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}
