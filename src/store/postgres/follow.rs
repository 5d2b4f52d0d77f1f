//! Following the commits of other openings: a task with a connection of its own, which listens, and tells others what this opening committed.
//!
//! ```text
//! commit ──committed(runs)──► [gathered] ──► NOTIFY seeknal_<schema>, {"w":"<opening>","r":[runs],"l":leases}
//! others' NOTIFY ───────────► [pending] ──► others_committed()
//! every second: did the commit sequence move? then anything may have changed (whoever committed may have died before it told)
//! ```
//!
//! NOTIFY is sent after the commit, not in it: inside, the server takes one lock for the whole cluster until the commit is on disk, and batches could not
//! be synced together any more. While nobody else has the state open nothing is sent.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_postgres::Notification;

use super::connection::{Conn, Pool, Sql};
use super::openings::{self, Contact, Lock};
use super::rows::Fields;
use crate::model::{ProcessInfo, RunId};
use crate::store::boot_time::boot_time;
use crate::store::{ForeignCommits, StoreError};

/// Between two looks at the commit sequence.
const LOOK: Duration = Duration::from_secs(1);

/// Between two times that this opening says that it lives.
const SAY: Duration = Duration::from_secs(5);

/// The first pause before a lost connection is made again; it doubles up to [`LOOK`].
const PAUSE: Duration = Duration::from_millis(50);

/// A notification's longest text; PostgreSQL takes a little less than 8,000 bytes.
const MOST_BYTES: usize = 7_500;

/// Runs whose names are kept until somebody takes them.
const MOST_NAMES: usize = 100_000;

/// What an opening tells others.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    /// Who tells it.
    w: String,
    /// The runs; none: it is not said which.
    r: Option<Vec<RunId>>,
    /// Whether leases changed.
    l: bool,
}

/// What was gathered and not passed on yet.
#[derive(Debug, Default)]
struct Gathered {
    runs: BTreeSet<RunId>,
    /// Whether runs may have changed that are not among them.
    unnamed: bool,
    leases: bool,
    error: Option<StoreError>,
}

impl Gathered {
    fn add(&mut self, runs: Option<impl IntoIterator<Item = RunId>>, leases: bool) {
        match runs {
            None => self.unnamed = true,
            Some(more) => self.runs.extend(more),
        }
        if self.runs.len() > MOST_NAMES {
            self.runs.clear();
            self.unnamed = true;
        }
        self.leases |= leases;
    }

    fn all(&mut self) {
        self.add(None::<BTreeSet<RunId>>, true);
    }

    fn is_empty(&self) -> bool {
        self.runs.is_empty() && !self.unnamed && !self.leases
    }

    /// What is passed on next: names first, whatever else there may be. Of runs that nobody names only the newest are found.
    fn take(&mut self) -> Option<ForeignCommits> {
        if !self.runs.is_empty() {
            let leases = std::mem::take(&mut self.leases);
            return Some(ForeignCommits::of(std::mem::take(&mut self.runs), leases));
        }
        if std::mem::take(&mut self.unnamed) {
            let leases = std::mem::take(&mut self.leases);
            return Some(ForeignCommits { leases, ..ForeignCommits::all() });
        }
        std::mem::take(&mut self.leases).then(|| ForeignCommits::of([], true))
    }

    /// What is told to others, in as many pieces as it takes.
    fn words(&self, who: &str) -> Vec<String> {
        let words = |r: Option<Vec<RunId>>, l: bool| serde_json::to_string(&Told { w: who.to_owned(), r, l }).unwrap_or_default();
        let room = MOST_BYTES.saturating_sub(words(Some(Vec::new()), false).len());
        let (mut told, mut unnamed) = (Vec::new(), self.unnamed);
        let (mut piece, mut bytes) = (Vec::new(), 0_usize);
        for run in &self.runs {
            let more = serde_json::to_string(run).map_or(usize::MAX, |text| text.len().saturating_add(1));
            if more > room {
                unnamed = true;
                continue;
            }
            if bytes.saturating_add(more) > room {
                told.push(words(Some(std::mem::take(&mut piece)), false));
                bytes = 0;
            }
            bytes = bytes.saturating_add(more);
            piece.push(run.clone());
        }
        if !piece.is_empty() || self.leases {
            told.push(words(Some(piece), self.leases));
        }
        if unnamed {
            told.push(words(None, false));
        }
        told
    }
}

