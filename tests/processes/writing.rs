//! Several processes write to one run.

use std::time::Duration;

use seeknal_state::{NewRun, NodeUpdate};

use super::peer::Peer;
use super::rows;
use super::support::Store;

on_every_database!(
    writers_of_different_nodes_never_conflict_and_lose_nothing,
    what_is_acknowledged_is_read_although_another_write_of_its_batch_is_refused,
    of_two_guarded_writes_of_one_node_exactly_one_wins,
    transactions_over_two_runs_happen_whole_whoever_else_writes,
    what_is_acknowledged_over_two_runs_is_read_at_once,
    a_transaction_of_others_over_two_runs_is_seen_whole,
    of_two_guarded_transactions_over_two_runs_exactly_one_wins,
);

async fn writers_of_different_nodes_never_conflict_and_lose_nothing(store: Store) {
    const WRITES: u64 = 100;
    let state = store.open().await;
    let before = state.create_run("r", NewRun::running()).await.unwrap().version();
    let mut peers: Vec<Peer> = (0..3).map(|_| Peer::start(&store.place)).collect();
    for (number, peer) in peers.iter_mut().enumerate() {
        peer.tell(&format!("write r n{number} {WRITES}"));
    }
    for peer in &mut peers {
        assert_eq!(peer.answer(), "written", "no write was refused");
    }
    let run = state.fresh("r").await.unwrap().unwrap();
    for number in 0..3 {
        assert_eq!(rows(&state, "r", &format!("n{number}")), Some(WRITES));
    }
    assert_eq!(run.version().0 - before.0, 3 * WRITES, "every acknowledged write has a version of its own");
    state.close().await.unwrap();
}

/// What is refused with it is looked up in storage first; who wrote the other reads it at once all the same.
async fn what_is_acknowledged_is_read_although_another_write_of_its_batch_is_refused(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let lease = state.acquire_lock("r", Duration::from_secs(30)).await.unwrap().unwrap();
    let late = state.with_lease(&lease);
    lease.release().await.unwrap();
    for row in 0..50 {
        let first = state.set_node_state("r", "first", NodeUpdate::running().row_count(row));
        let second = async {
            let commit = state.set_node_state("r", "second", NodeUpdate::running().row_count(row)).await.unwrap();
            (rows(&state, "r", "second"), commit.version())
        };
        let third = late.set_node_state("r", "third", NodeUpdate::running().row_count(row));
        let (first, (seen, version), third) = tokio::join!(first, second, third);
        assert!(first.is_ok() && third.unwrap_err().is_lease_lost());
        assert_eq!(seen, Some(row), "round {row}: it was acknowledged at version {version}");
    }
    state.close().await.unwrap();
}

async fn of_two_guarded_writes_of_one_node_exactly_one_wins(store: Store) {
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut peers = [Peer::start(&store.place), Peer::start(&store.place)];
    let mut won = [0, 0];
    for round in 1..=30_u64 {
        let version = state.fresh("r").await.unwrap().unwrap().version();
        for (number, peer) in (0_u64..).zip(&mut peers) {
            peer.tell(&format!("guarded r n {version} {}", round * 10 + number));
        }
        let answers = [peers[0].answer(), peers[1].answer()];
        let winner = answers.iter().position(|answer| answer == "won").unwrap_or_else(|| panic!("nobody won: {answers:?}"));
        assert_eq!(answers[1 - winner], "lost", "round {round}");
        won[winner] += 1;
        let run = state.fresh("r").await.unwrap().unwrap();
        assert_eq!(run.version(), version.next());
        assert_eq!(run.node("n").unwrap().row_count, Some(round * 10 + u64::try_from(winner).unwrap()), "what the winner wrote");
    }
    println!("guarded rounds won: {won:?}");
    state.close().await.unwrap();
}

