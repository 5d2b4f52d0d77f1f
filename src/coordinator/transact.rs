//! Read, decide, commit; again on conflict.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::turns::Turn;
use super::{Commit, Coordinator, Engine, Transaction};
use crate::error::Error;
use crate::lease::pause_on;
use crate::model::{Guard, IntoRunId, NodeId, NodeState, Refusal, RunHeader, RunId, Snapshot, Version};

/// How often a transaction is tried before its caller is told that the run is contended.
const MAX_ATTEMPTS: u32 = 64;
/// After so many conflicts it waits for its turn: behind it are all of this process that had as many on the same runs.
const IN_TURN: u32 = 3;

/// What the closure of [`Coordinator::transact`] may end with. An error of the caller's own goes into the value: a closure that answers
/// `Ok(Err(own))` before it puts anything into the transaction, or after [`Transaction::clear`], writes nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactError {
    /// It asked for a run that is not loaded yet; `transact` loads it and calls the closure again. Pass it on with `?`.
    #[error(transparent)]
    NeedsRun(NeedsRun),
    /// It gives up: nothing is written, and `transact` ends with this error.
    #[error(transparent)]
    Abort(Error),
}

/// A run that has to be loaded before the closure can read it.
#[derive(Debug, thiserror::Error)]
#[error("run {0:?} is not loaded yet; the closure of `transact` passes this on with `?`, and is called again")]
pub struct NeedsRun(RunId);

impl From<NeedsRun> for TransactError {
    fn from(needs: NeedsRun) -> Self {
        Self::NeedsRun(needs)
    }
}

impl From<Error> for TransactError {
    fn from(error: Error) -> Self {
        Self::Abort(error)
    }
}

impl From<crate::model::InputError> for TransactError {
    fn from(error: crate::model::InputError) -> Self {
        Self::Abort(error.into())
    }
}

impl From<crate::lease::LeaseError> for TransactError {
    fn from(error: crate::lease::LeaseError) -> Self {
        Self::Abort(error.into())
    }
}

impl From<crate::store::StoreError> for TransactError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Abort(error.into())
    }
}

/// What the closure reads. Whatever it looks at becomes a guard of the transaction.
#[derive(Debug)]
pub struct View {
    runs: BTreeMap<RunId, Option<Snapshot>>,
    read: RefCell<BTreeSet<(RunId, Read)>>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Read {
    All,
    Node(NodeId),
}

/// One run as the closure sees it. What is read of it becomes a condition, and a run with conditions gets a new version with the commit, also where nothing
/// else is written to it: two transactions that read the whole of one run conflict; see [`Transaction::expect_version`]. Read single nodes
/// where that is enough. A closure that puts nothing into the transaction commits nothing, whatever it read.
#[derive(Debug)]
pub struct RunView<'v> {
    view: &'v View,
    snapshot: &'v Snapshot,
}

impl View {
    /// A run; `None` if there is no such run (which is no guard: creating it is one).
    ///
    /// # Errors
    /// [`TransactError::NeedsRun`] the first time: pass it on with `?`. [`TransactError::Abort`] for a bad id.
    pub fn run(&self, run: impl IntoRunId) -> Result<Option<RunView<'_>>, TransactError> {
        let run = run.into_run_id()?;
        match self.runs.get(&run) {
            None => Err(NeedsRun(run).into()),
            Some(snapshot) => Ok(snapshot.as_ref().map(|snapshot| RunView { view: self, snapshot })),
        }
    }
}

impl<'v> RunView<'v> {
    fn note(&self, read: Read) {
        self.view.read.borrow_mut().insert((self.snapshot.id().clone(), read));
    }

    /// One node. The transaction conflicts if it is changed (or made) before the commit.
    pub fn node(&self, node: &str) -> Option<&'v NodeState> {
        match NodeId::new(node) {
            Ok(id) => self.note(Read::Node(id)),
            // No such node can ever be.
            Err(_) => return None,
        }
        self.snapshot.node(node)
    }

    /// All nodes. The transaction conflicts if anything in the run is changed before the commit.
    pub fn nodes(&self) -> impl Iterator<Item = (&'v NodeId, &'v NodeState)> {
        self.note(Read::All);
        self.snapshot.state().nodes()
    }

    /// The header. The transaction conflicts if anything in the run is changed before the commit.
    pub fn header(&self) -> &'v RunHeader {
        self.note(Read::All);
        self.snapshot.state().header()
    }

    /// The version. The transaction conflicts if anything in the run is changed before the commit.
    pub fn version(&self) -> Version {
        self.note(Read::All);
        self.snapshot.version()
    }
}

