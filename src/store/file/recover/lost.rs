//! What was written and does not lie there any more: what tells of it, and how versions go on behind it, so that none is used twice.

use super::State;
use crate::model::{CommitSeq, ProcessInfo, RunState, Version};

impl State {
    /// Says that the journal of the last writer is not there, which did not end cleanly: before the first commit numbers beyond those of the document are
    /// reserved, and then it has one until it closes. `highest_seq`: how far they are.
    pub(in crate::store::file) fn lost_journal(&self, left: Option<&ProcessInfo>, highest_seq: u64) -> Option<String> {
        let left =
            left.filter(|_| !self.has_journal && self.pending.is_none() && self.told_seq.is_some_and(|told| told < highest_seq))?;
        Some(format!(
            "{left} did not close the state, and its journal is missing or empty: if it was not ended just while it closed or made one, what it wrote after the \
             document was last written is lost. Versions go on behind all that were given out"
        ))
    }

    /// The highest number that anything which lies there tells of; `None` where nothing of ours does. One at least: numbers are reserved before there is a document,
    /// and the first one tells of none. The journal that goes on from the document tells of more than that.
    pub(in crate::store::file) fn told(&self) -> Option<u64> {
        let tail = self.active.as_ref().map(|active| active.tail);
        self.told_seq.max(self.beside_seq).max(tail).map(|seq| seq.max(1))
    }

    /// Whether numbers up to this one were given out that the files which lie there may not know of: a backup was put back, a journal is to be set aside or lost.
    /// Asked when the copy of the document was looked at. Notes what is to be told.
    pub(in crate::store::file) fn loses_versions(&mut self, highest_seq: u64, left: Option<&ProcessInfo>) -> bool {
        let lost = self.lost_journal(left, highest_seq);
        // A journal that is set aside, or is not there any more, holds what came after the document, whatever the copy says.
        let is_newest = self.is_newest && self.strangers.is_empty() && lost.is_none();
        self.notices.extend(lost);
        // A document has a newer copy only when its journal is done with: where it still lies there, both were put back.
        let goes_on = (self.active.is_some() || self.pending.is_some()) && !self.keeps_previous;
        if goes_on || self.document.is_none() || is_newest || highest_seq <= self.document_seq {
            return false;
        }
        if self.keeps_previous {
            self.notices.push(
                "the document is older than the last one of ours: a backup that was put back wins, versions go on behind all that were given out, and the \
                 newer document is kept under another name when something is written"
                    .to_owned(),
            );
        }
        true
    }

    /// Versions go on behind all numbers up to this one. No journal can continue the document then, not even its own: a new document comes before it.
    pub(in crate::store::file) fn go_on_behind(&mut self, highest_seq: u64) {
        if self.document.is_none() {
            // What is made in an empty state has versions behind all of them.
            self.ledger.raise_seq(CommitSeq(highest_seq));
            return;
        }
        let version = Version(highest_seq.max(self.ledger.seq().0).saturating_add(1));
        let runs: Vec<RunState> = self.ledger.runs().map(|run| run.at_version(version.max(run.version()))).collect();
        for run in runs {
            self.ledger.restore_run(run);
        }
        self.ledger.raise_seq(CommitSeq(version.0));
        self.generation = None;
    }
}
