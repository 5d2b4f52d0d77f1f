//! Questions about many runs: listings, pages, latest nodes, last successes, coverage, and what outlives deleted runs.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};

use super::Harness;
use super::kit::{
    Bench, Fault, add_interval, add_partition, at, create, ensure, ensure_eq, node, node_id, partition, run_id, set, set_at, span,
};
use crate::model::{
    Entry, Fingerprint, IntervalSet, LastSuccess, Mutation, NewRun, NodeCoverage, NodeId, NodeStatus, NodeUpdate, Retained,
    RunFilter, RunQuery, RunState, RunStatus, RunSummary, RunUpdate,
};

async fn names(bench: &Bench<'_>, query: RunQuery) -> Result<Vec<String>, Fault> {
    Ok(bench.list(query).await?.iter().map(|run| run.run_id.to_string()).collect())
}

pub(super) async fn runs_are_listed_newest_first(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    // By the stamp of creation, then by id: not by the order of the commits, and not by when they started.
    for (id, seconds) in [("c", 20), ("a", 30), ("b", 20), ("e", -1_000_000_000), ("B", 20), ("d", 20)] {
        bench.write(id, vec![Mutation::Create { run: NewRun::pending().started_at(at(-seconds)), at: at(seconds) }]).await?;
    }
    for _ in 0..2 {
        ensure_eq!(names(&bench, RunQuery::default()).await?, ["a", "d", "c", "b", "B", "e"], "all runs, newest first");
        for (before, newest) in [
            (None, Some(at(30))),
            (Some(DateTime::<Utc>::MAX_UTC), Some(at(30))),
            (Some(at(30)), Some(at(20))),
            (Some(at(20) + TimeDelta::nanoseconds(1)), Some(at(20))),
            (Some(at(-1_000_000_000)), None),
            (Some(DateTime::<Utc>::MIN_UTC), None),
        ] {
            ensure_eq!(bench.backend.newest_creation(before).await?, newest, "when the newest run before {before:?} was made");
        }
        bench.write("c", vec![set("n", NodeUpdate::running())?]).await?;
        bench = bench.reopen().await?;
    }
    bench.write("d", vec![Mutation::Delete { keep_coverage: false }]).await?;
    ensure_eq!(names(&bench, RunQuery::default()).await?, ["a", "c", "b", "B", "e"], "without the deleted run");
    bench.create("d", 40).await?;
    ensure_eq!(names(&bench, RunQuery::default()).await?, ["d", "a", "c", "b", "B", "e"], "with the run that was made again");
    Ok(())
}

