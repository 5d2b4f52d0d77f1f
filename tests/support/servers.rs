//! One rule for all tests that need a server: they fail where it is missing, and say which one and what installs it. Only the variable
//! `SEEKNAL_TEST_WITHOUT_SERVERS` leaves them out, all of them, also where a server is there; each says so. It is never set in CI.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

/// The variable; anything but nothing and `0` sets it.
pub(crate) const VARIABLE: &str = "SEEKNAL_TEST_WITHOUT_SERVERS";

/// Whether tests with servers are left out. Says so once a process, past the harness, which shows nothing of what a passing test prints.
pub(crate) fn left_out(server: &str) -> bool {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let left_out = std::env::var_os(VARIABLE).is_some_and(|value| !value.is_empty() && value != "0");
    if left_out && TOLD.lock().is_ok_and(|mut told| told.insert(server.to_owned())) {
        let _nobody_reads = writeln!(std::io::stderr(), "NOT TESTED: what needs {server}, because {VARIABLE} is set");
    }
    left_out
}

/// What was found of a server; `None`: tests with servers are left out.
///
/// # Panics
/// If it was not found.
#[allow(clippy::panic, reason = "a test that cannot go on has failed")]
pub(crate) fn needed<T>(server: &str, found: Option<T>, install: &str) -> Option<T> {
    if left_out(server) {
        return None;
    }
    Some(found.unwrap_or_else(|| {
        panic!("{server} is missing. To install it: {install}. For a quick run without any server: {VARIABLE}=1")
    }))
}
