//! Deferred writes that were lost and of which nobody was told yet. They outlive the actors of their runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::op::{Cause, DeferredLoss};
use crate::model::RunId;

/// How many runs are named where all losses are told as one.
const NAMED: usize = 5;

/// The losses by run. Asking costs one atomic load as long as there is none.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    runs: AtomicUsize,
    by_run: Mutex<BTreeMap<RunId, DeferredLoss>>,
}

impl Losses {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<RunId, DeferredLoss>> {
        // Every change is a single call, so that a panicking holder leaves the map whole.
        self.by_run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a lost write; answers with all that is lost of that run.
    pub(super) fn note(&self, run: &RunId, cause: Cause) -> DeferredLoss {
        let Cause { words, unknown } = cause;
        let mut by_run = self.lock();
        let first = || DeferredLoss { run: run.clone(), lost: 0, unknown, cause: words.clone() };
        let loss = by_run.entry(run.clone()).or_insert_with(first);
        loss.lost += 1;
        loss.unknown |= unknown;
        let loss = loss.clone();
        self.runs.store(by_run.len(), Ordering::Release);
        // Whoever listens to the log may ask for the losses.
        drop(by_run);
        tracing::error!(%run, lost = loss.lost, cause = words, unknown, "deferred writes were lost");
        loss
    }

    /// Takes the loss of a run to tell it to somebody who may not be there any more: then it stays to be told.
    pub(super) fn tell(self: &Arc<Self>, run: &RunId) -> Option<Untold> {
        self.take(run).map(|loss| Untold { loss: Some(loss), losses: Arc::clone(self) })
    }

    fn put_back(&self, loss: DeferredLoss) {
        let mut by_run = self.lock();
        match by_run.get_mut(&loss.run) {
            Some(noted) => {
                noted.lost += loss.lost;
                noted.unknown |= loss.unknown;
            }
            None => drop(by_run.insert(loss.run.clone(), loss)),
        }
        self.runs.store(by_run.len(), Ordering::Release);
    }

    /// Takes the loss of a run: it is told now.
    pub(crate) fn take(&self, run: &RunId) -> Option<DeferredLoss> {
        if self.runs.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut by_run = self.lock();
        let loss = by_run.remove(run);
        self.runs.store(by_run.len(), Ordering::Release);
        loss
    }

    /// Takes one loss; the others stay to be told.
    pub(crate) fn take_one(&self) -> Option<DeferredLoss> {
        let run = self.lock().keys().next().cloned()?;
        self.take(&run)
    }

    /// All losses, told as one. Some of the runs are named, the others counted: each of them is in the log.
    pub(crate) fn take_all(&self) -> Option<DeferredLoss> {
        let all = std::mem::take(&mut *self.lock());
        self.runs.store(0, Ordering::Release);
        let more = all.len().saturating_sub(NAMED);
        let mut losses = all.into_values();
        let mut told = losses.next()?;
        let mut others = vec![std::mem::take(&mut told.cause)];
        for (place, loss) in losses.enumerate() {
            told.lost += loss.lost;
            told.unknown |= loss.unknown;
            if place + 1 < NAMED {
                others.push(format!("of run {:?}: {}", loss.run, loss.cause));
            }
        }
        if more > 0 {
            others.push(format!("and of {more} more run(s)"));
        }
        told.cause = others.join("; ");
        Some(told)
    }

    /// All losses, without taking them.
    pub(crate) fn peek(&self) -> Vec<DeferredLoss> {
        self.lock().values().cloned().collect()
    }
}

/// A loss on its way to who is told of it. Dropped unread it stays to be told.
#[derive(Debug)]
pub(crate) struct Untold {
    loss: Option<DeferredLoss>,
    losses: Arc<Losses>,
}

impl Untold {
    /// It is read.
    pub(crate) fn read(mut self) -> Option<DeferredLoss> {
        self.loss.take()
    }
}

impl Drop for Untold {
    fn drop(&mut self) {
        if let Some(loss) = self.loss.take() {
            self.losses.put_back(loss);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_nobody_reads_stays_to_be_told() {
        let losses = Arc::new(Losses::default());
        let run = RunId::new("a").unwrap();
        losses.note(&run, "full".to_owned().into());
        let untold = losses.tell(&run).unwrap();
        losses.note(&run, "full".to_owned().into());
        drop(untold);
        assert_eq!(losses.tell(&run).unwrap().read().unwrap().lost, 2);
        assert!(losses.tell(&run).is_none());
    }

    #[test]
    fn every_loss_is_told_once() {
        let losses = Losses::default();
        let (a, b) = (RunId::new("a").unwrap(), RunId::new("b").unwrap());
        losses.note(&a, "full".to_owned().into());
        assert_eq!(losses.note(&a, "full".to_owned().into()).lost, 2);
        losses.note(&b, "io".to_owned().into());
        assert_eq!(losses.take_one().unwrap().lost, 2);
        assert!(losses.take(&a).is_none());
        losses.note(&a, "again".to_owned().into());
        let all = losses.take_all().unwrap();
        assert_eq!(all.lost, 2);
        assert!(all.cause.contains("again") && all.cause.contains("io"));
        assert!(losses.take(&b).is_none() && losses.peek().is_empty());
    }

    #[test]
    fn what_many_runs_lost_is_told_in_few_words() {
        let losses = Losses::default();
        for run in 0..1_000 {
            losses.note(&RunId::new(format!("r{run:04}")).unwrap(), "full".to_owned().into());
        }
        let all = losses.take_all().unwrap();
        assert_eq!(all.lost, 1_000);
        let told = all.to_string();
        assert!(told.contains("r0000") && told.contains("r0004") && told.contains("995 more run(s)"), "{told}");
        assert!(!told.contains("r0005"), "{told}");
    }
}
