//! Where batches come to rest: the [`StateBackend`] trait, the registry, and the backends themselves.
//!
//! A backend is asked for six things: open, commit a batch, load a run, list runs, list leases, and its name. What else it keeps it says by overriding
//! three more: [`StateBackend::lease_store`] for locks, [`StateBackend::retained`] for what outlives deleted runs, [`StateBackend::close`]. Until then these are
//! refused, and nothing is lost in silence. Everything beyond has a correct, slower default. It is asynchronous and dyn-compatible; a backend
//! that blocks owns a thread and hides it.

#[cfg(any(feature = "file", feature = "sqlite", feature = "project"))]
pub(crate) mod access;
mod answers;
#[cfg(any(feature = "file", feature = "sqlite"))]
mod attention;
mod boot_time;
#[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
#[cfg_attr(not(any(feature = "sqlite", feature = "postgres")), allow(dead_code, reason = "libSQL names places in its own way"))]
mod columns;
#[cfg(any(feature = "postgres", feature = "libsql"))]
mod engine;
mod error;
mod foreign;
pub(crate) mod gone;
mod lease_book;
mod memory;
pub(crate) mod moving;
mod one_moment;
mod options;
#[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
mod own_versions;
mod pull;
mod registry;
#[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
mod rewrite;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod short_answer;
pub(crate) mod spin;
mod surviving;
#[cfg(any(feature = "postgres", feature = "libsql"))]
mod unsettled;
#[cfg(any(feature = "sqlite", feature = "postgres", feature = "libsql"))]
mod verdict;

#[cfg(any(feature = "conformance", test))]
pub mod conformance;
#[cfg(any(feature = "postgres", feature = "libsql"))]
#[cfg_attr(
    not(all(feature = "postgres", feature = "libsql")),
    allow(dead_code, reason = "what two backends share: neither uses all of it")
)]
pub(crate) mod decide;
#[cfg(feature = "file")]
pub mod file;
#[cfg(any(feature = "file", feature = "sqlite", feature = "project"))]
pub(crate) mod folder;
#[cfg(any(feature = "file", feature = "sqlite"))]
mod highwater;
#[cfg(feature = "libsql")]
pub mod libsql;
#[cfg(any(feature = "file", feature = "sqlite"))]
mod network;
#[cfg(any(feature = "file", feature = "sqlite", feature = "project"))]
#[cfg_attr(
    not(any(feature = "file", feature = "sqlite")),
    allow(dead_code, reason = "the files that it opens are those of a state")
)]
pub(crate) mod plain;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "sqlite")]
pub mod sqlite;

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::model::{
    Batch, BatchAnswer, LastSuccess, LeaseRecord, NodeCoverage, NodeId, NodeState, ProcessInfo, Retained, RunFilter, RunId,
    RunPage, RunQuery, RunState, Version,
};

pub use answers::AnswerLog;
pub(crate) use boot_time::boot_time;
pub use error::{StoreError, StoreErrorKind};
pub use foreign::ForeignCommits;
#[cfg(all(feature = "project", any(feature = "file", feature = "sqlite")))]
pub(crate) use highwater::tokens_given;
pub use lease_book::LeaseBook;
pub use memory::MemoryBackend;
pub use moving::MIGRATION;
#[cfg(any(feature = "postgres", feature = "project"))]
pub(crate) use options::SCHEMA;
#[cfg(feature = "project")]
pub(crate) use options::{BackendOption, is_built_in};
pub use pull::{BatchSource, Wake};
pub use registry::{BackendOptions, StateBackendFactory, create_state_backend};
pub(crate) use surviving::{load_panicked, surviving};

/// A future of a backend's method.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What opening found, beyond the state itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OpenReport {
    /// What an operator should know: a torn record that was cut, a journal that was set aside, a document that somebody else rewrote.
    pub notices: Vec<String>,
}

impl OpenReport {
    /// Nothing to tell.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a line for the operator.
    pub fn notice(&mut self, line: impl Into<String>) {
        self.notices.push(line.into());
    }
}

