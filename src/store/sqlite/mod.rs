//! The SQLite database, `target/state.db`: one writer thread, separate readers, leases as rows, any number of processes on one machine.
//!
//! - `open`, `schema`, `network`: what lies at the path, what is refused untouched, settings, tables.
//! - `thread`: the writer, `turn`: how it waits for others; `decide` judges entries, `cell` is one run meanwhile, `write` puts rows down, `checkpoint` and `wal` bring them into the database, `own` is what it remembers, `answer` the answers of batches.
//! - `read`, `reload`: everything that is asked, on the threads of `readers`; `follow`: commits of others; `lease`: locks; `outlive`: what stays of deleted runs; `owners`: who has it open; `place`: where it is.

mod answer;
mod boot;
mod cell;
mod changes;
mod checkpoint;
mod decide;
mod error;
mod follow;
mod gather;
mod lease;
mod network;
mod open;
mod outlive;
mod own;
mod owners;
mod place;
mod read;
mod readers;
mod reload;
mod rows;
mod schema;
mod thread;
mod turn;
mod verify;
mod wal;
mod write;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
#[cfg(feature = "project")]
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

#[cfg(feature = "project")]
use chrono::{DateTime, Utc};
use rusqlite::Connection;
use tokio::sync::mpsc::error::SendError;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use self::follow::{Follower, Foreign};
use self::owners::Deaths;
use self::place::Place;
use self::readers::Readers;
use self::thread::{Job, Writer};
#[cfg(feature = "project")]
use super::highwater::HighWaterFile;
use super::pull::Call;
use super::{
    BackendOptions, BatchSource, BoxFuture, ForeignCommits, KnownOpenings, LeaseStore, OpenProcess, OpenReport, StateBackend,
    StoreError, StoreErrorKind, VerifyReport, Wake,
};
use crate::model::{
    Batch, BatchAnswer, Clock, LastSuccess, LeaseRecord, NodeCoverage, NodeId, NodeState, ProcessInfo, Retained, RunId, RunPage,
    RunQuery, RunState, SystemClock, Version,
};

/// Where there is no database, or one with nothing in it: that there was one, as the file beside it tells.
#[cfg(feature = "project")]
pub(crate) fn lost(db: &Path) -> Option<String> {
    let db = &place::real(db);
    open::known(db).ok().flatten().and_then(|known| open::lost(db, &known))
}

