//! Several openings of one database, as several processes have them; one of them is killed.

use super::*;

#[tokio::test]
async fn two_openings_write_different_nodes_and_lose_nothing() {
    const EACH: u32 = 60;
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0)]).await;
    let writer = |backend: Backend, node: &'static str| async move {
        let mut tip = load(&backend, "r").await;
        for count in 0..EACH {
            let update = NodeUpdate::running().row_count(count.into()).metadata(format!("{node}{count}"), count);
            let mutations = vec![
                set(node, update),
                Mutation::AddInterval { node: node_id(node), interval: hours(i64::from(count) * 2, i64::from(count) * 2 + 1) },
            ];
            let part = part_on(Some(&tip), tip.version(), "r", vec![], mutations);
            let receipt = applied(commit(&backend, vec![entry(part.clone())]).await.outcomes.remove(0));
            // An actor that was alone goes on with its tip; one that was not reads again.
            tip = if receipt.runs[0].before == part.expect { part.after.unwrap() } else { load(&backend, "r").await };
        }
    };
    tokio::join!(writer(Arc::clone(&one), "left"), writer(Arc::clone(&two), "right"));
    let state = load(&one, "r").await;
    for node in ["left", "right"] {
        let node = state.node(node).unwrap();
        assert_eq!(
            (node.metadata.len(), node.intervals.len(), node.row_count),
            (EACH as usize, EACH as usize, Some(u64::from(EACH) - 1))
        );
    }
    assert_eq!(state.version().0, state.created_version().0 + 2 * u64::from(EACH));
    assert!(one.verify().await.unwrap().is_sound());
}

/// Two sides send chains of entries on the same three nodes, the second batch of a chain before the first one is answered, as actors do. Every key that was
/// accepted is there in the end, and none that was refused.
#[tokio::test]
async fn chains_of_two_openings_never_lose_or_smuggle_a_write() {
    const ROUNDS: usize = 25;
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    let nodes = ["a", "b", "c"];
    change(&one, "r", [create(0)].into_iter().chain(nodes.map(|node| set(node, NodeUpdate::pending()))).collect()).await;
    let created = load(&one, "r").await.version();
    let side = |backend: Backend, name: &'static str, stride: usize| async move {
        let mut outcomes = Vec::new();
        for round in 0..ROUNDS {
            let seen = load(&backend, "r").await;
            let mut tip = seen.clone();
            let mut chain = |from: usize| {
                let mut keys = Vec::new();
                let entries = (from..from + 2)
                    .map(|index| {
                        let node = nodes[(round * stride + index) % nodes.len()];
                        let key = format!("{name}-{round}-{index}");
                        // Every third one guards on a node that it does not write.
                        let other = node_id(nodes[(round + index) % nodes.len()]);
                        let version = tip.node(other.as_str()).unwrap().version;
                        let guards = if index % 3 == 0 { vec![Guard::NodeVersion { node: other, version }] } else { vec![] };
                        let part = part_on(
                            Some(&tip),
                            seen.version(),
                            "r",
                            guards,
                            vec![set(node, NodeUpdate::new().metadata(&key, 1))],
                        );
                        tip = part.after.clone().unwrap();
                        keys.push((node, key));
                        entry(part)
                    })
                    .collect();
                (keys, Arc::new(Batch::new(entries)))
            };
            for (keys, batch) in [chain(0), chain(2)] {
                let answer = backend.commit(batch).await.unwrap();
                outcomes.extend(
                    keys.into_iter().zip(answer.outcomes.into_iter().map(|outcome| matches!(outcome, Outcome::Applied(_)))),
                );
            }
        }
        outcomes
    };
    let (left, right) = tokio::join!(side(Arc::clone(&one), "left", 1), side(Arc::clone(&two), "right", 2));
    let state = load(&one, "r").await;
    let accepted = left.iter().chain(&right).filter(|(_, accepted)| *accepted).count();
    assert!(accepted >= ROUNDS && accepted < left.len() + right.len(), "nothing was contended: {accepted}");
    for ((node, key), accepted) in left.into_iter().chain(right) {
        assert_eq!(state.node(node).unwrap().metadata.get(&key).is_some(), accepted, "{node} {key}");
    }
    assert_eq!(state.version().0, created.0 + accepted as u64);
}

