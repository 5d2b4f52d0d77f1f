//! A server whose connections are cut, or held up by others. What networks do to them is in [`networks`](super::networks).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use seeknal_state::{Coordinator, NodeUpdate};

use super::*;

const NODES: usize = 24;

/// What the writers were told.
#[derive(Default)]
struct Told {
    acknowledged: AtomicU64,
    unknown: AtomicU64,
    stop: AtomicBool,
}

/// Writes one number after the other to a node; answers with the last one that was acknowledged and, if its outcome is not known, the one after it.
async fn count(state: Coordinator, node: String, told: Arc<Told>) -> (u64, bool) {
    let mut last = 0;
    let mut unsure = false;
    while !told.stop.load(Ordering::Acquire) {
        match state.set_node_state("r", &node, NodeUpdate::running().row_count(last + 1)).await {
            Ok(_) => {
                last += 1;
                unsure = false;
                told.acknowledged.fetch_add(1, Ordering::AcqRel);
            }
            Err(error) => {
                if error.is_unknown_outcome() {
                    unsure = true;
                    told.unknown.fetch_add(1, Ordering::AcqRel);
                }
                // The server is gone for a while.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    (last, unsure)
}

/// Runs writers on two coordinators while `harm` is done, and checks that every acknowledged write is there, and none was applied twice.
async fn nothing_is_lost(options: BackendOptions, harm: impl AsyncFnOnce(&Told)) {
    let make = || create_state_backend("database", &options).unwrap();
    let states = [Coordinator::open(make()).await.unwrap(), Coordinator::open(make()).await.unwrap()];
    states[0].create_run("r", NewRun::running()).await.unwrap();
    let begun = states[0].snapshot("r").unwrap().version();
    let told = Arc::new(Told::default());
    let writers: Vec<_> =
        (0..NODES).map(|index| tokio::spawn(count(states[index % 2].clone(), format!("n{index}"), Arc::clone(&told)))).collect();
    harm(&told).await;
    told.stop.store(true, Ordering::Release);
    let mut ends = Vec::new();
    for writer in writers {
        ends.push(writer.await.unwrap());
    }
    for state in states {
        state.close().await.unwrap();
    }
    let backend = make();
    backend.initialize().await.unwrap();
    let run = load(&backend, "r").await;
    for (index, (last, unsure)) in ends.into_iter().enumerate() {
        let stored = run.node(&format!("n{index}")).map_or(0, |node| node.row_count.unwrap());
        assert!(stored == last || (unsure && stored == last + 1), "n{index}: acknowledged {last}, stored {stored}");
    }
    let commits = run.version().0 - begun.0;
    let (acknowledged, unknown) = (told.acknowledged.load(Ordering::Acquire), told.unknown.load(Ordering::Acquire));
    assert!(
        (acknowledged..=acknowledged + unknown).contains(&commits),
        "{commits} commits, {acknowledged} acknowledged, {unknown} unknown"
    );
    assert!(backend.verify().await.unwrap().is_sound());
    backend.close().await.unwrap();
}

async fn more(told: &Told, count: u64) {
    let goal = told.acknowledged.load(Ordering::Acquire) + count;
    until("writes are acknowledged", async || told.acknowledged.load(Ordering::Acquire) >= goal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_in_mid_batch_lose_nothing() {
    let store = store!();
    nothing_is_lost(store.options(), async |told| {
        for _ in 0..15 {
            more(told, 50).await;
            // Those of this schema only: other tests use the same server.
            store.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE '%' AND pid IN (SELECT pid FROM pg_locks WHERE relation = 'runs'::regclass)");
        }
        more(told, 50).await;
    })
    .await;
}

#[tokio::test]
async fn who_stops_inside_a_transaction_holds_others_up_for_seconds_only() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    // As a process that is stopped between its lock and its write: the server ends its transaction, and the next one goes on.
    let mut stopped = store
        .cluster
        .session(&store.schema, "SET idle_in_transaction_session_timeout = 3000; BEGIN; SELECT 1 FROM runs FOR UPDATE;");
    until("the row is locked", async || {
        store.sql("SELECT count(*) FROM runs") == "1"
            && store.sql("SELECT count(*) FROM pg_locks WHERE relation = 'runs'::regclass AND mode = 'RowShareLock'") != "0"
    })
    .await;
    let begun = std::time::Instant::now();
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    stopped.kill().unwrap();
    stopped.wait().unwrap();
}

#[tokio::test]
async fn a_full_disk_is_told_and_the_service_goes_on_when_there_is_space() {
    let store = store!();
    let backend = store.open().await;
    store.sql("CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = TG_ARGV[0]; END $$");
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running())]).await;
    let faults = [("53100", StoreErrorKind::Full), ("58030", StoreErrorKind::Io), ("53200", StoreErrorKind::Busy)];
    // First as any batch, then as one on a run that this opening alone writes to.
    for round in 0..2_u64 {
        for (row, (state, kind)) in (round * 100 + 1..).zip(faults) {
            let before = load(&backend, "r").await;
            store.sql(&format!("CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON node_states EXECUTE FUNCTION fail('{state}')"));
            let mutations = vec![set("n", NodeUpdate::running().row_count(row))];
            let batch = Arc::new(Batch::new(vec![entry(part_on(Some(&before), before.version(), "r", vec![], mutations))]));
            let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
            assert_eq!((error.kind(), error.is_unknown_outcome()), (kind, false), "{error}");
            assert_eq!(load(&backend, "r").await, before, "{error}: something was written");
            store.sql("DROP TRIGGER fail ON node_states");
            applied(backend.commit(batch).await.unwrap().outcomes.into_iter().next().unwrap());
            assert_eq!(load(&backend, "r").await.node("n").unwrap().row_count, Some(row));
        }
        for row in 0..10 {
            change(&backend, "r", vec![set("n", NodeUpdate::running().row_count(row))]).await;
        }
    }
    backend.close().await.unwrap();
}

/// A network that forwards what it is given, until it goes silent: then it takes everything and passes nothing on.
struct Silent {
    port: u16,
    silent: Arc<AtomicBool>,
}

impl Silent {
    async fn before(server: u16) -> Self {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let silent = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&silent);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = tokio::net::TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                for (mut from, mut to) in [(from_client, to_server), (from_server, to_client)] {
                    let flag = Arc::clone(&flag);
                    tokio::spawn(async move {
                        let mut bytes = vec![0; 64 * 1024];
                        let mut was_silent = false;
                        while let Ok(read @ 1..) = from.read(&mut bytes).await {
                            was_silent |= flag.load(Ordering::Acquire);
                            // What was lost once is not made whole again.
                            if !was_silent && to.write_all(&bytes[..read]).await.is_err() {
                                return;
                            }
                        }
                    });
                }
            }
        });
        Self { port, silent }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_goes_silent_is_given_up_in_time_and_used_again() {
    let store = store!();
    let network = Silent::before(store.cluster.port).await;
    let url = store.cluster.url("?sslmode=disable").replace(&format!(":{}/", store.cluster.port), &format!(":{}/", network.port));
    assert!(url.contains(&network.port.to_string()));
    let backend = create_state_backend("database", &store.options().database_url(url)).unwrap();
    backend.initialize().await.unwrap();
    change(&backend, "r", vec![create(0)]).await;
    network.silent.store(true, Ordering::Release);
    let began = std::time::Instant::now();
    let mut asked = tokio::task::JoinSet::new();
    // More than may ask at once.
    for _ in 0..12 {
        let backend = Arc::clone(&backend);
        asked.spawn(async move { backend.load_run(&run_id("r")).await.map(|_| ()) });
    }
    let writer = Arc::clone(&backend);
    asked.spawn(async move {
        let batch = Batch::new(vec![entry(part_on(None, Version::NONE, "q", vec![], vec![create(1)]))]);
        writer.commit(Arc::new(batch)).await.map(|_| ())
    });
    let follower = Arc::clone(&backend);
    asked.spawn(async move {
        loop {
            // What was committed before is told first.
            follower.others_committed().await?;
        }
    });
    while let Some(answer) = asked.join_next().await {
        let error = answer.unwrap().unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(began.elapsed() < Duration::from_secs(28), "{:?}: {error}", began.elapsed());
    }
    network.silent.store(false, Ordering::Release);
    // Nothing that was silent is used again, and nobody holds a place that another one needs.
    let began = std::time::Instant::now();
    for _ in 0..12 {
        backend.load_run(&run_id("r")).await.unwrap();
    }
    change(&backend, "q", vec![create(1)]).await;
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}
