//! The rows that a batch is decided on: taken for granted where this process knows them, else read from the primary.
//!
//! What is taken for granted costs no request, because the commit itself checks it; see `write`. A refusal is never built on it: then the rows are read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::answer::Before;
use super::cache::Cache;
use super::client::Client;
use super::fault::{Class, corrupt};
use super::hrana::{Arg, Stmt};
use super::lease::{self, now_ms, others_move, record_columns};
use super::read;
use super::rows::{Fields, Table, header_columns, lists, node_columns};
use super::schema;
use super::send::{self, Ask};
use crate::model::{
    Batch, FencingToken, Guard, LeaseKey, LeaseMutation, LeaseOwner, LeaseRecord, Mutation, NodeId, NodeState, RunHeader, RunId,
    RunPart, RunState, Version,
};
use crate::store::columns::node_column;
use crate::store::decide::{Head, LeaseRow, NodesWanted, Numbers, OfRun, OwnRuns, Rows, Wanted};
use crate::store::{MIGRATION, StoreError};

/// The rows, and the numbers of the store that they go with.
pub(super) struct Facts {
    pub(super) rows: Rows,
    pub(super) before: Before,
    /// Whether they were read for this very batch.
    pub(super) read: bool,
    /// Whether the row of the batch's id was there when they were read: it was applied.
    pub(super) known: bool,
}

fn head_of(state: &RunState, nodes_deleted: Version) -> Head {
    let header = state.header();
    Head {
        version: state.version(),
        created_version: state.created_version(),
        header_version: header.version,
        nodes_deleted,
        created_at: header.created_at,
        status: header.status.clone(),
    }
}

fn rows(own: &OwnRuns, heads: BTreeMap<RunId, Option<Head>>, leases: Vec<LeaseRow>, seq: u64, token: u64) -> Facts {
    let own = own.of(heads.keys()).into_iter().collect();
    let versions =
        heads.iter().filter_map(|(run, head)| Some((run.clone(), head.as_ref()?.version.0))).collect::<BTreeMap<_, _>>();
    let rows = Rows {
        heads,
        headers: BTreeMap::new(),
        nodes: BTreeMap::new(),
        whole: BTreeSet::new(),
        leases,
        own,
        seqs: Numbers::After(seq),
        tokens: Numbers::After(token),
        moving: None,
    };
    Facts { rows, before: Before { seq, token, versions }, read: false, known: false }
}

/// The commit sequence that a batch is decided on: where it makes a run, no version that is known is beyond it. A run that goes in the same batch may have been read
/// after the counters, and the new one of its name begins at the next number.
fn seq_for(batch: &Batch, heads: &BTreeMap<RunId, Option<Head>>, seq: u64) -> u64 {
    let parts = || batch.entries.iter().flat_map(|entry| &entry.parts);
    if !parts().any(|part| part.mutations.iter().any(Mutation::creates_run)) {
        return seq;
    }
    heads.values().flatten().map(|head| head.version.0).fold(seq, u64::max)
}

/// Puts what is wanted of a run that is wholly known among the rows.
fn fill(rows: &mut Rows, state: &RunState, wanted: &OfRun) {
    let run = state.id();
    rows.headers.insert(run.clone(), state.header().clone());
    let nodes = rows.nodes.entry(run.clone()).or_default();
    if wanted.all {
        nodes.extend(state.nodes().map(|(id, _)| (id.clone(), state.node_shared(id.as_str()))));
        rows.whole.insert(run.clone());
    }
    for id in &wanted.nodes {
        nodes.insert(id.clone(), state.node_shared(id.as_str()));
    }
}

