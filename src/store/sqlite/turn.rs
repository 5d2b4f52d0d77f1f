//! Waiting for one's turn to write, beside other processes.
//!
//! At first it waits as SQLite does by itself, in steps that grow: a process that writes many transactions in a row does better than two that take
//! turns, because whoever comes after somebody else has to look at what that one wrote. (Measured: short steps cost two processes on one run 40 %.)
//! But SQLite's steps grow to 100 ms, between which a busy neighbour is never caught idle; so after a tenth of a second it tries every millisecond.

use std::time::Duration;

/// The first steps, in milliseconds: a tenth of a second together.
const FIRST: &[u64] = &[1, 2, 5, 10, 15, 20, 25, 25];
/// Each later one.
const LATER: Duration = Duration::from_millis(1);
/// Tries at most: five seconds together, as far as the system wakes in time.
const TRIES: usize = 4_600;

/// Waits before the next try; `false`: it was tried often enough.
pub(super) fn wait(tries: i32) -> bool {
    let tries = usize::try_from(tries).unwrap_or(0);
    if tries >= TRIES {
        return false;
    }
    std::thread::sleep(FIRST.get(tries).map_or(LATER, |pause| Duration::from_millis(*pause)));
    true
}
