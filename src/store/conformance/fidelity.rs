//! What was written is what is read: foreign text, large numbers, awkward names, many islands, and all of it after reopening.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::Harness;
use super::kit::{
    Bench, Fault, add_interval, add_partition, all_foreign_kept, at, create, ensure, ensure_eq, foreign_kept, node, node_id,
    partition, run_id, set, span, without_extra,
};
use super::lifecycle::rich_import;
use crate::model::{
    Fingerprint, Interval, IntervalSet, MAX_ATTEMPT_ERROR_BYTES, MAX_ATTEMPTS_KEPT, MAX_ID_BYTES, Metadata, Mutation, NewRun,
    NodeId, NodeState, NodeStatus, NodeUpdate, RawJson, RunHeader, RunImport, RunQuery, RunState, RunStatus, RunSummary,
    RunUpdate, time,
};

/// JSON whose tokens a parser would round, reorder or spell anew.
const FOREIGN: &str = concat!(
    r#"{"z":1e-300,"a":9007199254740993,"m":0.12366771697998047,"nul":"\u0000","esc":"\u65e5\/x","dup":1,"#,
    r#""big":123456789012345678901234567890,"neg":-0.0,"exp":1E+2,"last_run":"","list":[[],{},null,true],"":{"":""},"#,
    r#""quote":"'; DROP TABLE runs; --","text":"日本語 🎉 \\ \" \t"}"#
);

