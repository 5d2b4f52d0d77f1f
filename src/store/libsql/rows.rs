//! The stored shape of values: how they become rows of JSON, and how rows become values again or are refused by name.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::fault::corrupt;
use super::garbled::unmarked;
use super::hrana::{Arg, StmtResult, Value, bytes_of};
use crate::model::{
    FencingToken, Fingerprint, Metadata, NodeId, NodeState, NodeStatus, ProcessInfo, RawJson, RunHeader, RunId, RunStatus,
    Version, time,
};
use crate::store::StoreError;
use crate::store::columns::read_fingerprint;

/// A row's JSON is put into one argument with others up to about here. The server takes 5,000,000 bytes.
const CHUNK: usize = 1_000_000;

/// Rows as JSON lists, for statements that write many of them at once.
#[derive(Debug, Default)]
pub(super) struct JsonRows {
    full: Vec<String>,
    open: String,
}

impl JsonRows {
    /// Adds a row, which is a JSON list itself.
    pub(super) fn push_text(&mut self, row: &str) {
        if !self.open.is_empty() && self.open.len() + row.len() > CHUNK {
            self.close();
        }
        self.open.push(if self.open.is_empty() { '[' } else { ',' });
        self.open.push_str(row);
    }

    fn close(&mut self) {
        let mut list = std::mem::take(&mut self.open);
        list.push(']');
        self.full.push(list);
    }

    /// The lists, each in the length of one argument; none for no rows.
    pub(super) fn into_lists(mut self) -> Vec<String> {
        if !self.open.is_empty() {
            self.close();
        }
        self.full
    }
}

/// A list as arguments, each of a length that the server takes; one at least. Names and numbers: nothing in them can fail to be written.
pub(super) fn lists<T: Serialize>(list: impl IntoIterator<Item = T>) -> Vec<Arg> {
    let mut rows = JsonRows::default();
    for item in list {
        rows.push_text(&serde_json::to_string(&item).unwrap_or_default());
    }
    let lists = rows.into_lists();
    if lists.is_empty() { vec![Arg::from("[]")] } else { lists.into_iter().map(Arg::from).collect() }
}

/// Appends a row of a JSON list.
macro_rules! row {
    ($rows:expr, $($value:expr),+ $(,)?) => {{
        let mut row = String::from("[");
        $(
            if row.len() > 1 {
                row.push(',');
            }
            row.push_str(&serde_json::to_string(&$value)?);
        )+
        row.push(']');
        $rows.push_text(&row);
    }};
}
pub(super) use row;

/// A number of 64 bits without sign as the server keeps it exactly: an integer where it fits, else decimal text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Number(pub(super) u64);

impl Serialize for Number {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(self.0) {
            Ok(number) => serializer.serialize_i64(number),
            Err(_) => serializer.collect_str(&self.0),
        }
    }
}

/// A stamp as it is stored.
pub(super) fn stamp_text(stamp: DateTime<Utc>) -> String {
    time::Stamp::of(stamp).as_str().to_owned()
}

/// Notes as JSON text; none for no notes.
pub(super) fn metadata_text(metadata: &Metadata) -> Option<String> {
    (!metadata.is_empty()).then(|| metadata.to_raw().as_str().to_owned())
}

/// What a question answered, with what errors call it.
#[derive(Debug)]
pub(super) struct Table {
    result: StmtResult,
    place: &'static str,
}

impl Table {
    /// `place` names the table that the rows are from.
    pub(super) fn new(result: StmtResult, place: &'static str) -> Self {
        Self { result, place }
    }

    /// The rows, in their order.
    pub(super) fn rows(&self) -> impl ExactSizeIterator<Item = Fields<'_>> {
        self.result.rows.iter().map(|row| Fields { table: self, row, first: 0, of: None })
    }

    /// The first row.
    pub(super) fn first(&self) -> Option<Fields<'_>> {
        self.rows().next()
    }

    /// How many columns there are.
    pub(super) fn width(&self) -> usize {
        self.result.cols.len()
    }

    /// The same rows with the columns of another answer, and every value read once more.
    pub(super) fn read_again(&mut self, shape: Self, read: fn(&mut Value)) {
        self.result.cols = shape.result.cols;
        self.result.rows.iter_mut().flatten().for_each(read);
    }

    /// How many rows there are.
    pub(super) fn len(&self) -> usize {
        self.result.rows.len()
    }
}

/// A row that is being read, beginning at some column, with the place that errors name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'r> {
    table: &'r Table,
    row: &'r [Value],
    first: usize,
    of: Option<(&'r str, Option<&'r str>)>,
}