impl Coordinator {
    /// Reads, decides and commits as one: the closure reads runs through the view and puts what follows into the transaction; what it read is
    /// guarded, and if it was changed before the commit the closure is called again on the new state, at most 64 times; after three conflicts in its turn among those of
    /// this process, which it waits for at most 10 s (once, and once more where the closure then asks for another run). A refusal although nothing that was read has
    /// changed is told at once: a condition of the closure's own that does not hold, a run that it makes and that is there. The closure must be free of side effects. If it puts nothing into the transaction, nothing is committed; conditions and fences alone are decided as by
    /// [`Transaction::commit`]. What it reads is committed: deferred writes that are on their way are waited
    /// for.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// let (rows, _commit) = state
    ///     .transact(|view, tx| {
    ///         let run = view.run("run_1")?;
    ///         let rows = run.and_then(|run| run.node("total")?.row_count).unwrap_or(0) + 10;
    ///         tx.set_node_state("run_1", "total", NodeUpdate::running().row_count(rows));
    ///         Ok(rows)
    ///     })
    ///     .await?;
    /// assert_eq!(rows, 10);
    /// # state.close().await }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The closure's own; [`Error::Contended`] after 64 conflicts; else as [`Transaction::commit`].
    ///
    /// # Cancel safety
    /// Dropped before the commit was sent it changes nothing; after, all of it happens or nothing.
    pub async fn transact<T>(
        &self,
        mut decide: impl FnMut(&View, &mut Transaction) -> Result<T, TransactError>,
    ) -> Result<(T, Commit), Error> {
        let mut wanted: BTreeSet<RunId> = BTreeSet::new();
        let mut conflicts = 0;
        let mut turns = Vec::new();
        loop {
            if conflicts >= IN_TURN && turns.len() != wanted.len() {
                // Anew for all of them, in the order of their names; and before anything is read.
                turns.clear();
                turns = self.engine().turns.take(&wanted, &self.engine().runtime).await;
            }
            let names: Vec<RunId> = wanted.iter().cloned().collect();
            let snapshots = self.engine().committed(&names).await?;
            let view = View { runs: wanted.iter().cloned().zip(snapshots).collect(), read: RefCell::default() };
            let mut tx = self.transaction();
            let value = match decide(&view, &mut tx) {
                Ok(value) => value,
                Err(TransactError::NeedsRun(NeedsRun(run))) => {
                    wanted.insert(run);
                    continue;
                }
                Err(TransactError::Abort(error)) => return Err(error),
            };
            if tx.is_empty() {
                return Ok((value, Commit { seq: None, runs: Vec::new() }));
            }
            // Leases alone are no decision on what was read: it gets no new version by that.
            if tx.is_of_runs() {
                view.guard(&mut tx);
            }
            let View { runs: seen, .. } = view;
            let error = match tx.commit().await {
                Ok(commit) => return Ok((value, commit)),
                Err(error) => error,
            };
            let again = match &error {
                // Locks come and go without a version.
                Error::Contended { .. } | Error::Conflict(Refusal::Guard { guard: Guard::Unlocked, .. }) => true,
                Error::Conflict(_) | Error::RunExists(_) => self.engine().has_any_moved(&seen).await?,
                Error::RunNotFound(run) | Error::NodeNotFound { run, .. } => self.engine().has_moved(run, &seen).await?,
                _ => false,
            };
            if !again {
                return Err(error);
            }
            conflicts += 1;
            if conflicts >= MAX_ATTEMPTS {
                return Err(match (error, wanted.into_iter().next()) {
                    (Error::Conflict(_), Some(run)) => Error::Contended { run, attempts: conflicts },
                    (error, _) => error,
                });
            }
            // Whose turn it is meets newcomers only, and other processes. Who goes on without one stays out of his way.
            let is_its_turn = !turns.is_empty() && turns.iter().all(Turn::is_held);
            let met = if is_its_turn { conflicts.saturating_sub(IN_TURN) } else { conflicts };
            // By the coordinator's clock: its caller may have none.
            let _is_kept = pause_on(&self.engine().runtime, crate::run::jitter(met)).await;
        }
    }
}

impl Engine {
    /// Whether a run that was seen to be there is gone or has changed since. Else what was not found in it was never there, and deciding again helps nobody.
    async fn has_moved(&self, run: &RunId, seen: &BTreeMap<RunId, Option<Snapshot>>) -> Result<bool, Error> {
        let Some(Some(seen)) = seen.get(run) else { return Ok(false) };
        // What is known here may be what it was refused on: its actor loads it behind that answer.
        Ok(self.fresh(run).await?.is_none_or(|now| place(&now) != place(seen)))
    }

    /// Whether anything that was seen is another by now. Else the closure decides what it decided, and is refused again.
    async fn has_any_moved(&self, seen: &BTreeMap<RunId, Option<Snapshot>>) -> Result<bool, Error> {
        for (run, seen) in seen {
            if self.fresh(run).await?.as_ref().map(place) != seen.as_ref().map(place) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Which run it is, and where it stands.
fn place(run: &Snapshot) -> (Version, Version) {
    (run.created_version(), run.version())
}

impl View {
    /// Puts what was read into the transaction as guards.
    fn guard(&self, tx: &mut Transaction) {
        let read = self.read.borrow();
        for (run, read) in read.iter() {
            let Some(Some(snapshot)) = self.runs.get(run) else { continue };
            let guard = match read {
                Read::All => Guard::RunVersion(snapshot.version()),
                Read::Node(node) => Guard::NodeVersion {
                    node: node.clone(),
                    version: snapshot.node(node.as_str()).map_or(Version::NONE, |state| state.version),
                },
            };
            tx.guard(run.clone(), guard);
        }
    }
}
