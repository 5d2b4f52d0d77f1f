//! Rows that nobody asks for any more: answers, deleted runs and locks of openings that are gone do not pile up.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_openings_that_are_gone_left_goes_however_much_it_is() {
    let store = store!();
    let state = store.open().await;
    change(&state, "run", vec![create(0)]).await;
    state.close().await.unwrap();
    store.sql(
        "INSERT INTO batches (id, at, answers) SELECT gen_random_uuid(), now() - interval '2 days', '' FROM generate_series(1, 11000)",
    );
    store.sql(
        "INSERT INTO tombstones (run_id, version, deleted_at) SELECT 'gone ' || n, 1, now() - interval '2 days' FROM generate_series(1, 100) AS n",
    );
    // One on a name that is no run, and one that is over since a moment.
    store.sql(
        "INSERT INTO locks (run_id, node_id, token, owner, owner_host, owner_pid, owner_process, owner_started_at, since, until, ttl_ms, expires_at) \
         SELECT name, '', token, 'o', 'h', 1, 'p', now(), now(), now(), 1, now() - ago::interval \
         FROM (VALUES ('a name', 1, '2 days'), ('run', 2, '1 second')) AS l (name, token, ago)",
    );
    let state = store.open().await;
    change(&state, "run", vec![set("n", NodeUpdate::running())]).await;
    let old = "SELECT (SELECT count(*) FROM batches WHERE at < now() - interval '1 day') + (SELECT count(*) FROM tombstones)";
    until("what others left is gone", async || store.sql(old) == "0").await;
    assert_eq!(store.sql("SELECT run_id FROM locks"), "run", "a lock that was over for a day");
    state.close().await.unwrap();
}

/// Who works for long has few answers stored, whatever becomes of the connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_were_told_are_removed_also_behind_a_connection_that_failed() {
    let store = store!();
    let state = store.open().await;
    change(&state, "run", vec![create(0)]).await;
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not now'; END $$; \
                  CREATE TRIGGER refuse BEFORE DELETE ON batches EXECUTE FUNCTION refuse()";
    store.sql(refuse);
    let rows = async |rows: u64| {
        for row in 0..rows {
            change(&state, "run", vec![set("n", NodeUpdate::running().row_count(row))]).await;
        }
    };
    rows(780).await;
    let count = || store.sql("SELECT count(*) FROM batches").parse::<u64>().unwrap();
    assert!(count() > 770, "{}", count());
    store.sql("DROP TRIGGER refuse ON batches");
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    while count() > 600 {
        assert!(tokio::time::Instant::now() < patience, "the answers stay: {}", count());
        rows(1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    state.close().await.unwrap();
}