/// How a backend keeps leases.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum LeaseStore {
    /// Not at all: locks and claims are refused as [`StoreErrorKind::Unsupported`].
    None,
    /// One process writes: leases live in this book, which the backend asks about fences; they die with the process. What a batch frees is void with it:
    /// the backend decides by [`Ledger::commit_freeing`](crate::model::Ledger::commit_freeing), and takes it out by [`LeaseBook::free`].
    /// A lease that is still in the book when the end of its run is heard of was granted behind it, and stays.
    Book(Arc<LeaseBook>),
    /// Many processes write: leases are rows, and [`Entry::leases`](crate::model::Entry::leases) is decided in the batch's transaction.
    Rows,
}

/// Another opening of the same state, as far as it can be known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OpenProcess {
    /// Who.
    pub process: ProcessInfo,
    /// Whether it lives; `None` if that cannot be known from here.
    pub alive: Option<bool>,
}

impl OpenProcess {
    /// An opening and whether it lives.
    pub fn new(process: ProcessInfo, alive: Option<bool>) -> Self {
        Self { process, alive }
    }
}

/// How far [`StateBackend::processes`] reaches: what it means that an opening is not listed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KnownOpenings {
    /// Nothing: it may live.
    #[default]
    Some,
    /// That it is gone, if it was one of this host.
    OfThisHost,
    /// That it is gone, wherever it was.
    All,
}

/// What a check of the storage found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// What was looked at, for people.
    pub checked: Vec<String>,
    /// What is wrong; empty means sound.
    pub problems: Vec<String>,
}

