//! Reading runs. Every answer is of one state: never torn, also where it takes several pages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::client::Client;
use super::fault::{Class, Fault, corrupt};
use super::hrana::{Arg, Stmt};
use super::rows::{Fields, Table, header_columns, lists, node_columns, stamp_text};
use super::send::{self, Ask};
use crate::model::{Interval, NodeId, NodeState, PartitionKey, RunFilter, RunHeader, RunId, RunState, Version};
use crate::store::{StoreError, StoreErrorKind};

/// Rows of one table in one answer. The server gives answers of about 10 MB.
pub(super) const PAGE: u64 = 20_000;

/// How often a run that changes between two pages is read anew.
pub(super) const TORN: u32 = 20;

/// Nodes that are read apart when a run is read again; beyond it the run is read as a whole.
const RELOADED: u64 = 2_000;

/// Asks, and puts faults into the words of storage.
pub(super) async fn ask(client: &Client, questions: &[Stmt]) -> Result<Vec<Table>, StoreError> {
    send::ask(client, Ask::Latest, questions).await.map_err(|fault| fault.into_error(client.place()))
}

/// Asks for a page of `limit` rows, and for a shorter one where those are beyond what the server answers with: then the limit is lower from then on.
pub(super) async fn page(client: &Client, limit: &mut u64, question: impl Fn(u64) -> Stmt) -> Result<Table, StoreError> {
    loop {
        match send::ask(client, Ask::Latest, &[question(*limit)]).await {
            Err(fault) if fault.class == Class::AnswerTooLarge && *limit > 1 => *limit = (*limit / 4).max(1),
            answer => {
                let mut tables = answer.map_err(|fault| fault.into_error(client.place()))?;
                return tables.pop().ok_or_else(|| unanswered(client));
            }
        }
    }
}

/// The last row of a page behind which there may be more.
pub(super) fn last_of_full(page: &Table, limit: u64) -> Option<Fields<'_>> {
    page.rows().last().filter(|_| u64::try_from(page.len()).is_ok_and(|rows| rows >= limit))
}

fn unanswered(client: &Client) -> StoreError {
    Fault::new(Class::Refused, "it left a question unanswered").into_error(client.place())
}

/// The answer to the question with this index.
pub(super) fn nth<'t>(client: &Client, tables: &'t [Table], index: usize) -> Result<&'t Table, StoreError> {
    tables.get(index).ok_or_else(|| unanswered(client))
}

pub(super) fn interval(fields: Fields<'_>, first: usize) -> Result<Interval, StoreError> {
    Interval::new(fields.stamp(first)?, fields.stamp(first + 1)?).map_err(|error| fields.bad(first, error))
}

pub(super) fn partition(fields: Fields<'_>, column: usize) -> Result<PartitionKey, StoreError> {
    PartitionKey::new(fields.text(column)?).map_err(|error| fields.bad(column, error))
}

/// How far the pages of one table have come.
#[derive(Debug, Default)]
struct Cursor {
    /// The keys of the last row.
    node: String,
    key: String,
    done: bool,
}

impl Cursor {
    /// Notes where a page ended. A page that is not full is the last one.
    fn advance(&mut self, table: &Table, limit: u64, key: Option<usize>) -> Result<(), StoreError> {
        self.done = u64::try_from(table.len()).is_ok_and(|rows| rows < limit);
        if let Some(last) = table.rows().last() {
            last.text(0)?.clone_into(&mut self.node);
            if let Some(key) = key {
                last.text(key)?.clone_into(&mut self.key);
            }
        }
        Ok(())
    }
}

/// A run while its pages come in.
#[derive(Debug, Default)]
struct Collected {
    head: Option<(Version, Version, RunHeader)>,
    nodes: BTreeMap<NodeId, NodeState>,
    intervals: BTreeMap<NodeId, Vec<Interval>>,
    partitions: BTreeMap<NodeId, BTreeSet<PartitionKey>>,
}

