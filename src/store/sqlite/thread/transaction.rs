//! One transaction of the writer, from BEGIN to COMMIT.

use std::sync::Arc;

use rusqlite::params;

use super::Writer;
use crate::model::{Batch, BatchAnswer, BatchId, Clock, SystemClock};
use crate::store::StoreError;
use crate::store::pull::BatchReply;
use crate::store::sqlite::checkpoint::Due;
use crate::store::sqlite::decide::Session;
use crate::store::sqlite::error::{is_full, is_io, is_unwritten, sql_error};
use crate::store::sqlite::open::BUSY_TIMEOUT;
use crate::store::sqlite::own::Settled;
use crate::store::sqlite::owners::Deaths;
use crate::store::sqlite::rows::Stamp;
use crate::store::sqlite::{answer, schema};

/// How often a transaction takes in what arrived while it was filled.
const JOINED: usize = 4;

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

/// How far tokens are reserved ahead in the file beside the database.
const TOKENS_AHEAD: u64 = 100_000;

/// How far the commit sequence is reserved ahead.
pub(super) const SEQ_AHEAD: u64 = 10_000_000;

/// How often, in commits, the length of the WAL is looked at.
const LOOK_AT_WAL: u64 = 16;

impl Writer {
    /// Applies batches in the transaction that was begun for them, and ends it.
    pub(super) fn transaction(&mut self, batches: &mut [(Arc<Batch>, BatchReply)]) -> Result<Vec<BatchAnswer>, StoreError> {
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
                    self.rest_due |= self.wal.has_grown(&self.at.path);
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

    /// Everything between BEGIN and COMMIT. A batch that came from a source may have become longer after it.
    fn fill(&mut self, batches: &mut [(Arc<Batch>, BatchReply)]) -> Result<(Vec<BatchAnswer>, Settled), StoreError> {
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
        let known = batches.iter().map(|(batch, _)| answer::find(&self.conn, batch)).collect::<Result<Vec<_>, _>>()?;
        // Who gave up waiting may have sent a batch again: both are answered by what becomes of the first one.
        let ids: Vec<BatchId> = batches.iter().map(|(batch, _)| batch.id).collect();
        let first = |number: usize, id: BatchId| ids.iter().take(number).position(|earlier| *earlier == id);
        let twins: Vec<Option<usize>> = ids.iter().enumerate().map(|(number, id)| first(number, *id)).collect();
        let fresh: Vec<bool> = known.iter().zip(&twins).map(|(known, twin)| known.is_none() && twin.is_none()).collect();
        let mut answers: Vec<BatchAnswer> =
            known.into_iter().map(|known| known.unwrap_or_else(|| BatchAnswer { outcomes: Vec::new() })).collect();
        // While rows are written, those come back who were answered last: what they bring shares the sync.
        for round in 0..=JOINED {
            let mut more = round == 0;
            let open = batches.iter_mut().zip(&mut answers).zip(&fresh).enumerate().filter(|(_, (_, fresh))| **fresh);
            for (number, (((batch, reply), answer), _)) in open {
                if round == 0 || reply.join(batch) {
                    session.decide(number, &batch.entries, answer)?;
                    more = true;
                }
            }
            if !more {
                break;
            }
            session.write(noting)?;
        }
        for ((batch, _), answer) in batches.iter().zip(&answers).zip(&fresh).filter_map(|(both, fresh)| fresh.then_some(both)) {
            answer::keep(&self.conn, batch, answer, at)?;
        }
        for (number, twin) in twins.iter().enumerate() {
            let told = twin.and_then(|twin| answers.get(twin).cloned());
            if let (Some(told), Some(answer)) = (told, answers.get_mut(number)) {
                *answer = told;
            }
        }
        let settled = session.finish()?;
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
        // A full disk is certain, and so is any other write that the system refused: the page that says "committed" is written last, and nothing follows
        // it but the sync. Cut short it fails its checksum, and SQLite has rolled back by itself: what comes next is written over it. (Unless the part that
        // was not written is byte for byte what lay there before, of an earlier round of the log: then that page counts if this process dies before its
        // next commit. It takes a write that is cut short inside the last page, an equal rest of it, and a death in that moment.)
        let certain = (still_inside && !is_io(&error)) || is_full(&error) || is_unwritten(&error);
        let error = sql_error(&self.at.name, error);
        Err(if certain { error } else { error.into_unknown() })
    }

    /// Makes sure that the file beside the database knows of every number that is given out: a restored backup of the database does not.
    pub(super) fn reserve(&mut self, seq: u64, token: u64) -> Result<(), StoreError> {
        if seq <= self.reserved.seq && token <= self.reserved.token {
            return Ok(());
        }
        self.sidecar.lock(BUSY_TIMEOUT)?;
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
