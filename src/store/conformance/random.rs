//! The same random operations on the backend and on the model's ledger: same outcomes, same states.

use std::collections::{BTreeMap, BTreeSet};

use super::kit::{
    Bench, Fault, add_interval, add_partition, at, create, ensure_eq, node_id, partition, relative, run_id, set_at, span,
};
use super::{Chain, Harness};
use crate::model::{
    Entry, Guard, Ledger, Mutation, NoFences, NodeStatus, NodeUpdate, Outcome, Refusal, RunFilter, RunId, RunPart, RunQuery,
    RunState, RunStatus, RunSummary, RunUpdate, Version,
};

const RUNS: u64 = 5;
const NODES: u64 = 6;
const BATCHES: u64 = 120;

/// splitmix64: enough for choosing, the same everywhere, and no dependency.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound.max(1)
    }

    fn small(&mut self, bound: u64) -> i64 {
        i64::try_from(self.below(bound)).unwrap_or(0)
    }

    /// Happens once in `n` times.
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// One run in both worlds. They number differently, so that each has its own chain.
#[derive(Clone)]
struct Twin {
    real: Chain,
    model: Chain,
}

impl Twin {
    fn entry(&mut self, guards: (Vec<Guard>, Vec<Guard>), mutations: &[Mutation]) -> (Entry, Entry) {
        let part = |chain: &mut Chain, guards: Vec<Guard>| {
            // What the tip refuses is sent all the same: both worlds must refuse it alike.
            let unchecked = chain.unchecked(guards.clone(), mutations.to_vec());
            let part = chain.part(guards, mutations.to_vec()).unwrap_or(unchecked);
            Entry { parts: vec![part], ..Entry::default() }
        };
        (part(&mut self.real, guards.0), part(&mut self.model, guards.1))
    }
}

/// A run as it was at some time, in both worlds.
#[derive(Clone)]
struct Memory {
    real: RunState,
    model: RunState,
}

pub(super) async fn random_operations_match_the_model(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let mut ledger = Ledger::new();
    let mut dice = Dice(0x5EED_0001);
    let mut past: BTreeMap<RunId, Vec<Memory>> = BTreeMap::new();
    let mut deleted: BTreeMap<(RunId, String), Version> = BTreeMap::new();
    let mut clock = 0;
    for round in 0..BATCHES {
        let mut twins: BTreeMap<RunId, Twin> = BTreeMap::new();
        let (mut real, mut model) = (Vec::new(), Vec::new());
        let mut named: BTreeSet<RunId> = BTreeSet::new();
        let mut settling: BTreeSet<RunId> = BTreeSet::new();
        for _ in 0..=dice.below(7) {
            clock += 1;
            let id = run_id(&format!("run {}", dice.below(RUNS)))?;
            // Actors send nothing behind an entry that makes or deletes a run.
            if settling.contains(&id) {
                continue;
            }
            let old = pick_old(&mut dice, past.get(&id), &deleted, &twins, &id);
            let on_old_base = old.is_some() || named.contains(&id);
            if old.is_some() {
                named.insert(id.clone());
            }
            let twin = match twins.entry(id.clone()) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => new.insert(match old {
                    Some(memory) => Twin { real: Chain::on(&memory.real), model: Chain::on(&memory.model) },
                    None => Twin {
                        real: bench.chain(id.as_str()).await?,
                        model: ledger.run(id.as_str()).map_or_else(|| Chain::of_new(id.clone()), Chain::on),
                    },
                }),
            };
            let mutations = mutations(&mut dice, clock, twin.model.tip().is_some())?;
            // A guard on an old base may be found stale or failed, whichever is looked at first.
            let guards = if on_old_base { (Vec::new(), Vec::new()) } else { guards(&mut dice, twin)? };
            let (mut to_real, mut to_model) = twin.entry(guards, &mutations);
            if dice.once_in(6) {
                add_other_run(&mut dice, &bench, &ledger, &mut twins, &id, clock, (&mut to_real, &mut to_model)).await?;
            }
            let comes_or_goes =
                |part: &&RunPart| part.mutations.iter().any(|m| m.creates_run() || matches!(m, Mutation::Delete { .. }));
            settling.extend(to_model.parts.iter().filter(comes_or_goes).map(|part| part.run.clone()));
            real.push(to_real);
            model.push(to_model);
        }
        let before: BTreeMap<RunId, RunState> = ledger.runs().map(|run| (run.id().clone(), run.clone())).collect();
        let expected = ledger.commit(&model, &NoFences);
        let found = bench.send(real).await?;
        for (index, (found, expected)) in found.iter().zip(&expected.outcomes).enumerate() {
            ensure_eq!(
                outline(found),
                outline(expected),
                "batch {round}, entry {index}, decided as {:?}",
                model.get(index).map(brief)
            );
        }
        for id in twins.keys() {
            let (found, model) = (bench.load(id.as_str()).await?, ledger.run(id.as_str()));
            ensure_eq!(found.as_ref().map(relative), model.map(relative), "batch {round}: run {id:?}");
            remember_deleted(&mut deleted, before.get(id), model, id);
            if let (Some(real), Some(model)) = (found, model) {
                past.entry(id.clone()).or_default().push(Memory { real, model: model.clone() });
            }
        }
        if round % 25 == 24 {
            bench = bench.reopen().await?;
            same_everywhere(&bench, &ledger, round).await?;
        }
    }
    same_everywhere(&bench, &ledger, BATCHES).await
}

