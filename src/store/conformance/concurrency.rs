//! Callers that come at the same time, go away in the middle, or come too late.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::kit::{
    Bench, Fault, add_interval, add_partition, at, commit, create, ensure, ensure_eq, ensure_matches, node, node_id, run_id, set,
};
use super::{Chain, Harness};
use crate::model::{Batch, Entry, Mutation, NodeStatus, NodeUpdate, Outcome, Refusal, RunUpdate};
use crate::store::StoreErrorKind;

pub(super) async fn runs_do_not_disturb_one_another(harness: &dyn Harness) -> Result<(), Fault> {
    const RUNS: usize = 16;
    const STEPS: u64 = 12;
    let bench = Bench::open(harness).await?;
    let mut tasks: JoinSet<Result<(usize, Chain), Fault>> = JoinSet::new();
    for index in 0..RUNS {
        let backend = Arc::clone(&bench.backend);
        tasks.spawn(async move {
            let id = run_id(&format!("run {index}"))?;
            let outcome = commit(&backend, Batch::new(vec![Chain::of_new(id.clone()).entry(vec![create(0)])?])).await?;
            ensure_matches!(outcome.outcomes.as_slice(), [Outcome::Applied(_)], "run {index} is made");
            let run = backend.load_run(&id).await?.ok_or_else(|| Fault::new("a run that was made is missing"))?;
            let mut chain = Chain::on(&run);
            for step in 0..STEPS {
                // Two entries a batch, one of which reads what the other wrote.
                let entries = vec![
                    chain.entry(vec![set("n", NodeUpdate::running())?])?,
                    chain.entry(vec![
                        set("n", NodeUpdate::success().row_count(step))?,
                        set(&format!("n{}", step % 3), NodeUpdate::running())?,
                    ])?,
                ];
                let answer = commit(&backend, Batch::new(entries)).await?;
                ensure_matches!(
                    answer.outcomes.as_slice(),
                    [Outcome::Applied(_), Outcome::Applied(_)],
                    "run {index}, step {step}"
                );
                let found = backend.load_run(&id).await?;
                ensure_eq!(found.as_ref(), chain.tip(), "run {index} reads its own write of step {step}");
            }
            Ok((index, chain))
        });
    }
    let mut chains = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        chains.push(joined.map_err(|error| Fault::new(format!("a task of the case ended badly: {error}")))??);
    }
    ensure_eq!(chains.len(), RUNS, "every task ended");
    let bench = bench.reopen().await?;
    for (index, chain) in chains {
        ensure_eq!(bench.load(&format!("run {index}")).await?.as_ref(), chain.tip(), "run {index} after reopening");
    }
    Ok(())
}

