//! Rows with text that is not UTF-8. A server does not answer with them at all, and does not say which they are: they are asked for once more, all text as bytes.

use std::time::Duration;

use super::client::Client;
use super::fault::Fault;
use super::hrana::{Stmt, Value, bytes_of};
use super::rows::Table;
use super::send::{self, Ask};

/// What text that was asked for as bytes begins with: bytes that are stored as such do not.
pub(super) const MARK: &str = "seeknal text ";

/// The bytes behind the mark.
pub(super) fn unmarked(base64: &str) -> Vec<u8> {
    let bytes = bytes_of(base64);
    bytes.strip_prefix(MARK.as_bytes()).map(<[u8]>::to_vec).unwrap_or(bytes)
}

/// A key of an index as an operand, whatever it is: the argument may be marked bytes, which stand for text.
pub(super) fn key(argument: &str) -> String {
    let length = MARK.len();
    let behind = length.saturating_add(1);
    format!(
        "CASE WHEN typeof({argument}) = 'blob' AND substr({argument}, 1, {length}) = CAST('{MARK}' AS BLOB) \
         THEN CAST(substr({argument}, {behind}) AS TEXT) ELSE {argument} END"
    )
}

/// Asks questions of which one has such a row in its answer. Text that makes sense is text again, the other is told apart from bytes.
pub(super) async fn ask(client: &Client, which: Ask, questions: &[Stmt], within: Duration) -> Result<Vec<Table>, Fault> {
    let shapes: Vec<Stmt> = questions
        .iter()
        .map(|stmt| Stmt::ask(stmt.place, format!("SELECT * FROM ({}) LIMIT 0", stmt.sql), stmt.args.clone()))
        .collect();
    let shapes = send::ask_as_is(client, which, &shapes, within).await?;
    let in_bytes: Vec<Stmt> = questions.iter().zip(&shapes).map(|(stmt, shape)| in_bytes(stmt, shape.width())).collect();
    let mut tables = send::ask_as_is(client, which, &in_bytes, within).await?;
    for (table, shape) in tables.iter_mut().zip(shapes) {
        table.read_again(shape, read);
    }
    Ok(tables)
}

fn in_bytes(stmt: &Stmt, columns: usize) -> Stmt {
    let names: Vec<String> = (0..columns).map(|column| format!("c{column}")).collect();
    let values: Vec<String> = names
        .iter()
        .map(|name| format!("CASE typeof({name}) WHEN 'text' THEN CAST('{MARK}' || {name} AS BLOB) ELSE {name} END"))
        .collect();
    let sql = format!("WITH asked ({}) AS ({}) SELECT {} FROM asked", names.join(", "), stmt.sql, values.join(", "));
    Stmt::ask(stmt.place, sql, stmt.args.clone())
}

fn read(value: &mut Value) {
    let Value::Blob { base64 } = value else { return };
    let bytes = bytes_of(base64);
    if let Some(text) = bytes.strip_prefix(MARK.as_bytes()) {
        *value = match std::str::from_utf8(text) {
            Ok(text) => Value::Text { value: text.to_owned() },
            Err(_) => Value::Garbled { base64: std::mem::take(base64) },
        };
    }
}