/// Now and then a chain begins on a state that is not the present one. Only where no node was deleted since: a ledger keeps no tombstones, stores
/// that others write to do, and both are right.
fn pick_old(
    dice: &mut Dice,
    past: Option<&Vec<Memory>>,
    deleted: &BTreeMap<(RunId, String), Version>,
    twins: &BTreeMap<RunId, Twin>,
    id: &RunId,
) -> Option<Memory> {
    if twins.contains_key(id) || !dice.once_in(4) {
        return None;
    }
    let past = past?;
    let back = usize::try_from(dice.below(3) + 1).ok()?;
    let memory = past.get(past.len().checked_sub(back)?)?;
    let disturbed = deleted.iter().any(|((run, _), version)| run == id && *version > memory.model.version());
    (!disturbed).then(|| memory.clone())
}

fn remember_deleted(
    deleted: &mut BTreeMap<(RunId, String), Version>,
    before: Option<&RunState>,
    after: Option<&RunState>,
    id: &RunId,
) {
    // Also a node that was made and deleted within one batch left a tombstone: every name may have.
    let version = after.or(before).map_or(Version::NONE, RunState::version);
    for index in 0..NODES {
        let name = format!("n{index}");
        let gone = after.is_none_or(|run| run.node(&name).is_none());
        if gone {
            deleted.insert((id.clone(), name), version);
        }
    }
}

fn mutations(dice: &mut Dice, clock: i64, exists: bool) -> Result<Vec<Mutation>, Fault> {
    if !exists && !dice.once_in(10) {
        return Ok(vec![create(dice.small(40))]);
    }
    let mut mutations = Vec::new();
    if dice.once_in(25) {
        for _ in 0..dice.below(3) {
            mutations.push(mutation(dice, clock)?);
        }
        mutations.push(Mutation::Delete { keep_coverage: dice.once_in(2) });
        return Ok(mutations);
    }
    for _ in 0..=dice.below(3) {
        mutations.push(mutation(dice, clock)?);
    }
    Ok(mutations)
}

fn mutation(dice: &mut Dice, clock: i64) -> Result<Mutation, Fault> {
    let name = format!("n{}", dice.below(NODES));
    let start = dice.small(40);
    let end = start + 1 + dice.small(10);
    Ok(match dice.below(17) {
        0 => set_at(&name, NodeUpdate::running(), clock)?,
        1 => set_at(&name, NodeUpdate::success().row_count(dice.roll()).fingerprint(dice.below(9).to_string()), clock)?,
        2 => set_at(&name, NodeUpdate::failed(format!("error {clock}")), clock)?,
        3 => set_at(
            &name,
            NodeUpdate::status(NodeStatus::parse(
                ["skipped", "cached", "odd"].get(usize::try_from(dice.below(3)).unwrap_or(0)).copied().unwrap_or("odd"),
            )),
            clock,
        )?,
        4 => set_at(
            &name,
            NodeUpdate::new().metadata(format!("k{}", dice.below(3)), clock).watermark("w", clock.to_string()),
            clock,
        )?,
        5 => set_at(
            &name,
            NodeUpdate::new().remove_metadata(format!("k{}", dice.below(3))).clear_error().clear_row_count(),
            clock,
        )?,
        6 | 7 => add_interval(&name, start, end)?,
        8 => Mutation::RemoveInterval { node: node_id(&name)?, interval: span(start, end)? },
        9 => add_partition(&name, &format!("p{}", dice.below(4)))?,
        10 => Mutation::RemovePartition { node: node_id(&name)?, partition: partition(&format!("p{}", dice.below(4)))? },
        11 => Mutation::DeleteNode { node: node_id(&name)? },
        13 => set_at(
            &name,
            NodeUpdate::new()
                .depends_on((0..dice.below(3)).map(|needed| format!("needed {needed}")))
                .max_attempts(u32::try_from(dice.below(5) + 1).unwrap_or(1)),
            clock,
        )?,
        14 => set_at(&name, NodeUpdate::running().attempt(u32::try_from(dice.below(6) + 1).unwrap_or(1)).worker("w"), clock)?,
        15 => set_at(&name, NodeUpdate::pending().clear_max_attempts(), clock)?,
        12 => Mutation::Update { update: RunUpdate::new().metadata("k", clock), at: at(clock) },
        _ => {
            let update = [RunUpdate::running(), RunUpdate::success(), RunUpdate::failed()]
                .into_iter()
                .nth(usize::try_from(dice.below(3)).unwrap_or(0));
            Mutation::Update { update: update.unwrap_or_default(), at: at(clock) }
        }
    })
}