pub(super) async fn foreign_text_is_kept_token_for_token(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let raw = RawJson::parse(FOREIGN)?;
    let notes = Metadata::from_raw(&raw).ok_or_else(|| Fault::new("the case is wrong: no object"))?;
    let mut header = RunHeader::new(RunStatus::Success, at(0));
    header.metadata = notes.clone();
    header.extra = Some(raw.clone());
    let mut node_state = NodeState::new(NodeStatus::Success);
    node_state.metadata = notes.clone();
    node_state.watermarks = notes.clone();
    node_state.extra = Some(raw.clone());
    node_state.fingerprint = Some(Fingerprint::from_raw(raw.clone())?);
    node_state.error = Some(Arc::from("\u{0}\u{1}\u{7f} \r\n\t 🎉"));
    let mut odd = NodeState::new(NodeStatus::Cached);
    odd.fingerprint = Some(Fingerprint::from_raw(RawJson::parse(r#""\u0041bc""#)?)?);
    let nodes: BTreeMap<_, _> = [(node_id("n")?, Arc::new(node_state)), (node_id("odd")?, Arc::new(odd))].into();
    bench.write("run", vec![Mutation::Import(Box::new(RunImport { header, nodes: nodes.clone() }))]).await?;
    for round in 0..3 {
        let run = bench.state("run").await?;
        let text = |found: Option<&RawJson>| found.map(|raw| raw.as_str().to_owned());
        foreign_kept(run.header().extra.as_ref(), Some(&raw), &format!("round {round}, the run"))?;
        ensure_eq!(run.header().metadata, notes, "round {round}: the notes of a run");
        let found = node(&run, "n")?;
        foreign_kept(found.extra.as_ref(), Some(&raw), &format!("round {round}, the node"))?;
        ensure_eq!(
            text(found.fingerprint.as_ref().map(Fingerprint::as_raw)),
            Some(FOREIGN.to_owned()),
            "round {round}: a fingerprint"
        );
        for (id, expected) in &nodes {
            let plain = |node: &NodeState| NodeState { extra: None, ..node.without_version() };
            ensure_eq!(plain(node(&run, id.as_str())?), plain(expected), "round {round}: node {id:?}");
        }
        let listed = bench.list(RunQuery::default()).await?;
        ensure_eq!(listed.first().map(|summary| &summary.header), Some(run.header()), "round {round}: the header in a listing");
        // A change of something else leaves the foreign text alone.
        bench
            .write(
                "run",
                vec![
                    Mutation::Update { update: RunUpdate::new(), at: at(1) },
                    set("beside", NodeUpdate::new().row_count(round))?,
                ],
            )
            .await?;
        bench = bench.reopen().await?;
    }
    Ok(())
}

/// What claims need survives as it is: dependencies in their order, and a history that is bounded, cut and never overwritten.
pub(super) async fn attempts_are_kept_as_history(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    let needed = awkward();
    let first = NodeUpdate::new().depends_on(needed.iter().filter(|name| *name != "n")).max_attempts(3);
    bench.write("run", vec![create(0), set("n", first)?]).await?;
    let rounds = MAX_ATTEMPTS_KEPT + 5;
    for round in 0..rounds {
        bench
            .write(
                "run",
                vec![
                    set("n", NodeUpdate::running().worker(format!("w{round}")))?,
                    set("n", NodeUpdate::failed(format!("{round} {}", "é".repeat(MAX_ATTEMPT_ERROR_BYTES))))?,
                ],
            )
            .await?;
        if round % 50 == 49 {
            bench = bench.reopen().await?;
        }
    }
    // Somebody else takes over what still runs.
    bench.write("run", vec![set("n", NodeUpdate::running().worker("lost"))?]).await?;
    let last = u32::try_from(rounds + 2).unwrap_or(u32::MAX);
    bench.write("run", vec![set("n", NodeUpdate::running().attempt(last).worker("heir"))?]).await?;
    bench = bench.reopen().await?;
    let run = bench.state("run").await?;
    let found = node(&run, "n")?;
    let names: Vec<&str> = found.depends_on.iter().map(NodeId::as_str).collect();
    let expected: Vec<&str> = needed.iter().map(String::as_str).filter(|name| *name != "n").collect();
    ensure_eq!(names, expected, "what a node depends on, in its order");
    ensure_eq!((found.attempt, found.worker.as_deref(), found.max_attempts), (last, Some("heir"), Some(3)), "a node taken over");
    ensure_eq!(found.attempts.len(), MAX_ATTEMPTS_KEPT, "the newest attempts are kept");
    let numbers: Vec<u32> = found.attempts.iter().map(|attempt| attempt.number).collect();
    let newest: Vec<u32> = (1..last).collect();
    ensure_eq!(numbers.as_slice(), newest.get(newest.len() - MAX_ATTEMPTS_KEPT..).unwrap_or_default(), "attempts, oldest first");
    for attempt in found.attempts.iter().take(MAX_ATTEMPTS_KEPT - 1) {
        let error = attempt.error.as_deref().unwrap_or_default();
        ensure!(error.ends_with('…') && error.len() <= MAX_ATTEMPT_ERROR_BYTES, "a long error is cut in the history");
        let worker = format!("w{}", attempt.number - 1);
        ensure_eq!((attempt.worker.as_deref(), &attempt.status), (Some(worker.as_str()), &NodeStatus::Failed), "an old attempt");
    }
    let lost = found.attempts.last().map(|attempt| (attempt.worker.as_deref(), attempt.status.clone(), attempt.finished_at));
    ensure_eq!(lost, Some((Some("lost"), NodeStatus::Running, None)), "the attempt that was taken over");
    for wrong in
        [NodeUpdate::new().depends_on(["n"]), NodeUpdate::new().depends_on(["a\u{0}"]), NodeUpdate::new().max_attempts(0)]
    {
        let part = bench.chain("run").await?.unchecked(Vec::new(), vec![set("n", wrong)?]);
        let outcomes = bench.send(vec![crate::model::Entry { parts: vec![part], ..Default::default() }]).await?;
        let refusal = super::kit::refused(super::kit::nth(&outcomes, 0)?)?;
        ensure!(matches!(refusal, crate::model::Refusal::Input(_)), "what makes no sense is refused, not {refusal}");
    }
    Ok(())
}

/// What is taken out of a node again is gone, and nothing else with it, whichever of it is left.
pub(super) async fn what_is_cleared_is_gone(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let full = || NodeUpdate::failed("why").fingerprint("print").metadata("note", 1).depends_on(["other"]).max_attempts(3);
    let clearing: [fn(NodeUpdate) -> NodeUpdate; 5] = [
        NodeUpdate::clear_error,
        NodeUpdate::clear_fingerprint,
        |update| update.remove_metadata("note"),
        |update| update.depends_on(std::iter::empty::<NodeId>()),
        NodeUpdate::clear_max_attempts,
    ];
    bench.write("run", vec![create(0)]).await?;
    // Every choice of what is cleared, each on a node of its own.
    let chosen = |choice: usize| clearing.iter().enumerate().filter(move |(at, _)| choice & (1 << at) != 0);
    let choices = 0..1_usize << clearing.len();
    let name = |choice: usize| format!("n{choice}");
    let filled = choices.clone().map(|choice| set(&name(choice), full().row_count(7))).collect::<Result<Vec<_>, _>>()?;
    bench.write("run", filled).await?;
    let cleared = choices.clone().map(|choice| {
        let update = chosen(choice).fold(NodeUpdate::new(), |update, (_, clear)| clear(update));
        set(&name(choice), update)
    });
    bench.write("run", cleared.collect::<Result<Vec<_>, _>>()?).await?;
    let bench = bench.reopen().await?;
    let run = bench.state("run").await?;
    for choice in choices {
        let found = node(&run, &name(choice))?;
        let there = [
            found.error.as_deref() == Some("why"),
            found.fingerprint.is_some(),
            !found.metadata.is_empty(),
            !found.depends_on.is_empty(),
            found.max_attempts == Some(3),
        ];
        let expected: [bool; 5] = std::array::from_fn(|at| choice & (1 << at) == 0);
        ensure_eq!(there, expected, "what is left of node {choice}");
        ensure_eq!((found.status.clone(), found.row_count), (NodeStatus::Failed, Some(7)), "the rest of node {choice}");
    }
    Ok(())
}

pub(super) async fn large_numbers_are_exact(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let mut mutations = vec![create(0)];
    let numbers = [0, 1, u64::from(u32::MAX) + 1, (1 << 53) + 1, u64::MAX >> 1, (u64::MAX >> 1) + 1, u64::MAX - 1, u64::MAX];
    for (index, number) in numbers.into_iter().enumerate() {
        let update = NodeUpdate::success().row_count(number).duration_ms(number).attempt(u32::MAX).metadata("n", number);
        mutations.push(set(&format!("n{index}"), update)?);
    }
    bench.write("run", mutations).await?;
    let bench = bench.reopen().await?;
    let run = bench.state("run").await?;
    for (index, number) in numbers.into_iter().enumerate() {
        let found = node(&run, &format!("n{index}"))?;
        ensure_eq!(
            (found.row_count, found.duration_ms, found.attempt),
            (Some(number), Some(number), u32::MAX),
            "numbers of node {index}"
        );
        ensure_eq!(found.metadata.get("n").map(RawJson::as_str), Some(number.to_string().as_str()), "a number in a note");
    }
    bench.write("run", vec![Mutation::Delete { keep_coverage: true }]).await?;
    let last = bench.backend.last_success(&node_id("n7")?).await?;
    ensure_eq!(last.and_then(|success| success.row_count), Some(u64::MAX), "the largest row count, after its run was deleted");
    Ok(())
}

pub(super) async fn unknown_statuses_are_kept(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let found = ["upstream_failed", "", "SUCCESS", "success ", "日本", "a\"b", "null"];
    for (index, status) in found.into_iter().enumerate() {
        let run = Mutation::Create { run: NewRun::status(RunStatus::parse(status)), at: at(0) };
        bench.write(&format!("run {index}"), vec![run, set("n", NodeUpdate::status(NodeStatus::parse(status)))?]).await?;
    }
    let bench = bench.reopen().await?;
    for (index, status) in found.into_iter().enumerate() {
        let run = bench.state(&format!("run {index}")).await?;
        ensure_eq!(run.header().status.as_str(), status, "a run's status");
        ensure_eq!(node(&run, "n")?.status.as_str(), status, "a node's status");
    }
    Ok(())
}

/// Names that are fine as data, and that careless storage mixes up, cuts, escapes or executes.
fn awkward() -> Vec<String> {
    let long = "x".repeat(MAX_ID_BYTES);
    let almost = format!("{}y", "x".repeat(MAX_ID_BYTES - 1));
    let wide = "é".repeat(MAX_ID_BYTES / 2);
    [
        "../x",
        "..",
        ".",
        "/",
        "//",
        "a/b",
        "ab",
        "a",
        "b",
        "a:b",
        "a:",
        ":b",
        ":",
        "b:",
        "/b",
        "a/",
        "C:\\x",
        "\\",
        "'",
        "\"",
        "`",
        "''",
        "\"\"",
        "'; DROP TABLE runs; --",
        "%",
        "_",
        "*",
        "?",
        "[a]",
        "$1",
        "?1",
        ":id",
        "@id",
        "{}",
        "${HOME}",
        "#",
        "A",
        "a ",
        " a",
        " ",
        "  ",
        "é",
        "e\u{301}",
        "É",
        "ß",
        "SS",
        "日本語",
        "🎉",
        "\u{feff}a",
        "\u{200b}",
        "\u{202e}abc",
        "0",
        "00",
        "1",
        "1.0",
        "1e3",
        "-1",
        "0x1",
        "null",
        "NULL",
        "true",
        "NaN",
        "run_id",
        "nodes",
        "seeknal_state",
        "\u{10ffff}",
        "\u{d7ff}",
        "\u{e000}",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain([long, almost, wide])
    .collect()
}

pub(super) async fn awkward_ids_are_data(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let names = awkward();
    let count = |index: usize| u64::try_from(index).unwrap_or(0);
    // Every name as a run; every name as a node and as a partition of one of them.
    let mut entries = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let mut chain = super::Chain::of_new(run_id(name)?);
        entries.push(chain.entry(vec![create(0), set("n", NodeUpdate::new().row_count(count(index)))?])?);
    }
    let mut chain = super::Chain::of_new(run_id("all nodes")?);
    let mut mutations = vec![create(1)];
    for (index, name) in names.iter().enumerate() {
        mutations.push(set(name, NodeUpdate::success().row_count(count(index)).metadata(name, name.as_str()))?);
        mutations.push(add_partition("partitioned", name)?);
        mutations.push(add_partition(name, name)?);
    }
    entries.push(chain.entry(mutations)?);
    for outcome in bench.send(entries).await? {
        super::kit::applied(outcome)?;
    }
    let bench = bench.reopen().await?;
    let all = bench.state("all nodes").await?;
    ensure_eq!(all.node_count(), names.len() + 1, "every name is a node of its own");
    let keys: BTreeSet<_> = names.iter().map(|name| partition(name)).collect::<Result<_, _>>()?;
    ensure_eq!(*node(&all, "partitioned")?.partitions, keys, "every name is a partition of its own");
    for (index, name) in names.iter().enumerate() {
        let run = bench.state(name).await?;
        ensure_eq!(run.id().as_str(), name.as_str(), "the name of a run");
        ensure_eq!(node(&run, "n")?.row_count, Some(count(index)), "run {name:?}");
        let found = node(&all, name)?;
        ensure_eq!(found.row_count, Some(count(index)), "node {name:?}");
        ensure_eq!(
            found.metadata.get(name).and_then(RawJson::as_text).as_deref(),
            Some(name.as_str()),
            "a note with the key {name:?}"
        );
        let of_one: BTreeSet<_> = [partition(name)?].into();
        ensure_eq!(*found.partitions, of_one, "the partition of node {name:?}");
        let latest = bench.backend.latest_node(&node_id(name)?).await?;
        ensure_eq!(latest.and_then(|(_, state)| state.row_count), Some(count(index)), "the latest state of node {name:?}");
    }
    let mut listed: Vec<String> =
        bench.list(RunQuery::default().limit(10)).await?.iter().map(|run| run.run_id.to_string()).collect();
    ensure_eq!(listed.first().map(String::as_str), Some("all nodes"), "the newest run");
    listed.remove(0);
    let mut sorted = names.clone();
    sorted.sort();
    sorted.reverse();
    ensure_eq!(listed, sorted, "runs of one stamp, by the bytes of their names, downwards");
    // Deleting one takes no other along.
    for name in names.iter().step_by(2) {
        bench.write(name, vec![Mutation::Delete { keep_coverage: false }]).await?;
        bench.write("all nodes", vec![Mutation::DeleteNode { node: node_id(name)? }]).await?;
    }
    let all = bench.state("all nodes").await?;
    for (index, name) in names.iter().enumerate() {
        let gone = index % 2 == 0;
        ensure_eq!(bench.load(name).await?.is_none(), gone, "run {name:?} is gone");
        ensure_eq!(all.node(name).is_none(), gone, "node {name:?} is gone");
    }
    Ok(())
}

pub(super) async fn ids_never_run_together(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    // A run and a node whose names, put in one line, read the same as another pair's.
    let pairs = [
        ("a", "b/c"),
        ("a/b", "c"),
        ("ab", "c"),
        ("a", "bc"),
        ("a:b", "c"),
        ("a", "b:c"),
        ("a\u{1f389}", "b"),
        ("a", "\u{1f389}b"),
        ("a:", "b"),
        ("a", ":b"),
    ];
    for (index, (run, name)) in pairs.into_iter().enumerate() {
        if bench.load(run).await?.is_none() {
            bench.create(run, 0).await?;
        }
        let start = i64::try_from(index).unwrap_or(0) * 10;
        bench
            .write(
                run,
                vec![
                    set(name, NodeUpdate::success())?,
                    add_interval(name, start, start + 5)?,
                    add_partition(name, &index.to_string())?,
                ],
            )
            .await?;
    }
    let bench = bench.reopen().await?;
    for (index, (run, name)) in pairs.into_iter().enumerate() {
        let state = bench.state(run).await?;
        let found = node(&state, name)?;
        let start = i64::try_from(index).unwrap_or(0) * 10;
        let expected: IntervalSet = [span(start, start + 5)?].into_iter().collect();
        ensure_eq!(*found.intervals, expected, "the intervals of node {name:?} of run {run:?}");
        ensure_eq!(found.partitions.len(), 1, "the partitions of node {name:?} of run {run:?}");
        let of_run = pairs.iter().filter(|(other, _)| *other == run).count();
        ensure_eq!(state.node_count(), of_run, "the nodes of run {run:?}");
    }
    Ok(())
}

pub(super) async fn many_islands_are_exact(harness: &dyn Harness) -> Result<(), Fault> {
    const ISLANDS: i64 = 700;
    let bench = Bench::open(harness).await?;
    let mut expected = IntervalSet::new();
    let mut mutations = vec![create(0)];
    for index in 0..ISLANDS {
        // Neither in order nor evenly.
        let start = index * 389 % ISLANDS * 10;
        expected.insert(span(start, start + 3)?);
        mutations.push(add_interval("n", start, start + 3)?);
    }
    bench.write("run", mutations).await?;
    ensure_eq!(*node(&bench.state("run").await?, "n")?.intervals, expected, "{ISLANDS} islands");
    // A bridge, a hole, an end, and the whole time there is.
    let edge = Interval::parse("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000001Z")?;
    let last = Interval::parse("9999-12-31T23:59:59.999998Z", "9999-12-31T23:59:59.999999Z")?;
    let fine = Interval::parse("2024-01-01T00:00:03.000001Z", "2024-01-01T00:00:03.000002Z")?;
    let n = node_id("n")?;
    for (add, interval) in [
        (true, span(1_003, 1_010)?),
        (false, span(2_000, 2_501)?),
        (false, span(3_001, 3_002)?),
        (true, edge),
        (true, last),
        (true, fine),
    ] {
        if add {
            expected.insert(interval);
            bench.write("run", vec![Mutation::AddInterval { node: n.clone(), interval }]).await?;
        } else {
            expected.remove(interval);
            bench.write("run", vec![Mutation::RemoveInterval { node: n.clone(), interval }]).await?;
        }
    }
    let bench = bench.reopen().await?;
    ensure_eq!(*node(&bench.state("run").await?, "n")?.intervals, expected, "islands after holes and bridges, reopened");
    ensure_eq!(bench.backend.coverage(&n).await?.intervals, expected, "the coverage");
    bench.write("run", vec![Mutation::Delete { keep_coverage: true }]).await?;
    let bench = bench.reopen().await?;
    ensure_eq!(bench.backend.coverage(&n).await?.intervals, expected, "the coverage that outlives its run");
    Ok(())
}

pub(super) async fn stamps_are_exact(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    let stamps = [
        "0001-01-01T00:00:00Z",
        "1969-12-31T23:59:59.999999Z",
        "1970-01-01T00:00:00Z",
        "2024-02-29T12:34:56.789012Z",
        "9999-12-31T23:59:59.999999Z",
    ];
    for (index, text) in stamps.into_iter().enumerate() {
        let stamp = time::parse(text)?;
        let made = Mutation::Create { run: NewRun::pending().started_at(stamp), at: stamp };
        let update = NodeUpdate::failed("x").started_at(stamp).finished_at(stamp);
        bench.write(&format!("run {index}"), vec![made, set("n", update)?]).await?;
    }
    let mut bench = bench.reopen().await?;
    for (index, text) in stamps.into_iter().enumerate() {
        let stamp = time::parse(text)?;
        let run = bench.state(&format!("run {index}")).await?;
        ensure_eq!((run.header().created_at, run.header().started_at), (stamp, Some(stamp)), "the stamps of a run");
        let found = node(&run, "n")?;
        ensure_eq!((found.started_at, found.finished_at), (Some(stamp), Some(stamp)), "the stamps of a node");
    }
    for (beyond, end) in [(DateTime::<Utc>::MIN_UTC, stamps.first()), (DateTime::<Utc>::MAX_UTC, stamps.last())] {
        let (run, end) = (format!("beyond {beyond}"), time::parse(end.copied().unwrap_or_default())?);
        let made = Mutation::Create { run: NewRun::pending().started_at(beyond), at: beyond };
        let update = NodeUpdate::failed("x").started_at(beyond).finished_at(beyond);
        bench.write(&run, vec![made, set("n", update)?]).await?;
        let before = bench.state(&run).await?;
        ensure_eq!(before.header().created_at, end, "a stamp beyond the calendar is its end");
        bench = bench.reopen().await?;
        ensure_eq!(bench.state(&run).await?, before, "a stamp beyond the calendar, opened again");
        bench.write(&run, vec![Mutation::Delete { keep_coverage: false }]).await?;
    }
    let listed: Vec<String> = bench.list(RunQuery::default().limit(2)).await?.iter().map(|run| run.run_id.to_string()).collect();
    ensure_eq!(listed, ["run 4", "run 3", "run 2", "run 1", "run 0"], "runs by stamps before and after 1970");
    Ok(())
}

pub(super) async fn reopening_finds_the_same(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    for index in 0..6_i64 {
        let name = format!("run {index}");
        bench.write(&name, vec![create(index), set("a", NodeUpdate::running())?, set("b", NodeUpdate::running())?]).await?;
        bench
            .write(&name, vec![set("a", NodeUpdate::success().row_count(3).fingerprint("f"))?, add_interval("a", 0, index + 1)?])
            .await?;
        bench.write(&name, vec![Mutation::DeleteNode { node: node_id("b")? }, add_partition("c", "p")?]).await?;
    }
    bench.write("run 0", vec![Mutation::Delete { keep_coverage: true }]).await?;
    bench.write("imported", vec![Mutation::Import(Box::new(rich_import()?))]).await?;
    let (runs, retained) = (bench.everything().await?, bench.backend.retained().await?);
    let summaries = bench.list(RunQuery::default()).await?;
    ensure_eq!(runs.len(), 6, "the runs that were made");
    let mut settled = Vec::new();
    for round in 0..3 {
        bench = bench.reopen().await?;
        let found = bench.everything().await?;
        let plain = |runs: &[RunState]| runs.iter().map(without_extra).collect::<Vec<_>>();
        ensure_eq!(plain(&found), plain(&runs), "all runs, versions included, after reopening {round}");
        for (found, expected) in found.iter().zip(&runs) {
            all_foreign_kept(found, expected, &format!("run {} after reopening {round}", found.id()))?;
        }
        if round > 0 {
            ensure_eq!(found, settled, "all runs, foreign objects included, after reopening {round}");
        }
        settled = found;
        ensure_eq!(bench.backend.retained().await?, retained, "what outlives deleted runs, after reopening {round}");
        let versions =
            |runs: &[RunSummary]| runs.iter().map(|run| (run.run_id.clone(), run.version, run.nodes.clone())).collect::<Vec<_>>();
        ensure_eq!(
            versions(&bench.list(RunQuery::default()).await?),
            versions(&summaries),
            "the summaries, after reopening {round}"
        );
        ensure!(bench.backend.verify().await?.is_sound(), "the store is sound after reopening {round}");
    }
    Ok(())
}

/// An answer means that it rests: whoever waits with writing until it is closed loses it.
pub(super) async fn a_crash_loses_nothing_that_was_acknowledged(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    bench.create("gone", 1).await?;
    for round in 0..3 {
        let (start, key) = (i64::from(round) * 100, format!("p{round}"));
        let update = NodeUpdate::success().row_count(u64::try_from(round).unwrap_or(0));
        bench.write("run", vec![set("n", update)?, add_interval("n", start, start + 50)?, add_partition("n", &key)?]).await?;
        if round == 1 {
            bench.write("gone", vec![add_interval("kept", 0, 50)?, Mutation::Delete { keep_coverage: true }]).await?;
        }
        let (before, kept) = (bench.everything().await?, bench.backend.retained().await?);
        bench = bench.crash().await?;
        ensure_eq!(bench.everything().await?, before, "all runs after a crash behind round {round}");
        ensure_eq!(bench.backend.retained().await?, kept, "what outlives runs after a crash behind round {round}");
    }
    bench.backend.close().await?;
    Ok(())
}
