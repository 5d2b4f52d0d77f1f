//! What a commit becomes: rows, refusals, guards, chains, answers, what outlives a run.

use super::*;

#[tokio::test]
async fn a_run_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let mut notes = Metadata::new();
    notes.insert("n", RawJson::parse("1e-300").unwrap());
    let update = NodeUpdate::success()
        .row_count(u64::MAX)
        .duration_ms(9_223_372_036_854_775_808)
        .fingerprint("abc123")
        .error("warn\u{0}ing")
        .watermark("last_watermark", "2024-01-01")
        .metadata("big", serde_json::json!({"z": 1, "a": [1, 2]}));
    let mutations = vec![
        Mutation::Create { run: NewRun::running().metadata("trigger", "cron"), at: at(0) },
        set("a/../b", update),
        set("日本", NodeUpdate::status(NodeStatus::parse("upstream_failed"))),
        Mutation::AddInterval { node: node_id("a/../b"), interval: hours(0, 2) },
        Mutation::AddInterval { node: node_id("a/../b"), interval: hours(4, 6) },
        Mutation::AddPartition { node: node_id("later"), partition: PartitionKey::new("dt=2024-01-01").unwrap() },
    ];
    let receipt = change(&backend, "run 1", mutations.clone()).await;
    assert_eq!(receipt.runs[0].before, Version::NONE);
    let mut oracle = None;
    apply_all(&mut oracle, &run_id("run 1"), &mutations, receipt.runs[0].after).unwrap();
    assert_eq!(load(&backend, "run 1").await, oracle.clone().unwrap());
    assert_eq!(backend.run_version(&run_id("run 1")).await.unwrap(), Some(receipt.runs[0].after));

    backend.close().await.unwrap();
    let again = open(&db(dir.path())).await;
    assert_eq!(load(&again, "run 1").await, oracle.unwrap());
    assert!(again.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn columns_are_readable_with_plain_sql() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success().row_count(1000).fingerprint("abc"))]).await;
    change(&backend, "r", vec![Mutation::AddInterval { node: node_id("n"), interval: hours(0, 1) }]).await;
    backend.close().await.unwrap();
    let sql = raw(&db(dir.path()));
    let row: (String, i64, String, String) = sql
        .query_row("SELECT status, row_count, fingerprint, finished_at FROM node_states WHERE run_id = 'r'", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .unwrap();
    assert_eq!(row, ("success".into(), 1000, "abc".into(), time::format_sortable(at(100))));
    let interval: (String, String) =
        sql.query_row("SELECT start_at, end_at FROM completed_intervals", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert_eq!(interval, (time::format_sortable(at(0)), time::format_sortable(at(3600))));
    let mode: String = sql.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
}

#[tokio::test]
async fn missing_and_existing_runs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let missing = change_guarded(&backend, "r", vec![], vec![set("n", NodeUpdate::running())]).await;
    assert!(matches!(refused(missing), Refusal::RunNotFound { .. }));
    change(&backend, "r", vec![create(0)]).await;
    let twice = change_guarded(&backend, "r", vec![], vec![create(1)]).await;
    assert!(matches!(refused(twice), Refusal::RunExists { .. }));
    let no_node = change_guarded(&backend, "r", vec![], vec![Mutation::DeleteNode { node: node_id("n") }]).await;
    assert!(matches!(refused(no_node), Refusal::NodeNotFound { .. }));

    // Deleted and made again: what stood on the old one is refused.
    let old = load(&backend, "r").await;
    change(&backend, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
    let made = change(&backend, "r", vec![create(2)]).await;
    assert!(made.runs[0].after > old.version().next());
    let part = part_on(Some(&old), old.version(), "r", vec![], vec![set("n", NodeUpdate::running())]);
    let outcome = commit(&backend, vec![entry(part)]).await.outcomes.remove(0);
    assert!(matches!(refused(outcome), Refusal::RunNotFound { .. }));
}

#[tokio::test]
async fn guards_are_decided_on_the_rows() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
    let version = load(&backend, "r").await.version();
    let running = vec![NodeStatus::Running];
    for (guard, holds) in [
        (Guard::RunVersion(version), true),
        (Guard::RunVersion(Version(1_000_000)), false),
        (Guard::RunStatus(vec![RunStatus::Running]), true),
        (Guard::RunStatus(vec![RunStatus::Failed]), false),
        (Guard::NodeStatus { node: node_id("n"), one_of: running.clone() }, true),
        (Guard::NodeStatus { node: node_id("n"), one_of: vec![NodeStatus::Pending] }, false),
        (Guard::NodeStatus { node: node_id("x"), one_of: running }, false),
        (Guard::NodeAbsent { node: node_id("x") }, true),
        (Guard::NodeAbsent { node: node_id("n") }, false),
        (Guard::NodeVersion { node: node_id("n"), version }, true),
        (Guard::NodeVersion { node: node_id("n"), version: Version::NONE }, false),
        (Guard::Unlocked, true),
    ] {
        // What is written is refused by itself, so that the version stays where it is.
        let outcome = change_guarded(&backend, "r", vec![guard.clone()], vec![Mutation::DeleteNode { node: node_id("y") }]).await;
        match refused(outcome) {
            Refusal::NodeNotFound { .. } => assert!(holds, "{guard}"),
            Refusal::Guard { guard: found, .. } => assert!(!holds && found == guard, "{guard}"),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn a_refusal_takes_its_chain_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "a", vec![create(0)]).await;
    change(&backend, "b", vec![create(1)]).await;
    let (a, b) = (load(&backend, "a").await, load(&backend, "b").await);
    let guard = Guard::NodeStatus { node: node_id("n"), one_of: vec![NodeStatus::Success] };
    let entries = vec![
        entry(part_on(Some(&a), a.version(), "a", vec![guard], vec![set("n", NodeUpdate::running())])),
        entry(part_on(Some(&b), b.version(), "b", vec![], vec![set("n", NodeUpdate::running())])),
        entry(part_on(Some(&a), a.version(), "a", vec![], vec![set("m", NodeUpdate::running())])),
    ];
    let answer = commit(&backend, entries).await;
    assert!(matches!(answer.outcomes[0], Outcome::Refused(Refusal::Guard { .. })));
    assert!(matches!(answer.outcomes[1], Outcome::Applied(_)));
    assert!(matches!(answer.outcomes[2], Outcome::Refused(Refusal::Chained { .. })));
    assert_eq!(load(&backend, "a").await, a);
}

#[tokio::test]
async fn a_detached_entry_that_is_refused_holds_up_only_what_names_its_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let other = open(&db(dir.path())).await;
    let pending = |name| set(name, NodeUpdate::pending());
    change(&backend, "r", vec![create(0), pending("a"), pending("b"), pending("c")]).await;
    let seen = load(&backend, "r").await;
    let pinned = |name: &str| Guard::NodeVersion { node: node_id(name), version: seen.node(name).unwrap().version };
    // Another process is faster with one of the nodes.
    change(&other, "r", vec![set("a", NodeUpdate::running().fingerprint("other"))]).await;
    let now = load(&other, "r").await;

    // As an actor builds them: each on top of the one before.
    let mut tip = seen.clone();
    let mut entries = Vec::new();
    for (detached, guards, mutations) in [
        (true, vec![pinned("a")], vec![set("a", NodeUpdate::running().fingerprint("me"))]),
        (true, vec![pinned("b")], vec![set("b", NodeUpdate::running().fingerprint("me"))]),
        (false, vec![], vec![Mutation::Update { update: RunUpdate::new().metadata("by", "me"), at: at(200) }]),
        (false, vec![], vec![set("a", NodeUpdate::new().row_count(7))]),
    ] {
        let part = part_on(Some(&tip), seen.version(), "r", guards, mutations);
        tip = part.after.clone().unwrap();
        entries.push(Entry { detached, ..entry(part) });
    }
    let version = Guard::RunVersion(tip.version());
    entries.push(entry(part_on(Some(&tip), seen.version(), "r", vec![version], vec![pending("d")])));
    let outcomes = commit(&backend, entries.clone()).await.outcomes;
    assert!(
        matches!(&outcomes[0], Outcome::Refused(Refusal::Guard { guard: Guard::NodeVersion { .. }, .. })),
        "{:?}",
        outcomes[0]
    );
    let claimed = applied(outcomes[1].clone());
    assert_eq!((claimed.runs[0].before, claimed.runs[0].after), (now.version(), now.version().next()));
    assert_eq!(applied(outcomes[2].clone()).runs[0].before, claimed.runs[0].after);
    for (outcome, why) in [(&outcomes[3], "it stands on what was refused"), (&outcomes[4], "its version counts what was refused")]
    {
        assert!(matches!(outcome, Outcome::Refused(Refusal::Chained { .. })), "{why}: {outcome:?}");
    }
    let stored = load(&backend, "r").await;
    let by = |name: &str| stored.node(name).unwrap().fingerprint.clone();
    assert_eq!((by("a"), by("b"), by("c")), (Some("other".into()), Some("me".into()), None));
    assert_eq!(stored.node("a").unwrap().row_count, None);
    assert!(stored.header().metadata.get("by").is_some() && stored.node("d").is_none());

    // Not detached, it takes its chain along.
    for entry in &mut entries {
        entry.detached = false;
    }
    let outcomes = commit(&backend, entries).await.outcomes;
    assert!(matches!(&outcomes[0], Outcome::Refused(Refusal::Stale { .. })), "{:?}", outcomes[0]);
    for outcome in &outcomes[1..] {
        assert!(matches!(outcome, Outcome::Refused(Refusal::Chained { .. })), "{outcome:?}");
    }
}

