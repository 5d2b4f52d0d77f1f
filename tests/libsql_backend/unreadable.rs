//! Rows of runs that cannot be read: they are named, and keep no listing from the others.

use seeknal_state::store::create_state_backend;

use super::batches::{Backend, run_id};
use super::sqld::Sqld;
use super::telling::{assert_listed, assert_verified, names};

async fn open(server: &Sqld) -> Backend {
    let backend = create_state_backend("database", &server.options()).unwrap();
    backend.initialize().await.unwrap();
    backend
}

/// So many runs with one node each, `run0000` the newest.
fn many(server: &Sqld, runs: usize) {
    server.sql(&format!(
        "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {runs} - 1) \
         INSERT INTO runs (run_id, status, created_at, version, created_version, header_version) \
         SELECT printf('run%04d', i), 'success', strftime('%Y-%m-%dT%H:%M:%f000Z', '2024-01-31', '-' || i || ' seconds'), 1, 1, 1 FROM n"
    ));
    server.sql(
        "INSERT INTO node_states (run_id, node_id, status, attempt, version, run_created_at) \
         SELECT run_id, 'node', 'success', 1, 1, created_at FROM runs",
    );
    server.sql("UPDATE meta SET seq = 1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_row_that_cannot_be_read_is_named_beside_the_others() {
    let Some(server) = Sqld::start() else { return };
    let backend = open(&server).await;
    many(&server, 14);
    for (run, harm) in [
        (0, "metadata = '{'"),
        (2, "created_at = 'x'"),
        (3, "version = 'many'"),
        (5, "status = x'00'"),
        (6, "created_at = x'00'"),
        (7, "worker = '7'"),
        (8, "created_at = '2024-02-30T00:00:00.000000Z'"),
        (9, "run_id = x'72756eff'"),
        (10, "created_at = ''"),
        (12, "run_id = 'run' || char(10) || '12'"),
    ] {
        server.sql(&format!("UPDATE runs SET {harm} WHERE run_id = '{}'", names([run])[0]));
    }
    server.sql("UPDATE node_states SET status = x'00' WHERE run_id = 'run0013'");
    let mut unreadable = names([0, 2, 3, 5, 6, 7, 8, 10, 13]);
    unreadable.extend(["run\n12".to_owned(), "run\u{fffd}".to_owned()]);
    assert_listed(&backend, &[1, 2, 3, 4, 100], &names([1, 4, 11]), &unreadable).await;
    assert_verified(&backend, &unreadable).await;
    backend.close().await.unwrap();
}

/// A server answers with no row at all where one of them holds text that is not UTF-8, or a number that is not finite.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_that_is_not_utf8_and_numbers_without_end_are_named_beside_the_others() {
    let Some(server) = Sqld::start() else { return };
    let backend = open(&server).await;
    many(&server, 12);
    for (run, harm) in [
        (1, "metadata = CAST(x'7b2261223a2022ff227d' AS TEXT)"),
        (3, "status = CAST(x'72ff' AS TEXT)"),
        (4, "run_id = CAST(x'72756eff' AS TEXT)"),
        (6, "created_at = CAST(x'32ff' AS TEXT)"),
        (7, "version = 9e999"),
        (8, "run_id = CAST(x'6172756e3038ff' AS TEXT)"),
    ] {
        server.sql(&format!("UPDATE runs SET {harm} WHERE run_id = '{}'", names([run])[0]));
    }
    server.sql("UPDATE node_states SET status = CAST(x'ff' AS TEXT) WHERE run_id = 'run0009'");
    let mut unreadable = names([1, 3, 6, 7, 9]);
    unreadable.extend(["run\u{fffd}".to_owned(), "arun08\u{fffd}".to_owned()]);
    assert_listed(&backend, &[1, 2, 3, 4, 100], &names([0, 2, 5, 10, 11]), &unreadable).await;
    // Only reading the whole run meets these.
    server.sql("UPDATE node_states SET duration_ms = 9e999 WHERE run_id = 'run0010'");
    server.sql("UPDATE node_states SET error = CAST(x'ff' AS TEXT) WHERE run_id = 'run0011'");
    unreadable.extend(names([10, 11]));
    assert_verified(&backend, &unreadable).await;
    assert!(backend.newest_versions(20).await.unwrap().iter().any(|(run, _)| *run == run_id("run0011")));
    let of_one = backend.load_run(&run_id("run0010")).await.unwrap_err();
    assert!(of_one.is_of_one_entry() && !of_one.is_retryable(), "{of_one}");
    backend.close().await.unwrap();
}

/// More of them in a row than a page holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_rows_that_cannot_be_read_are_named_once_on_pages_of_any_length() {
    let Some(server) = Sqld::start() else { return };
    let backend = open(&server).await;
    many(&server, 1_600);
    let is_harmed = |run: &usize| [0, 1, 498, 499, 500, 501, 1_599].contains(run) || (700..1_400).contains(run);
    server.sql(
        "UPDATE runs SET metadata = '{' WHERE CAST(substr(run_id, 4) AS INTEGER) IN (0, 1, 498, 499, 500, 501, 1599) \
         OR CAST(substr(run_id, 4) AS INTEGER) BETWEEN 700 AND 1399",
    );
    let (harmed, sound): (Vec<usize>, Vec<usize>) = (0..1_600).partition(is_harmed);
    assert_listed(&backend, &[50, 500, 1_000], &names(sound), &names(harmed)).await;
    // Nothing else is there.
    server.sql("DELETE FROM runs WHERE metadata IS NULL");
    assert_listed(&backend, &[50], &[], &names((0..1_600).filter(is_harmed))).await;
    backend.close().await.unwrap();
}

/// A server's answer has a limit of 10 MB: neither all that can be read fits into one, nor all that cannot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_too_large_for_one_answer_are_listed_or_named_all_the_same() {
    let Some(server) = Sqld::start() else { return };
    let backend = open(&server).await;
    many(&server, 34);
    server.sql("UPDATE runs SET metadata = '{\"large\": \"' || hex(zeroblob(500000)) || '\"}'");
    let harmed = || (12..28).chain([33]);
    server
        .sql("UPDATE runs SET metadata = substr(metadata, 2) WHERE run_id BETWEEN 'run0012' AND 'run0027' OR run_id = 'run0033'");
    let sound = (0..34).filter(|run| !harmed().any(|harmed| harmed == *run));
    assert_listed(&backend, &[3, 500], &names(sound), &names(harmed())).await;
    backend.close().await.unwrap();
}
