//! Commits: what lies in the tables, races between openings, batches that are sent again.

use seeknal_state::Coordinator;

use super::*;

#[tokio::test]
async fn operators_read_the_tables_with_sql() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    let update =
        NodeUpdate::failed("nul \0 here").row_count(u64::MAX).duration_ms(1 << 63).fingerprint("abc123").metadata("k", "\0");
    let node = node_id("n/ö");
    change(
        &backend,
        "r",
        vec![
            set("n/ö", update),
            Mutation::AddInterval { node: node.clone(), interval: hours(0, 24) },
            Mutation::AddPartition { node, partition: PartitionKey::new("dt=2024").unwrap() },
        ],
    )
    .await;
    assert_eq!(
        store.sql("SELECT r.status, n.node_id, n.status, row_count, duration_ms, fingerprint, error, n.metadata FROM runs r JOIN node_states n USING (run_id)"),
        r#"running|n/ö|failed|18446744073709551615|9223372036854775808|abc123|"nul \u0000 here"|{"k":"\u0000"}"#
    );
    assert_eq!(
        store.sql("SET TimeZone = 'UTC'; SELECT start_at, end_at FROM completed_intervals"),
        "2023-11-14 22:13:20+00|2023-11-15 22:13:20+00"
    );
    assert_eq!(store.sql("SELECT partition FROM partitions"), "dt=2024");
    let state = load(&backend, "r").await;
    let state = state.node("n/ö").unwrap();
    assert_eq!(
        (state.row_count, state.duration_ms, state.error.as_deref()),
        (Some(u64::MAX), Some(1 << 63), Some("nul \0 here"))
    );
    assert!(backend.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn a_run_that_many_make_at_once_is_made_once() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    for round in 0..10 {
        let name = format!("run{round}");
        let make = |backend: &Backend| {
            let (backend, part) = (Arc::clone(backend), part_on(None, Version::NONE, &name, vec![], vec![create(round)]));
            tokio::spawn(async move { commit(&backend, vec![entry(part)]).await.outcomes.remove(0) })
        };
        let tries = [make(&one), make(&two), make(&one), make(&two)];
        let mut made = 0;
        for outcome in tries {
            match outcome.await.unwrap() {
                Outcome::Applied(receipt) => {
                    made += 1;
                    assert_eq!(load(&one, &name).await.version(), receipt.runs[0].after);
                }
                Outcome::Refused(refusal) => assert!(matches!(refusal, Refusal::RunExists { .. }), "{refusal}"),
            }
        }
        assert_eq!(made, 1);
    }
}

#[tokio::test]
async fn nothing_is_lost_when_two_openings_count_in_one_node() {
    const EACH: u64 = 25;
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0), set("n", NodeUpdate::running().row_count(0))]).await;
    let count = |backend: &Backend| {
        let backend = Arc::clone(backend);
        tokio::spawn(async move {
            let mut done = 0;
            while done < EACH {
                let tip = load(&backend, "r").await;
                let rows = tip.node("n").unwrap().row_count.unwrap();
                let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::new().row_count(rows + 1))]);
                match commit(&backend, vec![entry(part)]).await.outcomes.remove(0) {
                    Outcome::Applied(_) => done += 1,
                    Outcome::Refused(refusal) => assert!(matches!(refusal, Refusal::Stale { .. }), "{refusal}"),
                }
            }
        })
    };
    let counters = [count(&one), count(&two), count(&one), count(&two)];
    for counter in counters {
        counter.await.unwrap();
    }
    let end = load(&one, "r").await;
    assert_eq!(end.node("n").unwrap().row_count, Some(4 * EACH));
    assert_eq!(end.version().0 - end.created_version().0, 4 * EACH);
}

