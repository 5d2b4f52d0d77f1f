//! The stored shape of values: how they become columns, and how columns become values again or are refused by name.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Row, ToSql};
use serde::de::DeserializeOwned;

use super::error::{corrupt, sql_error};
pub(super) use crate::model::time::Stamp;
use crate::model::{
    FencingToken, Fingerprint, List, Metadata, NodeState, NodeStatus, ProcessInfo, RawJson, RunHeader, RunStatus, Version, time,
};
use crate::store::StoreError;
use crate::store::columns::read_fingerprint;
pub(super) use crate::store::columns::{At, fingerprint_text, metadata_text};

/// How SQLite's own `strftime` writes a stamp as we do: it knows three digits behind the second, we keep six.
pub(super) const STRFTIME: &str = "%Y-%m-%dT%H:%M:%f000Z";

/// A number of 64 bits without sign as SQLite keeps it exactly: an integer where it fits, else decimal text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Number(pub(super) u64);

impl ToSql for Number {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Owned(i64::try_from(self.0).map_or_else(|_| Value::Text(self.0.to_string()), Value::Integer)))
    }
}

/// A counter of ours; it never reaches 63 bits.
pub(super) fn counter(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl ToSql for Stamp {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Text(self.as_str().as_bytes())))
    }
}

/// A list as JSON text; none for an empty one.
pub(super) fn list_text<T: serde::Serialize>(list: &List<T>) -> rusqlite::Result<Option<String>> {
    crate::store::columns::list_text(list).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// A row that is being read, with the place that errors name.
pub(super) struct Fields<'r, P> {
    row: &'r Row<'r>,
    place: P,
}

impl<'r, P: fmt::Display> Fields<'r, P> {
    pub(super) fn new(row: &'r Row<'r>, place: P) -> Self {
        Self { row, place }
    }