#[tokio::test]
async fn two_openings_claim_one_node_and_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0)]).await;
    for round in 0..30 {
        let node = format!("n{round}");
        let claim = |backend: Backend| {
            let node = node.clone();
            async move {
                let guard = Guard::NodeAbsent { node: node_id(&node) };
                change_guarded(&backend, "r", vec![guard], vec![set(&node, NodeUpdate::running())]).await
            }
        };
        let (a, b) = tokio::join!(claim(Arc::clone(&one)), claim(Arc::clone(&two)));
        let wins = [&a, &b].iter().filter(|outcome| matches!(outcome, Outcome::Applied(_))).count();
        assert_eq!(wins, 1, "{a:?} {b:?}");
        let loser = if matches!(a, Outcome::Applied(_)) { b } else { a };
        assert!(matches!(refused(loser), Refusal::Guard { .. } | Refusal::Stale { .. }));
    }
}

#[tokio::test]
async fn what_was_not_seen_is_stale() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("n", NodeUpdate::pending()), set("gone", NodeUpdate::pending())]).await;
    let seen = load(&one, "r").await;
    change(&two, "r", vec![set("n", NodeUpdate::running().metadata("theirs", 1))]).await;
    change(&two, "r", vec![Mutation::DeleteNode { node: node_id("gone") }]).await;
    let try_one = |mutations: Vec<Mutation>, guards: Vec<Guard>| {
        let part = part_on(Some(&seen), seen.version(), "r", guards, mutations);
        let one = Arc::clone(&one);
        async move { commit(&one, vec![entry(part)]).await.outcomes.remove(0) }
    };
    let pending = Guard::NodeStatus { node: node_id("n"), one_of: vec![NodeStatus::Running] };
    for (mutations, guards) in [
        (vec![set("n", NodeUpdate::success())], vec![]),
        (vec![set("other", NodeUpdate::success())], vec![pending]),
        (vec![set("gone", NodeUpdate::success())], vec![]),
    ] {
        assert!(matches!(refused(try_one(mutations, guards).await), Refusal::Stale { .. }));
    }
    // A row that nobody touched is written, and nothing else of what this side believes.
    let before = load(&one, "r").await;
    let receipt = applied(try_one(vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(5) }], vec![]).await);
    assert_eq!(receipt.runs[0].before, before.version());
    let after = load(&one, "r").await;
    assert_eq!(after.node("n"), before.node("n"));
    assert_eq!(after.header().version, receipt.runs[0].after);
    assert_eq!(after.header().metadata.get("k").unwrap().as_str(), "1");
}

/// What a chain made while others changed other rows is written as it made it, under the versions that its entries got.
#[tokio::test]
async fn a_chain_writes_its_rows_between_the_commits_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("m", NodeUpdate::pending().metadata("kept", 1)), set("x", NodeUpdate::pending())])
        .await;
    let seen = load(&one, "r").await;
    let first = part_on(Some(&seen), seen.version(), "r", vec![], vec![set("m", NodeUpdate::running())]);
    let tip = first.after.clone().unwrap();
    let second = part_on(Some(&tip), seen.version(), "r", vec![], vec![set("m", NodeUpdate::success().row_count(7))]);
    for part in [first, second] {
        change(&two, "r", vec![set("x", NodeUpdate::running().metadata("theirs", 1))]).await;
        let receipt = applied(commit(&one, vec![entry(part)]).await.outcomes.remove(0));
        let (mine, theirs) = (load(&one, "r").await, load(&two, "r").await);
        assert_eq!(mine, theirs);
        assert_eq!(mine.node("m").unwrap().version, receipt.runs[0].after);
        assert_eq!(mine.node("x").unwrap().version, receipt.runs[0].before);
    }
    let state = load(&two, "r").await;
    let node = state.node("m").unwrap();
    assert_eq!((&node.status, node.row_count), (&NodeStatus::Success, Some(7)));
    assert!(node.metadata.get("kept").is_some() && state.node("x").unwrap().metadata.get("theirs").is_some());
}

