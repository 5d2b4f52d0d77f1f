//! The answer to a batch in a few bytes, where everything was applied.
//!
//! A batch that is sent again brings its entries with it, so that only the numbers need to be kept: sequence, versions before, tokens. Where the database draws
//! the numbers of the sequence while it stores them, they stand behind the others, as text.

use crate::model::{
    Batch, BatchAnswer, CommitSeq, FencingToken, LeaseGrant, LeaseMutation, Outcome, Receipt, RunReceipt, Version,
};

/// The first byte of the short form; what begins with another one is JSON.
const SHORT: u8 = 1;
/// The first byte where the numbers of the sequence stand behind the others.
#[cfg(feature = "postgres")]
const UNNUMBERED: u8 = 2;
/// What an entry usually takes.
const ENTRY: usize = 8;

/// The short form; `None` where it cannot say all, as where something was refused: that is kept as JSON.
pub(crate) fn write(answer: &BatchAnswer) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(1 + ENTRY * answer.outcomes.len());
    bytes.push(SHORT);
    for outcome in &answer.outcomes {
        let Outcome::Applied(receipt) = outcome else { return None };
        put(&mut bytes, receipt.seq.0);
        for run in &receipt.runs {
            if run.after != after(run.before, receipt.seq) {
                return None;
            }
            put(&mut bytes, run.before.0);
        }
        for grant in &receipt.grants {
            put(&mut bytes, grant.token.0);
        }
    }
    Some(bytes)
}

/// The short form of an answer whose numbers of the sequence the database puts behind it, with commas between them; `None` where it cannot say all.
#[cfg(feature = "postgres")]
pub(crate) fn write_unnumbered(answer: &BatchAnswer) -> Option<Vec<u8>> {
    let mut bytes = vec![UNNUMBERED];
    for outcome in &answer.outcomes {
        let Outcome::Applied(receipt) = outcome else { return None };
        if !receipt.grants.is_empty() {
            return None;
        }
        for run in &receipt.runs {
            if run.before == Version::NONE || run.after != run.before.next() {
                return None;
            }
            put(&mut bytes, run.before.0);
        }
    }
    Some(bytes)
}

/// The version that an entry leaves: the next one, or, of a run that it made, the commit sequence.
fn after(before: Version, seq: CommitSeq) -> Version {
    if before == Version::NONE { Version(seq.0) } else { before.next() }
}

fn put(bytes: &mut Vec<u8>, mut value: u64) {
    // Seven bits a byte, the lowest first; the eighth says that more follow.
    while value >= 0x80 {
        bytes.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push((value & 0x7F) as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7F).checked_shl(shift)?;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Reads the short form back, with the help of the batch that it answered.
pub(crate) fn read(batch: &Batch, bytes: &[u8]) -> Option<BatchAnswer> {
    #[cfg(feature = "postgres")]
    if let [UNNUMBERED, bytes @ ..] = bytes {
        return read_unnumbered(batch, bytes);
    }
    let [SHORT, bytes @ ..] = bytes else { return None };
    let mut bytes = bytes;
    let bytes = &mut bytes;
    let mut outcomes = Vec::with_capacity(batch.entries.len());
    for entry in &batch.entries {
        let seq = CommitSeq(take(bytes)?);
        let mut runs = Vec::with_capacity(entry.parts.len());
        for part in &entry.parts {
            let before = Version(take(bytes)?);
            runs.push(RunReceipt { run: part.run.clone(), before, after: after(before, seq) });
        }
        let mut grants = Vec::new();
        for lease in &entry.leases {
            if let LeaseMutation::Grant { key, .. } | LeaseMutation::Renew { key, .. } = lease {
                grants.push(LeaseGrant { key: key.clone(), token: FencingToken(take(bytes)?) });
            }
        }
        outcomes.push(Outcome::Applied(Receipt { seq, runs, grants }));
    }
    bytes.is_empty().then_some(BatchAnswer { outcomes })
}

#[cfg(feature = "postgres")]
fn read_unnumbered(batch: &Batch, mut bytes: &[u8]) -> Option<BatchAnswer> {
    let mut receipts = Vec::with_capacity(batch.entries.len());
    for entry in &batch.entries {
        let mut runs = Vec::with_capacity(entry.parts.len());
        for part in &entry.parts {
            let before = Version(take(&mut bytes)?);
            runs.push(RunReceipt { run: part.run.clone(), before, after: before.next() });
        }
        receipts.push(runs);
    }
    let numbers = std::str::from_utf8(bytes).ok()?.split(',').map(|number| number.parse().ok().map(CommitSeq));
    let seqs: Vec<CommitSeq> = numbers.collect::<Option<_>>()?;
    let receipt = |(seq, runs)| Outcome::Applied(Receipt { seq, runs, grants: Vec::new() });
    let whole = seqs.len() == receipts.len();
    whole.then(|| BatchAnswer { outcomes: seqs.into_iter().zip(receipts).map(receipt).collect() })
}
