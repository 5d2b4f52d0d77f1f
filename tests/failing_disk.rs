//! A disk that fails under the file and the SQLite backend: system calls that are refused, cut off or never succeed again, and no file descriptors.
#![cfg(all(feature = "file", feature = "sqlite"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

#[path = "support/syncs.rs"]
mod syncs;
#[path = "support/trace.rs"]
mod trace;

use std::collections::BTreeMap;
use std::io::{IoSlice, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use seeknal_state::model::{Batch, Entry, Mutation, Outcome, RunPart, time};
use seeknal_state::{
    BackendOptions, NewRun, NodeId, NodeUpdate, RunId, RunState, StateBackend, StoreErrorKind, Version, create_state_backend,
};
use trace::{Child, Told, can_trace};

const BACKENDS: [&str; 2] = ["file", "database"];

fn backend(name: &str, folder: &Path, read_only: bool) -> Arc<dyn StateBackend> {
    create_state_backend(name, &BackendOptions::new().base_path(folder).read_only(read_only)).unwrap()
}

fn run_id() -> RunId {
    RunId::new("run_1").unwrap()
}

/// A batch that sets a node of the run as it is in storage, and makes the run if it is not there.
async fn setting(backend: &Arc<dyn StateBackend>, node: &str) -> Arc<Batch> {
    let at = time::parse("2024-01-10T12:00:00Z").unwrap();
    let version = backend.load_run(&run_id()).await.unwrap().map_or(Version::NONE, |run| run.version());
    let update = Box::new(NodeUpdate::success().error("x".repeat(3_000)));
    let mut mutations = vec![Mutation::SetNode { node: NodeId::new(node).unwrap(), update, at }];
    if version == Version::NONE {
        mutations.insert(0, Mutation::Create { run: NewRun::running(), at });
    }
    let part = RunPart { run: run_id(), base: version, expect: version, guards: vec![], mutations, after: None };
    Arc::new(Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }]))
}

/// Says something by a system call that nobody here makes fail.
fn say(what: &str) {
    let line = format!("told: {what}\n");
    let mut out = std::fs::File::from(rustix::io::dup(std::io::stdout()).unwrap());
    assert_eq!(out.write_vectored(&[IoSlice::new(line.as_bytes())]).unwrap(), line.len());
}

/// By node: whether it was acknowledged, refused for good, or nobody knows.
type Known = BTreeMap<String, Option<bool>>;

fn check(known: &Known, run: Option<&RunState>, what: &str) {
    for (node, known) in known {
        let is_there = run.is_some_and(|run| run.node(node).is_some());
        assert!(known.is_none_or(|known| known == is_there), "{what}: {node}: told {known:?}, there {is_there}");
    }
}

/// Writes, checkpoints and closes, whatever fails, says how it went, and checks what it was told against what is there. It notes acknowledgements in a
/// file, each before it sends the next write.
#[test]
#[ignore = "it is run by another test, under faults"]
fn child_that_goes_on() {
    // Without a driver for sockets nothing is woken by `write`, and only files meet the faults.
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(go_on());
}

