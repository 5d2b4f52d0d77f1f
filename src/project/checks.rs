//! What a move looks at before it goes on: whether the source is one to leave, and what an operator should know of both places.

use std::path::Path;
use std::sync::Arc;

use super::files::{DOCUMENT, NUMBERS, with_suffix};
use super::migrate::Plan;
use super::{Home, Move, Origin, ProjectError, ProjectErrorKind, Settings, Source, verify};
use crate::model::RunQuery;
use crate::store::{KnownOpenings, MIGRATION, StateBackend, gone};

/// A state that has no run, and knows nothing of any that it had, is none: there is nothing to move.
pub(super) async fn unless_empty(
    settings: &Settings,
    from: &Origin,
    source: Option<Arc<dyn StateBackend>>,
) -> Result<Option<Arc<dyn StateBackend>>, ProjectError> {
    let Some(source) = source else { return Ok(None) };
    // Where this program wrote, numbers were given out: they go on where the state goes.
    let is_foreign = *from == Origin::Home(Home::File) && !with_suffix(&settings.target.value.join(DOCUMENT), NUMBERS).exists();
    let is_empty = is_foreign
        && source.list_runs(&RunQuery::default().limit(1)).await?.runs.is_empty()
        && source.retained().await?.is_empty();
    if is_empty {
        source.close().await?;
    }
    Ok((!is_empty).then_some(source))
}

/// A database that was lost is not left for an empty state.
pub(super) fn refuse_lost(settings: &Settings, from: &Origin, is_missing: bool) -> Result<(), ProjectError> {
    let is_local = matches!(from, Origin::Home(Home::Database) | Origin::Sqlite);
    if is_missing && is_local { settings.refuse_lost() } else { Ok(()) }
}

/// Refuses a source that was guessed where there are two, and one that is damaged; unless nothing of it is taken, and it was left already.
pub(super) async fn refuse_source(
    settings: &Settings,
    what: &Move,
    source: &dyn StateBackend,
    plan: &Plan,
    is_left: bool,
) -> Result<(), ProjectError> {
    if !plan.moves.is_empty() {
        what.refuse_guess(settings).await?;
    }
    if is_left && plan.moves.is_empty() { Ok(()) } else { verify::refuse_damaged(source).await }
}

/// Refuses what is in the place of the backup and is no file: it can be neither compared nor replaced.
pub(super) fn refuse_no_file(backup: &Path) -> Result<(), ProjectError> {
    match std::fs::metadata(backup) {
        Ok(found) if !found.is_file() => Err(ProjectError::new(
            ProjectErrorKind::Failed,
            format!("{}: it is no file, but the backup should be there; move it aside", backup.display()),
        )),
        _ => Ok(()),
    }
}

/// Refuses a move from a place to itself.
pub(super) fn refuse_same(source: Option<&dyn StateBackend>, target: Option<&dyn StateBackend>) -> Result<(), ProjectError> {
    match (source, target) {
        (Some(source), Some(target)) if source.location() == target.location() => {
            Err(ProjectError::input(one_place(&source.location())))
        }
        _ => Ok(()),
    }
}

/// What is wrong with a move from a place to itself.
pub(super) fn one_place(place: &str) -> String {
    format!("{place} is both where the state is and where it would go; say where it comes from (`--from`)")
}

/// A database cannot be locked as a whole: refuse to leave it while somebody works on it.
pub(super) async fn refuse_busy(backend: &dyn StateBackend) -> Result<(), ProjectError> {
    let own = backend.process().map(|process| process.id);
    let others: Vec<String> = gone::processes(backend, |process| Some(&process.id) != own.as_ref())
        .await?
        .into_iter()
        .filter(|open| Some(&open.process.id) != own.as_ref())
        .filter_map(|open| match open.alive {
            Some(true) => Some(open.process.to_string()),
            // A server soon knows of everybody.
            None if backend.known_openings() == KnownOpenings::All => {
                Some(format!("{} (or was, until a moment ago: if it was killed, this is known within a minute)", open.process))
            }
            _ => None,
        })
        .collect();
    let refuse = |why: String| {
        let message =
            format!("{}: {why}; stop it and try again (`seeknal state locks` lists who works here)", backend.location());
        Err(ProjectError::new(ProjectErrorKind::Conflict, message))
    };
    if !others.is_empty() {
        return refuse(format!("it is open in {}", others.join(", ")));
    }
    match backend.list_leases().await?.iter().find(|lease| lease.key.run.as_str() != MIGRATION) {
        Some(lease) => refuse(format!("{} is locked by {}", lease.key, lease.owner)),
        None => Ok(()),
    }
}