/// What this process takes for granted about a batch; `None` if it knows too little.
pub(super) fn assume(batch: &Batch, cache: &Cache, own: &OwnRuns, numbers: (u64, u64), nobody: &LeaseOwner) -> Option<Facts> {
    let mut heads: BTreeMap<RunId, Option<Head>> = BTreeMap::new();
    let mut known: BTreeMap<RunId, RunState> = BTreeMap::new();
    for part in batch.entries.iter().flat_map(|entry| &entry.parts) {
        if heads.contains_key(&part.run) {
            continue;
        }
        if part.mutations.first().is_some_and(Mutation::creates_run) {
            heads.insert(part.run.clone(), None);
            continue;
        }
        // Everything that the run became since the part's base was written here: the part has seen it.
        if part.base != part.expect && !own.of([&part.run]).first().is_some_and(|(_, own)| own.covers(part.base, part.expect)) {
            return None;
        }
        // When a node was deleted last is not known: the commit checks that it was not since.
        let head = if let Some(state) = cache.get(&part.run).filter(|state| state.version() == part.expect) {
            let head = head_of(&state, Version::NONE);
            known.insert(part.run.clone(), state);
            head
        } else {
            // It brings its result with it, and so nearly all that must be known.
            let after = part.after.as_ref().filter(|after| after.version() == part.expect.next())?;
            Head { version: part.expect, ..head_of(after, Version::NONE) }
        };
        let head = Some(head);
        heads.insert(part.run.clone(), head);
    }
    let leases = assumed_leases(batch, nobody)?;
    let seq = seq_for(batch, &heads, numbers.0);
    let mut facts = rows(own, heads, leases, seq, numbers.1);
    let wanted = NodesWanted::of(batch, &facts.rows.heads, &facts.rows.own);
    for (run, of_run) in &wanted.0 {
        fill(&mut facts.rows, known.get(run)?, of_run);
    }
    let looks_at_status =
        |part: &RunPart| part.guards.iter().any(|guard| matches!(guard, Guard::RunStatus(_))) && !known.contains_key(&part.run);
    if batch.entries.iter().flat_map(|entry| &entry.parts).any(looks_at_status) {
        return None;
    }
    Some(facts)
}

/// The leases that a batch says it holds, as if it did. One that is asked for is taken to be free.
fn assumed_leases(batch: &Batch, nobody: &LeaseOwner) -> Option<Vec<LeaseRow>> {
    let mut held: BTreeMap<&LeaseKey, FencingToken> = BTreeMap::new();
    for entry in &batch.entries {
        let fences = entry.fences.iter().map(|fence| Some((&fence.key, fence.token)));
        let leases = entry.leases.iter().map(|lease| match lease {
            LeaseMutation::Renew { key, token, .. } | LeaseMutation::Release { key, token } => Some((key, *token)),
            LeaseMutation::Grant { .. } | LeaseMutation::Force { .. } => None,
        });
        if entry.leases.iter().any(|lease| matches!(lease, LeaseMutation::Force { .. })) {
            return None;
        }
        for (key, token) in fences.chain(leases).flatten() {
            if held.insert(key, token).is_some_and(|other| other != token) {
                return None;
            }
        }
    }
    let now = crate::model::time::from_micros(0).unwrap_or_default();
    let row = |(key, token): (&LeaseKey, FencingToken)| LeaseRow {
        record: LeaseRecord::new(key.clone(), token, nobody.clone(), None, now, 1),
        valid: true,
    };
    Some(held.into_iter().map(row).collect())
}

/// Reads everything that a batch may need, in one request where it fits.
pub(super) async fn read(client: &Client, batch: &Batch, own: &OwnRuns, process: &str) -> Result<Facts, StoreError> {
    let wanted = Wanted::of(batch);
    let mut nodes: BTreeMap<RunId, OfRun> = BTreeMap::new();
    for part in batch.entries.iter().flat_map(|entry| &entry.parts) {
        let of_run = nodes.entry(part.run.clone()).or_default();
        of_run.all |= part.mutations.iter().any(|mutation| matches!(mutation, Mutation::Delete { keep_coverage: true }));
        of_run.nodes.extend(part.mutations.iter().filter_map(Mutation::node).cloned());
        of_run.nodes.extend(part.guards.iter().filter_map(Guard::node).cloned());
    }
    let whole: BTreeSet<RunId> = nodes.iter().filter(|(_, of_run)| of_run.all).map(|(run, _)| run.clone()).collect();
    let id = batch.id.to_string();
    let of = (batch, &*id, process);
    if let Some(facts) = read_rows(client, of, &wanted, &nodes, &whole, own).await? {
        return Ok(facts);
    }
    // Beyond what fits into one answer: whole runs, page by page.
    let every = nodes.keys().cloned().collect();
    read_rows(client, of, &wanted, &nodes, &every, own).await?.ok_or_else(|| {
        let fault = super::fault::Fault::new(Class::AnswerTooLarge, "the leases of a batch do not fit into an answer");
        fault.into_error(client.place())
    })
}

