//! What a disk may hold after a power cut: the folders that a process's system calls could have left, cut at every one of them.
//!
//! strace's log has the calls with their bytes. A write is on disk for sure once a sync of its file that began after it has ended, and a name once a sync
//! of its folder has; before that the disk has it, or not, or the half of it, whatever came after. Names reach the disk in their order.
#![allow(dead_code, reason = "every test takes what it needs of it")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The calls that are logged, with all of their bytes.
pub(crate) const CALLS: &str = "openat,lseek,pwrite64,write,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,ftruncate,fallocate,link,linkat,copy_file_range,sendfile";

/// What a disk writes whole.
const SECTOR: usize = 512;

type Bytes = Vec<u8>;
type Tree = BTreeMap<String, Bytes>;

/// One change of a file's bytes.
#[derive(Debug, Clone)]
enum Change {
    Put(usize, Bytes),
    Cut(usize),
}

impl Change {
    fn on(&self, bytes: &mut Bytes) {
        match self {
            Self::Put(at, put) => {
                if bytes.len() < at + put.len() {
                    bytes.resize(at + put.len(), 0);
                }
                bytes[*at..at + put.len()].copy_from_slice(put);
            }
            Self::Cut(length) => bytes.resize(*length, 0),
        }
    }

    /// Of a write that was cut off, the sectors of its first half.
    fn torn(&self) -> Option<Self> {
        match self {
            Self::Put(at, put) if put.len() > 1 => {
                let half = put.len() / 2;
                let sectors = ((at + half) / SECTOR * SECTOR).saturating_sub(*at);
                Some(Self::Put(*at, put[..if sectors == 0 { half } else { sectors }].to_vec()))
            }
            _ => None,
        }
    }
}

/// A file: what is on disk for sure, and what is on its way, with the line of each.
#[derive(Debug, Clone, Default)]
struct File {
    sure: Bytes,
    pending: Vec<(usize, Change)>,
    /// How far it was written without a place.
    end: usize,
}

/// One change of names.
#[derive(Debug, Clone)]
enum Naming {
    Is(String, usize),
    Not(String),
}

impl Naming {
    fn on(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Is(name, file) => names.insert(name.clone(), *file),
            Self::Not(name) => names.remove(name),
        };
    }
}

/// The folder while the calls are read.
#[derive(Debug, Default)]
struct Disk {
    files: Vec<File>,
    /// As processes see the names.
    seen: BTreeMap<String, usize>,
    sure: BTreeMap<String, usize>,
    pending: Vec<(usize, Naming)>,
}

impl Disk {
    fn name(&mut self, line: usize, naming: Naming) {
        naming.on(&mut self.seen);
        self.pending.push((line, naming));
    }

    fn change(&mut self, line: usize, name: &str, change: Change) {
        if let Some(file) = self.seen.get(name) {
            self.files[*file].pending.push((line, change));
        }
    }

    fn synced(&mut self, since: usize, name: &str) {
        let Some(file) = self.seen.get(name) else { return };
        let file = &mut self.files[*file];
        for (_, change) in file.pending.iter().filter(|(line, _)| *line < since) {
            change.on(&mut file.sure);
        }
        file.pending.retain(|(line, _)| *line >= since);
    }

    fn names_synced(&mut self, since: usize) {
        for (_, naming) in self.pending.iter().filter(|(line, _)| *line < since) {
            naming.on(&mut self.sure);
        }
        self.pending.retain(|(line, _)| *line >= since);
    }

    /// The folders that a cut may leave now.
    fn cuts(&self) -> Vec<(&'static str, Tree)> {
        let last = self.files.iter().flat_map(|file| &file.pending).map(|(line, _)| *line).max();
        let bytes = |file: usize, take: &dyn Fn(usize, &Change) -> Option<Change>| {
            let mut bytes = self.files[file].sure.clone();
            for change in self.files[file].pending.iter().filter_map(|(line, change)| take(*line, change)) {
                change.on(&mut bytes);
            }
            bytes
        };
        let tree = |names: &BTreeMap<String, usize>, take: &dyn Fn(usize, &Change) -> Option<Change>| -> Tree {
            names.iter().map(|(name, file)| (name.clone(), bytes(*file, take))).collect()
        };
        let none = |_: usize, _: &Change| None;
        let all = |_: usize, change: &Change| Some(change.clone());
        let only_last = |line: usize, change: &Change| (Some(line) == last).then(|| change.clone());
        let torn = |line: usize, change: &Change| if Some(line) == last { change.torn() } else { Some(change.clone()) };
        let mut cuts = vec![
            ("nothing that was not synced", tree(&self.sure, &none)),
            ("bytes without names", tree(&self.sure, &all)),
            ("names without bytes", tree(&self.seen, &none)),
            ("everything", tree(&self.seen, &all)),
            ("the last write alone", tree(&self.seen, &only_last)),
            ("the last write torn", tree(&self.seen, &torn)),
        ];
        let mut some = self.sure.clone();
        for (_, naming) in &self.pending {
            naming.on(&mut some);
            cuts.push(("the first names alone", tree(&some, &all)));
        }
        cuts
    }
}