pub(super) async fn several_runs_are_read_at_one_moment(harness: &dyn Harness) -> Result<(), Fault> {
    const STEPS: u64 = 60;
    let names = ["a", "b", "c"];
    let bench = Bench::open(harness).await?;
    let (mut chains, mut seen) = (Vec::new(), Vec::new());
    for run in names {
        let nodes = [set("n", NodeUpdate::running().row_count(0))?, set("m", NodeUpdate::running())?];
        bench.write(run, [create(0)].into_iter().chain(nodes).collect()).await?;
        let state = bench.state(run).await?;
        chains.push(Chain::on(&state));
        seen.push((run_id(run)?, Some(state)));
    }
    seen.push((run_id("missing")?, None));
    let backend = Arc::clone(&bench.backend);
    let mut writer: JoinSet<Result<(), Fault>> = JoinSet::new();
    writer.spawn(async move {
        for step in 1..=STEPS {
            let mut parts = Vec::new();
            for chain in &mut chains {
                let mut mutations = vec![set("n", NodeUpdate::running().row_count(step))?];
                // A row that goes cannot be told from what is newer: the run has to be read as a whole.
                match step % 10 {
                    4 => mutations.push(Mutation::DeleteNode { node: node_id("m")? }),
                    5 => mutations.push(set("m", NodeUpdate::running())?),
                    _ => {}
                }
                parts.push(chain.part(Vec::new(), mutations)?);
            }
            let entry = Entry { parts, ..Entry::default() };
            let answer = commit(&backend, Batch::new(vec![entry])).await?;
            ensure_matches!(answer.outcomes.as_slice(), [Outcome::Applied(_)], "step {step} over three runs");
            tokio::task::yield_now().await;
        }
        Ok(())
    });
    let (mut last, mut readings) = (0, 0_u64);
    while last < STEPS {
        ensure!(readings < 100_000, "what was written is never seen: {last} of {STEPS}");
        let states = bench.backend.reload_runs(&seen).await?;
        ensure_eq!(states.len(), seen.len(), "every run is answered");
        ensure!(states.last().is_some_and(Option::is_none), "a run that is not there");
        let mut steps = Vec::new();
        for (state, (run, _)) in states.iter().flatten().zip(&seen) {
            ensure_eq!(state.id(), run, "the runs are answered in the order asked");
            let step = node(state, "n")?.row_count.unwrap_or(0);
            ensure_eq!(state.node("m").is_none(), step % 10 == 4, "run {run:?} at step {step}: the node that comes and goes");
            steps.push(step);
        }
        let [first, ..] = steps.as_slice() else { return Err(Fault::new("no run is there")) };
        ensure_eq!(steps, vec![*first; names.len()], "the steps that were read together");
        ensure!(*first >= last, "step {first} was read after step {last}");
        last = *first;
        readings += 1;
        // Now with what was read last, now without.
        for ((_, have), state) in seen.iter_mut().zip(states) {
            *have = state.filter(|_| readings % 3 > 0);
        }
        tokio::task::yield_now().await;
    }
    while let Some(joined) = writer.join_next().await {
        joined.map_err(|error| Fault::new(format!("a task of the case ended badly: {error}")))??;
    }
    Ok(())
}

pub(super) async fn coverage_is_read_at_one_moment(harness: &dyn Harness) -> Result<(), Fault> {
    const STEPS: usize = 60;
    let bench = Bench::open(harness).await?;
    let mut chain = Chain::on(&bench.create("run", 0).await?);
    let backend = Arc::clone(&bench.backend);
    let mut writer: JoinSet<Result<(), Fault>> = JoinSet::new();
    writer.spawn(async move {
        for step in 0..STEPS {
            let mut entries = Vec::new();
            if step == STEPS / 2 {
                // What was completed so far outlives its run from now on.
                entries.push(chain.entry(vec![Mutation::Delete { keep_coverage: true }])?);
                chain = Chain::of_new(run_id("next")?);
                entries.push(chain.entry(vec![create(1)])?);
                let answer = commit(&backend, Batch::new(entries)).await?;
                ensure_matches!(answer.outcomes.as_slice(), [Outcome::Applied(_), Outcome::Applied(_)], "one run after another");
                let next = backend.load_run(&run_id("next")?).await?;
                chain = Chain::on(&next.ok_or_else(|| Fault::new("a run that was made is missing"))?);
            }
            let hour = i64::try_from(step).unwrap_or(0) * 2;
            let entry = chain.entry(vec![add_interval("n", hour, hour + 1)?, add_partition("n", &format!("p{step}"))?])?;
            let answer = commit(&backend, Batch::new(vec![entry])).await?;
            ensure_matches!(answer.outcomes.as_slice(), [Outcome::Applied(_)], "step {step}");
            tokio::task::yield_now().await;
        }
        Ok(())
    });
    let (mut last, mut readings) = (0, 0_u64);
    while last < STEPS {
        ensure!(readings < 100_000, "what was written is never seen: {last} of {STEPS}");
        let coverage = bench.backend.coverage(&node_id("n")?).await?;
        let read = coverage.intervals.len();
        ensure_eq!(coverage.partitions.len(), read, "partitions that were read with as many intervals as were written with them");
        ensure!(read >= last, "{read} of what was completed were read after {last}");
        last = read;
        readings += 1;
        if let Some(joined) = writer.try_join_next() {
            joined.map_err(|error| Fault::new(format!("a task of the case ended badly: {error}")))??;
        }
        tokio::task::yield_now().await;
    }
    while let Some(joined) = writer.join_next().await {
        joined.map_err(|error| Fault::new(format!("a task of the case ended badly: {error}")))??;
    }
    Ok(())
}