/// What opening the target told, but that its document is missing: it is about to be written, and was most likely set aside for that. So was a database: that
/// there was one is told, but a backup of it would only come into the way again.
pub(super) fn without_missed(settings: &Settings, mut notices: Vec<String>) -> Vec<String> {
    let missed = format!("{} is missing", settings.target.value.join(DOCUMENT).display());
    notices.retain(|notice| !notice.starts_with(&missed));
    for notice in &mut notices {
        if let Some((told, _bring_it_back)) = notice.split_once(". Unless that was on purpose, bring a backup of it back") {
            *notice = format!("{told}, or set aside; this move makes a new one");
        }
    }
    notices
}

/// Warnings about variables of the environment that settings files cannot change.
pub(super) fn overrides(settings: &Settings, to: Home) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Source::Environment(name) = settings.backend.source {
        let (set, to) = (&settings.backend.value, to.name());
        let mend = if set == to {
            "as long as it is set, what the file says (also to take it back) changes nothing".to_owned()
        } else {
            format!("unset it, or set it to {to}")
        };
        warnings.push(format!("the environment variable {name}={set} overrides the settings file; {mend}"));
    }
    if let Some(Source::Environment(name)) = settings.database_url.as_ref().map(|url| &url.source) {
        warnings.push(format!("the database is the one that the environment variable {name} names; it must stay set"));
    }
    if to == Home::Database
        && settings.database_url.as_ref().is_some_and(|url| url.value.expose().starts_with("postgres"))
        && let Some((schema, name)) = schema_of_environment(settings)
    {
        warnings.push(format!(
            "the schema {schema} is the one that the environment variable {name} names; it must stay set, or stand in the settings \
             (seeknal_state: options: database_schema: {schema})"
        ));
    }
    warnings
}

/// The schema on a server, and the variable that says it, where one does.
#[cfg(any(feature = "postgres", feature = "libsql"))]
pub(super) fn schema_of_environment(settings: &Settings) -> Option<(String, &'static str)> {
    let setting = settings.backend_options(true).setting("database_schema").ok().flatten()?;
    setting.place.starts_with("SEEKNAL_").then_some((setting.text, setting.place))
}

/// No server is known here.
#[cfg(not(any(feature = "postgres", feature = "libsql")))]
pub(super) fn schema_of_environment(_: &Settings) -> Option<(String, &'static str)> {
    None
}

#[cfg(all(test, feature = "postgres"))]
mod tests {
    use super::*;

    #[test]
    fn a_schema_that_only_a_variable_names_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let text = "database_url: postgres://h/d\nseeknal_state:\n  options: {database_schema: production}\n";
        std::fs::write(dir.path().join("seeknal_project.yml"), text).unwrap();
        for (staging, told) in [(None, false), (Some("staging"), true)] {
            let environment = |name: &str| staging.filter(|_| name == "SEEKNAL_DATABASE_SCHEMA").map(Into::into);
            let settings = Settings::load(dir.path(), &environment).unwrap();
            for (to, told) in [(Home::Database, told), (Home::File, false)] {
                let warnings = overrides(&settings, to);
                assert_eq!(!warnings.is_empty(), told, "{warnings:?}");
                assert!(
                    warnings.iter().all(|warning| warning.contains("staging") && warning.contains("SEEKNAL_DATABASE_SCHEMA"))
                );
            }
        }
    }
}
