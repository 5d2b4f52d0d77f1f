//! Settings of a coordinator, with their units, defaults and limits.

use std::any::Any;
use std::panic::catch_unwind;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use chrono::TimeDelta;
use tokio::runtime::Handle;

use super::directory::Directory;
use super::doors::Doors;
use super::events::Events;
use super::sole::{Sole, location};
use super::{Coordinator, Core, Durability, Engine, follow, supervisor};
use crate::error::Error;
use crate::lease::{LeaseHandle, LockOptions};
use crate::model::{Clock, InputError, ProcessInfo, SystemClock};
use crate::persist::Persist;
use crate::run::{Admission, RunContext};
use crate::store::moving::refuse_moving;
use crate::store::{StateBackend, StoreError, StoreErrorKind};

/// Bounds of what is kept in memory.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) entries_in_flight: usize,
    pub(crate) bytes_in_flight: usize,
    pub(crate) idle_after: Duration,
    pub(crate) resident_runs: usize,
    pub(crate) event_backlog: usize,
    pub(crate) entry_bytes: usize,
    pub(crate) lease_ttl: Duration,
}

/// How many events a subscriber may lag behind at most: the room for them is taken when the store is opened.
const LONGEST_BACKLOG: usize = 1 << 20;

/// Settings for opening a store.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// use std::time::Duration;
/// use seeknal_state::{BackendOptions, Coordinator, create_state_backend};
///
/// let state = Coordinator::builder()
///     .max_in_flight(1_024)
///     .idle_after(Duration::from_secs(10))
///     .open(create_state_backend("memory", &BackendOptions::new())?)
///     .await?;
/// # state.close().await }).unwrap();
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct CoordinatorBuilder {
    limits: Limits,
    clock: Arc<dyn Clock>,
}

impl Default for CoordinatorBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl CoordinatorBuilder {
    /// Everything at its default.
    pub fn new() -> Self {
        Self {
            limits: Limits {
                entries_in_flight: 16_384,
                bytes_in_flight: 64 << 20,
                idle_after: Duration::from_secs(60),
                resident_runs: 10_000,
                event_backlog: 4_096,
                entry_bytes: 16 << 20,
                lease_ttl: Duration::from_secs(30),
            },
            clock: Arc::new(SystemClock),
        }
    }

    /// How many writes may be on their way at once; more callers wait. Default 16,384, at least 1.
    pub fn max_in_flight(mut self, entries: usize) -> Self {
        self.limits.entries_in_flight = entries;
        self
    }

    /// How many bytes the writes on their way may take together; more callers wait. Default 64 MiB.
    pub fn max_bytes_in_flight(mut self, bytes: usize) -> Self {
        self.limits.bytes_in_flight = bytes;
        self
    }

    /// How large one transaction may be, in bytes. Default 16 MiB.
    pub fn max_transaction_bytes(mut self, bytes: usize) -> Self {
        self.limits.entry_bytes = bytes;
        self
    }

    /// After how long an unused run gives its memory back: after this time at the earliest, after twice this time at the latest. Default 60 s, at
    /// least 1 ms.
    pub fn idle_after(mut self, idle: Duration) -> Self {
        self.limits.idle_after = idle;
        self
    }

    /// How many runs may be resident; beyond, an eighth of them is sent to sleep at once, first those that were not used lately. Runs with writes on their
    /// way stay until these are settled, so that there may be more for some milliseconds. Default 10,000.
    pub fn max_resident_runs(mut self, runs: usize) -> Self {
        self.limits.resident_runs = runs;
        self
    }

    /// How long leases and claims last without a renewal, unless who asks for one says otherwise: 100 ms to 1 h. Default 30 s. A lock that is not
    /// kept alive may be shorter: see [`LockOptions::ttl`](crate::LockOptions::ttl).
    pub fn lease_ttl(mut self, ttl: Duration) -> Self {
        self.limits.lease_ttl = ttl;
        self
    }

    /// How many events a subscriber may lag behind before it misses the oldest ones: 1 to 1,048,576, for which room is taken at once. Default 4,096.
    ///
    /// Every event that waits keeps its run in memory as it was then, beyond [`max_resident_runs`](Self::max_resident_runs): about 0.8 KB a node where every
    /// event is of another run, little more than what changed where they are of one. Who may stop reading for long, beside many large runs, takes a
    /// smaller backlog.
    pub fn event_backlog(mut self, events: usize) -> Self {
        self.limits.event_backlog = events;
        self
    }

