//! The arguments.

use std::path::PathBuf;

use chrono::Datelike;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::model::{Clock, RunId, RunStatus, SystemClock};
use crate::project::Secret;
use crate::project::end::EndAs;

/// What stands under the arguments of a command: the codes that it can end with, and what sets it up.
macro_rules! after_help {
    ($($code:literal)+) => {
        concat!(
            "Exit codes:\n  0  done\n  1  error\n  2  wrong usage\n",
            $("  ", $code, "\n",)+
            "
Settings: seeknal_project.yml (state_backend, database_url, seeknal_state), searched upwards from
--project-path. Variables of the environment win over its keys and options:
SEEKNAL_STATE_BACKEND, SEEKNAL_DATABASE_URL, SEEKNAL_DATABASE_SCHEMA, SEEKNAL_DATABASE_CA_FILE,
SEEKNAL_DATABASE_TOKEN. SEEKNAL_DATABASE_PASSWORD counts where the URL has no password."
        )
    };
}

const CODES: &str = after_help! {
    "3  not found"
    "4  locked by somebody else, or a conflict; nothing was changed"
    "5  what is stored is damaged, foreign, or newer than this program"
    "6  something was done, then something failed"
};
const READ: &str = after_help! {
    "3  not found: the project's folder, or the server's database"
    "4  somebody else keeps the state locked"
    "5  what is stored is damaged, foreign, or newer than this program"
};
const SHOW: &str = after_help! {
    "3  not found: the run, the project's folder, or the server's database"
    "4  somebody else keeps the state locked"
    "5  what is stored is damaged, foreign, or newer than this program"
};
const UNLOCK: &str = after_help! {
    "3  not found: the lock, the project's folder, or the server's database"
    "4  somebody else keeps the state locked; nothing was changed"
    "5  what is stored is damaged, foreign, or newer than this program"
    "6  the lock was taken away, then something failed"
};
const END: &str = after_help! {
    "3  not found: the run, the project's folder, or the server's database"
    "4  its process lives or may live, it is locked or has another end; nothing was changed"
    "5  what is stored is damaged, foreign, or newer than this program"
    "6  the run was ended, then something failed"
};
const VERIFY: &str = after_help! {
    "3  not found: the project's folder, or the server's database"
    "4  somebody else keeps the state locked; nothing was changed"
    "5  there are problems, or what is stored is foreign, or newer than this program"
    "6  something was repaired, and the answer could not be written"
};
const CLEANUP: &str = after_help! {
    "3  not found: the project's folder, or the server's database"
    "4  somebody else keeps the state locked; nothing was changed"
    "5  what is stored is damaged, foreign, or newer than this program; nothing was changed"
    "6  runs were deleted, then something failed"
};

/// The state of data pipelines: what ran, what failed, who holds which lock.
#[derive(Debug, Parser)]
#[command(name = "seeknal", version, after_help = CODES, arg_required_else_help = true)]
pub(super) struct Cli {
    /// A folder of the project; its settings file is searched upwards from here
    #[arg(long, global = true, value_name = "DIR", default_value = ".")]
    pub(super) project_path: PathBuf,
    /// How to print: a table for people, or one JSON value with stable names
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(super) output: Format,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Move the project's state to the other backend; shows what would happen unless told --no-dry-run
    #[command(after_help = CODES)]
    MigrateState(MigrateArgs),
    /// Look at the state, and keep it in order
    #[command(after_help = CODES, arg_required_else_help = true)]
    State {
        #[command(subcommand)]
        command: StateCommand,
    },
}

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// Where the state goes
    #[arg(long, value_enum)]
    pub(super) backend: Target,
    /// Where it is now, if not in the other one of the two: `file`, `database` (what the settings name), `sqlite` (state.db), or a URL. Asked for where the
    /// settings name a server, and both the file and state.db could be meant
    #[arg(long, value_name = "PLACE", value_parser = |text: &str| Ok::<_, std::convert::Infallible>(Secret::new(text)))]
    pub(super) from: Option<Secret>,
    /// Only show what would happen (the default)
    #[arg(long, conflicts_with = "no_dry_run")]
    pub(super) dry_run: bool,
    /// Do it
    #[arg(long)]
    pub(super) no_dry_run: bool,
    /// Show the sums only, not every run
    #[arg(long)]
    pub(super) summary: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Target {
    /// run_state.json
    File,
    /// state.db, or the database of database_url
    Database,
}