    fn value(&self, column: usize) -> Result<ValueRef<'r>, StoreError> {
        self.row.get_ref(column).map_err(|error| sql_error(&self.place, error))
    }

    /// An error that names the row and the column.
    pub(super) fn bad(&self, column: usize, why: impl fmt::Display) -> StoreError {
        let name = self.row.as_ref().column_name(column).unwrap_or("?");
        corrupt(format_args!("{}, column {name}", self.place), why)
    }

    /// What a column holds, as far as it can be shown: for a message.
    pub(super) fn shown(&self, column: usize) -> String {
        match self.row.get_ref(column) {
            Ok(ValueRef::Text(bytes) | ValueRef::Blob(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
            Ok(ValueRef::Integer(number)) => number.to_string(),
            _ => "?".to_owned(),
        }
    }

    pub(super) fn text_or_null(&self, column: usize) -> Result<Option<&'r str>, StoreError> {
        match self.value(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Text(bytes) => std::str::from_utf8(bytes).map(Some).map_err(|error| self.bad(column, error)),
            other => Err(self.bad(column, format_args!("it holds {} instead of text", other.data_type()))),
        }
    }

    pub(super) fn text(&self, column: usize) -> Result<&'r str, StoreError> {
        self.text_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn stamp_or_null(&self, column: usize) -> Result<Option<DateTime<Utc>>, StoreError> {
        let read = |text| {
            time::parse(text).map_err(|error| {
                self.bad(column, format_args!("{error} (with SQL: strftime('{STRFTIME}', '2024-01-31 12:00:00'), which is UTC)"))
            })
        };
        self.text_or_null(column)?.map(read).transpose()
    }

    pub(super) fn stamp(&self, column: usize) -> Result<DateTime<Utc>, StoreError> {
        self.stamp_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn number_or_null(&self, column: usize) -> Result<Option<u64>, StoreError> {
        match self.value(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Integer(number) => {
                u64::try_from(number).map(Some).map_err(|_| self.bad(column, format_args!("{number} is negative")))
            }
            ValueRef::Text(bytes) => {
                let number = std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok());
                number.map(Some).ok_or_else(|| self.bad(column, "it is no number from 0 to 2^64-1"))
            }
            other => Err(self.bad(column, format_args!("it holds {} instead of a whole number", other.data_type()))),
        }
    }

    pub(super) fn number(&self, column: usize) -> Result<u64, StoreError> {
        self.number_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn version(&self, column: usize) -> Result<Version, StoreError> {
        self.number(column).map(Version)
    }

    pub(super) fn small(&self, column: usize) -> Result<u32, StoreError> {
        u32::try_from(self.number(column)?).map_err(|_| self.bad(column, "it is beyond 32 bits"))
    }

    pub(super) fn json_or_null(&self, column: usize) -> Result<Option<RawJson>, StoreError> {
        self.text_or_null(column)?.map(|text| RawJson::parse(text).map_err(|error| self.bad(column, error))).transpose()
    }

    pub(super) fn metadata(&self, column: usize) -> Result<Metadata, StoreError> {
        let Some(raw) = self.json_or_null(column)? else { return Ok(Metadata::new()) };
        Metadata::from_raw(&raw).ok_or_else(|| self.bad(column, "it is no JSON object"))
    }

    pub(super) fn list<T: DeserializeOwned>(&self, column: usize) -> Result<List<T>, StoreError> {
        let Some(text) = self.text_or_null(column)? else { return Ok(List::new()) };
        serde_json::from_str(text).map_err(|error| self.bad(column, error))
    }

    pub(super) fn fingerprint(&self, column: usize) -> Result<Option<Fingerprint>, StoreError> {
        self.text_or_null(column)?.map(|text| read_fingerprint(text).map_err(|why| self.bad(column, why))).transpose()
    }

    /// The columns of [`HEADER_COLUMNS`], beginning at `first`.
    pub(super) fn header(&self, first: usize) -> Result<RunHeader, StoreError> {
        let mut header = RunHeader::new(RunStatus::parse(self.text(first)?), self.stamp(first + 1)?);
        header.started_at = self.stamp_or_null(first + 2)?;
        header.finished_at = self.stamp_or_null(first + 3)?;
        header.worker = self
            .json_or_null(first + 4)?
            .map(|raw| raw.read::<ProcessInfo>().map_err(|error| self.bad(first + 4, error)))
            .transpose()?;
        header.metadata = self.metadata(first + 5)?;
        header.extra = self.json_or_null(first + 6)?;
        header.version = self.version(first + 7)?;
        Ok(header)
    }

    /// The columns of [`NODE_COLUMNS`], beginning at `first`; intervals and partitions are rows of their own.
    pub(super) fn node(&self, first: usize) -> Result<NodeState, StoreError> {
        let mut node = NodeState::new(NodeStatus::parse(self.text(first)?));
        node.attempt = self.small(first + 1)?;
        node.started_at = self.stamp_or_null(first + 2)?;
        node.finished_at = self.stamp_or_null(first + 3)?;
        node.duration_ms = self.number_or_null(first + 4)?;
        node.row_count = self.number_or_null(first + 5)?;
        node.fingerprint = self.fingerprint(first + 6)?;
        node.error = self.text_or_null(first + 7)?.map(Arc::from);
        node.watermarks = self.metadata(first + 8)?;
        node.metadata = self.metadata(first + 9)?;
        node.extra = self.json_or_null(first + 10)?;
        node.version = self.version(first + 11)?;
        node.depends_on = self.list(first + 12)?;
        node.max_attempts = self
            .number_or_null(first + 13)?
            .map(|most| u32::try_from(most).map_err(|_| self.bad(first + 13, "it is beyond 32 bits")))
            .transpose()?;
        node.attempts = self.list(first + 14)?;
        node.worker = self.text_or_null(first + 15)?.map(Arc::from);
        node.token = self.number_or_null(first + 16)?.map(FencingToken);
        Ok(node)
    }
}

/// The columns of a run's header, in the order of [`Fields::header`].
macro_rules! header_columns {
    () => {
        "status, created_at, started_at, finished_at, worker, metadata, extra, header_version"
    };
}
pub(super) use header_columns;

/// The columns of a node, in the order of [`Fields::node`].
macro_rules! node_columns {
    () => {
        "status, attempt, started_at, finished_at, duration_ms, row_count, fingerprint, error, watermarks, metadata, extra, version, \
         depends_on, max_attempts, attempts, worker, token"
    };
}
pub(super) use node_columns;
