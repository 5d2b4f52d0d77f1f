//! The writer: one thread that owns one connection.
//!
//! ```text
//! commit() ──Job──►[mpsc] ──► recv ─ BEGIN IMMEDIATE
//! source ──────next()────────► what came while others wrote goes along; renewals first
//!                              known batch? answer from its row
//!                              decide every entry ─ write the folded rows ─ what came meanwhile joins ─ keep the answers ─ COMMIT
//!    ◄──answers────────────────┘ and at once the next
//! ```
//!
//! Several waiting batches share one transaction; each keeps its own id and answers. Whoever waits is answered once the transaction is in
//! stable storage, and not before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::changes::Company;
use super::checkpoint::Checkpointer;
use super::error::sql_error;
use super::follow::Foreign;
use super::open::{self, BUSY_TIMEOUT, beside};
use super::own::Memory;
use super::owners::Owner;
use super::place::Place;
use super::wal::Wal;
use super::{read, verify, write};
use crate::model::{Batch, BatchAnswer, BatchId, ProcessInfo};
use crate::store::attention::Attention;
use crate::store::highwater::{HighWater, HighWaterFile};
use crate::store::pull::{BatchReply, Call, Sources};
use crate::store::{StoreError, StoreErrorKind, folder};

mod transaction;

use transaction::SEQ_AHEAD;

/// Batches that share one transaction at most.
const SHARED: usize = 64;

/// Transactions after which the WAL is grown to its full length: who commits this often will commit more.
const GROW_AFTER: u64 = 64;

/// How often the writer looks whether its file is still the one that the path names. What was written between is lost with the file in any case, as all
/// that was written before is.
const LOOK: Duration = Duration::from_millis(20);

/// How long closing waits to note how far it came.
const NOTE_TIMEOUT: Duration = Duration::from_secs(1);

