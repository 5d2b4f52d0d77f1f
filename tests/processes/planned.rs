//! Runs that one process plans and others work on by claims: whose they are when the planner has left.

use std::time::Duration;

use seeknal_state::{ClaimFilter, Coordinator, Error, NewRun, Next, NodeUpdate, ProcessInfo, RunUpdate};

use super::peer::Peer;
use super::support::Store;
use super::until;

on_every_database!(
    a_run_that_others_claim_from_is_theirs_when_its_planner_has_left,
    who_holds_a_lock_on_a_run_works_on_it,
    a_run_that_nobody_claims_from_any_more_is_abandoned_again,
    who_takes_a_run_that_he_claims_from_keeps_it,
);

const LONG: Duration = Duration::from_secs(60);

async fn plan(state: &Coordinator, run: &str, nodes: u32) {
    let mut tx = state.transaction();
    tx.create_run(run, NewRun::running());
    for node in 0..nodes {
        tx.set_node_state(run, format!("n{node}"), NodeUpdate::pending());
    }
    tx.commit().await.unwrap();
}

fn me(state: &Coordinator) -> ProcessInfo {
    state.backend().process().unwrap()
}

async fn worker_of(state: &Coordinator, run: &str) -> Option<ProcessInfo> {
    state.fresh(run).await.unwrap().unwrap().header().worker.clone()
}

async fn abandoned(state: &Coordinator) -> Vec<String> {
    state.abandoned_runs().await.unwrap().into_iter().map(|run| run.summary.run_id.to_string()).collect()
}

async fn claim(state: &Coordinator, run: &str) -> seeknal_state::Claim {
    match state.claim_next(run, ClaimFilter::new().wait(LONG)).await.unwrap() {
        Next::Claimed(claim) => claim,
        other => panic!("{other:?}"),
    }
}

async fn assert_in_use(state: &Coordinator, run: &str, by: &ProcessInfo) {
    assert_eq!(abandoned(state).await, Vec::<String>::new());
    match state.resume_run(run).await {
        Err(Error::RunInUse { worker, .. }) => assert_eq!(worker.id, by.id),
        other => panic!("{other:?}"),
    }
}

async fn a_run_that_others_claim_from_is_theirs_when_its_planner_has_left(store: Store) {
    let (planner, looker) = (store.open().await, store.open().await);
    plan(&planner, "r", 4).await;
    let (one, two) = (store.open().await, store.open().await);
    let early = claim(&one, "r").await;
    assert_eq!(worker_of(&looker, "r").await, Some(me(&planner)), "he lives");
    planner.close().await.unwrap();
    // By its lease alone: since the planner left nobody has claimed.
    assert_in_use(&looker, "r", &me(&one)).await;
    early.complete(NodeUpdate::success()).await.unwrap();
    let now = claim(&two, "r").await;
    assert_eq!(worker_of(&looker, "r").await, Some(me(&two)), "in the commit of the claim");
    now.complete(NodeUpdate::success()).await.unwrap();
    // Between two claims.
    assert_in_use(&looker, "r", &me(&two)).await;
    two.close().await.unwrap();
    // He knew of a worker that lives a moment ago: then a claim of his changes nothing.
    until("he hears that it left", async || {
        claim(&one, "r").await.release().await.unwrap();
        worker_of(&looker, "r").await == Some(me(&one))
    })
    .await;
    assert_in_use(&looker, "r", &me(&one)).await;
    one.close().await.unwrap();
    assert_eq!(abandoned(&looker).await, ["r"]);
    looker.resume_run("r").await.unwrap();
    assert_eq!(worker_of(&looker, "r").await, Some(me(&looker)));
}

