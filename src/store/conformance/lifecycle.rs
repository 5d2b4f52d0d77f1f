//! Runs come, change and go: creation, import, every mutation, versions, what is missing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Chain;
use super::Harness;
use super::kit::{
    Bench, Fault, add_interval, add_partition, all_foreign_kept, applied, at, create, ensure, ensure_eq, ensure_matches, node,
    node_id, nth, partition, refused, relative, run_id, set, set_at, span, versions, without_extra,
};
use crate::model::{
    Attempt, CommitSeq, Entry, FencingToken, Fingerprint, Metadata, Mutation, NewRun, NodeState, NodeStatus, NodeUpdate,
    ProcessInfo, RawJson, Refusal, RunHeader, RunImport, RunQuery, RunState, RunStatus, RunUpdate, Version,
};

pub(super) async fn a_fresh_store_is_empty(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let backend = &bench.backend;
    ensure!(!backend.name().is_empty(), "a backend has a name");
    ensure!(bench.load("run_1").await?.is_none(), "a fresh store has no run");
    ensure!(backend.run_version(&run_id("run_1")?).await?.is_none(), "a run that is not there has no version");
    ensure!(bench.list(RunQuery::default()).await?.is_empty(), "a fresh store lists no run");
    ensure!(backend.list_leases().await?.is_empty(), "a fresh store has no lease");
    ensure!(backend.node_ids().await?.is_empty(), "a fresh store knows no node");
    ensure!(backend.retained().await?.is_empty(), "a fresh store retains nothing");
    ensure!(backend.latest_node(&node_id("n")?).await?.is_none(), "a fresh store has no latest node");
    ensure!(backend.last_success(&node_id("n")?).await?.is_none(), "a fresh store has no last success");
    ensure!(backend.coverage(&node_id("n")?).await?.is_empty(), "a fresh store has no coverage");
    Ok(())
}

pub(super) async fn a_run_is_created_once(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let new = NewRun::pending().started_at(at(5)).metadata("trigger", "cron").metadata("depth", 3);
    let receipt = bench.write("run_1", vec![Mutation::Create { run: new, at: at(10) }]).await?;
    let (before, after) = versions(&receipt)?;
    ensure_eq!(before, Version::NONE, "the version before a creation");
    ensure!(after > Version::NONE, "a run that is there has a version above zero");
    let run = bench.state("run_1").await?;
    ensure_eq!(run.version(), after, "the stored version is the one of the receipt");
    ensure_eq!(run.created_version(), after, "the version at which it was created");
    ensure_eq!(run.header().version, after, "the version of the header");
    ensure_eq!(run.header().status, RunStatus::Pending, "the status");
    ensure_eq!(run.header().created_at, at(10), "the stamp of creation");
    ensure_eq!(run.header().started_at, Some(at(5)), "a given start wins");
    ensure_eq!(run.header().metadata.to_raw().as_str(), "{\"trigger\":\"cron\",\"depth\":3}", "the notes, in their order");
    ensure_eq!(run.node_count(), 0, "a new run has no nodes");

    let again = Chain::of_new(run_id("run_1")?).entry(vec![create(20)])?;
    ensure_eq!(bench.refused(again).await?, Refusal::RunExists { run: run_id("run_1")? }, "creating a run that is there");
    let import =
        Mutation::Import(Box::new(RunImport { header: RunHeader::new(RunStatus::Failed, at(0)), nodes: BTreeMap::new() }));
    let again = Chain::of_new(run_id("run_1")?).entry(vec![import])?;
    ensure_eq!(bench.refused(again).await?, Refusal::RunExists { run: run_id("run_1")? }, "importing a run that is there");
    ensure_eq!(bench.state("run_1").await?, run, "a refused creation changes nothing");

    let running = bench.create("run_2", 30).await?;
    ensure_eq!(running.header().started_at, Some(at(30)), "a run that is created running started then");
    bench.write("run_3", vec![create(40), set("n", NodeUpdate::running())?, add_interval("n", 0, 10)?]).await?;
    let made = bench.state("run_3").await?;
    ensure_eq!(made.node_count(), 1, "a creation and its first nodes are one entry");
    ensure_eq!(node(&made, "n")?.version, made.version(), "a row of the creating entry");
    Ok(())
}

