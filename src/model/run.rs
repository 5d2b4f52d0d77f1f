//! The state of a run: its header and its nodes, as one immutable value that is cheap to clone.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::id::{NodeId, RunId};
use super::json::RawJson;
use super::metadata::Metadata;
use super::node::NodeState;
use super::nodes::NodeMap;
use super::process::ProcessInfo;
use super::status::RunStatus;

/// The version of a run: it grows by one with every committed entry, and is never used twice, not even after delete and re-creation.
/// Zero means: there is no such run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u64);

impl Version {
    /// No such run.
    pub const NONE: Self = Self(0);

    /// The version after this one.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The place of a committed entry in the order of the whole store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CommitSeq(pub u64);

impl fmt::Display for CommitSeq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is known of a run as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunHeader {
    /// Where it stands.
    pub status: RunStatus,
    /// When it was created. Runs are ordered by this stamp, then by id; it never changes.
    pub created_at: DateTime<Utc>,
    /// When it started to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// The process that works on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<ProcessInfo>,
    /// Free notes.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub metadata: Metadata,
    /// For a run that came from a foreign file: the members of that file's top level, as they were, without its nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra: Option<RawJson>,
    /// The run's version that last changed this header.
    #[serde(default)]
    pub version: Version,
}

impl RunHeader {
    /// The header of a run that was just created.
    pub fn new(status: RunStatus, created_at: DateTime<Utc>) -> Self {
        Self {
            status,
            created_at,
            started_at: None,
            finished_at: None,
            worker: None,
            metadata: Metadata::new(),
            extra: None,
            version: Version::NONE,
        }
    }
}

/// A run at one version: header and nodes. Immutable for readers; a clone shares all of it.
///
/// It is written (`Serialize`) as one flat object, with the run's own `version` and the header's as `header_version`, and read back as it was.
#[derive(Clone, PartialEq, Eq)]
pub struct RunState {
    version: Version,
    /// In one piece: a state is cloned and dropped several times on its way through the threads.
    body: Arc<Body>,
}

#[derive(Clone)]
struct Body {
    id: RunId,
    created_version: Version,
    header: Arc<RunHeader>,
    nodes: NodeMap,
    /// The node that was put last: it is what whoever stores this version asks for. A hint.
    newest: Option<(NodeId, Arc<NodeState>)>,
    /// Of a run that was loaded again: which of its nodes are not those of an earlier version. A hint.
    reload: Option<Arc<(Version, Version, Vec<NodeId>)>>,
}

impl PartialEq for Body {
    fn eq(&self, other: &Self) -> bool {
        // Hints are no part of what the run is.
        (&self.id, self.created_version, &self.header, &self.nodes)
            == (&other.id, other.created_version, &other.header, &other.nodes)
    }
}

impl Eq for Body {}

impl RunState {
    /// A run without nodes, at the version that created it.
    pub fn new(id: RunId, header: RunHeader, version: Version) -> Self {
        let header = RunHeader { version, ..header };
        Self::of(id, header, version, version, NodeMap::new())
    }

    /// A run as a backend found it in its storage.
    pub fn from_parts(
        id: RunId,
        header: RunHeader,
        version: Version,
        created_version: Version,
        nodes: impl IntoIterator<Item = (NodeId, NodeState)>,
    ) -> Self {
        let nodes = nodes.into_iter().map(|(id, node)| (id, Arc::new(node))).collect();
        Self::of(id, header, version, created_version, nodes)
    }

    pub(super) fn of(id: RunId, header: RunHeader, version: Version, created_version: Version, nodes: NodeMap) -> Self {
        let body = Body { id, created_version, header: Arc::new(header), nodes, newest: None, reload: None };
        Self { version, body: Arc::new(body) }
    }

    fn body_mut(&mut self) -> &mut Body {
        Arc::make_mut(&mut self.body)
    }

    /// Its name.
    pub fn id(&self) -> &RunId {
        &self.body.id
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The version at which it was created: anything older belongs to an earlier run of the same name.
    pub fn created_version(&self) -> Version {
        self.body.created_version
    }

    /// What is known of it as a whole.
    pub fn header(&self) -> &RunHeader {
        &self.body.header
    }

    /// One node.
    pub fn node(&self, node: &str) -> Option<&NodeState> {
        self.body.nodes.get(node).map(|state| &**state)
    }

    /// One node, shared.
    pub fn node_shared(&self, node: &str) -> Option<Arc<NodeState>> {
        match &self.body.newest {
            Some((id, state)) if id.as_str() == node => Some(Arc::clone(state)),
            _ => self.body.nodes.get(node).cloned(),
        }
    }

    /// All nodes in order of their ids.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (&NodeId, &NodeState)> {
        self.body.nodes.iter().map(|(id, state)| (id, &**state))
    }

