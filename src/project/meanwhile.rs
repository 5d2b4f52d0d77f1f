//! What happened between reading the settings and opening what they name.

use std::path::Path;

use super::checks::schema_of_environment;
use super::{ProjectError, ProjectErrorKind, Secret, Settings, Source};
use crate::store::{SCHEMA, create_state_backend};

/// What a settings file without the key names.
const DEFAULT: &str = "file";

impl Settings {
    /// Refuses a place that was left since these settings were read: what is written there nobody would read. To be asked once the place is open for writing: a
    /// move switches the settings before it lets anybody in again, and where they name its target already they did so before it began. So whoever came in behind it
    /// sees the change.
    pub(crate) fn refuse_left(&self) -> Result<(), ProjectError> {
        let by_variable = |source: &Source| matches!(source, Source::Environment(_));
        let is_url_set = self.database_url.as_ref().is_some_and(|url| by_variable(&url.source));
        // What variables of the environment name no move changes.
        if by_variable(&self.backend.source) && is_url_set {
            return Ok(());
        }
        let of_backend = |name: &str| match &self.backend.source {
            Source::Environment(variable) if *variable == name => Some(self.backend.value.clone().into()),
            _ => None,
        };
        let now = Self::load(&self.project, &of_backend)?;
        let named = |settings: &Self| settings.backend_in_file.clone().unwrap_or_else(|| DEFAULT.to_owned());
        let changed = if !by_variable(&self.backend.source) && named(self) != named(&now) {
            Some((format!("the {} backend", named(self)), named(&now)))
        } else if self.backend.value != "database" {
            self.other_folder(&now)
        } else if let Some(url) = self.database_url.as_ref().filter(|_| is_url_set) {
            self.schema_of(&url.value, &now)
        } else {
            self.other_database(&now)
        };
        let Some((then, by_now)) = changed else { return Ok(()) };
        Err(ProjectError::new(
            ProjectErrorKind::Conflict,
            format!(
                "{}: it named {then} when it was read, and names {by_now} by now: the state was moved meanwhile; nothing was written. Start again, with \
                 settings that are read anew",
                now.file_or_default().display()
            ),
        ))
    }

    /// Both folders, if the file named another one.
    fn other_folder(&self, now: &Self) -> Option<(String, String)> {
        let (then, by_now) = (&self.in_file.target, &now.in_file.target);
        let real = |path: &Path| path.canonicalize().ok();
        let same = then == by_now || real(then).is_some_and(|then| real(by_now) == Some(then));
        (!same).then(|| (then.display().to_string(), by_now.display().to_string()))
    }

    /// Both schemas, if the file named another one, and nothing else says which.
    fn other_schema(&self, now: &Self) -> Option<(String, String)> {
        let is_set = schema_of_environment(self).is_some();
        let named = |settings: &Self| settings.in_file.schema.clone().unwrap_or_else(|| SCHEMA.to_owned());
        let (then, by_now) = (named(self), named(now));
        (!is_set && then != by_now).then(|| (format!("schema {then}"), format!("schema {by_now}")))
    }

    /// Both databases, if the file named another one: another server, or a server instead of `state.db`.
    fn other_database(&self, now: &Self) -> Option<(String, String)> {
        let (then, by_now) = match (&self.in_file.url, &now.in_file.url) {
            (None, None) => return self.other_folder(now),
            (Some(then), Some(by_now)) if then == by_now => return self.schema_of(then, now),
            urls => urls,
        };
        // Both with the options in force: a variable that names the schema names it for both.
        let (told, told_now) = (self.database(then.as_ref()), self.database(by_now.as_ref()));
        match (then, by_now) {
            (Some(then), Some(_)) if is_same_database(&told, &told_now) => self.schema_of(then, now),
            _ => Some((told, told_now)),
        }
    }

    fn schema_of(&self, url: &Secret, now: &Self) -> Option<(String, String)> {
        url.expose().starts_with("postgres").then(|| self.other_schema(now)).flatten()
    }

    /// A database of the file as it is told, without user and secrets.
    fn database(&self, url: Option<&Secret>) -> String {
        let options = self.local_options(true).for_backend("database");
        let options = match url {
            Some(url) => options.database_url(url.expose()),
            None => options,
        };
        create_state_backend("database", &options)
            .map_or_else(|_| "a database_url that cannot be used".to_owned(), |backend| backend.location())
    }
}

/// Whether two locations are the same database of a server: it may be spelled in more than one way, and one more standby host makes no other server of it.
pub(super) fn is_same_database(one: &str, other: &str) -> bool {
    let ((hosts, name), (others, other_name)) = (hosts_and_name(one), hosts_and_name(other));
    name == other_name && hosts.iter().any(|host| others.contains(host))
}

/// What makes a server and its database of a location.
fn hosts_and_name(location: &str) -> (Vec<String>, String) {
    let (scheme, rest) = location.split_once("://").unwrap_or(("", location));
    let (hosts, name) = rest.split_once('/').unwrap_or((rest, ""));
    let spelled = |host: &str| {
        let host = host.to_ascii_lowercase();
        let (name, port) =
            host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit())).unwrap_or((&host, ""));
        let name = match name.trim_end_matches('.') {
            "127.0.0.1" | "[::1]" | "::1" => "localhost",
            name => name,
        };
        if ["", "80", "443"].contains(&port) { name.to_owned() } else { format!("{name}:{port}") }
    };
    // Whether it is encrypted is no part of the place.
    let scheme = if scheme == "postgres" { scheme } else { "libsql" };
    (hosts.split(',').map(spelled).collect(), format!("{scheme}:{name}"))
}