/// What others changed is taken in from what they noted of it, however it was noted: names where they are few, also rows where they are many.
#[tokio::test]
async fn a_reload_brings_what_is_newer() {
    for bystanders in [0, 2] {
        reload_beside(bystanders).await;
    }
}

async fn reload_beside(bystanders: usize) {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    let mut others = Vec::new();
    for _ in 0..bystanders {
        others.push(open(&db(dir.path())).await);
    }
    change(&one, "r", vec![create(0), set("a", NodeUpdate::running()), set("b", NodeUpdate::running())]).await;
    // From now on the second one knows that it is not alone.
    change(&two, "other", vec![create(0)]).await;
    let mut have = load(&one, "r").await;
    let wide = |node: &str, note: &str| set(node, NodeUpdate::new().metadata(note, "x".repeat(60_000)));
    let many = || (0..3_000).map(|number| set(&format!("many {number}"), NodeUpdate::pending())).collect();
    let steps: Vec<(Vec<Mutation>, Option<i64>)> = vec![
        (
            vec![
                set("a", NodeUpdate::success().row_count(7).metadata("said", "\"\u{7f}\n")),
                set("b", NodeUpdate::failed("it broke")),
            ],
            Some(1),
        ),
        (vec![Mutation::AddInterval { node: node_id("b"), interval: hours(0, 3) }], Some(2)),
        (vec![Mutation::AddPartition { node: node_id("c"), partition: PartitionKey::new("p").unwrap() }], Some(3)),
        ((0..5).map(|note| wide("d", &note.to_string())).chain([set("b", NodeUpdate::running())]).collect(), Some(4)),
        // An ended run needs no notes.
        (vec![Mutation::Update { update: RunUpdate::success(), at: at(7) }], None),
        (many(), None),
        (vec![set("a", NodeUpdate::running())], Some(1)),
        (vec![Mutation::DeleteNode { node: node_id("a") }], Some(1)),
    ];
    for (index, (mutations, noted)) in steps.into_iter().enumerate() {
        change(&two, "r", mutations).await;
        have = one.reload_run(&have).await.unwrap().unwrap();
        assert_eq!(have, load(&one, "r").await, "step {index}");
        let sql = "SELECT CASE WHEN change_sets_from IS NULL THEN NULL ELSE (SELECT count(*) FROM change_sets WHERE version > change_sets_from) END \
                   FROM runs WHERE run_id = 'r'";
        let rows: Option<i64> = raw(&db(dir.path())).query_row(sql, [], |row| row.get(0)).unwrap();
        assert_eq!(rows, noted, "step {index}");
    }
    let noted = |sql: &str| raw(&db(dir.path())).query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(noted("SELECT count(*) FROM change_sets WHERE nodes LIKE '%status%'") > 0, bystanders > 0, "rows for many");
    assert_eq!(noted("SELECT count(*) FROM change_sets WHERE nodes LIKE '%xxxxx%'"), 0, "what is wide is looked up");

    raw(&db(dir.path())).execute("UPDATE change_sets SET nodes = '{\"a\":{}}'", []).unwrap();
    change(&two, "r", vec![set("b", NodeUpdate::success())]).await;
    let created = have.created_version();
    let old = RunState::from_parts(run_id("r"), have.header().clone(), created, created, []);
    let reloaded = one.reload_run(&old).await.unwrap().unwrap();
    assert_eq!(reloaded.version(), load(&one, "r").await.version(), "what is older than the notes does not look at them");

    change(&two, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
    assert_eq!(one.reload_run(&have).await.unwrap(), None);
    change(&two, "r", vec![create(1)]).await;
    assert_eq!(one.reload_run(&have).await.unwrap().unwrap(), load(&one, "r").await);
}

/// The notes of what changed are cut now and then: who is behind them searches for what is newer.
#[tokio::test]
async fn a_reload_from_before_the_notes_brings_the_same() {
    // Also where what moves the run on to where they are cut changes no node.
    for by_header in [false, true] {
        reload_from_before(by_header).await;
    }
}

async fn reload_from_before(by_header: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("a", NodeUpdate::running()), set("b", NodeUpdate::running())]).await;
    change(&two, "other", vec![create(0)]).await;
    let first = load(&one, "r").await;
    let mut tip = first.clone();
    let mut between = None;
    for round in 0..100 {
        let base = tip.version();
        let cuts = base.0 / 4_096 != (base.0 + 100) / 4_096;
        let entries = (0..100)
            .map(|step| {
                let mutation = if by_header && cuts {
                    Mutation::Update { update: RunUpdate::new().metadata("k", step), at: at(5) }
                } else {
                    set("a", NodeUpdate::new().metadata("k", round * 100 + step))
                };
                let part = part_on(Some(&tip), base, "r", vec![], vec![mutation]);
                tip = part.after.clone().unwrap();
                entry(part)
            })
            .collect();
        commit(&two, entries).await.outcomes.into_iter().for_each(|outcome| drop(applied(outcome)));
        if round == 60 {
            between = Some(load(&one, "r").await);
        }
    }
    let rows: i64 = raw(&db(dir.path())).query_row("SELECT count(*) FROM change_sets", [], |row| row.get(0)).unwrap();
    assert!((40..70).contains(&rows), "{rows} of 100 are kept");
    let now = load(&one, "r").await;
    assert_eq!(now.node("a").unwrap().metadata.get("k").unwrap().as_str(), "9999");
    for have in [first, between.unwrap()] {
        assert_eq!(one.reload_run(&have).await.unwrap().unwrap(), now);
    }
}

