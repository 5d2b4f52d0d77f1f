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
use crate::store::moving::{refuse_mover, refuse_moving};

/// Where a command's result goes.
pub(super) struct Output {
    format: Format,
    writer: BufWriter<anstream::Stdout>,
    reader_gone: bool,
    done: Option<&'static str>,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format, writer: BufWriter::new(anstream::stdout()), reader_gone: false, done: None }
    }

    /// What cannot be printed from here on has happened all the same.
    pub(super) fn set_done(&mut self, what: &'static str) {
        self.done = Some(what);
    }

    /// Whoever reads us has seen enough (`| head`): nothing more is printed, and the command ends with the code that it would have ended with.
    pub(super) fn is_reader_gone(&self) -> bool {
        self.reader_gone
    }

    fn write(&mut self, text: &str) -> Result<(), CliError> {
        let written = if self.reader_gone { Ok(()) } else { self.writer.write_all(text.as_bytes()) };
        self.told(written)
    }

    fn told(&mut self, written: io::Result<()>) -> Result<(), CliError> {
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.reader_gone = true;
                Ok(())
            }
            Err(error) => Err(CliError::Output { error, done: self.done }),
            Ok(()) => Ok(()),
        }
    }

    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// One line for people.
    pub(super) fn line(&mut self, line: impl AsRef<str>) -> Result<(), CliError> {
        self.write(&format!("{}\n", harmless(line.as_ref())))
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
        let text = self.text(serde_json::to_string_pretty(value))?;
        self.write(&format!("{text}\n"))
    }

    /// JSON as it is printed.
    fn text(&mut self, made: serde_json::Result<String>) -> Result<String, CliError> {
        let made = made.map_err(|error| CliError::Output { error: error.into(), done: self.done })?;
        Ok(escaped(made))
    }

    /// A JSON array that is written element by element, so that it may be longer than memory.
    pub(super) fn array(&mut self) -> JsonArray<'_> {
        JsonArray { output: self, empty: true }
    }

    pub(super) fn flush(&mut self) -> Result<(), CliError> {
        let flushed = if self.reader_gone { Ok(()) } else { self.writer.flush() };
        self.told(flushed)
    }
}

/// An array under way. Before its first element nothing is printed: what fails until then leaves no half a value.
pub(super) struct JsonArray<'a> {
    output: &'a mut Output,
    empty: bool,
}

impl JsonArray<'_> {
    pub(super) fn push(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        let text = self.output.text(serde_json::to_string(value))?;
        self.output.write(if self.empty { "[\n" } else { ",\n" })?;
        self.empty = false;
        self.output.write(&text)
    }

    pub(super) fn is_reader_gone(&self) -> bool {
        self.output.is_reader_gone()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.empty
    }

    pub(super) fn end(self) -> Result<(), CliError> {
        self.output.write(if self.empty { "[]\n" } else { "\n]\n" })
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

/// The same JSON, with what would steer a terminal, or is taken out on the way to one, written as escapes. Outside of strings there is none of it but line ends.
fn escaped(json: String) -> String {
    use std::fmt::Write;
    let is_odd = |c: char| c != '\n' && steers(c);
    if !json.contains(is_odd) {
        return json;
    }
    let mut shown = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        // All of them are in the first plane: one unit each.
        if is_odd(c) {
            let _a_string_takes_all = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    shown
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
    open_found(settings, false).await.map(Some)
}

/// Opens for writing a state that was found to be there; `is_part`: also one into which a move was cut off.
async fn open_found(settings: &Settings, is_part: bool) -> Result<Arc<dyn StateBackend>, CliError> {
    let (backend, report) = settings.open_backend(false).await?;
    // In this order: a move switches the settings before it lets others in.
    let moving = if is_part { refuse_mover(&*backend).await } else { refuse_moving(&*backend).await };
    let refused = match moving {
        Ok(()) => settings.refuse_left(),
        Err(moving) => Err(moving.into()),
    };
    if let Err(error) = refused {
        let _gives_its_own_error = backend.close().await.is_err();
        return Err(error.into());
    }
    report.notices.iter().for_each(|notice| note(notice));
    Ok(backend)
}

/// What a command that may have nothing to write looks at first.
pub(super) struct Looked {
    reader: Arc<dyn StateBackend>,
    notices: Vec<String>,
}

/// Opens the project's state for reading, for a command that writes if it finds what it is asked to change: an opening for writing brings an older database
/// forward, and its older writer to a stop. `None` if there is no state yet.
pub(super) async fn look_first(settings: &Settings) -> Result<Option<Looked>, CliError> {
    Ok(settings.open_existing().await?.map(|(reader, report)| Looked { reader, notices: report.notices }))
}

impl Looked {
    pub(super) fn reader(&self) -> &dyn StateBackend {
        &*self.reader
    }

    /// There is nothing to write.
    pub(super) async fn close(self) -> Result<(), CliError> {
        self.notices.iter().for_each(|notice| note(notice));
        Ok(self.reader.close().await?)
    }

    /// There is: opens for writing, and tells the notices of that.
    pub(super) async fn write(self, settings: &Settings) -> Result<Arc<dyn StateBackend>, CliError> {
        self.reader.close().await?;
        open_found(settings, false).await
    }

    /// The same for who gives up a move that was cut off.
    pub(super) async fn write_part(self, settings: &Settings) -> Result<Arc<dyn StateBackend>, CliError> {
        self.reader.close().await?;
        open_found(settings, true).await
    }
}

/// What is said where there is no state. A path is told whole: the folder that was looked into may be another one than was meant.
pub(super) fn no_state(settings: &Settings) -> String {
    let place = settings.backend(true).map_or_else(|_| settings.target.value.display().to_string(), |backend| backend.location());
    let is_path = match &*settings.backend.value {
        "file" => true,
        name => name == "database" && settings.database_url.is_none(),
    };
    let whole = std::path::absolute(&place).ok().filter(|_| is_path);
    let place = whole.map_or(place, |path| path.display().to_string());
    let hint = settings.elsewhere().map(|hint| format!(" {hint}")).unwrap_or_default();
    format!("There is no state yet in {place} ({} backend).{hint}", settings.backend.value)
}

/// Tells people that there is no state. Who asked for JSON gets his value beside it.
pub(super) fn tell_no_state(settings: &Settings, out: &mut Output) -> Result<(), CliError> {
    if out.is_json() {
        note(&no_state(settings));
        return Ok(());
    }
    out.line(no_state(settings))
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
        let value = serde_json::json!({"error": "\u{9b}31m \u{7f} \u{202e} 日本 \u{1b}"});
        let json = escaped(serde_json::to_string_pretty(&value).unwrap());
        assert!(!json.contains(|c| c != '\n' && steers(c)) && json.contains("\\u009b31m \\u007f"), "{json}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), value);
    }
}
