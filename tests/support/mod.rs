//! Places for state on every backend, and a backend that lies on demand, through the public trait.
#![allow(dead_code, unused_macros, reason = "every test takes what it needs of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use seeknal_state::model::{Batch, BatchAnswer, BatchId, Entry, Mutation, Outcome, Refusal, Retained, RunPart};
use seeknal_state::store::{BoxFuture, ForeignCommits, LeaseStore, OpenProcess};
use seeknal_state::{
    BackendOptions, Clock, Coordinator, LeaseRecord, MemoryBackend, NewRun, NodeId, NodeUpdate, OpenReport, ProcessInfo, RunId,
    RunPage, RunQuery, RunState, StateBackend, StoreError, StoreErrorKind, SystemClock, Version, create_state_backend,
};
use tokio::sync::{Notify, Semaphore};

#[cfg(feature = "postgres")]
pub(crate) mod postgres;
#[cfg(any(feature = "postgres", feature = "libsql"))]
pub(crate) mod servers;
#[cfg(feature = "libsql")]
pub(crate) mod sqld;

/// Where a database is: what another process must be told so that it opens the same one.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Place {
    pub(crate) folder: Option<PathBuf>,
    pub(crate) url: Option<String>,
    pub(crate) schema: Option<String>,
    /// Who vouches for the server, if the connection is encrypted.
    pub(crate) ca_file: Option<PathBuf>,
}

impl Place {
    pub(crate) fn of_folder(folder: &Path) -> Self {
        Self { folder: Some(folder.to_owned()), ..Self::default() }
    }

    /// A schema that nobody else uses.
    #[cfg(feature = "postgres")]
    pub(crate) fn of_schema(cluster: &postgres::Cluster) -> Self {
        let schema = Some(postgres::fresh_schema());
        Self { url: Some(cluster.url("?sslmode=disable")), schema, ..Self::default() }
    }

    #[cfg(feature = "libsql")]
    pub(crate) fn of_server(server: &sqld::Sqld) -> Self {
        Self { url: Some(server.url()), ..Self::default() }
    }

    pub(crate) fn options(&self) -> BackendOptions {
        let mut options = BackendOptions::new();
        if let Some(folder) = &self.folder {
            options = options.base_path(folder);
        }
        if let Some(url) = &self.url {
            options = options.database_url(url);
        }
        if let Some(schema) = &self.schema {
            options = options.set("database_schema", schema);
        }
        if let Some(ca_file) = &self.ca_file {
            options = options.set("database_ca_file", ca_file.to_string_lossy());
        }
        options
    }
}

/// A place for state, of one of the built-in backends.
pub(crate) struct Store {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) backend: &'static str,
    pub(crate) place: Place,
    #[cfg(feature = "libsql")]
    server: Option<sqld::Sqld>,
}

impl Store {
    pub(crate) fn of(backend: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::of_folder(folder.path());
        Self {
            folder,
            backend,
            place,
            #[cfg(feature = "libsql")]
            server: None,
        }
    }

    /// A libSQL server of its own; `None` where servers are left out.
    #[cfg(feature = "libsql")]
    pub(crate) fn on_libsql() -> Option<Self> {
        let server = sqld::Sqld::start()?;
        let place = Place::of_server(&server);
        Some(Self { place, server: Some(server), ..Self::of("database") })
    }

    /// A schema on the server of this process; `None` where servers are left out.
    #[cfg(feature = "postgres")]
    pub(crate) fn on_postgres() -> Option<Self> {
        let place = Place::of_schema(postgres::cluster()?);
        Some(Self { place, ..Self::of("database") })
    }

    /// Whether it is on this machine: then a process that died is known to be dead at once.
    pub(crate) fn is_local(&self) -> bool {
        self.place.url.is_none()
    }

    pub(crate) fn backend(&self) -> Arc<dyn StateBackend> {
        create_state_backend(self.backend, &self.place.options()).unwrap()
    }

    pub(crate) async fn open(&self) -> Coordinator {
        Coordinator::open(self.backend()).await.unwrap()
    }
}