/// However long the names of nodes are, the notes of a run stay within some megabytes, and who comes late reads the same.
#[tokio::test]
async fn notes_of_changes_are_bounded_by_their_length() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    let name = |number: usize| format!("{number:02}{}", "x".repeat(1_000));
    let some = |from: usize, count: usize, said: usize| -> Vec<Mutation> {
        (from..from + count).map(|number| set(&name(number), NodeUpdate::new().metadata("k", said))).collect()
    };
    change(&one, "r", [vec![create(0)], some(0, 90, 0)].concat()).await;
    change(&two, "other", vec![create(0)]).await;
    let first = load(&one, "r").await;
    let length = |what: &str| -> i64 {
        let sql = format!("SELECT coalesce({what}(octet_length(nodes)), 0) FROM change_sets WHERE run_id = 'r'");
        raw(&db(dir.path())).query_row(&sql, [], |row| row.get(0)).unwrap()
    };
    let (mut have, mut tip, mut longest) = (first.clone(), first.clone(), 0);
    change(&one, "beside", vec![create(0)]).await;
    for round in 0..=520 {
        if round % 20 == 0 {
            // For who met nobody for half a minute nothing is noted, and this machine may be slow.
            change(&one, "beside", vec![set("n", NodeUpdate::success().row_count(round as u64))]).await;
        }
        // Four versions of the run in one note.
        let base = tip.version();
        let entries = (0..4).map(|part| {
            let part = part_on(Some(&tip), base, "r", vec![], some(round % 30 + part * 15, 15, round));
            tip = part.after.clone().unwrap();
            entry(part)
        });
        let entries = entries.collect();
        commit(&two, entries).await.outcomes.into_iter().for_each(|outcome| drop(applied(outcome)));
        if round % 130 == 0 {
            longest = longest.max(length("sum"));
            have = one.reload_run(&have).await.unwrap().unwrap();
            assert_eq!(have, load(&one, "r").await, "round {round}");
        }
    }
    assert!(length("sum") < 8 << 20 && longest > 16 << 20 && longest < 32 << 20, "{longest}");
    assert!(length("max") <= 64 << 10);
    // What is too long for one note ends them, and is found all the same.
    change(&two, "r", some(0, 80, 1_000)).await;
    assert_eq!(length("sum"), 0);
    let now = load(&one, "r").await;
    for have in [have, first] {
        assert_eq!(one.reload_run(&have).await.unwrap().unwrap(), now);
    }
}

