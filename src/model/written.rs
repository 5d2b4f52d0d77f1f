//! Runs as they are written for other programs: a flat object, in which every name stands once.
//!
//! Nothing is flattened by serde: what goes through its buffer comes back without the text of its numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::id::{NodeId, RunId};
use super::json::RawJson;
use super::metadata::Metadata;
use super::node::NodeState;
use super::process::ProcessInfo;
use super::query::RunSummary;
use super::run::{RunHeader, RunState, Version};
use super::snapshot::Snapshot;
use super::status::{NodeStatus, RunStatus};

/// A run with what is told of its nodes. `version` is the run's own; the header's is `header_version`.
#[derive(Serialize, Deserialize)]
struct Written<N> {
    run_id: RunId,
    version: Version,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created_version: Option<Version>,
    status: RunStatus,
    created_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    started_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    finished_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker: Option<ProcessInfo>,
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    extra: Option<RawJson>,
    #[serde(default)]
    header_version: Version,
    nodes: N,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    durable_version: Option<Version>,
}

type Nodes = BTreeMap<NodeId, Arc<NodeState>>;

impl<N> Written<N> {
    fn of(run_id: &RunId, version: Version, header: &RunHeader, nodes: N) -> Self {
        let RunHeader { status, created_at, started_at, finished_at, worker, metadata, extra, version: header_version } =
            header.clone();
        Self {
            run_id: run_id.clone(),
            version,
            created_version: None,
            status,
            created_at,
            started_at,
            finished_at,
            worker,
            metadata,
            extra,
            header_version,
            nodes,
            durable_version: None,
        }
    }

    /// What it was made of, but for the versions that only some have.
    fn parts(self) -> (RunId, Version, RunHeader, N) {
        let Self {
            run_id,
            version,
            status,
            created_at,
            started_at,
            finished_at,
            worker,
            metadata,
            extra,
            header_version,
            nodes,
            ..
        } = self;
        let header = RunHeader { status, created_at, started_at, finished_at, worker, metadata, extra, version: header_version };
        (run_id, version, header, nodes)
    }
}

impl Written<Nodes> {
    fn of_state(run: &RunState) -> Self {
        let nodes = run.nodes_shared().map(|(id, node)| (id.clone(), Arc::clone(node))).collect();
        let written = Self::of(run.id(), run.version(), run.header(), nodes);
        Self { created_version: Some(run.created_version()), ..written }
    }

    fn into_state<E: de::Error>(self) -> Result<RunState, E> {
        let created = self.created_version.ok_or_else(|| E::missing_field("created_version"))?;
        let (id, version, header, nodes) = self.parts();
        Ok(RunState::of(id, header, version, created, nodes.into_iter().collect()))
    }
}

impl Serialize for RunState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Written::of_state(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RunState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Written::<Nodes>::deserialize(deserializer)?.into_state()
    }
}

impl Serialize for Snapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written = Written { durable_version: Some(self.durable_version()), ..Written::of_state(self.state()) };
        written.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Snapshot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::<Nodes>::deserialize(deserializer)?;
        let durable = written.durable_version.ok_or_else(|| de::Error::missing_field("durable_version"))?;
        Ok(Self::new(written.into_state()?, durable))
    }
}

impl Serialize for RunSummary {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Written::of(&self.run_id, self.version, &self.header, &self.nodes).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RunSummary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (id, version, header, nodes) = Written::<BTreeMap<NodeStatus, u64>>::deserialize(deserializer)?.parts();
        Ok(Self::new(id, version, header, nodes))
    }
}
