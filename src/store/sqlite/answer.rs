//! How the answer to a batch is kept: a few bytes where everything was applied, JSON where something was refused.
//!
//! A batch that is sent again brings its entries with it, so that only the numbers need to be kept: sequence, versions before, tokens.

use std::fmt;

use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, ToSql};

use super::error::{corrupt, sql_error};
use super::rows::Stamp;
use crate::model::{
    Batch, BatchAnswer, CommitSeq, FencingToken, LeaseGrant, LeaseMutation, Outcome, Receipt, RunReceipt, Version,
};
use crate::store::StoreError;

/// The first byte of the short form.
const SHORT: u8 = 1;

/// An answer as it is stored.
#[derive(Debug, PartialEq)]
pub(super) struct Stored(Value);

impl ToSql for Stored {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

/// The stored form of an answer.
pub(super) fn store(answer: &BatchAnswer) -> Result<Stored, StoreError> {
    if let Some(short) = short(answer) {
        return Ok(Stored(Value::Blob(short)));
    }
    let text = serde_json::to_string(answer).map_err(|error| corrupt("the answer to a batch", error))?;
    Ok(Stored(Value::Text(text)))
}

fn short(answer: &BatchAnswer) -> Option<Vec<u8>> {
    let mut bytes = vec![SHORT];
    for outcome in &answer.outcomes {
        let Outcome::Applied(receipt) = outcome else { return None };
        put(&mut bytes, receipt.seq.0);
        for run in &receipt.runs {
            put(&mut bytes, run.before.0);
        }
        for grant in &receipt.grants {
            put(&mut bytes, grant.token.0);
        }
    }
    Some(bytes)
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
fn read_short(batch: &Batch, mut bytes: &[u8]) -> Option<BatchAnswer> {
    let bytes = &mut bytes;
    let mut outcomes = Vec::with_capacity(batch.entries.len());
    for entry in &batch.entries {
        let seq = take(bytes)?;
        let mut runs = Vec::with_capacity(entry.parts.len());
        for part in &entry.parts {
            let before = Version(take(bytes)?);
            let after = if before == Version::NONE { Version(seq) } else { before.next() };
            runs.push(RunReceipt { run: part.run.clone(), before, after });
        }
        let mut grants = Vec::new();
        for lease in &entry.leases {
            if let LeaseMutation::Grant { key, .. } | LeaseMutation::Renew { key, .. } = lease {
                grants.push(LeaseGrant { key: key.clone(), token: FencingToken(take(bytes)?) });
            }
        }
        outcomes.push(Outcome::Applied(Receipt { seq: CommitSeq(seq), runs, grants }));
    }
    bytes.is_empty().then_some(BatchAnswer { outcomes })
}

/// The answer that a batch was given before.
pub(super) fn find(conn: &Connection, batch: &Batch) -> Result<Option<BatchAnswer>, StoreError> {
    let place = || Place(batch);
    let fail = |error| sql_error(place(), error);
    let mut statement = conn.prepare_cached("SELECT answers FROM batches WHERE id = ?1").map_err(fail)?;
    let mut rows = statement.query([batch.id.as_bytes().as_slice()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let answer = match row.get_ref(0).map_err(fail)? {
        ValueRef::Blob([SHORT, rest @ ..]) => read_short(batch, rest),
        ValueRef::Text(text) => serde_json::from_slice(text).ok(),
        _ => None,
    };
    match answer {
        Some(answer) if answer.outcomes.len() == batch.entries.len() => Ok(Some(answer)),
        _ => Err(corrupt(place(), "what is stored there is no answer to these entries")),
    }
}

struct Place<'b>(&'b Batch);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table batches, batch {}", self.0.id)
    }
}

/// Keeps the answer to a batch.
pub(super) fn keep(conn: &Connection, batch: &Batch, answer: &BatchAnswer, at: Stamp) -> Result<(), StoreError> {
    conn.prepare_cached("INSERT INTO batches (id, at, answers) VALUES (?1, ?2, ?3)")
        .and_then(|mut statement| {
            let stored = store(answer).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
            statement.execute((batch.id.as_bytes().as_slice(), at, stored))
        })
        .map(|_| ())
        .map_err(|error| sql_error(Place(batch), error))
}
