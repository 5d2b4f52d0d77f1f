//! What holds for the sessions of an opening: settings, limits of time, and which host they lead to.

use super::*;

/// Notes in the table `noted` what is set in the sessions that write to a table.
fn note_settings(store: &Store, table: &str, names: &[&str]) {
    let values: Vec<String> = names.iter().map(|name| format!("(TG_TABLE_NAME, '{name}', current_setting('{name}'))")).collect();
    store.sql(&format!(
        "CREATE TABLE IF NOT EXISTS noted (place text, name text, value text); \
         CREATE FUNCTION note_{table}() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN INSERT INTO noted VALUES {}; RETURN NEW; END $$; \
         CREATE TRIGGER note BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION note_{table}()",
        values.join(", ")
    ));
}

#[tokio::test]
async fn plans_are_not_compiled_and_the_server_asks_whether_a_machine_is_still_there() {
    let store = store!();
    store.open().await.close().await.unwrap();
    let names = ["jit", "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"];
    note_settings(&store, "batches", &names);
    note_settings(&store, "openings", &names);
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    let noted = store.sql("SELECT place || ' ' || string_agg(DISTINCT name || '=' || value, ' ' ORDER BY name || '=' || value) FROM noted GROUP BY place ORDER BY place");
    let set = "jit=off tcp_keepalives_count=3 tcp_keepalives_idle=10 tcp_keepalives_interval=5 tcp_user_timeout=15000";
    assert_eq!(noted, format!("batches {set}\nopenings {set}"));
}