pub(super) async fn filters_select(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let paused = RunStatus::parse("paused");
    for (id, seconds, status) in [
        ("run_1", 10, RunStatus::Running),
        ("run_2", 20, RunStatus::Success),
        ("RUN_3", 30, RunStatus::Running),
        ("runx4", 40, paused.clone()),
        ("run%5", 50, RunStatus::Failed),
        ("r*n6", 60, RunStatus::Cancelled),
    ] {
        bench.write(id, vec![Mutation::Create { run: NewRun::status(status), at: at(seconds) }]).await?;
    }
    let all = RunFilter::all;
    let nano = TimeDelta::nanoseconds(1);
    let cases: Vec<(RunFilter, &[&str])> = vec![
        (all().status(RunStatus::Running), &["RUN_3", "run_1"]),
        (all().status(RunStatus::Success).status(paused), &["runx4", "run_2"]),
        (all().status(RunStatus::Pending), &[]),
        (all().created_from(at(40)), &["r*n6", "run%5", "runx4"]),
        (all().created_before(at(20)), &["run_1"]),
        (all().created_from(at(20)).created_before(at(40)), &["RUN_3", "run_2"]),
        (all().created_from(at(20)).created_before(at(20)), &[]),
        // A bound that is finer than what is kept lies between two stamps; one beyond the calendar is one all the same.
        (all().created_from(at(40) + nano), &["r*n6", "run%5"]),
        (all().created_before(at(20) + nano), &["run_2", "run_1"]),
        (all().created_from(at(20) - nano).created_before(at(40) - nano), &["RUN_3", "run_2"]),
        (all().created_from(DateTime::<Utc>::MAX_UTC), &[]),
        (all().created_from(DateTime::<Utc>::MIN_UTC).created_before(at(20)), &["run_1"]),
        (all().created_from(at(60)).created_before(DateTime::<Utc>::MAX_UTC), &["r*n6"]),
        (all().created_before(DateTime::<Utc>::MIN_UTC), &[]),
        (all().id_prefix("run_"), &["run_2", "run_1"]),
        (all().id_prefix("run%"), &["run%5"]),
        (all().id_prefix("r*"), &["r*n6"]),
        (all().id_prefix("RUN"), &["RUN_3"]),
        (all().id_prefix("run_1"), &["run_1"]),
        (all().id_prefix("run_11"), &[]),
        (all().id_prefix(""), &["r*n6", "run%5", "runx4", "RUN_3", "run_2", "run_1"]),
        (all().status(RunStatus::Running).id_prefix("run").created_from(at(0)), &["run_1"]),
    ];
    for (filter, expected) in cases {
        ensure_eq!(names(&bench, RunQuery::new(filter.clone())).await?, expected, "the runs of {filter:?}");
        ensure_eq!(names(&bench, RunQuery::new(filter.clone()).limit(1)).await?, expected, "the runs of {filter:?}, one a page");
    }
    bench.write("run_1", vec![Mutation::Update { update: RunUpdate::success(), at: at(70) }]).await?;
    ensure_eq!(names(&bench, RunQuery::new(all().status(RunStatus::Running))).await?, ["RUN_3"], "after a change of status");
    Ok(())
}

pub(super) async fn pages_visit_every_run_once(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let mut expected = Vec::new();
    let mut entries = Vec::new();
    // Many runs share a stamp, so that a page ends among equals.
    for index in 0_i64..47 {
        let (id, seconds) = (format!("run {:02}", index * 7 % 47), index / 20);
        entries.push(super::Chain::of_new(run_id(&id)?).entry(vec![create(seconds)])?);
        expected.push((seconds, id));
    }
    for outcome in bench.send(entries).await? {
        super::kit::applied(outcome)?;
    }
    expected.sort();
    expected.reverse();
    let expected: Vec<String> = expected.into_iter().map(|(_, id)| id).collect();
    for limit in [1, 2, 7, 20, 46, 47, 48, 1_000] {
        ensure_eq!(names(&bench, RunQuery::default().limit(limit)).await?, expected, "all pages of {limit}");
    }
    let exact = bench.backend.list_runs(&RunQuery::default().limit(47)).await?;
    ensure!(exact.next.is_none(), "a page that holds all runs names no next one");
    for (limit, counts_as) in [(0, 1), (usize::MAX, 1_000)] {
        let query = RunQuery { limit, ..RunQuery::default() };
        let page = bench.backend.list_runs(&query).await?;
        let same = bench.backend.list_runs(&RunQuery::default().limit(counts_as)).await?;
        ensure_eq!(page, same, "a page of {limit} is one of {counts_as}");
    }

    // A run that comes or goes between two pages shifts no other one.
    let first = bench.backend.list_runs(&RunQuery::default().limit(10)).await?;
    bench.create("newest", 1_000).await?;
    let Some(last) = first.runs.last() else { return Err(Fault::new("an empty page")) };
    bench.write(last.run_id.as_str(), vec![Mutation::Delete { keep_coverage: false }]).await?;
    let rest = names(&bench, RunQuery::default().limit(10).after(first.next)).await?;
    ensure_eq!(Some(rest.as_slice()), expected.get(10..), "the pages behind a run that was deleted meanwhile");
    Ok(())
}