/// Copies a database, damaged as it may be, page by page and with what its WAL holds, also beside those who write it. Fails where SQLite cannot read even
/// its first page.
#[cfg(feature = "project")]
pub(crate) fn copy(db: &Path, to: &Path) -> Result<(), StoreError> {
    let fail = |error| error::sql_error(db.display(), error);
    open::refuse_no_files(&place::real(db))?;
    // Without our settings and questions: they would meet the damage.
    let from = Connection::open_with_flags(db, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(fail)?;
    let mut copy = Connection::open(to).map_err(|error| error::sql_error(to.display(), error))?;
    let backup = rusqlite::backup::Backup::new(&from, &mut copy).map_err(fail)?;
    // All of it in one step, which is one read transaction: between two steps a commit of others would make it begin anew.
    for _ in 0..100 {
        match backup.step(-1).map_err(fail)? {
            rusqlite::backup::StepResult::Done => return Ok(()),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    Err(StoreError::not_applied(
        StoreErrorKind::Busy,
        format!("{}: it is locked, and could not be copied; see who has it with `seeknal state locks`", db.display()),
    ))
}

/// What a dump of a database leaves out, as SQL: the marks by which it is known for ours.
#[cfg(feature = "project")]
pub(crate) fn marks(db: &Path) -> String {
    let version = open::open_immutable(&place::real(db)).and_then(|conn| schema::schema_version(&conn));
    schema::marks(version.ok().filter(|version| (1..=schema::SCHEMA_VERSION).contains(version)).unwrap_or(schema::SCHEMA_VERSION))
}

/// Whether SQLite itself finds damage in a database: pages, indexes, what is no database. A value that makes no sense to us is none.
#[cfg(feature = "project")]
pub(crate) fn is_damaged(db: &Path) -> Result<bool, StoreError> {
    open::refuse_no_files(&place::real(db))?;
    let found = Connection::open_with_flags(db, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
        .and_then(|conn| conn.query_row("PRAGMA integrity_check(1)", [], |row| row.get::<_, String>(0)));
    match found {
        Ok(line) => Ok(line != "ok"),
        Err(error) if error::is_damage(&error) => Ok(true),
        Err(error) => Err(error::sql_error(db.display(), error)),
    }
}

/// Puts the file beside a database right that tells how far numbers were given out, if it cannot be read; says what was done.
#[cfg(feature = "project")]
pub(crate) fn mend_sidecar(
    db: &Path,
    aside: impl FnOnce(&Path) -> PathBuf,
    now: DateTime<Utc>,
) -> Result<Option<String>, StoreError> {
    let db = &place::real(db);
    let path = open::beside(db, ".lock");
    if open::known(db).is_ok() {
        return Ok(None);
    }
    let mut file = HighWaterFile::open(&path, db)?;
    file.lock(open::BUSY_TIMEOUT)?;
    let mended = file.mend(&aside(&path), now);
    file.unlock()?;
    mended
}

/// Readers at a time, each with a connection of its own that is kept for the next one: a crowd waits, instead of using up the file descriptors.
const READERS: usize = 16;

/// The SQLite backend. Nothing is opened before [`initialize`](StateBackend::initialize).
pub struct SqliteBackend {
    shared: Arc<Shared>,
    readers: Readers,
    foreign: Arc<Foreign>,
    follower: Follower,
    read_only: bool,
    /// Whether it may lie on a file system that may be another machine's.
    network: bool,
    opened: OnceCell<Opened>,
}

#[derive(Debug)]
struct Opened {
    process: ProcessInfo,
    /// None: this opening only reads.
    writer: Option<mpsc::UnboundedSender<Job>>,
    /// What an operator should know.
    notice: Option<String>,
}

/// What readers on other threads need.
#[derive(Debug)]
struct Shared {
    at: Arc<Place>,
    /// Idle connections; none at all once it is closed.
    readers: Mutex<Option<Vec<Connection>>>,
    /// Who reads has one of these; in the order in which they came.
    turns: Arc<Semaphore>,
}

impl fmt::Debug for SqliteBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteBackend")
            .field("path", &self.shared.at.path)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Asks with a connection of its own, in one read transaction. Blocks.
    fn ask<T>(&self, ask: impl FnOnce(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let idle = self.idle().as_mut().ok_or_else(StoreError::closed)?.pop();
        // Whoever asks while it is closed is not told of files that go with it.
        self.at.check().map_err(|error| if self.idle().is_none() { StoreError::closed() } else { error })?;
        let (mut conn, lasting) = match idle {
            Some(conn) => (conn, true),
            None => open::open_reader(&self.at.path)?,
        };
        let found = read::in_snapshot(&mut conn, &self.at.name, |tx| ask(tx));
        // A connection that met an error is not trusted with the next question.
        if found.is_ok()
            && lasting
            && let Some(idle) = self.idle().as_mut()
        {
            idle.push(conn);
        }
        found
    }

    /// Waits until there are not too many who read.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        Arc::clone(&self.turns).acquire_owned().await.map_err(|_| StoreError::closed())
    }

    fn idle(&self) -> MutexGuard<'_, Option<Vec<Connection>>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SqliteBackend {
    /// A backend on the file that the options name.
    ///
    /// A file system that may be another machine's (NFS, SMB, FUSE, 9p, …) is refused when it is opened: SQLite's locks do not hold there. The option
    /// `sqlite_allow_network_fs` (`true` or `false`, the default) allows it, for a folder that is mounted that way and used by this machine alone.
    pub fn new(options: &BackendOptions) -> Self {
        Self::at(&options.db(), options.is_read_only(), options.get(network::ALLOW) == Some("true"))
    }

    fn at(path: &Path, read_only: bool, network: bool) -> Self {
        let (at, foreign) = (Arc::new(Place::new(path)), Arc::<Foreign>::default());
        let follower = Follower::new(Arc::clone(&at), Arc::clone(&foreign));
        let shared = Shared { at, readers: Mutex::new(Some(Vec::new())), turns: Arc::new(Semaphore::new(READERS)) };
        Self {
            shared: Arc::new(shared),
            readers: Readers::new(READERS),
            foreign,
            follower,
            read_only,
            network,
            opened: OnceCell::new(),
        }
    }

    async fn open(&self) -> Result<Opened, StoreError> {
        let process = ProcessInfo::current(SystemClock.now());
        let at = Arc::clone(&self.shared.at);
        self.readers.ask(move || at.refuse_nowhere()).await?;
        if !self.network {
            let at = Arc::clone(&self.shared.at);
            self.readers.ask(move || network::refuse(&at.path)).await?;
        }
        let foreign = Arc::clone(&self.foreign);
        if self.read_only {
            let shared = Arc::clone(&self.shared);
            self.readers
                .ask(move || {
                    let path = &shared.at.path;
                    if open::check(path)? == open::Found::Nothing {
                        let lost = open::known(path)?.and_then(|known| open::lost(path, &known));
                        let why = lost.unwrap_or_else(|| {
                            format!("{}: there is no state yet; open it for writing once, or check the path", path.display())
                        });
                        return Err(StoreError::not_applied(StoreErrorKind::NotFound, why));
                    }
                    let (conn, lasting) = open::open_reader(path)?;
                    open::recheck(&conn, &shared.at.name)?;
                    shared.at.opened();
                    foreign.sent(read::counters(&conn).map_err(|error| verify::with_mend(error, &conn, path))?.0);
                    if lasting && let Some(idle) = shared.idle().as_mut() {
                        idle.push(conn);
                    }
                    Ok(())
                })
                .await?;
            return Ok(Opened { process, writer: None, notice: None });
        }
        let (sender, jobs) = mpsc::unbounded_channel();
        let (reply, opened) = oneshot::channel();
        let (owner, at) = (process.clone(), Arc::clone(&self.shared.at));
        std::thread::Builder::new()
            .name("seeknal-sqlite".to_owned())
            .spawn(move || match Writer::open(at, foreign, &owner) {
                Err(error) => {
                    let _asker_gone = reply.send(Err(error)).is_err();
                }
                Ok((writer, notice)) => {
                    // Who asked and went away left no sender behind: the work ends at once.
                    let _asker_gone = reply.send(Ok(notice)).is_err();
                    writer.work(jobs);
                }
            })
            .map_err(|error| StoreError::io("starting the writer thread", error))?;
        let notice = opened.await.unwrap_or_else(|_| Err(broken()))?;
        Ok(Opened { process, writer: Some(sender), notice })
    }

    fn opened(&self) -> Result<&Opened, StoreError> {
        self.opened.get().ok_or_else(|| {
            StoreError::not_applied(StoreErrorKind::Input, format!("{} is not open; call initialize first", self.shared.at.name))
        })
    }

    fn writer(&self) -> Result<&mpsc::UnboundedSender<Job>, StoreError> {
        self.opened()?.writer.as_ref().ok_or_else(|| {
            StoreError::not_applied(StoreErrorKind::ReadOnly, format!("{} was opened for reading only", self.shared.at.name))
        })
    }

    /// Sends a job and waits for its answer; the job is done even if the waiting stops.
    async fn send<T>(&self, job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.writer()?.send(job(reply)).map_err(|_| StoreError::closed())?;
        answer.await.unwrap_or_else(|_| Err(broken()))
    }

    fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        Box::pin(async move {
            self.opened()?;
            let shared = Arc::clone(&self.shared);
            let turn = shared.turn().await?;
            self.readers
                .ask(move || {
                    // Given back when it is done, also where nobody waits for it any more.
                    let _turn = turn;
                    shared.ask(ask)
                })
                .await
        })
    }
}

/// The writer thread is gone without an answer.
fn broken() -> StoreError {
    StoreError::unknown(StoreErrorKind::Poisoned, "the writer thread of the database has ended; open the state anew")
}

impl StateBackend for SqliteBackend {
    fn name(&self) -> &'static str {
        "sqlite"
    }

    fn location(&self) -> String {
        self.shared.at.name.clone()
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async move {
            if self.shared.idle().is_none() {
                return Err(StoreError::closed());
            }
            let opened = self.opened.get_or_try_init(|| self.open()).await?;
            let mut report = OpenReport::new();
            opened.notice.iter().for_each(|notice| report.notice(notice.clone()));
            Ok(report)
        })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(self.send(|reply| Job::Commit { batch, reply }))
    }

    fn pull_from(&self, source: Weak<dyn BatchSource>) -> Option<Wake> {
        let writer = self.writer().ok()?.clone();
        Some(Box::new(move || match writer.send(Job::Pull(Call::new(&source))) {
            Err(SendError(Job::Pull(call))) => {
                call.take_back();
                false
            }
            sent => sent.is_ok(),
        }))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        let run = run.clone();
        self.ask(move |conn| read::run(conn, &run))
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        let query = query.clamped();
        self.ask(move |conn| read::list(conn, &query))
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        let (at, own) = (Arc::clone(&self.shared.at), self.process().map(|process| process.id));
        self.ask(move |conn| lease::list(conn, &Deaths::new(&at.path, own.as_deref())))
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Rows
    }

    fn lock_poll(&self) -> Duration {
        // A holder that died is known as soon as somebody looks.
        Duration::from_millis(30)
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.opened.get().map(|opened| opened.process.clone())
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        let (at, own) = (Arc::clone(&self.shared.at), self.process());
        Box::pin(async move {
            let turn = self.shared.turn().await?;
            self.readers
                .ask(move || {
                    let _turn = turn;
                    owners::list(&at.path, own.as_ref())
                })
                .await
        })
    }

    fn known_openings(&self) -> KnownOpenings {
        KnownOpenings::OfThisHost
    }

    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        let run = run.clone();
        self.ask(move |conn| read::run_version(conn, &run))
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        let runs = runs.to_vec();
        self.ask(move |conn| runs.iter().map(|run| read::run_version(conn, run)).collect())
    }

    fn newest_versions(&self, most: usize) -> BoxFuture<'_, Result<Vec<(RunId, Version)>, StoreError>> {
        self.ask(move |conn| read::newest_versions(conn, most))
    }

    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        let have = have.clone();
        self.ask(move |conn| reload::run(conn, &have))
    }

    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        let runs = runs.to_vec();
        let read = |conn: &Connection, (id, have): &(RunId, Option<RunState>)| match have {
            Some(have) => reload::run(conn, have),
            None => read::run(conn, id),
        };
        self.ask(move |conn| runs.iter().map(|run| read(conn, run)).collect())
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        Box::pin(async move {
            self.opened()?;
            self.follower.others_committed().await?;
            Ok(ForeignCommits::all())
        })
    }

    fn latest_node<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<(RunId, NodeState)>, StoreError>> {
        let node = node.clone();
        self.ask(move |conn| read::latest_node(conn, &node))
    }

    fn last_success<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<LastSuccess>, StoreError>> {
        let node = node.clone();
        self.ask(move |conn| read::last_success(conn, &node))
    }

    fn count_completed<'a>(&'a self, run: &'a RunId, most: u32) -> BoxFuture<'a, Result<Option<u64>, StoreError>> {
        let run = run.clone();
        self.ask(move |conn| read::count_completed(conn, &run, most).map(Some))
    }

    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        let node = node.clone();
        self.ask(move |conn| read::coverage(conn, &node))
    }

    fn node_ids(&self) -> BoxFuture<'_, Result<BTreeSet<NodeId>, StoreError>> {
        self.ask(read::node_ids)
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        self.ask(read::retained)
    }

    fn highest_token(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.ask(|conn| read::counters(conn).map(|(_, token)| token))
    }

    fn raise_tokens(&self, beyond: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.send(|reply| Job::RaiseTokens { beyond, reply }).await })
    }

    fn checkpoint(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            self.send(|reply| Job::Checkpoint { reply }).await
        })
    }

    fn verify(&self) -> BoxFuture<'_, Result<VerifyReport, StoreError>> {
        let path = self.shared.at.path.clone();
        self.ask(move |conn| verify::verify(conn, &path))
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.follower.close().await;
            // Readers first: the last connection to go, the writer's, tidies up.
            let idle = self.shared.idle().take();
            drop(idle);
            self.readers.end();
            let Some(Opened { writer: Some(writer), .. }) = self.opened.get() else { return Ok(()) };
            let (reply, closed) = oneshot::channel();
            if writer.send(Job::Close { reply }).is_err() {
                return Ok(());
            }
            closed.await.unwrap_or_else(|_| Err(broken()))
        })
    }
}
