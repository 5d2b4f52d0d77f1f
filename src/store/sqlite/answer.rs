//! How the answer to a batch is kept: a few bytes where everything was applied, JSON where something was refused.

use std::fmt;

use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, ToSql};

use super::error::{corrupt, sql_error};
use super::rows::Stamp;
use crate::model::{Batch, BatchAnswer};
use crate::store::{StoreError, short_answer};

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
    if let Some(short) = short_answer::write(answer) {
        return Ok(Stored(Value::Blob(short)));
    }
    let text = serde_json::to_string(answer).map_err(|error| corrupt("the answer to a batch", error))?;
    Ok(Stored(Value::Text(text)))
}

/// The answer that a batch was given before.
pub(super) fn find(conn: &Connection, batch: &Batch) -> Result<Option<BatchAnswer>, StoreError> {
    let place = || Place(batch);
    let fail = |error| sql_error(place(), error);
    let mut statement = conn.prepare_cached("SELECT answers FROM batches WHERE id = ?1").map_err(fail)?;
    let mut rows = statement.query([batch.id.as_bytes().as_slice()]).map_err(fail)?;
    let Some(row) = rows.next().map_err(fail)? else { return Ok(None) };
    let answer = match row.get_ref(0).map_err(fail)? {
        ValueRef::Blob(short) => short_answer::read(batch, short),
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