/// What the writer is asked for.
pub(super) enum Job {
    /// Apply a batch.
    Commit { batch: Arc<Batch>, reply: oneshot::Sender<Result<BatchAnswer, StoreError>> },
    /// Something waits in a source.
    Pull(Call),
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

/// Whether an error of several batches together may be that of one of them.
fn is_of_one_batch(error: &StoreError) -> bool {
    (error.kind() == StoreErrorKind::Corrupt || error.is_of_one_entry()) && !error.is_unknown_outcome()
}

impl Drop for Intake {
    fn drop(&mut self) {
        // Also when the thread panics. First nobody can wake it any more, and who did so unheard is told; then who still counts on it is.
        self.jobs.close();
        // Also one that is just being sent: it would lie here as long as somebody could call.
        while self.jobs.blocking_recv().is_some() {}
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
    attention: Attention,
    company: Company,
    sidecar: HighWaterFile,
    reserved: HighWater,
    memory: Memory,
    /// Batches of this opening whose answers are stored and were told, oldest first.
    told: VecDeque<BatchId>,
    commits: u64,
    checkpointer: Checkpointer,
    wal: Wal,
    /// Whether the WAL was grown to its full length.
    grown: bool,
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
        let mut sidecar = HighWaterFile::open(&beside(db, ".lock"), db)?;
        let (conn, made) = open::open_writer(db, &sidecar)?;
        let owner = Owner::register(db, process)?;
        open::sweep(&conn, db, process);
        let (reserved, behind) = raise(&conn, &mut sidecar, &at)?;
        // As long as this connection is open nobody removes it.
        open::sync_name_of_wal(db)?;
        at.opened();
        let (seq, _) = read::counters(&conn)?;
        foreign.sent(seq);
        at.opened_beside();
        let checkpointer = Checkpointer::new(db);
        // One that was there already may just not have had its first commit yet.
        let notice = if made { open::lost(db, &reserved) } else { behind };
        let writer = Self {
            conn,
            at,
            foreign,
            seq,
            looked: None,
            attention: Attention::default(),
            company: Company::default(),
            sidecar,
            reserved,
            memory: Memory::default(),
            told: VecDeque::new(),
            commits: 0,
            checkpointer,
            wal: Wal::default(),
            grown: false,
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
                let first = self.attention.listen(jobs, |jobs| jobs.try_recv().ok(), mpsc::UnboundedReceiver::blocking_recv);
                let Some(first) = first else { break };
                Some(first)
            } else {
                jobs.try_recv().ok()
            };
            let mut batches: Vec<(Arc<Batch>, BatchReply)> = Vec::new();
            let mut checkpoints = Vec::new();
            while let Some(job) = next {
                match job {
                    Job::Commit { batch, reply } => batches.push((batch, BatchReply::asker(reply))),
                    Job::Pull(call) => sources.add(call),
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
                let entries = batches.iter().map(|(batch, _)| batch.entries.len()).sum();
                self.commit(turn, batches);
                self.attention.answered(entries);
            }
            for reply in checkpoints {
                let _asker_gone = reply.send(self.checkpoint()).is_err();
            }
        }
        drop(intake);
        // Where it cannot be noted, an older copy may not be known for one.
        let _not_noted = self.note_end().is_err();
        drop(self.checkpointer);
        self.owner.leave_behind(&self.conn);
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

    /// Notes beside the database how far it came.
    fn note_end(&mut self) -> Result<(), StoreError> {
        if self.commits == 0 {
            return Ok(());
        }
        let (seq, _) = read::counters(&self.conn)?;
        self.sidecar.lock(NOTE_TIMEOUT)?;
        let noted = self.sidecar.read().and_then(|known| {
            let closed = known.closed.max(seq);
            if closed == known.closed { Ok(()) } else { self.sidecar.write(&HighWater { closed, ..known }) }
        });
        self.sidecar.unlock()?;
        noted
    }

    /// Brings the WAL into the database as far as readers allow.
    fn checkpoint(&mut self) -> Result<(), StoreError> {
        if self.wal.checkpoint(&mut self.conn, &self.at.path, &self.at.name)? {
            self.grow_wal();
        }
        Ok(())
    }

    fn grow_wal(&self) {
        // Only speed depends on it.
        let _slower = open::grow_wal(&self.conn, &self.at.path).is_err();
        self.leave_transaction();
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
        match turn.and_then(|()| self.transaction(&mut batches)).map_err(|error| self.at.blame(error)) {
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
            // One batch that stumbles over damage, or that is refused by itself, does not take the others along.
            Err(error) if batches.len() > 1 && is_of_one_batch(&error) => {
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
        // Right after the commit that it is due after, and not again where the next ones fail: on a disk without space it would take the last of it.
        if self.commits == GROW_AFTER && !std::mem::replace(&mut self.grown, true) {
            self.grow_wal();
        }
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
}

/// Commits of one transaction are fewer than this.
const MOST_AT_ONCE: u64 = 1 << 20;

/// Where a database at this commit sequence is older than what was committed to it, as the file beside it tells: the sequence that it had at least.
pub(super) fn behind(known: &HighWater, seq: u64) -> Option<u64> {
    let is_behind = known.seq > seq && (known.closed > seq || known.seq - seq > SEQ_AHEAD + MOST_AT_ONCE);
    is_behind.then(|| known.closed.max(known.seq.saturating_sub(SEQ_AHEAD)))
}

/// Raises the counters to what the file beside the database knows: they were given out, even if this copy of the database is older. Of one that is older than
/// that it also raises the runs: their versions were given out too. That is told.
///
/// It is older if more was committed when it was closed, or if more was reserved than the opening after its last commit did. What is not seen so: a copy that
/// was made while it was open, and is put back after that opening was killed.
fn raise(conn: &Connection, sidecar: &mut HighWaterFile, at: &Place) -> Result<(HighWater, Option<String>), StoreError> {
    let place = at.name.as_str();
    let fail = |error| sql_error(place, error);
    // First the database, then the file: the order in which the writer takes them.
    conn.execute_batch("BEGIN IMMEDIATE").map_err(fail)?;
    let raised = (|| {
        sidecar.lock(BUSY_TIMEOUT)?;
        let known = sidecar.read();
        sidecar.unlock()?;
        let known = known?;
        let (seq, token) = read::counters(conn).map_err(|error| verify::with_mend(error, conn, &at.path))?;
        if known.seq > seq || known.token > token {
            write::counters(conn, seq.max(known.seq), token.max(known.token))?;
        }
        let mut behind = None;
        if let Some(least) = self::behind(&known, seq) {
            let runs = write::raise_versions(conn, known.seq)?;
            behind = (runs > 0).then(|| {
                format!(
                    "{place} is older than what was committed to it (sequence {seq} of {} at least): a backup was put back. Its {runs} run(s) go on \
                     behind version {}, so that no version is given out twice",
                    least, known.seq
                )
            });
        }
        conn.execute_batch("COMMIT").map_err(fail)?;
        Ok((known, behind))
    })();
    if raised.is_err() && !conn.is_autocommit() {
        let _stays_inside = conn.execute_batch("ROLLBACK").is_err();
    }
    raised
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::BatchSource;
    use crate::store::pull::Forsaken;

    /// As when the thread panics, or closes.
    #[test]
    fn who_calls_a_writer_that_ends_is_told() {
        let waits = Arc::new(Forsaken::default());
        let source: Arc<dyn BatchSource> = Arc::clone(&waits) as Arc<dyn BatchSource>;
        let call = || Job::Pull(Call::new(&Arc::downgrade(&source)));
        let (sender, jobs) = mpsc::unbounded_channel();
        assert!(sender.send(call()).is_ok());
        let mut sources = Sources::default();
        sources.add(Call::new(&Arc::downgrade(&source)));
        drop(Intake { jobs, sources });
        assert_eq!(waits.times(), 2, "the one that was heard, and the one that was not");
        let Err(mpsc::error::SendError(Job::Pull(call))) = sender.send(call()) else { panic!("nobody is there") };
        call.take_back();
        assert_eq!(waits.times(), 2, "who sees that goes another way by himself");
    }
}
