//! The `seeknal` command: parse, call the project's work, print.
//!
//! Data goes to stdout (with `-o json` nothing but one JSON value), notes and the one line of an error go to stderr.

mod args;
mod cleanup;
mod end;
mod exit;
mod locks;
mod migrate;
mod output;
mod runs;
mod show;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::project::{Settings, process_environment};
use args::{Cli, Command, StateCommand};
use exit::{CliError, EXIT_FAILED};
use output::Output;

/// Runs the command line with these arguments (the first one is the program's name) and answers with its exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(mut error) => {
            hide_secrets(&mut error);
            // Help and version are asked for and no fault; clap says where each belongs and with which code.
            let _reader_gone = error.print().is_err();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(EXIT_FAILED));
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("the runtime does not start: {error}"));
            return ExitCode::from(EXIT_FAILED);
        }
    };
    let mut out = Output::new(cli.output);
    let done = runtime.block_on(run(&cli, &mut out));
    // What was printed belongs before the error.
    let flushed = out.flush();
    match done.and(flushed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}

/// What was given in a wrong place may be a URL with a token: an error shows values that look like names or numbers only.
fn hide_secrets(error: &mut clap::Error) {
    let shown = |kind, text: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        match kind {
            ContextKind::InvalidValue => text.len() <= 32 && text.chars().all(plain),
            _ => !text.contains("://") && !text.contains('@') && text.len() <= 64,
        }
    };
    let hidden: Vec<ContextKind> = error
        .context()
        .filter(|(kind, value)| matches!(value, ContextValue::String(text) if !shown(*kind, text)))
        .map(|(kind, _)| kind)
        .collect();
    for kind in hidden {
        error.insert(kind, ContextValue::String("(not shown)".to_owned()));
    }
}

async fn run(cli: &Cli, out: &mut Output) -> Result<(), CliError> {
    let settings = Settings::load(&cli.project_path, &process_environment)?;
    // A database that is named and not used is most likely meant. A move does use it.
    if let (Command::State { .. }, Some(unused)) = (&cli.command, settings.unused_url()) {
        output::note(&unused);
    }
    if let (Command::State { .. }, Some(nothing)) = (&cli.command, settings.keeps_nothing()) {
        output::note(&nothing);
    }
    match &cli.command {
        Command::MigrateState(options) => migrate::run(&settings, options, out).await,
        Command::State { command } => match command {
            StateCommand::Runs(options) => runs::run(&settings, options, out).await,
            StateCommand::Show { run } => show::run(&settings, run, out).await,
            StateCommand::Locks => locks::list(&settings, out).await,
            StateCommand::Unlock { token } => locks::unlock(&settings, *token, out).await,
            StateCommand::End(options) => end::run(&settings, options, out).await,
            StateCommand::Verify { repair, use_previous } => verify::run(&settings, *repair, *use_previous, out).await,
            StateCommand::Cleanup(options) => cleanup::run(&settings, options, out).await,
        },
    }
}