async fn who_holds_a_lock_on_a_run_works_on_it(store: Store) {
    let (planner, looker, holder) = (store.open().await, store.open().await, store.open().await);
    plan(&planner, "r", 1).await;
    let lease = holder.acquire_lock("r", LONG).await.unwrap().unwrap();
    planner.close().await.unwrap();
    assert_in_use(&looker, "r", &me(&holder)).await;
    assert_eq!(abandoned(&holder).await, Vec::<String>::new(), "he works on it himself");
    // Nobody but himself is in his way.
    holder.resume_run("r").await.unwrap();
    assert_eq!(worker_of(&looker, "r").await, Some(me(&holder)));
    lease.release().await.unwrap();
    holder.close().await.unwrap();
    assert_eq!(abandoned(&looker).await, ["r"]);
}

/// A worker that lives on, and has nothing to do with it any more, keeps nobody from ending it.
async fn a_run_that_nobody_claims_from_any_more_is_abandoned_again(store: Store) {
    let (planner, looker, worker) = (store.open().await, store.open().await, store.open().await);
    plan(&planner, "r", 2).await;
    planner.close().await.unwrap();
    for _ in 0..2 {
        let claim = claim(&worker, "r").await;
        assert_eq!(worker_of(&looker, "r").await, Some(me(&worker)));
        claim.complete(NodeUpdate::success()).await.unwrap();
    }
    let drained = worker.claim_next("r", ClaimFilter::new()).await.unwrap();
    assert!(matches!(drained, Next::Drained { .. }), "{drained:?}");
    until("it is nobody's", async || abandoned(&looker).await == ["r"]).await;
    looker.resume_run("r").await.unwrap();
    assert_eq!(worker_of(&worker, "r").await, Some(me(&looker)));
    looker.update_run("r", RunUpdate::success()).await.unwrap();
    worker.close().await.unwrap();
}

async fn who_takes_a_run_that_he_claims_from_keeps_it(store: Store) {
    let (planner, looker, worker) = (store.open().await, store.open().await, store.open().await);
    for run in ["resumed", "updated", "left"] {
        plan(&planner, run, 1).await;
    }
    planner.close().await.unwrap();
    for run in ["resumed", "updated", "left"] {
        let claim = claim(&worker, run).await;
        assert_eq!(worker_of(&looker, run).await, Some(me(&worker)));
        match run {
            "resumed" => assert!(worker.resume_run(run).await.unwrap().commit.is_none(), "it is his already"),
            "updated" => drop(worker.update_run(run, RunUpdate::running()).await.unwrap()),
            _ => {}
        }
        claim.complete(NodeUpdate::success()).await.unwrap();
    }
    for run in ["resumed", "updated", "left"] {
        let drained = worker.claim_next(run, ClaimFilter::new()).await.unwrap();
        assert!(matches!(drained, Next::Drained { .. }), "{drained:?}");
    }
    // All are looked at together.
    until("the one that nobody took is given back", async || worker_of(&looker, "left").await != Some(me(&worker))).await;
    assert_eq!(abandoned(&looker).await, ["left"]);
    for run in ["resumed", "updated"] {
        assert_eq!(worker_of(&looker, run).await, Some(me(&worker)), "{run}");
    }
}

/// Real processes: the planner is killed, and a worker goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_a_killed_planner_is_its_workers() {
    let store = Store::of("database");
    let looker = store.open().await;
    let (mut planner, mut worker) = (Peer::start(&store.place), Peer::start(&store.place));
    assert_eq!(planner.ask("plan r 50"), "planned");
    planner.kill();
    assert_eq!(abandoned(&looker).await, ["r"], "nobody works on it yet");
    assert_eq!(worker.ask("work r 1"), "worked");
    let heir = worker_of(&looker, "r").await.unwrap();
    worker.tell("work r 40");
    for _ in 0..20 {
        assert_in_use(&looker, "r", &heir).await;
    }
    assert_eq!(worker.answer(), "worked");
    assert_in_use(&looker, "r", &heir).await;
    worker.kill();
    assert_eq!(abandoned(&looker).await, ["r"]);
}
