//! Other openings: who has it open, and what they commit.

use seeknal_state::store::{ForeignCommits, OpenProcess};
use seeknal_state::{Coordinator, NewRun};

use super::*;

async fn told(backend: &Backend) -> ForeignCommits {
    tokio::time::timeout(Duration::from_secs(10), backend.others_committed()).await.expect("nothing was told").unwrap()
}

#[tokio::test]
async fn commits_of_others_are_told_and_own_ones_are_not() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0)]).await;
    // By notification, with the run's name, well before the look at the sequence that names nothing.
    until("a commit is told with its run", async || {
        change(&two, "r", vec![set("n", NodeUpdate::running())]).await;
        let begun = std::time::Instant::now();
        let told = told(&one).await;
        told.runs.is_some_and(|runs| runs.contains(&run_id("r"))) && begun.elapsed() < Duration::from_millis(900)
    })
    .await;
    until("a lease is told", async || {
        let token = lock(&two, &LeaseKey::run(run_id("q")), "b", 60_000).await.unwrap();
        commit(&two, vec![Entry { leases: vec![LeaseMutation::Force { token }], ..Entry::default() }]).await;
        let told = told(&one).await;
        told.leases && told.runs.is_some_and(|runs| runs.is_empty())
    })
    .await;
    assert_eq!(one.run_versions(&[run_id("nobody"), run_id("r")]).await.unwrap()[1], Some(load(&two, "r").await.version()));

    // What somebody committed who tells nobody is found by looking.
    store.sql("SELECT nextval('commit_seq')");
    until("a silent commit is found", async || told(&one).await == ForeignCommits::all()).await;
}

#[tokio::test]
async fn who_waits_hears_of_the_end() {
    let store = store!();
    let backend = store.open().await;
    let waiting = {
        let backend = Arc::clone(&backend);
        tokio::spawn(async move {
            loop {
                if let Err(error) = backend.others_committed().await {
                    return error;
                }
            }
        })
    };
    tokio::task::yield_now().await;
    backend.close().await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    assert_eq!(error.kind(), StoreErrorKind::Closed);
    backend.close().await.unwrap();
}

#[tokio::test]
async fn openings_are_known_as_long_as_they_are_connected() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    let all = one.processes().await.unwrap();
    assert_eq!(all.len(), 2);
    assert!(all.iter().all(|opening| opening.alive == Some(true)), "{all:?}");
    assert!(all.iter().any(|opening| Some(&opening.process) == one.process().as_ref()), "{all:?}");
    two.close().await.unwrap();
    assert_eq!(one.processes().await.unwrap().len(), 1);

    // Gone without a word: its row stays, and whether it lives is not known.
    let three = store.open().await;
    let id = three.process().unwrap().id;
    drop(three);
    until("the connection of who is gone is gone", async || {
        let all = one.processes().await.unwrap();
        all.iter().any(|opening| opening.process.id == id && opening.alive.is_none())
    })
    .await;
    // Half a minute later it is gone, if the server answered all the time.
    let silent = format!("UPDATE openings SET seen_at = seen_at - interval '31 seconds' WHERE process = '{id}'");
    store.sql(&silent);
    let alive = |all: Vec<OpenProcess>| all.into_iter().find(|opening| opening.process.id == id).expect("it is listed").alive;
    let fresh = store.open().await;
    assert_eq!(alive(fresh.processes().await.unwrap()), None, "it asks since a moment ago, and who lives may connect again");
    assert_eq!(alive(fresh.watch_processes([id.to_string()].into()).await.unwrap()), Some(false));
    assert_eq!(alive(fresh.processes().await.unwrap()), Some(false));
}

