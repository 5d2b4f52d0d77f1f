//! One coordinator for one value of a backend: two would both grant the same lock, and each would go on from a run that the other has changed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::model::InputError;
use crate::store::StateBackend;

/// The values that have a coordinator, by their addresses, and whether that is on its way out.
static TAKEN: Mutex<BTreeMap<usize, watch::Receiver<bool>>> = Mutex::new(BTreeMap::new());

fn taken() -> MutexGuard<'static, BTreeMap<usize, watch::Receiver<bool>>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(backend: &Arc<dyn StateBackend>) -> usize {
    Arc::as_ptr(backend).addr()
}

/// The right to be the only one. It ends when it is given up, or dropped.
#[derive(Debug)]
pub(super) struct Sole(Mutex<Option<Held>>);

#[derive(Debug)]
struct Held {
    /// While it is held nobody else has its address.
    backend: Arc<dyn StateBackend>,
    leaving: Arc<watch::Sender<bool>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        // Those who wait for it wake afterwards, when the sender is dropped too.
        taken().remove(&address(&self.backend));
    }
}

impl Sole {
    /// Takes it; waits for one that is being closed.
    ///
    /// # Cancel safety
    /// Dropped, it is not taken.
    pub(super) async fn of(backend: &Arc<dyn StateBackend>) -> Result<Self, InputError> {
        loop {
            let mut leaving = {
                let mut taken = taken();
                if let Some(leaving) = taken.get(&address(backend)) {
                    leaving.clone()
                } else {
                    let (leaving, seen) = watch::channel(false);
                    taken.insert(address(backend), seen);
                    let held = Held { backend: Arc::clone(backend), leaving: Arc::new(leaving) };
                    return Ok(Self(Mutex::new(Some(held))));
                }
            };
            if !*leaving.borrow() {
                let why = format!(
                    "{}: this value of it is open in another coordinator; clone that one, or make a value of its own with create_state_backend",
                    backend.location()
                );
                return Err(InputError::new("backend", why));
            }
            while leaving.changed().await.is_ok() {}
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It will be given up soon: who wants it waits for that.
    pub(super) fn leaves(&self) {
        if let Some(held) = &*self.held() {
            held.leaving.send_replace(true);
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
pub(super) struct Opener(Option<Arc<watch::Sender<bool>>>);

impl Opener {
    /// He has got it.
    pub(super) fn stays(mut self) {
        self.0 = None;
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        if let Some(leaving) = self.0.take() {
            leaving.send_replace(true);
        }
    }
}
