//! What outlives deleted runs, against the backend that keeps it in memory: islands that overlap and touch over several runs, also where somebody wrote with SQL.

use seeknal_state::store::MemoryBackend;

use super::*;

/// What a run completed before it goes: the node, an interval and its length in hours, a partition, and whether the node succeeded.
type Done = (u8, i64, i64, u8, bool);

fn done() -> impl Strategy<Value = Vec<Done>> {
    prop::collection::vec((0..3_u8, 0..60_i64, 1..8_i64, 0..6_u8, any::<bool>()), 0..24)
}

fn mutations((node, from, length, partition, succeeds): Done, second: i64) -> Vec<Mutation> {
    let name = ["a", "b", "n/ö"][usize::from(node)];
    let mut made = vec![Mutation::AddInterval { node: node_id(name), interval: hours(from, from + length) }];
    if partition > 0 {
        made.push(Mutation::AddPartition {
            node: node_id(name),
            partition: PartitionKey::new(format!("p={partition}")).unwrap(),
        });
    }
    if succeeds {
        let update = NodeUpdate::success().row_count(u64::from(partition)).fingerprint(format!("f{second}"));
        made.push(Mutation::SetNode { node: node_id(name), update: Box::new(update), at: at(second) });
    }
    if length == 7 {
        made.push(Mutation::RemoveInterval { node: node_id(name), interval: hours(from + 2, from + 4) });
    }
    made
}

/// Deletes runs one after another: what they did before, what they do in the batch that deletes them, what they do in the very entry, and how they are kept.
async fn delete(backend: &Backend, runs: &[([Vec<Done>; 3], bool)]) {
    for (number, (done, keep_coverage)) in runs.iter().enumerate() {
        // Also older runs are deleted after newer ones.
        let run = format!("run {}", number % 3);
        let second = i64::try_from(number * 7 % 5).unwrap();
        let [before, beside, within] = done;
        let all = |done: &[Done]| done.iter().flat_map(|one| mutations(*one, second)).collect::<Vec<_>>();
        change(backend, &run, [vec![create(second)], all(before)].concat()).await;
        let tip = load(backend, &run).await;
        let made = if beside.is_empty() { Vec::new() } else { vec![all(beside)] };
        let last = [all(within), vec![Mutation::Delete { keep_coverage: *keep_coverage }]].concat();
        let mut tip = Some(tip);
        let base = tip.as_ref().unwrap().version();
        let mut entries = Vec::new();
        for mutations in [made, vec![last]].concat() {
            let part = part_on(tip.as_ref(), base, &run, vec![], mutations);
            tip.clone_from(&part.after);
            entries.push(entry(part));
        }
        commit(backend, entries).await.outcomes.into_iter().for_each(|outcome| drop(applied(outcome)));
    }
}

async fn asked(backend: &Backend) -> impl PartialEq + std::fmt::Debug + use<> {
    let mut retained = backend.retained().await.unwrap();
    retained.sort_by(|one, other| one.0.cmp(&other.0));
    let mut nodes = Vec::new();
    for node in ["a", "b", "n/ö"].map(node_id) {
        nodes.push((backend.coverage(&node).await.unwrap(), backend.last_success(&node).await.unwrap()));
    }
    (retained, nodes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn it_is_what_memory_keeps(runs in prop::collection::vec(([done(), done(), done()], prop::bool::weighted(0.85)), 1..8)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let backend = open(&db(dir.path())).await;
            let memory: Backend = Arc::new(MemoryBackend::new());
            memory.initialize().await.unwrap();
            delete(&backend, &runs).await;
            delete(&memory, &runs).await;
            let (found, expected) = (asked(&backend).await, asked(&memory).await);
            prop_assert!(found == expected, "{:#?}\ninstead of\n{:#?}", found, expected);
            prop_assert_eq!(backend.verify().await.unwrap().problems, Vec::<String>::new());
            Ok(())
        })?;
    }
}

