//! One coordinator for one value of a backend: two would both grant the same lock, and each would go on from a run that the other has changed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::error::Error;
use crate::model::InputError;
use crate::store::{StateBackend, StoreError, StoreErrorKind};

/// How long one that is being closed is waited for: as long as closing takes where storage does not answer, once for what is written and once for claims.
const LEAVES_WITHIN: Duration = Duration::from_secs(60);

/// How it stands with a coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Stays,
    /// On its way out.
    Leaves,
    /// Its closing was cut off by the end of its runtime: nobody goes on with it by himself.
    CutOff,
}

/// The values that have a coordinator, by their addresses.
static TAKEN: Mutex<BTreeMap<usize, watch::Receiver<Stage>>> = Mutex::new(BTreeMap::new());

fn taken() -> MutexGuard<'static, BTreeMap<usize, watch::Receiver<Stage>>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(backend: &Arc<dyn StateBackend>) -> usize {
    Arc::as_ptr(backend).addr()
}

/// Where it is, for words: also where its code cannot say so.
pub(super) fn location(backend: &dyn StateBackend) -> String {
    catch_unwind(AssertUnwindSafe(|| backend.location()))
        .unwrap_or_else(|_told_by_its_hook| "a backend that panics when it is asked where it is".to_owned())
}

/// The right to be the only one. It ends when it is given up, or dropped.
#[derive(Debug)]
pub(super) struct Sole(Mutex<Option<Held>>);

#[derive(Debug)]
struct Held {
    /// While it is held nobody else has its address.
    backend: Arc<dyn StateBackend>,
    leaving: Arc<watch::Sender<Stage>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        // Those who wait for it wake afterwards, when the sender is dropped too.
        taken().remove(&address(&self.backend));
    }
}

impl Sole {
    /// Takes it; waits for one that is being closed, for a while: it may be on a runtime that nobody drives, or in the hands of storage that never answers.
    ///
    /// # Cancel safety
    /// Dropped, it is not taken.
    pub(super) async fn of(backend: &Arc<dyn StateBackend>) -> Result<Self, Error> {
        let until = Instant::now() + LEAVES_WITHIN;
        loop {
            let mut leaving = {
                let mut taken = taken();
                if let Some(leaving) = taken.get(&address(backend)) {
                    leaving.clone()
                } else {
                    let (leaving, seen) = watch::channel(Stage::Stays);
                    taken.insert(address(backend), seen);
                    let held = Held { backend: Arc::clone(backend), leaving: Arc::new(leaving) };
                    return Ok(Self(Mutex::new(Some(held))));
                }
            };
            let stage = *leaving.borrow_and_update();
            match stage {
                Stage::Stays => {
                    let why = format!(
                        "{}: this value of it is open in another coordinator; clone that one, or make a value of its own with create_state_backend",
                        location(&**backend)
                    );
                    return Err(InputError::new("backend", why).into());
                }
                Stage::CutOff => {
                    let why = format!(
                        "{}: the closing of an earlier coordinator of this value of it was cut off by the end of its runtime: call `close` on that one once more, or drop what is left of it; or make a value of its own with create_state_backend",
                        location(&**backend)
                    );
                    return Err(StoreError::not_applied(StoreErrorKind::Busy, why).into());
                }
                Stage::Leaves => {}
            }
            let left = async { while leaving.changed().await.is_ok() && *leaving.borrow_and_update() != Stage::CutOff {} };
            if timeout_at(until, left).await.is_err() {
                let why = format!(
                    "{}: an earlier coordinator of this value of it is still being opened or closed after {} s: keep the runtime going that it was opened on, or end it; or make a value of its own with create_state_backend",
                    location(&**backend),
                    LEAVES_WITHIN.as_secs()
                );
                return Err(StoreError::not_applied(StoreErrorKind::Busy, why).into());
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It will be given up soon: who wants it waits for that.
    pub(super) fn leaves(&self) {
        if let Some(held) = &*self.held() {
            held.leaving.send_replace(Stage::Leaves);
        }
    }

    /// Nobody closes it any more, unless it was given up before.
    pub(super) fn cut_off(&self) {
        if let Some(held) = &*self.held() {
            held.leaving.send_replace(Stage::CutOff);
        }
    }

    pub(super) fn give_up(&self) {
        let held = self.held().take();
        drop(held);
    }

    /// Whoever opens: if he goes away, what he opened is closed as soon as it is open.
    pub(super) fn opener(&self) -> Opener {
        Opener(self.held().as_ref().map(|held| Arc::clone(&held.leaving)))
    }
}

/// Dropped before its time it says that the coordinator will go.
#[derive(Debug)]
pub(super) struct Opener(Option<Arc<watch::Sender<Stage>>>);

impl Opener {
    /// He has got it.
    pub(super) fn stays(mut self) {
        self.0 = None;
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        if let Some(leaving) = self.0.take() {
            leaving.send_replace(Stage::Leaves);
        }
    }
}
