//! Large tables and busy servers: what is read of them, and who thinks for long.

use super::doors::opened;
use super::*;

impl Store {
    /// Puts a view in a table's place; before each row of it that is read `refuse` is run, in PL/pgSQL.
    fn before_rows(&self, table: &str, refuse: &str) {
        self.sql(&format!(
            "CREATE FUNCTION before_{table}() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN {refuse} RETURN true; END $$; \
             ALTER TABLE {table} RENAME TO {table}_there; CREATE VIEW {table} AS SELECT t.* FROM {table}_there AS t WHERE before_{table}()"
        ));
    }

    /// Refuses the first rows, each in words of its own, and no others; what is read leaves no trace but files.
    fn refuse_first(&self, times: u32, state: &str) {
        self.before_rows(
            "runs",
            &format!(
                "FOR i IN 1..{times} LOOP DECLARE file text := current_setting('data_directory') || '/{schema}_{state}_' || i; BEGIN \
                 IF (pg_stat_file(file, true)).size IS NULL THEN EXECUTE format('COPY (SELECT 1) TO %L', file); \
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
                assert!(words.contains("hot_standby_feedback") && !words.contains("state locks"), "{words}");
            }
        }
    }
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
