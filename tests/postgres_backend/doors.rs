//! Opening: URLs, passwords, certificates, rights, and schemas of others.

use super::*;

pub(super) async fn refusal_of(options: &BackendOptions) -> StoreError {
    let error = match create_state_backend("database", options) {
        Ok(backend) => backend.initialize().await.unwrap_err(),
        Err(error) => error,
    };
    let source = std::error::Error::source(&error).map(|source| format!("{source} {source:?}")).unwrap_or_default();
    let shown = format!("{error} {error:?} {source} {options:?}");
    assert!(!shown.contains(server::PASSWORD) && !shown.contains("wrong-pass"), "a password is shown: {shown}");
    assert!(!error.is_unknown_outcome());
    error
}

#[tokio::test]
async fn wrong_passwords_and_names_are_told_apart() {
    let store = store!();
    let at = |user: &str, password: &str| store.options().database_url(store.cluster.url_of(user, password, "127.0.0.1", ""));
    let error = refusal_of(&at("postgres", "wrong-pass")).await;
    assert_eq!(error.kind(), StoreErrorKind::Input, "{error}");
    assert!(error.to_string().contains("check the user and the password"), "{error}");
    let no_password = store.cluster.url("").replace(&format!(":{}", server::PASSWORD), "");
    let error = refusal_of(&store.options().database_url(no_password)).await;
    assert!(error.to_string().contains("password"), "{error}");
    let error = refusal_of(&store.options().database_url(store.cluster.url("").replace("/tests", "/nowhere"))).await;
    assert_eq!(error.kind(), StoreErrorKind::NotFound, "{error}");
    assert!(store.sql("SELECT nspname FROM pg_namespace WHERE nspname = current_schema()").is_empty(), "something was made");
    let open = store.open().await;
    assert!(!format!("{open:?} {}", open.location()).contains(server::PASSWORD));
    assert!(open.location().contains(&store.schema));
}

/// A port on which nobody listens, as long as the socket is kept: one that is given back may be the next one's.
fn nobody() -> (tokio::net::TcpSocket, u16) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

#[tokio::test]
async fn a_host_that_is_not_there_fails_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("127.0.0.1:{}", silent.local_addr().unwrap().port());
    let (_kept, nobody) = nobody();
    for host in [format!("127.0.0.1:{nobody}"), silent] {
        let begun = std::time::Instant::now();
        let url = format!("postgres://u:{}@{host}/db", server::PASSWORD);
        let error = refusal_of(&BackendOptions::new().database_url(url)).await;
        assert!(begun.elapsed() < Duration::from_secs(20), "{host} took {:?}", begun.elapsed());
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains(&host), "{error}");
    }
}

#[tokio::test]
async fn of_several_hosts_each_says_why_it_is_not_used() {
    let (_kept, nobody) = nobody();
    let url = format!("postgres://u:{}@nosuch.invalid,127.0.0.1:{nobody}/db", server::PASSWORD);
    let error = refusal_of(&BackendOptions::new().database_url(url)).await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    let error = error.to_string();
    let told = [
        "nosuch.invalid:5432: no address for the host's name".to_owned(),
        format!("; 127.0.0.1:{nobody}: error connecting to server: Connection refused"),
    ];
    assert!(told.iter().all(|told| error.contains(told)), "{error}");
}

/// A server that takes nobody in while it starts, as often as it is asked.
async fn starting(server: u16, times: usize) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        for time in 0.. {
            let (mut client, _) = listener.accept().await.unwrap();
            if time < times {
                refuse_as_starting(&mut client).await;
                continue;
            }
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await.is_err();
            });
        }
    });
    port
}