macro_rules! on_every_backend {
    ($($case:ident),+ $(,)?) => {
        on_every_backend!(@ memory "memory": $($case),+);
        on_every_backend!(@ file "file": $($case),+);
        on_every_backend!(@ sqlite "database": $($case),+);
        #[cfg(feature = "postgres")]
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    if let Some(store) = crate::support::Store::on_postgres() {
                        super::$case(store).await;
                    }
                }
            )+
        }
        #[cfg(feature = "libsql")]
        mod libsql {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    if let Some(store) = crate::support::Store::on_libsql() {
                        super::$case(store).await;
                    }
                }
            )+
        }
    };
    (@ $module:ident $name:literal: $($case:ident),+) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(crate::support::Store::of($name)).await;
                }
            )+
        }
    };
}

/// The same on every database that several processes may share.
macro_rules! on_every_database {
    ($($case:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(crate::support::Store::of("database")).await;
                }
            )+
        }
        #[cfg(feature = "postgres")]
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    if let Some(store) = crate::support::Store::on_postgres() {
                        super::$case(store).await;
                    }
                }
            )+
        }
        #[cfg(feature = "libsql")]
        mod libsql {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    if let Some(store) = crate::support::Store::on_libsql() {
                        super::$case(store).await;
                    }
                }
            )+
        }
    };
}

/// What happens to the next commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// It is applied, and the answer is lost.
    AnswerLost,
    /// It is applied, and the answer waits at the gate.
    AnswerLate,
    /// It is not applied, and nobody knows.
    NeverArrived,
    /// It is refused by storage: nothing happened.
    Full,
    /// The backend's code panics.
    Panic,
    /// It is applied, and then the backend's code panics.
    LatePanic,
    /// It answers too few outcomes.
    TooFew,
    /// All but its last entry are applied, and that is refused.
    LastRefused,
}

/// A memory backend behind a gate, with lies to tell.
#[derive(Debug)]
pub(crate) struct LyingBackend {
    pub(crate) inner: MemoryBackend,
    pub(crate) lies: Mutex<VecDeque<Lie>>,
    pub(crate) sent: Mutex<Vec<BatchId>>,
    /// One permit a commit; open by default.
    pub(crate) gate: Semaphore,
    pub(crate) gated: AtomicBool,
    pub(crate) shared: bool,
    /// How many batches it takes at once, of a coordinator that is opened from now on.
    pub(crate) lines: AtomicUsize,
    pub(crate) commits: AtomicUsize,
    /// How often a run was loaded.
    pub(crate) loads: AtomicUsize,
    /// Loads wait while somebody holds this for writing.
    pub(crate) loading: tokio::sync::RwLock<()>,
    /// Whether what they wait with was read before.
    pub(crate) late: AtomicBool,
    /// Whether loads fail, for good.
    pub(crate) unreadable: AtomicBool,
    /// Whether the next load panics.
    pub(crate) broken: AtomicBool,
    /// A node that storage cannot take: a batch that writes it fails whole.
    pub(crate) unwritable: Mutex<Option<NodeId>>,
    /// A run that somebody deletes, keeping its coverage, as soon as it was read what outlives runs.
    pub(crate) doomed: Mutex<Option<RunId>>,
    /// A run to which another process writes whenever somebody asks for its version, just before he is answered.
    pub(crate) rushed: Mutex<Option<RunId>>,
    /// How many runs it was asked for the versions of, by name.
    pub(crate) asked: AtomicUsize,
    /// How often it was asked for those of the newest runs, whose answers wait while somebody holds the other for writing.
    pub(crate) looks: AtomicUsize,
    pub(crate) looking: tokio::sync::RwLock<()>,
    /// Another process committed, if this is told.
    pub(crate) foreign: Notify,
    pub(crate) following: Mutex<Following>,
}

/// What it says of other processes' commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Following {
    /// Whatever was told.
    #[default]
    Honest,
    /// Nothing at all.
    Silent,
    /// That there is always something new.
    Storm,
    /// That it cannot be known.
    Failing,
    /// Its answers do not come.
    Hanging,
}

