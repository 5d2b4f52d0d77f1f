//! Copies of the database that lack commits: standbys that were promoted, dumps that were brought back.

use std::sync::atomic::{AtomicU16, Ordering};

use seeknal_state::Coordinator;

use super::doors::opened;
use super::*;

/// One address that leads to one server first, and to another one later.
struct Address {
    port: u16,
    leads_to: Arc<AtomicU16>,
}

impl Address {
    async fn of(server: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let leads_to = Arc::new(AtomicU16::new(server));
        let target = Arc::clone(&leads_to);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let port = target.load(Ordering::SeqCst);
                tokio::spawn(async move {
                    let Ok(mut server) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await.is_ok();
                });
            }
        });
        Self { port, leads_to }
    }
}

/// What an actor sends that still has the state of before: it must not pass for one that knows what is there.
async fn try_over(backend: &Backend, lost: &RunState) -> Outcome {
    let write = vec![set("n", NodeUpdate::new().metadata("k", 1))];
    let part = part_on(Some(lost), lost.version(), "r", vec![Guard::RunVersion(lost.version())], write);
    commit(backend, vec![entry(part)]).await.outcomes.remove(0)
}

/// The version of the lost commit is given to no other content, and nobody goes on with what he knew of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_that_lacks_a_commit_gives_no_version_out_twice() {
    let Some(mut primary) = server::Cluster::start() else { return };
    let standby = primary.standby();
    let address = Address::of(primary.port).await;
    let options = |ports: &[u16]| {
        BackendOptions::new().database_url(server::url_of_hosts("postgres", ports)).set("database_schema", "failover")
    };
    let of_several = opened(&options(&[primary.port, standby.port])).await;
    let of_one = opened(&options(&[address.port])).await;
    change(&of_several, "r", vec![create(0), set("n", NodeUpdate::running()), set("m", NodeUpdate::running())]).await;
    let there = "SELECT count(*) FROM pg_class WHERE relname = 'node_states' AND relnamespace = 'failover'::regnamespace";
    until("the standby has the tables", async || standby.sql_in("public", there) == "1").await;
    until("the standby has the run", async || standby.sql_in("failover", "SELECT count(*) FROM node_states") == "2").await;
    standby.cut_off();
    change(&of_several, "r", vec![set("n", NodeUpdate::success().row_count(1))]).await;
    let lost = load(&of_one, "r").await;
    let watching = Coordinator::open(opened(&options(&[primary.port, standby.port])).await).await.unwrap();
    assert_eq!(watching.get_run("r").await.unwrap().unwrap().version(), lost.version());

    primary.kill();
    assert_eq!(standby.sql("SELECT pg_promote()"), "t");
    address.leads_to.store(standby.port, Ordering::SeqCst);
    for backend in [&of_one, &of_several] {
        let refusal = refused(try_over(backend, &lost).await);
        assert!(matches!(refusal, Refusal::Guard { .. }), "{refusal}");
        let now = load(backend, "r").await;
        assert!(now.version() > lost.version() && now.node("n").unwrap().row_count.is_none(), "{now:?}");
        assert_eq!(backend.reload_run(&lost).await.unwrap().unwrap(), now, "nothing of what is lost stays");
    }
    // Somebody else who never saw the other server.
    let new = opened(&options(&[standby.port])).await;
    change(&new, "r", vec![set("n", NodeUpdate::failed("theirs").row_count(2))]).await;
    refused(try_over(&of_one, &lost).await);
    assert_eq!(load(&of_several, "r").await.node("n").unwrap().row_count, Some(2));
    until("what is lost is in no snapshot any more", async || {
        watching.snapshot("r").unwrap().node("n").unwrap().row_count == Some(2)
    })
    .await;
    watching.close().await.unwrap();
}

#[tokio::test]
async fn runs_of_a_dump_that_is_brought_back_go_on_behind_every_version() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0), set("n", NodeUpdate::running()), set("m", NodeUpdate::running())]).await;
    let copy = format!("copy_{}", store.schema);
    store.cluster.copy("tests", &store.schema, &copy);
    change(&backend, "r", vec![set("n", NodeUpdate::success().row_count(1))]).await;
    let lost = load(&backend, "r").await;
    backend.close().await.unwrap();
    let url = store.cluster.url("").replace("/tests", &format!("/{copy}"));
    let restored = opened(&store.options().database_url(url)).await;
    let now = load(&restored, "r").await;
    assert!(now.version() > lost.version(), "{now:?}");
    assert_eq!(restored.reload_run(&lost).await.unwrap().unwrap(), now);
    refused(try_over(&restored, &lost).await);
    // What it goes on with is a state like any other.
    let deleted = Mutation::DeleteNode { node: node_id("m") };
    for mutation in [set("n", NodeUpdate::success()), Mutation::Update { update: RunUpdate::success(), at: at(9) }, deleted] {
        let have = load(&restored, "r").await;
        change(&restored, "r", vec![mutation]).await;
        assert_eq!(restored.reload_run(&have).await.unwrap().unwrap(), load(&restored, "r").await);
    }
    assert!(restored.verify().await.unwrap().is_sound());
}

