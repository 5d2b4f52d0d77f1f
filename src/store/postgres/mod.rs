//! PostgreSQL: any number of processes on any number of machines, leases as rows on the server's clock, several batches in flight.
//!
//! - `place`: what URL and options say; `hosts`, `reach`, `tls`, `x509`, `connection`: how to get there; `schema`: the tables; `sql`: statements; `moved`: when something came last; `rows`: values as columns.
//! - `commit`: one batch, one transaction; `lock`: what it locks, and reads under that; `at_once`: in one way there and back, on `heads` that are known; `write`:
//!   what it puts down; `told`: how long answers are kept, and what others left; `outlive`: what stays of deleted runs.
//! - `ask`: questions, and when they are asked again; `read`, `list`: everything that is asked; `follow`: commits of others; `openings`: who has it open; `verify`.
//!
//! # Settings
//!
//! | option of [`BackendOptions`] | environment | meaning, default |
//! |---|---|---|
//! | `database_url` | | `postgres://user:password@host:5432/database`, also several hosts, of which the one is used that can be written to; parameters of libpq that matter here |
//! | | `SEEKNAL_DATABASE_PASSWORD` | the password, if the URL has none |
//! | `database_ca_file` | `SEEKNAL_DATABASE_CA_FILE` | certificates (PEM) to trust instead of the public authorities; `sslrootcert` in the URL |
//! | `database_schema` | `SEEKNAL_DATABASE_SCHEMA` | the schema that holds the tables; `seeknal_state`. It is made if the role may |
//! | `database_flush_shards` | | batches that are sent at once, 1 to 64; 2. Each has a connection |
//!
//! An option stands before its variable; one that is blank counts as not set.
//!
//! | `sslmode` | |
//! |---|---|
//! | `disable` | no TLS |
//! | `prefer` (default) | TLS if the server has it; the certificate is not checked |
//! | `require` | TLS; the certificate is checked only if a CA file is given |
//! | `verify-ca`, `verify-full` | TLS; the certificate must be valid, signed by a trusted authority, and name the host (both check the name) |
//!
//! Making a connection may take 3 s for every address (`connect_timeout` in the URL), a commit with all that is tried again 10 s, and a second more for every 128 KiB that are sent. What holds for a session is set on every
//! connection, so that a pooler between must not share sessions (PgBouncer: session mode).
//!
//! # Durability and exclusion
//!
//! `synchronous_commit` is `on` (or `remote_apply`, where the server says so) on every connection that commits, and read back. What the server does with it is the
//! server's: `fsync = off` is told when it is opened. Rows of runs are locked in the order of their ids, so that READ COMMITTED is enough. Commit sequence
//! and fencing tokens are sequences: they leave gaps, the order of one run's commits is kept, and they never go back; a restored copy of the
//! database, or a standby that was promoted, raises them to the microseconds since 1970 when it is first connected to for writing, and with them the versions of
//! all runs.

mod ask;
mod at_once;
mod commit;
mod connection;
mod error;
mod follow;
mod groups;
mod heads;
mod hosts;
mod list;
mod lock;
mod moved;
mod openings;
mod outlive;
mod place;
mod reach;
mod read;
mod rows;
mod schema;
mod sql;
mod tls;
mod told;
mod verify;
mod write;
mod x509;

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use chrono::{DateTime, Utc};
use tokio::sync::OnceCell;

use self::at_once::Unanswered;
use self::connection::{Pool, Sql};
use self::follow::{Follower, Listening};
use self::openings::Lock;
use self::place::Place;
use self::told::Told;
use super::engine::Engine;
use super::pull::{self, Call};
use super::unsettled::Unsettled;
use super::{
    BackendOptions, BatchSource, BoxFuture, ForeignCommits, KnownOpenings, LeaseStore, OpenProcess, OpenReport, StateBackend,
    StoreError, StoreErrorKind, VerifyReport, Wake,
};
use crate::model::{
    Batch, BatchAnswer, Clock, LastSuccess, LeaseRecord, NodeCoverage, NodeId, NodeState, ProcessInfo, Retained, RunId, RunPage,
    RunQuery, RunState, SystemClock, Version,
};