#[derive(Debug, Subcommand)]
pub(super) enum StateCommand {
    /// List runs, newest first
    #[command(after_help = READ)]
    Runs(RunsArgs),
    /// Show a run and all its nodes
    #[command(after_help = SHOW)]
    Show {
        /// The run's id
        run: RunId,
    },
    /// List the locks that are held, and the processes that have the state open
    #[command(after_help = READ)]
    Locks,
    /// Take a lock away from its holder, by the token that `state locks` shows (database only: a file's locks end with their process)
    #[command(after_help = UNLOCK)]
    Unlock {
        /// The lock's token
        #[arg(value_parser = token)]
        token: u64,
    },
    /// End a run whose process is gone, and its nodes that still run
    #[command(after_help = END)]
    End(EndArgs),
    /// Check what is stored from end to end
    #[command(after_help = VERIFY)]
    Verify {
        /// Repair what can be repaired; a copy of the damaged files is kept
        #[arg(long)]
        repair: bool,
        /// With --repair: if the document cannot be read, bring back the previous one, which is older
        #[arg(long, requires = "repair")]
        use_previous: bool,
    },
    /// Delete runs that ended long ago; what their nodes completed stays known
    #[command(after_help = CLEANUP)]
    Cleanup(CleanupArgs),
}

#[derive(Debug, Args)]
pub(super) struct RunsArgs {
    /// Only runs in this status (also one that another program wrote); may be given several times
    #[arg(long, value_name = "STATUS", value_parser = |text: &str| Ok::<_, std::convert::Infallible>(RunStatus::parse(text)))]
    pub(super) status: Vec<RunStatus>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 20, conflicts_with = "all", allow_negative_numbers = true, value_parser = at_least_one)]
    pub(super) limit: u64,
    /// All of them
    #[arg(long)]
    pub(super) all: bool,
    /// Only runs whose id begins so
    #[arg(long, value_name = "TEXT")]
    pub(super) prefix: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    /// Delete runs that ended more than this many days ago
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = days)]
    pub(super) days: u64,
    /// Only show what would go
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Keep the newest ended runs, however old
    #[arg(long, value_name = "K", default_value_t = 0, allow_negative_numbers = true, value_parser = count)]
    pub(super) keep_last: u64,
}

#[derive(Debug, Args)]
pub(super) struct EndArgs {
    /// The run's id
    pub(super) run: RunId,
    /// How it ends; nodes of it that still run fail in either case
    #[arg(long = "as", value_enum, value_name = "STATUS", default_value_t = End::Failed)]
    pub(super) end: End,
    /// Also where nobody knows whether its process lives; never where it is known to live, or the run is locked
    #[arg(long)]
    pub(super) force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum End {
    Failed,
    Cancelled,
}

impl From<End> for EndAs {
    fn from(end: End) -> Self {
        match end {
            End::Failed => Self::Failed,
            End::Cancelled => Self::Cancelled,
        }
    }
}

// What a number may be, in words: the parser's own say what is wrong, and not what is right.

fn days(text: &str) -> Result<u64, String> {
    let most = SystemClock.now().num_days_from_ce().saturating_sub(1);
    let wrong = || format!("write a whole number of days, from 0 to {most} (it is before the year 1 otherwise), without a unit");
    text.parse().ok().filter(|days| i64::try_from(*days).is_ok_and(|days| days <= i64::from(most))).ok_or_else(wrong)
}

fn token(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("a token is a whole number, {} at most; `seeknal state locks` shows them", u64::MAX))
}

fn count(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("write a whole number from 0 to {}", u64::MAX))
}

fn at_least_one(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| format!("write a whole number from 1 to {}", u64::MAX))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