pub(super) async fn summaries_count_nodes(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.write("empty", vec![create(5)]).await?;
    let mut mutations = vec![create(0)];
    for (index, status) in ["success", "success", "failed", "pending", "upstream_failed", "success"].into_iter().enumerate() {
        mutations.push(set(&format!("n{index}"), NodeUpdate::status(NodeStatus::parse(status)))?);
    }
    bench.write("run", mutations).await?;
    bench.write("run", vec![set("n0", NodeUpdate::running())?, Mutation::DeleteNode { node: node_id("n2")? }]).await?;
    let states = bench.everything().await?;
    let expected: Vec<RunSummary> = states.iter().map(RunSummary::of).collect();
    ensure_eq!(bench.list(RunQuery::default()).await?, expected, "the summaries");
    let counts: BTreeMap<NodeStatus, u64> = [("success", 2), ("running", 1), ("pending", 1), ("upstream_failed", 1)]
        .map(|(status, count)| (NodeStatus::parse(status), count))
        .into();
    ensure_eq!(expected.last().map(|summary| &summary.nodes), Some(&counts), "the counts");
    Ok(())
}

pub(super) async fn the_latest_node_is_that_of_the_newest_run(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let n = node_id("n")?;
    for (run, seconds) in [("new", 30), ("old", 10), ("middle", 20)] {
        bench
            .write(
                run,
                vec![create(seconds), set("n", NodeUpdate::success())?, set(&format!("only in {run}"), NodeUpdate::running())?],
            )
            .await?;
    }
    bench.create("newest", 40).await?;
    // Of two runs of one stamp the higher id is the newer one.
    let latest = async |expected: Option<&str>, what: &str| -> Result<(), Fault> {
        let found = bench.backend.latest_node(&n).await?;
        ensure_eq!(found.as_ref().map(|(run, _)| run.as_str()), expected, "the latest run of the node {what}");
        if let Some((run, state)) = found {
            ensure_eq!(state, *node(&bench.state(run.as_str()).await?, "n")?, "the latest state {what}");
        }
        Ok(())
    };
    latest(Some("new"), "among three").await?;
    bench.write("old", vec![set("n", NodeUpdate::running())?]).await?;
    latest(Some("new"), "after an older run wrote").await?;
    bench.write("new", vec![Mutation::DeleteNode { node: n.clone() }]).await?;
    latest(Some("middle"), "after the newest one lost it").await?;
    bench.write("middle", vec![Mutation::Delete { keep_coverage: true }]).await?;
    latest(Some("old"), "after a run was deleted").await?;
    bench.write("newest", vec![add_interval("n", 0, 1)?]).await?;
    latest(Some("newest"), "after a new one got it").await?;
    bench.write("newest 2", vec![create(40), set("n", NodeUpdate::running())?]).await?;
    latest(Some("newest 2"), "of two with one stamp").await?;
    let ids: BTreeSet<String> = bench.backend.node_ids().await?.iter().map(ToString::to_string).collect();
    for id in ["n", "only in new", "only in old"] {
        ensure!(ids.contains(id), "node {id:?} is among the known nodes {ids:?}");
    }
    for run in ["new", "old", "newest", "newest 2"] {
        bench.write(run, vec![Mutation::Delete { keep_coverage: false }]).await?;
    }
    latest(None, "after all runs were deleted").await
}

pub(super) async fn the_last_success_is_found(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let n = node_id("n")?;
    let rich = NodeUpdate::success().row_count(7).fingerprint("first").watermark("w", "10");
    bench.write("a", vec![create(10), set_at("n", rich, 12)?]).await?;
    bench.write("b", vec![create(20), set_at("n", NodeUpdate::failed("no"), 22)?]).await?;
    let expected = LastSuccess::of(&bench.state("a").await?, node(&bench.state("a").await?, "n")?);
    ensure_eq!(expected.as_ref().and_then(|success| success.row_count), Some(7), "the model's own answer");
    ensure_eq!(bench.backend.last_success(&n).await?, expected, "a failure in a newer run hides no success");
    ensure_eq!(bench.backend.last_success(&node_id("m")?).await?, None, "a node that never succeeded");

    // It outlives its run.
    bench.write("a", vec![Mutation::Delete { keep_coverage: true }]).await?;
    ensure_eq!(bench.backend.last_success(&n).await?, expected, "the last success of a deleted run");
    bench = bench.reopen().await?;
    ensure_eq!(bench.backend.last_success(&n).await?, expected, "the last success of a deleted run, reopened");
    // An older run's success does not replace a newer one's, whichever was deleted first.
    bench.write("older", vec![create(5), set_at("n", NodeUpdate::success().row_count(1), 100)?]).await?;
    ensure_eq!(bench.backend.last_success(&n).await?, expected, "an older run that succeeds later");
    bench.write("older", vec![Mutation::Delete { keep_coverage: true }]).await?;
    ensure_eq!(bench.backend.last_success(&n).await?, expected, "an older run that is deleted later");
    // A newer one does.
    bench.write("b", vec![set_at("n", NodeUpdate::success().row_count(9), 30)?]).await?;
    let newer = LastSuccess::of(&bench.state("b").await?, node(&bench.state("b").await?, "n")?);
    ensure_eq!(bench.backend.last_success(&n).await?, newer, "a newer success");
    bench.write("b", vec![set_at("n", NodeUpdate::running(), 31)?]).await?;
    ensure_eq!(bench.backend.last_success(&n).await?, expected, "a node that runs again in that run has not succeeded there");
    Ok(())
}