async fn go_on() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let name = std::env::var("BACKEND").unwrap();
    let mut acks = std::fs::OpenOptions::new().create(true).append(true).open(std::env::var_os("ACKS").unwrap()).unwrap();
    let state = backend(&name, &folder, false);
    match state.initialize().await {
        Ok(report) => report.notices.iter().for_each(|notice| say(&format!("notice {notice}"))),
        Err(error) => return say(&format!("open {:?} {error}", error.kind())),
    }
    let mut known = Known::new();
    for number in 0..24 {
        let node = format!("node_{number}");
        let batch = setting(&state, &node).await;
        for _ in 0..4 {
            let answer = state.commit(Arc::clone(&batch)).await;
            let settled = match &answer {
                Ok(answer) => Some(matches!(answer.outcomes[0], Outcome::Applied(_))),
                Err(error) => (!error.is_unknown_outcome()).then_some(false),
            };
            known.insert(node.clone(), settled);
            match answer {
                Ok(_) => {
                    let line = format!("{node}\n");
                    assert_eq!(acks.write_vectored(&[IoSlice::new(line.as_bytes())]).unwrap(), line.len());
                    say("acknowledged");
                    break;
                }
                Err(error) => {
                    say(&format!("commit {:?} {error}", error.kind()));
                    if error.is_unknown_outcome() {
                        say(&format!("unknown {error}"));
                    } else if std::env::var_os("DIE").is_some() {
                        say(&format!("known {}", serde_json::to_string(&known).unwrap()));
                        let me = rustix::process::getpid();
                        rustix::process::kill_process(me, rustix::process::Signal::KILL).unwrap();
                    }
                }
            }
        }
        if number % 6 == 5 {
            match state.checkpoint().await {
                Ok(()) => say("checkpointed"),
                Err(error) => {
                    say(&format!("checkpoint {:?} {error}", error.kind()));
                    let left = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
                    let left: Vec<String> = left.filter(|name| name.contains(".tmp-")).collect();
                    assert!(std::env::var_os("LITTER").is_some() || left.is_empty(), "{left:?}");
                }
            }
        }
        // Reading goes on whatever happens.
        check(&known, state.load_run(&run_id()).await.unwrap().as_ref(), "in memory");
    }
    match state.close().await {
        Ok(()) => say("closed"),
        Err(error) => say(&format!("close {:?} {error}", error.kind())),
    }
    say(&format!("known {}", serde_json::to_string(&known).unwrap()));
}

struct Place {
    _folder: tempfile::TempDir,
    state: PathBuf,
    acks: PathBuf,
    log: PathBuf,
    name: &'static str,
}

impl Place {
    fn new(name: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let state = root.join("state");
        std::fs::create_dir(&state).unwrap();
        Self { state, acks: root.join("acks"), log: root.join("log"), name, _folder: folder }
    }

    /// With a run and a node, closed: the next opening has nothing to make.
    async fn filled(name: &'static str) -> Self {
        let place = Self::new(name);
        let state = backend(name, &place.state, false);
        state.initialize().await.unwrap();
        state.commit(setting(&state, "before").await).await.unwrap();
        state.close().await.unwrap();
        place
    }

    fn child(&self) -> Child {
        Child::test("child_that_goes_on").env("STATE_FOLDER", &self.state).env("ACKS", &self.acks).env("BACKEND", self.name)
    }

    /// It went on to its end; without faults, what it was told is there, and service is as before.
    async fn holds(&self, told: &Told, what: &str) {
        told.passed(what);
        self.kept(told, what).await;
    }

    /// As [`holds`](Self::holds), wherever it ended.
    async fn kept(&self, told: &Told, what: &str) {
        let state = backend(self.name, &self.state, false);
        state.initialize().await.unwrap_or_else(|error| panic!("{what}: {error}\n{}", told.output));
        let known = told.after("told: known ").first().map_or_else(Known::new, |known| serde_json::from_str(known).unwrap());
        let run = state.load_run(&run_id()).await.unwrap();
        check(&known, run.as_ref(), what);
        let acknowledged = std::fs::read_to_string(&self.acks).unwrap_or_default();
        let lost = acknowledged.lines().find(|node| run.as_ref().is_none_or(|run| run.node(node).is_none()));
        assert_eq!(lost, None, "{what}: acknowledged and gone");
        let answer = state.commit(setting(&state, "after").await).await.unwrap();
        assert!(matches!(answer.outcomes[0], Outcome::Applied(_)), "{what}");
        state.checkpoint().await.unwrap();
        assert!(state.verify().await.unwrap().is_sound(), "{what}");
        state.close().await.unwrap();
    }