/// A whole run.
pub(super) async fn run(client: &Client, id: &RunId) -> Result<Option<RunState>, StoreError> {
    let mut limit = PAGE;
    for attempt in 0..TORN {
        match pages(client, id, &mut limit).await? {
            Pages::Missing => return Ok(None),
            Pages::Run(state) => return Ok(Some(*state)),
            // Somebody wrote between two pages.
            Pages::Torn => send::pause(client, attempt).await,
        }
    }
    Err(StoreError::not_applied(
        StoreErrorKind::Busy,
        format!(
            "{}: run {id:?} changes faster than it can be read; see who writes with `seeknal state locks`, and try again",
            client.place()
        ),
    ))
}

enum Pages {
    Missing,
    Run(Box<RunState>),
    Torn,
}

async fn pages(client: &Client, id: &RunId, limit: &mut u64) -> Result<Pages, StoreError> {
    let mut found = Collected::default();
    let mut cursors: [Cursor; 3] = Default::default();
    loop {
        let [nodes, intervals, partitions] = &cursors;
        let run = || Arg::from(id.as_str());
        let page = |cursor: &Cursor, keys: usize| {
            let keys = [cursor.node.as_str(), cursor.key.as_str()].into_iter().take(keys).map(Arg::from);
            std::iter::once(run()).chain(keys).chain([Arg::from(if cursor.done { 0 } else { *limit })]).collect()
        };
        let questions = [
            Stmt::ask(
                "runs",
                concat!("SELECT r.version, r.created_version, ", header_columns!(), " FROM runs AS r WHERE r.run_id = ?1"),
                vec![run()],
            ),
            Stmt::ask(
                "node_states",
                concat!(
                    "SELECT n.node_id, ",
                    node_columns!(),
                    " FROM node_states AS n WHERE n.run_id = ?1 AND n.node_id > ?2 ORDER BY n.node_id LIMIT ?3"
                ),
                page(nodes, 1),
            ),
            Stmt::ask(
                "completed_intervals",
                "SELECT node_id, start_at, end_at FROM completed_intervals WHERE run_id = ?1 AND (node_id, start_at) > (?2, ?3) \
                 ORDER BY node_id, start_at LIMIT ?4",
                page(intervals, 2),
            ),
            Stmt::ask(
                "partitions",
                "SELECT node_id, partition FROM partitions WHERE run_id = ?1 AND (node_id, partition) > (?2, ?3) \
                 ORDER BY node_id, partition LIMIT ?4",
                page(partitions, 2),
            ),
        ];
        let tables = match send::ask(client, Ask::Latest, &questions).await {
            Err(fault) if fault.class == Class::AnswerTooLarge && *limit > 1 => {
                *limit = (*limit / 4).max(1);
                continue;
            }
            answer => answer.map_err(|fault| fault.into_error(client.place()))?,
        };
        let Some(row) = nth(client, &tables, 0)?.first().map(|row| row.of(id, None)) else {
            return Ok(if found.head.is_some() { Pages::Torn } else { Pages::Missing });
        };
        let (version, created) = (row.version(0)?, row.version(1)?);
        match &found.head {
            None => found.head = Some((version, created, row.from(2).header()?)),
            Some((had, created_had, _)) if (*had, *created_had) != (version, created) => return Ok(Pages::Torn),
            Some(_) => {}
        }
        found.take(client, id, &tables)?;
        for (cursor, (index, key)) in cursors.iter_mut().zip([(1, None), (2, Some(1)), (3, Some(1))]) {
            if !cursor.done {
                cursor.advance(nth(client, &tables, index)?, *limit, key)?;
            }
        }
        if cursors.iter().all(|cursor| cursor.done) {
            return found.into_run(client, id).map(|run| Pages::Run(Box::new(run)));
        }
    }
}

impl Collected {
    /// Takes the rows of one page: nodes, intervals and partitions are the answers 1 to 3.
    fn take(&mut self, client: &Client, id: &RunId, tables: &[Table]) -> Result<(), StoreError> {
        for row in nth(client, tables, 1)?.rows() {
            let node = row.of(id, None).node_id(0)?;
            let state = row.of(id, Some(&node)).from(1).node()?;
            self.nodes.insert(node, state);
        }
        for row in nth(client, tables, 2)?.rows() {
            let node = row.of(id, None).node_id(0)?;
            let found = interval(row.of(id, Some(&node)), 1)?;
            self.intervals.entry(node).or_default().push(found);
        }
        for row in nth(client, tables, 3)?.rows() {
            let node = row.of(id, None).node_id(0)?;
            let found = partition(row.of(id, Some(&node)), 1)?;
            self.partitions.entry(node).or_default().insert(found);
        }
        Ok(())
    }

