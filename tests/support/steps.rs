//! Random batches on a database and on the ledger: the same answers, the same state.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use seeknal_state::model::{
    Batch, CommitSeq, Entry, Guard, Ledger, Mutation, NewRun, NoFences, NodeStatus, NodeUpdate, PartitionKey, RunPart, RunQuery,
    RunState, RunStatus, RunUpdate, Version,
};

use crate::batches::{Backend, at, hours, node_id, part_on, run_id};

/// Random batches, as actors send them: chains of entries on a tip, with guards that may fail, several runs in one entry.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    run: u8,
    second: Option<u8>,
    guard: Option<u8>,
    what: Vec<(u8, u8, u8)>,
    send_after: bool,
    ends_batch: bool,
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        0..3_u8,
        prop::option::weighted(0.15, 0..3_u8),
        prop::option::weighted(0.3, 0..8_u8),
        prop::collection::vec((0..12_u8, 0..4_u8, any::<u8>()), 1..4),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.4),
    );
    let step = step.prop_map(|(run, second, guard, what, send_after, ends_batch)| Step {
        run,
        second,
        guard,
        what,
        send_after,
        ends_batch,
    });
    prop::collection::vec(step, 1..40)
}

fn mutation((kind, node, value): (u8, u8, u8), exists: bool) -> Mutation {
    let name = ["a", "b", "n/ö", "z"][usize::from(node)];
    let id = node_id(name);
    let interval = hours(i64::from(value % 24), i64::from(value % 24) + 1 + i64::from(value / 64));
    let partition = PartitionKey::new(format!("p={}", value % 5)).unwrap();
    let stamp = at(i64::from(value));
    match kind {
        _ if !exists => Mutation::Create {
            run: NewRun::status([RunStatus::Running, RunStatus::Pending][usize::from(value % 2)].clone()),
            at: stamp,
        },
        0 => Mutation::Update {
            update: [RunUpdate::running(), RunUpdate::success()][usize::from(value % 2)].clone().metadata("k", value),
            at: stamp,
        },
        1 if value < 80 => Mutation::Delete { keep_coverage: value < 50 },
        2 => Mutation::DeleteNode { node: id },
        3 | 4 => Mutation::AddInterval { node: id, interval },
        5 | 6 => Mutation::RemoveInterval { node: id, interval },
        7 => Mutation::AddPartition { node: id, partition },
        8 => Mutation::RemovePartition { node: id, partition },
        _ => {
            let status = [NodeStatus::Running, NodeStatus::Success, NodeStatus::Failed, NodeStatus::parse("odd")]
                [usize::from(value % 4)]
            .clone();
            Mutation::SetNode {
                node: id,
                update: Box::new(NodeUpdate::status(status).row_count(value.into()).fingerprint(format!("f{value}"))),
                at: stamp,
            }
        }
    }
}

fn guard(kind: u8, tip: Version) -> Guard {
    let node = node_id(["a", "b"][usize::from(kind % 2)]);
    match kind / 2 {
        0 => Guard::NodeAbsent { node },
        1 => Guard::NodeStatus { node, one_of: vec![NodeStatus::Success, NodeStatus::Failed] },
        2 => Guard::RunStatus(vec![RunStatus::Running]),
        _ => Guard::RunVersion(tip),
    }
}

/// Sends the batches to both, each of them twice to the backend. `draws`: how many sequence numbers an entry draws there that is sent twice, whether it is
/// accepted or not; zero, where there are no gaps.
pub(crate) async fn agree(backend: &Backend, steps: Vec<Step>, draws: u64) -> Result<(), TestCaseError> {
    let mut drawn = 0_u64;
    let mut ledger = Ledger::new();
    let mut tips: BTreeMap<String, Option<RunState>> = BTreeMap::new();
    let mut entries = Vec::new();
    let last = steps.len() - 1;
    for (index, step) in steps.into_iter().enumerate() {
        let mut names: Vec<String> = [Some(step.run), step.second].into_iter().flatten().map(|run| format!("run{run}")).collect();
        names.sort();
        names.dedup();
        let parts: Vec<RunPart> = names
            .iter()
            .map(|name| {
                let committed = ledger.run(name).map_or(Version::NONE, RunState::version);
                let tip = tips.entry(name.clone()).or_insert_with(|| ledger.run(name).cloned());
                let mut exists = tip.is_some();
                let mutations: Vec<Mutation> = step
                    .what
                    .iter()
                    .map(|what| {
                        let made = mutation(*what, exists);
                        exists = !matches!(made, Mutation::Delete { .. });
                        made
                    })
                    .collect();
                let expect = tip.as_ref().map_or(Version::NONE, RunState::version);
                let guards = step.guard.map(|kind| guard(kind, expect)).into_iter().collect();
                let mut part = part_on(tip.as_ref(), committed, name, guards, mutations);
                *tip = part.after.clone().or_else(|| tip.clone());
                if !step.send_after {
                    part.after = None;
                }
                part
            })
            .collect();
        // What a fresh run's version will be, its actor does not know: it waits for the answer.
        let waits = parts
            .iter()
            .any(|part| part.expect == Version::NONE || part.mutations.iter().any(|m| matches!(m, Mutation::Delete { .. })));
        entries.push(Entry { parts, ..Entry::default() });
        if step.ends_batch || waits || index == last {
            let batch = Arc::new(Batch::new(std::mem::take(&mut entries)));
            ledger.raise_seq(CommitSeq(drawn));
            drawn += draws * batch.entries.len() as u64;
            let expected = ledger.commit(&batch.entries, &NoFences);
            let answer = backend.commit(Arc::clone(&batch)).await.unwrap();
            prop_assert_eq!(&answer, &expected, "{:#?}", batch);
            prop_assert_eq!(&backend.commit(Arc::clone(&batch)).await.unwrap(), &expected);
            tips.clear();
        }
    }
    same(backend, &ledger).await
}

/// Whether everything that can be asked is answered alike.
async fn same(backend: &Backend, ledger: &Ledger) -> Result<(), TestCaseError> {
    for run in 0..3 {
        let name = format!("run{run}");
        let stored = backend.load_run(&run_id(&name)).await.unwrap();
        prop_assert_eq!(stored.as_ref(), ledger.run(&name));
    }
    prop_assert_eq!(backend.list_runs(&RunQuery::default()).await.unwrap(), ledger.list(&RunQuery::default()));
    prop_assert_eq!(backend.retained().await.unwrap(), ledger.retained().into_iter().collect::<Vec<_>>());
    for node in ["a", "b", "n/ö", "z"] {
        let id = node_id(node);
        prop_assert_eq!(backend.last_success(&id).await.unwrap(), ledger.last_success(node));
        prop_assert_eq!(backend.coverage(&id).await.unwrap(), ledger.coverage(node));
        let latest = ledger.runs_of_node(node).next().map(|run| (run.id().clone(), run.node(node).unwrap().clone()));
        prop_assert_eq!(backend.latest_node(&id).await.unwrap(), latest);
    }
    let report = backend.verify().await.unwrap();
    prop_assert!(report.is_sound(), "{:?}", report.problems);
    Ok(())
}
