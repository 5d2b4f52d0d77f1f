//! Credentials that are right, wrong, read-only and expired, each with encryption and without: one clear error, nothing changed, no secret told.

use super::doors::refusal_of;
use super::*;

/// Everything that the tables of a schema hold, as text; empty if there is no such schema.
fn contents(store: &Store) -> String {
    if store.sql("SELECT nspname FROM pg_namespace WHERE nspname = current_schema()").is_empty() {
        return String::new();
    }
    let tables = store.sql("SELECT tablename FROM pg_tables WHERE schemaname = current_schema() ORDER BY 1");
    let rows = |table: &str| format!("{table}: {}", store.sql(&format!("SELECT * FROM \"{table}\" ORDER BY 1")));
    tables.lines().map(rows).collect::<Vec<_>>().join("\n")
}

/// Before a change of rights: the server refuses two such changes of one database at once.
const ONE_AT_A_TIME: &str = "SELECT FROM pg_advisory_xact_lock(4711)";

async fn tried(host: &str, query: &str, encrypted: bool) {
    let store = store!();
    let expired = format!("expired_{}", store.schema);
    store.cluster.sql(&format!("CREATE ROLE {expired} LOGIN PASSWORD '{}' VALID UNTIL '2000-01-01'", server::PASSWORD));
    // What it could do if it were not: the refusal is not for want of rights.
    store.cluster.sql(&format!("{ONE_AT_A_TIME}; GRANT ALL ON DATABASE tests TO {expired}"));
    let with = |user: &str, password: &str| {
        let options = store.options().database_url(store.cluster.url_of(user, password, host, query));
        if encrypted { options.set("database_ca_file", store.cluster.ca_file().to_string_lossy()) } else { options }
    };
    let wrong = [
        ("another password", with("postgres", "wrong-pass")),
        ("somebody who is not known", with("nobody", server::PASSWORD)),
        ("expired", with(&expired, server::PASSWORD)),
    ];
    let reader = with("reader", server::PASSWORD);

    // Before there is anything: nobody but who may write makes it.
    for (name, options) in &wrong {
        assert_eq!(refusal_of(options).await.kind(), StoreErrorKind::Input, "{name}");
    }
    assert_eq!(refusal_of(&reader).await.kind(), StoreErrorKind::ReadOnly);
    assert_eq!(contents(&store), "", "something was made");

    // The right ones.
    let backend = create_state_backend("database", &with("postgres", server::PASSWORD)).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
    let of_ours = format!(
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'seeknal-state' AND ssl = {encrypted}"
    );
    assert_ne!(store.cluster.sql(&of_ours), "0", "encrypted as it was asked for");
    assert!(!format!("{backend:?} {}", backend.location()).contains(server::PASSWORD));
    let run = load(&backend, "r").await;
    backend.close().await.unwrap();
    let s = &store.schema;
    store.sql(&format!(
        "GRANT USAGE ON SCHEMA {s} TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA {s} TO reader; GRANT SELECT ON ALL SEQUENCES IN SCHEMA {s} TO reader"
    ));

    let before = contents(&store);
    for (name, options) in &wrong {
        for options in [options.clone(), options.clone().read_only(true)] {
            let error = refusal_of(&options).await;
            assert_eq!(error.kind(), StoreErrorKind::Input, "{name}: {error}");
            let text = error.to_string();
            assert!(text.contains("check the user and the password") && text.lines().count() == 1, "{name}: {text}");
        }
    }
    let error = refusal_of(&reader).await;
    assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");
    let reading = create_state_backend("database", &reader.read_only(true)).unwrap();
    reading.initialize().await.unwrap();
    assert_eq!(load(&reading, "r").await, run, "it reads");
    let part = part_on(Some(&run), run.version(), "r", vec![], vec![set("n", NodeUpdate::running())]);
    let error = reading.commit(Arc::new(Batch::new(vec![entry(part)]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::ReadOnly, false), "{error}");
    reading.close().await.unwrap();
    assert_eq!(contents(&store), before, "nothing was changed");
    store.cluster.sql(&format!("{ONE_AT_A_TIME}; REVOKE ALL ON DATABASE tests FROM {expired}; DROP ROLE {expired}"));
}

#[tokio::test]
async fn credentials_without_encryption() {
    tried("127.0.0.1", "?sslmode=disable", false).await;
}

#[tokio::test]
async fn credentials_through_encryption() {
    tried("localhost", "?sslmode=verify-full", true).await;
}