    /// Nothing was acknowledged on the word of a sync that failed, or of one that came after it.
    fn synced(&self, what: &str) -> syncs::Found {
        let found = syncs::read(
            &std::fs::read_to_string(&self.log).unwrap(),
            &syncs::Rules {
                acks: self.acks.to_str().unwrap(),
                folder: self.state.to_str().unwrap(),
                free: |path| {
                    std::path::Path::new(path).extension().is_some_and(|ending| ending == "prev")
                        || path.contains("/state.db.owners")
                        || path.ends_with("-shm")
                },
                grows: |path| std::path::Path::new(path).extension().is_some_and(|ending| ending == "journal"),
                behind_log: (self.name == "database").then_some(("-wal", "/state.db")),
            },
        );
        // Where the folder's own sync failed, the next name comes without it: which journal goes with which document is told by their generations.
        // And the writer may be at its next work before the child has noted the answer: a write with no call between it and the note says nothing. (Where a
        // failed sync is trusted, that sync stands between them.)
        let is_next_work = |wrong: &str| {
            let told = wrong.strip_prefix("line ").and_then(|rest| rest.split_once(": acknowledged, "));
            let numbers = told.and_then(|(line, rest)| {
                Some((line.parse::<usize>().ok()?, rest.rsplit_once("since line ")?.1.parse::<usize>().ok()?))
            });
            numbers.is_some_and(|(line, since)| since + 1 == line)
        };
        let wrong: Vec<&String> = found
            .wrong
            .iter()
            .filter(|wrong| !wrong.contains("and the folder not synced since") && !is_next_work(wrong))
            .collect();
        let log = std::fs::read_to_string(&self.log).unwrap();
        let last =
            |count: usize| log.lines().rev().take(count).map(|line| line.chars().take(200).collect()).collect::<Vec<String>>();
        assert_eq!(wrong, Vec::<&String>::new(), "{what}; the last calls, newest first: {:#?}", last(400));
        found
    }
}

#[tokio::test]
async fn no_sync_that_failed_is_trusted_nor_the_one_after_it() {
    if !can_trace() {
        return;
    }
    for name in BACKENDS {
        let mut failed = 0;
        for call in ["fsync", "fdatasync"] {
            for when in ["1", "2", "3", "4", "5", "7", "9", "12", "3+3"] {
                let what = format!("{name} {call} {when}");
                let place = Place::new(name);
                let child = place.child().log(syncs::CALLS, &place.log);
                let told = child.inject(call, &format!("error=EIO:when={when}")).run();
                place.synced(&what);
                failed += std::fs::read_to_string(&place.log).unwrap().matches("(INJECTED)").count();
                place.holds(&told, &what).await;
            }
        }
        assert!(failed > 6, "{name}: only {failed} failed");
    }
}

/// One of the calls that a rename, and whoever is told of it, rest on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    JournalFailed,
    JournalRemoved,
    Renamed,
    FolderFailed,
    FolderSynced,
    Acknowledged,
}

/// What was done, in its order. (strace follows a path to the calls that name it first, and to what was opened by it.)
fn steps(place: &Place) -> Vec<Step> {
    let (folder, acks) = (place.state.display(), place.acks.display());
    let step = |line: &str| {
        let (call, failed) = (line.split_once(' ')?.1.trim_start(), line.contains("(INJECTED)"));
        if call.starts_with("fsync") && call.contains(&format!("<{folder}>")) {
            Some(if failed { Step::FolderFailed } else { Step::FolderSynced })
        } else if call.starts_with("fdatasync") && failed {
            Some(Step::JournalFailed)
        } else if call.starts_with("unlink") && call.contains(".journal\"") && call.ends_with("= 0") {
            Some(Step::JournalRemoved)
        } else if call.starts_with("rename") && call.ends_with("= 0") {
            Some(Step::Renamed)
        } else {
            (call.starts_with("write") && call.contains(&format!("<{acks}>"))).then_some(Step::Acknowledged)
        }
    };
    std::fs::read_to_string(&place.log).unwrap().lines().filter_map(step).collect()
}

