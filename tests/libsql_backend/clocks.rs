//! What the server's clock says of who has the state open, and of locks, where it goes on by days or goes back.

use std::time::Duration;

use seeknal_state::model::LeaseKey;
use seeknal_state::{Coordinator, NewRun, NodeUpdate, create_state_backend};

use super::batches::{lock, run_id};
use super::sqld::Sqld;

async fn open(server: &Sqld) -> Coordinator {
    Coordinator::open(create_state_backend("database", &server.options()).unwrap()).await.unwrap()
}

/// A server that was away for days, or whose clock went on by days, heard of nobody for as long: that is no sign that they are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_lives_is_not_forgotten_because_nothing_was_heard_of_it_for_days() {
    let Some(server) = Sqld::start() else { return };
    let two = open(&server).await;
    two.create_run("r", NewRun::running()).await.unwrap();
    let id = two.backend().process().unwrap().id;
    server.sql("INSERT INTO openings SELECT 'dead', host, pid, started_at, seen_ms FROM openings");
    server.sql("INSERT INTO openings SELECT 'of then', host, pid, started_at, seen_ms + 5 * 86400000 FROM openings WHERE process = 'dead'");
    server.sql("UPDATE openings SET seen_ms = seen_ms - 2 * 86400000 WHERE process <> 'of then'");

    let one = open(&server).await;
    let listed = async || -> Vec<String> {
        one.backend().processes().await.unwrap().into_iter().map(|open| open.process.id.to_string()).collect()
    };
    assert!(listed().await.contains(&id.to_string()), "it was forgotten");
    assert!(one.abandoned_runs().await.unwrap().is_empty(), "the run of a process that lives");
    assert!(one.resume_run("r").await.is_err(), "its run was taken from a process that lives");
    // Those that are gone are forgotten, also where the clock was wrong when they were heard of.
    let patience = tokio::time::Instant::now() + Duration::from_secs(90);
    while listed().await.len() > 2 {
        assert!(tokio::time::Instant::now() < patience, "they stay for ever: {:?}", listed().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(listed().await.contains(&id.to_string()));
    two.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
}

/// No opening lives for long enough to see that another one is gone.
#[tokio::test]
async fn short_openings_that_are_killed_do_not_pile_up() {
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    for (process, days) in [("lately", 0.5), ("of then", 1.5), ("a day before", 2.6)] {
        let row = format!("'{process}', host, pid, started_at, seen_ms - 86400000 * {days}");
        server.sql(&format!("INSERT INTO openings SELECT {row} FROM openings ORDER BY seen_ms DESC LIMIT 1"));
    }
    let short = open(&server).await;
    let left = server.sql("SELECT process FROM openings");
    assert!(left.contains("lately") && left.contains("of then") && !left.contains("a day before"), "{left}");
    drop((state, short));
}

/// A clock that was ahead when a process was heard of last does not make it live until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_was_heard_of_in_the_future_is_watched_too() {
    let Some(server) = Sqld::start() else { return };
    let (one, two) = (open(&server).await, open(&server).await);
    two.create_run("r", NewRun::running()).await.unwrap();
    let id = two.backend().process().unwrap().id;
    server.sql("CREATE TABLE kept AS SELECT * FROM openings");
    two.close().await.unwrap();
    server.sql(&format!("INSERT INTO openings SELECT * FROM kept WHERE process = '{id}'"));
    server.sql(&format!("UPDATE openings SET seen_ms = seen_ms + 3600000 WHERE process = '{id}'"));
    assert_eq!(one.abandoned_runs().await.unwrap().len(), 1);
    one.resume_run("r").await.unwrap();
}

/// A clock that goes back prolongs no lock of who is dead by more than its own time to live, and takes none from who lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clock_that_goes_back_prolongs_a_lock_by_its_own_life_at_most() {
    let Some(server) = Sqld::start() else { return };
    let one = open(&server).await;
    let lives = one.acquire_lock("lives", Duration::from_secs(5)).await.unwrap().unwrap();
    let dead = create_state_backend("database", &server.options()).unwrap();
    dead.initialize().await.unwrap();
    let key = |name: &str| LeaseKey { run: run_id(name), node: None };
    lock(&dead, &key("dies"), "ann", 1_000).await.unwrap();
    lock(&dead, &key("for ever"), "ann", u64::MAX).await.unwrap();
    let forever = || {
        let answer = server.sql("SELECT until, expires_ms FROM locks WHERE run_id = 'for ever'");
        answer.split_once(r#""rows":"#).unwrap().1.split_once("]]").unwrap().0.to_owned()
    };
    let before = forever();
    drop(dead);
    // As if the clock had gone back by an hour.
    server.sql("UPDATE locks SET expires_ms = expires_ms + 3600000 WHERE run_id <> 'for ever'");
    server.sql("UPDATE openings SET seen_ms = seen_ms + 3600000");
    let granted = one.acquire_lock("dies", Duration::from_secs(60)).await.unwrap();
    assert!(granted.is_some(), "it is held for an hour");
    let two = open(&server).await;
    assert!(two.acquire_lock("lives", Duration::from_millis(200)).await.unwrap().is_none(), "two hold it");
    assert!(two.acquire_lock("for ever", Duration::from_millis(200)).await.unwrap().is_none(), "two hold it");
    assert!(lives.remaining() > Duration::ZERO);
    let shown = "until = strftime('%Y-%m-%dT%H:%M:%f000Z', expires_ms / 1000.0, 'unixepoch') AND expires_ms <= unixepoch('subsec') * 1000 + ttl_ms";
    let shown = server.sql(&format!("SELECT count(*) FROM locks WHERE run_id = 'lives' AND {shown}"));
    assert!(shown.contains(r#""value":"1""#), "{}", server.sql("SELECT * FROM locks"));
    assert_eq!(forever(), before);
    lives.release().await.unwrap();
}

/// What an opening finds when it begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_after_a_clock_went_back_waits_for_a_dead_holder_no_longer_than_its_lock_lives() {
    let Some(server) = Sqld::start() else { return };
    let dead = create_state_backend("database", &server.options()).unwrap();
    dead.initialize().await.unwrap();
    lock(&dead, &LeaseKey { run: run_id("dies"), node: None }, "ann", 500).await.unwrap();
    drop(dead);
    server.sql("UPDATE locks SET expires_ms = expires_ms + 3600000");
    let state = open(&server).await;
    assert!(state.acquire_lock("dies", Duration::from_secs(30)).await.unwrap().is_some(), "it is held for an hour");
}