fn islands(spans: &[(i64, i64)]) -> Result<IntervalSet, Fault> {
    spans.iter().map(|(start, end)| span(*start, *end)).collect()
}

fn coverage_of(spans: &[(i64, i64)], partitions: &[&str]) -> Result<NodeCoverage, Fault> {
    let partitions = partitions.iter().map(|key| partition(key)).collect::<Result<_, _>>()?;
    Ok(NodeCoverage { intervals: islands(spans)?, partitions })
}

pub(super) async fn coverage_is_the_union_over_runs(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let n = node_id("n")?;
    bench.write("a", vec![create(1), add_interval("n", 0, 10)?, add_interval("n", 20, 30)?, add_partition("n", "p1")?]).await?;
    bench.write("b", vec![create(2), add_interval("n", 10, 15)?, add_interval("n", 25, 40)?, add_partition("n", "p2")?]).await?;
    bench.write("c", vec![create(3), add_interval("m", 15, 20)?]).await?;
    ensure_eq!(bench.backend.coverage(&n).await?, coverage_of(&[(0, 15), (20, 40)], &["p1", "p2"])?, "over two runs");
    bench.write("b", vec![Mutation::RemoveInterval { node: n.clone(), interval: span(0, 28)? }]).await?;
    ensure_eq!(
        bench.backend.coverage(&n).await?,
        coverage_of(&[(0, 10), (20, 40)], &["p1", "p2"])?,
        "after a restatement in one run"
    );
    bench.write("a", vec![Mutation::DeleteNode { node: n.clone() }]).await?;
    ensure_eq!(bench.backend.coverage(&n).await?, coverage_of(&[(28, 40)], &["p2"])?, "after the node was deleted in one run");
    ensure_eq!(bench.backend.coverage(&node_id("m")?).await?, coverage_of(&[(15, 20)], &[])?, "of another node");
    Ok(())
}

pub(super) async fn deleting_keeps_coverage_only_if_told(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let n = node_id("n")?;
    for (run, start) in [("kept", 0), ("dropped", 100), ("kept too", 5), ("alive", 200)] {
        let mutations = vec![
            create(start),
            set("n", NodeUpdate::success())?,
            add_interval("n", start, start + 10)?,
            add_partition("n", &format!("p{start}"))?,
            set(&format!("bare in {run}"), NodeUpdate::running())?,
        ];
        bench.write(run, mutations).await?;
    }
    bench.write("kept", vec![Mutation::Delete { keep_coverage: true }]).await?;
    bench.write("dropped", vec![Mutation::Delete { keep_coverage: false }]).await?;
    bench.write("kept too", vec![Mutation::Delete { keep_coverage: true }]).await?;
    for _ in 0..2 {
        ensure_eq!(
            bench.backend.coverage(&n).await?,
            coverage_of(&[(0, 15), (200, 210)], &["p0", "p5", "p200"])?,
            "what is complete after three deletions"
        );
        let retained: BTreeMap<NodeId, Retained> = bench.backend.retained().await?.into_iter().collect();
        let Some(kept) = retained.get(&n) else { return Err(Fault::new("the retained coverage of the node is missing")) };
        ensure_eq!(kept.coverage, coverage_of(&[(0, 15)], &["p0", "p5"])?, "what outlives the deleted runs");
        ensure_eq!(
            kept.last_success.as_ref().map(|success| success.run_id.as_str()),
            Some("kept too"),
            "the newest success among the deleted runs"
        );
        ensure!(!retained.contains_key("bare in kept"), "a node that completed nothing is not retained");
        ensure!(bench.backend.node_ids().await?.contains("n"), "a retained node is known");
        bench = bench.reopen().await?;
    }
    bench.write("alive", vec![Mutation::Delete { keep_coverage: false }]).await?;
    ensure_eq!(
        bench.backend.coverage(&n).await?,
        coverage_of(&[(0, 15)], &["p0", "p5"])?,
        "what is complete after all runs went"
    );
    // A run of the same name has no share in what the old one completed.
    bench.create("kept", 300).await?;
    ensure_eq!(bench.state("kept").await?.node_count(), 0, "a run that is made again");
    Ok(())
}

