//! What a power cut would have taken: reads strace's log of a process, and says what was acknowledged before it was safe.
//!
//! A write is safe once a sync of the same file that began after it has ended; a new or a new name of a file, once a sync of its folder has. Whoever
//! writes into the file of acknowledgements says that all that was written before is safe.
#![allow(dead_code, reason = "every test takes what it needs of it")]

use std::collections::{HashMap, HashSet};

/// The calls that are to be logged.
pub(crate) const CALLS: &str = "openat,pwrite64,write,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat";

/// What is judged, by the files' names.
pub(crate) struct Rules<'a> {
    /// The file of acknowledgements.
    pub(crate) acks: &'a str,
    /// The folder of the state.
    pub(crate) folder: &'a str,
    /// Files in it that say nothing about the state.
    pub(crate) free: fn(&str) -> bool,
    /// Files that grow on under a new name: they need not be safe when they get it, but at the next acknowledgement.
    pub(crate) grows: fn(&str) -> bool,
    /// Files that need not be safe at an acknowledgement because the log with this ending has it all; they must be when that log begins anew or goes.
    pub(crate) behind_log: Option<(&'a str, &'a str)>,
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) acks: usize,
    pub(crate) writes: usize,
    pub(crate) renames: usize,
    pub(crate) syncs: usize,
    pub(crate) wrong: Vec<String>,
}

#[derive(Debug)]
struct Call<'a> {
    name: &'a str,
    arguments: &'a str,
}

impl<'a> Call<'a> {
    /// The path behind the first file descriptor: `pwrite64(7</tmp/a>, …`.
    fn file(&self) -> Option<&'a str> {
        let (number, rest) = self.arguments.split_once('<')?;
        number.bytes().all(|byte| byte.is_ascii_digit()).then_some(())?;
        rest.split_once('>').map(|(path, _)| path)
    }

    /// Texts in quotes.
    fn texts(&self) -> Vec<&'a str> {
        self.arguments.split('"').skip(1).step_by(2).collect()
    }
}

fn folder_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// Files and folders that are not safe yet: since which line.
#[derive(Debug, Default)]
struct Unsafe {
    files: HashMap<String, usize>,
    /// Folder, and the name that is not safe in it.
    names: HashMap<(String, String), usize>,
    /// What a failed sync may have thrown away, by file and place: a later sync says nothing of it, until it is written anew.
    lost: HashMap<String, HashSet<String>>,
    /// Places that were written since the last sync, by file.
    places: HashMap<String, HashSet<String>>,
    /// Those of them that were renamed: the next rename must not reach the disk before them.
    renamed: HashSet<String>,
    /// Names that are safe, so that opening them again makes nothing.
    known: HashSet<String>,
}

/// Reads a log.
pub(crate) fn read(log: &str, rules: &Rules<'_>) -> Found {
    let mut found = Found::default();
    let mut open = Unsafe::default();
    // Calls that have begun, by thread: the line, name and arguments.
    let mut begun: HashMap<&str, (usize, &str)> = HashMap::new();
    for (number, line) in log.lines().enumerate() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        let (first, whole, ended) = if let Some(resumed) = rest.strip_prefix("<... ") {
            let Some((at, text)) = begun.remove(thread) else { continue };
            (None, Some((at, text)), resumed.rsplit_once("= ").is_some_and(|(_, result)| !result.starts_with('-')))
        } else if let Some(text) = rest.strip_suffix("<unfinished ...>") {
            begun.insert(thread, (number, text));
            (Some(text), None, false)
        } else {
            (Some(rest), Some((number, rest)), rest.rsplit_once("= ").is_some_and(|(_, result)| !result.starts_with('-')))
        };
        if let Some((_, text)) = whole
            && !ended
            && let Some(call) = parse(text)
            && ["fsync", "fdatasync"].contains(&call.name)
            && let Some(path) = call.file()
        {
            let thrown = open.places.remove(path).unwrap_or_default();
            open.lost.entry(path.to_owned()).or_default().extend(thrown);
        }
        // What harms counts from its beginning, what makes safe from its end.
        if let Some(call) = first.and_then(parse) {
            harm(number, &call, rules, &mut open, &mut found);
        }
        if let Some((at, text)) = whole
            && ended
            && let Some(call) = parse(text)
        {
            made_safe(at, &call, &mut open, &mut found);
        }
    }
    found
}

fn parse(text: &str) -> Option<Call<'_>> {
    let (name, arguments) = text.split_once('(')?;
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_').then_some(Call { name, arguments })
}