/// The notes are a copy: where they make no sense, the rows do.
#[tokio::test]
async fn notes_of_changes_that_make_no_sense_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("a", NodeUpdate::running())]).await;
    change(&two, "other", vec![create(0)]).await;
    let have = load(&one, "r").await;
    change(&two, "r", vec![set("a", NodeUpdate::success())]).await;
    let now = load(&one, "r").await;
    for harm in ["'{'", "'[]'", r#"'{"":null}'"#, r#"'{"a":{"status":"success","attempt":-1}}'"#, "x'ff'"] {
        assert_eq!(raw(&db(dir.path())).execute(&format!("UPDATE change_sets SET nodes = {harm}"), []).unwrap(), 1);
        assert_eq!(one.reload_run(&have).await.unwrap().unwrap(), now, "{harm}");
    }
}

/// The versions fit by accident: this side's first entry was refused, somebody else's commit took its number, and the next entry of the broken
/// chain expects just that number. Its own view of the rows must not be written.
#[tokio::test]
async fn a_number_that_fits_by_accident_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    change(&one, "r", vec![create(0), set("m", NodeUpdate::pending())]).await;
    let seen = load(&one, "r").await;
    let guard = Guard::NodeStatus { node: node_id("m"), one_of: vec![NodeStatus::Failed] };
    let first = part_on(Some(&seen), seen.version(), "r", vec![guard], vec![set("m", NodeUpdate::new().metadata("never", 1))]);
    let tip = first.after.clone().unwrap();
    let second = part_on(Some(&tip), seen.version(), "r", vec![], vec![set("m", NodeUpdate::new().metadata("second", 1))]);
    refused(commit(&one, vec![entry(first)]).await.outcomes.remove(0));
    change(&two, "r", vec![set("x", NodeUpdate::running())]).await;
    applied(commit(&one, vec![entry(second)]).await.outcomes.remove(0));
    let state = load(&one, "r").await;
    let notes = &state.node("m").unwrap().metadata;
    assert!(notes.get("never").is_none(), "what was refused came in by the back door");
    assert!(notes.get("second").is_some());
    assert!(state.node("x").is_some());
}

#[tokio::test]
async fn openings_know_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let (one, two) = (open(&path).await, open(&path).await);
    let ids = |backend: &Backend| backend.process().unwrap().id;
    assert_ne!(ids(&one), ids(&two));
    let listed = one.processes().await.unwrap();
    assert_eq!(
        listed.iter().map(|process| (Arc::clone(&process.process.id), process.alive)).collect::<Vec<_>>(),
        [(ids(&one), Some(true)), (ids(&two), Some(true))]
    );
    two.close().await.unwrap();
    assert_eq!(one.processes().await.unwrap().len(), 1);

    // What a dead one left: its file, and nobody's lock on it.
    let own = std::fs::read_dir(dir.path().join("state.db.owners")).unwrap().next().unwrap().unwrap().path();
    let dead = std::fs::File::create(own.with_file_name("dead.lock")).unwrap();
    let mut left: serde_json::Value = serde_json::from_slice(&std::fs::read(&own).unwrap()).unwrap();
    left["process"]["id"] = "dead".into();
    // A copy of another one's proves nothing.
    std::io::Write::write_all(&mut &dead, left.to_string().as_bytes()).unwrap();
    let unproven = one.processes().await.unwrap();
    assert!(unproven.iter().any(|process| &*process.process.id == "dead" && process.alive.is_none()), "{unproven:?}");
    let meta = dead.metadata().unwrap();
    left["file"] = serde_json::json!([std::os::unix::fs::MetadataExt::dev(&meta), std::os::unix::fs::MetadataExt::ino(&meta)]);
    std::fs::write(own.with_file_name("dead.lock"), left.to_string()).unwrap();
    let listed = one.processes().await.unwrap();
    assert!(listed.iter().any(|process| &*process.process.id == "dead" && process.alive == Some(false)));
    assert!(own.with_file_name("dead.lock").exists(), "as long as locks of it may be there it is the proof that they are over");
    let three = open(&path).await;
    assert!(!own.with_file_name("dead.lock").exists(), "it is swept, with its locks, by the next opening");
    assert_eq!(three.processes().await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_busy_database_is_told_and_nothing_is_half_done() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let tip = load(&backend, "r").await;
    let foreign = raw(&path);
    foreign.execute_batch("BEGIN IMMEDIATE").unwrap();
    let batch =
        Arc::new(Batch::new(vec![entry(part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::running())]))]));
    let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::Busy, false));
    assert!(error.to_string().contains("seeknal state locks"), "{error}");
    assert!(error.to_string().contains("`fuser`"), "what is no program of ours is in no list of ours: {error}");
    assert_eq!(load(&backend, "r").await, tip, "reading goes on");
    foreign.execute_batch("ROLLBACK").unwrap();
    applied(backend.commit(batch).await.unwrap().outcomes.remove(0));
}