/// The journal's sync fails, so that a whole document takes its place, and the folder's sync behind the document's name fails too. Then nobody knows whether
/// the disk has the document, and the journal may be all that is left of what was acknowledged before: nothing is acknowledged, and nothing removed.
#[tokio::test]
async fn a_document_is_trusted_once_its_folder_was_synced() {
    if !can_trace() {
        return;
    }
    let mut met = Vec::new();
    // Counted with the syncs of the making of the journal: which of the folder's fails is seen from the log. It does once, or from then on.
    for when in ["3", "4", "5", "3+", "4+", "5+"] {
        let place = Place::filled("file").await;
        // Of these alone: the document is written, and synced well, under a name of its own.
        let journal = place.state.join("run_state.json.journal");
        let child = place.child().log(syncs::CALLS, &place.log).on(&place.state).on(&journal).on(&place.acks);
        let child = child.inject("fdatasync", "error=EIO:when=1+").inject("fsync", &format!("error=EIO:when={when}"));
        let told = child.run();
        place.holds(&told, when).await;
        let steps = steps(&place);
        let in_doubt = |two: &[Step]| two == [Step::JournalFailed, Step::FolderFailed];
        let Some(at) = steps.windows(2).position(in_doubt) else { continue };
        let is_safe = |step: &Step| *step == Step::FolderSynced;
        let behind: Vec<Step> = steps[at + 2..].iter().copied().take_while(|step| !is_safe(step)).collect();
        let too_early = |step: &Step| [Step::Acknowledged, Step::JournalRemoved].contains(step);
        assert!(!behind.iter().any(too_early), "{when}: {steps:?}\n{}", told.output);
        assert!(!told.after("told: unknown ").is_empty(), "{when}: {}", told.output);
        // As soon as a sync of the folder ends well there is service again.
        assert_eq!(steps[at + 2..].iter().any(is_safe), !told.after("told: acknowledged").is_empty(), "{when}: {}", told.output);
        met.push(when.ends_with('+'));
    }
    assert!(met.contains(&false) && met.contains(&true), "no document was left in doubt: {met:?}");
}

/// The database has its name, and nobody knows whether the disk has it too.
#[tokio::test]
async fn a_database_is_open_once_its_folder_was_synced() {
    if !can_trace() {
        return;
    }
    let mut met = Vec::new();
    for when in ["3", "4", "5", "3+", "4+", "5+"] {
        let place = Place::new("database");
        let child = place.child().log(syncs::CALLS, &place.log).on(&place.state).on(&place.state.join("state.db.new"));
        let told = child.inject("fsync", &format!("error=EIO:when={when}")).run();
        place.holds(&told, when).await;
        if steps(&place).windows(2).any(|two| two == [Step::Renamed, Step::FolderFailed]) {
            assert!(told.after("told: open ").iter().any(|why| why.starts_with("Io ")), "{when}: {}", told.output);
            assert_eq!(told.after("told: acknowledged"), Vec::<String>::new(), "{when}: {}", told.output);
            met.push(when.ends_with('+'));
        }
    }
    assert!(met.contains(&false) && met.contains(&true), "no database was left in doubt: {met:?}");
}

/// The WAL's name, which SQLite makes durable itself, and takes no notice where that fails.
#[tokio::test]
async fn nothing_is_acknowledged_in_a_wal_whose_folder_was_not_synced() {
    if !can_trace() {
        return;
    }
    let mut refused = 0;
    for made in [false, true] {
        let place = if made { Place::filled("database").await } else { Place::new("database") };
        let told = place.child().inject("fsync", "error=EIO:when=1+").on(&place.state).run();
        place.holds(&told, "every sync of the folder").await;
        assert_eq!(told.after("told: acknowledged"), Vec::<String>::new(), "there before: {made}: {}", told.output);
        refused += told.after("told: open ").iter().filter(|why| why.starts_with("Io ")).count();
    }
    assert!(refused > 0, "nobody was told");
}

/// Answers how many faults were told.
async fn a_full_disk_is_told(name: &'static str, whens: impl Iterator<Item = usize>) -> usize {
    let mut full = 0;
    for when in whens {
        let what = format!("{name} {when}");
        let place = Place::filled(name).await;
        let told = place.child().inject("pwrite64", &format!("error=ENOSPC:when={when}")).run();
        place.holds(&told, &what).await;
        let faults: Vec<String> = told.after("told: ").into_iter().filter(|line| line.contains("nothing is lost")).collect();
        assert!(faults.iter().all(|fault| fault.split(' ').nth(1) == Some("Full")), "{what}: {faults:?}");
        full += faults.len();
    }
    full
}