/// `of`: the batch, its id, and the opening that commits it. `None`: the answer is too large. Runs of `whole` are read by themselves, each as of one version.
async fn read_rows(
    client: &Client,
    (batch, id, process): (&Batch, &str, &str),
    wanted: &Wanted,
    nodes: &BTreeMap<RunId, OfRun>,
    whole: &BTreeSet<RunId>,
    own: &OwnRuns,
) -> Result<Option<Facts>, StoreError> {
    let single: Vec<&RunId> = wanted.runs.iter().filter(|run| !whole.contains(*run)).collect();
    let pairs: Vec<(&RunId, &NodeId)> = nodes
        .iter()
        .filter(|(run, _)| !whole.contains(*run))
        .flat_map(|(run, of_run)| of_run.nodes.iter().map(move |node| (run, node)))
        .collect();
    let keys: Vec<(&RunId, &str)> = wanted.leases.keys.iter().map(|key| (&key.run, node_column(key))).collect();
    let mut questions = Questions::default();
    questions.ask(
        Of::Meta,
        [Stmt::ask(
            "meta",
            "SELECT (SELECT version FROM seeknal_schema WHERE id = 1), seq, token, \
             EXISTS (SELECT 1 FROM batches WHERE id = ?1) FROM meta WHERE id = 1",
            vec![id.into()],
        )],
    );
    let of_runs = |list| {
        Stmt::ask(
            "runs",
            concat!(
                "SELECT r.run_id, r.version, r.created_version, r.nodes_deleted_version, ",
                header_columns!(),
                " FROM runs AS r WHERE r.run_id IN (SELECT value FROM json_each(?1))"
            ),
            vec![list],
        )
    };
    questions.ask(Of::Runs, lists(&single).into_iter().map(of_runs));
    let pairs_json = lists(&pairs);
    let of_nodes = |list: &Arg| {
        Stmt::ask(
            "node_states",
            concat!(
                "SELECT n.run_id, n.node_id, ",
                node_columns!(),
                " FROM json_each(?1) AS w CROSS JOIN node_states AS n ON n.run_id = w.value->>0 AND n.node_id = w.value->>1"
            ),
            vec![list.clone()],
        )
    };
    questions.ask(Of::Nodes, pairs_json.iter().map(of_nodes));
    for (group, columns, table) in
        [(Of::Intervals, "t.start_at, t.end_at", "completed_intervals"), (Of::Partitions, "t.partition", "partitions")]
    {
        let of_table = |list: &Arg| {
            Stmt::ask(
                table,
                format!(
                    "SELECT t.run_id, t.node_id, {columns} FROM json_each(?1) AS w CROSS JOIN {table} AS t \
                     ON t.run_id = w.value->>0 AND t.node_id = w.value->>1"
                ),
                vec![list.clone()],
            )
        };
        questions.ask(group, pairs_json.iter().map(of_table));
    }
    let (keys, runs, tokens) = (lists(&keys), lists(&wanted.leases.runs), lists(&wanted.leases.tokens));
    let of_locks = |piece: usize| {
        let piece = |lists: &[Arg]| lists.get(piece).cloned().unwrap_or_else(|| Arg::from("[]"));
        Stmt::ask(
            "locks",
            concat!(
                "WITH wanted (run_id, node_id) AS ( \
                 SELECT l.run_id, l.node_id FROM json_each(?1) AS w CROSS JOIN locks AS l ON l.run_id = w.value->>0 AND l.node_id = w.value->>1 \
                 UNION SELECT l.run_id, l.node_id FROM json_each(?2) AS w CROSS JOIN locks AS l ON l.run_id = w.value \
                 UNION SELECT l.run_id, l.node_id FROM json_each(?3) AS w CROSS JOIN locks AS l ON l.token = w.value) SELECT ",
                record_columns!(),
                ", l.expires_ms > ",
                now_ms!(),
                " FROM wanted CROSS JOIN locks AS l USING (run_id, node_id)"
            ),
            vec![piece(&keys), piece(&runs), piece(&tokens)],
        )
    };
    questions.ask(Of::Locks, (0..keys.len().max(runs.len()).max(tokens.len())).map(of_locks));
    questions.ask(
        Of::Moving,
        [Stmt::ask(
            "locks",
            concat!("SELECT ", record_columns!(), " FROM locks AS l WHERE ", others_move!("?1", "?2")),
            vec![MIGRATION.into(), process.into()],
        )],
    );
    let answers = match send::ask(client, Ask::Primary, &questions.asked).await {
        Err(fault) if fault.class == Class::AnswerTooLarge => return Ok(None),
        answer => Answers { of: questions.of, tables: answer.map_err(|fault| fault.into_error(client.place()))? },
    };
    let counters = answers.rows(Of::Meta).next().ok_or_else(|| corrupt(client.place(), "table meta has no row"))?;
    let version = counters.number(0)?;
    if version != schema::VERSION {
        return Err(schema::refuse_other(client.place(), version));
    }
    let mut heads: BTreeMap<RunId, Option<Head>> = wanted.runs.iter().map(|run| (run.clone(), None)).collect();
    let mut headers: BTreeMap<RunId, RunHeader> = BTreeMap::new();
    for row in answers.rows(Of::Runs) {
        let run = row.run_id(0)?;
        let fields = row.of(&run, None);
        let header = fields.from(4).header()?;
        let head = Head {
            version: fields.version(1)?,
            created_version: fields.version(2)?,
            header_version: header.version,
            nodes_deleted: fields.version(3)?,
            created_at: header.created_at,
            status: header.status.clone(),
        };
        heads.insert(run.clone(), Some(head));
        headers.insert(run, header);
    }
    let mut leases: BTreeMap<u64, LeaseRow> = BTreeMap::new();
    for row in answers.rows(Of::Locks) {
        // One that two lists name comes twice.
        let record = lease::record(row)?;
        leases.insert(record.token.0, LeaseRow { record, valid: row.number(12)? == 1 });
    }
    let leases = leases.into_values().collect();
    let mut found: BTreeMap<RunId, BTreeMap<NodeId, Option<Arc<NodeState>>>> = BTreeMap::new();
    for (run, node) in pairs {
        found.entry(run.clone()).or_default().insert(node.clone(), None);
    }
    collect_nodes(&answers, &mut found)?;
    let mut states = Vec::new();
    for run in whole {
        let Some(state) = read::run(client, run).await? else { continue };
        // What was deleted before is in the state: it is not there.
        heads.insert(run.clone(), Some(head_of(&state, state.version())));
        states.push(state);
    }
    let (seq, token) = (seq_for(batch, &heads, counters.number(1)?), counters.number(2)?);
    let mut facts = rows(own, heads, leases, seq, token);
    facts.read = true;
    facts.known = counters.number(3)? == 1;
    facts.rows.headers = headers;
    facts.rows.moving = answers.rows(Of::Moving).next().map(lease::record).transpose()?;
    facts.rows.nodes = found;
    for state in &states {
        if let Some(of_run) = nodes.get(state.id()) {
            fill(&mut facts.rows, state, of_run);
        }
    }
    Ok(Some(facts))
}

