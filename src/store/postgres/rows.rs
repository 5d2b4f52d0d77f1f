//! The stored shape of values: how they become columns, and how columns become values again or are refused by name.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Datelike, Utc};
use serde::de::DeserializeOwned;
use tokio_postgres::Row;
use tokio_postgres::types::FromSqlOwned;

use super::error::corrupt;
use crate::model::{
    FencingToken, Fingerprint, LeaseKey, LeaseOwner, LeaseRecord, List, Metadata, NodeId, NodeState, NodeStatus, ProcessInfo,
    RawJson, RunHeader, RunId, RunStatus, Version, time,
};
use crate::store::StoreError;
use crate::store::columns::read_fingerprint;
use crate::store::decide::Head;

/// A counter of ours; it never reaches 63 bits.
pub(super) fn counter(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A stamp that fits: a bound of a filter, or the end of an endless lease, may lie beyond what is stored.
pub(super) fn stamp(stamp: DateTime<Utc>) -> DateTime<Utc> {
    match stamp.year() {
        1..=9999 => stamp,
        year => time::from_micros(if year < 1 { -62_135_596_800_000_000 } else { 253_402_300_799_999_999 }).unwrap_or_default(),
    }
}

/// Free text as PostgreSQL can keep it: as it is, or as a JSON string where it holds a NUL (which text of PostgreSQL cannot) or looks like one.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    if text.contains('\0') || text.starts_with('"') {
        return Cow::Owned(RawJson::string(text).as_str().to_owned());
    }
    Cow::Borrowed(text)
}

/// Reads what [`plain`] wrote.
pub(super) fn read_plain(text: &str) -> Option<Cow<'_, str>> {
    if text.starts_with('"') {
        return RawJson::parse(text).ok()?.as_text().map(Cow::Owned);
    }
    Some(Cow::Borrowed(text))
}

/// A row that is being read, with the place that errors name.
pub(super) struct Fields<'r, P> {
    row: &'r Row,
    place: P,
}

impl<'r, P: fmt::Display> Fields<'r, P> {
    pub(super) fn new(row: &'r Row, place: P) -> Self {
        Self { row, place }
    }

    /// An error that names the row and the column.
    pub(super) fn bad(&self, column: usize, why: impl fmt::Display) -> StoreError {
        let name = self.row.columns().get(column).map_or("?", |column| column.name());
        corrupt(format_args!("{}, column {name}", self.place), why)
    }

    pub(super) fn get<T: FromSqlOwned>(&self, column: usize) -> Result<T, StoreError> {
        self.row.try_get(column).map_err(|error| {
            let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            self.bad(column, why)
        })
    }

