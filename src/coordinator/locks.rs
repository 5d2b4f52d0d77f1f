//! Locks at the front door.

use std::sync::Arc;
use std::time::Duration;

use super::Coordinator;
use crate::error::Error;
use crate::lease::{Lease, LockOptions};
use crate::model::{FencingToken, IntoNodeId, IntoRunId, LeaseKey, LeaseRecord};

impl Coordinator {
    /// Locks a run (and so all its nodes), waiting for it at most this long; `None` if the time was up. Zero tries once. The lease lasts 30 s (or what the builder was told) and is
    /// kept alive by its guard; dropping the guard releases it.
    ///
    /// The run need not be there: whoever is to make it can lock its name first. So a wrong id is not noticed.
    ///
    /// Locks are advisory between callers who do not fence: write through [`with_lease`](Self::with_lease), and a write under a lease that was
    /// lost is refused.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use std::time::Duration;
    ///
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    ///
    /// let lease = state.acquire_lock("run_1", Duration::from_millis(5_000)).await?.expect("nobody else has it");
    /// assert!(state.acquire_lock("run_1", Duration::ZERO).await?.is_none(), "it is taken");
    /// drop(lease);
    /// assert!(state.acquire_lock("run_1", Duration::from_millis(5_000)).await?.is_some());
    /// # state.close().await?;
    /// # Ok::<(), seeknal_state::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for a bad id; [`Error::Lease`] (`RunEnded`) if the run ended through this coordinator while this caller waited
    /// (where another process ended it the lock is granted: a lock asks nothing of the run, what is written under it does); [`Error::Store`] if storage failed;
    /// [`Error::Closed`].
    ///
    /// # Cancel safety
    /// A caller that goes away, at whatever instant, leaves its place in the queue or gives the lock back.
    pub async fn acquire_lock(&self, run: impl IntoRunId, wait: Duration) -> Result<Option<Lease>, Error> {
        self.acquire(LeaseKey::run(run.into_run_id()?), LockOptions::new(), wait).await
    }

    /// Locks one node of a run; a lock on the whole run excludes it. Else as [`acquire_lock`](Self::acquire_lock).
    ///
    /// # Errors
    /// As [`acquire_lock`](Self::acquire_lock).
    ///
    /// # Cancel safety
    /// As [`acquire_lock`](Self::acquire_lock).
    pub async fn acquire_node_lock(
        &self,
        run: impl IntoRunId,
        node: impl IntoNodeId,
        wait: Duration,
    ) -> Result<Option<Lease>, Error> {
        let (run, node) = super::write::ids(run, node)?;
        self.acquire(LeaseKey::node(run, node), LockOptions::new(), wait).await
    }

    /// Locks a run or a node with options: owner, purpose, TTL, renewal, re-entry.
    ///
    /// # Errors
    /// As [`acquire_lock`](Self::acquire_lock); [`Error::Input`] for an option that makes no sense; [`Error::Lease`] for a re-entry that was not asked for and for a wait that would close a cycle.
    ///
    /// # Cancel safety
    /// As [`acquire_lock`](Self::acquire_lock).
    pub async fn acquire(&self, key: LeaseKey, options: LockOptions, wait: Duration) -> Result<Option<Lease>, Error> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        let engine = self.engine();
        Ok(engine.leases.acquire(key, options.or_ttl(engine.limits.lease_ttl), wait).await?)
    }

    /// The same coordinator, whose writes are refused once the lease is lost: decided by its fencing token, inside the commit. The lease itself
    /// stays with the caller.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use std::time::Duration;
    /// use seeknal_state::Error;
    ///
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    ///
    /// let lease = state.acquire_lock("run_1", Duration::ZERO).await?.expect("nobody else has it");
    /// let fenced = state.with_lease(&lease);
    /// fenced.set_node_state("run_1", "load", NodeUpdate::running()).await?;
    /// state.force_unlock(lease.token()).await?;
    /// let late = fenced.set_node_state("run_1", "load", NodeUpdate::success()).await;
    /// assert!(matches!(late, Err(Error::LeaseLost(_))));
    /// # state.close().await?;
    /// # Ok::<(), seeknal_state::Error>(()) }).unwrap();
    /// ```
    pub fn with_lease(&self, lease: &Lease) -> Self {
        let mut fences: Vec<_> = self.fences.iter().flat_map(|fences| fences.iter().cloned()).collect();
        let fence = lease.fence();
        if !fences.contains(&fence) {
            fences.push(fence);
        }
        let mut under = Self { fences: Some(Arc::from(fences)), ..self.clone() };
        if let Some(claimed) = lease.claimed() {
            under.claims = Some(self.claims.iter().flat_map(|claims| claims.iter()).chain([claimed]).cloned().collect());
        }
        under
    }

    /// All leases that are held, with owner, purpose, since, until and token, in the order of their tokens.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, create_state_backend};
    ///
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// let lease = state.acquire_lock("run_1", std::time::Duration::from_secs(5)).await?.expect("nobody else has it");
    /// let locks = state.list_locks().await?;
    /// assert_eq!((locks.len(), locks[0].token), (1, lease.token()));
    /// println!("{} until {}", locks[0].owner.process, locks[0].until);
    /// # drop(lease);
    /// # state.close().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`] if storage failed.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list_locks(&self) -> Result<Vec<LeaseRecord>, Error> {
        Ok(self.engine().leases.list().await?)
    }

    /// Takes a lease away from its holder, by its token (a stale list frees nothing else). Its fenced writes are refused from now on. The holder learns of it
    /// ([`Lease::lost`](crate::Lease::lost)): at once in this process, within about a second of hearing that others committed in another one (where it cannot follow them, at
    /// its next renewal: a third of the TTL after the last one, and not at all without renewals before the TTL is over). Answers with the lease as it was.
    ///
    /// # Errors
    /// [`Error::Lease`] (`NotFound`) if no lease is held under this token; [`Error::Store`] if storage failed.
    ///
    /// # Cancel safety
    /// Dropped before it was sent it changes nothing; after, the lease is taken away or not.
    pub async fn force_unlock(&self, token: FencingToken) -> Result<LeaseRecord, Error> {
        Ok(self.engine().leases.force_unlock(token).await?)
    }
}