/// What was passed over leaves a number free in the chain: a commit that the chain has not seen must not take it.
#[tokio::test]
async fn a_commit_that_a_chain_has_not_seen_does_not_stand_in_for_what_was_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0), set("a", NodeUpdate::pending()), set("n", NodeUpdate::pending())]).await;
    let seen = load(&backend, "r").await;
    change(&backend, "r", vec![set("n", NodeUpdate::new().row_count(7))]).await;
    let wrong = Guard::NodeVersion { node: node_id("a"), version: Version(1_000_000) };
    let claim = part_on(Some(&seen), seen.version(), "r", vec![wrong], vec![set("a", NodeUpdate::running())]);
    let behind = part_on(claim.after.as_ref(), seen.version(), "r", vec![], vec![set("n", NodeUpdate::new().fingerprint("x"))]);
    let outcomes = commit(&backend, vec![Entry { detached: true, ..entry(claim) }, entry(behind)]).await.outcomes;
    assert!(matches!(&outcomes[0], Outcome::Refused(Refusal::Guard { .. })), "{:?}", outcomes[0]);
    assert!(matches!(&outcomes[1], Outcome::Refused(Refusal::Stale { .. })), "{:?}", outcomes[1]);
    assert_eq!(load(&backend, "r").await.node("n").unwrap().row_count, Some(7));
}

