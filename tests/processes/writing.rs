//! Several processes write to one run.

use seeknal_state::NewRun;

use super::peer::Peer;
use super::rows;
use super::support::{self, Store};

on_every_database!(
    writers_of_different_nodes_never_conflict_and_lose_nothing,
    of_two_guarded_writes_of_one_node_exactly_one_wins,
    transactions_over_two_runs_happen_whole_whoever_else_writes,
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