/// What is given out in a database that a dump was brought back into: a token, and the version of a new run, which is its commit sequence.
async fn first_numbers(options: &BackendOptions) -> (FencingToken, Version) {
    let backend = opened(options).await;
    let token = lock(&backend, &LeaseKey::run(run_id("locked")), "w", 60_000).await.unwrap();
    let created = change(&backend, "new", vec![create(0)]).await;
    backend.close().await.unwrap();
    (token, created.runs[0].after)
}

#[tokio::test]
async fn a_dump_that_is_brought_back_twice_gives_no_number_out_twice() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    let dump = store.cluster.dump("tests", &store.schema);
    let mut last = (FencingToken(1_000_000_000), Version(1_000_000_000));
    for attempt in ["first", "second"] {
        let copy = format!("{attempt}_{}", store.schema);
        store.cluster.restore(&dump, &copy);
        let url = store.cluster.url("").replace("/tests", &format!("/{copy}"));
        let numbers = first_numbers(&store.options().database_url(url)).await;
        assert!(numbers.0 > last.0 && numbers.1 > last.1, "{attempt}: {numbers:?} after {last:?}");
        last = numbers;
    }
    // Far from where numbers end, for those who keep them in floating point too.
    assert!(last.0.0 < 1 << 53 && last.1.0 < 1 << 53, "{last:?}");
}

/// Servers that were just made give out the same object ids, one like the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_of_a_new_server_that_is_brought_back_into_another_new_one_is_known_for_a_copy() {
    let store = store!();
    let (Some(second), Some(third)) = (server::Cluster::start(), server::Cluster::start()) else { return };
    let backend = store.open().await;
    change(&backend, "r", vec![create(0)]).await;
    backend.close().await.unwrap();
    // What a server gets that comes from a dump has the same ids on each of them.
    let url = |server: &server::Cluster| server.url("").replace("/tests", "/brought_back");
    second.restore(&store.cluster.dump("tests", &store.schema), "brought_back");
    let address = Address::of(second.port).await;
    let at_one_address = url(&second).replace(&second.port.to_string(), &address.port.to_string());
    let stays = opened(&store.options().database_url(at_one_address)).await;
    let dump = second.dump("brought_back", &store.schema);
    let lost = first_numbers(&store.options().database_url(url(&second))).await;

    third.restore(&dump, "brought_back");
    let ids = "SELECT (SELECT oid FROM pg_database WHERE datname = 'brought_back') || '/' || c.oid FROM pg_class AS c WHERE relname = 'runs'";
    let ids_of = |server: &server::Cluster| server.sql_of("brought_back", ids);
    assert_eq!(ids_of(&second), ids_of(&third), "else this shows nothing");
    // Who has it open goes on over new connections to the same address.
    address.leads_to.store(third.port, Ordering::SeqCst);
    second.sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'brought_back' AND pid <> pg_backend_pid()");
    let mut token = None;
    until("the other server is written to", async || {
        let answer = stays.commit(Arc::new(Batch::new(vec![grant(LeaseKey::run(run_id("held")), "w", 60_000)]))).await;
        token = answer.ok().and_then(|answer| Some(applied(answer.outcomes.into_iter().next()?).grants[0].token));
        token.is_some()
    })
    .await;
    assert!(token.unwrap() > lost.0, "{token:?} after {lost:?}");
    stays.close().await.unwrap();
    let numbers = first_numbers(&store.options().database_url(url(&third))).await;
    assert!(numbers.0 > token.unwrap() && numbers.1 > lost.1, "{numbers:?} after {lost:?}");
}

/// Builds of before did not ask for the server's identifier: nobody has to look for a copy that he made.
#[tokio::test]
async fn an_origin_without_its_server_is_told_as_that() {
    let store = store!();
    store.open().await.close().await.unwrap();
    for (origin, why) in
        [("regexp_replace(origin, ' system [0-9]+', '')", "did not note the server"), ("'1/1;'", ": this is a copy of")]
    {
        store.sql(&format!("UPDATE meta SET origin = {origin}"));
        for is_told in [true, false] {
            let backend = store.make();
            let notices = backend.initialize().await.unwrap().notices;
            let raised: Vec<&String> = notices.iter().filter(|notice| notice.contains("were raised")).collect();
            assert_eq!(raised.len(), usize::from(is_told), "{origin}: {notices:?}");
            assert!(raised.iter().all(|notice| notice.contains(why)), "{origin}: {raised:?}");
            backend.close().await.unwrap();
        }
    }
}
