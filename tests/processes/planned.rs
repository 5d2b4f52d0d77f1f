//! Runs that one process plans and others work on by claims: whose they are when the planner has left.

use std::pin::pin;
use std::time::{Duration, Instant};

use seeknal_state::{ClaimFilter, Coordinator, Error, NewRun, Next, NodeUpdate, ProcessInfo};

use super::peer::Peer;
use super::support::Store;
use super::until;

on_every_database!(
    a_run_that_others_claim_from_is_theirs_when_its_planner_has_left,
    who_holds_a_lock_on_a_run_works_on_it,
    who_locks_a_run_while_it_is_watched_works_on_it,
);

const LONG: Duration = Duration::from_secs(60);
/// Between two claims at most, so that a run that is watched for a second is seen to be worked on.
const LONGEST_GAP: Duration = Duration::from_millis(400);

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

/// What is answered while somebody claims and completes one node after another; none if he did not come to it for too long.
async fn beside_work<T>(worker: &Coordinator, run: &str, asked: impl Future<Output = T>) -> Option<T> {
    let mut asked = pin!(asked);
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        let work = async {
            let claimed = claim(worker, run).await;
            claimed.release().await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let mut work = pin!(work);
        let answer = tokio::select! {
            () = &mut work => None,
            answer = &mut asked => Some(answer),
        };
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if let Some(answer) = answer {
            work.await;
            return (longest < LONGEST_GAP).then_some(answer);
        }
    }
}

async fn a_run_that_others_claim_from_is_theirs_when_its_planner_has_left(store: Store) {
    let (planner, looker) = (store.open().await, store.open().await);
    plan(&planner, "r", 4).await;
    let worker = store.open().await;
    let early = claim(&worker, "r").await;
    planner.close().await.unwrap();
    assert_in_use(&looker, "r", &me(&worker)).await;
    early.release().await.unwrap();
    // Now between two claims, now in the middle of one.
    until("it is watched while he works", async || {
        let Some(found) = beside_work(&worker, "r", abandoned(&looker)).await else { return false };
        assert_eq!(found, Vec::<String>::new());
        true
    })
    .await;
    until("he works while somebody would take it over", async || {
        let Some(resumed) = beside_work(&worker, "r", looker.resume_run("r")).await else { return false };
        assert!(matches!(resumed, Err(Error::RunInUse { .. } | Error::Conflict(_))), "{resumed:?}");
        true
    })
    .await;
    // He lives on, and has nothing to do with it any more.
    assert_eq!(abandoned(&looker).await, ["r"]);
    looker.resume_run("r").await.unwrap();
    assert_eq!(worker_of(&worker, "r").await, Some(me(&looker)));
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

/// A lock moves no version.
async fn who_locks_a_run_while_it_is_watched_works_on_it(store: Store) {
    let (planner, looker, holder) = (store.open().await, store.open().await, store.open().await);
    let runs = ["r0", "r1", "r2", "r3", "r4"];
    for run in runs {
        plan(&planner, run, 1).await;
    }
    planner.close().await.unwrap();
    let mut untried = runs.into_iter();
    until("it is locked soon enough", async || {
        let run = untried.next().expect("one of them is locked within a moment");
        let began = Instant::now();
        let locked = async {
            // In the middle of that second. Where the first look comes as late it is seen by that one.
            tokio::time::sleep(Duration::from_millis(150)).await;
            (holder.acquire_lock(run, LONG).await.unwrap().unwrap(), began.elapsed())
        };
        let (resumed, (lease, after)) = tokio::join!(looker.resume_run(run), locked);
        if after < LONGEST_GAP {
            assert!(matches!(&resumed, Err(Error::RunInUse { worker, .. }) if worker.id == me(&holder).id), "{resumed:?}");
            assert!(!abandoned(&looker).await.contains(&run.to_owned()));
        }
        drop(lease);
        after < LONGEST_GAP
    })
    .await;
}

/// Real processes: the planner is killed, and a worker goes on, until it is killed too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_of_a_killed_planner_is_its_workers() {
    let store = Store::of("database");
    let looker = store.open().await;
    let (mut planner, mut worker) = (Peer::start(&store.place), Peer::start(&store.place));
    assert_eq!(planner.ask("plan r 10"), "planned");
    planner.kill();
    assert_eq!(abandoned(&looker).await, ["r"], "nobody works on it yet");
    assert_eq!(worker.ask("hold r"), "held");
    for _ in 0..3 {
        assert_eq!(abandoned(&looker).await, Vec::<String>::new());
        assert!(matches!(looker.resume_run("r").await, Err(Error::RunInUse { .. })));
    }
    worker.kill();
    until("its lease is known to be a dead one's", async || abandoned(&looker).await == ["r"]).await;
}