impl VerifyReport {
    /// Nothing checked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    /// Takes what was found: damage is told in the report, and the check goes on; any other failure ends it.
    #[cfg(any(feature = "sqlite", feature = "libsql", feature = "postgres"))]
    pub(crate) fn take<T>(&mut self, found: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == StoreErrorKind::Corrupt => {
                self.problems.push(error.to_string());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// A place where state comes to rest.
///
/// # Contract
/// - [`commit`](Self::commit) is atomic for every entry and durable when it answers; it decides guards, fences, versions and existence of runs itself,
///   in the same transaction; one refused entry (and the later ones of its runs) never takes others along. The same batch id is applied
///   once, and answered the same way when it is sent again.
/// - An error of `commit` says whether nothing happened ([`StoreError::not_applied`]) or nobody knows ([`StoreError::unknown`]). While it is unknown
///   the caller sends the same batch again.
/// - A new run begins at a version that no earlier run of the same name had.
/// - Batches of one run are sent one after another; batches of different runs may be sent at the same time.
///   Batches of leases alone (renewals, grants, releases: no parts) come at any time beside them, also while one of the same run is under way, and from any
///   thread or runtime: renewals have a thread of their own, with a runtime of its own, so that a blocked one loses no lease.
/// - Dropping a future of `commit` does not stop the work. Every other future may be dropped at any time: a read disturbs nobody, and what writes
///   (`initialize`, `checkpoint`, `raise_tokens`, `close`) happens or not, as a whole, and may be called again.
/// - A backend may refuse what is asked before `initialize` ([`StoreErrorKind::Input`]), and what is asked after `close` ([`StoreErrorKind::Closed`]). A read
///   that fails has changed nothing.
///
/// One value of a backend is one opening, and has one coordinator at a time: a second one is refused while the first is open. Several openings of one storage are
/// several values (for a backend in memory: clones that share what they keep). A backend that is not [shared](StateBackend::is_shared) refuses a second
/// opening while one is open ([`StoreErrorKind::Busy`]), if its storage can be opened twice: both would grant the same locks.
///
/// A backend that wraps another one passes on **every** method, those with a default too: a default answers for a backend that has nothing of the kind. Without
/// [`is_shared`](Self::is_shared) nobody looks at what other processes commit, without [`lease_store`](Self::lease_store) there are no locks, and without
/// [`reserve_tokens`](Self::reserve_tokens) none is granted.
///
/// [`Ledger`](crate::model::Ledger) implements all rules in memory; a backend that keeps the whole state in memory is that ledger with a place to rest.
/// The feature `conformance` has the test kit (`seeknal_state::store::conformance`).
pub trait StateBackend: Send + Sync + fmt::Debug + 'static {
    /// A short name for people: `file`, `sqlite`, ….
    fn name(&self) -> &str;

    /// Where the state is, for people and error messages; never with a secret in it.
    fn location(&self) -> String {
        self.name().to_owned()
    }

    /// Opens the storage: makes it if it is not there, recovers after a crash, checks formats.
    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>>;

    /// Applies a batch; see the contract above. Answers with one outcome for every entry.
    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>>;

    /// Offers a source of batches to a backend that has a writer of its own. Who takes the offer answers how it is woken, and asks the source for batches
    /// until it has none. That writer is to have a thread of its own: a client that waits for it may keep its runtime's worker for some 50 µs at a time. The
    /// default takes no offer: then every batch comes through [`commit`](Self::commit), one hop of the runtime later.
    fn pull_from(&self, source: Weak<dyn BatchSource>) -> Option<Wake> {
        drop(source);
        None
    }

    /// One run, as it is in stable storage.
    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>>;

    /// One page of runs, newest first. A run that cannot be read fails it, or is named in the page by a backend that can tell it from the others, if the query asks
    /// for that ([`RunQuery::names_unreadable`]). Limits count as [`RunQuery::clamped`] says.
    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>>;

    /// All leases that are held and not expired.
    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>>;

    /// How leases are kept. The default says that they are not: nobody can have a lock or a claim. With [`LeaseStore::Rows`] [`commit`](Self::commit) decides
    /// [`Entry::leases`](crate::model::Entry::leases). A backend over [`Ledger`](crate::model::Ledger), which refuses entries that grant or renew one, keeps a
    /// [`LeaseStore::Book`], and overrides [`reserve_tokens`](Self::reserve_tokens) too.
    fn lease_store(&self) -> LeaseStore {
        LeaseStore::None
    }

    /// How often somebody who waits for a lock that another process holds looks whether it is free, with [`LeaseStore::Rows`]; what
    /// [`others_committed`](Self::others_committed) tells makes him look at once. A look is one [`list_leases`](Self::list_leases) for all who wait in this process.
    fn lock_poll(&self) -> Duration {
        Duration::from_millis(75)
    }

    /// Reserves fencing tokens, durably: never given out before, never again, over restarts and restored backups. Needed with [`LeaseStore::Book`].
    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        Box::pin(async move { Err(StoreError::unsupported(self.name(), &format!("reserving {count} fencing tokens"))) })
    }

    /// A fencing token that is not lower than any that was given out. The default draws one where leases are a [`LeaseStore::Book`].
    fn highest_token(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move { Ok(self.reserve_tokens(1).await?.start) })
    }

