//! Runs as they are written for other programs: one word for each thing.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::collections::BTreeMap;

use seeknal_state::model::{
    Fingerprint, Metadata, NodeId, NodeState, NodeStatus, ProcessInfo, RawJson, RunHeader, RunId, RunPage, RunState, RunStatus,
    RunSummary, Snapshot, Version, time,
};

/// A run whose numbers are all different, and whose texts are awkward.
fn run() -> RunState {
    let raw = |text: &str| RawJson::parse(text).unwrap();
    let at = |micros: i64| time::from_micros(1_704_067_200_000_000 + micros).unwrap();
    let mut header = RunHeader::new(RunStatus::parse("odd"), at(0));
    (header.started_at, header.finished_at) = (Some(at(1)), Some(at(2)));
    header.worker = Some(ProcessInfo::current(at(0)));
    header.metadata = Metadata::from_raw(&raw("{\"z\":1e-300,\"a\":null,\"version\":9}")).unwrap();
    header.extra = Some(raw("{\"version\":\"2.0\",\"n\":9007199254740993}"));
    header.version = Version(3);
    let mut node = NodeState::new(NodeStatus::Success);
    node.fingerprint = Some(Fingerprint::from_raw(raw("{\"content_hash\":\"\\u0041\"}")).unwrap());
    node.row_count = Some(u64::MAX);
    node.version = Version(7);
    let nodes = [(NodeId::new("a/b \"c\"").unwrap(), node)];
    RunState::from_parts(RunId::new("run").unwrap(), header, Version(7), Version(2), nodes)
}

/// The members of a written object; no name stands twice.
fn members(text: &str) -> BTreeMap<String, String> {
    let members = RawJson::parse(text).unwrap().members().unwrap();
    let named: BTreeMap<String, String> = members.iter().map(|(key, value)| (key.clone(), value.to_string())).collect();
    assert_eq!(named.len(), members.len(), "a name stands twice: {text}");
    named
}

#[test]
fn a_run_is_written_with_one_version() {
    let run = run();
    let state = members(&serde_json::to_string(&run).unwrap());
    let snapshot = members(&serde_json::to_string(&Snapshot::new(run.clone(), Version(6))).unwrap());
    let summary = members(&serde_json::to_string(&RunSummary::of(&run)).unwrap());
    for written in [&state, &snapshot, &summary] {
        assert_eq!(written["version"], "7", "the run's own: {written:?}");
        assert_eq!(written["run_id"], "\"run\"");
        assert_eq!(written["status"], "\"odd\"");
    }
    assert_eq!((&*state["created_version"], &*snapshot["durable_version"]), ("2", "6"));
}

#[test]
fn what_is_written_of_a_run_is_read_back() {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned>(written: &T) -> T {
        serde_json::from_str(&serde_json::to_string(written).unwrap()).unwrap()
    }
    let run = run();
    assert_eq!(again(&run), run);
    let snapshot = Snapshot::new(run.clone(), Version(6));
    assert_eq!(again(&snapshot), snapshot);
    let summary = RunSummary::of(&run);
    assert_eq!(again(&summary), summary);
    let page = RunPage::new(vec![summary.clone()], Some(summary.cursor()));
    assert_eq!(again(&page), page);
}
