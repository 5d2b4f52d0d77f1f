//! Keeping others out of a database while its state is moved: a lease on a key that every opening looks at.
//!
//! Whoever opens a database shows itself first and looks for this lease then; whoever moves the state takes the lease first and looks for others
//! then. So of two that meet at least one sees the other. The servers, who may not see a process whose connection is broken, also refuse every commit but
//! the holder's; and what was moved is compared with the source once more in the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::migrate::commit;
use super::{ProjectError, ProjectErrorKind};
use crate::model::{
    Batch, Clock, Entry, FencingToken, LeaseKey, LeaseMutation, LeaseOwner, Outcome, ProcessInfo, Refusal, RunId, SystemClock,
};
use crate::store::{LeaseStore, MIGRATION, StateBackend, StoreError, boot_time};

/// How long others are kept out after the mover died.
const TTL: Duration = Duration::from_secs(30);

/// How much earlier its holder stops trusting it: clocks run at different speeds, and what is decided takes a moment to be done.
const MARGIN: Duration = Duration::from_secs(5);

/// The lease, renewed until it is released or dropped.
#[derive(Debug)]
pub(super) struct Exclusive {
    backend: Arc<dyn StateBackend>,
    key: LeaseKey,
    token: FencingToken,
    lost: Arc<AtomicBool>,
    /// Until when it is certain that others are kept out: counted from the start of the last attempt that went well. It goes on while the
    /// machine sleeps, as the lease does.
    trusted_until: Arc<Mutex<Duration>>,
    renewing: JoinHandle<()>,
}

impl Exclusive {
    /// Takes the lease; `None` where one process alone can open the state, so that nobody has to be kept out.
    pub(super) async fn take(backend: &Arc<dyn StateBackend>) -> Result<Option<Self>, ProjectError> {
        if !backend.is_shared() || matches!(backend.lease_store(), LeaseStore::Book(_)) {
            return Ok(None);
        }
        let key = LeaseKey::run(RunId::new(MIGRATION).map_err(|error| ProjectError::input(error.to_string()))?);
        let at = SystemClock.now();
        let process = backend.process().unwrap_or_else(|| ProcessInfo::current(at));
        let grant = LeaseMutation::Grant {
            key: key.clone(),
            owner: LeaseOwner { process, name: "migrate-state".into() },
            purpose: Some("the state is being moved".into()),
            at,
            ttl_ms: millis(TTL),
        };
        let began = boot_time();
        let token = match change(backend, grant).await? {
            Ok(Some(token)) => token,
            Ok(None) => {
                return Err(StoreError::unsupported(backend.name(), "locks that other processes see").into());
            }
            Err(Refusal::LeaseHeld { holder }) => {
                let message = format!(
                    "{}: another move is under way, by {}; wait for its end (if it died, until {}). See `seeknal state locks`",
                    backend.location(),
                    holder.owner,
                    holder.until.format("%H:%M:%S UTC")
                );
                return Err(ProjectError::new(ProjectErrorKind::Conflict, message));
            }
            Err(refusal) => return Err(refusal.into()),
        };
        let lost = Arc::new(AtomicBool::new(false));
        let trusted_until = Arc::new(Mutex::new(began + TTL.saturating_sub(MARGIN)));
        let renewing = renew(Arc::clone(backend), key.clone(), token, Arc::clone(&lost), Arc::clone(&trusted_until));
        let renewing = tokio::spawn(renewing);
        Ok(Some(Self { backend: Arc::clone(backend), key, token, lost, trusted_until, renewing }))
    }

    /// An error if others may have come in.
    pub(super) fn still_held(&self) -> Result<(), ProjectError> {
        let trusted_until = *self.trusted_until.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.lost.load(Ordering::Acquire) && boot_time() < trusted_until {
            return Ok(());
        }
        let message = format!(
            "{}: the lock that keeps others out was lost in the middle of the move; start again",
            self.backend.location()
        );
        Err(ProjectError::new(ProjectErrorKind::Conflict, message))
    }

    /// Lets others in again.
    pub(super) async fn release(self) {
        self.renewing.abort();
        let release = LeaseMutation::Release { key: self.key.clone(), token: self.token };
        // If this fails it ends by its expiry.
        if let Err(error) = change(&self.backend, release).await {
            tracing::warn!(%error, "the lock of the move was not given back; it ends by itself");
        }
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

async fn renew(
    backend: Arc<dyn StateBackend>,
    key: LeaseKey,
    token: FencingToken,
    lost: Arc<AtomicBool>,
    trusted_until: Arc<Mutex<Duration>>,
) {
    let mut failures = 0;
    loop {
        tokio::time::sleep(TTL / 6).await;
        let renewal = LeaseMutation::Renew { key: key.clone(), token, at: SystemClock.now(), ttl_ms: millis(TTL) };
        let began = boot_time();
        match change(&backend, renewal).await {
            Ok(Ok(_)) => {
                failures = 0;
                *trusted_until.lock().unwrap_or_else(PoisonError::into_inner) = began + TTL.saturating_sub(MARGIN);
            }
            Err(_) if failures < 3 => failures += 1,
            Ok(Err(_)) | Err(_) => {
                lost.store(true, Ordering::Release);
                return;
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Makes one change of a lease.
pub(super) async fn change(
    backend: &Arc<dyn StateBackend>,
    lease: LeaseMutation,
) -> Result<Result<Option<FencingToken>, Refusal>, ProjectError> {
    let batch = Batch::new(vec![Entry { leases: vec![lease], ..Entry::default() }]);
    let outcome = commit(&**backend, batch).await?.into_iter().next();
    Ok(match outcome {
        Some(Outcome::Applied(receipt)) => Ok(receipt.grants.first().map(|grant| grant.token)),
        Some(Outcome::Refused(refusal)) => Err(refusal),
        None => Ok(None),
    })
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use super::*;
    use crate::store::{BackendOptions, create_state_backend};

    #[tokio::test]
    async fn it_is_not_trusted_beyond_the_time_that_was_granted() {
        let folder = tempfile::tempdir().unwrap();
        let backend = create_state_backend("database", &BackendOptions::new().base_path(folder.path())).unwrap();
        backend.initialize().await.unwrap();
        let lock = Exclusive::take(&backend).await.unwrap().unwrap();
        lock.still_held().unwrap();
        // A process that was stopped for longer than it lasts: nothing told it yet that it is lost.
        let over = boot_time();
        *lock.trusted_until.lock().unwrap() = over;
        let error = lock.still_held().unwrap_err();
        assert_eq!(error.kind(), ProjectErrorKind::Conflict, "{error}");
        lock.release().await;
    }
}
