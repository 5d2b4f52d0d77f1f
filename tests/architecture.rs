//! The house keeps its floors: imports go down only, rooms on one floor are strangers, every file says what it is for.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which floor a room is on. What is not here is the roof (`lib.rs`, `error.rs`, `main.rs`), which may name everything.
const FLOORS: &[(&str, u32)] =
    &[("model", 0), ("store", 1), ("persist", 2), ("run", 3), ("lease", 3), ("coordinator", 4), ("project", 5), ("cli", 6)];

/// The crate's error sits above the rooms' own: only the rooms that speak to users may name it.
const MAY_NAME_THE_ERROR: &[&str] = &["coordinator", "project", "cli"];

fn sources() -> BTreeMap<PathBuf, String> {
    fn walk(folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.insert(path.clone(), std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

fn room(path: &Path) -> Option<&'static str> {
    let relative = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
    FLOORS.iter().map(|(room, _)| *room).find(|room| *room == first)
}

fn floor(room: &str) -> u32 {
    FLOORS.iter().find(|(name, _)| *name == room).unwrap().1
}

/// Every room that a file names by `crate::room`, outside of comments.
fn named(text: &str) -> Vec<String> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).flat_map(|line| [line, "\n"]).collect();
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut rooms = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            rooms.extend(group.split('}').next().unwrap().split(',').map(|name| word(name.trim())));
        } else {
            rooms.push(word(rest));
        }
    }
    rooms
}

#[test]
fn imports_go_down_only() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, text) in sources() {
        let Some(room) = room(&path) else { continue };
        for other in named(&text) {
            if other == "error" && !MAY_NAME_THE_ERROR.contains(&room) {
                wrong.push(format!("{} names the crate's error", path.display()));
            }
            let Some((_, other_floor)) = FLOORS.iter().find(|(name, _)| *name == other) else { continue };
            seen += 1;
            if other != room && *other_floor >= floor(room) {
                wrong.push(format!("{} (floor {}) names {other} (floor {other_floor})", path.display(), floor(room)));
            }
        }
    }
    assert!(seen > 50, "the test does not see the imports any more");
    assert!(wrong.is_empty(), "imports that do not go down:\n{}", wrong.join("\n"));
}

/// ARCHITECTURE.md has the name of every module, in backticks.
#[test]
fn every_module_is_on_the_map() {
    let map = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let words = |code: &str| code.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect::<Vec<_>>();
    let named: BTreeSet<String> = map.split('`').skip(1).step_by(2).flat_map(words).collect();
    let is_test = |path: &Path| path.iter().any(|part| part.to_str().is_some_and(|part| part.contains("test")));
    let missing: Vec<PathBuf> = sources()
        .into_keys()
        .map(|path| path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap().to_owned())
        .filter(|path| !is_test(path) && !["mod", "lib", "main"].iter().any(|name| path.file_stem().unwrap() == *name))
        .filter(|path| !named.contains(path.file_stem().unwrap().to_str().unwrap()))
        .collect();
    assert!(named.len() > 200, "the test does not see the names any more");
    assert!(missing.is_empty(), "not in ARCHITECTURE.md: {missing:#?}");
}

#[test]
fn every_file_says_what_it_is_for_and_no_path_climbs_two_floors() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if !text.starts_with("//! ") {
            wrong.push(format!("{} does not begin with its purpose", path.display()));
        }
        if text.contains("super::super") {
            wrong.push(format!("{} climbs by super::super", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_unsafe_is_in_one_module() {
    let allowed = |text: &str| {
        ["unsafe_code", "unsafe "]
            .iter()
            .any(|word| text.lines().any(|line| !line.trim_start().starts_with("//") && line.contains(word)))
    };
    let found: Vec<PathBuf> = sources().into_iter().filter(|(_, text)| allowed(text)).map(|(path, _)| path).collect();
    let gather = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/sqlite");
    assert_eq!(found, ["gather/file.rs", "gather/tests.rs", "gather.rs"].map(|file| gather.join(file)));
}

/// Lines of a source file, at most.
const LINES: usize = 640;

#[test]
fn files_stay_of_a_size_that_can_be_read() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LINES {
            wrong.push(format!("{} has {lines} lines, more than {LINES}: split it", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_ground_floor_does_no_io_and_knows_no_runtime() {
    for (path, text) in sources() {
        if room(&path) != Some("model") {
            continue;
        }
        for forbidden in ["tokio::", "std::fs", "std::net", "std::thread", "ractor::", "Instant::now"] {
            assert!(!text.contains(forbidden), "{} uses {forbidden}", path.display());
        }
    }
}

/// A handle of the database that is closed in this process drops SQLite's locks on it: only these files open anything, and none of it is the database.
#[test]
fn beside_sqlite_nobody_opens_its_files() {
    const MAY: &[(&str, &[&str])] = &[
        // The folder, to sync it.
        ("open.rs", &["std::fs::File::open(folder)"]),
        // Who has it open.
        ("owners.rs", &["File::options()", "plain::open(path)"]),
        // The start of the machine.
        ("boot.rs", &["std::fs::read_to_string(\"/proc/sys/kernel/random/boot_id\")"]),
    ];
    const OPENS: &[&str] = &[
        "File::open",
        "plain::open",
        "File::create",
        "File::options",
        "OpenOptions",
        "fs::read(",
        "fs::read_to_string",
        "fs::write",
        "fs::copy",
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/sqlite");
    let mut seen = 0;
    for (path, mut text) in sources().into_iter().filter(|(path, _)| path.starts_with(&folder)) {
        // Tests of a room look at its files when nobody has them open.
        if let Some(tests) = text.find("\n#[cfg(test)]\nmod tests {") {
            text.truncate(tests);
        }
        for (_, allowed) in MAY.iter().filter(|(name, _)| path.ends_with(name)) {
            for opening in *allowed {
                assert_eq!(text.matches(opening).count(), 1, "{}: {opening}", path.display());
                text = text.replace(opening, "");
                seen += 1;
            }
        }
        // The file of numbers beside it, in a room of its own.
        text = text.replace("HighWaterFile::open", "");
        for opening in OPENS {
            assert!(!text.contains(opening), "{} opens a file by {opening}", path.display());
        }
    }
    assert_eq!(seen, 4, "the test does not see the files any more");
}