/// A run in which every field is set, as another store would hand it over.
pub(super) fn rich_import() -> Result<RunImport, Fault> {
    let mut header = RunHeader::new(RunStatus::Failed, at(100));
    header.started_at = Some(at(101));
    header.finished_at = Some(at(200));
    header.worker = Some(ProcessInfo::current(at(99)));
    header.metadata.insert("owner", RawJson::string("data team"));
    header.extra = Some(RawJson::parse(
        "{\"schema_version\":\"2.0\",\"config\":{\"z\":1.50,\"a\":[]},\"last_run\":\"2024-01-01T00:01:41\",\"run_id\":\"imported\",\"status\":\"failed\"}",
    )?);
    let mut nodes = BTreeMap::new();
    for (index, status) in
        [NodeStatus::Pending, NodeStatus::Running, NodeStatus::Success, NodeStatus::Failed].into_iter().enumerate()
    {
        let count = u64::try_from(index).unwrap_or(0);
        let mut node = NodeState::new(status);
        node.attempt = 3;
        node.started_at = Some(at(110));
        node.finished_at = Some(at(120));
        node.duration_ms = Some(10_000 + count);
        node.row_count = Some(1_000 + count);
        node.fingerprint = Some(Fingerprint::from_raw(RawJson::parse("{\"content_hash\":\"c\",\"schema_hash\":\"s\"}")?)?);
        node.error = Some(Arc::from("it was \"odd\"\nand had two lines"));
        node.watermarks.insert("last_watermark", RawJson::string("2024-01-01"));
        node.metadata.insert("b", RawJson::parse("[1, 2]")?);
        node.metadata.insert("a", RawJson::parse("null")?);
        node.intervals = Arc::new([span(0, 10)?, span(20, 30)?].into_iter().collect());
        node.partitions = Arc::new([partition("dt=2024-01-02")?, partition("dt=2024-01-01")?].into_iter().collect());
        node.extra = Some(RawJson::parse("{\"hash\":\"h\",\"x\":1e-300}")?);
        node.depends_on = [node_id("bare")?, node_id("not in this run")?].into_iter().collect();
        node.max_attempts = Some(u32::MAX);
        node.worker = Some(Arc::from("worker \"7\"\n"));
        node.token = Some(FencingToken(1_000 + count));
        let mut first = Attempt::new(1, NodeStatus::Running);
        first.started_at = Some(at(90));
        let mut second = Attempt::new(2, NodeStatus::Failed);
        second.started_at = Some(at(95));
        second.finished_at = Some(at(96));
        second.duration_ms = Some(u64::MAX);
        second.error = Some(Arc::from("it was \"odd\"\u{0}"));
        second.worker = Some(Arc::from("worker 6"));
        second.token = Some(FencingToken(17));
        node.attempts = [first, second].into_iter().collect();
        nodes.insert(node_id(&format!("node {index}"))?, Arc::new(node));
    }
    nodes.insert(node_id("bare")?, Arc::new(NodeState::new(NodeStatus::Cached)));
    Ok(RunImport { header, nodes })
}

pub(super) async fn a_run_is_imported_whole(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let import = rich_import()?;
    let receipt = bench.write("imported", vec![Mutation::Import(Box::new(import.clone()))]).await?;
    let (before, after) = versions(&receipt)?;
    ensure_eq!(before, Version::NONE, "the version before an import");
    let bench = bench.reopen().await?;
    let run = bench.state("imported").await?;
    ensure_eq!(run.version(), after, "the version of an imported run");
    let nodes = import.nodes.iter().map(|(id, node)| (id.clone(), NodeState { version: after, ..NodeState::clone(node) }));
    let header = RunHeader { version: after, ..import.header };
    let expected = RunState::from_parts(run_id("imported")?, header, after, after, nodes);
    ensure_eq!(without_extra(&run), without_extra(&expected), "an imported run");
    all_foreign_kept(&run, &expected, "an imported run")?;
    bench.write("imported", vec![set("bare", NodeUpdate::success())?]).await?;
    let changed = bench.state("imported").await?;
    ensure_eq!(changed.node("node 2"), run.node("node 2"), "a node beside the changed one");
    ensure_eq!(changed.header(), run.header(), "the header beside a changed node");
    Ok(())
}