/// The PostgreSQL backend. Nothing is connected before [`initialize`](StateBackend::initialize).
///
/// All its work runs on a thread of its own: a runtime whose workers are blocked still has its leases renewed.
pub struct PostgresBackend {
    place: Arc<Place>,
    opened: OnceCell<Opened>,
    closed: AtomicBool,
}

struct Opened {
    engine: Engine,
    shared: Arc<Shared>,
}

/// What everything that runs needs.
struct Shared {
    pool: Arc<Pool>,
    process: ProcessInfo,
    follower: Arc<Follower>,
    told: Mutex<Told>,
    unanswered: Unanswered,
    unsettled: Mutex<Unsettled>,
}

impl Shared {
    fn unsettled(&self) -> MutexGuard<'_, Unsettled> {
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follower(&self) -> Option<&Follower> {
        (!self.pool.place.read_only).then_some(&*self.follower)
    }
}

impl fmt::Debug for PostgresBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresBackend").field("place", &self.place).finish_non_exhaustive()
    }
}

impl PostgresBackend {
    /// A backend on the database that the URL of the options names.
    ///
    /// # Errors
    /// [`StoreErrorKind::Input`] if the URL or an option makes no sense. The message never quotes the URL.
    pub fn new(options: &BackendOptions) -> Result<Self, StoreError> {
        let url = options
            .url()
            .ok_or_else(|| StoreError::not_applied(StoreErrorKind::Input, "PostgreSQL needs a database_url; none is given"))?;
        Ok(Self { place: Arc::new(Place::of(url, options)?), opened: OnceCell::new(), closed: AtomicBool::new(false) })
    }

    async fn open(&self) -> Result<(Opened, OpenReport), StoreError> {
        let engine = Engine::start("seeknal-postgres")?;
        let pool = Arc::new(Pool::new(Arc::clone(&self.place))?);
        let process = ProcessInfo::current(SystemClock.now());
        let follower = Arc::new(Follower::new(&process));
        let shared = Arc::new(Shared {
            pool,
            process,
            follower,
            told: Mutex::default(),
            unanswered: Unanswered::default(),
            unsettled: Mutex::default(),
        });
        let opening = open(Arc::clone(&shared));
        let report = engine.run(opening, StoreError::not_applied).await?;
        Ok((Opened { engine, shared }, report))
    }

    fn opened(&self) -> Result<&Opened, StoreError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(StoreError::closed());
        }
        self.opened.get().ok_or_else(|| {
            StoreError::not_applied(StoreErrorKind::Input, format!("{} is not open; call initialize first", self.place.name))
        })
    }

    /// Asks something on the backend's thread.
    fn ask<'a, T, F>(&'a self, ask: impl FnOnce(Arc<Shared>) -> F + Send + 'a) -> BoxFuture<'a, Result<T, StoreError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        Box::pin(async move {
            let opened = self.opened()?;
            let work = ask(Arc::clone(&opened.shared));
            opened.engine.run(work, StoreError::not_applied).await
        })
    }
}

