//! Runs a test of the same binary again in a process of its own, under strace or a limit: system calls fail, kill, wait, or are written down.
#![allow(dead_code, reason = "every test takes what it needs of it")]

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, ExitStatus};

/// Syncs of files, whichever of the two a build of SQLite uses.
pub(crate) const SYNCS: &str = "/^f(data)?sync$";

/// Whether system calls can be made to fail here. Where they cannot, a test of them fails, unless a run without these faults is wanted.
pub(crate) fn can_trace() -> bool {
    can("strace", &["-o", "/dev/null", "true"], "strace is missing or not permitted here: install it")
}

/// Whether processes can be given limits here; as [`can_trace`].
pub(crate) fn can_limit() -> bool {
    can("prlimit", &["--version"], "prlimit is missing: install util-linux")
}

fn can(program: &str, arguments: &[&str], mend: &str) -> bool {
    let can = Command::new(program).args(arguments).output().is_ok_and(|out| out.status.success());
    let unwanted = std::env::var_os("WITHOUT_FAULTS").is_some_and(|value| value == "1");
    assert!(can || unwanted, "{mend}, or set WITHOUT_FAULTS=1 for a run without these faults");
    can
}

/// A program that is run under a tool; by default an ignored test of this binary.
#[derive(Debug, Clone)]
pub(crate) struct Child {
    limits: Vec<String>,
    /// Options of strace; none: it is not traced.
    strace: Vec<OsString>,
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Child {
    /// An ignored test of this binary, by its whole name (`module::name`).
    pub(crate) fn test(name: &str) -> Self {
        Self::program(std::env::current_exe().unwrap()).arguments(["--exact", name, "--ignored", "--nocapture"])
    }

    pub(crate) fn program(program: impl AsRef<OsStr>) -> Self {
        Self {
            limits: Vec::new(),
            strace: Vec::new(),
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    pub(crate) fn arguments<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    pub(crate) fn env(mut self, key: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((key, value.as_ref().to_owned()));
        self
    }

    /// Makes system calls fail, kill or wait: strace's `-e inject=…`, counted for each thread. `call` may be a `/pattern`.
    pub(crate) fn inject(mut self, call: &str, what: &str) -> Self {
        if self.strace.is_empty() {
            // Only what is tampered with stops the child.
            self.strace = ["-f", "--seccomp-bpf", "-qq"].map(OsString::from).to_vec();
        }
        self.strace.extend(["-e".into(), format!("inject={call}:{what}").into()]);
        self
    }

    /// Only calls that name this path, or a file that was opened by it.
    pub(crate) fn on(mut self, path: &Path) -> Self {
        self.strace.extend(["-P".into(), path.into()]);
        self
    }

    /// Writes the calls down, with the names of the files.
    pub(crate) fn log(mut self, calls: &str, log: &Path) -> Self {
        self.strace = ["-f", "--seccomp-bpf", "-qq", "-y", "-s", "0", "-e"].map(OsString::from).to_vec();
        self.strace.extend([format!("trace={calls}").into(), "-o".into(), log.into()]);
        self
    }

    /// Writes the calls down, with the names of the files and every byte that is written.
    pub(crate) fn log_bytes(mut self, calls: &str, log: &Path) -> Self {
        self.strace = ["-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", "16777216", "-e"].map(OsString::from).to_vec();
        self.strace.extend([format!("trace={calls}").into(), "-o".into(), log.into()]);
        self
    }

    /// A limit of the system, as an option of `prlimit`; a file that would grow too long is an error, no signal.
    pub(crate) fn limit(mut self, option: String) -> Self {
        self.limits.push(option);
        self
    }

    pub(crate) fn run(self) -> Told {
        let mut words: Vec<OsString> = Vec::new();
        if !self.limits.is_empty() {
            words.extend(["sh", "-c", "trap '' XFSZ; exec \"$@\"", "limited", "prlimit"].map(OsString::from));
            words.extend(self.limits.into_iter().map(OsString::from));
        }
        if !self.strace.is_empty() {
            words.push("strace".into());
            if !self.strace.iter().any(|option| option == "-o") {
                words.extend(["-o", "/dev/null"].map(OsString::from));
            }
            words.extend(self.strace);
        }
        words.push(self.program);
        words.extend(self.arguments);
        let mut command = Command::new(&words[0]);
        let out = command.args(&words[1..]).envs(self.environment).output().unwrap();
        let output = String::from_utf8_lossy(&out.stdout).into_owned();
        let text = output.clone() + &String::from_utf8_lossy(&out.stderr);
        Told { status: out.status, output, text }
    }
}

/// How it ended, and what it said.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) status: ExitStatus,
    pub(crate) output: String,
    /// With its errors.
    pub(crate) text: String,
}

impl Told {
    /// The child is a test, ran, and passed.
    #[track_caller]
    pub(crate) fn passed(&self, what: &str) {
        assert!(self.status.success() && self.text.contains("1 passed"), "{what}: {}", self.text);
    }

    /// The child was killed by the injected signal; a child that failed an assertion is no such thing.
    #[track_caller]
    pub(crate) fn was_killed(&self, what: &str) -> bool {
        use std::os::unix::process::ExitStatusExt;
        assert!(!self.text.contains("panicked"), "{what}: {}", self.text);
        let killed = self.status.signal() == Some(9) || self.status.code() == Some(137);
        assert!(killed || self.status.success(), "{what}: {:?}: {}", self.status, self.text);
        killed
    }

    /// What follows a word that the child printed, line by line.
    pub(crate) fn after(&self, word: &str) -> Vec<String> {
        self.output.lines().filter_map(|line| line.split_once(word)).map(|(_, rest)| rest.trim().to_owned()).collect()
    }
}