/// All connections end that an opening has.
fn cut_off(store: &Store, role: &str) {
    store.sql(&format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = '{role}'"));
}

/// A network that is away, or a primary that another one takes the place of: nobody is heard, the server itself runs all the time, and all come back one by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_later_than_another_is_not_taken_for_gone() {
    let store = store!();
    let role = format!("late_{}", store.schema);
    store.cluster.sql(&format!("CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{}'", server::PASSWORD));
    let gate = Gate::before(store.cluster.port).await;
    let url = store.cluster.url_of(&role, server::PASSWORD, "127.0.0.1", "?sslmode=disable");
    let url = url.replace(&format!(":{}/", store.cluster.port), &format!(":{}/", gate.port));
    let open =
        async |options: &BackendOptions| Coordinator::open(create_state_backend("database", options).unwrap()).await.unwrap();
    let late = open(&store.options().database_url(url)).await;
    late.create_run("r", NewRun::running()).await.unwrap();
    gate.open.send_replace(false);
    cut_off(&store, &role);
    until("it is cut off", async || store.sql(&format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'")) == "0")
        .await;
    store.sql("UPDATE openings SET seen_at = seen_at - interval '40 seconds'");

    let early = open(&store.options()).await;
    let back = async { gate.open.send_replace(true) };
    let (abandoned, _) = tokio::join!(early.abandoned_runs(), back);
    assert!(abandoned.unwrap().is_empty(), "the run of a process that lives");
    assert!(early.resume_run("r").await.is_err(), "its run was taken from a process that lives");
    late.close().await.unwrap();
    early.close().await.unwrap();
}

/// Nobody can be heard of while the server is away, and no lock outlives it.
#[tokio::test]
async fn a_server_that_was_away_does_not_take_for_gone_whom_it_could_not_hear() {
    let Some(mut cluster) = server::Cluster::start() else { return };
    let options = BackendOptions::new().database_url(cluster.url("")).set("database_schema", "away");
    let make = || create_state_backend("database", &options).unwrap();
    let backend: Backend = make();
    backend.initialize().await.unwrap();
    cluster.sql_in(
        "away",
        "INSERT INTO openings (process, host, pid, started_at, lock_class, lock_id, seen_at) VALUES \
         ('other', 'h', 1, now() - interval '1 hour', 1, 1, now() - interval '40 seconds')",
    );
    let alive = async |backend: &Backend| {
        let all = backend.processes().await.unwrap();
        all.into_iter().find(|open| &*open.process.id == "other").expect("it is listed").alive
    };
    cluster.kill();
    cluster.start_again();
    let fresh: Backend = make();
    fresh.initialize().await.unwrap();
    assert_eq!(alive(&fresh).await, None, "the server is there again since a moment ago");
}

#[tokio::test]
async fn tables_of_the_first_version_are_brought_forward() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    store.sql("ALTER TABLE openings DROP COLUMN seen_at; UPDATE meta SET schema_version = 1");
    let reader = create_state_backend("database", &store.options().read_only(true)).unwrap();
    reader.initialize().await.unwrap();
    assert!(reader.processes().await.unwrap().is_empty());
    assert_eq!(load(&reader, "r").await.version(), Version(1));
    let backend = store.open().await;
    assert_eq!(store.sql("SELECT schema_version FROM meta"), "2");
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
    assert!(backend.processes().await.unwrap().iter().all(|opening| opening.alive == Some(true)));
}

#[tokio::test]
async fn a_reload_brings_what_is_newer() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0), set("a", NodeUpdate::running()), set("b", NodeUpdate::running())]).await;
    let mut have = load(&one, "r").await;
    for mutation in [
        set("a", NodeUpdate::success().row_count(7)),
        Mutation::AddInterval { node: node_id("b"), interval: hours(0, 3) },
        Mutation::AddPartition { node: node_id("c"), partition: PartitionKey::new("p").unwrap() },
        Mutation::Update { update: RunUpdate::success(), at: at(7) },
        Mutation::DeleteNode { node: node_id("a") },
    ] {
        change(&two, "r", vec![mutation]).await;
        have = one.reload_run(&have).await.unwrap().unwrap();
        assert_eq!(have, load(&one, "r").await);
    }
    change(&two, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
    assert_eq!(one.reload_run(&have).await.unwrap(), None);
    change(&two, "r", vec![create(1)]).await;
    assert_eq!(one.reload_run(&have).await.unwrap().unwrap(), load(&one, "r").await);
}

/// A network that lets nobody new in while it is shut; they wait.
pub(super) struct Gate {
    pub(super) port: u16,
    pub(super) open: tokio::sync::watch::Sender<bool>,
}

impl Gate {
    pub(super) async fn before(server: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let open = tokio::sync::watch::Sender::new(true);
        let mut opened = open.subscribe();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                if opened.wait_for(|open| *open).await.is_err() {
                    return;
                }
                tokio::spawn(async move {
                    let mut server = tokio::net::TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                    let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await.is_ok();
                });
            }
        });
        Self { port, open }
    }
}