/// Connects, looks, makes or brings forward the tables, and tells others.
async fn open(shared: Arc<Shared>) -> Result<OpenReport, StoreError> {
    let Shared { pool, process, .. } = &*shared;
    let place = &pool.place;
    let mut report = OpenReport::new();
    let mut conn = pool.connect_first().await?;
    let encoding = conn.show("server_encoding").await?;
    if encoding != "UTF8" {
        return Err(StoreError::not_applied(
            StoreErrorKind::Unsupported,
            format!("{}: the database is encoded in {encoding}; make one with ENCODING 'UTF8'", place.name),
        ));
    }
    if conn.show("fsync").await? == "off" {
        report.notice(format!(
            "{}: the server runs with fsync = off: after a crash of its machine commits may be missing",
            place.name
        ));
    }
    if place.read_only {
        if schema::look(&mut conn, place).await? == schema::Found::Nothing {
            return Err(StoreError::not_applied(
                StoreErrorKind::NotFound,
                format!("{}: there is no state yet; open it for writing once, or check the schema's name", place.name),
            ));
        }
    } else {
        schema::migrate(&mut conn, place, lock::schema_mutex(&place.schema)).await?;
        if let Some(raised) = schema::raise(&mut conn, place).await? {
            let numbers = "commit sequence, fencing tokens and the versions of all runs were raised";
            report.notice(match raised {
                schema::Raised::Copy => format!(
                    "{}: this is a copy of the database that was used before (a restored backup, a promoted standby): {numbers}",
                    place.name
                ),
                schema::Raised::Unnoted => format!(
                    "{}: an older build wrote here, which did not note the server, so that this may be a copy of the database that was used before: \
                     {numbers}. The server is noted now: it is done again only where such a build opens it once more",
                    place.name
                ),
            });
        }
        pool.keep_origin(&mut conn).await?;
    }
    let lock = Lock::new(&place.schema);
    if !place.read_only {
        openings::say(&mut conn, process, lock).await?;
        // Only room depends on it: it is tried again beside the commits.
        let _tried_again = told::sweep(&shared, &mut conn).await.is_err();
    }
    if !place.read_only {
        commit::warm_up(&mut conn).await?;
        // A second batch should not wait for a connection; who needs none after all loses nothing.
        let pool = Arc::clone(pool);
        tokio::spawn(async move {
            if let Ok(mut second) = pool.connect().await
                && commit::warm_up(&mut second).await.is_ok()
            {
                pool.put(second);
            }
        });
    }
    pool.put(conn);
    let listening = Listening::start(pool, lock, process).await?;
    tokio::spawn(Arc::clone(&shared.follower).work(Arc::clone(pool), lock, listening));
    Ok(report)
}

