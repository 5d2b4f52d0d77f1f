//! Large tables and busy servers: what is read of them, and who thinks for long.

use seeknal_state::Coordinator;
use seeknal_state::model::RunFilter;

use super::doors::opened;
use super::*;

impl Store {
    /// So many runs that differ by a second, each with as many nodes, by SQL alone.
    fn fill(&self, runs: u32, nodes: u32) {
        self.sql(&format!(
            "INSERT INTO runs (run_id, status, created_at, version, created_version, header_version) \
             SELECT 'run' || r, 'success', '2024-01-01Z'::timestamptz + r * interval '1 s', 1, 1, 1 FROM generate_series(1, {runs}) AS r; \
             INSERT INTO node_states (run_id, node_id, status, attempt, version, run_created_at) \
             SELECT 'run' || r, 'node' || n, 'success', 1, 1, '2024-01-01Z'::timestamptz + r * interval '1 s' \
             FROM generate_series(1, {runs}) AS r, generate_series(1, {nodes}) AS n; ANALYZE"
        ));
    }

    /// Forgets what was counted before.
    fn count_anew(&self) {
        self.sql("SELECT pg_stat_reset_single_table_counters(c.oid) FROM pg_class AS c WHERE c.relnamespace = current_schema()::regnamespace");
    }

    /// How many rows of a table, or entries of its indexes, were read since. Sessions tell of it at their end.
    fn count(&self, table: &str) -> u64 {
        let sql = format!(
            "SELECT (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relid = '{table}'::regclass) \
             + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relid = '{table}'::regclass)"
        );
        self.sql(&sql).parse().unwrap()
    }

    /// Puts a view in a table's place; before each row of it that is read `refuse` is run, in PL/pgSQL.
    fn before_rows(&self, table: &str, refuse: &str) {
        self.sql(&format!(
            "CREATE FUNCTION before_{table}() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {refuse} RETURN true; END $$; \
             ALTER TABLE {table} RENAME TO {table}_there; CREATE VIEW {table} AS SELECT t.* FROM {table}_there AS t WHERE before_{table}()"
        ));
    }

    /// Refuses the first rows, each in words of its own, and no others; what is read leaves no trace but files.
    fn refuse_first(&self, times: u32, state: &str) {
        self.refuse_first_after(times, 0.0, state);
    }

    /// The same, after so many seconds each.
    fn refuse_first_after(&self, times: u32, seconds: f64, state: &str) {
        self.before_rows(
            "runs",
            &format!(
                "FOR i IN 1..{times} LOOP DECLARE file text := current_setting('data_directory') || '/{schema}_{state}_' || i; BEGIN \
                 IF (pg_stat_file(file, true)).size IS NULL THEN PERFORM pg_sleep({seconds}); EXECUTE format('COPY (SELECT 1) TO %L', file); \
                 RAISE EXCEPTION 'refused' USING ERRCODE = '{state}'; END IF; END; END LOOP;",
                schema = self.schema
            ),
        );
    }
}

/// On a standby a question stands in the way of what the primary did.
#[tokio::test]
async fn a_question_that_had_to_give_way_is_asked_again_a_few_times() {
    for (times, answered) in [(3, true), (1_000, false)] {
        let store = store!();
        let backend = store.open().await;
        change(&backend, "r", vec![create(0)]).await;
        store.refuse_first(times, "40001");
        let reading = opened(&store.options().read_only(true)).await;
        match reading.newest_versions(10).await {
            Ok(found) => assert!(answered && found.len() == 1, "{found:?}"),
            Err(error) => {
                assert!(!answered && error.kind() == StoreErrorKind::Busy && error.is_retryable(), "{error}");
                let words = error.to_string();
                assert!(
                    words.contains("hot_standby_feedback") && words.contains(" 13 times") && !words.contains("state locks"),
                    "{words}"
                );
            }
        }
    }
}

/// A standby lets what is read stand in the way for half a minute, so that a long question was on its way for as long before it gave way.
#[tokio::test]
async fn a_question_that_was_long_on_its_way_is_asked_again_too() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    store.refuse_first_after(1, 10.5, "40001");
    let reading = opened(&store.options().read_only(true)).await;
    let report = reading.verify().await.unwrap();
    assert!(report.is_sound(), "{:?}", report.problems);
}

