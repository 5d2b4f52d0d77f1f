//! Entries that stand on one another, entries over several runs, and batches that are sent twice.

use std::sync::Arc;

use super::kit::{
    Bench, Fault, add_interval, applied, at, commit, create, ensure, ensure_eq, ensure_matches, node, node_id, nth, refused,
    relative, run_id, set, status_of, versions,
};
use super::{Chain, Harness};
use crate::model::{Batch, Entry, Guard, Mutation, NodeStatus, NodeUpdate, Outcome, Refusal, RunStatus, RunUpdate, Version};

pub(super) async fn a_chain_is_applied_in_order(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let run = bench.create("run", 0).await?;
    let mut chain = Chain::on(&run);
    let entries = vec![
        chain.entry(vec![set("n", NodeUpdate::running())?])?,
        chain.entry(vec![set("n", NodeUpdate::failed("first"))?])?,
        chain.guarded(
            vec![
                Guard::NodeStatus { node: node_id("n")?, one_of: vec![NodeStatus::Failed] },
                Guard::RunVersion(Version(run.version().0 + 2)),
            ],
            vec![set("n", NodeUpdate::running())?],
        )?,
        chain.entry(vec![set("n", NodeUpdate::success())?, add_interval("n", 0, 10)?])?,
        chain.entry(vec![Mutation::DeleteNode { node: node_id("n")? }])?,
        chain.entry(vec![set("n", NodeUpdate::pending())?])?,
        chain.entry(vec![Mutation::Update { update: RunUpdate::success(), at: at(70) }])?,
    ];
    for (index, outcome) in bench.send(entries).await?.into_iter().enumerate() {
        let before = Version(run.version().0 + u64::try_from(index).unwrap_or(0));
        ensure_eq!(versions(&applied(outcome)?)?, (before, before.next()), "entry {index} of a chain");
    }
    ensure_eq!(Some(&bench.state("run").await?), chain.tip(), "the state after a chain is the predicted one");
    let bench = bench.reopen().await?;
    ensure_eq!(Some(&bench.state("run").await?), chain.tip(), "the state after a chain, reopened");
    Ok(())
}

pub(super) async fn a_refusal_chains_its_own_run_only(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let (one, two) = (bench.create("one", 0).await?, bench.create("two", 1).await?);
    let (mut first, mut second) = (Chain::on(&one), Chain::on(&two));
    let entries = vec![
        first.entry(vec![set("a", NodeUpdate::running())?])?,
        second.entry(vec![set("a", NodeUpdate::running())?])?,
        first.guarded(vec![Guard::RunStatus(vec![RunStatus::Failed])], vec![set("b", NodeUpdate::running())?])?,
        first.entry(vec![set("c", NodeUpdate::running())?])?,
        second.entry(vec![set("a", NodeUpdate::success())?])?,
        first.entry(vec![set("a", NodeUpdate::success())?])?,
    ];
    let outcomes = bench.send(entries).await?;
    for index in [0, 1, 4] {
        applied(nth(&outcomes, index)?).map_err(|fault| Fault::new(format!("entry {index}: {}", fault.into_text())))?;
    }
    ensure_matches!(refused(nth(&outcomes, 2)?)?, Refusal::Guard { .. }, "the entry whose guard does not hold");
    for index in [3, 5] {
        ensure_eq!(
            refused(nth(&outcomes, index)?)?,
            Refusal::Chained { run: run_id("one")? },
            "entry {index}, behind a refused one"
        );
    }
    let state = bench.state("one").await?;
    ensure_eq!(state.version(), one.version().next(), "only the entry before the refusal counts");
    ensure_eq!(status_of(&state, "a"), Some(NodeStatus::Running), "an entry behind a refusal changes nothing");
    ensure!(state.node("b").is_none() && state.node("c").is_none(), "refused entries make no nodes");
    ensure_eq!(Some(&bench.state("two").await?), second.tip(), "the other run");

    // The refusal ends with its batch.
    bench.write("one", vec![set("c", NodeUpdate::running())?]).await?;
    // A refusal of an entry over two runs chains both.
    let (mut first, mut second) = (bench.chain("one").await?, bench.chain("two").await?);
    let both = vec![
        first.part(vec![Guard::RunStatus(vec![RunStatus::Failed])], vec![set("d", NodeUpdate::running())?])?,
        second.part(Vec::new(), vec![set("d", NodeUpdate::running())?])?,
    ];
    let entries = vec![
        Entry { parts: both, ..Entry::default() },
        second.entry(vec![set("e", NodeUpdate::running())?])?,
        first.entry(vec![set("e", NodeUpdate::running())?])?,
    ];
    let outcomes = bench.send(entries).await?;
    ensure_matches!(refused(nth(&outcomes, 0)?)?, Refusal::Guard { .. }, "an entry over two runs");
    ensure_eq!(refused(nth(&outcomes, 1)?)?, Refusal::Chained { run: run_id("two")? }, "the innocent run's later entry");
    ensure_eq!(refused(nth(&outcomes, 2)?)?, Refusal::Chained { run: run_id("one")? }, "the guilty run's later entry");
    Ok(())
}