/// Does every mutation, one an entry, and compares with the model after each.
pub(super) async fn every_mutation_is_stored(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let steps: Vec<Vec<Mutation>> = vec![
        vec![create(0)],
        vec![Mutation::Update { update: RunUpdate::new().metadata("a", 1).metadata("b", "two"), at: at(1) }],
        vec![Mutation::Update { update: RunUpdate::new().remove_metadata("a").started_at(at(-5)), at: at(2) }],
        vec![set_at("n", NodeUpdate::new(), 3)?],
        vec![set_at("n", NodeUpdate::running().metadata("k", "v"), 4)?],
        vec![set_at("n", NodeUpdate::failed("no such table").row_count(7), 5)?],
        vec![set_at("n", NodeUpdate::running(), 6)?],
        vec![set_at("n", NodeUpdate::success().fingerprint("abc").watermark("w", "9").remove_metadata("k"), 7)?],
        vec![set_at("n", NodeUpdate::new().clear_row_count().clear_fingerprint(), 8)?],
        vec![add_interval("n", 0, 10)?],
        vec![add_interval("n", 10, 20)?],
        vec![Mutation::RemoveInterval { node: node_id("n")?, interval: span(5, 6)? }],
        vec![add_partition("n", "dt=1")?, add_partition("n", "dt=2")?],
        vec![Mutation::RemovePartition { node: node_id("n")?, partition: partition("dt=1")? }],
        vec![add_interval("made by interval", 0, 1)?, add_partition("made by partition", "p")?],
        vec![set_at("n", NodeUpdate::skipped(), 9)?, set_at("made by partition", NodeUpdate::cached(), 9)?],
        vec![Mutation::RemoveInterval { node: node_id("n")?, interval: span(0, 20)? }],
        vec![Mutation::RemovePartition { node: node_id("n")?, partition: partition("dt=2")? }],
        vec![Mutation::DeleteNode { node: node_id("n")? }],
        vec![set_at("n", NodeUpdate::pending(), 10)?],
        vec![Mutation::DeleteNode { node: node_id("n")? }, set_at("n", NodeUpdate::running(), 11)?, add_interval("n", 3, 4)?],
        vec![Mutation::Update { update: RunUpdate::failed(), at: at(12) }],
        vec![Mutation::Update { update: RunUpdate::running(), at: at(13) }],
        vec![Mutation::Update { update: RunUpdate::cancelled().finished_at(at(50)), at: at(14) }],
        vec![],
    ];
    let mut chain = Chain::of_new(run_id("run")?);
    for (index, mutations) in steps.into_iter().enumerate() {
        let entry = chain.entry(mutations.clone())?;
        // What goes down stands on what is stored; the chain of the model beside it only says what must come out.
        let receipt = bench.write("run", mutations).await?;
        ensure_eq!(receipt.runs.len(), entry.parts.len(), "step {index}: a receipt names the entry's runs");
        if index % 7 == 6 {
            bench = bench.reopen().await?;
        }
        let Some(expected) = chain.tip() else { return Err(Fault::new("the case is wrong: no run")) };
        ensure_eq!(relative(&bench.state("run").await?), relative(expected), "after step {index}");
    }
    bench.write("run", vec![Mutation::Delete { keep_coverage: false }]).await?;
    ensure!(bench.load("run").await?.is_none(), "a deleted run is gone");
    let bench = bench.reopen().await?;
    ensure!(bench.load("run").await?.is_none(), "a deleted run is gone after reopening");
    Ok(())
}

pub(super) async fn removing_from_a_node_that_is_not_there_makes_none(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let first = bench.create("run", 0).await?.version();
    let interval = |node: &str| Ok::<_, Fault>(Mutation::RemoveInterval { node: node_id(node)?, interval: span(0, 1)? });
    let key = |node: &str| Ok::<_, Fault>(Mutation::RemovePartition { node: node_id(node)?, partition: partition("p")? });
    let steps = vec![
        vec![interval("a")?],
        vec![key("b")?],
        vec![key("made")?, add_interval("made", 0, 2)?, interval("made")?],
        vec![add_partition("gone", "p")?],
        vec![key("gone")?, Mutation::DeleteNode { node: node_id("gone")? }, interval("gone")?],
        vec![interval("gone")?, key("made")?],
    ];
    let mut version = first;
    for (index, mutations) in steps.into_iter().enumerate() {
        let receipt = bench.write("run", mutations).await?;
        ensure_eq!(versions(&receipt)?, (version, version.next()), "step {index}: it is an entry like any other");
        version = version.next();
    }
    for run in [bench.state("run").await?, bench.reopen().await?.state("run").await?] {
        ensure_eq!(run.nodes().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["made"], "the nodes that are there");
        ensure_eq!(node(&run, "made")?.intervals.iter().collect::<Vec<_>>(), [span(1, 2)?], "what was not taken out");
        ensure_eq!(run.version(), version, "the run's version");
    }
    Ok(())
}