async fn transactions_over_two_runs_happen_whole_whoever_else_writes(store: Store) {
    const RAISES: u64 = 40;
    let state = store.open().await;
    let mut before = Vec::new();
    for run in ["a", "b"] {
        before.push(state.create_run(run, NewRun::running()).await.unwrap().version().0);
    }
    // In opposite orders, so that they would wait for one another if anybody took the runs as they are named.
    let mut peers = [Peer::start(&store.place), Peer::start(&store.place)];
    peers[0].tell(&format!("raise a b n {RAISES}"));
    peers[1].tell(&format!("raise b a n {RAISES}"));
    for peer in &mut peers {
        let answer = peer.answer();
        assert!(answer.starts_with("raised"), "{answer}");
        println!("{answer}");
    }
    for (run, before) in ["a", "b"].into_iter().zip(before) {
        let stored = state.fresh(run).await.unwrap().unwrap();
        assert_eq!(rows(&state, run, "n"), Some(2 * RAISES), "run {run}: a raise is lost, or happened in one run only");
        assert_eq!(stored.version().0 - before, 2 * RAISES, "run {run}: something happened twice");
    }
    state.close().await.unwrap();
}

/// Also if somebody else wrote to one of the runs in between.
async fn what_is_acknowledged_over_two_runs_is_read_at_once(store: Store) {
    let state = store.open().await;
    for run in ["a", "b"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    let other = store.open().await;
    for row in 0..50 {
        other.set_node_state("a", "theirs", NodeUpdate::running().row_count(row)).await.unwrap();
        let mut tx = state.transaction();
        for run in ["a", "b"] {
            tx.set_node_state(run, "ours", NodeUpdate::running().row_count(row));
        }
        tx.commit().await.unwrap();
        let seen = ["a", "b"].map(|run| rows(&state, run, "ours"));
        assert_eq!(seen, [Some(row); 2], "round {row}");
    }
    other.close().await.unwrap();
    state.close().await.unwrap();
}

/// What another process commits over two runs comes here run by run; who reads both sees it whole.
async fn a_transaction_of_others_over_two_runs_is_seen_whole(store: Store) {
    let state = store.open().await;
    for run in ["a", "b"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    let mut peer = Peer::start(&store.place);
    peer.tell("raise a b n 60");
    let mut seen = 0;
    while seen < 60 {
        let runs = state.snapshots(&["b", "a"]).await.unwrap();
        let rows: Vec<_> = runs.iter().map(|run| run.as_ref().unwrap().node("n").and_then(|node| node.row_count)).collect();
        assert_eq!(rows[0], rows[1], "it is seen in part");
        let now = rows[0].unwrap_or(0);
        assert!(now >= seen, "{now} is older than {seen}");
        seen = now;
    }
    let answer = peer.answer();
    assert!(answer.starts_with("raised"), "{answer}");
    state.close().await.unwrap();
}

async fn of_two_guarded_transactions_over_two_runs_exactly_one_wins(store: Store) {
    let state = store.open().await;
    for run in ["a", "b"] {
        state.create_run(run, NewRun::running()).await.unwrap();
    }
    let mut peers = [Peer::start(&store.place), Peer::start(&store.place)];
    for round in 1..=20_u64 {
        let a = state.fresh("a").await.unwrap().unwrap().version();
        let b = state.fresh("b").await.unwrap().unwrap().version();
        peers[0].tell(&format!("both a b n {a},{b} {}", round * 10));
        peers[1].tell(&format!("both b a n {b},{a} {}", round * 10 + 1));
        let answers = [peers[0].answer(), peers[1].answer()];
        let winner = answers.iter().position(|answer| answer == "won").unwrap_or_else(|| panic!("nobody won: {answers:?}"));
        assert_eq!(answers[1 - winner], "lost", "round {round}");
        for (run, version) in [("a", a), ("b", b)] {
            let stored = state.fresh(run).await.unwrap().unwrap();
            assert_eq!(stored.version(), version.next(), "round {round}, run {run}");
            let wrote = round * 10 + u64::try_from(winner).unwrap();
            assert_eq!(stored.node("n").unwrap().row_count, Some(wrote), "round {round}, run {run}: what the winner wrote");
        }
    }
    state.close().await.unwrap();
}