pub(super) async fn a_newer_row_makes_stale(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.write("run", vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    let old = bench.chain("run").await?;
    bench.write("run", vec![set("a", NodeUpdate::failed("somebody else"))?]).await?;
    bench.write("run", vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(9) }]).await?;
    bench.write("run", vec![set("made", NodeUpdate::running())?]).await?;
    let now = bench.state("run").await?;
    let stale = Refusal::Stale { run: run_id("run")? };
    for mutation in [
        set("a", NodeUpdate::success())?,
        add_interval("a", 0, 1)?,
        Mutation::DeleteNode { node: node_id("a")? },
        Mutation::Update { update: RunUpdate::success(), at: at(10) },
        set("made", NodeUpdate::success())?,
    ] {
        let entry = old.clone().entry(vec![mutation.clone()]);
        ensure_eq!(bench.refused(entry?).await?, stale, "{mutation:?}, decided before somebody else changed that row");
    }
    // One newer row among several is enough, and so is one that is only guarded on.
    let entry = old.clone().entry(vec![set("b", NodeUpdate::success())?, set("a", NodeUpdate::success())?])?;
    ensure_eq!(bench.refused(entry).await?, stale, "one newer row of two");
    let failed = Guard::NodeStatus { node: node_id("a")?, one_of: vec![NodeStatus::Failed] };
    let entry = old.clone().guarded(vec![failed], vec![set("b", NodeUpdate::success())?])?;
    ensure_eq!(bench.refused(entry).await?, stale, "a guard on a newer row");
    let running = Guard::RunStatus(vec![RunStatus::Running]);
    let entry = old.clone().guarded(vec![running], vec![set("b", NodeUpdate::success())?])?;
    ensure_eq!(bench.refused(entry).await?, stale, "a guard on the newer header");
    ensure_eq!(bench.state("run").await?, now, "stale entries change nothing");
    Ok(())
}