async fn refuse_as_starting(client: &mut tokio::net::TcpStream) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let said = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";
    let mut word = b"E".to_vec();
    word.extend(u32::try_from(said.len() + 4).unwrap().to_be_bytes());
    word.extend(said);
    let _asked = client.read(&mut [0; 4096]).await.unwrap();
    client.write_all(&word).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_waits_for_a_server_that_is_starting() {
    let store = store!();
    let (_kept, nobody) = nobody();
    for beside in [None, Some(nobody)] {
        let port = starting(store.cluster.port, 3).await;
        let hosts: Vec<u16> = [port].into_iter().chain(beside).collect();
        let backend = opened(&store.options().database_url(server::url_of_hosts("postgres", &hosts))).await;
        change(&backend, &format!("of {} hosts", hosts.len()), vec![create(0)]).await;
        backend.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_on_starting_is_not_waited_for_for_ever() {
    let port = starting(0, usize::MAX).await;
    let url = format!("postgres://u:{}@127.0.0.1:{port}/db?sslmode=disable", server::PASSWORD);
    let error = refusal_of(&BackendOptions::new().database_url(url)).await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("is starting up (SQLSTATE 57P03)"), "{error}");
}

#[tokio::test]
async fn certificates_are_checked_where_it_is_asked_for() {
    let store = store!();
    let open = async |host: &str, query: &str, ca: Option<std::path::PathBuf>| {
        let url = store.cluster.url_of("postgres", server::PASSWORD, host, query);
        let mut options = store.options().database_url(url);
        if let Some(ca) = ca {
            options = options.set("database_ca_file", ca.to_string_lossy());
        }
        let backend = create_state_backend("database", &options)?;
        backend.initialize().await?;
        Ok::<_, StoreError>(backend)
    };
    let (ours, other) = (|| Some(store.cluster.ca_file()), || Some(store.cluster.other_ca_file()));
    for (query, ca) in [
        ("?sslmode=disable", None),
        ("?sslmode=prefer", None),
        ("?sslmode=require", None),
        ("?sslmode=require", ours()),
        ("?sslmode=verify-ca", ours()),
        ("?sslmode=verify-full", ours()),
    ] {
        let backend = open("localhost", query, ca).await.unwrap_or_else(|error| panic!("{query}: {error}"));
        let encrypted = store.cluster.sql("SELECT count(*) > 0 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'seeknal-state' AND ssl");
        assert!(query.contains("disable") || encrypted == "t", "{query}");
        backend.close().await.unwrap();
    }
    for (host, query, ca) in [
        ("localhost", "?sslmode=verify-full", other()),
        ("localhost", "?sslmode=verify-ca", other()),
        ("localhost", "?sslmode=require", other()),
        // Nobody public signed it.
        ("localhost", "?sslmode=verify-full", None),
        // It names localhost only.
        ("127.0.0.1", "?sslmode=verify-full", ours()),
        ("127.0.0.1", "?sslmode=verify-ca", ours()),
    ] {
        let error = open(host, query, ca).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{host}{query}: {error}");
        assert!(error.kind() == StoreErrorKind::Input && !error.is_retryable(), "{host}{query}: {error:?}");
    }
    let error = open("localhost", "?sslmode=verify-full", Some("/nowhere/ca.pem".into())).await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Input && error.to_string().contains("/nowhere/ca.pem"), "{error}");
}

#[tokio::test]
async fn who_may_only_read_reads_and_writes_nothing() {
    let store = store!();
    let reader = store.options().database_url(store.cluster.url_of("reader", server::PASSWORD, "127.0.0.1", ""));
    let error = refusal_of(&reader.clone().read_only(true)).await;
    assert_eq!(error.kind(), StoreErrorKind::NotFound, "{error}");
    let error = refusal_of(&reader).await;
    assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");

    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    store.sql(&format!("GRANT USAGE ON SCHEMA {s} TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA {s} TO reader; GRANT SELECT ON ALL SEQUENCES IN SCHEMA {s} TO reader", s = store.schema));
    let error = refusal_of(&reader).await;
    assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");

    let reading = create_state_backend("database", &reader.read_only(true)).unwrap();
    reading.initialize().await.unwrap();
    assert!(reading.is_read_only());
    assert_eq!(reading.load_run(&run_id("r")).await.unwrap(), backend.load_run(&run_id("r")).await.unwrap());
    let error = reading.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");
    reading.close().await.unwrap();
    assert_eq!(reading.list_leases().await.unwrap_err().kind(), StoreErrorKind::Closed);

    // A role that may write, opened for reading: the server itself refuses to write.
    let reading = create_state_backend("database", &store.options().read_only(true)).unwrap();
    reading.initialize().await.unwrap();
    assert_eq!(store.sql("SELECT count(*) FROM openings"), "1");
}

