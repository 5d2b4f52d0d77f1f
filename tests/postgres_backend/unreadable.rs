//! Rows of runs that cannot be read: they are named, and keep no listing from the others.

use seeknal_state::model::RunFilter;

use super::*;
use crate::telling::{assert_listed, assert_verified, listed, names};

impl Store {
    /// So many runs with one node each, `run0000` the newest.
    fn many(&self, runs: usize) {
        self.sql(&format!(
            "INSERT INTO runs (run_id, status, created_at, version, created_version, header_version) \
             SELECT 'run' || lpad(r::text, 4, '0'), 'success', '2024-01-01Z'::timestamptz - r * interval '1 s', 1, 1, 1 FROM generate_series(0, {runs} - 1) AS r; \
             INSERT INTO node_states (run_id, node_id, status, attempt, version, run_created_at) \
             SELECT run_id, 'node', 'success', 1, 1, created_at FROM runs"
        ));
    }
}

#[tokio::test]
async fn every_kind_of_row_that_cannot_be_read_is_named_beside_the_others() {
    let store = store!();
    let backend = store.open().await;
    store.many(14);
    for (run, harm) in [
        (0, "metadata = '{'"),
        (2, "created_at = '2023-12-31T23:59:58Z', finished_at = 'infinity'"),
        (3, "version = -1"),
        (5, "status = '\"not closed'"),
        (6, "created_at = '-infinity'"),
        (7, "worker = '7'"),
        (8, "created_at = '20000-01-01Z'"),
        (9, "created_at = 'infinity'"),
        (10, "created_at = '0044-03-15Z BC'"),
        (12, "run_id = 'run' || chr(10) || '12'"),
    ] {
        store.sql(&format!("UPDATE runs SET {harm} WHERE run_id = '{}'", names([run])[0]));
    }
    store.sql("UPDATE node_states SET status = '\"' WHERE run_id = 'run0013'");
    let mut unreadable = names([0, 2, 3, 5, 6, 7, 8, 9, 10, 13]);
    unreadable.push("run\n12".to_owned());
    assert_listed(&backend, &[1, 2, 3, 4, 100], &names([1, 4, 11]), &unreadable).await;
    assert_verified(&backend, &unreadable).await;

    // Only those that were asked for: an end of time lies within no bounds.
    let before = chrono::DateTime::from_timestamp(1_704_067_200 - 4, 0).unwrap();
    let bounds = RunFilter::all().created_before(before).created_from(before - chrono::TimeDelta::seconds(7));
    let (runs, unreadable) = listed(&backend, &bounds, 2).await;
    assert_eq!((runs, Vec::from_iter(unreadable)), (names([11]), names([5, 7])));
    backend.close().await.unwrap();
}

/// More of them in a row than a page holds.
#[tokio::test]
async fn many_rows_that_cannot_be_read_are_named_once_on_pages_of_any_length() {
    let store = store!();
    let backend = store.open().await;
    store.many(1_600);
    let is_harmed = |run: &usize| [0, 1, 498, 499, 500, 501, 1_599].contains(run) || (700..1_400).contains(run);
    store.sql(
        "UPDATE runs SET metadata = '{' WHERE substr(run_id, 4)::int IN (0, 1, 498, 499, 500, 501, 1599) OR substr(run_id, 4)::int BETWEEN 700 AND 1399",
    );
    let (harmed, sound): (Vec<usize>, Vec<usize>) = (0..1_600).partition(is_harmed);
    assert_listed(&backend, &[50, 500, 1_000], &names(sound), &names(harmed)).await;
    // Nothing else is there.
    store.sql("DELETE FROM runs WHERE metadata IS NULL");
    assert_listed(&backend, &[50], &[], &names((0..1_600).filter(is_harmed))).await;
    backend.close().await.unwrap();
}
