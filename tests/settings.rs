//! The settings of a project: where they are found, what wins, what is refused, and changing one of them.
#![cfg(feature = "project")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use seeknal_state::project::{ProjectError, ProjectErrorKind, Settings, Source, Sourced, switch_backend};

const FILE_NAME: &str = "seeknal_project.yml";
const OTHER_FILE_NAME: &str = "seeknal_project.yaml";
const ENV_BACKEND: &str = "SEEKNAL_STATE_BACKEND";
const ENV_URL: &str = "SEEKNAL_DATABASE_URL";

fn none(_: &str) -> Option<OsString> {
    None
}

fn project(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE_NAME), text).unwrap();
    dir
}

#[test]
fn without_a_file_everything_is_at_its_default() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings::load(dir.path(), &none).unwrap();
    assert_eq!(settings.backend, Sourced { value: "file".into(), source: Source::Default });
    assert_eq!(settings.target.value, dir.path().join("target"));
    assert!(settings.file.is_none() && settings.database_url.is_none());
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "reading settings makes nothing");
}

#[test]
fn the_file_is_searched_upwards_and_the_environment_wins() {
    let dir = project("name: demo\nstate_backend: database # ours\ndatabase_url: 'postgres://u:s3cret@h/d'\n");
    let deep = dir.path().join("a/b");
    fs::create_dir_all(&deep).unwrap();
    let settings = Settings::load(&deep, &none).unwrap();
    assert_eq!(settings.backend.value, "database");
    assert!(matches!(settings.backend.source, Source::File { line: 2, .. }));
    assert_eq!(settings.target.value, fs::canonicalize(dir.path()).unwrap().join("target"));
    assert_eq!(settings.backend_options(true).url(), Some("postgres://u:s3cret@h/d"));
    assert!(!format!("{settings:?} {:?}", settings.backend_options(false)).contains("s3cret"));

    let settings = Settings::load(dir.path(), &|name| match name {
        ENV_BACKEND => Some("file".into()),
        ENV_URL => Some(" ".into()),
        _ => None,
    })
    .unwrap();
    assert_eq!(settings.backend, Sourced { value: "file".into(), source: Source::Environment(ENV_BACKEND) });
    assert_eq!(settings.backend_in_file.as_deref(), Some("database"));
    assert!(matches!(settings.database_url.unwrap().source, Source::File { line: 3, .. }), "an empty variable is not set");
}

#[test]
fn our_own_keys() {
    let dir = project(
        "seeknal_state:\n  target_path: out/state\n  lease_ttl_ms: 5000\n  idle_run_seconds: 7\n  options: {region: eu, size: 3, fast: true}\n",
    );
    let settings = Settings::load(dir.path(), &none).unwrap();
    assert_eq!(settings.target.value, dir.path().join("out/state"));
    assert_eq!(settings.lease_ttl.as_ref().unwrap().value, Duration::from_secs(5));
    assert_eq!(settings.idle_run.as_ref().unwrap().value, Duration::from_secs(7));
    let options = settings.backend_options(false);
    assert_eq!((options.get("region"), options.get("size"), options.get("fast")), (Some("eu"), Some("3"), Some("true")));
}

#[test]
fn what_belongs_to_seeknal_is_left_alone() {
    let dir = project(
        "a: 1\na: 2\nb: !secret x\nc: .nan\nsources: [{state_backend: nonsense}]\nstates: {seeknal_state: 3}\nstate_backend: database\n",
    );
    assert_eq!(Settings::load(dir.path(), &none).unwrap().backend.value, "database");
}