#[tokio::test]
async fn guards_on_each_others_rows_never_both_hold() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    // Write skew: each wants the other run to be running still, and ends its own.
    for round in 0..10 {
        let names = [format!("a{round}"), format!("b{round}")];
        for name in &names {
            change(&one, name, vec![create(0)]).await;
        }
        let end = |backend: &Backend, mine: usize| {
            let (backend, names) = (Arc::clone(backend), names.clone());
            tokio::spawn(async move {
                let mut parts = Vec::new();
                for (index, name) in names.iter().enumerate() {
                    let tip = load(&backend, name).await;
                    let running = Guard::RunStatus(vec![RunStatus::Running]);
                    let mutations =
                        if index == mine { vec![Mutation::Update { update: RunUpdate::success(), at: at(9) }] } else { vec![] };
                    parts.push(part_on(Some(&tip), tip.version(), name, vec![running], mutations));
                }
                commit(&backend, vec![Entry { parts, ..Entry::default() }]).await.outcomes.remove(0)
            })
        };
        let (first, second) = (end(&one, 0), end(&two, 1));
        let outcomes = [first.await.unwrap(), second.await.unwrap()];
        let won = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Applied(_))).count();
        assert_eq!(won, 1, "{outcomes:?}");
    }
}

#[tokio::test]
async fn a_batch_that_is_sent_twice_at_once_is_applied_once() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0)]).await;
    for _ in 0..10 {
        let tip = load(&one, "r").await;
        let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::running())]);
        let batch = Arc::new(Batch::new(vec![entry(part), grant(LeaseKey::run(run_id("other")), "me", 0)]));
        let (first, second) = tokio::join!(one.commit(Arc::clone(&batch)), two.commit(Arc::clone(&batch)));
        assert_eq!(first.unwrap(), second.unwrap());
        assert_eq!(load(&one, "r").await.version(), tip.version().next());
        assert_eq!(one.commit(batch).await.unwrap().outcomes.len(), 2);
    }
}

#[tokio::test]
async fn a_big_batch_over_many_runs_goes_down_in_one() {
    let store = store!();
    let backend = store.open().await;
    let made = (0..500)
        .map(|index| entry(part_on(None, Version::NONE, &format!("run{index:03}"), vec![], vec![create(index)])))
        .collect();
    assert!(commit(&backend, made).await.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_))));
    let page = backend.list_runs(&RunQuery::default().limit(200)).await.unwrap();
    assert_eq!((page.runs.len(), page.runs[0].run_id.as_str()), (200, "run499"));
    let rest = backend.list_runs(&RunQuery::default().limit(400).after(page.next)).await.unwrap();
    assert_eq!((rest.runs.len(), rest.next), (300, None));
    let gone = (0..500).map(|index| format!("run{index:03}"));
    let mut entries = Vec::new();
    for name in gone {
        let tip = load(&backend, &name).await;
        entries.push(entry(part_on(Some(&tip), tip.version(), &name, vec![], vec![Mutation::Delete { keep_coverage: true }])));
    }
    assert!(commit(&backend, entries).await.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_))));
    assert_eq!(store.sql("SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM tombstones)"), "0|500");
}

#[tokio::test]
async fn deletions_that_meet_on_one_node_keep_all_its_coverage() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    let mut deleted = Vec::new();
    for index in 0..8 {
        let name = format!("run{index}");
        let add = Mutation::AddInterval { node: node_id("n"), interval: hours(index, index + 1) };
        change(&one, &name, vec![create(index), add]).await;
        let backend = Arc::clone(if index % 2 == 0 { &one } else { &two });
        let tip = load(&backend, &name).await;
        let part = part_on(Some(&tip), tip.version(), &name, vec![], vec![Mutation::Delete { keep_coverage: true }]);
        deleted.push((backend, part));
    }
    let tasks: Vec<_> = deleted
        .into_iter()
        .map(|(backend, part)| tokio::spawn(async move { commit(&backend, vec![entry(part)]).await }))
        .collect();
    for task in tasks {
        applied(task.await.unwrap().outcomes.remove(0));
    }
    let coverage = one.coverage(&node_id("n")).await.unwrap();
    assert_eq!(coverage.intervals.iter().collect::<Vec<_>>(), [hours(0, 8)]);
    assert_eq!(store.sql("SELECT count(*) FROM coverage"), "1");
    assert!(one.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn verify_names_what_was_damaged_by_hand() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
    store.sql("INSERT INTO partitions VALUES ('r', 'nobody', 'p'); UPDATE node_states SET metadata = 'no json'");
    let problems = backend.verify().await.unwrap().problems.join("\n");
    assert!(problems.contains("run r, node nobody") && problems.contains("column metadata"), "{problems}");
    assert_eq!(backend.load_run(&run_id("r")).await.unwrap_err().kind(), StoreErrorKind::Corrupt);
}