pub(super) async fn deleting_keeps_what_its_own_entry_did(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let goes = || Mutation::Delete { keep_coverage: true };
    bench.create("late", 10).await?;
    let done = vec![set("n", NodeUpdate::success().row_count(7))?, add_interval("n", 0, 10)?, add_partition("n", "p")?, goes()];
    bench.write("late", done).await?;
    bench.write("at once", vec![create(0), set("n", NodeUpdate::success())?, add_interval("n", 10, 20)?, goes()]).await?;
    let taken = vec![create(20), add_interval("n", 50, 60)?, set("gone", NodeUpdate::success())?, add_interval("gone", 0, 10)?];
    bench.write("taken back", taken).await?;
    let remove = Mutation::RemoveInterval { node: node_id("n")?, interval: span(50, 60)? };
    bench.write("taken back", vec![remove, Mutation::DeleteNode { node: node_id("gone")? }, goes()]).await?;
    for _ in 0..2 {
        ensure!(bench.list(RunQuery::default()).await?.is_empty(), "all runs are deleted");
        let retained: BTreeMap<NodeId, Retained> = bench.backend.retained().await?.into_iter().collect();
        ensure_eq!(retained.keys().map(NodeId::as_str).collect::<Vec<_>>(), ["n"], "the nodes of which something is kept");
        ensure_eq!(
            bench.backend.coverage(&node_id("n")?).await?,
            coverage_of(&[(0, 20)], &["p"])?,
            "what the entry completed that deleted the run"
        );
        let success = bench.backend.last_success(&node_id("n")?).await?;
        ensure_eq!(
            success.map(|success| (success.run_id.to_string(), success.row_count)),
            Some(("late".to_owned(), Some(7))),
            "a success of the entry that deleted the run"
        );
        bench = bench.reopen().await?;
    }
    Ok(())
}

pub(super) async fn the_later_deletion_of_one_run_tells_its_success(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    // The same run twice, as a move brings it back: same id, same stamp of creation.
    for rows in [1, 2] {
        bench.write("again", vec![create(10), set("n", NodeUpdate::success().row_count(rows))?]).await?;
        bench.write("again", vec![Mutation::Delete { keep_coverage: true }]).await?;
        bench = bench.reopen().await?;
        let success = bench.backend.last_success(&node_id("n")?).await?;
        ensure_eq!(success.and_then(|success| success.row_count), Some(rows), "the last success after deletion {rows}");
    }
    Ok(())
}

