//! `seeknal state verify [--repair]`.

use serde::Serialize;

use super::exit::CliError;
use super::output::{Output, counted, no_state};
use crate::model::{Clock, SystemClock};
use crate::project::{self, ProjectErrorKind, Settings};

/// What is printed. Every field is always there.
#[derive(Serialize)]
struct Verified {
    sound: bool,
    checked: Vec<String>,
    problems: Vec<String>,
    repaired: Vec<String>,
}

pub(super) async fn run(settings: &Settings, repair: bool, use_previous: bool, out: &mut Output) -> Result<(), CliError> {
    let repaired = if repair { project::repair(settings, SystemClock.now(), use_previous).await? } else { Vec::new() };
    if !repaired.is_empty() {
        out.set_done("the state was repaired");
    }
    let (checked, problems) = match project::verify(settings).await? {
        Some(report) => (report.checked, report.problems),
        None => (vec![no_state(settings)], Vec::new()),
    };
    let verified = Verified { sound: problems.is_empty(), checked, problems, repaired };
    if out.is_json() {
        out.json(&verified)?;
    } else {
        for (word, lines) in [("done", &verified.repaired), ("checked", &verified.checked), ("PROBLEM", &verified.problems)] {
            for line in lines {
                out.line(format!("{word}: {}", super::output::one_line(line)))?;
            }
        }
    }
    if verified.sound {
        return if out.is_json() { Ok(()) } else { out.line("The state is sound.") };
    }
    let is_told =
        |problem: &String| ["--repair", "mend it: ", "put one in its place: "].iter().any(|mend| problem.contains(mend));
    let mend = match &*settings.backend.value {
        _ if verified.problems.iter().any(is_told) => "what mends it is said above",
        _ if repair => "restore a backup",
        "file" => "`seeknal state verify --repair` keeps a copy and repairs what it can",
        "database" if settings.database_url.is_none() => {
            "restore a backup; `seeknal state verify --repair` keeps a copy of a damaged database, and says what can be read out of it"
        }
        _ => "mend what is named above with SQL, or restore a backup",
    };
    let problems = counted(u64::try_from(verified.problems.len()).unwrap_or(u64::MAX), "problem");
    Err(CliError::new(ProjectErrorKind::Integrity, format!("{problems} in the stored state; {mend}")))
}
