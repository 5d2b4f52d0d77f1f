//! Whose turn it is: those of this process that decide again and again on the same runs do so one after another.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::Instant;

use crate::lease::pause_on;
use crate::model::RunId;

/// How long a turn is waited for at most. Nobody's right to write depends on one: who has waited that long goes on without it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The queues in front of the runs that somebody could not agree on.
#[derive(Debug, Default)]
pub(super) struct Turns {
    runs: DashMap<RunId, Arc<Mutex<()>>>,
}

/// A place in the queue of one run. Dropped it is the next one's turn.
pub(super) struct Turn<'t> {
    turns: &'t Turns,
    run: RunId,
    /// Taken out as it is dropped.
    queue: Option<Arc<Mutex<()>>>,
    held: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for its turn on all of these runs, in the order of their names, so that two such never wait for one another; one that does not come in time
    /// is done without. Its time is that of the coordinator's runtime.
    ///
    /// # Cancel safety
    /// Dropped, it leaves all queues.
    pub(super) async fn take(&self, runs: &BTreeSet<RunId>, runtime: &Handle) -> Vec<Turn<'_>> {
        let until = Instant::now() + PATIENCE;
        let mut taken = Vec::with_capacity(runs.len());
        for run in runs {
            let queue = Arc::clone(self.runs.entry(run.clone()).or_default().value());
            // Before it waits: it leaves the queue however that ends.
            let mut turn = Turn { turns: self, run: run.clone(), queue: Some(Arc::clone(&queue)), held: None };
            turn.held = tokio::select! {
                biased;
                held = queue.lock_owned() => Some(held),
                _ = pause_on(runtime, until.saturating_duration_since(Instant::now())) => None,
            };
            taken.push(turn);
        }
        taken
    }
}

impl Turn<'_> {
    /// Whether it came; otherwise it was waited for in vain.
    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        (self.held, self.queue) = (None, None);
        self.turns.runs.remove_if(&self.run, |_, queue| Arc::strong_count(queue) == 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_after_another_and_nothing_is_left() {
        let (turns, here) = (Turns::default(), Handle::current());
        let [one, both] = [&["a"][..], &["a", "b"]].map(|names| names.iter().map(|name| RunId::new(*name).unwrap()).collect());
        let first = turns.take(&both, &here).await;
        assert!(tokio::time::timeout(PATIENCE / 2, turns.take(&one, &here)).await.is_err(), "it is not its turn");
        let began = Instant::now();
        let without = turns.take(&one, &here).await;
        assert_eq!(began.elapsed(), PATIENCE, "it goes on all the same");
        let (second, ()) = tokio::join!(turns.take(&both, &here), async { drop(first) });
        assert!(second.iter().all(Turn::is_held) && !without.iter().any(Turn::is_held));
        drop((without, second));
        assert!(turns.runs.is_empty());
    }
}