#[cfg(all(test, feature = "postgres", feature = "libsql"))]
mod tests {
    use super::*;

    #[test]
    fn another_place_is_told_from_one_that_is_spelled_otherwise() {
        let server = |url: &str| format!("state_backend: database\ndatabase_url: {url}\n");
        let schema = |name: &str| format!("{}seeknal_state:\n  options: {{database_schema: {name}}}\n", server("postgres://h/d"));
        let folder = |path: &str| format!("state_backend: database\nseeknal_state: {{target_path: {path}}}\n");
        let of_file = |path: &str| folder(path).replace("database", "file");
        for (then, by_now, is_left) in [
            (
                server("postgres://u:old@db.example.org/d"),
                server("postgresql://v:new@DB.example.org:5432/d?sslmode=require"),
                false,
            ),
            (server("postgres://u@localhost/d"), server("postgres://u@127.0.0.1:5432/d"), false),
            (server("postgres://u@h/d"), format!("name: demo\n{}other: 1\n", server("postgres://u@h/d")), false),
            (server("postgres://u@h/d"), server("postgres://u@h/other"), true),
            (server("postgres://u@h/d"), server("postgres://u@h:5433/d"), true),
            (server("postgres://u@h/d"), server("postgres://u@elsewhere/d"), true),
            (server("postgres://u@h/d"), "state_backend: database\n".into(), true),
            ("state_backend: database\n".into(), server("postgres://u@h/d"), true),
            (server("postgres://u@one,two/d"), server("postgres://u@one,two,three/d"), false),
            (server("postgres://u@one,two/d"), server("postgres://u@three/d"), true),
            (server("libsql://a.example.org?authToken=one"), server("libsql://A.example.org:443?authToken=two"), false),
            (server("libsql://a.example.org"), server("libsql://b.example.org"), true),
            (server("postgres://h/d"), schema("seeknal_state"), false),
            (schema("one"), schema("one").replace("one}", "one, database_ca_file: x}"), false),
            (schema("one"), schema("two"), true),
            (folder("target"), "state_backend: database\n".into(), false),
            (folder("target"), folder("./target"), false),
            (folder("target"), folder("elsewhere"), true),
            (of_file("target"), of_file("elsewhere"), true),
            ("name: demo\n".into(), "# other\n".into(), false),
            // What is not used names nothing.
            ("database_url: postgres://u@h/d\n".into(), "database_url: postgres://u@elsewhere/d\n".into(), false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("target")).unwrap();
            let file = dir.path().join("seeknal_project.yml");
            std::fs::write(&file, &then).unwrap();
            let settings = Settings::load(dir.path(), &|_| None).unwrap();
            std::fs::write(&file, &by_now).unwrap();
            let error = settings.refuse_left().err();
            assert_eq!(error.is_some(), is_left, "{then}{by_now}{error:?}");
            let told = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(!told.contains("one@") && !told.contains("u@") && !told.contains("authToken"), "{told}");
        }
    }

    #[test]
    fn a_schema_that_a_variable_names_is_the_one_on_both_sides() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("seeknal_project.yml");
        let text = |password: &str, schema: &str| {
            format!(
                "state_backend: database\ndatabase_url: postgres://u:{password}@h/d\nseeknal_state:\n  options: {{database_schema: {schema}}}\n"
            )
        };
        std::fs::write(&file, text("old", "production")).unwrap();
        let environment = |name: &str| (name == "SEEKNAL_DATABASE_SCHEMA").then(|| "staging".into());
        let of_variable = Settings::load(dir.path(), &environment).unwrap();
        let of_file = Settings::load(dir.path(), &|_| None).unwrap();
        std::fs::write(&file, text("new", "production")).unwrap();
        for settings in [&of_variable, &of_file] {
            settings.refuse_left().unwrap();
        }
        std::fs::write(&file, text("new", "another")).unwrap();
        of_variable.refuse_left().unwrap();
        let error = of_file.refuse_left().unwrap_err().to_string();
        assert!(error.contains("schema another") && !error.contains("new@"), "{error}");
    }

    #[test]
    fn what_a_variable_names_no_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("seeknal_project.yml");
        for (variables, is_left) in [
            (&["SEEKNAL_STATE_BACKEND"][..], true),
            (&["SEEKNAL_DATABASE_URL"], false),
            (&["SEEKNAL_STATE_BACKEND", "SEEKNAL_DATABASE_URL"], false),
        ] {
            std::fs::write(&file, "state_backend: database\ndatabase_url: postgres://h/d\n").unwrap();
            let environment = |name: &str| {
                let value = if name == "SEEKNAL_STATE_BACKEND" { "database" } else { "postgres://there/d" };
                variables.contains(&name).then(|| value.into())
            };
            let settings = Settings::load(dir.path(), &environment).unwrap();
            std::fs::write(&file, "state_backend: database\ndatabase_url: postgres://elsewhere/d\n").unwrap();
            assert_eq!(settings.refuse_left().is_err(), is_left, "{variables:?}");
            // The variable names a backend that is there, whatever the file says.
            std::fs::write(&file, "state_backend: nowhere\ndatabase_url: postgres://h/d\n").unwrap();
            assert_eq!(settings.refuse_left().is_err(), !variables.contains(&"SEEKNAL_STATE_BACKEND"), "{variables:?}");
        }
    }
}