/// A guard for each world: the same question, with each world's own numbers.
fn guards(dice: &mut Dice, twin: &Twin) -> Result<(Vec<Guard>, Vec<Guard>), Fault> {
    let node = node_id(&format!("n{}", dice.below(NODES)))?;
    let same = |guard: Guard| Ok((vec![guard.clone()], vec![guard]));
    match dice.below(12) {
        0 => same(Guard::NodeAbsent { node }),
        1 => same(Guard::NodeStatus { node, one_of: vec![NodeStatus::Running, NodeStatus::Success] }),
        2 => same(Guard::RunStatus(vec![RunStatus::Running])),
        3 => Ok((vec![Guard::RunVersion(twin.real.expect())], vec![Guard::RunVersion(twin.model.expect())])),
        4 => Ok((
            vec![Guard::RunVersion(Version(twin.real.expect().0 + 1))],
            vec![Guard::RunVersion(Version(twin.model.expect().0 + 1))],
        )),
        5 => {
            let stamp =
                |chain: &Chain| chain.tip().and_then(|run| run.node(node.as_str())).map_or(Version::NONE, |state| state.version);
            let guard = |chain: &Chain| vec![Guard::NodeVersion { node: node.clone(), version: stamp(chain) }];
            Ok((guard(&twin.real), guard(&twin.model)))
        }
        _ => Ok((Vec::new(), Vec::new())),
    }
}

/// Makes the entry one over two runs.
async fn add_other_run(
    dice: &mut Dice,
    bench: &Bench<'_>,
    ledger: &Ledger,
    twins: &mut BTreeMap<RunId, Twin>,
    first: &RunId,
    clock: i64,
    entries: (&mut Entry, &mut Entry),
) -> Result<(), Fault> {
    let id = run_id(&format!("run {}", dice.below(RUNS)))?;
    if id <= *first || twins.contains_key(&id) {
        return Ok(());
    }
    let mut twin = Twin {
        real: bench.chain(id.as_str()).await?,
        model: ledger.run(id.as_str()).map_or_else(|| Chain::of_new(id.clone()), Chain::on),
    };
    let mutations = mutations(dice, clock, twin.model.tip().is_some())?;
    let (real, model) = twin.entry((Vec::new(), Vec::new()), &mutations);
    twins.insert(id, twin);
    entries.0.parts.extend(real.parts);
    entries.1.parts.extend(model.parts);
    Ok(())
}

/// Enough of an entry to find it again.
fn brief(entry: &Entry) -> Vec<String> {
    let of = |part: &RunPart| {
        format!("{} base {} expect {}, {} guards, {:?}", part.run, part.base, part.expect, part.guards.len(), part.mutations)
    };
    entry.parts.iter().map(of).collect()
}

/// What can be compared of an outcome: not numbers that each store chooses, not the words of a refusal.
fn outline(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Applied(receipt) => {
            let runs: Vec<String> = receipt
                .runs
                .iter()
                .map(|run| {
                    format!(
                        "{} {}",
                        run.run,
                        if run.before == Version::NONE {
                            "made".to_owned()
                        } else {
                            (run.after.0 - run.before.0).min(1).to_string()
                        }
                    )
                })
                .collect();
            format!("applied {runs:?}")
        }
        Outcome::Refused(Refusal::Guard { run, .. }) => format!("guard of {run}"),
        Outcome::Refused(Refusal::Input(_)) => "input".to_owned(),
        Outcome::Refused(other) => format!("{other:?}"),
    }
}

async fn same_everywhere(bench: &Bench<'_>, ledger: &Ledger, round: u64) -> Result<(), Fault> {
    let runs: Vec<RunState> = ledger.runs().map(relative).collect();
    let found: Vec<RunState> = bench.everything().await?.iter().map(relative).collect();
    ensure_eq!(found, runs, "all runs after batch {round}");
    let retained: Vec<_> = ledger.retained().into_iter().collect();
    let mut found = bench.backend.retained().await?;
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    ensure_eq!(found, retained, "what outlives deleted runs after batch {round}");
    for index in 0..NODES {
        let node = node_id(&format!("n{index}"))?;
        ensure_eq!(
            bench.backend.coverage(&node).await?,
            ledger.coverage(node.as_str()),
            "the coverage of {node} after batch {round}"
        );
        ensure_eq!(
            bench.backend.last_success(&node).await?,
            ledger.last_success(node.as_str()),
            "the last success of {node} after batch {round}"
        );
        let latest = ledger.runs_of_node(node.as_str()).next().map(|run| run.id().clone());
        ensure_eq!(
            bench.backend.latest_node(&node).await?.map(|(run, _)| run),
            latest,
            "the latest run of {node} after batch {round}"
        );
    }
    for filter in [
        RunFilter::all(),
        RunFilter::all().status(RunStatus::Running),
        RunFilter::all().created_from(at(10)).created_before(at(30)),
    ] {
        let outline = |runs: &[RunSummary]| runs.iter().map(|run| (run.run_id.clone(), run.nodes.clone())).collect::<Vec<_>>();
        let expected = ledger.list(&RunQuery::new(filter.clone()));
        let found = bench.list(RunQuery::new(filter.clone()).limit(2)).await?;
        ensure_eq!(outline(&found), outline(&expected.runs), "the runs of {filter:?} after batch {round}");
    }
    Ok(())
}