pub(super) async fn every_node_field_is_stored(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let update = NodeUpdate::failed("boom \u{1F4A5}")
        .attempt(4)
        .started_at(at(1))
        .finished_at(at(3))
        .duration(Duration::from_millis(1_234))
        .row_count(0)
        .fingerprint("")
        .watermark("last_watermark", "2024-01-01T00:00:00")
        .watermark("pg_last_watermark", "")
        .metadata("", "an empty key")
        .metadata("nested", serde_json::json!({ "list": [null, true, -0.5, "x"] }))
        .depends_on(["b", "a", "b"])
        .max_attempts(9)
        .worker("worker 1");
    bench.write("run", vec![create(0), set("n", update)?]).await?;
    let bench = bench.reopen().await?;
    let run = bench.state("run").await?;
    let found = node(&run, "n")?;
    let mut expected = NodeState::new(NodeStatus::Failed);
    expected.attempt = 4;
    expected.started_at = Some(at(1));
    expected.finished_at = Some(at(3));
    expected.duration_ms = Some(1_234);
    expected.row_count = Some(0);
    expected.fingerprint = Some(Fingerprint::text(""));
    expected.error = Some(Arc::from("boom \u{1F4A5}"));
    expected.watermarks.insert("last_watermark", RawJson::string("2024-01-01T00:00:00"));
    expected.watermarks.insert("pg_last_watermark", RawJson::string(""));
    expected.metadata = Metadata::new();
    expected.metadata.insert("", RawJson::string("an empty key"));
    expected.metadata.insert("nested", RawJson::parse("{\"list\":[null,true,-0.5,\"x\"]}")?);
    expected.depends_on = [node_id("b")?, node_id("a")?].into_iter().collect();
    expected.max_attempts = Some(9);
    expected.worker = Some(Arc::from("worker 1"));
    expected.version = run.version();
    ensure_eq!(*found, expected, "a node with every field");
    Ok(())
}

pub(super) async fn versions_grow_by_one_and_rows_carry_them(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let first = bench.create("run", 0).await?.version();
    let step = |count: u64| Version(first.0 + count);
    let receipt = bench.write("run", vec![set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
    ensure_eq!(versions(&receipt)?, (first, step(1)), "an entry of two mutations is one version");
    bench.create("another", 1).await?;
    let receipt = bench.write("run", vec![set("b", NodeUpdate::success())?]).await?;
    ensure_eq!(versions(&receipt)?, (step(1), step(2)), "another run's entries do not count");
    bench.write("run", vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(5) }]).await?;
    bench.write("run", vec![Mutation::DeleteNode { node: node_id("a")? }]).await?;
    let bench = bench.reopen().await?;
    let receipt = bench.write("run", vec![add_interval("c", 0, 1)?]).await?;
    ensure_eq!(versions(&receipt)?, (step(4), step(5)), "versions go on after reopening");
    let run = bench.state("run").await?;
    ensure_eq!(run.version(), step(5), "the run's version");
    ensure_eq!(run.created_version(), first, "the version of its creation");
    ensure_eq!(run.header().version, step(3), "the header's version");
    ensure_eq!(node(&run, "b")?.version, step(2), "an untouched node keeps its version");
    ensure_eq!(node(&run, "c")?.version, step(5), "a touched node carries the version of the entry");
    ensure!(run.node("a").is_none(), "a deleted node is gone");
    ensure_eq!(bench.backend.run_version(run.id()).await?, Some(step(5)), "run_version");
    Ok(())
}

pub(super) async fn versions_are_never_used_again(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let mut highest = Version::NONE;
    for round in 0..4 {
        let run = bench.create("run", round).await?;
        ensure!(
            run.version() > highest,
            "round {round}: a run was made again at version {}, after version {highest} was used",
            run.version()
        );
        ensure_eq!(run.node_count(), 0, "a run that is made again has none of the old nodes");
        bench.write("run", vec![set("n", NodeUpdate::running())?]).await?;
        bench.write("run", vec![add_interval("n", 0, 5)?, add_partition("n", "p")?]).await?;
        highest = bench.state("run").await?.version();
        let receipt = bench.write("run", vec![Mutation::Delete { keep_coverage: round % 2 == 0 }]).await?;
        let (before, after) = versions(&receipt)?;
        ensure_eq!(before, highest, "the version before a deletion");
        ensure!(after >= before, "the version after a deletion");
        highest = after;
        if round % 2 == 1 {
            bench = bench.reopen().await?;
        }
    }
    Ok(())
}

