//! Opening a database: what is in the way is refused before anything of it is touched; what is opened is opened with our settings.
//!
//! The file is never opened by hand: closing such a handle would drop the locks that SQLite holds on it in this process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::error::{is_damage, is_unwritable, sql_error};
use super::schema::{self, APPLICATION_ID, PAGE_SIZE};
use super::{boot, gather, owners, turn};
use crate::store::access::{Access, make_new};
use crate::store::highwater::{HighWater, HighWaterFile};
use crate::store::{StoreError, StoreErrorKind, folder, plain};

/// How long a statement waits for another process's transaction.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an opening waits for those before it, each of which may wait for a transaction.
const OPENING_TIMEOUT: Duration = Duration::from_secs(30);

/// Pages after which SQLite itself brings the WAL into the database, inside a commit: only where a [`checkpoint`](super::checkpoint) beside the writer
/// did not.
const CHECKPOINT_PAGES: i64 = 16 * 1024;

/// How long the WAL becomes while the writer is busy.
const WAL_PAGES: i64 = 12 * 1024;

/// Page cache of the writer, in KiB.
const WRITER_CACHE: i64 = 64 * 1024;

/// Page cache of a reader, in KiB.
const READER_CACHE: i64 = 8 * 1024;

/// Statements that a connection keeps prepared; all of ours fit.
const STATEMENTS: usize = 96;

/// A file beside the database: its name with something behind it.
pub(super) fn beside(db: &Path, suffix: &str) -> PathBuf {
    let mut name = db.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// What the file beside a database knows of numbers that were given out; `None` if there is none.
pub(super) fn known(db: &Path) -> Result<Option<HighWater>, StoreError> {
    let sidecar = beside(db, ".lock");
    match sidecar.try_exists() {
        Ok(false) => Ok(None),
        Ok(true) => HighWaterFile::peek(&sidecar).map(Some),
        Err(error) => Err(StoreError::io(sidecar.display(), error)),
    }
}

/// Where a database has nothing: that the file beside it tells of one that had.
pub(super) fn lost(db: &Path, known: &HighWater) -> Option<String> {
    (known.seq > 0).then(|| {
        format!(
            "{} is new or empty, but {} tells of one that commits were written to: it was removed or emptied. Unless that was on purpose, bring a \
             backup of it back",
            db.display(),
            beside(db, ".lock").display()
        )
    })
}

fn length(path: &Path) -> Result<Option<u64>, StoreError> {
    let refuse = |why: &str| Err(StoreError::not_applied(StoreErrorKind::Input, format!("{}{why}", path.display())));
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => refuse(" is a folder; name a file"),
        Ok(meta) if !meta.is_file() => refuse(&format!(": {}; move it aside", plain::WHY)),
        Ok(meta) => Ok(Some(meta.len())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io(path.display(), error)),
    }
}

/// Refuses a pipe, a folder or a device in the place of the database, or of what SQLite keeps beside it: SQLite opens whatever it finds there, and would wait for
/// the other end of a pipe.
pub(super) fn refuse_no_files(db: &Path) -> Result<(), StoreError> {
    ["", "-wal", "-shm", "-journal"].iter().try_for_each(|suffix| length(&beside(db, suffix)).map(|_| ()))?;
    // They lie beside the database itself, not beside a link to it, and SQLite would write to wherever a link leads.
    let real = std::fs::canonicalize(db).unwrap_or_else(|_| db.to_owned());
    let links = ["-wal", "-shm", "-journal"].map(|suffix| beside(&real, suffix));
    match links.into_iter().find(|path| std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())) {
        Some(link) => {
            let why = format!("{}: {}; move it aside", link.display(), plain::LINK);
            Err(StoreError::not_applied(StoreErrorKind::Input, why))
        }
        None => Ok(()),
    }
}

