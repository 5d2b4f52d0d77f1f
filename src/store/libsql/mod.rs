//! Turso and other libSQL servers, `libsql://…` and `http://…`: one HTTP request for a batch, any number of processes on any number of machines.
//!
//! - `url`: `database_url`, and where its token goes; `client`, `piecemeal`, `hrana`, `send`: connections, the protocol, what failures mean; `fault`: their classes.
//! - `schema`: tables. `rows`: how values are stored; `garbled`: text that is none. `read`, `read_nodes`: everything that is asked; `lease`: locks;
//!   `openings`: who has it open; `verify`: checks.
//! - `commit`: how a batch is decided and sent; `facts`: the rows that it is decided on; `cache`: what is known of them; `write`, `write_leases`, `write_runs`: the request;
//!   `answer`: what is kept of it.
//!
//! A libSQL server runs SQLite with `synchronous=NORMAL`: what it has acknowledged survives the death of the server's process; whether it
//! survives a power cut is the server's business (Turso's cloud keeps copies; a server of your own may lose the last commits).

mod answer;
mod cache;
mod client;
mod commit;
mod facts;
#[cfg(test)]
mod fake;
mod fault;
mod garbled;
mod hrana;
mod lease;
mod list;
mod openings;
mod piecemeal;
mod read;
mod read_nodes;
mod rows;
mod schema;
mod send;
mod url;
mod verify;
mod write;
mod write_leases;
mod write_runs;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::OnceCell;

use self::client::Client;
use self::commit::Committer;
use self::url::{TOKEN_OPTION, Target};
use super::{
    BackendOptions, BoxFuture, ForeignCommits, KnownOpenings, LeaseStore, OpenProcess, OpenReport, StateBackend, StoreError,
    StoreErrorKind, VerifyReport, one_moment,
};
use crate::model::{
    Batch, BatchAnswer, Clock, LastSuccess, LeaseOwner, LeaseRecord, NodeCoverage, NodeId, NodeState, ProcessInfo, Retained,
    RunId, RunPage, RunQuery, RunState, SystemClock, Version,
};

/// The option that names the authorities of an encrypted server.
const CA_OPTION: &str = "database_ca_file";

/// How often the server is asked whether others have committed.
const POLL: Duration = Duration::from_millis(50);

/// The libSQL backend. Nothing is connected before [`initialize`](StateBackend::initialize).
///
/// Options beside `database_url`: `database_token` (instead of the environment variable `SEEKNAL_DATABASE_TOKEN`; either is refused beside a token in the
/// URL), `database_ca_file` (a PEM file of authorities that may vouch for the server, instead of the public ones; or `SEEKNAL_DATABASE_CA_FILE`),
/// `database_poll_ms` (how often the server is asked for commits of others while somebody follows; 50 by default, 10 to 60,000). A token or a file that is
/// blank counts as not set.
pub struct LibsqlBackend {
    target: Target,
    read_only: bool,
    poll: Duration,
    opened: OnceCell<Opened>,
    closed: AtomicBool,
    /// Whether the tables that were asked last do not say who has them open: those of an older version, which an opening for reading leaves as they are.
    openings_unknown: AtomicBool,
    gone: openings::Gone,
}

#[derive(Debug)]
struct Opened {
    client: Arc<Client>,
    committer: Arc<Committer>,
    process: ProcessInfo,
    /// None where the opening is not registered.
    keeper: Option<openings::Keeper>,
}

impl fmt::Debug for LibsqlBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibsqlBackend")
            .field("location", &self.target.location())
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