    /// Puts intervals and partitions to their nodes.
    fn fill(&mut self, id: &RunId) -> Result<(), StoreError> {
        let lost = |table: &str, node: &NodeId| {
            corrupt(format_args!("table {table}, run {id:?}, node {node:?}"), "there is no such node")
        };
        for (node, found) in std::mem::take(&mut self.intervals) {
            let state = self.nodes.get_mut(&node).ok_or_else(|| lost("completed_intervals", &node))?;
            state.intervals = Arc::new(found.into_iter().collect());
        }
        for (node, found) in std::mem::take(&mut self.partitions) {
            let state = self.nodes.get_mut(&node).ok_or_else(|| lost("partitions", &node))?;
            state.partitions = Arc::new(found);
        }
        Ok(())
    }

    fn into_run(mut self, client: &Client, id: &RunId) -> Result<RunState, StoreError> {
        self.fill(id)?;
        let (version, created, header) =
            self.head.ok_or_else(|| corrupt(client.place(), format_args!("run {id:?} has no row")))?;
        Ok(RunState::from_parts(id.clone(), header, version, created, self.nodes))
    }
}

/// How many questions ask what is newer of a run.
const QUESTIONS: usize = 4;

/// A run as it is now, with the help of how it was: only what is newer is read.
pub(super) async fn reload(client: &Client, have: &RunState) -> Result<Option<RunState>, StoreError> {
    let tables = match send::ask(client, Ask::Latest, &ask_newer(have)).await {
        Err(fault) if fault.class == Class::AnswerTooLarge => return run(client, have.id()).await,
        answer => answer.map_err(|fault| fault.into_error(client.place()))?,
    };
    match newer(client, have, &tables)? {
        Newer::Run(state) => Ok(state.map(|state| *state)),
        Newer::NotEnough => run(client, have.id()).await,
    }
}

/// Several runs at one moment, with the help of how they were; `None` if that takes whole runs, which come in pages.
pub(super) async fn reload_all(client: &Client, have: &[&RunState]) -> Result<Option<Vec<Option<RunState>>>, StoreError> {
    let questions: Vec<Stmt> = have.iter().flat_map(|have| ask_newer(have)).collect();
    let tables = match send::ask(client, Ask::Latest, &questions).await {
        Err(fault) if fault.class == Class::AnswerTooLarge => return Ok(None),
        answer => answer.map_err(|fault| fault.into_error(client.place()))?,
    };
    let mut states = Vec::with_capacity(have.len());
    for (have, tables) in have.iter().zip(tables.chunks(QUESTIONS)) {
        match newer(client, have, tables)? {
            Newer::Run(state) => states.push(state.map(|state| *state)),
            Newer::NotEnough => return Ok(None),
        }
    }
    Ok(Some(states))
}

enum Newer {
    Run(Option<Box<RunState>>),
    /// It takes the whole run.
    NotEnough,
}

fn ask_newer(have: &RunState) -> [Stmt; QUESTIONS] {
    let id = have.id();
    let args = || vec![Arg::from(id.as_str()), have.version().0.into(), RELOADED.into()];
    let newer = "(SELECT node_id FROM node_states WHERE run_id = ?1 AND version > ?2 ORDER BY node_id LIMIT ?3)";
    [
        Stmt::ask(
            "runs",
            concat!(
                "SELECT r.version, r.created_version, r.nodes_deleted_version, ",
                header_columns!(),
                " FROM runs AS r WHERE r.run_id = ?1"
            ),
            vec![id.as_str().into()],
        ),
        Stmt::ask(
            "node_states",
            concat!(
                "SELECT n.node_id, ",
                node_columns!(),
                " FROM node_states AS n WHERE n.run_id = ?1 AND n.version > ?2 ORDER BY n.node_id LIMIT ?3"
            ),
            args(),
        ),
        Stmt::ask(
            "completed_intervals",
            format!(
                "SELECT node_id, start_at, end_at FROM completed_intervals WHERE run_id = ?1 AND node_id IN {newer} LIMIT {PAGE}"
            ),
            args(),
        ),
        Stmt::ask(
            "partitions",
            format!("SELECT node_id, partition FROM partitions WHERE run_id = ?1 AND node_id IN {newer} LIMIT {PAGE}"),
            args(),
        ),
    ]
}