impl LyingBackend {
    pub(crate) fn new(shared: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryBackend::new(),
            lies: Mutex::default(),
            sent: Mutex::default(),
            gate: Semaphore::new(0),
            gated: AtomicBool::new(false),
            shared,
            lines: AtomicUsize::new(1),
            commits: AtomicUsize::new(0),
            loads: AtomicUsize::new(0),
            loading: tokio::sync::RwLock::default(),
            late: AtomicBool::new(false),
            unreadable: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            unwritable: Mutex::default(),
            doomed: Mutex::default(),
            rushed: Mutex::default(),
            asked: AtomicUsize::new(0),
            looks: AtomicUsize::new(0),
            looking: tokio::sync::RwLock::default(),
            foreign: Notify::new(),
            following: Mutex::default(),
        })
    }

    pub(crate) fn tell(&self, lies: impl IntoIterator<Item = Lie>) {
        self.lies.lock().unwrap().extend(lies);
    }

    pub(crate) fn follow(&self, following: Following) {
        *self.following.lock().unwrap() = following;
        self.foreign.notify_one();
    }

    pub(crate) fn close_gate(&self) {
        self.gated.store(true, Ordering::SeqCst);
    }

    pub(crate) fn open_gate(&self) {
        self.gated.store(false, Ordering::SeqCst);
        self.gate.add_permits(10_000);
    }

    /// What another process does: writes a row of a run, on whatever version it is.
    pub(crate) async fn write_as_another(&self, run: &str, node: &str, update: NodeUpdate) {
        self.write_all_as_another(run, &[(node, update)]).await;
    }

    /// As [`write_as_another`](Self::write_as_another), some rows in one commit.
    pub(crate) async fn write_all_as_another(&self, run: &str, rows: &[(&str, NodeUpdate)]) {
        let run = RunId::new(run).unwrap();
        let now = self.inner.load_run(&run).await.unwrap().unwrap();
        let set = |(node, update): &(&str, NodeUpdate)| Mutation::SetNode {
            node: NodeId::new(*node).unwrap(),
            update: Box::new(update.clone()),
            at: SystemClock.now(),
        };
        let (base, expect) = (now.version(), now.version());
        let parts = vec![RunPart { run, base, expect, guards: vec![], mutations: rows.iter().map(set).collect(), after: None }];
        let answer = self.inner.commit(Arc::new(Batch::new(vec![Entry { parts, ..Entry::default() }]))).await.unwrap();
        assert!(matches!(answer.outcomes.as_slice(), [Outcome::Applied(_)]), "{answer:?}");
    }

    /// What another process does: deletes a run, and makes one of the same name.
    pub(crate) async fn remake_as_another(&self, run: &str) {
        let run = RunId::new(run).unwrap();
        let known = self.inner.run_version(&run).await.unwrap().unwrap();
        let delete = Mutation::Delete { keep_coverage: false };
        let create = Mutation::Create { run: NewRun::running(), at: SystemClock.now() };
        for (version, mutation) in [(known, delete), (Version::NONE, create)] {
            let (run, base, expect) = (run.clone(), version, version);
            let parts = vec![RunPart { run, base, expect, guards: vec![], mutations: vec![mutation], after: None }];
            let answer = self.inner.commit(Arc::new(Batch::new(vec![Entry { parts, ..Entry::default() }]))).await.unwrap();
            assert!(matches!(answer.outcomes.as_slice(), [Outcome::Applied(_)]), "{answer:?}");
        }
    }

    /// Waits until so many commits have arrived at the backend.
    pub(crate) async fn arrived(&self, commits: usize) {
        while self.commits.load(Ordering::SeqCst) < commits {
            tokio::task::yield_now().await;
        }
    }
}

