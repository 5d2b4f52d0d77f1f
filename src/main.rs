//! The `seeknal` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    seeknal_state::cli::main(std::env::args_os())
}