fn newer(client: &Client, have: &RunState, tables: &[Table]) -> Result<Newer, StoreError> {
    let (id, since) = (have.id(), have.version());
    let Some(row) = nth(client, tables, 0)?.first().map(|row| row.of(id, None)) else { return Ok(Newer::Run(None)) };
    let (version, created, nodes_deleted) = (row.version(0)?, row.version(1)?, row.version(2)?);
    let full = |index: usize, most: u64| {
        nth(client, tables, index).map(|table| u64::try_from(table.len()).is_ok_and(|rows| rows >= most))
    };
    // Of rows that are gone nothing can be read: what was deleted is missing in the whole.
    if created != have.created_version()
        || version < since
        || nodes_deleted > since
        || full(1, RELOADED)?
        || full(2, PAGE)?
        || full(3, PAGE)?
    {
        return Ok(Newer::NotEnough);
    }
    let header = row.from(3).header()?;
    let mut found = Collected::default();
    found.take(client, id, tables)?;
    found.fill(id)?;
    let state = have.with_rows(version, (header.version > since).then_some(header), found.nodes);
    Ok(Newer::Run(Some(Box::new(state))))
}

/// The versions of runs, in the order asked.
pub(super) async fn versions(client: &Client, runs: &[RunId]) -> Result<Vec<Option<Version>>, StoreError> {
    let mut found = BTreeMap::new();
    // By number for the answer, and by bytes for the question.
    for list in runs.chunks(5_000).flat_map(lists) {
        let question =
            Stmt::ask("runs", "SELECT run_id, version FROM runs WHERE run_id IN (SELECT value FROM json_each(?1))", vec![list]);
        for row in nth(client, &ask(client, &[question]).await?, 0)?.rows() {
            found.insert(row.run_id(0)?, row.version(1)?);
        }
    }
    Ok(runs.iter().map(|run| found.get(run).copied()).collect())
}

/// The versions of the newest runs.
pub(super) async fn newest_versions(client: &Client, most: usize) -> Result<Vec<(RunId, Version)>, StoreError> {
    let sql = "SELECT run_id, version FROM runs ORDER BY created_at DESC, run_id DESC LIMIT ?1";
    let question = Stmt::ask("runs", sql, vec![u64::try_from(most).unwrap_or(u64::MAX).into()]);
    let tables = ask(client, &[question]).await?;
    // A row that makes no sense is told to whoever asks for that run.
    Ok(nth(client, &tables, 0)?.rows().filter_map(|row| Some((row.run_id(0).ok()?, row.version(1).ok()?))).collect())
}

/// When the newest run was created.
pub(super) async fn newest_creation(client: &Client, before: Option<DateTime<Utc>>) -> Result<Option<DateTime<Utc>>, StoreError> {
    let filter = before.map_or_else(RunFilter::all, |before| RunFilter::all().created_before(before));
    let Some([_, before]) = filter.created() else { return Ok(None) };
    let (bound, args) = match before {
        Some(before) => ("WHERE created_at < ?1 ", vec![stamp_text(before).into()]),
        None => ("", Vec::new()),
    };
    let sql = format!("SELECT created_at FROM runs {bound}ORDER BY created_at DESC, run_id DESC LIMIT 1");
    let tables = ask(client, &[Stmt::ask("runs", sql, args)]).await?;
    nth(client, &tables, 0)?.first().map(|row| row.stamp(0)).transpose()
}

/// The commit sequence of the last entry.
pub(super) async fn seq(client: &Client) -> Result<u64, StoreError> {
    counter(client, "SELECT seq FROM meta WHERE id = 1").await
}

/// The fencing token that was given out last.
pub(super) async fn token(client: &Client) -> Result<u64, StoreError> {
    counter(client, "SELECT token FROM meta WHERE id = 1").await
}

async fn counter(client: &Client, sql: &'static str) -> Result<u64, StoreError> {
    let tables = ask(client, &[Stmt::ask("meta", sql, Vec::new())]).await?;
    nth(client, &tables, 0)?.first().ok_or_else(|| corrupt(client.place(), "table meta has no row"))?.number(0)
}