pub(super) async fn other_rows_do_not_disturb(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.write("run", vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    let mut old = bench.chain("run").await?;
    bench.write("run", vec![set("a", NodeUpdate::failed("somebody else"))?, set("made", NodeUpdate::running())?]).await?;
    bench.write("run", vec![set("a", NodeUpdate::new().row_count(3))?]).await?;
    let theirs = bench.state("run").await?;
    let receipt =
        bench.applied(old.entry(vec![set("b", NodeUpdate::success().row_count(8))?, set("c", NodeUpdate::running())?])?).await?;
    ensure_eq!(
        versions(&receipt)?,
        (theirs.version(), theirs.version().next()),
        "the receipt names the real versions, not the expected ones"
    );
    let run = bench.state("run").await?;
    ensure_eq!(run.node("a"), theirs.node("a"), "somebody else's row is not overwritten");
    ensure_eq!(run.node("made"), theirs.node("made"), "somebody else's new row is not overwritten");
    ensure_eq!(run.header(), theirs.header(), "the header is not overwritten");
    ensure_eq!(node(&run, "b")?.row_count, Some(8), "the row that was written");
    ensure_eq!(node(&run, "b")?.version, run.version(), "a written row carries the real version");
    ensure_eq!(node(&run, "c")?.version, run.version(), "a new row carries the real version");
    let bench = bench.reopen().await?;
    ensure_eq!(bench.state("run").await?, run, "the same after reopening");

    // The header is a row like the others.
    let mut old = bench.chain("run").await?;
    bench.write("run", vec![set("b", NodeUpdate::running())?]).await?;
    let theirs = bench.state("run").await?;
    bench.applied(old.entry(vec![Mutation::Update { update: RunUpdate::failed(), at: at(99) }])?).await?;
    let run = bench.state("run").await?;
    ensure_eq!(run.header().status, RunStatus::Failed, "the header that was written");
    ensure_eq!(run.node("b"), theirs.node("b"), "a node that somebody else changed");
    Ok(())
}

pub(super) async fn a_chain_on_an_old_base_may_touch_its_own_rows(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.write("run", vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    let mut chain = bench.chain("run").await?;
    let receipt = bench.write("run", vec![set("a", NodeUpdate::failed("somebody else"))?]).await?;
    let (_, theirs) = versions(&receipt)?;
    let entries = vec![
        chain.entry(vec![set("b", NodeUpdate::success())?])?,
        chain.entry(vec![set("b", NodeUpdate::running())?, set("c", NodeUpdate::running())?])?,
        chain.guarded(
            vec![Guard::NodeStatus { node: node_id("b")?, one_of: vec![NodeStatus::Running] }],
            vec![set("b", NodeUpdate::failed("mine"))?, set("c", NodeUpdate::success())?],
        )?,
        chain.entry(vec![set("a", NodeUpdate::success())?])?,
        chain.entry(vec![set("b", NodeUpdate::success())?])?,
    ];
    let outcomes = bench.send(entries).await?;
    for index in 0..3 {
        let receipt = applied(nth(&outcomes, index)?)
            .map_err(|fault| Fault::new(format!("entry {index} of a chain beside a stranger: {}", fault.into_text())))?;
        let before = Version(theirs.0 + u64::try_from(index).unwrap_or(0));
        ensure_eq!(versions(&receipt)?, (before, before.next()), "entry {index} of a chain beside a stranger");
    }
    ensure_eq!(refused(nth(&outcomes, 3)?)?, Refusal::Stale { run: run_id("run")? }, "the stranger's row");
    ensure_eq!(refused(nth(&outcomes, 4)?)?, Refusal::Chained { run: run_id("run")? }, "the entry behind it");
    let run = bench.state("run").await?;
    ensure_eq!(status_of(&run, "a"), Some(NodeStatus::Failed), "the stranger's row");
    ensure_eq!(node(&run, "a")?.version, theirs, "the version of the stranger's row");
    ensure_eq!(node(&run, "b")?.error.as_deref(), Some("mine"), "the chain's own row");
    ensure_eq!(node(&run, "c")?.version, run.version(), "the version of the chain's own row");
    Ok(())
}

pub(super) async fn a_deleted_row_makes_stale_where_others_write(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    if !bench.backend.is_shared() {
        return Ok(());
    }
    bench.write("run", vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    let old = bench.chain("run").await?;
    bench.write("run", vec![Mutation::DeleteNode { node: node_id("a")? }]).await?;
    let stale = Refusal::Stale { run: run_id("run")? };
    ensure_eq!(
        bench.refused(old.clone().entry(vec![set("a", NodeUpdate::success())?])?).await?,
        stale,
        "a row that somebody else deleted"
    );
    bench.applied(old.clone().entry(vec![set("b", NodeUpdate::success())?])?).await?;
    let bench = bench.reopen().await?;
    ensure_eq!(
        bench.refused(old.clone().entry(vec![set("a", NodeUpdate::success())?])?).await?,
        stale,
        "a deleted row, after reopening"
    );
    // Made again by somebody who knows that it was deleted.
    bench.write("run", vec![set("a", NodeUpdate::pending())?]).await?;
    ensure_eq!(
        bench.refused(old.clone().entry(vec![set("a", NodeUpdate::success())?])?).await?,
        stale,
        "a row that was deleted and made again"
    );
    Ok(())
}

pub(super) async fn a_deletion_hides_no_other(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    if !bench.backend.is_shared() {
        return Ok(());
    }
    for (run, together) in [("one batch", true), ("two batches", false)] {
        let n = NodeUpdate::success().row_count(5);
        bench.write(run, vec![create(0), set("m", NodeUpdate::running())?, set("n", n)?, add_interval("n", 0, 10)?]).await?;
        let mut old = bench.chain(run).await?;
        // By another opening: of its own commits each knows.
        let other = Bench::open(harness).await?;
        other.write(run, vec![Mutation::DeleteNode { node: node_id("n")? }]).await?;
        other.backend.close().await?;
        // Neither knows that "n" is gone.
        let entries =
            vec![old.entry(vec![Mutation::DeleteNode { node: node_id("m")? }])?, old.entry(vec![add_interval("n", 10, 11)?])?];
        let mut outcomes = Vec::new();
        if together {
            outcomes = bench.send(entries).await?;
        } else {
            for entry in entries {
                outcomes.push(bench.one(entry).await?);
            }
        }
        let touched = nth(&outcomes, 1)?;
        ensure_matches!(touched, Outcome::Refused(Refusal::Stale { .. } | Refusal::Chained { .. }), "{run}: a node that is gone");
        ensure!(bench.state(run).await?.node("n").is_none(), "{run}: what somebody deleted stays deleted");
    }
    Ok(())
}

pub(super) async fn several_runs_are_all_or_nothing(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    for (index, run) in ["a", "b", "c"].into_iter().enumerate() {
        bench.create(run, i64::try_from(index).unwrap_or(0)).await?;
    }
    let before = bench.everything().await?;
    let write = || set("n", NodeUpdate::success().row_count(1));
    // Each run in turn is the one that refuses.
    for guilty in ["a", "b", "c"] {
        let mut parts = Vec::new();
        for run in ["a", "b", "c"] {
            let guards = if run == guilty { vec![Guard::RunStatus(vec![RunStatus::Failed])] } else { Vec::new() };
            parts.push(bench.chain(run).await?.part(guards, vec![write()?])?);
        }
        let refusal = bench.refused(Entry { parts, ..Entry::default() }).await?;
        ensure_matches!(refusal, Refusal::Guard { run, .. } if *run == guilty, "the run that refuses is named");
        ensure_eq!(bench.everything().await?, before, "an entry over three runs, refused because of {guilty:?}");
    }
    // One that is not there, one that is made, one that goes.
    let mut parts = vec![bench.chain("a").await?.part(Vec::new(), vec![write()?])?];
    parts.push(Chain::of_new(run_id("missing")?).unchecked(Vec::new(), vec![write()?]));
    let refusal = bench.refused(Entry { parts, ..Entry::default() }).await?;
    ensure_eq!(refusal, Refusal::RunNotFound { run: run_id("missing")? }, "an entry with a run that is not there");
    ensure_eq!(bench.everything().await?, before, "an entry with a run that is not there");

    let mut parts = Vec::new();
    parts.push(bench.chain("a").await?.part(Vec::new(), vec![write()?])?);
    parts.push(bench.chain("b").await?.part(Vec::new(), vec![Mutation::Delete { keep_coverage: true }])?);
    parts.push(bench.chain("c").await?.part(vec![Guard::NodeAbsent { node: node_id("n")? }], vec![write()?])?);
    parts.push(Chain::of_new(run_id("d")?).part(Vec::new(), vec![create(7), write()?])?);
    let receipt = bench.applied(Entry { parts, ..Entry::default() }).await?;
    let named: Vec<String> = receipt.runs.iter().map(|run| run.run.to_string()).collect();
    ensure_eq!(named, ["a", "b", "c", "d"], "the receipt names the runs in the order of the parts");
    let bench = bench.reopen().await?;
    ensure!(bench.load("b").await?.is_none(), "the deleted run is gone");
    for run in ["a", "c", "d"] {
        let state = bench.state(run).await?;
        ensure_eq!(node(&state, "n")?.row_count, Some(1), "run {run:?}");
        let after = receipt.runs.iter().find(|receipt| receipt.run == *run).map(|receipt| receipt.after);
        ensure_eq!(after, Some(state.version()), "the version of run {run:?}");
    }
    Ok(())
}

pub(super) async fn a_batch_is_applied_once(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    let mut chain = bench.chain("run").await?;
    let batch = Arc::new(Batch::new(vec![
        chain.entry(vec![set("n", NodeUpdate::running())?])?,
        chain.guarded(vec![Guard::RunStatus(vec![RunStatus::Failed])], vec![set("m", NodeUpdate::running())?])?,
        chain.entry(vec![set("o", NodeUpdate::running())?])?,
        Chain::of_new(run_id("made")?).entry(vec![create(5)])?,
    ]));
    let first = commit(&bench.backend, Arc::clone(&batch)).await?;
    let after = bench.everything().await?;
    ensure_eq!(commit(&bench.backend, Arc::clone(&batch)).await?, first, "the same batch sent again");
    bench.write("run", vec![set("between", NodeUpdate::running())?]).await?;
    bench.write("made", vec![Mutation::Delete { keep_coverage: false }]).await?;
    ensure_eq!(commit(&bench.backend, Arc::clone(&batch)).await?, first, "the same batch sent after others");
    ensure!(bench.load("made").await?.is_none(), "a batch that is sent again makes nothing again");
    let run = bench.state("run").await?;
    let was = after.iter().find(|state| state.id() == run.id()).map(|state| state.version().next());
    ensure_eq!(Some(run.version()), was, "a batch that is sent again adds no version");
    // The same entries under another name are another batch.
    let other = Batch::new(vec![Chain::of_new(run_id("made")?).entry(vec![create(5)])?]);
    ensure_matches!(
        commit(&bench.backend, other).await?.outcomes.as_slice(),
        [Outcome::Applied(_)],
        "another batch with the same entry"
    );
    Ok(())
}

pub(super) async fn an_empty_batch_is_answered(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let run = bench.create("run", 0).await?;
    ensure_eq!(bench.send(Vec::new()).await?.len(), 0, "an empty batch");
    let receipt = bench.write("run", Vec::new()).await?;
    ensure_eq!(versions(&receipt)?, (run.version(), run.version().next()), "an entry without mutations is an entry");
    Ok(())
}

pub(super) async fn a_big_batch_is_answered_entry_by_entry(harness: &dyn Harness) -> Result<(), Fault> {
    const RUNS: usize = 8;
    const ENTRIES: usize = 2_048;
    let bench = Bench::open(harness).await?;
    let mut chains = Vec::new();
    for index in 0..RUNS {
        chains.push(Chain::on(&bench.create(&format!("run {index}"), i64::try_from(index).unwrap_or(0)).await?));
    }
    let mut entries = Vec::with_capacity(ENTRIES);
    for index in 0..ENTRIES {
        let Some(chain) = chains.get_mut(index % RUNS) else { return Err(Fault::new("no chain")) };
        let rows = u64::try_from(index).unwrap_or(0);
        entries.push(chain.entry(vec![set(&format!("node {}", index / RUNS % 50), NodeUpdate::success().row_count(rows))?])?);
    }
    // In the last run the middle is refused: what is behind it is chained, nobody else is.
    let refused_at = ENTRIES / 2 + RUNS - 1;
    if let Some(part) = entries.get_mut(refused_at).and_then(|entry| entry.parts.first_mut()) {
        part.guards.push(Guard::RunStatus(vec![RunStatus::Cancelled]));
    }
    let outcomes = bench.send(entries).await?;
    for (index, outcome) in outcomes.iter().enumerate() {
        let lost = index % RUNS == RUNS - 1 && index >= refused_at;
        ensure_eq!(matches!(outcome, Outcome::Refused(_)), lost, "entry {index} of {ENTRIES} is refused");
    }
    let bench = bench.reopen().await?;
    for (index, chain) in chains.iter().enumerate().take(RUNS - 1) {
        let run = bench.state(&format!("run {index}")).await?;
        ensure_eq!(Some(relative(&run)), chain.tip().map(relative), "run {index} after a big batch");
    }
    let cut = bench.state(&format!("run {}", RUNS - 1)).await?;
    let written = u64::try_from(ENTRIES / RUNS / 2).unwrap_or(0);
    ensure_eq!(cut.version().0, cut.created_version().0 + written, "the run whose chain was cut");
    Ok(())
}