/// Opens for writing; makes the database, and its folder, if they are not there. Says also whether it was made.
pub(super) fn open_writer(db: &Path, sidecar: &HighWaterFile) -> Result<(Connection, bool), StoreError> {
    let place = db.display().to_string();
    // One opening at a time looks and makes.
    sidecar.lock(OPENING_TIMEOUT)?;
    let opened = (|| {
        let made = check(db)? == Found::Nothing;
        if made {
            make(db)?;
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = match gather::vfs() {
            Some(vfs) => Connection::open_with_flags_and_vfs(db, flags, vfs),
            None => Connection::open_with_flags(db, flags),
        };
        let mut conn = opened.map_err(|error| sql_error(&place, error))?;
        configure(&conn, true).map_err(|error| sql_error(&place, error))?;
        recheck(&conn, &place)?;
        // The tables are made before the WAL: so the main file always tells whose it is.
        schema::migrate(&mut conn, &place)?;
        demand_wal(&conn, &place)?;
        conn.busy_handler(Some(turn::wait)).map_err(|error| sql_error(&place, error))?;
        Ok((conn, made))
    })();
    sidecar.unlock()?;
    opened
}

/// Makes the name of the WAL durable. SQLite syncs the folder for the one that it made, and takes no notice where that fails: a power cut could then take it, with
/// everything that was acknowledged since.
pub(super) fn sync_name_of_wal(db: &Path) -> Result<(), StoreError> {
    let folder = db.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match folder::sync(folder) {
        // One that may be written but not read cannot be opened, and so not be synced.
        Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => Err(StoreError::io(folder.display(), error)),
        _ => Ok(()),
    }
}

/// Makes the database under another name and renames it when it is whole: who is killed here leaves no half-made database, which nobody could tell from a
/// damaged or a foreign one. What an earlier one left is removed; the sidecar's lock keeps others out.
fn make(db: &Path) -> Result<(), StoreError> {
    let new = beside(db, ".new");
    let place = new.display().to_string();
    for stale in [beside(&new, "-journal"), new.clone()] {
        match std::fs::remove_file(&stale) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(StoreError::io(stale.display(), error)),
            _ => {}
        }
    }
    // SQLite lets a group write nothing, whatever the umask says; what it makes beside the file gets the file's mode. Nobody has this one open yet.
    let folder = db.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_new(&new, folder).map_err(|error| StoreError::io(new.display(), error))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(&new, flags).map_err(|error| sql_error(&place, error))?;
    conn.pragma_update(None, "page_size", PAGE_SIZE).map_err(|error| sql_error(&place, error))?;
    configure(&conn, true).map_err(|error| sql_error(&place, error))?;
    schema::migrate(&mut conn, &place)?;
    conn.close().map_err(|(_, error)| sql_error(&place, error))?;
    // An empty file may have been made for it, for those who may read it.
    if let Ok(empty) = std::fs::metadata(db) {
        Access::of(&empty).give_closed(&new).map_err(|error| StoreError::io(new.display(), error))?;
    }
    std::fs::rename(&new, db).map_err(|error| StoreError::io(db.display(), error))?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| StoreError::io(folder.display(), error))
}

/// Opens for reading a database that is there. Nothing is made or changed. Says also whether the connection sees later commits: one that took
/// the file as it lay does not, and is good for one question.
pub(super) fn open_reader(db: &Path) -> Result<(Connection, bool), StoreError> {
    let place = db.display().to_string();
    let fail = |error| sql_error(&place, error);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let probe = |conn: &Connection| {
        configure(conn, false)?;
        conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))?;
        schema::read_as_newest(conn)?;
        conn.pragma_update(None, "query_only", true)
    };
    let opened = Connection::open_with_flags(db, flags).and_then(|conn| probe(&conn).map(|()| conn));
    match opened {
        Ok(conn) => Ok((conn, true)),
        // Beside a database in a folder that may not be written, or on a full disk, SQLite cannot make its shared index. Nobody else has one either, who
        // would write, so that the file can be read as it lies, if nothing waits in a WAL.
        Err(error) if is_unwritable(&error) && length(&beside(db, "-wal"))?.unwrap_or(0) == 0 => {
            let conn = open_immutable(db).map_err(fail)?;
            probe(&conn).map_err(fail)?;
            Ok((conn, false))
        }
        Err(error) => Err(fail(error)),
    }
}