/// The follower of one opening.
#[derive(Debug)]
pub(super) struct Follower {
    process: ProcessInfo,
    /// Commits of others, for whoever waits.
    pending: Mutex<Gathered>,
    arrived: Notify,
    /// Commits of this opening, to be told.
    outgoing: Mutex<Gathered>,
    sent: Notify,
    /// Whether anybody else has the state open.
    accompanied: AtomicBool,
    contact: Contact,
    closed: AtomicBool,
}

fn locked(gathered: &Mutex<Gathered>) -> MutexGuard<'_, Gathered> {
    gathered.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Follower {
    pub(super) fn new(process: &ProcessInfo) -> Self {
        Self {
            process: process.clone(),
            pending: Mutex::default(),
            arrived: Notify::new(),
            outgoing: Mutex::default(),
            sent: Notify::new(),
            accompanied: AtomicBool::new(true),
            contact: Contact::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// Since when the server answers.
    pub(super) fn contact(&self) -> &Contact {
        &self.contact
    }

    /// This opening has committed something.
    pub(super) fn committed(&self, runs: BTreeSet<RunId>, leases: bool) {
        if self.accompanied.load(Ordering::Acquire) && (leases || !runs.is_empty()) {
            locked(&self.outgoing).add(Some(runs), leases);
            self.sent.notify_one();
        }
    }

    /// Waits until another opening may have committed.
    pub(super) async fn others_committed(&self) -> Result<ForeignCommits, StoreError> {
        loop {
            if self.closed.load(Ordering::Acquire) {
                return Err(StoreError::closed());
            }
            {
                let mut pending = locked(&self.pending);
                if let Some(error) = pending.error.take() {
                    return Err(error);
                }
                if let Some(news) = pending.take() {
                    return Ok(news);
                }
            }
            self.arrived.notified().await;
        }
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.sent.notify_one();
        self.arrived.notify_one();
    }

    /// Works until it is closed. The first connection is made already.
    pub(super) async fn work(self: Arc<Self>, pool: Arc<Pool>, lock: Lock, first: Listening) {
        let mut listening = Some(first);
        let mut pause = PAUSE;
        let mut said = Instant::now();
        while !self.closed.load(Ordering::Acquire) {
            let made = match listening.take() {
                Some(made) => Ok(made),
                None => self.listen_again(&pool, lock).await,
            };
            let error = match made {
                Ok(mut made) => {
                    pause = PAUSE;
                    let ended = self.listen(&mut made, lock).await;
                    said = made.said;
                    match ended {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            // Anything may happen until somebody listens again.
            {
                let mut pending = locked(&self.pending);
                pending.all();
                pending.error = Some(error);
            }
            self.arrived.notify_one();
            if !pool.place.read_only && said.elapsed() >= SAY && self.say(&pool, lock).await.is_ok() {
                said = Instant::now();
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2).min(LOOK);
        }
    }

    /// Listens once more. What was committed while nobody listened was told by nobody.
    async fn listen_again(&self, pool: &Pool, lock: Lock) -> Result<Listening, StoreError> {
        let mut made = Listening::start(pool, lock, &self.process).await?;
        made.moved = true;
        self.anything();
        Ok(made)
    }

    /// Says that this opening lives, over a connection that is there for others: it does not depend on one that listens.
    async fn say(&self, pool: &Pool, lock: Lock) -> Result<(), StoreError> {
        let mut conn = pool.get().await?;
        openings::say(&mut conn, &self.process, lock).await?;
        pool.put(conn);
        Ok(())
    }

    /// Anything may have changed.
    fn anything(&self) {
        locked(&self.pending).all();
        self.arrived.notify_one();
    }

    /// Listens and tells, until it is closed or the connection fails.
    async fn listen(&self, listening: &mut Listening, lock: Lock) -> Result<(), StoreError> {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.closed.load(Ordering::Acquire) {
                return Ok(());
            }
            tokio::select! {
                told = listening.inbox.recv() => match told {
                    Some(notification) => self.hear(notification.payload()),
                    None => return self.look(listening, lock).await,
                },
                () = self.sent.notified() => self.tell(&mut listening.conn).await?,
                _ = looks.tick() => self.look(listening, lock).await?,
            }
        }
    }

    fn hear(&self, payload: &str) {
        let told: Option<Told> = serde_json::from_str(payload).ok();
        let mut pending = locked(&self.pending);
        match told {
            Some(told) if *told.w == *self.process.id => return,
            Some(told) => {
                self.accompanied.store(true, Ordering::Release);
                if told.r.as_ref().is_some_and(Vec::is_empty) && !told.l {
                    // Somebody says that he is there.
                    return;
                }
                pending.add(told.r, told.l);
            }
            // A newer version says it in other words.
            None => pending.all(),
        }
        drop(pending);
        self.arrived.notify_one();
    }

    async fn tell(&self, conn: &mut Conn) -> Result<(), StoreError> {
        let told = std::mem::take(&mut *locked(&self.outgoing));
        if told.is_empty() {
            return Ok(());
        }
        let said = notify(conn, told.words(&self.process.id)).await;
        if said.is_err() {
            // Said by the next connection; twice does no harm.
            let mut outgoing = locked(&self.outgoing);
            outgoing.unnamed |= told.unnamed;
            outgoing.add(Some(told.runs), told.leases);
            self.sent.notify_one();
        }
        said
    }

    async fn look(&self, listening: &mut Listening, lock: Lock) -> Result<(), StoreError> {
        if !listening.read_only && listening.said.elapsed() >= SAY {
            openings::say(&mut listening.conn, &self.process, lock).await?;
            listening.said = Instant::now();
        }
        let seq = commit_seq(&mut listening.conn, listening.read_only).await?;
        self.contact.answered(boot_time());
        let accompanied = openings::count(&mut listening.conn, lock).await? > 1;
        self.accompanied.store(accompanied, Ordering::Release);
        // Who drew a number commits only after that: what was looked at meanwhile is told once more.
        let moved = std::mem::replace(&mut listening.seq, seq) != seq;
        if std::mem::replace(&mut listening.moved, moved) || moved {
            self.anything();
        }
        Ok(())
    }
}

/// The number of the last commit. At a standby, which knows of sequences only every so many numbers, how far it has followed the primary: that moves with every
/// commit, and with more.
async fn commit_seq(conn: &mut Conn, read_only: bool) -> Result<i64, StoreError> {
    const PLACE: &str = "the commit sequence";
    let sql = if read_only {
        "SELECT CASE WHEN pg_is_in_recovery() THEN (pg_last_wal_replay_lsn() - '0/0')::bigint WHEN is_called THEN last_value ELSE 0 END \
         FROM commit_seq"
    } else {
        "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM commit_seq"
    };
    let rows = conn.ask(Sql::new(PLACE, sql, Vec::new())).await?;
    rows.first().map_or(Ok(0), |row| Fields::new(row, PLACE).get(0))
}

async fn is_standby(conn: &mut Conn) -> Result<bool, StoreError> {
    const PLACE: &str = "whether the server is a standby";
    let rows = conn.ask(Sql::new(PLACE, "SELECT pg_is_in_recovery()", Vec::new())).await?;
    rows.first().map_or(Ok(false), |row| Fields::new(row, PLACE).get(0))
}

/// A connection that listens.
pub(super) struct Listening {
    conn: Conn,
    inbox: mpsc::UnboundedReceiver<Notification>,
    /// The commit sequence when it was looked at last: first when this began, so that nothing falls between.
    seq: i64,
    /// Whether it had moved then.
    moved: bool,
    /// When it was said last that this opening lives.
    said: Instant,
    read_only: bool,
}

impl Listening {
    /// Connects, takes the opening's lock, listens, and says that it is there.
    pub(super) async fn start(pool: &Pool, lock: Lock, process: &ProcessInfo) -> Result<Self, StoreError> {
        let (told, inbox) = mpsc::unbounded_channel();
        let mut conn = pool.connect_for_messages(told).await?;
        let read_only = pool.place.read_only;
        // A standby takes no `LISTEN`: there only looking is left.
        if !read_only || !is_standby(&mut conn).await? {
            conn.batch(&format!("LISTEN \"{}\"", channel(&pool.place.schema))).await?;
        }
        openings::hold(&mut conn, lock).await?;
        if !read_only {
            openings::say(&mut conn, process, lock).await?;
            let here = Told { w: process.id.to_string(), r: Some(Vec::new()), l: false };
            notify(&mut conn, vec![serde_json::to_string(&here).unwrap_or_default()]).await?;
        }
        let seq = commit_seq(&mut conn, read_only).await?;
        Ok(Self { conn, inbox, seq, moved: false, said: Instant::now(), read_only })
    }
}

/// At most 63 bytes, as every name of PostgreSQL.
fn channel(schema: &str) -> String {
    let mut name = format!("seeknal_{schema}");
    name.truncate(63);
    name
}

async fn notify(conn: &mut Conn, told: Vec<String>) -> Result<(), StoreError> {
    // The channel is named after the schema, which the connection has as its path.
    const NOTIFY: &str = "SELECT pg_notify(left('seeknal_' || current_schema(), 63), $1)";
    let told: Vec<Sql<'_>> =
        told.into_iter().map(|words| Sql::new("the notification of others", NOTIFY, vec![Box::new(words)])).collect();
    conn.send(&told).await.map(|_| ()).map_err(|failed| failed.error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Clock, SystemClock};

    fn run(name: &str) -> RunId {
        RunId::new(name).unwrap()
    }

    #[tokio::test]
    async fn names_are_told_also_where_anything_may_have_changed() {
        let follower = Follower::new(&ProcessInfo::current(SystemClock.now()));
        follower.hear(r#"{"w":"other","r":["old"],"l":false}"#);
        follower.anything();
        follower.hear(r#"{"w":"other","r":["older"],"l":false}"#);
        assert_eq!(follower.others_committed().await.unwrap(), ForeignCommits::of([run("old"), run("older")], true));
        assert_eq!(follower.others_committed().await.unwrap(), ForeignCommits { leases: false, ..ForeignCommits::all() });
        follower.hear(r#"{"w":"other","r":[],"l":true}"#);
        assert_eq!(follower.others_committed().await.unwrap(), ForeignCommits::of([], true));
        follower.hear("in other words");
        assert_eq!(follower.others_committed().await.unwrap(), ForeignCommits::all());
        assert!(locked(&follower.pending).is_empty());
    }

    #[test]
    fn what_is_long_is_told_in_pieces() {
        let mut outgoing = Gathered::default();
        let runs: BTreeSet<RunId> = (0..1_000).map(|number| run(&format!("run-{number:04}-{}", "x".repeat(90)))).collect();
        outgoing.add(Some(runs.clone()), true);
        let told = outgoing.words("me");
        assert!(told.len() > 1 && told.iter().all(|text| text.len() <= MOST_BYTES));
        let told: Vec<Told> = told.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        assert_eq!(told.iter().filter(|told| told.l).count(), 1);
        assert_eq!(told.into_iter().flat_map(|told| told.r.unwrap()).collect::<BTreeSet<_>>(), runs);
        assert!(Gathered::default().words("me").is_empty());
        outgoing.add(Some((0..MOST_NAMES).map(|number| run(&format!("r{number}")))), false);
        assert_eq!(outgoing.words("me").len(), 2, "leases, and that it is not said which runs");
    }
}