#[test]
fn bad_settings_name_file_line_and_mend() {
    for (text, line, words) in [
        ("", 1, vec!["empty", "remove"]),
        ("\n \n", 1, vec!["empty"]),
        ("a: b: c\n", 1, vec!["YAML"]),
        ("ok: 1\nurl: \"postgres://u:hunter2", 2, vec!["YAML"]),
        ("- list\n", 1, vec!["mapping"]),
        ("a: 1\n---\nb: 2\n", 3, vec!["more than one"]),
        ("x: 1\nstate_backend: databse\n", 2, vec!["did you mean \"database\"", "memory"]),
        ("state_backend: oracle\n", 1, vec!["unknown state backend \"oracle\";", "known are"]),
        ("state_backend: libsql://t0ken-t0ken@host\n", 1, vec!["unknown state backend (it is not shown", "known are"]),
        ("state_backend: [file]\n", 1, vec!["a list", "text"]),
        ("state_backend:\n", 1, vec!["nothing"]),
        ("state_backend: 3\n", 1, vec!["a number"]),
        ("state_backend: file\nstate_backend: file\n", 2, vec!["second time"]),
        ("database_url: {password: hunter2}\n", 1, vec!["database_url is a mapping"]),
        ("seeknal_state: hunter2\n", 1, vec!["a mapping"]),
        ("seeknal_state:\n  target_pth: x\n", 2, vec!["did you mean \"target_path\"", "lease_ttl_ms"]),
        ("seeknal_state:\n  lease_ttl_ms: 0\n", 2, vec!["100 to 3600000"]),
        ("seeknal_state:\n  lease_ttl_ms: 5s\n", 2, vec!["whole number"]),
        ("seeknal_state:\n  idle_run_seconds: 99999999999999999999999\n", 2, vec!["1 to 86400"]),
        ("seeknal_state:\n  target_path: ''\n", 2, vec!["empty"]),
        ("seeknal_state:\n  target_path: a\n  target_path: b\n", 3, vec!["second time"]),
        ("seeknal_state:\n  options: [a]\n", 2, vec!["a mapping of texts"]),
    ] {
        let dir = project(text);
        let error = Settings::load(dir.path(), &none).unwrap_err();
        let message = error.to_string();
        assert_eq!(error.kind(), ProjectErrorKind::Input, "{text:?}: {message}");
        let place = format!("{}:{line}: ", dir.path().join(FILE_NAME).display());
        assert!(message.starts_with(&place), "{text:?}: {message}");
        for word in words {
            assert!(message.contains(word), "{text:?}: {message}");
        }
        assert!(!message.contains("hunter2") && !message.contains("t0ken") && !message.contains('\n'), "{text:?}: {message}");
        assert_eq!(fs::read_to_string(dir.path().join(FILE_NAME)).unwrap(), text);
    }
}

#[test]
fn bad_bytes_two_files_and_missing_folders() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE_NAME), b"a: 1\nb: \xff\n").unwrap();
    assert!(Settings::load(dir.path(), &none).unwrap_err().to_string().contains(":2: it is not UTF-8"));
    fs::write(dir.path().join(OTHER_FILE_NAME), "a: 1\n").unwrap();
    assert!(Settings::load(dir.path(), &none).unwrap_err().to_string().contains("both there"));
    fs::remove_file(dir.path().join(FILE_NAME)).unwrap();
    assert!(Settings::load(dir.path(), &none).unwrap().file.unwrap().ends_with(OTHER_FILE_NAME));
    let error = Settings::load(&dir.path().join("nowhere"), &none).unwrap_err();
    assert_eq!(error.kind(), ProjectErrorKind::NotFound);
}

#[test]
fn a_bad_variable_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Settings::load(dir.path(), &|name| (name == ENV_BACKEND).then(|| "fiel".into())).unwrap_err().to_string();
    assert!(error.contains(ENV_BACKEND) && error.contains("did you mean \"file\""), "{error}");
}

fn switched(text: &str) -> Result<String, ProjectError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seeknal_project.yml");
    fs::write(&path, text).unwrap();
    let result = switch_backend(&path, "database");
    let now = fs::read_to_string(&path).unwrap();
    if result.is_err() {
        assert_eq!(now, text, "a refusal changes nothing");
    }
    result.map(|()| now)
}

