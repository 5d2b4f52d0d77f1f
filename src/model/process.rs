//! Who works on something: a process on a host.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// One opening of the state by one process. Two openings are never the same, also in one process or after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ProcessInfo {
    /// Unique for every opening (a version 7 UUID as text).
    pub id: Arc<str>,
    /// The host's name.
    pub host: Arc<str>,
    /// The process id on that host.
    pub pid: u32,
    /// When it opened the state.
    pub started_at: DateTime<Utc>,
}

impl ProcessInfo {
    /// This process, with a new identity.
    pub fn current(now: DateTime<Utc>) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { id: Arc::from(uuid::Uuid::now_v7().to_string()), host: Arc::from(host), pid: std::process::id(), started_at: now }
    }
}

impl fmt::Display for ProcessInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} on {} since {}", self.pid, self.host, super::time::format(self.started_at))
    }
}