/// An operator may have set how long a transaction takes at most.
#[tokio::test]
async fn a_question_whose_transaction_took_too_long_is_asked_again() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    store.refuse_first(1, "25P04");
    assert_eq!(backend.newest_versions(10).await.unwrap().len(), 1);
}

/// As `VACUUM FULL` or a change of the table keeps it: who lists runs has the patience that a commit has not.
#[tokio::test]
async fn a_list_waits_for_a_table_that_somebody_keeps() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    let mut keeper =
        store.cluster.session(&store.schema, "BEGIN; LOCK TABLE runs IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(9); COMMIT;");
    let kept = "SELECT count(*) FROM pg_locks WHERE relation = 'runs'::regclass AND mode = 'AccessExclusiveLock' AND granted";
    until("the table is kept", async || store.sql(kept) == "1").await;
    assert_eq!(backend.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 1);
    keeper.kill().unwrap();
    keeper.wait().unwrap();
}

#[tokio::test]
async fn names_of_nodes_are_read_without_all_rows_of_them() {
    let store = store!();
    store.open().await.close().await.unwrap();
    store.fill(2_000, 3);
    store.sql("INSERT INTO coverage SELECT 'kept', '2024-01-01Z'::timestamptz + n * interval '1 h', '2024-01-01Z'::timestamptz + (n + 0.5) * interval '1 h' \
               FROM generate_series(1, 2000) AS n");
    store.sql("INSERT INTO coverage_partitions SELECT 'keys', 'dt=' || n FROM generate_series(1, 2000) AS n; ANALYZE");
    store.count_anew();
    let backend = store.open().await;
    let found: Vec<String> = backend.node_ids().await.unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(found, ["kept", "keys", "node1", "node2", "node3"]);
    backend.close().await.unwrap();
    for table in ["node_states", "coverage", "coverage_partitions"] {
        until("it is counted", async || store.count(table) > 0).await;
        assert!(store.count(table) < 100, "{table}: {}", store.count(table));
    }
}

/// The nodes of a page are counted, and of no other runs.
#[tokio::test]
async fn nodes_are_counted_for_the_page_alone_and_for_no_opening() {
    let store = store!();
    store.open().await.close().await.unwrap();
    store.fill(3, 5_000);
    store.sql(
        "INSERT INTO runs (run_id, status, created_at, version, created_version, header_version) \
               SELECT 'old' || r, 'success', '2023-01-01Z', 1, 1, 1 FROM generate_series(1, 3000) AS r",
    );
    store.count_anew();
    let state = Coordinator::open(store.make()).await.unwrap();
    let at = state.backend().newest_creation(None).await.unwrap();
    assert_eq!(at, Some(chrono::DateTime::from_timestamp(1_704_067_203, 0).unwrap()));
    assert_eq!(state.backend().newest_creation(at).await.unwrap(), at.map(|at| at - chrono::TimeDelta::seconds(1)));
    state.close().await.unwrap();
    until("it is counted", async || store.count("runs") > 0).await;
    assert_eq!(store.count("node_states"), 0);

    store.count_anew();
    let backend = store.open().await;
    let page = backend.list_runs(&RunQuery::new(RunFilter::all()).limit(1)).await.unwrap();
    assert_eq!(page.runs[0].nodes.values().sum::<u64>(), 5_000);
    assert!(page.next.is_some());
    backend.close().await.unwrap();
    until("it is counted", async || store.count("node_states") > 0).await;
    assert!(store.count("node_states") < 6_000, "{}", store.count("node_states"));
    assert!(store.count("runs") < 100, "{}", store.count("runs"));
}

/// A server that thinks says nothing meanwhile.
#[tokio::test]
async fn lists_that_a_server_has_to_think_about_have_the_time() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
    let no_time = "IF current_setting('statement_timeout') = '10s' THEN RAISE query_canceled; END IF;";
    store.before_rows("node_states", no_time);
    assert_eq!(backend.list_runs(&RunQuery::new(RunFilter::all())).await.unwrap().runs.len(), 1);
    assert_eq!(backend.node_ids().await.unwrap().len(), 1);
}