pub(super) async fn retained_history_joins(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let n = node_id("n")?;
    let success = |run: &str, seconds: i64, rows: u64| -> Result<Option<LastSuccess>, Fault> {
        let mut chain = super::Chain::of_new(run_id(run)?);
        chain.entry(vec![
            create(seconds),
            set_at("n", NodeUpdate::success().row_count(rows).fingerprint("f").watermark("w", "1"), seconds)?,
        ])?;
        let state: Option<&RunState> = chain.tip();
        Ok(state.and_then(|run| LastSuccess::of(run, run.node("n")?)))
    };
    let carry = |coverage: NodeCoverage, last_success: Option<LastSuccess>| -> Result<Entry, Fault> {
        let retained = Retained { coverage, last_success };
        Ok(Entry { retained: vec![(node_id("n")?, retained)], ..Entry::default() })
    };
    bench.applied(carry(coverage_of(&[(0, 10)], &["a"])?, success("gone 2", 20, 2)?)?).await?;
    bench.applied(carry(coverage_of(&[(10, 20), (30, 40)], &["b"])?, success("gone 1", 10, 1)?)?).await?;
    bench.applied(carry(NodeCoverage::default(), None)?).await?;
    for _ in 0..2 {
        let retained: BTreeMap<NodeId, Retained> = bench.backend.retained().await?.into_iter().collect();
        let Some(kept) = retained.get(&n) else { return Err(Fault::new("what was carried in is missing")) };
        ensure_eq!(kept.coverage, coverage_of(&[(0, 20), (30, 40)], &["a", "b"])?, "carried coverage joins");
        ensure_eq!(kept.last_success, success("gone 2", 20, 2)?, "the newer success stays");
        ensure_eq!(bench.backend.last_success(&n).await?, success("gone 2", 20, 2)?, "a carried success is found");
        ensure_eq!(
            kept.last_success.as_ref().and_then(|success| success.fingerprint.clone()),
            Some(Fingerprint::text("f")),
            "its fingerprint"
        );
        ensure_eq!(bench.backend.coverage(&n).await?, kept.coverage, "carried coverage counts");
        bench = bench.reopen().await?;
    }
    // It travels beside a run, and is refused with it.
    let mut beside = carry(coverage_of(&[(50, 60)], &[])?, None)?;
    beside.parts.push(super::Chain::of_new(run_id("missing")?).unchecked(Vec::new(), vec![set("n", NodeUpdate::running())?]));
    bench.refused(beside).await?;
    ensure_eq!(
        bench.backend.coverage(&n).await?,
        coverage_of(&[(0, 20), (30, 40)], &["a", "b"])?,
        "a refused entry carries nothing in"
    );
    Ok(())
}

pub(super) async fn reloading_finds_the_present_state(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench
        .write(
            "run",
            vec![create(0), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?, add_interval("a", 0, 9)?],
        )
        .await?;
    let mut have = vec![bench.state("run").await?];
    let steps = vec![
        vec![set("a", NodeUpdate::success())?],
        vec![Mutation::DeleteNode { node: node_id("b")? }, set("c", NodeUpdate::running())?],
        vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(1) }, add_partition("a", "p")?],
        vec![set("b", NodeUpdate::running())?],
        vec![Mutation::RemoveInterval { node: node_id("a")?, interval: span(3, 4)? }],
    ];
    for mutations in steps {
        bench.write("run", mutations).await?;
        let now = bench.state("run").await?;
        have.push(now.clone());
        for old in &have {
            let reloaded = bench.backend.reload_run(old).await?;
            ensure_eq!(reloaded.as_ref(), Some(&now), "a reload of version {} at version {}", old.version(), now.version());
        }
        ensure_eq!(bench.backend.run_version(now.id()).await?, Some(now.version()), "the version alone");
        let asked = [run_id("never")?, now.id().clone()];
        ensure_eq!(bench.backend.run_versions(&asked).await?, vec![None, Some(now.version())], "versions in the order asked");
        // Fewer than there are may come, and none that is wrong.
        let newest = bench.backend.newest_versions(10).await?;
        let is_wrong = |found: &&(_, _)| **found != (now.id().clone(), now.version());
        ensure_eq!(newest.iter().find(is_wrong), None, "the versions of the newest runs");
    }
    bench.write("run", vec![Mutation::Delete { keep_coverage: false }]).await?;
    for old in &have {
        ensure!(bench.backend.reload_run(old).await?.is_none(), "a reload of a deleted run");
    }
    bench.create("run", 50).await?;
    let now = bench.state("run").await?;
    for old in &have {
        ensure_eq!(bench.backend.reload_run(old).await?.as_ref(), Some(&now), "a reload of a run that was made again");
    }
    Ok(())
}