pub(super) async fn a_dropped_commit_leaves_the_store_whole(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.write("run", vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    for round in 0..24_u64 {
        let rows = NodeUpdate::success().row_count(round);
        let mut chain = bench.chain("run").await?;
        let entry = chain.entry(vec![set("a", rows.clone())?, set("b", rows)?])?;
        let batch = Arc::new(Batch::new(vec![entry]));
        let sending = commit(&bench.backend, Arc::clone(&batch));
        if round % 3 == 0 {
            drop(sending);
        } else {
            // Dropped after its first step, or a little later; it may also be done.
            let patience = Duration::from_micros(if round % 3 == 1 { 0 } else { 50 * round });
            if let Ok(answer) = tokio::time::timeout(patience, sending).await {
                answer?;
            }
        }
        let seen = bench.state("run").await?;
        ensure_eq!(
            node(&seen, "a")?.row_count,
            node(&seen, "b")?.row_count,
            "round {round}: a dropped commit is whole or not at all"
        );
        // Whatever became of it: the same batch sent again settles it, once.
        let answer = commit(&bench.backend, Arc::clone(&batch)).await?;
        ensure_matches!(answer.outcomes.as_slice(), [Outcome::Applied(_)], "round {round}: the batch, sent again");
        let run = bench.state("run").await?;
        ensure_eq!(Some(&run), chain.tip(), "round {round}: a batch that was dropped and sent again is applied once");
        ensure_eq!(commit(&bench.backend, batch).await?, answer, "round {round}: the answer stays");
    }
    let before = bench.state("run").await?;
    let bench = bench.reopen().await?;
    ensure_eq!(bench.state("run").await?, before, "after reopening");
    Ok(())
}

pub(super) async fn a_closed_store_refuses(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let run = bench.create("run", 0).await?;
    bench.backend.close().await?;
    let batch = Arc::new(Batch::new(vec![Chain::on(&run).entry(vec![set("n", NodeUpdate::running())?])?]));
    match bench.backend.commit(Arc::clone(&batch)).await {
        Ok(answer) => return Err(Fault::new(format!("a commit after close must be refused, found {answer:?}"))),
        Err(error) => {
            ensure_eq!(error.kind(), StoreErrorKind::Closed, "a commit after close");
            ensure!(!error.is_unknown_outcome(), "a commit after close has not happened, and says so");
        }
    }
    bench.backend.close().await.map_err(|error| Fault::new(format!("closing twice: {error}")))?;
    let bench = bench.reopen().await?;
    ensure_eq!(bench.state("run").await?, run, "what was stored before the close");
    ensure_matches!(
        commit(&bench.backend, batch).await?.outcomes.as_slice(),
        [Outcome::Applied(_)],
        "a commit after opening again"
    );
    Ok(())
}

pub(super) async fn sound_and_checkpointed(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    for round in 0..4_i64 {
        let name = format!("run {round}");
        bench.write(&name, vec![create(round), set("n", NodeUpdate::running())?, add_interval("n", 0, 5)?]).await?;
        bench.backend.checkpoint().await?;
        bench
            .write(&name, vec![set("n", NodeUpdate::success())?, Mutation::Update { update: RunUpdate::success(), at: at(90) }])
            .await?;
        if round == 2 {
            bench.write(&name, vec![Mutation::Delete { keep_coverage: true }]).await?;
            ensure_eq!(
                bench.refused(Chain::of_new(run_id("run 1")?).entry(vec![create(0)])?).await?,
                Refusal::RunExists { run: run_id("run 1")? },
                "a run that is there"
            );
        }
        let (before, retained) = (bench.everything().await?, bench.backend.retained().await?);
        bench.backend.checkpoint().await?;
        bench.backend.checkpoint().await?;
        ensure_eq!(bench.everything().await?, before, "a checkpoint changes nothing");
        let report = bench.backend.verify().await?;
        ensure!(report.is_sound(), "a store that nobody damaged is sound, found {:?}", report.problems);
        if round % 2 == 1 {
            bench = bench.reopen().await?;
            ensure_eq!(bench.everything().await?, before, "after a checkpoint and reopening");
            ensure_eq!(bench.backend.retained().await?, retained, "what is retained, after a checkpoint and reopening");
        }
    }
    let run = bench.state("run 3").await?;
    ensure_eq!(node(&run, "n")?.status, NodeStatus::Success, "the last write");
    Ok(())
}
