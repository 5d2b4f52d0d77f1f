//! The front door: open a store, hand out runs, build transactions, ask, listen, close.

mod apart;
mod awake;
mod builder;
mod claims;
mod closing;
mod commit;
mod directory;
mod doors;
mod events;
mod follow;
mod health;
mod locks;
mod query;
mod resume;
mod sole;
mod step_back;
mod supervisor;
mod transact;
mod transaction;
mod turns;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

pub use builder::CoordinatorBuilder;
pub use claims::{Claim, ClaimFilter, Next};
pub use commit::Commit;
pub use events::{Change, ChangeStream, Event, StreamError};
pub use follow::Freshness;
pub use health::{Health, Stats};
pub use resume::{AbandonedRun, Resumed};
pub use transact::{NeedsRun, RunView, TransactError, View};
pub use transaction::Transaction;
pub use write::OnDelete;

use self::builder::Limits;
use self::directory::Directory;
use self::events::Events;
use self::follow::Following;
use crate::error::Error;
use crate::lease::LeaseHandle;
use crate::model::{Fence, LeaseKey, ProcessInfo};
use crate::run::{Admission, RunContext};
use crate::store::{OpenReport, StateBackend};

/// What an acknowledgement of a write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Durability {
    /// `Ok` means: in stable storage. The default.
    #[default]
    Durable,
    /// `Ok` means: visible in this process's snapshots, on its way to storage. [`Coordinator::flush`] makes it durable; a later loss is told by
    /// `flush`, `health`, an event, and the next write on that run. Writes with guards, a fence, or over several runs are durable all the same.
    Deferred,
}

