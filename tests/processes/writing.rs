//! Several processes write to one run.

use seeknal_state::NewRun;

use super::peer::Peer;
use super::rows;
use super::support::Store;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_different_nodes_never_conflict_and_lose_nothing() {
    const WRITES: u64 = 300;
    let store = Store::of("database");
    let state = store.open().await;
    let before = state.create_run("r", NewRun::running()).await.unwrap().version();
    let mut peers: Vec<Peer> = (0..3).map(|_| Peer::start(store.folder.path())).collect();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_guarded_writes_of_one_node_exactly_one_wins() {
    let store = Store::of("database");
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut peers = [Peer::start(store.folder.path()), Peer::start(store.folder.path())];
    let mut won = [0, 0];
    for round in 1..=50_u64 {
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
