//! The settings of a project: where they are found, what wins, what is refused, and changing one of them.
#![cfg(feature = "project")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use seeknal_state::project::{ProjectError, ProjectErrorKind, Settings, Source, Sourced, switch_backend};
use seeknal_state::{MemoryBackend, StateBackendFactory};

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
        "seeknal_state:\n  target_path: out/state\n  lease_ttl_ms: 5000\n  idle_run_seconds: 7\n  options: {database_schema: eu, database_flush_shards: 3, sqlite_allow_network_fs: true}\n",
    );
    let settings = Settings::load(dir.path(), &none).unwrap();
    assert_eq!(settings.target.value, dir.path().join("out/state"));
    assert_eq!(settings.lease_ttl.as_ref().unwrap().value, Duration::from_secs(5));
    assert_eq!(settings.idle_run.as_ref().unwrap().value, Duration::from_secs(7));
    let options = settings.backend_options(false);
    let of = ["database_schema", "database_flush_shards", "sqlite_allow_network_fs"].map(|name| options.get(name));
    assert_eq!(of, [Some("eu"), Some("3"), Some("true")]);
}

/// Of the options, too: what the file says for production is not what is worked on where a variable says otherwise.
#[test]
fn variables_win_over_the_options_of_the_file() {
    let of = [
        ("database_schema", "SEEKNAL_DATABASE_SCHEMA"),
        ("database_ca_file", "SEEKNAL_DATABASE_CA_FILE"),
        ("database_token", "SEEKNAL_DATABASE_TOKEN"),
    ];
    register("takes_ours");
    for backend in ["database", "takes_ours"] {
        for (option, variable) in of {
            let dir = project(&format!("state_backend: {backend}\nseeknal_state:\n  options:\n    {option}: of_the_file\n"));
            let says = |text: &'static str| {
                let lookup = move |name: &str| (name == variable).then(|| text.into());
                Settings::load(dir.path(), &lookup).unwrap().backend_options(false).get(option).map(str::to_owned)
            };
            assert_eq!(says("of_the_variable").as_deref(), Some("of_the_variable"), "{option}");
            for empty in ["", " "] {
                assert_eq!(says(empty).as_deref(), Some("of_the_file"), "{option}: an empty variable is not set");
            }
            let settings = Settings::load(dir.path(), &none).unwrap();
            assert_eq!(settings.backend_options(false).get(option), Some("of_the_file"), "{option}");
            // What the file does not name is no option of a registered backend either.
            let dir = project(&format!("state_backend: {backend}\n"));
            let settings = Settings::load(dir.path(), &|name| (name == variable).then(|| "x".into())).unwrap();
            assert_eq!(settings.backend_options(false).get(option), None, "{option}");
        }
    }
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
        ("a: b: c\n", 1, vec!["YAML"]),
        ("ok: 1\nurl: \"postgres://u:hunter2", 2, vec!["YAML"]),
        ("- list\n", 1, vec!["it must be a mapping: `key: value` lines"]),
        ("hunter2\n", 1, vec!["it must be a mapping"]),
        ("---\n# why\n12\n", 3, vec!["it must be a mapping"]),
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
        ("seeknal_state:\n  target_path: postgres://u:hunter2@h/d\n", 2, vec!["database_url"]),
        ("seeknal_state:\n  options:\n    database_shema: a\n", 3, vec!["did you mean \"database_schema\"", "database_poll_ms"]),
        ("seeknal_state:\n  options:\n    database_pasword: hunter2\n", 3, vec!["database_pasword", "known are"]),
        ("seeknal_state: {options: {database_token:hunter2}}\n", 1, vec!["not shown", "blank", "write a text"]),
        ("seeknal_state: {options: {database_token:hunter2: x}}\n", 1, vec!["not shown", "blank", "known are"]),
        ("seeknal_state: {database_url:postgres://u:hunter2@h/d}\n", 1, vec!["not shown", "blank", "known are"]),
        ("seeknal_state:\n  options: {bogus: 1}\n", 2, vec!["bogus", "known are", "sqlite_allow_network_fs"]),
        ("seeknal_state:\n  options:\n    sqlite_allow_network_fs: maybe\n", 3, vec!["true or false"]),
        ("seeknal_state:\n  options:\n    database_flush_shards: 0\n", 3, vec!["1 to 64"]),
        ("seeknal_state:\n  options:\n    database_poll_ms: 9\n", 3, vec!["10 to 60000"]),
        ("seeknal_state:\n  options:\n    database_schema: a\n    database_schema: b\n", 4, vec!["second time"]),
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

/// Makes a name known, for settings that name it.
fn register(name: &str) {
    StateBackendFactory::register(name, |_| Ok(Arc::new(MemoryBackend::new()) as _)).unwrap();
}

#[test]
fn a_registered_backend_has_options_of_its_own_also_while_the_environment_names_another_one() {
    register("own_options");
    let dir = project("state_backend: own_options\nseeknal_state:\n  options: {region: eu}\n");
    assert_eq!(Settings::load(dir.path(), &none).unwrap().options["region"], "eu");
    let settings = Settings::load(dir.path(), &|name| (name == ENV_BACKEND).then(|| "file".into())).unwrap();
    assert_eq!(settings.options["region"], "eu");
    // They are nothing to that one.
    assert_eq!(settings.backend(true).unwrap().name(), "file");
}