#[test]
fn one_value_changes_and_nothing_else() {
    for (before, after) in [
        ("state_backend: file\n", "state_backend: database\n"),
        ("a: 1\nstate_backend: file   # why\n\n# end", "a: 1\nstate_backend: database   # why\n\n# end"),
        ("a: 1\r\nstate_backend: 'file'\r\nb: 2\r\n", "a: 1\r\nstate_backend: 'database'\r\nb: 2\r\n"),
        ("state_backend: \"file\"", "state_backend: \"database\""),
        ("{a: 1, state_backend: file, b: [1]}\n", "{a: 1, state_backend: database, b: [1]}\n"),
        ("d: &d {x: 1}\ne: *d\nstate_backend: &s file\n", "d: &d {x: 1}\ne: *d\nstate_backend: &s database\n"),
        ("n: &n file\nstate_backend: *n\n", "n: &n file\nstate_backend: database\n"),
        ("\"state_backend\" : file\n", "\"state_backend\" : database\n"),
        ("state_backend: >-\n  file\nb: 1\n", "state_backend: database\nb: 1\n"),
        (
            "# state_backend: file\nsub:\n  state_backend: file\nstate_backend: file\n",
            "# state_backend: file\nsub:\n  state_backend: file\nstate_backend: database\n",
        ),
        ("state_backend: database\n", "state_backend: database\n"),
        ("\u{feff}state_backend: file\n", "\u{feff}state_backend: database\n"),
        // Not there yet.
        ("a: 1", "state_backend: database\na: 1"),
        ("a: 1\r\n", "a: 1\r\nstate_backend: database\r\n"),
        ("# only this\n", "# only this\nstate_backend: database\n"),
        ("---\n  a: 1\n  b: 2\n", "---\n  a: 1\n  b: 2\n  state_backend: database\n"),
        ("a: 1\n...\n", "state_backend: database\na: 1\n...\n"),
        ("text: |\n  no newline at the end", "state_backend: database\ntext: |\n  no newline at the end"),
        ("text: |+\n  kept\n\n", "text: |+\n  kept\n\nstate_backend: database\n"),
        ("{a: 1}\n", "{state_backend: database, a: 1}\n"),
        (
            "base: &b {x: 1}\nuse:\n  <<: *b\na: !secret k\nd: .nan\nd: 2\n",
            "base: &b {x: 1}\nuse:\n  <<: *b\na: !secret k\nd: .nan\nd: 2\nstate_backend: database\n",
        ),
    ] {
        assert_eq!(switched(before).map_err(|error| error.to_string()), Ok(after.to_owned()), "{before:?}");
    }
}

#[test]
fn what_would_change_more_is_refused() {
    for text in ["state_backend: &s file\nother: *s\n", "state_backend: [file]\n", "a: b: c\n", ""] {
        let outcome = switched(text);
        if text.contains("&s") {
            assert!(outcome.unwrap_err().to_string().contains("by hand"));
        } else if text.contains('[') {
            // A wrong value is replaced where that is safe, else refused; never anything between.
            if let Ok(now) = outcome {
                assert_eq!(now, "state_backend: database\n");
            }
        } else {
            assert!(outcome.is_err(), "{text:?}");
        }
    }
}

#[test]
fn a_missing_file_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seeknal_project.yml");
    switch_backend(&path, "file").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "state_backend: file\n");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn keys_that_are_nearly_ours_are_refused_with_their_line() {
    for (key, ours) in [
        ("state_backand", "state_backend"),
        ("state-backend", "state_backend"),
        ("stateBackend", "state_backend"),
        ("Database_Url", "database_url"),
        ("databse_url", "database_url"),
        ("seeknal-state", "seeknal_state"),
        ("seeknal_states", "seeknal_state"),
    ] {
        let dir = project(&format!("name: demo\n{key}: database\n"));
        let error = Settings::load(dir.path(), &none).unwrap_err();
        assert_eq!(error.kind(), ProjectErrorKind::Input, "{key}");
        let message = error.to_string();
        let place = format!("{}:2: ", dir.path().join(FILE_NAME).display());
        assert!(message.starts_with(&place) && message.contains(&format!("{key:?}")) && message.contains(ours), "{message}");
    }
    for key in ["state", "states", "database", "state_path", "backend", "seeknal", "seeknal_version", "url"] {
        let dir = project(&format!("name: demo\n{key}: database\n"));
        assert!(Settings::load(dir.path(), &none).is_ok(), "{key}");
    }
}

#[test]
fn options_of_a_registered_backend_are_not_shown() {
    let dir = project("seeknal_state:\n  options: {password: s3cret}\n");
    let settings = Settings::load(dir.path(), &none).unwrap();
    assert_eq!(settings.options["password"], "s3cret");
    let shown = format!("{settings:?}");
    assert!(shown.contains("password") && !shown.contains("s3cret"), "{shown}");
}