/// What lies at the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// No file, or an empty one.
    Nothing,
    /// A database of ours, as far as the main file tells.
    Ours,
}

/// Looks what lies at the path, without a lock, a recovery or a file made beside it.
pub(super) fn check(db: &Path) -> Result<Found, StoreError> {
    refuse_no_files(db)?;
    if length(db)?.unwrap_or(0) == 0 {
        refuse_orphans(db)?;
        if length(db)?.unwrap_or(0) == 0 {
            return Ok(Found::Nothing);
        }
    }
    let place = db.display().to_string();
    let looked = open_immutable(db).and_then(|conn| {
        let application = schema::application_id(&conn)?;
        let version = schema::schema_version(&conn)?;
        let mut statement = conn.prepare("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') ORDER BY name")?;
        let tables = statement.query_map([], |row| row.get::<_, String>(0))?.collect::<rusqlite::Result<Vec<_>>>()?;
        let view = if application == APPLICATION_ID { covering(&conn)? } else { None };
        Ok((application, version, tables, unmarked(&conn, application, version), view))
    });
    let pending = |suffix| Ok::<_, StoreError>(length(&beside(db, suffix))?.unwrap_or(0) > 0);
    match looked {
        Ok((_, _, _, Some(version), _)) => Err(refuse_unmarked(db, version)),
        Ok((APPLICATION_ID, 0, tables, None, _)) if !tables.is_empty() => Err(unversioned(db)),
        Ok((_, _, _, None, Some(view))) => Err(refuse_covering(&place, &view)),
        Ok((APPLICATION_ID, version, _, None, None)) => schema::refuse_newer(version, &place).map(|()| Found::Ours),
        Ok((0, 0, tables, None, None)) if tables.is_empty() && !pending("-wal")? => Ok(Found::Nothing),
        Ok((application, _, tables, None, None)) => Err(foreign(db, application, &tables)),
        // In the middle of another process's checkpoint, or after a crash in one, the main file alone is not whole. With what waits beside it it
        // may be: that is looked at under locks.
        Err(error) if is_damage(&error) && (pending("-wal")? || pending("-journal")?) => Ok(Found::Ours),
        Err(error) => Err(refuse_unreadable(db).err().unwrap_or_else(|| sql_error(&place, error))),
    }
}

/// Names a file that may not be read: SQLite only says that it cannot open it.
#[cfg(unix)]
fn refuse_unreadable(db: &Path) -> Result<(), StoreError> {
    rustix::fs::access(db, rustix::fs::Access::READ_OK).map_err(|error| StoreError::io(db.display(), error.into()))
}

#[cfg(not(unix))]
fn refuse_unreadable(_: &Path) -> Result<(), StoreError> {
    Ok(())
}

/// The version that made the tables of a database that has lost a mark of ours.
fn unmarked(conn: &Connection, application: i32, version: i32) -> Option<i32> {
    let is_lost = application == 0 || (application == APPLICATION_ID && version == 0);
    // What does not read (a view of somebody else's, say) is none of ours.
    if is_lost { schema::made_by(conn).unwrap_or(None) } else { None }
}

fn refuse_unmarked(db: &Path, version: i32) -> StoreError {
    let (place, marks) = (db.display(), schema::marks(version));
    StoreError::not_applied(
        StoreErrorKind::Foreign,
        format!(
            "{place}: its tables are ours, as schema version {version} has them, but it is not marked so, as a database that was read in from a dump is \
             not; nothing was changed. To mark it, run in it with SQLite's own tool: \"{marks}\""
        ),
    )
}

fn unversioned(db: &Path) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Foreign,
        format!(
            "{}: it has schema version 0, which no database with tables has, and they are not as a version of ours made them; nothing was changed. Bring a \
             backup of it back, before which this frees the path: {}",
            db.display(),
            away(db, "foreign")
        ),
    )
}

