//! Printing: tables for people, JSON for programs, notes and errors on stderr. Colours end where the terminal does.

use std::borrow::Cow;
use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use comfy_table::{Table, presets};
use serde::Serialize;

use super::args::Format;
use super::exit::CliError;
use crate::model::time;
use crate::project::Settings;
pub(super) use crate::project::shown::counted;
use crate::project::shown::steers;
use crate::store::StateBackend;
use crate::store::moving::refuse_moving;

/// Where a command's result goes.
pub(super) struct Output {
    format: Format,
    writer: BufWriter<anstream::Stdout>,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format, writer: BufWriter::new(anstream::stdout()) }
    }

    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// One line for people.
    pub(super) fn line(&mut self, line: impl AsRef<str>) -> Result<(), CliError> {
        Ok(writeln!(self.writer, "{}", harmless(line.as_ref()))?)
    }

    /// A table for people, without trailing blanks.
    pub(super) fn table(&mut self, table: &Table) -> Result<(), CliError> {
        for line in table.lines() {
            self.line(line.trim_end())?;
        }
        Ok(())
    }

    /// The command's one JSON value.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        // Made whole first: half a value is none.
        let text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
        Ok(writeln!(self.writer, "{text}")?)
    }

    /// A JSON array that is written element by element, so that it may be longer than memory.
    pub(super) fn array(&mut self) -> Result<JsonArray<'_>, CliError> {
        write!(self.writer, "[")?;
        Ok(JsonArray { output: self, empty: true })
    }

    pub(super) fn flush(&mut self) -> Result<(), CliError> {
        Ok(self.writer.flush()?)
    }
}

/// An array under way.
pub(super) struct JsonArray<'a> {
    output: &'a mut Output,
    empty: bool,
}

impl JsonArray<'_> {
    pub(super) fn push(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        write!(self.output.writer, "{}", if self.empty { "\n" } else { ",\n" })?;
        self.empty = false;
        Ok(serde_json::to_writer(&mut self.output.writer, value).map_err(io::Error::from)?)
    }

    pub(super) fn end(self) -> Result<(), CliError> {
        Ok(writeln!(self.output.writer, "{}", if self.empty { "]" } else { "\n]" })?)
    }
}

/// A table with these columns.
pub(super) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(columns.iter().map(|column| column.to_uppercase()));
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    table
}

/// A note for people.
pub(super) fn note(text: &str) {
    let _nobody_listens = writeln!(anstream::stderr(), "note: {}", one_line(text)).is_err();
}

/// The one line of an error.
pub(super) fn error(text: &str) {
    let _nobody_listens = writeln!(anstream::stderr(), "\u{1b}[1;31merror\u{1b}[0m: {}", one_line(text)).is_err();
}

/// Text from outside, on one line and without what would steer a terminal.
pub(super) fn one_line(text: &str) -> String {
    let spaced: String = text.chars().map(|c| if c.is_whitespace() || c.is_control() { ' ' } else { c }).collect();
    harmless(&spaced).into_owned()
}

/// The same text with what would steer a terminal, or turn the rest of the line around, written as an escape.
fn harmless(text: &str) -> Cow<'_, str> {
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) { shown.extend(c.escape_unicode()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

/// A stamp or a dash.
pub(super) fn stamp(stamp: Option<DateTime<Utc>>) -> String {
    stamp.map_or_else(dash, time::format)
}

pub(super) fn dash() -> String {
    "-".to_owned()
}

/// A duration as people read it.
pub(super) fn duration(ms: Option<u64>) -> String {
    let Some(ms) = ms else { return dash() };
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms}ms"),
        1..60 => format!("{seconds}.{:01}s", ms % 1000 / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

/// How long between two stamps, in milliseconds.
pub(super) fn between(start: Option<DateTime<Utc>>, end: Option<DateTime<Utc>>) -> Option<u64> {
    u64::try_from((end? - start?).num_milliseconds()).ok()
}

/// Opens the project's state for reading and tells its notices; `None` if there is none yet.
pub(super) async fn open_for_reading(settings: &Settings) -> Result<Option<Arc<dyn StateBackend>>, CliError> {
    Ok(settings.open_existing().await?.map(|(backend, report)| {
        report.notices.iter().for_each(|notice| note(notice));
        backend
    }))
}

/// Opens the project's state for writing; `None` if there is none yet: then none is made.
pub(super) async fn open_for_writing(settings: &Settings) -> Result<Option<Arc<dyn StateBackend>>, CliError> {
    let Some((reader, _told_again)) = settings.open_existing().await? else { return Ok(None) };
    reader.close().await?;
    let (backend, report) = settings.open_backend(false).await?;
    if let Err(error) = refuse_moving(&*backend).await {
        let _gives_its_own_error = backend.close().await.is_err();
        return Err(error.into());
    }
    report.notices.iter().for_each(|notice| note(notice));
    Ok(Some(backend))
}

/// What is said where there is no state.
pub(super) fn no_state(settings: &Settings) -> String {
    let place = settings.backend(true).map_or_else(|_| settings.target.value.display().to_string(), |backend| backend.location());
    let hint = settings.elsewhere().map(|hint| format!(" {hint}")).unwrap_or_default();
    format!("There is no state yet in {place} ({} backend).{hint}", settings.backend.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_lines() {
        let shown: Vec<String> = [0, 999, 1500, 61_000, 3_660_000].map(|ms| duration(Some(ms))).into();
        assert_eq!(shown, ["0ms", "999ms", "1.5s", "1m01s", "1h01m"]);
        assert_eq!(one_line("a\nb\u{1b}[31m\u{202e}"), "a b [31m\\u{202e}");
        assert_eq!(harmless("日本 \u{1b}[31m\u{2066}x"), "日本 \\u{1b}[31m\\u{2066}x");
    }
}