#[tokio::test]
async fn a_batch_is_applied_once() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let other = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0)]).await;
    let tip = load(&backend, "r").await;
    let good = entry(part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::running())]));
    let bad = entry(part_on(Some(&tip), tip.version(), "r", vec![Guard::NodeAbsent { node: node_id("n") }], vec![]));
    for entries in [vec![good.clone(), grant(LeaseKey::run(run_id("x")), "me", 60_000)], vec![good, bad]] {
        let batch = Arc::new(Batch::new(entries));
        let first = backend.commit(Arc::clone(&batch)).await.unwrap();
        let state = load(&backend, "r").await;
        assert_eq!(backend.commit(Arc::clone(&batch)).await.unwrap(), first);
        assert_eq!(other.commit(batch).await.unwrap(), first, "another opening answers from the same row");
        assert_eq!(load(&backend, "r").await, state);
    }
}

#[tokio::test]
async fn cleanup_keeps_coverage_and_the_last_success() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let n = node_id("n");
    for (run, second, rows) in [("old", 0, 1), ("new", 10, 2)] {
        let mutations = vec![
            create(second),
            set("n", NodeUpdate::success().row_count(rows).watermark("w", "x")),
            Mutation::AddInterval { node: n.clone(), interval: hours(second, second + 5) },
            Mutation::AddPartition { node: n.clone(), partition: PartitionKey::new(run).unwrap() },
        ];
        change(&backend, run, mutations).await;
    }
    let (coverage, success) = (backend.coverage(&n).await.unwrap(), backend.last_success(&n).await.unwrap());
    assert_eq!(success.as_ref().unwrap().row_count, Some(2));
    for run in ["new", "old"] {
        change(&backend, run, vec![Mutation::Delete { keep_coverage: true }]).await;
        assert_eq!(backend.coverage(&n).await.unwrap(), coverage);
        assert_eq!(backend.last_success(&n).await.unwrap(), success);
    }
    assert!(backend.latest_node(&n).await.unwrap().is_none());
    assert!(backend.node_ids().await.unwrap().into_iter().eq([n.clone()]));

    // Carried to another store, where it joins what is there.
    let other = open(&dir.path().join("other.db")).await;
    commit(&other, vec![Entry { retained: backend.retained().await.unwrap(), ..Entry::default() }]).await;
    assert_eq!(other.retained().await.unwrap(), backend.retained().await.unwrap());
}