/// What is wrong with a URL is found when the backend is made: the error names where it came from, and repeats nothing of it.
#[cfg(feature = "postgres")]
#[test]
fn an_error_about_the_database_names_its_source() {
    let of = |text: &str, lookup: seeknal_state::project::Lookup<'_>| {
        let dir = project(text);
        let error = Settings::load(dir.path(), lookup).unwrap().backend(true).unwrap_err();
        assert_eq!(error.kind(), ProjectErrorKind::Input, "{error}");
        error.to_string().replace(&dir.path().display().to_string(), "")
    };
    let error = of("state_backend: database\ndatabase_url: postgres:///d\n", &none);
    assert!(error.starts_with("/seeknal_project.yml:2: database_url: it names no host"), "{error}");
    let error = of("state_backend: database\n", &|name| (name == ENV_URL).then(|| "postgres://u:s3cret@h:x/d".into()));
    assert!(
        error.starts_with("environment variable SEEKNAL_DATABASE_URL: database_url: ") && !error.contains("s3cret"),
        "{error}"
    );
    let text = "state_backend: database\ndatabase_url: postgres://h/d\nseeknal_state:\n  options:\n    database_schema: Team-A\n";
    let error = of(text, &none);
    assert!(error.starts_with("/seeknal_project.yml:5: database_schema: "), "{error}");
    let error = of(text, &|name| (name == "SEEKNAL_DATABASE_SCHEMA").then(|| "Team-B".into()));
    assert!(error.starts_with("SEEKNAL_DATABASE_SCHEMA: a schema's name"), "{error}");
    let error = of("state_backend: database\ndatabase_url: postgres://u@h/d;password=S3kr3t\n", &none);
    assert!(error.starts_with("/seeknal_project.yml:2: ") && !error.contains("S3kr3t"), "{error}");
}

#[test]
fn a_file_that_says_nothing_sets_nothing() {
    for text in
        ["---\n# mine\n", "%YAML 1.2\n---\n", "~\n", "null\n", "# only this\n", "--- # mine\n", "{}\n", "", "\n \n", "\u{feff}"]
    {
        let dir = project(text);
        let settings = Settings::load(dir.path(), &none).map_err(|error| error.to_string());
        assert_eq!(settings.unwrap().backend.value, "file", "{text:?}");
    }
}

#[test]
fn what_is_no_file_is_no_settings_file_and_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    fs::create_dir(&path).unwrap();
    let error = Settings::load(dir.path(), &none).unwrap_err();
    assert!(error.kind() == ProjectErrorKind::Input && error.to_string().contains("it is a folder"), "{error}");
    fs::remove_dir(&path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = Settings::load(dir.path(), &none).unwrap_err();
    assert!(error.to_string().contains("no plain file"), "{error}");
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
        ("", "state_backend: database\n"),
        ("\n \n", "\n \nstate_backend: database\n"),
        // Nothing at all, with notes.
        ("# my notes\n# second\n{}\n", "# my notes\n# second\nstate_backend: database\n"),
        ("# {} null ~\n{ } # end\n", "# {} null ~\nstate_backend: database # end\n"),
        ("--- {}\n", "--- {state_backend: database}\n"),
        ("# a\n~\n", "# a\nstate_backend: database\n"),
        ("null # a\r\n", "state_backend: database # a\r\n"),
        ("---\n# mine\n", "---\n# mine\nstate_backend: database\n"),
        ("%YAML 1.2\n---\n", "%YAML 1.2\n---\nstate_backend: database\n"),
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
    // The note would be lost.
    let noted = switched("state_backend: >- # why\n  file\nb: 1\n");
    assert!(noted.as_ref().map_or_else(|error| error.to_string().contains("by hand"), |now| now.contains("# why")), "{noted:?}");
    for text in ["state_backend: &s file\nother: *s\n", "state_backend: [file]\n", "a: b: c\n"] {
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
    register("mine");
    let dir = project("state_backend: mine\nseeknal_state:\n  options: {password: s3cret}\n");
    let settings = Settings::load(dir.path(), &none).unwrap();
    assert_eq!(settings.options["password"], "s3cret");
    let shown = format!("{settings:?}");
    assert!(shown.contains("password") && !shown.contains("s3cret"), "{shown}");
}

/// The system takes no such path, and would blame the disk for it.
#[test]
fn a_text_with_a_nul_is_refused_with_its_key_and_line() {
    for (text, key, line) in [
        ("state_backend: \"file\\0\"\n", "state_backend", 1),
        ("database_url: \"postgres://u:s3cret@h/d\\0x\"\n", "database_url", 1),
        ("seeknal_state:\n  target_path: \"a\\0b\"\n", "seeknal_state.target_path", 2),
        ("seeknal_state:\n  options:\n    database_schema: \"s3cret\\0\"\n", "seeknal_state.options.database_schema", 3),
    ] {
        let dir = project(text);
        let error = Settings::load(dir.path(), &none).unwrap_err();
        let told = error.to_string();
        assert_eq!(error.kind(), ProjectErrorKind::Input, "{told}");
        assert!(told.contains(&format!("{FILE_NAME}:{line}: {key}")) && !told.contains("s3cret"), "{told}");
    }
}