impl StateBackend for LyingBackend {
    fn name(&self) -> &'static str {
        "lying"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.inner.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            self.commits.fetch_add(1, Ordering::SeqCst);
            self.sent.lock().unwrap().push(batch.id);
            if self.gated.load(Ordering::SeqCst) {
                self.gate.acquire().await.unwrap().forget();
            }
            if let Some(node) = &*self.unwritable.lock().unwrap() {
                let mut mutations = batch.entries.iter().flat_map(|entry| &entry.parts).flat_map(|part| &part.mutations);
                if mutations.any(|mutation| mutation.node() == Some(node)) {
                    return Err(StoreError::not_applied(StoreErrorKind::Input, format!("{node} is too large")).of_one_entry());
                }
            }
            let lie = self.lies.lock().unwrap().pop_front();
            match lie {
                None => self.inner.commit(batch).await,
                Some(Lie::AnswerLost) => {
                    self.inner.commit(batch).await?;
                    Err(StoreError::unknown(StoreErrorKind::Unavailable, "the answer was lost"))
                }
                Some(Lie::AnswerLate) => {
                    let answer = self.inner.commit(batch).await;
                    self.gate.acquire().await.unwrap().forget();
                    answer
                }
                Some(Lie::NeverArrived) => Err(StoreError::unknown(StoreErrorKind::Unavailable, "no answer")),
                Some(Lie::Full) => Err(StoreError::not_applied(StoreErrorKind::Full, "no space left")),
                Some(Lie::Panic) => panic!("the backend's own fault"),
                Some(Lie::LatePanic) => {
                    self.inner.commit(batch).await?;
                    panic!("the backend's own fault")
                }
                Some(Lie::TooFew) => Ok(BatchAnswer { outcomes: Vec::new() }),
                Some(Lie::LastRefused) => {
                    let mut entries = batch.entries.clone();
                    let run = entries.pop().and_then(|last| last.parts.into_iter().next()).unwrap().run;
                    let mut answer = self.inner.commit(Arc::new(Batch::new(entries))).await?;
                    answer.outcomes.push(Outcome::Refused(Refusal::RunNotFound { run }));
                    Ok(answer)
                }
            }
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            assert!(!self.broken.swap(false, Ordering::SeqCst), "the backend's own fault");
            let read = if self.late.load(Ordering::SeqCst) { Some(self.inner.load_run(run).await) } else { None };
            let _open = self.loading.read().await;
            if self.unreadable.load(Ordering::SeqCst) {
                return Err(StoreError::not_applied(StoreErrorKind::Corrupt, "nobody can read it"));
            }
            match read {
                Some(read) => read,
                None => self.inner.load_run(run).await,
            }
        })
    }

    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        Box::pin(async move {
            let read = if self.late.load(Ordering::SeqCst) { Some(self.inner.reload_runs(runs).await) } else { None };
            self.loads.fetch_add(runs.len(), Ordering::SeqCst);
            let _open = self.loading.read().await;
            if self.unreadable.load(Ordering::SeqCst) {
                return Err(StoreError::not_applied(StoreErrorKind::Corrupt, "nobody can read them"));
            }
            match read {
                Some(read) => read,
                None => self.inner.reload_runs(runs).await,
            }
        })
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        Box::pin(async move {
            let following = *self.following.lock().unwrap();
            match following {
                Following::Honest => self.foreign.notified().await,
                Following::Silent | Following::Hanging => std::future::pending().await,
                Following::Storm => {}
                Following::Failing => return Err(StoreError::not_applied(StoreErrorKind::Unavailable, "the line is dead")),
            }
            Ok(ForeignCommits::all())
        })
    }

    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        Box::pin(async move {
            if self.rushed.lock().unwrap().as_ref() == Some(run) {
                self.write_as_another(run.as_str(), "theirs", NodeUpdate::running()).await;
            }
            Ok(self.load_run(run).await?.map(|state| state.version()))
        })
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        Box::pin(async move {
            let following = *self.following.lock().unwrap();
            match following {
                Following::Failing => return Err(StoreError::not_applied(StoreErrorKind::Unavailable, "the line is dead")),
                Following::Hanging => std::future::pending().await,
                _ => {}
            }
            self.asked.fetch_add(runs.len(), Ordering::SeqCst);
            let mut versions = Vec::new();
            for run in runs {
                versions.push(self.inner.run_version(run).await?);
            }
            Ok(versions)
        })
    }

    fn newest_versions(&self, most: usize) -> BoxFuture<'_, Result<Vec<(RunId, Version)>, StoreError>> {
        Box::pin(async move {
            let newest = self.inner.newest_versions(most).await;
            self.looks.fetch_add(1, Ordering::SeqCst);
            let _open = self.looking.read().await;
            newest
        })
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.inner.list_runs(query)
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        Box::pin(async move {
            let retained = self.inner.retained().await?;
            let doomed = self.doomed.lock().unwrap().take();
            if let Some(run) = doomed {
                let now = self.inner.load_run(&run).await?.unwrap();
                let (base, expect) = (now.version(), now.version());
                let mutations = vec![Mutation::Delete { keep_coverage: true }];
                let parts = vec![RunPart { run, base, expect, guards: vec![], mutations, after: None }];
                self.inner.commit(Arc::new(Batch::new(vec![Entry { parts, ..Entry::default() }]))).await?;
            }
            Ok(retained)
        })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.inner.list_leases()
    }

    fn flush_shards(&self) -> usize {
        self.lines.load(Ordering::SeqCst)
    }

    fn lease_store(&self) -> LeaseStore {
        self.inner.lease_store()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.inner.reserve_tokens(count)
    }

    fn is_shared(&self) -> bool {
        self.shared
    }

    fn process(&self) -> Option<ProcessInfo> {
        self.inner.process()
    }

    fn processes(&self) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        self.inner.processes()
    }
}
