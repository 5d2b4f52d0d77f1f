//! The writer: one thread that owns one connection.
//!
//! ```text
//! commit() ──Job──►[mpsc] ──► recv ─ BEGIN IMMEDIATE
//! source ──────next()────────► what came while others wrote goes along; renewals first
//!                              known batch? answer from its row
//!                              decide every entry ─ write the folded rows ─ keep the answers ─ COMMIT
//!    ◄──answers────────────────┘ and at once the next
//! ```
//!
//! Several waiting batches share one transaction; each keeps its own id and answers. Whoever waits is answered once the transaction is in
//! stable storage, and not before.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use tokio::sync::{mpsc, oneshot};

use super::changes::Company;
use super::checkpoint::{Checkpointer, Due};
use super::decide::Session;
use super::error::{is_full, is_io, sql_error};
use super::follow::Foreign;
use super::open::{self, beside};
use super::own::{Memory, Settled};
use super::owners::{Deaths, Owner};
use super::place::Place;
use super::rows::Stamp;
use super::schema::PAGE_SIZE;
use super::{answer, read, schema, write};
use crate::model::{Batch, BatchAnswer, BatchId, Clock, ProcessInfo, SystemClock};
use crate::store::highwater::{HighWater, HighWaterFile};
use crate::store::pull::{BatchReply, Sources};
use crate::store::{BatchSource, StoreError, StoreErrorKind, folder};

/// Batches that share one transaction at most.
const SHARED: usize = 64;

/// Answers of this opening that are kept at least. Whoever has seen an answer does not ask again; the rest is for those who sit between.
const ANSWERS_KEPT: usize = 512;

/// Answers that are removed together: removing them one by one would cost every commit a page.
const ANSWERS_AT_ONCE: usize = 256;

/// Transactions between two looks for answers and tombstones that dead openings left.
const SWEEP_EVERY: u64 = 4096;

/// How many of them one transaction removes; the next ones remove the rest.
const SWEPT_AT_ONCE: u16 = 512;

/// How long the answers of other openings, and tombstones, are kept.
const KEPT_DAYS: i64 = 1;

/// Transactions after which the WAL is grown to its full length: who commits this often will commit more.
const GROW_AFTER: u64 = 64;

/// How far tokens are reserved ahead in the file beside the database.
const TOKENS_AHEAD: u64 = 100_000;

/// How far the commit sequence is reserved ahead.
const SEQ_AHEAD: u64 = 10_000_000;

/// How often the writer looks whether its file is still the one that the path names. What was written between is lost with the file in any case, as all
/// that was written before is.
const LOOK: Duration = Duration::from_millis(20);

/// How often, in commits, the length of the WAL is looked at.
const LOOK_AT_WAL: u64 = 16;

/// So many pages of the WAL that cannot be brought into the database are told: 32 MiB.
const HELD_UP: i64 = 32 * 1024;

/// What the writer is asked for.
pub(super) enum Job {
    /// Apply a batch.
    Commit { batch: Arc<Batch>, reply: oneshot::Sender<Result<BatchAnswer, StoreError>> },
    /// Something waits in a source.
    Pull(Weak<dyn BatchSource>),
    /// Give out higher tokens only.
    RaiseTokens { beyond: u64, reply: oneshot::Sender<Result<(), StoreError>> },
    /// Bring the WAL into the database, as far as readers allow.
    Checkpoint { reply: oneshot::Sender<Result<(), StoreError>> },
    /// Answer everybody, then end.
    Close { reply: oneshot::Sender<Result<(), StoreError>> },
}

/// Where work comes from.
struct Intake {
    jobs: mpsc::UnboundedReceiver<Job>,
    sources: Sources,
}

impl Drop for Intake {
    fn drop(&mut self) {
        // Also when the thread panics. First nobody can wake it any more, then who still counts on it is told.
        self.jobs.close();
        self.sources.forsake();
    }
}

