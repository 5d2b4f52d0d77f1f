//! Batches whose answers are stored, until no copy of their requests can be on its way any more; and what openings that are gone left behind.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Error;
use tokio::time::Instant;

use crate::model::BatchId;
use crate::store::libsql::hrana::{Batch, BatchResult, Stmt};
use crate::store::libsql::lease::now_ms;
use crate::store::libsql::write::Request;

/// How long answers stay that were told: longer than any copy of a request may still be on its way.
const TOLD_FOR: Duration = Duration::from_secs(120);

/// Told answers that are removed together.
const TOLD_AT_ONCE: usize = 512;

/// As many are removed by the last word of an opening, at most.
const TOLD_AT_LAST: usize = 2048;

/// Between two looks for what openings that are gone left; the first commit of an opening looks too.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);

/// How many rows of each table one commit removes; the next ones remove the rest.
const SWEPT_AT_ONCE: u64 = 512;

/// Answers of this opening that were told, oldest first, and when it is looked for what others left.
#[derive(Debug, Default)]
pub(super) struct Told {
    ids: VecDeque<(BatchId, Instant)>,
    /// When nothing was left of the others; none: something is, as far as is known.
    swept: Option<Instant>,
}

impl Told {
    /// Notes that the answer to a batch was told.
    pub(super) fn note(&mut self, id: BatchId) {
        self.ids.push_back((id, Instant::now()));
    }

    /// Adds to the request of a commit what removes rows that nobody will ask for any more, many at a time and seldom.
    pub(super) fn sweep(&mut self, request: &mut Request) -> Result<(), Error> {
        if self.over() >= TOLD_AT_ONCE {
            // Taken out of the list although the transaction may still fail: then their age removes them.
            request.statements.extend(self.removal(TOLD_AT_ONCE)?);
        }
        if self.swept.is_none_or(|at| at.elapsed() >= SWEEP_EVERY) {
            let limit = || vec![SWEPT_AT_ONCE.into()];
            for sql in [
                "DELETE FROM batches WHERE id IN (SELECT id FROM batches WHERE at < unixepoch() - 86400 LIMIT ?1)",
                "DELETE FROM tombstones WHERE run_id IN (SELECT run_id FROM tombstones WHERE deleted_at < unixepoch() - 86400 LIMIT ?1)",
            ] {
                request.sweeps.insert(request.statements.len());
                request.statements.push(Stmt::exec(sql, limit()));
            }
            let locks = concat!("DELETE FROM locks WHERE expires_ms < ", now_ms!(), " - 86400000");
            request.statements.push(Stmt::exec(locks, Vec::new()));
        }
        Ok(())
    }

    /// What the removals of a commit came to that was made. Openings that are short leave more behind than one that comes after them removes at once.
    pub(super) fn swept(&mut self, request: &Request, result: &BatchResult) {
        if !request.sweeps.is_empty() {
            let more = request.sweeps.iter().any(|index| result.affected(Batch::step_of(*index)) >= SWEPT_AT_ONCE);
            self.swept = (!more).then(Instant::now);
        }
    }

    /// What an opening removes when it closes; none where nothing is old enough. Answers that were told lately stay, until their age removes them: a network may
    /// still bring a copy of what they answer.
    pub(super) fn last(&mut self) -> Option<Stmt> {
        self.removal(TOLD_AT_LAST).ok().flatten()
    }

    fn over(&self) -> usize {
        self.ids.iter().take_while(|(_, at)| at.elapsed() > TOLD_FOR).count()
    }

    /// The statement that removes so many of those that are over, at most.
    fn removal(&mut self, most: usize) -> Result<Option<Stmt>, Error> {
        let over = self.over().min(most);
        let ids: Vec<String> = self.ids.drain(..over).map(|(id, _)| id.to_string()).collect();
        if ids.is_empty() {
            return Ok(None);
        }
        let ids = serde_json::to_string(&ids)?;
        Ok(Some(Stmt::exec("DELETE FROM batches WHERE id IN (SELECT value FROM json_each(?1))", vec![ids.into()])))
    }
}