impl LibsqlBackend {
    /// A backend on the server that the options' `database_url` names.
    ///
    /// # Errors
    /// [`StoreErrorKind::Input`] if the URL or one of the options beside it makes no sense. The error shows neither the URL nor its token.
    pub fn new(options: &BackendOptions) -> Result<Self, StoreError> {
        let input = |why: &str| StoreError::not_applied(StoreErrorKind::Input, why);
        let url = options.url().ok_or_else(|| input("database_url is missing; write libsql://TOKEN@HOST"))?;
        let token = options.setting(TOKEN_OPTION)?;
        let ca_file = options.setting(CA_OPTION)?;
        let mut target =
            Target::parse(url, token, ca_file.as_ref().filter(|file| file.place == CA_OPTION).map(|file| &*file.text))?;
        // A variable is there for other servers too: where nothing is encrypted it is no contradiction.
        if target.tls && target.ca_file.is_none() {
            target.ca_file = ca_file.map(|file| PathBuf::from(file.text));
        }
        let poll = match options.get("database_poll_ms") {
            None => POLL,
            Some(text) => {
                let ms = text.parse().ok().filter(|ms| (10..=60_000).contains(ms));
                Duration::from_millis(ms.ok_or_else(|| input("database_poll_ms is no number of milliseconds from 10 to 60000"))?)
            }
        };
        Ok(Self {
            target,
            read_only: options.is_read_only(),
            poll,
            opened: OnceCell::new(),
            closed: AtomicBool::new(false),
            openings_unknown: AtomicBool::new(false),
            gone: openings::Gone::default(),
        })
    }

    async fn open(&self) -> Result<Opened, StoreError> {
        let client = Arc::new(Client::new(&self.target)?);
        schema::prepare(&client, self.read_only).await?;
        let process = ProcessInfo::current(SystemClock.now());
        let nobody = LeaseOwner { process: process.clone(), name: "".into() };
        let committer = Arc::new(Committer::new(Arc::clone(&client), nobody));
        committer.begin().await?;
        let registered = !self.read_only && openings::register(&client, &process).await?;
        let keeper = registered.then(|| openings::Keeper::start(&client, &process));
        Ok(Opened { client, committer, process, keeper })
    }

    fn opened(&self) -> Result<&Opened, StoreError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(StoreError::closed());
        }
        self.opened.get().ok_or_else(|| {
            let place = self.target.location();
            StoreError::not_applied(StoreErrorKind::Input, format!("{place} is not open; call initialize first"))
        })
    }

    fn client(&self) -> Result<&Client, StoreError> {
        self.opened().map(|opened| &*opened.client)
    }

    fn heard(&self, found: Option<Vec<openings::Heard>>) -> Vec<OpenProcess> {
        self.openings_unknown.store(found.is_none(), Ordering::Release);
        self.gone.judge(found.unwrap_or_default())
    }

    fn remember(&self, state: Option<&RunState>, run: &RunId) {
        let Some(opened) = self.opened.get() else { return };
        match state {
            Some(state) => opened.committer.cache.put(state.clone()),
            None => opened.committer.cache.forget(run),
        }
    }
}