/// What the thread owns.
pub(super) struct Writer {
    conn: Connection,
    at: Arc<Place>,
    /// For the follower: what this opening commits.
    foreign: Arc<Foreign>,
    /// The commit sequence after the last commit of this opening.
    seq: u64,
    /// When the file was looked at last.
    looked: Option<Instant>,
    company: Company,
    sidecar: HighWaterFile,
    reserved: HighWater,
    memory: Memory,
    /// Batches of this opening whose answers are stored and were told, oldest first.
    told: VecDeque<BatchId>,
    commits: u64,
    checkpointer: Checkpointer,
    /// The length of the WAL when it was longest.
    wal_length: u64,
    /// Whether it was told that a reader holds the WAL up.
    held_up: bool,
    /// Whether the rest of a checkpoint is to be done.
    rest_due: bool,
    /// Whether there is more that nobody will ask for any more.
    sweep_due: bool,
    /// As long as it lives, others see this opening alive.
    owner: Owner,
}

impl Writer {
    /// Opens the database for writing, and makes it if it is not there. Answers also with what an operator should know.
    pub(super) fn open(
        at: Arc<Place>,
        foreign: Arc<Foreign>,
        process: &ProcessInfo,
    ) -> Result<(Self, Option<String>), StoreError> {
        let db = &at.path;
        if let Some(parent) = db.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            folder::make(parent).map_err(|error| StoreError::io(parent.display(), error))?;
        }
        // Looked at first, so that beside a database of somebody else no file of ours appears.
        open::check(db)?;
        let mut sidecar = HighWaterFile::open(&beside(db, ".lock"))?;
        let (conn, made) = open::open_writer(db, &sidecar)?;
        let owner = Owner::register(db, process)?;
        open::sweep(&conn, db, process);
        let reserved = raise(&conn, &mut sidecar, &at.name)?;
        at.opened();
        let (seq, _) = read::counters(&conn)?;
        foreign.sent(seq);
        let checkpointer = Checkpointer::new(db);
        // One that was there already may just not have had its first commit yet.
        let notice = made.then(|| open::lost(db, &reserved)).flatten();
        let writer = Self {
            conn,
            at,
            foreign,
            seq,
            looked: None,
            company: Company::default(),
            sidecar,
            reserved,
            memory: Memory::default(),
            told: VecDeque::new(),
            commits: 0,
            checkpointer,
            wal_length: 0,
            held_up: false,
            rest_due: false,
            sweep_due: false,
            owner,
        };
        Ok((writer, notice))
    }

    /// Works until it is told to close, or nobody is left who could ask.
    pub(super) fn work(mut self, jobs: mpsc::UnboundedReceiver<Job>) {
        let mut closing = None;
        let mut intake = Intake { jobs, sources: Sources::default() };
        while closing.is_none() {
            let Intake { jobs, sources } = &mut intake;
            let mut next = if sources.is_empty() {
                let Some(first) = jobs.blocking_recv() else { break };
                Some(first)
            } else {
                jobs.try_recv().ok()
            };
            let mut batches: Vec<(Arc<Batch>, BatchReply)> = Vec::new();
            let mut checkpoints = Vec::new();
            while let Some(job) = next {
                match job {
                    Job::Commit { batch, reply } => batches.push((batch, BatchReply::asker(reply))),
                    Job::Pull(source) => sources.add(&source),
                    Job::RaiseTokens { beyond, reply } => {
                        let _asker_gone = reply.send(self.raise_tokens(beyond)).is_err();
                    }
                    Job::Checkpoint { reply } => checkpoints.push(reply),
                    Job::Close { reply } => {
                        // Who sent before is served, who sends after is refused.
                        jobs.close();
                        closing = Some(reply);
                    }
                }
                next = if batches.len() < SHARED || closing.is_some() { jobs.try_recv().ok() } else { None };
            }
            if sources.wait() || !batches.is_empty() {
                let turn = self.take_turn();
                // What arrived while others wrote goes along. And without a turn: who waits is told.
                sources.pull(|batch, reply| batches.push((batch, reply)));
                self.commit(turn, batches);
            }
            for reply in checkpoints {
                let _asker_gone = reply.send(self.checkpoint()).is_err();
            }
        }
        drop(intake);
        drop(self.checkpointer);
        // The last connection to close brings the WAL into the database and removes it.
        let place = self.at.name.clone();
        let closed = self.conn.close().map_err(|(_, error)| sql_error(&place, error));
        drop(self.owner);
        if let Some(reply) = closing {
            let _asker_gone = reply.send(closed).is_err();
        }
    }

    fn raise_tokens(&mut self, beyond: u64) -> Result<(), StoreError> {
        self.at.check()?;
        self.run("BEGIN IMMEDIATE").map_err(|error| sql_error(&self.at.name, error))?;
        self.memory.doubt();
        let raised = (|| {
            let (seq, token) = read::counters(&self.conn)?;
            if token < beyond {
                self.reserve(seq, beyond)?;
                write::counters(&self.conn, seq, beyond)?;
            }
            self.run("COMMIT").map_err(|error| sql_error(&self.at.name, error))
        })();
        self.leave_transaction();
        raised
    }

    /// Brings the WAL into the database as far as readers allow, and says so when one of them holds it up for too long.
    fn checkpoint(&mut self) -> Result<(), StoreError> {
        let left = self
            .conn
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                let (pages, done): (i64, i64) = (row.get(1)?, row.get(2)?);
                Ok(pages.saturating_sub(done))
            })
            .map_err(|error| sql_error(&self.at.name, error))?;
        let held_up = left >= HELD_UP;
        if held_up && !std::mem::replace(&mut self.held_up, true) {
            tracing::warn!(
                database = self.at.name,
                mib = left.saturating_mul(PAGE_SIZE) >> 20,
                "a reader that stays keeps the WAL from being brought into the database: it grows until that one ends; look for a program with an \
                 open transaction on it"
            );
        }
        self.held_up = held_up;
        Ok(())
    }

    /// Begins a transaction, when nobody else is in one any more.
    fn take_turn(&mut self) -> Result<(), StoreError> {
        if self.looked.is_none_or(|at| at.elapsed() >= LOOK) {
            self.at.check()?;
            self.looked = Some(Instant::now());
        }
        self.run("BEGIN IMMEDIATE").map_err(|error| {
            self.leave_transaction();
            sql_error(&self.at.name, error)
        })
    }

    fn commit(&mut self, turn: Result<(), StoreError>, mut batches: Vec<(Arc<Batch>, BatchReply)>) {
        if batches.is_empty() {
            self.leave_transaction();
            return;
        }
        // A lease that is not renewed in time is lost: what only renews goes first.
        batches.sort_by_key(|(batch, _)| batch.entries.iter().any(|entry| !entry.parts.is_empty()));
        let all: Vec<&Batch> = batches.iter().map(|(batch, _)| &**batch).collect();
        match turn.and_then(|()| self.transaction(&all)).map_err(|error| self.at.blame(error)) {
            Ok(answers) => {
                for ((batch, reply), answer) in batches.into_iter().zip(answers) {
                    let id = batch.id;
                    // Whoever is answered has it too, and takes it apart in its own time.
                    drop(batch);
                    if reply.answer(Ok(answer)) {
                        self.told.push_back(id);
                    }
                    // Who is gone may come back with the same batch: its answer stays until its age removes it.
                }
            }
            // One batch that stumbles over damage does not take the others along.
            Err(error) if batches.len() > 1 && error.kind() == StoreErrorKind::Corrupt && !error.is_unknown_outcome() => {
                for (batch, reply) in batches {
                    let turn = self.take_turn();
                    self.commit(turn, vec![(batch, reply)]);
                }
            }
            Err(error) => {
                for (_, reply) in batches {
                    let _asker_gone = reply.answer(Err(error.clone()));
                }
            }
        }
        if std::mem::take(&mut self.rest_due)
            && let Err(error) = self.checkpoint()
        {
            tracing::warn!(%error, "the WAL could not be brought into the database; it grows until that is possible");
        }
        if self.commits == GROW_AFTER {
            // Only speed depends on it.
            let _slower = open::grow_wal(&self.conn, &self.at.path).is_err();
            self.leave_transaction();
        }
    }

    /// Applies batches in the transaction that was begun for them, and ends it.
    fn transaction(&mut self, batches: &[&Batch]) -> Result<Vec<BatchAnswer>, StoreError> {
        match self.fill(batches) {
            Ok((answers, settled)) => {
                // Told before it is committed: the follower must never take it for somebody else's.
                self.foreign.sent(settled.counters.0);
                if let Err(error) = self.seal() {
                    self.foreign.sent(self.seq);
                    self.foreign.met();
                    return Err(error);
                }
                self.seq = settled.counters.0;
                self.rest_due |= self.checkpointer.wrote(settled.rows) == Due::Rest;
                self.memory.settle(settled);
                self.commits = self.commits.saturating_add(1);
                if self.commits.is_multiple_of(LOOK_AT_WAL) {
                    self.look_at_wal();
                }
                Ok(answers)
            }
            Err(error) => {
                self.leave_transaction();
                self.memory.doubt();
                Err(error)
            }
        }
    }

    /// Wide rows fill the WAL sooner than their number says: one that grew beyond its usual length is to be emptied.
    fn look_at_wal(&mut self) {
        let length = std::fs::metadata(beside(&self.at.path, "-wal")).map_or(0, |meta| meta.len());
        let usual = u64::try_from(HELD_UP * PAGE_SIZE).unwrap_or(u64::MAX);
        self.rest_due |= length > self.wal_length.max(usual);
        self.wal_length = self.wal_length.max(length);
    }

    /// Everything between BEGIN and COMMIT.
    fn fill(&mut self, batches: &[&Batch]) -> Result<(Vec<BatchAnswer>, Settled), StoreError> {
        let data_version = self
            .conn
            .prepare_cached("PRAGMA data_version")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .map_err(|error| sql_error(&self.at.name, error))?;
        self.memory.begin(data_version);
        if self.memory.counters().is_none() {
            // Others committed: a newer program may have brought the tables forward under this one.
            let version = schema::schema_version(&self.conn).map_err(|error| sql_error(&self.at.name, error))?;
            schema::refuse_newer(version, &self.at.name)?;
        }
        let now = SystemClock.now();
        let at = Stamp::of(now);
        let deaths = Deaths::new(&self.at.path, Some(self.owner.id()));
        let mut session = Session::begin(&self.conn, &self.memory, &deaths, now)?;
        if session.found_seq() != self.seq {
            self.foreign.met();
            self.company.met();
        }
        let noting = self.company.noting(&self.at.path);
        let mut answers = Vec::with_capacity(batches.len());
        for batch in batches {
            if let Some(known) = answer::find(&self.conn, batch)? {
                answers.push(known);
                continue;
            }
            let fresh = session.decide(&batch.entries)?;
            answer::keep(&self.conn, batch, &fresh, at)?;
            answers.push(fresh);
        }
        session.write(noting)?;
        let settled = session.settled();
        let (seq, token) = settled.counters;
        self.reserve(seq, token)?;
        self.prune(now)?;
        Ok((answers, settled))
    }

    /// COMMIT, and what its failure means.
    fn seal(&mut self) -> Result<(), StoreError> {
        let Err(error) = self.run("COMMIT") else { return Ok(()) };
        let still_inside = !self.conn.is_autocommit();
        self.leave_transaction();
        self.memory.doubt();
        // After a failed write or sync the commit may lie in the WAL all the same, and count after a crash. The batch is sent again under its id: either
        // it is found, or its pages are written anew in the same place.
        // A full disk is certain: the commit's last page did not fit, and SQLite has rolled back by itself.
        let certain = (still_inside && !is_io(&error)) || is_full(&error);
        let error = sql_error(&self.at.name, error);
        Err(if certain { error } else { error.into_unknown() })
    }

    fn run(&self, sql: &str) -> rusqlite::Result<()> {
        self.conn.prepare_cached(sql)?.execute([]).map(|_| ())
    }

    fn leave_transaction(&self) {
        if !self.conn.is_autocommit() {
            // If even this fails, the next BEGIN says so.
            let _stays_inside = self.conn.execute_batch("ROLLBACK").is_err();
        }
    }

    /// Makes sure that the file beside the database knows of every number that is given out: a restored backup of the database does not.
    fn reserve(&mut self, seq: u64, token: u64) -> Result<(), StoreError> {
        if seq <= self.reserved.seq && token <= self.reserved.token {
            return Ok(());
        }
        self.sidecar.lock()?;
        let reserved = (|| {
            let mut known = self.sidecar.read()?;
            if seq > known.seq {
                known.seq = seq.saturating_add(SEQ_AHEAD);
            }
            if token > known.token {
                known.token = token.saturating_add(TOKENS_AHEAD);
            }
            // Also where somebody raised it already: his sync may have failed, and what is read here may be in no storage.
            self.sidecar.write(&known)?;
            Ok(known)
        })();
        self.sidecar.unlock()?;
        self.reserved = reserved?;
        Ok(())
    }

    /// Removes answers that nobody will ask for any more, many at a time and seldom.
    fn prune(&mut self, now: chrono::DateTime<chrono::Utc>) -> Result<(), StoreError> {
        let fail = |error| sql_error("table batches", error);
        if self.told.len() > ANSWERS_KEPT + ANSWERS_AT_ONCE {
            // Taken out of the list although the transaction may still fail: then their age removes them.
            for id in self.told.drain(..ANSWERS_AT_ONCE) {
                self.conn
                    .prepare_cached("DELETE FROM batches WHERE id = ?1")
                    .and_then(|mut statement| statement.execute([id.as_bytes().as_slice()]))
                    .map_err(fail)?;
            }
        }
        self.sweep_due |= self.commits.is_multiple_of(SWEEP_EVERY);
        if self.sweep_due {
            let old = Stamp::of(now.checked_sub_signed(chrono::Duration::days(KEPT_DAYS)).unwrap_or(now));
            self.sweep_due = false;
            for sql in [
                "DELETE FROM batches WHERE id IN (SELECT id FROM (SELECT id, at FROM batches ORDER BY id LIMIT ?2) WHERE at < ?1)",
                "DELETE FROM tombstones WHERE run_id IN (SELECT run_id FROM tombstones WHERE deleted_at < ?1 LIMIT ?2)",
            ] {
                // Openings that are short leave more behind than one that comes after them removes at once.
                self.sweep_due |=
                    self.conn.execute(sql, params![old, SWEPT_AT_ONCE]).map_err(fail)? == usize::from(SWEPT_AT_ONCE);
            }
        }
        Ok(())
    }
}

/// Raises the counters to what the file beside the database knows: they were given out, even if this copy of the database is older.
fn raise(conn: &Connection, sidecar: &mut HighWaterFile, place: &str) -> Result<HighWater, StoreError> {
    let fail = |error| sql_error(place, error);
    // First the database, then the file: the order in which the writer takes them.
    conn.execute_batch("BEGIN IMMEDIATE").map_err(fail)?;
    let raised = (|| {
        sidecar.lock()?;
        let known = sidecar.read();
        sidecar.unlock()?;
        let known = known?;
        let (seq, token) = read::counters(conn)?;
        if known.seq > seq || known.token > token {
            write::counters(conn, seq.max(known.seq), token.max(known.token))?;
        }
        conn.execute_batch("COMMIT").map_err(fail)?;
        Ok(known)
    })();
    if raised.is_err() && !conn.is_autocommit() {
        let _stays_inside = conn.execute_batch("ROLLBACK").is_err();
    }
    raised
}