    /// Where stored stamps come from; also an `Arc` of one, which its owner goes on turning. Default: the wall clock.
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Opens the store. The runtime that it is called on is the one [where it runs](Coordinator#where-it-runs). One value of a backend has one coordinator at
    /// a time; where that is being closed it is waited for, a minute at most: closing goes on only while the runtime is driven on which that one was opened. Where
    /// that has ended in the middle of closing, the open is refused until somebody calls `close` on it once more, or its handles are dropped.
    ///
    /// # Errors
    /// [`Error::Input`] if a limit is zero or out of its range, outside of a tokio runtime, on one without timers, and for a backend that another coordinator
    /// has open (clone that one, or make another value of the backend); [`Error::Store`] if the storage cannot be opened, also where its code or the
    /// clock's panics, and for a value of a backend that was closed and cannot be opened again; retryable if an earlier coordinator of that value is still being
    /// closed after a minute.
    ///
    /// # Cancel safety
    /// Dropping the future closes what was opened so far.
    pub async fn open(self, backend: Arc<dyn StateBackend>) -> Result<Coordinator, Error> {
        let Self { limits, clock } = self;
        let bounds = [
            ("max_in_flight", limits.entries_in_flight),
            ("max_bytes_in_flight", limits.bytes_in_flight),
            ("max_transaction_bytes", limits.entry_bytes),
            ("max_resident_runs", limits.resident_runs),
            ("event_backlog", limits.event_backlog),
        ];
        if let Some((name, _)) = bounds.iter().find(|(_, bound)| *bound == 0) {
            return Err(InputError::new(*name, "it is zero; give it at least 1").into());
        }
        if limits.event_backlog > LONGEST_BACKLOG {
            return Err(InputError::new(
                "event_backlog",
                format!("it is more than {LONGEST_BACKLOG}; room for all of it is taken at once"),
            )
            .into());
        }
        if limits.idle_after < Duration::from_millis(1) {
            return Err(InputError::new("idle_after", "it is shorter than 1 ms").into());
        }
        LockOptions::check_kept_ttl("lease_ttl", limits.lease_ttl)?;
        let runtime = runtime()?;
        let sole = Arc::new(Sole::of(&backend).await?);
        let opener = sole.opener();
        // A task of its own: a caller that goes away in the middle drops what it opened, and dropping it closes it.
        let opening = runtime.spawn(start(Arc::clone(&backend), Arc::clone(&sole), limits, clock));
        let opened = match opening.await {
            Ok(opened) => opened.map_err(|error| closed_before(error, &*backend)),
            Err(cut) => match cut.try_into_panic() {
                Ok(panic) => {
                    // What it opened is given up, as far as its code still can. Apart: that may panic too.
                    let why = format!("{}: opening it panicked: {}", location(&*backend), message_of(&*panic));
                    sole.leaves();
                    let closing = async move {
                        let _nobody_opens_it_meanwhile = sole;
                        backend.close().await
                    };
                    let _gives_up_what_it_can = runtime.spawn(closing).await.is_err();
                    Err(StoreError::not_applied(StoreErrorKind::Io, why).into())
                }
                Err(_its_runtime_ended) => Err(Error::Closed),
            },
        };
        opener.stays();
        opened
    }
}

/// The runtime that it is opened on.
fn runtime() -> Result<Handle, InputError> {
    let wrong = |why| InputError::new("runtime", why);
    let runtime = Handle::try_current().map_err(|_| {
        wrong("there is none here; open the state inside of a tokio runtime with timers, and keep that going until the state is closed")
    })?;
    // Nobody can be asked whether there are timers but one of them.
    if catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO))).is_err() {
        return Err(wrong("it has no timers; build it with enable_time (or enable_all)"));
    }
    Ok(runtime)
}