#[tokio::test]
async fn schemas_of_others_and_of_newer_versions_are_left_alone() {
    let store = store!();
    store.cluster.sql_in(
        "public",
        &format!("CREATE SCHEMA {s}; CREATE TABLE {s}.meta (key text); CREATE TABLE {s}.customers (id int)", s = store.schema),
    );
    let error = refusal_of(&store.options()).await;
    assert_eq!(error.kind(), StoreErrorKind::Foreign, "{error}");
    assert_eq!(store.sql("SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()"), "2");

    let store = store!();
    store.open().await.close().await.unwrap();
    store.sql("UPDATE meta SET schema_version = 99");
    let error = refusal_of(&store.options()).await;
    assert_eq!(error.kind(), StoreErrorKind::NewerFormat, "{error}");
    assert!(error.to_string().contains("99"), "{error}");
    assert_eq!(store.sql("SELECT schema_version FROM meta"), "99");
}

#[tokio::test]
async fn who_has_it_open_writes_nothing_under_a_newer_schema() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    store.sql("UPDATE meta SET schema_version = 99");
    let tip = load(&backend, "r").await;
    let write = entry(part_on(Some(&tip), tip.version(), "r", Vec::new(), vec![set("n", NodeUpdate::success())]));
    let error = backend.commit(Arc::new(Batch::new(vec![write]))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::NewerFormat, false), "{error}");
    assert_eq!(store.sql("SELECT count(*) FROM node_states"), "0");
    store.sql("UPDATE meta SET schema_version = 2");
    change(&backend, "r", vec![set("n", NodeUpdate::success())]).await;
}

#[tokio::test]
async fn many_may_make_the_tables_at_once() {
    let store = Arc::new(store!());
    let opening: Vec<_> = (0..6)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.open().await })
        })
        .collect();
    for backend in opening {
        assert!(backend.await.unwrap().list_runs(&RunQuery::default()).await.unwrap().runs.is_empty());
    }
}

#[tokio::test]
async fn a_role_without_the_right_to_make_schemas_uses_one_that_was_made_for_it() {
    let store = store!();
    store.cluster.sql_in("public", &format!("CREATE SCHEMA {} AUTHORIZATION reader", store.schema));
    let options = store.options().database_url(store.cluster.url_of("reader", server::PASSWORD, "127.0.0.1", ""));
    let backend = create_state_backend("database", &options).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
}

/// Of several hosts the one is written to that can be written to, also after it was another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_servers_the_one_that_writes_is_used() {
    let store = store!();
    let Some(standby) = server::Cluster::start() else { return };
    let open = async |hosts: &[u16]| {
        let backend = create_state_backend("database", &at_hosts(&store, "postgres", hosts)).unwrap();
        backend.initialize().await.map(|_| backend)
    };
    let direct = store.open().await;
    let moved = open(&[standby.port, store.cluster.port]).await.unwrap();
    standby.sql("ALTER SYSTEM SET default_transaction_read_only = on");
    standby.sql("SELECT pg_reload_conf()");
    // Sessions that are there hear of it a little later.
    let mut round = 0;
    until("what was the primary is written to no more", async || {
        round += 1;
        change(&moved, &format!("moved{round}"), vec![create(0)]).await;
        store.sql("SELECT count(*) FROM runs") != "0"
    })
    .await;
    let opened = open(&[standby.port, store.cluster.port]).await.unwrap();
    change(&opened, "r", vec![create(0)]).await;
    assert!(direct.load_run(&run_id("r")).await.unwrap().is_some());
    for backend in [direct, moved, opened] {
        backend.close().await.unwrap();
    }
    let error = open(&[standby.port, standby.port]).await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::ReadOnly && error.to_string().contains("primary"), "{error}");
}

/// Options for a state on one of several servers of this machine.
fn at_hosts(store: &Store, user: &str, hosts: &[u16]) -> BackendOptions {
    store.options().database_url(server::url_of_hosts(user, hosts))
}

pub(super) async fn opened(options: &BackendOptions) -> Backend {
    let backend = create_state_backend("database", options).unwrap();
    backend.initialize().await.unwrap();
    backend
}