/// The state coordinator. A cheap handle: clone it into as many tasks as there are.
///
/// Every `.await` of a write that returns `Ok` means: on disk, whole, in order (see [`Durability`] for the exception that one can ask for).
/// Every method is cancel-safe: a future that is dropped before it was sent changes nothing; after, the write happens or not, as a whole, and nobody
/// else is disturbed.
///
/// # What every write may answer
/// Nothing was written, and the message says what to do: [`Error::Input`] (a bad value; more than
/// [`max_transaction_bytes`](CoordinatorBuilder::max_transaction_bytes)), [`Error::RunNotFound`], [`Error::NodeNotFound`], [`Error::RunExists`], [`Error::Conflict`] (a condition did not
/// hold), [`Error::LeaseLost`] (under [`with_lease`](Self::with_lease) or a fence), [`Error::Contended`] (others changed the run 512 times in a row),
/// [`Error::DeferredLost`] (earlier deferred writes on the run were lost, which is told once, to the next write), [`Error::Closed`].
///
/// Storage failed: [`Error::Store`]. Nobody knows whether it was written if [`Error::is_unknown_outcome`] says so ([`Error::Unknown`] always does): read the
/// run ([`fresh`](Self::fresh)) before writing again.
///
/// # How long a call may take
/// - A write waits for a permit as long as the coordinator is full (the `try_` ones do not), and then for one flush, or a few. Poll or drop what you began: a write that is given
///   its permit and is not polled (a branch of a `select!` loop, a future in a buffer) keeps it, and a full coordinator and `close` wait for it. A lock that is
///   granted to such a call is held.
/// - Where the outcome of a flush is not known (a lost connection, a crashed server) the same batch is sent again until it is; after 30 s its callers are told
///   that nobody knows, and other writes of that line are refused meanwhile. So a write, a [`flush`](Self::flush) and [`close`](Self::close) may take that long.
///   A request to one of the built-in servers is given up when nothing moves for 10 s; long lists, large writes and whole checks have more (see README).
/// - A backend of one's own that neither answers nor fails holds what it was sent, and `close`, without a limit. Put a timeout around the call where that
///   matters: dropping a future is safe. Claims that `close` gives back hold it for 30 s at most, if all
///   other writes were answered by then.
/// - A lock is waited for as long as the caller says, and beyond that for an answer of storage that is under way.
/// - Ends of claims, and claims that are given back, are told twice or more while storage is busy or full: up to ten times, of which the last begins at most about
///   three seconds after the first was refused, or is the second. SQLite takes five seconds to say that another program keeps it busy.
/// - [`transact`](Self::transact) that met others three times waits for its turn among those of this process, at most 10 s at a time.
/// - Reading a run that is in memory waits for nothing; other reads take as long as storage does.
/// - A client that writes alone, each write within 0.1 ms of the last answer, to storage with a thread of its own that answers within 0.4 ms waits for it awake:
///   so long, 0.05 ms at a time, and behind other tasks and threads. Where those want the processor it sleeps as any other. That is a quarter faster,
///   and costs processor time that nobody else asks for. Deferred writes are not waited for like this.
///
/// # Where it runs
/// Its own work is done on the runtime on which it was opened, whichever one calls it: a worker that blocks a runtime of its own, or ends it, stops
/// nobody else. So keep that runtime going (a current-thread one: inside its `block_on`) until the coordinator is closed.
///
/// [`claim_next`](Self::claim_next) pauses where it is awaited, and panics there outside of a tokio runtime with timers. Everything else may be awaited on any
/// executor, or on none of tokio's; on a tokio runtime that has no timers all but [`Lease::lost`](crate::Lease::lost) and [`Claim::lost`].
///
/// A task of that runtime that blocks its worker until a call answers (by another executor's `block_on`) may keep from running what it waits for: wrap it
/// in `tokio::task::block_in_place`, or block a thread of your own. On another tokio runtime that is answered, but not without end: tokio lets a task do so much in
/// one turn (some hundred calls), and beyond that it waits for its worker.
///
/// A test whose tokio time is paused (`start_paused`) is for the `memory` backend: the others work on threads of their own, or on servers, in real time, and while all wait for those the
/// paused clock jumps to the next timeout. The time of a lease passes by both clocks, whichever is ahead.
///
/// # Closing
/// Dropping the last handle closes as far as a drop can (in the background, while the runtime lives); [`close`](Self::close) does it whole and tells
/// what went wrong. A [`Claim`] and a [`Transaction`] hold a handle; a [`Lease`](crate::Lease) and a [`ChangeStream`] do not keep it open.
#[derive(Debug, Clone)]
#[must_use]
pub struct Coordinator {
    pub(super) core: Arc<Core>,
    /// Writes through this handle are refused unless these leases are held.
    pub(super) fences: Option<Arc<[Fence]>>,
    /// Which of these are claims: what is written to the node of one is refused when that does not run any more.
    pub(super) claims: Option<Arc<[LeaseKey]>>,
    pub(super) durability: Durability,
}

/// Closes when the last handle is dropped.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) engine: Arc<Engine>,
}

/// Everything that runs behind the front door.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) backend: Arc<dyn StateBackend>,
    /// Who this is, to other openings: as the backend says, or by a name of its own where that knows none.
    pub(crate) process: ProcessInfo,
    pub(crate) context: Arc<RunContext>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) admission: Admission,
    pub(crate) leases: LeaseHandle,
    pub(crate) events: Arc<Events>,
    /// How it stands with what other processes commit.
    pub(crate) following: Arc<Following>,
    /// The runs that were named as abandoned last, and when they had been watched.
    watched: resume::Watched,
    pub(crate) limits: Limits,
    pub(crate) report: OpenReport,
    /// Held for writing while several runs are published as one; see `Coordinator::snapshots`.
    pub(crate) publications: std::sync::RwLock<()>,
    /// Whose turn it is among those that could not agree.
    turns: turns::Turns,
    awake: awake::Awake,
    supervisor: ractor::ActorRef<supervisor::Msg>,
    /// The runtime that it was opened on. What must not stand still or end with a caller runs there.
    runtime: tokio::runtime::Handle,
    /// Microseconds of the last creation stamp that was given.
    last_creation: std::sync::atomic::AtomicI64,
    closed: AtomicBool,
    /// How many claims are not held yet, or are being told of or given back.
    claiming: watch::Sender<usize>,
    /// The claims that are held.
    held: claims::HeldClaims,
    /// Becomes true when closing has ended, also where it was cut off; then the storage may be open still.
    ended: watch::Sender<bool>,
    storage: tokio::sync::Mutex<closing::Storage>,
    /// No other coordinator has this value of the backend.
    sole: Arc<sole::Sole>,
}