#[tokio::test]
async fn listing_filters_and_pages() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let mut ledger = Ledger::new();
    for index in 0..25_i64 {
        let run = format!("{}{index}", if index % 2 == 0 { "a%_" } else { "ä" });
        // Three runs share every stamp.
        let mut mutations = vec![create(index / 3), set("n", NodeUpdate::success()), set("m", NodeUpdate::failed("x"))];
        if index % 4 == 0 {
            mutations.push(Mutation::Update { update: RunUpdate::failed(), at: at(50) });
        }
        let entries = vec![entry(part_on(None, Version::NONE, &run, vec![], mutations))];
        ledger.commit(&entries, &NoFences);
        commit(&backend, entries).await;
    }
    let filters = [
        RunFilter::all(),
        RunFilter::all().status(RunStatus::Failed),
        RunFilter::all().status(RunStatus::Failed).status(RunStatus::Running).created_from(at(2)).created_before(at(6)),
        RunFilter::all().id_prefix("a%_"),
        RunFilter::all().id_prefix("ä1"),
        RunFilter::all().id_prefix("' OR 1 --"),
        RunFilter::all().id_prefix(""),
    ];
    for filter in filters {
        for limit in [1, 4, 1000] {
            let mut query = RunQuery::new(filter.clone()).limit(limit);
            loop {
                let page = backend.list_runs(&query).await.unwrap();
                assert_eq!(page, ledger.list(&query), "{query:?}");
                if page.next.is_none() {
                    break;
                }
                query = query.after(page.next);
            }
        }
    }
}