impl StateBackend for LibsqlBackend {
    fn name(&self) -> &'static str {
        "libsql"
    }

    fn location(&self) -> String {
        self.target.location()
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async move {
            self.opened.get_or_try_init(|| self.open()).await?;
            Ok(OpenReport::new())
        })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(async move {
            let opened = self.opened()?;
            if self.read_only {
                let place = self.target.location();
                return Err(StoreError::not_applied(StoreErrorKind::ReadOnly, format!("{place} was opened for reading only")));
            }
            let committer = Arc::clone(&opened.committer);
            let committed = opened.client.beside(async move { committer.commit(&batch).await }).await;
            committed.unwrap_or_else(|| Err(StoreError::unknown(StoreErrorKind::Unavailable, "a commit was cut off")))
        })
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async move {
            let state = read::run(self.client()?, run).await?;
            self.remember(state.as_ref(), run);
            Ok(state)
        })
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async move { list::list(self.client()?, &query.clamped()).await })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        Box::pin(async move { lease::list(self.client()?).await })
    }

    fn lease_store(&self) -> LeaseStore {
        LeaseStore::Rows
    }

    fn highest_token(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move { read::token(self.client()?).await })
    }

    fn raise_tokens(&self, beyond: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.opened()?.committer.raise_tokens(beyond).await })
    }

    // One: the server has one place for a writer, and what queues there is lost to batching here (one writer reached 695 transactions a second, 32
    // of them 500).
    fn flush_shards(&self) -> usize {
        1
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
        Box::pin(async move { Ok(self.heard(openings::list(self.client()?).await?)) })
    }

    fn watch_processes(&self, who: BTreeSet<String>) -> BoxFuture<'_, Result<Vec<OpenProcess>, StoreError>> {
        Box::pin(async move { Ok(self.heard(openings::watch(self.client()?, &self.gone, &who).await?)) })
    }

    fn known_openings(&self) -> KnownOpenings {
        if self.openings_unknown.load(Ordering::Acquire) { KnownOpenings::Some } else { KnownOpenings::All }
    }

    fn reload_run<'a>(&'a self, have: &'a RunState) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async move {
            let state = read::reload(self.client()?, have).await?;
            self.remember(state.as_ref(), have.id());
            Ok(state)
        })
    }

    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        Box::pin(async move {
            let known: Option<Vec<&RunState>> = runs.iter().map(|(_, have)| have.as_ref()).collect();
            if let Some(known) = known
                && let Some(states) = read::reload_all(self.client()?, &known).await?
            {
                return Ok(states);
            }
            one_moment::reload_runs(self, runs).await
        })
    }

    fn run_version<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<Version>, StoreError>> {
        Box::pin(async move { Ok(read::versions(self.client()?, std::slice::from_ref(run)).await?.pop().flatten()) })
    }

    fn run_versions<'a>(&'a self, runs: &'a [RunId]) -> BoxFuture<'a, Result<Vec<Option<Version>>, StoreError>> {
        Box::pin(async move { read::versions(self.client()?, runs).await })
    }

    fn newest_creation(&self, before: Option<DateTime<Utc>>) -> BoxFuture<'_, Result<Option<DateTime<Utc>>, StoreError>> {
        Box::pin(async move { read::newest_creation(self.client()?, before).await })
    }

    fn newest_versions(&self, most: usize) -> BoxFuture<'_, Result<Vec<(RunId, Version)>, StoreError>> {
        // Every row that is read crosses the network, and is counted by who runs the server.
        Box::pin(async move { read::newest_versions(self.client()?, most.min(1_000)).await })
    }

    fn others_committed(&self) -> BoxFuture<'_, Result<ForeignCommits, StoreError>> {
        Box::pin(async move {
            let opened = self.opened()?;
            opened.committer.follow.others(&opened.client, self.poll).await?;
            Ok(ForeignCommits::all())
        })
    }

    fn latest_node<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<(RunId, NodeState)>, StoreError>> {
        Box::pin(async move { read_nodes::latest_node(self.client()?, node).await })
    }

    fn last_success<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<Option<LastSuccess>, StoreError>> {
        Box::pin(async move { read_nodes::last_success(self.client()?, node).await })
    }

    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        Box::pin(async move { read_nodes::coverage(self.client()?, node).await })
    }

    fn node_ids(&self) -> BoxFuture<'_, Result<BTreeSet<NodeId>, StoreError>> {
        Box::pin(async move { read_nodes::node_ids(self.client()?).await })
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        Box::pin(async move { read_nodes::retained(self.client()?).await })
    }

    fn verify(&self) -> BoxFuture<'_, Result<VerifyReport, StoreError>> {
        Box::pin(async move { verify::verify(self.client()?).await })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let closed_before = self.closed.swap(true, Ordering::AcqRel);
            // Who sent before is served.
            if let Some(opened) = self.opened.get().filter(|_| !closed_before) {
                opened.committer.settle().await;
                if let Some(keeper) = &opened.keeper {
                    keeper.end().await;
                    openings::leave(&opened.client, &opened.process, opened.committer.last()).await;
                }
                opened.client.stop();
            }
            Ok(())
        })
    }
}
