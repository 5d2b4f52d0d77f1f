//! What transactions made of nodes lately, for the other processes: each finds what it has not seen in one place, without a search for every node.
//!
//! Written only while several processes write. Where many of them read it, the rows are noted too: each reader saves the search for them, which costs
//! the writer some pages. It is a copy: whoever does not find all of it there reads the rows themselves.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserializer, Serialize};

use super::cell::PendingNode;
use super::error::sql_error;
use super::owners;
use super::rows::{At, Fields, counter};
use crate::model::{NodeId, NodeState, RunId, Version};
use crate::store::StoreError;

pub(super) const TABLE: &str = "change_sets";

/// Nodes that are noted of one transaction, and taken in at once, at most; where there are more, the run is read as a whole.
pub(super) const MOST: usize = 2_048;

/// A longer text would fill the log that everybody reads: then only the names are noted.
const LONGEST: usize = 64 << 10;

/// Text that is taken in at once, at most: beyond it the run's own rows are read faster.
const MOST_TEXT: usize = 4 << 20;

/// Who met commits of others so long ago at most notes its changes for them: a lone process has no cost of it.
const COMPANY: Duration = Duration::from_secs(30);

/// From so many openings of the database on, rows are noted. Measured: with two, names alone are faster where transactions are small; with eight,
/// rows save a tenth of all work.
const MANY: usize = 4;

/// How often they are counted.
const COUNT: Duration = Duration::from_secs(1);

/// How many versions of a run the table reaches back, at least; it is cut when it has twice as many.
const KEPT: u64 = 4_096;

/// How often, in versions, the notes of a run are measured, and cut if they are longer than this, in bytes: to as many of the newest versions.
const MEASURED: u64 = 1_024;
const MOST_STORED: i64 = 16 << 20;
const KEPT_OF_MANY: u64 = 64;

/// What a transaction notes of what it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noting {
    Nothing,
    /// Which nodes.
    Names,
    /// Also what became of them.
    Rows,
}

/// The others who write, as the writer met them.
#[derive(Debug, Default)]
pub(super) struct Company {
    met: Option<Instant>,
    counted: Option<(Instant, usize)>,
}

impl Company {
    /// Somebody else committed.
    pub(super) fn met(&mut self) {
        self.met = Some(Instant::now());
    }

    /// What is worth noting for them.
    pub(super) fn noting(&mut self, db: &Path) -> Noting {
        if self.met.is_none_or(|at| at.elapsed() >= COMPANY) {
            return Noting::Nothing;
        }
        let openings = match self.counted {
            Some((at, openings)) if at.elapsed() < COUNT => openings,
            _ => self.counted.insert((Instant::now(), owners::count(db))).1,
        };
        if openings >= MANY { Noting::Rows } else { Noting::Names }
    }
}

/// Notes what a transaction made of a run between two versions. Nodes that it deleted are told by the run's row.
pub(super) fn note(
    conn: &Connection,
    run: &RunId,
    nodes: &BTreeMap<NodeId, PendingNode>,
    (before, version): (Version, Version),
    noting: Noting,
) -> rusqlite::Result<()> {
    let changed: BTreeMap<&NodeId, Option<&NodeState>> = nodes
        .iter()
        .filter_map(|(id, pending)| pending.state.as_deref().map(|state| (id, (noting == Noting::Rows).then_some(state))))
        .collect();
    let noted = changed.is_empty() || insert(conn, run, changed, version)?;
    let passed = |step: u64| before.0 / step != version.0 / step;
    // Now and then, not with every commit.
    let cut = if !noted {
        version.0
    } else if passed(KEPT) {
        version.0.saturating_sub(KEPT)
    } else if passed(MEASURED) && stored(conn, run)? > MOST_STORED {
        version.0.saturating_sub(KEPT_OF_MANY)
    } else {
        return Ok(());
    };
    let from = counter(cut);
    conn.prepare_cached("DELETE FROM change_sets WHERE run_id = ?1 AND version <= ?2")?.execute(params![run.as_str(), from])?;
    conn.prepare_cached("UPDATE runs SET change_sets_from = max(change_sets_from, ?2) WHERE run_id = ?1")?
        .execute(params![run.as_str(), from])?;
    Ok(())
}

/// How long the notes of a run are.
fn stored(conn: &Connection, run: &RunId) -> rusqlite::Result<i64> {
    conn.prepare_cached("SELECT coalesce(sum(octet_length(nodes)), 0) FROM change_sets WHERE run_id = ?1")?
        .query_row([run.as_str()], |row| row.get(0))
}

