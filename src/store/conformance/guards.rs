//! Guards are decided when the entry commits: every kind, holding and failing.

use super::kit::{Bench, Fault, at, create, ensure, ensure_eq, ensure_matches, node, node_id, run_id, set};
use super::{Chain, Harness};
use crate::model::{Entry, Guard, Mutation, NodeStatus, NodeUpdate, Refusal, RunState, RunStatus, RunUpdate, Version};

/// Sends a guarded write on the present state, once where the guard holds and once where it does not.
async fn decides(bench: &Bench<'_>, run: &RunState, guard: Guard, holds: bool) -> Result<(), Fault> {
    let entry = Chain::on(run).guarded(vec![guard.clone()], vec![set("written", NodeUpdate::new().row_count(1))?])?;
    if holds {
        bench.applied(entry).await.map_err(|fault| Fault::new(format!("{guard} holds: {}", fault.into_text())))?;
        return Ok(());
    }
    let refusal =
        bench.refused(entry).await.map_err(|fault| Fault::new(format!("{guard} does not hold: {}", fault.into_text())))?;
    ensure_matches!(refusal, Refusal::Guard { run: of, guard: named, found } if of == run.id() && *named == guard && !found.is_empty(), "the refusal by {guard}");
    ensure_eq!(bench.state(run.id().as_str()).await?, *run, "a write refused by {guard} changes nothing");
    Ok(())
}

pub(super) async fn run_guards_hold_or_refuse(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let run = bench.create("run", 0).await?;
    let version = run.version();
    decides(&bench, &run, Guard::RunVersion(version.next()), false).await?;
    decides(&bench, &run, Guard::RunVersion(Version::NONE), false).await?;
    decides(&bench, &run, Guard::RunVersion(version), true).await?;
    let run = bench.state("run").await?;
    decides(&bench, &run, Guard::RunVersion(version), false).await?;

    decides(&bench, &run, Guard::RunStatus(vec![RunStatus::Pending, RunStatus::Failed]), false).await?;
    decides(&bench, &run, Guard::RunStatus(Vec::new()), false).await?;
    decides(&bench, &run, Guard::RunStatus(vec![RunStatus::Failed, RunStatus::Running]), true).await?;
    bench.write("run", vec![Mutation::Update { update: RunUpdate::status(RunStatus::parse("paused")), at: at(1) }]).await?;
    let run = bench.state("run").await?;
    decides(&bench, &run, Guard::RunStatus(vec![RunStatus::Running]), false).await?;
    decides(&bench, &run, Guard::RunStatus(vec![RunStatus::parse("paused")]), true).await
}

pub(super) async fn node_guards_hold_or_refuse(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    bench.write("run", vec![set("n", NodeUpdate::running())?]).await?;
    let (n, absent) = (node_id("n")?, node_id("absent")?);
    let status =
        |node: &crate::model::NodeId, one_of: &[NodeStatus]| Guard::NodeStatus { node: node.clone(), one_of: one_of.to_vec() };
    let run = bench.state("run").await?;
    let stamp = node(&run, "n")?.version;
    for (guard, holds) in [
        (status(&n, &[NodeStatus::Pending, NodeStatus::Success]), false),
        (status(&n, &[]), false),
        (status(&n, &[NodeStatus::Pending, NodeStatus::Running]), true),
        (status(&absent, &[NodeStatus::Pending]), false),
        (Guard::NodeAbsent { node: n.clone() }, false),
        (Guard::NodeAbsent { node: absent.clone() }, true),
        (Guard::NodeVersion { node: n.clone(), version: stamp }, true),
        (Guard::NodeVersion { node: n.clone(), version: stamp.next() }, false),
        (Guard::NodeVersion { node: n.clone(), version: Version::NONE }, false),
        (Guard::NodeVersion { node: absent.clone(), version: Version::NONE }, true),
        (Guard::NodeVersion { node: absent.clone(), version: stamp }, false),
    ] {
        let run = bench.state("run").await?;
        decides(&bench, &run, guard, holds).await?;
    }
    bench.write("run", vec![Mutation::DeleteNode { node: n.clone() }]).await?;
    for (guard, holds) in [
        (Guard::NodeAbsent { node: n.clone() }, true),
        (Guard::NodeVersion { node: n.clone(), version: stamp }, false),
        (status(&n, &[NodeStatus::Running]), false),
    ] {
        let run = bench.state("run").await?;
        decides(&bench, &run, guard, holds).await?;
    }
    // A guard looks at the state before the entry, not at what the entry itself writes.
    let run = bench.state("run").await?;
    let claim = Chain::on(&run).guarded(vec![Guard::NodeAbsent { node: n.clone() }], vec![set("n", NodeUpdate::running())?])?;
    bench.applied(claim).await?;
    let run = bench.state("run").await?;
    let both = vec![status(&n, &[NodeStatus::Running]), Guard::NodeAbsent { node: n.clone() }];
    let entry = Chain::on(&run).guarded(both, vec![set("n", NodeUpdate::success())?])?;
    ensure_matches!(
        bench.refused(entry).await?,
        Refusal::Guard { guard: Guard::NodeAbsent { .. }, .. },
        "the second of two guards does not hold"
    );
    Ok(())
}

