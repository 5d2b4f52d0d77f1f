//! What this process knows of the runs that it works on: the state that it loaded or committed last. It saves reads, and decides nothing: every
//! commit checks inside the server that the rows it looked at are no newer.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::{RunId, RunState};

/// Nodes that are kept at most, over all runs. A state shares its nodes with the snapshots of the same run.
const MOST_NODES: usize = 100_000;

/// A state that nobody used for so long is forgotten.
const IDLE: Duration = Duration::from_secs(60);

/// The states, by run.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    runs: HashMap<RunId, (RunState, Instant)>,
    nodes: usize,
    puts: u32,
}

impl Inner {
    fn remove(&mut self, run: &RunId) {
        if let Some((old, _)) = self.runs.remove(run) {
            self.nodes = self.nodes.saturating_sub(old.node_count() + 1);
        }
    }

    /// Now and then forgets what was not used.
    fn sweep(&mut self, now: Instant) {
        self.puts = self.puts.wrapping_add(1);
        if self.nodes > MOST_NODES || self.puts.is_multiple_of(1024) {
            self.runs.retain(|_, (_, used)| now.duration_since(*used) < IDLE);
            self.nodes = self.runs.values().map(|(state, _)| state.node_count() + 1).sum();
        }
        if self.nodes > MOST_NODES {
            self.runs.clear();
            self.nodes = 0;
        }
    }
}

impl Cache {
    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        // What a panicking holder left behind is at worst a wrong count.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is known of a run.
    pub(super) fn get(&self, run: &RunId) -> Option<RunState> {
        self.with(|inner| {
            let (state, used) = inner.runs.get_mut(run)?;
            *used = Instant::now();
            Some(state.clone())
        })
    }

    /// Notes a state, unless a newer one is known.
    pub(super) fn put(&self, state: RunState) {
        let now = Instant::now();
        self.with(|inner| {
            if inner.runs.get(state.id()).is_some_and(|(known, _)| known.version() > state.version()) {
                return;
            }
            inner.remove(state.id());
            inner.nodes += state.node_count() + 1;
            inner.runs.insert(state.id().clone(), (state, now));
            inner.sweep(now);
        });
    }

    /// Forgets a run.
    pub(super) fn forget(&self, run: &RunId) {
        self.with(|inner| inner.remove(run));
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::model::{RunHeader, RunStatus, Version};

    fn state(run: &str, version: u64) -> RunState {
        let header = RunHeader::new(RunStatus::Running, DateTime::UNIX_EPOCH);
        RunState::new(RunId::new(run).unwrap(), header, Version(version))
    }

    #[test]
    fn the_newest_state_stays_and_the_sum_is_bounded() {
        let cache = Cache::default();
        cache.put(state("a", 2));
        cache.put(state("a", 1));
        let a = RunId::new("a").unwrap();
        assert_eq!(cache.get(&a).map(|state| state.version()), Some(Version(2)));
        cache.forget(&a);
        assert_eq!(cache.get(&a), None);
        for number in 0..=MOST_NODES {
            cache.put(state(&number.to_string(), 1));
        }
        assert!(cache.with(|inner| inner.runs.len() <= 1 && inner.nodes == inner.runs.len()));
    }
}
