//! The answer to a batch, as it is stored beside its id: decided in numbers that the sender assumed, told in those that the server really had.
//!
//! Other processes may have committed since this one looked: then the commit sequence, the tokens and the versions of runs are a little further
//! on. The differences are the same for every entry, so that the sender need not ask first.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::fault::corrupt;
use crate::model::{
    Batch, BatchAnswer, CommitSeq, FencingToken, LeaseGrant, LeaseMutation, Outcome, Receipt, Refusal, RunId, RunReceipt, Version,
};
use crate::store::StoreError;

/// Numbers of the store before a batch: what was assumed, or what was there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Before {
    pub(super) seq: u64,
    pub(super) token: u64,
    /// The versions of the runs that are there.
    pub(super) versions: BTreeMap<RunId, u64>,
}

/// An answer as it is stored.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    assumed: Before,
    outcomes: Vec<KeptOutcome>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum KeptOutcome {
    /// Commit sequence, the version before of every part (0: the run was made), and the tokens of grants and renewals.
    Applied(u64, Vec<u64>, Vec<u64>),
    Refused {
        refused: Refusal,
    },
}

impl Kept {
    /// The stored form of an answer, in assumed numbers.
    pub(super) fn of(answer: &BatchAnswer, assumed: &Before) -> Self {
        let outcomes = answer
            .outcomes
            .iter()
            .map(|outcome| match outcome {
                Outcome::Applied(receipt) => KeptOutcome::Applied(
                    receipt.seq.0,
                    receipt.runs.iter().map(|run| run.before.0).collect(),
                    receipt.grants.iter().map(|grant| grant.token.0).collect(),
                ),
                Outcome::Refused(refusal) => KeptOutcome::Refused { refused: refusal.clone() },
            })
            .collect();
        Self { assumed: assumed.clone(), outcomes }
    }

    /// The answer to this batch, in the numbers that were there.
    pub(super) fn told(&self, batch: &Batch, there: &Before) -> Result<BatchAnswer, StoreError> {
        let bad =
            || corrupt(format_args!("table batches, batch {}", batch.id), "what is stored there is no answer to these entries");
        if self.outcomes.len() != batch.entries.len() {
            return Err(bad());
        }
        let further = |there: u64, assumed: u64| there.checked_sub(assumed).ok_or_else(bad);
        let (seqs, tokens) = (further(there.seq, self.assumed.seq)?, further(there.token, self.assumed.token)?);
        let mut outcomes = Vec::with_capacity(batch.entries.len());
        for (entry, kept) in batch.entries.iter().zip(&self.outcomes) {
            let (seq, befores, granted) = match kept {
                KeptOutcome::Refused { refused } => {
                    outcomes.push(Outcome::Refused(refused.clone()));
                    continue;
                }
                KeptOutcome::Applied(seq, befores, granted) => (*seq, befores, granted),
            };
            let asked: Vec<&LeaseMutation> = entry
                .leases
                .iter()
                .filter(|lease| matches!(lease, LeaseMutation::Grant { .. } | LeaseMutation::Renew { .. }))
                .collect();
            if befores.len() != entry.parts.len() || granted.len() != asked.len() {
                return Err(bad());
            }
            let mut runs = Vec::with_capacity(befores.len());
            for (part, before) in entry.parts.iter().zip(befores) {
                let run = part.run.clone();
                // A run that the batch makes begins where it was told to, whatever others did.
                let moved = match (self.assumed.versions.get(&run), there.versions.get(&run)) {
                    (Some(assumed), Some(there)) => further(*there, *assumed)?,
                    (None, _) => 0,
                    (Some(_), None) => return Err(bad()),
                };
                runs.push(match *before {
                    0 => RunReceipt { run, before: Version::NONE, after: Version(seq) },
                    before => RunReceipt { run, before: Version(before + moved), after: Version(before + moved + 1) },
                });
            }
            let grants = asked.into_iter().zip(granted).map(|(lease, token)| match lease {
                LeaseMutation::Grant { key, .. } => Some(LeaseGrant { key: key.clone(), token: FencingToken(token + tokens) }),
                LeaseMutation::Renew { key, .. } => Some(LeaseGrant { key: key.clone(), token: FencingToken(*token) }),
                LeaseMutation::Release { .. } | LeaseMutation::Force { .. } => None,
            });
            outcomes.push(Outcome::Applied(Receipt { seq: CommitSeq(seq + seqs), runs, grants: grants.flatten().collect() }));
        }
        Ok(BatchAnswer { outcomes })
    }

    /// How many entries were applied.
    pub(super) fn applied(&self) -> u64 {
        self.outcomes.iter().map(|outcome| u64::from(matches!(outcome, KeptOutcome::Applied(..)))).sum()
    }
}
