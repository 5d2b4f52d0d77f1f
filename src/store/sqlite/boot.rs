//! The clock that leases run on: time since the machine was started, which no wall clock's jump touches and which goes on in suspend.

use std::sync::LazyLock;

use rusqlite::Connection;
use rusqlite::functions::FunctionFlags;

use crate::store::boot_time;

const UNKNOWN: &str = "unknown";

static BOOT_ID: LazyLock<String> = LazyLock::new(|| {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let text = text.trim();
    if text.is_empty() { UNKNOWN.to_owned() } else { text.to_owned() }
});

/// Which start of the machine this is.
pub(super) fn boot_id() -> &'static str {
    &BOOT_ID
}

/// Whether this system says which start of the machine this is.
pub(super) fn is_known() -> bool {
    is_real(boot_id())
}

/// Whether this names a start of a machine.
pub(super) fn is_real(boot_id: &str) -> bool {
    boot_id != UNKNOWN
}

/// Whether this system tells every process which start of the machine this is: one that cannot read it sees less than the others do.
const TOLD: bool = cfg!(any(target_os = "linux", target_os = "android"));

/// Whether leases may be granted here: others would take one under an unknown start for one of an earlier start, and so for over.
pub(super) fn may_grant() -> bool {
    is_known() || !TOLD
}

/// Which start leases must be of to be held. Empty: this process does not know, so that their time alone decides.
pub(super) fn of_leases() -> &'static str {
    if may_grant() { boot_id() } else { "" }
}

/// Milliseconds since the machine was started.
pub(super) fn boot_ms() -> i64 {
    i64::try_from(boot_time().as_millis()).unwrap_or(i64::MAX)
}

/// Makes `seeknal_boot_ms()` known to SQL: a statement asks for the time after it has waited for its lock, not before.
pub(super) fn register(conn: &Connection) -> rusqlite::Result<()> {
    conn.create_scalar_function("seeknal_boot_ms", 0, FunctionFlags::SQLITE_UTF8, |_| Ok(boot_ms()))
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    /// What SQL asks is that clock.
    #[test]
    fn sql_asks_that_clock() {
        let conn = Connection::open_in_memory().unwrap();
        register(&conn).unwrap();
        let before = boot_ms();
        let told: i64 = conn.query_row("SELECT seeknal_boot_ms()", [], |row| row.get(0)).unwrap();
        assert!((before..=boot_ms()).contains(&told), "{told} is not between {before} and {}", boot_ms());
    }
}
