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

/// A network that passes on what a client sends, but takes a long rest behind the first so many bytes of a connection.
async fn slow_network(server: u16, bytes: usize, rest: Duration) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(("127.0.0.1", server)).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await.is_ok() });
            tokio::spawn(async move {
                let (mut buffer, mut passed) = (vec![0; 16 * 1024], 0);
                while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
                    if (passed..passed + read).contains(&bytes) {
                        tokio::time::sleep(rest).await;
                    }
                    passed += read;
                    if to_server.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// The server's patience inside a transaction, 3 s, runs until a statement has arrived as a whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_batch_may_be_on_the_way_for_longer_than_the_server_waits_for_a_small_one() {
    let store = store!();
    store.open().await.close().await.unwrap();
    let limits = ["idle_in_transaction_session_timeout", "statement_timeout"];
    note_settings(&store, "runs", &limits);
    note_settings(&store, "node_states", &limits);
    let port = slow_network(store.cluster.port, 400 << 10, Duration::from_millis(3_500)).await;
    let url = store.cluster.url("?sslmode=disable").replace(&format!(":{}/", store.cluster.port), &format!(":{port}/"));
    let backend = create_state_backend("database", &store.options().database_url(url)).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
    let text = "x".repeat(1 << 20);
    change(&backend, "r", vec![set("n", NodeUpdate::failed(&text))]).await;
    assert_eq!(load(&backend, "r").await.node("n").unwrap().error.as_deref(), Some(text.as_str()));
    backend.close().await.unwrap();
    let beyond = |table: &str, limit: &str, seconds: u32| {
        store.sql(&format!(
            "SELECT bool_and(value::interval > '{seconds} s') FROM noted WHERE place = '{table}' AND name = '{limit}'"
        ))
    };
    assert_eq!(beyond("node_states", limits[0], 10), "t");
    assert_eq!(beyond("node_states", limits[1], 17), "t");
    assert_eq!(beyond("runs", limits[0], 3), "f", "what is light holds nobody up for longer");
}

/// Somebody who takes connections and says nothing, as a machine does that is stopped, or a proxy before a server that is gone.
fn silent() -> (std::net::TcpListener, u16) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_host_that_says_nothing_the_next_one_is_tried() {
    let store = store!();
    let (listener, nobody) = silent();
    let url = format!(
        "postgres://postgres:{}@127.0.0.1:{nobody},127.0.0.1:{}/tests?connect_timeout=3",
        server::PASSWORD,
        store.cluster.port
    );
    let backend = create_state_backend("database", &store.options().database_url(url)).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    listener.set_nonblocking(true).unwrap();
    let tried = std::iter::from_fn(|| listener.accept().ok()).count();
    assert_eq!(tried, 1, "whom it reached comes first from then on");
}

#[tokio::test]
async fn an_address_without_a_name_is_enough_with_and_without_encryption() {
    let store = store!();
    for (mode, encrypted) in [("", "t"), ("&sslmode=disable", "f"), ("&sslmode=require", "t")] {
        let url = format!("postgres://postgres:{}@/tests?hostaddr=127.0.0.1&port={}{mode}", server::PASSWORD, store.cluster.port);
        let backend = create_state_backend("database", &store.options().database_url(url)).unwrap();
        backend.initialize().await.unwrap_or_else(|error| panic!("{mode}: {error}"));
        let process = backend.process().unwrap().id;
        let sessions = format!(
            "SELECT bool_or(ssl) FROM pg_stat_ssl JOIN pg_locks USING (pid) JOIN openings AS o ON o.lock_class::bigint & 4294967295 = classid::bigint AND o.lock_id::bigint & 4294967295 = objid::bigint WHERE process = '{process}'"
        );
        assert_eq!(store.sql(&sessions), encrypted, "{mode}");
        backend.close().await.unwrap();
    }
}

/// A large state is gone through in minutes, with the plans for that.
#[tokio::test]
async fn a_check_of_everything_has_plans_and_limits_of_its_own() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
    // Only the check asks this table for what has no answer.
    store.sql(
        "ALTER TABLE batches RENAME TO batches_kept; \
         CREATE FUNCTION settings() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN \
         IF current_setting('enable_seqscan') = 'off' OR current_setting('enable_hashjoin') = 'off' \
         OR current_setting('statement_timeout')::interval < '1 min' THEN RAISE EXCEPTION 'as for reading one row'; END IF; \
         RETURN true; END $$; \
         CREATE VIEW batches AS SELECT * FROM batches_kept WHERE settings() OFFSET 0",
    );
    let report = backend.verify().await.unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(report.checked.len(), 3, "{report:?}");
    backend.close().await.unwrap();
}

/// A network before a server that encrypts with a certificate of X.509 version 1, as `openssl x509 -req` makes it without more.
async fn encrypted_with_an_old_certificate(
    server: u16,
    folder: &std::path::Path,
    version: &'static rustls::SupportedProtocolVersion,
) -> u16 {
    use rustls::pki_types::pem::PemObject;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (certificate, key) = (folder.join("old.crt"), folder.join("old.key"));
    if !certificate.exists() {
        let script = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout old.key -out old.csr && \
                      openssl x509 -req -in old.csr -signkey old.key -days 30 -out old.crt && openssl x509 -in old.crt -noout -text | grep 'Version: 1'";
        let made = std::process::Command::new("sh").args(["-c", script]).current_dir(folder).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(key).unwrap();
    let key = provider.key_provider.load_private_key(key).unwrap();
    let certified =
        rustls::sign::CertifiedKey::new(vec![rustls::pki_types::CertificateDer::from_pem_file(certificate).unwrap()], key);
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut asked = [0; 8];
                client.read_exact(&mut asked).await.unwrap();
                client.write_all(b"S").await.unwrap();
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let mut server = tokio::net::TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await.is_ok();
            });
        }
    });
    port
}

#[tokio::test]
async fn certificates_of_old_versions_are_as_good_where_none_is_checked() {
    let store = store!();
    let folder = tempfile::tempdir().unwrap();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let port = encrypted_with_an_old_certificate(store.cluster.port, folder.path(), version).await;
        let at = |mode: &str| {
            let url = format!("postgres://postgres:{}@localhost:{port}/tests{mode}", server::PASSWORD);
            store.options().database_url(url)
        };
        for mode in ["", "?sslmode=require"] {
            let backend = create_state_backend("database", &at(mode)).unwrap();
            backend.initialize().await.unwrap_or_else(|error| panic!("{mode} {version:?}: {error}"));
            backend.close().await.unwrap();
        }
        let checked = at("?sslmode=verify-full").set("database_ca_file", store.cluster.ca_file().to_string_lossy());
        let error = super::doors::refusal_of(&checked).await;
        assert!(error.kind() == StoreErrorKind::Input && error.to_string().contains("X.509 version 3"), "{error}");
    }
}