    pub(super) fn text_or_null(&self, column: usize) -> Result<Option<&'r str>, StoreError> {
        self.row.try_get(column).map_err(|error| self.bad(column, error))
    }

    pub(super) fn text(&self, column: usize) -> Result<&'r str, StoreError> {
        self.text_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    /// Free text that [`plain`] wrote.
    pub(super) fn plain_or_null(&self, column: usize) -> Result<Option<Cow<'r, str>>, StoreError> {
        let Some(text) = self.text_or_null(column)? else { return Ok(None) };
        read_plain(text).map(Some).ok_or_else(|| self.bad(column, "it begins like a JSON string and is none"))
    }

    pub(super) fn plain(&self, column: usize) -> Result<Cow<'r, str>, StoreError> {
        self.plain_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn stamp_or_null(&self, column: usize) -> Result<Option<DateTime<Utc>>, StoreError> {
        let Some(stamp) = self.get::<Option<DateTime<Utc>>>(column)? else { return Ok(None) };
        if !time::is_storable(stamp) {
            return Err(self.bad(column, "it is outside of the years 1 to 9999"));
        }
        Ok(Some(stamp))
    }

    pub(super) fn stamp(&self, column: usize) -> Result<DateTime<Utc>, StoreError> {
        self.stamp_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    /// A number that was kept as `numeric` and is read as text: `bigint` ends at 63 bits.
    pub(super) fn number_or_null(&self, column: usize) -> Result<Option<u64>, StoreError> {
        let Some(text) = self.text_or_null(column)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.bad(column, format_args!("{text} is no number from 0 to 2^64-1")))
    }

    pub(super) fn counter_or_null(&self, column: usize) -> Result<Option<u64>, StoreError> {
        let Some(number) = self.get::<Option<i64>>(column)? else { return Ok(None) };
        u64::try_from(number).map(Some).map_err(|_| self.bad(column, format_args!("{number} is negative")))
    }

    pub(super) fn counter(&self, column: usize) -> Result<u64, StoreError> {
        self.counter_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn version(&self, column: usize) -> Result<Version, StoreError> {
        self.counter(column).map(Version)
    }

    fn small_or_null(&self, column: usize) -> Result<Option<u32>, StoreError> {
        let found = self.counter_or_null(column)?.map(u32::try_from).transpose();
        found.map_err(|_| self.bad(column, "it is beyond 32 bits"))
    }

    pub(super) fn small(&self, column: usize) -> Result<u32, StoreError> {
        self.small_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn json_or_null(&self, column: usize) -> Result<Option<RawJson>, StoreError> {
        self.text_or_null(column)?.map(|text| RawJson::parse(text).map_err(|error| self.bad(column, error))).transpose()
    }

    pub(super) fn metadata(&self, column: usize) -> Result<Metadata, StoreError> {
        let Some(raw) = self.json_or_null(column)? else { return Ok(Metadata::new()) };
        Metadata::from_raw(&raw).ok_or_else(|| self.bad(column, "it is no JSON object"))
    }

    fn list<T: DeserializeOwned>(&self, column: usize) -> Result<List<T>, StoreError> {
        let Some(text) = self.text_or_null(column)? else { return Ok(List::new()) };
        serde_json::from_str(text).map_err(|error| self.bad(column, error))
    }

    pub(super) fn fingerprint(&self, column: usize) -> Result<Option<Fingerprint>, StoreError> {
        self.text_or_null(column)?.map(|text| read_fingerprint(text).map_err(|why| self.bad(column, why))).transpose()
    }

    pub(super) fn run_id(&self, column: usize) -> Result<RunId, StoreError> {
        RunId::new(self.text(column)?).map_err(|error| self.bad(column, error))
    }

    pub(super) fn node_id(&self, column: usize) -> Result<NodeId, StoreError> {
        NodeId::new(self.text(column)?).map_err(|error| self.bad(column, error))
    }

    /// The columns of [`head_columns`], beginning at `first`.
    pub(super) fn head(&self, first: usize) -> Result<Head, StoreError> {
        Ok(Head {
            version: self.version(first)?,
            created_version: self.version(first + 1)?,
            header_version: self.version(first + 2)?,
            nodes_deleted: self.version(first + 3)?,
            created_at: self.stamp(first + 4)?,
            status: RunStatus::parse(&self.plain(first + 5)?),
        })
    }

    /// The columns of [`header_columns`], beginning at `first`.
    pub(super) fn header(&self, first: usize) -> Result<RunHeader, StoreError> {
        let mut header = RunHeader::new(RunStatus::parse(&self.plain(first)?), self.stamp(first + 1)?);
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

    /// The columns of [`node_columns`], beginning at `first`; intervals and partitions are rows of their own.
    pub(super) fn node(&self, first: usize) -> Result<NodeState, StoreError> {
        let mut node = NodeState::new(NodeStatus::parse(&self.plain(first)?));
        node.attempt = self.small(first + 1)?;
        node.started_at = self.stamp_or_null(first + 2)?;
        node.finished_at = self.stamp_or_null(first + 3)?;
        node.duration_ms = self.number_or_null(first + 4)?;
        node.row_count = self.number_or_null(first + 5)?;
        node.fingerprint = self.fingerprint(first + 6)?;
        node.error = self.plain_or_null(first + 7)?.map(Arc::from);
        node.watermarks = self.metadata(first + 8)?;
        node.metadata = self.metadata(first + 9)?;
        node.extra = self.json_or_null(first + 10)?;
        node.version = self.version(first + 11)?;
        node.depends_on = self.list(first + 12)?;
        node.max_attempts = self.small_or_null(first + 13)?;
        node.attempts = self.list(first + 14)?;
        node.worker = self.plain_or_null(first + 15)?.map(Arc::from);
        node.token = self.counter_or_null(first + 16)?.map(FencingToken);
        Ok(node)
    }

    /// The columns of [`lease_columns`], beginning at `first`.
    pub(super) fn lease(&self, first: usize) -> Result<LeaseRecord, StoreError> {
        let node = match self.text(first + 1)? {
            "" => None,
            _ => Some(self.node_id(first + 1)?),
        };
        let mut process = ProcessInfo::current(self.stamp(first + 7)?);
        process.host = self.plain(first + 4)?.into();
        process.pid = self.small(first + 5)?;
        process.id = self.text(first + 6)?.into();
        let owner = LeaseOwner { process, name: self.plain(first + 3)?.into() };
        let purpose = self.plain_or_null(first + 8)?.map(Into::into);
        let ttl_ms = self.number_or_null(first + 11)?.ok_or_else(|| self.bad(first + 11, "it is NULL"))?;
        let key = LeaseKey { run: self.run_id(first)?, node };
        let token = FencingToken(self.counter(first + 2)?);
        let mut record = LeaseRecord::new(key, token, owner, purpose, self.stamp(first + 9)?, ttl_ms);
        record.until = self.stamp(first + 10)?;
        Ok(record)
    }
}

/// The columns of a run that every commit needs, in the order of [`Fields::head`].
macro_rules! head_columns {
    () => {
        "version, created_version, header_version, nodes_deleted_version, created_at, status"
    };
}
pub(super) use head_columns;

/// The columns of a run's header, in the order of [`Fields::header`].
macro_rules! header_columns {
    () => {
        "status, created_at, started_at, finished_at, worker, metadata, extra, header_version"
    };
}
pub(super) use header_columns;

/// The columns of a node, in the order of [`Fields::node`], of the table that is called `n`.
macro_rules! node_columns {
    () => {
        "n.status, n.attempt, n.started_at, n.finished_at, n.duration_ms::text, n.row_count::text, n.fingerprint, n.error, n.watermarks, \
         n.metadata, n.extra, n.version, n.depends_on, n.max_attempts, n.attempts, n.worker, n.token"
    };
}
pub(super) use node_columns;

/// The columns of a lease, in the order of [`Fields::lease`].
macro_rules! lease_columns {
    () => {
        "run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, purpose, since, until, ttl_ms::text"
    };
}
pub(super) use lease_columns;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_as_it_was() {
        for text in ["", "plain", "\"quoted\"", "\"", "a\0b", "\0", "{\"json\":1}", "日\n"] {
            let stored = plain(text);
            assert!(!stored.contains('\0'));
            assert_eq!(read_plain(&stored).unwrap(), text);
        }
        assert_eq!(read_plain("\"not closed"), None);
    }

    #[test]
    fn stamps_beyond_the_calendar_become_its_ends() {
        assert_eq!(time::format(stamp(DateTime::<Utc>::MAX_UTC)), "9999-12-31T23:59:59.999999Z");
        assert_eq!(time::format(stamp(DateTime::<Utc>::MIN_UTC)), "0001-01-01T00:00:00Z");
    }
}