/// Ends the connection with which an opening listens.
fn deafen(store: &Store, backend: &Backend) {
    let process = backend.process().unwrap().id;
    let ended = store.sql(&format!(
        "SELECT pg_terminate_backend(l.pid) FROM pg_locks AS l JOIN openings AS o ON l.locktype = 'advisory' AND l.objsubid = 2 \
         AND l.classid::bigint = (o.lock_class::bigint & 4294967295) AND l.objid::bigint = (o.lock_id::bigint & 4294967295) \
         WHERE o.process = '{process}'"
    ));
    assert_eq!(ended, "t");
}

#[tokio::test]
async fn what_others_commit_while_nobody_listens_is_told() {
    let store = store!();
    let gate = Gate::before(store.cluster.port).await;
    let url = store.cluster.url("?sslmode=disable").replace(&format!(":{}/", store.cluster.port), &format!(":{}/", gate.port));
    let one = store.open().await;
    let two = create_state_backend("database", &store.options().database_url(url)).unwrap();
    two.initialize().await.unwrap();
    change(&one, "r", vec![create(0)]).await;
    told(&two).await;
    gate.open.send_replace(false);
    deafen(&store, &two);
    until("the loss of the connection is told", async || two.others_committed().await.is_err()).await;
    assert_eq!(told(&two).await, ForeignCommits::all());
    change(&one, "q", vec![create(1)]).await;
    gate.open.send_replace(true);
    // Where making the connection took too long, that is told first.
    until("what was committed meanwhile is told", async || {
        let told = tokio::time::timeout(Duration::from_secs(10), two.others_committed()).await.expect("nothing was told");
        told.is_ok_and(|told| told == ForeignCommits::all())
    })
    .await;
}

#[tokio::test]
async fn who_cannot_listen_again_says_all_the_same_that_it_lives() {
    let store = store!();
    let role = format!("few_{}", store.schema);
    store.cluster.sql(&format!("CREATE ROLE {role} LOGIN PASSWORD '{}'", server::PASSWORD));
    store.cluster.sql(&format!("GRANT CREATE ON DATABASE tests TO {role}"));
    let url = store.cluster.url_of(&role, server::PASSWORD, "127.0.0.1", "?sslmode=disable");
    let backend = create_state_backend("database", &store.options().database_url(url)).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
    store.cluster.sql(&format!("ALTER ROLE {role} CONNECTION LIMIT 0"));
    deafen(&store, &backend);
    let ended = store.sql("SELECT clock_timestamp()");
    until("it says that it lives", async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        store.sql(&format!("SELECT bool_and(seen_at > '{ended}') FROM openings")) == "t"
    })
    .await;
    assert!(backend.processes().await.unwrap().iter().all(|opening| opening.alive != Some(false)));
    backend.close().await.unwrap();
}

/// Their names do not fit into one notification.
#[tokio::test]
async fn many_runs_of_one_commit_are_told_by_name() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    // Until each knows of the other.
    change(&two, "r", vec![create(0)]).await;
    until("a commit is told", async || {
        change(&two, "r", vec![set("n", NodeUpdate::running())]).await;
        told(&one).await.runs.is_some()
    })
    .await;
    let names: Vec<String> = (0..300).map(|number| format!("run-{number}-{}", "x".repeat(60))).collect();
    let create = |name: &String| entry(part_on(None, Version::NONE, name, Vec::new(), vec![create(0)]));
    commit(&two, names.iter().map(create).collect()).await;
    let mut missing: std::collections::BTreeSet<_> = names.iter().map(|name| run_id(name)).collect();
    until("all names are told", async || {
        missing = &missing - &told(&one).await.runs.unwrap_or_default();
        missing.is_empty()
    })
    .await;
}

/// A standby refuses `LISTEN`, and does not know every number of a sequence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_read_and_followed() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    let standby = tokio::task::spawn_blocking(|| store.cluster.standby()).await.unwrap();
    let options = store.options().database_url(standby.url("")).read_only(true);
    let reading = create_state_backend("database", &options).unwrap();
    reading.initialize().await.unwrap();
    assert!(reading.processes().await.unwrap().iter().all(|opening| opening.alive.is_none()));
    let state = seeknal_state::Coordinator::open(reading).await.unwrap();
    assert_eq!(state.get_run("r").await.unwrap().unwrap().version(), load(&backend, "r").await.version());
    for count in 1..=3 {
        change(&backend, "r", vec![set("n", NodeUpdate::running().row_count(count))]).await;
        until("a commit is seen at the standby", async || {
            state.snapshot("r").unwrap().node("n").and_then(|node| node.row_count) == Some(count)
        })
        .await;
    }
    state.close().await.unwrap();
    backend.close().await.unwrap();
}
