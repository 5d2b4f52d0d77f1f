//! Waiting for one's turn to write, beside other processes.
//!
//! Two neighbours: at first it waits as SQLite does by itself, in steps that grow, because a process that writes many transactions in a row does better than
//! two that take turns: whoever comes after somebody else has to look at what that one wrote. (Measured: short steps cost two processes on one run
//! 40 %.) But SQLite's steps grow to 100 ms, between which a busy neighbour is never caught idle; so after a tenth of a second it tries every millisecond.
//!
//! A crowd: somebody else wrote in between anyhow, and while all of them sleep in long steps nobody writes at all. So everybody tries often.

use std::cell::Cell;
use std::time::Duration;

/// The first steps, in milliseconds: a tenth of a second together.
const FIRST: &[u64] = &[1, 2, 5, 10, 15, 20, 25, 25];
/// Each later one.
const LATER: Duration = Duration::from_millis(1);
/// Each one in a crowd.
const IN_A_CROWD: Duration = Duration::from_micros(300);
/// How long it is tried, in all.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many other openings are a crowd.
const CROWD: usize = 3;

thread_local! {
    /// Whether this thread's database is written by a crowd: SQLite calls back without anything that could say so.
    static CROWDED: Cell<bool> = const { Cell::new(false) };
    /// How long this turn was waited for.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// So many others have the database open, as far as the calling thread knows.
pub(super) fn others(count: usize) {
    CROWDED.set(count >= CROWD);
}

/// Waits before the next try; `false`: it was tried long enough.
pub(super) fn wait(tries: i32) -> bool {
    let tries = usize::try_from(tries).unwrap_or(0);
    let waited = if tries == 0 { Duration::ZERO } else { WAITED.get() };
    if waited >= PATIENCE {
        return false;
    }
    let pause = if CROWDED.get() { IN_A_CROWD } else { FIRST.get(tries).map_or(LATER, |pause| Duration::from_millis(*pause)) };
    std::thread::sleep(pause);
    WAITED.set(waited + pause);
    true
}