    /// All nodes in order of their ids, shared.
    pub(super) fn nodes_shared(&self) -> impl Iterator<Item = (&NodeId, &Arc<NodeState>)> {
        self.body.nodes.iter()
    }

    /// How many nodes it has.
    pub fn node_count(&self) -> usize {
        self.body.nodes.len()
    }

    /// The key by which runs are ordered.
    pub fn order_key(&self) -> (DateTime<Utc>, RunId) {
        (self.body.header.created_at, self.body.id.clone())
    }

    /// The newest stamp of the run or one of its nodes: the end of a foreign run that has none of its own.
    pub fn newest_stamp(&self) -> Option<DateTime<Utc>> {
        let header = [self.body.header.started_at, self.body.header.finished_at];
        let nodes = self.body.nodes.iter().flat_map(|(_, node)| [node.started_at, node.finished_at]);
        header.into_iter().chain(nodes).flatten().max()
    }

    /// The same run at another version, with the stamps of its rows as they are.
    #[cfg(feature = "file")]
    pub(crate) fn at_version(&self, version: Version) -> Self {
        Self { version, ..self.clone() }
    }

    /// Whether its last change made it.
    pub(crate) fn is_newborn(&self) -> bool {
        self.body.created_version == self.version
    }

    /// The same run, just made, with the version at which that really was: all its rows have it.
    pub(crate) fn born_at(&self, actual: Version) -> Self {
        let mut state = self.clone();
        state.version = actual;
        let body = state.body_mut();
        body.newest = None;
        body.created_version = actual;
        Arc::make_mut(&mut body.header).version = actual;
        for (id, node) in self.body.nodes.iter() {
            let mut node = NodeState::clone(node);
            node.version = actual;
            body.nodes.insert(id, Arc::new(node));
        }
        state
    }

    /// The same run at another version, with a new header if there is one, and with these rows in the place of its own.
    #[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
    pub(crate) fn with_rows(
        &self,
        version: Version,
        header: Option<RunHeader>,
        nodes: impl IntoIterator<Item = (NodeId, NodeState)>,
    ) -> Self {
        let mut state = self.clone();
        state.version = version;
        let body = state.body_mut();
        body.newest = None;
        if let Some(header) = header {
            body.header = Arc::new(header);
        }
        let mut replaced = Vec::new();
        for (id, node) in nodes {
            replaced.push(id.clone());
            body.nodes.insert(&id, Arc::new(node));
        }
        body.reload = Some(Arc::new((self.version, version, replaced)));
        state
    }

    /// The nodes that are newer than a version, in no order.
    pub(crate) fn newer_nodes(&self, version: Version) -> Vec<NodeId> {
        match self.taken_in(version) {
            Some(nodes) => nodes.to_vec(),
            None => self.body.nodes.iter().filter(|(_, node)| node.version > version).map(|(id, _)| id.clone()).collect(),
        }
    }

    /// The nodes that are newer than a version, where the run was brought up from there by [`with_rows`](Self::with_rows): then none went meanwhile.
    pub(crate) fn taken_in(&self, version: Version) -> Option<&[NodeId]> {
        match self.body.reload.as_deref() {
            Some((from, to, nodes)) if *from == version && *to == self.version => Some(nodes),
            _ => None,
        }
    }

    pub(super) fn set_version(&mut self, version: Version) {
        self.version = version;
    }

    pub(super) fn header_mut(&mut self) -> &mut RunHeader {
        Arc::make_mut(&mut self.body_mut().header)
    }

    pub(super) fn put_node(&mut self, id: NodeId, node: NodeState) {
        let (body, node) = (self.body_mut(), Arc::new(node));
        body.nodes.insert(&id, Arc::clone(&node));
        body.newest = Some((id, node));
    }

    /// Changes a node that is there, or a new one.
    pub(super) fn change_node(&mut self, id: &NodeId, new: impl FnOnce() -> NodeState, change: impl FnOnce(&mut NodeState)) {
        let body = self.body_mut();
        let node = body.nodes.change(id, |known| {
            let mut node = known.map_or_else(|| Arc::new(new()), Arc::clone);
            // Copied to where it stays, and not moved there.
            change(Arc::make_mut(&mut node));
            node
        });
        body.newest = node.map(|node| (id.clone(), node));
    }

    pub(super) fn drop_node(&mut self, id: &NodeId) -> bool {
        let body = self.body_mut();
        body.newest = None;
        body.nodes.remove(id.as_str())
    }
}

impl fmt::Debug for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunState")
            .field("id", &self.body.id)
            .field("version", &self.version)
            .field("header", &self.body.header)
            .field("nodes", &self.body.nodes.iter().map(|(id, node)| (id, &**node)).collect::<std::collections::BTreeMap<_, _>>())
            .finish_non_exhaustive()
    }
}