/// Not a test of its own: what [`killed_at_any_moment_nothing_told_is_lost`] starts and kills.
#[tokio::test]
async fn child_that_is_killed() {
    use std::io::Write;
    let Some(path) = std::env::var_os("SEEKNAL_TEST_CHILD_DB") else { return };
    let backend = open(Path::new(&path)).await;
    let run = std::process::id().to_string();
    change(&backend, &run, vec![create(0)]).await;
    let mut tip = load(&backend, &run).await;
    for count in 1_u64.. {
        // Two nodes in one entry: both or neither must be found.
        let mutations =
            vec![set("left", NodeUpdate::running().row_count(count)), set("right", NodeUpdate::running().row_count(count))];
        let part = part_on(Some(&tip), tip.version(), &run, vec![], mutations);
        tip = part.after.clone().unwrap();
        let receipt = applied(commit(&backend, vec![entry(part)]).await.outcomes.remove(0));
        let mut out = std::io::stdout().lock();
        writeln!(out, "ack {count} {}", receipt.runs[0].after).unwrap();
        out.flush().unwrap();
    }
}

#[tokio::test]
async fn killed_at_any_moment_nothing_told_is_lost() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    // A survivor has it open all the time, and every child comes to a database that the last one left behind.
    let survivor = open(&path).await;
    for acks in [1, 7, 40, 90] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "openings::child_that_is_killed", "--nocapture"])
            .env("SEEKNAL_TEST_CHILD_DB", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut told = (0_u64, 0_u64);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let note = |line: String, told: &mut (u64, u64)| {
            // A line that the kill cut short was not told.
            let Some(at) = line.find("ack ") else { return };
            let mut words = line[at..].split(' ').skip(1).map(str::parse);
            if let (Some(Ok(count)), Some(Ok(version))) = (words.next(), words.next()) {
                *told = (count, version);
            }
        };
        while told.0 < acks {
            note(lines.next().unwrap().unwrap(), &mut told);
        }
        child.kill().unwrap();
        // Everything but the last line, which may be cut short, counts.
        let mut rest: Vec<String> = lines.map_while(Result::ok).collect();
        rest.pop();
        for line in rest {
            note(line, &mut told);
        }
        child.wait().unwrap();

        let state = load(&survivor, &child.id().to_string()).await;
        let found = |node: &str| state.node(node).and_then(|node| node.row_count).unwrap();
        assert_eq!(found("left"), found("right"), "an entry is whole or not at all");
        assert!(found("left") >= told.0 && state.version().0 >= told.1, "told {told:?}, found {}", found("left"));
        let dead = survivor.processes().await.unwrap().into_iter().find(|other| other.process.pid == child.id()).unwrap();
        assert_eq!(dead.alive, Some(false), "its death is seen at once");
        change(&survivor, &format!("after {acks}"), vec![create(0)]).await;
    }
    assert!(survivor.verify().await.unwrap().is_sound());
}

/// Of whom nothing can be read nothing is known: least of all that he is dead.
#[tokio::test]
async fn an_opening_whose_file_cannot_be_read_is_not_taken_for_gone() {
    let dir = tempfile::tempdir().unwrap();
    let one = open(&db(dir.path())).await;
    let id = one.process().unwrap().id;
    let two = open(&db(dir.path())).await;
    let own = dir.path().join("state.db.owners").join(format!("{id}.lock"));
    std::fs::OpenOptions::new().write(true).truncate(true).open(&own).unwrap();
    let known = two.processes().await.unwrap();
    let found = known.iter().find(|opening| opening.process.id == id).expect("it is open");
    assert_eq!(found.alive, None);
}