#[tokio::test]
async fn batches_that_wait_together_keep_their_own_answers() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    for index in 0..40 {
        change(&backend, &format!("r{index}"), vec![create(index)]).await;
    }
    let mut waiting = tokio::task::JoinSet::new();
    for index in 0..40 {
        let backend = Arc::clone(&backend);
        waiting.spawn(async move {
            let run = format!("r{index}");
            for count in 0..10_u64 {
                let receipt = change(&backend, &run, vec![set("n", NodeUpdate::running().row_count(count))]).await;
                assert_eq!(receipt.runs[0].run, run.as_str());
            }
            assert_eq!(load(&backend, &run).await.node("n").unwrap().row_count, Some(9));
        });
    }
    while let Some(done) = waiting.join_next().await {
        done.unwrap();
    }
    assert!(backend.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn what_comes_while_somebody_else_writes_goes_along_in_one_transaction() {
    const WRITES: u64 = 10;
    let dir = tempfile::tempdir().unwrap();
    let state = Coordinator::open(open(&db(dir.path())).await).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let before = state.stats().batch_entries.count();
    let other = raw(&db(dir.path()));
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let writes: Vec<_> = (0..WRITES)
        .map(|number| {
            let state = state.clone();
            tokio::spawn(async move { state.set_node_state("r", format!("n{number}"), NodeUpdate::success()).await })
        })
        .collect();
    // They wait for the turn, not behind one of them that took none.
    tokio::time::timeout(Duration::from_secs(4), async {
        while state.stats().waiting < WRITES {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("all of them wait for the turn");
    other.execute_batch("COMMIT").unwrap();
    for write in writes {
        write.await.unwrap().unwrap();
    }
    assert_eq!(state.stats().batch_entries.count() - before, 1);
    state.close().await.unwrap();
}

/// Commits one write on the version that it finds, and is stopped meanwhile.
#[tokio::test]
#[ignore = "it is run by another test, and stopped"]
async fn child_that_is_stopped_in_its_commit() {
    let folder = PathBuf::from(std::env::var_os("STATE_FOLDER").unwrap());
    std::fs::write(folder.join("pid"), std::process::id().to_string()).unwrap();
    let backend = open(&db(&folder)).await;
    let tip = load(&backend, "r").await;
    std::fs::write(folder.join("begun"), "").unwrap();
    let part =
        part_on(Some(&tip), tip.version(), "r", vec![Guard::RunVersion(tip.version())], vec![set("n", NodeUpdate::success())]);
    applied(commit(&backend, vec![entry(part)]).await.outcomes.remove(0));
    std::fs::write(folder.join("applied"), "").unwrap();
    backend.close().await.unwrap();
}

/// Stopped between its check and the end of its COMMIT, a process keeps others out; nobody slips in between, and when it goes on it has won.
#[tokio::test]
async fn who_is_stopped_between_check_and_commit_is_the_one_winner() {
    use super::trace::{Child, SYNCS, can_trace};
    use rustix::process::{Pid, Signal, kill_process};
    if !can_trace() {
        return;
    }
    let mut stopped = 0;
    for when in 1..=5 {
        let dir = tempfile::tempdir().unwrap();
        let backend = open(&db(dir.path())).await;
        change(&backend, "r", vec![create(0)]).await;
        let before = load(&backend, "r").await;
        let at = |name: &str| dir.path().join(name);
        let child = Child::test("commits::child_that_is_stopped_in_its_commit").env("STATE_FOLDER", dir.path());
        let child = child.inject(SYNCS, &format!("signal=SIGSTOP:when={when}"));
        let child = std::thread::spawn(move || child.run());
        let pid = || std::fs::read_to_string(at("pid")).ok()?.parse::<i32>().ok();
        let stands = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", pid()?)).ok()?;
            Some(status.lines().find(|line| line.starts_with("State:"))?.to_lowercase().contains("\tt"))
        };
        let begun = std::time::Instant::now();
        // Where strace itself holds it for a moment it goes on by itself.
        let mut seen = 0;
        while !child.is_finished() && seen < 20 {
            seen = if stands() == Some(true) { seen + 1 } else { 0 };
            assert!(begun.elapsed() < Duration::from_secs(60), "it neither ends nor stands");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if at("begun").exists() && !at("applied").exists() {
            stopped += 1;
            let part = part_on(Some(&before), before.version(), "r", vec![], vec![set("n", NodeUpdate::failed("late"))]);
            let late = entry(part);
            let error = backend.commit(Arc::new(Batch::new(vec![late.clone()]))).await.unwrap_err();
            assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Busy, false), "{error}");
            assert_eq!(load(&backend, "r").await, before, "who reads is not held up, and sees nothing of it");
            kill_process(Pid::from_raw(pid().unwrap()).unwrap(), Signal::CONT).unwrap();
            child.join().unwrap().passed("it goes on");
            assert!(at("applied").exists());
            refused(commit(&backend, vec![late]).await.outcomes.remove(0));
            let run = load(&backend, "r").await;
            assert_eq!((run.node("n").unwrap().status.clone(), run.version()), (NodeStatus::Success, before.version().next()));
        } else {
            if let Some(pid) = pid().and_then(Pid::from_raw).filter(|_| !child.is_finished()) {
                kill_process(pid, Signal::CONT).unwrap();
            }
            child.join().unwrap().passed("it was not stopped in its commit");
        }
        backend.close().await.unwrap();
    }
    assert!(stopped > 0, "it was never stopped in its commit");
}