/// Whether sessions of a server may write unless they ask for it; those that are there hear of it a little later.
async fn writable(cluster: &server::Cluster, may: bool) {
    cluster.sql(&format!("ALTER SYSTEM SET default_transaction_read_only = {}", if may { "off" } else { "on" }));
    cluster.sql("SELECT pg_reload_conf()");
    let wanted = if may { "off" } else { "on" };
    until("the server takes the setting", async || cluster.sql("SHOW default_transaction_read_only") == wanted).await;
}

/// A copy does not know every number that was given out before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_that_goes_on_at_a_copy_gives_out_higher_numbers() {
    let store = store!();
    let Some(before) = server::Cluster::start() else { return };
    // Made one after the other in the same way, two databases could have the same ids.
    store.sql(&format!("CREATE SCHEMA {s}; CREATE TABLE {s}_other (id int PRIMARY KEY); DROP TABLE {s}_other", s = store.schema));
    store.open().await.close().await.unwrap();
    store.sql("UPDATE meta SET origin = '1/1; timeline 1'");
    let moved = opened(&at_hosts(&store, "postgres", &[before.port, store.cluster.port])).await;
    let first = lock(&moved, &LeaseKey::run(run_id("a")), "w", 60_000).await.unwrap();
    writable(&before, false).await;
    let mut rounds = 0;
    let mut last = first;
    until("the copy is written to", async || {
        rounds += 1;
        last = lock(&moved, &LeaseKey::run(run_id(&format!("b{rounds}"))), "w", 60_000).await.unwrap();
        store.sql("SELECT count(*) FROM locks") != "0"
    })
    .await;
    assert!(last.0 > 1_000_000_000 && first.0 < 1_000, "{first:?}, {last:?}");
    assert!(store.sql("SELECT last_value > 1000000000 FROM commit_seq") == "t");
    // Once is enough, whoever connects next.
    let raised = store.sql("SELECT last_value FROM fencing_token");
    store.open().await.close().await.unwrap();
    assert_eq!(store.sql("SELECT last_value FROM fencing_token"), raised);
    moved.close().await.unwrap();
}

/// A standby refuses to tell of commits, and may be behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_reads_goes_where_is_written_too() {
    let store = store!();
    let Some(standby) = server::Cluster::start() else { return };
    writable(&standby, false).await;
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    let reading = opened(&at_hosts(&store, "postgres", &[standby.port, store.cluster.port]).read_only(true)).await;
    assert_eq!(load(&reading, "r").await, load(&backend, "r").await);
    reading.close().await.unwrap();

    // A role that writes nowhere takes what there is.
    let role = format!("still_{}", store.schema);
    store.cluster.sql(&format!("CREATE ROLE {role} LOGIN PASSWORD '{}'", server::PASSWORD));
    store.cluster.sql(&format!("ALTER ROLE {role} SET default_transaction_read_only = on"));
    store.sql(&format!("GRANT USAGE ON SCHEMA {s} TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA {s} TO {role}; GRANT SELECT ON ALL SEQUENCES IN SCHEMA {s} TO {role}", s = store.schema));
    let port = store.cluster.port;
    let reading = opened(&at_hosts(&store, &role, &[port, port]).read_only(true)).await;
    assert_eq!(load(&reading, "r").await, load(&backend, "r").await);
    reading.close().await.unwrap();
    backend.close().await.unwrap();
}

/// In whatever order the hosts are named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_no_host_is_the_primary_a_commit_waits_for_one() {
    let store = store!();
    let Some(primary) = server::Cluster::start() else { return };
    let (_kept, nobody) = nobody();
    for (run, hosts) in [("a", [nobody, primary.port]), ("b", [primary.port, nobody])] {
        let backend = opened(&at_hosts(&store, "postgres", &hosts)).await;
        writable(&primary, false).await;
        // Sessions that are there are ended: the next one is a new one.
        primary.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'seeknal-state'");
        let change = async || change(&backend, run, vec![create(0)]).await;
        let mut waiting = std::pin::pin!(change());
        let early = tokio::time::timeout(Duration::from_millis(700), &mut waiting).await;
        assert!(early.is_err(), "{run}: nobody could be written to");
        writable(&primary, true).await;
        waiting.await;
        assert!(backend.load_run(&run_id(run)).await.unwrap().is_some());
        backend.close().await.unwrap();
    }
}