pub(super) async fn guards_on_a_run_that_is_made_look_at_nothing(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let node = || node_id("n");
    for guard in [
        Guard::RunVersion(Version(7)),
        Guard::RunStatus(vec![RunStatus::Running]),
        Guard::NodeStatus { node: node()?, one_of: vec![NodeStatus::Pending] },
        Guard::NodeVersion { node: node()?, version: Version(1) },
    ] {
        let entry = Entry {
            parts: vec![Chain::of_new(run_id("new")?).unchecked(vec![guard.clone()], vec![create(0)])],
            ..Entry::default()
        };
        let refusal = bench.refused(entry).await?;
        ensure_matches!(&refusal, Refusal::Guard { guard: violated, .. } if *violated == guard, "{guard} on a run that is made");
        ensure!(bench.load("new").await?.is_none(), "{guard}: a refused entry makes no run");
    }
    let holds = vec![
        Guard::RunVersion(Version::NONE),
        Guard::NodeAbsent { node: node()? },
        Guard::NodeVersion { node: node()?, version: Version::NONE },
        Guard::Unlocked,
    ];
    bench.applied(Chain::of_new(run_id("new")?).guarded(holds, vec![create(0)])?).await?;
    Ok(())
}

pub(super) async fn a_guard_alone_needs_its_run(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let other = bench.create("other", 0).await?;
    // The write of one run depends on the state of another one that it does not change.
    let nowhere = Chain::of_new(run_id("missing")?);
    for guard in
        [Guard::NodeAbsent { node: node_id("n")? }, Guard::RunStatus(vec![RunStatus::Running]), Guard::RunVersion(Version::NONE)]
    {
        let parts = vec![
            nowhere.unchecked(vec![guard.clone()], Vec::new()),
            Chain::on(&other).part(Vec::new(), vec![set("n", NodeUpdate::success())?])?,
        ];
        ensure_eq!(
            bench.refused(Entry { parts, ..Entry::default() }).await?,
            Refusal::RunNotFound { run: run_id("missing")? },
            "{guard} on a run that is not there"
        );
    }
    ensure!(bench.load("missing").await?.is_none(), "a guard makes no run");
    ensure_eq!(bench.state("other").await?, other, "the other run of a refused entry");

    let watched = bench.create("watched", 1).await?;
    let guard = |status: RunStatus| vec![Guard::RunStatus(vec![status])];
    let parts = vec![
        Chain::on(&other).part(Vec::new(), vec![set("n", NodeUpdate::success())?])?,
        Chain::on(&watched).part(guard(RunStatus::Success), Vec::new())?,
    ];
    ensure_matches!(bench.refused(Entry { parts, ..Entry::default() }).await?, Refusal::Guard { .. }, "a guard on another run");
    ensure_eq!(bench.state("other").await?, other, "a write that depends on another run");
    let parts = vec![
        Chain::on(&other).part(Vec::new(), vec![set("n", NodeUpdate::success())?])?,
        Chain::on(&watched).part(guard(RunStatus::Running), Vec::new())?,
    ];
    bench.applied(Entry { parts, ..Entry::default() }).await?;
    Ok(())
}

pub(super) async fn a_refused_entry_changes_nothing(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.write("run", vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    let before = bench.state("run").await?;
    let chain = Chain::on(&before);
    // The third of four mutations is impossible.
    let mutations = vec![
        set("a", NodeUpdate::success().row_count(5))?,
        Mutation::Update { update: RunUpdate::success(), at: at(9) },
        Mutation::DeleteNode { node: node_id("missing")? },
        set("c", NodeUpdate::success())?,
    ];
    let entry = Entry { parts: vec![chain.unchecked(Vec::new(), mutations)], ..Entry::default() };
    ensure_matches!(bench.refused(entry).await?, Refusal::NodeNotFound { .. }, "an entry with an impossible step");
    ensure_eq!(bench.state("run").await?, before, "a refused entry");
    let bench = bench.reopen().await?;
    ensure_eq!(bench.state("run").await?, before, "a refused entry, after reopening");
    Ok(())
}