/// What a backend that was closed says of itself is no help to whoever is just opening it.
fn closed_before(error: Error, backend: &dyn StateBackend) -> Error {
    match error {
        Error::Store(error) if error.kind() == StoreErrorKind::Closed => {
            let why = format!(
                "{}: this value of the backend was closed, and is not opened again; make a new one with create_state_backend (or as this one was made)",
                location(backend)
            );
            StoreError::not_applied(StoreErrorKind::Closed, why).with_source(error).into()
        }
        error => error,
    }
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it did not say why")
}

/// How far ahead of this clock a run may have been created by another one that is right where it is: that far apart are the local times on earth, and some
/// programs write theirs without a zone. What lies further ahead is a mistake, behind which nobody goes.
pub(super) const FURTHEST_ZONE: TimeDelta = TimeDelta::hours(26);

/// How long a backend may take to say which run is its newest.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

/// When the newest run was created, in microseconds, so that the runs of this coordinator are newer than those that it found, whatever clock these came
/// from.
async fn last_creation(backend: &dyn StateBackend, clock: &dyn Clock) -> i64 {
    if backend.is_read_only() {
        return 0;
    }
    let furthest = clock.now().checked_add_signed(FURTHEST_ZONE);
    // What cannot be told, or not in time, is told to whoever lists it.
    let told = tokio::time::timeout(TOLD_WITHIN, backend.newest_creation(furthest)).await;
    told.ok().and_then(Result::ok).flatten().map_or(0, crate::model::time::micros)
}

async fn start(
    backend: Arc<dyn StateBackend>,
    sole: Arc<Sole>,
    limits: Limits,
    clock: Arc<dyn Clock>,
) -> Result<Coordinator, Error> {
    {
        let report = backend.initialize().await?;
        for notice in &report.notices {
            tracing::warn!(backend = backend.name(), "{notice}");
        }
        if let Err(error) = refuse_moving(&*backend).await {
            let _gives_its_own_error = backend.close().await.is_err();
            return Err(error.into());
        }
        let last_creation = last_creation(&*backend, &*clock).await;
        let process = backend.process().unwrap_or_else(|| ProcessInfo::current(clock.now()));
        let closed = |_| Error::Closed;
        let persist = Persist::start(&backend).await.map_err(closed)?;
        let (supervisor, _) = supervisor::start().await.map_err(|_| Error::Closed)?;
        let events = Arc::new(Events::new(limits.event_backlog));
        let runtime = Handle::current();
        let directory =
            Arc::new(Directory::new(Arc::clone(&events), supervisor.get_cell(), runtime.clone(), limits.resident_runs));
        let context = Arc::new(RunContext {
            backend: Arc::clone(&backend),
            persist: persist.clone(),
            clock: Arc::clone(&clock),
            surroundings: Arc::clone(&directory) as Arc<dyn crate::run::Surroundings>,
            deferred_runs: Arc::default(),
            losses: Arc::default(),
            chain_numbers: Arc::default(),
        });
        directory.set_context(&context);
        let doors = Doors::new(persist, &directory);
        let leases = match LeaseHandle::start(Arc::clone(&backend), process.clone(), Arc::new(doors), Arc::clone(&clock)).await {
            Ok(leases) => leases,
            Err(error) => {
                context.persist.close().await;
                supervisor.stop(None);
                let _gives_its_own_error = backend.close().await.is_err();
                return Err(error.into());
            }
        };
        directory.set_leases(leases.clone());
        let engine = Arc::new(Engine {
            admission: Admission::new(limits.entries_in_flight, limits.bytes_in_flight),
            backend,
            process,
            context,
            directory,
            leases,
            events,
            following: Arc::default(),
            limits,
            report,
            publications: RwLock::new(()),
            turns: super::turns::Turns::default(),
            awake: super::awake::Awake::default(),
            supervisor,
            runtime,
            last_creation: std::sync::atomic::AtomicI64::new(last_creation),
            closed: AtomicBool::new(false),
            claiming: tokio::sync::watch::Sender::new(0),
            held: super::claims::HeldClaims::default(),
            watched: super::resume::Watched::default(),
            ended: tokio::sync::watch::Sender::new(false),
            storage: tokio::sync::Mutex::default(),
            sole,
        });
        supervisor::watch(&engine);
        follow::start(&engine);
        let core = Arc::new(Core { engine });
        Ok(Coordinator { core, fences: None, claims: None, durability: Durability::default() })
    }
}