#[tokio::test]
async fn a_full_disk_is_told_at_every_write_of_the_database_and_service_goes_on() {
    if can_trace() {
        assert!(a_full_disk_is_told("database", (1..=70).step_by(4)).await > 0, "nobody was told");
    }
}

/// It writes a whole document instead, and nobody need be told.
#[tokio::test]
async fn a_full_disk_at_any_write_of_the_file_backend_loses_nothing_and_service_goes_on() {
    if can_trace() {
        a_full_disk_is_told("file", 1..=12).await;
    }
}

/// Some of the first calls, each refused with this error: what is said of it, and how it is asked for.
fn now_and_then(error: &str) -> impl Iterator<Item = (String, String)> {
    (1..=70).step_by(4).map(move |when| (format!("{error} {when}"), format!("error={error}:when={when}")))
}

/// What was not written was not written, and nobody waits for a word on it.
async fn leaves_no_outcome_unknown(error: &str) {
    if !can_trace() {
        return;
    }
    let mut refused = 0;
    for (what, fault) in now_and_then(error) {
        let place = Place::filled("database").await;
        let told = place.child().inject("pwrite64", &fault).run();
        place.holds(&told, &what).await;
        assert_eq!(told.after("told: unknown "), Vec::<String>::new(), "{what}");
        refused += told.after("told: commit ").len();
    }
    assert!(refused > 0, "{error}: nobody was told");
}

#[tokio::test]
async fn a_quota_that_is_used_up_leaves_no_outcome_unknown() {
    leaves_no_outcome_unknown("EDQUOT").await;
}

#[tokio::test]
async fn a_write_that_fails_leaves_no_outcome_unknown() {
    leaves_no_outcome_unknown("EIO").await;
}

/// Whoever is told so and dies before anything else is written finds it so.
async fn is_not_there_after_a_death_at_once(error: &str) {
    if !can_trace() {
        return;
    }
    let mut died = 0;
    for (what, fault) in now_and_then(error) {
        let place = Place::filled("database").await;
        let told = place.child().env("DIE", "1").inject("pwrite64", &fault).run();
        if told.was_killed(&what) {
            died += 1;
            assert!(told.after("told: known ")[0].contains("false"), "{what}: {}", told.output);
        }
        place.kept(&told, &what).await;
    }
    assert!(died > 0, "{error}: nobody was told");
}

#[tokio::test]
async fn what_a_full_disk_refused_is_not_there_after_a_death_at_once() {
    is_not_there_after_a_death_at_once("ENOSPC").await;
}

#[tokio::test]
async fn a_write_that_failed_is_not_there_after_a_death_at_once() {
    is_not_there_after_a_death_at_once("EIO").await;
}

/// What a sync that failed behind it left in the WAL may count after a crash: whoever wrote it is told that nobody knows.
#[tokio::test]
async fn a_sync_that_fails_at_a_commit_leaves_its_outcome_unknown() {
    if !can_trace() {
        return;
    }
    let mut unknown = 0;
    for call in ["fsync", "fdatasync"] {
        for when in ["3", "4", "6", "8", "10", "12"] {
            let place = Place::filled("database").await;
            let told = place.child().env("DIE", "1").inject(call, &format!("error=EIO:when={when}")).run();
            let died = told.was_killed(call);
            assert!(!died, "{call}: a write whose sync failed was told to be refused for certain: {}", told.output);
            unknown += told.after("told: unknown ").len();
            place.kept(&told, call).await;
        }
    }
    assert!(unknown > 0, "no commit met the fault");
}

#[tokio::test]
async fn calls_that_are_interrupted_are_made_again() {
    if !can_trace() {
        return;
    }
    for name in BACKENDS {
        let place = Place::filled(name).await;
        let child = place.child().inject("pwrite64", "error=EINTR:when=1+3");
        let told = child.run();
        place.holds(&told, name).await;
        assert_eq!(told.after("told: acknowledged").len(), 24, "{name}: {}", told.output);
        assert!(!told.output.contains("Io "), "{name}: {}", told.output);
    }
}