fn harm(number: usize, call: &Call<'_>, rules: &Rules<'_>, open: &mut Unsafe, found: &mut Found) {
    let judged = |path: &str| path.starts_with(rules.folder) && path != rules.acks && !(rules.free)(path);
    let log_ends = |path: &str| rules.behind_log.is_some_and(|(log, _)| path.ends_with(log));
    match call.name {
        "write" | "writev" | "pwrite64" => {
            let Some(path) = call.file() else { return };
            if path == rules.acks {
                found.acks += 1;
                for (file, since) in &open.files {
                    if rules.behind_log.is_none_or(|(_, behind)| !file.ends_with(behind)) {
                        found.wrong.push(format!(
                            "line {}: acknowledged, {file} is not synced since line {}",
                            number + 1,
                            since + 1
                        ));
                    }
                }
                for (file, places) in open.lost.iter().filter(|(_, places)| !places.is_empty()) {
                    if rules.behind_log.is_none_or(|(_, behind)| !file.ends_with(behind)) {
                        found.wrong.push(format!(
                            "line {}: acknowledged, a sync of {file} failed over {} writes",
                            number + 1,
                            places.len()
                        ));
                    }
                }
                for ((folder, name), since) in &open.names {
                    found.wrong.push(format!(
                        "line {}: acknowledged, {folder} is not synced since {name} got its name in line {}",
                        number + 1,
                        since + 1
                    ));
                }
            } else if judged(path) {
                found.writes += 1;
                let to = call.arguments.rsplit_once(") = ").map_or(call.arguments, |(to, _)| to);
                if log_ends(path) && call.name == "pwrite64" && to.trim_end().ends_with(", 0") {
                    behind(number, "begins anew", rules, open, found);
                }
                open.files.insert(path.to_owned(), number);
                let place = to.trim_end().rsplit_once(", ").map_or("", |(_, place)| place).to_owned();
                if let Some(lost) = open.lost.get_mut(path) {
                    lost.remove(&place);
                }
                open.places.entry(path.to_owned()).or_default().insert(place);
            }
        }
        "openat" if call.arguments.contains("O_CREAT") => {
            if let Some(path) = call.texts().first().filter(|path| judged(path) && !open.known.contains(**path)) {
                open.names.entry((folder_of(path).to_owned(), (*path).to_owned())).or_insert(number);
            }
        }
        "rename" | "renameat" | "renameat2" => {
            let texts = call.texts();
            let (Some(from), Some(to)) = (texts.first(), texts.get(1)) else { return };
            open.names.remove(&(folder_of(from).to_owned(), (*from).to_owned()));
            let unsynced = open.files.remove(*from);
            for by_file in [&mut open.lost, &mut open.places] {
                // What was under the new name is gone, and with it what it lost.
                let moved = by_file.remove(*from);
                by_file.remove(*to);
                by_file.extend(moved.map(|moved| ((*to).to_owned(), moved)));
            }
            if judged(to) {
                found.renames += 1;
                for before in open.renamed.iter().filter(|before| folder_of(before) == folder_of(to) && before != to) {
                    found
                        .wrong
                        .push(format!("line {}: {from} is renamed, and the folder not synced since {before} was", number + 1));
                }
                open.renamed.insert((*to).to_owned());
                if let Some(since) = unsynced.filter(|_| (rules.grows)(to)) {
                    open.files.insert((*to).to_owned(), since);
                } else if let Some(since) = unsynced {
                    found.wrong.push(format!("line {}: {from} is renamed, and not synced since line {}", number + 1, since + 1));
                }
                open.names.insert((folder_of(to).to_owned(), (*to).to_owned()), number);
            }
        }
        "unlink" | "unlinkat" => {
            for path in call.texts() {
                if log_ends(path) {
                    behind(number, "is removed", rules, open, found);
                }
                open.files.remove(path);
                open.lost.remove(path);
                open.places.remove(path);
                open.known.remove(path);
                open.names.remove(&(folder_of(path).to_owned(), path.to_owned()));
            }
        }
        _ => {}
    }
}

/// The log goes: what it alone had must be safe elsewhere.
fn behind(number: usize, what: &str, rules: &Rules<'_>, open: &Unsafe, found: &mut Found) {
    let Some((log, ending)) = rules.behind_log else { return };
    for (file, _) in open.lost.iter().filter(|(file, places)| file.ends_with(ending) && !places.is_empty()) {
        found.wrong.push(format!("line {}: {log} {what}, and a sync of {file} failed", number + 1));
    }
    for (file, since) in open.files.iter().filter(|(file, _)| file.ends_with(ending)) {
        found.wrong.push(format!("line {}: {log} {what}, {file} is not synced since line {}", number + 1, since + 1));
    }
}

fn made_safe(at: usize, call: &Call<'_>, open: &mut Unsafe, found: &mut Found) {
    if !["fsync", "fdatasync"].contains(&call.name) {
        return;
    }
    let Some(path) = call.file() else { return };
    found.syncs += 1;
    open.files.retain(|file, since| {
        let stays = file != path || *since > at;
        if !stays {
            open.places.remove(file);
        }
        stays
    });
    open.names.retain(|(folder, name), since| {
        let stays = folder != path || *since > at;
        if !stays {
            open.renamed.remove(name);
            open.known.insert(name.clone());
        }
        stays
    });
}
