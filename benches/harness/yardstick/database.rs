//! A database that our backend made, opened by hand with the settings that our backend uses.

use std::ffi::CStr;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tokio::runtime::Runtime;

use crate::Outcome;
use crate::plan::Backend;
use crate::workload::{self, Field};

/// The row that our backend writes for a node.
pub(super) const PUT_NODE: &str = "INSERT INTO node_states (run_id, node_id, status, attempt, started_at, finished_at, duration_ms, row_count, fingerprint, error, \
     watermarks, metadata, extra, version, run_created_at) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15) \
     ON CONFLICT (run_id, node_id) DO UPDATE SET status = excluded.status, attempt = excluded.attempt, \
     started_at = excluded.started_at, finished_at = excluded.finished_at, duration_ms = excluded.duration_ms, \
     row_count = excluded.row_count, fingerprint = excluded.fingerprint, error = excluded.error, \
     watermarks = excluded.watermarks, metadata = excluded.metadata, extra = excluded.extra, version = excluded.version";

/// A stamp as it is stored.
pub(super) const STAMP: &str = "2024-01-10T12:00:00.000000Z";

/// Our settings.
const PAGE_SIZE: i64 = 1024;
const CACHE_KIB: i64 = 64 * 1024;
const CHECKPOINT_PAGES: i64 = 8 * 1024;

/// What our backend opens its database through, registered when one was opened: it writes many pages of the WAL at once.
const OUR_VFS: &CStr = c"seeknal-wal";

/// Makes a database with the field in it, and opens it with our settings; `gathering`: also through our VFS.
pub(super) fn sown(runtime: &Runtime, folder: &Path, field: &Field, gathering: bool) -> Outcome<Connection> {
    runtime.block_on(async {
        let state = workload::open(Backend::Sqlite, folder).await?;
        field.sow(&state).await?;
        state.close().await?;
        Ok::<_, crate::Fault>(())
    })?;
    let db = folder.join("state.db");
    let flags = OpenFlags::default();
    let conn = if gathering {
        Connection::open_with_flags_and_vfs(db, flags, OUR_VFS)?
    } else {
        Connection::open_with_flags(db, flags)?
    };
    conn.busy_timeout(Duration::from_secs(5))?;
    conn.set_prepared_statement_cache_capacity(96);
    conn.pragma_update(None, "cache_size", -CACHE_KIB)?;
    conn.pragma_update(None, "synchronous", "FULL")?;
    conn.pragma_update_and_check(None, "wal_autocheckpoint", CHECKPOINT_PAGES, |_| Ok(()))?;
    conn.pragma_update_and_check(None, "journal_size_limit", -1, |_| Ok(()))?;
    let mode: String = conn.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    let synchronous: i64 = conn.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    let pages: i64 = conn.pragma_query_value(None, "page_size", |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") || synchronous != 2 || pages != PAGE_SIZE {
        return Err(format!(
            "the yardstick does not run under our settings: {mode}, synchronous {synchronous}, page size {pages}"
        )
        .into());
    }
    // As our backend does: a WAL that has its full length syncs faster than one that grows.
    conn.pragma_update(None, "cache_size", 16)?;
    conn.execute_batch("BEGIN IMMEDIATE")?;
    conn.execute("INSERT INTO batches (id, at, answers) VALUES (x'00', '', zeroblob(?1))", [CHECKPOINT_PAGES * PAGE_SIZE])?;
    conn.execute_batch("ROLLBACK")?;
    conn.pragma_update(None, "cache_size", -CACHE_KIB)?;
    Ok(conn)
}

/// Runs a statement without values that stays prepared.
pub(super) fn run(conn: &Connection, sql: &str) -> rusqlite::Result<()> {
    conn.prepare_cached(sql)?.execute([]).map(|_| ())
}