#[tokio::test]
async fn a_disk_that_becomes_read_only_is_named_and_reading_goes_on() {
    if !can_trace() {
        return;
    }
    for name in BACKENDS {
        let place = Place::filled(name).await;
        let mut child = place.child().env("LITTER", "1");
        // As a mount that turned read-only: after some work nothing is written any more, and whoever asks is told why. No document is put in place
        // either; SQLite renames only while it opens.
        for (call, when) in [("pwrite64", 30), ("/^f?access.*", 1), ("/rename.*", 1)] {
            if (name, call) != ("database", "/rename.*") {
                child = child.inject(call, &format!("error=EROFS:when={when}+"));
            }
        }
        let told = child.run();
        place.holds(&told, name).await;
        let refused: Vec<String> = told.after("told: commit ");
        assert!(refused.len() > 8, "{name}: {}", told.output);
        assert!(refused.iter().all(|line| line.starts_with("ReadOnly ") && line.contains("read-only")), "{name}: {refused:#?}");
    }
}

#[tokio::test]
async fn a_checkpoint_that_fails_is_told_and_leaves_nothing_lying() {
    if !can_trace() {
        return;
    }
    for (call, error, kind) in [("/rename.*", "EACCES", "ReadOnly"), ("/rename.*", "EIO", "Io")] {
        let place = Place::filled("file").await;
        // Counted for each thread, and every checkpoint has one of its own.
        let told = place.child().inject(call, &format!("error={error}:when=1")).run();
        place.holds(&told, call).await;
        let failed = told.after("told: checkpoint ");
        assert!(!failed.is_empty() && failed.iter().all(|line| line.starts_with(kind)), "{call}: {}", told.output);
        assert_eq!(told.after("told: acknowledged").len(), 24, "{call}: commits go on");
    }
}

/// Lives on while nothing more can be opened.
#[tokio::test]
#[ignore = "it is run by another test, with a limit that it sets itself"]
async fn child_without_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let name = std::env::var("BACKEND").unwrap();
    let state = backend(&name, &folder, false);
    state.initialize().await.unwrap();
    state.commit(setting(&state, "with").await).await.unwrap();
    let batch = setting(&state, "without").await;
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: limits.maximum }).unwrap();
    let mut errors = Vec::new();
    let committed = state.commit(batch).await;
    let second = backend(&name, &folder, false);
    errors.extend(second.initialize().await.err());
    errors.extend(state.checkpoint().await.err());
    setrlimit(Resource::Nofile, limits).unwrap();
    assert!(!errors.is_empty(), "a second opening needs a descriptor");
    for error in errors {
        assert!(matches!(error.kind(), StoreErrorKind::Io | StoreErrorKind::Busy), "{error}");
    }
    // What it had, it still has: others are kept out as before, and it serves on.
    if name == "file" {
        assert_eq!(second.initialize().await.unwrap_err().kind(), StoreErrorKind::Busy);
    } else {
        second.initialize().await.unwrap();
        let own = state.process().unwrap().id;
        let openings = second.processes().await.unwrap();
        assert!(openings.iter().any(|opening| opening.process.id == own && opening.alive == Some(true)), "{openings:?}");
        second.close().await.unwrap();
    }
    let there = state.load_run(&run_id()).await.unwrap().unwrap().node("without").is_some();
    assert!(there == committed.is_ok() || committed.is_err_and(|error| error.is_unknown_outcome()));
    state.commit(setting(&state, "again").await).await.unwrap();
    state.checkpoint().await.unwrap();
    state.close().await.unwrap();
}

#[test]
fn without_file_descriptors_there_are_errors_only_and_locks_are_kept() {
    for name in BACKENDS {
        let place = Place::new(name);
        let child = Child::test("child_without_descriptors").env("STATE_FOLDER", &place.state).env("BACKEND", name);
        child.run().passed(name);
    }
}