impl StateBackend for PostgresBackend {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn location(&self) -> String {
        self.place.name.clone()
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async move {
            let mut report = OpenReport::new();
            self.opened
                .get_or_try_init(|| async {
                    let (opened, found) = self.open().await?;
                    report = found;
                    Ok::<_, StoreError>(opened)
                })
                .await?;
            Ok(report)
        })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            let opened = self.opened()?;
            if self.place.read_only {
                return Err(StoreError::not_applied(
                    StoreErrorKind::ReadOnly,
                    format!("{} was opened for reading only", self.place.name),
                ));
            }
            let shared = Arc::clone(&opened.shared);
            let id = batch.id;
            let answer = opened.engine.run(async move { told::settle(&shared, &batch).await }, StoreError::unknown).await?;
            if opened.shared.tell(id) {
                let shared = Arc::clone(&opened.shared);
                drop(opened.engine.spawn(async move { told::prune(&shared).await }));
            }
            Ok(answer)
        })
    }

    fn pull_from(&self, source: Weak<dyn BatchSource>) -> Option<Wake> {
        let opened = self.opened().ok().filter(|_| !self.place.read_only)?;
        let (spawner, shared) = (opened.engine.spawner(), Arc::clone(&opened.shared));
        Some(Box::new(move || {
            spawner.spawn(|| {
                let (call, shared) = (Call::new(&source), Arc::clone(&shared));
                async move {
                    let commit = |batch: Arc<Batch>| {
                        let shared = Arc::clone(&shared);
                        async move { told::settle(&shared, &batch).await }
                    };
                    let told = |id| {
                        if shared.tell(id) {
                            let shared = Arc::clone(&shared);
                            drop(tokio::spawn(async move { told::prune(&shared).await }));
                        }
                    };
                    pull::drain(call, commit, told).await;
                }
            })
        }))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        let run = run.clone();
        self.ask(|shared| async move { read::run(&shared.pool, &run).await })
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        let query = query.clamped();
        self.ask(|shared| async move { list::list(&shared.pool, &query).await })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.ask(|shared| async move { read::leases(&shared.pool).await })
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Rows
    }

    fn highest_token(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.ask(|shared| async move { read::highest_token(&shared.pool).await })
    }

    fn raise_tokens(&self, beyond: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        self.ask(move |shared| async move { commit::raise_tokens(&shared, beyond).await })
    }

    fn flush_shards(&self) -> usize {
        self.place.flush_shards
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        self.place.read_only
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.opened.get().map(|opened| opened.shared.process.clone())
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        self.ask(|shared| async move { openings::list(&shared.pool, shared.follower.contact()).await })
    }

    fn watch_processes(&self, who: BTreeSet<String>) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        self.ask(move |shared| async move { openings::watch(&shared.pool, shared.follower.contact(), &who).await })
    }

    fn known_openings(&self) -> KnownOpenings {
        KnownOpenings::All
    }

    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        let have = have.clone();
        self.ask(|shared| async move { read::reload(&shared.pool, &have).await })
    }

    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        let runs = runs.to_vec();
        self.ask(|shared| async move { read::reload_all(&shared.pool, &runs).await })
    }

    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        let run = run.clone();
        self.ask(|shared| async move { Ok(read::versions(&shared.pool, std::slice::from_ref(&run)).await?.pop().flatten()) })
    }

    fn newest_creation(&self, before: Option<DateTime<Utc>>) -> BoxFuture<'_, Result<Option<DateTime<Utc>>, StoreError>> {
        self.ask(move |shared| async move { read::newest_creation(&shared.pool, before).await })
    }

    fn newest_versions(&self, most: usize) -> BoxFuture<'_, Result<Vec<(RunId, Version)>, StoreError>> {
        // Changed runs are named by the server; this is what is known of others at the beginning.
        self.ask(move |shared| async move { read::newest_versions(&shared.pool, most.min(1_000)).await })
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        let runs = runs.to_vec();
        self.ask(|shared| async move { read::versions(&shared.pool, &runs).await })
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        Box::pin(async move { self.opened()?.shared.follower.others_committed().await })
    }

    fn latest_node<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<(RunId, NodeState)>, StoreError>> {
        let node = node.clone();
        self.ask(|shared| async move { read::latest_node(&shared.pool, &node).await })
    }

    fn last_success<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<LastSuccess>, StoreError>> {
        let node = node.clone();
        self.ask(|shared| async move { read::last_success(&shared.pool, &node).await })
    }

    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        let node = node.clone();
        self.ask(|shared| async move { read::coverage(&shared.pool, &node).await })
    }

    fn node_ids(&self) -> BoxFuture<'_, Result<BTreeSet<NodeId>, StoreError>> {
        self.ask(|shared| async move { read::node_ids(&shared.pool).await })
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        self.ask(|shared| async move { read::retained(&shared.pool).await })
    }

    fn verify(&self) -> BoxFuture<'_, Result<VerifyReport, StoreError>> {
        self.ask(|shared| async move { verify::verify(&shared.pool).await })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let closed_before = self.closed.swap(true, Ordering::AcqRel);
            let Some(opened) = self.opened.get().filter(|_| !closed_before) else { return Ok(()) };
            let shared = Arc::clone(&opened.shared);
            let leaving = async move {
                shared.follower.close();
                if !shared.pool.place.read_only
                    && let Ok(mut conn) = shared.pool.get().await
                {
                    // Who cannot say so is taken for gone when its connection is.
                    let _unsaid = conn
                        .ask(Sql::new(
                            "table openings",
                            "DELETE FROM openings WHERE process = $1",
                            vec![Box::new(shared.process.id.to_string())],
                        ))
                        .await
                        .is_err();
                }
                shared.pool.close();
                Ok(())
            };
            let left = opened.engine.run(leaving, StoreError::not_applied).await;
            opened.engine.stop();
            left
        })
    }
}