pub(super) async fn what_is_missing_is_refused(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let missing = Refusal::RunNotFound { run: run_id("run")? };
    let nowhere = Chain::of_new(run_id("run")?);
    let mutations = vec![
        set("n", NodeUpdate::running())?,
        add_interval("n", 0, 1)?,
        add_partition("n", "p")?,
        Mutation::RemoveInterval { node: node_id("n")?, interval: span(0, 1)? },
        Mutation::RemovePartition { node: node_id("n")?, partition: partition("p")? },
        Mutation::DeleteNode { node: node_id("n")? },
        Mutation::Update { update: RunUpdate::success(), at: at(1) },
        Mutation::Delete { keep_coverage: true },
    ];
    for mutation in &mutations {
        let entry = Entry { parts: vec![nowhere.unchecked(Vec::new(), vec![mutation.clone()])], ..Entry::default() };
        ensure_eq!(bench.refused(entry).await?, missing, "{mutation:?} on a run that is not there");
    }
    ensure!(bench.load("run").await?.is_none(), "a refused write makes no run");

    bench.create("run", 0).await?;
    bench.write("run", vec![set("n", NodeUpdate::running())?]).await?;
    let old = bench.chain("run").await?;
    let entry =
        Entry { parts: vec![old.unchecked(Vec::new(), vec![Mutation::DeleteNode { node: node_id("m")? }])], ..Entry::default() };
    ensure_eq!(
        bench.refused(entry).await?,
        Refusal::NodeNotFound { run: run_id("run")?, node: node_id("m")? },
        "deleting a node that is not there"
    );

    // What was decided on a run that was deleted belongs to nobody, also when its name is used again.
    bench.write("run", vec![Mutation::Delete { keep_coverage: false }]).await?;
    ensure_eq!(
        bench.refused(old.clone().entry(vec![set("n", NodeUpdate::success())?])?).await?,
        missing,
        "a write on a deleted run"
    );
    let again = bench.create("run", 5).await?;
    for mutation in
        [set("n", NodeUpdate::success())?, set("new", NodeUpdate::success())?, Mutation::Delete { keep_coverage: false }]
    {
        let entry = old.clone().entry(vec![mutation.clone()])?;
        ensure_eq!(bench.refused(entry).await?, missing, "{mutation:?}, decided before the run was deleted and made again");
    }
    ensure_eq!(bench.state("run").await?, again, "what belonged to the deleted run changes nothing");
    Ok(())
}

pub(super) async fn an_entry_that_makes_no_sense_is_refused(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let run = bench.create("run", 0).await?;
    let chain = Chain::on(&run);
    let parts = vec![
        chain.clone().part(Vec::new(), vec![set("a", NodeUpdate::running())?])?,
        chain.clone().part(Vec::new(), vec![set("b", NodeUpdate::running())?])?,
    ];
    ensure_matches!(
        bench.refused(Entry { parts, ..Entry::default() }).await?,
        Refusal::Input(_),
        "an entry that names a run twice"
    );
    let on = vec![Mutation::Delete { keep_coverage: false }, set("a", NodeUpdate::running())?];
    let entry = Entry { parts: vec![chain.unchecked(Vec::new(), on)], ..Entry::default() };
    ensure_matches!(bench.refused(entry).await?, Refusal::Input(_), "an entry that deletes a run and goes on");
    ensure_eq!(bench.state("run").await?, run, "an entry that makes no sense changes nothing");
    Ok(())
}

pub(super) async fn the_sequence_grows_with_every_entry(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let mut last: Option<CommitSeq> = None;
    let mut grew = |seq: CommitSeq| {
        let grew = last.is_none_or(|last| seq > last);
        last = Some(seq);
        grew
    };
    for round in 0..3 {
        let mut entries = Vec::new();
        for index in 0..5 {
            let mut chain = bench.chain(&format!("run {index}")).await?;
            if round == 0 {
                entries.push(chain.entry(vec![create(index)])?);
            } else {
                entries.push(chain.entry(vec![set("n", NodeUpdate::running())?])?);
                entries.push(chain.entry(vec![set("n", NodeUpdate::success())?])?);
            }
        }
        let refusable = Chain::of_new(run_id("run 0")?).entry(vec![create(9)])?;
        entries.push(refusable);
        let outcomes = bench.send(entries).await?;
        let Some((duplicate, fine)) = outcomes.split_last() else { return Err(Fault::new("no outcome")) };
        refused(duplicate.clone())?;
        for (index, outcome) in fine.iter().enumerate() {
            let seq = applied(outcome.clone())?.seq;
            ensure!(grew(seq), "round {round}: entry {index} got sequence {seq}, which is not above the one before");
        }
        nth(&outcomes, 0)?;
        bench = bench.reopen().await?;
    }
    Ok(())
}