/// The JSON text of something, if it is not too long. What is too long is given up where it becomes so: others wait meanwhile.
fn short_text(value: &impl Serialize) -> rusqlite::Result<Option<String>> {
    let fail = |error| rusqlite::Error::ToSqlConversionFailure(error);
    let mut text = Short(Vec::new());
    match serde_json::to_writer(&mut text, value) {
        Ok(()) => String::from_utf8(text.0).map(Some).map_err(|error| fail(error.into())),
        Err(error) if error.is_io() => Ok(None),
        Err(error) => Err(fail(error.into())),
    }
}

/// Takes in no more than may be noted.
struct Short(Vec<u8>);

impl Write for Short {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > LONGEST.saturating_sub(self.0.len()) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Notes nodes; `false`: even their names are too long.
fn insert(
    conn: &Connection,
    run: &RunId,
    changed: BTreeMap<&NodeId, Option<&NodeState>>,
    version: Version,
) -> rusqlite::Result<bool> {
    let mut noted = short_text(&changed)?;
    if noted.is_none() && changed.values().any(Option::is_some) {
        let names: BTreeMap<&NodeId, Option<&NodeState>> = changed.into_keys().map(|id| (id, None)).collect();
        noted = short_text(&names)?;
    }
    let Some(noted) = noted else { return Ok(false) };
    conn.prepare_cached("INSERT OR REPLACE INTO change_sets (run_id, version, nodes) VALUES (?1, ?2, ?3)")?.execute(params![
        run.as_str(),
        counter(version.0),
        noted
    ])?;
    Ok(true)
}

/// The run has ended: seldom anybody changes it after this, and who comes late reads the rows.
pub(super) fn ended(conn: &Connection, run: &RunId) -> rusqlite::Result<()> {
    conn.prepare_cached("DELETE FROM change_sets WHERE run_id = ?1")?.execute([run.as_str()]).map(drop)
}

/// A note that is older than what was read already: of nodes that changed again since, it says nothing that anybody wants to know.
struct Older<'m> {
    newer: &'m mut BTreeMap<NodeId, Option<NodeState>>,
}

impl<'de> Visitor<'de> for Older<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of nodes")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut note: M) -> Result<(), M::Error> {
        while let Some(node) = note.next_key()? {
            match self.newer.entry(node) {
                Entry::Vacant(place) => {
                    place.insert(note.next_value()?);
                }
                Entry::Occupied(_) => {
                    note.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

/// What became of the nodes of a run since a version: those that changed, `None` where only the row tells how. No answer: not all of it was noted,
/// there is too much of it, or it makes no sense: then the rows do.
pub(super) fn since(
    conn: &Connection,
    run: &RunId,
    version: Version,
) -> Result<Option<BTreeMap<NodeId, Option<NodeState>>>, StoreError> {
    let place = At::table(TABLE).run(run);
    let fail = |error| sql_error(place, error);
    let complete = conn
        .prepare_cached("SELECT 1 FROM runs WHERE run_id = ?1 AND change_sets_from <= ?2")
        .and_then(|mut statement| statement.exists(params![run.as_str(), counter(version.0)]))
        .map_err(fail)?;
    if !complete {
        return Ok(None);
    }
    let sql = "SELECT nodes FROM change_sets WHERE run_id = ?1 AND version > ?2 ORDER BY version DESC";
    let mut statement = conn.prepare_cached(sql).map_err(fail)?;
    let mut rows = statement.query(params![run.as_str(), counter(version.0)]).map_err(fail)?;
    let mut changed: BTreeMap<NodeId, Option<NodeState>> = BTreeMap::new();
    let mut taken = 0;
    while let Some(row) = rows.next().map_err(fail)? {
        let Ok(text) = Fields::new(row, place).text(0) else { return Ok(None) };
        taken += text.len();
        let mut read = serde_json::Deserializer::from_str(text);
        if read.deserialize_map(Older { newer: &mut changed }).and_then(|()| read.end()).is_err() {
            return Ok(None);
        }
        if changed.len() > MOST || taken > MOST_TEXT {
            return Ok(None);
        }
    }
    // The transaction that made the version that is known may be among them, for what it changed then.
    changed.retain(|_, state| state.as_ref().is_none_or(|state| state.version > version));
    Ok(Some(changed))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_too_long_is_given_up_on_the_way() {
        struct Counted<'c>(&'c Cell<usize>);
        impl Serialize for Counted<'_> {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.set(self.0.get() + 1);
                serializer.serialize_str(&"x".repeat(1 << 10))
            }
        }
        let count = Cell::new(0);
        let list = |length| (0..length).map(|_| Counted(&count)).collect::<Vec<_>>();
        assert_eq!(short_text(&list(60)).unwrap().unwrap().len(), 60 * 1027 + 1);
        assert!(short_text(&list(10_000)).unwrap().is_none());
        assert_eq!(count.get(), 60 + 64, "not one more than it takes");
        assert!(short_text(&"x".repeat(LONGEST)).unwrap().is_none());
        assert!(short_text(&"x".repeat(LONGEST - 2)).unwrap().is_some());
    }
}
