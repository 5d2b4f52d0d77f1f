//! Rows that nobody asks for any more: answers, deleted runs and locks of openings that are gone do not pile up.

use seeknal_state::{Coordinator, NewRun, NodeUpdate, create_state_backend};

use super::sqld::Sqld;

/// How many rows there are.
fn count(server: &Sqld, rows: &str) -> u64 {
    let answer = server.sql(&format!("SELECT count(*) AS n FROM {rows}"));
    let value = answer.split(r#""value":""#).nth(1).and_then(|rest| rest.split('"').next());
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{answer}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_openings_that_are_gone_left_goes_however_much_it_is() {
    const ROWS: usize = 2_200;
    const OLD: &str = "unixepoch() - 172800";
    let Some(server) = Sqld::start() else { return };
    let open = async || Coordinator::open(create_state_backend("database", &server.options()).unwrap()).await.unwrap();
    let state = open().await;
    state.create_run("run", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    let fill = |into: &str, values: &str| {
        server.sql(&format!(
            "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {ROWS}) INSERT INTO {into} SELECT {values} FROM n"
        ));
    };
    fill("batches (id, at, answers, seq, token, versions)", &format!("printf('00000000-%06d', n), {OLD}, 'null', 0, 0, '{{}}'"));
    fill("tombstones (run_id, version, deleted_at)", &format!("'gone ' || n, 1, {OLD}"));
    let (batches, tombstones) = ("batches WHERE at < unixepoch() - 86400", "tombstones");
    assert_eq!((count(&server, batches), count(&server, tombstones)), (ROWS as u64, ROWS as u64));

    let state = open().await;
    for rows in 0..6 {
        state.set_node_state("run", "n", NodeUpdate::running().row_count(rows)).await.unwrap();
    }
    assert_eq!((count(&server, batches), count(&server, tombstones)), (0, 0), "some of them stay for ever");
    state.close().await.unwrap();
}