/// What is written with SQL is read as it was: stamps of another form, and islands that overlap. What makes no sense keeps its run, whichever row it is.
#[tokio::test]
async fn rows_that_were_written_with_sql_outlive_their_run_or_keep_it() {
    let done = || {
        vec![
            create(0),
            set("n", NodeUpdate::success().row_count(3)),
            Mutation::AddInterval { node: node_id("n"), interval: hours(0, 10) },
            Mutation::AddInterval { node: node_id("n"), interval: hours(20, 30) },
            Mutation::AddPartition { node: node_id("n"), partition: PartitionKey::new("p").unwrap() },
        ]
    };
    let odd = [
        "UPDATE completed_intervals SET end_at = strftime('%Y-%m-%dT%H:%M:%fZ', end_at)",
        "UPDATE completed_intervals SET start_at = replace(start_at, '.000000Z', 'Z')",
        "INSERT INTO completed_intervals SELECT run_id, node_id, strftime('%Y-%m-%dT%H:%M:%f000Z', start_at, '+1 hour'), end_at FROM completed_intervals",
        "UPDATE node_states SET finished_at = strftime('%Y-%m-%dT%H:%M:%fZ', finished_at)",
        "UPDATE runs SET created_at = strftime('%Y-%m-%dT%H:%M:%fZ', created_at)",
        "UPDATE last_success SET run_created_at = '2023-11-14T22:13:19Z'",
    ];
    for odd in odd {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        let backend = open(&path).await;
        change(&backend, "first", [done(), vec![Mutation::Delete { keep_coverage: true }]].concat()).await;
        change(&backend, "r", done()).await;
        change(&backend, "r", vec![set("n", NodeUpdate::success().row_count(7))]).await;
        assert!(raw(&path).execute(odd, []).unwrap() > 0, "{odd}");
        let before = (backend.coverage(&node_id("n")).await.unwrap(), backend.last_success(&node_id("n")).await.unwrap());
        assert_eq!(before.1.as_ref().and_then(|success| success.row_count), Some(7), "{odd}");
        change(&backend, "r", vec![Mutation::Delete { keep_coverage: true }]).await;
        let after = (backend.coverage(&node_id("n")).await.unwrap(), backend.last_success(&node_id("n")).await.unwrap());
        assert_eq!(after, before, "{odd}");
        assert_eq!(backend.verify().await.unwrap().problems, Vec::<String>::new(), "{odd}");
    }
    let harms = [
        "UPDATE node_states SET metadata = '{'",
        "UPDATE node_states SET node_id = 'm'",
        "UPDATE completed_intervals SET end_at = 'x'",
        "UPDATE completed_intervals SET end_at = start_at",
        "UPDATE completed_intervals SET node_id = 'a'",
        "UPDATE completed_intervals SET node_id = 'z'",
        "UPDATE partitions SET partition = ''",
        "UPDATE partitions SET node_id = 'z'",
        "UPDATE runs SET metadata = '{'",
        "UPDATE last_success SET finished_at = 'x'",
        "UPDATE coverage SET start_at = '0' WHERE start_at = (SELECT min(start_at) FROM coverage)",
    ];
    for harm in harms {
        let dir = tempfile::tempdir().unwrap();
        let path = db(dir.path());
        let backend = open(&path).await;
        change(&backend, "first", [done(), vec![Mutation::Delete { keep_coverage: true }]].concat()).await;
        change(&backend, "r", done()).await;
        let tip = load(&backend, "r").await;
        let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![Mutation::Delete { keep_coverage: true }]);
        assert!(raw(&path).execute(harm, []).unwrap() > 0, "{harm}");
        let error = backend.commit(Arc::new(Batch::new(vec![entry(part)]))).await.unwrap_err();
        assert!(error.kind() == StoreErrorKind::Corrupt && error.is_of_one_entry(), "{harm}: {error}");
        assert_eq!(backend.run_version(&run_id("r")).await.unwrap(), Some(tip.version()), "{harm}");
    }
}