    /// Sees to it, durably, that every fencing token that is given out from now on is higher than this one: state that moves here brings tokens along that
    /// were given out elsewhere. Called while nobody else draws any; tokens that were reserved before keep their numbers. The default reserves
    /// them where leases are a [`LeaseStore::Book`].
    fn raise_tokens(&self, beyond: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let next = self.reserve_tokens(1).await?.start;
            if next < beyond {
                self.reserve_tokens(beyond - next).await?;
            }
            Ok(())
        })
    }

    /// How many batches the backend takes at once (1 to 64). Batches of one run are never sent at the same time.
    fn flush_shards(&self) -> usize {
        1
    }

    /// How many completed intervals and partitions a run has, of each counted up to `most`: what deleting it takes is more than its nodes tell. `None` (the
    /// default) where that is not told cheaply.
    fn count_completed<'a>(&'a self, _run: &'a RunId, _most: u32) -> BoxFuture<'a, Result<Option<u64>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    /// Whether other processes may write to the same storage while this one has it open.
    fn is_shared(&self) -> bool {
        false
    }

    /// Whether this opening may only read.
    fn is_read_only(&self) -> bool {
        false
    }

    /// The identity of this opening, known after [`initialize`](Self::initialize). Where it is `None`, the default, a coordinator has one of its own; where several
    /// processes share a storage it must be given, so that [`processes`](Self::processes) lists it.
    fn process(&self) -> Option<ProcessInfo> {
        None
    }

    /// All openings of this state that can be known, this one included.
    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        Box::pin(async { Ok(self.process().map(|process| OpenProcess::new(process, Some(true))).into_iter().collect()) })
    }

    /// As [`processes`](Self::processes), and takes the time that it needs to say of these, named by their ids, whether they live: a server that was away heard of
    /// nobody, and says more when it has answered for a while (16 s). Asked before anything is taken from somebody. The default has nothing to wait for.
    fn watch_processes(&self, who: BTreeSet<String>) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        drop(who);
        self.processes()
    }

    /// What it means that [`processes`](Self::processes) does not list an opening. The default claims nothing: then a run is never taken from a worker that
    /// is not known.
    fn known_openings(&self) -> KnownOpenings {
        KnownOpenings::Some
    }

    /// A run again, after others wrote to it; `have` is what the caller has of it. A backend may use it to read less. The default loads the run.
    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.load_run(have.id())
    }

    /// The version of a run that is in storage now; `None` if there is no such run.
    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        Box::pin(async move { Ok(self.load_run(run).await?.map(|state| state.version())) })
    }

    /// Several runs as they are in storage at one moment, each with what the caller has of it, in the order asked: a transaction over several of them
    /// is there as a whole, or not at all. The default reads them one by one until their versions say that nobody wrote meanwhile, and gives up with
    /// [`StoreErrorKind::Busy`] after a number of rounds; a backend with read transactions overrides it.
    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        Box::pin(one_moment::reload_runs(self, runs))
    }

    /// The versions of several runs that are in storage now, in the order asked; where others write too, as they are at one moment.
    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        Box::pin(async move {
            let mut versions = Vec::with_capacity(runs.len());
            for run in runs {
                versions.push(self.run_version(run).await?);
            }
            Ok(versions)
        })
    }

    /// When the newest run was created, of those that were created before a moment if one is given. A coordinator asks when it is opened. The default asks
    /// [`list_runs`](Self::list_runs) for one run.
    fn newest_creation(&self, before: Option<DateTime<Utc>>) -> BoxFuture<'_, Result<Option<DateTime<Utc>>, StoreError>> {
        Box::pin(async move {
            let filter = before.map_or_else(RunFilter::all, |before| RunFilter::all().created_before(before));
            let page = self.list_runs(&RunQuery::new(filter).limit(1)).await?;
            Ok(page.runs.first().map(|run| run.header.created_at))
        })
    }

    /// The versions of the newest runs that are in storage now, `most` at most; a backend may answer fewer than there are. A coordinator that subscribers
    /// listen to asks for them when others committed and [`others_committed`](Self::others_committed) did not say what. The default asks
    /// [`list_runs`](Self::list_runs) for 1,000.
    fn newest_versions(&self, most: usize) -> BoxFuture<'_, Result<Vec<(RunId, Version)>, StoreError>> {
        Box::pin(async move {
            let page = self.list_runs(&RunQuery::default().limit(most.min(1_000))).await?;
            Ok(page.runs.into_iter().map(|run| (run.run_id, run.version)).collect())
        })
    }

    /// Waits until another opening may have committed since the last answer, or since this opening began. What it answers may be too much, never
    /// too little. A backend that is not shared waits for ever, which is the default; a shared one whose coordinators are to follow others overrides it.
    ///
    /// One caller waits at a time. An error says that nothing can be known now: the caller asks again after a pause, and takes it that anything may
    /// have changed meanwhile.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: what happened meanwhile is told by the next one.
    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        Box::pin(std::future::pending())
    }

    /// The state of a node in the newest run that has it.
    fn latest_node<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<(RunId, NodeState)>, StoreError>> {
        Box::pin(
            async move { find_newest(self, |run| run.node(node.as_str()).map(|state| (run.id().clone(), state.clone()))).await },
        )
    }

    /// The last success of a node over all runs, also those that cleanup deleted.
    fn last_success<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<LastSuccess>, StoreError>> {
        Box::pin(async move {
            let live = find_newest(self, |run| LastSuccess::of(run, run.node(node.as_str())?)).await?;
            let kept =
                self.retained().await?.into_iter().find(|(id, _)| id == node).and_then(|(_, retained)| retained.last_success);
            Ok(match (live, kept) {
                (Some(live), Some(kept)) if kept.is_newer_than(&live) => Some(kept),
                (live, kept) => live.or(kept),
            })
        })
    }

    /// What a node completed, over all runs and what outlives them.
    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        Box::pin(async move {
            let mut coverage = NodeCoverage::default();
            let _none = find_newest(self, |run| {
                if let Some(state) = run.node(node.as_str()) {
                    coverage.absorb(state);
                }
                None::<()>
            })
            .await?;
            // After the runs: what a deletion takes from one meanwhile is there by then.
            for (_, kept) in self.retained().await?.into_iter().filter(|(id, _)| id == node) {
                coverage.intervals.extend(kept.coverage.intervals.iter());
                coverage.partitions.extend(kept.coverage.partitions);
            }
            Ok(coverage)
        })
    }

    /// Every node id that a run or the coverage knows, sorted.
    fn node_ids(&self) -> BoxFuture<'_, Result<BTreeSet<NodeId>, StoreError>> {
        Box::pin(async move {
            let mut ids = BTreeSet::new();
            let _none = find_newest(self, |run| {
                ids.extend(run.nodes().map(|(id, _)| id.clone()));
                None::<()>
            })
            .await?;
            ids.extend(self.retained().await?.into_iter().map(|(id, _)| id));
            Ok(ids)
        })
    }

    /// Everything that outlives deleted runs, by node: what deletions with `keep_coverage` and [`Entry::retained`](crate::model::Entry::retained) left. The default
    /// does not know, and says so, and with it [`coverage`](Self::coverage), [`last_success`](Self::last_success) and [`node_ids`](Self::node_ids): an empty
    /// answer would make done work pending again.
    ///
    /// # Errors
    /// [`StoreErrorKind::Unsupported`] by default.
    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        Box::pin(async {
            Err(StoreError::unsupported(self.name(), "what outlives deleted runs (its backend does not override `retained`)"))
        })
    }

    /// Brings the storage into the form that others read (the file backend's document); cheap if it is.
    fn checkpoint(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    /// Checks the storage from end to end, reading only.
    fn verify(&self) -> BoxFuture<'_, Result<VerifyReport, StoreError>> {
        Box::pin(async { Ok(VerifyReport::new()) })
    }

    /// Closes: checkpoints, gives up locks, ends threads. Commits after it are refused as closed. May be called twice. The default does nothing: a coordinator
    /// that was closed refuses by itself, a backend that is used without one overrides it.
    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Goes through all runs, newest first, until something is found: the slow way that every backend can go.
async fn find_newest<B, T>(backend: &B, mut find: impl FnMut(&RunState) -> Option<T> + Send) -> Result<Option<T>, StoreError>
where
    B: StateBackend + ?Sized,
    T: Send,
{
    let mut query = RunQuery::default().limit(1000);
    loop {
        let page = backend.list_runs(&query).await?;
        for summary in &page.runs {
            if let Some(run) = backend.load_run(&summary.run_id).await?
                && let Some(found) = find(&run)
            {
                return Ok(Some(found));
            }
        }
        if page.next.is_none() {
            return Ok(None);
        }
        query = query.after(page.next);
    }
}