/// Reads a log of the calls of a process on one folder, and gives every folder that a power cut could have left, once each: how it came to be, how many
/// writes to the file of acknowledgements had begun, and its files.
pub(crate) fn cuts(log: &str, folder: &Path, acks: &Path, free: fn(&str) -> bool) -> Vec<(String, usize, Tree)> {
    let (folder, acks) = (folder.to_str().unwrap(), acks.to_str().unwrap());
    let judged = |path: &str| {
        let name = path.strip_prefix(folder)?.strip_prefix('/')?;
        (!free(name) && !name.contains('/')).then(|| name.to_owned())
    };
    let (mut disk, mut acknowledged, mut found) = (Disk::default(), 0, Vec::new());
    let mut begun: HashMap<&str, (usize, &str)> = HashMap::new();
    for (number, line) in log.lines().enumerate() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        // A call counts from its beginning, a sync from its end, over what began before it.
        let (call, since, begins, ends) = if let Some(resumed) = rest.strip_prefix("<... ") {
            let Some((since, text)) = begun.remove(thread) else { continue };
            (text, since, false, !resumed.rsplit_once("= ").is_some_and(|(_, result)| result.starts_with('-')))
        } else if let Some(text) = rest.strip_suffix("<unfinished ...>") {
            begun.insert(thread, (number, text));
            (text, number, true, false)
        } else {
            (rest, number, true, !rest.rsplit_once("= ").is_some_and(|(_, result)| result.starts_with('-')))
        };
        let Some((name, arguments)) = call.split_once('(') else { continue };
        let on = arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map(|(path, _)| plain(path));
        let on = on.as_deref();
        let texts: Vec<String> =
            arguments.split('"').skip(1).step_by(2).map(|text| String::from_utf8(unquoted(text)).unwrap_or_default()).collect();
        match name {
            "fsync" | "fdatasync" if ends => match on {
                Some(path) if path == folder => disk.names_synced(since),
                Some(path) => {
                    if let Some(file) = judged(path) {
                        disk.synced(since, &file);
                    }
                }
                None => {}
            },
            "write" if begins && on == Some(acks) => acknowledged += 1,
            "pwrite64" | "write" if begins => {
                let Some(file) = on.and_then(judged) else { continue };
                let put = unquoted(arguments.split('"').nth(1).unwrap());
                let behind = arguments.rsplit_once('"').unwrap().1;
                let mut numbers = behind.split(|letter: char| !letter.is_ascii_digit()).filter(|text| !text.is_empty());
                assert_eq!(numbers.next().unwrap().parse::<usize>().unwrap(), put.len(), "the log has all bytes: {number}");
                let at = if name == "write" {
                    disk.seen.get(&file).map_or(0, |file| disk.files[*file].end)
                } else {
                    numbers.next().unwrap().parse().unwrap()
                };
                if let Some(id) = disk.seen.get(&file) {
                    disk.files[*id].end = at + put.len();
                }
                disk.change(number, &file, Change::Put(at, put));
            }
            "lseek" if begins => {
                let Some(id) = on.and_then(judged).and_then(|file| disk.seen.get(&file).copied()) else { continue };
                let Some((place, _)) = arguments.split_once(", SEEK_SET") else { continue };
                disk.files[id].end = place.rsplit_once(", ").unwrap().1.parse().unwrap();
            }
            "ftruncate" if begins => {
                let Some(file) = on.and_then(judged) else { continue };
                let length = arguments.rsplit_once(", ").unwrap().1;
                let length: String = length.chars().take_while(char::is_ascii_digit).collect();
                disk.change(number, &file, Change::Cut(length.parse().unwrap()));
            }
            "openat" if begins => {
                let Some(file) = texts.first().and_then(|path| judged(path)) else { continue };
                match disk.seen.get(&file).copied() {
                    Some(id) => {
                        disk.files[id].end = 0;
                        if arguments.contains("O_TRUNC") {
                            disk.change(number, &file, Change::Cut(0));
                        }
                    }
                    None if arguments.contains("O_CREAT") => {
                        disk.files.push(File::default());
                        let id = disk.files.len() - 1;
                        disk.name(number, Naming::Is(file, id));
                    }
                    None => {}
                }
            }
            "rename" | "renameat" | "renameat2" if begins => {
                let (Some(from), Some(to)) = (judged(&texts[0]), judged(&texts[1])) else { continue };
                let Some(id) = disk.seen.get(&from).copied() else { continue };
                disk.name(number, Naming::Is(to, id));
                disk.name(number, Naming::Not(from));
            }
            "unlink" | "unlinkat" if begins => {
                let Some(file) = texts.first().and_then(|path| judged(path)) else { continue };
                disk.name(number, Naming::Not(file));
            }
            "writev" | "fallocate" | "link" | "linkat" | "copy_file_range" | "sendfile" if begins => {
                let touched = on.into_iter().chain(texts.iter().map(String::as_str)).any(|path| judged(path).is_some());
                assert!(!touched, "this call is not replayed: {}", call.chars().take(200).collect::<String>());
            }
            _ => continue,
        }
        for (how, tree) in disk.cuts() {
            let is_known = |(_, before, known): &(String, usize, Tree)| *before == acknowledged && *known == tree;
            // Most are as one of the last was.
            if !found.iter().rev().any(is_known) {
                found.push((format!("{how}, cut at line {} ({name})", number + 1), acknowledged, tree));
            }
        }
    }
    found
}

/// Lays a folder down.
pub(crate) fn lay(tree: &Tree, folder: &Path) {
    for (name, bytes) in tree {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

/// The path of an open file, as strace writes it with `-y`.
fn plain(path: &str) -> String {
    if path.contains("\\x") { String::from_utf8(unquoted(path)).unwrap_or_default() } else { path.to_owned() }
}

/// The bytes of a text as strace writes it with `-xx`.
fn unquoted(text: &str) -> Bytes {
    text.split("\\x").skip(1).map(|hex| u8::from_str_radix(hex, 16).unwrap()).collect()
}