/// Commits so often that the WAL is grown to its full length, and says how long it is.
#[tokio::test]
#[ignore = "it is run by another test, on a disk that says how full it is"]
async fn child_that_commits_often() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let state = backend("database", &folder, false);
    state.initialize().await.unwrap();
    for number in 0..66 {
        state.commit(setting(&state, &format!("node_{}", number % 4)).await).await.unwrap();
    }
    state.checkpoint().await.unwrap();
    say(&format!("length {}", std::fs::metadata(folder.join("state.db-wal")).unwrap().len()));
    state.close().await.unwrap();
}

/// What is only there for speed takes no space that commits may need.
#[test]
fn a_disk_that_is_nearly_full_is_left_to_commits() {
    if !can_trace() {
        return;
    }
    // As the kernel answers: the type (ext4), the size of a block, how many there are, are free, and are free to everybody.
    let answer =
        |free: &str| format!("poke_exit=@arg2=53ef000000000000{0}{1}{free}{free}", "0010000000000000", "0000000100000000");
    for (free, grows) in [("0000000100000000", true), ("0010000000000000", false)] {
        let place = Place::new("database");
        let child = Child::test("child_that_commits_often").env("STATE_FOLDER", &place.state);
        let told = child.inject("statfs", &answer(free)).run();
        told.passed(free);
        let length: u64 = told.after("told: length ")[0].parse().unwrap();
        assert_eq!(length > 8 << 20, grows, "{length}");
    }
}

/// Asks 2,000 times at once for runs that nobody has in memory.
#[tokio::test]
#[ignore = "it is run by another test, with a limit"]
async fn child_with_a_crowd() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    let at = time::parse("2024-01-10T12:00:00Z").unwrap();
    let state = backend("database", &folder, false);
    state.initialize().await.unwrap();
    let runs: Vec<RunId> = (0..20).map(|number| RunId::new(format!("run_{number}")).unwrap()).collect();
    // Of some length, so that whoever reads is not done before the next one begins.
    let create = |run: &RunId| {
        let node = |number| Mutation::SetNode {
            node: NodeId::new(format!("node_{number}")).unwrap(),
            update: Box::new(NodeUpdate::success()),
            at,
        };
        let mutations = [Mutation::Create { run: NewRun::running(), at }].into_iter().chain((0..100).map(node)).collect();
        let part =
            RunPart { run: run.clone(), base: Version::NONE, expect: Version::NONE, guards: vec![], mutations, after: None };
        Entry { parts: vec![part], ..Entry::default() }
    };
    state.commit(Arc::new(Batch::new(runs.iter().map(create).collect()))).await.unwrap();
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(256), maximum: limits.maximum }).unwrap();
    let loading: Vec<_> = (0..100)
        .flat_map(|_| runs.clone())
        .map(|run| {
            let state = Arc::clone(&state);
            tokio::spawn(async move { state.load_run(&run).await })
        })
        .collect();
    for load in loading {
        assert!(load.await.unwrap().unwrap().is_some());
    }
    state.close().await.unwrap();
}

#[test]
fn a_crowd_of_readers_shares_few_file_descriptors() {
    let place = Place::new("database");
    Child::test("child_with_a_crowd").env("STATE_FOLDER", &place.state).run().passed("a crowd");
}

#[tokio::test]
async fn a_file_system_of_another_machine_is_refused_by_sqlite_and_told_by_the_file_backend() {
    if !can_trace() {
        return;
    }
    for name in BACKENDS {
        let place = Place::filled(name).await;
        // The kernel's answer begins with the type of the file system: NFS.
        let told = place.child().inject("statfs", "poke_exit=@arg2=6969").run();
        place.holds(&told, name).await;
        let (word, is_open) = if name == "file" { ("told: notice ", true) } else { ("told: open Unsupported ", false) };
        let lines = told.after(word);
        assert_eq!(lines.len(), 1, "{name}: {}", told.text);
        for named in ["NFS", "postgres://", "libsql://", place.state.to_str().unwrap()] {
            assert!(lines[0].contains(named), "{name}: {lines:?}");
        }
        assert_eq!(!told.after("told: acknowledged").is_empty(), is_open, "{name}");
    }
}
