//! Time that goes on while the machine sleeps.

use std::time::Duration;

#[cfg(any(target_os = "linux", target_os = "android"))]
const BOOT_CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const BOOT_CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;

/// Since the machine was started. It never goes back.
pub(crate) fn boot_time() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(BOOT_CLOCK)).unwrap_or_default()
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    /// A machine that never slept cannot tell the two apart: that it is this one is said here.
    #[test]
    fn the_clock_is_the_one_that_goes_on_while_the_machine_sleeps() {
        assert_eq!(BOOT_CLOCK, rustix::time::ClockId::Boottime);
    }
}
