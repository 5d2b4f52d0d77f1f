//! What the server's clock says of who has the state open, and of locks, where it goes on by days or goes back.

use seeknal_state::{Coordinator, NewRun};

use super::others::Gate;
use super::*;

/// A server that was away for days heard of nobody for as long: that is no sign that they are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lives_is_not_forgotten_because_the_server_was_away_for_days() {
    let Some(mut cluster) = server::Cluster::start() else { return };
    let gate = Gate::before(cluster.port).await;
    let options = BackendOptions::new().database_url(cluster.url("?sslmode=disable")).set("database_schema", "days");
    let through = cluster.url("?sslmode=disable").replace(&format!(":{}/", cluster.port), &format!(":{}/", gate.port));
    let open =
        async |options: &BackendOptions| Coordinator::open(create_state_backend("database", options).unwrap()).await.unwrap();
    let two = open(&options.clone().database_url(through)).await;
    two.create_run("r", NewRun::running()).await.unwrap();
    let id = two.backend().process().unwrap().id;
    gate.open.send_replace(false);
    cluster.kill();
    cluster.start_again();
    cluster
        .sql_in("days", "UPDATE openings SET seen_at = seen_at - interval '2 days', started_at = started_at - interval '2 days'");

    let one = open(&options).await;
    let alive = async || {
        let all = one.backend().processes().await.unwrap();
        all.into_iter().find(|open| open.process.id == id).expect("it was forgotten").alive
    };
    assert_eq!(alive().await, None);
    let (abandoned, _) = tokio::join!(one.abandoned_runs(), async { gate.open.send_replace(true) });
    assert!(abandoned.unwrap().is_empty(), "the run of a process that lives");
    assert!(one.resume_run("r").await.is_err(), "its run was taken from a process that lives");
    until("it is heard of again", async || alive().await == Some(true)).await;
    two.close().await.unwrap();
    one.close().await.unwrap();
}

/// An old opening whose connections broke a moment ago may come back; one that was not heard of for a day will not. An opening that has heard of nobody yet removes those
/// after whose last word others were heard of for a day; the rest goes once it knows the server for a while.
#[tokio::test]
async fn who_is_gone_for_a_day_is_forgotten() {
    let store = store!();
    let one = store.open().await;
    store.sql(
        "INSERT INTO openings (process, host, pid, started_at, lock_class, lock_id, seen_at) VALUES \
         ('lately', 'h', 1, now() - interval '2 days', 1, 1, now()), ('yesterday', 'h', 2, now() - interval '3 days', 1, 2, now() - interval '25 hours'), \
         ('long ago', 'h', 3, now() - interval '5 days', 1, 3, now() - interval '3 days')",
    );
    let known = || store.sql("SELECT string_agg(process, ', ' ORDER BY process) FROM openings WHERE host = 'h'");
    assert_eq!(known(), "lately, long ago, yesterday");
    let two = store.open().await;
    assert_eq!(known(), "lately, yesterday");
    let mut number = 0;
    change(&one, "r", vec![create(0)]).await;
    until("it is forgotten", async || {
        number += 1;
        change(&one, "r", vec![set("n", NodeUpdate::success().row_count(number))]).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        known() == "lately"
    })
    .await;
    drop((one, two));
}

/// A clock that was ahead when a process was heard of last does not make it live until then.
#[tokio::test]
async fn who_was_heard_of_in_the_future_was_heard_of_now() {
    let store = store!();
    let one = store.open().await;
    let dead = || {
        store.sql(
            "INSERT INTO openings (process, host, pid, started_at, lock_class, lock_id, seen_at) \
             VALUES (gen_random_uuid(), 'h', 1, now(), 1, 1, clock_timestamp() + interval '1 hour')",
        );
    };
    let ahead = || store.sql("SELECT count(*) FROM openings WHERE seen_at > clock_timestamp()");
    dead();
    // As if the clock had gone back under who has it open.
    store.sql("UPDATE openings SET seen_at = seen_at + interval '1 hour'");
    until("its words are brought back", async || ahead() == "0").await;
    dead();
    let two = store.open().await;
    assert_eq!(ahead(), "0", "an opening looks too");
    assert!(two.processes().await.unwrap().iter().any(|open| open.alive.is_none()));
    drop((one, two));
}

/// A clock that goes back prolongs no lock of who is dead by more than its own time to live, and takes none from who lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_goes_back_prolongs_a_lock_by_its_own_life_at_most() {
    let store = store!();
    let open = async || Coordinator::open(store.make()).await.unwrap();
    let one = open().await;
    let lives = one.acquire_lock("lives", Duration::from_secs(5)).await.unwrap().unwrap();
    let key = |name: &str| LeaseKey::run(run_id(name));
    let dead = store.open().await;
    for (name, ttl_ms) in [("dies", 1_000), ("dies too", 1_000), ("for ever", u64::MAX)] {
        lock(&dead, &key(name), "ann", ttl_ms).await.unwrap();
    }
    drop(dead);
    let forever = || store.sql("SELECT until, expires_at FROM locks WHERE run_id = 'for ever'");
    let before = forever();
    let back =
        |run: &str| store.sql(&format!("UPDATE locks SET expires_at = expires_at + interval '1 hour' WHERE run_id = '{run}'"));
    back("dies");
    back("lives");
    store.sql("UPDATE openings SET seen_at = seen_at + interval '1 hour'");
    assert!(one.acquire_lock("dies", Duration::from_secs(30)).await.unwrap().is_some(), "it is held for an hour");
    // What an opening finds when it begins.
    back("dies too");
    let two = open().await;
    assert!(two.acquire_lock("dies too", Duration::from_secs(30)).await.unwrap().is_some(), "it is held for an hour");
    for name in ["lives", "for ever"] {
        assert!(two.acquire_lock(name, Duration::from_millis(200)).await.unwrap().is_none(), "two hold it");
    }
    assert!(lives.remaining() > Duration::ZERO);
    let shown = "SELECT until = expires_at, expires_at <= clock_timestamp() + interval '30 s' FROM locks WHERE run_id = 'lives'";
    assert_eq!((store.sql(shown), forever()), ("t|t".to_owned(), before));
    lives.release().await.unwrap();
    one.close().await.unwrap();
    two.close().await.unwrap();
}