impl Coordinator {
    /// Opens a store with default settings. See [`Coordinator::builder`] for others.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, NewRun, NodeUpdate, create_state_backend};
    ///
    /// let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// state.create_run("run_1", NewRun::running()).await?;
    /// state.set_node_state("run_1", "node1", NodeUpdate::success().row_count(1_000)).await?;
    /// assert_eq!(state.get_node_state("run_1", "node1").await?.unwrap().row_count, Some(1_000));
    /// state.close().await?;
    /// # Ok::<(), seeknal_state::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::Store`] if the storage cannot be opened: held by another process, damaged, of a newer format, not ours. [`Error::Input`] outside of a tokio
    /// runtime with timers, and for a value of a backend that another coordinator has open; see [`CoordinatorBuilder::open`].
    ///
    /// # Cancel safety
    /// Dropping the future closes what was opened so far.
    pub async fn open(backend: Arc<dyn StateBackend>) -> Result<Self, Error> {
        Self::builder().open(backend).await
    }

    /// Settings for opening a store.
    pub fn builder() -> CoordinatorBuilder {
        CoordinatorBuilder::new()
    }

    /// The same coordinator, whose writes ask for this durability.
    pub fn with_durability(&self, durability: Durability) -> Self {
        Self { durability, ..self.clone() }
    }

    /// What opening found, beyond the state itself: lines for the operator.
    pub fn open_report(&self) -> &OpenReport {
        &self.core.engine.report
    }

    /// The backend that this coordinator is the front of.
    pub fn backend(&self) -> &Arc<dyn StateBackend> {
        &self.core.engine.backend
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.core.engine
    }

    /// Makes every deferred write durable.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// use seeknal_state::{BackendOptions, Coordinator, Durability, NewRun, NodeUpdate, create_state_backend};
    ///
    /// # let state = Coordinator::open(create_state_backend("memory", &BackendOptions::new())?).await?;
    /// # state.create_run("run_1", NewRun::running()).await?;
    /// let quick = state.with_durability(Durability::Deferred);
    /// for row in 0..100 {
    ///     quick.set_node_state("run_1", "orders", NodeUpdate::running().row_count(row)).await?; // answered from memory
    /// }
    /// state.flush().await?; // from here on they survive whatever happens
    /// # state.close().await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::DeferredLost`] if some of them were lost (each loss is told once). For how long it waits see [above](Self#how-long-a-call-may-take).
    ///
    /// # Cancel safety
    /// Dropping the future stops the waiting, not the writing.
    pub async fn flush(&self) -> Result<(), Error> {
        self.engine().flush().await
    }
}

impl Engine {
    pub(crate) async fn flush(&self) -> Result<(), Error> {
        self.settle_deferred().await;
        // The others stay to be told, by the next call.
        self.context.losses.take_one().map_or(Ok(()), |loss| Err(loss.into()))
    }

    /// Waits until deferred writes are in storage, if there are any: questions that storage answers must see them. Losses stay to be told.
    pub(crate) async fn settle_deferred(&self) {
        if self.context.deferred_runs.load(Ordering::Acquire) > 0 {
            for handle in self.directory.resident() {
                if handle.cell().has_deferred() {
                    handle.settle().await;
                    if !handle.is_alive() {
                        // What it had been told, then what it had sent down; that it is not known how it ends is noted where it is known.
                        handle.gone().await;
                        let _closed = self.context.persist.barrier(handle.cell().id()).await;
                    }
                }
            }
        }
        // What actors that died had sent down. Waited for once: nobody sends more in their name.
        for (run, death) in self.directory.crashed_runs() {
            if self.context.persist.barrier(&run).await.is_ok() {
                self.directory.settled(&run, death);
            }
        }
    }
}