#[tokio::test]
async fn ids_that_are_too_long_for_the_server_are_refused_by_name_and_alone() {
    let store = store!();
    let state = Coordinator::open(store.open().await).await.unwrap();
    // Nothing in them repeats: the server stores what repeats shorter.
    let long = |seed: u64| -> String {
        let mut dice = seed;
        let mut next = || {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            char::from(b'a' + u8::try_from(dice % 26).unwrap())
        };
        (0..1024).map(|_| next()).collect()
    };
    let (run, node, partition) = (long(1), long(2), long(3));
    state.create_run(&run, NewRun::running()).await.unwrap();
    for other in 0..20 {
        state.create_run(format!("r{other}"), NewRun::running()).await.unwrap();
    }
    let mut writes = tokio::task::JoinSet::new();
    for other in 0..20 {
        let state = state.clone();
        writes.spawn(async move { state.set_node_state(format!("r{other}"), "n", NodeUpdate::success()).await });
    }
    let error = state.add_completed_partition(&run, &node, &partition).await.unwrap_err();
    let told = error.to_string();
    assert!(told.contains("2,600 bytes") && !error.is_unknown_outcome(), "{told}");
    while let Some(write) = writes.join_next().await {
        write.unwrap().unwrap();
    }
    state.set_node_state(&run, &node, NodeUpdate::success()).await.unwrap();
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_an_order_of_its_own_knows_no_deadlocks() {
    let store = store!();
    let name = format!("ordered_{}", store.schema);
    store.cluster.sql(&format!(
        "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'"
    ));
    let order =
        store.cluster.sql("SELECT string_agg(k, ',' ORDER BY k COLLATE \"en-US-x-icu\") FROM unnest(ARRAY['B', 'a']) AS k");
    assert_eq!(order, "a,B", "there the runs of this test lie the other way round than by their bytes");
    let options = store.options().database_url(store.cluster.url("").replace("/tests", &format!("/{name}")));
    let open = async || Coordinator::open(create_state_backend("database", &options).unwrap()).await.unwrap();
    let state = open().await;
    for run in ["a", "B"] {
        state.create_run(run, NewRun::running()).await.unwrap();
        for node in ["n0", "n1", "n2", "n3"] {
            state.set_node_state(run, node, NodeUpdate::running()).await.unwrap();
        }
    }
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..4_u64 {
        let state = open().await;
        clients.spawn(async move {
            for row in 0..40 {
                let mut tx = state.transaction();
                for run in ["a", "B"] {
                    let node = format!("n{client}");
                    if client % 2 == 1 {
                        // No plain change: its runs are locked before they are written.
                        tx.delete_node(run, &node);
                    }
                    tx.set_node_state(run, &node, NodeUpdate::running().row_count(row));
                }
                tx.commit().await.unwrap();
            }
            state.close().await.unwrap();
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    state.close().await.unwrap();
    let deadlocks = || {
        store.cluster.sql(&format!("SELECT pg_stat_clear_snapshot(), deadlocks FROM pg_stat_database WHERE datname = '{name}'"))
    };
    // A backend that has ended has told its figures.
    until("the figures are there", async || {
        store.cluster.sql(&format!("SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")) == "0"
    })
    .await;
    assert_eq!(deadlocks().trim_start_matches('|'), "0");
}