impl<'r> Fields<'r> {
    /// The same row from a column on.
    pub(super) fn from(self, first: usize) -> Self {
        Self { first: self.first + first, ..self }
    }

    /// The same row; errors name the run and the node that it belongs to.
    pub(super) fn of(self, run: &'r RunId, node: Option<&'r NodeId>) -> Self {
        Self { of: Some((run.as_str(), node.map(NodeId::as_str))), ..self }
    }

    /// An error that names the row and the column.
    pub(super) fn bad(&self, column: usize, why: impl fmt::Display) -> StoreError {
        let mut place = format!("table {}", self.table.place);
        if let Some((run, node)) = self.of {
            place.extend([format!(", run {run:?}")]);
            place.extend(node.map(|node| format!(", node {node:?}")));
        }
        let name = self.table.result.cols.get(self.first + column).and_then(|column| column.name.as_deref()).unwrap_or("?");
        corrupt(format_args!("{place}, column {name}"), why)
    }

    fn value(&self, column: usize) -> Result<&'r Value, StoreError> {
        self.row.get(self.first + column).ok_or_else(|| self.bad(column, "it is missing in the answer"))
    }

    /// What a column holds, as far as it can be shown: for a message.
    pub(super) fn shown(&self, column: usize) -> String {
        match self.value(column) {
            Ok(Value::Text { value }) => value.clone(),
            Ok(Value::Integer { value }) => value.to_string(),
            Ok(Value::Blob { base64 }) => String::from_utf8_lossy(&bytes_of(base64)).into_owned(),
            Ok(Value::Garbled { base64 }) => String::from_utf8_lossy(&unmarked(base64)).into_owned(),
            Ok(Value::Null | Value::Float { .. }) | Err(_) => "?".to_owned(),
        }
    }

    /// What a column of an index holds, whether or not it makes sense: to ask for what lies behind it, by [`key`](super::garbled::key).
    pub(super) fn key(&self, column: usize) -> Result<Arg, StoreError> {
        match self.value(column)? {
            Value::Text { value } => Ok(Arg::Text(value.clone())),
            Value::Integer { value } => Ok(Arg::Integer(*value)),
            Value::Blob { base64 } | Value::Garbled { base64 } => Ok(Arg::Blob(base64.clone())),
            other @ (Value::Null | Value::Float { .. }) => Err(self.bad(column, format_args!("it holds {}", other.kind()))),
        }
    }

    pub(super) fn text_or_null(&self, column: usize) -> Result<Option<&'r str>, StoreError> {
        match self.value(column)? {
            Value::Null => Ok(None),
            Value::Text { value } => Ok(Some(value)),
            other => Err(self.bad(column, format_args!("it holds {} instead of text", other.kind()))),
        }
    }

    pub(super) fn text(&self, column: usize) -> Result<&'r str, StoreError> {
        self.text_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn stamp_or_null(&self, column: usize) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.text_or_null(column)?.map(|text| time::parse(text).map_err(|error| self.bad(column, error))).transpose()
    }

    pub(super) fn stamp(&self, column: usize) -> Result<DateTime<Utc>, StoreError> {
        self.stamp_or_null(column)?.ok_or_else(|| self.bad(column, "it is NULL"))
    }

    pub(super) fn number_or_null(&self, column: usize) -> Result<Option<u64>, StoreError> {
        match self.value(column)? {
            Value::Null => Ok(None),
            Value::Integer { value } => {
                u64::try_from(*value).map(Some).map_err(|_| self.bad(column, format_args!("{value} is negative")))
            }
            Value::Text { value } => value.parse().map(Some).map_err(|_| self.bad(column, "it is no number from 0 to 2^64-1")),
            other => Err(self.bad(column, format_args!("it holds {} instead of a whole number", other.kind()))),
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

    fn json_or_null(&self, column: usize) -> Result<Option<RawJson>, StoreError> {
        self.text_or_null(column)?.map(|text| RawJson::parse(text).map_err(|error| self.bad(column, error))).transpose()
    }

    pub(super) fn metadata(&self, column: usize) -> Result<Metadata, StoreError> {
        let Some(raw) = self.json_or_null(column)? else { return Ok(Metadata::new()) };
        Metadata::from_raw(&raw).ok_or_else(|| self.bad(column, "it is no JSON object"))
    }

    pub(super) fn fingerprint(&self, column: usize) -> Result<Option<Fingerprint>, StoreError> {
        self.text_or_null(column)?.map(|text| read_fingerprint(text).map_err(|why| self.bad(column, why))).transpose()
    }

    /// JSON of a shape of ours; its default for NULL.
    pub(super) fn json<T: DeserializeOwned + Default>(&self, column: usize) -> Result<T, StoreError> {
        let Some(text) = self.text_or_null(column)? else { return Ok(T::default()) };
        serde_json::from_str(text).map_err(|error| self.bad(column, error))
    }

    pub(super) fn run_id(&self, column: usize) -> Result<RunId, StoreError> {
        RunId::new(self.text(column)?).map_err(|error| self.bad(column, error))
    }

    pub(super) fn node_id(&self, column: usize) -> Result<NodeId, StoreError> {
        NodeId::new(self.text(column)?).map_err(|error| self.bad(column, error))
    }

    /// The columns of [`header_columns`].
    pub(super) fn header(&self) -> Result<RunHeader, StoreError> {
        let mut header = RunHeader::new(RunStatus::parse(self.text(0)?), self.stamp(1)?);
        header.started_at = self.stamp_or_null(2)?;
        header.finished_at = self.stamp_or_null(3)?;
        header.worker =
            self.json_or_null(4)?.map(|raw| raw.read::<ProcessInfo>().map_err(|error| self.bad(4, error))).transpose()?;
        header.metadata = self.metadata(5)?;
        header.extra = self.json_or_null(6)?;
        header.version = self.version(7)?;
        Ok(header)
    }

    /// The columns of [`node_columns`]; intervals and partitions are rows of their own.
    pub(super) fn node(&self) -> Result<NodeState, StoreError> {
        let mut node = NodeState::new(NodeStatus::parse(self.text(0)?));
        node.attempt = self.small(1)?;
        node.started_at = self.stamp_or_null(2)?;
        node.finished_at = self.stamp_or_null(3)?;
        node.duration_ms = self.number_or_null(4)?;
        node.row_count = self.number_or_null(5)?;
        node.fingerprint = self.fingerprint(6)?;
        node.error = self.text_or_null(7)?.map(Arc::from);
        node.watermarks = self.metadata(8)?;
        node.metadata = self.metadata(9)?;
        node.extra = self.json_or_null(10)?;
        node.version = self.version(11)?;
        node.depends_on = self.json(12)?;
        node.max_attempts = self
            .number_or_null(13)?
            .map(|most| u32::try_from(most).map_err(|_| self.bad(13, "it is beyond 32 bits")))
            .transpose()?;
        node.attempts = self.json(14)?;
        node.worker = self.text_or_null(15)?.map(Arc::from);
        node.token = self.number_or_null(16)?.map(FencingToken);
        Ok(node)
    }
}

/// The columns of a run's header, in the order of [`Fields::header`]. With a table's short name in front of each.
macro_rules! header_columns {
    () => {
        "r.status, r.created_at, r.started_at, r.finished_at, r.worker, r.metadata, r.extra, r.header_version"
    };
}
pub(super) use header_columns;

/// The columns of a node, in the order of [`Fields::node`]. With a table's short name in front of each.
macro_rules! node_columns {
    () => {
        "n.status, n.attempt, n.started_at, n.finished_at, n.duration_ms, n.row_count, n.fingerprint, n.error, n.watermarks, n.metadata, \
         n.extra, n.version, n.depends_on, n.max_attempts, n.attempts, n.worker, n.token"
    };
}
pub(super) use node_columns;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_into_arguments() {
        let mut rows = JsonRows::default();
        for _ in 0..3 {
            rows.push_text(&format!("[\"{}\",1]", "x".repeat(CHUNK / 2)));
        }
        let lists = rows.into_lists();
        assert_eq!(lists.len(), 3);
        for list in &lists {
            let read: Vec<(String, u8)> = serde_json::from_str(list).unwrap();
            assert_eq!(read.len(), 1);
        }
        assert!(JsonRows::default().into_lists().is_empty());
        assert_eq!(serde_json::to_string(&[Number(5), Number(u64::MAX)]).unwrap(), r#"[5,"18446744073709551615"]"#);
    }

    #[test]
    fn stamps_beyond_the_calendar_become_its_ends() {
        assert_eq!(stamp_text(DateTime::<Utc>::MAX_UTC), "9999-12-31T23:59:59.999999Z");
        assert_eq!(stamp_text(DateTime::<Utc>::MIN_UTC), "0001-01-01T00:00:00.000000Z");
    }
}