/// Refuses to begin anew beside what waits for a database that is not here: SQLite would replay it into the new one, which it does not belong to.
fn refuse_orphans(db: &Path) -> Result<(), StoreError> {
    for suffix in ["-wal", "-journal"] {
        let orphan = beside(db, suffix);
        let bytes = length(&orphan)?.unwrap_or(0);
        // Asked again: another process may have made the database between.
        if bytes > 0 && length(db)?.unwrap_or(0) == 0 {
            let (mend, db, orphan) = (away(db, "orphan"), db.display(), orphan.display());
            return Err(StoreError::not_applied(
                StoreErrorKind::Corrupt,
                format!(
                    "{db} is missing or empty, and {orphan} holds {bytes} bytes that were written for it; nothing was changed. Put back the \
                     {db} that belongs to {orphan} and {db}-shm. To begin anew, or before a backup is put in its place: {mend}"
                ),
            ));
        }
    }
    Ok(())
}

/// How to free the path: what waits beside a database goes with it.
fn away(db: &Path, why: &str) -> String {
    let there = ["", "-wal", "-shm", "-journal"].map(|suffix| beside(db, suffix)).into_iter().filter(|path| path.exists());
    there.map(|path| format!("mv {0} {0}.{why}", path.display())).collect::<Vec<_>>().join(" && ")
}

/// The same question under locks, with what waits in the WAL. A refusal leaves the files alone.
pub(super) fn recheck(conn: &Connection, place: &str) -> Result<(), StoreError> {
    let fail = |error| sql_error(place, error);
    let keep = |on| conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, on).map(|_| ()).map_err(fail);
    keep(true)?;
    let application = schema::application_id(conn).map_err(fail)?;
    let version = schema::schema_version(conn).map_err(fail)?;
    if application != APPLICATION_ID {
        return Err(foreign(Path::new(place), application, &[]));
    }
    if version == 0 {
        return Err(unmarked(conn, application, version)
            .map_or_else(|| unversioned(Path::new(place)), |version| refuse_unmarked(Path::new(place), version)));
    }
    schema::refuse_newer(version, place)?;
    if let Some(view) = covering(conn).map_err(fail)? {
        return Err(refuse_covering(place, &view));
    }
    keep(false)
}

/// A view that lies where a table of ours should.
fn covering(conn: &Connection) -> rusqlite::Result<Option<String>> {
    conn.prepare(schema::COVERING)?.query_map([], |row| row.get(0))?.next().transpose()
}

fn refuse_covering(place: &str, view: &str) -> StoreError {
    StoreError::not_applied(
        StoreErrorKind::Foreign,
        format!(
            "{place}: {view:.64?} is a view in the place of a table of ours; nothing was changed. Bring a backup of the database back"
        ),
    )
}

fn foreign(db: &Path, application: i32, tables: &[String]) -> StoreError {
    let place = db.display();
    let shown = tables.iter().take(5).map(|name| format!("{name:.64?}")).collect::<Vec<_>>().join(", ");
    let what = if ["run_state", "node_state", "backend_locks"].iter().any(|own| tables.iter().any(|name| name == own)) {
        format!("it is Seeknal's own database (tables {shown})")
    } else if tables.is_empty() {
        format!("it belongs to another program (application id {application:#x})")
    } else {
        format!("it belongs to another program (tables {shown})")
    };
    StoreError::not_applied(
        StoreErrorKind::Foreign,
        format!("{place}: {what}; nothing was changed. To free the path: {}", away(db, "foreign")),
    )
}

/// Opens the main file as it lies, by SQLite and without locks: no file beside it is read, made or removed.
pub(super) fn open_immutable(db: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    Connection::open_with_flags(uri(db), flags)
}

fn uri(db: &Path) -> String {
    use std::fmt::Write;
    let mut uri = String::from("file:");
    for byte in db.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            let _never_fails = write!(uri, "%{byte:02X}").is_ok();
        }
    }
    uri.push_str("?immutable=1");
    uri
}