/// What a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Meta,
    Runs,
    Nodes,
    Intervals,
    Partitions,
    Locks,
    Moving,
}

/// Questions that are asked in one request, and what each is about.
#[derive(Default)]
struct Questions {
    of: Vec<Of>,
    asked: Vec<Stmt>,
}

impl Questions {
    fn ask(&mut self, of: Of, questions: impl IntoIterator<Item = Stmt>) {
        self.asked.extend(questions);
        self.of.resize(self.asked.len(), of);
    }
}

/// Their answers.
struct Answers {
    of: Vec<Of>,
    tables: Vec<Table>,
}

impl Answers {
    fn rows(&self, of: Of) -> impl Iterator<Item = Fields<'_>> {
        self.of.iter().zip(&self.tables).filter(move |(is, _)| **is == of).flat_map(|(_, table)| table.rows())
    }
}

fn collect_nodes(
    answers: &Answers,
    found: &mut BTreeMap<RunId, BTreeMap<NodeId, Option<Arc<NodeState>>>>,
) -> Result<(), StoreError> {
    let mut states: BTreeMap<(RunId, NodeId), NodeState> = BTreeMap::new();
    for row in answers.rows(Of::Nodes) {
        let (run, node) = (row.run_id(0)?, row.node_id(1)?);
        let state = row.of(&run, Some(&node)).from(2).node()?;
        states.insert((run, node), state);
    }
    for row in answers.rows(Of::Intervals) {
        let key = (row.run_id(0)?, row.node_id(1)?);
        let found = read::interval(row.of(&key.0, Some(&key.1)), 2)?;
        let state = states.get_mut(&key).ok_or_else(|| row.bad(1, "there is no such node"))?;
        Arc::make_mut(&mut state.intervals).insert(found);
    }
    for row in answers.rows(Of::Partitions) {
        let key = (row.run_id(0)?, row.node_id(1)?);
        let found = read::partition(row.of(&key.0, Some(&key.1)), 2)?;
        let state = states.get_mut(&key).ok_or_else(|| row.bad(1, "there is no such node"))?;
        Arc::make_mut(&mut state.partitions).insert(found);
    }
    for ((run, node), state) in states {
        found.entry(run).or_default().insert(node, Some(Arc::new(state)));
    }
    Ok(())
}