/// Settings belong to a connection: every one gets them.
fn configure(conn: &Connection, writes: bool) -> rusqlite::Result<()> {
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS);
    // Plans do not depend on what is bound: else SQLite prepares some statements anew for every value.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    boot::register(conn)?;
    conn.pragma_update(None, "trusted_schema", false)?;
    conn.pragma_update(None, "cache_size", -(if writes { WRITER_CACHE } else { READER_CACHE }))?;
    if writes {
        conn.pragma_update(None, "synchronous", "FULL")?;
        // Only macOS knows the difference: there a plain sync stops in the drive's cache.
        conn.pragma_update(None, "fullfsync", true)?;
        conn.pragma_update(None, "checkpoint_fullfsync", true)?;
        conn.pragma_update_and_check(None, "wal_autocheckpoint", CHECKPOINT_PAGES, |_| Ok(()))?;
        // The WAL keeps its length: overwriting is faster to sync than growing. What is far beyond the usual is given back by hand.
        conn.pragma_update_and_check(None, "journal_size_limit", -1, |_| Ok(()))?;
    }
    Ok(())
}

/// Switches to the WAL, and reads back the settings on which durability rests.
fn demand_wal(conn: &Connection, place: &str) -> Result<(), StoreError> {
    let fail = |error| sql_error(place, error);
    let mode: String = conn.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0)).map_err(fail)?;
    let synchronous: i64 = conn.pragma_query_value(None, "synchronous", |row| row.get(0)).map_err(fail)?;
    let busy: i64 = conn.pragma_query_value(None, "busy_timeout", |row| row.get(0)).map_err(fail)?;
    let cache: i64 = conn.pragma_query_value(None, "cache_size", |row| row.get(0)).map_err(fail)?;
    let wanted = i64::try_from(BUSY_TIMEOUT.as_millis()).unwrap_or(i64::MAX);
    if mode.eq_ignore_ascii_case("wal") && synchronous == 2 && busy == wanted && cache == -WRITER_CACHE {
        return Ok(());
    }
    Err(StoreError::not_applied(
        StoreErrorKind::Unsupported,
        format!(
            "{place}: SQLite did not take the settings that durability needs (journal_mode {mode}, synchronous {synchronous}, busy_timeout \
             {busy}, cache_size {cache}); put the database on a local disk"
        ),
    ))
}

/// A connection that only brings the WAL into the database.
pub(super) fn open_checkpointer(db: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(db, flags)?;
    configure(&conn, true)?;
    Ok(conn)
}

/// Grows the WAL to the length that it reaches anyway: a commit that overwrites syncs about twice as fast as one that makes the file longer. The pages go
/// in with a transaction that is rolled back, so that the database itself learns nothing of it.
pub(super) fn grow_wal(conn: &Connection, db: &Path) -> rusqlite::Result<()> {
    let wanted = WAL_PAGES.saturating_mul(PAGE_SIZE);
    let there = std::fs::metadata(beside(db, "-wal")).map_or(0, |meta| meta.len());
    let missing = wanted.saturating_sub(i64::try_from(there).unwrap_or(i64::MAX));
    if missing < wanted / 4 || !has_room(db, missing) {
        return Ok(());
    }
    // A cache this small makes SQLite write the pages out before the transaction ends.
    conn.pragma_update(None, "cache_size", 16)?;
    let grown = conn.execute_batch("BEGIN IMMEDIATE").and_then(|()| {
        let filled = conn.execute("INSERT INTO batches (id, at, answers) VALUES (x'00', '', zeroblob(?1))", [missing]);
        let rolled_back = conn.execute_batch("ROLLBACK");
        filled.and(rolled_back)
    });
    conn.pragma_update(None, "cache_size", -WRITER_CACHE)?;
    grown
}

/// Whether the disk has far more space than this: the last of it belongs to commits.
#[cfg(unix)]
fn has_room(db: &Path, bytes: i64) -> bool {
    let free = rustix::fs::statvfs(db).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    free / 4 > u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(not(unix))]
fn has_room(_: &Path, _: i64) -> bool {
    true
}

/// Sweeps what dead openings left; nothing depends on it.
pub(super) fn sweep(conn: &Connection, db: &Path, own: &crate::model::ProcessInfo) {
    let _nothing_depends_on_it = owners::sweep(conn, db, own).is_err();
}
